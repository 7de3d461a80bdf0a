//! Signals: two phases of ending, and reload.
//!
//! SIGTERM and SIGINT begin the shutdown, a second one forces it; what comes within [`SAME_SIGNAL`] after the first is
//! still the first, as a service manager may send one to the main process and one to its whole group. SIGHUP asks for a reload. SIGUSR1, which log rotation
//! sends to Traefik and sometimes to everything around it, does nothing. The programs that read our output may go:
//! SIGPIPE is ignored by the standard library, and writing fails instead.

use std::io;
use std::time::Duration;

use proto::shutdown::Shutdown;
use proto::time::{Clock, Timestamp};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

/// How long after the first signal others count as the same one. Nobody presses a key twice as fast.
const SAME_SIGNAL: Duration = Duration::from_millis(100);

/// What a signal to end means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meaning {
    /// End in order.
    First,
    /// As was asked already.
    Same,
    /// End now.
    Second,
}

/// The signals to end so far.
#[derive(Debug, Default)]
struct Ending {
    begun_at: Option<Timestamp>,
}

impl Ending {
    /// Takes a signal that comes `now`. Something else than a signal may have asked for the end before.
    fn take(&mut self, now: Timestamp) -> Meaning {
        match self.begun_at {
            None => {
                self.begun_at = Some(now);
                Meaning::First
            }
            Some(begun_at) if now.since(begun_at) < SAME_SIGNAL => Meaning::Same,
            Some(_) => Meaning::Second,
        }
    }
}

/// The handlers, installed.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    user: Signal,
}

impl Signals {
    /// Installs the handlers; from now on none of these signals ends the process by itself. Needs a runtime.
    pub fn install() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
            user: signal(SignalKind::user_defined1())?,
        })
    }

    /// Serves signals until the end is forced. Not for a supervisor, which would wait for it: spawn it, and drop it
    /// with the runtime. `reload` counts the SIGHUPs.
    pub async fn run(mut self, shutdown: Shutdown, reload: watch::Sender<u64>, clock: Clock) {
        let mut ending = Ending::default();
        loop {
            tokio::select! {
                _ = self.terminate.recv() => end(&shutdown, "SIGTERM", ending.take(clock.raw())),
                _ = self.interrupt.recv() => end(&shutdown, "SIGINT", ending.take(clock.raw())),
                _ = self.hangup.recv() => {
                    tracing::info!("Reload asked for");
                    reload.send_modify(|count| *count += 1);
                }
                _ = self.user.recv() => tracing::debug!("SIGUSR1 does nothing here"),
                () = shutdown.forced() => return,
            }
        }
    }
}

fn end(shutdown: &Shutdown, signal: &'static str, meaning: Meaning) {
    match meaning {
        Meaning::First if !shutdown.is_draining() => {
            tracing::info!(signal, "Ending in order, a second signal ends at once");
            shutdown.begin();
        }
        Meaning::Same => tracing::debug!(signal, "The same signal again"),
        Meaning::First | Meaning::Second => {
            tracing::warn!(signal, "Ending at once");
            shutdown.force();
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::signal::{Signal as Number, raise};

    use super::*;

    #[tokio::test]
    async fn the_first_signal_drains_the_second_forces_and_hangup_reloads() {
        let (shutdown, clock) = (Shutdown::new(), Clock::manual(Timestamp::EPOCH));
        let (reload, mut reloads) = watch::channel(0);
        let signals = tokio::spawn(Signals::install().unwrap().run(shutdown.clone(), reload, clock.clone()));
        raise(Number::SIGUSR1).unwrap();
        raise(Number::SIGHUP).unwrap();
        reloads.changed().await.unwrap();
        assert!(!shutdown.is_draining());
        raise(Number::SIGTERM).unwrap();
        shutdown.draining().await;
        clock.set(Timestamp::from_secs(1));
        raise(Number::SIGINT).unwrap();
        shutdown.forced().await;
        signals.await.unwrap();
    }

    #[test]
    fn a_signal_to_the_process_and_one_to_its_group_are_one() {
        let mut ending = Ending::default();
        let at = |millis: i64| Timestamp::from_millis(5000 + millis);
        assert_eq!(ending.take(at(0)), Meaning::First);
        assert_eq!([ending.take(at(0)), ending.take(at(1)), ending.take(at(99))], [Meaning::Same; 3]);
        assert_eq!(ending.take(at(100)), Meaning::Second);
        assert_eq!(ending.take(at(100_000)), Meaning::Second);
    }

    #[tokio::test]
    async fn a_signal_while_the_end_has_begun_without_one_ends_at_once() {
        async fn is_forced(shutdown: &Shutdown) -> bool {
            tokio::select! { biased; () = shutdown.forced() => true, () = std::future::ready(()) => false }
        }
        let shutdown = Shutdown::new();
        end(&shutdown, "SIGTERM", Meaning::First);
        end(&shutdown, "SIGTERM", Meaning::Same);
        assert!(shutdown.is_draining() && !is_forced(&shutdown).await);
        end(&shutdown, "SIGTERM", Meaning::First);
        assert!(is_forced(&shutdown).await);
    }
}
