//! What 100,000 bans cost in each back end: to load at start, to add and to remove one, and every packet of others; beside
//! fail2ban's way, a rule a ban.

use std::fs::File;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use proto::time::Clock;
use tests::portcullis::{Service, wait_until};

use crate::host::Host;
use crate::latency::bad_lines;
use crate::table::{Numbers, number, render};

/// Bans that stand.
const BANS: u32 = 100_000;
/// Bans added to them, and removed, one at a time.
const SAMPLES: u32 = 100;
/// Rules of fail2ban's way, and of those how many are timed.
const PEER_BANS: [u32; 2] = [1_000, 10_000];
const PEER_SAMPLES: u32 = 30;
/// Packets of one round, and rounds before and with the bans.
const PACKETS: u32 = 100_000;
const ROUNDS: usize = 9;
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
    /// Milliseconds until all were in the kernel; NaN where they were not added by the way itself.
    load: f64,
    /// Milliseconds each.
    added: Numbers,
    removed: Numbers,
    /// Packets a second, to no bans.
    ratio: f64,
    /// The same with a ban of each length from /16 to /32; NaN where that makes no difference.
    lengths: f64,
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
    let header = ["bans (ms)", "load", "add p50", "p99", "remove p50", "p99", "packets/s to none", "with /16 to /32"];
    let row = |one: &Measured| {
        let at = |numbers: &Numbers, percent| number(numbers.percentile(percent));
        let (added, removed) = (&one.added, &one.removed);
        let name = one.name.clone();
        [
            name,
            number(one.load),
            at(added, 50),
            at(added, 99),
            at(removed, 50),
            at(removed, 99),
            number(one.ratio),
            number(one.lengths),
        ]
    };
    println!("{}", render(header, &all.iter().map(row).collect::<Vec<_>>()));
    let line = |one: &Measured| {
        let (load, added) = (number(one.load), number(one.added.median()));
        format!("{}: loaded in {load} ms, one more in {added} ms, packets/s {} of none", one.name, number(one.ratio))
    };
    Ok(all.iter().map(line).collect())
}

fn measure(folder: &Path, backend: &str) -> Result<Measured> {
    let host = Host::new(folder)?;
    let packets = Packets::new(&host)?;
    let before = packets.rounds()?;
    let config = format!("{RULE}[enforce.firewall]\nbackend = \"{backend}\"\n");
    let service = host.start_portcullis(&config)?;
    let mut log = File::options().append(true).open(host.log()).context("could not open the log")?;
    let addresses: Vec<IpAddr> = (0..BANS).map(address).collect();
    log.write_all(bad_lines(&addresses).as_bytes()).context("could not write to the log")?;
    wait_for_members(&host, BANS)?;
    service.stop()?;
    // As after a reboot: the bans are known, and the kernel holds none.
    let config = host.folder.join("portcullis.toml").display().to_string();
    let binary = tests::portcullis::binary()?.display().to_string();
    host.server.run(&binary, &["enforce", "--teardown", "-c", &config])?;
    let service = Service::start(&host.folder, host.server.name())?;
    wait_for_members(&host, BANS)?;
    let (_, load) = applied(&host)?;
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
    let ratio = packets.rounds()?.median() / before.median();
    for prefix in 16..32u32 {
        let net = Ipv4Addr::from_bits(FIRST + (prefix << 20));
        service.verb(&["ban", &format!("{net}/{prefix}"), "--for", "1h"])?.expect(0)?;
    }
    wait_for_members(&host, BANS + 16)?;
    let lengths = packets.rounds()?.median() / before.median();
    service.stop()?;
    let name = if backend == "iptables" { "iptables with ipset" } else { backend };
    let name = format!("{name}, {} bans", number(f64::from(BANS)));
    Ok(Measured { name, load, added: Numbers::new(added), removed: Numbers::new(removed), ratio, lengths })
}

/// As fail2ban does it: a process and a rule a ban.
fn measure_rules(folder: &Path, variant: &str, bans: u32) -> Result<Measured> {
    let host = Host::new(folder)?;
    let packets = Packets::new(&host)?;
    let before = packets.rounds()?;
    let program = format!("iptables-{variant}");
    let rule = |n: u32| format!("-s {}/32 -j DROP", address(n));
    let call = |change: &str, n: u32| -> Result<f64> {
        let arguments = format!("-w {change} INPUT {}", rule(n));
        let clock = Clock::system();
        let begin = clock.now();
        host.server.run(&program, &arguments.split(' ').collect::<Vec<_>>())?;
        Ok(clock.now().since(begin).as_secs_f64() * 1e3)
    };
    let lines: String = (0..bans).map(|n| format!("-A INPUT {}\n", rule(n))).collect();
    let path = host.folder.join("rules");
    std::fs::write(&path, format!("*filter\n{lines}COMMIT\n")).context("could not write rules")?;
    host.server.run(&format!("{program}-restore"), &["--noflush", &path.display().to_string()])?;
    let added = (bans..bans + PEER_SAMPLES).map(|n| call("-I", n)).collect::<Result<Vec<_>>>()?;
    let removed = (bans..bans + PEER_SAMPLES).map(|n| call("-D", n)).collect::<Result<Vec<_>>>()?;
    let ratio = packets.rounds()?.median() / before.median();
    let name = format!("a rule a ban ({variant}), {}", number(f64::from(bans)));
    Ok(Measured {
        name,
        load: f64::NAN,
        added: Numbers::new(added),
        removed: Numbers::new(removed),
        ratio,
        lengths: f64::NAN,
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

/// Sends packets from the client's namespace to the server's, whose kernel looks each up before the sender goes on.
struct Packets {
    sender: UdpSocket,
    receiver: UdpSocket,
}

impl Packets {
    fn new(host: &Host) -> Result<Self> {
        let server = host.address();
        let receiver = host.server.within(|| Ok(UdpSocket::bind((server, 0))?))?;
        let sender = host.client.within(|| Ok(UdpSocket::bind("0.0.0.0:0")?))?;
        sender.connect(receiver.local_addr()?)?;
        receiver.set_read_timeout(Some(Duration::from_secs(1)))?;
        Ok(Self { sender, receiver })
    }

    /// Packets a second, of several rounds.
    fn rounds(&self) -> Result<Numbers> {
        let clock = Clock::system();
        let mut rates = Vec::new();
        for _ in 0..ROUNDS {
            let begin = clock.now();
            for _ in 0..PACKETS {
                self.sender.send(&[0; 64]).context("could not send a packet")?;
            }
            rates.push(f64::from(PACKETS) / clock.now().since(begin).as_secs_f64());
        }
        // What the receiver has no room for is dropped behind the rules; some must have come.
        ensure!(self.receiver.recv(&mut [0; 64]).is_ok(), "no packet arrived");
        Ok(Numbers::new(rates))
    }
}
