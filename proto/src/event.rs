//! One access, as detection sees it, and the batch in which accesses travel.
//!
//! A batch is one arena of text plus fixed-size records that point into it, so that no field is allocated on its own
//! and a batch is cheap to keep and to hand on. Ingest pushes, detect reads [`Event`] views; [`crate::wire`] is how a
//! batch travels between processes.

mod batch;
mod interest;
mod receipt;

use std::net::IpAddr;

pub use batch::{AccessBatch, EVENTS_MAX, HEADERS_MAX, LineCounts, TEXT_BYTES_MAX};
pub(crate) use batch::{Record, Span};
pub use interest::{Interest, StatusSet};
pub use receipt::Receipt;

use crate::client_ip::{Client, NoClient};
use crate::time::Timestamp;

/// What stands for a value that the log line does not have, as in Traefik's own formats.
pub const ABSENT: &str = "-";

/// One access: a view into a batch, or put together by hand in tests.
#[derive(Clone, Copy, Debug)]
pub struct Event<'a> {
    /// When the request began, as logged; `None` when the line has no usable time (arrival stands for it).
    pub time: Option<Timestamp>,
    /// Whose request it was, or why that is not known.
    pub client: Result<Client, NoClient>,
    /// The TCP peer, where the format names it.
    pub peer: Option<IpAddr>,
    /// Status sent to the client; 0 when absent.
    pub status: u16,
    /// Status of the service behind Traefik; 0 when absent or no service answered.
    pub origin_status: u16,
    /// Text fields; [`ABSENT`] where the line has none.
    pub text: Text<'a>,
    /// Request headers that rules ask for (see [`Interest::headers`]), in canonical spelling as logged.
    pub headers: Headers<'a>,
    /// Byte offset of the line in its source's file; 0 for sources without offsets.
    pub offset: u64,
}

/// The text fields of an event; [`ABSENT`] where the line has none.
#[derive(Clone, Copy, Debug)]
pub struct Text<'a> {
    /// Request method, as sent.
    pub method: &'a str,
    /// Path without the query.
    pub path: &'a str,
    /// Query without the `?`; empty when there is none.
    pub query: &'a str,
    /// Requested host, without the port.
    pub host: &'a str,
    /// Protocol (`HTTP/1.1`, `HTTP/2.0`).
    pub protocol: &'a str,
    /// `User-Agent` header, where the log keeps it.
    pub user_agent: &'a str,
    /// Router, or the chain of routers (`a@file -> b@file`).
    pub router: &'a str,
    /// Service name.
    pub service: &'a str,
    /// Entry point.
    pub entry_point: &'a str,
    /// User name of Basic or Digest authentication.
    pub username: &'a str,
}

impl Default for Text<'_> {
    fn default() -> Self {
        Self {
            method: ABSENT,
            path: ABSENT,
            query: "",
            host: ABSENT,
            protocol: ABSENT,
            user_agent: ABSENT,
            router: ABSENT,
            service: ABSENT,
            entry_point: ABSENT,
            username: ABSENT,
        }
    }
}

/// Number of fields in [`Text`].
pub(crate) const TEXT_FIELDS: usize = 10;

impl<'a> Text<'a> {
    fn as_array(&self) -> [&'a str; TEXT_FIELDS] {
        [
            self.method,
            self.path,
            self.query,
            self.host,
            self.protocol,
            self.user_agent,
            self.router,
            self.service,
            self.entry_point,
            self.username,
        ]
    }

    fn from_array(fields: [&'a str; TEXT_FIELDS]) -> Self {
        let [method, path, query, host, protocol, user_agent, router, service, entry_point, username] = fields;
        Self { method, path, query, host, protocol, user_agent, router, service, entry_point, username }
    }
}

/// Request headers of one event, as name and value pairs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Headers<'a>(HeaderSource<'a>);

#[derive(Clone, Copy, Debug)]
enum HeaderSource<'a> {
    Slice(&'a [(&'a str, &'a str)]),
    Arena { text: &'a str, spans: &'a [(Span, Span)] },
}

impl Default for HeaderSource<'_> {
    fn default() -> Self {
        Self::Slice(&[])
    }
}

impl<'a> Headers<'a> {
    /// Headers from a list of pairs.
    pub fn from_pairs(pairs: &'a [(&'a str, &'a str)]) -> Self {
        Self(HeaderSource::Slice(pairs))
    }

    /// The value of a header, its name compared without regard to ASCII case.
    pub fn get(&self, name: &str) -> Option<&'a str> {
        self.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }

    /// All headers in log order.
    pub fn iter(&self) -> impl Iterator<Item = (&'a str, &'a str)> + use<'a> {
        let (slice, text, spans) = match self.0 {
            HeaderSource::Slice(pairs) => (pairs, "", &[][..]),
            HeaderSource::Arena { text, spans } => (&[][..], text, spans),
        };
        slice.iter().copied().chain(spans.iter().map(move |(name, value)| (name.of(text), value.of(text))))
    }
}

impl Default for Event<'_> {
    fn default() -> Self {
        Self {
            time: None,
            client: Err(NoClient::Absent),
            peer: None,
            status: 0,
            origin_status: 0,
            text: Text::default(),
            headers: Headers::default(),
            offset: 0,
        }
    }
}

/// The stretch of one generation of a file that a batch covers, lines that were no accesses included.
///
/// Consecutive batches of one generation join without a gap, which is how a line counts once however often it is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileSpan {
    /// Hash of the file's inode and first line.
    pub generation: u64,
    /// Offset of the first covered byte.
    pub start: u64,
    /// Offset after the last covered byte.
    pub end: u64,
}

/// Where ingest begins to read the files it knows from an earlier run: the byte offset for each (source, generation).
pub type Positions = std::collections::BTreeMap<(String, u64), Position>;

/// Where to begin in one generation of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// Offset of the first byte to read; the end of the file when all of it is done.
    pub offset: u64,
    /// Whether windows are rebuilt from here, so that it is worth saying when the file is gone.
    pub needed: bool,
}
