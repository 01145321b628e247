//! The part of a set's worker that hands the machine over: `mode = "pivot"`. PID 1 does it; see [`crate::init::pivot`].

use std::time::Duration;

use protocol::imageset::Container;

use super::roll::report;
use super::{Live, Member, Worker, deployment};
use crate::agent::set::{CutOverFailure, Deployment};
use crate::init::control::{self, Request};

impl Worker {
    /// Mounts the one image of a set that is to take the machine.
    pub(super) fn stage_pivot(&self, live: &mut Live) -> Result<(), String> {
        if self.around.init.is_none() {
            return Err("mode = \"pivot\" needs Layer0's PID 1".to_owned());
        }
        let image = live.pulled.set.images.first().ok_or("the set has no image")?.name.clone();
        // A mount without container: remembered as a member that is never created.
        let mount = self.mount(&live.pulled, &image, &image)?;
        let container: Container =
            serde_json::from_value(serde_json::json!({"name": image, "image": image}))
                .map_err(|error| error.to_string())?;
        live.members.push(Member::new(container, mount));
        Ok(())
    }

    /// Stops what the set ran in containers and asks PID 1 for the pivot; goes back when it refuses.
    pub(super) fn pivot(
        &mut self,
        live: Live,
        decided: Duration,
    ) -> Result<Box<Deployment>, Box<CutOverFailure>> {
        let mut old = self.running.take();
        if let Some(old) = &mut old {
            let stopped = self.stop_members(old);
            self.remove(stopped);
        }
        let report = report(&live, old.as_ref(), decided);
        if let Err(reason) = self.ask_for_pivot(&live) {
            let running = self.return_to(old, live);
            return Err(Box::new(CutOverFailure { reason, running, report: Some(report) }));
        }
        if let Err(error) = control::detach_layer0() {
            log::warn!("the old root stays mounted: {error}");
        }
        if let Some(old) = old {
            self.take_down(old);
        }
        let deployment = deployment(&live, Vec::new(), Some(report));
        self.running = Some(live);
        Ok(Box::new(deployment))
    }

    fn ask_for_pivot(&self, live: &Live) -> Result<(), String> {
        let request = pivot_request(live)?;
        let init = self.around.init.as_ref().ok_or("there is no PID 1 of Layer0")?;
        init.call(&request).map_err(|error| format!("pivot: {}", crate::agent::chain(&error)))
    }
}

fn pivot_request(live: &Live) -> Result<Request, String> {
    let member = live.members.first().ok_or("nothing is staged")?;
    let image =
        live.pulled.images.get(&member.container.image).ok_or("the image was not pulled")?;
    let mut argv = live.pulled.set.init.clone();
    if argv.is_empty() {
        argv.push("/sbin/init".to_owned());
    }
    Ok(Request::Pivot { root: member.mount.join("root"), argv, env: image.config.env.clone() })
}
