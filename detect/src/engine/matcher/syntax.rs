//! The grammar: text to a tree of calls. It knows no matcher.
//!
//! ```text
//! any      = all { "||" all }
//! all      = operand { "&&" operand }
//! operand  = { "!" } ( "(" any ")" | call )
//! call     = name "(" argument { "," argument } ")"
//! argument = "`" anything but a back-tick "`" | Go's interpreted string literal
//! ```
//! White space and line ends may stand between any two tokens.

use nom::branch::alt;
use nom::bytes::complete::{is_not, tag, take_till, take_while_m_n, take_while1};
use nom::character::complete::{anychar, char};
use nom::combinator::{eof, map, map_opt, verify};
use nom::multi::{fold_many0, many0, many0_count, separated_list1};
use nom::sequence::{preceded, terminated};
use nom::{Err, IResult, Offset, Parser};

use super::error::Fault;
use super::{EXPRESSION_BYTES_MAX, NESTING_MAX};

/// A condition as written. Groups have at least two parts.
#[derive(Debug)]
pub(super) enum Expr<'a> {
    Call(Call<'a>),
    Not(Box<Expr<'a>>),
    All(Vec<Expr<'a>>),
    Any(Vec<Expr<'a>>),
}

/// A matcher with its arguments; every `&str` is a part of the source, so that it has a position.
#[derive(Debug)]
pub(super) struct Call<'a> {
    /// From the name to the closing parenthesis.
    pub(super) text: &'a str,
    pub(super) name: &'a str,
    /// At least one.
    pub(super) arguments: Vec<Argument<'a>>,
    /// The closing parenthesis.
    pub(super) closing: &'a str,
}

#[derive(Debug)]
pub(super) struct Argument<'a> {
    /// With its quotes.
    pub(super) raw: &'a str,
    pub(super) value: String,
}

const EXPECTED_ESCAPE: &str = "expected an escape such as `\\\\`, `\\\"`, `\\n`, `\\x7f` or `\\u00e9` \
     (regular expressions are easier in back-ticks)";

type Parsed<'a, O> = IResult<&'a str, O, Fault<'a>>;

/// Parses a whole text.
pub(super) fn parse(text: &str) -> Result<Expr<'_>, Fault<'_>> {
    if text.len() > EXPRESSION_BYTES_MAX {
        let limit = text.floor_char_boundary(EXPRESSION_BYTES_MAX);
        return Err(Fault::new(&text[limit..], format!("expected at most {EXPRESSION_BYTES_MAX} bytes, got more")));
    }
    let end = expect("expected `&&`, `||` or the end", eof);
    match terminated(|rest| any(rest, 0), end).parse(text) {
        Ok((_, expr)) => Ok(expr),
        Err(Err::Error(fault) | Err::Failure(fault)) => Err(fault),
        // Complete parsers never ask for more.
        Err(Err::Incomplete(_)) => Err(Fault::new(&text[text.len()..], "expected more")),
    }
}

fn any(input: &str, depth: usize) -> Parsed<'_, Expr<'_>> {
    let (rest, first) = all(input, depth)?;
    let (rest, others) = many0(preceded(token("||"), |rest| all(rest, depth))).parse(rest)?;
    Ok((rest, group(Expr::Any, first, others)))
}

fn all(input: &str, depth: usize) -> Parsed<'_, Expr<'_>> {
    let (rest, first) = operand(input, depth)?;
    let (rest, others) = many0(preceded(token("&&"), |rest| operand(rest, depth))).parse(rest)?;
    Ok((rest, group(Expr::All, first, others)))
}

fn group<'a>(kind: fn(Vec<Expr<'a>>) -> Expr<'a>, first: Expr<'a>, others: Vec<Expr<'a>>) -> Expr<'a> {
    if others.is_empty() { first } else { kind(std::iter::once(first).chain(others).collect()) }
}

/// Any number of `!` is counted here and not nested, so that only parentheses take stack.
fn operand(input: &str, depth: usize) -> Parsed<'_, Expr<'_>> {
    let (rest, negations) = many0_count(token("!")).parse(input)?;
    let message = if negations == 0 { "expected `!`, `(` or a matcher" } else { "expected `(` or a matcher" };
    let (rest, part) = expect(message, alt((|rest| parentheses(rest, depth), map(call, Expr::Call)))).parse(rest)?;
    Ok((rest, if negations % 2 == 1 { Expr::Not(Box::new(part)) } else { part }))
}

fn parentheses(input: &str, depth: usize) -> Parsed<'_, Expr<'_>> {
    let (rest, _) = tag("(").parse(input)?;
    if depth == NESTING_MAX {
        return fail(input, format!("expected at most {NESTING_MAX} nested parentheses, got one more"));
    }
    terminated(|rest| any(rest, depth + 1), expect("expected `&&`, `)` or `||`", tag(")"))).parse(rest)
}

fn call(input: &str) -> Parsed<'_, Call<'_>> {
    let (rest, name) = take_while1(|c: char| c.is_ascii_alphanumeric() || c == '_').parse(input)?;
    let (rest, _) = expect("expected `(`", tag("(")).parse(rest)?;
    let argument = expect("expected an argument in back-ticks or double quotes", alt((raw_string, string)));
    let (rest, arguments) = separated_list1(token(","), argument).parse(rest)?;
    let (rest, closing) = expect("expected `)` or `,`", tag(")")).parse(rest)?;
    Ok((rest, Call { text: &input[..input.offset(rest)], name, arguments, closing }))
}

fn raw_string(input: &str) -> Parsed<'_, Argument<'_>> {
    let (rest, value) = preceded(char('`'), take_till(|c| c == '`')).parse(input)?;
    let Ok((rest, _)) = tag::<_, _, Fault<'_>>("`").parse(rest) else {
        return fail(input, "expected a closing back-tick for the argument");
    };
    Ok((rest, Argument { raw: &input[..input.offset(rest)], value: value.to_owned() }))
}

fn string(input: &str) -> Parsed<'_, Argument<'_>> {
    let (rest, _) = char('"').parse(input)?;
    let piece = alt((map(is_not("\"\\\n"), Piece::Text), map(escape, Piece::Char)));
    let append = |mut value: String, piece| {
        match piece {
            Piece::Text(text) => value.push_str(text),
            Piece::Char(c) => value.push(c),
        }
        value
    };
    let (rest, value) = fold_many0(piece, String::new, append).parse(rest)?;
    let Ok((rest, _)) = tag::<_, _, Fault<'_>>("\"").parse(rest) else {
        return fail(input, "expected a closing double quote on the same line for the argument");
    };
    Ok((rest, Argument { raw: &input[..input.offset(rest)], value }))
}

enum Piece<'a> {
    Text(&'a str),
    Char(char),
}

/// The escapes of Go's interpreted string literals, <https://go.dev/ref/spec#String_literals>. Those that name a byte
/// stop at ASCII, as text here is never anything but UTF-8.
fn escape(input: &str) -> Parsed<'_, char> {
    const NAMED: [(char, char); 9] = [
        ('a', '\x07'),
        ('b', '\x08'),
        ('f', '\x0c'),
        ('n', '\n'),
        ('r', '\r'),
        ('t', '\t'),
        ('v', '\x0b'),
        ('\\', '\\'),
        ('"', '"'),
    ];
    let (rest, _) = char('\\').parse(input)?;
    let named = map_opt(anychar, |name| NAMED.iter().find(|known| known.0 == name).map(|known| known.1));
    let escaped = alt((
        named,
        verify(preceded(char('x'), |rest| code(rest, 2, 16)), char::is_ascii),
        preceded(char('u'), |rest| code(rest, 4, 16)),
        preceded(char('U'), |rest| code(rest, 8, 16)),
        verify(|rest| code(rest, 3, 8), char::is_ascii),
    ))
    .parse(rest);
    // Whatever was tried last, the mistake is the escape as a whole.
    escaped.or_else(|_: Err<Fault<'_>>| fail(input, EXPECTED_ESCAPE))
}

fn code(input: &str, digits: usize, radix: u32) -> Parsed<'_, char> {
    let number = take_while_m_n(digits, digits, move |c: char| c.is_digit(radix));
    map_opt(number, |text| u32::from_str_radix(text, radix).ok().and_then(char::from_u32)).parse(input)
}

fn token<'a>(text: &'static str) -> impl Parser<&'a str, Output = &'a str, Error = Fault<'a>> {
    preceded(space, tag(text))
}

/// White space. Not nom's `multispace0`, whose rest is at the wrong place when the text ends in white space.
fn space(input: &str) -> Parsed<'_, ()> {
    Ok((input.trim_start_matches([' ', '\t', '\r', '\n']), ()))
}

/// Skips white space; when `parser` then does not apply, that is final and `message` is reported there.
fn expect<'a, O>(
    message: &'static str,
    mut parser: impl Parser<&'a str, Output = O, Error = Fault<'a>>,
) -> impl FnMut(&'a str) -> Parsed<'a, O> {
    move |input| {
        let (rest, ()) = space(input)?;
        parser.parse(rest).map_err(|error| match error {
            Err::Error(_) => Err::Failure(Fault::new(rest, message)),
            last => last,
        })
    }
}

fn fail<'a, O>(at: &'a str, message: impl Into<std::borrow::Cow<'static, str>>) -> Parsed<'a, O> {
    Err(Err::Failure(Fault::new(at, message)))
}
