//! Members of our sets, as messages and as the kernel shows them.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use proto::net::Target;
use proto::time::Timestamp;

use crate::backend::nftables::netlink::{
    Attributes, Batch, CREATE, EXCLUSIVE, Kind, as_u32, as_u64, attribute, attributes,
};
use crate::backend::nftables::table::{self, Length, TABLE, guard_name};
use crate::plan::{Family, Held};

const INTERVAL_END: u32 = 1;

/// The prefix length whose set holds the ban.
pub(super) fn length_of(target: &Target) -> Length {
    Length { family: Family::of(target), prefix: target.prefix() }
}

/// Adds a ban; the kernel refuses it where it stands already.
pub(super) fn push_ban(batch: &mut Batch, target: &Target, timeout_s: Option<u32>, comment: &str) -> u32 {
    let set = length_of(target).set_name();
    push(batch, Kind::NewElement, &set, |element| {
        if let Some(seconds) = timeout_s {
            element.u64(4, u64::from(seconds) * 1000);
        }
        write_key(element, target.addr());
        if !comment.is_empty() {
            element.bytes(6, &table::render_comment(comment));
        }
    })
}

/// Removes a ban; the kernel refuses it where it does not stand.
pub(super) fn push_unban(batch: &mut Batch, target: &Target) -> u32 {
    let set = length_of(target).set_name();
    push(batch, Kind::DelElement, &set, |element| write_key(element, target.addr()))
}

/// Removes every member.
pub(super) fn push_flush(batch: &mut Batch, set: &str) -> u32 {
    batch.push(Kind::DelElement, 0, |message| {
        message.text(1, TABLE);
        message.text(2, set);
    })
}

/// Gives the family's guard these networks and no others. None may lie in another.
pub(super) fn push_guard(batch: &mut Batch, family: Family, nets: &BTreeSet<Target>) {
    let set = guard_name(family);
    push_flush(batch, &set);
    for net in nets {
        push(batch, Kind::NewElement, &set, |element| write_key(element, net.addr()));
        if let Some(end) = after(net) {
            push(batch, Kind::NewElement, &set, |element| {
                element.u32(3, INTERVAL_END);
                write_key(element, end);
            });
        }
    }
}

fn push(batch: &mut Batch, kind: Kind, set: &str, write: impl FnOnce(&mut Attributes<'_>)) -> u32 {
    let flags = if kind == Kind::NewElement { CREATE | EXCLUSIVE } else { 0 };
    batch.push(kind, flags, |message| {
        message.text(1, TABLE);
        message.text(2, set);
        message.nest(3, |list| list.nest(1, write));
    })
}

fn write_key(element: &mut Attributes<'_>, address: IpAddr) {
    element.nest(1, |key| match address {
        IpAddr::V4(address) => key.bytes(1, &address.octets()),
        IpAddr::V6(address) => key.bytes(1, &address.octets()),
    });
}

/// Asks for the members of a set.
pub(super) fn ask_members(message: &mut Attributes<'_>, set: &str) {
    message.text(1, TABLE);
    message.text(2, set);
}

/// Asks for the ban that holds the address by this length.
pub(super) fn ask_ban(message: &mut Attributes<'_>, length: Length, address: IpAddr) {
    ask_members(message, &length.set_name());
    let target = Target::new(address, length.prefix);
    message.nest(3, |list| list.nest(1, |element| write_key(element, target.addr())));
}

/// Bans of a set, from the items of its dump.
pub(super) fn parse_bans(items: &[Vec<u8>], length: Length, now: Timestamp) -> Vec<(Target, Held)> {
    let mut bans = Vec::new();
    for element in items.iter().filter_map(|item| attribute(item, 3)).flat_map(attributes).map(|(_, element)| element) {
        let Some(address) = parse_key(element) else { continue };
        let left = attribute(element, 5).and_then(as_u64).map(Duration::from_millis);
        let comment = attribute(element, 6).and_then(table::parse_comment).unwrap_or_default();
        let held = Held { ends: left.map(|left| now.saturating_add(left)), comment: Arc::from(comment) };
        bans.push((Target::new(address, length.prefix), held));
    }
    bans
}

/// Guarded networks, from the items of a dump: the fewest that make up its intervals.
pub(super) fn parse_guard(items: &[Vec<u8>], family: Family) -> BTreeSet<Target> {
    let elements = items.iter().filter_map(|item| attribute(item, 3)).flat_map(attributes);
    let mut bounds: Vec<(u128, bool)> = elements
        .filter_map(|(_, element)| {
            let flags = attribute(element, 3).and_then(as_u32).unwrap_or(0);
            Some((number(parse_key(element)?), flags & INTERVAL_END == 0))
        })
        .collect();
    // Where one network ends and the next begins, the end comes first.
    bounds.sort_unstable();
    let mut nets = BTreeSet::new();
    let mut start = None;
    for (bound, begins) in bounds {
        match (begins, start) {
            (true, None) => start = Some(bound),
            (false, Some(first)) => {
                if let Some(last) = bound.checked_sub(1).filter(|last| *last >= first) {
                    split(first, last, family, &mut nets);
                }
                start = None;
            }
            _ => {}
        }
    }
    if let Some(first) = start {
        split(first, highest(family), family, &mut nets);
    }
    nets
}

/// Every network that lies in no other of them.
pub(super) fn disjoint(nets: &BTreeSet<Target>) -> BTreeSet<Target> {
    // Ascending by address and then by length, so what contains another comes right before all that it contains.
    let mut outer: Vec<Target> = Vec::new();
    for net in nets {
        if outer.last().is_none_or(|last| !last.contains(net)) {
            outer.push(*net);
        }
    }
    outer.into_iter().collect()
}

fn parse_key(element: &[u8]) -> Option<IpAddr> {
    let key = attribute(attribute(element, 1)?, 1)?;
    match key.len() {
        4 => key.first_chunk::<4>().map(|octets| IpAddr::V4(Ipv4Addr::from(*octets))),
        16 => key.first_chunk::<16>().map(|octets| IpAddr::V6(Ipv6Addr::from(*octets))),
        _ => None,
    }
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(address.to_bits()),
        IpAddr::V6(address) => address.to_bits(),
    }
}

fn highest(family: Family) -> u128 {
    match family {
        Family::V4 => u128::from(u32::MAX),
        Family::V6 => u128::MAX,
    }
}

fn address(number: u128, family: Family) -> IpAddr {
    match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::from_bits(number as u32)),
        Family::V6 => IpAddr::V6(Ipv6Addr::from_bits(number)),
    }
}

/// The first address behind a network; `None` where there is none.
fn after(net: &Target) -> Option<IpAddr> {
    let family = Family::of(net);
    let last = number(net.net().broadcast());
    (last < highest(family)).then(|| address(last + 1, family))
}

/// The fewest networks from `first` to `last`.
fn split(mut first: u128, last: u128, family: Family, nets: &mut BTreeSet<Target>) {
    let width = u32::from(Length::of_hosts(family).prefix);
    loop {
        // As wide as where it begins and where it may end allow.
        let aligned = first.trailing_zeros().min(width);
        let room = match (last - first).checked_add(1) {
            Some(count) => count.ilog2(),
            None => 128,
        };
        let free = aligned.min(room);
        nets.insert(Target::new(address(first, family), (width - free) as u8));
        let Some(next) = 1u128.checked_shl(free).and_then(|count| first.checked_add(count)) else { return };
        if next > last {
            return;
        }
        first = next;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const NOW: Timestamp = Timestamp::EPOCH;

    /// Members as a kernel keeps them: by set and key, whatever the prefix was.
    type Sets = BTreeMap<String, Vec<Vec<u8>>>;

    fn carry_out(batch: &Batch, sets: &mut Sets) {
        for (kind, message) in batch.sent() {
            let set = attribute(&message, 2).and_then(crate::backend::nftables::netlink::as_text).unwrap().to_owned();
            let members = sets.entry(set).or_default();
            let key = |message: &[u8]| {
                let element = attributes(attribute(message, 3).unwrap()).next().unwrap().1.to_vec();
                (parse_key(&element).unwrap(), attribute(&element, 3).map(<[u8]>::to_vec))
            };
            if kind == Kind::NewElement as u16 {
                assert!(!members.iter().any(|member| key(member) == key(&message)), "it stands already");
                members.push(message);
            } else if attribute(&message, 3).is_some() {
                members.retain(|member| key(member) != key(&message));
            } else {
                members.clear();
            }
        }
    }

    /// As the kernel lists it: what is left of the timeout beside it.
    fn listed(members: &[Vec<u8>]) -> Vec<Vec<u8>> {
        let mut batch = Batch::new();
        for member in members {
            let element = attributes(attribute(member, 3).unwrap()).next().unwrap().1;
            batch.push(Kind::NewElement, 0, |message| {
                message.nest(3, |list| {
                    list.nest(1, |copy| {
                        attributes(element)
                            .for_each(|(kind, value)| copy.bytes(if kind == 4 { 5 } else { kind }, value));
                    });
                });
            });
        }
        batch.sent().into_iter().map(|(_, message)| message).collect()
    }

    fn nets(family: Family) -> impl Strategy<Value = BTreeSet<Target>> {
        // Around the highest address and around another, so that networks meet and end where addresses end.
        let width = Length::of_hosts(family).prefix;
        let net = (any::<bool>(), 0u128..64, 0u8..7).prop_map(move |(top, offset, free)| {
            let base = if top { highest(family) - 63 } else { 0x0a00_0000 };
            Target::new(address(base + offset, family), width - free)
        });
        prop::collection::btree_set(net, 0..12)
    }

    fn probes(family: Family) -> impl Iterator<Item = IpAddr> {
        let near = |base: u128| (0..64).map(move |offset| address(base + offset, family));
        near(0x0a00_0000).chain(near(highest(family) - 63))
    }

    fn check_bans(bans: &BTreeMap<Target, u32>, unbanned: &BTreeSet<Target>, family: Family) {
        let mut sets = Sets::new();
        let mut batch = Batch::new();
        for (target, seconds) in bans {
            push_ban(&mut batch, target, Some(*seconds), "rule-1");
        }
        for target in unbanned {
            push_unban(&mut batch, target);
        }
        carry_out(&batch, &mut sets);
        let mut held: BTreeMap<Target, Held> = BTreeMap::new();
        for prefix in 1..=Length::of_hosts(family).prefix {
            let length = Length { family, prefix };
            if let Some(members) = sets.get(&length.set_name()) {
                held.extend(parse_bans(&listed(members), length, NOW));
            }
        }
        for probe in probes(family) {
            let wanted = bans.iter().filter(|(target, _)| !unbanned.contains(target) && target.contains_addr(probe));
            let wanted = wanted.map(|(_, seconds)| NOW.saturating_add(Duration::from_secs((*seconds).into()))).max();
            let found = held.iter().filter(|(target, _)| target.contains_addr(probe)).map(|(_, held)| held.ends).max();
            assert_eq!(found, wanted.map(Some), "{probe}");
        }
        assert!(held.values().all(|held| &*held.comment == "rule-1"));
    }

    fn check_guard(given: &BTreeSet<Target>, family: Family) {
        let mut sets = Sets::new();
        let mut batch = Batch::new();
        let apart = disjoint(given);
        push_guard(&mut batch, family, &apart);
        carry_out(&batch, &mut sets);
        let shown = parse_guard(&sets[&guard_name(family)], family);
        for probe in probes(family) {
            let covers = |nets: &BTreeSet<Target>| nets.iter().filter(|net| net.contains_addr(probe)).count();
            assert_eq!(covers(&shown), usize::from(covers(given) > 0), "{probe}");
        }
        let inside = |net: &&Target| given.iter().any(|other| other != *net && other.contains(net));
        assert!(!apart.iter().any(|net| inside(&net)));
    }

    proptest! {
        #[test]
        fn every_address_is_banned_until_the_latest_end_of_what_contains_it(
            v4 in nets(Family::V4), v6 in nets(Family::V6), gone in nets(Family::V4), seconds in 1u32..1_000_000,
        ) {
            for (family, targets) in [(Family::V4, v4), (Family::V6, v6)] {
                let end = |n: usize| 1 + (seconds.wrapping_mul(n as u32 + 1)) % 2_000_000;
                let bans = targets.iter().enumerate().map(|(n, target)| (*target, end(n))).collect();
                check_bans(&bans, &gone.intersection(&targets).copied().collect(), family);
            }
        }

        #[test]
        fn guarded_networks_are_made_disjoint_and_cover_the_same_addresses(v4 in nets(Family::V4), v6 in nets(Family::V6)) {
            check_guard(&v4, Family::V4);
            check_guard(&v6, Family::V6);
        }
    }

    #[test]
    fn a_guard_of_everything_has_no_end() {
        let halves: BTreeSet<Target> = ["0.0.0.0/1", "128.0.0.0/1"].map(|net| net.parse().unwrap()).into();
        check_guard(&halves, Family::V4);
        let mut batch = Batch::new();
        push_guard(&mut batch, Family::V4, &halves);
        assert_eq!(batch.sent().len(), 4, "a flush, two starts and one end");
    }
}
