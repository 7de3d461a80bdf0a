//! The choice between back ends, plain rules, and what a former back end leaves.

use std::cell::Cell;
use std::env;
use std::fs::File;
use std::path::Path;

use super::{Host, Part, Scenario, hide, nftables, until, until_at_last};

pub(super) const SCENARIOS: [(&str, Scenario); 12] = [
    ("another_back_end_takes_over_without_a_gap_and_clears_the_former", changes_over),
    ("legacy_takes_rules_that_nft_refuses", falls_back_to_legacy),
    ("without_ipset_bans_are_rules_that_end_by_themselves", bans_by_rules),
    ("a_back_end_that_breaks_for_good_is_replaced", replaces_broken),
    ("a_pause_from_the_start_lifts_what_stands_in_any_form", lifts_at_start),
    ("a_former_back_end_that_has_to_stay_is_told_and_goes_as_soon_as_it_can", tells_of_former),
    ("a_lock_that_is_held_does_not_change_the_back_end", waits_for_lock),
    ("a_lock_that_is_held_for_ever_does", does_without_lock),
    ("an_ipset_that_hangs_holds_up_nothing_and_nftables_takes_over", does_without_hanging_ipset),
    ("an_ipset_that_begins_to_hang_holds_up_neither_reports_nor_pauses", does_without_ipset_for_a_while),
    ("an_ipset_that_begins_to_hang_is_replaced_also_while_bans_come", replaces_hanging_ipset),
    ("bans_and_pauses_do_not_wait_for_a_search_for_something_better", searches_aside),
];

fn enforcer(host: &Host, shell: &str, keys: &str) -> Part {
    let args = ["enforcer", &host.config(keys), host.state.path().to_str().unwrap(), "for-real"];
    let part = Part::after(shell, &host.name, &args);
    part.ask("ban 10.77.0.2,fd77::2 600");
    part
}

fn rules_of_iptables(host: &Host) -> bool {
    host.rules().iter().any(|rule| rule.contains("PORTCULLIS"))
}

fn detail(part: &Part) -> String {
    part.report()["backends"][0]["detail"].to_string()
}

fn changes_over(host: &Host) {
    let _server = host.server();
    let bad = host.client("10.77.0.2");
    let in_ipset = || host.try_run("ipset -q test portcullis-v4 10.77.0.2").is_some();
    let in_nftables = || nftables::holds(host, "10.77.0.2");

    let part = enforcer(host, "", "{}");
    until("ipset holds the bans", || in_ipset() && rules_of_iptables(host));
    assert!(detail(&part).contains("iptables with ipset, the first choice of auto"), "{}", detail(&part));
    part.stop();

    let part = enforcer(host, &hide("$(command -v ipset)"), "{}");
    until("nftables took over", || !rules_of_iptables(host));
    assert!(in_nftables(), "the former went before the new stood");
    assert!(
        detail(&part).contains("nftables, because iptables with ipset does not work here (ipset is not installed)")
    );
    assert!(!bad.through("new 8080"));
    part.stop();

    let part = enforcer(host, "", r#"{"backend":"iptables"}"#);
    until("iptables took over", || !in_nftables());
    assert!(in_ipset() && rules_of_iptables(host), "the former went before the new stood");
    assert!(!bad.through("new 8080"));
    part.stop();

    let part = enforcer(host, "", r#"{"backend":"nftables"}"#);
    until("nftables took over", || !rules_of_iptables(host) && !in_ipset());
    assert!(in_nftables() && !bad.through("new 8080"));
    part.stop();

    let part = enforcer(host, "", r#"{"backend":"none"}"#);
    until("nothing is left", || !in_nftables());
    assert!(bad.through("new 8080"));
    part.stop();
}

fn falls_back_to_legacy(host: &Host) {
    let _server = host.server();
    let dir = tempfile::tempdir().unwrap();
    // As where the kernel lacks nft_compat.
    let refuse = "echo 'line 3: RULE_APPEND failed (No such file or directory): rule in chain' >&2; exit 4";
    let part = enforcer(host, &host.stand_in(dir.path(), "restore", refuse), r#"{"backend":"iptables"}"#);
    for banned in ["10.77.0.2", "fd77::2"] {
        let bad = host.client(banned);
        until("the client is banned", || !bad.through("new 8080"));
    }
    let told = detail(&part);
    assert!(
        told.contains("with ipset, as configured") && told.contains("legacy (nft does not take our rules)"),
        "{told}"
    );
    until("it is told where", || part.ask("explain 10.77.0.2").contains("dropped in raw/PREROUTING (legacy)"));
    assert!(!rules_of_iptables(host), "nft has rules of ours as well");
    part.stop();
    host.run(&format!("{} --inside teardown {}", env::current_exe().unwrap().display(), host.quick()));
    assert!(!host.run("iptables-legacy-save").contains("PORTCULLIS"));
}

fn bans_by_rules(host: &Host) {
    let _server = host.server();
    let without = hide("$(command -v ipset)");
    let part = enforcer(host, &without, r#"{"backend":"iptables"}"#);
    let (bad, good) = (host.client("10.77.0.2"), host.client("10.77.0.3"));
    assert!(good.through("open"));
    until("an address is banned", || !bad.through("new 8080"));
    until("that it is not much is said", || part.report()["problems"].to_string().contains("at most 1000"));
    let placed = host.rules();
    host.iptables("4", "-t raw -F PORTCULLIS");
    until("our chain is filled again", || host.rules() == placed);
    part.ask("ban 10.77.0.0/24 4");
    until("an open connection is cut", || !good.through("ping"));
    let wider = host.rules();
    assert!(wider.iter().any(|rule| rule == "-A PORTCULLIS -s 10.77.0.1/32 -j RETURN"), "{wider:?}");
    part.stop();
    assert!(!bad.through("new 8080"), "bans end with the enforcer");
    until("a ban ends by itself", || good.through("new 8080"));
    assert!(!bad.through("new 8080"));

    // Nothing but the kernel remembers them.
    let empty = tempfile::tempdir().unwrap();
    let args = ["enforcer", &host.config(r#"{"backend":"iptables"}"#), empty.path().to_str().unwrap(), "for-real"];
    let part = Part::after(&without, &host.name, &args);
    until("the chain is taken over", || part.report()["backends"][0]["members"] == 2);
    part.stop();
    let teardown = format!("{} --inside teardown {}", env::current_exe().unwrap().display(), host.quick());
    host.run(&teardown);
    assert!(!rules_of_iptables(host) && bad.through("new 8080"));
}

fn replaces_broken(host: &Host) {
    let dir = tempfile::tempdir().unwrap();
    let copy = format!(
        "cp $(command -v ipset) {0}/ipset; {1}; export PATH={0}:$PATH",
        dir.path().display(),
        hide("$(command -v ipset)")
    );
    let part = enforcer(host, &copy, "{}");
    until("iptables has the rules", || rules_of_iptables(host));
    std::fs::remove_file(dir.path().join("ipset")).unwrap();
    part.ask("ban 10.77.0.3 600");
    until("what is broken is said", || part.report()["problems"].to_string().contains("cannot run"));
    until("it is given time", || part.metric("portcullis_enforce_failed_total") >= Some(6.0));
    until("nftables took over", || nftables::holds(host, "10.77.0.3") && !rules_of_iptables(host));
    assert!(nftables::holds(host, "10.77.0.2"));
}

fn lifts_at_start(host: &Host) {
    let _server = host.server();
    let bad = host.client("10.77.0.2");
    let (paused, lock) = (host.state.path().join("paused"), host.state.path().join("enforce.lock"));
    let without = hide("$(command -v ipset)");
    let (plain, ipset, nftables) = (
        (&*without, r#"{"backend":"iptables"}"#),
        ("", r#"{"backend":"iptables"}"#),
        ("", r#"{"backend":"nftables"}"#),
    );
    let small = ("", r#"{"backend":"iptables","bans_max":1000}"#);
    for (before, after) in [(plain, plain), (plain, ipset), (ipset, small), (small, nftables), (nftables, plain)] {
        let part = enforcer(host, before.0, before.1);
        until("the client is cut off", || !bad.through("new 8080"));
        part.stop();
        std::fs::write(&paused, "").unwrap();
        let part = enforcer(host, after.0, after.1);
        until("the pause is known", || part.report()["paused"].is_string());
        until("the firewall is let go", || File::open(&lock).unwrap().try_lock().is_ok());
        assert!(bad.through("new 8080"), "{before:?} still bans under {after:?}");
        std::fs::remove_file(&paused).unwrap();
        until("the client is cut off again", || !bad.through("new 8080"));
        until("nothing is wrong", || {
            part.report()["problems"].as_array().unwrap().iter().all(|p| p["severity"] != "degraded")
        });
        part.stop();
    }
}

fn tells_of_former(host: &Host) {
    let in_nftables = || nftables::holds(host, "10.77.0.2");
    let part = enforcer(host, "", r#"{"backend":"nftables"}"#);
    until("nftables holds the bans", in_nftables);
    part.stop();
    let part = enforcer(host, "", r#"{"chains":["DOCKER-USER"]}"#);
    until("what stays is told", || part.report()["problems"].to_string().contains("a former back end still bans"));
    assert!(in_nftables(), "the former went before the new stood");
    host.iptables("4", "-N DOCKER-USER");
    until("the former goes, although one family has no such chain", || !in_nftables());
    until("it is not told any more", || !part.report()["problems"].to_string().contains("former"));
    assert!(part.report()["problems"].to_string().contains("ipv6: none of the configured chains exists"));
}

/// An enforcer on a host whose only iptables knows a lock, which is held.
fn locked_out(host: &Host, dir: &Path) -> (Part, File) {
    let path = dir.join("lock");
    let lock = File::create(&path).unwrap();
    lock.lock().unwrap();
    let shell =
        format!("export XTABLES_LOCKFILE={}; {}", path.display(), hide("$(readlink -f $(command -v iptables-nft))"));
    let part = enforcer(host, &shell, "{}");
    until("that it waits is said", || {
        part.report()["problems"].to_string().contains("cannot tell yet whether iptables with ipset")
    });
    (part, lock)
}

fn waits_for_lock(host: &Host) {
    let dir = tempfile::tempdir().unwrap();
    let (part, lock) = locked_out(host, dir.path());
    drop(lock);
    until("it is taken once it can be tried", || detail(&part).contains("iptables with ipset, the first choice"));
}

fn does_without_lock(host: &Host) {
    let dir = tempfile::tempdir().unwrap();
    let (part, _lock) = locked_out(host, dir.path());
    until_at_last("nftables took over", || nftables::holds(host, "10.77.0.2"));
    let why = detail(&part);
    assert!(why.contains("nftables, because iptables with ipset") && why.contains("the lock of iptables"), "{why}");
}

fn does_without_hanging_ipset(host: &Host) {
    let dir = tempfile::tempdir().unwrap();
    let shell = host.program(dir.path(), "ipset", "exec sleep 600");
    let part = enforcer(host, &shell, "{}");
    until("bans are followed meanwhile", || part.report()["backends"][0]["desired"] == 2);
    let problems = part.report()["problems"].to_string();
    assert!(problems.contains("not known yet") || problems.contains("cannot tell yet"), "{problems}");
    until_at_last("nftables took over", || nftables::holds(host, "10.77.0.2"));
    assert!(detail(&part).contains("no answer within 10s"), "{}", detail(&part));
    until("it is used", || !host.client("10.77.0.2").through("new 8080"));
}

/// An `ipset` that hangs while there is a file `hangs` in `dir`.
fn ipset_that_may_hang(host: &Host, dir: &Path) -> String {
    host.program(dir, "ipset", "[ ! -e hangs ] || exec sleep 600\nPATH=${PATH#*:}\nexec ipset \"$@\"")
}

fn replaces_hanging_ipset(host: &Host) {
    let dir = tempfile::tempdir().unwrap();
    // Fewer looks than it takes go by while the first change hangs: from then on looks hang as well.
    let part = enforcer(host, &ipset_that_may_hang(host, dir.path()), r#"{"resync_interval":"5s"}"#);
    until("the client is banned", || host.holds("10.77.0.2"));
    std::fs::write(dir.path().join("hangs"), "").unwrap();
    let mut others = (1..).map(|n: u32| std::net::Ipv4Addr::from_bits(0xc612_0000 + n));
    until_at_last("nftables took over", || {
        part.ask(&format!("ban {} 600", others.next().unwrap()));
        nftables::holds(host, "10.77.0.2")
    });
    assert!(detail(&part).contains("nftables, because iptables with ipset"), "{}", detail(&part));
}

fn does_without_ipset_for_a_while(host: &Host) {
    let _server = host.server();
    let (bad, dir) = (host.client("10.77.0.2"), tempfile::tempdir().unwrap());
    let hangs = dir.path().join("hangs");
    let shell = ipset_that_may_hang(host, dir.path());
    let part = enforcer(host, &shell, r#"{"backend":"iptables"}"#);
    until("the client is banned", || !bad.through("new 8080"));

    std::fs::write(&hangs, "").unwrap();
    let asked = Cell::new(0);
    let ban_another = || {
        asked.set(asked.get() + 1);
        part.ask(&format!("ban 192.0.2.{} 600", asked.get()));
    };
    // The program that was started ahead still works.
    until("it is told what is not done", || {
        ban_another();
        part.report()["problems"].to_string().contains("is not done after")
    });
    ban_another();
    until("bans are followed meanwhile", || part.report()["backends"][0]["desired"] == 2 + asked.get());
    std::fs::write(host.state.path().join("paused"), "").unwrap();
    until("a pause lifts the rules, which need no ipset", || bad.through("new 8080"));

    std::fs::remove_file(&hangs).unwrap();
    std::fs::remove_file(host.state.path().join("paused")).unwrap();
    until_at_last("all are banned once it answers", || {
        !bad.through("new 8080") && host.holds(&format!("192.0.2.{}", asked.get()))
    });
    until("nothing is told any more", || part.report()["problems"].as_array().is_some_and(Vec::is_empty));
}

fn searches_aside(host: &Host) {
    let _server = host.server();
    let bad = host.client("10.77.0.2");
    let dir = tempfile::tempdir().unwrap();
    let shell = format!("{}; export PATH={}:$PATH", hide("$(command -v ipset)"), dir.path().display());
    let part = enforcer(host, &shell, r#"{"backend":"iptables"}"#);
    until("bans are rules", || !bad.through("new 8080"));
    host.program(dir.path(), "ipset", "echo $$ > hangs; exec sleep 600");
    let pid = || std::fs::read_to_string(dir.path().join("hangs")).ok().filter(|pid| pid.ends_with('\n'));
    until_at_last("something better is looked for", || pid().is_some());
    let hangs = || Path::new("/proc").join(pid().unwrap().trim()).exists();

    part.ask("unban 10.77.0.2");
    until("the client is freed", || bad.through("new 8080"));
    part.ask("ban 10.77.0.2 600");
    until("the client is banned", || !bad.through("new 8080"));
    assert!(hangs(), "it was waited for");
    std::fs::write(host.state.path().join("paused"), "").unwrap();
    until("the pause frees", || bad.through("new 8080"));
    until("the firewall is let go", || File::open(host.state.path().join("enforce.lock")).unwrap().try_lock().is_ok());
    until("what would try the firewall is ended", || !hangs());
    std::fs::remove_file(host.state.path().join("paused")).unwrap();
    until("the client is banned again", || !bad.through("new 8080"));
}
