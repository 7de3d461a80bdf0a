//! The role over real files with a bus behind it: what kills and outages do to lines.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ingest::config::IngestConfig;
use ingest::error::IngestError;
use ingest::metrics::Metrics;
use ingest::pipeline::{self, Inputs};
use ingest::source::checkpoint::{Checkpoint, CheckpointError};
use ingest::uplink::{self, PAYLOAD_BYTES_MAX, Status, UplinkConfig, UplinkInputs};
use proto::bus::banned::Banned;
use proto::bus::memory::Nodes;
use proto::bus::publish::{Publish, PublishError};
use proto::shutdown::Shutdown;
use proto::time::Clock;
use proto::wire::decode_batch;
use tempfile::TempDir;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

/// A test that waits longer than this has failed.
const DEADLINE: Duration = Duration::from_secs(30);

/// Keeps the numbers of the lines it gets, unless it is away.
#[derive(Clone)]
struct Bus {
    numbers: watch::Sender<BTreeSet<u64>>,
    away: watch::Sender<bool>,
}

impl Publish for Bus {
    async fn publish(&self, _id: &str, payload: Vec<u8>) -> Result<(), PublishError> {
        if *self.away.borrow() {
            return Err(PublishError::Unavailable("no server".to_owned()));
        }
        let batch = decode_batch(&payload).unwrap();
        let paths = batch.events().map(|event| event.text.path.strip_prefix("/n/").unwrap().parse::<u64>().unwrap());
        self.numbers.send_modify(|numbers| numbers.extend(paths));
        Ok(())
    }
}

impl Bus {
    fn new() -> Self {
        Self { numbers: watch::Sender::default(), away: watch::Sender::default() }
    }

    async fn has(&self, numbers: usize) {
        let mut kept = self.numbers.subscribe();
        let wait = kept.wait_for(|kept| kept.len() >= numbers);
        assert!(tokio::time::timeout(DEADLINE, wait).await.is_ok(), "only {} came", self.numbers.borrow().len());
    }
}

struct Node {
    shutdown: Shutdown,
    nodes: Nodes,
    sources: JoinHandle<Result<(), IngestError>>,
    uplink: JoinHandle<Result<(), CheckpointError>>,
}

fn start(directory: &TempDir, bus: &Bus) -> Node {
    let config = IngestConfig::for_files(vec![directory.path().join("access.log")]);
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let (sender, batches) = mpsc::channel(4);
    let (shutdown, nodes, status) = (Shutdown::new(), Nodes::default(), Status::default());
    let inputs = Inputs {
        node: "edge-1".into(),
        positions: checkpoint.positions(),
        batches: sender,
        interest: watch::Sender::new(Arc::default()).subscribe(),
        banned: Banned::new(),
        client_ip: watch::Sender::new(config.client_ip.clone()).subscribe(),
        nats: None,
        clock: Clock::system(),
        spool: None,
        uplink: status.clone(),
        nodes: nodes.clone(),
        metrics: Metrics::default(),
        reload: watch::Sender::default().subscribe(),
        shutdown: shutdown.clone(),
    };
    let uplink_inputs = UplinkInputs {
        batches,
        checkpoint,
        clock: Clock::system(),
        status,
        metrics: Metrics::default(),
        shutdown: shutdown.clone(),
    };
    let drain = Duration::from_secs(1);
    let uplink_config = UplinkConfig { node: "edge-1".into(), payload_bytes_max: PAYLOAD_BYTES_MAX, drain };
    let sources = tokio::spawn(pipeline::run(config, inputs));
    let uplink = tokio::spawn(uplink::run(uplink_config, uplink_inputs, bus.clone()));
    Node { shutdown, nodes, sources, uplink }
}

impl Node {
    async fn stop(self) {
        self.shutdown.begin();
        let ended = tokio::time::timeout(DEADLINE, async { (self.sources.await, self.uplink.await) }).await;
        let (sources, uplink) = ended.expect("an end in time");
        sources.expect("no panic").expect("an orderly end");
        uplink.expect("no panic").expect("positions are stored");
    }

    /// Ends it in the middle of whatever it does.
    async fn kill(self) {
        self.uplink.abort();
        assert!(self.uplink.await.unwrap_err().is_cancelled());
        self.shutdown.force();
        let _ended_somehow = self.sources.await.unwrap();
    }
}

fn append(directory: &Path, numbers: std::ops::Range<u64>) {
    let mut file = OpenOptions::new().create(true).append(true).open(directory.join("access.log")).unwrap();
    let line = |number| {
        format!("{{\"ClientAddr\":\"192.0.2.1:4000\",\"DownstreamStatus\":404,\"RequestPath\":\"/n/{number}\"}}\n")
    };
    file.write_all(numbers.map(line).collect::<String>().as_bytes()).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_killed_again_and_again_sends_every_line() {
    let directory = tempfile::tempdir().unwrap();
    let bus = Bus::new();
    for life in 0..4 {
        append(directory.path(), life * 5000..(life + 1) * 5000);
        let node = start(&directory, &bus);
        bus.has(life as usize * 5000 + 1).await;
        node.kill().await;
    }
    append(directory.path(), 20_000..20_001);
    let node = start(&directory, &bus);
    bus.has(20_001).await;
    node.stop().await;
    assert!(bus.numbers.borrow().iter().copied().eq(0..20_001));
    let positions = Checkpoint::open(directory.path()).unwrap().positions();
    let length = directory.path().join("access.log").metadata().unwrap().len();
    assert_eq!(positions.into_values().map(|position| position.offset).collect::<Vec<_>>(), [length]);
    // What is delivered is not read again.
    bus.numbers.send_replace(BTreeSet::new());
    append(directory.path(), 20_001..20_002);
    let node = start(&directory, &bus);
    bus.has(1).await;
    node.stop().await;
    assert!(bus.numbers.borrow().iter().copied().eq(20_001..20_002));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_end_while_the_bus_is_away_is_orderly_and_leaves_every_line() {
    let directory = tempfile::tempdir().unwrap();
    let bus = Bus::new();
    bus.away.send_replace(true);
    append(directory.path(), 0..100_000);
    let node = start(&directory, &bus);
    let away = |nodes: &Nodes| {
        let reports = nodes.all();
        let problems = reports.iter().flat_map(|report| &report.problems);
        problems.filter(|problem| problem.text.starts_with("the bus is not reachable (no server) since")).count() > 0
    };
    let told = async {
        while !away(&node.nodes) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(DEADLINE, told).await.expect("it is told");
    node.stop().await;
    assert!(bus.numbers.borrow().is_empty());
    bus.away.send_replace(false);
    let node = start(&directory, &bus);
    bus.has(100_000).await;
    node.stop().await;
}
