//! What is known of an interface's IPv6: the addresses that the kernel has made, who resolves names and for how long. Pure.

use std::net::Ipv6Addr;
use std::time::{Duration, Instant};

use super::advertisement::Advertisement;

/// Most addresses that are told of one interface.
const MAX_ADDRESSES: usize = 16;
/// Most name servers and domains that are kept of one interface's routers.
const MAX_NAMES: usize = 8;

/// One interface's IPv6.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Six {
    /// Addresses that can be used, in the order in which they came.
    pub(super) addresses: Vec<Ipv6Addr>,
    /// Name servers and domains that DHCPv6 gave.
    pub(super) given: (Vec<Ipv6Addr>, Vec<String>),
    servers: Vec<(Ipv6Addr, Option<Instant>)>,
    domains: Vec<(String, Option<Instant>)>,
}

impl Six {
    /// Notes that an address can be used or not; whether that is new.
    pub(super) fn address(&mut self, address: Ipv6Addr, is_good: bool) -> bool {
        let had = self.addresses.contains(&address);
        if is_good && !had && self.addresses.len() < MAX_ADDRESSES {
            self.addresses.push(address);
            return true;
        }
        if !is_good {
            self.addresses.retain(|other| *other != address);
        }
        had && !is_good
    }

    /// Notes what a router says of names; whether something changed.
    pub(super) fn advertised(&mut self, said: Advertisement, now: Instant) -> bool {
        let servers = note(&mut self.servers, said.servers, now);
        note(&mut self.domains, said.domains, now) || servers
    }

    /// Forgets what has ended; whether something had.
    pub(super) fn expire(&mut self, now: Instant) -> bool {
        let before = (self.servers.len(), self.domains.len());
        self.servers.retain(|(_, ends)| ends.is_none_or(|ends| ends > now));
        self.domains.retain(|(_, ends)| ends.is_none_or(|ends| ends > now));
        before != (self.servers.len(), self.domains.len())
    }

    /// When something ends next.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let servers = self.servers.iter().filter_map(|(_, ends)| *ends);
        servers.chain(self.domains.iter().filter_map(|(_, ends)| *ends)).min()
    }

    /// Name servers, DHCPv6's first (RFC 8106 section 5.3.1); the interface's name goes with those of the link alone.
    pub(super) fn servers<'a>(&'a self, link: &'a str) -> impl Iterator<Item = String> + 'a {
        let routers = self.servers.iter().map(|(server, _)| *server);
        self.given.0.iter().copied().chain(routers).map(move |server| {
            match server.is_unicast_link_local() {
                true => format!("{server}%{link}"),
                false => server.to_string(),
            }
        })
    }

    /// Search domains, DHCPv6's first.
    pub(super) fn domains(&self) -> impl Iterator<Item = &String> {
        self.given.1.iter().chain(self.domains.iter().map(|(domain, _)| domain))
    }
}

/// Notes things with their lifetimes in seconds: 0 takes them away, `u32::MAX` is for ever (RFC 8106 section 5.1).
fn note<T: PartialEq>(
    known: &mut Vec<(T, Option<Instant>)>,
    said: Vec<(T, u32)>,
    now: Instant,
) -> bool {
    let mut changed = false;
    for (item, seconds) in said {
        let ends = (seconds != u32::MAX).then(|| now + Duration::from_secs(seconds.into()));
        let at = known.iter().position(|(other, _)| *other == item);
        match at {
            Some(at) if seconds == 0 => {
                known.remove(at);
                changed = true;
            }
            Some(at) => {
                if let Some(entry) = known.get_mut(at) {
                    entry.1 = ends;
                }
            }
            None if seconds > 0 && known.len() < MAX_NAMES => {
                known.push((item, ends));
                changed = true;
            }
            None => {}
        }
    }
    changed
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVER: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

    fn says(seconds: u32) -> Advertisement {
        Advertisement {
            servers: vec![(SERVER, seconds)],
            domains: vec![("lab".to_owned(), u32::MAX)],
            ..Advertisement::default()
        }
    }

    #[test]
    fn what_routers_say_lasts_as_long_as_they_say() {
        let now = Instant::now();
        let mut six = Six::default();
        assert!(six.advertised(says(60), now));
        assert!(!six.advertised(says(90), now), "nothing new, but for longer");
        assert_eq!(six.deadline(), Some(now + Duration::from_secs(90)));
        assert_eq!(six.servers("eth0").collect::<Vec<_>>(), ["fe80::1%eth0"]);
        assert!(!six.expire(now + Duration::from_secs(89)));
        assert!(six.expire(now + Duration::from_secs(90)));
        assert_eq!((six.deadline(), six.domains().count()), (None, 1));
        assert!(six.advertised(says(60), now) && six.advertised(says(0), now));
        assert_eq!(six.servers("eth0").count(), 0);
    }

    #[test]
    fn an_address_is_told_once() {
        let mut six = Six::default();
        assert!(!six.address(SERVER, false));
        assert!(six.address(SERVER, true) && !six.address(SERVER, true));
        assert!(six.address(SERVER, false));
        assert!(six.addresses.is_empty());
    }
}
