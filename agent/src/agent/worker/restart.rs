//! The part of a set's worker that starts one container again: after its end, or when a roll goes back.

use protocol::ids::Name;

use super::{Live, Worker};
use crate::mounts;

impl Worker {
    /// Starts a container of what runs again; returns the new instance's id and process id.
    pub(super) fn restart(
        &mut self,
        container: &Name,
        restarts: u32,
    ) -> Result<(String, u32), String> {
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
    ) -> Result<(String, u32), String> {
        let mut members = live.members.iter_mut().enumerate();
        let (index, member) =
            members.find(|(_, it)| it.container.name == *name).ok_or("no such container")?;
        member.restarts = restarts;
        self.forget_leftover(member);
        if let Some(old) = &member.handle {
            // It has ended, or came up too late for its start to count.
            old.stop().map_err(|error| crate::agent::chain(&error))?;
            old.remove().map_err(|error| crate::agent::chain(&error))?;
        }
        member.handle = None;
        self.start_member(live, index)
    }

    /// Creates an instance of a member and lets it run; returns its id and process id.
    pub(super) fn start_member(
        &self,
        live: &mut Live,
        index: usize,
    ) -> Result<(String, u32), String> {
        let member = live.members.get(index).ok_or("no such member")?;
        if !mounts::is_mounted(&member.mount) {
            self.mount(&live.pulled, &member.container.name, &member.container.image)?;
        }
        let handle = self.create(live, index)?;
        let id = handle.spec().id.clone();
        let released = handle.release().map_err(|error| crate::agent::chain(&error));
        if let Some(member) = live.members.get_mut(index) {
            member.handle = Some(handle);
        }
        Ok((id, released?.pid))
    }
}
