//! Files that grow: the I/O around [`Tail`].
//!
//! One thread a source reads, parses and hands over batches. It blocks where the queue is full, which is the whole
//! backpressure: what is not read stays in the file. It waits for notifications, the poll interval, or the end.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::future;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use proto::client_ip::ClientIpPolicy;
use proto::event::{Interest, Position};
use proto::report::Problem;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, watch as channel};
use tokio::time::{Interval, MissedTickBehavior};

use super::batch::{Batcher, Stopped};
use super::discover;
use super::tail::{Command, FileKey, Read, Tail, TailSettings};
use super::watch::{Changes, Watch};
use crate::config::FileConfig;
use crate::pipeline::{OPEN_FILES_MAX, Shared};

/// Bytes that are read at a time. At least one more than the longest line allowed.
const READ_BYTES: usize = 256 << 10;
/// Reads of one file before others get their turn.
const READS_MAX: usize = 64;
/// Failures that are reported one by one.
const FAILURES_SHOWN_MAX: usize = 5;
/// Times that directories are listed anew in one scan because some were new.
const DIRECTORY_LOOKS_MAX: usize = 4;

/// What changes while the source runs.
pub(crate) struct Rules {
    pub(crate) interest: channel::Receiver<Arc<Interest>>,
    pub(crate) client_ip: channel::Receiver<Arc<ClientIpPolicy>>,
}

/// A source of files while it runs.
pub(crate) struct FileSource {
    config: FileConfig,
    shared: Arc<Shared>,
    rules: Rules,
    tail: Tail,
    open: BTreeMap<FileKey, OpenFile>,
    batcher: Batcher,
    watch: Watch,
    buffer: Vec<u8>,
    head: Vec<u8>,
    /// Files that may have more to read.
    dirty: BTreeSet<FileKey>,
    /// Failures to open or read, until the next scan.
    failures: Vec<(PathBuf, String)>,
    /// Files that the newest scan found and that the process may not open.
    unopened: usize,
    scan_due: bool,
    positions_checked: bool,
    missing: usize,
}

struct OpenFile {
    path: PathBuf,
    file: File,
    /// Whether its end was reached once: until then older files go first.
    caught_up: bool,
    /// Its share of the files that the process may have open.
    _permit: OwnedSemaphorePermit,
}

impl FileSource {
    /// A source that begins at `positions`. Must run inside a tokio runtime.
    pub(crate) fn new(
        (config, line_bytes_max): (FileConfig, usize),
        positions: BTreeMap<u64, Position>,
        mut rules: Rules,
        mut batcher: Batcher,
    ) -> Self {
        let policy = rules.client_ip.borrow_and_update().clone();
        let interest = rules.interest.borrow_and_update().clone();
        batcher.set_rules(policy, interest);
        let skip_existing = config.skip_existing && positions.is_empty();
        let settings = TailSettings { line_bytes_max, skip_existing };
        let read_bytes = READ_BYTES.max(line_bytes_max + 1);
        Self {
            tail: Tail::new(settings, positions),
            open: BTreeMap::new(),
            shared: batcher.shared(),
            watch: Watch::new(config.inotify),
            buffer: vec![0; read_bytes],
            head: Vec::new(),
            dirty: BTreeSet::new(),
            failures: Vec::new(),
            unopened: 0,
            scan_due: true,
            positions_checked: false,
            missing: 0,
            batcher,
            config,
            rules,
        }
    }

    /// Reads until the shutdown begins. Blocks its thread.
    pub(crate) fn run(mut self, handle: &Handle) -> Result<(), Stopped> {
        let mut ticks = {
            let _guard = handle.enter();
            tokio::time::interval(self.config.poll_interval)
        };
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            if self.shared.shutdown.is_draining() {
                // Nobody is there to take it: it is read again.
                let _left = self.batcher.flush_all();
                return Ok(());
            }
            if self.scan_due {
                self.scan_due = false;
                self.scan()?;
            }
            let more = self.read_dirty()?;
            if !more && !self.positions_checked {
                self.positions_checked = true;
                self.missing = self.tail.needed_missing();
                self.publish();
            }
            self.batcher.set_behind(self.tail.behind_bytes(), self.tail.lost_bytes());
            let due = self.batcher.give_up_overdue(self.shared.clock.now())?;
            match handle.block_on(self.wait(&mut ticks, more, due)) {
                Wake::Tick => self.tick()?,
                Wake::Changed(changes) => self.note(changes),
                Wake::Rules => self.update_rules()?,
                Wake::ReceiverGone => return Err(Stopped::ReceiverGone),
                Wake::Ready => {}
            }
        }
    }

    async fn wait(&mut self, ticks: &mut Interval, more: bool, due: Option<Duration>) -> Wake {
        tokio::select! {
            biased;
            () = self.shared.shutdown.draining() => Wake::Ready,
            () = self.batcher.receiver_gone() => Wake::ReceiverGone,
            _ = ticks.tick() => Wake::Tick,
            Ok(()) = self.rules.client_ip.changed() => Wake::Rules,
            Ok(()) = self.rules.interest.changed() => Wake::Rules,
            changes = self.watch.changed() => Wake::Changed(changes),
            () = future::ready(()), if more => Wake::Ready,
            () = tokio::time::sleep(due.unwrap_or_default()), if due.is_some() => Wake::Ready,
        }
    }

    fn note(&mut self, changes: Changes) {
        self.scan_due |= changes.names || changes.all;
        if changes.all {
            self.dirty.extend(self.open.keys());
        }
        self.dirty.extend(changes.files);
    }

    fn update_rules(&mut self) -> Result<(), Stopped> {
        let policy = self.rules.client_ip.borrow_and_update().clone();
        let interest = self.rules.interest.borrow_and_update().clone();
        self.batcher.set_rules(policy, interest);
        self.batcher.flush_all()
    }

    /// Everything is looked at again, and what is finished ends.
    fn tick(&mut self) -> Result<(), Stopped> {
        self.scan_due = true;
        self.dirty.extend(self.open.keys());
        // What was written since the last read keeps a file open.
        for (key, open) in &self.open {
            if let Ok(metadata) = open.file.metadata() {
                self.tail.handle_size(*key, metadata.size());
            }
        }
        let now = self.shared.clock.now();
        let batcher = &mut self.batcher;
        let mut stopped = Ok(());
        self.tail.close_finished(&mut |piece| {
            if stopped.is_ok() {
                stopped = batcher.push(&piece, now);
            }
        });
        stopped?;
        self.obey()
    }

    fn scan(&mut self) -> Result<(), Stopped> {
        let mut scan = discover::scan(&self.config);
        // Directories within new directories may be new as well, but not for ever.
        for _ in 0..DIRECTORY_LOOKS_MAX {
            if !self.watch.set_directories(&scan.directories) {
                break;
            }
            scan = discover::scan(&self.config);
        }
        if self.tail.wants_siblings(scan.seen.iter().map(|seen| seen.path.as_path())) {
            scan.add_siblings();
        }
        self.tail.handle_scan(scan.seen, self.shared.clock.now());
        self.failures = scan.failures;
        self.unopened = 0;
        self.obey()?;
        self.publish();
        Ok(())
    }

    fn obey(&mut self) -> Result<(), Stopped> {
        while let Some(command) = self.tail.poll_command() {
            match command {
                Command::Open { file, path } => self.open_file(file, path),
                Command::Close { file } => {
                    self.watch.remove_file(file);
                    self.open.remove(&file);
                    self.dirty.remove(&file);
                    self.batcher.close(file)?;
                }
            }
        }
        Ok(())
    }

    fn open_file(&mut self, key: FileKey, path: PathBuf) {
        let Ok(permit) = self.shared.open_files.clone().try_acquire_owned() else {
            self.tail.handle_failed(key);
            self.unopened += 1;
            return;
        };
        let opened = File::open(&path).and_then(|file| file.metadata().map(|metadata| (file, metadata)));
        match opened {
            Ok((file, metadata)) => {
                // A second watch of a file would take the place of the first.
                if self.tail.handle_opened(key, discover::id_of(&metadata)) {
                    self.watch.add_file(key, &file);
                    if let Some(predecessor) = self.tail.predecessor(key) {
                        self.batcher.note_predecessor(key, predecessor);
                    }
                    self.open.insert(key, OpenFile { path, file, caught_up: false, _permit: permit });
                    self.dirty.insert(key);
                }
            }
            Err(error) => {
                self.tail.handle_failed(key);
                if error.kind() != io::ErrorKind::NotFound {
                    self.failures.push((path, error.to_string()));
                }
            }
        }
    }

    /// Reads what may be read, older files first. Returns whether there is more.
    fn read_dirty(&mut self) -> Result<bool, Stopped> {
        let keys: Vec<FileKey> = self.tail.files().filter(|key| self.dirty.contains(key)).collect();
        for key in keys {
            let more = self.read_file(key)?;
            let Some(open) = self.open.get_mut(&key) else { continue };
            if !more {
                open.caught_up = true;
                self.dirty.remove(&key);
                self.batcher.flush(key)?;
                self.batcher.note_end(key);
            } else if !open.caught_up {
                break;
            }
        }
        self.obey()?;
        self.dirty.retain(|key| self.open.contains_key(key));
        Ok(!self.dirty.is_empty())
    }

    /// Reads one file to its end or to the end of its turn. Returns whether there is more.
    fn read_file(&mut self, key: FileKey) -> Result<bool, Stopped> {
        for _ in 0..READS_MAX {
            if self.shared.shutdown.is_draining() {
                return Ok(false);
            }
            match self.read_once(key) {
                Ok(more) if more? => {}
                Ok(_) => return Ok(false),
                Err(error) => {
                    self.give_up(key, &error)?;
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    fn read_once(&mut self, key: FileKey) -> io::Result<Result<bool, Stopped>> {
        let (Some(range), Some(open)) = (self.tail.next_read(key), self.open.get(&key)) else { return Ok(Ok(false)) };
        let length = read_full(&open.file, &mut self.buffer, range.offset)?;
        self.head.resize(range.head_bytes, 0);
        let head = read_full(&open.file, &mut self.head, 0)?;
        let read = Read { data: &self.buffer[..length], head: &self.head[..head], size: open.file.metadata()?.size() };
        let now = self.shared.clock.now();
        let batcher = &mut self.batcher;
        let mut stopped = Ok(());
        let more = self.tail.handle_read(key, read, now, &mut |piece| {
            if stopped.is_ok() {
                stopped = batcher.push(&piece, now);
            }
        });
        Ok(stopped.map(|()| more))
    }

    /// A file that cannot be read is let go; the next scan opens it anew.
    fn give_up(&mut self, key: FileKey, error: &io::Error) -> Result<(), Stopped> {
        if let Some(open) = self.open.remove(&key) {
            self.failures.push((open.path, error.to_string()));
        }
        self.watch.remove_file(key);
        self.dirty.remove(&key);
        self.tail.handle_failed(key);
        self.batcher.close(key)?;
        self.publish();
        Ok(())
    }

    fn publish(&self) {
        let failures = &self.failures;
        let name = &self.shared.source;
        let mut problems: Vec<Problem> = failures
            .iter()
            .take(FAILURES_SHOWN_MAX)
            .map(|(path, why)| Problem::degraded(format!("source {name}: cannot read {}: {why}", path.display())))
            .collect();
        if failures.len() > FAILURES_SHOWN_MAX {
            let more = failures.len() - FAILURES_SHOWN_MAX;
            problems.push(Problem::degraded(format!("source {name}: {more} more paths cannot be read")));
        }
        let files = self.tail.files().count();
        if files == 0 {
            let include: Vec<String> = self.config.include.iter().map(|path| path.display().to_string()).collect();
            problems.push(Problem::degraded(format!("source {name}: no log file at {}", include.join(", "))));
        }
        let refused = self.tail.refused_files() + self.unopened;
        if refused > 0 {
            problems.push(Problem::degraded(format!(
                "source {name}: {refused} files are not followed: at most {OPEN_FILES_MAX} are open at a time"
            )));
        }
        let copies: Vec<&Path> = self.tail.copies().collect();
        for path in copies.iter().take(FAILURES_SHOWN_MAX) {
            let path = path.display();
            problems.push(Problem::warning(format!(
                "source {name}: {path} is a copy of a log that is followed, so it is not read; exclude it"
            )));
        }
        if copies.len() > FAILURES_SHOWN_MAX {
            let more = copies.len() - FAILURES_SHOWN_MAX;
            problems.push(Problem::warning(format!("source {name}: {more} more files are copies and are not read")));
        }
        if self.tail.repeated() > 0 {
            problems.push(Problem::warning(format!(
                "source {name}: a truncated log began with the same line again, {} times; up to where it had been read \
                 such a log does not count",
                self.tail.repeated()
            )));
        }
        if self.missing > 0 {
            problems.push(Problem::warning(format!(
                "windows of source {name} could not be rebuilt and lines may be lost: {} log files are gone since the last run",
                self.missing
            )));
        }
        if let Some(failure) = self.watch.failure() {
            problems.push(Problem::warning(format!("source {name} is polled: {failure}")));
        }
        self.batcher.publish(files as u64, problems);
    }
}

enum Wake {
    Tick,
    Changed(Changes),
    Rules,
    ReceiverGone,
    /// There is more to read, a line in pieces is overdue, or the end has begun.
    Ready,
}

/// Fills `buffer` from `offset`, as far as the file goes.
fn read_full(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}
