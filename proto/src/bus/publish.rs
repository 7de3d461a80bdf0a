//! Sending access batches to where they are kept, as ingest sees it.

use std::future::Future;

/// Where access batches are sent to.
pub trait Publish {
    /// Sends `payload` and returns once it is kept for good. `id` names it for ever: a payload that arrives a second time
    /// with the same id is kept once, as far back as the bus remembers ids.
    ///
    /// Calls are under way at the same time, and what is polled first is sent first. A call ends by itself: what is
    /// unanswered after some seconds is [`PublishError::Unavailable`]. It may be kept all the same, so the caller tries
    /// again with the same id.
    fn publish(&self, id: &str, payload: Vec<u8>) -> impl Future<Output = Result<(), PublishError>> + Send;
}

/// Why a payload is not known to be kept. All of these are worth another try.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// The stream has reached its limit and takes nothing more until something is removed from it.
    #[error("the stream is full")]
    Full,
    /// Nobody answered: no connection, no leader, or no acknowledgement in time.
    #[error("the bus is not reachable: {0}")]
    Unavailable(String),
    /// The bus answered and will not have it: no permission, no such stream, or too large. Somebody has to change that.
    #[error("the bus refuses: {0}")]
    Refused(String),
}
