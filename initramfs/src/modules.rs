//! Which kernel modules go into the image. Pure: modules are described by what their `.modinfo` says, files are read in
//! [`files`].
//!
//! `depends` is always followed and a hole in it is an error. Soft and weak dependencies are followed where the kernel has
//! them: that is what they mean (modprobe.d(5)).

pub mod alias;
pub mod facts;
pub mod files;
pub mod firmware;
pub mod glob;
pub mod index;
pub mod wanted;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::elf::{self, ElfError};
use wanted::{Need, Pick, Wanted};

/// What the name of a module ends with that lies in the image compressed.
pub const COMPRESSED: &str = ".zst";

/// What a module says of itself.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct Module {
    /// The kernel's name for it, with `_` for every `-`.
    pub name: String,
    /// Where it lies below `lib/modules/VERSION`, as the image has it: `kernel/drivers/net/x.ko`.
    pub path: String,
    /// The same for the file it is read from, which may be compressed: `kernel/drivers/net/x.ko.xz`.
    pub file: String,
    /// Modules it cannot be loaded without.
    pub depends: Vec<String>,
    /// Patterns of the devices and names it is for, in file order.
    pub aliases: Vec<String>,
    /// Its soft dependencies, as they are written: `pre: a b post: c`.
    pub softdeps: Vec<String>,
    /// Modules it may ask for while it runs.
    pub weakdeps: Vec<String>,
    /// Files it asks the kernel's firmware loader for; some are patterns.
    #[serde(default)]
    pub firmware: Vec<String>,
}

/// All modules a kernel has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Catalogue {
    modules: BTreeMap<String, Module>,
    builtin: BTreeSet<String>,
    builtin_aliases: BTreeSet<String>,
    by_alias: BTreeMap<String, Vec<String>>,
}

/// The modules that were chosen.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Selection {
    /// By name, closed under `depends`.
    pub modules: BTreeMap<String, Module>,
    /// Names to load at start whatever the hardware is, in the order of the list.
    pub load: Vec<String>,
    /// Names of those that are needed before there is an address, and of what those need: they lie in the image as they are.
    pub plain: BTreeSet<String>,
    /// Names of those that lie in the image compressed.
    pub compressed: BTreeSet<String>,
    /// What was optional and is not there: name or pattern.
    pub absent: Vec<String>,
}

/// Why modules could not be chosen.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ModulesError {
    /// A required module is neither a file nor built in.
    #[error(
        "the kernel has no module {wanted}, neither as a file nor built in; it is required: {reason}"
    )]
    Missing {
        /// Name or pattern from the list.
        wanted: String,
        /// Why it is wanted.
        reason: String,
    },
    /// A module depends on one that is not there.
    #[error("module {module} depends on {depends}, which is neither a file nor built in")]
    Hole {
        /// The module.
        module: String,
        /// What it depends on.
        depends: String,
    },
}

impl Selection {
    /// Where a module of it lies in the image, below `lib/modules/VERSION`.
    #[must_use]
    pub fn place(&self, module: &Module) -> String {
        let suffix = if self.compressed.contains(&module.name) { COMPRESSED } else { "" };
        format!("{}{suffix}", module.path)
    }
}

impl Module {
    /// Reads the description out of an uncompressed module. `file` is its path below `lib/modules/VERSION`.
    ///
    /// # Errors
    /// The bytes are no kernel module.
    pub fn read(file: &str, bytes: &[u8]) -> Result<Self, ElfError> {
        let path = files::plain_path(file);
        let mut module = Self {
            name: name_of(path),
            path: path.to_owned(),
            file: file.to_owned(),
            ..Self::default()
        };
        for (key, value) in elf::modinfo(bytes)? {
            match key {
                "depends" => {
                    let names = value.split(',').filter(|name| !name.is_empty());
                    module.depends.extend(names.map(normal));
                }
                "alias" => module.aliases.push(value.to_owned()),
                "firmware" => module.firmware.push(value.to_owned()),
                "softdep" => module.softdeps.push(value.to_owned()),
                "weakdep" => module.weakdeps.extend(value.split_whitespace().map(normal)),
                _ => {}
            }
        }
        Ok(module)
    }

    /// The names in its soft dependencies, before and after it.
    fn soft(&self) -> impl Iterator<Item = &str> {
        let words = self.softdeps.iter().flat_map(|line| line.split_whitespace());
        words.filter(|word| !matches!(*word, "pre:" | "post:"))
    }
}

impl Catalogue {
    /// Puts a kernel's modules together. `builtin` is the text of its `modules.builtin`, `builtin_modinfo` the bytes of
    /// `modules.builtin.modinfo` (`name.key=value`, each ended by NUL).
    #[must_use]
    pub fn new(modules: Vec<Module>, builtin: &str, builtin_modinfo: &[u8]) -> Self {
        let mut catalogue = Self::default();
        for module in modules {
            for alias in &module.aliases {
                let names = catalogue.by_alias.entry(alias::fold(alias)).or_default();
                names.push(module.name.clone());
            }
            catalogue.modules.insert(module.name.clone(), module);
        }
        let lines = builtin.lines().map(str::trim).filter(|line| !line.is_empty());
        catalogue.builtin.extend(lines.map(name_of));
        for entry in builtin_modinfo.split(|byte| *byte == 0) {
            let Ok(text) = std::str::from_utf8(entry) else { continue };
            let alias = text.split_once(".alias=").filter(|(name, _)| !name.contains('='));
            catalogue.builtin_aliases.extend(alias.map(|(_, alias)| alias::fold(alias)));
        }
        catalogue
    }

    /// The module of this name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Module> {
        self.modules.get(name)
    }

    /// Whether this module is built in.
    #[must_use]
    pub fn is_builtin(&self, name: &str) -> bool {
        self.builtin.contains(name)
    }

    /// The modules for a device's alias, as files, and whether something that is built in is for it.
    #[must_use]
    pub fn for_alias(&self, request: &str) -> (BTreeSet<&Module>, bool) {
        let request = alias::fold(request);
        let matching = self.by_alias.range(alias::bucket(&request).to_owned()..);
        let matching = matching
            .take_while(|(pattern, _)| pattern.starts_with(alias::bucket(&request)))
            .filter(|(pattern, _)| alias::matches(pattern, &request));
        let modules = matching.flat_map(|(_, names)| names).filter_map(|it| self.modules.get(it));
        let mut builtin = self.builtin_aliases.range(alias::bucket(&request).to_owned()..);
        let builtin = builtin.any(|pattern| alias::matches(pattern, &request));
        (modules.collect(), builtin)
    }

    /// How many modules there are as files.
    #[must_use]
    pub fn len(&self) -> usize {
        self.modules.len()
    }

    /// Whether there is no module file at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.modules.is_empty()
    }

    /// Chooses what the list wants, with all that needs.
    ///
    /// # Errors
    /// A required module is missing, or a module depends on one that is.
    pub fn select(&self, list: &[Wanted]) -> Result<Selection, ModulesError> {
        let mut selection = Selection::default();
        let mut queue = Vec::new();
        let mut plain = Vec::new();
        for wanted in list {
            let found = self.pick(&wanted.pick);
            if wanted.plain {
                plain.extend(&found);
            }
            if wanted.load {
                selection.load.extend(found.iter().map(|module| module.name.clone()));
            }
            if found.is_empty() && !self.has_builtin(&wanted.pick) {
                let what = wanted.pick.to_string();
                if wanted.need == Need::Required {
                    let reason = wanted.reason.clone();
                    return Err(ModulesError::Missing { wanted: what, reason });
                }
                selection.absent.push(what);
            }
            queue.extend(found);
        }
        let all = self.closure(queue)?;
        selection.modules = all.into_iter().map(|it| (it.name.clone(), it.clone())).collect();
        selection.plain = self.closure(plain)?.iter().map(|it| it.name.clone()).collect();
        Ok(selection)
    }

    /// These modules with all they need.
    fn closure<'a>(&'a self, mut queue: Vec<&'a Module>) -> Result<Vec<&'a Module>, ModulesError> {
        let mut found = BTreeMap::new();
        while let Some(module) = queue.pop() {
            if found.insert(&module.name, module).is_some() {
                continue;
            }
            queue.extend(self.hard(module)?);
            let soft = module.soft().map(normal).chain(module.weakdeps.iter().cloned());
            queue.extend(soft.flat_map(|name| self.by_name_or_alias(&name)));
        }
        Ok(found.into_values().collect())
    }

    fn pick(&self, pick: &Pick) -> Vec<&Module> {
        match pick {
            Pick::Name(name) => self.modules.get(name).into_iter().collect(),
            Pick::Path(pattern) => self
                .modules
                .values()
                .filter(|module| glob::matches(pattern, &module.path))
                .collect(),
        }
    }

    fn has_builtin(&self, pick: &Pick) -> bool {
        matches!(pick, Pick::Name(name) if self.builtin.contains(name))
    }

    fn hard(&self, module: &Module) -> Result<Vec<&Module>, ModulesError> {
        let mut found = Vec::new();
        for name in &module.depends {
            match self.modules.get(name) {
                Some(module) => found.push(module),
                None if self.builtin.contains(name) => {}
                None => {
                    let (module, depends) = (module.name.clone(), name.clone());
                    return Err(ModulesError::Hole { module, depends });
                }
            }
        }
        Ok(found)
    }

    /// What a soft dependency means: the module of that name, else, unless it is built in, all that have it as an alias.
    fn by_name_or_alias(&self, name: &str) -> Vec<&Module> {
        if let Some(module) = self.modules.get(name) {
            return vec![module];
        }
        if self.builtin.contains(name) || self.builtin_aliases.contains(name) {
            return Vec::new();
        }
        let names = self.by_alias.get(name).map(Vec::as_slice).unwrap_or_default();
        names.iter().filter_map(|name| self.modules.get(name)).collect()
    }
}

/// The kernel's form of a module name: `-` and `_` are the same to it.
#[must_use]
pub fn normal(name: &str) -> String {
    name.trim().replace('-', "_")
}

/// The kernel's name of the module in this file.
#[must_use]
pub fn name_of(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    normal(file.strip_suffix(".ko").unwrap_or(file))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::elf::fake;

    fn module(path: &str, entries: &[(&str, &str)]) -> Module {
        Module::read(path, &fake::module(entries)).unwrap()
    }

    fn catalogue() -> Catalogue {
        let modules = vec![
            module("kernel/net/a-b.ko.xz", &[("depends", "c-d,built-in"), ("alias", "pci:*")]),
            module("kernel/lib/c-d.ko", &[("depends", "e"), ("softdep", "pre: crc post: zz")]),
            module("kernel/lib/e.ko", &[("depends", "")]),
            module("kernel/crypto/crc-fast.ko", &[("alias", "crc"), ("softdep", "pre: hash")]),
            module("kernel/crypto/hash-fast.ko", &[("alias", "hash")]),
            module("kernel/x/hole.ko", &[("depends", "nowhere")]),
            module("kernel/x/weak.ko", &[("weakdep", "e zz")]),
        ];
        Catalogue::new(modules, "kernel/built-in.ko\n", b"hash_generic.alias=hash\0x.license=GPL\0")
    }

    fn select(text: &str) -> Result<Selection, ModulesError> {
        let text = text
            .split(' ')
            .map(|entry| format!("[[module]]\nreason = \"why\"\n{}\n", entry.replace(';', "\n")))
            .collect::<String>();
        catalogue().select(&wanted::parse(&text).unwrap().list("cloud").unwrap())
    }

    #[track_caller]
    fn check(text: &str, expected: &str) {
        let names: Vec<_> = select(text).unwrap().modules.into_keys().collect();
        assert_eq!(names.join(" "), expected);
    }

    #[test]
    fn dependencies_are_followed_to_the_end() {
        check("name='a-b';need='required'", "a_b c_d crc_fast e");
    }

    #[test]
    fn a_soft_dependency_that_is_built_in_or_unknown_brings_nothing() {
        check("name='crc_fast';need='required'", "crc_fast");
        check("name='weak';need='required'", "e weak");
    }

    #[test]
    fn a_pattern_takes_all_it_matches() {
        check("path='kernel/crypto/*';need='required'", "crc_fast hash_fast");
        check("path='kernel/lib/**';need='optional'", "c_d crc_fast e");
    }

    #[test]
    fn what_is_built_in_needs_no_file() {
        check("name='built_in';need='required'", "");
    }

    #[test]
    fn a_missing_module_is_named_with_its_reason() {
        let error = select("name='gone';need='required'").unwrap_err().to_string();
        assert!(error.contains("no module gone") && error.ends_with("why"), "{error}");
        let error = select("path='kernel/gone/**';need='required'").unwrap_err().to_string();
        assert!(error.contains("kernel/gone/**"), "{error}");
        let selection = select("name='gone';need='optional'").unwrap();
        assert_eq!(selection.absent, ["gone"]);
    }

    #[test]
    fn a_dependency_that_is_nowhere_names_both() {
        let error = select("name='hole';need='required'").unwrap_err();
        let (module, depends) = ("hole".to_owned(), "nowhere".to_owned());
        assert_eq!(error, ModulesError::Hole { module, depends });
    }

    #[test]
    fn what_is_needed_before_there_is_an_address_stays_plain_with_what_it_needs() {
        let cases = [
            (
                "name='a-b';need='required';plain=true name='weak';need='required'",
                "a_b c_d crc_fast e",
            ),
            ("name='e';need='required' name='e';need='optional';plain=true", "e"),
            ("name='built_in';need='required';plain=true name='a-b';need='required'", ""),
        ];
        for (text, expected) in cases {
            let selection = select(text).unwrap();
            assert_eq!(
                selection.plain.into_iter().collect::<Vec<_>>().join(" "),
                expected,
                "{text}"
            );
        }
    }

    #[test]
    fn only_files_are_loaded_by_name() {
        let text = "name='e';need='required';load=true name='built_in';need='required';load=true";
        assert_eq!(select(text).unwrap().load, ["e"]);
    }
}
