//! Everything that the bridge sees, as a pcap file: what to look at when a node does not boot. Frames are cut to
//! [`SNAP`] bytes and the file ends at [`MAX_BYTES`], because boots carry images.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use nix::sys::socket::{MsgFlags, recv};

use crate::namespace::Entrance;
use crate::packet;

/// Bytes kept of each frame: all of a DHCP message.
pub const SNAP: usize = 700;
/// Bytes after which nothing more is written.
pub const MAX_BYTES: u64 = 64 << 20;

/// The thread that writes.
#[derive(Debug)]
pub struct Capture {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Capture {
    /// Captures what passes this interface into `file` until dropped.
    ///
    /// # Errors
    /// When the file or the socket cannot be opened.
    pub fn start(entrance: &Entrance, interface: &str, file: &Path) -> Result<Self> {
        let socket = entrance.inside(|| packet::open(interface))??;
        let mut out = BufWriter::new(
            File::create(file).with_context(|| format!("cannot write {}", file.display()))?,
        );
        out.write_all(&header()).with_context(|| format!("cannot write {}", file.display()))?;
        let stop = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("lab-capture".to_owned())
            .spawn(move || capture(&socket, out, &flag))
            .context("cannot start the capture thread")?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// The pcap file header: little endian, microseconds, Ethernet (<https://www.tcpdump.org/manpages/pcap-savefile.5.html>).
fn header() -> Vec<u8> {
    let mut bytes = 0xa1b2_c3d4_u32.to_le_bytes().to_vec();
    bytes.extend([2, 0, 4, 0]); // Version 2.4.
    bytes.extend([0; 8]); // Time zone and accuracy: always 0.
    bytes.extend(u32::try_from(SNAP).unwrap_or(u32::MAX).to_le_bytes());
    bytes.extend(1_u32.to_le_bytes());
    bytes
}

/// A packet record: its header and as much of the frame as was kept.
fn record(since_epoch: Duration, kept: &[u8], length: usize) -> Vec<u8> {
    let word = |value: u64| u32::try_from(value).unwrap_or(u32::MAX).to_le_bytes();
    let mut bytes = word(since_epoch.as_secs()).to_vec();
    bytes.extend(since_epoch.subsec_micros().to_le_bytes());
    bytes.extend(word(kept.len() as u64));
    bytes.extend(word(length as u64));
    bytes.extend(kept);
    bytes
}

fn capture(socket: &OwnedFd, mut out: BufWriter<File>, stop: &AtomicBool) {
    let mut buffer = vec![0; 1 << 16];
    let mut written = 0;
    while !stop.load(Ordering::Relaxed) {
        let Ok(length) = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) else {
            // Quiet for a moment: what is on disk now is what a killed lab leaves.
            drop(out.flush());
            continue;
        };
        if written > MAX_BYTES {
            continue;
        }
        let kept = buffer.get(..length.min(SNAP)).unwrap_or_default();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let record = record(now, kept, length);
        written += record.len() as u64;
        if out.write_all(&record).is_err() {
            return; // The disk is full: the case has other worries.
        }
    }
    drop(out.flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_has_the_layout_that_tcpdump_reads() {
        assert_eq!(header().len(), 24);
        assert_eq!(header()[..4], [0xd4, 0xc3, 0xb2, 0xa1]);
        let record = record(Duration::from_millis(2500), &[7; 60], 1514);
        assert_eq!(record.len(), 16 + 60);
        assert_eq!(record[..4], 2_u32.to_le_bytes());
        assert_eq!(record[4..8], 500_000_u32.to_le_bytes());
        assert_eq!(record[12..16], 1514_u32.to_le_bytes());
    }
}
