//! The enforcing role of one host: follows the bus, looks at the kernel at intervals, reports, and keeps the last set.

mod search;
mod turns;

use std::collections::BTreeMap;
use std::future::pending;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use proto::api::BackendHold;
use proto::ban::Lists;
use proto::bus::duty::Duties;
use proto::bus::feed::EventSource;
use proto::bus::memory::{BanBucket, Nodes, Question};
use proto::net::{NetSet, Target};
use proto::report::{BackendReport, NodeReport, Problem, Role};
use proto::shutdown::Shutdown;
use proto::time::{Clock, Timestamp};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinError, JoinHandle};
use tokio::time::{MissedTickBehavior, interval};

use crate::action::{Actions, LetGo, Surroundings};
use crate::backend::iptables::Iptables;
use crate::backend::{Rules, RulesOutcome};
use crate::board::Board;
use crate::config::{BackendKind, EnforceConfig};
use crate::error::EnforceError;
use crate::former::Former;
use crate::last_set::{self, LastSet, LastSetError};
use crate::metrics::EnforceMetrics;
use crate::pipeline::search::Search;
use crate::pipeline::turns::Lifted;
use crate::plan::{Family, SKEW_STEP_MS};
use crate::reconcile::{Observed, Reconciler, chain_of};
use crate::standoff::Gate;

/// How often the report is renewed, ended bans are forgotten and the last set is kept, if it changed.
const TICK: Duration = Duration::from_secs(1);
/// How long the start waits for each of: a back end that works, a look at its sets, and its rules in place. After that bans
/// and pauses are followed, and these come when they come. The end waits as long for a look.
const START_WAIT: Duration = Duration::from_secs(5);
/// Keeping the last set may take one part in so many of the time: large sets are kept less often.
const STORE_SHARE: u32 = 20;

/// What the role works on.
#[derive(Debug)]
pub struct Inputs {
    /// Name of this node.
    pub node: Arc<str>,
    /// The ban set.
    pub bans: BanBucket,
    /// Told how many bans are kept from former times that the ban set, which is not known to be whole, lacks.
    pub kept: watch::Sender<u64>,
    /// What detect publishes beside bans. Detect sets it before it publishes its first ban set.
    pub lists: watch::Receiver<Arc<Lists>>,
    /// Questions of `explain`.
    pub questions: mpsc::Receiver<Question>,
    /// Where the report goes.
    pub nodes: Nodes,
    /// What only one host of a cluster does.
    pub duties: Duties,
    /// What happens, for notifiers.
    pub events: EventSource,
    /// Never banned.
    pub trusted_proxies: NetSet,
    /// Servers that connect the cluster, never banned; none on one host.
    pub bus_servers: watch::Receiver<Vec<IpAddr>>,
    /// Where the last set is kept; `None` = nowhere.
    pub state_dir: Option<PathBuf>,
    /// Where the service keeps its state, which a dry run only reads.
    pub service_dir: PathBuf,
    /// Change nothing, neither the firewall nor `state_dir`.
    pub dry_run: bool,
    /// The time.
    pub clock: Clock,
    /// Counters.
    pub metrics: EnforceMetrics,
    /// When to end. Begin it after detect has published its last, which is then still put in force.
    pub shutdown: Shutdown,
}

/// Enforces until the shutdown begins; bans stay in force after that. What the host lacks is said in the report and does
/// not end the role.
///
/// # Errors
/// When a background job panics.
pub async fn run(config: EnforceConfig, inputs: Inputs) -> Result<(), EnforceError> {
    let board = Board::default();
    let gate = Gate::open(inputs.state_dir.clone(), inputs.dry_run).await;
    let host_pause = watch::Sender::new(gate.paused.clone());
    let around = Surroundings::of(&inputs, board.clone(), host_pause.subscribe());
    let actions = Actions::start(&config, &around);
    let mut role = Enforcer::new(config, inputs, Besides { board, actions, gate, host_pause, let_go: around.let_go });
    role.start().await?;
    role.follow().await?;
    role.end().await
}

/// What the role has beside the firewall.
struct Besides {
    board: Board,
    actions: Actions,
    gate: Gate,
    /// For actions of this host.
    host_pause: watch::Sender<Option<String>>,
    let_go: LetGo,
}

struct Enforcer {
    config: EnforceConfig,
    inputs: Inputs,
    reconciler: Reconciler,
    besides: Besides,
    /// Revision of the ban set that is in force.
    in_force: u64,
    /// At home, or away in `rules_job`.
    rules: Option<Rules>,
    rules_job: Option<JoinHandle<(Rules, RulesOutcome)>>,
    /// Former ones, which may have something under way that hangs.
    abandoned: Vec<Iptables>,
    /// Families of the last look at rules.
    rules_families: Vec<Family>,
    /// How far our rules are gone, since the host's pause began.
    lifted: Lifted,
    /// When the firewall was last let go.
    let_go_at: Timestamp,
    /// Looks at the sets, since then, that did not find them empty.
    unlifted_looks: u32,
    search: Search,
    observe_job: Option<JoinHandle<Observed>>,
    former: Former,
    /// Resyncs in a row at which nothing worked.
    broken: u32,
    /// Resyncs in a row with plain rules.
    plain_for: u32,
    store_job: Option<JoinHandle<Result<(), LastSetError>>>,
    outcome: RulesOutcome,
    rules_repairs: u64,
    dropped: (u64, u64),
    /// By back ends that were replaced.
    dropped_before: (u64, u64),
    observed_at: Timestamp,
    stored_at: Timestamp,
    store_took: Duration,
    unstored: bool,
    store_problem: Option<Problem>,
    started_at: Timestamp,
    /// Of the clock, when the kernel's timers were last compared.
    skew_ms: i64,
}

impl Enforcer {
    fn new(config: EnforceConfig, inputs: Inputs, besides: Besides) -> Self {
        let Inputs { trusted_proxies, dry_run, clock, metrics, .. } = &inputs;
        let firewall = config.firewall.clone();
        let mut reconciler =
            Reconciler::new(firewall, trusted_proxies.clone(), *dry_run, clock.clone(), metrics.clone());
        reconciler.begin_paused(besides.gate.paused.clone());
        let former = Former::new(inputs.state_dir.as_deref().filter(|_| !dry_run));
        let (now, raw) = (clock.now(), clock.raw());
        Self {
            config,
            reconciler,
            besides,
            in_force: 0,
            rules: None,
            rules_job: None,
            abandoned: Vec::new(),
            rules_families: Vec::new(),
            lifted: Lifted::No,
            let_go_at: raw,
            unlifted_looks: 0,
            search: Search::default(),
            observe_job: None,
            former,
            broken: 0,
            plain_for: 0,
            store_job: None,
            outcome: RulesOutcome::default(),
            rules_repairs: 0,
            dropped: (0, 0),
            dropped_before: (0, 0),
            observed_at: raw,
            stored_at: raw,
            store_took: Duration::ZERO,
            unstored: false,
            store_problem: None,
            started_at: now,
            skew_ms: 0,
            inputs,
        }
    }

    async fn start(&mut self) -> Result<(), EnforceError> {
        let last = self.load();
        let bans = last.bans.len();
        self.reconciler.start(last);
        // In a pause others may be at work, and to try a back end is to change the firewall.
        if self.besides.gate.paused.is_none() {
            self.begin_search();
        }
        if self.search.job.is_some() {
            self.await_search().await?;
        }
        self.begin_rules();
        self.begin_clearing();
        if self.rules_job.is_some()
            && let Ok(done) = tokio::time::timeout(START_WAIT, finish(&mut self.rules_job)).await
        {
            self.take_rules(done)?;
        }
        let families: Vec<&str> = self.reconciler.frame.families.iter().map(|family| family.as_str()).collect();
        tracing::info!(
            backend = self.reconciler.backend_name(),
            families = families.join(", "),
            rules = self.outcome.detail.join("; "),
            guarded = self.reconciler.frame.guard_nets.len(),
            bans,
            "Enforcing"
        );
        self.tell_kept();
        self.report();
        Ok(())
    }

    async fn follow(&mut self) -> Result<(), EnforceError> {
        let shutdown = self.inputs.shutdown.clone();
        let mut revision = self.inputs.bans.watch();
        let mut tick = ticks(TICK);
        let mut resync = ticks(self.config.firewall.resync_interval);
        // What was published before we followed.
        revision.mark_changed();
        let (mut lists_open, mut questions_open, mut servers_open) = (true, true, true);
        loop {
            tokio::select! {
                biased;
                () = shutdown.draining() => return Ok(()),
                // Bans come last, as many at once: however many follow, they keep no pause and no report from being seen.
                _ = tick.tick() => self.handle_tick().await,
                _ = resync.tick() => self.handle_resync().await,
                changed = self.inputs.lists.changed(), if lists_open => match changed {
                    Ok(()) => self.take_lists().await,
                    Err(_) => lists_open = false,
                },
                changed = self.inputs.bus_servers.changed(), if servers_open => match changed {
                    Ok(()) => self.look_at_host().await,
                    Err(_) => servers_open = false,
                },
                question = self.inputs.questions.recv(), if questions_open => match question {
                    Some(question) => self.answer(question),
                    None => questions_open = false,
                },
                ended = self.besides.actions.next_end() => ended?,
                done = finish(&mut self.rules_job) => self.take_rules(done)?,
                done = finish(&mut self.search.job), if self.may_change_over() => {
                    if self.take_search(done).await? {
                        self.begin_observation(true);
                        self.begin_rules();
                    }
                }
                done = finish(&mut self.former.job) => self.former.take(self.reconciler.method().is_some(), done)?,
                done = finish(&mut self.observe_job) => self.take_observed(done).await?,
                done = finish(&mut self.store_job) => self.take_stored(done)?,
                () = self.reconciler.late() => self.begin_observation(true),
                changed = revision.changed() => if changed.is_ok() { self.take_bans().await },
            }
        }
    }

    /// Puts in force what came last, and keeps it.
    async fn end(mut self) -> Result<(), EnforceError> {
        let (shutdown, firewall) = (self.inputs.shutdown.clone(), self.without_us());
        let work = async {
            self.search.end();
            // Both may have come while something else was done; what is kept for the next start takes the lists along.
            self.take_lists().await;
            self.take_bans().await;
            if self.reconciler.is_failing() {
                // What is not in force waits for a look, which has begun.
                self.await_observation().await?;
            }
            // A change of rules that has begun is not left half done.
            if self.rules_job.is_some() {
                let done = finish(&mut self.rules_job).await;
                self.take_rules(done)?;
            }
            if let Some(job) = self.former.job.take() {
                let _ = job.await;
            }
            if let Some(job) = self.store_job.take() {
                let _ = job.await;
            }
            if let Some(state_dir) = self.state_dir() {
                let set = self.reconciler.last_set();
                let stored = tokio::task::spawn_blocking(move || last_set::store(&state_dir, set)).await;
                if let Ok(Err(error)) = stored {
                    tracing::error!(error = %chain_of(&error), "Last ban set not kept");
                }
            }
            self.besides.actions.end().await?;
            self.report();
            Ok(())
        };
        tokio::select! {
            done = work => {
                done?;
                tracing::info!(firewall, "Stopped enforcing");
            }
            () = shutdown.forced() => tracing::warn!(firewall, "Stopped enforcing before the last changes"),
        }
        Ok(())
    }

    /// Waits for the look that is under way, if there is one, and puts right what it shows.
    async fn await_observation(&mut self) -> Result<(), EnforceError> {
        if self.observe_job.is_some()
            && let Ok(done) = tokio::time::timeout(START_WAIT, finish(&mut self.observe_job)).await
        {
            self.take_observed(done).await?;
        }
        Ok(())
    }

    fn state_dir(&self) -> Option<PathBuf> {
        self.inputs.state_dir.clone().filter(|_| !self.inputs.dry_run)
    }

    fn load(&mut self) -> LastSet {
        let Some(state_dir) = self.state_dir() else { return LastSet::default() };
        last_set::load(&state_dir).map(Option::unwrap_or_default).unwrap_or_else(|error| {
            tracing::error!(error = %chain_of(&error), "Last ban set not used");
            self.store_problem = Some(Problem::warning(chain_of(&error)));
            LastSet::default()
        })
    }

    async fn take_bans(&mut self) {
        let Some(update) = self.inputs.bans.since(self.reconciler.desired.revision()) else { return };
        if !self.reconciler.desired.is_whole() {
            // From now on the bus knows better than the last set.
            self.take_lists().await;
        }
        let was_failing = self.reconciler.is_failing();
        self.reconciler.handle_bans(&update).await;
        self.unstored = true;
        // What fails now may do so because somebody took our sets away.
        self.look_after_failure(was_failing);
    }

    /// Looks at the kernel where a change has just failed, or waits for a look because the last one did.
    fn look_after_failure(&mut self, was_failing: bool) {
        let failed = !was_failing && self.reconciler.is_failing();
        let may = self.observe_job.is_none() && !self.besides.gate.stands_off;
        if may && (failed || self.reconciler.is_change_due()) {
            self.begin_observation(true);
        }
    }

    async fn take_lists(&mut self) {
        let lists = self.inputs.lists.borrow_and_update().clone();
        let was_failing = self.reconciler.is_failing();
        self.reconciler.handle_lists(lists).await;
        self.unstored = true;
        self.look_after_failure(was_failing);
    }

    fn tell_kept(&self) {
        let desired = &self.reconciler.desired;
        let lacks = |target: &Target| !self.inputs.bans.contains(target);
        let kept =
            if desired.is_whole() { 0 } else { desired.all().filter(|(target, _)| lacks(target)).count() as u64 };
        self.inputs.kept.send_if_modified(|known| std::mem::replace(known, kept) != kept);
    }

    /// The cluster's clock has moved: the kernel's own timers were set by the wrong one.
    fn handle_clock(&mut self) {
        let skew = self.inputs.clock.skew_ms().unwrap_or_default();
        if skew.abs_diff(self.skew_ms) >= SKEW_STEP_MS {
            self.skew_ms = skew;
            self.begin_observation(true);
        }
    }

    async fn handle_tick(&mut self) {
        let was_failing = self.reconciler.is_failing();
        self.handle_gate().await;
        self.reconciler.handle_time().await;
        self.look_after_failure(was_failing);
        self.handle_clock();
        self.tell_kept();
        self.store();
        self.report();
    }

    async fn look_at_host(&mut self) {
        let bus_servers = self.inputs.bus_servers.borrow_and_update().clone();
        self.reconciler.handle_host(&bus_servers).await;
    }

    async fn handle_resync(&mut self) {
        self.look_at_host().await;
        self.take_back();
        if !self.besides.gate.stands_off {
            if self.besides.gate.paused.is_none() {
                self.begin_search();
            }
            self.replace_broken();
            self.handle_former();
        }
        self.begin_rules();
        if self.observe_job.is_none() && !self.besides.gate.stands_off {
            let now = self.inputs.clock.raw();
            let all = now.since(self.observed_at) >= self.config.firewall.full_check_interval;
            if all {
                self.observed_at = now;
            }
            self.begin_observation(all);
        }
    }

    fn begin_observation(&mut self, all: bool) {
        if let Some(observation) = self.reconciler.observe(all) {
            self.observe_job = Some(tokio::spawn(observation.run(self.inputs.clock.clone())));
        }
    }

    async fn take_observed(&mut self, done: Result<Observed, JoinError>) -> Result<(), EnforceError> {
        let observed = done.map_err(|source| EnforceError::Job { job: "looks at kernel sets", source })?;
        if self.reconciler.handle_observed(observed).await {
            self.begin_observation(true);
        }
        if self.besides.gate.paused.is_some() {
            self.unlifted_looks += u32::from(!self.reconciler.is_lifted());
            self.stand_off();
            return Ok(());
        }
        // Sets that have just come into being are of no use without rules.
        if self.reconciler.families_ready() != self.rules_families {
            self.begin_rules();
        }
        Ok(())
    }

    fn answer(&self, question: Question) {
        let firewall = self.reconciler.explain(question.address, &self.outcome.places);
        let others = self.besides.board.desk.ask(question.address);
        let node = self.inputs.node.clone();
        tokio::spawn(async move {
            let (firewall, others) = tokio::join!(firewall, others);
            let named = |hold| BackendHold { node: node.to_string(), ..hold };
            // Who asked may have gone.
            let _ = question.reply.send(std::iter::once(firewall).chain(others).map(named).collect());
        });
    }

    fn store(&mut self) {
        let now = self.inputs.clock.raw();
        let rested = now.since(self.stored_at) >= self.store_took * STORE_SHARE;
        let Some(state_dir) = self.state_dir().filter(|_| self.unstored && rested && self.store_job.is_none()) else {
            return;
        };
        // Before the bus has answered, what is on disk is all there is.
        if !self.reconciler.desired.is_whole() {
            return;
        }
        let set = self.reconciler.last_set();
        self.unstored = false;
        self.stored_at = now;
        self.store_job = Some(tokio::task::spawn_blocking(move || last_set::store(&state_dir, set)));
    }

    fn take_stored(&mut self, done: Result<Result<(), LastSetError>, JoinError>) -> Result<(), EnforceError> {
        let stored = done.map_err(|source| EnforceError::Job { job: "keeps the last ban set", source })?;
        self.store_took = self.inputs.clock.raw().since(self.stored_at);
        self.store_problem = stored.err().map(|error| {
            self.unstored = true;
            tracing::error!(error = %chain_of(&error), "Last ban set not kept");
            Problem::degraded(chain_of(&error))
        });
        Ok(())
    }

    fn report(&mut self) {
        // While lists wait, some of it may be lifted for a moment.
        if self.reconciler.is_in_force(&self.outcome) && !self.inputs.lists.has_changed().unwrap_or(false) {
            self.in_force = self.reconciler.desired.revision();
        }
        let (desired, metrics) = (&self.reconciler.desired, &self.inputs.metrics);
        let members = self.reconciler.members();
        for (family, count) in &members {
            metrics.set_members(family.as_str(), *count);
        }
        let gauge = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        let (here, elsewhere) = self.reconciler.desired_here();
        metrics.desired.set(gauge(here));
        metrics.guarded.set(gauge(desired.refused_count()));
        metrics.left_out.set(gauge(desired.left_out()));

        let mut report = NodeReport::new(&self.inputs.node, Role::Enforce, self.started_at);
        report.at = self.inputs.clock.now();
        report.problems = self.reconciler.problems();
        report.problems.extend(self.outcome.problems.iter().cloned());
        report.problems.extend(self.store_problem.iter().chain(&self.former.problem).cloned());
        report.problems.extend(self.besides.gate.problem());
        report.paused = self.reconciler.paused();
        let (backends, problems) = self.besides.board.all();
        report.problems.extend(problems);
        report.backends = vec![BackendReport {
            name: self.reconciler.backend_name().to_owned(),
            detail: self.detail(&members, elsewhere),
            members: members.values().sum::<usize>() as u64,
            desired: here as u64,
            guarded: desired.refused_count() as u64,
            dropped_packets: self.dropped_now().0,
            dropped_bytes: self.dropped_now().1,
            revision: self.in_force,
            repairs: self.reconciler.repairs + self.rules_repairs,
            ..BackendReport::default()
        }];
        report.backends.extend(backends);
        for backend in &mut report.backends {
            backend.confirmed = self.inputs.bans.commit_at(backend.revision);
        }
        self.inputs.nodes.put(report);
    }

    /// `elsewhere`: bans of families that this host lacks.
    fn detail(&self, members: &BTreeMap<Family, usize>, elsewhere: usize) -> Vec<String> {
        let mut detail: Vec<String> = self.reconciler.why().map(str::to_owned).into_iter().collect();
        detail.extend(self.outcome.detail.iter().cloned());
        if self.config.firewall.backend == BackendKind::None {
            detail.push("no firewall is configured".to_owned());
        }
        if self.inputs.dry_run {
            detail.push("dry run: nothing is changed".to_owned());
        }
        if !members.contains_key(&Family::V6) {
            let left =
                if elsewhere == 0 { String::new() } else { format!("; {elsewhere} bans are of no concern to it") };
            detail.push(format!("ipv6: not on this host{left}"));
        }
        detail
    }
}

fn ticks(period: Duration) -> tokio::time::Interval {
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

/// Waits for a job and forgets it; without a job for ever. Dropping the wait leaves the job running.
async fn finish<T>(job: &mut Option<JoinHandle<T>>) -> Result<T, JoinError> {
    match job {
        None => pending().await,
        Some(handle) => {
            let done = handle.await;
            *job = None;
            done
        }
    }
}
