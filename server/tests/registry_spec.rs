//! The embedded registry held to the OCI distribution spec 1.1, section by section, beside Debian's docker-registry and
//! with Debian's tools; and to what it promises beyond: tokens, collection, crashes, memory.
//!
//! Needs skopeo, docker-registry and podman; says how to install them where they are missing. Loopback only.

#[path = "harness/registry.rs"]
mod harness;

#[path = "registry_spec/collection.rs"]
mod collection;
#[path = "registry_spec/crash.rs"]
mod crash;
#[path = "registry_spec/differential.rs"]
mod differential;
#[path = "registry_spec/discovery.rs"]
mod discovery;
#[path = "registry_spec/management.rs"]
mod management;
#[path = "registry_spec/memory.rs"]
mod memory;
#[path = "registry_spec/peers.rs"]
mod peers;
#[path = "registry_spec/program.rs"]
mod program;
#[path = "registry_spec/pushing.rs"]
mod pushing;
#[path = "registry_spec/tokens.rs"]
mod tokens;

use std::net::SocketAddr;

use protocol::ids::Digest;
use protocol::oci::MEDIA_INDEX;

use harness::{Answer, MANIFEST_TYPE, ask, upload as blob};

/// Pushes a manifest.
fn put(address: SocketAddr, repository: &str, key: &str, text: &str) -> Answer {
    let path = format!("/v2/{repository}/manifests/{key}");
    ask(address, "PUT", &path, MANIFEST_TYPE, text.as_bytes())
}

/// Pushes an index of these manifests.
fn put_index(address: SocketAddr, repository: &str, key: &str, entries: &[Digest]) -> Digest {
    let entry = |digest: &Digest| {
        format!(
            r#"{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"{digest}","size":2}}"#
        )
    };
    let entries: Vec<String> = entries.iter().map(entry).collect();
    let text = format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, entries.join(","));
    let path = format!("/v2/{repository}/manifests/{key}");
    let kind = format!("content-type: {MEDIA_INDEX}\r\n");
    assert_eq!(ask(address, "PUT", &path, &kind, text.as_bytes()).status, 201);
    Digest::of(text.as_bytes())
}

fn get(address: SocketAddr, path: &str) -> Answer {
    ask(address, "GET", path, "", b"")
}

fn delete(address: SocketAddr, path: &str) -> Answer {
    ask(address, "DELETE", path, "", b"")
}

fn json(answer: &Answer) -> serde_json::Value {
    serde_json::from_slice(&answer.body).expect("JSON")
}
