//! A host in a namespace, and beside it one with all the clients: where the services are measured.

use std::fmt::Write as _;
use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use tests::netns::{Namespace, host};
use tests::portcullis::Service;

/// What joins the two; the server has its first address.
const NETWORK: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 0));
/// Where clients have their addresses (RFC 2544).
const CLIENTS: &str = "198.18.0.0/15";
/// Listener for metrics, inside the namespace.
const METRICS: &str = "127.0.0.1:9477";
/// An answer that takes longer does not come.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// Both namespaces, and a folder of their own.
#[derive(Debug)]
pub(crate) struct Host {
    /// Where the service runs.
    pub(crate) server: Namespace,
    /// Where the packets come from.
    pub(crate) client: Namespace,
    /// For all that the service writes, and its log.
    pub(crate) folder: PathBuf,
}

impl Host {
    /// Makes both, with a log that is still empty.
    pub(crate) fn new(folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder.join("state")).context("could not make a folder for the service")?;
        let folder = folder.to_owned();
        let host = Self { server: Namespace::new()?, client: Namespace::new()?, folder };
        host.server.join(&host.client, &[NETWORK])?;
        let device = format!("s{}", host.client.name());
        host.server.run("ip", &["route", "add", CLIENTS, "dev", &device])?;
        fs::write(host.log(), "").context("could not make the log")?;
        Ok(host)
    }

    /// The log that the service follows.
    pub(crate) fn log(&self) -> PathBuf {
        self.folder.join("access.log")
    }

    /// Address of the server.
    pub(crate) fn address(&self) -> IpAddr {
        host(NETWORK, 1)
    }

    /// Gives the client more addresses.
    pub(crate) fn add_clients(&self, addresses: &[IpAddr]) -> Result<()> {
        let mut batch = String::new();
        for address in addresses {
            writeln!(batch, "addr add {address}/32 dev {}", self.client.name())?;
        }
        let path = self.folder.join("addresses");
        fs::write(&path, batch).context("could not write a batch of addresses")?;
        self.client.run("ip", &["-batch", &path.display().to_string()])?;
        Ok(())
    }

    /// Starts `portcullis run` with its defaults, and `more` configuration.
    pub(crate) fn start_portcullis(&self, more: &str) -> Result<Service> {
        self.start_reading(more, Path::new("/dev/null"))
    }

    /// The same, with `input` as its standard input.
    pub(crate) fn start_reading(&self, more: &str, input: &Path) -> Result<Service> {
        let path = |name: &str| self.folder.join(name).display().to_string();
        let text = format!(
            "node = \"bench\"\nstate_dir = \"{}\"\n[api]\nsocket = \"{}\"\n\
             [telemetry]\nlog_format = \"json\"\nlisten = \"{METRICS}\"\n\
             [ingest.sources.traefik]\ntype = \"file\"\ninclude = [\"{}\"]\n{more}",
            path("state"),
            path("api.sock"),
            path("access.log"),
        );
        fs::write(self.folder.join("portcullis.toml"), text).context("could not write a configuration")?;
        Service::start_reading(&self.folder, self.server.name(), input)
    }

    /// The sum of the metric whose name ends so, over its labels, asked from the service; `None` when there is no answer.
    pub(crate) fn metric(&self, name: &str) -> Option<f64> {
        let text = self.server.within(scrape).ok()?;
        let values = text.lines().filter(|line| line.split(['{', ' ']).next().is_some_and(|key| key.ends_with(name)));
        Some(values.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum())
    }

    /// IPv4 bans in the server's kernel, by its own count; `None` while there is no set for them.
    pub(crate) fn banned(&self) -> Option<f64> {
        let text = self.server.run("ipset", &["list", "-t", "portcullis-v4"]).ok()?;
        text.lines().find_map(|line| line.strip_prefix("Number of entries: ")?.parse().ok())
    }

    /// The process of the service: the only one of that name in the namespace.
    pub(crate) fn pid(&self, name: &str) -> Result<u32> {
        let text = self.server.run("ip", &["netns", "pids", self.server.name()])?;
        let is_it = |pid: &u32| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim() == name);
        text.split_whitespace()
            .filter_map(|pid| pid.parse().ok())
            .find(is_it)
            .with_context(|| format!("no {name} in namespace {}", self.server.name()))
    }
}

fn scrape() -> Result<String> {
    let mut stream = TcpStream::connect(METRICS).context("could not reach the metrics")?;
    stream.set_read_timeout(Some(ANSWER_MAX))?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}
