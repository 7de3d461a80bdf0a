//! The way of lines without offsets into the pipeline: of connections, datagrams, requests and pipes.
//!
//! Each sender has an [`Inlet`] of its own, so that pieces of lines never mix. An inlet waits for room ([`Inlet::send`]),
//! which stops the reading of its sender; or it does without ([`Inlet::try_send`]), and what found no room is counted as
//! dropped. Who must know when lines are safe hands in a [`Receipt`].

use std::net::IpAddr;
use std::sync::Arc;

use proto::client_ip::ClientIpPolicy;
use proto::event::{AccessBatch, Interest, Receipt};
use proto::report::Problem;
use proto::subject::{OPERATOR, SYSTEM};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::watch;

use super::batch::Stopped;
use super::lane::{Lane, Rules};
use crate::metrics::SourceMetrics;
use crate::parse::{Format, Parser};
use crate::pipeline::Shared;

/// What the senders of one source share. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Intake {
    pub(crate) shared: Arc<Shared>,
    pub(crate) batches: mpsc::Sender<AccessBatch>,
    pub(crate) metrics: SourceMetrics,
    pub(crate) interest: watch::Receiver<Arc<Interest>>,
    pub(crate) client_ip: watch::Receiver<Arc<ClientIpPolicy>>,
    pub(crate) format: Format,
    pub(crate) line_bytes_max: usize,
}

impl Intake {
    /// The node that lines are shown under of which a sender says this name: another than this one, and none whose name
    /// is reserved.
    pub(crate) fn origin(&self, name: String) -> Option<Arc<str>> {
        (*name != *self.shared.node && name != OPERATOR && name != SYSTEM).then(|| name.into())
    }

    /// For one sender, whose lines are shown under `origin` where that [is another node](Self::origin).
    pub(crate) fn open(&self, origin: Option<Arc<str>>) -> Inlet {
        let mut parser = Parser::new(self.format, self.line_bytes_max, Arc::default(), Arc::default());
        parser.set_room(self.shared.waiting.clone());
        Inlet { intake: self.clone(), lane: Lane::new(parser), rules: Arc::default(), is_new: true, origin }
    }

    /// For lines of any number of writers, whose request counts do not follow each other: forged lines of the common log
    /// format cannot be told from others.
    pub(crate) fn open_mixed(&self, origin: Option<Arc<str>>) -> Inlet {
        let mut inlet = self.open(origin);
        inlet.lane.is_mixed = true;
        inlet
    }

    /// Counts lines that were turned away because their sender exceeds a limit.
    pub(crate) fn note_limited(&self, lines: u64) {
        self.metrics.limited.inc_by(lines);
        self.shared.status().report.limited += lines;
    }

    /// Counts lines that found no room.
    pub(crate) fn note_dropped(&self, lines: u64) {
        self.metrics.dropped.inc_by(lines);
        self.shared.status().report.dropped += lines;
    }

    /// Counts a connection, datagram or request of somebody who may not send.
    pub(crate) fn note_refused(&self) {
        self.metrics.refused.inc();
        self.shared.status().report.refused += 1;
    }

    /// Says how many connections are open.
    pub(crate) fn set_connections(&self, open: usize) {
        self.metrics.connections.set(open as i64);
        self.shared.status().report.connections = open as u64;
    }

    /// Replaces the problems of the source and logs those that are new.
    pub(crate) fn set_problems(&self, problems: Vec<Problem>) {
        self.shared.set_problems(problems);
    }
}

/// Lines of one sender.
pub(crate) struct Inlet {
    intake: Intake,
    lane: Lane,
    rules: Arc<Rules>,
    is_new: bool,
    origin: Option<Arc<str>>,
}

impl Inlet {
    /// Takes a line without its line end, as it arrives now; `None` when it was too long to be kept. `bytes` is what it took
    /// on its way, for figures.
    pub(crate) fn push(&mut self, line: Option<&[u8]>, bytes: usize) {
        self.update_rules();
        let now = self.intake.shared.clock.now();
        let at = (&*self.intake.shared, &self.rules, now);
        let outcome = line.map(|line| self.lane.read((line, 0), at));
        self.lane.count((line.unwrap_or_default(), bytes as u64), outcome, at);
    }

    /// Batches begin under the rules in force.
    fn update_rules(&mut self) {
        let Intake { interest, client_ip, .. } = &mut self.intake;
        let changed = |changed: Result<bool, _>| changed.unwrap_or(false);
        if self.is_new || changed(interest.has_changed()) || changed(client_ip.has_changed()) {
            self.is_new = false;
            let (policy, interest) = (client_ip.borrow_and_update().clone(), interest.borrow_and_update().clone());
            self.rules = Arc::new(Rules { policy, interest });
        }
    }

    /// The node that its lines are shown under, where that is not this one.
    pub(crate) fn origin(&self) -> Option<&Arc<str>> {
        self.origin.as_ref()
    }

    /// Whether it is time to send.
    pub(crate) fn is_full(&self) -> bool {
        self.lane.is_full()
    }

    /// Whether the end of a line in pieces is awaited.
    pub(crate) fn is_joining(&self) -> bool {
        self.lane.parser.is_joining()
    }

    /// Gives up on lines in pieces, whose end will not come.
    pub(crate) fn abandon(&mut self) {
        let abandoned = self.lane.parser.abandon();
        if let Some(batch) = &mut self.lane.batch {
            batch.counts.unparsed += abandoned;
        }
    }

    fn take(&mut self, receipt: Option<&Receipt>) -> Option<AccessBatch> {
        let mut batch = self.lane.take(0, (&self.intake.shared, &self.intake.metrics))?;
        batch.origin.clone_from(&self.origin);
        batch.receipts.extend(receipt.cloned());
        Some(batch)
    }

    /// Sends what was pushed, and waits for room as long as it takes.
    ///
    /// # Errors
    /// When nobody takes it any more.
    pub(crate) async fn send(&mut self, receipt: Option<&Receipt>) -> Result<(), Stopped> {
        let Some(batch) = self.take(receipt) else { return Ok(()) };
        tokio::select! {
            biased;
            sent = self.intake.batches.send(batch) => sent.map_err(|_| Stopped::ReceiverGone),
            () = self.intake.shared.shutdown.forced() => Err(Stopped::Forced),
        }
    }

    /// Sends what was pushed, or drops and counts it.
    ///
    /// # Errors
    /// When nobody takes it any more.
    pub(crate) fn try_send(&mut self) -> Result<(), Stopped> {
        let Some(batch) = self.take(None) else { return Ok(()) };
        match self.intake.batches.try_send(batch) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(batch)) => {
                self.intake.note_dropped(batch.counts.lines);
                Ok(())
            }
            Err(TrySendError::Closed(_)) => Err(Stopped::ReceiverGone),
        }
    }
}

impl Drop for Inlet {
    fn drop(&mut self) {
        self.lane.give_up_held((&self.intake.shared, &self.intake.metrics));
    }
}

/// An address as a name: `10-0-0-7`, `2001-db8-0-0-0-0-0-1`.
pub(crate) fn name_of_sender(sender: IpAddr) -> String {
    match sender.to_canonical() {
        IpAddr::V4(addr) => addr.octets().map(|part| part.to_string()).join("-"),
        // Written out, so that no two addresses have one name.
        IpAddr::V6(addr) => addr.segments().map(|part| format!("{part:x}")).join("-"),
    }
}

#[cfg(test)]
mod tests {
    use proto::subject::is_name;

    use super::*;

    #[test]
    fn addresses_are_names_and_no_two_share_one() {
        for (addr, name) in [
            ("10.0.0.7", "10-0-0-7"),
            ("::ffff:10.0.0.7", "10-0-0-7"),
            ("::1", "0-0-0-0-0-0-0-1"),
            ("2001:db8::ffff", "2001-db8-0-0-0-0-0-ffff"),
        ] {
            assert_eq!(name_of_sender(addr.parse().unwrap()), name);
            assert!(is_name(name));
        }
    }
}
