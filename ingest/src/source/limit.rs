//! How much a source and each of its senders may bring, by governor.
//!
//! A sender beyond its share is told to wait or is turned away, and takes nothing from the others. Senders are IPv4
//! addresses and IPv6 networks of 64 bits; the memory for them is bounded, and those beyond share one allowance.

use std::net::IpAddr;
use std::num::NonZeroU32;
use std::time::Duration;

use proto::limit::{Limit, PeerLimit, Quota};
use proto::time::Clock;

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

/// The limits of one source.
#[derive(Debug)]
pub(crate) struct Limits {
    all: [Option<Limit>; 2],
    senders: [Option<PeerLimit>; 2],
}

impl Limits {
    pub(crate) fn new(config: &LimitConfig, clock: &Clock) -> Self {
        let quota = |per_second: NonZeroU32| {
            let burst = (f64::from(per_second.get()) * config.burst.as_secs_f64()).min(f64::from(u32::MAX)) as u32;
            Quota::per_second(per_second).allow_burst(NonZeroU32::new(burst).unwrap_or(per_second).max(per_second))
        };
        let all = |per_second| Limit::new(quota(per_second), clock.clone());
        let sender = |per_second| PeerLimit::new(quota(per_second), clock.clone());
        Self {
            all: [config.lines, config.bytes].map(|limit| limit.map(all)),
            senders: [config.sender_lines, config.sender_bytes].map(|limit| limit.map(sender)),
        }
    }

    /// Takes so many lines and bytes of `sender` from what is allowed; an error says after how long they may come again.
    /// The sender's own share is looked at first, so that what it brings too much costs nobody else.
    pub(crate) fn check(&self, sender: Option<IpAddr>, lines: u32, bytes: u32) -> Result<(), Duration> {
        let wanted = [lines, bytes].map(NonZeroU32::new);
        for (limit, wanted) in self.senders.iter().zip(wanted) {
            let (Some(limit), Some(wanted), Some(sender)) = (limit, wanted, sender) else { continue };
            limit.check(sender, wanted)?;
        }
        for (limit, wanted) in self.all.iter().zip(wanted) {
            let (Some(limit), Some(wanted)) = (limit, wanted) else { continue };
            limit.check(wanted)?;
        }
        Ok(())
    }

    /// Takes as [`Limits::check`] does, and waits until it may. What is waited for is taken once.
    pub(crate) async fn wait(&self, sender: Option<IpAddr>, lines: u32, bytes: u32) {
        let wanted = [lines, bytes].map(NonZeroU32::new);
        for (limit, wanted) in self.senders.iter().zip(wanted) {
            let (Some(limit), Some(wanted), Some(sender)) = (limit, wanted, sender) else { continue };
            while let Err(wait) = limit.check(sender, wanted) {
                tokio::time::sleep(wait).await;
            }
        }
        for (limit, wanted) in self.all.iter().zip(wanted) {
            let (Some(limit), Some(wanted)) = (limit, wanted) else { continue };
            while let Err(wait) = limit.check(wanted) {
                tokio::time::sleep(wait).await;
            }
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
        let limits = Limits::new(&config, &clock);
        let admitted = |sender, times: u32| (0..times).filter(|_| limits.check(sender, 1, 100).is_ok()).count();
        assert_eq!(admitted(sender(1), 1000), 20, "two seconds' worth at once");
        assert_eq!(admitted(sender(2), 20), 20);
        let wait = limits.check(sender(1), 1, 100).unwrap_err();
        assert!(wait > Duration::ZERO && wait <= Duration::from_millis(100), "{wait:?}");
        clock.set(Timestamp::from_secs(1001));
        assert_eq!(admitted(sender(1), 1000), 10);
        assert_eq!(admitted(None, 1000), 190, "what has no sender is held by the whole alone");
    }
}
