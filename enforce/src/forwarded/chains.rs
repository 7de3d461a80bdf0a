//! Our chains on this host: looks, plans, changes and looks again, in both families.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;

use proto::report::{Problem, Severity};
use proto::time::{Clock, Timestamp};

use crate::backend::iptables::Iptables;
use crate::backend::iptables::reading::{self, Reading};
use crate::command::CommandError;
use crate::config::{FirewallConfig, ForwardedForConfig};
use crate::forwarded::plan::{self, Layout, Plan};
use crate::forwarded::tree::Tree;
use crate::plan::Family;
use crate::plan::rules::{LIFTS_MAX, Lifts, Variant, View};
use crate::reconcile::chain_of;

/// Searches, with the end of each ban.
pub(crate) type Searches = Tree<Option<Timestamp>>;

/// What a look at the chains brought about.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// What is not as it should be.
    pub(crate) problems: Vec<Problem>,
    /// Where the rules stand, a line a family.
    pub(crate) detail: Vec<String>,
    /// Families in which a configured chain exists.
    pub(crate) seen: BTreeSet<Family>,
    /// Families in which something had drifted.
    pub(crate) repairs: u64,
    /// Families whose chains were rewritten.
    pub(crate) rewrites: u64,
    /// Packets and bytes refused since our chains were first made.
    pub(crate) refused: (u64, u64),
}

impl Outcome {
    /// Whether the rules stand wherever there is a place for them.
    pub(crate) fn is_in_force(&self) -> bool {
        let is_degraded = |problem: &Problem| problem.severity == Severity::Degraded;
        !self.seen.is_empty() && !self.problems.iter().any(is_degraded)
    }

    /// Says where no family has a place for rules.
    fn judge_places(&mut self) {
        if self.seen.is_empty() && !self.detail.is_empty() {
            let text = "none of the configured chains exists; no forwarded client is refused";
            self.problems.push(Problem::degraded(text));
        }
    }
}

/// What a family's rules counted: packets and bytes.
#[derive(Clone, Copy, Debug, Default)]
struct Counted {
    /// Before they were last made anew.
    former: (u64, u64),
    /// At the last look.
    last: (u64, u64),
}

/// With what in mind rules are put.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Turn {
    pub(crate) known: bool,
    pub(crate) retry: bool,
    pub(crate) is_host_paused: bool,
}

/// Keeps the chains.
#[derive(Debug)]
pub(crate) struct Chains {
    config: ForwardedForConfig,
    iptables: Iptables,
    dry_run: bool,
    clock: Clock,
    lifts: BTreeMap<Family, Lifts>,
    counted: BTreeMap<Family, Counted>,
    /// Families in which the chains were found as they should be, for these searches.
    placed: BTreeSet<Family>,
    /// Families that could not be changed, and why.
    failed: BTreeMap<Family, String>,
    searches: Searches,
}

impl Chains {
    /// Knows nothing yet.
    pub(crate) fn new(config: ForwardedForConfig, firewall: FirewallConfig, dry_run: bool, clock: Clock) -> Self {
        Self {
            config,
            iptables: Iptables::new(firewall, dry_run, clock.clone()),
            dry_run,
            clock,
            lifts: BTreeMap::new(),
            counted: BTreeMap::new(),
            placed: BTreeSet::new(),
            failed: BTreeMap::new(),
            searches: Searches::new(),
        }
    }

    /// Puts `searches` in force in these families; in a pause of this host makes nothing anew. While it is not `known` who was
    /// refused before, chains that refuse somebody stay as they are. A family that failed is left alone until nobody is to be
    /// refused, or it is told to `retry`.
    pub(crate) async fn put(
        &mut self,
        searches: &Searches,
        Turn { known, retry, is_host_paused }: Turn,
        families: &[Family],
    ) -> Outcome {
        self.take(searches, retry);
        let mut outcome = Outcome::default();
        for &family in families {
            if !self.failed.contains_key(&family)
                && let Err(error) = self.put_family(family, (known, is_host_paused), &mut outcome).await
            {
                self.placed.remove(&family);
                let cause = error.source().map(ToString::to_string);
                tracing::warn!(family = family.as_str(), error = %error, cause, "Forwarded clients not refused");
                self.failed.insert(family, chain_of(&error));
            }
            if let Some(why) = self.failed.get(&family) {
                outcome.problems.push(Problem::degraded(format!("{}: {why}", family.as_str())));
            }
        }
        outcome.judge_places();
        for Counted { former, last } in self.counted.values() {
            outcome.refused = (outcome.refused.0 + former.0 + last.0, outcome.refused.1 + former.1 + last.1);
        }
        outcome
    }

    fn take(&mut self, searches: &Searches, retry: bool) {
        let differ = *searches != self.searches;
        if differ {
            self.searches = searches.clone();
            self.placed.clear();
        }
        // A pause does not wait for the next look at everything. Single bans do: under attack they come in quick succession.
        if retry || (differ && *searches == Searches::new()) {
            self.failed.clear();
        }
    }

    async fn put_family(
        &mut self,
        family: Family,
        (known, is_host_paused): (bool, bool),
        outcome: &mut Outcome,
    ) -> Result<(), CommandError> {
        let Some(reading) = self.iptables.read(family).await? else {
            let text = format!("{}: {} is not installed", family.as_str(), reading::name(family));
            outcome.problems.push(Problem::degraded(text));
            return Ok(());
        };
        if is_host_paused && plan::is_absent(&reading.view) {
            return self.leave_other(family, reading.other).await;
        }
        let layout = Layout::new(&self.config, family, &reading.view, &self.searches);
        report(family, &reading, &layout, outcome);
        self.count(family, reading.view.refused);
        let may_rewrite = known || plan::is_blank(&reading.view);
        let mut lifts = self.lifts.remove(&family).unwrap_or_default();
        let plan = plan::plan(&layout, &reading.view, may_rewrite, (&mut lifts, self.clock.now()));
        self.lifts.insert(family, lifts);
        for place in &plan.overtaken {
            let text = format!(
                "{}: a rule above ours in {place} may let clients in; we moved up {LIFTS_MAX} times in ten minutes and \
                 someone moves above us each time",
                family.as_str()
            );
            outcome.problems.push(Problem::degraded(text));
        }
        self.carry_out((family, may_rewrite), &reading, &plan, outcome).await?;
        self.leave_other(family, reading.other).await
    }

    /// Removes what is ours from the variant that is not in use.
    async fn leave_other(&mut self, family: Family, other: Option<(Variant, View)>) -> Result<(), CommandError> {
        if let Some((variant, view)) = other.filter(|_| !self.dry_run) {
            let lines = plan::plan_removal(&view);
            self.iptables.change_filter((family, variant), &lines, "remove our chains").await?;
        }
        Ok(())
    }

    async fn carry_out(
        &mut self,
        (family, may_rewrite): (Family, bool),
        reading: &Reading,
        plan: &Plan,
        outcome: &mut Outcome,
    ) -> Result<(), CommandError> {
        if plan.lines.is_empty() {
            self.placed.insert(family);
            return Ok(());
        }
        let drifted = self.placed.remove(&family);
        if self.dry_run {
            self.placed.insert(family);
            return Ok(());
        }
        let what = "rewrite our chains in table filter";
        self.iptables.change_filter((family, reading.variant), &plan.lines, what).await?;
        outcome.rewrites += u64::from(plan.rewrites);
        if drifted {
            outcome.repairs += 1;
            tracing::warn!(family = family.as_str(), "Repaired rules about forwarded clients");
        }
        // After a change nothing should be left to do.
        let Some(after) = self.iptables.read(family).await? else { return Ok(()) };
        self.count(family, after.view.refused);
        let layout = Layout::new(&self.config, family, &after.view, &self.searches);
        let left = plan::plan(&layout, &after.view, may_rewrite, (&mut Lifts::default(), Timestamp::EPOCH));
        if left.lines.is_empty() {
            self.placed.insert(family);
        } else {
            tracing::warn!(
                family = family.as_str(),
                "Rules about forwarded clients differ right after they were placed"
            );
            let text = format!("{}: iptables does not show our rules as they were placed", family.as_str());
            outcome.problems.push(Problem::degraded(text));
        }
        Ok(())
    }

    fn count(&mut self, family: Family, refused: (u64, u64)) {
        let Counted { former, last } = self.counted.entry(family).or_default();
        if refused.0 < last.0 || refused.1 < last.1 {
            // Our rules were made anew and count from zero again.
            *former = (former.0 + last.0, former.1 + last.1);
        }
        *last = refused;
    }
}

fn report(family: Family, reading: &Reading, layout: &Layout, outcome: &mut Outcome) {
    if !layout.places.is_empty() {
        outcome.seen.insert(family);
    }
    let family = family.as_str();
    let places: Vec<String> = layout.places.iter().map(ToString::to_string).collect();
    let places = if places.is_empty() { "nowhere".to_owned() } else { places.join(", ") };
    let (variant, why) = (reading.variant.as_str(), reading.why);
    outcome.detail.push(format!("{family}: {variant} ({why}), {places}, {} rules", layout.rules()));
    for missing in &layout.missing {
        let text =
            format!("{family}: chain {missing} does not exist; forwarded clients are refused there once it does");
        outcome.problems.push(Problem::warning(text));
    }
}

/// Removes our chains from both variants of a family. Returns what went, for people, and what could not be done.
pub(crate) async fn remove(
    iptables: &mut Iptables,
    family: Family,
    dry_run: bool,
) -> (Vec<String>, Option<CommandError>) {
    let (views, mut failure) = iptables.read_all(family).await;
    let mut removed = Vec::new();
    for (variant, view) in views {
        let lines = plan::plan_removal(&view);
        let change = async {
            if dry_run { Ok(()) } else { iptables.change_filter((family, variant), &lines, "remove our chains").await }
        };
        match change.await {
            Ok(()) => {
                let place = format!("({}, {})", family.as_str(), variant.as_str());
                removed.extend(plan::describe_removal(&view).into_iter().map(|what| format!("{what} {place}")));
            }
            Err(error) => drop(failure.get_or_insert(error)),
        }
    }
    (removed, failure)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_family_that_failed_is_tried_again_in_its_turn_or_for_a_pause_and_not_at_each_ban() {
        let (config, firewall) = (ForwardedForConfig::default(), FirewallConfig::default());
        let mut chains = Chains::new(config, firewall, false, Clock::system());
        let mut somebody = Searches::new();
        somebody.grow([("\r\nX-Forwarded-For: 192.0.2.1,".to_owned(), None)].into(), 2);
        chains.take(&somebody, false);
        let fail = |chains: &mut Chains| drop(chains.failed.insert(Family::V4, "broken".to_owned()));
        let mut others = Searches::new();
        others.grow([("\r\nX-Forwarded-For: 192.0.2.2,".to_owned(), None)].into(), 2);
        for (searches, retry, tried) in [
            (&somebody, false, false),
            (&others, false, false),
            (&others, true, true),
            (&Searches::new(), false, true),
            (&Searches::new(), false, false),
        ] {
            fail(&mut chains);
            chains.take(searches, retry);
            assert_eq!(chains.failed.is_empty(), tried, "{searches:?} {retry}");
        }
    }

    #[test]
    fn a_family_without_a_place_for_rules_keeps_nothing_from_being_in_force() {
        let looked = |seen: &[Family]| Outcome {
            detail: vec!["ipv6: nft, nowhere, 0 rules".to_owned()],
            problems: vec![Problem::warning("ipv6: chain DOCKER-USER does not exist")],
            seen: seen.iter().copied().collect(),
            ..Outcome::default()
        };
        let (mut nowhere, mut somewhere) = (looked(&[]), looked(&[Family::V4]));
        nowhere.judge_places();
        somewhere.judge_places();
        assert!(!nowhere.is_in_force() && somewhere.is_in_force());
        assert_eq!((nowhere.problems.len(), somewhere.problems.len()), (2, 1), "degraded where nobody is refused");
        somewhere.problems.push(Problem::degraded("ipv4: iptables-restore failed"));
        assert!(!somewhere.is_in_force());
    }
}
