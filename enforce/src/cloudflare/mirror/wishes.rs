//! The entries that should be at Cloudflare: the ban set as the guard lets it pass, split into what can be said there, and
//! cut to the quota.
//!
//! Firewalls return guarded addresses before they drop anything; Cloudflare cannot. So an entry that would take in a
//! guarded address is left out, and the rest of its ban is not.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use proto::ban::BanChange;
use proto::bus::memory::BanUpdate;
use proto::net::Target;
use proto::time::Timestamp;

use super::cover::Form;
use crate::desired::Desired;
use crate::guard::Guard;

/// One part in so many of the quota is kept free, so that new bans need not wait for those that make room.
const RESERVE_SHARE: usize = 50;

/// Entries that are kept in memory, for each one wanted: when enough of those that are wanted end, the rest is split anew.
const KEPT_SHARE: usize = 2;
/// Changes from which on all bans are split anew, the best first.
const ANEW_MIN: usize = 1000;

/// What decides who stays when the quota is full: when it ends, then how often its client was banned.
type Rank = (Timestamp, u32);

/// Why an entry of a ban is not wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cloudflare) enum Unwanted {
    /// A guarded address lies in it.
    Holed,
    /// The quota is full of those that last longer.
    LeftOut,
}

/// Keeps them.
#[derive(Debug)]
pub(in crate::cloudflare) struct Wishes {
    form: Form,
    wanted_max: usize,
    guard: Guard,
    guard_nets: Vec<Target>,
    desired: Desired,
    counts: BTreeMap<Target, u32>,
    entries: BTreeMap<Target, (Rank, Arc<str>)>,
    ranks: BTreeSet<(Rank, Target)>,
    /// Up to here entries are left out.
    cut: Option<(Rank, Target)>,
    /// Up to here entries are not even kept.
    floor: Option<Rank>,
    /// Entries that would take in a guarded address.
    holed: BTreeSet<Target>,
    /// Bans that would take too many entries.
    unsayable: BTreeSet<Target>,
}

impl Wishes {
    /// Nobody is banned. `entries_max` is the quota.
    pub(in crate::cloudflare) fn new(form: Form, entries_max: usize, guard: Guard) -> Self {
        Self {
            form,
            wanted_max: entries_max - entries_max / RESERVE_SHARE,
            guard_nets: guard.nets(),
            guard,
            desired: Desired::new(usize::MAX),
            counts: BTreeMap::new(),
            entries: BTreeMap::new(),
            ranks: BTreeSet::new(),
            cut: None,
            floor: None,
            holed: BTreeSet::new(),
            unsayable: BTreeSet::new(),
        }
    }

    /// Takes changes, or a whole set. Returns the entries that may have changed, as all `handle_*` do.
    pub(in crate::cloudflare) fn handle_update(&mut self, update: &BanUpdate, now: Timestamp) -> BTreeSet<Target> {
        if update.snapshot {
            self.counts.clear();
        }
        for change in &update.changes {
            let target = change.target();
            match change {
                BanChange::Put(record) => {
                    let count = record.longest().map_or(0, |ban| ban.ban_count);
                    self.counts.insert(target, count);
                }
                BanChange::Delete(_) => drop(self.counts.remove(&target)),
            }
        }
        let bans = self.desired.handle_update(update, &self.guard, now);
        if update.snapshot { self.recount_all() } else { self.recount(&bans) }
    }

    /// Judges every ban anew.
    pub(in crate::cloudflare) fn handle_guard(&mut self, guard: Guard) -> BTreeSet<Target> {
        if guard == self.guard {
            return BTreeSet::new();
        }
        self.guard_nets = guard.nets();
        self.guard = guard;
        self.desired.handle_guard(&self.guard);
        self.recount_all()
    }

    /// While paused nothing is wanted.
    pub(in crate::cloudflare) fn handle_pause(&mut self, paused: bool) -> BTreeSet<Target> {
        if self.desired.handle_pause(paused) { self.recount_all() } else { BTreeSet::new() }
    }

    /// Forgets what is over.
    pub(in crate::cloudflare) fn handle_time(&mut self, now: Timestamp) -> BTreeSet<Target> {
        let bans = self.desired.handle_time(now);
        for target in &bans {
            if !self.desired.contains(target) {
                self.counts.remove(target);
            }
        }
        self.recount(&bans)
    }

    /// Name of the rule behind the entry that `piece` should have, if it should have one.
    pub(in crate::cloudflare) fn wanted(&self, piece: &Target) -> Option<&Arc<str>> {
        let (rank, rule) = self.entries.get(piece)?;
        self.cut.is_none_or(|cut| (*rank, *piece) > cut).then_some(rule)
    }

    /// Of the ban `ban`: the entry of it that would hold `address`, and why that is not wanted, if it is not. `None` where
    /// it cannot be said in entries.
    pub(in crate::cloudflare) fn piece_of(&self, ban: &Target, address: IpAddr) -> Option<(Target, Option<Unwanted>)> {
        let piece = Target::new(address, self.form.piece_prefix(ban)?);
        let unwanted = match self.wanted(&piece) {
            Some(_) => None,
            None if self.holed.contains(&piece) => Some(Unwanted::Holed),
            None => Some(Unwanted::LeftOut),
        };
        Some((piece, unwanted))
    }

    /// All of them.
    pub(in crate::cloudflare) fn all_wanted(&self) -> impl Iterator<Item = &Target> {
        self.entries.keys().filter(|piece| self.wanted(piece).is_some())
    }

    /// Whether what is not wanted may be removed: until the whole set is known, only a pause says so.
    pub(in crate::cloudflare) fn may_remove(&self) -> bool {
        self.desired.is_whole() || self.desired.is_paused()
    }

    /// The ban set they are made of.
    pub(in crate::cloudflare) fn desired(&self) -> &Desired {
        &self.desired
    }

    /// Entries left out because of the quota. Of a ban set that takes many times the quota, not all are counted.
    pub(in crate::cloudflare) fn left_out(&self) -> usize {
        self.ranks.len().saturating_sub(self.wanted_max)
    }

    /// Entries left out because a guarded address lies in them.
    pub(in crate::cloudflare) fn holed(&self) -> usize {
        self.holed.len()
    }

    /// Bans left out because they would take too many entries.
    pub(in crate::cloudflare) fn unsayable(&self) -> usize {
        self.unsayable.len()
    }

    /// Splits all bans anew, the best first, until there are enough entries.
    fn recount_all(&mut self) -> BTreeSet<Target> {
        let mut touched: BTreeSet<Target> = std::mem::take(&mut self.entries).into_keys().collect();
        touched.append(&mut self.holed);
        self.ranks.clear();
        self.unsayable.clear();
        (self.cut, self.floor) = (None, None);
        let wanted = self.desired.all().filter_map(|(ban, _)| Some((self.rank(ban)?, *ban)));
        let mut bans: Vec<(Rank, Target)> = wanted.collect();
        bans.sort_unstable_by(|one, other| other.cmp(one));
        for (rank, ban) in bans {
            if self.form.piece_prefix(&ban).is_none() {
                self.unsayable.insert(ban);
            } else if self.ranks.len() >= self.kept_max() {
                self.floor = self.floor.max(Some(rank));
            } else {
                for piece in self.form.pieces(&ban) {
                    self.recount_piece(piece);
                    touched.insert(piece);
                }
            }
        }
        self.recut();
        touched
    }

    fn recount(&mut self, bans: &BTreeSet<Target>) -> BTreeSet<Target> {
        if bans.len() >= ANEW_MIN {
            return self.recount_all();
        }
        let mut touched = BTreeSet::new();
        for ban in bans {
            if self.form.piece_prefix(ban).is_none() && self.desired.wanted(ban).is_some() {
                self.unsayable.insert(*ban);
            } else {
                self.unsayable.remove(ban);
            }
            for piece in self.form.pieces(ban) {
                self.recount_piece(piece);
                touched.insert(piece);
            }
        }
        while self.ranks.len() > self.kept_max() {
            let Some((rank, piece)) = self.ranks.pop_first() else { break };
            self.entries.remove(&piece);
            self.floor = Some(rank);
            touched.insert(piece);
        }
        if self.floor.is_some() && self.ranks.len() < self.wanted_max {
            touched.append(&mut self.recount_all());
        }
        touched.extend(self.recut());
        touched
    }

    fn kept_max(&self) -> usize {
        KEPT_SHARE * self.wanted_max.max(1)
    }

    /// Of a ban; `None` where it is not wanted.
    fn rank(&self, ban: &Target) -> Option<Rank> {
        let ends = self.desired.wanted(ban)?.ends.unwrap_or(Timestamp::MAX);
        Some((ends, self.counts.get(ban).copied().unwrap_or_default()))
    }

    fn recount_piece(&mut self, piece: Target) {
        let owners = self.form.owners(&piece).filter_map(|owner| {
            let rule = self.desired.wanted(&owner)?.rule.clone();
            Some((self.rank(&owner)?, rule))
        });
        let longest = owners.max_by_key(|(rank, _)| *rank);
        if let Some((rank, _)) = self.entries.remove(&piece) {
            self.ranks.remove(&(rank, piece));
        }
        self.holed.remove(&piece);
        let Some((rank, rule)) = longest.filter(|(rank, _)| self.floor.is_none_or(|floor| *rank > floor)) else {
            return;
        };
        if self.guard.refuse(&piece).is_some() || self.guard_nets.iter().any(|net| piece.contains(net)) {
            self.holed.insert(piece);
            return;
        }
        self.ranks.insert((rank, piece));
        self.entries.insert(piece, (rank, rule));
    }

    /// Moves the cut; returns those that fell out or came in by that.
    fn recut(&mut self) -> Vec<Target> {
        let cut = self.left_out().checked_sub(1).and_then(|last| self.ranks.iter().nth(last)).copied();
        let former = std::mem::replace(&mut self.cut, cut);
        if former == cut {
            return Vec::new();
        }
        let (low, high) = (former.min(cut), former.max(cut));
        let moved = self.ranks.iter().skip_while(|key| low.is_some_and(|low| **key <= low));
        moved.take_while(|key| high.is_some_and(|high| **key <= high)).map(|(_, piece)| *piece).collect()
    }
}

#[cfg(test)]
mod tests {
    use proto::ban::BanRecord;

    use super::*;
    use crate::cloudflare::mirror::sim::{guard, record, update};

    fn wanted(wishes: &Wishes) -> Vec<String> {
        wishes.all_wanted().map(ToString::to_string).collect()
    }

    #[test]
    fn a_guarded_address_holes_a_wider_ban_and_no_more() {
        let now = Timestamp::from_secs(100);
        let mut wishes = Wishes::new(Form::Rules, 1000, guard(&["198.51.100.7/32", "192.0.2.9/32"]));
        let bans = [record("198.51.96.0/21", None, 1), record("192.0.2.9", None, 1), record("2001:db8::/65", None, 1)];
        wishes.handle_update(&update(1, true, &bans), now);
        let expected = [96, 97, 98, 99, 101, 102, 103].map(|third| format!("198.51.{third}.0/24"));
        assert_eq!(wanted(&wishes), expected);
        assert_eq!((wishes.holed(), wishes.unsayable()), (1, 1));
        let touched = wishes.handle_guard(guard(&[]));
        assert!(touched.contains(&"198.51.100.0/24".parse().unwrap()));
        assert_eq!((wanted(&wishes).len(), wishes.holed()), (9, 0));
    }

    #[test]
    fn bans_that_take_many_entries_are_kept_only_as_far_as_the_quota_needs() {
        let now = Timestamp::from_secs(100);
        let mut wishes = Wishes::new(Form::Rules, 400, guard(&[]));
        let ban = |n: i64| record(&format!("2001:db8:{n:x}::/56"), Some(1000 + n), 1);
        let bans: Vec<BanRecord> = (0..60).map(ban).collect();
        wishes.handle_update(&update(1, true, &bans), now);
        let bound = 2 * 400 + 256;
        assert!(wishes.entries.len() <= bound, "{}", wishes.entries.len());
        assert_eq!(wanted(&wishes).len(), 392);
        assert!(wishes.left_out() > 0);
        // One by one, too; and when the best end, those that were not kept come up.
        for n in 60..80 {
            let touched = wishes.handle_update(&update(n as u64, false, &[ban(n)]), now);
            assert!(touched.len() <= bound && wishes.entries.len() <= bound);
        }
        assert!(wanted(&wishes).contains(&"2001:db8:4f::/64".to_owned()), "the best one is there");
        for n in (1..80).rev() {
            let target: Target = format!("2001:db8:{n:x}::/56").parse().unwrap();
            let change = BanUpdate {
                revision: 2000 - n as u64,
                snapshot: false,
                changes: vec![BanChange::Delete(target)],
                cause: None,
            };
            let before: BTreeSet<Target> = wishes.all_wanted().copied().collect();
            let touched = wishes.handle_update(&change, now);
            let after: BTreeSet<Target> = wishes.all_wanted().copied().collect();
            assert!(before.symmetric_difference(&after).all(|piece| touched.contains(piece)), "what changed is told");
            assert!(
                wishes.entries.len() <= bound && after.len() == (256 * n as usize).min(392),
                "{n}: {}",
                after.len()
            );
        }
    }

    #[test]
    fn an_entry_of_several_bans_stays_until_the_last_of_them_ends() {
        let mut wishes = Wishes::new(Form::Rules, 1000, guard(&[]));
        let bans = [record("192.0.2.0/24", Some(200), 1), record("192.0.2.0/23", Some(150), 1)];
        wishes.handle_update(&update(1, true, &bans), Timestamp::from_secs(100));
        assert_eq!(wanted(&wishes), ["192.0.2.0/24", "192.0.3.0/24"]);
        let touched = wishes.handle_time(Timestamp::from_secs(150));
        assert_eq!((touched.len(), wanted(&wishes)), (2, vec!["192.0.2.0/24".to_owned()]));
        wishes.handle_time(Timestamp::from_secs(200));
        assert_eq!(wanted(&wishes).len(), 0);
    }

    #[test]
    fn a_full_quota_keeps_the_longest_remainder_and_then_the_most_often_banned() {
        let now = Timestamp::from_secs(100);
        let mut wishes = Wishes::new(Form::Rules, 2, guard(&[]));
        let bans = [record("192.0.2.1", Some(200), 9), record("192.0.2.2", None, 1), record("192.0.2.3", None, 2)];
        wishes.handle_update(&update(1, true, &bans), now);
        assert_eq!((wanted(&wishes), wishes.left_out()), (vec!["192.0.2.2".to_owned(), "192.0.2.3".to_owned()], 1));
        let touched = wishes.handle_update(&update(2, false, &[record("192.0.2.4", None, 3)]), now);
        assert_eq!(touched.len(), 2, "who came and who made room");
        assert_eq!(wanted(&wishes), ["192.0.2.3", "192.0.2.4"]);
        assert_eq!(wishes.handle_pause(true).len(), 4);
        assert_eq!(wanted(&wishes).len(), 0);
    }
}
