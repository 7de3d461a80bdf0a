//! Why an address is banned, or how far it is from it.

use std::net::IpAddr;

use proto::api::{ExplainReply, RuleProgress};
use proto::ban::Ban;
use proto::net::{Target, canonical};
use proto::time::Timestamp;

use super::clients::Counted;
use super::rule::{Mode, Threshold};
use super::window::Span;
use super::{Engine, Rule};

impl Engine {
    /// All that the engine knows of an address at `now`. What the back ends hold is the caller's to add.
    pub fn explain(&self, address: IpAddr, now: Timestamp) -> ExplainReply {
        let address = canonical(address);
        let target = Target::of_client(address, self.config.ipv6_prefix);
        let covering = (0..=if address.is_ipv4() { 32 } else { 128 }).map(|prefix| Target::new(address, prefix));
        let bans: Vec<Ban> =
            covering.filter_map(|t| self.bans.get(&t)).flat_map(|record| record.bans.clone()).collect();
        let counts_from = self.offenders.get(&target).map(|offender| offender.quiet_now());
        let rules =
            self.config.rules.iter().enumerate().map(|(i, rule)| self.progress(&target, i, rule, now)).collect();
        ExplainReply {
            address,
            target,
            never_ban: self
                .allows
                .why(address)
                .or_else(|| self.config.trusted_proxies.contains(address).then(|| "it is a trusted proxy".to_owned())),
            paused: self.paused,
            bans,
            counts_from: counts_from.filter(|from| *from > Timestamp::EPOCH),
            rules,
            backends: Vec::new(),
        }
    }

    fn progress(&self, target: &Target, number: usize, rule: &Rule, now: Timestamp) -> RuleProgress {
        let histories = if rule.mode == Mode::Shadow { &self.shadow } else { &self.offenders };
        let escalation = &rule.escalation;
        let ban_count = histories
            .get(target)
            .map_or(0, |offender| offender.count(&rule.name, escalation.across_rules, escalation.forget_after, now));
        let counted = self.clients.get(target).iter().find(|(known, _)| usize::from(*known) == number);
        let (counted, ends) = match (counted, rule.threshold) {
            (Some((_, Counted::Window(window))), Threshold::Window { max_retry, find_time, distinct }) => {
                let find_nanos = i64::try_from(find_time.as_nanos()).unwrap_or(i64::MAX);
                window.progress(now, &Span { max_retry, find_nanos, distinct: distinct.is_some() })
            }
            (Some((_, Counted::Bucket { level, .. })), Threshold::Rate { period, .. }) => {
                let above = level.saturating_sub(u64::try_from(now.as_nanos()).unwrap_or(0));
                let held = u128::from(above).div_ceil(period.as_nanos().max(1));
                (u32::try_from(held).unwrap_or(u32::MAX), None)
            }
            _ => (0, None),
        };
        RuleProgress {
            rule: rule.name.to_string(),
            mode: rule.mode.as_str().to_owned(),
            counted,
            needed: rule.threshold.needed(),
            find_seconds: rule.threshold.horizon().as_secs(),
            first_seen: ends.map(|(first, _)| first),
            last_seen: ends.map(|(_, last)| last),
            ban_count,
            next_ban_seconds: escalation.length(rule.ban_time, ban_count.saturating_add(1)).as_secs(),
        }
    }
}
