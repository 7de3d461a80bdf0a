//! What a detector knows of the bus, whether it decides or not: the state as it stands, and the log behind it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use proto::ban::{BanChange, BanRecord, Lists};
use proto::bus::nats::access::batches;
use proto::bus::nats::follow::{Entry, Feed, Followed, Start};
use proto::bus::nats::state::{StateEntry, follow_state, has_more, parse};
use proto::bus::nats::streams::{self, StreamInfo};
use proto::bus::nats::{BusError, Connection};
use proto::head::{Coverage, Head};
use proto::net::Target;
use proto::shutdown::Shutdown;
use proto::subject::bucket_stream;
use proto::time::Timestamp;

use super::seal::Banned;
use super::{BACKLOG_BYTES_MAX, Ended, Logged};
use crate::engine::stream::Position;
use crate::engine::{EngineConfig, Snapshot};
use crate::state::{decode_control, decode_offender};
use crate::worker::Outlets;

/// The state and the log, as followed.
pub(crate) struct View {
    pub(crate) connection: Connection,
    pub(crate) outlets: Outlets,
    pub(crate) state: Feed,
    pub(crate) access: Feed,
    /// The newest head, and the number of its message; 0 before the first.
    pub(crate) head: Head,
    pub(crate) head_at: u64,
    /// Number of the newest message of the state.
    seen: u64,
    pub(crate) lists: Option<Lists>,
    pub(crate) coverage: Coverage,
    pub(crate) banned: Banned,
    /// When the bucket and the log were made.
    pub(crate) bucket: String,
    pub(crate) log_created: String,
    /// What is added to the log's numbers, and the last of them that is decided.
    pub(crate) base: u64,
    pub(crate) floor: u64,
    /// Batches that are read and not handled.
    pub(crate) backlog: VecDeque<Logged>,
    backlog_bytes: usize,
    /// When all that was in the log had been read.
    pub(crate) caught_up_at: Option<Timestamp>,
    /// Changes that this host has not been told yet.
    changes: Vec<BanChange>,
}

/// The state as read at the start.
#[derive(Default)]
struct Loading {
    snapshot: Snapshot,
    records: BTreeMap<Target, BanRecord>,
    offenders: BTreeMap<Target, crate::engine::offender::Offender>,
    head: Head,
    head_at: u64,
    seen: u64,
    lists: Option<Lists>,
    coverage: Coverage,
}

impl View {
    /// Reads the state as it stands, and begins to follow it and the log, from where windows of `config` need it. `None`
    /// when the shutdown begins before that is done.
    pub(crate) async fn open(
        connection: &Connection,
        outlets: &Outlets,
        config: &EngineConfig,
        shutdown: &Shutdown,
    ) -> Result<Option<(Self, Snapshot)>, Ended> {
        let mut state = follow_state(connection).await?;
        let mut loading = Loading::default();
        loop {
            let followed = tokio::select! {
                followed = state.next() => followed?,
                () = shutdown.draining() => return Ok(None),
            };
            match followed {
                Followed::CaughtUp => break,
                Followed::Entry(entry) => loading.take(connection, &entry)?,
            }
        }
        let Loading { mut snapshot, records, offenders, head, head_at, seen, lists, coverage } = loading;
        let banned = records.values().map(|record| (record.target, record.expires_at())).collect();
        snapshot.bans = records.into_values().collect();
        snapshot.offenders = offenders.into_iter().collect();
        outlets.lists.send_replace(Arc::new(lists.clone().unwrap_or_default()));
        outlets.interest.send_replace(Arc::new(coverage.interest.clone()));
        outlets.bans.replace(snapshot.bans.iter().cloned());

        let bucket = streams::info(connection, &bucket_stream(&connection.subjects().state_bucket())).await?.created;
        let log = streams::info(connection, &connection.subjects().access_stream()).await?;
        let (base, floor) = number(&head, &log);
        let since = head.floor_arrival().saturating_sub(config.horizon());
        let start = if floor == 0 { Start::Sequence(1) } else { Start::Time(since, floor + 1) };
        let access = batches(connection, start).await?;
        let view = Self {
            connection: connection.clone(),
            outlets: outlets.clone(),
            state,
            access,
            seen: seen.max(head_at + head.changes),
            head,
            head_at,
            lists,
            coverage,
            banned,
            bucket,
            log_created: log.created,
            base,
            floor,
            backlog: VecDeque::new(),
            backlog_bytes: 0,
            caught_up_at: None,
            changes: Vec::new(),
        };
        Ok(Some((view, snapshot)))
    }

    /// Up to here everything is decided.
    pub(crate) fn floor_position(&self) -> Position {
        Position::after_batch(self.base + self.floor)
    }

    /// Whether all messages of the newest commit have been seen.
    pub(crate) fn is_whole(&self) -> bool {
        self.seen >= self.head_at + self.head.changes
    }

    /// Takes what the state's feed brought: hands it on to this host, and returns what an engine may want to know.
    pub(crate) fn take_state(&mut self, followed: Result<Followed, BusError>) -> Result<Option<StateEntry>, Ended> {
        let Followed::Entry(entry) = followed? else {
            // What is missing of a commit by now has been replaced or deleted since.
            self.seen = self.seen.max(self.head_at + self.head.changes);
            self.tell();
            return Ok(None);
        };
        self.seen = entry.sequence;
        let parsed = read(&self.connection, &entry)?;
        match &parsed {
            Some(StateEntry::Head(head)) => {
                // The last of a commit may never come on its own: it may have been replaced already.
                self.tell();
                (self.head, self.head_at) = (head.clone(), entry.sequence);
                if head.access_created == self.log_created {
                    self.floor = head.floor;
                }
            }
            Some(StateEntry::Ban(change)) => {
                match change {
                    BanChange::Put(record) => drop(self.banned.insert(record.target, record.expires_at())),
                    BanChange::Delete(target) => drop(self.banned.remove(target)),
                }
                self.changes.push(change.clone());
            }
            Some(StateEntry::Lists(lists)) => {
                self.outlets.lists.send_replace(Arc::new(lists.clone()));
                self.lists = Some(lists.clone());
            }
            Some(StateEntry::Coverage(coverage)) => {
                self.outlets.interest.send_replace(Arc::new(coverage.interest.clone()));
                self.coverage = coverage.clone();
            }
            Some(StateEntry::Control(_) | StateEntry::Offender(..) | StateEntry::Out(_)) | None => {}
        }
        if entry.ends_batch {
            self.tell();
        }
        Ok(parsed)
    }

    /// Tells this host of the changes so far.
    pub(crate) fn tell(&mut self) {
        if !self.changes.is_empty() {
            self.outlets.bans.publish(self.changes.drain(..), None);
        }
    }

    /// Takes what the log's feed brought.
    pub(crate) fn take_access(&mut self, followed: Result<Followed, BusError>) -> Result<(), Ended> {
        match followed? {
            Followed::CaughtUp => self.caught_up_at = Some(self.connection.clock().now()),
            Followed::Entry(entry) => {
                let logged = Logged::from(entry);
                self.backlog_bytes += logged.payload.len();
                self.backlog.push_back(logged);
            }
        }
        Ok(())
    }

    /// Until when nothing has come that is not handled.
    pub(crate) fn idle_since(&self) -> Option<Timestamp> {
        self.caught_up_at.filter(|_| self.backlog.is_empty())
    }

    /// Whether what we have seen is all that there is, by the word of the state's leader.
    pub(crate) async fn is_current(&self) -> Result<bool, BusError> {
        Ok(!has_more(&self.connection, self.seen).await?)
    }

    /// The next batch to be handled.
    pub(crate) fn pop(&mut self) -> Option<Logged> {
        let logged = self.backlog.pop_front()?;
        self.backlog_bytes -= logged.payload.len();
        Some(logged)
    }

    /// Whether more batches may be read.
    pub(crate) fn has_room(&self) -> bool {
        self.backlog_bytes < BACKLOG_BYTES_MAX
    }
}

/// What to add to the numbers of `log` so that positions grow on, and the last of its numbers that is decided.
///
/// Another stream begins anew, and one that has lost its end (a server lost power, or a backup was restored) gives numbers a
/// second time.
fn number(head: &Head, log: &StreamInfo) -> (u64, u64) {
    let is_same = head.access_created.is_empty() || head.access_created == log.created;
    let last = log.state.last_seq;
    if is_same && last >= head.floor {
        return (head.access_base, head.floor);
    }
    tracing::error!(
        is_same,
        floor = head.floor,
        last,
        "Log of access batches was made anew or has lost its end, what it held and was not decided is lost"
    );
    let last = if is_same { last } else { 0 };
    (head.access_base + head.floor + 1 - last, last)
}

fn read(connection: &Connection, entry: &Entry) -> Result<Option<StateEntry>, Ended> {
    if !entry.batched {
        tracing::error!(subject = entry.subject, "Somebody else writes into the ban bucket, it is left out");
        return Ok(None);
    }
    parse(connection, entry).map_err(|error| {
        let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
        Ended::Unreadable(format!("{error}{cause}"))
    })
}

impl Loading {
    fn take(&mut self, connection: &Connection, entry: &Entry) -> Result<(), Ended> {
        self.seen = entry.sequence;
        let unreadable = |error: crate::state::DecodeError| Ended::Unreadable(error.to_string());
        match read(connection, entry)? {
            Some(StateEntry::Head(head)) => (self.head, self.head_at) = (head, entry.sequence),
            Some(StateEntry::Control(bytes)) => self.snapshot.control = decode_control(&bytes).map_err(unreadable)?,
            Some(StateEntry::Lists(lists)) => self.lists = Some(lists),
            Some(StateEntry::Coverage(coverage)) => self.coverage = coverage,
            Some(StateEntry::Ban(BanChange::Put(record))) => drop(self.records.insert(record.target, record)),
            Some(StateEntry::Ban(BanChange::Delete(target))) => drop(self.records.remove(&target)),
            Some(StateEntry::Offender(target, Some(bytes))) => {
                self.offenders.insert(target, decode_offender(&bytes).map_err(unreadable)?);
            }
            Some(StateEntry::Offender(target, None)) => drop(self.offenders.remove(&target)),
            Some(StateEntry::Out(_)) | None => {}
        }
        Ok(())
    }
}
