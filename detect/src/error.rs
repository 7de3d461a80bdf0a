//! What can go wrong in detection.

use std::net::SocketAddr;
use std::path::PathBuf;

use proto::secret::SecretFileError;
use proto::tls::TlsError;

use crate::state::DecodeError;

/// The state on disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file cannot be opened.
    #[error("cannot open the state file {}", .path.display())]
    Open {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<redb::DatabaseError>,
    },
    /// Another process has it open.
    #[error("the state file {} is in use: is portcullis running already?", .0.display())]
    InUse(PathBuf),
    /// A damaged file cannot be set aside.
    #[error("cannot set the damaged state file {} aside", .path.display())]
    SetAside {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Reading or writing failed.
    #[error("cannot {action} the state")]
    Access {
        /// What we were doing.
        action: &'static str,
        /// Why.
        #[source]
        source: Box<redb::Error>,
    },
    /// A value makes no sense.
    #[error("cannot read the state")]
    Decode(#[from] DecodeError),
}

/// A file that the operator API needs over TCP cannot be used. Shows nothing of what it holds.
#[derive(Debug, thiserror::Error)]
pub enum ApiFileError {
    /// A secret cannot be read.
    #[error(transparent)]
    Secret(#[from] SecretFileError),
    /// The tokens have mistakes.
    #[error("{}: {mistakes}", .path.display())]
    Tokens {
        /// Which file.
        path: PathBuf,
        /// All of them, by line.
        mistakes: String,
    },
    /// The certificate or its key cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// Detection ended.
#[derive(Debug, thiserror::Error)]
pub enum DetectError {
    /// Its state.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The operator API cannot listen.
    #[error("cannot listen on the socket {}", .path.display())]
    Listen {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The operator API cannot listen on an address.
    #[error("cannot listen on {address}")]
    ListenTcp {
        /// Where.
        address: SocketAddr,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Tokens or certificates of the operator API.
    #[error(transparent)]
    ApiFile(#[from] ApiFileError),
    /// The operator API ended.
    #[error("the operator API failed")]
    Serve(#[source] std::io::Error),
}
