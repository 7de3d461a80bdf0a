//! Lines of senders that cannot wait, on disk while the bus is away or slower than they are.
//!
//! It stands between the sources without offsets and the uplink. As long as there is room, batches go straight on, and a copy
//! of each is kept until it is safe. What finds no room is joined and written to a folder, one file a batch, in order, and
//! goes on from there when the bus is back; until the folder is empty everything goes through it. Senders that wait for a
//! receipt have it once their lines are on the bus or on the disk.
//!
//! An orderly end writes what is not safe yet, and the next start goes on with it. A kill loses what was on its way in
//! memory, some ten megabytes at most, of senders that did not wait. Lines may come twice when the process is killed between
//! the bus's answer and the removal of a file. A full folder takes nothing more: then senders wait, or their lines are
//! dropped and counted.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, DirBuilder, File};
use std::io::{self, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use proto::event::{AccessBatch, Receipt};
use proto::report::Problem;
use proto::shutdown::Shutdown;
use proto::time::{Clock, Timestamp};
use proto::wire::{decode_batch, encode_batch};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use crate::metrics::Metrics;
use crate::uplink::Status;

/// Name of the folder in the state directory.
const FOLDER: &str = "spool";
/// How files of whole batches end; others are left from a crash.
const WHOLE: &str = "batch";
/// Room that the smallest file takes on the disk, in bytes.
const FILE_BYTES_MIN: u64 = 4096;
/// Bytes of text up to which batches are joined in one file.
const JOINED_TEXT_BYTES_MAX: usize = 256 << 10;
/// How long a batch waits for others to share its file.
const JOIN_WAIT: Duration = Duration::from_millis(100);
/// Batches from the disk that are on their way at a time.
const FROM_DISK_MAX: usize = 16;
/// Batches that wait to be taken.
pub(crate) const WAITING_MAX: usize = 16;
/// Wait after the folder could not be written.
const RETRY: Duration = Duration::from_secs(1);

/// The folder cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} the spool at {}", .path.display())]
pub struct SpoolError {
    action: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// The folder: batches by number, oldest first.
#[derive(Debug)]
pub struct Spool {
    folder: PathBuf,
    bytes_max: u64,
    /// Of every file that is there.
    sizes: BTreeMap<u64, u64>,
    bytes: u64,
    /// Those that have not been read yet by this process.
    unread: VecDeque<u64>,
    next: u64,
}

impl Spool {
    /// The folder in `state_dir`, made where it is missing, for at most `bytes_max` bytes.
    ///
    /// # Errors
    /// When it cannot be made or read.
    pub fn open(state_dir: &Path, bytes_max: u64) -> Result<Self, SpoolError> {
        let folder = state_dir.join(FOLDER);
        let error = |action, source| SpoolError { action, path: folder.clone(), source };
        DirBuilder::new().mode(0o700).recursive(true).create(&folder).map_err(|source| error("make", source))?;
        let mut sizes = BTreeMap::new();
        for entry in fs::read_dir(&folder).map_err(|source| error("read", source))? {
            let entry = entry.map_err(|source| error("read", source))?;
            let path = entry.path();
            let number = path.file_stem().and_then(|stem| u64::from_str_radix(stem.to_str()?, 16).ok());
            match number.filter(|_| path.extension().is_some_and(|extension| extension == WHOLE)) {
                Some(number) => {
                    let metadata = entry.metadata().map_err(|source| error("read", source))?;
                    sizes.insert(number, metadata.len().max(FILE_BYTES_MIN));
                }
                None if path.extension().is_some_and(|extension| extension == "new") => {
                    fs::remove_file(&path).map_err(|source| error("clean", source))?;
                }
                // Somebody else's, or set aside.
                None => {}
            }
        }
        let (bytes, unread) = (sizes.values().sum(), sizes.keys().copied().collect());
        let next = sizes.keys().next_back().map_or(0, |last| last + 1);
        Ok(Self { folder, bytes_max, sizes, bytes, unread, next })
    }

    fn is_empty(&self) -> bool {
        self.sizes.is_empty()
    }

    fn has_room(&self) -> bool {
        self.bytes < self.bytes_max
    }

    fn path(&self, number: u64) -> PathBuf {
        self.folder.join(format!("{number:016x}.{WHOLE}"))
    }

    /// Durable when it returns.
    fn write(&mut self, batch: &AccessBatch) -> Result<(), SpoolError> {
        let (content, path) = (encode_batch(batch), self.path(self.next));
        let fresh = path.with_extension("new");
        let write = || {
            let mut file = File::create(&fresh)?;
            file.write_all(&content)?;
            file.sync_all()?;
            fs::rename(&fresh, &path)?;
            File::open(&self.folder)?.sync_all()
        };
        write().map_err(|source| SpoolError { action: "write to", path: self.folder.clone(), source })?;
        let bytes = (content.len() as u64).max(FILE_BYTES_MIN);
        self.sizes.insert(self.next, bytes);
        self.bytes += bytes;
        self.unread.push_back(self.next);
        self.next += 1;
        Ok(())
    }

    /// The oldest batch that was not read yet. What cannot be read is set aside.
    fn read(&mut self) -> Option<(u64, AccessBatch)> {
        while let Some(number) = self.unread.pop_front() {
            let path = self.path(number);
            let error = match fs::read(&path).map(|bytes| decode_batch(&bytes)) {
                Ok(Ok(batch)) => return Some((number, batch)),
                Ok(Err(error)) => error.to_string(),
                Err(error) => error.to_string(),
            };
            let path = path.display();
            tracing::error!(%path, error, "A batch of the spool cannot be read and is set aside");
            let aside = self.path(number).with_extension("damaged");
            // Left where it is, it is tried again at the next start.
            let _left = fs::rename(self.path(number), aside);
            self.forget(number);
        }
        None
    }

    /// The batch is safe elsewhere.
    fn remove(&mut self, number: u64) {
        if let Err(error) = fs::remove_file(self.path(number)) {
            tracing::warn!(%error, number, "A batch of the spool cannot be removed, its lines will come twice");
        }
        self.forget(number);
    }

    fn forget(&mut self, number: u64) {
        self.bytes -= self.sizes.remove(&number).unwrap_or(0);
    }
}

/// Where a batch is that is on its way.
enum Copy {
    /// Here, with whoever waits for it.
    Memory(Box<AccessBatch>, Vec<Receipt>),
    /// In the folder, under this number.
    Disk(u64),
}

/// Hands on batches through `spool`, from `batches` to `out`, until the sources have ended and everything is safe.
pub(crate) async fn run(
    spool: Spool,
    (batches, out): (mpsc::Receiver<AccessBatch>, mpsc::Sender<AccessBatch>),
    (status, metrics): (Status, Metrics),
    (clock, shutdown): (Clock, Shutdown),
) {
    let (acks, acks_in) = mpsc::unbounded_channel();
    let (on_way, held) = (BTreeMap::new(), None);
    Relay {
        spool,
        out: Some(out),
        acks,
        on_way,
        tickets: 0,
        held,
        due: clock.raw(),
        clock,
        status,
        metrics,
        failing: false,
    }
    .run(batches, acks_in, shutdown)
    .await;
}

struct Relay {
    spool: Spool,
    out: Option<mpsc::Sender<AccessBatch>>,
    acks: mpsc::UnboundedSender<(u64, bool)>,
    /// By ticket. As many as fit into the queues behind, and [`FROM_DISK_MAX`].
    on_way: BTreeMap<u64, Copy>,
    tickets: u64,
    /// What is to be written, and when at the latest.
    held: Option<AccessBatch>,
    due: Timestamp,
    clock: Clock,
    status: Status,
    metrics: Metrics,
    /// Whether the folder could not be written.
    failing: bool,
}

impl Relay {
    async fn run(
        mut self,
        mut batches: mpsc::Receiver<AccessBatch>,
        mut acks: mpsc::UnboundedReceiver<(u64, bool)>,
        shutdown: Shutdown,
    ) {
        let mut open = true;
        while open || !self.on_way.is_empty() {
            self.report();
            let from_disk = self.on_way.values().filter(|copy| matches!(copy, Copy::Disk(_))).count();
            let out = self.out.clone().filter(|_| {
                open && !shutdown.is_draining() && !self.spool.unread.is_empty() && from_disk < FROM_DISK_MAX
            });
            tokio::select! {
                biased;
                Some((ticket, safe)) = acks.recv() => self.note(ticket, safe),
                () = tokio::time::sleep(self.due.since(self.clock.raw())), if self.held.is_some() => self.write_held(),
                // Before anything new, or what is old would wait for ever.
                Some(Ok(permit)) = reserve(out.as_ref()), if out.is_some() => {
                    if let Some((number, batch)) = tokio::task::block_in_place(|| self.spool.read()) {
                        let batch = self.with_ticket(batch, Copy::Disk(number));
                        permit.send(batch);
                    }
                }
                batch = batches.recv(), if open && self.spool.has_room() && !self.failing => match batch {
                    Some(batch) => self.take(batch),
                    None => {
                        open = false;
                        self.write_held();
                        // The uplink ends when nothing more can come, and then says what became of the rest.
                        self.out = None;
                    }
                },
            }
        }
        if let Some(held) = &self.held {
            tracing::error!(lines = held.counts.lines, "Lines are lost, as neither bus nor spool takes them");
        }
        self.report();
    }

    fn take(&mut self, mut batch: AccessBatch) {
        if self.spool.is_empty()
            && self.held.is_none()
            && let Some(out) = self.out.clone()
        {
            let receipts = std::mem::take(&mut batch.receipts);
            let copy = Copy::Memory(Box::new(batch.clone()), receipts);
            let ticket = self.tickets;
            let sent = self.with_ticket(batch, copy);
            match out.try_send(sent) {
                Ok(()) => return,
                Err(TrySendError::Full(_) | TrySendError::Closed(_)) => {}
            }
            // Its ticket is void: what it says is not heard.
            let Some(Copy::Memory(copy, receipts)) = self.on_way.remove(&ticket) else { return };
            batch = *copy;
            batch.receipts = receipts;
        }
        self.hold(batch);
    }

    /// The batch, which says by `copy`'s ticket what became of it.
    fn with_ticket(&mut self, mut batch: AccessBatch, copy: Copy) -> AccessBatch {
        let (ticket, acks) = (self.tickets, self.acks.clone());
        self.tickets += 1;
        self.on_way.insert(ticket, copy);
        // At the very end nobody listens any more.
        batch.receipts.push(Receipt::new(move |safe| {
            let _unheard = acks.send((ticket, safe));
        }));
        batch
    }

    fn note(&mut self, ticket: u64, safe: bool) {
        match (self.on_way.remove(&ticket), safe) {
            (Some(Copy::Memory(_, receipts)), true) => receipts.into_iter().for_each(Receipt::deliver),
            (Some(Copy::Memory(mut batch, receipts)), false) => {
                batch.receipts = receipts;
                self.hold(*batch);
                self.write_held();
            }
            (Some(Copy::Disk(number)), true) => tokio::task::block_in_place(|| self.spool.remove(number)),
            // It stays where it is for the next start.
            (Some(Copy::Disk(_)), false) | (None, _) => {}
        }
    }

    /// Joins the batch to what is to be written.
    fn hold(&mut self, mut batch: AccessBatch) {
        if let Some(held) = &mut self.held {
            if held.append(&mut batch, JOINED_TEXT_BYTES_MAX) {
                return;
            }
            self.write_held();
        }
        if self.held.is_none() {
            self.held = Some(batch);
            self.due = self.clock.raw().saturating_add(JOIN_WAIT);
        } else {
            // The folder cannot be written. Whoever waits is told that this is lost.
            tracing::error!(lines = batch.counts.lines, "Lines are lost, as neither bus nor spool takes them");
        }
    }

    fn write_held(&mut self) {
        let Some(mut batch) = self.held.take() else { return };
        match tokio::task::block_in_place(|| self.spool.write(&batch)) {
            Ok(()) => {
                self.failing = false;
                batch.deliver();
            }
            Err(error) => {
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                if !std::mem::replace(&mut self.failing, true) {
                    tracing::error!(%error, cause, "Spool cannot be written, it is tried again");
                }
                self.held = Some(batch);
                self.due = self.clock.raw().saturating_add(RETRY);
            }
        }
    }

    fn report(&self) {
        self.metrics.spooled_bytes.set(self.spool.bytes as i64);
        let mut problems = Vec::new();
        if self.failing {
            problems.push(Problem::degraded("the spool cannot be written: senders of lines wait or lose them"));
        }
        if !self.spool.has_room() {
            let text = "the spool is full: lines of senders that cannot wait are dropped until the bus is back";
            problems.push(Problem::degraded(text));
        } else if !self.spool.is_empty() {
            let mebibytes = self.spool.bytes.div_ceil(1 << 20);
            problems.push(Problem::warning(format!("{mebibytes} MiB of lines wait on disk until the bus takes them")));
        }
        self.status.set(problems);
    }
}

async fn reserve(
    out: Option<&mpsc::Sender<AccessBatch>>,
) -> Option<Result<mpsc::Permit<'_, AccessBatch>, mpsc::error::SendError<()>>> {
    Some(out?.reserve().await)
}

#[cfg(test)]
mod tests;
