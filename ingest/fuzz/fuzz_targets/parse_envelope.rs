//! Any lines, with and without container envelopes, through one parser: joined pieces stay within the limit.

#![no_main]

use std::sync::Arc;

use ingest::parse::{Format, Parser};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &[u8]| {
    let mut parser = Parser::new(Format::Auto, 256, Arc::default(), Arc::default());
    for line in text.split(|byte| *byte == b'\n') {
        parser.with_event(line, 0, |event| assert!(event.status <= 999));
    }
    assert!(parser.abandon() <= 2);
    assert!(!parser.is_joining());
});
