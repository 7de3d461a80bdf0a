//! Clients that do, or nearly do, what the built-in rule `forceful-browsing` bans, spread over all nodes.
//!
//! Each commits one offence at most: its requests lie within minutes, and the first ban outlasts the test.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::access::{Access, SECOND};
use crate::random::Random;

/// Requests that make a ban.
const NEEDED: i64 = 15;
/// Longest span of these, in nanoseconds.
const WINDOW: i64 = 60 * SECOND;
/// Clients with addresses of IPv4; all further ones are networks of IPv6.
const IPV4_CLIENTS: u32 = 200;

/// How a client goes about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manner {
    /// As many requests as make a ban, within the window: when it was banned is certain.
    JustEnough,
    /// More than that.
    TooMany,
    /// One fewer.
    TooFew,
    /// Enough, but over more than the window.
    TooSlow,
}

/// Makes clients, and keeps their requests until they are taken.
#[derive(Debug)]
pub struct Offences {
    random: Random,
    nodes: usize,
    clients: u32,
    requests: u64,
    pending: Vec<(usize, Access)>,
}

impl Offences {
    /// The clients of a seed, on so many nodes.
    pub fn new(seed: u64, nodes: usize) -> Self {
        Self { random: Random::new(seed), nodes, clients: 0, requests: 0, pending: Vec::new() }
    }

    /// So many new clients, whose requests ended before `now`, in nanoseconds.
    pub fn add(&mut self, clients: usize, now: i64) {
        use Manner::{JustEnough, TooFew, TooMany, TooSlow};
        for _ in 0..clients {
            let manner = self.random.pick(&[JustEnough, JustEnough, TooMany, TooFew, TooSlow]);
            let client = self.client();
            self.offend(client, manner, now);
        }
    }

    /// One new client that is banned when node `node` alone is listened to: its requests, and what it is banned as.
    pub fn plain(&mut self, now: i64) -> (Vec<Access>, String) {
        let client = self.client();
        let requests = (0..NEEDED).map(|i| self.request(client, now - (NEEDED - i) * SECOND)).collect();
        (requests, crate::brute::target(client))
    }

    fn offend(&mut self, client: IpAddr, manner: Manner, now: i64) {
        let extra = i64::try_from(self.random.below(10)).unwrap_or(0);
        let (count, span) = match manner {
            Manner::JustEnough => (NEEDED, WINDOW),
            Manner::TooMany => (NEEDED + 1 + extra, WINDOW),
            Manner::TooFew => (NEEDED - 1, WINDOW / 2),
            Manner::TooSlow => (NEEDED, WINDOW + 1),
        };
        for i in 0..count {
            let request = self.request(client, now - SECOND - span + span * i / (count - 1));
            let node = self.random.below(u64::try_from(self.nodes).unwrap_or(1));
            self.pending.push((usize::try_from(node).unwrap_or(0), request));
        }
    }

    fn client(&mut self) -> IpAddr {
        self.clients += 1;
        match u8::try_from(self.clients) {
            Ok(last) if self.clients <= IPV4_CLIENTS => IpAddr::V4(Ipv4Addr::new(198, 51, 100, last)),
            _ => IpAddr::V6(Ipv6Addr::from_bits(0x2001_0db8_0066 << 80 | u128::from(self.clients) << 64 | 1)),
        }
    }

    fn request(&mut self, client: IpAddr, start: i64) -> Access {
        self.requests += 1;
        let mut access = Access::new(start, client, 404, format!("/wp-login.php?{}", self.requests));
        access.count = self.requests;
        access
    }

    /// Each pending request with a chance of `percent` in 100, in random order, by node.
    pub fn take(&mut self, percent: u64) -> Vec<Vec<Access>> {
        let mut taken = vec![Vec::new(); self.nodes];
        let mut kept = Vec::new();
        while !self.pending.is_empty() {
            let length = u64::try_from(self.pending.len()).unwrap_or(1);
            let at = usize::try_from(self.random.below(length)).unwrap_or(0);
            let (node, access) = self.pending.swap_remove(at);
            if self.random.chance(percent) {
                taken[node].push(access);
            } else {
                kept.push((node, access));
            }
        }
        self.pending = kept;
        taken
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::brute;
    use crate::sample;

    #[test]
    fn some_are_banned_once_and_some_never() {
        let mut offences = Offences::new(1, 3);
        offences.add(240, sample::BEGIN);
        let lists = [offences.take(30), offences.take(50), offences.take(100)].concat();
        assert!(lists.iter().all(|list| !list.is_empty()));
        let logs: Vec<String> =
            lists.iter().map(|list| list.iter().map(|access| access.render_json() + "\n").collect()).collect();
        let bans = brute::bans(&brute::merge(&logs), &brute::built_in_rules(), brute::Escalation::default());
        let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
        for ban in &bans {
            *counts.entry(&ban.target).or_default() += 1;
        }
        assert!(counts.values().all(|count| *count == 1) && (120..180).contains(&counts.len()), "{}", counts.len());
        assert!(counts.contains_key("198.51.100.1") || counts.contains_key("198.51.100.2"));
        assert!(counts.keys().any(|target| target.ends_with("/64")));
    }
}
