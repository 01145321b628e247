//! The state machine's table: each test is one life of an interface.

use super::*;

const ADDRESS: Ipv6Addr = Ipv6Addr::new(0xfd00, 9, 0, 0, 0, 0, 0, 7);
const SERVER: &[u8] = &[0, 3, 0, 1, 9];
const OFFERED: Event = Event::Offered { managed: true, other: true };

struct Life {
    client: Client,
    now: Instant,
}

fn lease() -> Lease {
    Lease { address: ADDRESS, preferred: 300, valid: 400, renew: 150, rebind: 240 }
}

impl Life {
    fn new() -> Self {
        let now = Instant::now();
        Self { client: Client::new(42, now), now }
    }

    fn bound() -> Self {
        let mut life = Self::new();
        life.event(OFFERED);
        let actions = life.hears(Kind::Reply, |answer| answer.rapid = true);
        assert_eq!(actions, [Action::Configure(lease()), Action::Names(vec![], vec![])]);
        assert!(!life.client.listens());
        life
    }

    fn event(&mut self, event: Event) -> Vec<Action> {
        self.client.handle(event, self.now)
    }

    fn hears(&mut self, kind: Kind, change: impl FnOnce(&mut Answer)) -> Vec<Action> {
        let mut answer = Answer {
            kind,
            xid: self.client.xid,
            server: SERVER.to_vec(),
            rapid: false,
            lease: Some(lease()),
            status: 0,
            servers: vec![],
            domains: vec![],
        };
        change(&mut answer);
        self.event(Event::Heard(answer))
    }

    /// Lets the time pass until the timer; returns how long that was in seconds and what was done.
    fn wait(&mut self) -> (f64, Vec<Action>) {
        let deadline = self.client.deadline().expect("a timer");
        let waited = deadline.saturating_duration_since(self.now);
        self.now = deadline.max(self.now);
        (waited.as_secs_f64(), self.event(Event::Timer))
    }
}

fn kinds(actions: &[Action]) -> Vec<Kind> {
    let sent = |action: &Action| match action {
        Action::Send(message) => Some(message.kind),
        _ => None,
    };
    actions.iter().filter_map(sent).collect()
}

#[test]
fn nothing_is_asked_before_a_router_offers_it() {
    let mut life = Life::new();
    assert_eq!(life.event(Event::Offered { managed: false, other: false }), []);
    assert!(life.client.deadline().is_none() && !life.client.listens());
    let asked = life.event(Event::Offered { managed: false, other: true });
    assert_eq!(kinds(&asked), [Kind::InformationRequest]);
    let server = Ipv6Addr::LOCALHOST;
    let told = life.hears(Kind::Reply, |answer| answer.servers = vec![server]);
    assert_eq!(told, [Action::Names(vec![server], vec![])]);
    assert!(life.client.deadline().is_none() && !life.client.listens());
    // A router that has addresses after all.
    assert_eq!(kinds(&life.event(OFFERED)), [Kind::Solicit]);
    assert_eq!(life.event(OFFERED), [], "said once more");
}

#[test]
fn the_first_advertisement_with_an_address_is_requested() {
    let mut life = Life::new();
    life.event(OFFERED);
    let empty = life.hears(Kind::Advertise, |answer| (answer.lease, answer.status) = (None, 2));
    assert_eq!(empty, [Action::Say("DHCPv6: the server has no address for us".into())]);
    let asked = life.hears(Kind::Advertise, |_| ());
    let [Action::Send(request)] = asked.as_slice() else { panic!("{asked:?}") };
    assert_eq!((request.kind, request.address), (Kind::Request, Some(ADDRESS)));
    assert_eq!(request.server.as_deref(), Some(SERVER));
    assert_eq!(life.hears(Kind::Reply, |answer| answer.xid ^= 1), [], "not ours");
    assert_eq!(life.hears(Kind::Reply, |_| ())[0], Action::Configure(lease()));
}

#[test]
fn a_reply_to_a_solicit_counts_only_with_rapid_commit() {
    let mut life = Life::new();
    life.event(OFFERED);
    assert_eq!(life.hears(Kind::Reply, |_| ()), []);
    assert!(life.client.listens());
    Life::bound();
}

#[test]
fn solicits_come_at_one_second_to_two_minutes_and_silence_is_said() {
    let mut life = Life::new();
    life.event(OFFERED);
    let mut last = 0.5;
    for count in 1..12 {
        let (waited, actions) = life.wait();
        assert!(waited <= 132.0 && (waited > last * 1.7 || waited > 100.0), "{count}: {waited}");
        assert_eq!(kinds(&actions), [Kind::Solicit]);
        let said = matches!(&actions[0], Action::Say(what) if what.contains("no answer for"));
        assert_eq!(said, count >= PATIENCE, "{actions:?}");
        last = waited;
    }
}

#[test]
fn a_lease_is_renewed_then_rebound_then_gone() {
    let mut life = Life::bound();
    let (waited, actions) = life.wait();
    assert_eq!((waited.round(), kinds(&actions)), (150.0, vec![Kind::Renew]));
    let actions = life.hears(Kind::Reply, |_| ());
    assert_eq!(actions[0], Action::Configure(lease()));
    let began = life.now;
    let mut seen = Vec::new();
    loop {
        let (_, actions) = life.wait();
        for kind in kinds(&actions) {
            if seen.last() != Some(&kind) {
                seen.push(kind);
            }
        }
        if actions.contains(&Action::Deconfigure(ADDRESS)) {
            break;
        }
        assert!(life.now < began + Duration::from_secs(1000), "{seen:?}");
    }
    assert_eq!(seen, [Kind::Renew, Kind::Rebind, Kind::Solicit]);
    let lived = life.now.saturating_duration_since(began).as_secs();
    assert!((400..402).contains(&lived), "{lived}");
}

#[test]
fn a_lease_of_seconds_is_renewed_in_time() {
    let mut life = Life::new();
    life.event(OFFERED);
    let short = Lease { preferred: 4, valid: 6, renew: 2, rebind: 3, ..lease() };
    life.hears(Kind::Reply, |answer| (answer.rapid, answer.lease) = (true, Some(short)));
    assert_eq!(kinds(&life.wait().1), [Kind::Renew]);
    assert_eq!(kinds(&life.wait().1), [Kind::Renew]);
    let (_, actions) = life.wait();
    assert_eq!(kinds(&actions), [Kind::Rebind]);
}

#[test]
fn a_server_without_memory_is_asked_for_the_same_address() {
    let mut life = Life::bound();
    life.wait();
    let actions = life.hears(Kind::Reply, |answer| (answer.lease, answer.status) = (None, 3));
    let [Action::Send(request)] = actions.as_slice() else { panic!("{actions:?}") };
    assert_eq!((request.kind, request.address), (Kind::Request, Some(ADDRESS)));
}

#[test]
fn a_cable_that_was_out_makes_the_address_be_confirmed() {
    let mut life = Life::bound();
    assert_eq!(kinds(&life.event(Event::CarrierBack)), [Kind::Confirm]);
    life.hears(Kind::Reply, |answer| answer.lease = None);
    assert!(!life.client.listens(), "it is good");
    life.event(Event::CarrierBack);
    let actions = life.hears(Kind::Reply, |answer| (answer.lease, answer.status) = (None, 4));
    assert_eq!(actions[0], Action::Deconfigure(ADDRESS));
    assert_eq!(kinds(&actions), [Kind::Solicit]);
    let mut life = Life::bound();
    life.event(Event::CarrierBack);
    for _ in 0..4 {
        life.wait();
    }
    assert!(!life.client.listens(), "nobody objects");
}

#[test]
fn an_address_of_somebody_elses_is_declined() {
    let mut life = Life::bound();
    assert_eq!(life.event(Event::Duplicate(Ipv6Addr::LOCALHOST)), []);
    let actions = life.event(Event::Duplicate(ADDRESS));
    assert_eq!(
        (kinds(&actions), &actions[1]),
        (vec![Kind::Decline], &Action::Deconfigure(ADDRESS))
    );
    assert_eq!(kinds(&life.hears(Kind::Reply, |answer| answer.lease = None)), [Kind::Solicit]);
}

#[test]
fn a_server_that_refuses_is_not_flooded() {
    let mut life = Life::new();
    life.event(OFFERED);
    life.hears(Kind::Advertise, |_| ());
    for _ in 0..3 {
        let actions = life.hears(Kind::Reply, |answer| (answer.lease, answer.status) = (None, 2));
        assert_eq!(kinds(&actions), []);
        assert_eq!(kinds(&life.wait().1), [Kind::Solicit]);
        life.hears(Kind::Advertise, |_| ());
    }
}

proptest::proptest! {
    /// Whatever happens in whatever order: at most one message an event, an address is set only by a server's word, and
    /// whoever listens has a timer.
    #[test]
    fn every_life_keeps_the_rules(events in proptest::collection::vec((0_u8..8, 0_u16..5), 0..60)) {
        let mut life = Life::new();
        let mut has = false;
        for (event, status) in events {
            let actions = match event {
                0 => life.event(OFFERED),
                1 => life.event(Event::CarrierBack),
                2 => life.event(Event::Duplicate(ADDRESS)),
                3 => life.hears(Kind::Advertise, |answer| answer.status = status),
                4 => life.hears(Kind::Reply, |answer| (answer.status, answer.rapid) = (status, true)),
                5 => life.hears(Kind::Reply, |answer| (answer.status, answer.lease) = (status, None)),
                6 => life.event(Event::Offered { managed: false, other: true }),
                _ if life.client.deadline().is_some() => life.wait().1,
                _ => vec![],
            };
            proptest::prop_assert!(kinds(&actions).len() <= 1, "{:?}", actions);
            for action in &actions {
                match action {
                    Action::Configure(_) => has = true,
                    Action::Deconfigure(_) => {
                        proptest::prop_assert!(has);
                        has = false;
                    }
                    _ => {}
                }
            }
            proptest::prop_assert!(!life.client.listens() || life.client.deadline().is_some());
        }
    }
}
