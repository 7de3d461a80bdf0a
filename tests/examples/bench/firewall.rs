//! What 100,000 bans cost in each back end: to load at start, to add and to remove one, and the packets and requests of others;
//! beside fail2ban's way, a rule and a process a ban.

use std::fs::File;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use proto::time::Clock;
use tests::portcullis::{Service, wait_until};

use crate::host::Host;
use crate::latency::bad_lines;
use crate::requests;
use crate::table::{Numbers, number, render};

/// Bans that stand.
const BANS: u32 = 100_000;
/// Bans added to them, and removed, one at a time.
const SAMPLES: u32 = 100;
/// Rules of fail2ban's way, and of those how many are timed.
const PEER_BANS: [u32; 2] = [1_000, 10_000];
const PEER_SAMPLES: u32 = 30;
/// Loads of all bans into an empty kernel.
const LOADS: usize = 5;
/// Packets of one round, and rounds with and without bans. Requests vary more from round to round.
const PACKETS: u32 = 100_000;
const ROUNDS: usize = 9;
const ROUNDS_OF_REQUESTS: usize = 41;
/// For 100,000 bans to be decided and put in force.
const PATIENCE: Duration = Duration::from_secs(120);
/// The first banned address; nobody sends packets from there.
const FIRST: u32 = 0x2d00_0000;
/// Whoever asks once for something that is not there is banned.
const RULE: &str = "[detect.rules.forceful-browsing]\nmatch = \"Status(`404`)\"\nmax_retry = 1\nfind_time = \"1m\"\n\
                    ban_time = \"1h\"\n[detect.rules.auth-brute-force]\nenabled = false\n";

/// One way to ban.
struct Measured {
    name: String,
    /// Milliseconds until all were in the kernel.
    load: Numbers,
    /// Milliseconds each.
    added: Numbers,
    removed: Numbers,
    /// What gets through, to no bans.
    others: Others,
    /// Packets with a ban of each length from /16 to /32; none where that makes no difference.
    lengths: Numbers,
}

/// Measures all, prints the table, and returns the lines of the summary.
pub(crate) fn run(folder: &Path) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for backend in ["iptables", "nftables"] {
        all.push(measure(&folder.join(backend), backend)?);
    }
    for variant in ["nft", "legacy"] {
        for bans in PEER_BANS {
            all.push(measure_rules(&folder.join(format!("{variant}-{bans}")), variant, bans)?);
        }
    }
    let header = [
        "bans (ms)",
        "load",
        "add p50",
        "p99",
        "remove p50",
        "p99",
        "packets/s to none",
        "with /16 to /32",
        "requests/s to none",
    ];
    let row = |one: &Measured| {
        let at = |numbers: &Numbers, percent| number(numbers.percentile(percent));
        let spread = |numbers: &Numbers| if numbers.count() == 0 { "-".to_owned() } else { numbers.spread(number) };
        let (added, removed) = (&one.added, &one.removed);
        [
            one.name.clone(),
            spread(&one.load),
            at(added, 50),
            at(added, 99),
            at(removed, 50),
            at(removed, 99),
            spread(&one.others.packets),
            spread(&one.lengths),
            spread(&one.others.requests),
        ]
    };
    println!("{}", render(header, &all.iter().map(row).collect::<Vec<_>>()));
    let line = |one: &Measured| {
        let [load, added, packets, requests] =
            [&one.load, &one.added, &one.others.packets, &one.others.requests].map(|numbers| number(numbers.median()));
        let name = &one.name;
        format!(
            "{name}: loaded in {load} ms, one more in {added} ms, packets/s {packets} and requests/s {requests} of none"
        )
    };
    Ok(all.iter().map(line).collect())
}

fn measure(folder: &Path, backend: &str) -> Result<Measured> {
    let host = Host::new(folder)?;
    let others = Way::new(folder, &host)?;
    let config = format!("{RULE}[enforce.firewall]\nbackend = \"{backend}\"\n");
    let mut service = host.start_portcullis(&config)?;
    let mut log = File::options().append(true).open(host.log()).context("could not open the log")?;
    let addresses: Vec<IpAddr> = (0..BANS).map(address).collect();
    log.write_all(bad_lines(&addresses).as_bytes()).context("could not write to the log")?;
    wait_for_members(&host, BANS)?;
    let mut loads = Vec::new();
    for _ in 0..LOADS {
        service.stop()?;
        // As after a reboot: the bans are known, and the kernel holds none.
        let config = host.folder.join("portcullis.toml").display().to_string();
        let binary = tests::portcullis::binary()?.display().to_string();
        host.server.run(&binary, &["enforce", "--teardown", "-c", &config])?;
        service = Service::start(&host.folder, host.server.name())?;
        wait_for_members(&host, BANS)?;
        loads.push(applied(&host)?.1);
    }
    let (mut added, mut removed) = (Vec::new(), Vec::new());
    for n in BANS..BANS + SAMPLES {
        let before = applied(&host)?;
        log.write_all(bad_lines(&[address(n)]).as_bytes()).context("could not write to the log")?;
        added.push(wait_for_batch(&host, before)?);
    }
    for n in (BANS..BANS + SAMPLES).rev() {
        let before = applied(&host)?;
        service.verb(&["unban", &address(n).to_string()])?.expect(0)?;
        removed.push(wait_for_batch(&host, before)?);
    }
    let ratios = others.ratios()?;
    for prefix in 16..32u32 {
        let net = Ipv4Addr::from_bits(FIRST + (prefix << 20));
        service.verb(&["ban", &format!("{net}/{prefix}"), "--for", "1h"])?.expect(0)?;
    }
    wait_for_members(&host, BANS + 16)?;
    let lengths = others.packets()?;
    service.stop()?;
    let name = if backend == "iptables" { "iptables with ipset" } else { backend };
    let name = format!("{name}, {} bans", number(f64::from(BANS)));
    let (load, added, removed) = (Numbers::new(loads), Numbers::new(added), Numbers::new(removed));
    Ok(Measured { name, load, added, removed, others: ratios, lengths })
}

/// As fail2ban does it: a process and a rule a ban.
fn measure_rules(folder: &Path, variant: &str, bans: u32) -> Result<Measured> {
    let host = Host::new(folder)?;
    let others = Way::new(folder, &host)?;
    let program = format!("iptables-{variant}");
    let rule = |n: u32| format!("-s {}/32 -j DROP", address(n));
    let call = |change: &str, n: u32| -> Result<f64> {
        let arguments = format!("-w {change} INPUT {}", rule(n));
        let clock = Clock::system();
        let begin = clock.now();
        host.server.run(&program, &arguments.split(' ').collect::<Vec<_>>())?;
        Ok(clock.now().since(begin).as_secs_f64() * 1e3)
    };
    let load = (0..bans).map(|n| call("-I", n)).sum::<Result<f64>>()?;
    let added = (bans..bans + PEER_SAMPLES).map(|n| call("-I", n)).collect::<Result<Vec<_>>>()?;
    let removed = (bans..bans + PEER_SAMPLES).map(|n| call("-D", n)).collect::<Result<Vec<_>>>()?;
    Ok(Measured {
        name: format!("a rule a ban ({variant}), {}", number(f64::from(bans))),
        load: Numbers::new([load]),
        added: Numbers::new(added),
        removed: Numbers::new(removed),
        others: others.ratios()?,
        lengths: Numbers::new([]),
    })
}

fn address(n: u32) -> IpAddr {
    IpAddr::V4(Ipv4Addr::from_bits(FIRST + n))
}

fn wait_for_members(host: &Host, bans: u32) -> Result<()> {
    let held = || host.metric("portcullis_enforce_members").is_some_and(|held| held.round() >= f64::from(bans));
    wait_until("the kernel holds the bans", PATIENCE, || held().then_some(()))
}

/// Batches applied so far, and the milliseconds that they took.
fn applied(host: &Host) -> Result<(f64, f64)> {
    let of = |part: &str| host.metric(&format!("portcullis_enforce_apply_seconds_{part}"));
    let both = of("count").zip(of("sum").map(|seconds| seconds * 1e3));
    both.context("no metric of applied batches")
}

/// What the next batch took, in milliseconds.
fn wait_for_batch(host: &Host, (count, ms): (f64, f64)) -> Result<f64> {
    wait_until("a batch is applied", PATIENCE, || {
        applied(host).ok().filter(|(now, _)| *now > count).map(|(_, total)| total - ms)
    })
}

/// What gets through of others: medians and extremes of pairs of rounds, each with bans to one without, taken in turn.
struct Others {
    packets: Numbers,
    requests: Numbers,
}

/// The way to the host that is measured, and to one without any rule.
struct Way<'a> {
    measured: (&'a Host, Road),
    bare: (Host, Road),
}

impl<'a> Way<'a> {
    fn new(folder: &Path, host: &'a Host) -> Result<Self> {
        let bare = Host::new(&folder.join("bare"))?;
        let road = Road::new(&bare)?;
        Ok(Self { measured: (host, Road::new(host)?), bare: (bare, road) })
    }

    fn ratios(&self) -> Result<Others> {
        let requests = |host: &Host, road: &Road| requests::measure(&host.client, road.service, "");
        Ok(Others { packets: self.packets()?, requests: self.compare(ROUNDS_OF_REQUESTS, requests)? })
    }

    fn packets(&self) -> Result<Numbers> {
        self.compare(ROUNDS, |_, road| road.packets())
    }

    fn compare(&self, rounds: usize, rate: impl Fn(&Host, &Road) -> Result<f64>) -> Result<Numbers> {
        let ratio = |_| Ok(rate(self.measured.0, &self.measured.1)? / rate(&self.bare.0, &self.bare.1)?);
        Ok(Numbers::new((0..rounds).map(ratio).collect::<Result<Vec<_>>>()?))
    }
}

/// From a client to a host.
struct Road {
    sender: UdpSocket,
    receiver: UdpSocket,
    service: SocketAddr,
}

impl Road {
    fn new(host: &Host) -> Result<Self> {
        let server = host.address();
        let receiver = host.server.within(|| Ok(UdpSocket::bind((server, 0))?))?;
        let sender = host.client.within(|| Ok(UdpSocket::bind("0.0.0.0:0")?))?;
        sender.connect(receiver.local_addr()?)?;
        receiver.set_read_timeout(Some(Duration::from_secs(1)))?;
        let service = SocketAddr::new(server, requests::listen(&host.server, 0, requests::answer)?);
        Ok(Self { sender, receiver, service })
    }

    /// Packets a second, which the host's kernel looks up before the sender goes on.
    fn packets(&self) -> Result<f64> {
        let clock = Clock::system();
        let begin = clock.now();
        for _ in 0..PACKETS {
            self.sender.send(&[0; 64]).context("could not send a packet")?;
        }
        let rate = f64::from(PACKETS) / clock.now().since(begin).as_secs_f64();
        // What the receiver has no room for is dropped behind the rules; some must have come.
        ensure!(self.receiver.recv(&mut [0; 64]).is_ok(), "no packet arrived");
        Ok(rate)
    }
}
