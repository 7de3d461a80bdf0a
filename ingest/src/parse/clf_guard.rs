//! Which lines of the common log format may be forged. Pure.
//!
//! A client can put line feeds into the user name of Basic Auth, which Traefik writes as they are. So one request can write
//! any lines that it likes: first the client's own host and whatever follows, at last whatever precedes the genuine end of
//! its entry, `[time] ... RequestCount ...`. What a forger cannot know is `RequestCount`, which grows by one with each
//! request of a Traefik. It is given out when the request's time is, so counts and times rise together, however late and out
//! of order the lines are written. A line is a suspect
//!
//! - when its count was there before (among the last [`WINDOW`]), or is not between those of the ten seconds around its own;
//! - when its count is ahead of all by more than [`JUMP_BASE`], what a usual minute brings, and [`JUMP_FACTOR`] times that
//!   for each minute without a line;
//! - when its format is another than its lane's: a forger may write JSON too;
//! - after a suspect, a line too long to be read, or one that begins with a host and does not parse, up to the first line
//!   whose count fits, which is a suspect as well: it is the end of the forger's own entry, behind a host of his choice.
//!
//! **Suspects are not handed to detection**, or forged lines would aim bans. That opens no way to evade that the format
//! does not have anyway: who breaks his line in two by a line feed is not seen in either piece, whatever is done here.
//! Nobody can make suspects of the lines of others for long: see below. The price is paid by honest lines that look alike:
//!
//! - A restart of Traefik, or a change of its format, has lines wait until the new ones have been the only ones for
//!   [`RIVAL_TIME`] or, in a backlog, [`RIVAL_BYTES`]. Both exceed what one request can write, and each forging request ends
//!   with a count of the old ones, which makes suspects of those that waited. After a restart also a count that fits the
//!   old ones, because it had been left out, waits if it fits the new ones, which must then begin at one and have few gaps.
//! - Where several instances write into one file, or come through one connection, all but one are suspects: let syslog show
//!   each under its own node, or write JSON. Sources that mix writers by their nature are not guarded at all.
//! - A request that began before all that is known (at most [`SLOTS_MAX`] times ten seconds with lines) is not handed on either,
//!   nor is the line after it, but neither is reported: forged or not, nothing can be said of them.
//!
//! A forger who knows no more than that a Traefik has served up to `n` requests hits a count that fits with a chance of
//! about `(JUMP_BASE + counts of two usual minutes) / n`. So there is little protection while `n` is small, after a start
//! of Traefik, and none before the first line that was read. One that fits far ahead does not make suspects of the true
//! ones: the first of them takes it back. The generic format has no counts and cannot be guarded.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use proto::net::{parse_addr, parse_peer};
use proto::time::Timestamp;

/// Newest counts of which it is known whether they were there: more than are under way at a time.
const WINDOW: u64 = 1 << 13;
/// Slots of time of which the counts are known: those of two hours with lines.
const SLOTS_MAX: usize = 768;
/// How long one is. A Traefik that has run for two of them is told from its successor by the first line of that.
const SLOT_MS: i64 = 10_000;
const SLOTS_A_MINUTE: u64 = 6;
/// Counts are given out a moment after the time is taken, and clocks are set: slots beside each other may overlap.
const SLOTS_OVERLAP: i64 = 1;
/// Counts that may be missing at any time: of requests under way, and of those that Traefik does not log.
const JUMP_BASE: u64 = 1000;
/// How much busier than a usual minute one may be of which nothing was logged.
const JUMP_FACTOR: u64 = 8;
/// Slots of silence in which counts may have grown unseen: an hour.
const JUMP_SLOTS_MAX: i64 = 360;
/// How long the lines of a new writer must be the only ones. All of one request are written at once.
const RIVAL_TIME: Duration = Duration::from_secs(2);
/// As much of them serves as well: more than a request may have headers (1 MiB, Go's limit).
const RIVAL_BYTES: u64 = 1 << 20;
/// Bytes in which all lines of one source may wait.
const WAITING_BYTES_MAX: usize = 16 << 20;
/// Counts for each line of a restarted Traefik, beyond [`JUMP_BASE`]: the others are under way or not logged.
const RESTART_GAP_MAX: u64 = 4;
/// Lines after which a new writer that has fallen silent is forgotten for another.
const RIVAL_SILENCE_LINES: u32 = 16;

/// Why a line may be forged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suspicion {
    /// Its request count does not fit those around it.
    Count,
    /// Another format than that of the lines before it.
    OtherFormat,
    /// It may be the end of a broken line.
    AfterBroken,
    /// Nothing is known of the time when its request began. Not worth a report.
    TooOld,
}

impl Suspicion {
    /// A short text for people.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Count => "its request count does not fit",
            Self::OtherFormat => "another format than before",
            Self::AfterBroken => "it follows a broken line",
            Self::TooOld => "began before what is known",
        }
    }
}

/// What a line says of its writer.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Mark {
    Json,
    Generic,
    /// The common format, with its count and time.
    Counted(u64, Timestamp),
}

/// What becomes of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is handed on.
    Fits,
    /// It is not.
    Suspect(Suspicion),
    /// It waits, as a suspect, for what its writer turns out to be.
    Held(Suspicion),
    /// It is handed on, and before it all that has [waited](Guard::take_released).
    Believed,
}

/// Room in which lines of one source wait; clones are the same room.
#[derive(Clone, Debug, Default)]
pub struct WaitingRoom(Arc<AtomicUsize>);

impl WaitingRoom {
    /// Takes so many bytes, if there are as many.
    fn take(&self, bytes: usize) -> bool {
        let grown = |taken: usize| taken.checked_add(bytes).filter(|taken| *taken <= WAITING_BYTES_MAX);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, grown).is_ok()
    }

    fn give_back(&self, bytes: usize) {
        self.0.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// Lines that wait, in their order.
#[derive(Debug, Default)]
pub(crate) struct Held {
    room: WaitingRoom,
    bytes: Vec<u8>,
    /// Where each ends, and whether it is worth a report.
    lines: Vec<(usize, bool)>,
}

impl Held {
    fn new(room: &WaitingRoom) -> Self {
        Self { room: room.clone(), bytes: Vec::new(), lines: Vec::new() }
    }

    /// Whether there was room for the line.
    fn push(&mut self, line: &[u8], suspicion: Suspicion) -> bool {
        let has_room = self.room.take(line.len());
        if has_room {
            self.bytes.extend_from_slice(line);
            self.lines.push((self.bytes.len(), suspicion != Suspicion::TooOld));
        }
        has_room
    }

    /// How many are worth a report.
    fn reported(&self) -> u64 {
        self.lines.iter().filter(|(_, is_reported)| *is_reported).count() as u64
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &[u8]> {
        let starts = std::iter::once(0).chain(self.lines.iter().map(|(end, _)| *end));
        starts.zip(&self.lines).map(|(start, (end, _))| &self.bytes[start..*end])
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.room.give_back(self.bytes.len());
    }
}

/// Watches the lines of one file or sender.
#[derive(Debug, Default)]
pub(crate) struct Guard {
    writer: Option<Writer>,
    /// As it was before the newest count that was far ahead, until more lines say that it was right.
    before_leap: Option<Box<Sequence>>,
    rival: Option<Rival>,
    /// What the next line that fits is a suspect for.
    taint: Option<Suspicion>,
    /// Whether the next line follows the beginning of a broken one.
    is_after_broken: bool,
    released: Held,
    /// Lines that have waited in vain, since the last call that asked.
    condemned: u64,
    room: WaitingRoom,
}

impl Guard {
    /// Lines wait in `room` from now on.
    pub(crate) fn set_room(&mut self, room: WaitingRoom) {
        self.room = room;
    }

    /// Judges an access that came at `now`.
    pub(crate) fn judge(&mut self, mark: Mark, line: &[u8], now: Timestamp) -> Verdict {
        let slot_now = slot_of(now);
        match self.try_writers(mark, slot_now) {
            Ok(()) if self.rival.as_mut().is_some_and(|rival| rival.shares(mark, slot_now)) => {
                self.hold(line, Suspicion::AfterBroken, now)
            }
            Ok(()) => {
                self.is_after_broken = false;
                self.forget_rival();
                self.taint.take().map_or(Verdict::Fits, Verdict::Suspect)
            }
            Err(suspicion) => {
                if suspicion == Suspicion::TooOld {
                    self.taint.get_or_insert(suspicion);
                } else {
                    self.taint = Some(Suspicion::AfterBroken);
                }
                self.note_rival(mark, (line, suspicion), now)
            }
        }
    }

    /// Whether the line is of the writer, as it is or as it was before a leap.
    fn try_writers(&mut self, mark: Mark, slot_now: i64) -> Result<(), Suspicion> {
        let Some(writer) = &mut self.writer else {
            self.writer = Some(Writer::new(mark));
            return Ok(());
        };
        let taken = writer.take(mark, slot_now, &mut self.before_leap);
        if taken.is_err()
            && let (Some(before), Mark::Counted(count, time)) = (&mut self.before_leap, mark)
            && before.take(count, slot_of(time), slot_now).is_ok()
        {
            self.writer = self.before_leap.take().map(Writer::Counted);
            return Ok(());
        }
        taken
    }

    fn note_rival(&mut self, mark: Mark, (line, suspicion): (&[u8], Suspicion), now: Timestamp) -> Verdict {
        if let Some(rival) = &mut self.rival {
            if rival.writer.take(mark, slot_of(now), &mut None).is_ok() {
                rival.silent_lines = 0;
                return self.hold(line, suspicion, now);
            }
            rival.silent_lines += 1;
            // Old lines that happen to come together are no new writer.
            if rival.silent_lines < RIVAL_SILENCE_LINES && rival.held.reported() > 0 {
                return Verdict::Suspect(suspicion);
            }
        }
        self.forget_rival();
        self.rival =
            Some(Rival { writer: Writer::new(mark), since: now, silent_lines: 0, held: Held::new(&self.room) });
        self.hold(line, suspicion, now)
    }

    /// Has a line of the rival wait, unless it is the one that makes it the writer. What may be the end of a broken line is
    /// neither.
    fn hold(&mut self, line: &[u8], suspicion: Suspicion, now: Timestamp) -> Verdict {
        let is_after_broken = std::mem::take(&mut self.is_after_broken);
        let Some(rival) = self.rival.as_mut().filter(|_| !is_after_broken) else {
            return Verdict::Suspect(suspicion);
        };
        let bytes = (rival.held.bytes.len() + line.len()) as u64;
        if now.since(rival.since) < RIVAL_TIME && bytes < RIVAL_BYTES {
            let has_room = rival.held.push(line, suspicion);
            return if has_room { Verdict::Held(suspicion) } else { Verdict::Suspect(suspicion) };
        }
        if let Some(Rival { writer, held, .. }) = self.rival.take() {
            (self.writer, self.released) = (Some(writer), held);
        }
        (self.before_leap, self.taint) = (None, None);
        Verdict::Believed
    }

    fn forget_rival(&mut self) {
        if let Some(rival) = self.rival.take() {
            self.condemned += rival.held.reported();
        }
    }

    /// The lines that have waited and are to be handed on.
    pub(crate) fn take_released(&mut self) -> Held {
        std::mem::take(&mut self.released)
    }

    /// Nothing more will come that lines could wait for.
    pub(crate) fn give_up(&mut self) {
        self.forget_rival();
    }

    /// How many lines have waited in vain, and were not counted yet.
    pub(crate) fn take_condemned(&mut self) -> u64 {
        std::mem::take(&mut self.condemned)
    }

    /// Goes on where `other` is, whose lines go on here. That one keeps what it knows, and nothing waits there any more.
    pub(crate) fn take_over(&mut self, other: &mut Self) {
        let (writer, before_leap) = (other.writer.clone(), other.before_leap.clone());
        let kept = Self { writer, before_leap, room: other.room.clone(), ..Self::default() };
        *self = std::mem::replace(other, kept);
    }

    /// A line that is no access, or no whole one: if it may be the beginning of a broken one, the next ones are not trusted.
    pub(crate) fn note_unparsed(&mut self, line: &[u8]) {
        if self.is_forgeable() && begins_with_host(line) {
            self.note_broken();
        }
    }

    /// A line that was too long to be read.
    pub(crate) fn note_oversized(&mut self) {
        if self.is_forgeable() {
            self.note_broken();
        }
    }

    fn note_broken(&mut self) {
        self.taint = Some(Suspicion::AfterBroken);
        self.is_after_broken = true;
    }

    /// Traefik escapes what clients send in JSON, so there a broken line is just that.
    fn is_forgeable(&self) -> bool {
        !matches!(self.writer, Some(Writer::Json))
    }
}

/// Whether a line begins as Traefik's do in the common log format: a host, or a chain that ends with one, and ` - `.
fn begins_with_host(line: &[u8]) -> bool {
    let line = String::from_utf8_lossy(line);
    let line = line.trim_end();
    line.match_indices(" -").any(|(at, _)| {
        let host = line[..at].rsplit([',', ' ']).next().unwrap_or_default();
        matches!(line.as_bytes().get(at + 2), None | Some(b' '))
            && parse_addr(host).or_else(|| parse_peer(host)).is_some()
    })
}

#[derive(Clone, Debug)]
enum Writer {
    Json,
    Generic,
    Counted(Box<Sequence>),
}

#[derive(Debug)]
struct Rival {
    writer: Writer,
    /// When its first line came.
    since: Timestamp,
    /// Suspects of others since its newest line.
    silent_lines: u32,
    /// All of its lines.
    held: Held,
}

impl Rival {
    /// Takes over a line that also fits the writer, if this is what a restarted Traefik writes. So much about its counts is
    /// asked for because whoever forges could otherwise cover those of the writer, with which each of his requests ends.
    fn shares(&mut self, mark: Mark, slot_now: i64) -> bool {
        let Writer::Counted(sequence) = &self.writer else { return false };
        let least = sequence.slots.iter().map(|known| known.least).min().unwrap_or(u64::MAX);
        let gaps_max = JUMP_BASE + RESTART_GAP_MAX * self.held.lines.len() as u64;
        least <= JUMP_BASE && sequence.newest - least <= gaps_max && self.writer.take(mark, slot_now, &mut None).is_ok()
    }
}

impl Writer {
    fn new(mark: Mark) -> Self {
        match mark {
            Mark::Json => Self::Json,
            Mark::Generic => Self::Generic,
            Mark::Counted(count, time) => Self::Counted(Box::new(Sequence::new(count, slot_of(time)))),
        }
    }

    /// Takes a line over, if it is of this writer. Leaves what was before a leap in `before_leap`.
    fn take(&mut self, mark: Mark, slot_now: i64, before_leap: &mut Option<Box<Sequence>>) -> Result<(), Suspicion> {
        match (self, mark) {
            (Self::Json, Mark::Json) | (Self::Generic, Mark::Generic) => Ok(()),
            (Self::Counted(sequence), Mark::Counted(count, time)) => {
                if count > sequence.newest.saturating_add(JUMP_BASE) {
                    sequence.check(count, slot_of(time), slot_now)?;
                    *before_leap = Some(sequence.clone());
                }
                sequence.take(count, slot_of(time), slot_now)
            }
            _ => Err(Suspicion::OtherFormat),
        }
    }
}

fn slot_of(time: Timestamp) -> i64 {
    time.as_millis().div_euclid(SLOT_MS)
}

/// Counts of requests that began in one slot of time.
#[derive(Clone, Copy, Debug)]
struct Slot {
    slot: i64,
    least: u64,
    most: u64,
}

/// The counts of one instance.
#[derive(Clone, Debug)]
struct Sequence {
    newest: u64,
    /// Which of the last [`WINDOW`] counts were there: bit `count % WINDOW`.
    seen: [u64; (WINDOW / 64) as usize],
    /// By time. Never empty.
    slots: VecDeque<Slot>,
    /// Counts that a minute brings: the median.
    usual: u64,
}

impl Sequence {
    fn new(count: u64, slot: i64) -> Self {
        let seen = [0; (WINDOW / 64) as usize];
        let slots = VecDeque::from([Slot { slot, least: count, most: count }]);
        let mut sequence = Self { newest: count, seen, slots, usual: 0 };
        sequence.mark(count);
        sequence
    }

    fn take(&mut self, count: u64, slot: i64, slot_now: i64) -> Result<(), Suspicion> {
        self.check(count, slot, slot_now)?;
        if count > self.newest {
            let skipped = (count - self.newest - 1).min(WINDOW);
            for gone in count - skipped..count {
                self.seen[(gone % WINDOW / 64) as usize] &= !(1 << (gone % 64));
            }
            self.newest = count;
            self.mark(count);
        } else if self.newest - count < WINDOW {
            self.mark(count);
        }
        self.note(count, slot);
        Ok(())
    }

    fn mark(&mut self, count: u64) {
        self.seen[(count % WINDOW / 64) as usize] |= 1 << (count % 64);
    }

    fn check(&self, count: u64, slot: i64, slot_now: i64) -> Result<(), Suspicion> {
        let before = self.slots.partition_point(|known| known.slot < slot - SLOTS_OVERLAP);
        let after = self.slots.partition_point(|known| known.slot <= slot + SLOTS_OVERLAP);
        let newest_slot = self.slots.back().map_or(slot, |known| known.slot);
        let is_seen = count <= self.newest
            && self.newest - count < WINDOW
            && self.seen[(count % WINDOW / 64) as usize] & (1 << (count % 64)) != 0;
        let is_before = before.checked_sub(1).is_some_and(|at| count <= self.slots[at].most);
        let is_after = self.slots.get(after).is_some_and(|known| count >= known.least);
        // What a line says of its time must not widen the bounds.
        let silent_slots = (slot.min(slot_now) - newest_slot).clamp(0, JUMP_SLOTS_MAX) as u64;
        let jump_max =
            self.usual.saturating_mul(JUMP_FACTOR * (silent_slots / SLOTS_A_MINUTE) + 1).saturating_add(JUMP_BASE);
        if is_seen || is_before || is_after || count > self.newest.saturating_add(jump_max) {
            return Err(Suspicion::Count);
        }
        let is_below = self.slots.front().is_some_and(|oldest| count.saturating_add(jump_max) < oldest.least);
        let is_oldest = self.slots.front().is_some_and(|oldest| slot <= oldest.slot);
        match before == 0 && (after == 0 || is_below) {
            true if is_oldest => Err(Suspicion::TooOld),
            true => Err(Suspicion::Count),
            false => Ok(()),
        }
    }

    fn note(&mut self, count: u64, slot: i64) {
        let at = self.slots.partition_point(|known| known.slot < slot);
        match self.slots.get_mut(at).filter(|known| known.slot == slot) {
            Some(known) => {
                known.least = known.least.min(count);
                known.most = known.most.max(count);
            }
            None => {
                self.slots.insert(at, Slot { slot, least: count, most: count });
                if self.slots.len() > SLOTS_MAX {
                    self.slots.pop_front();
                }
                self.usual = self.median();
            }
        }
    }

    fn median(&self) -> u64 {
        let pairs = self.slots.iter().zip(self.slots.iter().skip(1));
        let mut rates: Vec<u64> = pairs
            .map(|(this, next)| {
                next.least.saturating_sub(this.least) * SLOTS_A_MINUTE / (next.slot - this.slot).max(1) as u64
            })
            .collect();
        let middle = rates.len() / 2;
        if rates.is_empty() { 0 } else { *rates.select_nth_unstable(middle).1 }
    }
}

#[cfg(test)]
mod tests;
