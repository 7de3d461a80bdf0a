//! A backlog: a whole log is appended to a watched file. How fast `portcullis run` eats it, and what memory that takes.

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use proto::time::Clock;

use crate::corpus::Corpus;
use crate::host::Host;
use crate::process::peak;
use crate::table::{Numbers, number, render, to_f64};

/// Counted runs, each with a service and a file of its own.
const RUNS: usize = 3;
/// Bans stay in force until they were counted, however long ago the corpus says that they were deserved.
const CONFIG: &str =
    "[detect]\nlateness_max = \"7d\"\nbuiltin_rules = true\n[detect.rules.forceful-browsing]\nban_time = \"6d\"\n";
/// Between two looks at the metrics.
const LOOK: Duration = Duration::from_millis(10);
/// Who is not through by then never will be.
const PATIENCE: Duration = Duration::from_secs(600);

/// One run.
#[derive(Clone, Copy, Debug)]
struct Eaten {
    append_seconds: f64,
    read_seconds: f64,
    bans_seconds: f64,
    idle_kib: u64,
    peak_kib: u64,
}

/// Measures, prints the table, and returns the lines of the summary.
pub(crate) fn run(folder: &Path, corpus: &Corpus) -> Result<Vec<String>> {
    let runs: Vec<Eaten> =
        (0..RUNS).map(|run| eat(&folder.join(format!("bulk{run}")), corpus)).collect::<Result<_>>()?;
    let spread = |value: fn(&Eaten) -> f64| Numbers::new(runs.iter().map(value));
    let lines = to_f64(corpus.lines);
    let speed = Numbers::new(runs.iter().map(|run| lines / run.read_seconds));
    let to_bans = Numbers::new(runs.iter().map(|run| lines / run.bans_seconds));
    let peak = spread(|run| to_f64(run.peak_kib) / 1_024.0);
    let row = |name: &str, numbers: &Numbers| [name.to_owned(), numbers.spread(number)];
    let rows = [
        row("lines/s until all are read", &speed),
        row("lines/s until all bans are in the kernel", &to_bans),
        row("seconds of the append itself", &spread(|run| run.append_seconds)),
        row("peak MiB at the start", &spread(|run| to_f64(run.idle_kib) / 1_024.0)),
        row("peak MiB at the end", &peak),
    ];
    let header = format!("{} lines appended to a watched file", number(lines));
    println!("{}", render([&header, "min / median / max"], &rows));
    Ok(vec![format!(
        "bulk: {} lines/s read, {} lines/s until the last ban is in the kernel, peak {} MiB (at start {})",
        number(speed.median()),
        number(to_bans.median()),
        number(peak.max()),
        number(spread(|run| to_f64(run.idle_kib) / 1_024.0).max()),
    )])
}

fn eat(folder: &Path, corpus: &Corpus) -> Result<Eaten> {
    let host = Host::new(folder)?;
    let service = host.start_portcullis(CONFIG)?;
    let pid = host.pid("portcullis")?;
    let idle_kib = peak(pid).context("portcullis is gone")?;
    let clock = Clock::system();
    let begin = clock.now();
    let elapsed = || clock.now().since(begin).as_secs_f64();
    let mut source = File::open(&corpus.path).context("could not open the corpus")?;
    let mut log = File::options().append(true).open(host.log()).context("could not open the log")?;
    let copied = io::copy(&mut source, &mut log).context("could not append to the log")?;
    ensure!(copied == corpus.bytes, "the corpus has changed");
    let append_seconds = elapsed();
    let wait_until = |what: &str, wanted: u64, look: &dyn Fn() -> Option<f64>| -> Result<f64> {
        loop {
            let found = look();
            if found.is_some_and(|found| found >= to_f64(wanted)) {
                return Ok(elapsed());
            }
            ensure!(clock.now().since(begin) < PATIENCE, "{found:?} {what} instead of {wanted} after {PATIENCE:?}");
            std::thread::sleep(LOOK);
        }
    };
    let read_seconds = wait_until("lines read", corpus.lines, &|| host.metric("ingest_lines_total"))?;
    let offenders = u64::try_from(corpus.offenders)?;
    let bans_seconds = wait_until("bans in the kernel", offenders, &|| host.banned())?;
    // Detection counts once a second: too coarse for a figure, good enough to see that nothing was lost.
    wait_until("events handled", corpus.lines, &|| host.metric("portcullis_detect_events_total"))?;
    let banned = host.banned();
    ensure!(banned == Some(to_f64(offenders)), "{banned:?} addresses are banned instead of {offenders}");
    let peak_kib = peak(pid).context("portcullis is gone")?;
    service.stop()?;
    std::fs::remove_file(host.log()).context("could not remove the log")?;
    Ok(Eaten { append_seconds, read_seconds, bans_seconds, idle_kib, peak_kib })
}
