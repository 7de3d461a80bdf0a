//! Every way in: lines/s from the first byte sent to the last line counted, by one sender and by sixteen, over loopback in a
//! namespace. Parsing and detection take part, on the same cores as the senders. Syslog daemons of Debian, which write the same
//! messages to a file and do nothing else, are measured beside, in turn; for http, otlp and nats no peer is at hand.

mod daemon;
mod receiver;
mod way;

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use daemon::Daemon;
use proto::time::{Clock, Timestamp};
use receiver::{Kind, Receiver};
use tests::tls::{Client, certify};
use way::{Target, Way};

use crate::corpus::Corpus;
use crate::process::{is_installed, peak};
use crate::table::{Numbers, number, render, to_f64};

/// Counted runs, each with a receiver of its own.
const RUNS: usize = 3;
/// How many send at once.
const SENDERS: [usize; 2] = [1, 16];
/// Between two looks at what was taken.
const LOOK: Duration = Duration::from_millis(10);
/// No line for so long is the end, where lines may be lost.
const QUIET: Duration = Duration::from_secs(1);
/// Who is not through by then never will be.
const PATIENCE: Duration = Duration::from_secs(300);

/// What is sent, and what it takes.
struct Load<'a> {
    folder: &'a Path,
    tls: Client,
    lines: Vec<String>,
    peers: Vec<Kind>,
}

/// One run.
#[derive(Clone, Copy, Debug)]
struct Taken {
    speed: f64,
    lost_percent: f64,
    peak_kib: u64,
}

/// All runs of one receiver.
struct Measured {
    kind: Kind,
    speed: Numbers,
    lost_percent: Numbers,
    peak_mib: Numbers,
}

/// Measures, prints the table, and returns the lines of the summary.
pub(crate) fn run(folder: &Path, corpus: &Corpus) -> Result<Vec<String>> {
    let reader = BufReader::new(File::open(&corpus.path).context("could not open the corpus")?);
    let folder = &folder.join("sources");
    fs::create_dir(folder).context("could not make a folder for the sources")?;
    certify(folder, &[("server", "127.0.0.1")])?;
    let load = Load {
        folder,
        tls: Client::new(folder)?,
        lines: reader.lines().collect::<std::io::Result<_>>()?,
        peers: peers(),
    };
    let has_nats = std::env::var_os("NATS_SERVER").is_some() || is_installed("nats-server");
    if !has_nats {
        println!("nats-server is not installed: without the source nats\n");
    }
    let mut rows = Vec::new();
    let mut summary = Vec::new();
    for way in Way::ALL.into_iter().filter(|way| has_nats || *way != Way::Nats) {
        let mut told = Vec::new();
        for senders in SENDERS {
            eprintln!("{}, {senders} at once", way.name());
            let all = load.measure_all(way, senders)?;
            let own = all[0].speed.median();
            for one in &all {
                let ratio = own / one.speed.median();
                let peer = if one.kind == Kind::Portcullis { String::new() } else { format!("{ratio:.2}") };
                rows.push([
                    format!("{}: {}", way.name(), one.kind.name()),
                    senders.to_string(),
                    one.speed.spread(number),
                    peer,
                    number(one.lost_percent.median()),
                    number(one.peak_mib.max()),
                ]);
                let ratio = if one.kind == Kind::Portcullis { String::new() } else { format!(" ({ratio:.2} times)") };
                told.push(format!("{} {}{ratio}", one.kind.name(), number(one.speed.median())));
            }
            told.push(format!("by {}", if senders == 1 { "one sender;" } else { "sixteen" }));
        }
        summary.push(format!("{}, lines/s: {}", way.name(), told.join(", ").replace(", by", " by").replace(";,", ";")));
    }
    let header = ["lines in", "senders", "lines/s (min / median / max)", "portcullis is times", "% lost", "peak MiB"];
    println!("{}", render(header, &rows));
    Ok(summary)
}

/// The peers that are here; says which are not.
fn peers() -> Vec<Kind> {
    let (here, absent): (Vec<Daemon>, Vec<Daemon>) = Daemon::ALL.into_iter().partition(|daemon| daemon.is_available());
    for daemon in absent {
        println!("{} is not installed: without it (RSYSLOGD and SYSLOG_NG may name them)\n", daemon.name());
    }
    here.into_iter().map(Kind::Daemon).collect()
}

impl Load<'_> {
    /// Portcullis, and then each peer that can take it; their runs take turns.
    fn measure_all(&self, way: Way, senders: usize) -> Result<Vec<Measured>> {
        let lines = &self.lines[..way.take(self.lines.len())];
        let shares: Vec<Vec<Vec<u8>>> =
            lines.chunks(lines.len().div_ceil(senders)).map(|part| way.render(part)).collect();
        let peers = self.peers.iter().copied().filter(|_| way.is_syslog());
        let kinds: Vec<Kind> = std::iter::once(Kind::Portcullis).chain(peers).collect();
        let mut all: Vec<Vec<Taken>> = vec![Vec::new(); kinds.len()];
        for _ in 0..RUNS {
            for (kind, runs) in kinds.iter().zip(&mut all) {
                let taken = self.measure(*kind, way, &shares);
                runs.push(taken.with_context(|| format!("{}, {}, {senders} senders", way.name(), kind.name()))?);
            }
        }
        let numbers = |runs: &[Taken], value: fn(&Taken) -> f64| Numbers::new(runs.iter().map(value));
        let measured = |(kind, runs): (Kind, Vec<Taken>)| Measured {
            kind,
            speed: numbers(&runs, |run| run.speed),
            lost_percent: numbers(&runs, |run| run.lost_percent),
            peak_mib: numbers(&runs, |run| to_f64(run.peak_kib) / 1_024.0),
        };
        Ok(kinds.into_iter().zip(all).map(measured).collect())
    }

    /// One run; `shares` are the pieces of each sender.
    fn measure(&self, kind: Kind, way: Way, shares: &[Vec<Vec<u8>>]) -> Result<Taken> {
        let folder = self.folder.join("run");
        let mut receiver = Receiver::start(kind, way, &folder, self.folder)?;
        let pid = receiver.host.pid(receiver.comm())?;
        let host = receiver.host.clone();
        let begin = Clock::system().now();
        let (at, peak_kib) = std::thread::scope(|scope| {
            let senders = shares.len();
            let target = |sender| Target { folder: &folder, tls: &self.tls, sender, senders };
            let sending: Vec<_> = shares
                .iter()
                .enumerate()
                .map(|(sender, pieces)| {
                    let (target, host) = (target(sender), &host);
                    scope.spawn(move || host.server.within(|| way.send(pieces, &target)))
                })
                .collect();
            let has_sent = || sending.iter().all(std::thread::ScopedJoinHandle::is_finished);
            let watched = self.watch(&mut receiver, (way, pid), has_sent);
            for sender in sending {
                sender.join().expect("a sender does not panic")?;
            }
            watched
        })?;
        let counted = receiver.counted()?;
        receiver.stop()?;
        let lines = to_f64(u64::try_from(way.take(self.lines.len()))?);
        ensure!(way.may_lose() || counted == lines, "{counted} lines of {lines} arrived");
        let seconds = at.since(begin).as_secs_f64();
        Ok(Taken { speed: counted / seconds, lost_percent: 100.0 * (1.0 - counted / lines), peak_kib })
    }

    /// When the last line was taken, and the peak of the receiver's memory.
    fn watch(
        &self,
        receiver: &mut Receiver,
        (way, pid): (Way, u32),
        has_sent: impl Fn() -> bool,
    ) -> Result<(Timestamp, u64)> {
        let clock = Clock::system();
        let begin = clock.now();
        let lines = &self.lines[..way.take(self.lines.len())];
        let wanted = to_f64(u64::try_from(lines.len())?);
        let bytes: usize = lines.iter().map(|line| line.len() + 1).sum();
        let line_bytes = to_f64(u64::try_from(bytes)?) / wanted;
        let (mut taken, mut at, mut peak_kib) = (0.0, begin, 0);
        loop {
            peak_kib = peak(pid).unwrap_or(0).max(peak_kib);
            let has_sent = has_sent();
            if has_sent {
                receiver.all_sent();
            }
            let found = receiver.taken(line_bytes)?;
            let now = clock.now();
            if found > taken {
                (taken, at) = (found, now);
            }
            if taken >= wanted || (way.may_lose() && has_sent && now.since(at) > QUIET) {
                return Ok((at, peak_kib));
            }
            ensure!(now.since(begin) < PATIENCE, "{taken} lines of {wanted} after {PATIENCE:?}");
            std::thread::sleep(LOOK);
        }
    }
}
