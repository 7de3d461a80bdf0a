//! Enforcement on a real kernel, in network namespaces of its own, with real packets, for both variants of iptables.
//!
//! The program runs itself again inside the namespaces. Where that is not possible it prints `SKIPPED: reason` and, with
//! `CI=true`, fails. Arguments choose scenarios by part of their name.

#![expect(clippy::print_stdout, clippy::unwrap_used, clippy::panic, reason = "a test with its own main")]

#[path = "netns/choice.rs"]
mod choice;
#[path = "netns/faults.rs"]
mod faults;
#[path = "netns/forwarded.rs"]
mod forwarded;
#[path = "netns/host.rs"]
mod host;
#[path = "netns/inside.rs"]
mod inside;
#[path = "netns/nftables.rs"]
mod nftables;

use std::env;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use serde_json::Value;

pub(crate) use host::{Host, Namespace, Part, hide, run, until, until_at_last};

/// Scenarios that run at the same time.
const AT_ONCE: usize = 3;

type Scenario = fn(&Host);

const SCENARIOS: [(&str, Scenario); 21] = [
    ("a_ban_cuts_new_and_open_connections_and_spares_others", cuts_connections),
    ("a_wider_ban_does_not_catch_guarded_addresses", guards),
    ("drift_is_repaired_and_foreign_rules_stay", repairs_drift),
    ("a_restart_takes_over_without_a_gap", takes_over),
    ("the_last_set_is_in_force_before_the_bus_answers", loads_last_set),
    ("a_chain_that_appears_is_picked_up", picks_up_docker),
    ("ports_and_spare_ports_are_kept_apart_after_address_translation", keeps_ports_apart),
    ("pause_lifts_every_ban_and_resume_restores_them", pauses),
    ("teardown_leaves_the_ruleset_as_it_was", tears_down),
    ("a_dry_run_changes_nothing", dry_runs),
    ("what_does_not_fit_is_the_shortest_remainder", leaves_out_the_shortest),
    ("what_a_host_lacks_is_said_and_the_process_goes_on", goes_on_without),
    ("rules_that_cannot_be_read_are_left_alone_and_so_is_the_other_variant", leaves_unreadable_alone),
    ("a_host_whose_rules_can_never_be_read_gets_nftables", gives_up_reading),
    ("sets_of_another_kind_are_named_and_left_alone", leaves_foreign_sets_alone),
    ("a_move_to_the_top_opens_no_gap_and_is_ended_before_we_stop", ends_a_move),
    ("a_burst_is_in_the_kernel_in_one_process_a_batch", takes_bursts),
    ("forwarded_clients_are_refused_and_their_neighbours_are_not", forwarded::refuses_exactly),
    ("what_forwarded_clients_can_and_cannot_be_found_by", forwarded::has_limits_that_are_known),
    ("rules_about_forwarded_clients_are_kept_lifted_and_removed", forwarded::keeps_rules),
    ("the_oldest_forwarded_clients_are_left_out_and_a_dry_run_changes_nothing", forwarded::leaves_out_the_oldest),
];

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    if args.first().is_some_and(|arg| arg == "--inside") {
        inside::main(&args[1..]);
        return ExitCode::SUCCESS;
    }
    if args.iter().any(|arg| arg == "--list") {
        SCENARIOS
            .iter()
            .chain(&choice::SCENARIOS)
            .chain(&nftables::SCENARIOS)
            .chain(&faults::OF_EVERY_BACK_END)
            .chain(&faults::OF_IPTABLES)
            .for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    if let Some(reason) = obstacle() {
        println!("SKIPPED: {reason}");
        return if env::var("CI").is_ok_and(|ci| ci == "true") { ExitCode::FAILURE } else { ExitCode::SUCCESS };
    }
    let filters: Vec<&String> = args.iter().filter(|arg| !arg.starts_with('-')).collect();
    let groups = [
        ("nft", &SCENARIOS[..]),
        ("legacy", &SCENARIOS),
        ("nft", &choice::SCENARIOS),
        ("nftables", &nftables::SCENARIOS),
        ("nft", &faults::OF_EVERY_BACK_END),
        ("nftables", &faults::OF_EVERY_BACK_END),
        ("nft", &faults::OF_IPTABLES),
        ("legacy", &faults::OF_IPTABLES),
    ];
    let all = groups.into_iter().flat_map(|(variant, scenarios)| {
        scenarios.iter().map(move |(name, scenario)| (variant, format!("{name} ({variant})"), *scenario))
    });
    let wanted = all.filter(|(_, full, _)| filters.is_empty() || filters.iter().any(|filter| full.contains(*filter)));
    let wanted: Mutex<Vec<(&str, String, Scenario)>> = Mutex::new(wanted.collect());
    let failed = AtomicUsize::new(0);
    // They mostly wait, each on hosts of its own.
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some((variant, full, scenario)) = next(&wanted) {
                    let passed = catch_unwind(AssertUnwindSafe(|| scenario(&Host::new(variant)))).is_ok();
                    println!("test {full} ... {}", if passed { "ok" } else { "FAILED" });
                    failed.fetch_add(usize::from(!passed), Ordering::Relaxed);
                }
            });
        }
    });
    if failed.into_inner() == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn next<T>(queue: &Mutex<Vec<T>>) -> Option<T> {
    queue.lock().unwrap().pop()
}

fn obstacle() -> Option<String> {
    for program in ["ip", "ipset", "nft", "iptables-nft", "iptables-legacy", "ip6tables-nft", "ip6tables-legacy"] {
        if Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_err() {
            return Some(format!("{program} is not installed"));
        }
    }
    let probe = format!("pc-probe-{}", std::process::id());
    if !Command::new("ip").args(["netns", "add", &probe]).stderr(Stdio::null()).status().unwrap().success() {
        return Some("network namespaces cannot be made here (not root?)".to_owned());
    }
    let args = ["netns", "exec", &probe, "ipset", "create", "probe", "hash:net", "timeout", "0"];
    let works = Command::new("ip").args(args).status().unwrap().success();
    Command::new("ip").args(["netns", "del", &probe]).status().unwrap();
    (!works).then(|| "the kernel has no ipset".to_owned())
}

fn cuts_connections(host: &Host) {
    let (_server, enforcer) = (host.server(), host.enforcer(&host.quick()));
    for (banned, other) in [("10.77.0.2", "10.77.0.3"), ("fd77::2", "fd77::3")] {
        let (bad, good) = (host.client(banned), host.client(other));
        assert!(bad.through("open") && good.through("open") && bad.through("ping"));
        enforcer.ask(&format!("ban {banned} 600"));
        until("the ban is in the kernel", || host.holds(banned));
        assert!(!bad.through("ping"), "an open connection of a banned client goes on");
        assert!(!bad.through("new 8080"), "a banned client gets in");
        assert!(good.through("ping") && good.through("new 8080"), "another client is cut off");
        let explained: Value = serde_json::from_str(&enforcer.ask(&format!("explain {banned}"))).unwrap();
        assert_eq!((&explained[0]["entry"], &explained[0]["state"]), (&banned.into(), &"held".into()), "{explained}");
        until("dropped packets are counted", || enforcer.report()["backends"][0]["dropped_packets"].as_u64() > Some(0));

        enforcer.ask(&format!("unban {banned}"));
        until("the ban is lifted", || !host.holds(banned));
        assert!(bad.through("new 8080"), "an unbanned client does not get in");
    }
    assert_eq!(enforcer.report()["problems"], Value::Array(Vec::new()));
    let names = host.run("cat /proc/net/ip_tables_names /proc/net/ip6_tables_names");
    assert_eq!(names.is_empty(), host.variant != "legacy", "legacy tables were woken: {names}");
}

fn guards(host: &Host) {
    let (_server, enforcer) = (host.server(), host.enforcer(&host.quick()));
    let (bad, good) = (host.client("10.77.0.2"), host.client("10.77.0.3"));
    enforcer.ask("never 10.77.0.3");
    enforcer.ask("ban 10.77.0.0/24,fd77::/64,10.77.0.3 600");
    until("the ban is in the kernel", || host.holds("10.77.0.2"));
    assert!(!bad.through("new 8080") && good.through("new 8080"));
    assert!(!host.client("fd77::2").through("new 8080"));
    let backend = enforcer.report()["backends"][0].clone();
    assert_eq!(backend["guarded"], 1, "{backend}");
    let explained = enforcer.ask("explain 10.77.0.3");
    assert!(explained.contains("let through although 10.77.0.0/24 is banned: in never_ban"), "{explained}");

    enforcer.ask("never 10.77.0.0/24");
    until("a ban that has become guarded goes", || !host.holds("10.77.0.2"));
    assert!(bad.through("new 8080"));
}

fn repairs_drift(host: &Host) {
    let (_server, enforcer) = (host.server(), host.enforcer(&host.quick()));
    let bad = host.client("10.77.0.2");
    enforcer.ask("ban 10.77.0.2,10.77.0.9 600");
    until("the bans are in the kernel", || host.holds("10.77.0.2") && host.holds("10.77.0.9"));
    host.iptables("4", "-A INPUT -s 198.18.0.2 -j ACCEPT");
    let foreign = host.foreign();
    let placed = host.rules();

    host.iptables("4", "-t raw -F PORTCULLIS");
    until("our chain is filled again", || host.rules() == placed);
    host.iptables("4", "-t raw -D PREROUTING -j PORTCULLIS");
    until("the jump is back", || host.rules() == placed);
    host.iptables("4", "-t raw -I PORTCULLIS 1 -j ACCEPT");
    until("a rule in our chain that is not ours is gone", || host.rules() == placed);
    host.run("ipset del portcullis-v4 10.77.0.2");
    until("a lost member is back", || host.holds("10.77.0.2"));
    host.run("ipset flush portcullis-guard-v4");
    until("the guard is back", || host.try_run("ipset -q test portcullis-guard-v4 10.77.0.1").is_some());
    host.run("ipset add portcullis-v4 10.77.0.3");
    until("a member that nobody banned is gone", || !host.holds("10.77.0.3"));
    assert_eq!(host.foreign(), foreign);

    host.iptables("4", "-t raw -I PREROUTING 1 -s 10.77.0.2 -j ACCEPT");
    until("we move above a rule that accepts", || {
        let rules = host.iptables("4", "-t raw -S PREROUTING");
        rules.lines().nth(1) == Some("-A PREROUTING -j PORTCULLIS")
    });
    assert!(!bad.through("new 8080"));
    assert_eq!(host.foreign().len(), foreign.len() + 1);
    until("repairs are counted", || enforcer.report()["backends"][0]["repairs"].as_u64() >= Some(7));
}

fn takes_over(host: &Host) {
    let (_server, enforcer) = (host.server(), host.enforcer(&host.quick()));
    enforcer.ask("ban 10.77.0.2,10.77.0.9 600");
    until("the bans are in the kernel", || host.holds("10.77.0.2") && host.holds("10.77.0.9"));
    enforcer.stop();
    assert!(!host.client("10.77.0.2").through("new 8080"), "bans end with the enforcer");

    // A second more than wanted is near enough; a minute is not.
    let (near, far) = (host.timeout("10.77.0.2").unwrap() + 1, host.timeout("10.77.0.9").unwrap() + 60);
    host.run(&format!("ipset -exist add portcullis-v4 10.77.0.2 timeout {near} comment forceful-browsing"));
    host.run(&format!("ipset -exist add portcullis-v4 10.77.0.9 timeout {far} comment forceful-browsing"));
    let wider = r#"{"firewall":{"resync_interval":"1s","bans_max":1000}}"#;
    let config = if host.variant == "nft" { &host.quick() } else { wider };
    let args = ["enforcer", config, host.state.path().to_str().unwrap(), "for-real"];
    let enforcer = Part::new(&host.name, &args);
    until("a timeout that is off is corrected", || host.timeout("10.77.0.9").is_some_and(|left| left <= 600));
    assert!(host.holds("10.77.0.2"));
    if host.variant == "nft" {
        assert_eq!(enforcer.metric("portcullis_enforce_steps_total{kind=\"add\"}"), Some(1.0), "one member was off");
        assert_eq!(enforcer.metric("portcullis_enforce_steps_total{kind=\"delete\"}"), None);
        assert!(host.timeout("10.77.0.2").is_some_and(|left| left > 590));
    } else {
        assert!(host.run("ipset list -t portcullis-v4").contains("maxelem 5096"), "the set has its new size");
        assert!(host.try_run("ipset -q list -t portcullis-new-v4").is_none(), "no set is left over");
    }
    // The bus answers with another set: only now may members go.
    enforcer.ask("ban 10.77.0.3 600");
    until("the new set is in force", || host.holds("10.77.0.3") && !host.holds("10.77.0.2"));
}

fn loads_last_set(host: &Host) {
    let _server = host.server();
    let enforcer = host.enforcer(&host.quick());
    enforcer.ask("never 10.77.0.3");
    enforcer.ask("ban 10.77.0.0/24 600");
    until("the ban is in the kernel", || host.holds("10.77.0.2"));
    enforcer.stop();
    // A reboot: nothing is left in the kernel.
    host.run(&format!("{} --inside teardown {}", env::current_exe().unwrap().display(), host.quick()));
    assert!(!host.holds("10.77.0.2"));
    let args = ["enforcer", &host.quick(), host.state.path().to_str().unwrap(), "for-real"];
    let _enforcer = Part::new(&host.name, &args);
    until("the last set is in force", || {
        let rules = if host.variant == "nftables" { nftables::rules(host) } else { host.rules().concat() };
        rules.contains("goto banned") || rules.contains("-j PORTCULLIS")
    });
    assert!(!host.client("10.77.0.2").through("new 8080"));
    assert!(host.client("10.77.0.3").through("new 8080"), "the last lists are in force as well");
}

fn picks_up_docker(host: &Host) {
    let config = r#"{"firewall":{"resync_interval":"1s","chains":["INPUT","DOCKER-USER"]}}"#;
    let (_server, enforcer) = (host.server(), host.enforcer(config));
    let missing = enforcer.report()["problems"].to_string();
    assert!(missing.contains("chain DOCKER-USER does not exist"), "{missing}");
    let bad = host.client("10.77.0.2");
    assert!(bad.through("open"));
    enforcer.ask("ban 10.77.0.2 600");
    until("the ban is in the kernel", || host.holds("10.77.0.2"));
    assert!(!bad.through("new 8080") && !bad.through("ping"), "INPUT alone cuts clients of the host");
    for family in ["4", "6"] {
        host.iptables(family, "-N DOCKER-USER");
        host.iptables(family, "-A DOCKER-USER -j RETURN");
    }
    until("DOCKER-USER jumps to us", || {
        let jumps = host.rules().into_iter().filter(|rule| rule == "-A DOCKER-USER -j PORTCULLIS");
        jumps.count() == 2
    });
    until("nothing is missing any more", || enforcer.report()["problems"] == Value::Array(Vec::new()));
}

fn keeps_ports_apart(host: &Host) {
    let config =
        r#"{"firewall":{"resync_interval":"1s","chains":["INPUT"],"ports":["tcp/80"],"spare_ports":["tcp/8443"]}}"#;
    host.iptables("4", "-t nat -A PREROUTING -p tcp --dport 80 -j REDIRECT --to-ports 8080");
    let (_server, enforcer) = (host.server(), host.enforcer(config));
    enforcer.ask("ban 10.77.0.2 600");
    until("the ban is in the kernel", || host.holds("10.77.0.2"));
    let bad = host.client("10.77.0.2");
    assert!(!bad.through("new 80"), "the port that the client asked for counts");
    assert!(bad.through("new 8080") && bad.through("new 8443"), "other ports are spared");
    assert!(host.client("10.77.0.3").through("new 80"));
    assert_eq!(enforcer.report()["problems"], Value::Array(Vec::new()), "rules are shown as they were placed");
}

fn pauses(host: &Host) {
    let (_server, enforcer) = (host.server(), host.enforcer(&host.quick()));
    enforcer.ask("ban 10.77.0.2,fd77::2 600");
    until("the bans are in the kernel", || host.holds("10.77.0.2") && host.holds("fd77::2"));
    enforcer.ask("pause on");
    until("every ban is lifted", || !host.holds("10.77.0.2") && !host.holds("fd77::2"));
    assert!(host.client("10.77.0.2").through("new 8080"));
    enforcer.ask("ban 10.77.0.3 600");
    enforcer.ask("pause off");
    until("they are back", || ["10.77.0.2", "10.77.0.3", "fd77::2"].iter().all(|address| host.holds(address)));
}

fn tears_down(host: &Host) {
    host.iptables("4", "-t raw -A PREROUTING -s 198.18.0.7 -j DROP");
    let before = host.rules();
    let enforcer = host.enforcer(&host.quick());
    enforcer.ask("ban 10.77.0.2,fd77::2 600");
    until("the bans are in the kernel", || host.holds("10.77.0.2") && host.holds("fd77::2"));
    enforcer.stop();
    assert_ne!(host.rules(), before);
    let removed = host.run(&format!("{} --inside teardown {}", env::current_exe().unwrap().display(), host.quick()));
    assert!(removed.contains("portcullis-guard-v6"), "{removed}");
    assert_eq!(host.rules(), before);
    let saved = ["iptables", "ip6tables"].map(|name| host.run(&format!("{name}-{}-save", host.variant))).concat();
    assert!(!saved.contains("PORTCULLIS"), "{saved}");
    assert!(host.run("ipset list -n").trim().is_empty());
}

fn dry_runs(host: &Host) {
    let before = host.rules();
    let args = ["enforcer", &host.quick(), host.state.path().to_str().unwrap(), "dry-run"];
    let enforcer = Part::new(&host.name, &args);
    enforcer.ask("ban 10.77.0.2 600");
    until("the ban would be held", || enforcer.report()["backends"][0]["members"] == 1);
    assert_eq!(enforcer.report()["backends"][0]["name"], "dry-run");
    assert_eq!(host.rules(), before);
    assert!(host.run("ipset list -n").trim().is_empty());
    enforcer.stop();
    assert_eq!(host.state.path().read_dir().unwrap().count(), 0, "state was written");
}

fn leaves_out_the_shortest(host: &Host) {
    let enforcer = host.enforcer(&host.config(r#"{"bans_max":3}"#));
    // Longer bans stay, the shortest is left out, and that is said.
    for (n, seconds) in [(2, 300), (3, 100), (4, 200), (5, 400)] {
        enforcer.ask(&format!("ban 10.77.9.{n} {seconds}"));
    }
    until("the longest are in the kernel", || [2, 4, 5].iter().all(|n| host.holds(&format!("10.77.9.{n}"))));
    until("the shortest is not", || !host.holds("10.77.9.3"));
    until("and that is said", || enforcer.report()["problems"].to_string().contains("bans_max is 3"));
    enforcer.ask("unban 10.77.9.5");
    until("it comes in when there is room", || host.holds("10.77.9.3"));
}

fn takes_bursts(host: &Host) {
    let enforcer = host.enforcer(&host.quick());
    for n in 0..40 {
        enforcer.ask(&format!("ban 10.78.0.{n} 600"));
        let count = f64::from(n + 1);
        let done = || enforcer.metric("portcullis_log_to_kernel_seconds_count") >= Some(count);
        until("the ban is in the kernel", done);
    }
    let burst: Vec<String> = (0..500).map(|n| format!("10.79.{}.{}", n / 250, n % 250)).collect();
    enforcer.ask(&format!("ban {} 600", burst.join(",")));
    until("the burst is in the kernel", || host.holds(&burst[499]));
    assert!(burst.iter().step_by(50).all(|address| host.holds(address)));
    let sum = enforcer.metric("portcullis_log_to_kernel_seconds_sum").unwrap();
    println!("  41 batches, 540 bans: {:.1} ms a batch on average", sum * 1000.0 / 41.0);
}

fn leaves_unreadable_alone(host: &Host) {
    let dir = tempfile::tempdir().unwrap();
    let broken = dir.path().join("broken");
    let calls = || fs::read_to_string(dir.path().join("calls")).unwrap_or_default().len();
    let fail = "if [ -e broken ]; then echo no answer >&2; exit 1; fi";
    let shell = host.stand_in(dir.path(), "save", fail);
    fs::write(&broken, "").unwrap();
    let args = ["enforcer", &host.quick(), host.state.path().to_str().unwrap(), "for-real"];
    let enforcer = Part::after(&shell, &host.name, &args);
    let before = host.rules();
    let other_is_untouched = || {
        if host.variant == "nft" {
            host.run("cat /proc/net/ip_tables_names /proc/net/ip6_tables_names").is_empty()
        } else {
            !["iptables", "ip6tables"].map(|name| host.run(&format!("{name}-nft-save"))).concat().contains("PORTCULLIS")
        }
    };
    enforcer.ask("ban 10.77.0.2 600");
    until("what cannot be read is said", || enforcer.report()["problems"].to_string().contains("no answer"));
    until("it was looked at several times", || calls() >= 6);
    assert!(other_is_untouched(), "the other variant was taken");
    assert_eq!(host.rules(), before);
    let explained = || serde_json::from_str::<Value>(&enforcer.ask("explain 10.77.0.2")).unwrap()[0].clone();
    assert_eq!(explained()["state"], "idle", "no rule was ever placed");

    fs::remove_file(&broken).unwrap();
    until("nothing is missing any more", || enforcer.report()["problems"] == Value::Array(Vec::new()));
    let placed = host.rules();
    assert!(placed.iter().any(|rule| rule == "-A PREROUTING -j PORTCULLIS"), "{placed:?}");
    fs::write(&broken, "").unwrap();
    let sofar = calls();
    until("it was looked at several times", || calls() >= sofar + 6);
    assert!(other_is_untouched(), "the other variant was taken");
    assert_eq!(host.rules(), placed);
    let hold = explained();
    assert!(hold["state"] == "held" && hold["detail"].to_string().contains("raw/PREROUTING"), "{hold}");
}

fn gives_up_reading(host: &Host) {
    if host.variant != "nft" {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let shell = host.stand_in(dir.path(), "save", "echo no answer >&2; exit 1");
    let args = ["enforcer", &host.quick(), host.state.path().to_str().unwrap(), "for-real"];
    let enforcer = Part::after(&shell, &host.name, &args);
    enforcer.ask("ban 10.77.0.2 600");
    until_at_last("nftables took over", || nftables::holds(host, "10.77.0.2"));
    let detail = enforcer.report()["backends"][0]["detail"].to_string();
    assert!(detail.contains("nftables, because iptables with ipset does not work here"), "{detail}");
    assert!(host.run("cat /proc/net/ip_tables_names").is_empty(), "the kernel has nf_tables, and legacy was woken");
}

fn leaves_foreign_sets_alone(host: &Host) {
    host.run("ipset create portcullis-guard-v4 hash:net timeout 600");
    host.run("ipset create portcullis-v4 hash:ip");
    let enforcer = host.enforcer(&host.quick());
    enforcer.ask("ban 10.77.0.2,fd77::2 600");
    until("the other family is enforced", || host.holds("fd77::2"));
    // What the kernel holds is counted a moment later.
    until("that is known", || enforcer.report()["backends"][0]["members"] == 1);
    let steps = || {
        ["add", "create", "swap"]
            .map(|kind| enforcer.metric(&format!("portcullis_enforce_steps_total{{kind=\"{kind}\"}}")))
    };
    let before = steps();
    for name in ["set portcullis-guard-v4", "set portcullis-v4"] {
        until("the set is named", || enforcer.report()["problems"].to_string().contains(name));
    }
    // A repair in the other family shows that a resync is over.
    for n in 1..=2 {
        let repairs = enforcer.report()["backends"][0]["repairs"].as_u64().unwrap();
        host.run("ipset add portcullis-v6 fd77::9");
        until("a resync is over", || enforcer.report()["backends"][0]["repairs"].as_u64() > Some(repairs));
        assert_eq!(steps(), before, "it is filled again at resync {n}");
    }
    assert!(host.run("ipset list -t portcullis-v4").contains("hash:ip"));
    assert!(host.try_run("ipset -q list -t portcullis-new-v4").is_none(), "a set is left over");
}

fn ends_a_move(host: &Host) {
    let dir = tempfile::tempdir().unwrap();
    let shell = host.stand_in(dir.path(), "restore", "sleep 1");
    let enforcer = host.enforcer_after(&shell, &host.quick());
    let calls = || fs::read_to_string(dir.path().join("calls")).unwrap_or_default().len();
    let before = calls();
    host.iptables("4", "-t raw -I PREROUTING 1 -s 10.77.0.2 -j ACCEPT");
    until("the move begins", || calls() > before);
    let rules = || host.iptables("4", "-t raw -S PREROUTING");
    assert!(rules().contains("-A PREROUTING -j PORTCULLIS"), "there is a gap: {}", rules());
    enforcer.stop();
    assert_eq!(rules().lines().nth(1), Some("-A PREROUTING -j PORTCULLIS"), "the move was not ended: {}", rules());
}

fn goes_on_without(host: &Host) {
    let before = host.rules();
    let no_right = r#"exec setpriv --bounding-set=-net_admin --inh-caps=-all "$0" "$@""#;
    for (shell, said) in [
        (hide("$(readlink -f $(command -v iptables-nft) $(command -v iptables-legacy))"), "iptables is not installed"),
        (no_right.to_owned(), "run as root or with CAP_NET_ADMIN"),
    ] {
        let config = host.config(r#"{"backend":"iptables"}"#);
        let args = ["enforcer", &config, host.state.path().to_str().unwrap(), "for-real"];
        let enforcer = Part::after(&shell, &host.name, &args);
        enforcer.ask("ban 10.77.0.2 600");
        until("what is missing is said", || enforcer.report()["problems"].to_string().contains(said));
        until("the ban set is followed all the same", || enforcer.report()["backends"][0]["desired"] == 1);
        enforcer.stop();
        assert_eq!(host.rules(), before);
    }
}
