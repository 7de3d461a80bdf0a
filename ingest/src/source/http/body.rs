//! From the body of a request to its lines. Pure.
//!
//! Nothing of a body is copied but one line at a time. A body is read to its end before its first line counts, so that one
//! with a mistake brings nothing. Values within values are skipped without recursion, however deep they are.

use std::borrow::Cow;
use std::fmt;
use std::ops::ControlFlow;

use serde::Deserializer as _;
use serde::de::{Error, SeqAccess, Visitor};
use serde_json::value::RawValue;

use crate::frame::{Frame, Framer};

/// Bytes that one character of a string takes at most in JSON (`\u0000`).
const ESCAPE_BYTES_MAX: usize = 6;

/// How a body is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyKind {
    /// Lines, each with a line feed at its end: plain text and NDJSON.
    Lines,
    /// One JSON array, or any number of JSON values one after the other. Objects are lines as they are written, strings are
    /// lines.
    Json,
}

/// A body that is not what it was said to be.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// JSON that cannot be read.
    #[error("the body is not the JSON that it should be")]
    Json(#[source] serde_json::Error),
    /// An element that can be no line.
    #[error("element {number} of the body is no line: {reason}")]
    Element {
        /// Counted from 1.
        number: u64,
        /// What it should have been.
        reason: &'static str,
    },
}

/// Takes lines: each without its line end, `None` when it was too long, and its bytes in the body.
pub type Each<'e> = dyn FnMut(Option<&[u8]>, usize) -> ControlFlow<()> + 'e;

/// Hands every line of `body` to `each`, until that breaks. Returns how many there were.
///
/// # Errors
/// When the body is not what it is said to be; lines before the mistake have been handed over.
pub fn split(kind: BodyKind, body: &[u8], line_bytes_max: usize, each: &mut Each<'_>) -> Result<u64, BodyError> {
    match kind {
        BodyKind::Lines => Ok(split_lines(body, line_bytes_max, each)),
        BodyKind::Json => split_json(body, line_bytes_max, each),
    }
}

fn split_lines(body: &[u8], line_bytes_max: usize, each: &mut Each<'_>) -> u64 {
    let (mut framer, mut lines, mut flow) = (Framer::new(0, line_bytes_max), 0, ControlFlow::Continue(()));
    let mut take = |frame: Frame<'_>| {
        if flow.is_continue() {
            lines += 1;
            flow = each(frame.line, (frame.end - frame.start) as usize);
        }
    };
    framer.feed(body, &mut take);
    framer.finish(take);
    lines
}

fn split_json(body: &[u8], line_bytes_max: usize, each: &mut Each<'_>) -> Result<u64, BodyError> {
    let text = std::str::from_utf8(body).map_err(|error| BodyError::Json(Error::custom(error)))?;
    let mut lines = 0;
    let mut take = |value: &RawValue| {
        lines += 1;
        let line =
            element(value.get(), line_bytes_max).map_err(|reason| BodyError::Element { number: lines, reason })?;
        Ok(each(line.as_deref(), value.get().len()))
    };
    if text.trim_ascii_start().starts_with('[') {
        let _flow = each_element(text, &mut take)?;
    } else {
        for value in serde_json::Deserializer::from_str(text).into_iter::<&RawValue>() {
            if take(value.map_err(BodyError::Json)?)?.is_break() {
                break;
            }
        }
    }
    Ok(lines)
}

/// The line that an element is; `None` when it is too long.
fn element(text: &str, line_bytes_max: usize) -> Result<Option<Cow<'_, [u8]>>, &'static str> {
    match text.as_bytes().first() {
        Some(b'{') => Ok((text.len() <= line_bytes_max).then_some(text.as_bytes().into())),
        Some(b'"') if text.len() > string_bytes_max(line_bytes_max) => Ok(None),
        Some(b'"') => {
            let line: String =
                serde_json::from_str(text).map_err(|_| "the string has an escape that is no character")?;
            let line = line.trim_end_matches(['\r', '\n']).as_bytes().to_owned();
            Ok((line.len() <= line_bytes_max).then_some(line.into()))
        }
        _ => Err("expected an object or a string"),
    }
}

/// Bytes that a line and its line end have at most as a string in JSON, its quotes among them.
fn string_bytes_max(line_bytes_max: usize) -> usize {
    line_bytes_max.saturating_add(2).saturating_mul(ESCAPE_BYTES_MAX).saturating_add(2)
}

/// Hands every element of the JSON array `text` to `take`, until that breaks.
///
/// # Errors
/// When `text` is no array, and the errors of `take`.
pub(crate) fn each_element(
    text: &str,
    take: &mut dyn FnMut(&RawValue) -> Result<ControlFlow<()>, BodyError>,
) -> Result<ControlFlow<()>, BodyError> {
    let mut outcome = Ok(ControlFlow::Continue(()));
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let read = deserializer.deserialize_seq(Elements { take, outcome: &mut outcome }).and_then(|()| deserializer.end());
    if matches!(outcome, Ok(ControlFlow::Continue(()))) {
        read.map_err(BodyError::Json)?;
    }
    outcome
}

struct Elements<'t, 'o> {
    take: &'t mut dyn FnMut(&RawValue) -> Result<ControlFlow<()>, BodyError>,
    outcome: &'o mut Result<ControlFlow<()>, BodyError>,
}

impl<'de> Visitor<'de> for Elements<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while let Some(value) = seq.next_element::<&RawValue>()? {
            *self.outcome = (self.take)(value);
            if !matches!(self.outcome, Ok(ControlFlow::Continue(()))) {
                return Err(A::Error::custom("stopped"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn lines(kind: BodyKind, body: &[u8], max: usize) -> Result<Vec<Option<String>>, String> {
        let mut lines = Vec::new();
        let count = split(kind, body, max, &mut |line, _| {
            lines.push(line.map(|line| String::from_utf8_lossy(line).into_owned()));
            ControlFlow::Continue(())
        })
        .map_err(|error| super::super::chain(&error))?;
        assert_eq!(count, lines.len() as u64);
        Ok(lines)
    }

    fn some(lines: &[&str]) -> Result<Vec<Option<String>>, String> {
        Ok(lines.iter().map(|line| Some((*line).to_owned())).collect())
    }

    #[test]
    fn lines_end_with_line_feeds_and_the_last_one_need_not() {
        assert_eq!(lines(BodyKind::Lines, b"", 9), some(&[]));
        assert_eq!(lines(BodyKind::Lines, b"a\r\n\nb", 9), some(&["a", "", "b"]));
        assert_eq!(lines(BodyKind::Lines, b"[1]\n{}\n", 9), some(&["[1]", "{}"]));
        assert_eq!(lines(BodyKind::Lines, b"0123456789\na\n0123456789", 9), Ok(vec![None, Some("a".to_owned()), None]));
    }

    #[test]
    fn elements_of_an_array_are_lines_unchanged() {
        let body = br#" [ {"log":"a\n", "x" : [1, {"y":2}]} , "10.0.0.1 - \"x\"\r\n", {"message":{"a":1}} ] "#;
        let expected = [r#"{"log":"a\n", "x" : [1, {"y":2}]}"#, "10.0.0.1 - \"x\"", r#"{"message":{"a":1}}"#];
        assert_eq!(lines(BodyKind::Json, body, 99), some(&expected));
        assert_eq!(lines(BodyKind::Json, b"[]", 99), some(&[]));
        assert_eq!(lines(BodyKind::Json, b" ", 99), some(&[]));
    }

    #[test]
    fn values_may_follow_each_other_with_and_without_line_feeds() {
        assert_eq!(lines(BodyKind::Json, b"{\"a\":\n1}{\"b\":2}\n{}", 99), some(&["{\"a\":\n1}", "{\"b\":2}", "{}"]));
    }

    #[test]
    fn a_string_is_one_line_whatever_it_holds() {
        assert_eq!(lines(BodyKind::Json, br#"["a\nb"]"#, 9), some(&["a\nb"]));
    }

    #[test]
    fn what_is_no_such_thing_is_told_with_its_place() {
        let told = |body: &[u8]| lines(BodyKind::Json, body, 99).unwrap_err();
        assert!(
            told(b"[{}, 7]").starts_with("element 2 of the body is no line: expected an object"),
            "{}",
            told(b"[{}, 7]")
        );
        assert!(told(br#"["\ud800"]"#).contains("element 1"), "{}", told(br#"["\ud800"]"#));
        assert!(told(b"[{}").contains("column 3"), "{}", told(b"[{}"));
        assert!(told(b"[{}] {}").contains("trailing"), "{}", told(b"[{}] {}"));
        assert!(told(b"{} hello").contains("column"), "{}", told(b"{} hello"));
        assert!(told(b"\xff").contains("utf-8"), "{}", told(b"\xff"));
        assert!(told(b"[[1]]").contains("element 1"));
    }

    #[test]
    fn elements_over_the_limit_are_reported_and_not_kept() {
        let body =
            br#"[{"a":"0123456789"}, "0123456789", {}, "\u0061\u0061\u0061\u0061\u0061\u0061\u0061\u0061\u0061"]"#;
        let expected = vec![None, None, Some("{}".to_owned()), Some("aaaaaaaaa".to_owned())];
        assert_eq!(lines(BodyKind::Json, body, 9), Ok(expected));
    }

    #[test]
    fn deep_values_take_no_stack() {
        let deep = format!("[{{\"a\":{}{}}}]", "[".repeat(1 << 20), "]".repeat(1 << 20));
        assert_eq!(lines(BodyKind::Json, deep.as_bytes(), 99), Ok(vec![None]));
    }

    #[test]
    fn a_break_ends_it() {
        for (kind, body) in
            [(BodyKind::Lines, &b"a\nb\nc"[..]), (BodyKind::Json, b"[{},{},{}]"), (BodyKind::Json, b"{}{}{}")]
        {
            let mut seen = 0;
            let count = split(kind, body, 9, &mut |_, _| {
                seen += 1;
                if seen == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            });
            assert_eq!((count.unwrap(), seen), (2, 2), "{kind:?}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_as_an_array_is_read_again(texts in prop::collection::vec("[^\r\n]{0,20}", 0..20)) {
            let body = serde_json::to_vec(&texts).unwrap();
            let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
            prop_assert_eq!(lines(BodyKind::Json, &body, 200), some(&texts));
        }
    }
}
