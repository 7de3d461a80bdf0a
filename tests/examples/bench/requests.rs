//! Requests over a few connections to a service that answers at once: what is on their way shows most.
//!
//! Sender, service and the kernel between them spend this process's time, so figures are by processor time: what else runs on
//! the machine matters little.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::netns::Namespace;

use crate::process::cpu_of_self;
use crate::table::to_f64;

/// Connections that ask, each for the next answer after the last.
const CONNECTIONS: usize = 4;
/// One figure takes that long.
const SPAN: Duration = Duration::from_millis(500);

const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\nok";

/// Requests answered a second of processor time, with a head as browsers write it and these lines more, each with its end.
pub(crate) fn measure(client: &Namespace, to: SocketAddr, more: &str) -> Result<f64> {
    let request = format!(
        "GET /products/12345?color=blue HTTP/1.1\r\nHost: shop.example.net\r\nUser-Agent: Mozilla/5.0 (X11; Linux \
         x86_64; rv:128.0) Gecko/20100101 Firefox/128.0\r\nAccept: text/html,application/xhtml+xml\r\nCookie: \
         session={}\r\n{more}Accept-Encoding: gzip\r\n\r\n",
        "0123456789abcdef".repeat(8)
    );
    through(client, CONNECTIONS, to, |stream| {
        stream.write_all(request.as_bytes()).ok()?;
        stream.read_exact(&mut [0; ANSWER.len()]).ok().map(|()| 1)
    })
}

/// What `step` adds up to in a second of processor time, on that many connections at once.
pub(crate) fn through(
    client: &Namespace,
    connections: usize,
    to: SocketAddr,
    step: impl Fn(&mut TcpStream) -> Option<u64> + Sync,
) -> Result<f64> {
    let (done, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let connect = || (0..connections).map(|_| Ok(TcpStream::connect(to)?)).collect::<Result<Vec<TcpStream>>>();
    let streams = client.within(connect).context("could not reach the service")?;
    let (count, seconds) = std::thread::scope(|scope| {
        for mut stream in streams {
            let (done, stop, step) = (&done, &stop, &step);
            scope.spawn(move || {
                let _ = stream.set_nodelay(true);
                while !stop.load(Ordering::Relaxed)
                    && let Some(more) = step(&mut stream)
                {
                    done.fetch_add(more, Ordering::Relaxed);
                }
            });
        }
        let (begin, before) = (cpu_of_self(), done.load(Ordering::Relaxed));
        std::thread::sleep(SPAN);
        let count = done.load(Ordering::Relaxed) - before;
        let end = cpu_of_self();
        stop.store(true, Ordering::Relaxed);
        end.and_then(|end| Ok((count, end - begin?)))
    })?;
    ensure!(count > 0, "nothing gets through to {to}");
    Ok(to_f64(count) / seconds)
}

/// Listens in `namespace` on all addresses, and gives each connection to `serve`, until the process ends; the port, which is a
/// free one for 0.
pub(crate) fn listen(namespace: &Namespace, port: u16, serve: fn(TcpStream)) -> Result<u16> {
    let listener = namespace.within(|| Ok(TcpListener::bind(("0.0.0.0", port))?)).context("could not listen")?;
    let port = listener.local_addr().context("no port")?.port();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || serve(stream));
        }
    });
    Ok(port)
}

/// Answers each head of a request.
pub(crate) fn answer(mut stream: TcpStream) {
    let _ = stream.set_nodelay(true);
    let (mut head, mut bytes) = (Vec::new(), [0; 4_096]);
    while let Ok(count @ 1..) = stream.read(&mut bytes) {
        head.extend_from_slice(&bytes[..count]);
        if head.ends_with(b"\r\n\r\n") {
            head.clear();
            if stream.write_all(ANSWER).is_err() {
                return;
            }
        }
    }
}
