//! Real packets in network namespaces: a web server whose log Portcullis follows, and clients that are cut off.
//!
//! Times here are states too: a ban is over when the client is answered again, and how long that took is compared with
//! what was promised.

mod hostile;
mod leaks;
mod privileges;
mod syslog;

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use proto::time::{Clock, Timestamp};
use serde_json::Value;
use tempfile::TempDir;
use tests::netns::{Connection, Namespace, Server, get, host};
use tests::portcullis::{Service, wait_for};

/// Networks of the visitor and of the attacker.
const VISITOR: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(198, 51, 100, 0)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0xb, 0, 0, 0, 0, 0))];
const ATTACKER: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(203, 0, 113, 0)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0xa, 0, 0, 0, 0, 0))];

/// Which of the two kinds of iptables the host uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Variant {
    Nft,
    Legacy,
}

impl Variant {
    fn command(self, v4: bool) -> &'static str {
        match (self, v4) {
            (Self::Nft, true) => "iptables-nft",
            (Self::Nft, false) => "ip6tables-nft",
            (Self::Legacy, true) => "iptables-legacy",
            (Self::Legacy, false) => "ip6tables-legacy",
        }
    }
}

/// A host with a web server, a visitor and an attacker, and a configuration that follows the server's log.
struct World {
    server: Namespace,
    visitor: Namespace,
    attacker: Namespace,
    web: Server,
    folder: TempDir,
}

impl World {
    fn new(variant: Variant, config: &str) -> Self {
        Self::with_source(variant, "type = \"file\"\ninclude = [\"FOLDER/access.log\"]\n", config)
    }

    /// In `source`, FOLDER stands for the world's own.
    fn with_source(variant: Variant, source: &str, config: &str) -> Self {
        let [server, visitor, attacker] = [(); 3].map(|()| Namespace::new().unwrap());
        server.join(&visitor, &VISITOR).unwrap();
        server.join(&attacker, &ATTACKER).unwrap();
        // A rule of somebody else's shows which variant the host uses.
        for v4 in [true, false] {
            server.run(variant.command(v4), &["-A", "INPUT", "-i", "lo", "-j", "ACCEPT"]).unwrap();
        }
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).display().to_string();
        let mut text = format!(
            "node = \"edge\"\nstate_dir = \"{}\"\n[api]\nsocket = \"{}\"\n[telemetry]\nlog_format = \"json\"\n\
             [ingest.sources.traefik]\n{}",
            path("state"),
            path("api.sock"),
            source.replace("FOLDER", &folder.path().display().to_string()),
        );
        text.push_str("[detect.escalation]\njitter = \"0%\"\n");
        text.push_str(config);
        std::fs::create_dir(folder.path().join("state")).unwrap();
        std::fs::write(folder.path().join("portcullis.toml"), text).unwrap();
        let web = Server::start(&server, &folder.path().join("access.log")).unwrap();
        Self { server, visitor, attacker, web, folder }
    }

    fn start(&self) -> Service {
        Service::start(self.folder.path(), self.server.name()).unwrap()
    }

    /// A request of the attacker; `None` when no answer comes.
    fn attack(&self, v4: bool, path: &str) -> Option<u16> {
        get(&self.attacker, host(ATTACKER[usize::from(!v4)], 1), path).ok()
    }

    /// Bad requests, each of which is still answered.
    fn attack_times(&self, v4: bool, times: u32) {
        for i in 0..times {
            assert_eq!(self.attack(v4, &format!("/wp-login.php?{i}")), Some(404), "bad request {} of {times}", i + 1);
        }
    }

    fn wait_cut_off(&self, v4: bool) {
        wait_for("the attacker is cut off", || self.attack(v4, "/ok").is_none().then_some(())).unwrap();
    }

    fn wait_free(&self, v4: bool) -> Timestamp {
        wait_for("the attacker is answered again", || self.attack(v4, "/ok").map(|_| Clock::system().now())).unwrap()
    }

    fn visitor_is_served(&self) {
        for network in VISITOR {
            assert_eq!(get(&self.visitor, host(network, 1), "/ok").unwrap(), 200);
        }
    }

    /// Waits until the rule has counted so many requests of the attacker.
    fn wait_counted(&self, service: &Service, v4: bool, wanted: u32) {
        let address = host(ATTACKER[usize::from(!v4)], 2).to_string();
        let look = || {
            let answer = service.verb(&["explain", &address, "--json"]).ok()?.json().ok()?.pop()?;
            let rule = answer["rules"].as_array()?.iter().find(|rule| rule["rule"] == "forceful-browsing")?;
            (rule["counted"] == wanted).then_some(())
        };
        wait_for("all requests are counted", look).unwrap();
    }

    /// Waits until every request is an event; for a service that has seen them all.
    fn wait_all_read(&self, service: &Service) {
        let wanted = u64::from(self.web.requests());
        let look = || {
            let status = service.verb(&["status", "--json"]).ok()?.json().ok()?.pop()?;
            let nodes = status["nodes"].as_array()?;
            let events = nodes.iter().find_map(|node| node.pointer("/detect/events"))?.as_u64()?;
            (events >= wanted).then_some(())
        };
        wait_for("all requests are read", look).unwrap();
    }

    /// Rules and sets of the host.
    fn firewall(&self) -> String {
        let mut text = String::new();
        for program in ["iptables-nft-save", "ip6tables-nft-save", "iptables-legacy-save", "ip6tables-legacy-save"] {
            let rules = self.server.run(program, &[]).unwrap();
            // Comments hold the time, chains their counters.
            let rules = rules.lines().filter(|line| !line.starts_with('#'));
            let rules: Vec<&str> = rules.map(|line| line.split(" [").next().unwrap_or(line)).collect();
            let _ = writeln!(text, "{program}\n{}", rules.join("\n"));
        }
        text + &self.server.run("ipset", &["list", "-n"]).unwrap()
    }
}

fn target(v4: bool) -> &'static str {
    if v4 { "203.0.113.2" } else { "2001:db8:a::/64" }
}

/// The one ban of the attacker.
fn only_ban(service: &Service, v4: bool) -> Value {
    let bans = service.bans().unwrap();
    let mut own = bans.into_iter().filter(|ban| ban["target"] == target(v4));
    let ban = own.next().expect("the attacker is banned");
    assert_eq!(own.next(), None, "banned once");
    ban
}

fn moment(ban: &Value, key: &str) -> Timestamp {
    Timestamp::parse(ban[key].as_str().unwrap()).unwrap()
}

fn length_ms(ban: &Value) -> i64 {
    moment(ban, "expires_at").as_millis() - moment(ban, "banned_at").as_millis()
}

/// Long enough to look at a ban from all sides while it lasts, on a slow machine too.
const SHORT_BANS: &str = "[detect.rules.forceful-browsing]\nban_time = \"5s\"\n";

/// The main promise, whole: cut off after the 15th bad request, new and open connections; nobody else; for the ban time;
/// longer the second time.
fn cut_off(variant: Variant) {
    let world = World::new(variant, SHORT_BANS);
    let service = world.start();
    let mut visitor = VISITOR.map(|network| Connection::open(&world.visitor, host(network, 1)).unwrap());
    for v4 in [true, false] {
        let mut open = Connection::open(&world.attacker, host(ATTACKER[usize::from(!v4)], 1)).unwrap();
        assert_eq!(open.get("/ok").unwrap(), 200);
        world.attack_times(v4, 14);
        world.wait_counted(&service, v4, 14);
        assert_eq!(world.attack(v4, "/ok"), Some(200), "14 are not enough");
        world.attack_times(v4, 1);
        world.wait_cut_off(v4);
        let first = only_ban(&service, v4);
        assert!(open.get("/ok").is_err(), "an open connection is cut too");
        world.visitor_is_served();
        for connection in &mut visitor {
            assert_eq!(connection.get("/ok").unwrap(), 200);
        }
        assert_eq!((&first["rule"], &first["ban_count"]), (&"forceful-browsing".into(), &1.into()));
        assert_eq!(length_ms(&first), 5_000);
        let free = world.wait_free(v4);
        assert!(free >= moment(&first, "expires_at"), "free at {free}, promised was {}", first["expires_at"]);

        world.attack_times(v4, 15);
        world.wait_cut_off(v4);
        let second = only_ban(&service, v4);
        assert_eq!((&second["ban_count"], length_ms(&second)), (&2.into(), 10_000), "the second ban is longer");
        let free = world.wait_free(v4);
        assert!(free >= moment(&second, "expires_at"), "free at {free}, promised was {}", second["expires_at"]);
        world.visitor_is_served();
    }
    let rules = world.server.run(variant.command(true), &["-t", "raw", "-S"]).unwrap();
    assert!(rules.contains("-A PREROUTING -j PORTCULLIS"), "the variant of the host is used:\n{rules}");
    leaks::none_leaked(&service);
    service.stop().unwrap();
}

#[test]
fn a_client_is_cut_off_after_its_15th_bad_request_on_an_nft_host() {
    cut_off(Variant::Nft);
}

#[test]
fn a_client_is_cut_off_after_its_15th_bad_request_on_a_legacy_host() {
    cut_off(Variant::Legacy);
}

#[test]
fn a_ban_survives_stop_and_start_and_ends_with_an_unban() {
    let world = World::new(Variant::Nft, "");
    let service = world.start();
    world.attack_times(true, 15);
    world.wait_cut_off(true);
    let before = only_ban(&service, true);
    service.stop().unwrap();
    assert_eq!(world.attack(true, "/ok"), None, "in force while nothing runs");
    let service = world.start();
    assert_eq!(world.attack(true, "/ok"), None);
    assert_eq!(only_ban(&service, true), before, "the same ban with the same end");
    let answer = service.verb(&["explain", "203.0.113.2"]).unwrap().expect(0).unwrap();
    assert!(answer.stdout.contains("forceful-browsing"), "{}", answer.stdout);

    service.verb(&["unban", "203.0.113.2"]).unwrap().expect(0).unwrap();
    world.wait_free(true);
    assert_eq!(service.bans().unwrap(), [] as [Value; 0]);
    // The requests from before are forgotten: as many more as ever are needed, and the count begins anew.
    world.attack_times(true, 14);
    world.wait_counted(&service, true, 14);
    assert_eq!(world.attack(true, "/ok"), Some(200));
    world.attack_times(true, 1);
    world.wait_cut_off(true);
    assert_eq!(only_ban(&service, true)["ban_count"], 1);
    service.stop().unwrap();
}

#[test]
fn a_kill_at_14_of_15_loses_and_doubles_nothing() {
    let world = World::new(Variant::Nft, "");
    for v4 in [true, false] {
        let service = world.start();
        world.attack_times(v4, 14);
        world.wait_counted(&service, v4, 14);
        service.kill().unwrap();
        let service = world.start();
        world.wait_counted(&service, v4, 14);
        assert_eq!(world.attack(v4, "/ok"), Some(200), "14 are not enough, also when they are read again");
        world.attack_times(v4, 1);
        world.wait_cut_off(v4);
        let ban = only_ban(&service, v4);
        assert_eq!((&ban["ban_count"], &ban["evidence"]["failures"]), (&1.into(), &15.into()));
        // Killed again with the ban in force, it comes back with the same one.
        service.kill().unwrap();
        assert_eq!(world.attack(v4, "/ok"), None);
        let service = world.start();
        assert_eq!(only_ban(&service, v4), ban);
        service.stop().unwrap();
    }
}

#[test]
fn lines_written_while_nothing_runs_count_at_the_next_start() {
    let world = World::new(Variant::Nft, "");
    let service = world.start();
    world.attack_times(true, 7);
    world.wait_counted(&service, true, 7);
    service.stop().unwrap();
    world.attack_times(true, 8);
    let service = world.start();
    world.wait_cut_off(true);
    assert_eq!(only_ban(&service, true)["evidence"]["failures"], 15);
    service.stop().unwrap();
}

#[test]
fn an_operator_bans_pauses_and_allows() {
    let world = World::new(Variant::Nft, "");
    let service = world.start();
    let verb = |words: &[&str]| service.verb(words).unwrap().expect(0).unwrap();
    let mut open = Connection::open(&world.attacker, host(ATTACKER[0], 1)).unwrap();
    assert_eq!(open.get("/ok").unwrap(), 200);
    verb(&["ban", "203.0.113.0/24", "--for", "1h", "--reason", "a test"]);
    world.wait_cut_off(true);
    assert!(open.get("/ok").is_err());
    assert_eq!(world.attack(false, "/ok"), Some(200), "the other family is not meant");
    // A wider ban stays when an address of it is unbanned, and is named.
    let answer = service.verb(&["unban", "203.0.113.2"]).unwrap().expect(1).unwrap();
    assert!(answer.stdout.contains("203.0.113.0/24") || answer.stderr.contains("203.0.113.0/24"), "{answer:?}");
    assert_eq!(world.attack(true, "/ok"), None);

    verb(&["pause", "--for", "1h"]);
    world.wait_free(true);
    world.attack_times(true, 20);
    verb(&["resume"]);
    world.wait_cut_off(true);

    verb(&["allow", "203.0.113.2"]);
    world.wait_free(true);
    world.attack_times(true, 20);
    world.wait_all_read(&service);
    assert_eq!(world.attack(true, "/ok"), Some(200), "never banned from now on");
    service.stop().unwrap();
}

#[test]
fn a_reload_changes_rules_and_a_bad_file_keeps_the_old_ones() {
    let world = World::new(Variant::Nft, SHORT_BANS);
    let service = world.start();
    let path = world.folder.path().join("portcullis.toml");
    let good = std::fs::read_to_string(&path).unwrap();
    let logged = |text: &str| wait_for(text, || service.log_text().contains(text).then_some(())).unwrap();
    std::fs::write(&path, format!("{good}max_retry = 0\n")).unwrap();
    service.signal("HUP").unwrap();
    logged("max_retry");
    std::fs::write(&path, format!("{good}max_retry = 6\n")).unwrap();
    service.signal("HUP").unwrap();
    let rule = || service.verb(&["explain", "203.0.113.2", "--json"]).ok()?.json().ok()?.pop();
    wait_for("6 are needed now", || {
        let rules = rule()?["rules"].as_array()?.clone();
        rules.iter().any(|rule| rule["rule"] == "forceful-browsing" && rule["needed"] == 6).then_some(())
    })
    .unwrap();
    world.attack_times(true, 6);
    world.wait_cut_off(true);
    assert_eq!(only_ban(&service, true)["evidence"]["failures"], 6);
    // Refused files are the one thing that may be logged as an error here.
    drop(service);
}

/// Behind Docker, packets to a published port never pass INPUT.
#[test]
fn a_client_of_a_published_container_port_is_cut_off() {
    let world = World::new(Variant::Nft, "");
    let container = Namespace::new().unwrap();
    let bridge = IpAddr::V4(Ipv4Addr::new(172, 18, 0, 0));
    world.server.join(&container, &[bridge]).unwrap();
    container.run("ip", &["route", "add", "default", "via", "172.18.0.1"]).unwrap();
    world.server.run("sysctl", &["-q", "-w", "net.ipv4.ip_forward=1"]).unwrap();
    let dnat = "-t nat -A PREROUTING -d 203.0.113.1 -p tcp --dport 80 -j DNAT --to-destination 172.18.0.2:80";
    world.server.run("iptables-nft", &dnat.split(' ').collect::<Vec<_>>()).unwrap();
    let log = world.folder.path().join("access.log");
    let web = Server::start(&container, &log).unwrap();
    let service = world.start();
    world.attack_times(true, 15);
    assert_eq!((web.requests(), world.web.requests()), (15, 0), "the container answered");
    world.wait_cut_off(true);
    assert_eq!(only_ban(&service, true)["evidence"]["failures"], 15);
    service.stop().unwrap();
}

#[test]
fn a_teardown_leaves_the_firewall_as_it_was() {
    for variant in [Variant::Nft, Variant::Legacy] {
        let world = World::new(variant, "");
        // Tables come into being when they are looked at, which is no change of ours.
        world.firewall();
        for v4 in [true, false] {
            world
                .server
                .run(variant.command(v4), &["-t", "raw", "-A", "PREROUTING", "-i", "none", "-j", "ACCEPT"])
                .unwrap();
        }
        let before = world.firewall();
        let service = world.start();
        world.attack_times(true, 15);
        world.wait_cut_off(true);
        service.stop().unwrap();
        assert_ne!(world.firewall(), before);
        let config = world.folder.path().join("portcullis.toml").display().to_string();
        let binary = tests::portcullis::binary().unwrap().display().to_string();
        world.server.run(&binary, &["enforce", "--teardown", "-c", &config]).unwrap();
        assert_eq!(world.firewall(), before);
        assert_eq!(world.attack(true, "/ok"), Some(200));
    }
}
