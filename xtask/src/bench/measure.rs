//! Running one program in the lab's namespace and reading what it cost: GNU time(1) for a client with all its children
//! (the kernel's own count, wait4(2)), `/proc/PID` for a daemon.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tests::namespace::Namespace;
use tests::process::Process;
use tests::{console, prerequisites};

/// The longest that one measured program may take.
const WITHIN: Duration = Duration::from_secs(600);
/// Unit of the times in `/proc/PID/stat` (`sysconf(_SC_CLK_TCK)`; 100 on every Linux that Rust runs on).
const TICKS_PER_S: f64 = 100.0;

/// What a program cost.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Usage {
    /// CPU seconds, user and system.
    pub(super) cpu_s: f64,
    /// Seconds from start to end.
    pub(super) wall_s: f64,
    /// The most memory that one process held, MiB.
    pub(super) peak_mib: f64,
}

impl Usage {
    /// This and then another: times add up, memory does not.
    pub(super) fn then(self, next: Self) -> Self {
        Self {
            cpu_s: self.cpu_s + next.cpu_s,
            wall_s: self.wall_s + next.wall_s,
            peak_mib: self.peak_mib.max(next.peak_mib),
        }
    }
}

/// Where programs are measured.
#[derive(Debug)]
pub(super) struct Bench {
    pub(super) namespace: Namespace,
    /// Logs and notes.
    pub(super) dir: PathBuf,
    time: PathBuf,
}

impl Bench {
    /// A namespace of its own with nothing but a loopback interface.
    ///
    /// # Errors
    /// No right to make one, or no time(1).
    pub(super) fn new(dir: &Path) -> Result<Self> {
        let namespace = Namespace::new()?;
        namespace.run("ip", &["link", "set", "lo", "up"])?;
        let time = prerequisites::find_program("time").context("time is missing (package time)")?;
        Ok(Self { namespace, dir: dir.to_owned(), time })
    }

    /// Runs a program to its end and says what it cost.
    ///
    /// # Errors
    /// When it fails, with its last words.
    pub(super) fn measure(&self, argv: &[OsString]) -> Result<Usage> {
        let (log, note) = (self.dir.join("measured.log"), self.dir.join("measured.time"));
        // What is left of an earlier run must not be read for this one's.
        fs::write(&note, "").with_context(|| note.display().to_string())?;
        fs::write(&log, "").with_context(|| log.display().to_string())?;
        let mut args: Vec<OsString> = vec!["--format=%e %U %S %M".into(), "--output".into()];
        args.push(note.clone().into_os_string());
        args.extend_from_slice(argv);
        let mut process = Process::start(&self.namespace, &self.time, args, &log)?;
        let status = process.wait_end(WITHIN)?;
        let line = argv.join(" ".as_ref());
        if !status.success() {
            bail!("{} failed ({status}): {}", line.display(), console::last_lines(&log, 15));
        }
        let said = fs::read_to_string(&note).with_context(|| note.display().to_string())?;
        usage(&said).with_context(|| format!("time said of {}: {said}", line.display()))
    }

    /// Runs a short program that is not measured.
    ///
    /// # Errors
    /// When it fails, with what it said.
    pub(super) fn run(&self, program: &str, args: &[&str]) -> Result<String> {
        self.namespace.run(program, args)
    }

    /// An empty tmpfs at this place, which only the namespace sees, with large pages as on a node. What was there before is
    /// gone.
    ///
    /// # Errors
    /// When it cannot be mounted.
    pub(super) fn fresh_tmpfs(&self, place: &Path) -> Result<()> {
        let text = place.to_str().context("a path that is not UTF-8")?;
        // Not mounted yet is the first time; a mount in use shows when the next one fails.
        while self.run("umount", &["--recursive", text]).is_ok() {}
        self.run(
            "mount",
            &["-t", "tmpfs", "-o", "size=4g,mode=755,huge=within_size", "bench", text],
        )
        .map(drop)
    }
}

/// Reads `elapsed user system maxrss-in-KiB`, the last line of what time wrote.
fn usage(said: &str) -> Result<Usage> {
    let line = said.lines().last().unwrap_or_default();
    let numbers: Vec<f64> = line.split(' ').map(str::parse).collect::<Result<_, _>>()?;
    match numbers[..] {
        [wall_s, user, system, kib] => {
            Ok(Usage { cpu_s: user + system, wall_s, peak_mib: kib / 1024.0 })
        }
        _ => bail!("expected four numbers"),
    }
}

/// What a running daemon and its ended children have used so far; `wall_s` is 0.
///
/// # Errors
/// When it is gone.
pub(super) fn of_daemon(pid: u32) -> Result<Usage> {
    let read = |name: &str| {
        let path = format!("/proc/{pid}/{name}");
        fs::read_to_string(&path).with_context(|| path)
    };
    let cpu_s = stat_cpu_s(&read("stat")?).context("/proc/PID/stat")?;
    let peak_mib = status_peak_mib(&read("status")?).context("/proc/PID/status")?;
    Ok(Usage { cpu_s, wall_s: 0.0, peak_mib })
}

/// utime, stime, cutime and cstime of proc_pid_stat(5). The program's name before them may hold anything.
fn stat_cpu_s(stat: &str) -> Result<f64> {
    let (_, fields) = stat.rsplit_once(") ").context("no name")?;
    let ticks: Vec<f64> =
        fields.split(' ').skip(11).take(4).map(str::parse).collect::<Result<_, _>>()?;
    ensure!(ticks.len() == 4, "too short");
    Ok(ticks.iter().sum::<f64>() / TICKS_PER_S)
}

fn status_peak_mib(status: &str) -> Result<f64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    let kib: f64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib / 1024.0)
}

#[cfg(test)]
mod tests_of_reading {
    use super::*;

    #[test]
    fn what_time_writes_is_read_from_its_last_line() {
        let expected = Usage { cpu_s: 1.75, wall_s: 2.5, peak_mib: 8.0 };
        assert_eq!(usage("2.50 1.25 0.50 8192\n").expect("usage"), expected);
        assert!(usage("Command exited with non-zero status 1\n").is_err());
        assert!(usage("").is_err());
    }

    #[test]
    fn a_daemon_s_times_are_found_behind_any_name() {
        let stat = "77 (a) R (b) S 1 77 77 0 -1 4194560 1 2 3 4 150 50 30 20 20 0 9 0 1 2 3";
        assert!((stat_cpu_s(stat).expect("times") - 2.5).abs() < 1e-9);
        assert!(stat_cpu_s("77 (a) S 1 77").is_err());
        let status = "Name:\tx\nVmPeak:\t  9 kB\nVmHWM:\t    2048 kB\n";
        assert!((status_peak_mib(status).expect("peak") - 2.0).abs() < 1e-9);
    }

    #[test]
    fn a_program_s_own_time_and_that_of_its_children_are_counted() {
        let dir = std::env::temp_dir().join(format!("layercake-bench-test.{}", std::process::id()));
        fs::create_dir_all(&dir).expect("directory");
        let bench = Bench::new(&dir).expect("bench");
        let script = "sh -c 'i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done'";
        let argv = ["sh", "-c", script].map(OsString::from);
        let busy = bench.measure(&argv).expect("busy");
        assert!(busy.cpu_s > 0.0 && busy.peak_mib > 0.1, "{busy:?}");
        let error = bench.measure(&["false".into()]).expect_err("false").to_string();
        assert!(error.starts_with("false failed"), "{error}");
        fs::remove_dir_all(&dir).expect("clean");
    }
}
