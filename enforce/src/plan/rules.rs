//! Our chain and the jumps to it: what they should be, and the steps from what iptables shows to that. Pure.
//!
//! Only rules in our own chain are addressed by number; in chains of others we insert at the top and remove by content,
//! so a race with another program never costs it a rule.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::time::Duration;

use proto::time::Timestamp;

use crate::config::{CHAIN, ChainRef, Chains, DOCKER_USER, FORWARDED_CHAIN, FirewallConfig, Ports, Table};
use crate::plan::{Family, SetId};

/// Times that we move to the top of one chain in [`LIFT_WINDOW`]; someone who wants the place more than that gets it.
pub const LIFTS_MAX: usize = 3;
/// See [`LIFTS_MAX`].
pub const LIFT_WINDOW: Duration = Duration::from_secs(600);
/// A chain that nothing jumps to, in which rules are tried for a moment.
pub const PROBE: &str = "PORTCULLIS-PROBE";
/// Rules of our chain, before and after, up to which they are changed one by one. That keeps what they have counted.
const SINGLE_RULES_MAX: usize = 80;
/// Targets after which a packet goes on to the next rule, or is gone. Everything else could accept it.
const HARMLESS: [&str; 14] = [
    "DROP", "REJECT", "LOG", "NFLOG", "ULOG", "TRACE", "CT", "NOTRACK", "MARK", "CONNMARK", "SET", "AUDIT", "TCPMSS",
    "DSCP",
];

/// One family's rules in one variant, as `iptables-save -c` shows them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// Rules by table and chain, without the chain's name.
    pub tables: BTreeMap<Table, BTreeMap<String, Vec<String>>>,
    /// Rules of others, in any table.
    pub foreign: usize,
    /// What the DROP rules of our chains have counted: packets and bytes.
    pub dropped: (u64, u64),
    /// The like of the rules that refuse forwarded clients.
    pub refused: (u64, u64),
}

impl View {
    /// Reads `iptables-save -c`.
    pub fn parse(saved: &str) -> Self {
        let mut view = Self::default();
        let mut table = None;
        for line in saved.lines() {
            if let Some(name) = line.strip_prefix('*') {
                table = Table::parse(name.trim());
                if let Some(table) = table {
                    view.tables.entry(table).or_default();
                }
            } else if let Some(chain) = line.strip_prefix(':').and_then(|rest| rest.split(' ').next()) {
                if let Some(table) = table {
                    view.tables.entry(table).or_default().entry(chain.to_owned()).or_default();
                }
            } else if let Some((counters, chain, rule)) = parse_rule(line) {
                view.take_rule(table, counters, (chain, rule));
            }
        }
        view
    }

    fn take_rule(&mut self, table: Option<Table>, counters: (u64, u64), (chain, rule): (&str, &str)) {
        if chain == CHAIN && rule.ends_with("-j DROP") {
            self.dropped = (self.dropped.0 + counters.0, self.dropped.1 + counters.1);
        }
        let of_forwarded = chain.starts_with(FORWARDED_CHAIN);
        if of_forwarded && rule.contains(" -j REJECT ") {
            self.refused = (self.refused.0 + counters.0, self.refused.1 + counters.1);
        }
        let is_ours = of_forwarded || chain == CHAIN || chain == PROBE;
        self.foreign += usize::from(!is_ours && !is_jump(rule) && !leads_to_forwarded(rule));
        if let Some(table) = table {
            self.tables.entry(table).or_default().entry(chain.to_owned()).or_default().push(rule.to_owned());
        }
    }

    /// Whether the chain exists.
    pub fn has(&self, chain: &ChainRef) -> bool {
        self.rules(chain).is_some()
    }

    /// The rules of a chain, where it exists.
    pub fn rules(&self, chain: &ChainRef) -> Option<&Vec<String>> {
        self.tables.get(&chain.table)?.get(&chain.chain)
    }
}

fn parse_rule(line: &str) -> Option<((u64, u64), &str, &str)> {
    let (counters, rest) = line.strip_prefix('[')?.split_once("] -A ")?;
    let (packets, bytes) = counters.split_once(':')?;
    let (chain, rule) = rest.split_once(' ').unwrap_or((rest, ""));
    Some(((packets.parse().ok()?, bytes.parse().ok()?), chain, rule.trim_end()))
}

fn is_jump(rule: &str) -> bool {
    rule.strip_prefix("-j ") == Some(CHAIN)
}

/// Whether it is a jump to the chain that refuses forwarded clients, which accepts nothing.
pub fn leads_to_forwarded(rule: &str) -> bool {
    rule.rsplit_once("-j ").is_some_and(|(_, target)| target == FORWARDED_CHAIN)
}

/// Whether a packet may go no further than this rule. Ours let everything on that they do not end.
pub fn could_accept(rule: &str) -> bool {
    if is_jump(rule) || leads_to_forwarded(rule) {
        return false;
    }
    let mut words = rule.split(' ').skip_while(|word| !matches!(*word, "-j" | "-g"));
    words.next().is_some() && words.next().is_some_and(|target| !HARMLESS.contains(&target))
}

/// The two programs that iptables is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Variant {
    /// Over nf_tables.
    Nft,
    /// The older kernel interface.
    Legacy,
}

impl Variant {
    /// For people.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Nft => "nft",
            Self::Legacy => "legacy",
        }
    }
}

/// Which variant to use, and why: the one that holds DOCKER-USER, else the one with rules, else nft. `None` stands for a
/// variant that is not on this host (or, of legacy, whose tables are asleep).
pub fn choose_variant(nft: Option<&View>, legacy: Option<&View>) -> Option<(Variant, &'static str)> {
    let docker = |view: &View| view.has(&ChainRef::new(Table::Filter, DOCKER_USER));
    match (nft, legacy) {
        (Some(nft), _) if docker(nft) => Some((Variant::Nft, "holds DOCKER-USER")),
        (_, Some(legacy)) if docker(legacy) => Some((Variant::Legacy, "holds DOCKER-USER")),
        (Some(nft), _) if nft.foreign > 0 => Some((Variant::Nft, "holds the rules")),
        (_, Some(legacy)) if legacy.foreign > 0 => Some((Variant::Legacy, "holds the rules")),
        (Some(_), _) => Some((Variant::Nft, "no rules yet")),
        (None, Some(_)) => Some((Variant::Legacy, "nft is not available")),
        (None, None) => None,
    }
}

/// What our part of one family's rules should be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// Chains that jump to ours.
    pub places: Vec<ChainRef>,
    /// Configured chains that do not exist.
    pub missing: Vec<ChainRef>,
    /// Rules of our chain in each table that has a place.
    pub rules: BTreeMap<Table, Vec<String>>,
}

impl Layout {
    /// For a family whose rules are `view`, where the tables `usable` exist or can be made.
    pub fn new(config: &FirewallConfig, family: Family, view: &View, usable: &BTreeSet<Table>) -> Self {
        let auto;
        let configured: &[ChainRef] = match &config.chains {
            Chains::Listed(listed) => listed,
            Chains::Auto => {
                let docker = ChainRef::new(Table::Filter, DOCKER_USER);
                auto = if usable.contains(&Table::Raw) {
                    vec![ChainRef::new(Table::Raw, "PREROUTING")]
                } else if view.has(&docker) {
                    vec![ChainRef::new(Table::Filter, "INPUT"), docker]
                } else {
                    vec![ChainRef::new(Table::Filter, "INPUT")]
                };
                &auto
            }
        };
        let exists = |place: &ChainRef| view.has(place) || (place.is_built_in() && usable.contains(&place.table));
        let (places, missing): (Vec<ChainRef>, Vec<ChainRef>) = configured.iter().cloned().partition(exists);
        let rules = places.iter().map(|place| (place.table, render_rules(config, family, place.table))).collect();
        Self { places, missing, rules }
    }

    /// Tables that the configured chains may need, so that their presence has to be known.
    pub fn tables(config: &FirewallConfig) -> BTreeSet<Table> {
        match &config.chains {
            Chains::Auto => [Table::Raw, Table::Filter].into(),
            Chains::Listed(listed) => listed.iter().map(|chain| chain.table).collect(),
        }
    }
}

/// The rules of our chain, as iptables-save prints them. Most packets are of nobody who is banned and go after one look-up: the
/// guard's networks are of many lengths, each of which costs another. What drops asks for itself, whatever stands before it.
fn render_rules(config: &FirewallConfig, family: Family, table: Table) -> Vec<String> {
    let (guard, bans) = (SetId::Guard(family).name(), SetId::Bans(family).name());
    let innocent = format!("-m set ! --match-set {bans} src -j RETURN");
    let guard = format!("-m set --match-set {guard} src -j RETURN");
    let spare = config.spare_ports.iter().map(|ports| format!("{} -j RETURN", render_ports(ports, table)));
    let bans = format!("-m set --match-set {bans} src -j DROP");
    let mut rules = vec![innocent, guard];
    rules.extend(spare);
    if config.ports.is_empty() {
        rules.push(bans);
    } else {
        rules.extend(config.ports.iter().map(|ports| format!("{} {bans}", render_ports(ports, table))));
    }
    rules
}

/// The port that the client asked for. Raw sees it in the packet; later tables see what address translation made of it,
/// so there connection tracking is asked, for the client's direction only.
pub(super) fn render_ports(ports: &Ports, table: Table) -> String {
    let protocol = ports.protocol.as_str();
    let range =
        if ports.first == ports.last { ports.first.to_string() } else { format!("{}:{}", ports.first, ports.last) };
    match table {
        Table::Raw => format!("-p {protocol} -m {protocol} --dport {range}"),
        Table::Mangle | Table::Filter => {
            format!("-p {protocol} -m conntrack --ctorigdstport {range} --ctdir ORIGINAL")
        }
    }
}

/// One change to a family's rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RuleStep {
    /// Make our chain.
    NewChain(Table),
    /// Put a rule into our chain.
    Insert {
        /// In this table.
        table: Table,
        /// At this position, from 1.
        position: usize,
        /// As iptables takes and shows it.
        rule: String,
    },
    /// Put these rules into our chain instead of those that are there, at once.
    Fill {
        /// In this table.
        table: Table,
        /// As iptables takes and shows them.
        rules: Vec<String>,
    },
    /// Remove the rule at this position of our chain.
    DeleteAt {
        /// In this table.
        table: Table,
        /// From 1.
        position: usize,
    },
    /// Jump to our chain from the top of another.
    Jump(ChainRef),
    /// Move the jumps to our chain to the top of another as one jump, at once: there is always one.
    Lift {
        /// That chain.
        place: ChainRef,
        /// Jumps in it.
        jumps: usize,
    },
    /// Remove one jump to our chain.
    Unjump(ChainRef),
    /// Remove our chain and what is in it.
    RemoveChain(Table),
    /// Remove the chain [`PROBE`], which a killed process left.
    RemoveProbe(Table),
}

impl fmt::Display for RuleStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Self::Fill { table, rules } = self {
            return write!(f, "-t {} -F {CHAIN}; {} rules", table.as_str(), rules.len());
        }
        for (i, (table, arguments)) in self.commands().iter().enumerate() {
            write!(f, "{}-t {} {arguments}", if i == 0 { "" } else { "; " }, table.as_str())?;
        }
        Ok(())
    }
}

impl RuleStep {
    /// What iptables is told, one call after the other; for [`Self::Lift`] and [`Self::Fill`] in one transaction, all in one
    /// table.
    pub fn commands(&self) -> Vec<(Table, String)> {
        match self {
            Self::NewChain(table) => vec![(*table, format!("-N {CHAIN}"))],
            Self::Insert { table, position, rule } => vec![(*table, format!("-I {CHAIN} {position} {rule}"))],
            Self::Fill { table, rules } => {
                let rules = rules.iter().map(|rule| format!("-A {CHAIN} {rule}"));
                [format!("-F {CHAIN}")].into_iter().chain(rules).map(|arguments| (*table, arguments)).collect()
            }
            Self::DeleteAt { table, position } => vec![(*table, format!("-D {CHAIN} {position}"))],
            Self::Jump(place) => vec![(place.table, render_jump(place))],
            Self::Lift { place, jumps } => {
                let removals = (0..*jumps).map(|_| render_unjump(place));
                removals.chain([render_jump(place)]).map(|arguments| (place.table, arguments)).collect()
            }
            Self::Unjump(place) => vec![(place.table, render_unjump(place))],
            Self::RemoveChain(table) => vec![(*table, format!("-F {CHAIN}")), (*table, format!("-X {CHAIN}"))],
            Self::RemoveProbe(table) => vec![(*table, format!("-F {PROBE}")), (*table, format!("-X {PROBE}"))],
        }
    }

    /// For metrics.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::NewChain(_) => "new_chain",
            Self::Insert { .. } => "insert_rule",
            Self::Fill { .. } => "fill_chain",
            Self::DeleteAt { .. } => "delete_rule",
            Self::Jump(_) => "jump",
            Self::Lift { .. } => "lift",
            Self::Unjump(_) => "unjump",
            Self::RemoveChain(_) | Self::RemoveProbe(_) => "remove_chain",
        }
    }
}

fn render_jump(place: &ChainRef) -> String {
    format!("-I {} 1 -j {CHAIN}", place.chain)
}

fn render_unjump(place: &ChainRef) -> String {
    format!("-D {} -j {CHAIN}", place.chain)
}

/// Remembers when we moved to the top of a chain.
#[derive(Clone, Debug, Default)]
pub struct Lifts(BTreeMap<ChainRef, VecDeque<Timestamp>>);

impl Lifts {
    /// Whether we may move up once more, which is then counted.
    pub fn allow(&mut self, chain: &ChainRef, now: Timestamp) -> bool {
        let times = self.0.entry(chain.clone()).or_default();
        while times.front().is_some_and(|time| now.since(*time) >= LIFT_WINDOW) {
            times.pop_front();
        }
        let allowed = times.len() < LIFTS_MAX;
        if allowed {
            times.push_back(now);
        }
        allowed
    }
}

/// Steps, and what they leave undone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RulePlan {
    /// In the order to apply them.
    pub steps: Vec<RuleStep>,
    /// Chains in which a rule that could accept stays above ours, because we have moved up too often.
    pub overtaken: Vec<ChainRef>,
}

/// From `view` to `layout`. Chains of ours are whole before anything jumps to them, and are changed without a gap.
pub fn plan_rules(layout: &Layout, view: &View, lifts: &mut Lifts, now: Timestamp) -> RulePlan {
    let mut plan = RulePlan::default();
    for (&table, wanted) in &layout.rules {
        plan_chain(table, wanted, view, &mut plan.steps);
    }
    for place in &layout.places {
        let none = Vec::new();
        let rules = view.rules(place).unwrap_or(&none);
        let jumps = rules.iter().filter(|rule| is_jump(rule)).count();
        let above = rules.iter().take_while(|rule| !is_jump(rule));
        let under_one_that_accepts = jumps == 1 && above.into_iter().any(|rule| could_accept(rule));
        match jumps {
            1 if !under_one_that_accepts => continue,
            1 if !lifts.allow(place, now) => {
                plan.overtaken.push(place.clone());
                continue;
            }
            0 => plan.steps.push(RuleStep::Jump(place.clone())),
            _ => plan.steps.push(RuleStep::Lift { place: place.clone(), jumps }),
        }
    }
    plan.steps.extend(plan_removal(
        view,
        |place| layout.places.contains(place),
        |table| layout.rules.contains_key(&table),
    ));
    plan
}

/// Removes every jump and chain of ours except those to keep.
pub fn plan_removal(
    view: &View,
    keep_jump: impl Fn(&ChainRef) -> bool,
    keep_chain: impl Fn(Table) -> bool,
) -> Vec<RuleStep> {
    let mut steps = Vec::new();
    for (&table, chains) in &view.tables {
        for (chain, rules) in chains {
            let place = ChainRef::new(table, chain);
            if !keep_jump(&place) {
                let jumps = rules.iter().filter(|rule| is_jump(rule));
                steps.extend(jumps.map(|_| RuleStep::Unjump(place.clone())));
            }
        }
        if chains.contains_key(CHAIN) && !keep_chain(table) {
            steps.push(RuleStep::RemoveChain(table));
        }
        if chains.contains_key(PROBE) {
            steps.push(RuleStep::RemoveProbe(table));
        }
    }
    steps
}

/// Rules of others that lead to our chain under a condition of their own, as iptables shows them. It cannot be removed while
/// they stand.
pub fn foreign_jumps(view: &View, table: Table) -> Vec<String> {
    let leads_to_ours = |rule: &&String| {
        let mut words = rule.split(' ').skip_while(|word| !matches!(*word, "-j" | "-g"));
        words.next().is_some() && words.next() == Some(CHAIN) && !is_jump(rule)
    };
    let chains = view.tables.get(&table).into_iter().flatten();
    chains
        .flat_map(|(chain, rules)| rules.iter().filter(leads_to_ours).map(move |rule| format!("-A {chain} {rule}")))
        .collect()
}

/// What a step of [`plan_removal`] removes from `view`, for people.
pub fn describe_removal(step: &RuleStep, view: &View) -> String {
    let (table, chain) = match step {
        RuleStep::Unjump(place) => return format!("the jump from {place}"),
        RuleStep::RemoveChain(table) => (*table, CHAIN),
        RuleStep::RemoveProbe(table) => (*table, PROBE),
        other => return other.to_string(),
    };
    let chain = ChainRef::new(table, chain);
    format!("chain {chain} with {} rules", view.rules(&chain).map_or(0, Vec::len))
}

fn plan_chain(table: Table, wanted: &[String], view: &View, steps: &mut Vec<RuleStep>) {
    let there = view.rules(&ChainRef::new(table, CHAIN));
    if there.is_none() {
        steps.push(RuleStep::NewChain(table));
    }
    let there = there.map_or(&[][..], Vec::as_slice);
    if there == wanted {
        return;
    }
    if there.len() + wanted.len() > SINGLE_RULES_MAX {
        steps.push(RuleStep::Fill { table, rules: wanted.to_vec() });
        return;
    }
    // The right rules go above the wrong ones, which then go: the bans hold all the while.
    let inserts = (1..).zip(wanted);
    steps.extend(inserts.map(|(position, rule)| RuleStep::Insert { table, position, rule: rule.clone() }));
    steps.extend(there.iter().map(|_| RuleStep::DeleteAt { table, position: wanted.len() + 1 }));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Protocol;

    #[test]
    fn who_is_not_banned_leaves_after_one_look_up_and_nothing_drops_without_one_of_its_own() {
        let port = |port| vec![Ports { protocol: Protocol::Tcp, first: port, last: port }];
        for (ports, spare) in [(vec![], vec![]), (port(443), port(22))] {
            let config = FirewallConfig { ports, spare_ports: spare, ..FirewallConfig::default() };
            let rules = render_rules(&config, Family::V6, Table::Raw);
            assert_eq!(rules[0], "-m set ! --match-set portcullis-v6 src -j RETURN");
            assert_eq!(rules[1], "-m set --match-set portcullis-guard-v6 src -j RETURN");
            let last = rules.last().unwrap();
            assert!(last.ends_with("-m set --match-set portcullis-v6 src -j DROP"), "{last}");
            assert_eq!(rules.iter().filter(|rule| rule.contains("DROP")).count(), 1);
        }
    }
}
