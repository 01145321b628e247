//! Reads a container's log as the monitors write it ([`crate::monitor::ring`]): `NAME.log`, the part before in `NAME.log.1`.
//!
//! It follows the name. A file that is put aside is read to its end and watched on, because another instance may still write to
//! it; one that is gone is let go at once, so that a reader who stopped holds no memory. Lines lost so are said to be.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::inotify;

use super::logs::Source;

/// Bytes looked at at once while lines are counted.
const CHUNK: usize = 64 << 10;
/// How often opening starts over when the log is rotated meanwhile.
const RETRIES: usize = 8;
/// What stands where lines are missing.
const LOST: &[u8] =
    b"\n[layercake: the log went on faster than it was read; lines are missing here]\n";

#[derive(Debug)]
struct Part {
    file: File,
    inode: u64,
    offset: u64,
}

impl Part {
    fn open(path: &Path) -> io::Result<Option<Self>> {
        match File::open(path) {
            Ok(file) => {
                let inode = file.metadata()?.ino();
                Ok(Some(Self { file, inode, offset: 0 }))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// The reader.
#[derive(Debug)]
pub(super) struct Tail {
    path: PathBuf,
    aside: PathBuf,
    /// Oldest first, at most two.
    parts: Vec<Part>,
    /// To be said before anything else.
    note: Option<&'static [u8]>,
    /// Tells that something in the directory was written or renamed.
    watch: Option<OwnedFd>,
}

impl Tail {
    /// The log at this path, from so many last lines on, or from its beginning. One that does not exist yet is empty.
    ///
    /// # Errors
    /// The kernel's, of a file that is there and cannot be read.
    pub(super) fn open(path: PathBuf, lines: Option<u64>) -> io::Result<Self> {
        let mut aside = path.clone().into_os_string();
        aside.push(".1");
        let aside = PathBuf::from(aside);
        let watch = watch(&path);
        let mut parts = Vec::new();
        for _ in 0..RETRIES {
            let new = Part::open(&path)?;
            let old = Part::open(&aside)?;
            let same = inode_of(&path)? == new.as_ref().map(|part| part.inode);
            parts = old.into_iter().chain(new).collect();
            if same && parts.iter().map(|part| part.inode).is_sorted_by(|a, b| a != b) {
                break;
            }
        }
        if let Some(lines) = lines {
            begin_at_last(&mut parts, lines)?;
        }
        Ok(Self { path, aside, parts, note: None, watch })
    }

    /// Takes in what was rotated since. True when there may be more to read now.
    fn refresh(&mut self) -> io::Result<bool> {
        self.let_go()?;
        let newest = self.parts.last().map(|part| part.inode);
        let Some(new) = Part::open(&self.path)?.filter(|new| Some(new.inode) != newest) else {
            return Ok(self.note.is_some());
        };
        let put_aside = inode_of(&self.aside)?;
        if newest != put_aside {
            // Rotated since the last look, and what lies aside we have never seen; what we had, if anything, is gone.
            if newest.is_some() {
                self.note = Some(LOST);
            }
            self.parts.clear();
            self.parts.extend(Part::open(&self.aside)?.filter(|old| old.inode != new.inode));
        }
        self.parts.retain(|part| Some(part.inode) == put_aside);
        self.parts.push(new);
        Ok(true)
    }

    /// Closes files that were removed: only this descriptor keeps their memory.
    fn let_go(&mut self) -> io::Result<()> {
        for index in (0..self.parts.len()).rev() {
            let Some(part) = self.parts.get(index) else { continue };
            let meta = part.file.metadata()?;
            if meta.nlink() == 0 {
                if meta.len() > part.offset {
                    self.note = Some(LOST);
                }
                self.parts.remove(index);
            }
        }
        Ok(())
    }

    fn read_parts(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        for part in &mut self.parts {
            let count = part.file.read_at(buffer, part.offset)?;
            if count > 0 {
                part.offset += count as u64;
                return Ok(count);
            }
        }
        Ok(0)
    }
}

impl Source for Tail {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(note) = self.note.take() {
                let count = note.len().min(buffer.len());
                buffer.iter_mut().zip(note).for_each(|(to, from)| *to = *from);
                return Ok(count);
            }
            let count = self.read_parts(buffer)?;
            if count > 0 || !self.refresh()? {
                return Ok(count);
            }
        }
    }

    fn news(&self) -> Option<BorrowedFd<'_>> {
        self.watch.as_ref().map(AsFd::as_fd)
    }

    fn take_news(&mut self) {
        let mut buffer = [0; 4096];
        while let Some(watch) = &self.watch
            && rustix::io::read(watch, &mut buffer).is_ok_and(|count| count > 0)
        {}
    }

    fn tidy(&mut self) {
        // A file whose state cannot be asked for will fail to be read as well.
        self.let_go().unwrap_or_default();
    }
}

fn inode_of(path: &Path) -> io::Result<Option<u64>> {
    match fs::metadata(path) {
        Ok(meta) => Ok(Some(meta.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// A log without a watch is looked at now and then all the same.
fn watch(path: &Path) -> Option<OwnedFd> {
    let dir = path.parent()?;
    let flags = inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC;
    let watch = inotify::init(flags).ok()?;
    let events = inotify::WatchFlags::MODIFY
        | inotify::WatchFlags::CREATE
        | inotify::WatchFlags::MOVED_TO
        | inotify::WatchFlags::MOVED_FROM;
    inotify::add_watch(&watch, dir, events).ok()?;
    Some(watch)
}

/// Moves the offsets so that reading begins with the last `lines` lines of all parts together.
fn begin_at_last(parts: &mut [Part], lines: u64) -> io::Result<()> {
    let mut missing = lines;
    for part in parts.iter_mut().rev() {
        let length = part.file.metadata()?.len();
        part.offset = if missing == 0 { length } else { last_lines(part, length, &mut missing)? };
    }
    Ok(())
}

/// Where the last so many lines begin. A line without an end at the file's end is one, too.
fn last_lines(part: &Part, length: u64, missing: &mut u64) -> io::Result<u64> {
    let mut buffer = vec![0; CHUNK];
    let mut end = length;
    while end > 0 {
        let start = end.saturating_sub(CHUNK as u64);
        let size = usize::try_from(end - start).unwrap_or(CHUNK);
        let chunk = buffer.get_mut(..size).unwrap_or_default();
        part.file.read_exact_at(chunk, start)?;
        for (index, byte) in chunk.iter().enumerate().rev() {
            let after = start + index as u64 + 1;
            if *byte == b'\n' && after < length {
                *missing -= 1;
                if *missing == 0 {
                    return Ok(after);
                }
            }
        }
        end = start;
    }
    if length > 0 {
        *missing -= 1;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::monitor::ring::Ring;

    fn all(tail: &mut Tail) -> String {
        let mut text = Vec::new();
        let mut buffer = [0; 37];
        loop {
            let count = tail.read(&mut buffer).expect("read");
            if count == 0 {
                return String::from_utf8(text).expect("UTF-8");
            }
            text.extend_from_slice(&buffer[..count]);
        }
    }

    fn log() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("web.log");
        (dir, path)
    }

    #[test]
    fn the_last_lines_are_found_over_both_files() {
        let (_dir, path) = log();
        fs::write(path.with_extension("log.1"), "1\n2\n3\n").expect("write");
        fs::write(&path, "4\n5\n6").expect("write");
        let table = [
            (None, "1\n2\n3\n4\n5\n6"),
            (Some(0), ""),
            (Some(1), "6"),
            (Some(2), "5\n6"),
            (Some(3), "4\n5\n6"),
            (Some(4), "3\n4\n5\n6"),
            (Some(6), "1\n2\n3\n4\n5\n6"),
            (Some(99), "1\n2\n3\n4\n5\n6"),
        ];
        for (lines, expected) in table {
            let mut tail = Tail::open(path.clone(), lines).expect("open");
            assert_eq!(all(&mut tail), expected, "{lines:?}");
        }
    }

    #[test]
    fn a_log_that_begins_later_is_followed() {
        let (_dir, path) = log();
        let mut tail = Tail::open(path.clone(), Some(5)).expect("open");
        assert_eq!(all(&mut tail), "");
        Ring::new(path, 100).append(b"first\n");
        assert_eq!(all(&mut tail), "first\n");
    }

    #[test]
    fn nothing_is_lost_over_rotations_by_two_writers() {
        let (_dir, path) = log();
        let (mut one, mut two) = (Ring::new(path.clone(), 100), Ring::new(path.clone(), 100));
        let mut tail = Tail::open(path, None).expect("open");
        let mut expected = Vec::new();
        let mut seen = Vec::new();
        for number in 0..60 {
            let line = format!("line {number} of the log\n");
            if number % 3 == 0 { &mut one } else { &mut two }.append(line.as_bytes());
            expected.push(line);
            // Not after every line: what was put aside has to be found.
            if number % 2 == 0 {
                seen.extend(all(&mut tail).split_inclusive('\n').map(str::to_owned));
            }
        }
        seen.extend(all(&mut tail).split_inclusive('\n').map(str::to_owned));
        seen.sort();
        expected.sort();
        assert_eq!(seen, expected);
    }

    #[test]
    fn a_reader_that_is_too_slow_is_told_and_holds_no_removed_file() {
        let (_dir, path) = log();
        let mut ring = Ring::new(path.clone(), 100);
        ring.append(b"the first line\n");
        let mut tail = Tail::open(path, None).expect("open");
        for number in 0..40 {
            ring.append(format!("line {number:10}\n").as_bytes());
        }
        tail.tidy();
        assert!(tail.parts.is_empty(), "{:?}", tail.parts);
        let text = all(&mut tail);
        assert!(text.starts_with("\n[layercake: the log went on faster"), "{text}");
        assert!(!text.contains("first") && text.ends_with("        39\n"), "{text}");
    }

    #[test]
    fn a_log_that_is_written_is_news() {
        let (_dir, path) = log();
        let mut tail = Tail::open(path.clone(), None).expect("open");
        Ring::new(path, 100).append(b"x\n");
        let news = tail.news().expect("inotify");
        let mut fds = [rustix::event::PollFd::from_borrowed_fd(news, rustix::event::PollFlags::IN)];
        super::super::link::wait(&mut fds, std::time::Duration::from_secs(20)).expect("poll");
        assert!(!fds[0].revents().is_empty());
        tail.take_news();
        assert_eq!(all(&mut tail), "x\n");
    }

    proptest! {
        #[test]
        fn the_last_lines_are_what_lines_says(
            old in "[ab\n]{0,40}", new in "[ab\n]{0,40}", lines in 0_u64..12
        ) {
            let (_dir, path) = log();
            // The ring rotates at the end of a line.
            let old = if old.is_empty() { old } else { old + "\n" };
            fs::write(path.with_extension("log.1"), &old).expect("write");
            fs::write(&path, &new).expect("write");
            let whole = old + &new;
            let count = whole.split_inclusive('\n').count();
            let skip = count.saturating_sub(usize::try_from(lines).expect("small"));
            let expected: String = whole.split_inclusive('\n').skip(skip).collect();
            prop_assert_eq!(all(&mut Tail::open(path, Some(lines)).expect("open")), expected);
        }
    }
}
