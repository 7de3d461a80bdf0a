//! One message a datagram: on UDP (RFC 5426), and on a unix socket as syslog(3), systemd-journald, rsyslog's omuxsock and
//! syslog-ng's unix-dgram() write it.

use std::io::{self, ErrorKind};
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use proto::report::Problem;
use tokio::net::{UdpSocket, UnixDatagram};

use super::frames::trim_end;
use super::kernel_drops::KernelDrops;
use super::nodes::Nodes;
use crate::config::NodeFrom;
use crate::parse::syslog::HEADER_BYTES_MAX;
use crate::source::batch::Stopped;
use crate::source::intake::Intake;
use crate::source::limit::Limits;
use crate::source::listen::Listening;

/// What a datagram of UDP can hold.
const DATAGRAM_BYTES_MAX: usize = 64 << 10;
/// Datagrams that are read before others get their turn.
const DATAGRAMS_MAX: u32 = 1024;
/// Room in the kernel for datagrams that wait for us: a fifth of a second of 50,000 lines of 400 bytes.
const RECEIVE_BYTES: usize = 4 << 20;
/// How often the kernel is asked what it had no room for.
const DROPS_INTERVAL: Duration = Duration::from_secs(1);
/// Wait after a socket could not be had or read.
const RETRY: Duration = Duration::from_secs(1);

/// Hears UDP until the shutdown. What finds no room is dropped and counted, here or in the kernel.
pub(super) async fn run_udp(listening: &Listening, node_from: NodeFrom) -> Result<(), Stopped> {
    let shutdown = listening.intake.shared.shutdown.clone();
    let Some(socket) = listening.bound(bind_udp).await else { return Ok(()) };
    let mut nodes = Nodes::new(listening.intake.clone(), node_from);
    let mut drops = KernelDrops::new(&socket);
    let mut ticks = tokio::time::interval(DROPS_INTERVAL);
    let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
    loop {
        let is_last = tokio::select! {
            biased;
            () = shutdown.draining() => true,
            _ = ticks.tick() => {
                let dropped = drops.poll().await;
                if dropped > 0 {
                    listening.intake.note_dropped(dropped);
                }
                false
            }
            ready = socket.readable() => {
                if ready.is_err() {
                    tokio::time::sleep(RETRY).await;
                }
                false
            }
        };
        read_udp(&socket, &mut buffer, (listening, &mut nodes))?;
        if is_last {
            return Ok(());
        }
        tokio::task::yield_now().await;
    }
}

async fn bind_udp(addr: std::net::SocketAddr) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind(addr).await?;
    enlarge(&socket);
    Ok(socket)
}

/// Asks for more room in the kernel: what the privileged get, else as much as net.core.rmem_max lets others have.
fn enlarge(socket: &impl AsFd) {
    if setsockopt(socket, sockopt::RcvBufForce, &RECEIVE_BYTES).is_err()
        && let Err(error) = setsockopt(socket, sockopt::RcvBuf, &RECEIVE_BYTES)
    {
        tracing::debug!(%error, "Room for datagrams cannot be enlarged");
    }
}

/// Takes the datagrams that have come, and sends them on.
fn read_udp(
    socket: &UdpSocket,
    buffer: &mut [u8],
    (listening, nodes): (&Listening, &mut Nodes),
) -> Result<(), Stopped> {
    for _ in 0..DATAGRAMS_MAX {
        let (bytes, sender) = match socket.try_recv_from(buffer) {
            Ok((bytes, sender)) => (bytes, sender.ip().to_canonical()),
            // Nothing more has come; or an answer of the network to something else, of which there is no second.
            Err(_) => break,
        };
        if !listening.allows(sender) {
            listening.intake.note_refused();
            continue;
        }
        if listening.limits.check(Some(sender), 1, u32::try_from(bytes).unwrap_or(u32::MAX)).is_err() {
            listening.intake.note_limited(1);
            continue;
        }
        push(nodes, &buffer[..bytes], Some(sender));
        if nodes.is_full() {
            nodes.try_send()?;
        }
    }
    nodes.try_send()
}

/// Datagrams get lost and overtake each other, so that no line is joined from several.
fn push(nodes: &mut Nodes, datagram: &[u8], sender: Option<IpAddr>) {
    let message = trim_end(datagram);
    if !message.is_empty() {
        nodes.push(Some(message), datagram.len(), sender).abandon();
    }
}

/// Hears a unix socket until the shutdown. While there is no room, or the limit is reached, its senders wait.
pub(super) async fn run_unix(
    path: &Path,
    limits: &Limits,
    (intake, node_from): (Intake, NodeFrom),
) -> Result<(), Stopped> {
    let shutdown = intake.shared.shutdown.clone();
    let Some((socket, _file)) = bound_unix(path, &intake).await else { return Ok(()) };
    let mut nodes = Nodes::new(intake.clone(), node_from);
    // One byte more than may be, to see what is too long.
    let mut buffer = vec![0; intake.line_bytes_max + HEADER_BYTES_MAX + 1];
    loop {
        let is_last = tokio::select! {
            biased;
            () = shutdown.draining() => true,
            ready = socket.readable() => {
                if ready.is_err() {
                    tokio::time::sleep(RETRY).await;
                }
                false
            }
        };
        let mut read = (0, 0);
        for _ in 0..DATAGRAMS_MAX {
            let Ok(bytes) = socket.try_recv(&mut buffer) else { break };
            read = (read.0 + 1, read.1 + bytes);
            if bytes == buffer.len() {
                nodes.push(None, bytes, None);
            } else {
                push(&mut nodes, &buffer[..bytes], None);
            }
            if nodes.is_full() {
                nodes.send().await?;
            }
        }
        nodes.send().await?;
        if is_last {
            return Ok(());
        }
        tokio::select! {
            () = limits.wait(None, read.0, u32::try_from(read.1).unwrap_or(u32::MAX)) => {}
            () = shutdown.draining() => {}
        }
    }
}

/// The name of a socket of ours, removed when dropped.
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        // A socket that somebody has removed already is as good.
        let _gone = std::fs::remove_file(&self.0);
    }
}

/// The socket, as soon as it can be had; `None` at the shutdown.
async fn bound_unix(path: &Path, intake: &Intake) -> Option<(UnixDatagram, SocketFile)> {
    let shutdown = intake.shared.shutdown.clone();
    loop {
        match bind_unix(path) {
            Ok(socket) => {
                intake.set_problems(Vec::new());
                tracing::info!(source = %intake.shared.source, path = %path.display(), "Source listens");
                return Some((socket, SocketFile(path.to_owned())));
            }
            Err(error) => {
                let path = path.display();
                let text = format!("cannot listen at {path} ({error}): it is tried again until it can");
                intake.set_problems(vec![Problem::degraded(text)]);
            }
        }
        tokio::select! {
            () = shutdown.draining() => return None,
            () = tokio::time::sleep(RETRY) => {}
        }
    }
}

/// Listens at `path`, with the mode that it has to have before anybody can find it. Only a socket that nobody listens at is
/// replaced.
fn bind_unix(path: &Path) -> io::Result<UnixDatagram> {
    match path.symlink_metadata() {
        Ok(there) if !there.file_type().is_socket() => {
            return Err(io::Error::new(ErrorKind::AlreadyExists, "there is something that is no socket"));
        }
        Ok(_) => {
            // A socket of streams is one that somebody may use as well.
            let probe = std::os::unix::net::UnixDatagram::unbound()?.connect(path);
            if probe.err().is_none_or(|error| error.kind() != ErrorKind::ConnectionRefused) {
                return Err(io::Error::new(ErrorKind::AddrInUse, "another program listens there"));
            }
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let staged = path.with_extension(format!("{}.tmp", std::process::id()));
    let _gone = std::fs::remove_file(&staged);
    let socket = UnixDatagram::bind(&staged)?;
    let placed = std::fs::set_permissions(&staged, PermissionsExt::from_mode(0o660))
        .and_then(|()| std::fs::rename(&staged, path));
    if placed.is_err() {
        let _gone = std::fs::remove_file(&staged);
    }
    enlarge(&socket);
    placed.map(|()| socket)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net;

    use super::*;

    #[tokio::test]
    async fn only_a_socket_that_nobody_listens_at_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        drop(bind_unix(&path).unwrap());
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o660);
        let held = bind_unix(&path).expect("the old one is stale");
        assert_eq!(bind_unix(&path).unwrap_err().kind(), ErrorKind::AddrInUse);
        drop(held);
        std::fs::remove_file(&path).unwrap();
        let _stream = net::UnixListener::bind(&path).unwrap();
        assert_eq!(bind_unix(&path).unwrap_err().kind(), ErrorKind::AddrInUse);
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "precious").unwrap();
        assert_eq!(bind_unix(&path).unwrap_err().kind(), ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left behind");
    }
}
