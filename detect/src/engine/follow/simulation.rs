//! A seeded simulation of a cluster: detectors that are killed, deposed, followed and started anew must agree after every
//! step with a twin that leads all the time, and must tell the world of the same bans.
//!
//! `FOLLOW_SEED=n cargo test -p detect cluster` repeats one seed, `FOLLOW_SEEDS=n` runs more of them.

mod shared;

use super::*;
use crate::engine::Output;
use crate::engine::command::Command;
use crate::engine::simulation::{Banned, Histories, Random, check_invariants, command, essence, rules};
use crate::engine::tests::{at, config};

use shared::{Commit, Log, Store};

const SEEDS: u64 = 150;
const STEPS: usize = 80;
const STANDBYS: usize = 2;

/// Beside windows a leaky bucket and a shadow rule: a log keeps the order on which these hang.
fn cluster_rules(variant: u64) -> EngineConfig {
    let more = serde_json::json!({
        "d": {"match": "Status(`500`)", "rate": "6/m", "burst": 3, "ban_time": "2m"},
        "e": {"match": "Status(`404`)", "max_retry": 2, "find_time": "20s", "ban_time": "30s", "mode": "shadow"},
    });
    let escalation = serde_json::json!({"max": "10m", "forget_after": "5m"});
    let more = config(serde_json::json!({"rules": more, "escalation": escalation})).engine.rules;
    let mut config = rules(variant);
    config.rules.extend(more.into_iter().filter(|rule| ["d", "e"].contains(&&*rule.name)));
    config
}

struct Detector {
    engine: Engine,
    /// Sequence of the newest batch that was handled.
    read: u64,
    /// The revision of the shared state that this one knows.
    revision: usize,
}

impl Detector {
    fn start(config: EngineConfig, store: &Store, log: &Log) -> Self {
        let (floor, arrival) = store.floor();
        let since = arrival.saturating_sub(config.horizon());
        let before = log.batches.iter().take_while(|(_, stamp)| *stamp < since).count() as u64;
        let engine = Engine::follow(config, store.snapshot(), Position::after_batch(floor), arrival);
        let mut detector = Self { engine, read: before.min(floor), revision: store.commits.len() };
        detector.read_to(log, floor);
        detector
    }

    fn read_to(&mut self, log: &Log, end: u64) {
        while self.read < end {
            let (batch, stamp) = &log.batches[self.read as usize];
            self.read += 1;
            self.engine.handle_logged(batch, self.read, *stamp);
        }
    }

    /// Follows `commits` more commits; the last thing read may be delivered twice.
    fn follow(&mut self, store: &Store, log: &Log, commits: usize, twice: bool) {
        let end = store.commits.len().min(self.revision.saturating_add(commits));
        for commit in &store.commits[self.revision..end] {
            for _ in 0..=usize::from(twice) {
                self.follow_commit(commit);
                self.read_to(log, commit.floor);
                self.engine.raise_floor(Position::after_batch(commit.floor));
            }
            if twice && self.read > 0 {
                let (batch, stamp) = &log.batches[self.read as usize - 1];
                self.engine.handle_logged(batch, self.read, *stamp);
            }
        }
        self.revision = end;
        assert!(self.outputs().is_empty(), "a standby does nothing");
    }

    fn follow_commit(&mut self, commit: &Commit) {
        for (target, decided) in &commit.decided {
            if let Some(record) = &decided.record {
                self.engine.follow_record(record.clone());
            }
            if let Some(offender) = &decided.offender {
                self.engine.follow_offender(*target, offender.clone());
            }
        }
        if let Some(control) = &commit.control {
            self.engine.follow_control(control);
        }
    }

    fn outputs(&mut self) -> Vec<Output> {
        std::iter::from_fn(|| self.engine.poll_output()).collect()
    }

    /// What was decided since the last commit, cut into `pieces`. Only the last moves the floor.
    fn commits(&mut self, store: &Store, pieces: usize) -> Vec<Commit> {
        let mut last = Commit { floor: self.read, arrival: self.engine.log_arrival(), ..Commit::default() };
        for output in self.outputs() {
            match output {
                Output::Record(change) => {
                    last.decided.entry(change.target()).or_default().record = Some(change.clone());
                }
                Output::Offender(target, known) => last.decided.entry(target).or_default().offender = Some(known),
                Output::Told(kind, ban) => last.decided.entry(ban.target).or_default().told.push((Some(kind), *ban)),
                Output::Over(ban) => last.decided.entry(ban.target).or_default().told.push((None, *ban)),
                Output::Control => last.control = Some(self.engine.control()),
                Output::Shadow(_) | Output::Leak(_) | Output::Alarm { .. } => {}
            }
        }
        let mut commits = Vec::new();
        for _ in 1..pieces {
            let size = last.decided.len().div_ceil(pieces);
            let Some(cut) = last.decided.keys().nth(size).copied() else { break };
            let rest = last.decided.split_off(&cut);
            let (floor, arrival) = store.floor();
            commits.push(Commit { floor, arrival, control: None, decided: std::mem::replace(&mut last.decided, rest) });
        }
        commits.push(last);
        commits
    }

    /// Commits the first `pieces` of what was decided in `of`. Whether nobody else has committed meanwhile.
    fn commit(&mut self, store: &mut Store, pieces: usize, of: usize) -> bool {
        for commit in self.commits(store, of).into_iter().take(pieces) {
            if !store.commit(self.revision, commit) {
                return false;
            }
            self.revision += 1;
        }
        true
    }
}

struct Cluster {
    store: Store,
    active: Detector,
    standbys: Vec<Detector>,
}

impl Cluster {
    fn new(log: &Log) -> Self {
        let store = Store::default();
        let mut active = Detector::start(cluster_rules(0), &store, log);
        active.engine.lead(at(0));
        Self { store, active, standbys: Vec::new() }
    }

    /// A standby that knows everything, or one started for it, takes over. Its predecessor is what this returns.
    fn promote(&mut self, log: &Log, random: &mut Random, now: Timestamp) -> Detector {
        let config = self.active.engine.config().clone();
        let chosen = random.below(STANDBYS as u64 + 1) as usize;
        let mut next = match self.standbys.len() {
            len if chosen < len => self.standbys.swap_remove(chosen),
            _ => Detector::start(config, &self.store, log),
        };
        next.follow(&self.store, log, usize::MAX, random.below(4) == 0);
        next.engine.set_present(now);
        next.engine.lead(now);
        std::mem::replace(&mut self.active, next)
    }

    /// Works off the log, with all that can happen to a detector, and commits.
    fn work(&mut self, log: &Log, random: &mut Random, now: Timestamp) {
        self.active.engine.set_present(now);
        while self.active.read < log.end() {
            let ahead = 1 + random.below(log.end() - self.active.read);
            self.active.read_to(log, self.active.read + ahead);
            let (of, fate) = (1 + random.below(4) as usize, random.below(16));
            match fate {
                // Killed before the commit, in the midst of it or right after it.
                0..=2 => {
                    let done = [0, random.below(of as u64) as usize, of][fate as usize];
                    assert!(self.active.commit(&mut self.store, done, of));
                    drop(self.promote(log, random, now));
                }
                // Deposed without knowing: of two that lead, the first to commit goes on, the other's work is lost.
                3 | 4 => {
                    let mut rival = self.promote(log, random, now);
                    rival.read_to(log, log.end());
                    self.active.read_to(log, log.end());
                    if fate == 3 {
                        std::mem::swap(&mut rival, &mut self.active);
                    }
                    assert!(self.active.commit(&mut self.store, of, of), "the first is accepted");
                    assert!(!rival.commit(&mut self.store, of, of), "the second is refused");
                }
                _ => assert!(self.active.commit(&mut self.store, of, of)),
            }
            self.follow(log, random);
        }
        assert!(self.active.commit(&mut self.store, 1, 1));
    }

    /// Standbys follow as they can, and others are started in the place of those that went.
    fn follow(&mut self, log: &Log, random: &mut Random) {
        if self.standbys.len() < STANDBYS && random.below(2) == 0 {
            let config = self.active.engine.config().clone();
            self.standbys.push(Detector::start(config, &self.store, log));
        }
        for standby in &mut self.standbys {
            standby.follow(&self.store, log, random.below(4) as usize, random.below(4) == 0);
        }
    }

    fn command(&mut self, command: &Command, now: Timestamp) -> String {
        let answer = self.active.engine.handle_command(command.clone(), now);
        assert!(self.active.commit(&mut self.store, 1, 1));
        format!("{answer:?}")
    }

    fn reload(&mut self, command: &Command, now: Timestamp) {
        for standby in &mut self.standbys {
            standby.engine.handle_command(command.clone(), now).unwrap();
            standby.outputs();
        }
        self.command(command, now);
    }
}

/// Bans and histories. When a history is forgotten that counts no more hangs on when timers run, so none of those.
fn lasting_essence(engine: &Engine) -> (Banned, Histories) {
    let (bans, mut offenders) = essence(engine);
    let config = engine.config();
    let forget = config.rules.iter().map(|rule| rule.escalation.forget_after).max().unwrap_or_default();
    let since = engine.log_arrival().saturating_sub(forget + config.lateness_max);
    for (_, rules) in &mut offenders {
        rules.retain(|(_, _, end)| since <= *end);
    }
    (bans, offenders)
}

struct World {
    random: Random,
    log: Log,
    easy: Cluster,
    hard: Cluster,
    seconds: i64,
    variant: u64,
}

impl World {
    fn new(seed: u64) -> Self {
        let log = Log::default();
        let (easy, hard) = (Cluster::new(&log), Cluster::new(&log));
        Self { random: Random(seed), log, easy, hard, seconds: 1000, variant: 0 }
    }

    fn step(&mut self, outages: bool) {
        let random = &mut self.random;
        match random.below(100) {
            0..=69 => self.grow(outages),
            70..=79 => self.seconds += random.below(40) as i64,
            80..=82 => self.seconds += random.below(400) as i64,
            83..=90 => {
                let (command, now) = (command(random), at(self.seconds));
                assert_eq!(self.easy.command(&command, now), self.hard.command(&command, now));
            }
            91..=93 => {
                self.variant = 1 - self.variant;
                let reload = Command::Reload { config: Box::new(cluster_rules(self.variant)), names: Vec::new() };
                self.easy.reload(&reload, at(self.seconds));
                self.hard.reload(&reload, at(self.seconds));
                // What a changed rule had counted is dropped by a reload, and would be counted again by a cold start.
                self.seconds += 300;
            }
            _ => drop(self.hard.promote(&self.log, random, at(self.seconds))),
        }
    }

    /// The log grows; where there are outages, the cluster may be away for a while.
    fn grow(&mut self, outages: bool) {
        let steps = if outages && self.random.below(8) == 0 { self.random.below(20) } else { 0 };
        for _ in 0..=steps {
            let now = at(self.seconds);
            // Stamps step back now and then, but not so far that something ends in between.
            let skew = self.random.below(3);
            if skew > 0 {
                self.easy.active.engine.handle_timeout(now);
                self.hard.active.engine.handle_timeout(now);
            }
            for _ in 0..=self.random.below(4) {
                self.log.grow(&mut self.random, self.seconds, skew);
            }
            self.easy.active.engine.set_present(now);
            self.easy.active.read_to(&self.log, self.log.end());
            assert!(self.easy.active.commit(&mut self.easy.store, 1, 1));
            if steps > 0 {
                self.seconds += self.random.below(60) as i64;
                check_invariants(&mut self.easy.active.engine, at(self.seconds));
            }
        }
        self.hard.work(&self.log, &mut self.random, at(self.seconds));
    }

    fn check(&mut self, exactly: bool, name: &str) {
        let now = at(self.seconds);
        for cluster in [&mut self.easy, &mut self.hard] {
            check_invariants(&mut cluster.active.engine, now);
            assert!(cluster.active.commit(&mut cluster.store, 1, 1));
        }
        assert_eq!(lasting_essence(&self.hard.active.engine), lasting_essence(&self.easy.active.engine), "{name}");
        // How a ban was told hangs on when it was found, so that is compared only where nobody was ever late.
        let told = |store: &Store| -> Vec<(String, &str)> {
            let how = |kind: &'static str| if exactly { kind } else { "" };
            store.told.iter().map(|(ban, kind)| (ban.clone(), how(kind))).collect()
        };
        assert_eq!(told(&self.hard.store), told(&self.easy.store), "{name}");
    }
}

fn simulate(seed: u64) {
    let mut world = World::new(seed);
    let outages = seed % 4 == 3;
    for step in 0..STEPS {
        world.step(outages);
        world.check(!outages, &format!("seed {seed} step {step}"));
    }
    // Each standby, and one that starts now, leads for a while.
    for successor in 0..=STANDBYS {
        world.hard.standbys.truncate(STANDBYS - successor);
        drop(world.hard.promote(&world.log, &mut world.random, at(world.seconds)));
        for step in 0..4 {
            world.grow(false);
            world.check(!outages, &format!("seed {seed} successor {successor} step {step}"));
        }
    }
}

#[test]
fn a_cluster_of_mortal_detectors_decides_like_one_that_never_dies() {
    if let Ok(seed) = std::env::var("FOLLOW_SEED") {
        return simulate(seed.parse().unwrap());
    }
    let seeds = std::env::var("FOLLOW_SEEDS").map_or(SEEDS, |seeds| seeds.parse().unwrap());
    for seed in 0..seeds {
        simulate(seed);
    }
}
