//! Cuts a stream into messages (RFC 6587): `17 <34>...` by its count of bytes, everything else by line feed, told apart for
//! each message anew.
//!
//! A count is one only where the `<` of a priority follows, so that a line that begins with a number stays a line. A
//! message over the limit is told of as soon as it is known to be one, and skipped without being kept.

use std::io;

use bytes::{Buf, BytesMut};
use memchr::memchr;
use tokio_util::codec::Decoder;

/// Digits of a count. More are no count.
const COUNT_DIGITS_MAX: usize = 8;

/// One message, or what is known of one that is too long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Without count and line end.
    Message(BytesMut),
    /// How many bytes were seen of it, or it claims to have.
    Oversized(usize),
}

/// The state between two reads.
#[derive(Clone, Debug)]
pub struct Frames {
    bytes_max: usize,
    skipping: Skipping,
    /// Bytes of the buffer that hold no line feed.
    searched: usize,
}

/// What is left of a message that is too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Skipping {
    Nothing,
    Bytes(usize),
    Line,
}

/// How the message that begins the buffer is framed.
enum Framing {
    Count { head: usize, count: usize },
    LineFeed,
    Unknown,
}

impl Frames {
    /// For messages of at most `bytes_max` bytes.
    pub fn new(bytes_max: usize) -> Self {
        Self { bytes_max, skipping: Skipping::Nothing, searched: 0 }
    }

    /// Whether a message has begun whose end is still to come.
    pub fn is_partial(&self, buffer: &BytesMut) -> bool {
        !buffer.is_empty() || self.skipping != Skipping::Nothing
    }

    /// Returns whether all is skipped that had to be.
    fn skip(&mut self, buffer: &mut BytesMut) -> bool {
        match self.skipping {
            Skipping::Nothing => return true,
            Skipping::Bytes(left) => {
                let now = left.min(buffer.len());
                buffer.advance(now);
                self.skipping = Skipping::Bytes(left - now);
                if now < left {
                    return false;
                }
            }
            Skipping::Line => match memchr(b'\n', buffer) {
                Some(at) => buffer.advance(at + 1),
                None => {
                    buffer.clear();
                    return false;
                }
            },
        }
        self.skipping = Skipping::Nothing;
        true
    }

    fn by_count(&mut self, (head, count): (usize, usize), buffer: &mut BytesMut) -> Option<Frame> {
        if count > self.bytes_max {
            buffer.advance(head);
            self.skipping = Skipping::Bytes(count);
            return Some(Frame::Oversized(count));
        }
        (buffer.len() >= head + count).then(|| {
            buffer.advance(head);
            Frame::Message(without_end(buffer.split_to(count)))
        })
    }

    fn by_line_feed(&mut self, buffer: &mut BytesMut) -> Option<Frame> {
        // One more, for the `\r` of a line end.
        let line_bytes_max = self.bytes_max + 1;
        let Some(at) = memchr(b'\n', &buffer[self.searched..]) else {
            self.searched = buffer.len();
            return (buffer.len() > line_bytes_max).then(|| {
                (self.skipping, self.searched) = (Skipping::Line, 0);
                let seen = buffer.len();
                buffer.clear();
                Frame::Oversized(seen)
            });
        };
        let bytes = self.searched + at;
        let line = without_end(buffer.split_to(bytes + 1));
        self.searched = 0;
        let is_oversized = bytes > line_bytes_max || line.len() > self.bytes_max;
        Some(if is_oversized { Frame::Oversized(bytes) } else { Frame::Message(line) })
    }
}

impl Decoder for Frames {
    type Item = Frame;
    type Error = io::Error;

    fn decode(&mut self, buffer: &mut BytesMut) -> io::Result<Option<Frame>> {
        if !self.skip(buffer) {
            return Ok(None);
        }
        if self.searched == 0 {
            // Empty lines, and what ends a message beside its count.
            let ends = buffer.iter().take_while(|byte| is_end(**byte)).count();
            buffer.advance(ends);
            match framing(buffer) {
                Framing::Unknown => return Ok(None),
                Framing::Count { head, count } => return Ok(self.by_count((head, count), buffer)),
                Framing::LineFeed => {}
            }
        }
        Ok(self.by_line_feed(buffer))
    }

    /// A message that was cut off is told like a whole one: it may only lack its line feed, and if it lacks more, it is shown
    /// as what cannot be read.
    fn decode_eof(&mut self, buffer: &mut BytesMut) -> io::Result<Option<Frame>> {
        if let Some(frame) = self.decode(buffer)? {
            return Ok(Some(frame));
        }
        if let Framing::Count { head, .. } = framing(buffer) {
            buffer.advance(head);
        }
        self.searched = 0;
        let last = without_end(buffer.split());
        Ok((!last.is_empty()).then_some(Frame::Message(last)))
    }
}

fn framing(buffer: &[u8]) -> Framing {
    let head = &buffer[..buffer.len().min(COUNT_DIGITS_MAX + 2)];
    let digits = head.iter().take_while(|byte| byte.is_ascii_digit()).count();
    match head[digits..] {
        [] if digits <= COUNT_DIGITS_MAX => Framing::Unknown,
        [b' '] if digits > 0 && digits <= COUNT_DIGITS_MAX => Framing::Unknown,
        [b' ', b'<', ..] if digits > 0 => {
            let count = head[..digits].iter().fold(0, |count, digit| count * 10 + usize::from(digit - b'0'));
            Framing::Count { head: digits + 1, count }
        }
        _ => Framing::LineFeed,
    }
}

/// `message` without the line feeds, carriage returns and zero bytes that senders put after it.
fn without_end(mut message: BytesMut) -> BytesMut {
    message.truncate(trim_end(&message).len());
    message
}

/// See [`without_end`].
pub(super) fn trim_end(message: &[u8]) -> &[u8] {
    let ends = message.iter().rev().take_while(|byte| is_end(**byte)).count();
    &message[..message.len() - ends]
}

fn is_end(byte: u8) -> bool {
    matches!(byte, b'\n' | b'\r' | 0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(text: &str) -> Frame {
        Frame::Message(BytesMut::from(text))
    }

    /// Every frame of `text`, read in pieces that end at `cuts`.
    fn decode(text: &[u8], bytes_max: usize, cuts: &[usize]) -> Vec<Frame> {
        let (mut frames, mut buffer, mut found) = (Frames::new(bytes_max), BytesMut::new(), Vec::new());
        let mut rest = text;
        for cut in cuts.iter().copied().chain([usize::MAX]) {
            let (now, later) = rest.split_at(cut.min(rest.len()));
            buffer.extend_from_slice(now);
            while let Some(frame) = frames.decode(&mut buffer).unwrap() {
                found.push(frame);
            }
            assert!(buffer.len() <= bytes_max + COUNT_DIGITS_MAX + 2, "what is too long is not kept");
            rest = later;
        }
        while let Some(frame) = frames.decode_eof(&mut buffer).unwrap() {
            found.push(frame);
        }
        assert!(buffer.is_empty());
        found
    }

    #[test]
    fn both_framings_on_one_stream_cut_anywhere() {
        let text = b"<1>one\n7 <1>a\nbc<2>two\r\n\n\n6 <3>x\n\x00404 not found\n200\n99 <4>incomplete";
        let expected = [
            message("<1>one"),
            message("<1>a\nbc"),
            message("<2>two"),
            message("<3>x"),
            message("404 not found"),
            message("200"),
            message("<4>incomplete"),
        ];
        for cut in 0..text.len() {
            assert_eq!(decode(text, 100, &[cut]), expected, "cut at {cut}");
        }
        assert_eq!(decode(text, 100, &[1; 100]), expected);
    }

    #[test]
    fn a_message_at_the_limit_passes_and_one_byte_more_does_not() {
        for (text, passes) in [("<1>45\n", true), ("<1>45\r\n", true), ("<1>456\n", false), ("<1>456\r\n", false)] {
            for cut in 0..text.len() {
                let frame = decode(text.as_bytes(), 5, &[cut]).remove(0);
                assert_eq!(matches!(frame, Frame::Message(_)), passes, "{text:?} cut at {cut}");
            }
        }
        assert_eq!(decode(b"5 <1>45", 5, &[]), [message("<1>45")]);
        assert_eq!(decode(b"6 <1>456", 5, &[]), [Frame::Oversized(6)]);
    }

    #[test]
    fn what_ends_a_line_is_no_way_around_the_limit() {
        let text = b"<1>4\0\0\0\0\0\n<2>\n";
        for cut in 0..text.len() {
            let found = decode(text, 5, &[cut]);
            assert!(matches!(found[..], [Frame::Oversized(_), Frame::Message(_)]), "cut at {cut}: {found:?}");
        }
    }

    #[test]
    fn after_one_that_is_too_long_all_goes_on() {
        let long = "x".repeat(50);
        let text = format!("53 <1>{long}<1>a\n<1>{long}\n5 <1>bc");
        let found = decode(text.as_bytes(), 10, &[7; 30]);
        let messages: Vec<&Frame> = found.iter().filter(|frame| matches!(frame, Frame::Message(_))).collect();
        assert_eq!(messages, [&message("<1>a"), &message("<1>bc")]);
        assert_eq!(found.len(), 4);
    }

    proptest! {
        #[test]
        fn reads_cut_anywhere_give_the_same_messages(
            text in "([a-c<>\n\r]|\\x00{1,9}|[0-9]{1,9} ?<?){0,40}",
            cuts in proptest::collection::vec(0..9_usize, 0..20),
            max in 1..30_usize,
        ) {
            // How much is seen of a long line when it is told of depends on the cuts, that it is told of does not.
            let plain = |frames: Vec<Frame>| frames.into_iter().map(|frame| match frame {
                Frame::Message(text) => Some(text),
                Frame::Oversized(_) => None,
            }).collect::<Vec<_>>();
            prop_assert_eq!(plain(decode(text.as_bytes(), max, &[])), plain(decode(text.as_bytes(), max, &cuts)));
        }
    }
}
