//! The batch in which accesses travel.

use std::net::IpAddr;
use std::ops::Range;
use std::sync::Arc;

use super::{ABSENT, Event, FileSpan, HeaderSource, Headers, Receipt, TEXT_FIELDS, Text};
use crate::client_ip::{Client, NoClient};
use crate::time::Timestamp;

/// Events of a batch that may leave the process. With the other two limits it keeps a batch on the wire below
/// [`crate::wire::RAW_BYTES_MAX`], whatever its events hold.
pub const EVENTS_MAX: usize = 16_384;
/// Request headers of all its events.
pub const HEADERS_MAX: usize = 262_144;
/// Bytes of text of all its events.
pub const TEXT_BYTES_MAX: usize = 4 << 20;

/// Lines of a batch, and those that led to no event.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LineCounts {
    /// All lines covered.
    pub lines: u64,
    /// Lines that are no access entries.
    pub unparsed: u64,
    /// Lines longer than the limit.
    pub oversized: u64,
    /// Lines that were accesses and are not in the batch, because no rule can match them.
    pub withheld: u64,
}

impl LineCounts {
    fn add(&mut self, other: Self) {
        self.lines += other.lines;
        self.unparsed += other.unparsed;
        self.oversized += other.oversized;
        self.withheld += other.withheld;
    }
}

/// Accesses of one source in log order.
#[derive(Clone, Debug)]
pub struct AccessBatch {
    /// Node that read the lines.
    pub node: Arc<str>,
    /// Source that read the lines.
    pub source: Arc<str>,
    /// Node whose Traefik wrote the lines, where that is another: the word of whoever sent them, and only a name.
    pub origin: Option<Arc<str>>,
    /// Covered stretch; `None` for sources without offsets.
    pub span: Option<FileSpan>,
    /// What was read.
    pub counts: LineCounts,
    /// When the newest line was read from its source; the start of the way to the kernel, for latency metrics.
    pub read_at: Timestamp,
    /// [`Interest::version`](super::Interest::version) that was in force for every line it covers. 0 as long as none is
    /// known, when nothing is withheld and no request header kept, and always within one process.
    pub filter: u64,
    /// For senders who wait until it is safe. They do not travel.
    pub receipts: Vec<Receipt>,
    pub(crate) text: String,
    pub(crate) records: Vec<Record>,
    pub(crate) headers: Vec<(Span, Span)>,
}

/// A stretch of the arena, or of the list of headers.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Span {
    pub(crate) start: u32,
    pub(crate) len: u32,
}

impl Span {
    pub(crate) fn of(self, text: &str) -> &str {
        text.get(self.start as usize..(self.start + self.len) as usize).unwrap_or(ABSENT)
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Record {
    pub(crate) time: Option<Timestamp>,
    pub(crate) client: Result<Client, NoClient>,
    pub(crate) peer: Option<IpAddr>,
    pub(crate) status: u16,
    pub(crate) origin_status: u16,
    pub(crate) text: [Span; TEXT_FIELDS],
    pub(crate) headers: Span,
    pub(crate) offset: u64,
}

impl AccessBatch {
    /// An empty batch. [`ABSENT`] values share the first byte of the arena.
    pub fn new(node: Arc<str>, source: Arc<str>, read_at: Timestamp) -> Self {
        let counts = LineCounts::default();
        let text = ABSENT.to_owned();
        let (origin, receipts, records, headers) = Default::default();
        Self { node, source, origin, span: None, counts, read_at, filter: 0, receipts, text, records, headers }
    }

    /// The node that events are shown under, and that rules see.
    pub fn shown_node(&self) -> &Arc<str> {
        self.origin.as_ref().unwrap_or(&self.node)
    }

    /// Whoever waits for it is told that it is safe.
    pub fn deliver(&mut self) {
        self.receipts.drain(..).for_each(Receipt::deliver);
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

    /// Bytes that the batch takes in memory, about.
    pub fn memory_bytes(&self) -> usize {
        size_of::<Self>() + self.text.len() + size_of_val(&*self.records) + size_of_val(&*self.headers)
    }

    /// Whether it may leave the process.
    pub fn is_within_limits(&self) -> bool {
        self.records.len() <= EVENTS_MAX
            && self.headers.len() <= HEADERS_MAX
            // The arena's first byte is not sent.
            && self.text.len() <= TEXT_BYTES_MAX + ABSENT.len()
    }

    /// Whether `next` goes on where this one ends: of one source, filtered alike, and the next stretch of the same file or
    /// both without offsets.
    pub fn is_followed_by(&self, next: &Self) -> bool {
        let touches = match (self.span, next.span) {
            (Some(span), Some(next)) => span.generation == next.generation && span.end == next.start,
            (None, None) => true,
            _ => false,
        };
        let is_same = self.node == next.node && self.source == next.source && self.origin == next.origin;
        touches && is_same && self.filter == next.filter
    }

    /// Joins `next` to this batch, its receipts as well. Returns whether it did: not when it does not follow, or when more than
    /// `text_bytes_max` bytes of text or too many events would be in one batch.
    pub fn append(&mut self, next: &mut Self, text_bytes_max: usize) -> bool {
        let text_bytes = self.text.len() + next.text.len() - ABSENT.len();
        let is_small = self.records.len() + next.records.len() <= EVENTS_MAX
            && self.headers.len() + next.headers.len() <= HEADERS_MAX
            && text_bytes <= text_bytes_max.min(TEXT_BYTES_MAX);
        if !is_small || !self.is_followed_by(next) {
            return false;
        }
        let text_start = (self.text.len() - ABSENT.len()) as u32;
        let first_header = self.headers.len() as u32;
        // What is absent stays at the first byte, which both arenas have.
        let moved = |span: Span| Span { start: if span.start == 0 { 0 } else { span.start + text_start }, ..span };
        self.text.push_str(&next.text[ABSENT.len()..]);
        self.headers.extend(next.headers.iter().map(|(name, value)| (moved(*name), moved(*value))));
        self.records.extend(next.records.iter().map(|record| Record {
            text: record.text.map(moved),
            headers: Span { start: record.headers.start + first_header, ..record.headers },
            ..*record
        }));
        if let (Some(span), Some(next)) = (&mut self.span, next.span) {
            span.end = next.end;
        }
        self.counts.add(next.counts);
        self.read_at = self.read_at.max(next.read_at);
        self.receipts.append(&mut next.receipts);
        true
    }

    /// The batch in two halves by events, the first of which covers everything up to the second's first event; `None` with
    /// fewer than two events. All counts but those of the first half's own lines go to the second. The
    /// receipts stay with the whole.
    pub fn halve(&self) -> Option<(Self, Self)> {
        let middle = self.len() / 2;
        let border = self.records.get(middle).filter(|_| middle > 0)?.offset;
        let (mut first, mut second) = (self.part(0..middle), self.part(middle..self.len()));
        if let (Some(first), Some(second)) = (&mut first.span, &mut second.span) {
            (first.end, second.start) = (border, border);
        }
        first.counts = LineCounts { lines: middle as u64, ..LineCounts::default() };
        second.counts.lines = self.counts.lines.saturating_sub(middle as u64);
        Some((first, second))
    }

    /// The batch with every text, header names aside, cut to `bytes_max` bytes, at the end of a character, and without
    /// receipts.
    #[must_use]
    pub fn cut_fields(&self, bytes_max: usize) -> Self {
        let mut cut = self.part(0..0);
        for event in self.events() {
            let text = Text::from_array(event.text.as_array().map(|field| cut_text(field, bytes_max)));
            let headers: Vec<_> =
                event.headers.iter().map(|(name, value)| (name, cut_text(value, bytes_max))).collect();
            cut.push(&Event { text, headers: Headers::from_pairs(&headers), ..event });
        }
        cut
    }

    /// The same batch with some of its events only.
    fn part(&self, events: Range<usize>) -> Self {
        let mut part = Self::new(self.node.clone(), self.source.clone(), self.read_at);
        (part.span, part.counts, part.filter) = (self.span, self.counts, self.filter);
        part.origin.clone_from(&self.origin);
        self.events().skip(events.start).take(events.len()).for_each(|event| part.push(&event));
        part
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

fn cut_text(text: &str, bytes_max: usize) -> &str {
    &text[..text.floor_char_boundary(bytes_max)]
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

    fn batch(paths: &[&str], span: (u64, u64)) -> AccessBatch {
        let mut batch = AccessBatch::new("n".into(), "s".into(), Timestamp::from_nanos(span.1 as i64));
        batch.span = Some(FileSpan { generation: 7, start: span.0, end: span.1 });
        batch.counts = LineCounts { lines: paths.len() as u64 + 2, unparsed: 1, withheld: 1, oversized: 0 };
        let headers = [("Referer", "r")];
        for (number, path) in (0..).zip(paths) {
            let text = Text { path, method: "GET", ..Text::default() };
            let headers = Headers::from_pairs(&headers);
            batch.push(&Event { text, headers, offset: span.0 + number, ..Event::default() });
        }
        batch
    }

    fn paths(batch: &AccessBatch) -> Vec<&str> {
        batch
            .events()
            .inspect(|event| assert_eq!(event.headers.get("referer"), Some("r")))
            .map(|e| e.text.path)
            .collect()
    }

    #[test]
    fn consecutive_batches_join_to_what_they_were() {
        let mut first = batch(&["/a", "-"], (10, 20));
        assert!(first.append(&mut batch(&["/b", "/ü"], (20, 40)), 1000));
        assert_eq!(paths(&first), ["/a", "-", "/b", "/ü"]);
        assert_eq!(first.events().map(|event| event.text.method).collect::<Vec<_>>(), ["GET"; 4]);
        assert_eq!(first.span, Some(FileSpan { generation: 7, start: 10, end: 40 }));
        assert_eq!(first.counts, LineCounts { lines: 8, unparsed: 2, withheld: 2, oversized: 0 });
        assert_eq!(first.read_at, Timestamp::from_nanos(40));
    }

    #[test]
    fn batches_with_a_gap_of_other_filters_or_too_large_stay_apart() {
        let apart = |change: fn(&mut AccessBatch), text_bytes_max| {
            let mut next = batch(&["/b"], (20, 40));
            let mut first = batch(&["/a"], (10, 20));
            change(&mut first);
            !first.append(&mut next, text_bytes_max) && paths(&first) == ["/a"]
        };
        assert!(apart(|first| first.filter = 1, 1000));
        assert!(apart(|first| first.source = "t".into(), 1000));
        assert!(apart(|first| first.origin = Some("t".into()), 1000));
        assert!(apart(|first| first.span = None, 1000));
        assert!(apart(|first| first.span = Some(FileSpan { generation: 7, start: 10, end: 19 }), 1000));
        assert!(apart(|first| first.span = Some(FileSpan { generation: 8, start: 10, end: 20 }), 1000));
        // "-", and twice method, path, name and value of the header.
        assert!(apart(|_| {}, 26));
        assert!(!apart(|_| {}, 27));
    }

    #[test]
    fn who_waits_for_one_of_joined_batches_waits_for_all() {
        let (sender, told) = std::sync::mpsc::channel();
        let (mut first, mut next) = (batch(&["/a"], (10, 20)), batch(&["/b"], (20, 40)));
        next.receipts.push(Receipt::new(move |safe| sender.send(safe).unwrap()));
        assert!(first.append(&mut next, 1000));
        drop(next);
        assert!(told.try_recv().is_err());
        first.deliver();
        assert_eq!(told.try_recv(), Ok(true));
    }

    #[test]
    fn halves_cover_what_the_whole_did() {
        let whole = batch(&["/a", "/b", "/c"], (10, 40));
        let (mut first, mut second) = whole.halve().unwrap();
        assert_eq!((paths(&first), paths(&second)), (vec!["/a"], vec!["/b", "/c"]));
        assert_eq!(first.span.unwrap().end, 11);
        assert!(first.append(&mut second, 1000));
        assert_eq!((first.span, first.counts), (whole.span, whole.counts));
        assert!(batch(&["/a"], (10, 40)).halve().is_none());
    }

    #[test]
    fn fields_are_cut_between_characters() {
        let cut = batch(&["/aü"], (0, 9)).cut_fields(3);
        assert_eq!(paths(&cut), ["/a"]);
        assert_eq!((cut.span, cut.len()), (Some(FileSpan { generation: 7, start: 0, end: 9 }), 1));
    }
}
