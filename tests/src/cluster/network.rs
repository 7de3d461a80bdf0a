//! The network of a cluster: one namespace for each host, joined by a bridge in a namespace of its own.
//!
//! Faults strike on the bridge's side of a host's link, so that the host itself is never touched: a cut is a link that is
//! down, loss is a rule of the bridge that drops at random, slowness is a bucket that lets little through. Delay that does
//! not come of a full queue would need `netem`, which not every kernel has.

use std::net::Ipv4Addr;

use anyhow::Result;

use crate::netns::Namespace;

/// The bridge, and whatever watches the cluster from outside of every fault.
const BRIDGE: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// Where attackers and visitors live.
const CLIENTS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 50);
/// Clients have the addresses 1 to this of 203.0.113.0/24 that can really connect.
const CLIENTS_MAX: u8 = 20;
/// Of a slow link, in each direction: a batch of lines takes a good part of a second.
const SLOW: [&str; 6] = ["rate", "256kbit", "burst", "4000", "latency", "2s"];

/// Bridge and clients. The same addresses in every cluster: nothing of it is seen outside.
#[derive(Debug)]
pub struct Network {
    bridge: Namespace,
    clients: Namespace,
}

impl Network {
    /// A bridge, and the clients on it.
    pub fn new() -> Result<Self> {
        let network = Self { bridge: Namespace::new()?, clients: Namespace::new()? };
        let bridge = &network.bridge;
        bridge.run("ip", &["link", "add", "br0", "type", "bridge"])?;
        bridge.run("ip", &["addr", "add", &format!("{BRIDGE}/24"), "dev", "br0"])?;
        bridge.run("ip", &["link", "set", "br0", "up"])?;
        network.plug("clients", &network.clients, CLIENTS)?;
        for last in 1..=CLIENTS_MAX {
            network.clients.run("ip", &["addr", "add", &format!("{}/32", client(last)), "dev", "eth0"])?;
        }
        Ok(network)
    }

    /// A host on the bridge, to which clients can connect.
    pub fn host(&self, name: &str, address: Ipv4Addr) -> Result<Namespace> {
        let host = Namespace::new()?;
        self.plug(name, &host, address)?;
        // Clients are neighbours, not behind a gateway: a gateway is never banned.
        host.run("ip", &["route", "add", "203.0.113.0/24", "dev", "eth0"])?;
        Ok(host)
    }

    fn plug(&self, name: &str, host: &Namespace, address: Ipv4Addr) -> Result<()> {
        let bridge = &self.bridge;
        bridge.run("ip", &["link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", host.name()])?;
        bridge.run("ip", &["link", "set", name, "master", "br0", "up"])?;
        host.run("ip", &["addr", "add", &format!("{address}/24"), "dev", "eth0"])?;
        host.run("ip", &["link", "set", "eth0", "up"])?;
        Ok(())
    }

    /// Where no fault reaches.
    pub fn outside(&self) -> &Namespace {
        &self.bridge
    }

    /// One request by `client` to `server`; the status, or `None` when no answer comes.
    pub fn get(&self, client: Ipv4Addr, server: Ipv4Addr, path: &str) -> Option<u16> {
        let (from, url) = (client.to_string(), format!("http://{server}{path}"));
        // A banned client hears nothing at all; one that is not banned is answered within a fraction of this.
        let options = ["-s", "-o", "/dev/null", "-w", "%{http_code}", "--max-time", "0.7", "--interface"];
        let status = self.clients.run("curl", &[&options[..], &[&from, &url]].concat()).ok()?;
        status.parse().ok().filter(|status| *status != 0)
    }

    /// Nothing comes or goes.
    pub fn cut(&self, host: &str) -> Result<()> {
        self.bridge.run("ip", &["link", "set", host, "down"]).map(drop)
    }

    /// Each packet is lost with a chance of `percent` in 100, 1 to 100, in each direction.
    pub fn lose(&self, host: &str, percent: u8) -> Result<()> {
        let (table, last) = (table(host), percent.saturating_sub(1));
        let rule = |device: &str| {
            format!("add rule bridge {table} forward {device} \"{host}\" numgen random mod 100 <= {last} drop")
        };
        let lines = [
            format!("add table bridge {table}"),
            format!("add chain bridge {table} forward {{ type filter hook forward priority 0; }}"),
            rule("iifname"),
            rule("oifname"),
        ];
        self.bridge.run("nft", &[&lines.join("\n")]).map(drop)
    }

    /// Little passes at a time, in each direction.
    pub fn slow(&self, host: &str, namespace: &Namespace) -> Result<()> {
        for (side, device) in [(&self.bridge, host), (namespace, "eth0")] {
            side.run("tc", &[&["qdisc", "replace", "dev", device, "root", "tbf"], &SLOW[..]].concat())?;
        }
        Ok(())
    }

    /// The link is as it was before all faults.
    pub fn heal(&self, host: &str, namespace: &Namespace) -> Result<()> {
        self.bridge.run("ip", &["link", "set", host, "up"])?;
        // What was never done cannot be undone, which is no failure.
        let _ = self.bridge.run("nft", &["delete", "table", "bridge", &table(host)]);
        for (side, device) in [(&self.bridge, host), (namespace, "eth0")] {
            let _ = side.run("tc", &["qdisc", "delete", "dev", device, "root"]);
        }
        Ok(())
    }
}

/// Client number `last`, who can really connect when that is at most 20.
pub fn client(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(203, 0, 113, last)
}

/// A table of the bridge, named after the host.
fn table(host: &str) -> String {
    host.replace('-', "_")
}
