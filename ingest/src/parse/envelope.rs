//! What container runtimes put around a line: Docker's json-file (`{"log":"...\n","stream":"stdout","time":"..."}`) and
//! the CRI format of Kubernetes (`2026-01-01T00:00:00.000000000Z stdout F ...`).
//!
//! Both cut lines of more than 16 KiB into pieces; the parser above joins them for each stream. One level only: a line
//! inside an envelope is never taken for an envelope again.

use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};

use super::time::parse_rfc3339;

/// How Docker's json-file driver begins every line.
const DOCKER_START: &[u8] = b"{\"log\":";

/// Which of a container's two outputs a piece was written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    Stdout,
    Stderr,
}

/// What a raw line is.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Envelope<'a> {
    /// No envelope.
    Plain,
    /// CRI: a piece, and whether more of its line follows.
    Cri { stream: Stream, partial: bool, text: &'a [u8] },
    /// Docker: the piece is in the buffer that was handed in.
    Docker { stream: Stream, partial: bool },
    /// Begins like Docker's and is not.
    Broken,
}

/// Opens the envelope of `line`. A Docker line is unescaped into `buffer`.
pub(crate) fn open<'a>(line: &'a [u8], buffer: &mut String) -> Envelope<'a> {
    if line.starts_with(DOCKER_START) {
        return open_docker(line, buffer);
    }
    open_cri(line).unwrap_or(Envelope::Plain)
}

fn open_cri(line: &[u8]) -> Option<Envelope<'_>> {
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
    Some(Envelope::Cri { stream, partial, text: parts.next().unwrap_or_default() })
}

fn open_docker(line: &[u8], buffer: &mut String) -> Envelope<'static> {
    buffer.clear();
    let mut deserializer = serde_json::Deserializer::from_slice(line);
    let stream = DockerSeed { buffer }.deserialize(&mut deserializer);
    match stream.and_then(|stream| deserializer.end().map(|()| stream)) {
        Ok(stream) => {
            let partial = !buffer.ends_with('\n');
            buffer.truncate(buffer.trim_end_matches(['\n', '\r']).len());
            Envelope::Docker { stream, partial }
        }
        Err(_) => Envelope::Broken,
    }
}

#[derive(Deserialize)]
enum DockerKey {
    #[serde(rename = "log")]
    Log,
    #[serde(rename = "stream")]
    Stream,
    #[serde(other)]
    Other,
}

struct DockerSeed<'b> {
    buffer: &'b mut String,
}

impl<'de> DeserializeSeed<'de> for DockerSeed<'_> {
    type Value = Stream;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Stream, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for DockerSeed<'_> {
    type Value = Stream;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a line of Docker's json-file driver")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Stream, A::Error> {
        let mut stream = Stream::Stdout;
        while let Some(key) = map.next_key::<DockerKey>()? {
            match key {
                DockerKey::Log => map.next_value_seed(Append(&mut *self.buffer))?,
                DockerKey::Stream => {
                    let is_stderr = map.next_value::<StreamName>()?.0;
                    stream = if is_stderr { Stream::Stderr } else { Stream::Stdout };
                }
                DockerKey::Other => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(stream)
    }
}

/// Whether the name is `stderr`.
struct StreamName(bool);

impl<'de> Deserialize<'de> for StreamName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Name;
        impl Visitor<'_> for Name {
            type Value = StreamName;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the name of an output")
            }

            fn visit_str<E>(self, name: &str) -> Result<StreamName, E> {
                Ok(StreamName(name == "stderr"))
            }
        }
        deserializer.deserialize_str(Name)
    }
}

/// Appends a string to a buffer that is used again for every line.
struct Append<'b>(&'b mut String);

impl<'de> DeserializeSeed<'de> for Append<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Append<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string")
    }

    fn visit_str<E>(self, text: &str) -> Result<(), E> {
        self.0.push_str(text);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn docker_lines_are_unescaped() {
        let mut buffer = String::new();
        let line =
            br#"{"log":"{\"a\":\"b\\u0026\"}\r\n","stream":"stderr","attrs":{"x":"y"},"time":"2026-01-01T00:00:00Z"}"#;
        assert_eq!(open(line, &mut buffer), Envelope::Docker { stream: Stream::Stderr, partial: false });
        assert_eq!(buffer, r#"{"a":"b\u0026"}"#);
        let piece = br#"{"log":"first part","stream":"stdout","time":"2026-01-01T00:00:00Z"}"#;
        assert_eq!(open(piece, &mut buffer), Envelope::Docker { stream: Stream::Stdout, partial: true });
        assert_eq!(open(br#"{"log":"x\n","stream":"stdout"} trailing"#, &mut buffer), Envelope::Broken);
        assert_eq!(open(br#"{"log":7}"#, &mut buffer), Envelope::Broken);
    }

    #[test]
    fn cri_lines_full_and_partial() {
        let mut buffer = String::new();
        let open = |line: &'static [u8], buffer: &mut String| open(line, buffer);
        assert_eq!(
            open(b"2026-01-01T00:00:00.000000000Z stdout F {\"a\": 1}", &mut buffer),
            Envelope::Cri { stream: Stream::Stdout, partial: false, text: b"{\"a\": 1}" }
        );
        assert_eq!(
            open(b"2026-01-01T00:00:00.000000000+02:00 stderr P:x half", &mut buffer),
            Envelope::Cri { stream: Stream::Stderr, partial: true, text: b"half" }
        );
        for line in [&b"2026-01-01T00:00:00Z INF Starting"[..], b"2026-01-01T00:00 stdout F x", b"10.0.0.1 - - [", b""]
        {
            assert_eq!(open(line, &mut buffer), Envelope::Plain);
        }
    }
}
