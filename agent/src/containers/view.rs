//! What a container sees and may use, as its monitor and container-init need it: the description's words with the node's
//! decisions filled in. Pure: nothing here acts.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use protocol::ids::{Digest, Name};
use protocol::imageset::{
    Bind, ByteSize, Container, Device, FileMode, Limits, Namespaces, NetMode, Network, Profile,
    Seccomp, Storage, Tmpfs, Ulimit,
};
use serde::{Deserialize, Serialize};

use super::plan::PlanError;

/// User ids of the node that one user namespace takes: what 16 bits can say, as container engines do.
pub const ID_RANGE: u32 = 65_536;
/// The ranges that containers are given begin here and end before 2^31: beyond what people and packages use.
const FIRST_RANGE: u32 = 16;
const RANGES: u32 = 32_000;

/// Kernel settings that belong to the container's own IPC namespace (ipc_namespaces(7)).
const IPC_SYSCTLS: [&str; 8] = [
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
];

/// A persistent directory with its place on the node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Where it lies.
    pub source: PathBuf,
    /// Absolute path in the container.
    pub target: String,
    /// Permissions when it is made; the image directory's when absent.
    #[serde(default)]
    pub mode: Option<FileMode>,
    /// Owner and group when it is made; the image directory's when absent.
    #[serde(default)]
    pub owner: Option<(u32, u32)>,
}

/// What monitor and container-init build around the program.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct View {
    /// Everything of the node, nothing masked or filtered.
    pub privileged: bool,
    /// The program is systemd.
    pub systemd: bool,
    /// A reaper runs as PID 1 in front of the program.
    pub init: bool,
    /// The host name is the container's own, so that the node's /etc/hostname is not its.
    pub own_hostname: bool,
    /// Capabilities of the profile that it does not get.
    pub drop_capabilities: Vec<String>,
    /// Namespaces beyond the usual.
    pub namespaces: Namespaces,
    /// First user and group id on the node of its user namespace, when it has one.
    pub id_base: Option<u32>,
    /// Addresses of a private network.
    pub network: Option<Network>,
    /// Directories and files of the node.
    pub mounts: Vec<Bind>,
    /// Directories in memory.
    pub tmpfs: Vec<Tmpfs>,
    /// Directories that outlive the instance.
    pub persistent: Vec<Kept>,
    /// Devices of the node.
    pub devices: Vec<Device>,
    /// Whether system calls are filtered.
    pub seccomp: Seccomp,
    /// Limits of the control group.
    pub limits: Limits,
    /// Resource limits by name.
    pub ulimits: BTreeMap<String, Ulimit>,
    /// Kernel settings.
    pub sysctls: BTreeMap<String, String>,
    /// Size of /dev/shm.
    pub shm_size: Option<ByteSize>,
    /// Huge pages, by page size.
    pub hugepages: BTreeMap<String, ByteSize>,
}

/// Where a container's persistent directories may lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keeping {
    /// In memory.
    pub memory: PathBuf,
    /// On the disk labelled LAYERCAKE, when one is mounted.
    pub disk: Option<PathBuf>,
}

impl View {
    /// The view of a container of a set.
    ///
    /// # Errors
    /// [`PlanError`] for a setting that is not the container's own, a capability that does not exist, or a disk that is not
    /// there.
    pub(super) fn plan(
        set: &Name,
        container: &Container,
        keeping: &Keeping,
    ) -> Result<Self, PlanError> {
        let name = &container.name;
        for capability in &container.drop_capabilities {
            caps::Capability::from_str(capability)
                .map_err(|_| PlanError::Capability(name.clone(), capability.clone()))?;
        }
        for key in container.sysctls.keys().filter(|_| !container.privileged) {
            if !is_own_sysctl(key, container.namespaces.net) {
                return Err(PlanError::Sysctl(name.clone(), key.clone()));
            }
        }
        let persistent = container
            .persistent
            .iter()
            .map(|it| {
                let base = match (it.storage, &keeping.disk) {
                    (Storage::Memory, _) | (Storage::Auto, None) => &keeping.memory,
                    (Storage::Auto | Storage::Disk, Some(disk)) => disk,
                    (Storage::Disk, None) => {
                        return Err(PlanError::NoDisk(name.clone(), it.name.clone()));
                    }
                };
                Ok(Kept {
                    source: base.join(set.as_str()).join(it.name.as_str()),
                    target: it.target.clone(),
                    mode: it.mode,
                    owner: it.owner.as_deref().and_then(owner),
                })
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            privileged: container.privileged,
            systemd: container.systemd,
            init: container.init,
            own_hostname: container.hostname.is_some(),
            drop_capabilities: container.drop_capabilities.clone(),
            namespaces: container.namespaces,
            id_base: container.namespaces.user.then(|| id_base(set, name)),
            network: container.network.clone(),
            mounts: container.mounts.clone(),
            tmpfs: container.tmpfs.clone(),
            persistent,
            devices: container.devices.clone(),
            seccomp: container.seccomp,
            limits: container.limits.clone(),
            ulimits: container.ulimits.clone(),
            sysctls: container.sysctls.clone(),
            shm_size: container.shm_size,
            hugepages: container.hugepages.clone(),
        })
    }

    /// Whether system calls are filtered.
    #[must_use]
    pub fn is_filtered(&self) -> bool {
        self.seccomp == Seccomp::Default && !self.privileged
    }

    /// Whether something is mounted at this very path of the container.
    #[must_use]
    pub fn has_target(&self, path: &str) -> bool {
        let binds = self.mounts.iter().map(|it| it.target.as_ref().unwrap_or(&it.source));
        let all = binds
            .chain(self.tmpfs.iter().map(|it| &it.target))
            .chain(self.persistent.iter().map(|it| &it.target));
        all.into_iter().any(|target| Path::new(target) == Path::new(path))
    }
}

/// `USER[:GROUP]` by number; the group is 0 when none is named.
pub(super) fn owner(text: &str) -> Option<(u32, u32)> {
    let (user, group) = text.split_once(':').unwrap_or((text, "0"));
    Some((user.parse().ok()?, group.parse().ok()?))
}

/// The range of a container's user namespace: the same for every version of it, so that what it keeps stays its own; another
/// container's is another one, as far as 32 000 ranges go.
#[must_use]
pub fn id_base(set: &Name, container: &Name) -> u32 {
    let digest = Digest::of(format!("{set}\n{container}").as_bytes());
    let number = digest.0.iter().take(4).fold(0_u32, |sum, byte| (sum << 8) | u32::from(*byte));
    (FIRST_RANGE + number % RANGES).saturating_mul(ID_RANGE)
}

/// Whether a setting is of a namespace that the container has of its own.
fn is_own_sysctl(key: &str, net: NetMode) -> bool {
    let key = sysctl_path(key).replace('/', ".");
    IPC_SYSCTLS.contains(&key.as_str())
        || key.starts_with("fs.mqueue.")
        || (key.starts_with("net.") && net != NetMode::Host)
}

/// The path below /proc/sys of a setting, by the rule of sysctl(8): whichever of `.` and `/` comes first separates.
#[must_use]
pub fn sysctl_path(key: &str) -> String {
    match key.find(['.', '/']).and_then(|at| key.get(at..=at)) {
        Some("/") => key.to_owned(),
        _ => {
            let swap = |c| match c {
                '.' => '/',
                '/' => '.',
                other => other,
            };
            key.chars().map(swap).collect()
        }
    }
}

/// Whether the profile lets setuid programs and devices of the image work.
#[must_use]
pub fn keeps_setuid(profile: Profile, view: &View) -> bool {
    profile == Profile::System || view.privileged
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keeping() -> Keeping {
        Keeping { memory: "/run/p".into(), disk: None }
    }

    #[track_caller]
    fn plan(json: &str, keeping: &Keeping) -> Result<View, PlanError> {
        let mut document: serde_json::Value = serde_json::from_str(json).expect("json");
        document["name"] = "web".into();
        document["image"] = "web".into();
        let container = serde_json::from_value(document).expect("container");
        View::plan(&"site".parse().expect("name"), &container, keeping)
    }

    #[test]
    fn persistent_directories_lie_on_the_disk_when_there_is_one() {
        let json = |storage: &str| {
            format!(
                r#"{{"persistent":[{{"name":"data","target":"/srv","storage":"{storage}","owner":"7"}}]}}"#
            )
        };
        let with_disk = Keeping { disk: Some("/disk".into()), ..keeping() };
        let table = [
            ("auto", keeping(), Some("/run/p/site/data")),
            ("auto", with_disk.clone(), Some("/disk/site/data")),
            ("memory", with_disk.clone(), Some("/run/p/site/data")),
            ("disk", with_disk, Some("/disk/site/data")),
            ("disk", keeping(), None),
        ];
        for (storage, keeping, expected) in table {
            let view = plan(&json(storage), &keeping);
            let source = view.ok().map(|view| view.persistent[0].source.clone());
            assert_eq!(source.as_deref(), expected.map(Path::new), "{storage}");
        }
        let view = plan(&json("auto"), &keeping()).expect("plan");
        assert_eq!(view.persistent[0].owner, Some((7, 0)));
    }

    #[test]
    fn only_settings_of_its_own_namespaces_may_be_set() {
        let table = [
            (r#"{"sysctls":{"kernel.shmmax":"1"}}"#, true),
            (r#"{"sysctls":{"fs.mqueue.msg_max":"1"}}"#, true),
            (r#"{"sysctls":{"net.core.somaxconn":"1"}}"#, false),
            (r#"{"sysctls":{"net/core/somaxconn":"1"},"namespaces":{"net":"none"}}"#, true),
            (r#"{"sysctls":{"vm.swappiness":"1"}}"#, false),
            (r#"{"sysctls":{"vm.swappiness":"1"},"privileged":true}"#, true),
        ];
        for (json, good) in table {
            assert_eq!(plan(json, &keeping()).is_ok(), good, "{json}");
        }
    }

    #[test]
    fn a_setting_s_path_is_found_as_sysctl_does() {
        assert_eq!(sysctl_path("net.ipv4.ip_forward"), "net/ipv4/ip_forward");
        assert_eq!(
            sysctl_path("net.ipv4.conf.eth0/1.forwarding"),
            "net/ipv4/conf/eth0.1/forwarding"
        );
        assert_eq!(sysctl_path("net/ipv4/conf/eth0.1/x"), "net/ipv4/conf/eth0.1/x");
    }

    #[test]
    fn each_container_has_a_range_of_user_ids_and_keeps_it() {
        let name = |text: &str| text.parse::<Name>().expect("name");
        let base = id_base(&name("a"), &name("b"));
        assert_eq!(base, id_base(&name("a"), &name("b")));
        assert_ne!(base, id_base(&name("a"), &name("c")));
        for set in ["a", "b", "site"] {
            let base = id_base(&name(set), &name("web"));
            assert!(
                base.is_multiple_of(ID_RANGE) && (1 << 20..(1 << 31) - ID_RANGE).contains(&base)
            );
        }
        assert_eq!(plan("{}", &keeping()).expect("plan").id_base, None);
    }
}
