//! Which back end the sets are kept in, from when one works.

use proto::report::Problem;

use crate::backend::Rules;
use crate::choose::{Chosen, Method};
use crate::config::BackendKind;
use crate::plan::{self, Kernel, Step};
use crate::reconcile::Reconciler;

impl Reconciler {
    /// Whether a back end is to be found, as there is none.
    pub(crate) fn lacks_back_end(&self) -> bool {
        self.sets.is_none() && self.config.backend != BackendKind::None
    }

    /// No back end works, or none is known to.
    pub(crate) fn handle_no_choice(&mut self, text: String) {
        let problem = Problem::degraded(text);
        if self.unavailable.as_ref() != Some(&problem) {
            tracing::error!(reason = problem.text, "No firewall back end");
        }
        self.unavailable = Some(problem);
    }

    /// Takes a back end, instead of the former, if there was one.
    pub(crate) async fn handle_choice(&mut self, chosen: Chosen) {
        if self.sets.is_some() {
            tracing::warn!(former = self.backend_name(), "Firewall back end is chosen anew");
            self.kernel = Kernel::default();
            self.refused.clear();
            self.generation += 1;
            self.doubtful = true;
            self.failure = None;
            self.late.end();
        }
        self.take_choice(chosen).await;
    }

    /// In a dry run nothing is looked at, and what would be done at the start is said.
    pub(crate) async fn begin_dry_run(&mut self) {
        if self.dry_run {
            self.apply_plan().await;
        }
    }

    async fn take_choice(&mut self, chosen: Chosen) {
        tracing::info!(backend = chosen.method.backend(), why = chosen.why, "Chose the firewall back end");
        self.frame.bans_max = chosen.sets.bans_max().await.unwrap_or(self.config.bans_max);
        self.desired.handle_bans_max(self.frame.bans_max as usize);
        self.sets = Some(chosen.sets);
        self.new_rules = chosen.rules;
        self.method = Some(chosen.method);
        self.why = Some(chosen.why);
        self.unavailable = chosen.limited;
    }

    /// What looks members up, once after each choice.
    pub(crate) fn take_rules(&mut self) -> Option<Rules> {
        self.new_rules.take()
    }

    /// How bans are enforced, once that is known.
    pub(crate) fn method(&self) -> Option<Method> {
        self.method
    }

    /// What was chosen and why, for people.
    pub(crate) fn why(&self) -> Option<&str> {
        self.why.as_deref()
    }

    /// Whether the last batch or look failed.
    pub(crate) fn is_failing(&self) -> bool {
        self.failure.is_some()
    }

    /// Whether all that is wanted is in force, and all that is wanted is known. What the kernel refuses for good is not
    /// waited for.
    pub(crate) fn is_settled(&self) -> bool {
        let is_known = !self.doubtful || !self.refused.is_empty();
        let fine = self.sets.is_some() && self.desired.is_whole() && is_known && self.failure.is_none();
        let is_refused = |step: &Step| matches!(step, Step::Add { target, .. } if self.refused.contains_key(target));
        fine && plan::plan(&self.frame, &self.desired, &self.kernel, self.clock.now()).iter().all(is_refused)
    }

    /// `iptables`, `nftables`, `dry-run` or `none`; `auto` while nothing works.
    pub(crate) fn backend_name(&self) -> &'static str {
        match (self.config.backend, self.method) {
            (BackendKind::None, _) => "none",
            (..) if self.dry_run => "dry-run",
            (_, Some(method)) => method.backend(),
            (BackendKind::Auto, None) => "auto",
            (BackendKind::Iptables, None) => "iptables",
            (BackendKind::Nftables, None) => "nftables",
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use prometheus_client::registry::Registry;
    use proto::ban::BanChange;
    use proto::bus::memory::BanUpdate;
    use proto::net::{NetSet, Target};
    use proto::time::{Clock, Timestamp};

    use super::*;
    use crate::backend::Sets;
    use crate::backend::dry_run::DryRun;
    use crate::config::FirewallConfig;
    use crate::metrics::EnforceMetrics;
    use crate::plan::{Family, Form, GROWS, KernelSet, SetId};
    use crate::testing::record;

    #[test]
    fn a_ban_that_the_kernel_refuses_is_not_waited_for() {
        let metrics = EnforceMetrics::register(&mut Registry::default());
        let config = FirewallConfig::default();
        let mut reconciler = Reconciler::new(config, NetSet::default(), true, Clock::system(), metrics);
        reconciler.sets = Some(Sets::DryRun(DryRun));
        reconciler.frame.families = vec![Family::V4];
        reconciler.frame.guard_nets.clear();
        for set in [SetId::Guard(Family::V4), SetId::Bans(Family::V4)] {
            let empty = KernelSet { maxelem: GROWS, form: Form::Ours, members: BTreeMap::new() };
            reconciler.kernel.sets.insert(set, empty);
        }
        let target: Target = "203.0.113.9".parse().unwrap();
        let changes = vec![BanChange::Put(record(target, None))];
        let update = BanUpdate { revision: 1, snapshot: true, changes, cause: None };
        reconciler.desired.handle_update(&update, &reconciler.guard, Timestamp::EPOCH);
        reconciler.doubtful = false;
        assert!(!reconciler.is_settled(), "a ban is missing");
        reconciler.refused.insert(target, "no room".to_owned());
        reconciler.doubtful = true;
        assert!(reconciler.is_settled());
        reconciler.failure = Some("no answer".to_owned());
        assert!(!reconciler.is_settled());
    }
}
