//! Carries out a commit: tries until it is known to be stored or refused.

use std::time::Duration;

use proto::bus::nats::Connection;
use proto::bus::nats::commit::{CommitError, commit, read_head};
use proto::head::Head;

use super::seal::Piece;

/// First wait after a failure, doubled with each.
const RETRY_FIRST: Duration = Duration::from_millis(20);
/// Longest wait after a failure.
const RETRY_MAX: Duration = Duration::from_secs(1);

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

/// Writes `pieces` after the head at `expected`. Returns only when that is done or can never be; drop it to give up.
/// `instance` tells this process's batches from all others'.
pub(crate) async fn write(
    connection: &Connection,
    instance: &str,
    pieces: Vec<Piece>,
    expected: u64,
) -> Result<Written, Fenced> {
    let mut at = expected;
    let mut written = None;
    for piece in pieces {
        at = write_piece(connection, instance, &piece, at).await?;
        let last = at + piece.changes.len() as u64;
        written = Some(Written { head: piece.head, at, last });
    }
    written.ok_or(Fenced)
}

async fn write_piece(connection: &Connection, instance: &str, piece: &Piece, expected: u64) -> Result<u64, Fenced> {
    let head = serde_json::to_vec(&piece.head).unwrap_or_default();
    let mut wait = RETRY_FIRST;
    let mut attempt = 0_u32;
    let mut uncertain = false;
    loop {
        attempt += 1;
        let id = format!("{instance}-{:x}-{attempt}", piece.head.mark.commit);
        match commit(connection, &id, head.clone(), &piece.changes, expected).await {
            Ok(at) => return Ok(at),
            // An earlier try may have been stored although nobody said so.
            Err(CommitError::Fenced) if uncertain => {
                if let Ok(Some((at, found))) = read_head(connection).await {
                    return if found == piece.head { Ok(at) } else { Err(Fenced) };
                }
            }
            Err(CommitError::Fenced) => return Err(Fenced),
            Err(error @ (CommitError::Unknown(_) | CommitError::Refused(_))) => {
                uncertain |= matches!(error, CommitError::Unknown(_));
                if attempt == 3 {
                    let cause = std::error::Error::source(&error).map(ToString::to_string);
                    tracing::warn!(%error, cause, "State not written yet, it is tried again");
                }
            }
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(RETRY_MAX);
    }
}
