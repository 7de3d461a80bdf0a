//! The operator API: HTTP with JSON. See [`proto::api`] for paths and types.
//!
//! [`router`] answers requests and knows nothing of how they came: who may ask what is decided before it, by [`unix`] or
//! [`tcp`]. A request is small, and an answer is sent once its effect is durable. `GET` changes nothing.

mod access;
pub mod forward;
pub mod metrics;
pub mod tcp;
mod tokens;
pub mod unix;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{DefaultBodyLimit, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures_util::Stream;
use proto::api::{
    AllowRequest, ApiError, BanReply, BanRequest, BansReply, ExplainReply, PauseReply, PauseRequest, StatusReply,
    UnbanRequest, path,
};
use proto::bus::memory::{BanBucket, Nodes, Question};
use proto::envelope::CloudEvent;
use proto::shutdown::Shutdown;
use proto::time::Clock;
use serde::Deserialize;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, mpsc, oneshot};

use crate::engine::command::{Command, Reply};
use crate::leaks::stamp;
use crate::worker::{CommandError, Request};

/// Largest request body, in bytes.
const BODY_MAX: usize = 256 * 1024;
/// How long the worker or an enforcer may take to answer: less than callers wait, so that they learn why.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);
/// How long `tail` says nothing before it sends an empty line, by which both ends learn that the other has gone.
const TAIL_SILENCE_MAX: Duration = Duration::from_secs(15);

/// What the API answers from.
#[derive(Clone, Debug)]
pub struct Backing {
    /// The worker.
    pub requests: mpsc::Sender<Request>,
    /// The desired state.
    pub bans: BanBucket,
    /// Every role's report.
    pub nodes: Nodes,
    /// Public events.
    pub events: broadcast::Sender<Arc<CloudEvent>>,
    /// The enforcer.
    pub questions: mpsc::Sender<Question>,
    /// Time.
    pub clock: Clock,
    /// Ends the endless answers.
    pub shutdown: Shutdown,
}

/// The API over its backing, for any listener that has checked who asks.
pub fn router(backing: Backing) -> Router {
    Router::new()
        .route(path::BAN, post(ban))
        .route(path::UNBAN, post(unban))
        .route(path::ALLOW, post(allow))
        .route(path::PAUSE, post(pause))
        .route(path::RESUME, post(resume))
        .route(path::BANS, get(bans))
        .route(path::STATUS, get(status))
        .route(path::EXPLAIN, get(explain))
        .route(path::TAIL, get(tail))
        .fallback(async || Refused(StatusCode::NOT_FOUND, "no such path".to_owned()))
        .method_not_allowed_fallback(async || Refused(StatusCode::NOT_FOUND, "no such method here".to_owned()))
        .layer(DefaultBodyLimit::max(BODY_MAX))
        .with_state(backing)
}

/// An error answer.
struct Refused(StatusCode, String);

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        (self.0, Json(ApiError { error: self.1 })).into_response()
    }
}

impl From<JsonRejection> for Refused {
    fn from(error: JsonRejection) -> Self {
        Self(StatusCode::BAD_REQUEST, error.body_text())
    }
}

impl From<QueryRejection> for Refused {
    fn from(error: QueryRejection) -> Self {
        Self(StatusCode::BAD_REQUEST, error.body_text())
    }
}

fn gone() -> Refused {
    Refused(
        StatusCode::SERVICE_UNAVAILABLE,
        "the detector does not answer: it is stopping or overloaded; an order may still be carried out".to_owned(),
    )
}

type Answer<T> = Result<Json<T>, Refused>;

async fn ask<T>(backing: &Backing, request: impl FnOnce(oneshot::Sender<T>) -> Request) -> Result<T, Refused> {
    let (reply, answer) = oneshot::channel();
    let asked = async {
        backing.requests.send(request(reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())
    };
    tokio::time::timeout(ANSWER_TIMEOUT, asked).await.map_err(|_| gone())?
}

async fn order(backing: &Backing, command: Command) -> Result<Reply, Refused> {
    let result = ask(backing, |reply| Request::Command(command, reply)).await?;
    result.map_err(|error| match error {
        CommandError::Refused(refusal) => Refused(StatusCode::CONFLICT, refusal.to_string()),
        CommandError::NotStored | CommandError::NotActive => {
            Refused(StatusCode::SERVICE_UNAVAILABLE, error.to_string())
        }
    })
}

fn unexpected() -> Refused {
    Refused(StatusCode::INTERNAL_SERVER_ERROR, "the detector gave another answer than was asked for".to_owned())
}

fn check_seconds(seconds: Option<u64>) -> Result<Option<Duration>, Refused> {
    match seconds {
        Some(0) => Err(Refused(StatusCode::BAD_REQUEST, "seconds must be at least 1".to_owned())),
        seconds => Ok(seconds.map(Duration::from_secs)),
    }
}

async fn ban(State(backing): State<Backing>, body: Result<Json<BanRequest>, JsonRejection>) -> Answer<BanReply> {
    let Json(BanRequest { target, seconds, reason }) = body?;
    let length = check_seconds(seconds)?;
    match order(&backing, Command::Ban { target, length, reason }).await? {
        Reply::Banned(ban) => Ok(Json(BanReply { ban: *ban })),
        _ => Err(unexpected()),
    }
}

async fn unban(
    State(backing): State<Backing>,
    body: Result<Json<UnbanRequest>, JsonRejection>,
) -> Answer<proto::api::UnbanReply> {
    let Json(UnbanRequest { targets, all }) = body?;
    if targets.is_empty() && !all {
        return Err(Refused(StatusCode::BAD_REQUEST, "name targets, or set all".to_owned()));
    }
    let command = if all { Command::UnbanAll } else { Command::Unban(targets) };
    match order(&backing, command).await? {
        Reply::Unbanned(reply) => Ok(Json(reply)),
        _ => Err(unexpected()),
    }
}

async fn allow(
    State(backing): State<Backing>,
    body: Result<Json<AllowRequest>, JsonRejection>,
) -> Answer<proto::api::AllowReply> {
    let Json(AllowRequest { target, seconds }) = body?;
    let length = check_seconds(seconds)?;
    match order(&backing, Command::Allow { target, length }).await? {
        Reply::Allowed(reply) => Ok(Json(reply)),
        _ => Err(unexpected()),
    }
}

async fn pause(State(backing): State<Backing>, body: Result<Json<PauseRequest>, JsonRejection>) -> Answer<PauseReply> {
    let Json(PauseRequest { seconds }) = body?;
    let length = check_seconds(seconds)?;
    match order(&backing, Command::Pause(length)).await? {
        Reply::Paused(paused) => Ok(Json(PauseReply { paused })),
        _ => Err(unexpected()),
    }
}

async fn resume(State(backing): State<Backing>) -> Answer<PauseReply> {
    match order(&backing, Command::Resume).await? {
        Reply::Paused(paused) => Ok(Json(PauseReply { paused })),
        _ => Err(unexpected()),
    }
}

async fn bans(State(backing): State<Backing>) -> Answer<BansReply> {
    if *backing.bans.watch().borrow() == 0 {
        let text = "this detector has not read the ban set yet: try again in a moment";
        return Err(Refused(StatusCode::SERVICE_UNAVAILABLE, text.to_owned()));
    }
    Ok(Json(BansReply { bans: backing.bans.all() }))
}

async fn status(State(backing): State<Backing>) -> Json<StatusReply> {
    Json(StatusReply { at: backing.clock.now(), nodes: backing.nodes.all() })
}

#[derive(Deserialize)]
struct ExplainQuery {
    address: IpAddr,
}

async fn explain(
    State(backing): State<Backing>,
    query: Result<Query<ExplainQuery>, QueryRejection>,
) -> Answer<ExplainReply> {
    let Query(ExplainQuery { address }) = query?;
    let (mut reply, confirmations) = ask(&backing, |reply| Request::Explain(address, reply)).await?;
    let (question, answer) = oneshot::channel();
    let asked = backing.questions.send_timeout(Question { address: reply.address, reply: question }, ANSWER_TIMEOUT);
    if asked.await.is_ok()
        && let Ok(Ok(mut holds)) = tokio::time::timeout(ANSWER_TIMEOUT, answer).await
    {
        stamp(&mut holds, &confirmations);
        reply.backends = holds;
    }
    Ok(Json(reply))
}

async fn tail(State(backing): State<Backing>) -> Response {
    let events = backing.events.subscribe();
    let stream = LineStream { events, shutdown: backing.shutdown };
    let body = Body::from_stream(lines(stream));
    ([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response()
}

/// Public events as lines, until the shutdown.
struct LineStream {
    events: broadcast::Receiver<Arc<CloudEvent>>,
    shutdown: Shutdown,
}

impl LineStream {
    async fn next(&mut self) -> Option<Bytes> {
        let received = tokio::select! {
            received = self.events.recv() => received,
            () = tokio::time::sleep(TAIL_SILENCE_MAX) => return Some(Bytes::from_static(b"\n")),
            () = self.shutdown.draining() => return None,
        };
        let line = match received {
            Ok(event) => serde_json::to_string(&*event).unwrap_or_default(),
            Err(RecvError::Lagged(missed)) => format!("{{\"missed\":{missed}}}"),
            Err(RecvError::Closed) => return None,
        };
        Some(Bytes::from(line + "\n"))
    }
}

fn lines(stream: LineStream) -> impl Stream<Item = Result<Bytes, std::convert::Infallible>> {
    futures_util::stream::unfold(stream, |mut stream| async move { stream.next().await.map(|line| (Ok(line), stream)) })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proto::bus::memory::Bus;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixStream;

    use super::*;

    fn backing(bus: &Bus, shutdown: &Shutdown) -> (Backing, mpsc::Receiver<Request>) {
        let (requests, requests_in) = mpsc::channel(1);
        let backing = Backing {
            requests,
            bans: bus.bans.clone(),
            nodes: bus.nodes.clone(),
            events: bus.events.clone(),
            questions: bus.questions.clone(),
            clock: Clock::system(),
            shutdown: shutdown.clone(),
        };
        (backing, requests_in)
    }

    /// Sends one request as it stands and reads the answer to its end.
    async fn send(path: &Path, head: &str, body: &str) -> String {
        let mut stream = UnixStream::connect(path).await.unwrap();
        let length = body.len();
        let request = format!(
            "{head} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn bad_requests_get_a_reason_and_do_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let (bus, shutdown) = (Bus::new(), Shutdown::new());
        let (backing, mut requests) = backing(&bus, &shutdown);
        let server = tokio::spawn(unix::run(unix::Socket::bind(&path).unwrap(), router(backing), shutdown.clone()));
        for (head, body, status, reason) in [
            ("POST /v1/ban", "{", 400, "Failed to parse"),
            ("POST /v1/ban", r#"{"target":"192.0.2.1/40","seconds":1}"#, 400, "expected an IP address"),
            ("POST /v1/ban", r#"{"target":"192.0.2.1","seconds":0}"#, 400, "at least 1"),
            ("POST /v1/ban", r#"{"target":"192.0.2.1","secnds":1}"#, 400, "unknown field"),
            ("POST /v1/unban", "{}", 400, "name targets"),
            ("GET /v1/explain?address=host", "", 400, "address"),
            ("GET /v1/bans", "", 503, "not read the ban set yet"),
            ("GET /v1/ban", "", 404, "no such method"),
            ("GET /v2", "", 404, "no such path"),
        ] {
            let answer = send(&path, head, body).await;
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{head} {body}: {answer}");
            assert!(answer.contains("{\"error\":") && answer.contains(reason), "{head} {body}: {answer}");
        }
        let large = format!(r#"{{"target":"192.0.2.1","seconds":1,"reason":"{}"}}"#, "x".repeat(BODY_MAX));
        assert!(send(&path, "POST /v1/ban", &large).await.starts_with("HTTP/1.1 4"));
        assert!(requests.try_recv().is_err(), "nothing reached the worker");
        shutdown.begin();
        server.await.unwrap().unwrap();
        assert!(!path.exists(), "the socket is removed at the end");
    }
}
