//! [pure] Puts the events of several logs into one order.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use proto::client_ip::{Client, NoClient};
use proto::event::{Event, Headers, Text};
use proto::time::Timestamp;

use super::{ReplayFile, ReplayItem};

/// How far in time a file has been read. A single line with a time far ahead does not count: a time more than the horizon
/// after all before it is believed once the next one is not more than the horizon before it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Progress {
    /// Newest time that is believed.
    pub(super) newest: Option<Timestamp>,
    /// A newer time that the next one must confirm.
    leap: Option<Timestamp>,
}

impl Progress {
    /// A file whose first time is known.
    pub(super) fn new(newest: Option<Timestamp>) -> Self {
        Self { newest, leap: None }
    }

    /// Takes the time of the next event; returns whether `newest` has moved.
    pub(super) fn note(&mut self, time: Timestamp, horizon: Duration) -> bool {
        let before = self.newest;
        let confirmed = self.leap.take().filter(|leap| time.saturating_add(horizon) >= *leap);
        self.newest = self.newest.max(confirmed);
        if self.newest.is_some_and(|newest| time <= newest.saturating_add(horizon)) {
            self.newest = self.newest.max(Some(time));
        } else {
            self.leap = Some(time);
        }
        self.newest != before
    }

    /// The newest time, also one that nothing has confirmed.
    pub(super) fn or_leap(&self) -> Option<Timestamp> {
        self.newest.or(self.leap)
    }
}

/// What orders events: time, rank of node and source, offset; the file only so that no two are equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Turn {
    time: Timestamp,
    rank: u32,
    offset: u64,
    file: u32,
    /// Events of one line never compare equal to another's; this keeps the order of arrival for the impossible rest.
    arrival: u64,
}

/// An event that waits, whole.
#[derive(Debug)]
struct Held {
    turn: Turn,
    event_time: Option<Timestamp>,
    client: Result<Client, NoClient>,
    peer: Option<IpAddr>,
    status: u16,
    origin_status: u16,
    /// All texts after each other.
    text: Box<str>,
    /// Where each of the ten fields ends.
    ends: [u32; 10],
    /// Where each header's name and value end, after the fields.
    headers: Vec<(u32, u32)>,
}

impl PartialEq for Held {
    fn eq(&self, other: &Self) -> bool {
        self.turn == other.turn
    }
}
impl Eq for Held {}
impl PartialOrd for Held {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Held {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.turn.cmp(&other.turn)
    }
}

/// Holds events back until their turn has come.
pub(super) struct Merge<'f, K, E> {
    files: &'f [ReplayFile],
    ranks: Vec<u32>,
    horizon: Duration,
    keep: K,
    each: E,
    held: BinaryHeap<Reverse<Box<Held>>>,
    arrivals: u64,
    /// How far in time all files but the one being read have come; `None` when there is none.
    pub(super) others: Option<Timestamp>,
}

impl<'f, K, E> Merge<'f, K, E>
where
    K: FnMut(&Event<'_>) -> bool,
    E: FnMut(ReplayItem<'_>),
{
    pub(super) fn new(files: &'f [ReplayFile], horizon: Duration, keep: K, each: E) -> Self {
        let names: BTreeSet<(&str, &str)> = files.iter().map(|file| (&*file.node, &*file.source)).collect();
        let names: Vec<(&str, &str)> = names.into_iter().collect();
        let rank = |file: &ReplayFile| names.partition_point(|name| *name < (&*file.node, &*file.source)) as u32;
        let ranks = files.iter().map(rank).collect();
        Self { files, ranks, horizon, keep, each, held: BinaryHeap::new(), arrivals: 0, others: None }
    }

    /// Takes the next event of a file, which has been read as far as `progress`, and hands out what need not wait any more.
    pub(super) fn take(&mut self, file: usize, event: &Event<'_>, progress: &mut Progress) {
        let has_moved = event.time.is_some_and(|time| progress.note(time, self.horizon));
        if (self.keep)(event) {
            let time = event.time.or(progress.or_leap()).unwrap_or(Timestamp::EPOCH);
            self.arrivals += 1;
            let turn =
                Turn { time, rank: self.ranks[file], offset: event.offset, file: file as u32, arrival: self.arrivals };
            self.held.push(Reverse(Box::new(Held::new(turn, event))));
        } else if !has_moved {
            return;
        }
        let read_to = progress.newest.unwrap_or(Timestamp::EPOCH);
        self.release(self.others.map_or(read_to, |others| others.min(read_to)));
    }

    fn release(&mut self, read_to: Timestamp) {
        while let Some(Reverse(next)) = self.held.peek()
            && next.turn.time.saturating_add(self.horizon) < read_to
        {
            self.pop();
        }
    }

    /// Hands out what still waits.
    pub(super) fn finish(&mut self) {
        while !self.held.is_empty() {
            self.pop();
        }
    }

    fn pop(&mut self) {
        let Some(Reverse(held)) = self.held.pop() else { return };
        let file = &self.files[held.turn.file as usize];
        let (node, source): (&Arc<str>, &Arc<str>) = (&file.node, &file.source);
        let pairs: Vec<(&str, &str)> = held.headers().collect();
        let event = held.event(&pairs);
        (self.each)(ReplayItem { node, source, path: &file.path, event });
    }
}

impl Held {
    fn new(turn: Turn, event: &Event<'_>) -> Self {
        let Text { method, path, query, host, protocol, user_agent, router, service, entry_point, username } =
            event.text;
        let fields = [method, path, query, host, protocol, user_agent, router, service, entry_point, username];
        let mut text = String::with_capacity(fields.iter().map(|field| field.len()).sum());
        let mut append = |part: &str| {
            text.push_str(part);
            text.len() as u32
        };
        let ends = fields.map(&mut append);
        let headers = event.headers.iter().map(|(name, value)| (append(name), append(value))).collect();
        Self {
            turn,
            event_time: event.time,
            client: event.client,
            peer: event.peer,
            status: event.status,
            origin_status: event.origin_status,
            text: text.into_boxed_str(),
            ends,
            headers,
        }
    }

    fn part(&self, start: u32, end: u32) -> &str {
        self.text.get(start as usize..end as usize).unwrap_or_default()
    }

    fn headers(&self) -> impl Iterator<Item = (&str, &str)> {
        let mut start = self.ends[9];
        self.headers.iter().map(move |(name_end, value_end)| {
            let pair = (self.part(start, *name_end), self.part(*name_end, *value_end));
            start = *value_end;
            pair
        })
    }

    fn event<'a>(&'a self, pairs: &'a [(&'a str, &'a str)]) -> Event<'a> {
        let mut start = 0;
        let [method, path, query, host, protocol, user_agent, router, service, entry_point, username] =
            self.ends.map(|end| self.part(std::mem::replace(&mut start, end), end));
        Event {
            time: self.event_time,
            client: self.client,
            peer: self.peer,
            status: self.status,
            origin_status: self.origin_status,
            text: Text { method, path, query, host, protocol, user_agent, router, service, entry_point, username },
            headers: Headers::from_pairs(pairs),
            offset: self.turn.offset,
        }
    }
}
