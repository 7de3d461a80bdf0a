//! What stands around a line when it did not come straight from Traefik's file:
//!
//! - the CRI format of Kubernetes (`2026-01-01T00:00:00.000000000Z stdout F ...`),
//! - a JSON object with the line under a key of its own: `log` (Docker's json-file, Fluent Bit), `message` (Vector,
//!   Logstash, Filebeat), `MESSAGE` (`journalctl -o json`; an array of byte values where it is not UTF-8),
//!   `event.original` (Elastic's common schema) or `json` (Filebeat's decoder). The other keys and their order do not
//!   matter. Where the shipper has read the line already, an object stands there instead of a string.
//!
//! An object with any of Traefik's own keys is an access entry and is never opened, whatever else it holds. So no value
//! that a client chose can pass for a line: Traefik writes such values as strings under its own keys, and a client cannot
//! choose a key beyond the prefixes `request_`, `origin_` and `downstream_`.
//!
//! Docker and the CRI cut lines of more than 16 KiB into pieces; the parser above joins them for each stream. A source that
//! takes off a header of its own, such as syslog's, does so before the parser and costs no level.

use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use super::time::parse_rfc3339;
use super::traefik;

/// How Docker's json-file driver begins every line.
pub(super) const DOCKER_START: &[u8] = b"{\"log\":";

/// How it begins with the text itself, which is then unescaped as it is read.
const DOCKER_TEXT_START: &[u8] = b"{\"log\":\"";

/// Envelopes around each other: a container runtime's inside a shipper's.
pub(super) const LEVELS_MAX: usize = 2;

/// Which of a container's two outputs a piece was written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    Stdout,
    Stderr,
}

/// What a JSON object is.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Envelope<'a> {
    /// It has keys of an access entry.
    Access,
    /// Neither an access entry nor an envelope.
    Other,
    /// The line is in the buffer that was handed in.
    Text,
    /// Docker: so is this piece of one.
    Piece { stream: Stream, partial: bool },
    /// The line was read already: its object.
    Object(&'a str),
    /// No JSON object, or one whose line cannot be told.
    Broken,
}

/// A line of the CRI: its stream, whether more of its text follows, and the text.
pub(crate) fn open_cri(line: &[u8]) -> Option<(Stream, bool, &[u8])> {
    if !line.first()?.is_ascii_digit() || line.get(10) != Some(&b'T') {
        return None;
    }
    let mut parts = line.splitn(4, |b| *b == b' ');
    let (time, stream, tags) = (parts.next()?, parts.next()?, parts.next()?);
    parse_rfc3339(std::str::from_utf8(time).ok()?)?;
    let stream = match stream {
        b"stdout" => Stream::Stdout,
        b"stderr" => Stream::Stderr,
        _ => return None,
    };
    // Tags are separated by colons; the first says whether the line is full.
    let partial = match tags.split(|b| *b == b':').next()? {
        b"F" => false,
        b"P" => true,
        _ => return None,
    };
    Some((stream, partial, parts.next().unwrap_or_default()))
}

/// Opens a JSON object. A line that is a string is unescaped into `buffer`.
pub(crate) fn open<'a>(object: &'a [u8], buffer: &mut Vec<u8>) -> Envelope<'a> {
    buffer.clear();
    let mut deserializer = serde_json::Deserializer::from_slice(object);
    let begins_with_text = object.starts_with(DOCKER_TEXT_START);
    let keys = deserializer.deserialize_map(KeysVisitor { first: begins_with_text.then_some(&mut *buffer) });
    let Ok(keys) = keys.and_then(|keys| deserializer.end().map(|()| keys)) else { return Envelope::Broken };
    if keys.is_access {
        return Envelope::Access;
    }
    // Elastic's `log` is an object beside the line: what is no object goes first.
    let found = keys.values.into_iter().flatten().filter(|value| value.get() != "null");
    let (objects, texts): (Vec<&RawValue>, Vec<&RawValue>) = found.partition(|value| value.get().starts_with('{'));
    if let Some(value) = texts.first() {
        buffer.clear();
        if Append(buffer).deserialize(&mut serde_json::Deserializer::from_str(value.get())).is_err() {
            return Envelope::Broken;
        }
    } else if !begins_with_text {
        return objects.first().map_or(Envelope::Other, |object| Envelope::Object(object.get()));
    }
    let is_full = buffer.last() == Some(&b'\n');
    let length = buffer.trim_ascii_end().len();
    if is_full {
        buffer.truncate(length);
    }
    match keys.stream {
        // Fluent Bit's `log` is whole without its line end; what Docker writes has no keys but these.
        Some(stream) if keys.has_time && !keys.has_others => Envelope::Piece { stream, partial: !is_full },
        _ => Envelope::Text,
    }
}

/// Keys that hold the line, best first: the one that keeps it as it was goes before what may have been changed.
#[derive(Clone, Copy)]
enum Holder {
    EventOriginal,
    Journald,
    Message,
    Json,
    Log,
}

const HOLDERS: usize = Holder::Log as usize + 1;

enum Key {
    Holder(Holder),
    Event,
    Stream,
    Time,
    Attrs,
    /// Traefik's own.
    Access,
    Other,
}

impl<'de> Deserialize<'de> for Key {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Name;
        impl Visitor<'_> for Name {
            type Value = Key;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a key")
            }

            fn visit_str<E>(self, name: &str) -> Result<Key, E> {
                Ok(match name {
                    "event.original" => Key::Holder(Holder::EventOriginal),
                    "MESSAGE" => Key::Holder(Holder::Journald),
                    "message" => Key::Holder(Holder::Message),
                    "log" => Key::Holder(Holder::Log),
                    "json" => Key::Holder(Holder::Json),
                    "event" => Key::Event,
                    "stream" => Key::Stream,
                    "time" => Key::Time,
                    "attrs" => Key::Attrs,
                    _ if traefik::is_own_key(name) => Key::Access,
                    _ => Key::Other,
                })
            }
        }
        deserializer.deserialize_str(Name)
    }
}

#[derive(Default)]
struct Keys<'a> {
    values: [Option<&'a RawValue>; HOLDERS],
    stream: Option<Stream>,
    has_time: bool,
    has_others: bool,
    is_access: bool,
}

/// `event` of Elastic's common schema.
#[derive(Deserialize)]
struct Event<'a> {
    #[serde(borrow)]
    original: Option<&'a RawValue>,
}

struct KeysVisitor<'b> {
    /// Takes the text of the first key, where that is a `log`; any other that is found goes before it.
    first: Option<&'b mut Vec<u8>>,
}

impl<'de> Visitor<'de> for KeysVisitor<'_> {
    type Value = Keys<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Keys<'de>, A::Error> {
        let mut keys = Keys::default();
        let has_first = self.first.is_some();
        if let Some(first) = self.first.take() {
            map.next_key::<Key>()?;
            map.next_value_seed(Append(first))?;
        }
        while let Some(key) = map.next_key::<Key>()? {
            let value = map.next_value::<&RawValue>()?;
            let (holder, value) = match key {
                Key::Holder(holder) => (holder, Some(value)),
                Key::Event => {
                    let event = serde_json::from_str::<Event<'de>>(value.get()).ok();
                    (Holder::EventOriginal, event.and_then(|event| event.original))
                }
                Key::Stream => {
                    keys.stream = match value.get() {
                        "\"stdout\"" => Some(Stream::Stdout),
                        "\"stderr\"" => Some(Stream::Stderr),
                        _ => None,
                    };
                    continue;
                }
                Key::Time => {
                    keys.has_time = true;
                    continue;
                }
                Key::Attrs => continue,
                Key::Access => {
                    keys.is_access = true;
                    continue;
                }
                Key::Other => {
                    keys.has_others = true;
                    continue;
                }
            };
            keys.has_others |= !matches!(holder, Holder::Log);
            // Readers differ in which of two equal keys they take.
            let is_second = has_first && matches!(holder, Holder::Log);
            if value.is_some() && (is_second || keys.values[holder as usize].is_some()) {
                return Err(A::Error::custom("the line is there twice"));
            }
            keys.values[holder as usize] = value.or(keys.values[holder as usize]);
        }
        Ok(keys)
    }
}

/// Appends a string, or an array of byte values, to a buffer that is used again for every line.
struct Append<'b>(&'b mut Vec<u8>);

impl<'de> DeserializeSeed<'de> for Append<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Append<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string or an array of byte values")
    }

    fn visit_str<E>(self, text: &str) -> Result<(), E> {
        self.0.extend_from_slice(text.as_bytes());
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut bytes: A) -> Result<(), A::Error> {
        while let Some(byte) = bytes.next_element::<u8>()? {
            self.0.push(byte);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
