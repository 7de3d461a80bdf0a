//! What enforcement counts, for Prometheus. No label holds an address.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::cloudflare::CloudflareMetrics;
use crate::forwarded::metrics::ForwardedMetrics;

/// Which kind of step.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Kind {
    kind: &'static str,
}

/// Which address family.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct FamilyLabel {
    family: &'static str,
}

/// Which notifier, and what came of a message.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct MessageLabels {
    notifier: String,
    outcome: &'static str,
}

/// Which notifier.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct NotifierLabel {
    notifier: String,
}

/// The counters of one enforcer. Clones share them.
#[derive(Clone, Debug)]
pub struct EnforceMetrics {
    steps: Family<Kind, Counter>,
    members: Family<FamilyLabel, Gauge>,
    messages: Family<MessageLabels, Counter>,
    messages_waiting: Family<NotifierLabel, Gauge>,
    pub(crate) desired: Gauge,
    pub(crate) guarded: Gauge,
    pub(crate) left_out: Gauge,
    pub(crate) refused: Counter,
    pub(crate) failed: Counter,
    pub(crate) repairs: Counter,
    pub(crate) dropped_packets: Counter,
    pub(crate) dropped_bytes: Counter,
    pub(crate) apply_seconds: Histogram,
    pub(crate) log_to_kernel_seconds: Histogram,
    pub(crate) forwarded: ForwardedMetrics,
    pub(crate) cloudflare: CloudflareMetrics,
}

impl EnforceMetrics {
    /// Registers them under the names that dashboards know.
    pub fn register(registry: &mut Registry) -> Self {
        // 0.25 ms to 8 s, each twice the one before.
        let histogram = || Histogram::new(exponential_buckets(0.000_25, 2.0, 16));
        let metrics = Self {
            steps: Family::default(),
            members: Family::default(),
            messages: Family::default(),
            messages_waiting: Family::default(),
            desired: Gauge::default(),
            guarded: Gauge::default(),
            left_out: Gauge::default(),
            refused: Counter::default(),
            failed: Counter::default(),
            repairs: Counter::default(),
            dropped_packets: Counter::default(),
            dropped_bytes: Counter::default(),
            apply_seconds: histogram(),
            log_to_kernel_seconds: histogram(),
            forwarded: ForwardedMetrics::register(registry),
            cloudflare: CloudflareMetrics::register(registry),
        };
        let m = &metrics;
        registry.register("portcullis_enforce_steps", "Steps carried out, by kind", m.steps.clone());
        registry.register("portcullis_enforce_members", "Bans in the kernel, by family", m.members.clone());
        registry.register("portcullis_enforce_desired", "Bans that are wanted", m.desired.clone());
        registry.register("portcullis_enforce_guarded", "Bans that the guard refuses now", m.guarded.clone());
        registry.register("portcullis_enforce_left_out", "Bans left out because of bans_max", m.left_out.clone());
        registry.register("portcullis_enforce_refused", "Steps that the kernel refused", m.refused.clone());
        registry.register("portcullis_enforce_failed", "Batches that could not be applied", m.failed.clone());
        registry.register("portcullis_enforce_repairs", "Times that drift was put right", m.repairs.clone());
        registry.register("portcullis_dropped_packets", "Packets of banned clients", m.dropped_packets.clone());
        registry.register("portcullis_dropped_bytes", "Bytes of banned clients' packets", m.dropped_bytes.clone());
        let messages = "portcullis_notify_messages";
        registry.register(messages, "Tries to deliver a message, by notifier and outcome", m.messages.clone());
        let help = "Events that wait to be told, by notifier";
        registry.register("portcullis_notify_waiting", help, m.messages_waiting.clone());
        let apply = m.apply_seconds.clone();
        registry.register_with_unit("portcullis_enforce_apply", "Time to apply one batch", Unit::Seconds, apply);
        let whole = m.log_to_kernel_seconds.clone();
        let help = "From reading a log line to its ban in the kernel";
        registry.register_with_unit("portcullis_log_to_kernel", help, Unit::Seconds, whole);
        metrics
    }

    pub(crate) fn count_step(&self, kind: &'static str) {
        self.steps.get_or_create(&Kind { kind }).inc();
    }

    pub(crate) fn count_message(&self, notifier: &str, outcome: &'static str) {
        self.messages.get_or_create(&MessageLabels { notifier: notifier.to_owned(), outcome }).inc();
    }

    pub(crate) fn set_messages_waiting(&self, notifier: &str, waiting: u64) {
        let waiting = i64::try_from(waiting).unwrap_or(i64::MAX);
        self.messages_waiting.get_or_create(&NotifierLabel { notifier: notifier.to_owned() }).set(waiting);
    }

    pub(crate) fn set_members(&self, family: &'static str, members: usize) {
        self.members.get_or_create(&FamilyLabel { family }).set(i64::try_from(members).unwrap_or(i64::MAX));
    }
}
