//! Volumes and partition tables of ours, as tools that are not ours see them.

use std::fs;
use std::path::Path;
use std::process::Command;

use initramfs::disk::{fat, gpt};

/// Runs a tool that must be content, and gives what it says.
fn content(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output();
    let output = output.unwrap_or_else(|error| {
        panic!(
            "{program}: {error}: apt-get install -y --no-install-recommends dosfstools mtools fdisk"
        )
    });
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{program}: {said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    said
}

#[test]
fn a_volume_is_sound_to_fsck_and_its_files_come_out_by_mtools() {
    let dir = tempfile::tempdir().unwrap();
    let program: Vec<u8> = (0..3_000_001_u32).map(|n| (n % 251) as u8).collect();
    let files = [
        ("EFI/BOOT/BOOTX64.EFI", program.as_slice()),
        ("README.TXT", b"hello".as_slice()),
        ("EMPTY", b""),
    ];
    for (form, clusters) in [(fat::Form::Fat32, "5864/65541"), (fat::Form::Fat16, "1468/4101")] {
        let volume = fat::Volume { form, label: "LAYER0", files: &files, spare: 0, hidden: 0 };
        let image = fat::volume(&volume).unwrap();
        let path = dir.path().join("volume");
        fs::write(&path, image).unwrap();
        let at = path.to_str().unwrap();
        let said = content("fsck.fat", &["-n", "-v", at]);
        assert!(said.contains(&format!(": 6 files, {clusters} clusters")), "{said}");
        for (name, contents) in files {
            let out = dir.path().join("out");
            content("mcopy", &["-n", "-o", "-i", at, &format!("::{name}"), out.to_str().unwrap()]);
            assert!(fs::read(&out).unwrap() == contents, "{name}");
        }
        assert!(content("mdir", &["-i", at, "::"]).contains("LAYER0"));
    }
}

#[test]
fn a_disk_has_one_efi_system_partition_and_nothing_is_wrong_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let volume = fat::volume(&fat::Volume {
        form: fat::Form::Fat32,
        label: "LAYER0",
        files: &[("EFI/BOOT/BOOTX64.EFI", b"MZ".as_slice())],
        spare: 0,
        hidden: 2048,
    })
    .unwrap();
    let path = dir.path().join("disk");
    fs::write(&path, gpt::disk("Layer0", &volume, Some(&[0x90; 400]))).unwrap();
    let verified = content("sfdisk", &["--verify", disk(&path)]);
    assert!(verified.contains("No errors detected"), "{verified}");
    let dump = content("sfdisk", &["--json", disk(&path)]);
    let dump: serde_json::Value = serde_json::from_str(&dump).unwrap();
    let partitions = dump["partitiontable"]["partitions"].as_array().unwrap();
    assert_eq!(partitions.len(), 1);
    assert_eq!(partitions[0]["type"], "C12A7328-F81F-11D2-BA4B-00A0C93EC93B");
    assert_eq!(partitions[0]["start"], 2048);
    assert_eq!(partitions[0]["name"], "Layer0");
    assert_eq!(partitions[0]["attrs"], "LegacyBIOSBootable");
    assert_eq!(partitions[0]["size"].as_u64().unwrap() * 512, volume.len() as u64);
}

fn disk(path: &Path) -> &str {
    path.to_str().unwrap()
}
