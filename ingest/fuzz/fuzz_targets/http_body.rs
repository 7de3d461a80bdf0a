//! Any bytes as the body of a request: no panic, no line over the limit, and the same lines each time.

#![no_main]

use std::ops::ControlFlow;

use ingest::source::http::body::{BodyKind, split};
use libfuzzer_sys::fuzz_target;

const LINE_BYTES_MAX: usize = 64;

fuzz_target!(|body: &[u8]| {
    for kind in [BodyKind::Lines, BodyKind::Json] {
        let mut bytes_of_lines = 0;
        let mut seen = 0;
        let lines = split(kind, body, LINE_BYTES_MAX, &mut |line, bytes| {
            assert!(line.is_none_or(|line| line.len() <= LINE_BYTES_MAX && line.len() <= bytes));
            seen += 1;
            bytes_of_lines += bytes;
            ControlFlow::Continue(())
        });
        assert!(bytes_of_lines <= body.len());
        let again = split(kind, body, LINE_BYTES_MAX, &mut |_, _| ControlFlow::Continue(()));
        assert_eq!(lines.is_ok(), again.is_ok());
        if let (Ok(lines), Ok(again)) = (lines, again) {
            assert_eq!((lines, lines), (seen, again));
        }
        assert!(kind != BodyKind::Lines || bytes_of_lines == body.len(), "every byte is of a line");
    }
});
