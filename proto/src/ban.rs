//! Bans: the desired state that detection decides and enforcement carries out, and the lists beside it.

use std::collections::BTreeMap;

use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};

use crate::net::Target;
use crate::time::Timestamp;

/// Who ordered a ban.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// A rule.
    Detect,
    /// A person or program, over the operator API.
    Operator,
}

/// What a ban rests on. Lists are samples, bounded in number and length; counts are exact.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Evidence {
    /// Events that the ban consumed.
    pub failures: u32,
    /// Time of the oldest consumed event; `null` of operator bans.
    pub first_seen: Option<Timestamp>,
    /// Time of the newest consumed event; `null` of operator bans.
    pub last_seen: Option<Timestamp>,
    /// Nodes that saw them.
    pub nodes: Vec<String>,
    /// Hosts that were asked for.
    pub hosts: Vec<String>,
    /// Consumed events by status sent to the client.
    #[serde(deserialize_with = "statuses")]
    pub statuses: BTreeMap<u16, u32>,
    /// Paths that were asked for, without queries.
    pub paths: Vec<String>,
    /// User agents, where the log keeps them.
    pub user_agents: Vec<String>,
    /// Whether a proxy delivered any of them, so that a firewall cannot see the client's address.
    pub via_proxy: bool,
}

/// Keys of JSON objects are strings, which serde turns into numbers only where it knows early enough that it should.
fn statuses<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<u16, u32>, D::Error> {
    let counts = BTreeMap::<String, u32>::deserialize(deserializer)?;
    let parse = |(status, count): (String, u32)| status.parse().map(|status| (status, count));
    counts.into_iter().map(parse).collect::<Result<_, _>>().map_err(serde::de::Error::custom)
}

/// One ban of one target by one rule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Ban {
    /// Who is banned.
    pub target: Target,
    /// Name of the rule that decided it; `operator` where a person or program ordered it.
    pub rule: String,
    /// Who ordered it.
    pub origin: Origin,
    /// 1 for a first offence.
    pub ban_count: u32,
    /// Length in whole seconds, rounded up; `null` = permanent.
    pub ban_seconds: Option<u64>,
    /// Time of the newest consumed event, or of the order.
    pub banned_at: Timestamp,
    /// When it ends, everywhere and by itself; `null` = permanent.
    pub expires_at: Option<Timestamp>,
    /// For people.
    pub reason: String,
    /// What it rests on; empty for operator bans.
    pub evidence: Evidence,
}

impl Ban {
    /// Whether the ban is in force at `now`. A ban ends at `expires_at`, not after it.
    pub fn is_in_force(&self, now: Timestamp) -> bool {
        self.expires_at.is_none_or(|end| now < end)
    }
}

/// All bans of one target: what is stored and enforced under one key. Never empty; ordered by rule name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BanRecord {
    /// Who is banned.
    pub target: Target,
    /// One ban for each rule that has one in force; the latest end frees the target.
    #[schemars(length(min = 1))]
    pub bans: Vec<Ban>,
}

impl BanRecord {
    /// When the last of them ends; [`Timestamp::MAX`] where that is never.
    pub fn end(&self) -> Timestamp {
        self.expires_at().unwrap_or(Timestamp::MAX)
    }

    /// When the last of them ends; `None` = never.
    pub fn expires_at(&self) -> Option<Timestamp> {
        self.bans
            .iter()
            .map(|ban| ban.expires_at)
            .try_fold(Timestamp::EPOCH, |latest, end| end.map(|end| end.max(latest)))
    }

    /// Whether a ban in force at `now` says that a proxy delivered the client.
    pub fn is_behind_proxy(&self, now: Timestamp) -> bool {
        self.bans.iter().any(|ban| ban.is_in_force(now) && ban.evidence.via_proxy)
    }

    /// The ban that lasts longest, which names the whole record in firewalls and tables.
    pub fn longest(&self) -> Option<&Ban> {
        self.bans.iter().max_by_key(|ban| ban.expires_at.unwrap_or(Timestamp::MAX))
    }
}

/// A change to the desired state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BanChange {
    /// This is now the record of its target.
    Put(BanRecord),
    /// The target is not banned any more.
    Delete(Target),
}

impl BanChange {
    /// Whom the change is about.
    pub fn target(&self) -> Target {
        match self {
            Self::Put(record) => record.target,
            Self::Delete(target) => *target,
        }
    }
}

/// Since when and until when nobody is banned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pause {
    /// When the pause began.
    pub since: Timestamp,
    /// When it ends by itself; `None` = by `resume` only.
    pub until: Option<Timestamp>,
}

/// Who may never be banned, and whether anybody may be: published by detect to every enforcer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lists {
    /// Built-in sets, configured networks, resolved names and `allow`ed targets, merged.
    pub never_ban: Vec<IpNet>,
    /// Set while all bans are lifted.
    pub paused: Option<Pause>,
}
