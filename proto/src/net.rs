//! Addresses: the [`Target`] of a ban and [`NetSet`], an immutable set of networks with fast look-up.

use std::borrow::Cow;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// An IPv4-mapped IPv6 address as the IPv4 address it stands for; any other address unchanged.
pub fn canonical(addr: IpAddr) -> IpAddr {
    addr.to_canonical()
}

/// Parses an address as it appears in logs: with an IPv6 zone (`fe80::1%eth0`, dropped) or mapped
/// (`::ffff:192.0.2.1`, unmapped). Names, ports and brackets are not addresses.
pub fn parse_addr(text: &str) -> Option<IpAddr> {
    let bare = match text.split_once('%') {
        Some((addr, zone)) if !zone.is_empty() && addr.contains(':') => addr,
        Some(_) => return None,
        None => text,
    };
    bare.parse().ok().map(canonical)
}

/// Parses `host:port` as a TCP peer is logged: `192.0.2.1:443`, `[2001:db8::1]:443`, or a bare address.
pub fn parse_peer(text: &str) -> Option<IpAddr> {
    if let Some(rest) = text.strip_prefix('[') {
        let (addr, port) = rest.split_once(']')?;
        let port_ok = port.is_empty() || port.strip_prefix(':').is_some_and(|p| p.parse::<u16>().is_ok());
        return if port_ok { parse_addr(addr) } else { None };
    }
    if let Some((addr, port)) = text.rsplit_once(':')
        && !addr.contains(':')
    {
        return port.parse::<u16>().ok().and_then(|_| parse_addr(addr));
    }
    parse_addr(text)
}

/// What a ban applies to: one address or one network, in canonical form (host bits zero, mapped IPv4 as IPv4).
///
/// Text: `192.0.2.1`, `192.0.2.0/24`, `2001:db8::1`, `2001:db8::/64`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Target(IpNet);

impl Target {
    /// The network of `prefix` bits around `addr`; a prefix too long for the family means the address alone.
    pub fn new(addr: IpAddr, prefix: u8) -> Self {
        match canonical(addr) {
            IpAddr::V4(v4) => {
                // A mapped address carries its prefix in 128-bit terms when it came as IPv6.
                let prefix = if addr.is_ipv6() { prefix.saturating_sub(96) } else { prefix };
                Self(IpNet::V4(Ipv4Net::new_assert(v4, prefix.min(32)).trunc()))
            }
            IpAddr::V6(v6) => Self(IpNet::V6(Ipv6Net::new_assert(v6, prefix.min(128)).trunc())),
        }
    }

    /// The target that is exactly `addr`.
    pub fn host(addr: IpAddr) -> Self {
        Self::new(addr, 128)
    }

    /// The target a client is counted and banned by: its address for IPv4, its `ipv6_prefix` for IPv6.
    pub fn of_client(addr: IpAddr, ipv6_prefix: u8) -> Self {
        match canonical(addr) {
            v4 @ IpAddr::V4(_) => Self::host(v4),
            v6 @ IpAddr::V6(_) => Self::new(v6, ipv6_prefix),
        }
    }

    /// The network address.
    pub fn addr(&self) -> IpAddr {
        self.0.addr()
    }

    /// Prefix length in bits: 0 to 32 or 0 to 128.
    pub fn prefix(&self) -> u8 {
        self.0.prefix_len()
    }

    /// As a network.
    pub fn net(&self) -> IpNet {
        self.0
    }

    /// Whether this is one single address.
    pub fn is_host(&self) -> bool {
        self.prefix() == self.0.max_prefix_len()
    }

    /// Whether this is an IPv4 target.
    pub fn is_ipv4(&self) -> bool {
        matches!(self.0, IpNet::V4(_))
    }

    /// Whether `addr` (canonical or not) lies in this target.
    pub fn contains_addr(&self, addr: IpAddr) -> bool {
        self.0.contains(&canonical(addr))
    }

    /// Whether `other` lies wholly in this target; a target contains itself.
    pub fn contains(&self, other: &Self) -> bool {
        self.0.contains(&other.0)
    }

    /// As a part of a bus key: `:` is written `_`, everything else as in the text form.
    pub fn to_key(self) -> String {
        self.to_string().replace(':', "_")
    }

    /// The target a bus key names; `None` where it is none.
    pub fn from_key(key: &str) -> Option<Self> {
        key.replace('_', ":").parse().ok()
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_host() { self.addr().fmt(f) } else { self.0.fmt(f) }
    }
}

/// The text names no address or network.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected an IP address or a network such as 192.0.2.0/24, got {0:?}")]
pub struct NotATarget(pub String);

impl FromStr for Target {
    type Err = NotATarget;

    fn from_str(text: &str) -> Result<Self, NotATarget> {
        let wrong = || NotATarget(text.to_owned());
        match text.split_once('/') {
            None => parse_addr(text).map(Self::host).ok_or_else(wrong),
            Some((addr, prefix)) => {
                let addr: IpAddr = addr.parse().map_err(|_| wrong())?;
                let prefix: u8 = prefix.parse().map_err(|_| wrong())?;
                let max = if addr.is_ipv4() { 32 } else { 128 };
                let mapped = addr.is_ipv6() && canonical(addr).is_ipv4();
                if prefix > max || (mapped && prefix < 96) {
                    return Err(wrong());
                }
                Ok(Self::new(addr, prefix))
            }
        }
    }
}

impl Serialize for Target {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Target {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Cow::<'de, str>::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl JsonSchema for Target {
    fn schema_name() -> Cow<'static, str> {
        "Target".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        // A single address has no prefix: neither /32 nor /128 is ever written.
        const OCTET: &str = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])";
        const V4_PREFIX: &str = "(/(3[01]|[12]?[0-9]))?";
        const V6: &str = "[0-9a-f:]*:[0-9a-f:]*(/(12[0-7]|1[01][0-9]|[1-9]?[0-9]))?";
        json_schema!({
            "description": "An IP address, or a network with host bits zero. IPv6 as RFC 5952 writes it; never an \
                            IPv4-mapped address; a single address never has a prefix.",
            "type": "string",
            "pattern": format!(r"^(({OCTET}\.){{3}}{OCTET}{V4_PREFIX}|{V6})$"),
            "examples": ["192.0.2.1", "192.0.2.0/24", "2001:db8::1", "2001:db8::/64"],
        })
    }
}

/// An immutable set of networks. Look-up is a binary search over merged ranges.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetSet {
    v4: Vec<(u32, u32)>,
    v6: Vec<(u128, u128)>,
}

impl NetSet {
    /// The union of `nets`; mapped IPv6 networks count as IPv4.
    pub fn new(nets: impl IntoIterator<Item = IpNet>) -> Self {
        let mut set = Self::default();
        for net in nets {
            match Target::new(net.addr(), net.prefix_len()).net() {
                IpNet::V4(net) => set.v4.push((net.network().to_bits(), net.broadcast().to_bits())),
                IpNet::V6(net) => set.v6.push((net.network().to_bits(), net.broadcast().to_bits())),
            }
        }
        merge(&mut set.v4, |end| end.checked_add(1));
        merge(&mut set.v6, |end| end.checked_add(1));
        set
    }

    /// Whether `addr` (canonical or not) is in the set.
    pub fn contains(&self, addr: IpAddr) -> bool {
        match canonical(addr) {
            IpAddr::V4(addr) => within(&self.v4, addr.to_bits(), addr.to_bits()),
            IpAddr::V6(addr) => within(&self.v6, addr.to_bits(), addr.to_bits()),
        }
    }

    /// Whether every address of `target` is in the set.
    pub fn covers(&self, target: &Target) -> bool {
        match target.net() {
            IpNet::V4(net) => within(&self.v4, net.network().to_bits(), net.broadcast().to_bits()),
            IpNet::V6(net) => within(&self.v6, net.network().to_bits(), net.broadcast().to_bits()),
        }
    }

    /// Whether any address of `target` is in the set.
    pub fn intersects(&self, target: &Target) -> bool {
        match target.net() {
            IpNet::V4(net) => touches(&self.v4, net.network().to_bits(), net.broadcast().to_bits()),
            IpNet::V6(net) => touches(&self.v6, net.network().to_bits(), net.broadcast().to_bits()),
        }
    }

    /// The smallest list of networks that make up the set, IPv4 first, ascending.
    pub fn nets(&self) -> Vec<IpNet> {
        let v4 = self.v4.iter().flat_map(|&(start, end)| {
            ipnet::Ipv4Subnets::new(Ipv4Addr::from_bits(start), Ipv4Addr::from_bits(end), 0).map(IpNet::V4)
        });
        let v6 = self.v6.iter().flat_map(|&(start, end)| {
            ipnet::Ipv6Subnets::new(Ipv6Addr::from_bits(start), Ipv6Addr::from_bits(end), 0).map(IpNet::V6)
        });
        v4.chain(v6).collect()
    }

    /// Whether nothing is in the set.
    pub fn is_empty(&self) -> bool {
        self.v4.is_empty() && self.v6.is_empty()
    }
}

fn merge<T: Ord + Copy>(ranges: &mut Vec<(T, T)>, successor: impl Fn(T) -> Option<T>) {
    ranges.sort_unstable();
    ranges.dedup_by(|next, last| {
        let joins = successor(last.1).is_none_or(|after| next.0 <= after);
        if joins {
            last.1 = last.1.max(next.1);
        }
        joins
    });
}

fn within<T: Ord + Copy>(ranges: &[(T, T)], start: T, end: T) -> bool {
    let after = ranges.partition_point(|range| range.0 <= start);
    after.checked_sub(1).is_some_and(|i| end <= ranges[i].1)
}

fn touches<T: Ord + Copy>(ranges: &[(T, T)], start: T, end: T) -> bool {
    let after = ranges.partition_point(|range| range.0 <= end);
    after.checked_sub(1).is_some_and(|i| ranges[i].1 >= start)
}

/// Named sets of networks that configurations may use in place of CIDRs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NamedSet {
    /// The ranges Cloudflare publishes (<https://www.cloudflare.com/ips/>, read 2026-08).
    Cloudflare,
    /// Addresses that are never on the public Internet: RFC 1918, loopback, link-local, unique local, shared (RFC 6598).
    Private,
}

impl NamedSet {
    /// The set of that name.
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "cloudflare" => Some(Self::Cloudflare),
            "private" => Some(Self::Private),
            _ => None,
        }
    }

    /// Its networks.
    pub fn nets(self) -> Vec<IpNet> {
        let text: &[&str] = match self {
            Self::Cloudflare => &CLOUDFLARE,
            Self::Private => &PRIVATE,
        };
        text.iter().filter_map(|net| net.parse().ok()).collect()
    }
}

const CLOUDFLARE: [&str; 22] = [
    "103.21.244.0/22",
    "103.22.200.0/22",
    "103.31.4.0/22",
    "104.16.0.0/13",
    "104.24.0.0/14",
    "108.162.192.0/18",
    "131.0.72.0/22",
    "141.101.64.0/18",
    "162.158.0.0/15",
    "172.64.0.0/13",
    "173.245.48.0/20",
    "188.114.96.0/20",
    "190.93.240.0/20",
    "197.234.240.0/22",
    "198.41.128.0/17",
    "2400:cb00::/32",
    "2606:4700::/32",
    "2803:f800::/32",
    "2405:b500::/32",
    "2405:8100::/32",
    "2a06:98c0::/29",
    "2c0f:f248::/32",
];

const PRIVATE: [&str; 10] = [
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "::/128",
    "::1/128",
    "fc00::/7",
    "fe80::/10",
];

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn target(text: &str) -> Target {
        text.parse().unwrap()
    }

    #[test]
    fn targets_are_canonical() {
        for (given, canonical) in [
            ("192.0.2.1", "192.0.2.1"),
            ("192.0.2.77/24", "192.0.2.0/24"),
            ("192.0.2.1/32", "192.0.2.1"),
            ("::ffff:192.0.2.1", "192.0.2.1"),
            ("::ffff:192.0.2.1/120", "192.0.2.0/24"),
            ("2001:DB8:0::1", "2001:db8::1"),
            ("2001:db8::1/64", "2001:db8::/64"),
            ("fe80::1%eth0", "fe80::1"),
        ] {
            assert_eq!(target(given).to_string(), canonical, "{given}");
            assert_eq!(Target::from_key(&target(given).to_key()), Some(target(given)));
        }
        assert_eq!(target("2001:db8::/64").to_key(), "2001_db8__/64");
        for wrong in
            ["", "host", "192.0.2.1/33", "::/129", "1.2.3", "192.0.2.1%eth0", "::ffff:1.2.3.4/64", "1.2.3.4:80"]
        {
            assert!(wrong.parse::<Target>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn peers_are_parsed_with_and_without_ports() {
        for (given, addr) in [
            ("192.0.2.1:39496", "192.0.2.1"),
            ("[2001:db8::1]:443", "2001:db8::1"),
            ("[fe80::1%eth0]:443", "fe80::1"),
            ("[::ffff:192.0.2.1]:1", "192.0.2.1"),
            ("2001:db8::1", "2001:db8::1"),
        ] {
            assert_eq!(parse_peer(given), Some(addr.parse().unwrap()), "{given}");
        }
        for wrong in ["", ":80", "host:80", "[::1", "[::1]x", "192.0.2.1:x", "192.0.2.1:70000"] {
            assert_eq!(parse_peer(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn named_sets_are_complete() {
        assert_eq!(NamedSet::Cloudflare.nets().len(), CLOUDFLARE.len());
        assert_eq!(NamedSet::Private.nets().len(), PRIVATE.len());
    }

    proptest! {
        #[test]
        fn a_set_agrees_with_its_list(nets in prop::collection::vec((any::<u32>(), 0u8..=32), 0..12), probe: u32, bits in 0u8..=32) {
            let nets: Vec<IpNet> = nets.iter().map(|&(a, p)| Target::new(IpAddr::V4(a.into()), p).net()).collect();
            let set = NetSet::new(nets.iter().copied());
            // Probe near the listed networks as well as anywhere.
            let probe = nets.first().map_or(probe, |net| match net { IpNet::V4(n) => n.broadcast().to_bits().wrapping_add(probe % 3), IpNet::V6(_) => probe });
            let addr = IpAddr::V4(probe.into());
            prop_assert_eq!(set.contains(addr), nets.iter().any(|net| net.contains(&addr)));
            let target = Target::new(addr, bits);
            prop_assert_eq!(set.intersects(&target), nets.iter().any(|net| net.contains(&target.net()) || target.net().contains(net)));
            prop_assert_eq!(NetSet::new(set.nets()), set);
        }
    }
}
