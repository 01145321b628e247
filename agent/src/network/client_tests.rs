//! The state machine's table: each test is one life of an interface.

use super::*;

const SERVER: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
const OTHER: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 100);

struct Life {
    client: Client,
    now: Instant,
}

fn grant(address: Ipv4Addr) -> Grant {
    Grant {
        address,
        prefix_len: 24,
        router: None,
        dns: vec![],
        ntp: vec![],
        domain: None,
        hostname: None,
        mtu: None,
    }
}

fn ack(server: Ipv4Addr, address: Ipv4Addr) -> Answer {
    let seconds = Duration::from_secs;
    let times = Times { renew: seconds(300), rebind: seconds(525), lease: seconds(600) };
    Answer::Ack { server, grant: grant(address), times }
}

impl Life {
    fn new() -> Self {
        let now = Instant::now();
        Self { client: Client::new(None, 42, now), now }
    }

    fn bound() -> Self {
        let mut life = Self::new();
        life.event(Event::CarrierUp);
        life.hears(Answer::Offer { server: SERVER, address: ADDRESS });
        let actions = life.hears(ack(SERVER, ADDRESS));
        assert_eq!(actions, [Action::Configure(grant(ADDRESS))]);
        assert!(!life.client.listens_to_broadcasts());
        life
    }

    fn event(&mut self, event: Event) -> Vec<Action> {
        self.client.handle(event, self.now)
    }

    fn hears(&mut self, answer: Answer) -> Vec<Action> {
        self.event(Event::Heard(self.client.xid, answer))
    }

    /// Lets the time pass until the timer; returns how long that was and what was done.
    fn wait(&mut self) -> (Duration, Vec<Action>) {
        let deadline = self.client.deadline().expect("a timer");
        let waited = deadline.saturating_duration_since(self.now);
        self.now = deadline.max(self.now);
        (waited, self.event(Event::Timer))
    }
}

fn sent(actions: &[Action]) -> Vec<&Outgoing> {
    actions
        .iter()
        .filter_map(|action| match action {
            Action::Broadcast(message) | Action::Unicast(_, message) => Some(message),
            _ => None,
        })
        .collect()
}

#[test]
fn discovers_come_at_one_to_sixty_four_seconds_and_silence_is_said() {
    let mut life = Life::new();
    let first = life.event(Event::CarrierUp);
    assert_eq!(sent(&first)[0].kind, MessageType::Discover);
    for (index, expected) in [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 64.0, 64.0].iter().enumerate() {
        let (waited, actions) = life.wait();
        assert!((waited.as_secs_f64() - expected).abs() <= 1.0, "{index}: {waited:?}");
        assert_eq!(sent(&actions).len(), 1);
        let said = actions.iter().any(|action| matches!(action, Action::Say(_)));
        assert_eq!(said, index >= 2, "{actions:?}");
    }
    let (_, actions) = life.wait();
    assert_eq!(actions[0], Action::Say("waiting for DHCP, no answer for 318 s".to_owned()));
}

#[test]
fn the_request_names_offer_and_server_and_only_that_server_can_grant() {
    let mut life = Life::new();
    life.event(Event::CarrierUp);
    let actions = life.hears(Answer::Offer { server: SERVER, address: ADDRESS });
    let request = sent(&actions)[0];
    assert_eq!((request.requested, request.server), (Some(ADDRESS), Some(SERVER)));
    assert_eq!(request.ciaddr, Ipv4Addr::UNSPECIFIED);
    assert_eq!(life.hears(Answer::Offer { server: OTHER, address: ADDRESS }), []);
    assert_eq!(life.hears(ack(OTHER, ADDRESS)), []);
    assert_eq!(life.hears(ack(SERVER, OTHER)), []);
    let xid = life.client.xid;
    assert_eq!(life.event(Event::Heard(xid ^ 1, ack(SERVER, ADDRESS))), [], "another transaction");
    assert_eq!(life.hears(ack(SERVER, ADDRESS)), [Action::Configure(grant(ADDRESS))]);
}

#[test]
fn a_server_that_goes_silent_after_its_offer_is_left() {
    let mut life = Life::new();
    life.event(Event::CarrierUp);
    life.hears(Answer::Offer { server: SERVER, address: ADDRESS });
    for _ in 1..MAX_REQUESTS {
        assert_eq!(sent(&life.wait().1)[0].kind, MessageType::Request);
    }
    let (_, actions) = life.wait();
    assert!(matches!(&actions[0], Action::Say(text) if text.contains("10.9.0.1")), "{actions:?}");
    assert_eq!(sent(&actions)[0].kind, MessageType::Discover);
}

#[test]
fn a_lease_is_renewed_by_unicast_for_as_long_as_it_goes() {
    let mut life = Life::bound();
    for _ in 0..50 {
        let (waited, actions) = life.wait();
        assert_eq!(waited, Duration::from_secs(300));
        let [Action::Unicast(SERVER, message)] = actions.as_slice() else { panic!("{actions:?}") };
        assert_eq!((message.ciaddr, message.requested, message.server), (ADDRESS, None, None));
        assert_eq!(life.hears(ack(SERVER, ADDRESS)), [Action::Configure(grant(ADDRESS))]);
    }
}

#[test]
fn without_its_server_a_lease_is_rebound_and_then_given_up() {
    let mut life = Life::bound();
    let begin = life.now;
    let mut seen = Vec::new();
    loop {
        let (_, actions) = life.wait();
        let after = life.now.duration_since(begin).as_secs();
        if actions.contains(&Action::Deconfigure(grant(ADDRESS))) {
            assert_eq!(after, 600);
            assert_eq!(sent(&actions)[0].kind, MessageType::Discover);
            assert_eq!(sent(&actions)[0].requested, Some(ADDRESS), "asks for it again");
            break;
        }
        for action in &actions {
            match action {
                Action::Unicast(..) => assert!((300..525).contains(&after), "{after}"),
                Action::Broadcast(message) => {
                    assert!((525..600).contains(&after), "{after}");
                    assert_eq!(message.ciaddr, ADDRESS);
                }
                _ => {}
            }
        }
        seen.extend(actions);
    }
    assert!((6..40).contains(&sent(&seen).len()), "{}", sent(&seen).len());
}

#[test]
fn any_server_may_answer_a_rebinding() {
    let mut life = Life::bound();
    while life.now.duration_since(life.client.began) < Duration::from_secs(1)
        || !matches!(life.client.state, State::Rebinding(_))
    {
        life.wait();
    }
    assert_eq!(life.hears(ack(OTHER, ADDRESS)), [Action::Configure(grant(ADDRESS))]);
    let (_, actions) = life.wait();
    assert!(matches!(&actions[0], Action::Unicast(OTHER, _)));
}

#[test]
fn a_refusal_takes_the_address_and_starts_over_and_a_second_one_slows_down() {
    let mut life = Life::bound();
    life.wait();
    let nak = |server| Answer::Nak { server: Some(server), reason: "moved".to_owned() };
    assert_eq!(life.hears(nak(OTHER)), [], "not its server");
    let actions = life.hears(nak(SERVER));
    assert_eq!(actions[0], Action::Deconfigure(grant(ADDRESS)));
    assert_eq!(sent(&actions)[0].kind, MessageType::Discover);
    assert_eq!(sent(&actions)[0].requested, None);
    life.hears(Answer::Offer { server: SERVER, address: ADDRESS });
    let actions = life.hears(nak(SERVER));
    assert_eq!(sent(&actions).len(), 0);
    let (waited, actions) = life.wait();
    assert_eq!(waited, Duration::from_secs(2));
    assert_eq!(sent(&actions)[0].kind, MessageType::Discover);
}

#[test]
fn a_lost_carrier_keeps_the_lease_and_its_return_verifies_it() {
    let mut life = Life::bound();
    assert_eq!(life.event(Event::CarrierLost), []);
    life.now += Duration::from_secs(60);
    let actions = life.event(Event::CarrierUp);
    let request = sent(&actions)[0];
    assert_eq!((request.requested, request.server), (Some(ADDRESS), None), "as after a reboot");
    for _ in 1..MAX_REQUESTS {
        assert_eq!(sent(&life.wait().1).len(), 1);
    }
    assert_eq!(life.wait().1, [], "nobody answers: it is kept");
    assert!(matches!(life.wait().1[0], Action::Unicast(..)), "until T1");
    life.event(Event::CarrierLost);
    life.event(Event::CarrierUp);
    let nak = Answer::Nak { server: Some(OTHER), reason: String::new() };
    assert_eq!(life.hears(nak)[0], Action::Deconfigure(grant(ADDRESS)), "another network");
}

#[test]
fn a_carrier_lost_while_selecting_stops_all_until_it_is_back() {
    let mut life = Life::new();
    life.event(Event::CarrierUp);
    life.event(Event::CarrierLost);
    assert_eq!(life.client.deadline(), None);
    assert_eq!(sent(&life.event(Event::CarrierUp)).len(), 1);
}

proptest::proptest! {
    #[test]
    fn no_course_of_events_leaves_the_client_without_a_timer_or_in_a_flood(
        events in proptest::collection::vec(0_u8..7, 1..200),
    ) {
        let mut life = Life::new();
        life.event(Event::CarrierUp);
        for event in events {
            let actions = match event {
                0 => life.hears(Answer::Offer { server: SERVER, address: ADDRESS }),
                1 => life.hears(ack(SERVER, ADDRESS)),
                2 => life.hears(Answer::Nak { server: None, reason: String::new() }),
                3 => life.event(Event::CarrierLost),
                4 => life.event(Event::CarrierUp),
                _ if life.client.deadline().is_some() => life.wait().1,
                _ => Vec::new(),
            };
            assert!(sent(&actions).len() <= 1);
            assert_eq!(life.client.deadline().is_none(), life.client.state == State::Stopped);
            if let Some(deadline) = life.client.deadline() && event > 4 {
                assert!(deadline > life.now || matches!(life.client.state, State::Bound(_)));
            }
        }
    }
}
