//! DNS names in `never_ban`, resolved in the background.
//!
//! Only names of the configuration are ever resolved, never one from a log. A failure keeps the last good answer.

use std::net::IpAddr;
use std::time::Duration;

use proto::net::canonical;
use proto::shutdown::Shutdown;
use tokio::sync::{mpsc, watch};

use crate::worker::Request;

/// What is resolved, and how often.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    /// The names.
    pub names: Vec<String>,
    /// Time between two look-ups of a name.
    pub interval: Duration,
}

/// How long one look-up may take.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(10);

/// Resolves the names, again at each interval and at each change of the list, until the shutdown.
///
/// # Errors
/// None: a failed look-up is reported to the worker.
pub async fn run(
    mut names: watch::Receiver<Names>,
    requests: mpsc::Sender<Request>,
    shutdown: Shutdown,
) -> Result<(), std::convert::Infallible> {
    loop {
        let current = names.borrow_and_update().clone();
        for name in &current.names {
            let found = tokio::select! {
                found = tokio::time::timeout(LOOKUP_TIMEOUT, tokio::net::lookup_host((name.as_str(), 0))) => found,
                () = shutdown.draining() => return Ok(()),
            };
            let addrs = match found {
                Ok(Ok(addrs)) => Ok(addrs.map(|addr| canonical(addr.ip())).collect::<Vec<IpAddr>>()),
                Ok(Err(error)) => Err(error.to_string()),
                Err(_) => Err(format!("no answer within {} s", LOOKUP_TIMEOUT.as_secs())),
            };
            let answer = Request::Resolved { name: name.clone(), addrs };
            if requests.send(answer).await.is_err() {
                return Ok(());
            }
        }
        let pause = if current.names.is_empty() { Duration::MAX } else { current.interval };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            changed = names.changed() => if changed.is_err() { shutdown.draining().await; return Ok(()) },
            () = shutdown.draining() => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn names_are_resolved_at_once_and_again_when_the_list_changes() {
        let interval = Duration::from_secs(3600);
        let names = watch::Sender::new(Names { names: vec!["localhost".to_owned()], interval });
        let (requests, mut requests_in) = mpsc::channel(4);
        let shutdown = Shutdown::new();
        let task = tokio::spawn(run(names.subscribe(), requests, shutdown.clone()));
        for round in 0..2 {
            let Some(Request::Resolved { name, addrs: Ok(addrs) }) = requests_in.recv().await else {
                panic!("round {round} gave no answer")
            };
            assert_eq!(name, "localhost");
            assert!(!addrs.is_empty() && addrs.iter().all(IpAddr::is_loopback), "{addrs:?}");
            names.send_modify(|names| names.interval += interval);
        }
        shutdown.begin();
        task.await.unwrap().unwrap();
    }
}
