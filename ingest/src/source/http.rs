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
mod handover;

use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::body::{Body as _, Incoming};
use hyper::header::{self, HeaderMap};
use hyper::http::request::Parts;
use hyper::{Method, Request, Response, StatusCode};
use proto::report::Problem;
use tokio::sync::Semaphore;
use tokio::time::timeout;

pub use auth::AuthFiles;

use self::answer::{Answer, Dialect, Refusal};
use self::auth::Logins;
use self::body::BodyKind;
use self::coding::{Body, Coding, Decoder, Held, Undecoded};
use super::batch::Stopped;
use super::intake::Intake;
use super::limit::{LimitConfig, Limits};
use super::listen::Listening;
use super::otlp::OtlpKind;
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
/// Wait before files of secrets that cannot be used are tried again.
const RETRY: Duration = Duration::from_secs(1);
/// The path of health, on every source of requests.
pub(crate) const HEALTH_PATH: &str = "/health";
/// The path of OTLP's logs.
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
    let Some(logins) = load_logins(&config.auth, &intake).await else { return Ok(()) };
    let listening = Listening::new(config.listen.clone(), intake);
    let clock = &listening.intake.shared.clock;
    let failures = LimitConfig { sender_lines: Some(NonZeroU32::MIN), burst: FAILURES_BURST, ..LimitConfig::default() };
    let logged = LimitConfig { lines: Some(NonZeroU32::MIN), burst: LOGGED_BURST, ..LimitConfig::default() };
    let server = Server {
        failures: Limits::new(&failures, clock.clone()),
        logged: Limits::new(&logged, clock.clone()),
        memory: Held::budget(MEMORY_BYTES_MAX),
        workers: Arc::new(Semaphore::new(WORKERS_MAX)),
        listening: listening.clone(),
        logins,
        config,
    };
    let server = Arc::new(server);
    listening.run(&["http/1.1"], move |connection, _| connection::serve(server.clone(), connection)).await
}

/// The secrets, as soon as they can be used; `None` at the shutdown.
async fn load_logins(files: &AuthFiles, intake: &Intake) -> Option<Logins> {
    loop {
        let files = files.clone();
        match tokio::task::spawn_blocking(move || Logins::load(&files)).await {
            Ok(Ok(logins)) => return Some(logins),
            Ok(Err(error)) => {
                let text = format!("{}: nobody can send; it is tried again until it is right", chain(&error));
                intake.set_problems(vec![Problem::degraded(text)]);
            }
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
        tokio::select! {
            () = intake.shared.shutdown.draining() => return None,
            () = tokio::time::sleep(RETRY) => {}
        }
    }
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
    logins: Logins,
    failures: Limits,
    logged: Limits,
    memory: Arc<Semaphore>,
    workers: Arc<Semaphore>,
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

    /// Answers one request. That nobody takes lines any more is left in `stopped`.
    async fn answer(
        &self,
        request: Request<Incoming>,
        sender: IpAddr,
        stopped: &OnceLock<Stopped>,
    ) -> Response<Answer> {
        let (head, mut body) = request.into_parts();
        let dialect = Dialect::of(&self.config.content, &head.headers);
        if head.uri.path() == HEALTH_PATH {
            return answer::health(&head.method, self.is_draining());
        }
        let taken = self.take((&head, &mut body), sender, stopped).await;
        match taken {
            Ok(taken) => answer::taken(dialect, taken),
            Err(refusal) => {
                self.note(&refusal, sender);
                if !body.is_end_stream() {
                    discard(body).await;
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
        (head, body): (&Parts, &mut Incoming),
        sender: IpAddr,
        stopped: &OnceLock<Stopped>,
    ) -> Result<handover::Taken, Refusal> {
        self.check_target(head)?;
        self.admit(&head.headers, sender)?;
        if self.is_draining() {
            return Err(Refusal::later(StatusCode::SERVICE_UNAVAILABLE, "shutting down", RETRY_AFTER));
        }
        let written = self.written(&head.headers)?;
        let coding = coding(&head.headers)?;
        let shutdown = &self.intake().shared.shutdown;
        let body = tokio::select! {
            body = timeout(BODY_TIME_MAX, self.read(body, coding)) => {
                body.map_err(|_| Refusal::slow("the body took too long to arrive"))??
            }
            () = shutdown.draining() => {
                return Err(Refusal::later(StatusCode::SERVICE_UNAVAILABLE, "shutting down", RETRY_AFTER));
            }
        };
        handover::hand_over(self, (written, body), sender, stopped).await
    }

    fn check_target(&self, head: &Parts) -> Result<(), Refusal> {
        let path = match &self.config.content {
            Content::Lines { path } => path.as_str(),
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

    fn admit(&self, headers: &HeaderMap, sender: IpAddr) -> Result<(), Refusal> {
        if self.logins.admit(headers.get(header::AUTHORIZATION).map(|value| value.as_bytes())) {
            return Ok(());
        }
        if let Err(wait) = self.failures.check(Some(sender), 1, 0) {
            let refusal =
                Refusal::later(StatusCode::TOO_MANY_REQUESTS, "too many wrong secrets from your address", wait);
            self.intake().note_refused();
            return Err(refusal.closing());
        }
        let mut refusal =
            Refusal::new(StatusCode::UNAUTHORIZED, "a token or a user with a password is needed").closing();
        for challenge in self.logins.challenges() {
            refusal = refusal.with_header(header::WWW_AUTHENTICATE, challenge);
        }
        Err(refusal)
    }

    fn written(&self, headers: &HeaderMap) -> Result<Written, Refusal> {
        let kind = answer::media_type(headers);
        let kinds = match (&self.config.content, kind.as_str()) {
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
    async fn read(&self, body: &mut Incoming, coding: Coding) -> Result<Body, Refusal> {
        let bytes_max = self.config.body_bytes_max;
        let too_large = || {
            Refusal::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                format!("a body has {bytes_max} bytes at most, uncompressed too"),
            )
        };
        let refuse = |undecoded| match undecoded {
            Undecoded::TooLarge => too_large(),
            Undecoded::NoMemory => {
                let text = "too many bodies are under way";
                Refusal::later(StatusCode::SERVICE_UNAVAILABLE, text, RETRY_AFTER)
            }
            Undecoded::Broken(text) => {
                Refusal::new(StatusCode::BAD_REQUEST, format!("the body cannot be unpacked: {text}"))
            }
        };
        if body.size_hint().lower() > bytes_max as u64 {
            return Err(too_large());
        }
        let held = Held::nothing(self.memory.clone());
        let mut decoder = Decoder::new(coding, bytes_max, held).map_err(refuse)?;
        let mut travelled = 0;
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|_| Refusal::new(StatusCode::BAD_REQUEST, "the body broke off"))?;
            let Ok(data) = frame.into_data() else { continue };
            travelled += data.len();
            if travelled > bytes_max {
                return Err(too_large());
            }
            if !decoder.is_work() {
                decoder.feed(&data).map_err(refuse)?;
                continue;
            }
            let fed = tokio::task::spawn_blocking(move || decoder.feed(&data).map(|()| decoder)).await;
            decoder = fed.map_err(|_| Refusal::broken())?.map_err(refuse)?;
        }
        decoder.finish().map_err(refuse)
    }
}

fn coding(headers: &HeaderMap) -> Result<Coding, Refusal> {
    let mut names = headers.get_all(header::CONTENT_ENCODING).iter();
    let name = names.next().map_or(Ok(""), |name| name.to_str());
    let coding = match (name, names.next()) {
        (Ok(name), None) => Coding::parse(name),
        (Ok(_), Some(_)) => Err("a body is compressed once at most".to_owned()),
        (Err(_), _) => Err("Content-Encoding is no name".to_owned()),
    };
    coding.map_err(|text| {
        let refusal = Refusal::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, text);
        refusal.with_header(header::ACCEPT_ENCODING, "gzip, zstd, deflate")
    })
}

async fn discard(mut body: Incoming) {
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
