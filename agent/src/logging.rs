//! Where words go: the backend of the `log` crate.
//!
//! In Layer0 every record goes to the kernel log (`/dev/kmsg`, so that it lies in order among the kernel's own lines
//! and outlives the process) and, written by us, to the console. The kernel would print our records on the console a
//! second time, so PID 1 sets the console's level to 4 and no record of ours goes to the kernel log above level 4
//! (warning): an error is marked as one by its text. Outside Layer0 records go to stderr alone.

use std::fmt::{self, Write as _};
use std::fs::{self, File, OpenOptions};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use log::{Level, LevelFilter, Log, Metadata, Record};
use protocol::boot_args::LogLevel;

use crate::identity;

/// Longest line on the console, in bytes.
const MAX_LINE: usize = 2048;
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
        let (level, text) = (record.level(), *record.args());
        if let Some(kmsg) = self.kmsg.as_ref() {
            write(kmsg, &kmsg_line(level, text));
        }
        let line = match self.target {
            Target::Layer0(role) => console_line(identity::uptime_ms(), role, level, text),
            Target::Standalone => stderr_line(level, text),
        };
        let told = record.level() <= Level::Info && record.target() != STATUS;
        // PID 1 has no screen.
        if told && self.target != Target::Layer0("init") {
            let mut event = self.event.lock().unwrap_or_else(PoisonError::into_inner);
            String::from_utf8_lossy(line.as_bytes()).trim_end().clone_into(&mut event);
        }
        if record.level() as usize > CONSOLE.load(Ordering::Relaxed) {
            return;
        }
        write(rustix::stdio::stderr(), &line);
    }

    fn flush(&self) {}
}

/// Writes all of a line. A log that cannot be written has nobody to tell.
fn write(fd: impl AsFd, line: &Line) {
    let mut rest = line.as_bytes();
    while !rest.is_empty() {
        match rustix::io::write(&fd, rest) {
            Ok(count) => rest = rest.get(count..).unwrap_or_default(),
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return,
        }
    }
}

/// One line of text in a buffer of its own, without the heap: what is too long is cut, control characters (line ends among
/// them) become spaces.
#[derive(Debug, Clone)]
pub struct Line {
    bytes: [u8; MAX_LINE],
    length: usize,
    limit: usize,
}

impl Line {
    /// An empty line of at most `limit` bytes, the end that [`Line::ended`] adds among them.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { bytes: [0; MAX_LINE], length: 0, limit: limit.min(MAX_LINE) }
    }

    /// A line with this text.
    #[must_use]
    pub fn of(text: fmt::Arguments<'_>) -> Self {
        let mut line = Self::new(MAX_LINE);
        line.write_fmt(text).unwrap_or_default();
        line
    }

    /// The line with its last byte: a line feed, or a NUL.
    #[must_use]
    pub fn ended(mut self, end: u8) -> Self {
        if let Some(last) = self.bytes.get_mut(self.length) {
            *last = end;
            self.length += 1;
        }
        self
    }

    /// What is in it.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }

    /// What is in it, as a C string; empty where no NUL has been put at its end.
    #[must_use]
    pub fn as_c_str(&self) -> &std::ffi::CStr {
        std::ffi::CStr::from_bytes_until_nul(self.as_bytes()).unwrap_or_default()
    }
}

impl fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for c in text.chars() {
            let mut encoded = [0; 4];
            let bytes = (if c.is_control() { ' ' } else { c }).encode_utf8(&mut encoded).as_bytes();
            let end = self.length + bytes.len();
            // One byte is left for the line's end.
            let room = self.bytes.get_mut(self.length..end).filter(|_| end < self.limit);
            room.ok_or(fmt::Error)?.copy_from_slice(bytes);
            self.length = end;
        }
        Ok(())
    }
}

fn mark(level: Level) -> &'static str {
    match level {
        Level::Error => "error: ",
        Level::Warn => "warning: ",
        Level::Info | Level::Debug | Level::Trace => "",
    }
}

/// `[  1.234] agent: text`; the console's form.
#[must_use]
pub fn console_line(uptime_ms: u64, role: &str, level: Level, text: fmt::Arguments<'_>) -> Line {
    let (seconds, millis) = (uptime_ms / 1000, uptime_ms % 1000);
    let line = format_args!("[{seconds:>3}.{millis:03}] {role}: {}{text}", mark(level));
    Line::of(line).ended(b'\n')
}

fn stderr_line(level: Level, text: fmt::Arguments<'_>) -> Line {
    Line::of(format_args!("layercake-agent: {}{text}", mark(level))).ended(b'\n')
}

/// A record for `/dev/kmsg`: facility daemon, at most level warning, at most [`MAX_KMSG`] bytes.
#[must_use]
pub fn kmsg_line(level: Level, text: fmt::Arguments<'_>) -> Line {
    const DAEMON: u8 = 3 << 3;
    let severity = match level {
        Level::Error | Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    };
    let mut line = Line::new(MAX_KMSG);
    // What does not fit is cut.
    write!(line, "<{}>layercake: {}{text}", DAEMON | severity, mark(level)).unwrap_or_default();
    line.ended(b'\n')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_console_line_is_calm() {
        let line = |at, role, level, text: &str| {
            let line = console_line(at, role, level, format_args!("{text}"));
            String::from_utf8(line.as_bytes().to_vec()).unwrap()
        };
        assert_eq!(line(1234, "agent", Level::Info, "up"), "[  1.234] agent: up\n");
        let calm = line(1_000_005, "init", Level::Error, "a\nb\x1b[2J");
        assert_eq!(calm, "[1000.005] init: error: a b [2J\n");
        let long = line(0, "agent", Level::Info, &"ä".repeat(2000));
        assert!(long.len() == MAX_LINE && long.ends_with("ä\n"), "{}", long.len());
    }

    #[test]
    fn a_kernel_record_is_one_bounded_line_that_the_kernel_does_not_print_again() {
        let line = |level, text: &str| {
            let line = kmsg_line(level, format_args!("{text}"));
            String::from_utf8(line.as_bytes().to_vec()).unwrap()
        };
        assert_eq!(line(Level::Info, "x"), "<30>layercake: x\n");
        assert_eq!(line(Level::Error, "x"), "<28>layercake: error: x\n");
        let long = line(Level::Warn, &"ä".repeat(2000));
        assert!(long.len() <= MAX_KMSG && long.ends_with("ä\n"), "{}", long.len());
    }
}
