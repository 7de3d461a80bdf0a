//! Roles over NATS: any of them in one process, each with its own tasks, joined by one connection.
//!
//! Every role starts without NATS: enforcement puts the last set in force, sources wait before they lose anything, and
//! what is missing is said in the log and in `status`.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use detect::api::forward::{Forward, forwarding, handler};
use detect::api::tcp::Server;
use detect::api::unix::Socket;
use detect::api::{Backing, router};
use detect::resolve::Names;
use detect::worker::{Outlets, REQUESTS_MAX, Request};
use ingest::source::checkpoint::Checkpoint;
use ingest::spool::Spool;
use ingest::uplink::{self, PAYLOAD_BYTES_MAX, UplinkConfig, UplinkInputs};
use prometheus_client::registry::Registry;
use proto::bus::banned::Banned;
use proto::bus::config::NatsConfig;
use proto::bus::duty::Duties;
use proto::bus::feed::EventSource;
use proto::bus::memory::Bus;
use proto::bus::nats::access::AccessPublisher;
use proto::bus::nats::lease::Holder;
use proto::bus::nats::replica::{Copies, ReplicaState};
use proto::bus::nats::{Connection, ask, events, nodes, replica, servers};
use proto::report::{NodeReport, Role};
use proto::shutdown::{Shutdown, Supervisor};
use proto::time::Clock;
use tokio::sync::{mpsc, watch};

use super::reload::Reloader;
use super::{DRAIN_DEADLINE, Process, opened, prepare_state_dir};
use crate::config::Config;
use crate::health::{self, Health, Readiness};

/// How long deliveries are waited for at the end. Shorter than what the process has in all.
const UPLINK_DRAIN: Duration = Duration::from_secs(5);
/// How often it is looked whether all roles have reported.
const READY_INTERVAL: Duration = Duration::from_millis(100);

/// What all roles of the process share.
struct Host {
    node: Arc<str>,
    config: Config,
    clock: Clock,
    connection: Connection,
    nats: NatsConfig,
    state_dir: Option<PathBuf>,
    dry_run: bool,
    shutdown: Shutdown,
    reload: watch::Receiver<u64>,
    registry: Registry,
    tasks: Supervisor,
    /// How each role of this host is, and on a detector's all hosts'.
    reports: proto::bus::memory::Nodes,
}

/// Runs the roles until the shutdown.
///
/// # Errors
/// When something cannot be opened at start, or a role fails.
pub(super) async fn run(process: Process, nats: &NatsConfig) -> anyhow::Result<()> {
    let Process { roles, config, location, dry_run, shutdown, reload, .. } = process;
    let clock = Clock::steered();
    let words: Vec<&str> = roles.iter().map(|role| role.as_str()).collect();
    let name = format!("portcullis {} {}", words.join("+"), config.node);
    let connection = Connection::open(nats, &name, &config.node, clock.clone()).await.context("cannot use NATS")?;
    let mut listener = None;
    if let Some(addr) = config.telemetry.listen {
        listener = Some(health::bind(addr).await?);
    }
    let mut host = Host {
        node: config.node.as_str().into(),
        clock,
        connection: connection.clone(),
        nats: nats.clone(),
        state_dir: prepare_state_dir(&config.state_dir, dry_run)?,
        dry_run,
        shutdown: shutdown.clone(),
        reload: reload.clone(),
        registry: Registry::default(),
        tasks: Supervisor::new(),
        reports: Bus::new().nodes,
        config: config.clone(),
    };
    let (client_ip, client_ip_in) = watch::channel(config.ingest.client_ip.clone());
    let mut requests = None;
    for role in &roles {
        match role {
            Role::Ingest => host.start_ingest(client_ip_in.clone())?,
            Role::Detect => requests = Some(host.start_detect().await?),
            Role::Enforce => host.start_enforce(),
        }
    }
    let Host { mut tasks, registry, reports, .. } = host;
    let readiness = Readiness::new();
    if let Some(listener) = listener {
        let health = Health { registry: Arc::new(registry), readiness: readiness.clone(), shutdown: shutdown.clone() };
        tokio::spawn(health::serve(listener, health));
    }
    let reloader = Reloader { location, config, requests, client_ip };
    tasks.spawn("reloader", reloader.run(reload, shutdown.clone()));
    tokio::spawn(async move {
        while !roles.iter().all(|role| reports.all().iter().any(|report| report.role == *role)) {
            tokio::time::sleep(READY_INTERVAL).await;
        }
        readiness.set();
    });
    tasks.run(&shutdown, DRAIN_DEADLINE).await?;
    connection.flush().await;
    tracing::info!("Stopped");
    Ok(())
}

impl Host {
    fn start_ingest(
        &mut self,
        client_ip: watch::Receiver<Arc<proto::client_ip::ClientIpPolicy>>,
    ) -> anyhow::Result<()> {
        let bus = Bus::new();
        let state_dir = self.state_dir.clone().context("reading logs needs a writable state_dir")?;
        let checkpoint = Checkpoint::open(&state_dir)?;
        let metrics = ingest::metrics::Metrics::register(self.registry.sub_registry_with_prefix("portcullis"));
        let (status, banned) = (uplink::Status::default(), Banned::new());
        let spool =
            self.config.ingest.spool_bytes_max.map(|bytes_max| Spool::open(&state_dir, bytes_max)).transpose()?;
        let inputs = ingest::pipeline::Inputs {
            node: self.node.clone(),
            positions: checkpoint.positions(),
            batches: bus.batches,
            interest: bus.interest.subscribe(),
            banned: banned.clone(),
            client_ip,
            nats: Some(Arc::new(self.nats.clone())),
            clock: self.clock.clone(),
            spool,
            uplink: status.clone(),
            nodes: self.reports.clone(),
            metrics: metrics.clone(),
            reload: self.reload.clone(),
            shutdown: self.shutdown.clone(),
        };
        let copies = Copies { interest: Some(bus.interest), banned: Some(banned), ..Copies::default() };
        // Without the ban set all lines go, which is no trouble of ingest's.
        let state = ReplicaState::default();
        let following = replica::run(self.connection.clone(), copies, None, state, self.shutdown.clone());
        self.tasks.spawn("ban set for ingest", following);
        self.tasks.spawn("ingest", ingest::pipeline::run(self.config.ingest.clone(), inputs));
        let config =
            UplinkConfig { node: self.node.clone(), payload_bytes_max: PAYLOAD_BYTES_MAX, drain: UPLINK_DRAIN };
        let inputs = UplinkInputs {
            batches: bus.batches_in,
            checkpoint,
            clock: self.clock.clone(),
            status,
            metrics,
            shutdown: self.shutdown.clone(),
        };
        let publisher = AccessPublisher::new(&self.connection, &self.node);
        self.tasks.spawn("uplink", uplink::run(config, inputs, publisher));
        self.beat(Role::Ingest, |_| {});
        Ok(())
    }

    async fn start_detect(&mut self) -> anyhow::Result<mpsc::Sender<Request>> {
        let bus = Bus::new();
        let (shutdown, connection) = (self.shutdown.clone(), self.connection.clone());
        let names = watch::Sender::new(Names {
            names: self.config.detect.names.clone(),
            interval: self.config.detect.resolve_interval,
        });
        let (requests, requests_in) = mpsc::channel(REQUESTS_MAX);
        let active = watch::Sender::new(false);
        let api = router(Backing {
            requests: requests.clone(),
            bans: bus.bans.clone(),
            nodes: self.reports.clone(),
            events: bus.events.clone(),
            questions: bus.questions.clone(),
            clock: self.clock.clone(),
            shutdown: shutdown.clone(),
        });
        self.start_api(&api, active.subscribe()).await?;
        let parts = detect::cluster::Parts {
            node: self.node.clone(),
            config: self.config.detect.clone(),
            bus: self.nats.clone(),
            connection: connection.clone(),
            outlets: Outlets {
                bans: bus.bans,
                lists: bus.lists,
                interest: bus.interest,
                events: bus.events.clone(),
                nodes: self.reports.clone(),
                names: names.clone(),
                questions: bus.questions,
            },
            metrics: detect::metrics::Metrics::new(&mut self.registry),
            active,
            api: handler(api),
        };
        self.tasks.spawn("detect", detect::cluster::run(parts, requests_in, shutdown.clone()));
        let resolving = detect::resolve::run(names.subscribe(), requests.clone(), shutdown.clone());
        self.tasks.spawn("resolver", resolving);
        let asking = ask::relay_explain(connection.clone(), self.reports.clone(), bus.questions_in, shutdown.clone());
        self.tasks.spawn("explain", asking);
        self.tasks.spawn("events", events::relay_events(connection.clone(), bus.events, shutdown.clone()));
        self.tasks.spawn("nodes", nodes::watch(connection, self.reports.clone(), shutdown));
        self.beat(Role::Detect, |_| {});
        Ok(requests)
    }

    async fn start_api(&mut self, api: &axum::Router, active: watch::Receiver<bool>) -> anyhow::Result<()> {
        let api = forwarding(api.clone(), Forward { connection: self.connection.clone(), active });
        let shutdown = self.shutdown.clone();
        if let Some(socket) = opened(Socket::bind(&self.config.api.socket), self.dry_run)? {
            self.tasks.spawn("api", detect::api::unix::run(socket, api.clone(), shutdown.clone()));
        }
        if let Some(tcp) = self.config.api.tcp.clone() {
            let metrics = detect::api::metrics::Metrics::new(&mut self.registry);
            if let Some(server) = opened(Server::bind(tcp, self.clock.clone(), metrics).await, self.dry_run)? {
                self.tasks.spawn("api over tcp", server.run(api, self.reload.clone(), shutdown));
            }
        }
        Ok(())
    }

    fn start_enforce(&mut self) {
        let bus = Bus::new();
        let (shutdown, connection) = (self.shutdown.clone(), self.connection.clone());
        let replica = ReplicaState::default();
        let (servers, bus_servers) = watch::channel(Vec::new());
        self.tasks
            .spawn("NATS servers", servers::resolve(connection.clone(), self.nats.clone(), servers, shutdown.clone()));
        // Until enforcement has looked at what it kept, there may be something to lose.
        let (kept, kept_in) = watch::channel(u64::MAX);
        let instance = format!("{:x}", self.clock.now().as_nanos());
        let me = Holder { node: self.node.to_string(), instance };
        let inputs = enforce::Inputs {
            node: self.node.clone(),
            bans: bus.bans.clone(),
            lists: bus.lists.subscribe(),
            questions: bus.questions_in,
            nodes: self.reports.clone(),
            duties: Duties::shared(&connection, me),
            events: EventSource::shared(&connection),
            trusted_proxies: self.config.ingest.client_ip.proxies(),
            bus_servers,
            kept,
            state_dir: self.state_dir.clone(),
            service_dir: self.config.state_dir.clone(),
            dry_run: self.dry_run,
            clock: self.clock.clone(),
            metrics: enforce::EnforceMetrics::register(&mut self.registry),
            shutdown: shutdown.clone(),
        };
        self.tasks.spawn("enforce", enforce::run(self.config.enforce.clone(), inputs));
        let copies = Copies { bans: Some(bus.bans), lists: Some(bus.lists), kept: Some(kept_in), ..Copies::default() };
        let state_dir = self.state_dir.clone();
        let following = replica::run(connection.clone(), copies, state_dir, replica.clone(), shutdown.clone());
        self.tasks.spawn("ban set", following);
        let node = self.node.to_string();
        self.tasks.spawn("explain for enforce", ask::serve_explain(connection, node, bus.questions, shutdown));
        self.beat(Role::Enforce, move |report| {
            let (problem, lag, applied) = replica.get();
            report.problems.extend(problem);
            (report.lag, report.applied) = (lag, Some(applied));
        });
    }

    fn beat(&mut self, role: Role, decorate: impl Fn(&mut NodeReport) + Send + 'static) {
        let name = match role {
            Role::Ingest => "heartbeat of ingest",
            Role::Detect => "heartbeat of detect",
            Role::Enforce => "heartbeat of enforce",
        };
        let (reports, node) = (self.reports.clone(), self.node.to_string());
        let beating = nodes::beat(self.connection.clone(), reports, (role, node), decorate, self.shutdown.clone());
        self.tasks.spawn(name, beating);
    }
}
