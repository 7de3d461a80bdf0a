//! `enforce`: in this version only `--teardown`, which leaves nothing of ours behind.

use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, bail};
use enforce::teardown::{TeardownReport, teardown};

use super::{Exit, Misuse, cluster_only};
use crate::args::EnforceArgs;
use crate::config::Location;
use crate::output::Output;
use crate::telemetry;

pub(super) async fn run(args: EnforceArgs, out: &mut Output<'_>) -> anyhow::Result<Exit> {
    if !args.teardown {
        return Err(cluster_only("enforce"));
    }
    if args.dry_run {
        let text = "`--teardown` cannot list what it would remove in this version; nothing was removed";
        return Err(Misuse(text.to_owned()).into());
    }
    let config = Location::new(args.config.config, Vec::new()).load()?;
    refuse_while_running(&config.api.socket)?;
    telemetry::install(&config.telemetry)?;
    let report = teardown(&config.enforce, Some(&config.state_dir)).await.context("not all of it could be removed")?;
    for line in describe(&report) {
        out.line(&line)?;
    }
    Ok(Exit::Done)
}

/// A running Portcullis would put everything back.
fn refuse_while_running(socket: &Path) -> anyhow::Result<()> {
    match UnixStream::connect(socket) {
        Ok(_) => {
            bail!("portcullis runs (it answers at {}) and would put everything back: stop it first", socket.display())
        }
        Err(_) => Ok(()),
    }
}

fn describe(report: &TeardownReport) -> Vec<String> {
    let mut lines = Vec::new();
    if report.rules > 0 {
        lines.push(format!("removed {} rules and chains", report.rules));
    }
    if !report.sets.is_empty() {
        lines.push(format!("removed the sets {}", report.sets.join(", ")));
    }
    if report.last_set {
        lines.push("removed the bans kept for the next start".to_owned());
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
    fn what_was_removed_is_told() {
        assert_eq!(describe(&TeardownReport::default()), ["nothing of ours was here"]);
        let report = TeardownReport { rules: 4, sets: vec!["a".to_owned(), "b".to_owned()], last_set: true };
        assert_eq!(
            describe(&report),
            ["removed 4 rules and chains", "removed the sets a, b", "removed the bans kept for the next start"]
        );
    }
}
