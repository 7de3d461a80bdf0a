//! The answer to `explain`: whether requests of a forwarded client are refused, and why or why not.

use std::net::IpAddr;

use proto::api::{BackendHold, HoldState};
use proto::net::Target;
use proto::report::Severity;

use super::Forwarded;
use crate::forwarded::spelling::Patterns;
use crate::host;

impl Forwarded {
    /// Which ban keeps the address out here, and why or why not.
    pub(super) fn explain(&self, address: IpAddr) -> BackendHold {
        if self.paused {
            let why = self.around.host_pause.borrow().clone().unwrap_or_else(|| "by an operator".to_owned());
            return BackendHold::without(HoldState::Paused, format!("paused {why}"));
        }
        let host = Target::host(address);
        let mut covering = (0..=host.prefix()).rev().map(|prefix| Target::new(host.addr(), prefix));
        let is_chosen = |target: &Target| self.choice.refused.iter().any(|(chosen, ..)| chosen == target);
        if let Some(target) = covering.clone().find(is_chosen) {
            return self.explain_chosen(target);
        }
        if let Some(target) = covering.clone().find(|target| self.claims.claim(target).is_some()) {
            return self.explain_left(target);
        }
        match covering.find(|target| self.around.bans.contains(target)) {
            Some(target) => BackendHold::without(
                HoldState::NotDue,
                format!("the ban of {target} does not say that a proxy delivered the client"),
            ),
            None => BackendHold::without(HoldState::NotDue, "not banned"),
        }
    }

    /// Of one that is to be refused.
    fn explain_chosen(&self, target: Target) -> BackendHold {
        if self.around.dry_run {
            return BackendHold::without(HoldState::Idle, format!("dry run: requests of {target} would be refused"));
        }
        if !self.outcome.is_in_force() {
            let degraded = self.outcome.problems.iter().find(|problem| problem.severity == Severity::Degraded);
            let why = degraded.map_or("the rules are not in place", |problem| &problem.text);
            return BackendHold::without(HoldState::Idle, why);
        }
        if !self.known {
            return BackendHold::without(
                HoldState::Waiting,
                "the ban set has not come yet, and rules of before stay as they are",
            );
        }
        BackendHold {
            entry: Some(target),
            until: self.claims.claim(&target).and_then(|claim| claim.ends),
            ..BackendHold::without(
                HoldState::Held,
                format!("refused by its header; {}", self.outcome.detail.join("; ")),
            )
        }
    }

    /// Of one that came through a proxy and is not to be refused.
    fn explain_left(&self, target: Target) -> BackendHold {
        if let Some(refusal) = self.guard.refuse(&target) {
            let hold = BackendHold::without(HoldState::Refused, format!("{target} is not banned here: {refusal}"));
            return BackendHold { spared: true, ..hold };
        }
        if self.guard.touches(&target) {
            let text = format!("{target} has a guarded address in it, and nobody in it can be let through alone");
            return BackendHold { spared: true, ..BackendHold::without(HoldState::Refused, text) };
        }
        if Patterns::of(&target, &self.config).is_none() {
            return BackendHold::without(
                HoldState::Refused,
                format!("{target} cannot be told from other networks in a header"),
            );
        }
        if self.is_due {
            return BackendHold::without(HoldState::Waiting, format!("rules about {target} are about to be placed"));
        }
        if !host::may_change_firewall() {
            return BackendHold::without(HoldState::Idle, "cannot change the firewall");
        }
        let max = self.config.rules_max;
        BackendHold::without(
            HoldState::LeftOut,
            format!("{target} does not fit: rules_max is {max}, and newer bans go first"),
        )
    }
}

#[cfg(test)]
mod tests {
    use proto::ban::BanChange;
    use proto::bus::memory::Bus;
    use proto::report::Problem;
    use proto::time::Timestamp;

    use super::*;
    use crate::config::EnforceConfig;
    use crate::guard::{Guard, GuardFacts};
    use crate::plan::Family;
    use crate::testing;

    fn through_proxy(target: &str, end: i64) -> BanChange {
        let mut record = testing::record(target.parse().unwrap(), Some(Timestamp::from_secs(end)));
        record.bans[0].evidence.via_proxy = true;
        record.bans[0].banned_at = Timestamp::from_secs(end);
        BanChange::Put(record)
    }

    fn direct(target: &str) -> BanChange {
        BanChange::Put(testing::record(target.parse().unwrap(), None))
    }

    /// Whom these bans name is chosen as if the firewall had been changed.
    fn forwarded(bus: &Bus, rules_max: u32) -> Forwarded {
        let raw = serde_json::json!({"forwarded_for": {"enabled": true, "rules_max": rules_max}});
        let config: EnforceConfig =
            testing::checked(raw, |raw: crate::config::RawEnforce, mistakes| raw.check(mistakes)).unwrap();
        let mut forwarded = Forwarded::new(config, testing::surroundings(bus));
        forwarded.take_bans();
        // Whatever the addresses of this machine are.
        let never_ban = vec!["198.51.100.7/32".parse().unwrap()];
        forwarded.guard = Guard::new(&GuardFacts { never_ban, ..GuardFacts::default() });
        forwarded.choice = forwarded.claims.choose(&forwarded.guard, &forwarded.config);
        forwarded.is_due = false;
        forwarded.outcome.seen.insert(Family::V4);
        forwarded.outcome.detail.push("ipv4: nft, DOCKER-USER, 4 rules".to_owned());
        forwarded
    }

    #[test]
    fn a_forwarded_client_is_refused_or_it_is_told_why_not() {
        let (bus, far) = (Bus::new(), 9_000_000_000);
        bus.bans.publish(
            [
                through_proxy("192.0.2.1", far + 9),
                through_proxy("192.0.2.2", far),
                through_proxy("198.51.100.7", far),
                through_proxy("198.51.100.0/24", far),
                through_proxy("203.0.113.0/25", far),
                direct("192.0.2.3"),
            ],
            None,
        );
        // Room for one client in two headers.
        let mut forwarded = forwarded(&bus, 3);
        let ask = |forwarded: &Forwarded, address: &str| forwarded.explain(address.parse().unwrap());
        let held = ask(&forwarded, "192.0.2.1");
        assert_eq!((held.state, held.until), (HoldState::Held, Some(Timestamp::from_secs(far + 9))), "{held:?}");
        assert!(held.detail.ends_with("ipv4: nft, DOCKER-USER, 4 rules"), "{}", held.detail);
        for (address, state, spared, said) in [
            ("192.0.2.2", HoldState::LeftOut, false, "rules_max is 3"),
            ("192.0.2.3", HoldState::NotDue, false, "does not say that a proxy delivered"),
            ("192.0.2.4", HoldState::NotDue, false, "not banned"),
            ("198.51.100.7", HoldState::Refused, true, "in never_ban"),
            ("198.51.100.9", HoldState::Refused, true, "has a guarded address in it"),
            ("203.0.113.1", HoldState::Refused, false, "cannot be told from other networks"),
        ] {
            let hold = ask(&forwarded, address);
            assert_eq!((hold.state, hold.spared, hold.entry), (state, spared, None), "{address}: {}", hold.detail);
            assert!(hold.detail.contains(said), "{address}: {}", hold.detail);
        }
        forwarded.outcome.problems.push(Problem::degraded("ipv4: iptables is not installed"));
        let broken = ask(&forwarded, "192.0.2.1");
        assert_eq!((broken.state, broken.detail.as_str()), (HoldState::Idle, "ipv4: iptables is not installed"));
        forwarded.paused = true;
        assert!(ask(&forwarded, "192.0.2.1").spared);
    }
}
