//! Connections of senders: who may have one, how many, and their TLS.
//!
//! A stranger is let go before anything is read of it. What one sender can hold is bounded, so that the others find a place;
//! beyond all places the kernel's queue fills and refuses. A port that cannot be had is tried again for ever, and said.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use proto::places::{Place, Places, is_of_peer};
use proto::report::Problem;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use super::batch::Stopped;
use super::intake::Intake;
use super::limit::Limits;
use super::secrets::{SecretFiles, Secrets};
use crate::config::ListenConfig;

/// How long a TLS handshake may take.
const HANDSHAKE_MAX: Duration = Duration::from_secs(5);
/// Wait after a port could not be had, or the kernel refused a connection, mostly for want of descriptors.
const RETRY: Duration = Duration::from_secs(1);
/// How long open connections may take to hand over what they have read after the shutdown has begun.
const DRAIN_MAX: Duration = Duration::from_secs(5);

/// Bytes both ways, with or without TLS.
pub(crate) trait Pipe: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Pipe for T {}

/// What a source that listens goes by.
#[derive(Clone)]
pub(crate) struct Listening {
    pub(crate) config: Arc<ListenConfig>,
    pub(crate) intake: Intake,
    pub(crate) limits: Arc<Limits>,
}

/// The connection of one sender.
pub(crate) struct Connection {
    pub(crate) pipe: Box<dyn Pipe>,
    pub(crate) place: Place,
    /// As they are now, whenever that is asked.
    pub(crate) secrets: watch::Receiver<Secrets>,
}

impl Connection {
    /// Whose it is.
    pub(crate) fn sender(&self) -> IpAddr {
        self.place.peer().ip().to_canonical()
    }
}

impl Listening {
    pub(crate) fn new(config: ListenConfig, intake: Intake) -> Self {
        let limits = Arc::new(Limits::new(&config.limits, &intake.shared.clock));
        Self { config: Arc::new(config), intake, limits }
    }

    /// Whether `sender` may send.
    pub(crate) fn allows(&self, sender: IpAddr) -> bool {
        let allowed = &self.config.allowed_senders;
        allowed.as_ref().is_none_or(|allowed| allowed.contains(sender.to_canonical()))
    }

    /// What `make` makes of the address, as soon as it can be had; `None` at the shutdown.
    pub(crate) async fn bound<T, F: Future<Output = std::io::Result<T>>>(
        &self,
        make: impl Fn(SocketAddr) -> F,
    ) -> Option<T> {
        let shutdown = self.intake.shared.shutdown.clone();
        let addr = self.config.addr;
        loop {
            match make(addr).await {
                Ok(made) => {
                    self.intake.set_problems(Vec::new());
                    tracing::info!(source = %self.intake.shared.source, %addr, "Source listens");
                    return Some(made);
                }
                Err(error) => {
                    let text = format!("cannot listen on {addr} ({error}): it is tried again until it can");
                    self.intake.set_problems(vec![Problem::degraded(text)]);
                }
            }
            tokio::select! {
                () = shutdown.draining() => return None,
                () = tokio::time::sleep(RETRY) => {}
            }
        }
    }

    /// Takes connections and has each served until the shutdown. SIGHUP has `files` read again: new connections have the new
    /// certificate.
    ///
    /// # Errors
    /// When nobody takes lines any more.
    pub(crate) async fn run<F>(
        self,
        files: SecretFiles,
        serve: impl Fn(Connection, Self) -> F + Clone + Send + 'static,
    ) -> Result<(), Stopped>
    where
        F: Future<Output = Result<(), Stopped>> + Send,
    {
        let shutdown = self.intake.shared.shutdown.clone();
        let mut reload = self.intake.shared.reload.clone();
        let Some(kept) = files.open(&self.intake).await else { return Ok(()) };
        let secrets = kept.follow();
        let Some(listener) = self.bound(TcpListener::bind).await else { return Ok(()) };
        let places = Places::new(self.config.connections_max, self.config.sender_connections_max);
        let mut connections = JoinSet::new();
        let mut ended = Ok(());
        loop {
            self.intake.set_connections(places.taken());
            tokio::select! {
                (stream, place) = self.accept(&listener, &places) => {
                    let (this, secrets, serve) = (self.clone(), secrets.clone(), serve.clone());
                    connections.spawn(async move {
                        match this.shake_hands(stream, place, secrets).await {
                            Some(connection) => serve(connection, this).await,
                            None => Ok(()),
                        }
                    });
                }
                Some(joined) = connections.join_next() => match joined {
                    Ok(Ok(())) => {}
                    Ok(Err(stopped)) => {
                        ended = Err(stopped);
                        break;
                    }
                    // Only panics get here: nothing is cancelled.
                    Err(error) => std::panic::resume_unwind(error.into_panic()),
                },
                Ok(()) = reload.changed() => files.reload(&kept, &self.intake).await,
                () = shutdown.draining() => break,
            }
        }
        drop(listener);
        let ending = async { while connections.join_next().await.is_some() {} };
        // Those that are late end with the set.
        let _late = tokio::time::timeout(DRAIN_MAX, ending).await;
        ended
    }

    /// The next connection that may be and has a place.
    async fn accept(&self, listener: &TcpListener, places: &Arc<Places>) -> (TcpStream, Place) {
        loop {
            let permit = places.wait().await;
            match listener.accept().await {
                Ok((stream, peer)) => {
                    let place = if self.allows(peer.ip()) { places.take(permit, peer) } else { None };
                    if let Some(place) = place {
                        return (stream, place);
                    }
                    self.intake.note_refused();
                }
                Err(error) if is_of_peer(&error) => {}
                Err(error) => {
                    tracing::warn!(source = %self.intake.shared.source, %error, "Source cannot take connections");
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    async fn shake_hands(
        &self,
        stream: TcpStream,
        place: Place,
        secrets: watch::Receiver<Secrets>,
    ) -> Option<Connection> {
        let tls = secrets.borrow().tls.clone();
        let Some(tls) = tls else { return Some(Connection { pipe: Box::new(stream), place, secrets }) };
        let shaken = tokio::time::timeout(HANDSHAKE_MAX, TlsAcceptor::from(tls).accept(stream)).await;
        match shaken {
            Ok(Ok(stream)) => Some(Connection { pipe: Box::new(stream), place, secrets }),
            Ok(Err(_)) | Err(_) => {
                self.intake.note_refused();
                None
            }
        }
    }
}
