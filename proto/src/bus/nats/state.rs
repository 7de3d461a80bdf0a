//! The shared state as typed entries.

use bytes::Bytes;

use super::follow::{Entry, Feed, Start, follow};
use super::{BusError, Connection};
use crate::ban::{BanChange, BanRecord, Lists};
use crate::head::{Coverage, Head, VERSION};
use crate::net::Target;
use crate::subject::{
    KEY_BAN, KEY_CONTROL, KEY_HEAD, KEY_LISTS, KEY_OFFENDER, KEY_OUT, KEY_PREDICATE, bucket_key, bucket_stream,
    parse_target_key,
};

/// Entries that wait to be taken.
const WAITING_MAX: usize = 4096;

/// One entry of the shared state.
#[derive(Clone, Debug, PartialEq)]
pub enum StateEntry {
    /// The first of a commit.
    Head(Head),
    /// What only detect understands.
    Control(Bytes),
    /// Who may never be banned.
    Lists(Lists),
    /// What rules can match.
    Coverage(Coverage),
    /// A change of the ban set.
    Ban(BanChange),
    /// A history; `None` = forgotten. What only detect understands.
    Offender(Target, Option<Bytes>),
    /// Events that wait to be published, or were: what only their publisher reads.
    Out(u64),
}

/// An entry that makes no sense to this version.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Written by a newer program.
    #[error("the shared state has version {0}; this program knows {VERSION}")]
    Newer(u32),
    /// It is not what it should be.
    #[error("the shared state's key {key} cannot be read")]
    Malformed {
        /// Which.
        key: String,
        /// Why, where that is known.
        #[source]
        source: Option<serde_json::Error>,
    },
}

/// Follows the whole state from its first message that is there.
///
/// # Errors
/// When it is not there or cannot be asked for.
pub async fn follow_state(connection: &Connection) -> Result<Feed, BusError> {
    let names = connection.subjects();
    let bucket = names.state_bucket();
    let subjects = (format!("$KV.{bucket}.>"), names.state_feed());
    follow(connection, bucket_stream(&bucket), subjects, Start::Sequence(1), WAITING_MAX).await
}

/// Whether the state has messages after number `sequence`, by its leader's word.
///
/// # Errors
/// When the server does not answer.
pub async fn has_more(connection: &Connection, sequence: u64) -> Result<bool, BusError> {
    let bucket = connection.subjects().state_bucket();
    let next = connection.next_of(&bucket_stream(&bucket), &format!("$KV.{bucket}.>"), sequence + 1).await?;
    Ok(next.is_some())
}

/// Reads an entry; `None` for keys that this version does not know.
///
/// # Errors
/// See [`StateError`].
pub fn parse(connection: &Connection, entry: &Entry) -> Result<Option<StateEntry>, StateError> {
    let prefix = bucket_key(&connection.subjects().state_bucket(), "");
    let key = entry.subject.strip_prefix(&prefix).unwrap_or(&entry.subject);
    parse_key(key, entry)
}

fn parse_key(key: &str, entry: &Entry) -> Result<Option<StateEntry>, StateError> {
    let malformed = |source| StateError::Malformed { key: key.to_owned(), source };
    let json = |source| malformed(Some(source));
    let payload = &entry.payload;
    let target = |text: &str| parse_target_key(text).ok_or_else(|| malformed(None));
    if let Some(text) = key.strip_prefix(KEY_BAN) {
        let target = target(text)?;
        if entry.deleted {
            return Ok(Some(StateEntry::Ban(BanChange::Delete(target))));
        }
        let record: BanRecord = serde_json::from_slice(payload).map_err(json)?;
        // The key is what is banned, whatever the record says.
        return if record.target == target {
            Ok(Some(StateEntry::Ban(BanChange::Put(record))))
        } else {
            Err(malformed(None))
        };
    }
    if let Some(text) = key.strip_prefix(KEY_OFFENDER) {
        let history = (!entry.deleted).then(|| payload.clone());
        return Ok(Some(StateEntry::Offender(target(text)?, history)));
    }
    if let Some(text) = key.strip_prefix(KEY_OUT) {
        let number = text.parse().map_err(|_| malformed(None))?;
        return Ok(Some(StateEntry::Out(number)));
    }
    Ok(match key {
        _ if entry.deleted => None,
        KEY_HEAD => {
            let head: Head = serde_json::from_slice(payload).map_err(json)?;
            if head.version > VERSION {
                return Err(StateError::Newer(head.version));
            }
            Some(StateEntry::Head(head))
        }
        KEY_CONTROL => Some(StateEntry::Control(payload.clone())),
        KEY_LISTS => Some(StateEntry::Lists(serde_json::from_slice(payload).map_err(json)?)),
        KEY_PREDICATE => Some(StateEntry::Coverage(serde_json::from_slice(payload).map_err(json)?)),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::time::Timestamp;

    fn entry(payload: &str, deleted: bool) -> Entry {
        let payload = Bytes::copy_from_slice(payload.as_bytes());
        let subject = String::new();
        Entry { sequence: 1, time: Timestamp::EPOCH, subject, deleted, batched: true, ends_batch: true, payload }
    }

    #[test]
    fn entries_are_read_by_their_keys() {
        let record = r#"{"target":"192.0.2.1","bans":[]}"#;
        assert!(matches!(
            parse_key("ban.192.0.2.1", &entry(record, false)),
            Ok(Some(StateEntry::Ban(BanChange::Put(_))))
        ));
        assert!(parse_key("ban.192.0.2.2", &entry(record, false)).is_err(), "a record under another's key");
        let freed = parse_key("ban.2001_db8__/64", &entry("", true)).unwrap();
        assert_eq!(freed, Some(StateEntry::Ban(BanChange::Delete("2001:db8::/64".parse().unwrap()))));
        assert!(matches!(
            parse_key("detect", &entry(r#"{"version":2}"#, false)),
            Err(StateError::Newer(2)) | Err(StateError::Malformed { .. })
        ));
        assert_eq!(parse_key("something.new", &entry("x", false)).unwrap(), None);
        assert!(parse_key("ban.x", &entry(record, false)).is_err());
    }
}
