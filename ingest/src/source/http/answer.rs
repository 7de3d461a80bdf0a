//! What senders are told, in the words of their protocol.

use std::time::Duration;

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Response, StatusCode};

use super::handover::Taken;
use super::{Content, RETRY_AFTER};
use crate::source::otlp::{OtlpKind, render_response, render_status};

/// The body of an answer.
pub(super) type Answer = Full<Bytes>;

/// What an OTLP sender is told of records that are no lines.
const NO_LINES: &str = "records without text and without the attributes of an access entry are no lines";

/// How answers are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dialect {
    /// Text for people.
    Plain,
    /// OTLP's messages.
    Otlp(OtlpKind),
}

impl Dialect {
    /// A sender of OTLP is answered in what it wrote.
    pub(super) fn of(content: &Content, headers: &HeaderMap) -> Self {
        match content {
            Content::Lines { .. } => Self::Plain,
            Content::Otlp if media_type(headers) == "application/json" => Self::Otlp(OtlpKind::Json),
            Content::Otlp => Self::Otlp(OtlpKind::Protobuf),
        }
    }
}

/// The type of a body without its parameters, in lower case; empty when there is none.
pub(super) fn media_type(headers: &HeaderMap) -> String {
    let value = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
}

/// Why a request is not taken.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) status: StatusCode,
    pub(super) text: String,
    /// When to send the same again, if that can help.
    pub(super) retry_after: Option<Duration>,
    headers: Vec<(HeaderName, &'static str)>,
}

impl Refusal {
    /// Sending the same again does not help.
    pub(super) fn new(status: StatusCode, text: impl Into<String>) -> Self {
        Self { status, text: text.into(), retry_after: None, headers: Vec::new() }
    }

    /// The same may be taken later.
    pub(super) fn later(status: StatusCode, text: impl Into<String>, after: Duration) -> Self {
        Self { retry_after: Some(after), ..Self::new(status, text) }
    }

    /// The sender took too long.
    pub(super) fn slow(text: &str) -> Self {
        Self::later(StatusCode::REQUEST_TIMEOUT, text, RETRY_AFTER).closing()
    }

    /// A mistake of ours.
    pub(super) fn broken() -> Self {
        Self::later(StatusCode::SERVICE_UNAVAILABLE, "the request could not be worked on", RETRY_AFTER)
    }

    pub(super) fn with_header(mut self, name: HeaderName, value: &'static str) -> Self {
        self.headers.push((name, value));
        self
    }

    /// The connection ends with the answer.
    pub(super) fn closing(self) -> Self {
        self.with_header(header::CONNECTION, "close")
    }
}

/// Whether the source takes requests. Asks for no secret.
pub(super) fn health(method: &Method, is_draining: bool) -> Response<Answer> {
    if !matches!(*method, Method::GET | Method::HEAD) {
        let refusal = Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "health is asked for with GET");
        return refused(Dialect::Plain, refusal.with_header(header::ALLOW, "GET, HEAD"));
    }
    if is_draining {
        let refusal = Refusal::later(StatusCode::SERVICE_UNAVAILABLE, "shutting down", RETRY_AFTER);
        return refused(Dialect::Plain, refusal);
    }
    plain(StatusCode::OK, "ok")
}

/// All is safe.
pub(super) fn taken(dialect: Dialect, taken: Taken) -> Response<Answer> {
    let Taken { lines, rejected } = taken;
    match dialect {
        Dialect::Plain => plain(StatusCode::OK, &format!("{lines} lines taken")),
        Dialect::Otlp(kind) => otlp(kind, StatusCode::OK, render_response(kind, rejected, NO_LINES)),
    }
}

/// Why nothing, or not all, is safe.
pub(super) fn refused(dialect: Dialect, refusal: Refusal) -> Response<Answer> {
    let Refusal { status, text, retry_after, headers } = refusal;
    let mut response = match dialect {
        Dialect::Plain => plain(status, &text),
        Dialect::Otlp(kind) => {
            // Senders of OTLP give up on any other status than 429, 502, 503 and 504.
            let is_slow = status == StatusCode::REQUEST_TIMEOUT;
            let status = if is_slow { StatusCode::SERVICE_UNAVAILABLE } else { status };
            otlp(kind, status, render_status(kind, rpc_code(status), &text))
        }
    };
    for (name, value) in headers {
        response.headers_mut().append(name, HeaderValue::from_static(value));
    }
    if let Some(after) = retry_after {
        let seconds = after.as_secs() + u64::from(after.subsec_nanos() > 0);
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds.max(1)));
    }
    response
}

/// The code of `google.rpc.Code` that says the same.
fn rpc_code(status: StatusCode) -> u32 {
    match status {
        StatusCode::UNAUTHORIZED => 16,
        StatusCode::NOT_FOUND => 5,
        StatusCode::METHOD_NOT_ALLOWED => 12,
        StatusCode::TOO_MANY_REQUESTS => 8,
        StatusCode::SERVICE_UNAVAILABLE => 14,
        _ => 3,
    }
}

fn plain(status: StatusCode, text: &str) -> Response<Answer> {
    response(status, "text/plain; charset=utf-8", format!("{text}\n").into_bytes())
}

fn otlp(kind: OtlpKind, status: StatusCode, body: Vec<u8>) -> Response<Answer> {
    let content_type = match kind {
        OtlpKind::Protobuf => "application/x-protobuf",
        OtlpKind::Json => "application/json",
    };
    response(status, content_type, body)
}

fn response(status: StatusCode, content_type: &'static str, body: Vec<u8>) -> Response<Answer> {
    let mut response = Response::new(Full::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
