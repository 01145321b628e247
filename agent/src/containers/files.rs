//! Files that are put over an image's: from the description, or from the server by name. Pure; container-init writes them to
//! a memory file system that only the container sees.
//!
//! Their contents may be secrets: they are in no spec, no log and no message, and `Debug` does not show them.

use std::collections::BTreeMap;
use std::net::IpAddr;

use protocol::ids::{Mac, Name, Version};
use protocol::imageset::Container;
use protocol::node::FileContent;
use serde::{Deserialize, Serialize};

use super::plan::PlanError;
use super::view::owner;

/// Most bytes of one container's files together: they are held in memory three times while it starts.
pub const MAX_FILES: usize = 4 << 20;
/// Longest `{{ … }}` that is looked for an end.
const MAX_KEY: usize = 64;

/// A file as it will stand in the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlacedFile {
    /// Absolute path in the container.
    pub target: String,
    /// What is in it.
    pub content: FileContent,
    /// Permissions.
    pub mode: u32,
    /// User and group; the container's user when absent.
    pub owner: Option<(u32, u32)>,
}

/// What a template may say of the node, and the files that the server gave it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeFacts {
    /// The node's id.
    pub name: String,
    /// Its addresses, that of the first interface first.
    pub addresses: Vec<IpAddr>,
    /// Hardware address of its first interface.
    pub mac: Option<Mac>,
    /// Files and secrets by name.
    pub files: BTreeMap<Name, FileContent>,
}

/// A text that is no template, or asks for what is not known.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// `{{` without `}}`.
    #[error("a `{{{{` without its `}}}}`")]
    Open,
    /// Not a key.
    #[error(
        "`{0}` is not known: node.name, node.address, node.addresses, node.mac, set.name, set.version, container.name and value.NAME are"
    )]
    Unknown(String),
    /// A key that has no value on this node.
    #[error("`{0}` has no value on this node")]
    Missing(String),
}

/// What a template's keys stand for, besides the node's facts.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    /// The set.
    pub set: &'a Name,
    /// Its version.
    pub version: Option<&'a Version>,
    /// The container.
    pub container: &'a Name,
}

/// Replaces every `{{ key }}`. There is nothing else in the language; a `{{` that is meant cannot be written.
///
/// # Errors
/// [`TemplateError`] for a key that is not known or has no value, and for a `{{` without an end.
pub fn render(
    text: &str,
    facts: &NodeFacts,
    subject: Subject<'_>,
) -> Result<String, TemplateError> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("{{") {
        out.push_str(before);
        let (key, after) = after
            .split_once("}}")
            .filter(|(key, _)| key.len() <= MAX_KEY)
            .ok_or(TemplateError::Open)?;
        let key = key.trim();
        out.push_str(&value(key, facts, subject)?);
        rest = after;
    }
    out.push_str(rest);
    Ok(out)
}

fn value(key: &str, facts: &NodeFacts, subject: Subject<'_>) -> Result<String, TemplateError> {
    let found = match key {
        "node.name" => Some(facts.name.clone()).filter(|name| !name.is_empty()),
        "node.address" => facts.addresses.first().map(ToString::to_string),
        "node.addresses" => {
            let all: Vec<String> = facts.addresses.iter().map(ToString::to_string).collect();
            Some(all.join(" "))
        }
        "node.mac" => facts.mac.map(|mac| mac.to_string()),
        "set.name" => Some(subject.set.to_string()),
        "set.version" => subject.version.map(ToString::to_string),
        "container.name" => Some(subject.container.to_string()),
        other => {
            // A short text that the server gives to some nodes and not to others, or differently: what a group has in common.
            let name = other.strip_prefix("value.").and_then(|name| name.parse::<Name>().ok());
            let name = name.ok_or_else(|| TemplateError::Unknown(other.to_owned()))?;
            let given = facts.files.get(&name).and_then(|file| std::str::from_utf8(&file.0).ok());
            given.map(|text| text.trim_end_matches('\n').to_owned())
        }
    };
    found.ok_or_else(|| TemplateError::Missing(key.to_owned()))
}

/// The files of a container as they will stand in it.
///
/// # Errors
/// [`PlanError`] for a file that the server has not given, a template that says what is not known, or too many bytes.
pub(super) fn place(
    container: &Container,
    facts: &NodeFacts,
    subject: Subject<'_>,
) -> Result<Vec<PlacedFile>, PlanError> {
    let name = &container.name;
    let mut placed = Vec::new();
    for file in &container.files {
        let mut content = match (&file.content, &file.from) {
            (Some(text), _) => FileContent(text.clone().into_bytes()),
            (None, Some(from)) => facts
                .files
                .get(from)
                .cloned()
                .ok_or_else(|| PlanError::NoFile(name.clone(), from.clone()))?,
            (None, None) => FileContent(Vec::new()),
        };
        if file.template {
            let failed = |problem| PlanError::Template(name.clone(), file.target.clone(), problem);
            let text = std::str::from_utf8(&content.0)
                .map_err(|_| PlanError::NotText(name.clone(), file.target.clone()))?;
            content = FileContent(render(text, facts, subject).map_err(failed)?.into_bytes());
        }
        let default = if file.from.is_some() { 0o400 } else { 0o644 };
        placed.push(PlacedFile {
            target: file.target.clone(),
            content,
            mode: file.mode.map_or(default, |mode| mode.0),
            owner: file.owner.as_deref().and_then(owner),
        });
    }
    if let Some(hostname) = &container.hostname
        && !placed.iter().any(|file| file.target == "/etc/hostname")
    {
        placed.push(PlacedFile {
            target: "/etc/hostname".to_owned(),
            content: FileContent(format!("{hostname}\n").into_bytes()),
            mode: 0o644,
            owner: Some((0, 0)),
        });
    }
    if placed.iter().map(|file| file.content.0.len()).sum::<usize>() > MAX_FILES {
        return Err(PlanError::FilesTooLarge(name.clone()));
    }
    Ok(placed)
}

/// Feeds the renderer arbitrary bytes, for fuzzing.
pub fn fuzz_template(data: &[u8]) {
    let name: Result<Name, _> = "n".parse();
    if let (Ok(text), Ok(name)) = (std::str::from_utf8(data), name) {
        let subject = Subject { set: &name, version: None, container: &name };
        drop(render(text, &NodeFacts::default(), subject));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn facts() -> NodeFacts {
        NodeFacts {
            name: "n7".to_owned(),
            addresses: vec!["10.9.0.7".parse().expect("ip"), "fd00::7".parse().expect("ip")],
            mac: Some(Mac([2, 0, 0, 0, 0, 7])),
            files: [("key", "s3cret"), ("rack", "r12\n")]
                .map(|(name, text)| (name.parse().expect("name"), FileContent(text.into())))
                .into(),
        }
    }

    #[track_caller]
    fn rendered(text: &str) -> Result<String, TemplateError> {
        let (set, version) = ("site".parse().expect("name"), "3".parse().expect("version"));
        let container = "web".parse().expect("name");
        render(
            text,
            &facts(),
            Subject { set: &set, version: Some(&version), container: &container },
        )
    }

    #[test]
    fn keys_are_replaced_and_unknown_ones_are_named() {
        let table = [
            ("a", Ok("a")),
            ("{{node.name}}:{{ node.address }}", Ok("n7:10.9.0.7")),
            ("{{ value.rack }}", Ok("r12")),
            ("{{ value.row }}", Err("`value.row` has no value on this node")),
            ("{{ value.R W }}", Err("is not known")),
            ("{{ node.addresses }} {{ node.mac }}", Ok("10.9.0.7 fd00::7 02:00:00:00:00:07")),
            ("{{ set.name }}-{{ set.version }}-{{ container.name }} } {", Ok("site-3-web } {")),
            ("{{ node.nmae }}", Err("`node.nmae` is not known")),
            ("{{ }}", Err("`` is not known")),
            ("{{ node.name", Err("without its")),
        ];
        for (text, expected) in table {
            match (rendered(text), expected) {
                (Ok(out), Ok(expected)) => assert_eq!(out, expected),
                (Err(error), Err(part)) => assert!(error.to_string().contains(part), "{error}"),
                (out, expected) => panic!("{text}: {out:?}, not {expected:?}"),
            }
        }
    }

    #[test]
    fn files_come_from_the_description_or_the_server_and_secrets_are_not_shown() {
        let json = serde_json::json!({"name": "web", "image": "web", "hostname": "own", "files": [
            {"target": "/a", "content": "{{ node.name }}", "template": true, "owner": "5:6"},
            {"target": "/b", "content": "{{ node.name }}", "mode": "0600"},
            {"target": "/c", "from": "key"},
        ]});
        let mut container: Container = serde_json::from_value(json).expect("container");
        let (set, name) = ("site".parse().expect("name"), "web".parse().expect("name"));
        let subject = Subject { set: &set, version: None, container: &name };
        let files = place(&container, &facts(), subject).expect("place");
        let seen: Vec<_> = files
            .iter()
            .map(|it| (it.target.as_str(), it.content.0.as_slice(), it.mode, it.owner))
            .collect();
        assert_eq!(
            seen,
            [
                ("/a", &b"n7"[..], 0o644, Some((5, 6))),
                ("/b", b"{{ node.name }}", 0o600, None),
                ("/c", b"s3cret", 0o400, None),
                ("/etc/hostname", b"own\n", 0o644, Some((0, 0))),
            ]
        );
        assert!(!format!("{files:?}{:?}", facts()).contains("s3cret"));
        container.files[2].from = Some("other".parse().expect("name"));
        let error = place(&container, &facts(), subject).expect_err("no file").to_string();
        assert!(error.contains("`other`"), "{error}");
    }

    proptest! {
        #[test]
        fn no_template_makes_the_renderer_panic(text in ".{0,80}", keys in "[{} a-z.]{0,60}") {
            fuzz_template(text.as_bytes());
            fuzz_template(keys.as_bytes());
        }
    }
}
