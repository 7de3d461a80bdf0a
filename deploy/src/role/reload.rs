//! SIGHUP: rules, lists and limits follow the file; what needs a restart is named.

use std::sync::Arc;

use detect::worker::Request;
use proto::client_ip::ClientIpPolicy;
use proto::shutdown::{Shutdown, TaskError};
use tokio::sync::{mpsc, watch};

use crate::config::{Config, Location};

/// Takes over what a changed configuration may change without a restart.
pub(super) struct Reloader {
    pub(super) location: Location,
    pub(super) config: Config,
    /// Detection, where it runs here.
    pub(super) requests: Option<mpsc::Sender<Request>>,
    pub(super) client_ip: watch::Sender<Arc<ClientIpPolicy>>,
}

impl Reloader {
    pub(super) async fn run(mut self, mut reload: watch::Receiver<u64>, shutdown: Shutdown) -> Result<(), TaskError> {
        loop {
            tokio::select! {
                changed = reload.changed() => if changed.is_err() { shutdown.draining().await; return Ok(()) },
                () = shutdown.draining() => return Ok(()),
            }
            let location = self.location.clone();
            match tokio::task::spawn_blocking(move || location.load()).await? {
                Ok(config) => self.take_over(config).await,
                Err(invalid) => {
                    for mistake in invalid.mistakes() {
                        tracing::error!(
                            key = mistake.key,
                            mistake = mistake.text,
                            "Configuration is wrong, the old one stays"
                        );
                    }
                }
            }
        }
    }

    async fn take_over(&mut self, config: Config) {
        let old = &self.config;
        for (section, changed) in [
            ("node", old.node != config.node),
            ("state_dir", old.state_dir != config.state_dir),
            ("bus", old.bus != config.bus),
            ("api", old.api != config.api),
            ("telemetry", old.telemetry != config.telemetry),
            ("ingest.sources", old.ingest.sources != config.ingest.sources),
            ("ingest.spool_bytes_max", old.ingest.spool_bytes_max != config.ingest.spool_bytes_max),
            ("enforce", old.enforce != config.enforce),
        ] {
            if changed {
                tracing::warn!(section, "This part of the configuration changes with a restart only");
            }
        }
        self.client_ip.send_replace(config.ingest.client_ip.clone());
        if let Some(requests) = &self.requests {
            // The worker is gone only when the process ends anyway.
            let _ending = requests.send(Request::Reload(Box::new(config.detect.clone()))).await;
        }
        self.config = Config {
            ingest: ingest::config::IngestConfig {
                sources: old.ingest.sources.clone(),
                spool_bytes_max: old.ingest.spool_bytes_max,
                ..config.ingest
            },
            ..config
        };
    }
}
