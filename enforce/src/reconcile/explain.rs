//! The answer to `explain`: what this host's firewall holds of an address, and why or why not.

use std::collections::BTreeMap;
use std::net::IpAddr;

use proto::api::{BackendHold, HoldState};
use proto::net::Target;

use crate::backend::Sets;
use crate::plan::{Family, SetId};
use crate::reconcile::{Reconciler, chain_of};

impl Reconciler {
    /// Which ban holds the address here, and why or why not. The kernel is asked when the answer is awaited.
    pub(crate) fn explain(
        &self,
        address: IpAddr,
        places: &BTreeMap<Family, String>,
    ) -> impl Future<Output = BackendHold> + use<> {
        let host = Target::host(address);
        let hold = BackendHold { backend: self.backend_name().to_owned(), ..self.weigh(host, places) };
        let (sets, set) = (self.sets.clone(), SetId::Bans(Family::of(&host)));
        let is_looked_up = places.contains_key(&set.family());
        async move { ask_kernel(hold, (sets, set), host.addr(), is_looked_up).await }
    }

    fn weigh(&self, host: Target, places: &BTreeMap<Family, String>) -> BackendHold {
        if self.sets.is_none() {
            let why = self.unavailable.as_ref().map_or("no firewall back end", |problem| &problem.text);
            return BackendHold::without(HoldState::Idle, why);
        }
        if !self.frame.families.contains(&Family::of(&host)) {
            let text = format!("this host has no {}, so nothing comes from there", Family::of(&host).as_str());
            return BackendHold::without(HoldState::Idle, text);
        }
        if self.desired.is_paused() {
            return BackendHold::without(HoldState::Paused, format!("paused {}", self.paused().unwrap_or_default()));
        }
        let mut covering = (0..=host.prefix()).rev().map(|prefix| Target::new(host.addr(), prefix));
        if let Some(target) = covering.clone().find(|target| self.desired.wanted(target).is_some()) {
            return self.weigh_wanted(target, host, places);
        }
        match covering.find(|target| self.desired.contains(target)) {
            Some(target) => self.desired.refusal(&target).map_or_else(
                || BackendHold::without(HoldState::LeftOut, format!("{target} does not fit: bans_max is reached")),
                |refusal| spared(None, format!("{target} is not banned here: {refusal}")),
            ),
            None => BackendHold::without(HoldState::NotDue, "not banned"),
        }
    }

    /// Of a ban that should be in force.
    fn weigh_wanted(&self, target: Target, host: Target, places: &BTreeMap<Family, String>) -> BackendHold {
        if self.dry_run {
            return BackendHold::without(HoldState::Idle, format!("dry run: {target} would be banned"));
        }
        if let Some(why) = self.refused.get(&target) {
            return BackendHold::without(HoldState::Refused, format!("{target} was refused by the kernel: {why}"));
        }
        let now = self.clock.now();
        let held = self.kernel.held(&target);
        let in_force = held.filter(|held| held.ends.is_none_or(|end| now < end));
        let entry = in_force.map(|_| target);
        if let Some(refusal) = self.guard.refuse(&host) {
            return spared(entry, format!("let through although {target} is banned: {refusal}"));
        }
        let Some(held) = in_force else {
            let why = self.failure.as_ref().map_or_else(String::new, |why| format!(": {why}"));
            return BackendHold::without(HoldState::Waiting, format!("about to be added{why}"));
        };
        let set = self.sets.as_ref().map_or_else(String::new, |sets| sets.describe(&target));
        let hold = match places.get(&Family::of(&host)) {
            Some(place) => BackendHold::without(HoldState::Held, format!("{set}, dropped in {place}")),
            None => BackendHold::without(HoldState::Idle, format!("{set}, which no chain looks up")),
        };
        BackendHold { entry, until: held.ends, ..hold }
    }
}

/// What is let through on purpose.
fn spared(entry: Option<Target>, detail: String) -> BackendHold {
    BackendHold { entry, spared: true, ..BackendHold::without(HoldState::Refused, detail) }
}

/// Adds what the kernel itself says, where that is not what we know.
async fn ask_kernel(
    mut hold: BackendHold,
    (sets, set): (Option<Sets>, SetId),
    address: IpAddr,
    is_looked_up: bool,
) -> BackendHold {
    let Some(sets) = sets else { return hold };
    match sets.test(set, address).await {
        Ok(Some(in_kernel)) if in_kernel != hold.entry.is_some() => {
            let said = if in_kernel { "the kernel's set holds it" } else { "the kernel's set does not hold it" };
            hold.detail = format!("{}; yet {said}", hold.detail);
            if in_kernel && is_looked_up && hold.state == HoldState::Waiting {
                // By a change that we gave up, or a wider ban.
                hold.state = HoldState::Held;
            }
            if !in_kernel {
                (hold.entry, hold.until) = (None, None);
                if hold.state == HoldState::Held {
                    hold.state = HoldState::Waiting;
                }
            }
        }
        Ok(_) => {}
        Err(error) => hold.detail = format!("{}; the kernel could not be asked: {}", hold.detail, chain_of(&error)),
    }
    hold
}

#[cfg(test)]
mod tests {
    use prometheus_client::registry::Registry;
    use proto::ban::BanChange;
    use proto::bus::memory::BanUpdate;
    use proto::net::NetSet;
    use proto::time::{Clock, Timestamp};

    use super::*;
    use crate::backend::dry_run::DryRun;
    use crate::config::FirewallConfig;
    use crate::guard::{Guard, GuardFacts};
    use crate::metrics::EnforceMetrics;
    use crate::plan::{Form, GROWS, Held, KernelSet};
    use crate::testing::record;

    const NOW: Timestamp = Timestamp::from_secs(1000);

    /// With bans of 192.0.2.1 and 192.0.2.2, of which the kernel holds the first until 1600.
    fn reconciler() -> Reconciler {
        let metrics = EnforceMetrics::register(&mut Registry::default());
        let config = FirewallConfig { bans_max: 2, ..FirewallConfig::default() };
        let mut reconciler = Reconciler::new(config, NetSet::default(), false, Clock::manual(NOW), metrics);
        // Whatever the addresses of this machine are.
        reconciler.guard = Guard::new(&GuardFacts::default());
        reconciler.sets = Some(Sets::DryRun(DryRun));
        let bans = [("192.0.2.1", 1600), ("192.0.2.2", 1700), ("192.0.2.3", 1500), ("127.0.0.9", 1600)];
        let put = |(target, end): (&str, i64)| {
            BanChange::Put(record(target.parse().unwrap(), Some(Timestamp::from_secs(end))))
        };
        let update = BanUpdate { revision: 1, snapshot: true, changes: bans.map(put).into(), cause: None };
        reconciler.desired.handle_update(&update, &reconciler.guard, NOW);
        let held = Held { ends: Some(Timestamp::from_secs(1600)), comment: "r".into() };
        let members = [("192.0.2.1".parse().unwrap(), held)].into();
        let set = KernelSet { maxelem: GROWS, form: Form::Ours, members };
        reconciler.kernel.sets.insert(SetId::Bans(Family::V4), set);
        reconciler
    }

    async fn ask(reconciler: &Reconciler, address: &str) -> BackendHold {
        let places = [(Family::V4, "raw/PREROUTING".to_owned())].into();
        reconciler.explain(address.parse().unwrap(), &places).await
    }

    #[tokio::test]
    async fn the_firewall_tells_what_it_holds_until_when_and_why_it_does_not() {
        let mut reconciler = reconciler();
        let held = ask(&reconciler, "192.0.2.1").await;
        assert_eq!((held.state, held.until), (HoldState::Held, Some(Timestamp::from_secs(1600))), "{held:?}");
        assert!(held.detail.ends_with(", dropped in raw/PREROUTING"), "{}", held.detail);
        let nowhere = reconciler.explain("192.0.2.1".parse().unwrap(), &BTreeMap::new()).await;
        assert_eq!((nowhere.state, nowhere.is_held(), nowhere.entry.is_some()), (HoldState::Idle, false, true));
        for (address, state, spared, said) in [
            ("192.0.2.2", HoldState::Waiting, false, "about to be added"),
            ("192.0.2.3", HoldState::LeftOut, false, "bans_max is reached"),
            ("127.0.0.9", HoldState::Refused, true, "loopback"),
            ("192.0.2.9", HoldState::NotDue, false, "not banned"),
        ] {
            let hold = ask(&reconciler, address).await;
            assert_eq!((hold.state, hold.spared, hold.entry), (state, spared, None), "{address}: {}", hold.detail);
            assert!(hold.detail.contains(said), "{address}: {}", hold.detail);
        }
        reconciler.refused.insert("192.0.2.2".parse().unwrap(), "no room".to_owned());
        reconciler.failure = Some("no answer".to_owned());
        let refused = ask(&reconciler, "192.0.2.2").await;
        assert_eq!((refused.state, refused.spared), (HoldState::Refused, false), "{}", refused.detail);
        reconciler.desired.handle_pause(true);
        assert_eq!(ask(&reconciler, "192.0.2.1").await.state, HoldState::Paused);
        reconciler.sets = None;
        assert_eq!(ask(&reconciler, "192.0.2.1").await.state, HoldState::Idle);
    }

    #[tokio::test]
    async fn a_ban_of_a_family_that_the_host_lacks_is_not_waited_for() {
        let mut reconciler = reconciler();
        let target = "2001:db8::/64".parse().unwrap();
        let changes = vec![BanChange::Put(record(target, Some(Timestamp::from_secs(1600))))];
        let update = BanUpdate { revision: 2, snapshot: false, changes, cause: None };
        reconciler.desired.handle_update(&update, &reconciler.guard, NOW);
        reconciler.frame.families = Family::ALL.to_vec();
        assert_eq!(reconciler.desired_here(), (5, 0));
        reconciler.frame.families = vec![Family::V4];
        assert_eq!(reconciler.desired_here(), (4, 1));
        let hold = ask(&reconciler, "2001:db8::9").await;
        assert_eq!((hold.state, hold.entry), (HoldState::Idle, None));
        assert!(hold.detail.contains("this host has no ipv6"), "{}", hold.detail);
    }

    #[tokio::test]
    async fn a_dry_run_holds_nobody() {
        let mut reconciler = reconciler();
        reconciler.dry_run = true;
        let hold = ask(&reconciler, "192.0.2.1").await;
        assert_eq!((hold.state, hold.entry), (HoldState::Idle, None));
        assert_eq!(hold.detail, "dry run: 192.0.2.1 would be banned");
    }
}
