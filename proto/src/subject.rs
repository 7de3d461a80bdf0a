//! Names on the bus and in configurations.

use crate::net::Target;
use crate::report::Role;

/// The rule name of bans that an operator ordered.
pub const OPERATOR: &str = "operator";
/// Reserved for what Portcullis says of itself.
pub const SYSTEM: &str = "system";

/// Whether `name` may name a node, source or rule: `[a-z0-9-]{1,63}`.
pub fn is_name(name: &str) -> bool {
    (1..=63).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

/// Maps any host name to a valid name: lower case, everything else `-`, at most 63 bytes, never empty.
pub fn name_from_host(host: &str) -> String {
    let mapped: String = host
        .chars()
        .take(63)
        .map(|c| c.to_ascii_lowercase())
        .map(|c| if c.is_ascii_lowercase() || c.is_ascii_digit() { c } else { '-' })
        .collect();
    let trimmed = mapped.trim_matches('-');
    if trimmed.is_empty() { "node".to_owned() } else { trimmed.to_owned() }
}

/// Longest prefix of all names on the bus, in bytes.
pub const PREFIX_BYTES_MAX: usize = 32;
/// The prefix unless configured.
pub const PREFIX: &str = "portcullis";

/// Every name on a NATS bus, all under one prefix, so that several installations can share a cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subjects {
    prefix: String,
}

/// The key that detect rewrites first in each of its commits.
pub const KEY_HEAD: &str = "detect";
/// The key of what there is one of and only detect needs.
pub const KEY_CONTROL: &str = "control";
/// The key of who may never be banned, and of a pause.
pub const KEY_LISTS: &str = "lists";
/// The key of what rules can match.
pub const KEY_PREDICATE: &str = "predicate";
/// Keys of banned targets begin with this.
pub const KEY_BAN: &str = "ban.";
/// Keys of histories begin with this.
pub const KEY_OFFENDER: &str = "offender.";
/// Keys of events that wait to be published begin with this.
pub const KEY_OUT: &str = "out.";

impl Subjects {
    /// Under `prefix`, which is a name of at most [`PREFIX_BYTES_MAX`] bytes.
    pub fn new(prefix: &str) -> Self {
        Self { prefix: prefix.to_owned() }
    }

    /// Name of the stream of access batches.
    pub fn access_stream(&self) -> String {
        format!("{}_ACCESS", self.upper())
    }

    /// Where the batches of a node are published; `*` for all nodes.
    pub fn access(&self, node: &str) -> String {
        format!("{}.access.v1.{node}", self.prefix)
    }

    /// Where stored batches appear again, with their number and time; `>` in place of the node for all.
    pub fn access_log(&self, node: &str) -> String {
        format!("{}.log.v1.{node}", self.prefix)
    }

    /// The node that an access subject names.
    pub fn node_of_access<'s>(&self, subject: &'s str) -> Option<&'s str> {
        subject.strip_prefix(&self.access("")).filter(|node| is_name(node))
    }

    /// Where shippers publish raw lines for the sources of this name.
    pub fn raw(&self, source: &str) -> String {
        format!("{}.raw.v1.{source}", self.prefix)
    }

    /// Name of the stream of public events.
    pub fn events_stream(&self) -> String {
        format!("{}_EVENTS", self.upper())
    }

    /// Where an event is published; `kind` is `ban`, `unban`, `extend` or `alarm`.
    pub fn event(&self, kind: &str, rule: &str) -> String {
        format!("{}.events.v1.{kind}.{rule}", self.prefix)
    }

    /// All public events.
    pub fn events(&self) -> String {
        format!("{}.events.v1.>", self.prefix)
    }

    /// The bucket of bans, histories and what goes with them.
    pub fn state_bucket(&self) -> String {
        format!("{}_bans", self.prefix)
    }

    /// Where the stored state appears again, with number and time.
    pub fn state_feed(&self) -> String {
        format!("{}.state.v1.>", self.prefix)
    }

    /// The bucket of heartbeats.
    pub fn nodes_bucket(&self) -> String {
        format!("{}_nodes", self.prefix)
    }

    /// The bucket of detect's lease.
    pub fn lease_bucket(&self) -> String {
        format!("{}_lease", self.prefix)
    }

    /// The bucket of the leases of enforcers, and of how far they have told of events: one that they may fill.
    pub fn duty_bucket(&self) -> String {
        format!("{}_duty", self.prefix)
    }

    /// Where an enforcer is asked what holds an address.
    pub fn explain(&self, node: &str) -> String {
        format!("{}.explain.v1.{node}", self.prefix)
    }

    /// Where the active detector takes requests that others received.
    pub fn api(&self) -> String {
        format!("{}.api.v1", self.prefix)
    }

    fn upper(&self) -> String {
        self.prefix.to_ascii_uppercase().replace('-', "_")
    }
}

/// The stream behind a bucket.
pub fn bucket_stream(bucket: &str) -> String {
    format!("KV_{bucket}")
}

/// The subject of a key in a bucket.
pub fn bucket_key(bucket: &str, key: &str) -> String {
    format!("$KV.{bucket}.{key}")
}

/// The key of a node's heartbeat.
pub fn node_key(role: Role, node: &str) -> String {
    format!("{}.{node}", role.as_str())
}

/// The key, beside the leases of enforcers, of how far the teller `name` has told of events.
pub fn told_key(name: &str) -> String {
    format!("told.{name}")
}

/// A target as it stands in keys: `:` is not allowed there and becomes `_`.
pub fn target_key(target: &Target) -> String {
    target.to_string().replace(':', "_")
}

/// Reads what [`target_key`] wrote.
pub fn parse_target_key(key: &str) -> Option<Target> {
    key.replace('_', ":").parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_survive_their_keys() {
        for text in ["192.0.2.1", "192.0.2.0/24", "2001:db8::/64", "::1"] {
            let target: Target = text.parse().unwrap();
            let key = target_key(&target);
            assert!(key.bytes().all(|b| b.is_ascii_alphanumeric() || b"-/_=.".contains(&b)), "{key}");
            assert_eq!(parse_target_key(&key), Some(target));
        }
        assert_eq!(target_key(&"2001:db8::/64".parse().unwrap()), "2001_db8__/64");
        assert_eq!(parse_target_key("x"), None);
    }

    #[test]
    fn a_subject_names_its_node() {
        let subjects = Subjects::new("portcullis");
        assert_eq!(subjects.node_of_access("portcullis.access.v1.edge-1"), Some("edge-1"));
        assert_eq!(subjects.node_of_access("portcullis.access.v1.a.b"), None);
        assert_eq!(Subjects::new("my-edge").access_stream(), "MY_EDGE_ACCESS");
    }

    #[test]
    fn host_names_become_valid_names() {
        for (host, name) in [("Edge-1.example", "edge-1-example"), ("", "node"), ("ü", "node"), ("a_b", "a-b")] {
            assert_eq!(name_from_host(host), name);
        }
        assert!(is_name(&name_from_host(&"x".repeat(200))));
        assert!(!is_name("") && !is_name("A") && !is_name("a.b") && is_name("a-1"));
    }
}
