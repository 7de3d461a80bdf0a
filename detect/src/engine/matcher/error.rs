//! What is wrong with a condition, and where.

use std::borrow::Cow;

use nom::Offset;
use nom::error::{ErrorKind, ParseError};

/// Most characters of the faulty line that an error shows on either side of the fault.
const EXCERPT_CHARS_MAX: usize = 60;

/// A mistake in a condition. Displays as message and place, then the line with a caret under the mistake.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message} at {}\n{excerpt}", render_place(*line, *column, *lines))]
pub struct SyntaxError {
    /// Where: bytes from the start of the text, up to its length.
    pub position: usize,
    /// Where: line, from 1.
    pub line: usize,
    /// Where: character of that line, from 1.
    pub column: usize,
    /// What was expected, or what is wrong.
    pub message: String,
    lines: usize,
    excerpt: String,
}

impl SyntaxError {
    pub(super) fn new(source: &str, fault: &Fault<'_>) -> Self {
        let position = source.offset(fault.at);
        let (before, after) = source.split_at(position);
        let start = before.rfind('\n').map_or(0, |newline| newline + 1);
        let before_on_line = &before[start..];
        Self {
            position,
            line: before.matches('\n').count() + 1,
            column: before_on_line.chars().count() + 1,
            message: fault.message.clone().into_owned(),
            lines: source.matches('\n').count() + 1,
            excerpt: render_excerpt(before_on_line, after.lines().next().unwrap_or_default()),
        }
    }
}

fn render_place(line: usize, column: usize, lines: usize) -> String {
    if lines == 1 { format!("column {column}") } else { format!("line {line}, column {column}") }
}

/// The line, cut around the fault, and a caret under its first character.
fn render_excerpt(before: &str, after: &str) -> String {
    let shown = |c: char| if c.is_control() { ' ' } else { c };
    let hidden = before.chars().count().saturating_sub(EXCERPT_CHARS_MAX);
    let mut left: String = before.chars().skip(hidden).map(shown).collect();
    if hidden > 0 {
        left.insert(0, '…');
    }
    let mut right: String = after.chars().take(EXCERPT_CHARS_MAX).map(shown).collect();
    if after.chars().nth(EXCERPT_CHARS_MAX).is_some() {
        right.push('…');
    }
    let indent = " ".repeat(left.chars().count());
    format!("  {left}{right}\n  {indent}^")
}

/// A mistake while parsing: `at` is a part of the source that begins with the fault.
#[derive(Debug)]
pub(super) struct Fault<'a> {
    at: &'a str,
    message: Cow<'static, str>,
}

impl<'a> Fault<'a> {
    pub(super) fn new(at: &'a str, message: impl Into<Cow<'static, str>>) -> Self {
        Self { at, message: message.into() }
    }
}

impl<'a> ParseError<&'a str> for Fault<'a> {
    /// For alternatives that are tried; what is reported in the end comes from [`Fault::new`].
    fn from_error_kind(at: &'a str, _: ErrorKind) -> Self {
        Self::new(at, "expected something else")
    }

    fn append(_: &'a str, _: ErrorKind, other: Self) -> Self {
        other
    }
}
