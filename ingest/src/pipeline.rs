//! The role: runs every source, reports on them, and ends in order.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use proto::bus::banned::Banned;
use proto::bus::config::NatsConfig;
use proto::bus::memory::Nodes;
use proto::client_ip::ClientIpPolicy;
use proto::event::{AccessBatch, Interest, Position, Positions};
use proto::report::{NodeReport, Problem, Role, SourceReport};
use proto::shutdown::Shutdown;
use proto::time::{Clock, Timestamp, render_duration};
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::{Id, JoinError, JoinSet};

use crate::config::{FileConfig, IngestConfig, Lines, SourceConfig, SourceKind};
use crate::error::IngestError;
use crate::metrics::Metrics;
use crate::parse::WaitingRoom;
use crate::source::batch::{Batcher, Stopped};
use crate::source::file::{FileSource, Rules};
use crate::source::intake::Intake;
use crate::source::skew::Skew;
use crate::source::{http, nats, stdin, syslog};
use crate::spool::{self, Spool};
use crate::uplink;

/// How often the role says how it is.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);

/// A clock that is this far ahead or behind is a problem: windows are short, and other ways are not that long.
const SKEW_PROBLEM_MS: u64 = 5000;

/// Log files that all sources together have open at a time; more are refused and reported. Half of the descriptors that a
/// process has by default, so that the rest of it never lacks one.
pub(crate) const OPEN_FILES_MAX: usize = 512;

/// What the role is connected to.
#[derive(Debug)]
pub struct Inputs {
    /// Name of this node.
    pub node: Arc<str>,
    /// Where known files begin.
    pub positions: Positions,
    /// To detect.
    pub batches: mpsc::Sender<AccessBatch>,
    /// What the rules look at.
    pub interest: watch::Receiver<Arc<Interest>>,
    /// Clients whose every line is sent.
    pub banned: Banned,
    /// How clients are told from proxies; begins with the configuration's and changes on a reload.
    pub client_ip: watch::Receiver<Arc<ClientIpPolicy>>,
    /// Where the subjects of `nats` sources are; `None` = nowhere, and there must be no such source.
    pub nats: Option<Arc<NatsConfig>>,
    /// The time.
    pub clock: Clock,
    /// Where lines of senders that cannot wait go while the bus is away; `None` = nowhere.
    pub spool: Option<Spool>,
    /// What the uplink has to say, where there is one.
    pub uplink: uplink::Status,
    /// Takes the role's reports.
    pub nodes: Nodes,
    /// Registered figures.
    pub metrics: Metrics,
    /// Changes with every SIGHUP.
    pub reload: watch::Receiver<u64>,
    /// When to end.
    pub shutdown: Shutdown,
}

/// What a source shares with the reporter.
pub(crate) struct Shared {
    pub(crate) node: Arc<str>,
    pub(crate) source: Arc<str>,
    pub(crate) clock: Clock,
    /// Changes when files of secrets are to be read again.
    pub(crate) reload: watch::Receiver<u64>,
    pub(crate) shutdown: Shutdown,
    /// One permit for each file that may still be opened, over all sources.
    pub(crate) open_files: Arc<Semaphore>,
    pub(crate) banned: Banned,
    /// Where lines wait to be believed.
    pub(crate) waiting: WaitingRoom,
    silent_after: Duration,
    status: Mutex<SourceStatus>,
}

#[derive(Debug, Default)]
pub(crate) struct SourceStatus {
    pub(crate) report: SourceReport,
    pub(crate) skew: Skew,
    pub(crate) problems: Vec<Problem>,
}

impl Shared {
    pub(crate) fn status(&self) -> MutexGuard<'_, SourceStatus> {
        // Counters stay usable whatever happened to another thread.
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces the problems of the source and logs those that are new.
    pub(crate) fn set_problems(&self, problems: Vec<Problem>) {
        let mut status = self.status();
        for problem in problems.iter().filter(|problem| !status.problems.contains(problem)) {
            tracing::warn!(source = %self.source, problem = problem.text, "A source of log lines has a problem");
        }
        status.problems = problems;
    }
}

/// Runs all sources until the shutdown begins; what was read whole by then is handed over before this returns.
///
/// Returns early with an error when nobody takes batches any more or a source panics.
pub async fn run(config: IngestConfig, mut inputs: Inputs) -> Result<(), IngestError> {
    if config.sources.is_empty() {
        return Err(IngestError::NoSources);
    }
    let reporter = Reporter::new(&inputs);
    let mut tasks = JoinSet::new();
    let streams = start_spool(&mut tasks, &mut inputs, reporter.spool.clone());
    let mut running: Vec<(Id, Arc<Shared>)> = Vec::new();
    let open_files = Arc::new(Semaphore::new(OPEN_FILES_MAX));
    let only = config.sources.len() == 1;
    for source in config.sources {
        let shared = Shared::new(&source, &inputs, open_files.clone());
        let stream = || intake(&inputs, &streams, shared.clone(), source.lines);
        let id = match source.kind {
            SourceKind::File(file) => start_file(&mut tasks, (file, source.lines), shared.clone(), &inputs),
            SourceKind::Syslog(syslog) => tasks.spawn(syslog::run(syslog, stream())).id(),
            SourceKind::Stdin => tasks.spawn(stdin::run(stream(), only)).id(),
            SourceKind::Nats(nats) => {
                let bus = inputs.nats.clone().ok_or_else(|| IngestError::NoNats { source_name: source.name })?;
                tasks.spawn(nats::run(stream(), nats, bus)).id()
            }
            SourceKind::Http(requests) | SourceKind::Otlp(requests) => tasks.spawn(http::run(requests, stream())).id(),
        };
        running.push((id, shared));
    }
    let shutdown = inputs.shutdown.clone();
    // Only the sources hold the sender now: the channel closes when the last of them ends.
    drop((inputs, streams));
    let mut ticks = tokio::time::interval(REPORT_INTERVAL);
    let mut ended = Ok(());
    loop {
        let joined = tokio::select! {
            joined = tasks.join_next_with_id() => joined,
            _ = ticks.tick() => {
                reporter.report(&running);
                continue;
            }
        };
        let Some(joined) = joined else { break };
        let id = joined.as_ref().map_or_else(JoinError::id, |(id, _)| *id);
        let source_name = running.iter().find(|(known, _)| *known == id);
        let source_name = source_name.map(|(_, shared)| shared.source.to_string()).unwrap_or_default();
        let result = match joined {
            Ok((_, Ok(()) | Err(Stopped::Forced))) => Ok(()),
            // At the end the uplink may give up first; what it did not take is read again.
            Ok((_, Err(Stopped::ReceiverGone))) if shutdown.is_draining() => Ok(()),
            Ok((_, Err(Stopped::ReceiverGone))) => Err(IngestError::ReceiverGone { source_name }),
            Err(cause) => Err(IngestError::Panicked { source_name, cause }),
        };
        if result.is_err() {
            shutdown.begin();
        }
        ended = ended.and(result);
    }
    reporter.report(&running);
    ended
}

/// Where sources without offsets send: through the spool, where there is one.
fn start_spool(
    tasks: &mut JoinSet<Result<(), Stopped>>,
    inputs: &mut Inputs,
    status: uplink::Status,
) -> mpsc::Sender<AccessBatch> {
    let Some(spool) = inputs.spool.take() else { return inputs.batches.clone() };
    let (sender, receiver) = mpsc::channel(spool::WAITING_MAX);
    let (ends, said) = ((receiver, inputs.batches.clone()), (status, inputs.metrics.clone()));
    let until = (inputs.clock.clone(), inputs.shutdown.clone());
    tasks.spawn(async move {
        spool::run(spool, ends, said, until).await;
        Ok(())
    });
    sender
}

fn start_file(
    tasks: &mut JoinSet<Result<(), Stopped>>,
    (config, lines): (FileConfig, Lines),
    shared: Arc<Shared>,
    inputs: &Inputs,
) -> Id {
    let positions = positions_of(&inputs.positions, &shared.source);
    let rules = Rules { interest: inputs.interest.clone(), client_ip: inputs.client_ip.clone() };
    let metrics = inputs.metrics.of_source(&shared.source);
    let batches = inputs.batches.clone();
    let handle = Handle::current();
    let task = tasks.spawn_blocking(move || {
        let format = (lines.format, lines.line_bytes_max);
        let batcher = Batcher::new(shared, batches, handle.clone(), metrics, format);
        FileSource::new((config, lines.line_bytes_max), positions, rules, batcher).run(&handle)
    });
    task.id()
}

fn intake(inputs: &Inputs, streams: &mpsc::Sender<AccessBatch>, shared: Arc<Shared>, lines: Lines) -> Intake {
    Intake {
        metrics: inputs.metrics.of_source(&shared.source),
        shared,
        batches: streams.clone(),
        interest: inputs.interest.clone(),
        client_ip: inputs.client_ip.clone(),
        format: lines.format,
        line_bytes_max: lines.line_bytes_max,
    }
}

fn positions_of(positions: &Positions, source: &str) -> BTreeMap<u64, Position> {
    let range = positions.range((source.to_owned(), 0)..=(source.to_owned(), u64::MAX));
    range.map(|((_, generation), position)| (*generation, *position)).collect()
}

/// Writes the role's report.
struct Reporter {
    node: Arc<str>,
    nodes: Nodes,
    clock: Clock,
    uplink: uplink::Status,
    spool: uplink::Status,
    started_at: Timestamp,
}

impl Reporter {
    fn new(inputs: &Inputs) -> Self {
        let started_at = inputs.clock.now();
        let (node, nodes, clock) = (inputs.node.clone(), inputs.nodes.clone(), inputs.clock.clone());
        Self { node, nodes, clock, uplink: inputs.uplink.clone(), spool: uplink::Status::default(), started_at }
    }

    fn report(&self, running: &[(Id, Arc<Shared>)]) {
        let now = self.clock.now();
        let mut report = NodeReport::new(&self.node, Role::Ingest, self.started_at);
        report.at = now;
        report.problems.extend(self.uplink.problems());
        report.problems.extend(self.spool.problems());
        for (_, shared) in running {
            let status = shared.status();
            let source = SourceReport { skew_ms: status.skew.ahead_ms(now), ..status.report.clone() };
            report.problems.extend(skewed(&source));
            report.sources.push(source);
            report.problems.extend(status.problems.iter().cloned());
            report.problems.extend(shared.silence(&status.report, now));
            report.problems.extend(suspects(&status.report));
        }
        self.nodes.put(report);
    }
}

impl Shared {
    fn new(source: &SourceConfig, inputs: &Inputs, open_files: Arc<Semaphore>) -> Arc<Self> {
        let kind = match &source.kind {
            SourceKind::File(_) => "file",
            SourceKind::Stdin => "stdin",
            SourceKind::Syslog(_) => "syslog",
            SourceKind::Nats(_) => "nats",
            SourceKind::Http(_) => "http",
            SourceKind::Otlp(_) => "otlp",
        };
        let report = SourceReport { name: source.name.clone(), kind: kind.to_owned(), ..SourceReport::default() };
        Arc::new(Self {
            node: inputs.node.clone(),
            source: source.name.as_str().into(),
            clock: inputs.clock.clone(),
            reload: inputs.reload.clone(),
            shutdown: inputs.shutdown.clone(),
            open_files,
            banned: inputs.banned.clone(),
            waiting: WaitingRoom::default(),
            silent_after: source.lines.silent_after,
            status: Mutex::new(SourceStatus { report, skew: Skew::default(), problems: Vec::new() }),
        })
    }

    /// A source that had lines and has none any more: its writer may have lost the file.
    fn silence(&self, report: &SourceReport, now: Timestamp) -> Option<Problem> {
        let silent = now.since(report.last_line_at?);
        (silent >= self.silent_after).then(|| {
            let (name, silent) = (&self.source, render_duration(silent));
            Problem::warning(format!("source {name} has been silent for {silent}; does Traefik still write its log?"))
        })
    }
}

/// Events ahead of the clock are cut to their arrival, and those far behind come too late for the windows.
fn skewed(report: &SourceReport) -> Option<Problem> {
    let skew_ms = report.skew_ms.filter(|skew| skew.unsigned_abs() >= SKEW_PROBLEM_MS)?;
    let (name, seconds) = (&report.name, skew_ms.unsigned_abs() / 1000);
    Some(Problem::warning(if skew_ms > 0 {
        format!(
            "lines of source {name} are from {seconds}s ahead: set the clock of the host that writes them, or of this one"
        )
    } else {
        format!(
            "lines of source {name} come {seconds}s after their requests end: the clock of the host that writes them is behind, or their way is long"
        )
    }))
}

fn suspects(report: &SourceReport) -> Option<Problem> {
    (report.suspect > 0).then(|| {
        Problem::warning(format!(
            "{} lines of source {} may be forged and do not count: their request counts do not fit, as after a restart of \
             Traefik, where several write into one log, or where a client forges lines; let Traefik write JSON \
             (accessLog.format: json), where nobody can",
            report.suspect, report.name
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_those_of_the_source() {
        let position = Position { offset: 7, needed: true };
        let all: Positions = [("a", 3), ("b", 0), ("b", u64::MAX), ("c", 1)]
            .map(|(source, generation)| ((source.to_owned(), generation), position))
            .into();
        assert_eq!(positions_of(&all, "b").into_keys().collect::<Vec<_>>(), [0, u64::MAX]);
        assert!(positions_of(&all, "bb").is_empty());
    }
}
