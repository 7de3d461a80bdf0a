//! Rate limits by governor over our own clock: of all together, and of each peer with bounded memory.
//!
//! Peers are IPv4 addresses and IPv6 networks of 64 bits. Those beyond [`PEERS_MAX`] share one allowance, so that nobody
//! gets around a limit by coming from many addresses at once. A clock that is set moves no limit.

use std::net::IpAddr;
use std::num::NonZeroU32;
use std::time::Duration;

use governor::clock::{self, Clock as _};
use governor::middleware::NoOpMiddleware;
use governor::nanos::Nanos;
use governor::state::keyed::HashMapStateStore;
use governor::state::{InMemoryState, NotKeyed};
use governor::{InsufficientCapacity, NotUntil, RateLimiter};

pub use governor::Quota;

use crate::places::peer_key;
use crate::time::Clock;

/// Peers that are remembered by a limit, about 100 bytes each.
pub const PEERS_MAX: usize = 4096;

/// Our clock, as governor asks for it.
#[derive(Clone, Debug)]
struct LimitClock(Clock);

impl clock::Clock for LimitClock {
    type Instant = Nanos;

    fn now(&self) -> Nanos {
        u64::try_from(self.0.raw().as_nanos()).unwrap_or(0).into()
    }
}

type Limiter<K, S> = RateLimiter<K, S, LimitClock, NoOpMiddleware<Nanos>>;
type Checked = Result<Result<(), NotUntil<Nanos>>, InsufficientCapacity>;

/// A limit of all together.
#[derive(Debug)]
pub struct Limit {
    limiter: Limiter<NotKeyed, InMemoryState>,
    clock: LimitClock,
}

impl Limit {
    /// Nothing has been taken of it yet.
    pub fn new(quota: Quota, clock: Clock) -> Self {
        let clock = LimitClock(clock);
        Self { limiter: RateLimiter::direct_with_clock(quota, clock.clone()), clock }
    }

    /// Takes so much of what is allowed. More than the whole burst counts as the whole, or it would never come.
    ///
    /// # Errors
    /// Says after how long as much may be taken; nothing was.
    pub fn check(&self, wanted: NonZeroU32) -> Result<(), Duration> {
        within(|wanted| self.limiter.check_n(wanted), wanted, &self.clock)
    }
}

/// A limit of each peer.
#[derive(Debug)]
pub struct PeerLimit {
    by_peer: Limiter<IpAddr, HashMapStateStore<IpAddr>>,
    crowd: Limit,
}

impl PeerLimit {
    /// Nothing has been taken of it yet.
    pub fn new(quota: Quota, clock: Clock) -> Self {
        let by_peer = RateLimiter::hashmap_with_clock(quota, LimitClock(clock.clone()));
        Self { by_peer, crowd: Limit::new(quota, clock) }
    }

    /// Takes so much of what `peer` is allowed, as [`Limit::check`] does.
    ///
    /// # Errors
    /// Says after how long as much may be taken; nothing was.
    pub fn check(&self, peer: IpAddr, wanted: NonZeroU32) -> Result<(), Duration> {
        if self.by_peer.len() >= PEERS_MAX {
            self.by_peer.retain_recent();
        }
        if self.by_peer.len() >= PEERS_MAX {
            return self.crowd.check(wanted);
        }
        within(|wanted| self.by_peer.check_key_n(&peer_key(peer), wanted), wanted, &self.crowd.clock)
    }

    /// How many peers are remembered.
    pub fn peers(&self) -> usize {
        self.by_peer.len()
    }
}

fn within(check: impl Fn(NonZeroU32) -> Checked, wanted: NonZeroU32, clock: &LimitClock) -> Result<(), Duration> {
    let checked = check(wanted).or_else(|full| check(NonZeroU32::new(full.0).unwrap_or(wanted)));
    match checked {
        Ok(Err(until)) => Err(until.wait_time_from(clock.now())),
        Ok(Ok(())) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::time::Timestamp;

    const ONE: NonZeroU32 = NonZeroU32::MIN;

    fn limit(burst: u32, clock: &Clock) -> PeerLimit {
        let quota = Quota::per_second(ONE).allow_burst(NonZeroU32::new(burst).unwrap());
        PeerLimit::new(quota, clock.clone())
    }

    #[test]
    fn more_than_a_burst_counts_as_one() {
        let clock = Clock::manual(Timestamp::from_secs(1000));
        let (limit, peer) = (limit(10, &clock), IpAddr::from([192, 0, 2, 1]));
        assert_eq!(limit.check(peer, NonZeroU32::new(1000).unwrap()), Ok(()));
        assert_eq!(limit.check(peer, ONE), Err(Duration::from_secs(1)));
        clock.set(Timestamp::from_secs(1001));
        assert_eq!(limit.check(peer, ONE), Ok(()));
    }

    #[test]
    fn an_ipv6_network_is_one_peer_and_a_mapped_address_is_its_own() {
        let limit = limit(2, &Clock::manual(Timestamp::from_secs(1)));
        let check = |peer: &str| limit.check(peer.parse().unwrap(), ONE).is_ok();
        assert!(check("2001:db8::1") && check("2001:db8::2") && !check("2001:db8::ffff"));
        assert!(check("2001:db8:0:1::1") && check("::ffff:192.0.2.1") && check("192.0.2.1") && !check("192.0.2.1"));
    }

    #[test]
    fn memory_for_peers_is_bounded_and_forgets_those_who_have_recovered() {
        let clock = Clock::manual(Timestamp::from_secs(1));
        let limit = limit(3, &clock);
        let crowd = 3 * u32::try_from(PEERS_MAX).unwrap();
        let refused = (0..crowd).filter(|i| limit.check(IpAddr::from(i.to_be_bytes()), ONE).is_err()).count();
        assert_eq!(limit.peers(), PEERS_MAX);
        assert_eq!(refused, 2 * PEERS_MAX - 3, "the rest share one allowance");
        clock.set(Timestamp::from_secs(3600));
        limit.check(IpAddr::from([203, 0, 113, 1]), ONE).unwrap();
        assert_eq!(limit.peers(), 1);
    }
}
