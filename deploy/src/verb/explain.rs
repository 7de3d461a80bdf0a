//! `explain`: why an address is banned and what holds it, or how far each rule has counted and why it is not.

use proto::api::{BackendHold, ExplainReply, HoldState, RuleProgress};
use proto::time::{Timestamp, render_duration};

use super::{Exit, bans, connect, describe_pause, moment, remaining};
use crate::args::ExplainArgs;
use crate::output::Output;

pub(super) async fn run(args: ExplainArgs, out: &mut Output<'_>) -> anyhow::Result<Exit> {
    let reply = connect(&args.client)?.explain(args.address).await?;
    if args.client.json {
        out.json(&reply)?;
    } else {
        show(&reply, out)?;
    }
    Ok(Exit::Done)
}

fn show(reply: &ExplainReply, out: &mut Output<'_>) -> anyhow::Result<()> {
    let now = out.now();
    for line in describe(reply, now) {
        out.line(&line)?;
    }
    for line in reply.bans.iter().flat_map(evidence).chain(sight(reply)) {
        out.line(&line)?;
    }
    section(out, "Bans", !reply.bans.is_empty())?;
    out.table(bans::HEADER, reply.bans.iter().map(|ban| bans::row(ban, now)))?;
    section(out, "Rules", !reply.rules.is_empty())?;
    let header = ["rule", "mode", "counted", "within", "last seen", "bans", "next ban"];
    out.table(header, reply.rules.iter().map(progress))?;
    section(out, "Back ends", !reply.backends.is_empty())?;
    out.table(["node", "back end", "holds", "until", "confirmed", "detail"], reply.backends.iter().map(hold))
}

fn section(out: &mut Output<'_>, title: &str, shown: bool) -> anyhow::Result<()> {
    if !shown {
        return Ok(());
    }
    out.line("")?;
    out.line(&format!("{title}:"))
}

/// The answer in sentences, the decisive one first.
fn describe(reply: &ExplainReply, now: Timestamp) -> Vec<String> {
    let mut lines = Vec::new();
    let address = reply.address;
    let longest = reply.bans.iter().max_by_key(|ban| ban.expires_at.unwrap_or(Timestamp::MAX));
    lines.push(match (longest, &reply.paused, &reply.never_ban) {
        (Some(_), Some(_), _) => format!("{address} has a ban that is not in force, because all bans are paused."),
        (Some(_), None, Some(_)) => format!("{address} lies in a banned network, and firewalls let it through."),
        (Some(ban), None, None) => match ban.expires_at {
            Some(end) => {
                format!("{address} is banned for another {}, until {}.", remaining(Some(end), now), moment(end))
            }
            None => format!("{address} is banned until it is lifted."),
        },
        (None, _, Some(_)) => format!("{address} is not banned and never will be."),
        (None, _, None) => format!("{address} is not banned."),
    });
    if let Some(why) = &reply.never_ban {
        lines.push(format!("It may not be banned: {why}."));
    }
    if let Some(pause) = &reply.paused {
        lines.push(format!("All bans are {}.", describe_pause(pause, now)));
    }
    if !reply.target.is_host() {
        lines.push(format!("It is counted and banned as {}.", reply.target));
    }
    if let Some(from) = reply.counts_from {
        lines.push(format!("Only events from {} on count: the end of its newest ban, or its unban.", moment(from)));
    }
    if longest.is_none() && reply.never_ban.is_none() && reply.rules.iter().all(|rule| rule.counted == 0) {
        lines.push("No rule has counted anything of it within its window.".to_owned());
    }
    lines
}

fn evidence(ban: &proto::ban::Ban) -> Vec<String> {
    let evidence = &ban.evidence;
    if evidence.failures == 0 {
        return Vec::new();
    }
    let span = match (evidence.first_seen, evidence.last_seen) {
        (Some(first), Some(last)) => format!(" from {} to {}", moment(first), moment(last)),
        _ => String::new(),
    };
    let mut lines = vec![format!("Rule {} counted {} events{span}.", ban.rule, evidence.failures)];
    let statuses: Vec<String> = evidence.statuses.iter().map(|(status, count)| format!("{status} ({count})")).collect();
    for (name, values) in [
        ("statuses", &statuses),
        ("hosts", &evidence.hosts),
        ("paths", &evidence.paths),
        ("user agents", &evidence.user_agents),
        ("nodes", &evidence.nodes),
    ] {
        if !values.is_empty() {
            lines.push(format!("  {name}: {}", values.join(", ")));
        }
    }
    lines
}

/// Of a client that comes through a proxy: who can see it.
fn sight(reply: &ExplainReply) -> Option<String> {
    if !reply.bans.iter().any(|ban| ban.evidence.via_proxy) {
        return None;
    }
    let sees = |hold: &&BackendHold| {
        let names = [BackendHold::CLOUDFLARE, BackendHold::FORWARDED_FOR];
        names.contains(&hold.backend.as_str()) && ![HoldState::Standby, HoldState::Idle].contains(&hold.state)
    };
    let seers = reply.backends.iter().filter(sees).map(|hold| format!("{} on {}", hold.backend, hold.node));
    let seers: Vec<String> = seers.collect();
    let who = match seers.is_empty() {
        true => "nothing here sees behind it: configure enforce.cloudflare, or enforce.forwarded_for".to_owned(),
        false => format!("behind it see {}", seers.join(", ")),
    };
    Some(format!("A proxy delivered some of its requests. Firewalls see the proxy, not the client; {who}."))
}

fn progress(rule: &RuleProgress) -> [String; 7] {
    let seconds = |seconds| render_duration(std::time::Duration::from_secs(seconds));
    [
        rule.rule.clone(),
        rule.mode.clone(),
        format!("{} of {}", rule.counted, rule.needed),
        seconds(rule.find_seconds),
        rule.last_seen.map(moment).unwrap_or_default(),
        rule.ban_count.to_string(),
        seconds(rule.next_ban_seconds),
    ]
}

fn hold(hold: &BackendHold) -> [String; 6] {
    let (holds, until) = match (hold.entry, hold.is_held()) {
        (Some(entry), true) => (entry.to_string(), hold.until.map_or_else(|| "-".to_owned(), moment)),
        _ => ("nothing".to_owned(), "-".to_owned()),
    };
    let confirmed = hold.confirmed_at.map_or_else(|| "-".to_owned(), moment);
    [hold.node.clone(), hold.backend.clone(), holds, until, confirmed, hold.detail.clone()]
}
