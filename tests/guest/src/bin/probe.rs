//! The probe: becomes any init, and leaves a child behind that watches it. It says on the console, in lines of their own:
//!
//! ```text
//!   layercake-probe: init                                        the real /init is next
//!   layercake-probe: address 10.9.0.101 used 31234 kB            memory in use at that moment: what is not available
//!   layercake-probe: idle PID NAME anon 123 shmem 0 switches 4   one for PID 1 and each child of it but itself
//! ```
//!
//! The kernel starts it by `rdinit=/probe`; `probe.watch=S,T` on the command line makes it look S seconds after the address and
//! again T seconds later, and tell what each process held then and how often it gave up the processor in between. It needs
//! nothing of what it watches: no mounted /proc, no /dev, no shell. It costs the same in every initramfs.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};
use std::time::Duration;

use guest::netlink::Netlink;
use rustix::fs::{Mode, OFlags, RawDir};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};

/// What the child is started with.
const WATCH: &str = "--watch";
/// The key on the kernel command line.
const KEY: &str = "probe.watch=";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|arg| arg == WATCH) {
        if let Err(problem) = watch() {
            say(&format!("failed: {problem}"));
        }
        // To end would be news to the init that has it as a child.
        loop {
            std::thread::park();
        }
    }
    // Which goes on whatever becomes of the watching.
    if let Err(problem) = Command::new("/probe").arg(WATCH).spawn() {
        say(&format!("failed: {problem}"));
    }
    say("init");
    let problem = Command::new("/init").args(args).exec();
    say(&format!("failed: /init: {problem}"));
    ExitCode::FAILURE
}

fn say(what: &str) {
    let line = format!("\nlayercake-probe: {what}\n");
    // A console that is gone changes nothing.
    io::stdout().write_all(line.as_bytes()).unwrap_or_default();
}

fn watch() -> io::Result<()> {
    let netlink = Netlink::open(true)?;
    let proc = Proc::open()?;
    let address = netlink.wait_for_address()?;
    let used = used_kib(&proc.read("meminfo")?, &proc.read("zoneinfo")?);
    say(&format!("address {} used {used} kB", Ipv4Addr::from(address)));
    let Some((settle, span)) = spans(&proc.read("cmdline")?) else { return Ok(()) };
    std::thread::sleep(settle);
    let before = proc.processes()?;
    std::thread::sleep(span);
    let after = proc.processes()?;
    let mut text = String::new();
    for (pid, now) in &after {
        let switches =
            before.get(pid).map_or(now.switches, |then| now.switches.saturating_sub(then.switches));
        let Process { name, anon, shmem, .. } = now;
        let _infallible = write!(
            text,
            "\nlayercake-probe: idle {pid} {name} anon {anon} shmem {shmem} switches {switches}"
        );
    }
    text.push_str("\nlayercake-probe: watched\n");
    io::stdout().write_all(text.as_bytes())
}

/// `probe.watch=S,T`.
fn spans(cmdline: &str) -> Option<(Duration, Duration)> {
    let value = cmdline.split_whitespace().find_map(|word| word.strip_prefix(KEY))?;
    let (settle, span) = value.split_once(',')?;
    Some((Duration::from_secs(settle.parse().ok()?), Duration::from_secs(span.parse().ok()?)))
}

/// `MemTotal - MemAvailable` of /proc/meminfo, KiB, less the free pages that processors keep for themselves: since Linux 6.7
/// these can be an eighth of all memory after much has been freed, and no figure of meminfo counts them.
fn used_kib(meminfo: &str, zoneinfo: &str) -> u64 {
    const PAGE_KIB: u64 = 4;
    let kept: u64 = zoneinfo
        .lines()
        .filter_map(|line| line.trim().strip_prefix("count:")?.trim().parse::<u64>().ok())
        .sum();
    let used = field(meminfo, "MemTotal:").saturating_sub(field(meminfo, "MemAvailable:"));
    used.saturating_sub(kept * PAGE_KIB)
}

/// The number behind a name at the beginning of a line; 0 without one.
fn field(text: &str, name: &str) -> u64 {
    let value = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
    value.split_whitespace().next().and_then(|number| number.parse().ok()).unwrap_or(0)
}

/// One process: its name, KiB of its own and shared memory, voluntary context switches of all its threads.
#[derive(Debug, Default)]
struct Process {
    name: String,
    anon: u64,
    shmem: u64,
    switches: u64,
}

/// A /proc of the probe's own that is mounted nowhere.
struct Proc(OwnedFd);

impl Proc {
    fn open() -> io::Result<Self> {
        let fs = rustix::mount::fsopen("proc", FsOpenFlags::FSOPEN_CLOEXEC)?;
        rustix::mount::fsconfig_create(&fs)?;
        let flags = FsMountFlags::FSMOUNT_CLOEXEC;
        Ok(Self(rustix::mount::fsmount(&fs, flags, MountAttrFlags::empty())?))
    }

    fn read(&self, path: &str) -> io::Result<String> {
        let file = rustix::fs::openat(&self.0, path, OFlags::CLOEXEC, Mode::empty())?;
        let mut text = String::new();
        std::fs::File::from(file).read_to_string(&mut text)?;
        Ok(text)
    }

    /// The numbers that name entries of a directory.
    fn numbers(&self, path: &str) -> io::Result<Vec<u32>> {
        let flags = OFlags::CLOEXEC | OFlags::DIRECTORY;
        let dir = rustix::fs::openat(&self.0, path, flags, Mode::empty())?;
        let mut buffer = Vec::with_capacity(8192);
        let mut entries = RawDir::new(dir, buffer.spare_capacity_mut());
        let mut numbers = Vec::new();
        while let Some(entry) = entries.next() {
            numbers.extend(entry?.file_name().to_str().ok().and_then(|it| it.parse::<u32>().ok()));
        }
        Ok(numbers)
    }

    /// PID 1 and its children, but for the kernel's threads and the probe itself.
    fn processes(&self) -> io::Result<BTreeMap<u32, Process>> {
        let mut found = BTreeMap::new();
        for pid in self.numbers(".")? {
            // One that ended meanwhile is none.
            let Ok(status) = self.read(&format!("{pid}/status")) else { continue };
            let of_init = pid == 1 || field(&status, "PPid:") == 1;
            if !of_init || pid == std::process::id() {
                continue;
            }
            let smaps = self.read(&format!("{pid}/smaps_rollup")).unwrap_or_default();
            let mut process = Process {
                name: self.read(&format!("{pid}/comm")).unwrap_or_default().trim().to_owned(),
                anon: field(&smaps, "Pss_Anon:"),
                shmem: field(&smaps, "Pss_Shmem:"),
                switches: 0,
            };
            process.name = process.name.replace(' ', "_");
            for thread in self.numbers(&format!("{pid}/task")).unwrap_or_default() {
                let status = self.read(&format!("{pid}/task/{thread}/status")).unwrap_or_default();
                process.switches += field(&status, "voluntary_ctxt_switches:");
            }
            found.insert(pid, process);
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_in_use_is_what_is_not_available() {
        let text = "MemTotal:         1000 kB\nMemFree:  1 kB\nMemAvailable:    400 kB\n";
        assert_eq!(used_kib(text, ""), 600);
        assert_eq!(used_kib("", ""), 0);
        let zones = "    cpu: 0\n              count:    21\n              high:     7\n    cpu: 1\n              count: 4\n";
        assert_eq!(used_kib(text, zones), 500);
    }

    #[test]
    fn the_spans_stand_on_the_command_line() {
        let spans_of = |text| spans(text).map(|(a, b)| (a.as_secs(), b.as_secs()));
        assert_eq!(spans_of("console=ttyS0 probe.watch=20,60 x"), Some((20, 60)));
        assert_eq!(spans_of("probe.watch=20"), None);
    }

    #[test]
    fn processes_are_seen_with_their_threads() {
        let proc = Proc::open().expect("proc");
        assert!(proc.read("meminfo").expect("meminfo").contains("MemTotal"));
        assert!(proc.numbers("self/task").expect("threads").len() > 1);
        assert!(proc.processes().expect("processes").contains_key(&1));
    }
}
