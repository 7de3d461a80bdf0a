//! Leaks, and what only looks like one.

use proto::client_ip::Client;
use proto::event::Text;
use serde_json::json;

use super::super::command::Command;
use super::super::tests::{at, config};
use super::*;

fn after(seconds: i64, millis: i64) -> Timestamp {
    Timestamp::from_millis(at(seconds).as_millis() + millis)
}

struct Bench {
    engine: Engine,
    source: Source,
    commit: u64,
}

impl Bench {
    fn new() -> Self {
        let rule = json!({"match": "Status(`404`)", "max_retry": 3, "find_time": "1m", "ban_time": "10m"});
        let mut engine = Engine::new(config(json!({"rules": {"r": rule}, "never_ban": ["203.0.113.9"]})).engine);
        let source = engine.open(&"edge-1".into(), &"s".into(), None);
        Self { engine, source, commit: 0 }
    }

    /// What has been decided is published now.
    fn publish(&mut self, seconds: i64) {
        self.commit += 1;
        let (turn, mark) = (self.engine.leak_turn(), self.mark());
        self.engine.publish_leaks(turn, mark, at(seconds));
    }

    fn mark(&self) -> Mark {
        Mark { epoch: 1, commit: self.commit }
    }

    /// The firewall of edge-1 has in force what was published.
    fn confirm(&mut self, seconds: i64) {
        let view = HostView { firewall: BackEnd::InForce(Some(self.mark())), ..host("edge-1") };
        self.engine.observe_back_ends(vec![view], at(seconds));
    }

    fn order(&mut self, command: Command, seconds: i64) {
        self.engine.handle_command(command, at(seconds)).unwrap();
    }

    /// An order that is published and confirmed in the same second.
    fn confirmed(&mut self, command: Command, seconds: i64) {
        self.order(command, seconds);
        self.publish(seconds);
        self.confirm(seconds);
    }

    fn leak(&mut self, event: &Event<'_>, arrival: Timestamp) -> Option<Leak> {
        self.engine.handle_timeout(arrival);
        self.engine.handle_event(self.source, event, arrival);
        let mut leaks = std::iter::from_fn(|| self.engine.poll_output())
            .filter_map(|output| if let Output::Leak(leak) = output { Some(*leak) } else { None });
        let leak = leaks.next();
        assert_eq!(leaks.next(), None, "one request, one leak");
        leak
    }

    /// A request that is logged when it begins.
    fn request(&mut self, client: &str, seconds: i64) -> Option<Leak> {
        self.leak(&direct(client, at(seconds)), at(seconds))
    }

    /// A ban of [`CLIENT`] for what it did through a proxy, published and confirmed in the same second.
    fn caught_behind_proxy(&mut self, seconds: i64) {
        for _ in 0..3 {
            let client = Ok(Client { addr: CLIENT.parse().unwrap(), via_proxy: true });
            self.engine.handle_event(
                self.source,
                &Event { client, status: 404, ..direct(CLIENT, at(seconds)) },
                at(seconds),
            );
        }
        self.publish(seconds);
        self.confirm(seconds);
    }

    /// Tells how rules for forwarded clients and Cloudflare are, beside a firewall that has all in force.
    fn observe(&mut self, forwarded: BackEnd, cloudflare: BackEnd, seconds: i64) {
        let firewall = BackEnd::InForce(Some(self.mark()));
        let view = HostView { firewall, forwarded, cloudflare, ..host("edge-1") };
        self.engine.observe_back_ends(vec![view], at(seconds));
    }

    fn counted(&self) -> u64 {
        self.engine.leaks().values().sum()
    }
}

fn host(node: &str) -> HostView {
    HostView { node: node.to_owned(), enforces: true, ..HostView::default() }
}

fn direct(client: &str, began: Timestamp) -> Event<'static> {
    let client = Ok(Client { addr: client.parse().unwrap(), via_proxy: false });
    let text = Text { host: "shop.example.net", path: "/cart", ..Text::default() };
    Event { time: Some(began), client, status: 200, text, ..Event::default() }
}

/// A request through a proxy that a service answered.
fn behind(began: i64, peer: &str) -> Event<'static> {
    let client = Ok(Client { addr: CLIENT.parse().unwrap(), via_proxy: true });
    let text = Text { service: "shop@docker", ..Text::default() };
    Event { client, peer: Some(peer.parse().unwrap()), origin_status: 200, text, ..direct(CLIENT, at(began)) }
}

/// Proxies: Cloudflare's, and one's own.
const PEERS: (&str, &str) = ("104.16.0.1", "10.0.0.5");

fn ban(target: &str) -> Command {
    Command::Ban { target: target.parse().unwrap(), length: None, reason: String::new() }
}

const CLIENT: &str = "192.0.2.7";

#[test]
fn a_request_that_began_after_the_grace_time_is_a_leak_and_told_once_a_minute() {
    let mut bench = Bench::new();
    bench.order(ban("192.0.2.0/24"), 0);
    bench.publish(1);
    bench.confirm(5);
    assert_eq!(bench.leak(&direct(CLIENT, at(7)), at(300)), None, "written late, but it began in time");
    let leak = bench.leak(&direct(CLIENT, after(307, 1)), at(308)).unwrap();
    assert_eq!((leak.keeper, leak.confirmed, leak.node.as_str()), (Keeper::Firewall, true, "edge-1"));
    assert_eq!(
        (leak.target.to_string().as_str(), leak.rule.as_str(), leak.path.as_str()),
        ("192.0.2.0/24", "operator", "/cart")
    );
    assert_eq!(leak.late, Duration::from_millis(302_001));
    assert_eq!(bench.counted(), 0, "not before it is known that nobody lets it pass on purpose");
    assert_eq!(bench.request(CLIENT, 309), None);
    bench.engine.judge_leak(leak.client, false);
    assert_eq!(bench.request(CLIENT, 360), None);
    assert_eq!(bench.counted(), 3);
    let next = bench.request(CLIENT, 368).unwrap();
    assert_eq!(next.untold, 1);
    let text = next.text(&["iptables on edge-1: in set portcullis-v4".to_owned()]);
    assert!(text.contains("192.0.2.7 is banned (operator, as 192.0.2.0/24) and still reached edge-1"), "{text}");
    assert!(text.contains("shop.example.net/cart") && text.contains("Asked now: iptables on edge-1: in set"), "{text}");
    assert_eq!(bench.request("198.51.100.1", 400), None, "who is not banned leaks nothing");
}

#[test]
fn what_cannot_be_known_is_no_leak() {
    let mut bench = Bench::new();
    assert_eq!(bench.request(CLIENT, 0), None);
    bench.order(ban(CLIENT), 0);
    assert_eq!(bench.request(CLIENT, 100), None, "nothing is published");
    bench.publish(100);
    assert_eq!(bench.request(CLIENT, 200), None, "nothing was heard of any back end");
    bench.confirm(200);
    assert_eq!(bench.leak(&Event { time: None, ..direct(CLIENT, at(0)) }, at(300)), None, "no time");
    assert_eq!(bench.leak(&direct(CLIENT, at(302)), at(301)), None, "of a clock that is ahead");
    let firewall = BackEnd::InForce(Some(bench.mark()));
    let ahead = Duration::from_secs(105);
    bench.engine.observe_back_ends(vec![HostView { firewall, ahead, ..host("edge-1") }], at(301));
    assert_eq!(bench.request(CLIENT, 306), None, "it began at 201 in truth");
    assert!(bench.request(CLIENT, 309).is_some());
}

#[test]
fn a_ban_that_was_lifted_for_a_moment_is_to_be_confirmed_anew() {
    let mut bench = Bench::new();
    bench.confirmed(ban(CLIENT), 0);
    assert!(bench.request(CLIENT, 10).is_some());
    bench.confirmed(Command::Unban(vec![CLIENT.parse().unwrap()]), 100);
    assert_eq!(bench.request(CLIENT, 110), None, "free");
    bench.order(ban(CLIENT), 120);
    bench.publish(120);
    assert_eq!(bench.request(CLIENT, 140), None, "not confirmed");
    bench.confirm(140);
    assert_eq!(bench.request(CLIENT, 142), None);
    assert!(bench.request(CLIENT, 143).is_some());

    bench.confirmed(Command::Pause(None), 200);
    assert_eq!(bench.request(CLIENT, 210), None, "paused");
    bench.order(Command::Resume, 220);
    bench.publish(220);
    assert_eq!(bench.request(CLIENT, 225), None, "the end of the pause is not confirmed");
    bench.confirm(230);
    assert_eq!(bench.request(CLIENT, 232), None);
    assert!(bench.request(CLIENT, 233).is_some());

    // A host that lifts all bans by itself, and puts them back.
    bench.engine.observe_back_ends(vec![HostView { firewall: BackEnd::Idle, ..host("edge-1") }], at(300));
    assert_eq!(bench.request(CLIENT, 310), None);
    bench.confirm(320);
    assert_eq!(bench.request(CLIENT, 322), None);
    assert!(bench.request(CLIENT, 323).is_some());
}

#[test]
fn whom_nobody_may_ban_leaks_nothing_and_whom_a_host_spares_is_not_asked_after_all_the_time() {
    let mut bench = Bench::new();
    bench.confirmed(ban("203.0.113.0/24"), 0);
    assert_eq!(bench.request("203.0.113.9", 100), None, "in never_ban");
    let leak = bench.request("203.0.113.8", 100).unwrap();
    assert_eq!(bench.request("203.0.113.8", 101), None);
    bench.engine.judge_leak(leak.client, true);
    assert_eq!(bench.request("203.0.113.8", 300), None);
    assert_eq!(bench.counted(), 0);
    assert!(bench.request("203.0.113.8", 701).is_some(), "asked again");
    bench.confirmed(Command::Allow { target: "203.0.113.7".parse().unwrap(), length: None }, 800);
    assert_eq!(bench.request("203.0.113.7", 900), None, "allowed");
}

#[test]
fn a_host_that_does_not_confirm_is_named_and_one_where_nothing_enforces() {
    let mut bench = Bench::new();
    bench.confirmed(ban("192.0.2.1"), 0);
    bench.order(ban(CLIENT), 100);
    bench.publish(100);
    assert_eq!(bench.request(CLIENT, 132), None, "it may take a moment");
    let leak = bench.request(CLIENT, 133).unwrap();
    assert_eq!((leak.keeper, leak.confirmed), (Keeper::Firewall, false));
    assert!(leak.text(&[]).contains("The firewall of edge-1 could have seen it: edge-1 has not confirmed the ban"));
    // Another host without an enforcer of its name, and one whose enforcer has no firewall.
    let firewall = BackEnd::InForce(Some(bench.mark()));
    bench.engine.observe_back_ends(vec![HostView { firewall, ..host("edge-2") }, host("edge-3")], at(140));
    let leak = bench.request(CLIENT, 193).unwrap();
    assert_eq!(leak.keeper, Keeper::NoEnforcer);
    assert_eq!(bench.request("192.0.2.1", 194), None, "it is the same for all clients of the node");
    bench.source = bench.engine.open(&"edge-3".into(), &"s".into(), None);
    let leak = bench.request("192.0.2.1", 260).unwrap();
    assert_eq!(leak.keeper, Keeper::NoFirewall);
    assert!(leak.text(&[]).contains("No back end could have seen it: enforce.firewall.backend is \"none\" on edge-3"));
    bench.source = bench.engine.open(&"edge-1".into(), &"s".into(), None);
    assert!(bench.request(CLIENT, 793).is_some(), "told again after ten minutes");
    assert!(bench.engine.leaks().keys().all(|(_, word)| ["none", "firewall"].contains(word)));
}

#[test]
fn behind_a_proxy_only_what_reached_a_service_counts_and_who_could_see_it_is_named() {
    let mut bench = Bench::new();
    bench.caught_behind_proxy(0);
    let (cloudflare, own) = PEERS;
    let refused = Event { text: Text::default(), origin_status: 0, ..behind(61, cloudflare) };
    assert_eq!(bench.leak(&refused, at(61)), None, "Traefik answered it itself");
    assert_eq!(bench.leak(&behind(60, cloudflare), at(60)), None, "within the grace time");
    let leak = bench.leak(&behind(61, cloudflare), at(61)).unwrap();
    assert_eq!(leak.keeper, Keeper::BehindProxy);
    assert!(leak.text(&[]).contains("No back end could have seen it: it comes through a proxy, and nothing"));

    let mark = BackEnd::InForce(Some(bench.mark()));
    bench.observe(mark, BackEnd::InForce(None), 100);
    assert_eq!(bench.leak(&behind(122, own), at(122)).unwrap().keeper, Keeper::Forwarded);
    let leak = bench.leak(&behind(200, cloudflare), at(200)).unwrap();
    assert_eq!((leak.keeper, leak.confirmed), (Keeper::Forwarded, true), "who has confirmed the ban has to answer");
    assert_eq!(leak.seers, [Keeper::Cloudflare, Keeper::Forwarded], "both are named");
    bench.observe(BackEnd::Absent, mark, 300);
    assert_eq!(bench.leak(&behind(360, cloudflare), at(360)), None);
    let leak = bench.leak(&behind(361, cloudflare), at(361)).unwrap();
    assert_eq!((leak.keeper, leak.confirmed, leak.seers.len()), (Keeper::Cloudflare, true, 1));
    bench.observe(mark, mark, 400);
    let leak = bench.leak(&behind(461, cloudflare), at(461)).unwrap();
    assert_eq!((leak.keeper, leak.confirmed), (Keeper::Cloudflare, true), "it sees it first");
}

#[test]
fn since_when_back_ends_have_a_ban_in_force_is_known_by_host() {
    let mut bench = Bench::new();
    bench.confirmed(ban("192.0.2.0/24"), 0);
    bench.order(ban(CLIENT), 100);
    bench.publish(100);
    let known = |bench: &Bench, client: &str| bench.engine.confirmations(client.parse().unwrap());
    assert_eq!(known(&bench, "192.0.2.8"), [(("edge-1".to_owned(), Keeper::Firewall), at(0))].into());
    bench.observe(BackEnd::Absent, BackEnd::InForce(Some(bench.mark())), 130);
    let cloudflare = ((String::new(), Keeper::Cloudflare), at(130));
    let first = [(("edge-1".to_owned(), Keeper::Firewall), at(0)), cloudflare].into();
    assert_eq!(known(&bench, CLIENT), first, "of several bans the first counts");
    assert_eq!(known(&bench, "198.51.100.1"), Confirmations::new());
}

#[test]
fn a_request_that_was_reset_on_its_way_to_the_service_has_reached_nobody() {
    let mut bench = Bench::new();
    bench.caught_behind_proxy(0);
    let mark = BackEnd::InForce(Some(bench.mark()));
    let (cloudflare, own) = PEERS;
    // As Traefik 3.7 logs it, and where that field is dropped.
    let whole = |began, peer| Event { status: 502, origin_status: 502, ..behind(began, peer) };
    let dropped = |began, peer| Event { status: 502, origin_status: 0, ..behind(began, peer) };
    bench.observe(mark, mark, 1);
    for (began, peer) in [(100, cloudflare), (200, own)] {
        assert_eq!(bench.leak(&whole(began, peer), at(began)), None);
        assert_eq!(bench.leak(&dropped(began, peer), at(began)), None);
    }
    let other_page = Event { status: 200, origin_status: 502, ..behind(201, own) };
    assert_eq!(bench.leak(&other_page, at(201)), None, "Traefik's middleware made a page of it");
    assert_eq!(bench.leak(&behind(202, own), at(202)).unwrap().keeper, Keeper::Forwarded);
    bench.observe(BackEnd::Absent, BackEnd::Absent, 300);
    assert_eq!(bench.leak(&whole(400, own), at(400)).unwrap().keeper, Keeper::BehindProxy, "nobody resets here");
}

#[test]
fn where_forwarded_clients_are_let_pass_on_purpose_nobody_advises_to_refuse_them() {
    let mut bench = Bench::new();
    bench.caught_behind_proxy(0);
    bench.observe(BackEnd::Idle, BackEnd::Absent, 1);
    assert_eq!(bench.leak(&behind(100, PEERS.1), at(100)), None);
    bench.observe(BackEnd::Absent, BackEnd::Absent, 101);
    assert!(bench.leak(&behind(200, PEERS.1), at(200)).is_some());
}

#[test]
fn rules_for_forwarded_clients_answer_only_for_bans_that_came_through_a_proxy() {
    let mut bench = Bench::new();
    bench.confirmed(ban("192.0.2.0/24"), 0);
    let mark = BackEnd::InForce(Some(bench.mark()));
    bench.observe(mark, BackEnd::Absent, 1);
    let leak = bench.leak(&behind(100, PEERS.1), at(100)).unwrap();
    assert_eq!((leak.keeper, leak.confirmed), (Keeper::NoEvidence, false));
    assert!(leak.text(&[]).contains("refuses only clients whose ban says that a proxy delivered them"));
    // Within that network a client has a ban of its own.
    bench.caught_behind_proxy(200);
    let mark = BackEnd::InForce(Some(bench.mark()));
    bench.observe(mark, BackEnd::Absent, 201);
    let leak = bench.leak(&behind(300, PEERS.1), at(300)).unwrap();
    assert_eq!((leak.keeper, leak.confirmed, leak.rule.as_str()), (Keeper::Forwarded, true, "r"));
}

#[test]
fn in_an_attack_few_are_told_and_all_are_counted() {
    let mut bench = Bench::new();
    bench.confirmed(ban("192.0.0.0/16"), 0);
    let client = |n: i64| format!("192.0.{}.{}", n / 250, n % 250);
    let told: Vec<Leak> = (0..1000).filter_map(|n| bench.request(&client(n), 100)).collect();
    assert_eq!(told.len(), TOLD_MAX);
    told.iter().for_each(|leak| bench.engine.judge_leak(leak.client, false));
    assert_eq!(bench.counted(), 1000);
    let next = bench.request(&client(999), 160).unwrap();
    assert_eq!(next.untold, 990);
    assert!(next.text(&[]).contains("990 more requests passed"));
}

#[test]
fn a_ban_near_its_end_and_one_that_ended_leak_nothing_and_the_next_one_begins_anew() {
    let mut bench = Bench::new();
    let length = Some(Duration::from_secs(60));
    let short = || Command::Ban { target: CLIENT.parse().unwrap(), length, reason: String::new() };
    bench.confirmed(short(), 0);
    assert_eq!(bench.leak(&direct(CLIENT, after(59, 1)), after(59, 1)), None);
    assert_eq!(bench.request(CLIENT, 70), None);
    bench.order(short(), 80);
    bench.publish(80);
    assert_eq!(bench.request(CLIENT, 90), None, "not confirmed");
    bench.confirm(90);
    assert!(bench.request(CLIENT, 93).is_some());
}

#[test]
fn lines_that_are_read_again_after_a_restart_leak_nothing() {
    use proto::event::{AccessBatch, FileSpan};
    let mut bench = Bench::new();
    bench.confirmed(ban(CLIENT), 0);
    let mut batch = AccessBatch::new("edge-1".into(), "s".into(), at(100));
    batch.push(&direct(CLIENT, at(100)));
    batch.span = Some(FileSpan { generation: 7, start: 0, end: 100 });
    let leaks = |engine: &mut Engine, now: i64| {
        engine.handle_batch(&batch, at(now));
        std::iter::from_fn(|| engine.poll_output()).filter(|output| matches!(output, Output::Leak(_))).count()
    };
    assert_eq!(leaks(&mut bench.engine, 100), 1);
    assert_eq!(leaks(&mut bench.engine, 200), 0, "sent twice");
    let (config, snapshot) = (bench.engine.config().clone(), bench.engine.snapshot());
    bench.engine = Engine::restore(config, snapshot, at(300));
    bench.publish(300);
    bench.confirm(300);
    assert_eq!(leaks(&mut bench.engine, 301), 0);
}
