//! What the engine gives out: effects as values, counts, and all that a restart needs.

use std::collections::BTreeMap;
use std::net::IpAddr;

use proto::ban::{Ban, BanChange, BanRecord, Pause};
use proto::envelope::EventType;
use proto::net::Target;
use proto::time::Timestamp;

use super::leak::Leak;
use super::offender::Offender;
use super::stream::{FileKey, FileState, Position};

/// What the caller has to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// Store and enforce this.
    Record(BanChange),
    /// Store this history, or remove it.
    Offender(Target, Option<Offender>),
    /// Store [`Engine::control`] and publish [`Engine::lists`].
    Control,
    /// Tell the world. Follows the change it speaks of.
    Told(EventType, Box<Ban>),
    /// A shadow rule would have banned.
    Shadow(Box<Ban>),
    /// A ban that is already over: it counts, but is neither enforced nor told.
    Over(Box<Ban>),
    /// A banned client got through: ask who should have kept it out, then [`Engine::judge_leak`].
    Leak(Box<Leak>),
    /// Something needs a person.
    Alarm {
        /// A stable word.
        kind: &'static str,
        /// For people.
        text: String,
    },
}

/// Counts since start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Events handled, repetitions aside.
    pub events: u64,
    /// Events seen before.
    pub duplicates: u64,
    /// Events that only filled windows.
    pub rebuilt: u64,
    /// Matching events that came later than `lateness_max`.
    pub late: u64,
    /// Events whose time was in the future and was cut to their arrival.
    pub future: u64,
    /// Events without a client.
    pub no_client: u64,
    /// Matching events of clients that may never be banned.
    pub exempt: u64,
    /// Matching events of clients that were banned at that time.
    pub while_banned: u64,
    /// Matching events that came during a pause.
    pub while_paused: u64,
    /// Windows dropped because a limit was reached.
    pub evicted_clients: u64,
    /// Histories dropped because a limit was reached.
    pub evicted_offenders: u64,
    /// Windows whose texts were not sampled because a limit was reached.
    pub unsampled: u64,
    /// By rule: matching events, and bans.
    pub rules: Vec<(u64, u64)>,
}

/// What survives a restart beside bans, histories and files.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Control {
    /// Set while all bans are lifted.
    pub paused: Option<Pause>,
    /// Events before this moment count for nobody: the end of the last pause.
    pub counts_from: Timestamp,
    /// Events up to this position count for nobody: where that pause ended.
    pub counts_after: Position,
    /// Targets that an operator allowed, and until when.
    pub allowed: BTreeMap<Target, Option<Timestamp>>,
    /// What the names in `never_ban` last resolved to.
    pub resolved: BTreeMap<String, Vec<IpAddr>>,
    /// Position of the next decision.
    pub position: Position,
}

/// All that a restart needs; windows are rebuilt from the files.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Snapshot {
    /// See [`Control`].
    pub control: Control,
    /// Bans in force when it was taken.
    pub bans: Vec<BanRecord>,
    /// Histories.
    pub offenders: Vec<(Target, Offender)>,
    /// Files.
    pub files: Vec<(FileKey, FileState)>,
}
