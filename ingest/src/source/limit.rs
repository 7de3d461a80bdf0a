//! How much a source and each of its senders may bring, by governor.
//!
//! A sender beyond its share is told to wait or is turned away, and takes nothing from the others. Senders are IPv4
//! addresses and IPv6 networks of 64 bits; the memory for them is bounded, and those beyond share one allowance.

use std::net::IpAddr;
use std::num::NonZeroU32;
use std::time::Duration;

use governor::clock::{self, Clock as _};
use governor::middleware::NoOpMiddleware;
use governor::nanos::Nanos;
use governor::state::keyed::HashMapStateStore;
use governor::state::{InMemoryState, NotKeyed};
use governor::{Quota, RateLimiter};
use proto::places::peer_key;
use proto::time::Clock;

/// Senders whose share is remembered, about 100 bytes each and limit.
const SENDERS_MAX: usize = 4096;

/// What may be brought, each per second; `None` = any number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LimitConfig {
    /// Lines of one sender.
    pub sender_lines: Option<NonZeroU32>,
    /// Bytes of one sender.
    pub sender_bytes: Option<NonZeroU32>,
    /// Lines of all senders together.
    pub lines: Option<NonZeroU32>,
    /// Bytes of all senders together.
    pub bytes: Option<NonZeroU32>,
    /// For how long a sender that was silent may bring everything at once.
    pub burst: Duration,
}

/// Our clock, as governor asks for it.
#[derive(Clone, Debug)]
struct LimitClock(Clock);

impl clock::Clock for LimitClock {
    type Instant = Nanos;

    fn now(&self) -> Nanos {
        u64::try_from(self.0.raw().as_nanos()).unwrap_or(0).into()
    }
}

type Limit<K, S> = RateLimiter<K, S, LimitClock, NoOpMiddleware<Nanos>>;

/// The limits of one source.
#[derive(Debug)]
pub(crate) struct Limits {
    clock: LimitClock,
    all: [Option<Limit<NotKeyed, InMemoryState>>; 2],
    senders: [Option<SenderLimit>; 2],
}

#[derive(Debug)]
struct SenderLimit {
    by_sender: Limit<IpAddr, HashMapStateStore<IpAddr>>,
    crowd: Limit<NotKeyed, InMemoryState>,
}

impl Limits {
    pub(crate) fn new(config: &LimitConfig, clock: Clock) -> Self {
        let clock = LimitClock(clock);
        let quota = |per_second: NonZeroU32| {
            let burst = (f64::from(per_second.get()) * config.burst.as_secs_f64()).min(f64::from(u32::MAX)) as u32;
            Quota::per_second(per_second).allow_burst(NonZeroU32::new(burst).unwrap_or(per_second).max(per_second))
        };
        let direct = |per_second| RateLimiter::direct_with_clock(quota(per_second), clock.clone());
        let sender = |per_second| SenderLimit {
            by_sender: RateLimiter::hashmap_with_clock(quota(per_second), clock.clone()),
            crowd: direct(per_second),
        };
        Self {
            all: [config.lines, config.bytes].map(|limit| limit.map(direct)),
            senders: [config.sender_lines, config.sender_bytes].map(|limit| limit.map(sender)),
            clock,
        }
    }

    /// Takes so many lines and bytes of `sender` from what is allowed; an error says after how long they may come again.
    /// The sender's own share is looked at first, so that what it brings too much costs nobody else.
    pub(crate) fn check(&self, sender: Option<IpAddr>, lines: u32, bytes: u32) -> Result<(), Duration> {
        let wanted = [lines, bytes].map(NonZeroU32::new);
        for (limit, wanted) in self.senders.iter().zip(wanted) {
            let (Some(limit), Some(wanted), Some(sender)) = (limit, wanted, sender) else { continue };
            self.within(|wanted| limit.check(sender, wanted), wanted)?;
        }
        for (limit, wanted) in self.all.iter().zip(wanted) {
            let (Some(limit), Some(wanted)) = (limit, wanted) else { continue };
            self.within(|wanted| limit.check_n(wanted), wanted)?;
        }
        Ok(())
    }

    /// Takes as [`Limits::check`] does, and waits until it may. What is waited for is taken once.
    pub(crate) async fn wait(&self, sender: Option<IpAddr>, lines: u32, bytes: u32) {
        let wanted = [lines, bytes].map(NonZeroU32::new);
        for (limit, wanted) in self.senders.iter().zip(wanted) {
            let (Some(limit), Some(wanted), Some(sender)) = (limit, wanted, sender) else { continue };
            while let Err(wait) = self.within(|wanted| limit.check(sender, wanted), wanted) {
                tokio::time::sleep(wait).await;
            }
        }
        for (limit, wanted) in self.all.iter().zip(wanted) {
            let (Some(limit), Some(wanted)) = (limit, wanted) else { continue };
            while let Err(wait) = self.within(|wanted| limit.check_n(wanted), wanted) {
                tokio::time::sleep(wait).await;
            }
        }
    }

    /// More than fits into a burst counts as a full one, or it would never come.
    fn within(
        &self,
        check: impl Fn(NonZeroU32) -> Result<Result<(), governor::NotUntil<Nanos>>, governor::InsufficientCapacity>,
        wanted: NonZeroU32,
    ) -> Result<(), Duration> {
        let checked = check(wanted).or_else(|full| check(NonZeroU32::new(full.0).unwrap_or(wanted)));
        match checked {
            Ok(Err(until)) => Err(until.wait_time_from(self.clock.now())),
            Ok(Ok(())) | Err(_) => Ok(()),
        }
    }
}

impl SenderLimit {
    fn check(
        &self,
        sender: IpAddr,
        wanted: NonZeroU32,
    ) -> Result<Result<(), governor::NotUntil<Nanos>>, governor::InsufficientCapacity> {
        if self.by_sender.len() >= SENDERS_MAX {
            self.by_sender.retain_recent();
        }
        if self.by_sender.len() >= SENDERS_MAX {
            self.crowd.check_n(wanted)
        } else {
            self.by_sender.check_key_n(&peer_key(sender), wanted)
        }
    }
}

#[cfg(test)]
mod tests {
    use proto::time::Timestamp;

    use super::*;

    fn sender(n: u8) -> Option<IpAddr> {
        Some(IpAddr::from([192, 0, 2, n]))
    }

    #[test]
    fn a_noisy_sender_takes_nothing_from_the_others() {
        let clock = Clock::manual(Timestamp::from_secs(1000));
        let limit = NonZeroU32::new;
        let config = LimitConfig {
            sender_lines: limit(10),
            lines: limit(100),
            burst: Duration::from_secs(2),
            ..LimitConfig::default()
        };
        let limits = Limits::new(&config, clock.clone());
        let admitted = |sender, times: u32| (0..times).filter(|_| limits.check(sender, 1, 100).is_ok()).count();
        assert_eq!(admitted(sender(1), 1000), 20, "two seconds' worth at once");
        assert_eq!(admitted(sender(2), 20), 20);
        let wait = limits.check(sender(1), 1, 100).unwrap_err();
        assert!(wait > Duration::ZERO && wait <= Duration::from_millis(100), "{wait:?}");
        clock.set(Timestamp::from_secs(1001));
        assert_eq!(admitted(sender(1), 1000), 10);
        assert_eq!(admitted(None, 1000), 190, "what has no sender is held by the whole alone");
    }

    #[test]
    fn more_than_a_burst_counts_as_one() {
        let clock = Clock::manual(Timestamp::from_secs(1000));
        let config =
            LimitConfig { sender_bytes: NonZeroU32::new(10), burst: Duration::from_secs(1), ..LimitConfig::default() };
        let limits = Limits::new(&config, clock.clone());
        assert_eq!(limits.check(sender(1), 1, 1000), Ok(()));
        assert!(limits.check(sender(1), 1, 1000).is_err());
        clock.set(Timestamp::from_secs(1001));
        assert_eq!(limits.check(sender(1), 1, 1000), Ok(()));
    }

    #[test]
    fn memory_for_senders_is_bounded() {
        let config =
            LimitConfig { sender_lines: NonZeroU32::new(1), burst: Duration::from_secs(1), ..LimitConfig::default() };
        let limits = Limits::new(&config, Clock::manual(Timestamp::from_secs(1000)));
        let many = 2 * SENDERS_MAX as u32;
        let admitted = (0..many).filter(|n| limits.check(Some(IpAddr::from(n.to_be_bytes())), 1, 1).is_ok()).count();
        assert_eq!(admitted, SENDERS_MAX + 1, "the rest share one allowance");
    }
}
