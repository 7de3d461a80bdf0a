//! `[enforce]`: raw as a file says it, then checked.

mod firewall;

use proto::settings::{Field, FromValue, Mistakes, Unknown};
use serde::Deserialize;
use serde_json::Value;

use crate::config::firewall::RawFirewall;
pub use crate::config::firewall::{BackendKind, CHAIN, ChainRef, Chains, FirewallConfig, Ports, Protocol, Table};

/// `[enforce]` as a file says it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct RawEnforce {
    firewall: Field<RawFirewall>,
    cloudflare: Field<Anything>,
    telegram: Field<Anything>,
    webhooks: Field<Anything>,
    forwarded_for: Field<Anything>,
    #[serde(flatten)]
    unknown: Unknown,
}

proto::section!(RawEnforce);

/// A section that is not looked into.
#[derive(Clone, Debug)]
struct Anything;

impl FromValue for Anything {
    fn from_value(_: Value) -> Result<Self, String> {
        Ok(Self)
    }
}

/// `[enforce]`, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EnforceConfig {
    /// The host's firewall.
    pub firewall: FirewallConfig,
}

impl RawEnforce {
    /// Checks everything; `None` when a mistake was noted.
    pub fn check(self, mistakes: &mut Mistakes) -> Option<EnforceConfig> {
        self.unknown.check(&["firewall", "cloudflare", "telegram", "webhooks", "forwarded_for"], mistakes);
        let later = [
            ("cloudflare", self.cloudflare),
            ("telegram", self.telegram),
            ("webhooks", self.webhooks),
            ("forwarded_for", self.forwarded_for),
        ];
        let mut fine = true;
        for (key, section) in later {
            if section.take(key, mistakes).is_some() {
                mistakes.add(key, "not available in this version");
                fine = false;
            }
        }
        let raw = match self.firewall {
            Field::Absent => Some(RawFirewall::default()),
            given => given.take("firewall", mistakes),
        };
        let firewall = mistakes.within("firewall", |mistakes| raw?.check(mistakes))?;
        fine.then_some(EnforceConfig { firewall })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(value: Value) -> Result<EnforceConfig, Vec<String>> {
        let raw: RawEnforce = serde_json::from_value(value).unwrap();
        let mut mistakes = Mistakes::new();
        let checked = mistakes.within("enforce", |mistakes| raw.check(mistakes));
        let texts: Vec<String> = mistakes.into_sorted().iter().map(ToString::to_string).collect();
        assert_eq!(checked.is_some(), texts.is_empty(), "a refusal names its mistakes: {texts:?}");
        checked.ok_or(texts)
    }

    #[test]
    fn nothing_given_means_the_defaults() {
        let defaults = EnforceConfig { firewall: FirewallConfig::default() };
        assert_eq!(check(json!({})).unwrap(), defaults);
        assert_eq!(check(json!({"firewall": {"chains": "auto", "backend": "auto", "ports": []}})).unwrap(), defaults);
    }

    #[test]
    fn chains_and_ports_are_read() {
        let firewall = json!({"chains": ["raw/PREROUTING", "INPUT", "DOCKER-USER"], "ports": ["443", "tcp/80"],
            "spare_ports": ["udp/8000-8010"], "bans_max": 1, "ban_prefix_min_ipv4": 32});
        let checked = check(json!({ "firewall": firewall })).unwrap().firewall;
        let Chains::Listed(chains) = checked.chains else { panic!("listed") };
        let texts: Vec<String> = chains.iter().map(ToString::to_string).collect();
        assert_eq!(texts, ["raw/PREROUTING", "DOCKER-USER", "INPUT"]);
        let (tcp, udp) = (Protocol::Tcp, Protocol::Udp);
        let port = |protocol, first, last| Ports { protocol, first, last };
        assert_eq!(checked.ports, [port(tcp, 80, 80), port(tcp, 443, 443), port(udp, 443, 443)]);
        assert_eq!(checked.spare_ports, [port(udp, 8000, 8010)]);
    }

    #[test]
    fn chains_are_for_iptables() {
        let firewall = |backend| check(json!({"firewall": {"backend": backend, "chains": ["INPUT"]}}));
        let texts = firewall("nftables").unwrap_err();
        assert!(texts.len() == 1 && texts[0].starts_with("enforce.firewall.chains: is for iptables"), "{texts:?}");
        assert!(firewall("iptables").is_ok() && firewall("auto").is_ok());
        assert!(check(json!({"firewall": {"backend": "nftables", "chains": "auto"}})).is_ok());
    }

    #[test]
    fn every_mistake_is_reported_with_its_key() {
        let wrong = json!({
            "cloudflare": {"api_token_file": "x"}, "telegram": {}, "webhooks": [], "forwarded_for": true, "firewal": {},
            "firewall": {
                "backend": "nftable", "chains": ["nat/PREROUTING", "OUTPUT", "PREROUTING", "-x", "PORTCULLIS"],
                "ports": ["icmp/1", "0", "9-8"], "bans_max": 0, "ban_prefix_min_ipv4": 33, "resync_interval": "1ms",
                "full_check_interval": "2days", "chain": 1,
            },
        });
        let texts = check(wrong).unwrap_err();
        let expected = [
            "enforce.cloudflare: not available in this version",
            "enforce.firewal: unknown key; did you mean `firewall`?",
            "enforce.firewall.backend: expected \"auto\", \"iptables\", \"nftables\" or \"none\", got \"nftable\"",
            "enforce.firewall.ban_prefix_min_ipv4: must be from 1 to 32",
            "enforce.firewall.bans_max: must be from 1 to 1000000",
            "enforce.firewall.chain: unknown key; did you mean `chains`?",
            "enforce.firewall.chains: \"-x\": expected [TABLE/]CHAIN such as \"raw/PREROUTING\" or \"DOCKER-USER\"",
            "enforce.firewall.chains: \"OUTPUT\": clients' packets pass INPUT or FORWARD in table filter",
            "enforce.firewall.chains: \"PORTCULLIS\": PORTCULLIS is the chain that Portcullis makes itself",
            "enforce.firewall.chains: \"PREROUTING\": clients' packets pass INPUT or FORWARD in table filter",
            "enforce.firewall.chains: \"nat/PREROUTING\": the table must be raw, mangle or filter, got \"nat\"",
            "enforce.firewall.full_check_interval: must be at least resync_interval and at most \"1day\"",
            "enforce.firewall.ports: expected ports such as \"443\", \"tcp/443\" or \"udp/8000-8010\", got \"0\"",
            "enforce.firewall.ports: expected ports such as \"443\", \"tcp/443\" or \"udp/8000-8010\", got \"9-8\"",
            "enforce.firewall.ports: expected ports such as \"443\", \"tcp/443\" or \"udp/8000-8010\", got \"icmp/1\"",
            "enforce.firewall.resync_interval: must be from \"1s\" to \"1h\"",
            "enforce.forwarded_for: not available in this version",
            "enforce.telegram: not available in this version",
            "enforce.webhooks: not available in this version",
        ];
        assert_eq!(texts, expected);
    }
}
