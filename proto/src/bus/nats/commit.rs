//! Atomic batches: all of a commit is stored or none of it, and only if nobody else has committed since.

use std::time::Duration;

use async_nats::HeaderMap;

use super::{BusError, Connection, Stored, WRONG_LAST_SEQUENCE, answer};
use crate::envelope::CloudEvent;
use crate::head::Head;
use crate::subject::{KEY_HEAD, KEY_OUT, bucket_key, bucket_stream};

/// Messages of one atomic batch; the server takes no more.
pub const ENTRIES_MAX: usize = 1000;
/// How long the server remembers that a key was deleted, at least. A key whose marker has ended can come back when a server
/// is killed (seen with 2.15.1), so a marker outlasts what it deletes.
const DELETED_KEEP: Duration = Duration::from_secs(24 * 3600);

/// One change of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The key.
    pub key: String,
    /// What becomes of it.
    pub value: Value,
}

/// What becomes of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// This is its value now.
    Put(Vec<u8>),
    /// It is deleted. Its last value would have mattered for so long; `None` = for ever.
    Delete(Option<Duration>),
}

/// Why nothing was stored, or why that is not known.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommitError {
    /// Somebody else has committed since: whoever tried this is active no longer.
    #[error("another detector has written since")]
    Fenced,
    /// The batch may or may not be stored: look at the head, or try the very same again.
    #[error("it is not known whether the state was written")]
    Unknown(#[source] BusError),
    /// Nothing was stored.
    #[error("the state could not be written")]
    Refused(#[source] BusError),
}

/// Writes `head` and `changes` (at most [`ENTRIES_MAX`] together) in one atomic batch, if the head still stands at
/// `expected` (0 = is not there). `id` names the batch: the same content may be tried again under another one. Returns the
/// number of the head's message; the changes have the numbers after it.
///
/// # Errors
/// See [`CommitError`].
pub async fn commit(
    connection: &Connection,
    id: &str,
    head: Vec<u8>,
    changes: &[Change],
    expected: u64,
) -> Result<u64, CommitError> {
    let bucket = connection.subjects().state_bucket();
    let count = changes.len() + 1;
    let mut last = None;
    let head = Change { key: KEY_HEAD.to_owned(), value: Value::Put(head) };
    for (i, Change { key, value }) in std::iter::once(&head).chain(changes).enumerate() {
        let mut headers = HeaderMap::new();
        headers.insert("Nats-Batch-Id", id);
        headers.insert("Nats-Batch-Sequence", (i + 1).to_string());
        if i == 0 {
            headers.insert("Nats-Expected-Last-Subject-Sequence", expected.to_string());
        }
        let payload = match value {
            Value::Put(payload) => payload.clone(),
            Value::Delete(mattered) => {
                headers.insert("KV-Operation", "DEL");
                if let Some(mattered) = mattered {
                    headers.insert("Nats-TTL", format!("{}s", DELETED_KEEP.saturating_add(*mattered).as_secs()));
                }
                Vec::new()
            }
        };
        let subject = bucket_key(&bucket, key);
        if i + 1 == count {
            headers.insert("Nats-Batch-Commit", "1");
            last = Some((subject, headers, payload));
            break;
        }
        let sent = connection.client.publish_with_headers(subject, headers, payload.into()).await;
        sent.map_err(|_| CommitError::Unknown(BusError::Silent { what: "a commit".to_owned() }))?;
    }
    let Some((subject, headers, payload)) = last else { return Err(CommitError::Fenced) };
    let message = connection.request(&subject, headers, payload).await.map_err(CommitError::Unknown)?;
    match answer::<Stored>("a commit", &message.payload) {
        Ok(Stored { seq }) => Ok(seq + 1 - count as u64),
        Err(BusError::Refused { code: WRONG_LAST_SEQUENCE, .. }) => Err(CommitError::Fenced),
        Err(error @ BusError::Garbled { .. }) => Err(CommitError::Unknown(error)),
        Err(error) => Err(CommitError::Refused(error)),
    }
}

/// The head as it stands, and the number of its message; `None` before the first commit.
///
/// # Errors
/// When the server does not answer or the head cannot be read.
pub async fn read_head(connection: &Connection) -> Result<Option<(u64, Head)>, BusError> {
    let bucket = connection.subjects().state_bucket();
    let newest = connection.newest(&bucket_stream(&bucket), &bucket_key(&bucket, KEY_HEAD)).await?;
    let Some(message) = newest else { return Ok(None) };
    let garbled = || BusError::Garbled { what: "the head of the state".to_owned() };
    Ok(Some((message.seq, message.json().ok_or_else(garbled)?)))
}

/// Events that were stored together and may not be published yet.
#[derive(Clone, Debug)]
pub struct Unpublished {
    /// Number of their message in the state.
    pub at: u64,
    /// In the order of their happening; `None` where this version cannot read one.
    pub events: Vec<Option<CloudEvent>>,
}

/// The change that puts events into the outbox, which are encoded already, under `number`.
pub fn put_out<'a>(number: u64, events: impl Iterator<Item = &'a [u8]>) -> Change {
    let events: Vec<&[u8]> = events.collect();
    let value = [b"[".as_slice(), &events.join(b",".as_slice()), b"]"].concat();
    Change { key: format!("{KEY_OUT}{number}"), value: Value::Put(value) }
}

/// What stands in the outbox under `number`; `None` where it was cleared, or never stored.
///
/// # Errors
/// When the server does not answer.
pub async fn read_out(connection: &Connection, number: u64) -> Result<Option<Unpublished>, BusError> {
    let bucket = connection.subjects().state_bucket();
    let newest =
        connection.newest(&bucket_stream(&bucket), &bucket_key(&bucket, &format!("{KEY_OUT}{number}"))).await?;
    Ok(newest.map(|message| {
        let values: Option<Vec<serde_json::Value>> = message.json();
        // What is no list at all counts as one event.
        let values = values.map_or_else(|| vec![None], |values| values.into_iter().map(Some).collect());
        let events = values.into_iter().map(|value| serde_json::from_value(value?).ok()).collect();
        Unpublished { at: message.seq, events }
    }))
}
