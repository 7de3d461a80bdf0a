//! How a banned client is written in the head of a request, as patterns that no other client's head contains. Pure.
//!
//! Addresses are taken to be written as RFC 5952 says (IPv6) and without leading zeros (IPv4): so do Go, and with it
//! Traefik, and Cloudflare. A pattern begins with the line of the header, or with what separates members of a list, and
//! ends where the address ends, or, of a network, at the end of a group of digits. So 192.0.2.1 is not found in
//! 192.0.2.10, nor 192.0.2.0/24 in 192.0.20.1. That the line begins with it keeps what a client says in another header,
//! which may travel on in a log or a query, from being taken for the header: no header has a line end in it.

use std::net::IpAddr;

use proto::net::Target;

use crate::config::{FORWARDED_FOR, ForwardedForConfig};

/// What stands before each header of a request.
const LINE_START: &str = "\r\n";
/// Bytes that all patterns which are looked for anywhere begin with.
pub(crate) const SHARED_BYTES: usize = LINE_START.len();

/// What every packet has in it that is looked at for other members of the list than the first.
pub(crate) fn list_gate() -> String {
    format!("{LINE_START}{FORWARDED_FOR}:")
}

/// Patterns of one client.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Patterns {
    /// To be found anywhere in a packet.
    pub(crate) anywhere: Vec<String>,
    /// To be found in a packet that has [`list_gate`] in it.
    pub(crate) beside_list: Vec<String>,
}

impl Patterns {
    /// Number of patterns.
    pub(crate) fn count(&self) -> usize {
        self.anywhere.len() + self.beside_list.len()
    }

    /// All patterns of `target`; `None` where no list of patterns finds its addresses and no others.
    pub(crate) fn of(target: &Target, config: &ForwardedForConfig) -> Option<Self> {
        let beginnings = beginnings(target)?;
        let mut patterns = Self::default();
        for text in &beginnings {
            for header in &config.headers {
                let is_list = header.eq_ignore_ascii_case(FORWARDED_FOR);
                let (into, befores) = match is_list && config.whole_list {
                    // The first member follows a space as well. Cloudflare puts none between members.
                    true => (&mut patterns.beside_list, vec![" ".to_owned(), ",".to_owned()]),
                    false => (&mut patterns.anywhere, vec![format!("{LINE_START}{header}: ")]),
                };
                let afters: &[&str] = match (target.is_host(), is_list) {
                    (false, _) => &[""],
                    (true, true) => &[",", "\r\n"],
                    (true, false) => &["\r\n"],
                };
                for before in befores {
                    into.extend(afters.iter().map(|after| format!("{before}{text}{after}")));
                }
            }
        }
        Some(patterns)
    }
}

/// Texts with which the addresses of `target` begin, and no other address; `None` where there is no such list. Of an
/// address, its whole text.
fn beginnings(target: &Target) -> Option<Vec<String>> {
    if target.is_host() {
        return Some(vec![target.addr().to_string()]);
    }
    match target.addr() {
        IpAddr::V4(addr) => {
            let whole = target.prefix().is_multiple_of(8).then_some(usize::from(target.prefix() / 8))?;
            let octets = addr.octets();
            (whole > 0).then(|| vec![octets[..whole].iter().map(|octet| format!("{octet}.")).collect()])
        }
        IpAddr::V6(addr) => {
            let whole = target.prefix().is_multiple_of(16).then_some(usize::from(target.prefix() / 16))?;
            v6_beginnings(&addr.segments()[..whole])
        }
    }
}

/// `::` stands for the first of the longest runs of two or more zero groups. So where it could stand for some of these
/// groups, it could also stand for others, except at their end.
fn v6_beginnings(groups: &[u16]) -> Option<Vec<String>> {
    let written = groups.len() - groups.iter().rev().take_while(|group| **group == 0).count();
    let zeros = groups.len() - written;
    let has_run_within = groups[..written].windows(2).any(|pair| pair == [0, 0]);
    // `a::` says that two groups after `a` are zero, and not that three are.
    if written == 0 || groups[0] == 0 || has_run_within || zeros > 2 {
        return None;
    }
    let render = |groups: &[u16]| groups.iter().map(|group| format!("{group:x}:")).collect::<String>();
    let mut beginnings = vec![render(groups)];
    if zeros > 0 {
        beginnings.push(format!("{}:", render(&groups[..written])));
    }
    Some(beginnings)
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;

    fn patterns(target: &str, whole_list: bool) -> Option<Patterns> {
        let config = ForwardedForConfig { whole_list, ..ForwardedForConfig::default() };
        Patterns::of(&target.parse().unwrap(), &config)
    }

    #[test]
    fn an_address_ends_where_its_pattern_ends() {
        let anywhere = |target: &str| patterns(target, false).unwrap().anywhere;
        let host = [
            "\r\nX-Forwarded-For: 192.0.2.1,",
            "\r\nX-Forwarded-For: 192.0.2.1\r\n",
            "\r\nCf-Connecting-Ip: 192.0.2.1\r\n",
        ];
        assert_eq!(anywhere("192.0.2.1"), host);
        assert_eq!(anywhere("192.0.2.0/24"), ["\r\nX-Forwarded-For: 192.0.2.", "\r\nCf-Connecting-Ip: 192.0.2."]);
        assert_eq!(anywhere("2001:db8:0:7::/64")[0], "\r\nX-Forwarded-For: 2001:db8:0:7:");
        let zeros = ["\r\nX-Forwarded-For: 2001:db8:0:0:", "\r\nX-Forwarded-For: 2001:db8::"];
        assert_eq!([&anywhere("2001:db8::/64")[0], &anywhere("2001:db8::/64")[2]], zeros);
    }

    #[test]
    fn every_place_of_a_list_is_looked_at_when_that_is_wanted() {
        let found = patterns("192.0.2.1", true).unwrap();
        assert_eq!(found.anywhere, ["\r\nCf-Connecting-Ip: 192.0.2.1\r\n"]);
        assert_eq!(found.beside_list, [" 192.0.2.1,", " 192.0.2.1\r\n", ",192.0.2.1,", ",192.0.2.1\r\n"]);
        assert_eq!(found.count(), 5);
    }

    #[test]
    fn the_longest_pattern_fits_into_a_rule() {
        let config = ForwardedForConfig { headers: vec!["H".repeat(64)], ..ForwardedForConfig::default() };
        let target = "2001:db8:1111:2222:3333:4444:5555:6666".parse().unwrap();
        let patterns = Patterns::of(&target, &config).unwrap();
        assert!(patterns.anywhere.iter().all(|pattern| pattern.len() <= 128 && pattern.starts_with(LINE_START)));
    }

    #[test]
    fn networks_that_end_within_a_group_have_no_patterns() {
        for target in ["192.0.2.0/25", "192.0.0.0/15", "2001:db8::/56", "2001::/64", "2001:0:0:5::/64", "64:ff9b::/96"]
        {
            assert_eq!(patterns(target, false), None, "{target}");
        }
    }

    /// Groups of which many are zero.
    fn groups() -> impl Strategy<Value = [u16; 8]> {
        prop::array::uniform8(prop_oneof![Just(0u16), Just(1), Just(0x10), any::<u16>()])
    }

    proptest! {
        #[test]
        fn a_text_begins_so_exactly_when_the_address_is_in_the_target(
            a in groups(), b in groups(), same in 0usize..=8, v4 in any::<bool>(), length in 1u8..=8,
        ) {
            // The second shares its first groups with the first.
            let b: [u16; 8] = std::array::from_fn(|i| if i < same { a[i] } else { b[i] });
            let octets = |groups: [u16; 8]| Ipv4Addr::from([0, 1, 2, 3].map(|i| groups[i].to_be_bytes()[1]));
            let (target, addr) = if v4 {
                (Target::new(octets(a).into(), length.min(4) * 8), IpAddr::V4(octets(b)))
            } else {
                (Target::new(Ipv6Addr::from(a).into(), length * 16), IpAddr::V6(Ipv6Addr::from(b)))
            };
            prop_assume!(addr.to_canonical() == addr && target.is_ipv4() == v4);
            if let Some(beginnings) = beginnings(&target) {
                let end = if target.is_host() { "\r" } else { "" };
                let text = format!("{addr}\r");
                let found = beginnings.iter().any(|beginning| text.starts_with(&format!("{beginning}{end}")));
                prop_assert_eq!(found, target.contains_addr(addr), "{} in {}: {:?}", addr, target, beginnings);
            }
        }
    }
}
