//! The peers: syslog daemons that write each message's text to a file, and neither parse it nor count anybody.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use super::way::{SOCKET, Way};
use crate::process::is_installed;

/// A daemon, and how it is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Daemon {
    /// With its own defaults for queues and threads.
    Rsyslog,
    /// With a larger main queue, larger batches, two workers, and two threads and larger batches for UDP.
    RsyslogTuned,
    /// With windows and a queue that suit sixteen fast senders; by its defaults a sender has 100 messages under way.
    SyslogNg,
}

impl Daemon {
    pub(super) const ALL: [Self; 3] = [Self::Rsyslog, Self::RsyslogTuned, Self::SyslogNg];
    /// What it writes, in its folder.
    pub(super) const OUTPUT: &str = "received.log";

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Rsyslog => "rsyslog",
            Self::RsyslogTuned => "rsyslog, tuned",
            Self::SyslogNg => "syslog-ng",
        }
    }

    /// The program's name in the process table.
    pub(super) fn comm(self) -> &'static str {
        match self {
            Self::Rsyslog | Self::RsyslogTuned => "rsyslogd",
            Self::SyslogNg => "syslog-ng",
        }
    }

    /// What starts it: the one that `RSYSLOGD` or `SYSLOG_NG` names, else the one in the path.
    pub(super) fn program(self) -> OsString {
        let variable = match self {
            Self::Rsyslog | Self::RsyslogTuned => "RSYSLOGD",
            Self::SyslogNg => "SYSLOG_NG",
        };
        std::env::var_os(variable).unwrap_or_else(|| self.comm().into())
    }

    pub(super) fn is_available(self) -> bool {
        match self {
            Self::Rsyslog | Self::RsyslogTuned => {
                // It knows `-v` alone.
                Command::new(self.program()).arg("-v").output().is_ok_and(|output| output.status.success())
            }
            Self::SyslogNg => is_installed(&self.program().to_string_lossy()),
        }
    }

    /// Writes its configuration into `folder`, and adds what it is started with to `command`.
    pub(super) fn configure(self, way: Way, folder: &Path, certificates: &Path, command: &mut Command) -> Result<()> {
        let path = |name: &str| folder.join(name).display().to_string();
        let text = match self {
            Self::Rsyslog | Self::RsyslogTuned => self.render_rsyslog(way, folder, certificates),
            Self::SyslogNg => render_syslog_ng(way, folder, certificates),
        };
        std::fs::write(folder.join("daemon.conf"), text).context("could not write a daemon's configuration")?;
        match self {
            Self::Rsyslog | Self::RsyslogTuned => {
                command.args(["-n", "-f", &path("daemon.conf"), "-i", &path("daemon.pid")]);
            }
            Self::SyslogNg => {
                command.args(["-F", "-e", "--no-caps", "-f", &path("daemon.conf"), "-R", &path("persist")]);
                command.args(["-p", &path("daemon.pid"), "-c", &path("control")]);
            }
        }
        Ok(())
    }

    fn render_rsyslog(self, way: Way, folder: &Path, certificates: &Path) -> String {
        let is_tuned = self == Self::RsyslogTuned;
        let at = |name: &str| certificates.join(name).display().to_string();
        let mut text = format!("global(workDirectory=\"{}\" maxMessageSize=\"64k\"", folder.display());
        if way == Way::SyslogTls {
            let [ca, cert, key] = ["ca.crt", "server.crt", "server.key"].map(at);
            let _ = write!(
                text,
                " defaultNetstreamDriverCAFile=\"{ca}\" defaultNetstreamDriverCertFile=\"{cert}\" \
                 defaultNetstreamDriverKeyFile=\"{key}\""
            );
        }
        text.push_str(")\n");
        if is_tuned {
            text.push_str(
                "main_queue(queue.type=\"FixedArray\" queue.size=\"500000\" queue.dequeueBatchSize=\"4096\" \
                 queue.workerThreads=\"2\" queue.workerThreadMinimumMessages=\"20000\")\n",
            );
        }
        text.push_str(match way {
            Way::SyslogUdp | Way::SyslogUdpPaced if is_tuned => {
                "module(load=\"imudp\" threads=\"2\" batchSize=\"128\")\n\
                 input(type=\"imudp\" address=\"127.0.0.1\" port=\"5514\" rcvbufSize=\"4m\")\n"
            }
            Way::SyslogUdp | Way::SyslogUdpPaced => {
                "module(load=\"imudp\")\ninput(type=\"imudp\" address=\"127.0.0.1\" port=\"5514\")\n"
            }
            Way::SyslogTls => {
                "module(load=\"imtcp\" streamDriver.name=\"gtls\" streamDriver.mode=\"1\" streamDriver.authMode=\"anon\")\n\
                 input(type=\"imtcp\" address=\"127.0.0.1\" port=\"6514\")\n"
            }
            Way::SyslogUnix => "module(load=\"imuxsock\" sysSock.use=\"off\")\n",
            _ => "module(load=\"imtcp\")\ninput(type=\"imtcp\" address=\"127.0.0.1\" port=\"5514\")\n",
        });
        if way == Way::SyslogUnix {
            let socket = folder.join(SOCKET);
            let _ = writeln!(
                text,
                "input(type=\"imuxsock\" socket=\"{}\" useSpecialParser=\"off\" parseHostname=\"on\" rateLimit.interval=\"0\")",
                socket.display()
            );
        }
        let output = folder.join(Self::OUTPUT);
        let _ = writeln!(
            text,
            "template(name=\"text\" type=\"string\" string=\"%msg%\\n\")\n\
             action(type=\"omfile\" file=\"{}\" template=\"text\"{})",
            output.display(),
            if is_tuned { " ioBufferSize=\"256k\"" } else { "" }
        );
        text
    }
}

fn render_syslog_ng(way: Way, folder: &Path, certificates: &Path) -> String {
    let at = |name: &str| certificates.join(name).display().to_string();
    let windows = "max-connections(64) log-iw-size(64000) log-fetch-limit(1000)";
    let source = match way {
        Way::SyslogUnix => format!(
            "unix-dgram(\"{}\" flags(syslog-protocol) so-rcvbuf(4194304) log-iw-size(64000))",
            folder.join(SOCKET).display()
        ),
        Way::SyslogUdp | Way::SyslogUdpPaced => "syslog(ip(127.0.0.1) port(5514) transport(\"udp\") \
             so-rcvbuf(4194304) log-iw-size(64000) log-fetch-limit(1000))"
            .to_owned(),
        Way::SyslogTls => format!(
            "syslog(ip(127.0.0.1) port(6514) transport(\"tls\") {windows} \
             tls(key-file(\"{}\") cert-file(\"{}\") peer-verify(optional-untrusted)))",
            at("server.key"),
            at("server.crt")
        ),
        _ => format!("syslog(ip(127.0.0.1) port(5514) transport(\"tcp\") {windows})"),
    };
    format!(
        "@version: 3.35\noptions {{ keep-hostname(yes); use-dns(no); log-msg-size(69632); log-fifo-size(200000); \
         threaded(yes); stats-freq(0); }};\n\
         source s {{ {source}; }};\n\
         destination d {{ file(\"{}\" template(\"$MSG\\n\") flush-lines(1000)); }};\n\
         log {{ source(s); destination(d); flags(flow-control); }};\n",
        folder.join(Daemon::OUTPUT).display()
    )
}
