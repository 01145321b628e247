//! Placeholder of the DHCP server: the seam that `serve` is written against.

use std::net::Ipv4Addr;

use protocol::ids::{Mac, NodeId};
use tokio::sync::{mpsc, watch};

/// An IPv4 subnet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subnet {
    /// Network address.
    pub network: Ipv4Addr,
    /// Length of the prefix in bits.
    pub prefix_len: u8,
}

/// Boot file names.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BootFiles {}

/// What the DHCP server is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DhcpConfig {
    /// Interface to serve.
    pub interface: String,
    /// Our address.
    pub server: Ipv4Addr,
    /// The subnet.
    pub subnet: Subnet,
    /// First and last address given.
    pub range: (Ipv4Addr, Ipv4Addr),
    /// Default gateway.
    pub router: Option<Ipv4Addr>,
    /// Name servers.
    pub dns: Vec<Ipv4Addr>,
    /// Search domain.
    pub domain: Option<String>,
    /// Lease time in seconds.
    pub lease_s: u32,
    /// Base URL of the boot server.
    pub http_base: String,
    /// Fixed addresses.
    pub reservations: Vec<(Mac, Ipv4Addr, Option<NodeId>)>,
    /// Boot file names.
    pub boot_files: BootFiles,
}

/// What the DHCP server has seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DhcpSeen {
    /// A DISCOVER.
    Discover {
        /// Client.
        mac: Mac,
        /// SMBIOS UUID.
        uuid: Option<String>,
        /// From iPXE.
        ipxe: bool,
        /// Client architecture, RFC 4578.
        arch: Option<u16>,
        /// Asks for boot.
        boot: bool,
    },
    /// An address was leased.
    Leased {
        /// Client.
        mac: Mac,
        /// Its address.
        address: Ipv4Addr,
        /// Asks for boot.
        boot: bool,
    },
}

/// Why the DHCP server stopped.
#[derive(Debug, thiserror::Error)]
#[error("the DHCP server is not part of this build")]
pub struct DhcpError;

/// Placeholder.
///
/// # Errors
/// Never.
pub async fn serve(
    config: DhcpConfig,
    seen: mpsc::UnboundedSender<DhcpSeen>,
    mut shutdown: watch::Receiver<bool>,
) -> Result<(), DhcpError> {
    drop((config, seen));
    let _ = shutdown.wait_for(|stop| *stop).await;
    Ok(())
}
