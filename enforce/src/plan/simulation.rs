//! Seeded simulation: a kernel that drifts, refuses and forgets, others that change rules, and plans that must converge
//! without ever dropping a guarded client or letting a banned one through in between.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use ipnet::IpNet;
use proto::ban::{BanChange, BanRecord};
use proto::bus::memory::BanUpdate;
use proto::net::Target;
use proto::time::Timestamp;

use super::rules::{LIFTS_MAX, Layout, Lifts, PROBE, RuleStep, View, plan_removal, plan_rules};
use super::*;
use crate::config::{CHAIN, ChainRef, Chains, DOCKER_USER, FirewallConfig, Ports, Protocol, Table};
use crate::guard::{Guard, GuardFacts};
use crate::testing;

/// SplitMix64: one seed, one run.
struct Seed(u64);

impl Seed {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}

type FakeMembers = BTreeMap<Target, (Option<Timestamp>, String)>;

/// A kernel with a mind of its own: whole seconds, full sets, refusals.
#[derive(Default)]
struct FakeKernel {
    /// By name: which set it is, its room, its members.
    sets: BTreeMap<&'static str, (SetId, u32, FakeMembers)>,
    /// So many of the next additions are refused.
    refusing: u64,
    /// As nf_tables: sets have no size and are never made anew in another.
    grows: bool,
}

impl FakeKernel {
    fn apply(&mut self, step: &Step, now: Timestamp) -> bool {
        for (_, _, members) in self.sets.values_mut() {
            members.retain(|_, (ends, _)| ends.is_none_or(|end| now < end));
        }
        match step {
            Step::Create { set, maxelem } => {
                assert!(!self.grows || !matches!(set, SetId::Fresh(_)), "a set that grows is made anew");
                let maxelem = if self.grows { &GROWS } else { maxelem };
                let former = self.sets.insert(set.name(), (*set, *maxelem, BTreeMap::new()));
                assert!(former.is_none(), "a set is made twice");
            }
            Step::Swap(family) => {
                let (fresh, bans) = (SetId::Fresh(*family).name(), SetId::Bans(*family).name());
                let (new, old) = (self.sets.remove(fresh).unwrap(), self.sets.remove(bans).unwrap());
                self.sets.insert(bans, (SetId::Bans(*family), new.1, new.2));
                self.sets.insert(fresh, (SetId::Fresh(*family), old.1, old.2));
            }
            Step::Destroy(set) => assert!(self.sets.remove(set.name()).is_some(), "a set is destroyed twice"),
            Step::Flush(set) => self.sets.get_mut(set.name()).unwrap().2.clear(),
            Step::Add { set, target, timeout_s, comment } => {
                assert!(timeout_s.is_none_or(|seconds| (1..=TIMEOUT_MAX_S).contains(&seconds)));
                let (_, maxelem, members) = self.sets.get_mut(set.name()).unwrap();
                let full = members.len() >= *maxelem as usize && !members.contains_key(target);
                if full || (self.refusing > 0 && matches!(set, SetId::Bans(_))) {
                    self.refusing = self.refusing.saturating_sub(1);
                    return false;
                }
                let ends = timeout_s.map(|seconds| now.saturating_add(Duration::from_secs(seconds.into())));
                members.insert(*target, (ends, comment.to_string()));
            }
            Step::Delete { set, target } => drop(self.sets.get_mut(set.name()).unwrap().2.remove(target)),
        }
        true
    }

    fn observe(&self, now: Timestamp) -> Kernel {
        let mut kernel = Kernel::default();
        for (set, maxelem, members) in self.sets.values() {
            let in_force = members.iter().filter(|(_, (ends, _))| ends.is_none_or(|end| now < end));
            let members = in_force.map(|(target, (ends, comment))| {
                let ends = ends.map(|end| now.saturating_add(Duration::from_secs(end.since(now).as_secs().max(1))));
                (*target, Held { ends, comment: comment.as_str().into() })
            });
            let set_members = members.collect();
            kernel.sets.insert(*set, KernelSet { maxelem: *maxelem, form: Form::Ours, members: set_members });
        }
        kernel
    }

    /// What the rules would do with a packet from `addr`.
    fn drops(&self, addr: IpAddr, now: Timestamp) -> bool {
        let family = Family::of(&Target::host(addr));
        let holds = |set: SetId| {
            self.sets.get(set.name()).is_some_and(|(_, _, members)| {
                let mut members = members.iter();
                members.any(|(target, (ends, _))| target.contains_addr(addr) && ends.is_none_or(|end| now < end))
            })
        };
        !holds(SetId::Guard(family)) && holds(SetId::Bans(family))
    }
}

struct World {
    seed: Seed,
    now: Timestamp,
    kernel: FakeKernel,
    /// What the enforcer knows.
    model: Kernel,
    desired: Desired,
    frame: Frame,
    guard: Guard,
    never_ban: Vec<IpNet>,
    published: BTreeMap<Target, BanRecord>,
    revision: u64,
}

fn record(target: Target, ends: Option<Timestamp>, rule: &str) -> BanRecord {
    let mut record = testing::record(target, ends);
    rule.clone_into(&mut record.bans[0].rule);
    record
}

impl World {
    fn new(seed: u64, grows: bool) -> Self {
        let guard = Guard::new(&GuardFacts { prefix_min_v4: 16, prefix_min_v6: 32, ..GuardFacts::default() });
        let frame = Frame { families: Family::ALL.to_vec(), guard_nets: guard.nets(), bans_max: 24 };
        let mut world = Self {
            seed: Seed(seed),
            now: Timestamp::from_secs(1_000_000),
            kernel: FakeKernel { grows, ..FakeKernel::default() },
            model: Kernel::default(),
            desired: Desired::new(24),
            frame,
            guard,
            never_ban: Vec::new(),
            published: BTreeMap::new(),
            revision: 1,
        };
        world.reconcile();
        world.update(true, Vec::new());
        world
    }

    fn target(&mut self) -> Target {
        let addr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, self.seed.below(40) as u8));
        match self.seed.below(8) {
            0 => Target::new(addr, 28),
            1 => Target::new("2001:db8::".parse().unwrap(), 40 + self.seed.below(24) as u8),
            2 => Target::new(addr, 12),
            _ => Target::host(addr),
        }
    }

    fn apply(&mut self, steps: &[Step]) {
        let probes: Vec<IpAddr> = (0..40).map(|n| IpAddr::V4(Ipv4Addr::new(192, 0, 2, n))).collect();
        let known = self.knows_all();
        // While nothing is refused and nothing has drifted, whoever is dropped and is to be dropped stays dropped, be it by another ban.
        let stays = |addr: &IpAddr| {
            let adds =
                |target: &Target| steps.iter().any(|step| matches!(step, Step::Add { target: t, .. } if t == target));
            let sure =
                |target: &Target| target.contains_addr(*addr) && (self.model.held(target).is_some() || adds(target));
            let covered = self.desired.all_wanted().any(|(target, _)| sure(target));
            self.kernel.refusing == 0 && known && covered && self.kernel.drops(*addr, self.now) && self.is_wanted(*addr)
        };
        let stay: Vec<IpAddr> = probes.iter().copied().filter(stays).collect();
        for step in steps {
            if self.kernel.apply(step, self.now) {
                self.model.note(step, self.now);
            }
            for addr in &probes {
                let guarded = self.guard.refuse(&Target::host(*addr)).is_some();
                let dropped = self.kernel.drops(*addr, self.now);
                let caught = guarded && dropped && guard_is_whole(&self.kernel, &self.guard);
                assert!(!caught, "{addr} is guarded");
            }
            for addr in &stay {
                assert!(self.kernel.drops(*addr, self.now), "{addr} came through during {step:?}");
            }
        }
    }

    fn is_wanted(&self, addr: IpAddr) -> bool {
        let guarded = self.guard.refuse(&Target::host(addr)).is_some();
        !guarded && self.desired.all_wanted().any(|(target, _)| target.contains_addr(addr))
    }

    fn update(&mut self, snapshot: bool, changes: Vec<BanChange>) {
        self.revision += 1;
        for change in &changes {
            match change {
                BanChange::Put(record) => drop(self.published.insert(record.target, record.clone())),
                BanChange::Delete(target) => drop(self.published.remove(target)),
            }
        }
        let update = BanUpdate { revision: self.revision, snapshot, changes, cause: None };
        let touched = self.desired.handle_update(&update, &self.guard, self.now);
        let steps = plan_targets(&touched, &self.desired, &self.model, self.now);
        self.apply(&steps);
    }

    fn act(&mut self) {
        let target = self.target();
        match self.seed.below(14) {
            0..=4 => {
                let seconds = [1, 30, 600, 2_000_000, 9_000_000][self.seed.below(5) as usize];
                let ends = (self.seed.below(6) > 0).then(|| self.now.saturating_add(Duration::from_secs(seconds)));
                self.update(false, vec![BanChange::Put(record(target, ends, "rule"))]);
            }
            5 => self.update(false, vec![BanChange::Delete(target)]),
            6 => {
                let records: Vec<BanRecord> = self.published.values().cloned().collect();
                self.update(true, records.into_iter().map(BanChange::Put).collect());
            }
            7 => self.now = self.now.saturating_add(Duration::from_millis(self.seed.below(900_000))),
            8 => {
                self.now = self.now.saturating_add(Duration::from_secs(self.seed.below(1_500_000)));
                self.desired.handle_time(self.now);
            }
            9 => self.change_guard(target),
            10 => drop(self.desired.handle_pause(self.seed.below(2) == 0)),
            11 => self.kernel.refusing = 1 + self.seed.below(3),
            12 => {
                self.frame.bans_max = 24 + self.seed.below(2) as u32;
            }
            _ => self.drift(target),
        }
    }

    fn change_guard(&mut self, target: Target) {
        if self.seed.below(2) == 0 {
            self.never_ban.clear();
        } else {
            self.never_ban.push(target.net());
        }
        let never_ban = self.never_ban.clone();
        let facts = GuardFacts { never_ban, prefix_min_v4: 16, prefix_min_v6: 32, ..GuardFacts::default() };
        self.guard = Guard::new(&facts);
        self.frame.guard_nets = self.guard.nets();
        self.desired.handle_guard(&self.guard);
        // As the reconciler does: at once, from what it knows.
        let steps = plan(&self.frame, &self.desired, &self.model, self.now);
        let steps: Vec<Step> = if self.in_sync() { steps } else { Vec::new() };
        self.apply(&steps);
    }

    fn in_sync(&self) -> bool {
        self.model.sets.keys().eq(self.kernel.observe(self.now).sets.keys())
    }

    /// Whether every member that we believe in is there.
    fn knows_all(&self) -> bool {
        let kernel = self.kernel.observe(self.now);
        let there =
            |id: &SetId, target: &Target| kernel.sets.get(id).is_some_and(|set| set.members.contains_key(target));
        let lives = |held: &Held| held.ends.is_none_or(|end| self.now < end);
        self.model
            .sets
            .iter()
            .all(|(id, set)| set.members.iter().all(|(target, held)| !lives(held) || there(id, target)))
    }

    fn drift(&mut self, target: Target) {
        let bans = SetId::Bans(Family::of(&target));
        let guard = SetId::Guard(Family::of(&target));
        match self.seed.below(5) {
            0 => drop(self.kernel.sets.get_mut(bans.name()).unwrap().2.remove(&target)),
            1 => self.kernel.sets.get_mut(bans.name()).unwrap().2.clear(),
            2 => {
                let stranger = (Some(self.now.saturating_add(Duration::from_secs(77))), "stranger".to_owned());
                self.kernel.sets.get_mut(bans.name()).unwrap().2.insert(target, stranger);
            }
            3 => self.kernel.sets.get_mut(guard.name()).unwrap().2.clear(),
            _ => drop(self.kernel.sets.remove(bans.name())),
        }
    }

    /// Observe, plan, apply, until nothing is left; refusals end at some time.
    fn reconcile(&mut self) {
        for _ in 0..4 {
            self.model = self.kernel.observe(self.now);
            let steps = plan(&self.frame, &self.desired, &self.model, self.now);
            if steps.is_empty() {
                return;
            }
            self.apply(&steps);
        }
        self.model = self.kernel.observe(self.now);
        assert_eq!(plan(&self.frame, &self.desired, &self.model, self.now), [], "planning again plans again");
    }

    fn check_converged(&self) {
        for n in 0..=255 {
            let addr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, n));
            assert_eq!(self.kernel.drops(addr, self.now), self.is_wanted(addr), "{addr}");
        }
        for set in self.model.sets.keys() {
            assert!(!matches!(set, SetId::Fresh(_)), "a set is left over");
        }
    }
}

/// A guarded address may be caught only before the guard's own networks could be put in.
fn guard_is_whole(kernel: &FakeKernel, guard: &Guard) -> bool {
    guard.nets().iter().all(|net| {
        let set = kernel.sets.get(SetId::Guard(Family::of(net)).name());
        set.is_some_and(|(_, _, members)| members.contains_key(net))
    })
}

#[test]
fn sets_converge_whatever_the_kernel_does() {
    for seed in 0..100 {
        let mut world = World::new(seed, seed % 2 == 1);
        for _ in 0..80 {
            world.act();
            if world.seed.below(3) == 0 {
                world.desired.handle_time(world.now);
                world.reconcile();
                world.check_converged();
            } else if !world.in_sync() {
                world.reconcile();
            }
        }
    }
}

#[test]
fn nothing_is_removed_before_the_whole_set_is_known() {
    let (now, guard) = (Timestamp::from_secs(1000), Guard::new(&GuardFacts::default()));
    let frame = Frame { families: vec![Family::V4], guard_nets: Vec::new(), bans_max: 10 };
    let mut kernel = FakeKernel::default();
    let mut desired = Desired::new(10);
    for step in plan(&frame, &desired, &Kernel::default(), now) {
        kernel.apply(&step, now);
    }
    let (set, target) = (SetId::Bans(Family::V4), "192.0.2.1".parse().unwrap());
    kernel.apply(&Step::Add { set, target, timeout_s: Some(600), comment: "r".into() }, now);
    assert_eq!(plan(&frame, &desired, &kernel.observe(now), now), []);
    // A larger set is filled with it, too.
    let wider = Frame { bans_max: 20, ..frame };
    for step in plan(&wider, &desired, &kernel.observe(now), now) {
        kernel.apply(&step, now);
        assert!(kernel.drops(target.addr(), now));
    }
    let update = BanUpdate { revision: 1, snapshot: true, changes: Vec::new(), cause: None };
    desired.handle_update(&update, &guard, now);
    assert_eq!(plan(&wider, &desired, &kernel.observe(now), now), [Step::Delete { set, target }]);
}

#[test]
fn a_set_that_cannot_be_replaced_is_left_alone() {
    let (now, guard) = (Timestamp::from_secs(1000), Guard::new(&GuardFacts::default()));
    let frame = Frame { families: vec![Family::V4], guard_nets: guard.nets(), bans_max: 10 };
    let mut desired = Desired::new(10);
    let target: Target = "192.0.2.1".parse().unwrap();
    let changes = vec![BanChange::Put(record(target, None, "r"))];
    desired.handle_update(&BanUpdate { revision: 1, snapshot: true, changes, cause: None }, &guard, now);
    let (guarded, bans) = (SetId::Guard(Family::V4), SetId::Bans(Family::V4));
    let mut kernel = Kernel::default();
    for (set, maxelem) in [(guarded, GUARD_NETS_MAX), (bans, frame.maxelem())] {
        kernel.note(&Step::Create { set, maxelem }, now);
    }
    assert_eq!(plan(&frame, &desired, &kernel, now).len(), 2, "a guarded network and a ban");
    let mut with_form = |set: SetId, form: Form| {
        kernel.sets.get_mut(&set).unwrap().form = form;
        (plan(&frame, &desired, &kernel, now), plan_targets([&target], &desired, &kernel, now).len())
    };
    let (steps, _) = with_form(guarded, Form::Extras);
    assert!(matches!(steps[..], [Step::Add { set: SetId::Bans(_), .. }]), "{steps:?}");
    let (steps, _) = with_form(bans, Form::Extras);
    assert!(steps.contains(&Step::Swap(Family::V4)), "it is replaced: {steps:?}");
    assert_eq!(with_form(bans, Form::Foreign), (Vec::new(), 0));
}

#[test]
fn a_long_ban_is_renewed_in_time_and_not_before() {
    let (now, guard) = (Timestamp::from_secs(1000), Guard::new(&GuardFacts::default()));
    let frame = Frame { families: vec![Family::V4], guard_nets: Vec::new(), bans_max: 10 };
    let mut desired = Desired::new(10);
    let target: Target = "192.0.2.1".parse().unwrap();
    let changes = vec![BanChange::Put(record(target, None, "r"))];
    desired.handle_update(&BanUpdate { revision: 1, snapshot: true, changes, cause: None }, &guard, now);
    let mut kernel = Kernel::default();
    for step in plan(&frame, &desired, &kernel, now) {
        kernel.note(&step, now);
    }
    let days = |days: u64| now.saturating_add(Duration::from_secs(86_400 * days));
    assert_eq!(plan(&frame, &desired, &kernel, days(12)), []);
    assert_eq!(plan(&frame, &desired, &kernel, days(13)).len(), 1);
}

/// One family's tables.
#[derive(Default)]
struct FakeTables(BTreeMap<(Table, String), Vec<String>>);

impl FakeTables {
    fn apply(&mut self, step: &RuleStep) {
        let own = |table: &Table| (*table, CHAIN.to_owned());
        let jump = format!("-j {CHAIN}");
        match step {
            RuleStep::NewChain(table) => assert!(self.0.insert(own(table), Vec::new()).is_none()),
            RuleStep::Insert { table, position, rule } => {
                self.0.get_mut(&own(table)).unwrap().insert(position - 1, rule.clone());
            }
            RuleStep::Fill { table, rules } => drop(self.0.insert(own(table), rules.clone())),
            RuleStep::DeleteAt { table, position } => drop(self.0.get_mut(&own(table)).unwrap().remove(position - 1)),
            RuleStep::Jump(place) => {
                assert!(self.0.contains_key(&own(&place.table)), "a jump to nowhere");
                self.chain(place).insert(0, jump);
            }
            RuleStep::Lift { place, jumps } => {
                for _ in 0..*jumps {
                    self.apply(&RuleStep::Unjump(place.clone()));
                }
                self.apply(&RuleStep::Jump(place.clone()));
            }
            RuleStep::Unjump(place) => {
                let first = self.chain(place).iter().position(|rule| *rule == jump).unwrap();
                self.chain(place).remove(first);
            }
            RuleStep::RemoveProbe(table) => drop(self.0.remove(&(*table, PROBE.to_owned())).unwrap()),
            RuleStep::RemoveChain(table) => {
                assert!(!self.0.iter().any(|((of, _), rules)| of == table && rules.contains(&jump)), "still in use");
                self.0.remove(&own(table));
            }
        }
    }

    fn chain(&mut self, place: &ChainRef) -> &mut Vec<String> {
        self.0.get_mut(&(place.table, place.chain.clone())).unwrap()
    }

    fn view(&self) -> View {
        let mut saved = String::new();
        for table in Table::ALL {
            saved += &format!("*{}\n", table.as_str());
            let chains = self.0.iter().filter(|((of, _), _)| *of == table);
            for ((_, chain), _) in chains.clone() {
                saved += &format!(":{chain} - [0:0]\n");
            }
            for ((_, chain), rules) in chains {
                for rule in rules {
                    saved += &format!("[1:60] -A {chain} {rule}\n");
                }
            }
            saved += "COMMIT\n";
        }
        View::parse(&saved)
    }

    fn foreign(&self) -> Vec<(Table, String, Vec<String>)> {
        let jump = format!("-j {CHAIN}");
        let others = self.0.iter().filter(|((_, chain), _)| chain != CHAIN);
        let rules = |rules: &[String]| rules.iter().filter(|rule| **rule != jump).cloned().collect();
        others.map(|((table, chain), all)| (*table, chain.clone(), rules(all))).collect()
    }
}

/// The guard comes before every drop, in whatever state our chain is.
fn check_guard_first(tables: &FakeTables) {
    for ((_, chain), rules) in &tables.0 {
        if chain == CHAIN
            && let Some(drop_at) = rules.iter().position(|rule| rule.ends_with("-j DROP"))
        {
            let guard_at = rules.iter().position(|rule| rule.contains("portcullis-guard-v4 src -j RETURN"));
            assert!(guard_at.is_some_and(|guard_at| guard_at < drop_at), "{rules:?}");
        }
    }
}

#[test]
fn rules_converge_and_those_of_others_stay() {
    let listed = |chains: &[(Table, &str)]| {
        Chains::Listed(chains.iter().map(|(table, chain)| ChainRef::new(*table, chain)).collect())
    };
    let both = listed(&[(Table::Raw, "PREROUTING"), (Table::Filter, "INPUT"), (Table::Filter, DOCKER_USER)]);
    for seed in 0..400 {
        let mut seed = Seed(seed);
        let mut config = FirewallConfig::default();
        let mut tables = FakeTables::default();
        for (table, chain) in [(Table::Raw, "PREROUTING"), (Table::Filter, "INPUT"), (Table::Filter, "FORWARD")] {
            tables.0.insert((table, chain.to_owned()), Vec::new());
        }
        let mut usable: BTreeSet<Table> = [Table::Raw, Table::Filter].into();
        let (mut lifts, mut now) = (Lifts::default(), Timestamp::EPOCH);
        let mut moved: BTreeMap<ChainRef, VecDeque<Timestamp>> = BTreeMap::new();
        for _ in 0..60 {
            now = now.saturating_add(Duration::from_secs(10 + seed.below(200)));
            let places = [(Table::Raw, "PREROUTING"), (Table::Filter, "INPUT")];
            let (table, chain) = places[seed.below(2) as usize];
            let rules = tables.0.get_mut(&(table, chain.to_owned())).unwrap();
            match seed.below(10) {
                0 | 1 => rules.insert(0, "-p tcp -m tcp --dport 443 -j ACCEPT".to_owned()),
                2 => rules.insert(0, "-s 203.0.113.9/32 -j DROP".to_owned()),
                3 => rules.push("-j SOMEWHERE".to_owned()),
                4 => rules.clear(),
                5 => rules.push(format!("-j {CHAIN}")),
                6 => drop(tables.0.get_mut(&(table, CHAIN.to_owned())).map(Vec::clear)),
                7 => drop(tables.0.insert((Table::Filter, DOCKER_USER.to_owned()), vec!["-j RETURN".to_owned()])),
                8 => {
                    config.chains = if seed.below(2) == 0 { Chains::Auto } else { both.clone() };
                    usable = if seed.below(3) == 0 { [Table::Filter].into() } else { Table::ALL.into() };
                }
                _ => {
                    let port = Ports { protocol: Protocol::Tcp, first: 443, last: 443 };
                    config.ports = if seed.below(2) == 0 { vec![port] } else { Vec::new() };
                    config.spare_ports = config.ports.clone();
                }
            }
            // A table that is not usable has no chains to show.
            let mut view = tables.view();
            view.tables.retain(|table, _| usable.contains(table) || *table == Table::Filter);
            let before = tables.foreign();
            let layout = Layout::new(&config, Family::V4, &view, &usable);
            let plan = plan_rules(&layout, &view, &mut lifts, now);
            let jumps = |tables: &FakeTables, place: &ChainRef| {
                let jump = format!("-j {CHAIN}");
                tables.0.get(&(place.table, place.chain.clone())).is_some_and(|rules| rules.contains(&jump))
            };
            let held: Vec<&ChainRef> = layout.places.iter().filter(|place| jumps(&tables, place)).collect();
            for step in &plan.steps {
                tables.apply(step);
                check_guard_first(&tables);
                assert!(held.iter().all(|place| jumps(&tables, place)), "{step} opens a gap");
            }
            assert_eq!(tables.foreign(), before);
            for place in &plan.overtaken {
                moved.entry(place.clone()).or_default();
            }
            let mut again = tables.view();
            again.tables.retain(|table, _| usable.contains(table) || *table == Table::Filter);
            let again = plan_rules(&Layout::new(&config, Family::V4, &again, &usable), &again, &mut lifts, now);
            assert_eq!(again.steps, [], "planning again plans again");
        }
        for step in plan_removal(&tables.view(), |_| false, |_| false) {
            tables.apply(&step);
        }
        assert!(!format!("{:?}", tables.0).contains(CHAIN), "something of ours is left");
    }
}

#[test]
fn we_move_up_three_times_in_ten_minutes_and_then_say_so() {
    let config = FirewallConfig {
        chains: Chains::Listed(vec![ChainRef::new(Table::Filter, "INPUT")]),
        ..FirewallConfig::default()
    };
    let usable = BTreeSet::from([Table::Filter]);
    let mut tables = FakeTables::default();
    tables.0.insert((Table::Filter, "INPUT".to_owned()), Vec::new());
    let mut lifts = Lifts::default();
    let place = ChainRef::new(Table::Filter, "INPUT");
    let mut round = |tables: &mut FakeTables, rule: Option<&str>, at: i64| {
        let now = Timestamp::from_secs(at);
        tables.chain(&place).splice(0..0, rule.map(str::to_owned));
        let view = tables.view();
        let plan = plan_rules(&Layout::new(&config, Family::V4, &view, &usable), &view, &mut lifts, now);
        plan.steps.iter().for_each(|step| tables.apply(step));
        (plan.steps.len(), plan.overtaken.len())
    };
    assert!(round(&mut tables, None, 0).0 > 0);
    assert_eq!(round(&mut tables, Some("-s 192.0.2.9/32 -j DROP"), 1), (0, 0), "a drop above us does no harm");
    assert_eq!(round(&mut tables, Some("-j LOG --log-prefix x"), 2), (0, 0));
    for n in 0..LIFTS_MAX {
        assert_eq!(round(&mut tables, Some("-j ACCEPT"), 10 + n as i64), (1, 0));
    }
    assert_eq!(round(&mut tables, Some("-j ACCEPT"), 20), (0, 1), "someone else wants the place more");
    assert_eq!(round(&mut tables, None, 609), (0, 1));
    assert_eq!(round(&mut tables, None, 611), (1, 0), "and a while later we try again");
}

#[test]
fn the_variant_is_the_one_that_docker_or_the_rules_use() {
    use super::rules::{Variant, choose_variant};
    let view = |text: &str| View::parse(text);
    let (empty, ours) =
        (view(""), view("*raw\n:PREROUTING ACCEPT [0:0]\n:PORTCULLIS - [0:0]\n[0:0] -A PREROUTING -j PORTCULLIS\n"));
    let rules = view("*nat\n:POSTROUTING ACCEPT [0:0]\n[0:0] -A POSTROUTING -j MASQUERADE\n");
    let docker = view("*filter\n:DOCKER-USER - [0:0]\n");
    for (nft, legacy, expected) in [
        (Some(&empty), None, Variant::Nft),
        (Some(&ours), Some(&rules), Variant::Legacy),
        (Some(&rules), Some(&rules), Variant::Nft),
        (Some(&rules), Some(&docker), Variant::Legacy),
        (Some(&docker), Some(&docker), Variant::Nft),
        (None, Some(&empty), Variant::Legacy),
    ] {
        assert_eq!(choose_variant(nft, legacy).map(|(variant, _)| variant), Some(expected));
    }
    assert_eq!(choose_variant(None, None), None);
}

#[test]
fn a_probe_that_a_kill_left_is_removed_and_says_nothing_of_the_host() {
    let saved = "*raw\n:PREROUTING ACCEPT [0:0]\n:PORTCULLIS-PROBE - [0:0]\n[0:0] -A PORTCULLIS-PROBE -s 192.0.2.1/32 -j DROP\n";
    let view = View::parse(saved);
    assert_eq!(view.foreign, 0);
    assert_eq!(plan_removal(&view, |_| true, |_| true), [RuleStep::RemoveProbe(Table::Raw)]);
}
