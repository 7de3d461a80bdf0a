//! `replay` against the brute-force model: exactly the same bans at exactly the same moments.

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use tests::access::{Access, SECOND};
use tests::brute::{self, Ban, Escalation, Rule};
use tests::portcullis::{Answer, portcullis};
use tests::random::Random;
use tests::sample;

/// Files in a folder of their own.
struct Files {
    folder: TempDir,
}

impl Files {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn add(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    }
}

fn replay(config: &Path, logs: &[PathBuf], flags: &[&str]) -> Answer {
    let mut args = vec!["replay".to_owned(), "-c".to_owned(), config.display().to_string()];
    args.extend(flags.iter().map(|flag| (*flag).to_owned()));
    args.extend(logs.iter().map(|log| log.display().to_string()));
    portcullis(args).unwrap().expect(0).unwrap()
}

fn bans(config: &Path, logs: &[PathBuf]) -> Vec<Ban> {
    let answer = replay(config, logs, &["--json"]);
    let bans: Vec<Ban> =
        answer.stdout.lines().map(|line| Ban::parse(line).unwrap_or_else(|| panic!("not a ban: {line}"))).collect();
    assert!(bans.is_sorted_by_key(|ban| &ban.banned_at), "bans come in the order of their moments");
    let mut sorted = bans;
    sorted.sort();
    sorted
}

/// A configuration with these rules and no jitter, which the model cannot foretell.
fn config(rules: &[Rule], escalation: Escalation) -> String {
    let seconds = |nanos: i64| format!("{}s", nanos / SECOND);
    let mut text = format!(
        "[detect.escalation]\nfactor = {}.0\nmax = \"{}\"\nforget_after = \"{}\"\njitter = \"0%\"\n",
        escalation.factor,
        seconds(escalation.max),
        seconds(escalation.forget_after),
    );
    for rule in rules {
        let _ = write!(
            text,
            "[detect.rules.{}]\nmatch = '{}'\nmax_retry = {}\nfind_time = \"{}\"\nban_time = \"{}\"\n",
            rule.name,
            rule.condition,
            rule.max_retry,
            seconds(rule.find),
            seconds(rule.ban),
        );
    }
    text
}

/// `forget_after` of the random logs.
const MEMORY: i64 = 200 * SECOND;

const BUILT_IN: &str = "[detect.escalation]\njitter = \"0%\"\n";

#[test]
fn the_sample_gives_exactly_the_bans_of_the_model() {
    let files = Files::new();
    let config = files.add("portcullis.toml", BUILT_IN);
    let log = files.add("access.log", sample::render_json_log());
    let expected =
        brute::bans(&brute::merge(&[sample::render_json_log()]), &brute::built_in_rules(), Escalation::default());
    assert_eq!(bans(&config, &[log]), expected);
    assert_eq!(expected.len(), 5);
}

/// CLF has whole seconds and no peer, so the user says that a proxy stands in front, and moments may differ by one.
#[test]
fn json_and_clf_of_one_log_give_the_same_bans() {
    let files = Files::new();
    let config = files.add("portcullis.toml", format!("{BUILT_IN}[ingest.client_ip]\nclf_behind_proxy = true\n"));
    let json = bans(&config, &[files.add("access.json.log", sample::render_json_log())]);
    let clf = bans(&config, &[files.add("access.clf.log", sample::render_clf_log())]);
    let what = |bans: &[Ban]| {
        let mut list: Vec<_> = bans.iter().map(|ban| (ban.target.clone(), ban.rule.clone(), ban.ban_count)).collect();
        list.sort();
        list
    };
    assert_eq!(what(&json), what(&clf));
    for ban in &json {
        let twin = clf.iter().find(|twin| (&twin.target, twin.ban_count) == (&ban.target, ban.ban_count)).unwrap();
        let apart = seconds(&ban.banned_at) - seconds(&twin.banned_at);
        assert!((0..=1).contains(&apart), "{ban:?}\n{twin:?}");
    }
}

/// Seconds of the day.
fn seconds(time: &str) -> i64 {
    let part = |from: usize| time[from..from + 2].parse::<i64>().unwrap();
    (part(11) * 60 + part(14)) * 60 + part(17)
}

#[test]
fn replay_prints_the_same_bytes_twice_and_reads_compressed_logs() {
    let files = Files::new();
    let config = files.add("portcullis.toml", "");
    let content = sample::render_json_log();
    let plain = files.add("access.log", &content);
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all(content.as_bytes()).unwrap();
    let gz = files.add("access.log.gz", gz.finish().unwrap());
    let zst = files.add("access.log.zst", zstd::stream::encode_all(content.as_bytes(), 1).unwrap());
    for flags in [&["--json"][..], &[], &["--lines"], &["--lines", "--json"]] {
        let once = replay(&config, std::slice::from_ref(&plain), flags).stdout;
        assert!(!once.is_empty());
        assert_eq!(once, replay(&config, std::slice::from_ref(&plain), flags).stdout, "{flags:?}");
    }
    let once = replay(&config, &[plain], &["--json"]).stdout;
    assert_eq!(once, replay(&config, &[gz], &["--json"]).stdout);
    assert_eq!(once, replay(&config, &[zst], &["--json"]).stdout);
}

/// Small numbers, so that windows, bans and histories end many times in one log.
fn rules() -> Vec<Rule> {
    vec![
        Rule {
            name: "at-once",
            condition: "Status(`403`) || Status(`429`)",
            matches: |line| matches!(line.status, 403 | 429),
            max_retry: 1,
            find: SECOND,
            ban: 2 * SECOND,
        },
        Rule {
            name: "guessing",
            condition: "Status(`401`) && !Username(`-`)",
            matches: |line| line.status == 401 && line.username != "-",
            max_retry: 2,
            find: 5 * SECOND,
            ban: 40 * SECOND,
        },
        Rule {
            name: "missing",
            condition: "Status(`404`)",
            matches: |line| line.status == 404,
            max_retry: 3,
            find: 10 * SECOND,
            ban: 20 * SECOND,
        },
        Rule {
            name: "probing",
            condition: "Status(`400-499`) && PathPrefix(`/admin`)",
            matches: |line| (400..=499).contains(&line.status) && line.path.starts_with("/admin"),
            max_retry: 5,
            find: 90 * SECOND,
            ban: 30 * SECOND,
        },
    ]
}

fn client(number: u64, random: &mut Random) -> Access {
    let v4 = |a, b, c, d| IpAddr::V4(Ipv4Addr::new(a, b, c, d));
    let last = u8::try_from(number).unwrap();
    let peer = match number % 7 {
        // Two addresses of one client.
        0 => {
            let host = 1 + u16::try_from(random.below(2)).unwrap();
            IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, u16::from(last), 0, 0, 0, host))
        }
        1 => v4(172, 71, 0, 1),
        // Never banned.
        2 if number == 2 => v4(192, 168, 0, 2),
        _ => v4(192, 0, 2, last),
    };
    let mut access = Access::new(0, peer, 200, "/");
    match number % 7 {
        1 => {
            let visitor = v4(203, 0, 113, last).to_string();
            access.forwarded_for = Some(format!("198.51.100.{number}, {visitor}"));
            access.cf_connecting_ip = random.chance(50).then_some(visitor);
        }
        // A header of an untrusted peer is nothing.
        3 => access.forwarded_for = Some("198.51.100.99".to_owned()),
        _ => {}
    }
    access
}

/// What a request asks for and gets, which at least one rule counts most of the time.
type Kind = (u16, &'static str, &'static str);

fn kind(random: &mut Random) -> Kind {
    (
        random.pick(&[404, 404, 404, 404, 401, 401, 403, 429, 200, 302]),
        random.pick(&["/", "/admin", "/admin/x?y=1", "/login", "/a.png"]),
        random.pick(&["-", "anna", "root"]),
    )
}

/// Requests of one client: bursts whose span is a rule's window give or take a nanosecond, with pauses that are the length
/// of a ban, or of a ban and a memory, give or take a nanosecond.
fn bursts(number: u64, random: &mut Random) -> Vec<Access> {
    let mut list = Vec::new();
    let mut at = sample::BEGIN + i64::try_from(random.below(60)).unwrap() * SECOND;
    while at < sample::BEGIN + 3_600 * SECOND {
        let rule = &rules()[usize::try_from(random.below(4)).unwrap()];
        let count = i64::try_from(rule.max_retry).unwrap() + random.pick(&[-1, 0, 0, 1]);
        let span = rule.find + random.pick(&[-1, 0, 0, 1, -SECOND, SECOND]);
        let same = random.chance(50).then(|| kind(random));
        for i in 0..count {
            let mut access = client(number, random);
            let (status, path, username) = same.unwrap_or_else(|| kind(random));
            access.start = at + span * i / (count - 1).max(1);
            (access.status, access.path, access.username) = (status, path.to_owned(), username.to_owned());
            at = at.max(access.start);
            list.push(access);
        }
        let ban = random.pick(&[2, 2, 4, 8, 16, 20, 30, 30, 32, 40, 60, 64, 80, 120, 150]) * SECOND;
        let memory = if random.chance(20) { MEMORY } else { 0 };
        at += ban + memory + random.pick(&[-1, 0, 1, SECOND, -SECOND]);
    }
    list
}

/// Three logs. Requests of one moment stay in one file, so that their order is certain.
fn logs(seed: u64) -> Vec<String> {
    let mut random = Random::new(seed);
    let mut list: Vec<Access> = (0..40).flat_map(|number| bursts(number, &mut random)).collect();
    list.sort_by_key(|access| access.start);
    let mut logs = vec![String::new(); 3];
    for access in list {
        let log = &mut logs[usize::try_from(access.start % 3).unwrap()];
        let _ = writeln!(log, "{}", access.render_json());
    }
    logs
}

#[test]
fn random_logs_give_exactly_the_bans_of_the_model() {
    let files = Files::new();
    let escalation = Escalation { factor: 2, max: 150 * SECOND, forget_after: MEMORY };
    let config = files.add("portcullis.toml", config(&rules(), escalation));
    let mut again = 0;
    for seed in 0..20 {
        let logs = logs(seed);
        let paths: Vec<PathBuf> = logs.iter().enumerate().map(|(i, log)| files.add(&format!("{i}.log"), log)).collect();
        let expected = brute::bans(&brute::merge(&logs), &rules(), escalation);
        let found = bans(&config, &paths);
        let missed: Vec<_> = expected.iter().filter(|ban| !found.contains(ban)).take(5).collect();
        let invented: Vec<_> = found.iter().filter(|ban| !expected.contains(ban)).take(5).collect();
        assert!(missed.is_empty() && invented.is_empty(), "seed {seed}: missed {missed:#?}, invented {invented:#?}");
        assert_eq!(found.len(), expected.len(), "seed {seed}");
        again += expected.iter().filter(|ban| ban.ban_count > 2).count();
    }
    assert!(again > 100, "the logs escalate");
}
