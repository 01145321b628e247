//! What an image has for the machines it is built for: their drivers, and the firmware that those ask for.

use std::fs;

use initramfs::elf::fake;
use initramfs::image::hardware::FirmwareSource;
use protocol::facts::NodeFacts;

use crate::fixture::{Fixture, RELEASE};

/// Facts of a node with one NIC, which asks for its driver by this alias.
fn facts(modalias: &str) -> Vec<NodeFacts> {
    let text = format!(
        "{{\"node\": \"n7\", \"hardware\": {{\"kernel\": \"6.1\", \"devices\": [{{\"modalias\": \"{modalias}\", \
         \"place\": \"0000:01:00.0\", \"driver\": \"nic\", \"class\": \"nic\"}}]}}}}"
    );
    protocol::facts::parse(&text).unwrap()
}

#[test]
fn an_image_for_machines_has_their_drivers_and_no_others_and_says_whose_are_missing() {
    let mut fixture = Fixture::new();
    let dir = fixture.dir.path().join(RELEASE);
    let driver = fake::module(&[("alias", "pci:v0000ABCDd00000001sv*sd*bc*sc*i*")]);
    fs::write(dir.join("kernel/card.ko"), driver).unwrap();
    let alias = |device: u8| format!("pci:v0000ABCDd0000000{device}sv0sd0bc02sc00i00");
    fixture.config.hardware.nodes = Some(facts(&alias(1)));
    let report = fixture.build().unwrap();
    assert!(report.manifest.modules.iter().any(|name| name == "card"));
    assert!(!report.manifest.modules.iter().any(|name| name == "other"));
    fixture.config.hardware.nodes = Some(facts(&alias(2)));
    let error = fixture.build().unwrap_err().to_string();
    let expected = "node n7 would lose its NIC abcd:0002 at 0000:01:00.0, which nic drives there";
    assert!(error.contains(expected), "{error}");
}

#[test]
fn all_modules_are_in_where_that_is_asked_for() {
    let mut fixture = Fixture::new();
    assert!(!fixture.build().unwrap().manifest.modules.iter().any(|name| name == "other"));
    fixture.config.hardware.all_modules = true;
    assert!(fixture.build().unwrap().manifest.modules.iter().any(|name| name == "other"));
}

#[test]
fn firmware_that_modules_ask_for_is_in_the_image_and_in_the_manifest() {
    let mut fixture = Fixture::new();
    let dir = fixture.dir.path().join(RELEASE);
    let overlay = fake::module(&[("firmware", "card/one.bin"), ("firmware", "card/two.bin")]);
    fs::write(dir.join("kernel/fs/overlay.ko"), overlay).unwrap();
    let firmware = fixture.dir.path().join("firmware");
    fs::create_dir_all(firmware.join("card")).unwrap();
    fs::write(firmware.join("card/one.bin"), b"microcode").unwrap();
    assert!(fixture.build().unwrap().manifest.firmware.is_empty());
    fixture.config.hardware.firmware = vec![FirmwareSource::Dir(firmware)];
    let manifest = fixture.build().unwrap().manifest;
    let sizes: Vec<_> = manifest.firmware.iter().map(|it| (it.file.as_str(), it.size)).collect();
    assert_eq!(sizes, [("card/one.bin", Some(9)), ("card/two.bin", None)]);
    assert_eq!(manifest.firmware[0].modules, ["overlay"]);
    let entries = fixture.entries();
    assert_eq!(entries["lib/firmware/card/one.bin"].contents, b"microcode");
}

/// A Debian package with these entries: path, and contents or where a link leads.
fn deb(entries: &[(&str, Result<&str, &str>)]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, body) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        match body {
            Ok(text) => {
                header.set_size(u64::try_from(text.len()).unwrap());
                tar.append_data(&mut header, path, text.as_bytes()).unwrap();
            }
            Err(target) => {
                header.set_entry_type(tar::EntryType::Symlink);
                header.set_size(0);
                tar.append_link(&mut header, path, target).unwrap();
            }
        }
    }
    let mut deb = ar::Builder::new(Vec::new());
    let data = tar.into_inner().unwrap();
    for (name, bytes) in [("debian-binary", b"2.0\n".to_vec()), ("data.tar", data)] {
        let size = u64::try_from(bytes.len()).unwrap();
        deb.append(&ar::Header::new(name.into(), size), bytes.as_slice()).unwrap();
    }
    deb.into_inner().unwrap()
}

#[test]
fn a_firmware_package_is_read_through_its_links_and_writes_through_none() {
    let mut fixture = Fixture::new();
    let module = fake::module(&[("firmware", "card/alias.bin")]);
    fs::write(fixture.dir.path().join(RELEASE).join("kernel/fs/overlay.ko"), module).unwrap();
    let outside = fixture.dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    let file = fixture.dir.path().join("firmware.deb");
    let good = [
        ("lib/firmware/card/one.bin", Ok("microcode")),
        ("lib/firmware/card/alias.bin", Err("one.bin")),
    ];
    fs::write(&file, deb(&good)).unwrap();
    fixture.config.hardware.firmware = vec![FirmwareSource::Deb(file.clone())];
    assert_eq!(fixture.build().unwrap().manifest.firmware[0].size, Some(9));
    let evil = [
        ("lib/firmware/card", Err(outside.to_str().unwrap())),
        ("lib/firmware/card/evil", Ok("written")),
    ];
    fs::write(&file, deb(&evil)).unwrap();
    assert!(fixture.build().is_err());
    assert_eq!(fs::read_dir(outside).unwrap().count(), 0);
}
