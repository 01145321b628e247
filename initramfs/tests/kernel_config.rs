//! The lists in `kernel-config` can be read, and have what the rest of the project counts on.

use std::fs;
use std::path::Path;

use initramfs::kernel::{fragments, kconfig};
use initramfs::modules::wanted::{self, Need, Pick};

fn read(name: &str) -> String {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernel-config");
    fs::read_to_string(dir.join(name)).unwrap()
}

#[test]
fn every_flavour_has_its_modules_and_packages() {
    let lists = wanted::parse(&read("modules.toml")).unwrap();
    for flavour in ["cloud", "generic", "custom", "virt", "hw"] {
        let list = lists.list(flavour).unwrap();
        let overlay = Pick::Name("overlay".to_owned());
        let overlay = list.iter().find(|wanted| wanted.pick == overlay).unwrap();
        assert!(overlay.load && overlay.need == Need::Required, "{flavour}");
        assert_eq!(lists.packages(flavour).is_empty(), !["cloud", "generic"].contains(&flavour));
    }
}

#[test]
fn every_symbol_has_a_name_of_the_kernel_and_a_reason_and_stands_once() {
    let required = kconfig::parse_required(&read("required.toml")).unwrap();
    let mut names: Vec<_> = required.iter().map(|symbol| symbol.name.as_str()).collect();
    assert!(names.iter().all(|name| name.starts_with("CONFIG_")));
    assert!(required.iter().all(|symbol| !symbol.reason.is_empty()));
    let told = |symbol: &kconfig::Symbol| symbol.without.is_some();
    assert!(required.iter().all(|symbol| told(symbol) == (symbol.need == Need::Optional)));
    names.sort_unstable();
    let count = names.len();
    names.dedup();
    assert_eq!(names.len(), count);
}

#[test]
fn the_fragments_of_every_flavour_merge_and_ask_for_what_layer0_relies_on() {
    let flavours = fragments::parse_flavours(&read("flavours.toml")).unwrap();
    let required = kconfig::parse_required(&read("required.toml")).unwrap();
    assert!(flavours.flavour.contains_key("virt") && !flavours.source.is_empty());
    for (name, flavour) in &flavours.flavour {
        let text =
            |fragment: &String| (fragment.clone(), read(&format!("fragments/{fragment}.config")));
        let texts: Vec<_> = flavour.fragments.iter().map(text).collect();
        let wishes = fragments::merge(&texts).unwrap();
        let asked = |symbol: &kconfig::Symbol| {
            wishes.get(&symbol.name).is_some_and(|wish| wish.value != "n")
        };
        // What kconfig gives without being asked is in no fragment.
        let required = kconfig::of_flavour(required.clone(), name);
        let needed = required.iter().filter(|symbol| symbol.need == Need::Required);
        let unasked: Vec<_> = needed.filter(|it| !asked(it)).map(|it| &it.name).collect();
        assert!(unasked.is_empty(), "{name}: {unasked:?}");
    }
}

#[test]
fn every_fragment_is_used_or_is_the_one_for_debugging() {
    let flavours = fragments::parse_flavours(&read("flavours.toml")).unwrap();
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernel-config/fragments");
    for entry in fs::read_dir(dir).unwrap() {
        let name = entry.unwrap().file_name().to_string_lossy().replace(".config", "");
        let used = flavours.flavour.values().any(|flavour| flavour.fragments.contains(&name));
        assert!(used || name == "debug", "{name}");
    }
}
