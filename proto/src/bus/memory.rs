//! The bus of one process: batches flow forward under backpressure, the ban set is shared state that enforcers follow by
//! revision, so that a slow enforcer never makes detection wait.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{broadcast, mpsc, oneshot, watch};

use crate::api::BackendHold;
use crate::ban::{BanChange, BanRecord, Lists};
use crate::envelope::CloudEvent;
use crate::event::{AccessBatch, Interest};
use crate::head::Mark;
use crate::net::Target;
use crate::report::{NodeReport, Role};
use crate::time::Timestamp;

/// Batches between ingest and detect. Full means that sources stop reading.
pub const BATCHES_MAX: usize = 64;
/// Public events that a slow reader may fall behind before it misses some.
pub const EVENTS_MAX: usize = 4096;
/// Questions to enforcers under way.
const QUESTIONS_MAX: usize = 64;
/// Deleted records that are remembered; an enforcer further behind gets the whole set.
const TOMBSTONES_MAX: usize = 65_536;
/// Commits whose revision is remembered: more than come while an enforcer applies one.
const MARKS_MAX: usize = 1024;

/// Both ends of everything, made once for a process.
#[derive(Debug)]
pub struct Bus {
    /// Into detect.
    pub batches: mpsc::Sender<AccessBatch>,
    /// Out of ingest.
    pub batches_in: mpsc::Receiver<AccessBatch>,
    /// The ban set.
    pub bans: BanBucket,
    /// What detect publishes beside bans.
    pub lists: watch::Sender<Arc<Lists>>,
    /// What the rules look at.
    pub interest: watch::Sender<Arc<Interest>>,
    /// Public events.
    pub events: broadcast::Sender<Arc<CloudEvent>>,
    /// Every role's newest report.
    pub nodes: Nodes,
    /// To the enforcer.
    pub questions: mpsc::Sender<Question>,
    /// At the enforcer.
    pub questions_in: mpsc::Receiver<Question>,
}

impl Bus {
    /// A fresh bus.
    pub fn new() -> Self {
        let (batches, batches_in) = mpsc::channel(BATCHES_MAX);
        let (questions, questions_in) = mpsc::channel(QUESTIONS_MAX);
        Self {
            batches,
            batches_in,
            bans: BanBucket::new(),
            lists: watch::Sender::new(Arc::default()),
            interest: watch::Sender::new(Arc::default()),
            events: broadcast::Sender::new(EVENTS_MAX),
            nodes: Nodes::default(),
            questions,
            questions_in,
        }
    }
}

impl Default for Bus {
    fn default() -> Self {
        Self::new()
    }
}

/// What holds this address? Asked by `explain`.
#[derive(Debug)]
pub struct Question {
    /// The address.
    pub address: IpAddr,
    /// Where the answer goes.
    pub reply: oneshot::Sender<Vec<BackendHold>>,
}

/// The newest report of each role on each node.
#[derive(Clone, Debug, Default)]
pub struct Nodes(Arc<Mutex<Reports>>);

type ByRole<T> = BTreeMap<(Role, String), T>;

/// What roles say is kept apart from what is made of it: a heartbeat is made of what its role says now, never of what a former
/// heartbeat said.
#[derive(Debug, Default)]
struct Reports {
    /// By the roles of this process, with how many words each has said.
    said: ByRole<(NodeReport, u64)>,
    /// By their heartbeats.
    sent: ByRole<NodeReport>,
    /// By all processes.
    heard: ByRole<NodeReport>,
}

impl Nodes {
    /// Takes what a role of this process says.
    pub fn put(&self, report: NodeReport) {
        let said = &mut lock(&self.0).said;
        let words = said.get(&key(&report)).map_or(0, |(_, words)| *words) + 1;
        said.insert(key(&report), (report, words));
    }

    /// What a role of this process said last.
    pub fn get(&self, role: Role, node: &str) -> Option<NodeReport> {
        Some(self.said(role, node)?.0)
    }

    /// What a role of this process said last, and how many words it has said.
    pub fn said(&self, role: Role, node: &str) -> Option<(NodeReport, u64)> {
        lock(&self.0).said.get(&(role, node.to_owned())).cloned()
    }

    /// Takes what the heartbeat of a role of this process says for it.
    pub fn beat(&self, report: NodeReport) {
        lock(&self.0).sent.insert(key(&report), report);
    }

    /// Takes what is heard of all roles of all processes in the place of what was heard before.
    pub fn hear(&self, reports: Vec<NodeReport>) {
        lock(&self.0).heard = reports.into_iter().map(|report| (key(&report), report)).collect();
    }

    /// All reports, by role and node. Those of this process are as their last heartbeats, a second or a few old.
    pub fn all(&self) -> Vec<NodeReport> {
        let reports = lock(&self.0);
        let mut all = reports.heard.clone();
        all.extend(reports.said.iter().map(|(key, (report, _))| (key.clone(), report.clone())));
        all.extend(reports.sent.clone());
        all.into_values().collect()
    }
}

fn key(report: &NodeReport) -> (Role, String) {
    (report.role, report.node.clone())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // The data behind these locks is replaced whole, so a panic elsewhere cannot leave it half-written.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The desired state: one record a target, each change under a new revision.
#[derive(Clone, Debug)]
pub struct BanBucket {
    state: Arc<Mutex<BucketState>>,
    revision: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct BucketState {
    revision: u64,
    /// Whether the records are all there are. If not, what is not among them is unknown instead of not banned.
    whole: bool,
    /// Everything up to this revision that was deleted is forgotten.
    forgotten: u64,
    records: BTreeMap<Target, (u64, BanRecord)>,
    by_revision: BTreeMap<u64, Target>,
    deleted: BTreeMap<Target, u64>,
    /// When the line that caused the newest change was read.
    cause: Option<Timestamp>,
    /// Ascending: at this revision, all of this commit was here.
    marks: VecDeque<(u64, Mark)>,
}

/// What an enforcer gets: changes since the revision it named, or everything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BanUpdate {
    /// The state after these changes.
    pub revision: u64,
    /// Whether this is the whole set, so that what is not in it is not banned.
    pub snapshot: bool,
    /// Ordered by revision, or by target in a snapshot.
    pub changes: Vec<BanChange>,
    /// When the log line behind the newest change was read, for latency figures.
    pub cause: Option<Timestamp>,
}

impl BanBucket {
    fn new() -> Self {
        Self { state: Arc::default(), revision: watch::Sender::new(0) }
    }

    /// Applies changes under consecutive revisions and wakes the enforcers. `cause` is when the line behind them was
    /// read. Even without changes the revision moves on: the first call says that the set is whole.
    pub fn publish(&self, changes: impl IntoIterator<Item = BanChange>, cause: Option<Timestamp>) {
        self.change(cause, |state| {
            state.whole = true;
            changes.into_iter().for_each(|change| state.apply(change));
        });
    }

    /// Applies changes to a set that is not known to be whole: nobody is freed by what it lacks, nor sooner than he would
    /// be without it.
    pub fn publish_partial(&self, changes: impl IntoIterator<Item = BanChange>) {
        self.change(None, |state| {
            for change in changes {
                if !state.shortens(&change) {
                    state.apply(change);
                }
            }
        });
    }

    /// From now on the set is `records`, and whole: who is not in it is not banned.
    pub fn replace(&self, records: impl IntoIterator<Item = BanRecord>) {
        self.change(None, |state| {
            let revision = state.revision;
            let marks = std::mem::take(&mut state.marks);
            *state = BucketState { revision, forgotten: revision, whole: true, marks, ..BucketState::default() };
            records.into_iter().for_each(|record| state.apply(BanChange::Put(record)));
        });
    }

    fn change(&self, cause: Option<Timestamp>, change: impl FnOnce(&mut BucketState)) {
        let mut state = lock(&self.state);
        state.revision += 1;
        change(&mut state);
        state.cause = cause;
        state.trim();
        let revision = state.revision;
        drop(state);
        self.revision.send_replace(revision);
    }

    /// Follows the revision: changes when there is something to fetch. 0 until detect has published its first set.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }

    /// What has changed after `revision`; 0 asks for the whole set. `None` before anything was published.
    pub fn since(&self, revision: u64) -> Option<BanUpdate> {
        let state = lock(&self.state);
        if state.revision == 0 {
            return None;
        }
        let all = revision == 0 || revision < state.forgotten || revision > state.revision;
        let snapshot = all && state.whole;
        let changes = if all {
            state.records.values().map(|(_, record)| BanChange::Put(record.clone())).collect()
        } else {
            state.by_revision.range(revision + 1..).map(|(_, target)| state.change(*target)).collect()
        };
        Some(BanUpdate { revision: state.revision, snapshot, changes, cause: state.cause })
    }

    /// All of commit `mark` has been published, the lists beside the ban set included.
    pub fn reach(&self, mark: Mark) {
        let mut state = lock(&self.state);
        let revision = state.revision;
        match state.marks.back_mut() {
            Some(last) if last.0 == revision => last.1 = mark,
            _ => state.marks.push_back((revision, mark)),
        }
        if state.marks.len() > MARKS_MAX {
            state.marks.pop_front();
        }
    }

    /// The newest commit that is in force where `revision` is.
    pub fn commit_at(&self, revision: u64) -> Option<Mark> {
        let state = lock(&self.state);
        let reached = state.marks.partition_point(|(known, _)| *known <= revision);
        reached.checked_sub(1).map(|at| state.marks[at].1)
    }

    /// Whether there is a record of this target.
    pub fn contains(&self, target: &Target) -> bool {
        lock(&self.state).records.contains_key(target)
    }

    /// Whether a record is such.
    pub fn any(&self, mut is_such: impl FnMut(&BanRecord) -> bool) -> bool {
        lock(&self.state).records.values().any(|(_, record)| is_such(record))
    }

    /// All records, by target.
    pub fn all(&self) -> Vec<BanRecord> {
        lock(&self.state).records.values().map(|(_, record)| record.clone()).collect()
    }
}

impl BucketState {
    fn apply(&mut self, change: BanChange) {
        self.revision += 1;
        let target = change.target();
        let former =
            self.records.remove(&target).map(|(revision, _)| revision).or_else(|| self.deleted.remove(&target));
        if let Some(former) = former {
            self.by_revision.remove(&former);
        }
        self.by_revision.insert(self.revision, target);
        match change {
            BanChange::Put(record) => drop(self.records.insert(target, (self.revision, record))),
            BanChange::Delete(_) => drop(self.deleted.insert(target, self.revision)),
        }
    }

    /// Whether a record takes the place of one that ends later.
    fn shortens(&self, change: &BanChange) -> bool {
        let BanChange::Put(fresh) = change else { return false };
        self.records.get(&fresh.target).is_some_and(|(_, known)| known.end() > fresh.end())
    }

    fn change(&self, target: Target) -> BanChange {
        self.records.get(&target).map_or(BanChange::Delete(target), |(_, record)| BanChange::Put(record.clone()))
    }

    fn trim(&mut self) {
        if self.deleted.len() <= TOMBSTONES_MAX {
            return;
        }
        let old: Vec<(u64, Target)> = {
            let deleted = &self.deleted;
            let tombstones = self.by_revision.iter().filter(|(_, target)| deleted.contains_key(target));
            tombstones.take(TOMBSTONES_MAX / 2).map(|(revision, target)| (*revision, *target)).collect()
        };
        for (revision, target) in old {
            self.by_revision.remove(&revision);
            self.deleted.remove(&target);
            self.forgotten = revision;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(n: u32) -> BanRecord {
        BanRecord { target: Target::host(IpAddr::V4(n.into())), bans: Vec::new() }
    }

    #[test]
    fn an_enforcer_gets_the_whole_set_then_changes() {
        let bucket = BanBucket::new();
        assert_eq!(bucket.since(0), None, "an empty bucket that nobody has filled says nothing");
        bucket.publish([BanChange::Put(record(1)), BanChange::Put(record(2))], None);
        let first = bucket.since(0).unwrap();
        assert!(first.snapshot);
        assert_eq!(first.changes.len(), 2);

        bucket.publish([BanChange::Delete(record(1).target), BanChange::Put(record(3))], None);
        let next = bucket.since(first.revision).unwrap();
        assert!(!next.snapshot);
        assert_eq!(next.changes, [BanChange::Delete(record(1).target), BanChange::Put(record(3))]);
        assert_eq!(bucket.since(next.revision).unwrap().changes, []);
    }

    #[test]
    fn a_set_that_is_not_whole_adds_bans_and_frees_nobody() {
        let bucket = BanBucket::new();
        bucket.publish_partial([BanChange::Put(record(1))]);
        let first = bucket.since(0).unwrap();
        assert_eq!((first.snapshot, &first.changes[..]), (false, &[BanChange::Put(record(1))][..]));
        bucket.replace([record(2)]);
        let whole = bucket.since(first.revision).unwrap();
        assert_eq!((whole.snapshot, &whole.changes[..]), (true, &[BanChange::Put(record(2))][..]));
        bucket.publish([BanChange::Delete(record(2).target)], None);
        let next = bucket.since(whole.revision).unwrap();
        assert_eq!((next.snapshot, next.changes.len()), (false, 1));
    }

    #[test]
    fn a_revision_tells_which_commits_are_in_force() {
        let bucket = BanBucket::new();
        let mark = |commit| Mark { epoch: 1, commit };
        assert_eq!(bucket.commit_at(9), None);
        bucket.publish([BanChange::Put(record(1))], None);
        bucket.reach(mark(1));
        let first = bucket.since(0).unwrap().revision;
        assert_eq!((bucket.commit_at(first - 1), bucket.commit_at(first)), (None, Some(mark(1))));
        bucket.reach(mark(2));
        assert_eq!(bucket.commit_at(first), Some(mark(2)), "a commit of lists alone");
        bucket.publish([BanChange::Put(record(2))], None);
        let second = bucket.since(first).unwrap().revision;
        assert_eq!(bucket.commit_at(second), Some(mark(2)), "not all of the next commit is here yet");
        bucket.reach(mark(3));
        assert_eq!((bucket.commit_at(first), bucket.commit_at(second)), (Some(mark(2)), Some(mark(3))));
    }

    #[test]
    fn an_enforcer_that_fell_behind_the_tombstones_gets_a_snapshot() {
        let bucket = BanBucket::new();
        bucket.publish([BanChange::Put(record(0))], None);
        let seen = bucket.since(0).unwrap().revision;
        for n in 1..=(TOMBSTONES_MAX as u32 + 1) {
            bucket.publish([BanChange::Put(record(n)), BanChange::Delete(record(n).target)], None);
        }
        let update = bucket.since(seen).unwrap();
        assert!(update.snapshot);
        assert_eq!(update.changes, [BanChange::Put(record(0))]);
    }
}
