//! What ends the role, or the teardown.

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
