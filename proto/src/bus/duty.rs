//! Duties: actions that one host at a time carries out for the whole cluster, such as telling Cloudflare.
//!
//! They are at least once. A host that is cut off from the bus leaves them before another takes them; only what it has under
//! way then may still end.

use crate::bus::nats::Connection;
use crate::bus::nats::lease::{Holder, Keeper, Lease, Tenure};
use crate::report::Problem;

/// Key of an action's lease, before its name.
const LEASE_PREFIX: &str = "enforce.";

/// The duties that this host may take.
#[derive(Clone, Debug)]
pub struct Duties(Option<(Connection, Holder)>);

impl Duties {
    /// Of a host without a cluster: all of them, always.
    pub fn alone() -> Self {
        Self(None)
    }

    /// Of a host of a cluster, as `me`: those whose lease it gets.
    pub fn shared(connection: &Connection, me: Holder) -> Self {
        Self(Some((connection.clone(), me)))
    }

    /// Whether there is no cluster.
    pub fn are_alone(&self) -> bool {
        self.0.is_none()
    }

    /// From now on the duty `action` (`[a-z0-9-]{1,63}`) is wanted, until what is returned is dropped. Needs a runtime.
    pub fn take(&self, action: &str) -> Duty {
        let keeper = self.0.as_ref().map(|(connection, me)| {
            let (bucket, key) = (connection.subjects().duty_bucket(), format!("{LEASE_PREFIX}{action}"));
            let keeper = Keeper::spawn_unfenced(Lease::new(connection, bucket, &key, me.clone()));
            keeper.want(true);
            keeper
        });
        Duty(keeper)
    }
}

/// One duty, as this host sees it.
#[derive(Debug)]
pub struct Duty(Option<Keeper>);

impl Duty {
    /// Whether it is ours now.
    pub fn is_held(&self) -> bool {
        self.claim().is_held()
    }

    /// Which of our takings this is, if it is ours now. After each other one it has been another's, or may have been.
    pub fn term(&self) -> Option<u64> {
        let takings = self.0.as_ref().map_or(0, |keeper| keeper.state().takings);
        self.is_held().then_some(takings)
    }

    /// Tells whether it is ours, at any later moment too.
    pub fn claim(&self) -> Claim {
        Claim(self.0.as_ref().map(Keeper::tenure))
    }

    /// Node whose duty it is, as far as known; `None` also without a cluster.
    pub fn holder(&self) -> Option<String> {
        self.0.as_ref()?.state().holder.map(|holder| holder.node)
    }

    /// What is wrong where it cannot be seen whose duty it is, for reports.
    pub fn problem(&self) -> Option<Problem> {
        self.0.as_ref()?.state().problem()
    }

    /// Returns when it has changed whose duty it is.
    pub async fn changed(&mut self) {
        match &mut self.0 {
            Some(keeper) => keeper.changed().await,
            None => std::future::pending().await,
        }
    }

    /// Gives it back, so that another host takes it at once.
    pub async fn give_back(self) {
        if let Some(keeper) = self.0 {
            keeper.give_back().await;
        }
    }
}

/// Whether a duty is ours, for what is about to be done for it. Without a cluster it always is.
#[derive(Clone, Debug, Default)]
pub struct Claim(Option<Tenure>);

impl Claim {
    /// Whether it is ours now: asked again after every wait, as this process may have stood still meanwhile.
    pub fn is_held(&self) -> bool {
        self.0.as_ref().is_none_or(Tenure::is_held)
    }
}
