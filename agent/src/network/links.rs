//! What the kernel is told and asked about interfaces, by rtnetlink. The only module that knows its message types.

use std::net::{IpAddr, Ipv4Addr};

use futures_util::TryStreamExt as _;
use netlink_packet_route::address::AddressAttribute;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage};
use netlink_packet_route::route::RouteProtocol;
use protocol::ids::Mac;
use rtnetlink::{AddressMessageBuilder, Handle, LinkUnspec, RouteMessageBuilder};

use super::message::Grant;

/// An Ethernet interface as the kernel describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) mac: Mac,
    /// It can carry packets now.
    pub(super) carrier: bool,
    /// It is not hardware: a bridge, a veth, a tunnel.
    pub(super) is_virtual: bool,
}

/// Reads a link message; `None` if it is not about an Ethernet interface.
pub(super) fn read(message: &LinkMessage) -> Option<Link> {
    let header = &message.header;
    if header.link_layer_type != LinkLayerType::Ether || header.flags.contains(LinkFlags::Loopback)
    {
        return None;
    }
    let mut link = Link {
        index: header.index,
        name: String::new(),
        mac: Mac([0; 6]),
        carrier: header.flags.contains(LinkFlags::Up | LinkFlags::LowerUp),
        is_virtual: false,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Address(address) => {
                link.mac = Mac(address.as_slice().try_into().ok()?);
            }
            LinkAttribute::LinkInfo(infos) => {
                link.is_virtual |= infos.iter().any(|info| matches!(info, LinkInfo::Kind(_)));
            }
            _ => {}
        }
    }
    (!link.name.is_empty()).then_some(link)
}

/// Every Ethernet interface there is.
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

/// Sets an interface's MTU, in bytes.
pub(super) async fn set_mtu(handle: &Handle, index: u32, mtu: u16) -> Result<(), rtnetlink::Error> {
    handle.link().set(LinkUnspec::new_with_index(index).mtu(mtu.into()).build()).execute().await
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
    grant: &Grant,
    gateway: Ipv4Addr,
    metric: u32,
) -> Result<(), rtnetlink::Error> {
    let mut route = RouteMessageBuilder::<Ipv4Addr>::new()
        .gateway(gateway)
        .output_interface(index)
        .pref_source(grant.address)
        .protocol(RouteProtocol::Dhcp)
        .priority(metric);
    let mask = u32::MAX.checked_shl(32_u32.saturating_sub(grant.prefix_len.into())).unwrap_or(0);
    if u32::from(gateway) & mask != u32::from(grant.address) & mask {
        route = route.onlink();
    }
    handle.route().add(route.build()).replace().execute().await
}
