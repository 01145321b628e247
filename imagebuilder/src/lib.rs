//! ImageSets: from `imageset.toml` and root filesystems to layers, an OCI layout and an OCI registry.
//!
//! Not here: running anything, mounting anything, Layer0 images (crate `initramfs`), and what a node does with a set.
//!
//! ```text
//! imageset.toml --description--> SetSource --build--> OCI layout (BuiltSet) --push--> registry
//!                                   |                                                   |
//!                    source, layer: dir, tar, binary, oci, docker-archive           resolve: reference -> digest
//! ```
//!
//! | module | what it holds |
//! |---|---|
//! | [`description`] | `imageset.toml`: read and checked, errors with file, line, column and key |
//! | [`source`] | where an image's layers come from |
//! | [`layer`] | the reproducible tar writer and the compressed layer blob |
//! | [`build`] | a set into an OCI layout; the same inputs give the same digests |
//! | [`push`] | an OCI layout into a registry |
//! | [`resolve`] | a reference to its digest and manifest |
//! | [`client`] | the registry client that all of them use: trust, authorization, resumed uploads, retries |
//! | [`credentials`] | who we are to a registry: auth.json, Docker's config.json, credential helpers |

pub mod description;

mod blob;
pub mod layer;
pub mod source;

pub mod build;

pub mod client;
pub mod credentials;
pub mod diff;
pub mod inspect;
pub mod place;
mod progress;
pub mod push;
pub mod resolve;
pub mod transfer;
