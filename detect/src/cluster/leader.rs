//! The active detector: handles what stands after the floor, and commits what that led to.
//!
//! One commit is under way at a time; what is decided meanwhile goes into the next. Nothing is told, neither to hosts nor
//! to an operator who waits for an answer, before it is stored.

use std::collections::VecDeque;
use std::pin::Pin;
use std::time::Duration;

use proto::bus::nats::ask::serve_api;
use proto::bus::nats::commit::{Change, ENTRIES_MAX, Value, read_outbox};
use proto::bus::nats::lease::Keeper;
use proto::bus::nats::streams;
use proto::envelope::CloudEvent;
use proto::head::{Coverage, Head};
use proto::shutdown::Shutdown;
use proto::subject::{KEY_CONTROL, KEY_LISTS, KEY_PREDICATE};
use proto::time::Timestamp;
use tokio::sync::oneshot;

use super::coverage::{cover, covered_from, fingerprint};
use super::outbox::Outbox;
use super::peers::Peers;
use super::seal::{Banned, seal};
use super::standby::IDLE_LAG;
use super::view::View;
use super::writer::{Fenced, Written, write};
use super::{Ended, Logged, Role, open_batch};
use crate::config::DetectConfig;
use crate::decider::{Decider, log_event};
use crate::engine::command::Reply;
use crate::state::encode_control;
use crate::worker::{CommandError, Request};

/// How often progress without a decision is stored, and the report is renewed.
const TICK: Duration = Duration::from_secs(1);
/// Batches handled before others get their turn.
const GROUP_MAX: usize = 16;
/// Changes that may wait for the next commit before reading stops: a few commits' worth.
const PENDING_MAX: usize = 4 * ENTRIES_MAX;
/// The log is worked off in its own time while it is further behind than this.
const BEHIND: Duration = Duration::from_secs(5);
/// How often the log is noted, and how often it is purged by that, at most: as many times in a horizon.
const MARKS_MIN: u32 = 16;
/// The same, at least.
const MARK_INTERVAL_MAX: Duration = Duration::from_secs(10);
/// How long the events that are stored may take to be published at the end; a successor publishes the rest.
const OUTBOX_DEADLINE: Duration = Duration::from_secs(3);

type Answer = (oneshot::Sender<Result<Reply, CommandError>>, Result<Reply, CommandError>);

/// A commit under way.
struct Flight {
    writing: Pin<Box<dyn Future<Output = Result<Written, Fenced>> + Send>>,
    told: Vec<CloudEvent>,
    answers: Vec<Answer>,
    begun_at: Timestamp,
}

/// The active detector.
pub(crate) struct Leader {
    view: View,
    decider: Decider,
    instance: String,
    /// The head as we last wrote it, and the number of its message.
    head: Head,
    at: u64,
    /// What the state holds once the commit under way is stored.
    banned: Banned,
    flight: Option<Flight>,
    /// Answers that wait for the next commit.
    answers: Vec<Answer>,
    outbox: Outbox,
    /// The last batch handled, when it arrived, and when the line behind the newest ban was read.
    handled: u64,
    arrival: Timestamp,
    cause: Option<Timestamp>,
    /// To be published with the next commit.
    coverage: Option<Coverage>,
    progress_due: bool,
    marks: VecDeque<(u64, Timestamp)>,
    peers: Peers,
    serving: Shutdown,
}

impl Leader {
    /// From the state that `view` shows, over which `written` is our first word.
    pub(crate) fn new(role: &Role, view: View, mut decider: Decider, written: Written) -> Self {
        let now = decider.clock.now();
        let coverage = cover(decider.engine.config(), &view.coverage);
        let covered = covered_from(decider.engine.config(), &coverage);
        decider.engine.set_coverage(covered);
        decider.engine.set_present(now);
        decider.engine.lead(now);
        decider.collect();
        decider.lists_changed |= view.lists.as_ref() != Some(&decider.engine.lists());
        let serving = Shutdown::new();
        tokio::spawn(serve(role, serving.clone()));
        // Names that were looked up for nobody are looked up again.
        role.parts.outlets.names.send_modify(|_| {});
        Self {
            instance: role.me.instance.clone(),
            outbox: Outbox::spawn(view.connection.clone()),
            handled: view.floor,
            arrival: view.head.floor_arrival(),
            coverage: (coverage != view.coverage).then_some(coverage),
            head: written.head,
            at: written.at,
            banned: view.banned.clone(),
            flight: None,
            answers: Vec::new(),
            cause: None,
            progress_due: false,
            marks: VecDeque::new(),
            peers: Peers::default(),
            serving,
            view,
            decider,
        }
    }

    /// Decides until the shutdown, or until this detector is active no longer.
    pub(crate) async fn run(mut self, role: &mut Role, lease: &mut Keeper) -> Result<(), Ended> {
        self.publish_left_over().await?;
        let ended = self.decide(role, lease).await;
        self.serving.begin();
        for (reply, _) in self.answers.drain(..) {
            // Who asked may have gone.
            let _gone = reply.send(Err(CommandError::NotActive));
        }
        ended?;
        // A successor may begin: what is left in the outbox is in the state as well.
        let _left = tokio::time::timeout(OUTBOX_DEADLINE, self.outbox.end()).await;
        Ok(())
    }

    /// What a former detector has stored and not published.
    async fn publish_left_over(&mut self) -> Result<(), Ended> {
        let left = read_outbox(&self.view.connection, self.head.first_out).await?;
        if let Some((last, _)) = left.last() {
            let last = *last;
            tracing::info!(events = left.len(), "Publishing what the former detector has left");
            self.outbox.send((last, self.head.next_out), left.into_iter().map(|(_, event)| event).collect()).await;
        }
        Ok(())
    }

    async fn decide(&mut self, role: &mut Role, lease: &mut Keeper) -> Result<(), Ended> {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut ending = false;
        loop {
            if self.flight.is_none() && (self.is_due() || (ending && self.has_progress())) {
                self.depart();
            }
            if ending && self.flight.is_none() {
                return Ok(());
            }
            let (present, due) = (self.present(), self.decider.engine.poll_timeout());
            let wait = due.map(|due| due.since(present)).unwrap_or_default();
            let may_read = !ending && self.decider.pending.len() < PENDING_MAX;
            tokio::select! {
                biased;
                () = role.shutdown.draining(), if !ending => ending = true,
                landed = landing(&mut self.flight) => self.land(landed).await?,
                () = lease.changed() => if !lease.state().held { return Err(Ended::Deposed) },
                Some(request) = role.requests.recv(), if !ending => self.handle_request(role, request),
                _ = ticks.tick() => self.handle_tick(role),
                () = tokio::time::sleep(wait), if due.is_some() && !ending => {
                    self.decider.engine.handle_timeout(present);
                    self.decider.collect();
                }
                followed = self.view.state.next() => drop(self.view.take_state(followed)?),
                () = std::future::ready(()), if may_read && !self.view.backlog.is_empty() => self.handle_backlog(),
                followed = self.view.access.next(), if may_read => self.view.take_access(followed)?,
            }
        }
    }

    /// The present, or that of the log while it is far behind.
    fn present(&self) -> Timestamp {
        let now = self.decider.clock.now();
        let waiting = self.view.backlog.front().map(|logged| logged.stamp);
        let waiting = waiting.or((!self.view.caught_up).then_some(self.arrival));
        waiting.filter(|stamp| now.since(*stamp) > BEHIND).map_or(now, |stamp| stamp.max(self.decider.engine.now()))
    }

    fn handle_backlog(&mut self) {
        for _ in 0..GROUP_MAX {
            let Some(logged) = self.view.pop() else { return };
            self.handle_batch(&logged);
            if !self.decider.changes.is_empty() {
                return;
            }
        }
    }

    fn handle_batch(&mut self, logged: &Logged) {
        let now = self.decider.clock.now();
        match open_batch(self.view.connection.subjects(), logged) {
            Ok(batch) => {
                self.decider.engine.set_present(now);
                self.decider.engine.handle_logged(&batch, self.view.base + logged.sequence, logged.stamp);
                self.decider.collect();
                if !self.decider.changes.is_empty() {
                    self.cause = Some(batch.read_at);
                }
            }
            // It would be refused for ever, so the floor moves past it.
            Err(refusal) => {
                self.decider.metrics.batch_refused();
                let cause = std::error::Error::source(&refusal).map(ToString::to_string);
                let subject = &logged.subject;
                if let Some(text) = self.peers.note_refusal(subject, &refusal.to_string(), now) {
                    tracing::error!(subject, error = %refusal, cause, "Batch refused");
                    self.decider.raise_alarm("batch-refused", text);
                }
            }
        }
        self.handled = self.handled.max(logged.sequence);
        self.arrival = self.arrival.max(logged.stamp);
    }

    fn handle_request(&mut self, role: &mut Role, request: Request) {
        let now = self.decider.clock.now();
        match request {
            Request::Command(command, reply) => {
                let result = self.decider.engine.handle_command(command, now);
                self.decider.collect();
                self.answers.push((reply, result.map_err(CommandError::from)));
            }
            Request::Explain(address, reply) => {
                // Who asked may have gone.
                let _gone = reply.send(self.decider.engine.explain(address, now));
            }
            Request::Resolved { name, addrs } => self.decider.handle_resolved(name, addrs, now),
            Request::Reload(config) => self.reload(role, *config, now),
        }
    }

    /// New rules count a node from its first batch that carries all they may match.
    fn reload(&mut self, role: &mut Role, config: DetectConfig, now: Timestamp) {
        role.parts.config = config.clone();
        self.decider.take_over(config, now);
        let known = self.coverage.as_ref().unwrap_or(&self.view.coverage);
        let coverage = cover(self.decider.engine.config(), known);
        let covered = covered_from(self.decider.engine.config(), &coverage);
        self.decider.engine.set_coverage(covered);
        self.coverage = Some(coverage);
        self.decider.lists_changed = true;
    }

    fn handle_tick(&mut self, role: &mut Role) {
        let now = self.decider.clock.now();
        self.decider.handle_clock(now);
        self.decider.engine.set_present(now);
        if self.view.is_idle() {
            self.decider.engine.pass_time(now.saturating_sub(IDLE_LAG));
        }
        self.progress_due = self.has_progress();
        let own = fingerprint(self.decider.engine.config());
        for (kind, text) in self.peers.look(&role.parts.outlets.nodes.all(), &self.decider.node, &own, now) {
            self.decider.raise_alarm(kind, text);
        }
        self.purge_log(now);
        let mut report = self.decider.report(self.view.backlog.len(), self.peers.problem());
        (report.duty, report.applied) = (Some("active".to_owned()), Some(self.head.mark));
        report.lag = self.view.access.lag() + self.view.backlog.len() as u64;
        if let Some(detect) = &mut report.detect {
            (detect.fingerprint, detect.floor) = (own, self.head.floor);
        }
        role.mark = role.mark.max(self.head.mark);
        role.parts.outlets.nodes.put(report);
    }

    /// What no window can need any more goes.
    fn purge_log(&mut self, now: Timestamp) {
        let horizon = self.decider.engine.config().horizon();
        let interval = (horizon / MARKS_MIN).clamp(TICK, MARK_INTERVAL_MAX);
        if self.marks.back().is_some_and(|(_, noted)| now.since(*noted) < interval) {
            return;
        }
        self.marks.push_back((self.head.floor, now));
        // A full log brings no news that would move its time on, and must be purged all the more.
        let idle_since = if self.view.is_idle() { now.saturating_sub(IDLE_LAG) } else { Timestamp::EPOCH };
        let since = self.head.floor_arrival().max(idle_since).saturating_sub(horizon);
        let mut stale = None;
        while self.marks.front().is_some_and(|(_, noted)| *noted < since) {
            stale = self.marks.pop_front();
        }
        let Some((floor, _)) = stale else { return };
        let connection = self.view.connection.clone();
        tokio::spawn(async move {
            let stream = connection.subjects().access_stream();
            if let Err(error) = streams::purge(&connection, &stream, None, floor).await {
                tracing::debug!(%error, "Log not purged, the next time will do");
            }
        });
    }

    fn has_progress(&self) -> bool {
        self.handled > self.head.floor
    }

    fn is_due(&self) -> bool {
        let decider = &self.decider;
        let decided = decider.pending.is_urgent() || !decider.told.is_empty() || decider.lists_changed;
        decided || !self.answers.is_empty() || self.coverage.is_some() || self.progress_due
    }

    /// Sends all that is decided on its way.
    fn depart(&mut self) {
        self.progress_due = false;
        let commit = std::mem::take(&mut self.decider.pending);
        let told = std::mem::take(&mut self.decider.told);
        self.decider.changes.clear();
        let mut singles = Vec::new();
        let mut single =
            |key: &str, value: Vec<u8>| singles.push(Change { key: key.to_owned(), value: Value::Put(value) });
        if let Some(control) = &commit.control {
            single(KEY_CONTROL, encode_control(control));
        }
        if std::mem::take(&mut self.decider.lists_changed) {
            single(KEY_LISTS, serde_json::to_vec(&self.decider.engine.lists()).unwrap_or_default());
        }
        if let Some(coverage) = self.coverage.take() {
            single(KEY_PREDICATE, serde_json::to_vec(&coverage).unwrap_or_default());
        }
        let begun_at = self.decider.clock.now();
        let next = Head {
            first_out: self.outbox.first_unpublished(self.head.next_out),
            floor: self.handled,
            floor_arrival: self.arrival.as_nanos(),
            cause: self.cause.take().map(Timestamp::as_nanos),
            ..self.head.clone()
        };
        let pieces = seal(&commit, &told, singles, (&self.head, next), (&mut self.banned, begun_at));
        let (connection, instance, at) = (self.view.connection.clone(), self.instance.clone(), self.at);
        let writing = Box::pin(async move { write(&connection, &instance, pieces, at).await });
        self.flight = Some(Flight { writing, told, answers: std::mem::take(&mut self.answers), begun_at });
    }

    /// What was decided is stored, or was for nothing.
    async fn land(&mut self, landed: Result<Written, Fenced>) -> Result<(), Ended> {
        let Some(flight) = self.flight.take() else { return Ok(()) };
        let Ok(written) = landed else {
            self.decider.metrics.commit_failed();
            self.answers.extend(flight.answers);
            return Err(Ended::Deposed);
        };
        self.decider.metrics.committed(self.decider.clock.now().since(flight.begun_at).as_secs_f64());
        (self.head, self.at) = (written.head, written.at);
        for (reply, result) in flight.answers {
            // Who asked may have gone.
            let _gone = reply.send(result);
        }
        flight.told.iter().for_each(log_event);
        self.outbox.send((written.last, self.head.next_out), flight.told).await;
        Ok(())
    }
}

/// The commit under way, if any.
async fn landing(flight: &mut Option<Flight>) -> Result<Written, Fenced> {
    match flight {
        Some(flight) => flight.writing.as_mut().await,
        None => std::future::pending().await,
    }
}

/// Answers what other detectors pass on.
fn serve(role: &Role, serving: Shutdown) -> impl Future<Output = ()> + use<> {
    let (connection, api) = (role.parts.connection.clone(), role.parts.api.clone());
    async move {
        if let Err(error) = serve_api(connection, serving, move |call| api(call)).await {
            tracing::error!(%error, "Other detectors cannot pass on requests");
        }
    }
}
