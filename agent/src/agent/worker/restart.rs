//! The part of a set's worker that starts one container again.

use protocol::ids::Name;

use super::{Live, Worker};
use crate::agent::set::Started;

impl Worker {
    /// Starts a container of what runs again.
    pub(super) fn restart(&mut self, container: &Name, restarts: u32) -> Result<Started, String> {
        let Some(mut live) = self.running.take() else {
            return Err("the set does not run".to_owned());
        };
        let result = self.restart_member(&mut live, container, restarts);
        self.running = Some(live);
        result
    }

    fn restart_member(
        &self,
        live: &mut Live,
        name: &Name,
        restarts: u32,
    ) -> Result<Started, String> {
        let mut members = live.members.iter_mut().enumerate();
        let (index, member) =
            members.find(|(_, it)| it.container.name == *name).ok_or("no such container")?;
        member.restarts = restarts;
        self.forget_leftover(member);
        if let Some(old) = &member.handle {
            // It has ended, is unhealthy, or came up too late for its start to count.
            self.around.forget(&old.spec().id);
            old.stop().map_err(|error| crate::agent::chain(&error))?;
            old.remove().map_err(|error| crate::agent::chain(&error))?;
        }
        member.handle = None;
        let handle = self.create(live, index)?;
        let member = live.members.get_mut(index).ok_or("no such container")?;
        member.handle = Some(handle);
        self.begin(member)
    }
}
