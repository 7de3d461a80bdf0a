//! The common log format as Traefik writes it (`common`, with router, service and duration at the end) and without that
//! end (`genericCLF`), with nom.
//!
//! `host - user [time] "method path protocol" status size "referer" "agent"[ count "router" "url" 0ms]`
//!
//! Nothing before the time is quoted or escaped, and the user name is whatever the client sent, spaces, quotes and
//! brackets included. So the time is looked for from the end, three words before the few quotes that may end the request, and
//! all must then fit to the last byte. At most one place fits: a path has no spaces, and quotes inside the last two
//! values are escaped. The work is linear in the length of the line, whatever it holds. A user name with a line feed
//! forges a whole line; the format gives no way to tell.

use std::borrow::Cow;
use std::time::Duration;

use nom::branch::alt;
use nom::bytes::complete::{tag, take_till1, take_until};
use nom::character::complete::{char, digit1};
use nom::combinator::{all_consuming, rest};
use nom::sequence::{delimited, terminated};
use nom::{IResult, Parser};
use proto::time::Timestamp;

use super::time;

/// What a line of the common log format says. Absent values are `-`, as they stand.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ClfLine<'a> {
    pub(crate) host: &'a str,
    pub(crate) username: &'a str,
    /// `None` in the generic format.
    pub(crate) traefik: Option<TraefikEnd<'a>>,
    pub(crate) request: Request<'a>,
}

/// What Traefik adds to the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TraefikEnd<'a> {
    /// `None` for one that is no number.
    pub(crate) request_count: Option<u64>,
    pub(crate) router: &'a str,
    pub(crate) duration: Duration,
}

/// What stands behind the user name.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Request<'a> {
    pub(crate) time: Timestamp,
    pub(crate) method: &'a str,
    pub(crate) path: &'a str,
    pub(crate) protocol: &'a str,
    pub(crate) status: &'a str,
    pub(crate) referer: Cow<'a, str>,
    pub(crate) user_agent: Cow<'a, str>,
}

/// Bare quotes, those without a backslash before them, from the one behind the protocol to the end: four around the last
/// two values, where all quotes inside are escaped. So no earlier quote can end the request.
const BARE_QUOTES_MAX: usize = 5;
/// Bytes from the space before the time to the quote before the method: ` [08/Dec/2021:09:16:05 +0000] `.
const TIME_BYTES: usize = 30;

/// Parses a whole line. Behind a proxy the host may be a forwarded chain that a client began, ` - ` included, so there
/// the host ends at the last ` - ` before the time; a user name with ` - ` then costs the line its client, but no
/// client can name another. Elsewhere the host ends at the first one.
pub(crate) fn parse(line: &str, behind_proxy: bool) -> Option<ClfLine<'_>> {
    let (front, traefik) = split_traefik(line).map_or((line, None), |(front, traefik)| (front, Some(traefik)));
    let (at, request) = times(front).find_map(|at| {
        let (_, request) = all_consuming(after_user).parse(&front[at + 1..]).ok()?;
        Some((at, request))
    })?;
    let before = &front[..at];
    let (host, username) = if behind_proxy { before.rsplit_once(" - ") } else { before.split_once(" - ") }?;
    (!host.is_empty()).then_some(ClfLine { host, username, traefik, request })
}

/// Where ` [time] "` may stand, from the end: at most [`BARE_QUOTES_MAX`] places.
fn times(front: &str) -> impl Iterator<Item = usize> {
    let bytes = front.as_bytes();
    let ends = memchr::memrchr_iter(b'"', bytes).filter(|&at| is_bare(bytes, at)).take(BARE_QUOTES_MAX);
    let begins = ends.filter_map(|end| front[..end].rmatch_indices(' ').nth(2).map(|(space, _)| space + 1));
    begins.filter_map(|begin| begin.checked_sub(TIME_BYTES)).filter(|&at| bytes[at..].starts_with(b" ["))
}

/// Cuts ` count "router" "url" 0ms` off the end. Those are Traefik's own words and hold no quotes.
fn split_traefik(line: &str) -> Option<(&str, TraefikEnd<'_>)> {
    let digits = line.strip_suffix("ms")?;
    let rest = digits.trim_end_matches(|c: char| c.is_ascii_digit());
    let duration = Duration::from_millis(digits[rest.len()..].parse().unwrap_or(0));
    let (rest, _url) = rest.strip_suffix("\" ").filter(|_| rest.len() < digits.len())?.rsplit_once(" \"")?;
    let (rest, router) = rest.strip_suffix('"')?.rsplit_once(" \"")?;
    let (front, request_count) = rest.rsplit_once(' ')?;
    let is_count = request_count == "-" || request_count.bytes().all(|b| b.is_ascii_digit());
    is_count.then(|| (front, TraefikEnd { request_count: request_count.parse().ok(), router, duration }))
}

/// `[time] "method path protocol" status size "referer" "agent"`
fn after_user(input: &str) -> IResult<&str, Request<'_>> {
    let (input, time) = delimited(char('['), take_until("]"), tag("] \"")).map_opt(time::parse_clf).parse(input)?;
    let (input, method) = terminated(word, char(' ')).parse(input)?;
    let (input, path) = terminated(word, char(' ')).parse(input)?;
    let (input, protocol) = terminated(take_till1(|c| c == '"' || c == ' '), tag("\" ")).parse(input)?;
    let (input, status) = terminated(count, char(' ')).parse(input)?;
    let (input, _size) = terminated(count, char(' ')).parse(input)?;
    let (input, (referer, user_agent)) = rest.map_opt(split_quoted).parse(input)?;
    Ok((input, Request { time, method, path, protocol, status, referer, user_agent }))
}

fn word(input: &str) -> IResult<&str, &str> {
    take_till1(|c| c == ' ').parse(input)
}

fn count(input: &str) -> IResult<&str, &str> {
    alt((tag("-"), digit1)).parse(input)
}

/// `"referer" "agent"`. Inside, every `"` has a backslash before it, but a backslash is not escaped itself: a value may
/// end with one, so a separator behind a backslash is taken where there is no other.
fn split_quoted(quoted: &str) -> Option<(Cow<'_, str>, Cow<'_, str>)> {
    let inner = quoted.strip_prefix('"')?.strip_suffix('"')?;
    let bytes = inner.as_bytes();
    let mut bare = memchr::memchr_iter(b'"', bytes).filter(|&at| is_bare(bytes, at));
    // The second quote of the separator is always bare, its first may look escaped, and no other one is bare.
    let (first, second) = match (bare.next()?, bare.next(), bare.next()) {
        (second, None, _) => (second.checked_sub(2)?, second),
        (first, Some(second), None) if first + 2 == second => (first, second),
        _ => return None,
    };
    (&bytes[first..second] == b"\" ").then(|| (unescape(&inner[..first]), unescape(&inner[second + 1..])))
}

fn is_bare(bytes: &[u8], at: usize) -> bool {
    at == 0 || bytes[at - 1] != b'\\'
}

fn unescape(value: &str) -> Cow<'_, str> {
    if value.contains("\\\"") { Cow::Owned(value.replace("\\\"", "\"")) } else { Cow::Borrowed(value) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIME: &str = "[08/Dec/2021:09:16:05 +0000]";
    const TAIL: &str = r#" 240 "test@docker" "http://172.17.0.3:80" 0ms"#;

    fn fields(line: &str) -> Option<(String, String, String, String, String)> {
        let line = parse(line, false)?;
        let ClfLine { host, username, request, .. } = line;
        Some((
            host.to_owned(),
            username.to_owned(),
            request.path.to_owned(),
            request.referer.into_owned(),
            request.user_agent.into_owned(),
        ))
    }

    fn expect(line: &str, [host, user, path, referer, agent]: [&str; 5]) {
        let expected = (host.to_owned(), user.to_owned(), path.to_owned(), referer.to_owned(), agent.to_owned());
        assert_eq!(fields(line), Some(expected), "{line}");
    }

    #[test]
    fn both_formats() {
        let generic = format!(r#"192.0.2.1 - - {TIME} "GET /a?b=c HTTP/1.1" 404 12 "-" "Nikto""#);
        expect(&generic, ["192.0.2.1", "-", "/a?b=c", "-", "Nikto"]);
        assert_eq!(parse(&generic, false).and_then(|line| line.traefik.map(|end| end.router)), None);
        let common = format!("{generic}{TAIL}");
        expect(&common, ["192.0.2.1", "-", "/a?b=c", "-", "Nikto"]);
        assert_eq!(parse(&common, false).and_then(|line| line.traefik.map(|end| end.router)), Some("test@docker"));
    }

    #[test]
    fn a_user_name_may_hold_anything_and_changes_nothing_else() {
        for user in [
            "a b",
            "\"",
            " [",
            "x [08/Dec/2021:09:16:05 +0000] \"GET /ok HTTP/1.1\" 200 1 \"-\" \"-\"",
            "x [08/Dec/2021:09:16:05 +0000] \"GET /ok HTTP/1.1\" 200 1 \"-\" \"",
            "x [08/Dec/2021:09:16:05 +0000] \"GET /ok",
            "198.51.100.9 - y",
        ] {
            let line = format!(r#"192.0.2.1 - {user} {TIME} "GET /real HTTP/1.1" 401 12 "-" "-"{TAIL}"#);
            expect(&line, ["192.0.2.1", user, "/real", "-", "-"]);
        }
    }

    #[test]
    fn behind_a_proxy_a_forged_chain_names_nobody() {
        let line = format!(r#"198.51.100.9 - x, 192.0.2.1 - - {TIME} "GET / HTTP/1.1" 401 12 "-" "-"{TAIL}"#);
        assert_eq!(parse(&line, true).map(|line| line.host), Some("198.51.100.9 - x, 192.0.2.1"));
    }

    #[test]
    fn quotes_and_backslashes_in_quoted_values() {
        let line = |quoted: &str| format!(r#"192.0.2.1 - - {TIME} "GET / HTTP/1.1" 200 1 {quoted}{TAIL}"#);
        expect(&line(r#""a\"b" "c\" \"d""#), ["192.0.2.1", "-", "/", "a\"b", "c\" \"d"]);
        expect(&line(r#""-" "ends\""#), ["192.0.2.1", "-", "/", "-", "ends\\"]);
        let query = line(r#""-" "-""#).replace("/ HTTP", r#"/?"]"[""" HTTP"#);
        expect(&query, ["192.0.2.1", "-", r#"/?"]"[""""#, "-", "-"]);
        expect(&line(r#""ends\" "x""#), ["192.0.2.1", "-", "/", "ends\\", "x"]);
        expect(&line(r#""" """#), ["192.0.2.1", "-", "/", "", ""]);
        expect(&line(r#""a\" " "x""#), ["192.0.2.1", "-", "/", "a\" ", "x"]);
        expect(&line(r#""a" " \"b""#), ["192.0.2.1", "-", "/", "a", " \"b"]);
        assert_eq!(fields(&line(r#""a"b" "c""#)), None);
        assert_eq!(fields(&line(r#""a\"x"b""#)), None);
    }

    #[test]
    fn a_hostile_line_of_any_length_costs_a_few_attempts() {
        let request = r#""GET / HTTP/1.1" 200 1 "-" "-""#;
        for part in [
            " [",
            " [x",
            "[x",
            "]",
            "] \"",
            "\"",
            "\\\"",
            "\" \"",
            "\\\" \"",
            " - ",
            &format!(" {TIME} \""),
            &format!(" {TIME} \"G / H\" 2 1 \""),
            &format!(" {TIME} {request}"),
        ] {
            let hostile = part.repeat((1 << 20) / part.len());
            assert!(times(&hostile).count() <= BARE_QUOTES_MAX, "{part}");
            let refused = format!("192.0.2.1 - {hostile} \"");
            assert_eq!(parse(&refused, false), None, "{part}");
            assert!(parse(&format!("192.0.2.1 - {hostile} {TIME} {request}{TAIL}"), false).is_some(), "{part}");
            let quoted = format!(r#"192.0.2.1 - - {TIME} "GET / HTTP/1.1" 200 1 "{hostile}" "{hostile}""#);
            assert!(times(&quoted).count() <= BARE_QUOTES_MAX, "{part}");
            assert_eq!(parse(&quoted, false).is_some(), !part.contains('"') || part == "\\\"", "{part}");
        }
    }

    #[test]
    fn what_does_not_fit_in_full_is_refused() {
        let good = format!(r#"192.0.2.1 - - {TIME} "GET / HTTP/1.1" 200 1 "-" "-"{TAIL}"#);
        for end in 1..good.len() {
            let cut = &good[..good.len() - end];
            if !cut.ends_with(r#" "-" "-""#) {
                assert_eq!(parse(cut, false), None, "{cut}");
            }
        }
        assert_eq!(parse(&format!("{good} "), false), None);
        assert_eq!(parse(&good.replace("200 1", "OK 1"), false), None);
        assert_eq!(parse(&good.replace("08/Dec", "48/Dec"), false), None);
        assert_eq!(parse(&good.replace("GET / ", "GET "), false), None);
    }
}
