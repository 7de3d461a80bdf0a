//! How much a cluster takes: one log dealt out to three hosts, through NATS to bans in every kernel; what that weighs on
//! the bus, with the predicate that rules give to ingest and with a rule that defeats it; and how fast a detector works off
//! what is stored.
//!
//! Everything runs on this machine: generator, three hosts, two detectors and three NATS servers share its cores.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufRead as _, BufReader, BufWriter, Write as _};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use proto::report::{NodeReport, Role};
use proto::time::Clock;
use serde_json::Value;
use tests::cluster::host::Host;
use tests::cluster::nats::Client;
use tests::cluster::{CONVERGENCE, Cluster, Layout};
use tests::portcullis::wait_until;

use crate::cluster::{activations, start};
use crate::corpus::Corpus;
use crate::kernel::Kernel;
use crate::table::{number, render, to_f64};

/// The built-in rules, whose conditions name statuses: ingest sends what has one of those. Bans stay in force until they
/// were counted, however long ago the corpus says that they were deserved.
const WITH_PREDICATE: &str =
    "[detect]\nlateness_max = \"7d\"\nbuiltin_rules = true\n[detect.rules.forceful-browsing]\nban_time = \"6d\"\n";
/// One rule more, without a status and without a match: ingest sends everything.
const WITHOUT_PREDICATE: &str = "[detect]\nlateness_max = \"7d\"\nbuiltin_rules = true\n\
    [detect.rules.forceful-browsing]\nban_time = \"6d\"\n\
    [detect.rules.honeypot]\nmatch = \"Path(`/honeypot`)\"\nmax_retry = 1\nfind_time = \"1m\"\nban_time = \"1h\"\n";
/// Who is not through by then never will be.
const PATIENCE: Duration = Duration::from_secs(600);
/// The log of batches, as NATS calls it.
const LOG: &str = "PORTCULLIS_ACCESS";

/// What one cluster did.
#[derive(Debug)]
struct Taken {
    /// Until the last ban was in the last kernel.
    bans_seconds: f64,
    /// Batches in their log, and their bytes as stored, once for all replicas.
    messages: u64,
    bytes: u64,
    /// Events in them.
    events: u64,
    targets: BTreeSet<String>,
}

/// Measures, prints the tables, and returns the lines of the summary.
pub(crate) fn run(corpus: &Corpus) -> Result<Vec<String>> {
    let mut bench = Bench::start(corpus, WITH_PREDICATE)?;
    let with = bench.take_live()?;
    drop(bench);
    let mut bench = Bench::start(corpus, WITHOUT_PREDICATE)?;
    let without = bench.take_live()?;
    let rebuild_seconds = bench.rebuild()?;
    drop(bench);
    ensure!(with.targets == without.targets, "the predicate changes who is banned");
    let mut bench = Bench::start(corpus, WITHOUT_PREDICATE)?;
    let backlog = bench.take_backlog()?;
    drop(bench);
    ensure!(with.targets == backlog.targets, "a backlog changes who is banned");

    let lines = to_f64(corpus.lines);
    let rate = |taken: &Taken| number(lines / taken.bans_seconds);
    let million = |value: u64| number(to_f64(value) * 1e6 / lines);
    let row = |name: &str, taken: &Taken| {
        [name.to_owned(), rate(taken), million(taken.events), million(taken.messages), million(taken.bytes)]
    };
    let header = [
        "three hosts' logs -> last ban in the last kernel",
        "lines/s",
        "events per 1M lines",
        "messages per 1M lines",
        "bytes per 1M lines",
    ];
    let rows = [row("rules with a status", &with), row("and one without", &without)];
    println!("{}", render(header, &rows));
    let events = to_f64(without.events);
    let catch_up = [
        ["decides what came while no detector ran".to_owned(), number(events / backlog.bans_seconds)],
        ["rebuilds its windows from what is decided".to_owned(), number(events / rebuild_seconds)],
    ];
    println!("{}", render(["a detector, from its start", "events/s"], &catch_up));
    Ok(vec![
        format!(
            "cluster: {} lines/s of three hosts until the last ban is in the last kernel ({} without the predicate)",
            rate(&with),
            rate(&without)
        ),
        format!(
            "cluster: {} bytes on the bus per million lines, {} without the predicate ({} of {} bytes of log); same bans",
            million(with.bytes),
            million(without.bytes),
            number(to_f64(without.bytes) / to_f64(corpus.bytes)),
            million(corpus.bytes)
        ),
        format!(
            "cluster: a detector works off {} stored events/s, and rebuilds from {} events/s",
            catch_up[0][1], catch_up[1][1]
        ),
    ])
}

/// A cluster that takes one corpus.
struct Bench<'a> {
    corpus: &'a Corpus,
    cluster: Cluster,
    kernels: Vec<Kernel>,
}

impl<'a> Bench<'a> {
    fn start(corpus: &'a Corpus, config: &'static str) -> Result<Self> {
        let cluster = start(&Layout { config, ..Layout::default() })?;
        let kernels = cluster.edges.iter().map(|edge| Kernel::open(edge.namespace())).collect::<Result<_>>()?;
        Ok(Self { corpus, cluster, kernels })
    }

    /// Lines come while everything runs.
    fn take_live(&mut self) -> Result<Taken> {
        let clock = Clock::system();
        let begin = clock.now();
        self.deal()?;
        self.wait_banned()?;
        let bans_seconds = clock.now().since(begin).as_secs_f64();
        self.taken(bans_seconds)
    }

    /// Lines come while no detector runs; then one starts.
    fn take_backlog(&mut self) -> Result<Taken> {
        self.stop_detects()?;
        self.deal()?;
        self.wait_delivered()?;
        let clock = Clock::system();
        let begin = clock.now();
        self.cluster.detects[0].start(Role::Detect)?;
        self.wait_banned()?;
        let bans_seconds = clock.now().since(begin).as_secs_f64();
        self.taken(bans_seconds)
    }

    /// Seconds until a detector that starts anew has taken over from those that were there.
    fn rebuild(&mut self) -> Result<f64> {
        self.stop_detects()?;
        let clock = Clock::system();
        let begin = clock.now();
        let detect = &mut self.cluster.detects[0];
        let before = activations(detect);
        detect.start(Role::Detect)?;
        wait_until("a detector is active", PATIENCE, || (activations(detect) > before).then_some(()))?;
        Ok(clock.now().since(begin).as_secs_f64())
    }

    fn stop_detects(&mut self) -> Result<()> {
        self.cluster.detects.iter_mut().try_for_each(|detect| detect.stop(Role::Detect))
    }

    /// Appends the corpus to the logs, line by line in turn.
    fn deal(&self) -> Result<()> {
        let open = |edge: &Host| {
            let log = File::options().append(true).open(edge.access_log()).context("could not open a log")?;
            Ok(BufWriter::with_capacity(64 << 10, log))
        };
        let mut logs = self.cluster.edges.iter().map(open).collect::<Result<Vec<_>>>()?;
        let mut corpus = BufReader::with_capacity(1 << 20, File::open(&self.corpus.path)?);
        let hosts = logs.len();
        let (mut line, mut turn) = (Vec::new(), 0);
        while corpus.read_until(b'\n', &mut line).context("could not read the corpus")? > 0 {
            logs[turn % hosts].write_all(&line).context("could not append to a log")?;
            turn += 1;
            line.clear();
        }
        logs.iter_mut().try_for_each(|log| log.flush()).context("could not append to a log")
    }

    fn wait_banned(&self) -> Result<()> {
        let wanted = u64::try_from(self.corpus.offenders)?;
        let mut counts = Vec::new();
        let all = wait_until("all bans are in all kernels", PATIENCE, || {
            counts = self.kernels.iter().map(|kernel| kernel.banned().unwrap_or(0)).collect();
            counts.iter().all(|count| *count >= wanted).then_some(())
        });
        all.with_context(|| format!("{counts:?} of {wanted}"))
    }

    /// Waits until all lines are read and nothing waits to be published, as the hosts tell once a few seconds.
    fn wait_delivered(&self) -> Result<Vec<NodeReport>> {
        let mut nats = self.cluster.servers.client(&self.cluster.network)?;
        let mut reports = Vec::new();
        wait_until("all lines are delivered", PATIENCE, || {
            reports = self.cluster.edges.iter().filter_map(|edge| report(&mut nats, edge.name())).collect();
            let lines: u64 = reports.iter().flat_map(|report| &report.sources).map(|source| source.lines).sum();
            let waiting: u64 = reports.iter().map(|report| report.lag).sum();
            (lines == self.corpus.lines && waiting == 0).then_some(())
        })?;
        Ok(reports)
    }

    /// What is on the bus when all is delivered, and who is banned.
    fn taken(&self, bans_seconds: f64) -> Result<Taken> {
        let reports = self.wait_delivered()?;
        let events =
            reports.iter().flat_map(|report| &report.sources).map(|source| source.events - source.withheld).sum();
        let mut counts = (0, 0);
        wait_until("the log of batches stands still", CONVERGENCE, || {
            let state = self.cluster.servers.stream(LOG)?;
            let number = |key: &str| state.pointer(&format!("/state/{key}")).and_then(Value::as_u64);
            let former = std::mem::replace(&mut counts, (number("messages")?, number("bytes")?));
            (former == counts && counts.0 > 0).then_some(())
        })?;
        let bans = self.cluster.bans()?;
        let targets: BTreeSet<String> =
            bans.iter().filter_map(|ban| ban["target"].as_str()).map(str::to_owned).collect();
        let right = targets.iter().filter(|target| target.starts_with("198.19.")).count();
        ensure!(
            (targets.len(), right) == (self.corpus.offenders, self.corpus.offenders),
            "{} addresses are banned, {right} of them rightly, instead of {}",
            targets.len(),
            self.corpus.offenders
        );
        Ok(Taken { bans_seconds, messages: counts.0, bytes: counts.1, events, targets })
    }
}

/// What ingest on `node` said last.
fn report(nats: &mut Client, node: &str) -> Option<NodeReport> {
    let subject = format!("$KV.portcullis_nodes.ingest.{node}");
    let message = nats.last("KV_portcullis_nodes", &subject).ok()??;
    serde_json::from_slice(&message.payload).ok()
}
