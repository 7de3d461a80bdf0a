//! Everything that listens, under everybody who means harm: whatever they send, the good sender beside them is served, memory
//! stays within bounds, and nothing panics.
//!
//! `HOSTILE_SECONDS` is how long random bytes are sent, 5 by default, and `HOSTILE_CONNECTIONS` how many connections are
//! opened, 10,000 by default; a minute and 100,000 are for the desk.

mod tls;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use flate2::Compression;
use flate2::write::GzEncoder;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, socket};
use proto::time::Clock;
use tests::netns::{Namespace, host};
use tests::portcullis::{Service, wait_for, wait_until};
use tests::random::Random;
use tests::tls::{Client, certify};

const NETWORK: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 0));
/// Where the attackers have their addresses; the good sender is at the other end of the veth.
const ATTACKERS: [u8; 4] = [10, 20, 30, 40];
const SYSLOG: u16 = 5514;
const HTTP: u16 = 8514;
const OTLP: u16 = 4318;
/// What the whole process may hold at its worst, in KiB, as `deploy/shippers/README.md` says: 64 MiB of bodies for each of two
/// sources, 64 MiB of messages that have begun, and 64 MiB for lines on their way, connections and the program.
const MEMORY_KIB_MAX: u64 = 256 << 10;
/// Decompressed size of the bomb, in members of 64 MiB.
const BOMB_MEMBERS: usize = 160;
/// Slow senders have gone by then: a body has 30 seconds, and so has a message.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long an answer to the good sender may take before the test gives up on it. Far above what it takes.
const ANSWER_MAX: Duration = Duration::from_secs(20);

/// `tls` is the folder of the certificate, where connections are to be of TLS.
fn config(tls: Option<&Path>) -> String {
    let tls = |name: &str| {
        let files = |folder: &Path| {
            let [cert, key] = ["server.crt", "server.key"].map(|file| folder.join(file).display().to_string());
            format!("[ingest.sources.{name}.tls]\ncert_file = \"{cert}\"\nkey_file = \"{key}\"\n")
        };
        tls.map(files).unwrap_or_default()
    };
    let network = "allowed_senders = [\"198.51.100.0/24\", \"203.0.113.0/24\"]";
    let hear = |port: u16| format!("listen = \"198.51.100.1:{port}\"\n{network}\n");
    let listen = |port: u16| format!("{}idle_timeout = \"10s\"\n", hear(port));
    format!(
        "[ingest.sources.tcp]\ntype = \"syslog\"\nmode = \"tcp\"\n{}\
         [ingest.sources.udp]\ntype = \"syslog\"\nmode = \"udp\"\n{}\
         [ingest.sources.http]\ntype = \"http\"\n{}\
         [ingest.sources.otlp]\ntype = \"otlp\"\n{}{}{}{}",
        listen(SYSLOG),
        hear(SYSLOG),
        listen(HTTP),
        listen(OTLP),
        tls("tcp"),
        tls("http"),
        tls("otlp"),
    )
}

/// A host that listens, and one from which everybody sends.
struct Place {
    server: Namespace,
    senders: Namespace,
    folder: tempfile::TempDir,
    service: Service,
    /// What speaks TLS with it, if that is what it speaks.
    tls: Option<Client>,
}

impl Place {
    fn new() -> Self {
        Self::with(|_| None)
    }

    /// With TLS on all ports for connections.
    fn with_tls() -> Self {
        Self::with(|folder| {
            certify(folder, &[("server", &host(NETWORK, 1).to_string())]).unwrap();
            Some(Client::new(folder).unwrap())
        })
    }

    fn with(tls: impl FnOnce(&Path) -> Option<Client>) -> Self {
        let [server, senders] = [(); 2].map(|()| Namespace::new().unwrap());
        server.join(&senders, &[NETWORK]).unwrap();
        for last in ATTACKERS {
            let device = senders.name();
            senders.run("ip", &["addr", "add", &format!("203.0.113.{last}/32"), "dev", device]).unwrap();
        }
        server.run("ip", &["route", "add", "203.0.113.0/24", "dev", &format!("s{}", senders.name())]).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).display().to_string();
        let tls = tls(folder.path());
        let text = format!(
            "node = \"edge\"\nstate_dir = \"{}\"\n[api]\nsocket = \"{}\"\n[telemetry]\nlog_format = \"json\"\n{}",
            path("state"),
            path("api.sock"),
            config(tls.as_ref().map(|_| folder.path()))
        );
        std::fs::create_dir(folder.path().join("state")).unwrap();
        std::fs::write(folder.path().join("portcullis.toml"), text).unwrap();
        let service = Service::start(folder.path(), server.name()).unwrap();
        // The service answers before its sources do.
        wait_for("the sources listen", || {
            let knock =
                || Ok([SYSLOG, HTTP, OTLP].into_iter().all(|port| TcpStream::connect(self::server(port)).is_ok()));
            senders.within(knock).ok()?.then_some(())
        })
        .unwrap();
        Self { server, senders, folder, service, tls }
    }

    fn peak_kib(&self) -> u64 {
        let pids = self.server.run("ip", &["netns", "pids", self.server.name()]).unwrap();
        let status = pids.split_whitespace().find_map(|pid| {
            let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
            (comm.trim() == "portcullis").then(|| std::fs::read_to_string(format!("/proc/{pid}/status")).ok())?
        });
        let status = status.expect("the service runs");
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        peak.split_whitespace().next().unwrap().parse().unwrap()
    }

    /// One good line over HTTP, and the answer's status.
    fn send_good(&self, client: u32) -> Result<String> {
        let stream = TcpStream::connect_timeout(&server(HTTP), ANSWER_MAX)?;
        stream.set_read_timeout(Some(ANSWER_MAX))?;
        match &self.tls {
            Some(tls) => post_good(tls.connect(stream)?, client),
            None => post_good(stream, client),
        }
    }
}

fn server(port: u16) -> SocketAddr {
    SocketAddr::new(host(NETWORK, 1), port)
}

/// A connection from an attacker's address.
fn attacker(random: &mut Random, port: u16) -> Result<TcpStream> {
    let from = SocketAddr::new(IpAddr::from([203, 0, 113, random.pick(&ATTACKERS)]), 0);
    let fd = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    bind(std::os::fd::AsRawFd::as_raw_fd(&fd.as_fd()), &SockaddrStorage::from(from))?;
    connect(std::os::fd::AsRawFd::as_raw_fd(&fd.as_fd()), &SockaddrStorage::from(server(port)))?;
    let stream = TcpStream::from(fd);
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    stream.set_write_timeout(Some(Duration::from_secs(2)))?;
    Ok(stream)
}

fn post_good(mut stream: impl Read + Write, client: u32) -> Result<String> {
    let client = Ipv4Addr::from(0xc633_0000 + client);
    let line = format!(
        "{{\"ClientAddr\":\"{client}:1\",\"DownstreamStatus\":404,\"RequestMethod\":\"GET\",\"RequestPath\":\"/x\"}}"
    );
    let head = format!(
        "POST / HTTP/1.1\r\nHost: edge\r\nContent-Type: application/x-ndjson\r\nConnection: close\r\n\
         Content-Length: {}\r\n\r\n",
        line.len()
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(line.as_bytes())?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    Ok(answer.split_whitespace().nth(1).unwrap_or_default().to_owned())
}

/// Says that it is over when dropped, in a panic too: who waits for it would wait for ever.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Serves the good sender while `attack` lasts: all its answers must be 200, and memory within bounds. Returns how long answers
/// took, for the reader.
fn serve_beside(place: &Place, attack: impl FnOnce() + Send) -> String {
    let over = AtomicBool::new(false);
    let took = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        let good = scope.spawn(|| {
            place.senders.within(|| {
                let clock = Clock::system();
                let mut client = 0;
                while !over.load(Ordering::Relaxed) || client < 5 {
                    let begin = clock.now();
                    let status =
                        place.send_good(client).with_context(|| format!("the good sender, request {client}"))?;
                    ensure!(status == "200", "the good sender was answered {status:?} in request {client}");
                    took.lock().unwrap().push(clock.now().since(begin));
                    client += 1;
                    std::thread::sleep(Duration::from_millis(50));
                }
                Ok(())
            })
        });
        let ends = Ends(&over);
        attack();
        drop(ends);
        good.join().unwrap().unwrap();
    });
    let mut took = took.into_inner().unwrap();
    took.sort();
    let at = |percent: usize| took[(took.len() - 1) * percent / 100];
    let peak = place.peak_kib();
    assert!(peak <= MEMORY_KIB_MAX, "{peak} KiB");
    let (count, p50, p99, max) = (took.len(), at(50), at(99), at(100));
    format!("{count} good requests, p50 {p50:?}, p99 {p99:?}, max {max:?}; peak {peak} KiB")
}

/// Waits until none of these connections is open any more, while each has another byte to say now and then.
fn wait_let_go(mut slow: Vec<TcpStream>) -> Result<()> {
    wait_until("all slow senders are let go", PATIENCE, || {
        std::thread::sleep(Duration::from_millis(500));
        slow.retain_mut(|stream| {
            let told = stream.write(b"a");
            let end = stream.read(&mut [0; 512]);
            let is_silent = matches!(&end, Err(error) if error.kind() == std::io::ErrorKind::WouldBlock);
            told.is_ok() && (is_silent || end.is_ok_and(|bytes| bytes > 0))
        });
        slow.is_empty().then_some(())
    })
}

/// Random bytes, some of which begin like what is expected.
fn random_bytes(random: &mut Random) -> Vec<u8> {
    let begin: &[&[u8]] = &[
        b"",
        b"<34>1 ",
        b"999999999 <34>",
        b"65535 {",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9999\r\n\r\n",
        b"POST /v1/logs HTTP/1.1\r\nHost: a\r\nContent-Type: application/x-protobuf\r\nContent-Length: 500\r\n\r\n\x0a\xff\xff\x7f",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\nffffffff\r\n\x1f\x8b",
        b"\x16\x03\x01\x02\x00",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"{\"log\":\"{\\\"log\\\":\\\"",
    ];
    let mut bytes = begin[usize::try_from(random.below(begin.len() as u64)).unwrap()].to_vec();
    let count = random.below(2000);
    bytes.extend((0..count).map(|_| random.below(256) as u8));
    bytes
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.parse().unwrap())
}

/// Has four attackers `throw` something at any of the ports, again and again. Returns what is to be read of it.
fn pelt(place: &Place, throw: impl Fn(&mut Random, u16) + Sync) -> String {
    let clock = Clock::system();
    let thrown = AtomicU64::new(0);
    let served = serve_beside(place, || {
        let end = clock.now().saturating_add(Duration::from_secs(setting("HOSTILE_SECONDS", 5)));
        std::thread::scope(|scope| {
            for seed in 0..4 {
                let (throw, thrown, clock) = (&throw, &thrown, clock.clone());
                scope.spawn(move || {
                    place.senders.within(move || {
                        let mut random = Random::new(seed);
                        while clock.now() < end {
                            let port = random.pick(&[SYSLOG, HTTP, OTLP]);
                            throw(&mut random, port);
                            thrown.fetch_add(1, Ordering::Relaxed);
                        }
                        Ok(())
                    })
                });
            }
        });
    });
    format!("{} pieces; {served}", thrown.into_inner())
}

#[test]
fn random_bytes_on_every_port_harm_nobody() {
    let place = Place::new();
    let told = pelt(&place, |random, port| {
        let bytes = random_bytes(random);
        // A refusal is what they are there for.
        if let Ok(mut stream) = attacker(random, port) {
            let _refused = stream.write_all(&bytes);
            if random.chance(10) {
                let _refused = stream.read(&mut [0; 512]);
            }
        }
        let udp = UdpSocket::bind((Ipv4Addr::from([203, 0, 113, ATTACKERS[0]]), 0)).unwrap();
        let _refused = udp.send_to(&bytes[..bytes.len().min(1400)], server(SYSLOG));
    });
    println!("{told}");
    place.service.stop().unwrap();
}

#[test]
fn any_number_of_connections_is_refused_politely() {
    let place = Place::new();
    let connections = setting("HOSTILE_CONNECTIONS", 10_000);
    let refused = AtomicU64::new(0);
    let served = serve_beside(&place, || {
        std::thread::scope(|scope| {
            for seed in 0..4 {
                let (place, refused) = (&place, &refused);
                scope.spawn(move || {
                    place.senders.within(move || {
                        let mut random = Random::new(seed);
                        let mut kept = Vec::new();
                        for n in 0..connections / 4 {
                            let port = random.pick(&[SYSLOG, HTTP, OTLP]);
                            match attacker(&mut random, port) {
                                // The first are kept open, the others only knock.
                                Ok(stream) if n < 500 => kept.push(stream),
                                Ok(_) => {}
                                Err(_) => drop(refused.fetch_add(1, Ordering::Relaxed)),
                            }
                        }
                        Ok(())
                    })
                });
            }
        });
    });
    println!("{} could not connect at all; {served}", refused.into_inner());
    place.service.stop().unwrap();
}

#[test]
fn who_sends_a_byte_now_and_then_is_let_go() {
    let place = Place::new();
    let served = serve_beside(&place, || {
        place
            .senders
            .within(|| {
                let mut random = Random::new(1);
                let begin: [(u16, &[u8]); 4] = [
                    (SYSLOG, b"500 <34>1 "),
                    (HTTP, b"POST / HTTP/1.1\r\nHost: a\r\nX: "),
                    (HTTP, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n"),
                    (OTLP, b"POST /v1/logs HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n"),
                ];
                let mut slow = Vec::new();
                for n in 0..120 {
                    let (port, bytes) = begin[n % begin.len()];
                    let mut stream = attacker(&mut random, port)?;
                    // What is over its share is closed at once.
                    if stream.write_all(bytes).is_ok() {
                        stream.set_nonblocking(true)?;
                        slow.push(stream);
                    }
                }
                wait_let_go(slow)
            })
            .unwrap();
    });
    println!("{served}");
    place.service.stop().unwrap();
}

#[test]
fn a_bomb_of_ten_gigabytes_costs_no_more_than_its_bound() {
    let mut member = GzEncoder::new(Vec::new(), Compression::fast());
    for _ in 0..64 {
        member.write_all(&vec![b'a'; 1 << 20]).unwrap();
    }
    let member = member.finish().unwrap();
    let place = Place::new();
    let before = place.peak_kib();
    let served = serve_beside(&place, || {
        place
            .senders
            .within(|| {
                let mut random = Random::new(1);
                let length = member.len() * BOMB_MEMBERS;
                for (port, path) in [(HTTP, "/"), (OTLP, "/v1/logs"), (HTTP, "/")] {
                    let mut stream = attacker(&mut random, port)?;
                    let head = format!(
                        "POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\n\
                         Content-Length: {length}\r\n\r\n"
                    );
                    stream.write_all(head.as_bytes())?;
                    for _ in 0..BOMB_MEMBERS {
                        if stream.write_all(&member).is_err() {
                            break;
                        }
                    }
                    let mut answer = String::new();
                    // It may have been cut off in the middle.
                    let _cut = stream.read_to_string(&mut answer);
                    ensure!(!answer.contains(" 200 "), "{answer}");
                }
                Ok(())
            })
            .unwrap();
    });
    println!("before {before} KiB; {served}");
    place.service.stop().unwrap();
}
