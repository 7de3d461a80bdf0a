//! Publishes events once they are stored, in order, and then clears them from the shared state.
//!
//! It never holds up who decides: what does not fit into its queue is read from the state again, as is what a former
//! detector has left there.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use proto::bus::config::NatsConfig;
use proto::bus::nats::commit::{Unpublished, read_out};
use proto::bus::nats::events::{clear_out, clear_outbox, publish_event};
use proto::bus::nats::{BusError, Connection, streams};
use proto::envelope::CloudEvent;
use proto::report::Problem;
use proto::time::{Timestamp, render_duration};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// Commits whose events wait in memory; they are in the shared state as well.
const WAITING_MAX: usize = 1024;
/// First wait after a failure, doubled with each.
const RETRY_FIRST: Duration = Duration::from_millis(50);
/// Longest wait after a failure.
const RETRY_MAX: Duration = Duration::from_secs(2);
/// Refusals after which an event is given up: it would stand in the way of all others for ever.
const REFUSALS_MAX: u32 = 20;
/// Events that wait for so long are worth a word.
const LATE_AFTER: Duration = Duration::from_secs(10);

/// Events of one commit, as they share numbers.
#[derive(Debug)]
struct Parcel {
    /// The first number.
    first: u64,
    /// Number of the commit's last message in the state.
    last: u64,
    outs: Vec<Vec<CloudEvent>>,
}

/// The outbox of the active detector.
#[derive(Debug)]
pub(crate) struct Outbox {
    sender: Option<mpsc::Sender<Parcel>>,
    shared: Arc<Shared>,
    /// Since when some have not been published.
    late_since: Option<Timestamp>,
    task: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    /// What has a number before this one is published.
    published: AtomicU64,
    /// What has a number before this one was given.
    given: AtomicU64,
    /// Some are in the state alone.
    missed: AtomicBool,
}

impl Outbox {
    /// Begins with what is left in the state from number `first` on; `next` is the next to be numbered.
    pub(crate) fn spawn(connection: Connection, bus: NatsConfig, (first, next): (u64, u64)) -> Self {
        let (sender, parcels) = mpsc::channel::<Parcel>(WAITING_MAX);
        let (published, given) = (AtomicU64::new(first), AtomicU64::new(next));
        let shared = Arc::new(Shared { published, given, missed: AtomicBool::new(first < next) });
        let postman = Postman { connection, bus, shared: shared.clone() };
        let task = tokio::spawn(postman.run(parcels));
        Self { sender: Some(sender), shared, late_since: None, task }
    }

    /// Takes the events of a commit whose last message is `last`, as they share numbers, which end before `next`.
    pub(crate) fn send(&mut self, next: u64, last: u64, outs: Vec<Vec<CloudEvent>>) {
        if outs.is_empty() {
            return;
        }
        self.shared.given.store(next, Ordering::Release);
        let first = next - outs.len() as u64;
        let sent = self.sender.as_ref().map(|sender| sender.try_send(Parcel { first, last, outs }));
        if !matches!(sent, Some(Ok(()))) {
            self.shared.missed.store(true, Ordering::Release);
        }
    }

    /// First number whose events may not be published yet.
    pub(crate) fn first_unpublished(&self) -> u64 {
        self.shared.published.load(Ordering::Acquire).min(self.given())
    }

    fn given(&self) -> u64 {
        self.shared.given.load(Ordering::Acquire)
    }

    /// What is wrong, if events have waited for long.
    pub(crate) fn problem(&mut self, now: Timestamp) -> Option<Problem> {
        let waiting = self.given() - self.first_unpublished();
        if waiting == 0 {
            self.late_since = None;
            return None;
        }
        let since = *self.late_since.get_or_insert(now);
        let late = now.since(since);
        let text = || format!("events could not be published for {}", render_duration(late));
        (late >= LATE_AFTER).then(|| Problem::degraded(text()))
    }

    /// Returns once everything is published.
    pub(crate) async fn end(mut self) {
        self.sender = None;
        // A panic there leaves the rest to a successor.
        let _ended = (&mut self.task).await;
    }
}

impl Drop for Outbox {
    fn drop(&mut self) {
        // What is left is in the state, and a successor's: published by us later, it would come out of turn.
        self.task.abort();
    }
}

struct Postman {
    connection: Connection,
    bus: NatsConfig,
    shared: Arc<Shared>,
}

impl Postman {
    async fn run(self, mut parcels: mpsc::Receiver<Parcel>) {
        loop {
            if self.shared.missed.swap(false, Ordering::AcqRel) {
                self.publish_from_state().await;
            }
            let Some(parcel) = parcels.recv().await else { return };
            for (number, events) in (parcel.first..).zip(&parcel.outs) {
                if number >= self.shared.published.load(Ordering::Acquire) {
                    for event in events {
                        self.publish(event).await;
                    }
                    self.note_published(number);
                }
            }
            self.clear(parcel.last).await;
        }
    }

    /// What others have left, or what did not fit into the queue.
    async fn publish_from_state(&self) {
        let mut wait = RETRY_FIRST;
        loop {
            let number = self.shared.published.load(Ordering::Acquire);
            if number >= self.shared.given.load(Ordering::Acquire) {
                return;
            }
            match read_out(&self.connection, number).await {
                Ok(Some(Unpublished { at, events })) => {
                    for event in &events {
                        match event {
                            Some(event) => self.publish(event).await,
                            None => tracing::error!(number, "An event cannot be read and is left out"),
                        }
                    }
                    self.note_published(number);
                    if let Err(error) = clear_out(&self.connection, number, at).await {
                        tracing::debug!(%error, "Outbox not cleared yet");
                    }
                }
                // Published and cleared before, or of a commit that was never stored as a whole.
                Ok(None) => self.note_published(number),
                Err(error) => {
                    tracing::debug!(%error, "Outbox not read yet");
                    tokio::time::sleep(wait).await;
                    wait = (wait * 2).min(RETRY_MAX);
                    continue;
                }
            }
            wait = RETRY_FIRST;
        }
    }

    /// Publishes one event.
    async fn publish(&self, event: &CloudEvent) {
        let (mut wait, mut refusals) = (RETRY_FIRST, 0);
        while let Err(error) = publish_event(&self.connection, event).await {
            match &error {
                BusError::Absent { .. } => {
                    // Somebody has deleted the stream; that it is not as it must be is said at the next start.
                    let _again = streams::ensure(&self.connection, &self.bus).await;
                }
                BusError::Refused { .. } => refusals += 1,
                _ => {}
            }
            if refusals >= REFUSALS_MAX {
                tracing::error!(%error, id = event.id, "An event is refused and is given up");
                break;
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(RETRY_MAX);
        }
    }

    fn note_published(&self, number: u64) {
        self.shared.published.fetch_max(number + 1, Ordering::AcqRel);
    }

    /// What is not cleared now is cleared with the next.
    async fn clear(&self, last: u64) {
        if let Err(error) = clear_outbox(&self.connection, last).await {
            tracing::debug!(%error, "Outbox not cleared yet");
        }
    }
}
