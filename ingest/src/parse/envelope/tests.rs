use super::*;

fn opened(object: &str) -> (Envelope<'_>, String) {
    let mut buffer = b"of the line before".to_vec();
    let envelope = open(object.as_bytes(), &mut buffer);
    (envelope, String::from_utf8(buffer).unwrap())
}

#[test]
fn docker_lines_are_unescaped() {
    let line =
        r#"{"log":"{\"a\":\"b\\u0026\"}\r\n","stream":"stderr","attrs":{"x":"y"},"time":"2026-01-01T00:00:00Z"}"#;
    let whole = Envelope::Piece { stream: Stream::Stderr, partial: false };
    assert_eq!(opened(line), (whole, r#"{"a":"b\u0026"}"#.to_owned()));
    let piece = r#"{"log":"first part ","stream":"stdout","time":"2026-01-01T00:00:00Z"}"#;
    let partial = Envelope::Piece { stream: Stream::Stdout, partial: true };
    assert_eq!(opened(piece), (partial, "first part ".to_owned()));
    for broken in [r#"{"log":"x\n","stream":"stdout"} trailing"#, r#"{"log":7}"#, r#"{"log":"x"#, r#"{"log":["x"]}"#] {
        assert_eq!(opened(broken).0, Envelope::Broken, "{broken}");
    }
}

#[test]
fn only_what_docker_writes_is_a_piece() {
    for whole in [
        r#"{"log":"x","stream":"stdout"}"#,
        r#"{"log":"x","time":"2026-01-01T00:00:00Z"}"#,
        r#"{"log":"x","stream":"stdin","time":"2026-01-01T00:00:00Z"}"#,
        r#"{"date":1.5,"log":"x","stream":"stdout","time":"2026-01-01T00:00:00Z"}"#,
        r#"{"log":"x","stream":"stdout","time":"2026-01-01T00:00:00Z","_p":"F"}"#,
        r#"{"stream":"stdout","time":"2026-01-01T00:00:00Z","message":"x"}"#,
    ] {
        assert_eq!(opened(whole), (Envelope::Text, "x".to_owned()), "{whole}");
    }
}

#[test]
fn the_line_as_it_was_goes_before_what_may_have_been_changed() {
    for (object, line) in [
        (r#"{"log":{"offset":1},"message":"b","event":{"original":"a"}}"#, "a"),
        (r#"{"log":"c","message":"b","event":{"kind":"event"}}"#, "b"),
        (r#"{"log":"c","message":null,"json":{}}"#, "c"),
        (r#"{"message":"b","event.original":"a"}"#, "a"),
        (r#"{"MESSAGE":[104,105],"message":"b"}"#, "hi"),
    ] {
        assert_eq!(opened(object), (Envelope::Text, line.to_owned()), "{object}");
    }
    assert_eq!(opened(r#"{"message":{"a":1},"host":"x"}"#).0, Envelope::Object(r#"{"a":1}"#));
    assert_eq!(opened(r#"{"level":"info","msg":"x","event":"y"}"#).0, Envelope::Other);
}

#[test]
fn a_line_that_is_there_twice_is_refused() {
    for object in [
        r#"{"log":"a\n","log":"b\n","stream":"stdout","time":"x"}"#,
        r#"{"message":"a","\u006dessage":"b"}"#,
        r#"{"event":{"original":"a"},"event.original":"b"}"#,
    ] {
        assert_eq!(opened(object).0, Envelope::Broken, "{object}");
    }
}

#[test]
fn bytes_of_the_journal_are_bytes() {
    for broken in [r#"{"MESSAGE":[256]}"#, r#"{"MESSAGE":[-1]}"#, r#"{"MESSAGE":[1.5]}"#, r#"{"MESSAGE":["a"]}"#] {
        assert_eq!(opened(broken).0, Envelope::Broken, "{broken}");
    }
    let mut buffer = Vec::new();
    assert_eq!(open(br#"{"MESSAGE":[255,10]}"#, &mut buffer), Envelope::Text);
    assert_eq!(buffer, [255]);
}

#[test]
fn an_object_with_traefiks_keys_is_an_access_whatever_else_it_holds() {
    for object in [
        r#"{"log":"x\n","ClientAddr":"192.0.2.1:1"}"#,
        r#"{"ClientHost":null,"message":"x"}"#,
        r#"{"message":"x","request_User-Agent":"-"}"#,
        r#"{"MESSAGE":"x","DownstreamStatus":0}"#,
    ] {
        assert_eq!(opened(object).0, Envelope::Access, "{object}");
    }
    assert_eq!(opened(r#"{"entryPointName":"web","time":"x","message":"y"}"#).0, Envelope::Text);
}

#[test]
fn cri_lines_full_and_partial() {
    let full = open_cri(b"2026-01-01T00:00:00.000000000Z stdout F {\"a\": 1}");
    assert_eq!(full, Some((Stream::Stdout, false, &b"{\"a\": 1}"[..])));
    let partial = open_cri(b"2026-01-01T00:00:00.000000000+02:00 stderr P:x half ");
    assert_eq!(partial, Some((Stream::Stderr, true, &b"half "[..])));
    for line in [&b"2026-01-01T00:00:00Z INF Starting"[..], b"2026-01-01T00:00 stdout F x", b"10.0.0.1 - - [", b""] {
        assert_eq!(open_cri(line), None);
    }
}
