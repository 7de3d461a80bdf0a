//! What every detector does, wherever its state is kept: runs the engine and gathers what it wants stored, enforced and
//! told, until whoever runs this has stored it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use proto::api::ExplainReply;
use proto::ban::BanChange;
use proto::bus::memory::Question;
use proto::envelope::{CloudEvent, EventType};
use proto::report::{DetectReport, NodeReport, Problem, Role, RuleReport};
use proto::time::{Clock, Timestamp};
use tokio::sync::{mpsc, watch};

use crate::config::DetectConfig;
use crate::engine::command::Command;
use crate::engine::leak::Confirmations;
use crate::engine::{Engine, Output, hidden_text};
use crate::leaks::{Answered, Inquiries, views, weigh};
use crate::metrics::Metrics;
use crate::resolve::Names;
use crate::store::Commit;

/// How far the clock may go back before time follows it; arrival never decreases for less.
const CLOCK_STEP_MAX: std::time::Duration = std::time::Duration::from_secs(60);
/// How long `status` is degraded after a leak.
const LEAK_SHOWN: std::time::Duration = std::time::Duration::from_secs(600);

/// The engine, and what it has decided since it was last stored.
#[derive(Debug)]
pub(crate) struct Decider {
    pub(crate) node: Arc<str>,
    pub(crate) engine: Engine,
    pub(crate) clock: Clock,
    pub(crate) metrics: Metrics,
    pub(crate) started_at: Timestamp,
    pub(crate) problems: Vec<Problem>,
    /// Names of `never_ban` that cannot be resolved, and why.
    unresolved: BTreeMap<String, String>,
    names: watch::Sender<Names>,
    pub(crate) pending: Commit,
    /// To be published once `pending` is stored.
    pub(crate) changes: Vec<BanChange>,
    pub(crate) told: Vec<CloudEvent>,
    /// Whether the lists may have changed since they were published.
    pub(crate) lists_changed: bool,
    /// Leaks whose keeper is asked.
    pub(crate) inquiries: Inquiries,
    last_leak: Option<(Timestamp, String)>,
}

/// What a detector is, whatever it has decided.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    pub(crate) node: Arc<str>,
    pub(crate) clock: Clock,
    pub(crate) metrics: Metrics,
    pub(crate) names: watch::Sender<Names>,
    pub(crate) questions: mpsc::Sender<Question>,
    pub(crate) started_at: Timestamp,
}

impl Decider {
    pub(crate) fn new(identity: Identity, engine: Engine) -> Self {
        let Identity { node, clock, metrics, names, questions, started_at } = identity;
        Self {
            node,
            engine,
            clock,
            metrics,
            started_at,
            problems: Vec::new(),
            unresolved: BTreeMap::new(),
            names,
            pending: Commit::default(),
            changes: Vec::new(),
            told: Vec::new(),
            lists_changed: false,
            inquiries: Inquiries::new(questions),
            last_leak: None,
        }
    }

    /// Has the rules and lists of `config` take the place of those in force.
    pub(crate) fn take_over(&mut self, config: DetectConfig, now: Timestamp) {
        let names = config.names.clone();
        self.names.send_replace(Names { names: names.clone(), interval: config.resolve_interval });
        self.unresolved.retain(|name, _| names.contains(name));
        let command = Command::Reload { config: Box::new(config.engine), names };
        if let Err(error) = self.engine.handle_command(command, now) {
            tracing::error!(%error, "Configuration was not taken over");
        }
        self.collect();
        tracing::info!(rules = self.engine.config().rules.len(), "Rules and lists reloaded");
    }

    /// Takes the answer to a look-up.
    pub(crate) fn handle_resolved(&mut self, name: String, addrs: Result<Vec<IpAddr>, String>, now: Timestamp) {
        match addrs {
            Ok(addrs) if !addrs.is_empty() => {
                if self.unresolved.remove(&name).is_some() {
                    tracing::info!(name, "Name in never_ban resolves again");
                }
                if self.engine.handle_command(Command::Resolved { name, addrs }, now).is_ok() {
                    self.collect();
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

    /// Follows the clock when it was set back by so much that bans would seem over before they begin.
    pub(crate) fn handle_clock(&mut self, now: Timestamp) {
        if self.engine.now().since(now) > CLOCK_STEP_MAX {
            self.metrics.clock_stepped_back();
            let back = proto::time::render_duration(self.engine.now().since(now));
            tracing::error!(back, "Clock was set back, time goes on from there");
            self.engine.handle_clock_set_back(now);
        }
    }

    /// Takes over what the engine wants done.
    pub(crate) fn collect(&mut self) {
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
                Output::Leak(leak) => self.inquiries.ask(leak),
                Output::Alarm { kind, text } => self.raise_alarm(kind, text),
            }
        }
    }

    /// Learns from the reports of all hosts which bans are in force where.
    pub(crate) fn observe_back_ends(&mut self, reports: &[NodeReport]) {
        self.engine.observe_back_ends(views(reports), self.clock.now());
    }

    /// Tells of a leak, unless the host that should have kept the client out lets it pass on purpose.
    pub(crate) fn handle_answer(&mut self, (mut leak, holds): Answered) {
        let (is_spared, answers) = weigh(&mut leak, &holds);
        self.engine.judge_leak(leak.client, is_spared);
        if is_spared {
            tracing::info!(client = %leak.client, node = leak.node, why = answers.join("; "), "Banned client is let pass");
            return;
        }
        let text = leak.text(&answers);
        self.last_leak = Some((self.clock.now(), text.clone()));
        self.raise_alarm("ban-leak", text);
    }

    /// What the engine knows of an address, and since when back ends have its bans in force.
    pub(crate) fn explain(&self, address: IpAddr, now: Timestamp) -> (ExplainReply, Confirmations) {
        let reply = self.engine.explain(address, now);
        let known = self.engine.confirmations(reply.address);
        (reply, known)
    }

    /// Tells of something that needs a person.
    pub(crate) fn raise_alarm(&mut self, kind: &str, text: String) {
        tracing::warn!(kind, text, "Alarm");
        self.told.push(CloudEvent::of_alarm(&self.node, kind, text, self.clock.now()));
    }

    /// Says how detection is. `queued` batches wait; `problem` is of whoever runs this.
    pub(crate) fn report(&self, queued: usize, problem: Option<Problem>) -> NodeReport {
        self.metrics.observe(&self.engine, queued);
        let now = self.clock.now();
        let mut report = NodeReport::new(&self.node, Role::Detect, self.started_at);
        report.at = now;
        report.problems = self.current_problems();
        report.problems.extend(problem);
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
            leaks: self.engine.leaks().values().sum(),
            fingerprint: String::new(),
            floor: 0,
            hidden_behind: self.engine.hidden_behind().map(|(addr, share)| (addr.to_string(), share)),
        });
        report
    }

    fn current_problems(&self) -> Vec<Problem> {
        let mut problems = self.problems.clone();
        let stats = self.engine.stats();
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
        if let Some((_, text)) = self.last_leak.as_ref().filter(|(at, _)| self.clock.now().since(*at) < LEAK_SHOWN) {
            problems.push(Problem::degraded(text.clone()));
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

/// Says a public event in the log.
pub(crate) fn log_event(event: &CloudEvent) {
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
