//! Stub: to be filled by its room.
