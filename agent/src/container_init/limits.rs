//! Resource limits of the container's program (setrlimit(2)) and its place in the kernel's choice of victims.

use rustix::process::{Resource, Rlimit};

use super::{InitError, step};
use crate::containers::Spec;

/// Open files a program may ask for; it starts with the traditional limit.
const MAX_OPEN_FILES: u64 = 524_288;
/// What select(2) can take, and what programs expect to start with.
const OPEN_FILES: u64 = 1024;

/// Sets what the description asks for, and the limit of open files where it says nothing of it.
///
/// # Errors
/// A limit that is asked for and cannot be set, by its name.
pub(crate) fn set(spec: &Spec) -> Result<(), InitError> {
    // Without CAP_SYS_RESOURCE neither can be raised, and what is inherited does as well.
    let _ = std::fs::write("/proc/self/oom_score_adj", "0");
    let ulimits = &spec.view.ulimits;
    if !ulimits.contains_key("nofile") {
        let files = Rlimit { current: Some(OPEN_FILES), maximum: Some(MAX_OPEN_FILES) };
        let _ = rustix::process::setrlimit(Resource::Nofile, files);
    }
    for (name, ulimit) in ulimits {
        let unknown = rustix::io::Errno::INVAL;
        let failed = || format!("ulimit {name}");
        let resource = resource(name).ok_or(unknown).map_err(step(failed()))?;
        let (soft, hard) = ulimit.bounds();
        let limit = Rlimit { current: soft.0, maximum: hard.0 };
        rustix::process::setrlimit(resource, limit).map_err(step(failed()))?;
    }
    Ok(())
}

fn resource(name: &str) -> Option<Resource> {
    Some(match name {
        "as" => Resource::As,
        "core" => Resource::Core,
        "cpu" => Resource::Cpu,
        "data" => Resource::Data,
        "fsize" => Resource::Fsize,
        "locks" => Resource::Locks,
        "memlock" => Resource::Memlock,
        "msgqueue" => Resource::Msgqueue,
        "nice" => Resource::Nice,
        "nofile" => Resource::Nofile,
        "nproc" => Resource::Nproc,
        "rss" => Resource::Rss,
        "rtprio" => Resource::Rtprio,
        "sigpending" => Resource::Sigpending,
        "stack" => Resource::Stack,
        _ => return None,
    })
}
