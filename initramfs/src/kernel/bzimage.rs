//! What a bzImage says of itself (the kernel's Documentation/arch/x86/boot.rst). Pure.

/// Offset of the `HdrS` magic number.
const MAGIC_AT: usize = 0x202;
/// Offset of the pointer to the version string, which counts from [`POINTER_BASE`].
const POINTER_AT: usize = 0x20e;
const POINTER_BASE: usize = 0x200;
/// Longest version string that is read, in bytes.
const MAX_VERSION: usize = 512;

/// The kernel's release (`uname -r`), the first word of its version string. `None` if this is no bzImage.
#[must_use]
pub fn release(image: &[u8]) -> Option<String> {
    if image.get(MAGIC_AT..)?.get(..4)? != b"HdrS" {
        return None;
    }
    let pointer = image.get(POINTER_AT..)?.get(..2)?.try_into().ok().map(u16::from_le_bytes)?;
    let text = image.get(usize::from(pointer).checked_add(POINTER_BASE)?..)?;
    let text = text.get(..MAX_VERSION.min(text.len()))?;
    let text = text.get(..text.iter().position(|byte| *byte == 0)?)?;
    let word = std::str::from_utf8(text).ok()?.split_whitespace().next()?;
    let plain = |c: char| c.is_ascii_alphanumeric() || "._+~-".contains(c);
    let fine = pointer != 0 && word.chars().all(plain) && !word.starts_with('.');
    fine.then(|| word.to_owned())
}

/// A file with nothing but a header that says this version, for tests.
#[doc(hidden)]
#[must_use]
pub fn fake(version: &str) -> Vec<u8> {
    let mut image = vec![0; POINTER_AT];
    image.splice(MAGIC_AT..MAGIC_AT + 4, *b"HdrS");
    image.extend_from_slice(&0x100_u16.to_le_bytes());
    image.resize(POINTER_BASE + 0x100, 0);
    image.extend_from_slice(version.as_bytes());
    image.push(0);
    image
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_release_is_the_first_word_of_the_version() {
        let image = fake("6.12.117+deb12-cloud-amd64 (x@y) #1 SMP");
        assert_eq!(release(&image).as_deref(), Some("6.12.117+deb12-cloud-amd64"));
    }

    #[test]
    fn what_is_no_bzimage_has_no_release() {
        assert_eq!(release(b"MZ"), None);
        assert_eq!(release(&vec![0; 0x1000]), None);
        assert_eq!(release(&fake("../../etc x")), None);
        assert_eq!(release(&fake("")), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken(mut image in proptest::collection::vec(any::<u8>(), 0..1200)) {
            if image.len() > MAGIC_AT + 4 {
                image[MAGIC_AT..MAGIC_AT + 4].copy_from_slice(b"HdrS");
            }
            let _ = release(&image);
        }
    }
}
