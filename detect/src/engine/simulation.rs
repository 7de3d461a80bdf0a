//! A seeded simulation: an engine that is killed, fed twice and reloaded must agree after every step with a twin that
//! lives an easy life.
//!
//! `SIMULATION_SEED=n cargo test -p detect simulation` repeats one seed, `SIMULATION_SEEDS=n` runs more of them.

use std::collections::BTreeSet;

use proto::ban::Evidence;
use proto::event::FileSpan;

use super::command::Command;
use super::offender::Offender;
use super::tests::{at, config, event};
use super::*;

const SEEDS: u64 = 150;
const STEPS: usize = 250;
pub(super) const LINE_BYTES: u64 = 100;

/// SplitMix64.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }
}

#[derive(Clone, Copy)]
pub(super) struct Line {
    client: u64,
    seconds: i64,
    status: u16,
}

impl Line {
    /// Written at `seconds`: sometimes late, seldom ahead of time.
    pub(super) fn random(random: &mut Random, seconds: i64) -> Self {
        let age = if random.below(10) == 0 { random.below(120) } else { random.below(3) } as i64;
        let ahead = if random.below(40) == 0 { 50 } else { 0 };
        let status = [200, 404, 404, 500][random.below(4) as usize];
        Self { client: random.below(10), seconds: seconds - age + ahead, status }
    }

    pub(super) fn event(&self) -> Event<'static> {
        event(&client(self.client), self.seconds, self.status)
    }
}

/// Two log files of one node, and how far each engine has read them.
#[derive(Default)]
struct Files {
    lines: [Vec<Line>; 2],
}

pub(super) fn rules(variant: u64) -> EngineConfig {
    let max_retry = 3 + variant;
    let rules = serde_json::json!({
        "a": {"match": "Status(`404`)", "max_retry": max_retry, "find_time": "30s", "ban_time": "20s"},
        "b": {"match": "Status(`400-599`)", "max_retry": 6, "find_time": "2m", "ban_time": "1m", "escalation": {"multipliers": [1, 3]}},
        "c": {"match": "Status(`500`)", "max_retry": 2, "find_time": "10s", "ban_time": "5s"},
    });
    let escalation = serde_json::json!({"max": "10m", "forget_after": "5m"});
    config(serde_json::json!({"rules": rules, "escalation": escalation, "lateness_max": "90s"})).engine
}

struct Life {
    engine: Engine,
    /// The state as last stored, as the worker stores it after each decision and now and then.
    stored: Snapshot,
}

impl Life {
    fn new() -> Self {
        let engine = Engine::new(rules(0));
        let stored = engine.snapshot();
        Self { engine, stored }
    }

    fn feed(&mut self, files: &Files, file: usize, lines: std::ops::Range<usize>, now: Timestamp) -> Vec<Output> {
        let source = self.engine.open(&"n".into(), &"s".into(), Some(file as u64));
        for i in lines.clone() {
            let event = Event { offset: i as u64 * LINE_BYTES, ..files.lines[file][i].event() };
            self.engine.handle_event(source, &event, now);
        }
        let span = FileSpan {
            generation: file as u64,
            start: lines.start as u64 * LINE_BYTES,
            end: lines.end as u64 * LINE_BYTES,
        };
        self.engine.close(source, span);
        self.outputs()
    }

    fn outputs(&mut self) -> Vec<Output> {
        std::iter::from_fn(|| self.engine.poll_output()).collect()
    }

    fn store(&mut self) {
        self.stored = self.engine.snapshot();
    }

    /// Dies without storing, starts again and reads its files from where it must.
    fn restart(&mut self, config: EngineConfig, files: &Files, read: [usize; 2], now: Timestamp) {
        let since = now.saturating_sub(config.horizon());
        self.engine = Engine::restore(config, self.stored.clone(), now);
        let positions = self.engine.stream().read_positions("n", since);
        self.outputs();
        let decided: Vec<u64> = self.stored.files.iter().fold(vec![0, 0], |mut ends, (key, state)| {
            ends[key.generation as usize] = state.decided.end();
            ends
        });
        // The other file first: order among files is not kept. Then what was not stored, as it came.
        for file in [1, 0] {
            let offset = positions.get(&("s".to_owned(), file as u64)).map_or(0, |position| position.offset);
            let (from, to) = ((offset / LINE_BYTES) as usize, (decided[file] / LINE_BYTES) as usize);
            if from < to {
                self.feed(files, file, from..to, now);
            }
        }
        for file in [0, 1] {
            let from = (decided[file] / LINE_BYTES) as usize;
            if from < read[file] {
                self.feed(files, file, from..read[file], now);
            }
        }
    }
}

fn client(n: u64) -> String {
    match n {
        0..=5 => format!("192.0.2.{n}"),
        6 => "2001:db8::1".to_owned(),
        7 => "2001:db8::2".to_owned(),
        _ => format!("198.51.100.{n}"),
    }
}

/// By target: the bans in force, evidence aside.
pub(super) type Banned = Vec<(Target, Vec<Ban>)>;
/// By target: each rule's name, count and last end.
pub(super) type Histories = Vec<(Target, Vec<(String, u32, Timestamp)>)>;

pub(super) fn essence(engine: &Engine) -> (Banned, Histories) {
    let plain = |ban: &Ban| Ban { evidence: Evidence::default(), ..ban.clone() };
    let bans = engine.bans().map(|record| (record.target, record.bans.iter().map(plain).collect())).collect();
    let history =
        |offender: &Offender| offender.rules.iter().map(|h| (h.rule.to_string(), h.count, h.last_end)).collect();
    let offenders = engine.offenders.iter().map(|(target, offender)| {
        let mut rules: Vec<_> = history(offender);
        rules.sort();
        (*target, rules)
    });
    (bans, offenders.collect())
}

pub(super) fn check_invariants(engine: &mut Engine, now: Timestamp) {
    engine.handle_timeout(now);
    for record in engine.bans() {
        assert!(!record.bans.is_empty());
        assert!(!engine.allows.covers(&record.target), "{} may not be banned", record.target);
        let rules: BTreeSet<&str> = record.bans.iter().map(|ban| ban.rule.as_str()).collect();
        assert_eq!(rules.len(), record.bans.len(), "one ban a rule");
        for ban in &record.bans {
            assert!(ban.is_in_force(now), "{} has ended", ban.target);
            assert!(ban.expires_at.is_none_or(|end| end.since(ban.banned_at) <= Duration::from_secs(600)));
        }
    }
    assert!(engine.poll_timeout().is_none_or(|at| at > now), "nothing is overdue");
}

pub(super) fn command(random: &mut Random) -> Command {
    let target = Target::of_client(client(random.below(10)).parse().unwrap(), 64);
    let length = Some(Duration::from_secs(1 + random.below(60)));
    match random.below(6) {
        0 => Command::Ban { target, length, reason: "simulated".to_owned() },
        1 | 2 => Command::Unban(vec![Target::host(target.addr())]),
        3 => Command::Allow { target, length },
        4 => Command::Pause(Some(Duration::from_secs(1 + random.below(20)))),
        _ => Command::Resume,
    }
}

fn simulate(seed: u64) {
    let mut random = Random(seed);
    let mut files = Files::default();
    let (mut hard, mut easy) = (Life::new(), Life::new());
    let mut read = [0, 0];
    let mut seconds = 1000;
    let mut variant = 0;
    for step in 0..STEPS {
        let now = at(seconds);
        match random.below(100) {
            0..=59 => {
                let file = random.below(2) as usize;
                for _ in 0..=random.below(6) {
                    files.lines[file].push(Line::random(&mut random, seconds));
                }
                let fresh = read[file]..files.lines[file].len();
                easy.feed(&files, file, fresh.clone(), now);
                hard.feed(&files, file, fresh.clone(), now);
                read[file] = fresh.end;
                // A kill right here loses what was not stored; the lines are read again before time moves on.
                if random.below(8) == 0 {
                    hard.restart(rules(variant), &files, read, now);
                }
                hard.store();
            }
            60..=69 => {
                let file = random.below(2) as usize;
                let end = random.below(read[file] as u64 + 1) as usize;
                let start = random.below(end as u64 + 1) as usize;
                let outputs = hard.feed(&files, file, start..end, now);
                assert!(outputs.is_empty(), "seed {seed} step {step}: repeated lines did {outputs:?}");
            }
            70..=79 => seconds += random.below(40) as i64,
            80..=82 => seconds += random.below(400) as i64,
            83..=90 => {
                let command = command(&mut random);
                let answers =
                    (easy.engine.handle_command(command.clone(), now), hard.engine.handle_command(command, now));
                assert_eq!(answers.0, answers.1, "seed {seed} step {step}");
                hard.store();
            }
            91..=93 => {
                variant = 1 - variant;
                let reload = Command::Reload { config: Box::new(rules(variant)), names: Vec::new() };
                easy.engine.handle_command(reload.clone(), now).unwrap();
                hard.engine.handle_command(reload, now).unwrap();
                // What a changed rule had counted is dropped by a reload, and would be counted again by a rebuild.
                read = [files.lines[0].len(), files.lines[1].len()];
                seconds += 300;
                hard.store();
            }
            _ => {
                check_invariants(&mut hard.engine, now);
                hard.store();
                hard.restart(rules(variant), &files, read, now);
            }
        }
        let now = at(seconds);
        check_invariants(&mut hard.engine, now);
        check_invariants(&mut easy.engine, now);
        hard.outputs();
        easy.outputs();
        assert_eq!(essence(&hard.engine), essence(&easy.engine), "seed {seed} step {step}");
    }
}

#[test]
fn a_hard_life_ends_like_an_easy_one() {
    if let Ok(seed) = std::env::var("SIMULATION_SEED") {
        return simulate(seed.parse().unwrap());
    }
    let seeds = std::env::var("SIMULATION_SEEDS").map_or(SEEDS, |seeds| seeds.parse().unwrap());
    for seed in 0..seeds {
        simulate(seed);
    }
}
