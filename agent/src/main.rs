//! Dispatches the container half's roles; the whole program's main belongs to another room.

use std::ffi::OsStr;
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    let words: Vec<&OsStr> = args.iter().map(|arg| arg.as_os_str()).collect();
    let code = match words.as_slice() {
        [role, dir] if *role == "monitor" => agent::monitor::run(Path::new(dir)),
        [role, dir, mode] if *role == "container-init" => {
            agent::container_init::run(Path::new(dir), *mode == "cgroup")
        }
        _ => 2,
    };
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}
