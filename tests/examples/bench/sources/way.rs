//! The ways that lines can arrive, and what senders do on each.
//!
//! All that is sent is rendered before the clock starts, so that little of the processor goes to the senders.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream, UdpSocket};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use flate2::Compression;
use flate2::write::GzEncoder;
use proto::time::Clock;
use serde_json::json;
use tests::tls::Client;

/// Lines of one request, as shippers do by default or so.
const REQUEST_LINES: usize = 1_000;
/// What a pipe takes in one piece (`PIPE_BUF`, see pipe(7)), so that lines of several writers do not mix.
const PIPE_BYTES: usize = 4_096;
/// Datagrams a second of all senders together, where they are paced.
const PACE: u32 = 50_000;
/// Lines of a paced run: five seconds.
const PACED_LINES_MAX: usize = 250_000;
/// A paced sender sleeps when it is so much too early.
const PACE_SLACK: Duration = Duration::from_millis(1);
/// Where each way is listened to.
pub(super) const SYSLOG: &str = "127.0.0.1:5514";
pub(super) const SYSLOG_TLS: &str = "127.0.0.1:6514";
pub(super) const HTTP: &str = "127.0.0.1:8514";
pub(super) const OTLP: &str = "127.0.0.1:4318";
pub(super) const NATS: &str = "127.0.0.1:4222";
/// Names in the run's folder.
pub(super) const SOCKET: &str = "log";
pub(super) const FIFO: &str = "input";
/// The subject of the nats source.
pub(super) const SUBJECT: &str = "portcullis.raw.v1.nats";

/// A way in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    File,
    Stdin,
    Stdout,
    SyslogUnix,
    SyslogUdp,
    SyslogUdpPaced,
    SyslogTcp,
    SyslogTls,
    Http,
    HttpGzip,
    OtlpJson,
    OtlpProtobuf,
    Nats,
}

/// What a sender needs to know of where it sends.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target<'a> {
    /// The receiver's folder.
    pub(super) folder: &'a Path,
    /// Speaks TLS with it.
    pub(super) tls: &'a Client,
    /// Number of this sender, and how many there are.
    pub(super) sender: usize,
    pub(super) senders: usize,
}

impl Way {
    pub(super) const ALL: [Self; 13] = [
        Self::File,
        Self::Stdin,
        Self::Stdout,
        Self::SyslogUnix,
        Self::SyslogUdp,
        Self::SyslogUdpPaced,
        Self::SyslogTcp,
        Self::SyslogTls,
        Self::Http,
        Self::HttpGzip,
        Self::OtlpJson,
        Self::OtlpProtobuf,
        Self::Nats,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Stdin => "stdin",
            Self::Stdout => "ingest --stdout, stdin to a file",
            Self::SyslogUnix => "syslog, unix socket",
            Self::SyslogUdp => "syslog, UDP, as fast as can be",
            Self::SyslogUdpPaced => "syslog, UDP, 50,000/s",
            Self::SyslogTcp => "syslog, TCP",
            Self::SyslogTls => "syslog, TLS",
            Self::Http => "http, NDJSON",
            Self::HttpGzip => "http, NDJSON, gzip",
            Self::OtlpJson => "otlp, JSON",
            Self::OtlpProtobuf => "otlp, protobuf",
            Self::Nats => "nats, a line a message",
        }
    }

    /// Whether a syslog daemon can take it.
    pub(super) fn is_syslog(self) -> bool {
        matches!(self, Self::SyslogUnix | Self::SyslogUdp | Self::SyslogUdpPaced | Self::SyslogTcp | Self::SyslogTls)
    }

    pub(super) fn may_lose(self) -> bool {
        matches!(self, Self::SyslogUdp | Self::SyslogUdpPaced | Self::Nats)
    }

    /// How many of `lines` lines one run sends.
    pub(super) fn take(self, lines: usize) -> usize {
        if self == Self::SyslogUdpPaced { lines.min(PACED_LINES_MAX) } else { lines }
    }

    /// Pieces that are sent each in one go: parts of a stream, datagrams, or bodies of requests.
    pub(super) fn render(self, lines: &[String]) -> Vec<Vec<u8>> {
        let requests = |body: fn(&[String]) -> Vec<u8>| lines.chunks(REQUEST_LINES).map(body).collect();
        match self {
            Self::Stdin | Self::Stdout => render_atomic(lines),
            Self::SyslogUnix | Self::SyslogUdp | Self::SyslogUdpPaced => {
                lines.iter().map(|line| render_syslog(line).into_bytes()).collect()
            }
            Self::SyslogTcp | Self::SyslogTls => requests(|some| {
                let messages = some.iter().map(|line| render_syslog(line));
                messages.flat_map(|message| format!("{} {message}", message.len()).into_bytes()).collect()
            }),
            Self::File | Self::Http => requests(render_lines),
            Self::HttpGzip => requests(|some| {
                let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
                // Memory takes everything.
                let _ = encoder.write_all(&render_lines(some));
                encoder.finish().unwrap_or_default()
            }),
            Self::OtlpJson => requests(|some| {
                let records: Vec<_> = some.iter().map(|line| json!({"body": {"stringValue": line}})).collect();
                json!({"resourceLogs": [{"scopeLogs": [{"logRecords": records}]}]}).to_string().into_bytes()
            }),
            Self::OtlpProtobuf => requests(|some| {
                // ExportLogsServiceRequest > ResourceLogs > ScopeLogs > LogRecord > AnyValue, by their field numbers.
                let record = |line: &String| field(2, &field(5, &field(1, line.as_bytes())));
                field(1, &field(2, &some.iter().flat_map(record).collect::<Vec<u8>>()))
            }),
            Self::Nats => requests(|some| {
                let message = |line: &String| format!("PUB {SUBJECT} {}\r\n{line}\r\n", line.len()).into_bytes();
                some.iter().flat_map(message).collect()
            }),
        }
    }

    /// Sends all pieces.
    pub(super) fn send(self, pieces: &[Vec<u8>], target: &Target<'_>) -> Result<()> {
        let connect =
            |address: &str| TcpStream::connect(address).with_context(|| format!("could not connect to {address}"));
        match self {
            Self::File => {
                let path = target.folder.join(format!("many-{}.log", target.sender));
                write_all(&mut File::options().create(true).append(true).open(path)?, pieces)
            }
            Self::Stdin | Self::Stdout => {
                write_all(&mut File::options().write(true).open(target.folder.join(FIFO))?, pieces)
            }
            Self::SyslogUnix => {
                let socket = UnixDatagram::unbound()?;
                socket.connect(target.folder.join(SOCKET)).context("could not connect to the socket")?;
                pieces.iter().try_for_each(|piece| Ok(socket.send(piece).map(drop)?))
            }
            Self::SyslogUdp => send_datagrams(pieces, None),
            Self::SyslogUdpPaced => {
                send_datagrams(pieces, Some(Duration::from_secs(1) * u32::try_from(target.senders)? / PACE))
            }
            Self::SyslogTcp => write_all(&mut connect(SYSLOG)?, pieces),
            Self::SyslogTls => {
                let mut stream = target.tls.connect(connect(SYSLOG_TLS)?)?;
                write_all(&mut stream, pieces)?;
                stream.conn.send_close_notify();
                stream.flush()?;
                // Closed with its tickets unread, the connection would be reset, and what is on its way lost.
                stream.sock.shutdown(Shutdown::Write)?;
                std::io::copy(&mut stream.sock, &mut std::io::sink())?;
                Ok(())
            }
            Self::Http => post_all(HTTP, "/", "Content-Type: application/x-ndjson", pieces),
            Self::HttpGzip => {
                post_all(HTTP, "/", "Content-Type: application/x-ndjson\r\nContent-Encoding: gzip", pieces)
            }
            Self::OtlpJson => post_all(OTLP, "/v1/logs", "Content-Type: application/json", pieces),
            Self::OtlpProtobuf => post_all(OTLP, "/v1/logs", "Content-Type: application/x-protobuf", pieces),
            Self::Nats => publish(connect(NATS)?, pieces),
        }
    }
}

/// A message of RFC 5424.
fn render_syslog(line: &str) -> String {
    format!("<134>1 2026-01-01T00:00:00Z edge-1 traefik 1 - - {line}")
}

fn render_lines(lines: &[String]) -> Vec<u8> {
    lines.iter().flat_map(|line| [line.as_bytes(), b"\n"].concat()).collect()
}

/// As many whole lines at a time as a pipe takes in one piece.
fn render_atomic(lines: &[String]) -> Vec<Vec<u8>> {
    let mut pieces = vec![Vec::with_capacity(PIPE_BYTES)];
    for line in lines {
        if pieces.last().is_some_and(|piece: &Vec<u8>| piece.len() + line.len() >= PIPE_BYTES) {
            pieces.push(Vec::with_capacity(PIPE_BYTES));
        }
        if let Some(piece) = pieces.last_mut() {
            piece.extend_from_slice(line.as_bytes());
            piece.push(b'\n');
        }
    }
    pieces
}

/// A field of protobuf with bytes in it.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut encoded = vec![number << 3 | 2];
    let mut length = bytes.len();
    while length >= 0x80 {
        encoded.push((length & 0x7f) as u8 | 0x80);
        length >>= 7;
    }
    encoded.push(length as u8);
    encoded.extend_from_slice(bytes);
    encoded
}

fn write_all(to: &mut impl Write, pieces: &[Vec<u8>]) -> Result<()> {
    pieces.iter().try_for_each(|piece| to.write_all(piece)).context("could not write")
}

/// One a piece, with `pause` from one to the next on average.
fn send_datagrams(pieces: &[Vec<u8>], pause: Option<Duration>) -> Result<()> {
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    socket.connect(SYSLOG)?;
    let clock = Clock::system();
    let begin = clock.now();
    for (number, piece) in (0..).zip(pieces) {
        let early = pause.map(|pause| (pause * number).saturating_sub(clock.now().since(begin)));
        if let Some(early) = early.filter(|early| *early > PACE_SLACK) {
            std::thread::sleep(early);
        }
        socket.send(piece)?;
    }
    Ok(())
}

/// Sends all pieces as bodies over one connection, each after the answer to the one before.
fn post_all(address: &str, path: &str, headers: &str, pieces: &[Vec<u8>]) -> Result<()> {
    let mut stream = TcpStream::connect(address).with_context(|| format!("could not connect to {address}"))?;
    let mut answers = BufReader::new(stream.try_clone()?);
    for body in pieces {
        let length = body.len();
        let head = format!("POST {path} HTTP/1.1\r\nHost: {address}\r\n{headers}\r\nContent-Length: {length}\r\n\r\n");
        stream.write_all(head.as_bytes())?;
        stream.write_all(body)?;
        read_answer(&mut answers)?;
    }
    Ok(())
}

fn read_answer(answers: &mut impl BufRead) -> Result<()> {
    let mut status = String::new();
    answers.read_line(&mut status)?;
    ensure!(status.starts_with("HTTP/1.1 200"), "not taken: {status}");
    let mut length = 0;
    loop {
        let mut line = String::new();
        answers.read_line(&mut line)?;
        if line.trim().is_empty() {
            break;
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse()?;
        }
    }
    answers.take(length).read_to_end(&mut Vec::new())?;
    Ok(())
}

/// Publishes what is rendered, and waits until the server has read it.
pub(super) fn publish(mut stream: TcpStream, pieces: &[Vec<u8>]) -> Result<()> {
    let mut answers = BufReader::new(stream.try_clone()?);
    stream.write_all(b"CONNECT {\"verbose\":false}\r\n")?;
    write_all(&mut stream, pieces)?;
    stream.write_all(b"PING\r\n")?;
    let mut line = String::new();
    while line.trim() != "PONG" {
        line.clear();
        ensure!(answers.read_line(&mut line)? > 0 && !line.starts_with("-ERR"), "NATS hung up: {line}");
    }
    Ok(())
}
