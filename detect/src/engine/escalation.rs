//! How long the n-th ban is.

use std::time::Duration;

use proto::net::Target;

/// Growth from ban to ban.
#[derive(Clone, Debug, PartialEq)]
pub enum Growth {
    /// Ban n lasts `ban_time * factor^(n-1)`.
    Factor(f64),
    /// Ban n lasts `ban_time * multipliers[n-1]`; the last repeats. Never empty.
    Multipliers(Vec<f64>),
}

/// How bans grow with each offence.
#[derive(Clone, Debug, PartialEq)]
pub struct Escalation {
    /// Growth from ban to ban.
    pub growth: Growth,
    /// No ban is longer, jitter included.
    pub max: Duration,
    /// Bans are longer by up to this share of their length, so that their ends cannot be foretold.
    pub jitter: f64,
    /// A history counts until this long after the end of its last ban.
    pub forget_after: Duration,
    /// Whether bans by other rules count as former offences.
    pub across_rules: bool,
}

impl Default for Escalation {
    fn default() -> Self {
        Self {
            growth: Growth::Factor(2.0),
            max: Duration::from_secs(7 * 24 * 3600),
            jitter: 0.1,
            forget_after: Duration::from_secs(14 * 24 * 3600),
            across_rules: false,
        }
    }
}

impl Escalation {
    /// Length of ban number `count` (1 = first), without jitter.
    pub fn length(&self, ban_time: Duration, count: u32) -> Duration {
        let former = count.saturating_sub(1);
        let multiplier = match &self.growth {
            Growth::Factor(factor) => factor.powf(f64::from(former)),
            Growth::Multipliers(list) => {
                let index = (former as usize).min(list.len().saturating_sub(1));
                list.get(index).copied().unwrap_or(1.0)
            }
        };
        let seconds = ban_time.as_secs_f64() * multiplier;
        // Infinity and whatever else no duration can hold is more than any maximum.
        Duration::try_from_secs_f64(seconds).unwrap_or(self.max).min(self.max)
    }

    /// Length of ban number `count` with jitter: in whole milliseconds, from [`Self::length`] to the maximum.
    ///
    /// The jitter is a hash of target, rule and count, so that two runs over the same events agree.
    pub fn jittered_length(&self, ban_time: Duration, count: u32, target: &Target, rule: &str) -> Duration {
        let length = self.length(ban_time, count);
        let share = unit_hash(&format!("{target} {rule} {count}")) * self.jitter;
        let millis = length.as_millis() as f64 * (1.0 + share);
        Duration::from_millis(millis.round() as u64).min(self.max)
    }
}

/// A hash of `text` between 0 (included) and 1 (excluded): FNV-1a, finished by MurmurHash3's mixer. Both are fixed for
/// ever, as recorded bans depend on them.
fn unit_hash(text: &str) -> f64 {
    let mut hash = text
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    hash ^= hash >> 33;
    hash = hash.wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash ^= hash >> 33;
    hash = hash.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^= hash >> 33;
    (hash >> 11) as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TEN_MINUTES: Duration = Duration::from_secs(600);

    #[test]
    fn bans_grow_by_factor_up_to_the_maximum() {
        let escalation = Escalation { max: Duration::from_secs(3600), ..Escalation::default() };
        let lengths: Vec<u64> = (1..=5).map(|n| escalation.length(TEN_MINUTES, n).as_secs()).collect();
        assert_eq!(lengths, [600, 1200, 2400, 3600, 3600]);
        assert_eq!(escalation.length(TEN_MINUTES, u32::MAX), escalation.max);
    }

    #[test]
    fn multipliers_are_used_in_order_and_the_last_repeats() {
        let growth = Growth::Multipliers(vec![1.0, 5.0, 30.0]);
        let escalation = Escalation { growth, ..Escalation::default() };
        let lengths: Vec<u64> = (1..=4).map(|n| escalation.length(TEN_MINUTES, n).as_secs()).collect();
        assert_eq!(lengths, [600, 3000, 18_000, 18_000]);
    }

    #[test]
    fn jitter_is_the_same_for_ever() {
        let target = "192.0.2.1".parse().unwrap();
        let length = Escalation::default().jittered_length(TEN_MINUTES, 1, &target, "forceful-browsing");
        assert_eq!(length.as_millis(), 645_818);
    }

    proptest! {
        #[test]
        fn jitter_lengthens_and_stays_inside_the_maximum(addr: [u8; 4], count in 1u32..20, jitter in 0.0..=1.0f64) {
            let escalation = Escalation { jitter, ..Escalation::default() };
            let target = Target::host(addr.into());
            let length = escalation.jittered_length(TEN_MINUTES, count, &target, "r");
            let plain = escalation.length(TEN_MINUTES, count);
            prop_assert!(length >= plain && length <= escalation.max);
            prop_assert!(length.as_secs_f64() <= plain.as_secs_f64() * (1.0 + jitter) + 0.001);
        }
    }
}
