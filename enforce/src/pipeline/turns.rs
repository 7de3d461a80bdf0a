//! How back ends take turns: rules of the one in use, what a former one left, one that breaks, and letting go in a pause.

use tokio::task::JoinError;

use crate::backend::{Rules, RulesOutcome};
use crate::choose::Method;
use crate::config::BackendKind;
use crate::error::EnforceError;
use crate::host;
use crate::pipeline::Enforcer;

/// Resyncs in a row after which a back end that does not work is replaced: as many as iptables gets to read its rules.
const BROKEN_MAX: u32 = 8;
/// Resyncs between two looks whether something better than plain rules works by now.
const PLAIN_RESYNCS: u32 = 30;
/// Resyncs after which it is looked for, and told, that a former back end still bans.
const FORMER_RESYNCS: u32 = 4;

impl Enforcer {
    fn is_paused(&self) -> bool {
        self.besides.gate.paused.is_some()
    }

    /// Follows the file that pauses this host.
    pub(super) async fn handle_gate(&mut self) {
        let gate = &mut self.besides.gate;
        if gate.look() {
            let paused = gate.paused.clone();
            tracing::warn!(paused = paused.as_deref().unwrap_or("no more"), "This host's own pause changed");
            self.besides.host_pause.send_replace(paused.clone());
            self.rules_lifted = false;
            self.reconciler.handle_host_pause(paused).await;
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

    /// Lets go of the firewall, where nothing of ours is left that could ban, and nothing is under way. Ask once the sets
    /// are empty.
    pub(super) fn stand_off(&mut self) {
        let idle = self.rules_job.is_none() && self.former.job.is_none();
        if idle && self.is_without_rules() && self.is_without_former() {
            self.besides.gate.stand_off();
        }
    }

    fn is_without_rules(&self) -> bool {
        self.rules_lifted || self.inputs.dry_run || (self.rules.is_none() && self.rules_job.is_none())
    }

    fn is_without_former(&self) -> bool {
        let none = self.config.firewall.backend == BackendKind::None && !self.former.was_used();
        self.former.is_cleared || self.inputs.dry_run || none || !host::may_change_firewall()
    }

    /// Those of a back end that was just chosen. What the former ones counted stays counted.
    pub(super) fn take_new_rules(&mut self) {
        if let Some(rules) = self.reconciler.take_rules() {
            self.rules = Some(rules);
            self.rules_families.clear();
            self.rules_lifted = false;
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
    pub(super) async fn replace_broken(&mut self) {
        let families = self.rules_families.len();
        let rules_broken = self.outcome.failed >= families.max(1);
        let is_broken = self.reconciler.method().is_some() && (rules_broken || self.reconciler.is_failing());
        self.broken = if is_broken { self.broken + 1 } else { 0 };
        let idle = self.rules.is_some() && self.observe_job.is_none();
        let may = self.config.firewall.backend == BackendKind::Auto && !self.inputs.dry_run;
        if self.broken >= BROKEN_MAX && idle && may {
            self.broken = 0;
            self.choose_anew(None).await;
        }
        let is_plain = self.reconciler.method() == Some(Method::Plain) && !self.is_paused() && !self.inputs.dry_run;
        self.plain_for = if is_plain { self.plain_for + 1 } else { 0 };
        if self.plain_for >= PLAIN_RESYNCS && idle {
            self.plain_for = 0;
            self.choose_anew(Some(Method::Plain)).await;
        }
    }

    async fn choose_anew(&mut self, but: Option<Method>) {
        if self.reconciler.reopen(but).await {
            self.take_new_rules();
            self.begin_observation(true);
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
        if self.former.is_cleared || self.inputs.dry_run {
            return;
        }
        let is_due = match self.config.firewall.backend {
            BackendKind::None => self.former.was_used(),
            // Sets go after the rules that look them up.
            _ if self.is_paused() => self.is_without_rules(),
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
        if outcome.failed > 0 {
            // What could not be seen is where it was, as far as anybody knows.
            for (family, place) in std::mem::take(&mut self.outcome.places) {
                outcome.places.entry(family).or_insert(place);
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
        self.rules_lifted = outcome.lifts && outcome.failed == 0;
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
