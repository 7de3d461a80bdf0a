//! What is stored, and how it is written: JSON with a version, apart from the types it is used as.
//!
//! Times are nanoseconds, so that a ban ends after a restart exactly when it would have ended without one. Files in
//! `testdata/` hold every version ever written; each must decode for ever.

use std::collections::BTreeMap;
use std::net::IpAddr;

use proto::ban::{Ban, BanRecord, Evidence, Origin, Pause};
use proto::net::Target;
use proto::time::Timestamp;
use serde::{Deserialize, Serialize};

use crate::engine::Control;
use crate::engine::offender::{History, Offender, Quiet};
use crate::engine::stream::Position;

/// The version written by this program.
pub const VERSION: u32 = 1;

/// A stored value cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// It was written by a newer program.
    #[error("state version {0} is newer than this program's {VERSION}")]
    Newer(u32),
    /// It is not what it should be.
    #[error("stored {what} cannot be read")]
    Malformed {
        /// Which kind of value.
        what: &'static str,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
}

#[derive(Serialize, Deserialize)]
struct StoredBan {
    rule: String,
    origin: Origin,
    ban_count: u32,
    ban_seconds: Option<u64>,
    banned_at: i64,
    expires_at: Option<i64>,
    reason: String,
    evidence: StoredEvidence,
}

#[derive(Serialize, Deserialize)]
struct StoredEvidence {
    failures: u32,
    first_seen: Option<i64>,
    last_seen: Option<i64>,
    nodes: Vec<String>,
    hosts: Vec<String>,
    statuses: BTreeMap<u16, u32>,
    paths: Vec<String>,
    user_agents: Vec<String>,
    via_proxy: bool,
}

#[derive(Serialize, Deserialize)]
struct StoredOffender {
    rules: Vec<StoredHistory>,
    quiets: Vec<(u64, i64)>,
}

#[derive(Serialize, Deserialize)]
struct StoredHistory {
    rule: String,
    count: u32,
    last_end: i64,
    consumed: u64,
}

#[derive(Serialize, Deserialize)]
struct StoredControl {
    paused: Option<(i64, Option<i64>)>,
    counts_from: i64,
    counts_after: u64,
    allowed: BTreeMap<Target, Option<i64>>,
    resolved: BTreeMap<String, Vec<IpAddr>>,
    position: u64,
}

fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    // Maps with string keys and numbers only: this cannot fail.
    serde_json::to_vec(value).unwrap_or_default()
}

fn decode<'a, T: Deserialize<'a>>(what: &'static str, bytes: &'a [u8]) -> Result<T, DecodeError> {
    serde_json::from_slice(bytes).map_err(|source| DecodeError::Malformed { what, source })
}

fn nanos(time: Timestamp) -> i64 {
    time.as_nanos()
}

/// Writes the bans of a target; the target itself is the key.
pub fn encode_record(record: &BanRecord) -> Vec<u8> {
    let bans: Vec<StoredBan> = record.bans.iter().map(StoredBan::from).collect();
    encode(&bans)
}

/// Reads the bans of `target`.
pub fn decode_record(target: Target, bytes: &[u8]) -> Result<BanRecord, DecodeError> {
    let bans: Vec<StoredBan> = decode("ban", bytes)?;
    Ok(BanRecord { target, bans: bans.into_iter().map(|ban| ban.into_ban(target)).collect() })
}

impl From<&Ban> for StoredBan {
    fn from(ban: &Ban) -> Self {
        let evidence = &ban.evidence;
        Self {
            rule: ban.rule.clone(),
            origin: ban.origin,
            ban_count: ban.ban_count,
            ban_seconds: ban.ban_seconds,
            banned_at: nanos(ban.banned_at),
            expires_at: ban.expires_at.map(nanos),
            reason: ban.reason.clone(),
            evidence: StoredEvidence {
                failures: evidence.failures,
                first_seen: evidence.first_seen.map(nanos),
                last_seen: evidence.last_seen.map(nanos),
                nodes: evidence.nodes.clone(),
                hosts: evidence.hosts.clone(),
                statuses: evidence.statuses.clone(),
                paths: evidence.paths.clone(),
                user_agents: evidence.user_agents.clone(),
                via_proxy: evidence.via_proxy,
            },
        }
    }
}

impl StoredBan {
    fn into_ban(self, target: Target) -> Ban {
        let evidence = self.evidence;
        Ban {
            target,
            rule: self.rule,
            origin: self.origin,
            ban_count: self.ban_count,
            ban_seconds: self.ban_seconds,
            banned_at: Timestamp::from_nanos(self.banned_at),
            expires_at: self.expires_at.map(Timestamp::from_nanos),
            reason: self.reason,
            evidence: Evidence {
                failures: evidence.failures,
                first_seen: evidence.first_seen.map(Timestamp::from_nanos),
                last_seen: evidence.last_seen.map(Timestamp::from_nanos),
                nodes: evidence.nodes,
                hosts: evidence.hosts,
                statuses: evidence.statuses,
                paths: evidence.paths,
                user_agents: evidence.user_agents,
                via_proxy: evidence.via_proxy,
            },
        }
    }
}

/// Writes a history.
pub fn encode_offender(offender: &Offender) -> Vec<u8> {
    let rules = offender.rules.iter().map(|history| StoredHistory {
        rule: history.rule.to_string(),
        count: history.count,
        last_end: nanos(history.last_end),
        consumed: history.consumed.0,
    });
    let quiets = offender.quiets.iter().map(|quiet| (quiet.after.0, nanos(quiet.until)));
    encode(&StoredOffender { rules: rules.collect(), quiets: quiets.collect() })
}

/// Reads a history.
pub fn decode_offender(bytes: &[u8]) -> Result<Offender, DecodeError> {
    let stored: StoredOffender = decode("offender", bytes)?;
    let rules = stored.rules.into_iter().map(|history| History {
        rule: history.rule.into(),
        count: history.count,
        last_end: Timestamp::from_nanos(history.last_end),
        consumed: Position(history.consumed),
    });
    let quiets = stored
        .quiets
        .into_iter()
        .map(|(after, until)| Quiet { after: Position(after), until: Timestamp::from_nanos(until) });
    Ok(Offender { rules: rules.collect(), quiets: quiets.collect() })
}

/// Writes what there is one of.
pub fn encode_control(control: &Control) -> Vec<u8> {
    encode(&StoredControl {
        paused: control.paused.map(|pause| (nanos(pause.since), pause.until.map(nanos))),
        counts_from: nanos(control.counts_from),
        counts_after: control.counts_after.0,
        allowed: control.allowed.iter().map(|(target, until)| (*target, until.map(nanos))).collect(),
        resolved: control.resolved.clone(),
        position: control.position.0,
    })
}

/// Reads what there is one of.
pub fn decode_control(bytes: &[u8]) -> Result<Control, DecodeError> {
    let stored: StoredControl = decode("control", bytes)?;
    let time = Timestamp::from_nanos;
    Ok(Control {
        paused: stored.paused.map(|(since, until)| Pause { since: time(since), until: until.map(time) }),
        counts_from: time(stored.counts_from),
        counts_after: Position(stored.counts_after),
        allowed: stored.allowed.into_iter().map(|(target, until)| (target, until.map(time))).collect(),
        resolved: stored.resolved,
        position: Position(stored.position),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> BanRecord {
        let target = "2001:db8::/64".parse().unwrap();
        let time = Timestamp::from_nanos(1_767_881_955_980_170_592);
        let evidence = Evidence {
            failures: 15,
            first_seen: Some(time),
            last_seen: Some(time),
            nodes: vec!["edge-1".into()],
            hosts: vec!["example.com".into()],
            statuses: BTreeMap::from([(404, 14), (405, 1)]),
            paths: vec!["/wp-login.php".into()],
            user_agents: vec!["curl/8".into()],
            via_proxy: true,
        };
        let ban = Ban {
            target,
            rule: "forceful-browsing".into(),
            origin: Origin::Detect,
            ban_count: 2,
            ban_seconds: Some(1260),
            banned_at: time,
            expires_at: Some(Timestamp::from_nanos(1_767_883_215_980_170_592)),
            reason: "15 requests within 1m".into(),
            evidence,
        };
        let operator = Ban {
            rule: "operator".into(),
            origin: Origin::Operator,
            ban_count: 1,
            ban_seconds: None,
            expires_at: None,
            evidence: Evidence::default(),
            ..ban.clone()
        };
        BanRecord { target, bans: vec![ban, operator] }
    }

    fn offender() -> Offender {
        let mut offender = Offender::default();
        let history = offender.history_mut(&"forceful-browsing".into());
        (history.count, history.last_end, history.consumed) =
            (2, Timestamp::from_nanos(1_767_883_215_980_170_592), Position(7));
        offender.set_quiet(Quiet { after: Position(7), until: Timestamp::MAX });
        offender
    }

    fn control() -> Control {
        Control {
            paused: Some(Pause { since: Timestamp::from_secs(1), until: None }),
            counts_from: Timestamp::from_secs(2),
            counts_after: Position(6),
            allowed: BTreeMap::from([("192.0.2.0/24".parse().unwrap(), Some(Timestamp::from_secs(3)))]),
            resolved: BTreeMap::from([("home.example.net".into(), vec!["198.51.100.7".parse().unwrap()])]),
            position: Position(8),
        }
    }

    #[test]
    fn version_1_decodes_for_ever() {
        let target = "2001:db8::/64".parse().unwrap();
        assert_eq!(decode_record(target, include_bytes!("../testdata/state-v1/ban.json")).unwrap(), record());
        assert_eq!(decode_offender(include_bytes!("../testdata/state-v1/offender.json")).unwrap(), offender());
        assert_eq!(decode_control(include_bytes!("../testdata/state-v1/control.json")).unwrap(), control());
    }

    #[test]
    fn what_is_written_is_read_back() {
        assert_eq!(decode_record(record().target, &encode_record(&record())).unwrap(), record());
        assert_eq!(decode_offender(&encode_offender(&offender())).unwrap(), offender());
        assert_eq!(decode_control(&encode_control(&control())).unwrap(), control());
        assert!(decode_offender(b"{").is_err());
    }
}
