//! The `layercake` binary's parts.

pub mod registry;
