//! What ends the role, or the teardown.

use proto::time::render_duration;

use crate::command::CommandError;

/// Enforcement could not go on. What a host lacks is never an error but a problem in the node's report.
#[derive(Debug, thiserror::Error)]
pub enum EnforceError {
    /// A background job broke.
    #[error("the job that {job} broke")]
    Job {
        /// What it does.
        job: &'static str,
        /// The panic.
        #[source]
        source: tokio::task::JoinError,
    },
    /// Teardown without the right to change the firewall.
    #[error("removing what is ours from the firewall needs root or CAP_NET_ADMIN")]
    NotPermitted,
    /// Teardown could not pause who may enforce.
    #[error("cannot pause a running enforce by {path}")]
    StandOff {
        /// The file that pauses it.
        path: std::path::PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A running enforce did not let go in time.
    #[error(
        "a running enforce has not let go of the firewall in {}: something that it began does not end and could still put \
         rules back; nothing was removed; stop it, and try again; {path} keeps it paused",
        render_duration(*after)
    )]
    NotReleased {
        /// The file that pauses it.
        path: std::path::PathBuf,
        /// How long was waited.
        after: std::time::Duration,
    },
    /// Teardown could not read what is there.
    #[error("cannot look at {what}")]
    Observe {
        /// Rules or sets.
        what: &'static str,
        /// Why.
        #[source]
        source: CommandError,
    },
    /// Teardown could not remove something.
    #[error("cannot remove {what}")]
    Remove {
        /// Rule, chain, set or file.
        what: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}
