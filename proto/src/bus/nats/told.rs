//! How far a teller of events has told, kept for its successors, and the reading of events from there.
//!
//! The stream of events is read by request; what is published live only says that it is worth asking. The position is a
//! key beside the leases, rewritten by compare-and-swap: who was deposed without noticing learns it there.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use async_nats::HeaderMap;
use futures_util::{FutureExt, StreamExt};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;

use super::follow::{Entry, Start, fetch, first_since, last_of};
use super::nodes::{SILENT_AFTER, STOPPED};
use super::trouble::{Trouble, problem};
use super::{BusError, Connection, Stored, WRONG_LAST_SEQUENCE, answer, encode};
use crate::bus::feed::{Fed, Others};
use crate::report::{NodeReport, Problem, Role};
use crate::subject::{bucket_key, bucket_stream, node_key, told_key};
use crate::time::Timestamp;

/// The version that is written.
const VERSION: u32 = 1;
/// Events that were read and wait to be taken.
const WAITING_MAX: usize = 256;
/// Without a live event for so long, the stream is looked at: one may have been missed.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// Wait after a failure.
const RETRY: Duration = Duration::from_millis(500);
/// Looks for an event that was published live and is not stored yet where we ask.
const CHASES_MAX: u32 = 20;
/// Wait between them.
const CHASE_WAIT: Duration = Duration::from_millis(5);
/// A known number that was stored so long after the newest that was read is of another stream of the same name.
const RECREATED_AFTER: Duration = Duration::from_millis(500);

/// What is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Told {
    version: u32,
    /// Number of the newest event that was told, or left out.
    sequence: u64,
    /// When it was stored; tells a stream that was made anew.
    at: Timestamp,
    /// Whether the service was running, as far as people know.
    running: bool,
}

/// Why a position was not written.
#[derive(Debug, thiserror::Error)]
pub enum TellError {
    /// Somebody else tells.
    #[error("another host tells of events by now")]
    Deposed,
    /// The server.
    #[error(transparent)]
    Bus(#[from] BusError),
}

#[derive(Debug)]
enum Item {
    Begun(Told, u64),
    Event(Entry),
}

/// One teller's reading.
#[derive(Debug)]
pub(crate) struct Session {
    connection: Connection,
    name: String,
    watches: bool,
    /// From the first look on.
    reading: Option<Reading>,
    /// What is written, under which revision; `None` before the beginning.
    told: Option<(Told, u64)>,
    /// When the events were stored that were taken and not told.
    taken: VecDeque<(u64, Timestamp)>,
    /// What was written without an answer, and may be there.
    unanswered: Option<Told>,
    /// Of what is written.
    trouble: Trouble,
}

impl Session {
    pub(crate) fn begin(connection: &Connection, name: &str, watches: bool) -> Self {
        let (connection, name) = (connection.clone(), name.to_owned());
        Self {
            connection,
            name,
            watches,
            reading: None,
            told: None,
            taken: VecDeque::new(),
            unanswered: None,
            trouble: Trouble::default(),
        }
    }

    pub(crate) fn begin_again(&mut self) {
        (self.reading, self.told, self.unanswered) = (None, None, None);
        self.trouble = Trouble::default();
        self.taken.clear();
    }

    pub(crate) async fn next(&mut self) -> Fed {
        loop {
            let reading =
                self.reading.get_or_insert_with(|| Reading::spawn(&self.connection, &self.name, self.watches));
            match reading.items.recv().await {
                Some(item) => {
                    if let Some(fed) = self.take(item) {
                        return fed;
                    }
                }
                // It ends with the client alone.
                None => std::future::pending().await,
            }
        }
    }

    pub(crate) fn try_next(&mut self) -> Option<Fed> {
        while let Ok(item) = self.reading.as_mut()?.items.try_recv() {
            if let Some(fed) = self.take(item) {
                return Some(fed);
            }
        }
        None
    }

    fn take(&mut self, item: Item) -> Option<Fed> {
        match item {
            Item::Begun(told, revision) => {
                self.told = Some((told, revision));
                Some(Fed::Begun { was_running: told.running })
            }
            Item::Event(entry) => {
                match serde_json::from_slice(&entry.payload) {
                    Ok(event) => {
                        self.taken.push_back((entry.sequence, entry.time));
                        // A later moment stands for those that are left out.
                        if self.taken.len() > WAITING_MAX {
                            self.taken.pop_front();
                        }
                        Some(Fed::Event { at: entry.sequence, event: Arc::new(event) })
                    }
                    // Of another version, or of somebody else. It is passed over with the next.
                    Err(error) => {
                        tracing::warn!(%error, sequence = entry.sequence, "An event cannot be read and is left out");
                        None
                    }
                }
            }
        }
    }

    pub(crate) fn problem(&self) -> Option<Problem> {
        let reading = self.reading.as_ref().and_then(|reading| reading.failure.borrow().clone());
        let reading = reading.map(|error| problem("events cannot be read", &error));
        reading.or_else(|| self.trouble.lasting().map(|error| problem("it cannot be noted how far is told", error)))
    }

    pub(crate) async fn tell(&mut self, sequence: u64, running: bool) -> Result<(), TellError> {
        let told = self.write_told(sequence, running).await;
        let outcome = match &told {
            Err(TellError::Bus(error)) => Err(error),
            Ok(()) | Err(TellError::Deposed) => Ok(()),
        };
        self.trouble.note(&self.connection, outcome);
        told
    }

    async fn write_told(&mut self, sequence: u64, running: bool) -> Result<(), TellError> {
        // First what may be there already: else our own would look like somebody else's.
        if let Some(unanswered) = self.unanswered {
            self.put(unanswered).await?;
        }
        let Some((told, _)) = self.told.filter(|_| !self.watches) else { return Ok(()) };
        let sequence = if sequence == 0 { told.sequence } else { sequence };
        // Never before the event itself: a successor would take what follows for another stream.
        let at = self.taken.iter().find(|(taken, _)| *taken >= sequence).or(self.taken.back());
        let at = at.map_or(told.at, |(_, time)| told.at.max(*time));
        // As it is written, so that it is known again.
        let at = Timestamp::from_millis(at.as_millis());
        let fresh = Told { sequence, at, running, ..told };
        if (fresh.sequence, fresh.running) == (told.sequence, told.running) {
            return Ok(());
        }
        self.put(fresh).await
    }

    async fn put(&mut self, fresh: Told) -> Result<(), TellError> {
        let Some((_, revision)) = self.told else { return Ok(()) };
        self.unanswered = Some(fresh);
        let written = match write(&self.connection, &self.name, fresh, revision).await? {
            Some(written) => written,
            // An answer may have been lost: then it says what we meant to write.
            None => match read(&self.connection, &self.name).await? {
                Some((found, written)) if found == fresh => written,
                _ => return Err(TellError::Deposed),
            },
        };
        (self.told, self.unanswered) = (Some((fresh, written)), None);
        self.taken.retain(|(taken, _)| *taken > fresh.sequence);
        Ok(())
    }

    pub(crate) async fn others(&self, node: &str) -> Result<Others, BusError> {
        let bucket = self.connection.subjects().nodes_bucket();
        let filter = bucket_key(&bucket, &node_key(Role::Enforce, "*"));
        let (entries, _) = fetch(&self.connection, &bucket_stream(&bucket), &filter, Start::Sequence(1)).await?;
        let now = self.connection.clock().now();
        let heard = entries.iter().filter(|entry| now.since(entry.time) < SILENT_AFTER);
        let reports = heard.filter_map(|entry| serde_json::from_slice::<NodeReport>(&entry.payload).ok());
        let others = reports.filter(|report| report.node != node).map(|report| match report.duty.as_deref() {
            Some(STOPPED) => Others::Stopped,
            _ => Others::Running,
        });
        Ok(others.max().unwrap_or(Others::None))
    }
}

/// The task that reads, which ends with this.
#[derive(Debug)]
struct Reading {
    items: mpsc::Receiver<Item>,
    /// Why nothing has been read for long.
    failure: watch::Receiver<Option<BusError>>,
    task: JoinHandle<()>,
}

impl Reading {
    fn spawn(connection: &Connection, name: &str, watches: bool) -> Self {
        let (sender, items) = mpsc::channel(WAITING_MAX);
        let (failure_out, failure) = watch::channel(None);
        let outlet =
            Outlet { connection: connection.clone(), sender, trouble: Trouble::default(), failure: failure_out };
        let task = tokio::spawn(follow(outlet, name.to_owned(), watches));
        Self { items, failure, task }
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn read(connection: &Connection, name: &str) -> Result<Option<(Told, u64)>, BusError> {
    let bucket = connection.subjects().duty_bucket();
    let newest = connection.newest(&bucket_stream(&bucket), &bucket_key(&bucket, &told_key(name))).await?;
    let Some(message) = newest else { return Ok(None) };
    let told = message.json::<Told>().filter(|told| told.version == VERSION);
    let garbled = || BusError::Garbled { what: format!("how far {name} has told") };
    Ok(Some((told.ok_or_else(garbled)?, message.seq)))
}

/// Writes over `revision`; `None` when it has changed since.
async fn write(connection: &Connection, name: &str, told: Told, revision: u64) -> Result<Option<u64>, BusError> {
    let subject = bucket_key(&connection.subjects().duty_bucket(), &told_key(name));
    let mut headers = HeaderMap::new();
    headers.insert("Nats-Expected-Last-Subject-Sequence", revision.to_string());
    let message = connection.ask(&subject, headers, encode(&told)).await?;
    match answer::<Stored>("a position", &message.payload) {
        Ok(Stored { seq }) => Ok(Some(seq)),
        Err(BusError::Refused { code: WRONG_LAST_SEQUENCE, .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Where to go on; the end of what is there for who has never told, or only watches.
async fn begin(connection: &Connection, name: &str, watches: bool) -> Result<(Told, u64), BusError> {
    if !watches && let Some(found) = read(connection, name).await? {
        return Ok(found);
    }
    let names = connection.subjects();
    let last = last_of(connection, &names.events_stream(), &names.events()).await?;
    let (sequence, at) = last.unwrap_or((0, connection.clock().now()));
    let told = Told { version: VERSION, sequence, at, running: watches };
    if watches {
        return Ok((told, 0));
    }
    let changed = || BusError::Silent { what: format!("how far {name} has told") };
    Ok((told, write(connection, name, told, 0).await?.ok_or_else(changed)?))
}

/// Where what is read goes, and what becomes of reading.
struct Outlet {
    connection: Connection,
    sender: mpsc::Sender<Item>,
    trouble: Trouble,
    failure: watch::Sender<Option<BusError>>,
}

impl Outlet {
    fn note(&mut self, outcome: Result<(), &BusError>) {
        self.trouble.note(&self.connection, outcome);
        self.failure.send_replace(self.trouble.lasting().cloned());
    }
}

async fn follow(mut outlet: Outlet, name: String, watches: bool) {
    let (told, revision) = loop {
        match begin(&outlet.connection, &name, watches).await {
            Ok(begun) => break begun,
            Err(error) => {
                outlet.note(Err(&error));
                tracing::debug!(%error, name, "Position not read yet");
            }
        }
        tokio::time::sleep(RETRY).await;
    };
    outlet.note(Ok(()));
    if outlet.sender.send(Item::Begun(told, revision)).await.is_err() {
        return;
    }
    let connection = outlet.connection.clone();
    let mut reader = Reader { connection, next: told.sequence.saturating_add(1), newest_at: told.at, outlet };
    loop {
        let error = match reader.run().await {
            Ok(()) => return,
            Err(error) => error,
        };
        reader.outlet.note(Err(&error));
        tracing::debug!(%error, name, "Events cannot be read, it is tried again");
        tokio::time::sleep(RETRY).await;
    }
}

struct Reader {
    connection: Connection,
    next: u64,
    /// When the newest event that was read was stored.
    newest_at: Timestamp,
    outlet: Outlet,
}

impl Reader {
    /// Reads until nobody takes what is read.
    async fn run(&mut self) -> Result<(), BusError> {
        let filter = self.connection.subjects().events();
        let subscribed = self.connection.client.subscribe(filter.clone()).await;
        let mut live = subscribed.map_err(|_| BusError::Silent { what: filter })?;
        let mut connects = self.connection.connects();
        connects.mark_unchanged();
        let mut look = tokio::time::interval(LOOK_INTERVAL);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        self.check_recreated().await?;
        loop {
            if !self.read().await?.1 {
                return Ok(());
            }
            tokio::select! {
                message = live.next() => {
                    let Some(_) = message else { return std::future::pending().await };
                    // All that has come is read at once.
                    while live.next().now_or_never().flatten().is_some() {}
                    if !self.chase().await? {
                        return Ok(());
                    }
                }
                _ = look.tick() => {}
                changed = connects.changed() => if changed.is_ok() { self.check_recreated().await? },
            }
        }
    }

    /// Reads what is there: whether that was anything, and whether somebody takes it.
    async fn read(&mut self) -> Result<(bool, bool), BusError> {
        let (stream, filter) = (self.connection.subjects().events_stream(), self.connection.subjects().events());
        let mut found = false;
        loop {
            let (entries, pending) = fetch(&self.connection, &stream, &filter, Start::Sequence(self.next)).await?;
            self.outlet.note(Ok(()));
            for entry in entries {
                found = true;
                (self.next, self.newest_at) = (entry.sequence + 1, self.newest_at.max(entry.time));
                if self.outlet.sender.send(Item::Event(entry)).await.is_err() {
                    return Ok((found, false));
                }
            }
            if pending == 0 {
                return Ok((found, !self.outlet.sender.is_closed()));
            }
        }
    }

    /// What is told live may not be stored yet where we ask.
    async fn chase(&mut self) -> Result<bool, BusError> {
        for _ in 0..CHASES_MAX {
            let (found, is_taken) = self.read().await?;
            if found || !is_taken {
                return Ok(is_taken);
            }
            tokio::time::sleep(CHASE_WAIT).await;
        }
        self.check_recreated().await?;
        Ok(true)
    }

    /// A stream that was deleted and made anew counts from 1 again.
    async fn check_recreated(&mut self) -> Result<(), BusError> {
        let (stream, filter) = (self.connection.subjects().events_stream(), self.connection.subjects().events());
        let since = self.newest_at.saturating_add(RECREATED_AFTER);
        let first = first_since(&self.connection, &stream, &filter, since).await?;
        if let Some(first) = first.filter(|first| *first < self.next) {
            tracing::warn!(stream, "The stream of events was deleted and made anew");
            self.next = first;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_1_is_readable_for_ever() {
        let text = r#"{"version":1,"sequence":42,"at":"2026-01-08T14:19:15.980Z","running":true}"#;
        let told = Told { version: 1, sequence: 42, at: Timestamp::from_millis(1_767_881_955_980), running: true };
        assert_eq!(serde_json::from_str::<Told>(text).unwrap(), told);
        assert_eq!(serde_json::to_string(&told).unwrap(), text);
    }
}
