//! What is told: one event, or a digest of many; and the values that templates write. Pure.

use std::collections::BTreeMap;
use std::fmt::Display;

use proto::ban::Ban;
use proto::envelope::{CloudEvent, Data, EventType};
use proto::time::{Timestamp, render_duration};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::notify::digest::Digest;
use crate::notify::template::{Escape, Template, Values};

/// Entries of a list that are written.
const LISTED_MAX: usize = 5;
/// Characters of one entry that are written. What a client chose may be long.
const ENTRY_CHARS_MAX: usize = 120;
/// Characters of a reason or an alarm.
const REASON_CHARS_MAX: usize = 600;

/// What may be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EventKind {
    /// Somebody is banned.
    Banned,
    /// Somebody banned got a further ban.
    Extended,
    /// A ban has ended or was lifted.
    Unbanned,
    /// The service has started.
    Started,
    /// The service has stopped.
    Stopped,
    /// Something needs a person.
    Alarm,
}

impl EventKind {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Banned, Self::Extended, Self::Unbanned, Self::Started, Self::Stopped, Self::Alarm];

    /// The word in configurations and messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Banned => "banned",
            Self::Extended => "extended",
            Self::Unbanned => "unbanned",
            Self::Started => "started",
            Self::Stopped => "stopped",
            Self::Alarm => "alarm",
        }
    }

    /// The kind of a public event.
    pub(crate) fn of(event: &CloudEvent) -> Self {
        match event.kind {
            EventType::Ban => Self::Banned,
            EventType::Extend => Self::Extended,
            EventType::Unban => Self::Unbanned,
            EventType::Alarm => Self::Alarm,
        }
    }
}

/// Of the service itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Life {
    pub(crate) node: String,
    pub(crate) time: Timestamp,
}

/// One thing to tell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Notice {
    Event(Box<CloudEvent>),
    Started(Life),
    Stopped(Life),
}

impl Notice {
    pub(crate) fn kind(&self) -> EventKind {
        match self {
            Self::Event(event) => EventKind::of(event),
            Self::Started(_) => EventKind::Started,
            Self::Stopped(_) => EventKind::Stopped,
        }
    }

    pub(crate) fn time(&self) -> Timestamp {
        match self {
            Self::Event(event) => event.time,
            Self::Started(life) | Self::Stopped(life) => life.time,
        }
    }

    /// The same for a repetition.
    pub(crate) fn id(&self) -> String {
        match self {
            Self::Event(event) => event.id.clone(),
            Self::Started(life) | Self::Stopped(life) => {
                format!("{}/{}/{}", self.kind().as_str(), life.node, life.time.as_nanos())
            }
        }
    }

    /// Where it was decided.
    pub(crate) fn node(&self) -> &str {
        match self {
            Self::Event(event) => event.source.strip_prefix("portcullis/").unwrap_or(&event.source),
            Self::Started(life) | Self::Stopped(life) => &life.node,
        }
    }
}

/// One message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Message {
    One(Notice),
    Many(Digest),
}

impl Message {
    /// How many events it tells.
    pub(crate) fn count(&self) -> u64 {
        match self {
            Self::One(_) => 1,
            Self::Many(digest) => digest.total,
        }
    }

    /// The message as a CloudEvent: the public event itself where it is one. Digests, and what is told of the service, are
    /// of types of their own.
    pub(crate) fn cloud_event(&self) -> Value {
        let (kind, source, data) = match self {
            // Strings, numbers and maps with string keys only: this cannot fail.
            Self::One(Notice::Event(event)) => return serde_json::to_value(event).unwrap_or_default(),
            Self::One(notice) => {
                let data = json!({"node": notice.node(), "version": env!("CARGO_PKG_VERSION")});
                (notice.kind().as_str(), format!("portcullis/{}", notice.node()), data)
            }
            Self::Many(digest) => {
                let data = json!({"since": digest.since, "until": digest.until, "total": digest.total,
                    "counts": digest.counts, "rules": digest.rules, "targets": digest.targets, "hosts": digest.hosts,
                    "nodes": digest.nodes, "alarms": digest.alarms});
                ("digest", "portcullis".to_owned(), data)
            }
        };
        json!({"specversion": "1.0", "id": self.id(), "source": source, "type": format!("io.portcullis.{kind}.v1"),
            "time": self.time(), "subject": kind, "datacontenttype": "application/json", "data": data})
    }

    fn id(&self) -> String {
        match self {
            Self::One(notice) => notice.id(),
            Self::Many(digest) => format!("digest/{}/{}", digest.total, digest.first_id),
        }
    }

    fn time(&self) -> Timestamp {
        match self {
            Self::One(notice) => notice.time(),
            Self::Many(digest) => digest.until,
        }
    }

    /// The word for it: a kind, or `digest`.
    pub(crate) fn word(&self) -> &'static str {
        match self {
            Self::One(notice) => notice.kind().as_str(),
            Self::Many(_) => "digest",
        }
    }

    /// What templates may ask for; all but `{text}`, which is a template's work itself.
    pub(crate) fn values(&self, look_up: &Template) -> Values {
        let mut values = Values::from([
            ("event", self.word().to_owned()),
            ("id", self.id()),
            ("time", self.time().to_string()),
            ("version", env!("CARGO_PKG_VERSION").to_owned()),
        ]);
        match self {
            Self::One(notice) => {
                values.insert("node", notice.node().to_owned());
                values.insert("title", title(notice));
                if let Notice::Event(event) = notice {
                    add_event(&mut values, event, look_up);
                }
            }
            Self::Many(digest) => add_digest(&mut values, digest),
        }
        values
    }
}

fn title(notice: &Notice) -> String {
    match notice {
        Notice::Started(life) => format!("Portcullis started on {}", life.node),
        Notice::Stopped(life) => format!("Portcullis stopped on {}", life.node),
        Notice::Event(event) => match &event.data {
            Data::Alarm(alarm) => format!("Alarm: {}", alarm.kind),
            Data::Ban(ban) => match notice.kind() {
                EventKind::Unbanned => format!("{} is banned no longer", ban.target),
                EventKind::Extended => format!("Ban of {} extended", ban.target),
                _ => format!("{} banned", ban.target),
            },
        },
    }
}

fn add_event(values: &mut Values, event: &CloudEvent, look_up: &Template) {
    let ban = match &event.data {
        Data::Ban(ban) => ban,
        Data::Alarm(alarm) => {
            values.insert("alarm", alarm.kind.clone());
            values.insert("reason", cut(&alarm.text, REASON_CHARS_MAX));
            return;
        }
    };
    add_ban(values, ban);
    // Of a network, its first address: services that look up addresses know no networks.
    let address = ban.target.addr().to_string();
    let address = Values::from([("target", address)]);
    values.insert("look_up", look_up.render(&address, Escape::Plain));
}

fn add_ban(values: &mut Values, ban: &Ban) {
    let evidence = &ban.evidence;
    let moment = |time: Option<Timestamp>| time.map(|time| time.to_string()).unwrap_or_default();
    let ban_time =
        ban.ban_seconds.map_or("ever".to_owned(), |secs| render_duration(std::time::Duration::from_secs(secs)));
    values.extend([
        ("target", ban.target.to_string()),
        ("rule", ban.rule.clone()),
        ("ban_count", ban.ban_count.to_string()),
        ("ban_time", ban_time),
        ("expires_at", moment(ban.expires_at)),
        ("reason", cut(&ban.reason, REASON_CHARS_MAX)),
        ("first_seen", moment(evidence.first_seen)),
        ("last_seen", moment(evidence.last_seen)),
        ("host", list(&evidence.hosts)),
        ("nodes", list(&evidence.nodes)),
        ("paths", list(&evidence.paths)),
        ("user_agents", list(&evidence.user_agents)),
        ("statuses", counts(&evidence.statuses)),
    ]);
    if evidence.failures > 0 {
        values.insert("failures", evidence.failures.to_string());
    }
}

fn add_digest(values: &mut Values, digest: &Digest) {
    let by_kind: BTreeMap<&str, u64> = digest.counts.iter().map(|(kind, count)| (kind.as_str(), *count)).collect();
    values.extend([
        ("title", format!("{} events: {}", digest.total, counts(&by_kind))),
        ("total", digest.total.to_string()),
        ("counts", counts(&by_kind)),
        ("rules", counts(&digest.rules)),
        ("targets", all(&digest.targets)),
        ("host", all(&digest.hosts)),
        ("nodes", all(&digest.nodes)),
        ("reason", all(&digest.alarms)),
        ("since", digest.since.to_string()),
        ("until", digest.until.to_string()),
    ]);
}

fn counts<K: Display>(counts: &BTreeMap<K, impl Display>) -> String {
    counts.iter().map(|(what, count)| format!("{count} x {what}")).collect::<Vec<_>>().join(", ")
}

fn all(entries: &[String]) -> String {
    entries.iter().map(|entry| cut(entry, ENTRY_CHARS_MAX)).collect::<Vec<_>>().join(", ")
}

/// The first few, and how many more there are.
fn list(entries: &[String]) -> String {
    let told = all(entries.get(..LISTED_MAX).unwrap_or(entries));
    match entries.len().saturating_sub(LISTED_MAX) {
        0 => told,
        more => format!("{told} and {more} more"),
    }
}

/// Text without control characters, which a client may have chosen, and not too long.
fn cut(text: &str, chars_max: usize) -> String {
    let clean = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    let mut cut: String = text.chars().take(chars_max).map(clean).collect();
    if text.chars().nth(chars_max).is_some() {
        cut.push('…');
    }
    cut
}

#[cfg(test)]
pub(crate) mod samples {
    use std::net::Ipv4Addr;

    use proto::ban::{Evidence, Origin};
    use proto::net::Target;

    use super::*;

    pub(crate) fn ban(n: u32, rule: &str) -> Ban {
        let address = Ipv4Addr::from(u32::from(Ipv4Addr::new(203, 0, 113, 0)) + n);
        let evidence = Evidence {
            failures: 15,
            first_seen: Some(Timestamp::from_secs(1000)),
            last_seen: Some(Timestamp::from_secs(1010)),
            nodes: vec!["edge-1".to_owned()],
            hosts: vec!["shop.example.net".to_owned()],
            statuses: [(404, 15)].into(),
            paths: vec!["/<script>".to_owned(), "/\"quoted\" & \u{7}".to_owned()],
            ..Evidence::default()
        };
        Ban {
            target: Target::host(address.into()),
            rule: rule.to_owned(),
            origin: Origin::Detect,
            ban_count: 2,
            ban_seconds: Some(1200),
            banned_at: Timestamp::from_secs(1010),
            expires_at: Some(Timestamp::from_secs(2210)),
            reason: "15 requests within 1m (15 x status 404)".to_owned(),
            evidence,
        }
    }

    pub(crate) fn event(kind: EventType, ban: &Ban) -> Notice {
        Notice::Event(Box::new(CloudEvent::of_ban("edge-1", kind, ban, Timestamp::from_secs(1011))))
    }

    pub(crate) fn banned(n: u32, rule: &str) -> Notice {
        event(EventType::Ban, &ban(n, rule))
    }

    pub(crate) fn alarm(text: &str) -> Notice {
        Notice::Event(Box::new(CloudEvent::of_alarm(
            "edge-1",
            "node-silent",
            text.to_owned(),
            Timestamp::from_secs(1012),
        )))
    }

    /// One message of each sort.
    pub(crate) fn messages() -> Vec<Message> {
        let life = || Life { node: "edge-1".to_owned(), time: Timestamp::from_secs(1013) };
        let network = Ban { target: "2001:db8::/64".parse().unwrap(), ban_seconds: None, ..ban(1, "r") };
        let mut digest = Digest::of(&banned(1, "r"));
        digest.add(&alarm("an alarm with <angle> \"brackets\""));
        let mut messages: Vec<Message> = [EventType::Ban, EventType::Extend, EventType::Unban]
            .map(|kind| Message::One(event(kind, &network)))
            .into_iter()
            .collect();
        messages.extend([
            Message::One(banned(1, "forceful-browsing")),
            Message::One(alarm("enforce on b: has said nothing")),
            Message::One(Notice::Started(life())),
            Message::One(Notice::Stopped(life())),
            Message::Many(digest),
        ]);
        messages
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::notify::template::PLACEHOLDERS;

    fn look_up() -> Template {
        Template::parse("https://ipinfo.io/{target}", &["target"]).unwrap()
    }

    #[test]
    fn a_ban_tells_who_why_and_for_how_long() {
        let values = Message::One(samples::banned(7, "forceful-browsing")).values(&look_up());
        let told = |name: &str| values[name].as_str();
        assert_eq!((told("event"), told("title")), ("banned", "203.0.113.7 banned"));
        assert_eq!((told("ban_time"), told("ban_count"), told("failures")), ("20m", "2", "15"));
        assert_eq!((told("statuses"), told("node")), ("15 x 404", "edge-1"));
        assert_eq!(told("paths"), "/<script>, /\"quoted\" & \u{fffd}");
        assert_eq!(told("look_up"), "https://ipinfo.io/203.0.113.7");
    }

    #[test]
    fn a_network_is_looked_up_by_an_address_and_a_permanent_ban_lasts_for_ever() {
        let values = samples::messages()[0].values(&look_up());
        assert_eq!((values["target"].as_str(), values["ban_time"].as_str()), ("2001:db8::/64", "ever"));
        assert_eq!(values["look_up"], "https://ipinfo.io/2001:db8::");
    }

    #[test]
    fn every_value_is_a_known_placeholder_and_every_placeholder_is_some_messages() {
        let mut seen: Vec<&str> =
            samples::messages().iter().flat_map(|message| message.values(&look_up()).into_keys()).collect();
        seen.push("text");
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen, PLACEHOLDERS);
    }

    #[test]
    fn every_message_is_a_cloud_event() {
        for message in samples::messages() {
            let event = message.cloud_event();
            for key in ["specversion", "id", "source", "type", "time", "subject", "datacontenttype"] {
                assert!(event[key].as_str().is_some_and(|text| !text.is_empty()), "{key}: {event}");
            }
            assert!(event["type"].as_str().unwrap().starts_with("io.portcullis."));
            assert!(event["data"].is_object(), "{event}");
        }
    }

    #[test]
    fn long_lists_and_texts_are_cut() {
        let many: Vec<String> = (0..7).map(|n| n.to_string()).collect();
        assert_eq!(list(&many), "0, 1, 2, 3, 4 and 2 more");
        assert_eq!(cut(&"ü".repeat(130), 3), "üüü…");
    }
}
