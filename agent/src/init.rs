//! PID 1 of Layer0: tiny, and it never ends.
//!
//! It prepares the machine ([`early`]) and stays as [`resident`]: one thread, one poll loop, no memory beyond its start's. It
//! knows nothing of ImageSets, containers or the network, and holds nothing that they need. What is too large for the
//! resident part is another stage of this program: when it crashes it executes itself as `init --recover`, which finds
//! children and descriptors in place ([`adopt`]); a [`pivot`] is done by `init --pivot` and the end ([`shutdown`]) by
//! `init --reboot` and its like, which go back to `init --resume` where they fail.

use std::ffi::CStr;
use std::fs;
use std::io;
use std::time::Duration;

use nix::sys::signal::SigSet;
use protocol::boot_args::{BootArgs, LogLevel};

use crate::identity;
use crate::logging::{self, Target};
use crate::paths::{RUN_DIR, RunDirs};
use crate::sys::{allocator, crash, session, start};
use control::{ControlError, Request};
use resident::watchdog::Watchdog;
use resident::{CONTROL_FD, PULSE_FD, WATCHDOG_FD};
use shutdown::End;

pub mod adopt;
pub mod control;
pub mod early;
pub mod pivot;
pub mod rescue;
pub mod resident;
pub mod roles;
pub mod settle;
pub mod shutdown;

/// The environment of what PID 1 starts.
pub const ENVIRONMENT: [&CStr; 2] = [c"PATH=/usr/sbin:/usr/bin:/sbin:/bin", c"HOME=/"];
/// The environment variable that tells the agent which start of this boot it is, 1 for the first.
pub const STARTS_VARIABLE: &str = "LAYERCAKE_AGENT_STARTS";
/// `argv[0]` of the agent; systemd spares processes with an `@` there when it takes over (pivot).
pub const AGENT_NAME: &CStr = c"@layercake-agent";
/// The argument of PID 1 that is about to pivot.
pub const PIVOT: &CStr = c"--pivot";
/// The argument of PID 1 that goes on after that.
pub const RESUME: &CStr = c"--resume";

/// Why PID 1 is executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// By the kernel: nothing is there yet.
    First,
    /// By itself, after a crash.
    Recover,
    /// By itself, with a request for a pivot in the control socket.
    Pivot,
    /// By itself, to end the machine.
    End(End),
    /// By itself, after one of these has failed.
    Resume,
}

/// Runs PID 1.
pub fn run(stage: Stage) -> ! {
    let crash_handlers = crash::install();
    let clear_mask = SigSet::empty().thread_set_mask();
    let begun = if stage == Stage::First { early::begin() } else { Vec::new() };
    let command_line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let args = BootArgs::parse(&command_line);
    let debug = args.log == LogLevel::Debug;
    logging::init(if debug { LogLevel::Debug } else { LogLevel::Info }, Target::Layer0("init"));
    std::panic::set_hook(Box::new(|info| {
        allocator::unseal();
        log::error!("{}; starting over", logging::panic_text(info));
        crash::restart_self();
    }));
    report("crash handlers", crash_handlers);
    report("signal mask", clear_mask.map_err(Into::into));
    for (grave, problem) in begun {
        if grave { log::error!("{problem}") } else { log::debug!("{problem}") }
    }
    match stage {
        Stage::First => {
            logging::quiet_kernel_console();
            let (version, kernel) = (env!("CARGO_PKG_VERSION"), identity::release());
            log::info!("Layercake {version} Layer0, kernel {kernel}");
            early::link_devices();
            early::tune_kernel();
            early::prepare_cgroups();
            report(RUN_DIR, fs::create_dir_all(RunDirs::new(RUN_DIR).state()));
        }
        Stage::Recover => {
            log::warn!("PID 1 has crashed and goes on");
            // Should the crash repeat at once, let it do so calmly.
            std::thread::sleep(Duration::from_secs(1));
        }
        Stage::Pivot => take_machine(),
        Stage::End(end) => {
            shutdown::run(end, adopt::agent(), &mut adopt::watchdog(&args));
            crash::restart_as(RESUME);
        }
        Stage::Resume => {}
    }
    adopt::resident(&args).run()
}

/// Says what went wrong without stopping for it.
fn report(what: &str, result: io::Result<()>) {
    if let Err(error) = result {
        log::error!("{what}: {error}");
    }
}

/// The pivot that waits in the control socket. It does not come back when it works; nor when it does not, but then PID 1 is
/// what it was.
fn take_machine() {
    let Some(socket) = start::kept(CONTROL_FD) else { return };
    let reason = match control::receive(&socket) {
        Ok(Request::Pivot { root, argv, env }) => {
            log::info!("pivot to {}, init {}", root.display(), argv.join(" "));
            let reason = pivot::run(&root, &argv, &env, prepare_exec, after_failed_exec);
            log::error!("pivot failed, Layer0 stays: {reason}");
            reason
        }
        Ok(_) => "no pivot".to_owned(),
        Err(ControlError::Closed) => String::new(),
        Err(error) => error.to_string(),
    };
    if let Err(error) = control::answer(&socket, Err(&reason)) {
        log::warn!("answer to the agent: {error}");
    }
    crash::restart_as(RESUME);
}

/// The image's init starts as the kernel would start it: no signal blocked or ignored, Ctrl-Alt-Del with the kernel, nothing
/// of ours open, the watchdog at rest.
fn prepare_exec() {
    session::default_sigpipe();
    report("signal mask", SigSet::empty().thread_set_mask().map_err(Into::into));
    let cad = rustix::system::reboot(rustix::system::RebootCommand::CadOn);
    report("ctrl-alt-del", cad.map_err(Into::into));
    Watchdog::new(None, start::kept(WATCHDOG_FD)).release(false);
    keep_open(false);
}

fn after_failed_exec() {
    let cad = rustix::system::reboot(rustix::system::RebootCommand::CadOff);
    report("ctrl-alt-del", cad.map_err(Into::into));
    keep_open(true);
}

fn keep_open(keep: bool) {
    for number in [CONTROL_FD, PULSE_FD] {
        report("control socket", start::close_on_exec(number, !keep).map_err(Into::into));
    }
}
