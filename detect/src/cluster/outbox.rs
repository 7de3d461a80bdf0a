//! Publishes the events of a commit once it is stored, in order, and then clears them from the outbox.

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
    events: Vec<CloudEvent>,
}

/// The outbox of the active detector.
#[derive(Debug)]
pub(crate) struct Outbox {
    sender: mpsc::Sender<Parcel>,
    task: JoinHandle<()>,
}

impl Outbox {
    pub(crate) fn spawn(connection: Connection) -> Self {
        let (sender, mut parcels) = mpsc::channel::<Parcel>(WAITING_MAX);
        let task = tokio::spawn(async move {
            while let Some(parcel) = parcels.recv().await {
                for event in &parcel.events {
                    publish_event(&connection, event).await;
                }
                // What is not cleared now is cleared with the next, or published once more by a successor.
                if let Err(error) = clear_outbox(&connection, parcel.last).await {
                    tracing::debug!(%error, "Outbox not cleared yet");
                }
            }
        });
        Self { sender, task }
    }

    /// Publishes `events`, which are stored up to message `last` of the state. Waits while too much waits already.
    pub(crate) async fn send(&self, last: u64, events: Vec<CloudEvent>) {
        if !events.is_empty() {
            // The task ends only with us.
            let _ended = self.sender.send(Parcel { last, events }).await;
        }
    }

    /// Returns once everything is published.
    pub(crate) async fn end(self) {
        drop(self.sender);
        // A panic there leaves the rest to a successor.
        let _ended = self.task.await;
    }
}
