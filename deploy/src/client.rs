//! The client of the operator API: typed calls over the unix socket of a running Portcullis.
//!
//! It decides nothing and repeats nothing: one call, one answer, or an error that says what to do.

use std::error::Error;
use std::fmt;
use std::io::{self, ErrorKind};
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use nix::unistd::{Gid, Group};
use proto::api::{
    AllowReply, AllowRequest, ApiError, BanReply, BanRequest, BansReply, ExplainReply, PauseReply, PauseRequest,
    StatusReply, UnbanReply, UnbanRequest, path,
};
use proto::envelope::CloudEvent;
use proto::time::render_duration;
use reqwest::{Method, Response};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// How long an answer may take. The slowest asks every back end and lists all bans.
pub const ANSWER_MAX: Duration = Duration::from_secs(10);
/// Longest answer in bytes. 100,000 bans with full evidence take about 200 MB.
const ANSWER_BYTES_MAX: usize = 512 << 20;
/// Longest event of `tail` in bytes; evidence is bounded far below.
const EVENT_BYTES_MAX: usize = 1 << 20;
/// The group that may use the system's socket, for the error text where the socket itself cannot be looked at.
const GROUP: &str = "portcullis";

/// The API refused, or failed at, what was asked.
#[derive(Debug)]
pub struct Refused(String);

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for Refused {}

/// A way to one socket.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
    http: reqwest::Client,
    answer_max: Duration,
}

impl Client {
    /// Nothing is connected yet.
    pub fn new(socket: &Path) -> anyhow::Result<Self> {
        let http = reqwest::Client::builder().unix_socket(socket).build().context("cannot make an HTTP client")?;
        Ok(Self { socket: socket.to_owned(), http, answer_max: ANSWER_MAX })
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
            serde_json::from_slice(&bytes).with_context(|| format!("cannot understand the answer to {path}"))
        };
        tokio::time::timeout(self.answer_max, answer).await.unwrap_or_else(|_| Err(self.silent()))
    }

    /// Sends one request; returns once the head of a good answer is there.
    async fn send(&self, method: Method, path: &str, body: Option<&impl Serialize>) -> anyhow::Result<Response> {
        let mut request = self.http.request(method, format!("http://portcullis{path}"));
        if let Some(body) = body {
            request = request.json(body);
        }
        let response = match tokio::time::timeout(self.answer_max, request.send()).await {
            Err(_) => return Err(self.silent()),
            Ok(Err(error)) => return Err(self.explain_failure(error)),
            Ok(Ok(response)) => response,
        };
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let bytes = read_body(response).await.with_context(|| self.broken())?;
        let text = match serde_json::from_slice::<ApiError>(&bytes) {
            Ok(refusal) => refusal.error,
            Err(_) => format!("the server answered {status} to {path}"),
        };
        Err(Refused(text).into())
    }

    fn silent(&self) -> anyhow::Error {
        anyhow!("no answer from {} within {}", self.socket.display(), render_duration(self.answer_max))
    }

    fn broken(&self) -> String {
        format!("cannot read the answer from {}", self.socket.display())
    }

    /// Turns a failure to connect into what a person can act on.
    fn explain_failure(&self, error: reqwest::Error) -> anyhow::Error {
        let socket = self.socket.display();
        if !error.is_connect() {
            return anyhow::Error::new(error).context(self.broken());
        }
        match io_kind(&error) {
            Some(ErrorKind::NotFound) => anyhow!("portcullis does not run here (no socket at {socket})"),
            Some(ErrorKind::ConnectionRefused) => {
                anyhow!("portcullis does not run here (nobody listens at {socket})")
            }
            Some(ErrorKind::PermissionDenied) => {
                anyhow!("no permission to use {socket}: only root and the group `{}` may", self.group())
            }
            _ => anyhow::Error::new(error).context(format!("cannot connect to {socket}")),
        }
    }

    /// The group of the socket, or the usual one where even that cannot be seen.
    fn group(&self) -> String {
        let gid = std::fs::metadata(&self.socket).ok().map(|meta| meta.gid());
        let group = gid.and_then(|gid| Group::from_gid(Gid::from_raw(gid)).ok().flatten());
        group.map_or_else(|| GROUP.to_owned(), |group| group.name)
    }
}

/// The kind of the I/O error that a failure rests on.
fn io_kind(error: &reqwest::Error) -> Option<ErrorKind> {
    let mut cause: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return Some(io.kind());
        }
        cause = error.source();
    }
    None
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
            match self.response.chunk().await.context("cannot read the next event")? {
                Some(chunk) => self.pending.extend_from_slice(&chunk),
                None => return Ok(None),
            }
        }
    }
}
