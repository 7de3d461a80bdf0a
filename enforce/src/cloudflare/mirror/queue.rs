//! Changes that wait at one place: removals first, then additions, the newest first. Who was banned just now is about.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use proto::net::Target;
use proto::time::Timestamp;

/// A change that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pending {
    is_addition: bool,
    /// Revision of the ban set that first asked for it.
    revision: u64,
    since: Timestamp,
}

type Order = (bool, Reverse<u64>, Target);

/// All of them, one a target.
#[derive(Debug, Default)]
pub(super) struct Queue {
    pending: BTreeMap<Target, Pending>,
    order: BTreeSet<Order>,
}

impl Queue {
    /// From now on `target` waits for an addition or a removal; if it did already, it keeps its place.
    pub(super) fn put(&mut self, target: Target, is_addition: bool, revision: u64, now: Timestamp) {
        let former = self.take(&target).filter(|former| former.is_addition == is_addition);
        let pending = former.unwrap_or(Pending { is_addition, revision, since: now });
        self.pending.insert(target, pending);
        self.order.insert((is_addition, Reverse(pending.revision), target));
    }

    /// `target` waits for nothing any more.
    pub(super) fn remove(&mut self, target: &Target) {
        self.take(target);
    }

    fn take(&mut self, target: &Target) -> Option<Pending> {
        let pending = self.pending.remove(target)?;
        self.order.remove(&(pending.is_addition, Reverse(pending.revision), *target));
        Some(pending)
    }

    /// The next one.
    pub(super) fn first(&self) -> Option<Target> {
        self.order.first().map(|(.., target)| *target)
    }

    /// Those that free somebody, in order.
    pub(super) fn removals(&self) -> impl Iterator<Item = &Target> {
        self.order.iter().take_while(|(is_addition, ..)| !is_addition).map(|(.., target)| target)
    }

    /// All the others, in order.
    pub(super) fn additions(&self) -> impl Iterator<Item = &Target> {
        self.order.iter().skip_while(|(is_addition, ..)| !is_addition).map(|(.., target)| target)
    }

    /// All targets that wait.
    pub(super) fn targets(&self) -> impl Iterator<Item = &Target> {
        self.pending.keys()
    }

    /// Whether none waits.
    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    /// When the one that waits longest came.
    pub(super) fn oldest(&self) -> Option<Timestamp> {
        self.pending.values().map(|pending| pending.since).min()
    }

    /// The first revision of which something waits.
    pub(super) fn first_revision(&self) -> Option<u64> {
        self.pending.values().map(|pending| pending.revision).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_keeps_its_place_until_it_is_another_change() {
        let [a, b, c]: [Target; 3] = ["192.0.2.1", "192.0.2.2", "192.0.2.3"].map(|target| target.parse().unwrap());
        let at = Timestamp::from_secs;
        let mut queue = Queue::default();
        queue.put(a, true, 1, at(1));
        queue.put(b, true, 2, at(2));
        queue.put(a, true, 3, at(3));
        queue.put(c, false, 4, at(4));
        assert_eq!(queue.additions().collect::<Vec<_>>(), [&b, &a]);
        assert_eq!((queue.first(), queue.oldest(), queue.first_revision()), (Some(c), Some(at(1)), Some(1)));
        queue.put(a, false, 5, at(5));
        assert_eq!(queue.removals().collect::<Vec<_>>(), [&a, &c]);
        assert_eq!((queue.oldest(), queue.first_revision()), (Some(at(2)), Some(2)));
        queue.remove(&b);
        assert_eq!((queue.targets().count(), queue.additions().count()), (2, 0));
    }
}
