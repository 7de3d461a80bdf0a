//! One detect decides, and when it is gone another does.

use std::time::Duration;

use proto::report::Role;
use proto::time::{Clock, Timestamp};
use serde_json::json;
use tests::access::Access;
use tests::cluster::network::client;
use tests::cluster::{CONVERGENCE, Cluster, Layout};
use tests::portcullis::wait_until;

use super::{burst, only_ban, wait_banned};

fn layout() -> Layout {
    Layout { nodes: 1, servers: 1, ..Layout::default() }
}

fn active(cluster: &Cluster) -> usize {
    wait_until("a detect is active", CONVERGENCE, || cluster.active_detect()).unwrap()
}

/// Waits for the first commit of a detect that became active after `epoch`; says how long after `begun_at` it came.
fn wait_successor(cluster: &Cluster, epoch: u64, begun_at: Timestamp) -> Duration {
    let look = || cluster.head().ok().filter(|head| head.mark.epoch > epoch);
    wait_until("a successor commits", CONVERGENCE, look).unwrap();
    Clock::system().now().since(begun_at)
}

#[test]
fn a_detect_that_is_killed_is_replaced_and_what_it_counted_still_counts() {
    let mut cluster = Cluster::start(&layout()).unwrap();
    for last in 7..9 {
        cluster.write(0, &burst(client(last), 14)).unwrap();
        super::wait_counted(&cluster, client(last), 14);
        let (index, epoch) = (active(&cluster), cluster.head().unwrap().mark.epoch);
        cluster.detects[index].kill(Role::Detect).unwrap();
        let taken = wait_successor(&cluster, epoch, Clock::system().now());
        println!("killed: {taken:?} to the first commit of the successor");
        cluster.write(0, &burst(client(last), 1)).unwrap();
        let banned: Vec<String> = (7..=last).map(|last| client(last).to_string()).collect();
        wait_banned(&cluster, &banned.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(only_ban(&cluster, &client(last).to_string())["evidence"]["failures"], 15);
        cluster.detects[index].start(Role::Detect).unwrap();
        cluster.wait_reported().unwrap();
    }
    cluster.stop().unwrap();
}

#[test]
fn a_detect_that_stops_in_order_hands_over_at_once() {
    let mut cluster = Cluster::start(&layout()).unwrap();
    for _ in 0..2 {
        let (index, epoch) = (active(&cluster), cluster.head().unwrap().mark.epoch);
        let begun_at = Clock::system().now();
        cluster.detects[index].stop(Role::Detect).unwrap();
        let ended = Clock::system().now().since(begun_at);
        let taken = wait_successor(&cluster, epoch, begun_at);
        println!("stopped: {ended:?} to its end, {taken:?} to the first commit of the successor");
        cluster.detects[index].start(Role::Detect).unwrap();
        cluster.wait_reported().unwrap();
    }
    cluster.stop().unwrap();
}

/// Events are stored with their bans and published afterwards. Here they cannot be, and then the detect that stored them is
/// gone. Its clients offend from the highest address to the lowest, while the state is in the order of addresses.
#[test]
fn events_that_a_killed_detect_has_left_are_published_by_its_successor() {
    let mut cluster = Cluster::start(&layout()).unwrap();
    let mut nats = cluster.servers.client(&cluster.network).unwrap();
    let stream = nats.api("STREAM.INFO.PORTCULLIS_EVENTS", &json!({})).unwrap()["config"].take();
    let mut elsewhere = stream.clone();
    elsewhere["subjects"] = json!(["elsewhere.>"]);
    nats.api("STREAM.UPDATE.PORTCULLIS_EVENTS", &elsewhere).unwrap();
    let clients = [9, 8, 7].map(client);
    let requests: Vec<Access> = clients.iter().flat_map(|client| burst(*client, 15)).collect();
    cluster.write(0, &requests).unwrap();
    wait_banned(&cluster, &["203.0.113.7", "203.0.113.8", "203.0.113.9"]);
    let index = active(&cluster);
    cluster.detects[index].kill(Role::Detect).unwrap();
    nats.api("STREAM.UPDATE.PORTCULLIS_EVENTS", &stream).unwrap();
    let announced = || {
        let events = cluster.events().ok()?;
        let bans = events.iter().filter(|event| event["type"] == "io.portcullis.ban.v1");
        let targets: Vec<&str> = bans.filter_map(|event| event["subject"].as_str()).collect();
        (targets == clients.map(|client| client.to_string())).then_some(())
    };
    wait_until("every ban is announced, in order", CONVERGENCE, announced).unwrap();
    cluster.end().unwrap();
}
