//! The way of batches to the bus: sends them, tries again for as long as it takes, and keeps how far they are delivered.
//!
//! It drops nothing. While the bus is full or away the queue fills and sources stop reading, which loses nothing as long as
//! the logs are there, and the role's report says so. What is not delivered at the end is read again at the next start.
//! What to send when is decided in [`outbox`]; here it is done.

mod outbox;

use std::future::{self, Future};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt};
use proto::bus::publish::{Publish, PublishError};
use proto::event::AccessBatch;
use proto::report::Problem;
use proto::shutdown::Shutdown;
use proto::time::Clock;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;

use crate::metrics::Metrics;
use crate::source::checkpoint::{self, Checkpoint, CheckpointError};
use outbox::{Outbox, Sending, Trouble};

/// Default of `payload_bytes_max`: what nats-server takes by default, 1 MiB, less room for headers.
pub const PAYLOAD_BYTES_MAX: usize = (1 << 20) - (4 << 10);
/// How often positions are stored and the state is told.
const TICK: Duration = Duration::from_secs(1);

/// How to send.
#[derive(Clone, Debug)]
pub struct UplinkConfig {
    /// Name of this node: the beginning of all ids.
    pub node: Arc<str>,
    /// Largest payload that the bus takes, in bytes; at least some thousand.
    pub payload_bytes_max: usize,
    /// How long after the shutdown begins deliveries are still waited for. Shorter than what the process is given.
    pub drain: Duration,
}

/// What the uplink is connected to.
#[derive(Debug)]
pub struct UplinkInputs {
    /// From the sources. It closes when the last of them ends.
    pub batches: mpsc::Receiver<AccessBatch>,
    /// How far everything was delivered, and where to keep it.
    pub checkpoint: Checkpoint,
    /// The time.
    pub clock: Clock,
    /// Where problems are told; the role's report takes them from there.
    pub status: Status,
    /// Registered figures.
    pub metrics: Metrics,
    /// When to end.
    pub shutdown: Shutdown,
}

/// What is wrong with the uplink. Cheap to clone; all clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Status(Arc<Mutex<Vec<Problem>>>);

impl Status {
    /// What to put into the role's report.
    pub fn problems(&self) -> Vec<Problem> {
        self.lock().clone()
    }

    pub(crate) fn set(&self, problems: Vec<Problem>) {
        *self.lock() = problems;
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Problem>> {
        // The list is replaced whole, so a panic elsewhere cannot leave it half-written.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sends batches until the sources have ended and all is delivered, or until the drain time is over or the end is forced.
/// Positions are stored last of all.
///
/// # Errors
/// When the positions could not be stored at the end: the next start sends again what was delivered since the last time.
pub async fn run<P>(config: UplinkConfig, inputs: UplinkInputs, publisher: P) -> Result<(), CheckpointError>
where
    P: Publish + Clone + Send + Sync + 'static,
{
    let UplinkInputs { mut batches, checkpoint, clock, status, metrics, shutdown } = inputs;
    let end = drain_end(shutdown, config.drain);
    tokio::pin!(end);
    let mut uplink = Uplink::new(&config, checkpoint, publisher, (clock, status, metrics));
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut open = true;
    while open || !uplink.outbox.is_empty() {
        let wait = uplink.send_due();
        tokio::select! {
            biased;
            () = &mut end => break,
            _ = ticks.tick() => uplink.tick(),
            stored = finished(&mut uplink.storing) => uplink.note_stored(stored),
            Some((number, answer)) = uplink.attempts.next() => uplink.note_answer(number, answer),
            batch = batches.recv(), if open && uplink.outbox.has_room() => match batch {
                Some(batch) => uplink.outbox.push(batch, uplink.clock.raw()),
                None => {
                    open = false;
                    uplink.outbox.close();
                }
            },
            () = tokio::time::sleep(wait.unwrap_or_default()), if wait.is_some() => {}
        }
    }
    // Sources that still wait for room are let go.
    drop(batches);
    uplink.finish().await
}

/// A name for this run of `node` that nobody can guess.
fn run_id(node: &str) -> String {
    // The standard library's keys come from the system's random numbers.
    let random = || RandomState::new().build_hasher().finish();
    format!("{node}-{:016x}{:016x}", random(), random())
}

/// Returns when nothing is waited for any longer.
async fn drain_end(shutdown: Shutdown, drain: Duration) {
    shutdown.draining().await;
    tokio::select! {
        () = tokio::time::sleep(drain) => {}
        () = shutdown.forced() => {}
    }
}

/// One try to send a payload.
type Attempt = Pin<Box<dyn Future<Output = (u64, Result<(), PublishError>)> + Send>>;
/// Positions on their way to the disk, and the count of changes that they hold.
type Storing = JoinHandle<(u64, Result<(), CheckpointError>)>;

struct Uplink<P> {
    publisher: P,
    outbox: Outbox,
    /// Polled in the order in which they began, so that payloads leave in that order.
    attempts: FuturesUnordered<Attempt>,
    state_dir: PathBuf,
    storing: Option<Storing>,
    stored_changes: u64,
    /// What is wrong with storing.
    store_problem: Option<String>,
    set_aside: Option<Problem>,
    told_trouble: bool,
    clock: Clock,
    status: Status,
    metrics: Metrics,
}

impl<P: Publish + Clone + Send + Sync + 'static> Uplink<P> {
    fn new(
        config: &UplinkConfig,
        checkpoint: Checkpoint,
        publisher: P,
        (clock, status, metrics): (Clock, Status, Metrics),
    ) -> Self {
        let Checkpoint { state_dir, progress, set_aside } = checkpoint;
        let set_aside = set_aside.map(|path| {
            tracing::warn!(path = %path.display(), "The positions in the logs were not readable and are set aside");
            let path = path.display();
            Problem::warning(format!(
                "the positions in the logs were not readable: all logs were begun anew; see {path}"
            ))
        });
        Self {
            stored_changes: progress.changes(),
            outbox: Outbox::new(&run_id(&config.node), config.payload_bytes_max, progress),
            publisher,
            attempts: FuturesUnordered::new(),
            state_dir,
            storing: None,
            store_problem: None,
            set_aside,
            told_trouble: false,
            clock,
            status,
            metrics,
        }
    }

    /// Begins to send whatever is due. Returns how long nothing else is.
    fn send_due(&mut self) -> Option<Duration> {
        let now = self.clock.raw();
        while let Some(Sending { number, id, payload }) = self.outbox.poll_sending(now) {
            let publisher = self.publisher.clone();
            self.attempts.push(Box::pin(async move { (number, publisher.publish(&id, payload).await) }));
        }
        self.metrics.uplink.in_flight.set(self.outbox.in_flight() as i64);
        self.metrics.uplink.cut_events.inc_by(self.outbox.take_cut_events());
        self.outbox.poll_timeout(now)
    }

    fn note_answer(&mut self, number: u64, answer: Result<(), PublishError>) {
        let metrics = &self.metrics.uplink;
        if answer.is_err() {
            metrics.retries.inc();
        }
        if let Some(delivered) = self.outbox.handle_answer(number, answer, self.clock.raw()) {
            metrics.batches.inc();
            metrics.events.inc_by(delivered.events);
            metrics.bytes.inc_by(delivered.bytes);
        }
    }

    /// Stores positions that have changed, and tells how it goes.
    fn tick(&mut self) {
        let changes = self.outbox.progress().changes();
        if changes != self.stored_changes && self.storing.is_none() {
            self.storing = Some(self.start_storing());
        }
        self.tell_trouble();
        let trouble = self.outbox.trouble().map(|trouble| describe(trouble, self.outbox.undelivered()));
        let storing = self.store_problem.clone().map(Problem::degraded);
        self.status.set(trouble.into_iter().chain(storing).chain(self.set_aside.clone()).collect());
    }

    /// Only a trouble that lasts from one tick to the next is worth a line.
    fn tell_trouble(&mut self) {
        match self.outbox.trouble() {
            Some(Trouble { since, error }) if !self.told_trouble => {
                tracing::warn!(%since, %error, "Batches do not get through, sources will stop reading");
                self.told_trouble = true;
            }
            None if self.told_trouble => {
                tracing::info!("Batches get through again");
                self.told_trouble = false;
            }
            _ => {}
        }
    }

    fn start_storing(&self) -> Storing {
        let progress = self.outbox.progress();
        let (changes, content, state_dir) = (progress.changes(), checkpoint::encode(progress), self.state_dir.clone());
        tokio::task::spawn_blocking(move || (changes, checkpoint::store(&state_dir, &content)))
    }

    fn note_stored(&mut self, (changes, stored): (u64, Result<(), CheckpointError>)) {
        match stored {
            Ok(()) => {
                self.stored_changes = changes;
                self.store_problem = None;
            }
            Err(error) => {
                let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
                if self.store_problem.is_none() {
                    tracing::error!(%error, cause, "Positions are not stored, a restart would send batches again");
                }
                self.store_problem = Some(format!("{error}: {cause}; a restart would send batches again"));
            }
        }
    }

    async fn finish(mut self) -> Result<(), CheckpointError> {
        if self.storing.is_some() {
            let stored = finished(&mut self.storing).await;
            self.note_stored(stored);
        }
        let undelivered = self.outbox.undelivered();
        if undelivered > 0 {
            tracing::warn!(batches = undelivered, "Batches are not delivered, the next start reads them again");
        }
        finished(&mut Some(self.start_storing())).await.1
    }
}

fn describe(trouble: &Trouble, batches: usize) -> Problem {
    let Trouble { since, error } = trouble;
    let what = match error {
        PublishError::Full => "the bus is full".to_owned(),
        PublishError::Unavailable(why) => format!("the bus is not reachable ({why})"),
        PublishError::Refused(why) => format!("the bus refuses batches ({why})"),
    };
    Problem::degraded(format!("{what} since {since}: {batches} batches wait, and sources stop reading"))
}

/// Returns when what is being stored is stored; never when nothing is.
async fn finished(storing: &mut Option<Storing>) -> (u64, Result<(), CheckpointError>) {
    let Some(task) = storing else { return future::pending().await };
    let joined = task.await;
    *storing = None;
    match joined {
        Ok(stored) => stored,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // Cancelled: the runtime ends, and nobody comes back here.
            Err(_) => future::pending().await,
        },
    }
}

#[cfg(test)]
mod tests;
