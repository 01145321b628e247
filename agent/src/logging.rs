//! Where words go: the backend of the `log` crate.
//!
//! In Layer0 every record goes to the kernel log (`/dev/kmsg`, so that it lies in order among the kernel's own lines
//! and outlives the process) and, written by us, to the console. The kernel would print our records on the console a
//! second time, so PID 1 sets the console's level to 4 and no record of ours goes to the kernel log above level 4
//! (warning): an error is marked as one by its text. Outside Layer0 records go to stderr alone.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use log::{Level, LevelFilter, Log, Metadata, Record};
use protocol::boot_args::LogLevel;

use crate::identity;

/// Longest line in the kernel log, in bytes; the kernel cuts records at about 1000.
pub const MAX_KMSG: usize = 900;

/// Where records go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// The kernel log and the console, in the name of this role (`init`, `agent`).
    Layer0(&'static str),
    /// Stderr.
    Standalone,
}

#[derive(Debug)]
struct Backend {
    target: Target,
    kmsg: Option<File>,
    status: Mutex<String>,
    /// The last line, as the console has it.
    event: Mutex<String>,
}

/// The least important level that still goes to the console ([`LevelFilter`] as a number).
static CONSOLE: AtomicUsize = AtomicUsize::new(LevelFilter::Trace as usize);

/// Target of the lines that say how things stand rather than what happened.
const STATUS: &str = "agent::status";

static BACKEND: OnceLock<Backend> = OnceLock::new();

/// The filter that a level of the command line means.
#[must_use]
pub fn filter(level: LogLevel) -> LevelFilter {
    match level {
        LogLevel::Error => LevelFilter::Error,
        LogLevel::Warn => LevelFilter::Warn,
        LogLevel::Info => LevelFilter::Info,
        LogLevel::Debug => LevelFilter::Debug,
    }
}

/// Takes over the `log` crate and the panic message of this process. The first call's target counts; the level of
/// every call does.
pub fn init(level: LogLevel, target: Target) {
    let backend = BACKEND.get_or_init(|| Backend {
        target,
        kmsg: match target {
            Target::Layer0(_) => OpenOptions::new().write(true).open("/dev/kmsg").ok(),
            Target::Standalone => None,
        },
        status: Mutex::new(String::new()),
        event: Mutex::new(String::new()),
    });
    if log::set_logger(backend).is_ok() {
        std::panic::set_hook(Box::new(|info| log::error!("{}", panic_text(info))));
    }
    log::set_max_level(filter(level));
}

/// What a panic says, with its place, in one line.
#[must_use]
pub fn panic_text(info: &std::panic::PanicHookInfo<'_>) -> String {
    let payload = info.payload();
    let text = payload
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".to_owned());
    match info.location() {
        Some(place) => format!("panic at {}:{}: {text}", place.file(), place.line()),
        None => format!("panic: {text}"),
    }
}

/// What the node waits for and why, for a person in front of it: logged at info, once for every change.
pub fn status(line: &str) {
    let Some(backend) = BACKEND.get() else { return };
    let mut last = backend.status.lock().unwrap_or_else(PoisonError::into_inner);
    if *last != line {
        line.clone_into(&mut last);
        drop(last);
        log::info!(target: STATUS, "{line}");
    }
}

/// From now on only records of this level and more important ones go to the console. The kernel log gets all of them.
pub fn limit_console(level: LevelFilter) {
    CONSOLE.store(level as usize, Ordering::Relaxed);
}

/// What happened last, with its time.
#[must_use]
pub fn last_event() -> String {
    let event = BACKEND.get().map(|backend| backend.event.lock());
    event.map(|event| event.unwrap_or_else(PoisonError::into_inner).clone()).unwrap_or_default()
}

/// Lets only kernel warnings of level 3 and above reach the console, and takes our own lines unthrottled. PID 1 calls it.
pub fn quiet_kernel_console() {
    for (path, value) in
        [("/proc/sys/kernel/printk", "4"), ("/proc/sys/kernel/printk_devkmsg", "on\n")]
    {
        if let Err(error) = fs::write(path, value) {
            log::debug!("{path}: {error}");
        }
    }
}

impl Log for Backend {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // Other crates' chatter is of interest only when it warns.
        metadata.level() <= Level::Warn || metadata.target().starts_with("agent")
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let text = record.args().to_string();
        if let Some(mut kmsg) = self.kmsg.as_ref() {
            ignore(kmsg.write_all(&kmsg_line(record.level(), &text)));
        }
        let line = match self.target {
            Target::Layer0(role) => {
                console_line(identity::uptime_ms(), role, record.level(), &text)
            }
            Target::Standalone => stderr_line(record.level(), &text),
        };
        let told = record.level() <= Level::Info && record.target() != STATUS;
        // PID 1 has no screen.
        if told && self.target != Target::Layer0("init") {
            let mut event = self.event.lock().unwrap_or_else(PoisonError::into_inner);
            line.trim_end().clone_into(&mut event);
        }
        if record.level() as usize > CONSOLE.load(Ordering::Relaxed) {
            return;
        }
        ignore(std::io::stderr().write_all(line.as_bytes()));
    }

    fn flush(&self) {}
}

/// A log that cannot be written has nobody to tell.
fn ignore(result: std::io::Result<()>) {
    result.unwrap_or_default();
}

fn mark(level: Level) -> &'static str {
    match level {
        Level::Error => "error: ",
        Level::Warn => "warning: ",
        Level::Info | Level::Debug | Level::Trace => "",
    }
}

/// One line: control characters, line ends among them, become spaces.
fn calm(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// `[  1.234] agent: text`; the console's form.
#[must_use]
pub fn console_line(uptime_ms: u64, role: &str, level: Level, text: &str) -> String {
    let (seconds, millis) = (uptime_ms / 1000, uptime_ms % 1000);
    format!("[{seconds:>3}.{millis:03}] {role}: {}{}\n", mark(level), calm(text))
}

fn stderr_line(level: Level, text: &str) -> String {
    format!("layercake-agent: {}{}\n", mark(level), calm(text))
}

/// A record for `/dev/kmsg`: facility daemon, at most level warning, at most [`MAX_KMSG`] bytes.
#[must_use]
pub fn kmsg_line(level: Level, text: &str) -> Vec<u8> {
    const DAEMON: u8 = 3 << 3;
    let severity = match level {
        Level::Error | Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    };
    let mut line = format!("<{}>layercake: {}{}", DAEMON | severity, mark(level), calm(text));
    let end = line.floor_char_boundary(MAX_KMSG - 1);
    line.truncate(end);
    line.push('\n');
    line.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_console_line_is_calm() {
        assert_eq!(console_line(1234, "agent", Level::Info, "up"), "[  1.234] agent: up\n");
        let line = console_line(1_000_005, "init", Level::Error, "a\nb\x1b[2J");
        assert_eq!(line, "[1000.005] init: error: a b [2J\n");
    }

    #[test]
    fn a_kernel_record_is_one_bounded_line_that_the_kernel_does_not_print_again() {
        assert_eq!(kmsg_line(Level::Info, "x"), b"<30>layercake: x\n");
        assert_eq!(kmsg_line(Level::Error, "x"), b"<28>layercake: error: x\n");
        let long = kmsg_line(Level::Warn, &"ä".repeat(2000));
        assert!(long.len() <= MAX_KMSG && std::str::from_utf8(&long).is_ok());
    }
}
