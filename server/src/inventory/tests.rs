//! The inventory over a storage that remembers in RAM, and can be told to fail.

use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, ready};
use protocol::ids::Digest;
use protocol::node::Phase;

use super::*;
use crate::storage::{Loaded, NodeRow};

const MAC: Mac = Mac([0x52, 0x54, 0, 0, 0, 1]);

/// Remembers what it was told; fails while `broken`.
#[derive(Debug, Default)]
struct Fake {
    loaded: Loaded,
    broken: AtomicBool,
    seen: Mutex<Vec<NodeRow>>,
    removed: Mutex<Vec<NodeId>>,
    rolls: Mutex<u64>,
}

impl Fake {
    fn result<T: Send + 'static>(&self, value: T) -> BoxFuture<'_, Result<T, StorageError>> {
        let broken = self.broken.load(Ordering::Relaxed);
        ready(if broken { Err(StorageError::Full) } else { Ok(value) }).boxed()
    }
}

impl Storage for Arc<Fake> {
    fn load(&self) -> BoxFuture<'_, Result<Loaded, StorageError>> {
        self.result(self.loaded.clone())
    }

    fn save_seen<'a>(
        &'a self,
        nodes: &'a [NodeRow],
        _rolls: &'a [RollRecord],
    ) -> BoxFuture<'a, Result<(), StorageError>> {
        if !self.broken.load(Ordering::Relaxed) {
            self.seen.lock().expect("lock").extend_from_slice(nodes);
        }
        self.result(())
    }

    fn save_desired<'a>(
        &'a self,
        _nodes: &'a [NodeRow],
    ) -> BoxFuture<'a, Result<(), StorageError>> {
        self.result(())
    }

    fn create_roll<'a>(
        &'a self,
        _roll: &'a NewRoll,
        _nodes: &'a [NodeRow],
        _superseded: &'a [RollRecord],
    ) -> BoxFuture<'a, Result<u64, StorageError>> {
        let mut rolls = self.rolls.lock().expect("lock");
        *rolls += 1;
        self.result(*rolls)
    }

    fn remove_node<'a>(&'a self, id: &'a NodeId) -> BoxFuture<'a, Result<(), StorageError>> {
        self.removed.lock().expect("lock").push(id.clone());
        self.result(())
    }
}

async fn open(fake: &Arc<Fake>, nodes: &[NodeSection], auto_register: bool) -> Arc<Inventory> {
    let storage = Box::new(Arc::clone(fake));
    Inventory::open(storage, nodes, auto_register, 1).await.expect("open")
}

fn id(text: &str) -> NodeId {
    text.parse().expect("id")
}

fn set(version: &str) -> DesiredSet {
    let digest = Digest::of(version.as_bytes());
    DesiredSet {
        name: "hello".parse().expect("name"),
        version: version.parse().expect("version"),
        reference: format!("http://r:1/hello:{version}@{digest}").parse().expect("reference"),
        roll: 0,
        force: false,
    }
}

/// As it is wanted after the roll that made this version of the desired document.
fn rolled(version: &str, roll: u64) -> DesiredSet {
    DesiredSet { roll, ..set(version) }
}

fn section(name: &str, mac: Mac) -> NodeSection {
    NodeSection { id: id(name), mac, address: None, imagesets: Vec::new(), overlays: Vec::new() }
}

fn report(node: &str) -> Observed {
    let golden = include_str!("../../../protocol/golden/v1/observed.json");
    let observed: Observed = serde_json::from_str(golden).expect("golden");
    Observed { node: id(node), ..observed }
}

#[tokio::test]
async fn an_unknown_machine_registers_itself_and_keeps_its_dhcp_time() {
    let inventory = open(&Arc::default(), &[], true).await;
    inventory.dhcp_discover(MAC, None, 5);
    assert_eq!(inventory.list().len(), 0);
    let node = inventory.script_fetched(MAC, Some("uuid"), 7).expect("registered");
    assert_eq!(node, NodeId::from_mac(MAC));
    inventory.initramfs_sent(MAC, 9);
    inventory.dhcp_leased(MAC, Ipv4Addr::new(10, 9, 0, 100), 9);
    let record = inventory.get(&node).expect("node");
    let times: Vec<(Phase, u64)> = record.boot.iter().map(|t| (t.phase, t.at_ms)).collect();
    assert_eq!(times, [(Phase::Dhcp, 5), (Phase::Ipxe, 7), (Phase::Kernel, 9)]);
    assert_eq!(record.uuid.as_deref(), Some("uuid"));
    assert_eq!(record.address, Some(IpAddr::from([10, 9, 0, 100])));
}

#[tokio::test]
async fn an_unknown_machine_is_refused_where_nobody_may_register() {
    let inventory = open(&Arc::default(), &[section("n1", MAC)], false).await;
    assert_eq!(inventory.script_fetched(MAC, None, 1).expect("configured"), id("n1"));
    let stranger = Mac([2, 0, 0, 0, 0, 9]);
    let error = inventory.script_fetched(stranger, None, 1).expect_err("stranger").to_string();
    assert!(error.starts_with("02:00:00:00:00:09 is not in the inventory"), "{error}");
    assert!(inventory.subscribe(&id("n2"), 1).is_err());
    assert!(inventory.observed(&id("n2"), report("n2"), 1).is_err());
}

#[tokio::test]
async fn the_config_renames_a_node_that_had_registered_itself() {
    let auto = NodeId::from_mac(MAC);
    let first = open(&Arc::default(), &[], true).await;
    first.script_fetched(MAC, None, 1).expect("registered");
    let (nodes, _) = first.state().take_dirty();
    let loaded = Loaded { nodes, rolls: Vec::new() };
    let fake = Arc::new(Fake { loaded, ..Fake::default() });
    let second = open(&fake, &[section("n1", MAC)], true).await;
    assert_eq!(second.list().iter().map(|n| n.id.clone()).collect::<Vec<_>>(), [id("n1")]);
    assert_eq!(*fake.removed.lock().expect("lock"), [auto]);
}

#[tokio::test]
async fn a_roll_changes_what_is_wanted_and_wakes_the_long_poll() {
    let inventory = open(&Arc::default(), &[section("n1", MAC)], true).await;
    let mut news = inventory.subscribe(&id("n1"), 1).expect("subscribe");
    let roll = inventory.start_roll(&[id("n1")], set("1")).await.expect("roll");
    assert!(news.has_changed().expect("open"));
    assert_eq!(*news.borrow_and_update(), 2);
    assert_eq!(inventory.desired(&id("n1")).expect("node").imagesets, [rolled("1", 2)]);
    assert_eq!(roll.nodes[0].state, RollState::Pending);
    let later = inventory.start_roll(&[id("n1")], set("2")).await.expect("later");
    let states: Vec<RollState> = inventory.rolls().iter().map(|r| r.nodes[0].state).collect();
    assert_eq!(states, [RollState::Superseded, RollState::Pending]);
    let mut observed = report("n1");
    observed.desired_version = 3;
    observed.imagesets[0].digest = Digest::of(b"2");
    observed.imagesets[0].last_roll = None;
    inventory.observed(&id("n1"), observed, 2).expect("report");
    assert_eq!(inventory.roll(later.id).expect("roll").nodes[0].state, RollState::Done);
}

#[tokio::test]
async fn an_undo_brings_each_node_back_to_what_it_ran() {
    let sections = [section("n1", MAC), section("n2", Mac([2, 0, 0, 0, 0, 2]))];
    let inventory = open(&Arc::default(), &sections, true).await;
    let (hello, other): (Name, Name) =
        ("hello".parse().expect("name"), "other".parse().expect("name"));
    let both = [id("n1"), id("n2")];
    inventory.start_roll(&both, set("2")).await.expect("roll");
    let error = inventory.undo(&both, &hello, false).await.expect_err("nothing").to_string();
    assert!(error.starts_with("node n1: no version of ImageSet hello is known"), "{error}");
    let error = inventory.undo(&both, &other, false).await.expect_err("no set").to_string();
    assert_eq!(error, "node n1 has no ImageSet other");
    for (node, kept) in [("n1", "1"), ("n2", "0")] {
        let mut observed = report(node);
        observed.desired_version = 2;
        observed.imagesets[0].digest = Digest::of(b"2");
        observed.imagesets[0].previous = Some(set(kept));
        inventory.observed(&id(node), observed, 2).expect("report");
    }
    assert_eq!(inventory.nodes_with(&hello), both);
    let rolls = inventory.undo(&both, &hello, true).await.expect("undo");
    assert_eq!(rolls.len(), 2, "they ran different versions");
    let wanted = |node: &str| inventory.desired(&id(node)).expect("node").imagesets;
    assert_eq!(wanted("n1"), [DesiredSet { force: true, ..rolled("1", 3) }]);
    assert_eq!(wanted("n2"), [DesiredSet { force: true, ..rolled("0", 3) }]);
}

#[tokio::test]
async fn a_busy_node_is_told_so_once() {
    let inventory = open(&Arc::default(), &[section("n1", MAC)], true).await;
    for (busy, version) in [(Some("job 1"), 2), (Some("job 1"), 2), (None, 3)] {
        inventory.busy(&id("n1"), busy.map(str::to_owned)).await.expect("busy");
        let desired = inventory.desired(&id("n1")).expect("node");
        assert_eq!((desired.busy.as_deref(), desired.version), (busy, version));
    }
}

#[tokio::test]
async fn what_the_storage_refuses_did_not_happen() {
    let fake = Arc::<Fake>::default();
    let inventory = open(&fake, &[section("n1", MAC)], true).await;
    inventory.observed(&id("n1"), report("n1"), 1).expect("report");
    fake.broken.store(true, Ordering::Relaxed);
    let before = inventory.list();
    let error = inventory.start_roll(&[id("n1")], set("1")).await.expect_err("full");
    assert_eq!(error.to_string(), "the disk of the inventory is full");
    assert!(inventory.power(&id("n1"), PowerAction::Off).await.is_err());
    assert!(inventory.assign(&id("n1"), set("1")).await.is_err());
    assert_eq!((inventory.list(), inventory.rolls().len()), (before, 0));
}

#[tokio::test]
async fn boot_and_reports_go_on_while_the_storage_fails_and_are_written_later() {
    let fake = Arc::<Fake>::default();
    let inventory = open(&fake, &[], true).await;
    fake.broken.store(true, Ordering::Relaxed);
    let node = inventory.script_fetched(MAC, None, 3).expect("boot goes on");
    assert!(inventory.flush().await.is_err());
    fake.broken.store(false, Ordering::Relaxed);
    inventory.flush().await.expect("healed");
    let written = fake.seen.lock().expect("lock").clone();
    assert_eq!(written.iter().map(|row| row.id.clone()).collect::<Vec<_>>(), [node]);
}

#[tokio::test]
async fn all_unknown_nodes_of_a_roll_are_named() {
    let sections = [section("n1", MAC), section("n2", Mac([2, 0, 0, 0, 0, 2]))];
    let inventory = open(&Arc::default(), &sections, true).await;
    let ask = |words: &[&str]| {
        inventory.select(&words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>())
    };
    assert_eq!(ask(&["all"]).expect("all"), [id("n1"), id("n2")]);
    assert_eq!(ask(&["n2", "n2"]).expect("one"), [id("n2")]);
    let error = ask(&["n1", "x", "Y"]).expect_err("unknown").to_string();
    assert_eq!(error, "there is no node x, Y; `layercake node list` shows all");
    assert_eq!(ask(&[]).expect_err("none").to_string(), "there are no nodes to roll");
}

#[tokio::test]
async fn an_assigned_set_never_replaces_what_an_operator_rolled() {
    let inventory = open(&Arc::default(), &[section("n1", MAC)], true).await;
    inventory.assign(&id("n1"), set("1")).await.expect("assign");
    inventory.start_roll(&[id("n1")], set("2")).await.expect("roll");
    inventory.assign(&id("n1"), set("1")).await.expect("assign again");
    assert_eq!(inventory.desired(&id("n1")).expect("node").imagesets, [rolled("2", 3)]);
    let pinned: Vec<_> = inventory.pinned().into_iter().map(Some).collect();
    assert_eq!(pinned, [set("2").reference.digest]);
}

#[tokio::test]
async fn reports_of_other_nodes_and_far_protocols_are_refused() {
    let inventory = open(&Arc::default(), &[section("n1", MAC)], true).await;
    let error = inventory.observed(&id("n1"), report("n2"), 1).expect_err("other").to_string();
    assert_eq!(error, "the report is of node n2, not of n1");
    let far = Observed { protocol: PROTOCOL_VERSION + 2, ..report("n1") };
    let error = inventory.observed(&id("n1"), far, 1).expect_err("far").to_string();
    assert!(error.starts_with("the agent speaks protocol 3, this server 1"), "{error}");
    let next = Observed { protocol: PROTOCOL_VERSION + 1, ..report("n1") };
    inventory.observed(&id("n1"), next, 1).expect("one apart");
}
