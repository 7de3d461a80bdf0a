//! A whole cluster on one machine: every host in a network namespace of its own, with real NATS servers, real processes
//! and real kernels, and the faults that such things have.
//!
//! Everything vanishes when a [`Cluster`] is dropped. Few stand beside each other: with eleven processes each, they would only
//! measure the machine. Two pass the time in which one waits for a lease to end or a leader to be elected.

pub mod fault;
pub mod host;
pub mod nats;
pub mod network;
pub mod offence;
pub mod servers;
pub mod truth;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use proto::head::Head;
use proto::report::{NodeReport, Role};
use serde_json::Value;
use tempfile::TempDir;

use self::host::Host;
use self::network::Network;
use self::servers::Servers;
use crate::access::Access;
use crate::netns::Server;
use crate::portcullis::{Answer, wait_until};

/// Until a cluster that nothing ails any more has done all it has to do: elections and reconnections included.
pub const CONVERGENCE: Duration = Duration::from_secs(90);
/// Lines of a log that a failed test shows.
const LOG_LINES: usize = 40;

/// How many hosts of each kind, and what their configuration says beyond the usual.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Hosts with Traefik, `ingest` and `enforce`: `edge-1` and on.
    pub nodes: u8,
    /// Hosts with `detect`: `detect-1` and on.
    pub detects: u8,
    /// NATS servers, which is also how many replicas there are: `nats-1` and on.
    pub servers: u8,
    /// More keys of `[bus]`.
    pub bus: &'static str,
    /// More sections.
    pub config: &'static str,
}

impl Default for Layout {
    fn default() -> Self {
        Self { nodes: 3, detects: 2, servers: 3, bus: "", config: "" }
    }
}

/// A cluster.
#[derive(Debug)]
pub struct Cluster {
    /// Hosts with a web server, `ingest` and `enforce`.
    pub edges: Vec<Host>,
    /// Hosts with `detect`.
    pub detects: Vec<Host>,
    /// The NATS servers.
    pub servers: Servers,
    /// What joins them.
    pub network: Network,
    web: Vec<Server>,
    _folder: TempDir,
    _place: MutexGuard<'static, ()>,
}

impl Cluster {
    /// Hosts, links and configurations; nothing runs but the web servers.
    pub fn new(layout: &Layout) -> Result<Self> {
        let place = take_place();
        let folder = tempfile::tempdir()?;
        let network = Network::new()?;
        let servers = Servers::new(&network, folder.path(), layout.servers)?;
        let bus = format!("urls = {:?}\nreplicas = {}\n{}", servers.urls(), layout.servers, layout.bus);
        let hosts = |kind: &str, first: u8, count: u8| {
            let host = |number: u8| {
                let (name, address) = (format!("{kind}-{number}"), Ipv4Addr::new(10, 77, 0, first + number));
                let host = Host::new(&name, address, network.host(&name, address)?, folder.path())?;
                host.configure(&bus, layout.config)?;
                Ok(host)
            };
            (1..=count).map(host).collect::<Result<Vec<Host>>>()
        };
        let (edges, detects) = (hosts("edge", 10, layout.nodes)?, hosts("detect", 20, layout.detects)?);
        let web = edges.iter().map(|edge| Server::start(edge.namespace(), &edge.access_log()));
        let web = web.collect::<Result<_>>()?;
        Ok(Self { edges, detects, servers, network, web, _folder: folder, _place: place })
    }

    /// A cluster in which everything runs and has reported.
    pub fn start(layout: &Layout) -> Result<Self> {
        let mut cluster = Self::new(layout)?;
        cluster.servers.start_all()?;
        cluster.start_roles()?;
        Ok(cluster)
    }

    /// Starts every role that does not run, and waits until all have reported.
    pub fn start_roles(&mut self) -> Result<()> {
        for detect in &mut self.detects {
            detect.start(Role::Detect)?;
        }
        for edge in &mut self.edges {
            edge.start(Role::Enforce)?;
            edge.start(Role::Ingest)?;
        }
        self.wait_reported()
    }

    /// Waits until every role on every host is known to the cluster, and every detect has read the state.
    pub fn wait_reported(&mut self) -> Result<()> {
        let expected = self.roles();
        let mut known = BTreeSet::new();
        let all = wait_until("every role has reported", CONVERGENCE, || {
            if let Err(error) = self.check_alive() {
                return Some(Err(error));
            }
            known = self.status().unwrap_or_default().into_iter().map(|report| (report.role, report.node)).collect();
            let follow = |detect: &Host| detect.verb(&["bans", "--json"]).is_ok_and(|answer| answer.code == 0);
            (known.is_superset(&expected) && self.detects.iter().all(follow)).then_some(Ok(()))
        });
        all.with_context(|| format!("reported: {known:?}\n{}", self.logs()))?
    }

    /// Every role that should run, with its host.
    fn roles(&self) -> BTreeSet<(Role, String)> {
        let roles = |hosts: &[Host], role| hosts.iter().map(|host| (role, host.name().to_owned())).collect::<Vec<_>>();
        let edges = [roles(&self.edges, Role::Ingest), roles(&self.edges, Role::Enforce)].concat();
        edges.into_iter().chain(roles(&self.detects, Role::Detect)).collect()
    }

    fn check_alive(&mut self) -> Result<()> {
        self.edges.iter_mut().chain(&mut self.detects).try_for_each(Host::check_alive)
    }

    /// The host with this name.
    pub fn host_mut(&mut self, name: &str) -> Result<&mut Host> {
        let mut hosts = self.edges.iter_mut().chain(&mut self.detects);
        hosts.find(|host| host.name() == name).with_context(|| format!("no host {name}"))
    }

    /// Runs a verb against the first detect that answers.
    pub fn verb(&self, args: &[&str]) -> Result<Answer> {
        let mut refused = None;
        for detect in &self.detects {
            let answer = detect.verb(args)?;
            if answer.code == 0 {
                return Ok(answer);
            }
            refused = Some(answer);
        }
        refused.context("a cluster without detect")
    }

    /// What every role says of itself. `status` fails while anything is degraded, and tells all the same.
    pub fn status(&self) -> Result<Vec<NodeReport>> {
        let told = |detect: &Host| -> Result<Vec<NodeReport>> {
            let mut status = detect.verb(&["status", "--json"])?.json()?.pop().context("no status")?;
            Ok(serde_json::from_value(status["nodes"].take())?)
        };
        let mut answers = self.detects.iter().map(told);
        answers.find_map(Result::ok).context("no detect tells its status")
    }

    /// The bans in force, as the operator sees them.
    pub fn bans(&self) -> Result<Vec<Value>> {
        self.verb(&["bans", "--json"])?.expect(0)?.json()
    }

    /// Index of the detect that holds the lease; `None` while nobody does.
    pub fn active_detect(&self) -> Option<usize> {
        let mut client = self.servers.client(&self.network).ok()?;
        let lease = client.newest("KV_portcullis_lease", "$KV.portcullis_lease.detect").ok()?;
        // Whatever else a lease says, it names its holder; one that has ended says nothing.
        let text = String::from_utf8_lossy(&lease).into_owned();
        self.detects.iter().position(|detect| text.contains(detect.name()))
    }

    /// The first entry of the newest commit.
    pub fn head(&self) -> Result<Head> {
        let mut client = self.servers.client(&self.network)?;
        let head = client.newest("KV_portcullis_bans", "$KV.portcullis_bans.detect")?;
        serde_json::from_slice(&head).context("no head")
    }

    /// Appends `access` to the log of edge `node`.
    pub fn write(&self, node: usize, accesses: &[Access]) -> Result<()> {
        self.edges[node].write(accesses)
    }

    /// One request of a real client to edge `node`; `None` when no answer comes.
    pub fn get(&self, client: Ipv4Addr, node: usize, path: &str) -> Option<u16> {
        self.network.get(client, self.edges[node].address(), path)
    }

    /// How many requests the web server of edge `node` has answered.
    pub fn requests(&self, node: usize) -> u32 {
        self.web[node].requests()
    }

    /// Waits until `found` holds for the set of targets in the kernel of each edge host.
    pub fn wait_kernels(&self, what: &str, found: impl Fn(&BTreeSet<String>) -> bool) -> Result<()> {
        let mut seen = Vec::new();
        let all = wait_until(what, CONVERGENCE, || {
            seen = self.kernels().ok()?;
            seen.iter().all(&found).then_some(())
        });
        all.with_context(|| format!("the kernels hold {seen:?}"))
    }

    /// The targets banned in the kernel of each edge host.
    pub fn kernels(&self) -> Result<Vec<BTreeSet<String>>> {
        self.edges.iter().map(|edge| Ok(edge.banned()?.into_keys().collect())).collect()
    }

    /// Every public event, oldest first.
    pub fn events(&self) -> Result<Vec<Value>> {
        let mut client = self.servers.client(&self.network)?;
        client.messages("PORTCULLIS_EVENTS", "portcullis.events.v1.>")?.iter().map(nats::Message::json).collect()
    }

    /// Every error that a role has logged, with the role. A panic fails at once.
    pub fn errors(&self) -> Result<Vec<String>> {
        let hosts = self.edges.iter().chain(&self.detects);
        Ok(hosts.map(Host::errors).collect::<Result<Vec<_>>>()?.concat())
    }

    /// Ends every role in order, and fails when one has logged an error in all that time.
    pub fn stop(self) -> Result<()> {
        let errors = self.errors()?;
        ensure!(errors.is_empty(), "{}", errors.join("\n"));
        self.end()
    }

    /// Ends every role in order, and fails when one does not end in order or has panicked. For tests in which errors are
    /// what an operator must be told.
    pub fn end(mut self) -> Result<()> {
        self.errors()?;
        self.no_leaks()?;
        for edge in &mut self.edges {
            edge.stop(Role::Ingest)?;
        }
        for detect in &mut self.detects {
            detect.stop(Role::Detect)?;
        }
        self.edges.iter_mut().try_for_each(|edge| edge.stop(Role::Enforce))
    }

    /// Fails when a banned client was seen to pass. Servers that are down at the end tell nothing.
    fn no_leaks(&self) -> Result<()> {
        let events = self.events().unwrap_or_default();
        let leak = events.iter().find(|event| event["subject"] == "ban-leak");
        ensure!(leak.is_none(), "a ban did not bite: {leak:?}");
        Ok(())
    }

    /// The newest lines of every log.
    pub fn logs(&self) -> String {
        let mut text = self.servers.logs();
        let hosts = self.edges.iter().flat_map(|edge| [(edge, Role::Ingest), (edge, Role::Enforce)]);
        for (host, role) in hosts.chain(self.detects.iter().map(|detect| (detect, Role::Detect))) {
            let log = host.log_text(role);
            let _ = writeln!(text, "--- {} on {}\n{}", role.as_str(), host.name(), newest_lines(&log));
        }
        text
    }
}

impl Drop for Cluster {
    #[expect(clippy::print_stderr, reason = "what a failed test leaves for its reader")]
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.logs());
        }
    }
}

/// Where a cluster may stand. Waits until there is room.
fn take_place() -> MutexGuard<'static, ()> {
    static PLACES: [Mutex<()>; 2] = [Mutex::new(()), Mutex::new(())];
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    PLACES[NEXT.fetch_add(1, Ordering::Relaxed) % PLACES.len()].lock().unwrap_or_else(PoisonError::into_inner)
}

/// The end of a log.
fn newest_lines(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
}
