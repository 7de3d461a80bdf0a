//! The one owner of the engine and its state: feeds it batches, commands and time, makes what it decides durable, and
//! then publishes it.
//!
//! Nothing is published before it is stored, so that no enforcer ever holds a ban that a restart does not know.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use proto::api::ExplainReply;
use proto::ban::{BanChange, Lists};
use proto::bus::memory::{BanBucket, Nodes, Question};
use proto::envelope::CloudEvent;
use proto::event::{AccessBatch, Interest, Positions, Receipt};
use proto::head::Mark;
use proto::report::Problem;
use proto::time::{Clock, Timestamp};
use tokio::sync::{broadcast, mpsc, oneshot, watch};

use crate::config::DetectConfig;
use crate::decider::{Decider, Identity, log_event};
use crate::engine::Engine;
use crate::engine::command::{Command, Refusal, Reply};
use crate::engine::leak::Confirmations;
use crate::error::{DetectError, StoreError};
use crate::metrics::Metrics;
use crate::peers::Peers;
use crate::resolve::Names;
use crate::store::{Commit, Store};

/// Batches handled before what they decided is made durable: bounds how long the first ban among them waits.
const GROUP_MAX: usize = 16;
/// How often progress without a decision is stored, and the report is renewed.
const TICK: Duration = Duration::from_secs(1);
/// Ticks from the reading of headers that new rules look at to these rules: more than a batch takes on its way.
const RELOAD_TICKS: u8 = 1;
/// Requests that wait for the worker.
pub const REQUESTS_MAX: usize = 256;

/// A request to the worker.
#[derive(Debug)]
pub enum Request {
    /// Carry out a command; answered once its effect is durable.
    Command(Command, oneshot::Sender<Result<Reply, CommandError>>),
    /// Explain an address, and tell since when back ends have it in force.
    Explain(IpAddr, oneshot::Sender<(ExplainReply, Confirmations)>),
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
    /// No detector decides right now, or it is not this one any more.
    #[error("no detector is active right now, try again in a moment; the order may have been carried out")]
    NotActive,
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
    /// To enforcers.
    pub questions: mpsc::Sender<Question>,
}

/// The worker, made before its tasks start so that ingest learns where to begin.
#[derive(Debug)]
pub struct Worker {
    decider: Decider,
    store: Store,
    outlets: Outlets,
    cause: Option<Timestamp>,
    /// Publications so far: on one host, each is a commit.
    published: u64,
    peers: Peers,
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
        let (names_out, questions) = (outlets.names.clone(), outlets.questions.clone());
        let identity = Identity { node, clock, metrics, names: names_out, questions, started_at: now };
        let mut decider = Decider::new(identity, engine);
        decider.problems = problems;
        let (cause, reload) = (None, None);
        let mut worker =
            Self { decider, store, outlets, cause, published: 0, peers: Peers::default(), store_broken: false, reload };
        worker.outlets.names.send_replace(names);
        worker.outlets.interest.send_replace(Arc::new(worker.decider.engine.config().interest()));
        worker.outlets.lists.send_replace(Arc::new(worker.decider.engine.lists()));
        worker.decider.collect();
        worker.decider.changes = worker.decider.engine.bans().cloned().map(BanChange::Put).collect();
        worker.settle(true);
        worker.report(0);
        Ok(worker)
    }

    /// Where ingest begins to read the files it knows.
    pub fn read_positions(&mut self) -> Positions {
        let since = self.decider.started_at.saturating_sub(self.decider.engine.config().horizon());
        let node = self.decider.node.clone();
        self.decider.engine.stream().read_positions(&node, since)
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
            let timeout = self.decider.engine.poll_timeout().map(|at| at.since(self.decider.clock.now()));
            tokio::select! {
                biased;
                Some(request) = requests.recv() => self.handle_request(request),
                () = tokio::time::sleep(timeout.unwrap_or_default()), if timeout.is_some() => {
                    self.decider.engine.handle_timeout(self.decider.clock.now());
                    self.decider.collect();
                    tokio::task::block_in_place(|| self.settle(false));
                }
                answered = self.decider.inquiries.next() => {
                    self.decider.handle_answer(answered);
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
        self.decider.collect();
        tokio::task::block_in_place(|| self.settle(true));
        self.report(0);
        // One more try, so that the reason is told.
        if self.store_broken {
            Ok(tokio::task::block_in_place(|| self.store.commit(&self.decider.pending))?)
        } else {
            Ok(())
        }
    }

    fn handle_batches(&mut self, first: AccessBatch, more: &mut mpsc::Receiver<AccessBatch>) {
        let mut next = Some(first);
        let mut handled = 0;
        let mut receipts = Vec::new();
        while let Some(mut batch) = next {
            self.cause = Some(batch.read_at);
            self.decider.engine.handle_batch(&batch, self.decider.clock.now());
            self.decider.collect();
            receipts.append(&mut batch.receipts);
            handled += 1;
            next = if handled < GROUP_MAX && self.decider.changes.is_empty() { more.try_recv().ok() } else { None };
        }
        tokio::task::block_in_place(|| self.settle(false));
        self.cause = None;
        // What the lines led to is stored; where that cannot be, it is in force all the same.
        receipts.into_iter().for_each(Receipt::deliver);
    }

    fn handle_request(&mut self, request: Request) {
        let now = self.decider.clock.now();
        match request {
            Request::Command(command, reply) => {
                let result = self.decider.engine.handle_command(command, now);
                self.decider.collect();
                tokio::task::block_in_place(|| self.settle(false));
                let stored = !self.store_broken;
                let result = result.map_err(CommandError::from);
                let result = if stored { result } else { result.and(Err(CommandError::NotStored)) };
                // A caller that has gone away does not want the answer.
                let _gone = reply.send(result);
            }
            Request::Explain(address, reply) => {
                let _gone = reply.send(self.decider.explain(address, now));
            }
            Request::Resolved { name, addrs } => {
                self.decider.handle_resolved(name, addrs, now);
                tokio::task::block_in_place(|| self.settle(false));
            }
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
        self.decider.take_over(config, now);
        tokio::task::block_in_place(|| self.settle(false));
        self.outlets.interest.send_replace(Arc::new(self.decider.engine.config().interest()));
    }

    fn handle_tick(&mut self) {
        let now = self.decider.clock.now();
        self.decider.handle_clock(now);
        self.look_around(now);
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

    /// Takes in how the other roles are, and raises alarms of what is degraded.
    fn look_around(&mut self, now: Timestamp) {
        let reports = self.outlets.nodes.all();
        self.decider.observe_back_ends(&reports);
        let node = self.decider.node.clone();
        let mut alarms = self.peers.look(&reports, &node, "", now);
        alarms.extend(self.broken().and_then(|problem| self.peers.note_own(&node, &problem, now)));
        for (kind, text) in alarms {
            self.decider.raise_alarm(kind, text);
        }
    }

    /// Stores what is pending, then publishes it. Progress alone is stored only when `all` is wanted.
    fn settle(&mut self, all: bool) {
        if all || self.decider.pending.is_urgent() {
            // The position moves with each decision, so it is stored with every one.
            if self.decider.pending.is_urgent() {
                self.decider.pending.control = Some(self.decider.engine.control());
            }
            let (files, forgotten) = self.decider.engine.stream().take_changes();
            merge_files(&mut self.decider.pending.files, files);
            self.decider.pending.forgotten.extend(forgotten);
            self.commit();
        }
        if self.store_broken && !self.decider.changes.is_empty() {
            // A host that cannot write must still be protected: publish all the same.
            tracing::warn!(changes = self.decider.changes.len(), "Bans are published without being stored");
        }
        let is_new = self.published == 0 || !self.decider.changes.is_empty() || self.decider.lists_changed;
        if !self.decider.changes.is_empty() || self.published == 0 {
            self.outlets.bans.publish(self.decider.changes.drain(..), self.cause);
        }
        if std::mem::take(&mut self.decider.lists_changed) {
            self.outlets.lists.send_replace(Arc::new(self.decider.engine.lists()));
        }
        if is_new {
            self.published += 1;
            let mark = Mark { epoch: 0, commit: self.published };
            self.outlets.bans.reach(mark);
            let turn = self.decider.engine.leak_turn();
            self.decider.engine.publish_leaks(turn, mark, self.decider.clock.now());
        }
        for event in self.decider.told.drain(..) {
            log_event(&event);
            // Without a reader there is nobody to tell.
            let _unread = self.outlets.events.send(Arc::new(event));
        }
    }

    fn commit(&mut self) {
        if self.decider.pending.is_empty() {
            return;
        }
        let begun = self.decider.clock.now();
        match self.store.commit(&self.decider.pending) {
            Ok(()) => {
                self.decider.metrics.committed(self.decider.clock.now().since(begun).as_secs_f64());
                self.decider.pending = Commit::default();
                if std::mem::take(&mut self.store_broken) {
                    tracing::info!("State is written again");
                }
            }
            Err(error) => {
                self.decider.metrics.commit_failed();
                if !std::mem::replace(&mut self.store_broken, true) {
                    let cause = std::error::Error::source(&error).map(ToString::to_string);
                    tracing::error!(%error, cause, "State cannot be written, it is tried again");
                }
            }
        }
    }

    fn report(&self, queued: usize) {
        self.outlets.nodes.put(self.decider.report(queued, self.broken()));
    }

    fn broken(&self) -> Option<Problem> {
        let text = "the state cannot be written: bans are enforced, but a restart may lose them";
        self.store_broken.then(|| Problem::degraded(text))
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

#[cfg(test)]
mod tests {
    use prometheus_client::registry::Registry;
    use proto::api::BackendHold;
    use proto::bus::memory::Bus;
    use proto::client_ip::Client;
    use proto::envelope::Data;
    use proto::event::{Event, FileSpan};
    use proto::report::{BackendReport, NodeReport, Role};

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
                questions: bus.questions.clone(),
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
        worker.decider.engine.handle_batch(batch, worker.decider.clock.now());
        worker.decider.collect();
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
        assert_eq!((bus.bans.all(), worker.decider.engine.stats().rules[1].1), (bans, 0));
    }

    #[test]
    fn what_was_not_stored_is_read_and_decided_again() {
        let host = Host::new();
        let (mut worker, _bus) = host.start();
        // Handled, but the process dies before it can store anything.
        worker.decider.engine.handle_batch(&host.batch(0..20), host.clock.now());
        drop(worker);
        let (mut worker, bus) = host.start();
        assert!(worker.read_positions().is_empty() && bus.bans.all().is_empty());
        feed(&mut worker, &host.batch(0..20));
        assert_eq!(bus.bans.all().len(), 1);
    }

    /// What the enforcer of this host says now.
    fn enforcer(host: &Host, bus: &Bus, problems: Vec<Problem>) -> NodeReport {
        let revision = bus.bans.since(0).unwrap().revision;
        let mut report = NodeReport::new("n", Role::Enforce, host.clock.now());
        let confirmed = bus.bans.commit_at(revision);
        report.backends = vec![BackendReport { name: "iptables".into(), confirmed, ..BackendReport::default() }];
        report.problems = problems;
        report
    }

    #[test]
    fn what_is_degraded_on_one_host_is_an_alarm_once() {
        let host = Host::new();
        let (mut worker, bus) = host.start();
        let mut told = bus.events.subscribe();
        let problems = vec![Problem::degraded("ipset is not installed"), Problem::warning("no matter")];
        bus.nodes.put(enforcer(&host, &bus, problems));
        worker.handle_tick();
        worker.handle_tick();
        let alarm = told.try_recv().unwrap();
        assert_eq!(alarm.subject, "node-degraded");
        let Data::Alarm(alarm) = &alarm.data else { panic!("an alarm") };
        assert_eq!(alarm.text, "enforce on n: ipset is not installed");
        assert!(told.try_recv().is_err());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_leak_is_told_with_what_the_enforcer_says_unless_it_lets_the_client_pass_on_purpose() {
        for spared in [false, true] {
            let host = Host::new();
            let (mut worker, mut bus) = host.start();
            let mut told = bus.events.subscribe();
            let target = "192.0.2.1".parse().unwrap();
            let order = Command::Ban { target, length: None, reason: String::new() };
            worker.decider.engine.handle_command(order, host.clock.now()).unwrap();
            worker.decider.collect();
            worker.settle(false);
            bus.nodes.put(enforcer(&host, &bus, Vec::new()));
            worker.handle_tick();
            host.clock.set(host.clock.now().saturating_add(Duration::from_secs(5)));
            let mut batch = AccessBatch::new("n".into(), "s".into(), host.clock.now());
            let client = Ok(Client { addr: target.addr(), via_proxy: false });
            batch.push(&Event { time: Some(host.clock.now()), client, status: 200, ..Event::default() });
            feed(&mut worker, &batch);

            let question = bus.questions_in.recv().await.unwrap();
            let (node, backend, detail) = ("n".to_owned(), "iptables".to_owned(), "what it knows".to_owned());
            question.reply.send(vec![BackendHold { node, backend, detail, spared, ..BackendHold::default() }]).unwrap();
            let answered = worker.decider.inquiries.next().await;
            worker.decider.handle_answer(answered);
            worker.settle(false);
            let events: Vec<_> = std::iter::from_fn(|| told.try_recv().ok()).collect();
            let leaks: Vec<_> = events.iter().filter(|event| event.subject == "ban-leak").collect();
            assert_eq!(leaks.len(), usize::from(!spared), "{events:?}");
            let report = worker.decider.report(0, None);
            assert_eq!(report.detect.unwrap().leaks, u64::from(!spared));
            assert_eq!(report.problems.iter().any(|problem| problem.text.contains("what it knows")), !spared);
        }
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
