//! Who is banned now, as ingest needs to know it: of a banned client every line is sent, so that leaks are seen.

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::net::{Target, canonical};

/// A set of targets that many threads read and one changes. Cheap to clone; all clones are the same set.
///
/// Whether an address is in it costs one look-up for each prefix length that its targets have: one or two as a rule.
#[derive(Clone, Debug, Default)]
pub struct Banned(Arc<RwLock<Targets>>);

#[derive(Debug, Default)]
struct Targets {
    all: HashSet<Target>,
    /// How many targets have each prefix length: IPv4, IPv6.
    prefixes: [BTreeMap<u8, usize>; 2],
}

impl Banned {
    /// Nobody is banned.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a target.
    pub fn put(&self, target: Target) {
        self.write().put(target);
    }

    /// Removes a target; nothing else that covers it.
    pub fn remove(&self, target: &Target) {
        self.write().remove(target);
    }

    /// From now on the set is `targets`. Nobody sees anything between the old set and the new one.
    pub fn replace(&self, targets: impl IntoIterator<Item = Target>) {
        let mut fresh = Targets::default();
        targets.into_iter().for_each(|target| fresh.put(target));
        *self.write() = fresh;
    }

    /// Whether some target covers `addr`, canonical or not.
    pub fn contains(&self, addr: IpAddr) -> bool {
        let addr = canonical(addr);
        let targets = self.read();
        let mut prefixes = targets.prefixes[usize::from(addr.is_ipv6())].keys();
        prefixes.any(|prefix| targets.all.contains(&Target::new(addr, *prefix)))
    }

    /// Number of targets.
    pub fn len(&self) -> usize {
        self.read().all.len()
    }

    // A change is made of steps that cannot panic, so a poisoned lock holds a whole set.
    fn read(&self) -> RwLockReadGuard<'_, Targets> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Targets> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Targets {
    fn put(&mut self, target: Target) {
        if self.all.insert(target) {
            *self.prefixes[usize::from(!target.is_ipv4())].entry(target.prefix()).or_default() += 1;
        }
    }

    fn remove(&mut self, target: &Target) {
        let prefixes = &mut self.prefixes[usize::from(!target.is_ipv4())];
        if self.all.remove(target)
            && let Some(count) = prefixes.get_mut(&target.prefix())
        {
            *count -= 1;
            if *count == 0 {
                prefixes.remove(&target.prefix());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn mapped_addresses_are_found_and_a_new_set_takes_the_old_ones_place() {
        let banned = Banned::new();
        let other = banned.clone();
        banned.put("192.0.2.1".parse().unwrap());
        assert!(other.contains("::ffff:192.0.2.1".parse().unwrap()));
        banned.replace(["2001:db8::/64".parse().unwrap()]);
        assert!(!other.contains("192.0.2.1".parse().unwrap()));
        assert!(other.contains("2001:db8::7".parse().unwrap()));
        assert_eq!(other.len(), 1);
    }

    proptest! {
        #[test]
        fn the_set_agrees_with_a_list(steps in prop::collection::vec((any::<bool>(), 0u8..4, 0u8..=32, any::<bool>()), 0..40)) {
            let banned = Banned::new();
            let mut list: Vec<Target> = Vec::new();
            let addr = |last: u8, is_v6: bool| {
                if is_v6 { IpAddr::from([0x2001, 0, 0, 0, 0, 0, 0, u16::from(last)]) } else { IpAddr::from([192, 0, 2, last]) }
            };
            for (put, last, prefix, is_v6) in steps {
                let target = Target::new(addr(last, is_v6), if is_v6 { prefix + 96 } else { prefix });
                list.retain(|known| *known != target);
                if put {
                    banned.put(target);
                    list.push(target);
                } else {
                    banned.remove(&target);
                }
                for (probe, is_v6) in [(0, false), (1, false), (2, true), (3, true)] {
                    let probe = addr(probe, is_v6);
                    prop_assert_eq!(banned.contains(probe), list.iter().any(|target| target.contains_addr(probe)));
                }
                prop_assert_eq!(banned.len(), list.len());
            }
        }
    }
}
