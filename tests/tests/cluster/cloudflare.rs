//! Cloudflare is told by one host at a time: what that one leaves half done is done by another, once, and by nobody else.

use std::collections::{BTreeMap, BTreeSet};

use proto::report::Role;
use proto::time::Clock;
use serde_json::{Value, json};
use tests::cloudflare::{Fake, Ours};
use tests::cluster::host::Host;
use tests::cluster::{CONVERGENCE, Cluster, Layout};
use tests::portcullis::wait_until;

use super::burst;

const ZONES: [&str; 2] = ["11111111111111111111111111111111", "22222222222222222222222222222222"];
/// Somebody else lets it pass in the first zone.
const FOREIGN: &str = "203.0.113.3";
/// Where the stand-in listens, on the bridge.
const OUTSIDE: &str = "10.77.0.1";

/// Two hosts that may tell Cloudflare, and a stand-in that knows which of them calls.
struct Scene {
    cluster: Cluster,
    fake: Fake,
    foreign: Vec<Value>,
}

impl Scene {
    fn start() -> Self {
        let layout =
            Layout { nodes: 2, detects: 1, servers: 1, config: "[enforce.firewall]\nbackend = \"none\"\n", bus: "" };
        let mut cluster = Cluster::new(&layout).unwrap();
        let fake = Fake::start(cluster.network.outside(), OUTSIDE).unwrap();
        let rule = |whose: &str, value: &str, notes: &str| json!({"whose": format!("zones/{whose}"), "target": "ip", "value": value, "notes": notes, "mode": "whitelist"});
        let rules = [rule(ZONES[0], FOREIGN, ""), rule(ZONES[1], "198.51.100.1", "portcullis:other:r")];
        fake.control(cluster.network.outside(), &json!({ "rules": rules })).unwrap();
        for edge in &cluster.edges {
            lead_to(edge, fake.address());
            let port = fake.address().rsplit(':').next().unwrap();
            let section = format!(
                "[enforce.cloudflare]\napi_token = \"token\"\ninstallation = \"shop\"\nscope = {{ zones = {ZONES:?} }}\n\
                 api_url = \"http://127.0.0.1:{port}\"\n"
            );
            edge.amend(&section).unwrap();
        }
        cluster.servers.start_all().unwrap();
        cluster.start_roles().unwrap();
        let mut scene = Self { cluster, fake, foreign: Vec::new() };
        scene.foreign = scene.foreign();
        scene
    }

    fn control(&self, wishes: &Value) -> Value {
        self.fake.control(self.cluster.network.outside(), wishes).unwrap()
    }

    /// From now on each call takes so long.
    fn pause(&self, seconds: f64) {
        self.control(&json!({"settings": {"pause": seconds}}));
    }

    fn foreign(&self) -> Vec<Value> {
        let state = self.control(&json!({}));
        let rules = state["rules"].as_object().unwrap().values().flat_map(|rules| rules.as_array().unwrap().clone());
        rules.filter(|rule| !rule["notes"].as_str().unwrap().starts_with("portcullis:shop:")).collect()
    }

    /// How often edge `index` has called.
    fn calls(&self, index: usize) -> u64 {
        let address = self.cluster.edges[index].address().to_string();
        self.control(&json!({}))["callers"][address].as_u64().unwrap_or_default()
    }

    /// The host whose duty it is, and the other one.
    fn holder(&self) -> (usize, usize) {
        let holder = wait_until("a host calls", CONVERGENCE, || (0..2).find(|index| self.calls(*index) > 0)).unwrap();
        (holder, 1 - holder)
    }

    /// These clients offend, and are banned for it.
    fn ban(&self, clients: &BTreeSet<String>) {
        let requests: Vec<_> = clients.iter().flat_map(|client| burst(client.parse().unwrap(), 15)).collect();
        self.cluster.write(0, &requests).unwrap();
    }

    fn free(&self, clients: &BTreeSet<String>) {
        let words: Vec<&str> = ["unban"].into_iter().chain(clients.iter().map(String::as_str)).collect();
        self.cluster.verb(&words).unwrap().expect(0).unwrap();
    }

    fn entries(&self) -> usize {
        let ours = self.fake.ours(self.cluster.network.outside(), "shop").unwrap();
        ours.values().map(BTreeMap::len).sum()
    }

    /// Waits until each of `wanted` is there once, and nothing else of ours; nothing of others was touched.
    fn expect(&self, wanted: &BTreeSet<String>) {
        let of = |zone: &str| {
            let all = wanted.iter().filter(|target| zone != ZONES[0] || *target != FOREIGN);
            all.map(|target| (target.clone(), 1)).collect::<BTreeMap<_, _>>()
        };
        let expected: Ours = ZONES.iter().map(|zone| (format!("zones/{zone}"), of(zone))).collect();
        let mut found = Ours::new();
        let is_so = wait_until("Cloudflare is as desired", CONVERGENCE, || {
            found = self.fake.ours(self.cluster.network.outside(), "shop").ok()?;
            found.retain(|_, entries| !entries.is_empty());
            (found == expected).then_some(())
        });
        assert!(is_so.is_ok(), "{found:?}");
        assert_eq!(self.foreign(), self.foreign);
        let touched = self.control(&json!({}))["touched"].clone();
        let is_ours = |note: &Value| note.as_str().unwrap().starts_with("portcullis:shop:");
        assert!(touched.as_array().unwrap().iter().all(is_ours), "{touched}");
    }

    /// Waits until edge `index` says of Cloudflare that it is `words`.
    fn wait_says(&self, index: usize, words: &str) {
        let name = self.cluster.edges[index].name();
        let says = || {
            let reports = self.cluster.status().ok()?;
            let report = reports.into_iter().find(|report| report.role == Role::Enforce && report.node == name)?;
            let backend = report.backends.into_iter().find(|backend| backend.name == "cloudflare")?;
            backend.detail.iter().any(|detail| detail.contains(words)).then_some(())
        };
        wait_until(&format!("{name} says {words}"), CONVERGENCE, says).unwrap();
    }
}

/// What is said on the host to its loopback comes out at `address`: a key may only be sent in clear on the host itself.
fn lead_to(host: &Host, address: &str) {
    let port = address.rsplit(':').next().unwrap();
    let run = |line: &str| {
        let (program, words) = line.split_once(' ').unwrap();
        host.namespace().run(program, &words.split(' ').collect::<Vec<_>>()).unwrap();
    };
    run("sysctl -q -w net.ipv4.conf.all.route_localnet=1");
    run(&format!("iptables -t nat -A OUTPUT -p tcp -d 127.0.0.1 --dport {port} -j DNAT --to-destination {address}"));
    run("iptables -t nat -A POSTROUTING -o eth0 -j MASQUERADE");
}

fn clients(numbers: std::ops::Range<u8>) -> BTreeSet<String> {
    numbers.map(|last| format!("203.0.113.{last}")).collect()
}

#[test]
fn what_a_killed_host_leaves_half_done_at_cloudflare_is_done_by_another_and_nothing_twice() {
    let mut scene = Scene::start();
    let (holder, other) = scene.holder();
    scene.pause(0.05);
    let mut wanted = clients(1..31);
    scene.ban(&wanted);
    wait_until("some are there", CONVERGENCE, || (scene.entries() >= 7).then_some(())).unwrap();
    scene.cluster.edges[holder].kill(Role::Enforce).unwrap();
    assert!(scene.entries() < 2 * wanted.len() - 1, "it was killed in the middle");
    let begun_at = Clock::system().now();
    wait_until("the other calls", CONVERGENCE, || (scene.calls(other) > 0).then_some(())).unwrap();
    println!("killed: {:?} to the first call of the successor", Clock::system().now().since(begun_at));
    let calls = scene.calls(holder);
    let freed = clients(5..10);
    scene.free(&freed);
    wanted.retain(|target| !freed.contains(target));
    scene.expect(&wanted);
    assert_eq!(scene.calls(holder), calls, "the dead call nobody");

    let reads = scene.calls(other);
    scene.cluster.edges[holder].start(Role::Enforce).unwrap();
    scene.cluster.wait_reported().unwrap();
    let name = scene.cluster.edges[other].name().to_owned();
    scene.wait_says(holder, &format!("done by {name}"));
    scene.expect(&wanted);
    assert_eq!(scene.calls(holder), calls, "who comes back takes nothing away");
    assert!(scene.calls(other) >= reads);
    scene.cluster.end().unwrap();
}

#[test]
fn a_host_that_stood_still_does_not_write_at_cloudflare_beside_its_successor() {
    let scene = Scene::start();
    let (holder, other) = scene.holder();
    let mut wanted = clients(1..6);
    scene.ban(&wanted);
    scene.expect(&wanted);
    scene.pause(1.0);
    let before = scene.calls(holder);
    let more = clients(6..16);
    scene.ban(&more);
    wanted.extend(more);
    // It stops with a call under way, and with many before it.
    wait_until("a call is under way", CONVERGENCE, || (scene.calls(holder) > before).then_some(())).unwrap();
    scene.cluster.edges[holder].signal(Role::Enforce, "STOP").unwrap();
    let calls = scene.calls(holder);
    scene.pause(0.0);
    wait_until("the other calls", CONVERGENCE, || (scene.calls(other) > 0).then_some(())).unwrap();
    scene.expect(&wanted);
    let freed = clients(2..9);
    scene.free(&freed);
    wanted.retain(|target| !freed.contains(target));
    scene.expect(&wanted);

    scene.cluster.edges[holder].signal(Role::Enforce, "CONT").unwrap();
    let name = scene.cluster.edges[other].name().to_owned();
    scene.wait_says(holder, &format!("done by {name}"));
    scene.ban(&clients(40..42));
    wanted.extend(clients(40..42));
    scene.expect(&wanted);
    assert_eq!(scene.calls(holder), calls, "it has made no further call");
    scene.cluster.end().unwrap();
}
