//! What OTLP answers: `ExportLogsServiceResponse`, and `google.rpc.Status` for what went wrong.

use serde_json::json;

use super::OtlpKind;

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
