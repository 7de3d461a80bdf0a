//! Who receives: Portcullis, or beside it a syslog daemon that writes what it hears to a file.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use tests::portcullis::{Service, binary, wait_for};
use tests::process::Process;

use super::daemon::Daemon;
use super::way::{self, FIFO, HTTP, NATS, OTLP, SOCKET, SUBJECT, SYSLOG, SYSLOG_TLS, Way};
use crate::host::Host;
use crate::table::to_f64;

/// No line for so long is no line any more, among those that a probe may have sent.
const SETTLE: Duration = Duration::from_millis(200);

/// What receives lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Portcullis,
    Daemon(Daemon),
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Portcullis => "portcullis",
            Self::Daemon(daemon) => daemon.name(),
        }
    }
}

/// A receiver at work. Ended when dropped.
pub(super) struct Receiver {
    pub(super) host: Arc<Host>,
    state: State,
    _nats: Option<Process>,
    /// Lines that came before the first that counts.
    before: f64,
    /// Keeps the pipe open until all senders have written.
    held: Option<File>,
}

enum State {
    Service(Service),
    /// Ends with its input.
    Pipe(Process, PathBuf),
    Daemon(Process, &'static str, PathBuf),
}

impl Receiver {
    /// Starts it in namespaces of its own, with `folder` for what it writes and the certificates in `certificates`.
    pub(super) fn start(kind: Kind, way: Way, folder: &Path, certificates: &Path) -> Result<Self> {
        let host = Host::new(folder)?;
        let fifo = folder.join(FIFO);
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).context("could not make a pipe")?;
        let held = matches!(way, Way::Stdin | Way::Stdout).then(|| hold(&fifo)).transpose()?;
        let nats = (way == Way::Nats).then(|| start_nats(&host)).transpose()?;
        let state = match (kind, way) {
            (Kind::Portcullis, Way::Stdout) => {
                let mut command = inside(&host, "sh");
                command.args(["-c", "exec \"$0\" ingest --stdout - <\"$1\""]).arg(binary()?).arg(&fifo);
                let process = Process::start("portcullis ingest", &mut command, &folder.join("ingest.log"))?;
                State::Pipe(process, folder.join("ingest.out"))
            }
            (Kind::Portcullis, _) => {
                let input = if way == Way::Stdin { &fifo } else { Path::new("/dev/null") };
                State::Service(host.start_reading(&config(way, folder, certificates), input)?)
            }
            (Kind::Daemon(daemon), _) => {
                let mut command = inside(&host, daemon.program());
                daemon.configure(way, folder, certificates, &mut command)?;
                let process = Process::start(daemon.name(), &mut command, &folder.join("daemon.log"))?;
                wait_listens(&host, way).with_context(|| process.log_text())?;
                State::Daemon(process, daemon.comm(), folder.join(Daemon::OUTPUT))
            }
        };
        let before = if way == Way::Nats { settle_nats(&host)? } else { 0.0 };
        Ok(Self { host: Arc::new(host), state, _nats: nats, before, held })
    }

    /// The name of its process.
    pub(super) fn comm(&self) -> &'static str {
        match &self.state {
            State::Service(_) | State::Pipe(..) => "portcullis",
            State::Daemon(_, comm, _) => comm,
        }
    }

    /// To be called when all senders have sent all.
    pub(super) fn all_sent(&mut self) {
        self.held = None;
    }

    /// Lines that it has taken, as far as that is cheaply told; `line_bytes` are those of a line with its end, on average.
    pub(super) fn taken(&mut self, line_bytes: f64) -> Result<f64> {
        Ok(match &mut self.state {
            State::Service(_) => self.host.metric("ingest_lines_total").unwrap_or(0.0) - self.before,
            State::Pipe(process, output) => match process.ended() {
                Some(_) => count_lines(output)?,
                None => 0.0,
            },
            // Rounded up where the average is not exact.
            State::Daemon(.., output) => {
                (to_f64(fs::metadata(output).map_or(0, |file| file.len())) / line_bytes + 0.01).floor()
            }
        })
    }

    /// Lines that it has taken, exactly.
    pub(super) fn counted(&mut self) -> Result<f64> {
        match &self.state {
            State::Daemon(.., output) => count_lines(output),
            State::Service(_) | State::Pipe(..) => self.taken(1.0),
        }
    }

    /// Ends it in order, and fails where it has logged an error.
    pub(super) fn stop(self) -> Result<()> {
        match self.state {
            State::Service(service) => service.stop()?,
            State::Pipe(process, _) => process.no_errors()?,
            State::Daemon(mut process, ..) => process.stop()?,
        }
        let folder = self.host.folder.clone();
        fs::remove_dir_all(folder).context("could not remove the folder of a run")
    }
}

fn inside(host: &Host, program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", host.server.name()]).arg(program);
    command
}

fn start_nats(host: &Host) -> Result<Process> {
    let mut command = inside(host, std::env::var_os("NATS_SERVER").unwrap_or_else(|| "nats-server".into()));
    command.args(["-a", "127.0.0.1", "-js", "-sd"]).arg(host.folder.join("nats"));
    let process = Process::start("nats-server", &mut command, &host.folder.join("nats.log"))?;
    wait_listens(host, Way::Nats).with_context(|| process.log_text())?;
    Ok(process)
}

/// Waits until what is published arrives: nobody tells when a subscription has, but a line that comes does. Returns how many
/// lines came for that.
fn settle_nats(host: &Host) -> Result<f64> {
    let probe = vec![format!("PUB {SUBJECT} 2\r\n{{}}\r\n").into_bytes()];
    wait_for("a line arrives over NATS", || {
        host.server.within(|| way::publish(TcpStream::connect(NATS)?, &probe)).ok()?;
        (host.metric("ingest_lines_total")? > 0.0).then_some(())
    })?;
    let mut former = -1.0;
    wait_for("no more lines arrive", || {
        std::thread::sleep(SETTLE);
        let now = host.metric("ingest_lines_total")?;
        (std::mem::replace(&mut former, now) >= now).then_some(now)
    })
}

/// Waits until senders can send.
fn wait_listens(host: &Host, way: Way) -> Result<()> {
    let (table, address) = match way {
        Way::SyslogUnix => {
            let socket = host.folder.join(SOCKET);
            return wait_for("the socket is there", || socket.exists().then_some(()));
        }
        Way::SyslogUdp | Way::SyslogUdpPaced => ("udp", SYSLOG),
        Way::SyslogTls => ("tcp", SYSLOG_TLS),
        Way::Nats => ("tcp", NATS),
        _ => ("tcp", SYSLOG),
    };
    let port: u16 = address.rsplit(':').next().unwrap_or_default().parse()?;
    let local = format!(":{port:04X} ");
    let read = || Ok(fs::read_to_string(format!("/proc/thread-self/net/{table}"))?);
    wait_for("the port is listened to", || host.server.within(read).ok()?.contains(&local).then_some(()))
}

/// What `portcullis run` is told beside its defaults. No limits: the senders' share by default is less than what one can
/// bring here.
fn config(way: Way, folder: &Path, certificates: &Path) -> String {
    let at = |folder: &Path, name: &str| folder.join(name).display().to_string();
    let free = "limits = { sender_lines = 0 }\n";
    let [cert, key] = ["server.crt", "server.key"].map(|name| at(certificates, name));
    let source = match way {
        Way::File => format!("type = \"file\"\ninclude = [\"{}\"]\n", at(folder, "many-*.log")),
        Way::Stdin | Way::Stdout => "type = \"stdin\"\n".to_owned(),
        Way::SyslogUnix => format!("type = \"syslog\"\nmode = \"unix\"\npath = \"{}\"\n", at(folder, SOCKET)),
        Way::SyslogUdp | Way::SyslogUdpPaced => {
            format!("type = \"syslog\"\nmode = \"udp\"\nlisten = \"{SYSLOG}\"\n{free}")
        }
        Way::SyslogTcp => format!("type = \"syslog\"\nmode = \"tcp\"\nlisten = \"{SYSLOG}\"\n{free}"),
        Way::SyslogTls => format!(
            "type = \"syslog\"\nmode = \"tcp\"\nlisten = \"{SYSLOG_TLS}\"\n{free}\
             tls = {{ cert_file = \"{cert}\", key_file = \"{key}\" }}\n"
        ),
        Way::Http | Way::HttpGzip => format!("type = \"http\"\nlisten = \"{HTTP}\"\n{free}"),
        Way::OtlpJson | Way::OtlpProtobuf => format!("type = \"otlp\"\nlisten = \"{OTLP}\"\n{free}"),
        Way::Nats => format!("type = \"nats\"\nsubject = \"{SUBJECT}\"\n"),
    };
    let bus = format!("[bus]\nkind = \"nats\"\nurls = [\"nats://{NATS}\"]\nreplicas = 1\n");
    let bus = if way == Way::Nats { bus.as_str() } else { "" };
    format!("[ingest.sources.measured]\n{source}[detect]\nlateness_max = \"7d\"\n{bus}")
}

/// A writer that holds the pipe open; opened for both ways, it need not wait for a reader.
fn hold(fifo: &Path) -> Result<File> {
    File::options().read(true).write(true).open(fifo).context("could not open a pipe")
}

fn count_lines(path: &Path) -> Result<f64> {
    let mut file = File::open(path).with_context(|| format!("could not open {}", path.display()))?;
    let (mut buffer, mut lines) = (vec![0; 1 << 20], 0);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(to_f64(lines)),
            bytes => lines += buffer[..bytes].iter().map(|byte| u64::from(*byte == b'\n')).sum::<u64>(),
        }
    }
}
