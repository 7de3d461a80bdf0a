//! What each role says of itself, for `status`. On a cluster these are the heartbeats.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::ban::Pause;
use crate::head::Mark;
use crate::net::Target;
use crate::time::Timestamp;

/// A role of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Reads logs.
    Ingest,
    /// Decides bans.
    Detect,
    /// Applies them.
    Enforce,
}

impl Role {
    /// The verb and word of the role.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ingest => "ingest",
            Self::Detect => "detect",
            Self::Enforce => "enforce",
        }
    }
}

/// How bad a problem is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Works, but an operator should look.
    Warning,
    /// Something does not do its work: `status` exits 1.
    Degraded,
}

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// How bad.
    pub severity: Severity,
    /// What is wrong and what to do, for people.
    pub text: String,
}

impl Problem {
    /// A problem that leaves everything working.
    pub fn warning(text: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, text: text.into() }
    }

    /// A problem that stops something from working.
    pub fn degraded(text: impl Into<String>) -> Self {
        Self { severity: Severity::Degraded, text: text.into() }
    }
}

/// One source of log lines.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SourceReport {
    /// Configured name.
    pub name: String,
    /// `file`, ...
    pub kind: String,
    /// Format of the newest parsed line: `json`, `clf`, `generic-clf`; empty before the first.
    pub format: String,
    /// Files followed now.
    pub files: u64,
    /// Lines read since start.
    pub lines: u64,
    /// Lines that became events.
    pub events: u64,
    /// Lines that are no access entries.
    pub unparsed: u64,
    /// The newest such line, escaped and cut.
    pub unparsed_sample: Option<String>,
    /// Lines longer than the limit, skipped.
    pub oversized: u64,
    /// Accesses in the common log format that may be forged and were not counted.
    pub suspect: u64,
    /// How far the clock that the newest lines were written by is ahead of this node's, in milliseconds; `None` while
    /// nothing fresh has come.
    pub skew_ms: Option<i64>,
    /// Events that were not sent to detect, because no rule can match them.
    pub withheld: u64,
    /// The newest client that was resolved, and its peer where that is another: shows that proxies are configured right.
    pub sample_client: Option<String>,
    /// Events without a client, by reason.
    pub no_client: BTreeMap<String, u64>,
    /// When the newest line was read.
    pub last_line_at: Option<Timestamp>,
    /// Bytes that wait to be read.
    pub behind_bytes: u64,
    /// Bytes that could not be read any more (deleted or truncated files).
    pub lost_bytes: u64,
    /// Connections open now.
    pub connections: u64,
    /// Lines that came when there was no room, of senders that cannot wait.
    pub dropped: u64,
    /// Lines that were turned away because of a limit.
    pub limited: u64,
    /// Connections, datagrams and requests of those who may not send, or that cannot be taken.
    pub refused: u64,
}

/// One rule.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RuleReport {
    /// Configured name.
    pub name: String,
    /// `enforce` or `shadow`.
    pub mode: String,
    /// Events it matched since start.
    pub matches: u64,
    /// Bans it decided since start (in shadow: would have).
    pub bans: u64,
}

/// The detector.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DetectReport {
    /// Every rule in force.
    pub rules: Vec<RuleReport>,
    /// Clients with open windows.
    pub tracked_clients: u64,
    /// Targets with a ban history.
    pub offenders: u64,
    /// Targets banned now.
    pub banned: u64,
    /// Windows dropped because `tracked_clients_max` was reached.
    pub evicted_clients: u64,
    /// Histories dropped because `offenders_max` was reached.
    pub evicted_offenders: u64,
    /// Events handled since start.
    pub events: u64,
    /// Events that came later than `lateness_max`.
    pub late: u64,
    /// Matching events whose time was in the future: the clock of their node is ahead.
    pub future: u64,
    /// Events that had been seen before.
    pub duplicates: u64,
    /// What operators allowed, until when; `None` = for ever.
    pub allowed: Vec<(Target, Option<Timestamp>)>,
    /// Set while all bans are lifted.
    pub paused: Option<Pause>,
    /// Changes with the rules; the same for all detectors of a cluster.
    pub fingerprint: String,
    /// Newest batch that is decided.
    pub floor: u64,
    /// Requests of banned clients since start that passed although every back end had confirmed the ban.
    pub leaks: u64,
    /// Most frequent peer that may not be banned and is no trusted proxy, and its share of the recent lines in per cent.
    pub hidden_behind: Option<(String, u8)>,
}

/// One back end on one host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct BackendReport {
    /// `iptables`, `dry-run`, ...
    pub name: String,
    /// What was chosen and why, such as `ipv4: nft, raw/PREROUTING`.
    pub detail: Vec<String>,
    /// Bans held.
    pub members: u64,
    /// Bans asked for.
    pub desired: u64,
    /// Bans refused by the guard.
    pub guarded: u64,
    /// Packets dropped since the sets were made.
    pub dropped_packets: u64,
    /// Bytes dropped since the sets were made.
    pub dropped_bytes: u64,
    /// Revision of the desired state that is in force.
    pub revision: u64,
    /// Repairs of drift since start.
    pub repairs: u64,
    /// The newest commit that is in force here as far as the back end knows; `None` before the first.
    pub confirmed: Option<Mark>,
    /// Changes that wait, of a back end that works them off one by one.
    pub waiting: u64,
    /// Whether another host does this back end's work, so that the figures are not of this one.
    pub standby: bool,
    /// Whether it lets some banned clients pass, on purpose or for want of room: that one passed is no fault of its own.
    pub lets_some_pass: bool,
}

/// One role on one node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeReport {
    /// Node name.
    pub node: String,
    /// Which role.
    pub role: Role,
    /// Version of the program.
    pub version: String,
    /// When the role started.
    pub started_at: Timestamp,
    /// When this was written.
    pub at: Timestamp,
    /// What is wrong.
    pub problems: Vec<Problem>,
    /// Differs with each run of the process; empty on one host.
    #[serde(default)]
    pub instance: String,
    /// By how much the host's clock is ahead of the bus's, in milliseconds.
    #[serde(default)]
    pub skew_ms: Option<i64>,
    /// The newest commit of the shared state that is in force here, or was made here.
    #[serde(default)]
    pub applied: Option<Mark>,
    /// `active` or `standby`, where several could do the same work.
    #[serde(default)]
    pub duty: Option<String>,
    /// Why all bans are lifted on this host, if so, for people.
    #[serde(default)]
    pub paused: Option<String>,
    /// What waits: batches to be published, or to be handled, or changes to be applied.
    #[serde(default)]
    pub lag: u64,
    /// Of ingest.
    #[serde(default)]
    pub sources: Vec<SourceReport>,
    /// Of detect.
    #[serde(default)]
    pub detect: Option<DetectReport>,
    /// Of enforce.
    #[serde(default)]
    pub backends: Vec<BackendReport>,
}

impl NodeReport {
    /// An empty report of this version.
    pub fn new(node: &str, role: Role, started_at: Timestamp) -> Self {
        Self {
            node: node.to_owned(),
            role,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started_at,
            at: started_at,
            problems: Vec::new(),
            instance: String::new(),
            skew_ms: None,
            applied: None,
            duty: None,
            paused: None,
            lag: 0,
            sources: Vec::new(),
            detect: None,
            backends: Vec::new(),
        }
    }
}
