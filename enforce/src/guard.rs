//! The last word before the firewall: who may not be banned, whoever asks. Pure.
//!
//! A target that lies within guarded networks, or is wider than the widest ban, is refused. A target that merely
//! contains guarded addresses is allowed, because firewalls return [`Guard::nets`] before they drop anything.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use proto::net::{NetSet, Target};

/// What the guard knows of the host and its configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GuardFacts {
    /// Addresses of the host's interfaces.
    pub own: Vec<IpAddr>,
    /// Next hops of the host's routes.
    pub gateways: Vec<IpAddr>,
    /// Servers that connect the cluster, and where hosts learn whom not to ban.
    pub bus_servers: Vec<IpAddr>,
    /// Proxies whose word on the client's address is taken.
    pub trusted_proxies: NetSet,
    /// As detect published it.
    pub never_ban: Vec<IpNet>,
    /// The widest IPv4 ban.
    pub prefix_min_v4: u8,
    /// The widest IPv6 ban.
    pub prefix_min_v6: u8,
}

/// Why a target is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Refusal {
    /// 127.0.0.0/8 and ::1.
    Loopback,
    /// An address of this host.
    Own,
    /// A next hop of this host.
    Gateway,
    /// A server that connects the cluster.
    BusServer,
    /// A trusted proxy.
    TrustedProxy,
    /// Listed in `never_ban` or allowed by an operator.
    NeverBan,
    /// Several of the above together.
    Guarded,
    /// Wider than `ban_prefix_min_ipv4` or `ban_prefix_min_ipv6`.
    TooWide,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Loopback => "loopback",
            Self::Own => "an address of this host",
            Self::Gateway => "a gateway of this host",
            Self::BusServer => "a NATS server of this cluster",
            Self::TrustedProxy => "a trusted proxy",
            Self::NeverBan => "in never_ban",
            Self::Guarded => "made of guarded addresses",
            Self::TooWide => "wider than ban_prefix_min allows",
        })
    }
}

/// Decides who may not be banned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guard {
    reasons: Vec<(Refusal, NetSet)>,
    all: NetSet,
    prefix_min_v4: u8,
    prefix_min_v6: u8,
}

impl Guard {
    /// From what is known now; make a new one when that changes.
    pub fn new(facts: &GuardFacts) -> Self {
        let loopback = [
            IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8)),
            IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::LOCALHOST, 128)),
        ];
        let hosts = |addrs: &[IpAddr]| NetSet::new(addrs.iter().map(|addr| Target::host(*addr).net()));
        let reasons = vec![
            (Refusal::Loopback, NetSet::new(loopback)),
            (Refusal::Own, hosts(&facts.own)),
            (Refusal::Gateway, hosts(&facts.gateways)),
            (Refusal::BusServer, hosts(&facts.bus_servers)),
            (Refusal::TrustedProxy, facts.trusted_proxies.clone()),
            (Refusal::NeverBan, NetSet::new(facts.never_ban.iter().copied())),
        ];
        let all = NetSet::new(reasons.iter().flat_map(|(_, set)| set.nets()));
        Self { reasons, all, prefix_min_v4: facts.prefix_min_v4, prefix_min_v6: facts.prefix_min_v6 }
    }

    /// Why `target` may not be banned; `None` when it may.
    pub fn refuse(&self, target: &Target) -> Option<Refusal> {
        let prefix_min = if target.is_ipv4() { self.prefix_min_v4 } else { self.prefix_min_v6 };
        if self.all.covers(target) {
            let reason = self.reasons.iter().find(|(_, set)| set.covers(target));
            return Some(reason.map_or(Refusal::Guarded, |(reason, _)| *reason));
        }
        (target.prefix() < prefix_min).then_some(Refusal::TooWide)
    }

    /// Whether any guarded address lies in `target`.
    pub fn touches(&self, target: &Target) -> bool {
        self.all.intersects(target)
    }

    /// The smallest list of networks that firewalls return before they look at bans, IPv4 first. A network of prefix 0
    /// comes as two halves, because kernel sets hold none.
    pub fn nets(&self) -> Vec<Target> {
        let halves = |net: IpNet| match net.prefix_len() {
            0 => net.subnets(1).map(Iterator::collect).unwrap_or_default(),
            _ => vec![net],
        };
        self.all.nets().into_iter().flat_map(halves).map(|net| Target::new(net.addr(), net.prefix_len())).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn facts() -> GuardFacts {
        GuardFacts {
            own: vec!["192.0.2.10".parse().unwrap(), "2001:db8::10".parse().unwrap()],
            gateways: vec!["192.0.2.1".parse().unwrap()],
            bus_servers: vec!["192.0.2.5".parse().unwrap()],
            trusted_proxies: NetSet::new(["198.51.100.0/24".parse().unwrap()]),
            never_ban: vec!["203.0.113.0/25".parse().unwrap(), "203.0.113.128/26".parse().unwrap()],
            prefix_min_v4: 16,
            prefix_min_v6: 32,
        }
    }

    #[test]
    fn guarded_and_too_wide_targets_are_refused_with_the_reason() {
        let guard = Guard::new(&facts());
        for (target, refusal) in [
            ("127.0.0.0/9", Some(Refusal::Loopback)),
            ("::1", Some(Refusal::Loopback)),
            ("192.0.2.10", Some(Refusal::Own)),
            ("2001:db8::10", Some(Refusal::Own)),
            ("192.0.2.1", Some(Refusal::Gateway)),
            ("192.0.2.5", Some(Refusal::BusServer)),
            ("198.51.100.0/24", Some(Refusal::TrustedProxy)),
            ("203.0.113.129", Some(Refusal::NeverBan)),
            ("203.0.0.0/15", Some(Refusal::TooWide)),
            ("2001:db8::/31", Some(Refusal::TooWide)),
            ("2001:db8::/64", None),
            ("203.0.113.0/24", None),
            ("192.0.0.0/16", None),
        ] {
            assert_eq!(guard.refuse(&target.parse().unwrap()), refusal, "{target}");
        }
        let joined = GuardFacts { never_ban: vec!["192.0.2.11/32".parse().unwrap()], ..facts() };
        assert_eq!(Guard::new(&joined).refuse(&"192.0.2.10/31".parse().unwrap()), Some(Refusal::Guarded));
    }

    #[test]
    fn a_guard_of_everything_fits_into_a_kernel_set() {
        let all = GuardFacts { never_ban: vec!["0.0.0.0/0".parse().unwrap()], ..facts() };
        let nets = Guard::new(&all).nets();
        assert!(nets.iter().all(|net| net.prefix() > 0));
        assert_eq!(nets.iter().filter(|net| net.is_ipv4()).count(), 2);
    }

    proptest! {
        #[test]
        fn an_address_is_refused_exactly_when_firewalls_return_it(addr: u32, near in 0u32..512) {
            let guard = Guard::new(&facts());
            let around = u32::from(Ipv4Addr::new(203, 0, 113, 0)).wrapping_sub(128).wrapping_add(near);
            for addr in [IpAddr::V4(addr.into()), IpAddr::V4(around.into())] {
                let returned = guard.nets().iter().any(|net| net.contains_addr(addr));
                prop_assert_eq!(guard.refuse(&Target::host(addr)).is_some(), returned);
            }
        }
    }
}
