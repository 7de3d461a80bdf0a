//! The table as a whole: what is there, what it should be, and the transactions that change it. It blocks.

use std::collections::BTreeSet;
use std::io;

use nix::errno::Errno;
use proto::report::Problem;

use crate::backend::RulesOutcome;
use crate::backend::nftables::netlink::{Batch, Kind, Socket, as_u32, attribute};
use crate::backend::nftables::table::{self, Found, Length, Shown};
use crate::config::{Chains, FirewallConfig, Ports};
use crate::plan::Family;

/// Owns the connection, and knows what it was told.
#[derive(Debug)]
pub(super) struct Core {
    socket: Option<Socket>,
    pub(super) ports: Vec<Ports>,
    pub(super) spare_ports: Vec<Ports>,
    chains_listed: bool,
    /// Our sets, as far as we know.
    pub(super) sets: table::Sets,
    /// Our rules as the kernel showed them when they were right; `None` before they are placed.
    pub(super) placed: Option<Vec<Shown>>,
    /// The ruleset's generation if nobody but us has changed anything since members were observed.
    pub(super) generation: Option<u32>,
    /// Transactions of ours.
    pub(super) transactions: u32,
    /// Prefix lengths of which nobody was banned when members were observed, and nobody since.
    pub(super) idle: BTreeSet<Length>,
    /// What the counter showed before it was made anew, and at the last look: packets and bytes.
    dropped: [(u64, u64); 2],
}

impl Core {
    /// Knows nothing yet.
    pub(super) fn new(config: &FirewallConfig) -> Self {
        Self {
            socket: None,
            ports: config.ports.clone(),
            spare_ports: config.spare_ports.clone(),
            chains_listed: config.chains != Chains::Auto,
            sets: table::Sets::default(),
            placed: None,
            generation: None,
            transactions: 0,
            idle: BTreeSet::new(),
            dropped: [(0, 0); 2],
        }
    }

    /// Forgets a connection on which something may still wait.
    pub(super) fn close(&mut self) {
        self.socket = None;
    }

    pub(super) fn socket(&mut self) -> io::Result<&mut Socket> {
        if self.socket.is_none() {
            self.socket = Some(Socket::open()?);
        }
        self.socket.as_mut().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    pub(super) fn read_generation(&mut self) -> io::Result<u32> {
        let answer = self.socket()?.get(Kind::GetGeneration, |_| {})?;
        attribute(&answer, 1).and_then(as_u32).ok_or_else(|| io::Error::other("the kernel names no generation"))
    }

    pub(super) fn is_there(&mut self) -> io::Result<bool> {
        match self.socket()?.get(Kind::GetTable, table::ask_table) {
            Ok(_) => Ok(true),
            Err(error) if is_missing(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The sets of our table; none where there is no table.
    pub(super) fn find(&mut self) -> io::Result<Found> {
        let found = match self.socket()?.dump(Kind::GetSet, table::ask_table) {
            Ok(dump) => Found::parse(&dump.items),
            Err(error) if is_missing(&error) => Found::default(),
            Err(error) => return Err(error),
        };
        self.sets = found.sets.clone();
        Ok(found)
    }

    /// One transaction, after which the generation is ours again if it was.
    pub(super) fn transact(&mut self, batch: Batch) -> io::Result<Vec<(u32, Errno)>> {
        let refused = self.socket()?.transact(batch)?.refused;
        if refused.is_empty() {
            self.transactions = self.transactions.wrapping_add(1);
            let now = self.read_generation()?;
            self.generation = self.generation.filter(|known| known.wrapping_add(1) == now).map(|_| now);
        }
        Ok(refused)
    }

    pub(super) fn transact_all(&mut self, batch: Batch) -> io::Result<()> {
        match self.transact(batch)?.first() {
            None => Ok(()),
            Some((_, errno)) => Err((*errno).into()),
        }
    }

    /// Our table, chains and rules as the kernel shows them.
    pub(super) fn read_rules(&mut self) -> io::Result<Vec<Shown>> {
        let socket = self.socket()?;
        let mut rules = Vec::new();
        match socket.get(Kind::GetTable, table::ask_table) {
            Ok(shown) => rules.push(table::parse_table(&shown)),
            Err(error) if is_missing(&error) => return Ok(rules),
            Err(error) => return Err(error),
        }
        // Some kernels show those of all tables.
        let chains = socket.dump(Kind::GetChain, table::ask_table)?.items;
        rules.extend(chains.iter().filter(|item| table::is_ours(item)).map(|chain| table::parse_chain(chain)));
        let shown = socket.dump(Kind::GetRule, table::ask_table)?.items;
        rules.extend(shown.iter().filter(|item| table::is_ours(item)).map(|rule| table::parse_rule(rule)));
        Ok(rules)
    }

    pub(super) fn resync(&mut self, families: &[Family]) -> io::Result<RulesOutcome> {
        let mut outcome = RulesOutcome::default();
        let found = self.find()?;
        let mut wanted = found.sets.clone();
        wanted.bans.retain(|length| length.is_of_hosts() || !self.idle.contains(length));
        let shown = self.read_rules()?;
        let right = found.others.is_empty() && self.placed.as_ref() == Some(&shown);
        if !right || wanted != found.sets {
            self.build(&found, &wanted)?;
            outcome.steps.push("place_rules");
            if self.placed.is_none() {
                tracing::info!(table = "inet portcullis", "Placed firewall rules");
            } else if !right {
                outcome.repairs += 1;
                tracing::warn!(table = "inet portcullis", "Repaired firewall rules");
            }
            self.placed = Some(self.read_rules()?);
        }
        self.count()?;
        let [former, last] = self.dropped;
        outcome.dropped = (former.0 + last.0, former.1 + last.1);
        outcome.detail.push("nftables: table inet portcullis, prerouting before connection tracking".to_owned());
        outcome.places = families.iter().map(|family| (*family, "prerouting (nftables)".to_owned())).collect();
        if self.chains_listed {
            let text = "chains is for iptables; nftables, which was chosen, drops at prerouting, before all of them";
            outcome.problems.push(Problem::warning(text));
        }
        Ok(outcome)
    }

    /// Puts the structure right; where it is none of ours, by a new table, whose members the next observation brings.
    fn build(&mut self, found: &Found, wanted: &table::Sets) -> io::Result<()> {
        let ports = (&self.ports[..], &self.spare_ports[..]);
        let mut batch = Batch::new();
        table::push_structure(&mut batch, found, wanted, ports);
        let mut anew = Batch::new();
        table::push_removal(&mut anew);
        table::push_structure(&mut anew, &Found::default(), wanted, ports);
        if let Some((_, errno)) = self.transact(batch)?.first() {
            tracing::warn!(reason = errno.desc(), "Our table is not as we make it and is made anew");
            self.transact_all(anew)?;
            self.generation = None;
        }
        self.sets = wanted.clone();
        Ok(())
    }

    fn count(&mut self) -> io::Result<()> {
        let counter = self.socket()?.get(Kind::GetObject, table::ask_counter)?;
        let shown = table::parse_counter(&counter);
        let [former, last] = &mut self.dropped;
        if shown.0 < last.0 || shown.1 < last.1 {
            // The counter was made anew and counts from zero again.
            *former = (former.0 + last.0, former.1 + last.1);
        }
        *last = shown;
        Ok(())
    }
}

/// What was asked for is not there.
pub(super) fn is_missing(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::ENOENT as i32)
}
