//! The blocks on their way to a client: which are sent, which are acknowledged, what is sent again. Pure.
//!
//! Sorcerer's-apprentice safe (RFC 1123 section 4.2.3.1): an acknowledgement that tells nothing new causes no packet;
//! only silence does. One that stops inside the window means that the block after it was lost, and the rest of the
//! window goes out once more (RFC 7440 section 4).

use std::collections::VecDeque;

/// What an acknowledgement led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Acked {
    /// Old news: do nothing.
    Nothing,
    /// The whole window arrived: go on.
    All,
    /// Some of it arrived: send the rest again, then go on.
    Some,
}

/// The window.
#[derive(Debug)]
pub struct Window {
    /// Number of the first block that is not acknowledged, counted from 1.
    first: u64,
    blocks: VecDeque<Vec<u8>>,
    limit: usize,
    ended: bool,
}

impl Window {
    /// An empty window of at most `limit` blocks, before the first block.
    #[must_use]
    pub fn new(limit: u16) -> Self {
        Self { first: 1, blocks: VecDeque::new(), limit: usize::from(limit.max(1)), ended: false }
    }

    /// Whether another block should be put in.
    #[must_use]
    pub fn wants_more(&self) -> bool {
        !self.ended && self.blocks.len() < self.limit
    }

    /// Puts a block in; `last` if it is the one that ends the file. Returns its number.
    pub fn push(&mut self, block: Vec<u8>, last: bool) -> u64 {
        let number = self.next_number();
        self.blocks.push_back(block);
        self.ended = last;
        number
    }

    /// Number of the block that [`Window::push`] takes next.
    #[must_use]
    pub fn next_number(&self) -> u64 {
        self.first + self.blocks.len() as u64
    }

    /// Number of blocks that are acknowledged.
    #[must_use]
    pub fn acknowledged(&self) -> u64 {
        self.first - 1
    }

    /// Every block that is on its way, with its number.
    pub fn in_flight(&self) -> impl Iterator<Item = (u64, &[u8])> {
        (self.first..).zip(self.blocks.iter().map(Vec::as_slice))
    }

    /// Takes an acknowledgement by its number on the wire.
    pub fn ack(&mut self, wire: u16) -> Acked {
        // The wire number is the block number modulo 65536, so the distance to the first block is unambiguous.
        let [.., high, low] = self.first.to_be_bytes();
        let distance = usize::from(wire.wrapping_sub(u16::from_be_bytes([high, low])));
        if distance >= self.blocks.len() {
            return Acked::Nothing;
        }
        self.blocks.drain(..=distance);
        self.first += distance as u64 + 1;
        if self.blocks.is_empty() { Acked::All } else { Acked::Some }
    }

    /// Whether the last block has been acknowledged.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.ended && self.blocks.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(limit: u16, blocks: u64) -> Window {
        let mut window = Window::new(limit);
        for number in 1..=blocks {
            assert!(window.wants_more());
            assert_eq!(window.push(vec![], number == blocks), number);
        }
        window
    }

    #[test]
    fn duplicates_and_nonsense_cause_nothing() {
        let mut window = filled(4, 4);
        for old in [0, 5, 65535] {
            assert_eq!(window.ack(old), Acked::Nothing, "{old}");
        }
        assert_eq!(window.ack(2), Acked::Some);
        assert_eq!(window.ack(2), Acked::Nothing);
        assert_eq!(window.in_flight().map(|(n, _)| n).collect::<Vec<_>>(), [3, 4]);
        assert_eq!(window.ack(4), Acked::All);
        assert!(window.is_done());
    }

    #[test]
    fn block_numbers_roll_over() {
        let mut window = Window::new(2);
        for number in 1..=200_000_u64 {
            window.push(vec![], false);
            let [.., high, low] = number.to_be_bytes();
            assert_eq!(window.ack(u16::from_be_bytes([high, low])), Acked::All, "{number}");
        }
    }
}
