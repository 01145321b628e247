//! Stub: to be filled by its room.
pub mod packet;
