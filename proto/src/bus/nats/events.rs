//! Public events: into their stream, and from it to who listens now.

use std::sync::Arc;

use async_nats::HeaderMap;
use futures_util::StreamExt;
use tokio::sync::broadcast;

use super::{BusError, Connection, Stored, answer, encode, streams};
use crate::envelope::{CloudEvent, Data};
use crate::shutdown::Shutdown;
use crate::subject::{KEY_OUT, SYSTEM, bucket_key, bucket_stream};

/// Publishes an event. One that is stored already within two minutes is not stored again.
///
/// # Errors
/// When it is not known to be stored.
pub async fn publish_event(connection: &Connection, event: &CloudEvent) -> Result<(), BusError> {
    let rule = match &event.data {
        Data::Ban(ban) => ban.rule.as_str(),
        Data::Alarm(_) => SYSTEM,
    };
    let subject = connection.subjects().event(event.kind.as_str(), rule);
    let mut headers = HeaderMap::new();
    headers.insert("Nats-Msg-Id", event.id.as_str());
    headers.insert("Content-Type", "application/cloudevents+json");
    let message = connection.request(&subject, headers, encode(event)).await?;
    answer::<Stored>("an event", &message.payload).map(drop)
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

/// Removes the events under `number`, whose message is `at`, from the outbox.
///
/// # Errors
/// When the server does not answer; clearing what comes after it removes it too.
pub async fn clear_out(connection: &Connection, number: u64, at: u64) -> Result<(), BusError> {
    let bucket = connection.subjects().state_bucket();
    let key = bucket_key(&bucket, &format!("{KEY_OUT}{number}"));
    streams::purge(connection, &bucket_stream(&bucket), Some(&key), at + 1).await
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
