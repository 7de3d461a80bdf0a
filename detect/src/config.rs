//! `[detect]`: rules, lists and limits; raw as a file says them, then checked.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::time::Duration;

use ipnet::IpNet;
use proto::net::{NamedSet, NetSet, Target};
use proto::section;
use proto::settings::{Field, Mistakes, Share, Unknown};
use proto::subject::{OPERATOR, SYSTEM, is_name};
use serde::Deserialize;

use crate::engine::EngineConfig;
use crate::engine::escalation::{Escalation, Growth};
use crate::engine::leak::Grace;
use crate::engine::matcher::Matcher;
use crate::engine::rule::{Distinct, Mode, Rule, Threshold};

/// Rules in force together; one bit of a word each.
pub const RULES_MAX: usize = 64;
/// Greatest `max_retry` and `burst`: what one client may hold in memory for one rule.
pub const RETRY_MAX: u32 = 10_000;
/// Greatest `find_time` and `lateness_max`: how far back files are read again after a restart.
pub const SPAN_MAX: Duration = Duration::from_secs(7 * 24 * 3600);
/// Greatest grace time of `[detect.leaks]`.
pub const GRACE_MAX: Duration = Duration::from_secs(3600);
/// Shortest `ban_time`.
pub const BAN_TIME_MIN: Duration = Duration::from_secs(1);

/// Shortest prefix an operator may ban, IPv4 and IPv6, where enforcement says nothing else.
const PREFIX_MIN: (u8, u8) = (16, 32);

/// Keys of `[detect]`.
pub const KEYS: [&str; 12] = [
    "never_ban",
    "never_ban_builtin",
    "resolve_interval",
    "ipv6_prefix",
    "lateness_max",
    "tracked_clients_max",
    "window_events_max",
    "offenders_max",
    "builtin_rules",
    "rules",
    "escalation",
    "leaks",
];
/// Keys of `[detect.leaks]`.
pub const LEAK_KEYS: [&str; 2] = ["grace_firewall", "grace_cloudflare"];
/// Keys of `[detect.rules.NAME]`.
pub const RULE_KEYS: [&str; 10] =
    ["enabled", "match", "max_retry", "find_time", "ban_time", "distinct", "rate", "burst", "mode", "escalation"];
/// Keys of `[detect.escalation]` and of a rule's `escalation`.
pub const ESCALATION_KEYS: [&str; 6] = ["factor", "multipliers", "max", "jitter", "forget_after", "across_rules"];

/// `[detect]` as a file says it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct RawDetect {
    never_ban: Field<Vec<String>>,
    never_ban_builtin: Field<bool>,
    resolve_interval: Field<Duration>,
    ipv6_prefix: Field<u8>,
    lateness_max: Field<Duration>,
    tracked_clients_max: Field<u32>,
    window_events_max: Field<u32>,
    offenders_max: Field<u32>,
    builtin_rules: Field<bool>,
    rules: Field<BTreeMap<String, RawRule>>,
    escalation: Field<RawEscalation>,
    leaks: Field<RawLeaks>,
    #[serde(flatten)]
    unknown: Unknown,
}

/// `[detect.leaks]` as a file says it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct RawLeaks {
    grace_firewall: Field<Duration>,
    grace_cloudflare: Field<Duration>,
    #[serde(flatten)]
    unknown: Unknown,
}

/// `[detect.rules.NAME]` as a file says it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct RawRule {
    enabled: Field<bool>,
    r#match: Field<String>,
    max_retry: Field<u32>,
    find_time: Field<Duration>,
    ban_time: Field<Duration>,
    distinct: Field<String>,
    rate: Field<String>,
    burst: Field<u32>,
    mode: Field<String>,
    escalation: Field<RawEscalation>,
    #[serde(flatten)]
    unknown: Unknown,
}

/// `[detect.escalation]` as a file says it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct RawEscalation {
    factor: Field<f64>,
    multipliers: Field<Vec<f64>>,
    max: Field<Duration>,
    jitter: Field<Share>,
    forget_after: Field<Duration>,
    across_rules: Field<bool>,
    #[serde(flatten)]
    unknown: Unknown,
}

section!(RawDetect, RawRule, RawEscalation, RawLeaks);

/// `[detect]`, checked.
#[derive(Clone, Debug)]
pub struct DetectConfig {
    /// For the engine. `trusted_proxies` and `operator_prefix_min` are other roles' settings, for the caller to fill in.
    pub engine: EngineConfig,
    /// DNS names in `never_ban`.
    pub names: Vec<String>,
    /// How often they are resolved.
    pub resolve_interval: Duration,
}

impl Default for DetectConfig {
    fn default() -> Self {
        let mut mistakes = Mistakes::new();
        let config = RawDetect::default().check(&mut mistakes);
        debug_assert!(mistakes.is_empty(), "the defaults are valid");
        config
    }
}

impl RawDetect {
    /// Checks the section; every mistake is noted, with its key relative to it.
    pub fn check(self, mistakes: &mut Mistakes) -> DetectConfig {
        self.unknown.check(&KEYS, mistakes);
        let escalation = self.escalation.take("escalation", mistakes).map_or_else(Escalation::default, |raw| {
            mistakes.within("escalation", |m| raw.check(&Escalation::default(), m))
        });
        let builtin = self.never_ban_builtin.or("never_ban_builtin", true, mistakes);
        let (never_ban, names) =
            check_never_ban(self.never_ban.or("never_ban", Vec::new(), mistakes), builtin, mistakes);
        let ipv6_prefix = self.ipv6_prefix.or("ipv6_prefix", 64, mistakes);
        if !(16..=128).contains(&ipv6_prefix) {
            mistakes.add("ipv6_prefix", "expected 16 to 128 bits");
        }
        let lateness_max = self.lateness_max.or("lateness_max", Duration::from_secs(3600), mistakes);
        if lateness_max > SPAN_MAX {
            mistakes.add("lateness_max", "expected at most 7 days");
        }
        let resolve_interval = self.resolve_interval.or("resolve_interval", Duration::from_secs(300), mistakes);
        if resolve_interval < Duration::from_secs(1) {
            mistakes.add("resolve_interval", "expected at least 1s");
        }
        let mut limit = |field: Field<u32>, key: &str, default: u32| {
            let value = field.or(key, default, mistakes);
            if value == 0 {
                mistakes.add(key, "expected at least 1");
            }
            value as usize
        };
        let tracked_clients_max = limit(self.tracked_clients_max, "tracked_clients_max", 1_000_000);
        let window_events_max = limit(self.window_events_max, "window_events_max", 4_000_000);
        let offenders_max = limit(self.offenders_max, "offenders_max", 250_000);
        let rules = check_rules(self.rules, self.builtin_rules, &escalation, mistakes);
        let grace = self
            .leaks
            .take("leaks", mistakes)
            .map_or_else(Grace::default, |raw| mistakes.within("leaks", |m| raw.check(m)));
        let engine = EngineConfig {
            rules,
            never_ban,
            trusted_proxies: NetSet::default(),
            ipv6_prefix,
            lateness_max,
            tracked_clients_max,
            window_events_max,
            offenders_max,
            operator_prefix_min: PREFIX_MIN,
            grace,
        };
        DetectConfig { engine, names, resolve_interval }
    }
}

impl RawLeaks {
    fn check(self, mistakes: &mut Mistakes) -> Grace {
        self.unknown.check(&LEAK_KEYS, mistakes);
        let mut time = |field: Field<Duration>, key: &str, default: Duration| {
            let time = field.or(key, default, mistakes);
            if time > GRACE_MAX {
                mistakes.add(key, "expected at most 1h");
            }
            time
        };
        let default = Grace::default();
        Grace {
            firewall: time(self.grace_firewall, "grace_firewall", default.firewall),
            cloudflare: time(self.grace_cloudflare, "grace_cloudflare", default.cloudflare),
        }
    }
}

fn check_never_ban(entries: Vec<String>, builtin: bool, mistakes: &mut Mistakes) -> (Vec<IpNet>, Vec<String>) {
    let mut nets: Vec<IpNet> = Vec::new();
    if builtin {
        nets.extend(NamedSet::Private.nets());
        nets.extend(NamedSet::Cloudflare.nets());
    }
    let mut names = Vec::new();
    for entry in entries {
        if let Some(set) = NamedSet::parse(&entry) {
            nets.extend(set.nets());
        } else if let Ok(target) = entry.parse::<Target>() {
            nets.push(target.net());
        } else if is_host_name(&entry) {
            names.push(entry);
        } else {
            let text = format!("expected an address, a network, `private`, `cloudflare` or a host name, got {entry:?}");
            mistakes.add("never_ban", text);
        }
    }
    names.sort();
    names.dedup();
    (nets, names)
}

/// Whether `text` can be a DNS host name: labels of letters, digits and `-`, at least two of them, the last not a number.
fn is_host_name(text: &str) -> bool {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
            && !label.starts_with('-')
    };
    let labels: Vec<&str> = text.trim_end_matches('.').split('.').collect();
    let last_is_word = labels.last().is_some_and(|last| last.bytes().any(|b| b.is_ascii_alphabetic()));
    text.len() <= 253 && labels.len() >= 2 && labels.iter().all(|l| label(l)) && last_is_word
}

/// The rules that are in force without a configuration, and what a section of their name inherits.
fn builtin_rules() -> BTreeMap<&'static str, RawRule> {
    let rule = |condition: &str, max_retry: u32, find_seconds: u64, ban_seconds: u64| RawRule {
        r#match: Field::Given(condition.to_owned()),
        max_retry: Field::Given(max_retry),
        find_time: Field::Given(Duration::from_secs(find_seconds)),
        ban_time: Field::Given(Duration::from_secs(ban_seconds)),
        ..RawRule::default()
    };
    BTreeMap::from([
        (
            "forceful-browsing",
            rule(r"Status(`401-405`) && !PathRegexp(`\.(png|txt|jpg|ico|js|css|ttf|woff2?)/*$`)", 15, 60, 600),
        ),
        // A challenge alone is honest: git, docker and WebDAV provoke one before they send credentials.
        ("auth-brute-force", rule("Status(`401`) && !Username(`-`)", 10, 600, 600)),
        (
            "bad-bots",
            RawRule {
                enabled: Field::Given(false),
                ..rule(
                    "UserAgentRegexp(`(?i)\\b(masscan|nikto|sqlmap|zgrab|nuclei|wpscan|dirbuster|gobuster|feroxbuster|\
                     acunetix|netsparker|openvas|nessus|jorgee|zmeu|morfeus|havij|w3af|whatweb|hydra|commix)\\b`)",
                    1,
                    60,
                    86_400,
                )
            },
        ),
    ])
}

/// Names of the built-in rules.
pub fn builtin_names() -> Vec<&'static str> {
    builtin_rules().into_keys().collect()
}

fn check_rules(
    rules: Field<BTreeMap<String, RawRule>>,
    builtin: Field<bool>,
    escalation: &Escalation,
    mistakes: &mut Mistakes,
) -> Vec<Rule> {
    let given = rules.or("rules", BTreeMap::new(), mistakes);
    // Rules of one's own replace the built-in ones, unless they are asked for.
    let with_builtin = builtin.or("builtin_rules", given.is_empty(), mistakes);
    let builtins = builtin_rules();
    let mut sections: BTreeMap<String, RawRule> = BTreeMap::new();
    if with_builtin {
        sections.extend(builtins.iter().map(|(name, rule)| ((*name).to_owned(), rule.clone())));
    }
    for (name, rule) in given {
        let rule = match builtins.get(name.as_str()) {
            Some(base) => rule.over(base.clone()),
            None => rule,
        };
        sections.insert(name, rule);
    }
    let rules: Vec<Rule> = mistakes.within("rules", |m| {
        sections.into_iter().filter_map(|(name, raw)| m.within(&name, |m| raw.check(&name, escalation, m))).collect()
    });
    if rules.len() > RULES_MAX {
        mistakes.add("rules", format!("at most {RULES_MAX} rules can be in force, got {}", rules.len()));
    }
    rules
}

impl RawRule {
    /// This section, with what it leaves out taken from `base`.
    fn over(self, base: Self) -> Self {
        fn or<T>(own: Field<T>, base: Field<T>) -> Field<T> {
            if matches!(own, Field::Absent) { base } else { own }
        }
        // A rule that counts by rate has no window.
        let windowed = matches!(self.rate, Field::Absent);
        // Naming a built-in rule switches it on.
        let enabled = or(self.enabled, Field::Given(true));
        Self {
            enabled,
            r#match: or(self.r#match, base.r#match),
            max_retry: if windowed { or(self.max_retry, base.max_retry) } else { self.max_retry },
            find_time: if windowed { or(self.find_time, base.find_time) } else { self.find_time },
            ban_time: or(self.ban_time, base.ban_time),
            distinct: or(self.distinct, base.distinct),
            rate: or(self.rate, base.rate),
            burst: or(self.burst, base.burst),
            mode: or(self.mode, base.mode),
            escalation: or(self.escalation, base.escalation),
            unknown: self.unknown,
        }
    }

    /// The rule, `None` when it is wrong or switched off. A rule that is off is checked all the same.
    fn check(self, name: &str, defaults: &Escalation, mistakes: &mut Mistakes) -> Option<Rule> {
        self.unknown.check(&RULE_KEYS, mistakes);
        if !is_name(name) {
            mistakes.add("", "expected a name of a-z, 0-9 and -, at most 63 characters");
        } else if name == OPERATOR || name == SYSTEM {
            mistakes.add("", "the name is reserved");
        }
        let enabled = self.enabled.or("enabled", true, mistakes);
        let condition = self.r#match.required("match", mistakes);
        let matcher = condition
            .and_then(|text| Matcher::parse(&text).map_err(|error| mistakes.add("match", error.to_string())).ok());
        let escalation = self
            .escalation
            .take("escalation", mistakes)
            .map_or_else(|| defaults.clone(), |raw| mistakes.within("escalation", |m| raw.check(defaults, m)));
        let ban_time = self.ban_time.required("ban_time", mistakes);
        if let Some(ban_time) = ban_time {
            if ban_time < BAN_TIME_MIN {
                mistakes.add("ban_time", "expected at least 1s");
            } else if ban_time > escalation.max {
                mistakes.add("ban_time", "is longer than escalation.max");
            }
        }
        let mode = match self.mode.take("mode", mistakes).as_deref() {
            None | Some("enforce") => Mode::Enforce,
            Some("shadow") => Mode::Shadow,
            Some(other) => {
                mistakes.add("mode", format!("expected \"enforce\" or \"shadow\", got {other:?}"));
                Mode::Enforce
            }
        };
        let threshold = if matches!(self.rate, Field::Absent) {
            check_window(self.max_retry, self.find_time, (self.distinct, self.burst), mistakes)
        } else {
            for (key, given) in [
                ("max_retry", !matches!(self.max_retry, Field::Absent)),
                ("find_time", !matches!(self.find_time, Field::Absent)),
                ("distinct", !matches!(self.distinct, Field::Absent)),
            ] {
                if given {
                    mistakes.add(key, "does not go with rate");
                }
            }
            check_rate(self.rate, self.burst, mistakes)
        };
        let (matcher, ban_time, threshold) = (matcher?, ban_time?, threshold?);
        enabled.then(|| Rule { name: name.into(), matcher, threshold, ban_time, mode, escalation })
    }
}

fn check_window(
    max_retry: Field<u32>,
    find_time: Field<Duration>,
    (distinct, burst): (Field<String>, Field<u32>),
    mistakes: &mut Mistakes,
) -> Option<Threshold> {
    let max_retry = max_retry.required("max_retry", mistakes);
    if max_retry.is_some_and(|n| !(1..=RETRY_MAX).contains(&n)) {
        mistakes.add("max_retry", format!("expected 1 to {RETRY_MAX}"));
    }
    let find_time = find_time.required("find_time", mistakes);
    if find_time.is_some_and(|time| time > SPAN_MAX) {
        mistakes.add("find_time", "expected at most 7 days");
    }
    if !matches!(burst, Field::Absent) {
        mistakes.add("burst", "goes with rate only");
    }
    let distinct = distinct.take("distinct", mistakes).and_then(|word| {
        let distinct = Distinct::parse(&word);
        if distinct.is_none() {
            mistakes.add("distinct", format!("expected {}, got {word:?}", Distinct::WORDS));
        }
        distinct
    });
    Some(Threshold::Window { max_retry: max_retry?, find_time: find_time?, distinct })
}

fn check_rate(rate: Field<String>, burst: Field<u32>, mistakes: &mut Mistakes) -> Option<Threshold> {
    let burst = burst.required("burst", mistakes);
    if burst.is_some_and(|n| !(1..=RETRY_MAX).contains(&n)) {
        mistakes.add("burst", format!("expected 1 to {RETRY_MAX}"));
    }
    let text = rate.take("rate", mistakes)?;
    let period = parse_rate(&text);
    if period.is_none() {
        mistakes.add("rate", format!("expected a rate such as \"10/s\", \"30/m\" or \"5/10s\", got {text:?}"));
    }
    let threshold = Threshold::Rate { period: period?, burst: NonZeroU32::new(burst?)? };
    if threshold.horizon() > SPAN_MAX {
        mistakes.add("rate", "with this burst, one event matters for more than 7 days");
    }
    Some(threshold)
}

/// `COUNT/TIME` as the time in which one event drains.
fn parse_rate(text: &str) -> Option<Duration> {
    let (count, time) = text.split_once('/')?;
    let count: u32 = count.trim().parse().ok().filter(|&count| count > 0)?;
    let time = time.trim();
    let time = if time.starts_with(|c: char| c.is_ascii_digit()) { time.to_owned() } else { format!("1{time}") };
    let time = proto::time::parse_duration(&time).ok()?;
    let period = time / count;
    (period > Duration::ZERO && time <= SPAN_MAX).then_some(period)
}

impl RawEscalation {
    fn check(self, defaults: &Escalation, mistakes: &mut Mistakes) -> Escalation {
        self.unknown.check(&ESCALATION_KEYS, mistakes);
        let factor = self.factor.take("factor", mistakes);
        let multipliers = self.multipliers.take("multipliers", mistakes);
        if factor.is_some() && multipliers.is_some() {
            mistakes.add("factor", "does not go with multipliers");
        }
        if factor.is_some_and(|factor| !(1.0..=1000.0).contains(&factor)) {
            mistakes.add("factor", "expected 1 to 1000");
        }
        let wrong =
            |list: &Vec<f64>| list.is_empty() || list.len() > 64 || list.iter().any(|m| !(m.is_finite() && *m > 0.0));
        if multipliers.as_ref().is_some_and(wrong) {
            mistakes.add("multipliers", "expected 1 to 64 numbers greater than 0");
        }
        let growth = match (multipliers, factor) {
            (Some(list), _) => Growth::Multipliers(list),
            (None, Some(factor)) => Growth::Factor(factor),
            (None, None) => defaults.growth.clone(),
        };
        let max = self.max.or("max", defaults.max, mistakes);
        if max < BAN_TIME_MIN {
            mistakes.add("max", "expected at least 1s");
        }
        Escalation {
            growth,
            max,
            jitter: self.jitter.or("jitter", Share(defaults.jitter), mistakes).0,
            forget_after: self.forget_after.or("forget_after", defaults.forget_after, mistakes),
            across_rules: self.across_rules.or("across_rules", defaults.across_rules, mistakes),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn check(value: Value) -> (DetectConfig, Vec<String>) {
        let raw: RawDetect = serde_json::from_value(value).unwrap();
        let mut mistakes = Mistakes::new();
        let config = mistakes.within("detect", |m| raw.check(m));
        (config, mistakes.into_sorted().iter().map(ToString::to_string).collect())
    }

    fn names(config: &DetectConfig) -> Vec<&str> {
        config.engine.rules.iter().map(|rule| &*rule.name).collect()
    }

    #[test]
    fn without_a_file_the_builtin_rules_are_in_force() {
        let config = DetectConfig::default();
        assert_eq!(names(&config), ["auth-brute-force", "forceful-browsing"]);
        assert!(config.engine.never_ban.contains(&"10.0.0.0/8".parse().unwrap()));
    }

    #[test]
    fn rules_of_ones_own_replace_the_builtin_ones() {
        let own = json!({"match": "Status(`404`)", "max_retry": 3, "find_time": "1m", "ban_time": "1m"});
        let (config, mistakes) = check(json!({"rules": {"mine": own}}));
        assert_eq!((names(&config), mistakes.len()), (vec!["mine"], 0));
        let (config, _) = check(json!({"builtin_rules": true, "rules": {"mine": own, "bad-bots": {}}}));
        assert_eq!(names(&config), ["auth-brute-force", "bad-bots", "forceful-browsing", "mine"]);
        let (config, _) = check(json!({"rules": {"forceful-browsing": {"max_retry": 5}}}));
        assert_eq!(names(&config), ["forceful-browsing"]);
        assert_eq!(config.engine.rules[0].threshold.needed(), 5);
        assert_eq!(config.engine.rules[0].ban_time, Duration::from_secs(600));
    }

    #[test]
    fn never_ban_takes_addresses_networks_sets_and_names() {
        let (config, mistakes) = check(
            json!({"never_ban_builtin": false, "never_ban": ["192.0.2.1", "2001:db8::/32", "private", "home.example.net"]}),
        );
        assert!(mistakes.is_empty());
        assert_eq!(config.names, ["home.example.net"]);
        assert_eq!(config.engine.never_ban.len(), 2 + NamedSet::Private.nets().len());
        let (_, mistakes) = check(json!({"never_ban": ["192.0.2.1/40", "not a name", "1.2.3.4.5"]}));
        assert_eq!(mistakes.len(), 3);
    }

    #[test]
    fn every_mistake_is_named() {
        let (_, mistakes) = check(json!({
            "lateness_max": "8d", "ipv6_prefix": 8, "leaks": {"grace_firewall": "2h", "grace": "1s"}, "tracked_clients_max": 0, "escalation": {"factor": 0.5, "multipliers": []},
            "rules": {
                "operator": {"match": "Status(`404`)", "max_retry": 0, "find_time": "1m", "ban_time": "1ms"},
                "a": {"match": "Status(`404`", "rate": "10", "burst": 0, "find_time": "1m", "mode": "x", "ban_tme": "1m"},
                "b": {"match": "Status(`404`)", "max_retry": 1, "find_time": "1m", "ban_time": "30d", "distinct": "x", "burst": 1},
            },
        }));
        let keys: Vec<&str> = mistakes.iter().map(|text| text.split(": ").next().unwrap()).collect();
        assert_eq!(
            keys,
            [
                "detect.escalation.factor",
                "detect.escalation.factor",
                "detect.escalation.multipliers",
                "detect.ipv6_prefix",
                "detect.lateness_max",
                "detect.leaks.grace",
                "detect.leaks.grace_firewall",
                "detect.rules.a.ban_time",
                "detect.rules.a.ban_tme",
                "detect.rules.a.burst",
                "detect.rules.a.find_time",
                "detect.rules.a.match",
                "detect.rules.a.mode",
                "detect.rules.a.rate",
                "detect.rules.b.ban_time",
                "detect.rules.b.burst",
                "detect.rules.b.distinct",
                "detect.rules.operator",
                "detect.rules.operator.ban_time",
                "detect.rules.operator.max_retry",
                "detect.tracked_clients_max",
            ]
        );
    }

    #[test]
    fn rates_are_read() {
        for (text, millis) in [("10/s", 100), ("30/m", 2000), ("5/10s", 2000), ("1/1h", 3_600_000)] {
            assert_eq!(parse_rate(text), Some(Duration::from_millis(millis)), "{text}");
        }
        for wrong in ["10", "0/s", "x/s", "1/", "1/0s", "-1/s"] {
            assert_eq!(parse_rate(wrong), None, "{wrong}");
        }
    }
}
