//! What PID 1 must know when it executes itself again: one line in a file, written without the heap; read by
//! [`super::super::adopt`].
//!
//! ```text
//! AGENT-PID STARTS SHELL-PID STARTS PROGRAM
//! ```
//! 0 stands for no process, an empty program for PID 1's own.

use rustix::fs::{Mode, OFlags};

use crate::logging::Line;

/// Where it is kept.
pub const FILE: &str = "/run/layercake/state/init";

/// The note.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Note<'a> {
    /// The agent's PID and which start of this boot it is.
    pub agent: (i32, u32),
    /// The rescue shell's.
    pub shell: (i32, u32),
    /// Another program for agents.
    pub program: &'a str,
}

impl Note<'_> {
    /// Its text.
    #[must_use]
    pub fn line(&self) -> Line {
        let (agent, shell) = (self.agent, self.shell);
        let text = format_args!("{} {} {} {} {}", agent.0, agent.1, shell.0, shell.1, self.program);
        Line::of(text).ended(b'\n')
    }

    /// Writes the note.
    ///
    /// # Errors
    /// What the file system says.
    pub fn write(&self) -> rustix::io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC;
        let file = rustix::fs::open(FILE, flags, Mode::RUSR | Mode::WUSR)?;
        rustix::io::write(file, self.line().as_bytes()).map(drop)
    }
}
