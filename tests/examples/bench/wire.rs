//! What it costs to put a batch on the bus and to read it there: the wire format alone, one thread.

use anyhow::{Context, Result, ensure};
use proto::client_ip::Client;
use proto::event::{AccessBatch, Event, Headers, Text};
use proto::time::{Clock, Timestamp};
use proto::wire::{decode_batch, encode_batch};
use tests::access::Access;
use tests::random::Random;

use crate::corpus::request;
use crate::table::{Numbers, number, render, to_f64};

/// Counted runs.
const RUNS: usize = 5;
/// Events of one run.
const EVENTS: u64 = 50_000;
/// Sizes of batches: one line alone, what ingest joins at a busy moment, and its largest.
const SIZES: [usize; 3] = [1, 32, 512];

/// Measures, prints the table, and returns the lines of the summary.
pub(crate) fn run() -> Result<Vec<String>> {
    let mut rows = Vec::new();
    let mut summary = Vec::new();
    for size in SIZES {
        let batches = batches(size)?;
        let (encode, decode, bytes) = measure(&batches)?;
        let events = to_f64(EVENTS);
        let per_event = number(to_f64(bytes) / events);
        summary.push(format!(
            "wire: {} ns to encode and {} ns to decode an event of a batch of {size}, {per_event} bytes",
            number(encode.median()),
            number(decode.median())
        ));
        rows.push([size.to_string(), encode.spread(number), decode.spread(number), per_event]);
    }
    let header = ["events of a batch", "encode ns/event (min / median / max)", "decode ns/event", "bytes/event"];
    println!("{}", render(header, &rows));
    Ok(summary)
}

fn measure(batches: &[AccessBatch]) -> Result<(Numbers, Numbers, u64)> {
    let clock = Clock::system();
    let per_event = |begin: Timestamp| clock.now().since(begin).as_secs_f64() * 1e9 / to_f64(EVENTS);
    let (mut encode, mut decode) = (Vec::new(), Vec::new());
    let mut bytes = 0;
    for _ in 0..RUNS {
        let begin = clock.now();
        let encoded: Vec<Vec<u8>> = batches.iter().map(encode_batch).collect();
        encode.push(per_event(begin));
        let begin = clock.now();
        let decoded: Vec<AccessBatch> = encoded
            .iter()
            .map(|bytes| decode_batch(bytes))
            .collect::<Result<_, _>>()
            .context("a batch is unreadable")?;
        decode.push(per_event(begin));
        ensure!(decoded.iter().map(encode_batch).eq(encoded.iter().cloned()), "a batch is not what it was");
        bytes = u64::try_from(encoded.iter().map(Vec::len).sum::<usize>())?;
    }
    Ok((Numbers::new(encode), Numbers::new(decode), bytes))
}

/// Requests of the corpus, in batches of `size`.
fn batches(size: usize) -> Result<Vec<AccessBatch>> {
    let mut random = Random::new(3);
    let now = Clock::system().now();
    let accesses: Vec<Access> = (0..EVENTS)
        .map(|number| Ok(request(number, now.as_nanos() + i64::try_from(number)? * 1_000_000, &mut random)))
        .collect::<Result<_>>()?;
    let batch = |accesses: &[Access]| {
        let mut batch = AccessBatch::new("edge-1".into(), "traefik".into(), now);
        for access in accesses {
            push(&mut batch, access);
        }
        batch
    };
    Ok(accesses.chunks(size).map(batch).collect())
}

fn push(batch: &mut AccessBatch, access: &Access) {
    let (path, query) = access.path.split_once('?').unwrap_or((&access.path, ""));
    batch.push(&Event {
        time: Some(Timestamp::from_nanos(access.start)),
        client: Ok(Client { addr: access.peer, via_proxy: false }),
        peer: Some(access.peer),
        status: access.status,
        origin_status: access.status,
        text: Text {
            method: access.method,
            path,
            query,
            host: "shop.example.net",
            protocol: "HTTP/2.0",
            user_agent: access.user_agent,
            router: "shop@docker",
            service: "shop@docker",
            entry_point: "websecure",
            username: &access.username,
        },
        headers: Headers::from_pairs(&[]),
        offset: access.count * 1_100,
    });
}
