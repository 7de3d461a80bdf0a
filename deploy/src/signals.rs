//! Signals: two phases of ending, and reload.
//!
//! SIGTERM and SIGINT begin the shutdown, a second one forces it. SIGHUP asks for a reload. SIGUSR1, which log rotation
//! sends to Traefik and sometimes to everything around it, does nothing. The programs that read our output may go:
//! SIGPIPE is ignored by the standard library, and writing fails instead.

use std::io;

use proto::shutdown::Shutdown;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

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
    pub async fn run(mut self, shutdown: Shutdown, reload: watch::Sender<u64>) {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => end(&shutdown, "SIGTERM"),
                _ = self.interrupt.recv() => end(&shutdown, "SIGINT"),
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

fn end(shutdown: &Shutdown, signal: &'static str) {
    if shutdown.is_draining() {
        tracing::warn!(signal, "Ending at once");
        shutdown.force();
    } else {
        tracing::info!(signal, "Ending in order, a second signal ends at once");
        shutdown.begin();
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::signal::{Signal as Number, raise};

    use super::*;

    #[tokio::test]
    async fn the_first_signal_drains_the_second_forces_and_hangup_reloads() {
        let shutdown = Shutdown::new();
        let (reload, mut reloads) = watch::channel(0);
        let signals = tokio::spawn(Signals::install().unwrap().run(shutdown.clone(), reload));
        raise(Number::SIGUSR1).unwrap();
        raise(Number::SIGHUP).unwrap();
        reloads.changed().await.unwrap();
        assert!(!shutdown.is_draining());
        raise(Number::SIGTERM).unwrap();
        shutdown.draining().await;
        raise(Number::SIGINT).unwrap();
        shutdown.forced().await;
        signals.await.unwrap();
    }
}
