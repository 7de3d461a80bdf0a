//! The NATS servers of a cluster: their configuration, their lives, and what they say of themselves.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::nats::Client;
use super::network::Network;
use crate::netns::Namespace;
use crate::portcullis::wait_until;
use crate::process::Process;

/// An election takes some 10 s when the leader is gone without a word, on a loaded machine more.
pub const ELECTION: Duration = Duration::from_secs(60);
/// Where a server tells of itself.
const MONITOR_PORT: u16 = 8222;
const SILENCE: Duration = Duration::from_secs(2);

/// One server.
#[derive(Debug)]
struct Server {
    name: String,
    address: Ipv4Addr,
    namespace: Namespace,
    folder: PathBuf,
    process: Option<Process>,
}

/// All of them.
#[derive(Debug)]
pub struct Servers(Vec<Server>);

impl Servers {
    /// Configures `count` servers in folders of their own under `folder`; none runs yet.
    pub fn new(network: &Network, folder: &Path, count: u8) -> Result<Self> {
        let addresses: Vec<Ipv4Addr> = (1..=count).map(|number| Ipv4Addr::new(10, 77, 0, 30 + number)).collect();
        let mut servers = Vec::new();
        for (number, address) in (1..).zip(&addresses) {
            let name = format!("nats-{number}");
            let folder = folder.join(&name);
            std::fs::create_dir(&folder)?;
            std::fs::write(folder.join("nats.conf"), configuration(&name, &folder, (*address, &addresses)))?;
            let namespace = network.host(&name, *address)?;
            servers.push(Server { name, address: *address, namespace, folder, process: None });
        }
        Ok(Self(servers))
    }

    /// Addresses for clients.
    pub fn urls(&self) -> Vec<String> {
        self.0.iter().map(|server| format!("nats://{}:4222", server.address)).collect()
    }

    /// How many there are, running or not.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Name and namespace of server `index`.
    pub fn host(&self, index: usize) -> (&str, &Namespace) {
        (&self.0[index].name, &self.0[index].namespace)
    }

    /// Index of the server with this name.
    pub fn index(&self, name: &str) -> Option<usize> {
        self.0.iter().position(|server| server.name == name)
    }

    /// Starts server `index`, unless it runs.
    pub fn start(&mut self, index: usize) -> Result<()> {
        let server = &mut self.0[index];
        if server.process.is_none() {
            let program = std::env::var_os("NATS_SERVER").unwrap_or_else(|| "nats-server".into());
            let mut command = Command::new("ip");
            command.args(["netns", "exec", server.namespace.name()]).arg(program);
            command.arg("-c").arg(server.folder.join("nats.conf"));
            server.process = Some(Process::start(&server.name, &mut command, &server.folder.join("nats.log"))?);
        }
        Ok(())
    }

    /// SIGKILL for server `index`, if it runs.
    pub fn kill(&mut self, index: usize) -> Result<()> {
        self.0[index].process.take().map_or(Ok(()), |mut process| process.kill())
    }

    /// Starts all, and waits until they have a leader and nothing to catch up with.
    pub fn start_all(&mut self) -> Result<()> {
        for index in 0..self.0.len() {
            self.start(index)?;
        }
        self.wait_ready()
    }

    /// Waits until every server is well, all know the same leader, and every stream has one and is the same everywhere.
    pub fn wait_ready(&self) -> Result<()> {
        wait_until("the NATS servers are ready", ELECTION, || self.is_ready().then_some(()))
            .with_context(|| self.logs())
    }

    fn is_ready(&self) -> bool {
        let leaders: Vec<Option<String>> = (0..self.0.len()).map(|index| self.meta_leader(index)).collect();
        let agreed = leaders.iter().all(|leader| leader.is_some() && *leader == leaders[0]);
        agreed && (0..self.0.len()).all(|index| self.is_well(index))
    }

    /// Whether server `index` is well and knows who leads each stream that it holds; of those that it leads itself, whether
    /// all replicas keep up, which only their leader knows.
    fn is_well(&self, index: usize) -> bool {
        let settled = |stream: &Value| {
            let leader = leader(stream).unwrap_or_default();
            let replicas = stream.pointer("/cluster/replicas").and_then(Value::as_array);
            let mut replicas = replicas.map_or(&[][..], Vec::as_slice).iter();
            stream.get("cluster").is_none()
                || !leader.is_empty()
                    && (leader != self.0[index].name || replicas.all(|replica| replica["current"] == true))
        };
        let health = self.monitor(index, "/healthz").is_ok_and(|health| health["status"] == "ok");
        health && self.streams(index).is_some_and(|streams| streams.iter().all(settled))
    }

    /// The server that leads JetStream, as server `index` knows it; a server alone leads itself.
    fn meta_leader(&self, index: usize) -> Option<String> {
        let jsz = self.monitor(index, "/jsz").ok()?;
        if self.0.len() == 1 {
            return Some(self.0[0].name.clone());
        }
        let leader = jsz.pointer("/meta_cluster/leader")?.as_str()?;
        (!leader.is_empty()).then(|| leader.to_owned())
    }

    /// What server `index` says of each stream that it holds.
    fn streams(&self, index: usize) -> Option<Vec<Value>> {
        let jsz = self.monitor(index, "/jsz?accounts=1&streams=1").ok()?;
        let accounts = jsz.get("account_details").and_then(Value::as_array).cloned().unwrap_or_default();
        let streams = accounts.iter().filter_map(|account| account.get("stream_detail")?.as_array()).flatten();
        Some(streams.cloned().collect())
    }

    /// What its leader says of a stream; `None` while it has none.
    pub fn stream(&self, stream: &str) -> Option<Value> {
        self.find(stream).map(|(_, told)| told)
    }

    /// Index of the server that leads `stream`; `None` while none does.
    pub fn leader(&self, stream: &str) -> Option<usize> {
        self.find(stream).map(|(index, _)| index)
    }

    fn find(&self, stream: &str) -> Option<(usize, Value)> {
        let leads = |index: usize, told: &Value| self.0.len() == 1 || leader(told) == Some(&self.0[index].name);
        (0..self.0.len()).find_map(|index| {
            let mut streams = self.streams(index)?.into_iter();
            let told = streams.find(|told| told["name"] == stream && leads(index, told))?;
            Some((index, told))
        })
    }

    /// Asks server `index` over HTTP.
    fn monitor(&self, index: usize, path: &str) -> Result<Value> {
        let server = &self.0[index];
        ensure!(server.process.is_some(), "{} does not run", server.name);
        let address = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), MONITOR_PORT);
        let mut stream = server.namespace.within(|| Ok(TcpStream::connect_timeout(&address, SILENCE)?))?;
        stream.set_read_timeout(Some(SILENCE))?;
        stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (_, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
        Ok(serde_json::from_str(body)?)
    }

    /// A client of the first server that can be reached from where no fault reaches.
    pub fn client(&self, network: &Network) -> Result<Client> {
        let running = self.0.iter().filter(|server| server.process.is_some());
        let mut connections = running.map(|server| Client::connect(network.outside(), server.address));
        connections.find_map(Result::ok).context("no NATS server can be reached")
    }

    /// What they have logged.
    pub fn logs(&self) -> String {
        let mut text = String::new();
        for Server { name, folder, .. } in &self.0 {
            let log = std::fs::read_to_string(folder.join("nats.log")).unwrap_or_default();
            let _ = writeln!(text, "--- {name}\n{}", super::newest_lines(&log));
        }
        text
    }
}

/// Who leads a stream, as a server tells it.
fn leader(stream: &Value) -> Option<&str> {
    stream.pointer("/cluster/leader")?.as_str()
}

/// Silence is noticed within seconds, as in `deploy/nats`: the defaults are minutes. A server that listens everywhere does not
/// know its own route among all, and the first election then takes seconds instead of a fraction of one.
fn configuration(name: &str, folder: &Path, (own, addresses): (Ipv4Addr, &[Ipv4Addr])) -> String {
    let store = folder.join("data").display().to_string();
    let mut text = format!(
        "server_name: {name}\nlisten: \"0.0.0.0:4222\"\nhttp: \"127.0.0.1:{MONITOR_PORT}\"\n\
         jetstream {{ store_dir: \"{store}\", max_mem: 64MB, max_file: 4GB }}\nping_interval: \"2s\"\nping_max: 2\n"
    );
    if addresses.len() > 1 {
        let routes: Vec<String> = addresses.iter().map(|address| format!("\"nats://{address}:6222\"")).collect();
        let _ = writeln!(
            text,
            "cluster {{ name: portcullis, listen: \"{own}:6222\", ping_interval: \"2s\", ping_max: 2, routes: [{}] }}",
            routes.join(", ")
        );
    }
    text
}
