mod envelopes;
mod properties;

use std::net::IpAddr;

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
fn samples_are_escaped_and_cut() {
    assert_eq!(escape_sample(b"a\x1b[31m\"\n"), "a\\u{1b}[31m\"\\n");
    assert_eq!(escape_sample(&[b'x'; 1000]).len(), 200);
    assert!(escape_sample("é".repeat(1000).as_bytes()).chars().count() == 200);
    assert!(escape_sample(&[0x1b; 1000]).chars().count() <= 200);
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
