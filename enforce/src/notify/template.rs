//! Texts with `{placeholders}`, and the ways to write a value into HTML, JSON, a form or an address. Pure.
//!
//! Only `{name}` is a placeholder, so that the braces of JSON stand for themselves; `{{name}}` is the text `{name}`.

use std::collections::BTreeMap;

/// Longest template, in bytes.
pub(crate) const TEMPLATE_BYTES_MAX: usize = 16 << 10;

/// What can be asked for. A value that a message does not have is empty.
pub(crate) const PLACEHOLDERS: [&str; 29] = [
    "alarm",
    "ban_count",
    "ban_time",
    "counts",
    "event",
    "expires_at",
    "failures",
    "first_seen",
    "host",
    "id",
    "last_seen",
    "look_up",
    "node",
    "nodes",
    "paths",
    "reason",
    "rule",
    "rules",
    "since",
    "statuses",
    "target",
    "targets",
    "text",
    "time",
    "title",
    "total",
    "until",
    "user_agents",
    "version",
];

/// Values by placeholder.
pub(crate) type Values = BTreeMap<&'static str, String>;

/// How a value is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Escape {
    /// As it is.
    Plain,
    /// Inside of HTML text or a quoted attribute.
    Html,
    /// Inside of a JSON string.
    Json,
    /// A value of a form, or a part of an address.
    Url,
}

impl Escape {
    fn write(self, value: &str, out: &mut String) {
        match self {
            Self::Plain => out.push_str(value),
            Self::Html => {
                for character in value.chars() {
                    match character {
                        '&' => out.push_str("&amp;"),
                        '<' => out.push_str("&lt;"),
                        '>' => out.push_str("&gt;"),
                        '"' => out.push_str("&quot;"),
                        other => out.push(other),
                    }
                }
            }
            Self::Json => {
                let quoted = serde_json::Value::from(value).to_string();
                out.push_str(quoted.get(1..quoted.len() - 1).unwrap_or_default());
            }
            Self::Url => {
                for byte in value.bytes() {
                    if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
                        out.push(char::from(byte));
                    } else {
                        out.push_str(&format!("%{byte:02X}"));
                    }
                }
            }
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Text(String),
    Value(&'static str),
}

/// A checked template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Template(Vec<Vec<Piece>>);

impl Template {
    /// Reads a template whose placeholders are among `known`.
    ///
    /// # Errors
    /// What is wrong with it, for the configuration's reader.
    pub(crate) fn parse(text: &str, known: &[&'static str]) -> Result<Self, String> {
        if text.is_empty() || text.len() > TEMPLATE_BYTES_MAX {
            return Err(format!("must have from 1 to {TEMPLATE_BYTES_MAX} bytes"));
        }
        text.split('\n').map(|line| parse_line(line, known)).collect::<Result<_, _>>().map(Self)
    }

    /// The text, with every value. A line whose placeholders are all empty is left out.
    pub(crate) fn render_lines(&self, values: &Values, escape: Escape) -> String {
        let is_empty = |piece: &Piece| match piece {
            Piece::Text(_) => None,
            Piece::Value(name) => Some(values.get(name).is_none_or(String::is_empty)),
        };
        let told = self.0.iter().filter(|line| {
            let mut placeholders = line.iter().filter_map(is_empty).peekable();
            placeholders.peek().is_none() || placeholders.any(|empty| !empty)
        });
        told.map(|line| render_line(line, values, escape)).collect::<Vec<_>>().join("\n")
    }

    /// The text, with every value, and every line.
    pub(crate) fn render(&self, values: &Values, escape: Escape) -> String {
        self.0.iter().map(|line| render_line(line, values, escape)).collect::<Vec<_>>().join("\n")
    }
}

fn render_line(line: &[Piece], values: &Values, escape: Escape) -> String {
    let mut out = String::new();
    for piece in line {
        match piece {
            Piece::Text(text) => out.push_str(text),
            Piece::Value(name) => escape.write(values.get(name).map_or("", String::as_str), &mut out),
        }
    }
    out
}

fn parse_line(line: &str, known: &[&'static str]) -> Result<Vec<Piece>, String> {
    let (mut pieces, mut text, mut rest) = (Vec::new(), String::new(), line);
    while let Some(open) = rest.find('{') {
        let (before, at) = rest.split_at(open);
        text.push_str(before);
        if let Some(name) = at.strip_prefix('{').and_then(named) {
            let Some(name) = known.iter().find(|known| **known == name) else {
                let known: Vec<String> = known.iter().map(|name| format!("{{{name}}}")).collect();
                return Err(format!("unknown placeholder {{{name}}}; known are {}", known.join(" ")));
            };
            pieces.push(Piece::Text(std::mem::take(&mut text)));
            pieces.push(Piece::Value(name));
            rest = &at[name.len() + 2..];
        } else if let Some(name) =
            at.strip_prefix("{{").and_then(named).filter(|name| at[name.len() + 3..].starts_with('}'))
        {
            text.push_str(&at[1..name.len() + 3]);
            rest = &at[name.len() + 4..];
        } else {
            text.push('{');
            rest = &at[1..];
        }
    }
    text.push_str(rest);
    pieces.push(Piece::Text(text));
    pieces.retain(|piece| *piece != Piece::Text(String::new()));
    Ok(pieces)
}

/// The name before the next `}`, if all before it is one.
fn named(text: &str) -> Option<&str> {
    let (name, _) = text.split_once('}')?;
    let is_name = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
    is_name.then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rendered(template: &str, escape: Escape) -> String {
        let values = Values::from([("target", "192.0.2.1".to_owned()), ("paths", "/<a>\"&\n{rule}".to_owned())]);
        Template::parse(template, &PLACEHOLDERS).unwrap().render_lines(&values, escape)
    }

    #[test]
    fn values_are_escaped_for_where_they_stand_and_never_read_as_templates() {
        assert_eq!(rendered("<b>{paths}</b>", Escape::Html), "<b>/&lt;a&gt;&quot;&amp;\n{rule}</b>");
        assert_eq!(rendered(r#"{"a":{"b":"{paths}"}}"#, Escape::Json), r#"{"a":{"b":"/<a>\"&\n{rule}"}}"#);
        assert_eq!(rendered("m={paths}", Escape::Url), "m=%2F%3Ca%3E%22%26%0A%7Brule%7D");
        assert_eq!(rendered("{paths}", Escape::Plain), "/<a>\"&\n{rule}");
    }

    #[test]
    fn braces_stand_for_themselves_unless_they_hold_a_name() {
        assert_eq!(rendered("{{target}} {} {A} { {target}", Escape::Plain), "{target} {} {A} { 192.0.2.1");
        assert_eq!(rendered("{{{target}}}", Escape::Plain), "{{target}}");
        assert_eq!(rendered("ü{target}ü{", Escape::Plain), "ü192.0.2.1ü{");
    }

    #[test]
    fn a_line_that_would_say_nothing_is_left_out() {
        assert_eq!(rendered("a\nRule: {rule}\n{target} {rule}\n\nz", Escape::Plain), "a\n192.0.2.1 \n\nz");
    }

    #[test]
    fn an_unknown_placeholder_names_those_known() {
        let error = Template::parse("{target} {host_name}", &["target", "host"]).unwrap_err();
        assert_eq!(error, "unknown placeholder {host_name}; known are {target} {host}");
        assert!(Template::parse("", &PLACEHOLDERS).is_err());
        assert!(PLACEHOLDERS.is_sorted());
    }
}
