//! Nothing but a place for `tests/sigstore.rs`, where our signatures and the sigstore crate's meet.
