//! gzip (RFC 1952), member after member, without its CRC: whoever reads a layer hashes blob and content with SHA-256, which
//! says more, and a second look at every byte costs as much as a twentieth of inflating it.
//!
//! Not here: the ratio guard and the hashes (`unpack`).

use std::io::{self, BufRead, Read};

use flate2::{Decompress, FlushDecompress, Status};

/// Length of a member's fixed header, in bytes.
const HEADER: usize = 10;
/// Length of CRC32 and ISIZE behind a member.
const TRAILER: usize = 8;
/// Flags of a header (RFC 1952, 2.3.1).
const FHCRC: u8 = 2;
const FEXTRA: u8 = 4;
const FNAME: u8 = 8;
const FCOMMENT: u8 = 16;
const RESERVED: u8 = 0xe0;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Before the first member.
    Begin,
    /// Inside a member's deflate stream.
    Body,
    /// Behind a member: another, or the end.
    Between,
}

/// The content of a gzip stream. Nothing of it is held but the inflater's window.
#[derive(Debug)]
pub(super) struct Gunzip<R> {
    input: R,
    inflate: Decompress,
    state: State,
}

fn malformed(reason: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

impl<R: BufRead> Gunzip<R> {
    pub(super) fn new(input: R) -> Self {
        Self { input, inflate: Decompress::new(false), state: State::Begin }
    }

    fn exactly<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.input.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// Reads over a text that ends with a zero byte, however long it is.
    fn skip_text(&mut self) -> io::Result<()> {
        loop {
            let available = self.input.fill_buf()?;
            if available.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let end = available.iter().position(|byte| *byte == 0);
            let count = end.map_or(available.len(), |at| at + 1);
            self.input.consume(count);
            if end.is_some() {
                return Ok(());
            }
        }
    }

    fn header(&mut self) -> io::Result<()> {
        let [a, b, method, flags, ..] = self.exactly::<HEADER>()?;
        if [a, b, method] != [0x1f, 0x8b, 8] || flags & RESERVED != 0 {
            return Err(malformed("not a gzip header"));
        }
        if flags & FEXTRA != 0 {
            let mut left = usize::from(u16::from_le_bytes(self.exactly()?));
            while left > 0 {
                let step = self.input.fill_buf()?.len().min(left);
                if step == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                self.input.consume(step);
                left -= step;
            }
        }
        for text in [FNAME, FCOMMENT] {
            if flags & text != 0 {
                self.skip_text()?;
            }
        }
        if flags & FHCRC != 0 {
            self.exactly::<2>()?;
        }
        self.inflate.reset(false);
        Ok(())
    }

    /// One step of a member's body: how many bytes came out, 0 at its end.
    fn body(&mut self, out: &mut [u8]) -> io::Result<usize> {
        loop {
            let input = self.input.fill_buf()?;
            let (ended, read, written) =
                (input.is_empty(), self.inflate.total_in(), self.inflate.total_out());
            let status = self.inflate.decompress(input, out, FlushDecompress::None)?;
            let used = usize::try_from(self.inflate.total_in() - read).unwrap_or(usize::MAX);
            let made = usize::try_from(self.inflate.total_out() - written).unwrap_or(usize::MAX);
            self.input.consume(used);
            if status == Status::StreamEnd {
                self.exactly::<TRAILER>()?;
                self.state = State::Between;
                return Ok(made);
            }
            match (made, used) {
                (0, 0) if ended => return Err(io::ErrorKind::UnexpectedEof.into()),
                (0, 0) => return Err(malformed("the deflate stream does not go on")),
                (0, _) => {}
                _ => return Ok(made),
            }
        }
    }
}

impl<R: BufRead> Read for Gunzip<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if out.is_empty() {
            return Ok(0);
        }
        loop {
            if self.state == State::Body {
                match self.body(out)? {
                    0 => continue,
                    made => return Ok(made),
                }
            }
            if self.state == State::Between && self.input.fill_buf()?.is_empty() {
                return Ok(0);
            }
            self.header()?;
            self.state = State::Body;
        }
    }
}

/// Unpacks bytes as gzip, up to a bound, and forgets what comes: for fuzzing.
pub fn fuzz_gzip(bytes: &[u8]) {
    let mut unpacked = Gunzip::new(bytes).take(1 << 20);
    // An error is an answer like any other.
    let _ = io::copy(&mut unpacked, &mut io::sink());
}

#[cfg(test)]
mod tests {
    use std::io::{BufReader, Write};

    use flate2::bufread::MultiGzDecoder;
    use flate2::{Compression, GzBuilder};
    use proptest::prelude::*;

    use super::*;

    fn member(builder: GzBuilder, content: &[u8]) -> Vec<u8> {
        let mut encoder = builder.write(Vec::new(), Compression::default());
        encoder.write_all(content).expect("write");
        encoder.finish().expect("finish")
    }

    fn ours(bytes: &[u8], buffer: usize) -> io::Result<Vec<u8>> {
        let mut content = Vec::new();
        let read = Gunzip::new(BufReader::with_capacity(buffer, bytes)).read_to_end(&mut content);
        read.map(|_| content)
    }

    #[test]
    fn members_with_every_kind_of_header_are_read_one_after_the_other() {
        let plain = member(GzBuilder::new(), b"one ");
        let named = member(GzBuilder::new().filename("a name").comment("a comment"), b"two ");
        let extra = member(GzBuilder::new().extra(vec![0; 300]).filename("x"), b"three");
        let mut checked = member(GzBuilder::new(), b"");
        checked[3] |= FHCRC;
        checked.splice(HEADER..HEADER, [0, 0]);
        let all = [plain, checked, named, extra].concat();
        for buffer in [1, 2, 7, 100, 10_000] {
            assert_eq!(ours(&all, buffer).expect("gzip"), b"one two three", "{buffer}");
        }
    }

    #[test]
    fn a_stream_that_ends_too_early_or_goes_on_with_something_else_is_an_error() {
        let whole = member(GzBuilder::new().filename("n"), &[7; 5000]);
        for end in 0..whole.len() {
            let error = ours(&whole[..end], 64).expect_err("cut off");
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "at {end}: {error}");
        }
        for rest in [&[0; 20][..], b"more text behind it", &[0x1f, 0x8b, 7, 0, 0, 0, 0, 0, 0, 0]] {
            let error = ours(&[&whole, rest].concat(), 64).expect_err("rest");
            assert_eq!(error.to_string(), "not a gzip header");
        }
        let mut reserved = whole.clone();
        reserved[3] |= 0x20;
        assert!(ours(&reserved, 64).is_err());
    }

    proptest! {
        #[test]
        fn whatever_another_decoder_reads_is_read_alike(
            contents in proptest::collection::vec(proptest::collection::vec(0..4_u8, 0..3000), 1..4),
            buffer in 1..5000_usize,
        ) {
            let members: Vec<Vec<u8>> =
                contents.iter().map(|content| member(GzBuilder::new(), content)).collect();
            prop_assert_eq!(ours(&members.concat(), buffer).expect("gzip"), contents.concat());
        }

        #[test]
        fn damaged_streams_end_and_what_both_accept_is_the_same(
            content in proptest::collection::vec(0..9_u8, 0..3000), at: prop::sample::Index, bit in 0..8_u32,
        ) {
            let mut bytes = member(GzBuilder::new().filename("n"), &content);
            let at = at.index(bytes.len());
            bytes[at] ^= 1_u8 << bit;
            fuzz_gzip(&bytes);
            let mut theirs = Vec::new();
            if MultiGzDecoder::new(&bytes[..]).read_to_end(&mut theirs).is_ok() {
                prop_assert_eq!(ours(&bytes, 100).expect("theirs is good"), theirs);
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            fuzz_gzip(&bytes);
        }
    }
}
