//! What rules about forwarded clients cost requests on their way from Traefik to a service, through a host that forwards
//! them: rules as `portcullis run` makes them from a log, beside one plain rule a pattern, and none.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use proto::time::Clock;
use tests::access::{Access, SECOND};
use tests::netns::{Namespace, host};

use crate::host::Host;
use crate::requests;
use crate::table::{Numbers, number, render};

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
        requests::listen(&namespace, REQUESTS_PORT, requests::answer)?;
        requests::listen(&namespace, BULK_PORT, swallow)?;
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
        let more = format!(
            "X-Forwarded-For: 100.127.4.7, {PROXY}\r\nX-Forwarded-Host: shop.example.net\r\nX-Forwarded-Port: 443\r\n\
             X-Forwarded-Proto: https\r\nX-Forwarded-Server: edge-1\r\nX-Real-Ip: {PROXY}\r\n"
        );
        requests::measure(&self.host.client, self.service, &more)
    }

    /// Bytes sent on one connection, a second of processor time.
    fn bulk(&self) -> Result<f64> {
        let bytes = vec![b'x'; BULK_BYTES];
        let to = SocketAddr::new(self.service.ip(), BULK_PORT);
        requests::through(&self.host.client, 1, to, |stream| {
            stream.write_all(&bytes).ok().map(|()| u64::try_from(BULK_BYTES).unwrap_or(0))
        })
    }
}

fn swallow(mut stream: TcpStream) {
    let mut bytes = vec![0; BULK_BYTES];
    while let Ok(1..) = stream.read(&mut bytes) {}
}
