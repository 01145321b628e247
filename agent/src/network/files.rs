//! `/etc/resolv.conf`, `/etc/hosts` and `/etc/hostname`: rendered purely, written in place. And the few files of `/proc` that
//! tell the kernel how it is to do IPv6.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::path::Path;

use protocol::network::Addressing;

/// Most name servers that the resolver reads (`resolv.conf(5)`, MAXNS).
const MAX_NAME_SERVERS: usize = 3;

/// Most search domains that the resolver reads in all versions (`resolv.conf(5)`).
const MAX_DOMAINS: usize = 6;
/// Where IPv6's settings of interfaces lie (`Documentation/networking/ip-sysctl.rst`).
const IPV6: &str = "/proc/sys/net/ipv6/conf";

/// The resolver's configuration: name servers and search domains, the most important first. A server that is silent costs
/// a second, not the five of the default.
pub(super) fn resolv_conf(servers: &[String], domains: &[&String]) -> String {
    let mut text = String::from("# Written by layercake-agent.\n");
    let domains = unique(domains.iter().map(|domain| domain.as_str()), MAX_DOMAINS);
    if !domains.is_empty() {
        let _infallible = writeln!(text, "search {}", domains.join(" "));
    }
    let servers = unique(servers.iter().map(String::as_str), MAX_NAME_SERVERS);
    for server in &servers {
        let _infallible = writeln!(text, "nameserver {server}");
    }
    if !servers.is_empty() {
        text.push_str("options timeout:1 attempts:3\n");
    }
    text
}

/// Each once, in order.
fn unique<'a>(items: impl Iterator<Item = &'a str>, most: usize) -> Vec<&'a str> {
    let mut found = Vec::new();
    for item in items {
        if !found.contains(&item) && found.len() < most {
            found.push(item);
        }
    }
    found
}

/// Lets the kernel make IPv6 addresses as it is wished, before the interface is up.
pub(super) fn set_ipv6(interface: &str, ip: &Addressing) {
    // 2: also where containers make the node forward packets.
    let listens = if ip.slaac || ip.dhcp6 { "2" } else { "0" };
    let makes = if ip.slaac { "1" } else { "0" };
    for (key, value) in
        [("accept_ra", listens), ("autoconf", makes), ("router_solicitation_delay", "0")]
    {
        sysctl(interface, key, value);
    }
}

/// Keeps IPv6 off an interface: the parts of a bond have no addresses of their own.
pub(super) fn no_ipv6(interface: &str) {
    sysctl(interface, "disable_ipv6", "1");
}

/// A kernel without IPv6 has no such files.
fn sysctl(interface: &str, key: &str, value: &str) {
    let path = Path::new(IPV6).join(interface).join(key);
    if let Err(error) = std::fs::write(&path, value) {
        log::debug!("network: cannot write {}: {error}", path.display());
    }
}

/// The table of hosts: this machine alone.
pub(super) fn hosts(hostname: &str, address: Option<IpAddr>) -> String {
    let mut text = String::from("127.0.0.1 localhost\n::1 localhost ip6-localhost\n");
    let short = hostname.split('.').next().unwrap_or(hostname);
    let alias = if short == hostname { String::new() } else { format!(" {short}") };
    // Without an address the name must still resolve, or programs hang at start.
    let address = address.unwrap_or(IpAddr::from([127, 0, 1, 1]));
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
    fn name_servers_of_all_links_are_each_there_once_and_in_order() {
        let servers = ["10.0.0.1", "fe80::1%eth0", "10.0.0.1", "10.0.0.3", "10.0.0.4"];
        let (a, b) = ("a".to_owned(), "b".to_owned());
        let text = resolv_conf(&servers.map(str::to_owned), &[&a, &b, &a]);
        let expected = "search a b\nnameserver 10.0.0.1\nnameserver fe80::1%eth0\nnameserver 10.0.0.3\n\
                        options timeout:1 attempts:3\n";
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
        assert!(
            hosts("n1.lab", Some(IpAddr::from([10, 0, 0, 9]))).contains("10.0.0.9 n1.lab n1\n")
        );
        assert!(hosts("n1", None).ends_with("127.0.1.1 n1\n"));
    }
}
