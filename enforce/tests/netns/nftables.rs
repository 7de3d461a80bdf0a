//! Bans in nftables.

use std::net::IpAddr;

use proto::net::Target;
use serde_json::Value;

use super::{Host, Part, Scenario, until};

pub(super) const SCENARIOS: [(&str, Scenario); 11] = [
    ("a_ban_cuts_new_and_open_connections_and_spares_others", super::cuts_connections),
    ("a_wider_ban_does_not_catch_guarded_addresses", super::guards),
    ("the_last_set_is_in_force_before_the_bus_answers", super::loads_last_set),
    ("pause_lifts_every_ban_and_resume_restores_them", super::pauses),
    ("a_burst_is_in_the_kernel_at_once", super::takes_bursts),
    ("drift_is_repaired_and_foreign_tables_stay", repairs_drift),
    ("a_restart_takes_over_without_a_gap", takes_over),
    ("a_refused_or_ended_element_does_not_take_its_batch_along", survives_refusals),
    ("clients_of_a_published_port_are_cut_and_ports_are_kept_apart", cuts_forwarded),
    ("bans_of_any_prefix_stand_side_by_side", holds_any_prefix),
    ("the_first_ban_after_a_lost_table_comes_with_its_guards", guards_after_loss),
];

/// Whether a ban of the address, or of its usual prefix, is in the kernel.
pub(super) fn holds(host: &Host, address: &str) -> bool {
    let address: IpAddr = address.parse().unwrap();
    let (family, lengths) = if address.is_ipv4() { ("v4", [32, 24]) } else { ("v6", [128, 64]) };
    lengths.into_iter().any(|length| {
        let key = Target::new(address, length).addr();
        host.try_run(&format!("nft get element inet portcullis bans-{family}-{length} {{ {key} }}")).is_some()
    })
}

/// Our table, members aside.
pub(super) fn rules(host: &Host) -> String {
    host.try_run("nft -t list table inet portcullis").unwrap_or_default()
}

/// Without what its counter shows.
fn structure(host: &Host) -> String {
    let rules = rules(host);
    let mut lines: Vec<&str> = rules.lines().filter(|line| !line.trim_start().starts_with("packets ")).collect();
    // Sets are shown in the order in which they were made.
    lines.sort_unstable();
    lines.join("\n")
}

fn repairs_drift(host: &Host) {
    host.run("nft add table inet other");
    host.run("nft add chain inet other prerouting { type filter hook prerouting priority -400 ; }");
    host.run("nft add rule inet other prerouting ip saddr 10.77.0.2 accept");
    let (_server, enforcer) = (host.server(), host.enforcer(&host.quick()));
    let bad = host.client("10.77.0.2");
    enforcer.ask("ban 10.77.0.2,10.77.9.0/24,fd77::2 600");
    let all = || host.holds("10.77.0.2") && host.holds("10.77.9.1") && host.holds("fd77::2");
    until("the bans are in the kernel", all);
    assert!(!bad.through("new 8080"), "another table's accept lets a banned client in");
    let (placed, foreign) = (structure(host), host.run("nft list table inet other"));
    assert!(placed.contains("@bans-v4-24 goto banned"), "{placed}");

    let guarded = || host.try_run("nft get element inet portcullis guard-v4 { 127.0.0.1 }").is_some();
    let is_right = || structure(host) == placed && all() && !host.holds("fd77::3") && guarded();
    let changes: [&[&str]; 3] = [
        &[
            "flush set inet portcullis bans-v4-32",
            "flush set inet portcullis guard-v4",
            "add element inet portcullis bans-v6-128 { fd77::3 }",
            "insert rule inet portcullis banned accept",
            "add table inet portcullis { flags dormant ; }",
        ],
        &["flush chain inet portcullis prerouting", "delete set inet portcullis bans-v4-24"],
        &["delete table inet portcullis"],
    ];
    for together in changes {
        together.iter().for_each(|change| drop(host.run(&format!("nft {change}"))));
        // Repairs are counted below, as the first may come before a look.
        until("all is right again", is_right);
    }
    // Somebody's table of our name.
    host.run("nft delete table inet portcullis");
    host.run("nft add table inet portcullis");
    host.run("nft add set inet portcullis bans-v4-32 { type inet_service ; }");
    host.run("nft add chain inet portcullis prerouting { type filter hook input priority 7 ; }");
    until("it is made ours", is_right);
    assert!(!bad.through("new 8080"));
    assert_eq!(host.run("nft list table inet other"), foreign);
    until("repairs are counted", || enforcer.report()["backends"][0]["repairs"].as_u64() >= Some(4));

    enforcer.ask("unban 10.77.9.0/24");
    until("an empty set costs packets nothing", || !rules(host).contains("bans-v4-24") || !host.holds("10.77.9.1"));
    enforcer.stop();
    let removed =
        host.run(&format!("{} --inside teardown {}", std::env::current_exe().unwrap().display(), host.quick()));
    assert!(removed.contains("table: Some("), "{removed}");
    assert_eq!(host.run("nft list tables inet"), "table inet other\n");
}

fn takes_over(host: &Host) {
    let server = host.server();
    let enforcer = host.enforcer(&host.quick());
    enforcer.ask("ban 10.77.0.2,10.77.9.0/24,fd77::2 600");
    until("the bans are in the kernel", || host.holds("10.77.0.2") && host.holds("10.77.9.1") && host.holds("fd77::2"));
    let (bad, good) = (host.client("10.77.0.2"), host.client("10.77.0.3"));
    assert!(!bad.through("new 8080") && good.through("new 8080"));
    enforcer.stop();
    assert!(!bad.through("new 8080"), "bans end with the enforcer");
    let counted = |text: String| text.lines().find(|line| line.trim_start().starts_with("packets ")).map(str::to_owned);
    assert!(counted(rules(host)).is_some_and(|line| !line.contains("packets 0 ")));

    let args = ["enforcer", &host.quick(), host.state.path().to_str().unwrap(), "for-real"];
    let enforcer = Part::new(&host.name, &args);
    let placed = || enforcer.report()["backends"][0]["detail"].to_string().contains("table inet portcullis");
    until("rules are placed", || {
        assert!(holds(host, "10.77.0.2"), "there is a gap");
        placed()
    });
    assert!(!bad.through("new 8080"));
    assert_eq!(enforcer.metric("portcullis_enforce_steps_total{kind=\"add\"}"), None, "what stood was made anew");
    assert!(counted(rules(host)).is_some_and(|line| !line.contains("packets 0 ")), "the counter was made anew");
    // The bus answers with another set: only now may members go.
    enforcer.ask("ban 10.77.0.3 600");
    until("the new set is in force", || host.holds("10.77.0.3") && !host.holds("10.77.0.2"));
    drop(server);
}

fn survives_refusals(host: &Host) {
    // A set of ours, but with room for three.
    host.run("nft add table inet portcullis");
    host.run("nft add set inet portcullis bans-v4-32 { type ipv4_addr ; flags timeout ; size 3 ; }");
    let enforcer = host.enforcer(&host.quick());
    enforcer.ask("ban 10.77.9.1,10.77.9.2,10.77.9.3,10.77.9.4,10.77.9.5,fd77::2 600");
    until("the others are in force", || {
        host.holds("fd77::2") && (1..=5).filter(|n| host.holds(&format!("10.77.9.{n}"))).count() == 3
    });
    until("and that is said", || enforcer.report()["problems"].to_string().contains("the kernel refuses 2 bans"));
    enforcer.ask("unban 10.77.9.1,10.77.9.2,10.77.9.3,10.77.9.4,10.77.9.5");
    until("nothing is missing any more", || enforcer.report()["problems"] == Value::Array(Vec::new()));
    let refused = || enforcer.metric("portcullis_enforce_refused_total");
    let before = refused();

    // What ended before it is unbanned, and what stands before it is banned.
    enforcer.ask("ban 10.77.9.1,10.77.9.2 600");
    until("they are in force", || host.holds("10.77.9.1") && host.holds("10.77.9.2"));
    host.run("nft delete element inet portcullis bans-v4-32 { 10.77.9.1 }");
    enforcer.ask("unban 10.77.9.1,10.77.9.2");
    until("the one that stood is gone", || !host.holds("10.77.9.2"));
    host.run("nft add element inet portcullis bans-v4-32 { 10.77.9.1 timeout 9s }");
    enforcer.ask("ban 10.77.9.1,10.77.9.2 600");
    let listed = || host.run("nft list set inet portcullis bans-v4-32");
    until("it has its own end", || host.holds("10.77.9.2") && listed().contains("10.77.9.1 timeout 10m"));
    assert!(listed().contains("comment \"forceful-browsing\""), "{}", listed());
    assert_eq!(refused(), before, "what had ended or stood was taken for refused");
}

/// As Docker publishes a port: packets are forwarded after address translation, and an early rule accepts them.
fn cuts_forwarded(host: &Host) {
    let inner = host.name.replace("host", "inner");
    let run = super::run;
    run("ip", &["netns", "add", &inner]);
    let guard = super::Namespace(inner.clone());
    run("ip", &["-n", &host.name, "link", "add", "pc2", "type", "veth", "peer", "name", "pc3", "netns", &inner]);
    for (ns, link, address) in [(&host.name, "pc2", "10.88.0.1/24"), (&inner, "pc3", "10.88.0.2/24")] {
        run("ip", &["-n", ns, "addr", "add", address, "dev", link]);
        run("ip", &["-n", ns, "link", "set", link, "up"]);
    }
    run("ip", &["-n", &inner, "link", "set", "lo", "up"]);
    run("ip", &["-n", &inner, "addr", "add", "fd77::1/128", "dev", "lo", "nodad"]);
    run("ip", &["-n", &inner, "route", "add", "default", "via", "10.88.0.1"]);
    host.run("sysctl -qw net.ipv4.ip_forward=1");
    host.iptables("4", "-t nat -A PREROUTING -p tcp --dport 80 -j DNAT --to-destination 10.88.0.2:8080");
    host.iptables("4", "-A FORWARD -m conntrack --ctstate ESTABLISHED -j ACCEPT");
    host.iptables("4", "-A FORWARD -d 10.88.0.2 -j ACCEPT");
    let inner_server = Part::new(&inner, &["server"]);
    inner_server.read();
    let _server = host.server();
    let enforcer = host.enforcer(&host.config(r#"{"ports":["tcp/70-80"],"spare_ports":["tcp/8443"]}"#));
    let bad = host.client("10.77.0.2");
    assert!(bad.through("open 80") && bad.through("ping"));
    enforcer.ask("ban 10.77.0.2 600");
    until("the ban is in the kernel", || host.holds("10.77.0.2"));
    assert!(!bad.through("ping"), "an open connection through the host goes on");
    assert!(!bad.through("new 80"), "the port that the client asked for counts");
    assert!(bad.through("new 8080") && bad.through("new 8443"), "other ports are spared");
    assert!(host.client("10.77.0.3").through("new 80"));
    assert_eq!(enforcer.report()["problems"], Value::Array(Vec::new()));
    drop(guard);
}

fn holds_any_prefix(host: &Host) {
    let (_server, enforcer) = (host.server(), host.enforcer(&host.quick()));
    let (bad, good) = (host.client("10.77.0.2"), host.client("fd77::3"));
    enforcer.ask("ban 10.77.0.0/16,10.77.0.0/20,10.77.0.2/31,10.77.0.2,fd77::/48,fd77::2/127 600");
    until("a packet is dropped", || !bad.through("new 8080") && !good.through("new 8080"));
    // Each stands by itself: the narrower do not take the wider along, nor the reverse.
    for (unbanned, through) in [("10.77.0.2,10.77.0.0/16", false), ("10.77.0.0/20", false), ("10.77.0.2/31", true)] {
        enforcer.ask(&format!("unban {unbanned}"));
        let gone = || enforcer.report()["backends"][0]["members"] == enforcer.report()["backends"][0]["desired"];
        until("it is gone", gone);
        until("the rest is in force", || bad.through("new 8080") == through);
    }
    let explained = enforcer.ask("explain fd77::3");
    assert!(explained.contains("in set bans-v6-127") || explained.contains("in set bans-v6-48"), "{explained}");
}

fn guards_after_loss(host: &Host) {
    // No resync puts it right meanwhile.
    let config = r#"{"firewall":{"backend":"nftables","resync_interval":"10m"}}"#;
    let (_server, enforcer) = (host.server(), host.enforcer(config));
    let (bad, good) = (host.client("10.77.0.2"), host.client("10.77.0.3"));
    enforcer.ask("never 10.77.0.3");
    enforcer.ask("ban 10.77.0.2,10.77.9.1 600");
    until("the bans are in the kernel", || host.holds("10.77.0.2") && host.holds("10.77.9.1"));
    host.run("nft flush ruleset");
    enforcer.ask("ban 10.77.0.0/24 600");
    until("bans are back", || !bad.through("new 8080"));
    assert!(good.through("new 8080"), "a guarded client is banned");
    assert!(host.holds("10.77.9.1"), "only the new ban is back");
    assert!(rules(host).contains("@guard-v4"), "{}", rules(host));
}
