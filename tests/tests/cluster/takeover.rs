//! One detect decides, and when it is gone another does.

use std::time::Duration;

use proto::report::Role;
use proto::time::{Clock, Timestamp};
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
