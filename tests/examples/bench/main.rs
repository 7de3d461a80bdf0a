//! The benchmark: how fast, how soon, how much memory; beside peers, in the same run, on the same machine.
//!
//! ```text
//! cargo run --release -p tests --example bench -- [replay|latency|bulk|sources|forwarded|cluster|firewall|all] [--lines N] [--samples N]
//! ```
//!
//! `replay` reads a log of N lines (default 1,000,000, about 1.1 GB in the directory for temporary files), `latency` takes
//! N samples (default 200) from the last line in the log to the kernel that drops, `bulk` appends that log to a watched
//! file, `sources` brings it in every way there is, beside rsyslog and syslog-ng where they are installed or named by
//! `RSYSLOGD` and `SYSLOG_NG` (it holds all lines twice in memory: take fewer where that is too much). `forwarded` measures
//! what rules about forwarded clients cost requests to services. `cluster` does the like with three hosts, two detectors and NATS
//! between them, and measures what travels there. All but the first need root, and send packets in network namespaces of their
//! own only. fail2ban takes part where it is installed; `cluster` needs nats-server, in the path or named by `NATS_SERVER`.
//! `firewall` lets 100,000 bans stand in each back end, beside a rule a ban.
//! Figures are medians and ratios within one run; nothing here passes or fails by time, but a wrong answer is an error.
//!
//! The work is done by a child of this process, so that whatever ends it (Ctrl-C too), what it started is stopped and
//! what it made is removed.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "its output is what it is for")]

mod bulk;
mod cluster;
mod corpus;
mod fail2ban;
mod firewall;
mod flow;
mod forwarded;
mod host;
mod kernel;
mod latency;
mod process;
mod replay;
mod requests;
mod sources;
mod stream;
mod table;
mod wire;

use std::ffi::OsString;
use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail, ensure};
use corpus::Corpus;
use nix::sys::signal::{SigSet, Signal, killpg};
use nix::unistd::{Pid, Uid};
use proto::time::Clock;

const USAGE: &str =
    "usage: bench [replay|latency|bulk|sources|forwarded|cluster|firewall|all] [--lines N] [--samples N]";
/// Set for the child: the folder for all that it writes.
const FOLDER: &str = "PORTCULLIS_BENCH_FOLDER";
/// Room for samples of 65,536 - 256 addresses.
const SAMPLES_MAX: u64 = 65_000;
/// The corpus has one scanner in 3,320 lines and a /16 for them.
const LINES_MAX: u64 = 200_000_000;

fn main() -> ExitCode {
    let result = match std::env::var_os(FOLDER) {
        Some(folder) => work(Path::new(&folder)).map(|()| ExitCode::SUCCESS),
        None => guard(),
    };
    result.unwrap_or_else(|error| {
        eprintln!("bench: {error:#}");
        ExitCode::FAILURE
    })
}

/// What is asked for.
struct Options {
    replay: bool,
    latency: bool,
    bulk: bool,
    sources: bool,
    forwarded: bool,
    cluster: bool,
    firewall: bool,
    lines: u64,
    samples: u64,
}

impl Options {
    fn parse(args: impl Iterator<Item = String>) -> Result<Self> {
        let mut part = None;
        let (mut lines, mut samples) = (1_000_000, 200);
        let mut args = args;
        while let Some(arg) = args.next() {
            let mut count = |max: u64| {
                let count = args.next().and_then(|text| text.replace('_', "").parse().ok());
                count.filter(|count| (1..=max).contains(count)).with_context(|| format!("{arg} takes 1 to {max}"))
            };
            match arg.as_str() {
                "--lines" => lines = count(LINES_MAX)?,
                "--samples" => samples = count(SAMPLES_MAX)?,
                "replay" | "latency" | "bulk" | "sources" | "forwarded" | "cluster" | "firewall" | "all"
                    if part.is_none() =>
                {
                    part = Some(arg);
                }
                _ => bail!("what is {arg}? {USAGE}"),
            }
        }
        let part = part.unwrap_or_else(|| "all".to_owned());
        let wants = |name| part == name || part == "all";
        let [replay, latency, bulk, sources, forwarded, cluster, firewall] =
            ["replay", "latency", "bulk", "sources", "forwarded", "cluster", "firewall"].map(wants);
        Ok(Self { replay, latency, bulk, sources, forwarded, cluster, firewall, lines, samples })
    }
}

/// Starts the child, and cleans up after it.
fn guard() -> Result<ExitCode> {
    Options::parse(std::env::args().skip(1))?;
    let folder = tempfile::Builder::new().prefix("portcullis-bench-").tempdir().context("could not make a folder")?;
    let signals = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect::<SigSet>();
    signals.thread_block().context("could not block signals")?;
    let mut child = Command::new(std::env::current_exe().context("could not find this program")?)
        .args(std::env::args_os().skip(1).collect::<Vec<OsString>>())
        .env(FOLDER, folder.path())
        // Clusters make folders of their own.
        .env("TMPDIR", folder.path())
        .process_group(0)
        .spawn()
        .context("could not start the child that does the work")?;
    let id = child.id();
    let group = Pid::from_raw(i32::try_from(id)?);
    std::thread::spawn(move || {
        if signals.wait().is_ok() {
            // What cannot be killed is gone.
            let _ = killpg(group, Signal::SIGKILL);
        }
    });
    let status = child.wait().context("could not wait for the child that does the work")?;
    // Services that were left over, if it ended before its time.
    let _ = killpg(group, Signal::SIGKILL);
    remove_namespaces(id)?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Removes the namespaces that were left over: they bear the number of the child.
fn remove_namespaces(child: u32) -> Result<()> {
    let Ok(entries) = fs::read_dir("/run/netns") else { return Ok(()) };
    for entry in entries {
        let name = entry.context("could not list the namespaces")?.file_name();
        if name.to_string_lossy().starts_with(&format!("pc{child}n")) {
            Command::new("ip").args(["netns", "delete"]).arg(name).status().context("could not start ip")?;
        }
    }
    Ok(())
}

/// What the child does.
fn work(folder: &Path) -> Result<()> {
    // The parent's mask is inherited, and would be by the services.
    SigSet::all().thread_unblock().context("could not unblock signals")?;
    let options = Options::parse(std::env::args().skip(1))?;
    ensure!(!cfg!(debug_assertions), "figures of a debug build mean nothing: cargo run --release");
    println!("{}\n", machine());
    tests::portcullis::binary()?;
    let mut summary = Vec::new();
    let root = Uid::effective().is_root();
    let needs_root =
        [options.latency, options.bulk, options.sources, options.forwarded, options.cluster, options.firewall];
    if needs_root.contains(&true) && !root {
        println!("not root: replay alone, as the others need network namespaces\n");
    }
    let has_nats = std::env::var_os("NATS_SERVER").is_some() || process::is_installed("nats-server");
    if options.cluster && root && !has_nats {
        println!("nats-server is not installed: without cluster\n");
    }
    let (bulk, sources) = (options.bulk && root, options.sources && root);
    let cluster = options.cluster && root && has_nats;
    if cluster {
        summary.extend(cluster::run(options.samples)?);
    }
    if options.replay || bulk || sources || cluster {
        let now = Clock::system().now().as_nanos();
        let corpus = Corpus::write(&folder.join("corpus.log"), options.lines, now)?;
        println!(
            "corpus: {} lines of {} bytes on average, {} addresses to ban\n",
            table::number(table::to_f64(corpus.lines)),
            table::number(corpus.line_bytes()),
            corpus.offenders
        );
        if options.replay {
            summary.extend(replay::run(folder, &corpus)?);
        }
        if bulk {
            summary.extend(bulk::run(folder, &corpus)?);
        }
        if sources {
            summary.extend(sources::run(folder, &corpus)?);
        }
        if cluster {
            summary.extend(wire::run()?);
            summary.extend(stream::run(&corpus)?);
        }
    }
    if options.latency && root {
        summary.extend(latency::run(folder, options.samples)?);
    }
    if options.forwarded && root {
        summary.extend(forwarded::run(folder)?);
    }
    if options.firewall && root {
        summary.extend(firewall::run(folder)?);
    }
    println!("summary\n{}", summary.iter().map(|line| format!("  {line}\n")).collect::<String>());
    Ok(())
}

/// What this ran on.
fn machine() -> String {
    let read = |path: &str| fs::read_to_string(PathBuf::from(path)).unwrap_or_default();
    let field = |text: &str, key: &str| {
        let line = text.lines().find(|line| line.starts_with(key));
        line.and_then(|line| line.split_once(':')).map_or("unknown".to_owned(), |(_, value)| value.trim().to_owned())
    };
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    format!(
        "machine: {}, {cores} cores, {} of memory, Linux {}, load {}",
        field(&read("/proc/cpuinfo"), "model name"),
        field(&read("/proc/meminfo"), "MemTotal"),
        read("/proc/sys/kernel/osrelease").trim(),
        read("/proc/loadavg").split(' ').next().unwrap_or("unknown"),
    )
}
