//! What an iSCSI initiator of the kernel's (`iscsi_tcp`) leaves to user space: the login (RFC 7143, 6 and 11.12) and the orders by
//! netlink that make a session of a connection that is logged in. Pure but for `netlink::Socket`.
//!
//! There is nobody who connects again: when the connection breaks, the kernel fails what is read and written after its
//! recovery time.

pub(super) mod login;
pub(super) mod netlink;

pub use login::fuzz_login;
