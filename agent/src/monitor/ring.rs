//! The log of one container: raw lines in `NAME.log`, the ones before in `NAME.log.1`.
//!
//! A write that fails (a full disk) never stops the container: the bytes are counted, and the count stands in the log as soon
//! as it takes lines again. Two instances of a container may write the same log during a roll.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::PathBuf;

/// The two files.
#[derive(Debug)]
pub struct Ring {
    path: PathBuf,
    rotate_at: u64,
    open: Option<Open>,
    dropped: u64,
    unsaid: u64,
}

#[derive(Debug)]
struct Open {
    file: File,
    size: u64,
}

impl Ring {
    /// The log at this path, which is rotated after this many bytes: twice as many are the most it takes. Opens nothing yet.
    #[must_use]
    pub fn new(path: PathBuf, rotate_at: u64) -> Self {
        Self { path, rotate_at, open: None, dropped: 0, unsaid: 0 }
    }

    /// Bytes that could not be written since the start.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Appends what the container wrote. Never fails: see [`Self::dropped`].
    pub fn append(&mut self, bytes: &[u8]) {
        if self.unsaid > 0 {
            let say =
                format!("\n[layercake: {} bytes of this log could not be written]\n", self.unsaid);
            if self.write(say.as_bytes()) == say.len() {
                self.unsaid = 0;
            }
        }
        let room = self.room();
        let (old, new) = split_at_line(bytes, room);
        let mut written = self.write(old);
        if written == old.len() && !new.is_empty() {
            self.rotate();
            written += self.write(new);
        }
        let lost = u64::try_from(bytes.len() - written).unwrap_or_default();
        self.dropped += lost;
        self.unsaid += lost;
    }

    fn room(&self) -> u64 {
        let size = self.open.as_ref().map_or(0, |open| open.size);
        self.rotate_at.saturating_sub(size)
    }

    /// How many of the bytes were written.
    fn write(&mut self, bytes: &[u8]) -> usize {
        let Ok(open) = self.opened() else { return 0 };
        let mut done = 0;
        while let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) {
            match open.file.write(rest) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        open.size += u64::try_from(done).unwrap_or_default();
        done
    }

    fn opened(&mut self) -> io::Result<&mut Open> {
        let open = match self.open.take() {
            Some(open) => open,
            None => {
                if let Some(dir) = self.path.parent() {
                    fs::create_dir_all(dir)?;
                }
                let file =
                    OpenOptions::new().append(true).create(true).mode(0o640).open(&self.path)?;
                let size = file.metadata()?.len();
                Open { file, size }
            }
        };
        Ok(self.open.insert(open))
    }

    /// Puts the full file aside, unless another instance has done so already, and lets the next write open a new one.
    fn rotate(&mut self) {
        let Some(open) = self.open.take() else { return };
        let inode = |meta: io::Result<fs::Metadata>| meta.ok().map(|meta| (meta.dev(), meta.ino()));
        if inode(open.file.metadata()) == inode(fs::metadata(&self.path)) {
            let mut aside = self.path.clone().into_os_string();
            aside.push(".1");
            // A rename that fails leaves a log that grows on; the next rotation tries again.
            drop(fs::rename(&self.path, PathBuf::from(aside)));
        }
    }
}

/// What still goes into a file with this much room, up to the end of a line where there is one, and what goes into the next.
fn split_at_line(bytes: &[u8], room: u64) -> (&[u8], &[u8]) {
    let room = usize::try_from(room).unwrap_or(usize::MAX);
    if bytes.len() <= room {
        return (bytes, &[]);
    }
    let fits = bytes.get(..room).unwrap_or_default();
    let at = fits.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
    bytes.split_at_checked(at).unwrap_or((bytes, &[]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_kept_whole_over_a_rotation_and_two_files_are_the_most() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("sub/web.log");
        let mut ring = Ring::new(path.clone(), 100);
        for chunk in 0..10 {
            ring.append(format!("line {chunk}a of the log\nline {chunk}b of the log\n").as_bytes());
        }
        let new = fs::read_to_string(&path).expect("log");
        let old = fs::read_to_string(dir.path().join("sub/web.log.1")).expect("log.1");
        assert!(old.len() <= 100 && new.len() <= 100, "{} {}", old.len(), new.len());
        for text in [&old, &new] {
            assert!(
                text.lines().all(|line| line.starts_with("line ") && line.ends_with("log")),
                "{text}"
            );
        }
        assert!(new.ends_with("line 9b of the log\n"));
        assert_eq!(ring.dropped(), 0);
        assert_eq!(fs::read_dir(dir.path().join("sub")).expect("dir").count(), 2);
    }

    #[test]
    fn a_log_that_takes_nothing_is_counted_and_said_later() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("no/web.log");
        fs::write(dir.path().join("no"), "a file in the way").expect("write");
        let mut ring = Ring::new(path.clone(), 1000);
        ring.append(b"lost\n");
        assert_eq!(ring.dropped(), 5);
        fs::remove_file(dir.path().join("no")).expect("remove");
        ring.append(b"kept\n");
        let text = fs::read_to_string(path).expect("log");
        assert_eq!(text, "\n[layercake: 5 bytes of this log could not be written]\nkept\n");
        assert_eq!(ring.dropped(), 5);
    }

    #[test]
    fn a_second_writer_does_not_rotate_what_was_rotated() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("web.log");
        let (mut one, mut two) = (Ring::new(path.clone(), 10), Ring::new(path.clone(), 10));
        one.append(b"11111111\n");
        two.append(b"2\n");
        one.append(b"111\n");
        two.append(b"222222222\n");
        assert_eq!(
            fs::read_to_string(dir.path().join("web.log.1")).expect("log.1"),
            "11111111\n2\n"
        );
        assert_eq!(fs::read_to_string(&path).expect("log"), "111\n222222222\n");
    }
}
