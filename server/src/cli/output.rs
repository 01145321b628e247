//! What commands print: results on stdout, as a table or as JSON; bars on stderr and only on a terminal.

use std::io::{self, IsTerminal, Write};

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

/// How results are printed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Output {
    pub(super) json: bool,
}

impl Output {
    /// Prints a result: the value as JSON where that was asked for, else the text.
    pub(super) fn result(
        self,
        value: &impl Serialize,
        text: impl FnOnce() -> String,
    ) -> anyhow::Result<()> {
        let mut text = if self.json { serde_json::to_string_pretty(value)? } else { text() };
        if !text.is_empty() && !text.ends_with('\n') {
            text.push('\n');
        }
        print(&text)
    }
}

/// Prints on stdout. A reader that has left, such as `head`, is no failure.
pub(super) fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

/// Says something on stderr, for people. Where stderr is gone there is nobody to tell.
pub(super) fn say(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// A bar of bytes on stderr; hidden where stderr is no terminal.
pub(super) fn byte_bar() -> ProgressBar {
    let bar = ProgressBar::new(0);
    let template = "{msg} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta} left";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar
}

/// Whether stderr is a terminal.
pub(super) fn on_terminal() -> bool {
    io::stderr().is_terminal()
}

/// Columns, aligned, under a header.
pub(super) fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        let widest = cells.map(|cell| cell.chars().count()).max().unwrap_or(0);
        widest.max(header.get(column).map_or(0, |title| title.len()))
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let line = |cells: Vec<&str>| {
        let padded: Vec<String> =
            cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        format!("{}\n", padded.join("  ").trim_end())
    };
    let mut text = line(header.to_vec());
    for row in rows {
        text.push_str(&line(row.iter().map(String::as_str).collect()));
    }
    text
}

/// How long ago, in one figure: `5 s`, `3 min`, `2 h`, `4 d`.
pub(super) fn ago(then_ms: u64, now_ms: u64) -> String {
    crate::why::span(now_ms.saturating_sub(then_ms))
}

/// Bytes in a unit that people read.
pub(super) fn bytes(count: u64) -> String {
    indicatif::HumanBytes(count).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_aligned_without_trailing_blanks() {
        let rows = [vec!["n1".to_owned(), "up".to_owned()], vec!["node-2".to_owned(), "-".into()]];
        assert_eq!(table(&["NODE", "STATE"], &rows), "NODE    STATE\nn1      up\nnode-2  -\n");
    }

    #[test]
    fn times_are_one_figure() {
        for (seconds, text) in [(5, "5 s"), (200, "3 min"), (7300, "2 h"), (400_000, "4 d")] {
            assert_eq!(ago(1000, 1000 + seconds * 1000), text);
        }
        assert_eq!(ago(5000, 1000), "0 s");
    }
}
