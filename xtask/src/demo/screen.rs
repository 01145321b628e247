//! Live progress on stderr: one line a node on a terminal, a line for every change anywhere else.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::stage::Stage;

/// How often a spinner turns.
const TURN: Duration = Duration::from_millis(100);

/// What is shown.
#[derive(Debug)]
pub(crate) struct Screen {
    start: Instant,
    bars: Option<MultiProgress>,
    shown: Mutex<BTreeMap<String, Shown>>,
}

#[derive(Debug)]
enum Shown {
    Bar(ProgressBar),
    Word(String),
}

impl Screen {
    /// An empty screen.
    pub(crate) fn new() -> Self {
        let bars = std::io::stderr().is_terminal().then(MultiProgress::new);
        Self { start: Instant::now(), bars, shown: Mutex::default() }
    }

    /// Says something, once.
    pub(crate) fn say(&self, text: &str) {
        let line = format!("{:6.1} s  {text}", self.start.elapsed().as_secs_f32());
        match &self.bars {
            Some(bars) => {
                // A terminal that went away has nobody in front of it.
                let _ = bars.println(line);
            }
            None => eprintln!("{line}"),
        }
    }

    /// Shows how far a node has come.
    pub(crate) fn node(&self, id: &str, stage: &Stage) {
        let mut shown = self.shown.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match (&self.bars, shown.get_mut(id)) {
            (Some(_), Some(Shown::Bar(bar))) => bar.set_message(stage.to_string()),
            (Some(bars), _) => {
                let bar = bars.add(ProgressBar::new_spinner().with_prefix(id.to_owned()));
                bar.set_style(style());
                bar.enable_steady_tick(TURN);
                bar.set_message(stage.to_string());
                shown.insert(id.to_owned(), Shown::Bar(bar));
            }
            (None, Some(Shown::Word(word))) if *word == key(stage) => {}
            (None, _) => {
                self.say(&format!("{id}  {stage}"));
                shown.insert(id.to_owned(), Shown::Word(key(stage)));
            }
        }
    }

    /// Clears the nodes' lines away; what was said stays.
    pub(crate) fn clear(&self) {
        let mut shown = self.shown.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        for shown in std::mem::take(&mut *shown).into_values() {
            if let Shown::Bar(bar) = shown {
                bar.finish_and_clear();
            }
        }
    }
}

impl Drop for Screen {
    /// Leaves no half line on a terminal, whatever ended the demo.
    fn drop(&mut self) {
        self.clear();
    }
}

/// What makes a new line where there is no terminal: not every byte of a pull.
fn key(stage: &Stage) -> String {
    format!("{} {:?} {:?}", stage.word(), stage.waiting, stage.failure)
}

fn style() -> ProgressStyle {
    ProgressStyle::with_template("{spinner} {elapsed:>6}  {prefix}  {wide_msg}")
        .unwrap_or_else(|_| ProgressStyle::default_spinner())
}
