use std::net::IpAddr;

use proptest::prelude::*;
use proto::client_ip::{CdnHeader, Client, NoClient};
use proto::net::NetSet;
use proto::time::Timestamp;

use super::*;

const JSON: &str = include_str!("../../testdata/traefik.json.log");
const CLF: &str = include_str!("../../testdata/traefik.clf.log");
/// The same line as it is, and in what each shipper puts around it by its documentation.
const ENVELOPES: &str = include_str!("../../testdata/envelopes.log");

fn parser(interest: &[&str]) -> Parser {
    let headers = interest.iter().map(ToString::to_string).collect();
    let interest = Interest { headers, ..Interest::default() };
    Parser::new(Format::Auto, 4096, policy(), Arc::new(interest))
}

fn policy() -> Arc<ClientIpPolicy> {
    let cdn = NetSet::new(["203.0.113.0/24".parse().unwrap()]);
    Arc::new(ClientIpPolicy {
        trusted_proxies: NetSet::new(["10.0.0.0/8".parse().unwrap(), "203.0.113.0/24".parse().unwrap()]),
        cdn_headers: vec![CdnHeader { from: cdn, header: "Cf-Connecting-Ip".to_owned() }],
        clf_behind_proxy: false,
    })
}

/// Outcome and rendering of one line.
fn show(parser: &mut Parser, line: &str) -> Outcome<String> {
    parser.with_event(line.as_bytes(), 7, render)
}

fn render(event: &Event<'_>) -> String {
    let Text { method, path, query, host, protocol, user_agent, router, service, entry_point, username } = event.text;
    let time = event.time.map_or("-".to_owned(), |time| time.to_string());
    let client = match event.client {
        Ok(client) => client.addr.to_string(),
        Err(reason) => format!("({})", reason.as_str()),
    };
    let (status, origin) = (event.status, event.origin_status);
    format!(
        "{time} {client} {status}/{origin} {method} {host} {path}?{query} {protocol} [{user_agent}] [{router}] {service} \
         {entry_point} {username}"
    )
}

fn event(text: &str) -> Outcome<String> {
    Outcome::Event(text.to_owned())
}

fn client(parser: &mut Parser, line: &str) -> Result<Client, NoClient> {
    match parser.with_event(line.as_bytes(), 0, |event| event.client) {
        Outcome::Event(client) => client,
        other => panic!("{other:?}: {line}"),
    }
}

fn addr(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn every_json_sample_has_its_fields() {
    let mut parser = parser(&[]);
    let shown: Vec<Outcome<String>> = JSON.lines().map(|line| show(&mut parser, line)).collect();
    assert_eq!(
        shown,
        [
            event(
                "2021-12-08T14:02:43.587Z 172.17.0.1 200/200 GET test.docker.localhost /594VAEoi.save? HTTP/1.1 [Nikto] \
                 [test@docker] test@docker http -"
            ),
            event(
                "2021-12-08T14:02:43.589Z 172.17.0.1 200/200 GET test.docker.localhost /594VAEoi.local? HTTP/1.1 [Nikto] \
                 [test@docker] test@docker http -"
            ),
            event(
                "2026-01-08T14:19:15.980Z 192.168.65.1 200/200 GET whoami.localhost /? HTTP/1.1 [-] [root@file -> \
                 intermediate1@file -> intermediate2@file -> leaf@file] whoami@file web -"
            ),
            event(
                "2026-01-08T14:20:00.000Z 192.168.65.1 200/200 POST api.localhost /api/data? HTTP/1.1 [-] [parent@file \
                 -> child@file] api@file web -"
            ),
            event("2026-01-14T09:45:33.759Z 192.168.1.115 404/0 GET admin.mydomain.com /? HTTP/2.0 [-] [-] - https -"),
            Outcome::Unparsed(Refusal::NotClf),
            event(
                "2025-11-28T09:21:55.645Z 172.71.122.85 204/0 OPTIONS example.com /_matrix/client/v3/sync? HTTP/2.0 [-] \
                 [matrix-synapse-public-client-api@docker] matrix-synapse-client-api@docker web-secure -"
            ),
        ]
    );
    assert_eq!(parser.seen_format(), Some(SeenFormat::Json));
    // The last one came through Cloudflare with a chain: with its ranges trusted the chain counts.
    let nets = proto::net::NamedSet::Cloudflare.nets();
    let policy = ClientIpPolicy { trusted_proxies: NetSet::new(nets), ..ClientIpPolicy::default() };
    parser.set_rules(Arc::new(policy), Arc::default());
    let last = JSON.lines().next_back().unwrap();
    assert_eq!(client(&mut parser, last), Ok(Client { addr: addr("10.0.0.50"), via_proxy: true }));
}

#[test]
fn every_clf_sample_has_its_fields() {
    let mut parser = parser(&[]);
    let shown: Vec<Outcome<String>> = CLF.lines().map(|line| show(&mut parser, line)).collect();
    assert_eq!(
        shown,
        [
            event(
                "2021-12-08T09:16:05.000Z 172.17.0.1 200/0 GET - /scripts/cpshost.dll? HTTP/1.1 [-] [test@docker] - - -"
            ),
            event(
                "2021-12-08T09:16:05.000Z 172.17.0.1 200/0 GET - /upload.asp?test=toto&tata=test HTTP/1.1 [-] \
                 [test@docker] - - -"
            ),
            event("2021-12-08T13:59:39.000Z 172.17.0.1 200/0 GET - /cgi.cgi/? HTTP/1.1 [Nikto] [test@docker] - - -"),
            event(
                "2021-12-08T13:59:39.000Z 172.17.0.1 200/0 GET - /index?toto=tata HTTP/1.1 [Nikto] [test@docker] - - -"
            ),
            event(
                "2022-09-28T13:38:04.000Z 172.17.1.1 0/0 GET - /mobileadmin/home.cs? HTTP/1.1 [Mozilla/5.00 (Nikto/2.1.5) \
                 (Evasions:None) (Test:006607)] [-] - - -"
            ),
            event(
                "2024-11-24T13:38:04.000Z 172.17.1.2 200/0 GET - /birthday? HTTP/2 [Nikto] [test@docker -> leaf@docker] - - -"
            ),
            event(
                "2024-11-24T13:40:15.000Z 172.17.1.3 200/0 GET - /api/users? HTTP/1.1 [curl/7.68.0] [root@docker -> \
                 intermediate1@docker -> intermediate2@docker -> leaf@docker] - - -"
            ),
            Outcome::Blank,
            Outcome::Blank,
        ]
    );
    assert_eq!(parser.seen_format(), Some(SeenFormat::Clf));
}

#[test]
fn keys_in_any_order_with_escapes_and_strange_values() {
    let mut parser = parser(&[]);
    let line = r#"{"new":{"a":[1,{"b":null}]},"time":"2026-01-14T10:45:33+01:00","RequestPath":"/a\u0026b?x=\"1\"&?",
        "DownstreamStatus":"404","OriginStatus":-1,"RequestAddr":"[2001:db8::1]:8443","ClientAddr":"[2001:db8::7]:5",
        "RequestMethod":7,"RequestProtocol":null,"ClientUsername":"REDACTED","Client\u0048ost":"x","RouterName":[]}"#
        .replace('\n', " ");
    assert_eq!(
        show(&mut parser, &line),
        event(r#"2026-01-14T09:45:33.000Z 2001:db8::7 404/0 - 2001:db8::1 /a&b?x="1"&? - [-] [-] - - -"#)
    );
    for status in ["65536", "99999999999999999999999", "-404", "404.5", "true", "\"x\"", "{}", "1000"] {
        let line = format!(r#"{{"ClientAddr":"192.0.2.1:1","DownstreamStatus":{status}}}"#);
        let status = parser.with_event(line.as_bytes(), 0, |event| event.status);
        assert_eq!(status, Outcome::Event(0), "{line}");
    }
}

#[test]
fn start_utc_before_start_local_before_time() {
    let mut parser = parser(&[]);
    let time = |parser: &mut Parser, keys: &str| {
        let line = format!(r#"{{"ClientAddr":"192.0.2.1:1",{keys}}}"#);
        parser.with_event(line.as_bytes(), 0, |event| event.time.map(Timestamp::as_millis))
    };
    let (utc, local, written) = (
        r#""StartUTC":"1970-01-01T00:00:01Z""#,
        r#""StartLocal":"1970-01-01T01:00:02+01:00""#,
        r#""time":"1970-01-01T00:00:03Z""#,
    );
    assert_eq!(time(&mut parser, &format!("{written},{local},{utc}")), Outcome::Event(Some(1000)));
    assert_eq!(time(&mut parser, &format!("{written},{local}")), Outcome::Event(Some(2000)));
    assert_eq!(time(&mut parser, written), Outcome::Event(Some(3000)));
    assert_eq!(time(&mut parser, r#""time":"yesterday""#), Outcome::Event(None));
    // What is no moment gives way to one that is.
    assert_eq!(time(&mut parser, &format!(r#""StartUTC":"-","StartLocal":7,{written}"#)), Outcome::Event(Some(3000)));
    // As Traefik has them in attributes of OTLP: whole nanoseconds, and nothing shorter is taken for such.
    let nanos = r#""StartUTC":1795630366567965400"#;
    assert_eq!(time(&mut parser, &format!("{written},{nanos}")), Outcome::Event(Some(1_795_630_366_567)));
    for number in
        ["1795630366", "1795630366567", "1795630366567965", "18446744073709551615", "-1795630366567965400", "1.5"]
    {
        assert_eq!(time(&mut parser, &format!(r#""time":{number}"#)), Outcome::Event(None), "{number}");
    }
}

/// Traefik 3.7 wrote these under TZ=Asia/Kolkata: each of its times has an offset.
#[test]
fn traefik_writes_no_time_without_an_offset() {
    let times = [
        r#""StartUTC":"2026-11-25T18:13:39.865950015Z""#,
        r#""StartLocal":"2026-11-25T23:43:39.865950015+05:30""#,
        r#""time":"2026-11-25T23:43:39+05:30""#,
    ];
    let mut parser = parser(&[]);
    for key in times {
        let line = format!(r#"{{"ClientAddr":"127.0.0.1:60116","DownstreamStatus":404,{key}}}"#);
        let time = parser.with_event(line.as_bytes(), 0, |event| event.time.map(|time| time.as_millis() / 1000));
        assert_eq!(time, Outcome::Event(Some(1_795_630_419)), "{key}");
    }
    let clf = r#"127.0.0.1 - - [25/Nov/2026:18:13:40 +0000] "GET /x HTTP/1.1" 404 19 "-" "-" 1 "-" "-" 0ms"#;
    let time = parser.with_event(clf.as_bytes(), 0, |event| event.time.map(Timestamp::as_millis));
    assert_eq!(time, Outcome::Event(Some(1_795_630_420_000)));
}

#[test]
fn no_time_zone_is_guessed() {
    let mut parser = parser(&[]);
    for key in ["StartUTC", "StartLocal", "time"] {
        for text in ["2026-01-14T10:45:33", "2026-01-14 10:45:33.5", "2026-01-14T10:45:33 CET", "14/Jan/2026:10:45:33"]
        {
            let line = format!(r#"{{"ClientAddr":"192.0.2.1:1","{key}":"{text}"}}"#);
            assert_eq!(parser.with_event(line.as_bytes(), 0, |event| event.time), Outcome::Event(None), "{line}");
            assert_eq!(parser.written_at(), None);
        }
    }
    let clf = r#"192.0.2.1 - - [08/Dec/2021:09:16:05] "GET / HTTP/1.1" 404 0 "-" "-""#;
    assert_eq!(show(&mut parser, clf), Outcome::Unparsed(Refusal::NotClf));
}

#[test]
fn lines_are_written_when_their_requests_end() {
    let mut parser = parser(&[]);
    for line in [
        r#"{"ClientAddr":"192.0.2.1:1","StartUTC":"2021-12-08T09:16:05Z","Duration":2500000000}"#,
        r#"192.0.2.1 - - [08/Dec/2021:09:16:05 +0000] "GET / HTTP/1.1" 404 0 "-" "-" 7 "r@file" "http://x" 2500ms"#,
    ] {
        assert!(matches!(show(&mut parser, line), Outcome::Event(_)), "{line}");
        assert_eq!(parser.written_at(), Some(Timestamp::from_millis(1_638_954_967_500)), "{line}");
    }
    for duration in ["-1", "1.5", "\"7\"", "{}", "null"] {
        let line = format!(r#"{{"ClientAddr":"192.0.2.1:1","StartUTC":"1970-01-01T00:00:01Z","Duration":{duration}}}"#);
        let _ = show(&mut parser, &line);
        assert_eq!(parser.written_at(), Some(Timestamp::from_secs(1)), "{line}");
    }
}

#[test]
fn hosts_lose_their_port() {
    for (host, expected) in [
        ("example.net", "example.net"),
        ("example.net:8443", "example.net"),
        ("[2001:db8::1]:443", "2001:db8::1"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("2001:db8::1", "2001:db8::1"),
        (":80", "-"),
        ("[", "["),
    ] {
        assert_eq!(without_port(host), expected);
    }
}

#[test]
fn other_lines_are_refused_with_a_reason() {
    let mut parser = parser(&[]);
    for (line, refusal) in [
        (
            r#"{"level":"info","msg":"Starting provider","entryPointName":"web","time":"2026-01-01T00:00:00Z"}"#,
            Refusal::NotAccess,
        ),
        ("{}", Refusal::NotAccess),
        (r#"{"ClientAddr":"192.0.2.1:1"} x"#, Refusal::NotJson),
        (r#"{"ClientAddr":"192.0.2.1:1""#, Refusal::NotJson),
        ("time=\"2026-01-01\" level=info", Refusal::NotClf),
        (r#"{"log":"x"#, Refusal::BrokenEnvelope),
    ] {
        assert_eq!(show(&mut parser, line), Outcome::Unparsed(refusal), "{line}");
    }
    let invalid = b"{\"ClientAddr\":\"192.0.2.1:1\",\"RequestPath\":\"/\xff\"}";
    assert_eq!(parser.with_event(invalid, 0, render), Outcome::Unparsed(Refusal::NotJson));
    for blank in ["", " \t", "\r"] {
        assert_eq!(show(&mut parser, blank), Outcome::Blank);
    }
}

#[test]
fn a_clf_line_does_not_escape_by_not_being_utf8() {
    let line = b"192.0.2.1 - - [08/Dec/2021:09:16:05 +0000] \"GET /\xff HTTP/1.1\" 404 0 \"-\" \"\xfe\"";
    let path = parser(&[]).with_event(line, 0, |event| event.text.path.to_owned());
    assert_eq!(path, Outcome::Event("/\u{fffd}".to_owned()));
}

#[test]
fn the_format_can_be_fixed() {
    let mut json = Parser::new(Format::Json, 4096, policy(), Arc::default());
    let clf_line = CLF.lines().next().unwrap();
    assert_eq!(show(&mut json, clf_line), Outcome::Unparsed(Refusal::NotJson));
    let mut clf = Parser::new(Format::Clf, 4096, policy(), Arc::default());
    assert_eq!(show(&mut clf, JSON.lines().next().unwrap()), Outcome::Unparsed(Refusal::NotClf));
}

#[test]
fn a_forged_chain_from_an_untrusted_peer_changes_nothing() {
    let line = r#"{"ClientAddr":"192.0.2.1:1","ClientHost":"198.51.100.9","request_X-Forwarded-For":"198.51.100.8",
        "request_Cf-Connecting-Ip":"198.51.100.7","DownstreamStatus":404}"#
        .replace('\n', "");
    assert_eq!(client(&mut parser(&[]), &line), Ok(Client { addr: addr("192.0.2.1"), via_proxy: false }));
}

#[test]
fn chains_of_trusted_peers() {
    let mut parser = parser(&[]);
    let mut chain = |fields: &str| client(&mut parser, &format!(r#"{{"ClientAddr":"10.0.0.1:1",{fields}}}"#));
    let found = |text: &str| Ok(Client { addr: addr(text), via_proxy: true });
    assert_eq!(chain(r#""ClientHost":"198.51.100.9, 192.0.2.5, 10.0.0.2""#), found("192.0.2.5"));
    // Only the first of two header lines is in ClientHost; the header, where it is logged, has both.
    assert_eq!(
        chain(r#""ClientHost":"198.51.100.9","request_X-Forwarded-For":"198.51.100.9,192.0.2.5""#),
        found("192.0.2.5")
    );
    assert_eq!(chain(r#""ClientHost":"192.0.2.5","request_X-Forwarded-For":"REDACTED""#), found("192.0.2.5"));
    assert_eq!(chain(r#""ClientHost":"::ffff:192.0.2.5""#), found("192.0.2.5"));
    assert_eq!(chain(r#""ClientHost":"fe80::1%eth0""#), found("fe80::1"));
    assert_eq!(chain(r#""ClientHost":"victim.example.net""#), Err(NoClient::NotAnAddress));
    assert_eq!(chain(r#""ClientHost":"10.0.0.1""#), Err(NoClient::OnlyProxies));
    assert_eq!(chain(r#""ClientHost":"-""#), Err(NoClient::OnlyProxies));
}

#[test]
fn a_cdn_header_counts_only_from_that_cdn() {
    let mut parser = parser(&[]);
    let mut from = |peer: &str| {
        let line = format!(
            r#"{{"ClientAddr":"{peer}:1","ClientHost":"192.0.2.5","request_Cf-Connecting-Ip":"198.51.100.7"}}"#
        );
        client(&mut parser, &line).map(|client| client.addr)
    };
    assert_eq!(from("203.0.113.1"), Ok(addr("198.51.100.7")));
    assert_eq!(from("10.0.0.1"), Ok(addr("192.0.2.5")));
    assert_eq!(from("192.0.2.1"), Ok(addr("192.0.2.1")));
}

#[test]
fn only_headers_of_interest_are_kept() {
    let line =
        r#"{"ClientAddr":"192.0.2.1:1","request_User-Agent":"curl","request_Referer":"http://a","request_Cookie":"s",
        "request_Cf-Connecting-Ip":"198.51.100.7","request_X-Api-Key":"REDACTED","origin_Referer":"x"}"#
            .replace('\n', "");
    let headers = |parser: &mut Parser, line: &str| {
        parser.with_event(line.as_bytes(), 0, |event| {
            let text = event.headers.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>();
            (text.join(" "), event.text.user_agent.to_owned())
        })
    };
    let mut parser = parser(&["referer", "user-agent", "x-api-key"]);
    let expected = ("User-Agent=curl Referer=http://a".to_owned(), "curl".to_owned());
    assert_eq!(headers(&mut parser, &line), Outcome::Event(expected.clone()));
    assert_eq!(headers(&mut parser, &line), Outcome::Event(expected), "the buffers are used again");
    let clf = r#"192.0.2.1 - - [08/Dec/2021:09:16:05 +0000] "GET / HTTP/1.1" 404 0 "http://a" "curl""#;
    assert_eq!(
        headers(&mut parser, clf),
        Outcome::Event(("Referer=http://a User-Agent=curl".to_owned(), "curl".to_owned()))
    );
    parser.set_rules(policy(), Arc::default());
    assert_eq!(headers(&mut parser, &line), Outcome::Event((String::new(), "curl".to_owned())));
}

#[test]
fn envelopes_are_opened_and_pieces_joined_for_each_stream() {
    let line = JSON.lines().next().unwrap();
    let expected = show(&mut parser(&[]), line);
    let mut parser = parser(&[]);
    let docker = |text: &str, stream: &str| serde_json::json!({"log": text, "stream": stream, "time": "x"}).to_string();
    assert_eq!(show(&mut parser, &docker(&format!("{line}\n"), "stdout")), expected);
    assert_eq!(show(&mut parser, &format!("2026-01-01T00:00:00Z stdout F {line}")), expected);
    let (head, tail) = line.split_at(300);
    let piece = |stream: &str, tag: &str, text: &str| format!("2026-01-01T00:00:00Z {stream} {tag} {text}");
    assert_eq!(show(&mut parser, &piece("stdout", "P", head)), Outcome::Partial);
    assert!(parser.is_joining());
    assert_eq!(show(&mut parser, &piece("stderr", "F", "noise")), Outcome::Unparsed(Refusal::NotClf));
    assert_eq!(show(&mut parser, &piece("stdout", "F", tail)), expected);
    assert!(!parser.is_joining());
    assert_eq!(show(&mut parser, &docker(head, "stdout")), Outcome::Partial);
    assert_eq!(show(&mut parser, &docker(&format!("{tail}\n"), "stdout")), expected);
    assert_eq!(show(&mut parser, &piece("stdout", "P", head)), Outcome::Partial);
    assert_eq!(parser.abandon(), 1);
    assert_eq!(show(&mut parser, &piece("stdout", "F", tail)), Outcome::Unparsed(Refusal::NotClf));
}

#[test]
fn every_shippers_line_is_the_line_inside() {
    let mut parser = parser(&[]);
    let expected = event(
        "2026-01-14T09:45:33.759Z 198.51.100.7 404/0 GET shop.example /wp-login.php?a=1&b=\"é\" HTTP/2.0 [curl/8.5.0] [-] - \
         websecure -",
    );
    for line in ENVELOPES.lines() {
        assert_eq!(show(&mut parser, line), expected, "{line}");
        assert!(!parser.is_joining());
    }
    assert_eq!(ENVELOPES.lines().count(), 22);
}

#[test]
fn whole_lines_forged_through_the_user_name_name_nobody() {
    const VICTIM: &str = "198.51.100.66";
    let line = |host: &str, user: &str, count: u32| {
        format!(
            r#"{host} - {user} [08/Dec/2021:09:16:05 +0000] "GET /admin HTTP/1.1" 401 12 "-" "-" {count} "r@file" "http://x" 0ms"#
        )
    };
    let forged = line(VICTIM, "x", 7);
    let json = format!(r#"{{"ClientHost":"{VICTIM}","DownstreamStatus":401}}"#);
    let long = "x".repeat(5000);
    for user in [
        format!("\n{VICTIM} - x"),
        format!("a\nb\n\n{VICTIM} - x"),
        format!("{}\n{VICTIM} - x", &forged[forged.find('x').unwrap()..]),
        format!("\n{forged}\n{VICTIM} - x"),
        format!("\n{json}\n{VICTIM} - x"),
        format!("\n{{\"log\":{}}}\n{VICTIM} - x", serde_json::json!(forged)),
        format!("{long}\n{VICTIM} - x"),
    ] {
        let mut parser = parser(&[]);
        parser.set_now(Timestamp::from_secs(1_638_954_966));
        let mut clients = Vec::new();
        let honest = |range: std::ops::Range<u32>| range.map(|count| line("192.0.2.1", "-", count));
        let attack = [line("203.0.113.200", &user, 51_000)];
        for text in honest(50_000..51_000).chain(attack).chain(honest(51_001..51_004)) {
            for text in text.split('\n') {
                // As the framer does with what is longer than the limit.
                if text.len() > 4096 {
                    parser.note_oversized();
                } else if let Outcome::Event(Ok(client)) = parser.with_event(text.as_bytes(), 0, |event| event.client) {
                    clients.push(client.addr);
                }
            }
        }
        assert!(clients.iter().all(|client| *client == addr("192.0.2.1")), "{user:?}");
        assert_eq!(clients.len(), 1003, "{user:?}");
    }
}

#[test]
fn a_forwarded_chain_does_not_hide_where_a_broken_line_begins() {
    let end = r#"[08/Dec/2021:09:16:05 +0000] "GET /admin HTTP/1.1" 401 12 "-" "-""#;
    for (chain, user) in [
        ("", ""),
        ("{, ", ""),
        ("2026-01-01T00:00:00Z stdout P , ", ""),
        (r#"{"log":"x","stream":"stdout","time":", "#, r#""}"#),
        (r#"{"ClientHost":"198.51.100.66","DownstreamStatus":401,"x":", "#, r#""}"#),
        ("10.0.0.1:5, [2001:db8::1]:443, ", ""),
        ("a - b, ", ""),
    ] {
        let policy = Arc::new(ClientIpPolicy { clf_behind_proxy: true, ..(*policy()).clone() });
        let mut parser = Parser::new(Format::Auto, 4096, policy, Arc::default());
        parser.set_now(Timestamp::from_secs(1_638_954_966));
        let mut client =
            |line: String| parser.with_event(line.as_bytes(), 0, |event| event.client.map(|found| found.addr));
        let known = |count: u32| format!(r#"192.0.2.1 - - {end} {count} "r@file" "-" 0ms"#);
        assert_eq!(client(known(50_000)), Outcome::Event(Ok(addr("192.0.2.1"))));
        assert!(!matches!(client(format!("{chain}203.0.113.9 - {user}")), Outcome::Event(_)), "{chain}");
        let forged = client(format!(r#"198.51.100.66 - x {end} 50001 "r@file" "-" 0ms"#));
        assert_eq!(forged, Outcome::Suspect(Suspicion::AfterBroken), "{chain}");
        assert_eq!(client(known(50_002)), Outcome::Event(Ok(addr("192.0.2.1"))), "{chain}");
    }
}

#[test]
fn lines_of_the_common_log_format_are_found_inside_too() {
    let line = CLF.lines().next().unwrap();
    let vector = serde_json::json!({"file": "access.log", "message": line}).to_string();
    let docker =
        |text: &str| serde_json::json!({"log": format!("{text}\n"), "stream": "stdout", "time": "x"}).to_string();
    let expected = show(&mut parser(&[]), line);
    assert!(matches!(expected, Outcome::Event(_)));
    for format in [Format::Auto, Format::Clf] {
        for text in [&vector, &docker(line), &docker(&vector)] {
            let mut parser = Parser::new(format, 4096, policy(), Arc::default());
            assert_eq!(show(&mut parser, text), expected, "{text}");
        }
    }
    let mut json = Parser::new(Format::Json, 4096, policy(), Arc::default());
    assert_eq!(show(&mut json, &vector), Outcome::Unparsed(Refusal::NotJson));
}

#[test]
fn a_third_envelope_is_not_opened() {
    let within = |text: &str| serde_json::json!({"host": "edge-1", "message": text}).to_string();
    let access = JSON.lines().next().unwrap();
    let mut parser = parser(&[]);
    let mut line = access.to_owned();
    for level in 0..5 {
        let outcome = show(&mut parser, &line);
        match level {
            0..=2 => assert!(matches!(outcome, Outcome::Event(_)), "{level}"),
            _ => assert_eq!(outcome, Outcome::Unparsed(Refusal::NotAccess), "{level}"),
        }
        line = within(&line);
    }
    let third = format!("2026-01-01T00:00:00Z stdout F {}", within(&within(access)));
    assert_eq!(show(&mut parser, &third), Outcome::Unparsed(Refusal::NotAccess));
}

#[test]
fn what_is_in_no_known_envelope_is_refused() {
    let mut parser = parser(&[]);
    for (line, refusal) in [
        (r#"{"text":"x","host":"edge-1"}"#, Refusal::NotAccess),
        (r#"{"message":"Starting provider","level":"info"}"#, Refusal::NotClf),
        (r#"{"message":{"level":"info"}}"#, Refusal::NotAccess),
        (r#"{"message":null}"#, Refusal::NotAccess),
        (r#"{"message":"{\"ClientAddr\":"}"#, Refusal::NotJson),
        (r#"{"message":17}"#, Refusal::BrokenEnvelope),
    ] {
        assert_eq!(show(&mut parser, line), Outcome::Unparsed(refusal), "{line}");
    }
    assert_eq!(show(&mut parser, r#"{"message":""}"#), Outcome::Blank);
}

#[test]
fn pieces_of_docker_are_joined_inside_a_shippers_envelope() {
    let line = JSON.lines().next().unwrap();
    let expected = show(&mut parser(&[]), line);
    let mut parser = parser(&[]);
    let (head, tail) = line.split_at(300);
    let docker = |text: &str| serde_json::json!({"log": text, "stream": "stdout", "time": "x"}).to_string();
    let shipped = |text: &str| serde_json::json!({"date": 1.5, "log": docker(text)}).to_string();
    assert_eq!(show(&mut parser, &shipped(head)), Outcome::Partial);
    assert_eq!(show(&mut parser, &shipped(&format!("{tail}\n"))), expected);
}

#[test]
fn pieces_are_bounded_together() {
    let mut parser = Parser::new(Format::Auto, 100, policy(), Arc::default());
    let piece = |tag: &str, length: usize| format!("2026-01-01T00:00:00Z stdout {tag} {}", "x".repeat(length));
    assert_eq!(show(&mut parser, &piece("P", 60)), Outcome::Partial);
    assert_eq!(show(&mut parser, &piece("P", 60)), Outcome::Partial);
    assert!(parser.pieces[0].bytes.is_empty());
    assert_eq!(show(&mut parser, &piece("F", 1)), Outcome::Unparsed(Refusal::PiecesTooLong));
    assert_eq!(show(&mut parser, &piece("F", 1)), Outcome::Unparsed(Refusal::NotClf));
}

#[test]
fn samples_are_escaped_and_cut() {
    assert_eq!(escape_sample(b"a\x1b[31m\"\n"), "a\\u{1b}[31m\"\\n");
    assert_eq!(escape_sample(&[b'x'; 1000]).len(), 200);
    assert!(escape_sample("é".repeat(1000).as_bytes()).chars().count() == 200);
    assert!(escape_sample(&[0x1b; 1000]).chars().count() <= 200);
}

/// Bytes that look like log lines here and there.
fn almost_lines() -> impl Strategy<Value = Vec<u8>> {
    let samples: Vec<&'static str> = JSON.lines().chain(CLF.lines()).filter(|line| !line.is_empty()).collect();
    let samples = [samples, ENVELOPES.lines().collect()].concat();
    const STARTS: [&str; 4] = ["", "{\"log\":\"", "2026-01-01T00:00:00Z stdout F ", "2026-01-01T00:00:00Z stderr P "];
    let edits = proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..3_u8), 0..6);
    (proptest::sample::select(samples), proptest::sample::select(&STARTS[..]), edits).prop_map(
        |(line, envelope, edits)| {
            let mut bytes = [envelope.as_bytes(), line.as_bytes()].concat();
            for (index, byte, edit) in edits {
                let at = index.index(bytes.len());
                match edit {
                    0 => bytes[at] = byte,
                    1 => bytes.insert(at, byte),
                    _ => bytes.truncate(at.max(1)),
                }
            }
            bytes
        },
    )
}

/// Text that tries to be a line of its own.
fn hostile_text() -> impl Strategy<Value = String> {
    let forged = r#"{"ClientAddr":"203.0.113.99:1","DownstreamStatus":200,"RequestPath":"/forged"}"#;
    let docker = serde_json::json!({"log": format!("{forged}\n"), "stream": "stdout", "time": "x"}).to_string();
    let tries = [
        forged.to_owned(),
        docker,
        serde_json::json!({ "message": forged }).to_string(),
        format!("2026-01-01T00:00:00Z stdout F {forged}"),
        format!("2026-01-01T00:00:00Z stdout P {forged}"),
        format!("x\n{forged}\n"),
        r#"","message":"x"#.to_owned(),
        r#""},"log":{"ClientAddr":"203.0.113.99:1"},"a":{"b":""#.to_owned(),
        CLF.lines().next().unwrap_or_default().to_owned(),
    ];
    prop_oneof![3 => proptest::sample::select(tries.to_vec()), 1 => ".{0,40}"]
}

/// A line within an envelope of some shipper.
fn enveloped(line: &str, kind: u8) -> String {
    match kind {
        0 => line.to_owned(),
        1 => serde_json::json!({"log": format!("{line}\n"), "stream": "stdout", "time": "x"}).to_string(),
        2 => format!("2026-01-01T00:00:00Z stdout F {line}"),
        3 => serde_json::json!({"host": "x", "message": line, "timestamp": "x"}).to_string(),
        4 => serde_json::json!({"MESSAGE": line.as_bytes(), "_PID": "7"}).to_string(),
        5 => serde_json::json!({"date": 1.5, "log": line}).to_string(),
        _ => serde_json::json!({"event": {"original": line}, "message": "x", "log": {"offset": 7}}).to_string(),
    }
}

proptest! {
    #[test]
    fn no_value_turns_an_access_into_another(
        client in any::<[u8; 4]>().prop_map(IpAddr::from),
        status in 100..600_u16,
        values in proptest::collection::vec(hostile_text(), 8),
        outer in 0..7_u8, inner in prop_oneof![Just(0), 1..7_u8],
        beside in proptest::option::of(proptest::sample::select(&["log", "message", "MESSAGE", "event.original", "json"][..])),
        turned in any::<prop::sample::Index>(),
    ) {
        prop_assume!(!policy().is_trusted(client));
        let path = format!("/{}", values[0].replace('?', ""));
        let mut keys = vec![
            ("ClientAddr".to_owned(), serde_json::json!(format!("{client}:1"))),
            ("DownstreamStatus".to_owned(), serde_json::json!(status)),
            ("RequestPath".to_owned(), serde_json::json!(path)),
        ];
        // What a client chooses: values, and names of headers.
        let names = ["ClientUsername", "RequestHost", "RequestMethod", "ClientHost", "request_User-Agent", "request_log",
            "downstream_message"];
        for (name, value) in names.iter().zip(&values[1..]) {
            keys.push(((*name).to_owned(), serde_json::json!(value)));
        }
        keys.push((format!("request_{}", values[7]), serde_json::json!(values[7])));
        let at = turned.index(keys.len());
        keys.rotate_left(at);
        // A shipper that has read the line may leave a text beside it.
        if let Some(holder) = beside {
            keys.insert(if at % 2 == 0 { 0 } else { at }, (holder.to_owned(), serde_json::json!(values[0])));
        }
        let line = keys.iter().map(|(key, value)| format!("{}:{value}", serde_json::json!(key)));
        let line = format!("{{{}}}", line.collect::<Vec<_>>().join(","));
        let enveloped = enveloped(&enveloped(&line, inner), outer);
        let mut parser = Parser::new(Format::Auto, 1 << 16, policy(), Arc::default());
        let seen = parser.with_event(enveloped.as_bytes(), 0, |event| {
            (event.client.map(|client| client.addr), event.status, event.text.path.to_owned())
        });
        prop_assert_eq!(seen, Outcome::Event((Ok(client), status, path)), "{}", enveloped);
    }

    #[test]
    fn no_bytes_panic(line in proptest::collection::vec(any::<u8>(), 0..200)) {
        for format in [Format::Auto, Format::Json, Format::Clf] {
            let _ = Parser::new(format, 64, policy(), Arc::default()).with_event(&line, 0, render);
        }
    }

    #[test]
    fn no_broken_line_panics(lines in proptest::collection::vec(almost_lines(), 1..4)) {
        let mut parser = parser(&["referer"]);
        for line in lines {
            let _ = parser.with_event(&line, 0, render);
            prop_assert!(escape_sample(&line).chars().count() <= 200);
        }
    }

    #[test]
    fn no_header_of_an_untrusted_peer_changes_the_client(
        peer in any::<[u8; 4]>().prop_map(IpAddr::from),
        chain in "[0-9a-f.:, %-]{0,40}",
        cdn in "[0-9a-f.:]{0,20}",
    ) {
        prop_assume!(!policy().is_trusted(peer));
        let line = serde_json::json!({
            "ClientAddr": format!("{peer}:1"), "ClientHost": chain, "request_X-Forwarded-For": chain,
            "request_Cf-Connecting-Ip": cdn,
        });
        prop_assert_eq!(client(&mut parser(&[]), &line.to_string()), Ok(Client { addr: peer, via_proxy: false }));
    }

    #[test]
    fn a_trusted_proxy_is_never_the_client(
        peer in proptest::option::of(prop_oneof![Just("10.1.2.3:4"), Just("203.0.113.5:1"), Just("192.0.2.1:9")]),
        chain in proptest::collection::vec(prop_oneof!["10\\.0\\.0\\.[0-9]", "203\\.0\\.113\\.[0-9]", "192\\.0\\.2\\.[0-9]", "x"], 0..4),
        cdn in prop_oneof!["10\\.0\\.0\\.[0-9]", "192\\.0\\.2\\.[0-9]", "-"],
    ) {
        let line = serde_json::json!({
            "ClientAddr": peer, "ClientHost": chain.join(", "), "request_Cf-Connecting-Ip": cdn, "RequestMethod": "GET",
        });
        if let Ok(client) = client(&mut parser(&[]), &line.to_string()) {
            prop_assert!(!policy().is_trusted(client.addr), "{}", client.addr);
        }
    }

    #[test]
    fn json_and_clf_of_one_request_agree(
        path in "/[!-~&&[^?]]{0,20}", query in "[!-~]{0,10}", user in "[ -~]{1,20}", agent in "[ -~]{1,20}", status in 100..600_u16,
    ) {
        prop_assume!(![&user, &agent].iter().any(|text| is_blank_or_special(text)) && !user.contains(" - "));
        let target = if query.is_empty() { path } else { format!("{path}?{query}") };
        let json = serde_json::json!({
            "ClientHost": "192.0.2.1", "ClientUsername": user, "RequestMethod": "GET", "RequestPath": target,
            "RequestProtocol": "HTTP/1.1", "DownstreamStatus": status, "request_User-Agent": agent,
            "RouterName": "r@file", "StartUTC": "2021-12-08T09:16:05Z",
        });
        let escaped = agent.replace('"', "\\\"");
        let clf = format!(
            "192.0.2.1 - {user} [08/Dec/2021:09:16:05 +0000] \"GET {target} HTTP/1.1\" {status} 7 \"-\" \"{escaped}\" \
             5 \"r@file\" \"http://x\" 3ms"
        );
        let unescaped_ambiguity = agent.contains("\\\"");
        prop_assume!(!unescaped_ambiguity);
        prop_assert_eq!(show(&mut parser(&[]), &json.to_string()), show(&mut parser(&[]), &clf));
    }
}

fn is_blank_or_special(text: &str) -> bool {
    matches!(text, "-" | "REDACTED") || text.trim().is_empty()
}

#[test]
fn a_request_whose_service_was_reset_shows_the_service_and_502() {
    // Traefik 3.7.15, less what is not read.
    let json = r#"{"ClientAddr":"192.0.2.1:59510","ClientHost":"192.0.2.1","DownstreamStatus":502,"OriginStatus":502,"RequestHost":"a","RequestMethod":"GET","RequestPath":"/x","RequestProtocol":"HTTP/1.1","RouterName":"a@file","ServiceName":"s@file","StartUTC":"2026-11-25T19:10:32Z","entryPointName":"web"}"#;
    let common = r#"192.0.2.1 - - [25/Nov/2026:19:10:35 +0000] "GET /x HTTP/1.1" 502 11 "-" "-" 1 "a@file" "http://127.0.0.1:18081" 3ms"#;
    let mut parser = parser(&[]);
    let expected = "2026-11-25T19:10:32.000Z 192.0.2.1 502/502 GET a /x? HTTP/1.1 [-] [a@file] s@file web -";
    assert_eq!(show(&mut parser, json), event(expected));
    let expected = "2026-11-25T19:10:35.000Z 192.0.2.1 502/0 GET - /x? HTTP/1.1 [-] [a@file] - - -";
    assert_eq!(show(&mut parser, common), event(expected));
}
