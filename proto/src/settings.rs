//! Raw configuration: what a file said, before it is checked.
//!
//! A serde struct stops at its first mistake. A [`Field`] keeps the mistake instead, so that the check can report every
//! one of them with its key; [`Unknown`] keeps the keys that nobody knows.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::time::parse_duration;

/// One mistake in a configuration.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mistake {
    /// Dotted key, such as `detect.rules.a.find_time`.
    pub key: String,
    /// What is wrong and what is expected.
    pub text: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.key, self.text)
    }
}

/// Collects mistakes while a configuration is checked.
#[derive(Debug, Default)]
pub struct Mistakes {
    list: Vec<Mistake>,
    prefix: String,
}

impl Mistakes {
    /// None so far.
    pub fn new() -> Self {
        Self::default()
    }

    /// Notes a mistake at `key`, relative to the section being checked.
    pub fn add(&mut self, key: &str, text: impl Into<String>) {
        let key = self.full_key(key);
        self.list.push(Mistake { key, text: text.into() });
    }

    /// Checks a section: keys noted inside are relative to it.
    pub fn within<T>(&mut self, section: &str, check: impl FnOnce(&mut Self) -> T) -> T {
        let outer = self.prefix.clone();
        self.prefix = self.full_key(section);
        let result = check(self);
        self.prefix = outer;
        result
    }

    /// Whether nothing is wrong.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// All mistakes, by key.
    pub fn into_sorted(mut self) -> Vec<Mistake> {
        self.list.sort();
        self.list.dedup();
        self.list
    }

    fn full_key(&self, key: &str) -> String {
        match (self.prefix.is_empty(), key.is_empty()) {
            (true, _) => key.to_owned(),
            (false, true) => self.prefix.clone(),
            (false, false) => format!("{}.{key}", self.prefix),
        }
    }
}

/// A value that a configuration may have given, rightly or wrongly. Use with `#[serde(default)]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Field<T> {
    /// Not given.
    #[default]
    Absent,
    /// Given.
    Given(T),
    /// Given, but not such a value.
    Wrong(String),
    /// Given in the place of a table.
    NoTable(String),
}

impl<T: FromValue> Field<T> {
    fn of(value: Value) -> Self {
        if value.is_null() {
            return Self::Absent;
        }
        let wrong = if T::SECTION.is_some() && !value.is_object() { Self::NoTable } else { Self::Wrong };
        T::from_value(value).map_or_else(wrong, Self::Given)
    }
}

impl<T: FromValue> Field<T> {
    /// The value, `None` when absent or wrong; a wrong one is noted under `key`.
    pub fn take(self, key: &str, mistakes: &mut Mistakes) -> Option<T> {
        match self {
            Self::Absent => None,
            Self::Given(value) => Some(value),
            Self::Wrong(text) => {
                mistakes.add(key, text);
                None
            }
            Self::NoTable(text) => {
                let section = format!("{}{}", mistakes.full_key(key), T::SECTION.unwrap_or_default());
                mistakes.add(key, format!("{text}; write a section [{section}]"));
                None
            }
        }
    }

    /// The value or `default`; a wrong one is noted under `key`.
    pub fn or(self, key: &str, default: T, mistakes: &mut Mistakes) -> T {
        self.take(key, mistakes).unwrap_or(default)
    }

    /// The value; its absence is a mistake too.
    pub fn required(self, key: &str, mistakes: &mut Mistakes) -> Option<T> {
        if matches!(self, Self::Absent) {
            mistakes.add(key, "is required");
        }
        self.take(key, mistakes)
    }
}

impl<'de, T: FromValue> Deserialize<'de> for Field<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Value::deserialize(deserializer).map(Self::of)
    }
}

/// In tables, so that a wrong value is noted under its own key.
impl<T: FromValue> FromValue for Field<T> {
    const SECTION: Option<&'static str> = T::SECTION;

    fn from_value(value: Value) -> Result<Self, String> {
        Ok(Self::of(value))
    }
}

/// Shortest key that is looked for within others.
const SHARED_BYTES_MIN: usize = 4;

/// Keys that the section does not know. Use with `#[serde(flatten)]`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(transparent)]
pub struct Unknown(BTreeMap<String, Value>);

impl Unknown {
    /// Notes every unknown key, with the one of `known` that may be meant, or all of them.
    pub fn check(&self, known: &[&str], mistakes: &mut Mistakes) {
        for key in self.0.keys() {
            mistakes.add(
                key,
                match suggest(key, known) {
                    Some(near) => format!("unknown key; did you mean `{near}`?"),
                    None if known.is_empty() => "unknown key".to_owned(),
                    None => format!("unknown key; known are `{}`", known.join("`, `")),
                },
            );
        }
    }
}

/// The one of `known` that differs from `key` by few letters, or has it in its name.
fn suggest<'a>(key: &str, known: &[&'a str]) -> Option<&'a str> {
    let near = known.iter().map(|known| (distance(key, known), *known)).min();
    let near = near.filter(|(distance, _)| *distance <= key.len().div_ceil(4)).map(|(_, known)| known);
    let has_it = |known: &&&str| key.len() >= SHARED_BYTES_MIN && (known.contains(key) || key.contains(**known));
    near.or_else(|| known.iter().find(has_it).copied())
}

/// Levenshtein distance, for suggestions.
pub fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

/// A type that a configuration value can be read as. The error says what was expected and what stood there.
pub trait FromValue: Sized {
    /// What follows the key in the name of a section that holds it; `None` for what is no table.
    const SECTION: Option<&'static str> = None;

    /// Reads `value`.
    fn from_value(value: Value) -> Result<Self, String>;
}

fn expected(what: &str, got: &Value) -> String {
    format!("expected {what}, got {got}")
}

impl FromValue for String {
    fn from_value(value: Value) -> Result<Self, String> {
        match value {
            Value::String(text) => Ok(text),
            // Environment variables arrive as whatever they look like.
            Value::Number(number) => Ok(number.to_string()),
            Value::Bool(flag) => Ok(flag.to_string()),
            other => Err(expected("a string", &other)),
        }
    }
}

impl FromValue for bool {
    fn from_value(value: Value) -> Result<Self, String> {
        value.as_bool().ok_or_else(|| expected("true or false", &value))
    }
}

macro_rules! from_integer {
    ($($kind:ty),*) => { $(
        impl FromValue for $kind {
            fn from_value(value: Value) -> Result<Self, String> {
                let number = value.as_i64().and_then(|n| <$kind>::try_from(n).ok());
                number.ok_or_else(|| expected(&format!("a whole number from 0 to {}", <$kind>::MAX), &value))
            }
        }
    )* };
}
from_integer!(u8, u16, u32, u64);

impl FromValue for f64 {
    fn from_value(value: Value) -> Result<Self, String> {
        value.as_f64().ok_or_else(|| expected("a number", &value))
    }
}

impl FromValue for Duration {
    fn from_value(value: Value) -> Result<Self, String> {
        match &value {
            Value::String(text) => parse_duration(text),
            other => Err(expected("a duration such as \"10m\"", other)),
        }
    }
}

impl FromValue for PathBuf {
    fn from_value(value: Value) -> Result<Self, String> {
        String::from_value(value).map(Self::from)
    }
}

impl FromValue for IpAddr {
    fn from_value(value: Value) -> Result<Self, String> {
        let text = value.as_str().and_then(|text| text.parse().ok());
        text.ok_or_else(|| expected("an IP address", &value))
    }
}

impl FromValue for SocketAddr {
    fn from_value(value: Value) -> Result<Self, String> {
        let addr = value.as_str().and_then(|text| text.parse().ok());
        addr.ok_or_else(|| expected("an address and a port such as \"127.0.0.1:9477\"", &value))
    }
}

impl<T: FromValue> FromValue for Vec<T> {
    fn from_value(value: Value) -> Result<Self, String> {
        match value {
            Value::Array(items) => items.into_iter().map(T::from_value).collect(),
            other if other.is_object() => Err(expected("a list", &other)),
            other => Err(format!("expected a list such as [{other}], got {other}")),
        }
    }
}

impl<T: FromValue> FromValue for BTreeMap<String, T> {
    const SECTION: Option<&'static str> = if T::SECTION.is_some() { Some(".NAME") } else { Some("") };

    fn from_value(value: Value) -> Result<Self, String> {
        match value {
            Value::Object(entries) => {
                entries.into_iter().map(|(key, value)| T::from_value(value).map(|value| (key, value))).collect()
            }
            other => Err(expected("a table", &other)),
        }
    }
}

/// A part between 0 and 1, written as `"10%"` or `0.1`.
#[derive(Clone, Copy, Debug, PartialEq, Default)]
pub struct Share(pub f64);

impl FromValue for Share {
    fn from_value(value: Value) -> Result<Self, String> {
        let share = match &value {
            Value::String(text) => text
                .strip_suffix('%')
                .and_then(|number| number.trim().parse::<f64>().ok())
                .map(|percent| percent / 100.0),
            other => other.as_f64(),
        };
        let share = share.filter(|share| (0.0..=1.0).contains(share));
        share.map(Self).ok_or_else(|| expected("a share from \"0%\" to \"100%\"", &value))
    }
}

/// A number of bytes, written as `"1MiB"`, `"64KiB"`, `"10MB"` or a plain number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

impl FromValue for ByteSize {
    fn from_value(value: Value) -> Result<Self, String> {
        let size = match &value {
            Value::String(text) => parse_size(text),
            other => other.as_u64(),
        };
        size.map(Self).ok_or_else(|| expected("a size such as \"1MiB\"", &value))
    }
}

fn parse_size(text: &str) -> Option<u64> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let number: u64 = text[..digits].parse().ok()?;
    let unit = match text[digits..].trim() {
        "" | "B" => 1,
        "kB" | "KB" => 1000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return None,
    };
    number.checked_mul(unit)
}

/// Implements [`FromValue`] for raw sections, so that a section can be a [`Field`] itself.
#[macro_export]
macro_rules! section {
    ($($kind:ty),* $(,)?) => { $(
        impl $crate::settings::FromValue for $kind {
            const SECTION: Option<&'static str> = Some("");

            fn from_value(value: serde_json::Value) -> Result<Self, String> {
                if !value.is_object() {
                    return Err(format!("expected a table, got {value}"));
                }
                serde_json::from_value(value).map_err(|error| error.to_string())
            }
        }
    )* };
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[derive(Debug, Default, Deserialize)]
    #[serde(default)]
    struct Raw {
        find_time: Field<Duration>,
        max_retry: Field<u32>,
        jitter: Field<Share>,
        size: Field<ByteSize>,
        inner: Field<Inner>,
        #[serde(flatten)]
        unknown: Unknown,
    }

    #[derive(Debug, Default, Deserialize)]
    #[serde(default)]
    struct Inner {
        flag: Field<bool>,
        #[serde(flatten)]
        unknown: Unknown,
    }

    section!(Inner);

    fn check(value: Value) -> Vec<String> {
        let raw: Raw = serde_json::from_value(value).unwrap();
        let mut mistakes = Mistakes::new();
        mistakes.within("top", |m| {
            raw.unknown.check(&["find_time", "max_retry", "jitter", "size", "inner"], m);
            raw.find_time.required("find_time", m);
            raw.max_retry.or("max_retry", 1, m);
            raw.jitter.take("jitter", m);
            raw.size.take("size", m);
            if let Some(inner) = raw.inner.take("inner", m) {
                m.within("inner", |m| {
                    inner.unknown.check(&["flag"], m);
                    inner.flag.take("flag", m);
                });
            }
        });
        mistakes.into_sorted().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_key_is_suggested_only_where_it_may_be_meant() {
        let known = ["auth", "bot_token", "chat_id", "mode", "webhooks", "backend"];
        for (key, meant) in [
            ("token", Some("bot_token")),
            ("chat", Some("chat_id")),
            ("webhook", Some("webhooks")),
            ("backends", Some("backend")),
            ("mdoe", None),
            ("moed", None),
            ("moda", Some("mode")),
            ("path", None),
            ("url", None),
        ] {
            assert_eq!(suggest(key, &known), meant, "{key}");
        }
        let texts = |value: Value| FromValue::from_value(value).map(|list: Vec<String>| list.len());
        assert_eq!(texts(json!("443")), Err("expected a list such as [\"443\"], got \"443\"".to_owned()));
    }

    #[test]
    fn every_mistake_is_reported_with_its_key() {
        let wrong =
            json!({"find_tme": 1, "max_retry": -1, "jitter": "200%", "size": "1XB", "inner": {"flag": 3, "x": 1}});
        assert_eq!(
            check(wrong),
            [
                "top.find_time: is required",
                "top.find_tme: unknown key; did you mean `find_time`?",
                "top.inner.flag: expected true or false, got 3",
                "top.inner.x: unknown key; known are `flag`",
                "top.jitter: expected a share from \"0%\" to \"100%\", got \"200%\"",
                "top.max_retry: expected a whole number from 0 to 4294967295, got -1",
                "top.size: expected a size such as \"1MiB\", got \"1XB\"",
            ]
        );
        assert_eq!(
            check(json!({"find_time": "1m", "inner": 3})),
            ["top.inner: expected a table, got 3; write a section [top.inner]"]
        );
        assert!(check(json!({"find_time": "1m", "jitter": "10%", "size": "1MiB", "inner": {"flag": true}})).is_empty());
    }
}
