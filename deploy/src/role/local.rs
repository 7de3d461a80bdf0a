//! All roles of one host in one process, joined by the in-process bus.
//!
//! Starts back to front, so that every stage has its successor before it has something to hand on, and ends front to
//! back: sources stop reading, detection handles and stores what was read, enforcement applies it, and bans stay.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use detect::api::Backing;
use detect::api::tcp::Server;
use detect::api::unix::Socket;
use detect::resolve::Names;
use detect::worker::{Outlets, Parts, REQUESTS_MAX, Worker};
use ingest::spool::Spool;
use prometheus_client::registry::Registry;
use proto::bus::banned::Banned;
use proto::bus::duty::Duties;
use proto::bus::feed::EventSource;
use proto::bus::memory::{Bus, Nodes};
use proto::report::Role;
use proto::shutdown::{Shutdown, Supervisor, TaskError};
use proto::time::render_duration;
use tokio::sync::{mpsc, watch};

use super::reload::Reloader;
use super::{DRAIN_DEADLINE, Process, opened, prepare_state_dir};
use crate::config::Config;
use crate::health::{self, Health, Readiness};

/// How long the summary waits for a first resolved client.
const SUMMARY_DEADLINE: Duration = Duration::from_secs(5);

/// Runs all roles until the shutdown.
///
/// # Errors
/// When something cannot be opened at start, or a role fails.
pub(super) async fn run(process: Process) -> anyhow::Result<()> {
    let Process { config, location, dry_run, clock, shutdown, reload, .. } = process;
    let state_dir = prepare_state_dir(&config.state_dir, dry_run)?;
    let node: Arc<str> = config.node.as_str().into();
    let mut registry = Registry::default();
    let bus = Bus::new();
    let names = watch::Sender::new(Names::default());
    let (requests, requests_in) = mpsc::channel(REQUESTS_MAX);
    let (client_ip, client_ip_in) = watch::channel(config.ingest.client_ip.clone());
    let detect_metrics = detect::metrics::Metrics::new(&mut registry);
    let ingest_metrics = ingest::metrics::Metrics::register(registry.sub_registry_with_prefix("portcullis"));
    let enforce_metrics = enforce::EnforceMetrics::register(&mut registry);
    let mut health = None;
    if let Some(addr) = config.telemetry.listen {
        health = Some(health::bind(addr).await?);
    }
    let socket = opened(Socket::bind(&config.api.socket), dry_run)?;
    let mut server = None;
    if let Some(tcp) = config.api.tcp.clone() {
        let metrics = detect::api::metrics::Metrics::new(&mut registry);
        server = opened(Server::bind(tcp, clock.clone(), metrics).await, dry_run)?;
    }

    // Enforcement ends only when detection has nothing more to say.
    let decided = Shutdown::new();
    let mut tasks = Supervisor::new();
    let enforce_inputs = enforce::Inputs {
        node: node.clone(),
        bans: bus.bans.clone(),
        lists: bus.lists.subscribe(),
        questions: bus.questions_in,
        nodes: bus.nodes.clone(),
        duties: Duties::alone(),
        events: EventSource::local(&bus.events, config.enforce.notifiers()),
        trusted_proxies: config.ingest.client_ip.proxies(),
        kept: watch::Sender::new(0),
        bus_servers: watch::channel(Vec::new()).1,
        state_dir: state_dir.clone(),
        service_dir: config.state_dir.clone(),
        dry_run,
        clock: clock.clone(),
        metrics: enforce_metrics,
        shutdown: decided.clone(),
    };
    tasks.spawn("enforce", enforce::run(config.enforce.clone(), enforce_inputs));

    let outlets = Outlets {
        bans: bus.bans.clone(),
        lists: bus.lists.clone(),
        interest: bus.interest.clone(),
        events: bus.events.clone(),
        nodes: bus.nodes.clone(),
        names: names.clone(),
        questions: bus.questions.clone(),
    };
    let parts = Parts {
        node: node.clone(),
        config: config.detect.clone(),
        state_dir: state_dir.clone(),
        outlets,
        clock: clock.clone(),
        metrics: detect_metrics,
    };
    let mut worker = tokio::task::block_in_place(|| Worker::start(parts)).context("cannot start detection")?;
    let positions = worker.read_positions();
    let batches_in = bus.batches_in;
    let detected = decided.clone();
    tasks.spawn("detect", async move {
        let ended = worker.run(batches_in, requests_in).await;
        detected.begin();
        ended
    });
    let forced = (shutdown.clone(), decided.clone());
    tokio::spawn(async move {
        forced.0.forced().await;
        forced.1.force();
    });
    tasks.spawn("resolver", detect::resolve::run(names.subscribe(), requests.clone(), shutdown.clone()));
    let api = detect::api::router(Backing {
        requests: requests.clone(),
        bans: bus.bans.clone(),
        nodes: bus.nodes.clone(),
        events: bus.events.clone(),
        questions: bus.questions.clone(),
        clock: clock.clone(),
        shutdown: shutdown.clone(),
    });
    if let Some(socket) = socket {
        tasks.spawn("api", detect::api::unix::run(socket, api.clone(), shutdown.clone()));
    }
    if let Some(server) = server {
        tasks.spawn("api over tcp", server.run(api, reload.clone(), shutdown.clone()));
    }
    let spool = config.ingest.spool_bytes_max.zip(state_dir.as_deref());
    let spool = spool.map(|(bytes_max, dir)| Spool::open(dir, bytes_max)).transpose()?;
    let ingest_inputs = ingest::pipeline::Inputs {
        node: node.clone(),
        positions,
        batches: bus.batches,
        interest: bus.interest.subscribe(),
        // Nothing is withheld on one host.
        banned: Banned::new(),
        client_ip: client_ip_in,
        nats: None,
        clock: clock.clone(),
        spool,
        uplink: ingest::uplink::Status::default(),
        nodes: bus.nodes.clone(),
        metrics: ingest_metrics,
        reload: reload.clone(),
        shutdown: shutdown.clone(),
    };
    tasks.spawn("ingest", ingest::pipeline::run(config.ingest.clone(), ingest_inputs));

    let readiness = Readiness::new();
    if let Some(listener) = health {
        let health = Health { registry: Arc::new(registry), readiness: readiness.clone(), shutdown: shutdown.clone() };
        tokio::spawn(health::serve(listener, health));
    }
    let reloader = Reloader { location, config: config.clone(), requests: Some(requests), client_ip };
    tasks.spawn("reloader", reloader.run(reload, shutdown.clone()));
    tasks.spawn("summary", summarize(config, bus.nodes, dry_run, readiness, shutdown.clone()));
    tasks.run(&shutdown, DRAIN_DEADLINE).await?;
    tracing::info!("Stopped");
    Ok(())
}

/// Says once what runs, when every role has reported and, if lines are there, one client is resolved.
async fn summarize(
    config: Config,
    nodes: Nodes,
    dry_run: bool,
    readiness: Readiness,
    shutdown: Shutdown,
) -> Result<(), TaskError> {
    let mut waited = Duration::ZERO;
    let step = Duration::from_millis(50);
    loop {
        let reports = nodes.all();
        let roles = |role| reports.iter().find(|report| report.role == role);
        let all = [Role::Ingest, Role::Detect, Role::Enforce].into_iter().all(|role| roles(role).is_some());
        if all {
            readiness.set();
        }
        let resolved = reports.iter().flat_map(|report| &report.sources).any(|source| source.sample_client.is_some());
        if all && (resolved || waited >= SUMMARY_DEADLINE) {
            break;
        }
        tokio::select! {
            () = tokio::time::sleep(step) => waited += step,
            () = shutdown.draining() => return Ok(()),
        }
    }
    for report in nodes.all() {
        for source in &report.sources {
            let format = if source.format.is_empty() { "unknown yet" } else { &source.format };
            let client = source.sample_client.as_deref().unwrap_or("none yet");
            tracing::info!(source = source.name, files = source.files, format, client, "Reading");
        }
        for backend in &report.backends {
            let detail = backend.detail.join("; ");
            tracing::info!(backend = backend.name, detail, dry_run, "Enforcing with");
        }
        for problem in &report.problems {
            tracing::warn!(role = report.role.as_str(), problem = problem.text, "Not as it should be");
        }
    }
    for rule in &config.detect.engine.rules {
        let ban_time = render_duration(rule.ban_time);
        tracing::info!(
            rule = &*rule.name,
            mode = rule.mode.as_str(),
            needed = rule.threshold.needed(),
            ban_time,
            "Rule in force"
        );
    }
    let guarded = config.detect.engine.never_ban.len();
    tracing::info!(never_ban = guarded, names = config.detect.names.join(", "), "Running");
    Ok(())
}
