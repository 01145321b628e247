//! How the kernel crashed before this boot, from where it keeps that over a reset: pstore
//! (Documentation/admin-guide/ramoops.rst, kernel parameter `efi_pstore`).
//!
//! The records are moved to the state directory, because the store has little room and the next crash needs it; the report
//! has one line of them. A crash that left no record is not known here.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use crate::identity;
use crate::modules::load::Loader;
use crate::paths::RunDirs;

/// Where the kernel shows its records.
pub const PSTORE: &str = "/sys/fs/pstore";
/// What is there on a machine that UEFI firmware started.
const UEFI: &str = "/sys/firmware/efi";
/// The driver that keeps records in the firmware's variables. No device asks for it.
const UEFI_DRIVER: &str = "efi_pstore";
/// Name of the file with their text, in the state directory.
pub const FILE: &str = "last-crash";
/// Longest reason, in bytes.
pub const MAX_REASON: usize = 200;
/// Most that is read of one record, in bytes; a kernel's log of a crash is some tens of KiB.
const MAX_RECORD: u64 = 256 << 10;
/// Most records that are read.
const MAX_RECORDS: usize = 16;
/// What names a crash best, the best first; the text from there on is the reason.
const SIGNS: [&str; 6] = [
    "Kernel panic - not syncing: ",
    "BUG: ",
    "Oops: ",
    "general protection fault",
    "Unable to handle kernel",
    "sysrq: Trigger a crash",
];

/// Moves what the kernel kept into the state directory, and gives its reason: in this start of the agent and in every later
/// one of the same boot.
pub fn take(dirs: &RunDirs) -> Option<String> {
    if Path::new(UEFI).is_dir() {
        // Where it is built in there is nothing to load.
        let loaded = Loader::open(&identity::release()).and_then(|mut it| it.load(UEFI_DRIVER));
        if let Err(error) = loaded {
            log::debug!("{error}");
        }
    }
    let file = dirs.state().join(FILE);
    if let Err(error) = collect(Path::new(PSTORE), &file) {
        log::warn!("the kernel's records of a crash stay in {PSTORE}: {error}");
    }
    let reason = reason(&String::from_utf8_lossy(&read(&file).ok()?))?;
    log::warn!("before this boot the kernel crashed: {reason} (more in {})", file.display());
    Some(reason)
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_RECORD).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Copies the records of a store into one file, and removes them from the store once that is written.
fn collect(store: &Path, file: &Path) -> io::Result<()> {
    let Ok(entries) = fs::read_dir(store) else { return Ok(()) };
    let mut records: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    // Parts of one crash are numbered, the newest lines in the first.
    records.sort();
    records.truncate(MAX_RECORDS);
    let mut text = Vec::new();
    for record in &records {
        text.extend(read(record)?);
        text.push(b'\n');
    }
    if records.is_empty() {
        return Ok(());
    }
    fs::write(file, text)?;
    records.iter().try_for_each(fs::remove_file)
}

/// The one line of a crash's log that says best what it was.
#[must_use]
pub fn reason(log: &str) -> Option<String> {
    let found = SIGNS.iter().find_map(|sign| {
        let line = log.lines().find(|line| line.contains(sign))?;
        let at = line.find(sign)?;
        // The long title says nothing more.
        Some(line.get(at..)?.trim_start_matches("Kernel panic - not syncing: "))
    });
    let line = found.or_else(|| log.lines().find(|line| !line.trim().is_empty()))?;
    let calm: String = line.trim().chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    Some(calm.get(..calm.floor_char_boundary(MAX_REASON))?.to_owned())
}

/// Feeds any bytes to the reader of records.
pub fn fuzz_last_crash(bytes: &[u8]) {
    let _ = reason(&String::from_utf8_lossy(bytes));
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "Panic#1 Part1\n\
        <6>[   10.1] sysrq: Trigger a crash\n\
        <0>[   10.2] Kernel panic - not syncing: sysrq triggered crash\n\
        <4>[   10.3] CPU: 0 PID: 99 Comm: sh\n";

    #[test]
    fn the_reason_is_the_line_that_says_most() {
        let table = [
            (LOG, Some("sysrq triggered crash")),
            (
                "Oops#1 Part1\n<1>[ 1.0] BUG: kernel NULL pointer dereference\n<1>[ 1.1] Oops: 0002\n",
                Some("BUG: kernel NULL pointer dereference"),
            ),
            ("\n Emergency#2 Part7\nwords\n", Some("Emergency#2 Part7")),
            ("\n\n", None),
        ];
        for (log, expected) in table {
            assert_eq!(reason(log).as_deref(), expected, "{log}");
        }
    }

    #[test]
    fn records_move_to_the_state_and_stay_there() {
        let dir = tempfile::tempdir().unwrap();
        let (store, file) = (dir.path().join("pstore"), dir.path().join(FILE));
        collect(&store, &file).unwrap();
        fs::create_dir(&store).unwrap();
        collect(&store, &file).unwrap();
        assert!(!file.exists());
        fs::write(store.join("dmesg-ramoops-0"), LOG).unwrap();
        fs::write(store.join("console-ramoops-0"), b"\xff\xfe").unwrap();
        collect(&store, &file).unwrap();
        assert_eq!(fs::read_dir(&store).unwrap().count(), 0);
        collect(&store, &file).unwrap();
        let text = String::from_utf8_lossy(&read(&file).unwrap()).into_owned();
        assert_eq!(reason(&text).as_deref(), Some("sysrq triggered crash"));
    }

    proptest::proptest! {
        #[test]
        fn no_record_makes_the_reader_panic_or_talk_long(bytes in proptest::collection::vec(0_u8.., 0..600)) {
            fuzz_last_crash(&bytes);
            let mut text = String::from_utf8_lossy(&bytes).into_owned();
            text.insert_str(0, "BUG: ");
            assert!(reason(&text).is_some_and(|reason| reason.len() <= MAX_REASON));
        }
    }
}
