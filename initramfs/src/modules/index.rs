//! The index files the agent reads, in depmod's text form (modules.dep(5)), of the modules in the image only. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use super::{Module, Selection, normal};

/// The text of `modules.dep`: each module with all it needs, so that loading from right to left always works.
#[must_use]
pub fn dep(selection: &Selection) -> String {
    let mut modules: Vec<&Module> = selection.modules.values().collect();
    modules.sort_by(|a, b| a.path.cmp(&b.path));
    let mut text = String::new();
    for module in modules {
        text.push_str(&selection.place(module));
        text.push(':');
        let mut order = Vec::new();
        visit(module, &selection.modules, &mut BTreeSet::new(), &mut order);
        for needed in order.iter().rev().skip(1) {
            text.push(' ');
            text.push_str(&selection.place(needed));
        }
        text.push('\n');
    }
    text
}

/// Puts what a module needs before the module.
fn visit<'a>(
    module: &'a Module,
    all: &'a BTreeMap<String, Module>,
    seen: &mut BTreeSet<&'a str>,
    order: &mut Vec<&'a Module>,
) {
    if !seen.insert(&module.name) {
        return;
    }
    for needed in module.depends.iter().filter_map(|name| all.get(name)) {
        visit(needed, all, seen, order);
    }
    order.push(module);
}

/// The text of `modules.alias`, by module name.
#[must_use]
pub fn alias(selection: &Selection) -> String {
    let mut text = "# Aliases extracted from modules themselves.\n".to_owned();
    for module in selection.modules.values() {
        for alias in &module.aliases {
            let _infallible = writeln!(text, "alias {alias} {}", module.name);
        }
    }
    text
}

/// The text of `modules.softdep`, by module name.
#[must_use]
pub fn softdep(selection: &Selection) -> String {
    let mut text = "# Soft dependencies extracted from modules themselves.\n".to_owned();
    for module in selection.modules.values() {
        for line in &module.softdeps {
            let _infallible = writeln!(text, "softdep {} {line}", module.name);
        }
    }
    text
}

/// The text of the agent's list of modules to load at start.
#[must_use]
pub fn load(selection: &Selection) -> String {
    let mut text =
        "# Loaded at start whatever the hardware is; written by build-image.\n".to_owned();
    for name in &selection.load {
        text.push_str(&normal(name));
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selection() -> Selection {
        let module = |name: &str, depends: &[&str]| Module {
            name: name.to_owned(),
            path: format!("kernel/{name}.ko"),
            depends: depends.iter().map(|name| (*name).to_owned()).collect(),
            aliases: vec![format!("pci:{name}*")],
            softdeps: vec!["pre: x".to_owned()],
            ..Module::default()
        };
        let modules = [
            module("top", &["left", "right"]),
            module("left", &["base"]),
            module("right", &["left", "base"]),
            module("base", &["built_in"]),
        ];
        let modules = modules.into_iter().map(|module| (module.name.clone(), module)).collect();
        Selection { modules, load: vec!["base".to_owned()], ..Selection::default() }
    }

    #[test]
    fn loading_from_right_to_left_has_every_need_before_its_user() {
        let selection = selection();
        let text = dep(&selection);
        assert!(text.starts_with("kernel/base.ko:\nkernel/left.ko: kernel/base.ko\n"), "{text}");
        for line in text.lines() {
            let (path, needs) = line.split_once(':').unwrap();
            let mut loaded = BTreeSet::new();
            for path in needs.split_whitespace().rev().chain([path]) {
                let name = crate::modules::name_of(path);
                let module = &selection.modules[&name];
                let ready = |need: &String| loaded.contains(need) || need == "built_in";
                assert!(module.depends.iter().all(ready), "{line}");
                assert!(loaded.insert(name), "{line}");
            }
        }
    }

    #[test]
    fn a_module_is_named_as_it_lies_in_the_image() {
        let mut selection = selection();
        selection.compressed = ["left".to_owned(), "base".to_owned()].into();
        let text = dep(&selection);
        let top = "kernel/top.ko: kernel/right.ko kernel/left.ko.zst kernel/base.ko.zst\n";
        assert!(text.starts_with("kernel/base.ko.zst:\n") && text.ends_with(top), "{text}");
    }

    #[test]
    fn the_other_files_have_one_line_each() {
        let selection = selection();
        assert!(alias(&selection).contains("\nalias pci:left* left\n"));
        assert!(softdep(&selection).contains("\nsoftdep top pre: x\n"));
        assert!(load(&selection).ends_with("\nbase\n"));
    }
}
