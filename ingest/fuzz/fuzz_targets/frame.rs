//! Bytes read in any pieces give the same lines, and frames leave no gap.

#![no_main]

use ingest::frame::Framer;
use libfuzzer_sys::fuzz_target;

const LINE_MAX: usize = 24;

fuzz_target!(|input: (Vec<u8>, Vec<u8>)| {
    let (text, cuts) = input;
    let mut whole = Vec::new();
    let mut framer = Framer::new(0, LINE_MAX);
    framer.feed(&text, |frame| whole.push((frame.start, frame.end, frame.line.map(<[u8]>::to_vec))));
    framer.finish(|frame| whole.push((frame.start, frame.end, frame.line.map(<[u8]>::to_vec))));
    let mut pieces = Vec::new();
    let mut framer = Framer::new(0, LINE_MAX);
    let mut rest = &text[..];
    for cut in cuts {
        let (now, later) = rest.split_at(usize::from(cut).min(rest.len()));
        framer.feed(now, |frame| pieces.push((frame.start, frame.end, frame.line.map(<[u8]>::to_vec))));
        rest = later;
    }
    framer.feed(rest, |frame| pieces.push((frame.start, frame.end, frame.line.map(<[u8]>::to_vec))));
    framer.finish(|frame| pieces.push((frame.start, frame.end, frame.line.map(<[u8]>::to_vec))));
    assert_eq!(whole, pieces);
    let end = whole.iter().fold(0, |at, (start, end, _)| if at == *start { *end } else { panic!("a gap at {at}") });
    assert_eq!(end, text.len() as u64);
});
