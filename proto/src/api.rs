//! The operator API: HTTP with JSON bodies, over the unix socket or over TCP with a bearer token. Paths and types; the
//! service is in detect, the client in deploy.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::ban::{Ban, BanRecord, Pause};
use crate::net::Target;
use crate::report::NodeReport;
use crate::time::Timestamp;

/// Shortest token in bytes: 128 bits in hexadecimal digits.
pub const TOKEN_BYTES_MIN: usize = 32;
/// Longest token in bytes.
pub const TOKEN_BYTES_MAX: usize = 512;

/// Paths of the API. All bodies are JSON; errors are [`ApiError`] with status 400, 403, 404, 409 or 503, and over TCP also
/// 401, 408 or 429. `GET` needs a token of the scope `read`, all else one of the scope `write`.
pub mod path {
    /// POST [`super::BanRequest`] -> [`super::BanReply`].
    pub const BAN: &str = "/v1/ban";
    /// POST [`super::UnbanRequest`] -> [`super::UnbanReply`].
    pub const UNBAN: &str = "/v1/unban";
    /// POST [`super::AllowRequest`] -> [`super::AllowReply`].
    pub const ALLOW: &str = "/v1/allow";
    /// POST [`super::PauseRequest`] -> [`super::PauseReply`].
    pub const PAUSE: &str = "/v1/pause";
    /// POST -> [`super::PauseReply`].
    pub const RESUME: &str = "/v1/resume";
    /// GET -> [`super::BansReply`].
    pub const BANS: &str = "/v1/bans";
    /// GET -> [`super::StatusReply`].
    pub const STATUS: &str = "/v1/status";
    /// GET with `?address=` -> [`super::ExplainReply`].
    pub const EXPLAIN: &str = "/v1/explain";
    /// GET -> endless NDJSON of [`crate::envelope::CloudEvent`], with an empty line where nothing happens for 15 seconds.
    pub const TAIL: &str = "/v1/tail";
}

/// Order a ban.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BanRequest {
    /// Whom.
    pub target: Target,
    /// For how long, in seconds, at least 1; `None` = permanent.
    pub seconds: Option<u64>,
    /// Why, for people; at most 1,000 characters are kept.
    #[serde(default)]
    pub reason: String,
}

/// The ban is decided and stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BanReply {
    /// The ban as ordered.
    pub ban: Ban,
}

/// Lift bans.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnbanRequest {
    /// Whom. An address also frees its counting prefix.
    #[serde(default)]
    pub targets: Vec<Target>,
    /// Everybody.
    #[serde(default)]
    pub all: bool,
}

/// A wider ban that still covers what was to be freed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CoveredBy {
    /// Asked for.
    pub target: Target,
    /// Still in force.
    pub by: Target,
}

/// What became of an unban.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnbanReply {
    /// Freed targets.
    pub lifted: Vec<Target>,
    /// Asked for, but not banned.
    pub not_banned: Vec<Target>,
    /// Still banned by a wider operator ban.
    pub covered: Vec<CoveredBy>,
}

/// Never ban a target from now on, and unban it at once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AllowRequest {
    /// Whom.
    pub target: Target,
    /// For how long, in seconds; `None` = for ever.
    pub seconds: Option<u64>,
}

/// The allowance is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AllowReply {
    /// Whom.
    pub target: Target,
    /// Until when; `None` = for ever.
    pub until: Option<Timestamp>,
    /// Bans that this lifted.
    pub lifted: Vec<Target>,
    /// A wider ban that still covers it; firewalls let the target through all the same.
    pub covered: Vec<CoveredBy>,
}

/// Lift every ban and ban nobody meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PauseRequest {
    /// For how long, in seconds; `None` = until resumed.
    pub seconds: Option<u64>,
}

/// The state after `pause` or `resume`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PauseReply {
    /// Set while paused.
    pub paused: Option<Pause>,
}

/// The bans in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BansReply {
    /// By target.
    pub bans: Vec<BanRecord>,
}

/// Health of every role.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusReply {
    /// When this was put together, by the answering host's clock.
    pub at: Timestamp,
    /// By role and node.
    pub nodes: Vec<NodeReport>,
}

/// How far one rule has counted for one client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleProgress {
    /// Rule name.
    pub rule: String,
    /// `enforce` or `shadow`.
    pub mode: String,
    /// Matching events within the newest window.
    pub counted: u32,
    /// How many make a ban.
    pub needed: u32,
    /// Length of the window in seconds.
    pub find_seconds: u64,
    /// Oldest and newest of the counted events.
    pub first_seen: Option<Timestamp>,
    /// See `first_seen`.
    pub last_seen: Option<Timestamp>,
    /// Bans so far that count for escalation.
    pub ban_count: u32,
    /// Length of the next ban in seconds, jitter aside.
    pub next_ban_seconds: u64,
}

/// How an address stands with one back end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HoldState {
    /// It has an entry in force that holds the address.
    Held,
    /// An entry is about to be added, or removed.
    Waiting,
    /// Nobody asked for it: no ban covers the address, or none that this back end carries out.
    NotDue,
    /// There was no room, and bans that last longer were preferred.
    LeftOut,
    /// It may not be banned there, or cannot be said there.
    Refused,
    /// All bans are lifted there.
    Paused,
    /// The back end holds nothing back: a dry run, no firewall, or something it lacks.
    Idle,
    /// Another host does this work.
    Standby,
    /// It does not answer.
    Silent,
    /// It is not known: the host is of a version that says it otherwise.
    #[default]
    #[serde(other)]
    Unknown,
}

/// What one back end says of an address.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendHold {
    /// Node of the back end.
    pub node: String,
    /// Its name.
    pub backend: String,
    /// The entry that holds the address; `None` where nothing does.
    pub entry: Option<Target>,
    /// Why it holds or does not hold it, for people.
    pub detail: String,
    /// Whether it lets the address pass on purpose: it may not be banned on this host, or all bans are lifted there.
    #[serde(default)]
    pub spared: bool,
    /// How the address stands there.
    #[serde(default)]
    pub state: HoldState,
    /// When the entry goes; `None` where there is none, or it has no end.
    #[serde(default)]
    pub until: Option<Timestamp>,
    /// Since when the back end is known to have a ban of the address in force, as detect keeps it: at the moment or after
    /// it, and not before the detector started. `None` where it has not said so, or where nothing holds the address.
    #[serde(default)]
    pub confirmed_at: Option<Timestamp>,
}

impl BackendHold {
    /// Name of the back end where a host does not answer.
    pub const UNKNOWN: &str = "unknown";
    /// Name of the back end that keeps Cloudflare.
    pub const CLOUDFLARE: &str = "cloudflare";
    /// Name of the back end that refuses clients behind a proxy. All others are firewalls.
    pub const FORWARDED_FOR: &str = "forwarded-for";

    /// What holds nothing, and why.
    pub fn without(state: HoldState, detail: impl Into<String>) -> Self {
        let spared = state == HoldState::Paused;
        Self { state, detail: detail.into(), spared, ..Self::default() }
    }

    /// Whether it keeps the address out.
    pub fn is_held(&self) -> bool {
        // Older hosts say no more than the entry.
        self.state == HoldState::Held || (self.state == HoldState::Unknown && self.entry.is_some())
    }
}

/// Why an address is banned, or why not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExplainReply {
    /// Asked for.
    pub address: IpAddr,
    /// What the address is counted and banned by.
    pub target: Target,
    /// Why it may never be banned, if so.
    pub never_ban: Option<String>,
    /// Set while all bans are lifted.
    pub paused: Option<Pause>,
    /// Bans that cover it.
    pub bans: Vec<Ban>,
    /// Events before this moment count for no rule: the end of its newest ban, or its unban.
    pub counts_from: Option<Timestamp>,
    /// Each rule's progress.
    pub rules: Vec<RuleProgress>,
    /// What the back ends hold.
    pub backends: Vec<BackendHold>,
}

/// A refusal, or a failure.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiError {
    /// What is wrong, for people.
    pub error: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_older_and_newer_hosts_say_they_hold_is_understood() {
        let read = |json: &str| serde_json::from_str::<BackendHold>(json).unwrap();
        let older = read(r#"{"node":"a","backend":"iptables","entry":"192.0.2.1","detail":"in set","spared":false}"#);
        assert!(older.is_held() && older.state == HoldState::Unknown && older.until.is_none());
        let oldest = read(r#"{"node":"a","backend":"iptables","entry":null,"detail":"not banned"}"#);
        assert!(!oldest.is_held() && !oldest.spared);
        let newer = read(r#"{"node":"a","backend":"x","entry":null,"detail":"","state":"melted","of_later":1}"#);
        assert_eq!(newer.state, HoldState::Unknown);
        let held = BackendHold { until: Some(Timestamp::EPOCH), state: HoldState::LeftOut, ..older };
        assert_eq!(read(&serde_json::to_string(&held).unwrap()), held);
        assert!(!held.is_held(), "an entry alone holds nobody where the back end says that it does not");
    }
}
