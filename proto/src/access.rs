//! One access for other programs: what `portcullis ingest --stdout` writes, one JSON object a line.
//!
//! Names are those of public events and of the conditions of rules. What a line does not have is left out. Fields are only
//! ever added.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::IpAddr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::client_ip::NoClient;
use crate::event::{ABSENT, AccessBatch, Event, Text};
use crate::time::Timestamp;

/// Why the client of an access is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum NoClientReason {
    /// No address is in the line.
    Absent,
    /// What stands there is no address; names are not resolved.
    NotAnAddress,
    /// Every address in the line is a trusted proxy.
    OnlyProxies,
    /// The format names no peer that could vouch for the forwarded chain (`clf_behind_proxy` is not set).
    UnvouchedChain,
}

impl From<NoClient> for NoClientReason {
    fn from(reason: NoClient) -> Self {
        match reason {
            NoClient::Absent => Self::Absent,
            NoClient::NotAnAddress => Self::NotAnAddress,
            NoClient::OnlyProxies => Self::OnlyProxies,
            NoClient::UnvouchedChain => Self::UnvouchedChain,
        }
    }
}

/// One access.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("oneOf" = [{"required": ["client", "via_proxy"]}, {"required": ["no_client"]}]))]
pub struct AccessLine<'a> {
    /// When the request began; absent where the line has no readable time.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub time: Option<Timestamp>,
    /// Node that read the line.
    #[serde(borrow)]
    pub node: Cow<'a, str>,
    /// Source that read the line.
    #[serde(borrow)]
    pub source: Cow<'a, str>,
    /// Whose request it was: the address that rules count and bans name. Either this or `no_client` is there.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub client: Option<IpAddr>,
    /// Whether a proxy delivered the request, so that a firewall sees the proxy and not the client; there with `client`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub via_proxy: Option<bool>,
    /// Why the client is not known.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub no_client: Option<NoClientReason>,
    /// The TCP peer, where the format names it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub peer: Option<IpAddr>,
    /// Status sent to the client.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub status: Option<u16>,
    /// Status of the service behind Traefik; absent when none answered.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub origin_status: Option<u16>,
    /// Request method, as sent.
    #[serde(borrow, skip_serializing_if = "Option::is_none", default)]
    pub method: Option<Cow<'a, str>>,
    /// Path without the query.
    #[serde(borrow, skip_serializing_if = "Option::is_none", default)]
    pub path: Option<Cow<'a, str>>,
    /// Query without the `?`.
    #[serde(borrow, skip_serializing_if = "Option::is_none", default)]
    pub query: Option<Cow<'a, str>>,
    /// Requested host, without the port.
    #[serde(borrow, skip_serializing_if = "Option::is_none", default)]
    pub host: Option<Cow<'a, str>>,
    /// Protocol, such as `HTTP/1.1`.
    #[serde(borrow, skip_serializing_if = "Option::is_none", default)]
    pub protocol: Option<Cow<'a, str>>,
    /// `User-Agent` header, where the log keeps it.
    #[serde(borrow, skip_serializing_if = "Option::is_none", default)]
    pub user_agent: Option<Cow<'a, str>>,
    /// Router, or the chain of routers (`a@file -> b@file`).
    #[serde(borrow, skip_serializing_if = "Option::is_none", default)]
    pub router: Option<Cow<'a, str>>,
    /// Service name.
    #[serde(borrow, skip_serializing_if = "Option::is_none", default)]
    pub service: Option<Cow<'a, str>>,
    /// Entry point.
    #[serde(borrow, skip_serializing_if = "Option::is_none", default)]
    pub entry_point: Option<Cow<'a, str>>,
    /// User name of Basic or Digest authentication.
    #[serde(borrow, skip_serializing_if = "Option::is_none", default)]
    pub username: Option<Cow<'a, str>>,
    /// Request headers that a rule of the configuration looks at, where the log keeps them.
    #[serde(borrow, skip_serializing_if = "BTreeMap::is_empty", default)]
    pub headers: BTreeMap<Cow<'a, str>, Cow<'a, str>>,
    /// Which file the line stands in: 16 hexadecimal digits that stay when the file is renamed. Absent of what comes from no
    /// file.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    #[schemars(length(equal = 16))]
    pub generation: Option<String>,
    /// Where the line begins in its file, in bytes. Generation and offset together are the same when a line is read again.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub offset: Option<u64>,
}

impl<'a> AccessLine<'a> {
    /// Of an event of `batch`.
    pub fn new(batch: &'a AccessBatch, event: &Event<'a>) -> Self {
        let Text { method, path, query, host, protocol, user_agent, router, service, entry_point, username } =
            event.text;
        let client = event.client.ok();
        let status = |status: u16| (status > 0).then_some(status);
        let headers = event.headers.iter().map(|(name, value)| (Cow::Borrowed(name), Cow::Borrowed(value)));
        Self {
            time: event.time,
            node: Cow::Borrowed(batch.shown_node()),
            source: Cow::Borrowed(&batch.source),
            client: client.map(|client| client.addr),
            via_proxy: client.map(|client| client.via_proxy),
            no_client: event.client.err().map(NoClientReason::from),
            peer: event.peer,
            status: status(event.status),
            origin_status: status(event.origin_status),
            method: present(method),
            path: present(path),
            query: present(query),
            host: present(host),
            protocol: present(protocol),
            user_agent: present(user_agent),
            router: present(router),
            service: present(service),
            entry_point: present(entry_point),
            username: present(username),
            headers: headers.collect(),
            generation: batch.span.map(|span| format!("{:016x}", span.generation)),
            offset: batch.span.map(|_| event.offset),
        }
    }
}

fn present(value: &str) -> Option<Cow<'_, str>> {
    (!value.is_empty() && value != ABSENT).then_some(Cow::Borrowed(value))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::client_ip::Client;
    use crate::event::{FileSpan, Headers};

    const REASONS: [NoClient; 4] =
        [NoClient::Absent, NoClient::NotAnAddress, NoClient::OnlyProxies, NoClient::UnvouchedChain];

    fn batch(span: Option<FileSpan>) -> AccessBatch {
        AccessBatch { span, ..AccessBatch::new("edge-1".into(), "traefik".into(), Timestamp::EPOCH) }
    }

    #[test]
    fn a_line_is_written_as_it_always_was() {
        let text = Text { method: "GET", path: "/a", query: "b=\"c\"", username: "anna", ..Text::default() };
        let client = Ok(Client { addr: "203.0.113.9".parse().unwrap(), via_proxy: true });
        let headers = [("Referer", "x"), ("Accept", "*/*")];
        let event = Event {
            time: Some(Timestamp::from_millis(1_767_881_955_980)),
            client,
            peer: Some("2001:db8::1".parse().unwrap()),
            status: 404,
            text,
            headers: Headers::from_pairs(&headers),
            offset: 7,
            ..Event::default()
        };
        let batch = batch(Some(FileSpan { generation: 0xab, start: 0, end: 9 }));
        let line = AccessLine::new(&batch, &event);
        let written = r#"{"time":"2026-01-08T14:19:15.980Z","node":"edge-1","source":"traefik","client":"203.0.113.9","via_proxy":true,"peer":"2001:db8::1","status":404,"method":"GET","path":"/a","query":"b=\"c\"","username":"anna","headers":{"Accept":"*/*","Referer":"x"},"generation":"00000000000000ab","offset":7}"#;
        assert_eq!(serde_json::to_string(&line).unwrap(), written);
        let newer = written.replace("{\"time\"", "{\"of_the_future\":[1],\"time\"");
        assert_eq!(serde_json::from_str::<AccessLine<'_>>(&newer).unwrap(), line);
    }

    #[test]
    fn a_line_without_anything_says_why_it_has_no_client() {
        let batch = batch(None);
        let line = serde_json::to_string(&AccessLine::new(&batch, &Event::default())).unwrap();
        assert_eq!(line, r#"{"node":"edge-1","source":"traefik","no_client":"absent"}"#);
    }

    proptest! {
        #[test]
        fn what_is_written_is_what_was_read(
            time in proptest::option::of(0..4_000_000_000_000_i64),
            client in proptest::option::of((any::<IpAddr>(), any::<bool>())),
            reason in 0..REASONS.len(),
            peer in proptest::option::of(any::<IpAddr>()),
            status in (0..1000_u16, 0..1000_u16),
            fields in proptest::collection::vec(".{0,12}", 10),
            header in proptest::option::of((".{1,8}", ".{0,8}")),
            offset in proptest::option::of((any::<u64>(), any::<u64>())),
        ) {
            let client = client.map(|(addr, via_proxy)| Client { addr, via_proxy }).ok_or(REASONS[reason]);
            let given: Vec<&str> = fields.iter().map(String::as_str).collect();
            let text = Text {
                method: given[0], path: given[1], query: given[2], host: given[3], protocol: given[4],
                user_agent: given[5], router: given[6], service: given[7], entry_point: given[8], username: given[9],
            };
            let pairs: Vec<(&str, &str)> = header.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
            let event = Event {
                time: time.map(Timestamp::from_millis), client, peer, status: status.0, origin_status: status.1, text,
                headers: Headers::from_pairs(&pairs), offset: offset.map_or(0, |(_, offset)| offset),
            };
            let mut batch = batch(offset.map(|(generation, _)| FileSpan { generation, start: 0, end: u64::MAX }));
            batch.push(&event);
            let copied = batch.events().next().unwrap();
            let written = serde_json::to_string(&AccessLine::new(&batch, &copied)).unwrap();
            prop_assert!(!written.contains('\n'), "one object a line");
            let read: AccessLine<'_> = serde_json::from_str(&written).unwrap();
            prop_assert_eq!(read.time, event.time);
            let told = read.client.zip(read.via_proxy).map(|(addr, via_proxy)| Client { addr, via_proxy });
            prop_assert_eq!(told.ok_or(read.no_client), event.client.map_err(|reason| Some(reason.into())));
            prop_assert_eq!(read.peer, event.peer);
            prop_assert_eq!((read.status.unwrap_or(0), read.origin_status.unwrap_or(0)), status);
            let told = [read.method, read.path, read.query, read.host, read.protocol, read.user_agent, read.router,
                read.service, read.entry_point, read.username];
            for (told, given) in told.iter().zip(given) {
                let given = (!given.is_empty() && given != ABSENT).then_some(given);
                prop_assert_eq!(told.as_deref(), given);
            }
            let told: Vec<(&str, &str)> = read.headers.iter().map(|(name, value)| (&**name, &**value)).collect();
            prop_assert_eq!(told, pairs);
            let place = read.generation.map(|text| u64::from_str_radix(&text, 16).unwrap()).zip(read.offset);
            prop_assert_eq!(place, offset);
        }
    }
}
