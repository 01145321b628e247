//! What the kernel is told and asked about interfaces, by rtnetlink. The only module that knows its message types, which it
//! makes and reads; when, is decided elsewhere.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures_util::TryStreamExt as _;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressMessage, AddressScope, CacheInfo,
};
use netlink_packet_route::link::{
    InfoBond, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};
use netlink_packet_route::route::{RouteMessage, RouteProtocol};
use protocol::ids::Mac;
use protocol::network::{Bond, Vlan};
use rtnetlink::packet_core::{DefaultNla, NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST};
use rtnetlink::{
    AddressMessageBuilder, Handle, LinkBond, LinkUnspec, LinkVlan, RouteMessageBuilder,
};

use super::message::{Grant, Station};
use super::message6::Lease;

/// What netlink calls a bond's preferred slave (`IFLA_BOND_PRIMARY`, `linux/if_link.h`).
const PRIMARY: u16 = 11;

/// It has a carrier, and the kernel has acted upon that: before, what is sent is lost.
pub(super) const CARRIER: LinkFlags =
    LinkFlags::Up.union(LinkFlags::LowerUp).union(LinkFlags::Running);

/// An Ethernet or InfiniBand interface as the kernel describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) station: Station,
    /// What it has in hardware, which a bond's address hides.
    pub(super) permanent: Option<Mac>,
    pub(super) is_up: bool,
    /// It can carry packets now.
    pub(super) carrier: bool,
    /// It is not hardware: a bridge, a veth, a tunnel.
    pub(super) is_virtual: bool,
    /// The bond or bridge that it is part of.
    pub(super) controller: Option<u32>,
    /// In bytes.
    pub(super) mtu: u32,
}

impl Link {
    pub(super) fn mac(&self) -> Mac {
        self.station.mac()
    }
}

/// Reads a link message; `None` if it is about nothing that we look after.
pub(super) fn read(message: &LinkMessage) -> Option<Link> {
    let header = &message.header;
    let is_ethernet = header.link_layer_type == LinkLayerType::Ether;
    let is_ours = is_ethernet || header.link_layer_type == LinkLayerType::Infiniband;
    // The family says whose news it is: bridges tell of their ports, IPv6 of its settings.
    let is_news = header.interface_family == AddressFamily::Unspec;
    if !is_ours || !is_news || header.flags.contains(LinkFlags::Loopback) {
        return None;
    }
    let mut link = Link {
        index: header.index,
        name: String::new(),
        station: Station::Ethernet(Mac([0; 6])),
        permanent: None,
        is_up: header.flags.contains(LinkFlags::Up),
        carrier: header.flags.contains(CARRIER),
        is_virtual: false,
        controller: None,
        mtu: 0,
    };
    let (mut own, mut everyone): (&[u8], &[u8]) = (&[], &[]);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Address(address) => own = address,
            LinkAttribute::Broadcast(address) => everyone = address,
            LinkAttribute::PermAddress(address) => {
                link.permanent = address.as_slice().try_into().ok().map(Mac);
            }
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Controller(index) => link.controller = Some(*index),
            LinkAttribute::LinkInfo(infos) => {
                // IPoIB has a kind although it is hardware.
                let kind = |info: &LinkInfo| matches!(info, LinkInfo::Kind(_));
                link.is_virtual = is_ethernet && infos.iter().any(kind);
            }
            _ => {}
        }
    }
    link.station = if is_ethernet {
        Station::Ethernet(Mac(own.try_into().ok()?))
    } else {
        Station::Infiniband { address: own.try_into().ok()?, everyone: everyone.try_into().ok()? }
    };
    (!link.name.is_empty()).then_some(link)
}

/// Every interface that we may look after.
pub(super) async fn list(handle: &Handle) -> Result<Vec<Link>, rtnetlink::Error> {
    let messages: Vec<LinkMessage> = handle.link().get().execute().try_collect().await?;
    Ok(messages.iter().filter_map(read).collect())
}

/// Brings the loopback interface up.
pub(super) async fn loopback_up(handle: &Handle) -> Result<(), rtnetlink::Error> {
    handle.link().set(LinkUnspec::new_with_name("lo").up().build()).execute().await
}

/// Brings an interface up.
pub(super) async fn up(handle: &Handle, index: u32) -> Result<(), rtnetlink::Error> {
    handle.link().set(LinkUnspec::new_with_index(index).up().build()).execute().await
}

/// The request of [`up`], for who has no handle.
pub(super) fn up_message(index: u32) -> RouteNetlinkMessage {
    RouteNetlinkMessage::SetLink(LinkUnspec::new_with_index(index).up().build())
}

/// Sets an interface's MTU, in bytes.
pub(super) async fn set_mtu(handle: &Handle, index: u32, mtu: u32) -> Result<(), rtnetlink::Error> {
    handle.link().set(LinkUnspec::new_with_index(index).mtu(mtu).build()).execute().await
}

/// The request of [`set_mtu`].
pub(super) fn mtu_message(index: u32, mtu: u32) -> RouteNetlinkMessage {
    RouteNetlinkMessage::SetLink(LinkUnspec::new_with_index(index).mtu(mtu).build())
}

/// Makes a bond, or changes the one that is there: the driver may have made `bond0` by itself.
pub(super) async fn make_bond(handle: &Handle, bond: &Bond) -> Result<(), rtnetlink::Error> {
    let mut message = LinkBond::new(&bond.name);
    for option in &bond.options {
        let bytes = option.value.to_ne_bytes();
        let bytes = match option.kind.width {
            1 => u8::try_from(option.value).unwrap_or(u8::MAX).to_ne_bytes().to_vec(),
            _ => bytes.to_vec(),
        };
        let raw = DefaultNla::new(option.kind.attribute, bytes);
        message = message.append_info_data(InfoBond::Other(raw));
    }
    if let Some(mtu) = bond.mtu {
        message = message.mtu(mtu);
    }
    let flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE;
    handle.link().add(message.build()).set_flags(flags).execute().await
}

/// Makes an interface part of a bond, which brings it up again.
pub(super) async fn enslave(
    handle: &Handle,
    slave: u32,
    bond: u32,
) -> Result<(), rtnetlink::Error> {
    let message = || LinkUnspec::new_with_index(slave);
    handle.link().set(message().down().build()).execute().await?;
    handle.link().set(message().controller(bond).build()).execute().await
}

/// Sets an interface's link-layer address.
pub(super) async fn set_mac(handle: &Handle, index: u32, mac: Mac) -> Result<(), rtnetlink::Error> {
    let message = LinkUnspec::new_with_index(index).address(mac.0.to_vec());
    handle.link().set(message.build()).execute().await
}

/// Sets which slave a bond prefers.
pub(super) async fn set_primary(
    handle: &Handle,
    bond: &Bond,
    slave: u32,
) -> Result<(), rtnetlink::Error> {
    let raw = DefaultNla::new(PRIMARY, slave.to_ne_bytes().to_vec());
    let message = LinkBond::new(&bond.name).append_info_data(InfoBond::Other(raw));
    let flags = NLM_F_REQUEST | NLM_F_ACK;
    handle.link().add(message.build()).set_flags(flags).execute().await
}

/// Makes a VLAN on an interface.
pub(super) async fn make_vlan(
    handle: &Handle,
    vlan: &Vlan,
    parent: u32,
) -> Result<(), rtnetlink::Error> {
    handle.link().add(LinkVlan::new(&vlan.name, parent, vlan.id).build()).execute().await
}

/// What the kernel says of an IPv6 address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// It can be used.
    Good,
    /// Somebody else has it.
    Duplicate,
    /// It is being looked into, or is not for new connections.
    Unready,
}

/// Reads a message about an IPv6 address that leads beyond the link: the interface, the address, how it stands.
pub(super) fn read_v6(message: &AddressMessage) -> Option<(u32, Ipv6Addr, Standing)> {
    let header = &message.header;
    if header.family != AddressFamily::Inet6 || header.scope != AddressScope::Universe {
        return None;
    }
    let mut flags = AddressFlags::from_bits_retain(header.flags.bits().into());
    let mut found = None;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Address(IpAddr::V6(address)) => found = Some(*address),
            AddressAttribute::Flags(more) => flags |= *more,
            _ => {}
        }
    }
    let standing = if flags.contains(AddressFlags::Dadfailed) {
        Standing::Duplicate
    } else if flags.intersects(AddressFlags::Tentative | AddressFlags::Deprecated) {
        Standing::Unready
    } else {
        Standing::Good
    };
    Some((header.index, found?, standing))
}

/// Every address of every interface.
pub(super) async fn addresses(handle: &Handle) -> Result<Vec<AddressMessage>, rtnetlink::Error> {
    handle.address().get().execute().try_collect().await
}

/// Sets an IPv6 address that DHCPv6 gave. It says nothing of other addresses on the link (RFC 8415 section 18.2.10.1), so
/// it makes no route; the kernel takes it away when its time is over.
pub(super) async fn set_lease(
    handle: &Handle,
    index: u32,
    lease: &Lease,
) -> Result<(), rtnetlink::Error> {
    let mut request = handle.address().add(index, IpAddr::V6(lease.address), 128).replace();
    let mut times = CacheInfo::default();
    (times.ifa_preferred, times.ifa_valid) = (lease.preferred, lease.valid);
    let attributes = &mut request.message_mut().attributes;
    attributes.push(AddressAttribute::CacheInfo(times));
    attributes.push(AddressAttribute::Flags(AddressFlags::Noprefixroute));
    request.execute().await
}

/// Takes an IPv6 address away.
pub(super) async fn delete_v6(
    handle: &Handle,
    index: u32,
    address: Ipv6Addr,
) -> Result<(), rtnetlink::Error> {
    let message =
        AddressMessageBuilder::<Ipv6Addr>::new().index(index).address(address, 128).build();
    handle.address().del(message).execute().await
}

/// Sets a fixed address, or leaves it if it is there.
pub(super) async fn set_fixed(
    handle: &Handle,
    index: u32,
    address: IpAddr,
    prefix_len: u8,
) -> Result<(), rtnetlink::Error> {
    handle.address().add(index, address, prefix_len).replace().execute().await
}

/// Sets the default IPv6 route through a gateway; the lowest metric wins.
pub(super) async fn set_default_v6(
    handle: &Handle,
    index: u32,
    gateway: Ipv6Addr,
    metric: u32,
) -> Result<(), rtnetlink::Error> {
    let route = RouteMessageBuilder::<Ipv6Addr>::new()
        .gateway(gateway)
        .output_interface(index)
        .priority(metric)
        .build();
    handle.route().add(route).replace().execute().await
}

/// The first IPv4 address of an interface that is not of a single host: what an earlier life of the agent set.
pub(super) async fn address(
    handle: &Handle,
    index: u32,
) -> Result<Option<(Ipv4Addr, u8)>, rtnetlink::Error> {
    let mut stream = std::pin::pin!(handle.address().get().set_link_index_filter(index).execute());
    let mut found = None;
    while let Some(message) = stream.try_next().await? {
        let prefix_len = message.header.prefix_len;
        for attribute in &message.attributes {
            if let AddressAttribute::Address(IpAddr::V4(address)) = attribute
                && prefix_len < 32
                && message.header.index == index
            {
                found = found.or(Some((*address, prefix_len)));
            }
        }
    }
    Ok(found)
}

/// Sets an address, or leaves it if it is there.
pub(super) async fn set_address(
    handle: &Handle,
    index: u32,
    grant: &Grant,
) -> Result<(), rtnetlink::Error> {
    let address = IpAddr::V4(grant.address);
    handle.address().add(index, address, grant.prefix_len).replace().execute().await
}

/// The request of [`set_address`], and its flags.
pub(super) fn address_message(index: u32, grant: &Grant) -> (RouteNetlinkMessage, u16) {
    let message = AddressMessageBuilder::<Ipv4Addr>::new()
        .index(index)
        .address(grant.address, grant.prefix_len)
        .build();
    (RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_REPLACE)
}

/// Takes an address away; the kernel takes the routes that came from it along.
pub(super) async fn delete_address(
    handle: &Handle,
    index: u32,
    address: Ipv4Addr,
    prefix_len: u8,
) -> Result<(), rtnetlink::Error> {
    let message =
        AddressMessageBuilder::<Ipv4Addr>::new().index(index).address(address, prefix_len).build();
    handle.address().del(message).execute().await
}

/// Sets the default route through a gateway; the lowest metric wins.
pub(super) async fn set_default_route(
    handle: &Handle,
    index: u32,
    from: (Ipv4Addr, u8),
    gateway: Ipv4Addr,
    metric: u32,
) -> Result<(), rtnetlink::Error> {
    handle.route().add(default_route(index, from, gateway, metric)).replace().execute().await
}

/// The request of [`set_default_route`] through a grant's gateway, and its flags. `None` where it has none.
pub(super) fn granted_route_message(
    index: u32,
    grant: &Grant,
    metric: u32,
) -> Option<(RouteNetlinkMessage, u16)> {
    let message = default_route(index, (grant.address, grant.prefix_len), grant.router?, metric);
    Some((RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE | NLM_F_REPLACE))
}

fn default_route(
    index: u32,
    (address, prefix_len): (Ipv4Addr, u8),
    gateway: Ipv4Addr,
    metric: u32,
) -> RouteMessage {
    let mut route = RouteMessageBuilder::<Ipv4Addr>::new()
        .gateway(gateway)
        .output_interface(index)
        .pref_source(address)
        .protocol(RouteProtocol::Dhcp)
        .priority(metric);
    let mask = u32::MAX.checked_shl(32_u32.saturating_sub(prefix_len.into())).unwrap_or(0);
    if u32::from(gateway) & mask != u32::from(address) & mask {
        route = route.onlink();
    }
    route.build()
}

/// Whether it failed because there is such a thing already.
pub(super) fn exists(error: &rtnetlink::Error) -> bool {
    let code = match error {
        rtnetlink::Error::NetlinkError(message) => message.raw_code(),
        _ => 0,
    };
    code == -nix::libc::EEXIST
}
