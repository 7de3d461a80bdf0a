//! What a role is connected to in a test that does not care.

use prometheus_client::registry::Registry;
use proto::bus::banned::Banned;
use proto::bus::memory::Nodes;
use proto::event::{AccessBatch, Positions};
use proto::shutdown::Shutdown;
use proto::time::Clock;
use tokio::sync::{mpsc, watch};

use ingest::config::IngestConfig;
use ingest::metrics::Metrics;
use ingest::pipeline::Inputs;

pub(crate) fn inputs(
    config: &IngestConfig,
    batches: mpsc::Sender<AccessBatch>,
    (nodes, shutdown): (&Nodes, &Shutdown),
) -> Inputs {
    Inputs {
        node: "edge-1".into(),
        positions: Positions::new(),
        batches,
        interest: watch::Sender::default().subscribe(),
        banned: Banned::new(),
        client_ip: watch::Sender::new(config.client_ip.clone()).subscribe(),
        clock: Clock::system(),
        nats: None,
        spool: None,
        uplink: ingest::uplink::Status::default(),
        nodes: nodes.clone(),
        metrics: Metrics::register(&mut Registry::default()),
        reload: watch::Sender::default().subscribe(),
        shutdown: shutdown.clone(),
    }
}
