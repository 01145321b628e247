//! Capabilities and ids of the container's program (capabilities(7)).
//!
//! Root gets the profile's capabilities and those the set grants, as its bounding, permitted and effective sets; nothing
//! inheritable. Another user gets only those the set grants, as ambient ones; the profile's stay in the bounding set, which
//! is what a setuid program of a whole system could reach at most.

use std::collections::HashSet;
use std::str::FromStr;

use caps::{CapSet, Capability};
use protocol::imageset::Profile;
use rustix::fs::{Gid, Uid};
use rustix::thread::{
    set_keep_capabilities, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};

use super::users::User;
use super::{InitError, step};
use crate::containers::Spec;

/// What containerd 2 gives a service.
const SERVICE: [Capability; 9] = [
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
    Capability::CAP_KILL,
    Capability::CAP_NET_BIND_SERVICE,
    Capability::CAP_SETGID,
    Capability::CAP_SETPCAP,
    Capability::CAP_SETUID,
];
/// What podman gives a systemd container besides.
const SYSTEM_TOO: [Capability; 2] = [Capability::CAP_SETFCAP, Capability::CAP_SYS_CHROOT];

/// The capabilities of a profile.
#[must_use]
pub fn of_profile(profile: Profile) -> HashSet<Capability> {
    let more = SYSTEM_TOO.into_iter().filter(|_| profile == Profile::System);
    SERVICE.into_iter().chain(more).collect()
}

/// What a container may do: its bounding set, and what its description grants by name.
#[derive(Debug, Clone, Default)]
pub struct Capabilities {
    /// The most that anything in it can have.
    pub bounding: HashSet<Capability>,
    /// What a user other than root has as well.
    pub granted: HashSet<Capability>,
}

/// The capabilities of the spec. A privileged container has all that this node has.
///
/// # Errors
/// [`InitError::Capability`] when the set grants what this node does not have.
pub(super) fn of(spec: &Spec) -> Result<Capabilities, InitError> {
    let held = caps::read(None, CapSet::Permitted)?;
    let mut granted = HashSet::new();
    for name in &spec.capabilities {
        let known = Capability::from_str(name).ok().filter(|capability| held.contains(capability));
        granted.insert(known.ok_or_else(|| InitError::Capability(name.clone()))?);
    }
    let mut bounding = match spec.view.privileged {
        true => held.clone(),
        false => of_profile(spec.profile),
    };
    let dropped = spec.view.drop_capabilities.iter();
    for capability in dropped.filter_map(|name| Capability::from_str(name).ok()) {
        bounding.remove(&capability);
    }
    bounding.retain(|capability| held.contains(capability));
    bounding.extend(&granted);
    Ok(Capabilities { bounding, granted })
}

/// Becomes the user with these capabilities. For the calling thread, which must be the only one.
///
/// # Errors
/// The kernel's refusal.
pub(super) fn take(spec: &Spec, capabilities: &Capabilities, user: &User) -> Result<(), InitError> {
    let Capabilities { bounding, granted } = capabilities;
    if !spec.view.privileged || !spec.view.drop_capabilities.is_empty() {
        for capability in caps::runtime::thread_all_supported() {
            if !bounding.contains(&capability) {
                caps::drop(None, CapSet::Bounding, capability)?;
            }
        }
    }
    caps::clear(None, CapSet::Ambient)?;
    become_user(user)?;
    if user.uid == 0 {
        caps::set(None, CapSet::Effective, bounding)?;
        caps::set(None, CapSet::Permitted, bounding)?;
        caps::clear(None, CapSet::Inheritable)?;
    } else {
        caps::set(None, CapSet::Inheritable, granted)?;
        caps::clear(None, CapSet::Effective)?;
        caps::set(None, CapSet::Permitted, granted)?;
        caps::set(None, CapSet::Effective, granted)?;
        caps::set(None, CapSet::Ambient, granted)?;
    }
    Ok(())
}

fn become_user(user: &User) -> Result<(), InitError> {
    // Its own group as well: permissions that deny a group must hold for it (CVE-2022-36109).
    let ids = [user.gid].into_iter().chain(user.groups.iter().copied());
    let groups: Vec<Gid> = ids.map(Gid::from_raw).collect();
    set_thread_groups(&groups).map_err(step("set the groups"))?;
    let gid = Gid::from_raw(user.gid);
    set_thread_res_gid(gid, gid, gid).map_err(step(format!("become group {}", user.gid)))?;
    // The permitted set survives the change of user; the exec clears the flag.
    set_keep_capabilities(true).map_err(step("keep capabilities"))?;
    let uid = Uid::from_raw(user.uid);
    set_thread_res_uid(uid, uid, uid).map_err(step(format!("become user {}", user.uid)))?;
    set_keep_capabilities(false).map_err(step("keep capabilities"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_gets_nine_capabilities_and_a_system_eleven() {
        let (service, system) = (of_profile(Profile::Service), of_profile(Profile::System));
        assert_eq!((service.len(), system.len()), (9, 11));
        assert!(service.is_subset(&system));
        for dangerous in [Capability::CAP_SYS_ADMIN, Capability::CAP_MKNOD, Capability::CAP_NET_RAW]
        {
            assert!(!system.contains(&dangerous));
        }
    }
}
