//! The operator API over TCP, with bearer tokens and, beyond loopback, TLS.
//!
//! What a stranger can do is bounded in number and time: connections in all and by peer, the handshake, the head of a
//! request, the request as a whole, and failures. Nobody waits for somebody else's bytes. SIGHUP reads tokens and
//! certificates again; files with mistakes change nothing and say so.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::{Router, middleware};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use nix::sys::socket::{setsockopt, sockopt};
use proto::places::{Place, Places, is_of_peer};
use proto::reload::Reloaded;
use proto::shutdown::Shutdown;
use proto::time::Clock;
pub use proto::tls::TlsFiles;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;

use super::access::{Failures, Guard, check_token};
use super::metrics::{Metrics, Refusal};
use super::tokens::Tokens;
use crate::error::{ApiFileError, DetectError};

/// Connections at once; further ones wait in the kernel's queue. Operators and their programs open a few.
const CONNECTIONS_MAX: usize = 256;
/// Connections of one peer at once; further ones are closed.
const CONNECTIONS_PEER_MAX: usize = 32;
/// How long a TLS handshake may take.
const HANDSHAKE_MAX: Duration = Duration::from_secs(5);
/// How long the head of a request may take, and how long a connection may wait for its next request.
const HEAD_MAX: Duration = Duration::from_secs(10);
/// Longest head of a request in bytes.
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// How long sent bytes may stay unacknowledged: a peer that has gone, or that does not read, is given up.
const UNREAD_MAX: Duration = Duration::from_secs(60);
/// How long open requests may take to end after the shutdown has begun.
const DRAIN_MAX: Duration = Duration::from_secs(5);
/// How long to wait after the kernel refused a connection, mostly for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Where to listen, and whom to believe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TcpConfig {
    /// Address and port.
    pub listen: SocketAddr,
    /// Tokens by hash; see the example configuration for the format.
    pub tokens_file: PathBuf,
    /// `None` = plain HTTP, which is for loopback only.
    pub tls: Option<TlsFiles>,
}

/// What a reload replaces.
#[derive(Clone, Debug)]
pub(super) struct Secrets {
    /// Who may ask what.
    pub(super) tokens: Arc<Tokens>,
    tls: Option<Arc<ServerConfig>>,
}

impl TcpConfig {
    fn load(&self) -> Result<Secrets, ApiFileError> {
        let tokens = Tokens::load(&self.tokens_file)?;
        if tokens.count() == 0 {
            tracing::warn!(path = %self.tokens_file.display(), "No token, so nobody can use the operator API over TCP");
        }
        let tls = self.tls.as_ref().map(|tls| tls.load(&["http/1.1"])).transpose()?;
        Ok(Secrets { tokens: Arc::new(tokens), tls })
    }
}

/// The listener, open, with its tokens and certificates read.
#[derive(Debug)]
pub struct Server {
    config: TcpConfig,
    listener: TcpListener,
    secrets: Reloaded<Secrets, ApiFileError>,
    places: Arc<Places>,
    failures: Arc<Failures>,
    metrics: Metrics,
}

impl Server {
    /// Reads the files and listens.
    ///
    /// # Errors
    /// When a file cannot be used, or the address is taken or not ours.
    pub async fn bind(config: TcpConfig, clock: Clock, metrics: Metrics) -> Result<Self, DetectError> {
        let address = config.listen;
        let files = config.clone();
        let secrets = Reloaded::new(move || files.load())?;
        let listener = TcpListener::bind(address).await.map_err(|source| DetectError::ListenTcp { address, source })?;
        let places = Places::new(CONNECTIONS_MAX, CONNECTIONS_PEER_MAX);
        let failures = Arc::new(Failures::new(clock, metrics.clone()));
        Ok(Self { config, listener, secrets, places, failures, metrics })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn address(&self) -> Result<SocketAddr, DetectError> {
        self.listener.local_addr().map_err(DetectError::Serve)
    }

    /// Serves `api` until the shutdown. `reload` changes with every SIGHUP.
    ///
    /// # Errors
    /// When the listener fails.
    pub async fn run(
        self,
        api: Router,
        mut reload: watch::Receiver<u64>,
        shutdown: Shutdown,
    ) -> Result<(), DetectError> {
        let (address, tls) = (self.address()?, self.config.tls.is_some());
        let secrets = self.secrets.follow();
        tracing::info!(%address, tls, tokens = secrets.borrow().tokens.count(), "Operator API listens");
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                (stream, place) = self.accept() => {
                    let guard = Guard::new(place.peer(), self.secrets.follow(), self.failures.clone());
                    let connection = Connection {
                        tls: secrets.borrow().tls.clone(),
                        guard: Arc::new(guard),
                        failures: self.failures.clone(),
                        _open: Open::new(self.metrics.clone()),
                        place,
                    };
                    connections.spawn(connection.serve(stream, api.clone(), shutdown.clone()));
                }
                Some(ended) = connections.join_next() => {
                    if let Err(error) = ended {
                        tracing::error!(%error, "Connection of the operator API broke");
                    }
                }
                Ok(()) = reload.changed() => self.reload().await,
                () = shutdown.draining() => break,
            }
        }
        drop(self.listener);
        let ending = async { while connections.join_next().await.is_some() {} };
        // Those that are late end with the set.
        let _late = tokio::time::timeout(DRAIN_MAX, ending).await;
        Ok(())
    }

    /// The next connection that has a place.
    async fn accept(&self) -> (TcpStream, Place) {
        loop {
            let permit = self.places.wait().await;
            match self.listener.accept().await {
                Ok((stream, peer)) => match self.places.take(permit, peer) {
                    Some(place) => return (stream, place),
                    None => self.failures.refuse(peer.ip(), Refusal::Connections),
                },
                Err(error) if is_of_peer(&error) => {}
                Err(error) => {
                    tracing::warn!(%error, "Operator API cannot accept connections");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    async fn reload(&self) {
        match self.secrets.reload().await {
            Ok(()) => {
                let tokens = self.secrets.follow().borrow().tokens.count();
                tracing::info!(tokens, "Tokens and certificates read again");
            }
            Err(error) => {
                let cause = std::error::Error::source(&error).map(tracing::field::display);
                tracing::error!(%error, cause, "Tokens or certificates are wrong, the old ones stay");
            }
        }
    }
}

/// One connection.
struct Connection {
    tls: Option<Arc<ServerConfig>>,
    guard: Arc<Guard>,
    failures: Arc<Failures>,
    place: Place,
    _open: Open,
}

/// Counted as open until it is dropped.
struct Open(Metrics);

impl Open {
    fn new(metrics: Metrics) -> Self {
        metrics.opened();
        Self(metrics)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.closed();
    }
}

impl Connection {
    async fn serve(self, stream: TcpStream, api: Router, shutdown: Shutdown) {
        let api = api.layer(middleware::from_fn_with_state(Arc::clone(&self.guard), check_token));
        let unread_ms = u32::try_from(UNREAD_MAX.as_millis()).unwrap_or(u32::MAX);
        // A kernel that does not know these works all the same, a little slower and more patient.
        let _slower = stream.set_nodelay(true);
        let _patient = setsockopt(&stream, sockopt::TcpUserTimeout, &unread_ms);
        let Some(tls) = self.tls.clone() else { return self.serve_http(stream, api, shutdown).await };
        let handshake = TlsAcceptor::from(tls).accept(stream);
        let shaken = tokio::select! {
            shaken = tokio::time::timeout(HANDSHAKE_MAX, handshake) => shaken,
            () = shutdown.draining() => return,
        };
        match shaken {
            Ok(Ok(stream)) => self.serve_http(stream, api, shutdown).await,
            Ok(Err(_)) | Err(_) => self.failures.refuse(self.place.peer().ip(), Refusal::Handshake),
        }
    }

    async fn serve_http(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        api: Router,
        shutdown: Shutdown,
    ) {
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_MAX)
            .max_header_size(HEAD_BYTES_MAX)
            .serve_connection(TokioIo::new(stream), TowerToHyperService::new(api));
        tokio::pin!(connection);
        let mut draining = false;
        loop {
            tokio::select! {
                ended = connection.as_mut() => {
                    if ended.is_err_and(|error| error.is_timeout()) {
                        self.failures.refuse(self.place.peer().ip(), Refusal::Late);
                    }
                    return;
                }
                () = self.guard.revoked() => return,
                () = shutdown.draining(), if !draining => {
                    draining = true;
                    connection.as_mut().graceful_shutdown();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
