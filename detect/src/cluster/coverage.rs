//! What the rules can match, and from which version of that on each rule is covered. Pure.

use std::collections::BTreeMap;

use proto::event::{Interest, StatusSet};
use proto::head::{Coverage, RuleCoverage};

use crate::engine::EngineConfig;
use crate::engine::rule::Rule;

/// Statuses that a log line can have; 0 = absent.
const STATUSES: std::ops::Range<u16> = 0..1000;

/// The coverage of `config`'s rules, where `known` is in force. The same as `known` if nothing differs.
pub(crate) fn cover(config: &EngineConfig, known: &Coverage) -> Coverage {
    let mut wanted = wanted(config);
    let is_same = wanted.headers == known.interest.headers && wanted.statuses == known.interest.statuses;
    wanted.version = known.interest.version + u64::from(!is_same || known.interest.version == 0);
    let mut rules = BTreeMap::new();
    for rule in &config.rules {
        let condition = rule.matcher.source().to_owned();
        let former = known.rules.get(&*rule.name).filter(|former| former.condition == condition);
        let since = former.map_or_else(|| first_version(rule, known, wanted.version), |former| former.since);
        rules.insert(rule.name.to_string(), RuleCoverage { condition, since });
    }
    Coverage { interest: wanted, rules }
}

/// By rule of `config`: the first version that covers it. A rule that `coverage` does not know is covered by none.
pub(crate) fn covered_from(config: &EngineConfig, coverage: &Coverage) -> Vec<u64> {
    let since = |rule: &Rule| {
        let known = coverage.rules.get(&*rule.name).filter(|known| known.condition == rule.matcher.source());
        known.map_or(u64::MAX, |known| known.since)
    };
    config.rules.iter().map(since).collect()
}

fn wanted(config: &EngineConfig) -> Interest {
    let may_match = |status: &u16| config.rules.iter().any(|rule| rule.matcher.may_match_status(*status));
    let matched: Vec<(u16, u16)> = STATUSES.filter(may_match).map(|status| (status, status)).collect();
    let statuses = (matched.len() < STATUSES.len()).then(|| StatusSet::new(matched));
    Interest { statuses, ..config.interest() }
}

/// What is sent already may be enough for a new rule.
fn first_version(rule: &Rule, known: &Coverage, next: u64) -> u64 {
    let interest = &known.interest;
    let has_statuses = STATUSES.filter(|status| rule.matcher.may_match_status(*status)).all(|s| interest.may_match(s));
    let has_headers = rule.matcher.interest_headers().iter().all(|header| interest.headers.contains(header));
    if interest.version > 0 && has_statuses && has_headers { interest.version } else { next }
}

/// Changes with the rules, with what they do and with whom they spare: detectors of one cluster must have the same.
pub(crate) fn fingerprint(config: &EngineConfig) -> String {
    let text = |rule: &Rule| {
        let Rule { name, matcher, threshold, ban_time, mode, escalation } = rule;
        format!("{name} {:?} {threshold:?} {ban_time:?} {mode:?} {escalation:?}", matcher.source())
    };
    let mut rules: Vec<String> = config.rules.iter().map(text).collect();
    let mut never_ban: Vec<String> = config.never_ban.iter().map(ToString::to_string).collect();
    never_ban.sort_unstable();
    let trusted: Vec<String> = config.trusted_proxies.nets().iter().map(ToString::to_string).collect();
    rules.push(format!("{} {:?} {:?}", config.ipv6_prefix, config.lateness_max, config.operator_prefix_min));
    rules.push(format!("{} {}", never_ban.join(" "), trusted.join(" ")));
    // FNV-1a.
    let fold = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    format!("{:016x}", rules.join("\n").bytes().fold(0xcbf2_9ce4_8422_2325, fold))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::config::RawDetect;

    fn config(rules: &Value) -> EngineConfig {
        let raw: RawDetect = serde_json::from_value(json!({ "rules": rules })).unwrap();
        let mut mistakes = proto::settings::Mistakes::new();
        let config = raw.check(&mut mistakes);
        assert!(mistakes.is_empty(), "{mistakes:?}");
        config.engine
    }

    fn rule(condition: &str) -> Value {
        json!({"match": condition, "max_retry": 3, "find_time": "1m", "ban_time": "1m"})
    }

    #[test]
    fn only_what_rules_can_match_is_wanted() {
        let first = cover(&config(&json!({"a": rule("Status(`404`) && Path(`/x`)")})), &Coverage::default());
        assert_eq!((first.interest.version, first.rules["a"].since), (1, 1));
        assert!(first.interest.may_match(404) && !first.interest.may_match(200));
        let any = cover(&config(&json!({"a": rule("UserAgentRegexp(`x`)")})), &Coverage::default());
        assert_eq!(any.interest.statuses, None, "a rule that looks at no status can match any");
    }

    #[test]
    fn a_new_rule_counts_from_the_version_that_covers_it() {
        let a = config(&json!({"a": rule("Status(`400-499`)")}));
        let first = cover(&a, &Coverage::default());
        assert_eq!(cover(&a, &first), first, "nothing differs");
        let b =
            config(&json!({"a": rule("Status(`400-499`)"), "b": rule("Status(`404`)"), "c": rule("Status(`500`)")}));
        let second = cover(&b, &first);
        let since = |name: &str| second.rules[name].since;
        assert_eq!(second.interest.version, 2);
        assert_eq!((since("a"), since("b"), since("c")), (1, 1, 2), "b is covered by what a needed");
        assert_eq!(covered_from(&b, &first), [1, u64::MAX, u64::MAX], "a standby waits for the active detector");
        let changed = cover(&config(&json!({"a": rule("Header(`X-A`, `1`)")})), &second);
        assert_eq!((changed.interest.version, changed.rules["a"].since), (3, 3));
        assert_eq!(changed.interest.headers, ["x-a"]);
    }

    #[test]
    fn the_fingerprint_changes_with_anything_that_rules_do() {
        let a = config(&json!({"a": rule("Status(`404`)")}));
        let mut other = a.clone();
        assert_eq!(fingerprint(&a), fingerprint(&other));
        other.rules[0].ban_time *= 2;
        assert_ne!(fingerprint(&a), fingerprint(&other));
        let mut other = a.clone();
        other.never_ban.push("198.51.100.0/24".parse().unwrap());
        assert_ne!(fingerprint(&a), fingerprint(&other));
    }
}
