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
use crate::config::{CHAIN, ChainRef, FirewallConfig, Table};
use crate::plan::plain;
use crate::plan::rules::{RuleStep, View};
use crate::plan::{Family, Form, GROWS, Kernel, KernelSet, SKEW_STEP_MS, SetId, Step};

/// The bans in our chain. Clones share them.
#[derive(Clone, Debug)]
pub(crate) struct Plain(Arc<Mutex<Members>>);

/// What our chain holds, and where it stands.
#[derive(Debug)]
pub(crate) struct Members {
    config: FirewallConfig,
    clock: Clock,
    /// By how much the host's clock, by which rules end, is ahead.
    pub(crate) skew_ms: i64,
    pub(crate) kernel: Kernel,
    /// Where the chain stands.
    spots: BTreeMap<Family, Vec<(Programs, BTreeSet<Table>)>>,
}

impl Plain {
    /// Shares what is known.
    pub(crate) fn new(members: Members) -> Self {
        Self(Arc::new(Mutex::new(members)))
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
    /// Knows no chain.
    pub(crate) fn new(config: FirewallConfig, clock: Clock) -> Self {
        let skew_ms = clock.skew_ms().unwrap_or_default();
        Self { config, clock, skew_ms, kernel: Kernel::default(), spots: BTreeMap::new() }
    }

    /// Takes over what our chain holds, and where.
    pub(crate) fn take_over(&mut self, family: Family, programs: Programs, view: &View) {
        let has_chain = |table: &Table| view.has(&ChainRef::new(*table, CHAIN));
        let tables: BTreeSet<Table> = view.tables.keys().copied().filter(has_chain).collect();
        let rules = tables.iter().filter_map(|table| view.rules(&ChainRef::new(*table, CHAIN))).flatten();
        let held = plain::parse_rules(rules, self.skew_ms);
        if !held.is_empty() {
            let none = || KernelSet { maxelem: GROWS, form: Form::Ours, members: BTreeMap::new() };
            self.kernel.sets.entry(SetId::Bans(family)).or_insert_with(none).members.extend(held);
        }
        if !tables.is_empty() {
            self.spots.entry(family).or_default().push((programs, tables));
        }
    }

    /// Somebody removed the family's chain with all its bans.
    pub(crate) fn lose(&mut self, family: Family) {
        self.spots.remove(&family);
        if let Some(set) = self.kernel.sets.get_mut(&SetId::Bans(family)) {
            set.members.clear();
        }
    }

    /// Removes rules whose bans have ended, which match nothing any more, and follows the clock.
    pub(crate) async fn renew(&mut self) -> Result<(), CommandError> {
        let is_over = self.forget_ended(self.clock.now());
        if self.follow_clock() || is_over { self.write().await } else { Ok(()) }
    }

    fn follow_clock(&mut self) -> bool {
        let skew_ms = self.clock.skew_ms().unwrap_or_default();
        let moved = skew_ms.abs_diff(self.skew_ms) >= SKEW_STEP_MS;
        if moved {
            self.skew_ms = skew_ms;
        }
        moved
    }

    /// The chain stands in these tables.
    pub(crate) fn take_spot(&mut self, family: Family, programs: Programs, tables: BTreeSet<Table>) {
        self.spots.insert(family, vec![(programs, tables)]);
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
        for (&family, spots) in &self.spots {
            for (programs, tables) in spots {
                for &table in tables {
                    let rules = plain::render_rules(&self.config, (family, table), &self.kernel, self.skew_ms);
                    restore(*programs, &RuleStep::Fill { table, rules }).await?;
                }
            }
        }
        Ok(())
    }
}
