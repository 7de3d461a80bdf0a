//! One connection of a sender: request after request, and how long it may be silent.

use std::convert::Infallible;
use std::io;
use std::pin::{Pin, pin};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::watch;

use super::Server;
use crate::source::batch::Stopped;
use crate::source::listen::{Connection, Pipe};

/// How long the head of a request may take from its first byte, and the first one from the connection.
const HEAD_TIME_MAX: Duration = Duration::from_secs(10);
/// Longest head of a request in bytes.
const HEAD_BYTES_MAX: usize = 16 << 10;
/// Bytes that are read ahead of a body.
const BUFFER_BYTES_MAX: usize = 64 << 10;

/// What is awaited of the sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Its next request.
    Idle,
    /// The rest of a head.
    Head,
    /// Nothing, or a body: whoever reads it sees to its time.
    Request,
}

pub(super) async fn serve(server: Arc<Server>, connection: Connection) -> Result<(), Stopped> {
    let sender = connection.sender();
    let Connection { pipe, place: _place } = connection;
    let (phase, mut phases) = watch::channel(Phase::Head);
    let (phase, stopped) = (Arc::new(phase), Arc::new(OnceLock::new()));
    let pipe = Watched { pipe, phase: phase.clone() };
    let (shutdown, idle_max) = (server.intake().shared.shutdown.clone(), server.config.listen.idle_timeout);
    let service = service_fn(|request| {
        let (server, phase, stopped) = (server.clone(), phase.clone(), stopped.clone());
        async move {
            phase.send_replace(Phase::Request);
            let answer = server.answer(request, sender, &stopped).await;
            phase.send_replace(Phase::Idle);
            Ok::<_, Infallible>(answer)
        }
    });
    let http = http1::Builder::new()
        .header_read_timeout(None)
        .max_header_size(HEAD_BYTES_MAX)
        .max_buf_size(BUFFER_BYTES_MAX)
        .serve_connection(TokioIo::new(pipe), service);
    let mut http = pin!(http);
    let mut is_draining = false;
    loop {
        let now = *phases.borrow_and_update();
        let patience = match now {
            Phase::Idle => idle_max,
            Phase::Head => HEAD_TIME_MAX,
            Phase::Request => Duration::MAX,
        };
        tokio::select! {
            _ended = http.as_mut() => break,
            _changed = phases.changed() => {}
            () = tokio::time::sleep(patience) => {
                if now == Phase::Head {
                    server.intake().note_refused();
                }
                break;
            }
            () = shutdown.draining(), if !is_draining => {
                is_draining = true;
                http.as_mut().graceful_shutdown();
            }
        }
    }
    stopped.get().map_or(Ok(()), |stopped| Err(*stopped))
}

/// Tells when the first bytes of a request come.
struct Watched {
    pipe: Box<dyn Pipe>,
    phase: Arc<watch::Sender<Phase>>,
}

impl AsyncRead for Watched {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.pipe).poll_read(cx, buf))?;
        if buf.filled().len() > before {
            self.phase.send_if_modified(|phase| {
                let begins = *phase == Phase::Idle;
                if begins {
                    *phase = Phase::Head;
                }
                begins
            });
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.pipe).poll_write(cx, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.pipe).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.pipe).poll_shutdown(cx)
    }
}
