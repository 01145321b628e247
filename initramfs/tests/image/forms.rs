//! The forms that an image comes in beside kernel and initramfs.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use initramfs::image::forms::Form;
use initramfs::pe;
use protocol::ids::Digest;

use crate::fixture::{Fixture, RELEASE, run};

#[test]
fn one_efi_program_holds_this_kernel_and_this_initramfs_and_goes_when_it_is_not_asked_for() {
    let mut fixture = Fixture::new();
    fs::write(fixture.dir.path().join("stub"), pe::fake()).unwrap();
    fixture.config.forms = BTreeSet::from([Form::Uki]);
    fixture.config.options.stub = Some(fixture.dir.path().join("stub"));
    fixture.config.options.command_line = "console=ttyS0".to_owned();
    let report = fixture.build().unwrap();
    let image = fixture.out("layer0.efi");
    let artifact = report.manifest.artifacts.iter().find(|it| it.name == "layer0.efi").unwrap();
    assert_eq!(artifact.digest, Digest::of(&image));
    let sections = pe::sections(&image).unwrap();
    for (name, file) in [(".linux", "vmlinuz"), (".initrd", "initramfs.img")] {
        let section = sections.iter().find(|it| it.name == name).unwrap();
        assert_eq!(section.contents(&image).unwrap(), fixture.out(file), "{name}");
    }
    assert!(fixture.build().unwrap().unchanged);
    fixture.config.forms.clear();
    assert_eq!(fixture.build().unwrap().manifest.artifacts.len(), 3);
    assert!(!fixture.config.out.join("layer0.efi").exists());
}

/// A build with every form, out of a kernel and a stub that are none: what is made of them boots nowhere.
fn with_every_form() -> Fixture {
    let mut fixture = Fixture::new();
    fs::write(fixture.dir.path().join("stub"), pe::fake()).unwrap();
    fixture.config.forms = BTreeSet::from([Form::Uki, Form::Iso, Form::Usb, Form::Bundle]);
    fixture.config.options.stub = Some(fixture.dir.path().join("stub"));
    fixture.config.options.command_line = "console=ttyS0".to_owned();
    // As it is where nobody says otherwise; some tools take it for no time.
    fixture.config.mtime = 0;
    fixture
}

#[test]
fn every_form_is_the_same_wherever_and_whenever_it_is_made() {
    let (first, second) = (with_every_form(), with_every_form());
    let report = first.build().unwrap();
    // Tools that take the time take it by the second, and FAT has one for two of them.
    let later = std::time::Instant::now() + std::time::Duration::from_millis(2100);
    while std::time::Instant::now() < later {
        std::thread::yield_now();
    }
    second.build().unwrap();
    let names = [
        "layer0.efi",
        "layer0.iso",
        "layer0-usb.img",
        "layer0-bundle.tar",
        "sbom.cdx.json",
        "SHA256SUMS",
        "manifest.json",
    ];
    for name in names {
        assert!(first.out(name) == second.out(name), "{name}");
    }
    let inputs = report.manifest.inputs.unwrap();
    assert_eq!(inputs.forms, ["uki", "iso", "usb", "bundle"]);
    assert_eq!((inputs.compression.as_str(), inputs.mtime), ("zstd:18", 0));
    assert!(first.build().unwrap().unchanged);
}

#[test]
fn the_checksums_hold_in_the_directory_and_in_the_bundle() {
    let fixture = with_every_form();
    fixture.build().unwrap();
    let unpacked = fixture.dir.path().join("unpacked");
    fs::create_dir(&unpacked).unwrap();
    run(&fixture.config.out, "tar", &["-xf", "layer0-bundle.tar", "-C", "../unpacked"]);
    for dir in [fixture.config.out.clone(), unpacked.join("layer0")] {
        let said = run(&dir, "sha256sum", &["--strict", "-c", "SHA256SUMS"]);
        assert_eq!(said.lines().filter(|line| line.ends_with(": OK")).count(), 8, "{said}");
    }
    fs::write(fixture.config.out.join("vmlinuz"), "spoilt").unwrap();
    let verdict = Command::new("sha256sum")
        .args(["-c", "SHA256SUMS"])
        .current_dir(&fixture.config.out)
        .output();
    assert!(!verdict.unwrap().status.success());
}

#[test]
fn the_disk_and_the_cd_hold_the_program_the_kernel_and_the_initramfs() {
    let fixture = with_every_form();
    fixture.build().unwrap();
    let out = &fixture.config.out;
    let files = [
        ("EFI/BOOT/BOOTX64.EFI", "layer0.efi"),
        ("VMLINUZ", "vmlinuz"),
        ("INITRD.IMG", "initramfs.img"),
    ];
    for (inside, outside) in files {
        run(
            out,
            "mcopy",
            &["-n", "-o", "-i", "layer0-usb.img@@1M", &format!("::{inside}"), "../file"],
        );
        assert!(
            fs::read(fixture.dir.path().join("file")).unwrap() == fixture.out(outside),
            "{inside}"
        );
    }
    run(out, "sfdisk", &["--verify", "layer0-usb.img"]);
    let files = [
        ("/boot/vmlinuz", "vmlinuz"),
        ("/boot/initrd.img", "initramfs.img"),
        ("/boot/efi.img", "efi.img"),
    ];
    for (inside, outside) in files {
        let to = fixture.dir.path().join("file");
        fs::remove_file(&to).unwrap();
        run(
            out,
            "xorriso",
            &["-indev", "layer0.iso", "-osirrox", "on", "-extract", inside, to.to_str().unwrap()],
        );
        if outside == "efi.img" {
            run(
                out,
                "mcopy",
                &["-n", "-o", "-i", to.to_str().unwrap(), "::EFI/BOOT/BOOTX64.EFI", "../program"],
            );
            assert!(
                fs::read(fixture.dir.path().join("program")).unwrap() == fixture.out("layer0.efi")
            );
        } else {
            assert!(fs::read(&to).unwrap() == fixture.out(outside), "{inside}");
        }
    }
    let catalogue = run(out, "xorriso", &["-indev", "layer0.iso", "-report_el_torito", "plain"]);
    for word in ["BIOS", "UEFI"] {
        assert!(catalogue.contains(word), "{catalogue}");
    }
}

#[test]
fn the_initramfs_is_linked_into_kernels_of_ours_alone() {
    let mut fixture = Fixture::new();
    fixture.config.forms = BTreeSet::from([Form::Efi]);
    let error = fixture.error();
    assert!(error.contains(RELEASE) && error.contains("--flavour virt"), "{error}");
}

#[test]
fn a_missing_stub_names_the_package_that_has_it() {
    let mut fixture = Fixture::new();
    fixture.config.forms = BTreeSet::from([Form::Uki]);
    fixture.config.options.stub = Some(fixture.dir.path().join("nowhere"));
    let error = fixture.error();
    assert!(
        error.contains("nowhere: apt-get install") && error.contains("systemd-boot-efi"),
        "{error}"
    );
}
