//! Detection's metrics. Labels are names from the configuration, never an address or a path.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use crate::engine::Engine;

/// A rule.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RuleLabel {
    /// Its configured name.
    pub rule: String,
}

/// Why events did not count.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ReasonLabel {
    /// A fixed word.
    pub reason: &'static str,
}

/// Where a banned client got through, and what should have kept it out.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct LeakLabel {
    /// Node that logged it; "other" beyond a thousand.
    pub node: String,
    /// A fixed word.
    pub backend: &'static str,
}

/// All of them.
#[derive(Clone, Debug)]
pub struct Metrics {
    events: Counter,
    matches: Family<RuleLabel, Counter>,
    bans: Family<RuleLabel, Counter>,
    uncounted: Family<ReasonLabel, Counter>,
    evicted: Family<ReasonLabel, Counter>,
    clients: Gauge,
    offenders: Gauge,
    banned: Gauge,
    queue: Gauge,
    commit_seconds: Histogram,
    commit_errors: Counter,
    clock_steps: Counter,
    refused_batches: Counter,
    leaks: Family<LeakLabel, Counter>,
}

impl Metrics {
    /// Registers them.
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            events: Counter::default(),
            matches: Family::default(),
            bans: Family::default(),
            uncounted: Family::default(),
            evicted: Family::default(),
            clients: Gauge::default(),
            offenders: Gauge::default(),
            banned: Gauge::default(),
            queue: Gauge::default(),
            // 0.1 ms to 0.8 s.
            commit_seconds: Histogram::new(exponential_buckets(0.0001, 2.0, 14)),
            commit_errors: Counter::default(),
            clock_steps: Counter::default(),
            refused_batches: Counter::default(),
            leaks: Family::default(),
        };
        let leaks = registry.sub_registry_with_prefix("portcullis");
        leaks.register("ban_leaks", "Requests of banned clients that passed", metrics.leaks.clone());
        let registry = registry.sub_registry_with_prefix("portcullis_detect");
        registry.register("events", "Events handled, repetitions aside", metrics.events.clone());
        registry.register("matches", "Events that a rule matched", metrics.matches.clone());
        registry.register("bans", "Bans that a rule decided (in shadow: would have)", metrics.bans.clone());
        registry.register(
            "uncounted",
            "Events that counted for no rule, by reason; those of the future count at their arrival",
            metrics.uncounted.clone(),
        );
        registry.register("evicted", "State dropped because a limit was reached", metrics.evicted.clone());
        registry.register("tracked_clients", "Clients with open windows", metrics.clients.clone());
        registry.register("offenders", "Targets with a ban history", metrics.offenders.clone());
        registry.register("banned_targets", "Targets banned now", metrics.banned.clone());
        registry.register("queued_batches", "Batches that wait for detection", metrics.queue.clone());
        registry.register("commit_seconds", "Time to make a decision durable", metrics.commit_seconds.clone());
        registry.register("commit_errors", "Commits that failed and are tried again", metrics.commit_errors.clone());
        let refused = metrics.refused_batches.clone();
        registry.register("refused_batches", "Batches that cannot be read or speak for another node", refused);
        registry.register("clock_steps_back", "Times the clock went back", metrics.clock_steps.clone());
        metrics
    }

    /// Brings the counters up to the engine's.
    pub fn observe(&self, engine: &Engine, queued: usize) {
        let stats = engine.stats();
        raise(&self.events, stats.events);
        for (rule, (matches, bans)) in engine.config().rules.iter().zip(&stats.rules) {
            let label = RuleLabel { rule: rule.name.to_string() };
            raise(&self.matches.get_or_create(&label), *matches);
            raise(&self.bans.get_or_create(&label), *bans);
        }
        for (reason, count) in [
            ("duplicate", stats.duplicates),
            ("late", stats.late),
            ("future", stats.future),
            ("no_client", stats.no_client),
            ("never_ban", stats.exempt),
            ("while_banned", stats.while_banned),
            ("while_paused", stats.while_paused),
        ] {
            raise(&self.uncounted.get_or_create(&ReasonLabel { reason }), count);
        }
        for (reason, count) in [
            ("tracked_clients", stats.evicted_clients),
            ("offenders", stats.evicted_offenders),
            ("samples", stats.unsampled),
        ] {
            raise(&self.evicted.get_or_create(&ReasonLabel { reason }), count);
        }
        for ((node, backend), count) in engine.leaks() {
            let label = LeakLabel { node: node.clone(), backend };
            raise(&self.leaks.get_or_create(&label), *count);
        }
        let (banned, clients, offenders) = engine.sizes();
        self.banned.set(banned as i64);
        self.clients.set(clients as i64);
        self.offenders.set(offenders as i64);
        self.queue.set(queued as i64);
    }

    /// A commit took that many seconds.
    pub fn committed(&self, seconds: f64) {
        self.commit_seconds.observe(seconds);
    }

    /// A commit failed.
    pub fn commit_failed(&self) {
        self.commit_errors.inc();
    }

    /// A batch cannot be read, or speaks for another node.
    pub fn batch_refused(&self) {
        self.refused_batches.inc();
    }

    /// The clock went back.
    pub fn clock_stepped_back(&self) {
        self.clock_steps.inc();
    }
}

fn raise(counter: &Counter, to: u64) {
    counter.inc_by(to.saturating_sub(counter.get()));
}
