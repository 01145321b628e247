//! Which file agents are started from: pure. PID 1's own, or another that the agent named, until that one fails.

use std::ffi::CStr;

use crate::init::control::MAX_PROGRAM;

/// PID 1's own program.
pub const OWN: &CStr = c"/proc/self/exe";
/// Deaths of another program before it was steady that end its trial.
const TRIES: i32 = 3;

/// The agent's program.
#[derive(Debug, Clone, Copy)]
pub struct Program {
    path: [u8; MAX_PROGRAM + 1],
    steady: bool,
    deaths: i32,
}

impl Program {
    /// The program at this path, which has died so often; the empty path is PID 1's own.
    #[must_use]
    pub fn new(path: &str, deaths: i32) -> Self {
        let mut this = Self { path: [0; MAX_PROGRAM + 1], steady: false, deaths };
        for (to, from) in this.path.iter_mut().take(MAX_PROGRAM).zip(path.bytes()) {
            *to = from;
        }
        this
    }

    /// The path; empty for PID 1's own program.
    #[must_use]
    pub fn other(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.path).unwrap_or_default()
    }

    /// The file to execute.
    #[must_use]
    pub fn path(&self) -> &CStr {
        if self.other().is_empty() { OWN } else { self.other() }
    }

    /// It has reached its work.
    pub fn steady(&mut self) {
        self.steady = true;
    }

    /// It has died; `failing`: it keeps doing so. True when PID 1's own takes its place from here on.
    pub fn died(&mut self, failing: bool) -> bool {
        self.deaths = self.deaths.saturating_add(1);
        let given_up = failing || (!self.steady && self.deaths >= TRIES);
        let back = given_up && !self.other().is_empty();
        if back {
            *self = Self::new("", 0);
        }
        back
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_program_has_three_lives_before_it_is_steady_and_many_after() {
        let mut program = Program::new("/new", 0);
        assert_eq!((program.path(), program.other()), (c"/new", c"/new"));
        assert!(!program.died(false) && !program.died(false));
        assert!(program.died(false));
        assert_eq!((program.path(), program.other()), (OWN, c""));
        let mut program = Program::new("/new", -1);
        assert_eq!([(); 4].map(|()| program.died(false)), [false, false, false, true]);
        let mut program = Program::new("/new", 0);
        program.steady();
        assert!((0..9).all(|_| !program.died(false)));
        assert!(program.died(true));
        assert!((0..20).all(|_| !program.died(true)), "its own program has no other to go back to");
    }
}
