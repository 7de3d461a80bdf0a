//! A second opinion: what `replay` must answer, counted by brute force from the lines themselves.
//!
//! It shares no code with ingest and detect: its own dates, its own client rule, its own conditions, and for every event
//! a look at every earlier one. It knows only what the sample and the generated logs need: Traefik JSON, Cloudflare as
//! trusted proxy, rules on status, path and user name, escalation by a whole factor, no jitter, no late lines.

use std::collections::BTreeMap;
use std::net::IpAddr;

use proto::net::NamedSet;
use serde_json::Value;

use crate::access::{SECOND, render_time};

/// What the model knows of a line.
#[derive(Clone, Debug)]
pub struct Line {
    /// Nanoseconds since the epoch.
    pub time: i64,
    /// Who asked; `None` where nobody can be held responsible.
    pub client: Option<IpAddr>,
    /// Status sent to the client.
    pub status: u64,
    /// Without the query.
    pub path: String,
    /// `-` when no credentials were sent.
    pub username: String,
}

/// A rule, as the model sees it and as a configuration writes it.
#[derive(Clone, Debug)]
pub struct Rule {
    /// Its name.
    pub name: &'static str,
    /// The condition in the rule language.
    pub condition: &'static str,
    /// The same condition by hand.
    pub matches: fn(&Line) -> bool,
    /// Events that make a ban.
    pub max_retry: usize,
    /// Longest span of these events, in nanoseconds.
    pub find: i64,
    /// Length of the first ban, in nanoseconds.
    pub ban: i64,
}

/// Lengths of further bans.
#[derive(Clone, Copy, Debug)]
pub struct Escalation {
    /// Each ban is this many times as long as the one before.
    pub factor: i64,
    /// The longest ban, in nanoseconds.
    pub max: i64,
    /// An offender is new again this long after the end of the last ban, in nanoseconds.
    pub forget_after: i64,
}

impl Default for Escalation {
    fn default() -> Self {
        Self { factor: 2, max: 7 * 86_400 * SECOND, forget_after: 14 * 86_400 * SECOND }
    }
}

/// One ban, with the keys and the number formats of `replay --json`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ban {
    /// RFC 3339 with milliseconds, as all times here.
    pub banned_at: String,
    /// Address, or /64.
    pub target: String,
    /// Name of the rule.
    pub rule: String,
    /// When it ends.
    pub expires_at: String,
    /// 1 for the first.
    pub ban_count: u64,
    /// Events that it consumed.
    pub failures: u64,
    /// Oldest of them.
    pub first_seen: String,
    /// Newest of them.
    pub last_seen: String,
}

impl Ban {
    /// From a line of `replay --json`; `None` where a key is missing.
    pub fn parse(line: &str) -> Option<Self> {
        let value: Value = serde_json::from_str(line).ok()?;
        let text = |key: &str| value.get(key)?.as_str().map(str::to_owned);
        let number = |key: &str| value.get(key)?.as_u64();
        Some(Self {
            banned_at: text("banned_at")?,
            target: text("target")?,
            rule: text("rule")?,
            expires_at: text("expires_at")?,
            ban_count: number("ban_count")?,
            failures: number("failures")?,
            first_seen: text("first_seen")?,
            last_seen: text("last_seen")?,
        })
    }
}

/// The two rules that are on without a configuration.
pub fn built_in_rules() -> Vec<Rule> {
    const MEDIA: [&str; 9] = [".png", ".txt", ".jpg", ".ico", ".js", ".css", ".ttf", ".woff", ".woff2"];
    vec![
        Rule {
            name: "auth-brute-force",
            condition: "Status(`401`) && !Username(`-`)",
            matches: |line| line.status == 401 && line.username != "-",
            max_retry: 10,
            find: 600 * SECOND,
            ban: 600 * SECOND,
        },
        Rule {
            name: "forceful-browsing",
            condition: r"Status(`401-405`) && !PathRegexp(`\.(png|txt|jpg|ico|js|css|ttf|woff2?)/*$`)",
            matches: |line| {
                let path = line.path.trim_end_matches('/');
                (401..=405).contains(&line.status) && !MEDIA.iter().any(|end| path.ends_with(end))
            },
            max_retry: 15,
            find: 60 * SECOND,
            ban: 600 * SECOND,
        },
    ]
}

/// Every ban that `rules` decide on `lines`, which come in the order of the stream. Sorted by moment.
pub fn bans(lines: &[Line], rules: &[Rule], escalation: Escalation) -> Vec<Ban> {
    let mut clients: BTreeMap<String, Client> = BTreeMap::new();
    let mut bans = Vec::new();
    for line in lines {
        let Some(addr) = line.client.filter(|addr| !never_banned(*addr)) else {
            continue;
        };
        let target = target(addr);
        let client = clients.entry(target.clone()).or_default();
        if line.time < client.free_at {
            continue;
        }
        let mut free_at = client.free_at;
        for rule in rules.iter().filter(|rule| (rule.matches)(line)) {
            let counted = client.counted.entry(rule.name).or_default();
            counted.push(line.time);
            let Some((first, last)) = consume(counted, rule) else {
                continue;
            };
            let history = client.history.entry(rule.name).or_insert((0, 0));
            if last - history.1 > escalation.forget_after {
                history.0 = 0;
            }
            let length = (0..history.0).fold(rule.ban, |length, _| (length * escalation.factor).min(escalation.max));
            let end = last + length.min(escalation.max);
            *history = (history.0 + 1, end);
            free_at = free_at.max(end);
            bans.push(Ban {
                banned_at: millis(last),
                target: target.clone(),
                rule: rule.name.to_owned(),
                expires_at: millis(end),
                ban_count: history.0,
                failures: u64::try_from(rule.max_retry).unwrap_or(u64::MAX),
                first_seen: millis(first),
                last_seen: millis(last),
            });
        }
        client.free_at = free_at;
    }
    bans.sort();
    bans
}

#[derive(Default)]
struct Client {
    /// End of the newest ban: an event of an earlier time that comes now counts for no rule.
    free_at: i64,
    /// Times of matching events that no ban has consumed, by rule.
    counted: BTreeMap<&'static str, Vec<i64>>,
    /// Bans so far and the end of the last one, by rule.
    history: BTreeMap<&'static str, (u64, i64)>,
}

/// Takes the newest `max_retry` events that lie close enough together, and says when they began and ended.
fn consume(counted: &mut Vec<i64>, rule: &Rule) -> Option<(i64, i64)> {
    counted.sort_unstable();
    let start = counted.windows(rule.max_retry).rposition(|w| w[w.len() - 1] - w[0] <= rule.find)?;
    let consumed: Vec<i64> = counted.drain(start..start + rule.max_retry).collect();
    Some((*consumed.first()?, *consumed.last()?))
}

fn millis(nanos: i64) -> String {
    format!("{}Z", &render_time(nanos)[..23])
}

/// The lines of several logs as one stream, by time; lines of one moment stay in the order of their files.
pub fn merge(logs: &[String]) -> Vec<Line> {
    let mut lines: Vec<Line> = logs.iter().flat_map(|log| log.lines().filter_map(parse)).collect();
    lines.sort_by_key(|line| line.time);
    lines
}

/// An access entry of Traefik JSON; `None` for anything else.
pub fn parse(line: &str) -> Option<Line> {
    let value: Value = serde_json::from_str(line).ok()?;
    let text = |key: &str| value.get(key).and_then(Value::as_str).filter(|text| !text.is_empty());
    let peer = peer(text("ClientAddr")?)?;
    let cloudflare = from_cloudflare(peer);
    let client = match text("request_Cf-Connecting-Ip") {
        _ if !cloudflare => Some(peer),
        Some(visitor) => visitor.parse().ok(),
        None => text("ClientHost")?
            .rsplit(',')
            .map_while(|element| element.trim().parse().ok())
            .find(|addr| *addr != peer && !from_cloudflare(*addr)),
    };
    let path = text("RequestPath")?;
    Some(Line {
        time: parse_time(text("StartUTC")?)?,
        client,
        status: value.get("DownstreamStatus")?.as_u64()?,
        path: path.split('?').next().unwrap_or(path).to_owned(),
        username: text("ClientUsername").unwrap_or("-").to_owned(),
    })
}

fn peer(text: &str) -> Option<IpAddr> {
    let (host, _port) = text.rsplit_once(':')?;
    host.trim_start_matches('[').trim_end_matches(']').parse().ok()
}

/// Address as a number and the bits of its family.
fn bits(addr: IpAddr) -> (u128, u8) {
    match addr {
        IpAddr::V4(addr) => (u128::from(addr.to_bits()), 32),
        IpAddr::V6(addr) => (addr.to_bits(), 128),
    }
}

/// Whether `addr` is in a published list. Only the list is shared with the program, not the look-up.
fn listed(set: NamedSet, addr: IpAddr) -> bool {
    let (number, width) = bits(addr);
    set.nets().iter().any(|net| {
        let (base, net_width) = bits(net.addr());
        let shift = u32::from(width - net.prefix_len().min(width));
        net_width == width && number.checked_shr(shift).unwrap_or(0) == base.checked_shr(shift).unwrap_or(0)
    })
}

fn from_cloudflare(addr: IpAddr) -> bool {
    listed(NamedSet::Cloudflare, addr)
}

fn never_banned(addr: IpAddr) -> bool {
    from_cloudflare(addr) || listed(NamedSet::Private, addr)
}

/// What a client is counted and banned by.
pub fn target(addr: IpAddr) -> String {
    match addr {
        IpAddr::V4(addr) => addr.to_string(),
        IpAddr::V6(addr) => format!("{}/64", std::net::Ipv6Addr::from_bits(addr.to_bits() >> 64 << 64)),
    }
}

/// Nanoseconds of an RFC 3339 time in UTC, by counting days.
fn parse_time(text: &str) -> Option<i64> {
    let number = |from: usize, to: usize| text.get(from..to)?.parse::<i64>().ok();
    let (year, month, day) = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
    let leap = |year: i64| year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let february = if leap(year) { 29 } else { 28 };
    let months = [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let days = (1970..year).map(|year| if leap(year) { 366 } else { 365 }).sum::<i64>()
        + months.iter().take(usize::try_from(month - 1).ok()?).sum::<i64>()
        + day
        - 1;
    let seconds = days * 86_400 + number(11, 13)? * 3_600 + number(14, 16)? * 60 + number(17, 19)?;
    let fraction = text.get(19..)?.strip_suffix('Z')?.trim_start_matches('.');
    let nanos = format!("{fraction:0<9}").parse::<i64>().ok()?;
    Some(seconds * SECOND + nanos)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::Access;
    use crate::sample;

    fn rule() -> Vec<Rule> {
        vec![Rule {
            name: "r",
            condition: "Status(`404`)",
            matches: |line| line.status == 404,
            max_retry: 3,
            find: 10 * SECOND,
            ban: 20 * SECOND,
        }]
    }

    fn moments(times: &[i64]) -> Vec<(i64, i64, u64)> {
        let lines: Vec<Line> = times
            .iter()
            .map(|time| Access::new(sample::BEGIN + time, sample::SCANNER, 404, "/").render_json())
            .filter_map(|line| parse(&line))
            .collect();
        let since = |text: &str| parse_time(text).unwrap() - sample::BEGIN;
        bans(&lines, &rule(), Escalation::default())
            .iter()
            .map(|ban| (since(&ban.banned_at) / SECOND, since(&ban.expires_at) / SECOND, ban.ban_count))
            .collect()
    }

    #[test]
    fn dates_are_counted_and_written_alike() {
        for text in
            ["2026-03-02T08:00:00.123456789Z", "2000-02-29T23:59:59.000000000Z", "1970-01-01T00:00:00.000000001Z"]
        {
            assert_eq!(render_time(parse_time(text).unwrap()), text);
        }
    }

    #[test]
    fn a_window_is_inclusive_and_a_ban_consumes_it() {
        assert_eq!(moments(&[0, 5 * SECOND, 10 * SECOND]), [(10, 30, 1)]);
        assert_eq!(moments(&[0, 5 * SECOND, 10 * SECOND + 1]), []);
        // What follows within the ban counts for nothing, from its end on it does.
        let s = SECOND;
        assert_eq!(moments(&[0, 5 * s, 10 * s, 29 * s, 30 * s, 31 * s]), [(10, 30, 1)]);
        assert_eq!(moments(&[0, 5 * s, 10 * s, 30 * s, 31 * s, 32 * s]), [(10, 30, 1), (32, 72, 2)]);
    }

    #[test]
    fn the_client_is_who_the_peer_allows_it_to_be() {
        let client = |peer: &str, chain: Option<&str>, cf: Option<&str>| {
            let mut access = Access::new(0, peer.parse().unwrap(), 404, "/");
            access.forwarded_for = chain.map(str::to_owned);
            access.cf_connecting_ip = cf.map(str::to_owned);
            parse(&access.render_json()).unwrap().client.map(|addr| addr.to_string())
        };
        assert_eq!(client("192.0.2.1", Some("192.0.2.9"), Some("192.0.2.9")).as_deref(), Some("192.0.2.1"));
        assert_eq!(client("172.71.0.1", Some("192.0.2.8,192.0.2.9"), None).as_deref(), Some("192.0.2.9"));
        assert_eq!(client("172.71.0.1", Some("192.0.2.8"), Some("192.0.2.9")).as_deref(), Some("192.0.2.9"));
        assert_eq!(client("172.71.0.1", None, None), None);
        assert_eq!(client("2001:db8::1", None, None).as_deref(), Some("2001:db8::1"));
    }

    #[test]
    fn the_sample_holds_whom_it_says() {
        let lines = merge(&[sample::render_json_log()]);
        let bans = bans(&lines, &built_in_rules(), Escalation::default());
        let banned: Vec<(&str, &str, u64)> =
            bans.iter().map(|ban| (ban.target.as_str(), ban.rule.as_str(), ban.ban_count)).collect();
        assert_eq!(
            banned,
            [
                ("203.0.113.66", "forceful-browsing", 1),
                ("2001:db8:66:1::/64", "forceful-browsing", 1),
                ("203.0.113.140", "forceful-browsing", 1),
                ("198.51.100.23", "auth-brute-force", 1),
                ("203.0.113.66", "forceful-browsing", 2),
            ]
        );
    }
}
