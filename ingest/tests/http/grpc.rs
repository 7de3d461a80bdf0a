//! OTLP over gRPC, and what else may be said on HTTP/2.

use base64::Engine as _;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Bytes, Frame, Incoming};
use hyper::client::conn::http2::{self, SendRequest};
use hyper::{HeaderMap, Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::json;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use super::role::{Client, DEADLINE, Role, gzip, line, paths, request, start, start_with};

pub(crate) const EXPORT: &str = "/opentelemetry.proto.collector.logs.v1.LogsService/Export";

/// A field of bytes, in protobuf.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![number << 3 | 2];
    let mut length = bytes.len();
    while length >= 0x80 {
        out.push(length as u8 | 0x80);
        length >>= 7;
    }
    out.push(length as u8);
    out.extend_from_slice(bytes);
    out
}

/// A request with a record for each of these texts.
pub(crate) fn export(texts: &[String]) -> Vec<u8> {
    let records: Vec<u8> = texts.iter().flat_map(|text| field(2, &field(5, &field(1, text.as_bytes())))).collect();
    field(1, &field(2, &records))
}

/// A message with its prefix.
pub(crate) fn framed(flag: u8, message: &[u8]) -> Vec<u8> {
    [&[flag], &(message.len() as u32).to_be_bytes()[..], message].concat()
}

type Any = UnsyncBoxBody<Bytes, std::convert::Infallible>;

/// hyper's client of HTTP/2.
pub(crate) struct Caller {
    sender: SendRequest<Any>,
    connection: JoinHandle<hyper::Result<()>>,
}

/// What a call came to.
#[derive(Debug)]
pub(crate) struct Reply {
    head: HeaderMap,
    data: Vec<u8>,
    trailers: Option<HeaderMap>,
}

impl Reply {
    /// Of the trailers, or of the head of an answer that has no more.
    fn header(&self, name: &str) -> Option<&str> {
        self.trailers.as_ref().unwrap_or(&self.head).get(name).map(|value| value.to_str().unwrap())
    }

    pub(crate) fn code(&self) -> u32 {
        self.header("grpc-status").expect("a status").parse().unwrap()
    }

    fn message(&self) -> &str {
        self.header("grpc-message").unwrap_or_default()
    }
}

impl Caller {
    pub(crate) async fn new(role: &Role) -> Self {
        Self::over(TcpStream::connect(role.addr).await.unwrap()).await
    }

    pub(crate) async fn over(pipe: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> Self {
        let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(pipe)).await.unwrap();
        Self { sender, connection: tokio::spawn(connection) }
    }

    fn begin(
        &mut self,
        head: &[(&str, &str)],
        body: Any,
    ) -> impl Future<Output = hyper::Result<Response<Incoming>>> + use<> {
        let request = head.iter().fold(Request::post("http://x"), |request, (name, value)| match *name {
            ":path" => request.uri(format!("http://x{value}")),
            name => request.header(name, *value),
        });
        self.sender.send_request(request.body(body).unwrap())
    }

    /// `head` is added to that of an export.
    pub(crate) async fn call(&mut self, head: &[(&str, &str)], body: Vec<u8>) -> Reply {
        let head = [&[(":path", EXPORT), ("te", "trailers")], head].concat();
        let head = match head.iter().any(|(name, _)| *name == "content-type") {
            true => head,
            false => [&head[..], &[("content-type", "application/grpc")]].concat(),
        };
        let answer = self.begin(&head, Full::from(body).boxed_unsync());
        tokio::time::timeout(DEADLINE, read(answer)).await.expect("an answer in time")
    }

    /// Whether its connection comes to an end.
    async fn ends(self) -> bool {
        tokio::time::timeout(DEADLINE, self.connection).await.is_ok()
    }
}

async fn read(answer: impl Future<Output = hyper::Result<Response<Incoming>>>) -> Reply {
    let (head, body) = answer.await.expect("an answer").into_parts();
    assert_eq!(head.status, 200);
    let body = body.collect().await.expect("a whole answer");
    let trailers = body.trailers().cloned();
    Reply { head: head.headers, data: body.to_bytes().to_vec(), trailers }
}

/// A body that begins with these bytes and never ends.
struct Endless(Option<Bytes>);

impl Body for Endless {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        self.0.take().map_or(std::task::Poll::Pending, |data| std::task::Poll::Ready(Some(Ok(Frame::data(data)))))
    }
}

#[tokio::test]
async fn a_call_is_ok_once_its_lines_are_safe() {
    let mut role = start(json!({ "type": "otlp" })).await;
    let mut caller = Caller::new(&role).await;
    let message = export(&[line(0), "no access".to_owned(), String::new(), line(1)]);
    for (head, body) in [
        (vec![], framed(0, &message)),
        (vec![("content-type", "application/grpc+proto"), ("grpc-encoding", "gzip")], framed(1, &gzip(&message))),
        (vec![("grpc-encoding", "gzip")], framed(0, &message)),
        (vec![("grpc-encoding", "zstd")], framed(1, &zstd::stream::encode_all(&message[..], 3).unwrap())),
    ] {
        let (found, unparsed, reply) = role.take_until(caller.call(&head, body)).await;
        assert_eq!((reply.code(), found, unparsed), (0, paths(0..2), 2), "{head:?}: {reply:?}");
        assert_eq!(reply.head["content-type"], "application/grpc");
        assert!(reply.trailers.is_some() && reply.data[..5] == framed(0, &vec![0; reply.data.len() - 5])[..5]);
        assert_eq!(reply.data[5..9], [0x0a, reply.data[6], 0x08, 1], "one record is rejected");
    }
    let (found, _, reply) = role.take_until(caller.call(&[], framed(0, b""))).await;
    assert_eq!((reply.code(), found.len(), reply.data), (0, 0, vec![0; 5]), "no records are fine");

    let mut waiting = Box::pin(caller.call(&[], framed(0, &export(&[line(2)]))));
    let batch = tokio::select! {
        batch = role.batch() => batch,
        reply = &mut waiting => panic!("answered before the lines are safe: {reply:?}"),
    };
    drop(batch);
    let reply = waiting.await;
    assert_eq!((reply.code(), reply.header("grpc-retry-pushback-ms")), (14, Some("1000")), "{reply:?}");
    role.stop().await;
}

/// Whether the connection ends, after a 400 at most.
async fn ends_with_nothing_good(mut client: Client) -> bool {
    let mut said = Vec::new();
    let read = tokio::time::timeout(DEADLINE, client.0.read_to_end(&mut said)).await;
    // Who sends more than is read sees the connection reset.
    let _reset = read.expect("an end in time");
    said.is_empty() || said.starts_with(b"HTTP/1.1 400 ")
}

#[tokio::test]
async fn one_port_speaks_http_and_grpc() {
    let mut role = start(json!({ "type": "otlp" })).await;
    let message = export(&[line(0)]);
    let kind = ("Content-Type", "application/x-protobuf");
    let (found, _, answer) = role.exchange(request("/v1/logs", &[kind], &message)).await;
    assert_eq!((answer.status, found), (200, paths(0..1)));
    let mut caller = Caller::new(&role).await;
    let (found, _, reply) = role.take_until(caller.call(&[], framed(0, &message))).await;
    assert_eq!((reply.code(), found), (0, paths(0..1)));
    let head = [(":path", "/v1/logs"), ("content-type", "application/x-protobuf")];
    let answer = read(caller.begin(&head, Full::from(message.clone()).boxed_unsync()));
    let (found, _, reply) = role.take_until(answer).await;
    assert_eq!((reply.data.len(), reply.trailers, found), (0, None, paths(0..1)), "OTLP over HTTP, on HTTP/2");

    let call = request(EXPORT, &[("Content-Type", "application/grpc")], &framed(0, &message));
    assert_eq!(role.exchange(call).await.2.status, 404, "without HTTP/2 there is no gRPC");
    let mut client = Client::new(&role).await;
    client.send("PRI / HTTP/1.1\r\n\r\n").await;
    assert_eq!(client.answer().await.status, 404, "what begins alike is HTTP/1.1");
    let mut client = Client::new(&role).await;
    client.send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\t").await;
    assert!(ends_with_nothing_good(client).await);
    let mut lines = start(json!({ "type": "http" })).await;
    let mut client = Client::new(&lines).await;
    client.send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
    assert!(ends_with_nothing_good(client).await, "lines are posted with HTTP/1.1 alone");
    assert_eq!(lines.exchange(request("/", &[], b"")).await.2.status, 200);
    lines.stop().await;
    role.stop().await;
}

#[tokio::test]
async fn what_is_no_such_call_is_refused_in_grpcs_words() {
    let mut role = start(json!({ "type": "otlp", "body_bytes_max": "64KiB" })).await;
    let (message, coded) = (export(&[line(0)]), ("grpc-encoding", "gzip"));
    let whole = framed(0, &message);
    let mut caller = Caller::new(&role).await;
    for (head, body, code, reason) in [
        (vec![(":path", "/x.LogsService/Export")], whole.clone(), 12, EXPORT),
        (vec![(":path", "/v1/logs")], whole.clone(), 12, EXPORT),
        (vec![("content-type", "application/grpc+json")], whole.clone(), 12, "send application/grpc+proto"),
        (vec![("grpc-encoding", "snappy")], whole.clone(), 12, "send gzip"),
        (vec![], vec![], 3, "cut short"),
        (vec![], vec![0, 0, 0], 3, "cut short"),
        (vec![], whole[..whole.len() - 1].to_vec(), 3, "cut short"),
        (vec![], [&whole[..], b"\0"].concat(), 3, "bytes follow"),
        (vec![], [&whole[..], &whole[..]].concat(), 3, "bytes follow"),
        (vec![], framed(2, &message), 3, "unknown flag"),
        (vec![], framed(1, &gzip(&message)), 13, "does not say how"),
        (vec![coded], framed(1, &message), 3, "cannot be unpacked"),
        (vec![coded], framed(1, &gzip(&message)[..40]), 3, "its end is missing"),
        (vec![], framed(0, b"\xff"), 3, "no ExportLogsServiceRequest"),
        (vec![], [&[0, 0xff, 0xff, 0xff, 0xff][..], &message].concat(), 8, "65536 bytes at most"),
        (vec![], framed(0, &vec![0; (64 << 10) + 1]), 8, "65536 bytes at most"),
        (vec![coded], framed(1, &gzip(&vec![0; 32 << 20])), 8, "uncompressed too"),
    ] {
        let (found, unparsed, reply) = role.take_until(caller.call(&head, body)).await;
        assert_eq!((reply.code(), found.len(), unparsed), (code, 0, 0), "{head:?} {reason}: {reply:?}");
        assert!(reply.message().contains(reason), "{reason}: {reply:?}");
        assert!(reply.head["grpc-accept-encoding"].to_str().unwrap().contains("gzip"));
        assert_eq!((reply.header("grpc-retry-pushback-ms"), reply.header("grpc-status-details-bin")), (None, None));
        assert!(reply.data.is_empty() && reply.trailers.is_none(), "{reply:?}");
    }
    let report = role.report(|report| report.refused == 17).await;
    assert_eq!(report.lines, 0, "a call with a mistake brings nothing");
    let (found, _, reply) = role.take_until(caller.call(&[], whole)).await;
    assert_eq!((reply.code(), found), (0, paths(0..1)), "the connection goes on");
    role.stop().await;
}

#[tokio::test]
async fn secrets_are_asked_for_in_metadata() {
    let secrets = [("tokens_file", "0123456789abcdef\n")];
    let mut role = start_with(json!({ "type": "otlp" }), 64, &secrets).await;
    let mut caller = Caller::new(&role).await;
    let right = [("authorization", "Bearer 0123456789abcdef")];
    assert_eq!(caller.call(&right, framed(0, b"")).await.code(), 0);
    let reply = caller.call(&[("authorization", "Bearer 0123456789abcdee")], framed(0, &export(&[line(0)]))).await;
    assert!(reply.code() == 16 && !format!("{reply:?}").contains("0123456789"), "{reply:?}");
    assert!(caller.ends().await, "a failure ends its connection");
    let mut codes = Vec::new();
    for _ in 0..12 {
        codes.push(Caller::new(&role).await.call(&[], framed(0, b"")).await.code());
    }
    assert_eq!((codes[0], codes[11]), (16, 8), "{codes:?}");
    let mut caller = Caller::new(&role).await;
    let (_, _, reply) = role.take_until(caller.call(&right, framed(0, b""))).await;
    assert_eq!(reply.code(), 0, "a right one always gets in");
    role.stop().await;
}

#[tokio::test]
async fn more_than_a_senders_share_is_told_when_to_come_again() {
    let limits = json!({ "sender_lines": 10, "burst": "2s" });
    let mut role = start(json!({ "type": "otlp", "limits": limits })).await;
    let mut caller = Caller::new(&role).await;
    let body = framed(0, &export(&(0..20).map(line).collect::<Vec<_>>()));
    assert_eq!(role.take_until(caller.call(&[], body.clone())).await.2.code(), 0);
    let (found, _, reply) = role.take_until(caller.call(&[], body)).await;
    assert_eq!((reply.code(), found.len()), (8, 0), "{reply:?}");
    let pushback: u64 = reply.header("grpc-retry-pushback-ms").unwrap().parse().unwrap();
    assert!((1..=2000).contains(&pushback), "{pushback}");
    let details = reply.header("grpc-status-details-bin").unwrap();
    let details = base64::engine::general_purpose::STANDARD_NO_PAD.decode(details).unwrap();
    assert!(String::from_utf8_lossy(&details).contains("type.googleapis.com/google.rpc.RetryInfo"), "{details:?}");
    assert_eq!(role.report(|report| report.limited > 0).await.limited, 20);
    role.stop().await;
}

#[tokio::test]
async fn a_sender_that_gives_up_its_calls_again_and_again_is_let_go() {
    let mut role = start(json!({ "type": "otlp" })).await;
    let stream = TcpStream::connect(role.addr).await.unwrap();
    let (mut sender, connection) = h2::client::handshake(stream).await.unwrap();
    let connection = tokio::spawn(connection);
    let mut given_up = 0;
    while let Ok(mut ready) = sender.clone().ready().await {
        let request = Request::post(format!("http://x{EXPORT}")).header("content-type", "application/grpc");
        let Ok((_answer, mut body)) = ready.send_request(request.body(()).unwrap(), false) else { break };
        // Without a look at whether it has come.
        tokio::task::yield_now().await;
        body.send_reset(h2::Reason::CANCEL);
        (sender, given_up) = (ready, given_up + 1);
        assert!(given_up < 10_000, "nobody minds");
    }
    assert!(given_up > 10, "{given_up}");
    let ended = tokio::time::timeout(DEADLINE, connection).await.expect("an end in time");
    drop(ended);
    role.report(|report| report.refused > 0).await;
    let mut honest = Caller::new(&role).await;
    let (_, _, reply) = role.take_until(honest.call(&[], framed(0, b""))).await;
    assert_eq!(reply.code(), 0);
    role.stop().await;
}

#[tokio::test]
async fn a_connection_without_calls_is_closed_after_its_idle_time() {
    let role = start(json!({ "type": "otlp", "idle_timeout": "1s" })).await;
    let unused = Caller::new(&role).await;
    let mut used = Caller::new(&role).await;
    let (unused, reply) = tokio::join!(unused.ends(), used.call(&[], framed(0, b"")));
    assert_eq!((unused, reply.code()), (true, 0));
    assert!(used.ends().await);
    role.stop().await;
}

#[tokio::test]
async fn a_shutdown_finishes_calls_under_way_and_takes_nothing_new() {
    let mut role = start(json!({ "type": "otlp" })).await;
    let mut caller = Caller::new(&role).await;
    let head = [(":path", EXPORT), ("content-type", "application/grpc")];
    let reading = caller.begin(&head, Endless(Some(vec![0, 0, 0, 0, 9, 0, 0].into())).boxed_unsync());
    let waiting = caller.call(&[], framed(0, &export(&[line(0)])));
    let ending = async {
        let mut batch = role.batch().await;
        role.shutdown.begin();
        batch.deliver();
    };
    let (reading, waiting, ()) = tokio::join!(read(reading), waiting, ending);
    assert_eq!((reading.code(), waiting.code()), (14, 0), "{reading:?} {waiting:?}");
    assert!(caller.ends().await);
    assert!(TcpStream::connect(role.addr).await.is_err());
    role.stop().await;
}

/// A frame of HTTP/2 (RFC 9113, section 4.1).
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

#[tokio::test]
async fn a_sender_that_hears_no_farewell_is_let_go_too() {
    let role = start(json!({ "type": "otlp" })).await;
    let mut stream = TcpStream::connect(role.addr).await.unwrap();
    let text = |prefix: u8, text: &str| [&[prefix, text.len() as u8], text.as_bytes()].concat();
    // POST, http, and the others by their places in HPACK's static table.
    let head = [&[0x83, 0x86][..], &text(0x44, EXPORT), &text(0x41, "x"), &text(0x5f, "application/grpc")].concat();
    let (settings, headers, reset) = (4, 1, 3);
    stream.write_all(&[&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &frame(settings, 0, 0, &[])].concat()).await.unwrap();
    let calls = async {
        for stream_id in (1..).step_by(2) {
            let call = [frame(headers, 4, stream_id, &head), frame(reset, 0, stream_id, &8_u32.to_be_bytes())].concat();
            if stream.write_all(&call).await.is_err() {
                return;
            }
            // So that each is seen before it is given up.
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(DEADLINE, calls).await.expect("an end in time");
    role.report(|report| report.refused > 0).await;
    role.stop().await;
}
