//! From the line in one host's log to the kernels of all hosts: three hosts, two detectors and NATS between them, all on
//! this machine, so that they share its cores.
//!
//! A ban is in force on a host when its kernel counts it, looked at every fraction of a millisecond. That the kernel then
//! drops is seen first, with a real client. In between, the moments come from NATS itself, which stamps what it stores.

use std::fs::File;
use std::io::Write as _;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use proto::report::Role;
use proto::time::{Clock, Timestamp};
use tests::cluster::host::Host;
use tests::cluster::nats::Message;
use tests::cluster::network::client;
use tests::cluster::{CONVERGENCE, Cluster, Layout};
use tests::portcullis::{wait_for, wait_until};
use tests::random::Random;

use crate::corpus::{MAX_RETRY, address};
use crate::kernel::Kernel;
use crate::latency::bad_lines;
use crate::table::{Numbers, number, render};

/// Clients who complete their counts at once.
const BURST: u64 = 500;
/// Bursts.
const BURSTS: u64 = 5;
/// Between the lines before the last of a burst and the last: time to read and count them.
const BURST_SETTLE: Duration = Duration::from_secs(2);
/// Between two looks at the kernels; the timer adds some 50 us.
const LOOK: Duration = Duration::from_micros(100);
/// Who is not banned by then never will be.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the time of a single ban consists of, and that of a burst.
const SINGLE_PARTS: [&str; 3] = ["line -> log", "log -> ban stored", "ban stored -> last kernel"];
const BURST_PARTS: [&str; 3] =
    ["lines -> first ban stored", "first -> last ban stored", "last ban stored -> last kernel"];
/// The servers have 1 GB each, which the log's default would take alone.
const BUS: &str = "access_max_bytes = \"512MiB\"";

/// A cluster and a line to each edge host's log and kernel.
struct Bench {
    cluster: Cluster,
    logs: Vec<File>,
    kernels: Vec<Kernel>,
    /// In every kernel.
    banned: u64,
}

/// When something happened on its way, in nanoseconds since the epoch.
#[derive(Clone, Copy, Debug)]
struct Sample {
    written: i64,
    /// In the first kernel, and in the last.
    first: i64,
    last: i64,
    /// Longest time between two looks.
    gap: i64,
}

/// What one layout brought, in milliseconds.
struct Measured {
    name: String,
    samples: Numbers,
    firsts: Numbers,
    bursts: Numbers,
    /// How exact the samples are, and the bursts.
    gap: f64,
    burst_gap: f64,
    /// See [`Bench::parts`].
    parts: [[Numbers; 3]; 2],
}

/// A cluster in which everything runs: detectors first, because hosts complain of streams that nobody has made yet.
pub(crate) fn start(layout: &Layout) -> Result<Cluster> {
    let mut cluster = Cluster::new(layout)?;
    cluster.servers.start_all()?;
    cluster.detects.iter_mut().try_for_each(|detect| detect.start(Role::Detect))?;
    let active = || cluster.detects.iter().any(|detect| activations(detect) > 0).then_some(());
    wait_until("a detector is active", CONVERGENCE, active).with_context(|| cluster.logs())?;
    cluster.start_roles()?;
    Ok(cluster)
}

/// How often the detector on `host` has become the active one, in all its lives.
pub(crate) fn activations(host: &Host) -> usize {
    host.log_text(Role::Detect).matches("This detector is the active one").count()
}

/// Measures both layouts, prints the table, and returns the lines of the summary.
pub(crate) fn run(samples: u64) -> Result<Vec<String>> {
    let all = [measure(3, samples)?, measure(1, samples)?];
    let row = |name: String, numbers: &Numbers, gap: f64| {
        let at = |percent| number(numbers.percentile(percent));
        [name, numbers.count().to_string(), at(50), at(90), at(99), at(100), number(gap)]
    };
    let mut rows = Vec::new();
    for one in &all {
        rows.push(row(format!("{}, last host", one.name), &one.samples, one.gap));
        rows.push(row(format!("{}, first host", one.name), &one.firsts, one.gap));
        let mut part = |what: &str, numbers: &Numbers| rows.push(row(format!("  {what}"), numbers, one.gap));
        let [single, burst] = &one.parts;
        SINGLE_PARTS.iter().zip(single).for_each(|(what, numbers)| part(what, numbers));
        let name = format!("{}, last of {BURST} on the last host", one.name);
        rows.push(row(name, &one.bursts, one.burst_gap));
        let mut part = |what: &str, numbers: &Numbers| rows.push(row(format!("  {what}"), numbers, one.burst_gap));
        BURST_PARTS.iter().zip(burst).for_each(|(what, numbers)| part(what, numbers));
    }
    println!("{}", render(["last line -> kernels (ms)", "samples", "p50", "p90", "p99", "max", "+-"], &rows));
    let line = |one: &Measured| {
        let at = |percent| number(one.samples.percentile(percent));
        let burst = number(one.bursts.median());
        format!(
            "cluster, {}: line to last kernel p50 {} ms, p99 {} ms; last of {BURST} in {burst} ms (median)",
            one.name,
            at(50),
            at(99)
        )
    };
    Ok(all.iter().map(line).collect())
}

fn measure(servers: u8, samples: u64) -> Result<Measured> {
    let mut bench = Bench::start(servers)?;
    let mut random = Random::new(5);
    let mut single = Vec::new();
    for sample in 0..samples {
        // At any moment of whatever the roles do periodically.
        let settle = Duration::from_micros(50_000 + random.below(50_000));
        single.push(bench.ban(&[address(198, 18, 256 + sample)], sample, settle)?);
    }
    let mut bursts = Vec::new();
    for burst in 0..BURSTS {
        let addresses: Vec<_> = (0..BURST).map(|i| address(198, 19, 256 + burst * BURST + i)).collect();
        bursts.push(bench.ban(&addresses, burst, BURST_SETTLE)?);
    }
    let parts = bench.parts(&single, &bursts)?;
    drop(bench);
    let took = |samples: &[Sample], end: fn(&Sample) -> i64| {
        Numbers::new(samples.iter().map(|sample| millis(end(sample) - sample.written)))
    };
    let gap = |samples: &[Sample]| Numbers::new(samples.iter().map(|sample| millis(sample.gap))).median();
    let noun = if servers == 1 { "server and replica" } else { "servers and replicas" };
    Ok(Measured {
        name: format!("{servers} {noun}"),
        samples: took(&single, |sample| sample.last),
        firsts: took(&single, |sample| sample.first),
        bursts: took(&bursts, |sample| sample.last),
        gap: gap(&single),
        burst_gap: gap(&bursts),
        parts,
    })
}

impl Bench {
    fn start(servers: u8) -> Result<Self> {
        let cluster = start(&Layout { servers, bus: BUS, ..Layout::default() })?;
        let open = |edge: &Host| File::options().append(true).open(edge.access_log()).context("could not open a log");
        let logs = cluster.edges.iter().map(open).collect::<Result<_>>()?;
        let kernels = cluster.edges.iter().map(|edge| Kernel::open(edge.namespace())).collect::<Result<_>>()?;
        let mut bench = Self { cluster, logs, kernels, banned: 0 };
        bench.see_a_ban()?;
        Ok(bench)
    }

    /// What a kernel counts it drops, on every host.
    fn see_a_ban(&mut self) -> Result<()> {
        let attacker = client(1);
        let nodes = 0..self.cluster.edges.len();
        for node in nodes.clone() {
            ensure!(self.cluster.get(attacker, node, "/ok") == Some(200), "edge {node} does not answer a client");
        }
        for i in 0..MAX_RETRY {
            self.cluster.get(attacker, 0, &format!("/wp-login.php?{i}"));
        }
        let banned = |kernels: &[Kernel]| kernels.iter().all(|kernel| kernel.banned().is_ok_and(|count| count == 1));
        wait_for("a client is banned in every kernel", || banned(&self.kernels).then_some(()))?;
        for node in nodes {
            ensure!(self.cluster.get(attacker, node, "/ok").is_none(), "edge {node} answers a client that is banned");
        }
        self.banned = 1;
        Ok(())
    }

    /// Bad requests of fresh addresses, spread over all hosts, the last of each in one go, beginning with host `turn`: how
    /// long it takes until every kernel bans all.
    fn ban(&mut self, addresses: &[IpAddr], turn: u64, settle: Duration) -> Result<Sample> {
        let hosts = self.logs.len();
        for i in 1..MAX_RETRY {
            self.write(i, &bad_lines(addresses))?;
        }
        std::thread::sleep(settle);
        ensure!(self.kernels.iter().all(|kernel| kernel.banned().ok() == Some(self.banned)), "banned too early");
        let turn = usize::try_from(turn)?;
        let own = |host: usize| addresses.iter().skip((host + hosts - turn % hosts) % hosts).step_by(hosts).copied();
        let last: Vec<String> = (0..hosts).map(|host| bad_lines(&own(host).collect::<Vec<_>>())).collect();
        self.banned += u64::try_from(addresses.len())?;
        let clock = Clock::system();
        let written = clock.now().as_nanos();
        for (log, lines) in self.logs.iter_mut().zip(&last).filter(|(_, lines)| !lines.is_empty()) {
            log.write_all(lines.as_bytes()).context("could not write to a log")?;
        }
        self.watch(written, &clock)
    }

    fn write(&mut self, turn: u64, lines: &str) -> Result<()> {
        let host = usize::try_from(turn)? % self.logs.len();
        self.logs[host].write_all(lines.as_bytes()).context("could not write to a log")
    }

    /// Looks until every kernel bans as many as it must.
    fn watch(&self, written: i64, clock: &Clock) -> Result<Sample> {
        let end = Timestamp::from_nanos(written).saturating_add(PATIENCE);
        let mut done: Vec<Option<i64>> = vec![None; self.kernels.len()];
        let (mut looked, mut gap) = (written, 0);
        loop {
            for (done, kernel) in done.iter_mut().zip(&self.kernels).filter(|(done, _)| done.is_none()) {
                *done = (kernel.banned()? >= self.banned).then(|| clock.now().as_nanos());
            }
            let now = clock.now();
            gap = gap.max(now.as_nanos() - looked);
            looked = now.as_nanos();
            if done.iter().all(Option::is_some) {
                let moments = || done.iter().flatten().copied();
                let (first, last) = (moments().min().unwrap_or(written), moments().max().unwrap_or(written));
                return Ok(Sample { written, first, last, gap });
            }
            ensure!(now < end, "not in every kernel after {PATIENCE:?}: {done:?}");
            std::thread::sleep(LOOK);
        }
    }

    /// Where the time of single bans went, by what NATS has stamped: to the batch in the log, to the ban in the state, to
    /// the last kernel. And that of bursts: to the first and to the last ban in the state, to the last kernel.
    fn parts(&self, singles: &[Sample], bursts: &[Sample]) -> Result<[[Numbers; 3]; 2]> {
        let mut nats = self.cluster.servers.client(&self.cluster.network)?;
        let mut stamps = |stream: &str, filter: &str| -> Result<Vec<i64>> {
            let messages = nats.messages(stream, filter)?;
            let stamp = |message: &Message| Some(Timestamp::parse(message.header("Nats-Time-Stamp")?)?.as_nanos());
            Ok(messages.iter().filter_map(stamp).collect())
        };
        let batches = stamps("PORTCULLIS_ACCESS", "portcullis.access.v1.>")?;
        let bans = stamps("KV_portcullis_bans", "$KV.portcullis_bans.ban.>")?;
        let within = |stamps: &[i64], sample: &Sample| {
            let range = sample.written..sample.last;
            let mut found = stamps.iter().copied().filter(|stamp| range.contains(stamp)).collect::<Vec<_>>();
            found.sort_unstable();
            found.first().copied().zip(found.last().copied())
        };
        let single = |sample: &Sample| {
            let ((logged, _), (banned, _)) = (within(&batches, sample)?, within(&bans, sample)?);
            Some([sample.written, logged, banned, sample.last])
        };
        let burst = |sample: &Sample| {
            let (first, last) = within(&bans, sample)?;
            Some([sample.written, first, last, sample.last])
        };
        Ok([parts(singles.iter().filter_map(single)), parts(bursts.iter().filter_map(burst))])
    }
}

/// Times between moments, in milliseconds.
fn parts(moments: impl Iterator<Item = [i64; 4]>) -> [Numbers; 3] {
    let mut parts: [Vec<f64>; 3] = Default::default();
    for moments in moments {
        parts.iter_mut().zip(moments.windows(2)).for_each(|(part, pair)| part.push(millis(pair[1] - pair[0])));
    }
    parts.map(Numbers::new)
}

fn millis(nanos: i64) -> f64 {
    nanos as f64 / 1e6
}
