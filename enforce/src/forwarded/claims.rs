//! Who is to be refused among the clients behind a proxy: the bans whose evidence says that a proxy delivered them, less
//! what the guard refuses, what cannot be spelled, and what does not fit. Pure.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use proto::ban::{BanChange, BanRecord};
use proto::bus::memory::BanUpdate;
use proto::net::Target;
use proto::time::Timestamp;

use crate::config::ForwardedForConfig;
use crate::forwarded::spelling::Patterns;
use crate::guard::Guard;

/// One client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Claim {
    /// When the last of its bans ends; `None` = never.
    pub(crate) ends: Option<Timestamp>,
    /// When the newest of its bans began.
    pub(crate) since: Timestamp,
}

impl Claim {
    fn end(&self) -> Timestamp {
        self.ends.unwrap_or(Timestamp::MAX)
    }

    fn of(record: &BanRecord, now: Timestamp) -> Option<Self> {
        let in_force = || record.bans.iter().filter(|ban| ban.is_in_force(now));
        let since = in_force().map(|ban| ban.banned_at).max().filter(|_| record.is_behind_proxy(now))?;
        Some(Self { ends: record.expires_at(), since })
    }
}

/// All of them.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    all: BTreeMap<Target, Claim>,
    revision: u64,
    whole: bool,
}

/// Who is refused now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Choice {
    /// With their patterns, newest first.
    pub(crate) refused: Vec<(Target, Claim, Patterns)>,
    /// Bans that the guard refuses.
    pub(crate) guarded: usize,
    /// Networks that no patterns find exactly, and the first of them.
    pub(crate) unspellable: (usize, Option<Target>),
    /// The oldest, for which there is no room.
    pub(crate) left_out: usize,
}

impl Claims {
    /// Starts from what was refused before. Until a whole set arrives, what is not in it is unknown.
    pub(crate) fn handle_kept(&mut self, kept: Vec<(Target, Claim)>, now: Timestamp) {
        self.all.extend(kept.into_iter().filter(|(_, claim)| now < claim.end()));
    }

    /// Takes changes, or a whole set. Returns whether anything is new.
    pub(crate) fn handle_update(&mut self, update: &BanUpdate, now: Timestamp) -> bool {
        let mut changed = update.snapshot && !self.whole;
        let former = if update.snapshot { std::mem::take(&mut self.all) } else { BTreeMap::new() };
        self.whole |= update.snapshot;
        self.revision = update.revision;
        for change in &update.changes {
            let target = change.target();
            let known = self.all.remove(&target);
            let fresh = match change {
                BanChange::Put(record) => Claim::of(record, now),
                BanChange::Delete(_) => None,
            };
            // A set that is not known to be whole shortens no ban.
            let kept = known.filter(|_| !self.whole && matches!(change, BanChange::Put(_)));
            let longest = fresh.into_iter().chain(kept).max_by_key(Claim::end);
            changed |= longest != known;
            self.all.extend(longest.map(|claim| (target, claim)));
        }
        changed || (update.snapshot && former != self.all)
    }

    /// Forgets what is over. Returns whether anything was.
    pub(crate) fn handle_time(&mut self, now: Timestamp) -> bool {
        let before = self.all.len();
        self.all.retain(|_, claim| now < claim.end());
        self.all.len() < before
    }

    /// The newest revision taken; 0 before the first.
    pub(crate) fn revision(&self) -> u64 {
        self.revision
    }

    /// Whether a whole set was taken, so that whom it lacks is not banned.
    pub(crate) fn is_whole(&self) -> bool {
        self.whole
    }

    /// That of `target`, if it came through a proxy.
    pub(crate) fn claim(&self, target: &Target) -> Option<&Claim> {
        self.all.get(target)
    }

    /// Bans of clients behind a proxy.
    pub(crate) fn count(&self) -> usize {
        self.all.len()
    }

    /// Chooses at most `rules_max` patterns' worth, the newest first.
    pub(crate) fn choose(&self, guard: &Guard, config: &ForwardedForConfig) -> Choice {
        let mut newest: Vec<(&Target, &Claim)> = self.all.iter().collect();
        newest.sort_by_key(|(target, claim)| (Reverse(claim.since), **target));
        let mut choice = Choice::default();
        let mut room = config.rules_max as usize;
        for (target, claim) in newest {
            if guard.refuse(target).is_some() {
                choice.guarded += 1;
                continue;
            }
            // Nobody within a network can be let through, so one with a guarded address in it is refused as a whole.
            let patterns = if guard.touches(target) { None } else { Patterns::of(target, config) };
            let Some(patterns) = patterns else {
                choice.unspellable.0 += 1;
                choice.unspellable.1.get_or_insert(*target);
                continue;
            };
            match room.checked_sub(patterns.count()).filter(|_| choice.left_out == 0) {
                Some(left) => {
                    room = left;
                    choice.refused.push((*target, *claim, patterns));
                }
                None => choice.left_out += 1,
            }
        }
        choice
    }
}

#[cfg(test)]
mod tests {
    use proto::ban::{Ban, Evidence};

    use super::*;
    use crate::guard::GuardFacts;
    use crate::testing;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_secs(seconds)
    }

    fn ban(target: &str, (since, end): (i64, i64), via_proxy: bool) -> Ban {
        let ban = testing::ban(target.parse().unwrap(), Some(at(end)));
        Ban { banned_at: at(since), evidence: Evidence { via_proxy, ..Evidence::default() }, ..ban }
    }

    fn put(target: &str, times: (i64, i64)) -> BanChange {
        BanChange::Put(BanRecord { target: target.parse().unwrap(), bans: vec![ban(target, times, true)] })
    }

    fn update(revision: u64, snapshot: bool, changes: Vec<BanChange>) -> BanUpdate {
        BanUpdate { revision, snapshot, changes, cause: None }
    }

    fn refused(claims: &Claims, rules_max: u32) -> (Vec<String>, Choice) {
        let facts = GuardFacts { never_ban: vec!["198.51.100.7/32".parse().unwrap()], ..GuardFacts::default() };
        let config = ForwardedForConfig { rules_max, ..ForwardedForConfig::default() };
        let choice = claims.choose(&Guard::new(&facts), &config);
        (choice.refused.iter().map(|(target, ..)| target.to_string()).collect(), choice)
    }

    #[test]
    fn a_client_is_refused_while_it_is_banned_and_a_ban_in_force_came_through_a_proxy() {
        let mut claims = Claims::default();
        let bans = vec![ban("192.0.2.1", (1, 50), true), ban("192.0.2.1", (2, 90), false)];
        let record = BanRecord { target: bans[0].target, bans };
        let direct = BanRecord { target: "192.0.2.2".parse().unwrap(), bans: vec![ban("192.0.2.2", (1, 90), false)] };
        let changes = vec![BanChange::Put(record.clone()), BanChange::Put(direct)];
        assert!(claims.handle_update(&update(1, true, changes), at(10)));
        assert_eq!(refused(&claims, 10).0, ["192.0.2.1"]);
        assert!(
            !claims.handle_update(&update(2, false, vec![BanChange::Put(record.clone())]), at(11)),
            "nothing is new"
        );
        assert!(!claims.handle_time(at(89)) && claims.handle_time(at(90)));
        claims.handle_update(&update(3, false, vec![BanChange::Put(record)]), at(60));
        assert_eq!(claims.count(), 0, "the ban that came through a proxy is over");
    }

    #[test]
    fn the_oldest_are_left_out_and_the_rest_is_counted_by_reason() {
        let mut claims = Claims::default();
        let changes = vec![
            put("192.0.2.1", (1, 90)),
            put("192.0.2.2", (3, 90)),
            put("192.0.2.3", (2, 90)),
            put("198.51.100.7", (9, 90)),
            put("198.51.100.0/24", (9, 90)),
            put("203.0.113.0/25", (9, 90)),
        ];
        claims.handle_update(&update(1, true, changes), at(10));
        let (targets, choice) = refused(&claims, 7);
        assert_eq!(targets, ["192.0.2.2", "192.0.2.3"]);
        assert_eq!((choice.left_out, choice.guarded, choice.unspellable.0), (1, 1, 2));
    }

    #[test]
    fn what_was_kept_stays_until_a_whole_set_lacks_it() {
        let mut claims = Claims::default();
        let claim = |end| Claim { ends: Some(at(end)), since: at(1) };
        let kept = [("192.0.2.1", 90), ("192.0.2.2", 80), ("192.0.2.3", 10)];
        claims.handle_kept(kept.map(|(target, end)| (target.parse().unwrap(), claim(end))).into(), at(10));
        assert!(claims.handle_update(&update(1, false, vec![put("192.0.2.4", (5, 90))]), at(11)));
        assert!(!claims.handle_update(&update(2, false, vec![put("192.0.2.1", (1, 50))]), at(11)), "it was shortened");
        assert_eq!(refused(&claims, 99).0, ["192.0.2.4", "192.0.2.1", "192.0.2.2"]);
        assert!(claims.handle_update(&update(3, true, vec![put("192.0.2.1", (1, 50))]), at(12)));
        assert_eq!(refused(&claims, 99).0, ["192.0.2.1"]);
        assert!(claims.handle_update(&update(4, false, vec![BanChange::Delete("192.0.2.1".parse().unwrap())]), at(12)));
        assert_eq!(claims.count(), 0);
    }
}
