//! What connects a machine to the bridge: a tap where `/dev/net/tun` opens. Where it does not (an ordinary user, a
//! container) the frames are relayed, which needs nothing but the namespace:
//!
//! ```text
//!   br0 ---- tap1 ==veth== tap1p ---- packet socket  <- threads ->  unix datagrams ---- QEMU -netdev dgram
//! ```

use std::fs;
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use nix::sys::socket::{MsgFlags, recv, send};

use crate::namespace::Namespace;
use crate::packet::{self, LOOK};

/// More than any frame of a link with an MTU of 1500.
const FRAME: usize = 1 << 16;

/// Least, default and most bytes that a TCP connection of the namespace may have under way (tcp(7)).
const SEND_BUFFER: &str = "/proc/sys/net/ipv4/tcp_wmem";
/// Frames that wait for a machine that is slow to take them: as many as a tap's queue holds. iPXE needs it, whose TCP
/// loses minutes over a lost window.
const QUEUE: usize = 1000;

/// A cable from the bridge to a machine. Dropped, its relay ends; the interface goes with the lab.
#[derive(Debug)]
pub struct Cable {
    netdev: String,
    _relay: Option<Relay>,
}

impl Cable {
    /// A tap on this bridge.
    ///
    /// # Errors
    /// When it cannot be made.
    pub(crate) fn tap(namespace: &Namespace, name: &str, bridge: &str) -> Result<Self> {
        if namespace.run("ip", &["link", "show", "dev", name]).is_err() {
            namespace.run("ip", &["tuntap", "add", "dev", name, "mode", "tap"])?;
            namespace.run("ip", &["link", "set", name, "master", bridge, "up"])?;
        }
        let netdev = format!("tap,id=n0,ifname={name},script=no,downscript=no");
        Ok(Self { netdev, _relay: None })
    }

    /// A relay to this bridge, with its sockets in `dir`.
    ///
    /// # Errors
    /// When the interfaces or sockets cannot be made.
    pub(crate) fn relay(
        namespace: &Namespace,
        name: &str,
        bridge: &str,
        dir: &Path,
    ) -> Result<Self> {
        let peer = format!("{name}p");
        if namespace.run("ip", &["link", "show", "dev", name]).is_err() {
            namespace.run("ip", &["link", "add", name, "type", "veth", "peer", "name", &peer])?;
            // Nobody behind a packet socket fills in checksums or cuts segments: the kernel is to do it before.
            namespace.run("ethtool", &["-K", name, "tx", "off"])?;
            namespace.run("ip", &["link", "set", name, "master", bridge, "up"])?;
            // The interface itself has nothing to say to the machine.
            namespace.run("ip", &["link", "set", &peer, "addrgenmode", "none", "up"])?;
        }
        let link = namespace.entrance().inside(|| {
            // A packet socket holds fewer frames than a window of iPXE's has.
            fs::write(SEND_BUFFER, "4096 16384 65536")
                .with_context(|| format!("cannot set {SEND_BUFFER}"))?;
            packet::open(&peer)
        })??;
        let (ours, theirs) = (dir.join("net-lab.sock"), dir.join("net-qemu.sock"));
        let relay = Relay::start(link, &ours, theirs.clone())?;
        let netdev = format!(
            "dgram,id=n0,local.type=unix,local.path={},remote.type=unix,remote.path={}",
            theirs.display(),
            ours.display()
        );
        Ok(Self { netdev, _relay: Some(relay) })
    }

    /// QEMU's `-netdev`, with the id `n0`.
    #[must_use]
    pub(crate) fn netdev(&self) -> String {
        self.netdev.clone()
    }
}

/// The threads that carry frames to and fro.
#[derive(Debug)]
struct Relay {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Relay {
    fn start(link: OwnedFd, ours: &Path, theirs: PathBuf) -> Result<Self> {
        for left in [ours, &theirs] {
            // Of a machine that is off. Usually there is none.
            drop(fs::remove_file(left));
        }
        let machine = UnixDatagram::bind(ours)
            .with_context(|| format!("cannot listen at {}", ours.display()))?;
        let set = machine.set_read_timeout(Some(LOOK));
        set.and_then(|()| machine.set_write_timeout(Some(LOOK)))
            .context("cannot set a socket's timeout")?;
        let (link, machine) = (Arc::new(link), Arc::new(machine));
        let mut relay = Self { stop: Arc::default(), threads: Vec::new() };
        let (queue, frames) = sync_channel(QUEUE);
        let (from, stop) = (Arc::clone(&link), Arc::clone(&relay.stop));
        relay.thread("lab-from-bridge", move || from_bridge(&from, &queue, &stop))?;
        let (to, stop) = (Arc::clone(&machine), Arc::clone(&relay.stop));
        relay.thread("lab-to-machine", move || to_machine(&frames, &to, &theirs, &stop))?;
        let stop = Arc::clone(&relay.stop);
        relay.thread("lab-to-bridge", move || to_bridge(&machine, &link, &stop))?;
        Ok(relay)
    }

    fn thread(&mut self, name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(work);
        self.threads.push(thread.context("cannot start a relay thread")?);
        Ok(())
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            drop(thread.join());
        }
    }
}

fn from_bridge(link: &OwnedFd, queue: &SyncSender<Vec<u8>>, stop: &AtomicBool) {
    let mut buffer = vec![0; FRAME];
    while !stop.load(Ordering::Relaxed) {
        // The timeout makes this loop look at `stop`.
        let Ok(length) = recv(link.as_raw_fd(), &mut buffer, MsgFlags::empty()) else { continue };
        // Full: the frame is lost, as on any cable.
        let _ = queue.try_send(buffer.get(..length).unwrap_or_default().to_vec());
    }
}

/// Ends when the other end of the queue does.
fn to_machine(queue: &Receiver<Vec<u8>>, machine: &UnixDatagram, theirs: &Path, stop: &AtomicBool) {
    for frame in queue {
        // A machine that takes no frame for a while is waited for; one that is off loses it.
        while machine.send_to(&frame, theirs).is_err_and(|error| busy(&error))
            && !stop.load(Ordering::Relaxed)
        {}
    }
}

fn busy(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}

fn to_bridge(machine: &UnixDatagram, link: &OwnedFd, stop: &AtomicBool) {
    let mut buffer = vec![0; FRAME];
    while !stop.load(Ordering::Relaxed) {
        let Ok(length) = machine.recv(&mut buffer) else { continue };
        let _ = send(link.as_raw_fd(), buffer.get(..length).unwrap_or_default(), MsgFlags::empty());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A broadcast frame of an Ethernet type for experiments (IEEE 802, 0x88b5).
    fn frame(from: u8) -> Vec<u8> {
        let mut frame = vec![0xff; 6];
        frame.extend([0x52, 0x54, 0, 0, 0, from, 0x88, 0xb5]);
        frame.resize(60, from);
        frame
    }

    #[test]
    fn a_frame_of_one_machine_reaches_the_other_over_the_bridge() {
        let namespace = Namespace::new().expect("namespace");
        for args in ["link add br7 type bridge mcast_snooping 0", "link set br7 up"] {
            namespace.run("ip", &args.split(' ').collect::<Vec<_>>()).expect("ip");
        }
        let dirs = [(); 2].map(|()| tempfile::tempdir().expect("dir"));
        let mut machines = Vec::new();
        for (name, dir) in ["tap1", "tap2"].iter().zip(&dirs) {
            let cable = Cable::relay(&namespace, name, "br7", dir.path()).expect("cable");
            // Where QEMU would be.
            let qemu = UnixDatagram::bind(dir.path().join("net-qemu.sock")).expect("bind");
            qemu.set_read_timeout(Some(LOOK)).expect("timeout");
            qemu.connect(dir.path().join("net-lab.sock")).expect("connect");
            machines.push((cable, qemu));
        }
        let mut buffer = [0; 2000];
        let within = std::time::Duration::from_secs(20);
        // Again and again: the bridge's ports take a moment to forward.
        crate::wait::until("the frame", within, || {
            machines[0].1.send(&frame(7))?;
            let length = machines[1].1.recv(&mut buffer).unwrap_or(0);
            Ok((buffer[..length] == frame(7)).then_some(()))
        })
        .expect("frame");
    }
}
