//! Sparse files: where the pieces of a file stand that an archive holds without its holes. Pure.
//!
//! GNU tar writes them in its old form (type `S`, the map in the header and in blocks behind it) and in PAX headers: version 1.0,
//! the map in front of the content, and 0.1, the map as one record ("Storing Sparse Files" in GNU tar's manual). Version 0.0
//! repeats its keys, which no PAX header may; it is refused.

/// Most pieces of one file.
const MAX_PIECES: usize = 1 << 16;
/// Largest map in front of a content, in bytes.
pub(super) const MAX_MAP_BYTES: usize = 1 << 20;
/// Bytes of an offset or length in the old form.
const FIELD: usize = 12;

/// The pieces of a file, in order, and its whole size.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Map {
    /// Offset and length of each.
    pub(super) pieces: Vec<(u64, u64)>,
    /// Bytes of the file, holes included.
    pub(super) real: u64,
}

impl Map {
    /// Adds the pieces of an array of the old form: offset and length, 12 bytes each, until one is empty.
    pub(super) fn add_old(&mut self, array: &[u8]) -> Result<(), &'static str> {
        for pair in array.chunks_exact(2 * FIELD) {
            let (offset, length) = pair.split_at(FIELD);
            if offset.iter().chain(length).all(|byte| *byte == 0) {
                return Ok(());
            }
            let number = |field| super::pax::number(field).and_then(|it| u64::try_from(it).ok());
            let (Some(offset), Some(length)) = (number(offset), number(length)) else {
                return Err("a piece of a sparse file is no number");
            };
            self.add(offset, length)?;
        }
        Ok(())
    }

    /// Adds the pieces of a list of numbers: offset, length, offset, length.
    pub(super) fn add_list(&mut self, numbers: &[u64]) -> Result<(), &'static str> {
        if !numbers.len().is_multiple_of(2) {
            return Err("the map of a sparse file has an offset without a length");
        }
        numbers.chunks_exact(2).try_for_each(|pair| match pair {
            [offset, length] => self.add(*offset, *length),
            _ => Ok(()),
        })
    }

    fn add(&mut self, offset: u64, length: u64) -> Result<(), &'static str> {
        if self.pieces.len() >= MAX_PIECES {
            return Err("a sparse file has more than 65536 pieces");
        }
        self.pieces.push((offset, length));
        Ok(())
    }

    /// Checks the map against the bytes that the archive holds of the file.
    pub(super) fn check(&self, stored: u64) -> Result<(), &'static str> {
        let (mut end, mut held) = (0_u64, 0_u64);
        for (offset, length) in &self.pieces {
            if *offset < end {
                return Err("the pieces of a sparse file overlap or are out of order");
            }
            end = offset.checked_add(*length).ok_or("a piece of a sparse file has no end")?;
            held = held.saturating_add(*length);
        }
        if end > self.real {
            return Err("a piece of a sparse file lies behind its end");
        }
        if held != stored {
            return Err("the pieces of a sparse file are not what the archive holds of it");
        }
        Ok(())
    }
}

/// The numbers of a map of version 1.0 as far as it was read: how many pairs, then each number on a line of its own. None where
/// there is more to read.
pub(super) fn lines(text: &[u8]) -> Result<Option<Vec<u64>>, &'static str> {
    const BAD: &str = "the map of a sparse file is malformed";
    let mut numbers = text.split(|byte| *byte == b'\n').map(super::pax::decimal);
    // What stands behind the last line end is not whole, or padding.
    let whole = text.iter().filter(|byte| **byte == b'\n').count();
    if whole == 0 {
        return if text.len() > 32 { Err(BAD) } else { Ok(None) };
    }
    let pairs = numbers.next().flatten().ok_or(BAD)?;
    let wanted = usize::try_from(pairs).ok().filter(|pairs| *pairs <= MAX_PIECES).ok_or(BAD)? * 2;
    if whole <= wanted {
        return Ok(None);
    }
    numbers.take(wanted).collect::<Option<Vec<_>>>().map(Some).ok_or(BAD)
}

/// The numbers of a map of version 0.1: all of them, parted by commas.
pub(super) fn commas(text: &[u8]) -> Result<Vec<u64>, &'static str> {
    if text.is_empty() {
        return Ok(Vec::new());
    }
    let numbers = text.split(|byte| *byte == b',').map(super::pax::decimal);
    numbers.collect::<Option<Vec<_>>>().ok_or("the map of a sparse file is malformed")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_is_read_when_all_of_it_is_there() {
        assert_eq!(lines(b"2\n0\n5\n10\n").unwrap(), None);
        assert_eq!(lines(b"2\n0\n5\n10\n7").unwrap(), None);
        assert_eq!(lines(b"2\n0\n5\n10\n7\n\0\0").unwrap(), Some(vec![0, 5, 10, 7]));
        assert_eq!(lines(b"0\n\0").unwrap(), Some(vec![]));
        assert!(
            lines(b"x\n").is_err() && lines(b"99999999\n").is_err() && lines(&[b'1'; 40]).is_err()
        );
        assert_eq!(commas(b"0,5,10,7").unwrap(), [0, 5, 10, 7]);
        assert!(commas(b"0,,5").is_err());
    }

    #[test]
    fn a_map_that_does_not_fit_is_refused() {
        let map = |pieces: &[(u64, u64)], real| Map { pieces: pieces.to_vec(), real };
        assert_eq!(map(&[(0, 5), (10, 7)], 20).check(12), Ok(()));
        assert_eq!(map(&[], 1 << 40).check(0), Ok(()));
        for (pieces, real, stored) in [
            (&[(5, 5), (0, 5)][..], 20, 10),
            (&[(0, 5), (4, 5)], 20, 10),
            (&[(0, 5)], 4, 5),
            (&[(0, 5)], 20, 6),
            (&[(u64::MAX, 2)], u64::MAX, 2),
        ] {
            assert!(map(pieces, real).check(stored).is_err(), "{pieces:?}");
        }
        assert!(Map::default().add_list(&[1]).is_err());
    }
}
