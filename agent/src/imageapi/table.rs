//! The objects of the ImageAPI and who holds whom. Pure: what is mounted or started is the engine's business.
//!
//! ```text
//! container ──▶ mount (overlay) ──▶ mount (attach) ──▶ attachment (loopback) ──▶ mount (bind)
//!                            └────▶ mount (nfs)
//! ```
//! An object holds what stands behind its arrows. It is held by those before it, and by its creator if it was asked for by
//! itself. Nobody holds garbage. Numbers are given once, over all kinds of objects.

use std::collections::BTreeMap;
use std::path::PathBuf;

use protocol::oci::RunConfig;
use serde::{Deserialize, Serialize};

use super::types::{Attach, AttachKind, Container, Mount, MountKind, State};

/// What kind of object a number is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sort {
    Attach,
    Mount,
    Container,
}

impl std::fmt::Display for Sort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Attach => "attachment",
            Self::Mount => "mount",
            Self::Container => "container",
        })
    }
}

/// How a block device is taken away again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Device {
    /// It was there before and stays.
    Local,
    /// `/dev/loopN`.
    Loop(u32),
    /// The kernel's number of an iSCSI session.
    Iscsi(u32),
    /// The kernel's number of an rbd mapping.
    Rbd(u32),
}

/// How a file system is taken away again.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Mounted {
    /// Where it can be seen.
    pub mountpoint: PathBuf,
    /// What is to be unmounted, in this order.
    pub layers: Vec<PathBuf>,
    /// A loop device that only this mount knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<u32>,
    /// How its image wants to be run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<RunConfig>,
    /// What of the store it needs: the digest of an image's manifest, or of a file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<protocol::ids::Digest>,
}

/// A container's present state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Running {
    /// How it stands.
    pub state: State,
    /// The instance that runs or ran; none before the first start.
    pub instance: Option<String>,
    /// Why it is dead, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Its log.
    pub logfile: PathBuf,
}

/// What an object is. The definitions are without the objects they hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Item {
    Attach { spec: Attach, device: Device },
    Mount { spec: Mount, mounted: Box<Mounted> },
    Container { spec: Container, running: Running },
}

/// An object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Object {
    /// Whether its creator holds it.
    pub own: bool,
    /// What it holds, in the order of its definition.
    pub children: Vec<i64>,
    /// What it is.
    pub item: Item,
}

impl Object {
    /// Its kind.
    pub(super) fn sort(&self) -> Sort {
        match self.item {
            Item::Attach { .. } => Sort::Attach,
            Item::Mount { .. } => Sort::Mount,
            Item::Container { .. } => Sort::Container,
        }
    }
}

/// Why an object may not be taken away now.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    /// There is none.
    #[error("{0} {1}")]
    Absent(Sort, i64),
    /// Others hold it.
    #[error("{sort} {id} is held by {holders}")]
    Held { sort: Sort, id: i64, holders: String },
    /// Others hold it, and need it now.
    #[error("{sort} {id} is used by {user}")]
    Used { sort: Sort, id: i64, user: String },
    /// The container runs.
    #[error("container {0} is {1}")]
    Runs(i64, State),
}

/// All objects.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Table {
    /// The last number given.
    last: i64,
    objects: BTreeMap<i64, Object>,
}

impl Table {
    /// A number that no object has had.
    pub(super) fn number(&mut self) -> i64 {
        self.last = self.last.saturating_add(1);
        self.last
    }

    pub(super) fn insert(&mut self, id: i64, object: Object) {
        self.objects.insert(id, object);
    }

    pub(super) fn remove(&mut self, id: i64) -> Option<Object> {
        self.objects.remove(&id)
    }

    pub(super) fn get(&self, id: i64) -> Option<&Object> {
        self.objects.get(&id)
    }

    pub(super) fn get_mut(&mut self, id: i64) -> Option<&mut Object> {
        self.objects.get_mut(&id)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (i64, &Object)> {
        self.objects.iter().map(|(id, object)| (*id, object))
    }

    /// Whether there is such an object of this kind.
    pub(super) fn has(&self, sort: Sort, id: i64) -> bool {
        self.get(id).is_some_and(|object| object.sort() == sort)
    }

    /// Those that hold it, each as often as it does.
    fn parents(&self, id: i64) -> impl Iterator<Item = (i64, &Object)> {
        self.iter().flat_map(move |(parent, object)| {
            object.children.iter().filter(move |child| **child == id).map(move |_| (parent, object))
        })
    }

    /// How often it is held.
    pub(super) fn refs(&self, id: i64) -> i64 {
        let own = self.get(id).is_some_and(|object| object.own);
        let parents = i64::try_from(self.parents(id).count()).unwrap_or(i64::MAX);
        parents.saturating_add(i64::from(own))
    }

    /// An object that nobody holds, if it is none of these.
    pub(super) fn garbage(&self, except: &[i64]) -> Option<i64> {
        self.iter().map(|(id, _)| id).find(|id| !except.contains(id) && self.refs(*id) == 0)
    }

    /// Whether an object may be taken away at its creator's word. With `force` also one that ended or never started
    /// containers hold; never one that another mount or attachment stands on.
    pub(super) fn may_remove(&self, sort: Sort, id: i64, force: bool) -> Result<(), Refusal> {
        let object = self.get(id).filter(|object| object.sort() == sort);
        let object = object.ok_or(Refusal::Absent(sort, id))?;
        if let Item::Container { running, .. } = &object.item
            && matches!(running.state, State::Running | State::Stopping)
        {
            return Err(Refusal::Runs(id, running.state));
        }
        let name = |(parent, object): (i64, &Object)| format!("{} {parent}", object.sort());
        let holders: Vec<String> = self.parents(id).map(name).collect();
        if holders.is_empty() {
            return Ok(());
        }
        if !force {
            return Err(Refusal::Held { sort, id, holders: holders.join(", ") });
        }
        match self.parents(id).find(|(_, parent)| !parent.is_idle()) {
            Some(user) => Err(Refusal::Used { sort, id, user: name(user) }),
            None => Ok(()),
        }
    }

    /// The container that is meant.
    pub(super) fn container_named(&self, name: &str) -> Option<i64> {
        self.containers().find(|(_, spec, _)| !name.is_empty() && spec.name == name).map(|it| it.0)
    }

    /// Every container.
    pub(super) fn containers(&self) -> impl Iterator<Item = (i64, &Container, &Running)> {
        self.iter().filter_map(|(id, object)| match &object.item {
            Item::Container { spec, running } => Some((id, spec, running)),
            _ => None,
        })
    }

    /// The container that this instance is of.
    pub(super) fn running_mut(&mut self, instance: &str) -> Option<&mut Running> {
        self.objects.values_mut().find_map(|object| match &mut object.item {
            Item::Container { running, .. } if running.instance.as_deref() == Some(instance) => {
                Some(running)
            }
            _ => None,
        })
    }

    /// How the image below a mount wants to be run: the nearest image's config, first in the order of definition.
    pub(super) fn config_below(&self, id: i64) -> Option<&RunConfig> {
        let object = self.get(id)?;
        match &object.item {
            Item::Mount { mounted, .. } if mounted.config.is_some() => mounted.config.as_ref(),
            _ => object.children.iter().find_map(|child| self.config_below(*child)),
        }
    }

    /// An attachment as it is answered, with all that it holds.
    pub(super) fn attach(&self, id: i64) -> Option<Attach> {
        let object = self.get(id)?;
        let Item::Attach { spec, .. } = &object.item else { return None };
        let mut attach = Attach { id, refs: self.refs(id), ..spec.clone() };
        if let Some(loopback) = &mut attach.loopback {
            loopback.mount = self.child_mount(object);
        }
        Some(attach)
    }

    /// A mount as it is answered, with all that it holds.
    pub(super) fn mount(&self, id: i64) -> Option<Mount> {
        let object = self.get(id)?;
        let Item::Mount { spec, .. } = &object.item else { return None };
        let mut mount = Mount { id, refs: self.refs(id), ..spec.clone() };
        if let Some(attach) = &mut mount.attach {
            let child = object.children.first();
            attach.attach = child.and_then(|child| self.attach(*child)).map(Box::new);
        }
        if let Some(bind) = &mut mount.bind {
            bind.mount = self.child_mount(object);
        }
        if let Some(overlay) = &mut mount.overlay {
            // One that was taken away by force is shown by its number alone.
            let shown = |child: &i64| {
                self.mount(*child).unwrap_or_else(|| Mount { id: *child, ..Mount::default() })
            };
            overlay.lower = Some(object.children.iter().map(shown).collect());
        }
        Some(mount)
    }

    /// A container as it is answered, with its mount.
    pub(super) fn container(&self, id: i64) -> Option<Container> {
        let object = self.get(id)?;
        let Item::Container { spec, running } = &object.item else { return None };
        Some(Container {
            id,
            refs: self.refs(id),
            state: Some(running.state),
            logfile: running.logfile.display().to_string(),
            mount: self.child_mount(object),
            ..spec.clone()
        })
    }

    fn child_mount(&self, object: &Object) -> Option<Box<Mount>> {
        let child = *object.children.first()?;
        let shown = self.mount(child).unwrap_or_else(|| Mount { id: child, ..Mount::default() });
        Some(Box::new(shown))
    }

    /// Attachments of a kind.
    pub(super) fn attachments(&self, kind: Option<AttachKind>) -> Vec<Attach> {
        let all = self.iter().filter_map(|(id, _)| self.attach(id));
        all.filter(|attach| kind.is_none() || attach.kind == kind).collect()
    }

    /// Mounts of a kind.
    pub(super) fn mounts(&self, kind: Option<MountKind>) -> Vec<Mount> {
        let all = self.iter().filter_map(|(id, _)| self.mount(id));
        all.filter(|mount| kind.is_none() || mount.kind == kind).collect()
    }
}

impl Object {
    /// Whether it can do without what it holds: a container that does not run.
    fn is_idle(&self) -> bool {
        match &self.item {
            Item::Container { running, .. } => {
                !matches!(running.state, State::Running | State::Stopping)
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn mount(children: &[i64], own: bool) -> Object {
        let item = Item::Mount { spec: Mount::default(), mounted: Box::default() };
        Object { own, children: children.to_vec(), item }
    }

    fn container(mount: i64, state: State) -> Object {
        let running =
            Running { state, instance: None, reason: None, logfile: PathBuf::from("/log") };
        let item = Item::Container { spec: Container::default(), running };
        Object { own: true, children: vec![mount], item }
    }

    /// 1 and 2 lie below overlay 3; container 4 runs on 3; 1 was made by itself.
    fn table(state: State) -> Table {
        let mut table = Table::default();
        for object in
            [mount(&[], true), mount(&[], false), mount(&[1, 2], false), container(3, state)]
        {
            let id = table.number();
            table.insert(id, object);
        }
        table
    }

    #[test]
    fn creators_and_parents_hold() {
        let table = table(State::Running);
        assert_eq!([1, 2, 3, 4].map(|id| table.refs(id)), [2, 1, 1, 1]);
        assert_eq!(table.garbage(&[]), None);
        let shown = table.container(4).expect("container");
        assert_eq!(shown.mount.map(|mount| (mount.id, mount.refs)), Some((3, 1)));
    }

    #[test]
    fn what_may_be_removed_follows_from_who_holds_it() {
        use Sort::{Attach, Container, Mount};
        let table_of = [
            (State::Running, Mount, 1, false, "mount 1 is held by mount 3"),
            (State::Running, Mount, 2, false, "mount 2 is held by mount 3"),
            (State::Running, Mount, 2, true, "mount 2 is used by mount 3"),
            (State::Running, Mount, 3, false, "mount 3 is held by container 4"),
            (State::Running, Mount, 3, true, "mount 3 is used by container 4"),
            (State::Stopping, Mount, 3, true, "mount 3 is used by container 4"),
            (State::Exited, Mount, 3, false, "mount 3 is held by container 4"),
            (State::Exited, Mount, 3, true, ""),
            (State::Created, Mount, 3, true, ""),
            (State::Running, Container, 4, false, "container 4 is running"),
            (State::Stopping, Container, 4, false, "container 4 is stopping"),
            (State::Dead, Container, 4, false, ""),
            (State::Dead, Container, 3, false, "container 3"),
            (State::Dead, Attach, 9, true, "attachment 9"),
        ];
        for (state, sort, id, force, expected) in table_of {
            let refusal = table(state).may_remove(sort, id, force).err();
            let text = refusal.map(|refusal| refusal.to_string()).unwrap_or_default();
            assert_eq!(text, expected, "{state:?} {sort:?} {id} {force}");
        }
    }

    #[test]
    fn garbage_goes_from_the_top_down_and_numbers_are_not_given_again() {
        let mut table = table(State::Exited);
        table.remove(4);
        let mut collected = Vec::new();
        while let Some(id) = table.garbage(&[]) {
            collected.push(id);
            table.remove(id);
        }
        assert_eq!(collected, [3, 2]);
        assert_eq!(table.refs(1), 1);
        assert_eq!(table.number(), 5);
    }

    #[test]
    fn a_mount_taken_from_under_an_ended_container_is_shown_by_its_number() {
        let mut table = table(State::Exited);
        table.remove(3);
        let shown = table.container(4).expect("container");
        let missing = Mount { id: 3, ..Mount::default() };
        assert_eq!(shown.mount, Some(Box::new(missing)));
        assert_eq!(table.garbage(&[2]), None);
    }

    proptest! {
        /// Whatever is made and removed by the rules, nobody's child is missing and collecting ends.
        #[test]
        fn nothing_that_is_held_ever_goes(steps in prop::collection::vec((0..4_u8, any::<u16>(), any::<u16>()), 0..60)) {
            let mut table = Table::default();
            for (what, a, b) in steps {
                let ids: Vec<i64> = table.iter().map(|(id, _)| id).collect();
                let pick = |n: u16| ids.get(usize::from(n) % ids.len().max(1)).copied();
                if what < 2 {
                    let children: Vec<i64> = [pick(a), pick(b)].into_iter().flatten().collect();
                    let id = table.number();
                    table.insert(id, mount(&children, what == 0));
                } else if let Some(id) = pick(a) && table.may_remove(Sort::Mount, id, what == 3).is_ok() {
                    table.remove(id);
                }
                for _ in 0..100 {
                    let Some(id) = table.garbage(&[]) else { break };
                    prop_assert_eq!(table.refs(id), 0);
                    table.remove(id);
                }
                prop_assert_eq!(table.garbage(&[]), None);
                for (_, object) in table.iter() {
                    prop_assert!(object.children.iter().all(|child| table.get(*child).is_some()));
                }
            }
        }
    }
}
