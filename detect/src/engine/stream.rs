//! The order of what has been seen: positions, which lines were already counted, and where to read again after a restart.
//!
//! One host has no broker that numbers its lines, and its files have no common order. What the engine must know later is
//! only whether an event was handled before or after a decision. So a [`Position`] is the number of decisions made
//! before the event, and for each file it is remembered from which offset each number applies.
//!
//! A cluster's lines come through one numbered [`Log`], which is read again after a restart. There a position is the
//! place of the event in the log, and the floor, up to which all is decided, takes the place of what is remembered.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use proto::event::{FileSpan, Position as ReadPosition, Positions};
use proto::time::Timestamp;

/// Where an event stands among the decisions: events of one position were handled between the same two decisions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position(pub u64);

/// Bits of a log's position that number the events of one batch.
const INDEX_BITS: u32 = 16;

impl Position {
    /// Before everything: nothing is consumed.
    pub const START: Self = Self(0);

    /// Of event `index` in the batch with number `sequence` in a log. Further events than a batch may have share one.
    pub fn in_log(sequence: u64, index: usize) -> Self {
        Self(sequence << INDEX_BITS | (index as u64).min((1 << INDEX_BITS) - 1))
    }

    /// After every event of the batch with number `sequence` in a log.
    pub fn after_batch(sequence: u64) -> Self {
        Self::in_log(sequence, usize::MAX)
    }
}

/// Where a numbered log stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Log {
    /// Of the newest event.
    pub position: Position,
    /// When it arrived, by the log's stamps; never decreases.
    pub arrival: Timestamp,
    /// Up to here everything is decided.
    pub floor: Position,
    /// When the batch at the floor arrived that this log began with. What is read again arrived before.
    pub begun: Timestamp,
    /// Whether what stands after the floor is decided here, not elsewhere.
    pub leads: bool,
}

/// Generations of files that are remembered; the one that was read longest ago goes first.
pub const FILES_MAX: usize = 10_000;
/// Marks kept for one file; beyond it the oldest go, and what stands before the rest is not counted again in a rebuild.
pub const MARKS_MAX: usize = 100_000;
/// Without a decision, a file's offset is noted this often: how finely arrival times are known in a rebuild.
pub const MARK_INTERVAL: Duration = Duration::from_secs(10);

/// One generation of one file.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FileKey {
    /// Node that reads it.
    pub node: Arc<str>,
    /// Source it belongs to.
    pub source: Arc<str>,
    /// Hash of inode and first line.
    pub generation: u64,
}

/// From `offset` on, events have `position` and arrived at or after `arrival`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Byte offset.
    pub offset: u64,
    /// Position of what follows.
    pub position: Position,
    /// Arrival of the first event that follows.
    pub arrival: Timestamp,
}

/// Disjoint, ascending, half-open byte ranges; neighbours are joined.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ranges(pub Vec<(u64, u64)>);

impl Ranges {
    /// Whether `offset` is in one of them.
    pub fn contains(&self, offset: u64) -> bool {
        let after = self.0.partition_point(|range| range.0 <= offset);
        after.checked_sub(1).is_some_and(|i| offset < self.0[i].1)
    }

    /// Adds `start..end`.
    pub fn add(&mut self, start: u64, end: u64) {
        if start >= end {
            return;
        }
        let first = self.0.partition_point(|range| range.1 < start);
        let after = self.0.partition_point(|range| range.0 <= end);
        let joined = self.0[first..after].iter().fold((start, end), |(s, e), range| (s.min(range.0), e.max(range.1)));
        self.0.splice(first..after, [joined]);
    }

    /// The part of the ranges below `offset`.
    #[must_use]
    pub fn below(&self, offset: u64) -> Self {
        Self(self.0.iter().filter(|r| r.0 < offset).map(|&(start, end)| (start, end.min(offset))).collect())
    }

    /// End of the last range.
    pub fn end(&self) -> u64 {
        self.0.last().map_or(0, |range| range.1)
    }
}

/// What is known of one generation of a file. This is what is stored.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileState {
    /// Lines in these ranges are decided.
    pub decided: Ranges,
    /// Ascending in offset, position and arrival.
    pub marks: Vec<Mark>,
    /// Arrival of the newest line.
    pub last_arrival: Timestamp,
}

impl FileState {
    /// Nothing of it arrived after `now`, whatever a clock said that has been set back since.
    pub fn clamp(&mut self, now: Timestamp) {
        self.last_arrival = self.last_arrival.min(now);
        for mark in &mut self.marks {
            mark.arrival = mark.arrival.min(now);
        }
    }
}

#[derive(Clone, Debug)]
struct File {
    key: FileKey,
    state: FileState,
    /// Lines in these ranges were delivered in this run, or need not be read again.
    covered: Ranges,
    /// Changed since the last [`Stream::take_changes`].
    changed: bool,
    /// Stored marks from this offset on are not as here.
    unsaved_from: u64,
    /// The arrival of the newest lines matters: the next that arrives at another moment is marked.
    pinned: bool,
}

/// What has changed of one file, for storing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileChange {
    /// Which file.
    pub key: FileKey,
    /// Lines in these ranges are decided.
    pub decided: Ranges,
    /// Arrival of the newest line.
    pub last_arrival: Timestamp,
    /// Stored marks before this offset are of no use any more.
    pub marks_from: u64,
    /// Stored marks from this offset on are replaced by `marks`.
    pub unsaved_from: u64,
    /// The marks from there on.
    pub marks: Vec<Mark>,
}

impl File {
    fn new(key: FileKey) -> Self {
        Self {
            key,
            state: FileState::default(),
            covered: Ranges::default(),
            changed: true,
            unsaved_from: 0,
            pinned: false,
        }
    }
}

/// A file of the stream, while a batch of it is handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot(usize);

/// What is to be done with a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// Nothing: it has been counted.
    Duplicate,
    /// It is decided but not in the windows: fill them, decide nothing.
    Rebuild {
        /// Its position then.
        position: Position,
        /// It arrived at this moment or later ...
        after: Timestamp,
        /// ... and at this moment or earlier.
        before: Timestamp,
    },
    /// It is new.
    Decide {
        /// Its position.
        position: Position,
        /// When it arrived.
        arrival: Timestamp,
    },
}

/// All files, and the number of decisions so far.
#[derive(Debug)]
pub struct Stream {
    files: Vec<File>,
    index: BTreeMap<FileKey, usize>,
    position: Position,
    forgotten: u64,
    marks_dropped: u64,
    /// Forgotten since the last [`Stream::take_changes`].
    dropped: Vec<FileKey>,
    /// `None` on one host, where lines come straight from files.
    log: Option<Log>,
}

impl Default for Stream {
    fn default() -> Self {
        // Position 0 is "nothing consumed", so the first events stand at 1.
        Self {
            files: Vec::new(),
            index: BTreeMap::new(),
            position: Position(1),
            forgotten: 0,
            marks_dropped: 0,
            dropped: Vec::new(),
            log: None,
        }
    }
}

impl Stream {
    /// Of a log that is decided up to `floor`. Which lines were counted is learned by reading it again.
    pub fn of_log(floor: Position, arrival: Timestamp) -> Self {
        Self { log: Some(Log { floor, begun: arrival, ..Log::default() }), ..Self::default() }
    }

    /// What comes now is event `index` of the batch with number `sequence`, stamped by the log.
    pub fn locate(&mut self, sequence: u64, index: usize, stamp: Timestamp) {
        if let Some(log) = &mut self.log {
            log.position = Position::in_log(sequence, index);
            log.arrival = log.arrival.max(stamp);
        }
    }

    /// Nothing more comes that arrived before `now`.
    pub fn pass_time(&mut self, now: Timestamp) {
        if let Some(log) = &mut self.log {
            log.arrival = log.arrival.max(now);
        }
    }

    /// Everything up to the newest event, or to `floor` if that is later, is decided.
    pub fn raise_floor(&mut self, floor: Position) {
        if let Some(log) = &mut self.log {
            log.floor = log.floor.max(floor);
        }
    }

    /// From now on what stands after the floor is decided here.
    pub fn lead(&mut self) {
        if let Some(log) = &mut self.log {
            log.leads = true;
        }
    }

    /// Whether the batch with number `sequence` in the log, or a later one, has been handled.
    pub fn is_past(&self, sequence: u64) -> bool {
        self.log.is_some_and(|log| Position::in_log(sequence, 0) <= log.position)
    }

    /// Whether the batch with number `sequence` is decided here.
    pub fn decides(&self, sequence: u64) -> bool {
        self.log.is_none_or(|log| log.leads && log.floor < Position::in_log(sequence, 0))
    }

    /// Whether lines come through a numbered log.
    pub fn is_log(&self) -> bool {
        self.log.is_some()
    }

    /// The time of which windows are: the newest arrival known in a log, which may lie far back, else `now`.
    pub fn window_time(&self, now: Timestamp) -> Timestamp {
        self.log.map_or(now, |log| log.arrival.max(log.begun))
    }

    /// Continues a stored stream. Windows are rebuilt from what arrived after `since`.
    pub fn restore(
        position: Position,
        files: impl IntoIterator<Item = (FileKey, FileState)>,
        since: Timestamp,
    ) -> Self {
        let mut stream = Self { position: position.max(Position(1)), ..Self::default() };
        for (key, state) in files {
            let covered = state.decided.below(rebuild_offset(&state, since));
            stream.index.insert(key.clone(), stream.files.len());
            // Whether the newest lines were pinned is not stored, so it is taken that they were.
            stream.files.push(File { key, state, covered, changed: false, unsaved_from: u64::MAX, pinned: true });
        }
        stream
    }

    /// Where ingest begins to read each file again, of one node.
    pub fn read_positions(&self, node: &str, since: Timestamp) -> Positions {
        let of_node = self.files.iter().filter(|file| &*file.key.node == node);
        of_node
            .map(|file| {
                let offset = rebuild_offset(&file.state, since);
                let position = ReadPosition { offset, needed: offset < file.state.decided.end() };
                ((file.key.source.to_string(), file.key.generation), position)
            })
            .collect()
    }

    /// The position of what comes now.
    pub fn position(&self) -> Position {
        // What an order finds decided in a log is everything up to the floor, if nothing has come since.
        self.log.map_or(self.position, |log| log.position.max(log.floor))
    }

    fn judge_in_log(log: &Log) -> Admission {
        if !log.leads || log.position <= log.floor {
            return Admission::Rebuild { position: log.position, after: log.arrival, before: log.arrival };
        }
        Admission::Decide { position: log.position, arrival: log.arrival }
    }

    /// Judges an event of a source whose lines have no offsets.
    pub fn admit_unnumbered(&self, now: Timestamp) -> Admission {
        let new = Admission::Decide { position: self.position, arrival: now };
        self.log.as_ref().map_or(new, Self::judge_in_log)
    }

    /// Generations forgotten because there were more than [`FILES_MAX`].
    pub fn forgotten(&self) -> u64 {
        self.forgotten
    }

    /// A decision has been made: what comes now stands after it.
    pub fn advance(&mut self) {
        self.position.0 += 1;
    }

    /// The slot of a file, made if it is new.
    pub fn open(&mut self, key: FileKey) -> Slot {
        if let Some(&at) = self.index.get(&key) {
            return Slot(at);
        }
        let file = File::new(key.clone());
        if self.files.len() < FILES_MAX {
            self.files.push(file);
            self.index.insert(key, self.files.len() - 1);
            return Slot(self.files.len() - 1);
        }
        let oldest = (0..self.files.len()).min_by_key(|&i| self.files[i].state.last_arrival).unwrap_or(0);
        let forgotten = std::mem::replace(&mut self.files[oldest], file);
        self.index.remove(&forgotten.key);
        self.dropped.push(forgotten.key);
        self.forgotten += 1;
        self.index.insert(key, oldest);
        Slot(oldest)
    }

    /// Judges one line.
    pub fn admit(&mut self, slot: Slot, offset: u64, now: Timestamp) -> Admission {
        let file = &mut self.files[slot.0];
        if file.covered.contains(offset) {
            return Admission::Duplicate;
        }
        if let Some(log) = &self.log {
            return Self::judge_in_log(log);
        }
        if file.state.decided.contains(offset) {
            let marks = &file.state.marks;
            let after = marks.partition_point(|mark| mark.offset <= offset);
            let mark = after.checked_sub(1).map(|i| marks[i]);
            return Admission::Rebuild {
                position: mark.map_or(Position::START, |mark| mark.position),
                after: mark.map_or(Timestamp::EPOCH, |mark| mark.arrival),
                before: marks.get(after).map_or(file.state.last_arrival, |mark| mark.arrival).min(now),
            };
        }
        let due = |last: &Mark| {
            let pinned = file.pinned && last.arrival != now;
            pinned || last.position != self.position || last.arrival.saturating_add(MARK_INTERVAL) <= now
        };
        if file.state.marks.last().is_none_or(due) {
            self.close_pinned(slot, offset, now);
            self.mark(slot, offset, now);
        }
        Admission::Decide { position: self.position, arrival: now }
    }

    /// Notes that what follows from `offset` on arrived at `now` or later.
    fn mark(&mut self, slot: Slot, offset: u64, now: Timestamp) {
        let file = &mut self.files[slot.0];
        let marks = &mut file.state.marks;
        file.pinned &= marks.last().is_some_and(|last| last.arrival == now);
        marks.truncate(marks.partition_point(|mark| mark.offset < offset));
        if marks.last().is_some_and(|last| last.position == self.position && last.arrival == now) {
            return;
        }
        if marks.len() >= MARKS_MAX {
            marks.drain(..MARKS_MAX / 2);
            self.marks_dropped += MARKS_MAX as u64 / 2;
        }
        marks.push(Mark { offset, position: self.position, arrival: now });
        file.unsaved_from = file.unsaved_from.min(offset);
        file.changed = true;
    }

    /// Pinned lines arrived at one moment: says so with a mark between the last of them and the line at `offset`.
    fn close_pinned(&mut self, slot: Slot, offset: u64, now: Timestamp) {
        let file = &mut self.files[slot.0];
        let arrival = file.state.last_arrival;
        let Some(last) = file.state.marks.last().copied().filter(|_| file.pinned && arrival != now) else { return };
        // A line has an end, so that no other begins right before this one.
        let between = offset.saturating_sub(1);
        if last.offset < between && last.arrival <= arrival {
            file.unsaved_from = file.unsaved_from.min(between);
            file.state.marks.push(Mark { offset: between, arrival, ..last });
        }
    }

    /// Notes the exact arrival of the line at `offset`, as what became of it hangs on it.
    pub fn pin(&mut self, slot: Slot, offset: u64, now: Timestamp) {
        if self.log.is_some() {
            return;
        }
        self.mark(slot, offset, now);
        self.files[slot.0].pinned = true;
    }

    /// The clock was set back to `now`: no line arrived after that.
    pub fn clamp(&mut self, now: Timestamp) {
        for file in &mut self.files {
            file.state.clamp(now);
            (file.changed, file.unsaved_from) = (true, 0);
        }
    }

    /// Marks dropped because a file had more than [`MARKS_MAX`].
    pub fn marks_dropped(&self) -> u64 {
        self.marks_dropped
    }

    /// All lines of `span` are handled. What arrived before `since` need never be read again.
    pub fn cover(&mut self, slot: Slot, span: FileSpan, now: Timestamp, since: Timestamp) {
        let file = &mut self.files[slot.0];
        file.covered.add(span.start, span.end);
        if self.log.is_some() {
            file.state.last_arrival = now;
            return;
        }
        if span.end > file.state.decided.end() {
            file.state.last_arrival = now;
        }
        file.state.decided.add(span.start, span.end);
        let stale = file.state.marks.partition_point(|mark| mark.arrival <= since).saturating_sub(1);
        file.state.marks.drain(..stale);
        file.changed = true;
    }

    /// What has changed since the last call, for storing, and the files forgotten since.
    pub fn take_changes(&mut self) -> (Vec<FileChange>, Vec<FileKey>) {
        if self.log.is_some() {
            return Default::default();
        }
        let changed = self.files.iter_mut().filter(|file| file.changed).map(|file| {
            let unsaved = file.state.marks.partition_point(|mark| mark.offset < file.unsaved_from);
            let change = FileChange {
                key: file.key.clone(),
                decided: file.state.decided.clone(),
                last_arrival: file.state.last_arrival,
                marks_from: file.state.marks.first().map_or(0, |mark| mark.offset),
                unsaved_from: file.unsaved_from,
                marks: file.state.marks[unsaved..].to_vec(),
            };
            (file.changed, file.unsaved_from) = (false, u64::MAX);
            change
        });
        (changed.collect(), std::mem::take(&mut self.dropped))
    }

    /// Every file.
    pub fn all(&self) -> Vec<(FileKey, FileState)> {
        self.files.iter().map(|file| (file.key.clone(), file.state.clone())).collect()
    }
}

/// The first offset from which lines may have arrived after `since`.
fn rebuild_offset(state: &FileState, since: Timestamp) -> u64 {
    if state.last_arrival < since {
        return state.decided.end();
    }
    let after = state.marks.partition_point(|mark| mark.arrival < since);
    let offset = state.marks.get(after.saturating_sub(1)).map_or(0, |mark| mark.offset);
    offset.min(state.decided.end())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_secs(seconds)
    }

    fn key() -> FileKey {
        FileKey { node: "n".into(), source: "s".into(), generation: 1 }
    }

    fn span(start: u64, end: u64) -> FileSpan {
        FileSpan { generation: 1, start, end }
    }

    #[test]
    fn a_line_counts_once() {
        let mut stream = Stream::default();
        let slot = stream.open(key());
        assert_eq!(stream.admit(slot, 0, at(1)), Admission::Decide { position: Position(1), arrival: at(1) });
        stream.cover(slot, span(0, 100), at(1), at(0));
        assert_eq!(stream.admit(slot, 50, at(2)), Admission::Duplicate);
        assert_eq!(stream.admit(slot, 100, at(2)), Admission::Decide { position: Position(1), arrival: at(2) });
    }

    #[test]
    fn a_restart_reads_again_what_windows_need_and_decides_only_what_is_new() {
        let mut stream = Stream::default();
        let slot = stream.open(key());
        for (offset, now) in [(0, 100), (10, 200), (20, 300)] {
            stream.admit(slot, offset, at(now));
            if offset == 10 {
                stream.advance();
            }
            stream.cover(slot, span(offset, offset + 10), at(now), at(0));
        }
        let (files, position) = (stream.all(), stream.position());
        let mut stream = Stream::restore(position, files, at(150));
        assert_eq!(stream.read_positions("n", at(150))[&("s".to_owned(), 1)], ReadPosition { offset: 0, needed: true });
        assert_eq!(
            stream.read_positions("n", at(250))[&("s".to_owned(), 1)],
            ReadPosition { offset: 10, needed: true }
        );
        assert_eq!(
            stream.read_positions("n", at(301))[&("s".to_owned(), 1)],
            ReadPosition { offset: 30, needed: false }
        );
        let slot = stream.open(key());
        let rebuild = |position, after, before| Admission::Rebuild {
            position: Position(position),
            after: at(after),
            before: at(before),
        };
        assert_eq!(stream.admit(slot, 10, at(400)), rebuild(1, 200, 300));
        assert_eq!(stream.admit(slot, 20, at(400)), rebuild(2, 300, 300));
        assert_eq!(stream.admit(slot, 30, at(400)), Admission::Decide { position: Position(2), arrival: at(400) });
        stream.cover(slot, span(10, 40), at(400), at(0));
        assert_eq!(stream.admit(slot, 20, at(401)), Admission::Duplicate);
    }

    #[test]
    fn marks_of_lines_whose_arrival_matters_do_not_pile_up() {
        let mut stream = Stream::default();
        let slot = stream.open(key());
        for line in 0..3 * MARKS_MAX as u64 {
            // Batches of a hundred lines, each line from the future.
            let now = at((line / 100) as i64);
            stream.admit(slot, line * 10, now);
            stream.pin(slot, line * 10, now);
        }
        let marks = stream.all()[0].1.marks.len();
        assert!(marks <= 6 * MARKS_MAX / 100 + 2, "{marks}");
        for line in 0..2 * MARKS_MAX as u64 {
            stream.admit(slot, 100 * MARKS_MAX as u64 + line, at(1_000_000));
            stream.advance();
        }
        assert!(stream.all()[0].1.marks.len() <= MARKS_MAX);
        assert!(stream.marks_dropped() > 0);
    }

    proptest! {
        #[test]
        fn ranges_agree_with_a_set(adds in prop::collection::vec((0u64..60, 0u64..12), 0..30)) {
            let mut ranges = Ranges::default();
            let mut model = std::collections::BTreeSet::new();
            for (start, len) in adds {
                ranges.add(start, start + len);
                model.extend(start..start + len);
                prop_assert!(ranges.0.windows(2).all(|pair| pair[0].1 < pair[1].0));
                for offset in 0..80 {
                    prop_assert_eq!(ranges.contains(offset), model.contains(&offset));
                }
            }
        }
    }
}
