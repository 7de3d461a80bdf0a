//! Whose request was it? The rule that turns a logged peer, forwarded chain and CDN header into one client address.
//!
//! A header counts only when the TCP peer that delivered it is trusted, so that nobody else can aim or evade a ban with
//! one. Names are never resolved. A trusted proxy is never the answer.

use std::net::IpAddr;

use crate::net::{NetSet, canonical, parse_addr};

/// A header in which one CDN names its visitor, believed only from that CDN's own addresses.
#[derive(Clone, Debug)]
pub struct CdnHeader {
    /// Where the CDN's requests come from.
    pub from: NetSet,
    /// Name of the header, compared without regard to case (`Cf-Connecting-Ip`).
    pub header: String,
}

/// Which peers may speak for others.
#[derive(Clone, Debug, Default)]
pub struct ClientIpPolicy {
    /// Peers whose forwarded chain is believed.
    pub trusted_proxies: NetSet,
    /// CDN headers, first match wins. Their ranges count as trusted proxies too.
    pub cdn_headers: Vec<CdnHeader>,
    /// Whether Traefik stands behind a proxy, for log formats that do not name the peer (CLF).
    pub clf_behind_proxy: bool,
}

/// What a log line says about where its request came from. Absent values are `None`; `-` must not be passed on.
#[derive(Clone, Copy, Debug)]
pub struct Origin<'a> {
    /// The TCP peer, where the format names it.
    pub peer: Option<IpAddr>,
    /// The forwarded chain: the whole `X-Forwarded-For` where it is logged, else Traefik's `ClientHost`.
    pub chain: Option<&'a str>,
}

/// The client of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Client {
    /// Canonical address.
    pub addr: IpAddr,
    /// Whether a proxy delivered the request, so that a firewall sees the proxy's address and not this one.
    pub via_proxy: bool,
}

/// Why a line has no client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum NoClient {
    /// Neither a peer nor a chain is in the line.
    Absent,
    /// What stands there is not an address.
    NotAnAddress,
    /// Every address in the line is a trusted proxy.
    OnlyProxies,
    /// A chain without a peer that could vouch for it (CLF, see `clf_behind_proxy`).
    UnvouchedChain,
}

impl NoClient {
    /// A short text for tables and counters.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Absent => "no address in the line",
            Self::NotAnAddress => "not an address",
            Self::OnlyProxies => "only trusted proxies",
            Self::UnvouchedChain => "forwarded chain without a peer",
        }
    }
}

impl ClientIpPolicy {
    /// Whether `addr` is a proxy that may speak for others.
    pub fn is_trusted(&self, addr: IpAddr) -> bool {
        self.trusted_proxies.contains(addr) || self.cdn_headers.iter().any(|cdn| cdn.from.contains(addr))
    }

    /// All proxies that may speak for others, merged.
    pub fn proxies(&self) -> NetSet {
        let cdn = self.cdn_headers.iter().flat_map(|cdn| cdn.from.nets());
        NetSet::new(self.trusted_proxies.nets().into_iter().chain(cdn))
    }

    /// The client of a line. `header` gives the logged value of a request header by its configured name, `None` when it
    /// is absent, empty or redacted.
    pub fn resolve<'a>(
        &self,
        origin: Origin<'a>,
        header: impl Fn(&str) -> Option<&'a str>,
    ) -> Result<Client, NoClient> {
        let Some(peer) = origin.peer.map(canonical) else {
            return self.resolve_without_peer(origin.chain);
        };
        if !self.is_trusted(peer) {
            return Ok(Client { addr: peer, via_proxy: false });
        }
        let cdn = self.cdn_headers.iter().find(|cdn| cdn.from.contains(peer));
        if let Some(value) = cdn.and_then(|cdn| header(&cdn.header)) {
            let addr = parse_addr(value.trim()).ok_or(NoClient::NotAnAddress)?;
            return self.visitor(addr);
        }
        self.walk(origin.chain.unwrap_or_default(), Some(peer))
    }

    fn resolve_without_peer(&self, chain: Option<&str>) -> Result<Client, NoClient> {
        let chain = chain.ok_or(NoClient::Absent)?.trim();
        if self.clf_behind_proxy {
            return self.walk(chain, None);
        }
        if chain.contains(',') {
            return Err(NoClient::UnvouchedChain);
        }
        let addr = parse_addr(chain).ok_or(NoClient::NotAnAddress)?;
        self.visitor(addr).map(|client| Client { via_proxy: false, ..client })
    }

    /// Walks the chain from its end, where the nearest proxy wrote. What stands to the left of something that is not an
    /// address cannot be vouched for by anybody, so the walk ends there.
    fn walk(&self, chain: &str, peer: Option<IpAddr>) -> Result<Client, NoClient> {
        for element in chain.rsplit(',').map(str::trim).filter(|element| !element.is_empty()) {
            let addr = parse_addr(element).ok_or(NoClient::NotAnAddress)?;
            // Traefik logs the peer itself as the "chain" when there was no header.
            if Some(addr) != peer && !self.is_trusted(addr) {
                return Ok(Client { addr, via_proxy: true });
            }
        }
        Err(NoClient::OnlyProxies)
    }

    fn visitor(&self, addr: IpAddr) -> Result<Client, NoClient> {
        if self.is_trusted(addr) { Err(NoClient::OnlyProxies) } else { Ok(Client { addr, via_proxy: true }) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::net::NamedSet;

    fn policy() -> ClientIpPolicy {
        let proxies = ["198.51.100.0/24".parse().unwrap()];
        ClientIpPolicy {
            trusted_proxies: NetSet::new(proxies.into_iter().chain(NamedSet::Cloudflare.nets())),
            cdn_headers: vec![CdnHeader {
                from: NetSet::new(NamedSet::Cloudflare.nets()),
                header: "Cf-Connecting-Ip".to_owned(),
            }],
            clf_behind_proxy: false,
        }
    }

    fn resolve(peer: &str, chain: &str, cdn: Option<&str>) -> Result<String, NoClient> {
        let origin = Origin { peer: parse_addr(peer), chain: Some(chain).filter(|c| !c.is_empty()) };
        policy()
            .resolve(origin, |name| cdn.filter(|_| name.eq_ignore_ascii_case("cf-connecting-ip")))
            .map(|client| format!("{}{}", client.addr, if client.via_proxy { " via" } else { "" }))
    }

    #[test]
    fn an_untrusted_peer_is_the_client_whatever_it_says() {
        for (chain, cdn) in [("192.0.2.9", None), ("192.0.2.9, 198.51.100.1", Some("192.0.2.9")), ("evil", Some("x"))] {
            assert_eq!(resolve("203.0.113.7", chain, cdn).unwrap(), "203.0.113.7");
        }
    }

    #[test]
    fn a_chain_is_walked_from_the_right() {
        let client = |chain| resolve("198.51.100.1", chain, None);
        assert_eq!(client("192.0.2.9").unwrap(), "192.0.2.9 via");
        assert_eq!(client("192.0.2.66, 192.0.2.9").unwrap(), "192.0.2.9 via");
        assert_eq!(client("192.0.2.66,192.0.2.9 , 198.51.100.2,162.158.1.1").unwrap(), "192.0.2.9 via");
        assert_eq!(client("192.0.2.66,::ffff:192.0.2.9").unwrap(), "192.0.2.9 via");
        assert_eq!(client("fe80::1%eth0").unwrap(), "fe80::1 via");
        assert_eq!(client("host.example, 192.0.2.9,,").unwrap(), "192.0.2.9 via");
        assert_eq!(client("192.0.2.9, host.example"), Err(NoClient::NotAnAddress));
        assert_eq!(client("192.0.2.9, unknown, 198.51.100.3"), Err(NoClient::NotAnAddress));
        assert_eq!(client("198.51.100.1"), Err(NoClient::OnlyProxies));
        assert_eq!(client(""), Err(NoClient::OnlyProxies));
    }

    #[test]
    fn a_cdn_header_counts_only_from_that_cdn() {
        assert_eq!(resolve("162.158.1.1", "192.0.2.66", Some("192.0.2.9")).unwrap(), "192.0.2.9 via");
        assert_eq!(resolve("198.51.100.1", "192.0.2.66", Some("192.0.2.9")).unwrap(), "192.0.2.66 via");
        assert_eq!(resolve("162.158.1.1", "192.0.2.66", Some("host")), Err(NoClient::NotAnAddress));
        assert_eq!(resolve("162.158.1.1", "192.0.2.66", Some("162.158.1.9")), Err(NoClient::OnlyProxies));
        // Not logged: the chain is what is left.
        assert_eq!(resolve("162.158.1.1", "192.0.2.66, 192.0.2.9", None).unwrap(), "192.0.2.9 via");
    }

    #[test]
    fn without_a_peer_only_a_single_address_counts() {
        assert_eq!(resolve("", "192.0.2.9", None).unwrap(), "192.0.2.9");
        assert_eq!(resolve("", "192.0.2.66, 192.0.2.9", None), Err(NoClient::UnvouchedChain));
        assert_eq!(resolve("", "162.158.1.1", None), Err(NoClient::OnlyProxies));
        assert_eq!(resolve("", "", None), Err(NoClient::Absent));
        let policy = ClientIpPolicy { clf_behind_proxy: true, ..policy() };
        let origin = Origin { peer: None, chain: Some("192.0.2.66, 192.0.2.9") };
        let client = policy.resolve(origin, |_| None).unwrap();
        assert_eq!((client.addr.to_string().as_str(), client.via_proxy), ("192.0.2.9", true));
    }

    fn element() -> impl Strategy<Value = String> {
        prop_oneof![
            any::<[u8; 4]>().prop_map(|octets| IpAddr::from(octets).to_string()),
            any::<[u16; 8]>().prop_map(|parts| IpAddr::from(parts).to_string()),
            Just("198.51.100.4".to_owned()),
            Just("162.158.3.4".to_owned()),
            "[ -~]{0,12}",
        ]
    }

    proptest! {
        #[test]
        fn a_header_from_an_untrusted_peer_never_changes_the_answer(
            peer: [u8; 4], chain in prop::option::of("\\PC{0,40}"), cdn in prop::option::of("\\PC{0,20}"),
        ) {
            let policy = policy();
            let peer = IpAddr::from(peer);
            prop_assume!(!policy.is_trusted(peer));
            let client = policy.resolve(Origin { peer: Some(peer), chain: chain.as_deref() }, |_| cdn.as_deref());
            prop_assert_eq!(client, Ok(Client { addr: peer, via_proxy: false }));
        }

        #[test]
        fn a_trusted_proxy_is_never_the_answer(
            peer in prop_oneof![Just(None), Just(parse_addr("198.51.100.1")), Just(parse_addr("162.158.1.1"))],
            chain in prop::collection::vec(element(), 0..5), cdn in prop::option::of(element()), behind: bool,
        ) {
            let policy = ClientIpPolicy { clf_behind_proxy: behind, ..policy() };
            let chain = chain.join(", ");
            if let Ok(client) = policy.resolve(Origin { peer, chain: Some(&chain) }, |_| cdn.as_deref()) {
                prop_assert!(!policy.is_trusted(client.addr));
                prop_assert_eq!(client.addr, canonical(client.addr));
            }
        }
    }
}
