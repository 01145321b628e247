//! The node's ImageAPI (`/imageapi/v1`).
pub mod error;
pub mod route;
mod schema;
pub mod types;
