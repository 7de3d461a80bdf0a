//! Who has been banned before: what escalation counts, and which events are used up.
//!
//! An offender has a fixed size: one history a rule and the last few moments before which nothing counts.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use proto::net::Target;
use proto::time::Timestamp;

use super::stream::Position;

/// Ends of bans that are remembered with their position, so that a rebuild judges old events as they were judged then.
pub const QUIETS_MAX: usize = 4;

/// One rule's history with one target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct History {
    /// Rule name.
    pub rule: Arc<str>,
    /// Bans that count for escalation.
    pub count: u32,
    /// End of the last ban; [`Timestamp::MAX`] for a permanent one.
    pub last_end: Timestamp,
    /// Events up to this position are used up for this rule.
    pub consumed: Position,
}

/// From this position on, events before this time count for no rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quiet {
    /// Where the ban (or unban) was decided.
    pub after: Position,
    /// End of that ban, or moment of that unban.
    pub until: Timestamp,
}

/// One target's history.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Offender {
    /// By rule, in order of first offence.
    pub rules: Vec<History>,
    /// Oldest first, at most [`QUIETS_MAX`].
    pub quiets: Vec<Quiet>,
}

impl Offender {
    /// The history of one rule.
    pub fn history(&self, rule: &str) -> Option<&History> {
        self.rules.iter().find(|history| &*history.rule == rule)
    }

    /// The history of one rule, begun if there is none.
    pub fn history_mut(&mut self, rule: &Arc<str>) -> &mut History {
        let at = self.rules.iter().position(|history| history.rule == *rule).unwrap_or_else(|| {
            let end = Timestamp::EPOCH;
            self.rules.push(History { rule: rule.clone(), count: 0, last_end: end, consumed: Position::START });
            self.rules.len() - 1
        });
        &mut self.rules[at]
    }

    /// Before which time an event at `position` counts for no rule.
    pub fn quiet_until(&self, position: Position) -> Timestamp {
        let applies = |quiet: &&Quiet| quiet.after < position;
        match self.quiets.iter().rfind(applies) {
            Some(quiet) => quiet.until,
            // Older than all that is remembered: its own ban is forgotten, so it is best not counted.
            None if self.quiets.len() == QUIETS_MAX => self.quiets[0].until,
            None => Timestamp::EPOCH,
        }
    }

    /// Before which time the next event counts for no rule.
    pub fn quiet_now(&self) -> Timestamp {
        self.quiets.last().map_or(Timestamp::EPOCH, |quiet| quiet.until)
    }

    /// Sets the newest end.
    pub fn set_quiet(&mut self, quiet: Quiet) {
        match self.quiets.last_mut() {
            // Several bans by one event, or a ban and its unban: the latest word at a position counts.
            Some(last) if last.after == quiet.after => last.until = quiet.until,
            _ => self.quiets.push(quiet),
        }
        if self.quiets.len() > QUIETS_MAX {
            self.quiets.remove(0);
        }
    }

    /// Bans by `rule` (or by all rules) that still count at `time`.
    pub fn count(&self, rule: &str, across_rules: bool, forget_after: Duration, time: Timestamp) -> u32 {
        let counts = |history: &&History| {
            (across_rules || &*history.rule == rule) && time <= history.last_end.saturating_add(forget_after)
        };
        self.rules.iter().filter(counts).fold(0, |sum, history| sum.saturating_add(history.count))
    }

    /// When its last ban ended or ends.
    pub fn end(&self) -> Timestamp {
        self.rules.iter().map(|history| history.last_end).fold(self.quiet_now(), Timestamp::max)
    }
}

/// All offenders: bounded, the oldest end goes first.
#[derive(Debug, Default)]
pub struct Offenders {
    by_target: BTreeMap<Target, Offender>,
    by_end: BTreeSet<(Timestamp, Target)>,
}

impl Offenders {
    /// Number of offenders.
    pub fn len(&self) -> usize {
        self.by_target.len()
    }

    /// The history of a target.
    pub fn get(&self, target: &Target) -> Option<&Offender> {
        self.by_target.get(target)
    }

    /// Changes the history of a target, begun if there is none.
    pub fn update<R>(&mut self, target: Target, change: impl FnOnce(&mut Offender) -> R) -> R {
        let offender = self.by_target.entry(target).or_default();
        self.by_end.remove(&(offender.end(), target));
        let result = change(offender);
        self.by_end.insert((offender.end(), target));
        result
    }

    /// Forgets one offender.
    pub fn forget(&mut self, target: &Target) {
        if let Some(offender) = self.by_target.remove(target) {
            self.by_end.remove(&(offender.end(), *target));
        }
    }

    /// Forgets the offender whose last ban ended first.
    pub fn evict_oldest(&mut self) -> Option<Target> {
        let (_, target) = self.by_end.pop_first()?;
        self.by_target.remove(&target);
        Some(target)
    }

    /// When the last ban of the next one to be forgotten ended.
    pub fn oldest_end(&self) -> Option<Timestamp> {
        self.by_end.first().map(|(end, _)| *end)
    }

    /// All, by target.
    pub fn iter(&self) -> impl Iterator<Item = (&Target, &Offender)> {
        self.by_target.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_secs(seconds)
    }

    #[test]
    fn a_history_is_forgotten_after_the_end_of_its_last_ban() {
        let mut offender = Offender::default();
        let history = offender.history_mut(&"r".into());
        (history.count, history.last_end) = (3, at(1000));
        let forget = Duration::from_secs(100);
        assert_eq!(offender.count("r", false, forget, at(1100)), 3);
        assert_eq!(offender.count("r", false, forget, at(1101)), 0);
        assert_eq!(offender.count("other", false, forget, at(1000)), 0);
        assert_eq!(offender.count("other", true, forget, at(1000)), 3);
    }

    #[test]
    fn an_old_event_is_judged_by_the_ban_that_stood_then() {
        let mut offender = Offender::default();
        for n in 1..=5 {
            offender.set_quiet(Quiet { after: Position(n * 10), until: at(n as i64 * 100) });
        }
        assert_eq!(offender.quiets.len(), QUIETS_MAX);
        assert_eq!(offender.quiet_until(Position(60)), at(500));
        assert_eq!(offender.quiet_until(Position(41)), at(400));
        assert_eq!(offender.quiet_until(Position(20)), at(200), "the oldest that is remembered");
    }

    #[test]
    fn the_oldest_end_goes_first() {
        let mut offenders = Offenders::default();
        let target = |n: u8| Target::host([192, 0, 2, n].into());
        for (n, end) in [(1, 30), (2, 10), (3, 20)] {
            offenders.update(target(n), |offender| offender.history_mut(&"r".into()).last_end = at(end));
        }
        offenders.update(target(2), |offender| offender.history_mut(&"r".into()).last_end = at(40));
        assert_eq!(offenders.evict_oldest(), Some(target(3)));
        assert_eq!(offenders.evict_oldest(), Some(target(1)));
        assert_eq!(offenders.oldest_end(), Some(at(40)));
    }
}
