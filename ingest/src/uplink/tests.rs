use std::collections::{BTreeMap, BTreeSet};

use proto::event::{Event, FileSpan};
use proto::time::Timestamp;
use proto::wire::decode_batch;
use tokio::sync::{mpsc, watch};

use super::*;

/// A test that waits longer than this has failed.
const DEADLINE: Duration = Duration::from_secs(30);

/// A bus that answers late, out of order, wrongly, or as `mood` says.
#[derive(Clone)]
struct Bus {
    kept: Arc<Mutex<BTreeMap<String, Vec<u8>>>>,
    mood: watch::Sender<Mood>,
    calls: watch::Sender<u64>,
}

#[derive(Clone, Copy, PartialEq)]
enum Mood {
    /// One in so many tries fails; the bus keeps half of these all the same.
    Fickle(u64),
    Full,
    Away,
}

impl Bus {
    fn new(mood: Mood) -> Self {
        Self { kept: Arc::default(), mood: watch::Sender::new(mood), calls: watch::Sender::new(0) }
    }

    fn keep(&self, id: &str, payload: &[u8]) {
        let before = self.kept.lock().unwrap().insert(id.to_owned(), payload.to_vec());
        assert!(before.is_none_or(|before| before == payload), "{id} names two payloads");
    }

    /// First bytes of the lines whose events are kept.
    fn offsets(&self) -> BTreeSet<u64> {
        let kept = self.kept.lock().unwrap();
        let batches = kept.values().map(|payload| decode_batch(payload).unwrap());
        batches.flat_map(|batch| batch.events().map(|event| event.offset).collect::<Vec<_>>()).collect()
    }
}

impl Publish for Bus {
    async fn publish(&self, id: &str, payload: Vec<u8>) -> Result<(), PublishError> {
        let mut call = 0;
        self.calls.send_modify(|calls| {
            *calls += 1;
            call = *calls;
        });
        // A fixed permutation of the order in which answers come.
        for _ in 0..(call * 7) % 13 {
            tokio::task::yield_now().await;
        }
        let mood = *self.mood.borrow();
        match mood {
            Mood::Full => Err(PublishError::Full),
            Mood::Away => Err(PublishError::Unavailable("no server".to_owned())),
            Mood::Fickle(odds) => {
                let fails = call % odds == odds - 1;
                if !fails || call % 2 == 0 {
                    self.keep(id, &payload);
                }
                if fails { Err(PublishError::Unavailable("no answer".to_owned())) } else { Ok(()) }
            }
        }
    }
}

struct Running {
    batches: mpsc::Sender<AccessBatch>,
    bus: Bus,
    status: Status,
    shutdown: Shutdown,
    task: JoinHandle<Result<(), CheckpointError>>,
    state_dir: tempfile::TempDir,
}

fn start(mood: Mood) -> Running {
    let state_dir = tempfile::tempdir().unwrap();
    let (sender, batches) = mpsc::channel(4);
    let (bus, status, shutdown) = (Bus::new(mood), Status::default(), Shutdown::new());
    let inputs = UplinkInputs {
        batches,
        checkpoint: Checkpoint::open(state_dir.path()).unwrap(),
        clock: Clock::system(),
        status: status.clone(),
        metrics: Metrics::default(),
        shutdown: shutdown.clone(),
    };
    let drain = Duration::from_millis(20);
    let config = UplinkConfig { node: "edge-1".into(), payload_bytes_max: PAYLOAD_BYTES_MAX, drain };
    let task = tokio::spawn(run(config, inputs, bus.clone()));
    Running { batches: sender, bus, status, shutdown, task, state_dir }
}

/// The line at `offset`, ten bytes long.
fn batch(offset: u64) -> AccessBatch {
    let mut batch = AccessBatch::new("edge-1".into(), "traefik".into(), Timestamp::EPOCH);
    batch.span = Some(FileSpan { generation: 7, start: offset, end: offset + 10 });
    batch.counts.lines = 1;
    // A new filter now and then, so that not all can be joined.
    batch.filter = offset / 50;
    batch.push(&Event { offset, ..Event::default() });
    batch
}

impl Running {
    async fn problem(&self, is_it: impl Fn(&[Problem]) -> bool) {
        let wait = async {
            while !is_it(&self.status.problems()) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let told = tokio::time::timeout(DEADLINE, wait).await;
        assert!(told.is_ok(), "{:?}", self.status.problems());
    }

    fn position(&self) -> u64 {
        Checkpoint::open(self.state_dir.path()).unwrap().positions()[&("traefik".to_owned(), 7)].offset
    }
}

async fn ended(task: JoinHandle<Result<(), CheckpointError>>) {
    tokio::time::timeout(DEADLINE, task)
        .await
        .expect("an end in time")
        .expect("no panic")
        .expect("positions are stored");
}

#[tokio::test]
async fn a_fickle_bus_gets_every_event_and_positions_reach_the_end() {
    let running = start(Mood::Fickle(9));
    for line in 0..2000 {
        running.batches.send(batch(line * 10)).await.unwrap();
    }
    drop(running.batches);
    ended(running.task).await;
    assert_eq!(running.bus.offsets(), (0..2000).map(|line| line * 10).collect());
    let checkpoint = Checkpoint::open(running.state_dir.path()).unwrap();
    assert_eq!(checkpoint.positions().into_values().map(|position| position.offset).collect::<Vec<_>>(), [20_000]);
}

#[tokio::test]
async fn a_full_bus_is_told_stops_the_sources_and_loses_nothing() {
    let running = start(Mood::Full);
    let sender = running.batches.clone();
    let source = tokio::spawn(async move {
        for line in 0..2000 {
            sender.send(batch(line * 10)).await.unwrap();
        }
    });
    running.problem(|problems| problems.iter().any(|problem| problem.text.starts_with("the bus is full since"))).await;
    assert!(!source.is_finished() && running.bus.kept.lock().unwrap().is_empty());
    running.bus.mood.send_replace(Mood::Fickle(u64::MAX));
    source.await.unwrap();
    running.problem(<[Problem]>::is_empty).await;
    drop(running.batches);
    ended(running.task).await;
    assert_eq!(running.bus.offsets().len(), 2000);
}

#[tokio::test]
async fn a_bus_that_is_away_at_the_end_leaves_the_rest_to_the_next_start() {
    let mut running = start(Mood::Fickle(u64::MAX));
    running.batches.send(batch(100)).await.unwrap();
    while running.bus.offsets().is_empty() {
        tokio::task::yield_now().await;
    }
    running.bus.mood.send_replace(Mood::Away);
    let mut calls = running.bus.calls.subscribe();
    running.batches.send(batch(110)).await.unwrap();
    calls.wait_for(|calls| *calls > 2).await.unwrap();
    running.shutdown.begin();
    ended(std::mem::replace(&mut running.task, tokio::spawn(async { Ok(()) }))).await;
    assert!(running.batches.send(batch(120)).await.is_err(), "sources are let go");
    assert_eq!(running.bus.offsets().into_iter().collect::<Vec<_>>(), [100]);
    assert_eq!(running.position(), 110);
}

#[tokio::test]
async fn positions_that_cannot_be_stored_are_told_and_end_in_an_error() {
    let running = start(Mood::Fickle(u64::MAX));
    // What is to be replaced is in the way.
    std::fs::create_dir(running.state_dir.path().join("ingest.json.new")).unwrap();
    running.batches.send(batch(0)).await.unwrap();
    running
        .problem(|problems| problems.iter().any(|problem| problem.text.contains("cannot write the positions")))
        .await;
    drop(running.batches);
    assert!(running.task.await.unwrap().is_err());
}
