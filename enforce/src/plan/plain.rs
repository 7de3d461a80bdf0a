//! Bans as plain rules of our chain, for hosts without kernel sets: what the rules should be, and what they say. Pure.
//!
//! Every packet meets every rule, so there may only be a few bans ([`bans_max`]). Each rule carries its ban's end, so that
//! bans end on time when we are down, and the rule that decided it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use proto::net::Target;
use proto::time::Timestamp;

use crate::config::{FirewallConfig, Table};
use crate::plan::rules::render_ports;
use crate::plan::{Family, Held, Kernel, SetId, shift};

/// Ban rules of a chain at most: 1,000 cost every packet about what all else in its path costs.
const RULES_MAX: u32 = 1000;
/// Length of `2027-11-25T18:00:01`.
const SECONDS_LEN: usize = 19;

/// Bans held at most, given the ports that each needs a rule for.
pub fn bans_max(config: &FirewallConfig) -> u32 {
    let per_ban = u32::try_from(config.ports.len().max(1)).unwrap_or(RULES_MAX);
    (RULES_MAX / per_ban).max(1).min(config.bans_max)
}

/// The rules of our chain, as iptables-save prints them. Guarded networks are returned first, as far as a ban contains them.
///
/// The kernel compares ends with the host's clock, which is `skew_ms` milliseconds ahead of ours.
pub fn render_rules(
    config: &FirewallConfig,
    (family, table): (Family, Table),
    kernel: &Kernel,
    skew_ms: i64,
) -> Vec<String> {
    let members = |set| kernel.sets.get(&set).into_iter().flat_map(|set| &set.members);
    let wide: Vec<&Target> = members(SetId::Bans(family)).map(|(ban, _)| ban).filter(|ban| !ban.is_host()).collect();
    let guarded = members(SetId::Guard(family)).map(|(net, _)| net);
    let mut rules: Vec<String> = guarded
        .filter(|net| wide.iter().any(|ban| ban.contains(net)))
        .map(|net| format!("-s {} -j RETURN", net.net()))
        .collect();
    rules.extend(config.spare_ports.iter().map(|ports| format!("{} -j RETURN", render_ports(ports, table))));
    for (ban, held) in members(SetId::Bans(family)) {
        let end = held
            .ends
            .map(|end| render_seconds(shift(end, skew_ms)))
            .map(|end| format!(" -m time --datestop {end}"))
            .unwrap_or_default();
        let comment = match &*held.comment {
            "" => String::new(),
            rule => format!(" -m comment --comment {rule}"),
        };
        let rule = |ports: &str| format!("-s {}{ports}{end}{comment} -j DROP", ban.net());
        if config.ports.is_empty() {
            rules.push(rule(""));
        } else {
            rules.extend(config.ports.iter().map(|ports| rule(&format!(" {}", render_ports(ports, table)))));
        }
    }
    rules
}

/// The bans that rules of our chain hold, of which [`render_rules`] was told `skew_ms`.
pub fn parse_rules<'a>(rules: impl Iterator<Item = &'a String>, skew_ms: i64) -> BTreeMap<Target, Held> {
    rules.filter_map(|rule| parse_rule(rule, skew_ms)).collect()
}

fn parse_rule(rule: &str, skew_ms: i64) -> Option<(Target, Held)> {
    let words: Vec<&str> = rule.strip_suffix(" -j DROP")?.split(' ').collect();
    let after = |key: &str| words.iter().skip_while(|word| **word != key).nth(1).copied();
    let target = after("-s")?.parse().ok()?;
    let ends = match after("--datestop") {
        Some(end) => Some(shift(Timestamp::parse(&format!("{end}Z"))?, skew_ms.saturating_neg())),
        None => None,
    };
    Some((target, Held { ends, comment: Arc::from(after("--comment").unwrap_or_default().trim_matches('"')) }))
}

/// Rounded up, in UTC, as the match `time` takes it.
fn render_seconds(time: Timestamp) -> String {
    let up = time.saturating_add(Duration::from_millis(999)).to_string();
    up.get(..SECONDS_LEN).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Ports, Protocol};
    use crate::plan::Step;

    #[test]
    fn bans_are_rules_with_their_end_behind_the_guarded_networks_that_they_contain() {
        let end = Timestamp::from_secs(1_827_252_000);
        let mut kernel = Kernel::default();
        let (guard, bans) = (SetId::Guard(Family::V4), SetId::Bans(Family::V4));
        for set in [guard, bans] {
            kernel.note(&Step::Create { set, maxelem: 10 }, Timestamp::EPOCH);
        }
        for (set, target, comment) in [
            (guard, "192.0.2.7", ""),
            (guard, "10.0.0.0/8", ""),
            (bans, "192.0.2.0/24", "r"),
            (bans, "198.51.100.1", "r-2"),
        ] {
            let held = Held { ends: (set == bans).then_some(end), comment: comment.into() };
            kernel.sets.get_mut(&set).unwrap().members.insert(target.parse().unwrap(), held);
        }
        let mut config = FirewallConfig::default();
        let rules = render_rules(&config, (Family::V4, Table::Raw), &kernel, 0);
        let expected = [
            "-s 192.0.2.7/32 -j RETURN",
            "-s 192.0.2.0/24 -m time --datestop 2027-11-26T18:00:00 -m comment --comment r -j DROP",
            "-s 198.51.100.1/32 -m time --datestop 2027-11-26T18:00:00 -m comment --comment r-2 -j DROP",
        ];
        assert_eq!(rules, expected);
        assert_eq!(parse_rules(rules.iter(), 0), kernel.sets[&bans].members);

        let ahead = render_rules(&config, (Family::V4, Table::Raw), &kernel, 3_600_000);
        assert!(ahead[1].contains("--datestop 2027-11-26T19:00:00"), "the host's clock decides: {ahead:?}");
        assert_eq!(parse_rules(ahead.iter(), 3_600_000), kernel.sets[&bans].members);

        let https = Ports { protocol: Protocol::Tcp, first: 443, last: 443 };
        config.ports = vec![https, Ports { protocol: Protocol::Udp, ..https }];
        let rules = render_rules(&config, (Family::V4, Table::Raw), &kernel, 0);
        assert!(rules[2].starts_with("-s 192.0.2.0/24 -p udp -m udp --dport 443 -m time "), "{rules:?}");
        assert_eq!(parse_rules(rules.iter(), 0), kernel.sets[&bans].members);
        assert_eq!(bans_max(&config), 500);
    }
}
