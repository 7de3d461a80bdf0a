//! `run`: all roles in one process, until a signal; and each role by itself.

use std::future::Future;
use std::path::{self, PathBuf};

use anyhow::Context;
use ingest::config::STDIN;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use proto::report::Role;
use proto::settings::Mistake;
use proto::shutdown::Shutdown;
use proto::time::Clock;
use tokio::sync::watch;

use super::Exit;
use crate::args::RunArgs;
use crate::config::{Config, Location};
use crate::role::{self, Process};
use crate::signals::Signals;
use crate::{socket, telemetry};

pub(super) fn run(args: RunArgs) -> anyhow::Result<Exit> {
    let location = Location::new(args.config.config, absolute(args.logs)?);
    let config = location.load()?;
    config.require_sources()?;
    start(vec![Role::Ingest, Role::Detect, Role::Enforce], location, config, args.dry_run)
}

/// One role by itself, over NATS.
pub(super) fn run_role(role: Role, config: Option<PathBuf>, dry_run: bool) -> anyhow::Result<Exit> {
    let location = Location::new(config, Vec::new());
    let config = location.load()?;
    config.require_nats(role.as_str())?;
    if role == Role::Ingest {
        config.require_sources()?;
    }
    start(vec![role], location, config, dry_run)
}

fn start(roles: Vec<Role>, location: Location, config: Config, dry_run: bool) -> anyhow::Result<Exit> {
    // The operator API is detect's. Other roles need no directory for its socket, which they might not be able to make.
    if roles.contains(&Role::Detect) {
        socket::prepare(&config.api.socket)?;
    }
    telemetry::install(&config.telemetry)?;
    for Mistake { key, text } in config.warnings() {
        tracing::warn!(key, reason = text, "Configuration may not be meant so");
    }
    block_on((roles, location, config, dry_run), role::run)
}

/// Runs what `run` makes of a process to its end, under signals.
pub(super) fn block_on<F: Future<Output = anyhow::Result<()>>>(
    (roles, location, config, dry_run): (Vec<Role>, Location, Config, bool),
    run: impl FnOnce(Process) -> F,
) -> anyhow::Result<Exit> {
    raise_open_files();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start a runtime")?;
    let result = runtime.block_on(async {
        let shutdown = Shutdown::new();
        let (hangups, reload) = watch::channel(0);
        let signals = Signals::install().context("cannot install the signal handlers")?;
        tokio::spawn(signals.run(shutdown.clone(), hangups, Clock::system()));
        run(Process { roles, config, location, dry_run, clock: Clock::system(), shutdown, reload }).await
    });
    // Everything in flight has ended or missed its deadline: wait for no thread.
    runtime.shutdown_background();
    result.map(|()| Exit::Done)
}

/// Followed logs, sockets and the programs that change the firewall all need descriptors, and the usual soft limit is
/// made for programs that wait with `select`.
fn raise_open_files() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(soft, hard)| if soft < hard { setrlimit(Resource::RLIMIT_NOFILE, hard, hard) } else { Ok(()) });
    if let Err(error) = raised {
        tracing::warn!(%error, "Limit of open files cannot be raised");
    }
}

/// Log files as named from where we stand now, standard input aside; a reload reads the list again.
pub(super) fn absolute(logs: Vec<PathBuf>) -> anyhow::Result<Vec<PathBuf>> {
    let absolute = |log: PathBuf| {
        if log.as_os_str() == STDIN {
            return Ok(log);
        }
        path::absolute(&log).with_context(|| format!("cannot use the log {}", log.display()))
    };
    logs.into_iter().map(absolute).collect()
}
