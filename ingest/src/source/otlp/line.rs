//! From a record to the line that it is.

use std::io::Write;

use super::{Record, Scalar};
use crate::parse::Format;

/// The attribute without which there is no access entry.
const STATUS: &str = "DownstreamStatus";
/// Attributes with the time of a request.
const TIMES: [&str; 3] = ["StartUTC", "StartLocal", "time"];
/// Of these, one at least.
const CLIENTS: [&str; 2] = ["ClientAddr", "ClientHost"];

/// Writes the line of `record`, without a line end, over what is in `line`. Returns whether there is any: a record without
/// text and without the attributes of an access entry is none.
pub fn render_line(record: &Record<'_>, format: Format, line: &mut Vec<u8>) -> bool {
    line.clear();
    let text = record.text.as_deref().unwrap_or_default().trim_end_matches(['\r', '\n']);
    let is_entry = has(record, &[STATUS]) && has(record, &CLIENTS);
    // Whoever wants the common log format gets no JSON.
    if is_entry && !text.starts_with('{') && format != Format::Clf {
        render_fields(record, line);
    } else {
        line.extend_from_slice(text.as_bytes());
    }
    !line.is_empty()
}

fn has(record: &Record<'_>, names: &[&str]) -> bool {
    record.fields.iter().any(|(name, _)| names.contains(&&**name))
}

fn render_fields(record: &Record<'_>, line: &mut Vec<u8>) {
    line.push(b'{');
    for (name, value) in &record.fields {
        if line.len() > 1 {
            line.push(b',');
        }
        render_text(name, line);
        line.push(b':');
        match value {
            Scalar::Text(text) => render_text(text, line),
            Scalar::Int(number) => render(number, line),
            Scalar::Bool(flag) => render(flag, line),
            Scalar::Float(number) if number.is_finite() => render(number, line),
            Scalar::Float(_) => line.extend_from_slice(b"null"),
        }
    }
    // Traefik's fields may be dropped; the time of its records cannot.
    if record.time_ns > 0 && !has(record, &TIMES) {
        line.extend_from_slice(b",\"time\":");
        render(record.time_ns, line);
    }
    line.push(b'}');
}

fn render(value: impl std::fmt::Display, line: &mut Vec<u8>) {
    // A vector takes everything.
    let _written = write!(line, "{value}");
}

fn render_text(text: &str, line: &mut Vec<u8>) {
    // Text is always JSON, and a vector takes everything.
    let _written = serde_json::to_writer(line, text);
}
