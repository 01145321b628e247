//! Router advertisements (RFC 4861) on the lab's bridge. iPXE waits 16 seconds in "Configuring" when nobody answers
//! its router solicitations; one advertisement that offers a prefix and no default router ends that wait.
//!
//! It routes nothing and answers nothing else.

use std::net::{Ipv6Addr, SocketAddrV6};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto, netdevice, recv, sendto,
    socket_with, sockopt,
};

use crate::namespace::Entrance;

/// ICMPv6 type of a router solicitation (RFC 4861 4.1).
const SOLICITATION: u8 = 133;
/// ICMPv6 type of a router advertisement (RFC 4861 4.2).
const ADVERTISEMENT: u8 = 134;
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);
/// Neighbour discovery is ignored with any other hop limit (RFC 4861 6.1).
const HOP_LIMIT: u32 = 255;
/// How often an advertisement goes out unasked: well under iPXE's own wait, should it miss an answer.
pub(crate) const UNASKED: Duration = Duration::from_secs(3);
/// How often the thread looks whether it should end.
const LOOK: Duration = Duration::from_millis(100);
/// How long the prefix is good for: longer than any lab lives, in seconds.
const LIFETIME_S: u32 = 86_400;

/// The thread that advertises.
#[derive(Debug)]
pub struct Router {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Router {
    /// Advertises `prefix`/64 on this interface until dropped: to whoever asks, and as often as `unasked` says to all.
    ///
    /// # Errors
    /// When the socket cannot be made or the interface is not there.
    pub fn start(
        entrance: &Entrance,
        interface: &str,
        prefix: Ipv6Addr,
        unasked: Duration,
    ) -> Result<Self> {
        let (socket, scope) = entrance.inside(|| open(interface))??;
        let stop = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&stop);
        let packet = advertisement(prefix);
        let thread = std::thread::Builder::new()
            .name("lab-router".to_owned())
            .spawn(move || advertise(&socket, scope, &packet, unasked, &flag))
            .context("cannot start the router thread")?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// The advertisement: hop limit 64, no flags, router lifetime 0 (no default router), one on-link autonomous prefix.
/// The kernel fills in the checksum (RFC 3542 3.1).
fn advertisement(prefix: Ipv6Addr) -> Vec<u8> {
    let mut packet = vec![ADVERTISEMENT, 0, 0, 0, 64, 0, 0, 0];
    packet.extend([0; 8]); // Reachable time and retransmission timer: unspecified.
    packet.extend([3, 4, 64, 0xc0]); // Prefix information, 4 x 8 bytes, /64, L and A flags.
    packet.extend(LIFETIME_S.to_be_bytes()); // Valid.
    packet.extend(LIFETIME_S.to_be_bytes()); // Preferred.
    packet.extend([0; 4]);
    packet.extend(prefix.octets());
    packet
}

fn open(interface: &str) -> Result<(OwnedFd, u32)> {
    let socket = socket_with(
        AddressFamily::INET6,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        Some(ipproto::ICMPV6),
    )
    .context("cannot open a raw ICMPv6 socket")?;
    let scope = netdevice::name_to_index(&socket, interface)
        .with_context(|| format!("no interface {interface}"))?;
    let set = || -> rustix::io::Result<()> {
        sockopt::set_ipv6_add_membership(&socket, &ALL_ROUTERS, scope)?;
        sockopt::set_ipv6_multicast_if(&socket, scope)?;
        sockopt::set_ipv6_multicast_hops(&socket, HOP_LIMIT)?;
        sockopt::set_ipv6_multicast_loop(&socket, false)?;
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(LOOK))
    };
    set().with_context(|| format!("cannot set up router advertisements on {interface}"))?;
    Ok((socket, scope))
}

fn advertise(socket: &OwnedFd, scope: u32, packet: &[u8], unasked: Duration, stop: &AtomicBool) {
    let everybody = SocketAddrV6::new(ALL_NODES, 0, 0, scope);
    let mut buffer = [0; 1500];
    let mut due = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        let asked = match recv(socket, &mut buffer[..], RecvFlags::empty()) {
            Ok((length, _)) => length > 0 && buffer.first() == Some(&SOLICITATION),
            Err(_) => false, // The timeout, which is what makes this loop look at `stop`.
        };
        if asked || Instant::now() >= due {
            // Fails while the bridge's own link-local address is still tentative: the next one will not.
            let _ = sendto(socket, packet, SendFlags::empty(), &everybody);
            due = Instant::now() + unasked;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_advertisement_offers_the_prefix_and_no_default_router() {
        let packet = advertisement("fd00:9::".parse().expect("address"));
        assert_eq!(packet.len(), 16 + 32);
        assert_eq!(packet[0], 134);
        assert_eq!(packet[6..8], [0, 0], "router lifetime");
        assert_eq!(packet[16..20], [3, 4, 64, 0xc0]);
        assert_eq!(packet[32..36], [0xfd, 0, 0, 9]);
    }
}
