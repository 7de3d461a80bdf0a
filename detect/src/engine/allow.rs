//! Who may never be banned: configured networks, names' last known addresses, and what operators allowed.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use proto::net::{NetSet, Target};
use proto::time::Timestamp;

/// The three lists, and their union for look-up.
///
/// An allowance that has ended is kept for a while: what its client did before that end never counts, also when windows
/// are rebuilt.
#[derive(Debug, Default)]
pub struct Allows {
    configured: NetSet,
    allowed: BTreeMap<Target, Option<Timestamp>>,
    now: Timestamp,
    resolved: BTreeMap<String, Vec<IpAddr>>,
    union: NetSet,
}

impl Allows {
    /// The lists as configured and stored.
    pub fn new(
        configured: &[IpNet],
        allowed: BTreeMap<Target, Option<Timestamp>>,
        resolved: BTreeMap<String, Vec<IpAddr>>,
        now: Timestamp,
    ) -> Self {
        let configured = NetSet::new(configured.iter().copied());
        let mut allows = Self { configured, allowed, now, resolved, union: NetSet::default() };
        allows.unite();
        allows
    }

    fn unite(&mut self) {
        let now = self.now;
        let in_force = self.allowed.iter().filter(|(_, until)| until.is_none_or(|until| now < until));
        let allowed = in_force.map(|(target, _)| target.net());
        let resolved = self.resolved.values().flatten().map(|addr| Target::host(*addr).net());
        self.union = NetSet::new(self.configured.nets().into_iter().chain(allowed).chain(resolved));
    }

    /// Whether what `addr` did at `time` never counts.
    pub fn exempts(&self, addr: IpAddr, time: Timestamp) -> bool {
        let allowed_then = |(target, until): (&Target, &Option<Timestamp>)| {
            until.is_some_and(|until| time < until) && target.contains_addr(addr)
        };
        self.contains(addr) || self.allowed.iter().any(allowed_then)
    }

    /// Whether `addr` may not be banned now.
    pub fn contains(&self, addr: IpAddr) -> bool {
        self.union.contains(addr)
    }

    /// Whether every address of `target` may never be banned.
    pub fn covers(&self, target: &Target) -> bool {
        self.union.covers(target)
    }

    /// All of it, merged.
    pub fn nets(&self) -> Vec<IpNet> {
        self.union.nets()
    }

    /// Which list holds `addr`, for people.
    pub fn why(&self, addr: IpAddr) -> Option<String> {
        let now = self.now;
        let mut in_force = self.allowed.iter().filter(|(_, until)| until.is_none_or(|until| now < until));
        if let Some((target, until)) = in_force.find(|(target, _)| target.contains_addr(addr)) {
            let until = until.map_or_else(String::new, |until| format!(" until {until}"));
            return Some(format!("{target} was allowed by an operator{until} (`allow {target} --for 1s` ends that)"));
        }
        if let Some((name, _)) = self.resolved.iter().find(|(_, addrs)| addrs.contains(&addr)) {
            return Some(format!("{name} in never_ban resolves to it"));
        }
        let nets = self.configured.nets();
        nets.iter().find(|net| net.contains(&addr)).map(|net| format!("{net} is in never_ban"))
    }

    /// Allows `target` until a moment, or for ever.
    pub fn allow(&mut self, target: Target, until: Option<Timestamp>) {
        self.allowed.insert(target, until);
        self.unite();
    }

    /// Takes over what another detector was told.
    pub fn follow(&mut self, allowed: BTreeMap<Target, Option<Timestamp>>, resolved: BTreeMap<String, Vec<IpAddr>>) {
        (self.allowed, self.resolved) = (allowed, resolved);
        self.unite();
    }

    /// Moves on to `now`: allowances end, and are forgotten if that was before `since`. Whether any has ended.
    pub fn advance(&mut self, now: Timestamp, since: Timestamp) -> bool {
        let (former, now) = (self.now, now.max(self.now));
        self.now = now;
        let ended = self.allowed.values().flatten().any(|until| former < *until && *until <= now);
        self.allowed.retain(|_, until| until.is_none_or(|until| since <= until));
        if ended {
            self.unite();
        }
        ended
    }

    /// When the next allowance ends.
    pub fn next_end(&self) -> Option<Timestamp> {
        self.allowed.values().flatten().filter(|until| **until > self.now).min().copied()
    }

    /// A name has been resolved; whether that changed anything. An empty answer keeps the last good one.
    pub fn set_resolved(&mut self, name: &str, mut addrs: Vec<IpAddr>) -> bool {
        addrs.sort_unstable();
        addrs.dedup();
        if addrs.is_empty() || self.resolved.get(name) == Some(&addrs) {
            return false;
        }
        self.resolved.insert(name.to_owned(), addrs);
        self.unite();
        true
    }

    /// New configured lists; names that are not in `names` any more are forgotten.
    pub fn reconfigure(&mut self, configured: &[IpNet], names: &[String]) {
        self.configured = NetSet::new(configured.iter().copied());
        self.resolved.retain(|name, _| names.contains(name));
        self.unite();
    }

    /// What operators allowed, and what has ended not long ago.
    pub fn allowed(&self) -> &BTreeMap<Target, Option<Timestamp>> {
        &self.allowed
    }

    /// The names' last known addresses.
    pub fn resolved(&self) -> &BTreeMap<String, Vec<IpAddr>> {
        &self.resolved
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_good_answer_survives_a_failure() {
        let mut allows = Allows::default();
        let addr: IpAddr = "192.0.2.1".parse().unwrap();
        assert!(allows.set_resolved("home.example", vec![addr]));
        assert!(!allows.set_resolved("home.example", vec![]));
        assert!(allows.contains(addr));
        assert!(allows.why(addr).unwrap().contains("home.example"));
        allows.reconfigure(&[], &[]);
        assert!(!allows.contains(addr), "a name that is configured no more");
    }

    #[test]
    fn an_allowance_ends_by_itself() {
        let mut allows = Allows::default();
        let target: Target = "192.0.2.0/24".parse().unwrap();
        let (addr, since) = (target.addr(), Timestamp::from_secs(10));
        allows.allow(target, Some(Timestamp::from_secs(10)));
        assert!(allows.covers(&target) && !allows.advance(Timestamp::from_secs(9), since));
        assert!(allows.advance(Timestamp::from_secs(10), since));
        assert!(!allows.covers(&target));
        assert!(allows.exempts(addr, Timestamp::from_secs(9)), "what was done before does not count");
        assert!(!allows.exempts(addr, Timestamp::from_secs(10)));
        allows.advance(Timestamp::from_secs(71), Timestamp::from_secs(11));
        assert!(allows.allowed().is_empty());
    }
}
