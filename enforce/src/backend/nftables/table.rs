//! What our table holds: sets, chains and rules, as messages, and as the kernel shows them.
//!
//! Bans of one prefix length are a hash set of their own, `bans-v4-32`, `bans-v4-24`, `bans-v6-64`, ...: a packet's source
//! is looked up in each, cut to that length. So no two bans ever overlap in a set, whatever the bans are, each keeps its
//! own end and rule, and adding or removing one costs the same whatever else stands. Only guarded networks, which are
//! disjoint and seldom change, are an interval set. They are looked at for packets of banned clients only.

use std::collections::BTreeSet;

use crate::backend::nftables::netlink::{APPEND, Attributes, Batch, CREATE, Kind, as_text, as_u32, as_u64, attribute};
use crate::config::{Ports, Protocol};
use crate::plan::Family;

/// Our table, of family `inet`.
pub(super) const TABLE: &str = "portcullis";
/// Looks up sources.
const PREROUTING: &str = "prerouting";
/// Decides about packets of banned clients.
const BANNED: &str = "banned";
/// Counts what is dropped; it survives our rules.
const DROPPED: &str = "dropped";
/// As the table `raw` of iptables: before connection tracking, so open connections are cut as well.
const PRIORITY: i32 = -300;
/// Milliseconds between sweeps of ended bans, which match nothing any more.
const SWEEP_MS: u32 = 10_000;

const HOOK_PREROUTING: u32 = 0;
const SET_INTERVAL: u32 = 4;
const SET_TIMEOUT: u32 = 16;
const OBJECT_COUNTER: u32 = 1;
const REGISTER: u32 = 1;
const REGISTER_VERDICT: u32 = 0;
const VERDICT_DROP: i32 = 0;
const VERDICT_GOTO: i32 = -4;
const VERDICT_RETURN: i32 = -5;

/// Bans of one prefix length, which have a set of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Length {
    pub(super) family: Family,
    pub(super) prefix: u8,
}

impl Length {
    /// Of single addresses. Its set is there as long as the family's bans are.
    pub(super) fn of_hosts(family: Family) -> Self {
        Self { family, prefix: bits(family) }
    }

    pub(super) fn is_of_hosts(self) -> bool {
        self.prefix == bits(self.family)
    }

    /// The name of its set.
    pub(super) fn set_name(self) -> String {
        format!("bans-{}-{}", short(self.family), self.prefix)
    }

    fn parse(name: &str) -> Option<Self> {
        let (family, prefix) = name.strip_prefix("bans-")?.split_once('-')?;
        let family = Family::ALL.into_iter().find(|known| short(*known) == family)?;
        let length = Self { family, prefix: prefix.parse().ok()? };
        ((1..=bits(family)).contains(&length.prefix) && length.set_name() == name).then_some(length)
    }
}

/// The name of the family's set of guarded networks.
pub(super) fn guard_name(family: Family) -> String {
    format!("guard-{}", short(family))
}

/// A set, as people find it with `nft list set`.
pub(super) fn describe_set(length: Length) -> String {
    format!("{} of table inet {TABLE}", length.set_name())
}

fn short(family: Family) -> &'static str {
    match family {
        Family::V4 => "v4",
        Family::V6 => "v6",
    }
}

fn bits(family: Family) -> u8 {
    match family {
        Family::V4 => 32,
        Family::V6 => 128,
    }
}

/// Key type and length of nft, `NFPROTO_*`, and where the source stands in the header.
fn address(family: Family) -> (u32, u32, u8, u32) {
    match family {
        Family::V4 => (7, 4, 2, 12),
        Family::V6 => (8, 16, 10, 8),
    }
}

/// The sets that our table is to have, or has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Sets {
    pub(super) guards: BTreeSet<Family>,
    pub(super) bans: BTreeSet<Length>,
}

impl Sets {
    /// Whether it lacks some of `others`.
    pub(super) fn lacks(&self, others: &Self) -> bool {
        !self.guards.is_superset(&others.guards) || !self.bans.is_superset(&others.bans)
    }
}

/// What was found of our table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Found {
    /// Sets as we make them.
    pub(super) sets: Sets,
    /// Names of other sets.
    pub(super) others: Vec<String>,
}

impl Found {
    /// From the attributes of each set.
    pub(super) fn parse(sets: &[Vec<u8>]) -> Self {
        let mut found = Self::default();
        for set in sets {
            let ours = is_ours(set).then(|| attribute(set, 2)).flatten();
            let Some(name) = ours.and_then(as_text) else { continue };
            let number = |kind| attribute(set, kind).and_then(as_u32);
            let (flags, key) = (number(3).unwrap_or(0), number(5));
            let guard = Family::ALL.into_iter().find(|family| guard_name(*family) == name);
            let is = |family: Family, wanted: u32| flags == wanted && key == Some(address(family).1);
            match (guard, Length::parse(name)) {
                (Some(family), _) if is(family, SET_INTERVAL) => drop(found.sets.guards.insert(family)),
                (_, Some(length)) if is(length.family, SET_TIMEOUT) => drop(found.sets.bans.insert(length)),
                _ => found.others.push(name.to_owned()),
            }
        }
        found
    }
}

/// Table, chains, the counter, these sets, and rules for them. What is there stays; rules are made anew; members are not
/// touched. All of it is in force at once.
pub(super) fn push_structure(batch: &mut Batch, found: &Found, wanted: &Sets, ports: (&[Ports], &[Ports])) {
    push_table(batch, TABLE);
    for chain in [BANNED, PREROUTING] {
        batch.push(Kind::DelRule, 0, |message| {
            message.text(1, TABLE);
            message.text(2, chain);
        });
    }
    let stale = found.sets.bans.difference(&wanted.bans).map(|length| length.set_name());
    for name in found.others.iter().cloned().chain(stale) {
        batch.push(Kind::DelSet, 0, |message| {
            message.text(1, TABLE);
            message.text(2, &name);
        });
    }
    for family in wanted.guards.iter().filter(|family| !found.sets.guards.contains(family)) {
        push_set(batch, (TABLE, &guard_name(*family)), *family, SET_INTERVAL);
    }
    for length in wanted.bans.difference(&found.sets.bans) {
        push_set(batch, (TABLE, &length.set_name()), length.family, SET_TIMEOUT);
    }
    push_rules(batch, TABLE, &rules(wanted, ports));
}

fn push_rules(batch: &mut Batch, table: &str, rules: &[Rule]) {
    for (chain, comment, expressions) in rules {
        batch.push(Kind::NewRule, CREATE | APPEND, |message| {
            message.text(1, table);
            message.text(2, chain);
            message.nest(4, |list| expressions.iter().for_each(|expression| expression.write(list)));
            message.bytes(7, &render_comment(comment));
        });
    }
}

fn push_table(batch: &mut Batch, table: &str) {
    batch.push(Kind::NewTable, CREATE, |message| {
        message.text(1, table);
        message.u32(2, 0);
    });
    batch.push(Kind::NewChain, CREATE, |message| {
        message.text(1, table);
        message.text(3, BANNED);
    });
    batch.push(Kind::NewChain, CREATE, |message| {
        message.text(1, table);
        message.text(3, PREROUTING);
        message.nest(4, |hook| {
            hook.u32(1, HOOK_PREROUTING);
            hook.u32(2, PRIORITY as u32);
        });
        message.text(7, "filter");
    });
    batch.push(Kind::NewObject, CREATE, |message| {
        message.text(1, table);
        message.text(2, DROPPED);
        message.u32(3, OBJECT_COUNTER);
        message.nest(4, |counter| {
            counter.u64(1, 0);
            counter.u64(2, 0);
        });
    });
}

fn push_set(batch: &mut Batch, (table, name): (&str, &str), family: Family, flags: u32) {
    let (key_type, key_bytes, ..) = address(family);
    batch.push(Kind::NewSet, CREATE, |message| {
        message.text(1, table);
        message.text(2, name);
        message.u32(3, flags);
        message.u32(4, key_type);
        message.u32(5, key_bytes);
        // Only for references within a batch, which we make by name.
        message.u32(10, 1);
        if flags == SET_TIMEOUT {
            message.u32(12, SWEEP_MS);
        }
        // Tells the program nft that keys are in network order.
        message.bytes(13, &[&[0, 4][..], &2u32.to_ne_bytes()].concat());
    });
}

/// A table with a set and a rule such as ours, and its removal.
pub(super) fn push_probe(batch: &mut Batch) {
    const PROBE: &str = "portcullis-probe";
    let length = Length { family: Family::V4, prefix: 24 };
    let sets = Sets { guards: [Family::V4].into(), bans: [length].into() };
    push_table(batch, PROBE);
    push_set(batch, (PROBE, &guard_name(Family::V4)), Family::V4, SET_INTERVAL);
    push_set(batch, (PROBE, &length.set_name()), Family::V4, SET_TIMEOUT);
    push_rules(batch, PROBE, &rules(&sets, (&[], &[])));
    batch.push(Kind::DelTable, 0, |message| message.text(1, PROBE));
}

/// Removes our table and all in it.
pub(super) fn push_removal(batch: &mut Batch) {
    batch.push(Kind::DelTable, 0, |message| message.text(1, TABLE));
}

/// Asks for everything of a kind in our table.
pub(super) fn ask_table(message: &mut Attributes<'_>) {
    message.text(1, TABLE);
}

/// Asks for our counter.
pub(super) fn ask_counter(message: &mut Attributes<'_>) {
    message.text(1, TABLE);
    message.text(2, DROPPED);
    message.u32(3, OBJECT_COUNTER);
}

/// Packets and bytes of our counter.
pub(super) fn parse_counter(object: &[u8]) -> (u64, u64) {
    let counter = attribute(object, 4).unwrap_or_default();
    let number = |kind| attribute(counter, kind).and_then(as_u64).unwrap_or(0);
    (number(2), number(1))
}

/// Whether an item of a dump lies in our table.
pub(super) fn is_ours(item: &[u8]) -> bool {
    attribute(item, 1).and_then(as_text) == Some(TABLE)
}

/// A rule as the kernel shows it: its chain, comment and expressions.
pub(super) fn parse_rule(rule: &[u8]) -> Shown {
    show(rule, [2, 7, 4])
}

/// A chain as the kernel shows it: its name, hook and policy.
pub(super) fn parse_chain(chain: &[u8]) -> Shown {
    show(chain, [3, 4, 5])
}

/// A table as the kernel shows it: its name and flags.
pub(super) fn parse_table(table: &[u8]) -> Shown {
    show(table, [1, 2, 2])
}

/// Parts of something that are compared with what they were.
pub(super) type Shown = [Vec<u8>; 3];

fn show(item: &[u8], parts: [u16; 3]) -> Shown {
    parts.map(|kind| attribute(item, kind).unwrap_or_default().to_vec())
}

/// A comment as nft keeps it: its kind, its length, and the text with a zero.
pub(super) fn render_comment(text: &str) -> Vec<u8> {
    let text = &text.as_bytes()[..text.len().min(127)];
    [&[0, text.len() as u8 + 1][..], text, &[0]].concat()
}

/// The text of such a comment.
pub(super) fn parse_comment(data: &[u8]) -> Option<&str> {
    match data {
        [0, length, rest @ ..] => rest.get(..usize::from(*length)).and_then(as_text),
        _ => None,
    }
}

/// An expression of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Expression {
    /// The packet's family is this `NFPROTO_*`.
    Family(u8),
    /// Its transport protocol is this.
    Transport(u8),
    /// Loads so many bytes at this offset of the network header.
    Network(u32, u32),
    /// Loads the destination port.
    DestinationPort,
    /// Cuts what is loaded with this mask.
    Mask(Vec<u8>),
    /// What is loaded compares so.
    Compare(u32, Vec<u8>),
    /// What is loaded is in this set.
    In(String),
    /// Counts.
    Count,
    /// Decides, and where to go on.
    Verdict(i32, Option<&'static str>),
}

const EQUAL: u32 = 0;
const AT_MOST: u32 = 3;
const AT_LEAST: u32 = 5;

impl Expression {
    fn write(&self, list: &mut Attributes<'_>) {
        let named = |list: &mut Attributes<'_>, name: &str, write: &dyn Fn(&mut Attributes<'_>)| {
            list.nest(1, |expression| {
                expression.text(1, name);
                expression.nest(2, |data| write(data));
            });
        };
        let compare = |list: &mut Attributes<'_>, how: u32, value: &[u8]| {
            named(list, "cmp", &|data| {
                data.u32(1, REGISTER);
                data.u32(2, how);
                data.nest(3, |inner| inner.bytes(1, value));
            });
        };
        // NFT_META_NFPROTO and NFT_META_L4PROTO.
        let meta = |list: &mut Attributes<'_>, key: u32, value: u8| {
            named(list, "meta", &|data| {
                data.u32(1, REGISTER);
                data.u32(2, key);
            });
            compare(list, EQUAL, &[value]);
        };
        // The network header is 1, the transport header 2.
        let load = |list: &mut Attributes<'_>, base: u32, offset: u32, bytes: u32| {
            named(list, "payload", &|data| {
                data.u32(1, REGISTER);
                data.u32(2, base);
                data.u32(3, offset);
                data.u32(4, bytes);
            });
        };
        match self {
            Self::Family(family) => meta(list, 15, *family),
            Self::Transport(protocol) => meta(list, 16, *protocol),
            Self::Network(offset, bytes) => load(list, 1, *offset, *bytes),
            Self::DestinationPort => load(list, 2, 2, 2),
            Self::Mask(mask) => named(list, "bitwise", &|data| {
                data.u32(1, REGISTER);
                data.u32(2, REGISTER);
                data.u32(3, mask.len() as u32);
                data.nest(4, |inner| inner.bytes(1, mask));
                data.nest(5, |inner| inner.bytes(1, &vec![0; mask.len()]));
            }),
            Self::Compare(how, value) => compare(list, *how, value),
            Self::In(set) => named(list, "lookup", &|data| {
                data.text(1, set);
                data.u32(2, REGISTER);
            }),
            Self::Count => named(list, "objref", &|data| {
                data.u32(1, OBJECT_COUNTER);
                data.text(2, DROPPED);
            }),
            Self::Verdict(code, chain) => named(list, "immediate", &|data| {
                data.u32(1, REGISTER_VERDICT);
                data.nest(2, |inner| {
                    inner.nest(2, |verdict| {
                        verdict.u32(1, *code as u32);
                        chain.iter().for_each(|chain| verdict.text(2, chain));
                    });
                });
            }),
        }
    }
}

type Rule = (&'static str, String, Vec<Expression>);

/// All rules, in order, each with the comment that names it.
fn rules(sets: &Sets, (ports, spare): (&[Ports], &[Ports])) -> Vec<Rule> {
    let mut rules: Vec<Rule> = Vec::new();
    let returns = Expression::Verdict(VERDICT_RETURN, None);
    let drops = [Expression::Count, Expression::Verdict(VERDICT_DROP, None)];
    for &family in &sets.guards {
        let mut expressions = load_source(family);
        expressions.extend([Expression::In(guard_name(family)), returns.clone()]);
        rules.push((BANNED, format!("{}: never banned", family.as_str()), expressions));
    }
    for range in spare {
        let mut expressions = match_ports(range);
        expressions.push(returns.clone());
        rules.push((BANNED, format!("spare {}", render_ports(range)), expressions));
    }
    for range in ports {
        let mut expressions = match_ports(range);
        expressions.extend(drops.clone());
        rules.push((BANNED, format!("ban from {}", render_ports(range)), expressions));
    }
    if ports.is_empty() {
        rules.push((BANNED, "ban".to_owned(), drops.to_vec()));
    }
    // The longest prefix first: most bans are of addresses. Where no guard stands, as when somebody removed our table, nobody
    // is banned until it is back.
    let guarded = |length: &&Length| sets.guards.contains(&length.family);
    for &length in sets.bans.iter().rev().filter(guarded) {
        let mut expressions = load_source(length.family);
        if !length.is_of_hosts() {
            expressions.push(Expression::Mask(mask(length)));
        }
        let go = Expression::Verdict(VERDICT_GOTO, Some(BANNED));
        expressions.extend([Expression::In(length.set_name()), go]);
        rules.push((PREROUTING, format!("{} /{}", length.family.as_str(), length.prefix), expressions));
    }
    rules
}

fn load_source(family: Family) -> Vec<Expression> {
    let (_, bytes, protocol, offset) = address(family);
    vec![Expression::Family(protocol), Expression::Network(offset, bytes)]
}

fn mask(length: Length) -> Vec<u8> {
    match length.family {
        Family::V4 => (u32::MAX << (32 - length.prefix)).to_be_bytes().to_vec(),
        Family::V6 => (u128::MAX << (128 - length.prefix)).to_be_bytes().to_vec(),
    }
}

fn match_ports(ports: &Ports) -> Vec<Expression> {
    let protocol = match ports.protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => 17,
    };
    let bounds = if ports.first == ports.last {
        vec![Expression::Compare(EQUAL, ports.first.to_be_bytes().to_vec())]
    } else {
        vec![
            Expression::Compare(AT_LEAST, ports.first.to_be_bytes().to_vec()),
            Expression::Compare(AT_MOST, ports.last.to_be_bytes().to_vec()),
        ]
    };
    [vec![Expression::Transport(protocol), Expression::DestinationPort], bounds].concat()
}

fn render_ports(ports: &Ports) -> String {
    let range = if ports.first == ports.last { String::new() } else { format!("-{}", ports.last) };
    format!("{}/{}{range}", ports.protocol.as_str(), ports.first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_of_ours_are_told_from_others() {
        let mut batch = Batch::new();
        let length = Length { family: Family::V6, prefix: 64 };
        push_set(&mut batch, (TABLE, &length.set_name()), Family::V6, SET_TIMEOUT);
        push_set(&mut batch, (TABLE, &guard_name(Family::V4)), Family::V4, SET_INTERVAL);
        for (name, family, flags) in [
            ("bans-v4-32", Family::V6, SET_TIMEOUT),
            ("bans-v4-33", Family::V4, SET_TIMEOUT),
            ("bans-v4-024", Family::V4, SET_TIMEOUT),
        ] {
            push_set(&mut batch, (TABLE, name), family, flags);
        }
        push_set(&mut batch, ("other", "bans-v4-24"), Family::V4, SET_TIMEOUT);
        let items: Vec<Vec<u8>> = batch.sent().into_iter().map(|(_, message)| message).collect();
        let found = Found::parse(&items);
        assert_eq!(found.sets, Sets { guards: [Family::V4].into(), bans: [length].into() });
        assert_eq!(found.others, ["bans-v4-32", "bans-v4-33", "bans-v4-024"]);
    }

    #[test]
    fn the_guard_and_spared_ports_come_before_what_drops() {
        let tcp = |first, last| Ports { protocol: Protocol::Tcp, first, last };
        let sets = Sets {
            guards: Family::ALL.into(),
            bans: [Length::of_hosts(Family::V4), Length { family: Family::V4, prefix: 24 }].into(),
        };
        let rules = rules(&sets, (&[tcp(80, 90)], &[tcp(22, 22)]));
        let names: Vec<(&str, &str)> = rules.iter().map(|(chain, comment, _)| (*chain, comment.as_str())).collect();
        let expected = [
            (BANNED, "ipv4: never banned"),
            (BANNED, "ipv6: never banned"),
            (BANNED, "spare tcp/22"),
            (BANNED, "ban from tcp/80-90"),
            (PREROUTING, "ipv4 /32"),
            (PREROUTING, "ipv4 /24"),
        ];
        assert_eq!(names, expected);
        assert!(rules[5].2.contains(&Expression::Mask(vec![255, 255, 255, 0])));
        let unguarded = Sets { guards: [Family::V6].into(), ..sets };
        assert_eq!(super::rules(&unguarded, (&[], &[])).len(), 2, "bans without a guard");
        assert!(!rules[4].2.iter().any(|expression| matches!(expression, Expression::Mask(_))));
        assert_eq!(mask(Length { family: Family::V6, prefix: 1 })[..2], [128, 0]);
    }

    #[test]
    fn comments_are_read_as_they_are_written() {
        assert_eq!(parse_comment(&render_comment("forceful-browsing")), Some("forceful-browsing"));
        assert_eq!(render_comment(&"x".repeat(300)).len(), 130);
        assert_eq!(parse_comment(&[1, 1, 0]), None);
    }
}
