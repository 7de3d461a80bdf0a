//! The bench itself: its faults are faults, and what it reads is what is there.

use std::collections::BTreeSet;
use std::process::Command;

use serde_json::json;
use tests::cluster::network::client;
use tests::cluster::{CONVERGENCE, Cluster, Layout};
use tests::portcullis::wait_until;
use tests::process::Process;

fn layout(servers: u8) -> Layout {
    Layout { nodes: 2, detects: 1, servers, ..Layout::default() }
}

#[test]
fn servers_elect_a_leader_and_another_one_when_it_is_killed_and_lose_nothing() {
    let mut cluster = Cluster::new(&layout(3)).unwrap();
    cluster.servers.start_all().unwrap();
    let mut nats = cluster.servers.client(&cluster.network).unwrap();
    let stream = json!({"name": "T", "subjects": ["t.>"], "num_replicas": 3, "allow_direct": true, "storage": "file"});
    nats.api("STREAM.CREATE.T", &stream).unwrap();
    let count = 2_500;
    for i in 0..count {
        // A server may not have heard of the new stream yet; what it refuses is not stored.
        let store = || nats.request(&format!("t.{i}"), i.to_string().as_bytes()).ok()?.json().ok();
        assert_eq!(wait_until("a message is stored", CONVERGENCE, store).unwrap()["seq"], i + 1);
    }
    let leader = wait_until("a leader", CONVERGENCE, || cluster.servers.leader("T")).unwrap();
    cluster.servers.kill(leader).unwrap();
    wait_until("another leader", CONVERGENCE, || cluster.servers.leader("T").filter(|other| *other != leader)).unwrap();
    let mut nats = cluster.servers.client(&cluster.network).unwrap();
    let written: Vec<String> = (0..count).map(|i| i.to_string()).collect();
    // A copy that lags behind may answer, or none for a moment.
    let read = |nats: &mut tests::cluster::nats::Client| {
        let messages = nats.messages("T", "t.>").ok()?;
        let texts: Vec<String> =
            messages.into_iter().map(|message| String::from_utf8(message.payload).unwrap()).collect();
        (texts == written).then_some(())
    };
    wait_until("all is there", CONVERGENCE, || read(&mut nats)).unwrap();
    let last = nats.last("T", "t.7").unwrap().unwrap();
    assert_eq!((last.subject.as_str(), last.sequence(), last.payload.as_slice()), ("t.7", Some(8), &b"7"[..]));
    assert_eq!(nats.last("T", "t.none").unwrap(), None);
    assert!(nats.messages("T", "u.>").unwrap().is_empty());

    for index in 0..3 {
        cluster.servers.kill(index).unwrap();
    }
    assert!(cluster.servers.client(&cluster.network).is_err());
    cluster.servers.start_all().unwrap();
    let mut nats = cluster.servers.client(&cluster.network).unwrap();
    wait_until("all is there again", CONVERGENCE, || read(&mut nats)).unwrap();
}

#[test]
fn a_cut_host_is_silent_until_it_is_healed() {
    let cluster = Cluster::new(&layout(1)).unwrap();
    let network = &cluster.network;
    assert_eq!((cluster.get(client(1), 0, "/ok"), cluster.get(client(20), 1, "/no")), (Some(200), Some(404)));
    network.cut("edge-1").unwrap();
    assert_eq!((cluster.get(client(1), 0, "/ok"), cluster.get(client(1), 1, "/ok")), (None, Some(200)));
    network.heal("edge-1", cluster.edges[0].namespace()).unwrap();
    wait_until("it is answered again", CONVERGENCE, || cluster.get(client(1), 0, "/ok")).unwrap();
}

#[test]
fn a_bad_link_loses_packets_in_both_directions_and_a_slow_one_holds_them() {
    let cluster = Cluster::new(&layout(1)).unwrap();
    let (network, edge) = (&cluster.network, cluster.edges[0].namespace());
    network.lose("edge-1", 100).unwrap();
    assert_eq!((cluster.get(client(1), 0, "/ok"), cluster.get(client(1), 1, "/ok")), (None, Some(200)));
    network.heal("edge-1", edge).unwrap();
    wait_until("it is answered again", CONVERGENCE, || cluster.get(client(1), 0, "/ok")).unwrap();
    network.slow("edge-1", edge).unwrap();
    // More than passes at once, less than waits too long.
    assert_eq!(cluster.get(client(1), 0, &format!("/{}", "x".repeat(6_000))), Some(404));
    let held = network.outside().run("tc", &["-s", "qdisc", "show", "dev", "edge-1"]).unwrap();
    assert!(held.contains("tbf") && !held.contains("overlimits 0"), "{held}");
    network.heal("edge-1", edge).unwrap();
    assert!(!network.outside().run("tc", &["qdisc", "show", "dev", "edge-1"]).unwrap().contains("tbf"));
}

#[test]
fn a_kernel_tells_whom_it_bans() {
    let cluster = Cluster::new(&layout(1)).unwrap();
    let edge = &cluster.edges[0];
    let ipset = |words: &str| edge.namespace().run("ipset", &words.split(' ').collect::<Vec<_>>()).unwrap();
    ipset("create portcullis-v4 hash:net timeout 0 comment");
    ipset("create portcullis-v6 hash:net family inet6 timeout 0 comment");
    ipset("add portcullis-v4 203.0.113.7 timeout 1000 comment x");
    ipset("add portcullis-v6 2001:db8::/64 timeout 0");
    let banned = edge.banned().unwrap();
    assert_eq!(banned.keys().collect::<Vec<_>>(), ["2001:db8::/64", "203.0.113.7"]);
    assert!((900..=1_000).contains(&banned["203.0.113.7"].unwrap()) && banned["2001:db8::/64"].is_none());
    assert_eq!(cluster.kernels().unwrap()[1], BTreeSet::new());
}

#[test]
fn a_process_ends_when_it_is_dropped_and_its_network_with_it() {
    let cluster = Cluster::new(&layout(1)).unwrap();
    let name = cluster.edges[0].namespace().name().to_owned();
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new("ip");
    command.args(["netns", "exec", &name, "sleep", "1000"]);
    let mut process = Process::start("sleep", &mut command, &folder.path().join("log")).unwrap();
    process.signal("STOP").unwrap();
    assert!(process.ended().is_none());
    process.kill().unwrap();
    assert!(process.ended().is_some());
    drop(cluster);
    assert!(!std::path::Path::new("/run/netns").join(name).exists());
}
