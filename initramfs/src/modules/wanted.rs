//! `kernel-config/modules.toml`: the modules Layer0 wants of each kernel, each with its reason. Pure.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;

use super::normal;

/// What to do when a kernel lacks a module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Need {
    /// The build fails.
    Required,
    /// It is left out.
    Optional,
}

/// How modules are chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pick {
    /// By the kernel's name.
    Name(String),
    /// By a pattern over the path below `lib/modules/VERSION`, with `.ko` and without compression.
    Path(String),
}

impl fmt::Display for Pick {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(text) | Self::Path(text) => f.write_str(text),
        }
    }
}

/// One entry of the list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Which modules.
    pub pick: Pick,
    /// Whether the image can do without.
    pub need: Need,
    /// Whether the agent loads it at start whatever the hardware is.
    pub load: bool,
    /// Whether it is needed before there is an address: it lies in the image as it is, with what it needs.
    pub plain: bool,
    /// Why it is wanted.
    pub reason: String,
}

/// The whole file.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lists {
    #[serde(default)]
    module: Vec<Raw>,
    #[serde(default)]
    flavour: BTreeMap<String, RawFlavour>,
    /// What is in no image unless it is asked for.
    #[serde(default)]
    extra: BTreeMap<String, RawExtra>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawExtra {
    module: Vec<Raw>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFlavour {
    #[serde(default)]
    packages: Vec<String>,
    /// Modules below this size, in bytes, are not compressed one by one.
    #[serde(default)]
    plain_below: u64,
    #[serde(default)]
    module: Vec<Raw>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    name: Option<String>,
    path: Option<String>,
    need: Need,
    #[serde(default)]
    load: bool,
    #[serde(default)]
    plain: bool,
    reason: String,
}

/// Why the list could not be read.
#[derive(Debug, thiserror::Error)]
pub enum WantedError {
    /// It is not the TOML it should be; the source names the line.
    #[error("the module list is wrong")]
    Toml(#[from] toml::de::Error),
    /// Nobody has written down what it holds.
    #[error("the module list has no extra `{0}`, only {1}")]
    Extra(String, String),
    /// An entry has neither or both of `name` and `path`, or no reason.
    #[error("an entry of the module list ({0}) needs a `reason` and either `name` or `path`")]
    Entry(String),
}

/// Reads the file.
///
/// # Errors
/// It is not TOML, or has keys that are unknown.
pub fn parse(text: &str) -> Result<Lists, WantedError> {
    Ok(toml::from_str(text)?)
}

impl Lists {
    /// What is wanted of this flavour: what is wanted of all, then its own.
    ///
    /// # Errors
    /// An entry is not complete.
    pub fn list(&self, flavour: &str) -> Result<Vec<Wanted>, WantedError> {
        let own = self.flavour.get(flavour).map(|own| own.module.as_slice()).unwrap_or_default();
        self.module.iter().chain(own).map(entry).collect()
    }

    /// What is wanted of every kernel, whatever its flavour.
    ///
    /// # Errors
    /// An entry is not complete.
    pub fn core(&self) -> Result<Vec<Wanted>, WantedError> {
        self.module.iter().map(entry).collect()
    }

    /// The same list with these extras in it, for every flavour.
    ///
    /// # Errors
    /// There is no such extra.
    pub fn with(mut self, extras: &[String]) -> Result<Self, WantedError> {
        for name in extras {
            let known = self.extra.keys().cloned().collect::<Vec<_>>().join(", ");
            let extra = self.extra.get(name);
            let extra = extra.ok_or_else(|| WantedError::Extra(name.clone(), known))?;
            self.module.extend(extra.module.iter().cloned());
        }
        Ok(self)
    }

    /// Size in bytes below which this flavour's modules are not compressed one by one: many small files take less room in one frame.
    #[must_use]
    pub fn plain_below(&self, flavour: &str) -> u64 {
        self.flavour.get(flavour).map_or(0, |own| own.plain_below)
    }

    /// The packages that may bring this flavour's kernel, the best first.
    #[must_use]
    pub fn packages(&self, flavour: &str) -> Vec<String> {
        self.flavour.get(flavour).map(|own| own.packages.clone()).unwrap_or_default()
    }
}

fn entry(raw: &Raw) -> Result<Wanted, WantedError> {
    let pick = match (&raw.name, &raw.path) {
        (Some(name), None) => Pick::Name(normal(name)),
        (None, Some(path)) => Pick::Path(path.clone()),
        (name, path) => {
            let known = name.as_ref().or(path.as_ref());
            return Err(WantedError::Entry(known.unwrap_or(&raw.reason).clone()));
        }
    };
    if raw.reason.trim().is_empty() {
        return Err(WantedError::Entry(pick.to_string()));
    }
    let Raw { need, load, plain, ref reason, .. } = *raw;
    Ok(Wanted { pick, need, load, plain, reason: reason.clone() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flavour_has_what_all_have_and_its_own() {
        let text = r#"
            module = [{ name = "over-lay", need = "required", load = true, reason = "roots" }]
            [flavour.cloud]
            packages = ["a", "b"]
            plain_below = 4096
            module = [{ path = "kernel/x/**", need = "optional", plain = true, reason = "disks" }]
        "#;
        let lists = parse(text).unwrap();
        let cloud = lists.list("cloud").unwrap();
        assert_eq!(cloud[0].pick, Pick::Name("over_lay".to_owned()));
        assert!(cloud[0].load && cloud[0].need == Need::Required && !cloud[0].plain);
        assert!(cloud[1].plain);
        assert_eq!((lists.plain_below("cloud"), lists.plain_below("custom")), (4096, 0));
        assert_eq!(cloud[1].pick, Pick::Path("kernel/x/**".to_owned()));
        assert_eq!(lists.list("custom").unwrap().len(), 1);
        assert_eq!(lists.packages("cloud"), ["a", "b"]);
        assert!(lists.packages("custom").is_empty());
    }

    #[test]
    fn extras_are_in_no_image_that_does_not_ask_for_them() {
        let text = r#"
            [extra.storage]
            module = [{ name = "nfs", need = "optional", reason = "exports" }]
        "#;
        let lists = parse(text).unwrap();
        assert!(lists.list("cloud").unwrap().is_empty());
        let with = lists.clone().with(&["storage".to_owned()]).unwrap();
        assert_eq!(with.list("cloud").unwrap().len(), 1);
        let error = lists.with(&["tapes".to_owned()]).unwrap_err().to_string();
        assert!(error.contains("`tapes`") && error.contains("storage"), "{error}");
    }

    #[test]
    fn wrong_entries_are_refused_and_named() {
        let unknown =
            "module = [{ name = \"a\", need = \"required\", reason = \"x\", lod = true }]";
        assert!(format!("{:?}", parse(unknown).unwrap_err()).contains("lod"));
        for fields in
            ["name = 'a', path = 'b', reason = 'x'", "reason = 'x'", "name = 'a', reason = ''"]
        {
            let text = format!("module = [{{ {fields}, need = 'optional' }}]");
            assert!(parse(&text).unwrap().list("cloud").is_err(), "{fields}");
        }
    }
}
