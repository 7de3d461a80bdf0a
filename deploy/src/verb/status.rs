//! `status`: the health of every role. Exit 1 when anything is degraded, silent or missing.

use std::cmp::Reverse;
use std::time::Duration;

use proto::api::StatusReply;
use proto::bus::nats::nodes::STOPPED;
use proto::report::{BackendReport, DetectReport, NodeReport, Problem, Role, RuleReport, Severity, SourceReport};
use proto::time::{Timestamp, render_duration};
use serde::Serialize;

use super::{Exit, connect, describe_pause, moment};
use crate::args::ClientArgs;
use crate::output::Output;

/// A report older than this is no sign of life. Roles report every few seconds.
const REPORT_AGE_MAX: Duration = Duration::from_secs(15);

/// Skew of a source that is worth a line: more than whole seconds in its times explain.
const SKEW_SHOWN_MS: u64 = 2000;

/// What `--json` prints: the reports, and what follows from them.
#[derive(Debug, Serialize)]
struct Health<'a> {
    at: Timestamp,
    degraded: bool,
    problems: Vec<Finding>,
    nodes: &'a [NodeReport],
}

/// A problem, and whose.
#[derive(Debug, Serialize)]
struct Finding {
    node: String,
    role: Role,
    #[serde(flatten)]
    problem: Problem,
}

pub(super) async fn run(args: ClientArgs, out: &mut Output<'_>) -> anyhow::Result<Exit> {
    let reply = connect(&args)?.status().await?;
    let problems = find_problems(&reply);
    let degraded = problems.iter().any(|finding| finding.problem.severity == Severity::Degraded);
    let health = Health { at: reply.at, degraded, problems, nodes: &reply.nodes };
    if args.json {
        out.json(&health)?;
    } else {
        show(&health, out)?;
    }
    Ok(if degraded { Exit::Failed } else { Exit::Done })
}

/// What the roles say, and what they do not say any more. The worst first.
fn find_problems(reply: &StatusReply) -> Vec<Finding> {
    let finding = |node: &str, role, problem| Finding { node: node.to_owned(), role, problem };
    let mut findings = Vec::new();
    for report in &reply.nodes {
        let said = report.problems.iter().cloned();
        findings.extend(said.map(|problem| finding(&report.node, report.role, problem)));
        let age = reply.at.since(report.at);
        if report.duty.as_deref() == Some(STOPPED) {
            let text = format!("was stopped {} ago", render_duration(age));
            findings.push(finding(&report.node, report.role, Problem::warning(text)));
        } else if age > REPORT_AGE_MAX {
            let text = format!("has said nothing for {}", render_duration(age));
            findings.push(finding(&report.node, report.role, Problem::degraded(text)));
        }
    }
    for role in [Role::Ingest, Role::Detect, Role::Enforce] {
        if !reply.nodes.iter().any(|report| report.role == role) {
            findings.push(finding("-", role, Problem::degraded("does not run")));
        }
    }
    findings.sort_by_key(|finding| Reverse(finding.problem.severity));
    findings
}

fn show(health: &Health<'_>, out: &mut Output<'_>) -> anyhow::Result<()> {
    let warnings = health.problems.iter().filter(|finding| finding.problem.severity == Severity::Warning).count();
    out.line(match (health.degraded, warnings) {
        (true, _) => "degraded",
        (false, 0) => "well",
        (false, _) => "well, with warnings",
    })?;
    for Finding { node, role, problem } in &health.problems {
        let severity = match problem.severity {
            Severity::Warning => "warning",
            Severity::Degraded => "degraded",
        };
        out.line(&format!("  {severity}: {} on {node}: {}", role.as_str(), problem.text))?;
    }
    out.line("")?;
    show_roles(health, out)?;
    let sources: Vec<_> = of_nodes(health, |report| &report.sources).collect();
    show_sources(&sources, health.at, out)?;
    for report in health.nodes {
        // A standby has nothing to say of its own.
        if let Some(detect) = report.detect.as_ref().filter(|_| report.duty.as_deref() != Some("standby")) {
            show_detect(detect, health.at, out)?;
        }
    }
    let backends: Vec<_> = of_nodes(health, |report| &report.backends).collect();
    show_backends(&backends, out)
}

/// Parts of all reports, each with its node.
fn of_nodes<'a, T: 'a>(
    health: &Health<'a>,
    parts: impl Fn(&'a NodeReport) -> &'a Vec<T>,
) -> impl Iterator<Item = (&'a str, &'a T)> {
    health.nodes.iter().flat_map(move |report| parts(report).iter().map(move |part| (report.node.as_str(), part)))
}

/// A cluster's roles say more: whether they are active, which commit they have applied, what waits, and how far the host's
/// clock is ahead.
fn show_roles(health: &Health<'_>, out: &mut Output<'_>) -> anyhow::Result<()> {
    let is_cluster = health.nodes.iter().any(|report| !report.instance.is_empty());
    if !is_cluster {
        let roles = health.nodes.iter().map(|report| role_row(report, health.at));
        return out.table(["role", "node", "version", "up", "reported"], roles);
    }
    let roles = health.nodes.iter().map(|report| {
        let [role, node, version, up, reported] = role_row(report, health.at);
        let applied = report.applied.map(|mark| format!("{}.{}", mark.epoch, mark.commit));
        let skew = report.skew_ms.map(skew);
        let or_none = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        let duty = or_none(report.duty.clone());
        [role, node, duty, version, up, reported, or_none(applied), report.lag.to_string(), or_none(skew)]
    });
    out.table(["role", "node", "duty", "version", "up", "reported", "applied", "lag", "clock ahead"], roles)
}

/// How far a clock is ahead; behind, with a minus.
fn skew(ms: i64) -> String {
    let sign = if ms < 0 { "-" } else { "" };
    format!("{sign}{}", render_duration(Duration::from_millis(ms.unsigned_abs())))
}

fn role_row(report: &NodeReport, at: Timestamp) -> [String; 5] {
    [
        report.role.as_str().to_owned(),
        report.node.clone(),
        report.version.clone(),
        age(Some(report.started_at), at),
        format!("{} ago", age(Some(report.at), at)),
    ]
}

/// How long ago, in whole seconds; `-` when never.
fn age(time: Option<Timestamp>, at: Timestamp) -> String {
    time.map_or_else(|| "-".to_owned(), |time| render_duration(Duration::from_secs(at.since(time).as_secs())))
}

fn show_sources(sources: &[(&str, &SourceReport)], at: Timestamp, out: &mut Output<'_>) -> anyhow::Result<()> {
    if sources.is_empty() {
        return Ok(());
    }
    out.line("")?;
    let header = [
        "source",
        "node",
        "kind",
        "format",
        "files",
        "lines",
        "events",
        "unparsed",
        "oversized",
        "last line",
        "behind",
    ];
    let rows = sources.iter().map(|(node, source)| {
        [
            source.name.clone(),
            (*node).to_owned(),
            source.kind.clone(),
            if source.format.is_empty() { "-".to_owned() } else { source.format.clone() },
            source.files.to_string(),
            source.lines.to_string(),
            source.events.to_string(),
            source.unparsed.to_string(),
            source.oversized.to_string(),
            source.last_line_at.map_or_else(|| "-".to_owned(), |time| format!("{} ago", age(Some(time), at))),
            bytes(source.behind_bytes),
        ]
    });
    out.table(header, rows)?;
    for (_, source) in sources {
        if let Some(client) = &source.sample_client {
            out.line(&format!("{}: newest client: {client}", source.name))?;
        }
        if let Some(sample) = &source.unparsed_sample {
            out.line(&format!("{}: newest line that is no access entry: {sample}", source.name))?;
        }
        if source.suspect > 0 {
            out.line(&format!("{}: {} lines may be forged and do not count", source.name, source.suspect))?;
        }
        if let Some(skew_ms) = source.skew_ms.filter(|skew| skew.unsigned_abs() >= SKEW_SHOWN_MS) {
            let side = if skew_ms > 0 { "ahead of" } else { "behind" };
            let length = render_duration(Duration::from_millis(skew_ms.unsigned_abs()));
            out.line(&format!("{}: its times are {length} {side} this clock", source.name))?;
        }
        for (reason, count) in &source.no_client {
            out.line(&format!("{}: {count} events without a client: {reason}", source.name))?;
        }
        let figures = [
            (source.connections, "connections"),
            (source.dropped, "lines dropped for want of room, of senders that cannot wait"),
            (source.limited, "lines turned away, as their sender exceeded a limit"),
            (
                source.refused,
                "connections, datagrams or requests refused, of those who may not send or that cannot be taken",
            ),
        ];
        for (count, what) in figures.iter().filter(|(count, _)| *count > 0) {
            out.line(&format!("{}: {count} {what}", source.name))?;
        }
        if source.lost_bytes > 0 {
            let lost = bytes(source.lost_bytes);
            out.line(&format!("{}: {lost} lost in files that were deleted or cut before they were read", source.name))?;
        }
    }
    Ok(())
}

fn show_detect(detect: &DetectReport, at: Timestamp, out: &mut Output<'_>) -> anyhow::Result<()> {
    out.line("")?;
    let row = |RuleReport { name, mode, matches, bans }: &RuleReport| {
        [name.clone(), mode.clone(), matches.to_string(), bans.to_string()]
    };
    out.table(["rule", "mode", "matches", "bans"], detect.rules.iter().map(row))?;
    out.line(&format!(
        "{} banned now, {} clients tracked, {} with a history; {} events: {} late, {} ahead of the clock, {} seen before",
        detect.banned,
        detect.tracked_clients,
        detect.offenders,
        detect.events,
        detect.late,
        detect.future,
        detect.duplicates
    ))?;
    if detect.leaks > 0 {
        out.line(&format!("{} requests of banned clients passed: see the alarms, and `explain`", detect.leaks))?;
    }
    for (target, until) in &detect.allowed {
        let until = until.map_or_else(|| "for ever".to_owned(), |end| format!("until {}", moment(end)));
        out.line(&format!(
            "{target} is allowed by an operator {until}; `portcullis allow {target} --for 1s` ends that"
        ))?;
    }
    if detect.evicted_clients + detect.evicted_offenders > 0 {
        out.line(&format!(
            "state was cut: {} windows (tracked_clients_max), {} histories (offenders_max)",
            detect.evicted_clients, detect.evicted_offenders
        ))?;
    }
    if let Some((peer, share)) = &detect.hidden_behind {
        out.line(&format!(
            "{share} % of recent lines come from {peer}, which may not be banned and is no trusted proxy"
        ))?;
    }
    if let Some(pause) = &detect.paused {
        out.line(&describe_pause(pause, at))?;
    }
    Ok(())
}

fn show_backends(backends: &[(&str, &BackendReport)], out: &mut Output<'_>) -> anyhow::Result<()> {
    if backends.is_empty() {
        return Ok(());
    }
    out.line("")?;
    let header = ["back end", "node", "members", "desired", "guarded", "dropped packets", "dropped", "repairs"];
    let rows = backends.iter().map(|(node, backend)| {
        [
            backend.name.clone(),
            (*node).to_owned(),
            backend.members.to_string(),
            backend.desired.to_string(),
            backend.guarded.to_string(),
            backend.dropped_packets.to_string(),
            bytes(backend.dropped_bytes),
            backend.repairs.to_string(),
        ]
    });
    out.table(header, rows)?;
    for (_, backend) in backends {
        for detail in &backend.detail {
            out.line(&format!("{}: {detail}", backend.name))?;
        }
    }
    Ok(())
}

/// A number of bytes in the largest binary unit of which there is at least one.
fn bytes(count: u64) -> String {
    let unit = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")].into_iter().find(|(size, _)| count >= *size);
    match unit {
        Some((size, name)) => format!("{}.{} {name}", count / size, count % size * 10 / size),
        None => format!("{count} B"),
    }
}
