//! Publishes the events of a commit once it is stored, in order, and then clears them from the outbox.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use proto::bus::nats::Connection;
use proto::bus::nats::events::{clear_outbox, publish_event};
use proto::envelope::CloudEvent;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// Commits whose events wait to be published; they are in the shared state as well.
const WAITING_MAX: usize = 1024;

/// Events of one commit.
#[derive(Debug)]
struct Parcel {
    /// Number of the commit's last message.
    last: u64,
    /// Number of the event after its last.
    next_out: u64,
    events: Vec<CloudEvent>,
}

/// The outbox of the active detector.
#[derive(Debug)]
pub(crate) struct Outbox {
    sender: mpsc::Sender<Parcel>,
    /// Events given, and events before the last number that is published.
    given: u64,
    published: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl Outbox {
    pub(crate) fn spawn(connection: Connection) -> Self {
        let (sender, mut parcels) = mpsc::channel::<Parcel>(WAITING_MAX);
        let published = Arc::new(AtomicU64::new(0));
        let done = published.clone();
        let task = tokio::spawn(async move {
            while let Some(parcel) = parcels.recv().await {
                for event in &parcel.events {
                    publish_event(&connection, event).await;
                }
                done.store(parcel.next_out, Ordering::Relaxed);
                // What is not cleared now is cleared with the next, or published once more by a successor.
                if let Err(error) = clear_outbox(&connection, parcel.last).await {
                    tracing::debug!(%error, "Outbox not cleared yet");
                }
            }
        });
        Self { sender, given: 0, published, task }
    }

    /// Publishes `events`, which are stored up to message `last` of the state and have numbers below `next_out`. Waits
    /// while too much waits already.
    pub(crate) async fn send(&mut self, (last, next_out): (u64, u64), events: Vec<CloudEvent>) {
        if !events.is_empty() {
            self.given = next_out;
            // The task ends only with us.
            let _ended = self.sender.send(Parcel { last, next_out, events }).await;
        }
    }

    /// Number of the first event that may not be published yet, where `next` is the next to be numbered.
    pub(crate) fn first_unpublished(&self, next: u64) -> u64 {
        let published = self.published.load(Ordering::Relaxed);
        if published >= self.given { next } else { published }
    }

    /// Returns once everything is published.
    pub(crate) async fn end(self) {
        drop(self.sender);
        // A panic there leaves the rest to a successor.
        let _ended = self.task.await;
    }
}
