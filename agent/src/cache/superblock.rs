//! What file system a disk holds and how it is labelled, from its first bytes: ext2 to ext4, XFS and btrfs (their superblocks
//! as Linux has them: `fs/ext4/ext4.h`, `fs/xfs/libxfs/xfs_format.h`, `fs/btrfs/ctree.h`). Pure.

/// How much of a disk is looked at, in bytes: btrfs's superblock ends last.
pub const LOOKED_AT: usize = (64 << 10) + 4096;

/// A file system that was recognised.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    /// The kernel's name of the file system.
    pub kind: &'static str,
    /// Its label; empty where it has none.
    pub label: String,
}

/// Where a file system says who it is.
struct Format {
    kind: &'static str,
    magic: &'static [u8],
    magic_at: usize,
    label_at: usize,
    label_bytes: usize,
}

const FORMATS: [Format; 3] = [
    Format {
        kind: "ext4",
        magic: &[0x53, 0xef],
        magic_at: 1024 + 0x38,
        label_at: 1024 + 0x78,
        label_bytes: 16,
    },
    Format { kind: "xfs", magic: b"XFSB", magic_at: 0, label_at: 108, label_bytes: 12 },
    Format {
        kind: "btrfs",
        magic: b"_BHRfS_M",
        magic_at: (64 << 10) + 0x40,
        label_at: (64 << 10) + 0x12b,
        label_bytes: 256,
    },
];

/// Recognises a file system by the beginning of a disk. A label that is not UTF-8 is none.
#[must_use]
pub fn recognise(disk: &[u8]) -> Option<Superblock> {
    FORMATS.iter().find_map(|format| {
        let part = |at: usize, length: usize| disk.get(at..at.checked_add(length)?);
        if part(format.magic_at, format.magic.len())? != format.magic {
            return None;
        }
        let label = part(format.label_at, format.label_bytes)?;
        let end = label.iter().position(|byte| *byte == 0).unwrap_or(label.len());
        let label = std::str::from_utf8(label.get(..end)?).unwrap_or_default().to_owned();
        Some(Superblock { kind: format.kind, label })
    })
}

/// Looks at any bytes, for fuzzing.
pub fn fuzz_superblock(bytes: &[u8]) {
    let _ = recognise(bytes);
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn what_mkfs_writes_is_recognised() {
        let dir = tempfile::tempdir().expect("directory");
        let disk = dir.path().join("disk");
        for (label, expected) in
            [("LAYERCAKE", "LAYERCAKE"), ("0123456789abcdef", "0123456789abcdef"), ("", "")]
        {
            std::fs::File::create(&disk).and_then(|file| file.set_len(4 << 20)).expect("disk");
            let mkfs =
                Command::new("/sbin/mkfs.ext4").args(["-q", "-F", "-L", label]).arg(&disk).status();
            assert!(mkfs.expect("mkfs.ext4: apt-get install e2fsprogs").success());
            let bytes = std::fs::read(&disk).expect("read");
            let found = recognise(&bytes[..LOOKED_AT]).expect("ext4");
            assert_eq!(found, Superblock { kind: "ext4", label: expected.to_owned() });
        }
    }

    /// A disk with nothing but a magic number and a label.
    fn disk(magic_at: usize, magic: &[u8], label_at: usize, label: &[u8]) -> Vec<u8> {
        let mut disk = vec![0; LOOKED_AT];
        disk[magic_at..magic_at + magic.len()].copy_from_slice(magic);
        disk[label_at..label_at + label.len()].copy_from_slice(label);
        disk
    }

    #[test]
    fn xfs_and_btrfs_are_told_by_their_formats() {
        let xfs = disk(0, b"XFSB", 108, b"LAYERCAKEabc");
        let found = recognise(&xfs).expect("xfs");
        assert_eq!((found.kind, found.label.as_str()), ("xfs", "LAYERCAKEabc"));
        let btrfs = disk(0x1_0040, b"_BHRfS_M", 0x1_012b, b"LAYERCAKE");
        let found = recognise(&btrfs).expect("btrfs");
        assert_eq!((found.kind, found.label.as_str()), ("btrfs", "LAYERCAKE"));
        assert_eq!(recognise(&btrfs[..0x1_0048]), None, "cut off");
        let odd = disk(0, b"XFSB", 108, &[0xff, 0xfe]);
        assert_eq!(recognise(&odd).expect("xfs").label, "");
        assert_eq!(recognise(&[]), None);
        assert_eq!(recognise(&vec![0; LOOKED_AT]), None);
    }

    proptest::proptest! {
        #[test]
        fn no_disk_makes_the_reader_panic(
            bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..1200), at in 0..LOOKED_AT, size in 0..=LOOKED_AT,
        ) {
            fuzz_superblock(&bytes);
            let mut disk = disk(0x438, &[0x53, 0xef], 0x478, b"LAYERCAKE");
            let end = (at + bytes.len()).min(LOOKED_AT);
            disk[at..end].copy_from_slice(&bytes[..end - at]);
            fuzz_superblock(&disk[..size]);
        }
    }
}
