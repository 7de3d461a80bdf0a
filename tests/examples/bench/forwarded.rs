//! What rules about forwarded clients cost requests on their way from Traefik to a service, through a host that forwards
//! them: rules as `portcullis run` makes them from a log, beside one plain rule a pattern, and none.
//!
//! Sender, service and the kernel between them spend this process's time, so figures are by processor time: what else runs on
//! the machine matters little.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use proto::time::Clock;
use tests::access::{Access, SECOND};
use tests::netns::{Namespace, host};

use crate::host::Host;
use crate::process::cpu_of_self;
use crate::table::{Numbers, number, render, to_f64};

/// Clients refused at once.
const CLIENTS: [u32; 5] = [10, 50, 100, 200, 1_000];
/// Beyond that plain rules leave nothing to measure.
const PLAIN_MAX: u32 = 200;
/// Failures that ban a client.
const FAILURES: i64 = 15;
/// What joins the host and the service.
const NETWORK: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 8));
/// Who delivers the requests.
const PROXY: IpAddr = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 1));
const REQUESTS_PORT: u16 = 8_080;
const BULK_PORT: u16 = 8_081;
/// Connections that ask, each for the next answer after the last.
const CONNECTIONS: usize = 4;
/// One figure takes that long.
const SPAN: Duration = Duration::from_millis(500);
const ROUNDS: usize = 5;
const BULK_BYTES: usize = 256 << 10;
const LOOK: Duration = Duration::from_millis(20);
/// Who is not through by then never will be.
const PATIENCE: Duration = Duration::from_secs(60);
/// `iptables-restore`, with these rules in table filter and no others.
const NONE: &str = "*filter\n:FORWARD ACCEPT [0:0]\nCOMMIT\n";

/// One arrangement of rules.
struct Arrangement {
    name: String,
    rules: String,
    requests: Vec<f64>,
    bulk: Vec<f64>,
}

/// Measures, prints the table, and returns the lines of the summary.
pub(crate) fn run(folder: &Path) -> Result<Vec<String>> {
    let bench = Way::new(&folder.join("forwarded"))?;
    let mut all = bench.arrangements()?;
    let mut plain = Vec::new();
    for _ in 0..ROUNDS {
        for arrangement in &mut all {
            bench.load(NONE)?;
            let (requests, bulk) = (bench.requests()?, bench.bulk()?);
            bench.load(&arrangement.rules)?;
            arrangement.requests.push(bench.requests()? / requests);
            arrangement.bulk.push(bench.bulk()? / bulk);
            plain.push(requests);
        }
    }
    let row = |arrangement: &Arrangement| {
        let spread = |values: &Vec<f64>| Numbers::new(values.iter().copied()).spread(number);
        [arrangement.name.clone(), spread(&arrangement.requests), spread(&arrangement.bulk)]
    };
    let rows: Vec<[String; 3]> = all.iter().map(row).collect();
    let header =
        ["forwarded clients refused", "requests by processor time, ratio to none", "bytes of an upload, ratio"];
    println!("{}", render(header, &rows));
    let none = number(Numbers::new(plain).median());
    let medians = all.iter().map(|arrangement| {
        format!("{} {}", arrangement.name, number(Numbers::new(arrangement.requests.iter().copied()).median()))
    });
    let medians: Vec<String> = medians.collect();
    Ok(vec![format!(
        "forwarded: {none} requests a second of processor time without rules; ratios: {}",
        medians.join(", ")
    )])
}

/// Traefik's namespace, the host, the service's.
struct Way {
    host: Host,
    service: SocketAddr,
    _namespace: Namespace,
}

impl Way {
    fn new(folder: &Path) -> Result<Self> {
        let (host_side, namespace) = (Host::new(folder)?, Namespace::new()?);
        host_side.server.join(&namespace, &[NETWORK])?;
        host_side.server.run("sysctl", &["-qw", "net.ipv4.ip_forward=1"])?;
        let via = host(NETWORK, 1).to_string();
        namespace.run("ip", &["route", "add", "default", "via", &via])?;
        let via = host_side.address().to_string();
        host_side.client.run("ip", &["route", "add", "default", "via", &via])?;
        let service = SocketAddr::new(host(NETWORK, 2), REQUESTS_PORT);
        for (port, serve) in [(REQUESTS_PORT, answer as fn(TcpStream)), (BULK_PORT, swallow)] {
            let listener =
                namespace.within(|| Ok(TcpListener::bind(("0.0.0.0", port))?)).context("could not listen")?;
            // They end with the process.
            std::thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    std::thread::spawn(move || serve(stream));
                }
            });
        }
        Ok(Self { host: host_side, service, _namespace: namespace })
    }

    /// Rules for each number of clients, made by the service, and the same patterns in one rule each.
    fn arrangements(&self) -> Result<Vec<Arrangement>> {
        let service = self.host.start_portcullis(&format!(
            "[ingest.client_ip]\ntrusted_proxies = [\"{PROXY}\"]\ncdn_headers = {{}}\n[enforce.firewall]\nbackend = \"none\"\n\
             [enforce.forwarded_for]\nenabled = true\nchains = [\"FORWARD\"]\nrules_max = 10000\n"
        ))?;
        let (mut tree, mut plain) = (Vec::new(), Vec::new());
        let mut banned = 0;
        for clients in CLIENTS {
            self.ban(banned..clients)?;
            banned = clients;
            self.wait_for(clients)?;
            let rules = self.host.server.run("iptables-nft-save", &["-t", "filter"])?;
            let arrangement = |name: String, rules| Arrangement { name, rules, requests: Vec::new(), bulk: Vec::new() };
            if clients <= PLAIN_MAX {
                let leaves = rules.lines().filter(|line| line.contains("-j REJECT"));
                let leaves: Vec<&str> = leaves.filter_map(|line| Some(line.split_once(" -p tcp ")?.1)).collect();
                let text: String = leaves.iter().map(|leaf| format!("-A FORWARD -p tcp {leaf}\n")).collect();
                let name = format!("{clients}, {} plain rules", leaves.len());
                plain.push(arrangement(name, NONE.replace("COMMIT", &format!("{text}COMMIT"))));
            }
            tree.push(arrangement(clients.to_string(), rules));
        }
        service.stop()?;
        tree.extend(plain);
        Ok(tree)
    }

    /// Writes what bans these clients.
    fn ban(&self, clients: std::ops::Range<u32>) -> Result<()> {
        let now = Clock::system().now().as_nanos();
        let mut lines = String::new();
        for client in clients {
            let mixed = client.wrapping_mul(2_654_435_761).to_be_bytes();
            let addr = Ipv4Addr::new(11 + mixed[0] % 80, mixed[1], mixed[2], mixed[3]);
            for n in 0..FAILURES {
                let mut access = Access::new(now - (20 - n) * SECOND / 10, PROXY, 404, format!("/{n}"));
                access.forwarded_for = Some(addr.to_string());
                access.count = u64::from(client) * 100 + u64::try_from(n)?;
                writeln!(lines, "{}", access.render_json())?;
            }
        }
        let mut log = File::options().append(true).open(self.host.log()).context("could not open the log")?;
        log.write_all(lines.as_bytes()).context("could not append to the log")
    }

    fn wait_for(&self, clients: u32) -> Result<()> {
        let clock = Clock::system();
        let begin = clock.now();
        loop {
            let refused = self.host.metric("portcullis_forwarded_clients");
            if refused == Some(f64::from(clients)) {
                return Ok(());
            }
            ensure!(clock.now().since(begin) < PATIENCE, "{refused:?} clients are refused instead of {clients}");
            std::thread::sleep(LOOK);
        }
    }

    fn load(&self, rules: &str) -> Result<()> {
        let path = self.host.folder.join("rules");
        std::fs::write(&path, rules).context("could not write rules")?;
        self.host.server.run("iptables-nft-restore", &[&path.display().to_string()])?;
        Ok(())
    }

    /// Requests answered a second of processor time, with a head as Traefik writes it.
    fn requests(&self) -> Result<f64> {
        let request = format!(
            "GET /products/12345?color=blue HTTP/1.1\r\nHost: shop.example.net\r\nUser-Agent: Mozilla/5.0 (X11; Linux \
             x86_64; rv:128.0) Gecko/20100101 Firefox/128.0\r\nAccept: text/html,application/xhtml+xml\r\nCookie: \
             session={}\r\nX-Forwarded-For: 100.127.4.7, {PROXY}\r\nX-Forwarded-Host: shop.example.net\r\n\
             X-Forwarded-Port: 443\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Server: edge-1\r\nX-Real-Ip: {PROXY}\r\n\
             Accept-Encoding: gzip\r\n\r\n",
            "0123456789abcdef".repeat(8)
        );
        self.through(CONNECTIONS, self.service, |stream| {
            stream.write_all(request.as_bytes()).ok()?;
            stream.read_exact(&mut [0; ANSWER.len()]).ok().map(|()| 1)
        })
    }

    /// Bytes sent on one connection, a second of processor time.
    fn bulk(&self) -> Result<f64> {
        let bytes = vec![b'x'; BULK_BYTES];
        let to = SocketAddr::new(self.service.ip(), BULK_PORT);
        self.through(1, to, |stream| stream.write_all(&bytes).ok().map(|()| u64::try_from(BULK_BYTES).unwrap_or(0)))
    }

    /// What `step` adds up to in a second of processor time.
    fn through(
        &self,
        connections: usize,
        to: SocketAddr,
        step: impl Fn(&mut TcpStream) -> Option<u64> + Sync,
    ) -> Result<f64> {
        let (done, stop) = (AtomicU64::new(0), AtomicBool::new(false));
        let connect = || (0..connections).map(|_| Ok(TcpStream::connect(to)?)).collect::<Result<Vec<TcpStream>>>();
        let streams = self.host.client.within(connect).context("could not reach the service")?;
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
}

const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\nok";

/// Answers each head of a request.
fn answer(mut stream: TcpStream) {
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

fn swallow(mut stream: TcpStream) {
    let mut bytes = vec![0; BULK_BYTES];
    while let Ok(1..) = stream.read(&mut bytes) {}
}
