//! Chains and jumps through iptables, for both families, in the variant that the host uses.
//!
//! It is looked at with `iptables-save -c`, one process a variant, and changed through [`calls`]. Legacy tables are never
//! woken where nft is there: even listing them would create them, so `/proc` is asked first. What could not be read is
//! not taken for empty: nothing is decided or changed in that family until the next look.

pub(crate) mod calls;
pub(crate) mod reading;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use proto::report::Problem;
use proto::time::{Clock, Timestamp};

use crate::backend::RulesOutcome;
use crate::backend::iptables::calls::{Calls, Programs};
use crate::backend::plain::{Members, Plain};
use crate::command::{self, CommandError};
use crate::config::{FirewallConfig, Table};
use crate::host;
use crate::plan::plain;
use crate::plan::rules::{self, LIFTS_MAX, Layout, Lifts, PROBE, RulePlan, RuleStep, Variant, View};
use crate::plan::{Family, Kernel};

/// Looks at the nft variant that all failed, since the start, before the kernel is taken for one without nf_tables.
const UNREAD_MAX: u32 = 6;

/// What a family's rules counted: packets and bytes.
#[derive(Clone, Copy, Debug, Default)]
struct Counted {
    /// Before they were last made anew.
    former: (u64, u64),
    /// At the last look.
    last: (u64, u64),
}

/// Keeps our rules in place.
#[derive(Debug)]
pub(crate) struct Iptables {
    config: FirewallConfig,
    dry_run: bool,
    clock: Clock,
    calls: Calls,
    programs: BTreeMap<(Family, Variant), Programs>,
    /// Families whose nft variant was read at least once.
    read: BTreeSet<Family>,
    /// Failed looks at the nft variant of the others.
    unread: BTreeMap<Family, u32>,
    lifts: BTreeMap<Family, Lifts>,
    /// Families whose rules were in place at the last look.
    placed: BTreeSet<Family>,
    counted: BTreeMap<Family, Counted>,
    /// Where bans are rules.
    plain: Option<Plain>,
    /// What it holds, during a look, and by how much the host's clock is ahead, in milliseconds.
    members: Option<(Kernel, i64)>,
}

impl Iptables {
    /// Knows nothing yet.
    pub(crate) fn new(config: FirewallConfig, dry_run: bool, clock: Clock) -> Self {
        Self {
            config,
            dry_run,
            clock,
            calls: Calls::new(),
            programs: BTreeMap::new(),
            read: BTreeSet::new(),
            unread: BTreeMap::new(),
            lifts: BTreeMap::new(),
            placed: BTreeSet::new(),
            counted: BTreeMap::new(),
            plain: None,
            members: None,
        }
    }

    /// Whether there is a program of either variant.
    pub(crate) async fn is_installed(&mut self) -> bool {
        self.find_programs(Family::V4).await;
        self.programs.keys().any(|(family, _)| *family == Family::V4)
    }

    /// Bans are rules of our chain, and begin as those that stand there.
    pub(crate) async fn hold_bans(&mut self) -> Plain {
        let mut members = Members::new(self.config.clone(), self.clock.clone());
        for family in Family::ALL {
            let (views, _) = self.look(family).await;
            for (variant, view) in &views {
                let Some(programs) = self.programs.get(&(family, *variant)) else { continue };
                members.take_over(family, *programs, view);
            }
        }
        let plain = Plain::new(members);
        self.plain = Some(plain.clone());
        plain
    }

    /// Removes our rules of these families, whichever bans they are for.
    pub(crate) async fn lift(&mut self, families: &[Family]) -> RulesOutcome {
        let mut outcome = RulesOutcome { lifts: true, ..RulesOutcome::default() };
        let mut members = match &self.plain {
            Some(plain) => Some(plain.lock().await),
            None => None,
        };
        for &family in families {
            self.placed.remove(&family);
            let removal = self.teardown(family).await;
            // Whatever is left of it is not written again.
            if let Some(members) = &mut members {
                members.lose(family);
            }
            outcome.steps.extend(removal.kinds);
            outcome.failed += usize::from(!removal.left.is_empty());
            for (what, error) in removal.left {
                outcome.unfinished |= matches!(error, CommandError::Unfinished { .. });
                tracing::warn!(what, error = %error, cause = cause(&error), "Firewall rules not lifted");
                outcome.problems.push(Problem::degraded(format!("{what} not lifted: {}", chain_of(&error))));
            }
        }
        outcome
    }

    /// Looks at the rules of these families and puts right what differs.
    pub(crate) async fn resync(&mut self, families: &[Family]) -> RulesOutcome {
        let mut outcome = RulesOutcome::default();
        let mut members = match &self.plain {
            Some(plain) => Some(plain.lock().await),
            None => None,
        };
        if let Some(members) = &mut members {
            if let Err(error) = members.renew().await {
                tracing::debug!(error = %error, cause = cause(&error), "Rules of bans not renewed");
            }
            self.members = Some((members.kernel.clone(), members.skew_ms));
        }
        for &family in families {
            if let Err(error) = self.resync_family(family, members.as_deref_mut(), &mut outcome).await {
                self.placed.remove(&family);
                outcome.failed += 1;
                tracing::warn!(family = family.as_str(), error = %error, cause = cause(&error), "Firewall rules not in place");
                outcome.problems.push(Problem::degraded(format!("{}: {}", family.as_str(), chain_of(&error))));
            }
        }
        for Counted { former, last } in self.counted.values() {
            outcome.dropped = (outcome.dropped.0 + former.0 + last.0, outcome.dropped.1 + former.1 + last.1);
        }
        outcome
    }

    async fn resync_family(
        &mut self,
        family: Family,
        members: Option<&mut Members>,
        outcome: &mut RulesOutcome,
    ) -> Result<(), CommandError> {
        self.calls.check_finished()?;
        let (views, unreadable) = self.look(family).await;
        // The other variant is no choice: the one that cannot be read now may hold the rules, ours among them.
        if let Some(error) = unreadable {
            return Err(error);
        }
        let (nft, legacy) = (views.get(&Variant::Nft), views.get(&Variant::Legacy));
        let chosen = rules::choose_variant(nft, legacy).or_else(|| self.sleeping_legacy(family));
        let Some((variant, why)) = chosen else {
            let name = program_name(family);
            self.placed.remove(&family);
            let text = format!("{}: {name} is not installed; nobody is banned there", family.as_str());
            outcome.problems.push(Problem::degraded(text));
            outcome.failed += 1;
            return Ok(());
        };
        let empty = View::default();
        let view = views.get(&variant).unwrap_or(&empty);
        let usable = self.usable_tables(family, variant, view).await?;
        let layout = self.layout(family, view, &usable);
        self.report(family, (variant, why), &layout, outcome);
        self.count(family, view);

        let mut lifts = self.lifts.remove(&family).unwrap_or_default();
        let plan = rules::plan_rules(&layout, view, &mut lifts, self.clock.now());
        self.lifts.insert(family, lifts);
        for place in &plan.overtaken {
            let text = format!(
                "{}: a rule above ours in {place} may let banned clients in; we moved up {LIFTS_MAX} times in ten minutes \
                 and someone moves above us each time",
                family.as_str()
            );
            outcome.problems.push(Problem::degraded(text));
        }
        self.carry_out(family, variant, &plan, outcome).await?;
        if let (Some(members), Some(programs)) = (members, self.programs.get(&(family, variant))) {
            members.take_spot(family, *programs, layout.rules.keys().copied().collect());
        }
        self.leave_others(family, variant, &views, outcome).await
    }

    fn layout(&self, family: Family, view: &View, usable: &BTreeSet<Table>) -> Layout {
        let mut layout = Layout::new(&self.config, family, view, usable);
        if let Some(held) = &self.members {
            for (&table, rules) in &mut layout.rules {
                *rules = plain::render_rules(&self.config, (family, table), &held.0, held.1);
            }
        }
        layout
    }

    /// The rules of every variant that is there.
    async fn look(&mut self, family: Family) -> (BTreeMap<Variant, View>, Option<CommandError>) {
        self.find_programs(family).await;
        let (mut views, mut unreadable) = (BTreeMap::new(), None);
        for variant in [Variant::Nft, Variant::Legacy] {
            let Some(programs) = self.programs.get(&(family, variant)) else { continue };
            if variant == Variant::Legacy && !host::legacy_is_awake(family) {
                continue;
            }
            match save(programs).await {
                Ok(view) => {
                    views.insert(variant, view);
                    if variant == Variant::Nft {
                        self.read.insert(family);
                    }
                }
                Err(_) if variant == Variant::Nft && self.is_without_nft(family) => {}
                Err(error) => unreadable = Some(error),
            }
        }
        (views, unreadable)
    }

    /// Counts a failed look at nft. One is chance; a kernel without nf_tables fails each time, and then legacy is all
    /// there is.
    fn is_without_nft(&mut self, family: Family) -> bool {
        if self.read.contains(&family) {
            return false;
        }
        let failures = self.unread.entry(family).or_default();
        *failures = failures.saturating_add(1);
        *failures > UNREAD_MAX
    }

    /// Legacy tables may be woken where there is nothing else.
    fn sleeping_legacy(&self, family: Family) -> Option<(Variant, &'static str)> {
        let there = |variant| self.programs.contains_key(&(family, variant));
        let given_up = !self.read.contains(&family) && self.unread.get(&family).is_some_and(|n| *n > UNREAD_MAX);
        let has_nft = there(Variant::Nft) && !given_up;
        (there(Variant::Legacy) && !has_nft).then_some((Variant::Legacy, "nft is not available"))
    }

    async fn find_programs(&mut self, family: Family) {
        let name = program_name(family);
        for (variant, suffix) in [(Variant::Nft, "-nft"), (Variant::Legacy, "-legacy")] {
            if self.programs.contains_key(&(family, variant)) {
                continue;
            }
            self.find_variant(family, variant, &format!("{name}{suffix}"));
        }
        // Hosts with one variant may have only the plain name.
        let known =
            [Variant::Nft, Variant::Legacy].iter().any(|variant| self.programs.contains_key(&(family, *variant)));
        if !known && let Some(program) = command::find(name) {
            // One that does not say what it is is asked again at the next look.
            let Ok(version) = command::succeed(&program, &["--version"]).await else { return };
            let is_nft = String::from_utf8_lossy(&version).contains("nf_tables");
            self.find_variant(family, if is_nft { Variant::Nft } else { Variant::Legacy }, name);
        }
    }

    fn find_variant(&mut self, family: Family, variant: Variant, name: &str) {
        let locks = variant == Variant::Legacy;
        let find = |suffix: &str| command::find(&format!("{name}{suffix}"));
        let forever = |path: PathBuf| path.into_os_string().into_string().ok().map(calls::forever);
        if let (Some(change), Some(save), Some(restore)) = (find(""), find("-save"), find("-restore"))
            && let (Some(change), Some(save), Some(restore)) = (forever(change), forever(save), forever(restore))
        {
            self.programs.insert((family, variant), Programs { change, save, restore, locks });
        }
    }

    /// Tables that are there or come with their first use.
    async fn usable_tables(
        &mut self,
        family: Family,
        variant: Variant,
        view: &View,
    ) -> Result<BTreeSet<Table>, CommandError> {
        let mut usable: BTreeSet<Table> = view.tables.keys().copied().collect();
        for table in Layout::tables(&self.config) {
            // To ask is to make the table in legacy, so a dry run takes it for granted.
            let usable_too = match self.programs.get(&(family, variant)) {
                _ if usable.contains(&table) || self.dry_run => true,
                Some(&programs) => match self.calls.call(programs, table, "-S".to_owned()).await {
                    Err(error @ CommandError::Unfinished { .. }) => return Err(error),
                    answered => answered.is_ok(),
                },
                None => false,
            };
            if usable_too {
                usable.insert(table);
            }
        }
        Ok(usable)
    }

    fn report(&self, family: Family, (variant, why): (Variant, &str), layout: &Layout, outcome: &mut RulesOutcome) {
        let family_name = family.as_str();
        let places: Vec<String> = layout.places.iter().map(ToString::to_string).collect();
        let places = places.join(", ");
        outcome.detail.push(format!("{family_name}: {} ({why}), {places}", variant.as_str()));
        if !places.is_empty() {
            outcome.places.insert(family, format!("{places} ({})", variant.as_str()));
        }
        for missing in &layout.missing {
            let text = format!("{family_name}: chain {missing} does not exist; bans will apply there once it does");
            outcome.problems.push(Problem::warning(text));
        }
        if layout.places.is_empty() {
            let text = format!("{family_name}: none of the configured chains exists; nobody is banned there");
            outcome.problems.push(Problem::degraded(text));
            outcome.placeless += 1;
        }
    }

    fn count(&mut self, family: Family, view: &View) {
        let Counted { former, last } = self.counted.entry(family).or_default();
        if view.dropped.0 < last.0 || view.dropped.1 < last.1 {
            // Our rules were made anew and count from zero again.
            *former = (former.0 + last.0, former.1 + last.1);
        }
        *last = view.dropped;
    }

    async fn carry_out(
        &mut self,
        family: Family,
        variant: Variant,
        plan: &RulePlan,
        outcome: &mut RulesOutcome,
    ) -> Result<(), CommandError> {
        if plan.steps.is_empty() {
            self.placed.insert(family);
            return Ok(());
        }
        let drifted = self.placed.remove(&family);
        if self.dry_run {
            if !drifted {
                for step in &plan.steps {
                    tracing::info!(
                        family = family.as_str(),
                        variant = variant.as_str(),
                        command = format!("{} {step}", program_name(family)),
                        "Would change a rule"
                    );
                }
            }
            self.placed.insert(family);
            return Ok(());
        }
        self.apply(family, variant, &plan.steps, outcome).await?;
        if drifted {
            outcome.repairs += 1;
            tracing::warn!(family = family.as_str(), steps = plan.steps.len(), "Repaired firewall rules");
        } else {
            tracing::info!(family = family.as_str(), variant = variant.as_str(), "Placed firewall rules");
        }
        self.look_again(family, variant, outcome).await
    }

    /// After a change nothing should be left to do.
    async fn look_again(
        &mut self,
        family: Family,
        variant: Variant,
        outcome: &mut RulesOutcome,
    ) -> Result<(), CommandError> {
        let Some(programs) = self.programs.get(&(family, variant)) else { return Ok(()) };
        let view = save(programs).await?;
        let usable = view.tables.keys().copied().collect();
        let layout = self.layout(family, &view, &usable);
        let left = rules::plan_rules(&layout, &view, &mut Lifts::default(), Timestamp::EPOCH).steps;
        if left.is_empty() {
            self.placed.insert(family);
        } else {
            tracing::warn!(family = family.as_str(), ?left, "Firewall rules differ right after they were placed");
            let text = format!("{}: iptables does not show our rules as they were placed", family.as_str());
            outcome.problems.push(Problem::degraded(text));
        }
        Ok(())
    }

    /// Removes what is ours from the variant that is not in use.
    async fn leave_others(
        &mut self,
        family: Family,
        chosen: Variant,
        views: &BTreeMap<Variant, View>,
        outcome: &mut RulesOutcome,
    ) -> Result<(), CommandError> {
        for (&variant, view) in views.iter().filter(|(variant, _)| **variant != chosen) {
            let steps = rules::plan_removal(view, |_| false, |_| false);
            if !self.dry_run {
                self.apply(family, variant, &steps, outcome).await?;
            }
        }
        Ok(())
    }

    async fn apply(
        &mut self,
        family: Family,
        variant: Variant,
        steps: &[RuleStep],
        outcome: &mut RulesOutcome,
    ) -> Result<(), CommandError> {
        let Some(&programs) = self.programs.get(&(family, variant)) else { return Ok(()) };
        for step in steps {
            self.calls.apply(programs, step).await?;
            outcome.steps.push(step.kind());
        }
        Ok(())
    }

    /// Whether the kernel takes a rule that is made like this, in a chain of its own for a moment. For the `patient`, what
    /// cannot be read now is no refusal.
    ///
    /// # Errors
    /// Why not; of which [`CommandError::is_passing`] may end by itself.
    pub(crate) async fn probe(&mut self, rule: &str, patient: bool) -> Result<(), CommandError> {
        let family = Family::V4;
        let (views, unreadable) = self.look(family).await;
        if let Some(error) = unreadable {
            return if patient { Ok(()) } else { Err(error) };
        }
        let chosen = rules::choose_variant(views.get(&Variant::Nft), views.get(&Variant::Legacy));
        let chosen = chosen.or_else(|| self.sleeping_legacy(family));
        let programs = chosen.and_then(|(variant, _)| self.programs.get(&(family, variant)).copied());
        let name = program_name(family);
        let Some(programs) = programs else { return Err(CommandError::NotInstalled { program: name }) };
        let mut refused = None;
        // The first that takes it will do: where there is no raw table, there is another.
        for table in Layout::tables(&self.config) {
            let table = table.as_str();
            let made = format!("*{table}\n:{PROBE} - [0:0]\n-A {PROBE} {rule}\nCOMMIT\n");
            let input = format!("{made}*{table}\n-F {PROBE}\n-X {PROBE}\nCOMMIT\n");
            match calls::restore_input(programs, &input, rule).await {
                Ok(()) => return Ok(()),
                Err(error) if error.is_passing() => return Err(error),
                Err(error) => refused = Some(error),
            }
        }
        refused.map_or(Ok(()), Err)
    }

    /// Removes all that can be removed of ours from both variants of a family.
    pub(crate) async fn teardown(&mut self, family: Family) -> Removal {
        let mut removal = Removal::default();
        if let Err(error) = self.calls.check_finished() {
            removal.left.push((format!("our {} rules", family.as_str()), error));
            return removal;
        }
        let (views, unreadable) = self.look(family).await;
        for (variant, view) in &views {
            let Some(&programs) = self.programs.get(&(family, *variant)) else { continue };
            for step in rules::plan_removal(view, |_| false, |_| false) {
                let what =
                    format!("{} ({}, {})", rules::describe_removal(&step, view), family.as_str(), variant.as_str());
                let done = if self.dry_run { Ok(()) } else { self.calls.apply(programs, &step).await };
                match done {
                    Ok(()) => {
                        removal.kinds.push(step.kind());
                        removal.removed.push(what);
                    }
                    Err(error) => removal.left.push((name_obstacles(what, &step, view), error)),
                }
            }
        }
        if let Some(error) = unreadable {
            removal.left.push((format!("our {} rules, where they cannot be read", family.as_str()), error));
        }
        removal
    }
}

/// What a removal did in one family.
#[derive(Debug, Default)]
pub(crate) struct Removal {
    /// For people.
    pub(crate) removed: Vec<String>,
    /// For metrics.
    kinds: Vec<&'static str>,
    /// What could not be removed, for people, and why.
    pub(crate) left: Vec<(String, CommandError)>,
}

/// Adds the rules of others on whose account the chain stays.
fn name_obstacles(what: String, step: &RuleStep, view: &View) -> String {
    let RuleStep::RemoveChain(table) = step else { return what };
    match rules::foreign_jumps(view, *table) {
        jumps if jumps.is_empty() => what,
        jumps => format!("{what}, which others lead to by `{}`,", jumps.join("`, `")),
    }
}

fn program_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "iptables",
        Family::V6 => "ip6tables",
    }
}

async fn save(programs: &Programs) -> Result<View, CommandError> {
    let saved = command::succeed(programs.save.as_ref(), &["-c"]).await?;
    Ok(View::parse(&String::from_utf8_lossy(&saved)))
}

fn cause(error: &CommandError) -> Option<String> {
    std::error::Error::source(error).map(ToString::to_string)
}

fn chain_of(error: &CommandError) -> String {
    cause(error).map_or_else(|| error.to_string(), |cause| format!("{error}: {cause}"))
}
