//! What `cargo xtask bench layer0` runs inside its machines. Two static programs, and what they share:
//!
//! | program | what it is |
//! |---|---|
//! | `floor` | an init that loads the modules it was given and gets an address by DHCP, and nothing else: nobody can be faster |
//! | `probe` | starts any other init as PID 1 and says on the console when it began, when there was an address, what memory was in use |
//!
//! Neither is part of Layer0, nor of any example. [`dhcp`] is as much of RFC 2131 as one lease takes, [`netlink`] as much of
//! rtnetlink(7).

pub mod dhcp;
pub mod netlink;
