//! The active detector: handles what stands after the floor, and commits what that led to.
//!
//! One commit is under way at a time; what is decided meanwhile goes into the next. Nothing is told, neither to hosts nor
//! to an operator who waits for an answer, before it is stored.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use proto::bus::nats::ask::serve_api;
use proto::bus::nats::commit::{Change, ENTRIES_MAX, Value};
use proto::bus::nats::follow::first_since;
use proto::bus::nats::lease::Keeper;
use proto::bus::nats::streams::{self, StreamState};
use proto::bus::nats::{BusError, Connection};
use proto::envelope::CloudEvent;
use proto::head::{Coverage, Head};
use proto::report::Problem;
use proto::shutdown::Shutdown;
use proto::subject::{KEY_CONTROL, KEY_LISTS, KEY_PREDICATE};
use proto::time::{Timestamp, render_duration};
use tokio::sync::oneshot;

use super::coverage::{cover, covered_from, fingerprint};
use super::outbox::Outbox;
use super::seal::{Banned, seal};
use super::standby::IDLE_LAG;
use super::view::View;
use super::writer::{Fenced, Trouble, Writer, Written, write};
use super::{Ended, Logged, Role, open_batch};
use crate::config::DetectConfig;
use crate::decider::{Decider, log_event};
use crate::engine::command::Reply;
use crate::peers::Peers;
use crate::resolve::Names;
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
/// How often the log is purged, at least: in the time that windows reach back ...
const PURGES_MIN: u32 = 16;
/// ... and at all.
const PURGE_INTERVAL_MAX: Duration = Duration::from_secs(10);
/// How long the events that are stored may take to be published at the end; a successor publishes the rest.
const OUTBOX_DEADLINE: Duration = Duration::from_secs(3);

type Answer = (oneshot::Sender<Result<Reply, CommandError>>, Result<Reply, CommandError>);

/// A commit under way.
struct Flight {
    writing: Pin<Box<dyn Future<Output = Result<Written, Fenced>> + Send>>,
    /// Events, as they share numbers in the outbox.
    outs: Vec<Vec<CloudEvent>>,
    answers: Vec<Answer>,
    begun_at: Timestamp,
    /// What it publishes, as the engine counts it for leaks.
    leak_turn: u64,
}

/// The active detector.
pub(crate) struct Leader {
    view: View,
    decider: Decider,
    writer: Writer,
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
    /// In force, and whether it is to be published with the next commit.
    coverage: Coverage,
    coverage_due: bool,
    progress_due: bool,
    purged_at: Timestamp,
    /// When something was removed from the log before its time; nanoseconds, 0 = never.
    cut_at: Arc<AtomicI64>,
    peers: Peers,
    serving: Serving,
}

/// Ends the answering of what other detectors pass on, however this detector ends to be the active one.
struct Serving(Shutdown);

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.begin();
    }
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
        // What stands was published before.
        decider.engine.publish_leaks(0, written.head.mark, now);
        decider.collect();
        decider.lists_changed |= view.lists.as_ref() != Some(&decider.engine.lists());
        let serving = Shutdown::new();
        tokio::spawn(serve(role, serving.clone()));
        // The configuration may have changed since names were looked up here.
        let config = &role.parts.config;
        let names = Names { names: config.names.clone(), interval: config.resolve_interval };
        role.parts.outlets.names.send_replace(names);
        let outs = (written.head.first_out, written.head.next_out);
        Self {
            writer: Writer {
                connection: view.connection.clone(),
                instance: role.me.instance.clone(),
                trouble: Trouble::default(),
            },
            outbox: Outbox::spawn(view.connection.clone(), role.parts.bus.clone(), outs),
            handled: view.floor,
            arrival: view.head.floor_arrival(),
            coverage_due: coverage != view.coverage,
            coverage,
            head: written.head,
            at: written.at,
            banned: view.banned.clone(),
            flight: None,
            answers: Vec::new(),
            cause: None,
            progress_due: false,
            purged_at: now,
            cut_at: Arc::default(),
            peers: Peers::default(),
            serving: Serving(serving),
            view,
            decider,
        }
    }

    /// Decides until the shutdown, or until this detector is active no longer.
    pub(crate) async fn run(mut self, role: &mut Role, lease: &mut Keeper) -> Result<(), Ended> {
        let ended = self.decide(role, lease).await;
        let Self { answers, outbox, serving, .. } = self;
        drop(serving);
        for (reply, _) in answers {
            // Who asked may have gone.
            let _gone = reply.send(Err(CommandError::NotActive));
        }
        ended?;
        // A successor may begin: what is left in the outbox is in the state as well.
        let _left = tokio::time::timeout(OUTBOX_DEADLINE, outbox.end()).await;
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
            let waiting = self.decider.pending.len() + self.decider.told.len();
            let may_handle = !ending && waiting < PENDING_MAX;
            tokio::select! {
                biased;
                () = role.shutdown.draining(), if !ending => ending = true,
                landed = landing(&mut self.flight) => self.land(landed)?,
                () = lease.changed() => if !lease.state().held { return Err(Ended::LeaseLost) },
                Some(request) = role.requests.recv(), if !ending => self.handle_request(role, request),
                _ = ticks.tick() => self.handle_tick(role),
                answered = self.decider.inquiries.next() => self.decider.handle_answer(answered),
                () = tokio::time::sleep(wait), if due.is_some() && !ending => {
                    self.decider.engine.handle_timeout(present);
                    self.decider.collect();
                }
                followed = self.view.state.next() => drop(self.view.take_state(followed)?),
                // Others get their turn, however much there is.
                () = tokio::task::yield_now(), if may_handle && !self.view.backlog.is_empty() => self.handle_backlog(),
                followed = self.view.access.next(), if may_handle && self.view.backlog.is_empty() => {
                    self.view.take_access(followed)?;
                    self.handle_backlog();
                }
            }
        }
    }

    /// The present, or that of the log while it is far behind.
    fn present(&self) -> Timestamp {
        let now = self.decider.clock.now();
        let waiting = self.view.backlog.front().map(|logged| logged.stamp);
        let waiting = waiting.or(self.view.caught_up_at.is_none().then_some(self.arrival));
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
                let node = self.view.connection.subjects().node_of_access(subject).unwrap_or_default().to_owned();
                if let Some((kind, text)) = self.peers.note_refusal(&node, &refusal.to_string(), now) {
                    tracing::error!(subject, error = %refusal, cause, "Batch refused");
                    self.decider.raise_alarm(kind, text);
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
                let _gone = reply.send(self.decider.explain(address, now));
            }
            Request::Resolved { name, addrs } => self.decider.handle_resolved(name, addrs, now),
            Request::Reload(config) => self.reload(role, *config, now),
        }
    }

    /// New rules count a node from its first batch that carries all they may match.
    fn reload(&mut self, role: &mut Role, config: DetectConfig, now: Timestamp) {
        role.parts.config = config.clone();
        self.decider.take_over(config, now);
        self.coverage = cover(self.decider.engine.config(), &self.coverage);
        let covered = covered_from(self.decider.engine.config(), &self.coverage);
        self.decider.engine.set_coverage(covered);
        self.coverage_due = true;
        self.decider.lists_changed = true;
    }

    fn handle_tick(&mut self, role: &mut Role) {
        let now = self.decider.clock.now();
        self.decider.handle_clock(now);
        self.decider.engine.set_present(now);
        if let Some(at) = self.view.idle_since() {
            self.decider.engine.pass_time(at.saturating_sub(IDLE_LAG));
        }
        self.progress_due = self.has_progress();
        let own = fingerprint(self.decider.engine.config());
        let reports = role.parts.outlets.nodes.all();
        self.decider.observe_back_ends(&reports);
        for (kind, text) in self.peers.look(&reports, &self.decider.node, &own, now) {
            self.decider.raise_alarm(kind, text);
        }
        self.purge_log(now);
        let mut report = self.decider.report(self.view.backlog.len(), self.peers.problem());
        report.problems.extend(self.outbox.problem(now));
        report.problems.extend(self.stuck(now));
        report.problems.extend(self.cut(now));
        (report.duty, report.applied) = (Some("active".to_owned()), Some(self.head.mark));
        report.skew_ms = self.decider.clock.skew_ms();
        report.lag = self.view.access.lag() + self.view.backlog.len() as u64;
        if let Some(detect) = &mut report.detect {
            (detect.fingerprint, detect.floor) = (own, self.head.floor);
        }
        role.known = (self.head.bucket.clone(), self.head.mark);
        role.parts.outlets.nodes.put(report);
    }

    /// A commit that is under way for too long.
    fn stuck(&self, now: Timestamp) -> Option<Problem> {
        let late = self.flight.as_ref().map(|flight| now.since(flight.begun_at)).filter(|late| *late >= BEHIND)?;
        let why = self.writer.trouble.get().map_or_else(String::new, |why| format!(": {why}"));
        let late = render_duration(late);
        Some(Problem::degraded(format!("the state has not been written for {late}, new bans wait for that{why}")))
    }

    /// A log that is too small.
    fn cut(&self, now: Timestamp) -> Option<Problem> {
        let (cut_at, horizon) = (self.cut_at.load(Ordering::Relaxed), self.decider.engine.config().horizon());
        let matters = cut_at > 0 && now.since(Timestamp::from_nanos(cut_at)) < horizon;
        matters.then(|| {
            Problem::warning(format!(
                "the log of batches is too small for what rules look back on ({}): batches went before their time, and \
                 a detector that takes over begins to count anew what they held; raise bus.access_max_bytes",
                render_duration(horizon)
            ))
        })
    }

    /// What no window can need any more goes.
    fn purge_log(&mut self, now: Timestamp) {
        let horizon = self.decider.engine.config().horizon();
        // A log that has just been too small is soon full again.
        let cut_at = Timestamp::from_nanos(self.cut_at.load(Ordering::Relaxed));
        let interval = if now.since(cut_at) < PURGE_INTERVAL_MAX { TICK } else { PURGE_INTERVAL_MAX };
        if now.since(self.purged_at) < (horizon / PURGES_MIN).min(interval) {
            return;
        }
        self.purged_at = now;
        // Windows have reached this far, also where nothing has come for long.
        let reached = if self.has_progress() { self.head.floor_arrival() } else { self.decider.engine.log_arrival() };
        let since = reached.saturating_sub(horizon);
        let (connection, floor) = (self.view.connection.clone(), self.head.floor);
        let cut_at = self.cut_at.clone();
        tokio::spawn(async move {
            match purge_before(&connection, since, floor).await {
                Ok(true) => cut_at.store(now.as_nanos(), Ordering::Relaxed),
                Ok(false) => {}
                Err(error) => tracing::debug!(%error, "Log not purged, the next time will do"),
            }
        });
    }

    fn has_progress(&self) -> bool {
        self.handled > self.head.floor
    }

    fn is_due(&self) -> bool {
        let decider = &self.decider;
        let decided = decider.pending.is_urgent() || !decider.told.is_empty() || decider.lists_changed;
        decided || !self.answers.is_empty() || self.coverage_due || self.progress_due
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
        if std::mem::take(&mut self.coverage_due) {
            single(KEY_PREDICATE, serde_json::to_vec(&self.coverage).unwrap_or_default());
        }
        let (begun_at, leak_turn) = (self.decider.clock.now(), self.decider.engine.leak_turn());
        let next = Head {
            first_out: self.outbox.first_unpublished(),
            floor: self.handled,
            floor_arrival: self.arrival.as_nanos(),
            cause: self.cause.take().map(Timestamp::as_nanos),
            ..self.head.clone()
        };
        let (pieces, outs) = seal(&commit, told, singles, (&self.head, next), (&mut self.banned, begun_at));
        let (writer, at) = (self.writer.clone(), self.at);
        let writing = Box::pin(async move { write(&writer, pieces, at).await });
        self.flight = Some(Flight { writing, outs, answers: std::mem::take(&mut self.answers), begun_at, leak_turn });
    }

    /// What was decided is stored, or was for nothing.
    fn land(&mut self, landed: Result<Written, Fenced>) -> Result<(), Ended> {
        let Some(flight) = self.flight.take() else { return Ok(()) };
        let Ok(written) = landed else {
            self.decider.metrics.commit_failed();
            self.answers.extend(flight.answers);
            return Err(Ended::Deposed);
        };
        self.decider.metrics.committed(self.decider.clock.now().since(flight.begun_at).as_secs_f64());
        (self.head, self.at) = (written.head, written.at);
        self.decider.engine.publish_leaks(flight.leak_turn, self.head.mark, self.decider.clock.now());
        for (reply, result) in flight.answers {
            // Who asked may have gone.
            let _gone = reply.send(result);
        }
        flight.outs.iter().flatten().for_each(log_event);
        self.outbox.send(self.head.next_out, written.last, flight.outs);
        Ok(())
    }
}

/// Removes what was stored before `since` and is decided: up to message `floor` of the log. A log that is nearly full loses
/// more of what is decided: windows could not be rebuilt by a successor, but a full log would stop all counting. Returns
/// whether it did.
async fn purge_before(connection: &Connection, since: Timestamp, floor: u64) -> Result<bool, BusError> {
    let names = connection.subjects();
    let stream = names.access_stream();
    let needed = first_since(connection, &stream, &names.access("*"), since).await?;
    streams::purge(connection, &stream, None, needed.unwrap_or(floor + 1).min(floor + 1)).await?;
    let info = streams::info(connection, &stream).await?;
    let StreamState { first_seq, .. } = info.state;
    let is_cut = info.is_nearly_full() && first_seq <= floor;
    if is_cut {
        tracing::warn!(
            stream,
            "Stream is nearly full, half of what is decided goes before its time: raise bus.access_max_bytes"
        );
        streams::purge(connection, &stream, None, first_seq + (floor - first_seq) / 2 + 1).await?;
    }
    Ok(is_cut)
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
