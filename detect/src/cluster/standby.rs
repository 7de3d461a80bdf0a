//! A detector that follows: everything as the active one has it, but nothing decided.
//!
//! Decisions are taken over from the state before the events that led to them are counted, as in a rebuild. So windows
//! hold at any time what the active detector's held at its last commit, and taking over costs one commit.

use std::time::Duration;

use proto::bus::nats::lease::Keeper;
use proto::bus::nats::state::StateEntry;
use proto::head::{Head, VERSION};
use proto::report::Problem;

use super::coverage::{covered_from, fingerprint};
use super::leader::Leader;
use super::seal::Piece;
use super::view::View;
use super::writer::{Fenced, Trouble, Writer, Written, write};
use super::{Ended, RETRY, Role, open_batch, refuse};
use crate::decider::Decider;
use crate::engine::Engine;
use crate::state::{decode_control, decode_offender};
use crate::worker::Request;

/// How often a standby says how it is.
const TICK: Duration = Duration::from_secs(1);
/// A detector that holds the lease for so long and does not lead lets another one try.
const LEAD_DEADLINE: Duration = Duration::from_secs(10);
/// Batches that a standby counts before others get their turn.
const GROUP_MAX: usize = 64;
/// A log without news still moves windows on, by the time that news may take to arrive.
pub(crate) const IDLE_LAG: Duration = Duration::from_secs(10);

/// A detector that follows.
pub(crate) struct Standby {
    view: View,
    decider: Decider,
}

impl Standby {
    /// Reads the state and begins to follow; `None` at the shutdown.
    pub(crate) async fn start(role: &mut Role) -> Result<Option<Self>, Ended> {
        let config = &role.parts.config;
        let opening = View::open(&role.parts.connection, &role.parts.outlets, &config.engine, &role.shutdown);
        tokio::pin!(opening);
        let opened = loop {
            tokio::select! {
                opened = &mut opening => break opened?,
                // A large state takes its time.
                () = tokio::time::sleep(RETRY) => role.report_reading(),
            }
        };
        let Some((view, mut snapshot)) = opened else { return Ok(None) };
        // A copy of the state that is behind must not take this detector back to a past that it has seen.
        if view.head.mark < role.known.1 && view.head.bucket == role.known.0 {
            return Err(Ended::Outdated);
        }
        role.known = (view.head.bucket.clone(), view.head.mark);
        // A name that left the configuration is exempt no longer.
        snapshot.control.resolved.retain(|name, _| config.names.contains(name));
        let (bans, offenders) = (snapshot.bans.len(), snapshot.offenders.len());
        let mut engine =
            Engine::follow(config.engine.clone(), snapshot, view.floor_position(), view.head.floor_arrival());
        engine.set_coverage(covered_from(&config.engine, &view.coverage));
        tracing::info!(bans, offenders, floor = view.floor, epoch = view.head.mark.epoch, "State read, standing by");
        let decider = Decider::new(role.identity.clone(), engine);
        Ok(Some(Self { view, decider }))
    }

    /// Follows until this detector is the active one; `None` at the shutdown.
    pub(crate) async fn run(mut self, role: &mut Role, lease: &mut Keeper) -> Result<Option<Leader>, Ended> {
        let mut ticks = tokio::time::interval(TICK);
        let mut tried_at = None;
        let mut held_since = None;
        loop {
            self.follow_log();
            if self.is_warm() {
                lease.want(true);
            }
            if lease.state().held && self.view.is_whole() && tried_at != Some(self.view.head_at) {
                tried_at = Some(self.view.head_at);
                if let Some(written) = self.take_over(role, lease).await? {
                    return Ok(Some(self.lead(role, written)));
                }
            }
            tokio::select! {
                biased;
                () = role.shutdown.draining() => return Ok(None),
                followed = self.view.state.next() => {
                    let entry = self.view.take_state(followed)?;
                    self.take(role, entry)?;
                }
                () = lease.changed() => {}
                Some(request) = role.requests.recv() => {
                    let is_reload = matches!(request, Request::Reload(_));
                    refuse(request, &mut role.parts.config);
                    if is_reload {
                        return Err(Ended::Reloaded);
                    }
                }
                _ = ticks.tick() => {
                    // Another has written, or the answer to our own was lost.
                    tried_at = None;
                    let now = self.decider.clock.now();
                    held_since = lease.state().held.then(|| held_since.unwrap_or(now));
                    if held_since.is_some_and(|since| now.since(since) >= LEAD_DEADLINE) {
                        return Err(Ended::CannotLead);
                    }
                    self.pass_time();
                    self.report(role, lease);
                }
                () = tokio::task::yield_now(), if self.has_decided() => {}
                followed = self.view.access.next(), if self.view.has_room() => self.view.take_access(followed)?,
            }
        }
    }

    /// Whether windows are as those of the active detector.
    fn is_warm(&self) -> bool {
        let reached = self.view.backlog.front().is_some_and(|logged| logged.sequence > self.view.floor);
        reached || self.view.idle_since().is_some()
    }

    fn pass_time(&mut self) {
        if let Some(at) = self.view.idle_since() {
            self.decider.engine.pass_time(at.saturating_sub(IDLE_LAG));
        }
    }

    fn take(&mut self, role: &mut Role, entry: Option<StateEntry>) -> Result<(), Ended> {
        let unreadable = |error: crate::state::DecodeError| Ended::Unreadable(error.to_string());
        let engine = &mut self.decider.engine;
        match entry {
            Some(StateEntry::Head(head)) => role.known = (head.bucket, head.mark),
            Some(StateEntry::Ban(change)) => engine.follow_record(change),
            Some(StateEntry::Offender(target, bytes)) => {
                let offender = bytes.map(|bytes| decode_offender(&bytes)).transpose().map_err(unreadable)?;
                engine.follow_offender(target, offender);
            }
            Some(StateEntry::Control(bytes)) => engine.follow_control(&decode_control(&bytes).map_err(unreadable)?),
            Some(StateEntry::Coverage(coverage)) => {
                let covered = covered_from(engine.config(), &coverage);
                engine.set_coverage(covered);
            }
            Some(StateEntry::Lists(_) | StateEntry::Out(_)) | None => {}
        }
        Ok(())
    }

    /// Whether a batch waits that has been decided.
    fn has_decided(&self) -> bool {
        self.view.is_whole() && self.view.backlog.front().is_some_and(|logged| logged.sequence <= self.view.floor)
    }

    /// Counts what has been decided, without deciding.
    fn follow_log(&mut self) {
        if !self.view.is_whole() {
            return;
        }
        self.decider.engine.raise_floor(self.view.floor_position());
        for _ in 0..GROUP_MAX {
            if !self.has_decided() {
                return;
            }
            let Some(logged) = self.view.pop() else { return };
            // What the active detector refused is refused here as well; it was counted there.
            if let Ok(batch) = open_batch(self.view.connection.subjects(), &logged) {
                self.decider.engine.handle_logged(&batch, self.view.base + logged.sequence, logged.stamp);
            }
        }
    }

    /// Writes a head of our own over the one we know. `None` if somebody has written since, or at the shutdown.
    async fn take_over(&mut self, role: &mut Role, lease: &mut Keeper) -> Result<Option<Written>, Ended> {
        let view = &self.view;
        match view.is_current().await {
            Ok(true) => {}
            // What is missing comes, and then we try again.
            Ok(false) | Err(_) => return Ok(None),
        }
        let mut head = Head {
            version: VERSION,
            node: role.identity.node.to_string(),
            floor: view.floor,
            bucket: view.bucket.clone(),
            access_created: view.log_created.clone(),
            access_base: view.base,
            bans: view.banned.len() as u64,
            changes: 0,
            cause: None,
            ..view.head.clone()
        };
        head.mark.epoch += 1;
        head.mark.commit += 1;
        let pieces = vec![Piece { head, changes: Vec::new() }];
        let writer = Writer {
            connection: view.connection.clone(),
            instance: role.me.instance.clone(),
            trouble: Trouble::default(),
        };
        let writing = write(&writer, pieces, view.head_at);
        let lost = async {
            while lease.state().held {
                lease.changed().await;
            }
        };
        tokio::select! {
            written = writing => Ok(written.map_err(|Fenced| ()).ok()),
            () = lost => Ok(None),
            () = role.shutdown.draining() => Ok(None),
        }
    }

    fn lead(self, role: &mut Role, written: Written) -> Leader {
        let Self { view, decider } = self;
        tracing::info!(epoch = written.head.mark.epoch, floor = view.floor, "This detector is the active one");
        role.parts.active.send_replace(true);
        Leader::new(role, view, decider, written)
    }

    fn report(&self, role: &Role, lease: &Keeper) {
        let engine = &self.decider.engine;
        let mut report = self.decider.report(self.view.backlog.len(), None);
        (report.duty, report.applied) = (Some("standby".to_owned()), Some(self.view.head.mark));
        report.skew_ms = self.decider.clock.skew_ms();
        report.lag = self.view.access.lag();
        if let Some(detect) = &mut report.detect {
            detect.fingerprint = fingerprint(engine.config());
            detect.floor = self.view.floor;
        }
        let has_unknown = covered_from(engine.config(), &self.view.coverage).contains(&u64::MAX);
        if has_unknown && self.view.head.mark.epoch > 0 {
            let active = lease.state().holder.map_or_else(|| "the active detector".to_owned(), |holder| holder.node);
            let text = format!("the rules here are not those of {active}: give all detectors the same configuration");
            report.problems.push(Problem::degraded(text));
        }
        if !self.is_warm() {
            report.problems.push(Problem::warning("windows are being rebuilt"));
        }
        role.parts.outlets.nodes.put(report);
    }
}
