//! One access, as detection sees it, and the batch in which accesses travel.
//!
//! A batch is one arena of text plus fixed-size records that point into it, so that no field is allocated on its own
//! and a batch can be written to the wire as it stands. Ingest pushes, detect reads [`Event`] views.

use std::net::IpAddr;
use std::sync::Arc;

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
const TEXT_FIELDS: usize = 10;

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

/// What the rules in force look at, so that ingest copies nothing that nobody reads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interest {
    /// Names of request headers, lower case, sorted.
    pub headers: Vec<String>,
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

/// Lines of a batch that led to no event, and those cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LineCounts {
    /// All lines covered.
    pub lines: u64,
    /// Lines that are no access entries.
    pub unparsed: u64,
    /// Lines longer than the limit.
    pub oversized: u64,
}

/// Accesses of one source in log order.
#[derive(Clone, Debug)]
pub struct AccessBatch {
    /// Node that read the lines.
    pub node: Arc<str>,
    /// Source that read the lines.
    pub source: Arc<str>,
    /// Covered stretch; `None` for sources without offsets.
    pub span: Option<FileSpan>,
    /// What was read.
    pub counts: LineCounts,
    /// Version of the predicate it was filtered by; 0 = not filtered.
    pub filter: u64,
    /// When the newest line was read from its source; the start of the way to the kernel, for latency metrics.
    pub read_at: Timestamp,
    text: String,
    records: Vec<Record>,
    headers: Vec<(Span, Span)>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Span {
    start: u32,
    len: u32,
}

impl Span {
    fn of(self, text: &str) -> &str {
        text.get(self.start as usize..(self.start + self.len) as usize).unwrap_or(ABSENT)
    }
}

#[derive(Clone, Copy, Debug)]
struct Record {
    time: Option<Timestamp>,
    client: Result<Client, NoClient>,
    peer: Option<IpAddr>,
    status: u16,
    origin_status: u16,
    text: [Span; TEXT_FIELDS],
    headers: Span,
    offset: u64,
}

impl AccessBatch {
    /// An empty batch. [`ABSENT`] values share the first byte of the arena.
    pub fn new(node: Arc<str>, source: Arc<str>, read_at: Timestamp) -> Self {
        let counts = LineCounts::default();
        let text = ABSENT.to_owned();
        Self { node, source, span: None, counts, filter: 0, read_at, text, records: Vec::new(), headers: Vec::new() }
    }

    /// Appends a copy of `event`. Its headers are all kept: the caller selects them.
    pub fn push(&mut self, event: &Event<'_>) {
        let first_header = self.headers.len();
        for (name, value) in event.headers.iter() {
            let pair = (self.intern(name), self.intern(value));
            self.headers.push(pair);
        }
        let record = Record {
            time: event.time,
            client: event.client,
            peer: event.peer,
            status: event.status,
            origin_status: event.origin_status,
            text: event.text.as_array().map(|field| self.intern(field)),
            headers: Span { start: first_header as u32, len: (self.headers.len() - first_header) as u32 },
            offset: event.offset,
        };
        self.records.push(record);
    }

    fn intern(&mut self, field: &str) -> Span {
        if field == ABSENT {
            return Span { start: 0, len: 1 };
        }
        let start = self.text.len() as u32;
        self.text.push_str(field);
        Span { start, len: field.len() as u32 }
    }

    /// Number of events.
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// Whether there are no events (the batch may cover unparsed lines all the same).
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Bytes of text held: what a batch is cut by. An arena never grows past 4 GiB, as lines and batches are bounded.
    pub fn text_bytes(&self) -> usize {
        self.text.len()
    }

    /// The newest resolved client, and its TCP peer.
    pub fn last_client(&self) -> Option<(Client, Option<IpAddr>)> {
        self.records.iter().rev().find_map(|record| record.client.ok().map(|client| (client, record.peer)))
    }

    /// The events in log order.
    pub fn events(&self) -> impl Iterator<Item = Event<'_>> {
        self.records.iter().map(|record| {
            let start = record.headers.start as usize;
            let spans = self.headers.get(start..start + record.headers.len as usize).unwrap_or(&[]);
            Event {
                time: record.time,
                client: record.client,
                peer: record.peer,
                status: record.status,
                origin_status: record.origin_status,
                text: Text::from_array(record.text.map(|span| span.of(&self.text))),
                headers: Headers(HeaderSource::Arena { text: &self.text, spans }),
                offset: record.offset,
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_gives_back_what_was_pushed() {
        let pairs = [("X-A", "1"), ("X-B", "zwei")];
        let text = Text { path: "/ü", query: "a=b", host: "example.com", ..Text::default() };
        let first = Event { status: 404, text, headers: Headers::from_pairs(&pairs), offset: 7, ..Event::default() };
        let second = Event { text: Text { method: "GET", ..Text::default() }, ..Event::default() };
        let mut batch = AccessBatch::new("n".into(), "s".into(), Timestamp::EPOCH);
        batch.push(&first);
        batch.push(&second);

        let events: Vec<_> = batch.events().collect();
        assert_eq!(events.len(), 2);
        assert_eq!((events[0].text.path, events[0].text.query, events[0].text.method), ("/ü", "a=b", ABSENT));
        assert_eq!((events[0].status, events[0].offset), (404, 7));
        assert_eq!(events[0].headers.get("x-b"), Some("zwei"));
        assert_eq!(events[1].headers.iter().count(), 0);
        assert_eq!(events[1].text.method, "GET");
    }
}
