//! One connection of a sender: its requests, and how long it may be silent.
//!
//! HTTP/1.1 brings request after request; HTTP/2, of sources that speak it, several at once. The first bytes tell which it
//! is. What one connection of HTTP/2 can hold is bounded by its streams, their windows, and the number of requests that
//! its sender may give up.

use std::convert::Infallible;
use std::io;
use std::pin::{Pin, pin};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use hyper::body::Incoming;
use hyper::rt::Executor;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper::{Request, Response, Version, header};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::answer::Answer;
use super::{Caller, Content, Server};
use crate::source::batch::Stopped;
use crate::source::listen::{Connection, Pipe};

/// How long the head of a request may take from its first byte, and the first one from the connection.
const HEAD_TIME_MAX: Duration = Duration::from_secs(10);
/// Longest head of a request in bytes.
const HEAD_BYTES_MAX: usize = 16 << 10;
/// Bytes that are read ahead of a body.
const BUFFER_BYTES_MAX: usize = 64 << 10;
/// Requests of one connection of HTTP/2 at once, exporters have one to ten under way, and the longest head of each.
const STREAMS_MAX: u32 = 16;
const STREAM_HEAD_BYTES_MAX: u32 = 4 << 10;
/// Bytes that may come of a body before they are asked for, and of all bodies of a connection.
const STREAM_WINDOW_BYTES: u32 = 128 << 10;
const WINDOW_BYTES: u32 = 256 << 10;
/// Requests that the sender of a connection may give up before it is ended: they are work for nobody.
const GIVEN_UP_MAX: u32 = 100;
/// After so long a silence HTTP/2 asks whether anybody is there, and waits so long for a word.
const PING_INTERVAL: Duration = Duration::from_secs(60);
const PING_TIME_MAX: Duration = Duration::from_secs(20);
/// How long a connection that was asked to end may be silent, and how long it may take in all: more than a body.
const ENDING_SILENCE_MAX: Duration = Duration::from_secs(5);
const ENDING_TIME_MAX: Duration = Duration::from_secs(40);
/// What HTTP/2 begins with (RFC 9113, section 3.4), and no request of HTTP/1.1 does.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// What a connection is at.
#[derive(Clone, Copy, Debug, Default)]
struct State {
    /// Its bytes mean requests only where they are read as such: it is HTTP/2.
    is_h2: bool,
    /// The rest of a head is awaited.
    is_in_head: bool,
    /// Requests under way. Whoever reads a body sees to its time.
    open: usize,
    /// Requests that the sender did not wait for.
    given_up: u32,
    /// It takes no further requests.
    is_ending: bool,
}

impl State {
    fn patience(self, idle_max: Duration) -> Duration {
        match self {
            Self { open: 1.., .. } => Duration::MAX,
            Self { is_ending: true, .. } => ENDING_SILENCE_MAX,
            Self { is_in_head: true, .. } => HEAD_TIME_MAX,
            _ => idle_max,
        }
    }
}

pub(super) async fn serve(server: Arc<Server>, connection: Connection) -> Result<(), Stopped> {
    let sender = connection.sender();
    let Connection { pipe, place: _place, secrets } = connection;
    let caller = Arc::new(Caller { sender, secrets, stopped: OnceLock::new() });
    let (state, mut states) = watch::channel(State { is_in_head: true, ..State::default() });
    let state = Arc::new(state);
    let (shutdown, idle_max) = (server.intake().shared.shutdown.clone(), server.config.listen.idle_timeout);
    let (executor, mut spawned) = mpsc::unbounded_channel();
    let mut http = pin!(speak(pipe, (server.clone(), caller.clone(), state.clone()), Streams(executor)));
    let mut streams = JoinSet::new();
    let mut ended = pin!(tokio::time::sleep(Duration::MAX));
    let mut is_ending = false;
    loop {
        let now = *states.borrow_and_update();
        // Who goes on giving up requests need not be asked.
        if now.given_up > GIVEN_UP_MAX {
            server.intake().note_refused();
            break;
        }
        if now.is_ending && !std::mem::replace(&mut is_ending, true) {
            ended.set(tokio::time::sleep(ENDING_TIME_MAX));
        }
        tokio::select! {
            () = http.as_mut() => break,
            Some(stream) = spawned.recv() => {
                streams.spawn(stream);
            }
            Some(joined) = streams.join_next() => if let Err(error) = joined {
                // Only panics get here: nothing is cancelled.
                std::panic::resume_unwind(error.into_panic());
            },
            _changed = states.changed() => {}
            () = ended.as_mut(), if is_ending => break,
            () = tokio::time::sleep(now.patience(idle_max)) => {
                if now.is_in_head {
                    server.intake().note_refused();
                }
                // Who speaks HTTP/2 is told before.
                if now.is_ending || !now.is_h2 {
                    break;
                }
                state.send_modify(|state| state.is_ending = true);
            }
            () = shutdown.draining(), if !now.is_ending => state.send_modify(|state| state.is_ending = true),
        }
    }
    caller.stopped.get().map_or(Ok(()), |stopped| Err(*stopped))
}

/// What the requests of a connection share.
type Serving = (Arc<Server>, Arc<Caller>, Arc<watch::Sender<State>>);

/// Serves until either side ends the connection.
async fn speak(mut pipe: Box<dyn Pipe>, shared: Serving, streams: Streams) {
    let (speaks_h2, state) = (shared.0.config.content == Content::Otlp, shared.2.clone());
    let mut states = state.subscribe();
    let ending = async {
        // Its sender is here.
        let _is_ending = states.wait_for(|state| state.is_ending).await;
    };
    let mut ending = pin!(ending);
    let begun = tokio::select! {
        begun = read_begun(&mut pipe), if speaks_h2 => begun,
        () = std::future::ready(()), if !speaks_h2 => Ok(Bytes::new()),
        () = ending.as_mut() => return,
    };
    // A connection that breaks has ended.
    let Ok(begun) = begun else { return };
    let is_h2 = begun == PREFACE;
    let pipe = TokioIo::new(Watched { pipe, begun, state: state.clone() });
    let service = service_fn(move |request| answer(shared.clone(), request));
    if is_h2 {
        state.send_modify(|state| (state.is_h2, state.is_in_head) = (true, false));
        let mut http = pin!(h2(streams).serve_connection(pipe, service));
        tokio::select! {
            _ended = http.as_mut() => return,
            () = ending => http.as_mut().graceful_shutdown(),
        }
        let _ended = http.await;
    } else {
        let mut http1 = http1::Builder::new();
        http1.header_read_timeout(None).max_header_size(HEAD_BYTES_MAX).max_buf_size(BUFFER_BYTES_MAX);
        let mut http = pin!(http1.serve_connection(pipe, service));
        tokio::select! {
            _ended = http.as_mut() => return,
            () = ending => http.as_mut().graceful_shutdown(),
        }
        let _ended = http.await;
    }
}

fn h2(streams: Streams) -> http2::Builder<Streams> {
    let mut http2 = http2::Builder::new(streams);
    http2
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_MAX)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .max_header_list_size(STREAM_HEAD_BYTES_MAX)
        .max_send_buf_size(BUFFER_BYTES_MAX)
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIME_MAX);
    http2
}

/// Reads what HTTP/2 begins with, or as much as tells that it is not that.
async fn read_begun(pipe: &mut Box<dyn Pipe>) -> io::Result<Bytes> {
    let mut begun = BytesMut::with_capacity(PREFACE.len());
    while begun.len() < PREFACE.len() && PREFACE.starts_with(&begun) {
        let rest = PREFACE.len() - begun.len();
        if pipe.read_buf(&mut (&mut begun).limit(rest)).await? == 0 {
            break;
        }
    }
    Ok(begun.freeze())
}

async fn answer((server, caller, state): Serving, request: Request<Incoming>) -> Result<Response<Answer>, Infallible> {
    let is_h2 = request.version() == Version::HTTP_2;
    let mut under_way = UnderWay::new(state);
    let mut response = server.answer(request, &caller).await;
    // HTTP/2 knows no such header, and says it of the connection.
    let is_last = is_h2 && response.headers_mut().remove(header::CONNECTION).is_some();
    under_way.finish(is_last);
    Ok(response)
}

/// A request, until it is answered or given up.
struct UnderWay {
    state: Arc<watch::Sender<State>>,
    is_answered: bool,
}

impl UnderWay {
    fn new(state: Arc<watch::Sender<State>>) -> Self {
        state.send_modify(|state| {
            state.is_in_head = false;
            state.open += 1;
        });
        Self { state, is_answered: false }
    }

    fn finish(&mut self, is_last: bool) {
        self.is_answered = true;
        self.state.send_modify(|state| state.is_ending |= is_last);
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.state.send_modify(|state| {
            state.open -= 1;
            state.given_up += u32::from(!self.is_answered);
        });
    }
}

/// Hands the requests of HTTP/2 to the connection that they are of, so that they end with it and a panic of one ends all.
#[derive(Clone)]
struct Streams(mpsc::UnboundedSender<Pin<Box<dyn Future<Output = ()> + Send>>>);

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for Streams {
    fn execute(&self, stream: F) {
        // Without the connection there is nobody to answer.
        let _ended = self.0.send(Box::pin(stream));
    }
}

/// Tells when the first bytes of a request come.
struct Watched {
    pipe: Box<dyn Pipe>,
    /// What was read before, and comes first.
    begun: Bytes,
    state: Arc<watch::Sender<State>>,
}

impl AsyncRead for Watched {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if !self.begun.is_empty() {
            let begun = self.begun.len().min(buf.remaining());
            buf.put_slice(&self.begun.split_to(begun));
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.pipe).poll_read(cx, buf))?;
        if buf.filled().len() > before {
            self.state.send_if_modified(|state| {
                let begins = !state.is_h2 && state.open == 0 && !state.is_in_head;
                state.is_in_head |= begins;
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
