//! What waits to be sent and what is under way, as a state machine: batches, answers and the time in, payloads out.
//!
//! - While nothing is under way a batch is sent at once. What comes meanwhile is joined to what waits of the same file, and
//!   is sent with the next acknowledgement, after [`JOIN_WAIT`], or when it is large.
//! - A batch without events only moves a position, so it waits for company longer.
//! - Payloads of one file are first sent in the order of the file. After a failure nothing new begins until all that was
//!   under way is delivered, so that little comes out of order and a bus that is away is asked for little.
//! - Nothing is dropped, whatever the answers: the queue fills, and sources stop reading.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use proto::bus::publish::PublishError;
use proto::event::{AccessBatch, FileSpan, Receipt};
use proto::time::Timestamp;
use proto::wire::encode_batch;

use crate::source::checkpoint::Progress;

/// Payloads that are not acknowledged: enough for some thousand batches a second over a slow line.
pub(crate) const IN_FLIGHT_MAX: usize = 32;
/// Bytes of these payloads.
pub(crate) const IN_FLIGHT_BYTES_MAX: usize = 8 << 20;
/// Bytes of text up to which batches are joined: larger payloads cost latency and save nothing more.
const JOINED_TEXT_BYTES_MAX: usize = 256 << 10;
/// How long a batch waits for others while something is under way.
const JOIN_WAIT: Duration = Duration::from_millis(3);
/// The same for a batch without events, when nobody waits for it.
const QUIET_WAIT: Duration = Duration::from_secs(1);
/// Batches that wait, and bytes of memory that they take, beyond which no more are taken.
const WAITING_MAX: usize = 64;
const WAITING_BYTES_MAX: usize = 4 << 20;
/// Pause before the second try, doubled with each further one.
const BACKOFF_MIN: Duration = Duration::from_millis(50);
/// Longest pause.
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// Bytes to which the texts of an event are cut at first when it alone is too large for a payload.
const FIELD_BYTES_MAX: usize = 64 << 10;

/// A payload to be sent now.
#[derive(Clone, Debug)]
pub(crate) struct Sending {
    /// Its name inside of this outbox, for the answer.
    pub(crate) number: u64,
    /// Its name on the bus, the same on every try.
    pub(crate) id: String,
    pub(crate) payload: Vec<u8>,
}

/// A payload that is kept for good.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Delivered {
    pub(crate) events: u64,
    pub(crate) bytes: u64,
}

/// Since when payloads do not get through, and why the newest one did not.
#[derive(Clone, Debug)]
pub(crate) struct Trouble {
    pub(crate) since: Timestamp,
    pub(crate) error: PublishError,
}

/// All that is not delivered yet.
#[derive(Debug)]
pub(crate) struct Outbox {
    payload_bytes_max: usize,
    /// What all ids begin with.
    run: String,
    numbers: u64,
    progress: Progress,
    waiting: VecDeque<AccessBatch>,
    /// When what waits is sent at the latest; `None` when nothing does.
    due: Option<Timestamp>,
    /// Whether nothing more comes, so that nothing is worth waiting for.
    closed: bool,
    /// Parts of the batch that was taken last, which have not begun.
    packed: VecDeque<Parcel>,
    under_way: BTreeMap<u64, Parcel>,
    under_way_bytes: usize,
    trouble: Option<Trouble>,
    cut_events: u64,
}

#[derive(Debug)]
struct Parcel {
    payload: Vec<u8>,
    events: u64,
    /// Where it comes from, for positions.
    origin: Option<Origin>,
    /// Who waits for it.
    receipts: Vec<Receipt>,
    tries: u32,
    /// When to try again; `None` while a try is under way.
    again_at: Option<Timestamp>,
}

#[derive(Clone, Debug)]
struct Origin {
    source: Arc<str>,
    generation: u64,
    /// See [`Progress::handle_sent`].
    end: Option<u64>,
}

impl Outbox {
    /// Nothing waits. All ids begin with `run`, which no other run has and nobody can guess: whoever knew an id could have
    /// the bus take ours for a repetition of theirs.
    pub(crate) fn new(run: &str, payload_bytes_max: usize, progress: Progress) -> Self {
        Self {
            payload_bytes_max,
            run: run.to_owned(),
            numbers: 0,
            progress,
            waiting: VecDeque::new(),
            due: None,
            closed: false,
            packed: VecDeque::new(),
            under_way: BTreeMap::new(),
            under_way_bytes: 0,
            trouble: None,
            cut_events: 0,
        }
    }

    /// Whether another batch may be taken.
    pub(crate) fn has_room(&self) -> bool {
        let bytes: usize = self.waiting.iter().map(AccessBatch::memory_bytes).sum();
        self.waiting.len() < WAITING_MAX && bytes < WAITING_BYTES_MAX
    }

    /// Takes a batch. Batches of one file come in the order of the file.
    pub(crate) fn push(&mut self, mut batch: AccessBatch, now: Timestamp) {
        if let Some(span) = batch.span {
            self.progress.handle_begun(&batch.source, span);
        }
        let is_idle = self.under_way.is_empty() && self.packed.is_empty();
        let wait = if batch.is_empty() && batch.receipts.is_empty() {
            QUIET_WAIT
        } else if is_idle {
            Duration::ZERO
        } else {
            JOIN_WAIT
        };
        let mut due = now.saturating_add(wait);
        match self.waiting.iter_mut().rfind(|waiting| lane(waiting) == lane(&batch)) {
            Some(before) => {
                if !before.append(&mut batch, JOINED_TEXT_BYTES_MAX) {
                    // Nothing more can be joined to the one before.
                    due = now;
                    self.waiting.push_back(batch);
                }
            }
            None => self.waiting.push_back(batch),
        }
        self.hurry(due);
    }

    /// Nothing more comes.
    pub(crate) fn close(&mut self) {
        self.closed = true;
    }

    /// Whether all that was taken is delivered.
    pub(crate) fn is_empty(&self) -> bool {
        self.undelivered() == 0
    }

    /// Batches and payloads that are not known to be delivered.
    pub(crate) fn undelivered(&self) -> usize {
        self.waiting.len() + self.packed.len() + self.under_way.len()
    }

    /// Payloads that are not acknowledged.
    pub(crate) fn in_flight(&self) -> usize {
        self.under_way.len()
    }

    /// What is wrong with the bus, if payloads do not get through.
    pub(crate) fn trouble(&self) -> Option<&Trouble> {
        self.trouble.as_ref()
    }

    /// What is delivered.
    pub(crate) fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Events whose texts were cut since the last call, because they were too large for a payload.
    pub(crate) fn take_cut_events(&mut self) -> u64 {
        std::mem::take(&mut self.cut_events)
    }

    /// The next payload to send, until `None`.
    pub(crate) fn poll_sending(&mut self, now: Timestamp) -> Option<Sending> {
        let again = self.under_way.iter_mut().find(|(_, parcel)| parcel.again_at.is_some_and(|at| is_due(at, now)));
        if let Some((number, parcel)) = again {
            parcel.again_at = None;
            return Some(parcel.sending(&self.run, *number));
        }
        if !self.may_begin() {
            return None;
        }
        if self.packed.is_empty() && (self.closed || self.due.is_some_and(|due| is_due(due, now))) {
            self.pack_next();
        }
        let fits = |parcel: &Parcel| self.under_way_bytes + parcel.payload.len() <= IN_FLIGHT_BYTES_MAX;
        let parcel = self.packed.pop_front_if(|parcel| self.under_way.is_empty() || fits(parcel))?;
        self.numbers += 1;
        let number = self.numbers;
        if let Some(Origin { source, generation, end }) = &parcel.origin {
            self.progress.handle_sent(number, source, *generation, *end);
        }
        let sending = parcel.sending(&self.run, number);
        self.under_way_bytes += parcel.payload.len();
        self.under_way.insert(number, parcel);
        Some(sending)
    }

    /// How long nothing happens by itself; `None` = for ever.
    pub(crate) fn poll_timeout(&self, now: Timestamp) -> Option<Duration> {
        let again = self.under_way.values().filter_map(|parcel| parcel.again_at).min();
        let begins = self.due.filter(|_| self.may_begin() && self.packed.is_empty());
        again.into_iter().chain(begins).map(|at| at.since(now)).min()
    }

    /// Takes the answer to a [`Sending`].
    pub(crate) fn handle_answer(
        &mut self,
        number: u64,
        answer: Result<(), PublishError>,
        now: Timestamp,
    ) -> Option<Delivered> {
        match answer {
            Ok(()) => self.handle_delivered(number, now),
            Err(error) => {
                let parcel = self.under_way.get_mut(&number)?;
                let pause = BACKOFF_MIN.saturating_mul(1 << parcel.tries.min(16)).min(BACKOFF_MAX);
                parcel.tries += 1;
                parcel.again_at = Some(now.saturating_add(pause));
                let since = self.trouble.as_ref().map_or(now, |trouble| trouble.since);
                self.trouble = Some(Trouble { since, error });
                None
            }
        }
    }

    fn handle_delivered(&mut self, number: u64, now: Timestamp) -> Option<Delivered> {
        let parcel = self.under_way.remove(&number)?;
        self.under_way_bytes -= parcel.payload.len();
        parcel.receipts.into_iter().for_each(Receipt::deliver);
        if let Some(Origin { source, generation, .. }) = &parcel.origin {
            self.progress.handle_acknowledged(number, source, *generation);
        }
        // Where one got through the others may. Nothing new begins meanwhile, so this cannot go round and round.
        self.under_way.values_mut().filter_map(|parcel| parcel.again_at.as_mut()).for_each(|at| *at = now);
        if self.under_way.values().all(|parcel| parcel.tries == 0) {
            self.trouble = None;
        }
        if self.waiting.iter().any(|batch| !batch.is_empty()) {
            self.hurry(now);
        }
        Some(Delivered { events: parcel.events, bytes: parcel.payload.len() as u64 })
    }

    fn hurry(&mut self, due: Timestamp) {
        self.due = Some(self.due.map_or(due, |known| known.min(due)));
    }

    fn may_begin(&self) -> bool {
        self.trouble.is_none() && self.under_way.len() < IN_FLIGHT_MAX
    }

    fn pack_next(&mut self) {
        let Some(mut batch) = self.waiting.pop_front() else { return };
        if self.waiting.is_empty() {
            self.due = None;
        }
        self.pack(&batch);
        self.packed.iter_mut().for_each(|parcel| parcel.receipts.clone_from(&batch.receipts));
        // Each part has its own share now.
        batch.deliver();
        if let (Some(span), Some(last)) = (batch.span, self.packed.back_mut())
            && let Some(origin) = &mut last.origin
        {
            origin.end = Some(span.end);
        }
    }

    /// Appends the payloads of a batch: one, or several when that would be too large.
    fn pack(&mut self, batch: &AccessBatch) {
        let whole = self.payload_of(batch);
        if whole.is_none()
            && let Some((first, second)) = batch.halve()
        {
            self.pack(&first);
            return self.pack(&second);
        }
        let payload = whole.unwrap_or_else(|| {
            self.cut_events += batch.len() as u64;
            self.cut_to_fit(batch)
        });
        let origin = |span: FileSpan| Origin { source: batch.source.clone(), generation: span.generation, end: None };
        let (events, origin) = (batch.len() as u64, batch.span.map(origin));
        self.packed.push_back(Parcel { payload, events, origin, receipts: Vec::new(), tries: 0, again_at: None });
    }

    fn payload_of(&self, batch: &AccessBatch) -> Option<Vec<u8>> {
        let payload = batch.is_within_limits().then(|| encode_batch(batch))?;
        (payload.len() <= self.payload_bytes_max).then_some(payload)
    }

    /// Texts are cut shorter and shorter. Without any the rest is some hundred bytes.
    fn cut_to_fit(&self, batch: &AccessBatch) -> Vec<u8> {
        let lengths = std::iter::successors(Some(FIELD_BYTES_MAX), |length| (*length > 0).then_some(length / 2));
        let mut cut = lengths.map(|length| batch.cut_fields(length));
        cut.find_map(|cut| self.payload_of(&cut)).unwrap_or_else(|| encode_batch(&batch.cut_fields(0)))
    }
}

impl Parcel {
    fn sending(&self, run: &str, number: u64) -> Sending {
        Sending { number, id: format!("{run}-{number}"), payload: self.payload.clone() }
    }
}

/// What is sent in order: one generation of a file, or a source without offsets as far as it reads one node's lines.
fn lane(batch: &AccessBatch) -> (&str, Option<u64>, Option<&str>) {
    (&batch.source, batch.span.map(|span| span.generation), batch.origin.as_deref())
}

/// Whether the moment has come. No pause is longer than [`BACKOFF_MAX`]: when more is left the clock was set back.
fn is_due(at: Timestamp, now: Timestamp) -> bool {
    let left = at.since(now);
    left.is_zero() || left > BACKOFF_MAX
}

#[cfg(test)]
mod tests;
