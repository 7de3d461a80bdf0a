//! The one owner of the engine and its state: feeds it batches, commands and time, makes what it decides durable, and
//! then publishes it.
//!
//! Nothing is published before it is stored, so that no enforcer ever holds a ban that a restart does not know.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use proto::api::ExplainReply;
use proto::ban::{BanChange, Lists};
use proto::bus::memory::{BanBucket, Nodes};
use proto::envelope::{CloudEvent, EventType};
use proto::event::{AccessBatch, Interest, Positions};
use proto::report::{DetectReport, NodeReport, Problem, Role, RuleReport};
use proto::time::{Clock, Timestamp};
use tokio::sync::{broadcast, mpsc, oneshot, watch};

use crate::config::DetectConfig;
use crate::engine::command::{Command, Refusal, Reply};
use crate::engine::{Engine, Output, hidden_text};
use crate::error::{DetectError, StoreError};
use crate::metrics::Metrics;
use crate::resolve::Names;
use crate::store::{Commit, Store};

/// Batches handled before what they decided is made durable: bounds how long the first ban among them waits.
const GROUP_MAX: usize = 16;
/// How often progress without a decision is stored, and the report is renewed.
const TICK: Duration = Duration::from_secs(1);
/// Ticks from the reading of headers that new rules look at to these rules: more than a batch takes on its way.
const RELOAD_TICKS: u8 = 1;
/// How far the clock may go back before time follows it; arrival never decreases for less.
const CLOCK_STEP_MAX: Duration = Duration::from_secs(60);
/// Requests that wait for the worker.
pub const REQUESTS_MAX: usize = 256;

/// A request to the worker.
#[derive(Debug)]
pub enum Request {
    /// Carry out a command; answered once its effect is durable.
    Command(Command, oneshot::Sender<Result<Reply, CommandError>>),
    /// Explain an address.
    Explain(IpAddr, oneshot::Sender<ExplainReply>),
    /// A name of `never_ban` was looked up.
    Resolved {
        /// The name.
        name: String,
        /// Its addresses, or why there are none.
        addrs: Result<Vec<IpAddr>, String>,
    },
    /// A new configuration.
    Reload(Box<DetectConfig>),
}

/// Why a command had no effect.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// It must not be.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// It could not be stored; it has taken effect in memory and is stored with the next commit.
    #[error("the state could not be written; the command is in force, but a restart may lose it")]
    NotStored,
}

/// What the worker publishes to.
#[derive(Clone, Debug)]
pub struct Outlets {
    /// The desired state.
    pub bans: BanBucket,
    /// What enforcers must know beside it.
    pub lists: watch::Sender<Arc<Lists>>,
    /// What the rules look at.
    pub interest: watch::Sender<Arc<Interest>>,
    /// Public events.
    pub events: broadcast::Sender<Arc<CloudEvent>>,
    /// Reports.
    pub nodes: Nodes,
    /// Names to resolve.
    pub names: watch::Sender<Names>,
}

/// The worker, made before its tasks start so that ingest learns where to begin.
#[derive(Debug)]
pub struct Worker {
    node: Arc<str>,
    engine: Engine,
    store: Store,
    outlets: Outlets,
    clock: Clock,
    metrics: Metrics,
    started_at: Timestamp,
    problems: Vec<Problem>,
    unresolved: BTreeMap<String, String>,
    pending: Commit,
    /// To be published once `pending` is stored.
    changes: Vec<BanChange>,
    told: Vec<CloudEvent>,
    cause: Option<Timestamp>,
    /// Whether the lists may have changed since they were published.
    lists_changed: bool,
    published: bool,
    store_broken: bool,
    /// A new configuration, and the ticks to wait until batches have what its rules look at.
    reload: Option<(Box<DetectConfig>, u8)>,
}

/// What a worker is made of.
#[derive(Debug)]
pub struct Parts {
    /// Name of this node.
    pub node: Arc<str>,
    /// Rules and limits.
    pub config: DetectConfig,
    /// Where the state is kept; `None` = in memory.
    pub state_dir: Option<std::path::PathBuf>,
    /// What is published.
    pub outlets: Outlets,
    /// Time.
    pub clock: Clock,
    /// Counters.
    pub metrics: Metrics,
}

impl Worker {
    /// Opens the state and publishes what it holds, so that enforcers have the whole set before the first line is read.
    ///
    /// # Errors
    /// When the state cannot be opened.
    pub fn start(parts: Parts) -> Result<Self, StoreError> {
        let Parts { node, config, state_dir, outlets, clock, metrics } = parts;
        let now = clock.now();
        let mut problems = Vec::new();
        let (store, snapshot) = match state_dir {
            Some(dir) => {
                let opened = Store::open(&dir, now)?;
                if let Some(aside) = opened.set_aside {
                    let text = format!("the state was damaged and started anew; the old file is {}", aside.display());
                    problems.push(Problem::degraded(text));
                }
                (opened.store, opened.snapshot)
            }
            None => (Store::in_memory()?, crate::engine::Snapshot::default()),
        };
        let restored = (snapshot.bans.len(), snapshot.offenders.len());
        let mut snapshot = snapshot;
        // A name that left the configuration while we were down is exempt no longer.
        snapshot.control.resolved.retain(|name, _| config.names.contains(name));
        for (_, file) in &mut snapshot.files {
            file.clamp(now);
        }
        let names = Names { names: config.names.clone(), interval: config.resolve_interval };
        let engine = Engine::restore(config.engine, snapshot, now);
        tracing::info!(bans = restored.0, offenders = restored.1, "Detection started");
        let mut worker = Self {
            node,
            engine,
            store,
            outlets,
            clock,
            metrics,
            started_at: now,
            problems,
            unresolved: BTreeMap::new(),
            pending: Commit::default(),
            changes: Vec::new(),
            told: Vec::new(),
            cause: None,
            lists_changed: false,
            published: false,
            store_broken: false,
            reload: None,
        };
        worker.outlets.names.send_replace(names);
        worker.outlets.interest.send_replace(Arc::new(worker.engine.config().interest()));
        worker.outlets.lists.send_replace(Arc::new(worker.engine.lists()));
        worker.collect();
        worker.changes = worker.engine.bans().cloned().map(BanChange::Put).collect();
        worker.settle(true);
        worker.report(0);
        Ok(worker)
    }

    /// Where ingest begins to read the files it knows.
    pub fn read_positions(&mut self) -> Positions {
        let since = self.started_at.saturating_sub(self.engine.config().horizon());
        let node = self.node.clone();
        self.engine.stream().read_positions(&node, since)
    }

    /// Works until every sender of batches is gone, then stores what is left.
    ///
    /// # Errors
    /// When the last of the state cannot be stored.
    pub async fn run(
        mut self,
        mut batches: mpsc::Receiver<AccessBatch>,
        mut requests: mpsc::Receiver<Request>,
    ) -> Result<(), DetectError> {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let timeout = self.engine.poll_timeout().map(|at| at.since(self.clock.now()));
            tokio::select! {
                biased;
                Some(request) = requests.recv() => self.handle_request(request),
                () = tokio::time::sleep(timeout.unwrap_or_default()), if timeout.is_some() => {
                    self.engine.handle_timeout(self.clock.now());
                    self.collect();
                    tokio::task::block_in_place(|| self.settle(false));
                }
                _ = tick.tick() => {
                    self.handle_tick();
                    self.report(batches.len());
                }
                batch = batches.recv() => match batch {
                    Some(batch) => self.handle_batches(batch, &mut batches),
                    None => break,
                },
            }
        }
        self.collect();
        tokio::task::block_in_place(|| self.settle(true));
        self.report(0);
        // One more try, so that the reason is told.
        if self.store_broken { Ok(tokio::task::block_in_place(|| self.store.commit(&self.pending))?) } else { Ok(()) }
    }

    fn handle_batches(&mut self, first: AccessBatch, more: &mut mpsc::Receiver<AccessBatch>) {
        let mut next = Some(first);
        let mut handled = 0;
        while let Some(batch) = next {
            self.cause = Some(batch.read_at);
            self.engine.handle_batch(&batch, self.clock.now());
            self.collect();
            handled += 1;
            next = if handled < GROUP_MAX && self.changes.is_empty() { more.try_recv().ok() } else { None };
        }
        tokio::task::block_in_place(|| self.settle(false));
        self.cause = None;
    }

    fn handle_request(&mut self, request: Request) {
        let now = self.clock.now();
        match request {
            Request::Command(command, reply) => {
                let result = self.engine.handle_command(command, now);
                self.collect();
                tokio::task::block_in_place(|| self.settle(false));
                let stored = !self.store_broken;
                let result = result.map_err(CommandError::from);
                let result = if stored { result } else { result.and(Err(CommandError::NotStored)) };
                // A caller that has gone away does not want the answer.
                let _gone = reply.send(result);
            }
            Request::Explain(address, reply) => {
                let _gone = reply.send(self.engine.explain(address, now));
            }
            Request::Resolved { name, addrs } => self.handle_resolved(name, addrs, now),
            Request::Reload(config) => self.prepare_reload(config, now),
        }
    }

    /// New rules may look at headers that batches do not carry yet, and must not take them for absent. So the wider
    /// interest is published first, and the rules follow when what was read without it has been handled.
    fn prepare_reload(&mut self, config: Box<DetectConfig>, now: Timestamp) {
        let known = self.outlets.interest.borrow().clone();
        let wanted = config.engine.interest();
        if wanted.headers.iter().all(|header| known.headers.contains(header)) {
            self.reload = None;
            return self.take_over(*config, now);
        }
        let mut headers: Vec<String> = known.headers.iter().chain(&wanted.headers).cloned().collect();
        headers.sort_unstable();
        headers.dedup();
        self.outlets.interest.send_replace(Arc::new(Interest { headers, ..Interest::default() }));
        self.reload = Some((config, RELOAD_TICKS));
    }

    fn take_over(&mut self, config: DetectConfig, now: Timestamp) {
        let names = config.names.clone();
        self.outlets.names.send_replace(Names { names: names.clone(), interval: config.resolve_interval });
        self.unresolved.retain(|name, _| names.contains(name));
        let command = Command::Reload { config: Box::new(config.engine), names };
        if let Err(error) = self.engine.handle_command(command, now) {
            tracing::error!(%error, "Configuration was not taken over");
        }
        self.collect();
        tokio::task::block_in_place(|| self.settle(false));
        self.outlets.interest.send_replace(Arc::new(self.engine.config().interest()));
        tracing::info!(rules = self.engine.config().rules.len(), "Rules and lists reloaded");
    }

    fn handle_tick(&mut self) {
        let now = self.clock.now();
        if self.engine.now().since(now) > CLOCK_STEP_MAX {
            self.metrics.clock_stepped_back();
            let back = proto::time::render_duration(self.engine.now().since(now));
            tracing::error!(back, "Clock was set back, time goes on from there");
            self.engine.handle_clock_set_back(now);
        }
        self.reload = match self.reload.take() {
            Some((config, 0)) => {
                self.take_over(*config, now);
                None
            }
            Some((config, ticks)) => Some((config, ticks - 1)),
            None => None,
        };
        tokio::task::block_in_place(|| self.settle(true));
    }

    fn handle_resolved(&mut self, name: String, addrs: Result<Vec<IpAddr>, String>, now: Timestamp) {
        match addrs {
            Ok(addrs) if !addrs.is_empty() => {
                if self.unresolved.remove(&name).is_some() {
                    tracing::info!(name, "Name in never_ban resolves again");
                }
                if self.engine.handle_command(Command::Resolved { name, addrs }, now).is_ok() {
                    self.collect();
                    tokio::task::block_in_place(|| self.settle(false));
                }
            }
            failed => {
                let error = failed.err().unwrap_or_else(|| "no addresses".to_owned());
                if self.unresolved.insert(name.clone(), error.clone()).is_none() {
                    tracing::warn!(name, error, "Name in never_ban cannot be resolved, its last addresses stay");
                }
            }
        }
    }

    /// Takes over what the engine wants done.
    fn collect(&mut self) {
        while let Some(output) = self.engine.poll_output() {
            match output {
                Output::Record(change) => {
                    let record = if let BanChange::Put(record) = &change { Some(record.clone()) } else { None };
                    self.pending.records.insert(change.target(), record);
                    self.changes.push(change);
                }
                Output::Offender(target, offender) => drop(self.pending.offenders.insert(target, offender)),
                Output::Control => {
                    self.pending.control = Some(self.engine.control());
                    self.lists_changed = true;
                }
                Output::Told(kind, ban) => {
                    let time = self.clock.now();
                    self.told.push(CloudEvent::of_ban(&self.node, kind, &ban, time));
                }
                Output::Shadow(ban) => {
                    tracing::info!(rule = ban.rule, target = %ban.target, reason = ban.reason, "Shadow rule would have banned");
                }
                Output::Over(ban) => {
                    tracing::info!(rule = ban.rule, target = %ban.target, ended = ?ban.expires_at, "Ban was over when it was found");
                }
                Output::Alarm { kind, text } => {
                    tracing::warn!(kind, text, "Alarm");
                    let alarm = CloudEvent::of_alarm(&self.node, kind, text, self.clock.now());
                    self.told.push(alarm);
                }
            }
        }
    }

    /// Stores what is pending, then publishes it. Progress alone is stored only when `all` is wanted.
    fn settle(&mut self, all: bool) {
        if all || self.pending.is_urgent() {
            // The position moves with each decision, so it is stored with every one.
            if self.pending.is_urgent() {
                self.pending.control = Some(self.engine.control());
            }
            let (files, forgotten) = self.engine.stream().take_changes();
            merge_files(&mut self.pending.files, files);
            self.pending.forgotten.extend(forgotten);
            self.commit();
        }
        if self.store_broken && !self.changes.is_empty() {
            // A host that cannot write must still be protected: publish all the same.
            tracing::warn!(changes = self.changes.len(), "Bans are published without being stored");
        }
        if !self.changes.is_empty() || !self.published {
            self.published = true;
            self.outlets.bans.publish(self.changes.drain(..), self.cause);
        }
        if std::mem::take(&mut self.lists_changed) {
            self.outlets.lists.send_replace(Arc::new(self.engine.lists()));
        }
        for event in self.told.drain(..) {
            log_event(&event);
            // Without a reader there is nobody to tell.
            let _unread = self.outlets.events.send(Arc::new(event));
        }
    }

    fn commit(&mut self) {
        if self.pending.is_empty() {
            return;
        }
        let begun = self.clock.now();
        match self.store.commit(&self.pending) {
            Ok(()) => {
                self.metrics.committed(self.clock.now().since(begun).as_secs_f64());
                self.pending = Commit::default();
                if std::mem::take(&mut self.store_broken) {
                    tracing::info!("State is written again");
                }
            }
            Err(error) => {
                self.metrics.commit_failed();
                if !std::mem::replace(&mut self.store_broken, true) {
                    let cause = std::error::Error::source(&error).map(ToString::to_string);
                    tracing::error!(%error, cause, "State cannot be written, it is tried again");
                }
            }
        }
    }

    fn report(&self, queued: usize) {
        self.metrics.observe(&self.engine, queued);
        let now = self.clock.now();
        let mut report = NodeReport::new(&self.node, Role::Detect, self.started_at);
        report.at = now;
        report.problems = self.current_problems();
        let stats = self.engine.stats();
        let (banned, clients, offenders) = self.engine.sizes();
        let rules = self.engine.config().rules.iter().zip(&stats.rules);
        report.detect = Some(DetectReport {
            rules: rules
                .map(|(rule, (matches, bans))| RuleReport {
                    name: rule.name.to_string(),
                    mode: rule.mode.as_str().to_owned(),
                    matches: *matches,
                    bans: *bans,
                })
                .collect(),
            tracked_clients: clients as u64,
            offenders: offenders as u64,
            banned: banned as u64,
            evicted_clients: stats.evicted_clients,
            evicted_offenders: stats.evicted_offenders,
            events: stats.events,
            late: stats.late,
            duplicates: stats.duplicates,
            future: stats.future,
            allowed: self.engine.allowed(),
            paused: self.engine.paused(),
            hidden_behind: self.engine.hidden_behind().map(|(addr, share)| (addr.to_string(), share)),
        });
        self.outlets.nodes.put(report);
    }

    fn current_problems(&self) -> Vec<Problem> {
        let mut problems = self.problems.clone();
        let stats = self.engine.stats();
        if self.store_broken {
            let text = "the state cannot be written: bans are enforced, but a restart may lose them";
            problems.push(Problem::degraded(text));
        }
        if stats.evicted_clients > 0 {
            let text = format!(
                "{} clients' windows were dropped at tracked_clients_max or window_events_max: they may go unbanned",
                stats.evicted_clients
            );
            problems.push(Problem::degraded(text));
        }
        if stats.evicted_offenders > 0 {
            let text = format!("{} ban histories were dropped at offenders_max", stats.evicted_offenders);
            problems.push(Problem::degraded(text));
        }
        if self.engine.rebuild_losses() > 0 {
            let text = "more files, or decisions in one file, than are remembered: a restart may lose some counts";
            problems.push(Problem::warning(text));
        }
        if let Some((addr, share)) = self.engine.hidden_behind() {
            problems.push(Problem::warning(hidden_text(addr, share)));
        }
        if self.engine.paused().is_some() {
            problems.push(Problem::warning("paused: all bans are lifted and nobody is banned"));
        }
        for (name, error) in &self.unresolved {
            problems.push(Problem::warning(format!("{name} in never_ban cannot be resolved: {error}")));
        }
        problems
    }
}

/// Joins two changes of one file that follow each other, where the first could not be stored.
fn merge_files(pending: &mut Vec<crate::engine::stream::FileChange>, newer: Vec<crate::engine::stream::FileChange>) {
    for mut change in newer {
        if let Some(at) = pending.iter().position(|known| known.key == change.key) {
            let former = pending.swap_remove(at);
            let kept = former.marks.into_iter().filter(|mark| mark.offset < change.unsaved_from);
            change.marks = kept.chain(std::mem::take(&mut change.marks)).collect();
            change.unsaved_from = change.unsaved_from.min(former.unsaved_from);
        }
        pending.push(change);
    }
}

fn log_event(event: &CloudEvent) {
    let proto::envelope::Data::Ban(ban) = &event.data else { return };
    let (target, until) = (ban.target, ban.expires_at.map(|end| end.to_string()));
    match event.kind {
        EventType::Ban => tracing::info!(
            %target, rule = ban.rule, count = ban.ban_count, seconds = ban.ban_seconds, until, reason = ban.reason,
            "Client banned"
        ),
        EventType::Extend => tracing::info!(
            %target, rule = ban.rule, count = ban.ban_count, seconds = ban.ban_seconds, until, reason = ban.reason,
            "Ban extended"
        ),
        EventType::Unban => tracing::info!(%target, rule = ban.rule, reason = ban.reason, "Client unbanned"),
        EventType::Alarm => {}
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::registry::Registry;
    use proto::bus::memory::Bus;
    use proto::client_ip::Client;
    use proto::event::{Event, FileSpan};

    use super::*;

    const LINE_BYTES: u64 = 100;

    struct Host {
        dir: tempfile::TempDir,
        clock: Clock,
    }

    impl Host {
        fn new() -> Self {
            Self { dir: tempfile::tempdir().unwrap(), clock: Clock::manual(Timestamp::from_secs(1_767_225_600)) }
        }

        fn start(&self) -> (Worker, Bus) {
            let bus = Bus::new();
            let outlets = Outlets {
                bans: bus.bans.clone(),
                lists: bus.lists.clone(),
                interest: bus.interest.clone(),
                events: bus.events.clone(),
                nodes: bus.nodes.clone(),
                names: watch::Sender::new(Names::default()),
            };
            let parts = Parts {
                node: "n".into(),
                config: DetectConfig::default(),
                state_dir: Some(self.dir.path().to_owned()),
                outlets,
                clock: self.clock.clone(),
                metrics: Metrics::new(&mut Registry::default()),
            };
            (Worker::start(parts).unwrap(), bus)
        }

        /// Bad requests of one client, one a second.
        fn batch(&self, lines: std::ops::Range<u64>) -> AccessBatch {
            let mut batch = AccessBatch::new("n".into(), "s".into(), self.clock.now());
            for line in lines.clone() {
                let client = Ok(Client { addr: "192.0.2.1".parse().unwrap(), via_proxy: false });
                let time = Some(Timestamp::from_secs(1_767_225_600 - 60 + line as i64));
                batch.push(&Event { time, client, status: 404, offset: line * LINE_BYTES, ..Event::default() });
            }
            batch.span = Some(FileSpan { generation: 7, start: lines.start * LINE_BYTES, end: lines.end * LINE_BYTES });
            batch
        }
    }

    fn feed(worker: &mut Worker, batch: &AccessBatch) {
        worker.engine.handle_batch(batch, worker.clock.now());
        worker.collect();
        worker.settle(false);
    }

    #[test]
    fn a_kill_at_fourteen_of_fifteen_loses_no_count_and_doubles_no_ban() {
        let host = Host::new();
        let (mut worker, _bus) = host.start();
        feed(&mut worker, &host.batch(0..14));
        worker.settle(true);
        drop(worker);

        let (mut worker, bus) = host.start();
        let position = worker.read_positions()[&("s".to_owned(), 7)];
        assert_eq!((position.offset, position.needed), (0, true));
        feed(&mut worker, &host.batch(0..14));
        assert!(bus.bans.all().is_empty(), "fourteen are fourteen, however often they are read");
        feed(&mut worker, &host.batch(14..15));
        let bans = bus.bans.all();
        assert_eq!(bans[0].bans[0].evidence.failures, 15);
        drop(worker);

        let (mut worker, bus) = host.start();
        assert_eq!(bus.bans.all(), bans, "published before anything is read, with the same end");
        feed(&mut worker, &host.batch(0..15));
        assert_eq!((bus.bans.all(), worker.engine.stats().rules[1].1), (bans, 0));
    }

    #[test]
    fn what_was_not_stored_is_read_and_decided_again() {
        let host = Host::new();
        let (mut worker, _bus) = host.start();
        // Handled, but the process dies before it can store anything.
        worker.engine.handle_batch(&host.batch(0..20), host.clock.now());
        drop(worker);
        let (mut worker, bus) = host.start();
        assert!(worker.read_positions().is_empty() && bus.bans.all().is_empty());
        feed(&mut worker, &host.batch(0..20));
        assert_eq!(bus.bans.all().len(), 1);
    }

    #[test]
    fn changes_of_one_file_that_could_not_be_stored_are_joined() {
        use crate::engine::stream::{FileChange, FileKey, Mark, Position, Ranges};
        let mark = |offset, position| Mark { offset, position: Position(position), arrival: Timestamp::EPOCH };
        let change = |unsaved_from, marks: &[Mark]| FileChange {
            key: FileKey { node: "n".into(), source: "s".into(), generation: 1 },
            decided: Ranges::default(),
            last_arrival: Timestamp::EPOCH,
            marks_from: 0,
            unsaved_from,
            marks: marks.to_vec(),
        };
        let mut pending = vec![change(10, &[mark(10, 1), mark(20, 2), mark(30, 3)])];
        merge_files(&mut pending, vec![change(30, &[mark(30, 4), mark(40, 5)])]);
        assert_eq!(pending, [change(10, &[mark(10, 1), mark(20, 2), mark(30, 4), mark(40, 5)])]);
    }
}
