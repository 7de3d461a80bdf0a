//! Our chains that refuse forwarded clients, and the jumps to the first of them: what they should be, and the lines that
//! make what iptables shows so. Pure.
//!
//! All chains are made anew in one transaction, so there is no moment without them. Rules are written as `iptables-save`
//! prints them, which is how drift is seen.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use proto::time::Timestamp;

use crate::config::{ChainRef, FORWARDED_CHAIN, ForwardedForConfig, Table};
use crate::forwarded::claims::Choice;
use crate::forwarded::spelling::{SHARED_BYTES, list_gate};
use crate::forwarded::tree::{Found, Tree};
use crate::plan::rules::{Lifts, View, could_accept, leads_to_forwarded};
use crate::plan::{Family, shift};

/// Until then iptables can tell the time: 2038-01-19T03:14:07Z less a day. Later ends are not written into rules.
const LAST_END: Timestamp = Timestamp::from_secs(0x7fff_ffff - 86_400);

/// What our part of one family's rules should be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Chains that jump to ours.
    pub(crate) places: Vec<ChainRef>,
    /// Configured chains that do not exist.
    pub(crate) missing: Vec<ChainRef>,
    chains: BTreeMap<String, Vec<String>>,
    jump: String,
}

/// Lines for `iptables-restore`, and what they leave undone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// In table filter; none when nothing differs.
    pub(crate) lines: Vec<String>,
    /// Whether our chains, and not only jumps to them, differ.
    pub(crate) rewrites: bool,
    /// Chains in which a rule that could accept stays above ours, because we have moved up too often.
    pub(crate) overtaken: Vec<ChainRef>,
}

/// The searches for everybody in `choice`. A ban's end is that of the host's clock, `skew_ms` ahead of ours.
pub(crate) fn tree(choice: &Choice, skew_ms: i64) -> Tree<Option<Timestamp>> {
    let (mut anywhere, mut beside_list) = (BTreeMap::new(), BTreeMap::new());
    for (_, claim, patterns) in &choice.refused {
        let end = claim.ends.map_or(Timestamp::MAX, |end| shift(end, skew_ms));
        for (into, list) in [(&mut anywhere, &patterns.anywhere), (&mut beside_list, &patterns.beside_list)] {
            for pattern in list {
                let longest = into.entry(pattern.clone()).or_insert(end);
                *longest = end.max(*longest);
            }
        }
    }
    let written = |ends: BTreeMap<String, Timestamp>| {
        ends.into_iter().map(|(pattern, end)| (pattern, Some(end).filter(|end| *end <= LAST_END))).collect()
    };
    let mut tree = Tree::new();
    tree.grow(written(anywhere), SHARED_BYTES);
    tree.grow_behind(&list_gate(), written(beside_list));
    tree
}

impl Layout {
    /// For a family whose rules are `view`.
    pub(crate) fn new(
        config: &ForwardedForConfig,
        family: Family,
        view: &View,
        tree: &Tree<Option<Timestamp>>,
    ) -> Self {
        let configured = config.chains.iter().map(|chain| ChainRef::new(Table::Filter, chain));
        // Built-in chains come with their table, which comes with its first use.
        let built_in = |place: &ChainRef| place.is_built_in() || place.chain == "OUTPUT";
        let (places, missing) = configured.partition(|place| view.has(place) || built_in(place));
        let name = |chain: usize| match chain {
            0 => FORWARDED_CHAIN.to_owned(),
            chain => format!("{FORWARDED_CHAIN}-{chain}"),
        };
        let mut chains = BTreeMap::new();
        for (number, searches) in tree.0.iter().enumerate() {
            let rules = searches.iter().map(|(pattern, found)| render(pattern, found, name));
            let short = (number == 0).then(|| render_short(searches, family)).flatten();
            chains.insert(name(number), short.into_iter().chain(rules).collect());
        }
        Self { places, missing, chains, jump: render_jump(config) }
    }

    /// Rules in all chains of ours.
    pub(crate) fn rules(&self) -> usize {
        self.chains.values().map(Vec::len).sum()
    }
}

/// Packets too short for any of the patterns, most of which acknowledge others, are let through first.
fn render_short(searches: &[(String, Found<Option<Timestamp>>)], family: Family) -> Option<String> {
    let shortest = searches.iter().map(|(pattern, _)| pattern.len()).min()?;
    let headers = match family {
        Family::V4 => 20 + 20,
        Family::V6 => 40 + 20,
    };
    Some(format!("-m length --length 0:{} -j RETURN", headers + shortest - 1))
}

fn render(pattern: &str, found: &Found<Option<Timestamp>>, name: impl Fn(usize) -> String) -> String {
    let search = format!("-p tcp -m string {} --algo bm --icase", render_pattern(pattern));
    match found {
        Found::Branch(chain) => format!("{search} -j {}", name(*chain)),
        Found::Leaf(end) => {
            let until = end.map(render_end).unwrap_or_default();
            format!("{search}{until} -j REJECT --reject-with tcp-reset")
        }
    }
}

/// As iptables prints it: all in hexadecimal as soon as one byte is not printable.
fn render_pattern(pattern: &str) -> String {
    if pattern.bytes().all(|b| b == b' ' || b.is_ascii_graphic()) {
        return format!("--string \"{pattern}\"");
    }
    let mut text = "--hex-string \"|".to_owned();
    for byte in pattern.bytes() {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text + "|\""
}

/// A ban ends by itself when we are down: the rule holds up to the last second that begins before its end.
fn render_end(end: Timestamp) -> String {
    let last = end.saturating_sub(std::time::Duration::from_nanos(1)).to_string();
    format!(" -m time --datestop {}", &last[..19])
}

/// With ports the direction is known; without, connection tracking tells it, and answers are let through.
fn render_jump(config: &ForwardedForConfig) -> String {
    let mut jump = String::new();
    for (option, interface) in [("-i", &config.in_interface), ("-o", &config.out_interface)] {
        if let Some(interface) = interface {
            let _ = write!(jump, "{option} {interface} ");
        }
    }
    let ports = config.ports.iter().map(
        |(first, last)| {
            if first == last { first.to_string() } else { format!("{first}:{last}") }
        },
    );
    let ports = ports.collect::<Vec<_>>().join(",");
    let direction = match ports.as_str() {
        "" => "-m conntrack --ctdir ORIGINAL".to_owned(),
        ports => format!("-m multiport --dports {ports}"),
    };
    format!("{jump}-p tcp {direction} -j {FORWARDED_CHAIN}")
}

/// From `view` to `layout`; the chains themselves stay as they are unless `may_rewrite`. Chains are whole before anything
/// jumps to them.
pub(crate) fn plan(layout: &Layout, view: &View, may_rewrite: bool, (lifts, now): (&mut Lifts, Timestamp)) -> Plan {
    let mut plan = Plan::default();
    if layout.places.is_empty() {
        return Plan { lines: plan_removal(view), ..plan };
    }
    let there = ours(view);
    let differ = there.len() != layout.chains.len()
        || layout.chains.iter().any(|(chain, rules)| there.get(chain.as_str()) != Some(&rules));
    if differ && !may_rewrite && !there.contains_key(FORWARDED_CHAIN) {
        return plan;
    }
    plan.rewrites = differ && may_rewrite;
    if plan.rewrites {
        // Naming a chain makes or empties it.
        let stale = there.keys().filter(|chain| !layout.chains.contains_key(**chain));
        plan.lines.extend(
            layout
                .chains
                .keys()
                .map(String::as_str)
                .chain(stale.clone().copied())
                .map(|chain| format!(":{chain} - [0:0]")),
        );
        for (chain, rules) in &layout.chains {
            plan.lines.extend(rules.iter().map(|rule| format!("-A {chain} {rule}")));
        }
        plan.lines.extend(stale.map(|chain| format!("-X {chain}")));
    }
    for place in &layout.places {
        plan_jump(layout, view, place, (lifts, now), &mut plan);
    }
    let keep: BTreeSet<&str> = layout.places.iter().map(|place| place.chain.as_str()).collect();
    plan.lines.extend(plan_unjumps(view, |chain| keep.contains(chain)));
    plan
}

fn plan_jump(layout: &Layout, view: &View, place: &ChainRef, (lifts, now): (&mut Lifts, Timestamp), plan: &mut Plan) {
    let none = Vec::new();
    let rules = view.rules(place).unwrap_or(&none);
    let jumps: Vec<&String> = rules.iter().filter(|rule| leads_to_forwarded(rule)).collect();
    let is_right = jumps.len() == 1 && *jumps[0] == layout.jump;
    let above = rules.iter().take_while(|rule| !leads_to_forwarded(rule));
    if is_right {
        if !above.into_iter().any(|rule| could_accept(rule)) {
            return;
        }
        if !lifts.allow(place, now) {
            plan.overtaken.push(place.clone());
            return;
        }
    }
    plan.lines.extend(jumps.iter().map(|jump| format!("-D {} {jump}", place.chain)));
    plan.lines.push(format!("-I {} 1 {}", place.chain, layout.jump));
}

/// Removes all that is ours.
pub(crate) fn plan_removal(view: &View) -> Vec<String> {
    let chains = ours(view);
    let mut lines: Vec<String> = plan_unjumps(view, |_| false).collect();
    // They jump to each other, so all are emptied first.
    lines.extend(chains.keys().map(|chain| format!("-F {chain}")));
    lines.extend(chains.keys().map(|chain| format!("-X {chain}")));
    lines
}

/// What [`plan_removal`] removes, for people.
pub(crate) fn describe_removal(view: &View) -> Vec<String> {
    let jumps = plan_unjumps(view, |_| false);
    let chain_of = |jump: String| jump.split(' ').nth(1).unwrap_or_default().to_owned();
    let jumps = jumps.map(|jump| format!("the jump from {}", chain_of(jump)));
    let chains = ours(view).into_iter().map(|(chain, rules)| format!("chain {chain} with {} rules", rules.len()));
    jumps.chain(chains).collect()
}

fn plan_unjumps(view: &View, keep: impl Fn(&str) -> bool) -> impl Iterator<Item = String> {
    let filter = view.tables.get(&Table::Filter).into_iter().flatten();
    let foreign = filter.filter(move |(chain, _)| !chain.starts_with(FORWARDED_CHAIN) && !keep(chain));
    foreign.flat_map(|(chain, rules)| {
        rules.iter().filter(|rule| leads_to_forwarded(rule)).map(move |jump| format!("-D {chain} {jump}"))
    })
}

fn ours(view: &View) -> BTreeMap<&str, &Vec<String>> {
    let filter = view.tables.get(&Table::Filter).into_iter().flatten();
    filter
        .filter(|(chain, _)| chain.starts_with(FORWARDED_CHAIN))
        .map(|(chain, rules)| (chain.as_str(), rules))
        .collect()
}

/// Whether there is no chain of ours.
pub(crate) fn is_absent(view: &View) -> bool {
    ours(view).is_empty()
}

/// Whether no chain of ours refuses anybody.
pub(crate) fn is_blank(view: &View) -> bool {
    ours(view).values().all(|rules| rules.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::forwarded::claims::Claim;
    use crate::forwarded::spelling::Patterns;

    fn choice(config: &ForwardedForConfig, targets: &[&str]) -> Choice {
        let refused = targets.iter().map(|target| {
            let target = target.parse().unwrap();
            let claim = Claim { ends: Timestamp::parse("2026-12-01T10:11:12.5Z"), since: Timestamp::EPOCH };
            (target, claim, Patterns::of(&target, config).unwrap())
        });
        Choice { refused: refused.collect(), ..Choice::default() }
    }

    fn layout(config: &ForwardedForConfig, targets: &[&str], view: &View) -> Layout {
        Layout::new(config, Family::V4, view, &tree(&choice(config, targets), 0))
    }

    fn plan_of(layout: &Layout, view: &View, may_rewrite: bool) -> Plan {
        plan(layout, view, may_rewrite, (&mut Lifts::default(), Timestamp::EPOCH))
    }

    /// What `iptables-save` shows after `lines`, of which it knows those that we write.
    fn restore(view: &View, lines: &[String]) -> View {
        let mut view = view.clone();
        let filter = view.tables.entry(Table::Filter).or_default();
        for line in lines {
            let words: Vec<&str> = line.splitn(3, ' ').collect();
            match words[..] {
                ["-A", chain, rule] => filter.get_mut(chain).unwrap().push(rule.to_owned()),
                ["-I", chain, rule] => {
                    filter.get_mut(chain).unwrap().insert(0, rule.strip_prefix("1 ").unwrap().to_owned());
                }
                ["-D", chain, rule] => {
                    let rules = filter.get_mut(chain).unwrap();
                    let index = rules.iter().position(|there| there == rule).unwrap();
                    rules.remove(index);
                }
                ["-F", chain] => filter.get_mut(chain).unwrap().clear(),
                ["-X", chain] => {
                    assert!(filter.remove(chain).unwrap().is_empty(), "{chain} is not empty");
                    let jump = format!("-j {chain}");
                    assert!(!filter.values().flatten().any(|rule| rule.ends_with(&jump)), "{chain} is in use");
                }
                [chain, ..] => drop(filter.insert(chain.strip_prefix(':').unwrap().to_owned(), Vec::new())),
                [] => panic!("an empty line"),
            }
        }
        view
    }

    fn docker() -> View {
        View::parse("*filter\n:INPUT ACCEPT [0:0]\n:DOCKER-USER - [0:0]\n[0:0] -A DOCKER-USER -j RETURN\nCOMMIT\n")
    }

    #[test]
    fn rules_are_written_as_iptables_prints_them() {
        let (config, view) = (ForwardedForConfig::default(), docker());
        let lines = plan_of(&layout(&config, &["192.0.2.1", "198.51.100.0/24"], &view), &view, true).lines;
        let expected = [
            ":PORTCULLIS-FWD - [0:0]",
            "-A PORTCULLIS-FWD -m length --length 0:68 -j RETURN",
            "-A PORTCULLIS-FWD -p tcp -m string --hex-string \"|0d0a43662d436f6e6e656374696e672d49703a203139322e302e322e310d0a|\" \
             --algo bm --icase -m time --datestop 2026-12-01T10:11:12 -j REJECT --reject-with tcp-reset",
            "-A PORTCULLIS-FWD -p tcp -m string --hex-string \"|0d0a43662d436f6e6e656374696e672d49703a203139382e35312e3130302e|\" \
             --algo bm --icase -m time --datestop 2026-12-01T10:11:12 -j REJECT --reject-with tcp-reset",
        ];
        assert_eq!(lines[..4], expected);
        assert_eq!(lines.last().unwrap(), "-I DOCKER-USER 1 -p tcp -m conntrack --ctdir ORIGINAL -j PORTCULLIS-FWD");
        let narrow = ForwardedForConfig {
            ports: vec![(80, 80), (8000, 8010)],
            in_interface: Some("br-+".to_owned()),
            out_interface: Some("br0".to_owned()),
            ..config
        };
        let jump = "-i br-+ -o br0 -p tcp -m multiport --dports 80,8000:8010 -j PORTCULLIS-FWD";
        assert_eq!(render_jump(&narrow), jump);
    }

    #[test]
    fn planning_twice_plans_nothing_and_removal_leaves_what_was() {
        let mut view = docker();
        let (start, config) = (view.clone(), ForwardedForConfig { whole_list: true, ..ForwardedForConfig::default() });
        let many: Vec<String> = (0..60).map(|n| format!("192.0.2.{n}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        for targets in [&many[..3], &many, &many[50..], &[]] {
            let layout = layout(&config, targets, &view);
            let plan = plan_of(&layout, &view, true);
            assert!(plan.rewrites, "{targets:?}");
            view = restore(&view, &plan.lines);
            assert_eq!(plan_of(&layout, &view, true), Plan::default());
            assert_eq!(is_blank(&view), targets.is_empty());
        }
        assert_eq!(restore(&view, &plan_removal(&view)), start);
    }

    #[test]
    fn what_is_in_force_stays_until_it_may_be_rewritten() {
        let (config, view) = (ForwardedForConfig::default(), docker());
        let before = restore(&view, &plan_of(&layout(&config, &["192.0.2.1"], &view), &view, true).lines);
        let nobody = layout(&config, &[], &before);
        assert_eq!(plan_of(&nobody, &before, false), Plan::default());
        assert_eq!(plan_of(&nobody, &view, false), Plan::default(), "an empty chain is of no use");
        let unjumped = restore(&before, &["-D DOCKER-USER ".to_owned() + &nobody.jump]);
        assert_eq!(plan_of(&nobody, &unjumped, false).lines, [format!("-I DOCKER-USER 1 {}", nobody.jump)]);
    }

    #[test]
    fn the_jump_moves_above_what_could_accept_and_leaves_chains_that_are_not_meant_any_more() {
        let config = ForwardedForConfig {
            chains: vec!["DOCKER-USER".to_owned(), "X".to_owned()],
            ..ForwardedForConfig::default()
        };
        let view = docker();
        let first = layout(&config, &["192.0.2.1"], &view);
        assert_eq!(first.missing, [ChainRef::new(Table::Filter, "X")]);
        let mut view = restore(&view, &plan_of(&first, &view, true).lines);
        let filter = view.tables.get_mut(&Table::Filter).unwrap();
        filter.get_mut("DOCKER-USER").unwrap().insert(0, "-j PORTCULLIS".to_owned());
        filter.get_mut("INPUT").unwrap().push("-p tcp -j PORTCULLIS-FWD".to_owned());
        let lines = plan_of(&first, &view, true).lines;
        assert_eq!(lines, ["-D INPUT -p tcp -j PORTCULLIS-FWD"], "our other chain above ours is no harm");
        view = restore(&view, &lines);
        let accept = "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT".to_owned();
        view.tables.get_mut(&Table::Filter).unwrap().get_mut("DOCKER-USER").unwrap().insert(0, accept);
        let mut lifts = Lifts::default();
        for _ in 0..3 {
            let lifted = plan(&first, &view, true, (&mut lifts, Timestamp::EPOCH));
            assert_eq!(
                lifted.lines,
                [format!("-D DOCKER-USER {}", first.jump), format!("-I DOCKER-USER 1 {}", first.jump)]
            );
        }
        assert_eq!(plan(&first, &view, true, (&mut lifts, Timestamp::EPOCH)).overtaken.len(), 1);
    }

    #[test]
    fn an_end_is_that_of_the_hosts_clock_and_one_beyond_its_reach_is_not_written() {
        let second = |text: &str| Timestamp::parse(text).unwrap();
        assert_eq!(render_end(second("2026-12-01T00:00:00Z")), " -m time --datestop 2026-11-30T23:59:59");
        assert_eq!(shift(second("2026-12-01T00:00:00Z"), -1500), second("2026-11-30T23:59:58.5Z"));
        let config = ForwardedForConfig::default();
        let mut late = choice(&config, &["192.0.2.1"]);
        late.refused[0].1.ends = Timestamp::parse("2038-02-01T00:00:00Z");
        assert!(!format!("{:?}", Layout::new(&config, Family::V6, &docker(), &tree(&late, 0))).contains("datestop"));
    }
}
