//! Questions between roles: what holds an address, and what an API received that only the active detector can do.

use std::net::IpAddr;
use std::time::Duration;

use async_nats::{HeaderMap, Message};
use futures_util::StreamExt;
use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

use super::nodes::SILENT_AFTER;
use super::{BusError, Connection, encode};
use crate::api::{BackendHold, HoldState};
use crate::bus::memory::{Nodes, Question};
use crate::report::Role;
use crate::shutdown::Shutdown;

/// How long an enforcer may take to say what holds an address.
const EXPLAIN_TIMEOUT: Duration = Duration::from_secs(2);
/// Largest answer that is forwarded, before compression: all targets of an `unban --all`.
const REPLY_BYTES_MAX: usize = 64 << 20;

/// HTTP status of an answer that cannot be passed on.
const INSUFFICIENT_STORAGE: u16 = 507;

#[derive(Serialize, Deserialize)]
struct Explain {
    address: IpAddr,
}

/// Hands the questions of detect to this host's enforcer, until the shutdown.
///
/// # Errors
/// When the client cannot subscribe.
pub async fn serve_explain(
    connection: Connection,
    node: String,
    questions: mpsc::Sender<Question>,
    shutdown: Shutdown,
) -> Result<(), BusError> {
    let subject = connection.subjects().explain(&node);
    serve(&connection, subject, &shutdown, move |payload| {
        let questions = questions.clone();
        async move {
            let Explain { address } = serde_json::from_slice(&payload).ok()?;
            let (reply, answer) = oneshot::channel();
            questions.send(Question { address, reply }).await.ok()?;
            Some(encode(&answer.await.ok()?))
        }
    })
    .await
}

/// Asks every enforcer that has been heard of, until the shutdown: the other end of `questions`.
///
/// # Errors
/// None: who does not answer is named in the answer.
pub async fn relay_explain(
    connection: Connection,
    nodes: Nodes,
    mut questions: mpsc::Receiver<Question>,
    shutdown: Shutdown,
) -> Result<(), std::convert::Infallible> {
    loop {
        let question = tokio::select! {
            question = questions.recv() => question,
            () = shutdown.draining() => return Ok(()),
        };
        let Some(Question { address, reply }) = question else {
            shutdown.draining().await;
            return Ok(());
        };
        let (connection, nodes) = (connection.clone(), nodes.clone());
        tokio::spawn(async move {
            let enforcers = nodes.all().into_iter().filter(|report| report.role == Role::Enforce);
            let asked = enforcers.map(|report| {
                let now = connection.clock().now();
                ask_enforcer(&connection, report.node, address, now.since(report.at) < SILENT_AFTER)
            });
            // Who asked may have gone.
            let _gone = reply.send(join_all(asked).await.concat());
        });
    }
}

async fn ask_enforcer(connection: &Connection, node: String, address: IpAddr, alive: bool) -> Vec<BackendHold> {
    let subject = connection.subjects().explain(&node);
    let asked = connection.request(&subject, HeaderMap::new(), encode(&Explain { address }));
    let answer = match alive {
        true => tokio::time::timeout(EXPLAIN_TIMEOUT, asked).await.ok().and_then(Result::ok),
        false => None,
    };
    let holds = answer.and_then(|message| serde_json::from_slice(&message.payload).ok());
    holds.unwrap_or_else(|| {
        let hold = BackendHold::without(HoldState::Silent, "this host does not answer: what it holds is not known");
        vec![BackendHold { node, backend: BackendHold::UNKNOWN.to_owned(), ..hold }]
    })
}

/// A request to the operator API that another detector received.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ApiCall {
    /// `GET` or `POST`.
    pub method: String,
    /// Path and query.
    pub path: String,
    /// JSON, or empty.
    pub body: String,
}

/// The answer to an [`ApiCall`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ApiAnswer {
    /// HTTP status.
    pub status: u16,
    /// JSON.
    pub body: String,
}

/// Asks the active detector.
///
/// # Errors
/// When none answers.
pub async fn call_api(connection: &Connection, call: &ApiCall) -> Result<ApiAnswer, BusError> {
    let subject = connection.subjects().api();
    let message = connection.request(&subject, HeaderMap::new(), encode(call)).await?;
    let garbled = || BusError::Garbled { what: subject.clone() };
    let json = zstd::bulk::decompress(&message.payload, REPLY_BYTES_MAX).map_err(|_| garbled())?;
    serde_json::from_slice(&json).map_err(|_| garbled())
}

/// Answers what other detectors pass on, until the shutdown. Only for the active one.
///
/// # Errors
/// When the client cannot subscribe.
pub async fn serve_api<F, A>(connection: Connection, shutdown: Shutdown, handle: F) -> Result<(), BusError>
where
    F: Fn(ApiCall) -> A + Clone + Send + Sync + 'static,
    A: Future<Output = ApiAnswer> + Send,
{
    let subject = connection.subjects().api();
    let payload_max = connection.clone();
    serve(&connection, subject, &shutdown, move |payload| {
        let (handle, payload_max) = (handle.clone(), payload_max.payload_max());
        async move {
            let answer = handle(serde_json::from_slice(&payload).ok()?).await;
            let packed = zstd::bulk::compress(&encode(&answer), 1).ok()?;
            if packed.len() <= payload_max {
                return Some(packed);
            }
            let error =
                "it was carried out, but the answer is too long to be passed on: ask the active detector itself";
            let body = serde_json::json!({ "error": error }).to_string();
            zstd::bulk::compress(&encode(&ApiAnswer { status: INSUFFICIENT_STORAGE, body }), 1).ok()
        }
    })
    .await
}

/// Answers each request in a task of its own; what cannot be understood gets no answer.
async fn serve<F, A>(connection: &Connection, subject: String, shutdown: &Shutdown, handle: F) -> Result<(), BusError>
where
    F: Fn(bytes::Bytes) -> A + Clone + Send + Sync + 'static,
    A: Future<Output = Option<Vec<u8>>> + Send,
{
    let subscribed = connection.client.subscribe(subject.clone()).await;
    let mut requests = subscribed.map_err(|_| BusError::Silent { what: subject })?;
    loop {
        let message: Option<Message> = tokio::select! {
            message = requests.next() => message,
            () = shutdown.draining() => return Ok(()),
        };
        let Some(message) = message else {
            shutdown.draining().await;
            return Ok(());
        };
        let Some(reply) = message.reply else { continue };
        let (client, handle) = (connection.client.clone(), handle.clone());
        tokio::spawn(async move {
            if let Some(answer) = handle(message.payload).await {
                // Without a connection the asker learns it by waiting.
                let _unsent = client.publish(reply, answer.into()).await;
            }
        });
    }
}
