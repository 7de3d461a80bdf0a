//! Any bytes as a request of OTLP: no panic, and every line that is made of attributes is JSON.

#![no_main]

use std::ops::ControlFlow;

use ingest::parse::Format;
use ingest::source::otlp::{OtlpKind, Part, read, render_line};
use libfuzzer_sys::fuzz_target;

const LINE_BYTES_MAX: usize = 256;

fuzz_target!(|body: &[u8]| {
    let mut line = Vec::new();
    for kind in [OtlpKind::Protobuf, OtlpKind::Json] {
        let mut seen = 0;
        let records = read(kind, body, LINE_BYTES_MAX, &mut |part| {
            if let Part::Record(record, bytes) = part {
                seen += 1;
                assert!(bytes <= body.len());
                if let Some(record) = record {
                    let is_line = render_line(record, Format::Auto, &mut line);
                    assert_eq!(is_line, !line.is_empty());
                    let is_text = record.text.as_deref().is_some_and(|text| text.as_bytes().starts_with(&line));
                    assert!(is_text || !is_line || (line.starts_with(b"{") && line.ends_with(b"}")));
                }
            }
            ControlFlow::Continue(())
        });
        assert!(records.is_err() || records.is_ok_and(|records| records == seen));
    }
});
