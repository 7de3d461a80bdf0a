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

/// What one back end says of an address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
}

impl BackendHold {
    /// Name of the back end where a host does not answer.
    pub const UNKNOWN: &str = "unknown";
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
