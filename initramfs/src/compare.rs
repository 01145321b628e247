//! Where two files of an image differ: the first byte, and, for what has parts, which ones: entries of an initramfs, sections of an
//! EFI program. Pure.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::archive::{self, Entry};
use crate::compress;
use crate::pe;

/// Most bytes that an initramfs is unpacked to for this.
const MAX_UNPACKED: usize = 1 << 30;
/// Most parts that are named.
const MAX_PARTS: usize = 12;

/// A file that is not the same in both builds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// Its name.
    pub artifact: String,
    /// First byte that differs: where the shorter one ends, if it is the other's beginning.
    pub offset: u64,
    /// Sizes of the one there is and the one built again, in bytes.
    pub sizes: (u64, u64),
    /// Which parts differ, and how; empty where it has none, or the parts are all the same.
    pub parts: Vec<String>,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { artifact, offset, sizes: (old, new), parts } = self;
        write!(f, "{artifact} differs from byte {offset} on")?;
        if old != new {
            write!(f, " ({old} bytes, built again {new})")?;
        }
        parts.iter().try_for_each(|part| write!(f, "\n  {part}"))
    }
}

/// How the file there is differs from the one built again, if it does.
#[must_use]
pub fn files(artifact: &str, old: &[u8], new: &[u8]) -> Option<Difference> {
    let offset = first_difference(old, new)?;
    let mut parts = parts(old, new);
    if parts.len() > MAX_PARTS {
        let more = parts.len() - MAX_PARTS;
        parts.truncate(MAX_PARTS);
        parts.push(format!("and {more} more"));
    }
    let size = |bytes: &[u8]| u64::try_from(bytes.len()).unwrap_or(u64::MAX);
    let sizes = (size(old), size(new));
    Some(Difference { artifact: artifact.to_owned(), offset: offset as u64, sizes, parts })
}

fn first_difference(old: &[u8], new: &[u8]) -> Option<usize> {
    if old == new {
        return None;
    }
    let at = old.iter().zip(new).position(|(one, other)| one != other);
    Some(at.unwrap_or(old.len().min(new.len())))
}

fn parts(old: &[u8], new: &[u8]) -> Vec<String> {
    if let (Ok(one), Ok(other)) = (pe::sections(old), pe::sections(new)) {
        return sections((old, &one), (new, &other));
    }
    match (entries(old), entries(new)) {
        (Some(one), Some(other)) => entries_that_differ(&one, &other),
        _ => Vec::new(),
    }
}

fn sections(
    (old, one): (&[u8], &[pe::Section]),
    (new, other): (&[u8], &[pe::Section]),
) -> Vec<String> {
    let mut said = Vec::new();
    for section in one {
        let Some(again) = other.iter().find(|it| it.name == section.name) else {
            said.push(format!("section {} is not built again", section.name));
            continue;
        };
        let contents = section.contents(old).zip(again.contents(new));
        let Some((before, after)) = contents else { continue };
        if let Some(at) = first_difference(before, after) {
            said.push(format!("section {} differs from its byte {at} on", section.name));
            if let (Some(one), Some(other)) = (entries(before), entries(after)) {
                said.extend(entries_that_differ(&one, &other));
            }
        }
    }
    let new = other.iter().filter(|it| !one.iter().any(|known| known.name == it.name));
    said.extend(new.map(|it| format!("section {} is new", it.name)));
    said
}

/// The entries of an initramfs by their paths, as the kernel leaves them: of two with one path the last.
fn entries(bytes: &[u8]) -> Option<BTreeMap<String, Entry>> {
    compress::Kind::of(bytes)?;
    let plain = compress::unpack(bytes, MAX_UNPACKED).ok()?;
    let entries = archive::read_all(&plain).ok()?;
    Some(entries.into_iter().map(|entry| (entry.path.clone(), entry)).collect())
}

fn entries_that_differ(
    one: &BTreeMap<String, Entry>,
    other: &BTreeMap<String, Entry>,
) -> Vec<String> {
    let mut said = Vec::new();
    for (path, entry) in one {
        let Some(again) = other.get(path) else {
            said.push(format!("entry {path} is not built again"));
            continue;
        };
        if let Some(at) = first_difference(&entry.contents, &again.contents) {
            let sizes = (entry.contents.len(), again.contents.len());
            said.push(format!(
                "entry {path} differs from its byte {at} on ({} bytes, built again {})",
                sizes.0, sizes.1
            ));
        } else if (entry.mode, entry.owner, entry.mtime, entry.device)
            != (again.mode, again.owner, again.mtime, again.device)
        {
            said.push(format!("entry {path} has another mode, owner, time or device"));
        }
    }
    let new = other.keys().filter(|path| !one.contains_key(*path));
    said.extend(new.map(|path| format!("entry {path} is new")));
    said
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compress::Compression;
    use crate::tree::Tree;

    fn initramfs(agent: &[u8], more: Option<&str>) -> Vec<u8> {
        let mut tree = Tree::new();
        tree.file("init", 0o755, agent.to_vec()).unwrap();
        tree.file("etc/a", if more.is_some() { 0o600 } else { 0o644 }, vec![1]).unwrap();
        if let Some(path) = more {
            tree.file(path, 0o644, Vec::new()).unwrap();
        }
        Compression::Zstd(1).compress(archive::write(&tree, 0).unwrap()).unwrap()
    }

    #[test]
    fn the_entry_that_differs_is_named() {
        let (old, new) = (initramfs(b"agent one", None), initramfs(b"agent two", Some("etc/b")));
        assert_eq!(files("initramfs.img", &old, &old), None);
        let difference = files("initramfs.img", &old, &new).unwrap();
        assert_eq!(
            difference.parts,
            [
                "entry etc/a has another mode, owner, time or device",
                "entry init differs from its byte 6 on (9 bytes, built again 9)",
                "entry etc/b is new",
            ]
        );
        assert!(difference.to_string().starts_with("initramfs.img differs from byte "));
        let back = files("initramfs.img", &new, &old).unwrap();
        assert_eq!(
            back.parts.last().unwrap(),
            "entry init differs from its byte 6 on (9 bytes, built again 9)"
        );
        assert!(back.parts.contains(&"entry etc/b is not built again".to_owned()));
    }

    #[test]
    fn of_an_efi_program_the_section_is_named_and_what_is_in_it() {
        let program = |agent: &[u8], line: &[u8]| {
            let initrd = initramfs(agent, None);
            pe::append(&pe::fake(), &[(".initrd", &initrd), (".cmdline", line)]).unwrap()
        };
        let old = program(b"one", b"quiet");
        let difference = files("layer0.efi", &old, &program(b"two", b"quiet")).unwrap();
        assert!(difference.parts[0].starts_with("section .initrd differs"), "{difference}");
        assert!(difference.parts[1].starts_with("entry init differs"), "{difference}");
        let difference = files("layer0.efi", &old, &program(b"one", b"quite")).unwrap();
        assert_eq!(difference.parts, ["section .cmdline differs from its byte 3 on"]);
    }

    #[test]
    fn a_file_that_was_cut_differs_where_it_ends() {
        let difference = files("vmlinuz", b"abcd", b"ab").unwrap();
        assert_eq!((difference.offset, difference.sizes, difference.parts.len()), (2, (4, 2), 0));
        assert_eq!(
            difference.to_string(),
            "vmlinuz differs from byte 2 on (4 bytes, built again 2)"
        );
    }
}
