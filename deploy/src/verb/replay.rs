//! `replay`: who would have been banned, when and why. Reads logs, touches nothing.
//!
//! The engine is the service's own; only time differs: an event arrives when it began. So the answer depends on the logs
//! and the configuration alone, and two runs print the same bytes.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use detect::engine::rule::Rule;
use detect::engine::visitors::Visitors;
use detect::engine::{Engine, Output as Decision, Source, hidden_text};
use indicatif::{ProgressBar, ProgressStyle};
use ingest::parse::Format;
use ingest::replay::{LineKind, ReplayFile, ReplayItem, ReplayLine, ReplayReader, ReplaySettings, ReplayStats};
use proto::ban::Ban;
use proto::envelope::EventType;
use proto::event::Event;
use proto::net::{NetSet, Target};
use proto::time::{Timestamp, render_duration};
use serde::Serialize;

use super::Exit;
use crate::args::{LogFormat, ReplayArgs};
use crate::config::{Config, Location};
use crate::output::Output;

/// Rows of the summary table; `--json` has no limit.
const ROWS_MAX: usize = 50;
/// Events between two moves of the progress bar.
const PROGRESS_EVENTS: u64 = 4096;

pub(super) fn run(args: &ReplayArgs, out: &mut Output<'_>) -> anyhow::Result<Exit> {
    let config = Location::new(args.config.config.clone(), args.logs.clone()).load()?;
    let reader = reader(args, &config);
    let progress = Progress::new(&reader);
    if args.lines {
        show_lines(args, &config, reader, out)?;
        return Ok(Exit::Done);
    }
    let mut replay = Replay::new(&config);
    let rules = config.detect.engine.rules.clone();
    let never_ban = NetSet::new(config.detect.engine.never_ban.iter().copied());
    let proxies = config.ingest.client_ip.proxies();
    let mut visitors = Visitors::default();
    let node = config.node.as_str();
    let keep = |event: &Event<'_>| {
        progress.advance();
        if let Ok(client) = event.client {
            visitors.note(client.addr, |addr| !never_ban.contains(addr) || proxies.contains(addr));
        }
        rules.iter().any(|rule| matches(rule, event, node))
    };
    let stats = reader.run(keep, |item| replay.handle(&item))?;
    progress.finish();
    let late = replay.engine.stats().late;
    let bans = replay.finish();
    if args.json {
        for ban in bans.iter().filter(|found| !found.shadow) {
            out.json(&Line::from(&ban.ban))?;
        }
    } else {
        show_bans(&bans, out)?;
    }
    let skipped = (!config.detect.names.is_empty()).then(|| config.detect.names.join(", "));
    tell(&stats, &bans, visitors.hidden_behind().map(|(addr, share)| hidden_text(addr, share)), skipped);
    if late > 0 {
        say(&format!(
            "{late} matching requests came later than lateness_max in the order of time, and counted for nothing"
        ));
    }
    Ok(Exit::Done)
}

fn matches(rule: &Rule, event: &Event<'_>, node: &str) -> bool {
    rule.matcher.may_match_status(event.status) && rule.matcher.matches(event, node)
}

fn reader(args: &ReplayArgs, config: &Config) -> ReplayReader {
    let node: Arc<str> = config.node.as_str().into();
    let first = config.ingest.sources.first();
    let source: Arc<str> = first.map_or("traefik", |source| source.name.as_str()).into();
    let line_bytes_max = first.map(|source| source.lines).unwrap_or_default().line_bytes_max;
    let file =
        |path: &std::path::PathBuf| ReplayFile { path: path.clone(), node: node.clone(), source: source.clone() };
    let settings = ReplaySettings {
        format: match args.format {
            LogFormat::Auto => Format::Auto,
            LogFormat::Json => Format::Json,
            LogFormat::Clf => Format::Clf,
        },
        line_bytes_max,
        horizon: config.detect.engine.lateness_max,
        client_ip: config.ingest.client_ip.clone(),
        interest: Arc::new(config.detect.engine.interest()),
    };
    ReplayReader::new(args.logs.iter().map(file).collect(), settings)
}

/// A ban that would have been, by a rule in force or in shadow.
struct Found {
    ban: Ban,
    shadow: bool,
}

/// The engine, fed in order of time.
struct Replay {
    engine: Engine,
    source: Option<Source>,
    due: Option<Timestamp>,
    now: Timestamp,
    bans: Vec<Found>,
}

impl Replay {
    fn new(config: &Config) -> Self {
        let engine = Engine::new(config.detect.engine.clone());
        Self { engine, source: None, due: None, now: Timestamp::EPOCH, bans: Vec::new() }
    }

    fn handle(&mut self, item: &ReplayItem<'_>) {
        let source = *self.source.get_or_insert_with(|| self.engine.open(item.node, item.source, None));
        self.now = self.now.max(item.event.time.unwrap_or(self.now));
        if self.due.is_some_and(|due| due <= self.now) {
            self.engine.handle_timeout(self.now);
        }
        self.engine.handle_event(source, &item.event, self.now);
        self.due = self.engine.poll_timeout();
        while let Some(decision) = self.engine.poll_output() {
            match decision {
                Decision::Told(EventType::Ban | EventType::Extend, ban) | Decision::Over(ban) => {
                    self.bans.push(Found { ban: *ban, shadow: false });
                }
                Decision::Shadow(ban) => self.bans.push(Found { ban: *ban, shadow: true }),
                Decision::Alarm { text, .. } => say(&text),
                Decision::Told(..)
                | Decision::Record(_)
                | Decision::Offender(..)
                | Decision::Leak(_)
                | Decision::Control => {}
            }
        }
    }

    fn finish(mut self) -> Vec<Found> {
        // Stable: what the same moment decided stays in the order of the decisions.
        self.bans.sort_by_key(|found| found.ban.banned_at);
        self.bans
    }
}

/// What programs get for each ban.
#[derive(Serialize)]
struct Line<'a> {
    target: Target,
    rule: &'a str,
    banned_at: Timestamp,
    expires_at: Option<Timestamp>,
    ban_count: u32,
    failures: u32,
    first_seen: Option<Timestamp>,
    last_seen: Option<Timestamp>,
}

impl<'a> From<&'a Ban> for Line<'a> {
    fn from(ban: &'a Ban) -> Self {
        Self {
            target: ban.target,
            rule: &ban.rule,
            banned_at: ban.banned_at,
            expires_at: ban.expires_at,
            ban_count: ban.ban_count,
            failures: ban.evidence.failures,
            first_seen: ban.evidence.first_seen,
            last_seen: ban.evidence.last_seen,
        }
    }
}

/// One row for each target and rule: what people ask is who, and how often.
fn show_bans(bans: &[Found], out: &mut Output<'_>) -> anyhow::Result<()> {
    let mut order: Vec<(Target, &str, bool)> = Vec::new();
    let mut groups: BTreeMap<(Target, &str, bool), Vec<&Ban>> = BTreeMap::new();
    for Found { ban, shadow } in bans {
        let key = (ban.target, ban.rule.as_str(), *shadow);
        groups.entry(key).or_insert_with(|| {
            order.push(key);
            Vec::new()
        });
        if let Some(group) = groups.get_mut(&key) {
            group.push(ban);
        }
    }
    let rows = order.iter().take(ROWS_MAX).filter_map(|key| {
        let group = groups.get(key)?;
        let (first, last) = (group.first()?, group.last()?);
        let rule = if key.2 { format!("{} (shadow)", key.1) } else { key.1.to_owned() };
        let until = last.expires_at.map_or_else(|| "for ever".to_owned(), |end| end.to_string());
        Some([key.0.to_string(), rule, group.len().to_string(), first.banned_at.to_string(), until, why(first)])
    });
    out.table(["TARGET", "RULE", "BANS", "FIRST BANNED", "LAST BAN UNTIL", "WHY (FIRST BAN)"], rows)?;
    if order.len() > ROWS_MAX {
        out.line(&format!("... and {} more: --json lists every ban", order.len() - ROWS_MAX))?;
    }
    Ok(())
}

fn why(ban: &Ban) -> String {
    let paths = ban.evidence.paths.iter().take(3).map(String::as_str).collect::<Vec<_>>().join(" ");
    if paths.is_empty() { ban.reason.clone() } else { format!("{}: {paths}", ban.reason) }
}

/// The summary, for people, beside the data.
fn tell(stats: &ReplayStats, bans: &[Found], hidden: Option<String>, skipped: Option<String>) {
    let targets: std::collections::BTreeSet<Target> =
        bans.iter().filter(|found| !found.shadow).map(|found| found.ban.target).collect();
    let count = bans.iter().filter(|found| !found.shadow).count();
    let span = match (stats.first, stats.last) {
        (Some(first), Some(last)) => format!(" from {first} to {last} ({})", render_duration(last.since(first))),
        _ => String::new(),
    };
    say(&format!("{} lines, {} requests{span}", stats.lines, stats.events));
    if stats.unparsed > 0 {
        let sample = stats.unparsed_sample.as_deref().unwrap_or_default();
        say(&format!("{} lines are no access entries, the first is: {sample}", stats.unparsed));
    }
    if stats.oversized > 0 {
        say(&format!("{} lines were longer than the limit and skipped", stats.oversized));
    }
    if stats.untimed > 0 {
        say(&format!("{} requests have no usable time and took that of the line before", stats.untimed));
    }
    for (reason, count) in &stats.no_client {
        say(&format!("{count} requests have no client: {}", reason.as_str()));
    }
    if let Some(names) = skipped {
        say(&format!("replay resolves no names: {names} in never_ban were left out"));
    }
    if let Some(hidden) = hidden {
        say(&hidden);
    }
    say(&format!("{} clients would have been banned, {count} bans in all", targets.len()));
}

#[expect(clippy::print_stderr, reason = "standard error is where a verb talks to people")]
fn say(text: &str) {
    eprintln!("{}", crate::text::escape(text));
}

/// One line of `--lines`.
#[derive(Serialize)]
struct Shown<'a> {
    file: String,
    offset: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    time: Option<Timestamp>,
    client: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    request: Option<String>,
    rules: Vec<&'a str>,
    why: String,
}

fn show_lines(args: &ReplayArgs, config: &Config, reader: ReplayReader, out: &mut Output<'_>) -> anyhow::Result<()> {
    let mut failed = None;
    let stats = reader.lines(|line| {
        if failed.is_some() {
            return;
        }
        let Some(shown) = shown(&line, config) else { return };
        let result = if args.json { out.json(&shown) } else { out.line(&prose(&shown)) };
        failed = result.err();
    })?;
    match failed {
        Some(error) => Err(error),
        None => {
            tell(&stats, &[], None, None);
            Ok(())
        }
    }
}

fn shown<'a>(line: &ReplayLine<'_>, config: &'a Config) -> Option<Shown<'a>> {
    let empty = Shown {
        file: line.path.display().to_string(),
        offset: line.offset,
        time: None,
        client: None,
        status: None,
        request: None,
        rules: Vec::new(),
        why: String::new(),
    };
    let why = match &line.what {
        LineKind::Blank => return None,
        LineKind::Event(event) => return Some(shown_event(event, config, empty)),
        LineKind::Partial => "a piece of a line that goes on".to_owned(),
        LineKind::Unparsed(refusal) => format!("no access entry: {}", refusal.as_str()),
        LineKind::Suspect(suspicion) => format!("may be forged: {}", suspicion.as_str()),
        LineKind::Oversized => "longer than line_bytes_max".to_owned(),
    };
    Some(Shown { why, ..empty })
}

fn shown_event<'a>(event: &Event<'_>, config: &'a Config, empty: Shown<'a>) -> Shown<'a> {
    let rules = &config.detect.engine.rules;
    let matched: Vec<&str> =
        rules.iter().filter(|rule| matches(rule, event, &config.node)).map(|rule| &*rule.name).collect();
    let never_ban = NetSet::new(config.detect.engine.never_ban.iter().copied());
    let why = match event.client {
        Err(reason) => format!("has no client: {}", reason.as_str()),
        Ok(client) if !matched.is_empty() && never_ban.contains(client.addr) => "never banned".to_owned(),
        Ok(_) if !matched.is_empty() => String::new(),
        Ok(_) => {
            let leaves = rules.iter().map(|rule| {
                let leaves = rule.matcher.explain(event, &config.node);
                let texts: Vec<&str> = leaves.iter().map(|leaf| leaf.text.as_str()).collect();
                format!("{}: {}", rule.name, texts.join(", "))
            });
            leaves.collect::<Vec<_>>().join("; ")
        }
    };
    let client = event.client.ok().map(|client| {
        let peer = event.peer.filter(|_| client.via_proxy).map_or_else(String::new, |peer| format!(" via {peer}"));
        format!("{}{peer}", client.addr)
    });
    Shown {
        time: event.time,
        client,
        status: Some(event.status),
        request: Some(format!("{} {}", event.text.method, event.text.path)),
        rules: matched,
        why,
        ..empty
    }
}

fn prose(shown: &Shown<'_>) -> String {
    let client = shown.client.as_deref().unwrap_or("-");
    let status = shown.status.map_or_else(|| "-".to_owned(), |status| status.to_string());
    let request = shown.request.as_deref().unwrap_or("-");
    let rules = if shown.rules.is_empty() { "no rule".to_owned() } else { shown.rules.join(", ") };
    let why = if shown.why.is_empty() { String::new() } else { format!(" ({})", shown.why) };
    format!("{}:{} {client} {status} {request} -> {rules}{why}", shown.file, shown.offset)
}

/// A bar on standard error while somebody looks at it.
struct Progress {
    bar: Option<ProgressBar>,
    read: Arc<AtomicU64>,
    events: std::cell::Cell<u64>,
}

impl Progress {
    fn new(reader: &ReplayReader) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(reader.total_bytes());
            let template = "{bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
            bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar
        });
        Self { bar, read: reader.bytes_read(), events: std::cell::Cell::new(0) }
    }

    fn advance(&self) {
        let Some(bar) = &self.bar else { return };
        self.events.set(self.events.get() + 1);
        if self.events.get().is_multiple_of(PROGRESS_EVENTS) {
            bar.set_position(self.read.load(Ordering::Relaxed));
        }
    }

    fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
