//! What a bench found: samples, their medians, the table for people and one JSON object a line for programs. Pure.

use serde::Serialize;
use serde_json::{Value, json};

/// Measurements of one thing, in the order in which they were taken.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Samples(pub(crate) Vec<f64>);

impl Samples {
    /// The middle one; the mean of the two middle ones of an even number. `None` without samples.
    pub(crate) fn median(&self) -> Option<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let upper = *sorted.get(sorted.len() / 2)?;
        match sorted.len() % 2 {
            1 => Some(upper),
            _ => sorted.get(sorted.len() / 2 - 1).map(|lower| f64::midpoint(*lower, upper)),
        }
    }

    /// `median (min-max)`, with so many digits after the point.
    pub(super) fn cell(&self, digits: usize) -> String {
        let least = self.0.iter().copied().reduce(f64::min);
        let most = self.0.iter().copied().reduce(f64::max);
        match (self.median(), least, most) {
            (Some(median), Some(least), Some(most)) => {
                format!("{median:.digits$} ({least:.digits$}-{most:.digits$})")
            }
            _ => "-".to_owned(),
        }
    }
}

/// What was measured of one way to do the job.
#[derive(Debug, Clone, Default)]
pub(crate) struct Way {
    /// Its name with the versions of its programs.
    pub(crate) name: String,
    /// CPU seconds, user and system, of client and daemon.
    pub(crate) cpu_s: Samples,
    /// Seconds from start to end.
    pub(crate) wall_s: Samples,
    /// The most memory that one of its processes held, MiB.
    pub(crate) peak_mib: Samples,
}

/// A comparison, or a value with a limit.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Figure {
    /// The bench.
    pub(crate) bench: &'static str,
    /// What is compared.
    pub(crate) figure: String,
    /// Our median.
    pub(crate) ours: f64,
    /// The peer's median; none where the figure has a limit and no peer.
    pub(crate) peer: Option<f64>,
    /// The peer with its versions.
    pub(crate) peer_name: Option<String>,
    /// The unit of `ours` and `peer`.
    pub(crate) unit: &'static str,
    /// Ours divided by the peer's.
    pub(crate) ratio: Option<f64>,
    /// The most that the ratio, or without a peer our value, may be; of a rate the least that the ratio may be.
    pub(crate) goal: Option<f64>,
    /// Whether it is; none without a goal.
    pub(crate) met: Option<bool>,
}

impl Figure {
    /// Ours beside a peer's, by their medians. `None` without samples of both.
    pub(crate) fn beside(
        bench: &'static str,
        figure: &str,
        (ours, peer): (&Samples, &Samples),
        peer_name: &str,
        unit: &'static str,
        goal: Option<f64>,
    ) -> Option<Self> {
        let (ours, peer) = (ours.median()?, peer.median()?);
        let ratio = (peer > 0.0).then(|| ours / peer);
        let met = goal.zip(ratio).map(|(goal, ratio)| ratio <= goal);
        let (figure, peer_name) = (figure.to_owned(), Some(peer_name.to_owned()));
        Some(Self { bench, figure, ours, peer: Some(peer), peer_name, unit, ratio, goal, met })
    }

    /// Ours beside a peer's, where more is better: the goal is the least that the ratio may be. `None` without samples of
    /// both.
    pub(crate) fn at_least(
        bench: &'static str,
        figure: &str,
        samples: (&Samples, &Samples),
        peer_name: &str,
        unit: &'static str,
        goal: Option<f64>,
    ) -> Option<Self> {
        let found = Self::beside(bench, figure, samples, peer_name, unit, goal)?;
        let met = goal.zip(found.ratio).map(|(goal, ratio)| ratio >= goal);
        Some(Self { met, ..found })
    }

    /// Ours below a limit, by the worst sample. `None` without samples.
    pub(crate) fn below(
        bench: &'static str,
        figure: &str,
        ours: &Samples,
        unit: &'static str,
        limit: f64,
    ) -> Option<Self> {
        let worst = ours.0.iter().copied().reduce(f64::max)?;
        Some(Self {
            bench,
            figure: figure.to_owned(),
            ours: worst,
            peer: None,
            peer_name: None,
            unit,
            ratio: None,
            goal: Some(limit),
            met: Some(worst < limit),
        })
    }

    /// One line of JSON.
    pub(crate) fn json(&self) -> Value {
        json!(self)
    }
}

/// The table of the ways.
pub(crate) fn ways_table(ways: &[&Way]) -> String {
    let head = ["way", "CPU s", "wall s", "peak MiB"].map(str::to_owned).to_vec();
    let rows = ways.iter().map(|way| {
        vec![way.name.clone(), way.cpu_s.cell(2), way.wall_s.cell(2), way.peak_mib.cell(1)]
    });
    table(std::iter::once(head).chain(rows).collect())
}

/// The table of samples of other things, each with what it is.
pub(crate) fn samples_table(rows: &[(&str, &Samples)]) -> String {
    let rows = rows.iter().filter(|(_, samples)| !samples.0.is_empty());
    table(rows.map(|(what, samples)| vec![(*what).to_owned(), samples.cell(1)]).collect())
}

/// The table of the figures.
pub(crate) fn figures_table(figures: &[Figure]) -> String {
    let head = ["figure", "ours", "peer", "ratio", "goal", ""].map(str::to_owned).to_vec();
    let number = |value: Option<f64>, digits: usize| {
        value.map_or_else(String::new, |value| format!("{value:.digits$}"))
    };
    let rows = figures.iter().map(|figure| {
        let verdict = match figure.met {
            Some(true) => "met",
            Some(false) => "MISSED",
            None => "",
        };
        vec![
            figure.figure.clone(),
            format!("{:.2} {}", figure.ours, figure.unit),
            number(figure.peer, 2),
            number(figure.ratio, 3),
            number(figure.goal, 2),
            verdict.to_owned(),
        ]
    });
    table(std::iter::once(head).chain(rows).collect())
}

/// Rows as text: the first column to the left, the others to the right.
pub(super) fn table(rows: Vec<Vec<String>>) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max()
    };
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in &rows {
        let mut line = String::new();
        for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
            line.push_str(&match column {
                0 => format!("{cell:<width$}"),
                _ => format!("  {cell:>width$}"),
            });
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(values: &[f64]) -> Samples {
        Samples(values.to_vec())
    }

    #[test]
    fn the_median_is_the_middle_whatever_the_order() {
        assert_eq!(samples(&[]).median(), None);
        assert_eq!(samples(&[3.0]).median(), Some(3.0));
        assert_eq!(samples(&[9.0, 1.0, 2.0]).median(), Some(2.0));
        assert_eq!(samples(&[4.0, 1.0, 2.0, 9.0]).median(), Some(3.0));
        assert_eq!(samples(&[2.0, 1.0, 4.0]).cell(1), "2.0 (1.0-4.0)");
    }

    #[test]
    fn a_goal_is_met_up_to_its_value_and_missed_beyond() {
        let figure = |ours, goal| {
            let pair = (&samples(&[ours]), &samples(&[10.0]));
            Figure::beside("pull", "f", pair, "peer 1", "s", goal).expect("figure")
        };
        assert_eq!(figure(1.8, Some(0.18)).met, Some(true));
        assert_eq!(figure(1.9, Some(0.18)).met, Some(false));
        assert_eq!(figure(1.9, None).met, None);
        let memory = |mib| Figure::below("pull", "peak", &samples(&[1.0, mib]), "MiB", 24.0);
        assert_eq!(memory(23.9).expect("figure").met, Some(true));
        assert_eq!(memory(24.0).expect("figure").met, Some(false));
        let none = (&samples(&[]), &samples(&[1.0]));
        assert!(Figure::beside("pull", "f", none, "peer 1", "s", None).is_none());
    }

    #[test]
    fn a_line_of_json_has_the_keys_that_every_bench_has() {
        let pair = (&samples(&[1.0]), &samples(&[4.0]));
        let figure = Figure::beside("pull", "f", pair, "peer 1", "s", Some(0.5)).expect("figure");
        let expected = r#"{"bench":"pull","figure":"f","goal":0.5,"met":true,"ours":1.0,"peer":4.0,"peer_name":"peer 1","ratio":0.25,"unit":"s"}"#;
        let expected: Value = serde_json::from_str(expected).expect("JSON");
        assert_eq!(figure.json(), expected);
    }

    #[test]
    fn a_table_is_as_wide_as_its_cells() {
        let rows = [["way", "s"], ["ours", "10"]].map(|row| row.map(str::to_owned).to_vec());
        assert_eq!(table(rows.to_vec()), "way    s\nours  10\n");
    }
}
