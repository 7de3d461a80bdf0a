//! What senders are told, in the words of their protocol.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::body::{Body, Bytes, Frame, SizeHint};
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::http::request::Parts;
use hyper::{Method, Response, StatusCode};

use super::handover::Taken;
use super::{Content, RETRY_AFTER, grpc};
use crate::source::otlp::{OtlpKind, render_response, render_status};

/// The body of an answer, and the trailers after it.
#[derive(Debug)]
pub(super) struct Answer {
    data: Option<Bytes>,
    trailers: Option<HeaderMap>,
}

impl Answer {
    /// Without trailers.
    pub(super) fn new(data: Vec<u8>) -> Self {
        Self { data: (!data.is_empty()).then(|| data.into()), trailers: None }
    }

    /// With trailers, which HTTP/2 has.
    pub(super) fn with_trailers(data: Vec<u8>, trailers: HeaderMap) -> Self {
        Self { trailers: Some(trailers), ..Self::new(data) }
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let data = self.data.take().map(Frame::data);
        Poll::Ready(data.or_else(|| self.trailers.take().map(Frame::trailers)).map(Ok))
    }

    fn is_end_stream(&self) -> bool {
        self.data.is_none() && self.trailers.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        let bytes = self.data.as_ref().map_or(0, |data| data.len() as u64);
        // With trailers, the end is not where the length says.
        if self.trailers.is_some() { SizeHint::default() } else { SizeHint::with_exact(bytes) }
    }
}

/// What an OTLP sender is told of records that are no lines.
const NO_LINES: &str = "records without text and without the attributes of an access entry are no lines";

/// How answers are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dialect {
    /// Text for people.
    Plain,
    /// OTLP's messages.
    Otlp(OtlpKind),
    /// OTLP's messages, as gRPC frames them.
    Grpc,
}

impl Dialect {
    /// A sender of OTLP is answered in what it wrote.
    pub(super) fn of(content: &Content, head: &Parts) -> Self {
        match content {
            Content::Lines { .. } => Self::Plain,
            Content::Otlp if grpc::is_call(head) => Self::Grpc,
            Content::Otlp if media_type(&head.headers) == "application/json" => Self::Otlp(OtlpKind::Json),
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
        Dialect::Grpc => grpc::taken(&render_response(OtlpKind::Protobuf, rejected, NO_LINES)),
    }
}

/// Why nothing, or not all, is safe.
pub(super) fn refused(dialect: Dialect, refusal: Refusal) -> Response<Answer> {
    let mut response = match dialect {
        Dialect::Grpc => grpc::refused(&refusal),
        Dialect::Plain => plain(refusal.status, &refusal.text),
        Dialect::Otlp(kind) => {
            let Refusal { status, text, .. } = &refusal;
            // Senders of OTLP give up on any other status than 429, 502, 503 and 504.
            let is_slow = *status == StatusCode::REQUEST_TIMEOUT;
            let status = if is_slow { StatusCode::SERVICE_UNAVAILABLE } else { *status };
            otlp(kind, status, render_status(kind, rpc_code(status), text))
        }
    };
    for (name, value) in refusal.headers {
        response.headers_mut().append(name, HeaderValue::from_static(value));
    }
    if let Some(after) = refusal.retry_after {
        let seconds = after.as_secs() + u64::from(after.subsec_nanos() > 0);
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds.max(1)));
    }
    response
}

/// The code of `google.rpc.Code` that says the same.
pub(super) fn rpc_code(status: StatusCode) -> u32 {
    match status {
        StatusCode::UNAUTHORIZED => 16,
        StatusCode::NOT_FOUND => 5,
        StatusCode::METHOD_NOT_ALLOWED => 12,
        StatusCode::TOO_MANY_REQUESTS => 8,
        StatusCode::SERVICE_UNAVAILABLE => 14,
        StatusCode::INTERNAL_SERVER_ERROR => 13,
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
    let mut response = Response::new(Answer::new(body));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
