//! Bans in nf_tables, over netlink: our own table `inet portcullis` and nothing else.
//!
//! It needs no program on the host, and a change costs the same whatever else stands (the program `nft` reads sets again at
//! each call). A batch of steps is one transaction. The kernel names what it refuses; the rest is sent again without that,
//! so a refused element never takes its batch along.
//! Structure (table, chains, rules, sets) is always put right as a whole, in one transaction, without touching members.

mod core;
mod element;
mod members;
mod netlink;
mod table;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use proto::net::Target;
use proto::report::Problem;
use proto::time::Clock;

use crate::backend::nftables::core::{Core, is_missing};
use crate::backend::nftables::netlink::{Batch, Kind, Socket};
use crate::backend::nftables::table::Length;
use crate::backend::subsystem::Subsystem;
use crate::backend::{Applied, RulesOutcome};
use crate::command::CommandError;
use crate::config::FirewallConfig;
use crate::plan::{Family, Form, GROWS, Held, Kernel, KernelSet, SetId, Step};
use crate::reconcile::chain_of;

/// Times that a dump is taken again because something changed meanwhile.
const DUMPS_MAX: usize = 3;

/// The table. Clones share the connection.
#[derive(Clone, Debug)]
pub(crate) struct Nftables(Arc<Mutex<Core>>);

impl Nftables {
    /// Speaks to nobody yet.
    pub(crate) fn new(config: &FirewallConfig) -> Self {
        Self(Arc::new(Mutex::new(Core::new(config))))
    }

    /// Works with the connection in a thread of its own, as it blocks.
    async fn with<T: Send + 'static>(
        &self,
        what: &'static str,
        work: impl FnOnce(&mut Core) -> io::Result<T> + Send + 'static,
    ) -> Result<T, CommandError> {
        let core = Arc::clone(&self.0);
        let locked = move || {
            let mut core = core.lock().unwrap_or_else(PoisonError::into_inner);
            let done = work(&mut core);
            if done.is_err() {
                // Whatever still waits there is of no use.
                core.close();
            }
            done
        };
        let done = tokio::task::spawn_blocking(locked).await;
        let done = done.unwrap_or_else(|error| Err(io::Error::other(error)));
        done.map_err(|source| CommandError::Kernel { what, source })
    }

    /// Carries the steps out, in order, each batch at once.
    pub(crate) async fn apply(&self, steps: &[Step]) -> Applied {
        let steps = steps.to_vec();
        let applied = self.with("change our table", move |core| Ok(core.apply(&steps))).await;
        applied.unwrap_or_else(|error| Applied { stopped: Some((0, error)), ..Applied::default() })
    }

    /// Whether nobody but us has changed any rule or set since members were observed.
    pub(crate) async fn is_unchanged(&self) -> Result<bool, CommandError> {
        self.with("read the generation", |core| {
            let now = core.read_generation()?;
            Ok(core.generation == Some(now))
        })
        .await
    }

    /// Everything in our sets.
    pub(crate) async fn observe(&self, clock: &Clock) -> Result<Kernel, CommandError> {
        let clock = clock.clone();
        let (before, sets) = self
            .with("list our sets", |core| Ok(((core.read_generation()?, core.transactions), core.find()?.sets)))
            .await?;
        // With a connection of its own, so that bans need not wait for it.
        let observe = move || -> io::Result<(Kernel, BTreeSet<Length>)> {
            let mut socket = Socket::open()?;
            let mut kernel = Kernel::default();
            for &family in &sets.guards {
                let items = dump_members(&mut socket, &table::guard_name(family))?;
                let nets = element::parse_guard(&items, family);
                let held = nets.into_iter().map(|net| (net, Held { ends: None, comment: "".into() }));
                kernel.sets.insert(SetId::Guard(family), grown(held.collect()));
            }
            let mut idle = BTreeSet::new();
            let whole = |length: &&Length| sets.bans.contains(&Length::of_hosts(length.family));
            for &length in sets.bans.iter().filter(whole) {
                let bans = dump_members(&mut socket, &length.set_name())?;
                let bans = element::parse_bans(&bans, length, clock.now());
                if bans.is_empty() {
                    idle.insert(length);
                }
                kernel
                    .sets
                    .entry(SetId::Bans(length.family))
                    .or_insert_with(|| grown(BTreeMap::new()))
                    .members
                    .extend(bans);
            }
            Ok((kernel, idle))
        };
        let observed = tokio::task::spawn_blocking(observe).await;
        let observed = observed.unwrap_or_else(|error| Err(io::Error::other(error)));
        let (kernel, idle) = observed.map_err(|source| CommandError::Kernel { what: "list our members", source })?;
        self.with("read the generation", move |core| {
            let ours = core.transactions.wrapping_sub(before.1);
            let now = core.read_generation()?;
            core.generation = (now.wrapping_sub(before.0) == ours).then_some(now);
            core.idle = if ours == 0 { idle } else { BTreeSet::new() };
            Ok(())
        })
        .await?;
        Ok(kernel)
    }

    /// Whether a ban in the kernel holds the address.
    pub(crate) async fn test(&self, set: SetId, address: IpAddr) -> Result<bool, CommandError> {
        self.with("look an address up", move |core| {
            let lengths: Vec<Length> =
                core.sets.bans.iter().filter(|length| length.family == set.family()).copied().collect();
            for length in lengths {
                let found = core.socket()?.get(Kind::GetElement, |ask| element::ask_ban(ask, length, address));
                match found {
                    Ok(_) => return Ok(true),
                    Err(error) if is_missing(&error) => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(false)
        })
        .await
    }

    /// Looks at table, chains and rules and puts right what differs.
    pub(crate) async fn resync(&mut self, families: &[Family]) -> RulesOutcome {
        let (families, unseen) = (families.to_vec(), families.iter().copied().collect::<BTreeSet<_>>());
        let resynced = self.with("put our rules in place", move |core| core.resync(&families)).await;
        resynced.unwrap_or_else(|error| {
            let text = chain_of(&error);
            tracing::warn!(error = text, "Firewall rules not in place");
            let problems = vec![Problem::degraded(text)];
            RulesOutcome { problems, failed: unseen.len(), unseen, ..RulesOutcome::default() }
        })
    }

    /// Whether our table is there.
    pub(crate) async fn is_there(&self) -> Result<bool, CommandError> {
        self.with("look for our table", Core::is_there).await
    }

    /// Removes our table. Returns whether it was there.
    pub(crate) async fn teardown(&self) -> Result<bool, CommandError> {
        self.with("remove our table", |core| {
            if !core.is_there()? {
                return Ok(false);
            }
            let mut batch = Batch::new();
            table::push_removal(&mut batch);
            core.transact_all(batch)?;
            Ok(true)
        })
        .await
    }

    /// Whether the kernel does what we need: tries it with a table that goes in the same transaction.
    pub(crate) async fn probe(&self) -> Result<(), CommandError> {
        self.with("make a table, sets and rules", |core| {
            let mut batch = Batch::new();
            table::push_probe(&mut batch);
            core.transact_all(batch)
        })
        .await
    }
}

/// Asks a subsystem of the kernel for something that each version of it answers. It blocks.
///
/// # Errors
/// What came instead of an answer.
pub(super) fn greet(subsystem: Subsystem) -> io::Result<()> {
    let mut socket = Socket::open()?;
    match subsystem {
        Subsystem::NfTables => socket.get(Kind::GetGeneration, |_| {}).map(drop),
        Subsystem::Ipset => socket.greet_ipset(),
    }
}

/// Where people find a ban.
pub(crate) fn describe_ban(target: &Target) -> String {
    table::describe_set(element::length_of(target))
}

fn grown(members: BTreeMap<Target, Held>) -> KernelSet {
    KernelSet { maxelem: GROWS, form: Form::Ours, members }
}

/// A dump that something interrupted is taken again; what we changed ourselves the reconciler knows better anyway.
fn dump_members(socket: &mut Socket, set: &str) -> io::Result<Vec<Vec<u8>>> {
    let mut dump = socket.dump(Kind::GetElement, |ask| element::ask_members(ask, set))?;
    for _ in 1..DUMPS_MAX {
        if !dump.interrupted {
            break;
        }
        dump = socket.dump(Kind::GetElement, |ask| element::ask_members(ask, set))?;
    }
    Ok(dump.items)
}
