mod model;

use std::cell::Cell;
use std::net::IpAddr;

use proto::client_ip::{Client, NoClient};
use proto::event::{Event, Headers, Text};

use super::*;

thread_local! {
    static REGEX_RUNS: Cell<usize> = const { Cell::new(0) };
}

pub(super) fn count_regex_run() {
    REGEX_RUNS.set(REGEX_RUNS.get() + 1);
}

const FORCEFUL_BROWSING: &str = r"Status(`401-405`) && !PathRegexp(`\.(png|txt|jpg|ico|js|css|ttf|woff2?)/*$`)";

fn parse(text: &str) -> Matcher {
    Matcher::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn matches(text: &str, event: &Event<'_>) -> bool {
    parse(text).matches(event, "edge-1")
}

fn status(status: u16) -> Event<'static> {
    Event { status, ..Event::default() }
}

fn text(text: Text<'_>) -> Event<'_> {
    Event { text, ..Event::default() }
}

fn path(path: &str) -> Event<'_> {
    text(Text { path, ..Text::default() })
}

fn host(host: &str) -> Event<'_> {
    text(Text { host, ..Text::default() })
}

fn query(query: &str) -> Event<'_> {
    text(Text { query, ..Text::default() })
}

fn router(router: &str) -> Event<'_> {
    text(Text { router, ..Text::default() })
}

fn client(addr: &str) -> Event<'static> {
    let addr: IpAddr = addr.parse().unwrap();
    Event { client: Ok(Client { addr, via_proxy: false }), ..Event::default() }
}

/// Each condition must be true for the first event list and false for the second.
fn check(condition: &str, yes: &[Event<'_>], no: &[Event<'_>]) {
    let matcher = parse(condition);
    for (events, expected) in [(yes, true), (no, false)] {
        for event in events {
            assert_eq!(matcher.matches(event, "edge-1"), expected, "{condition} on {event:?}");
            let negated = parse(&format!("!({condition})"));
            assert_eq!(negated.matches(event, "edge-1"), !expected, "!({condition}) on {event:?}");
        }
    }
}

#[test]
fn white_space_and_both_quotes_are_accepted_anywhere() {
    for condition in [
        "Status(`404`)",
        "\n Status\t(\r\n`404` ,\n\"500-599\" )\n",
        "!!Status(`404`)",
        "! ! ! Status(`200`)",
        "(((Status(`404`))))",
        "Status(`404`)&&!Path(`/`)||Path(`/`)",
        "Status(\"404\") || Path(`/`)",
    ] {
        assert!(matches(condition, &status(404)), "{condition}");
        assert_eq!(parse(condition).source(), condition);
    }
}

#[test]
fn and_binds_tighter_than_or_and_not_tightest() {
    let condition = "Status(`404`) || Status(`500`) && Path(`/a`)";
    assert!(matches(condition, &status(404)));
    assert!(!matches(condition, &status(500)));
    assert!(!matches("(Status(`404`) || Status(`500`)) && Path(`/a`)", &status(404)));
    assert!(matches("!Status(`404`) || Path(`-`)", &status(404)));
    assert!(!matches("!(Status(`404`) || Path(`-`))", &status(200)));
}

#[test]
fn double_quoted_arguments_know_the_escapes_of_go() {
    for (argument, value) in [
        (r#""/a\"b\\c""#, "/a\"b\\c"),
        (r#""/\t\x41\u00e9\U0001F600\101""#, "/\tAé😀A"),
        ("\"/`\"", "/`"),
        (r"`/\d\`", r"/\d\"),
    ] {
        assert!(matches(&format!("Path({argument})"), &path(value)), "{argument}");
    }
}

/// Condition, byte position, message.
const MISTAKES: &[(&str, usize, &str)] = &[
    ("", 0, "expected `!`, `(` or a matcher"),
    ("  ", 2, "expected `!`, `(` or a matcher"),
    ("Status(`404` `405`)", 13, "expected `)` or `,`"),
    ("Status(`404`", 12, "expected `)` or `,`"),
    ("Status(`404`,)", 13, "expected an argument in back-ticks or double quotes"),
    ("Status()", 7, "expected an argument in back-ticks or double quotes"),
    ("Status(404)", 7, "expected an argument in back-ticks or double quotes"),
    ("Status('404')", 7, "expected an argument in back-ticks or double quotes"),
    ("Status", 6, "expected `(`"),
    ("Status(`404`) & Path(`/`)", 14, "expected `&&`, `||` or the end"),
    ("Status(`404`) and Path(`/`)", 14, "expected `&&`, `||` or the end"),
    ("Status(`404`) &&", 16, "expected `!`, `(` or a matcher"),
    ("Status(`404`) || || Path(`/`)", 17, "expected `!`, `(` or a matcher"),
    ("Status(`404`))", 13, "expected `&&`, `||` or the end"),
    ("(Status(`404`)", 14, "expected `&&`, `)` or `||`"),
    ("! ", 2, "expected `(` or a matcher"),
    ("Path(`/é`) Path(`/`)", 12, "expected `&&`, `||` or the end"),
    ("Status(`404", 7, "expected a closing back-tick for the argument"),
    ("Path(\"/a\n\")", 5, "expected a closing double quote on the same line for the argument"),
    ("Stats(`404`)", 0, "expected a known matcher (nearest: `Status`), got `Stats`"),
    ("Path(`/`) && status(`404`)", 13, "expected a known matcher (nearest: `Status`), got `status`"),
    ("HeadersRegexp(`a`, `b`)", 0, "expected a known matcher (nearest: `HeaderRegexp`), got `HeadersRegexp`"),
    ("Frobnicate(`404`)", 0, "expected a known matcher, got `Frobnicate`"),
    ("PathRegexp(`a`, `(b`)", 16, "expected a regular expression (unclosed group)"),
    (
        "ClientIP(`private`, `10.0.0.0/33`)",
        20,
        "expected an address, a CIDR, `cloudflare` or `private`, got `10.0.0.0/33`",
    ),
    ("ClientIP(`-`)", 9, "expected an address, a CIDR, `cloudflare` or `private`, got `-`"),
    (
        "Host(`a.example`, `*.example`)",
        18,
        "expected a host without wildcards (`HostRegexp` takes patterns), got `*.example`",
    ),
    ("Host(`exämple`)", 5, "expected a host in ASCII, got `exämple`"),
    ("Host(``)", 5, "expected a host in ASCII, got ``"),
    ("Path(`/a`, `b`)", 11, "expected a path that begins with `/`, or `-`, got `b`"),
    ("PathPrefix(``)", 11, "expected a path that begins with `/`, or `-`, got ``"),
    ("Header(`X-A`)", 12, "expected `,` and a value after the name in `Header`"),
    ("HeaderRegexp(`X-A:`, `b`)", 13, "expected the name of a header, got `X-A:`"),
    (r#"PathRegexp("\.png")"#, 12, ESCAPE),
    (r#"Path("/\u12")"#, 7, ESCAPE),
    (r#"Path("/\xff")"#, 7, ESCAPE),
    (r#"Path("/\uD800")"#, 7, ESCAPE),
];

const ESCAPE: &str =
    r#"expected an escape such as `\\`, `\"`, `\n`, `\x7f` or `\u00e9` (regular expressions are easier in back-ticks)"#;

#[test]
fn mistakes_are_told_with_their_position_and_what_was_expected() {
    for (condition, position, message) in MISTAKES {
        let error = Matcher::parse(condition).unwrap_err();
        assert_eq!((error.position, error.message.as_str()), (*position, *message), "{condition}");
    }
    for wrong in ["", "40", "4040", "099", "1000", "4xx", "404-", "-404", "599-500", "400-500-600", "+44", " 404", "--"]
    {
        let error = Matcher::parse(&format!("Status(`404`, `{wrong}`)")).unwrap_err();
        assert_eq!(error.position, 14, "{wrong}");
        assert!(error.message.ends_with(&format!("got `{wrong}`")), "{error}");
    }
}

#[test]
fn an_error_points_at_the_place_with_a_caret() {
    let error = Matcher::parse("Status(`404` `405`)").unwrap_err();
    assert_eq!(error.to_string(), "expected `)` or `,` at column 14\n  Status(`404` `405`)\n               ^");
    let error = Matcher::parse("Path(`/é`)\n\t&& Status(`x`) ||\nPath(`/`)").unwrap_err();
    assert_eq!((error.position, error.line, error.column), (23, 2, 12));
    let text = error.to_string();
    assert!(text.contains(", got `x` at line 2, column 12\n   && Status(`x`) ||\n             ^"), "{text}");
}

#[test]
fn a_long_line_is_cut_around_the_mistake() {
    let path = "x".repeat(500);
    let error = Matcher::parse(&format!("Path(`/{path}`) ? Path(`/{path}`)")).unwrap_err().to_string();
    let lines: Vec<&str> = error.lines().collect();
    assert!(lines[1].starts_with("  …x") && lines[1].ends_with("x…") && lines[1].chars().count() < 130, "{error}");
    assert_eq!(lines[1].chars().nth(lines[2].chars().count() - 1), Some('?'), "{error}");
}

#[test]
fn nesting_length_and_regex_size_are_bounded() {
    let nested = |depth: usize| format!("{}Status(`404`){}", "(".repeat(depth), ")".repeat(depth));
    assert!(matches(&nested(NESTING_MAX), &status(404)));
    let error = Matcher::parse(&nested(NESTING_MAX + 1)).unwrap_err();
    assert_eq!((error.position, error.message.as_str()), (64, "expected at most 64 nested parentheses, got one more"));

    let frame = "Path(`/`)".len();
    let long = |bytes: usize| format!("Path(`/{}`)", "a".repeat(bytes - frame));
    assert!(Matcher::parse(&long(EXPRESSION_BYTES_MAX)).is_ok());
    assert_eq!(Matcher::parse(&long(EXPRESSION_BYTES_MAX + 1)).unwrap_err().position, EXPRESSION_BYTES_MAX);
    // Only parentheses take stack, so only they are bounded by depth.
    assert!(matches(&format!("{}Status(`404`)", "!".repeat(60_000)), &status(404)));

    let error = Matcher::parse(r"PathRegexp(`a`, `\w{1000}`)").unwrap_err();
    let message = "expected regular expressions that compile to at most 4194304 bytes, got larger ones";
    assert_eq!((error.position, error.message.as_str()), (16, message));
    let many = [r"`\w{50}`"; 4].join(", ");
    let error = Matcher::parse(&format!("PathRegexp({many})")).unwrap_err();
    assert_eq!((error.position, error.message.as_str()), (11, message));
}

#[test]
fn every_matcher_is_known_by_its_name() {
    for name in leaf::names() {
        let arguments = match name {
            "Status" | "OriginStatus" => "`404`",
            "ClientIP" => "`cloudflare`",
            _ => "`-`, `-`",
        };
        parse(&format!("{name}({arguments})"));
        assert!(Matcher::parse(&format!("{}({arguments})", name.to_lowercase())).is_err());
    }
    assert_eq!(leaf::names().count(), 21);
}

#[test]
fn statuses_match_by_value_range_and_absence() {
    check("Status(`404`, `500-599`)", &[status(404), status(500), status(599)], &[status(0), status(405), status(600)]);
    check(
        "Status(`-`, `100`, `999`)",
        &[status(0), status(100), status(999)],
        &[status(200), status(1000), status(9999)],
    );
    let origin = |origin_status| Event { status: 404, origin_status, ..Event::default() };
    check("OriginStatus(`500-599`)", &[origin(502)], &[origin(404), origin(0)]);
    check("OriginStatus(`-`)", &[origin(0)], &[origin(502)]);
}

#[test]
fn hosts_match_in_any_case_and_with_a_final_dot() {
    let condition = "Host(`Example.COM`, `b.example.`)";
    let yes = [host("example.com"), host("EXAMPLE.com."), host("b.example"), host("b.example.")];
    check(condition, &yes, &[host("a.example.com"), host("example.com.."), host("-"), host("")]);
    check("Host(`-`)", &[host("-")], &[host("a")]);
    check("HostRegexp(`^[a-z]+\\.Example\\.com$`)", &[host("www.example.com"), host("WWW.EXAMPLE.COM")], &[host("-")]);
    check("HostRegexp(`example`)", &[host("an.example.com")], &[host("other.com")]);
}

#[test]
fn paths_match_exactly_by_prefix_or_by_pattern() {
    check("Path(`/a`, `/B`)", &[path("/a"), path("/B")], &[path("/b"), path("/a/"), path("/a/b"), path("-")]);
    check("PathPrefix(`/a`, `/c/`)", &[path("/a"), path("/abc"), path("/c/d")], &[path("/A"), path("/c"), path("-")]);
    check("PathRegexp(`b$`, `^/c`)", &[path("/ab"), path("/cd")], &[path("/bd"), path("/B"), path("-")]);
    check("Path(`-`)", &[path("-")], &[path("/")]);
    check("PathRegexp(`^-$`)", &[path("-")], &[path("/-")]);
    // Each expression stands for itself: a comment or flag does not reach into the next.
    check("PathRegexp(`(?xi)A # b`, `c`)", &[path("/a"), path("/c")], &[path("/C"), path("/b")]);
}

#[test]
fn methods_match_in_upper_case() {
    let method = |method| text(Text { method, ..Text::default() });
    check("Method(`get`, `POST`)", &[method("GET"), method("POST")], &[method("get"), method("PUT"), method("-")]);
}

#[test]
fn headers_match_by_value_and_absence() {
    let pairs = [("X-Api-Key", "a"), ("Referer", "http://spam.example/x"), ("X-Empty", "")];
    let with = Event { headers: Headers::from_pairs(&pairs), ..Event::default() };
    let without = Event::default();
    check("Header(`x-api-KEY`, `b`, `a`)", &[with], &[without]);
    check("Header(`X-Api-Key`, `A`)", &[], &[with, without]);
    check("Header(`X-Empty`, ``)", &[with], &[without]);
    check("Header(`X-Api-Key`, `-`)", &[without], &[with]);
    check("HeaderRegexp(`Referer`, `\\.example/`, `^-$`)", &[with, without], &[]);
    check("HeaderRegexp(`Referer`, `^spam`)", &[], &[with, without]);
}

#[test]
fn needed_headers_are_named_once_in_lower_case() {
    let condition = "Header(`X-B`, `1`) || !(HeaderRegexp(`x-a`, `1`) && Header(`x-b`, `2`)) && UserAgent(`-`)";
    assert_eq!(parse(condition).interest_headers(), ["x-a", "x-b"]);
    assert!(parse("Status(`404`)").interest_headers().is_empty());
}

#[test]
fn query_parameters_are_decoded_as_go_does() {
    let yes = ["a=b", "x=1&a=b", "a=c&a=b", "%61=b", "a=%62", "a=b&", "&&a=b"].map(query);
    check("Query(`a`, `b`)", &yes, &["", "a", "a=", "a=B", "b=a", "a=b;c", "a=%zz", "a=b%", "aa=b"].map(query));
    check(
        "Query(`a`, `b c`, `é`)",
        &["a=b+c", "a=b%20c", "a=%C3%a9", "a=é"].map(query),
        &["a=b%2Bc", "a=%C3"].map(query),
    );
    check("Query(`a`)", &["a", "a=", "b&a", "a=1&a"].map(query), &["", "a=1", "b"].map(query));
    check("QueryRegexp(`a`)", &["a", "a="].map(query), &["a=1"].map(query));
    let condition = r"QueryRegexp(`id`, `(?i)union\s+select`, `^\d{9}$`)";
    check(condition, &["id=1+UNION%20select", "id=123456789"].map(query), &["id=1", "x=union+select", ""].map(query));
    // A parameter that is not there has no value, not even `-`.
    check("Query(`a`, `-`)", &["a=-"].map(query), &["", "a"].map(query));
}

#[test]
fn clients_match_by_address_network_and_named_set() {
    let nobody = Event { client: Err(NoClient::NotAnAddress), ..Event::default() };
    let yes = ["192.0.2.7", "10.1.2.3", "2001:db8::5"].map(client);
    let no = [client("192.0.2.8"), client("2001:db9::5"), client("104.16.0.1"), nobody];
    check("ClientIP(`192.0.2.7`, `private`, `2001:db8::1/64`)", &yes, &no);
    check("ClientIP(`cloudflare`)", &[client("104.16.0.1")], &[client("192.0.2.7"), nobody]);
}

#[test]
fn a_router_matches_whole_or_as_part_of_a_chain() {
    let yes = ["a@file", "a@file -> b@file", "x@file -> a@file", "x -> a@file -> y"].map(router);
    check("Router(`a@file`)", &yes, &["-", "aa@file", "a@file -> ", "a", "a@file->b@file"].map(router)[..2]);
    check("Router(`a -> b`)", &[router("a -> b")], &["a", "b", "a -> b -> c"].map(router));
    check("Router(`-`)", &[router("-")], &[router("a")]);
}

#[test]
fn plain_fields_match_exactly() {
    let all = Text {
        protocol: "HTTP/2.0",
        user_agent: "Nikto/2",
        service: "s@docker",
        entry_point: "web",
        username: "admin",
        ..Text::default()
    };
    let (given, absent) = (text(all), Event::default());
    for (condition, negative) in [
        ("Protocol(`HTTP/1.1`, `HTTP/2.0`)", "Protocol(`-`)"),
        ("UserAgent(`Nikto/2`)", "UserAgent(`-`)"),
        ("UserAgentRegexp(`(?i)nikto|sqlmap`)", "UserAgentRegexp(`^-$`)"),
        ("Service(`s@docker`)", "Service(`-`)"),
        ("EntryPoint(`web`)", "EntryPoint(`-`)"),
        ("Username(`admin`, `root`)", "Username(`-`)"),
    ] {
        check(condition, &[given], &[absent]);
        check(negative, &[absent], &[given]);
    }
    check("UserAgent(`nikto/2`) || Username(`Admin`) || Service(`s`)", &[], &[given, absent]);
    assert!(parse("Node(`edge-1`)").matches(&absent, "edge-1"));
    assert!(!parse("Node(`edge-1`)").matches(&absent, "edge-2"));
}

#[test]
fn a_challenge_without_credentials_is_no_attempt() {
    let condition = "Status(`401`) && !Username(`-`)";
    let named = Event { status: 401, ..text(Text { username: "admin", ..Text::default() }) };
    check(condition, &[named], &[status(401), status(200)]);
}

#[test]
fn a_status_that_cannot_match_runs_no_regex() {
    let matcher = parse(FORCEFUL_BROWSING);
    let (ok, missing) = (Event { status: 200, ..path("/x") }, Event { status: 404, ..path("/x") });
    REGEX_RUNS.set(0);
    assert!(!matcher.may_match_status(200) && matcher.may_match_status(404));
    assert!(!matcher.matches(&ok, ""));
    assert_eq!(REGEX_RUNS.get(), 0);
    assert!(matcher.matches(&missing, ""));
    assert_eq!(REGEX_RUNS.get(), 1);
    assert!(!matcher.matches(&Event { status: 404, ..path("/favicon.ico") }, ""));
}

#[test]
fn cheap_parts_run_first_wherever_they_stand() {
    for condition in [
        "PathRegexp(`a`) && Path(`/x`)",
        "PathRegexp(`a`) && (QueryRegexp(`a`, `b`) || PathRegexp(`c`)) && !Path(`/y`)",
        "!(PathRegexp(`a`) || !Method(`PUT`))",
        "PathRegexp(`a`) && (PathRegexp(`b`) && Host(`h`))",
    ] {
        REGEX_RUNS.set(0);
        assert!(!matches(condition, &path("/y")), "{condition}");
        assert_eq!(REGEX_RUNS.get(), 0, "{condition}");
    }
}

#[test]
fn statuses_are_known_through_all_operators() {
    for (condition, yes, no) in [
        ("Status(`404`) && Status(`500`)", &[][..], &[0, 200, 404, 500, 1000][..]),
        ("Status(`404`) || Path(`/`)", &[0, 200, 404, 1000], &[]),
        ("Path(`/`) && (Status(`404`) || Status(`500`) && Method(`GET`))", &[404, 500], &[0, 200, 1000]),
        ("!Status(`200-299`)", &[0, 404, 1000, 65535], &[200, 299]),
        ("!(Status(`200-299`) || Path(`/`)) && !Status(`-`)", &[404, 1000], &[0, 200, 299]),
        ("!(!Status(`404`) || !Path(`/`))", &[404], &[0, 200]),
        ("Status(`404`) || !Status(`404`)", &[0, 404, 1000], &[]),
        ("OriginStatus(`404`)", &[0, 404, 1000], &[]),
    ] {
        let matcher = parse(condition);
        assert!(yes.iter().all(|status| matcher.may_match_status(*status)), "{condition}");
        assert!(!no.iter().any(|status| matcher.may_match_status(*status)), "{condition}");
    }
}

#[test]
fn what_is_constant_is_folded_away() {
    for (condition, expected) in [
        ("Status(`404`) && PathRegexp(`a`) && !Status(`404`)", Some(false)),
        ("PathRegexp(`a`) || (Status(`404`) || !Status(`404`))", Some(true)),
        ("!(Status(`100-999`) || !Status(`100-999`)) || Status(`404`) && Status(`405`)", Some(false)),
        ("Status(`404`) && PathRegexp(`a`)", None),
    ] {
        let folded = match parse(condition).0.plan {
            Plan::Constant(value) => Some(value),
            _ => None,
        };
        assert_eq!(folded, expected, "{condition}");
    }
    assert!(matches!(parse("!(!Status(`404`) || !Status(`400-499`))").0.plan, Plan::Status(_)));
}

#[test]
fn an_explanation_names_the_matchers_that_decided() {
    let explain = |condition: &str, event: &Event<'_>| {
        let leaves = parse(condition).explain(event, "edge-1");
        leaves.into_iter().map(|leaf| leaf.text).collect::<Vec<_>>()
    };
    let missing = Event { status: 404, ..path("/a.png") };
    assert_eq!(explain(FORCEFUL_BROWSING, &status(200)), ["Status(`401-405`) is false"]);
    assert_eq!(
        explain(FORCEFUL_BROWSING, &missing),
        [r"PathRegexp(`\.(png|txt|jpg|ico|js|css|ttf|woff2?)/*$`) is true"]
    );
    assert_eq!(explain("Status( `404` ) && !Path(`/`)", &missing), ["Status( `404` ) is true", "Path(`/`) is false"]);
    assert_eq!(explain("Status(`500`) || Path(`/`)", &missing), ["Status(`500`) is false", "Path(`/`) is false"]);
    assert_eq!(explain("Status(`500`) || Path(`/a.png`) || Path(`/`)", &missing), ["Path(`/a.png`) is true"]);
}

#[test]
fn debug_shows_the_source() {
    assert_eq!(format!("{:?}", parse("Status(`404`)")), "Matcher(\"Status(`404`)\")");
}
