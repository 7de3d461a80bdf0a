//! `[api]`: where operators come in, and who is believed over TCP.

use std::net::SocketAddr;
use std::path::PathBuf;

use detect::api::tcp::{TcpConfig, TlsFiles};
use proto::section;
use proto::settings::{Field, Mistakes, Unknown};
use serde::Deserialize;

use crate::socket;

const KEYS: &[&str] = &["socket", "listen", "tokens_file", "tls"];
const TLS_KEYS: &[&str] = &["cert_file", "key_file"];
/// Longest path of the socket in bytes: `sun_path` of `unix(7)` holds 108 with its end, and the socket is made under a
/// name up to 7 bytes longer first.
const SOCKET_PATH_MAX: usize = 100;

/// The operator API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiConfig {
    /// Path of the unix socket.
    pub socket: PathBuf,
    /// The listener for other hosts; `None` = none.
    pub tcp: Option<TcpConfig>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct RawApi {
    socket: Field<PathBuf>,
    listen: Field<SocketAddr>,
    tokens_file: Field<PathBuf>,
    tls: Field<RawApiTls>,
    #[serde(flatten)]
    unknown: Unknown,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RawApiTls {
    cert_file: Field<PathBuf>,
    key_file: Field<PathBuf>,
    #[serde(flatten)]
    unknown: Unknown,
}

section!(RawApi, RawApiTls);

impl RawApi {
    pub(super) fn check(self, mistakes: &mut Mistakes) -> ApiConfig {
        self.unknown.check(KEYS, mistakes);
        let socket = self.socket.take("socket", mistakes).unwrap_or_else(socket::default_path);
        if socket.as_os_str().len() > SOCKET_PATH_MAX {
            mistakes.add("socket", format!("expected a path of at most {SOCKET_PATH_MAX} bytes"));
        }
        let has_tls = !matches!(self.tls, Field::Absent);
        let tls = self.tls.take("tls", mistakes);
        let tls = tls.and_then(|tls| mistakes.within("tls", |m| tls.check(m)));
        if matches!(self.listen, Field::Absent) {
            for (key, given) in [("tokens_file", !matches!(self.tokens_file, Field::Absent)), ("tls", has_tls)] {
                if given {
                    mistakes.add(key, "is for TCP, and means nothing without `listen`");
                }
            }
            return ApiConfig { socket, tcp: None };
        }
        let listen = self.listen.take("listen", mistakes);
        let tokens_file = self.tokens_file.required("tokens_file", mistakes);
        if let Some(addr) = listen
            && !addr.ip().to_canonical().is_loopback()
            && !has_tls
        {
            let text =
                "is required beyond loopback: give cert_file and key_file, so that tokens do not travel in the clear";
            mistakes.add("tls", text);
        }
        let tcp = listen.zip(tokens_file);
        ApiConfig { socket, tcp: tcp.map(|(listen, tokens_file)| TcpConfig { listen, tokens_file, tls }) }
    }
}

impl RawApiTls {
    fn check(self, mistakes: &mut Mistakes) -> Option<TlsFiles> {
        self.unknown.check(TLS_KEYS, mistakes);
        let cert_file = self.cert_file.required("cert_file", mistakes);
        let key_file = self.key_file.required("key_file", mistakes);
        cert_file.zip(key_file).map(|(cert_file, key_file)| TlsFiles { cert_file, key_file, client_ca_file: None })
    }
}
