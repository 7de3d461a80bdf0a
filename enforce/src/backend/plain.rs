//! Bans as plain iptables rules, where there are no kernel sets: every change rewrites our chain in one transaction.
//!
//! [`super::iptables`] keeps the chain and the jumps to it in place and shares what is known here.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use proto::time::{Clock, Timestamp};
use tokio::sync::{Mutex, OwnedMutexGuard};

use crate::backend::Applied;
use crate::backend::iptables::calls::{Programs, restore};
use crate::command::CommandError;
use crate::config::{FirewallConfig, Table};
use crate::plan::plain;
use crate::plan::rules::RuleStep;
use crate::plan::{Family, Kernel, Step};

/// The bans in our chain. Clones share them.
#[derive(Clone, Debug)]
pub(crate) struct Plain(Arc<Mutex<Members>>);

/// What our chain holds, and where it stands.
#[derive(Debug)]
pub(crate) struct Members {
    config: FirewallConfig,
    clock: Clock,
    pub(crate) kernel: Kernel,
    /// Where the chain was placed.
    spots: BTreeMap<Family, (Programs, BTreeSet<Table>)>,
}

impl Plain {
    /// Begins with what our chain holds.
    pub(crate) fn new(config: FirewallConfig, clock: Clock, kernel: Kernel) -> Self {
        Self(Arc::new(Mutex::new(Members { config, clock, kernel, spots: BTreeMap::new() })))
    }

    /// Nothing else changes the chain until this is dropped.
    pub(crate) async fn lock(&self) -> OwnedMutexGuard<Members> {
        Arc::clone(&self.0).lock_owned().await
    }

    /// Takes all steps or none.
    pub(crate) async fn apply(&self, steps: &[Step]) -> Applied {
        let mut members = self.0.lock().await;
        let now = members.clock.now();
        let mut kernel = members.kernel.clone();
        for step in steps {
            kernel.note(step, now);
        }
        let former = std::mem::replace(&mut members.kernel, kernel);
        members.forget_ended(now);
        match members.write().await {
            Ok(()) => Applied::default(),
            Err(error) => {
                members.kernel = former;
                Applied { stopped: Some((0, error)), ..Applied::default() }
            }
        }
    }

    /// What the chain holds. That it still does, its keeper sees to.
    pub(crate) async fn observe(&self) -> Kernel {
        self.0.lock().await.kernel.clone()
    }

    /// Bans held at most.
    pub(crate) async fn bans_max(&self) -> u32 {
        plain::bans_max(&self.0.lock().await.config)
    }
}

impl Members {
    /// Removes rules whose bans have ended; they match nothing any more.
    pub(crate) async fn sweep(&mut self) -> Result<(), CommandError> {
        let now = self.clock.now();
        if self.forget_ended(now) { self.write().await } else { Ok(()) }
    }

    /// The chain stands in these tables.
    pub(crate) fn take_spot(&mut self, family: Family, programs: Programs, tables: BTreeSet<Table>) {
        self.spots.insert(family, (programs, tables));
    }

    fn forget_ended(&mut self, now: Timestamp) -> bool {
        let mut ended = false;
        for (_, set) in self.kernel.sets.iter_mut().filter(|(id, _)| id.holds_bans()) {
            let before = set.members.len();
            set.members.retain(|_, held| held.ends.is_none_or(|end| now < end));
            ended |= set.members.len() < before;
        }
        ended
    }

    async fn write(&self) -> Result<(), CommandError> {
        for (&family, (programs, tables)) in &self.spots {
            for &table in tables {
                let rules = plain::render_rules(&self.config, family, table, &self.kernel);
                restore(*programs, &RuleStep::Fill { table, rules }).await?;
            }
        }
        Ok(())
    }
}
