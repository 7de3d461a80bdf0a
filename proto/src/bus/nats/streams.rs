//! The streams and buckets: what each must be, made where absent and compared where present.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{BusError, Connection};
use crate::bus::config::NatsConfig;
use crate::subject::{Subjects, bucket_stream};

/// How long a heartbeat of a host that is gone is kept.
const NODES_KEEP: Duration = Duration::from_secs(24 * 3600);
/// Largest heartbeat, in bytes: a host that is broken into must not fill the disk.
const HEARTBEAT_BYTES_MAX: i64 = 256 << 10;
/// Largest lease, or position beside one, and a bucket of them, in bytes.
const LEASE_BYTES_MAX: i64 = 1 << 10;
const LEASES_BYTES_MAX: i64 = 1 << 20;
/// How long a repeated message is recognised by its id.
const DUPLICATES_KEEP: Duration = Duration::from_secs(120);

/// JetStream's codes for an account, a cluster and a server that cannot hold so much.
const NO_ROOM: [u64; 3] = [10002, 10023, 10047];
/// JetStream's code for servers of which none fits, for many reasons.
const NO_PEERS: u64 = 10005;

/// The part of a stream's configuration that we rely on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StreamConfig {
    name: String,
    subjects: Vec<String>,
    storage: String,
    num_replicas: u8,
    retention: String,
    discard: String,
    max_bytes: i64,
    max_msg_size: i64,
    /// Nanoseconds.
    max_age: u64,
    max_msgs_per_subject: i64,
    /// Nanoseconds.
    duplicate_window: u64,
    allow_direct: bool,
    deny_delete: bool,
    allow_rollup_hdrs: bool,
    allow_msg_ttl: bool,
    allow_atomic: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    republish: Option<Republish>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Republish {
    src: String,
    dest: String,
}

/// What a server says of a stream.
#[derive(Clone, Debug, Deserialize)]
pub struct StreamInfo {
    pub(crate) config: StreamConfig,
    /// When it was made: another stream of the same name has another moment.
    pub created: String,
    /// What it holds.
    pub state: StreamState,
}

impl StreamInfo {
    /// Whether it will soon take nothing more.
    pub fn is_nearly_full(&self) -> bool {
        u64::try_from(self.config.max_bytes).is_ok_and(|bytes_max| self.state.bytes >= bytes_max / 10 * 9)
    }
}

/// What a stream holds.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct StreamState {
    /// Bytes.
    pub bytes: u64,
    /// Number of its first message.
    pub first_seq: u64,
    /// Number of its last message, be it still there or not.
    pub last_seq: u64,
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl StreamConfig {
    fn new(name: String, subject: String, replicas: u8) -> Self {
        Self {
            name,
            subjects: vec![subject],
            storage: "file".to_owned(),
            num_replicas: replicas,
            retention: "limits".to_owned(),
            discard: "old".to_owned(),
            max_bytes: -1,
            max_msg_size: -1,
            max_msgs_per_subject: -1,
            duplicate_window: nanos(DUPLICATES_KEEP),
            allow_direct: true,
            ..Self::default()
        }
    }

    fn bucket(name: &str, replicas: u8) -> Self {
        Self {
            discard: "new".to_owned(),
            max_msgs_per_subject: 1,
            deny_delete: true,
            allow_msg_ttl: true,
            ..Self::new(bucket_stream(name), format!("$KV.{name}.>"), replicas)
        }
    }

    /// Each difference to `found`, for people. Copies may differ: a cluster is resized by its operators.
    fn differences(&self, found: &Self) -> Vec<String> {
        let mut differences = Vec::new();
        let mut differ = |what: &str, wanted: String, found: String| {
            if wanted != found {
                differences.push(format!("{what} is {found} instead of {wanted}"));
            }
        };
        differ("subjects", self.subjects.join(" "), found.subjects.join(" "));
        differ("retention", self.retention.clone(), found.retention.clone());
        differ("discard", self.discard.clone(), found.discard.clone());
        differ("max_msg_size", self.max_msg_size.to_string(), found.max_msg_size.to_string());
        let per_subject = |config: &Self| config.max_msgs_per_subject.to_string();
        differ("max_msgs_per_subject", per_subject(self), per_subject(found));
        let republish = |config: &Self| {
            let to = |republish: &Republish| format!("{} -> {}", republish.src, republish.dest);
            config.republish.as_ref().map_or_else(|| "none".to_owned(), to)
        };
        differ("republish", republish(self), republish(found));
        for (what, wanted, found) in [
            ("allow_direct", self.allow_direct, found.allow_direct),
            ("allow_msg_ttl", self.allow_msg_ttl, found.allow_msg_ttl),
            ("allow_atomic", self.allow_atomic, found.allow_atomic),
        ] {
            if wanted {
                differ(what, wanted.to_string(), found.to_string());
            }
        }
        differ("allow_rollup_hdrs", self.allow_rollup_hdrs.to_string(), found.allow_rollup_hdrs.to_string());
        differences
    }
}

/// Every stream as it must be.
pub fn wanted(config: &NatsConfig) -> Vec<StreamConfig> {
    let names = Subjects::new(&config.prefix);
    let republish = |src: String, dest: String| Some(Republish { src, dest });
    let (state, nodes) = (names.state_bucket(), names.nodes_bucket());
    let stream = |name: String, subject: String| StreamConfig::new(name, subject, config.replicas);
    // Neither markers nor rollups: with them one host's key could wipe out all. Its leader alone is asked.
    let leases = |bucket: &str| StreamConfig {
        allow_direct: false,
        max_bytes: LEASES_BYTES_MAX,
        max_msg_size: LEASE_BYTES_MAX,
        ..StreamConfig::bucket(bucket, config.replicas)
    };
    vec![
        StreamConfig {
            discard: "new".to_owned(),
            max_bytes: i64::try_from(config.access_max_bytes).unwrap_or(i64::MAX),
            republish: republish(names.access(">"), names.access_log(">")),
            ..stream(names.access_stream(), names.access("*"))
        },
        StreamConfig { max_age: nanos(config.events_keep), ..stream(names.events_stream(), names.events()) },
        StreamConfig {
            allow_atomic: true,
            republish: republish(format!("$KV.{state}.>"), names.state_feed()),
            ..StreamConfig::bucket(&state, config.replicas)
        },
        StreamConfig {
            max_age: nanos(NODES_KEEP),
            max_msg_size: HEARTBEAT_BYTES_MAX,
            ..StreamConfig::bucket(&nodes, config.replicas)
        },
        leases(&names.lease_bucket()),
        // Apart from detect's, so that an enforcer that is broken into and fills it stops no detection.
        leases(&names.duty_bucket()),
    ]
}

/// Makes what is absent and compares what is present. For detect alone.
///
/// # Errors
/// A stream that is not as it must be, with every difference; or what the server says.
pub async fn ensure(connection: &Connection, config: &NatsConfig) -> Result<(), BusError> {
    for wanted in wanted(config) {
        let info: StreamInfo = match info(connection, &wanted.name).await {
            Ok(info) => info,
            Err(BusError::Absent { .. }) => {
                let made = connection.api(&format!("STREAM.CREATE.{}", wanted.name), &wanted).await;
                let made = made.map_err(|error| room_for(&wanted, error))?;
                tracing::info!(stream = wanted.name, replicas = wanted.num_replicas, "Stream made");
                made
            }
            Err(error) => return Err(error),
        };
        let differences = wanted.differences(&info.config);
        if !differences.is_empty() {
            return Err(BusError::Mismatch { stream: wanted.name, why: differences.join("; ") });
        }
        if info.config.max_bytes != wanted.max_bytes || info.config.max_age != wanted.max_age {
            resize(connection, info.config, &wanted).await?;
        }
    }
    Ok(())
}

/// Limits follow the configuration.
async fn resize(connection: &Connection, found: StreamConfig, wanted: &StreamConfig) -> Result<(), BusError> {
    let resized = StreamConfig { max_bytes: wanted.max_bytes, max_age: wanted.max_age, ..found };
    let updated = connection.api::<StreamInfo>(&format!("STREAM.UPDATE.{}", wanted.name), &resized).await;
    updated.map_err(|error| room_for(wanted, error))?;
    tracing::info!(stream = wanted.name, "Limits of the stream changed as configured");
    Ok(())
}

/// Why a stream cannot be made, in words of our configuration where it is the room that is reserved.
fn room_for(wanted: &StreamConfig, error: BusError) -> BusError {
    match (u64::try_from(wanted.max_bytes), error) {
        (Ok(bytes), BusError::Refused { why, code, .. })
            if NO_ROOM.contains(&code) || (code == NO_PEERS && why.contains("storage")) =>
        {
            BusError::NoRoom { stream: wanted.name.clone(), mebibytes: bytes >> 20, why }
        }
        (_, error) => error,
    }
}

/// What the server says of a stream. For detect alone: other accounts may not ask.
///
/// # Errors
/// When it is not there or nobody answers.
pub async fn info(connection: &Connection, stream: &str) -> Result<StreamInfo, BusError> {
    connection.api(&format!("STREAM.INFO.{stream}"), &serde_json::json!({})).await
}

/// Removes messages of `filter` before `sequence`; `None` = of all subjects.
pub async fn purge(connection: &Connection, stream: &str, filter: Option<&str>, sequence: u64) -> Result<(), BusError> {
    #[derive(Serialize)]
    struct Purge<'a> {
        #[serde(skip_serializing_if = "Option::is_none")]
        filter: Option<&'a str>,
        seq: u64,
    }
    let purge = Purge { filter, seq: sequence };
    let _: serde_json::Value = connection.api(&format!("STREAM.PURGE.{stream}"), &purge).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_foreign_stream_is_refused_with_every_difference() {
        let config = NatsConfig::new("nats://x");
        for wanted in wanted(&config) {
            assert_eq!(wanted.differences(&wanted), Vec::<String>::new());
        }
        let state = wanted(&config).into_iter().find(|stream| stream.allow_atomic).unwrap();
        let found = StreamConfig { allow_atomic: false, republish: None, max_msgs_per_subject: 5, ..state.clone() };
        let differences = state.differences(&found).join("; ");
        assert!(differences.contains("allow_atomic is false instead of true"), "{differences}");
        assert!(differences.contains("republish is none instead of $KV.portcullis_bans.> -> "), "{differences}");
        assert!(differences.contains("max_msgs_per_subject is 5 instead of 1"), "{differences}");
        assert!(state.differences(&StreamConfig { num_replicas: 3, ..state.clone() }).is_empty());
    }
}
