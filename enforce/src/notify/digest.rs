//! Many events in one message: how many, by what, and a few of each. Of fixed size, however many there are. Pure.

use std::collections::BTreeMap;

use proto::envelope::Data;
use proto::time::Timestamp;
use serde::{Deserialize, Serialize};

use crate::notify::message::{EventKind, Notice};

/// Rules that are counted by name; all others together.
const RULES_MAX: usize = 20;
/// Targets, hosts, nodes and alarms that are named.
const NAMED_MAX: usize = 10;
/// Characters of a name or an alarm.
const NAMED_CHARS_MAX: usize = 200;
/// Rules beyond those counted by name.
const OTHER_RULES: &str = "others";

/// What happened in a while.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Digest {
    /// When the first happened.
    pub(crate) since: Timestamp,
    /// When the last happened.
    pub(crate) until: Timestamp,
    /// How many.
    pub(crate) total: u64,
    /// How many of each kind.
    pub(crate) counts: BTreeMap<EventKind, u64>,
    /// How many of each rule.
    pub(crate) rules: BTreeMap<String, u64>,
    /// The first that were banned.
    pub(crate) targets: Vec<String>,
    /// The first hosts that they asked for.
    pub(crate) hosts: Vec<String>,
    /// The first nodes that saw them.
    pub(crate) nodes: Vec<String>,
    /// The first alarms' texts.
    pub(crate) alarms: Vec<String>,
    /// Of the first event: the digest's own derives from it.
    pub(crate) first_id: String,
}

impl Digest {
    /// Of one event.
    pub(crate) fn of(first: &Notice) -> Self {
        let mut digest = Self {
            since: first.time(),
            until: first.time(),
            total: 0,
            counts: BTreeMap::new(),
            rules: BTreeMap::new(),
            targets: Vec::new(),
            hosts: Vec::new(),
            nodes: Vec::new(),
            alarms: Vec::new(),
            first_id: first.id(),
        };
        digest.add(first);
        digest
    }

    /// One more.
    pub(crate) fn add(&mut self, notice: &Notice) {
        self.total += 1;
        self.since = self.since.min(notice.time());
        self.until = self.until.max(notice.time());
        *self.counts.entry(notice.kind()).or_default() += 1;
        let Notice::Event(event) = notice else {
            name(&mut self.nodes, notice.node());
            return;
        };
        match &event.data {
            Data::Ban(ban) => {
                let is_counted = self.rules.contains_key(&ban.rule) || self.rules.len() < RULES_MAX;
                let rule = if is_counted { &ban.rule } else { OTHER_RULES };
                *self.rules.entry(rule.to_owned()).or_default() += 1;
                if notice.kind() != EventKind::Unbanned {
                    name(&mut self.targets, &ban.target.to_string());
                }
                ban.evidence.hosts.iter().for_each(|host| name(&mut self.hosts, host));
                ban.evidence.nodes.iter().for_each(|node| name(&mut self.nodes, node));
            }
            Data::Alarm(alarm) => name(&mut self.alarms, &alarm.text),
        }
    }
}

fn name(known: &mut Vec<String>, text: &str) {
    let text: String = text.chars().take(NAMED_CHARS_MAX).collect();
    if known.len() < NAMED_MAX && !known.contains(&text) {
        known.push(text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::notify::message::samples::{alarm, banned};

    #[test]
    fn everything_is_counted_and_few_are_named() {
        let mut digest = Digest::of(&alarm("something"));
        for n in 0..1000 {
            digest.add(&banned(n, &format!("rule-{}", n % 30)));
        }
        assert_eq!(
            (digest.total, digest.counts[&EventKind::Banned], digest.counts[&EventKind::Alarm]),
            (1001, 1000, 1)
        );
        assert_eq!(digest.rules.values().sum::<u64>(), 1000);
        assert_eq!((digest.rules.len(), digest.targets.len(), digest.alarms.len()), (RULES_MAX + 1, NAMED_MAX, 1));
        assert!(serde_json::to_vec(&digest).unwrap().len() < 8 << 10);
    }
}
