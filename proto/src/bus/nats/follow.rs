//! Following a stream without a consumer: what is there is fetched in batches, what comes is published again by the
//! server once it is stored, and whatever that misses is fetched.
//!
//! Stored messages are numbered without gaps and every one of them is published again, so a gap shows what was missed: on
//! its way through the cluster, during a reconnect, or in the client because we were slow.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use async_nats::{HeaderMap, Message, Subscriber};
use bytes::Bytes;
use futures_util::StreamExt;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;

use super::{BusError, Connection, REQUEST_TIMEOUT, encode};
use crate::time::Timestamp;

/// Messages fetched at once.
const FETCH_MESSAGES: usize = 1000;
/// Bytes fetched at once, about.
const FETCH_BYTES: usize = 8 << 20;
/// Bytes that may wait for us; what comes then is fetched later.
const WAITING_BYTES_MAX: usize = 16 << 20;
/// Without a message for so long, the stream is looked at: the last ones may have been missed.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// First wait after a failure, doubled with each.
const RETRY_FIRST: Duration = Duration::from_millis(50);
/// Longest wait after a failure.
const RETRY_MAX: Duration = Duration::from_secs(2);

/// A message with a number that is known, stored so long after the newest that was given, is of another stream of the same
/// name. Servers' clocks differ by less.
const RECREATED_AFTER: Duration = Duration::from_millis(500);
/// How long the next message of an answer may take.
const MORE_TIMEOUT: Duration = Duration::from_secs(1);
/// Failures in a row before they are told.
const FAILURES_SILENT: u32 = 3;
/// Fetches for a number that was seen and is not found: it has been deleted, or the copy that answers is behind.
const CHASES_MAX: u32 = 20;
/// Wait between them.
const CHASE_WAIT: Duration = Duration::from_millis(5);

/// One stored message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its number in the stream.
    pub sequence: u64,
    /// When the server stored it.
    pub time: Timestamp,
    /// The subject it was published to.
    pub subject: String,
    /// Whether it says that its key is deleted.
    pub deleted: bool,
    /// Whether it was stored as part of an atomic batch.
    pub batched: bool,
    /// Whether it is the last of its batch.
    pub ends_batch: bool,
    /// What it holds.
    pub payload: Bytes,
}

/// What following brings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Followed {
    /// The next message.
    Entry(Entry),
    /// Everything that was there has been given. Comes again after each time that something had to be fetched.
    CaughtUp,
}

/// Where to begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// With the message of this number, or the next that is there.
    Sequence(u64),
    /// With the first message stored at or after this moment; with this number where there is none.
    Time(Timestamp, u64),
}

/// A stream as it is being followed.
#[derive(Debug)]
pub struct Feed {
    entries: mpsc::Receiver<Result<Followed, BusError>>,
    lag: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl Feed {
    /// The next message, or that there is none for now. Waits as long as it takes, through every failure of the
    /// connection. Nothing is lost when this is dropped half-way.
    ///
    /// # Errors
    /// [`BusError::Recreated`]: nothing that was known of the stream holds any more. It is the last word.
    pub async fn next(&mut self) -> Result<Followed, BusError> {
        match self.entries.recv().await {
            Some(followed) => followed,
            // The last word was given.
            None => std::future::pending().await,
        }
    }

    /// What can be had without waiting.
    pub fn try_next(&mut self) -> Option<Result<Followed, BusError>> {
        self.entries.try_recv().ok()
    }

    /// How many stored messages have not been fetched yet, as far as known.
    pub fn lag(&self) -> u64 {
        self.lag.load(Ordering::Relaxed)
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Follows `stream`, whose messages have the subjects of `filter` and are published again to `feed`. At most `waiting_max`
/// messages wait to be taken.
///
/// # Errors
/// When the stream is not there or cannot be asked for.
pub async fn follow(
    connection: &Connection,
    stream: String,
    (filter, feed): (String, String),
    start: Start,
    waiting_max: usize,
) -> Result<Feed, BusError> {
    let mut connects = connection.connects();
    connects.mark_unchanged();
    let subscribed = connection.client.subscribe(feed).await;
    let subscriber = subscribed.map_err(|_| BusError::Silent { what: stream.clone() })?;
    // Is it there?
    fetch_some(connection, &stream, &filter, Start::Sequence(1), 1).await?;
    let (sender, entries) = mpsc::channel(waiting_max);
    let lag = Arc::new(AtomicU64::new(0));
    let follower = Follower {
        connection: connection.clone(),
        stream,
        filter,
        live: Live::new(subscriber),
        connects,
        start,
        next: None,
        seen: 0,
        last: 0,
        given_at: Timestamp::EPOCH,
        lag: lag.clone(),
        behind: true,
        chases: 0,
        failures: 0,
        sender,
    };
    let task = tokio::spawn(follower.run());
    Ok(Feed { entries, lag, task })
}

struct Follower {
    connection: Connection,
    stream: String,
    filter: String,
    live: Live,
    connects: watch::Receiver<u64>,
    start: Start,
    /// Number of the next message; `None` before the first fetch.
    next: Option<u64>,
    /// The newest number that was published again.
    seen: u64,
    /// The newest number that the server told of.
    last: u64,
    /// When the newest message that was given was stored.
    given_at: Timestamp,
    lag: Arc<AtomicU64>,
    /// Whether there may be more to fetch.
    behind: bool,
    /// Fetches that are left until a number that was seen is taken for deleted.
    chases: u32,
    failures: u32,
    sender: mpsc::Sender<Result<Followed, BusError>>,
}

impl Follower {
    async fn run(mut self) {
        let mut look = tokio::time::interval(LOOK_INTERVAL);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let result = if self.behind {
                let start = self.next.map_or(self.start, Start::Sequence);
                let fetched = tokio::select! {
                    fetched = fetch(&self.connection, &self.stream, &self.filter, start) => fetched,
                    // The answer went to a connection that is no more.
                    changed = self.connects.changed(), if self.next.is_some() => {
                        if changed.is_ok() {
                            continue;
                        }
                        return;
                    }
                };
                match fetched {
                    Ok(fetched) => {
                        self.take_fetched(fetched).await;
                        Ok(())
                    }
                    Err(error) => Err(error),
                }
            } else {
                tokio::select! {
                    biased;
                    entry = self.live.receive() => self.take(entry).await,
                    changed = self.connects.changed() => {
                        self.behind = changed.is_ok();
                        Ok(())
                    }
                    _ = look.tick() => {
                        // The last messages may have been missed.
                        self.behind = true;
                        Ok(())
                    }
                }
            };
            match result {
                Ok(()) => {}
                Err(error @ BusError::Recreated { .. }) => {
                    // Who followed may have gone meanwhile.
                    let _gone = self.sender.send(Err(error)).await;
                    return;
                }
                Err(error) => self.wait_after(&error).await,
            }
            if self.sender.is_closed() {
                return;
            }
        }
    }

    async fn take(&mut self, entry: Entry) -> Result<(), BusError> {
        let next = self.next.unwrap_or(0);
        if entry.sequence < next {
            // Known already, unless the numbers have begun anew.
            let is_newer = entry.time > self.given_at.saturating_add(RECREATED_AFTER);
            let stream = self.stream.clone();
            return if is_newer { Err(BusError::Recreated { stream }) } else { Ok(()) };
        }
        self.seen = self.seen.max(entry.sequence);
        if entry.sequence > next {
            self.behind = true;
            self.chases = CHASES_MAX;
        } else {
            self.give(entry).await;
        }
        Ok(())
    }

    async fn give(&mut self, entry: Entry) {
        let sequence = entry.sequence;
        if self.next.is_some_and(|next| sequence < next) {
            return;
        }
        self.last = self.last.max(sequence);
        self.given_at = self.given_at.max(entry.time);
        // That nobody is there any more is noticed after each step.
        let _gone = self.sender.send(Ok(Followed::Entry(entry))).await;
        self.next = Some(sequence + 1);
        self.lag.store(self.last - sequence, Ordering::Relaxed);
    }

    async fn wait_after(&mut self, error: &BusError) {
        self.failures = self.failures.saturating_add(1);
        if self.failures == FAILURES_SILENT {
            tracing::warn!(stream = self.stream, %error, "Stream cannot be read, it is tried again");
        }
        let wait = RETRY_FIRST.saturating_mul(1 << self.failures.min(10)).min(RETRY_MAX);
        tokio::time::sleep(wait).await;
    }

    /// Gives what was fetched, of which `pending` more is there.
    async fn take_fetched(&mut self, (entries, pending): (Vec<Entry>, u64)) {
        self.failures = 0;
        if self.next.is_none() && entries.is_empty() {
            let (Start::Sequence(from) | Start::Time(_, from)) = self.start;
            self.next = Some(from.max(1));
        }
        let nothing = entries.is_empty();
        self.last = self.last.max(entries.last().map_or(0, |entry| entry.sequence + pending));
        for entry in entries {
            self.give(entry).await;
        }
        // Another copy of the stream may have answered, which is a little behind.
        let chasing = self.chases > 0 && self.next.is_some_and(|next| next <= self.seen);
        self.behind = pending > 0 || chasing;
        if chasing && nothing {
            self.chases -= 1;
            tokio::time::sleep(CHASE_WAIT).await;
        }
        if !self.behind {
            // What the newest numbers stood for has been deleted.
            self.lag.store(0, Ordering::Relaxed);
            // Nobody there: noticed above.
            let _gone = self.sender.send(Ok(Followed::CaughtUp)).await;
        }
    }
}

/// Fetches stored messages, oldest first, and how many more there are.
///
/// # Errors
/// When the stream is not there or nobody answers.
pub async fn fetch(
    connection: &Connection,
    stream: &str,
    filter: &str,
    start: Start,
) -> Result<(Vec<Entry>, u64), BusError> {
    fetch_some(connection, stream, filter, start, FETCH_MESSAGES).await
}

/// Number of the first message stored at or after `time`; `None` where there is none.
///
/// # Errors
/// When the stream is not there or nobody answers.
pub async fn first_since(
    connection: &Connection,
    stream: &str,
    filter: &str,
    time: Timestamp,
) -> Result<Option<u64>, BusError> {
    let (entries, _) = fetch_some(connection, stream, filter, Start::Time(time, 0), 1).await?;
    Ok(entries.first().map(|entry| entry.sequence))
}

/// Number and moment of the newest message of `filter`; `None` where there is none.
///
/// # Errors
/// When the stream is not there or nobody answers.
pub async fn last_of(
    connection: &Connection,
    stream: &str,
    filter: &str,
) -> Result<Option<(u64, Timestamp)>, BusError> {
    let what = format!("DIRECT.GET.{stream}");
    let get = encode(&serde_json::json!({"last_by_subj": filter}));
    let message = connection.ask(&format!("$JS.API.{what}"), HeaderMap::new(), get).await?;
    match message.status.map(|status| status.as_u16()) {
        None => {
            let entry = parse(&message).ok_or(BusError::Garbled { what })?;
            Ok(Some((entry.sequence, entry.time)))
        }
        Some(404) => Ok(None),
        Some(code) => Err(BusError::Refused { what, why: message.description.unwrap_or_default(), code: code.into() }),
    }
}

async fn fetch_some(
    connection: &Connection,
    stream: &str,
    filter: &str,
    start: Start,
    messages_max: usize,
) -> Result<(Vec<Entry>, u64), BusError> {
    let what = format!("DIRECT.GET.{stream}");
    let silent = || BusError::Silent { what: what.clone() };
    let mut get = serde_json::json!({"batch": messages_max, "max_bytes": FETCH_BYTES, "next_by_subj": filter});
    match start {
        Start::Sequence(sequence) => get["seq"] = sequence.max(1).into(),
        Start::Time(time, _) => get["start_time"] = render_time(time).into(),
    }
    if !connection.is_up() {
        return Err(silent());
    }
    let inbox = connection.client.new_inbox();
    let mut answers = connection.client.subscribe(inbox.clone()).await.map_err(|_| silent())?;
    let subject = format!("$JS.API.{what}");
    let asked = connection.client.publish_with_reply(subject, inbox, encode(&get).into());
    asked.await.map_err(|_| silent())?;
    let mut entries = Vec::new();
    loop {
        // Once it has begun, an answer does not stop half-way.
        let patience = if entries.is_empty() { REQUEST_TIMEOUT } else { MORE_TIMEOUT };
        let message = tokio::time::timeout(patience, answers.next()).await;
        let message = message.map_err(|_| silent())?.ok_or_else(silent)?;
        match message.status.map(|status| status.as_u16()) {
            None => entries.push(parse(&message).ok_or_else(|| BusError::Garbled { what: what.clone() })?),
            Some(204) => return Ok((entries, number(message.headers.as_ref(), "Nats-Num-Pending").unwrap_or(0))),
            Some(404) => return Ok((entries, 0)),
            Some(503) => return Err(BusError::Absent { what: stream.to_owned() }),
            Some(code) => {
                let why = message.description.unwrap_or_default();
                return Err(BusError::Refused { what, why, code: code.into() });
            }
        }
    }
}

/// Seconds and nanoseconds: milliseconds would leave out what was stored right before.
fn render_time(time: Timestamp) -> String {
    let whole = Timestamp::from_secs(time.as_nanos().div_euclid(1_000_000_000)).to_string();
    let fraction = time.as_nanos().rem_euclid(1_000_000_000);
    format!("{}.{fraction:09}Z", whole.get(..19).unwrap_or_default())
}

/// A header that the server adds. It stands behind what a publisher wrote under that name, who is not believed.
fn header<'a>(headers: Option<&'a HeaderMap>, name: &str) -> Option<&'a str> {
    headers?.get_last(name).map(|value| value.as_str())
}

fn number(headers: Option<&HeaderMap>, name: &str) -> Option<u64> {
    header(headers, name)?.parse().ok()
}

fn parse(message: &Message) -> Option<Entry> {
    let headers = message.headers.as_ref();
    let operation = header(headers, "KV-Operation");
    let marker = header(headers, "Nats-Marker-Reason");
    Some(Entry {
        sequence: number(headers, "Nats-Sequence")?,
        time: Timestamp::parse(header(headers, "Nats-Time-Stamp")?)?,
        subject: header(headers, "Nats-Subject")?.to_owned(),
        deleted: matches!(operation, Some("DEL" | "PURGE")) || marker.is_some(),
        batched: header(headers, "Nats-Batch-Id").is_some(),
        ends_batch: header(headers, "Nats-Batch-Commit").is_some(),
        payload: message.payload.clone(),
    })
}

/// What comes, held within bounds.
struct Live {
    entries: mpsc::UnboundedReceiver<Entry>,
    waiting_bytes: Arc<AtomicUsize>,
    pump: JoinHandle<()>,
}

fn weight(entry: &Entry) -> usize {
    entry.payload.len() + entry.subject.len()
}

impl Live {
    fn new(mut subscriber: Subscriber) -> Self {
        // Bounded by bytes instead of by number.
        let (sender, entries) = mpsc::unbounded_channel();
        let waiting_bytes = Arc::new(AtomicUsize::new(0));
        let waiting = waiting_bytes.clone();
        let pump = tokio::spawn(async move {
            while let Some(message) = subscriber.next().await {
                let Some(entry) = parse(&message) else { continue };
                let weight = weight(&entry);
                // What does not fit is missed, and fetched when the gap shows.
                if waiting.load(Ordering::Relaxed) + weight > WAITING_BYTES_MAX {
                    continue;
                }
                waiting.fetch_add(weight, Ordering::Relaxed);
                if sender.send(entry).is_err() {
                    return;
                }
            }
        });
        Self { entries, waiting_bytes, pump }
    }

    async fn receive(&mut self) -> Entry {
        match self.entries.recv().await {
            Some(entry) => {
                self.waiting_bytes.fetch_sub(weight(&entry), Ordering::Relaxed);
                entry
            }
            // The client has been closed, so nothing comes any more.
            None => std::future::pending().await,
        }
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.pump.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_written_to_the_nanosecond() {
        let time = Timestamp::from_nanos(1_767_881_955_980_170_592);
        assert_eq!(render_time(time), "2026-01-08T14:19:15.980170592Z");
    }
}
