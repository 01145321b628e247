//! What can be wrong with a container's description, each as one sentence that names the place.

use std::collections::{BTreeMap, BTreeSet};

use super::runtime::{is_cidr, is_owner, is_target};
use super::{
    ByteSize, Container, LOG_SIZES, Listen, MAX_SOCKETS, NetMode, Profile, Strategy, signal_number,
};
use crate::ids::Name;

/// Names of resource limits (setrlimit(2), without RLIMIT_).
const ULIMITS: [&str; 15] = [
    "as",
    "core",
    "cpu",
    "data",
    "fsize",
    "locks",
    "memlock",
    "msgqueue",
    "nice",
    "nofile",
    "nproc",
    "rss",
    "rtprio",
    "sigpending",
    "stack",
];

impl Container {
    /// What is wrong with it by itself, without the rest of the set.
    pub(super) fn own_problems(&self, problems: &mut Vec<String>) {
        let mut say = |text: String| problems.push(format!("container `{}`: {text}", self.name));
        for key in self.env.keys() {
            if key.is_empty() || key.contains(['=', '\0']) {
                say(format!("env key `{key}` is not a variable name"));
            }
        }
        let nul = |text: &str| text.contains('\0');
        if self.command.iter().chain(self.env.values()).any(|text| nul(text)) {
            say("a NUL byte in command or env".to_owned());
        }
        if self.workdir.as_deref().is_some_and(|dir| !dir.starts_with('/')) {
            say("workdir must be an absolute path".to_owned());
        }
        if let Some(signal) = &self.stop_signal
            && signal_number(signal).is_none()
        {
            say(format!("stop_signal `{signal}` is not a signal such as SIGTERM or SIGRTMIN+3"));
        }
        for capability in self.capabilities.iter().chain(&self.drop_capabilities) {
            let shape = capability.strip_prefix("CAP_").is_some_and(|rest| {
                !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_uppercase() || b == b'_')
            });
            if !shape {
                say(format!("capability `{capability}` is not of the form CAP_NET_ADMIN"));
            }
        }
        if self.log_size.is_some_and(|size| !LOG_SIZES.contains(&size.0)) {
            say("log_size must be between 64 KiB and 1 GiB".to_owned());
        }
        self.view_problems(&mut say);
        self.service_problems(&mut say);
    }

    fn view_problems(&self, say: &mut dyn FnMut(String)) {
        let binds = self.mounts.iter().map(|it| it.target.as_ref().unwrap_or(&it.source));
        let targets = binds
            .chain(self.tmpfs.iter().map(|it| &it.target))
            .chain(self.persistent.iter().map(|it| &it.target))
            .chain(self.files.iter().map(|it| &it.target));
        let mut seen = BTreeSet::new();
        for target in targets {
            if !is_target(target) {
                say(format!("`{target}` is not an absolute path below / without `..`"));
            }
            if !seen.insert(target.trim_end_matches('/')) {
                say(format!("two things are mounted at `{target}`"));
            }
        }
        let node_paths = self.mounts.iter().map(|it| &it.source);
        for path in node_paths.filter(|path| *path != "/" && !is_target(path)) {
            say(format!("mount source `{path}` is not an absolute path without `..`"));
        }
        for path in self.devices.iter().map(|it| &it.path) {
            if !path.starts_with("/dev/") || !is_target(path) {
                say(format!("device `{path}` is not a path below /dev"));
            }
        }
        for file in &self.files {
            if file.content.is_some() == file.from.is_some() {
                say(format!("file `{}` wants exactly one of content and from", file.target));
            }
        }
        let owners = self.files.iter().map(|it| (&it.target, &it.owner));
        for (target, owner) in
            owners.chain(self.persistent.iter().map(|it| (&it.target, &it.owner)))
        {
            if owner.as_deref().is_some_and(|owner| !is_owner(owner)) {
                say(format!("owner of `{target}` is not of the form 1000 or 1000:1000"));
            }
        }
        self.network_problems(say);
        self.limit_problems(say);
        if self.systemd && self.profile != Profile::System {
            say("systemd = true wants profile = \"system\"".to_owned());
        }
        if self.systemd && self.init {
            say("init = true is for programs that cannot be PID 1, and systemd can".to_owned());
        }
    }

    fn network_problems(&self, say: &mut dyn FnMut(String)) {
        match (&self.network, self.namespaces.net) {
            (Some(network), NetMode::Private) => {
                for address in [&network.address, &network.host_address] {
                    if !is_cidr(address) {
                        say(format!("network address `{address}` is not of the form 10.88.0.2/24"));
                    }
                }
            }
            (None, NetMode::Private) => {
                say("namespaces.net = \"private\" wants [container.network] with its addresses"
                    .to_owned());
            }
            (Some(_), _) => say("network is only for namespaces.net = \"private\"".to_owned()),
            (None, _) => {}
        }
        if self.hostname.as_deref().is_some_and(|name| !is_hostname(name)) {
            say(format!(
                "hostname `{}` is not a host name",
                self.hostname.as_deref().unwrap_or_default()
            ));
        }
    }

    fn limit_problems(&self, say: &mut dyn FnMut(String)) {
        for name in self.ulimits.keys().filter(|name| !ULIMITS.contains(&name.as_str())) {
            say(format!("ulimit `{name}` is none of {}", ULIMITS.join(", ")));
        }
        for (key, value) in
            [("cpu_weight", self.limits.cpu_weight), ("io_weight", self.limits.io_weight)]
        {
            if value.is_some_and(|weight| !(1..=10_000).contains(&weight)) {
                say(format!("limits.{key} must be from 1 to 10000"));
            }
        }
        for name in self.sysctls.keys() {
            let bytes = name
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b'/'));
            if name.is_empty() || !bytes || name.split(['.', '/']).any(str::is_empty) {
                say(format!("sysctl `{name}` is not a name such as net.core.somaxconn"));
            }
        }
        for size in self.hugepages.keys().filter(|size| size.parse::<ByteSize>().is_err()) {
            say(format!("hugepages `{size}` is not a page size such as 2MiB"));
        }
    }

    fn service_problems(&self, say: &mut dyn FnMut(String)) {
        let mut names = BTreeSet::new();
        for socket in &self.sockets {
            if !names.insert(&socket.name) {
                say(format!("socket `{}` is described twice", socket.name));
            }
            if socket.mode.is_some() && !matches!(socket.listen, Listen::Unix(_)) {
                say(format!("socket `{}`: mode is only for unix: sockets", socket.name));
            }
        }
        if self.sockets.len() > MAX_SOCKETS {
            say(format!("{} sockets are more than {MAX_SOCKETS}", self.sockets.len()));
        }
        if let Some(health) = &self.health {
            health.problems(say);
        }
        if self.watchdog_ms.is_some_and(|ms| ms == 0 || !self.notify) {
            say("watchdog_ms must be at least 1 and is only for notify = true".to_owned());
        }
        let own_network = self.namespaces.net != NetMode::Host;
        match self.strategy {
            Strategy::Replace => {}
            Strategy::Handover if self.sockets.is_empty() => {
                say("strategy = \"handover\" wants [[container.sockets]] to hand over".to_owned());
            }
            Strategy::Handover | Strategy::Overlap if !self.ports.is_empty() && !own_network => {
                say("two versions cannot listen on one port of the node: use sockets instead of ports, or strategy = \"replace\"".to_owned());
            }
            Strategy::Overlap if self.sockets.is_empty() && !own_network => {
                say("strategy = \"overlap\" wants sockets, or a network of its own".to_owned());
            }
            Strategy::Handover | Strategy::Overlap => {}
        }
        if self.strategy == Strategy::Overlap && self.namespaces.net == NetMode::Private {
            say("strategy = \"overlap\" with one private address is two containers with one address".to_owned());
        }
    }
}

/// What a set claims of the node in common: ports and held sockets that two containers want, and the order of starting.
pub(super) fn common_problems(containers: &[Container], problems: &mut Vec<String>) {
    let mut claimed: BTreeMap<String, &Name> = BTreeMap::new();
    for container in containers {
        let own_network = container.namespaces.net != NetMode::Host;
        let ports =
            container.ports.iter().filter(|_| !own_network).map(|port| format!("TCP port {port}"));
        let sockets = container.sockets.iter().map(|socket| match &socket.listen {
            Listen::Tcp(address) => format!("TCP port {}", address.port()),
            Listen::Udp(address) => format!("UDP port {}", address.port()),
            Listen::Unix(path) => format!("socket {path}"),
        });
        for claim in ports.chain(sockets).collect::<BTreeSet<_>>() {
            if let Some(other) = claimed.insert(claim.clone(), &container.name)
                && *other != container.name
            {
                problems.push(format!(
                    "containers `{other}` and `{}` both claim {claim}",
                    container.name
                ));
            }
        }
        for after in &container.after {
            if !containers.iter().any(|it| it.name == *after) {
                problems.push(format!(
                    "container `{}` starts after `{after}`, which the set does not have",
                    container.name
                ));
            }
        }
    }
    if let Some(name) = start_order(containers).err() {
        problems.push(format!("container `{name}` waits for itself, by way of `after`"));
    }
}

/// The containers' positions in an order in which each comes after those that it waits for; otherwise as described.
///
/// # Errors
/// The name of a container that waits for itself.
pub fn start_order(containers: &[Container]) -> Result<Vec<usize>, Name> {
    let mut order: Vec<usize> = Vec::new();
    while order.len() < containers.len() {
        let next = containers.iter().enumerate().find(|(at, container)| {
            let waits = |name: &Name| {
                let other = containers.iter().position(|it| it.name == *name);
                other.is_some_and(|other| !order.contains(&other))
            };
            !order.contains(at) && !container.after.iter().any(waits)
        });
        match next {
            Some((at, _)) => order.push(at),
            None => {
                let stuck = containers.iter().enumerate().find(|(at, _)| !order.contains(at));
                return stuck
                    .map_or(Ok(order.clone()), |(_, container)| Err(container.name.clone()));
            }
        }
    }
    Ok(order)
}

/// A name of at most 64 bytes (sethostname(2)) from letters, digits, `-` and `.`.
fn is_hostname(name: &str) -> bool {
    (1..=64).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.'))
        && !name.starts_with(['-', '.'])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn container(toml: &str) -> Container {
        let mut value: serde_json::Value = serde_json::from_str(toml).expect("json");
        let fields = value.as_object_mut().expect("object");
        fields.entry("name").or_insert_with(|| "c".into());
        fields.entry("image").or_insert_with(|| "i".into());
        serde_json::from_value(value).expect("container")
    }

    #[track_caller]
    fn problem(json: &str, expected: &str) {
        let mut problems = Vec::new();
        container(json).own_problems(&mut problems);
        let problems = problems.join("; ");
        assert!(
            if expected.is_empty() { problems.is_empty() } else { problems.contains(expected) },
            "{problems}"
        );
    }

    #[test]
    fn each_mistake_of_a_container_is_named() {
        problem(r#"{"mounts":[{"source":"/a/../b"}]}"#, "without `..`");
        problem(r#"{"tmpfs":[{"target":"/t"},{"target":"/t/"}]}"#, "two things are mounted at");
        problem(r#"{"devices":[{"path":"/etc/passwd"}]}"#, "below /dev");
        problem(r#"{"files":[{"target":"/f"}]}"#, "exactly one of content and from");
        problem(r#"{"files":[{"target":"/f","content":"","owner":"root"}]}"#, "1000:1000");
        problem(r#"{"namespaces":{"net":"private"}}"#, "wants [container.network]");
        problem(r#"{"network":{"address":"a","host_address":"b"}}"#, "only for");
        problem(r#"{"ulimits":{"files":1}}"#, "ulimit `files`");
        problem(r#"{"sysctls":{"net..x":"1"}}"#, "sysctl `net..x`");
        problem(r#"{"limits":{"cpu_weight":0}}"#, "from 1 to 10000");
        problem(r#"{"strategy":"handover"}"#, "to hand over");
        problem(r#"{"strategy":"overlap"}"#, "network of its own");
        problem(
            r#"{"strategy":"overlap","sockets":[{"name":"a","listen":"tcp://0.0.0.0:80"}],"ports":[81]}"#,
            "one port of the node",
        );
        problem(r#"{"watchdog_ms":100}"#, "notify = true");
        problem(r#"{"health":{"http":"https://x/"}}"#, "health.http");
        problem(r#"{"hostname":"-a"}"#, "host name");
        problem(r#"{"log_size":"1KiB"}"#, "log_size must be between");
        problem(r#"{"log_size":"2GiB"}"#, "log_size must be between");
        problem(r#"{"systemd":true}"#, "wants profile");
        problem(r#"{"systemd":true,"profile":"system","init":true}"#, "and systemd can");
        problem(
            r#"{"strategy":"handover","sockets":[{"name":"a","listen":"tcp://0.0.0.0:80"}],"notify":true,"watchdog_ms":5,
                "mounts":[{"source":"/"  ,"target":"/host"}],"ulimits":{"memlock":"unlimited"},"hugepages":{"2MiB":"64MiB"}}"#,
            "",
        );
    }

    #[test]
    fn containers_that_claim_one_port_or_wait_in_a_circle_are_refused() {
        let all = |list: &[&str]| {
            let containers: Vec<Container> = list.iter().map(|json| container(json)).collect();
            let mut problems = Vec::new();
            common_problems(&containers, &mut problems);
            problems.join("; ")
        };
        let held = r#"{"name":"b","sockets":[{"name":"a","listen":"tcp://0.0.0.0:80"}]}"#;
        assert!(all(&[r#"{"name":"a","ports":[80]}"#, held]).contains("both claim TCP port 80"));
        assert_eq!(all(&[r#"{"name":"a","ports":[80],"namespaces":{"net":"none"}}"#, held]), "");
        assert!(all(&[r#"{"name":"a","after":["x"]}"#]).contains("does not have"));
        let circle = [r#"{"name":"a","after":["b"]}"#, r#"{"name":"b","after":["a"]}"#];
        assert!(all(&circle).contains("`a` waits for itself"));
    }

    #[test]
    fn the_order_of_starting_keeps_to_after_and_else_to_the_description() {
        let containers = [
            container(r#"{"name":"a","after":["c"]}"#),
            container(r#"{"name":"b"}"#),
            container(r#"{"name":"c"}"#),
        ];
        assert_eq!(start_order(&containers), Ok(vec![1, 2, 0]));
    }
}
