//! Following a detector that decides elsewhere: the engine of a standby, and how it takes over.
//!
//! What was decided comes from the shared state, and the events up to its floor from the log; in this order, which is
//! that of a rebuild. So windows stand as the active detector's, and nothing is decided here before [`Engine::lead`].

#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;

use proto::ban::BanChange;
use proto::event::AccessBatch;
use proto::net::Target;
use proto::time::Timestamp;

use super::clients::Clients;
use super::offender::{History, Offender};
use super::rule::{Mode, Rule};
use super::stream::{Position, Stream};
use super::{Control, Engine, EngineConfig, Snapshot, Source};

impl Engine {
    /// Follows a log that is decided up to `floor`, whose batch arrived at `arrival`. Gives no output.
    pub fn follow(config: EngineConfig, snapshot: Snapshot, floor: Position, arrival: Timestamp) -> Self {
        Self::assemble(config, snapshot, Stream::of_log(floor, arrival), arrival)
    }

    /// From now on this engine decides what stands after the floor.
    pub fn lead(&mut self, now: Timestamp) {
        self.stream.lead();
        // What has ended guards nobody any more.
        self.handle_timeout(now);
        self.lift_guarded("never_ban");
    }

    /// Everything up to `floor` is decided, by whoever decides.
    pub fn raise_floor(&mut self, floor: Position) {
        self.stream.raise_floor(floor);
    }

    /// Handles the batch with number `sequence`, which the log stamped at `stamp`. A batch that comes again is passed
    /// over, also where its lines have no offsets.
    pub fn handle_logged(&mut self, batch: &AccessBatch, sequence: u64, stamp: Timestamp) {
        if self.stream.is_past(sequence) {
            return;
        }
        self.end_due(sequence, stamp);
        let source: Source = self.open_batch(batch);
        self.covered = self.covered_by(batch.filter);
        self.stream.locate(sequence, 0, stamp);
        for (index, event) in batch.events().enumerate() {
            self.stream.locate(sequence, index, stamp);
            self.handle_event(source, &event, stamp);
        }
        if let Some(span) = batch.span {
            self.close(source, span);
        }
        self.stream.locate(sequence, usize::MAX, stamp);
        self.forget_windows();
    }

    /// What ended before a batch arrived that is decided here has ended for it, however late the timer is.
    fn end_due(&mut self, sequence: u64, stamp: Timestamp) {
        if !self.stream.decides(sequence) {
            // Bans and pauses end where it is decided, but what was counted there after an allowance counts here too.
            let arrival = self.stream.window_time(stamp).max(stamp);
            self.allows.advance(arrival, arrival.saturating_sub(self.config.horizon()));
        } else if self.poll_timeout().is_some_and(|due| due <= stamp) {
            self.handle_timeout(stamp);
        }
    }

    /// Bits of the rules of which a batch that was filtered by version `filter` lacks no event.
    fn covered_by(&self, filter: u64) -> u64 {
        // A batch that was not filtered lacks none, but it has no headers.
        let whole = |rule: &Rule| filter == 0 && rule.matcher.interest_headers().is_empty();
        let rules = self.config.rules.iter().zip(&self.covered_from).enumerate();
        let covers = |(_, (rule, from)): &(usize, (&Rule, &u64))| **from <= filter || whole(rule);
        rules.filter(covers).fold(0, |bits, (i, _)| bits | 1 << i)
    }

    /// The log has brought nothing that arrived before `now`, so windows move on.
    pub fn pass_time(&mut self, now: Timestamp) {
        self.stream.pass_time(now);
        self.forget_windows();
    }

    /// When the newest event of the log arrived.
    pub fn log_arrival(&self) -> Timestamp {
        self.stream.window_time(self.now)
    }

    /// Takes over a change of the ban set.
    pub fn follow_record(&mut self, change: BanChange) {
        self.bans.remove(&change.target());
        if let BanChange::Put(record) = change {
            for ban in record.bans {
                self.bans.put(ban);
            }
        }
    }

    /// Takes over a history, and forgets the events that its newest decisions have used up.
    pub fn follow_offender(&mut self, target: Target, offender: Option<Offender>) {
        let former = self.offenders.get(&target).cloned().unwrap_or_default();
        let Some(offender) = offender else {
            self.offenders.forget(&target);
            return;
        };
        for i in 0..self.config.rules.len() {
            let rule = &self.config.rules[i];
            let newer =
                |history: &&History| former.history(&rule.name).is_none_or(|former| former.consumed < history.consumed);
            let history = offender.history(&rule.name).filter(newer).filter(|_| rule.mode == Mode::Enforce);
            if let Some(end) = history.map(|history| history.last_end) {
                let now = self.stream.window_time(self.now);
                self.clients.consume(target, i as u16, end, now);
            }
        }
        self.offenders.update(target, |known| *known = offender);
    }

    /// Takes over what there is one of, and forgets what it says does not count.
    pub fn follow_control(&mut self, control: &Control) {
        if control.counts_after > self.counts_after {
            self.clients = Clients::default();
        }
        let (known, arrival) = (self.allows.allowed().clone(), self.stream.window_time(self.now));
        // Also one that is given anew counts, but none that has ended: it is forgotten here earlier than there.
        let news = |(target, until): &(&Target, &Option<Timestamp>)| {
            until.is_none_or(|until| arrival < until) && known.get(target) != Some(until)
        };
        for (target, _) in control.allowed.iter().filter(news) {
            self.clients.forget_within(target);
        }
        self.allows.follow(control.allowed.clone(), control.resolved.clone());
        (self.paused, self.counts_from, self.counts_after) =
            (control.paused, control.counts_from, control.counts_after);
    }
}
