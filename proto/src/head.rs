//! The head of the shared state: what detect rewrites first in each of its commits.
//!
//! Whoever follows the state learns from it which commit it has seen, whether the ban set is whole, and up to where events
//! are decided.

use serde::{Deserialize, Serialize};

use crate::event::Interest;
use crate::time::Timestamp;

/// The version written by this program.
pub const VERSION: u32 = 1;

/// Which commit of which detector: never decreases.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Mark {
    /// Grows each time that a detector becomes active.
    pub epoch: u64,
    /// Grows with each commit.
    pub commit: u64,
}

/// The head, as JSON. Fields are only ever added within a version.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// [`VERSION`].
    pub version: u32,
    /// Node of the active detector.
    pub node: String,
    /// Which commit this is.
    #[serde(flatten)]
    pub mark: Mark,
    /// Number of the last access batch up to which everything is decided.
    pub floor: u64,
    /// Arrival of that batch, in nanoseconds since the epoch.
    pub floor_arrival: i64,
    /// When the bucket was made, by which another of the same name is told from it.
    pub bucket: String,
    /// When the stream of access batches was made: numbers mean nothing in another.
    pub access_created: String,
    /// What is added to that stream's numbers, so that positions grow on when it is made anew.
    pub access_base: u64,
    /// Number of banned targets after this commit.
    pub bans: u64,
    /// Messages of this commit beside the head.
    pub changes: u64,
    /// Number that the next events get in the outbox.
    pub next_out: u64,
    /// What has a number before this one is published.
    pub first_out: u64,
    /// When the line behind the newest ban was read, in nanoseconds since the epoch; for latency figures.
    pub cause: Option<i64>,
}

impl Head {
    /// When the batch at the floor arrived.
    pub fn floor_arrival(&self) -> Timestamp {
        Timestamp::from_nanos(self.floor_arrival)
    }
}

/// What rules can match and from when on each rule is covered, as JSON under the key `predicate`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Coverage {
    /// What ingest goes by.
    #[serde(flatten)]
    pub interest: Interest,
    /// By rule name: what it is, and the first version of the predicate that covers it.
    pub rules: std::collections::BTreeMap<String, RuleCoverage>,
}

/// One rule's part in a [`Coverage`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleCoverage {
    /// The rule's condition.
    pub condition: String,
    /// First version that covers it.
    pub since: u64,
}
