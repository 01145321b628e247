//! The terminal of this process: its size, and raw mode while it is the command's.

use std::io::IsTerminal;

use anyhow::Context;
use protocol::channel::TerminalSize;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// Whether standard input is a terminal.
pub(in crate::cli) fn is_there() -> bool {
    std::io::stdin().is_terminal()
}

/// The size of the terminal on standard input; none where there is no terminal, or one that does not know.
pub(in crate::cli) fn size() -> Option<TerminalSize> {
    let size = tcgetwinsize(rustix::stdio::stdin()).ok()?;
    (size.ws_col > 0).then_some(TerminalSize { columns: size.ws_col, rows: size.ws_row })
}

/// Every key goes to the command until this is dropped.
pub(super) struct RawMode {
    before: Termios,
}

impl RawMode {
    pub(super) fn enter() -> anyhow::Result<Self> {
        let before = tcgetattr(rustix::stdio::stdin()).context("standard input is no terminal")?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(rustix::stdio::stdin(), OptionalActions::Drain, &raw)
            .context("the terminal cannot be made raw")?;
        Ok(Self { before })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // A terminal that is gone needs nothing.
        let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Drain, &self.before);
    }
}
