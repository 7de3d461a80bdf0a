//! Syslog daemons as Debian has them, with the configurations that we ship: they follow the log on another host and send it
//! over the network to Portcullis, which bans.

use std::fs::{read_to_string, write};
use std::process::Command;

use proto::subject::name_from_host;
use tests::process::Process;
use tests::tls::certify;

use super::*;

/// Where Portcullis listens, as its senders know it.
const PORTCULLIS: &str = "198.51.100.1";
/// The address that the shipped configurations name.
const SHIPPED: &str = "192.0.2.10";

/// A way of messages, and how Portcullis is told to hear it.
#[derive(Clone, Copy, Debug)]
enum Way {
    Udp,
    Tcp,
    Tls,
}

impl Way {
    /// The word that begins its part of a shipped configuration.
    fn heading(self) -> &'static str {
        match self {
            Self::Udp => "# Over UDP",
            Self::Tcp => "# Over TCP",
            Self::Tls => "# Over TLS",
        }
    }

    fn source(self) -> String {
        let (mode, port, more) = match self {
            Self::Udp => ("udp", 5514, "allowed_senders = [\"198.51.100.0/30\"]\nnode_from = \"sender\"\n"),
            Self::Tcp => ("tcp", 5514, "allowed_senders = [\"198.51.100.0/30\"]\nnode_from = \"sender\"\n"),
            Self::Tls => (
                "tcp",
                6514,
                "node_from = \"header\"\n[ingest.sources.traefik.tls]\ncert_file = \"FOLDER/server.crt\"\n\
                 key_file = \"FOLDER/server.key\"\nclient_ca_file = \"FOLDER/ca.crt\"\n",
            ),
        };
        format!("type = \"syslog\"\nmode = \"{mode}\"\nlisten = \"0.0.0.0:{port}\"\n{more}")
    }

    /// The node that lines are shown under.
    fn node(self) -> String {
        match self {
            Self::Udp | Self::Tcp => "198-51-100-2".to_owned(),
            Self::Tls => name_from_host(read_to_string("/proc/sys/kernel/hostname").unwrap().trim()),
        }
    }
}

/// A daemon, and its files.
#[derive(Clone, Copy, Debug)]
enum Daemon {
    Rsyslog,
    SyslogNg,
}

impl Daemon {
    /// The shipped configuration, switched over to `way`, with the addresses and paths of `world`.
    fn config(self, way: Way, world: &World) -> String {
        let folder = world.folder.path().display().to_string();
        let (shipped, paths) = match self {
            Self::Rsyslog => (
                include_str!("../../../deploy/shippers/rsyslog.conf"),
                [
                    ("/etc/rsyslog.d/portcullis-ca.crt", "ca.crt"),
                    ("/etc/rsyslog.d/portcullis", "client"),
                    ("/var/spool/rsyslog", "spool"),
                ],
            ),
            Self::SyslogNg => (
                include_str!("../../../deploy/shippers/syslog-ng.conf"),
                [
                    ("/etc/syslog-ng/portcullis-ca.crt", "ca.crt"),
                    ("/etc/syslog-ng/portcullis", "client"),
                    ("/var/lib/syslog-ng", "spool"),
                ],
            ),
        };
        let mut text = switch(shipped, way.heading()).replace(SHIPPED, PORTCULLIS);
        text = text.replace("/var/log/traefik/access.log", &format!("{folder}/access.log"));
        for (shipped, ours) in paths {
            text = text.replace(shipped, &format!("{folder}/{ours}"));
        }
        text
    }

    /// Starts it on the visitor's host.
    fn start(self, way: Way, world: &World) -> Process {
        let folder = world.folder.path();
        let path = |name: &str| folder.join(name).display().to_string();
        std::fs::create_dir(folder.join("spool")).unwrap();
        write(folder.join("shipper.conf"), self.config(way, world)).unwrap();
        let mut command = Command::new("ip");
        command.args(["netns", "exec", world.visitor.name()]);
        match self {
            Self::Rsyslog => {
                command.arg(std::env::var_os("RSYSLOGD").unwrap_or_else(|| "rsyslogd".into()));
                command.args(["-n", "-f", &path("shipper.conf"), "-i", &path("shipper.pid")]);
            }
            Self::SyslogNg => {
                command.arg(std::env::var_os("SYSLOG_NG").unwrap_or_else(|| "syslog-ng".into()));
                command.args(["-F", "-e", "--no-caps", "-f", &path("shipper.conf"), "-R", &path("spool/persist")]);
                command.args(["-p", &path("shipper.pid"), "-c", &path("shipper.ctl")]);
            }
        }
        Process::start("syslog daemon", &mut command, &folder.join("shipper.log")).unwrap()
    }
}

/// `text` with the paragraph under `heading` switched on, and those of other ways switched off.
fn switch(text: &str, heading: &str) -> String {
    let mut switched = String::new();
    for paragraph in text.split("\n\n") {
        let is_wanted = paragraph.starts_with(heading);
        for line in paragraph.lines() {
            match line.strip_prefix('#') {
                // Two spaces after it are of configuration, one is of prose.
                Some(off) if is_wanted && (off.starts_with("  ") || !off.starts_with(' ')) => switched.push_str(off),
                None if paragraph.starts_with("# Over ") && !is_wanted => {
                    switched.push('#');
                    switched.push_str(line);
                }
                _ => switched.push_str(line),
            }
            switched.push('\n');
        }
        switched.push('\n');
    }
    switched
}

fn bans_what_a_daemon_sends(daemon: Daemon, way: Way) {
    let world = World::with_source(Variant::Nft, &way.source(), "");
    certify(world.folder.path(), &[("server", PORTCULLIS), ("client", "198.51.100.2")]).unwrap();
    let service = world.start();
    let mut shipper = daemon.start(way, &world);
    world.visitor_is_served();
    world.attack_times(true, 15);
    world.wait_cut_off(true);
    let ban = only_ban(&service, true);
    assert_eq!(ban["evidence"]["failures"], 15);
    assert_eq!(ban["evidence"]["nodes"], serde_json::json!([way.node()]));
    let source = wait_for("the lines are reported", || {
        let status = service.verb(&["status", "--json"]).ok()?.json().ok()?.pop()?;
        let source = status["nodes"].as_array()?.iter().find_map(|node| node.pointer("/sources/0"))?.clone();
        (source["lines"].as_u64()? >= u64::from(world.web.requests())).then_some(source)
    });
    let source = source.unwrap();
    for nothing in ["unparsed", "oversized", "dropped", "limited", "refused"] {
        assert_eq!(source[nothing], 0, "{nothing} in {source}");
    }
    assert_eq!(source["connections"], u64::from(!matches!(way, Way::Udp)), "{source}");
    shipper.stop().unwrap();
    service.stop().unwrap();
}

/// Of more lines than a ban takes, because those that are on their way when a connection ends may be lost.
fn keeps_lines_while_portcullis_is_away(daemon: Daemon) {
    let world = World::with_source(Variant::Nft, &Way::Tcp.source(), "");
    let service = world.start();
    let mut shipper = daemon.start(Way::Tcp, &world);
    world.visitor_is_served();
    world.wait_all_read(&service);
    service.kill().unwrap();
    world.attack_times(true, 20);
    let service = world.start();
    world.wait_cut_off(true);
    assert_eq!(only_ban(&service, true)["evidence"]["nodes"], serde_json::json!([Way::Tcp.node()]));
    shipper.stop().unwrap();
    service.stop().unwrap();
}

#[test]
fn rsyslog_keeps_lines_while_portcullis_is_away() {
    keeps_lines_while_portcullis_is_away(Daemon::Rsyslog);
}

#[test]
fn syslog_ng_keeps_lines_while_portcullis_is_away() {
    keeps_lines_while_portcullis_is_away(Daemon::SyslogNg);
}

#[test]
fn rsyslog_over_udp() {
    bans_what_a_daemon_sends(Daemon::Rsyslog, Way::Udp);
}

#[test]
fn rsyslog_over_tcp() {
    bans_what_a_daemon_sends(Daemon::Rsyslog, Way::Tcp);
}

#[test]
fn rsyslog_over_tls() {
    bans_what_a_daemon_sends(Daemon::Rsyslog, Way::Tls);
}

#[test]
fn syslog_ng_over_udp() {
    bans_what_a_daemon_sends(Daemon::SyslogNg, Way::Udp);
}

#[test]
fn syslog_ng_over_tcp() {
    bans_what_a_daemon_sends(Daemon::SyslogNg, Way::Tcp);
}

#[test]
fn syslog_ng_over_tls() {
    bans_what_a_daemon_sends(Daemon::SyslogNg, Way::Tls);
}
