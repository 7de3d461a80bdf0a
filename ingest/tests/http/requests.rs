//! HTTP/1.1: lines, and OTLP as it answers.

use std::fs::{Permissions, set_permissions, write};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use flate2::Compression;
use ingest::error::IngestError;
use ingest::pipeline;
use proto::bus::memory::Nodes;
use proto::shutdown::Shutdown;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};

use super::inputs;
use super::role::{Client, DEADLINE, Role, checked, gzip, line, lines, ndjson, paths, request, start, start_with};

#[tokio::test]
async fn an_answer_comes_only_after_the_lines_are_safe() {
    let mut role = start(json!({ "type": "http" })).await;
    let mut client = Client::new(&role).await;
    client.send(ndjson(&lines(0..3))).await;
    let mut batch = role.batch().await;
    assert_eq!(batch.events().count(), 3);
    assert_eq!((&*batch.node, &*batch.source, batch.origin.as_deref()), ("edge-1", "push", None));
    let early = tokio::time::timeout(Duration::from_millis(200), client.0.peek(&mut [0])).await;
    assert!(early.is_err(), "nothing is said before the lines are safe");
    batch.deliver();
    let answer = client.answer().await;
    assert_eq!((answer.status, answer.text().as_str()), (200, "3 lines taken\n"));

    client.send(ndjson(&lines(0..1))).await;
    drop(role.batch().await);
    let answer = client.answer().await;
    assert_eq!((answer.status, answer.header("retry-after")), (503, Some("1")), "{answer:?}");
    role.stop().await;
}

#[tokio::test]
async fn every_content_and_coding_is_taken() {
    let mut role = start(json!({ "type": "http", "path": "/logs" })).await;
    let array = format!("[{}, {}]", line(0), serde_json::to_string(&line(1)).unwrap());
    let docker = json!([{ "log": line(0) + "\n", "stream": "stdout" }, { "log": line(1) + "\n", "x": 1 }]).to_string();
    let zlib = {
        let mut zlib = flate2::write::ZlibEncoder::new(Vec::new(), Compression::fast());
        zlib.write_all(&lines(0..2)).unwrap();
        zlib.finish().unwrap()
    };
    let zstd = zstd::stream::encode_all(&lines(0..2)[..], 3).unwrap();
    for (kind, coding, body) in [
        ("application/x-ndjson", "identity", lines(0..2)),
        ("text/plain; charset=utf-8", "", lines(0..2)),
        ("", "", lines(0..2)),
        ("application/json", "", array.clone().into_bytes()),
        ("Application/JSON; charset=utf-8", "gzip", gzip(array.as_bytes())),
        ("application/json", "", docker.into_bytes()),
        ("application/json", "", lines(0..2)),
        ("application/x-ndjson", "gzip", gzip(&lines(0..2))),
        ("application/x-ndjson", "deflate", zlib),
        ("application/x-ndjson", "zstd", zstd),
    ] {
        let mut headers = vec![("Content-Type", kind), ("Content-Encoding", coding)];
        headers.retain(|(_, value)| !value.is_empty());
        let (found, unparsed, answer) = role.exchange(request("/logs", &headers, &body)).await;
        assert_eq!((answer.status, found, unparsed), (200, paths(0..2), 0), "{kind} {coding}: {}", answer.text());
    }
    let (found, unparsed, answer) = role.exchange(request("/logs", &[], b"hello\n\nworld")).await;
    assert_eq!((answer.status, found.len(), unparsed), (200, 0, 2), "what is no access entry is counted, and no error");
    let (_, _, answer) = role.exchange(request("/logs", &[], b"")).await;
    assert_eq!((answer.status, answer.text().as_str()), (200, "0 lines taken\n"));
    role.stop().await;
}

#[tokio::test]
async fn chunked_kept_and_pipelined_requests_are_answered_in_order() {
    let mut role = start(json!({ "type": "http" })).await;
    let mut client = Client::new(&role).await;
    let chunked = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n";
    let (body, half) = (lines(0..1), 20);
    client.send(chunked).await;
    for piece in [&body[..half], &body[half..]] {
        client.send(format!("{:x}\r\n", piece.len())).await;
        client.send(piece).await;
        client.send("\r\n").await;
    }
    client.send("0\r\n\r\n").await;
    role.batch().await.deliver();
    assert_eq!(client.answer().await.status, 200);
    client.send([ndjson(&lines(1..2)), ndjson(b""), request("/gone", &[], b"x"), ndjson(&lines(2..4))].concat()).await;
    role.batch().await.deliver();
    let mut answers = Vec::new();
    for _ in 0..3 {
        let answer = client.answer().await;
        answers.push((answer.status, answer.text()));
    }
    assert_eq!(answers[0], (200, "1 lines taken\n".to_owned()));
    assert_eq!(answers[1], (200, "0 lines taken\n".to_owned()));
    assert_eq!(answers[2].0, 404);
    role.batch().await.deliver();
    assert_eq!(client.answer().await.text(), "2 lines taken\n");
    role.stop().await;
}

#[tokio::test]
async fn what_is_no_such_request_is_refused_with_the_reason() {
    let mut role = start(json!({ "type": "http", "body_bytes_max": "64KiB" })).await;
    let json_kind = ("Content-Type", "application/json");
    for (request, status, reason) in [
        (request("/other", &[], b"x"), 404, "lines are posted to /\n"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(), 405, "POST"),
        (request("/health", &[], b""), 405, "GET"),
        (request("/", &[("Content-Type", "application/msgpack")], b"x"), 415, "application/msgpack"),
        (request("/", &[("Content-Encoding", "snappy")], b"x"), 415, "send gzip, zstd, deflate or none"),
        (request("/", &[("Content-Encoding", "gzip"), ("Content-Encoding", "gzip")], b"x"), 415, "once"),
        (request("/", &[json_kind], b"[{}, 7]"), 400, "element 2"),
        (request("/", &[json_kind], b"{\"a\":"), 400, "line 1 column 5"),
        (request("/", &[("Content-Encoding", "gzip")], b"no gzip"), 400, "cannot be unpacked"),
        (request("/", &[("Content-Encoding", "gzip")], &gzip(&lines(0..9))[..40]), 400, "its end is missing"),
        (request("/", &[], &vec![b'x'; (64 << 10) + 1]), 413, "65536 bytes at most"),
        (request("/", &[("Content-Encoding", "gzip")], &gzip(&vec![0; 8 << 20])), 413, "uncompressed too"),
    ] {
        let (found, unparsed, answer) = role.exchange(request).await;
        assert_eq!((found.len(), unparsed), (0, 0));
        assert!(answer.status == status && answer.text().contains(reason), "{status} {reason}: {answer:?}");
        assert_eq!(answer.header("retry-after"), None, "{answer:?}");
    }
    let report = role.report(|report| report.refused == 11).await;
    assert_eq!(report.lines, 0, "a body with a mistake brings nothing");
    let (found, _, answer) = role.exchange(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n".to_vec()).await;
    assert_eq!((answer.status, found.len(), answer.text().as_str()), (200, 0, "ok\n"));
    let (_, oversized, answer) = role.exchange(request("/", &[], &vec![b'x'; 64 << 10])).await;
    assert_eq!((answer.status, oversized), (200, 1), "at the limit");
    role.stop().await;
}

#[tokio::test]
async fn secrets_are_asked_for_and_failures_are_few() {
    let secrets = [("tokens_file", "0123456789abcdef\n"), ("users_file", "vector:open sesame\n")];
    let mut role = start_with(json!({ "type": "http" }), 64, &secrets).await;
    let with = |value: &str| request("/", &[("Authorization", value)], b"");
    // dmVjdG9yOm9wZW4gc2VzYW1l is vector:open sesame.
    for right in ["Bearer 0123456789abcdef", "Basic dmVjdG9yOm9wZW4gc2VzYW1l"] {
        assert_eq!(role.exchange(with(right)).await.2.status, 200, "{right}");
    }
    let (_, _, answer) = role.exchange(request("/", &[], &lines(0..1))).await;
    assert_eq!((answer.status, answer.header("connection")), (401, Some("close")));
    assert!(answer.head.contains("www-authenticate: bearer") && answer.head.contains("www-authenticate: basic"));
    assert!(!format!("{answer:?}").contains("sesame"));
    let mut statuses = Vec::new();
    for _ in 0..12 {
        statuses.push(role.exchange(with("Bearer 0123456789abcdee")).await.2);
    }
    let last = statuses.last().unwrap();
    assert_eq!((statuses[0].status, last.status, last.header("retry-after")), (401, 429, Some("1")), "{statuses:?}");
    assert_eq!(role.exchange(with("Bearer 0123456789abcdef")).await.2.status, 200, "a right one always gets in");
    let (_, _, answer) = role.exchange(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n".to_vec()).await;
    assert_eq!(answer.status, 200, "health asks for nothing");
    role.report(|report| report.refused == 13).await;
    role.stop().await;
}

#[tokio::test]
async fn a_file_of_secrets_that_is_open_to_others_lets_nobody_in_until_it_is_closed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokens");
    write(&path, "0123456789abcdef").unwrap();
    set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
    let addr = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let keys = json!({ "type": "http", "listen": addr, "auth": { "tokens_file": path } });
    let config = checked(&keys).unwrap();
    let (sender, batches) = mpsc::channel(1);
    let (shutdown, nodes) = (Shutdown::new(), Nodes::default());
    let inputs = inputs::inputs(&config, sender, (&nodes, &shutdown));
    let task = tokio::spawn(pipeline::run(config, inputs));
    let role = Role { addr, batches, nodes, shutdown, reload: watch::Sender::default(), task, dir };
    role.problem("is open to others").await;
    assert!(TcpStream::connect(addr).await.is_err());
    set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    let open = async {
        while TcpStream::connect(addr).await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(DEADLINE, open).await.expect("it listens in the end");
    role.stop().await;
}

#[tokio::test]
async fn more_than_a_senders_share_is_told_when_to_come_again() {
    let limits = json!({ "sender_lines": 10, "burst": "2s" });
    let mut role = start(json!({ "type": "http", "limits": limits })).await;
    assert_eq!(role.exchange(ndjson(&lines(0..20))).await.2.status, 200);
    let (found, _, answer) = role.exchange(ndjson(&lines(0..20))).await;
    assert_eq!((answer.status, found.len()), (429, 0), "{answer:?}");
    let seconds: u64 = answer.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=2).contains(&seconds), "{seconds}");
    assert_eq!(role.report(|report| report.limited > 0).await.limited, 20);
    role.stop().await;
}

#[tokio::test]
async fn a_full_queue_is_said_soon_and_nothing_waits_for_ever() {
    let mut role = start_with(json!({ "type": "http" }), 1, &[]).await;
    // 512 events are a batch: the first fills the queue.
    let mut client = Client::new(&role).await;
    let begun = tokio::time::timeout(Duration::from_secs(8), async {
        client.send(ndjson(&lines(0..1500))).await;
        client.answer().await
    });
    let answer = begun.await.expect("an answer soon");
    assert_eq!((answer.status, answer.header("retry-after")), (503, Some("1")), "{answer:?}");
    assert!(answer.text().contains("queue is full"), "{}", answer.text());
    role.batch().await.deliver();
    let (found, _, answer) = role.exchange(ndjson(&lines(0..1500))).await;
    assert_eq!((answer.status, found), (200, paths(0..1500)), "sent again, it is taken");
    role.stop().await;
}

#[tokio::test]
async fn lines_that_are_not_safe_in_time_are_asked_for_again() {
    let mut role = start(json!({ "type": "http" })).await;
    let mut client = Client::new(&role).await;
    client.send(ndjson(&lines(0..1))).await;
    let batch = role.batch().await;
    let answer = client.answer().await;
    assert_eq!((answer.status, answer.header("retry-after")), (503, Some("1")));
    assert!(answer.text().contains("not stored yet"), "{}", answer.text());
    drop(batch);
    role.stop().await;
}

#[tokio::test]
async fn a_head_that_never_ends_is_given_up() {
    let role = start(json!({ "type": "http", "idle_timeout": "1d" })).await;
    let (mut silent, mut slow, mut second) =
        (Client::new(&role).await, Client::new(&role).await, Client::new(&role).await);
    slow.send("POST / HTTP/1.1\r\nHo").await;
    second.send(ndjson(b"")).await;
    assert_eq!(second.answer().await.status, 200);
    second.send("POST").await;
    let trickle = async {
        for byte in b"st: x\r\nX: xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx" {
            if slow.0.write_all(&[*byte]).await.is_err() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        slow.is_closed().await
    };
    let (silent, slow, second) = tokio::join!(silent.is_closed(), trickle, second.is_closed());
    assert!(silent && slow && second);
    let mut long = Client::new(&role).await;
    long.send(format!("POST / HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(20_000))).await;
    assert_eq!(long.answer().await.status, 431);
    role.stop().await;
}

#[tokio::test]
async fn a_connection_without_requests_is_closed_after_its_idle_time() {
    let role = start(json!({ "type": "http", "idle_timeout": "1s" })).await;
    let mut client = Client::new(&role).await;
    client.send(ndjson(b"")).await;
    assert_eq!(client.answer().await.status, 200);
    let closed = tokio::time::timeout(Duration::from_secs(5), client.is_closed()).await;
    assert!(closed.expect("sooner than a head may take"));
    role.stop().await;
}

#[tokio::test]
async fn a_body_that_never_ends_is_given_up_and_holds_nobody_else() {
    let mut role = start(json!({ "type": "http" })).await;
    let mut slow = Client::new(&role).await;
    slow.send("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc").await;
    assert_eq!(role.exchange(ndjson(&lines(0..1))).await.2.status, 200);
    let answer = slow.answer().await;
    assert_eq!((answer.status, answer.header("connection")), (408, Some("close")));
    role.stop().await;
}

#[tokio::test]
async fn memory_of_all_bodies_is_bounded() {
    let mut role = start(json!({ "type": "http" })).await;
    // Bodies of which all but the last bytes come, 16 MB each: more than there is memory for.
    let body = vec![b'x'; 16_000_000];
    let (mut held, mut refused) = (Vec::new(), Vec::new());
    for _ in 0..6 {
        let mut client = Client::new(&role).await;
        // Whoever is refused sees the connection end.
        let _sent = client.0.write_all(&ndjson(&body)[..body.len()]).await;
        match tokio::time::timeout(Duration::from_secs(2), client.read_answer()).await {
            Ok(answer) => refused.push(answer),
            Err(_) => held.push(client),
        }
    }
    assert!((3..=4).contains(&held.len()), "{} of 16 MB are held in 64 MiB", held.len());
    for answer in refused {
        assert_eq!((answer.status, answer.header("retry-after")), (503, Some("1")), "{answer:?}");
        assert!(answer.text().contains("too many bodies"), "{answer:?}");
    }
    assert_eq!(role.exchange(ndjson(&lines(0..1))).await.2.status, 200, "small ones find room");
    drop(held);
    role.stop().await;
}

#[tokio::test]
async fn a_shutdown_finishes_what_is_under_way_and_takes_nothing_new() {
    let mut role = start(json!({ "type": "http" })).await;
    let (mut waiting, mut reading, mut idle) =
        (Client::new(&role).await, Client::new(&role).await, Client::new(&role).await);
    idle.send(ndjson(b"")).await;
    assert_eq!(idle.answer().await.status, 200);
    waiting.send(ndjson(&lines(0..1))).await;
    let mut batch = role.batch().await;
    reading.send("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc").await;
    role.report(|report| report.connections >= 3).await;
    role.shutdown.begin();
    assert!(idle.is_closed().await);
    let answer = reading.answer().await;
    assert_eq!((answer.status, answer.header("retry-after")), (503, Some("1")), "{answer:?}");
    batch.deliver();
    assert_eq!(waiting.answer().await.status, 200);
    assert!(TcpStream::connect(role.addr).await.is_err());
    role.stop().await;
}

#[tokio::test]
async fn lines_are_shown_under_the_node_that_was_asked_for() {
    let mut role = start(json!({ "type": "http", "node_from": "sender" })).await;
    let mut client = Client::new(&role).await;
    client.send(ndjson(&lines(0..1))).await;
    let mut batch = role.batch().await;
    assert_eq!((batch.origin.as_deref(), &*batch.node), (Some("127-0-0-1"), "edge-1"));
    batch.deliver();
    role.stop().await;

    let mut role = start(json!({ "type": "otlp", "node_from": "host" })).await;
    let logs = |host: &str, number| {
        json!({ "resource": { "attributes": [{ "key": "host.name", "value": { "stringValue": host } }] },
            "scopeLogs": [{ "logRecords": [{ "body": { "stringValue": line(number) } }] }] })
    };
    let body = json!({ "resourceLogs": [logs("Web 1", 0), logs("Web 1", 1), logs("web-2", 2)] }).to_string();
    let mut client = Client::new(&role).await;
    client.send(request("/v1/logs", &[("Content-Type", "application/json")], body.as_bytes())).await;
    for (origin, events) in [("web-1", 2), ("web-2", 1)] {
        let mut batch = role.batch().await;
        assert_eq!((batch.origin.as_deref(), batch.events().count()), (Some(origin), events));
        batch.deliver();
    }
    assert_eq!(client.answer().await.status, 200);
    role.stop().await;
}

#[tokio::test]
async fn otlp_is_answered_in_its_own_words() {
    let mut role = start(json!({ "type": "otlp", "body_bytes_max": "64KiB" })).await;
    let json_kind = ("Content-Type", "application/json");
    let records = json!([
        { "body": { "stringValue": line(0) + "\n" } },
        { "attributes": [] },
        { "body": { "stringValue": "no access entry" } },
        { "attributes": [
            { "key": "ClientAddr", "value": { "stringValue": "203.0.113.9:1" } },
            { "key": "DownstreamStatus", "value": { "intValue": "404" } },
            { "key": "RequestPath", "value": { "stringValue": "/n/1" } }
        ] }
    ]);
    let body = json!({ "resourceLogs": [{ "scopeLogs": [{ "logRecords": records }] }] }).to_string();
    for (headers, body) in [
        (vec![json_kind], body.clone().into_bytes()),
        (vec![json_kind, ("Content-Encoding", "gzip")], gzip(body.as_bytes())),
    ] {
        let (found, unparsed, answer) = role.exchange(request("/v1/logs", &headers, &body)).await;
        assert_eq!((answer.status, found, unparsed), (200, paths(0..2), 2));
        let answer: Value = serde_json::from_slice(&answer.body).unwrap();
        assert_eq!(answer["partialSuccess"]["rejectedLogRecords"], "1");
    }
    let protobuf = ("Content-Type", "application/x-protobuf");
    let (_, _, answer) = role.exchange(request("/v1/logs", &[protobuf], b"")).await;
    assert_eq!(
        (answer.status, answer.body.len(), answer.header("content-type")),
        (200, 0, Some("application/x-protobuf"))
    );
    let (_, _, answer) = role.exchange(request("/v1/logs", &[protobuf], b"{}")).await;
    assert_eq!((answer.status, &answer.body[..3]), (400, &b"\x08\x03\x12"[..]));
    let (_, _, answer) = role.exchange(request("/v1/logs", &[json_kind], b"[]")).await;
    let status: Value = serde_json::from_slice(&answer.body).unwrap();
    assert_eq!(
        (answer.status, &status["code"], answer.header("content-type")),
        (400, &json!(3), Some("application/json"))
    );
    let (_, _, answer) = role.exchange(request("/v1/logs", &[("Content-Type", "text/plain")], b"")).await;
    assert_eq!(answer.status, 415);

    let mut client = Client::new(&role).await;
    client.send(request("/v1/logs", &[json_kind], body.as_bytes())).await;
    drop(role.batch().await);
    let answer = client.answer().await;
    let status: Value = serde_json::from_slice(&answer.body).unwrap();
    assert_eq!((answer.status, &status["code"], answer.header("retry-after")), (503, &json!(14), Some("1")));
    role.stop().await;
}

#[tokio::test]
async fn when_nobody_takes_lines_any_more_the_role_ends() {
    let role = start(json!({ "type": "http" })).await;
    let Role { addr, batches, task, .. } = role;
    drop(batches);
    let mut client = Client(TcpStream::connect(addr).await.unwrap());
    client.send(ndjson(&lines(0..1))).await;
    assert_eq!(client.answer().await.status, 503);
    let ended = tokio::time::timeout(DEADLINE, task).await.expect("an end in time").unwrap();
    assert!(matches!(ended, Err(IngestError::ReceiverGone { .. })), "{ended:?}");
}

#[test]
fn all_mistakes_of_a_source_are_told_at_once() {
    let wrong = json!({ "type": "http", "listen": "10.0.0.1:80", "path": "/health", "body_bytes_max": "1GiB",
        "node_from": "host", "auth": { "token_file": "x" }, "pathh": "/" });
    let mistakes = checked(&wrong).unwrap_err();
    let keys: Vec<&str> = mistakes.iter().filter_map(|mistake| mistake.split(": ").next()).collect();
    let expected = ["allowed_senders", "auth.token_file", "body_bytes_max", "node_from", "path", "pathh"];
    assert_eq!(keys, expected.map(|key| format!("sources.push.{key}")), "{mistakes:#?}");
    checked(&json!({ "type": "otlp", "listen": "10.0.0.1:80", "auth": { "users_file": "/x" }, "node_from": "host" }))
        .unwrap();
    assert_eq!(checked(&json!({ "type": "otlp" })).unwrap_err(), ["sources.push.listen: is required"]);
}
