//! The role with one source of requests, and a client that knows nothing but bytes.

use std::fs::{Permissions, set_permissions, write};
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use flate2::Compression;
use flate2::write::GzEncoder;
use ingest::config::{IngestConfig, RawIngest};
use ingest::error::IngestError;
use ingest::pipeline::{self, Inputs};
use proto::bus::memory::Nodes;
use proto::event::AccessBatch;
use proto::report::SourceReport;
use proto::settings::Mistakes;
use proto::shutdown::Shutdown;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::inputs;

/// A test that waits longer than this has failed.
pub(crate) const DEADLINE: Duration = Duration::from_secs(40);

pub(crate) fn checked(source: &Value) -> Result<IngestConfig, Vec<String>> {
    let raw: RawIngest = serde_json::from_value(json!({ "sources": { "push": source } })).unwrap();
    let mut mistakes = Mistakes::new();
    let config = raw.check(&mut mistakes);
    let texts = mistakes.into_sorted().iter().map(ToString::to_string).collect();
    config.ok_or(texts)
}

pub(crate) struct Role {
    pub(crate) addr: SocketAddr,
    pub(crate) batches: mpsc::Receiver<AccessBatch>,
    pub(crate) nodes: Nodes,
    pub(crate) shutdown: Shutdown,
    /// SIGHUP.
    pub(crate) reload: watch::Sender<u64>,
    pub(crate) task: JoinHandle<Result<(), IngestError>>,
    pub(crate) dir: TempDir,
}

/// The keys of a source beside `listen`.
pub(crate) async fn start(keys: Value) -> Role {
    start_with(keys, 64, &[]).await
}

pub(crate) async fn start_with(mut keys: Value, queue: usize, secrets: &[(&str, &str)]) -> Role {
    let dir = tempfile::tempdir().unwrap();
    for (key, text) in secrets {
        let path = dir.path().join(key);
        write(&path, text).unwrap();
        set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        keys["auth"][*key] = json!(path);
    }
    let addr = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    keys["listen"] = json!(addr);
    let config = checked(&keys).unwrap();
    let (sender, batches) = mpsc::channel(queue);
    let (shutdown, nodes) = (Shutdown::new(), Nodes::default());
    let (reload, reloads) = watch::channel(0);
    let inputs = Inputs { reload: reloads, ..inputs::inputs(&config, sender, (&nodes, &shutdown)) };
    let task = tokio::spawn(pipeline::run(config, inputs));
    while TcpStream::connect(addr).await.is_err() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Role { addr, batches, nodes, shutdown, reload, task, dir }
}

/// Status line and headers in lower case, and the body.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| line.strip_prefix(&format!("{name}: ")))
    }
}

/// A client that knows nothing but bytes.
pub(crate) struct Client<S = TcpStream>(pub(crate) S);

impl Client {
    pub(crate) async fn new(role: &Role) -> Self {
        Self(TcpStream::connect(role.addr).await.unwrap())
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Client<S> {
    pub(crate) async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.0.write_all(bytes.as_ref()).await.unwrap();
    }

    pub(crate) async fn answer(&mut self) -> Answer {
        tokio::time::timeout(DEADLINE, self.read_answer()).await.expect("an answer in time")
    }

    pub(crate) async fn read_answer(&mut self) -> Answer {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(self.0.read_u8().await.expect("an answer"));
        }
        let head = String::from_utf8(head).unwrap().to_ascii_lowercase();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let mut answer = Answer { status, head, body: Vec::new() };
        answer.body = vec![0; answer.header("content-length").map_or(0, |length| length.parse().unwrap())];
        self.0.read_exact(&mut answer.body).await.unwrap();
        answer
    }

    /// Whether the connection ends within the deadline without another byte.
    pub(crate) async fn is_closed(&mut self) -> bool {
        let read = tokio::time::timeout(DEADLINE, self.0.read_u8()).await;
        read.expect("an end in time").is_err()
    }
}

pub(crate) fn request(path: &str, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let head = format!("POST {path} HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {}\r\n\r\n", body.len());
    [head.as_bytes(), body].concat()
}

pub(crate) fn ndjson(body: &[u8]) -> Vec<u8> {
    request("/", &[("Content-Type", "application/x-ndjson")], body)
}

pub(crate) fn line(number: u32) -> String {
    json!({ "ClientAddr": "203.0.113.9:4711", "DownstreamStatus": 404, "RequestPath": format!("/n/{number}"),
        "StartUTC": "2026-01-01T00:00:00Z" })
    .to_string()
}

pub(crate) fn lines(numbers: std::ops::Range<u32>) -> Vec<u8> {
    numbers.flat_map(|number| (line(number) + "\n").into_bytes()).collect()
}

impl Role {
    pub(crate) async fn batch(&mut self) -> AccessBatch {
        tokio::time::timeout(DEADLINE, self.batches.recv()).await.expect("a batch in time").expect("the role runs")
    }

    /// Sends a request and answers for every batch until there is an answer. Returns paths, other lines, and the answer.
    pub(crate) async fn exchange(&mut self, bytes: Vec<u8>) -> (Vec<String>, u64, Answer) {
        let mut client = Client::new(self).await;
        client.send(bytes).await;
        self.take_until(client.answer()).await
    }

    /// Answers for every batch until there is an answer.
    pub(crate) async fn take_until<T>(&mut self, answer: impl Future<Output = T>) -> (Vec<String>, u64, T) {
        tokio::pin!(answer);
        let (mut paths, mut unparsed) = (Vec::new(), 0);
        loop {
            tokio::select! {
                answer = &mut answer => return (paths, unparsed, answer),
                batch = self.batches.recv() => {
                    let mut batch = batch.expect("the role runs");
                    paths.extend(batch.events().map(|event| event.text.path.to_owned()));
                    unparsed += batch.counts.unparsed + batch.counts.oversized;
                    batch.deliver();
                }
            }
        }
    }

    /// Waits for a problem that says so.
    pub(crate) async fn problem(&self, text: &str) {
        let told = async {
            while !self.nodes.all().iter().flat_map(|node| &node.problems).any(|problem| problem.text.contains(text)) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(DEADLINE, told).await.unwrap_or_else(|_| panic!("no problem {text:?}"));
    }

    pub(crate) async fn report(&self, is_it: impl Fn(&SourceReport) -> bool) -> SourceReport {
        let wait = async {
            loop {
                let reports = self.nodes.all();
                if let Some(report) = reports.into_iter().flat_map(|node| node.sources).find(&is_it) {
                    return report;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let waited = tokio::time::timeout(DEADLINE, wait).await;
        waited.unwrap_or_else(|_| panic!("no such report: {:?}", self.nodes.all()))
    }

    pub(crate) async fn stop(self) {
        self.shutdown.begin();
        drop(self.batches);
        tokio::time::timeout(DEADLINE, self.task).await.expect("an end in time").unwrap().unwrap();
        drop(self.dir);
    }
}

pub(crate) fn paths(numbers: std::ops::Range<u32>) -> Vec<String> {
    numbers.map(|number| format!("/n/{number}")).collect()
}

pub(crate) fn gzip(data: &[u8]) -> Vec<u8> {
    let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
    gzip.write_all(data).unwrap();
    gzip.finish().unwrap()
}
