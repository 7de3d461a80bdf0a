//! What OTLP answers: `ExportLogsServiceResponse`, and `google.rpc.Status` for what went wrong.

use std::time::Duration;

use serde_json::json;

use super::OtlpKind;

/// The type of a detail that says when to come again.
const RETRY_INFO: &str = "type.googleapis.com/google.rpc.RetryInfo";

/// All records were taken, or all but `rejected`.
pub(crate) fn render_response(kind: OtlpKind, rejected: u64, message: &str) -> Vec<u8> {
    match (kind, rejected) {
        (OtlpKind::Protobuf, 0) => Vec::new(),
        (OtlpKind::Json, 0) => b"{}".to_vec(),
        (OtlpKind::Protobuf, _) => {
            let mut partial = Vec::new();
            put_number(1, rejected, &mut partial);
            put_bytes(2, message.as_bytes(), &mut partial);
            let mut response = Vec::new();
            put_bytes(1, &partial, &mut response);
            response
        }
        (OtlpKind::Json, _) => {
            let partial = json!({ "rejectedLogRecords": rejected.to_string(), "errorMessage": message });
            json!({ "partialSuccess": partial }).to_string().into_bytes()
        }
    }
}

/// Nothing was taken. `code` is one of `google.rpc.Code`.
pub(crate) fn render_status(kind: OtlpKind, code: u32, message: &str) -> Vec<u8> {
    match kind {
        OtlpKind::Protobuf => {
            let mut status = Vec::new();
            put_number(1, code.into(), &mut status);
            put_bytes(2, message.as_bytes(), &mut status);
            status
        }
        OtlpKind::Json => json!({ "code": code, "message": message }).to_string().into_bytes(),
    }
}

/// Nothing was taken, and the same may be sent again after that time: a `google.rpc.Status` with a `google.rpc.RetryInfo`
/// among its details, in protobuf.
pub(crate) fn render_retry_status(code: u32, message: &str, after: Duration) -> Vec<u8> {
    let (mut delay, mut info, mut any) = (Vec::new(), Vec::new(), Vec::new());
    put_number(1, after.as_secs(), &mut delay);
    put_number(2, after.subsec_nanos().into(), &mut delay);
    put_bytes(1, &delay, &mut info);
    put_bytes(1, RETRY_INFO.as_bytes(), &mut any);
    put_bytes(2, &info, &mut any);
    let mut status = render_status(OtlpKind::Protobuf, code, message);
    put_bytes(3, &any, &mut status);
    status
}

fn put_varint(mut number: u64, out: &mut Vec<u8>) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

fn put_number(field: u64, number: u64, out: &mut Vec<u8>) {
    put_varint(field << 3, out);
    put_varint(number, out);
}

fn put_bytes(field: u64, bytes: &[u8], out: &mut Vec<u8>) {
    put_varint(field << 3 | 2, out);
    put_varint(bytes.len() as u64, out);
    out.extend_from_slice(bytes);
}
