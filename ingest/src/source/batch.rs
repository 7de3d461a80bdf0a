//! From the lines of files to batches: one lane a file, cut so that a batch is small, covers one stretch, and does not end
//! between the pieces of a line. So a batch also ends where a line in pieces begins, and no line waits for pieces of another
//! for longer than [`PIECES_WAIT_MAX`] or a full batch: then they are given up. Where a log is moved away between them, the
//! file in its place has the rest.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use proto::client_ip::ClientIpPolicy;
use proto::event::{AccessBatch, FileSpan, Interest};
use proto::report::Problem;
use proto::time::Timestamp;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use super::lane::{Lane, Rules};
use super::tail::{FileKey, Piece};
use crate::metrics::SourceMetrics;
use crate::parse::{Format, Parser};
use crate::pipeline::Shared;

/// How long the end of a line in pieces is waited for. Container runtimes write all pieces of a line at once.
const PIECES_WAIT_MAX: Duration = Duration::from_secs(1);

/// Nobody takes batches any more, or the end was forced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stopped {
    /// The receiver is gone.
    ReceiverGone,
    /// The shutdown was forced while the queue was full.
    Forced,
}

/// Batches of one source.
pub(crate) struct Batcher {
    shared: Arc<Shared>,
    batches: mpsc::Sender<AccessBatch>,
    handle: Handle,
    metrics: SourceMetrics,
    format: Format,
    line_bytes_max: usize,
    rules: Arc<Rules>,
    lanes: BTreeMap<FileKey, FileLane>,
    /// Files of which no line has come yet, and which they have taken the place of.
    predecessors: BTreeMap<FileKey, FileKey>,
    lost_bytes: u64,
}

struct FileLane {
    lane: Lane,
    /// Since when there have been pieces of a line without its end; the batch begins with the first of them.
    joining_since: Option<Timestamp>,
}

impl Batcher {
    /// Batches for `batches`, cut from lines of at most `line_bytes_max` bytes in `format`.
    pub(crate) fn new(
        shared: Arc<Shared>,
        batches: mpsc::Sender<AccessBatch>,
        handle: Handle,
        metrics: SourceMetrics,
        (format, line_bytes_max): (Format, usize),
    ) -> Self {
        let (rules, lanes, predecessors) = Default::default();
        Self { shared, batches, handle, metrics, format, line_bytes_max, rules, lanes, predecessors, lost_bytes: 0 }
    }

    pub(crate) fn shared(&self) -> Arc<Shared> {
        self.shared.clone()
    }

    /// From now on batches begin under these rules. Those that have begun end under their own.
    pub(crate) fn set_rules(&mut self, policy: Arc<ClientIpPolicy>, interest: Arc<Interest>) {
        self.rules = Arc::new(Rules { policy, interest });
    }

    /// `file` has taken the place of `predecessor`, which may end within a line that goes on in it.
    pub(crate) fn note_predecessor(&mut self, file: FileKey, predecessor: FileKey) {
        self.predecessors.insert(file, predecessor);
    }

    /// A lane for the file of its first line. What its predecessor knows and was left with goes over. The pieces that were
    /// read there count as sent once that one is flushed, which is after what becomes of them here.
    fn begin(&mut self, piece: &Piece<'_>) {
        let mut parser = Parser::new(self.format, self.line_bytes_max, Arc::default(), Arc::default());
        parser.set_room(self.shared.waiting.clone());
        let mut lane = Lane::new(parser);
        // What is there already may be old.
        lane.is_live = false;
        let mut joining_since = None;
        let predecessor = self.predecessors.remove(&piece.file);
        if piece.frame.start == 0
            && let Some(before) = predecessor.and_then(|file| self.lanes.get_mut(&file))
        {
            lane.parser.take_over(&mut before.lane.parser);
            joining_since = before.joining_since.take();
        }
        self.lanes.insert(piece.file, FileLane { lane, joining_since });
    }

    /// Takes a line that was read at `now`.
    pub(crate) fn push(&mut self, piece: &Piece<'_>, now: Timestamp) -> Result<(), Stopped> {
        if self.lanes.get(&piece.file).is_some_and(|lane| lane.must_cut(piece)) {
            self.cut(piece.file)?;
        }
        if !self.lanes.contains_key(&piece.file) {
            self.begin(piece);
        }
        let Self { lanes, shared, rules, .. } = self;
        let Some(FileLane { lane, joining_since }) = lanes.get_mut(&piece.file) else { return Ok(()) };
        let outcome = piece.frame.line.map(|line| lane.read((line, piece.frame.start), (shared, rules, now)));
        if !lane.parser.is_joining() {
            *joining_since = None;
        } else if joining_since.is_none() {
            *joining_since = Some(now);
            // What came before the line need not wait for its end.
            self.send_batch(piece.file, 0)?;
        }
        let Some(FileLane { lane, .. }) = self.lanes.get_mut(&piece.file) else { return Ok(()) };
        let line = piece.frame.line.unwrap_or_default();
        let bytes = piece.frame.end - piece.frame.start;
        let batch = lane.count((line, bytes), outcome, (&self.shared, &self.rules, now));
        let start = batch.span.map_or(piece.frame.start, |span| span.start);
        batch.span = Some(FileSpan { generation: piece.generation, start, end: piece.frame.end });
        Ok(())
    }

    /// Sends what there is of a file, unless a line is in pieces.
    pub(crate) fn flush(&mut self, file: FileKey) -> Result<(), Stopped> {
        let is_whole = self.lanes.get(&file).is_some_and(|file| !file.lane.parser.is_joining());
        if is_whole { self.cut(file) } else { Ok(()) }
    }

    /// A file was read to its end: from now on its lines are looked at as they come.
    pub(crate) fn note_end(&mut self, file: FileKey) {
        if let Some(file) = self.lanes.get_mut(&file) {
            file.lane.is_live = true;
        }
    }

    /// Gives up on lines whose end has not come in time. Returns how long the next one may still wait.
    pub(crate) fn give_up_overdue(&mut self, now: Timestamp) -> Result<Option<Duration>, Stopped> {
        let waits = self.lanes.iter().filter_map(|(key, file)| Some((*key, now.since(file.joining_since?))));
        let waits: Vec<(FileKey, Duration)> = waits.collect();
        for (file, _) in waits.iter().filter(|(_, waited)| *waited >= PIECES_WAIT_MAX) {
            self.cut(*file)?;
        }
        Ok(waits.iter().filter_map(|(_, waited)| PIECES_WAIT_MAX.checked_sub(*waited)).filter(|d| !d.is_zero()).min())
    }

    /// Sends what there is of a file and forgets it.
    pub(crate) fn close(&mut self, file: FileKey) -> Result<(), Stopped> {
        let sent = self.cut(file);
        if let Some(FileLane { mut lane, .. }) = self.lanes.remove(&file) {
            lane.give_up_held((&self.shared, &self.metrics));
        }
        self.predecessors.remove(&file);
        sent
    }

    /// Sends what is whole of every file. Lines in pieces wait; at the end they are left to the next start.
    pub(crate) fn flush_all(&mut self) -> Result<(), Stopped> {
        let files: Vec<FileKey> = self.lanes.keys().copied().collect();
        files.into_iter().try_for_each(|file| self.flush(file))
    }

    /// Returns once nobody takes batches any more: a quiet source would not notice it by sending.
    pub(crate) async fn receiver_gone(&self) {
        self.batches.closed().await;
    }

    /// Sends what there is of a file and gives up on lines in pieces.
    fn cut(&mut self, file: FileKey) -> Result<(), Stopped> {
        let Some(known) = self.lanes.get_mut(&file) else { return Ok(()) };
        known.joining_since = None;
        let abandoned = known.lane.parser.abandon();
        self.send_batch(file, abandoned)
    }

    fn send_batch(&mut self, file: FileKey, abandoned: u64) -> Result<(), Stopped> {
        let Some(FileLane { lane, .. }) = self.lanes.get_mut(&file) else { return Ok(()) };
        let Some(batch) = lane.take(abandoned, (&self.shared, &self.metrics)) else { return Ok(()) };
        self.send(batch)
    }

    fn send(&self, batch: AccessBatch) -> Result<(), Stopped> {
        let sent = match self.batches.try_send(batch) {
            Ok(()) => Ok(()),
            Err(TrySendError::Closed(_)) => Err(Stopped::ReceiverGone),
            Err(TrySendError::Full(batch)) => self.handle.block_on(async {
                tokio::select! {
                    sent = self.batches.send(batch) => sent.map_err(|_| Stopped::ReceiverGone),
                    () = self.shared.shutdown.forced() => Err(Stopped::Forced),
                }
            }),
        };
        let queued = self.batches.max_capacity() - self.batches.capacity();
        self.metrics.queued_batches.set(queued as i64);
        sent
    }

    /// Notes what waits in the files, and what was lost in them since the start.
    pub(crate) fn set_behind(&mut self, behind_bytes: u64, lost_bytes: u64) {
        self.metrics.behind_bytes.set(behind_bytes as i64);
        self.metrics.lost_bytes.inc_by(lost_bytes - self.lost_bytes);
        if lost_bytes > self.lost_bytes {
            let lost = lost_bytes - self.lost_bytes;
            tracing::warn!(source = %self.shared.source, lost_bytes = lost, "A log file was truncated before it was read");
        }
        self.lost_bytes = lost_bytes;
        let mut status = self.shared.status();
        status.report.behind_bytes = behind_bytes;
        status.report.lost_bytes = lost_bytes;
    }

    /// Replaces the problems of the source and logs those that are new.
    pub(crate) fn publish(&self, files: u64, problems: Vec<Problem>) {
        self.metrics.files.set(files as i64);
        self.shared.set_problems(problems);
        self.shared.status().report.files = files;
    }
}

impl FileLane {
    /// Whether the batch ends before the line. A full one also ends inside a line in pieces, which is then given up.
    fn must_cut(&self, piece: &Piece<'_>) -> bool {
        let Some(batch) = &self.lane.batch else { return false };
        // What a batch covers has no gap, whatever a file did.
        let joins = |span: FileSpan| span.generation == piece.generation && span.end == piece.frame.start;
        !batch.span.is_none_or(joins) || self.lane.is_full()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::Frame;
    use crate::source::tail::{Command, FileId, Seen, Tail, TailSettings};

    #[test]
    fn a_batch_ends_where_the_next_line_does_not_join() {
        let mut tail = Tail::new(TailSettings { line_bytes_max: 100, skip_existing: false }, BTreeMap::new());
        let (id, modified) = (FileId { dev: 1, inode: 1 }, Timestamp::EPOCH);
        tail.handle_scan(vec![Seen { path: "log".into(), id, size: 0, modified, sibling_of: None }], modified);
        let Some(Command::Open { file, .. }) = tail.poll_command() else { panic!("a file is opened") };
        let parser = Parser::new(Format::Auto, 100, Arc::default(), Arc::default());
        let mut batch = AccessBatch::new("node".into(), "source".into(), modified);
        batch.span = Some(FileSpan { generation: 1, start: 10, end: 20 });
        let mut lane = Lane::new(parser);
        lane.batch = Some(batch);
        let lane = FileLane { lane, joining_since: None };
        let cuts = |generation, start| {
            lane.must_cut(&Piece { file, generation, frame: Frame { start, end: start + 5, line: Some(b"line") } })
        };
        assert_eq!([cuts(1, 20), cuts(2, 20), cuts(1, 0), cuts(1, 21)], [false, true, true, true]);
    }
}
