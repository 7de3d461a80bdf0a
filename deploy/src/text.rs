//! Text that a stranger chose, made safe for a terminal. The one place where this is done.

use std::borrow::Cow;
use std::fmt::Write;

use serde::Serialize;

/// Whether a character can move the cursor, change colours, hide itself or reverse what stands beside it: controls
/// (C0, DEL, C1, so every ANSI sequence too), line separators, bidirectional controls, and format characters without
/// a width.
fn is_unsafe(c: char) -> bool {
    c.is_control()
        || matches!(
            c,
            '\u{ad}'
                | '\u{61c}'
                | '\u{180e}'
                | '\u{200b}'..='\u{200f}'
                | '\u{2028}'..='\u{202e}'
                | '\u{2060}'..='\u{206f}'
                | '\u{feff}'
                | '\u{fff9}'..='\u{fffb}'
                | '\u{e0000}'..='\u{e0fff}'
        )
}

/// `text` with every unsafe character written as an escape (`\n`, `\u{1b}`). All else is left as it is.
pub fn escape(text: &str) -> Cow<'_, str> {
    if !text.contains(is_unsafe) {
        return Cow::Borrowed(text);
    }
    let mut safe = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if is_unsafe(c) { safe.extend(c.escape_default()) } else { safe.push(c) }
    }
    Cow::Owned(safe)
}

/// `value` as one line of JSON in which unsafe characters stand as `\uXXXX`, so that it can be shown on a terminal and
/// still means the same.
pub fn render_json(value: &impl Serialize) -> serde_json::Result<String> {
    let json = serde_json::to_string(value)?;
    // Most lines, and quicker to tell.
    let is_plain = json.bytes().all(|byte| matches!(byte, b' '..=b'~'));
    if is_plain || !json.contains(is_unsafe) {
        return Ok(json);
    }
    let mut safe = String::with_capacity(json.len() + 16);
    for c in json.chars() {
        if is_unsafe(c) {
            // Such characters occur inside strings only, as serde_json adds no white space.
            for unit in c.encode_utf16(&mut [0; 2]) {
                let _ = write!(safe, "\\u{unit:04x}");
            }
        } else {
            safe.push(c);
        }
    }
    Ok(safe)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_stranger_sends_cannot_steer_the_terminal() {
        for (given, shown) in [
            ("/index.php?a=b&c=ü 漢", "/index.php?a=b&c=ü 漢"),
            ("\x1b[2J\x1b]0;owned\x07", "\\u{1b}[2J\\u{1b}]0;owned\\u{7}"),
            ("a\r\nb\tc\0", "a\\r\\nb\\tc\\u{0}"),
            ("\u{9b}31m\u{7f}", "\\u{9b}31m\\u{7f}"),
            ("evil\u{202e}gpj.exe\u{2066}", "evil\\u{202e}gpj.exe\\u{2066}"),
            ("a\u{200b}b\u{feff}c\u{2028}", "a\\u{200b}b\\u{feff}c\\u{2028}"),
        ] {
            assert_eq!(escape(given), shown);
        }
    }

    #[test]
    fn json_lines_are_safe_and_mean_the_same() {
        let given = "\x1b[2J\u{9b}\u{202e}\u{e0041}\n\u{7f}ü\"\\";
        let json = render_json(&given).unwrap();
        assert!(!json.contains(is_unsafe), "{json}");
        assert_eq!(serde_json::from_str::<String>(&json).unwrap(), given);
    }
}
