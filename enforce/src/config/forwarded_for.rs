//! `[enforce.forwarded_for]`: refusing clients behind a proxy by what Traefik tells the services about them.

use proto::settings::{Field, Mistakes, Unknown};
use serde::Deserialize;

use crate::config::firewall::{BUILT_IN, CHAIN, CHAINS_MAX, DOCKER_USER, Ports, Protocol, collect, is_chain_name};

/// The chain of ours in table filter; those that it jumps to are called after it.
pub const FORWARDED_CHAIN: &str = "PORTCULLIS-FWD";
/// The header that is a list.
pub const FORWARDED_FOR: &str = "X-Forwarded-For";
/// A rule of iptables names 15 ports at most, and a range counts twice.
const PORTS_MAX: usize = 15;
/// Headers at most: each is looked for in every packet.
const HEADERS_MAX: usize = 4;
/// Longest name of a header, in bytes: with line ends and an address it must fit into the 128 bytes of a string rule.
const HEADER_BYTES_MAX: usize = 64;
/// Rules that refuse, unless configured: 200 clients in the two headers, whose measured cost stands in the README.
const RULES_MAX_DEFAULT: u32 = 600;
/// Highest `rules_max`. They are all rewritten at each change.
const RULES_MAX_MAX: u32 = 10_000;
/// Longest name of an interface, in bytes.
const INTERFACE_BYTES_MAX: usize = 15;

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct RawForwardedFor {
    enabled: Field<bool>,
    chains: Field<Vec<String>>,
    ports: Field<Vec<String>>,
    in_interface: Field<String>,
    out_interface: Field<String>,
    headers: Field<Vec<String>>,
    whole_list: Field<bool>,
    rules_max: Field<u32>,
    #[serde(flatten)]
    unknown: Unknown,
}

proto::section!(RawForwardedFor);

/// `[enforce.forwarded_for]`, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForwardedForConfig {
    /// Whether it is done. Default no: it costs every request to a service time.
    pub enabled: bool,
    /// Chains of table filter that packets from Traefik to services pass, as far as they exist. Default DOCKER-USER.
    pub chains: Vec<String>,
    /// Only packets to these ports of services are looked at, each a first and a last port; empty (the default) = all.
    pub ports: Vec<(u16, u16)>,
    /// Only packets that came in here; a trailing `+` stands for any rest. Default any.
    pub in_interface: Option<String>,
    /// Only packets that go out here. Default any.
    pub out_interface: Option<String>,
    /// Headers that name the client. Default `X-Forwarded-For` and `Cf-Connecting-Ip`.
    pub headers: Vec<String>,
    /// Whether a client is found at any place of `X-Forwarded-For` and not at the first alone. Default no, because then
    /// a short upload that holds the bare address is refused too.
    pub whole_list: bool,
    /// Rules that refuse, 1 to 10,000; those that lead to them come on top. Default 600.
    pub rules_max: u32,
}

impl Default for ForwardedForConfig {
    fn default() -> Self {
        Self {
            enabled: false,
            chains: vec![DOCKER_USER.to_owned()],
            ports: Vec::new(),
            in_interface: None,
            out_interface: None,
            headers: [FORWARDED_FOR, "Cf-Connecting-Ip"].map(str::to_owned).into(),
            whole_list: false,
            rules_max: RULES_MAX_DEFAULT,
        }
    }
}

impl ForwardedForConfig {
    /// Whether `X-Forwarded-For` is among the headers.
    pub fn has_list(&self) -> bool {
        self.headers.iter().any(|header| header.eq_ignore_ascii_case(FORWARDED_FOR))
    }
}

impl RawForwardedFor {
    const KEYS: [&str; 8] =
        ["enabled", "chains", "ports", "in_interface", "out_interface", "headers", "whole_list", "rules_max"];

    pub(super) fn check(self, mistakes: &mut Mistakes) -> Option<ForwardedForConfig> {
        self.unknown.check(&Self::KEYS, mistakes);
        let default = ForwardedForConfig::default();
        let enabled = self.enabled.or("enabled", default.enabled, mistakes);
        let whole_list = self.whole_list.or("whole_list", default.whole_list, mistakes);
        let rules_max = self.rules_max.or("rules_max", default.rules_max, mistakes);
        let chains = check_chains(&self.chains.or("chains", default.chains, mistakes), mistakes);
        let ports = check_ports(&self.ports.or("ports", Vec::new(), mistakes), mistakes);
        let in_interface = check_interface("in_interface", self.in_interface.take("in_interface", mistakes), mistakes);
        let out_interface =
            check_interface("out_interface", self.out_interface.take("out_interface", mistakes), mistakes);
        let headers = check_headers(&self.headers.or("headers", default.headers, mistakes), mistakes);
        let rules_ok = (1..=RULES_MAX_MAX).contains(&rules_max);
        if !rules_ok {
            mistakes.add("rules_max", format!("must be from 1 to {RULES_MAX_MAX}"));
        }
        let checked = ForwardedForConfig {
            enabled,
            chains: chains?,
            ports: ports?,
            in_interface: in_interface?,
            out_interface: out_interface?,
            headers: headers?,
            whole_list,
            rules_max,
        };
        (checked.check_whole(mistakes) && rules_ok).then_some(checked)
    }
}

impl ForwardedForConfig {
    /// What one key says of another.
    fn check_whole(&self, mistakes: &mut Mistakes) -> bool {
        let has = |chain: &str| self.chains.iter().any(|listed| listed == chain);
        let mut fine = true;
        let mut refuse = |refused: bool, key: &str, text: &str| {
            if refused {
                mistakes.add(key, text);
                fine = false;
            }
        };
        let list_text = "needs X-Forwarded-For among headers";
        refuse(self.whole_list && !self.has_list(), "whole_list", list_text);
        let in_text = "packets in chain OUTPUT have come in nowhere";
        refuse(self.in_interface.is_some() && has("OUTPUT"), "in_interface", in_text);
        let out_text = "packets in chain INPUT go out nowhere";
        refuse(self.out_interface.is_some() && has("INPUT"), "out_interface", out_text);
        fine
    }
}

fn check_chains(names: &[String], mistakes: &mut Mistakes) -> Option<Vec<String>> {
    if names.is_empty() || names.len() > CHAINS_MAX {
        mistakes.add("chains", format!("expected 1 to {CHAINS_MAX} chains, got {}", names.len()));
        return None;
    }
    let check = |name: &String| match name.as_str() {
        name if !is_chain_name(name) => {
            Err(format!("{name:?}: expected a chain of table filter such as \"DOCKER-USER\" or \"OUTPUT\""))
        }
        name if name.starts_with(CHAIN) => Err(format!("{name:?}: is a chain that Portcullis makes itself")),
        name if BUILT_IN.contains(&name) && !["INPUT", "FORWARD", "OUTPUT"].contains(&name) => {
            Err(format!("{name:?}: is not in table filter"))
        }
        name => Ok(name.to_owned()),
    };
    let mut chains = collect(names.iter().map(check), "chains", mistakes)?;
    chains.sort();
    chains.dedup();
    if chains.len() < names.len() {
        mistakes.add("chains", "a chain is listed twice");
        return None;
    }
    Some(chains)
}

fn check_ports(texts: &[String], mistakes: &mut Mistakes) -> Option<Vec<(u16, u16)>> {
    let parse = |text: &String| {
        let wrong = || format!("expected TCP ports such as \"80\" or \"8000-8010\", got {text:?}");
        let parsed = Ports::parse(text).map_err(|_| wrong())?;
        let tcp = parsed.iter().find(|ports| ports.protocol == Protocol::Tcp).ok_or_else(wrong)?;
        Ok((tcp.first, tcp.last))
    };
    let mut ports = collect(texts.iter().map(parse), "ports", mistakes)?;
    ports.sort_unstable();
    ports.dedup();
    let slots: usize = ports.iter().map(|(first, last)| if first == last { 1 } else { 2 }).sum();
    if slots > PORTS_MAX {
        mistakes.add("ports", format!("expected at most {PORTS_MAX}, a range counting twice, got {slots}"));
        return None;
    }
    Some(ports)
}

#[expect(clippy::option_option, reason = "the outer one is a mistake, the inner one nothing given")]
fn check_interface(key: &str, name: Option<String>, mistakes: &mut Mistakes) -> Option<Option<String>> {
    let Some(name) = name else { return Some(None) };
    let bare = name.strip_suffix('+').unwrap_or(&name);
    let fits = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'@');
    if !(1..=INTERFACE_BYTES_MAX).contains(&name.len()) || bare.starts_with('-') || !bare.bytes().all(fits) {
        mistakes.add(key, format!("expected an interface such as \"docker0\" or \"br-+\", got {name:?}"));
        return None;
    }
    Some(Some(name))
}

fn check_headers(names: &[String], mistakes: &mut Mistakes) -> Option<Vec<String>> {
    if names.is_empty() || names.len() > HEADERS_MAX {
        mistakes.add("headers", format!("expected 1 to {HEADERS_MAX} headers, got {}", names.len()));
        return None;
    }
    let check = |name: &String| {
        let fits = (1..=HEADER_BYTES_MAX).contains(&name.len())
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'));
        if fits { Ok(name.clone()) } else { Err(format!("expected a header such as \"X-Real-Ip\", got {name:?}")) }
    };
    let headers = collect(names.iter().map(check), "headers", mistakes)?;
    let twice = |(i, name): (usize, &String)| headers[..i].iter().any(|other| other.eq_ignore_ascii_case(name));
    if headers.iter().enumerate().any(twice) {
        mistakes.add("headers", "a header is listed twice");
        return None;
    }
    Some(headers)
}
