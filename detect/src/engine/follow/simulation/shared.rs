//! What detectors of the simulation share: the log of batches, and the state with its commits.

use std::collections::BTreeMap;

use proto::ban::{Ban, BanChange};
use proto::envelope::EventType;
use proto::event::{AccessBatch, FileSpan};
use proto::net::Target;
use proto::time::Timestamp;

use crate::engine::offender::Offender;
use crate::engine::simulation::{LINE_BYTES, Line, Random};
use crate::engine::tests::at;
use crate::engine::{Control, Event, Snapshot};

const NODES: usize = 3;

/// What nodes have written and sent, and the log that the broker made of it.
#[derive(Default)]
pub(super) struct Log {
    files: [Vec<Line>; NODES],
    sent: [usize; NODES],
    /// Batch `n` has sequence `n + 1`.
    pub(super) batches: Vec<(AccessBatch, Timestamp)>,
}

impl Log {
    pub(super) fn end(&self) -> u64 {
        self.batches.len() as u64
    }

    /// A node writes a few lines and perhaps sends some: new ones, some again, or some that have no offsets.
    pub(super) fn grow(&mut self, random: &mut Random, seconds: i64, skew: u64) {
        let node = random.below(NODES as u64) as usize;
        let lines: Vec<Line> = (0..=random.below(6)).map(|_| Line::random(random, seconds)).collect();
        let stamp = at(seconds - random.below(skew + 1) as i64);
        let written = self.files[node].len();
        let batch = match random.below(10) {
            0 => batch(node, None, &lines),
            1 | 2 => {
                let end = random.below(self.sent[node] as u64 + 1) as usize;
                let start = random.below(end as u64 + 1) as usize;
                batch(node, Some(start), &self.files[node][start..end])
            }
            3 | 4 => return self.files[node].extend(lines),
            kind => {
                self.files[node].extend(lines);
                // A batch may be cut anew after an error: it begins with lines that the log has.
                let start = self.sent[node].saturating_sub(if kind == 5 { 4 } else { 0 });
                let end = written + 1;
                self.sent[node] = self.sent[node].max(end);
                batch(node, Some(start), &self.files[node][start..self.sent[node]])
            }
        };
        self.batches.push((batch, stamp));
    }
}

fn batch(node: usize, first: Option<usize>, lines: &[Line]) -> AccessBatch {
    let offset = |i: usize| first.map_or(0, |first| (first + i) as u64 * LINE_BYTES);
    let mut batch = AccessBatch::new(format!("n{node}").into(), "s".into(), Timestamp::EPOCH);
    for (i, line) in lines.iter().enumerate() {
        batch.push(&Event { offset: offset(i), ..line.event() });
    }
    batch.span = first.map(|_| FileSpan { generation: 1, start: offset(0), end: offset(lines.len()) });
    batch
}

/// All that was decided on one target: stored and told together.
#[derive(Clone, Default)]
pub(super) struct Decided {
    pub(super) record: Option<BanChange>,
    pub(super) offender: Option<Option<Offender>>,
    /// `None` = over when it was found.
    pub(super) told: Vec<(Option<EventType>, Ban)>,
}

/// One atomic batch of changes.
#[derive(Clone, Default)]
pub(super) struct Commit {
    pub(super) floor: u64,
    pub(super) arrival: Timestamp,
    pub(super) control: Option<Control>,
    pub(super) decided: BTreeMap<Target, Decided>,
}

/// The shared state. Its revision is the number of commits.
#[derive(Default)]
pub(super) struct Store {
    pub(super) commits: Vec<Commit>,
    bans: BTreeMap<Target, BanChange>,
    offenders: BTreeMap<Target, Offender>,
    control: Control,
    /// All bans that were decided, and how each was told: as a ban, as an extension, or not at all if it was over.
    pub(super) told: Vec<(String, &'static str)>,
}

impl Store {
    /// Whether the commit was accepted: nobody else may have committed since `revision`.
    pub(super) fn commit(&mut self, revision: usize, commit: Commit) -> bool {
        if self.commits.len() != revision {
            return false;
        }
        for (target, decided) in &commit.decided {
            self.bans.extend(decided.record.clone().map(|record| (*target, record)));
            for (kind, ban) in decided.told.iter().filter(|(kind, _)| *kind != Some(EventType::Unban)) {
                let text = format!("{target} {} {} {} {:?}", ban.rule, ban.ban_count, ban.banned_at, ban.expires_at);
                let entry = (text, kind.map_or("over", EventType::as_str));
                self.told.insert(self.told.partition_point(|known| *known <= entry), entry);
            }
            match &decided.offender {
                Some(Some(offender)) => drop(self.offenders.insert(*target, offender.clone())),
                Some(None) => drop(self.offenders.remove(target)),
                None => {}
            }
        }
        if let Some(control) = &commit.control {
            self.control = control.clone();
        }
        self.commits.push(commit);
        true
    }

    pub(super) fn floor(&self) -> (u64, Timestamp) {
        self.commits.last().map_or((0, Timestamp::EPOCH), |commit| (commit.floor, commit.arrival))
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        let put = |change: &BanChange| if let BanChange::Put(record) = change { Some(record.clone()) } else { None };
        Snapshot {
            control: self.control.clone(),
            bans: self.bans.values().filter_map(put).collect(),
            offenders: self.offenders.iter().map(|(target, offender)| (*target, offender.clone())).collect(),
            files: Vec::new(),
        }
    }
}
