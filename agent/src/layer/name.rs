//! Paths inside a layer: cleaned, bounded, and told apart from whiteouts (layer.md, "Whiteouts"). Pure; resolving
//! symlinks is the kernel's work, in `tree`.

use super::{MAX_DEPTH, MAX_NAME_BYTES, MAX_PATH_BYTES};

/// Prefix of a whiteout's name.
const WHITEOUT: &[u8] = b".wh.";
/// Name of the marker that makes its directory opaque.
const OPAQUE: &[u8] = b".wh..wh..opq";

/// A path relative to the layer's root: components joined by one `/`, no `.`, no `..`, no NUL. Empty for the root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Clean {
    path: Vec<u8>,
    /// Length of the parent's path.
    parent: usize,
    /// Where the last component begins.
    base: usize,
}

/// What the last component of a path means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Base<'a> {
    /// A name like any other.
    Plain,
    /// This name is hidden in the layers below.
    Whiteout(&'a [u8]),
    /// Everything in this directory is hidden in the layers below.
    Opaque,
}

impl Clean {
    /// Cleans a path as it stands in the archive. A leading `/` or `./` is dropped, as every OCI tool does.
    pub(super) fn new(raw: &[u8]) -> Result<Self, &'static str> {
        if raw.is_empty() {
            return Err("is an empty path");
        }
        if raw.len() > MAX_PATH_BYTES {
            return Err("is longer than a path may be");
        }
        if raw.contains(&0) {
            return Err("holds a NUL byte");
        }
        let mut path = Vec::with_capacity(raw.len());
        let (mut parent, mut base, mut depth) = (0, 0, 0);
        for part in raw.split(|byte| *byte == b'/') {
            match part {
                b"" | b"." => continue,
                b".." => return Err("has a `..` component"),
                _ if part.len() > MAX_NAME_BYTES => {
                    return Err("has a component longer than a name may be");
                }
                _ => {}
            }
            depth += 1;
            if depth > MAX_DEPTH {
                return Err("is nested too deeply");
            }
            parent = path.len();
            if !path.is_empty() {
                path.push(b'/');
            }
            base = path.len();
            path.extend_from_slice(part);
        }
        Ok(Self { path, parent, base })
    }

    /// The whole path, empty for the root.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.path
    }

    /// The parent's path, empty for the root.
    pub(super) fn parent(&self) -> &[u8] {
        self.path.get(..self.parent).unwrap_or_default()
    }

    /// The last component.
    pub(super) fn name(&self) -> &[u8] {
        self.path.get(self.base..).unwrap_or_default()
    }

    /// Whether this is the layer's root.
    pub(super) fn is_root(&self) -> bool {
        self.path.is_empty()
    }

    /// Whether the path lies below `dev/`, as it is written.
    pub(super) fn is_below_dev(&self) -> bool {
        self.path.starts_with(b"dev/")
    }

    /// What the last component means. A whiteout that hides nothing, or that is a parent, is refused.
    pub(super) fn base(&self) -> Result<Base<'_>, &'static str> {
        if self.parent().split(|byte| *byte == b'/').any(|part| part.starts_with(WHITEOUT)) {
            return Err("lies below a whiteout");
        }
        if self.name() == OPAQUE {
            return Ok(Base::Opaque);
        }
        let Some(hidden) = self.name().strip_prefix(WHITEOUT) else { return Ok(Base::Plain) };
        match hidden {
            b"" | b"." | b".." => Err("is a whiteout of nothing"),
            _ if hidden.starts_with(WHITEOUT) => Err("is a whiteout of a whiteout"),
            _ => Ok(Base::Whiteout(hidden)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(raw: &str, parent: &str, name: &str) {
        let clean = Clean::new(raw.as_bytes()).expect(raw);
        assert_eq!((clean.parent(), clean.name()), (parent.as_bytes(), name.as_bytes()), "{raw}");
    }

    #[test]
    fn leading_slashes_and_dots_are_dropped() {
        check("/etc/passwd", "etc", "passwd");
        check("./a//b/./c/", "a/b", "c");
        check("a", "", "a");
        for root in ["/", ".", "./", "//./"] {
            assert!(Clean::new(root.as_bytes()).expect(root).is_root());
        }
    }

    #[test]
    fn what_cannot_be_a_path_is_refused() {
        let long_name = "n".repeat(256);
        let deep = "d/".repeat(MAX_DEPTH + 1);
        let long = "long/".repeat(1000);
        for raw in ["", "..", "a/../b", "/..", "a/..", "a\0b", &long_name, &deep, &long] {
            assert!(Clean::new(raw.as_bytes()).is_err(), "{raw:?} was accepted");
        }
        assert!(Clean::new("...".as_bytes()).is_ok() && Clean::new(b"..a").is_ok());
    }

    #[test]
    fn whiteouts_are_told_by_their_name_alone() {
        let base = |raw: &str| Clean::new(raw.as_bytes()).expect(raw);
        assert_eq!(base("a/.wh.b").base(), Ok(Base::Whiteout(b"b")));
        assert_eq!(base(".wh....").base(), Ok(Base::Whiteout(b"...")));
        assert_eq!(base("a/.wh..wh..opq").base(), Ok(Base::Opaque));
        assert_eq!(base("a/.wha").base(), Ok(Base::Plain));
        for raw in [".wh.", ".wh..", ".wh...", "a/.wh..wh.plnk", ".wh.a/b"] {
            assert!(base(raw).base().is_err(), "{raw} was accepted");
        }
    }
}
