//! What every source that listens says of whom it hears.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use proto::net::NetSet;
use proto::section;
use proto::settings::{Field, Mistakes, Unknown};
use proto::tls::TlsFiles;
use serde::Deserialize;

use super::parse_nets;
use super::source::RawLimits;
use crate::source::limit::LimitConfig;

/// Default of `connections_max`.
const CONNECTIONS_MAX: u32 = 1024;
/// Bounds of `connections_max`: each needs a descriptor, a buffer for a line and some 20 KiB.
const CONNECTIONS_MAX_RANGE: std::ops::RangeInclusive<u32> = 1..=65_536;
/// Default of `sender_connections_max`.
const SENDER_CONNECTIONS_MAX: u32 = 64;
/// Default of `idle_timeout`.
const IDLE_TIMEOUT: Duration = Duration::from_secs(15 * 60);
/// Bounds of `idle_timeout`.
const IDLE_TIMEOUT_RANGE: std::ops::RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(24 * 3600);

/// Whom a source hears, and how much of each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenConfig {
    /// Where.
    pub addr: SocketAddr,
    /// Whom; `None` = everybody who can reach it.
    pub allowed_senders: Option<NetSet>,
    /// With TLS, where connections are.
    pub tls: Option<TlsFiles>,
    /// Connections at once, of all and of one sender.
    pub connections_max: usize,
    /// See [`ListenConfig::connections_max`].
    pub sender_connections_max: usize,
    /// A connection on which nothing has come for so long is closed.
    pub idle_timeout: Duration,
    /// How much they may bring.
    pub limits: LimitConfig,
}

/// Keys of every source that listens on the network, as written.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct RawListen {
    listen: Field<SocketAddr>,
    /// CIDRs, addresses and named sets.
    allowed_senders: Field<Vec<String>>,
    tls: Field<RawTls>,
    connections_max: Field<u32>,
    sender_connections_max: Field<u32>,
    idle_timeout: Field<Duration>,
    limits: Field<RawLimits>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct RawTls {
    cert_file: Field<PathBuf>,
    key_file: Field<PathBuf>,
    client_ca_file: Field<PathBuf>,
    #[serde(flatten)]
    unknown: Unknown,
}

section!(RawTls);

impl RawListen {
    /// The keys, for suggestions.
    pub(super) const KEYS: [&str; 7] =
        ["listen", "allowed_senders", "tls", "connections_max", "sender_connections_max", "idle_timeout", "limits"];

    /// Notes what is for connections, of which `mode` has none. It is not looked at further.
    pub(super) fn refuse_connections(&mut self, mode: &str, mistakes: &mut Mistakes) {
        let why = format!("is for connections, and means nothing with `{mode}`");
        refuse(&mut self.tls, "tls", (&why, mistakes));
        refuse(&mut self.connections_max, "connections_max", (&why, mistakes));
        refuse(&mut self.sender_connections_max, "sender_connections_max", (&why, mistakes));
        refuse(&mut self.idle_timeout, "idle_timeout", (&why, mistakes));
    }

    /// The limits of a source whose senders have no addresses; all else is a mistake.
    pub(super) fn check_limits_alone(mut self, mode: &str, mistakes: &mut Mistakes) -> LimitConfig {
        self.refuse_connections(mode, mistakes);
        let why = format!("is for the network, and means nothing with `{mode}`");
        if self.is_given() {
            mistakes.add("listen", why.as_str());
        }
        refuse(&mut self.allowed_senders, "allowed_senders", (&why, mistakes));
        let limits = self.limits.or("limits", RawLimits::default(), mistakes);
        mistakes.within("limits", |mistakes| limits.check_without_senders(mistakes))
    }

    /// Whether an address is given.
    pub(super) fn is_given(&self) -> bool {
        !matches!(self.listen, Field::Absent)
    }

    /// `has_login` = senders must show a secret. Without that or certificates of clients, and beyond loopback, it must be
    /// said who may send: whoever can reach the listener could have anybody banned.
    pub(super) fn check(self, has_login: bool, mistakes: &mut Mistakes) -> Option<ListenConfig> {
        let listen = self.listen.required("listen", mistakes);
        let given = self.allowed_senders.take("allowed_senders", mistakes);
        let allowed_senders = given.map(|senders| {
            NetSet::new(
                senders.iter().flat_map(|text| parse_nets(text, "allowed_senders", mistakes)).collect::<Vec<_>>(),
            )
        });
        let tls = self.tls.take("tls", mistakes);
        let tls = tls.and_then(|tls| mistakes.within("tls", |mistakes| tls.check(mistakes)));
        let knows_senders = has_login || tls.as_ref().is_some_and(|tls| tls.client_ca_file.is_some());
        if let Some(addr) = listen
            && !addr.ip().to_canonical().is_loopback()
            && !knows_senders
            && allowed_senders.is_none()
        {
            let text = "is required beyond loopback for a listener that asks for no secret: whoever can reach it could \
                        have anybody banned";
            mistakes.add("allowed_senders", text);
        }
        let mut bounded = |field: Field<u32>, key: &str, default: u32| {
            let value = field.or(key, default, mistakes);
            if !CONNECTIONS_MAX_RANGE.contains(&value) {
                mistakes.add(key, "must be from 1 to 65536");
            }
            value as usize
        };
        let connections_max = bounded(self.connections_max, "connections_max", CONNECTIONS_MAX);
        let sender_connections_max =
            bounded(self.sender_connections_max, "sender_connections_max", SENDER_CONNECTIONS_MAX);
        let idle_timeout = self.idle_timeout.or("idle_timeout", IDLE_TIMEOUT, mistakes);
        if !IDLE_TIMEOUT_RANGE.contains(&idle_timeout) {
            mistakes.add("idle_timeout", "must be from 1s to 1d");
        }
        let limits = self.limits.or("limits", RawLimits::default(), mistakes);
        let limits = mistakes.within("limits", |mistakes| limits.check(mistakes));
        Some(ListenConfig {
            addr: listen?,
            allowed_senders,
            tls,
            connections_max,
            sender_connections_max,
            idle_timeout,
            limits,
        })
    }
}

/// Notes that `key` is given, and forgets it.
fn refuse<T>(field: &mut Field<T>, key: &str, (why, mistakes): (&str, &mut Mistakes)) {
    if !matches!(std::mem::take(field), Field::Absent) {
        mistakes.add(key, why);
    }
}

impl RawTls {
    fn check(self, mistakes: &mut Mistakes) -> Option<TlsFiles> {
        self.unknown.check(&["cert_file", "key_file", "client_ca_file"], mistakes);
        let cert_file = self.cert_file.required("cert_file", mistakes);
        let key_file = self.key_file.required("key_file", mistakes);
        let client_ca_file = self.client_ca_file.take("client_ca_file", mistakes);
        Some(TlsFiles { cert_file: cert_file?, key_file: key_file?, client_ca_file })
    }
}
