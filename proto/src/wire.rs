//! Batches as bytes: what travels on the bus and lies in its stream.
//!
//! Two bytes, `P` and the version, then one zstd frame that states its size. In it, in postcard's encoding: a head, and a
//! record for each event. Texts stand in the head, all values of one field after the other, because like compresses best
//! next to like; records hold lengths, never positions. Times and offsets are differences to the event before.
//!
//! Decoding trusts nothing: sizes are checked before memory is taken, every length against what is there, and the result
//! is a batch within its own limits. Each version that was ever written has files in `testdata` that decode for ever.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use zstd::zstd_safe::{find_frame_compressed_size, get_frame_content_size};

use crate::client_ip::{Client, NoClient};
use crate::event::{
    ABSENT, AccessBatch, EVENTS_MAX, FileSpan, HEADERS_MAX, LineCounts, Record, Span, TEXT_BYTES_MAX, TEXT_FIELDS,
};
use crate::net::canonical;
use crate::subject::is_name;
use crate::time::Timestamp;

/// What every batch begins with.
const MAGIC: u8 = b'P';
/// The version that is written.
const VERSION: u8 = 1;
/// Bytes of a batch before compression.
pub const RAW_BYTES_MAX: usize = 8 << 20;
/// The fastest that is worth it: batches are sent within milliseconds.
const LEVEL: i32 = 1;
/// The highest status of a log line.
const STATUS_MAX: u16 = 999;

/// Bytes that are no batch this program can read. None of them ever will be, so they are refused for good.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Something else altogether.
    #[error("not a batch of accesses")]
    NotABatch,
    /// Written by a newer program.
    #[error("a batch of version {0}; this program reads up to version {VERSION}")]
    Version(u8),
    /// The compression is damaged, or more than the one frame is there.
    #[error("a batch with damaged compression")]
    Compression,
    /// More than a batch may hold.
    #[error("a batch of {bytes} bytes, at most {RAW_BYTES_MAX} are read")]
    TooLarge {
        /// Its size before compression.
        bytes: u64,
    },
    /// The content contradicts itself.
    #[error("a damaged batch: {0}")]
    Damaged(&'static str),
}

#[derive(Serialize, Deserialize)]
struct Head<'a> {
    node: &'a str,
    source: &'a str,
    origin: Option<&'a str>,
    span: Option<WireSpan>,
    counts: WireCounts,
    /// Nanoseconds since the epoch.
    read_at: i64,
    filter: u64,
    events: u32,
    text: &'a str,
}

#[derive(Serialize, Deserialize)]
struct WireSpan {
    generation: u64,
    start: u64,
    /// End less start.
    bytes: u64,
}

#[derive(Serialize, Deserialize)]
struct WireCounts {
    lines: u64,
    unparsed: u64,
    oversized: u64,
    withheld: u64,
}

#[derive(Serialize, Deserialize)]
struct WireRecord {
    /// Nanoseconds after the time of the newest event before that has one, or after `read_at`.
    time: Option<i64>,
    client: WireClient,
    peer: WirePeer,
    status: u16,
    origin_status: u16,
    /// See [`length_of`].
    text: [u32; TEXT_FIELDS],
    headers: Vec<(u32, u32)>,
    /// Bytes after the event before, or after the start of the span.
    offset: i64,
}

#[derive(Serialize, Deserialize)]
enum WireClient {
    Absent,
    NotAnAddress,
    OnlyProxies,
    UnvouchedChain,
    Direct(IpAddr),
    ViaProxy(IpAddr),
}

#[derive(Serialize, Deserialize)]
enum WirePeer {
    Absent,
    Client,
    Other(IpAddr),
}

/// What differences are taken to.
struct Base {
    time: i64,
    offset: u64,
}

/// The batch as bytes. It must be within its limits ([`AccessBatch::is_within_limits`]), or nobody will read it.
pub fn encode_batch(batch: &AccessBatch) -> Vec<u8> {
    let text = gather(batch);
    let LineCounts { lines, unparsed, oversized, withheld } = batch.counts;
    let span = batch.span.map(|FileSpan { generation, start, end }| {
        let bytes = end.saturating_sub(start);
        WireSpan { generation, start, bytes }
    });
    let mut base = Base { time: batch.read_at.as_nanos(), offset: batch.span.map_or(0, |span| span.start) };
    let head = Head {
        node: &batch.node,
        source: &batch.source,
        origin: batch.origin.as_deref(),
        span,
        counts: WireCounts { lines, unparsed, oversized, withheld },
        read_at: base.time,
        filter: batch.filter,
        events: batch.records.len() as u32,
        text: &text,
    };
    let mut raw = extend(Vec::with_capacity(text.len() + 64 * (batch.records.len() + 2)), &head);
    for record in &batch.records {
        raw = extend(raw, &WireRecord::new(record, batch, &mut base));
    }
    let mut bytes = vec![MAGIC, VERSION];
    bytes.extend(zstd::bulk::compress(&raw, LEVEL).expect("zstd takes any bytes at this level"));
    bytes
}

fn extend(bytes: Vec<u8>, value: &impl Serialize) -> Vec<u8> {
    postcard::to_extend(value, bytes).expect("a vector takes what has known lengths")
}

/// All texts: field after field, then headers; absent ones need no room.
fn gather(batch: &AccessBatch) -> String {
    let mut text = String::with_capacity(batch.text.len());
    let mut add = |span: Span| {
        let value = span.of(&batch.text);
        text.push_str(if value == ABSENT { "" } else { value });
    };
    for field in 0..TEXT_FIELDS {
        batch.records.iter().for_each(|record| add(record.text[field]));
    }
    for (name, value) in batch.records.iter().flat_map(|record| headers_of(record, batch)) {
        add(*name);
        add(*value);
    }
    text
}

fn headers_of<'a>(record: &Record, batch: &'a AccessBatch) -> &'a [(Span, Span)] {
    let start = record.headers.start as usize;
    batch.headers.get(start..start + record.headers.len as usize).unwrap_or_default()
}

/// 0 for what is absent, else the length and one.
fn length_of(span: Span, text: &str) -> u32 {
    match span.of(text) {
        ABSENT => 0,
        value => value.len() as u32 + 1,
    }
}

impl WireRecord {
    fn new(record: &Record, batch: &AccessBatch, base: &mut Base) -> Self {
        let time = record.time.map(|time| {
            let after = time.as_nanos().wrapping_sub(base.time);
            base.time = time.as_nanos();
            after
        });
        let offset = record.offset.wrapping_sub(base.offset).cast_signed();
        base.offset = record.offset;
        let length = |span: &Span| length_of(*span, &batch.text);
        let headers = headers_of(record, batch).iter().map(|(name, value)| (length(name), length(value)));
        Self {
            time,
            client: WireClient::new(record.client),
            peer: match record.peer {
                None => WirePeer::Absent,
                Some(peer) if record.client.is_ok_and(|client| client.addr == peer) => WirePeer::Client,
                Some(peer) => WirePeer::Other(peer),
            },
            status: record.status,
            origin_status: record.origin_status,
            text: record.text.each_ref().map(length),
            headers: headers.collect(),
            offset,
        }
    }
}

impl WireClient {
    fn new(client: Result<Client, NoClient>) -> Self {
        match client {
            Ok(Client { addr, via_proxy: false }) => Self::Direct(addr),
            Ok(Client { addr, via_proxy: true }) => Self::ViaProxy(addr),
            Err(NoClient::Absent) => Self::Absent,
            Err(NoClient::NotAnAddress) => Self::NotAnAddress,
            Err(NoClient::OnlyProxies) => Self::OnlyProxies,
            Err(NoClient::UnvouchedChain) => Self::UnvouchedChain,
        }
    }

    fn into_client(self) -> Result<Client, NoClient> {
        match self {
            Self::Absent => Err(NoClient::Absent),
            Self::NotAnAddress => Err(NoClient::NotAnAddress),
            Self::OnlyProxies => Err(NoClient::OnlyProxies),
            Self::UnvouchedChain => Err(NoClient::UnvouchedChain),
            Self::Direct(addr) => Ok(Client { addr: canonical(addr), via_proxy: false }),
            Self::ViaProxy(addr) => Ok(Client { addr: canonical(addr), via_proxy: true }),
        }
    }
}

/// The batch that `bytes` are.
pub fn decode_batch(bytes: &[u8]) -> Result<AccessBatch, WireError> {
    let frame = match bytes {
        [MAGIC, VERSION, frame @ ..] => frame,
        [MAGIC, version, ..] if *version > VERSION => return Err(WireError::Version(*version)),
        _ => return Err(WireError::NotABatch),
    };
    let raw = decompress(frame)?;
    let damaged = |_| WireError::Damaged("it ends early or holds what it should not");
    let (head, mut rest) = postcard::take_from_bytes::<Head<'_>>(&raw).map_err(damaged)?;
    let mut decoder = Decoder::new(&head)?;
    for _ in 0..head.events {
        let (record, after) = postcard::take_from_bytes::<WireRecord>(rest).map_err(damaged)?;
        decoder.take_record(record)?;
        rest = after;
    }
    if !rest.is_empty() {
        return Err(WireError::Damaged("something follows the last event"));
    }
    decoder.finish()
}

fn decompress(frame: &[u8]) -> Result<Vec<u8>, WireError> {
    let size = get_frame_content_size(frame).ok().flatten().ok_or(WireError::Compression)?;
    if size > RAW_BYTES_MAX as u64 {
        return Err(WireError::TooLarge { bytes: size });
    }
    if find_frame_compressed_size(frame) != Ok(frame.len()) {
        return Err(WireError::Compression);
    }
    zstd::bulk::decompress(frame, size as usize).map_err(|_| WireError::Compression)
}

/// A batch while it is read. Until [`Decoder::finish`] the start of a text is not known, only its length.
struct Decoder {
    batch: AccessBatch,
    base: Base,
}

impl Decoder {
    fn new(head: &Head<'_>) -> Result<Self, WireError> {
        if ![Some(head.node), Some(head.source), head.origin].into_iter().flatten().all(is_name) {
            return Err(WireError::Damaged("a node or source that is no name"));
        }
        if head.events as usize > EVENTS_MAX {
            return Err(WireError::Damaged("too many events"));
        }
        if head.text.len() > TEXT_BYTES_MAX {
            return Err(WireError::Damaged("too much text"));
        }
        let mut batch = AccessBatch::new(head.node.into(), head.source.into(), Timestamp::from_nanos(head.read_at));
        if let Some(WireSpan { generation, start, bytes }) = head.span {
            let end = start.checked_add(bytes).ok_or(WireError::Damaged("a span beyond the end of all files"))?;
            batch.span = Some(FileSpan { generation, start, end });
        }
        let WireCounts { lines, unparsed, oversized, withheld } = head.counts;
        batch.counts = LineCounts { lines, unparsed, oversized, withheld };
        batch.filter = head.filter;
        batch.origin = head.origin.map(Into::into);
        batch.text.push_str(head.text);
        batch.records.reserve_exact(head.events as usize);
        let base = Base { time: head.read_at, offset: batch.span.map_or(0, |span| span.start) };
        Ok(Self { batch, base })
    }

    fn take_record(&mut self, record: WireRecord) -> Result<(), WireError> {
        let batch = &mut self.batch;
        if record.status > STATUS_MAX || record.origin_status > STATUS_MAX {
            return Err(WireError::Damaged("a status above 999"));
        }
        let offset = self.base.offset.wrapping_add_signed(record.offset);
        if batch.span.is_some_and(|span| !(span.start..span.end).contains(&offset)) {
            return Err(WireError::Damaged("an event outside of the span"));
        }
        self.base.offset = offset;
        if batch.headers.len() + record.headers.len() > HEADERS_MAX {
            return Err(WireError::Damaged("too many headers"));
        }
        let headers = Span { start: batch.headers.len() as u32, len: record.headers.len() as u32 };
        batch.headers.extend(record.headers.into_iter().map(|(name, value)| (unplaced(name), unplaced(value))));
        let client = record.client.into_client();
        let peer = match (record.peer, client) {
            (WirePeer::Absent, _) => None,
            (WirePeer::Client, Ok(client)) => Some(client.addr),
            (WirePeer::Client, Err(_)) => return Err(WireError::Damaged("a peer like a client that is not there")),
            (WirePeer::Other(peer), _) => Some(canonical(peer)),
        };
        let time = record.time.map(|after| {
            self.base.time = self.base.time.wrapping_add(after);
            Timestamp::from_nanos(self.base.time)
        });
        let (status, origin_status) = (record.status, record.origin_status);
        let text = record.text.map(unplaced);
        batch.records.push(Record { time, client, peer, status, origin_status, text, headers, offset });
        Ok(())
    }

    /// Places all texts, in the order in which they were gathered.
    fn finish(mut self) -> Result<AccessBatch, WireError> {
        let AccessBatch { text, records, headers, .. } = &mut self.batch;
        let mut at = ABSENT.len();
        for field in 0..TEXT_FIELDS {
            for record in &mut *records {
                place(&mut record.text[field], text, &mut at)?;
            }
        }
        for (name, value) in headers {
            place(name, text, &mut at)?;
            place(value, text, &mut at)?;
        }
        if at != text.len() { Err(WireError::Damaged("text that belongs to no event")) } else { Ok(self.batch) }
    }
}

/// A text whose place is not known yet, by its length as in [`length_of`].
fn unplaced(length: u32) -> Span {
    length.checked_sub(1).map_or(Span { start: 0, len: 1 }, |len| Span { start: ABSENT.len() as u32, len })
}

/// Gives `span` the place `at`, and moves that on.
fn place(span: &mut Span, text: &str, at: &mut usize) -> Result<(), WireError> {
    if span.start == 0 {
        return Ok(());
    }
    let end = *at + span.len as usize;
    if !text.is_char_boundary(end) {
        return Err(WireError::Damaged("a text that ends where there is no end"));
    }
    span.start = *at as u32;
    *at = end;
    Ok(())
}

#[cfg(test)]
mod tests;
