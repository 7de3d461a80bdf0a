//! The verbs against an API server of our own making: what they ask, what they print, how they end.

use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::Json;
use axum::Router;
use axum::http::StatusCode;
use axum::routing::{get, post};
use clap::Parser;
use proto::api::{
    AllowRequest, ApiError, BackendHold, BanReply, BanRequest, BansReply, CoveredBy, ExplainReply, HoldState,
    PauseReply, PauseRequest, RuleProgress, StatusReply, UnbanReply, UnbanRequest, path,
};
use proto::ban::{Ban, BanRecord, Evidence, Origin, Pause};
use proto::envelope::{CloudEvent, EventType};
use proto::report::{BackendReport, DetectReport, NodeReport, Problem, Role, RuleReport, SourceReport};
use proto::time::{Clock, Timestamp};
use serde_json::{Value, json};
use tokio::net::UnixListener;

use super::{Exit, execute};
use crate::args::{Cli, ClientArgs};
use crate::client::{Client, Way};
use crate::output::Output;

const NOW: Timestamp = Timestamp::from_secs(1_767_881_955);

/// A server on a socket in a directory of its own.
struct Server {
    dir: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
}

impl Server {
    fn start(router: Router) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(async { UnixListener::bind(dir.path().join("api.sock")).unwrap() });
        runtime.spawn(async { axum::serve(listener, router).await });
        Self { dir, runtime }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("api.sock")
    }

    /// Runs a verb as typed, without a terminal.
    fn run(&self, words: &[&str]) -> (String, anyhow::Result<Exit>) {
        run(&self.socket(), words)
    }

    /// Runs a verb that must work.
    fn ok(&self, words: &[&str]) -> (String, Exit) {
        let (text, result) = self.run(words);
        (text, result.unwrap_or_else(|error| panic!("{words:?}: {error:#}")))
    }
}

fn run(socket: &Path, words: &[&str]) -> (String, anyhow::Result<Exit>) {
    let words = ["portcullis"].iter().chain(words).copied().chain(["--socket", socket.to_str().unwrap()]);
    let cli = Cli::try_parse_from(words).unwrap();
    let mut bytes = Vec::new();
    let result = execute(cli.verb, &mut Output::new(&mut bytes, false, Clock::manual(NOW)));
    (String::from_utf8(bytes).unwrap(), result)
}

fn ban(target: &str, rule: &str, seconds: Option<u64>) -> Ban {
    Ban {
        target: target.parse().unwrap(),
        rule: rule.to_owned(),
        origin: if rule == "operator" { Origin::Operator } else { Origin::Detect },
        ban_count: 2,
        ban_seconds: seconds,
        banned_at: NOW.saturating_sub(Duration::from_secs(60)),
        expires_at: seconds.map(|seconds| NOW.saturating_add(Duration::from_secs(seconds))),
        reason: "15 in 1m".to_owned(),
        evidence: Evidence::default(),
    }
}

fn refusal(status: StatusCode, text: &str) -> (StatusCode, Json<ApiError>) {
    (status, Json(ApiError { error: text.to_owned() }))
}

#[test]
fn ban_sends_what_was_typed_and_tells_the_end() {
    let server = Server::start(Router::new().route(
        path::BAN,
        post(async |Json(request): Json<BanRequest>| {
            let mut ban = ban(&request.target.to_string(), "operator", request.seconds);
            ban.reason = request.reason;
            Json(BanReply { ban })
        }),
    ));
    let (text, exit) = server.ok(&["ban", "192.0.2.1"]);
    assert_eq!((text.as_str(), exit), ("banned 192.0.2.1 until 2026-01-08 15:19:15Z\n", Exit::Done));
    let (text, _) = server.ok(&["ban", "192.0.2.77/24", "--permanent", "--reason", "x\ty", "--json"]);
    let printed: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(printed["target"], "192.0.2.0/24");
    assert_eq!((&printed["expires_at"], &printed["reason"]), (&Value::Null, &json!("x\ty")));
}

#[test]
fn unban_names_the_wider_ban_that_stays_and_fails() {
    let answer = |reply: UnbanReply| {
        Server::start(Router::new().route(
            path::UNBAN,
            post(async move |Json(request): Json<UnbanRequest>| {
                assert!(request.all || !request.targets.is_empty());
                Json(reply)
            }),
        ))
    };
    let target = "192.0.2.1".parse().unwrap();
    let by = "192.0.2.0/24".parse().unwrap();
    let covered = answer(UnbanReply { covered: vec![CoveredBy { target, by }], ..UnbanReply::default() });
    let (text, exit) = covered.ok(&["unban", "192.0.2.1"]);
    assert_eq!(text, "192.0.2.1 is still banned with 192.0.2.0/24; `portcullis unban 192.0.2.0/24` frees all of it\n");
    assert_eq!(exit, Exit::Failed);
    assert_eq!(covered.ok(&["unban", "192.0.2.1", "--json"]).1, Exit::Failed);

    let free = answer(UnbanReply { lifted: vec![by], not_banned: vec![target], covered: Vec::new() });
    let (text, exit) = free.ok(&["unban", "192.0.2.0/24", "192.0.2.1"]);
    assert_eq!((text.as_str(), exit), ("unbanned 192.0.2.0/24\n192.0.2.1 was not banned\n", Exit::Done));
    let nobody = answer(UnbanReply::default());
    assert_eq!(nobody.ok(&["unban", "--all"]), ("nobody was banned\n".to_owned(), Exit::Done));
}

#[test]
fn allow_says_until_when_and_what_was_lifted() {
    let server = Server::start(Router::new().route(
        path::ALLOW,
        post(async |Json(request): Json<AllowRequest>| {
            let until = request.seconds.map(|seconds| NOW.saturating_add(Duration::from_secs(seconds)));
            Json(json!({ "target": request.target, "until": until, "lifted": ["192.0.2.1"], "covered": [] }))
        }),
    ));
    let (text, _) = server.ok(&["allow", "192.0.2.1", "--for", "24h"]);
    assert_eq!(text, "192.0.2.1 is allowed until 2026-01-09 14:19:15Z: nobody bans it\nunbanned 192.0.2.1\n");
    assert!(server.ok(&["allow", "192.0.2.1"]).0.starts_with("192.0.2.1 is allowed for ever: nobody bans it\n"));
}

#[test]
fn pause_and_resume_tell_the_state() {
    let paused = async |Json(request): Json<PauseRequest>| {
        let until = request.seconds.map(|seconds| NOW.saturating_add(Duration::from_secs(seconds)));
        Json(PauseReply { paused: Some(Pause { since: NOW, until }) })
    };
    let resumed = async || Json(PauseReply { paused: None });
    let server = Server::start(Router::new().route(path::PAUSE, post(paused)).route(path::RESUME, post(resumed)));
    let (text, _) = server.ok(&["pause", "--for", "90m"]);
    assert_eq!(
        text,
        "paused since 2026-01-08 14:19:15Z for another 1h 30m, until 2026-01-08 15:49:15Z: nobody is banned\n"
    );
    assert!(server.ok(&["pause"]).0.contains("until `portcullis resume`"));
    assert_eq!(server.ok(&["resume"]).0, "not paused: bans that are not over are in force\n");
}

#[test]
fn bans_are_a_table_or_one_object_a_line() {
    let mut worst = ban("2001:db8::/64", "forceful-browsing", Some(3661));
    worst.reason = "\x1b[2Jcleared".to_owned();
    let operator = ban("192.0.2.1", "operator", None);
    let records = vec![
        BanRecord { target: operator.target, bans: vec![operator] },
        BanRecord { target: worst.target, bans: vec![worst] },
    ];
    let server = Server::start(Router::new().route(path::BANS, get(async move || Json(BansReply { bans: records }))));
    let (text, exit) = server.ok(&["bans"]);
    assert_eq!(exit, Exit::Done);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(
        lines[0].split_whitespace().collect::<Vec<_>>(),
        ["target", "rule", "origin", "count", "since", "remaining", "reason"]
    );
    assert!(lines[1].starts_with("192.0.2.1 ") && lines[1].contains(" permanent "), "{text}");
    assert!(lines[2].contains(" 1h 1m 1s ") && lines[2].ends_with("\\u{1b}[2Jcleared"), "{text}");
    let (text, _) = server.ok(&["bans", "--json"]);
    let objects: Vec<Ban> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(objects.len(), 2);
    assert!(!text.contains('\x1b'));
}

fn well() -> StatusReply {
    let report = |role| NodeReport::new("edge-1", role, NOW);
    let source = SourceReport {
        name: "traefik".to_owned(),
        kind: "file".to_owned(),
        lines: 1200,
        sample_client: Some("198.51.100.9 behind 104.16.0.1".to_owned()),
        unparsed_sample: Some("level=error".to_owned()),
        last_line_at: Some(NOW.saturating_sub(Duration::from_secs(3))),
        behind_bytes: 1_600_000,
        suspect: 17,
        skew_ms: Some(-3100),
        ..SourceReport::default()
    };
    let rule = RuleReport { name: "forceful-browsing".to_owned(), matches: 77, ..RuleReport::default() };
    let backend =
        BackendReport { name: "iptables".to_owned(), members: 5, dropped_packets: 991, ..BackendReport::default() };
    StatusReply {
        at: NOW,
        nodes: vec![
            NodeReport { sources: vec![source], ..report(Role::Ingest) },
            NodeReport {
                detect: Some(DetectReport { rules: vec![rule], ..DetectReport::default() }),
                ..report(Role::Detect)
            },
            NodeReport { backends: vec![backend], ..report(Role::Enforce) },
        ],
    }
}

fn status(reply: StatusReply) -> (String, Exit, Value) {
    let server = Server::start(Router::new().route(path::STATUS, get(async move || Json(reply))));
    let (text, exit) = server.ok(&["status"]);
    let (json, same) = server.ok(&["status", "--json"]);
    assert_eq!(exit, same);
    assert_eq!(json.lines().count(), 1);
    (text, exit, serde_json::from_str(&json).unwrap())
}

#[test]
fn status_shows_every_part_and_is_well() {
    let (text, exit, json) = status(well());
    assert_eq!(exit, Exit::Done);
    assert!(text.starts_with("well\n"), "{text}");
    for part in [
        "traefik",
        "1200",
        "3s ago",
        "1.5 MiB",
        "level=error",
        "behind 104.16.0.1",
        "17 lines may be forged",
        "its times are 3s behind",
        "forceful-browsing",
        "77",
        "iptables",
        "991",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
    assert_eq!((&json["degraded"], json["nodes"].as_array().unwrap().len()), (&json!(false), 3));
}

#[test]
fn status_shows_what_a_source_turned_away_and_nothing_where_it_did_not() {
    let (text, ..) = status(well());
    assert!(!text.contains("connections") && !text.contains("dropped for"), "{text}");
    let mut reply = well();
    let source = &mut reply.nodes[0].sources[0];
    (source.connections, source.dropped, source.limited, source.refused) = (3, 41, 52, 63);
    let (text, ..) = status(reply);
    for part in
        ["traefik: 3 connections", "traefik: 41 lines dropped", "traefik: 52 lines turned away", "traefik: 63 conn"]
    {
        assert!(text.contains(part), "{part} in {text}");
    }
}

#[test]
fn status_is_degraded_by_a_problem_a_silent_role_or_a_missing_one() {
    let mut warned = well();
    warned.nodes[0].problems.push(Problem::warning("silent for 10m"));
    let (text, exit, _) = status(warned);
    assert!(text.starts_with("well, with warnings\n  warning: ingest on edge-1: silent for 10m\n"), "{text}");
    assert_eq!(exit, Exit::Done);

    let mut degraded = well();
    degraded.nodes[0].problems.push(Problem::warning("later"));
    degraded.nodes[2].problems.push(Problem::degraded("no iptables"));
    let (text, exit, json) = status(degraded);
    assert!(text.starts_with("degraded\n  degraded: enforce on edge-1: no iptables\n  warning: "), "{text}");
    assert_eq!((exit, &json["problems"][0]["text"]), (Exit::Failed, &json!("no iptables")));

    let mut silent = well();
    silent.at = NOW.saturating_add(Duration::from_secs(15));
    assert_eq!(status(silent.clone()).1, Exit::Done, "at the limit");
    silent.at = NOW.saturating_add(Duration::from_secs(16));
    let (text, exit, _) = status(silent);
    assert_eq!(exit, Exit::Failed);
    assert!(text.contains("detect on edge-1: has said nothing for 16s"), "{text}");

    let mut missing = well();
    missing.nodes.pop();
    let (text, exit, _) = status(missing);
    assert_eq!(exit, Exit::Failed);
    assert!(text.contains("enforce on -: does not run"), "{text}");
}

fn explained() -> ExplainReply {
    let progress = RuleProgress {
        rule: "forceful-browsing".to_owned(),
        mode: "enforce".to_owned(),
        counted: 7,
        needed: 15,
        find_seconds: 60,
        first_seen: Some(NOW),
        last_seen: Some(NOW),
        ban_count: 1,
        next_ban_seconds: 1200,
    };
    ExplainReply {
        address: "2001:db8::7".parse().unwrap(),
        target: "2001:db8::/64".parse().unwrap(),
        never_ban: None,
        paused: None,
        bans: Vec::new(),
        counts_from: Some(NOW),
        rules: vec![progress],
        backends: vec![BackendHold {
            node: "edge-1".to_owned(),
            backend: "iptables".to_owned(),
            ..BackendHold::default()
        }],
    }
}

fn explain(reply: ExplainReply) -> String {
    let server = Server::start(Router::new().route(
        path::EXPLAIN,
        get(async move |query: axum::extract::Query<std::collections::BTreeMap<String, String>>| {
            assert_eq!(query["address"], "2001:db8::7");
            Json(reply)
        }),
    ));
    let (text, exit) = server.ok(&["explain", "2001:DB8::7"]);
    assert_eq!(exit, Exit::Done);
    text
}

#[test]
fn explain_tells_why_not() {
    let text = explain(explained());
    assert!(text.starts_with("2001:db8::7 is not banned.\nIt is counted and banned as 2001:db8::/64.\n"), "{text}");
    assert!(text.contains("7 of 15") && text.contains("20m") && text.contains("nothing"), "{text}");
    let never = explain(ExplainReply { never_ban: Some("in never_ban".to_owned()), ..explained() });
    assert!(never.starts_with("2001:db8::7 is not banned and never will be.\nIt may not be banned: in never_ban.\n"));
}

#[test]
fn explain_tells_why() {
    let mut ban = ban("2001:db8::/64", "forceful-browsing", Some(600));
    ban.evidence = Evidence {
        failures: 15,
        first_seen: Some(NOW),
        last_seen: Some(NOW),
        paths: vec!["/.env\x1b]0;x\x07".to_owned()],
        statuses: [(404, 15)].into(),
        ..Evidence::default()
    };
    let banned = ExplainReply { bans: vec![ban], ..explained() };
    let text = explain(banned.clone());
    assert!(text.starts_with("2001:db8::7 is banned for another 10m, until 2026-01-08 14:29:15Z.\n"), "{text}");
    assert!(text.contains("Rule forceful-browsing counted 15 events from"), "{text}");
    assert!(text.contains("  statuses: 404 (15)\n  paths: /.env\\u{1b}]0;x\\u{7}\n"), "{text}");
    let pause = Some(Pause { since: NOW, until: None });
    let text = explain(ExplainReply { paused: pause, ..banned });
    assert!(text.starts_with("2001:db8::7 has a ban that is not in force, because all bans are paused.\n"), "{text}");
}

#[test]
fn explain_tells_of_each_back_end_what_it_holds_until_when_and_who_sees_behind_a_proxy() {
    let hold = |node: &str, backend: &str, state, detail: &str| BackendHold {
        node: node.to_owned(),
        backend: backend.to_owned(),
        state,
        detail: detail.to_owned(),
        entry: (state == HoldState::Held).then(|| "2001:db8::/64".parse().unwrap()),
        ..BackendHold::default()
    };
    let firewall = BackendHold {
        until: Some(NOW.saturating_add(Duration::from_secs(600))),
        confirmed_at: Some(NOW),
        ..hold("edge-1", "nftables", HoldState::Held, "in set bans-v6-64, dropped in prerouting")
    };
    let backends = vec![
        firewall,
        hold("edge-1", "forwarded-for", HoldState::NotDue, "the ban of 2001:db8::/64 does not say so"),
        hold("edge-1", "cloudflare", HoldState::Standby, "done by edge-2"),
        hold("edge-2", "cloudflare", HoldState::LeftOut, "entries_max is reached"),
    ];
    let mut ban = ban("2001:db8::/64", "forceful-browsing", Some(600));
    let reply = |ban: &Ban, backends: &[BackendHold]| {
        explain(ExplainReply { bans: vec![ban.clone()], backends: backends.to_vec(), ..explained() })
    };
    let text = reply(&ban, &backends);
    let row = |word: &str| {
        let line = text.lines().find(|line| line.contains(word)).unwrap_or_else(|| panic!("{word}: {text}"));
        line.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    assert_eq!(
        row("nftables"),
        "edge-1 nftables 2001:db8::/64 2026-01-08 14:29:15Z 2026-01-08 14:19:15Z in set bans-v6-64, dropped in prerouting"
    );
    assert_eq!(row("done by edge-2"), "edge-1 cloudflare nothing - - done by edge-2");
    assert!(!text.contains("A proxy delivered"), "{text}");
    ban.evidence.via_proxy = true;
    let text = reply(&ban, &backends);
    assert!(text.contains("; behind it see forwarded-for on edge-1, cloudflare on edge-2.\n"), "{text}");
    let text = reply(&ban, &backends[..1]);
    assert!(text.contains("; nothing here sees behind it: configure enforce.cloudflare"), "{text}");
}

#[test]
fn tail_prints_events_until_the_server_ends() {
    let first = CloudEvent::of_ban("edge-1", EventType::Ban, &ban("192.0.2.1", "operator", Some(60)), NOW);
    let second = CloudEvent::of_alarm("edge-1", "hidden", "a\nb".to_owned(), NOW);
    let lines = [&first, &second].map(|event| serde_json::to_string(event).unwrap());
    let body = format!("{}\n\n{}\n", lines[0], lines[1]);
    let server = Server::start(Router::new().route(path::TAIL, get(async move || body)));
    let (text, result) = server.run(&["tail"]);
    assert_eq!(
        text,
        "2026-01-08 14:19:15Z ban    192.0.2.1 by operator (ban 2, until 2026-01-08 14:20:15Z): 15 in 1m\n\
         2026-01-08 14:19:15Z alarm  hidden: a\\nb\n"
    );
    assert!(result.unwrap_err().to_string().contains("has ended"));
    let (text, _) = server.run(&["tail", "--json"]);
    assert_eq!(text, format!("{}\n{}\n", lines[0], lines[1]));
}

#[test]
fn a_refusal_is_passed_on() {
    let server = Server::start(
        Router::new()
            .route(path::BAN, post(async || refusal(StatusCode::CONFLICT, "192.0.2.1 is in never_ban")))
            .route(path::BANS, get(async || (StatusCode::INTERNAL_SERVER_ERROR, "oops"))),
    );
    let (text, result) = server.run(&["ban", "192.0.2.1"]);
    assert_eq!((text.as_str(), result.unwrap_err().to_string().as_str()), ("", "192.0.2.1 is in never_ban"));
    assert!(server.run(&["bans"]).1.unwrap_err().to_string().contains("500 Internal Server Error"));
    // A path that is there in this version only.
    let error = server.run(&["status"]).1.unwrap_err().to_string();
    assert!(error.ends_with("does not know /v1/status: it is of another version"), "{error}");
}

/// Asks for the bans at an address, with a token.
fn ask(address: &str) -> anyhow::Result<BansReply> {
    let args = ClientArgs { url: Some(address.to_owned()), ..ClientArgs::default() };
    let way = Way::find(&args, |name| (name == "PORTCULLIS_TOKEN").then(|| "t".repeat(32)))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async { Client::new(way)?.bans().await })
}

#[test]
fn an_address_is_asked_with_the_token_and_each_failure_says_what_to_do() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let listener = runtime.block_on(async { tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap() });
    let address = listener.local_addr().unwrap();
    let bans = async |headers: axum::http::HeaderMap| {
        assert_eq!(headers["authorization"], format!("Bearer {}", "t".repeat(32)));
        Json(BansReply { bans: Vec::new() })
    };
    let server = runtime.spawn(async move { axum::serve(listener, Router::new().route(path::BANS, get(bans))).await });
    assert_eq!(ask(&format!("http://{address}")).unwrap().bans, []);
    let error = ask(&format!("https://{address}")).unwrap_err().to_string();
    assert_eq!(error, format!("https://{address} does not speak TLS"));

    server.abort();
    runtime.block_on(server).unwrap_err();
    let error = ask(&format!("http://{address}")).unwrap_err().to_string();
    assert_eq!(error, format!("nobody listens at http://{address}"));

    // What a server that speaks TLS says to those who do not.
    let alert = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = alert.local_addr().unwrap();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = alert.accept().unwrap();
        std::io::Read::read(&mut stream, &mut [0; 1024]).unwrap();
        std::io::Write::write_all(&mut stream, b"\x15\x03\x03\x00\x02\x02\x16").unwrap();
    });
    let error = ask(&format!("http://{address}")).unwrap_err().to_string();
    assert!(error.ends_with("; if it speaks TLS, its address begins with https://"), "{error}");
    server.join().unwrap();
}

#[test]
fn a_redirect_does_not_take_the_token_elsewhere() {
    let server = Server::start(Router::new().route(
        path::BANS,
        get(async || (StatusCode::TEMPORARY_REDIRECT, [("location", "http://127.0.0.1:1/v1/bans")], "")),
    ));
    assert!(server.run(&["bans"]).1.unwrap_err().to_string().contains("307 Temporary Redirect"));
}

#[test]
fn an_absent_or_dead_server_is_told_plainly() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("api.sock");
    let error = run(&missing, &["status"]).1.unwrap_err().to_string();
    assert_eq!(error, format!("portcullis does not run here (no socket at {})", missing.display()));

    let server = Server::start(Router::new());
    let Server { dir, runtime } = server;
    drop(runtime);
    let left = dir.path().join("api.sock");
    assert!(left.exists());
    let error = run(&left, &["status"]).1.unwrap_err().to_string();
    assert_eq!(error, format!("portcullis does not run here (nobody listens at {})", left.display()));
}

#[test]
fn a_server_that_says_nothing_is_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("api.sock");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let error = runtime.block_on(async {
        tokio::time::pause();
        Client::new(Way::Socket(socket.clone())).unwrap().status().await.unwrap_err()
    });
    assert_eq!(error.to_string(), format!("no answer from {} within 10s", socket.display()));
    drop(listener);
}

#[test]
fn the_manual_and_the_completions_name_every_verb() {
    let print = |words: &[&str]| {
        let cli = Cli::try_parse_from(["portcullis"].iter().chain(words)).unwrap();
        let mut bytes = Vec::new();
        execute(cli.verb, &mut Output::new(&mut bytes, false, Clock::manual(NOW))).unwrap();
        String::from_utf8(bytes).unwrap()
    };
    let (manual, script) = (print(&["man"]), print(&["completions", "bash"]));
    for verb in ["run", "enforce", "check", "replay", "ban", "unban", "allow", "pause", "explain", "tail", "man"] {
        assert!(manual.contains(&format!(".SH \"{}\"\n", verb.to_uppercase())), "{verb}");
        assert!(script.contains(&format!("portcullis,{verb})")), "{verb}");
    }
    assert!(manual.contains("64 bad configuration"));
}
