//! The node's ImageAPI (`/imageapi/v1`): attachments, mounts and containers by HTTP, wire-compatible with Kraken's ImageAPI 0.2.0.
//!
//! ```text
//! socket ─▶ server ─▶ api ─▶ route, schema (what is asked for, or 4xx) ─▶ engine ─▶ drivers (kernel, registries)
//!                                                                            └────▶ table (who holds whom)
//! ```
//! On a Unix socket for root alone (`<run>/imageapi.sock`), and by TCP with mutual TLS where a node is told to. What ImageSets do is
//! not seen here: both use the same mounts, containers and store, each in directories of its own.

pub mod api;
pub mod client;
mod containers;
mod drivers;
pub mod engine;
pub mod error;
pub mod iscsi;
mod make;
mod needs;
pub mod route;
mod schema;
pub mod server;
pub mod service;
mod table;
pub mod tls;
pub mod types;
