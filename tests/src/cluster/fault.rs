//! What can befall a cluster, one fault at a time or several: chosen from a seed, inflicted, and healed.

use anyhow::{Context, Result};
use proto::report::Role;

use super::host::Host;
use super::{CONVERGENCE, Cluster};
use crate::netns::Namespace;
use crate::portcullis::wait_until;
use crate::random::Random;

/// Percentage of packets that a bad link loses.
const LOSS_PERCENT: u8 = 15;

/// One fault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A role is killed without a word.
    KillRole(String, Role),
    /// A NATS server is killed without a word.
    KillServer(usize),
    /// All of them.
    KillAllServers,
    /// A host is cut off.
    Cut(String),
    /// A host's link loses packets.
    Lossy(String),
    /// Little passes a host's link at a time.
    Slow(String),
    /// The active detect stands still; then it goes on as if nothing had been.
    Freeze(String),
}

impl Fault {
    /// One that `cluster` can have now.
    pub fn choose(random: &mut Random, cluster: &Cluster) -> Result<Self> {
        let servers = u64::try_from(cluster.servers.count())?;
        Ok(match random.below(12) {
            0 | 1 => Self::KillRole(edge(random, cluster), random.pick(&[Role::Ingest, Role::Enforce])),
            2 => Self::KillRole(detect(random, cluster), Role::Detect),
            3 => Self::KillServer(usize::try_from(random.below(servers))?),
            4 => Self::KillServer(cluster.servers.leader("PORTCULLIS_ACCESS").context("no leader")?),
            5 => Self::KillServer(cluster.servers.leader("KV_portcullis_bans").context("no leader")?),
            6 => Self::KillAllServers,
            7 => Self::Cut(any_host(random, cluster)),
            8 => Self::Cut(active(cluster)?),
            9 => Self::Lossy(any_host(random, cluster)),
            10 => Self::Slow(any_host(random, cluster)),
            _ => Self::Freeze(active(cluster)?),
        })
    }

    /// The cut of each host's link, the servers' as well: few at a time, of which no two are servers.
    pub fn every_cut(cluster: &Cluster) -> Vec<Vec<Self>> {
        let cut = |host: &str| Self::Cut(host.to_owned());
        let edges = cluster.edges.iter().map(|edge| cut(edge.name()));
        let detects = cluster.detects.iter().map(|detect| cut(detect.name()));
        let servers = (0..cluster.servers.count()).map(|index| cut(cluster.servers.host(index).0));
        together(&[edges.chain(detects).collect(), servers.collect()])
    }

    /// The end of each role on each host, and of each server: few at a time, of which no two are of one kind.
    pub fn every_kill(cluster: &Cluster) -> Vec<Vec<Self>> {
        let kill = |role| move |host: &Host| Self::KillRole(host.name().to_owned(), role);
        let ingests = cluster.edges.iter().map(kill(Role::Ingest));
        let enforces = cluster.edges.iter().rev().map(kill(Role::Enforce));
        let detects = cluster.detects.iter().map(kill(Role::Detect));
        let servers = (0..cluster.servers.count()).map(Self::KillServer);
        together(&[ingests.collect(), enforces.collect(), detects.collect(), servers.collect()])
    }

    /// Whether the other hosts go on banning while it lasts: a majority of servers and one detect are left.
    pub fn leaves_service(&self) -> bool {
        *self != Self::KillAllServers
    }

    /// Whether a host sees nothing of it itself.
    pub fn spares(&self, host: &str) -> bool {
        match self {
            Self::KillRole(name, _) | Self::Cut(name) | Self::Lossy(name) | Self::Slow(name) => name != host,
            Self::KillServer(_) | Self::KillAllServers | Self::Freeze(_) => true,
        }
    }

    /// Lets it happen.
    pub fn inflict(&self, cluster: &mut Cluster) -> Result<()> {
        match self {
            Self::KillRole(host, role) => cluster.host_mut(host)?.kill(*role),
            Self::KillServer(index) => cluster.servers.kill(*index),
            Self::KillAllServers => (0..cluster.servers.count()).try_for_each(|index| cluster.servers.kill(index)),
            Self::Cut(host) => cluster.network.cut(host),
            Self::Lossy(host) => cluster.network.lose(host, LOSS_PERCENT),
            Self::Slow(host) => cluster.network.slow(host, namespace(cluster, host)?),
            Self::Freeze(host) => cluster.host_mut(host)?.signal(Role::Detect, "STOP"),
        }
    }

    /// Ends it, and leaves everything running again.
    pub fn heal(&self, cluster: &mut Cluster) -> Result<()> {
        match self {
            Self::KillRole(host, role) => cluster.host_mut(host)?.start(*role),
            Self::KillServer(index) => cluster.servers.start(*index),
            Self::KillAllServers => (0..cluster.servers.count()).try_for_each(|index| cluster.servers.start(index)),
            Self::Cut(host) | Self::Lossy(host) | Self::Slow(host) => {
                cluster.network.heal(host, namespace(cluster, host)?)
            }
            Self::Freeze(host) => cluster.host_mut(host)?.signal(Role::Detect, "CONT"),
        }
    }
}

/// The first of each list, then the second of each, and so on.
fn together(lists: &[Vec<Fault>]) -> Vec<Vec<Fault>> {
    let longest = lists.iter().map(Vec::len).max().unwrap_or(0);
    (0..longest).map(|i| lists.iter().filter_map(|list| list.get(i).cloned()).collect()).collect()
}

fn edge(random: &mut Random, cluster: &Cluster) -> String {
    let names: Vec<&str> = cluster.edges.iter().map(Host::name).collect();
    random.pick(&names).to_owned()
}

fn detect(random: &mut Random, cluster: &Cluster) -> String {
    let names: Vec<&str> = cluster.detects.iter().map(Host::name).collect();
    random.pick(&names).to_owned()
}

fn any_host(random: &mut Random, cluster: &Cluster) -> String {
    random.pick(&hosts(cluster)).to_owned()
}

fn hosts(cluster: &Cluster) -> Vec<&str> {
    let hosts = cluster.edges.iter().chain(&cluster.detects).map(Host::name);
    let servers = (0..cluster.servers.count()).map(|index| cluster.servers.host(index).0);
    hosts.chain(servers).collect()
}

fn active(cluster: &Cluster) -> Result<String> {
    let index = wait_until("a detect is active", CONVERGENCE, || cluster.active_detect())?;
    Ok(cluster.detects[index].name().to_owned())
}

/// The namespace of any host, by name.
fn namespace<'a>(cluster: &'a Cluster, name: &str) -> Result<&'a Namespace> {
    let mut hosts = cluster.edges.iter().chain(&cluster.detects);
    if let Some(host) = hosts.find(|host| host.name() == name) {
        return Ok(host.namespace());
    }
    let index = cluster.servers.index(name).with_context(|| format!("no host {name}"))?;
    Ok(cluster.servers.host(index).1)
}
