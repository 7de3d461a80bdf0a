use std::sync::Arc;
use std::sync::atomic::{AtomicI8, Ordering};

use prometheus_client::registry::Registry;
use proto::event::{Event, Text};
use tokio::task::JoinHandle;

use super::*;

const PATIENCE: Duration = Duration::from_secs(20);
const ROOM: u64 = 1 << 20;

/// Who waits for a batch: 0 as long as nothing was said, then 1 for safe and -1 for lost.
#[derive(Clone, Default)]
struct Waits(Arc<AtomicI8>);

impl Waits {
    fn said(&self) -> i8 {
        self.0.load(Ordering::Acquire)
    }

    async fn until(&self, said: i8) {
        wait_until("the sender is told", || self.said() == said).await;
    }
}

async fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let clock = Clock::system();
    let end = clock.raw().saturating_add(PATIENCE);
    while !is_so() {
        assert!(clock.raw() < end, "{what}: not within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// A spool at work between a source and an uplink that takes `queue` batches at a time.
struct Running {
    source: mpsc::Sender<AccessBatch>,
    uplink: mpsc::Receiver<AccessBatch>,
    status: Status,
    shutdown: Shutdown,
    task: JoinHandle<()>,
}

impl Running {
    fn start(dir: &Path, queue: usize, bytes_max: u64) -> Self {
        let spool = Spool::open(dir, bytes_max).unwrap();
        let (source, batches) = mpsc::channel(WAITING_MAX);
        let (out, uplink) = mpsc::channel(queue);
        let (status, shutdown) = (Status::default(), Shutdown::new());
        let said = (status.clone(), Metrics::register(&mut Registry::default()));
        let task = tokio::spawn(run(spool, (batches, out), said, (Clock::system(), shutdown.clone())));
        Self { source, uplink, status, shutdown, task }
    }

    async fn send(&self, path: &str) -> Waits {
        let waits = Waits::default();
        let said = waits.clone();
        let mut batch = batch(path);
        batch.receipts.push(Receipt::new(move |safe| said.0.store(if safe { 1 } else { -1 }, Ordering::Release)));
        self.source.send(batch).await.unwrap();
        waits
    }

    /// The next batch at the uplink, and its paths.
    async fn next(&mut self) -> (AccessBatch, Vec<String>) {
        let batch = tokio::time::timeout(PATIENCE, self.uplink.recv()).await.expect("a batch in time").unwrap();
        let paths = batch.events().map(|event| event.text.path.to_owned()).collect();
        (batch, paths)
    }

    /// Takes and keeps whatever comes until there were so many paths.
    async fn take(&mut self, count: usize) -> Vec<String> {
        let mut all = Vec::new();
        while all.len() < count {
            let (mut batch, paths) = self.next().await;
            batch.deliver();
            all.extend(paths);
        }
        all
    }

    /// The sources have ended; what is at the uplink and not delivered is given up.
    async fn end(self) {
        let Self { source, uplink, shutdown, task, .. } = self;
        shutdown.begin();
        drop(source);
        drop(uplink);
        tokio::time::timeout(PATIENCE, task).await.expect("an end in time").unwrap();
    }
}

fn batch(path: &str) -> AccessBatch {
    let mut batch = AccessBatch::new("edge-1".into(), "syslog".into(), Timestamp::from_secs(1));
    batch.push(&Event { text: Text { path, ..Text::default() }, ..Event::default() });
    batch.counts.lines = 1;
    batch
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(dir.join(FOLDER)).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

#[tokio::test(flavor = "multi_thread")]
async fn with_room_nothing_touches_the_disk_and_senders_wait_for_the_bus() {
    let dir = tempfile::tempdir().unwrap();
    let mut running = Running::start(dir.path(), 4, ROOM);
    let waits = running.send("/a").await;
    let (mut batch, paths) = running.next().await;
    assert_eq!(paths, ["/a"]);
    assert_eq!(waits.said(), 0, "the bus has not said that it is safe");
    batch.deliver();
    waits.until(1).await;
    assert!(files(dir.path()).is_empty());
    running.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_finds_no_room_is_safe_on_disk_and_comes_in_order_when_there_is_some() {
    let dir = tempfile::tempdir().unwrap();
    let mut running = Running::start(dir.path(), 1, ROOM);
    let mut waits = Vec::new();
    for n in 0..100 {
        waits.push(running.send(&format!("/{n}")).await);
    }
    // The first waits in the queue, all others are on the disk.
    waits[99].until(1).await;
    assert_eq!(waits[0].said(), 0);
    assert!(waits[1..].iter().all(|waits| waits.said() == 1));
    let count = files(dir.path()).len();
    assert!((1..50).contains(&count), "batches share files: {count}");
    assert!(running.status.problems().iter().any(|problem| problem.text.contains("wait on disk")));
    let expected: Vec<String> = (0..100).map(|n| format!("/{n}")).collect();
    assert_eq!(running.take(100).await, expected);
    waits[0].until(1).await;
    wait_until("the disk is empty", || files(dir.path()).is_empty()).await;
    // And from now on it goes straight again.
    let waits = running.send("/straight").await;
    running.take(1).await;
    waits.until(1).await;
    wait_until("nothing is wrong any more", || running.status.problems().is_empty()).await;
    running.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_safe_at_the_end_comes_after_the_next_start() {
    let dir = tempfile::tempdir().unwrap();
    let mut running = Running::start(dir.path(), 2, ROOM);
    let mut waits = Vec::new();
    for n in 0..10 {
        waits.push(running.send(&format!("/{n}")).await);
    }
    waits[9].until(1).await;
    let (mut first, _) = running.next().await;
    first.deliver();
    waits[0].until(1).await;
    // The second is in the queue, and never delivered.
    running.end().await;
    assert!(waits.iter().all(|waits| waits.said() == 1), "all of them are on the disk");
    let mut running = Running::start(dir.path(), 2, ROOM);
    let mut paths = running.take(9).await;
    paths.sort();
    assert_eq!(paths, (1..10).map(|n| format!("/{n}")).collect::<Vec<_>>());
    wait_until("the disk is empty", || files(dir.path()).is_empty()).await;
    running.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_folder_takes_nothing_more_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let mut running = Running::start(dir.path(), 1, 2 * FILE_BYTES_MIN);
    let mut sent = 0;
    loop {
        match running.source.try_send(batch(&format!("/{sent}"))) {
            Ok(()) => sent += 1,
            Err(TrySendError::Full(_)) if running.status.problems().iter().any(|p| p.text.contains("full")) => break,
            // The rest of a file waits for others.
            Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
        }
    }
    assert_eq!(files(dir.path()).len(), 2);
    assert_eq!(running.take(sent).await.len(), sent, "and nothing of what it took is lost");
    running.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_file_is_set_aside_and_the_rest_of_a_crash_is_removed() {
    let dir = tempfile::tempdir().unwrap();
    let mut spool = Spool::open(dir.path(), ROOM).unwrap();
    spool.write(&batch("/a")).unwrap();
    spool.write(&batch("/b")).unwrap();
    fs::write(spool.path(0), b"P\x01 and nothing").unwrap();
    fs::write(spool.path(2).with_extension("new"), b"half").unwrap();
    let mut running = Running::start(dir.path(), 4, ROOM);
    assert_eq!(running.take(1).await, ["/b"]);
    wait_until("only the damaged one is left", || files(dir.path()).len() == 1).await;
    assert_eq!(files(dir.path())[0].extension().unwrap(), "damaged");
    running.end().await;
}
