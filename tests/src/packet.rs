//! A packet socket on one interface (packet(7)), with a timeout that lets its reader look up now and then.

use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockProtocol, SockType, bind, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

/// How long a read waits at the most.
pub(crate) const LOOK: Duration = Duration::from_millis(100);
/// What the socket should hold, in bytes. The kernel cuts it to what everybody may have (net.core.rmem_max).
const BUFFER: usize = 4 << 20;

/// A socket that hears and speaks raw frames on this interface of the calling thread's namespace.
///
/// # Errors
/// When the interface is not there, or the right to packet sockets.
pub(crate) fn open(interface: &str) -> Result<OwnedFd> {
    let socket =
        socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)
            .context("cannot open a packet socket")?;
    let look = TimeVal::milliseconds(i64::try_from(LOOK.as_millis())?);
    setsockopt(&socket, sockopt::ReceiveTimeout, &look).context("cannot set a receive timeout")?;
    setsockopt(&socket, sockopt::RcvBuf, &BUFFER).context("cannot set a buffer's size")?;
    let address = nix::ifaddrs::getifaddrs()
        .context("cannot list the interfaces")?
        .filter(|found| found.interface_name == interface)
        .find_map(|found| found.address?.as_link_addr().copied())
        .with_context(|| format!("no interface {interface}"))?;
    bind(socket.as_raw_fd(), &address)
        .with_context(|| format!("cannot bind a packet socket to {interface}"))?;
    Ok(socket)
}
