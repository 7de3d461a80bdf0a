//! What syslog puts before a line: the headers of RFC 5424 and RFC 3164, with nom, as programs really write them.
//!
//! `<34>1 2026-01-02T15:04:05Z host app 123 - [data] line` and `<34>Jan  2 15:04:05 host app[123]: line`, the latter also
//! with an RFC 3339 time, without priority, without host (as syslog(3) and Docker write it), without name, or without the
//! colon after it. A line may begin with `@cee:`.
//!
//! It refuses nothing: a message without a header that can be told is all payload. Where the old header leaves open which
//! word is what, the payload tells: it is JSON, the common log format, or what a container runtime has written. Only spaces
//! before the payload are lost; nothing is copied.

use nom::branch::alt;
use nom::bytes::complete::{is_not, tag, take_till1, take_while_m_n, take_while1};
use nom::character::complete::{char, digit1};
use nom::combinator::{opt, recognize, rest, verify};
use nom::multi::{many0_count, many1_count};
use nom::sequence::{delimited, preceded, terminated};
use nom::{IResult, Parser};

use super::time::parse_rfc3339;

/// A header's room beside the line itself, in bytes. RFC 5424 asks receivers for 2,048 bytes with the line.
pub const HEADER_BYTES_MAX: usize = 4096;
/// Largest priority: facility 23, severity 7.
const PRIORITY_MAX: u32 = 191;
/// What structured payloads may begin with (the Common Event Expression's cookie).
const CEE: &[u8] = b"@cee:";
/// Mark of UTF-8 that RFC 5424 puts before a message.
const BOM: &[u8] = b"\xef\xbb\xbf";
const MONTHS: [&[u8]; 12] =
    [b"Jan", b"Feb", b"Mar", b"Apr", b"May", b"Jun", b"Jul", b"Aug", b"Sep", b"Oct", b"Nov", b"Dec"];

/// The parts of a message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Message<'a> {
    /// Where it was first written, if it says so.
    pub hostname: Option<&'a str>,
    /// The program that wrote it, if it says so.
    pub app: Option<&'a str>,
    /// The line.
    pub payload: &'a [u8],
}

/// Takes a message (without its framing) apart.
pub fn parse_message(message: &[u8]) -> Message<'_> {
    let parsed = match priority(message) {
        Ok((after, _)) => rfc5424(after).unwrap_or_else(|_| rfc3164(after, true)),
        Err(_) => rfc3164(message, false),
    };
    Message { payload: line(parsed.payload), ..parsed }
}

/// `payload` from its first byte that is not of an envelope of syslog.
fn line(payload: &[u8]) -> &[u8] {
    let line = skip_spaces(payload);
    line.strip_prefix(CEE).map_or(line, skip_spaces)
}

fn skip_spaces(text: &[u8]) -> &[u8] {
    let spaces = text.iter().take_while(|byte| **byte == b' ').count();
    &text[spaces..]
}

/// `<34>`
fn priority(input: &[u8]) -> IResult<&[u8], &[u8]> {
    let number = verify(digits(1, 3), |digits: &[u8]| {
        digits.iter().fold(0, |number, digit| number * 10 + u32::from(digit - b'0')) <= PRIORITY_MAX
    });
    delimited(char('<'), number, char('>')).parse(input)
}

fn digits<'a>(min: usize, max: usize) -> impl Parser<&'a [u8], Output = &'a [u8], Error = nom::error::Error<&'a [u8]>> {
    take_while_m_n(min, max, |byte: u8| byte.is_ascii_digit())
}

fn word(input: &[u8]) -> IResult<&[u8], &[u8]> {
    take_till1(|byte| byte == b' ')(input)
}

/// After the priority: version, time, host, program, process, kind of message, data, each `-` when absent; then the line.
fn rfc5424(input: &[u8]) -> Result<Message<'_>, nom::Err<nom::error::Error<&[u8]>>> {
    let mut header = (
        terminated(digits(1, 3), char(' ')),
        terminated(verify(word, |time: &[u8]| time == b"-" || is_rfc3339(time)), char(' ')),
        terminated(word, char(' ')),
        terminated(word, char(' ')),
        terminated(word, char(' ')),
        terminated(word, char(' ')),
        structured_data,
        alt((preceded((char(' '), opt(tag(BOM))), rest), verify(rest, <[u8]>::is_empty))),
    );
    let (_, (_, _, host, app, _, _, (), payload)) = header.parse(input)?;
    Ok(Message { hostname: given(host), app: given(app), payload })
}

/// `-` or any number of `[name key="value" ...]`; in a value a backslash takes the meaning from what follows.
fn structured_data(input: &[u8]) -> IResult<&[u8], ()> {
    let escaped = recognize((char('\\'), nom::bytes::complete::take(1_usize)));
    let value = delimited(char('"'), many0_count(alt((is_not("\"\\"), escaped))), char('"'));
    let name = take_while1(|byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'=' | b']' | b'"'));
    let id = take_while1(|byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'=' | b']' | b'"'));
    let element = delimited(char('['), (id, many0_count((char(' '), name, char('='), value))), char(']'));
    alt((tag("-").map(|_: &[u8]| ()), many1_count(element).map(|_| ()))).parse(input)
}

/// After the priority, if there is one: time, host and name, each of which may be missing.
fn rfc3164(input: &[u8], has_priority: bool) -> Message<'_> {
    let whole = Message { payload: input, ..Message::default() };
    // Looked at before all else: a container's time looks like that of a header.
    if is_line(skip_spaces(input)) {
        return whole;
    }
    let after = match time(skip_spaces(input)) {
        Ok((after, _)) => skip_spaces(after),
        Err(_) if has_priority => {
            return name(input).map_or(whole, |(payload, app)| Message { app: given(app), payload, ..whole });
        }
        Err(_) => return whole,
    };
    if is_line(after) {
        return Message { payload: after, ..whole };
    }
    if let Ok((payload, app)) = name(after) {
        return Message { app: given(app), payload, ..whole };
    }
    let Ok((after, host)) = terminated(host, alt((tag(" "), verify(rest, <[u8]>::is_empty)))).parse(after) else {
        return Message { payload: after, ..whole };
    };
    let (hostname, after) = (given(host), skip_spaces(after));
    if !is_line(after) {
        if let Ok((payload, app)) = name(after) {
            return Message { hostname, app: given(app), payload };
        }
        if let Ok((payload, app)) = terminated(bare_name, char(' ')).parse(after)
            && is_line(skip_spaces(payload))
        {
            return Message { hostname, app: given(app), payload };
        }
    }
    Message { hostname, payload: after, ..whole }
}

/// `Jan  2 15:04:05`, which may have a fraction, or a time of RFC 3339; before a space.
fn time(input: &[u8]) -> IResult<&[u8], &[u8]> {
    let month = verify(nom::bytes::complete::take(3_usize), |month: &[u8]| MONTHS.contains(&month));
    let clock = (digits(2, 2), char(':'), digits(2, 2), char(':'), digits(2, 2), opt((char('.'), digit1)));
    let traditional = recognize((month, char(' '), opt(char(' ')), digits(1, 2), char(' '), clock));
    terminated(alt((traditional, verify(word, is_rfc3339))), char(' ')).parse(input)
}

fn is_rfc3339(word: &[u8]) -> bool {
    word.len() <= 40 && std::str::from_utf8(word).is_ok_and(|text| parse_rfc3339(text).is_some())
}

fn host(input: &[u8]) -> IResult<&[u8], &[u8]> {
    take_while1(|byte: u8| byte.is_ascii_alphanumeric() || b".-_:%[]/@".contains(&byte))(input)
}

fn bare_name(input: &[u8]) -> IResult<&[u8], &[u8]> {
    take_while1(|byte: u8| byte.is_ascii_graphic() && !b":[]{}\"<".contains(&byte))(input)
}

/// `name:` or `name[123]:`, before a space, a JSON object, a cookie or the end.
fn name(input: &[u8]) -> IResult<&[u8], &[u8]> {
    let process = delimited(char('['), take_while1(|byte: u8| byte.is_ascii_graphic() && byte != b']'), char(']'));
    let (after, app) = terminated(bare_name, (opt(process), char(':'))).parse(input)?;
    match after.first() {
        None | Some(b' ' | b'{' | b'@') => Ok((after, app)),
        Some(_) => Err(nom::Err::Error(nom::error::Error::new(after, nom::error::ErrorKind::Char))),
    }
}

/// Whether an access line begins here: JSON, with or without a cookie; `client - user [...`; or `time stdout F ...`.
fn is_line(text: &[u8]) -> bool {
    if text.starts_with(b"{") || text.starts_with(CEE) {
        return true;
    }
    let mut words = text.splitn(3, |byte| *byte == b' ');
    let (first, second) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    words.next().is_some() && (second == b"-" || (matches!(second, b"stdout" | b"stderr") && is_rfc3339(first)))
}

/// A word of the header, unless it stands for none.
fn given(word: &[u8]) -> Option<&str> {
    std::str::from_utf8(word).ok().filter(|word| *word != "-")
}

#[cfg(test)]
mod tests;
