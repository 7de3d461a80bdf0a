//! Bans that do not bite are told of, and the ways to lift bans on one host.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::process::Command;

use serde_json::Value;
use tests::portcullis::{Service, binary, wait_for};
use tests::process::Process;

use super::{Variant, World, only_ban};

/// Rules of the firewall are not looked at again while the test lasts.
const NO_REPAIR: &str = "[enforce.firewall]\nresync_interval = \"1h\"\nfull_check_interval = \"1h\"\n";
const METRICS: &str = "[telemetry]\nlisten = \"127.0.0.1:9478\"\n[detect.leaks]\ngrace_firewall = \"0s\"\n";

/// `status --json`, whatever it says.
fn status(service: &Service) -> Option<Value> {
    service.verb(&["status", "--json"]).ok()?.json().ok()?.pop()
}

/// Fails when a banned client has passed.
pub(super) fn none_leaked(service: &Service) {
    let status = status(service).unwrap();
    let leaks = status["nodes"].as_array().unwrap().iter().find_map(|node| node.pointer("/detect/leaks"));
    assert_eq!(leaks, Some(&0.into()), "{status}");
}

fn metrics(world: &World) -> String {
    let ask = || {
        let mut stream = TcpStream::connect("127.0.0.1:9478")?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    };
    world.server.within(ask).unwrap()
}

/// All that `tail` tells from now on.
fn tail(world: &World) -> Process {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", world.server.name()]).arg(binary().unwrap());
    command.args(["tail", "--json", "--socket"]).arg(world.folder.path().join("api.sock"));
    Process::start("tail", &mut command, &world.folder.path().join("tail.log")).unwrap()
}

#[test]
fn a_banned_client_that_gets_through_raises_one_alarm_that_says_where_and_why() {
    let world = World::new(Variant::Nft, NO_REPAIR);
    std::fs::create_dir(world.folder.path().join("conf.d")).unwrap();
    std::fs::write(world.folder.path().join("conf.d/metrics.toml"), METRICS).unwrap();
    let service = world.start();
    let tail = tail(&world);
    world.attack_times(true, 15);
    world.wait_cut_off(true);
    let alarms = || -> Vec<String> {
        let told = tail.output_text();
        let events = told.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let leaks = events.filter(|event| event["subject"] == "ban-leak");
        leaks.map(|event| event["data"]["text"].as_str().unwrap().to_owned()).collect()
    };
    // The report in which the firewall confirms the ban comes within seconds, and that is when it counts. By then, tail
    // listens as well.
    let seen =
        |status: &Value| Some(status["nodes"].as_array()?.iter().find(|node| node["role"] == "enforce")?.clone());
    let first = seen(&status(&service).unwrap()).unwrap()["at"].clone();
    let mut reports = std::collections::BTreeSet::from([first.to_string()]);
    wait_for("reports that know of the ban", || {
        reports.insert(seen(&status(&service)?)?["at"].to_string());
        (reports.len() > 4).then_some(())
    })
    .unwrap();
    none_leaked(&service);

    // Somebody takes the jump away, and the kernel's set bans nobody.
    world.server.run("iptables-nft", &["-t", "raw", "-D", "PREROUTING", "-j", "PORTCULLIS"]).unwrap();
    for _ in 0..3 {
        assert_eq!(world.attack(true, "/ok"), Some(200));
    }
    wait_for("an alarm", || (!alarms().is_empty()).then_some(())).unwrap();
    assert_eq!(world.attack(true, "/ok"), Some(200));
    let counted = || metrics(&world).contains("portcullis_ban_leaks_total{node=\"edge\",backend=\"firewall\"} 4");
    wait_for("all four are counted", || counted().then_some(())).unwrap();
    let text = alarms().pop().unwrap();
    for part in [
        "203.0.113.2 is banned (forceful-browsing)",
        "reached edge: shop.example.net/ok",
        "portcullis-v4",
        "The firewall of edge could have seen it: look for a way around",
        "Asked now: iptables on edge: in set",
    ] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    assert_eq!(alarms().len(), 1, "a client is told of once a minute");
    let health = service.verb(&["status"]).unwrap().expect(1).unwrap();
    assert!(health.stdout.contains("degraded: detect on edge: 203.0.113.2 is banned"), "{}", health.stdout);
    world.server.run("iptables-nft", &["-t", "raw", "-I", "PREROUTING", "-j", "PORTCULLIS"]).unwrap();
    assert_eq!(world.attack(true, "/ok"), None);
    service.stop().unwrap();
}

#[test]
fn a_file_pauses_one_host_a_teardown_needs_no_stop_and_a_reloaded_never_ban_frees_at_once() {
    let world = World::new(Variant::Nft, "[enforce.firewall]\nresync_interval = \"1s\"\n");
    world.firewall();
    for v4 in [true, false] {
        world
            .server
            .run(Variant::Nft.command(v4), &["-t", "raw", "-A", "PREROUTING", "-i", "none", "-j", "ACCEPT"])
            .unwrap();
    }
    let before = world.firewall();
    let service = world.start();
    world.attack_times(true, 15);
    world.wait_cut_off(true);
    let file = world.folder.path().join("state/paused");
    std::fs::write(&file, "on call: false alarm\n").unwrap();
    world.wait_free(true);
    let told =
        || service.verb(&["status"]).ok().filter(|answer| answer.stdout.contains("on call: false alarm")).map(drop);
    wait_for("status says why", told).unwrap();
    let explained = service.verb(&["explain", "203.0.113.2"]).unwrap().stdout;
    assert!(explained.contains("paused by the file"), "{explained}");
    std::fs::remove_file(&file).unwrap();
    world.wait_cut_off(true);

    let config = world.folder.path().join("portcullis.toml");
    let binary = binary().unwrap().display().to_string();
    let teardown = ["enforce", "--teardown", "-c", config.to_str().unwrap()];
    let running = world.firewall();
    let told = world.server.run(&binary, &[&teardown[..], &["--dry-run"]].concat()).unwrap();
    for part in [
        &*format!("would pause the enforce that runs on this host, by the file {}", file.display()),
        "would remove the jump from raw/PREROUTING (ipv6, nft)",
        "would remove chain raw/PORTCULLIS with 3 rules (ipv4, nft)",
        "would remove set portcullis-v4 with 1 members",
    ] {
        assert!(told.contains(part), "{part} is not in {told}");
    }
    assert!(world.firewall() == running && !file.exists(), "a dry run changed something");
    let answer = world.server.run(&binary, &teardown).unwrap();
    assert!(answer.contains("to enforce again: rm ") && file.exists(), "{answer}");
    assert_eq!(world.firewall(), before);
    assert_eq!(world.attack(true, "/ok"), Some(200));
    // Ticks and looks at the host pass, and it puts nothing back.
    let beat = || {
        status(&service)?["nodes"].as_array()?.iter().find(|node| node["role"] == "enforce")?["at"]
            .as_str()
            .map(str::to_owned)
    };
    let mut beats = std::collections::BTreeSet::new();
    wait_for("the role goes on", || {
        beats.insert(beat()?);
        (beats.len() > 3).then_some(())
    })
    .unwrap();
    assert_eq!(world.firewall(), before);
    std::fs::remove_file(&file).unwrap();
    world.wait_cut_off(true);
    none_leaked(&service);

    // One that starts paused lifts what it finds, and puts it back in the end.
    service.stop().unwrap();
    assert_eq!(world.attack(true, "/ok"), None);
    std::fs::write(&file, "").unwrap();
    let service = world.start();
    world.wait_free(true);
    std::fs::remove_file(&file).unwrap();
    world.wait_cut_off(true);

    only_ban(&service, true);
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, format!("{text}[detect]\nnever_ban = [\"203.0.113.2\"]\n")).unwrap();
    service.signal("HUP").unwrap();
    world.wait_free(true);
    assert_eq!(service.bans().unwrap(), [] as [Value; 0]);
    service.stop().unwrap();
}
