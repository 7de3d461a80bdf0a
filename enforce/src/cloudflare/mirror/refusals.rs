//! Targets that Cloudflare did not take. Each is tried again, less and less often: many things fail for reasons that pass,
//! and an operation that fails seldom says which of its items it fails for.

use std::collections::BTreeMap;
use std::time::Duration;

use proto::net::Target;
use proto::time::Timestamp;

/// How long after a first refusal; after each further one twice as long.
pub(super) const PAUSE: Duration = Duration::from_secs(60);
/// So often it is doubled at most: that is about an hour.
const DOUBLINGS_MAX: u32 = 6;
/// Refusals in a row, beyond which it is not about the targets.
const ROW_MAX: u32 = 5;

#[derive(Clone, Copy, Debug)]
struct Refusal {
    tries: u32,
    /// When it is tried again; `None` while it is.
    again: Option<Timestamp>,
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    targets: BTreeMap<Target, Refusal>,
    /// One after the other, and nothing taken since.
    row: u32,
}

impl Refusals {
    /// `target` was not taken. Returns whether that seems to be about `target`.
    pub(super) fn put(&mut self, target: Target, now: Timestamp) -> bool {
        self.row = self.row.saturating_add(1);
        let refusal = self.targets.entry(target).or_insert(Refusal { tries: 0, again: None });
        let pause = PAUSE.saturating_mul(1 << refusal.tries.min(DOUBLINGS_MAX));
        refusal.again = Some(now.saturating_add(pause));
        refusal.tries = refusal.tries.saturating_add(1);
        self.row <= ROW_MAX
    }

    /// `targets` were taken. If none was for a while, those that were refused once need not wait for longer.
    pub(super) fn take<'a>(&mut self, targets: impl Iterator<Item = &'a Target>, now: Timestamp) {
        for target in targets {
            self.targets.remove(target);
        }
        if std::mem::take(&mut self.row) > ROW_MAX {
            let once = self.targets.values_mut().filter(|refusal| refusal.tries == 1);
            once.for_each(|refusal| refusal.again = refusal.again.map(|again| again.min(now)));
        }
    }

    /// Those that are tried again from now on.
    pub(super) fn retry(&mut self, now: Timestamp) -> Vec<Target> {
        let is_due = |refusal: &Refusal| refusal.again.is_some_and(|again| again <= now);
        let due = self.targets.iter_mut().filter(|(_, refusal)| is_due(refusal));
        due.map(|(target, refusal)| {
            refusal.again = None;
            *target
        })
        .collect()
    }

    /// Whether `target` is not tried now.
    pub(super) fn holds(&self, target: &Target) -> bool {
        self.targets.get(target).is_some_and(|refusal| refusal.again.is_some())
    }

    /// How many are not tried now.
    pub(super) fn count(&self) -> usize {
        self.targets.values().filter(|refusal| refusal.again.is_some()).count()
    }

    /// Forgets those that nobody asks for.
    pub(super) fn retain(&mut self, is_wanted: impl Fn(&Target) -> bool) {
        self.targets.retain(|target, _| is_wanted(target));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_secs(1000 + seconds)
    }

    fn target(n: u32) -> Target {
        format!("192.0.2.{n}").parse().unwrap()
    }

    #[test]
    fn what_is_refused_is_tried_again_less_and_less_often() {
        let mut refusals = Refusals::default();
        let mut now = at(0);
        for minutes in [1, 2, 4, 8, 16, 32, 64, 64] {
            refusals.put(target(1), now);
            assert!(refusals.holds(&target(1)) && refusals.count() == 1);
            let next = now.saturating_add(Duration::from_secs(minutes * 60));
            assert!(refusals.retry(Timestamp::from_millis(next.as_millis() - 1)).is_empty(), "{minutes}");
            assert_eq!(refusals.retry(next), [target(1)]);
            assert!(!refusals.holds(&target(1)) && refusals.count() == 0 && refusals.retry(next).is_empty());
            now = next;
        }
        refusals.take([target(1)].iter(), now);
        refusals.put(target(1), now);
        assert_eq!(refusals.retry(now.saturating_add(PAUSE)), [target(1)], "what was taken begins anew");
    }

    #[test]
    fn what_was_refused_in_a_long_row_is_tried_at_once_when_something_is_taken() {
        let mut refusals = Refusals::default();
        let about: Vec<bool> = (0..7).map(|n| refusals.put(target(n), at(0))).collect();
        assert_eq!(about, [true, true, true, true, true, false, false]);
        refusals.take([target(9)].iter(), at(1));
        assert_eq!(refusals.retry(at(1)).len(), 7);
        for n in 0..7 {
            refusals.put(target(n), at(2));
        }
        refusals.take([target(9)].iter(), at(3));
        assert_eq!(refusals.retry(at(3)), [], "not for ever");
        let few: Vec<bool> = (10..13).map(|n| refusals.put(target(n), at(4))).collect();
        refusals.take([target(9)].iter(), at(5));
        assert_eq!((few, refusals.retry(at(5))), (vec![true; 3], Vec::new()));
        refusals.retain(|wanted| *wanted == target(0));
        assert_eq!(refusals.count(), 1);
    }
}
