//! A kernel configuration put together from fragments (`kernel-config/fragments`), and what became of it. Pure.
//!
//! A fragment is what `scripts/kconfig/merge_config.sh` takes: `CONFIG_X=value` and `# CONFIG_X is not set`. Here every other line
//! that is not a comment is an error, and so is a symbol that kconfig dropped: a wish that silently comes to nothing is how a
//! kernel loses its network.

use std::collections::BTreeMap;

use serde::Deserialize;

/// `kernel-config/flavours.toml`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Flavours {
    /// Packages that have the kernel's source, the best first.
    pub source: Vec<String>,
    /// The flavours by name.
    pub flavour: BTreeMap<String, Flavour>,
}

/// A kernel that can be built.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Flavour {
    /// One line about it.
    pub about: String,
    /// Names of fragments, in the order in which they are merged.
    pub fragments: Vec<String>,
}

/// Why fragments cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FragmentError {
    /// A line that says nothing of a symbol.
    #[error(
        "{fragment}.config:{line}: `{text}` is neither `CONFIG_X=value` nor `# CONFIG_X is not set`"
    )]
    Line {
        /// The fragment.
        fragment: String,
        /// Counted from 1.
        line: usize,
        /// The line.
        text: String,
    },
}

/// What one symbol is to be, and who says so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wish {
    /// `y`, `m`, `n`, a number or a quoted text.
    pub value: String,
    /// The fragment that said it last.
    pub fragment: String,
}

/// A symbol that did not become what a fragment asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lost {
    /// `CONFIG_…`.
    pub name: String,
    /// What was asked for.
    pub wish: Wish,
    /// What the configuration has.
    pub has: String,
}

impl std::fmt::Display for Lost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { name, wish: Wish { value, fragment }, has } = self;
        write!(f, "{name}={value} of {fragment}.config became {has}")
    }
}

/// Reads `flavours.toml`.
///
/// # Errors
/// It is not TOML, or has keys that are unknown; the error names the line.
pub fn parse_flavours(text: &str) -> Result<Flavours, toml::de::Error> {
    toml::from_str(text)
}

/// Merges fragments, each a name and its text; the last word on a symbol counts.
///
/// # Errors
/// The first line that is neither a symbol nor a comment.
pub fn merge(fragments: &[(String, String)]) -> Result<BTreeMap<String, Wish>, FragmentError> {
    let mut wishes = BTreeMap::new();
    for (fragment, text) in fragments {
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            let Some((name, value)) = symbol(line) else {
                if line.is_empty() || line.starts_with('#') {
                    continue;
                }
                let text = line.chars().take(80).collect();
                return Err(FragmentError::Line {
                    fragment: fragment.clone(),
                    line: index + 1,
                    text,
                });
            };
            let wish = Wish { value: value.to_owned(), fragment: fragment.clone() };
            wishes.insert(name.to_owned(), wish);
        }
    }
    Ok(wishes)
}

/// The symbol and the value that a line speaks of.
fn symbol(line: &str) -> Option<(&str, &str)> {
    let (name, value) = match line.strip_prefix("# ") {
        Some(rest) => (rest.strip_suffix(" is not set")?, "n"),
        None => line.split_once('=')?,
    };
    let rest = name.strip_prefix("CONFIG_")?;
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
    (!rest.is_empty() && rest.chars().all(plain) && !value.is_empty()).then_some((name, value))
}

/// The wishes as a file for `KCONFIG_ALLCONFIG` (Documentation/kbuild/kconfig.rst).
#[must_use]
pub fn render(wishes: &BTreeMap<String, Wish>) -> String {
    let line = |(name, wish): (&String, &Wish)| match wish.value.as_str() {
        "n" => format!("# {name} is not set\n"),
        value => format!("{name}={value}\n"),
    };
    wishes.iter().map(line).collect()
}

/// Every wish that the finished configuration (`.config`) does not fulfil, by name.
#[must_use]
pub fn lost(wishes: &BTreeMap<String, Wish>, config: &str) -> Vec<Lost> {
    let has: BTreeMap<&str, &str> = config.lines().filter_map(symbol).collect();
    // A kernel without modules has built in what a fragment asks for as one (Documentation/kbuild/kconfig-language.rst).
    let modules = has.get("CONFIG_MODULES") == Some(&"y");
    let lost = |(name, wish): (&String, &Wish)| {
        let has = has.get(name.as_str()).copied().unwrap_or("n");
        let fulfilled = has == wish.value || (has == "y" && wish.value == "m" && !modules);
        (!fulfilled).then(|| Lost { name: name.clone(), wish: wish.clone(), has: has.to_owned() })
    };
    wishes.iter().filter_map(lost).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fragments(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect()
    }

    #[test]
    fn the_last_word_on_a_symbol_counts_and_is_rendered_once() {
        let list = fragments(&[
            ("base", "# The core\nCONFIG_NET=y\nCONFIG_NAME=\"a=b\"\nCONFIG_MODULES=n\n"),
            ("hw", "CONFIG_MODULES=y\n# CONFIG_NET is not set\n"),
        ]);
        let wishes = merge(&list).unwrap();
        assert_eq!(
            render(&wishes),
            "CONFIG_MODULES=y\nCONFIG_NAME=\"a=b\"\n# CONFIG_NET is not set\n"
        );
        assert_eq!(wishes["CONFIG_NET"].fragment, "hw");
    }

    #[test]
    fn a_line_that_says_nothing_is_named() {
        for text in
            ["CONFIG_A=y\nNET=y", "\nCONFIG_NET", "\nCONFIG_=y", "\nCONFIG_A B=y", "\nCONFIG_A="]
        {
            let error = merge(&fragments(&[("base", text)])).unwrap_err().to_string();
            assert!(error.starts_with("base.config:2: `"), "{error}");
        }
    }

    #[test]
    fn what_kconfig_dropped_is_named_with_the_fragment_that_asked() {
        let wishes =
            merge(&fragments(&[("virt", "CONFIG_A=y\nCONFIG_B=m\nCONFIG_C=n\nCONFIG_D=5")]))
                .unwrap();
        let modules = "CONFIG_MODULES=y\nCONFIG_A=y\nCONFIG_B=y\n# CONFIG_C is not set\n";
        let said: Vec<_> = lost(&wishes, modules).iter().map(ToString::to_string).collect();
        assert_eq!(
            said,
            ["CONFIG_B=m of virt.config became y", "CONFIG_D=5 of virt.config became n"]
        );
        assert!(lost(&wishes, "CONFIG_A=y\nCONFIG_B=m\nCONFIG_D=5\n").is_empty());
        assert!(lost(&wishes, "CONFIG_A=y\nCONFIG_B=y\nCONFIG_D=5\n").is_empty());
    }
}
