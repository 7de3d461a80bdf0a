//! What is counted of Cloudflare.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

/// What came of a call.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

/// Clones share them.
#[derive(Clone, Debug, Default)]
pub(crate) struct CloudflareMetrics {
    calls: Family<Outcome, Counter>,
    pub(super) entries: Gauge,
    pub(super) queue: Gauge,
    pub(super) queue_age_seconds: Gauge,
    pub(super) left_out: Gauge,
}

impl CloudflareMetrics {
    /// Registers them.
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let m = Self::default();
        registry.register("portcullis_cloudflare_calls", "Calls of Cloudflare's API, by outcome", m.calls.clone());
        registry.register("portcullis_cloudflare_entries", "Entries of ours at Cloudflare", m.entries.clone());
        registry.register("portcullis_cloudflare_queue", "Changes that wait for Cloudflare", m.queue.clone());
        let help = "How long the oldest of them waits";
        registry.register_with_unit(
            "portcullis_cloudflare_queue_age",
            help,
            Unit::Seconds,
            m.queue_age_seconds.clone(),
        );
        let help = "Entries left out because of entries_max";
        registry.register("portcullis_cloudflare_left_out", help, m.left_out.clone());
        m
    }

    pub(super) fn count_call(&self, outcome: &'static str) {
        self.calls.get_or_create(&Outcome { outcome }).inc();
    }
}
