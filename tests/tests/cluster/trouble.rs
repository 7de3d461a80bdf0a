//! Troubles that come slowly: a stream that fills up, a clock that is wrong, a state that is gone.

use proto::report::{NodeReport, Role};
use proto::time::{Clock, Timestamp};
use serde_json::json;
use tests::access::{Access, SECOND};
use tests::cluster::network::client;
use tests::cluster::{CONVERGENCE, Cluster, Layout};
use tests::portcullis::wait_until;
use tests::random::Random;

use super::{burst, only_ban, probes, wait_banned};

/// One node, one detect, one server: what is tested does not depend on how many there are.
fn small(bus: &'static str, config: &'static str) -> Layout {
    Layout { nodes: 1, detects: 1, servers: 1, bus, config }
}

/// What a role on a host says of itself on the bus, also when no detect can be asked.
fn heartbeat(cluster: &Cluster, role: Role, host: &str) -> Option<NodeReport> {
    let subject = format!("$KV.portcullis_nodes.{}.{host}", role.as_str());
    let message = cluster.servers.client(&cluster.network).ok()?.last("KV_portcullis_nodes", &subject).ok()??;
    serde_json::from_slice(&message.payload).ok()
}

fn wait_problem(cluster: &Cluster, role: Role, host: &str, word: &str) {
    wait_any_problem(cluster, (role, host), &[word]);
}

fn wait_any_problem(cluster: &Cluster, (role, host): (Role, &str), words: &[&str]) {
    let problem = || {
        let report = heartbeat(cluster, role, host)?;
        let is_told = |text: &str| words.iter().any(|word| text.contains(word));
        report.problems.iter().any(|problem| is_told(&problem.text)).then_some(())
    };
    wait_until(&format!("{} on {host} says {words:?}", role.as_str()), CONVERGENCE, problem).unwrap();
}

/// Bad requests of many clients, whose paths no compression makes small.
fn noise(random: &mut Random, numbers: std::ops::Range<u32>) -> Vec<Access> {
    let now = Clock::system().now().as_nanos();
    let request = |i: u32| {
        let path: String = (0..4).map(|_| format!("/{:016x}", random.bits())).collect();
        let mut access = Access::new(now + i64::from(i), (0xcb00_7200 + i % 200).to_be_bytes().into(), 404, path);
        access.count = u64::from(i);
        access
    };
    numbers.map(request).collect()
}

/// Nothing is purged that may still count, so the window and the lateness are short here.
#[test]
fn a_full_stream_stops_reading_and_goes_on_when_there_is_room() {
    let config = "[detect]\nlateness_max = \"2s\"\n[detect.rules.forceful-browsing]\nfind_time = \"2s\"\n";
    let mut cluster = Cluster::start(&small("access_max_bytes = \"1MiB\"", config)).unwrap();
    cluster.detects[0].kill(Role::Detect).unwrap();
    let lines = 40_000_u32;
    cluster.write(0, &noise(&mut Random::new(1), 0..lines)).unwrap();
    wait_problem(&cluster, Role::Ingest, "edge-1", "full");
    cluster.detects[0].start(Role::Detect).unwrap();
    // What waits to be published is late when it arrives, and would ban nobody.
    let all_published = || {
        let report = heartbeat(&cluster, Role::Ingest, "edge-1")?;
        let source = report.sources.first()?;
        (source.lines >= u64::from(lines) && source.behind_bytes == 0 && report.problems.is_empty()).then_some(())
    };
    wait_until("every line is published", CONVERGENCE, all_published).unwrap();
    cluster.write(0, &burst(client(7), 15)).unwrap();
    let banned = |targets: &std::collections::BTreeSet<String>| targets.contains("203.0.113.7");
    cluster.wait_kernels("who comes after the flood is banned", banned).unwrap();
    cluster.stop().unwrap();
}

/// Rather than to stop all counting, the detect lets go of what it has decided.
#[test]
fn a_log_that_is_too_small_is_told_and_stops_nothing() {
    let cluster = Cluster::start(&small("access_max_bytes = \"1MiB\"", "")).unwrap();
    let mut random = Random::new(2);
    cluster.write(0, &noise(&mut random, 0..40_000)).unwrap();
    wait_problem(&cluster, Role::Detect, "detect-1", "raise bus.access_max_bytes");
    cluster.write(0, &burst(client(7), 15)).unwrap();
    let banned = |targets: &std::collections::BTreeSet<String>| targets.contains("203.0.113.7");
    cluster.wait_kernels("who comes after the flood is banned", banned).unwrap();
    cluster.stop().unwrap();
}

/// Traefik and every role on edge-1 live an hour ahead. Bans begin and end by the clock of the server.
#[test]
fn a_node_whose_clock_is_an_hour_ahead_counts_and_bans_like_the_others() {
    let mut cluster = Cluster::new(&Layout { servers: 1, ..Layout::default() }).unwrap();
    cluster.edges[0].skew(3_600);
    cluster.servers.start_all().unwrap();
    cluster.start_roles().unwrap();
    let before = Clock::system().now();
    let mut ahead = probes(client(7), 5, 0);
    for access in &mut ahead {
        access.start += 3_600 * SECOND;
    }
    cluster.write(0, &ahead).unwrap();
    cluster.write(1, &probes(client(7), 5, 0)).unwrap();
    cluster.write(2, &probes(client(7), 5, 0)).unwrap();
    wait_banned(&cluster, &["203.0.113.7"]);
    let after = Clock::system().now();
    let ban = only_ban(&cluster, "203.0.113.7");
    let moment = |key: &str| Timestamp::parse(ban[key].as_str().unwrap()).unwrap();
    assert!((before.as_millis() - 30_000..=after.as_millis()).contains(&moment("banned_at").as_millis()), "{ban}");
    assert_eq!(moment("expires_at").as_millis() - moment("banned_at").as_millis(), 600_000);
    for edge in &cluster.edges {
        let left = edge.banned().unwrap()["203.0.113.7"].unwrap();
        let promised = moment("expires_at").since(Clock::system().now()).as_secs();
        assert!(left.abs_diff(promised) <= 10, "{}: {left} s left, promised {promised}", edge.name());
    }
    for node in 0..3 {
        assert_eq!(cluster.get(client(7), node, "/ok"), None, "cut off from node {node}");
    }
    for role in [Role::Ingest, Role::Enforce] {
        wait_problem(&cluster, role, "edge-1", " ahead of that of the NATS servers");
    }
    cluster.stop().unwrap();
}

/// Somebody who may do anything on the servers deletes messages of the bucket, one and then all.
#[test]
fn a_state_that_lacks_bans_unbans_nobody_and_is_told() {
    let mut cluster = Cluster::start(&Layout { servers: 1, detects: 1, ..Layout::default() }).unwrap();
    let banned = ["198.51.100.0/24", "203.0.113.7"];
    for target in banned {
        cluster.detects[0].verb(&["ban", target]).unwrap().expect(0).unwrap();
    }
    wait_banned(&cluster, &banned);
    let mut nats = cluster.servers.client(&cluster.network).unwrap();
    let (lacks_some, lacks_all) = ("nobody is freed by that", "this host keeps the bans it has");
    for (filter, told) in [
        ("$KV.portcullis_bans.ban.203.0.113.7", &[lacks_some][..]),
        // An alarm about a host may have the detect write its head again meanwhile, with the count of bans.
        ("$KV.portcullis_bans.>", &[lacks_all, lacks_some]),
    ] {
        nats.api("STREAM.PURGE.KV_portcullis_bans", &json!({"filter": filter})).unwrap();
        for edge in &mut cluster.edges {
            // Whoever starts now reads what is left.
            edge.kill(Role::Enforce).unwrap();
            edge.start(Role::Enforce).unwrap();
        }
        for edge in ["edge-1", "edge-2", "edge-3"] {
            wait_any_problem(&cluster, (Role::Enforce, edge), told);
        }
        wait_banned(&cluster, &banned);
    }
    cluster.end().unwrap();
}

/// A copied configuration, say.
#[test]
fn a_second_process_under_the_same_name_is_told() {
    let mut cluster = Cluster::start(&Layout { nodes: 2, servers: 1, detects: 1, ..Layout::default() }).unwrap();
    cluster.edges[1].stop(Role::Enforce).unwrap();
    cluster.edges[1].rename("edge-1").unwrap();
    cluster.edges[1].start(Role::Enforce).unwrap();
    wait_problem(&cluster, Role::Enforce, "edge-1", "another enforce calls itself edge-1");
    let told = || {
        let text = cluster.detects[0].verb(&["status"]).ok()?.stdout;
        text.contains("another enforce calls itself edge-1").then_some(())
    };
    wait_until("status tells it", CONVERGENCE, told).unwrap();
    cluster.stop().unwrap();
}

#[test]
fn a_state_that_is_gone_unbans_nobody() {
    let mut cluster = Cluster::start(&Layout { servers: 1, ..Layout::default() }).unwrap();
    cluster.write(0, &probes(client(7), 15, 0)).unwrap();
    cluster.detects[0].verb(&["ban", "2001:db8:7::/64"]).unwrap().expect(0).unwrap();
    let banned = ["2001:db8:7::/64", "203.0.113.7"];
    wait_banned(&cluster, &banned);
    for detect in &mut cluster.detects {
        detect.kill(Role::Detect).unwrap();
    }
    let mut nats = cluster.servers.client(&cluster.network).unwrap();
    nats.api("STREAM.DELETE.KV_portcullis_bans", &json!({})).unwrap();
    // Whoever starts now finds no bucket at all, and one knows only what its kernel holds. The third is running when there
    // is another bucket.
    for edge in &mut cluster.edges[..2] {
        edge.kill(Role::Enforce).unwrap();
    }
    cluster.edges[0].remove_last_set().unwrap();
    for edge in &mut cluster.edges[..2] {
        edge.start(Role::Enforce).unwrap();
    }
    for detect in &mut cluster.detects {
        detect.start(Role::Detect).unwrap();
    }
    let again = || nats.api("STREAM.INFO.KV_portcullis_bans", &json!({})).ok();
    wait_until("the bucket is made anew", CONVERGENCE, again).unwrap();
    for edge in ["edge-1", "edge-2", "edge-3"] {
        wait_problem(&cluster, Role::Enforce, edge, "deleted and made anew");
    }
    wait_banned(&cluster, &banned);
    assert_eq!(cluster.get(client(7), 1, "/ok"), None);
    cluster.end().unwrap();
}
