//! When the next call may be made: under Cloudflare's limit over any five minutes, and as its answers say.
//!
//! A fifth of all calls is kept for those that free somebody: an attack may use up the rest.

use std::num::NonZeroU32;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use proto::limit::{Limit, Quota};
use proto::time::{Clock, Timestamp};
use reqwest::StatusCode;
use reqwest::header::{HeaderMap, RETRY_AFTER};

/// A part of all calls that may come at once; the rest is spread over the window.
const BURST_SHARE: u32 = 4;
/// A part of all calls that only those get that free somebody.
const RESERVE_SHARE: u32 = 5;
/// So many calls left in Cloudflare's own count are for those that free somebody.
const LEFT_MIN: u64 = 20;
/// Shorter than that no limit is taken to last.
const RESET_MIN: Duration = Duration::from_secs(1);
/// Longer than that nothing is waited for, whatever an answer says.
const HOLD_MAX: Duration = Duration::from_secs(900);
const ONE: NonZeroU32 = NonZeroU32::MIN;

/// Until when Cloudflare wants no calls.
#[derive(Clone, Copy, Debug)]
struct Holds {
    all: Timestamp,
    /// Those that free nobody.
    others: Timestamp,
}

/// Shared by all calls with one login.
#[derive(Debug)]
pub(super) struct Pace {
    clock: Clock,
    all: Limit,
    others: Limit,
    holds: Mutex<Holds>,
}

impl Pace {
    /// At most `calls_max` calls in any `window`.
    pub(super) fn new(calls_max: u32, window: Duration, clock: Clock) -> Self {
        let limit = |calls: u32| {
            let burst = (calls / BURST_SHARE).max(1);
            // What a full burst does not use up flows in evenly.
            let period = window / (calls - burst).max(1);
            let quota = Quota::with_period(period).unwrap_or_else(|| Quota::per_second(ONE));
            let quota = quota.allow_burst(NonZeroU32::new(burst).unwrap_or(ONE));
            Limit::new(quota, clock.clone())
        };
        let holds = Mutex::new(Holds { all: Timestamp::EPOCH, others: Timestamp::EPOCH });
        Self { all: limit(calls_max), others: limit(calls_max - calls_max / RESERVE_SHARE), holds, clock }
    }

    /// Returns when a call may be made. It is counted then.
    pub(super) async fn wait(&self, frees: bool) {
        while let Err(wait) = self.check(frees) {
            tokio::time::sleep(wait).await;
        }
    }

    /// Counts a call that may be made now, or says how long none may.
    pub(super) fn check(&self, frees: bool) -> Result<(), Duration> {
        let now = self.clock.raw();
        let holds = self.holds();
        let until = if frees { holds.all } else { holds.all.max(holds.others) };
        if until > now {
            return Err(until.since(now));
        }
        let checked = if frees { Ok(()) } else { self.others.check(ONE) };
        checked.and_then(|()| self.all.check(ONE))
    }

    /// Takes what an answer says of the limit. Returns how long it asks for no calls at all.
    pub(super) fn learn(&self, status: StatusCode, headers: &HeaderMap) -> Option<Duration> {
        let now = self.clock.raw();
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let asked = text(RETRY_AFTER.as_str()).and_then(|text| text.trim().parse().ok()).map(Duration::from_secs);
        let after = asked.filter(|_| status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error());
        let mut holds = self.holds.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(after) = after {
            holds.all = holds.all.max(now.saturating_add(after.min(HOLD_MAX)));
        }
        if let Some((left, resets)) = text("ratelimit").and_then(parse_ratelimit) {
            // It comes in whole seconds: what is said to be none may be half a second.
            let until = now.saturating_add(resets.clamp(RESET_MIN, HOLD_MAX));
            if left == 0 {
                holds.all = holds.all.max(until);
            }
            if left < LEFT_MIN {
                holds.others = holds.others.max(until);
            }
        }
        after
    }

    fn holds(&self) -> Holds {
        *self.holds.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The item with the fewest calls left of `"default";r=50;t=30, "burst";r=9;t=1`, and when it is full again.
fn parse_ratelimit(text: &str) -> Option<(u64, Duration)> {
    let items = text.split(',').filter_map(|item| {
        let number = |name: &str| {
            let values = item.split(';').filter_map(|part| part.trim().split_once('='));
            values.filter(|(key, _)| *key == name).find_map(|(_, value)| value.trim().parse::<u64>().ok())
        };
        Some((number("r")?, Duration::from_secs(number("t")?)))
    });
    items.min()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    #[test]
    fn the_scarcest_item_counts() {
        let seconds = Duration::from_secs;
        assert_eq!(parse_ratelimit("\"default\";r=50;t=30"), Some((50, seconds(30))));
        assert_eq!(parse_ratelimit("\"a\";r=50;t=30, \"b\" ; t=2 ; r=9"), Some((9, seconds(2))));
        for text in ["", "\"a\"", "\"a\";r=x;t=1", "\"a\";r=1"] {
            assert_eq!(parse_ratelimit(text), None, "{text}");
        }
    }

    #[test]
    fn no_window_sees_more_calls_than_allowed_and_the_reserve_is_left_for_the_freed() {
        let clock = Clock::manual(Timestamp::from_secs(1000));
        let window = Duration::from_secs(300);
        let pace = Pace::new(1000, window, clock.clone());
        let mut made = Vec::new();
        for tick in 0..6000 {
            let now = Timestamp::from_millis(1_000_000 + tick * 100);
            clock.set(now);
            while pace.others.check(ONE).is_ok() && pace.all.check(ONE).is_ok() {
                made.push(now);
            }
        }
        for (index, first) in made.iter().enumerate() {
            let within = made[index..].iter().take_while(|call| call.since(*first) < window).count();
            assert!(within <= 800, "{within}");
        }
        let freed = (0..).take_while(|_| pace.all.check(ONE).is_ok()).count();
        assert!(freed >= 40, "{freed}");
    }

    #[test]
    fn the_word_of_cloudflare_holds_calls_back() {
        let clock = Clock::manual(Timestamp::from_secs(1000));
        let pace = Pace::new(1000, Duration::from_secs(300), clock);
        let at = |seconds: i64| Timestamp::from_secs(1000 + seconds);
        pace.learn(StatusCode::OK, &headers(&[("retry-after", "9"), ("ratelimit", "\"default\";r=50;t=30")]));
        assert!(pace.holds().all < at(0) && pace.holds().others < at(0), "enough is left");
        pace.learn(StatusCode::OK, &headers(&[("ratelimit", "\"default\";r=3;t=30")]));
        assert_eq!((pace.holds().all, pace.holds().others), (Timestamp::EPOCH, at(30)));
        pace.learn(StatusCode::OK, &headers(&[("ratelimit", "\"default\";r=0;t=40")]));
        assert_eq!(pace.holds().all, at(40));
        let soon = Pace::new(1000, Duration::from_secs(300), Clock::manual(at(0)));
        soon.learn(StatusCode::OK, &headers(&[("ratelimit", "\"default\";r=0;t=0")]));
        assert_eq!(soon.holds().all, at(1));
        let after = pace.learn(StatusCode::TOO_MANY_REQUESTS, &headers(&[("retry-after", "99999")]));
        assert_eq!((after, pace.holds().all), (Some(Duration::from_secs(99999)), at(900)));
    }
}
