//! Tests: hostile archives. Each is refused with an error of its own, and nothing appears outside the layer's root.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use proptest::prelude::*;

use super::testing::{Tar, header, record};
use super::{Limits, MAX_EXTENSION_BYTES, apply};

/// Applies an archive beside a canary and returns what became of it, in words.
fn outcome(bytes: &[u8]) -> Result<(), String> {
    let area = tempfile::tempdir().expect("temporary directory");
    let outside = area.path().join("outside");
    let root = area.path().join("root");
    fs::create_dir(&outside).expect("outside");
    fs::create_dir(&root).expect("root");
    fs::write(outside.join("canary"), "alive").expect("canary");
    let before = fs::metadata(outside.join("canary")).expect("canary").ctime_nsec();
    let limits = Limits { bytes: 64 << 20, entries: 10_000 };
    let outcome = apply(bytes, &root, &limits);
    let names: Vec<_> = fs::read_dir(&outside).expect("outside").flatten().collect();
    assert_eq!(names.len(), 1, "something appeared outside: {names:?}");
    let canary = fs::metadata(outside.join("canary")).expect("canary");
    assert_eq!((canary.ctime_nsec(), canary.nlink()), (before, 1), "the canary was touched");
    assert_eq!(fs::read_dir(area.path()).expect("area").count(), 2, "something lies beside root");
    assert_eq!(devices(&root), 0, "a device node was made");
    outcome.map(drop).map_err(|error| match std::error::Error::source(&error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    })
}

/// Device nodes below a directory, whiteouts aside.
fn devices(dir: &std::path::Path) -> usize {
    let entries = fs::read_dir(dir).expect("directory").flatten();
    entries
        .map(|entry| {
            let meta = entry.metadata().expect("metadata");
            let kind = meta.file_type();
            match kind.is_dir() {
                true => devices(&entry.path()),
                false => {
                    usize::from(kind.is_block_device() || kind.is_char_device() && meta.rdev() != 0)
                }
            }
        })
        .sum()
}

#[track_caller]
fn refused(archive: Tar, expected: &str) {
    refused_bytes(&archive.end(), expected);
}

#[track_caller]
fn refused_bytes(bytes: &[u8], expected: &str) {
    let error = outcome(bytes).expect_err("the archive was accepted");
    assert!(error.contains(expected), "`{error}` does not say `{expected}`");
}

#[test]
fn paths_that_climb_are_refused() {
    for path in ["../outside/x", "a/../../outside/x", "/../outside/x", "..", "a/.."] {
        refused(Tar::default().file(path, b"x"), "`..` component");
    }
    let pax = Tar::default().pax(&[("path", b"a/../../outside/x")]);
    refused(pax.file("a", b"x"), "`..` component");
    refused(Tar::default().raw(b'L', b"l", b"", 0, b"../outside/x\0").file("a", b"x"), "`..`");
}

#[test]
fn absolute_paths_stay_in_the_root() {
    outcome(&Tar::default().file("/etc/passwd", b"x").end()).expect("stripped");
}

#[test]
fn a_symlink_cannot_be_written_through() {
    let through = |target: &str| Tar::default().symlink("s", target).file("s/canary", b"x");
    refused(through("/outside"), "leads to nothing in this layer");
    refused(through("../outside"), "leads to nothing in this layer");
    refused(through("s"), "symlink loop");
    refused(through("/proc/self/cwd"), "leads to nothing in this layer");
    let deep = Tar::default().dir("a").symlink("a/s", "../../outside").file("a/s/b/x", b"x");
    refused(deep, "leads to nothing in this layer");
    let file = Tar::default().file("f", b"x").file("f/x", b"x");
    refused(file, "is used as a directory but is none");
    // The last component is replaced, never followed.
    let last = Tar::default().symlink("s", "../outside/canary").file("s", b"dead");
    outcome(&last.end()).expect("replaced");
    let whiteout = Tar::default().symlink("s", "../outside").file("s/.wh.canary", b"");
    refused(whiteout, "leads to nothing");
    let opaque = Tar::default().symlink("s", "../outside").file("s/.wh..wh..opq", b"");
    refused(opaque, "leads to nothing");
}

#[test]
fn hard_links_reach_only_files_of_the_layer() {
    refused(Tar::default().link("l", "../outside/canary"), "`..` component");
    refused(Tar::default().link("l", "/outside/canary"), "not in this layer");
    refused(Tar::default().link("l", "/etc/passwd"), "not in this layer");
    let through = Tar::default().symlink("s", "../outside").link("l", "s/canary");
    refused(through, "not in this layer");
    refused(Tar::default().dir("d").link("l", "d"), "neither a file nor a symlink");
    refused(Tar::default().file("f", b"").link("f", "f"), "to itself");
    refused(Tar::default().file(".wh.f", b"").link("l", "f"), "neither a file nor a symlink");
    // A hard link to a symlink is a second symlink; writing through it replaces it.
    let symlink = Tar::default().symlink("s", "../outside/canary").link("l", "s").file("l", b"x");
    outcome(&symlink.end()).expect("harmless");
}

#[test]
fn device_nodes_are_refused_outside_dev_and_skipped_below_it() {
    for kind in [b'3', b'4'] {
        refused(Tar::default().raw(kind, b"sda", b"", 0o600, b""), "device node outside dev/");
        refused(Tar::default().raw(kind, b"dev", b"", 0o600, b""), "device node outside dev/");
        refused(Tar::default().raw(kind, b"x/dev/sda", b"", 0o600, b""), "outside dev/");
        outcome(&Tar::default().raw(kind, b"./dev/sda", b"", 0o600, b"").end()).expect("skipped");
    }
}

#[test]
fn whiteouts_of_nothing_are_refused() {
    for path in [".wh.", ".wh..", ".wh...", "d/.wh.", "d/.wh..", "d/.wh..."] {
        refused(Tar::default().dir("d").file(path, b""), "whiteout of nothing");
    }
    refused(Tar::default().file(".wh.a/b", b""), "below a whiteout");
    refused(Tar::default().file(".wh..wh.plnk", b""), "whiteout of a whiteout");
}

#[test]
fn names_that_are_too_long_are_refused_before_they_are_held() {
    refused(
        Tar::default()
            .file(&"n".repeat(100), b"")
            .raw(b'L', b"l", b"", 0, &[b'n'; 300])
            .file("x", b""),
        "longer than a name",
    );
    let long = "long/".repeat(1000);
    refused(Tar::default().pax(&[("path", long.as_bytes())]).file("x", b""), "longer than a path");
    refused(Tar::default().pax(&[("path", b"a\0b")]).file("x", b""), "NUL");
    let deep = "d/".repeat(1000);
    refused(Tar::default().pax(&[("path", deep.as_bytes())]).file("x", b""), "too deeply");
    // The length alone is enough: the 64 MiB are never sent.
    for kind in [b'L', b'K', b'x', b'g'] {
        let bomb = Tar::default().header(&header(kind, b"bomb", b"", 0, 64 << 20));
        refused_bytes(&bomb.0, "exceed 64 KiB");
        let full = vec![b'n'; usize::try_from(MAX_EXTENSION_BYTES).expect("small") + 1];
        refused(Tar::default().raw(kind, b"bomb", b"", 0, &full), "exceed 64 KiB");
    }
    let comments =
        (0..200).fold(Tar::default(), |tar, _| tar.raw(b'g', b"g", b"", 0, b"12 comment=\n"));
    refused(comments.file("x", b""), "exceed 64 KiB");
}

#[test]
fn sizes_that_lie_are_refused() {
    refused(Tar::default().pax(&[("size", b"1")]).file("f", b"four"), "disagree");
    refused(Tar::default().pax(&[("size", b"1073741824")]).file("f", b""), "disagree");
    refused(Tar::default().pax(&[("size", b"-1")]).file("f", b""), "number is malformed");
    let huge = Tar::default().header(&header(b'0', b"f", b"", 0o644, 1 << 40));
    refused_bytes(&huge.0, "more than 67108864 bytes");
    for kind in [b'1', b'2', b'3', b'5', b'6'] {
        refused(Tar::default().raw(kind, b"x", b"y", 0o644, b"data"), "no file has a size");
    }
    let mut negative = header(b'0', b"f", b"", 0o644, 0);
    negative.as_old_mut().size = [0xff; 12];
    negative.set_cksum();
    refused(Tar::default().header(&negative), "size is no number");
}

#[test]
fn a_sparse_file_counts_with_its_holes_and_a_map_that_lies_is_refused() {
    let old = |real: u64, pieces: &[u8]| {
        let mut sparse = header(b'S', b"hole", b"", 0o644, 0);
        if let Some(gnu) = sparse.as_gnu_mut() {
            gnu.set_real_size(real);
        }
        sparse.as_mut_bytes()[386..386 + pieces.len()].copy_from_slice(pieces);
        sparse.set_cksum();
        Tar::default().header(&sparse)
    };
    refused(old(1 << 50, b""), "bytes of file contents");
    refused(old(10, b"00000000000\x0000000000005\0"), "not what the archive holds");
    refused(old(10, b"xxxxxxxxxxx\x0000000000005\0"), "is no number");
    let pax = |records: &[(&str, &[u8])]| Tar::default().pax(records).file("hole", b"");
    let version: [(&str, &[u8]); 2] = [("GNU.sparse.major", b"1"), ("GNU.sparse.minor", b"0")];
    let size: (&str, &[u8]) = ("GNU.sparse.realsize", b"1099511627776000");
    refused(pax(&[size, ("GNU.sparse.map", b"")]), "bytes of file contents");
    refused(pax(&[("GNU.sparse.map", b"0,5")]), "is missing");
    refused(pax(&[size, version[0], version[1]]), "has no end");
    refused(pax(&[size, version[0]]), "has no end");
    refused(pax(&[size, ("GNU.sparse.major", b"2")]), "unknown version");
    refused(pax(&[size, ("GNU.sparse.offset", b"0")]), "version 0.0");
    refused(pax(&[size, ("GNU.sparse.map", b"0,5,3,5")]), "overlap");
    let link = Tar::default().pax(&[size, ("GNU.sparse.map", b"")]);
    refused(link.raw(b'5', b"d", b"", 0o755, b""), "no file is sparse");
}

#[test]
fn contradicting_extensions_are_refused() {
    let twice = [record("path", b"a"), record("path", b"b")].concat();
    refused(Tar::default().raw(b'x', b"p", b"", 0, &twice).file("x", b""), "stands twice");
    refused(Tar::default().raw(b'x', b"p", b"", 0, b"3 a").file("x", b""), "malformed");
    refused(Tar::default().pax(&[]).pax(&[]).file("x", b""), "two PAX headers");
    let both = Tar::default().pax(&[("path", b"a")]).raw(b'L', b"l", b"", 0, b"b\0");
    refused(both.file("x", b""), "GNU and PAX both");
    refused(Tar::default().raw(b'g', b"g", b"", 0, &record("path", b"a")), "global");
    refused(Tar::default().pax(&[("path", b"a")]), "between an extension and its entry");
}

#[test]
fn attributes_that_speak_to_overlayfs_are_refused() {
    for name in ["trusted.overlay.opaque", "trusted.overlay.redirect", "user.overlay.metacopy"] {
        let key = format!("SCHILY.xattr.{name}");
        refused(Tar::default().pax(&[(&key, b"y")]).dir("d"), "must not set");
        refused(Tar::default().pax(&[(&key, b"y")]).file("f", b""), "must not set");
    }
}

#[test]
fn malformed_headers_are_refused() {
    let mut bytes = Tar::default().file("f", b"x").end();
    bytes[0] = b'g';
    refused_bytes(&bytes, "checksum");
    refused(Tar::default().raw(b'M', b"x", b"", 0, b""), "type of entry is unknown");
    refused(Tar::default().raw(b'V', b"x", b"", 0, b""), "type of entry is unknown");
    let mut owner = header(b'0', b"f", b"", 0o644, 0);
    owner.as_old_mut().uid = [0xff; 8];
    owner.set_cksum();
    refused(Tar::default().header(&owner), "owner");
    refused(Tar::default().pax(&[("uid", b"4294967295")]).file("f", b""), "owner");
    let mut lone = Tar::default().file("f", b"x").0;
    lone.resize(lone.len() + 512, 0);
    lone.extend_from_slice(&Tar::default().file("g", b"x").0);
    refused_bytes(&lone, "lone zero block");
    refused(Tar::default().file(".", b"x"), "root but not a directory");
    refused(Tar::default().symlink("s", ""), "impossible target");
}

#[test]
fn an_archive_cut_inside_an_entry_is_refused() {
    let whole = Tar::default().dir("d").pax(&[("path", b"d/f")]).file("f", &[7; 700]);
    // On the border of an entry, or behind the last content, the stream may end: its digest says whether it is whole.
    let borders = [0, 512, whole.0.len() - 324, whole.0.len()];
    let near = |at: &usize| at.is_multiple_of(17) || at % 512 < 2 || borders.contains(at);
    for length in (0..whole.0.len()).filter(near) {
        let error = outcome(&whole.0[..length]);
        assert_eq!(error.is_ok(), borders.contains(&length), "cut at {length}: {error:?}");
        if let Err(error) = error {
            assert!(error.contains("truncated"), "cut at {length}: {error}");
        }
    }
}

#[test]
fn limits_stop_an_archive_of_many_entries() {
    let many = (0..10_001).fold(Tar::default(), |tar, _| tar.file("f", b""));
    refused(many, "more than 10000 entries");
}

#[test]
fn a_directory_with_contents_is_not_replaced_and_an_empty_one_is() {
    refused(Tar::default().file("d/x", b"").file("d", b""), "a directory with contents");
    outcome(&Tar::default().dir("d").symlink("d", "../outside").end()).expect("replaced");
    let swapped = Tar::default().dir("d").dir("d/e").symlink("d/e", "../../outside");
    refused(swapped.file("d/e/x", b""), "leads to nothing");
}

/// A small archive of every kind of entry, for mutating.
fn sample() -> Vec<u8> {
    Tar::default()
        .dir("d")
        .pax(&[("path", b"d/a-pax-name"), ("SCHILY.xattr.user.k", b"v"), ("mtime", b"1.5")])
        .file("f", b"content")
        .symlink("s", "d")
        .link("s/l", "d/a-pax-name")
        .file("d/.wh.gone", b"")
        .raw(b'L', b"l", b"", 0, b"d/long\0")
        .raw(b'6', b"p", b"", 0o600, b"")
        .end()
}

/// Makes the checksums of all headers right again, so that mutations reach behind them.
fn repair(bytes: &mut [u8]) {
    for block in bytes.chunks_exact_mut(512) {
        let mut header = tar::Header::new_old();
        header.as_mut_bytes().copy_from_slice(block);
        if &block[257..262] == b"ustar" {
            header.set_cksum();
            block.copy_from_slice(header.as_bytes());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn mutated_archives_never_panic_and_never_escape(
        changes in prop::collection::vec((0..6656_usize, any::<u8>()), 1..8),
        repaired: bool,
        cut in prop::option::of(0..6656_usize),
    ) {
        let mut bytes = sample();
        for (at, value) in changes {
            let at = at % bytes.len();
            bytes[at] = value;
        }
        if repaired {
            repair(&mut bytes);
        }
        bytes.truncate(cut.unwrap_or(usize::MAX));
        let _ = outcome(&bytes);
        super::fuzz_archive(&bytes);
    }
}

#[test]
fn the_sample_itself_is_accepted() {
    outcome(&sample()).expect("sample");
}
