//! Any bytes as messages of syslog, whole and as a stream in any pieces: no panic, no copy, the same messages, and nothing
//! kept beyond the limit.

#![no_main]

use bytes::BytesMut;
use ingest::parse::syslog::parse_message;
use ingest::source::syslog::{Frame, Frames};
use libfuzzer_sys::fuzz_target;
use tokio_util::codec::Decoder;

const MESSAGE_MAX: usize = 64;

fuzz_target!(|text: &[u8]| {
    assert!(text.ends_with(parse_message(text).payload));
    let whole = decode(text, text.len().max(1));
    for piece in [1, 2, 7, 50] {
        assert_eq!(whole, decode(text, piece));
    }
});

/// The messages of `text`, read in pieces of so many bytes; `None` where one was too long.
fn decode(text: &[u8], piece: usize) -> Vec<Option<Vec<u8>>> {
    let (mut frames, mut buffer, mut found) = (Frames::new(MESSAGE_MAX), BytesMut::new(), Vec::new());
    let plain = |frame| match frame {
        Frame::Message(message) => Some(message.to_vec()),
        Frame::Oversized(_) => None,
    };
    for piece in text.chunks(piece) {
        buffer.extend_from_slice(piece);
        while let Some(frame) = frames.decode(&mut buffer).expect("decoding does not fail") {
            found.push(plain(frame));
        }
        assert!(buffer.len() <= MESSAGE_MAX + 10, "what is too long is not kept");
    }
    while let Some(frame) = frames.decode_eof(&mut buffer).expect("decoding does not fail") {
        found.push(plain(frame));
    }
    assert!(buffer.is_empty());
    for message in found.iter().flatten() {
        assert!(message.ends_with(parse_message(message).payload));
    }
    found
}
