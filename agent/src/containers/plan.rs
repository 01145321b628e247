//! From an ImageSet's container and its image's config to a [`Spec`]. Pure.

use std::path::PathBuf;
use std::str::FromStr;

use protocol::ids::{Digest, Name, Version};
use protocol::imageset::{
    Container, DEFAULT_LOG_SIZE, DEFAULT_STOP_TIMEOUT_S, LOG_SIZES, Profile, signal_number,
};
use protocol::oci::RunConfig;

use super::files::{self, NodeFacts, Subject, TemplateError};
use super::view::{Keeping, View};
use super::{Spec, valid_id};

/// PATH where neither image nor set has one: as Docker and podman.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Value of `container=`, which systemd and others look for.
const CONTAINER_ENV: &str = "layercake";
/// SIGTERM.
const SIGTERM: i32 = 15;
/// SIGRTMIN+3: what systemd as PID 1 takes for `halt` (systemd(1)).
const SIGRTMIN_3: i32 = 37;

/// What the node decides about an instance.
#[derive(Debug, Clone)]
pub struct Place {
    /// The instance's id.
    pub id: String,
    /// The ImageSet's name.
    pub set: Name,
    /// Its digest.
    pub set_digest: Digest,
    /// The mounted root.
    pub root: PathBuf,
    /// The node's host name.
    pub hostname: String,
    /// Where the log is written.
    pub log_dir: PathBuf,
    /// How often it was started again before.
    pub restarts: u32,
    /// The set's version, where it is known.
    pub version: Option<Version>,
    /// Where persistent directories lie.
    pub keeping: Keeping,
    /// What is known of the node, and the files the server gave it.
    pub facts: NodeFacts,
}

/// Why a container of a set cannot be run as described. Each names the container.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// Neither the set nor the image says what to run.
    #[error(
        "container `{0}`: neither its command nor its image's Entrypoint or Cmd says what to run"
    )]
    NoCommand(Name),
    /// The id cannot name a directory.
    #[error("container `{0}`: `{1}` is not a container id")]
    InvalidId(Name, String),
    /// A stop signal that is none.
    #[error("container `{0}`: stop signal `{1}` is not known")]
    StopSignal(Name, String),
    /// A capability that the kernel does not have.
    #[error("container `{0}`: capability `{1}` is not known")]
    Capability(Name, String),
    /// A NUL byte where the kernel ends strings.
    #[error("container `{0}`: a NUL byte in its image's config")]
    Nul(Name),
    /// A kernel setting of the node's.
    #[error(
        "container `{0}`: sysctl `{1}` is not of a namespace of its own, and only a privileged container sets the node's"
    )]
    Sysctl(Name, String),
    /// `storage = "disk"` without a disk.
    #[error(
        "container `{0}`: persistent `{1}` wants a disk labelled LAYERCAKE, and this node has none"
    )]
    NoDisk(Name, Name),
    /// A file that the server has not given.
    #[error("container `{0}`: the boot server has given this node no file `{1}`")]
    NoFile(Name, Name),
    /// A template that cannot be filled in.
    #[error("container `{0}`: the template for {1}: {2}")]
    Template(Name, String, TemplateError),
    /// A template that is no text.
    #[error("container `{0}`: the template for {1} is not UTF-8")]
    NotText(Name, String),
    /// Too much.
    #[error("container `{0}`: its files are larger than {size} bytes together", size = files::MAX_FILES)]
    FilesTooLarge(Name),
}

impl Spec {
    /// Merges what the set says of a container with its image's config; the set wins. The rules:
    ///
    /// - `command` replaces Entrypoint and Cmd both; without it they are joined.
    /// - `env` replaces keys of the same name; PATH and HOSTNAME are added when missing, `container=layercake` always.
    /// - `user` and `workdir` replace the image's; empty ones of the image count as absent; the working directory is `/` then.
    /// - the stop signal is the set's, the image's, else SIGTERM, or SIGRTMIN+3 for a whole system.
    ///
    /// # Errors
    /// [`PlanError`] names the container and what is wrong with it.
    pub fn plan(place: Place, container: &Container, image: &RunConfig) -> Result<Self, PlanError> {
        let name = &container.name;
        if !valid_id(&place.id) {
            return Err(PlanError::InvalidId(name.clone(), place.id));
        }
        for capability in &container.capabilities {
            caps::Capability::from_str(capability)
                .map_err(|_| PlanError::Capability(name.clone(), capability.clone()))?;
        }
        let argv = argv(container, image);
        if argv.first().is_none_or(String::is_empty) {
            return Err(PlanError::NoCommand(name.clone()));
        }
        let hostname = container.hostname.clone().unwrap_or(place.hostname);
        let subject = Subject { set: &place.set, version: place.version.as_ref(), container: name };
        let spec = Self {
            argv,
            view: View::plan(&place.set, container, &place.keeping)?,
            files: files::place(container, &place.facts, subject)?,
            env: environment(container, image, &hostname),
            user: container.user.clone().or_else(|| non_empty(image.user.as_deref())),
            workdir: absolute(
                container.workdir.clone().or_else(|| non_empty(image.working_dir.as_deref())),
            ),
            stop_signal: stop_signal(container, image)?,
            stop_timeout_s: container.stop_timeout_s.unwrap_or(DEFAULT_STOP_TIMEOUT_S),
            id: place.id,
            set: place.set,
            name: name.clone(),
            set_digest: place.set_digest,
            root: place.root,
            hostname,
            profile: container.profile,
            capabilities: container.capabilities.clone(),
            log_dir: place.log_dir,
            log_size: container.log_size.map_or(DEFAULT_LOG_SIZE, |size| {
                size.0.clamp(*LOG_SIZES.start(), *LOG_SIZES.end())
            }),
            restart: container.restart,
            restarts: place.restarts,
            sockets: container.sockets.clone(),
            notify: container.notify,
            watchdog_ms: container.watchdog_ms,
        };
        let texts = spec.argv.iter().chain(&spec.env).chain(&spec.user).chain([&spec.workdir]);
        if texts.into_iter().any(|text| text.contains('\0')) {
            return Err(PlanError::Nul(name.clone()));
        }
        Ok(spec)
    }
}

fn argv(container: &Container, image: &RunConfig) -> Vec<String> {
    if container.command.is_empty() {
        image.entrypoint.iter().chain(&image.cmd).cloned().collect()
    } else {
        container.command.clone()
    }
}

/// Entries of the image without `=` or key mean nothing and are left out; of several with one key the last counts.
fn environment(container: &Container, image: &RunConfig, hostname: &str) -> Vec<String> {
    let mut pairs: Vec<(&str, &str)> = Vec::new();
    let mut set = |key, value| match pairs.iter_mut().find(|(known, _)| *known == key) {
        Some(pair) => pair.1 = value,
        None => pairs.push((key, value)),
    };
    set("PATH", DEFAULT_PATH);
    set("HOSTNAME", hostname);
    if container.systemd {
        // Its console is a log: no colours, and no line that is painted over and over.
        set("TERM", "dumb");
    }
    for entry in &image.env {
        if let Some((key, value)) = entry.split_once('=')
            && !key.is_empty()
        {
            set(key, value);
        }
    }
    for (key, value) in &container.env {
        set(key, value);
    }
    set("container", CONTAINER_ENV);
    pairs.into_iter().map(|(key, value)| format!("{key}={value}")).collect()
}

fn non_empty(text: Option<&str>) -> Option<String> {
    text.filter(|text| !text.is_empty()).map(str::to_owned)
}

fn absolute(workdir: Option<String>) -> String {
    match workdir {
        None => "/".to_owned(),
        Some(path) if path.starts_with('/') => path,
        Some(path) => format!("/{path}"),
    }
}

fn stop_signal(container: &Container, image: &RunConfig) -> Result<i32, PlanError> {
    let of_image = image.stop_signal.as_ref().filter(|text| !text.is_empty());
    match container.stop_signal.as_ref().or(of_image) {
        Some(text) => signal_number(text)
            .ok_or_else(|| PlanError::StopSignal(container.name.clone(), text.clone())),
        None if container.systemd || container.profile == Profile::System => Ok(SIGRTMIN_3),
        None => Ok(SIGTERM),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place() -> Place {
        Place {
            id: "hello-web-1".to_owned(),
            set: "hello".parse().expect("name"),
            set_digest: Digest::of(b"set"),
            root: "/run/root".into(),
            hostname: "node7".to_owned(),
            log_dir: "/run/log/hello".into(),
            restarts: 2,
            version: None,
            keeping: Keeping { memory: "/run/persistent".into(), disk: None },
            facts: NodeFacts::default(),
        }
    }

    #[track_caller]
    fn plan(container: &str, image: &str) -> Result<Spec, PlanError> {
        let mut document: serde_json::Value = serde_json::from_str(container).expect("container");
        document["name"] = "web".into();
        document["image"] = "web".into();
        let container = serde_json::from_value(document).expect("container");
        Spec::plan(place(), &container, &serde_json::from_str(image).expect("image"))
    }

    #[test]
    fn the_command_of_the_set_replaces_entrypoint_and_cmd() {
        let image = r#"{"Entrypoint":["/entry","-x"],"Cmd":["serve"]}"#;
        let table = [
            ("{}", image, vec!["/entry", "-x", "serve"]),
            (r#"{"command":["sh"]}"#, image, vec!["sh"]),
            ("{}", r#"{"Cmd":["sh"]}"#, vec!["sh"]),
            ("{}", r#"{"Entrypoint":["init"],"Cmd":null}"#, vec!["init"]),
        ];
        for (container, image, expected) in table {
            assert_eq!(plan(container, image).expect(container).argv, expected);
        }
    }

    #[test]
    fn the_environment_is_the_images_with_the_sets_over_it() {
        let path = format!("PATH={DEFAULT_PATH}");
        let table = [
            ("{}", "{}", vec![path.as_str(), "HOSTNAME=node7", "container=layercake"]),
            (
                r#"{"env":{"B":"2","C":"x=y"}}"#,
                r#"{"Env":["PATH=/bin","A=1","B=1","A=0","junk","=junk","container=docker"]}"#,
                vec!["PATH=/bin", "HOSTNAME=node7", "A=0", "B=2", "container=layercake", "C=x=y"],
            ),
        ];
        for (container, image, expected) in table {
            let container = container.replacen('{', r#"{"command":["sh"],"#, 1).replace(",}", "}");
            assert_eq!(plan(&container, image).expect("plan").env, expected);
        }
    }

    #[test]
    fn user_directory_and_signal_fall_back_from_set_to_image_to_default() {
        let run = r#"{"command":["sh"]}"#;
        let table = [
            (run, "{}", (None, "/", 15)),
            (run, r#"{"User":"","WorkingDir":"","StopSignal":""}"#, (None, "/", 15)),
            (
                run,
                r#"{"User":"web","WorkingDir":"srv","StopSignal":"SIGINT"}"#,
                (Some("web"), "/srv", 2),
            ),
            (
                r#"{"command":["sh"],"user":"7:8","workdir":"/w","stop_signal":"QUIT"}"#,
                r#"{"User":"web","WorkingDir":"/srv","StopSignal":"SIGINT"}"#,
                (Some("7:8"), "/w", 3),
            ),
            (r#"{"command":["sh"],"profile":"system"}"#, "{}", (None, "/", 37)),
        ];
        for (container, image, (user, workdir, signal)) in table {
            let spec = plan(container, image).expect(container);
            assert_eq!(
                (spec.user.as_deref(), spec.workdir.as_str(), spec.stop_signal),
                (user, workdir, signal)
            );
            assert_eq!((spec.stop_timeout_s, spec.restarts), (DEFAULT_STOP_TIMEOUT_S, 2));
        }
    }

    #[test]
    fn what_cannot_run_is_named() {
        let table = [
            ("{}", "{}", "says what to run"),
            ("{}", r#"{"Cmd":[""]}"#, "says what to run"),
            ("{}", r#"{"Cmd":["sh"],"StopSignal":"SIGNO"}"#, "`SIGNO`"),
            (r#"{"capabilities":["CAP_MAGIC"]}"#, r#"{"Cmd":["sh"]}"#, "`CAP_MAGIC`"),
            ("{}", "{\"Cmd\":[\"sh\",\"a\\u0000b\"]}", "NUL"),
        ];
        for (container, image, expected) in table {
            let message = plan(container, image).expect_err(container).to_string();
            assert!(message.contains("container `web`") && message.contains(expected), "{message}");
        }
    }
}
