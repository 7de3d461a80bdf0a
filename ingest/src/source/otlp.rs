//! OTLP's logs: from an `ExportLogsServiceRequest`, in protobuf or JSON, to lines; and its answers. Pure.
//!
//! Source: opentelemetry-proto 1.x (`logs/v1/logs.proto`, `common/v1/common.proto`) and the OTLP specification, which puts
//! protobuf into JSON with names in lower camel case and 64-bit integers as strings.
//!
//! One record is one line: its text, when that is JSON; otherwise its attributes as a JSON object, when they are those of
//! Traefik's access log, because they say more than the common log format and cannot be forged by a user name with a line
//! feed; otherwise its text. Records are read one at a time and never as a whole: two bytes of a request can stand for a
//! record of a hundred in memory, so a limit on bodies would not hold the memory of a decoder that keeps all of them.

mod answer;
mod json;
mod line;
mod protobuf;

use std::borrow::Cow;
use std::ops::ControlFlow;

use super::http::body::BodyError;

pub(crate) use answer::{render_response, render_retry_status, render_status};
pub use line::render_line;

/// Bytes of a record as it travels, by those of a line: a record brings its line twice, as text and as attributes, with
/// escapes. Longer ones are skipped as lines that are too long.
const RECORD_LINES_MAX: usize = 4;

/// How a request is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OtlpKind {
    /// `application/x-protobuf`.
    Protobuf,
    /// `application/json`.
    Json,
}

/// A request that is none.
#[derive(Debug, thiserror::Error)]
pub enum OtlpError {
    /// Not protobuf, or of another message.
    #[error("the body is no ExportLogsServiceRequest in protobuf: {0}")]
    Protobuf(&'static str),
    /// Not JSON, or of another message.
    #[error("the body is no ExportLogsServiceRequest in JSON")]
    Json(#[source] serde_json::Error),
    /// An array that is none.
    #[error("the body is no ExportLogsServiceRequest in JSON")]
    Element(#[source] BodyError),
}

/// A record, as far as it can be a line.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Record<'a> {
    /// Its body, when that is text.
    pub text: Option<Cow<'a, str>>,
    /// When it happened, in nanoseconds since 1970; 0 where that is not said.
    pub time_ns: u64,
    /// Its attributes, and the fields of a body that is a map; those with simple values.
    pub fields: Vec<(Cow<'a, str>, Scalar<'a>)>,
}

/// A simple value.
#[derive(Clone, Debug, PartialEq)]
pub enum Scalar<'a> {
    /// Text, or bytes that are text.
    Text(Cow<'a, str>),
    /// A whole number.
    Int(i64),
    /// A number.
    Float(f64),
    /// Yes or no.
    Bool(bool),
}

/// What [`read`] hands out.
#[derive(Debug)]
pub enum Part<'r, 'a> {
    /// The records from here on are of the host with this name, where it is known.
    Host(Option<&'r str>),
    /// A record and its bytes on the way; `None` when it was too long.
    Record(Option<&'r Record<'a>>, usize),
}

/// Takes the parts of a request.
pub type Each<'e> = dyn FnMut(Part<'_, '_>) -> ControlFlow<()> + 'e;

/// Hands every part of `body` to `each`, until that breaks. Returns how many records there were.
///
/// # Errors
/// When the body is no such request; records before the mistake have been handed over.
pub fn read(kind: OtlpKind, body: &[u8], line_bytes_max: usize, each: &mut Each<'_>) -> Result<u64, OtlpError> {
    let record_bytes_max = line_bytes_max.saturating_mul(RECORD_LINES_MAX);
    match kind {
        OtlpKind::Protobuf => protobuf::read(body, record_bytes_max, each).map_err(OtlpError::Protobuf),
        OtlpKind::Json => json::read(body, record_bytes_max, each),
    }
}

/// The resource attribute with the name of the host.
const HOST_NAME: &str = "host.name";

#[cfg(test)]
mod tests;
