//! `enforce`: in this version only `--teardown`, which leaves nothing of ours behind.

use anyhow::Context;
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
    telemetry::install(&config.telemetry)?;
    let report = teardown(&config.enforce, Some(&config.state_dir)).await.context("not all of it could be removed")?;
    for line in describe(&report) {
        out.line(&line)?;
    }
    Ok(Exit::Done)
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
