//! Runs of the mirror against a model of Cloudflare that fails at random, from one seed.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proptest::prelude::*;
use proto::ban::{BanChange, BanRecord};
use proto::bus::memory::BanUpdate;
use proto::net::Target;
use proto::secret::Secret;
use proto::time::{Clock, Timestamp};

use super::{Form, Mark, Mirror, Tempo, refusals};
use crate::cloudflare::call::{Answer, Ask, Call, CallError, Cursor, Progress, Seen};
use crate::cloudflare::pace::Pace;
use crate::config::{CloudflareConfig, CloudflareLogin, Mode, Scope, SecretSource};
use crate::guard::{Guard, GuardFacts};
use crate::testing;

pub(super) fn guard(never_ban: &[&str]) -> Guard {
    let never_ban = never_ban.iter().map(|net| net.parse().unwrap()).collect();
    Guard::new(&GuardFacts { never_ban, prefix_min_v4: 16, prefix_min_v6: 32, ..GuardFacts::default() })
}

pub(in crate::cloudflare) fn record(target: &str, end: Option<i64>, ban_count: u32) -> BanRecord {
    let mut record = testing::record(target.parse().unwrap(), end.map(Timestamp::from_secs));
    record.bans[0].ban_count = ban_count;
    record
}

pub(super) fn update(revision: u64, snapshot: bool, records: &[BanRecord]) -> BanUpdate {
    let changes = records.iter().cloned().map(BanChange::Put).collect();
    BanUpdate { revision, snapshot, changes, cause: None }
}

const ID: &str = "0123456789abcdef0123456789abcdef";

pub(in crate::cloudflare) fn config(form: Form, entries_max: u32) -> CloudflareConfig {
    let zone = |n: char| n.to_string().repeat(32);
    let scope = match form {
        Form::Rules => Scope::Zones(vec![zone('a'), zone('b')]),
        Form::List => Scope::List { account: ID.to_owned(), list: "l".to_owned() },
    };
    CloudflareConfig {
        login: CloudflareLogin::Token(SecretSource::Given(Secret::new("t"))),
        scope,
        mode: Mode::Block,
        installation: None,
        entries_max,
        calls_max: 1000,
        reconcile_interval: Duration::from_secs(3600),
        api_url: String::new(),
    }
}

struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }
}

/// Entries by ID, at each place.
struct Model {
    form: Form,
    places: Vec<BTreeMap<u64, Seen>>,
    next_id: u64,
    operation: Option<(u64, Ask)>,
    results: BTreeMap<String, Progress>,
    fails: bool,
    /// Another installation writes while we read.
    churns: bool,
    dice: Dice,
    ours_max: usize,
    /// Entries on a page.
    page: usize,
}

/// Nobody's list takes it.
const UNWELCOME: &str = "192.0.2.13";

impl Model {
    fn add(&mut self, place: usize, target: Target, note: &str) -> u64 {
        self.next_id += 1;
        let mode = (self.form == Form::Rules).then_some(Mode::Block);
        let seen = Seen {
            id: self.next_id.to_string(),
            target: Some(target),
            mode,
            note: note.to_owned(),
            is_elsewhere: false,
        };
        self.places[place].insert(self.next_id, seen);
        self.next_id
    }

    fn find(&self, place: usize, target: &Target) -> Option<u64> {
        self.places[place].iter().find(|(_, seen)| seen.target == Some(*target)).map(|(id, _)| *id)
    }

    fn ours(&self, place: usize) -> BTreeSet<Target> {
        let ours = self.places[place].values().filter(|seen| seen.note.starts_with("portcullis:me:"));
        ours.filter_map(|seen| seen.target).collect()
    }

    fn foreign(&self) -> Vec<(usize, Seen)> {
        let all = self.places.iter().enumerate().flat_map(|(place, seen)| seen.values().map(move |seen| (place, seen)));
        let is_lasting = |note: &str| !note.starts_with("portcullis:me:") && note != "portcullis:churn:r";
        all.filter(|(_, seen)| is_lasting(&seen.note)).map(|(n, seen)| (n, seen.clone())).collect()
    }

    fn carry_out(&mut self, call: &Call) -> Result<Answer, CallError> {
        self.operate();
        let fate = if self.fails { self.dice.roll(10) } else { 9 };
        match fate {
            0 => return Err(CallError::Limited { after: None }),
            1 => return Err(CallError::Unavailable { status: 503 }),
            _ => {}
        }
        let answer = self.do_it(call);
        assert!((0..self.places.len()).all(|place| self.ours(place).len() <= self.ours_max), "over the quota");
        if fate == 2 { Err(CallError::Timeout) } else { answer }
    }

    fn do_it(&mut self, call: &Call) -> Result<Answer, CallError> {
        let refused = |status, code| Err(CallError::Refused { status, codes: vec![code], message: String::new() });
        let place = call.place;
        match &call.ask {
            Ask::Look(cursor) => {
                self.churn(place);
                // A page is where it is, whatever is added before it; a cursor is after what was read.
                let (start, notes, before) = match cursor {
                    Cursor::Page { notes, page } => ((*page as usize - 1) * self.page, notes.as_str(), u64::MAX),
                    Cursor::After(after) => (0, "", after.as_ref().map_or(u64::MAX, |after| after.parse().unwrap())),
                };
                // The newest first, so that what is added moves all others.
                let all = self.places[place].range(..before).map(|(_, seen)| seen).rev();
                let seen: Vec<Seen> = all.filter(|seen| seen.note.to_lowercase().contains(notes)).cloned().collect();
                let entries: Vec<Seen> = seen.iter().skip(start).take(self.page).cloned().collect();
                let end = start + self.page;
                let more = end < seen.len();
                let (next, total) = match cursor {
                    Cursor::Page { notes, page } => {
                        (Cursor::Page { notes: notes.clone(), page: page + 1 }, Some(seen.len()))
                    }
                    Cursor::After(_) => (Cursor::After(entries.last().map(|last| last.id.clone())), None),
                };
                Ok(Answer::Page { entries, next: more.then_some(next), total })
            }
            Ask::FindList => Ok(Answer::List(Some(("list".to_owned(), true)))),
            Ask::Find(target) => {
                let found = self.find(place, target);
                Ok(Answer::Found(found.map(|id| self.places[place][&id].clone()).into_iter().collect()))
            }
            Ask::Create(target, _) if target.to_string() == UNWELCOME => refused(400, 1),
            Ask::Create(target, _) if self.find(place, target).is_some() => refused(400, 10009),
            Ask::Create(target, note) => Ok(Answer::Made(self.add(place, *target, note).to_string())),
            Ask::SetMode(id, _) => match self.places[place].get_mut(&id.parse().unwrap()) {
                None => refused(404, 1),
                Some(seen) => {
                    seen.mode = Some(Mode::Block);
                    Ok(Answer::Done)
                }
            },
            Ask::Delete(id, _) => match self.places[place].remove(&id.parse().unwrap()) {
                None => refused(404, 1),
                Some(_) => Ok(Answer::Done),
            },
            Ask::Append(_) | Ask::Remove(_) if self.operation.is_some() => Err(CallError::Limited { after: None }),
            ask @ (Ask::Append(_) | Ask::Remove(_)) => {
                assert_eq!(call.list.as_deref(), Some("list"));
                self.next_id += 1;
                self.operation = Some((self.next_id, ask.clone()));
                Ok(Answer::Begun(self.next_id.to_string()))
            }
            Ask::Poll(id) => {
                let is_running = self.operation.as_ref().is_some_and(|(operation, _)| operation.to_string() == *id);
                let progress = self.results.get(id).cloned().or_else(|| is_running.then_some(Progress::Running));
                progress.map_or_else(|| refused(404, 1), |progress| Ok(Answer::Operation(progress)))
            }
        }
    }

    fn churn(&mut self, place: usize) {
        if !self.churns || self.form == Form::List || self.dice.roll(2) == 0 {
            return;
        }
        let n = self.dice.roll(8);
        let target: Target = format!("203.0.113.{}", 100 + n).parse().unwrap();
        match self.find(place, &target) {
            Some(id) => drop(self.places[place].remove(&id)),
            None => drop(self.add(place, target, "portcullis:churn:r")),
        }
    }

    /// Works on the operation, whether somebody asks for it or not.
    fn operate(&mut self) {
        if self.dice.roll(2) == 0 {
            return;
        }
        let Some((operation, ask)) = self.operation.take() else { return };
        let is_unwelcome = |(target, _): &(Target, String)| target.to_string() == UNWELCOME;
        let is_bad = matches!(&ask, Ask::Append(items) if items.iter().any(is_unwelcome));
        if is_bad || (self.fails && self.dice.roll(5) == 0) {
            self.results.insert(operation.to_string(), Progress::Failed("no".to_owned()));
            return;
        }
        self.results.insert(operation.to_string(), Progress::Completed);
        match ask {
            Ask::Append(items) => {
                for (target, note) in items {
                    // It takes the place of what was there.
                    if let Some(id) = self.find(0, &target) {
                        assert!(self.places[0][&id].note.starts_with("portcullis:me:"), "foreign: {target}");
                        self.places[0].remove(&id);
                    }
                    self.add(0, target, &note);
                }
            }
            Ask::Remove(items) => {
                for (id, _) in items {
                    self.places[0].remove(&id.parse().unwrap());
                }
            }
            _ => unreachable!(),
        }
    }
}

struct Run {
    mirror: Mirror,
    model: Model,
    now: Timestamp,
    revision: u64,
    bans: BTreeMap<Target, Option<i64>>,
}

impl Run {
    fn new(form: Form, seed: u64) -> Self {
        let config = config(form, 12);
        let count = if form == Form::Rules { 2 } else { 1 };
        let places = vec![BTreeMap::new(); count];
        // What a list gets by an operation that nobody saw begin comes on top.
        let ours_max = if form == Form::Rules { 12 } else { 24 };
        let model = Model {
            form,
            places,
            next_id: 0,
            operation: None,
            results: BTreeMap::new(),
            fails: true,
            churns: true,
            dice: Dice(seed),
            ours_max,
            page: 3,
        };
        let mut run = Self::of(&config, model, seed);
        for (n, note) in ["", "portcullis:you:r", "Portcullis:me:r", "portcullis:me2:r"].iter().enumerate() {
            run.model.add(0, format!("192.0.2.{n}").parse().unwrap(), note);
            run.model.add(count - 1, format!("203.0.113.{n}").parse().unwrap(), note);
        }
        // What a former run has left.
        run.model.add(0, "192.0.2.20".parse().unwrap(), "portcullis:me:r");
        run.model.add(0, "198.51.100.0/24".parse().unwrap(), "portcullis:me:gone");
        run
    }

    fn of(config: &CloudflareConfig, model: Model, seed: u64) -> Self {
        let mirror = Mirror::new(config, Mark::new("me"), guard(&["192.0.2.3/32"]), Tempo::default(), seed);
        Self { mirror, model, now: Timestamp::from_secs(1000), revision: 0, bans: BTreeMap::new() }
    }

    fn publish(&mut self, snapshot: bool, changes: Vec<BanChange>) {
        self.revision += 1;
        let update = BanUpdate { revision: self.revision, snapshot, changes, cause: None };
        self.mirror.handle_update(&update, self.now);
    }

    fn snapshot(&mut self) {
        let bans = self.bans.iter().map(|(target, end)| BanChange::Put(record(&target.to_string(), *end, 1))).collect();
        self.publish(true, bans);
    }

    fn call(&mut self) -> bool {
        let Some(call) = self.mirror.next(self.now) else { return false };
        let answer = self.model.carry_out(&call);
        self.mirror.handle(call, answer, self.now);
        true
    }

    fn act(&mut self, whole: bool) {
        match self.model.dice.roll(12) {
            0..=4 => {
                let n = self.model.dice.roll(26);
                let name = if n > 22 { format!("192.0.{n}.0/23") } else { format!("192.0.2.{n}") };
                let target: Target = name.parse().unwrap();
                let seconds = 1 + self.model.dice.roll(40) as i64;
                let end = (self.model.dice.roll(3) > 0).then(|| self.now.as_millis() / 1000 + seconds);
                let change = if self.model.dice.roll(3) == 0 {
                    self.bans.remove(&target);
                    BanChange::Delete(target)
                } else {
                    self.bans.insert(target, end);
                    BanChange::Put(record(&name, end, 1))
                };
                self.publish(false, vec![change]);
            }
            5 | 6 => {
                self.now = self.now.saturating_add(Duration::from_secs(self.model.dice.roll(20)));
                self.mirror.handle_time(self.now);
            }
            7 if whole && self.model.dice.roll(4) == 0 => self.mirror.forget(),
            8 if whole && self.model.dice.roll(4) == 0 => {
                // Somebody tidies up.
                let ours = self.model.places[0].iter().find(|(_, seen)| seen.note.starts_with("portcullis:me:"));
                if let Some(id) = ours.map(|(id, _)| *id) {
                    self.model.places[0].remove(&id);
                }
            }
            9 if self.model.dice.roll(8) == 0 => self.mirror.handle_pause(true, self.now),
            10 => self.mirror.handle_pause(false, self.now),
            _ => drop(self.call()),
        }
    }

    /// Refusals that are none by chance.
    fn unwelcome(&self) -> usize {
        let is_wanted = self.mirror.wishes().wanted(&UNWELCOME.parse().unwrap()).is_some();
        if is_wanted { self.model.places.len() } else { 0 }
    }

    /// Without further failures, all is as it should be in the end.
    fn finish(&mut self) {
        self.model.fails = false;
        // Also what nobody saw begin has ended.
        while self.model.operation.is_some() {
            self.model.operate();
        }
        self.mirror.handle_pause(false, self.now);
        self.mirror.doubt();
        for _ in 0..10_000 {
            let is_settled = self.mirror.is_settled();
            if is_settled && self.mirror.summary().refused == self.unwelcome() {
                return;
            }
            if !self.call() {
                // What was refused only by chance is tried again by itself.
                let pause = if is_settled { refusals::PAUSE } else { self.mirror.pause(self.now).expect("a wait") };
                self.now = self.now.saturating_add(pause);
                self.mirror.handle_time(self.now);
            }
        }
        panic!("never settles: {:?}", self.mirror.summary());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    /// Whatever fails and whenever: in the end ours are what is wanted, and foreign entries are as they were.
    #[test]
    fn the_end_state_is_the_desired_one_and_nothing_foreign_is_touched(seed: u64, list: bool) {
        let form = if list { Form::List } else { Form::Rules };
        let mut run = Run::new(form, seed);
        let foreign = run.model.foreign();
        for _ in 0..40 {
            run.act(false);
        }
        run.snapshot();
        for _ in 0..300 {
            run.act(true);
        }
        run.finish();
        let wanted: BTreeSet<Target> = run.mirror.wishes().all_wanted().copied().collect();
        prop_assert!(wanted.len() <= 12);
        for place in 0..run.model.places.len() {
            let taken: BTreeSet<Target> =
                foreign.iter().filter(|(n, _)| *n == place).filter_map(|(_, seen)| seen.target).collect();
            let mut expected: BTreeSet<Target> = wanted.difference(&taken).copied().collect();
            expected.remove(&UNWELCOME.parse().unwrap());
            prop_assert_eq!(run.model.ours(place), expected, "place {}", place);
        }
        prop_assert_eq!(run.model.foreign(), foreign);
        let summary = run.mirror.summary();
        prop_assert_eq!(summary.confirmed, run.revision);
        prop_assert_eq!((summary.additions, summary.removals), (0, 0));
    }
}

#[test]
fn an_entry_asked_for_is_ours_if_ours_is_among_those_of_its_target() {
    let mut run = Run::new(Form::Rules, 1);
    run.publish(true, vec![BanChange::Put(record("192.0.2.20", None, 1))]);
    run.finish();
    let entries = run.mirror.summary().entries;
    run.publish(false, vec![BanChange::Put(record("192.0.2.9", None, 1))]);
    let call = run.mirror.next(run.now).unwrap();
    assert!(matches!(call.ask, Ask::Create(..)), "{call:?}");
    run.mirror.handle(call.clone(), Err(CallError::Timeout), run.now);
    run.now = run.now.saturating_add(Duration::from_secs(600));
    let other = run.mirror.next(run.now).unwrap();
    let answer = run.model.carry_out(&other);
    run.mirror.handle(other, answer, run.now);
    let find = run.mirror.next(run.now).unwrap();
    assert_eq!((find.place, &find.ask), (call.place, &Ask::Find("192.0.2.9".parse().unwrap())));
    let entry = |id: &str, note: &str, is_elsewhere| Seen {
        id: id.to_owned(),
        target: Some("192.0.2.9".parse().unwrap()),
        mode: Some(Mode::Block),
        note: note.to_owned(),
        is_elsewhere,
    };
    let found = vec![entry("a", "portcullis:me:r", true), entry("b", "", false), entry("c", "portcullis:me:r", false)];
    run.mirror.handle(find, Ok(Answer::Found(found)), run.now);
    assert_eq!(run.mirror.summary().entries, entries + 2, "one in each zone");
    run.publish(false, vec![BanChange::Delete("192.0.2.9".parse().unwrap())]);
    let deleted: Vec<Ask> = std::iter::from_fn(|| {
        let call = run.mirror.next(run.now)?;
        run.mirror.handle(call.clone(), Ok(Answer::Done), run.now);
        Some(call.ask)
    })
    .collect();
    assert!(deleted.contains(&Ask::Delete("c".to_owned(), "192.0.2.9".parse().unwrap())), "{deleted:?}");
}

#[test]
fn an_entry_that_is_listed_twice_is_no_second_one_and_stays() {
    let mut run = Run::new(Form::Rules, 1);
    run.model.fails = false;
    run.publish(true, vec![BanChange::Put(record("192.0.2.20", None, 1))]);
    let id = run.model.find(0, &"192.0.2.20".parse().unwrap()).unwrap();
    // Each look at ours, the wide one and the next, misses one entry and finds another on both pages.
    let mut shifts = 2;
    while shifts > 0 {
        run.now = run.now.saturating_add(Duration::from_secs(1));
        let call = run.mirror.next(run.now).unwrap();
        let answer = match &call.ask {
            Ask::Look(Cursor::Page { notes, page }) if call.place == 0 => {
                shifts -= page - 1;
                let next = (*page == 1).then(|| Cursor::Page { notes: notes.clone(), page: 2 });
                Ok(Answer::Page { entries: vec![run.model.places[0][&id].clone()], next, total: Some(2) })
            }
            _ => run.model.carry_out(&call),
        };
        run.mirror.handle(call, answer, run.now);
    }
    run.finish();
    assert_eq!(run.model.find(0, &"192.0.2.20".parse().unwrap()), Some(id), "it was never removed");
    assert_eq!(run.model.ours(0).len(), 1, "what was missed is gone, as nobody wants it");
}

#[test]
fn an_item_that_somebody_adds_between_two_looks_is_left_alone() {
    for count in [1, 30] {
        let mut run = Run::new(Form::List, 1);
        run.publish(true, Vec::new());
        run.finish();
        run.now = run.now.saturating_add(Duration::from_secs(600));
        // The last ones are kept when there are too many.
        let theirs: Target = format!("192.0.2.{}", 99 + count).parse().unwrap();
        run.model.add(0, theirs, "of a person");
        let targets: Vec<String> = (100..100 + count).map(|n| format!("192.0.2.{n}")).collect();
        run.publish(false, targets.iter().map(|target| BanChange::Put(record(target, None, 1))).collect());
        run.model.fails = false;
        for _ in 0..1000 {
            if !run.call() {
                run.now = run.now.saturating_add(Duration::from_secs(1));
                run.mirror.handle_time(run.now);
            }
        }
        assert!(run.mirror.is_settled());
        assert!(run.model.ours(0).len() >= count.min(12) - 1, "all the others are there");
        let kept = run.model.find(0, &theirs).unwrap();
        assert_eq!(run.model.places[0][&kept].note, "of a person");
    }
}

#[test]
fn a_list_with_thousands_of_foreign_items_is_filled_at_the_slowest_pace() {
    const CALLS: u32 = 60;
    let model = Model { fails: false, page: 500, ours_max: 2000, ..Run::new(Form::List, 1).model };
    let mut run = Run::of(&CloudflareConfig { calls_max: CALLS, ..config(Form::List, 2000) }, model, 1);
    let clock = Clock::manual(run.now);
    let pace = Pace::new(CALLS, Tempo::default().window, clock.clone());
    // What may come at once is used up.
    while pace.check(false).is_ok() {}
    for n in 0..5000 {
        run.model.add(0, format!("198.18.{}.{}", n / 250, n % 250).parse().unwrap(), "of a person");
    }
    let foreign = run.model.foreign();
    let bans = (0..1200).map(|n| BanChange::Put(record(&format!("203.0.{}.{}", n / 250, n % 250), None, 1)));
    run.publish(true, bans.collect());
    let mut looks = 0;
    while !run.mirror.is_settled() {
        let Some(call) = run.mirror.next(run.now) else {
            run.now = run.now.saturating_add(run.mirror.pause(run.now).expect("something to wait for"));
            run.mirror.handle_time(run.now);
            continue;
        };
        clock.set(run.now);
        while let Err(wait) = pace.check(call.frees) {
            run.now = run.now.saturating_add(wait);
            clock.set(run.now);
        }
        looks += usize::from(matches!(call.ask, Ask::Look(Cursor::After(None))));
        assert!(looks <= 3, "it only looks: {:?}", run.mirror.summary());
        let answer = run.model.carry_out(&call);
        run.mirror.handle(call, answer, run.now);
    }
    assert_eq!(run.model.ours(0).len(), 1200);
    assert_eq!(run.model.foreign(), foreign);
}

#[test]
fn what_is_asked_for_an_item_that_goes_is_part_of_freeing_and_for_one_that_comes_is_not() {
    let mut run = Run::new(Form::List, 1);
    run.model.fails = false;
    run.publish(true, vec![BanChange::Put(record("192.0.2.9", None, 1))]);
    while !run.mirror.is_settled() {
        if !run.call() {
            run.now = run.now.saturating_add(Duration::from_secs(1));
        }
    }
    run.now = run.now.saturating_add(Duration::from_secs(600));
    run.publish(false, vec![BanChange::Put(record("192.0.2.10", None, 1))]);
    let call = run.mirror.next(run.now).unwrap();
    assert!(matches!(call.ask, Ask::Find(_)) && !call.frees, "{call:?}");
    run.publish(false, vec![BanChange::Delete("192.0.2.9".parse().unwrap())]);
    let call = run.mirror.next(run.now).unwrap();
    assert_eq!((call.ask, call.frees), (Ask::Find("192.0.2.9".parse().unwrap()), true));
}

#[test]
fn many_refused_in_a_row_hold_up_others_not_for_ever() {
    let mut run = Run::new(Form::Rules, 1);
    (run.model.fails, run.model.churns) = (false, false);
    run.publish(true, vec![BanChange::Put(record("192.0.2.9", None, 1))]);
    let unwelcome = |n: u32| format!("203.0.113.{n}");
    run.publish(false, (100..110).map(|n| BanChange::Put(record(&unwelcome(n), None, 1))).collect());
    let unwelcome: BTreeSet<Target> = (100..110).map(|n| unwelcome(n).parse().unwrap()).collect();
    let begun = run.now;
    while !run.mirror.is_settled() {
        let Some(call) = run.mirror.next(run.now) else {
            run.now = run.now.saturating_add(run.mirror.pause(run.now).expect("a wait"));
            assert!(run.now.since(begun) < Duration::from_secs(3600), "{:?}", run.mirror.summary());
            continue;
        };
        let answer = match &call.ask {
            Ask::Create(target, _) if unwelcome.contains(target) => {
                Err(CallError::Refused { status: 400, codes: Vec::new(), message: String::new() })
            }
            _ => run.model.carry_out(&call),
        };
        run.mirror.handle(call, answer, run.now);
    }
    assert_eq!(run.model.ours(0), BTreeSet::from(["192.0.2.9".parse().unwrap()]));
}

#[test]
fn before_the_ban_set_is_whole_entries_are_added_and_none_removed() {
    let mut run = Run::new(Form::Rules, 1);
    run.publish(false, vec![BanChange::Put(record("192.0.2.9", None, 1))]);
    run.finish();
    let ours: Vec<String> = run.model.ours(0).iter().map(ToString::to_string).collect();
    assert_eq!(ours, ["192.0.2.9", "192.0.2.20", "198.51.100.0/24"]);
    run.publish(true, vec![BanChange::Put(record("192.0.2.20", None, 1))]);
    run.finish();
    assert_eq!(run.model.ours(0).len(), 1);
    run.mirror.handle_pause(true, run.now);
    while run.call() {}
    assert_eq!((run.model.ours(0).len(), run.model.ours(1).len()), (0, 0), "a pause lifts everything");
}

#[test]
fn a_mirror_that_only_looks_changes_nothing_and_knows_what_it_would_do() {
    let mut run = Run::new(Form::Rules, 1);
    (run.model.fails, run.model.churns) = (false, false);
    run.mirror.set_read_only();
    run.publish(true, vec![BanChange::Put(record("192.0.2.9", None, 1))]);
    let before = run.model.places.clone();
    while run.call() {}
    assert_eq!(run.model.places, before);
    let summary = run.mirror.summary();
    assert_eq!((summary.additions, summary.removals), (2, 2), "two zones, and what a former run has left in one");
}

#[test]
fn who_waits_to_be_freed_goes_first_and_then_who_was_banned_last() {
    let mut run = Run::new(Form::Rules, 1);
    run.publish(true, vec![BanChange::Put(record("192.0.2.20", None, 1))]);
    run.finish();
    run.publish(false, vec![BanChange::Put(record("192.0.2.10", None, 1))]);
    run.publish(false, vec![BanChange::Put(record("192.0.2.11", None, 1))]);
    run.publish(false, vec![BanChange::Delete("192.0.2.20".parse().unwrap())]);
    let mut order = Vec::new();
    while let Some(call) = run.mirror.next(run.now) {
        let (Ask::Create(target, _) | Ask::Delete(_, target)) = &call.ask else { panic!("{call:?}") };
        order.push(target.to_string());
        let answer = run.model.carry_out(&call);
        run.mirror.handle(call, answer, run.now);
    }
    let expected = ["192.0.2.20", "192.0.2.20", "192.0.2.11", "192.0.2.11", "192.0.2.10", "192.0.2.10"];
    assert_eq!(order, expected);
}
