//! `[enforce.firewall]`: which packets of banned clients are dropped, and where.

use std::fmt;
use std::time::Duration;

use proto::settings::{Field, FromValue, Mistakes, Unknown};
use serde::Deserialize;
use serde_json::Value;

/// The chain of ours in each table; no configured chain may have its name.
pub const CHAIN: &str = "PORTCULLIS";
/// What Docker leaves to administrators, and calls first for forwarded packets.
pub const DOCKER_USER: &str = "DOCKER-USER";
/// Bans held at most, unless configured.
const BANS_MAX_DEFAULT: u32 = 131_072;
/// Highest `bans_max`: a kernel set of this size takes about 200 MB.
const BANS_MAX_MAX: u32 = 1_000_000;
/// Configured chains at most: each is looked at every `resync_interval`.
pub(super) const CHAINS_MAX: usize = 16;
/// Configured port ranges at most: each is a rule that every packet meets.
const PORTS_MAX: usize = 32;
/// Longest name of a chain in the kernel, in bytes.
const CHAIN_NAME_MAX: usize = 28;

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct RawFirewall {
    backend: Field<String>,
    chains: Field<RawChains>,
    ports: Field<Vec<String>>,
    spare_ports: Field<Vec<String>>,
    bans_max: Field<u32>,
    ban_prefix_min_ipv4: Field<u8>,
    ban_prefix_min_ipv6: Field<u8>,
    resync_interval: Field<Duration>,
    full_check_interval: Field<Duration>,
    #[serde(flatten)]
    unknown: Unknown,
}

proto::section!(RawFirewall);

#[derive(Clone, Debug)]
enum RawChains {
    Auto,
    Listed(Vec<String>),
}

impl FromValue for RawChains {
    fn from_value(value: Value) -> Result<Self, String> {
        match value {
            Value::String(word) if word == "auto" => Ok(Self::Auto),
            Value::Array(_) => Vec::from_value(value).map(Self::Listed),
            other => Err(format!("expected \"auto\" or a list such as [\"raw/PREROUTING\", \"INPUT\"], got {other}")),
        }
    }
}

/// `[enforce.firewall]`, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FirewallConfig {
    /// Which back end. Default `auto`.
    pub backend: BackendKind,
    /// Where packets are looked at. Default `auto`.
    pub chains: Chains,
    /// Only packets to these ports are dropped; empty (the default) = all packets.
    pub ports: Vec<Ports>,
    /// Packets to these ports are never dropped. Default none.
    pub spare_ports: Vec<Ports>,
    /// Bans held at most, 1 to 1,000,000. Default 131,072: twice the largest set that `ipset` makes unasked.
    pub bans_max: u32,
    /// The widest IPv4 ban. Default 16: wider than any single provider's customer, narrower than a country.
    pub prefix_min_v4: u8,
    /// The widest IPv6 ban. Default 32: the usual allocation of one provider.
    pub prefix_min_v6: u8,
    /// How often rules and set headers are compared, 1 s to 1 h. Default 10 s.
    pub resync_interval: Duration,
    /// How often every member is compared, at least `resync_interval`, up to 1 day. Default 10 min.
    pub full_check_interval: Duration,
}

impl Default for FirewallConfig {
    fn default() -> Self {
        Self {
            backend: BackendKind::Auto,
            chains: Chains::Auto,
            ports: Vec::new(),
            spare_ports: Vec::new(),
            bans_max: BANS_MAX_DEFAULT,
            prefix_min_v4: 16,
            prefix_min_v6: 32,
            resync_interval: Duration::from_secs(10),
            full_check_interval: Duration::from_secs(600),
        }
    }
}

/// Which back end enforces bans on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendKind {
    /// The best that works on the host: iptables with ipset, else nftables, else plain iptables rules.
    Auto,
    /// iptables with ipset; without ipset a limited number of plain rules.
    Iptables,
    /// nftables.
    Nftables,
    /// No firewall.
    None,
}

/// Where packets are looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Chains {
    /// `raw/PREROUTING`; without a raw table INPUT and, when it exists, DOCKER-USER.
    Auto,
    /// These, as far as they exist.
    Listed(Vec<ChainRef>),
}

/// A table of iptables that bans can stand in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Table {
    /// Before connection tracking.
    Raw,
    /// After connection tracking, before address translation.
    Mangle,
    /// After address translation.
    Filter,
}

impl Table {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Raw, Self::Mangle, Self::Filter];

    /// As iptables calls it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Mangle => "mangle",
            Self::Filter => "filter",
        }
    }

    /// The table of that name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|table| table.as_str() == name)
    }

    /// Its built-in chains that packets from clients pass.
    pub fn inward(self) -> &'static [&'static str] {
        match self {
            Self::Raw => &["PREROUTING"],
            Self::Mangle => &["PREROUTING", "INPUT", "FORWARD"],
            Self::Filter => &["INPUT", "FORWARD"],
        }
    }
}

pub(super) const BUILT_IN: [&str; 5] = ["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"];

/// A chain of a table.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ChainRef {
    /// Its table.
    pub table: Table,
    /// Its name.
    pub chain: String,
}

impl ChainRef {
    /// The chain of that name in `table`.
    pub fn new(table: Table, chain: &str) -> Self {
        Self { table, chain: chain.to_owned() }
    }

    /// Whether the kernel has it wherever it has the table.
    pub fn is_built_in(&self) -> bool {
        self.table.inward().contains(&self.chain.as_str())
    }

    fn parse(text: &str) -> Result<Self, String> {
        let (table, chain) = text.split_once('/').unwrap_or(("filter", text));
        let table = Table::parse(table)
            .ok_or_else(|| format!("{text:?}: the table must be raw, mangle or filter, got {table:?}"))?;
        if !is_chain_name(chain) {
            return Err(format!(
                "{text:?}: expected [TABLE/]CHAIN such as \"raw/PREROUTING\" or \"DOCKER-USER\", with a name of at most \
                 {CHAIN_NAME_MAX} bytes"
            ));
        }
        if chain == CHAIN {
            return Err(format!("{text:?}: {CHAIN} is the chain that Portcullis makes itself"));
        }
        let this = Self::new(table, chain);
        if BUILT_IN.contains(&chain) && !this.is_built_in() {
            let inward: Vec<String> =
                table.inward().iter().map(|chain| format!("\"{}/{chain}\"", table.as_str())).collect();
            let elsewhere = Table::ALL.into_iter().find(|other| other.inward().contains(&chain));
            let instead = elsewhere.map_or_else(String::new, |other| format!("\"{}/{chain}\", or ", other.as_str()));
            let inward = inward.join(" or ");
            return Err(format!(
                "{text:?}: packets of clients do not pass {chain} in table {}: write {instead}{inward}",
                table.as_str()
            ));
        }
        Ok(this)
    }
}

/// Whether a chain can have that name.
pub(super) fn is_chain_name(name: &str) -> bool {
    (1..=CHAIN_NAME_MAX).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'+' | b':'))
        && !name.starts_with('-')
}

impl fmt::Display for ChainRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.table {
            Table::Filter => f.write_str(&self.chain),
            table => write!(f, "{}/{}", table.as_str(), self.chain),
        }
    }
}

/// Which packets carry a port number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP, which carries HTTP/3.
    Udp,
}

impl Protocol {
    /// As iptables calls it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// A range of ports of one protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ports {
    /// Of this protocol.
    pub protocol: Protocol,
    /// First port, at least 1.
    pub first: u16,
    /// Last port, at least `first`.
    pub last: u16,
}

impl Ports {
    /// `443`, `tcp/443`, `8000-8010`, `udp/8000-8010`; without a protocol both are meant.
    pub(super) fn parse(text: &str) -> Result<Vec<Self>, String> {
        let wrong = || format!("expected ports such as \"443\", \"tcp/443\" or \"udp/8000-8010\", got {text:?}");
        let (protocols, range): (&[Protocol], &str) = match text.split_once('/') {
            None => (&[Protocol::Tcp, Protocol::Udp], text),
            Some(("tcp", range)) => (&[Protocol::Tcp], range),
            Some(("udp", range)) => (&[Protocol::Udp], range),
            Some(_) => return Err(wrong()),
        };
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let first: u16 = first.parse().map_err(|_| wrong())?;
        let last: u16 = last.parse().map_err(|_| wrong())?;
        if first == 0 || last < first {
            return Err(wrong());
        }
        Ok(protocols.iter().map(|&protocol| Self { protocol, first, last }).collect())
    }
}

impl RawFirewall {
    const KEYS: [&str; 9] = [
        "backend",
        "chains",
        "ports",
        "spare_ports",
        "bans_max",
        "ban_prefix_min_ipv4",
        "ban_prefix_min_ipv6",
        "resync_interval",
        "full_check_interval",
    ];

    pub(super) fn check(self, mistakes: &mut Mistakes) -> Option<FirewallConfig> {
        self.unknown.check(&Self::KEYS, mistakes);
        let default = FirewallConfig::default();
        let backend = check_backend(self.backend.take("backend", mistakes).as_deref(), mistakes);
        let chains = check_chains(self.chains.take("chains", mistakes), mistakes);
        let misplaced =
            backend == Some(BackendKind::Nftables) && chains.as_ref().is_some_and(|chains| *chains != Chains::Auto);
        if misplaced {
            mistakes.add("chains", "is for iptables; nftables drops at prerouting, before all chains of others");
        }
        let ports = check_ports("ports", self.ports.take("ports", mistakes), mistakes);
        let spare_ports = check_ports("spare_ports", self.spare_ports.take("spare_ports", mistakes), mistakes);
        let resync_interval = self.resync_interval.or("resync_interval", default.resync_interval, mistakes);
        let full_check_interval =
            self.full_check_interval.or("full_check_interval", default.full_check_interval, mistakes);
        let mut range = |key: &str, fine: bool, text: &str| {
            if !fine {
                mistakes.add(key, text);
            }
            fine
        };
        let second = Duration::from_secs(1);
        let intervals = [
            range(
                "resync_interval",
                (second..=3600 * second).contains(&resync_interval),
                "must be from \"1s\" to \"1h\"",
            ),
            range(
                "full_check_interval",
                (resync_interval..=86_400 * second).contains(&full_check_interval),
                "must be at least resync_interval and at most \"1day\"",
            ),
        ];
        let bans_max = self.bans_max.or("bans_max", default.bans_max, mistakes);
        let prefix_min_v4 = self.ban_prefix_min_ipv4.or("ban_prefix_min_ipv4", default.prefix_min_v4, mistakes);
        let prefix_min_v6 = self.ban_prefix_min_ipv6.or("ban_prefix_min_ipv6", default.prefix_min_v6, mistakes);
        let mut number = |key: &str, fine: bool, max: u32| {
            if !fine {
                mistakes.add(key, format!("must be from 1 to {max}"));
            }
            fine
        };
        let numbers = [
            number("bans_max", (1..=BANS_MAX_MAX).contains(&bans_max), BANS_MAX_MAX),
            number("ban_prefix_min_ipv4", (1..=32).contains(&prefix_min_v4), 32),
            number("ban_prefix_min_ipv6", (1..=128).contains(&prefix_min_v6), 128),
        ];
        let fine = intervals.into_iter().chain(numbers).all(|fine| fine) && !misplaced;
        let checked = FirewallConfig {
            backend: backend?,
            chains: chains?,
            ports: ports?,
            spare_ports: spare_ports?,
            bans_max,
            prefix_min_v4,
            prefix_min_v6,
            resync_interval,
            full_check_interval,
        };
        fine.then_some(checked)
    }
}

fn check_backend(given: Option<&str>, mistakes: &mut Mistakes) -> Option<BackendKind> {
    match given {
        None | Some("auto") => Some(BackendKind::Auto),
        Some("iptables") => Some(BackendKind::Iptables),
        Some("none") => Some(BackendKind::None),
        Some("nftables") => Some(BackendKind::Nftables),
        Some(other) => {
            mistakes
                .add("backend", format!("expected \"auto\", \"iptables\", \"nftables\" or \"none\", got {other:?}"));
            None
        }
    }
}

fn check_chains(given: Option<RawChains>, mistakes: &mut Mistakes) -> Option<Chains> {
    let texts = match given {
        None | Some(RawChains::Auto) => return Some(Chains::Auto),
        Some(RawChains::Listed(texts)) => texts,
    };
    if texts.is_empty() || texts.len() > CHAINS_MAX {
        mistakes.add("chains", format!("expected 1 to {CHAINS_MAX} chains, got {}", texts.len()));
        return None;
    }
    let chains = collect(texts.iter().map(|text| ChainRef::parse(text)), "chains", mistakes)?;
    let mut sorted = chains;
    sorted.sort();
    if let Some(twice) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        mistakes.add("chains", format!("\"{}\" is listed twice", twice[0]));
        return None;
    }
    Some(Chains::Listed(sorted))
}

fn check_ports(key: &str, given: Option<Vec<String>>, mistakes: &mut Mistakes) -> Option<Vec<Ports>> {
    let texts = given.unwrap_or_default();
    if texts.len() > PORTS_MAX {
        mistakes.add(key, format!("expected at most {PORTS_MAX} entries, got {}", texts.len()));
        return None;
    }
    let mut ports = collect(texts.iter().map(|text| Ports::parse(text)), key, mistakes)?.concat();
    ports.sort_unstable();
    ports.dedup();
    Some(ports)
}

pub(super) fn collect<T>(
    items: impl Iterator<Item = Result<T, String>>,
    key: &str,
    mistakes: &mut Mistakes,
) -> Option<Vec<T>> {
    let (mut good, mut fine) = (Vec::new(), true);
    for item in items {
        match item {
            Ok(item) => good.push(item),
            Err(text) => {
                mistakes.add(key, text);
                fine = false;
            }
        }
    }
    fine.then_some(good)
}
