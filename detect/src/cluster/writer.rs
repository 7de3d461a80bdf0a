//! Carries out a commit: tries until it is known to be stored or refused.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use proto::bus::nats::Connection;
use proto::bus::nats::commit::{CommitError, commit, read_head};
use proto::head::Head;

use super::seal::Piece;

/// First wait after a failure, doubled with each.
const RETRY_FIRST: Duration = Duration::from_millis(20);
/// Longest wait after a failure.
const RETRY_MAX: Duration = Duration::from_secs(1);

/// Attempts between two words about a commit that cannot be stored.
const ATTEMPTS_SILENT: u32 = 60;

/// A commit that is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Written {
    /// The head as it stands now.
    pub(crate) head: Head,
    /// Number of its message.
    pub(crate) at: u64,
    /// Number of the last message.
    pub(crate) last: u64,
}

/// Another detector has written: nothing that was decided since the last commit is true.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fenced;

/// Why a commit is not stored yet, for reports.
#[derive(Clone, Debug, Default)]
pub(crate) struct Trouble(Arc<Mutex<Option<String>>>);

impl Trouble {
    pub(crate) fn get(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, text: Option<String>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = text;
    }
}

/// Who writes.
#[derive(Clone, Debug)]
pub(crate) struct Writer {
    pub(crate) connection: Connection,
    /// Tells this process's batches from all others'.
    pub(crate) instance: String,
    pub(crate) trouble: Trouble,
}

/// Writes `pieces` after the head at `expected`. Returns only when that is done or can never be; drop it to give up.
pub(crate) async fn write(writer: &Writer, pieces: Vec<Piece>, expected: u64) -> Result<Written, Fenced> {
    let mut at = expected;
    let mut written = None;
    for piece in pieces {
        at = write_piece(writer, &piece, at).await?;
        let last = at + piece.changes.len() as u64;
        written = Some(Written { head: piece.head, at, last });
    }
    written.ok_or(Fenced)
}

async fn write_piece(writer: &Writer, piece: &Piece, expected: u64) -> Result<u64, Fenced> {
    let Writer { connection, instance, trouble } = writer;
    let head = serde_json::to_vec(&piece.head).unwrap_or_default();
    let mut wait = RETRY_FIRST;
    let mut attempt = 0_u32;
    let mut uncertain = false;
    loop {
        attempt += 1;
        let id = format!("{instance}-{:x}-{attempt}", piece.head.mark.commit);
        match commit(connection, &id, head.clone(), &piece.changes, expected).await {
            Ok(at) => {
                trouble.set(None);
                return Ok(at);
            }
            // An earlier try may have been stored although nobody said so.
            Err(CommitError::Fenced) if uncertain => {
                if let Ok(Some((at, found))) = read_head(connection).await {
                    return if found == piece.head { Ok(at) } else { Err(Fenced) };
                }
            }
            Err(CommitError::Fenced) => return Err(Fenced),
            Err(error @ (CommitError::Unknown(_) | CommitError::Refused(_))) => {
                uncertain |= matches!(error, CommitError::Unknown(_));
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                if attempt % ATTEMPTS_SILENT == 3 {
                    tracing::warn!(%error, cause, attempt, "State not written yet, it is tried again");
                }
                trouble.set(cause);
            }
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(RETRY_MAX);
    }
}
