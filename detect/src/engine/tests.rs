//! The engine against hand-made cases and a brute-force model.

use std::collections::BTreeMap;

use proptest::prelude::*;
use proto::client_ip::Client;
use proto::event::Text;
use serde_json::json;

use super::command::{Command, Refusal, Reply};
use super::*;
use crate::config::{DetectConfig, RawDetect};

/// 2026-01-01T00:00:00Z.
const START: i64 = 1_767_225_600;

pub(super) fn at(seconds: i64) -> Timestamp {
    Timestamp::from_secs(START + seconds)
}

pub(super) fn config(detect: serde_json::Value) -> DetectConfig {
    let raw: RawDetect = serde_json::from_value(detect).unwrap();
    let mut mistakes = proto::settings::Mistakes::new();
    let config = raw.check(&mut mistakes);
    assert!(mistakes.is_empty(), "{:?}", mistakes.into_sorted());
    config
}

/// One rule on 404s without jitter.
fn simple(max_retry: u32, find_time: &str, ban_time: &str) -> DetectConfig {
    let rule = json!({"match": "Status(`404`)", "max_retry": max_retry, "find_time": find_time, "ban_time": ban_time});
    config(json!({"rules": {"r": rule}, "escalation": {"jitter": 0.0}}))
}

pub(super) fn event(client: &str, seconds: i64, status: u16) -> Event<'static> {
    let client = Ok(Client { addr: client.parse().unwrap(), via_proxy: false });
    Event { time: Some(at(seconds)), client, status, ..Event::default() }
}

struct Bench {
    engine: Engine,
    source: Source,
}

impl Bench {
    fn new(config: DetectConfig) -> Self {
        let mut engine = Engine::new(config.engine);
        let source = engine.open(&"n".into(), &"s".into(), None);
        Self { engine, source }
    }

    /// Feeds an event at its own time; the bans it leads to.
    fn feed(&mut self, event: &Event<'_>) -> Vec<Ban> {
        let now = event.time.unwrap_or_default();
        self.feed_at(event, now)
    }

    fn feed_at(&mut self, event: &Event<'_>, now: Timestamp) -> Vec<Ban> {
        self.engine.handle_timeout(now);
        self.engine.handle_event(self.source, event, now);
        self.told(EventType::Ban)
    }

    fn told(&mut self, kind: EventType) -> Vec<Ban> {
        let outputs = std::iter::from_fn(|| self.engine.poll_output());
        outputs
            .filter_map(
                |output| if let Output::Told(told, ban) = output { (told == kind).then_some(*ban) } else { None },
            )
            .collect()
    }

    fn command(&mut self, command: Command, seconds: i64) -> Result<Reply, Refusal> {
        self.engine.handle_command(command, at(seconds))
    }

    /// Feeds `count` 404s one second apart; the bans.
    fn storm(&mut self, client: &str, from: i64, count: i64) -> Vec<Ban> {
        (0..count).flat_map(|n| self.feed(&event(client, from + n, 404))).collect()
    }
}

#[test]
fn the_fifteenth_bad_request_in_a_minute_bans() {
    let mut bench = Bench::new(DetectConfig::default());
    assert!(bench.storm("192.0.2.1", 0, 14).is_empty());
    let bans = bench.feed(&event("192.0.2.1", 59, 404));
    let ban = &bans[0];
    assert_eq!((ban.rule.as_str(), ban.ban_count, ban.banned_at), ("forceful-browsing", 1, at(59)));
    assert_eq!((ban.evidence.failures, ban.evidence.first_seen), (15, Some(at(0))));
    assert_eq!(ban.evidence.statuses, BTreeMap::from([(404, 15)]));
    let length = ban.expires_at.unwrap().since(ban.banned_at);
    assert!((Duration::from_secs(600)..=Duration::from_secs(660)).contains(&length));
}

#[test]
fn a_ban_consumes_its_events_and_the_next_is_longer() {
    let mut bench = Bench::new(simple(3, "1m", "1m"));
    assert_eq!(bench.storm("192.0.2.1", 0, 3).len(), 1);
    // While banned nothing counts.
    assert!(bench.storm("192.0.2.1", 10, 10).is_empty());
    assert!(bench.storm("192.0.2.1", 62, 2).is_empty(), "the counter starts again at the end of the ban");
    let bans = bench.feed(&event("192.0.2.1", 64, 404));
    assert_eq!((bans[0].ban_count, bans[0].ban_seconds), (2, Some(120)));
}

#[test]
fn an_event_after_the_end_of_a_ban_that_was_found_later_still_counts() {
    let mut bench = Bench::new(simple(2, "10s", "1s"));
    for seconds in [100, 50, 51] {
        bench.feed_at(&event("192.0.2.1", seconds, 404), at(100));
    }
    assert_eq!(bench.feed_at(&event("192.0.2.1", 105, 404), at(105))[0].evidence.first_seen, Some(at(100)));
}

#[test]
fn an_event_at_the_end_of_a_ban_counts_again() {
    let mut bench = Bench::new(simple(1, "1m", "1m"));
    assert_eq!(bench.storm("192.0.2.1", 0, 1).len(), 1);
    assert!(bench.feed(&event("192.0.2.1", 59, 404)).is_empty());
    assert_eq!(bench.feed(&event("192.0.2.1", 60, 404)).len(), 1);
}

#[test]
fn ipv6_clients_are_counted_by_prefix_and_mapped_ones_as_ipv4() {
    let mut bench = Bench::new(simple(2, "1m", "1m"));
    assert!(bench.feed(&event("2001:db8::1", 0, 404)).is_empty());
    assert_eq!(bench.feed(&event("2001:db8::2:3", 1, 404))[0].target.to_string(), "2001:db8::/64");
    assert!(bench.feed(&event("::ffff:192.0.2.1", 2, 404)).is_empty());
    assert_eq!(bench.feed(&event("192.0.2.1", 3, 404))[0].target.to_string(), "192.0.2.1");
}

#[test]
fn late_events_never_ban_and_future_ones_are_cut() {
    let mut bench = Bench::new(simple(2, "1m", "1m"));
    let late = event("192.0.2.1", 0, 404);
    assert!(bench.feed_at(&late, at(3601)).is_empty());
    assert!(bench.feed_at(&late, at(3601)).is_empty());
    assert_eq!(bench.engine.stats().late, 2);
    assert!(bench.feed_at(&event("192.0.2.2", 9_000, 404), at(4000)).is_empty());
    let ban = &bench.feed_at(&event("192.0.2.2", 9_999, 404), at(4001))[0];
    assert_eq!((ban.banned_at, bench.engine.stats().future), (at(4001), 2));
}

#[test]
fn a_ban_that_is_over_when_found_counts_but_is_not_enforced() {
    let mut bench = Bench::new(simple(1, "1m", "1m"));
    assert!(bench.feed_at(&event("192.0.2.1", 0, 404), at(600)).is_empty());
    assert_eq!(bench.engine.sizes().0, 0);
    assert_eq!(bench.feed_at(&event("192.0.2.1", 600, 404), at(600))[0].ban_count, 2);
}

#[test]
fn one_event_may_complete_several_rules_and_the_latest_end_frees() {
    let rule = |condition: &str, ban_time: &str| json!({"match": condition, "max_retry": 1, "find_time": "1m", "ban_time": ban_time});
    let rules = json!({"a": rule("Status(`404`)", "1m"), "b": rule("Status(`400-499`)", "2m")});
    let mut bench = Bench::new(config(json!({"rules": rules, "escalation": {"jitter": "0%"}})));
    bench.engine.handle_event(bench.source, &event("192.0.2.1", 0, 404), at(0));
    let record = bench.engine.bans().next().unwrap().clone();
    assert_eq!(record.bans.iter().map(|ban| ban.rule.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    bench.engine.handle_timeout(at(60));
    assert_eq!(bench.engine.bans().next().unwrap().bans.len(), 1);
    bench.told(EventType::Ban);
    bench.engine.handle_timeout(at(120));
    assert_eq!((bench.engine.sizes().0, bench.told(EventType::Unban).len()), (0, 1));
}

#[test]
fn a_shadow_rule_leaves_no_trace() {
    let rule = json!({"match": "Status(`404`)", "max_retry": 2, "find_time": "1m", "ban_time": "1m", "mode": "shadow"});
    let mut bench = Bench::new(config(json!({"rules": {"r": rule}})));
    let mut shadows = 0;
    for n in 0..20 {
        bench.engine.handle_event(bench.source, &event("192.0.2.1", n, 404), at(n));
        shadows += std::iter::from_fn(|| bench.engine.poll_output()).filter(|o| matches!(o, Output::Shadow(_))).count();
    }
    assert_eq!(
        (shadows, bench.engine.sizes().0, bench.engine.sizes().2),
        (1, 0, 0),
        "banned once, as it would have been"
    );
}

#[test]
fn distinct_counts_different_values_only() {
    let rule =
        json!({"match": "Status(`404`)", "max_retry": 3, "find_time": "1m", "ban_time": "1m", "distinct": "path"});
    let mut bench = Bench::new(config(json!({"rules": {"r": rule}})));
    let path =
        |path: &'static str, n: i64| Event { text: Text { path, ..Text::default() }, ..event("192.0.2.1", n, 404) };
    for n in 0..10 {
        assert!(bench.feed(&path("/a", n)).is_empty());
    }
    assert!(bench.feed(&path("/b", 10)).is_empty());
    assert_eq!(bench.feed(&path("/c", 11))[0].evidence.paths, ["/a", "/b", "/c"]);
}

#[test]
fn a_rate_rule_bans_what_overflows() {
    let rule = json!({"match": "Status(`404`)", "rate": "1/10s", "burst": 3, "ban_time": "1m"});
    let mut bench = Bench::new(config(json!({"rules": {"r": rule}})));
    assert!(bench.storm("192.0.2.1", 0, 3).is_empty());
    assert_eq!(bench.storm("192.0.2.1", 3, 1).len(), 1);
    assert!((0..20).all(|n| bench.feed(&event("192.0.2.2", 100 + n * 10, 404)).is_empty()));
}

#[test]
fn who_may_not_be_banned_is_not_even_counted() {
    let mut bench = Bench::new(simple(1, "1m", "1m"));
    assert!(bench.storm("10.1.2.3", 0, 5).is_empty());
    assert_eq!(bench.engine.stats().exempt, 5);
    let refused =
        bench.command(Command::Ban { target: "10.0.0.0/16".parse().unwrap(), length: None, reason: String::new() }, 9);
    assert!(refused.unwrap_err().to_string().contains("10.0.0.0/8 is in never_ban"));
    let refused =
        bench.command(Command::Ban { target: "0.0.0.0/1".parse().unwrap(), length: None, reason: String::new() }, 9);
    assert_eq!(refused.unwrap_err().to_string(), "0.0.0.0/1 is too wide: an operator may name /16 or narrower");
}

#[test]
fn unban_frees_the_address_and_its_prefix_and_names_what_stays() {
    let mut bench = Bench::new(simple(3, "1m", "1m"));
    assert_eq!(bench.storm("2001:db8::1", 0, 3).len(), 1);
    let Reply::Unbanned(reply) = bench.command(Command::Unban(vec!["2001:db8::9".parse().unwrap()]), 5).unwrap() else {
        panic!()
    };
    assert_eq!(reply.lifted, ["2001:db8::/64".parse().unwrap()]);
    // What came before does not count any more, and the history starts again.
    assert!(bench.storm("2001:db8::1", 5, 2).is_empty());
    assert_eq!(bench.feed(&event("2001:db8::1", 8, 404))[0].ban_count, 1);

    let wide = "198.51.0.0/16".parse().unwrap();
    bench.command(Command::Ban { target: wide, length: None, reason: "x".into() }, 10).unwrap();
    let Reply::Unbanned(reply) = bench.command(Command::Unban(vec!["198.51.100.1".parse().unwrap()]), 11).unwrap()
    else {
        panic!()
    };
    assert_eq!(reply.covered[0].by, wide);
    assert_eq!(bench.engine.bans().count(), 2);
}

#[test]
fn allow_unbans_at_once_and_never_bans_again() {
    let mut bench = Bench::new(simple(1, "1m", "1h"));
    bench.storm("192.0.2.1", 0, 1);
    let Reply::Allowed(reply) = bench
        .command(Command::Allow { target: "192.0.2.0/24".parse().unwrap(), length: Some(Duration::from_secs(60)) }, 1)
        .unwrap()
    else {
        panic!()
    };
    assert_eq!(reply.lifted, ["192.0.2.1".parse().unwrap()]);
    assert!(bench.storm("192.0.2.1", 2, 5).is_empty());
    bench.engine.handle_timeout(at(61));
    assert_eq!(bench.storm("192.0.2.1", 62, 1).len(), 1, "the allowance has ended");
}

#[test]
fn a_pause_lifts_all_and_counts_nothing_and_resume_brings_bans_back() {
    let mut bench = Bench::new(simple(2, "1m", "1h"));
    bench.storm("192.0.2.1", 0, 2);
    bench.storm("192.0.2.2", 0, 1);
    bench.command(Command::Pause(Some(Duration::from_secs(30))), 5).unwrap();
    assert!(bench.engine.lists().paused.is_some());
    assert!(bench.storm("192.0.2.2", 6, 5).is_empty());
    bench.engine.handle_timeout(at(35));
    assert!(bench.engine.lists().paused.is_none());
    assert_eq!(bench.engine.bans().count(), 1, "the ban is still there");
    assert!(bench.feed(&event("192.0.2.2", 36, 404)).is_empty(), "nothing from before or during the pause counts");
    assert_eq!(bench.feed(&event("192.0.2.2", 37, 404)).len(), 1);
}

#[test]
fn a_name_that_resolves_to_a_banned_address_frees_it() {
    let mut bench = Bench::new(simple(1, "1m", "1h"));
    bench.storm("192.0.2.1", 0, 1);
    let addrs = vec!["192.0.2.1".parse().unwrap()];
    bench.command(Command::Resolved { name: "home.example".into(), addrs }, 1).unwrap();
    assert_eq!(bench.engine.bans().count(), 0);
}

#[test]
fn memory_bounds_bite_visibly() {
    let mut limited = simple(2, "1m", "1h");
    limited.engine.tracked_clients_max = 2;
    limited.engine.offenders_max = 1;
    let mut bench = Bench::new(limited);
    let mut alarms = Vec::new();
    for n in 1..=3 {
        bench.engine.handle_event(bench.source, &event(&format!("192.0.2.{n}"), n, 404), at(n));
    }
    alarms.extend(std::iter::from_fn(|| bench.engine.poll_output()).filter(|o| matches!(o, Output::Alarm { .. })));
    assert_eq!((bench.engine.stats().evicted_clients, alarms.len(), bench.engine.sizes().1), (1, 1, 2));
    // The oldest was dropped, so its second event is its first again.
    assert!(bench.feed(&event("192.0.2.1", 4, 404)).is_empty());
    assert_eq!(bench.feed(&event("192.0.2.3", 5, 404)).len(), 1);
    bench.storm("198.51.100.1", 6, 2);
    assert_eq!((bench.engine.stats().evicted_offenders, bench.engine.sizes().2), (1, 1));
}

#[test]
fn a_reload_keeps_the_windows_of_rules_that_count_alike() {
    let mut bench = Bench::new(simple(3, "1m", "1m"));
    bench.storm("192.0.2.1", 0, 2);
    let mut longer = simple(3, "1m", "5m");
    longer.engine.rules.insert(0, simple(9, "1m", "1m").engine.rules[0].clone());
    longer.engine.rules[0].name = "new".into();
    bench.command(Command::Reload { config: Box::new(longer.engine), names: vec![] }, 2).unwrap();
    assert_eq!(bench.feed(&event("192.0.2.1", 3, 404))[0].ban_seconds, Some(300));
    bench.storm("192.0.2.2", 10, 2);
    bench.command(Command::Reload { config: Box::new(simple(4, "1m", "1m").engine), names: vec![] }, 12).unwrap();
    assert!(bench.storm("192.0.2.2", 13, 3).is_empty(), "a rule that counts otherwise starts anew");
}

#[test]
fn explain_tells_how_far_a_client_is() {
    let mut bench = Bench::new(simple(5, "1m", "10m"));
    bench.storm("192.0.2.1", 0, 3);
    let reply = bench.engine.explain("192.0.2.1".parse().unwrap(), at(10));
    assert_eq!((reply.rules[0].counted, reply.rules[0].needed, reply.bans.len()), (3, 5, 0));
    assert_eq!(bench.engine.explain("192.0.2.1".parse().unwrap(), at(62)).rules[0].counted, 1);
    bench.storm("192.0.2.1", 10, 2);
    let reply = bench.engine.explain("192.0.2.1".parse().unwrap(), at(12));
    assert_eq!((reply.bans.len(), reply.rules[0].ban_count, reply.rules[0].next_ban_seconds), (1, 1, 1200));
}

#[test]
fn a_rate_rule_takes_a_request_that_is_logged_late_for_one_request() {
    let rule = json!({"match": "Status(`404`)", "rate": "10/s", "burst": 20, "ban_time": "1m"});
    let mut bench = Bench::new(config(json!({"rules": {"r": rule}})));
    assert!(bench.feed(&event("192.0.2.1", 60, 404)).is_empty());
    assert!(bench.feed_at(&event("192.0.2.1", 0, 404), at(60)).is_empty(), "a long download of the same client");
}

#[test]
fn a_proxy_that_becomes_trusted_is_freed_and_counted_no_more() {
    let mut bench = Bench::new(simple(2, "1m", "1h"));
    bench.storm("192.0.2.1", 0, 2);
    let mut trusting = simple(2, "1m", "1h");
    trusting.engine.trusted_proxies = NetSet::new(["192.0.2.0/24".parse().unwrap()]);
    bench.command(Command::Reload { config: Box::new(trusting.engine), names: vec![] }, 2).unwrap();
    assert_eq!(bench.engine.bans().count(), 0);
    assert!(bench.engine.lists().never_ban.contains(&"192.0.2.0/24".parse().unwrap()), "firewalls let it through");
    assert!(bench.storm("192.0.2.1", 3, 5).is_empty(), "batches on their way may still name it");
}

#[test]
fn a_shortened_order_does_not_leave_a_client_immune() {
    let mut bench = Bench::new(simple(2, "1m", "1h"));
    let order = |length| Command::Ban { target: "192.0.2.1".parse().unwrap(), length, reason: String::new() };
    bench.command(order(None), 0).unwrap();
    bench.command(order(Some(Duration::from_secs(60))), 1).unwrap();
    bench.engine.handle_timeout(at(61));
    bench.told(EventType::Ban);
    assert_eq!(bench.storm("192.0.2.1", 61, 2).len(), 1);
}

#[test]
fn a_ban_that_a_list_lifted_leaves_nobody_immune() {
    let mut bench = Bench::new(simple(1, "1m", "1d"));
    let resolved = |addr: &str| Command::Resolved { name: "home.example".into(), addrs: vec![addr.parse().unwrap()] };
    bench.storm("192.0.2.1", 0, 1);
    bench.command(resolved("192.0.2.1"), 1).unwrap();
    assert_eq!(bench.engine.bans().count(), 0);
    bench.command(resolved("198.51.100.1"), 2).unwrap();
    assert_eq!(bench.storm("192.0.2.1", 3, 1).len(), 1);
}

#[test]
fn nobody_stays_banned_without_a_history() {
    let mut limited = simple(1, "1m", "1h");
    limited.engine.offenders_max = 2;
    let mut bench = Bench::new(limited);
    (1..=4).for_each(|n| assert_eq!(bench.storm(&format!("192.0.2.{n}"), n, 1).len(), 1));
    let banned: Vec<String> = bench.engine.bans().map(|record| record.target.to_string()).collect();
    assert_eq!((bench.engine.sizes().2, banned), (2, vec!["192.0.2.3".to_owned(), "192.0.2.4".to_owned()]));
}

#[test]
fn an_order_that_would_free_half_of_the_internet_is_refused() {
    let mut bench = Bench::new(simple(1, "1m", "1h"));
    let refused = bench.command(Command::Allow { target: "0.0.0.0/0".parse().unwrap(), length: None }, 0);
    assert!(matches!(refused, Err(Refusal::TooWide { .. })));
}

#[test]
fn bans_hold_after_the_clock_was_set_back() {
    let mut bench = Bench::new(simple(1, "1m", "10m"));
    bench.storm("192.0.2.1", 3600, 1);
    bench.engine.handle_clock_set_back(at(1800));
    assert_eq!(bench.storm("192.0.2.2", 1800, 1).len(), 1);
    assert_eq!(bench.engine.bans().count(), 2);
}

#[test]
fn times_at_the_end_of_time_do_no_harm() {
    let mut bench = Bench::new(simple(2, "1m", "1h"));
    for time in [Timestamp::MAX, Timestamp::from_nanos(i64::MIN), Timestamp::EPOCH] {
        let event = Event { time: Some(time), ..event("192.0.2.1", 0, 404) };
        bench.engine.handle_event(bench.source, &event, Timestamp::MAX);
        bench.engine.handle_timeout(Timestamp::MAX);
    }
}

#[test]
fn a_new_line_that_overtakes_an_old_one_after_a_restart_still_bans() {
    let config = simple(2, "1m", "1h");
    let span = |generation, start, end| FileSpan { generation, start, end };
    let mut engine = Engine::new(config.engine.clone());
    let old = engine.open(&"n".into(), &"s".into(), Some(1));
    engine.handle_event(old, &event("192.0.2.1", 0, 404), at(0));
    engine.close(old, span(1, 0, 10));
    let mut engine = Engine::restore(config.engine, engine.snapshot(), at(5));
    let (old, new) = (engine.open(&"n".into(), &"s".into(), Some(1)), engine.open(&"n".into(), &"s".into(), Some(2)));
    engine.handle_event(new, &event("192.0.2.1", 6, 404), at(6));
    assert_eq!(engine.sizes().0, 0);
    engine.handle_event(old, &event("192.0.2.1", 0, 404), at(6));
    assert_eq!(engine.bans().next().unwrap().bans[0].banned_at, at(6));
}

/// A ban as the model sees it: client, rule, moment in seconds, count, length in seconds.
type ModelBan = (u8, &'static str, i64, u32, i64);

struct ModelRule {
    name: &'static str,
    matches: fn(u16) -> bool,
    max_retry: usize,
    find: i64,
    ban: i64,
}

const MODEL_RULES: [ModelRule; 2] = [
    ModelRule { name: "a", matches: |status| status == 404, max_retry: 3, find: 20, ban: 15 },
    ModelRule { name: "b", matches: |status| status >= 400, max_retry: 5, find: 60, ban: 30 },
];

/// Everything by looping over everything, in order of time.
fn brute_force(events: &[(u8, i64, u16)]) -> Vec<ModelBan> {
    let mut bans: Vec<ModelBan> = Vec::new();
    // Events that came while their client was banned, and up to which event each rule has used up each client's.
    let mut void = vec![false; events.len()];
    let mut used: BTreeMap<(u8, &str), usize> = BTreeMap::new();
    for (i, &(client, time, status)) in events.iter().enumerate() {
        void[i] = bans.iter().any(|ban| ban.0 == client && time < ban.2 + ban.4);
        if void[i] {
            continue;
        }
        for rule in MODEL_RULES.iter().filter(|rule| (rule.matches)(status)) {
            let first = used.get(&(client, rule.name)).copied().unwrap_or(0);
            let counts = |j: &usize| {
                let (other, when, status) = events[*j];
                other == client && (rule.matches)(status) && !void[*j] && time - when <= rule.find
            };
            if (first..=i).filter(counts).count() >= rule.max_retry {
                used.insert((client, rule.name), i + 1);
                let former = bans.iter().filter(|ban| ban.0 == client && ban.1 == rule.name).count() as u32;
                bans.push((client, rule.name, time, former + 1, rule.ban << former.min(20)));
            }
        }
    }
    bans
}

fn model_config() -> DetectConfig {
    let rule = |condition: &str, rule: &ModelRule| {
        let (find, ban) = (format!("{}s", rule.find), format!("{}s", rule.ban));
        json!({"match": condition, "max_retry": rule.max_retry, "find_time": find, "ban_time": ban})
    };
    let rules = json!({"a": rule("Status(`404`)", &MODEL_RULES[0]), "b": rule("Status(`400-599`)", &MODEL_RULES[1])});
    config(json!({"rules": rules, "escalation": {"jitter": 0.0, "max": "365d", "forget_after": "365d"}}))
}

fn run_model(events: &[(u8, i64, u16)]) -> Vec<ModelBan> {
    let mut bench = Bench::new(model_config());
    let mut bans = Vec::new();
    for &(client, time, status) in events {
        bench.engine.handle_timeout(at(time));
        bench.engine.handle_event(bench.source, &event(&format!("192.0.2.{client}"), time, status), at(time));
        while let Some(output) = bench.engine.poll_output() {
            if let Output::Told(EventType::Ban | EventType::Extend, ban) = output {
                let rule = MODEL_RULES.iter().find(|rule| rule.name == ban.rule).unwrap();
                let seconds = ban.banned_at.since(at(0)).as_secs() as i64;
                bans.push((client, rule.name, seconds, ban.ban_count, ban.ban_seconds.unwrap() as i64));
            }
        }
    }
    bans
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn the_engine_bans_exactly_whom_the_model_bans(
        steps in prop::collection::vec((0u8..3, 0i64..12, prop::sample::select(vec![200u16, 404, 404, 500])), 0..120),
    ) {
        let mut time = 0;
        let events: Vec<_> = steps.iter().map(|&(client, wait, status)| { time += wait; (client, time, status) }).collect();
        prop_assert_eq!(run_model(&events), brute_force(&events));
    }

    #[test]
    fn whether_a_client_is_ever_banned_does_not_depend_on_the_order(
        events in prop::collection::vec((0u8..3, 0i64..200), 1..60).prop_flat_map(|events| (Just(events.clone()), Just(events).prop_shuffle())),
        max_retry in 1u32..6,
    ) {
        let ever = |events: &[(u8, i64)]| {
            let mut bench = Bench::new(simple(max_retry, "30s", "1d"));
            for &(client, time) in events {
                bench.engine.handle_event(bench.source, &event(&format!("192.0.2.{client}"), time, 404), at(1000));
            }
            bench.told(EventType::Ban).iter().map(|ban| ban.target).collect::<std::collections::BTreeSet<_>>()
        };
        prop_assert_eq!(ever(&events.0), ever(&events.1));
    }
}
