//! The AsyncAPI 3.0 document: on which subjects events and records travel, and how to read them without a gap.

use serde::Serialize;
use serde_json::{Value, json};

use super::{components, example};
use crate::envelope::EventType;

const SCHEMAS: &str = "/components/schemas";

const ABOUT: &str = "\
What Portcullis tells third parties over NATS, read only. Names are those of the default prefix (`bus.prefix`).

A message on a subject is at most once. The stream `PORTCULLIS_EVENTS` keeps every event for 30 days, and the bucket \
`portcullis_bans` (stream `KV_portcullis_bans`) the bans of this moment. Both are read with the batched direct get of \
JetStream: a request to `$JS.API.DIRECT.GET.<stream>` with `{\"seq\": 1, \"batch\": 1000, \"next_by_subj\": \
\"portcullis.events.v1.>\"}` (of bans: `\"$KV.portcullis_bans.ban.>\"`), which answers each message with `Nats-Sequence` \
and `Nats-Subject`, and ends with status 204. The next request begins behind the last sequence. Third parties may not \
create consumers, and need none.

Subscribe first, then read, and read again from the last sequence whenever a message arrives or the connection came \
back: then nothing is missed and order is that of the stream. Worked examples stand in `deploy/consumers`.

Fields are only ever added within v1: ignore what you do not know.";

/// The document.
pub(super) fn document() -> Value {
    json!({
        "asyncapi": "3.0.0",
        "info": {
            "title": "Portcullis events and bans",
            "version": "1",
            "description": ABOUT,
            "license": {"name": "MIT OR Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "servers": {"nats": {
            "host": "{host}",
            "protocol": "nats",
            "description": "NATS of the cluster; log in as a user of the account for third parties.",
            "variables": {"host": {"default": "localhost:4222"}},
        }},
        "channels": {"events": events_channel(), "bans": bans_channel()},
        "operations": {
            "publishEvent": {
                "action": "send",
                "channel": {"$ref": "#/channels/events"},
                "summary": "Something happened: a ban, its extension or its end, or an alarm.",
            },
            "publishState": {
                "action": "send",
                "channel": {"$ref": "#/channels/bans"},
                "summary": "What is banned has changed.",
            },
        },
        "components": {"schemas": components(SCHEMAS), "messages": messages()},
    })
}

fn events_channel() -> Value {
    let kinds = [EventType::Ban, EventType::Unban, EventType::Extend, EventType::Alarm].map(EventType::as_str);
    json!({
        "address": "portcullis.events.v1.{type}.{rule}",
        "description": "Every event, once for each delivery; kept in the stream PORTCULLIS_EVENTS.",
        "parameters": {
            "type": {"description": "What happened.", "enum": kinds},
            "rule": {"description": "The rule; `operator` where a person ordered it, `system` for alarms."},
        },
        "messages": {"event": {"$ref": "#/components/messages/event"}},
    })
}

fn bans_channel() -> Value {
    json!({
        "address": "portcullis.state.v1.ban.{target}",
        "description": "Every change of a target's bans, republished from the bucket portcullis_bans.",
        "parameters": {"target": {
            "description": "The target with `:` written `_`. An IPv4 address takes several tokens of the subject: \
                            subscribe to `portcullis.state.v1.ban.>`.",
            "examples": ["192.0.2.1", "2001_db8__/64"],
        }},
        "messages": {
            "banned": {"$ref": "#/components/messages/banned"},
            "lifted": {"$ref": "#/components/messages/lifted"},
        },
    })
}

fn messages() -> Value {
    json!({
        "event": {
            "summary": "A CloudEvent.",
            "contentType": "application/cloudevents+json",
            "payload": {"$ref": format!("#{SCHEMAS}/CloudEvent")},
            "examples": examples(example::events()),
        },
        "banned": {
            "summary": "This is now the record of its target; it takes the place of any before it.",
            "headers": stored_headers(json!({})),
            "payload": {"$ref": format!("#{SCHEMAS}/BanRecord")},
            "examples": examples(example::records()),
        },
        "lifted": {
            "summary": "The target is not banned any more. The payload is empty; the subject names the target.",
            "headers": stored_headers(json!({
                "KV-Operation": {"type": "string", "enum": ["DEL", "PURGE"]},
                "Nats-Marker-Reason": {"type": "string", "description": "Set instead when the server removed the key."},
            })),
            "payload": {"type": "string", "maxLength": 0},
        },
    })
}

/// Headers that the server adds when it republishes, and `more`.
fn stored_headers(more: Value) -> Value {
    let mut properties = json!({
        "Nats-Sequence": {"type": "string", "description": "Position in KV_portcullis_bans, ever growing."},
        "Nats-Subject": {"type": "string", "description": "`$KV.portcullis_bans.ban.<target>`."},
        "Nats-Time-Stamp": {"type": "string", "format": "date-time", "description": "When it was stored."},
    });
    if let (Value::Object(properties), Value::Object(more)) = (&mut properties, more) {
        properties.extend(more);
    }
    json!({"type": "object", "required": ["Nats-Sequence", "Nats-Subject"], "properties": properties})
}

fn examples<T: Serialize>(of: Vec<(&'static str, T)>) -> Vec<Value> {
    of.into_iter()
        .filter_map(|(name, value)| Some(json!({"name": name, "payload": serde_json::to_value(value).ok()?})))
        .collect()
}
