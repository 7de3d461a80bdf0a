//! What runs inside the namespaces: an enforcer, a server and a client, each told what to do on standard input, a line a
//! command, and answering with a line each.

use std::io::{self, BufRead as _, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use enforce::{EnforceMetrics, Inputs, RawEnforce};
use prometheus_client::registry::Registry;
use proto::ban::{Ban, BanChange, BanRecord, Evidence, Lists, Origin, Pause};
use proto::bus::duty::Duties;
use proto::bus::feed::EventSource;
use proto::bus::memory::{Bus, Question};
use proto::net::{NetSet, Target};
use proto::report::Role;
use proto::settings::Mistakes;
use proto::shutdown::Shutdown;
use proto::time::Clock;
use serde_json::json;
use tokio::net::TcpSocket;

/// Long enough for a busy machine, short enough to wait for a client that is cut off.
const CUT_OFF_AFTER: Duration = Duration::from_millis(700);

pub(crate) fn main(args: &[String]) {
    match args[0].as_str() {
        "enforcer" => enforcer(&args[1..]),
        "teardown" => teardown(&args[1]),
        "teardown-beside" => teardown_beside(&args[1], &args[2]),
        "server" => server(),
        "service" => service(),
        "sender" => sender(),
        "client" => client(&args[1], &args[2]),
        other => panic!("no such part: {other}"),
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

fn answer(text: impl std::fmt::Display) {
    println!("{text}");
    io::stdout().flush().unwrap();
}

fn config(text: &str) -> enforce::EnforceConfig {
    let raw: RawEnforce = serde_json::from_str(text).unwrap();
    let mut mistakes = Mistakes::new();
    let config = raw.check(&mut mistakes);
    config.unwrap_or_else(|| panic!("{:?}", mistakes.into_sorted()))
}

fn teardown(text: &str) {
    let (report, left) = runtime().block_on(enforce::teardown(&config(text), None, false));
    assert!(left.is_empty(), "{left:?}");
    answer(format!("{report:?}"));
}

fn teardown_beside(text: &str, state_dir: &str) {
    runtime().block_on(async {
        let held = enforce::StandOff::begin(Path::new(state_dir)).await.unwrap();
        let (report, left) = enforce::teardown(&config(text), Some(Path::new(state_dir)), false).await;
        let left: Vec<String> = left.iter().map(ToString::to_string).collect();
        answer(format!("{} paused, removed {report:?}, left {left:?}", held.files.len()));
    });
}

fn enforcer(args: &[String]) {
    let (config, state_dir, dry_run) = (config(&args[0]), PathBuf::from(&args[1]), args[2] == "dry-run");
    let runtime = runtime();
    let bus = Bus::new();
    let (shutdown, clock) = (Shutdown::new(), Clock::system());
    let mut registry = Registry::default();
    let inputs = Inputs {
        duties: Duties::alone(),
        events: EventSource::local(&bus.events, 0),
        node: "test".into(),
        bans: bus.bans.clone(),
        lists: bus.lists.subscribe(),
        questions: bus.questions_in,
        nodes: bus.nodes.clone(),
        trusted_proxies: NetSet::default(),
        kept: tokio::sync::watch::Sender::new(0),
        bus_servers: tokio::sync::watch::channel(Vec::new()).1,
        service_dir: state_dir.clone(),
        state_dir: Some(state_dir),
        dry_run,
        clock: clock.clone(),
        metrics: EnforceMetrics::register(&mut registry),
        shutdown: shutdown.clone(),
    };
    let role = runtime.spawn(enforce::run(config, inputs));
    for line in io::stdin().lock().lines() {
        let line = line.unwrap();
        let words: Vec<&str> = line.split(' ').collect();
        let targets = |text: &str| -> Vec<Target> { text.split(',').map(|target| target.parse().unwrap()).collect() };
        match words[..] {
            ["ban", list, seconds] => {
                let seconds: u64 = seconds.parse().unwrap();
                let records = targets(list).into_iter().map(|target| BanChange::Put(record(target, seconds, &clock)));
                bus.bans.publish(records, Some(clock.now()));
                answer("ok");
            }
            ["ban-forwarded", list, seconds] => {
                let seconds: u64 = seconds.parse().unwrap();
                let records = targets(list).into_iter().map(|target| {
                    let mut record = record(target, seconds, &clock);
                    record.bans[0].evidence.via_proxy = true;
                    BanChange::Put(record)
                });
                bus.bans.publish(records, Some(clock.now()));
                answer("ok");
            }
            ["unban", list] => {
                bus.bans.publish(targets(list).into_iter().map(BanChange::Delete), None);
                answer("ok");
            }
            ["publish"] => {
                bus.bans.publish([], None);
                answer("ok");
            }
            ["never", list] => {
                let never_ban = targets(list).iter().map(Target::net).collect();
                bus.lists.send_modify(|lists| *lists = Lists { never_ban, ..Lists::clone(lists) }.into());
                answer("ok");
            }
            ["pause", state] => {
                let paused = (state == "on").then(|| Pause { since: clock.now(), until: None });
                bus.lists.send_modify(|lists| *lists = Lists { paused, ..Lists::clone(lists) }.into());
                answer("ok");
            }
            ["report"] => {
                let report = bus.nodes.all().into_iter().find(|report| report.role == Role::Enforce);
                answer(serde_json::to_value(&report).unwrap());
            }
            ["metrics"] => {
                let mut text = String::new();
                prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
                answer(json!(text));
            }
            ["explain", address] => {
                let (reply, replied) = tokio::sync::oneshot::channel();
                let address: IpAddr = address.parse().unwrap();
                bus.questions.try_send(Question { address, reply }).unwrap();
                let holds = runtime.block_on(replied).unwrap();
                answer(json!(holds));
            }
            _ => panic!("no such command: {line}"),
        }
    }
    shutdown.begin();
    runtime.block_on(role).unwrap().unwrap();
}

fn record(target: Target, seconds: u64, clock: &Clock) -> BanRecord {
    let now = clock.now();
    let ban = Ban {
        target,
        rule: "forceful-browsing".to_owned(),
        origin: Origin::Detect,
        ban_count: 1,
        ban_seconds: Some(seconds),
        banned_at: now,
        expires_at: Some(now.saturating_add(Duration::from_secs(seconds))),
        reason: String::new(),
        evidence: Evidence::default(),
    };
    BanRecord { target, bans: vec![ban] }
}

/// Echoes on port 8080 of both families, and on 8443.
fn server() {
    let listeners = ["0.0.0.0:8080", "0.0.0.0:8443", "[fd77::1]:8080"].map(|addr| TcpListener::bind(addr).unwrap());
    for listener in listeners {
        thread::spawn(move || {
            for stream in listener.incoming() {
                thread::spawn(move || echo(stream.unwrap()));
            }
        });
    }
    answer("ok");
    let _ = io::stdin().read_to_end(&mut Vec::new());
}

/// Answers heads of requests on ports 8080 and 8443, `/echo` with a header of the kind that is looked for in requests.
fn service() {
    for port in [8080, 8443] {
        let listener = TcpListener::bind(("::", port)).unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                thread::spawn(move || serve(stream.unwrap()));
            }
        });
    }
    answer("ok");
    let _ = io::stdin().read_to_end(&mut Vec::new());
}

fn serve(mut stream: TcpStream) {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while stream.read_exact(&mut byte).is_ok() {
        head.push(byte[0]);
        if head.ends_with(b"\r\n\r\n") {
            let text = "HTTP/1.1 200 OK\r\nX-Forwarded-For: 192.0.2.1\r\nContent-Length: 0\r\n\r\n";
            if stream.write_all(text.as_bytes()).is_err() {
                return;
            }
            head.clear();
        }
    }
}

/// Sends `ADDRESS PIECES` (a JSON list) on a connection of its own, each piece in a packet of its own, and says what came
/// of it: `answered`, `reset`, or neither in time.
fn sender() {
    for line in io::stdin().lock().lines() {
        let line = line.unwrap();
        let (to, pieces) = line.split_once(' ').unwrap();
        let pieces: Vec<String> = serde_json::from_str(pieces).unwrap();
        let mut stream = TcpStream::connect(to).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(CUT_OFF_AFTER)).unwrap();
        // A reset may come between two pieces; reading tells.
        pieces.iter().for_each(|piece| drop(stream.write_all(piece.as_bytes())));
        answer(match stream.read_exact(&mut [0; 8]) {
            Ok(()) => "answered".to_owned(),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => "reset".to_owned(),
            Err(error) => error.to_string(),
        });
    }
}

fn echo(mut stream: TcpStream) {
    let mut byte = [0];
    while stream.read_exact(&mut byte).is_ok() && stream.write_all(&byte).is_ok() {}
}

/// Talks from one address: `new PORT` tries a fresh connection, `open` keeps one, `ping` uses the kept one.
fn client(from: &str, to: &str) {
    let (from, to): (IpAddr, IpAddr) = (from.parse().unwrap(), to.parse().unwrap());
    let runtime = runtime();
    let mut kept: Option<TcpStream> = None;
    let connect = |port: u16| {
        runtime.block_on(async {
            let socket = if from.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }.ok()?;
            socket.bind(SocketAddr::new(from, 0)).ok()?;
            let connecting = socket.connect(SocketAddr::new(to, port));
            let stream = tokio::time::timeout(CUT_OFF_AFTER, connecting).await.ok()?.ok()?.into_std().ok()?;
            stream.set_nonblocking(false).ok()?;
            stream.set_read_timeout(Some(CUT_OFF_AFTER)).ok()?;
            Some(stream)
        })
    };
    let ping = |stream: &mut TcpStream| stream.write_all(b"x").is_ok() && stream.read_exact(&mut [0]).is_ok();
    for line in io::stdin().lock().lines() {
        let line = line.unwrap();
        let through = match line.split_once(' ') {
            Some(("new", port)) => connect(port.parse().unwrap()).is_some_and(|mut stream| ping(&mut stream)),
            Some(("open", port)) => {
                kept = connect(port.parse().unwrap());
                kept.is_some()
            }
            None if line == "open" => {
                kept = connect(8080);
                kept.is_some()
            }
            None if line == "ping" => kept.as_mut().is_some_and(ping),
            _ => panic!("no such command: {line}"),
        };
        answer(through);
    }
}
