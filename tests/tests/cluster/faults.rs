//! Random faults under random load: nothing is lost and nothing doubled, whatever fails.
//!
//! `CLUSTER_SEED` repeats a run as far as the choices go, `CLUSTER_ROUNDS` makes it longer or shorter.

use proto::report::Role;
use proto::time::Clock;
use tests::brute::{Rule, built_in_rules};
use tests::cluster::fault::Fault;
use tests::cluster::offence::Offences;
use tests::cluster::truth::Truth;
use tests::cluster::{CONVERGENCE, Cluster, Layout};
use tests::portcullis::wait_until;
use tests::random::Random;

/// No ban ends while the test lasts.
const LONG_BANS: &str = "[detect.rules.forceful-browsing]\nban_time = \"2h\"\n";
/// New clients in each round, twice.
const CLIENTS: usize = 8;

fn rule() -> Rule {
    let rule = built_in_rules().into_iter().find(|rule| rule.name == "forceful-browsing").unwrap();
    Rule { ban: 12 * rule.ban, ..rule }
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.parse().unwrap())
}

fn layout() -> Layout {
    Layout { config: LONG_BANS, ..Layout::default() }
}

/// A cluster under load.
struct Trial {
    cluster: Cluster,
    offences: Offences,
}

impl Trial {
    fn new(seed: u64) -> Self {
        let cluster = Cluster::start(&layout()).unwrap();
        let offences = Offences::new(seed, cluster.edges.len());
        Self { cluster, offences }
    }

    /// New clients begin, and so many per cent of what is to be written is written.
    fn feed(&mut self, percent: u64) {
        self.offences.add(CLIENTS, Clock::system().now().as_nanos());
        self.write(percent);
    }

    fn write(&mut self, percent: u64) {
        for (node, accesses) in self.offences.take(percent).iter().enumerate() {
            self.cluster.write(node, accesses).unwrap();
        }
    }

    /// While `fault` lasts, a host that it spares goes on banning.
    fn prove_service(&mut self, fault: &Fault) {
        let node = self.cluster.edges.iter().position(|edge| fault.spares(edge.name())).unwrap();
        let (requests, target) = self.offences.plain(Clock::system().now().as_nanos());
        self.cluster.write(node, &requests).unwrap();
        let banned = || self.cluster.edges[node].banned().ok()?.contains_key(&target).then_some(());
        let what = format!("{} bans during {fault:?}", self.cluster.edges[node].name());
        wait_until(&what, CONVERGENCE, banned).unwrap();
    }

    fn suffer(&mut self, faults: &[Fault]) {
        self.feed(50);
        for fault in faults {
            fault.inflict(&mut self.cluster).unwrap();
            self.feed(60);
        }
        if let [fault] = faults
            && fault.leaves_service()
        {
            self.prove_service(fault);
        }
        for fault in faults {
            fault.heal(&mut self.cluster).unwrap();
            self.write(70);
        }
        self.cluster.servers.wait_ready().unwrap();
        self.write(100);
        self.compare();
    }

    /// Returns the errors that were told of the faults; nobody may have panicked.
    fn end(self) -> String {
        let errors = self.cluster.errors().unwrap();
        self.cluster.end().unwrap();
        errors.join("\n")
    }

    fn compare(&self) {
        Truth::of(&self.cluster, &rule()).unwrap().check(&self.cluster).unwrap();
    }
}

#[test]
fn whatever_fails_no_ban_is_lost_and_none_is_doubled() {
    let (seed, rounds) = (setting("CLUSTER_SEED", 1), setting("CLUSTER_ROUNDS", 5));
    println!("CLUSTER_SEED={seed} CLUSTER_ROUNDS={rounds}");
    let mut random = Random::new(seed);
    let mut trial = Trial::new(seed);
    for round in 1..=rounds {
        let count = if random.chance(70) { 1 } else { 2 };
        let faults: Vec<Fault> = (0..count).map(|_| Fault::choose(&mut random, &trial.cluster).unwrap()).collect();
        println!("round {round}: {faults:?}");
        trial.suffer(&faults);
    }
    println!("{}", trial.end());
}

#[test]
fn every_link_can_be_cut_and_heals() {
    let mut trial = Trial::new(4);
    for cuts in Fault::every_cut(&trial.cluster) {
        println!("{cuts:?}");
        trial.suffer(&cuts);
    }
    println!("{}", trial.end());
}

#[test]
fn every_role_and_every_server_can_be_killed() {
    let mut trial = Trial::new(5);
    for kills in Fault::every_kill(&trial.cluster) {
        println!("{kills:?}");
        trial.suffer(&kills);
    }
    println!("{}", trial.end());
}

/// Frozen until the servers have given it up, and everything that it had in hand is old.
#[test]
fn a_detect_that_was_frozen_past_its_lease_changes_nothing_when_it_goes_on() {
    let mut trial = Trial::new(2);
    for _ in 0..2 {
        let active = wait_until("a detect is active", CONVERGENCE, || trial.cluster.active_detect()).unwrap();
        let frozen = trial.cluster.detects[active].name().to_owned();
        let fault = Fault::Freeze(frozen.clone());
        // Lines that it is just working on.
        trial.feed(50);
        fault.inflict(&mut trial.cluster).unwrap();
        trial.feed(60);
        let client = format!("portcullis detect {frozen}");
        let gone = || (!trial.cluster.servers.has_client(&client)).then_some(());
        wait_until("the servers give it up", CONVERGENCE, gone).unwrap();
        let committed = || trial.cluster.head().ok().filter(|head| head.node != frozen);
        let successor = wait_until("its successor commits", CONVERGENCE, committed).unwrap();
        fault.heal(&mut trial.cluster).unwrap();
        trial.write(100);
        trial.compare();
        trial.cluster.wait_reported().unwrap();
        let head = trial.cluster.head().unwrap();
        assert_eq!((head.node, head.mark.epoch), (successor.node, successor.mark.epoch), "nobody took over again");
    }
    println!("{}", trial.end());
}

#[test]
fn bans_stay_while_every_nats_server_is_down_and_what_was_written_meanwhile_counts() {
    let mut trial = Trial::new(3);
    trial.feed(100);
    trial.compare();
    let before = trial.cluster.kernels().unwrap();
    Fault::KillAllServers.inflict(&mut trial.cluster).unwrap();
    trial.feed(100);
    // An enforcer that starts now has nobody to ask.
    trial.cluster.edges[0].kill(Role::Enforce).unwrap();
    trial.cluster.edges[0].start(Role::Enforce).unwrap();
    let starts = || trial.cluster.edges[0].log_text(Role::Enforce).lines().count();
    let lines = starts();
    wait_until("the enforcer says that it started", CONVERGENCE, || (starts() > lines).then_some(())).unwrap();
    assert_eq!(trial.cluster.kernels().unwrap(), before);
    Fault::KillAllServers.heal(&mut trial.cluster).unwrap();
    trial.cluster.servers.wait_ready().unwrap();
    trial.compare();
    println!("{}", trial.end());
}

#[test]
fn a_ban_ends_on_time_while_every_nats_server_is_down() {
    let mut cluster = Cluster::start(&Layout { nodes: 2, detects: 1, servers: 1, ..Layout::default() }).unwrap();
    let verb = |words: &[&str]| cluster.verb(words).unwrap().expect(0).unwrap();
    verb(&["ban", "203.0.113.7", "--for", "8s"]);
    verb(&["ban", "203.0.113.8"]);
    super::wait_banned(&cluster, &["203.0.113.7", "203.0.113.8"]);
    Fault::KillAllServers.inflict(&mut cluster).unwrap();
    super::wait_banned(&cluster, &["203.0.113.8"]);
    Fault::KillAllServers.heal(&mut cluster).unwrap();
    cluster.servers.wait_ready().unwrap();
    let lifted = || cluster.verb(&["unban", "203.0.113.8"]).ok().filter(|answer| answer.code == 0).map(drop);
    wait_until("orders are taken again", CONVERGENCE, lifted).unwrap();
    super::wait_banned(&cluster, &[]);
    cluster.end().unwrap();
}
