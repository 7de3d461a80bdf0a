//! From lines to batches: one lane a file, cut so that a batch is small, covers one stretch, and does not end between the
//! pieces of a line. So a batch also ends where a line in pieces begins, and no line waits for pieces of another for
//! longer than [`PIECES_WAIT_MAX`] or a full batch: then they are given up.
//!
//! Accesses that no rule can match are left out, unless their client is banned: what it still reaches is a leak. A batch is
//! filtered by one version of what the rules look at, from its first line to its last.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use proto::client_ip::{Client, ClientIpPolicy, NoClient};
use proto::event::{AccessBatch, FileSpan, Interest, LineCounts};
use proto::report::Problem;
use proto::time::Timestamp;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use super::tail::{FileKey, Piece};
use crate::metrics::{NO_CLIENT, SourceMetrics};
use crate::parse::{Format, Outcome, Parser, escape_sample};
use crate::pipeline::Shared;

/// Events of a batch. With the queue's length this bounds what waits in memory: some ten megabytes at worst.
const BATCH_EVENTS_MAX: usize = 512;
/// Bytes of text in a batch, beyond which no further line is added.
const BATCH_TEXT_BYTES_MAX: usize = 64 << 10;
/// Lines of a batch, for files that hold no accesses.
const BATCH_LINES_MAX: u64 = 8192;
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
    lanes: BTreeMap<FileKey, Lane>,
    lost_bytes: u64,
}

/// What a batch is made under, from its first line to its last.
#[derive(Debug, Default)]
struct Rules {
    policy: Arc<ClientIpPolicy>,
    interest: Arc<Interest>,
}

struct Lane {
    parser: Parser,
    batch: Option<AccessBatch>,
    /// Of the batch.
    rules: Arc<Rules>,
    tally: Tally,
    /// Since when there have been pieces of a line without its end; the batch begins with the first of them.
    joining_since: Option<Timestamp>,
}

/// What a batch brought, for reports and metrics.
#[derive(Debug, Default)]
struct Tally {
    events: u64,
    /// The newest client that is known, and its peer.
    client: Option<(Client, Option<IpAddr>)>,
    sample: Option<String>,
    no_client: [u64; NO_CLIENT.len()],
}

/// Whose request a line tells of, and its peer.
type Origin = (Result<Client, NoClient>, Option<IpAddr>);

impl Batcher {
    /// Batches for `batches`, cut from lines of at most `line_bytes_max` bytes in `format`.
    pub(crate) fn new(
        shared: Arc<Shared>,
        batches: mpsc::Sender<AccessBatch>,
        handle: Handle,
        metrics: SourceMetrics,
        (format, line_bytes_max): (Format, usize),
    ) -> Self {
        let (rules, lanes) = Default::default();
        Self { shared, batches, handle, metrics, format, line_bytes_max, rules, lanes, lost_bytes: 0 }
    }

    pub(crate) fn shared(&self) -> Arc<Shared> {
        self.shared.clone()
    }

    /// From now on batches begin under these rules. Those that have begun end under their own.
    pub(crate) fn set_rules(&mut self, policy: Arc<ClientIpPolicy>, interest: Arc<Interest>) {
        self.rules = Arc::new(Rules { policy, interest });
    }

    /// Takes a line that was read at `now`.
    pub(crate) fn push(&mut self, piece: &Piece<'_>, now: Timestamp) -> Result<(), Stopped> {
        if self.lanes.get(&piece.file).is_some_and(|lane| lane.must_cut(piece)) {
            self.cut(piece.file)?;
        }
        let Self { lanes, shared, rules, .. } = self;
        let new = || Lane::new(Parser::new(self.format, self.line_bytes_max, Arc::default(), Arc::default()));
        let lane = lanes.entry(piece.file).or_insert_with(new);
        let outcome = piece.frame.line.map(|line| {
            let (parser, batch, interest) = lane.begin(shared, rules, now);
            let outcome = parser.with_event(line, piece.frame.start, |event| {
                if interest.may_match(event.status)
                    || event.client.is_ok_and(|client| shared.banned.contains(client.addr))
                {
                    batch.push(event);
                } else {
                    batch.counts.withheld += 1;
                }
                (event.client, event.peer)
            });
            (outcome, line)
        });
        if !lane.parser.is_joining() {
            lane.joining_since = None;
        } else if lane.joining_since.is_none() {
            lane.joining_since = Some(now);
            // What came before the line need not wait for its end.
            self.send_batch(piece.file, 0)?;
        }
        let Some(lane) = self.lanes.get_mut(&piece.file) else { return Ok(()) };
        let is_unparsed = outcome.is_some_and(|(outcome, line)| lane.tally.note(outcome, line));
        let (_, batch, _) = lane.begin(&self.shared, &self.rules, now);
        let start = batch.span.map_or(piece.frame.start, |span| span.start);
        batch.span = Some(FileSpan { generation: piece.generation, start, end: piece.frame.end });
        batch.read_at = now;
        batch.counts.lines += 1;
        batch.counts.unparsed += u64::from(is_unparsed);
        batch.counts.oversized += u64::from(piece.frame.line.is_none());
        Ok(())
    }

    /// Sends what there is of a file, unless a line is in pieces.
    pub(crate) fn flush(&mut self, file: FileKey) -> Result<(), Stopped> {
        let is_whole = self.lanes.get(&file).is_some_and(|lane| !lane.parser.is_joining());
        if is_whole { self.cut(file) } else { Ok(()) }
    }

    /// Gives up on lines whose end has not come in time. Returns how long the next one may still wait.
    pub(crate) fn give_up_overdue(&mut self, now: Timestamp) -> Result<Option<Duration>, Stopped> {
        let waits = self.lanes.iter().filter_map(|(file, lane)| Some((*file, now.since(lane.joining_since?))));
        let waits: Vec<(FileKey, Duration)> = waits.collect();
        for (file, _) in waits.iter().filter(|(_, waited)| *waited >= PIECES_WAIT_MAX) {
            self.cut(*file)?;
        }
        Ok(waits.iter().filter_map(|(_, waited)| PIECES_WAIT_MAX.checked_sub(*waited)).filter(|d| !d.is_zero()).min())
    }

    /// Sends what there is of a file and forgets it.
    pub(crate) fn close(&mut self, file: FileKey) -> Result<(), Stopped> {
        let sent = self.cut(file);
        self.lanes.remove(&file);
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
        let Some(lane) = self.lanes.get_mut(&file) else { return Ok(()) };
        lane.joining_since = None;
        let abandoned = lane.parser.abandon();
        self.send_batch(file, abandoned)
    }

    fn send_batch(&mut self, file: FileKey, abandoned: u64) -> Result<(), Stopped> {
        let Some(lane) = self.lanes.get_mut(&file) else { return Ok(()) };
        // A batch that covers nothing yet is none.
        let Some(mut batch) = lane.batch.take().filter(|batch| batch.span.is_some()) else { return Ok(()) };
        batch.counts.unparsed += abandoned;
        let tally = std::mem::take(&mut lane.tally);
        let format = lane.parser.seen_format().map_or("", |format| format.as_str());
        self.count(&batch, tally, format);
        self.send(batch)
    }

    fn count(&self, batch: &AccessBatch, tally: Tally, format: &str) {
        let LineCounts { lines, unparsed, oversized, withheld } = batch.counts;
        let metrics = &self.metrics;
        metrics.lines.inc_by(lines);
        metrics.events.inc_by(tally.events);
        metrics.unparsed.inc_by(unparsed);
        metrics.oversized.inc_by(oversized);
        metrics.withheld.inc_by(withheld);
        metrics.bytes.inc_by(batch.span.map_or(0, |span| span.end - span.start));
        let mut status = self.shared.status();
        let report = &mut status.report;
        report.lines += lines;
        report.events += tally.events;
        report.unparsed += unparsed;
        report.oversized += oversized;
        report.withheld += withheld;
        report.last_line_at = Some(batch.read_at);
        if report.format != format {
            format.clone_into(&mut report.format);
        }
        if let Some((client, peer)) = tally.client {
            let via = peer.filter(|_| client.via_proxy).map_or_else(String::new, |peer| format!(" via {peer}"));
            report.sample_client = Some(format!("{}{via}", client.addr));
        }
        if tally.sample.is_some() {
            report.unparsed_sample = tally.sample;
        }
        for (index, reason) in NO_CLIENT.iter().enumerate().filter(|(index, _)| tally.no_client[*index] > 0) {
            metrics.no_client[index].inc_by(tally.no_client[index]);
            *report.no_client.entry(reason.as_str().to_owned()).or_default() += tally.no_client[index];
        }
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
        let mut status = self.shared.status();
        for problem in problems.iter().filter(|problem| !status.problems.contains(problem)) {
            tracing::warn!(source = %self.shared.source, problem = problem.text, "A source of log lines has a problem");
        }
        status.report.files = files;
        status.problems = problems;
    }
}

impl Lane {
    fn new(parser: Parser) -> Self {
        let (batch, rules, tally, joining_since) = Default::default();
        Self { parser, batch, rules, tally, joining_since }
    }

    /// The batch under way, and what its lines go through. One that begins now takes over the rules in force.
    fn begin(
        &mut self,
        shared: &Shared,
        rules: &Arc<Rules>,
        now: Timestamp,
    ) -> (&mut Parser, &mut AccessBatch, &Interest) {
        let Self { parser, batch, rules: own, .. } = self;
        let batch = batch.get_or_insert_with(|| {
            if !Arc::ptr_eq(own, rules) {
                parser.set_rules(rules.policy.clone(), rules.interest.clone());
                *own = rules.clone();
            }
            let mut batch = AccessBatch::new(shared.node.clone(), shared.source.clone(), now);
            batch.filter = rules.interest.version;
            batch
        });
        (parser, batch, &own.interest)
    }

    /// Whether the batch ends before the line. A full one also ends inside a line in pieces, which is then given up.
    fn must_cut(&self, piece: &Piece<'_>) -> bool {
        let Some(batch) = &self.batch else { return false };
        // What a batch covers has no gap, whatever a file did.
        let joins = |span: FileSpan| span.generation == piece.generation && span.end == piece.frame.start;
        let is_other = !batch.span.is_none_or(joins);
        let is_full = batch.len() >= BATCH_EVENTS_MAX
            || batch.text_bytes() >= BATCH_TEXT_BYTES_MAX
            || batch.counts.lines >= BATCH_LINES_MAX;
        is_other || is_full
    }
}

impl Tally {
    /// Returns whether the line is no access entry.
    fn note(&mut self, outcome: Outcome<Origin>, line: &[u8]) -> bool {
        match outcome {
            Outcome::Event((client, peer)) => {
                self.events += 1;
                match client {
                    Ok(client) => self.client = Some((client, peer)),
                    Err(reason) => self.no_client[reason as usize] += 1,
                }
            }
            Outcome::Unparsed(_) => {
                // One of each batch is enough.
                self.sample.get_or_insert_with(|| escape_sample(line));
            }
            Outcome::Blank | Outcome::Partial => {}
        }
        matches!(outcome, Outcome::Unparsed(_))
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
        let lane = Lane { batch: Some(batch), ..Lane::new(parser) };
        let cuts = |generation, start| {
            lane.must_cut(&Piece { file, generation, frame: Frame { start, end: start + 5, line: Some(b"line") } })
        };
        assert_eq!([cuts(1, 20), cuts(2, 20), cuts(1, 0), cuts(1, 21)], [false, true, true, true]);
    }
}
