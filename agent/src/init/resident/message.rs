//! What PID 1 reads of a request ([`super::super::control`]): pure, and where it lies, without memory of its own.

use crate::init::control::{ControlError, Fields, MAX_PROGRAM};
use crate::init::shutdown::End;

/// A request as PID 1 sees it.
#[derive(Debug)]
pub enum Asked<'a> {
    /// The machine ends like this.
    End(End),
    /// The agent has reached its work.
    Steady,
    /// The next agents are started from this file.
    Agent(&'a str),
    /// A pivot, with its fields behind the verb.
    Pivot(Fields<'a>),
}

/// Reads a request.
///
/// # Errors
/// [`ControlError::Format`] for what is none.
pub fn parse(bytes: &[u8]) -> Result<Asked<'_>, ControlError> {
    let mut fields = Fields::new(bytes)?;
    let asked = match fields.next() {
        Some("poweroff") => Asked::End(End::PowerOff),
        Some("reboot") => Asked::End(End::Reboot),
        Some("kexec") => Asked::End(End::Kexec),
        Some("steady") => Asked::Steady,
        Some("agent") => {
            let fits = |path: &&str| path.starts_with('/') && path.len() <= MAX_PROGRAM;
            let path = fields.next().filter(fits);
            Asked::Agent(path.ok_or(ControlError::Format("no absolute path of at most 255 bytes"))?)
        }
        Some("pivot") => return Ok(Asked::Pivot(fields)),
        _ => return Err(ControlError::Format("unknown request")),
    };
    match fields.next() {
        None => Ok(asked),
        Some(_) => Err(ControlError::Format("there is more than the request takes")),
    }
}
