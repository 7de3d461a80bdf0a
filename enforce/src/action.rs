//! Back ends beside the host's firewall. Each runs in a task of its own, with its own queue, pace and health, so that one
//! that hangs delays no other; each says what it does on the [`Board`].

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use proto::ban::Lists;
use proto::bus::duty::Duties;
use proto::bus::feed::EventSource;
use proto::bus::memory::BanBucket;
use proto::net::NetSet;
use proto::shutdown::Shutdown;
use proto::time::Clock;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::board::Board;
use crate::cloudflare;
use crate::config::EnforceConfig;
use crate::error::EnforceError;
use crate::forwarded;
use crate::metrics::EnforceMetrics;
use crate::notify;
use crate::pipeline::Inputs;

/// What every back end works on.
#[derive(Clone, Debug)]
pub(crate) struct Surroundings {
    /// Name of this node.
    pub(crate) node: Arc<str>,
    /// The ban set.
    pub(crate) bans: BanBucket,
    /// What detect publishes beside bans.
    pub(crate) lists: watch::Receiver<Arc<Lists>>,
    /// Why all bans of this host are lifted, whatever the lists say; on a cluster not for what is done once for all.
    pub(crate) host_pause: watch::Receiver<Option<String>>,
    /// Whether what refuses forwarded clients has let go, in such a pause.
    pub(crate) let_go: LetGo,
    /// Never banned.
    pub(crate) trusted_proxies: NetSet,
    /// Servers that connect the cluster, never banned.
    pub(crate) bus_servers: watch::Receiver<Vec<IpAddr>>,
    /// Who does what only one host does.
    pub(crate) duties: Duties,
    /// What happens.
    pub(crate) events: EventSource,
    /// Where state is kept; `None` = nowhere.
    pub(crate) state_dir: Option<PathBuf>,
    /// Where the service keeps its state, also when this is a dry run.
    pub(crate) service_dir: PathBuf,
    /// Change nothing outside.
    pub(crate) dry_run: bool,
    /// The time.
    pub(crate) clock: Clock,
    /// Where each says how it is.
    pub(crate) board: Board,
    /// Counters.
    pub(crate) metrics: EnforceMetrics,
    /// When to end.
    pub(crate) shutdown: Shutdown,
}

impl Surroundings {
    /// Of the role that has `inputs`.
    pub(crate) fn of(inputs: &Inputs, board: Board, host_pause: watch::Receiver<Option<String>>) -> Self {
        Self {
            host_pause,
            let_go: LetGo::default(),
            node: inputs.node.clone(),
            bans: inputs.bans.clone(),
            lists: inputs.lists.clone(),
            trusted_proxies: inputs.trusted_proxies.clone(),
            bus_servers: inputs.bus_servers.clone(),
            duties: inputs.duties.clone(),
            events: inputs.events.clone(),
            state_dir: inputs.state_dir.clone(),
            service_dir: inputs.service_dir.clone(),
            dry_run: inputs.dry_run,
            clock: inputs.clock.clone(),
            board,
            metrics: inputs.metrics.clone(),
            shutdown: inputs.shutdown.clone(),
        }
    }
}

/// Whether a back end that changes the firewall beside the one for it has lifted what it can since the host's pause began, so
/// that nothing that it began before can come into effect any more.
#[derive(Clone, Debug, Default)]
pub(crate) struct LetGo(Arc<AtomicBool>);

impl LetGo {
    /// A pause has begun or ended.
    pub(crate) fn begin(&self) {
        self.0.store(false, Ordering::Release);
    }

    /// What was begun has ended, with the pause in mind or not.
    pub(crate) fn note(&self, paused: bool) {
        self.0.store(paused, Ordering::Release);
    }

    pub(crate) fn is_done(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// The back ends that run.
#[derive(Debug, Default)]
pub(crate) struct Actions(JoinSet<()>);

impl Actions {
    /// Starts those that are configured.
    pub(crate) fn start(config: &EnforceConfig, around: &Surroundings) -> Self {
        let mut actions = Self::default();
        if config.forwarded_for.enabled {
            actions.0.spawn(forwarded::run(config.clone(), around.clone()));
        } else {
            actions.0.spawn(forwarded::clear(config.clone(), around.clone()));
        }
        if config.cloudflare.is_some() {
            actions.0.spawn(cloudflare::run(config.clone(), around.clone()));
        } else {
            cloudflare::report_left_behind(around);
        }
        for notifier in notify::configured(config, around) {
            actions.0.spawn(notifier.run());
        }
        actions
    }

    /// Returns when one of them ended; for ever where none runs.
    ///
    /// # Errors
    /// When it panicked.
    pub(crate) async fn next_end(&mut self) -> Result<(), EnforceError> {
        match self.0.join_next().await {
            Some(ended) => ended.map_err(|source| EnforceError::Job { job: "acts beside the firewall", source }),
            None => std::future::pending().await,
        }
    }

    /// Waits until all have ended.
    ///
    /// # Errors
    /// When one panicked.
    pub(crate) async fn end(&mut self) -> Result<(), EnforceError> {
        while let Some(ended) = self.0.join_next().await {
            ended.map_err(|source| EnforceError::Job { job: "acts beside the firewall", source })?;
        }
        Ok(())
    }
}
