//! From the line in the log to the kernel that drops: `portcullis run` beside `fail2ban-server`, packets as the proof.

use std::fs::File;
use std::io::Write;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use proto::time::Clock;
use tests::access::Access;
use tests::portcullis::wait_for;
use tests::random::Random;

use crate::corpus::{MAX_RETRY, address};
use crate::fail2ban;
use crate::flow::{Flow, Receiver};
use crate::host::Host;
use crate::table::{Numbers, number, render};

/// fail2ban takes up to a second each.
const PEER_SAMPLES: u64 = 10;
/// Addresses that complete their counts in one write.
const BURST: u64 = 500;
/// Bursts.
const BURSTS: u64 = 5;
/// Before the last line of a burst, for the lines before it: fail2ban reads 7,000 lines in some seconds.
const BURST_SETTLE_MS: u64 = 8_000;
/// Nothing arrives for so long: all are cut off.
const SILENCE: Duration = Duration::from_millis(100);
/// Who is not banned by then never will be.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long it took until clients were cut off, in milliseconds.
struct Measured {
    name: String,
    samples: Numbers,
    bursts: Numbers,
    /// How exact the samples are, and the bursts, in milliseconds.
    gap: f64,
    burst_gap: f64,
}

/// Measures both, prints the table, and returns the lines of the summary.
pub(crate) fn run(folder: &Path, samples: u64) -> Result<Vec<String>> {
    let host = Host::new(&folder.join("portcullis"))?;
    let service = host.start_portcullis("")?;
    let own = measure("portcullis run", &host, samples, BURSTS)?;
    // Of its own histograms: which parts take how much of it.
    let mean = |name: &str| {
        let of = |part: &str| host.metric(&format!("{name}_{part}")).unwrap_or(f64::NAN);
        number(of("sum") / of("count") * 1e3)
    };
    let inside = format!(
        "portcullis run, means of its own figures: {} ms to store a decision, {} ms to apply a batch\n",
        mean("portcullis_detect_commit_seconds"),
        mean("portcullis_enforce_apply_seconds"),
    );
    service.stop()?;
    let mut all = vec![own];
    if fail2ban::available() {
        // A peer that does not work here costs the comparison, not what was measured.
        match measure_peer(folder, PEER_SAMPLES.min(samples)) {
            Ok(peer) => all.push(peer),
            Err(error) => println!("no comparison with fail2ban-server: {error:#}"),
        }
    } else {
        println!("fail2ban is not installed: no comparison with fail2ban-server");
    }
    let header = ["last line -> dropped (ms)", "samples", "p50", "p90", "p99", "max", "+-"];
    let row = |name: &str, samples: &Numbers, gap: f64| {
        let at = |percent| number(samples.percentile(percent));
        [name.to_owned(), samples.count().to_string(), at(50), at(90), at(99), at(100), number(gap)]
    };
    let single = all.iter().map(|one| row(&one.name, &one.samples, one.gap));
    let bursts = all.iter().map(|one| row(&format!("{}, last of {BURST}", one.name), &one.bursts, one.burst_gap));
    println!("{}", render(header, &single.chain(bursts).collect::<Vec<_>>()));
    println!("{inside}");
    Ok(summary(&all))
}

fn measure_peer(folder: &Path, samples: u64) -> Result<Measured> {
    let host = Host::new(&folder.join("fail2ban"))?;
    let server = fail2ban::Server::start(&host.server, &host.folder, &host.log())?;
    let measured = measure(&format!("fail2ban-server ({})", server.backend()), &host, samples, 1)?;
    server.no_errors()?;
    Ok(measured)
}

fn summary(all: &[Measured]) -> Vec<String> {
    let mut lines = Vec::new();
    for one in all {
        let at = |percent| number(one.samples.percentile(percent));
        lines.push(format!(
            "{}: line to DROP p50 {} ms, p99 {} ms; last of {BURST} in {} ms (median)",
            one.name,
            at(50),
            at(99),
            number(one.bursts.median())
        ));
    }
    if let [own, peer] = all {
        let ratio = |samples: fn(&Measured) -> &Numbers| number(samples(peer).median() / samples(own).median());
        let (single, burst) = (ratio(|one| &one.samples), ratio(|one| &one.bursts));
        lines.push(format!("fail2ban takes {single} times as long (medians), for the burst {burst} times"));
    }
    lines
}

fn measure(name: &str, host: &Host, samples: u64, bursts: u64) -> Result<Measured> {
    let receiver = Receiver::start(host)?;
    let mut log = File::options().append(true).open(host.log()).context("could not open the log")?;
    let mut random = Random::new(5);
    let (mut single, mut burst) = (Vec::new(), Vec::new());
    for sample in 0..samples {
        // At any moment of whatever the service does periodically.
        let settle = Duration::from_micros(20_000 + random.below(50_000));
        single.push(cut_off(host, &receiver, &mut log, &[address(198, 18, 256 + sample)], settle)?);
    }
    for number in 0..bursts {
        let addresses: Vec<_> = (0..BURST).map(|i| address(198, 19, 256 + number * BURST + i)).collect();
        burst.push(cut_off(host, &receiver, &mut log, &addresses, Duration::from_millis(BURST_SETTLE_MS))?);
    }
    let ms = |values: &[(f64, f64)]| Numbers::new(values.iter().map(|(latency, _)| *latency));
    let gap = |values: &[(f64, f64)]| Numbers::new(values.iter().map(|(_, gap)| *gap)).median();
    Ok(Measured {
        name: name.to_owned(),
        samples: ms(&single),
        bursts: ms(&burst),
        gap: gap(&single),
        burst_gap: gap(&burst),
    })
}

/// Bad requests of fresh addresses, the last of all in one write: how long it takes until all of them are cut off, and
/// how exact that is, in milliseconds.
fn cut_off(
    host: &Host,
    receiver: &Receiver,
    log: &mut File,
    addresses: &[IpAddr],
    settle: Duration,
) -> Result<(f64, f64)> {
    host.add_clients(addresses)?;
    let flow = Flow::start(host, receiver, addresses)?;
    wait_for("packets arrive from every address", || flow.all_arrive().then_some(()))?;
    let before: String = (1..MAX_RETRY).map(|_| bad_lines(addresses)).collect();
    log.write_all(before.as_bytes()).context("could not write to the log")?;
    std::thread::sleep(settle);
    let last = bad_lines(addresses);
    ensure!(flow.all_arrive(), "an address was cut off too early");
    let begin = Clock::system().now().as_nanos();
    log.write_all(last.as_bytes()).context("could not write to the log")?;
    wait_for_silence(&flow)?;
    let cut = flow.finish()?;
    let latest = cut.at.iter().max().copied().unwrap_or(begin);
    let earliest = cut.at.iter().min().copied().unwrap_or(begin);
    ensure!(earliest > begin, "an address was cut off before its last line was written");
    Ok((millis(latest - begin), millis(cut.gap)))
}

/// One bad request of each address, now.
pub(crate) fn bad_lines(addresses: &[IpAddr]) -> String {
    let now = Clock::system().now().as_nanos();
    let render = |address: &IpAddr| {
        let mut access = Access::new(now, *address, 404, "/wp-login.php");
        // It began when it ended: its line is written at once.
        access.start -= access.duration;
        access.render_json() + "\n"
    };
    addresses.iter().map(render).collect()
}

fn wait_for_silence(flow: &Flow<'_>) -> Result<()> {
    let clock = Clock::system();
    let begin = clock.now();
    let (mut arrived, mut since) = (flow.arrived(), begin);
    while clock.now().since(since) < SILENCE {
        std::thread::sleep(Duration::from_millis(2));
        let now = flow.arrived();
        if now != arrived {
            (arrived, since) = (now, clock.now());
        }
        ensure!(clock.now().since(begin) < PATIENCE, "packets still arrive after {PATIENCE:?}: nobody is banned");
    }
    Ok(())
}

fn millis(nanos: i64) -> f64 {
    nanos as f64 / 1e6
}
