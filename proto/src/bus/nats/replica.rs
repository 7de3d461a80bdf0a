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
use tokio::task::JoinHandle;

use super::follow::{Entry, Feed, Followed};
use super::state::{StateEntry, StateError, follow_state, parse};
use super::{BusError, Connection};
use crate::ban::{BanChange, BanRecord, Lists};
use crate::bus::banned::Banned;
use crate::bus::memory::BanBucket;
use crate::event::Interest;
use crate::head::{Head, Mark};
use crate::net::{NetSet, Target};
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
/// How often everything may be read again because the set is not what its head counts.
const REREAD_INTERVAL: Duration = Duration::from_secs(30);
/// A ban that is deleted so shortly before its end has ended: clocks differ by less.
const END_TOLERANCE: Duration = Duration::from_secs(1);
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
    /// How many bans of a former run enforcement keeps that `bans` lacks.
    pub kept: Option<watch::Receiver<u64>>,
}

/// What is wrong with a copy, for reports, and how far it is behind. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct ReplicaState(Arc<Mutex<(Option<Problem>, u64, Mark)>>);

impl ReplicaState {
    /// What is wrong, changes that wait, and the newest commit applied.
    pub fn get(&self) -> (Option<Problem>, u64, Mark) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, problem: Option<Trouble>, lag: u64, mark: Mark) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let former = state.0.take().map(|problem| problem.text);
        let (passing, text) = problem.map_or((true, None), |Trouble { passing, text }| (passing, Some(text)));
        if former != text {
            match &text {
                Some(text) if passing => tracing::warn!(reason = text, "Ban set of the bus is not followed"),
                Some(text) => tracing::error!(reason = text, "Ban set of the bus is not followed"),
                None => tracing::info!("Ban set of the bus is followed"),
            }
        }
        *state = (text.map(Problem::degraded), lag, mark);
    }
}

/// Why the shared set is not followed.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Trouble {
    /// Whether it may pass without anybody's doing.
    passing: bool,
    text: String,
}

impl From<&BusError> for Trouble {
    fn from(error: &BusError) -> Self {
        Self { passing: error.is_passing(), text: error.to_string() }
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
    let mut replica = Replica::new(connection, copies, state_dir, state);
    loop {
        let error = tokio::select! {
            error = replica.follow() => error,
            () = shutdown.draining() => break,
        };
        // What it lacks has been told, and is so until it is found.
        if !matches!(error, BusError::Incomplete { .. }) {
            replica.odd_since = None;
            replica.state.set(Some(Trouble::from(&error)), 0, replica.applied.mark);
        }
        tokio::select! {
            () = tokio::time::sleep(RETRY) => {}
            () = shutdown.draining() => break,
        }
    }
    replica.end().await;
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
    remembering: Option<JoinHandle<()>>,
    records: BTreeMap<Target, BanRecord>,
    lists: Option<Lists>,
    head: Option<Head>,
    /// Number of the head's message.
    head_at: u64,
    /// Number of the newest message.
    seen: u64,
    /// Whether all that was there has been read.
    caught_up: bool,
    /// Whether the copies are the whole set.
    whole: bool,
    /// Since when the records have not been what the head counts, and when that made us read all again.
    odd_since: Option<Timestamp>,
    reread_at: Option<Timestamp>,
    /// Somebody else has written into the bucket.
    foreign: bool,
    /// Version of a detector that is newer than this program.
    newer: Option<u32>,
    /// Since the copies were last brought up to date.
    changes: Vec<BanChange>,
}

impl Replica {
    fn new(connection: Connection, copies: Copies, state_dir: Option<PathBuf>, state: ReplicaState) -> Self {
        let applied = state_dir.as_deref().and_then(load).unwrap_or_default();
        Self {
            connection,
            copies,
            state_dir,
            state,
            remembered: applied.clone(),
            applied,
            remembered_at: Timestamp::EPOCH,
            remembering: None,
            records: BTreeMap::new(),
            lists: None,
            head: None,
            head_at: 0,
            seen: 0,
            caught_up: false,
            whole: false,
            odd_since: None,
            reread_at: None,
            foreign: false,
            newer: None,
            changes: Vec::new(),
        }
    }

    /// Forgets what was read, but not what was applied.
    fn begin(&mut self) {
        (self.head, self.head_at, self.seen, self.lists) = (None, 0, 0, None);
        (self.caught_up, self.whole, self.foreign, self.newer) = (false, false, false, None);
        self.records.clear();
        self.changes.clear();
    }

    /// Follows the state until it is another, or must be read again.
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
        self.begin();
        let mut ticks = tokio::time::interval(REMEMBER_INTERVAL);
        loop {
            let followed = tokio::select! {
                followed = feed.next() => Some(followed),
                _ = ticks.tick() => None,
            };
            if followed.is_none() {
                self.remember();
            }
            let mut next = followed;
            while let Some(followed) = next {
                match followed {
                    Ok(Followed::CaughtUp) => {
                        self.caught_up = true;
                        // What is missing of a commit by now has been replaced or deleted since.
                        self.seen = self.seen.max(self.commit_end());
                    }
                    Ok(Followed::Entry(entry)) => self.take(&entry),
                    Err(error) => return error,
                }
                next = feed.try_next();
            }
            if self.caught_up
                && let Err(error) = self.settle(&feed)
            {
                return error;
            }
        }
    }

    fn take(&mut self, entry: &Entry) {
        self.seen = entry.sequence;
        let parsed = match parse(&self.connection, entry) {
            Ok(Some(parsed)) => parsed,
            Ok(None) => return,
            Err(StateError::Newer(version)) => {
                self.newer = Some(version);
                return;
            }
            Err(error) => {
                tracing::warn!(%error, "An entry of the shared state is left out");
                return;
            }
        };
        match parsed {
            // Detect writes in batches only: what stands alone is of somebody else.
            _ if !entry.batched => self.foreign = true,
            StateEntry::Head(head) => (self.head, self.head_at) = (Some(head), entry.sequence),
            StateEntry::Lists(lists) => self.lists = Some(lists),
            StateEntry::Coverage(coverage) => {
                if let Some(copy) = &self.copies.interest {
                    copy.send_replace(Arc::new(coverage.interest));
                }
            }
            StateEntry::Ban(change) => {
                let tells = match &change {
                    BanChange::Put(record) => {
                        self.records.insert(record.target, record.clone());
                        true
                    }
                    BanChange::Delete(target) => {
                        let ended = self.records.remove(target).is_some_and(|record| self.has_ended(&record));
                        // In a set that is not trusted, what was deleted before we looked and what has ended says
                        // nothing of bans that we have from elsewhere.
                        self.whole || (self.caught_up && !ended)
                    }
                };
                if tells {
                    self.changes.push(change);
                }
            }
            StateEntry::Control(_) | StateEntry::Offender(..) | StateEntry::Out(_) => {}
        }
    }

    fn has_ended(&self, record: &BanRecord) -> bool {
        record.end() <= self.connection.clock().now().saturating_add(END_TOLERANCE)
    }

    /// Brings the copies up to date, as far as what was followed can be trusted.
    ///
    /// # Errors
    /// When everything must be read again.
    fn settle(&mut self, feed: &Feed) -> Result<(), BusError> {
        let now = self.connection.clock().raw();
        if self.whole && (self.newer.is_some() || self.departure().is_some()) {
            // What was followed is not what was applied: it is read again, and judged before anybody is freed.
            return Err(BusError::Incomplete { stream: "of the ban set".to_owned() });
        }
        let doubt = self.doubt();
        let odd = self.oddness(now);
        let mark = self.head.as_ref().map(|head| head.mark).unwrap_or_default();
        let between = self.seen < self.commit_end();
        if doubt.is_none() && odd.is_none() && !between && !self.whole {
            self.become_whole();
        }
        self.publish_lists();
        // A commit is put in force as one, however many pieces it comes in.
        if !between || !self.whole {
            self.publish();
        }
        if self.whole && !between && odd.is_none() {
            let bucket = self.head.as_ref().map(|head| head.bucket.clone()).unwrap_or_default();
            let first = self.applied.bucket != bucket;
            self.applied = Applied { version: VERSION, bucket, mark };
            if let Some(bans) = &self.copies.bans {
                bans.reach(mark);
            }
            if first {
                self.remember();
            }
        }
        // The messages of a commit arrive one by one, so a moment of oddness is nothing to tell.
        let lasting = odd.filter(|(_, since)| now.since(*since) >= SETTLE);
        let foreign =
            || Trouble { passing: false, text: "somebody else writes into the ban bucket; only detect may".to_owned() };
        let oddity = lasting.clone().map(|(text, _)| Trouble { passing: false, text });
        let told = doubt.or(oddity).or_else(|| self.foreign.then(foreign));
        self.state.set(told, feed.lag(), mark);
        let again = self.reread_at.is_none_or(|at| now.since(at) >= REREAD_INTERVAL);
        if lasting.is_some() && again {
            self.reread_at = Some(now);
            return Err(BusError::Incomplete { stream: "of the ban set".to_owned() });
        }
        Ok(())
    }

    fn become_whole(&mut self) {
        self.whole = true;
        self.changes.clear();
        self.publish_lists();
        if let Some(banned) = &self.copies.banned {
            banned.replace(self.records.keys().copied());
        }
        if let Some(bans) = &self.copies.bans {
            bans.replace(self.records.values().cloned());
        }
    }

    /// Lists of a set that is not trusted spare whom they name, and whom the former named as well; they pause nothing.
    fn publish_lists(&mut self) {
        let (Some(copy), Some(lists)) = (&self.copies.lists, self.lists.take()) else { return };
        if self.whole {
            copy.send_replace(Arc::new(lists));
            return;
        }
        let former = copy.borrow().clone();
        let both = former.never_ban.iter().chain(&lists.never_ban).copied();
        let union = Lists { never_ban: NetSet::new(both).nets(), paused: former.paused };
        copy.send_if_modified(|known| {
            let is_new = **known != union;
            *known = Arc::new(union);
            is_new
        });
        self.lists = Some(lists);
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

    /// Why this set is not the one that was applied before; `None` when it is, or when there is nothing to lose.
    fn doubt(&self) -> Option<Trouble> {
        let lasting = |text: String| Some(Trouble { passing: false, text });
        if let Some(version) = self.newer {
            return lasting(format!("the detector is newer (version {version} of the state): upgrade this host"));
        }
        let kept = "this host keeps the bans it has until they end, and adds new ones; to drop them at once, stop \
                    enforce, run `portcullis enforce --teardown` and start it again";
        if self.head.is_none() {
            let text = "no detector has written to the ban set yet";
            if !self.applied.bucket.is_empty() && self.would_free() {
                return lasting(format!("{text}: {kept}"));
            }
            return Some(Trouble { passing: true, text: text.to_owned() });
        }
        let departure = self.departure().filter(|_| self.would_free())?;
        lasting(format!("the ban set {departure}: {kept}"))
    }

    /// How the set is not one that follows on what was applied.
    fn departure(&self) -> Option<&'static str> {
        let (head, applied) = (self.head.as_ref()?, &self.applied);
        if applied.bucket.is_empty() {
            return None;
        }
        if applied.bucket != head.bucket {
            return Some("was deleted and made anew");
        }
        (head.mark < applied.mark).then_some("is older than what this host has applied")
    }

    /// Whether taking the set for whole would free anybody whom this host bans, or free him sooner.
    fn would_free(&self) -> bool {
        let now = self.connection.clock().now();
        let end_here = |target: &Target| self.records.get(target).map_or(now, |record| record.end().max(now));
        let keeps = self.copies.kept.as_ref().is_some_and(|kept| *kept.borrow() > 0);
        let loses = |bans: &BanBucket| bans.any(|record| record.end() > end_here(&record.target));
        keeps || self.copies.bans.as_ref().is_some_and(loses)
    }

    /// What the set lacks of what its head counts, and since when.
    fn oddness(&mut self, now: Timestamp) -> Option<(String, Timestamp)> {
        let counted = self.head.as_ref().map_or(0, |head| head.bans);
        let found = self.records.len() as u64;
        if counted == found {
            self.odd_since = None;
            return None;
        }
        let since = *self.odd_since.get_or_insert(now);
        let text = format!("the ban set holds {found} targets where detect counts {counted}: nobody is freed by that");
        Some((text, since))
    }

    /// Keeps on disk which commit was applied, beside everything else.
    fn remember(&mut self) {
        let now = self.connection.clock().raw();
        let is_due = self.applied != self.remembered && now.since(self.remembered_at) >= REMEMBER_INTERVAL;
        let is_busy = self.remembering.as_ref().is_some_and(|task| !task.is_finished());
        let Some(dir) = self.state_dir.clone().filter(|_| is_due && !is_busy) else { return };
        let applied = self.applied.clone();
        (self.remembered, self.remembered_at) = (applied.clone(), now);
        self.remembering = Some(tokio::task::spawn_blocking(move || {
            if let Err(error) = store(&dir, &applied) {
                tracing::error!(%error, "Which commit was applied cannot be remembered");
            }
        }));
    }

    /// The last word on what was applied.
    async fn end(mut self) {
        if let Some(task) = self.remembering.take() {
            // A panic there has been told.
            let _panicked = task.await;
        }
        self.remembered_at = Timestamp::EPOCH;
        self.remember();
        if let Some(task) = self.remembering.take() {
            let _panicked = task.await;
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
    std::fs::rename(&fresh, &path)?;
    std::fs::File::open(dir)?.sync_all()
}
