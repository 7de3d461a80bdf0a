//! The desired ban set of this host: what detect published, less what the guard refuses, what is over, what does not
//! fit, and everything while paused. Pure.
//!
//! Every `handle_*` returns the targets whose wanted state may have changed, so that a change of one ban costs one look-up
//! and not a comparison of the whole set.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use proto::ban::{BanChange, BanRecord};
use proto::bus::memory::BanUpdate;
use proto::net::Target;
use proto::time::Timestamp;

use crate::guard::{Guard, Refusal};

/// One ban as a firewall sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// When it ends; `None` = never.
    pub ends: Option<Timestamp>,
    /// Rule of the longest ban.
    pub rule: Arc<str>,
}

impl Entry {
    fn end(&self) -> Timestamp {
        self.ends.unwrap_or(Timestamp::MAX)
    }

    fn of(record: &BanRecord, now: Timestamp) -> Option<Self> {
        let longest = record.longest().filter(|ban| ban.is_in_force(now))?;
        Some(Self { ends: longest.expires_at, rule: longest.rule.as_str().into() })
    }
}

/// Keeps the desired set.
#[derive(Debug)]
pub struct Desired {
    bans_max: usize,
    entries: BTreeMap<Target, Entry>,
    refused: BTreeMap<Target, Refusal>,
    /// What the guard lets pass, by end: the shortest remainder first.
    by_end: BTreeSet<(Timestamp, Target)>,
    /// Up to here `by_end` is left out, because the rest alone makes `bans_max`.
    cut: Option<(Timestamp, Target)>,
    paused: bool,
    revision: u64,
    whole: bool,
}

impl Desired {
    /// Nobody is banned; at most `bans_max` will be.
    pub fn new(bans_max: usize) -> Self {
        Self {
            bans_max,
            entries: BTreeMap::new(),
            refused: BTreeMap::new(),
            by_end: BTreeSet::new(),
            cut: None,
            paused: false,
            revision: 0,
            whole: false,
        }
    }

    /// Starts from the last set of a former run. Until a whole snapshot arrives, what is not in it is unknown.
    pub fn handle_last_set(&mut self, bans: Vec<(Target, Entry)>, guard: &Guard, now: Timestamp) {
        for (target, entry) in bans {
            if entry.end() > now {
                self.put(target, entry, guard);
            }
        }
        self.recut();
    }

    /// Takes over what a firewall holds and no set that we know says anything of.
    pub fn adopt<'a>(&mut self, held: impl Iterator<Item = (&'a Target, Entry)>, guard: &Guard, now: Timestamp) {
        for (target, entry) in held {
            if entry.end() > now && !self.contains(target) {
                self.put(*target, entry, guard);
            }
        }
        self.recut();
    }

    /// Takes changes, or a whole set.
    pub fn handle_update(&mut self, update: &BanUpdate, guard: &Guard, now: Timestamp) -> BTreeSet<Target> {
        let mut touched = BTreeSet::new();
        if update.snapshot {
            touched.extend(self.entries.keys().copied());
            self.entries.clear();
            self.refused.clear();
            self.by_end.clear();
            self.whole = true;
        }
        for change in &update.changes {
            let target = change.target();
            touched.insert(target);
            let former = self.entries.get(&target).cloned();
            self.remove(&target);
            let BanChange::Put(record) = change else { continue };
            let fresh = Entry::of(record, now);
            // A set that is not known to be whole shortens no ban.
            let kept = former.filter(|_| !self.whole).filter(|former| former.end() > now);
            let longest = fresh.into_iter().chain(kept).max_by_key(Entry::end);
            if let Some(entry) = longest {
                self.put(target, entry, guard);
            }
        }
        self.revision = update.revision;
        touched.extend(self.recut());
        touched
    }

    /// Judges every ban anew.
    pub fn handle_guard(&mut self, guard: &Guard) -> BTreeSet<Target> {
        let mut touched = BTreeSet::new();
        for (target, entry) in &self.entries {
            let refusal = guard.refuse(target);
            if refusal == self.refused.get(target).copied() {
                continue;
            }
            touched.insert(*target);
            match refusal {
                Some(refusal) => {
                    self.refused.insert(*target, refusal);
                    self.by_end.remove(&(entry.end(), *target));
                }
                None => {
                    self.refused.remove(target);
                    self.by_end.insert((entry.end(), *target));
                }
            }
        }
        touched.extend(self.recut());
        touched
    }

    /// At most so many are wanted from now on. Returns those that fell out or came in by that.
    pub fn handle_bans_max(&mut self, bans_max: usize) -> Vec<Target> {
        self.bans_max = bans_max;
        self.recut()
    }

    /// While paused nothing is wanted. Returns whether that is new, in which case every target may have changed.
    pub fn handle_pause(&mut self, paused: bool) -> bool {
        std::mem::replace(&mut self.paused, paused) != paused
    }

    /// Forgets what is over.
    pub fn handle_time(&mut self, now: Timestamp) -> BTreeSet<Target> {
        let mut touched = BTreeSet::new();
        while let Some(&(end, target)) = self.by_end.first()
            && end <= now
        {
            self.remove(&target);
            touched.insert(target);
        }
        let over = |target: &Target| self.entries.get(target).is_none_or(|entry| entry.end() <= now);
        let refused: Vec<Target> = self.refused.keys().filter(|target| over(target)).copied().collect();
        for target in refused {
            self.remove(&target);
        }
        touched.extend(self.recut());
        touched
    }

    /// What a firewall should hold for `target`.
    pub fn wanted(&self, target: &Target) -> Option<&Entry> {
        let entry = self.entries.get(target)?;
        let key = (entry.end(), *target);
        let in_force = !self.paused && !self.refused.contains_key(target) && self.cut.is_none_or(|cut| key > cut);
        in_force.then_some(entry)
    }

    /// All that a firewall should hold, by target.
    pub fn all_wanted(&self) -> impl Iterator<Item = (&Target, &Entry)> {
        self.entries.iter().filter(|(target, _)| self.wanted(target).is_some())
    }

    /// All that was published and is not over, by target.
    pub fn all(&self) -> impl Iterator<Item = (&Target, &Entry)> {
        self.entries.iter()
    }

    /// Whether the target is banned, wanted or not.
    pub fn contains(&self, target: &Target) -> bool {
        self.entries.contains_key(target)
    }

    /// Why the guard refuses a ban.
    pub fn refusal(&self, target: &Target) -> Option<Refusal> {
        self.refused.get(target).copied()
    }

    /// Bans that the guard refuses now.
    pub fn refused_count(&self) -> usize {
        self.refused.len()
    }

    /// Bans left out because of `bans_max`.
    pub fn left_out(&self) -> usize {
        self.by_end.len().saturating_sub(self.bans_max)
    }

    /// Bans published and not over.
    pub fn count(&self) -> usize {
        self.entries.len()
    }

    /// The newest revision taken; 0 before the first.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Whether a whole set was taken, so that what is not in it may be removed.
    pub fn is_whole(&self) -> bool {
        self.whole
    }

    /// Whether all bans are lifted.
    pub fn is_paused(&self) -> bool {
        self.paused
    }

    fn put(&mut self, target: Target, entry: Entry, guard: &Guard) {
        match guard.refuse(&target) {
            Some(refusal) => drop(self.refused.insert(target, refusal)),
            None => drop(self.by_end.insert((entry.end(), target))),
        }
        self.entries.insert(target, entry);
    }

    fn remove(&mut self, target: &Target) {
        if let Some(entry) = self.entries.remove(target) {
            self.by_end.remove(&(entry.end(), *target));
            self.refused.remove(target);
        }
    }

    /// Moves the cut; returns those that fell out or came in by that.
    fn recut(&mut self) -> Vec<Target> {
        let cut = self.left_out().checked_sub(1).and_then(|last| self.by_end.iter().nth(last)).copied();
        let former = std::mem::replace(&mut self.cut, cut);
        if former == cut {
            return Vec::new();
        }
        let low = former.min(cut);
        let high = former.max(cut);
        let moved = self.by_end.iter().skip_while(|key| low.is_some_and(|low| **key <= low));
        moved.take_while(|key| high.is_some_and(|high| **key <= high)).map(|(_, target)| *target).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::guard::GuardFacts;
    use crate::testing;

    fn guard(never_ban: &[&str]) -> Guard {
        let never_ban = never_ban.iter().map(|net| net.parse().unwrap()).collect();
        Guard::new(&GuardFacts { never_ban, prefix_min_v4: 16, prefix_min_v6: 32, ..GuardFacts::default() })
    }

    fn record(target: &str, end: Option<i64>) -> BanRecord {
        testing::record(target.parse().unwrap(), end.map(Timestamp::from_secs))
    }

    fn update(revision: u64, snapshot: bool, records: &[(&str, Option<i64>)]) -> BanUpdate {
        let changes = records.iter().map(|(target, end)| BanChange::Put(record(target, *end))).collect();
        BanUpdate { revision, snapshot, changes, cause: None }
    }

    fn wanted(desired: &Desired) -> Vec<String> {
        desired.all_wanted().map(|(target, _)| target.to_string()).collect()
    }

    #[test]
    fn a_snapshot_replaces_and_changes_add() {
        let (guard, now) = (guard(&[]), Timestamp::from_secs(100));
        let mut desired = Desired::new(10);
        let old = Entry { ends: None, rule: "old".into() };
        desired.handle_last_set(vec![("192.0.2.9".parse().unwrap(), old)], &guard, now);
        assert!(!desired.is_whole());
        let touched = desired.handle_update(&update(1, true, &[("192.0.2.1", Some(200))]), &guard, now);
        assert_eq!(touched.len(), 2, "the one that came and the one that went");
        desired.handle_update(&update(2, false, &[("192.0.2.2", None), ("192.0.2.3", Some(100))]), &guard, now);
        assert_eq!(wanted(&desired), ["192.0.2.1", "192.0.2.2"], "a ban ends at its end, not after it");
        let delete =
            BanUpdate { changes: vec![BanChange::Delete("192.0.2.2".parse().unwrap())], ..update(3, false, &[]) };
        desired.handle_update(&delete, &guard, now);
        assert_eq!(wanted(&desired), ["192.0.2.1"]);
        assert_eq!(desired.handle_time(Timestamp::from_secs(200)).len(), 1);
        assert_eq!((wanted(&desired).len(), desired.count()), (0, 0));
    }

    #[test]
    fn what_only_the_kernel_holds_stays_until_its_end_or_a_whole_set() {
        let (guard, now) = (guard(&["192.0.2.3/32"]), Timestamp::from_secs(100));
        let entry = |end| Entry { ends: Some(Timestamp::from_secs(end)), rule: "r".into() };
        let kernel: Vec<(Target, Entry)> =
            [("192.0.2.1", 300), ("192.0.2.2", 200), ("192.0.2.3", 300), ("192.0.2.4", 100)]
                .map(|(target, end)| (target.parse().unwrap(), entry(end)))
                .into();
        let mut desired = Desired::new(10);
        desired.handle_last_set(vec![("192.0.2.1".parse().unwrap(), entry(400))], &guard, now);
        desired.adopt(kernel.iter().map(|(target, entry)| (target, entry.clone())), &guard, now);
        assert_eq!(wanted(&desired), ["192.0.2.1", "192.0.2.2"], "neither whom the guard names nor who is free");
        assert_eq!(desired.wanted(&"192.0.2.1".parse().unwrap()), Some(&entry(400)), "the set on disk knows better");
        desired.handle_update(&update(1, false, &[("192.0.2.2", Some(150))]), &guard, now);
        assert_eq!(
            desired.wanted(&"192.0.2.2".parse().unwrap()),
            Some(&entry(200)),
            "a set that is not whole frees nobody"
        );
        desired.handle_time(Timestamp::from_secs(200));
        assert_eq!(wanted(&desired), ["192.0.2.1"]);
        desired.handle_update(&update(2, true, &[]), &guard, now);
        assert_eq!(desired.count(), 0);
    }

    #[test]
    fn a_new_guard_takes_bans_back_and_gives_them_again() {
        let now = Timestamp::from_secs(100);
        let mut desired = Desired::new(10);
        desired.handle_update(
            &update(1, true, &[("192.0.2.1", None), ("198.51.100.0/24", None)]),
            &guard(&["192.0.2.1/32"]),
            now,
        );
        assert_eq!(wanted(&desired), ["198.51.100.0/24"]);
        assert_eq!(desired.refusal(&"192.0.2.1".parse().unwrap()), Some(Refusal::NeverBan));
        assert_eq!(desired.handle_guard(&guard(&["198.51.100.0/24"])).len(), 2);
        assert_eq!(wanted(&desired), ["192.0.2.1"]);
        assert!(desired.handle_pause(true) && !desired.handle_pause(true));
        assert_eq!(wanted(&desired).len(), 0);
    }

    proptest! {
        /// Changing one ban at a time is the same as computing the set anew, and what is touched covers every change.
        #[test]
        fn touched_covers_every_change_and_the_longest_stay(
            steps in prop::collection::vec((0u8..24, prop::option::of(1i64..40), any::<bool>()), 1..60),
            bans_max in 1usize..12,
        ) {
            let (guard, mut now) = (guard(&["192.0.2.3/32"]), Timestamp::EPOCH);
            let mut desired = Desired::new(bans_max);
            desired.handle_update(&update(1, true, &[]), &guard, now);
            let mut model: BTreeMap<Target, Timestamp> = BTreeMap::new();
            for (revision, (n, end, delete)) in (2..).zip(steps) {
                let before: BTreeSet<Target> = desired.all_wanted().map(|(target, _)| *target).collect();
                let name = format!("192.0.2.{n}");
                let target: Target = name.parse().unwrap();
                now = now.saturating_add(std::time::Duration::from_millis(700));
                let mut touched = desired.handle_time(now);
                let mut change = update(revision, false, &[(&name, end)]);
                if delete {
                    change.changes = vec![BanChange::Delete(target)];
                    model.remove(&target);
                } else {
                    model.insert(target, end.map_or(Timestamp::MAX, Timestamp::from_secs));
                }
                touched.extend(desired.handle_update(&change, &guard, now));
                model.retain(|_, end| *end > now);

                let mut fits: Vec<(Timestamp, Target)> =
                    model.iter().filter(|(t, _)| guard.refuse(t).is_none()).map(|(t, end)| (*end, *t)).collect();
                fits.sort();
                let left_out = fits.len().saturating_sub(bans_max);
                let expected: BTreeSet<Target> = fits[left_out..].iter().map(|(_, t)| *t).collect();
                let after: BTreeSet<Target> = desired.all_wanted().map(|(target, _)| *target).collect();
                prop_assert_eq!(&after, &expected);
                prop_assert_eq!(desired.left_out(), left_out);
                for changed in before.symmetric_difference(&after) {
                    prop_assert!(touched.contains(changed), "{} changed unseen", changed);
                }
            }
        }
    }
}
