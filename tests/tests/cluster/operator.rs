//! The verbs of an operator reach the whole cluster through the socket of any detect.

use std::collections::BTreeMap;

use proto::report::Role;
use proto::time::Clock;
use serde_json::Value;
use tests::cluster::host::Host;
use tests::cluster::network::client;
use tests::cluster::{CONVERGENCE, Cluster, Layout};
use tests::portcullis::{wait_for, wait_until};

use super::{burst, probes, wait_banned, wait_counted};

/// What is tested does not depend on how many servers there are.
fn layout() -> Layout {
    Layout { servers: 1, ..Layout::default() }
}

#[test]
fn an_operator_bans_and_unbans_on_every_host_through_either_detect() {
    let cluster = Cluster::start(&layout()).unwrap();
    let tail = cluster.detects[0].start_verb(&["tail", "--json"]).unwrap();
    let mut told = Vec::new();
    for detect in &cluster.detects {
        detect.verb(&["ban", "203.0.113.0/28", "--for", "1h", "--reason", "a test"]).unwrap().expect(0).unwrap();
        wait_banned(&cluster, &["203.0.113.0/28"]);
        for node in 0..3 {
            assert_eq!(cluster.get(client(7), node, "/ok"), None, "banned on node {node}");
            assert_eq!(cluster.get(client(20), node, "/ok"), Some(200), "not meant on node {node}");
        }
        for other in &cluster.detects {
            let bans = || other.verb(&["bans", "--json"]).ok()?.json().ok().filter(|bans| bans.len() == 1);
            let bans = wait_for("every detect lists it", bans).unwrap();
            assert_eq!((&bans[0]["rule"], &bans[0]["reason"]), (&"operator".into(), &"a test".into()));
        }
        // A wider ban stays when an address of it is unbanned, and is named.
        let answer = detect.verb(&["unban", "203.0.113.7"]).unwrap().expect(1).unwrap();
        assert!((answer.stdout + &answer.stderr).contains("203.0.113.0/28"));
        detect.verb(&["unban", "203.0.113.0/28"]).unwrap().expect(0).unwrap();
        wait_banned(&cluster, &[]);
        assert_eq!(cluster.get(client(7), 0, "/ok"), Some(200));
        told.extend(["io.portcullis.ban.v1", "io.portcullis.unban.v1"]);
    }
    let types = || -> Vec<String> {
        let events = tail.output_text();
        let events = events.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let types = events.filter_map(|event| Some(event["type"].as_str()?.to_owned()));
        // A cluster that has just started may have something to say of itself.
        types.filter(|kind| kind != "io.portcullis.alarm.v1").collect()
    };
    wait_for("tail tells each of them", || (types() == told).then_some(())).unwrap();
    cluster.stop().unwrap();
}

#[test]
fn pause_and_allow_hold_on_every_host() {
    let cluster = Cluster::start(&layout()).unwrap();
    let verb = |words: &[&str]| cluster.detects[1].verb(words).unwrap().expect(0).unwrap();
    cluster.write(0, &probes(client(7), 15, 0)).unwrap();
    wait_banned(&cluster, &["203.0.113.7"]);
    let timed = |words: &[&str], banned: &[&str]| {
        let begun = Clock::system().now();
        verb(words);
        wait_banned(&cluster, banned);
        println!("{words:?} is in force on all hosts after {:?}", Clock::system().now().since(begun));
    };
    timed(&["pause", "--for", "1h"], &[]);
    assert_eq!(cluster.get(client(7), 2, "/ok"), Some(200));
    timed(&["resume"], &["203.0.113.7"]);
    verb(&["allow", "203.0.113.7"]);
    wait_banned(&cluster, &[]);
    // What began before the end of the pause counts for nothing, so all begins anew. The next client is banned after all
    // lines of the allowed one were counted for nothing.
    cluster.write(1, &burst(client(7), 20)).unwrap();
    cluster.write(1, &burst(client(8), 15)).unwrap();
    wait_banned(&cluster, &["203.0.113.8"]);
    assert_eq!(cluster.get(client(7), 1, "/ok"), Some(200), "never banned from now on");
    cluster.stop().unwrap();
}

/// One host whose rules somebody removed. They are not looked at again while the test lasts.
#[test]
fn a_ban_that_does_not_bite_on_one_host_raises_an_alarm_that_names_it() {
    let config = "[enforce.firewall]\nresync_interval = \"1h\"\nfull_check_interval = \"1h\"\n\
                  [detect.leaks]\ngrace_firewall = \"0s\"\n";
    let cluster = Cluster::start(&Layout { nodes: 2, detects: 1, servers: 1, config, ..Layout::default() }).unwrap();
    cluster.verb(&["ban", "203.0.113.7", "--for", "1h"]).unwrap().expect(0).unwrap();
    wait_banned(&cluster, &["203.0.113.7"]);
    let drop_jump = ["-t", "raw", "-D", "PREROUTING", "-j", "PORTCULLIS"];
    cluster.edges[1].namespace().run("iptables-nft", &drop_jump).unwrap();
    let leak = || {
        assert_eq!(cluster.get(client(7), 1, "/ok"), Some(200));
        cluster.events().ok()?.into_iter().find(|event| event["subject"] == "ban-leak")
    };
    let leak = wait_until("an alarm", CONVERGENCE, leak).unwrap();
    let text = leak["data"]["text"].as_str().unwrap();
    assert!(text.contains("reached edge-2: shop.example.net/ok") && text.contains("portcullis-v4"), "{text}");
    assert_eq!(cluster.get(client(7), 0, "/ok"), None, "edge-1 bans it");
    assert_eq!(cluster.errors().unwrap(), [] as [String; 0]);
}

/// What spares somebody reaches every host at once, and a host that is cut off when it comes back.
#[test]
fn whom_nobody_may_ban_any_more_is_freed_everywhere_also_on_a_host_that_was_cut_off() {
    let cluster = Cluster::start(&layout()).unwrap();
    for address in ["203.0.113.7", "203.0.113.8"] {
        cluster.verb(&["ban", address, "--for", "1h"]).unwrap().expect(0).unwrap();
    }
    wait_banned(&cluster, &["203.0.113.7", "203.0.113.8"]);
    let edge = &cluster.edges[2];
    cluster.network.cut(edge.name()).unwrap();
    cluster.verb(&["allow", "203.0.113.7"]).unwrap().expect(0).unwrap();
    for detect in &cluster.detects {
        detect.amend("[detect]\nnever_ban = [\"203.0.113.8\"]\n").unwrap();
        detect.signal(Role::Detect, "HUP").unwrap();
    }
    let free = |host: &Host| host.banned().ok().filter(BTreeMap::is_empty).map(drop);
    for other in &cluster.edges[..2] {
        wait_for("both are free where the order arrives", || free(other)).unwrap();
    }
    assert_eq!(edge.banned().unwrap().len(), 2, "nobody is freed by silence");
    cluster.network.heal(edge.name(), edge.namespace()).unwrap();
    wait_until("both are free on the host that is back", CONVERGENCE, || free(edge)).unwrap();
    let guarded = || {
        let guards = edge.namespace().run("ipset", &["save", "portcullis-guard-v4"]).ok()?;
        ["203.0.113.7", "203.0.113.8"].iter().all(|address| guards.contains(address)).then_some(())
    };
    wait_until("its firewall lets both pass", CONVERGENCE, guarded).unwrap();
    cluster.stop().unwrap();
}

#[test]
fn explain_tells_what_each_host_holds() {
    let cluster = Cluster::start(&layout()).unwrap();
    cluster.write(0, &probes(client(7), 14, 0)).unwrap();
    wait_counted(&cluster, client(7), 14);
    cluster.write(2, &probes(client(7), 1, 0)).unwrap();
    wait_banned(&cluster, &["203.0.113.7"]);
    for detect in &cluster.detects {
        // A host that is busy does not answer in time.
        let all_hold = || {
            let answer = detect.verb(&["explain", "203.0.113.7", "--json"]).ok()?.json().ok()?.pop()?;
            assert_eq!(answer["bans"][0]["rule"], "forceful-browsing");
            let holds = answer["backends"].as_array()?.iter();
            let holds = holds.filter(|hold| hold["state"] == "held" && hold["until"].is_string());
            let mut held: Vec<_> =
                holds.filter_map(|hold| Some((hold["node"].as_str()?, hold["entry"].as_str()?))).collect();
            held.sort_unstable();
            (held == ["edge-1", "edge-2", "edge-3"].map(|node| (node, "203.0.113.7"))).then_some(())
        };
        wait_until("every host says that it holds the ban, until when", CONVERGENCE, all_hold).unwrap();
    }
    cluster.stop().unwrap();
}

#[test]
fn status_knows_every_role_and_says_when_one_is_gone() {
    let mut cluster = Cluster::start(&layout()).unwrap();
    let well = || cluster.detects[0].verb(&["status"]).ok().filter(|answer| answer.code == 0).map(drop);
    wait_for("status is well", well).unwrap();
    cluster.edges[1].kill(Role::Enforce).unwrap();
    let finding = || {
        let answer = cluster.detects[1].verb(&["status", "--json"]).ok()?;
        let health = answer.json().ok()?.pop()?;
        let problems = health["problems"].as_array()?;
        let gone = problems.iter().any(|problem| problem["node"] == "edge-2" && problem["role"] == "enforce");
        (gone && answer.code == 1).then_some(())
    };
    wait_for("the silence of a host is seen", finding).unwrap();
    cluster.edges[1].start(Role::Enforce).unwrap();
    wait_for("status is well again", || {
        cluster.detects[0].verb(&["status"]).ok().filter(|answer| answer.code == 0).map(drop)
    })
    .unwrap();
    cluster.stop().unwrap();
}
