//! The client of the operator API: typed calls to a running Portcullis, on this host or another.
//!
//! It decides nothing and repeats nothing: one call, one answer, or an error that says what to do.

mod way;

use std::error::Error;
use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use proto::api::{
    AllowReply, AllowRequest, ApiError, BanReply, BanRequest, BansReply, ExplainReply, PauseReply, PauseRequest,
    StatusReply, UnbanReply, UnbanRequest, path,
};
use proto::envelope::CloudEvent;
use proto::time::render_duration;
use reqwest::{Method, Response, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use self::way::Way;
#[cfg(test)]
pub(crate) use self::way::use_ring;

/// How long an answer may take. The slowest asks every back end and lists all bans.
pub const ANSWER_MAX: Duration = Duration::from_secs(10);
/// Longest answer in bytes. 100,000 bans with full evidence take about 200 MB.
const ANSWER_BYTES_MAX: usize = 512 << 20;
/// Longest event of `tail` in bytes; evidence is bounded far below.
const EVENT_BYTES_MAX: usize = 1 << 20;
/// How long `tail` may bring nothing at all: the server sends an empty line every 15 seconds.
const TAIL_SILENCE_MAX: Duration = Duration::from_secs(60);

/// The API refused, or failed at, what was asked.
#[derive(Debug)]
pub struct Refused(String);

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for Refused {}

/// Calls to one Portcullis.
#[derive(Clone, Debug)]
pub struct Client {
    way: Way,
    http: reqwest::Client,
    answer_max: Duration,
}

impl Client {
    /// Nothing is connected yet.
    pub fn new(way: Way) -> anyhow::Result<Self> {
        let http = way.http()?;
        Ok(Self { way, http, answer_max: ANSWER_MAX })
    }

    /// Orders a ban.
    pub async fn ban(&self, request: &BanRequest) -> anyhow::Result<BanReply> {
        self.post(path::BAN, request).await
    }

    /// Lifts bans.
    pub async fn unban(&self, request: &UnbanRequest) -> anyhow::Result<UnbanReply> {
        self.post(path::UNBAN, request).await
    }

    /// Never bans a target from now on.
    pub async fn allow(&self, request: &AllowRequest) -> anyhow::Result<AllowReply> {
        self.post(path::ALLOW, request).await
    }

    /// Lifts every ban for a while.
    pub async fn pause(&self, request: &PauseRequest) -> anyhow::Result<PauseReply> {
        self.post(path::PAUSE, request).await
    }

    /// Ends a pause.
    pub async fn resume(&self) -> anyhow::Result<PauseReply> {
        self.call(Method::POST, path::RESUME, None::<&()>).await
    }

    /// The bans in force.
    pub async fn bans(&self) -> anyhow::Result<BansReply> {
        self.get(path::BANS).await
    }

    /// Health of every role.
    pub async fn status(&self) -> anyhow::Result<StatusReply> {
        self.get(path::STATUS).await
    }

    /// Why an address is banned, or why not.
    pub async fn explain(&self, address: IpAddr) -> anyhow::Result<ExplainReply> {
        // The text of an address has no character that a query would have to escape.
        self.get(&format!("{}?address={address}", path::EXPLAIN)).await
    }

    /// Events from now on.
    pub async fn tail(&self) -> anyhow::Result<Events> {
        let response = self.send(Method::GET, path::TAIL, None::<&()>).await?;
        Ok(Events { response, pending: Vec::new() })
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        self.call(Method::GET, path, None::<&()>).await
    }

    async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> anyhow::Result<T> {
        self.call(Method::POST, path, Some(body)).await
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> anyhow::Result<T> {
        let answer = async {
            let response = self.send(method, path, body).await?;
            let bytes = read_body(response).await.with_context(|| self.broken())?;
            serde_json::from_slice(&bytes)
                .with_context(|| format!("cannot understand the answer to {path}: is {} of another version?", self.way))
        };
        tokio::time::timeout(self.answer_max, answer).await.unwrap_or_else(|_| Err(self.silent()))
    }

    /// Sends one request; returns once the head of a good answer is there.
    async fn send(&self, method: Method, path: &str, body: Option<&impl Serialize>) -> anyhow::Result<Response> {
        let mut request = self.http.request(method, self.way.address(path));
        if let Some(body) = body {
            request = request.json(body);
        }
        let response = match tokio::time::timeout(self.answer_max, request.send()).await {
            Err(_) => return Err(self.silent()),
            Ok(Err(error)) => return Err(self.way.explain_failure(error)),
            Ok(Ok(response)) => response,
        };
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let bytes = read_body(response).await.with_context(|| self.broken())?;
        let text = match (status, serde_json::from_slice::<ApiError>(&bytes)) {
            (StatusCode::UNAUTHORIZED, _) => format!("{} does not know this token", self.way),
            (StatusCode::NOT_FOUND, _) => format!("{} does not know {path}: it is of another version", self.way),
            (_, Ok(refusal)) => refusal.error,
            (_, Err(_)) => format!("the server answered {status} to {path}"),
        };
        Err(Refused(text).into())
    }

    fn silent(&self) -> anyhow::Error {
        anyhow!("no answer from {} within {}", self.way, render_duration(self.answer_max))
    }

    fn broken(&self) -> String {
        format!("cannot read the answer from {}", self.way)
    }
}

async fn read_body(mut response: Response) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        if bytes.len() + chunk.len() > ANSWER_BYTES_MAX {
            bail!("the answer is longer than {ANSWER_BYTES_MAX} bytes");
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

/// Events as they happen.
#[derive(Debug)]
pub struct Events {
    response: Response,
    pending: Vec<u8>,
}

impl Events {
    /// The next event; `None` when the server has ended.
    pub async fn next(&mut self) -> anyhow::Result<Option<CloudEvent>> {
        loop {
            if let Some(end) = self.pending.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=end).collect();
                // Empty lines keep a silent connection open.
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                return serde_json::from_slice(&line).map(Some).context("cannot understand an event");
            }
            if self.pending.len() > EVENT_BYTES_MAX {
                bail!("an event is longer than {EVENT_BYTES_MAX} bytes");
            }
            let chunk = tokio::time::timeout(TAIL_SILENCE_MAX, self.response.chunk()).await;
            let chunk = chunk.with_context(|| format!("nothing came for {}", render_duration(TAIL_SILENCE_MAX)))?;
            match chunk.context("cannot read the next event")? {
                Some(chunk) => self.pending.extend_from_slice(&chunk),
                None => return Ok(None),
            }
        }
    }
}
