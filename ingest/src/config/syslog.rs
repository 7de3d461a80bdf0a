//! `type = "syslog"`.

use std::path::PathBuf;

use proto::section;
use proto::settings::{Field, Mistakes, Unknown};
use serde::Deserialize;

use super::listen::{ListenConfig, RawListen};
use super::source::{Lines, RawLines, SourceKind};
use crate::source::limit::LimitConfig;

/// Longest path of a socket in bytes; the kernel takes 107, and while it is made it has a longer name.
const SOCKET_BYTES_MAX: usize = 90;

/// A source of syslog messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SyslogConfig {
    /// How they come.
    pub transport: Transport,
    /// Which node they are shown under.
    pub node_from: NodeFrom,
}

/// How messages come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Transport {
    /// One message a datagram.
    Udp(ListenConfig),
    /// Connections, with or without TLS.
    Tcp(ListenConfig),
    /// One message a datagram, from this host.
    Unix {
        /// Where the socket is made.
        path: PathBuf,
        /// How much may come of all together.
        limits: LimitConfig,
    },
}

/// Which node lines are shown under.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NodeFrom {
    /// This one.
    #[default]
    Own,
    /// The one that the header names; this one where it names none.
    Header,
    /// The sender's address.
    Sender,
}

/// `type = "syslog"` as written.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct RawSyslog {
    #[serde(flatten)]
    lines: RawLines,
    /// `udp`, `tcp` or `unix`.
    mode: Field<String>,
    #[serde(flatten)]
    listen: RawListen,
    /// Where the unix socket is made.
    path: Field<PathBuf>,
    /// `self`, `header` or `sender`.
    node_from: Field<String>,
    /// What nobody knows.
    #[serde(flatten)]
    unknown: Unknown,
}

section!(RawSyslog);

/// Keys beside those of all sources and of those that listen.
const KEYS: [&str; 3] = ["mode", "path", "node_from"];

impl RawSyslog {
    pub(super) fn check(mut self, mistakes: &mut Mistakes) -> (Lines, Option<SourceKind>) {
        self.unknown.check(&[&KEYS[..], &RawListen::KEYS[..], &RawLines::KEYS[..]].concat(), mistakes);
        let lines = self.lines.check(mistakes);
        let mode = self.mode.required("mode", mistakes);
        let node_from = match self.node_from.take("node_from", mistakes).as_deref() {
            None | Some("self") => NodeFrom::Own,
            Some("header") => NodeFrom::Header,
            Some("sender") if mode.as_deref() == Some("unix") => {
                mistakes.add("node_from", "senders on a unix socket have no address");
                NodeFrom::Own
            }
            Some("sender") => NodeFrom::Sender,
            Some(other) => {
                mistakes.add("node_from", format!("expected `self`, `header` or `sender`, got {other:?}"));
                NodeFrom::Own
            }
        };
        let transport = match mode.as_deref() {
            Some("unix") => check_unix(self.path, self.listen, mistakes),
            Some(mode @ ("udp" | "tcp")) => {
                if !matches!(self.path, Field::Absent) {
                    mistakes.add("path", format!("is for `unix`, and means nothing with `{mode}`"));
                }
                if mode == "udp" {
                    self.listen.refuse_connections("udp", mistakes);
                }
                let listen = self.listen.check(false, mistakes);
                listen.map(if mode == "udp" { Transport::Udp } else { Transport::Tcp })
            }
            Some(other) => {
                mistakes.add("mode", format!("expected `udp`, `tcp` or `unix`, got {other:?}"));
                None
            }
            None => None,
        };
        (lines, transport.map(|transport| SourceKind::Syslog(SyslogConfig { transport, node_from })))
    }
}

fn check_unix(path: Field<PathBuf>, listen: RawListen, mistakes: &mut Mistakes) -> Option<Transport> {
    let path = path.required("path", mistakes);
    if path.as_ref().is_some_and(|path| !path.is_absolute() || path.as_os_str().len() > SOCKET_BYTES_MAX) {
        mistakes.add("path", format!("must be an absolute path of at most {SOCKET_BYTES_MAX} bytes"));
    }
    let limits = listen.check_limits_alone("unix", mistakes);
    Some(Transport::Unix { path: path?, limits })
}

#[cfg(test)]
mod tests {
    use proto::settings::FromValue;
    use serde_json::json;

    use super::*;

    fn check(mut value: serde_json::Value) -> Result<SyslogConfig, Vec<String>> {
        value["type"] = json!("syslog");
        let mut mistakes = Mistakes::new();
        let (_, kind) = RawSyslog::from_value(value).expect("raw sections take anything").check(&mut mistakes);
        match kind {
            Some(SourceKind::Syslog(config)) if mistakes.is_empty() => Ok(config),
            _ => Err(mistakes.into_sorted().iter().map(ToString::to_string).collect()),
        }
    }

    #[test]
    fn each_way_with_its_defaults() {
        let udp = check(json!({"mode": "udp", "listen": "127.0.0.1:514"})).unwrap();
        assert!(matches!(&udp.transport, Transport::Udp(listen) if listen.tls.is_none()));
        assert_eq!(udp.node_from, NodeFrom::Own);
        let tls = json!({"cert_file": "/c", "key_file": "/k", "client_ca_file": "/a"});
        let tls = check(json!({"mode": "tcp", "listen": "[::]:6514", "tls": tls, "node_from": "header"})).unwrap();
        assert!(matches!(&tls.transport, Transport::Tcp(listen) if listen.tls.is_some()));
        let unix = check(json!({"mode": "unix", "path": "/run/log", "limits": {"lines": 7}})).unwrap();
        let Transport::Unix { limits, .. } = unix.transport else { panic!("{unix:?}") };
        assert_eq!((limits.lines.map(std::num::NonZero::get), limits.sender_lines), (Some(7), None));
    }

    #[test]
    fn strangers_beyond_loopback_are_named() {
        let tls = json!({"cert_file": "/c", "key_file": "/k"});
        for (source, is_right) in [
            (json!({"mode": "udp", "listen": "0.0.0.0:514"}), false),
            (json!({"mode": "tcp", "listen": "[::]:601"}), false),
            (json!({"mode": "tcp", "listen": "10.0.0.1:6514", "tls": tls}), false),
            (json!({"mode": "udp", "listen": "[::ffff:127.0.0.1]:514"}), true),
            (json!({"mode": "udp", "listen": "0.0.0.0:514", "allowed_senders": ["10.0.0.0/8"]}), true),
            (json!({"mode": "tcp", "listen": "0.0.0.0:601", "allowed_senders": ["10.0.0.7"]}), true),
        ] {
            let told = check(source.clone()).err().unwrap_or_default();
            assert_eq!(told.is_empty(), is_right, "{source}: {told:?}");
            assert!(told.iter().all(|text| text.starts_with("allowed_senders: is required")), "{told:?}");
        }
    }

    #[test]
    fn what_means_nothing_is_a_mistake() {
        let keys = |source| {
            let told: Vec<String> = check(source).expect_err("all of it is wrong");
            told.iter().map(|text| text.split(": ").next().unwrap_or_default().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(keys(json!({})), ["mode"]);
        assert_eq!(keys(json!({"mode": "quic", "node_from": "dns", "mod": 1})), ["mod", "mode", "node_from"]);
        let udp = json!({"mode": "udp", "listen": "127.0.0.1:1", "path": "/x", "tls": {}, "idle_timeout": "1m",
                         "connections_max": 1, "sender_connections_max": 1});
        assert_eq!(keys(udp), ["connections_max", "idle_timeout", "path", "sender_connections_max", "tls"]);
        let unix = json!({"mode": "unix", "path": "x", "listen": "127.0.0.1:1", "allowed_senders": [], "tls": {},
                          "node_from": "sender", "limits": {"sender_lines": 1, "sender_bytes": 1}});
        let wrong =
            ["allowed_senders", "limits.sender_bytes", "limits.sender_lines", "listen", "node_from", "path", "tls"];
        assert_eq!(keys(unix), wrong);
        assert_eq!(keys(json!({"mode": "tcp"})), ["listen"]);
    }
}
