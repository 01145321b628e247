//! The binary: picks the role from the arguments, runs it, and turns its outcome into an exit status.
//!
//! Nothing is decided here beyond that; see [`agent::init::roles`] for the grammar.

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use agent::init::roles::{self, Role};
use protocol::boot_args::LogLevel;

/// PID 1 may not allocate after its start; in debug builds it cannot.
#[cfg(debug_assertions)]
#[global_allocator]
static ALLOCATOR: agent::sys::allocator::Sealed = agent::sys::allocator::Sealed;

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    let role = match roles::parse(&args, std::process::id() == 1) {
        Ok(role) => role,
        Err(problem) => {
            say(&mut std::io::stderr(), &format!("layercake-agent: {problem}\n\n{}", roles::USAGE));
            return ExitCode::from(2);
        }
    };
    match role {
        Role::Init(stage) => agent::init::run(stage),
        Role::Settle => settle(),
        Role::Agent(options) => match agent::agent::run(options) {
            Ok(()) => ExitCode::SUCCESS,
            Err(problem) => {
                say(&mut std::io::stderr(), &format!("layercake-agent: {problem}\n"));
                ExitCode::FAILURE
            }
        },
        Role::Pull(options) => match agent::prefetch::run(&options) {
            Ok(pulled) => {
                let (set, digest, bytes) = (&pulled.set, pulled.digest, pulled.bytes);
                let line = format!("{}:{} {digest} {bytes} bytes fetched\n", set.name, set.version);
                say(&mut std::io::stdout(), &line);
                ExitCode::SUCCESS
            }
            Err(problem) => {
                say(&mut std::io::stderr(), &format!("layercake-agent: {problem}\n"));
                ExitCode::FAILURE
            }
        },
        Role::Api(options) => ask(options),
        Role::Why { run_dir } => {
            let dirs = agent::paths::RunDirs::new(run_dir);
            say(&mut std::io::stdout(), &agent::why::text(&dirs));
            ExitCode::SUCCESS
        }
        Role::Monitor { dir } => status(agent::monitor::run(&dir)),
        Role::ContainerInit { in_cgroup, sockets } => {
            status(agent::container_init::run(in_cgroup, sockets))
        }
        Role::ContainerExec => status(agent::container_exec::run()),
        Role::Modprobe { request } => status(agent::modules::load_for_kernel(&request)),
        Role::Help => {
            say(&mut std::io::stdout(), roles::USAGE);
            ExitCode::SUCCESS
        }
        Role::Version => {
            let version = env!("CARGO_PKG_VERSION");
            say(&mut std::io::stdout(), &format!("layercake-agent {version}\n"));
            ExitCode::SUCCESS
        }
    }
}

/// For PID 1's own child alone: anywhere else it would take away what others use.
fn settle() -> ExitCode {
    if std::os::unix::process::parent_id() != 1 {
        say(&mut std::io::stderr(), "layercake-agent: settle is for PID 1 to start\n");
        return ExitCode::from(2);
    }
    agent::logging::init(LogLevel::Info, agent::logging::Target::Layer0("init"));
    agent::init::settle::run();
    ExitCode::SUCCESS
}

/// The answer's body to standard output, whatever its status; a status of 400 and above is a failure.
fn ask(mut options: agent::imageapi::client::ApiOptions) -> ExitCode {
    if options.body.as_deref() == Some("-") {
        match std::io::read_to_string(std::io::stdin()) {
            Ok(body) => options.body = Some(body),
            Err(problem) => {
                say(&mut std::io::stderr(), &format!("layercake-agent: {problem}\n"));
                return ExitCode::FAILURE;
            }
        }
    }
    match agent::imageapi::client::ask(&options) {
        Ok(reply) => {
            if let Some(warning) = reply.warning {
                say(&mut std::io::stderr(), &format!("layercake-agent: {warning}\n"));
            }
            say(&mut std::io::stdout(), &reply.body);
            if reply.status < 400 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(problem) => {
            say(&mut std::io::stderr(), &format!("layercake-agent: {problem}\n"));
            ExitCode::FAILURE
        }
    }
}

fn status(code: i32) -> ExitCode {
    u8::try_from(code).map_or(ExitCode::FAILURE, ExitCode::from)
}

/// Writes text for a person. That nobody can read it any more (a closed pipe) changes nothing.
fn say(out: &mut dyn Write, text: &str) {
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).unwrap_or_default();
}
