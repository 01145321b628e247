//! A kernel's configuration file against `kernel-config/required.toml`: what Layer0 relies on. Pure.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::modules::wanted::Need;

/// One symbol Layer0 relies on.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Symbol {
    /// `CONFIG_…`.
    pub name: String,
    /// What it must be: `y`, or `m` where a module does as well.
    pub value: Value,
    /// Why, or, of what is optional, what it is good for.
    pub reason: String,
    /// The flavours that must have it; all where there are none.
    #[serde(default)]
    pub flavours: Vec<String>,
    /// Whether a kernel without it can be Layer0's.
    #[serde(default = "required")]
    pub need: Need,
    /// What Layer0 does without it: of what is optional, and only of that.
    #[serde(default)]
    pub without: Option<String>,
}

fn required() -> Need {
    Need::Required
}

/// What a symbol must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Value {
    /// Built in.
    Y,
    /// Built in or a module.
    M,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    symbol: Vec<Symbol>,
}

/// A symbol that is not as it must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The symbol.
    pub symbol: Symbol,
    /// What the kernel has: `n` where it is not set.
    pub has: String,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let wanted = if self.symbol.value == Value::Y { "y" } else { "y or m" };
        let Symbol { name, reason, .. } = &self.symbol;
        write!(f, "{name} is {}, wanted {wanted}: {reason}", self.has)?;
        self.symbol.without.iter().try_for_each(|instead| write!(f, "; without it {instead}"))
    }
}

/// Reads `required.toml`.
///
/// # Errors
/// It is not TOML, or has keys that are unknown; the error names the line.
pub fn parse_required(text: &str) -> Result<Vec<Symbol>, toml::de::Error> {
    Ok(toml::from_str::<File>(text)?.symbol)
}

/// What a kernel of this flavour must have.
#[must_use]
pub fn of_flavour(mut required: Vec<Symbol>, flavour: &str) -> Vec<Symbol> {
    required.retain(|it| it.flavours.is_empty() || it.flavours.iter().any(|name| name == flavour));
    required
}

/// Everything in which a kernel's configuration (`config-VERSION`) falls short of what Layer0 cannot do without.
#[must_use]
pub fn check(config: &str, symbols: &[Symbol]) -> Vec<Problem> {
    short(config, symbols, Need::Required)
}

/// What a kernel lacks that Layer0 can do without.
#[must_use]
pub fn lacks(config: &str, symbols: &[Symbol]) -> Vec<Problem> {
    short(config, symbols, Need::Optional)
}

/// Whether a symbol is built in (`y`).
#[must_use]
pub fn is_set(config: &str, symbol: &str) -> bool {
    let value =
        |line: &str| line.strip_prefix(symbol).and_then(|rest| rest.strip_prefix('=')) == Some("y");
    config.lines().any(|line| value(line.trim()))
}

fn short(config: &str, symbols: &[Symbol], need: Need) -> Vec<Problem> {
    let set: BTreeMap<&str, &str> = config
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.trim().split_once('='))
        .collect();
    let problem = |symbol: &Symbol| {
        let has = set.get(symbol.name.as_str()).copied().unwrap_or("n");
        let fine = has == "y" || (has == "m" && symbol.value == Value::M);
        (!fine).then(|| Problem { symbol: symbol.clone(), has: has.to_owned() })
    };
    symbols.iter().filter(|symbol| symbol.need == need).filter_map(problem).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_symbol_that_falls_short_is_reported_with_its_reason() {
        let entry = |name: &str, value| {
            format!(
                "[[symbol]]\nname = \"CONFIG_{name}\"\nvalue = \"{value}\"\nreason = \"why {name}\"\n"
            )
        };
        let text = ["y", "m", "y", "m", "y"].iter().zip(["A", "B", "C", "D", "E"]);
        let text: String = text.map(|(value, name)| entry(name, value)).collect();
        let required = parse_required(&text).unwrap();
        let config = "# a comment\nCONFIG_A=y\nCONFIG_B=m\nCONFIG_C=m\n# CONFIG_D is not set\n";
        let problems: Vec<_> = check(config, &required).iter().map(ToString::to_string).collect();
        let expected = [
            "CONFIG_C is m, wanted y: why C",
            "CONFIG_D is n, wanted y or m: why D",
            "CONFIG_E is n, wanted y: why E",
        ];
        assert_eq!(problems, expected);
    }

    #[test]
    fn a_symbol_of_some_flavours_is_required_of_those_only() {
        let entry = |name: &str, rest: &str| {
            format!("[[symbol]]\nname = \"{name}\"\nvalue = \"y\"\nreason = \"x\"\n{rest}")
        };
        let text = entry("A", "") + &entry("B", "flavours = [\"hw\", \"virt\"]\n");
        let names = |flavour| {
            let required = of_flavour(parse_required(&text).unwrap(), flavour);
            required.into_iter().map(|symbol| symbol.name).collect::<Vec<_>>()
        };
        assert_eq!((names("hw"), names("cloud")), (vec!["A".into(), "B".into()], vec!["A".into()]));
    }

    #[test]
    fn what_is_optional_is_told_apart_with_what_is_done_instead() {
        let text = "[[symbol]]\nname = 'CONFIG_A'\nvalue = 'm'\nreason = 'speed'\n\
            need = 'optional'\nwithout = 'it is slow'\n";
        let symbols = parse_required(text).unwrap();
        assert!(check("", &symbols).is_empty() && lacks("CONFIG_A=m\n", &symbols).is_empty());
        let said = lacks("", &symbols)[0].to_string();
        assert_eq!(said, "CONFIG_A is n, wanted y or m: speed; without it it is slow");
    }

    #[test]
    fn an_unknown_key_names_its_line() {
        let error = parse_required("[[symbol]]\nname = \"A\"\nvalue = \"y\"\nwhy = \"x\"\n");
        assert!(error.unwrap_err().to_string().contains("line 4"));
    }
}
