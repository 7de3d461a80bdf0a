//! `/live`, `/ready` and `/metrics` on an optional listener, for supervisors and Prometheus.
//!
//! No authentication, by design of its readers: bind it to an address that only they reach. It serves no operator verb
//! and never says who is banned.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{self, Poll};
use std::time::Duration;

use anyhow::Context;
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::serve::Listener;
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use proto::shutdown::Shutdown;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Sleep;

/// Connections served at once; further ones wait in the kernel's queue. Supervisors and scrapers open a few.
const CONNECTIONS_MAX: usize = 64;

/// How long a connection may say nothing. Scrapers that come less often connect anew.
const IDLE_MAX: Duration = Duration::from_secs(10);

fn idle() -> Pin<Box<Sleep>> {
    Box::pin(tokio::time::sleep(IDLE_MAX))
}

/// Whether the roles do their work. Set once they have started; draining takes it back.
#[derive(Clone, Debug, Default)]
pub struct Readiness(Arc<AtomicBool>);

impl Readiness {
    /// Not ready yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// From now on ready.
    pub fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn get(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// What the handlers look at.
#[derive(Clone, Debug)]
pub struct Health {
    /// All metrics of the process, registered.
    pub registry: Arc<Registry>,
    /// Set by the roles.
    pub readiness: Readiness,
    /// Ends the listener, and readiness with its beginning.
    pub shutdown: Shutdown,
}

/// Opens the listener.
pub async fn bind(addr: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(addr).await.with_context(|| format!("cannot listen on {addr} for health and metrics"))
}

/// Serves until the shutdown is forced, so that `/ready` says 503 and `/metrics` still answers while draining. Not for a
/// supervisor, which would wait for it: spawn it, and drop it with the runtime.
pub async fn serve(listener: TcpListener, health: Health) -> anyhow::Result<()> {
    let forced = health.shutdown.clone();
    let server = axum::serve(Limited::new(listener, CONNECTIONS_MAX), router(health));
    tokio::select! {
        result = server => result.context("cannot serve health and metrics"),
        () = forced.forced() => Ok(()),
    }
}

fn router(health: Health) -> Router {
    Router::new()
        .route("/live", get(|| async { "live\n" }))
        .route("/ready", get(ready))
        .route("/metrics", get(metrics))
        .with_state(health)
}

async fn ready(State(health): State<Health>) -> (StatusCode, &'static str) {
    if health.shutdown.is_draining() {
        (StatusCode::SERVICE_UNAVAILABLE, "draining\n")
    } else if health.readiness.get() {
        (StatusCode::OK, "ready\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "starting\n")
    }
}

async fn metrics(State(health): State<Health>) -> Response {
    let mut text = String::new();
    match encode(&mut text, &health.registry) {
        Ok(()) => ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text)
            .into_response(),
        // Writing to a string fails only when a metric's own encoder does.
        Err(error) => {
            tracing::error!(%error, "Metrics cannot be written");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

/// A listener that accepts only while fewer than a number of its connections are open.
struct Limited {
    listener: TcpListener,
    free: Arc<Semaphore>,
}

impl Limited {
    fn new(listener: TcpListener, connections_max: usize) -> Self {
        Self { listener, free: Arc::new(Semaphore::new(connections_max)) }
    }
}

impl Listener for Limited {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        // The semaphore is never closed; without a permit the connection would be served all the same.
        let permit = Arc::clone(&self.free).acquire_owned().await.ok();
        let (stream, addr) = Listener::accept(&mut self.listener).await;
        (Connection { stream, idle: idle(), _permit: permit }, addr)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// An accepted connection. Gives its place back when it ends, which it does after [`IDLE_MAX`] without a request: a
/// stranger who holds all places open must not keep a supervisor out.
struct Connection {
    stream: TcpStream,
    idle: Pin<Box<Sleep>>,
    _permit: Option<OwnedSemaphorePermit>,
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut task::Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match Pin::new(&mut self.stream).poll_read(cx, buf) {
            Poll::Ready(result) => {
                self.idle = idle();
                Poll::Ready(result)
            }
            // Nothing read means the end of the stream.
            Poll::Pending => self.idle.as_mut().poll(cx).map(Ok),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut task::Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut task::Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut task::Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::metrics::counter::Counter;

    use super::*;
    use crate::client::use_ring;

    #[tokio::test]
    async fn ready_follows_the_roles_and_the_shutdown() {
        use_ring();
        let mut registry = Registry::with_prefix("portcullis");
        let lines: Counter = Counter::default();
        registry.register("lines", "Lines read", lines.clone());
        lines.inc_by(3);
        let health = Health { registry: Arc::new(registry), readiness: Readiness::new(), shutdown: Shutdown::new() };
        let listener = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let server = tokio::spawn(serve(listener, health.clone()));
        let get = async |path: &str| {
            let response = reqwest::get(format!("http://{addr}{path}")).await.unwrap();
            (response.status().as_u16(), response.text().await.unwrap())
        };
        assert_eq!(get("/live").await, (200, "live\n".to_owned()));
        assert_eq!(get("/ready").await, (503, "starting\n".to_owned()));
        health.readiness.set();
        assert_eq!(get("/ready").await, (200, "ready\n".to_owned()));
        let (status, text) = get("/metrics").await;
        assert_eq!(status, 200);
        assert!(text.contains("portcullis_lines_total 3\n") && text.ends_with("# EOF\n"), "{text}");
        health.shutdown.begin();
        assert_eq!(get("/ready").await, (503, "draining\n".to_owned()));
        health.shutdown.force();
        server.await.unwrap().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn silent_connections_do_not_keep_others_out() {
        use_ring();
        let listener = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let health = Health { registry: Arc::default(), readiness: Readiness::new(), shutdown: Shutdown::new() };
        tokio::spawn(serve(listener, health));
        let mut silent = Vec::new();
        for _ in 0..CONNECTIONS_MAX {
            silent.push(TcpStream::connect(addr).await.unwrap());
        }
        let response = reqwest::get(format!("http://{addr}/live")).await.unwrap();
        assert_eq!(response.status().as_u16(), 200);
    }

    #[tokio::test]
    async fn a_connection_over_the_limit_waits_for_a_place() {
        let listener = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let mut limited = Limited::new(listener, 1);
        let _clients = (TcpStream::connect(addr).await.unwrap(), TcpStream::connect(addr).await.unwrap());
        let (first, _) = limited.accept().await;
        assert_eq!(limited.free.available_permits(), 0);
        tokio::select! {
            biased;
            _ = limited.accept() => panic!("accepted over the limit"),
            () = tokio::task::yield_now() => {}
        }
        drop(first);
        limited.accept().await;
    }

    #[tokio::test]
    async fn a_taken_address_is_named() {
        let listener = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let addr = listener.local_addr().unwrap();
        assert!(bind(addr).await.unwrap_err().to_string().contains(&addr.to_string()));
    }
}
