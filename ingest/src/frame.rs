//! Cuts a stream of bytes into lines.
//!
//! Holds back what has no line end yet. A line over the limit is skipped without being kept, up to its line end, and
//! reported with its extent. Every byte belongs to exactly one frame, so offsets join without gaps.

use memchr::memchr;

/// One line, or what is known of one that was too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// Offset of the first byte of the line.
    pub start: u64,
    /// Offset after its line end.
    pub end: u64,
    /// The line without its line end (`\n` or `\r\n`); `None` when it was longer than the limit.
    pub line: Option<&'a [u8]>,
}

/// The state between two reads.
#[derive(Clone, Debug)]
pub struct Framer {
    line_bytes_max: usize,
    /// Where the unfinished line began.
    start: u64,
    /// Bytes of the unfinished line so far.
    seen: u64,
    /// These bytes; empty once the line is known to be too long.
    held: Vec<u8>,
}

impl Framer {
    /// Begins at `offset`, with lines of at most `line_bytes_max` bytes, their line end not counted.
    pub fn new(offset: u64, line_bytes_max: usize) -> Self {
        Self { line_bytes_max, start: offset, seen: 0, held: Vec::new() }
    }

    /// Offset after the last complete line.
    pub fn complete(&self) -> u64 {
        self.start
    }

    /// Offset of the next byte to feed.
    pub fn position(&self) -> u64 {
        self.start + self.seen
    }

    /// Takes the bytes at [`Framer::position`] and hands out every line that they complete.
    pub fn feed(&mut self, mut data: &[u8], mut each: impl FnMut(Frame<'_>)) {
        while let Some(at) = memchr(b'\n', data) {
            let (start, end) = (self.start, self.position() + at as u64 + 1);
            if self.seen == 0 {
                each(Frame { start, end, line: self.checked(&data[..at]) });
            } else {
                self.hold(&data[..at]);
                each(Frame { start, end, line: self.held_line() });
                self.held.clear();
            }
            (self.start, self.seen) = (end, 0);
            data = &data[at + 1..];
        }
        self.hold(data);
    }

    /// Hands out the line that has no end, because there will be none.
    pub fn finish(&mut self, each: impl FnOnce(Frame<'_>)) {
        if self.seen > 0 {
            let (start, end) = (self.start, self.position());
            each(Frame { start, end, line: self.held_line() });
            *self = Self::new(end, self.line_bytes_max);
        }
    }

    /// Keeps a part of a line, unless the line has grown too long: then nothing of it is kept.
    fn hold(&mut self, part: &[u8]) {
        self.seen += part.len() as u64;
        if self.seen > self.held_bytes_max() {
            self.held = Vec::new();
        } else {
            self.held.extend_from_slice(part);
        }
    }

    /// One more than a line may have, for the `\r` of a line end whose `\n` is still to come.
    fn held_bytes_max(&self) -> u64 {
        self.line_bytes_max as u64 + 1
    }

    fn held_line(&self) -> Option<&[u8]> {
        if self.seen > self.held_bytes_max() { None } else { self.checked(&self.held) }
    }

    fn checked<'a>(&self, line: &'a [u8]) -> Option<&'a [u8]> {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        (line.len() <= self.line_bytes_max).then_some(line)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Owned = (u64, u64, Option<Vec<u8>>);

    fn frames(text: &[u8], max: usize, cuts: &[usize]) -> Vec<Owned> {
        let mut framer = Framer::new(100, max);
        let mut found = Vec::new();
        let mut rest = text;
        for cut in cuts {
            let (now, later) = rest.split_at((*cut).min(rest.len()));
            framer.feed(now, |frame| found.push((frame.start, frame.end, frame.line.map(<[u8]>::to_vec))));
            rest = later;
        }
        framer.feed(rest, |frame| found.push((frame.start, frame.end, frame.line.map(<[u8]>::to_vec))));
        assert_eq!(framer.position(), 100 + text.len() as u64);
        framer.finish(|frame| found.push((frame.start, frame.end, frame.line.map(<[u8]>::to_vec))));
        assert_eq!(framer.complete(), framer.position());
        found
    }

    #[test]
    fn lines_and_their_offsets() {
        let found = frames(b"ab\r\n\nlonger\nx", 4, &[]);
        let expected: [Owned; 4] = [
            (100, 104, Some(b"ab".to_vec())),
            (104, 105, Some(Vec::new())),
            (105, 112, None),
            (112, 113, Some(b"x".to_vec())),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn a_line_at_the_limit_passes_and_one_byte_more_does_not() {
        for end in ["\n", "\r\n"] {
            for cut in 0..6 {
                assert!(frames(format!("1234{end}").as_bytes(), 4, &[cut])[0].2.is_some());
                assert!(frames(format!("12345{end}").as_bytes(), 4, &[cut])[0].2.is_none());
            }
        }
    }

    #[test]
    fn an_endless_line_is_not_kept() {
        let mut framer = Framer::new(0, 1000);
        for _ in 0..100 {
            framer.feed(&[b'x'; 100], |_| panic!("no line ends here"));
            assert!(framer.held.capacity() <= 2048, "{}", framer.held.capacity());
        }
        assert!(framer.held.is_empty());
    }

    proptest! {
        #[test]
        fn reads_cut_anywhere_give_the_same_lines(
            text in proptest::collection::vec(prop_oneof![Just(b'\n'), Just(b'\r'), Just(b'a'), Just(b'b')], 0..80),
            cuts in proptest::collection::vec(0..9_usize, 0..20),
            max in 0..12_usize,
        ) {
            let whole = frames(&text, max, &[]);
            prop_assert_eq!(&whole, &frames(&text, max, &cuts));
            let joined = whole.iter().try_fold(100, |at, (start, end, _)| (*start == at).then_some(*end));
            prop_assert_eq!(joined, Some(100 + text.len() as u64), "frames leave no gap");
        }
    }
}
