//! Public events: CloudEvents 1.0 JSON objects around a [`Ban`] or an alarm.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ban::Ban;
use crate::time::Timestamp;

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum EventType {
    /// A target is banned that was not.
    #[serde(rename = "io.portcullis.ban.v1")]
    Ban,
    /// A target is banned no longer: its last ban ended, or was lifted by an operator or a list. `reason` says which.
    #[serde(rename = "io.portcullis.unban.v1")]
    Unban,
    /// A banned target got a further ban, by another rule or for longer.
    #[serde(rename = "io.portcullis.extend.v1")]
    Extend,
    /// Something needs a person.
    #[serde(rename = "io.portcullis.alarm.v1")]
    Alarm,
}

impl EventType {
    /// The word in subjects and tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ban => "ban",
            Self::Unban => "unban",
            Self::Extend => "extend",
            Self::Alarm => "alarm",
        }
    }
}

/// What an alarm says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Alarm {
    /// A stable word for programs, such as `visitors-behind-proxy`.
    pub kind: String,
    /// For people.
    pub text: String,
}

/// The payload: a ban, or an alarm where the type says so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Data {
    /// Of ban, unban and extend.
    Ban(Box<Ban>),
    /// Of alarm.
    Alarm(Alarm),
}

/// One public event. CloudEvents 1.0, structured JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CloudEvent {
    /// Always `1.0`.
    #[schemars(extend("const" = "1.0"))]
    pub specversion: String,
    /// The same for a repeated delivery of the same event, whichever detect delivers it: compare it to drop repeats.
    #[schemars(length(min = 1))]
    pub id: String,
    /// `portcullis/<node>` of the detect that decided.
    #[schemars(extend("format" = "uri-reference"))]
    pub source: String,
    /// What happened.
    #[serde(rename = "type")]
    pub kind: EventType,
    /// When it was decided.
    pub time: Timestamp,
    /// The target, or the kind of an alarm.
    pub subject: String,
    /// Always `application/json`.
    #[schemars(extend("const" = "application/json"))]
    pub datacontenttype: String,
    /// What happened, in full.
    pub data: Data,
}

impl CloudEvent {
    /// An event about a ban. `id` derives from target, rule, type and moment, so that a repetition has the same.
    pub fn of_ban(node: &str, kind: EventType, ban: &Ban, time: Timestamp) -> Self {
        let id = format!("{}/{}/{}/{}", kind.as_str(), ban.rule, ban.target, ban.banned_at.as_nanos());
        let id = if kind == EventType::Unban { format!("{id}/{}", time.as_nanos()) } else { id };
        Self::new(node, kind, id, time, ban.target.to_string(), Data::Ban(Box::new(ban.clone())))
    }

    /// An event about something that needs a person.
    pub fn of_alarm(node: &str, kind: &str, text: String, time: Timestamp) -> Self {
        let alarm = Alarm { kind: kind.to_owned(), text };
        let id = format!("alarm/{kind}/{}", time.as_nanos());
        Self::new(node, EventType::Alarm, id, time, kind.to_owned(), Data::Alarm(alarm))
    }

    #[expect(clippy::too_many_arguments, reason = "private: these are the fields of an envelope")]
    fn new(node: &str, kind: EventType, id: String, time: Timestamp, subject: String, data: Data) -> Self {
        Self {
            specversion: "1.0".to_owned(),
            id,
            source: format!("portcullis/{node}"),
            kind,
            time,
            subject,
            datacontenttype: "application/json".to_owned(),
            data,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ban::{Evidence, Origin};

    #[test]
    fn an_event_with_evidence_survives_its_json() {
        let evidence = Evidence { failures: 15, statuses: [(404, 14), (405, 1)].into(), ..Evidence::default() };
        let ban = Ban {
            target: "192.0.2.1".parse().unwrap(),
            rule: "r".to_owned(),
            origin: Origin::Detect,
            ban_count: 1,
            ban_seconds: Some(600),
            banned_at: Timestamp::from_secs(1),
            expires_at: Some(Timestamp::from_secs(601)),
            reason: String::new(),
            evidence,
        };
        for event in [
            CloudEvent::of_ban("n", EventType::Ban, &ban, Timestamp::from_secs(2)),
            CloudEvent::of_alarm("n", "kind", "text".to_owned(), Timestamp::from_secs(2)),
        ] {
            let json = serde_json::to_string(&event).unwrap();
            assert_eq!(serde_json::from_str::<CloudEvent>(&json).unwrap(), event);
        }
    }
}
