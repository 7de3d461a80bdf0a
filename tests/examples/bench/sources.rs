//! Every way in that listens: lines/s from the first byte sent to the last line counted, by one sender and by sixteen, over
//! loopback in a namespace. Parsing and detection take part, on the same cores as the senders.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use proto::time::{Clock, Timestamp};
use serde_json::json;

use crate::corpus::Corpus;
use crate::host::Host;
use crate::process::peak;
use crate::table::{number, render, to_f64};

/// No limits: the senders' share by default is less than what one can bring here.
const CONFIG: &str = "[ingest.sources.tcp]\ntype = \"syslog\"\nmode = \"tcp\"\nlisten = \"127.0.0.1:5514\"\n\
                      limits = { sender_lines = 0 }\n\
                      [ingest.sources.udp]\ntype = \"syslog\"\nmode = \"udp\"\nlisten = \"127.0.0.1:5514\"\n\
                      limits = { sender_lines = 0 }\n\
                      [ingest.sources.http]\ntype = \"http\"\nlisten = \"127.0.0.1:8514\"\n\
                      limits = { sender_lines = 0 }\n\
                      [ingest.sources.otlp]\ntype = \"otlp\"\nlisten = \"127.0.0.1:4318\"\n\
                      limits = { sender_lines = 0 }\n\
                      [detect]\nlateness_max = \"7d\"\n";
/// Lines of one request, as shippers do by default or so.
const REQUEST_LINES: usize = 1000;
/// How many send at once.
const SENDERS: [usize; 2] = [1, 16];
/// Between two looks at the metrics.
const LOOK: Duration = Duration::from_millis(10);
/// No line for so long is the end, where lines may be lost.
const QUIET: Duration = Duration::from_secs(1);
/// Who is not through by then never will be.
const PATIENCE: Duration = Duration::from_secs(300);

/// A way in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    SyslogTcp,
    SyslogUdp,
    Http,
    Otlp,
}

impl Way {
    const ALL: [Self; 4] = [Self::SyslogTcp, Self::SyslogUdp, Self::Http, Self::Otlp];

    fn name(self) -> &'static str {
        match self {
            Self::SyslogTcp => "syslog over TCP, octet-counted",
            Self::SyslogUdp => "syslog over UDP, a line a datagram",
            Self::Http => "http, 1,000 lines a request",
            Self::Otlp => "otlp as JSON, 1,000 records a request",
        }
    }

    fn may_lose(self) -> bool {
        self == Self::SyslogUdp
    }

    fn send(self, lines: &[String]) -> Result<()> {
        match self {
            Self::SyslogTcp => {
                let mut stream = TcpStream::connect("127.0.0.1:5514").context("could not connect to syslog")?;
                for some in lines.chunks(REQUEST_LINES) {
                    let framed: String = some
                        .iter()
                        .map(|line| syslog(line))
                        .map(|message| format!("{} {message}", message.len()))
                        .collect();
                    stream.write_all(framed.as_bytes())?;
                }
                Ok(())
            }
            Self::SyslogUdp => {
                let socket = UdpSocket::bind("127.0.0.1:0")?;
                socket.connect("127.0.0.1:5514")?;
                lines.iter().try_for_each(|line| Ok(socket.send(syslog(line).as_bytes()).map(drop)?))
            }
            Self::Http => post_all("127.0.0.1:8514", ("/", "application/x-ndjson"), lines, |some| some.join("\n")),
            Self::Otlp => post_all("127.0.0.1:4318", ("/v1/logs", "application/json"), lines, |some| {
                let records: Vec<_> = some.iter().map(|line| json!({"body": {"stringValue": line}})).collect();
                json!({"resourceLogs": [{"scopeLogs": [{"logRecords": records}]}]}).to_string()
            }),
        }
    }
}

fn syslog(line: &str) -> String {
    format!("<134>1 2026-01-01T00:00:00Z edge-1 traefik 1 - - {line}")
}

/// Sends all lines in requests over one connection, each after the answer to the one before.
fn post_all(
    address: &str,
    (path, kind): (&str, &str),
    lines: &[String],
    body: impl Fn(&[String]) -> String,
) -> Result<()> {
    let stream = TcpStream::connect(address).with_context(|| format!("could not connect to {address}"))?;
    let mut answers = BufReader::new(stream.try_clone()?);
    let mut stream = stream;
    for some in lines.chunks(REQUEST_LINES) {
        let body = body(some);
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: {address}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes())?;
        stream.write_all(body.as_bytes())?;
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

/// Measures, prints the table, and returns the lines of the summary.
pub(crate) fn run(folder: &Path, corpus: &Corpus) -> Result<Vec<String>> {
    let reader = BufReader::new(File::open(&corpus.path).context("could not open the corpus")?);
    let lines: Vec<String> = reader.lines().collect::<std::io::Result<_>>()?;
    let mut rows = Vec::new();
    let mut summary = Vec::new();
    for way in Way::ALL {
        let mut speeds = Vec::new();
        for senders in SENDERS {
            let name = format!("{way:?}-{senders}").to_lowercase();
            let (speed, lost, peak_mib) = measure(&folder.join(name), way, senders, &lines)?;
            rows.push([way.name().to_owned(), senders.to_string(), number(speed), number(lost), number(peak_mib)]);
            speeds.push(number(speed));
        }
        summary.push(format!("{}: {} lines/s by one sender, {} by sixteen", way.name(), speeds[0], speeds[1]));
    }
    println!("{}", render(["lines in", "senders", "lines/s", "% lost", "peak MiB"], &rows));
    Ok(summary)
}

/// Lines/s that were counted, the share that was not in per cent, and the peak of the memory.
fn measure(folder: &Path, way: Way, senders: usize, lines: &[String]) -> Result<(f64, f64, f64)> {
    let host = Host::new(folder)?;
    let service = host.start_portcullis(CONFIG)?;
    let pid = host.pid("portcullis")?;
    let clock = Clock::system();
    let begin = clock.now();
    let (server, share) = (&host.server, lines.len().div_ceil(senders));
    let (counted, at) = std::thread::scope(|scope| {
        let sending: Vec<_> =
            lines.chunks(share).map(|part| scope.spawn(move || server.within(move || way.send(part)))).collect();
        let has_sent = || sending.iter().all(std::thread::ScopedJoinHandle::is_finished);
        let watched = watch(&host, (way, lines.len()), has_sent);
        for sender in sending {
            sender.join().expect("a sender does not panic")?;
        }
        watched
    })?;
    let peak_kib = peak(pid).context("portcullis is gone")?;
    service.stop()?;
    let seconds = at.since(begin).as_secs_f64();
    let lost = 1.0 - counted / to_f64(u64::try_from(lines.len())?);
    Ok((counted / seconds, 100.0 * lost, to_f64(peak_kib) / 1_024.0))
}

/// How many lines were counted in the end, and when the last of them.
fn watch(host: &Host, (way, lines): (Way, usize), has_sent: impl Fn() -> bool) -> Result<(f64, Timestamp)> {
    let clock = Clock::system();
    let begin = clock.now();
    let wanted = to_f64(u64::try_from(lines)?);
    let (mut counted, mut at) = (0.0, begin);
    loop {
        let now = clock.now();
        let found = host.metric("ingest_lines_total").unwrap_or(counted);
        if found > counted {
            (counted, at) = (found, now);
        }
        if counted >= wanted || (way.may_lose() && has_sent() && now.since(at) > QUIET) {
            return Ok((counted, at));
        }
        ensure!(now.since(begin) < PATIENCE, "{counted} lines of {wanted} after {PATIENCE:?}");
        std::thread::sleep(LOOK);
    }
}
