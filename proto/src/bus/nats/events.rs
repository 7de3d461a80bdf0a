//! Public events: into their stream, and from it to who listens now.

use std::sync::Arc;
use std::time::Duration;

use async_nats::HeaderMap;
use futures_util::StreamExt;
use tokio::sync::broadcast;

use super::{BusError, Connection, Stored, answer, encode, streams};
use crate::envelope::{CloudEvent, Data};
use crate::shutdown::Shutdown;
use crate::subject::{KEY_OUT, SYSTEM, bucket_key, bucket_stream};

/// First wait after a failure, doubled with each.
const RETRY_FIRST: Duration = Duration::from_millis(50);
/// Longest wait after a failure.
const RETRY_MAX: Duration = Duration::from_secs(2);

/// Publishes an event, as often as it takes. A repetition within two minutes is stored once.
pub async fn publish_event(connection: &Connection, event: &CloudEvent) {
    let rule = match &event.data {
        Data::Ban(ban) => ban.rule.as_str(),
        Data::Alarm(_) => SYSTEM,
    };
    let subject = connection.subjects().event(event.kind.as_str(), rule);
    let mut wait = RETRY_FIRST;
    loop {
        let mut headers = HeaderMap::new();
        headers.insert("Nats-Msg-Id", event.id.as_str());
        headers.insert("Content-Type", "application/cloudevents+json");
        let sent = connection.request(&subject, headers, encode(event)).await;
        let stored = sent.and_then(|message| answer::<Stored>("an event", &message.payload));
        match stored {
            Ok(_) => return,
            Err(error) => tracing::debug!(%error, "Event not published yet"),
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(RETRY_MAX);
    }
}

/// Removes from the outbox what has been published: everything up to message `last` of the state.
///
/// # Errors
/// When the server does not answer; a later call removes it too.
pub async fn clear_outbox(connection: &Connection, last: u64) -> Result<(), BusError> {
    let bucket = connection.subjects().state_bucket();
    let filter = bucket_key(&bucket, &format!("{KEY_OUT}>"));
    streams::purge(connection, &bucket_stream(&bucket), Some(&filter), last + 1).await
}

/// Hands on events as they are published, until the shutdown: for who listens now. Who must miss none reads the stream.
///
/// # Errors
/// When the client cannot subscribe.
pub async fn relay_events(
    connection: Connection,
    events: broadcast::Sender<Arc<CloudEvent>>,
    shutdown: Shutdown,
) -> Result<(), BusError> {
    let subject = connection.subjects().events();
    let subscribed = connection.client.subscribe(subject.clone()).await;
    let mut messages = subscribed.map_err(|_| BusError::Silent { what: subject })?;
    loop {
        let message = tokio::select! {
            message = messages.next() => message,
            () = shutdown.draining() => return Ok(()),
        };
        let Some(message) = message else {
            shutdown.draining().await;
            return Ok(());
        };
        if let Ok(event) = serde_json::from_slice::<CloudEvent>(&message.payload) {
            // Without a listener there is nobody to tell.
            let _unread = events.send(Arc::new(event));
        }
    }
}
