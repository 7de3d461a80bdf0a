//! OTLP over gRPC: the unary call `LogsService/Export`, on HTTP/2.
//!
//! Source: gRPC's documents "gRPC over HTTP2" and "Compression", and the OTLP specification, which says what its senders
//! send again: what is `UNAVAILABLE`, and what is `RESOURCE_EXHAUSTED` with a `RetryInfo`, but not without one.

use std::fmt::Write;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use hyper::body::{Bytes, Incoming};
use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use hyper::http::request::Parts;
use hyper::{Response, StatusCode, Version, header};

use super::answer::{Answer, Refusal, media_type, rpc_code};
use super::coding::Coding;
use super::{next_data, too_large};
use crate::source::otlp::render_retry_status;

/// The one method.
pub(super) const EXPORT_PATH: &str = "/opentelemetry.proto.collector.logs.v1.LogsService/Export";
/// How a message is compressed.
pub(super) const ENCODING: HeaderName = HeaderName::from_static("grpc-encoding");

/// Before each message: whether it is compressed, and its length in 4 bytes.
const PREFIX_BYTES: usize = 5;
const CONTENT_TYPE: HeaderValue = HeaderValue::from_static("application/grpc");
const ACCEPT_ENCODING: HeaderName = HeaderName::from_static("grpc-accept-encoding");
const STATUS: HeaderName = HeaderName::from_static("grpc-status");
const MESSAGE: HeaderName = HeaderName::from_static("grpc-message");
const DETAILS: HeaderName = HeaderName::from_static("grpc-status-details-bin");
const PUSHBACK: HeaderName = HeaderName::from_static("grpc-retry-pushback-ms");

/// Whether a request is a call. Over HTTP/1.1 there is none: its answers need trailers.
pub(super) fn is_call(head: &Parts) -> bool {
    let kind = media_type(&head.headers);
    head.version == Version::HTTP_2 && (kind == "application/grpc" || kind.starts_with("application/grpc+"))
}

/// A message of which the prefix has come.
pub(super) struct Message {
    /// How it is compressed.
    pub(super) coding: Coding,
    /// Its bytes, as they travel.
    pub(super) bytes: usize,
    /// What has come of them, and perhaps of what follows.
    pub(super) begun: Bytes,
}

/// Reads the prefix. `coding` is that of a message that says it is compressed.
pub(super) async fn begin(body: &mut Incoming, coding: Coding, bytes_max: usize) -> Result<Message, Refusal> {
    let (mut prefix, mut begun) = (Vec::with_capacity(PREFIX_BYTES), Bytes::new());
    while prefix.len() < PREFIX_BYTES {
        begun = next_data(body).await?.ok_or_else(cut)?;
        prefix.extend_from_slice(&begun.split_to(begun.len().min(PREFIX_BYTES - prefix.len())));
    }
    let (coding, bytes) = parse_prefix(&prefix, coding)?;
    if bytes > bytes_max { Err(too_large(bytes_max)) } else { Ok(Message { coding, bytes, begun }) }
}

fn parse_prefix(prefix: &[u8], coding: Coding) -> Result<(Coding, usize), Refusal> {
    let &[flag, a, b, c, d] = prefix else { return Err(cut()) };
    let coding = match (flag, coding) {
        (0, _) => Coding::Identity,
        // That this is `INTERNAL` is gRPC's wish.
        (1, Coding::Identity) => {
            let text = "the message is compressed, and grpc-encoding does not say how";
            return Err(Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, text));
        }
        (1, coding) => coding,
        _ => return Err(Refusal::new(StatusCode::BAD_REQUEST, "the message begins with an unknown flag")),
    };
    Ok((coding, u32::from_be_bytes([a, b, c, d]) as usize))
}

/// The end came before that of the message.
pub(super) fn cut() -> Refusal {
    Refusal::new(StatusCode::BAD_REQUEST, "the message is cut short")
}

/// More came than the one message of a unary call.
pub(super) fn too_many() -> Refusal {
    Refusal::new(StatusCode::BAD_REQUEST, "bytes follow the message, of which a call has one")
}

/// All is safe.
pub(super) fn taken(message: &[u8]) -> Response<Answer> {
    let length = u32::try_from(message.len()).unwrap_or(u32::MAX).to_be_bytes();
    let data = [&[0][..], &length, message].concat();
    let trailers = HeaderMap::from_iter([(STATUS, HeaderValue::from(0))]);
    let mut response = Response::new(Answer::with_trailers(data, trailers));
    set_common(response.headers_mut());
    response
}

/// Why nothing, or not all, is safe: an answer of trailers alone.
pub(super) fn refused(refusal: &Refusal) -> Response<Answer> {
    let Refusal { status, text, retry_after, .. } = refusal;
    let code = code(*status);
    let mut response = Response::new(Answer::new(Vec::new()));
    let headers = response.headers_mut();
    set_common(headers);
    headers.insert(STATUS, HeaderValue::from(code));
    // Encoded, it is always a value.
    headers.extend(HeaderValue::try_from(percent_encode(text)).map(|text| (MESSAGE, text)));
    if let Some(after) = retry_after {
        let details = STANDARD_NO_PAD.encode(render_retry_status(code, text, *after));
        headers.extend(HeaderValue::try_from(details).map(|details| (DETAILS, details)));
        headers.insert(PUSHBACK, HeaderValue::from(millis(*after)));
    }
    response
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn set_common(headers: &mut HeaderMap) {
    headers.insert(header::CONTENT_TYPE, CONTENT_TYPE);
    headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity,gzip,deflate,zstd"));
}

/// The code of `google.rpc.Code` that says the same, and has the sender do what the status would.
fn code(status: StatusCode) -> u32 {
    match status {
        // No such method, or no such encoding.
        StatusCode::NOT_FOUND | StatusCode::UNSUPPORTED_MEDIA_TYPE => 12,
        StatusCode::PAYLOAD_TOO_LARGE => 8,
        StatusCode::REQUEST_TIMEOUT => 14,
        status => rpc_code(status),
    }
}

/// As `grpc-message` is written.
fn percent_encode(text: &str) -> String {
    text.bytes().fold(String::with_capacity(text.len()), |mut encoded, byte| {
        if matches!(byte, b' '..=b'~') && byte != b'%' {
            encoded.push(char::from(byte));
        } else {
            // A string takes everything.
            let _written = write!(encoded, "%{byte:02X}");
        }
        encoded
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_says_how_and_how_much() {
        let parse = |prefix: &[u8], coding| parse_prefix(prefix, coding).map_err(|refusal| code(refusal.status));
        assert_eq!(parse(&[0, 0, 0, 1, 2], Coding::Gzip), Ok((Coding::Identity, 258)));
        assert_eq!(parse(&[1, 0, 0, 0, 0], Coding::Gzip), Ok((Coding::Gzip, 0)));
        assert_eq!(parse(&[0, 255, 255, 255, 255], Coding::Identity), Ok((Coding::Identity, 0xffff_ffff)));
        assert_eq!(parse(&[1, 0, 0, 0, 0], Coding::Identity), Err(13));
        assert_eq!(parse(&[2, 0, 0, 0, 0], Coding::Gzip), Err(3));
        assert_eq!(parse(&[0, 0, 0, 0], Coding::Gzip), Err(3));
    }

    #[test]
    fn a_message_is_written_in_plain_ascii() {
        assert_eq!(percent_encode("50% \"müde\"\n~"), "50%25 \"m%C3%BCde\"%0A~");
    }

    #[test]
    fn only_what_may_be_sent_again_says_when() {
        for (refusal, code, pushback) in [
            (Refusal::later(StatusCode::TOO_MANY_REQUESTS, "x", Duration::from_millis(1500)), "8", Some("1500")),
            (Refusal::later(StatusCode::SERVICE_UNAVAILABLE, "x", Duration::from_secs(1)), "14", Some("1000")),
            (Refusal::slow("x"), "14", Some("1000")),
            (too_large(7), "8", None),
            (Refusal::new(StatusCode::UNAUTHORIZED, "x"), "16", None),
            (Refusal::new(StatusCode::NOT_FOUND, "x"), "12", None),
            (cut(), "3", None),
        ] {
            let response = refused(&refusal);
            let header = |name: HeaderName| response.headers().get(name).map(|value| value.to_str().unwrap());
            assert_eq!((response.status(), header(STATUS), header(PUSHBACK)), (StatusCode::OK, Some(code), pushback));
            assert_eq!(header(DETAILS).is_some(), pushback.is_some(), "{refusal:?}");
        }
    }
}
