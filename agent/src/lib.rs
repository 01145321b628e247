//! The agent: Layer0's PID 1 and everything a node does, as one static binary with four roles.
//!
//! | room | modules |
//! |---|---|
//! | PID 1 | [`init`]: early mounts, console, reaping, supervising the agent, pivot, shutdown |
//! | the agent's loop | [`agent`]: events, ImageSets, rolls, the link to the boot server, the report |
//! | the machine | [`modules`], [`hardware`], [`memory`], [`network`], [`time`], [`entropy`], [`identity`], [`last_crash`], [`logging`] |
//! | images | [`transport`], [`registry`], [`store`], [`cache`], [`layer`], [`pull`], [`prefetch`], [`mounts`] |
//! | containers | [`containers`], [`health`], [`monitor`], [`container_init`], [`container_exec`] |
//! | an operator's look inside | [`channel`]: logs and commands |
//! | the kernel | [`sys`]: the only place with unsafe code |
//!
//! Everywhere the same rule: decide in pure code, act at the edge.

// A panic on a node aborts the agent: nothing here may cause one. Tests may.
#![cfg_attr(
    not(test),
    deny(
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::unreachable,
        clippy::unwrap_used
    )
)]

pub mod paths;

pub mod init;

pub mod agent;

pub mod entropy;
pub mod hardware;
pub mod identity;
pub mod last_crash;
pub mod logging;
pub mod memory;
pub mod modules;
pub mod network;
pub mod time;

pub mod cache;
pub mod imageapi;
pub mod layer;
pub mod mounts;
pub mod prefetch;
pub mod pull;
pub mod registry;
pub mod store;
pub mod transport;
pub mod why;

pub mod channel;

pub mod container_exec;
pub mod container_init;
pub mod containers;
pub mod health;
pub mod monitor;

pub mod sys;
