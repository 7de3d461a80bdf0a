//! Events and records as examples for readers, made by the constructors that make the real ones.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::ban::{Ban, BanRecord, Evidence, Origin};
use crate::envelope::{CloudEvent, EventType};
use crate::net::Target;
use crate::subject::OPERATOR;
use crate::time::Timestamp;

/// 2026-01-08T14:19:15.980Z.
const MOMENT: Timestamp = Timestamp::from_millis(1_767_881_955_980);
const NODE: &str = "detect-1";

/// One event of each kind and of each shape that `data` takes, with what it shows.
pub(super) fn events() -> Vec<(&'static str, CloudEvent)> {
    let of = |kind, ban: &Ban| CloudEvent::of_ban(NODE, kind, ban, MOMENT);
    let lifted = Ban { reason: "unban by an operator".to_owned(), ..by_rule() };
    let text = "9 of 10 requests come from 192.0.2.7, which is no trusted proxy: visitors hide behind it".to_owned();
    vec![
        ("a ban by a rule", of(EventType::Ban, &by_rule())),
        ("a permanent ban of an IPv6 network by an operator", of(EventType::Ban, &permanent())),
        ("a ban of a client behind a proxy", of(EventType::Ban, &behind_proxy())),
        ("a further ban of a banned target", of(EventType::Extend, &behind_proxy())),
        ("the end of a ban", of(EventType::Unban, &lifted)),
        ("an alarm", CloudEvent::of_alarm(NODE, "visitors-behind-proxy", text, MOMENT)),
    ]
}

/// Records with one ban, with none that ends, and with several.
pub(super) fn records() -> Vec<(&'static str, BanRecord)> {
    let several = vec![Ban { target: by_rule().target, ..behind_proxy() }, by_rule()];
    vec![
        ("one ban", BanRecord { target: by_rule().target, bans: vec![by_rule()] }),
        ("a permanent ban", BanRecord { target: permanent().target, bans: vec![permanent()] }),
        ("two rules at once", BanRecord { target: by_rule().target, bans: several }),
    ]
}

fn by_rule() -> Ban {
    Ban {
        target: Target::host(IpAddr::V4(Ipv4Addr::new(203, 0, 113, 66))),
        rule: "forceful-browsing".to_owned(),
        origin: Origin::Detect,
        ban_count: 2,
        ban_seconds: Some(1_260),
        banned_at: MOMENT,
        expires_at: Some(Timestamp::from_millis(MOMENT.as_millis() + 1_260_000)),
        reason: "15 requests within 1m (14 x status 404, 1 x status 405)".to_owned(),
        evidence: Evidence {
            failures: 15,
            first_seen: Some(Timestamp::from_millis(MOMENT.as_millis() - 42_000)),
            last_seen: Some(MOMENT),
            nodes: vec!["edge-1".to_owned(), "edge-2".to_owned()],
            hosts: vec!["shop.example".to_owned()],
            statuses: BTreeMap::from([(404, 14), (405, 1)]),
            paths: vec!["/wp-login.php".to_owned(), "/.env".to_owned()],
            user_agents: vec!["curl/8.5.0".to_owned()],
            via_proxy: false,
        },
    }
}

fn behind_proxy() -> Ban {
    let evidence =
        Evidence { statuses: BTreeMap::from([(401, 10)]), failures: 10, via_proxy: true, ..by_rule().evidence };
    Ban {
        target: Target::host(IpAddr::V4(Ipv4Addr::new(198, 51, 100, 23))),
        rule: "auth-brute-force".to_owned(),
        ban_count: 1,
        ban_seconds: Some(600),
        expires_at: Some(Timestamp::from_millis(MOMENT.as_millis() + 600_000)),
        reason: "10 requests within 10m (10 x status 401)".to_owned(),
        evidence,
        ..by_rule()
    }
}

fn permanent() -> Ban {
    Ban {
        target: Target::new(IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0xbad, 0, 0, 0, 0, 0)), 64),
        rule: OPERATOR.to_owned(),
        origin: Origin::Operator,
        ban_count: 1,
        ban_seconds: None,
        banned_at: MOMENT,
        expires_at: None,
        reason: "credential stuffing".to_owned(),
        evidence: Evidence::default(),
    }
}
