//! Keeps a host's own copy of the ban set in step with the shared one: what ingest and enforce go by.
//!
//! A copy is only ever replaced by a whole set: one that its head counts, of the bucket that this host has seen before,
//! and of no older commit. From anything else bans are taken, but nobody is freed by what it lacks; that is said until it
//! is whole again.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::follow::{Entry, Feed, Followed};
use super::state::{StateEntry, follow_state, parse};
use super::{BusError, Connection};
use crate::ban::{BanChange, BanRecord, Lists};
use crate::bus::banned::Banned;
use crate::bus::memory::BanBucket;
use crate::event::Interest;
use crate::head::{Head, Mark};
use crate::net::Target;
use crate::report::Problem;
use crate::shutdown::Shutdown;
use crate::time::Timestamp;

/// Name of the file in `state_dir` that remembers which commit was applied.
pub const FILE_NAME: &str = "bus.json";
/// The version of that file.
const VERSION: u32 = 1;
/// Wait before the state is looked for again.
const RETRY: Duration = Duration::from_secs(1);
/// How long a set may not agree with its head: a commit's messages arrive one by one.
const SETTLE: Duration = Duration::from_secs(2);
/// How often it is remembered which commit was applied.
const REMEMBER_INTERVAL: Duration = Duration::from_secs(1);

/// What is kept in step.
#[derive(Clone, Debug, Default)]
pub struct Copies {
    /// The ban set, for enforcement.
    pub bans: Option<BanBucket>,
    /// Who may never be banned.
    pub lists: Option<watch::Sender<Arc<Lists>>>,
    /// What rules can match.
    pub interest: Option<watch::Sender<Arc<Interest>>>,
    /// Who is banned, for ingest.
    pub banned: Option<Banned>,
}

/// What is wrong with a copy, for reports, and how far it is behind. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct ReplicaState(Arc<Mutex<(Option<Problem>, u64, Mark)>>);

impl ReplicaState {
    /// What is wrong, changes that wait, and the newest commit applied.
    pub fn get(&self) -> (Option<Problem>, u64, Mark) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, problem: Option<&str>, lag: u64, mark: Mark) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let former = state.0.take().map(|problem| problem.text);
        if former.as_deref() != problem {
            match problem {
                Some(text) => tracing::error!(reason = text, "Ban set of the bus is not followed"),
                None => tracing::info!("Ban set of the bus is followed"),
            }
        }
        *state = (problem.map(Problem::degraded), lag, mark);
    }
}

/// Which commit of which bucket was applied.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Applied {
    version: u32,
    bucket: String,
    #[serde(flatten)]
    mark: Mark,
}

/// Keeps `copies` in step until the shutdown. `state_dir` is where it is remembered what was applied; `None` = nowhere.
///
/// # Errors
/// None: what is wrong is said in `state`, and tried again.
pub async fn run(
    connection: Connection,
    copies: Copies,
    state_dir: Option<PathBuf>,
    state: ReplicaState,
    shutdown: Shutdown,
) -> Result<(), std::convert::Infallible> {
    let applied = state_dir.as_deref().and_then(load).unwrap_or_default();
    let mut replica = Replica {
        connection,
        copies,
        state_dir,
        state,
        applied,
        remembered: Applied::default(),
        remembered_at: Timestamp::EPOCH,
        records: BTreeMap::new(),
        head: None,
        head_at: 0,
        seen: 0,
        whole: false,
        odd_since: None,
        foreign: false,
        changes: Vec::new(),
    };
    loop {
        let problem = tokio::select! {
            error = replica.follow() => error.to_string(),
            () = shutdown.draining() => break,
        };
        replica.state.set(Some(&problem), 0, replica.applied.mark);
        tokio::select! {
            () = tokio::time::sleep(RETRY) => {}
            () = shutdown.draining() => break,
        }
    }
    replica.remember(true).await;
    Ok(())
}

struct Replica {
    connection: Connection,
    copies: Copies,
    state_dir: Option<PathBuf>,
    state: ReplicaState,
    applied: Applied,
    remembered: Applied,
    remembered_at: Timestamp,
    records: BTreeMap<Target, BanRecord>,
    head: Option<Head>,
    /// Number of the head's message.
    head_at: u64,
    /// Number of the newest message.
    seen: u64,
    /// Whether the copies are the whole set.
    whole: bool,
    /// Since when the records have not been what the head counts.
    odd_since: Option<Timestamp>,
    /// Somebody else has written into the bucket.
    foreign: bool,
    /// Since the copies were last brought up to date.
    changes: Vec<BanChange>,
}

impl Replica {
    /// Follows the state until it is another.
    async fn follow(&mut self) -> BusError {
        if let Err(error) = self.connection.ready().await {
            return error;
        }
        let mut feed = match follow_state(&self.connection).await {
            Ok(feed) => feed,
            Err(BusError::Absent { .. }) => {
                return BusError::Absent { what: "the ban set: it is made by `portcullis detect`, and it".to_owned() };
            }
            Err(error) => return error,
        };
        (self.head, self.head_at, self.seen, self.whole, self.odd_since) = (None, 0, 0, false, None);
        self.records.clear();
        self.changes.clear();
        let mut caught_up = false;
        let mut ticks = tokio::time::interval(REMEMBER_INTERVAL);
        loop {
            let followed = tokio::select! {
                followed = feed.next() => followed,
                _ = ticks.tick() => {
                    if caught_up {
                        self.settle(&feed).await;
                    }
                    self.remember(false).await;
                    continue;
                }
            };
            let mut next = Some(followed);
            while let Some(followed) = next {
                match followed {
                    Ok(Followed::CaughtUp) => {
                        caught_up = true;
                        // What is missing of a commit by now has been replaced or deleted since.
                        self.seen = self.seen.max(self.commit_end());
                    }
                    Ok(Followed::Entry(entry)) => self.take(&entry),
                    Err(error) => return error,
                }
                next = feed.try_next();
            }
            if caught_up {
                self.settle(&feed).await;
            }
        }
    }

    fn take(&mut self, entry: &Entry) {
        self.seen = entry.sequence;
        let parsed = match parse(&self.connection, entry) {
            Ok(Some(parsed)) => parsed,
            Ok(None) => return,
            Err(error) => {
                tracing::error!(%error, "An entry of the shared state is left out");
                return;
            }
        };
        match parsed {
            // Detect writes in batches only: what stands alone is of somebody else.
            _ if !entry.batched => self.foreign = true,
            StateEntry::Head(head) => (self.head, self.head_at) = (Some(head), entry.sequence),
            StateEntry::Lists(lists) => {
                if let Some(copy) = &self.copies.lists {
                    copy.send_replace(Arc::new(lists));
                }
            }
            StateEntry::Coverage(coverage) => {
                if let Some(copy) = &self.copies.interest {
                    copy.send_replace(Arc::new(coverage.interest));
                }
            }
            StateEntry::Ban(change) => {
                match &change {
                    BanChange::Put(record) => drop(self.records.insert(record.target, record.clone())),
                    BanChange::Delete(target) => drop(self.records.remove(target)),
                }
                self.changes.push(change);
            }
            StateEntry::Control(_) | StateEntry::Offender(..) | StateEntry::Out(..) => {}
        }
    }

    /// Brings the copies up to date, as far as what was followed can be trusted.
    async fn settle(&mut self, feed: &Feed) {
        let now = self.connection.clock().now();
        let doubt = self.doubt(now);
        let mark = self.head.as_ref().map(|head| head.mark).unwrap_or_default();
        let between = self.seen < self.commit_end();
        if doubt.is_none() && !between && !self.whole {
            self.whole = true;
            self.changes.clear();
            if let Some(banned) = &self.copies.banned {
                banned.replace(self.records.keys().copied());
            }
            if let Some(bans) = &self.copies.bans {
                bans.replace(self.records.values().cloned());
            }
        }
        // A commit is put in force as one, however many pieces it comes in.
        if !between || doubt.is_some() {
            self.publish();
        }
        if self.whole && !between {
            let bucket = self.head.as_ref().map(|head| head.bucket.clone()).unwrap_or_default();
            self.applied = Applied { version: VERSION, bucket, mark };
        }
        // The messages of a commit arrive one by one, so a moment of doubt is nothing to tell.
        let doubt = doubt.filter(|_| self.odd_since.is_none_or(|since| now.since(since) >= SETTLE));
        let foreign = self.foreign.then_some("somebody else writes into the ban bucket; only detect may");
        self.state.set(doubt.as_deref().or(foreign), feed.lag(), mark);
    }

    /// Number of the newest commit's last message.
    fn commit_end(&self) -> u64 {
        self.head_at + self.head.as_ref().map_or(0, |head| head.changes)
    }

    fn publish(&mut self) {
        if self.changes.is_empty() {
            return;
        }
        let changes = std::mem::take(&mut self.changes);
        if let Some(banned) = &self.copies.banned {
            for change in &changes {
                match change {
                    BanChange::Put(record) => banned.put(record.target),
                    BanChange::Delete(target) => banned.remove(target),
                }
            }
        }
        let Some(bans) = &self.copies.bans else { return };
        if self.whole {
            let cause = self.head.as_ref().and_then(|head| head.cause).map(Timestamp::from_nanos);
            bans.publish(changes, cause);
        } else {
            bans.publish_partial(changes);
        }
    }

    /// Why what was followed does not show who is not banned; `None` when it does.
    fn doubt(&mut self, now: Timestamp) -> Option<String> {
        let kept = "this host keeps the bans it has until they end, and adds new ones; to drop them at once, stop \
                    enforce, run `portcullis enforce --teardown` and start it again";
        let Some(head) = &self.head else {
            let text = "no detector has written to the ban set yet";
            return Some(if self.applied.bucket.is_empty() { text.to_owned() } else { format!("{text}: {kept}") });
        };
        if !self.applied.bucket.is_empty() && self.applied.bucket != head.bucket {
            return Some(format!("the ban set was deleted and made anew: {kept}"));
        }
        if head.mark < self.applied.mark {
            return Some(format!("the ban set is older than what this host has applied: {kept}"));
        }
        if head.bans == self.records.len() as u64 {
            self.odd_since = None;
            return None;
        }
        let since = *self.odd_since.get_or_insert(now);
        if self.whole && now.since(since) < SETTLE {
            return None;
        }
        let (found, counted) = (self.records.len(), head.bans);
        Some(format!("the ban set holds {found} targets where detect counts {counted}: {kept}"))
    }

    async fn remember(&mut self, at_once: bool) {
        let now = self.connection.clock().now();
        let due = at_once || now.since(self.remembered_at) >= REMEMBER_INTERVAL;
        let Some(dir) = self.state_dir.clone().filter(|_| due && self.applied != self.remembered) else { return };
        let applied = self.applied.clone();
        let stored = tokio::task::spawn_blocking(move || store(&dir, &applied)).await;
        match stored {
            Ok(Ok(())) => {
                self.remembered = self.applied.clone();
                self.remembered_at = now;
            }
            Ok(Err(error)) => tracing::error!(%error, "Which commit was applied cannot be remembered"),
            Err(_) => {}
        }
    }
}

fn load(dir: &Path) -> Option<Applied> {
    let bytes = std::fs::read(dir.join(FILE_NAME)).ok()?;
    let applied: Result<Applied, _> = serde_json::from_slice(&bytes);
    match applied {
        Ok(applied) if applied.version == VERSION => Some(applied),
        _ => {
            tracing::error!(file = FILE_NAME, "It is not known any more which commit was applied");
            None
        }
    }
}

fn store(dir: &Path, applied: &Applied) -> std::io::Result<()> {
    let (path, fresh) = (dir.join(FILE_NAME), dir.join(format!("{FILE_NAME}.new")));
    std::fs::create_dir_all(dir)?;
    std::fs::write(&fresh, super::encode(applied))?;
    std::fs::File::open(&fresh)?.sync_all()?;
    std::fs::rename(&fresh, &path)
}
