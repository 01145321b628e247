//! ImageSets: from `imageset.toml` and root filesystems to layers, an OCI layout and an OCI registry.
//!
//! Not here: running anything, mounting anything, Layer0 images (crate `initramfs`), and what a node does with a set.
//!
//! ```text
//! imageset.toml --description--> SetSource --build--> OCI layout (BuiltSet) --push--> registry
//!                                   |                                                   |
//!                    source, layer: dir, tar, binary, oci, docker-archive,          resolve: reference -> digest
//!                    registry, debian
//! ```
//!
//! | module | what it holds |
//! |---|---|
//! | [`description`] | `imageset.toml`: read and checked, errors with file, line, column and key |
//! | [`source`] | where an image's layers come from |
//! | [`layer`] | the reproducible tar writer and the compressed layer blob |
//! | [`build`] | a set into an OCI layout; the same inputs give the same digests |
//! | [`mount`] | an image as one read-only file system: EROFS or squashfs |
//! | [`place`] | a layout or a registry, and reading a set there without its layers |
//! | [`transfer`] | a set from one place to another, byte for byte, with its signatures |
//! | [`push`] | a built set into a registry: a transfer |
//! | [`inspect`] | what a set consists of |
//! | [`diff`](mod@diff) | which files and bytes changed between two sets |
//! | [`resolve`] | a reference to its digest and manifest |
//! | [`client`] | the registry client that all of them use: trust, authorization, resumed uploads, retries |
//! | [`credentials`] | who we are to a registry: auth.json, Docker's config.json, credential helpers |
//! | [`sign`] | keys, and signatures beside what lies in a registry |

pub mod description;

mod blob;
pub mod layer;
pub mod mount;
pub mod source;
mod stack;

pub mod build;

pub mod client;
pub mod credentials;
pub mod diff;
pub mod inspect;
pub mod place;
mod progress;
pub mod push;
pub mod resolve;
pub mod sign;
pub mod transfer;
