//! The clients with open windows: bounded, and ordered by when each was last counted, so that the oldest goes first.
//!
//! A slab with an intrusive list: nothing depends on hash order, and an event costs one look-up.

use hashbrown::{DefaultHashBuilder, HashTable};
use proto::net::Target;
use proto::time::Timestamp;
use std::hash::BuildHasher;

use super::window::Window;

const NONE: u32 = u32::MAX;

/// What one client has counted towards one rule.
#[derive(Clone, Debug)]
pub enum Counted {
    /// Events in a window.
    Window(Window),
    /// A leaky bucket.
    Bucket {
        /// Its theoretical arrival time, in nanoseconds since the epoch.
        level: u64,
        /// Time of the newest event poured in: one that is logged late is poured at this time.
        newest: Timestamp,
    },
}

impl Counted {
    fn events(&self) -> usize {
        match self {
            Self::Window(window) => window.len(),
            Self::Bucket { .. } => 1,
        }
    }

    fn has_samples(&self) -> bool {
        matches!(self, Self::Window(window) if window.has_samples())
    }
}

#[derive(Clone, Debug)]
struct Client {
    target: Target,
    newer: u32,
    older: u32,
    last_counted: Timestamp,
    rules: Vec<(u16, Counted)>,
}

/// All clients with open windows.
#[derive(Debug)]
pub struct Clients {
    slab: Vec<Client>,
    free: Vec<u32>,
    index: HashTable<u32>,
    hasher: DefaultHashBuilder,
    newest: u32,
    oldest: u32,
    /// Events held by all windows together.
    events: usize,
    /// Windows that keep sampled texts.
    sampled: usize,
}

impl Default for Clients {
    fn default() -> Self {
        Self {
            slab: Vec::new(),
            free: Vec::new(),
            index: HashTable::new(),
            hasher: DefaultHashBuilder::default(),
            newest: NONE,
            oldest: NONE,
            events: 0,
            sampled: 0,
        }
    }
}

impl Clients {
    /// Number of clients.
    pub fn len(&self) -> usize {
        self.index.len()
    }

    /// Events held by all windows together.
    pub fn events(&self) -> usize {
        self.events
    }

    /// Windows that keep sampled texts.
    pub fn sampled(&self) -> usize {
        self.sampled
    }

    /// Changes what `target` has counted for `rule` (`None` = nothing yet, or nothing left), at arrival `now`.
    pub fn update<R>(
        &mut self,
        target: Target,
        rule: u16,
        now: Timestamp,
        change: impl FnOnce(&mut Option<Counted>) -> R,
    ) -> R {
        let found = self.find(&target);
        let mut counted = found.and_then(|id| {
            let rules = &mut self.slab[id as usize].rules;
            rules.iter().position(|(known, _)| *known == rule).map(|at| rules.swap_remove(at).1)
        });
        self.discount(counted.as_ref());
        let result = change(&mut counted);
        self.account(counted.as_ref());
        match (found, counted) {
            (Some(id), Some(counted)) => {
                self.slab[id as usize].rules.push((rule, counted));
                self.slab[id as usize].last_counted = now;
                self.unlink(id);
                self.link_newest(id);
            }
            (None, Some(counted)) => self.add(target, rule, counted, now),
            (Some(id), None) if self.slab[id as usize].rules.is_empty() => self.remove(id),
            (Some(_) | None, None) => {}
        }
        result
    }

    /// What `target` has counted, by rule.
    pub fn get(&self, target: &Target) -> &[(u16, Counted)] {
        self.find(target).map_or(&[], |id| &self.slab[id as usize].rules)
    }

    /// Forgets all that `target` has counted.
    pub fn forget(&mut self, target: &Target) {
        if let Some(id) = self.find(target) {
            self.remove(id);
        }
    }

    /// Forgets what `target` did before `end`, which a decision made elsewhere has used up for `rule`.
    pub fn consume(&mut self, target: Target, rule: u16, end: Timestamp, now: Timestamp) {
        if self.find(&target).is_none() {
            return;
        }
        self.update(target, rule, now, |counted| {
            *counted = match counted.take() {
                Some(Counted::Window(window)) => window.since(end).map(Counted::Window),
                // A bucket that ran over starts empty.
                Some(Counted::Bucket { newest, level }) if newest >= end => Some(Counted::Bucket { newest, level }),
                Some(Counted::Bucket { .. }) | None => None,
            };
        });
    }

    /// Forgets every client within `outer`. Looks at all of them.
    pub fn forget_within(&mut self, outer: &Target) {
        let ids: Vec<u32> = self.oldest_first().filter(|&id| outer.contains(&self.slab[id as usize].target)).collect();
        for id in ids {
            self.remove(id);
        }
    }

    /// Forgets the client that was counted longest ago.
    pub fn evict_oldest(&mut self) -> Option<Target> {
        let id = Some(self.oldest).filter(|&id| id != NONE)?;
        let target = self.slab[id as usize].target;
        self.remove(id);
        Some(target)
    }

    /// When the client that was counted longest ago was counted.
    pub fn oldest_counted(&self) -> Option<Timestamp> {
        self.slab.get(self.oldest as usize).map(|client| client.last_counted)
    }

    /// Renumbers rules; what a rule without a new number has counted is dropped.
    pub fn renumber(&mut self, new_number: impl Fn(u16) -> Option<u16>) {
        let targets: Vec<(Target, u32)> = self.oldest_first().map(|id| (self.slab[id as usize].target, id)).collect();
        for (_, id) in targets {
            let rules = std::mem::take(&mut self.slab[id as usize].rules);
            for (rule, counted) in rules {
                match new_number(rule) {
                    Some(new) => self.slab[id as usize].rules.push((new, counted)),
                    None => self.discount(Some(&counted)),
                }
            }
            if self.slab[id as usize].rules.is_empty() {
                self.remove(id);
            }
        }
    }

    fn oldest_first(&self) -> impl Iterator<Item = u32> {
        let first = Some(self.oldest).filter(|&id| id != NONE);
        std::iter::successors(first, |&id| Some(self.slab[id as usize].newer).filter(|&next| next != NONE))
    }

    fn account(&mut self, counted: Option<&Counted>) {
        self.events += counted.map_or(0, Counted::events);
        self.sampled += usize::from(counted.is_some_and(Counted::has_samples));
    }

    fn discount(&mut self, counted: Option<&Counted>) {
        self.events -= counted.map_or(0, Counted::events);
        self.sampled -= usize::from(counted.is_some_and(Counted::has_samples));
    }

    fn find(&self, target: &Target) -> Option<u32> {
        let hash = self.hasher.hash_one(target);
        self.index.find(hash, |&id| self.slab[id as usize].target == *target).copied()
    }

    fn add(&mut self, target: Target, rule: u16, counted: Counted, now: Timestamp) {
        let rules = vec![(rule, counted)];
        let client = Client { target, newer: NONE, older: NONE, last_counted: now, rules };
        let id = match self.free.pop() {
            Some(id) => {
                self.slab[id as usize] = client;
                id
            }
            None => {
                self.slab.push(client);
                (self.slab.len() - 1) as u32
            }
        };
        self.link_newest(id);
        let Self { slab, index, hasher, .. } = self;
        index.insert_unique(hasher.hash_one(target), id, |&id| hasher.hash_one(slab[id as usize].target));
    }

    fn remove(&mut self, id: u32) {
        self.unlink(id);
        let client = &mut self.slab[id as usize];
        let hash = self.hasher.hash_one(client.target);
        let rules = std::mem::take(&mut client.rules);
        for (_, counted) in &rules {
            self.discount(Some(counted));
        }
        if let Ok(entry) = self.index.find_entry(hash, |&other| other == id) {
            entry.remove();
        }
        self.free.push(id);
    }

    fn link_newest(&mut self, id: u32) {
        self.slab[id as usize].older = self.newest;
        self.slab[id as usize].newer = NONE;
        match self.slab.get_mut(self.newest as usize) {
            Some(former) => former.newer = id,
            None => self.oldest = id,
        }
        self.newest = id;
    }

    fn unlink(&mut self, id: u32) {
        let (newer, older) = (self.slab[id as usize].newer, self.slab[id as usize].older);
        match self.slab.get_mut(newer as usize) {
            Some(neighbour) => neighbour.older = older,
            None => self.newest = older,
        }
        match self.slab.get_mut(older as usize) {
            Some(neighbour) => neighbour.newer = newer,
            None => self.oldest = newer,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn target(n: u8) -> Target {
        Target::host([192, 0, 2, n].into())
    }

    proptest! {
        #[test]
        fn order_and_counts_agree_with_a_list(steps in prop::collection::vec((0u8..12, 0u8..5), 1..200)) {
            let mut clients = Clients::default();
            let mut list: Vec<Target> = Vec::new();
            for (now, (n, action)) in steps.into_iter().enumerate() {
                let target = target(n);
                match action {
                    0 => {
                        let evicted = clients.evict_oldest();
                        prop_assert_eq!(evicted, (!list.is_empty()).then(|| list.remove(0)));
                    }
                    1 => {
                        clients.forget(&target);
                        list.retain(|known| *known != target);
                    }
                    _ => {
                        let now = Timestamp::from_secs(now as i64);
                        clients.update(target, 0, now, |counted| *counted = Some(Counted::Bucket { level: 1, newest: now }));
                        list.retain(|known| *known != target);
                        list.push(target);
                    }
                }
                prop_assert_eq!(clients.len(), list.len());
                prop_assert_eq!(clients.events(), list.len());
                let order: Vec<Target> = clients.oldest_first().map(|id| clients.slab[id as usize].target).collect();
                prop_assert_eq!(&order, &list);
                prop_assert!(list.iter().all(|target| clients.find(target).is_some()));
            }
        }
    }
}
