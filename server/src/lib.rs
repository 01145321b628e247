//! The boot server and the operator's commands, as a library under the `layercake` binary.
//!
//! | module | what it holds |
//! |---|---|
//! | [`config`] | `layercake.toml`: types, checks, errors that name file, line and key |
//! | [`timeline`], [`rolls`], [`desired`], [`boot`], [`overlays`], [`why`] | what is decided, without I/O |
//! | [`storage`] | the storage trait, and SQLite behind it |
//! | [`inventory`] | every node and roll in RAM; the one place where they change |
//! | [`layer0`] | Layer0 builds by digest, and which of them a machine boots |
//! | [`sources`] | from `NAME:VERSION` to a digest: the embedded registry or an external one |
//! | [`channels`] | logs and commands: where operators and nodes meet, and what passes between them |
//! | [`http`] | the HTTP routes |
//! | [`dhcp`], [`tftp`], [`registry`] | the other services |
//! | [`serve`] | opens the ports and runs it all |
//! | [`cli`] | the command line, one file per subcommand |

pub mod config;

pub mod boot;
pub mod desired;
pub mod overlays;
pub mod rolls;
pub mod timeline;
pub mod why;

pub mod inventory;
pub mod layer0;
pub mod sources;
pub mod storage;

pub mod channels;
pub mod dhcp;
pub mod files;
pub mod http;
pub mod registries;
pub mod registry;
pub mod tftp;

pub mod clock;
pub mod serve;

pub mod cli;
