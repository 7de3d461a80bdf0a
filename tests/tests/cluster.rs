//! Whole clusters: three nodes, two detects, three NATS servers, each on a host of its own, and real packets.
//!
//! What holds on one host must hold on many: the same bans as the brute-force model finds in the union of all logs, in
//! every kernel, once each, whatever fails in between.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use proto::time::Clock;
use serde_json::Value;
use tests::access::{Access, SECOND};
use tests::cluster::network::client;
use tests::cluster::{CONVERGENCE, Cluster, Layout};
use tests::portcullis::wait_until;

mod bench;
mod cloudflare;
mod faults;
mod operator;
mod takeover;
mod trouble;

/// Requests of `client` that ended up to now, a second apart, the last one `seconds_ago`.
fn probes(client: Ipv4Addr, count: i64, seconds_ago: i64) -> Vec<Access> {
    let now = Clock::system().now().as_nanos();
    let request = |i: i64| {
        let start = now - (seconds_ago + count - 1 - i) * SECOND - SECOND / 10;
        let mut access = Access::new(start, client.into(), 404, format!("/.env?{i}"));
        access.count = u64::try_from(start / 1_000_000 % 1_000_000).unwrap();
        access
    };
    (0..count).map(request).collect()
}

/// So many requests of `client` that end about now, all at once.
fn burst(client: Ipv4Addr, count: i64) -> Vec<Access> {
    let now = Clock::system().now().as_nanos();
    let request = |i: i64| {
        let mut access = Access::new(now + i, client.into(), 404, "/.git/config");
        access.count = u64::try_from((now + i) % 1_000_000).unwrap();
        access
    };
    (0..count).map(request).collect()
}

/// Waits until the rule has counted so many requests of `client`, as every detect tells it.
fn wait_counted(cluster: &Cluster, client: Ipv4Addr, wanted: u64) {
    for detect in &cluster.detects {
        let look = || {
            let answer = detect.verb(&["explain", &client.to_string(), "--json"]).ok()?.json().ok()?.pop()?;
            let rule = answer["rules"].as_array()?.iter().find(|rule| rule["rule"] == "forceful-browsing")?;
            (rule["counted"] == wanted).then_some(())
        };
        wait_until(&format!("{wanted} requests are counted"), CONVERGENCE, look).unwrap();
    }
}

/// Waits until every kernel bans `targets` and nobody else.
fn wait_banned(cluster: &Cluster, targets: &[&str]) {
    let expected: BTreeSet<String> = targets.iter().map(|target| (*target).to_owned()).collect();
    cluster.wait_kernels(&format!("every kernel bans {targets:?}"), |banned| *banned == expected).unwrap();
}

/// The one ban of `target`.
fn only_ban(cluster: &Cluster, target: &str) -> Value {
    let mut own = cluster.bans().unwrap().into_iter().filter(|ban| ban["target"] == target);
    let ban = own.next().expect("it is banned");
    assert_eq!(own.next(), None, "banned once");
    ban
}

#[test]
fn a_client_that_spreads_over_three_nodes_is_banned_on_all_three_at_the_fifteenth() {
    let cluster = Cluster::start(&Layout::default()).unwrap();
    let (attacker, visitor) = (client(7), client(8));
    for (node, count) in [(0, 5), (1, 5), (2, 4)] {
        for i in 0..count {
            assert_eq!(cluster.get(attacker, node, &format!("/wp-login.php?{i}")), Some(404));
        }
    }
    wait_counted(&cluster, attacker, 14);
    assert_eq!(cluster.bans().unwrap(), [] as [Value; 0]);
    for node in 0..3 {
        assert_eq!(cluster.get(attacker, node, "/ok"), Some(200), "14 are not enough on node {node}");
    }
    assert_eq!(cluster.get(attacker, 2, "/wp-login.php?15"), Some(404));
    wait_banned(&cluster, &["203.0.113.7"]);
    for node in 0..3 {
        assert_eq!(cluster.get(attacker, node, "/ok"), None, "cut off from node {node}");
        assert_eq!(cluster.get(visitor, node, "/ok"), Some(200), "nobody else on node {node}");
    }
    let ban = only_ban(&cluster, "203.0.113.7");
    assert_eq!((&ban["rule"], &ban["ban_count"]), (&"forceful-browsing".into(), &1.into()));
    assert_eq!(ban["evidence"]["failures"], 15);
    assert_eq!(ban["evidence"]["nodes"], serde_json::json!(["edge-1", "edge-2", "edge-3"]));
    cluster.stop().unwrap();
}
