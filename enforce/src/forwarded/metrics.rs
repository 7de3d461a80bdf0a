//! What is counted of forwarded clients, for Prometheus.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// The counters. Clones share them.
#[derive(Clone, Debug, Default)]
pub(crate) struct ForwardedMetrics {
    pub(crate) clients: Gauge,
    pub(crate) left_out: Gauge,
    pub(crate) unmatchable: Gauge,
    pub(crate) rewrites: Counter,
    pub(crate) refused_packets: Counter,
}

impl ForwardedMetrics {
    /// Registers them under the names that dashboards know.
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let m = Self::default();
        let help = "Clients behind a proxy that are refused on their way to services";
        registry.register("portcullis_forwarded_clients", help, m.clients.clone());
        let help = "Forwarded clients left out because of rules_max";
        registry.register("portcullis_forwarded_left_out", help, m.left_out.clone());
        let help = "Banned networks that no rule can find in a header";
        registry.register("portcullis_forwarded_unmatchable", help, m.unmatchable.clone());
        let help = "Times that the rules about forwarded clients were rewritten";
        registry.register("portcullis_forwarded_rewrites", help, m.rewrites.clone());
        let help = "Packets of forwarded clients that were answered by a reset";
        registry.register("portcullis_forwarded_refused_packets", help, m.refused_packets.clone());
        m
    }
}
