//! What ends the role, and what ends a replay.

use std::io;
use std::path::PathBuf;

/// Why ingest ended before it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum IngestError {
    /// No source is configured.
    #[error("no source of log lines is configured")]
    NoSources,
    /// A source needs NATS and there is none.
    #[error("source {source_name} needs NATS, and there is no connection to it")]
    NoNats {
        /// The source.
        source_name: String,
    },
    /// Nobody takes batches any more.
    #[error("source {source_name}: the receiver of access batches is gone")]
    ReceiverGone {
        /// The source that noticed.
        source_name: String,
    },
    /// The thread of a source panicked.
    #[error("the reader of source {source_name} panicked")]
    Panicked {
        /// Which source.
        source_name: String,
        /// What tokio says of it.
        #[source]
        cause: tokio::task::JoinError,
    },
}

/// Why a replay could not read all files.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// A file could not be opened.
    #[error("cannot open {}", .path.display())]
    Open {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// A file could not be read to its end.
    #[error("cannot read {}", .path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
}
