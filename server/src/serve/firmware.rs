//! What firmware is told by DHCP and given by TFTP, out of the config.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use bytes::Bytes;

use crate::boot::{RenderError, render_chain};
use crate::config::Config;
use crate::dhcp::{BootFiles, DhcpConfig, Reservation};
use crate::tftp::TftpConfig;

/// The script that iPXE gets over TFTP.
const CHAIN_FILE: &str = "boot.ipxe";

fn boot_files() -> BootFiles {
    BootFiles { ipxe_script: CHAIN_FILE.to_owned(), ..BootFiles::default() }
}

/// What the DHCP server is told; none where the config has no `[dhcp]`.
pub(super) fn dhcp_config(config: &Config) -> Option<DhcpConfig> {
    let section = config.dhcp.as_ref()?;
    let reservations = config.nodes.iter().filter_map(|node| {
        let address = node.address?;
        Some(Reservation { mac: node.mac, address, node: Some(node.id.clone()) })
    });
    Some(DhcpConfig {
        interface: section.interface.clone(),
        server: config.dhcp_address()?,
        subnet: (section.subnet.network(), section.subnet.prefix_len()),
        range: section.range,
        router: section.router,
        dns: section.dns.clone(),
        ntp_servers: section.ntp_servers.clone(),
        domain: section.domain.clone(),
        lease_s: section.lease_s,
        http_base: config.server.url.to_string(),
        reservations: reservations.collect(),
        boot_files: boot_files(),
    })
}

/// What the TFTP server is told; none where the config has no `[tftp]`.
///
/// # Errors
/// If `server.url` cannot stand in a script of iPXE.
pub(super) fn tftp_config(config: &Config) -> Result<Option<TftpConfig>, RenderError> {
    let Some(section) = &config.tftp else { return Ok(None) };
    let chain = Bytes::from(render_chain(config.server.url.as_str())?);
    let builtin = BTreeMap::from([(CHAIN_FILE.to_owned(), chain)]);
    let BootFiles { bios, efi, .. } = boot_files();
    if config.dhcp.is_some() {
        warn_of_missing(section.root.as_deref(), &[(&bios, "BIOS"), (&efi, "UEFI")]);
    }
    let root = section.root.clone();
    Ok(Some(TftpConfig {
        bind: section.listen,
        root,
        linked: BTreeSet::from([bios, efi]),
        builtin,
    }))
}

/// Says which machines will look for a boot program in vain; those that have iPXE already need none.
fn warn_of_missing(root: Option<&Path>, files: &[(&str, &str)]) {
    let Some(root) = root else {
        tracing::warn!(
            "tftp.root names no directory: only machines whose firmware is iPXE can boot from here"
        );
        return;
    };
    for (name, firmware) in files.iter().filter(|(name, _)| !root.join(name).is_file()) {
        tracing::warn!(
            "tftp.root: {} has no {name}: machines with {firmware} firmware that is not iPXE cannot boot from here (Debian: apt-get install ipxe)",
            root.display()
        );
    }
}
