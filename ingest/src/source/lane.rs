//! Lines into the batch under way, and what they were: the part of batching that all sources share. Pure.
//!
//! Accesses that no rule can match are left out, unless their client is banned: what it still reaches is a leak. A batch is
//! filtered by one version of what the rules look at, from its first line to its last.

use std::net::IpAddr;
use std::sync::Arc;

use proto::client_ip::{Client, ClientIpPolicy, NoClient};
use proto::event::{AccessBatch, Interest, LineCounts};
use proto::time::Timestamp;

use super::skew::Fastest;
use crate::metrics::{NO_CLIENT, SourceMetrics};
use crate::parse::{Outcome, Parser, Suspicion, escape_sample};
use crate::pipeline::{Shared, SourceStatus};

/// Events of a batch. With the queue's length this bounds what waits in memory: some ten megabytes at worst.
const BATCH_EVENTS_MAX: usize = 512;
/// Bytes of text in a batch, beyond which no further line is added.
const BATCH_TEXT_BYTES_MAX: usize = 64 << 10;
/// Lines of a batch, for sources of which few are accesses.
const BATCH_LINES_MAX: u64 = 8192;

/// What a batch is made under, from its first line to its last.
#[derive(Debug, Default)]
pub(crate) struct Rules {
    pub(crate) policy: Arc<ClientIpPolicy>,
    pub(crate) interest: Arc<Interest>,
}

/// Lines that follow each other: of one file, or of one sender.
pub(crate) struct Lane {
    pub(super) parser: Parser,
    pub(super) batch: Option<AccessBatch>,
    /// Whether lines are looked at as they come: then their times tell of the writer's clock.
    pub(super) is_live: bool,
    /// Whether several write them, so that nothing is told by how they follow each other.
    pub(super) is_mixed: bool,
    /// Of the batch.
    rules: Arc<Rules>,
    tally: Tally,
    /// Of lines that were held and came with the one that was read last, which are not counted yet.
    released: Vec<Origin>,
}

/// What a batch brought, for reports and metrics.
#[derive(Debug, Default)]
struct Tally {
    events: u64,
    bytes: u64,
    /// The newest client that is known, and its peer.
    client: Option<(Client, Option<IpAddr>)>,
    sample: Option<String>,
    suspect: u64,
    fastest: Fastest,
    no_client: [u64; NO_CLIENT.len()],
}

/// Whose request a line tells of, and its peer.
type Origin = (Result<Client, NoClient>, Option<IpAddr>);

impl Lane {
    pub(crate) fn new(parser: Parser) -> Self {
        let (batch, rules, tally, released) = Default::default();
        Self { parser, batch, is_live: true, is_mixed: false, rules, tally, released }
    }

    /// The batch under way, and what its lines go through. One that begins now takes over the rules in force.
    fn begin(
        &mut self,
        shared: &Shared,
        rules: &Arc<Rules>,
        now: Timestamp,
    ) -> (&mut Parser, &mut AccessBatch, &Interest, &mut Vec<Origin>) {
        let Self { parser, batch, rules: own, released, .. } = self;
        let batch = batch.get_or_insert_with(|| {
            if !Arc::ptr_eq(own, rules) {
                parser.set_rules(rules.policy.clone(), rules.interest.clone());
                *own = rules.clone();
            }
            let mut batch = AccessBatch::new(shared.node.clone(), shared.source.clone(), now);
            batch.filter = rules.interest.version;
            batch
        });
        (parser, batch, &own.interest, released)
    }

    /// Shows a line, which begins at `offset` of its source, to the parser. Nothing is counted yet.
    pub(crate) fn read(
        &mut self,
        (line, offset): (&[u8], u64),
        (shared, rules, now): (&Shared, &Arc<Rules>, Timestamp),
    ) -> Outcome<Origin> {
        let is_mixed = self.is_mixed;
        let (parser, batch, interest, released) = self.begin(shared, rules, now);
        let mut newest = None;
        if !is_mixed {
            parser.set_now(now);
        }
        parser.with_event(line, offset, |event| {
            if interest.may_match(event.status) || event.client.is_ok_and(|client| shared.banned.contains(client.addr))
            {
                batch.push(event);
            } else {
                batch.counts.withheld += 1;
            }
            let origin = (event.client, event.peer);
            released.extend(newest.replace(origin));
            origin
        })
    }

    /// Counts a line of so many bytes, its line end included, in the batch under way; `outcome` is `None` when it was too
    /// long to be read.
    pub(crate) fn count(
        &mut self,
        (line, bytes): (&[u8], u64),
        outcome: Option<Outcome<Origin>>,
        (shared, rules, now): (&Shared, &Arc<Rules>, Timestamp),
    ) -> &mut AccessBatch {
        let is_oversized = outcome.is_none();
        if is_oversized {
            self.parser.note_oversized();
        }
        if self.is_live
            && let (Some(Outcome::Event(_)), Some(written_at)) = (&outcome, self.parser.written_at())
        {
            self.tally.fastest.note(written_at, now);
        }
        for origin in self.released.drain(..) {
            self.tally.note(Outcome::Event(origin), line);
        }
        self.tally.suspect += self.parser.take_condemned();
        let is_unparsed = outcome.is_some_and(|outcome| self.tally.note(outcome, line));
        self.tally.bytes += bytes;
        let (_, batch, ..) = self.begin(shared, rules, now);
        batch.read_at = now;
        batch.counts.lines += 1;
        batch.counts.unparsed += u64::from(is_unparsed);
        batch.counts.oversized += u64::from(is_oversized);
        batch
    }

    /// Whether the batch under way takes no further line.
    pub(crate) fn is_full(&self) -> bool {
        self.batch.as_ref().is_some_and(|batch| {
            batch.len() >= BATCH_EVENTS_MAX
                || batch.text_bytes() >= BATCH_TEXT_BYTES_MAX
                || batch.counts.lines >= BATCH_LINES_MAX
        })
    }

    /// The batch under way, with what it brought noted in the source's figures; `None` when no line has come.
    pub(crate) fn take(&mut self, abandoned: u64, (shared, metrics): (&Shared, &SourceMetrics)) -> Option<AccessBatch> {
        let mut batch = self.batch.take().filter(|batch| batch.counts.lines > 0)?;
        batch.counts.unparsed += abandoned;
        let tally = std::mem::take(&mut self.tally);
        let format = self.parser.seen_format().map_or("", |format| format.as_str());
        tally.report(&batch, format, (shared, metrics));
        Some(batch)
    }
}

impl Lane {
    /// Its writer has ended: what waited to be believed is not.
    pub(crate) fn give_up_held(&mut self, (shared, metrics): (&Shared, &SourceMetrics)) {
        let suspect = self.parser.give_up_held();
        if suspect > 0 {
            metrics.suspect.inc_by(suspect);
            shared.status().report.suspect += suspect;
        }
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
            Outcome::Suspect(Suspicion::TooOld) | Outcome::Held | Outcome::Blank | Outcome::Partial => {}
            Outcome::Suspect(_) => self.suspect += 1,
        }
        matches!(outcome, Outcome::Unparsed(_))
    }

    fn report(self, batch: &AccessBatch, format: &str, (shared, metrics): (&Shared, &SourceMetrics)) {
        let LineCounts { lines, unparsed, oversized, withheld } = batch.counts;
        metrics.lines.inc_by(lines);
        metrics.events.inc_by(self.events);
        metrics.unparsed.inc_by(unparsed);
        metrics.oversized.inc_by(oversized);
        metrics.suspect.inc_by(self.suspect);
        metrics.withheld.inc_by(withheld);
        metrics.bytes.inc_by(self.bytes);
        let mut status = shared.status();
        let SourceStatus { report, skew, .. } = &mut *status;
        skew.note(self.fastest, batch.read_at);
        report.lines += lines;
        report.events += self.events;
        report.unparsed += unparsed;
        report.oversized += oversized;
        report.suspect += self.suspect;
        report.withheld += withheld;
        report.last_line_at = Some(batch.read_at);
        if report.format != format {
            format.clone_into(&mut report.format);
        }
        if let Some((client, peer)) = self.client {
            let via = peer.filter(|_| client.via_proxy).map_or_else(String::new, |peer| format!(" via {peer}"));
            report.sample_client = Some(format!("{}{via}", client.addr));
        }
        if self.sample.is_some() {
            report.unparsed_sample = self.sample;
        }
        for (index, reason) in NO_CLIENT.iter().enumerate().filter(|(index, _)| self.no_client[*index] > 0) {
            metrics.no_client[index].inc_by(self.no_client[index]);
            *report.no_client.entry(reason.as_str().to_owned()).or_default() += self.no_client[index];
        }
    }
}
