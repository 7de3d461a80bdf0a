//! Chains and jumps through iptables, for both families, in the variant that the host uses.
//!
//! It is looked at with `iptables-save -c`, one process a variant, and changed through [`calls`]. Legacy tables are never
//! woken where nft is there: even listing them would create them, so `/proc` is asked first. What could not be read is
//! not taken for empty: nothing is decided or changed in that family until the next look.

pub(crate) mod calls;
pub(crate) mod reading;
pub(crate) mod trial;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use proto::report::Problem;
use proto::time::{Clock, Timestamp};

use crate::backend::RulesOutcome;
use crate::backend::iptables::calls::{Calls, Programs};
use crate::backend::plain::{Members, Plain};
use crate::backend::subsystem::{self, Ask, Subsystem};
use crate::command::{self, CommandError};
use crate::config::{FirewallConfig, Table};
use crate::host;
use crate::plan::plain;
use crate::plan::rules::{self, LIFTS_MAX, Layout, Lifts, RulePlan, RuleStep, Variant, View};
use crate::plan::{Family, Kernel};

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
    /// How the kernel is asked what it has.
    ask: Ask,
    /// Variants that do not take our rules, as a trial has shown.
    refusing: BTreeSet<Variant>,
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
            ask: subsystem::ASK_KERNEL,
            refusing: BTreeSet::new(),
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

    /// Whether nothing that hung can come into effect any more.
    pub(crate) fn has_ended(&mut self) -> bool {
        self.calls.check_finished().is_ok()
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
        outcome.unseen.insert(family);
        self.calls.check_finished()?;
        let (views, unreadable) = self.look(family).await;
        // The other variant is no choice: the one that cannot be read now may hold the rules, ours among them.
        if let Some(error) = unreadable {
            return Err(error);
        }
        outcome.unseen.remove(&family);
        let Some((variant, why)) = self.choose(family, &views) else {
            let name = program_name(family);
            self.placed.remove(&family);
            let text = format!("{}: {name} is not installed; nobody is banned there", family.as_str());
            outcome.problems.push(Problem::degraded(text));
            outcome.failed += 1;
            return Ok(());
        };
        let empty = View::default();
        let view = views.get(&variant).unwrap_or(&empty);
        let (usable, unusable) = self.usable_tables(family, variant, view).await?;
        let layout = self.layout(family, view, &usable);
        report(family, (variant, why), (&layout, &unusable), outcome);
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
        if self.placed.contains(&family) && !layout.places.is_empty() {
            outcome.places.insert(family, format!("{} ({})", list_places(&layout), variant.as_str()));
        }
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
                Ok(view) => drop(views.insert(variant, view)),
                // Then legacy is all there is.
                Err(_) if variant == Variant::Nft && subsystem::is_absent(Subsystem::NfTables, self.ask).await => {}
                Err(error) => unreadable = Some(error),
            }
        }
        (views, unreadable)
    }

    /// Which variant to use, and why, of those that take our rules; `views` are of all that can be read. Legacy tables may
    /// be woken where there is nothing else.
    fn choose(&self, family: Family, views: &BTreeMap<Variant, View>) -> Option<(Variant, &'static str)> {
        let takes = |variant| !self.refusing.contains(&variant);
        let view = |variant| views.get(&variant).filter(|_| takes(variant));
        let sleeping = || {
            let is_there = takes(Variant::Legacy) && self.programs.contains_key(&(family, Variant::Legacy));
            is_there.then_some((Variant::Legacy, "nft is not available"))
        };
        let (variant, why) = rules::choose_variant(view(Variant::Nft), view(Variant::Legacy)).or_else(sleeping)?;
        let why = match variant {
            Variant::Nft if !takes(Variant::Legacy) => "legacy does not take our rules",
            Variant::Legacy if !takes(Variant::Nft) => "nft does not take our rules",
            _ => why,
        };
        Some((variant, why))
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

    /// Tables that are there or come with their first use; and why the others do not.
    async fn usable_tables(
        &mut self,
        family: Family,
        variant: Variant,
        view: &View,
    ) -> Result<(BTreeSet<Table>, BTreeMap<Table, CommandError>), CommandError> {
        let mut usable: BTreeSet<Table> = view.tables.keys().copied().collect();
        let mut unusable = BTreeMap::new();
        for table in Layout::tables(&self.config) {
            let Some(&programs) = self.programs.get(&(family, variant)) else { continue };
            // To ask is to make the table in legacy, so a dry run takes it for granted.
            if usable.contains(&table) || self.dry_run {
                usable.insert(table);
                continue;
            }
            match self.calls.call(programs, table, "-S".to_owned()).await {
                Ok(()) => drop(usable.insert(table)),
                Err(error @ CommandError::Unfinished { .. }) => return Err(error),
                Err(error) => drop(unusable.insert(table, error)),
            }
        }
        Ok((usable, unusable))
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

/// Tells what was chosen, and which chains are missing; `unusable` are tables without which a chain cannot be.
fn report(
    family: Family,
    (variant, why): (Variant, &str),
    (layout, unusable): (&Layout, &BTreeMap<Table, CommandError>),
    outcome: &mut RulesOutcome,
) {
    let name = family.as_str();
    outcome.detail.push(format!("{name}: {} ({why}), {}", variant.as_str(), list_places(layout)));
    for missing in &layout.missing {
        let text = match unusable.get(&missing.table).filter(|_| missing.is_built_in()) {
            Some(error) => format!("{name}: table {} cannot be used: {}", missing.table.as_str(), chain_of(error)),
            None => format!("{name}: chain {missing} does not exist; bans will apply there once it does"),
        };
        outcome.problems.push(Problem::warning(text));
    }
    if layout.places.is_empty() {
        let missing = if unusable.is_empty() { "exists" } else { "can be used" };
        let text = format!("{name}: none of the configured chains {missing}; nobody is banned there");
        outcome.problems.push(Problem::degraded(text));
        if unusable.is_empty() {
            outcome.placeless.insert(family);
        }
    }
}

fn list_places(layout: &Layout) -> String {
    let places: Vec<String> = layout.places.iter().map(ToString::to_string).collect();
    if places.is_empty() { "nowhere".to_owned() } else { places.join(", ") }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ChainRef;

    #[test]
    fn a_table_that_cannot_be_used_is_not_a_chain_that_may_come() {
        let missing = vec![ChainRef::new(Table::Filter, "INPUT")];
        let layout = Layout { missing, ..Layout::default() };
        let error = CommandError::Failed { command: "ip6tables".to_owned(), said: "no module".to_owned() };
        let unusable = BTreeMap::from([(Table::Filter, error)]);
        for (unusable, said, may_come) in [
            (unusable, "table filter cannot be used: `ip6tables` failed: no module", false),
            (BTreeMap::new(), "exist", true),
        ] {
            let mut outcome = RulesOutcome::default();
            report(Family::V6, (Variant::Legacy, "why"), (&layout, &unusable), &mut outcome);
            assert!(outcome.problems[0].text.contains(said), "{:?}", outcome.problems);
            assert_eq!(outcome.placeless.contains(&Family::V6), may_come, "bans would count as in force");
            assert_eq!(outcome.detail, ["ipv6: legacy (why), nowhere"]);
        }
    }
}
