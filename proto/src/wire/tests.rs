use std::fs;
use std::path::PathBuf;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::event::{Event, Headers, Text};

/// All that a batch says, for comparison.
fn describe(batch: &AccessBatch) -> Value {
    let events: Vec<Value> = batch.events().map(|event| describe_event(&event)).collect();
    let LineCounts { lines, unparsed, oversized, withheld } = batch.counts;
    json!({
        "node": &*batch.node,
        "origin": batch.origin.as_deref(),
        "source": &*batch.source,
        "span": batch.span.map(|span| json!({"generation": span.generation, "start": span.start, "end": span.end})),
        "counts": {"lines": lines, "unparsed": unparsed, "oversized": oversized, "withheld": withheld},
        "read_at": batch.read_at.as_nanos(),
        "filter": batch.filter,
        "events": events,
    })
}

fn describe_event(event: &Event<'_>) -> Value {
    let text = event.text;
    json!({
        "time": event.time.map(Timestamp::as_nanos),
        "client": event.client.map_or_else(|why| json!(why.as_str()), |client| json!(client.addr)),
        "via_proxy": event.client.is_ok_and(|client| client.via_proxy),
        "peer": event.peer,
        "status": [event.status, event.origin_status],
        "text": {
            "method": text.method, "path": text.path, "query": text.query, "host": text.host,
            "protocol": text.protocol, "user_agent": text.user_agent, "router": text.router, "service": text.service,
            "entry_point": text.entry_point, "username": text.username,
        },
        "headers": event.headers.iter().collect::<Vec<_>>(),
        "offset": event.offset,
    })
}

fn sample() -> AccessBatch {
    let mut batch =
        AccessBatch::new("edge-1".into(), "traefik".into(), Timestamp::from_nanos(1_767_881_956_000_000_007));
    batch.span = Some(FileSpan { generation: u64::MAX, start: 1000, end: 2000 });
    batch.counts = LineCounts { lines: 9, unparsed: 2, oversized: 1, withheld: 3 };
    batch.filter = 4;
    let addr = |text: &str| text.parse::<IpAddr>().unwrap();
    let text = Text {
        method: "GET",
        path: "/wp-login.php",
        query: "",
        host: "shop.example",
        protocol: "HTTP/2.0",
        user_agent: "curl/8.5.0",
        router: "web@file -> shop@docker",
        service: "shop@docker",
        entry_point: "websecure",
        username: ABSENT,
    };
    let headers = [("Referer", "https://shop.example/ü"), ("X-Empty", "")];
    batch.push(&Event {
        time: Some(Timestamp::from_nanos(1_767_881_955_980_000_001)),
        client: Ok(Client { addr: addr("192.0.2.1"), via_proxy: false }),
        peer: Some(addr("192.0.2.1")),
        status: 404,
        origin_status: 404,
        text,
        headers: Headers::from_pairs(&headers),
        offset: 1000,
    });
    batch.push(&Event {
        client: Ok(Client { addr: addr("2001:db8::7"), via_proxy: true }),
        peer: Some(addr("162.158.1.1")),
        status: 401,
        text: Text { path: "/é?", username: "böse", ..text },
        offset: 1500,
        ..Event::default()
    });
    batch.push(&Event {
        time: Some(Timestamp::from_nanos(1_767_881_955_000_000_000)),
        client: Err(NoClient::UnvouchedChain),
        offset: 1999,
        ..Event::default()
    });
    batch
}

/// A batch as encoded, its content changed by `change` before it is compressed.
fn altered(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut raw = decompress(&encode_batch(&sample())[2..]).unwrap();
    change(&mut raw);
    let mut bytes = vec![MAGIC, VERSION];
    bytes.extend(zstd::bulk::compress(&raw, LEVEL).unwrap());
    bytes
}

#[test]
fn version_1_decodes_for_ever() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("testdata/access-v1");
    for name in ["mixed", "nothing-but-withheld", "without-offsets"] {
        let bytes = fs::read(folder.join(format!("{name}.bin"))).unwrap();
        let expected = fs::read(folder.join(format!("{name}.json"))).unwrap();
        let expected: Value = serde_json::from_slice(&expected).unwrap();
        assert_eq!(describe(&decode_batch(&bytes).unwrap()), expected, "{name}");
    }
}

#[test]
fn what_is_encoded_is_decoded() {
    let batch = sample();
    let decoded = decode_batch(&encode_batch(&batch)).unwrap();
    assert_eq!(describe(&decoded), describe(&batch));
    // Again, now that the arena lies in the order of the wire.
    assert_eq!(encode_batch(&decoded), encode_batch(&batch));
}

#[test]
fn what_is_no_batch_or_newer_is_told_apart() {
    let bytes = encode_batch(&sample());
    assert_eq!(decode_batch(&[]).unwrap_err(), WireError::NotABatch);
    assert_eq!(decode_batch(b"{\"ClientAddr\":").unwrap_err(), WireError::NotABatch);
    assert_eq!(decode_batch(&[b"P\x02", &bytes[2..]].concat()).unwrap_err(), WireError::Version(2));
    assert_eq!(decode_batch(&bytes[..bytes.len() - 1]).unwrap_err(), WireError::Compression);
    assert_eq!(decode_batch(&[&bytes[..], b"x"].concat()).unwrap_err(), WireError::Compression);
    assert_eq!(decode_batch(&[&bytes[..], &bytes[2..]].concat()).unwrap_err(), WireError::Compression);
}

#[test]
fn a_bomb_is_refused_before_it_is_unpacked() {
    let bomb = zstd::bulk::compress(&vec![0; RAW_BYTES_MAX + 1], LEVEL).unwrap();
    assert!(bomb.len() < 2000);
    let refused = decode_batch(&[b"P\x01", &bomb[..]].concat()).unwrap_err();
    assert_eq!(refused, WireError::TooLarge { bytes: RAW_BYTES_MAX as u64 + 1 });
}

#[test]
fn content_that_contradicts_itself_is_refused() {
    let refused = |change: fn(&mut AccessBatch)| {
        let mut batch = sample();
        change(&mut batch);
        matches!(decode_batch(&encode_batch(&batch)), Err(WireError::Damaged(_)))
    };
    assert!(!refused(|_| {}));
    assert!(refused(|batch| batch.node = "Edge 1".into()));
    assert!(refused(|batch| batch.origin = Some("Edge 1".into())));
    assert!(refused(|batch| batch.source = "".into()));
    assert!(refused(|batch| batch.span = Some(FileSpan { generation: 1, start: 1001, end: 2000 })));
    assert!(refused(|batch| batch.span = Some(FileSpan { generation: 1, start: 1000, end: 1999 })));
    assert!(refused(|batch| batch.records[1].status = 1000));
    let wrong = |change: fn(&mut Vec<u8>)| matches!(decode_batch(&altered(change)), Err(WireError::Damaged(_)));
    assert!(!wrong(|_| {}));
    assert!(wrong(|raw| raw.push(0)));
    assert!(wrong(|raw| raw.truncate(raw.len() - 1)));
    assert!(wrong(|raw| raw.clear()));
}

#[test]
fn limits_hold_to_the_last_event_header_and_byte() {
    let decodes = |batch: &AccessBatch| {
        let decoded = decode_batch(&encode_batch(batch)).is_ok();
        assert_eq!(decoded, batch.is_within_limits());
        decoded
    };
    let new = || AccessBatch::new("n".into(), "s".into(), Timestamp::EPOCH);
    let mut batch = new();
    (0..EVENTS_MAX).for_each(|_| batch.push(&Event::default()));
    assert!(decodes(&batch));
    batch.push(&Event::default());
    assert!(!decodes(&batch));
    let mut batch = new();
    let headers = vec![("", "-"); HEADERS_MAX];
    batch.push(&Event { headers: Headers::from_pairs(&headers), ..Event::default() });
    assert!(decodes(&batch));
    batch.push(&Event { headers: Headers::from_pairs(&headers[..1]), ..Event::default() });
    assert!(!decodes(&batch));
    let path = "x".repeat(TEXT_BYTES_MAX);
    let mut batch = new();
    batch.push(&Event { text: Text { path: &path, query: "-", ..Text::default() }, ..Event::default() });
    assert!(decodes(&batch));
    batch.push(&Event { text: Text { path: "x", ..Text::default() }, ..Event::default() });
    assert!(!decodes(&batch));
}

#[test]
fn the_largest_batch_within_its_limits_can_be_read() {
    let mut batch = AccessBatch::new("n".repeat(63).into(), "s".repeat(63).into(), Timestamp::from_nanos(i64::MIN));
    batch.counts = LineCounts { lines: u64::MAX, unparsed: u64::MAX, oversized: u64::MAX, withheld: u64::MAX };
    batch.filter = u64::MAX;
    let headers = vec![("", ""); HEADERS_MAX / EVENTS_MAX];
    let path = "\u{1}".repeat(TEXT_BYTES_MAX / EVENTS_MAX);
    let addr = |last: u16| IpAddr::from([0xffff, 1, 2, 3, 4, 5, 6, last]);
    for number in 0..EVENTS_MAX as u64 {
        batch.push(&Event {
            time: Some(Timestamp::from_nanos(if number % 2 == 0 { i64::MAX } else { 0 })),
            client: Ok(Client { addr: addr(1), via_proxy: true }),
            peer: Some(addr(2)),
            status: 999,
            origin_status: 999,
            text: Text { path: &path, ..Text::default() },
            headers: Headers::from_pairs(&headers),
            offset: if number % 2 == 0 { u64::MAX / 2 } else { 0 },
        });
    }
    assert!(batch.is_within_limits());
    assert_eq!(decode_batch(&encode_batch(&batch)).unwrap().len(), EVENTS_MAX);
}

/// An event and its headers, owned.
type Owned = (Option<i64>, u8, [u8; 4], Option<u128>, (u16, u16), Vec<String>, Vec<(String, String)>, u64);

fn event() -> impl Strategy<Value = Owned> {
    let text = || prop_oneof![Just("-".to_owned()), Just(String::new()), "\\PC{0,12}"];
    (
        any::<Option<i64>>(),
        0u8..6,
        any::<[u8; 4]>(),
        any::<Option<u128>>(),
        (0..=STATUS_MAX, 0..=STATUS_MAX),
        prop::collection::vec(text(), TEXT_FIELDS),
        prop::collection::vec((text(), text()), 0..3),
        any::<u64>(),
    )
}

fn push(batch: &mut AccessBatch, owned: &Owned) {
    let (time, client, v4, v6, (status, origin_status), text, headers, offset) = owned;
    let v4 = IpAddr::from(*v4);
    let v6 = v6.map(|bits| canonical(IpAddr::from(bits.to_be_bytes())));
    let client = match client {
        0 => Err(NoClient::Absent),
        1 => Err(NoClient::NotAnAddress),
        2 => Err(NoClient::OnlyProxies),
        3 => Err(NoClient::UnvouchedChain),
        4 => Ok(Client { addr: v4, via_proxy: false }),
        _ => Ok(Client { addr: v6.unwrap_or(v4), via_proxy: true }),
    };
    let headers: Vec<_> = headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let text: Vec<&str> = text.iter().map(String::as_str).collect();
    let [method, path, query, host, protocol, user_agent, router, service, entry_point, username] = text[..] else {
        panic!("as many fields as there are");
    };
    let text = Text { method, path, query, host, protocol, user_agent, router, service, entry_point, username };
    let headers = Headers::from_pairs(&headers);
    let time = time.map(Timestamp::from_nanos);
    batch.push(&Event {
        time,
        client,
        peer: v6,
        status: *status,
        origin_status: *origin_status,
        text,
        headers,
        offset: *offset,
    });
}

proptest! {
    #[test]
    fn any_batch_comes_back_as_it_was(
        events in prop::collection::vec(event(), 0..12), span in any::<Option<(u64, u64)>>(), read_at: i64, filter: u64,
        halves: bool,
    ) {
        let mut batch = AccessBatch::new("node".into(), "source".into(), Timestamp::from_nanos(read_at));
        batch.filter = filter;
        batch.counts.lines = events.len() as u64;
        batch.span = span.map(|(generation, middle)| FileSpan { generation, start: middle / 2, end: u64::MAX });
        for owned in &events {
            let mut owned = owned.clone();
            owned.7 = batch.span.map_or(owned.7, |span| owned.7.clamp(span.start, u64::MAX - 1));
            push(&mut batch, &owned);
        }
        if halves && batch.span.is_none() && let Some((mut first, mut second)) = batch.halve() {
            prop_assert!(first.append(&mut second, TEXT_BYTES_MAX));
            prop_assert_eq!(describe(&first), describe(&batch));
            batch = first;
        }
        prop_assert_eq!(describe(&decode_batch(&encode_batch(&batch)).unwrap()), describe(&batch));
    }

    #[test]
    fn damage_anywhere_is_refused_or_read_as_another_batch(at: usize, byte: u8, cut: usize) {
        let bytes = altered(|raw| {
            let at = at % raw.len();
            raw[at] = byte;
            raw.truncate(raw.len().max(cut % (2 * raw.len())));
        });
        if let Ok(batch) = decode_batch(&bytes) {
            // Whatever it is, it is a batch.
            prop_assert_eq!(describe(&decode_batch(&encode_batch(&batch)).unwrap()), describe(&batch));
        }
    }

    #[test]
    fn any_bytes_are_decoded_or_refused(bytes: Vec<u8>) {
        let _ = decode_batch(&bytes);
        let _ = decode_batch(&[&[MAGIC, VERSION], &bytes[..]].concat());
        let frame = zstd::bulk::compress(&bytes, LEVEL).unwrap();
        let _ = decode_batch(&[&[MAGIC, VERSION], &frame[..]].concat());
    }
}
