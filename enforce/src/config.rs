//! `[enforce]`: raw as a file says it, then checked.

mod firewall;
mod notify;
mod secret;
mod telegram;
mod webhooks;

use proto::settings::{Field, FromValue, Mistakes, Unknown};
use serde::Deserialize;
use serde_json::Value;

use crate::config::firewall::RawFirewall;
pub use crate::config::firewall::{BackendKind, CHAIN, ChainRef, Chains, FirewallConfig, Ports, Protocol, Table};
use crate::config::secret::Hidden;
pub use crate::config::secret::SecretSource;
use crate::config::telegram::RawTelegram;
pub use crate::config::telegram::TelegramConfig;
use crate::config::webhooks::RawWebhooks;
pub use crate::config::webhooks::WebhookConfig;

/// `[enforce]` as a file says it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct RawEnforce {
    firewall: Field<RawFirewall>,
    cloudflare: Field<Anything>,
    telegram: Field<RawTelegram>,
    webhooks: Field<Hidden<RawWebhooks>>,
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
    /// Messages to a chat.
    pub telegram: Option<TelegramConfig>,
    /// Requests to other programs, by name.
    pub webhooks: Vec<WebhookConfig>,
}

impl EnforceConfig {
    /// How many notifiers there are.
    pub fn notifiers(&self) -> usize {
        usize::from(self.telegram.is_some()) + self.webhooks.len()
    }
}

impl RawEnforce {
    /// Checks everything; `None` when a mistake was noted.
    pub fn check(self, mistakes: &mut Mistakes) -> Option<EnforceConfig> {
        self.unknown.check(&["firewall", "cloudflare", "telegram", "webhooks", "forwarded_for"], mistakes);
        let later = [("cloudflare", self.cloudflare), ("forwarded_for", self.forwarded_for)];
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
        let firewall = mistakes.within("firewall", |mistakes| raw?.check(mistakes));
        let telegram = check_section("telegram", self.telegram, RawTelegram::check, mistakes);
        let webhooks =
            check_section("webhooks", self.webhooks, |Hidden(raw), mistakes| webhooks::check(raw, mistakes), mistakes);
        let (firewall, telegram, webhooks) = (firewall?, telegram?, webhooks?.unwrap_or_default());
        fine.then_some(EnforceConfig { firewall, telegram, webhooks })
    }
}

/// A section that may be left out: `Some(None)` when it is, `None` when a mistake was noted.
fn check_section<R, T>(
    key: &str,
    section: Field<R>,
    check: impl FnOnce(R, &mut Mistakes) -> Option<T>,
    mistakes: &mut Mistakes,
) -> Option<Option<T>> {
    if matches!(section, Field::Absent) {
        return Some(None);
    }
    let raw = section.take(key, mistakes)?;
    mistakes.within(key, |mistakes| check(raw, mistakes)).map(Some)
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
        let firewall = FirewallConfig::default();
        let defaults = EnforceConfig { firewall, telegram: None, webhooks: Vec::new() };
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
    fn every_mistake_is_reported_with_its_key() {
        let wrong = json!({
            "cloudflare": {"api_token_file": "x"}, "telegram": {}, "webhooks": [], "forwarded_for": true, "firewal": {},
            "firewall": {
                "backend": "nftables", "chains": ["nat/PREROUTING", "OUTPUT", "PREROUTING", "-x", "PORTCULLIS"],
                "ports": ["icmp/1", "0", "9-8"], "bans_max": 0, "ban_prefix_min_ipv4": 33, "resync_interval": "1ms",
                "full_check_interval": "2days", "chain": 1,
            },
        });
        let texts = check(wrong).unwrap_err();
        let expected = [
            "enforce.cloudflare: not available in this version",
            "enforce.firewal: unknown key; did you mean `firewall`?",
            "enforce.firewall.backend: \"nftables\" is not available in this version",
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
            "enforce.telegram.bot_token_file: is required (or bot_token)",
            "enforce.telegram.chat_id: is required",
            "enforce.webhooks: expected a table",
        ];
        assert_eq!(texts, expected);
    }
}
