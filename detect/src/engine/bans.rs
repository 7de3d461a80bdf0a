//! The bans in force, by target and by end.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use proto::ban::{Ban, BanChange, BanRecord};
use proto::net::Target;
use proto::time::Timestamp;

/// The set of bans. A target holds at most one ban of each rule.
#[derive(Debug, Default)]
pub struct Bans {
    records: BTreeMap<Target, BanRecord>,
    by_end: BTreeSet<(Timestamp, Target, String)>,
    /// How many targets have each prefix length: IPv4, IPv6.
    prefixes: [BTreeMap<u8, usize>; 2],
}

impl Bans {
    /// Number of banned targets.
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// The bans of a target.
    pub fn get(&self, target: &Target) -> Option<&BanRecord> {
        self.records.get(target)
    }

    /// All records, by target.
    pub fn iter(&self) -> impl Iterator<Item = &BanRecord> {
        self.records.values()
    }

    /// Adds a ban, or replaces the one by the same rule. Whether the target was banned before.
    pub fn put(&mut self, ban: Ban) -> bool {
        let target = ban.target;
        let record = self.records.entry(target).or_insert_with(|| BanRecord { target, bans: Vec::new() });
        let was_banned = !record.bans.is_empty();
        if !was_banned {
            *self.prefixes[usize::from(!target.is_ipv4())].entry(target.prefix()).or_default() += 1;
        }
        if let Some(former) = record.bans.iter().position(|known| known.rule == ban.rule) {
            let former = record.bans.swap_remove(former);
            self.by_end.remove(&end_key(&former));
        }
        self.by_end.insert(end_key(&ban));
        let at = record.bans.partition_point(|known| known.rule < ban.rule);
        record.bans.insert(at, ban);
        was_banned
    }

    /// Removes all bans of a target.
    pub fn remove(&mut self, target: &Target) -> Option<BanRecord> {
        let record = self.records.remove(target)?;
        self.forget_prefix(target);
        for ban in &record.bans {
            self.by_end.remove(&end_key(ban));
        }
        Some(record)
    }

    /// Removes the next ban that has ended at `now`, together with what is left of its target.
    pub fn pop_ended(&mut self, now: Timestamp) -> Option<(Ban, BanChange)> {
        let (_, target, rule) = self.by_end.first().filter(|(end, ..)| *end <= now)?.clone();
        self.by_end.pop_first();
        let record = self.records.get_mut(&target)?;
        let at = record.bans.iter().position(|ban| ban.rule == rule)?;
        let ban = record.bans.remove(at);
        if record.bans.is_empty() {
            self.records.remove(&target);
            self.forget_prefix(&target);
            return Some((ban, BanChange::Delete(target)));
        }
        let change = BanChange::Put(record.clone());
        Some((ban, change))
    }

    fn forget_prefix(&mut self, target: &Target) {
        let prefixes = &mut self.prefixes[usize::from(!target.is_ipv4())];
        if let Some(count) = prefixes.get_mut(&target.prefix()) {
            *count -= 1;
            if *count == 0 {
                prefixes.remove(&target.prefix());
            }
        }
    }

    /// The records that cover an address, widest first; one look-up for each prefix length that bans have.
    pub fn covering(&self, addr: IpAddr) -> impl Iterator<Item = &BanRecord> {
        let prefixes = self.prefixes[usize::from(addr.is_ipv6())].keys();
        prefixes.filter_map(move |prefix| self.records.get(&Target::new(addr, *prefix)))
    }

    /// When the next ban ends.
    pub fn next_end(&self) -> Option<Timestamp> {
        self.by_end.first().map(|(end, ..)| *end).filter(|end| *end < Timestamp::MAX)
    }

    /// Banned targets that wholly contain `target`, itself aside, widest first.
    pub fn wider(&self, target: &Target) -> Vec<Target> {
        (0..target.prefix())
            .map(|prefix| Target::new(target.addr(), prefix))
            .filter(|wider| self.records.contains_key(wider))
            .collect()
    }

    /// Banned targets that lie wholly in `net`.
    pub fn inside(&self, net: IpNet) -> Vec<Target> {
        let outer = Target::new(net.addr(), net.prefix_len());
        // Targets are ordered by address, then prefix, and a network is not before its own first address.
        let first = Target::new(outer.addr(), 0).min(outer);
        self.records
            .range(first..)
            .map(|(target, _)| *target)
            .skip_while(|t| t.addr() < outer.addr())
            .take_while(|t| outer.contains_addr(t.addr()))
            .filter(|t| outer.contains(t))
            .collect()
    }
}

fn end_key(ban: &Ban) -> (Timestamp, Target, String) {
    (ban.expires_at.unwrap_or(Timestamp::MAX), ban.target, ban.rule.clone())
}

#[cfg(test)]
mod tests {
    use proto::ban::{Evidence, Origin};

    use super::*;

    fn ban(target: &str, rule: &str, end: Option<i64>) -> Ban {
        Ban {
            target: target.parse().unwrap(),
            rule: rule.to_owned(),
            origin: Origin::Detect,
            ban_count: 1,
            ban_seconds: None,
            banned_at: Timestamp::EPOCH,
            expires_at: end.map(Timestamp::from_secs),
            reason: String::new(),
            evidence: Evidence::default(),
        }
    }

    #[test]
    fn the_latest_end_frees_the_address() {
        let mut bans = Bans::default();
        assert!(!bans.put(ban("192.0.2.1", "a", Some(10))));
        assert!(bans.put(ban("192.0.2.1", "b", Some(20))));
        assert!(bans.put(ban("192.0.2.1", "a", Some(15))), "replaces the ban by the same rule");
        assert_eq!(bans.next_end(), Some(Timestamp::from_secs(15)));
        let (ended, change) = bans.pop_ended(Timestamp::from_secs(15)).unwrap();
        assert!(matches!(change, BanChange::Put(record) if record.bans.len() == 1 && ended.rule == "a"));
        assert!(bans.pop_ended(Timestamp::from_secs(19)).is_none());
        let (_, change) = bans.pop_ended(Timestamp::from_secs(20)).unwrap();
        assert!(matches!(change, BanChange::Delete(_)));
        assert_eq!(bans.len(), 0);
    }

    #[test]
    fn wider_and_inner_bans_are_found() {
        let mut bans = Bans::default();
        for target in ["192.0.2.0/24", "192.0.2.7", "192.0.0.0/16", "2001:db8::/48", "2001:db8::1", "192.0.3.1"] {
            bans.put(ban(target, "r", None));
        }
        let texts = |targets: Vec<Target>| targets.iter().map(ToString::to_string).collect::<Vec<_>>();
        let covering: Vec<Target> = bans.covering("192.0.2.7".parse().unwrap()).map(|record| record.target).collect();
        assert_eq!(texts(covering), ["192.0.0.0/16", "192.0.2.0/24", "192.0.2.7"]);
        assert_eq!(bans.covering("192.1.2.7".parse().unwrap()).count(), 0);
        assert_eq!(texts(bans.wider(&"192.0.2.7".parse().unwrap())), ["192.0.0.0/16", "192.0.2.0/24"]);
        assert_eq!(texts(bans.inside("192.0.2.0/24".parse().unwrap())), ["192.0.2.0/24", "192.0.2.7"]);
        assert_eq!(texts(bans.inside("2001:db8::/32".parse().unwrap())), ["2001:db8::/48", "2001:db8::1"]);
        assert_eq!(texts(bans.inside("192.0.2.7/32".parse().unwrap())), ["192.0.2.7"]);
        assert!(bans.next_end().is_none());
    }
}
