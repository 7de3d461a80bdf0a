//! What happens to bans when the enforcer, or what it works with, is taken away at a bad moment.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use serde_json::Value;

use super::{Host, Part, Scenario, hide, until, until_at_last};

pub(super) const OF_EVERY_BACK_END: [(&str, Scenario); 1] =
    [("a_kill_at_any_moment_is_made_good_by_the_next_start", survives_kills)];
pub(super) const OF_IPTABLES: [(&str, Scenario); 6] = [
    ("bans_that_no_rule_looks_up_are_neither_told_nor_confirmed", tells_nothing_untrue),
    ("programs_that_are_taken_away_are_missed_and_bans_stay", goes_on_robbed),
    ("a_teardown_beside_a_running_enforce_goes_on_where_a_chain_has_to_stay", tears_down_around_others),
    ("a_teardown_beside_a_running_enforce_goes_on_where_that_one_cannot_read_the_rules", tears_down_for_the_blind),
    ("a_teardown_waits_for_a_change_about_forwarded_clients_that_hangs", tears_down_after_forwarded),
    ("a_teardown_waits_for_a_change_of_a_back_end_that_was_replaced", tears_down_after_former),
];

/// Kills, each a little later after the bans are known.
const KILLS: u32 = 10;
const LATER: Duration = Duration::from_millis(2);
/// Bans of each life.
const BANS: u32 = 60;

fn enforcer(host: &Host, shell: &str) -> Part {
    let args = ["enforcer", &host.quick(), host.state.path().to_str().unwrap(), "for-real"];
    Part::after(shell, &host.name, &args)
}

fn survives_kills(host: &Host) {
    let foreign = host.foreign();
    let mut banned = Vec::new();
    for kill in 0..KILLS {
        banned.extend((1..=BANS).map(|last| format!("198.18.{kill}.{last}")));
        // Some bans of each life end before the next.
        banned.retain(|address| !address.ends_with(&format!(".{kill}")));
        let part = enforcer(host, "");
        part.ask(&format!("ban {} 600", banned.join(",")));
        // Not a wait: the moment of the kill.
        thread::sleep(LATER * kill);
        part.kill();
    }
    let part = enforcer(host, "");
    part.ask(&format!("ban {} 600", banned.join(",")));
    until("the kernel holds the ban set and nothing else", || {
        let report = part.report();
        let backend = &report["backends"][0];
        let wanted = banned.len() as u64;
        backend["members"] == wanted && report["problems"].as_array().is_some_and(Vec::is_empty)
    });
    assert!(banned.iter().all(|address| host.holds(address)));
    assert!(!host.holds("198.18.0.1") && !host.holds("198.18.200.1"));
    assert_eq!(host.foreign(), foreign);
    part.stop();
}

fn tells_nothing_untrue(host: &Host) {
    let dir = tempfile::tempdir().unwrap();
    let refuses = dir.path().join("refuses");
    fs::write(&refuses, "").unwrap();
    let name = format!("iptables-{}", host.variant);
    let refuse = "if [ -e refuses ]; then case \"$*\" in *DROP*) echo no such match >&2; exit 1;; esac; fi";
    let shell = host.program(dir.path(), &name, &format!("{refuse}\nPATH=${{PATH#*:}}\nexec {name} \"$@\""));
    let part = enforcer(host, &shell);
    part.ask("ban 10.77.0.2 600");
    until("the ban is in its set", || host.holds("10.77.0.2"));
    until("that its rule is refused is said", || part.report()["problems"].to_string().contains("no such match"));
    let explained = || serde_json::from_str::<Value>(&part.ask("explain 10.77.0.2")).unwrap()[0].clone();
    let hold = explained();
    assert!(hold["state"] == "idle" && hold["detail"].to_string().contains("no chain looks up"), "{hold}");
    assert_eq!(part.report()["backends"][0]["revision"], 0, "a ban that bites nobody is confirmed");

    fs::remove_file(&refuses).unwrap();
    until("the ban is confirmed", || part.report()["backends"][0]["revision"].as_u64() > Some(0));
    assert_eq!(explained()["state"], "held");
    part.stop();
}

fn goes_on_robbed(host: &Host) {
    let folder = tempfile::tempdir().unwrap();
    let (here, away) = (folder.path().join("here"), folder.path().join("away"));
    fs::create_dir(&here).unwrap();
    let originals = format!("$(readlink -f $(command -v iptables-{}))", host.variant);
    // The host's only iptables, where it can be taken away.
    let shell = format!(
        "cp {originals} {0}/multi; for family in iptables ip6tables; do for suffix in '' -save -restore; do \
         ln -s multi {0}/$family-{1}$suffix; done; done; {2}; export PATH={0}:$PATH",
        here.display(),
        host.variant,
        hide("$(readlink -f $(command -v iptables-nft) $(command -v iptables-legacy))"),
    );
    let (_server, part) = (host.server(), enforcer(host, &shell));
    part.ask("ban 10.77.0.2 600");
    let (bad, other) = (host.client("10.77.0.2"), host.client("10.77.0.3"));
    until("the client is cut off", || !bad.through("new 8080"));
    until("both families have their rules", || {
        host.rules().iter().filter(|rule| rule.ends_with("-j DROP")).count() >= 4
    });
    let placed = host.rules();

    fs::rename(&here, &away).unwrap();
    until("what is missing is said", || part.report()["problems"].to_string().contains("cannot run"));
    part.ask("ban 10.77.0.3 600");
    until("a new ban bites all the same", || !other.through("new 8080"));
    host.iptables("4", "-t raw -D PREROUTING -j PORTCULLIS");
    assert!(bad.through("new 8080"), "somebody else took the rule away");

    fs::rename(&away, &here).unwrap();
    until("the rule is back", || host.rules() == placed);
    assert!(!bad.through("new 8080"));
    until("nothing is wrong any more", || part.report()["problems"].as_array().is_some_and(Vec::is_empty));
    part.stop();
}

fn tears_down_around_others(host: &Host) {
    let (_server, enforcer) = (host.server(), host.enforcer(&host.quick()));
    let bad = host.client("10.77.0.2");
    enforcer.ask("ban 10.77.0.2 600");
    until("the client is cut off", || !bad.through("new 8080"));
    host.iptables("4", "-t raw -A PREROUTING -s 198.18.0.9 -j PORTCULLIS");
    let told = host.teardown_beside(&host.quick());
    assert!(told.starts_with("1 paused") && told.contains("portcullis-v4"), "{told}");
    let (_, left) = told.split_once(", left ").unwrap();
    assert_eq!(left.matches("cannot remove ").count(), 1, "{left}");
    assert!(left.contains("chain raw/PORTCULLIS") && left.contains("-A PREROUTING -s 198.18.0.9/32 -j PORTCULLIS"));
    assert!(bad.through("new 8080"), "it still bans");
    assert!(host.run("ipset list -n").trim().is_empty());
    let ours = || host.rules().into_iter().filter(|rule| rule.contains("PORTCULLIS")).collect::<Vec<_>>();
    assert_eq!(ours(), ["-A PREROUTING -s 198.18.0.9/32 -j PORTCULLIS"]);
    let has_chain = || host.try_run(&format!("iptables-{} -w 5 -t raw -S PORTCULLIS", host.variant)).is_some();
    until("that something is left is said", || {
        enforcer.report()["problems"].to_string().contains("not all of ours could be lifted")
    });
    assert!(has_chain() && ours().len() == 1, "something came back");

    host.iptables("4", "-t raw -D PREROUTING -s 198.18.0.9 -j PORTCULLIS");
    until("the chain goes once it can", || !has_chain());
    until("nothing is said to be left", || enforcer.report()["problems"].to_string().contains("all bans are lifted"));
    assert!(bad.through("new 8080") && ours().is_empty());
    fs::remove_file(host.state.path().join("paused")).unwrap();
    until("the client is cut off again", || !bad.through("new 8080"));
    enforcer.stop();
}

fn tears_down_for_the_blind(host: &Host) {
    let dir = tempfile::tempdir().unwrap();
    let fail = "case $0 in *ip6tables*) if [ -e broken ]; then echo no answer >&2; exit 1; fi;; esac";
    let shell = host.stand_in(dir.path(), "save", fail);
    let before = host.rules();
    let enforcer = host.enforcer_after(&shell, &host.quick());
    enforcer.ask("ban 10.77.0.2,fd77::2 600");
    until("both families have their rules", || {
        host.rules().iter().filter(|rule| rule.ends_with("-j DROP") && rule.contains("PORTCULLIS")).count() == 2
    });
    fs::write(dir.path().join("broken"), "").unwrap();
    let told = host.teardown_beside(&host.quick());
    assert!(told.starts_with("1 paused") && told.ends_with("left []"), "{told}");
    assert_eq!(host.rules(), before);
    until("what could not be done is said", || {
        let problems = enforcer.report()["problems"].to_string();
        problems.contains("not all of ours could be lifted") && problems.contains("no answer")
    });
    assert_eq!(host.rules(), before, "something came back");
    fs::remove_file(dir.path().join("broken")).unwrap();
    until_at_last("it finds nothing left to lift", || {
        enforcer.report()["problems"].to_string().contains("all bans are lifted")
    });
    assert_eq!(host.rules(), before);
    enforcer.stop();
}

/// Shell that hangs once, while there is a file `hangs`, and then makes a file `done`. It goes on once there is a file `go`, or
/// some time after `host` was paused, as a teardown may well wait for it.
fn hanging(host: &Host) -> String {
    let paused = host.state.path().join("paused");
    format!(
        "n=0; rm hangs; touch begun\nuntil [ -e go ] || [ $n = 40 ]; do [ ! -e {} ] || n=$((n + 1)); sleep 0.1; done\n\
         PATH=${{PATH#*:}}; \"${{0##*/}}\" \"$@\"; code=$?; touch done; exit $code",
        paused.display()
    )
}

/// Tears down beside `enforcer` and kills it. What hung in `dir` may go on then, and must have nothing left to spoil.
fn tear_down_while_something_hangs(host: &Host, enforcer: Part, dir: &Path, config: &str) {
    let told = host.teardown_beside(config);
    assert!(told.ends_with("left []"), "{told}");
    enforcer.ask("ban-forwarded 192.0.2.2 600");
    let mut reports = BTreeSet::new();
    until("it has looked at its rules again, and has nothing to put back", || {
        reports.insert(enforcer.report()["at"].to_string());
        reports.len() > 3
    });
    enforcer.kill();
    fs::write(dir.join("go"), "").unwrap();
    until("what hung is done", || dir.join("done").exists());
    assert_nothing_of_ours(host);
}

fn assert_nothing_of_ours(host: &Host) {
    let saved = ["iptables", "ip6tables"].map(|name| host.run(&format!("{name}-{}-save", host.variant))).concat();
    assert!(!saved.contains("PORTCULLIS"), "{saved}");
}

fn tears_down_after_forwarded(host: &Host) {
    let dir = tempfile::tempdir().unwrap();
    let config = r#"{"firewall":{"backend":"none","resync_interval":"1s"},"forwarded_for":{"enabled":true}}"#;
    host.iptables("4", "-N DOCKER-USER");
    let shell = host.stand_in(dir.path(), "restore", &format!("if [ -e hangs ]; then {}; fi", hanging(host)));
    let enforcer = host.enforcer_after(&shell, config);
    fs::write(dir.path().join("hangs"), "").unwrap();
    enforcer.ask("ban-forwarded 192.0.2.1 600");
    until("the change hangs", || dir.path().join("begun").exists());
    tear_down_while_something_hangs(host, enforcer, dir.path(), config);

    // Paused as it is, the next one puts nothing back either.
    let args = ["enforcer", config, host.state.path().to_str().unwrap(), "for-real"];
    let enforcer = Part::new(&host.name, &args);
    until("it has looked", || enforcer.report()["problems"].to_string().contains("all bans are lifted"));
    assert_nothing_of_ours(host);
    enforcer.stop();
    assert_nothing_of_ours(host);
}

fn tears_down_after_former(host: &Host) {
    let dir = tempfile::tempdir().unwrap();
    let name = format!("iptables-{}", host.variant);
    let hang = format!("case \"$*\" in *-N*) if [ -e hangs ]; then {}; fi;; esac", hanging(host));
    let shell = host.program(dir.path(), &name, &format!("{hang}\nPATH=${{PATH#*:}}\nexec {name} \"$@\""));
    let config = host.config(r#"{"backend":"auto"}"#);
    let enforcer = host.enforcer_after(&shell, &config);
    fs::write(dir.path().join("hangs"), "").unwrap();
    // It may put a rule back in between.
    let remove = |what: &str| host.try_run(&format!("{name} -w 5 -t raw {what}")).is_some();
    until("the chain is gone", || remove("-F") && remove("-X PORTCULLIS"));
    until("making the chain anew hangs", || dir.path().join("begun").exists());
    until_at_last("it is made without that", || host.run(&format!("{name}-save")).contains("-j PORTCULLIS"));
    tear_down_while_something_hangs(host, enforcer, dir.path(), &config);
}
