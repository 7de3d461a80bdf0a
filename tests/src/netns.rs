//! Network namespaces joined by veth pairs: a server's, and one for each client. They vanish when dropped.
//!
//! Nothing outside of them is touched. A thread enters a namespace and stays there, so that sockets are plain `std::net`.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sched::{CloneFlags, setns};
use proto::time::Clock;

use crate::access::Access;

/// A banned client hears nothing at all; one that is not banned is answered within a fraction of this.
const SILENCE: Duration = Duration::from_millis(700);
/// Port of the server.
const PORT: u16 = 80;
/// Bytes of a request's head; ours are far shorter.
const HEAD_BYTES_MAX: usize = 8 << 10;

/// One namespace.
#[derive(Debug)]
pub struct Namespace {
    name: String,
}

impl Namespace {
    /// A new one, with its loopback up.
    pub fn new() -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        // Interface names are bounded to 15 bytes, and veths are named after their namespace.
        let name = format!("pc{}n{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        command("ip", &["netns", "add", &name])?;
        let namespace = Self { name };
        namespace.run("ip", &["link", "set", "lo", "up"])?;
        Ok(namespace)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs a command inside; its standard output.
    pub fn run(&self, program: &str, args: &[&str]) -> Result<String> {
        command("ip", &[&["netns", "exec", &self.name, program], args].concat())
    }

    /// Runs `work` on a thread inside.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                enter(&self.name)?;
                work()
            });
            thread.join().unwrap_or_else(|_| bail!("panicked in namespace {}", self.name))
        })
    }

    /// Joins this namespace, as the server, with `client`: the server has `.1` or `::1` of each network, the client `.2` or
    /// `::2`. Networks are `192.0.2.0/30` or `2001:db8::/64`, given by their first address.
    pub fn join(&self, client: &Self, networks: &[IpAddr]) -> Result<()> {
        let (here, there) = (format!("s{}", client.name), client.name.clone());
        let link = ["link", "add", &here, "netns", &self.name, "type", "veth", "peer", "name", &there, "netns", &there];
        command("ip", &link)?;
        for (namespace, device, last) in [(self, &here, 1), (client, &there, 2)] {
            for network in networks {
                let (addr, prefix) = (host(*network, last), if network.is_ipv4() { 30 } else { 64 });
                let nodad: &[&str] = if network.is_ipv4() { &[] } else { &["nodad"] };
                let addr = format!("{addr}/{prefix}");
                namespace.run("ip", &[&["addr", "add", &addr, "dev", device], nodad].concat())?;
            }
            namespace.run("ip", &["link", "set", device, "up"])?;
        }
        Ok(())
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // What cannot be removed is named after this process and disturbs nobody.
        let _ = command("ip", &["netns", "delete", &self.name]);
    }
}

/// Address number `last` of a network given by its first.
pub fn host(network: IpAddr, last: u8) -> IpAddr {
    match network {
        IpAddr::V4(addr) => IpAddr::V4((addr.to_bits() + u32::from(last)).into()),
        IpAddr::V6(addr) => IpAddr::V6((addr.to_bits() + u128::from(last)).into()),
    }
}

fn enter(namespace: &str) -> Result<()> {
    let file = File::open(Path::new("/run/netns").join(namespace)).context("could not open the namespace")?;
    setns(file, CloneFlags::CLONE_NEWNET).context("could not enter the namespace")
}

fn command(program: &str, args: &[&str]) -> Result<String> {
    let output = Command::new(program).args(args).output().with_context(|| format!("could not start {program}"))?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {}: {stderr}", args.join(" "));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A web server that answers 200 to `/ok` and 404 to all else, and writes what Traefik would write about it.
#[derive(Debug)]
pub struct Server {
    log: Arc<Mutex<File>>,
    requests: Arc<AtomicU32>,
}

impl Server {
    /// Listens in `namespace` on all addresses and appends to `log`. Its threads end with the process.
    pub fn start(namespace: &Namespace, log: &Path) -> Result<Self> {
        let file = File::options().create(true).append(true).open(log).context("could not open the log")?;
        let server = Self { log: Arc::new(Mutex::new(file)), requests: Arc::default() };
        let listener = namespace.within(|| Ok(TcpListener::bind(("::", PORT))?))?;
        let (log, requests) = (Arc::clone(&server.log), Arc::clone(&server.requests));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (log, requests) = (Arc::clone(&log), Arc::clone(&requests));
                std::thread::spawn(move || serve(stream, &log, &requests));
            }
        });
        Ok(server)
    }

    /// Requests answered so far.
    pub fn requests(&self) -> u32 {
        self.requests.load(Ordering::Relaxed)
    }
}

/// Answers requests on one connection until it ends.
fn serve(mut stream: TcpStream, log: &Mutex<File>, requests: &AtomicU32) -> Result<()> {
    let peer = stream.peer_addr()?.ip().to_canonical();
    while let Some(path) = read_request(&mut stream)? {
        let start = Clock::system().now().as_nanos();
        let status = if path == "/ok" { 200 } else { 404 };
        let count = requests.fetch_add(1, Ordering::Relaxed) + 1;
        let mut access = Access::new(start, peer, status, path);
        access.count = u64::from(count);
        stream.write_all(format!("HTTP/1.1 {status} X\r\nContent-Length: 0\r\n\r\n").as_bytes())?;
        // One write: a line is never seen in halves.
        let line = format!("{}\n", access.render_json());
        if let Ok(mut log) = log.lock() {
            log.write_all(line.as_bytes())?;
        }
    }
    Ok(())
}

/// The path of the next request; `None` when the client is gone.
fn read_request(stream: &mut TcpStream) -> Result<Option<String>> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        ensure!(head.len() < HEAD_BYTES_MAX, "a request's head is too long");
        if stream.read(&mut byte)? == 0 {
            return Ok(None);
        }
        head.push(byte[0]);
    }
    let head = String::from_utf8(head)?;
    Ok(head.split(' ').nth(1).map(str::to_owned))
}

/// One connection of a client, kept open.
#[derive(Debug)]
pub struct Connection(TcpStream);

impl Connection {
    /// Connects from `namespace`; fails when nothing answers.
    pub fn open(namespace: &Namespace, server: IpAddr) -> Result<Self> {
        let stream = namespace.within(|| Ok(TcpStream::connect_timeout(&SocketAddr::new(server, PORT), SILENCE)?))?;
        stream.set_read_timeout(Some(SILENCE))?;
        Ok(Self(stream))
    }

    /// Asks for `path`; the status, or an error when no answer comes.
    pub fn get(&mut self, path: &str) -> Result<u16> {
        self.0.write_all(format!("GET {path} HTTP/1.1\r\nHost: shop.example.net\r\n\r\n").as_bytes())?;
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") {
            ensure!(self.0.read(&mut byte).context("no answer")? == 1, "the server hung up");
            head.push(byte[0]);
        }
        let head = String::from_utf8(head)?;
        head.get(9..12).and_then(|status| status.parse().ok()).context("no status")
    }
}

/// One request on a connection of its own.
pub fn get(namespace: &Namespace, server: IpAddr, path: &str) -> Result<u16> {
    Connection::open(namespace, server)?.get(path)
}
