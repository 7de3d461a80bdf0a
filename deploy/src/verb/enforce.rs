//! `enforce --teardown`, which leaves nothing of ours behind, also where an enforce runs: that one lets go first.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::bail;
use enforce::{CloudflareRemoval, EnforceError, RemovedSet, StandOff, TeardownReport, teardown};
use proto::bus::config::BusConfig;

use super::Exit;
use crate::args::EnforceArgs;
use crate::config::Location;
use crate::output::Output;
use crate::telemetry;
use crate::text::escape;

pub(super) async fn run(args: EnforceArgs, out: &mut Output<'_>) -> anyhow::Result<Exit> {
    let config = Location::new(args.config.config, Vec::new()).load()?;
    telemetry::install(&config.telemetry)?;
    if args.dry_run {
        for line in tell_running(&enforce::files_of_running(&config.state_dir)) {
            out.line(&line)?;
        }
        let (report, unseen) = teardown(&config.enforce, Some(&config.state_dir), true).await;
        for line in tell(&report, unseen.is_empty(), "would remove", &[]) {
            out.line(&line)?;
        }
        return tell_left(unseen, "not all of it could be looked at", out);
    }
    let held = StandOff::begin(&config.state_dir).await?;
    if held.files.is_empty() && config.bus == BusConfig::Local {
        refuse_while_running(&config.api.socket)?;
    }
    let (report, left) = teardown(&config.enforce, Some(&config.state_dir), false).await;
    for line in tell(&report, left.is_empty(), "removed", &held.files) {
        out.line(&line)?;
    }
    tell_left(left, "not all of it could be removed", out)
}

/// What a teardown would do to those that run.
fn tell_running(files: &[PathBuf]) -> Vec<String> {
    let tell = |file: &PathBuf| {
        let file = file.display();
        format!("would pause the enforce that runs on this host, by the file {file}, until that is removed")
    };
    files.iter().map(tell).collect()
}

/// What was removed, also when some of it was not, and that this host stays paused.
fn tell(report: &TeardownReport, whole: bool, verb: &str, paused: &[PathBuf]) -> Vec<String> {
    let mut lines = Vec::new();
    if whole || *report != TeardownReport::default() {
        lines = describe(report, verb);
    }
    let stays = |file: &PathBuf| format!("enforce is paused on this host; to enforce again: rm {}", file.display());
    lines.extend(paused.iter().map(stays));
    lines
}

/// Each thing that is left, with the reason; fails with `summary` where there is one.
fn tell_left(mut left: Vec<EnforceError>, summary: &'static str, out: &mut Output<'_>) -> anyhow::Result<Exit> {
    match left.len() {
        0 => Ok(Exit::Done),
        1 => Err(anyhow::Error::from(left.remove(0)).context(summary)),
        count => {
            for error in left {
                out.line(&escape(&format!("{:#}", anyhow::Error::from(error))))?;
            }
            bail!("{summary}: see the {count} lines above")
        }
    }
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
    let mut lines: Vec<String> = report.rules.iter().map(|what| format!("{verb} {what}")).collect();
    for RemovedSet { name, members } in &report.sets {
        lines.push(format!("{verb} set {name} with {members} members"));
    }
    if let Some(bans) = report.table {
        lines.push(format!("{verb} the nftables table inet portcullis with {bans} bans"));
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

    use proto::time::Clock;

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

    fn report() -> TeardownReport {
        TeardownReport {
            rules: vec!["the jump from raw/PREROUTING (ipv4, nft)".to_owned()],
            sets: vec![RemovedSet { name: "portcullis-v4", members: 12 }],
            table: Some(3),
            last_set: true,
            cloudflare: vec![
                CloudflareRemoval { place: "zone z".to_owned(), entries: 7, is_gone: false },
                CloudflareRemoval { place: "list l".to_owned(), entries: 0, is_gone: true },
            ],
        }
    }

    #[test]
    fn a_removal_that_fails_tells_what_went_and_that_the_host_stays_paused() {
        let paused = [PathBuf::from("/var/lib/portcullis/paused")];
        let lines = tell(&TeardownReport::default(), false, "removed", &paused);
        assert_eq!(lines, ["enforce is paused on this host; to enforce again: rm /var/lib/portcullis/paused"]);
        assert_eq!(tell(&report(), false, "removed", &paused).len(), 7);
        assert_eq!(tell(&TeardownReport::default(), true, "would remove", &[]), ["nothing of ours was here"]);
    }

    #[test]
    fn each_thing_that_is_left_is_told_with_its_reason() {
        let said = |left: Vec<EnforceError>| {
            let mut bytes = Vec::new();
            let mut out = Output::new(&mut bytes, false, Clock::system());
            let told =
                tell_left(left, "not all of it could be removed", &mut out).map_err(|error| format!("{error:#}"));
            (told.map(|exit| exit.code()), String::from_utf8(bytes).unwrap())
        };
        let left = |what: &str| EnforceError::Remove { what: what.to_owned(), source: "in use".into() };
        assert_eq!(said(Vec::new()), (Ok(0), String::new()));
        let one = said(vec![left("set a")]);
        assert_eq!(one, (Err("not all of it could be removed: cannot remove set a: in use".to_owned()), String::new()));
        let (error, lines) = said(vec![left("set a"), left("set b")]);
        assert!(error.unwrap_err().contains("2 lines"));
        assert_eq!(lines, "cannot remove set a: in use\ncannot remove set b: in use\n");
    }

    #[test]
    fn a_dry_run_says_whom_it_would_pause_and_what_it_would_remove_by_name_and_number() {
        let running = tell_running(&[PathBuf::from("/var/lib/portcullis/paused")]);
        assert!(running[0].starts_with("would pause the enforce that runs"), "{running:?}");
        assert!(running[0].contains("/var/lib/portcullis/paused"), "{running:?}");
        assert_eq!(
            describe(&report(), "would remove"),
            [
                "would remove the jump from raw/PREROUTING (ipv4, nft)",
                "would remove set portcullis-v4 with 12 members",
                "would remove the nftables table inet portcullis with 3 bans",
                "would remove the bans kept for the next start",
                "would remove 7 entries at Cloudflare: zone z",
                "not at Cloudflare any more: list l",
            ]
        );
        assert_eq!(describe(&TeardownReport::default(), "removed"), ["nothing of ours was here"]);
    }
}
