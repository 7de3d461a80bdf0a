use proptest::prelude::*;

use super::*;
use crate::parse::Format;

/// A field of bytes, in protobuf.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    assert!(bytes.len() < 1 << 14);
    [&[number << 3 | 2, bytes.len() as u8 & 0x7f | 0x80, (bytes.len() >> 7) as u8], bytes].concat()
}

fn text(text: &str) -> Vec<u8> {
    field(1, text.as_bytes())
}

fn pair(key: &str, value: &[u8]) -> Vec<u8> {
    [text(key), field(2, value)].concat()
}

/// One request of one resource, its host last.
fn request(records: &[Vec<u8>]) -> Vec<u8> {
    let records: Vec<u8> = records.iter().flat_map(|record| field(2, record)).collect();
    let resource = field(1, &field(1, &pair("host.name", &text("Edge 7"))));
    field(1, &[field(2, &records), resource].concat())
}

/// Hosts, and records as lines; `None` for those that are too long.
type Found = Vec<Result<Option<String>, String>>;

fn found(kind: OtlpKind, body: &[u8], format: Format) -> Result<Found, String> {
    let (mut found, mut line) = (Vec::new(), Vec::new());
    let mut records = 0;
    let count = read(kind, body, 256, &mut |part| {
        found.push(match part {
            Part::Host(host) => Err(host.unwrap_or_default().to_owned()),
            Part::Record(record, bytes) => {
                assert!(bytes <= body.len());
                records += 1;
                Ok(record.map(|record| {
                    let is_line = render_line(record, format, &mut line);
                    assert_eq!(is_line, !line.is_empty());
                    String::from_utf8_lossy(&line).into_owned()
                }))
            }
        });
        ControlFlow::Continue(())
    })
    .map_err(|error| super::super::http::chain(&error))?;
    assert_eq!(count, records);
    Ok(found)
}

/// The lines of one record, in both kinds.
fn line(protobuf: &[u8], json: &str, format: Format) -> String {
    let json = format!(
        r#"{{"resourceLogs":[{{"scopeLogs":[{{"scope":{{}},"logRecords":[{json}],"schemaUrl":""}}],"resource":{{"attributes":
        [{{"key":"host.name","value":{{"stringValue":"Edge 7"}}}}]}}}}]}}"#
    );
    let from_json = found(OtlpKind::Json, json.as_bytes(), format).unwrap();
    assert_eq!(found(OtlpKind::Protobuf, &request(&[protobuf.to_vec()]), format).unwrap(), from_json);
    let [Err(host), Ok(Some(line))] = &from_json[..] else { panic!("{from_json:?}") };
    assert_eq!(host, "Edge 7");
    line.clone()
}

#[test]
fn the_text_of_a_record_is_a_line_without_its_end() {
    let body = field(5, &text("{\"DownstreamStatus\":404}\n"));
    let json = r#"{"timeUnixNano":"1","severityNumber":9,"body":{"stringValue":"{\"DownstreamStatus\":404}\n"}}"#;
    assert_eq!(line(&body, json, Format::Auto), r#"{"DownstreamStatus":404}"#);
}

#[test]
fn attributes_of_an_access_entry_are_better_than_the_common_log_format() {
    let clf = "203.0.113.9 - x [01/Jan/2026:00:00:00 +0000] \"GET / HTTP/1.1\" 404 0 \"-\" \"-\"\n";
    let attributes = [
        pair("ClientAddr", &text("203.0.113.9:4")),
        pair("DownstreamStatus", &[3 << 3, 0x94, 0x03]),
        pair("Share", &[&[4 << 3 | 1][..], &0.5f64.to_le_bytes()].concat()),
        pair("Retry", &[2 << 3, 1]),
        pair("Below", &[&[3 << 3][..], &[0xff; 9], &[1]].concat()),
        pair("List", &field(5, b"")),
        pair("quote\"", &text("a\nb")),
    ];
    let attributes = attributes.iter().flat_map(|pair| field(6, pair)).collect();
    let record = [field(5, &text(clf)), attributes].concat();
    let json = format!(
        r#"{{"body":{{"stringValue":{}}},"attributes":[
        {{"key":"ClientAddr","value":{{"stringValue":"203.0.113.9:4"}}}},
        {{"key":"DownstreamStatus","value":{{"intValue":"404"}}}},
        {{"key":"Share","value":{{"doubleValue":0.5}}}},
        {{"key":"Retry","value":{{"boolValue":true}}}},
        {{"key":"Below","value":{{"intValue":-1}}}},
        {{"key":"List","value":{{"arrayValue":{{"values":[{{"stringValue":"x"}}]}}}}}},
        {{"key":"quote\"","value":{{"stringValue":"a\nb"}}}}]}}"#,
        serde_json::to_string(clf).unwrap()
    );
    let entry =
        r#"{"ClientAddr":"203.0.113.9:4","DownstreamStatus":404,"Share":0.5,"Retry":true,"Below":-1,"quote\"":"a\nb"}"#;
    assert_eq!(line(&record, &json, Format::Auto), entry);
    assert_eq!(line(&record, &json, Format::Json), entry);
    assert_eq!(line(&record, &json, Format::Clf), clf.trim_end(), "whoever wants the common log format gets no JSON");
}

#[test]
fn an_entry_without_times_has_that_of_its_record() {
    let attributes = |start: &[u8]| {
        let pairs = [pair("ClientHost", &text("203.0.113.9")), pair("DownstreamStatus", &text("404")), start.to_vec()];
        pairs.iter().filter(|pair| !pair.is_empty()).flat_map(|pair| field(6, pair)).collect::<Vec<_>>()
    };
    let time = [&[1 << 3 | 1][..], &1_795_630_366_567_965_400_u64.to_le_bytes()].concat();
    let json = |start: &str| {
        format!(
            r#"{{"timeUnixNano":"1795630366567965400","attributes":[{{"key":"ClientHost","value":{{"stringValue":"203.0.113.9"}}}},
            {{"key":"DownstreamStatus","value":{{"stringValue":"404"}}}}{start}]}}"#
        )
    };
    assert_eq!(
        line(&[&time[..], &attributes(b"")].concat(), &json(""), Format::Auto),
        r#"{"ClientHost":"203.0.113.9","DownstreamStatus":"404","time":1795630366567965400}"#
    );
    // The number 7, as Traefik writes its times.
    let start = pair("StartUTC", &[3 << 3, 7]);
    assert_eq!(
        line(
            &[&time[..], &attributes(&start)].concat(),
            &json(r#",{"key":"StartUTC","value":{"intValue":"7"}}"#),
            Format::Auto
        ),
        r#"{"ClientHost":"203.0.113.9","DownstreamStatus":"404","StartUTC":7}"#
    );
}

#[test]
fn a_body_that_is_a_map_is_an_entry() {
    let pairs = [pair("ClientHost", &text("203.0.113.9")), pair("DownstreamStatus", &text("404"))];
    let pairs: Vec<u8> = pairs.iter().flat_map(|pair| field(1, pair)).collect();
    let record = field(5, &field(6, &pairs));
    let json = r#"{"body":{"kvlistValue":{"values":[{"key":"ClientHost","value":{"stringValue":"203.0.113.9"}},
        {"key":"DownstreamStatus","value":{"stringValue":"404"}}]}}}"#;
    assert_eq!(line(&record, json, Format::Auto), r#"{"ClientHost":"203.0.113.9","DownstreamStatus":"404"}"#);
}

#[test]
fn a_record_that_says_nothing_is_no_line() {
    let only_status = field(6, &pair("DownstreamStatus", &[3 << 3, 7]));
    let json = r#"{"attributes":[{"key":"DownstreamStatus","value":{"intValue":7}}]}"#;
    assert_eq!(line(&only_status, json, Format::Auto), "");
    assert_eq!(line(b"", "{}", Format::Auto), "");
    assert_eq!(found(OtlpKind::Protobuf, b"", Format::Auto), Ok(Vec::new()));
    assert_eq!(found(OtlpKind::Json, b"{}", Format::Auto), Ok(Vec::new()));
    assert_eq!(found(OtlpKind::Json, br#"{"resourceLogs":null,"other":[[]]}"#, Format::Auto), Ok(Vec::new()));
}

#[test]
fn long_records_are_skipped_and_the_rest_is_read() {
    let long = field(5, &text(&"x".repeat(2000)));
    let short = field(5, &text("y"));
    let body = request(&[long, short]);
    let lines = [Err("Edge 7".to_owned()), Ok(None), Ok(Some("y".to_owned()))];
    assert_eq!(found(OtlpKind::Protobuf, &body, Format::Auto).unwrap(), lines);
    let json = format!(
        r#"{{"resourceLogs":[{{"scopeLogs":[{{"logRecords":[{{"x":"{}"}},{{"body":{{"stringValue":"y"}}}}]}}]}}]}}"#,
        "x".repeat(2000)
    );
    assert_eq!(found(OtlpKind::Json, json.as_bytes(), Format::Auto).unwrap()[1..], lines[1..]);
}

#[test]
fn what_is_no_request_is_told() {
    for body in
        [&b"{}"[..], b"\x0a", b"\x0a\x7f", b"\x08\x01\x0a\x02\x12\x05", b"\x0b", b"\x02\x00", &[0xff; 11], b"\x09\0"]
    {
        let told = found(OtlpKind::Protobuf, body, Format::Auto).unwrap_err();
        assert!(told.starts_with("the body is no ExportLogsServiceRequest in protobuf: "), "{body:?}: {told}");
    }
    for body in
        [&b""[..], b"[]", br#"{"resourceLogs":{}}"#, br#"{"resourceLogs":[{"scopeLogs":[7]}]}"#, b"{}x", b"\x0a"]
    {
        let told = found(OtlpKind::Json, body, Format::Auto).unwrap_err();
        assert!(told.starts_with("the body is no ExportLogsServiceRequest in JSON: "), "{body:?}: {told}");
    }
}

#[test]
fn deep_values_take_no_stack() {
    let mut value = text("x");
    for _ in 0..4000 {
        if value.len() < 16_000 {
            value = field(5, &field(1, &value));
        }
    }
    let record = field(6, &pair("deep", &value[..value.len().min(16_000)]));
    let read = read(OtlpKind::Protobuf, &request(&[record[..record.len().min(16_000)].to_vec()]), 1 << 16, &mut |_| {
        ControlFlow::Continue(())
    });
    // Cut or not: it returns.
    drop(read);
    let deep = format!(r#"{{"resourceLogs":{}{}}}"#, "[".repeat(1 << 20), "]".repeat(1 << 20));
    found(OtlpKind::Json, deep.as_bytes(), Format::Auto).unwrap_err();
}

#[test]
fn answers_are_what_otlp_wants() {
    assert_eq!(render_response(OtlpKind::Protobuf, 0, "x"), b"");
    assert_eq!(render_response(OtlpKind::Json, 0, "x"), b"{}");
    assert_eq!(render_response(OtlpKind::Protobuf, 300, "ab"), b"\x0a\x07\x08\xac\x02\x12\x02ab");
    let json = render_response(OtlpKind::Json, 3, "ab");
    assert_eq!(json, br#"{"partialSuccess":{"errorMessage":"ab","rejectedLogRecords":"3"}}"#);
    assert_eq!(render_status(OtlpKind::Protobuf, 14, "ab"), b"\x08\x0e\x12\x02ab");
    assert_eq!(render_status(OtlpKind::Json, 14, "ab"), br#"{"code":14,"message":"ab"}"#);
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(body: Vec<u8>) {
        let _read = found(OtlpKind::Protobuf, &body, Format::Auto);
        let _read = found(OtlpKind::Json, &body, Format::Auto);
    }
}
