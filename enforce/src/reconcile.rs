//! Keeps the kernel's sets equal to the desired set: takes changes, plans, applies, and compares with what is observed.
//!
//! The kernel is known from what was observed and what was applied since, so a change costs one process and no look.
//! Observations take time; what was changed meanwhile ([`Reconciler::touched`]) is not overridden by them.

mod explain;
mod late;
mod opening;
mod problems;

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::net::IpAddr;
use std::sync::Arc;

use proto::ban::Lists;
use proto::bus::memory::BanUpdate;
use proto::net::{NetSet, Target};
use proto::report::Problem;
use proto::time::{Clock, Timestamp};

use crate::backend::ipset::Header;
use crate::backend::{Applied, Look, Rules, RulesOutcome, Sets};
use crate::choose::Method;
use crate::config::{BackendKind, FirewallConfig};
use crate::desired::Desired;
use crate::guard::{Guard, GuardFacts};
use crate::host::{self, HostError};
use crate::last_set::LastSet;
use crate::metrics::EnforceMetrics;
use crate::plan::{self, Family, Form, Frame, Kernel, SetId, Step};
use crate::reconcile::late::Late;

/// Owns the desired set and what is known of the kernel's.
#[derive(Debug)]
pub(crate) struct Reconciler {
    pub(crate) desired: Desired,
    pub(crate) frame: Frame,
    pub(crate) repairs: u64,
    config: FirewallConfig,
    clock: Clock,
    metrics: EnforceMetrics,
    dry_run: bool,
    facts: GuardFacts,
    /// Facts that could not be read at the last look at the host.
    blind: Vec<HostError>,
    guard: Guard,
    lists: Arc<Lists>,
    /// Why this host is paused whatever the lists say: bans are only removed then, and nothing is made or repaired.
    host_pause: Option<String>,
    /// Others may change what is ours, so we do not.
    stands_off: bool,
    kernel: Kernel,
    sets: Option<Sets>,
    new_rules: Option<Rules>,
    method: Option<Method>,
    /// What was chosen and why.
    why: Option<String>,
    /// Why there are no sets, or none that are worth the name.
    unavailable: Option<Problem>,
    /// Why the last batch failed.
    failure: Option<String>,
    late: Late,
    refused: BTreeMap<Target, String>,
    touched: BTreeSet<Target>,
    /// Counts steps that change more than one ban; an observation begun before such a step is worth nothing.
    generation: u64,
    /// The kernel may differ from what we know.
    doubtful: bool,
}

/// What an observation is compared with.
#[derive(Debug)]
pub(crate) struct Observation {
    generation: u64,
    sets: Sets,
    /// Only headers.
    brief: bool,
}

/// What was observed.
#[derive(Debug)]
pub(crate) enum Observed {
    Looked(Look),
    Members(u64, Kernel),
    Failed(String),
}

impl Observation {
    /// Looks. Slow, so it runs beside everything else.
    pub(crate) async fn run(self, clock: Clock) -> Observed {
        let result = if self.brief {
            self.sets.look().await.map(Observed::Looked)
        } else {
            let kernel = self.sets.observe(&clock).await;
            let members = |kernel| Observed::Members(self.generation, kernel);
            kernel.map(|kernel| kernel.map_or(Observed::Looked(Look::Nothing), members))
        };
        result.unwrap_or_else(|error| Observed::Failed(chain_of(&error)))
    }
}

impl Reconciler {
    /// Knows the host, and nobody is banned.
    pub(crate) fn new(
        config: FirewallConfig,
        trusted_proxies: NetSet,
        dry_run: bool,
        clock: Clock,
        metrics: EnforceMetrics,
    ) -> Self {
        let mut facts = GuardFacts {
            own: Vec::new(),
            gateways: Vec::new(),
            bus_servers: Vec::new(),
            trusted_proxies,
            never_ban: Vec::new(),
            prefix_min_v4: config.prefix_min_v4,
            prefix_min_v6: config.prefix_min_v6,
        };
        let blind = read_host(&mut facts, host::own_addresses(), host::gateways());
        let guard = Guard::new(&facts);
        let frame = Frame { families: host::families(), guard_nets: guard.nets(), bans_max: config.bans_max };
        Self {
            desired: Desired::new(config.bans_max as usize),
            frame,
            repairs: 0,
            config,
            clock,
            metrics,
            dry_run,
            facts,
            blind,
            guard,
            lists: Arc::default(),
            host_pause: None,
            stands_off: false,
            kernel: Kernel::default(),
            sets: None,
            new_rules: None,
            method: None,
            why: None,
            unavailable: None,
            failure: None,
            late: Late::default(),
            refused: BTreeMap::new(),
            touched: BTreeSet::new(),
            generation: 0,
            doubtful: true,
        }
    }

    /// Takes over the last set. The first look at the kernel puts it in force.
    pub(crate) fn start(&mut self, last: LastSet) {
        let now = self.clock.now();
        self.lists = Arc::new(last.lists);
        self.facts.never_ban.clone_from(&self.lists.never_ban);
        self.guard = Guard::new(&self.facts);
        self.frame.guard_nets = self.guard.nets();
        self.desired.handle_last_set(last.bans, &self.guard, now);
        self.desired.handle_pause(self.host_pause.is_some() || is_paused(&self.lists, now));
    }

    /// Takes changes of the ban set: one look-up a change and one process in all.
    pub(crate) async fn handle_bans(&mut self, update: &BanUpdate) {
        let now = self.clock.now();
        let first = !self.desired.is_whole();
        let touched = self.desired.handle_update(update, &self.guard, now);
        let done = if first || update.snapshot {
            // What the kernel holds besides the former set has to be looked at too.
            self.apply_plan().await
        } else {
            let steps = plan::plan_targets(&touched, &self.desired, &self.kernel, now);
            self.apply(steps).await
        };
        self.refused.retain(|target, _| self.desired.wanted(target).is_some());
        if let (true, Some(cause), false) = (done, update.cause, self.dry_run) {
            self.metrics.log_to_kernel_seconds.observe(self.clock.now().since(cause).as_secs_f64());
        }
    }

    /// Takes new lists.
    pub(crate) async fn handle_lists(&mut self, lists: Arc<Lists>) {
        if lists == self.lists {
            return;
        }
        self.lists = lists;
        let mut facts = self.facts.clone();
        facts.never_ban.clone_from(&self.lists.never_ban);
        let guarded = self.take_facts(facts);
        let paused = self.take_pause();
        if guarded || paused {
            self.apply_plan().await;
        }
    }

    /// Forgets bans that are over, and ends a pause.
    pub(crate) async fn handle_time(&mut self) {
        let touched = self.desired.handle_time(self.clock.now());
        if self.take_pause() {
            self.apply_plan().await;
        } else if !touched.is_empty() {
            // Most have ended in the kernel already; others may have come in for them.
            let steps = plan::plan_targets(&touched, &self.desired, &self.kernel, self.clock.now());
            self.apply(steps).await;
        }
    }

    /// Looks at the host anew, and takes the servers that connect it to others.
    pub(crate) async fn handle_host(&mut self, bus_servers: &[IpAddr]) {
        let mut facts = self.facts.clone();
        bus_servers.clone_into(&mut facts.bus_servers);
        self.blind = read_host(&mut facts, host::own_addresses(), host::gateways());
        let families = host::families();
        let family_came = families != self.frame.families;
        self.frame.families = families;
        if self.take_facts(facts) || family_came {
            self.apply_plan().await;
        }
    }

    fn take_facts(&mut self, facts: GuardFacts) -> bool {
        if facts == self.facts {
            return false;
        }
        self.facts = facts;
        self.guard = Guard::new(&self.facts);
        self.frame.guard_nets = self.guard.nets();
        self.desired.handle_guard(&self.guard);
        true
    }

    fn take_pause(&mut self) -> bool {
        let paused = self.host_pause.is_some() || is_paused(&self.lists, self.clock.now());
        let new = self.desired.handle_pause(paused);
        if new {
            tracing::info!(paused, "Pause changed");
        }
        new
    }

    /// Lifts all bans of this host. At its end, they are put back by the next look: others may have changed what is ours.
    pub(crate) async fn handle_host_pause(&mut self, why: Option<String>) {
        self.host_pause = why;
        self.stands_off = false;
        let is_new = self.take_pause();
        if self.host_pause.is_none() {
            self.generation += 1;
            self.doubtful = true;
        } else if is_new {
            self.apply_plan().await;
        }
    }

    /// Sets whether kernel sets are left alone, as others may change what is ours. The end of this host's pause ends that.
    pub(crate) fn stand_off(&mut self, stands_off: bool) {
        self.stands_off = stands_off;
    }

    /// Sets why this host is paused before [`Self::start`].
    pub(crate) fn begin_paused(&mut self, why: Option<String>) {
        self.host_pause = why;
    }

    /// Why all bans are lifted, if they are.
    pub(crate) fn paused(&self) -> Option<String> {
        let by_operator = || self.desired.is_paused().then(|| "by an operator".to_owned());
        self.host_pause.clone().or_else(by_operator)
    }

    /// Whether no ban is in the kernel, as was just observed. No rule looks up a set that is still being filled.
    pub(crate) fn is_lifted(&self) -> bool {
        let is_empty =
            |family: &Family| self.kernel.sets.get(&SetId::Bans(*family)).is_none_or(|set| set.members.is_empty());
        !self.doubtful && self.failure.is_none() && self.frame.families.iter().all(is_empty)
    }

    /// Whether what was asked for is in force, single bans that the kernel refuses aside. That takes rules in each family
    /// that has sets, as far as one of its chains exists.
    pub(crate) fn is_in_force(&self, rules: &RulesOutcome) -> bool {
        if self.config.backend == BackendKind::None {
            return true;
        }
        let is_placed = |family: &Family| rules.places.contains_key(family);
        let looked_up =
            self.families_ready().iter().all(|family| is_placed(family) || rules.placeless.contains(family));
        let banning = looked_up && !rules.places.is_empty();
        let lifted = self.dry_run || self.paused().is_some();
        self.failure.is_none() && self.sets.is_some() && (banning || lifted)
    }

    /// What is to be observed now: everything when in doubt or asked, else the headers.
    pub(crate) fn observe(&mut self, all: bool) -> Option<Observation> {
        if all || self.doubtful {
            return self.observe_members();
        }
        let sets = self.sets.clone()?;
        self.touched.clear();
        Some(Observation { generation: self.generation, sets, brief: true })
    }

    fn observe_members(&mut self) -> Option<Observation> {
        let sets = self.sets.clone().filter(|_| !self.late.is_under_way())?;
        self.touched.clear();
        self.late.is_due = false;
        Some(Observation { generation: self.generation, sets, brief: false })
    }

    /// Takes an observation and puts right what differs. Returns whether everything should be observed at once.
    pub(crate) async fn handle_observed(&mut self, observed: Observed) -> bool {
        match observed {
            Observed::Looked(Look::Nothing) => (self.doubtful, self.failure) = (false, None),
            Observed::Looked(Look::Unchanged) => {}
            Observed::Looked(Look::Changed) => return true,
            Observed::Looked(Look::Headers(headers)) => return !self.agrees(&headers),
            Observed::Failed(text) => self.fail(text),
            Observed::Members(generation, _) if generation != self.generation => self.doubtful = true,
            Observed::Members(_, kernel) => {
                self.doubtful = false;
                self.failure = None;
                self.take_kernel(kernel).await;
            }
        }
        false
    }

    async fn take_kernel(&mut self, mut observed: Kernel) {
        for target in &self.touched {
            let Some(set) = observed.sets.get_mut(&SetId::Bans(Family::of(target))) else { continue };
            match self.kernel.held(target) {
                Some(held) => drop(set.members.insert(*target, held.clone())),
                None => drop(set.members.remove(target)),
            }
        }
        let now = self.clock.now();
        let known = !self.kernel.sets.is_empty();
        let expected = plan::plan(&self.frame, &self.desired, &self.kernel, now);
        self.kernel = observed;
        if !self.desired.is_whole() {
            // A ban may be so new that only the kernel has kept it.
            let held = self.frame.families.iter().flat_map(|&family| self.kernel.entries(family));
            self.desired.adopt(held, &self.guard, now);
        }
        let steps = plan::plan(&self.frame, &self.desired, &self.kernel, now);
        let drifted = known && self.host_pause.is_none() && expected.is_empty() && !steps.is_empty();
        let count = steps.len();
        if self.apply(steps).await && drifted {
            self.repairs += 1;
            self.metrics.repairs.inc();
            tracing::warn!(steps = count, "Repaired kernel sets");
        }
    }

    /// Whether the sets are there and as large as we know them to be. Bans that have just ended may still be counted.
    fn agrees(&self, headers: &BTreeMap<SetId, Header>) -> bool {
        let now = self.clock.now();
        let slack = self.touched.len();
        self.frame.families.iter().all(|&family| {
            let fits = |set: SetId, maxelem: u32, least: usize| {
                let most = self.kernel.sets.get(&set).map_or(0, |set| set.members.len());
                headers.get(&set).is_some_and(|header| {
                    if let Some(known) = self.kernel.sets.get(&set).filter(|known| known.is_beyond_repair(set)) {
                        // Nothing can be done about it, until it becomes another.
                        return header.form == known.form && header.maxelem == known.maxelem;
                    }
                    let counts = least.saturating_sub(slack)..=most + slack;
                    header.form == Form::Ours && header.maxelem == maxelem && counts.contains(&header.count)
                })
            };
            let guard = SetId::Guard(family);
            let guarded = self.kernel.sets.get(&guard).map_or(0, |set| set.members.len());
            fits(guard, plan::GUARD_NETS_MAX, guarded)
                && fits(SetId::Bans(family), self.frame.maxelem(), self.kernel.bans(family, now))
        })
    }

    async fn apply_plan(&mut self) -> bool {
        let steps = plan::plan(&self.frame, &self.desired, &self.kernel, self.clock.now());
        self.apply(steps).await
    }

    /// The one place from which kernel sets are changed. Returns whether every step was taken.
    async fn apply(&mut self, mut steps: Vec<Step>) -> bool {
        if self.stands_off {
            steps.clear();
        } else if self.host_pause.is_some() {
            steps.retain(|step| matches!(step, Step::Delete { set, .. } | Step::Flush(set) if set.holds_bans()));
        }
        let Some(sets) = self.sets.clone().filter(|_| !steps.is_empty()) else { return self.sets.is_some() };
        if self.failure.is_some() {
            // It may hang again, and only a look tells whether it would not.
            self.late.is_due = true;
            return false;
        }
        let started = self.clock.now();
        let (steps, applied) = match self.late.run(sets, steps).await {
            Ok(done) => done,
            Err(text) => {
                self.generation += 1;
                self.fail(text);
                return false;
            }
        };
        let took = self.clock.now().since(started);
        self.metrics.apply_seconds.observe(took.as_secs_f64());
        let done = self.note(&steps, &applied, started);
        tracing::debug!(steps = steps.len(), done, took_us = took.as_micros(), "Applied steps");
        if !applied.refused.is_empty() {
            self.doubtful = true;
            self.metrics.refused.inc_by(applied.refused.len() as u64);
            let why = &applied.refused[0].why;
            tracing::warn!(steps = applied.refused.len(), first = why, "Kernel refused steps");
        }
        match applied.stopped {
            Some((_, error)) => self.fail(chain_of(&error)),
            None => self.failure = None,
        }
        done == steps.len()
    }

    fn note(&mut self, steps: &[Step], applied: &Applied, started: Timestamp) -> usize {
        let stop = applied.stopped.as_ref().map_or(steps.len(), |(step, _)| *step);
        let mut refused = applied.refused.iter().peekable();
        let mut done = 0;
        for (index, step) in steps.iter().enumerate() {
            if let Step::Add { set: SetId::Bans(_), target, .. } | Step::Delete { set: SetId::Bans(_), target } = step {
                self.touched.insert(*target);
                self.refused.remove(target);
            } else {
                self.generation += 1;
            }
            if let Some(refusal) = refused.next_if(|refusal| refusal.step == index) {
                if let Step::Add { target, .. } = step {
                    self.refused.insert(*target, refusal.why.clone());
                }
            } else if index < stop {
                self.kernel.note(step, started);
                self.metrics.count_step(step.kind());
                done += 1;
            }
        }
        done
    }

    fn fail(&mut self, text: String) {
        self.doubtful = true;
        self.metrics.failed.inc();
        tracing::error!(reason = text, "Kernel sets not in force");
        self.failure = Some(text);
    }

    /// Families whose sets exist, so that rules may refer to them.
    pub(crate) fn families_ready(&self) -> Vec<Family> {
        let has = |set: SetId| self.kernel.sets.contains_key(&set);
        let ready = |family: &Family| has(SetId::Guard(*family)) && has(SetId::Bans(*family));
        self.frame.families.iter().copied().filter(ready).collect()
    }

    /// Bans of families that this host has, which the kernel is to hold; and of others.
    pub(crate) fn desired_here(&self) -> (usize, usize) {
        let here = &self.frame.families;
        let elsewhere = if Family::ALL.iter().all(|family| here.contains(family)) {
            0
        } else {
            self.desired.all().filter(|(target, _)| !here.contains(&Family::of(target))).count()
        };
        (self.desired.count() - elsewhere, elsewhere)
    }

    /// Bans in the kernel, by family.
    pub(crate) fn members(&self) -> BTreeMap<Family, usize> {
        let now = self.clock.now();
        self.frame.families.iter().map(|family| (*family, self.kernel.bans(*family, now))).collect()
    }

    /// What is to be kept for the next start.
    pub(crate) fn last_set(&self) -> LastSet {
        let bans = self.desired.all().map(|(target, entry)| (*target, entry.clone())).collect();
        LastSet { lists: Lists::clone(&self.lists), bans }
    }
}

/// Takes what the host says. What it does not say stays as it was; returns why.
pub(crate) fn read_host(
    facts: &mut GuardFacts,
    own: Result<Vec<IpAddr>, HostError>,
    gateways: Result<Vec<IpAddr>, HostError>,
) -> Vec<HostError> {
    let mut blind = Vec::new();
    for (fact, said) in [(&mut facts.own, own), (&mut facts.gateways, gateways)] {
        match said {
            Ok(said) => *fact = said,
            Err(error) => {
                tracing::warn!(error = %chain_of(&error), "Guard kept as it was");
                blind.push(error);
            }
        }
    }
    blind
}

/// Whether all bans are lifted at `now`.
pub(crate) fn is_paused(lists: &Lists, now: Timestamp) -> bool {
    lists.paused.is_some_and(|pause| pause.until.is_none_or(|until| now < until))
}

/// An error with its causes, for problems that people read.
pub(crate) fn chain_of(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::io;

    use prometheus_client::registry::Registry;

    use super::*;
    use crate::plan::KernelSet;

    fn reconciler() -> Reconciler {
        let metrics = EnforceMetrics::register(&mut Registry::default());
        Reconciler::new(FirewallConfig::default(), NetSet::default(), true, Clock::system(), metrics)
    }

    #[test]
    fn what_the_host_does_not_say_stays_guarded_and_is_reported() {
        let fail = |what| Err(HostError { what, source: io::Error::other("busy") });
        let (own, gateway) = ("192.0.2.1".parse().unwrap(), "192.0.2.254".parse().unwrap());
        let mut facts = GuardFacts { own: vec![own], gateways: vec![gateway], ..GuardFacts::default() };
        let mut reconciler = reconciler();
        reconciler.blind = read_host(&mut facts, fail("addresses"), fail("routes"));
        assert_eq!((&facts.own[..], &facts.gateways[..]), (&[own][..], &[gateway][..]));
        let problems: Vec<String> = reconciler.problems().into_iter().map(|problem| problem.text).collect();
        assert_eq!(problems.len(), 2, "{problems:?}");
        assert!(problems[0].ends_with("cannot read the host's addresses: busy"), "{problems:?}");

        assert!(read_host(&mut facts, Ok(Vec::new()), Ok(vec![gateway])).is_empty());
        assert_eq!((facts.own.len(), facts.gateways.len()), (0, 1), "what it says is taken");
    }

    #[test]
    fn bans_that_no_rule_looks_up_are_not_in_force() {
        let mut reconciler = reconciler();
        reconciler.dry_run = false;
        reconciler.frame.families = Family::ALL.to_vec();
        reconciler.sets = Some(Sets::DryRun(crate::backend::dry_run::DryRun));
        let mut rules = RulesOutcome::default();
        assert!(!reconciler.is_in_force(&rules), "there are no rules yet");
        for set in Family::ALL.into_iter().flat_map(|family| [SetId::Guard(family), SetId::Bans(family)]) {
            let empty = KernelSet { form: Form::Ours, maxelem: 9, members: BTreeMap::new() };
            reconciler.kernel.sets.insert(set, empty);
        }
        rules.places.insert(Family::V4, "raw/PREROUTING".to_owned());
        assert!(!reconciler.is_in_force(&rules), "the other family has none");
        rules.placeless.insert(Family::V6);
        assert!(reconciler.is_in_force(&rules), "a family without a chain is waited for");
        rules.placeless.clear();
        rules.places.insert(Family::V6, "raw/PREROUTING".to_owned());
        assert!(reconciler.is_in_force(&rules));
        reconciler.failure = Some("no answer".to_owned());
        assert!(!reconciler.is_in_force(&rules));
        reconciler.failure = None;
        reconciler.host_pause = Some("by its file".to_owned());
        assert!(reconciler.is_in_force(&RulesOutcome::default()), "a pause asks for no rules");
    }

    #[test]
    fn a_set_beyond_repair_is_reported_by_name_and_looked_at_no_more_than_others() {
        let mut reconciler = reconciler();
        reconciler.frame.families = vec![Family::V4];
        let (guard, bans) = (SetId::Guard(Family::V4), SetId::Bans(Family::V4));
        let (room, maxelem) = (plan::GUARD_NETS_MAX, reconciler.frame.maxelem());
        let set = |form, maxelem| KernelSet { form, maxelem, members: BTreeMap::new() };
        reconciler.kernel.sets = [(guard, set(Form::Extras, room)), (bans, set(Form::Foreign, maxelem))].into();
        let problems = format!("{:?}", reconciler.problems());
        assert!(problems.contains("portcullis-guard-v4") && problems.contains("set portcullis-v4"), "{problems}");

        let header = |form, maxelem| Header { form, maxelem, count: 7 };
        let mut headers = BTreeMap::from([(guard, header(Form::Extras, room)), (bans, header(Form::Foreign, maxelem))]);
        assert!(reconciler.agrees(&headers), "everything is looked at again for nothing");
        headers.insert(guard, header(Form::Ours, room));
        assert!(!reconciler.agrees(&headers), "that someone has put it right is not noticed");
    }
}
