//! What strangers, readers and writers get over plain TCP. TLS is tested with the built binary and real certificates.

use std::fs::{Permissions, rename, set_permissions, write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use proto::bus::memory::Bus;
use proto::time::Timestamp;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpSocket;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::*;
use crate::api::{Backing, router};

/// 64 times `a` and 64 times `b` are tokens.
const READER: &str = "reader read sha256:ffe054fe7ae0cb6dc65c3af9b61d5209f439851db43d0ba5997337df154668eb\n";
const WRITER: &str = "writer write sha256:a0fab1377f49a759b57f63318262ebe89fabfc990e8e93ceac2984561482b9d4\n";

struct Running {
    address: SocketAddr,
    dir: tempfile::TempDir,
    bus: Bus,
    reload: watch::Sender<u64>,
    shutdown: Shutdown,
    server: JoinHandle<Result<(), DetectError>>,
}

/// Puts the file in place whole: a reload must not see it half written.
fn write_tokens(dir: &Path, text: &str) {
    let staged = dir.join("tokens.new");
    write(&staged, text).unwrap();
    set_permissions(&staged, Permissions::from_mode(0o600)).unwrap();
    rename(staged, dir.join("tokens")).unwrap();
}

async fn start() -> Running {
    let dir = tempfile::tempdir().unwrap();
    write_tokens(dir.path(), &format!("{READER}{WRITER}"));
    let config =
        TcpConfig { listen: "127.0.0.1:0".parse().unwrap(), tokens_file: dir.path().join("tokens"), tls: None };
    // Stands still: nobody earns a failure back.
    let clock = Clock::manual(Timestamp::from_secs(1_767_881_955));
    let (bus, shutdown) = (Bus::new(), Shutdown::new());
    // An empty set that is known, from which `bans` can answer.
    bus.bans.replace([]);
    let (reload, reloads) = watch::channel(0);
    let (requests, _) = mpsc::channel(1);
    let api = router(Backing {
        requests,
        bans: bus.bans.clone(),
        nodes: bus.nodes.clone(),
        events: bus.events.clone(),
        questions: bus.questions.clone(),
        clock: clock.clone(),
        shutdown: shutdown.clone(),
    });
    let server = Server::bind(config, clock, Metrics::default()).await.unwrap();
    let address = server.address().unwrap();
    let server = tokio::spawn(server.run(api, reloads, shutdown.clone()));
    Running { address, dir, bus, reload, shutdown, server }
}

fn token(letter: char) -> String {
    format!("authorization: Bearer {}\r\n", letter.to_string().repeat(64))
}

impl Running {
    async fn connect_from(&self, source: [u8; 4]) -> TcpStream {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::from((source, 0))).unwrap();
        socket.connect(self.address).await.unwrap()
    }

    /// Sends one request and reads the answer to its end.
    async fn ask(&self, head: &str, headers: &str) -> String {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let request = format!("{head} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 0\r\n{headers}\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    /// Opens `tail` and reads its head.
    async fn tail(&self, letter: char) -> BufReader<TcpStream> {
        let mut stream = BufReader::new(TcpStream::connect(self.address).await.unwrap());
        let request = format!("GET /v1/tail HTTP/1.1\r\nhost: x\r\n{}\r\n", token(letter));
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut line = String::new();
        while line != "\r\n" {
            line.clear();
            assert!(stream.read_line(&mut line).await.unwrap() > 0, "no answer");
        }
        stream
    }

    async fn stop(self) {
        self.shutdown.begin();
        self.server.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_reader_reads_a_writer_writes_and_a_stranger_is_told_what_is_missing() {
    let running = start().await;
    for (head, headers, status, part) in [
        ("GET /v1/bans", String::new(), 401, "www-authenticate: Bearer realm=\"portcullis\"\r\n"),
        ("GET /v1/bans", token('c'), 401, "error=\"invalid_token\""),
        ("GET /v1/bans", "authorization: Bearer hunter2\r\n".to_owned(), 401, "nobody has this token"),
        ("GET /v1/bans", token('a'), 200, "{\"bans\":[]}"),
        ("POST /v1/unban", token('a'), 403, "the token reader has the scope `read`, this needs `write`"),
        ("DELETE /v1/bans", token('a'), 403, "insufficient_scope"),
        // Let in, and refused for what it sends.
        ("POST /v1/unban", token('b'), 400, "{\"error\":"),
        ("GET /v1/bans", token('b'), 200, "{\"bans\":[]}"),
        ("GET /v2", token('b'), 404, "no such path"),
    ] {
        let answer = running.ask(head, &headers).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")) && answer.contains(part), "{head}: {answer}");
    }
    running.stop().await;
}

#[tokio::test]
async fn who_fails_too_often_is_told_to_wait_and_a_right_token_still_gets_in() {
    let running = start().await;
    for _ in 0..10 {
        assert!(running.ask("GET /v1/bans", &token('c')).await.starts_with("HTTP/1.1 401 "));
    }
    let answer = running.ask("GET /v1/bans", &token('c')).await;
    assert!(answer.starts_with("HTTP/1.1 429 ") && answer.contains("retry-after: 7\r\n"), "{answer}");
    assert!(running.ask("GET /v1/bans", &token('a')).await.starts_with("HTTP/1.1 200 "));
    running.stop().await;
}

#[tokio::test]
async fn a_peer_with_its_share_of_connections_keeps_nobody_else_out() {
    let running = start().await;
    let mut held = Vec::new();
    for _ in 0..CONNECTIONS_PEER_MAX {
        let mut stream = running.connect_from([127, 0, 0, 2]).await;
        stream.write_all(b"GET /v1/ba").await.unwrap();
        held.push(stream);
    }
    let mut over = running.connect_from([127, 0, 0, 2]).await;
    assert_eq!(over.read(&mut [0]).await.unwrap(), 0, "closed");
    assert!(running.ask("GET /v1/bans", &token('a')).await.starts_with("HTTP/1.1 200 "));
    // A place that is given back can be had again.
    drop(held);
    let mut stream = running.connect_from([127, 0, 0, 2]).await;
    let mut answer = Vec::new();
    while answer.is_empty() {
        // Its former connections may not have been seen to end yet.
        let request = format!("GET /v1/bans HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{}\r\n", token('a'));
        let sent = stream.write_all(request.as_bytes()).await;
        if sent.is_err() || stream.read_to_end(&mut answer).await.is_err() || answer.is_empty() {
            answer.clear();
            stream = running.connect_from([127, 0, 0, 2]).await;
        }
    }
    assert!(answer.starts_with(b"HTTP/1.1 200 "));
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_head_that_never_ends_and_a_connection_without_a_request_are_given_up() {
    let running = start().await;
    for sent in [&b""[..], b"GET /v1/bans HTTP/1.1\r\nhost: x\r\n"] {
        let mut stream = TcpStream::connect(running.address).await.unwrap();
        stream.write_all(sent).await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        assert!(!answer.starts_with(b"HTTP/1.1 200"), "{answer:?}");
    }
    // Nor does a body that never ends hold its connection.
    let mut stream = TcpStream::connect(running.address).await.unwrap();
    let head = format!(
        "POST /v1/ban HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n{}\r\n{{",
        token('b')
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_silent_tail_sends_empty_lines() {
    let running = start().await;
    let mut tail = running.tail('a').await;
    let mut line = String::new();
    for chunk in ["1\r\n", "\n", "\r\n", "1\r\n", "\n"] {
        line.clear();
        tail.read_line(&mut line).await.unwrap();
        assert_eq!(line, chunk);
    }
    running.stop().await;
}

#[tokio::test]
async fn a_token_that_is_taken_away_loses_its_open_answers() {
    let running = start().await;
    let (mut reader, mut writer) = (running.tail('a').await, running.tail('b').await);
    write_tokens(running.dir.path(), WRITER);
    running.reload.send_modify(|count| *count += 1);
    let mut rest = Vec::new();
    let _reset = reader.read_to_end(&mut rest).await;
    assert!(running.ask("GET /v1/bans", &token('a')).await.starts_with("HTTP/1.1 401 "));
    let event = proto::envelope::CloudEvent::of_alarm("edge-1", "test", "still here".to_owned(), Timestamp::EPOCH);
    running.bus.events.send(event.into()).unwrap();
    let mut line = String::new();
    while !line.contains("still here") {
        line.clear();
        assert!(writer.read_line(&mut line).await.unwrap() > 0, "the writer has lost its answer too");
    }
    running.stop().await;
}

#[tokio::test]
async fn a_reload_of_files_with_mistakes_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let config =
        TcpConfig { listen: "127.0.0.1:0".parse().unwrap(), tokens_file: dir.path().join("tokens"), tls: None };
    write_tokens(dir.path(), &format!("{READER}{WRITER}"));
    let server = Server::bind(config, Clock::system(), Metrics::default()).await.unwrap();
    let tokens = || server.secrets.follow().borrow().tokens.count();
    for (text, count) in [("nonsense\n", 2), (READER, 1), ("reader admin\n", 1), ("# nobody\n", 0)] {
        write_tokens(dir.path(), text);
        server.reload().await;
        assert_eq!(tokens(), count, "{text}");
    }
}

#[tokio::test]
async fn files_with_mistakes_and_a_taken_address_are_named() {
    let running = start().await;
    let bind = async |listen: SocketAddr, tokens_file: &str, tls: Option<TlsFiles>| {
        let config = TcpConfig { listen, tokens_file: running.dir.path().join(tokens_file), tls };
        Server::bind(config, Clock::system(), Metrics::default()).await.unwrap_err().to_string()
    };
    let free = "127.0.0.1:0".parse().unwrap();
    assert!(bind(running.address, "tokens", None).await.contains(&running.address.to_string()));
    assert!(bind(free, "none", None).await.contains("cannot read "));
    let no_pem = running.dir.path().join("tokens");
    let tls = TlsFiles { cert_file: no_pem.clone(), key_file: no_pem, client_ca_file: None };
    assert!(bind(free, "tokens", Some(tls)).await.contains("cannot read PEM from "));
    set_permissions(running.dir.path().join("tokens"), Permissions::from_mode(0o644)).unwrap();
    assert!(bind(free, "tokens", None).await.contains("is open to others (mode 644)"));
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_end_does_not_wait_for_slow_peers() {
    let running = start().await;
    let mut slow = TcpStream::connect(running.address).await.unwrap();
    slow.write_all(b"GET /v1/ba").await.unwrap();
    let _tail = running.tail('a').await;
    running.stop().await;
    let mut rest = Vec::new();
    let _reset = slow.read_to_end(&mut rest).await;
}
