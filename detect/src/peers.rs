//! What the detector that decides sees of the other roles, on one host or many, and what of that needs a person. Pure.
//!
//! What hosts say of themselves may be said by somebody who broke into one: it is cut, and few of it become alarms.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proto::bus::nats::nodes::{SILENT_AFTER, STOPPED};
use proto::report::{NodeReport, Problem, Role, Severity};
use proto::time::{Timestamp, render_duration};

/// The same is told again after so long.
const REPEAT_AFTER: Duration = Duration::from_secs(10 * 60);
/// Different things remembered; beyond it the one told longest ago may be told again.
const TOLD_MAX: usize = 1000;
/// Alarms that one host may cause in [`REPEAT_AFTER`].
const ALARMS_OF_ONE_MAX: usize = 10;
/// Characters of an alarm's text.
const TEXT_CHARS_MAX: usize = 500;

/// An alarm: a stable word, and the text.
pub(crate) type Alarm = (&'static str, String);

/// What has been told, and when.
#[derive(Debug, Default)]
pub(crate) struct Peers {
    /// By whom it is about, and what it is.
    told: BTreeMap<(String, String), Timestamp>,
    by_age: BTreeSet<(Timestamp, (String, String))>,
    refused: u64,
}

impl Peers {
    /// What is new in the `reports` of all hosts. `own` is the fingerprint of our rules.
    pub(crate) fn look(&mut self, reports: &[NodeReport], node: &str, own: &str, now: Timestamp) -> Vec<Alarm> {
        let is_us = |report: &NodeReport| report.role == Role::Detect && report.node == node;
        let is_stopped = |report: &NodeReport| report.duty.as_deref() == Some(STOPPED);
        let others = reports.iter().filter(|report| !is_us(report) && !is_stopped(report));
        others.flat_map(|report| self.look_at(report, node, own, now)).collect()
    }

    fn look_at(&mut self, report: &NodeReport, node: &str, own: &str, now: Timestamp) -> Vec<Alarm> {
        let who = format!("{} on {}", report.role.as_str(), report.node);
        let silent = now.since(report.at);
        if silent >= SILENT_AFTER {
            // What it said last is of another time.
            let text = format!("has said nothing for {}", render_duration(silent));
            return self.tell("node-silent", &who, &text, now).into_iter().collect();
        }
        let mut alarms = Vec::new();
        let theirs = report.detect.as_ref().map(|detect| detect.fingerprint.as_str());
        if theirs.is_some_and(|theirs| !theirs.is_empty() && theirs != own) {
            let text = format!(
                "has other rules or lists than {node}, which is active: after a take-over it would ban others; give all \
                 detectors the same configuration"
            );
            alarms.extend(self.tell("rules-differ", &who, &text, now));
        }
        for problem in report.problems.iter().filter(|problem| problem.severity == Severity::Degraded) {
            alarms.extend(self.tell("node-degraded", &who, &problem.text, now));
        }
        alarms
    }

    /// What to tell of a problem of our own, if that is new.
    pub(crate) fn note_own(&mut self, node: &str, problem: &Problem, now: Timestamp) -> Option<Alarm> {
        self.tell("node-degraded", &format!("detect on {node}"), &problem.text, now)
    }

    /// Notes a refused batch; what to tell, if that is new.
    pub(crate) fn note_refusal(&mut self, node: &str, why: &str, now: Timestamp) -> Option<Alarm> {
        self.refused += 1;
        let text = format!("{why}: it does not count");
        self.tell("batch-refused", &format!("ingest on {node}"), &text, now)
    }

    /// What is wrong with the log.
    pub(crate) fn problem(&self) -> Option<Problem> {
        let text = || format!("{} batches were refused: see the log, a host may be of another version", self.refused);
        (self.refused > 0).then(|| Problem::warning(text()))
    }

    fn tell(&mut self, kind: &'static str, who: &str, text: &str, now: Timestamp) -> Option<Alarm> {
        let text: String = text.chars().take(TEXT_CHARS_MAX).collect();
        // Numbers in a text change all the time; it is the same all the same.
        let what: String = text.chars().filter(|c| !c.is_ascii_digit()).collect();
        let key = (who.to_owned(), format!("{kind} {what}"));
        let recent = |told: &Timestamp| now.since(*told) < REPEAT_AFTER;
        if self.told.get(&key).is_some_and(recent) {
            return None;
        }
        let from = (who.to_owned(), String::new());
        let of_this = self.told.range(from..).take_while(|((whose, _), _)| whose == who);
        if of_this.filter(|(_, told)| recent(told)).count() >= ALARMS_OF_ONE_MAX {
            return None;
        }
        if let Some(former) = self.told.insert(key.clone(), now) {
            self.by_age.remove(&(former, key.clone()));
        }
        self.by_age.insert((now, key));
        if self.told.len() > TOLD_MAX
            && let Some((_, oldest)) = self.by_age.pop_first()
        {
            self.told.remove(&oldest);
        }
        Some((kind, format!("{who}: {text}")))
    }
}

#[cfg(test)]
mod tests {
    use proto::report::DetectReport;

    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_secs(seconds)
    }

    fn degraded(node: &str, texts: &[String]) -> NodeReport {
        let mut report = NodeReport::new(node, Role::Enforce, at(0));
        report.problems = texts.iter().map(Problem::degraded).collect();
        report
    }

    #[test]
    fn each_trouble_is_told_once_in_a_while() {
        let mut peers = Peers::default();
        let mut other = NodeReport::new("b", Role::Detect, at(0));
        other.detect = Some(DetectReport { fingerprint: "y".into(), ..DetectReport::default() });
        let mut enforcer = degraded("e", &["5 bans are not in force".to_owned()]);
        enforcer.problems.push(Problem::warning("does not matter"));
        let reports = [other, enforcer.clone()];
        let kinds: Vec<&str> = peers.look(&reports, "a", "x", at(0)).iter().map(|(kind, _)| *kind).collect();
        assert_eq!(kinds, ["rules-differ", "node-degraded"]);
        enforcer.problems[0].text = "6 bans are not in force".to_owned();
        assert_eq!(peers.look(&[enforcer.clone()], "a", "x", at(1)), []);
        enforcer.at = at(600);
        assert_eq!(peers.look(&[enforcer.clone()], "a", "x", at(600)).len(), 1);
        let silent = peers.look(&[enforcer.clone()], "a", "x", at(700));
        assert_eq!(silent, [("node-silent", "enforce on e: has said nothing for 1m 40s".to_owned())]);
        enforcer.duty = Some(STOPPED.to_owned());
        assert_eq!(peers.look(&[enforcer], "a", "x", at(9000)), []);
    }

    #[test]
    fn one_host_drowns_no_other_and_neighbours_are_not_mistaken_for_each_other() {
        let mut peers = Peers::default();
        let letters = |n: usize| (0..n).map(|i| "x".repeat(i + 1)).collect::<Vec<_>>();
        let loud = degraded("edge-1", &letters(1100));
        assert_eq!(peers.look(std::slice::from_ref(&loud), "a", "x", at(0)).len(), ALARMS_OF_ONE_MAX);
        assert_eq!(peers.look(&[loud], "a", "x", at(1)), []);
        let quiet = [degraded("edge-2", &letters(1)), degraded("edge-3", &letters(1))];
        assert_eq!(peers.look(&quiet, "a", "x", at(2)).len(), 2);
    }
}
