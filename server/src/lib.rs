//! The boot server: DHCP, TFTP and what else `layercake serve` runs.

pub mod dhcp;
pub mod tftp;
