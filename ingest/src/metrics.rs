//! Counters and gauges of ingest. Labels are the names of sources and fixed reasons, never a path or an address.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};
use proto::client_ip::NoClient;

/// Label of a family.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct SourceLabel {
    /// Configured name.
    pub source: String,
}

/// Labels of events without a client.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ReasonLabel {
    /// Configured name.
    pub source: String,
    /// A word of a fixed list.
    pub reason: &'static str,
}

/// All of ingest. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    lines: Family<SourceLabel, Counter>,
    events: Family<SourceLabel, Counter>,
    unparsed: Family<SourceLabel, Counter>,
    oversized: Family<SourceLabel, Counter>,
    suspect: Family<SourceLabel, Counter>,
    withheld: Family<SourceLabel, Counter>,
    bytes: Family<SourceLabel, Counter>,
    lost_bytes: Family<SourceLabel, Counter>,
    no_client: Family<ReasonLabel, Counter>,
    behind_bytes: Family<SourceLabel, Gauge>,
    files: Family<SourceLabel, Gauge>,
    connections: Family<SourceLabel, Gauge>,
    dropped: Family<SourceLabel, Counter>,
    limited: Family<SourceLabel, Counter>,
    refused: Family<SourceLabel, Counter>,
    /// Batches that wait for detect.
    pub(crate) queued_batches: Gauge,
    /// Room that the spool takes.
    pub(crate) spooled_bytes: Gauge,
    pub(crate) uplink: UplinkMetrics,
}

/// What is sent to the bus.
#[derive(Clone, Debug, Default)]
pub(crate) struct UplinkMetrics {
    pub(crate) batches: Counter,
    pub(crate) events: Counter,
    pub(crate) bytes: Counter,
    pub(crate) retries: Counter,
    pub(crate) cut_events: Counter,
    pub(crate) in_flight: Gauge,
}

impl Metrics {
    /// Registers every family in `registry`, whose prefix names the program.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let registry = registry.sub_registry_with_prefix("ingest");
        registry.register("lines", "Log lines read", metrics.lines.clone());
        registry.register("events", "Lines that were accesses", metrics.events.clone());
        registry.register("unparsed", "Lines that were no accesses", metrics.unparsed.clone());
        registry.register("oversized", "Lines skipped for their length", metrics.oversized.clone());
        registry.register("suspect_lines", "Accesses that may be forged", metrics.suspect.clone());
        let withheld = metrics.withheld.clone();
        registry.register("withheld_lines", "Accesses not sent, as no rule can match them", withheld);
        registry.register_with_unit("read", "Bytes of lines read", Unit::Bytes, metrics.bytes.clone());
        registry.register_with_unit("lost", "Bytes gone unread", Unit::Bytes, metrics.lost_bytes.clone());
        registry.register("no_client", "Events without a client, by reason", metrics.no_client.clone());
        registry.register_with_unit("behind", "Bytes that wait to be read", Unit::Bytes, metrics.behind_bytes.clone());
        registry.register("files", "Files followed", metrics.files.clone());
        registry.register("connections", "Connections of senders", metrics.connections.clone());
        registry.register("dropped_lines", "Lines that found no room", metrics.dropped.clone());
        registry.register("limited_lines", "Lines turned away because of a limit", metrics.limited.clone());
        registry.register("refused", "Connections, datagrams and requests refused", metrics.refused.clone());
        registry.register("queued_batches", "Batches that wait for detect", metrics.queued_batches.clone());
        registry.register_with_unit("spooled", "Lines on disk", Unit::Bytes, metrics.spooled_bytes.clone());
        metrics.uplink.register(registry);
        metrics
    }

    pub(crate) fn of_source(&self, name: &str) -> SourceMetrics {
        let label = SourceLabel { source: name.to_owned() };
        let no_client = |reason: NoClient| {
            let label = ReasonLabel { source: name.to_owned(), reason: reason_label(reason) };
            self.no_client.get_or_create_owned(&label)
        };
        SourceMetrics {
            lines: self.lines.get_or_create_owned(&label),
            events: self.events.get_or_create_owned(&label),
            unparsed: self.unparsed.get_or_create_owned(&label),
            oversized: self.oversized.get_or_create_owned(&label),
            suspect: self.suspect.get_or_create_owned(&label),
            withheld: self.withheld.get_or_create_owned(&label),
            bytes: self.bytes.get_or_create_owned(&label),
            lost_bytes: self.lost_bytes.get_or_create_owned(&label),
            no_client: NO_CLIENT.map(no_client),
            behind_bytes: self.behind_bytes.get_or_create_owned(&label),
            files: self.files.get_or_create_owned(&label),
            connections: self.connections.get_or_create_owned(&label),
            dropped: self.dropped.get_or_create_owned(&label),
            limited: self.limited.get_or_create_owned(&label),
            refused: self.refused.get_or_create_owned(&label),
            queued_batches: self.queued_batches.clone(),
        }
    }
}

impl UplinkMetrics {
    fn register(&self, registry: &mut Registry) {
        registry.register("published_batches", "Batches that the bus keeps", self.batches.clone());
        registry.register("published_events", "Events of these batches", self.events.clone());
        registry.register_with_unit("published", "Their size", Unit::Bytes, self.bytes.clone());
        registry.register("publish_retries", "Batches that were not acknowledged and sent again", self.retries.clone());
        registry.register("cut_events", "Events too large for the bus, their texts cut", self.cut_events.clone());
        registry.register("in_flight_batches", "Batches not acknowledged yet", self.in_flight.clone());
    }
}

/// Every reason, in the order of its declaration.
pub(crate) const NO_CLIENT: [NoClient; 4] =
    [NoClient::Absent, NoClient::NotAnAddress, NoClient::OnlyProxies, NoClient::UnvouchedChain];

fn reason_label(reason: NoClient) -> &'static str {
    match reason {
        NoClient::Absent => "absent",
        NoClient::NotAnAddress => "not_an_address",
        NoClient::OnlyProxies => "only_proxies",
        NoClient::UnvouchedChain => "unvouched_chain",
    }
}

/// The figures of one source, looked up once.
#[derive(Clone, Debug)]
pub(crate) struct SourceMetrics {
    pub(crate) lines: Counter,
    pub(crate) events: Counter,
    pub(crate) unparsed: Counter,
    pub(crate) oversized: Counter,
    pub(crate) suspect: Counter,
    pub(crate) withheld: Counter,
    pub(crate) bytes: Counter,
    pub(crate) lost_bytes: Counter,
    /// In the order of [`NO_CLIENT`].
    pub(crate) no_client: [Counter; 4],
    pub(crate) behind_bytes: Gauge,
    pub(crate) files: Gauge,
    pub(crate) connections: Gauge,
    pub(crate) dropped: Counter,
    pub(crate) limited: Counter,
    pub(crate) refused: Counter,
    pub(crate) queued_batches: Gauge,
}
