//! The wiring of the roles: all of one host in one process ([`local`]), any of them over NATS ([`cluster`]), or reading
//! alone ([`stdout`]).

mod cluster;
mod local;
mod reload;
pub mod stdout;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use detect::error::DetectError;
use proto::bus::config::BusConfig;
use proto::report::Role;
use proto::shutdown::Shutdown;
use proto::time::Clock;
use tokio::sync::watch;

use crate::config::{Config, Location};

/// How long what is in flight may take to reach its end.
const DRAIN_DEADLINE: Duration = Duration::from_secs(10);
/// Where a dry run keeps its state, apart from the real one.
const DRY_RUN_DIR: &str = "dry-run";

/// What a process is made of.
#[derive(Debug)]
pub struct Process {
    /// What it does.
    pub roles: Vec<Role>,
    /// As loaded at start.
    pub config: Config,
    /// Where to load it again.
    pub location: Location,
    /// Report what would be done, change no firewall.
    pub dry_run: bool,
    /// The only clock.
    pub clock: Clock,
    /// Begun and forced by signals.
    pub shutdown: Shutdown,
    /// Changes with every SIGHUP.
    pub reload: watch::Receiver<u64>,
}

/// Runs the roles until the shutdown.
///
/// # Errors
/// When something cannot be opened at start, or a role fails.
pub async fn run(process: Process) -> anyhow::Result<()> {
    match process.config.bus.clone() {
        BusConfig::Local => local::run(process).await,
        BusConfig::Nats(nats) => cluster::run(process, &nats).await,
    }
}

/// Where state is kept; `None` = in memory, which only a dry run may.
fn prepare_state_dir(configured: &Path, dry_run: bool) -> anyhow::Result<Option<PathBuf>> {
    let dir = if dry_run { configured.join(DRY_RUN_DIR) } else { configured.to_owned() };
    match make_writable(&dir) {
        Ok(()) => Ok(Some(dir)),
        Err(error) if dry_run => {
            tracing::info!(path = %dir.display(), %error, "State is kept in memory, the directory is not writable");
            Ok(None)
        }
        Err(error) => Err(error).with_context(|| format!("cannot keep state in {}", dir.display())),
    }
}

fn make_writable(dir: &Path) -> std::io::Result<()> {
    if !dir.exists() {
        std::fs::create_dir_all(dir)?;
        // Bans name people's addresses.
        std::fs::set_permissions(dir, std::os::unix::fs::PermissionsExt::from_mode(0o750))?;
    }
    let probe = dir.join(format!(".writable-{}", std::process::id()));
    std::fs::write(&probe, b"")?;
    std::fs::remove_file(&probe)
}

/// A listener of the operator API. A dry run does without one, as it may run beside the real service.
fn opened<T>(result: Result<T, DetectError>, dry_run: bool) -> anyhow::Result<Option<T>> {
    match result {
        Ok(listener) => Ok(Some(listener)),
        Err(error @ (DetectError::Listen { .. } | DetectError::ListenTcp { .. })) if dry_run => {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            tracing::warn!(%error, cause, "Dry run without the operator API");
            Ok(None)
        }
        Err(error) => Err(error).context("cannot open the operator API"),
    }
}
