//! The table of leases, in memory: who has which address until when. Pure: the clock is an argument.
//!
//! An address stays with its client after the lease has ended, until the pool runs short; then the one that ended
//! first is given away. A server that has lost its memory adopts what clients say they have, unless another has it.

use std::collections::{BTreeMap, HashMap};
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use protocol::ids::Mac;

/// How long an offer is held for the client that it was made to.
pub const OFFER_TIME: Duration = Duration::from_secs(30);
/// How long an address that a client found in use is not given out.
pub const DECLINE_TIME: Duration = Duration::from_secs(600);

/// Who a lease belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ClientKey {
    /// An Ethernet address: everything that boots, and clients with no or a MAC-based client identifier.
    Mac(Mac),
    /// Another client identifier (option 61).
    Id(Vec<u8>),
}

/// How far a lease has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseState {
    /// Offered and not yet asked for.
    Offered,
    /// Acknowledged.
    Bound,
    /// Found in use by somebody else.
    Declined,
}

/// One address that is or was given out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// Whose it is.
    pub client: ClientKey,
    /// The interface that asked.
    pub mac: Mac,
    /// How far it has come.
    pub state: LeaseState,
    /// When it ends; kept for the same client after that.
    pub expires: Instant,
}

/// Why there is no address for a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "no free address in {first} to {last}: all {total} are leased, reserved or declined; widen the range"
)]
pub struct PoolExhausted {
    /// First address of the range.
    pub first: Ipv4Addr,
    /// Last address of the range.
    pub last: Ipv4Addr,
    /// How many addresses it has.
    pub total: u32,
}

/// All leases.
#[derive(Debug, Default)]
pub struct Leases {
    by_address: BTreeMap<Ipv4Addr, Lease>,
    by_client: HashMap<ClientKey, Ipv4Addr>,
    cursor: u32,
}

impl Leases {
    /// Every lease by address, also those that have ended: for export.
    pub fn iter(&self) -> impl Iterator<Item = (Ipv4Addr, &Lease)> {
        self.by_address.iter().map(|(address, lease)| (*address, lease))
    }

    /// The address that this client has or had last.
    #[must_use]
    pub fn address_of(&self, client: &ClientKey) -> Option<Ipv4Addr> {
        self.by_client.get(client).copied()
    }

    /// Whether this client may have this address now: nobody else holds it.
    #[must_use]
    pub fn is_free_for(&self, address: Ipv4Addr, client: &ClientKey, now: Instant) -> bool {
        self.by_address.get(&address).is_none_or(|lease| {
            lease.expires <= now || (lease.client == *client && lease.state != LeaseState::Declined)
        })
    }

    /// Chooses an address from the range for a client: its last one, the one it wishes, the next never used, the one
    /// that ended first. `reserved` tells which addresses belong to others by configuration.
    ///
    /// # Errors
    /// When every address is held.
    pub fn choose(
        &self,
        client: &ClientKey,
        wish: Option<Ipv4Addr>,
        range: (Ipv4Addr, Ipv4Addr),
        reserved: impl Fn(Ipv4Addr) -> bool,
        now: Instant,
    ) -> Result<Ipv4Addr, PoolExhausted> {
        let (first, last) = (u32::from(range.0), u32::from(range.1));
        let usable = |address: Ipv4Addr| {
            (first..=last).contains(&u32::from(address))
                && !reserved(address)
                && self.is_free_for(address, client, now)
        };
        if let Some(address) =
            [self.address_of(client), wish].into_iter().flatten().find(|a| usable(*a))
        {
            return Ok(address);
        }
        let start = if (first..=last).contains(&self.cursor) { self.cursor } else { first };
        if let Some(address) = (start..=last)
            .chain(first..start)
            .map(Ipv4Addr::from)
            .find(|address| !self.by_address.contains_key(address) && !reserved(*address))
        {
            return Ok(address);
        }
        self.by_address
            .iter()
            .filter(|(address, _)| usable(**address))
            .min_by_key(|(_, lease)| lease.expires)
            .map(|(address, _)| *address)
            .ok_or(PoolExhausted {
                first: range.0,
                last: range.1,
                total: last.saturating_sub(first).saturating_add(1),
            })
    }

    /// Notes that this client has been offered or given this address. An offer never shortens a running lease.
    pub fn hold(
        &mut self,
        address: Ipv4Addr,
        client: ClientKey,
        mac: Mac,
        state: LeaseState,
        expires: Instant,
    ) {
        if let Some(lease) = self.by_address.get(&address)
            && lease.client == client
            && lease.state == LeaseState::Bound
            && state == LeaseState::Offered
            && lease.expires > expires
        {
            return;
        }
        if let Some(old) = self.by_client.insert(client.clone(), address)
            && old != address
            && self.by_address.get(&old).is_some_and(|lease| lease.client == client)
        {
            self.by_address.remove(&old);
        }
        if let Some(old) =
            self.by_address.insert(address, Lease { client: client.clone(), mac, state, expires })
            && old.client != client
        {
            self.by_client.remove(&old.client);
        }
        self.cursor = u32::from(address).saturating_add(1);
    }

    /// Ends a lease early, if it is this client's; the address is kept for it as long as possible.
    pub fn release(&mut self, address: Ipv4Addr, client: &ClientKey, now: Instant) -> bool {
        match self.by_address.get_mut(&address) {
            Some(lease) if lease.client == *client => {
                lease.expires = lease.expires.min(now);
                true
            }
            _ => false,
        }
    }

    /// Takes back an offer that the client has not taken.
    pub fn withdraw_offer(&mut self, client: &ClientKey, now: Instant) {
        if let Some(address) = self.address_of(client)
            && let Some(lease) = self.by_address.get_mut(&address)
            && lease.state == LeaseState::Offered
        {
            lease.expires = lease.expires.min(now);
        }
    }

    /// Notes that somebody else uses the address that this client was given.
    pub fn decline(&mut self, address: Ipv4Addr, client: &ClientKey, now: Instant) -> bool {
        match self.by_address.get_mut(&address) {
            Some(lease) if lease.client == *client => {
                lease.state = LeaseState::Declined;
                lease.expires = now + DECLINE_TIME;
                self.by_client.remove(client);
                true
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANGE: (Ipv4Addr, Ipv4Addr) = (Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 4));

    fn key(n: u8) -> ClientKey {
        ClientKey::Mac(Mac([2, 0, 0, 0, 0, n]))
    }

    fn give(leases: &mut Leases, n: u8, now: Instant) -> Result<Ipv4Addr, PoolExhausted> {
        let address = leases.choose(&key(n), None, RANGE, |a| a == RANGE.1, now)?;
        let mac = Mac([2, 0, 0, 0, 0, n]);
        leases.hold(address, key(n), mac, LeaseState::Bound, now + Duration::from_secs(60));
        Ok(address)
    }

    #[test]
    fn addresses_stick_and_the_longest_ended_one_is_given_away_first() {
        let mut leases = Leases::default();
        let t0 = Instant::now();
        let first = give(&mut leases, 1, t0).expect("first");
        let second = give(&mut leases, 2, t0 + Duration::from_secs(1)).expect("second");
        give(&mut leases, 3, t0 + Duration::from_secs(2)).expect("third");
        let error = give(&mut leases, 4, t0 + Duration::from_secs(3)).expect_err("full");
        assert!(error.to_string().contains("10.0.0.1 to 10.0.0.4"), "{error}");

        let later = t0 + Duration::from_secs(3600);
        assert_eq!(give(&mut leases, 2, later), Ok(second), "its own again");
        assert_eq!(give(&mut leases, 9, later), Ok(first), "ended first");
        assert_eq!(leases.address_of(&key(1)), None);
    }

    #[test]
    fn a_declined_address_rests() {
        let mut leases = Leases::default();
        let t0 = Instant::now();
        let first = give(&mut leases, 1, t0).expect("first");
        assert!(!leases.decline(first, &key(2), t0), "not theirs");
        assert!(leases.decline(first, &key(1), t0));
        assert_ne!(give(&mut leases, 1, t0), Ok(first));
        assert!(leases.is_free_for(first, &key(1), t0 + DECLINE_TIME));
    }

    #[test]
    fn an_offer_does_not_shorten_a_lease() {
        let mut leases = Leases::default();
        let t0 = Instant::now();
        let first = give(&mut leases, 1, t0).expect("first");
        leases.hold(first, key(1), Mac([2, 0, 0, 0, 0, 1]), LeaseState::Offered, t0 + OFFER_TIME);
        assert!(!leases.is_free_for(first, &key(2), t0 + Duration::from_secs(59)));
    }
}
