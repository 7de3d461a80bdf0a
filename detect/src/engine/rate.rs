//! The leaky bucket, as governor counts it, over event time and a store of our own.
//!
//! governor's limiter asks a clock and a state store; here the clock is the event's time and the store is one cell that
//! holds the client's level for the length of a call, so that levels live (and are bounded) with the other windows.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use governor::clock::Clock;
use governor::middleware::NoOpMiddleware;
use governor::nanos::Nanos;
use governor::state::{NotKeyed, StateStore};
use governor::{Quota, RateLimiter};
use proto::time::Timestamp;

#[derive(Clone, Debug, Default)]
struct EventClock(Arc<AtomicU64>);

impl Clock for EventClock {
    type Instant = Nanos;

    fn now(&self) -> Nanos {
        self.0.load(Ordering::Relaxed).into()
    }
}

/// The level of the client at hand; 0 = an empty bucket.
#[derive(Clone, Debug, Default)]
struct Level(Arc<AtomicU64>);

impl StateStore for Level {
    type Key = NotKeyed;

    fn measure_and_replace<T, F, E>(&self, _key: &NotKeyed, measure: F) -> Result<T, E>
    where
        F: Fn(Option<Nanos>) -> Result<(T, Nanos), E>,
    {
        let level = self.0.load(Ordering::Relaxed);
        let (outcome, level) = measure((level > 0).then(|| level.into()))?;
        self.0.store(level.into(), Ordering::Relaxed);
        Ok(outcome)
    }
}

/// Limiters for the quotas in use. The epoch is their start, so that levels are absolute times.
#[derive(Debug, Default)]
pub struct Bucket {
    clock: EventClock,
    level: Level,
    limiters: Vec<((Duration, NonZeroU32), Limiter)>,
}

type Limiter = RateLimiter<NotKeyed, Level, EventClock, NoOpMiddleware<Nanos>>;

impl Bucket {
    /// Pours one event at `time` into a bucket at `level` that drains one event each `period` and holds `burst`.
    /// Returns the new level, and whether the event fitted. Times must not decrease from call to call for one bucket: to
    /// governor, an event from the past is one too many.
    pub fn pour(
        &mut self,
        period: Duration,
        burst: NonZeroU32,
        time: Timestamp,
        level: Option<u64>,
    ) -> (Option<u64>, bool) {
        let at = self.limiters.iter().position(|(quota, _)| *quota == (period, burst)).unwrap_or_else(|| {
            self.clock.0.store(0, Ordering::Relaxed);
            let quota = Quota::with_period(period).unwrap_or(Quota::per_second(NonZeroU32::MAX)).allow_burst(burst);
            let limiter = RateLimiter::new(quota, self.level.clone(), self.clock.clone());
            self.limiters.push(((period, burst), limiter));
            self.limiters.len() - 1
        });
        self.clock.0.store(u64::try_from(time.as_nanos()).unwrap_or(0), Ordering::Relaxed);
        self.level.0.store(level.unwrap_or(0), Ordering::Relaxed);
        let fits = self.limiters[at].1.check().is_ok();
        let level = self.level.0.load(Ordering::Relaxed);
        ((level > 0).then_some(level), fits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pour_all(seconds: &[i64], period: u64, burst: u32) -> Vec<bool> {
        let mut bucket = Bucket::default();
        let mut level = None;
        let pour = |&seconds: &i64| {
            let time = Timestamp::from_secs(1_700_000_000 + seconds);
            let (after, fits) = bucket.pour(Duration::from_secs(period), NonZeroU32::new(burst).unwrap(), time, level);
            level = after;
            fits
        };
        seconds.iter().map(pour).collect()
    }

    #[test]
    fn a_bucket_holds_its_burst_and_drains_at_its_rate() {
        assert_eq!(pour_all(&[0, 0, 0, 0], 10, 3), [true, true, true, false]);
        assert_eq!(pour_all(&[0, 0, 0, 10, 10], 10, 3), [true, true, true, true, false]);
        assert_eq!(pour_all(&[0, 0, 0, 30, 30, 30, 30], 10, 3), [true, true, true, true, true, true, false]);
    }

    #[test]
    fn quotas_do_not_mix() {
        let mut bucket = Bucket::default();
        let one = NonZeroU32::MIN;
        let time = Timestamp::from_secs(1_700_000_000);
        let (level, fits) = bucket.pour(Duration::from_secs(1), one, time, None);
        assert!(fits);
        assert!(!bucket.pour(Duration::from_secs(1), one, time, level).1);
        assert!(bucket.pour(Duration::from_secs(5), one, time, None).1);
    }
}
