//! What each word of the command line does: one file a verb.

mod allow;
mod ban;
mod bans;
mod check;
mod completions;
mod enforce;
mod explain;
mod ingest;
mod man;
mod pause;
mod replay;
mod run;
mod status;
mod tail;
mod unban;

#[cfg(test)]
mod tests;

use std::fmt;
use std::future::Future;
use std::time::Duration;

use anyhow::Context;
use proto::ban::Pause;
use proto::net::Target;
use proto::report::Role;
use proto::time::{Timestamp, render_duration};

use crate::args::{ClientArgs, Verb, whole_seconds};
use crate::client::{Client, Way};
use crate::output::Output;

/// How the program ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Done.
    Done,
    /// Failed, or (status) something is degraded.
    Failed,
    /// The verb was misused.
    Misused,
    /// The configuration has mistakes.
    BadConfiguration,
}

impl Exit {
    /// The exit code.
    pub fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Failed => 1,
            Self::Misused => 2,
            Self::BadConfiguration => 64,
        }
    }
}

/// The verb cannot be used like this.
#[derive(Debug)]
pub struct Misuse(pub String);

impl fmt::Display for Misuse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Misuse {}

/// Does what was asked. Errors carry [`Misuse`], [`crate::config::Invalid`] or [`crate::output::OutputClosed`] where
/// they decide the exit code.
pub fn execute(verb: Verb, out: &mut Output<'_>) -> anyhow::Result<Exit> {
    match verb {
        Verb::Run(args) => run::run(args),
        Verb::Ingest(args) => ingest::run(args),
        Verb::Detect(args) => run::run_role(Role::Detect, args.config.config, false),
        Verb::Enforce(args) if args.teardown => block_on(enforce::run(args, out)),
        Verb::Enforce(args) => run::run_role(Role::Enforce, args.config.config, args.dry_run),
        Verb::Check(args) => check::run(args, out),
        Verb::Replay(args) => replay::run(&args, out),
        Verb::Ban(args) => block_on(ban::run(args, out)),
        Verb::Unban(args) => block_on(unban::run(args, out)),
        Verb::Allow(args) => block_on(allow::run(args, out)),
        Verb::Pause(args) => block_on(pause::pause(args, out)),
        Verb::Resume(args) => block_on(pause::resume(args, out)),
        Verb::Bans(args) => block_on(bans::run(args, out)),
        Verb::Status(args) => block_on(status::run(args, out)),
        Verb::Explain(args) => block_on(explain::run(args, out)),
        Verb::Tail(args) => block_on(tail::run(args, out)),
        Verb::Completions(args) => completions::run(&args, out),
        Verb::Man => man::run(out),
    }
}

fn block_on(verb: impl Future<Output = anyhow::Result<Exit>>) -> anyhow::Result<Exit> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start a runtime")?.block_on(verb)
}

fn connect(args: &ClientArgs) -> anyhow::Result<Client> {
    Client::new(Way::find(args, |name| std::env::var(name).ok())?)
}

fn join(targets: &[Target]) -> String {
    targets.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// What to say of an end: how long from `now`, in whole seconds rounded up, or that there is none.
fn remaining(end: Option<Timestamp>, now: Timestamp) -> String {
    let length = |end: Timestamp| render_duration(Duration::from_secs(whole_seconds(end.since(now))));
    end.map_or_else(|| "permanent".to_owned(), length)
}

/// A moment in whole seconds: `2026-01-08 14:19:15Z`.
fn moment(time: Timestamp) -> String {
    let text = time.to_string();
    text.get(..19).map_or(text.clone(), |seconds| format!("{}Z", seconds.replace('T', " ")))
}

fn describe_pause(pause: &Pause, now: Timestamp) -> String {
    let until = pause.until.map_or_else(
        || "until `portcullis resume`".to_owned(),
        |end| format!("for another {}, until {}", remaining(Some(end), now), moment(end)),
    );
    format!("paused since {} {until}: nobody is banned", moment(pause.since))
}
