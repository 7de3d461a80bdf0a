//! Headers as programs write them, and that nothing after one is touched.

use proptest::prelude::*;

use super::*;

const JSON: &str = r#"{"ClientAddr":"192.0.2.1:5","DownstreamStatus":404}"#;
const CLF: &str = r#"192.0.2.1 - - [02/Jan/2026:15:04:05 +0000] "GET / HTTP/1.1" 404 19 "-" "-" 1 "r" "-" 0ms"#;
const CLF6: &str = r#"2001:db8::1 - - [02/Jan/2026:15:04:05 +0000] "GET / HTTP/1.1" 404 19 "-" "-" 1 "r" "-" 0ms"#;
const CRI: &str = r#"2026-01-02T15:04:05.123456789Z stdout F {"DownstreamStatus":404}"#;

/// Header, host, program.
const HEADERS: [(&str, Option<&str>, Option<&str>); 29] = [
    // rsyslog: RSYSLOG_ForwardFormat, RSYSLOG_TraditionalForwardFormat, RSYSLOG_SyslogProtocol23Format; imfile's tag as
    // it is mostly written, without a colon.
    ("<133>2026-01-02T15:04:05.123456+00:00 edge-1 traefik: ", Some("edge-1"), Some("traefik")),
    ("<133>2026-01-02T15:04:05.123456+00:00 edge-1 traefik ", Some("edge-1"), Some("traefik")),
    ("<133>Jan  2 15:04:05 edge-1 traefik[17]: ", Some("edge-1"), Some("traefik")),
    ("<133>1 2026-01-02T15:04:05.123456+00:00 edge-1 traefik - - - ", Some("edge-1"), Some("traefik")),
    ("<133>1 2026-01-02T15:04:05.123456+00:00 edge-1 traefik - - -  ", Some("edge-1"), Some("traefik")),
    // syslog-ng: network(), syslog().
    ("<134>Jan  2 15:04:05 edge-1 traefik: ", Some("edge-1"), Some("traefik")),
    (
        "<134>1 2026-01-02T15:04:05+01:00 edge-1.example.net traefik 7 - [meta sequenceId=\"3\"] \u{feff}",
        Some("edge-1.example.net"),
        Some("traefik"),
    ),
    // Docker's driver: default, rfc3164, rfc5424micro.
    ("<30>Jan  2 15:04:05 f3a1c0de[812]: ", None, Some("f3a1c0de")),
    ("<30>Jan  2 15:04:05 docker-1 shop/traefik[812]: ", Some("docker-1"), Some("shop/traefik")),
    ("<30>1 2026-01-02T15:04:05.123456Z docker-1 traefik 812 traefik - ", Some("docker-1"), Some("traefik")),
    // logger(1): to the local socket, --rfc3164, and what it sends to a server by default.
    ("<13>Jan  2 15:04:05 root: ", None, Some("root")),
    ("<13>Jan  2 15:04:05 edge-1 root: ", Some("edge-1"), Some("root")),
    (
        "<13>1 2026-01-02T15:04:05.123456+00:00 edge-1 root - - [timeQuality tzKnown=\"1\" isSynced=\"0\"] ",
        Some("edge-1"),
        Some("root"),
    ),
    // Docker 26.1 as it was run: default, rfc3164 and rfc5424 with `tag={{.Name}}/{{.ID}}`, rfc5424micro.
    ("<30>Nov 25 17:43:39 traefik-1/b74430d7ce85[1]: ", None, Some("traefik-1/b74430d7ce85")),
    ("<30>Nov 25 17:43:41 vm traefik-5/5c2f7fbccb25[1]: ", Some("vm"), Some("traefik-5/5c2f7fbccb25")),
    (
        "<30>1 2026-11-25T17:43:43Z vm traefik-9/351fc3ed077c 1 traefik-9/351fc3ed077c - ",
        Some("vm"),
        Some("traefik-9/351fc3ed077c"),
    ),
    ("<30>1 2026-11-25T17:43:45.724255Z vm b02c97b51a1c 1 b02c97b51a1c - ", Some("vm"), Some("b02c97b51a1c")),
    // logger of util-linux 2.38.1: --rfc3164 -i, --rfc5424=notime,nohost, --rfc5424=notq.
    ("<13>Nov 25 17:42:28 vm traefik[8786]: ", Some("vm"), Some("traefik")),
    ("<13>1 - - traefik 8810 - - ", None, Some("traefik")),
    ("<13>1 2026-11-25T17:42:28.846229+00:00 vm traefik - - - ", Some("vm"), Some("traefik")),
    // Fluent Bit 5.1.1's `syslog` output.
    ("<14>1 2026-11-25T18:00:19.106258Z - traefik - - - \u{feff}", None, Some("traefik")),
    // Escapes in structured data; several elements; nothing given.
    (r#"<1>1 - - - - - [a@1 x="\"] \\\]" y=""][b z="]"] "#, None, None),
    // Files of syslog daemons, without a priority.
    ("Jan 12 15:04:05 edge-1 traefik[17]: ", Some("edge-1"), Some("traefik")),
    ("2026-01-02T15:04:05+00:00 edge-1 traefik: ", Some("edge-1"), Some("traefik")),
    // Words that are missing.
    ("<13>", None, None),
    ("<13>traefik: ", None, Some("traefik")),
    ("<13>Jan  2 15:04:05 ", None, None),
    ("<13>Jan  2 15:04:05.123 2001:db8::7 ", Some("2001:db8::7"), None),
    ("", None, None),
];

#[test]
fn headers_as_they_are_written() {
    for (header, hostname, app) in HEADERS {
        for payload in [JSON, CLF, CLF6, CRI] {
            let message = format!("{header}{payload}");
            let expected = Message { hostname, app, payload: payload.as_bytes() };
            assert_eq!(parse_message(message.as_bytes()), expected, "{message}");
        }
    }
}

#[test]
fn a_cookie_is_no_part_of_the_line() {
    for header in ["<133>Jan  2 15:04:05 edge-1 traefik: @cee:", "<133>Jan  2 15:04:05 edge-1 traefik @cee: ", "@cee:"]
    {
        assert_eq!(parse_message(format!("{header}{JSON}").as_bytes()).payload, JSON.as_bytes(), "{header}");
    }
}

#[test]
fn what_has_no_header_is_all_payload() {
    for text in [
        "",
        "<",
        "<192>1 - - - - - - a",
        "<13",
        "Jan",
        "Foo  2 15:04:05 host a: b",
        "no header at all",
        r#"{"a":1}"#,
        "<x>1 - - - - - -",
        "123",
    ] {
        let expected = Message { payload: text.as_bytes(), ..Message::default() };
        assert_eq!(parse_message(text.as_bytes()), expected, "{text:?}");
    }
}

#[test]
fn a_broken_new_header_is_read_as_an_old_one() {
    let text = b"<13>1 2026-01-02T15:04:05Z host app - - [a b] x";
    assert_eq!(parse_message(text), Message { payload: &text[4..], ..Message::default() });
}

#[test]
fn a_message_may_be_empty() {
    let message = parse_message(b"<13>1 - edge-1 - - - -");
    assert_eq!(message, Message { hostname: Some("edge-1"), app: None, payload: b"" });
}

proptest! {
    #[test]
    fn any_bytes_are_borrowed_and_never_panic(text in proptest::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(text.ends_with(parse_message(&text).payload));
    }

    #[test]
    fn pieces_of_headers_never_panic(text in "(<[0-9]{1,3}>|1 |- |[a-z]+\\[?|\\]?: |Jan  2 15:04:05 |\\[a b=\"\\\\?\"\\]|\\{| ){0,12}") {
        prop_assert!(text.as_bytes().ends_with(parse_message(text.as_bytes()).payload));
    }

    #[test]
    fn what_follows_a_whole_header_is_untouched(
        header in proptest::sample::select(HEADERS.map(|(header, ..)| header).to_vec()),
        payload in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        // A header without its last words leaves it to the line to show where it begins.
        let is_whole = header.starts_with("<1>1") || header.contains(" - ") || header.ends_with(": ");
        let begins = if is_whole { &b"="[..] } else { b"{" };
        let payload = [begins, &payload].concat();
        let message = [header.as_bytes(), &payload].concat();
        prop_assert_eq!(parse_message(&message).payload, &payload[..]);
    }
}
