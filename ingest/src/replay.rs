//! Reads finished logs, plain or compressed, in order of event time.
//!
//! A line is written when its request ends and its time is when it began, so a file is sorted only roughly. Events are
//! therefore held until every file has been read to `horizon` (detection's `lateness_max`) beyond them, and then handed
//! out by time, node, source and offset. An event that is later than that comes when it is read; detection counts it as
//! late anyway. One line with a time far ahead of its file moves nothing until the next one confirms it. Only events that the caller wants are held: memory is bounded by what matches within one horizon.
//!
//! Files are opened when their time comes, not all at once. Nothing depends on the clock, the machine's state or the
//! size of reads: two runs over the same files hand out the same.

mod merge;
mod open;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use proto::client_ip::{ClientIpPolicy, NoClient};
use proto::event::{Event, Interest};
use proto::time::Timestamp;

use crate::error::ReplayError;
use crate::frame::{Frame, Framer};
use crate::parse::{Format, Outcome, Parser, Refusal, Suspicion, escape_sample};
use merge::{Merge, Progress};
use open::OpenLog;

/// Bytes of text that are read and parsed at a time.
const CHUNK_BYTES: usize = 256 << 10;

/// One log.
#[derive(Clone, Debug)]
pub struct ReplayFile {
    /// Where it is. `.gz` and `.zst` are told by their content, not by their name.
    pub path: PathBuf,
    /// Node whose log it is.
    pub node: Arc<str>,
    /// Source whose log it is.
    pub source: Arc<str>,
}

/// How to read.
#[derive(Clone, Debug)]
pub struct ReplaySettings {
    /// How lines are written.
    pub format: Format,
    /// Longest line in bytes.
    pub line_bytes_max: usize,
    /// How far out of order events may stand in a file.
    pub horizon: Duration,
    /// How clients are told from proxies.
    pub client_ip: Arc<ClientIpPolicy>,
    /// What the rules look at.
    pub interest: Arc<Interest>,
}

/// An event in its turn.
#[derive(Clone, Copy, Debug)]
pub struct ReplayItem<'a> {
    /// Node whose log it is from.
    pub node: &'a Arc<str>,
    /// Source whose log it is from.
    pub source: &'a Arc<str>,
    /// The log.
    pub path: &'a Path,
    /// The event.
    pub event: Event<'a>,
}

/// One line, in the order of its file.
#[derive(Clone, Copy, Debug)]
pub struct ReplayLine<'a> {
    /// Node whose log it is from.
    pub node: &'a Arc<str>,
    /// Source whose log it is from.
    pub source: &'a Arc<str>,
    /// The log.
    pub path: &'a Path,
    /// Byte offset of the line in the uncompressed log.
    pub offset: u64,
    /// The line without its end; empty when it was too long.
    pub line: &'a [u8],
    /// What it was.
    pub what: LineKind<'a>,
}

/// What a line was.
#[derive(Clone, Copy, Debug)]
pub enum LineKind<'a> {
    /// An access.
    Event(&'a Event<'a>),
    /// Nothing but white space.
    Blank,
    /// A piece of a line whose end is still to come.
    Partial,
    /// No access entry.
    Unparsed(Refusal),
    /// An access that may be forged.
    Suspect(Suspicion),
    /// Longer than the limit.
    Oversized,
}

impl<'a> ReplayLine<'a> {
    fn new(file: &'a ReplayFile, frame: &Frame<'a>, what: LineKind<'a>) -> Self {
        let (node, source, path) = (&file.node, &file.source, file.path.as_path());
        Self { node, source, path, offset: frame.start, line: frame.line.unwrap_or_default(), what }
    }
}

/// What was read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReplayStats {
    /// Lines of all files.
    pub lines: u64,
    /// Bytes of these lines, uncompressed.
    pub bytes: u64,
    /// Lines that were accesses.
    pub events: u64,
    /// Events without a usable time; they take the newest time before them in their file.
    pub untimed: u64,
    /// Lines that were no accesses.
    pub unparsed: u64,
    /// The first of them, escaped and cut.
    pub unparsed_sample: Option<String>,
    /// Lines longer than the limit.
    pub oversized: u64,
    /// Events without a client, by reason.
    pub no_client: BTreeMap<NoClient, u64>,
    /// Earliest event time.
    pub first: Option<Timestamp>,
    /// Latest event time.
    pub last: Option<Timestamp>,
}

/// Logs to read once.
#[derive(Debug)]
pub struct ReplayReader {
    files: Vec<ReplayFile>,
    settings: ReplaySettings,
    bytes_read: Arc<AtomicU64>,
}

impl ReplayReader {
    /// Opens nothing yet.
    pub fn new(files: Vec<ReplayFile>, settings: ReplaySettings) -> Self {
        Self { files, settings, bytes_read: Arc::default() }
    }

    /// Size of all files as they lie on the disk, for a progress bar; what is no regular file counts nothing.
    pub fn total_bytes(&self) -> u64 {
        let size = |file: &ReplayFile| fs::metadata(&file.path).ok().filter(fs::Metadata::is_file).map(|m| m.len());
        self.files.iter().filter_map(size).sum()
    }

    /// Bytes read so far of [`ReplayReader::total_bytes`], while it runs.
    pub fn bytes_read(&self) -> Arc<AtomicU64> {
        self.bytes_read.clone()
    }

    /// Reads everything and hands out, in order of time, the events that `keep` wants. `keep` sees every event, in no
    /// particular order over files.
    pub fn run(
        self,
        keep: impl FnMut(&Event<'_>) -> bool,
        each: impl FnMut(ReplayItem<'_>),
    ) -> Result<ReplayStats, ReplayError> {
        let mut logs = Vec::new();
        for file in &self.files {
            // One file needs no order among files; several are begun in the order of their first times.
            let newest = if self.files.len() > 1 { self.first_time(file)? } else { None };
            logs.push(Log { progress: Progress::new(newest), open: None, ended: false });
        }
        let mut merge = Merge::new(&self.files, self.settings.horizon, keep, each);
        let mut stats = ReplayStats::default();
        let mut chunk = vec![0; CHUNK_BYTES];
        while let Some(index) = behind_most(&logs) {
            let others = logs.iter().enumerate().filter(|(i, log)| *i != index && !log.ended);
            // Events before this are held back by no other file.
            merge.others = others.map(|(_, log)| log.progress.newest.unwrap_or(Timestamp::EPOCH)).min();
            let (file, log) = (&self.files[index], &mut logs[index]);
            if log.open.is_none() {
                log.open = Some(Lines::open(file, &self.settings, Some(self.bytes_read.clone()))?);
            }
            let Some(lines) = &mut log.open else { continue };
            let progress = &mut log.progress;
            let goes_on = lines.read_chunk(file, &mut chunk, |frame, parser| {
                let outcome = frame.line.map(|line| {
                    parser.with_event(line, frame.start, |event| {
                        merge.take(index, event, progress);
                        (event.time, event.client.err())
                    })
                });
                stats.note(&frame, outcome);
            })?;
            if !goes_on {
                stats.unparsed += lines.parser.abandon();
                (log.open, log.ended) = (None, true);
            }
        }
        merge.finish();
        Ok(stats)
    }

    /// Reads everything and hands out every line, file by file.
    pub fn lines(self, mut each: impl FnMut(ReplayLine<'_>)) -> Result<ReplayStats, ReplayError> {
        let mut stats = ReplayStats::default();
        let mut chunk = vec![0; CHUNK_BYTES];
        for file in &self.files {
            let mut lines = Lines::open(file, &self.settings, Some(self.bytes_read.clone()))?;
            let mut show = |frame: Frame<'_>, parser: &mut Parser| {
                let outcome = frame.line.map(|line| {
                    parser.with_event(line, frame.start, |event| {
                        each(ReplayLine::new(file, &frame, LineKind::Event(event)));
                        (event.time, event.client.err())
                    })
                });
                let what = match outcome {
                    None => Some(LineKind::Oversized),
                    Some(Outcome::Event(_)) => None,
                    Some(Outcome::Blank) => Some(LineKind::Blank),
                    Some(Outcome::Partial) => Some(LineKind::Partial),
                    Some(Outcome::Unparsed(refusal)) => Some(LineKind::Unparsed(refusal)),
                    Some(Outcome::Suspect(suspicion)) => Some(LineKind::Suspect(suspicion)),
                    // Only what comes as it is written waits for more.
                    Some(Outcome::Held) => None,
                };
                if let Some(what) = what {
                    each(ReplayLine::new(file, &frame, what));
                }
                stats.note(&frame, outcome);
            };
            while lines.read_chunk(file, &mut chunk, &mut show)? {}
            stats.unparsed += lines.parser.abandon();
        }
        Ok(stats)
    }

    /// The first time that the next one confirms, or else the last one of the file; `None` for what cannot be read twice.
    fn first_time(&self, file: &ReplayFile) -> Result<Option<Timestamp>, ReplayError> {
        if !fs::metadata(&file.path).is_ok_and(|metadata| metadata.is_file()) {
            return Ok(None);
        }
        let mut lines = Lines::open(file, &self.settings, None)?;
        let mut chunk = vec![0; CHUNK_BYTES];
        let mut first = Progress::default();
        while first.newest.is_none() {
            let goes_on = lines.read_chunk(file, &mut chunk, |frame, parser| {
                if let (None, Some(line)) = (first.newest, frame.line)
                    && let Outcome::Event(Some(time)) = parser.with_event(line, frame.start, |event| event.time)
                {
                    first.note(time, self.settings.horizon);
                }
            })?;
            if !goes_on {
                break;
            }
        }
        Ok(first.or_leap())
    }
}

/// How far one file has been read.
struct Log {
    /// Before anything was read, the time of its first event.
    progress: Progress,
    open: Option<Lines>,
    ended: bool,
}

/// The file that is furthest behind in time; the first of several.
fn behind_most(logs: &[Log]) -> Option<usize> {
    let unfinished = logs.iter().enumerate().filter(|(_, log)| !log.ended);
    unfinished.min_by_key(|(_, log)| log.progress.newest).map(|(index, _)| index)
}

/// The lines of an open file.
struct Lines {
    log: OpenLog,
    framer: Framer,
    parser: Parser,
}

impl Lines {
    fn open(
        file: &ReplayFile,
        settings: &ReplaySettings,
        bytes_read: Option<Arc<AtomicU64>>,
    ) -> Result<Self, ReplayError> {
        let error = |cause: io::Error| ReplayError::Open { path: file.path.clone(), cause };
        let log = OpenLog::open(&file.path, bytes_read.unwrap_or_default()).map_err(error)?;
        let (policy, interest) = (settings.client_ip.clone(), settings.interest.clone());
        let parser = Parser::new(settings.format, settings.line_bytes_max, policy, interest);
        Ok(Self { log, framer: Framer::new(0, settings.line_bytes_max), parser })
    }

    /// Reads on and shows each line; returns whether there may be more.
    fn read_chunk(
        &mut self,
        file: &ReplayFile,
        chunk: &mut [u8],
        mut each: impl FnMut(Frame<'_>, &mut Parser),
    ) -> Result<bool, ReplayError> {
        let error = |cause: io::Error| ReplayError::Read { path: file.path.clone(), cause };
        let length = self.log.read_full(chunk).map_err(error)?;
        let parser = &mut self.parser;
        self.framer.feed(&chunk[..length], |frame| each(frame, parser));
        let is_end = length < chunk.len();
        if is_end {
            self.framer.finish(|frame| each(frame, parser));
        }
        Ok(!is_end)
    }
}

impl ReplayStats {
    /// Counts a line; `None` stands for one that was too long.
    fn note(&mut self, frame: &Frame<'_>, outcome: Option<Outcome<(Option<Timestamp>, Option<NoClient>)>>) {
        self.lines += 1;
        self.bytes += frame.end - frame.start;
        match outcome {
            None => self.oversized += 1,
            Some(Outcome::Event((time, no_client))) => {
                self.events += 1;
                match time {
                    None => self.untimed += 1,
                    Some(time) => {
                        self.first = Some(self.first.map_or(time, |first| first.min(time)));
                        self.last = self.last.max(Some(time));
                    }
                }
                if let Some(reason) = no_client {
                    *self.no_client.entry(reason).or_default() += 1;
                }
            }
            Some(Outcome::Unparsed(_)) => {
                self.unparsed += 1;
                self.unparsed_sample.get_or_insert_with(|| escape_sample(frame.line.unwrap_or_default()));
            }
            Some(Outcome::Blank | Outcome::Partial | Outcome::Suspect(_) | Outcome::Held) => {}
        }
    }
}

#[cfg(test)]
mod tests;
