//! `[ingest.sources.NAME]`: what all kinds share, and one kind each.

use std::num::NonZeroU32;
use std::time::Duration;

use proto::settings::{ByteSize, Field, FromValue, Mistakes, Unknown};
use proto::subject::is_name;
use serde::Deserialize;
use serde_json::Value;

use super::file::{FileConfig, RawFile};
use super::http::RawHttp;
use super::nats::{NatsSource, RawNats};
use super::otlp::RawOtlp;
use super::stdin::RawStdin;
use super::syslog::{RawSyslog, SyslogConfig};
use crate::parse::Format;
use crate::source::http::RequestsConfig;
use crate::source::limit::LimitConfig;

/// Default of `line_bytes_max`: Traefik accepts request heads of 1 MiB, honest ones are far below 64 KiB.
const LINE_BYTES_MAX: u64 = 64 << 10;
/// Bounds of `line_bytes_max`: a line must fit into memory a few times, and an access entry needs some room.
const LINE_BYTES_MAX_RANGE: std::ops::RangeInclusive<u64> = 256..=(1 << 20);
/// Default of `silent_after`.
const SILENT_AFTER: Duration = Duration::from_secs(15 * 60);
/// Default of `limits.sender_lines`: ten times what one busy Traefik writes, and a tenth of what a core takes in.
const SENDER_LINES: NonZeroU32 = NonZeroU32::new(50_000).expect("above zero");
/// Default of `limits.burst`.
const BURST: Duration = Duration::from_secs(5);
/// Every kind, as written.
const KINDS: &str = "`file`, `stdin`, `syslog`, `http`, `otlp` or `nats`";

/// One source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceConfig {
    /// Matches `[a-z0-9-]{1,63}`.
    pub name: String,
    /// How its lines are written.
    pub lines: Lines,
    /// Where its lines come from.
    pub kind: SourceKind,
}

/// Kinds of sources.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceKind {
    /// Files that grow and rotate.
    File(FileConfig),
    /// Standard input.
    Stdin,
    /// Syslog over the network or a unix socket.
    Syslog(SyslogConfig),
    /// What shippers publish on a subject.
    Nats(NatsSource),
    /// Requests that bring lines.
    Http(RequestsConfig),
    /// Requests that bring OTLP's logs.
    Otlp(RequestsConfig),
}

/// What every source says of its lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lines {
    /// How they are written.
    pub format: Format,
    /// Longest one in bytes; longer ones are skipped and counted.
    pub line_bytes_max: usize,
    /// Silence that is reported.
    pub silent_after: Duration,
}

impl Default for Lines {
    fn default() -> Self {
        let line_bytes_max = LINE_BYTES_MAX as usize;
        Self { format: Format::Auto, line_bytes_max, silent_after: SILENT_AFTER }
    }
}

/// `[ingest.sources.NAME]` as written, by `type`.
#[derive(Clone, Debug)]
pub enum RawSource {
    /// `file`
    File(RawFile),
    /// `stdin`
    Stdin(RawStdin),
    /// `syslog`
    Syslog(Box<RawSyslog>),
    /// `nats`
    Nats(RawNats),
    /// `http`
    Http(RawHttp),
    /// `otlp`
    Otlp(RawOtlp),
    /// None of them.
    Unknown(Field<String>),
}

impl FromValue for RawSource {
    const SECTION: Option<&'static str> = Some("");

    fn from_value(value: Value) -> Result<Self, String> {
        Ok(match value.get("type").and_then(Value::as_str) {
            Some("file") => Self::File(RawFile::from_value(value)?),
            Some("stdin") => Self::Stdin(RawStdin::from_value(value)?),
            Some("syslog") => Self::Syslog(Box::new(RawSyslog::from_value(value)?)),
            Some("nats") => Self::Nats(RawNats::from_value(value)?),
            Some("http") => Self::Http(RawHttp::from_value(value)?),
            Some("otlp") => Self::Otlp(RawOtlp::from_value(value)?),
            _ if !value.is_object() => return Err(format!("expected a table, got {value}")),
            _ => {
                let kind = value.get("type").cloned().map(String::from_value);
                Self::Unknown(kind.map_or(Field::Absent, |kind| kind.map_or_else(Field::Wrong, Field::Given)))
            }
        })
    }
}

impl RawSource {
    /// The checked source; `None` when its kind is not known.
    pub(super) fn check(self, name: &str, mistakes: &mut Mistakes) -> Option<SourceConfig> {
        if !is_name(name) {
            mistakes.add("", "the name of a source must match [a-z0-9-]{1,63}");
        }
        let (lines, kind) = match self {
            Self::File(file) => file.check(mistakes),
            Self::Stdin(stdin) => stdin.check(mistakes),
            Self::Syslog(syslog) => {
                let (lines, kind) = syslog.check(mistakes);
                (lines, kind?)
            }
            Self::Nats(nats) => nats.check(mistakes),
            Self::Http(http) => {
                let (lines, kind) = http.check(mistakes);
                (lines, kind?)
            }
            Self::Otlp(otlp) => {
                let (lines, kind) = otlp.check(mistakes);
                (lines, kind?)
            }
            Self::Unknown(kind) => {
                if let Some(other) = kind.required("type", mistakes) {
                    mistakes.add("type", format!("expected {KINDS}, got {other:?}"));
                }
                return None;
            }
        };
        Some(SourceConfig { name: name.to_owned(), lines, kind })
    }
}

/// Keys of every source, as written.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct RawLines {
    /// Which kind of source; known by now.
    #[serde(rename = "type")]
    _kind: Field<String>,
    /// `auto`, `json` or `clf`.
    format: Field<String>,
    /// Longest line in bytes; longer ones are skipped and counted.
    line_bytes_max: Field<ByteSize>,
    /// After how long without a line a source that had some is reported.
    silent_after: Field<Duration>,
}

impl RawLines {
    /// The keys, for suggestions.
    pub(super) const KEYS: [&str; 4] = ["type", "format", "line_bytes_max", "silent_after"];

    pub(super) fn check(self, mistakes: &mut Mistakes) -> Lines {
        let format = match self.format.take("format", mistakes).as_deref() {
            None | Some("auto") => Format::Auto,
            Some("json") => Format::Json,
            Some("clf") => Format::Clf,
            Some(other) => {
                mistakes.add("format", format!("expected `auto`, `json` or `clf`, got {other:?}"));
                Format::Auto
            }
        };
        let line_bytes_max = self.line_bytes_max.or("line_bytes_max", ByteSize(LINE_BYTES_MAX), mistakes).0;
        if !LINE_BYTES_MAX_RANGE.contains(&line_bytes_max) {
            mistakes.add("line_bytes_max", "must be from 256 bytes to 1MiB");
        }
        let silent_after = self.silent_after.or("silent_after", SILENT_AFTER, mistakes);
        Lines { format, line_bytes_max: line_bytes_max as usize, silent_after }
    }
}

/// `limits` of a source whose senders are strangers to this host, as written: each per second, 0 = any number.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct RawLimits {
    sender_lines: Field<u32>,
    sender_bytes: Field<ByteSize>,
    lines: Field<u32>,
    bytes: Field<ByteSize>,
    burst: Field<Duration>,
    #[serde(flatten)]
    unknown: Unknown,
}

proto::section!(RawLimits);

impl RawLimits {
    /// Of a source whose senders have no addresses.
    pub(super) fn check_without_senders(mut self, mistakes: &mut Mistakes) -> LimitConfig {
        let why = "is for senders with addresses, which there are none of here";
        if !matches!(std::mem::take(&mut self.sender_lines), Field::Absent) {
            mistakes.add("sender_lines", why);
        }
        if !matches!(std::mem::take(&mut self.sender_bytes), Field::Absent) {
            mistakes.add("sender_bytes", why);
        }
        LimitConfig { sender_lines: None, ..self.check(mistakes) }
    }

    pub(super) fn check(self, mistakes: &mut Mistakes) -> LimitConfig {
        self.unknown.check(&["sender_lines", "sender_bytes", "lines", "bytes", "burst"], mistakes);
        let bytes = |field: Field<ByteSize>, key: &str, mistakes: &mut Mistakes| {
            let size = field.take(key, mistakes)?;
            let size = u32::try_from(size.0);
            if size.is_err() {
                mistakes.add(key, "must be below 4GiB a second");
            }
            NonZeroU32::new(size.ok()?)
        };
        let burst = self.burst.or("burst", BURST, mistakes);
        if !(Duration::from_secs(1)..=Duration::from_secs(60)).contains(&burst) {
            mistakes.add("burst", "must be from 1s to 1m");
        }
        let sender_lines = self.sender_lines.or("sender_lines", SENDER_LINES.get(), mistakes);
        LimitConfig {
            sender_lines: NonZeroU32::new(sender_lines),
            sender_bytes: bytes(self.sender_bytes, "sender_bytes", mistakes),
            lines: self.lines.take("lines", mistakes).and_then(NonZeroU32::new),
            bytes: bytes(self.bytes, "bytes", mistakes),
            burst,
        }
    }
}
