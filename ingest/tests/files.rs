//! The role over real files: what rotation, truncation, restarts and full queues do to lines.
//!
//! Every line carries a number in its path; what arrives must be those numbers, each once.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ingest::config::{FileConfig, IngestConfig, Lines, SourceConfig, SourceKind};
use ingest::error::IngestError;
use ingest::metrics::Metrics;
use ingest::pipeline::{self, Inputs};
use prometheus_client::registry::Registry;
use proto::bus::banned::Banned;
use proto::bus::memory::Nodes;
use proto::event::{AccessBatch, FileSpan, Interest, Position, Positions, StatusSet};
use proto::report::{NodeReport, Severity};
use proto::shutdown::Shutdown;
use proto::time::Clock;
use tempfile::TempDir;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

/// A test that waits longer than this has failed.
const DEADLINE: Duration = Duration::from_secs(30);

/// A running role and what it has delivered.
struct Role {
    batches: mpsc::Receiver<AccessBatch>,
    shutdown: Shutdown,
    nodes: Nodes,
    task: JoinHandle<Result<(), IngestError>>,
    registry: Registry,
    numbers: Vec<u64>,
    counts: Counts,
    spans: BTreeMap<u64, Vec<FileSpan>>,
    interest: watch::Sender<Arc<Interest>>,
    banned: Banned,
    /// Of the newest batch.
    filter: u64,
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Counts {
    lines: u64,
    unparsed: u64,
    oversized: u64,
    withheld: u64,
}

fn start(include: &Path, positions: &Positions, change: impl FnOnce(&mut FileConfig, &mut Lines)) -> Role {
    start_with_queue(include, positions, 64, change)
}

fn start_with_queue(
    include: &Path,
    positions: &Positions,
    queue: usize,
    change: impl FnOnce(&mut FileConfig, &mut Lines),
) -> Role {
    let mut config = IngestConfig::for_files(vec![include.to_owned()]);
    let SourceConfig { kind: SourceKind::File(file), lines, .. } = &mut config.sources[0] else {
        panic!("a source of files")
    };
    file.poll_interval = Duration::from_millis(50);
    change(file, lines);
    start_config(config, positions, queue)
}

fn start_config(config: IngestConfig, positions: &Positions, queue: usize) -> Role {
    let (sender, batches) = mpsc::channel(queue);
    let (shutdown, nodes) = (Shutdown::new(), Nodes::default());
    let (interest, banned) = (watch::Sender::default(), Banned::new());
    let mut registry = Registry::with_prefix("portcullis");
    let inputs = Inputs {
        node: "edge-1".into(),
        positions: positions.clone(),
        batches: sender,
        interest: interest.subscribe(),
        banned: banned.clone(),
        client_ip: watch::Sender::new(config.client_ip.clone()).subscribe(),
        nats: None,
        clock: Clock::system(),
        spool: None,
        uplink: ingest::uplink::Status::default(),
        nodes: nodes.clone(),
        metrics: Metrics::register(&mut registry),
        shutdown: shutdown.clone(),
    };
    let task = tokio::spawn(pipeline::run(config, inputs));
    let (numbers, counts, spans, filter) = Default::default();
    Role { batches, shutdown, nodes, task, registry, numbers, counts, spans, interest, banned, filter }
}

impl Role {
    fn take(&mut self, batch: &AccessBatch) {
        assert_eq!((&*batch.node, &*batch.source), ("edge-1", "traefik"));
        let span = batch.span.expect("files have offsets");
        for event in batch.events() {
            assert!((span.start..span.end).contains(&event.offset));
            let number = event.text.path.strip_prefix("/n/").expect("a path of these tests");
            self.numbers.push(number.parse().expect("a number"));
        }
        self.counts.lines += batch.counts.lines;
        self.counts.unparsed += batch.counts.unparsed;
        self.counts.oversized += batch.counts.oversized;
        self.counts.withheld += batch.counts.withheld;
        self.filter = batch.filter;
        let spans = self.spans.entry(span.generation).or_default();
        if let Some(last) = spans.last() {
            assert_eq!(last.end, span.start, "spans of a generation join");
        }
        spans.push(span);
    }

    async fn receive_until(&mut self, is_enough: impl Fn(&Self) -> bool) {
        while !is_enough(self) {
            let batch = tokio::time::timeout(DEADLINE, self.batches.recv()).await;
            let Ok(batch) = batch else {
                panic!("only {:?} and {:?} came; {:?}", self.counts, self.numbers.last(), self.nodes.all());
            };
            self.take(&batch.expect("the role runs"));
        }
    }

    async fn receive_lines(&mut self, lines: u64) {
        self.receive_until(|role| role.counts.lines >= lines).await;
        assert_eq!(self.counts.lines, lines);
    }

    /// Waits for a report that satisfies `is_it`.
    async fn report(&mut self, is_it: impl Fn(&NodeReport) -> bool) -> NodeReport {
        let wait = async {
            loop {
                if let Some(report) = self.nodes.all().into_iter().find(|report| is_it(report)) {
                    return report;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(DEADLINE, wait).await.expect("a report in time")
    }

    /// Ends the role in order, takes what is still delivered, and returns where the next one begins.
    async fn stop(mut self) -> (Vec<u64>, Positions) {
        self.shutdown.begin();
        while let Some(batch) = self.batches.recv().await {
            self.take(&batch);
        }
        self.task.await.expect("no panic").expect("an orderly end");
        let end = |spans: &Vec<FileSpan>| spans.last().map_or(0, |span| span.end);
        let position = |offset| Position { offset, needed: true };
        let ends = self.spans.iter().map(|(generation, spans)| (*generation, position(end(spans))));
        let positions = ends.map(|(generation, position)| (("traefik".to_owned(), generation), position)).collect();
        (self.numbers, positions)
    }
}

fn line(number: u64) -> String {
    format!(
        "{{\"ClientAddr\":\"192.0.2.1:4000\",\"DownstreamStatus\":404,\"RequestMethod\":\"GET\",\
         \"RequestPath\":\"/n/{number}\",\"StartUTC\":\"2026-01-08T14:19:15.98Z\"}}\n"
    )
}

fn append(path: &Path, numbers: impl IntoIterator<Item = u64>) {
    let mut file = OpenOptions::new().create(true).append(true).open(path).unwrap();
    let text: String = numbers.into_iter().map(line).collect();
    file.write_all(text.as_bytes()).unwrap();
}

fn log() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("access.log");
    (directory, path)
}

fn sorted(mut numbers: Vec<u64>) -> Vec<u64> {
    numbers.sort_unstable();
    numbers
}

fn expect(numbers: Vec<u64>, range: impl IntoIterator<Item = u64>) {
    assert_eq!(sorted(numbers), range.into_iter().collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_arrive_in_order_and_a_half_line_waits() {
    let (_directory, path) = log();
    append(&path, 0..3000);
    let mut role = start(&path, &Positions::new(), |_, _| {});
    role.receive_lines(3000).await;
    let text = line(3000);
    let (head, tail) = text.split_at(20);
    let mut file = OpenOptions::new().append(true).open(&path).unwrap();
    file.write_all(head.as_bytes()).unwrap();
    // Only what is whole is covered: the report shows the rest as read and not delivered.
    role.report(|report| report.sources[0].lines == 3000).await;
    assert!(role.batches.try_recv().is_err());
    file.write_all(tail.as_bytes()).unwrap();
    role.receive_lines(3001).await;
    let (numbers, _) = role.stop().await;
    assert_eq!(numbers, (0..=3000).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn rotation_under_continuous_writing_loses_and_doubles_nothing() {
    const LINES: u64 = 20_000;
    let (directory, path) = log();
    let mut role = start(&path, &Positions::new(), |_, _| {});
    let writer = std::thread::spawn(move || {
        let open = || OpenOptions::new().create(true).append(true).open(&path).unwrap();
        let mut file = open();
        let mut rotated = 0;
        for number in 0..LINES {
            file.write_all(line(number).as_bytes()).unwrap();
            if number % 4000 == 2000 {
                rotated += 1;
                fs::rename(&path, directory.path().join(format!("access.log.{rotated}"))).unwrap();
                // The writer goes on in the renamed file until it is told.
                for late in 0..5 {
                    file.write_all(line(LINES + rotated * 5 + late - 5).as_bytes()).unwrap();
                }
                std::thread::sleep(Duration::from_millis(2));
                file = open();
            }
            if number % 500 == 0 {
                // A rotation that nobody has seen before the next one is a different story.
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        directory
    });
    role.receive_lines(LINES + 25).await;
    assert_eq!(role.spans.len(), 6);
    let (numbers, _) = role.stop().await;
    expect(numbers, 0..LINES + 25);
    drop(writer.join().unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copied_and_truncated_file_goes_on_from_its_beginning() {
    let (_directory, path) = log();
    append(&path, 0..100);
    let mut role = start(&path, &Positions::new(), |_, _| {});
    role.receive_lines(100).await;
    File::options().write(true).open(&path).unwrap().set_len(0).unwrap();
    append(&path, 100..350);
    role.receive_lines(350).await;
    assert_eq!(role.spans.len(), 2);
    expect(role.stop().await.0, 0..350);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_is_followed_to_its_new_target() {
    let (directory, link) = log();
    let (one, two) = (directory.path().join("one"), directory.path().join("two"));
    append(&one, 0..10);
    std::os::unix::fs::symlink(&one, &link).unwrap();
    let mut role = start(&link, &Positions::new(), |_, _| {});
    role.receive_lines(10).await;
    append(&two, 10..20);
    let swapped = directory.path().join("swapped");
    std::os::unix::fs::symlink(&two, &swapped).unwrap();
    fs::rename(&swapped, &link).unwrap();
    append(&one, 20..25);
    role.receive_lines(25).await;
    expect(role.stop().await.0, 0..25);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_goes_on_where_it_ended_also_in_a_rotated_file() {
    let (directory, path) = log();
    append(&path, 0..500);
    let mut role = start(&path, &Positions::new(), |_, _| {});
    role.receive_lines(500).await;
    let (mut numbers, positions) = role.stop().await;
    assert_eq!(positions.len(), 1);

    append(&path, 500..600);
    fs::rename(&path, directory.path().join("access.log.1")).unwrap();
    append(&path, 600..700);
    let mut role = start(&path, &positions, |_, _| {});
    role.receive_lines(200).await;
    let (more, positions) = role.stop().await;
    assert_eq!(more, (500..700).collect::<Vec<_>>(), "the older file comes first");
    numbers.extend(more);

    append(&path, 700..701);
    let mut role = start(&path, &positions, |_, _| {});
    role.receive_lines(1).await;
    numbers.extend(role.stop().await.0);
    expect(numbers, 0..701);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_with_a_full_queue_delivers_or_leaves_every_line() {
    let (_directory, path) = log();
    append(&path, 0..30_000);
    let mut numbers = Vec::new();
    let mut positions = Positions::new();
    for _ in 0..4 {
        let mut role = start_with_queue(&path, &positions, 1, |_, _| {});
        role.receive_until(|role| role.counts.lines > 0).await;
        let (more, next) = role.stop().await;
        numbers.extend(more);
        positions = next;
    }
    let left = 30_000 - numbers.len() as u64;
    if left > 0 {
        let mut role = start(&path, &positions, |_, _| {});
        role.receive_lines(left).await;
        numbers.extend(role.stop().await.0);
    }
    assert_eq!(numbers, (0..30_000).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn new_files_are_picked_up_and_compressed_ones_are_not() {
    let directory = tempfile::tempdir().unwrap();
    let pattern = directory.path().join("*/access*");
    let mut role = start(&pattern, &Positions::new(), |_, _| {});
    let report = role.report(|report| !report.problems.is_empty()).await;
    assert_eq!(report.problems[0].severity, Severity::Degraded);
    assert!(report.problems[0].text.contains("no log file"), "{:?}", report.problems);
    let sub = directory.path().join("pod-1");
    fs::create_dir(&sub).unwrap();
    append(&sub.join("access-0.log.gz"), 100..200);
    append(&sub.join("access-1.log"), 0..10);
    append(&sub.join("access-2.log"), 10..20);
    role.receive_lines(20).await;
    append(&sub.join("access-3.log"), 20..30);
    role.receive_lines(30).await;
    role.report(|report| report.problems.is_empty() && report.sources[0].files == 3).await;
    expect(role.stop().await.0, 0..30);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_notifications_everything_is_polled() {
    let (directory, path) = log();
    append(&path, 0..10);
    let mut role = start(&path, &Positions::new(), |file, _| file.inotify = false);
    role.receive_lines(10).await;
    append(&path, 10..20);
    role.receive_lines(20).await;
    fs::rename(&path, directory.path().join("access.log.1")).unwrap();
    append(&path, 20..30);
    role.receive_lines(30).await;
    expect(role.stop().await.0, 0..30);
}

#[tokio::test(flavor = "multi_thread")]
async fn with_notifications_nothing_waits_for_the_poll() {
    let (_directory, path) = log();
    append(&path, 0..1);
    let mut role = start(&path, &Positions::new(), |file, _| file.poll_interval = Duration::from_secs(3600));
    role.receive_lines(1).await;
    for number in 1..20 {
        append(&path, number..number + 1);
        role.receive_lines(number + 1).await;
    }
    expect(role.stop().await.0, 0..20);
}

#[tokio::test(flavor = "multi_thread")]
async fn long_lines_are_skipped_and_other_lines_counted_and_shown() {
    let (_directory, path) = log();
    append(&path, 0..1);
    let mut file = OpenOptions::new().append(true).open(&path).unwrap();
    let long = "x".repeat(1000);
    write!(file, "{long}\n\n  \nDEBUG: \x1b plugin\n{}{}\n", line(1), "y".repeat(400_000)).unwrap();
    append(&path, 2..3);
    let mut role = start(&path, &Positions::new(), |_, lines| lines.line_bytes_max = 512);
    role.receive_lines(8).await;
    assert_eq!(role.counts, Counts { lines: 8, unparsed: 1, oversized: 2, withheld: 0 });
    let report = role.report(|report| report.sources[0].lines == 8).await;
    let source = &report.sources[0];
    assert_eq!((source.events, source.unparsed, source.oversized), (3, 1, 2));
    assert_eq!(source.unparsed_sample.as_deref(), Some("DEBUG: \\u{1b} plugin"));
    assert_eq!((source.format.as_str(), source.behind_bytes), ("json", 0));
    let mut metrics = String::new();
    prometheus_client::encoding::text::encode(&mut metrics, &role.registry).unwrap();
    for expected in [
        "portcullis_ingest_lines_total{source=\"traefik\"} 8",
        "portcullis_ingest_oversized_total{source=\"traefik\"} 2",
        "portcullis_ingest_no_client_total{source=\"traefik\",reason=\"absent\"} 0",
    ] {
        assert!(metrics.contains(expected), "{expected} in\n{metrics}");
    }
    expect(role.stop().await.0, 0..3);
}

#[tokio::test(flavor = "multi_thread")]
async fn pieces_of_a_line_stay_in_one_batch() {
    let (_directory, path) = log();
    let text = line(0);
    let (head, tail) = text.trim_end().split_at(40);
    fs::write(&path, format!("2026-01-01T00:00:00Z stdout P {head}\n")).unwrap();
    let mut role = start(&path, &Positions::new(), |file, _| file.poll_interval = Duration::from_secs(3600));
    let mut file = OpenOptions::new().append(true).open(&path).unwrap();
    writeln!(file, "2026-01-01T00:00:00Z stdout F {tail}").unwrap();
    role.receive_lines(2).await;
    assert_eq!(role.numbers, [0]);
    let spans = role.spans.values().next().expect("one generation");
    assert_eq!(spans.len(), 1);
    expect(role.stop().await.0, 0..1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_line_in_pieces_goes_on_in_the_file_that_takes_the_place_of_its_own() {
    let (directory, path) = log();
    // As Docker 26 rotates, between any two pieces.
    let docker = |text: &str| format!("{}\n", serde_json::json!({"log": text, "stream": "stdout", "time": "x"}));
    let text = line(1);
    let (head, tail) = text.split_at(40);
    let mut role = start(&path, &Positions::new(), |file, _| file.poll_interval = Duration::from_secs(3600));
    fs::write(&path, [docker(&line(0)), docker(head)].concat()).unwrap();
    role.receive_lines(1).await;
    fs::rename(&path, directory.path().join("access.log.1")).unwrap();
    fs::write(&path, [docker(tail), docker(&line(2))].concat()).unwrap();
    role.receive_lines(3).await;
    let (numbers, positions) = role.stop().await;
    expect(numbers, 0..3);
    assert_eq!(positions.len(), 2, "the piece is done too, once the line is");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_piece_of_another_stream_holds_nothing_back() {
    let (_directory, path) = log();
    let piece = "2026-01-01T00:00:00Z stderr P a line whose end\n";
    let cri = |range: std::ops::Range<u64>| -> String {
        range.map(|number| format!("2026-01-01T00:00:00Z stdout F {}", line(number))).collect()
    };
    fs::write(&path, format!("{}{piece}{}", cri(0..5), cri(5..3000))).unwrap();
    // Neither a tick nor more lines come.
    let mut role = start(&path, &Positions::new(), |file, _| file.poll_interval = Duration::from_secs(3600));
    let mut batches = Vec::new();
    while role.counts.lines < 3001 {
        let batch = tokio::time::timeout(DEADLINE, role.batches.recv()).await.expect("in time").expect("it runs");
        batches.push(batch.counts.lines);
        role.take(&batch);
    }
    assert_eq!(batches[0], 5, "what came before the piece is not held back");
    assert!(batches.iter().all(|lines| *lines <= 513), "{batches:?}");
    assert_eq!(role.counts.unparsed, 1, "the line without an end");
    expect(role.stop().await.0, 0..3000);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_few_lines_behind_an_open_piece_come_soon_and_a_stop_before_loses_none() {
    let (_directory, path) = log();
    let text = line(1);
    let (head, tail) = text.trim_end().split_at(40);
    let cri =
        |stream: &str, tag: &str, text: &str| format!("2026-01-01T00:00:00Z {stream} {tag} {}\n", text.trim_end());
    fs::write(&path, [cri("stdout", "F", &line(0)), cri("stdout", "P", head), cri("stderr", "F", &line(2))].concat())
        .unwrap();
    let mut role = start(&path, &Positions::new(), |file, _| file.poll_interval = Duration::from_secs(3600));
    role.receive_lines(1).await;
    let (mut numbers, positions) = role.stop().await;
    assert_eq!(numbers, [0], "a stop leaves the open line and what follows it to the next start");
    let mut file = OpenOptions::new().append(true).open(&path).unwrap();
    file.write_all(cri("stdout", "F", tail).as_bytes()).unwrap();
    file.write_all(cri("stdout", "P", head).as_bytes()).unwrap();
    file.write_all(cri("stderr", "F", &line(3)).as_bytes()).unwrap();
    let mut role = start(&path, &positions, |file, _| file.poll_interval = Duration::from_secs(3600));
    role.receive_until(|role| role.counts.lines >= 5).await;
    assert_eq!(role.counts, Counts { lines: 5, unparsed: 1, oversized: 0, withheld: 0 });
    numbers.extend(role.stop().await.0);
    expect(numbers, 0..4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_matches_too_counts_once() {
    let (directory, path) = log();
    let (pattern, copy) = (directory.path().join("access*.log"), |n| directory.path().join(format!("access-{n}.log")));
    let copies = |report: &NodeReport| report.problems.iter().filter(|p| p.text.contains("is a copy")).count();
    append(&path, 0..100);
    let mut role = start(&pattern, &Positions::new(), |_, _| {});
    role.receive_lines(100).await;
    fs::copy(&path, copy(1)).unwrap();
    role.report(|report| copies(report) == 1).await;
    // The second copy is seen only after the truncation.
    let unseen = directory.path().join("unseen");
    for (round, former) in [(1, None), (2, Some(&unseen))] {
        former.map(|former| fs::copy(&path, former).unwrap());
        File::options().write(true).open(&path).unwrap().set_len(0).unwrap();
        append(&path, round * 100..round * 100 + 50);
        append(&path, round * 100 + 50..round * 100 + 100);
        role.receive_lines(round * 100 + 100).await;
    }
    fs::rename(&unseen, copy(2)).unwrap();
    role.report(|report| copies(report) == 2 && report.sources[0].files == 1).await;
    let (mut numbers, positions) = role.stop().await;

    append(&path, 300..301);
    let mut role = start(&pattern, &positions, |_, _| {});
    role.report(|report| copies(report) == 2).await;
    role.receive_lines(1).await;
    numbers.extend(role.stop().await.0);
    expect(numbers, 0..301);
}

#[tokio::test(flavor = "multi_thread")]
async fn other_files_with_the_same_first_line_are_read() {
    let (directory, path) = log();
    let other = |n| directory.path().join(format!("access-{n}.log"));
    append(&path, [0, 1]);
    let mut role = start(&directory.path().join("access*.log"), &Positions::new(), |_, _| {});
    role.receive_lines(2).await;
    fs::write(other(1), line(0) + &line(2)).unwrap();
    role.receive_lines(4).await;
    // As long as it holds nothing else it is taken for a copy.
    append(&other(2), [0]);
    role.report(|report| report.problems.iter().any(|problem| problem.text.contains("is a copy"))).await;
    append(&other(2), [3]);
    role.receive_lines(6).await;
    role.report(|report| report.problems.is_empty()).await;
    assert_eq!(sorted(role.stop().await.0), [0, 0, 0, 1, 2, 3]);
}

#[tokio::test(flavor = "multi_thread")]
async fn all_sources_share_the_files_that_may_be_open() {
    let directory = tempfile::tempdir().unwrap();
    for number in 0..300 {
        fs::write(directory.path().join(format!("a-{number}")), "").unwrap();
        fs::write(directory.path().join(format!("b-{number}")), "").unwrap();
    }
    let mut config = IngestConfig::for_files(vec![directory.path().join("a-*")]);
    let mut other = IngestConfig::for_files(vec![directory.path().join("b-*")]).sources.remove(0);
    other.name = "other".to_owned();
    config.sources.push(other);
    let mut role = start_config(config, &Positions::new(), 64);
    let report = role.report(|report| report.sources.iter().map(|source| source.files).sum::<u64>() == 512).await;
    let refused = report.problems.iter().filter(|problem| problem.severity == Severity::Degraded);
    assert!(refused.filter(|problem| problem.text.contains("files are not followed")).count() > 0, "{report:?}");
    role.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_is_made_again_is_watched_again() {
    let directory = tempfile::tempdir().unwrap();
    let sub = directory.path().join("sub");
    fs::create_dir(&sub).unwrap();
    append(&sub.join("access.log"), 0..1);
    let pattern = directory.path().join("*/access.log");
    let mut role = start(&pattern, &Positions::new(), |file, _| file.poll_interval = Duration::from_secs(3600));
    role.receive_lines(1).await;
    fs::remove_dir_all(&sub).unwrap();
    role.report(|report| report.sources[0].lines == 1).await;
    fs::create_dir(&sub).unwrap();
    append(&sub.join("access.log"), 1..2);
    role.receive_lines(2).await;
    expect(role.stop().await.0, 0..2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_file_with_open_windows_is_reported() {
    let (_directory, path) = log();
    append(&path, 0..1);
    let gone = Positions::from([(("traefik".to_owned(), 7), Position { offset: 100, needed: true })]);
    let mut role = start(&path, &gone, |_, _| {});
    let report = role.report(|report| !report.problems.is_empty()).await;
    assert_eq!(report.problems[0].severity, Severity::Warning);
    assert!(report.problems[0].text.contains("could not be rebuilt"), "{:?}", report.problems);
    role.receive_lines(1).await;
    role.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_receiver_the_role_ends_with_an_error() {
    let (_directory, path) = log();
    append(&path, 0..1);
    let mut role = start(&path, &Positions::new(), |_, _| {});
    // A source that has nothing to send must notice it too.
    role.receive_lines(1).await;
    drop(role.batches);
    let ended = tokio::time::timeout(DEADLINE, role.task).await.expect("it ends").expect("no panic");
    assert!(matches!(ended, Err(IngestError::ReceiverGone { .. })), "{ended:?}");
    assert!(role.shutdown.is_draining());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_source_is_reported() {
    let (_directory, path) = log();
    append(&path, 0..1);
    let mut role = start(&path, &Positions::new(), |_, lines| lines.silent_after = Duration::from_millis(1));
    role.receive_lines(1).await;
    let report = role.report(|report| !report.problems.is_empty()).await;
    assert!(report.problems[0].text.contains("silent"), "{:?}", report.problems);
    role.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_that_no_rule_can_match_are_withheld_unless_their_client_is_banned() {
    let (_directory, path) = log();
    append(&path, 0..2);
    let mut role = start(&path, &Positions::new(), |_, _| {});
    role.receive_lines(2).await;
    assert_eq!(role.filter, 0);
    let statuses = Some(StatusSet::new([(401, 404)]));
    role.interest.send_replace(Arc::new(Interest { version: 7, statuses, ..Interest::default() }));
    role.banned.put("192.0.2.1".parse().unwrap());
    // It takes effect with one of the next batches, and then with all of them.
    let mut number = 2;
    while role.filter == 0 {
        append(&path, number..number + 1);
        number += 1;
        role.receive_lines(number).await;
    }
    assert_eq!(role.filter, 7);
    let visitor = |number: u64, status: u16| {
        line(number).replace("192.0.2.1:", "192.0.2.2:").replace(":404,", &format!(":{status},"))
    };
    let mut text = line(number).replace(":404,", ":200,");
    text.extend([visitor(number + 1, 404), visitor(number + 2, 200), visitor(number + 3, 405)]);
    OpenOptions::new().append(true).open(&path).unwrap().write_all(text.as_bytes()).unwrap();
    role.receive_lines(number + 4).await;
    assert_eq!(role.counts.withheld, 2);
    let report = role.report(|report| report.sources[0].lines == number + 4).await;
    assert_eq!((report.sources[0].events, report.sources[0].withheld), (number + 4, 2));
    assert_eq!(report.sources[0].sample_client.as_deref(), Some("192.0.2.2"));
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &role.registry).unwrap();
    assert!(text.contains("portcullis_ingest_withheld_lines_total{source=\"traefik\"} 2"), "{text}");
    expect(role.stop().await.0, 0..number + 2);
}

/// A line of the common log format that tells of a failed login.
fn clf(host: &str, user: &str, number: u64) -> String {
    format!(
        "{host} - {user} [08/Jan/2026:14:19:15 +0000] \"GET /n/{number} HTTP/1.1\" 401 12 \"-\" \"-\" {} \"r@file\" \
         \"http://192.0.2.9\" 0ms\n",
        number + 70_000
    )
}

fn write(path: &Path, text: &str) {
    OpenOptions::new().create(true).append(true).open(path).unwrap().write_all(text.as_bytes()).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_that_may_be_forged_are_held_back_and_reported() {
    let (_directory, path) = log();
    write(&path, &(0..100).map(|number| clf("192.0.2.1", "-", number)).collect::<String>());
    let mut role = start(&path, &Positions::new(), |_, _| {});
    role.receive_lines(100).await;
    // One request, whose user name ends the line, adds one, and begins another.
    write(
        &path,
        &clf(
            "203.0.113.7",
            "x\n198.51.100.66 - y [08/Jan/2026:14:19:15 +0000] \"GET /n/1 HTTP/1.1\" 401 12 \"-\" \"-\" \
        123456 \"r@file\" \"-\" 0ms\n198.51.100.66 - z",
            100,
        ),
    );
    write(&path, &(101..110).map(|number| clf("192.0.2.1", "-", number)).collect::<String>());
    role.receive_lines(112).await;
    assert_eq!(role.counts.unparsed, 1);
    let report = role.report(|report| report.sources[0].lines == 112).await;
    assert_eq!((report.sources[0].suspect, report.sources[0].events), (2, 109));
    assert!(report.problems.iter().any(|problem| problem.text.contains("accessLog.format: json")), "{report:?}");
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &role.registry).unwrap();
    assert!(text.contains("portcullis_ingest_suspect_lines_total{source=\"traefik\"} 2"), "{text}");
    expect(role.stop().await.0, (0..100).chain(101..110));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_clock_of_the_writer_is_compared_with_lines_as_they_come() {
    let (_directory, path) = log();
    let at = |number: u64, ahead: Duration| {
        line(number).replace("2026-01-08T14:19:15.98Z", &Clock::system().now().saturating_add(ahead).to_string())
    };
    // What was there before the start is old and tells nothing.
    append(&path, 0..20);
    let mut role = start(&path, &Positions::new(), |_, _| {});
    role.receive_lines(20).await;
    let report = role.report(|report| report.sources[0].lines == 20).await;
    assert_eq!(report.sources[0].skew_ms, None);
    for number in 20..28 {
        write(&path, &at(number, Duration::from_secs(100)));
        role.receive_lines(number + 1).await;
    }
    let report = role.report(|report| report.sources[0].skew_ms.is_some()).await;
    assert!(report.sources[0].skew_ms.is_some_and(|skew| (80_000..=100_000).contains(&skew)), "{report:?}");
    assert!(report.problems.iter().any(|problem| problem.text.contains("set the clock")), "{report:?}");
    expect(role.stop().await.0, 0..28);
}
