//! The lists in `kernel-config` can be read, and have what the rest of the project counts on.

use std::fs;
use std::path::Path;

use initramfs::kernel::kconfig;
use initramfs::modules::wanted::{self, Need, Pick};

fn read(name: &str) -> String {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernel-config");
    fs::read_to_string(dir.join(name)).unwrap()
}

#[test]
fn every_flavour_has_its_modules_and_packages() {
    let lists = wanted::parse(&read("modules.toml")).unwrap();
    for flavour in ["cloud", "generic", "custom"] {
        let list = lists.list(flavour).unwrap();
        let overlay = Pick::Name("overlay".to_owned());
        let overlay = list.iter().find(|wanted| wanted.pick == overlay).unwrap();
        assert!(overlay.load && overlay.need == Need::Required, "{flavour}");
        assert_eq!(lists.packages(flavour).is_empty(), flavour == "custom", "{flavour}");
    }
}

#[test]
fn every_symbol_has_a_name_of_the_kernel_and_a_reason_and_stands_once() {
    let required = kconfig::parse_required(&read("required.toml")).unwrap();
    let mut names: Vec<_> = required.iter().map(|symbol| symbol.name.as_str()).collect();
    assert!(names.iter().all(|name| name.starts_with("CONFIG_")));
    assert!(required.iter().all(|symbol| !symbol.reason.is_empty()));
    names.sort_unstable();
    let count = names.len();
    names.dedup();
    assert_eq!(names.len(), count);
}
