//! What the operator API over TCP refused. Labels are fixed words, never a peer, a token or a path.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// Why something was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The peer had its share of connections.
    Connections,
    /// The TLS handshake failed or took too long.
    Handshake,
    /// A request took too long to arrive or to be answered.
    Late,
    /// No token was sent.
    NoToken,
    /// The token is nobody's.
    UnknownToken,
    /// The peer has failed too often.
    TooMany,
    /// The token may not do this.
    Scope,
}

impl Refusal {
    /// As metrics and the log write it.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::Handshake => "handshake",
            Self::Late => "late",
            Self::NoToken => "no_token",
            Self::UnknownToken => "unknown_token",
            Self::TooMany => "too_many_failures",
            Self::Scope => "scope",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

/// All of them.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    refused: Family<ReasonLabel, Counter>,
    connections: Gauge,
}

impl Metrics {
    /// Registers them.
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let registry = registry.sub_registry_with_prefix("portcullis_api");
        registry.register("refused", "Connections and requests over TCP refused, by reason", metrics.refused.clone());
        registry.register("connections", "Connections over TCP now", metrics.connections.clone());
        metrics
    }

    pub(super) fn refused(&self, reason: Refusal) {
        self.refused.get_or_create(&ReasonLabel { reason: reason.as_str() }).inc();
    }

    pub(super) fn opened(&self) {
        self.connections.inc();
    }

    pub(super) fn closed(&self) {
        self.connections.dec();
    }
}
