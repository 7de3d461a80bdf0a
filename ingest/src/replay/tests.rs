use std::io::Write;
use std::sync::atomic::Ordering;

use flate2::Compression;
use flate2::write::GzEncoder;
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

fn settings(horizon: Duration) -> ReplaySettings {
    let (client_ip, interest) =
        (Arc::default(), Arc::new(Interest { headers: vec!["referer".to_owned()], ..Interest::default() }));
    ReplaySettings { format: Format::Auto, line_bytes_max: 512, horizon, client_ip, interest }
}

fn line(millis: i64, path: &str) -> String {
    let time = Timestamp::from_millis(millis);
    format!(
        "{{\"ClientAddr\":\"192.0.2.1:1\",\"DownstreamStatus\":404,\"RequestPath\":\"{path}\",\"StartUTC\":\"{time}\",\
         \"request_Referer\":\"r{path}\"}}\n"
    )
}

fn file(directory: &TempDir, name: &str, content: &[u8]) -> ReplayFile {
    let path = directory.path().join(name);
    fs::write(&path, content).unwrap();
    let (node, _) = name.split_once('.').unwrap();
    ReplayFile { path, node: node.into(), source: "traefik".into() }
}

fn paths(files: Vec<ReplayFile>, horizon: Duration) -> Vec<String> {
    let mut found = Vec::new();
    let reader = ReplayReader::new(files, settings(horizon));
    reader
        .run(
            |event| event.text.path != "/skip",
            |item| {
                let event = item.event;
                assert_eq!(event.headers.get("Referer"), Some(&*format!("r{}", event.text.path)));
                assert_eq!(event.status, 404);
                found.push(event.text.path.to_owned());
            },
        )
        .unwrap();
    found
}

const HOUR: Duration = Duration::from_secs(3600);

#[test]
fn files_are_merged_by_time_then_node_then_offset() {
    let directory = tempfile::tempdir().unwrap();
    let one = [line(1000, "/a1"), line(3000, "/a3"), line(3000, "/a3-again"), line(2000, "/skip")].concat();
    let two = [line(3000, "/b3"), line(2000, "/b2"), "no access\n\n".to_owned(), line(9000, "/b9")].concat();
    let files = vec![file(&directory, "b.log", two.as_bytes()), file(&directory, "a.log", one.as_bytes())];
    assert_eq!(paths(files, HOUR), ["/a1", "/b2", "/a3", "/a3-again", "/b3", "/b9"]);
}

#[test]
fn compressed_files_are_read_and_progress_is_theirs() {
    let directory = tempfile::tempdir().unwrap();
    let gzip = |text: &str| {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(text.as_bytes()).unwrap();
        encoder.finish().unwrap()
    };
    let two_members = [gzip(&line(1000, "/gz1")), gzip(line(2000, "/gz2").trim_end())].concat();
    let zstd = zstd::encode_all(line(1500, "/zst").as_bytes(), 3).unwrap();
    let files = vec![
        file(&directory, "a.log.gz", &two_members),
        file(&directory, "a.log.zst", &zstd),
        file(&directory, "a.log", line(1700, "/plain").as_bytes()),
        file(&directory, "a.empty", b""),
    ];
    let reader = ReplayReader::new(files.clone(), settings(HOUR));
    let (total, read) = (reader.total_bytes(), reader.bytes_read());
    let stats = reader.run(|_| true, |_| {}).unwrap();
    assert_eq!((stats.lines, stats.events), (4, 4));
    assert_eq!(read.load(Ordering::Relaxed), total);
    assert_eq!(paths(files, HOUR), ["/gz1", "/zst", "/plain", "/gz2"]);
}

#[test]
fn a_broken_archive_is_an_error_that_names_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let broken = file(&directory, "a.log.gz", &[0x1f, 0x8b, 8, 0]);
    let error = ReplayReader::new(vec![broken], settings(HOUR)).run(|_| true, |_| {}).unwrap_err();
    assert!(error.to_string().contains("a.log.gz"), "{error}");
    let missing = ReplayFile { path: directory.path().join("none"), node: "a".into(), source: "b".into() };
    let error = ReplayReader::new(vec![missing], settings(HOUR)).run(|_| true, |_| {}).unwrap_err();
    assert!(matches!(error, ReplayError::Open { .. }));
}

#[test]
fn what_is_later_than_the_horizon_comes_when_it_is_read() {
    let directory = tempfile::tempdir().unwrap();
    let text =
        [line(10_000, "/a"), line(19_000, "/skip"), line(20_000, "/b"), line(5_000, "/late"), line(12_000, "/c")]
            .concat();
    let files = || vec![file(&directory, "a.log", text.as_bytes())];
    assert_eq!(paths(files(), Duration::from_secs(9)), ["/a", "/late", "/c", "/b"]);
    assert_eq!(paths(files(), Duration::from_secs(20)), ["/late", "/a", "/c", "/b"]);
}

#[test]
fn a_single_time_far_ahead_moves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let far = 400 * 86_400_000;
    for first in [false, true] {
        let mut one = vec![line(1_000, "/a1"), line(3_000, "/a3"), line(5_000, "/a5"), line(6_000, "/a6")];
        one.insert(if first { 0 } else { 1 }, line(far, "/far"));
        let two = [line(2_000, "/b2"), line(4_000, "/b4"), line(20_000, "/b20")].concat();
        let files =
            || vec![file(&directory, "a.log", one.concat().as_bytes()), file(&directory, "b.log", two.as_bytes())];
        let horizon = Duration::from_secs(1);
        assert_eq!(paths(files(), horizon), ["/a1", "/b2", "/a3", "/b4", "/a5", "/a6", "/b20", "/far"]);
        let alone = vec![files().remove(0)];
        assert_eq!(paths(alone, horizon), ["/a1", "/a3", "/a5", "/a6", "/far"]);
    }
}

#[test]
fn a_leap_that_is_confirmed_counts() {
    let mut progress = Progress::default();
    let mut note = |seconds| {
        progress.note(Timestamp::from_secs(seconds), Duration::from_secs(10));
        progress.newest.map(|newest| newest.as_millis() / 1000)
    };
    assert_eq!([note(100), note(101), note(200), note(195)], [None, Some(101), Some(101), Some(200)]);
    assert_eq!([note(900), note(201), note(300), note(400), note(401)].map(Option::unwrap), [200, 201, 201, 300, 401]);
}

#[test]
fn events_are_held_no_longer_than_the_horizon() {
    let directory = tempfile::tempdir().unwrap();
    let text: String = (0..5000).map(|second| line(second * 1000, "/x")).collect();
    let newest = std::cell::Cell::new(Timestamp::EPOCH);
    let reader = ReplayReader::new(vec![file(&directory, "a.log", text.as_bytes())], settings(Duration::from_secs(10)));
    let mut behind = 0;
    reader
        .run(
            |event| {
                newest.set(newest.get().max(event.time.unwrap()));
                true
            },
            |item| {
                let seconds = newest.get().since(item.event.time.unwrap()).as_secs();
                behind = behind.max(seconds);
            },
        )
        .unwrap();
    assert_eq!(behind, 11);
}

#[test]
fn lines_shows_each_line_in_its_place() {
    let directory = tempfile::tempdir().unwrap();
    let long = "x".repeat(600);
    let text = format!("{}\nplugin debug\n{long}\n{}", line(1000, "/a"), line(500, "/b").trim_end());
    let reader = ReplayReader::new(vec![file(&directory, "a.log", text.as_bytes())], settings(HOUR));
    let mut shown = Vec::new();
    let stats = reader
        .lines(|line| {
            let what = match line.what {
                LineKind::Event(event) => event.text.path.to_owned(),
                LineKind::Unparsed(refusal) => refusal.as_str().to_owned(),
                other => format!("{other:?}"),
            };
            shown.push((line.offset, line.line.len(), what));
        })
        .unwrap();
    let first = line(1000, "/a").len();
    let expected = [
        (0, first - 1, "/a"),
        (first, 0, "Blank"),
        (first + 1, 12, "not the common log format"),
        (first + 14, 0, "Oversized"),
        (first + 615, line(500, "/b").len() - 1, "/b"),
    ];
    let expected: Vec<_> = expected.map(|(offset, length, what)| (offset as u64, length, what.to_owned())).into();
    assert_eq!(shown, expected);
    assert_eq!((stats.lines, stats.events, stats.unparsed, stats.oversized), (5, 2, 1, 1));
    assert_eq!(stats.unparsed_sample.as_deref(), Some("plugin debug"));
    assert_eq!((stats.first, stats.last), (Some(Timestamp::from_millis(500)), Some(Timestamp::from_millis(1000))));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn within_the_horizon_the_order_is_total(
        logs in proptest::collection::vec(proptest::collection::vec((0..20_i64, 0..9_i64), 0..40), 1..4),
    ) {
        let directory = tempfile::tempdir().unwrap();
        let mut expected = Vec::new();
        let mut files = Vec::new();
        for (index, log) in logs.iter().enumerate() {
            let mut text = String::new();
            let mut end = 0;
            for (step, duration) in log {
                // Lines stand in the order of their ends, requests take up to nine seconds.
                end += step;
                let time = (end - duration).max(0) * 1000;
                let path = format!("/{index}/{}", text.len());
                expected.push((time, index, text.len(), path.clone()));
                text.push_str(&line(time, &path));
            }
            files.push(file(&directory, &format!("{index}.log"), text.as_bytes()));
        }
        expected.sort();
        let expected: Vec<String> = expected.into_iter().map(|(.., path)| path).collect();
        files.reverse();
        prop_assert_eq!(paths(files, Duration::from_secs(9)), expected);
    }
}
