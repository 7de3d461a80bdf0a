//! What the active detector sees of the others, and what of that needs a person. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use proto::bus::nats::nodes::SILENT_AFTER;
use proto::report::{NodeReport, Problem, Role, Severity};
use proto::time::{Timestamp, render_duration};

/// The same is told again after so long.
const REPEAT_AFTER: Duration = Duration::from_secs(10 * 60);
/// Different things remembered; beyond it the oldest are told again.
const TOLD_MAX: usize = 1000;

/// What has been told, and when.
#[derive(Debug, Default)]
pub(crate) struct Peers {
    told: BTreeMap<String, Timestamp>,
    refused: u64,
}

impl Peers {
    /// What is new in the `reports` of all hosts: the kind and text of each alarm. `own` is the fingerprint of our rules.
    pub(crate) fn look(
        &mut self,
        reports: &[NodeReport],
        node: &str,
        own: &str,
        now: Timestamp,
    ) -> Vec<(&'static str, String)> {
        let mut alarms = Vec::new();
        for report in reports {
            let name = format!("{} on {}", report.role.as_str(), report.node);
            let is_us = report.role == Role::Detect && report.node == node;
            let theirs = report.detect.as_ref().map(|detect| detect.fingerprint.as_str());
            if !is_us && theirs.is_some_and(|theirs| !theirs.is_empty() && theirs != own) {
                let text = format!(
                    "{name} has other rules than {node}, which is active: after a take-over it would ban \
                                    others; give all detectors the same configuration"
                );
                alarms.extend(self.tell("rules-differ", text, now));
            }
            let silent = now.since(report.at);
            if !is_us && silent >= SILENT_AFTER {
                let text = format!("{name} has said nothing for {}", render_duration(silent));
                alarms.extend(self.tell("node-silent", text, now));
                // What it said last is of another time.
                continue;
            }
            for problem in report.problems.iter().filter(|problem| problem.severity == Severity::Degraded) {
                if !is_us {
                    alarms.extend(self.tell("node-degraded", format!("{name}: {}", problem.text), now));
                }
            }
        }
        alarms
    }

    /// Notes a refused batch; what to tell, if that is new.
    pub(crate) fn note_refusal(&mut self, subject: &str, why: &str, now: Timestamp) -> Option<String> {
        self.refused += 1;
        self.tell("batch-refused", format!("{why} ({subject}): it does not count"), now).map(|(_, text)| text)
    }

    /// What is wrong with the log.
    pub(crate) fn problem(&self) -> Option<Problem> {
        let text = || format!("{} batches were refused: see the log, a host may be of another version", self.refused);
        (self.refused > 0).then(|| Problem::warning(text()))
    }

    fn tell(&mut self, kind: &'static str, text: String, now: Timestamp) -> Option<(&'static str, String)> {
        // Numbers in a text change all the time; it is the same all the same.
        let key: String = text.chars().filter(|c| !c.is_ascii_digit()).collect();
        let is_known = self.told.get(&key).is_some_and(|told| now.since(*told) < REPEAT_AFTER);
        if is_known {
            return None;
        }
        if self.told.len() >= TOLD_MAX {
            self.told.clear();
        }
        self.told.insert(key, now);
        Some((kind, text))
    }
}

#[cfg(test)]
mod tests {
    use proto::report::DetectReport;

    use super::*;

    #[test]
    fn each_trouble_is_told_once_in_a_while() {
        let mut peers = Peers::default();
        let at = Timestamp::from_secs;
        let mut other = NodeReport::new("b", Role::Detect, at(0));
        other.detect = Some(DetectReport { fingerprint: "y".into(), ..DetectReport::default() });
        let mut enforcer = NodeReport::new("e", Role::Enforce, at(0));
        enforcer.problems.push(Problem::degraded("5 bans are not in force"));
        enforcer.problems.push(Problem::warning("does not matter"));
        let reports = [other, enforcer.clone()];
        let kinds: Vec<&str> = peers.look(&reports, "a", "x", at(0)).iter().map(|(kind, _)| *kind).collect();
        assert_eq!(kinds, ["rules-differ", "node-degraded"]);
        enforcer.problems[0].text = "6 bans are not in force".to_owned();
        assert_eq!(peers.look(&[enforcer.clone()], "a", "x", at(1)), []);
        enforcer.at = at(600);
        assert_eq!(peers.look(&[enforcer.clone()], "a", "x", at(600)).len(), 1);
        let silent = peers.look(&[enforcer], "a", "x", at(700));
        assert_eq!(silent, [("node-silent", "enforce on e has said nothing for 1m 40s".to_owned())]);
    }
}
