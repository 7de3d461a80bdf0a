//! The source of syslog messages over real sockets: what comes through, what is turned away, and what waits.
//!
//! Every line carries a number in its path; a batch is shown as the node and the numbers of its lines.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

#[path = "inputs/certificates.rs"]
mod certificates;
mod inputs;

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::time::Duration;

use certificates::Certificates;
use ingest::config::{IngestConfig, RawIngest};
use ingest::error::IngestError;
use ingest::pipeline;
use proto::bus::memory::Nodes;
use proto::event::AccessBatch;
use proto::report::SourceReport;
use proto::settings::Mistakes;
use proto::shutdown::Shutdown;
use proto::time::Clock;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// A test that waits longer than this has failed.
const DEADLINE: Duration = Duration::from_secs(30);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(5);

/// A running role and what it has delivered.
struct Role {
    batches: mpsc::Receiver<AccessBatch>,
    shutdown: Shutdown,
    nodes: Nodes,
    task: JoinHandle<Result<(), IngestError>>,
    addr: SocketAddr,
    /// Numbers of lines by node, in the order of their arrival.
    numbers: BTreeMap<String, Vec<u64>>,
}

/// The line that Traefik would write about request `number`.
fn line(number: u64) -> String {
    format!(
        r#"{{"ClientAddr":"192.0.2.1:5","ClientHost":"192.0.2.1","DownstreamStatus":404,"RequestPath":"/n/{number}","StartUTC":"2026-01-02T15:04:05Z"}}"#
    )
}

fn message(number: u64) -> String {
    format!("<133>Jan  2 15:04:05 edge-7.example traefik[17]: {}", line(number))
}

fn counted(number: u64) -> String {
    let message = message(number);
    format!("{} {message}", message.len())
}

/// A port that nobody has, which the source takes a moment later. Tests of this process never ask for one that is given out.
fn free_port(mode: &str) -> SocketAddr {
    let any = "127.0.0.1:0";
    if mode == "udp" {
        UdpSocket::bind(any).unwrap().local_addr()
    } else {
        TcpListener::bind(any).unwrap().local_addr()
    }
    .unwrap()
}

async fn start(source: Value) -> Role {
    start_with_queue(source, 64).await
}

async fn start_with_queue(mut source: Value, queue: usize) -> Role {
    let addr = free_port(source["mode"].as_str().unwrap());
    source["type"] = json!("syslog");
    if source["mode"] != "unix" {
        source["listen"] = json!(addr.to_string());
    }
    let raw: RawIngest = serde_json::from_value(json!({"sources": {"syslog": source}})).unwrap();
    let mut mistakes = Mistakes::new();
    let config: Option<IngestConfig> = raw.check(&mut mistakes);
    let config = config.unwrap_or_else(|| panic!("{:?}", mistakes.into_sorted()));
    let (sender, batches) = mpsc::channel(queue);
    let (shutdown, nodes) = (Shutdown::new(), Nodes::default());
    let inputs = inputs::inputs(&config, sender, (&nodes, &shutdown));
    let task = tokio::spawn(pipeline::run(config, inputs));
    Role { batches, shutdown, nodes, task, addr, numbers: BTreeMap::new() }
}

impl Role {
    fn take(&mut self, batch: &AccessBatch) {
        assert!(batch.span.is_none(), "syslog has no offsets");
        let numbers = self.numbers.entry(batch.shown_node().to_string()).or_default();
        numbers
            .extend(batch.events().map(|event| event.text.path.strip_prefix("/n/").unwrap().parse::<u64>().unwrap()));
    }

    fn count(&self) -> usize {
        self.numbers.values().map(Vec::len).sum()
    }

    /// Takes what comes until there are so many lines, and no more.
    async fn receive(&mut self, count: usize) {
        self.receive_at_least(count).await;
        assert_eq!(self.count(), count, "{:?}", self.numbers);
    }

    async fn receive_at_least(&mut self, count: usize) {
        while self.count() < count {
            let batch = tokio::time::timeout(DEADLINE, self.batches.recv()).await;
            let batch = batch.unwrap_or_else(|_| panic!("only {:?} of {count}; {:?}", self.numbers, self.report()));
            self.take(&batch.expect("the role runs"));
        }
    }

    fn report(&self) -> SourceReport {
        self.nodes.all().into_iter().flat_map(|node| node.sources).next().unwrap_or_default()
    }

    /// Waits until the report is as wanted.
    async fn reports(&self, what: &str, is_wanted: impl Fn(&SourceReport) -> bool) -> SourceReport {
        let look = async {
            loop {
                let report = self.report();
                if is_wanted(&report) {
                    return report;
                }
                tokio::time::sleep(PAUSE).await;
            }
        };
        tokio::time::timeout(DEADLINE, look).await.unwrap_or_else(|_| panic!("{what}: {:?}", self.report()))
    }

    /// A connection, as soon as there is somebody to take it.
    async fn connect(&self) -> TcpStream {
        let connect = async {
            loop {
                if let Ok(stream) = TcpStream::connect(self.addr) {
                    return stream;
                }
                tokio::time::sleep(PAUSE).await;
            }
        };
        tokio::time::timeout(DEADLINE, connect).await.expect("it listens")
    }

    /// A socket that sends to the source, as soon as that hears.
    async fn sender(&self) -> UdpSocket {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.connect(self.addr).unwrap();
        let heard = async {
            // Empty messages are nothing, and tell by an error that nobody listens.
            loop {
                let sent = socket.send(b"").and_then(|_| socket.send(b""));
                if sent.is_ok() && socket.take_error().unwrap().is_none() {
                    return;
                }
                tokio::time::sleep(PAUSE).await;
            }
        };
        tokio::time::timeout(DEADLINE, heard).await.expect("it listens");
        socket
    }

    /// Ends the role; what it still hands over is taken.
    async fn stop(mut self) -> BTreeMap<String, Vec<u64>> {
        self.shutdown.begin();
        while let Some(batch) = tokio::time::timeout(DEADLINE, self.batches.recv()).await.expect("an end in time") {
            self.take(&batch);
        }
        self.task.await.expect("no panic").expect("an orderly end");
        self.numbers
    }
}

/// Whether the other side ends the connection, in time.
async fn is_closed(mut stream: TcpStream) -> bool {
    let read = tokio::task::spawn_blocking(move || {
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.read(&mut [0; 1])
    });
    match read.await.unwrap() {
        Ok(read) => read == 0,
        Err(error) => matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe),
    }
}

fn this_node(numbers: impl IntoIterator<Item = u64>) -> BTreeMap<String, Vec<u64>> {
    BTreeMap::from([("edge-1".to_owned(), numbers.into_iter().collect())])
}

#[tokio::test(flavor = "multi_thread")]
async fn datagrams_are_messages() {
    let mut role = start(json!({"mode": "udp"})).await;
    let sender = role.sender().await;
    for number in 0..50 {
        sender.send(format!("{}\n\0", message(number)).as_bytes()).unwrap();
    }
    // A new header, and no header at all.
    sender.send(format!("<133>1 2026-01-02T15:04:05Z h a - - - {}", line(50)).as_bytes()).unwrap();
    sender.send(line(51).as_bytes()).unwrap();
    role.receive(52).await;
    assert_eq!(role.stop().await, this_node(0..52));
}

#[tokio::test(flavor = "multi_thread")]
async fn both_framings_on_one_connection_cut_at_any_byte() {
    let mut role = start(json!({"mode": "tcp"})).await;
    let text = format!("{}\n{}{}\r\n{}\n{}\n", message(0), counted(1), message(2), counted(3), line(4));
    for cut in 0..text.len() {
        let mut stream = role.connect().await;
        stream.set_nodelay(true).unwrap();
        stream.write_all(&text.as_bytes()[..cut]).unwrap();
        if cut % 16 == 0 {
            // Every now and then the source surely sees the halves apart.
            role.reports("a connection", |report| report.connections > 0).await;
        }
        stream.write_all(&text.as_bytes()[cut..]).unwrap();
        drop(stream);
        role.receive((cut + 1) * 5).await;
    }
    let numbers = role.stop().await.remove("edge-1").unwrap();
    assert!(numbers.chunks(5).all(|numbers| numbers == [0, 1, 2, 3, 4]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_last_line_without_its_end_is_heard_and_one_cut_off_is_shown() {
    let mut role = start(json!({"mode": "tcp"})).await;
    let mut stream = role.connect().await;
    stream.write_all(format!("{}\n{}", message(0), message(1)).as_bytes()).unwrap();
    drop(stream);
    role.receive(2).await;
    let mut stream = role.connect().await;
    stream.write_all(&counted(2).as_bytes()[..100]).unwrap();
    drop(stream);
    role.reports("cut off", |report| report.unparsed == 1 && report.lines == 3).await;
    role.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn at_the_end_whole_messages_that_were_read_are_handed_over() {
    let mut role = start_with_queue(json!({"mode": "tcp"}), 1).await;
    let mut stream = role.connect().await;
    stream.write_all(format!("{}\n{}\n{}", message(0), message(1), &message(2)[..60]).as_bytes()).unwrap();
    role.receive(2).await;
    assert_eq!(role.stop().await, this_node(0..2));
    assert!(is_closed(stream).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_unix_socket_hears_its_host() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("log");
    // One that is left over.
    drop(UnixDatagram::bind(&path).unwrap());
    let mut role = start(json!({"mode": "unix", "path": path, "node_from": "header", "line_bytes_max": 256})).await;
    let sender = UnixDatagram::unbound().unwrap();
    let connect = async {
        while sender.connect(&path).is_err() {
            tokio::time::sleep(PAUSE).await;
        }
    };
    tokio::time::timeout(DEADLINE, connect).await.expect("it listens");
    // As syslog(3) writes, and larger than may be.
    sender.send(format!("<133>Jan  2 15:04:05 traefik[17]: {}", line(0)).as_bytes()).unwrap();
    sender.send(message(1).as_bytes()).unwrap();
    sender.send(&[b'x'; 10_000]).unwrap();
    role.receive(2).await;
    role.reports("too long", |report| report.oversized == 1 && report.lines == 3).await;
    let numbers = role.stop().await;
    assert_eq!(numbers, BTreeMap::from([("edge-1".to_owned(), vec![0]), ("edge-7-example".to_owned(), vec![1])]));
    assert!(!path.exists(), "the socket is gone with its source");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_unix_sender_waits_while_there_is_no_room() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("log");
    let mut role = start_with_queue(json!({"mode": "unix", "path": path}), 1).await;
    let sending = tokio::task::spawn_blocking(move || {
        let sender = UnixDatagram::unbound().unwrap();
        while sender.connect(&path).is_err() {
            std::thread::sleep(PAUSE);
        }
        for number in 0..20_000 {
            sender.send(message(number).as_bytes()).unwrap();
        }
    });
    role.receive(20_000).await;
    sending.await.unwrap();
    assert_eq!(role.report().dropped, 0);
    assert_eq!(role.stop().await, this_node(0..20_000));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_not_send_is_refused_and_counted() {
    let allowed = json!(["192.0.2.0/24"]);
    let role = start(json!({"mode": "tcp", "allowed_senders": allowed})).await;
    assert!(is_closed(role.connect().await).await);
    role.reports("refused", |report| report.refused == 1).await;
    assert!(role.stop().await.is_empty());

    let role = start(json!({"mode": "udp", "allowed_senders": allowed})).await;
    let sender = role.sender().await;
    for number in 0..10 {
        sender.send(message(number).as_bytes()).unwrap();
    }
    role.reports("refused", |report| report.refused >= 10).await;
    assert!(role.stop().await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn one_sender_has_only_its_share_of_connections() {
    let mut role = start(json!({"mode": "tcp", "sender_connections_max": 2})).await;
    let mut streams = vec![role.connect().await];
    streams.push(role.connect().await);
    role.reports("both are open", |report| report.connections == 2).await;
    assert!(is_closed(role.connect().await).await);
    assert_eq!(role.reports("refused", |report| report.refused == 1).await.connections, 2);
    drop(streams.pop());
    role.reports("a place is free", |report| report.connections == 1).await;
    let mut again = role.connect().await;
    again.write_all(format!("{}\n", message(0)).as_bytes()).unwrap();
    role.receive(1).await;
    role.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn beyond_all_places_connections_wait() {
    let mut role = start(json!({"mode": "tcp", "connections_max": 1})).await;
    let first = role.connect().await;
    role.reports("one is open", |report| report.connections == 1).await;
    let mut second = role.connect().await;
    second.write_all(format!("{}\n", message(0)).as_bytes()).unwrap();
    drop(first);
    role.receive(1).await;
    role.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_connection_is_closed() {
    let mut role = start(json!({"mode": "tcp", "idle_timeout": "1s"})).await;
    let mut stream = role.connect().await;
    stream.write_all(format!("{}\n", message(0)).as_bytes()).unwrap();
    assert!(is_closed(stream).await);
    role.receive(1).await;
    // The same with a message half sent, which is shown.
    let mut stream = role.connect().await;
    stream.write_all(&message(1).as_bytes()[..60]).unwrap();
    assert!(is_closed(stream).await);
    role.reports("half a message", |report| report.unparsed == 1 && report.connections == 0).await;
    role.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_byte_now_and_then_keeps_no_connection() {
    let mut role = start(json!({"mode": "tcp", "idle_timeout": "1s"})).await;
    let mut stream = role.connect().await;
    stream.set_nodelay(true).unwrap();
    // Messages now and then do, for longer than the timeout.
    for number in 0..12 {
        stream.write_all(counted(number).as_bytes()).unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    role.receive(12).await;
    assert_eq!(role.report().connections, 1);
    let closed = tokio::time::timeout(DEADLINE, async {
        while stream.write_all(b"x").is_ok() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    closed.await.expect("it is closed, though never silent for a second");
    role.reports("what came of it is shown", |report| report.unparsed == 1 && report.connections == 0).await;
    role.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_long_is_counted_and_the_rest_goes_on() {
    let mut role = start(json!({"mode": "tcp", "line_bytes_max": 300})).await;
    let mut stream = role.connect().await;
    let long = "x".repeat(1 << 20);
    let text = format!("{}\n{long}\n{}{} <1>{long}{}\n", message(0), counted(1), long.len() + 3, message(2));
    stream.write_all(text.as_bytes()).unwrap();
    // Within the room for a header, but not as a line.
    stream.write_all(format!("<1>{}\n{}\n", "x".repeat(301), message(3)).as_bytes()).unwrap();
    role.receive(4).await;
    let report = role.reports("too long", |report| report.oversized == 3).await;
    assert_eq!((report.lines, report.unparsed), (7, 0));
    assert_eq!(role.stop().await, this_node(0..4));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_noisy_sender_over_udp_is_cut_and_another_is_not() {
    let limits = json!({"sender_lines": 10, "burst": "1s"});
    let mut role = start(json!({"mode": "udp", "limits": limits, "node_from": "sender"})).await;
    let noisy = role.sender().await;
    let good = UdpSocket::bind("127.0.0.2:0").unwrap();
    good.connect(role.addr).unwrap();
    for number in 0..500 {
        noisy.send(message(number).as_bytes()).unwrap();
        if number % 100 == 0 {
            good.send(message(1000 + number).as_bytes()).unwrap();
        }
    }
    // Empty datagrams, by which the noisy one found out whether somebody listens, count as well.
    let report = role.reports("all are counted", |report| report.limited + report.lines >= 505).await;
    assert!(report.limited >= 450, "{report:?}");
    role.receive(report.lines as usize).await;
    let numbers = role.stop().await;
    assert_eq!(numbers["127-0-0-2"], [1000, 1100, 1200, 1300, 1400]);
    assert!(numbers["127-0-0-1"].len() <= 50);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_noisy_sender_over_tcp_waits_and_loses_nothing() {
    let limits = json!({"sender_lines": 400, "burst": "1s"});
    let mut role = start(json!({"mode": "tcp", "limits": limits, "node_from": "sender"})).await;
    let mut noisy = role.connect().await;
    let began = Clock::system().now();
    let sending = tokio::task::spawn_blocking(move || {
        for number in 0..1000 {
            noisy.write_all(counted(number).as_bytes()).unwrap();
        }
    });
    role.receive_at_least(400).await;
    // One that comes meanwhile, from another address, is heard at once.
    let good = tokio::net::TcpSocket::new_v4().unwrap();
    good.bind("127.0.0.2:0".parse().unwrap()).unwrap();
    let mut good = good.connect(role.addr).await.unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut good, counted(5000).as_bytes()).await.unwrap();
    while !role.numbers.contains_key("127-0-0-2") {
        role.receive_at_least(role.count() + 1).await;
    }
    assert!(role.count() < 1001, "the good one was heard before the noisy one was done");
    role.receive(1001).await;
    sending.await.unwrap();
    let took = Clock::system().now().since(began);
    assert!(took >= Duration::from_millis(1000), "600 lines beyond the burst, 400 a second: {took:?}");
    let report = role.report();
    assert_eq!((report.limited, report.dropped), (0, 0));
    assert_eq!(role.stop().await["127-0-0-1"], (0..1000).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn without_room_tcp_waits_and_udp_drops() {
    // More than all buffers of two sockets hold.
    const LINES: u64 = 100_000;
    let mut role = start_with_queue(json!({"mode": "tcp"}), 1).await;
    let mut stream = role.connect().await;
    let sending = tokio::task::spawn_blocking(move || {
        for number in 0..LINES {
            stream.write_all(format!("{}\n", message(number)).as_bytes()).unwrap();
        }
    });
    role.reports("it has begun", |report| report.lines > 0).await;
    assert!(!sending.is_finished(), "nobody takes what is sent");
    role.receive(LINES as usize).await;
    sending.await.unwrap();
    assert_eq!(role.report().dropped, 0);
    assert_eq!(role.stop().await, this_node(0..LINES));

    let role = start_with_queue(json!({"mode": "udp"}), 1).await;
    let sender = role.sender().await;
    for number in 0..5000 {
        sender.send(message(number).as_bytes()).unwrap();
    }
    let report = role.reports("all are counted", |report| report.lines + report.dropped >= 5000).await;
    assert!(report.dropped > 0, "{report:?}");
    let taken = role.stop().await.remove("edge-1").unwrap_or_default().len() as u64;
    assert!(taken > 0 && taken < 5000);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_in_the_kernel_is_taken_batch_by_batch() {
    let mut role = start_with_queue(json!({"mode": "tcp", "connections_max": 1}), 1).await;
    let first = role.connect().await;
    role.reports("one is open", |report| report.connections == 1).await;
    // All of it is there before the first byte is read.
    let mut second = role.connect().await;
    let text: String = (0..3000).map(counted).collect();
    second.write_all(text.as_bytes()).unwrap();
    drop(first);
    role.reports("a batch has found no room", |report| report.lines > 512).await;
    role.receive(3000).await;
    assert_eq!(role.report().dropped, 0);
    assert_eq!(role.stop().await, this_node(0..3000));
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_are_shown_under_the_node_that_is_asked_for() {
    for (node_from, expected) in [("self", "edge-1"), ("header", "edge-7-example"), ("sender", "127-0-0-1")] {
        for mode in ["udp", "tcp"] {
            let mut role = start(json!({"mode": mode, "node_from": node_from})).await;
            if mode == "udp" {
                role.sender().await.send(message(0).as_bytes()).unwrap();
            } else {
                role.connect().await.write_all(counted(0).as_bytes()).unwrap();
            }
            role.receive(1).await;
            assert_eq!(role.stop().await, BTreeMap::from([(expected.to_owned(), vec![0])]), "{mode}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn any_number_of_nodes_on_one_connection() {
    let mut role = start(json!({"mode": "tcp", "node_from": "header"})).await;
    let mut stream = role.connect().await;
    let hosts = (0..300).map(|n| format!("host-{n}")).chain(["operator", "system", "-", "EDGE-1"].map(str::to_owned));
    let hosts: Vec<String> = hosts.collect();
    let text: String =
        (0..).zip(&hosts).map(|(number, host)| format!("<133>1 - {host} traefik - - - {}\n", line(number))).collect();
    stream.write_all(text.as_bytes()).unwrap();
    role.receive(304).await;
    let numbers = role.stop().await;
    assert_eq!(numbers["edge-1"], [300, 301, 302, 303], "reserved names, none, and this node's own");
    assert_eq!(numbers.len(), 301);
    assert_eq!(numbers["host-299"], [299]);
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_lines_are_joined_on_a_connection_and_never_from_datagrams() {
    let line = line(0);
    let (first, second) = line.split_at(40);
    let piece = |tag: &str, text: &str| format!("<133>1 - h a - - - 2026-01-02T15:04:05.5Z stdout {tag} {text}");
    let docker = json!({"log": format!("{line}\n"), "stream": "stdout", "time": "2026-01-02T15:04:05Z"});
    let docker = format!("<133>Jan  2 15:04:05 h a: {docker}");

    let mut role = start(json!({"mode": "tcp"})).await;
    let text = format!("{}\n{}\n{docker}\n", piece("P", first), piece("F", second));
    role.connect().await.write_all(text.as_bytes()).unwrap();
    role.receive(2).await;
    role.reports("all are counted", |report| report.lines == 3 && report.unparsed == 0).await;
    role.stop().await;

    let mut role = start(json!({"mode": "udp"})).await;
    let sender = role.sender().await;
    for text in [piece("P", first), piece("F", second), piece("F", &line), docker] {
        sender.send(text.as_bytes()).unwrap();
    }
    role.receive(2).await;
    role.reports("both pieces are shown", |report| report.lines == 4 && report.unparsed == 2).await;
    role.stop().await;
}

impl Certificates {
    /// Sends `text` as `openssl s_client` does; whether it got through to a whole handshake.
    async fn send(&self, addr: SocketAddr, with_certificate: bool, text: String) {
        let mut command = Command::new("openssl");
        command.args(["s_client", "-quiet", "-verify_return_error", "-no_ign_eof"]);
        command.args(["-CAfile", &self.path("ca.crt"), "-connect", &addr.to_string()]);
        if with_certificate {
            command.args(["-cert", &self.path("client.crt"), "-key", &self.path("client.key")]);
        }
        command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::null());
        command.stderr(std::process::Stdio::null());
        tokio::task::spawn_blocking(move || {
            let mut child = command.spawn().unwrap();
            // Who is refused may be gone already.
            let _gone = child.stdin.take().unwrap().write_all(text.as_bytes());
            child.wait().unwrap();
        })
        .await
        .unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_with_and_without_certificates_of_clients() {
    let certificates = Certificates::make();
    let mut tls = json!({"cert_file": certificates.path("server.crt"), "key_file": certificates.path("server.key")});
    let mut role = start(json!({"mode": "tcp", "tls": tls})).await;
    drop(role.connect().await);
    certificates.send(role.addr, false, format!("{}{}\n", counted(0), message(1))).await;
    role.receive(2).await;
    // Who speaks no TLS is refused.
    let mut plain = role.connect().await;
    plain.write_all(format!("{}\n", message(2)).as_bytes()).unwrap();

    role.reports("no TLS", |report| report.refused >= 1).await;
    assert_eq!(role.stop().await, this_node(0..2));

    tls["client_ca_file"] = json!(certificates.path("ca.crt"));
    let mut role = start(json!({"mode": "tcp", "tls": tls})).await;
    drop(role.connect().await);
    role.reports("that one was refused", |report| report.refused == 1).await;
    certificates.send(role.addr, false, counted(0)).await;
    role.reports("no certificate", |report| report.refused == 2).await;
    certificates.send(role.addr, true, counted(1)).await;
    role.receive(1).await;
    assert_eq!(role.stop().await, this_node([1]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_that_is_taken_is_said_and_tried_again() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = taken.local_addr().unwrap();
    let raw = json!({"sources": {"syslog": {"type": "syslog", "mode": "tcp", "listen": addr.to_string()}}});
    let raw: RawIngest = serde_json::from_value(raw).unwrap();
    let config = raw.check(&mut Mistakes::new()).unwrap();
    let mut role = start(json!({"mode": "tcp"})).await;
    let (sender, batches) = mpsc::channel(4);
    let inputs = inputs::inputs(&config, sender, (&role.nodes, &role.shutdown));
    role.task.abort();
    role.task = tokio::spawn(pipeline::run(config, inputs));
    (role.batches, role.addr) = (batches, addr);
    let problems = || role.nodes.all().iter().flat_map(|node| node.problems.clone()).collect::<Vec<_>>();
    let said = async {
        while !problems().iter().any(|problem| problem.text.contains("cannot listen on")) {
            tokio::time::sleep(PAUSE).await;
        }
    };
    tokio::time::timeout(DEADLINE, said).await.expect("it is said");
    drop(taken);
    role.connect().await.write_all(counted(0).as_bytes()).unwrap();
    role.receive(1).await;
    role.stop().await;
}
