//! `enforce --teardown`, which leaves nothing of ours behind, also where an enforce runs: that one lets go first.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use enforce::StandOff;
use enforce::teardown::{CloudflareRemoval, TeardownReport, teardown};
use proto::bus::config::BusConfig;

use super::Exit;
use crate::args::EnforceArgs;
use crate::config::Location;
use crate::output::Output;
use crate::telemetry;

pub(super) async fn run(args: EnforceArgs, out: &mut Output<'_>) -> anyhow::Result<Exit> {
    let config = Location::new(args.config.config, Vec::new()).load()?;
    telemetry::install(&config.telemetry)?;
    let held = if args.dry_run { None } else { Some(StandOff::begin(&config.state_dir).await?) };
    let paused = held.as_ref().map(|held| held.files.clone()).unwrap_or_default();
    if !args.dry_run && paused.is_empty() && config.bus == BusConfig::Local {
        refuse_while_running(&config.api.socket)?;
    }
    let (report, done) = teardown(&config.enforce, Some(&config.state_dir), args.dry_run).await;
    for line in tell(&report, done.is_ok(), args.dry_run, &paused) {
        out.line(&line)?;
    }
    done.context("not all of it could be removed")?;
    Ok(Exit::Done)
}

/// What was removed, also when some of it was not, and that this host stays paused.
fn tell(report: &TeardownReport, whole: bool, dry_run: bool, paused: &[PathBuf]) -> Vec<String> {
    let mut lines = Vec::new();
    if whole || *report != TeardownReport::default() {
        lines = describe(report, if dry_run { "would remove" } else { "removed" });
    }
    let stays = |file: &PathBuf| format!("enforce is paused on this host; to enforce again: rm {}", file.display());
    lines.extend(paused.iter().map(stays));
    lines
}

/// One that has not let go uses another `state_dir`, or is of an older version: it would put everything back.
fn refuse_while_running(socket: &Path) -> anyhow::Result<()> {
    match UnixStream::connect(socket) {
        Ok(_) => {
            bail!("portcullis runs (it answers at {}) and would put everything back: stop it first", socket.display())
        }
        Err(_) => Ok(()),
    }
}

fn describe(report: &TeardownReport, verb: &str) -> Vec<String> {
    let mut lines = Vec::new();
    if report.rules > 0 {
        lines.push(format!("{verb} {} rules and chains", report.rules));
    }
    if !report.sets.is_empty() {
        lines.push(format!("{verb} the sets {}", report.sets.join(", ")));
    }
    if report.table {
        lines.push(format!("{verb} the nftables table inet portcullis"));
    }
    if report.last_set {
        lines.push(format!("{verb} the bans kept for the next start"));
    }
    for CloudflareRemoval { place, entries, is_gone } in &report.cloudflare {
        if *entries > 0 {
            lines.push(format!("{verb} {entries} entries at Cloudflare: {place}"));
        }
        if *is_gone {
            lines.push(format!("not at Cloudflare any more: {place}"));
        }
    }
    if lines.is_empty() {
        lines.push("nothing of ours was here".to_owned());
    }
    lines
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn nothing_is_removed_under_a_running_portcullis() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("api.sock");
        refuse_while_running(&socket).unwrap();
        let listener = UnixListener::bind(&socket).unwrap();
        assert!(refuse_while_running(&socket).unwrap_err().to_string().ends_with("stop it first"));
        drop(listener);
        refuse_while_running(&socket).unwrap();
    }

    #[test]
    fn a_removal_that_fails_tells_what_went_and_that_the_host_stays_paused() {
        let paused = [PathBuf::from("/var/lib/portcullis/paused")];
        let lines = tell(&TeardownReport::default(), false, false, &paused);
        assert_eq!(lines, ["enforce is paused on this host; to enforce again: rm /var/lib/portcullis/paused"]);
        let report = TeardownReport { rules: 4, ..TeardownReport::default() };
        assert_eq!(tell(&report, false, false, &paused)[0], "removed 4 rules and chains");
        assert_eq!(tell(&TeardownReport::default(), true, true, &[]), ["nothing of ours was here"]);
    }

    #[test]
    fn what_was_removed_is_told() {
        assert_eq!(describe(&TeardownReport::default(), "removed"), ["nothing of ours was here"]);
        let report = TeardownReport {
            rules: 4,
            sets: vec!["a".to_owned(), "b".to_owned()],
            table: true,
            last_set: true,
            cloudflare: vec![
                CloudflareRemoval { place: "zone z".to_owned(), entries: 7, is_gone: false },
                CloudflareRemoval { place: "list l".to_owned(), entries: 0, is_gone: true },
            ],
        };
        assert_eq!(
            describe(&report, "removed"),
            [
                "removed 4 rules and chains",
                "removed the sets a, b",
                "removed the nftables table inet portcullis",
                "removed the bans kept for the next start",
                "removed 7 entries at Cloudflare: zone z",
                "not at Cloudflare any more: list l",
            ]
        );
    }
}
