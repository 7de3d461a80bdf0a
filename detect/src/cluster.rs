//! Detection over the bus: any number of detectors, of which one decides.
//!
//! All of them follow the shared state and the log of batches ([`standby`]). The one that holds the lease decides
//! ([`leader`]): it handles what stands after the floor, and writes what that led to together with the new floor in one
//! atomic batch, which is refused if anybody has written since. So whoever is wrong about being active changes nothing,
//! and whoever takes over begins exactly where the last commit ended.
//!
//! An engine whose decisions were not stored is thrown away: what is true stands in the shared state, and is read again.

mod coverage;
mod leader;
mod outbox;
mod seal;
mod standby;
mod view;
mod writer;

use std::sync::Arc;
use std::time::Duration;

use proto::bus::config::NatsConfig;
use proto::bus::nats::ask::{ApiAnswer, ApiCall};
use proto::bus::nats::follow::Entry;
use proto::bus::nats::lease::{Holder, Keeper, Lease};
use proto::bus::nats::{BusError, Connection, streams};
use proto::event::AccessBatch;
use proto::report::Problem;
use proto::shutdown::Shutdown;
use proto::subject::Subjects;
use proto::time::Timestamp;
use proto::wire::{WireError, decode_batch};
use tokio::sync::{mpsc, watch};

use crate::config::DetectConfig;
use crate::decider::Identity;
use crate::error::DetectError;
use crate::metrics::Metrics;
use crate::worker::{CommandError, Outlets, Request};
use standby::Standby;

/// Name of the lease of the active detector.
const LEASE: &str = "detect";
/// Wait before a detector that had to give up begins anew.
const RETRY: Duration = Duration::from_secs(1);
/// Bytes of batches that a standby keeps until they are decided; beyond that it reads on later.
const BACKLOG_BYTES_MAX: usize = 64 << 20;

/// Answers a request to the operator API that another detector received.
pub type ApiHandler = Arc<dyn Fn(ApiCall) -> std::pin::Pin<Box<dyn Future<Output = ApiAnswer> + Send>> + Send + Sync>;

/// What a detector of a cluster is made of.
pub struct Parts {
    /// Name of this node.
    pub node: Arc<str>,
    /// Rules and limits.
    pub config: DetectConfig,
    /// What the streams must be like.
    pub bus: NatsConfig,
    /// The way to them; its clock is everybody's.
    pub connection: Connection,
    /// What is published to this host.
    pub outlets: Outlets,
    /// Counters.
    pub metrics: Metrics,
    /// Whether this detector is the active one.
    pub active: watch::Sender<bool>,
    /// Serves what other detectors pass on.
    pub api: ApiHandler,
}

/// Detects until the shutdown.
///
/// # Errors
/// None yet: what is wrong with the bus is reported, and tried again.
pub async fn run(parts: Parts, requests: mpsc::Receiver<Request>, shutdown: Shutdown) -> Result<(), DetectError> {
    let clock = parts.connection.clock().clone();
    let instance = format!("{:x}", clock.now().as_nanos());
    let me = Holder { node: parts.node.to_string(), instance };
    let identity = Identity {
        node: parts.node.clone(),
        clock: clock.clone(),
        metrics: parts.metrics.clone(),
        names: parts.outlets.names.clone(),
        questions: parts.outlets.questions.clone(),
        started_at: clock.now(),
    };
    let mut role = Role { parts, identity, me, requests, shutdown, trouble: None, known: Default::default() };
    tracing::info!("Detection started");
    while !role.shutdown.is_draining() {
        match role.life().await {
            Ok(()) => {}
            Err(ended) => role.wait_after(ended).await,
        }
    }
    Ok(())
}

/// Why a detector begins anew.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Ended {
    /// The bus.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// Somebody else has written.
    #[error("another detector has taken over")]
    Deposed,
    /// The lease is another's, or gone.
    #[error("the lease is held by another detector")]
    LeaseLost,
    /// The lease is ours and leads to nothing.
    #[error("this detector holds the lease and cannot take over: another one shall try")]
    CannotLead,
    /// What was read of the state is older than what was seen before.
    #[error("the copy of the state that answers is behind")]
    Outdated,
    /// A standby has new rules.
    #[error("the configuration has changed")]
    Reloaded,
    /// The shared state is of a newer version.
    #[error("the shared state cannot be read: {0}")]
    Unreadable(String),
}

/// What outlives each try.
pub(crate) struct Role {
    parts: Parts,
    identity: Identity,
    me: Holder,
    requests: mpsc::Receiver<Request>,
    shutdown: Shutdown,
    /// Why the last try ended.
    trouble: Option<String>,
    /// The newest commit that this process has seen, and in which bucket.
    known: (String, proto::head::Mark),
}

impl Role {
    /// From the state as it stands to the end of this detector's part in it.
    async fn life(&mut self) -> Result<(), Ended> {
        if self.until_ready().await?.is_none() {
            return Ok(());
        }
        let connection = self.parts.connection.clone();
        let mut lease =
            Keeper::spawn(Lease::new(&connection, connection.subjects().lease_bucket(), LEASE, self.me.clone()));
        let ended = self.serve(&mut lease).await;
        self.parts.active.send_replace(false);
        lease.give_back().await;
        ended
    }

    async fn serve(&mut self, lease: &mut Keeper) -> Result<(), Ended> {
        let Some(standby) = Standby::start(self).await? else { return Ok(()) };
        let Some(leader) = standby.run(self, lease).await? else { return Ok(()) };
        leader.run(self, lease).await
    }

    /// Waits for the bus and makes what is absent there; `None` at the shutdown.
    async fn until_ready(&mut self) -> Result<Option<()>, Ended> {
        let (connection, bus) = (self.parts.connection.clone(), self.parts.bus.clone());
        let ready = async {
            connection.ready().await?;
            streams::ensure(&connection, &bus).await
        };
        tokio::pin!(ready);
        loop {
            tokio::select! {
                done = &mut ready => return Ok(Some(done?)),
                () = self.shutdown.draining() => return Ok(None),
                () = tokio::time::sleep(RETRY) => self.report_waiting("waits for NATS"),
                Some(request) = self.requests.recv() => refuse(request, &mut self.parts.config),
            }
        }
    }

    async fn wait_after(&mut self, ended: Ended) {
        match &ended {
            Ended::Reloaded => {
                self.trouble = None;
                return;
            }
            Ended::Deposed => {
                tracing::warn!("Another detector has taken over, what was not stored is decided there");
                self.trouble = None;
            }
            Ended::LeaseLost => {
                tracing::warn!("Lease lost, what was not stored is decided by whoever holds it");
                self.trouble = None;
            }
            Ended::Bus(_) | Ended::Unreadable(_) | Ended::CannotLead | Ended::Outdated => {
                let text = ended.to_string();
                if self.trouble.as_ref() != Some(&text) {
                    match &ended {
                        Ended::Bus(error) if error.is_passing() => {
                            tracing::warn!(reason = text, "Detection begins anew");
                        }
                        _ => tracing::error!(reason = text, "Detection begins anew"),
                    }
                }
                self.trouble = Some(text);
            }
        }
        self.report_waiting("begins anew");
        // Whoever could not lead lets others see that the lease is free.
        let pause = tokio::time::sleep(if matches!(ended, Ended::CannotLead) { RETRY * 5 } else { RETRY });
        tokio::pin!(pause);
        loop {
            tokio::select! {
                () = &mut pause => return,
                () = self.shutdown.draining() => return,
                Some(request) = self.requests.recv() => refuse(request, &mut self.parts.config),
            }
        }
    }

    fn report_reading(&self) {
        self.report_problem(Problem::warning("this detector reads the state"));
    }

    fn report_waiting(&self, what: &str) {
        let reason = self.trouble.as_ref().map_or_else(String::new, |trouble| format!(": {trouble}"));
        self.report_problem(Problem::degraded(format!("this detector {what}{reason}")));
    }

    fn report_problem(&self, problem: Problem) {
        let node = &self.identity.node;
        let mut report = proto::report::NodeReport::new(node, proto::report::Role::Detect, self.identity.started_at);
        report.at = self.identity.clock.now();
        report.duty = Some("standby".to_owned());
        report.problems.push(problem);
        self.parts.outlets.nodes.put(report);
    }
}

/// What cannot be served now. A new configuration is kept.
fn refuse(request: Request, config: &mut DetectConfig) {
    match request {
        Request::Command(_, reply) => {
            // Who asked may have gone.
            let _gone = reply.send(Err(CommandError::NotActive));
        }
        // Dropping the reply says that there is none.
        Request::Explain(..) | Request::Resolved { .. } => {}
        Request::Reload(new) => *config = *new,
    }
}

/// A batch of the log, as it came.
#[derive(Clone, Debug)]
pub(crate) struct Logged {
    /// Its number in the stream.
    pub(crate) sequence: u64,
    /// When it was stored.
    pub(crate) stamp: Timestamp,
    pub(crate) subject: String,
    pub(crate) payload: bytes::Bytes,
}

impl From<Entry> for Logged {
    fn from(entry: Entry) -> Self {
        Self { sequence: entry.sequence, stamp: entry.time, subject: entry.subject, payload: entry.payload }
    }
}

/// A batch that is refused for good.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BatchRefusal {
    /// It is no batch, or one that this version cannot read.
    #[error("a batch cannot be read")]
    Wire(#[from] WireError),
    /// A host speaks for another.
    #[error("a batch of node {claimed} was published as {published}")]
    Impostor {
        /// What the batch says.
        claimed: String,
        /// Whose subject it is.
        published: String,
    },
}

/// Reads a batch; its node must be the one whose subject it was published to, which the bus lets only that host use.
pub(crate) fn open_batch(subjects: &Subjects, logged: &Logged) -> Result<AccessBatch, BatchRefusal> {
    let batch = decode_batch(&logged.payload)?;
    let published = subjects.node_of_access(&logged.subject).unwrap_or_default();
    if *batch.node == *published {
        return Ok(batch);
    }
    Err(BatchRefusal::Impostor { claimed: batch.node.to_string(), published: published.to_owned() })
}

#[cfg(test)]
mod tests {
    use proto::wire::encode_batch;

    use super::*;

    #[test]
    fn a_host_cannot_speak_for_another() {
        let batch = AccessBatch::new("edge-1".into(), "s".into(), Timestamp::EPOCH);
        let logged = |node: &str, payload: Vec<u8>| Logged {
            sequence: 1,
            stamp: Timestamp::EPOCH,
            subject: format!("portcullis.access.v1.{node}"),
            payload: payload.into(),
        };
        let subjects = Subjects::new("portcullis");
        assert!(open_batch(&subjects, &logged("edge-1", encode_batch(&batch))).is_ok());
        let refusal = open_batch(&subjects, &logged("edge-2", encode_batch(&batch))).unwrap_err();
        assert_eq!(refusal.to_string(), "a batch of node edge-1 was published as edge-2");
        assert!(matches!(open_batch(&subjects, &logged("edge-1", b"{}".to_vec())), Err(BatchRefusal::Wire(_))));
    }
}
