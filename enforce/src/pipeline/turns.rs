//! How back ends take turns: rules of the one in use, what a former one left, one that breaks, and letting go in a pause.

use std::time::Duration;

use tokio::task::JoinError;

use crate::backend::iptables::Iptables;
use crate::backend::{Rules, RulesOutcome};
use crate::choose::Method;
use crate::config::BackendKind;
use crate::error::EnforceError;
use crate::host;
use crate::pipeline::Enforcer;

/// Resyncs in a row after which a back end that does not work is replaced.
const BROKEN_MAX: u32 = 8;
/// Resyncs between two looks whether something better than plain rules works by now.
const PLAIN_RESYNCS: u32 = 30;
/// Resyncs after which it is looked for, and told, that a former back end still bans.
const FORMER_RESYNCS: u32 = 4;

/// Looks at sets that do not become empty in a pause, before the firewall is let go all the same.
const UNLIFTED_LOOKS_MAX: u32 = 3;
/// A firewall that was let go is left alone for so long at least, for a teardown that waits to begin in.
const LET_GO_FOR: Duration = Duration::from_secs(5);

/// How far our rules are gone in a pause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lifted {
    /// Nothing is known of it yet, or a change of ours may still come into effect.
    No,
    /// What can be removed is.
    Partly,
    /// They are gone.
    Wholly,
}

impl Lifted {
    fn after(outcome: &RulesOutcome) -> Self {
        match outcome.lifts {
            true if outcome.failed == 0 => Self::Wholly,
            true if !outcome.unfinished => Self::Partly,
            _ => Self::No,
        }
    }
}

/// What a host's firewall does after we stopped, for people.
fn describe_rest(backend: BackendKind, method: Option<Method>, is_paused: bool) -> &'static str {
    match (backend, method) {
        (BackendKind::None, _) => "no bans, as no firewall is configured",
        _ if is_paused => "bans stay lifted, as they are paused",
        (_, Some(_)) => "bans stay in force, each until its end",
        (_, None) => "no bans but those of before, as no back end worked",
    }
}

impl Enforcer {
    fn is_paused(&self) -> bool {
        self.besides.gate.paused.is_some()
    }

    /// What the firewall does without us, for people.
    pub(super) fn without_us(&self) -> &'static str {
        if self.inputs.dry_run {
            return "as it was, as a dry run changes nothing";
        }
        describe_rest(self.config.firewall.backend, self.reconciler.method(), self.reconciler.paused().is_some())
    }

    /// Follows the file that pauses this host.
    pub(super) async fn handle_gate(&mut self) {
        let gate = &mut self.besides.gate;
        if gate.look() {
            let paused = gate.paused.clone();
            tracing::warn!(paused = paused.as_deref().unwrap_or("no more"), "This host's own pause changed");
            self.besides.let_go.begin();
            self.besides.host_pause.send_replace(paused.clone());
            self.begin_lifting();
            // To try a back end is to change the firewall, and what any of them holds is lifted without it.
            match self.is_paused() {
                true => self.search.end(),
                false => self.begin_search(),
            }
            self.reconciler.handle_host_pause(paused).await;
            if !self.is_paused() {
                // A look that began in the pause is worth nothing.
                self.observe_job = None;
                self.begin_observation(true);
            }
            self.begin_rules();
            // Where there are no rules to lift first, nothing else would begin it soon.
            self.begin_clearing();
        }
        let idle = self.observe_job.is_none() && self.rules_job.is_none();
        if self.is_paused() && !self.besides.gate.stands_off && idle {
            self.begin_observation(true);
            if self.observe_job.is_none() {
                self.stand_off();
            }
        }
    }

    /// Nothing is known yet of what can be lifted.
    fn begin_lifting(&mut self) {
        self.lifted = Lifted::No;
        self.unlifted_looks = 0;
        self.former.was_tried = false;
    }

    /// Lets go of the firewall, where nothing is under way and all that can be lifted is: what is left then is not made
    /// good here, and who tears down may do better.
    pub(super) fn stand_off(&mut self) {
        let has_let_go = self.besides.let_go.is_done() || !self.config.forwarded_for.enabled;
        let idle = self.rules_job.is_none()
            && self.former.job.is_none()
            && self.search.job.is_none()
            && self.abandoned.iter_mut().all(Iptables::has_ended)
            && has_let_go
            && !self.reconciler.is_change_under_way();
        let no_sets = self.reconciler.method().is_none();
        let is_empty = no_sets || self.reconciler.is_lifted();
        let sets_tried = is_empty || self.reconciler.is_failing() || self.unlifted_looks >= UNLIFTED_LOOKS_MAX;
        let rules_tried = self.is_without_rules() || self.lifted == Lifted::Partly;
        let former_tried = self.is_without_former() || self.former.was_tried;
        if idle && sets_tried && rules_tried && former_tried {
            let is_partial = !(is_empty && self.is_without_rules() && self.is_without_former());
            self.let_go_at = self.inputs.clock.raw();
            self.besides.gate.stand_off(is_partial);
            self.reconciler.stand_off(true);
        }
    }

    /// Tries again to lift what could not be, while nobody else is at work.
    pub(super) fn take_back(&mut self) {
        let is_due = self.inputs.clock.raw().since(self.let_go_at) >= LET_GO_FOR;
        if self.is_paused() && is_due && self.besides.gate.take_back() {
            self.reconciler.stand_off(false);
            self.begin_lifting();
        }
    }

    fn is_without_rules(&self) -> bool {
        let none = self.rules.is_none() && self.rules_job.is_none();
        self.lifted == Lifted::Wholly || self.inputs.dry_run || none
    }

    fn is_without_former(&self) -> bool {
        let none = self.config.firewall.backend == BackendKind::None && !self.former.was_used();
        self.former.is_cleared || self.inputs.dry_run || none || !host::may_change_firewall()
    }

    /// Those of a back end that was just chosen. What the former ones counted stays counted.
    pub(super) fn take_new_rules(&mut self) {
        if let Some(rules) = self.reconciler.take_rules() {
            if let Some(Rules::Iptables(former)) = self.rules.replace(rules) {
                self.abandoned.push(*former);
            }
            self.abandoned.retain_mut(|former| !former.has_ended());
            self.rules_families.clear();
            self.lifted = Lifted::No;
            self.outcome = RulesOutcome::default();
            self.dropped_before = self.dropped_now();
            self.dropped = (0, 0);
            if let Some(method) = self.reconciler.method() {
                self.former.begin_use(method);
            }
        }
    }

    pub(super) fn dropped_now(&self) -> (u64, u64) {
        (self.dropped_before.0 + self.dropped.0, self.dropped_before.1 + self.dropped.1)
    }

    /// A back end that nothing can be done with for so long is given up, where another may be chosen; and so is the last
    /// resort.
    pub(super) fn replace_broken(&mut self) {
        if self.is_paused() {
            return;
        }
        let families = self.rules_families.len();
        let rules_broken = self.outcome.failed >= families.max(1);
        let is_broken = self.reconciler.method().is_some() && (rules_broken || self.reconciler.is_failing());
        self.broken = if is_broken { self.broken + 1 } else { 0 };
        // A look that still goes on is dropped with the back end: where it hangs, it would be there at each resync.
        let idle = self.rules.is_some();
        let may = self.config.firewall.backend == BackendKind::Auto && !self.inputs.dry_run;
        if self.broken >= BROKEN_MAX && idle && may {
            self.broken = 0;
            self.begin_search_anew(None);
        }
        let is_plain = self.reconciler.method() == Some(Method::Plain) && !self.inputs.dry_run;
        self.plain_for = if is_plain { self.plain_for + 1 } else { 0 };
        if self.plain_for >= PLAIN_RESYNCS && idle {
            self.plain_for = 0;
            self.begin_search_anew(Some(Method::Plain));
        }
    }

    /// Removes what a former back end left; if that cannot be for long, looks whether there is anything, and says so.
    pub(super) fn handle_former(&mut self) {
        self.begin_clearing();
        if self.former.is_cleared || self.inputs.dry_run || self.former.job.is_some() {
            return;
        }
        let Some(method) = self.reconciler.method() else { return };
        self.former.waited += 1;
        if self.former.waited >= FORMER_RESYNCS {
            self.former.waited = 0;
            self.former.begin_look(method, &self.config.firewall);
        }
    }

    /// Removes what a former back end left, once all bans stand without it, or are to be lifted.
    pub(super) fn begin_clearing(&mut self) {
        // What a search tries is not to be cleared away under it.
        if self.former.is_cleared || self.inputs.dry_run || self.search.job.is_some() {
            return;
        }
        let is_due = match self.config.firewall.backend {
            BackendKind::None => self.former.was_used(),
            // Sets go after the rules that look them up.
            _ if self.is_paused() => self.is_without_rules() || self.lifted == Lifted::Partly,
            _ => {
                let placed = self.outcome.failed == 0 && !self.outcome.places.is_empty();
                placed && self.rules.is_some() && self.reconciler.is_settled()
            }
        };
        if is_due {
            self.former.begin(self.reconciler.method(), &self.config.firewall);
        }
    }

    /// Looks at the rules; in a pause of this host removes them, as they may be of a former back end that bans by them.
    pub(super) fn begin_rules(&mut self) {
        let (lifts, families) = match self.is_paused() {
            true => (true, self.reconciler.frame.families.clone()),
            false => (false, self.reconciler.families_ready()),
        };
        let is_due = match lifts {
            true => !self.is_without_rules() && !self.besides.gate.stands_off,
            false => !families.is_empty() && (!self.inputs.dry_run || host::may_change_firewall()),
        };
        if !is_due || self.config.firewall.backend == BackendKind::None {
            return;
        }
        // Not at home: the last look still goes on.
        let Some(mut rules) = self.rules.take() else { return };
        // Rules that are lifted are of no family.
        self.rules_families = if lifts { Vec::new() } else { families.clone() };
        self.rules_job = Some(tokio::spawn(async move {
            let outcome = if lifts { rules.lift(&families).await } else { rules.resync(&families).await };
            (rules, outcome)
        }));
    }

    pub(super) fn take_rules(&mut self, done: Result<(Rules, RulesOutcome), JoinError>) -> Result<(), EnforceError> {
        let (rules, mut outcome) = done.map_err(|source| EnforceError::Job { job: "keeps firewall rules", source })?;
        // What could not be seen is where it was, as far as anybody knows.
        for (family, place) in std::mem::take(&mut self.outcome.places) {
            if outcome.unseen.contains(&family) {
                outcome.places.insert(family, place);
            }
        }
        self.rules = Some(rules);
        let metrics = &self.inputs.metrics;
        for kind in &outcome.steps {
            metrics.count_step(kind);
        }
        metrics.repairs.inc_by(outcome.repairs);
        metrics.dropped_packets.inc_by(outcome.dropped.0.saturating_sub(self.dropped.0));
        metrics.dropped_bytes.inc_by(outcome.dropped.1.saturating_sub(self.dropped.1));
        self.dropped = (self.dropped.0.max(outcome.dropped.0), self.dropped.1.max(outcome.dropped.1));
        self.rules_repairs += outcome.repairs;
        self.lifted = Lifted::after(&outcome);
        let lifts = outcome.lifts;
        self.outcome = outcome;
        self.begin_clearing();
        if lifts != self.is_paused() {
            // The pause began or ended meanwhile.
            self.begin_rules();
        }
        self.report();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bans_are_said_to_stay_in_force_only_where_there_are_some() {
        let rest = |method, is_paused| describe_rest(BackendKind::Auto, method, is_paused);
        assert!(rest(Some(Method::Ipset), false).starts_with("bans stay in force"));
        for other in [
            rest(Some(Method::Ipset), true),
            rest(None, false),
            describe_rest(BackendKind::None, None, false),
            describe_rest(BackendKind::None, None, true),
        ] {
            assert!(!other.contains("in force"), "{other}");
        }
    }

    #[test]
    fn rules_that_cannot_be_removed_may_stay_in_a_pause_but_not_a_change_that_may_yet_come() {
        let outcome = |lifts, failed, unfinished| RulesOutcome { lifts, failed, unfinished, ..RulesOutcome::default() };
        assert_eq!(Lifted::after(&outcome(true, 0, false)), Lifted::Wholly);
        assert_eq!(Lifted::after(&outcome(true, 1, false)), Lifted::Partly);
        assert_eq!(Lifted::after(&outcome(true, 1, true)), Lifted::No);
        assert_eq!(Lifted::after(&outcome(false, 0, false)), Lifted::No);
    }
}
