//! Publishing access batches, and following them.

use async_nats::HeaderMap;

use super::follow::{Feed, Start, follow};
use super::{BusError, Connection, Stored, answer};
use crate::bus::publish::{Publish, PublishError};

/// JetStream's codes for a stream, an account or a disk that is full.
const FULL: [u64; 6] = [10023, 10028, 10047, 10077, 10110, 10122];
/// Batches that wait for detect: some ten megabytes at worst.
const BATCHES_WAITING_MAX: usize = 64;

/// Publishes the batches of one node.
#[derive(Clone, Debug)]
pub struct AccessPublisher {
    connection: Connection,
    subject: String,
}

impl AccessPublisher {
    /// For `node`, which must be the node that the batches name.
    pub fn new(connection: &Connection, node: &str) -> Self {
        Self { connection: connection.clone(), subject: connection.subjects().access(node) }
    }
}

impl Publish for AccessPublisher {
    async fn publish(&self, id: &str, payload: Vec<u8>) -> Result<(), PublishError> {
        let payload_max = self.connection.payload_max();
        if payload_max > 0 && payload.len() > payload_max {
            let bytes = payload.len();
            let text = format!("a batch of {bytes} bytes is larger than the server's max_payload {payload_max}");
            return Err(PublishError::Refused(text));
        }
        let mut headers = HeaderMap::new();
        headers.insert("Nats-Msg-Id", id);
        let sent = self.connection.request(&self.subject, headers, payload).await;
        let message = sent.map_err(|error| PublishError::Unavailable(error.to_string()))?;
        match answer::<Stored>("a batch", &message.payload) {
            Ok(_) => Ok(()),
            Err(BusError::Refused { code, .. }) if FULL.contains(&code) => Err(PublishError::Full),
            Err(error @ BusError::Refused { .. }) => Err(PublishError::Refused(error.to_string())),
            Err(error) => Err(PublishError::Unavailable(error.to_string())),
        }
    }
}

/// Follows the batches of all nodes from `start`.
///
/// # Errors
/// When the stream is not there or cannot be asked for.
pub async fn batches(connection: &Connection, start: Start) -> Result<Feed, BusError> {
    let names = connection.subjects();
    let subjects = (names.access("*"), names.access_log("*"));
    follow(connection, names.access_stream(), subjects, start, BATCHES_WAITING_MAX).await
}
