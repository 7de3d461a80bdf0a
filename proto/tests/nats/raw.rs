//! Raw lines: shared by a group, and counted where they are dropped.

use std::collections::BTreeSet;
use std::time::Duration;

use futures_util::StreamExt;
use proto::bus::nats::raw::{RawFeed, RawSubject, subscribe};
use proto::shutdown::Shutdown;
use proto::time::Clock;

use crate::PATIENCE;
use crate::server::Server;

const SUBJECT: &str = "portcullis.raw.v1.shop";

async fn join(server: &Server, node: &str, shutdown: &Shutdown) -> RawFeed {
    let wanted = RawSubject { subject: SUBJECT.to_owned(), queue: "ingest".to_owned() };
    let (config, clock) = (server.config(), Clock::system());
    subscribe(&config, ("test", node), wanted, (clock, shutdown.clone())).await.unwrap()
}

async fn shipper(server: &Server) -> async_nats::Client {
    async_nats::connect(format!("nats://127.0.0.1:{}", server.port)).await.unwrap()
}

/// Returns when the server has sent on all that was published.
async fn settle(shipper: &async_nats::Client) {
    let mut echo = shipper.subscribe("settled").await.unwrap();
    shipper.publish("settled", "".into()).await.unwrap();
    tokio::time::timeout(PATIENCE, echo.next()).await.expect("an echo").unwrap();
}

/// Publishes until the feed has one, so that it is known to be a member.
async fn wait_member(shipper: &async_nats::Client, feed: &mut RawFeed) {
    for _ in 0..PATIENCE.as_millis() / 10 {
        shipper.publish(SUBJECT, "probe".into()).await.unwrap();
        if tokio::time::timeout(Duration::from_millis(10), feed.next()).await.is_ok() {
            return;
        }
    }
    panic!("nothing comes");
}

/// All numbers that come until the feed ends.
async fn numbers(mut feed: RawFeed) -> Vec<u32> {
    let mut numbers = Vec::new();
    while let Some(message) = tokio::time::timeout(PATIENCE, feed.next()).await.expect("it ends") {
        numbers.extend(std::str::from_utf8(&message).unwrap().parse::<u32>());
    }
    assert_eq!(feed.take_dropped(), 0);
    numbers
}

#[tokio::test(flavor = "multi_thread")]
async fn every_message_goes_to_one_member_also_while_one_leaves() {
    let server = Server::start();
    let (first_end, second_end) = (Shutdown::new(), Shutdown::new());
    let mut first = join(&server, "edge-1", &first_end).await;
    let mut second = join(&server, "edge-2", &second_end).await;
    let shipper = shipper(&server).await;
    wait_member(&shipper, &mut first).await;
    wait_member(&shipper, &mut second).await;
    let members = [tokio::spawn(numbers(first)), tokio::spawn(numbers(second))];
    for number in 0..20_000_u32 {
        shipper.publish(SUBJECT, number.to_string().into()).await.unwrap();
        if number == 10_000 {
            first_end.begin();
        }
    }
    settle(&shipper).await;
    let [first, second] = members;
    let first = first.await.unwrap();
    second_end.begin();
    let second = second.await.unwrap();
    assert!(!first.is_empty() && second.len() > first.len(), "{} and {}", first.len(), second.len());
    assert_eq!(first.len() + second.len(), 20_000, "each once");
    let all: BTreeSet<u32> = first.into_iter().chain(second).collect();
    assert_eq!(all.len(), 20_000, "and all of them");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_slow_reader_misses_is_counted() {
    let server = Server::start();
    let shutdown = Shutdown::new();
    let mut feed = join(&server, "edge-1", &shutdown).await;
    let shipper = shipper(&server).await;
    wait_member(&shipper, &mut feed).await;
    while tokio::time::timeout(Duration::from_millis(100), feed.next()).await.is_ok() {}
    // Two lines a message, and twice what may wait.
    let message = bytes::Bytes::from([vec![b'x'; 32 << 10], b"\ny".to_vec()].concat());
    for _ in 0..1000 {
        shipper.publish(SUBJECT, message.clone()).await.unwrap();
    }
    settle(&shipper).await;
    // Nobody reads until some have found no room; then all are taken or counted.
    let (mut dropped, mut read) = (0, 0);
    for _ in 0..PATIENCE.as_millis() / 10 {
        dropped += feed.take_dropped();
        while dropped > 500
            && let Ok(Some(message)) = tokio::time::timeout(Duration::from_millis(10), feed.next()).await
        {
            read += message.split(|byte| *byte == b'\n').count() as u64;
        }
        if read + dropped >= 2000 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(read + dropped, 2000, "{read} were read and {dropped} counted: nothing is lost unseen");
    assert!(read > 500, "{read}");
    shutdown.begin();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_is_back_after_the_server_was_away() {
    let mut server = Server::start();
    let shutdown = Shutdown::new();
    let mut feed = join(&server, "edge-1", &shutdown).await;
    wait_member(&shipper(&server).await, &mut feed).await;
    server.kill_and_restart();
    let mut connected = None;
    for _ in 0..PATIENCE.as_millis() / 10 {
        connected = async_nats::connect(format!("nats://127.0.0.1:{}", server.port)).await.ok();
        if connected.is_some() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    wait_member(&connected.expect("the server is back"), &mut feed).await;
}
