//! What a layer takes once it is unpacked, said in annotations of its descriptor by who made it: a node can then judge before
//! the first byte whether it has room. A layer that does not say so is estimated. Not trusted: the node stops at what was
//! said.

use super::Descriptor;

/// Bytes of the layer's files, each rounded up to [`BLOCK`], as a decimal number. Links, directories and whiteouts take none.
pub const ANNOTATION_UNPACKED_SIZE: &str = "org.layercake.layer.unpacked-size";
/// Entries of the layer's tar, as a decimal number.
pub const ANNOTATION_ENTRIES: &str = "org.layercake.layer.entries";
/// What a file's bytes are rounded up to: a page of memory, a block of most file systems.
pub const BLOCK: u64 = 4096;

/// What a layer takes once it is unpacked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Unpacked {
    /// As [`ANNOTATION_UNPACKED_SIZE`].
    pub bytes: u64,
    /// As [`ANNOTATION_ENTRIES`].
    pub entries: u64,
}

impl Unpacked {
    /// What a layer's descriptor says; `None` where it says nothing, or nothing that can be read.
    #[must_use]
    pub fn of(layer: &Descriptor) -> Option<Self> {
        let number = |key: &str| {
            let text = layer.annotations.get(key)?;
            let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            if digits { text.parse().ok() } else { None }
        };
        Some(Self {
            bytes: number(ANNOTATION_UNPACKED_SIZE)?,
            entries: number(ANNOTATION_ENTRIES)?,
        })
    }

    /// Counts an entry with this many bytes of content.
    pub fn add(&mut self, content: u64) {
        self.entries = self.entries.saturating_add(1);
        let blocks = content.div_ceil(BLOCK);
        self.bytes = self.bytes.saturating_add(blocks.saturating_mul(BLOCK));
    }

    /// Says it in a layer's descriptor.
    pub fn annotate(self, layer: &mut Descriptor) {
        for (key, number) in
            [(ANNOTATION_UNPACKED_SIZE, self.bytes), (ANNOTATION_ENTRIES, self.entries)]
        {
            layer.annotations.insert(key.to_owned(), number.to_string());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_read_and_what_is_odd_says_nothing() {
        let mut layer = Descriptor::of("x/y", b"");
        assert_eq!(Unpacked::of(&layer), None);
        let mut unpacked = Unpacked::default();
        for content in [0, 1, 4096, 4097] {
            unpacked.add(content);
        }
        assert_eq!(unpacked, Unpacked { bytes: 4 * 4096, entries: 4 });
        unpacked.annotate(&mut layer);
        assert_eq!(Unpacked::of(&layer), Some(unpacked));
        for odd in ["", "-1", "+1", "1.5", "99999999999999999999"] {
            layer.annotations.insert(ANNOTATION_ENTRIES.to_owned(), odd.to_owned());
            assert_eq!(Unpacked::of(&layer), None, "{odd}");
        }
    }
}
