//! `/etc/resolv.conf`, `/etc/hosts` and `/etc/hostname`: rendered purely, written in place.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::net::Ipv4Addr;
use std::path::Path;

use super::message::Grant;

/// Most name servers that the resolver reads (`resolv.conf(5)`, MAXNS).
const MAX_NAME_SERVERS: usize = 3;

/// The resolver's configuration from all grants, the most important first.
pub(super) fn resolv_conf<'a>(grants: impl Iterator<Item = &'a Grant> + Clone) -> String {
    let mut text = String::from("# Written by layercake-agent.\n");
    let mut domains: Vec<&str> = Vec::new();
    let mut servers: Vec<Ipv4Addr> = Vec::new();
    for grant in grants {
        if let Some(domain) = &grant.domain
            && !domains.contains(&domain.as_str())
        {
            domains.push(domain);
        }
        for server in &grant.dns {
            if !servers.contains(server) {
                servers.push(*server);
            }
        }
    }
    if !domains.is_empty() {
        let _infallible = writeln!(text, "search {}", domains.join(" "));
    }
    for server in servers.iter().take(MAX_NAME_SERVERS) {
        let _infallible = writeln!(text, "nameserver {server}");
    }
    text
}

/// The table of hosts: this machine alone.
pub(super) fn hosts(hostname: &str, address: Option<Ipv4Addr>) -> String {
    let mut text = String::from("127.0.0.1 localhost\n::1 localhost ip6-localhost\n");
    let short = hostname.split('.').next().unwrap_or(hostname);
    let alias = if short == hostname { String::new() } else { format!(" {short}") };
    // Without an address the name must still resolve, or programs hang at start.
    let address = address.unwrap_or(Ipv4Addr::new(127, 0, 1, 1));
    let _infallible = writeln!(text, "{address} {hostname}{alias}");
    text
}

/// Writes a file in place: containers have it bound by its inode, and a renamed one would never reach them. New bytes go
/// in with one write before what is left of the old ones is cut off, so that a reader at no time finds the file empty.
pub(super) fn write(directory: &Path, name: &str, text: &str) -> io::Result<()> {
    std::fs::create_dir_all(directory)?;
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(directory.join(name))?;
    file.write_all(text.as_bytes())?;
    file.set_len(u64::try_from(text.len()).map_err(io::Error::other)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_servers_of_all_links_are_merged_in_order() {
        let grant = |dns: &[u8], domain: &str| Grant {
            address: Ipv4Addr::new(10, 0, 0, 9),
            prefix_len: 24,
            router: None,
            dns: dns.iter().map(|n| Ipv4Addr::new(10, 0, 0, *n)).collect(),
            domain: Some(domain.to_owned()),
            hostname: None,
            mtu: None,
        };
        let grants = [grant(&[1, 2], "a"), grant(&[2, 3, 4], "b")];
        let text = resolv_conf(grants.iter());
        let expected =
            "search a b\nnameserver 10.0.0.1\nnameserver 10.0.0.2\nnameserver 10.0.0.3\n";
        assert!(text.ends_with(expected), "{text}");
    }

    #[test]
    fn whoever_has_a_file_open_sees_what_is_written_later() {
        let dir = tempfile::tempdir().expect("directory");
        write(dir.path(), "hosts", "a longer text").expect("write");
        let bound = std::fs::File::open(dir.path().join("hosts")).expect("open");
        write(dir.path(), "hosts", "short").expect("write again");
        assert_eq!(io::read_to_string(bound).expect("read"), "short");
    }

    #[test]
    fn the_host_resolves_itself_with_and_without_an_address() {
        assert!(hosts("n1.lab", Some(Ipv4Addr::new(10, 0, 0, 9))).contains("10.0.0.9 n1.lab n1\n"));
        assert!(hosts("n1", None).ends_with("127.0.1.1 n1\n"));
    }
}
