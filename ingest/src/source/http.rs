//! Requests that bring lines, as NDJSON and the like or as OTLP.
//!
//! A sender gets its 200 once its lines are safe: stored by detect, or by the bus. Any other answer means that it should send
//! the same again if the answer asks for that (429, 503, and 408), and lines that had already been handed over count twice then:
//! at least once. A body with a mistake brings nothing.
//!
//! What a stranger can hold is bounded: connections, the head of a request and its time, the body and its time, the memory
//! of all bodies together, and the work on them. Secrets are asked for before anything of a body is read.

pub(crate) mod answer;
pub(crate) mod auth;
pub mod body;
pub(crate) mod coding;
mod connection;
mod grpc;
mod handover;

use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::body::{Body as _, Bytes, Incoming};
use hyper::header::{self, HeaderMap, HeaderName};
use hyper::http::request::Parts;
use hyper::{Method, Request, Response, StatusCode, Version};
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;

pub use auth::AuthFiles;

use self::answer::{Answer, Dialect, Refusal};
use self::body::BodyKind;
use self::coding::{Body, Coding, Decoder, Held, Undecoded};
use super::batch::Stopped;
use super::intake::Intake;
use super::limit::{LimitConfig, Limits};
use super::listen::Listening;
use super::otlp::OtlpKind;
use super::secrets::{SecretFiles, Secrets};
use crate::config::ListenConfig;

/// Memory of all bodies of a source at once, with that of their decoders, in bytes. Requests beyond it are told to come again.
const MEMORY_BYTES_MAX: usize = 64 << 20;
/// Bodies that are parsed at a time; each takes a thread meanwhile.
const WORKERS_MAX: usize = 8;
/// How long a body may take to arrive.
const BODY_TIME_MAX: Duration = Duration::from_secs(30);
/// How long a request waits for a thread, and for room in the queue, before it is told to come again.
const ROOM_WAIT_MAX: Duration = Duration::from_secs(2);
/// How long a request waits for the word that its lines are safe.
const SAFE_WAIT_MAX: Duration = Duration::from_secs(10);
/// When to come again where nothing else says it.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// Bytes of a refused body that are still read, so that its sender sees the answer and no broken connection, and for how long.
const DISCARD_BYTES_MAX: usize = 1 << 20;
const DISCARD_TIME_MAX: Duration = Duration::from_secs(1);
/// Wrong secrets that one sender may show at once; it gets one back a second. A right one always gets in.
const FAILURES_BURST: Duration = Duration::from_secs(10);
/// Refusals that are logged at once; one more each second. The metric counts all.
const LOGGED_BURST: Duration = Duration::from_secs(10);
/// The path of health, on every source of requests.
pub(crate) const HEALTH_PATH: &str = "/health";
/// The path of OTLP's logs over HTTP.
pub const OTLP_PATH: &str = "/v1/logs";

/// A source of requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestsConfig {
    /// Whom it hears.
    pub listen: ListenConfig,
    /// What they must show.
    pub auth: AuthFiles,
    /// Longest body, as it travels and without its compression.
    pub body_bytes_max: usize,
    /// Which node lines are shown under.
    pub node_from: NodeFrom,
    /// What requests bring.
    pub content: Content,
}

/// Which node the lines of a request are shown under.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeFrom {
    /// This one.
    Here,
    /// The address of the sender.
    Sender,
    /// OTLP's resource attribute `host.name`; without it, this one.
    Host,
}

/// What requests bring.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Lines, posted to this path.
    Lines {
        /// Begins with `/`.
        path: String,
    },
    /// OTLP's logs.
    Otlp,
}

/// Serves until the shutdown.
pub(crate) async fn run(config: RequestsConfig, intake: Intake) -> Result<(), Stopped> {
    // Only OTLP is spoken over HTTP/2, which gRPC needs.
    let protocols: &[&str] = if config.content == Content::Otlp { &["h2", "http/1.1"] } else { &["http/1.1"] };
    let files = SecretFiles { tls: config.listen.tls.clone(), protocols, auth: config.auth.clone() };
    let listening = Listening::new(config.listen.clone(), intake);
    let clock = &listening.intake.shared.clock;
    let failures = LimitConfig { sender_lines: Some(NonZeroU32::MIN), burst: FAILURES_BURST, ..LimitConfig::default() };
    let logged = LimitConfig { lines: Some(NonZeroU32::MIN), burst: LOGGED_BURST, ..LimitConfig::default() };
    let server = Server {
        failures: Limits::new(&failures, clock),
        logged: Limits::new(&logged, clock),
        memory: Held::budget(MEMORY_BYTES_MAX),
        workers: Arc::new(Semaphore::new(WORKERS_MAX)),
        listening: listening.clone(),
        config,
    };
    let server = Arc::new(server);
    listening.run(files, move |connection, _| connection::serve(server.clone(), connection)).await
}

/// An error with its causes.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// What the connections of a source share.
struct Server {
    config: RequestsConfig,
    listening: Listening,
    failures: Limits,
    logged: Limits,
    memory: Arc<Semaphore>,
    workers: Arc<Semaphore>,
}

/// Who sends the requests of one connection.
struct Caller {
    sender: IpAddr,
    secrets: watch::Receiver<Secrets>,
    /// That nobody takes lines any more.
    stopped: OnceLock<Stopped>,
}

/// How a body is written, by the kind of source.
#[derive(Clone, Copy, Debug)]
enum Written {
    Lines(BodyKind),
    Otlp(OtlpKind),
}

impl Server {
    fn intake(&self) -> &Intake {
        &self.listening.intake
    }

    fn is_draining(&self) -> bool {
        self.intake().shared.shutdown.is_draining()
    }

    /// Answers one request.
    async fn answer(&self, request: Request<Incoming>, caller: &Caller) -> Response<Answer> {
        let (head, mut body) = request.into_parts();
        let dialect = Dialect::of(&self.config.content, &head);
        if head.uri.path() == HEALTH_PATH {
            return answer::health(&head.method, self.is_draining());
        }
        let taken = self.take((&head, dialect), &mut body, caller).await;
        match taken {
            Ok(taken) => answer::taken(dialect, taken),
            Err(refusal) => {
                self.note(&refusal, caller.sender);
                // HTTP/2 has each body end by itself.
                if head.version != Version::HTTP_2 && !body.is_end_stream() {
                    discard(&mut body).await;
                }
                answer::refused(dialect, refusal)
            }
        }
    }

    fn note(&self, refusal: &Refusal, sender: IpAddr) {
        // What is to be sent again is not refused.
        if refusal.retry_after.is_none() {
            self.intake().note_refused();
        }
        if self.logged.check(None, 1, 0).is_ok() {
            let (source, status) = (&self.intake().shared.source, refusal.status.as_u16());
            tracing::warn!(%source, %sender, status, reason = refusal.text, "Source refused a request");
        }
    }

    async fn take(
        &self,
        (head, dialect): (&Parts, Dialect),
        body: &mut Incoming,
        caller: &Caller,
    ) -> Result<handover::Taken, Refusal> {
        self.check_target(head, dialect)?;
        self.admit(&head.headers, caller)?;
        if self.is_draining() {
            return Err(Refusal::later(StatusCode::SERVICE_UNAVAILABLE, "shutting down", RETRY_AFTER));
        }
        let written = self.written(&head.headers, dialect)?;
        let shutdown = &self.intake().shared.shutdown;
        let body = tokio::select! {
            body = timeout(BODY_TIME_MAX, self.read(head, dialect, body)) => {
                body.map_err(|_| Refusal::slow("the body took too long to arrive"))??
            }
            () = shutdown.draining() => {
                return Err(Refusal::later(StatusCode::SERVICE_UNAVAILABLE, "shutting down", RETRY_AFTER));
            }
        };
        handover::hand_over(self, (written, body), caller).await
    }

    fn check_target(&self, head: &Parts, dialect: Dialect) -> Result<(), Refusal> {
        let path = match &self.config.content {
            Content::Lines { path } => path.as_str(),
            Content::Otlp if dialect == Dialect::Grpc => grpc::EXPORT_PATH,
            Content::Otlp => OTLP_PATH,
        };
        if head.uri.path() != path {
            return Err(Refusal::new(StatusCode::NOT_FOUND, format!("nothing is here: lines are posted to {path}")));
        }
        if head.method != Method::POST {
            let refusal = Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "lines are sent with POST");
            return Err(refusal.with_header(header::ALLOW, "POST"));
        }
        Ok(())
    }

    fn admit(&self, headers: &HeaderMap, caller: &Caller) -> Result<(), Refusal> {
        let logins = caller.secrets.borrow().logins.clone();
        if logins.admit(headers.get(header::AUTHORIZATION).map(|value| value.as_bytes())) {
            return Ok(());
        }
        if let Err(wait) = self.failures.check(Some(caller.sender), 1, 0) {
            let refusal =
                Refusal::later(StatusCode::TOO_MANY_REQUESTS, "too many wrong secrets from your address", wait);
            self.intake().note_refused();
            return Err(refusal.closing());
        }
        let mut refusal =
            Refusal::new(StatusCode::UNAUTHORIZED, "a token or a user with a password is needed").closing();
        for challenge in logins.challenges() {
            refusal = refusal.with_header(header::WWW_AUTHENTICATE, challenge);
        }
        Err(refusal)
    }

    fn written(&self, headers: &HeaderMap, dialect: Dialect) -> Result<Written, Refusal> {
        let kind = answer::media_type(headers);
        let kinds = match (&self.config.content, kind.as_str()) {
            (_, "application/grpc" | "application/grpc+proto") if dialect == Dialect::Grpc => {
                return Ok(Written::Otlp(OtlpKind::Protobuf));
            }
            _ if dialect == Dialect::Grpc => "application/grpc+proto",
            (Content::Otlp, "application/x-protobuf") => return Ok(Written::Otlp(OtlpKind::Protobuf)),
            (Content::Otlp, "application/json") => return Ok(Written::Otlp(OtlpKind::Json)),
            (Content::Otlp, _) => "application/x-protobuf or application/json",
            (Content::Lines { .. }, "application/json") => return Ok(Written::Lines(BodyKind::Json)),
            (
                Content::Lines { .. },
                // The last two are what programs send that were told nothing.
                ""
                | "text/plain"
                | "application/x-ndjson"
                | "application/ndjson"
                | "application/jsonl"
                | "application/x-jsonlines"
                | "application/octet-stream"
                | "application/x-www-form-urlencoded",
            ) => return Ok(Written::Lines(BodyKind::Lines)),
            (Content::Lines { .. }, _) => "text/plain, application/x-ndjson or application/json",
        };
        let text = format!("Content-Type {kind:?} is not known here: send {kinds}");
        Err(Refusal::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, text))
    }

    /// The body, without its compression.
    async fn read(&self, head: &Parts, dialect: Dialect, body: &mut Incoming) -> Result<Body, Refusal> {
        let bytes_max = self.config.body_bytes_max;
        let refuse = |undecoded| match undecoded {
            Undecoded::TooLarge => too_large(bytes_max),
            Undecoded::NoMemory => {
                let text = "too many bodies are under way";
                Refusal::later(StatusCode::SERVICE_UNAVAILABLE, text, RETRY_AFTER)
            }
            Undecoded::Broken(text) => {
                Refusal::new(StatusCode::BAD_REQUEST, format!("the body cannot be unpacked: {text}"))
            }
        };
        let is_call = dialect == Dialect::Grpc;
        let coding = coding(&head.headers, &if is_call { grpc::ENCODING } else { header::CONTENT_ENCODING })?;
        let (coding, message_bytes, begun) = if is_call {
            let message = grpc::begin(body, coding, bytes_max).await?;
            (message.coding, Some(message.bytes), Some(message.begun))
        } else if body.size_hint().lower() > bytes_max as u64 {
            return Err(too_large(bytes_max));
        } else {
            (coding, None, next_data(body).await?)
        };
        let held = Held::nothing(self.memory.clone());
        let mut decoder = Decoder::new(coding, bytes_max, held).map_err(refuse)?;
        let (mut travelled, mut next) = (0, begun);
        while let Some(data) = next {
            travelled += data.len();
            if message_bytes.is_some_and(|bytes| travelled > bytes) {
                return Err(grpc::too_many());
            }
            if travelled > bytes_max {
                return Err(too_large(bytes_max));
            }
            if decoder.is_work() {
                let fed = tokio::task::spawn_blocking(move || decoder.feed(&data).map(|()| decoder)).await;
                decoder = fed.map_err(|_| Refusal::broken())?.map_err(refuse)?;
            } else {
                decoder.feed(&data).map_err(refuse)?;
            }
            next = next_data(body).await?;
        }
        if message_bytes.is_some_and(|bytes| travelled < bytes) {
            return Err(grpc::cut());
        }
        decoder.finish().map_err(refuse)
    }
}

fn too_large(bytes_max: usize) -> Refusal {
    let text = format!("a body has {bytes_max} bytes at most, uncompressed too");
    Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, text)
}

/// The next bytes of a body; `None` at its end.
async fn next_data(body: &mut Incoming) -> Result<Option<Bytes>, Refusal> {
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| Refusal::new(StatusCode::BAD_REQUEST, "the body broke off"))?;
        if let Ok(data) = frame.into_data() {
            return Ok(Some(data));
        }
    }
    Ok(None)
}

/// What the header `name` says.
fn coding(headers: &HeaderMap, name: &HeaderName) -> Result<Coding, Refusal> {
    let mut values = headers.get_all(name).iter();
    let value = values.next().map_or(Ok(""), |value| value.to_str());
    let coding = match (value, values.next()) {
        (Ok(value), None) => Coding::parse(value),
        (Ok(_), Some(_)) => Err("a body is compressed once at most".to_owned()),
        (Err(_), _) => Err(format!("{name} is no name")),
    };
    coding.map_err(|text| {
        let refusal = Refusal::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, text);
        refusal.with_header(header::ACCEPT_ENCODING, "gzip, zstd, deflate")
    })
}

async fn discard(body: &mut Incoming) {
    let read = async {
        let mut left = DISCARD_BYTES_MAX;
        while let Some(Ok(frame)) = body.frame().await {
            let bytes = frame.data_ref().map_or(0, |data| data.len());
            let Some(rest) = left.checked_sub(bytes) else { return };
            left = rest;
        }
    };
    let _late = timeout(DISCARD_TIME_MAX, read).await;
}
