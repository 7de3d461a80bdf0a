//! The bus between hosts: NATS with JetStream, 2.12.1 or newer.
//!
//! The only module that knows `async-nats`, and of it only the core client: streams, buckets and leases are spoken to by
//! JetStream's own JSON requests, so that what is asked for and what is there can be compared, and nothing has to be
//! created by those who only read. No reader makes a consumer: whoever may make one can have the server write where it
//! pleases. Readers follow what the server publishes again once it is stored ([`follow`]).
//!
//! Detect alone creates streams ([`streams`]) and writes the state, in atomic batches ([`commit`]).

pub mod access;
pub mod ask;
pub mod commit;
pub mod events;
pub mod follow;
pub mod lease;
pub mod nodes;
pub mod raw;
pub mod replica;
pub mod servers;
pub mod state;
pub mod streams;
pub mod told;
mod trouble;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_nats::{Client, ConnectOptions, Event, HeaderMap, Message, ServerError};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::watch;

use super::config::{Login, NatsConfig};
use crate::report::Problem;
use crate::secret::read_file;
use crate::subject::Subjects;
use crate::time::Clock;

/// Oldest server whose atomic batches hold: 2.12.0 refuses a commit that replaces what it names (`wrong last sequence: 0`).
const VERSION_MIN: (u64, u64, u64) = (2, 12, 1);
/// Least `max_payload` of a server: what is sent is packed for its default.
const PAYLOAD_BYTES_MIN: usize = 1 << 20;
/// How long a request may take before it is tried again or given up.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the last messages of a process may take.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a small question may take. Less than a request, because a stream whose leader has just gone says nothing at all.
pub(crate) const QUESTION_TIMEOUT: Duration = Duration::from_secs(1);
/// How often a server must show that it is there; two silences in a row end a connection.
const PING_INTERVAL: Duration = Duration::from_secs(2);
/// Wait before the first try to reconnect, doubled with each.
const RECONNECT_FIRST: Duration = Duration::from_millis(50);
/// Longest wait between two tries.
const RECONNECT_MAX: Duration = Duration::from_secs(2);
/// Longest file of a password, a token, an nkey or credentials, in bytes.
const SECRET_BYTES_MAX: u64 = 64 << 10;
/// Messages of one subscription that wait in the client. What is more is lost there and fetched from the stream.
const SUBSCRIPTION_MESSAGES_MAX: usize = 4096;

/// What can go wrong on the bus.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// A file of the configuration cannot be used.
    #[error("{why}")]
    File {
        /// Which, and why.
        why: String,
    },
    /// Nobody answered in time.
    #[error("no answer from NATS to {what}")]
    Silent {
        /// What was asked.
        what: String,
    },
    /// The stream is not there, or this user may not use it.
    #[error("{what} is not there yet, or this user may not use it")]
    Absent {
        /// A stream.
        what: String,
    },
    /// The server refused.
    #[error("NATS refuses {what}: {why} ({code})")]
    Refused {
        /// What was asked.
        what: String,
        /// The server's text.
        why: String,
        /// JetStream's error code.
        code: u64,
    },
    /// The answer is not what it should be.
    #[error("cannot understand the answer to {what}")]
    Garbled {
        /// What was asked.
        what: String,
    },
    /// A server that lacks what we need.
    #[error("NATS server {version} is too old: 2.12.1 or newer is needed, for atomic batches")]
    TooOld {
        /// Its version.
        version: String,
    },
    /// A server that takes too little at once.
    #[error("NATS server's max_payload is {bytes} bytes: at least 1 MiB is needed, which is its default")]
    SmallPayload {
        /// Its limit.
        bytes: usize,
    },
    /// The servers cannot hold a stream.
    #[error(
        "NATS has no room for stream {stream}, which may grow to {mebibytes} MiB on each server that keeps it: {why} \
             (lower bus.access_max_bytes, or raise max_file of the servers)"
    )]
    NoRoom {
        /// Its name.
        stream: String,
        /// What is reserved for it.
        mebibytes: u64,
        /// The server's text.
        why: String,
    },
    /// A stream that is not as we make it.
    #[error("stream {stream} is not as it must be: {why}")]
    Mismatch {
        /// Its name.
        stream: String,
        /// Each difference.
        why: String,
    },
    /// A stream that was followed lacks messages, so that it is read again.
    #[error("stream {stream} lacks messages and is read again")]
    Incomplete {
        /// Its name.
        stream: String,
    },
    /// A stream that was followed has been deleted and made anew.
    #[error("stream {stream} was deleted and made anew")]
    Recreated {
        /// Its name.
        stream: String,
    },
}

impl BusError {
    /// Whether it may pass without anybody's doing: a leader is being elected, a detector starts.
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::Silent { .. } | Self::Absent { .. } | Self::Refused { code: UNAVAILABLE, .. })
    }
}

/// A connection that mends itself. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Connection {
    client: Client,
    subjects: Arc<Subjects>,
    link: Arc<Link>,
    clock: Clock,
}

#[derive(Debug)]
struct Link {
    up: AtomicBool,
    /// Why there is none.
    failure: Mutex<Option<String>>,
    /// Counts connections, so that who follows something looks anew.
    connects: watch::Sender<u64>,
}

impl Connection {
    /// Begins to connect; returns at once, and goes on trying for ever. `name` is what operators of NATS see; answers come
    /// to subjects of `node`, so that hosts of one account cannot read each other's. `clock` is steered by the servers'.
    ///
    /// # Errors
    /// When a file of the configuration cannot be read.
    pub async fn open(config: &NatsConfig, name: &str, node: &str, clock: Clock) -> Result<Self, BusError> {
        Self::open_with(config, (name, node), clock, SUBSCRIPTION_MESSAGES_MAX).await
    }

    /// With room for so many messages of one subscription in the client.
    async fn open_with(
        config: &NatsConfig,
        (name, node): (&str, &str),
        clock: Clock,
        messages_max: usize,
    ) -> Result<Self, BusError> {
        let link =
            Arc::new(Link { up: AtomicBool::new(false), failure: Mutex::default(), connects: watch::Sender::new(0) });
        let events = link.clone();
        let mut options = ConnectOptions::new()
            .name(name)
            .custom_inbox_prefix(format!("_INBOX.{node}"))
            .retry_on_initial_connect()
            .max_reconnects(None)
            .connection_timeout(REQUEST_TIMEOUT)
            .request_timeout(Some(REQUEST_TIMEOUT))
            .ping_interval(PING_INTERVAL)
            .subscription_capacity(messages_max)
            .reconnect_delay_callback(|attempts| {
                let doublings = u32::try_from(attempts.saturating_sub(1)).unwrap_or(u32::MAX).min(10);
                RECONNECT_FIRST.saturating_mul(1 << doublings).min(RECONNECT_MAX)
            })
            .event_callback(move |event| {
                let link = events.clone();
                async move { link.note(&event) }
            });
        options = log_in(options, &config.login).await?;
        if let Some(ca_file) = &config.ca_file {
            options = options.add_root_certificates(ca_file.clone()).require_tls(true);
        }
        if let Some((cert, key)) = &config.identity {
            options = options.add_client_certificate(cert.clone(), key.clone()).require_tls(true);
        }
        let urls: Vec<async_nats::ServerAddr> = config.urls.iter().filter_map(|url| url.parse().ok()).collect();
        let failed = |kind| BusError::File { why: format!("the configuration of [bus] cannot be used: {kind}") };
        let client = options.connect(urls).await.map_err(|error| failed(error.kind()))?;
        Ok(Self { client, subjects: Arc::new(Subjects::new(&config.prefix)), link, clock })
    }

    /// Every name on this bus.
    pub fn subjects(&self) -> &Subjects {
        &self.subjects
    }

    /// The time of the cluster.
    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    /// Whether there is a connection now.
    pub fn is_up(&self) -> bool {
        self.link.up.load(Ordering::Relaxed)
    }

    /// Changes with every new connection.
    pub fn connects(&self) -> watch::Receiver<u64> {
        self.link.connects.subscribe()
    }

    /// Largest message that the server takes, in bytes; 0 before the first connection.
    pub fn payload_max(&self) -> usize {
        self.client.max_payload()
    }

    /// What is wrong with the connection, for reports.
    pub fn problem(&self) -> Option<Problem> {
        if !self.is_up() {
            let why = self.link.failure().map_or_else(String::new, |why| format!(" ({why})"));
            let text = format!("no connection to NATS{why}: it is tried again until there is one");
            return Some(Problem::degraded(text));
        }
        self.check_server().err().map(|error| Problem::degraded(error.to_string()))
    }

    /// Waits until there is a connection to a server that is new enough.
    ///
    /// # Errors
    /// [`BusError::TooOld`].
    pub async fn ready(&self) -> Result<(), BusError> {
        let mut connects = self.connects();
        while !self.is_up() {
            // The sender lives as long as we do.
            let _changed = connects.changed().await;
        }
        self.check_server()
    }

    fn check_server(&self) -> Result<(), BusError> {
        let info = self.client.server_info();
        match parse_version(&info.version) {
            Some(found) if found < VERSION_MIN => Err(BusError::TooOld { version: info.version }),
            _ if info.max_payload < PAYLOAD_BYTES_MIN => Err(BusError::SmallPayload { bytes: info.max_payload }),
            _ => Ok(()),
        }
    }

    /// Sends what is still in the client on its way, if that can be done at once.
    pub async fn flush(&self) {
        if self.is_up() {
            // Nobody waits for what cannot be sent.
            let _unsent = tokio::time::timeout(FLUSH_TIMEOUT, self.client.flush()).await;
        }
    }

    /// Asks JetStream's API and reads the answer.
    pub(crate) async fn api<T: DeserializeOwned>(&self, what: &str, body: &impl Serialize) -> Result<T, BusError> {
        let payload = encode(body);
        let message = self.ask(&format!("$JS.API.{what}"), HeaderMap::new(), payload).await?;
        answer(what, &message.payload)
    }

    /// One small request, one answer.
    pub(crate) async fn ask(&self, subject: &str, headers: HeaderMap, payload: Vec<u8>) -> Result<Message, BusError> {
        let asked = self.request(subject, headers, payload);
        let silent = |_| BusError::Silent { what: subject.to_owned() };
        tokio::time::timeout(QUESTION_TIMEOUT, asked).await.map_err(silent)?
    }

    /// One request, one answer.
    pub(crate) async fn request(
        &self,
        subject: &str,
        headers: HeaderMap,
        payload: Vec<u8>,
    ) -> Result<Message, BusError> {
        // What is asked without a connection would wait in the client, once for each try, and go out all at once.
        if !self.is_up() {
            return Err(BusError::Silent { what: subject.to_owned() });
        }
        let request = async_nats::Request::new().payload(payload.into()).headers(headers);
        let sent = self.client.send_request(subject.to_owned(), request);
        match tokio::time::timeout(REQUEST_TIMEOUT, sent).await {
            Ok(Ok(message)) => Ok(message),
            Ok(Err(error)) if error.kind() == async_nats::RequestErrorKind::NoResponders => {
                Err(BusError::Absent { what: subject.to_owned() })
            }
            Ok(Err(_)) | Err(_) => Err(BusError::Silent { what: subject.to_owned() }),
        }
    }
}

impl Link {
    fn note(&self, event: &Event) {
        match event {
            Event::Connected => {
                self.set_failure(None);
                self.up.store(true, Ordering::Relaxed);
                self.connects.send_modify(|count| *count += 1);
                tracing::info!("Connected to NATS");
            }
            Event::Disconnected | Event::Closed => {
                if self.up.swap(false, Ordering::Relaxed) {
                    tracing::warn!("Connection to NATS lost, it is tried again");
                }
            }
            Event::SlowConsumer(_) => tracing::debug!("A subscription fell behind"),
            Event::LameDuckMode => tracing::info!("NATS server is about to stop"),
            Event::Draining => {}
            // Permission errors name a subject, never a secret.
            // What a process hears that stood still for a while.
            Event::ServerError(ServerError::Other(text)) if text.eq_ignore_ascii_case("stale connection") => {
                tracing::warn!("NATS server has given up this connection, which was silent for long: it is made anew");
            }
            Event::ServerError(error) => {
                if self.set_failure(Some(error.to_string())) {
                    tracing::error!(%error, "NATS server complains");
                }
            }
            Event::ClientError(error) => {
                if self.set_failure(Some(error.to_string())) {
                    tracing::warn!(%error, "No connection to NATS");
                }
            }
        }
    }

    fn failure(&self) -> Option<String> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether that is new.
    fn set_failure(&self, failure: Option<String>) -> bool {
        let mut known = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        let is_new = *known != failure;
        *known = failure;
        is_new
    }
}

async fn log_in(options: ConnectOptions, login: &Login) -> Result<ConnectOptions, BusError> {
    Ok(match login {
        Login::Anonymous => options,
        Login::Credentials(path) => options
            .credentials(&read(path).await?)
            .map_err(|_| BusError::File { why: format!("{} is no credentials file", path.display()) })?,
        Login::Nkey(path) => options.nkey(secret(path).await?),
        Login::Password(user, path) => options.user_and_password(user.clone(), secret(path).await?),
        Login::Token(path) => options.token(secret(path).await?),
    })
}

/// A secret's file, without the line feed at its end.
async fn secret(path: &Path) -> Result<String, BusError> {
    Ok(read(path).await?.trim_end().to_owned())
}

/// A file that nobody else may read.
async fn read(path: &Path) -> Result<String, BusError> {
    let owned = path.to_owned();
    let failed = |why: String| BusError::File { why };
    let read = tokio::task::spawn_blocking(move || read_file(&owned, SECRET_BYTES_MAX)).await;
    let secret = read.map_err(|error| failed(error.to_string()))?;
    secret.map(|secret| secret.expose().to_owned()).map_err(|error| {
        let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
        failed(format!("{error}{cause}"))
    })
}

fn parse_version(text: &str) -> Option<(u64, u64, u64)> {
    // What comes before a release is not the release, but has what it has: 2.12.1-RC.1.
    let mut parts = text.split(['.', '-']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

pub(crate) fn encode(value: &impl Serialize) -> Vec<u8> {
    // Strings, numbers and maps with string keys only: this cannot fail.
    serde_json::to_vec(value).unwrap_or_default()
}

#[derive(serde::Deserialize)]
struct ApiFailure {
    error: ApiErrorBody,
}

#[derive(serde::Deserialize)]
struct ApiErrorBody {
    #[serde(default)]
    err_code: u64,
    #[serde(default)]
    description: String,
}

/// JetStream's code for a stream whose leader is being elected.
const UNAVAILABLE: u64 = 10008;
/// JetStream's code for a stream that is not there.
const STREAM_NOT_FOUND: u64 = 10059;

fn answer<T: DeserializeOwned>(what: &str, payload: &[u8]) -> Result<T, BusError> {
    if let Ok(ApiFailure { error }) = serde_json::from_slice::<ApiFailure>(payload) {
        return Err(match error.err_code {
            STREAM_NOT_FOUND => BusError::Absent { what: what.to_owned() },
            code => BusError::Refused { what: what.to_owned(), why: error.description, code },
        });
    }
    serde_json::from_slice(payload).map_err(|_| BusError::Garbled { what: what.to_owned() })
}

/// What a server says of a message that it has stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize)]
pub(crate) struct Stored {
    pub(crate) seq: u64,
}

/// A message as JetStream's API gives it.
#[derive(serde::Deserialize)]
pub(crate) struct Got {
    pub(crate) message: GotMessage,
}

/// See [`Got`].
#[derive(serde::Deserialize)]
pub(crate) struct GotMessage {
    pub(crate) seq: u64,
    #[serde(default)]
    data: String,
}

impl GotMessage {
    /// What it holds; `None` when that is not what it should be, as with markers of what was deleted.
    pub(crate) fn json<T: DeserializeOwned>(&self) -> Option<T> {
        let bytes = BASE64.decode(&self.data).ok()?;
        serde_json::from_slice(&bytes).ok()
    }
}

/// JetStream's code for a message that is not there.
const NO_MESSAGE: u64 = 10037;
/// JetStream's code for a key that has changed since.
const WRONG_LAST_SEQUENCE: u64 = 10071;

impl Connection {
    /// The newest message of a subject, by its leader's word; `None` where there is none.
    pub(crate) async fn newest(&self, stream: &str, subject: &str) -> Result<Option<GotMessage>, BusError> {
        self.get_message(stream, &serde_json::json!({"last_by_subj": subject})).await
    }

    /// The next message of subjects that `filter` names, from number `sequence` on, by its leader's word.
    pub(crate) async fn next_of(
        &self,
        stream: &str,
        filter: &str,
        sequence: u64,
    ) -> Result<Option<GotMessage>, BusError> {
        self.get_message(stream, &serde_json::json!({"seq": sequence, "next_by_subj": filter})).await
    }

    async fn get_message(&self, stream: &str, get: &serde_json::Value) -> Result<Option<GotMessage>, BusError> {
        match self.api::<Got>(&format!("STREAM.MSG.GET.{stream}"), get).await {
            Ok(got) => Ok(Some(got.message)),
            Err(BusError::Refused { code: NO_MESSAGE, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_servers_are_told_from_new_ones() {
        for (text, is_old) in [
            ("2.9.10", true),
            ("2.12.0", true),
            ("2.12.0-RC.1", true),
            ("2.12.1-RC.1", false),
            ("2.15.1", false),
            ("3.0.0", false),
        ] {
            assert_eq!(parse_version(text).is_some_and(|version| version < VERSION_MIN), is_old, "{text}");
        }
    }

    #[test]
    fn a_refusal_is_told_from_an_answer() {
        let refusal = br#"{"type":"x","error":{"code":400,"err_code":10071,"description":"wrong last sequence: 1"}}"#;
        let error = answer::<Stored>("a publish", refusal).unwrap_err();
        assert_eq!(error.to_string(), "NATS refuses a publish: wrong last sequence: 1 (10071)");
        assert_eq!(answer::<Stored>("a publish", br#"{"stream":"S","seq":7}"#), Ok(Stored { seq: 7 }));
        assert!(matches!(answer::<Stored>("x", b"{}"), Err(BusError::Garbled { .. })));
        let absent = br#"{"error":{"code":404,"err_code":10059,"description":"stream not found"}}"#;
        assert!(matches!(answer::<Stored>("x", absent), Err(BusError::Absent { .. })));
    }
}
