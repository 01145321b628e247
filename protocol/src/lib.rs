//! What all parts of Layercake agree on: identifiers, documents, the kernel command line, OCI words.
//!
//! Pure by rule: no I/O, no async, no clock. Parsers take `&str` or `&[u8]` and return owned, checked values.
//!
//! | module | what it holds |
//! |---|---|
//! | [`ids`] | MAC, node id, name, version and digest newtypes |
//! | [`reference`](mod@reference) | where an image or ImageSet lives: registry, repository, tag, digest |
//! | [`registries`] | mirrors, CA certificates and credentials of registries, for nodes and the server |
//! | [`boot_args`] | the kernel command line: parse and render side by side |
//! | [`network`] | interfaces, VLANs, bonds and addresses: of the command line and of the site file |
//! | [`imageset`] | the ImageSet description that nodes read |
//! | [`oci`] | descriptors, manifests, indexes, and resolving an ImageSet from its index |
//! | [`signature`] | signatures in cosign's key layout: build, read and verify |
//! | [`node`] | the desired and the observed document of a node |
//! | [`facts`] | a node's hardware: what its agent reports, and images are built for |
//! | [`api`] | request, reply and error bodies of `/v1` |
//! | [`why`] | why a node is not what is wanted of it |
//! | [`channel`] | logs and commands through the server: requests, frames, flow control |
//! | [`layer0`] | `manifest.json` of a built Layer0 |

pub mod ids;
pub mod reference;
pub mod registries;

pub mod boot_args;
pub mod network;

pub mod imageset;
pub mod oci;
pub mod signature;

pub mod api;
pub mod channel;
pub mod facts;
pub mod node;
pub mod why;

pub mod layer0;

/// Version of the agent-server protocol that this build speaks. Both sides accept one version of difference.
pub const PROTOCOL_VERSION: u32 = 1;
