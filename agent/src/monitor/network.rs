//! A container's own network: a namespace with a loopback interface and, when it is private, one end of a veth pair.
//!
//! The monitor enters the new namespace, makes what belongs into it, clones the container there and goes back: nothing waits
//! for anything, and all of it goes with the container's last process. The messages are few and written here (rtnetlink(7)),
//! because the monitor has no async runtime. The agent's own network is not touched.

use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};
use protocol::ids::Digest;
use protocol::imageset::{NetMode, Network};

use crate::containers::View;

/// The container's end of its veth pair.
const INSIDE: &str = "eth0";

// linux/netlink.h, linux/rtnetlink.h, linux/if_link.h, linux/if_addr.h, linux/veth.h
const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;
const NLMSG_ERROR: u16 = 2;
const NLA_F_NESTED: u16 = 0x8000;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINKINFO: u16 = 18;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const VETH_INFO_PEER: u16 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_F_NODAD: u8 = 2;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_STATIC: u8 = 4;
const RTN_UNICAST: u8 = 1;
const IFF_UP: u32 = 1;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
/// Length of a netlink header.
const HEADER: usize = 16;

/// The way back into the node's network.
#[derive(Debug)]
pub(super) struct Outside {
    namespace: File,
}

/// Enters a new network namespace and furnishes it; nothing for a container in the node's own. The calling thread is in the
/// new one until [`Outside::leave`].
///
/// # Errors
/// One sentence; the thread is where it was then.
pub(super) fn enter(view: &View) -> Result<Option<Outside>, String> {
    if view.namespaces.net == NetMode::Host {
        return Ok(None);
    }
    let namespace = File::open("/proc/self/ns/net").map_err(|e| format!("its namespace: {e}"))?;
    unshare(CloneFlags::CLONE_NEWNET).map_err(|e| format!("a new namespace: {e}"))?;
    let outside = Outside { namespace };
    match outside.furnish(view) {
        Ok(()) => Ok(Some(outside)),
        Err(error) => {
            outside.back()?;
            Err(error)
        }
    }
}

impl Outside {
    fn furnish(&self, view: &View) -> Result<(), String> {
        let socket = Socket::open()?;
        socket.call("bring up lo", &up(1))?;
        let Some(network) = &view.network else { return Ok(()) };
        let parsed = Addresses::parse(network)?;
        // The other end is made under a name that is nobody's, so that it cannot meet one of the node's.
        socket.call("make a veth pair", &veth(network.mtu, self.namespace.as_raw_fd()))?;
        let index = index(INSIDE)?;
        socket.call("set its address", &address(index, parsed.inside))?;
        socket.call("bring up eth0", &up(index))?;
        socket.call("set its default route", &default_route(index, parsed.host.0))
    }

    /// Goes back and furnishes the node's end.
    ///
    /// # Errors
    /// One sentence. The thread is back all the same, unless the sentence says otherwise.
    pub(super) fn leave(self, id: &str, view: &View) -> Result<(), String> {
        self.back()?;
        let Some(network) = &view.network else { return Ok(()) };
        let socket = Socket::open()?;
        let found = index(&temporary_name())?;
        socket.call("name its end on the node", &rename(found, &host_name(id)))?;
        socket.call("set the node's address", &address(found, Addresses::parse(network)?.host))?;
        socket.call("bring up the node's end", &up(found))
    }

    fn back(&self) -> Result<(), String> {
        setns(&self.namespace, CloneFlags::CLONE_NEWNET)
            .map_err(|e| format!("back into the node's namespace: {e}"))
    }
}

/// The name of the node's end until it is back in hands that know the container: the monitor's own process id in it.
fn temporary_name() -> String {
    format!("lct{}", std::process::id())
}

/// The node's end of a container's pair, from its id; at most 15 characters (IFNAMSIZ).
fn host_name(id: &str) -> String {
    let digest: String = Digest::of(id.as_bytes()).hex().chars().take(10).collect();
    format!("lc-{digest}")
}

type Cidr = (IpAddr, u8);

struct Addresses {
    inside: Cidr,
    host: Cidr,
}

impl Addresses {
    fn parse(network: &Network) -> Result<Self, String> {
        let cidr = |text: &str| -> Option<Cidr> {
            let (address, length) = text.split_once('/')?;
            Some((address.parse().ok()?, length.parse().ok()?))
        };
        let parse = |text: &str| cidr(text).ok_or_else(|| format!("`{text}` is no address"));
        Ok(Self { inside: parse(&network.address)?, host: parse(&network.host_address)? })
    }
}

fn index(name: &str) -> Result<u32, String> {
    if_nametoindex(name).map_err(|e| format!("interface {name}: {e}"))
}

/// A netlink message under construction.
struct Message(Vec<u8>);

impl Message {
    fn new(kind: u16, flags: u16, body: &[u8]) -> Self {
        let mut bytes = vec![0; 4];
        bytes.extend(kind.to_ne_bytes());
        bytes.extend((NLM_F_REQUEST | NLM_F_ACK | flags).to_ne_bytes());
        bytes.resize(HEADER, 0);
        bytes.extend(body);
        Self(bytes)
    }

    fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        self.0.extend(attribute(kind, value));
        self
    }

    fn finish(&self) -> Vec<u8> {
        let length = u32::try_from(self.0.len()).unwrap_or(u32::MAX).to_ne_bytes();
        length.into_iter().chain(self.0.iter().skip(4).copied()).collect()
    }
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
    let mut bytes = Vec::with_capacity(value.len() + 8);
    bytes.extend(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// `struct ifinfomsg`.
fn ifinfo(index: u32, flags: u32) -> Vec<u8> {
    [[0; 4], index.to_ne_bytes(), flags.to_ne_bytes(), flags.to_ne_bytes()].concat()
}

fn name(text: &str) -> Vec<u8> {
    [text.as_bytes(), b"\0"].concat()
}

fn up(index: u32) -> Message {
    Message::new(RTM_NEWLINK, 0, &ifinfo(index, IFF_UP))
}

fn rename(index: u32, to: &str) -> Message {
    Message::new(RTM_NEWLINK, 0, &ifinfo(index, 0)).attribute(IFLA_IFNAME, &name(to))
}

fn veth(mtu: Option<u32>, host_namespace: i32) -> Message {
    let mtu = mtu.map(|mtu| attribute(IFLA_MTU, &mtu.to_ne_bytes())).unwrap_or_default();
    let mut peer = ifinfo(0, 0);
    peer.extend(attribute(IFLA_IFNAME, &name(&temporary_name())));
    peer.extend(attribute(IFLA_NET_NS_FD, &host_namespace.to_ne_bytes()));
    peer.extend(&mtu);
    let data = attribute(VETH_INFO_PEER | NLA_F_NESTED, &peer);
    let kind = attribute(IFLA_INFO_KIND, b"veth");
    let info = [kind, attribute(IFLA_INFO_DATA | NLA_F_NESTED, &data)].concat();
    let mut message = Message::new(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, &ifinfo(0, 0))
        .attribute(IFLA_IFNAME, &name(INSIDE));
    message.0.extend(mtu);
    message.attribute(IFLA_LINKINFO | NLA_F_NESTED, &info)
}

fn octets(address: IpAddr) -> (u8, Vec<u8>) {
    match address {
        IpAddr::V4(address) => (AF_INET, address.octets().to_vec()),
        IpAddr::V6(address) => (AF_INET6, address.octets().to_vec()),
    }
}

fn address(index: u32, (address, length): Cidr) -> Message {
    let (family, bytes) = octets(address);
    let mut body = vec![family, length, IFA_F_NODAD, 0];
    body.extend(index.to_ne_bytes());
    Message::new(RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, &body)
        .attribute(IFA_LOCAL, &bytes)
        .attribute(IFA_ADDRESS, &bytes)
}

fn default_route(index: u32, gateway: IpAddr) -> Message {
    let (family, bytes) = octets(gateway);
    let mut body = vec![family, 0, 0, 0, RT_TABLE_MAIN, RTPROT_STATIC, 0, RTN_UNICAST];
    body.extend([0; 4]);
    Message::new(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL, &body)
        .attribute(RTA_GATEWAY, &bytes)
        .attribute(RTA_OIF, &index.to_ne_bytes())
}

struct Socket(OwnedFd);

impl Socket {
    fn open() -> Result<Self, String> {
        let (kind, flags) = (SockType::Raw, SockFlag::SOCK_CLOEXEC);
        socket(AddressFamily::Netlink, kind, flags, SockProtocol::NetlinkRoute)
            .map(Self)
            .map_err(|e| format!("a netlink socket: {e}"))
    }

    /// Sends a message and waits for the kernel's answer, which comes before the system call returns.
    fn call(&self, what: &str, message: &Message) -> Result<(), String> {
        let failed = |error: io::Error| format!("{what}: {error}");
        let fd = self.0.as_raw_fd();
        send(fd, &message.finish(), MsgFlags::empty()).map_err(|e| failed(e.into()))?;
        let mut buffer = [0; 4096];
        let length = recv(fd, &mut buffer, MsgFlags::empty()).map_err(|e| failed(e.into()))?;
        match answer(buffer.get(..length).unwrap_or_default()) {
            Some(0) => Ok(()),
            Some(error) => Err(failed(io::Error::from_raw_os_error(error.saturating_neg()))),
            None => Err(format!("{what}: the kernel's answer is no acknowledgement")),
        }
    }
}

/// The error number of an acknowledgement, 0 for none.
fn answer(bytes: &[u8]) -> Option<i32> {
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let error = i32::from_ne_bytes(bytes.get(HEADER..HEADER + 4)?.try_into().ok()?);
    (kind == NLMSG_ERROR).then_some(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_as_the_kernel_wants_them() {
        let bytes = up(1).finish();
        assert_eq!(bytes.len(), 32);
        assert_eq!(bytes[..8], [32, 0, 0, 0, 16, 0, 5, 0]);
        let bytes = address(7, ("10.88.0.2".parse().expect("ip"), 24)).finish();
        assert_eq!(bytes[16..24], [2, 24, 2, 0, 7, 0, 0, 0]);
        assert_eq!(bytes[24..32], [8, 0, 2, 0, 10, 88, 0, 2]);
        assert_eq!(attribute(3, b"ab\0"), [7, 0, 3, 0, b'a', b'b', 0, 0]);
        assert!(host_name(&"x".repeat(64)).len() <= 15 && temporary_name().len() <= 15);
    }

    #[test]
    fn an_answer_is_an_error_number_or_none() {
        let mut bytes = [0; 20];
        bytes[4] = 2;
        assert_eq!(answer(&bytes), Some(0));
        bytes[16..].copy_from_slice(&(-17_i32).to_ne_bytes());
        assert_eq!(answer(&bytes), Some(-17));
        bytes[4] = 3;
        assert_eq!((answer(&bytes), answer(&bytes[..10])), (None, None));
    }
}
