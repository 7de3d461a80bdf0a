//! Finished logs: `portcullis replay` beside `wc -l`, which does nothing but read, and beside `fail2ban-regex`.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use proto::time::Clock;
use serde_json::Value;
use tests::portcullis::binary;

use crate::corpus::Corpus;
use crate::fail2ban;
use crate::process::{Run, measure};
use crate::table::{Numbers, number, render, to_f64};

/// Counted runs, after one that fills the caches.
const RUNS: usize = 5;
/// fail2ban reads some thousand lines a second: so many keep it busy for some seconds.
const SLICE_LINES: u64 = 20_000;

/// A contestant and what it did.
struct Contestant<'a> {
    name: &'static str,
    corpus: &'a Corpus,
    runs: Vec<Run>,
}

impl<'a> Contestant<'a> {
    fn new(name: &'static str, corpus: &'a Corpus) -> Self {
        Self { name, corpus, runs: Vec::new() }
    }

    fn lines_per_second(&self) -> impl Iterator<Item = f64> {
        self.runs.iter().map(|run| to_f64(self.corpus.lines) / run.seconds)
    }

    fn row(&self) -> [String; 6] {
        let bytes = to_f64(self.corpus.bytes);
        let peak = Numbers::new(self.runs.iter().map(|run| to_f64(run.peak_kib) / 1_024.0));
        [
            self.name.to_owned(),
            number(to_f64(self.corpus.lines)),
            Numbers::new(self.lines_per_second()).spread(number),
            number(Numbers::new(self.runs.iter().map(|run| bytes / 1e6 / run.seconds)).median()),
            number(Numbers::new(self.runs.iter().map(|run| run.cpu_seconds)).median()),
            number(peak.max()),
        ]
    }

    /// How many times as fast as `peer`, run by run.
    fn ratio(&self, peer: &Self) -> Numbers {
        Numbers::new(self.lines_per_second().zip(peer.lines_per_second()).map(|(own, peer)| own / peer))
    }
}

/// Runs them in turn, prints the table, and returns the lines of the summary.
pub(crate) fn run(folder: &Path, corpus: &Corpus) -> Result<Vec<String>> {
    let output = folder.join("output");
    let slice;
    let filter = fail2ban::write_filter(folder)?;
    let mut own = Contestant::new("portcullis replay", corpus);
    let mut wc = Contestant::new("wc -l", corpus);
    let mut peer = None;
    if fail2ban::available() {
        let end = Clock::system().now().as_nanos();
        slice = Corpus::write(&folder.join("slice.log"), SLICE_LINES.min(corpus.lines), end)?;
        peer = Some(Contestant::new("fail2ban-regex", &slice));
    } else {
        println!("fail2ban is not installed: no comparison with fail2ban-regex");
    }
    for round in 0..=RUNS {
        let counted = round > 0;
        let run = measure(Command::new(binary()?).args(["replay", "--json"]).arg(&corpus.path), &output)?;
        check_bans(&output, corpus)?;
        own.runs.extend(counted.then_some(run));
        let run = measure(Command::new("wc").arg("-l").arg(&corpus.path), &output)?;
        wc.runs.extend(counted.then_some(run));
        if let Some(peer) = &mut peer {
            let run = measure(&mut fail2ban::regex(&peer.corpus.path, &filter), &output)?;
            check_matches(&output)?;
            peer.runs.extend(counted.then_some(run));
        }
    }
    let header = ["replay", "lines", "lines/s (min / median / max)", "MB/s", "CPU s", "peak MiB"];
    let rows: Vec<_> = [Some(&own), Some(&wc), peer.as_ref()].into_iter().flatten().map(Contestant::row).collect();
    println!("{}", render(header, &rows));
    let mut summary = vec![format!(
        "replay: {} lines/s, {} MB/s, {} of {} lines/s by wc -l (median of {RUNS} pairs), peak {} MiB",
        number(Numbers::new(own.lines_per_second()).median()),
        own.row()[3],
        number(own.ratio(&wc).median()),
        number(Numbers::new(wc.lines_per_second()).median()),
        own.row()[5],
    )];
    println!("portcullis to wc -l, pair by pair:          {}", own.ratio(&wc).spread(number));
    if let Some(peer) = &peer {
        println!("portcullis to fail2ban-regex, pair by pair: {}", own.ratio(peer).spread(number));
        summary.push(format!(
            "replay: {} times as fast as fail2ban-regex ({} lines/s)",
            number(own.ratio(peer).median()),
            number(Numbers::new(peer.lines_per_second()).median()),
        ));
    }
    println!();
    Ok(summary)
}

/// Fast and wrong is no result.
fn check_bans(output: &Path, corpus: &Corpus) -> Result<()> {
    let text = fs::read_to_string(output).context("could not read what portcullis printed")?;
    let target = |line: &str| {
        let ban: Value = serde_json::from_str(line).ok()?;
        Some(ban.get("target")?.as_str()?.to_owned())
    };
    let targets: BTreeSet<_> = text.lines().filter_map(target).collect();
    let right = targets.iter().filter(|target| target.starts_with("198.19.")).count();
    ensure!(
        (targets.len(), right) == (corpus.offenders, corpus.offenders),
        "portcullis bans {} addresses, {right} of them rightly, instead of {}",
        targets.len(),
        corpus.offenders
    );
    Ok(())
}

fn check_matches(output: &Path) -> Result<()> {
    let text = fs::read_to_string(output).context("could not read what fail2ban-regex printed")?;
    ensure!(fail2ban::matched(&text).is_some_and(|lines| lines > 0), "fail2ban-regex matches nothing:\n{text}");
    Ok(())
}
