//! `[enforce]`: raw as a file says it, then checked.

mod cloudflare;
mod firewall;
mod forwarded_for;
mod notify;
mod secret;
mod telegram;
mod webhooks;

use proto::settings::{Field, FromValue, Mistakes, Unknown};
use serde::Deserialize;

use crate::cloudflare::check_login;
use crate::config::cloudflare::RawCloudflare;
pub use crate::config::cloudflare::{CloudflareConfig, CloudflareLogin, Mode, Scope};
use crate::config::firewall::RawFirewall;
pub use crate::config::firewall::{
    BackendKind, CHAIN, ChainRef, Chains, DOCKER_USER, FirewallConfig, Ports, Protocol, Table,
};
use crate::config::forwarded_for::RawForwardedFor;
pub use crate::config::forwarded_for::{FORWARDED_CHAIN, FORWARDED_FOR, ForwardedForConfig};
use crate::config::secret::Hidden;
pub use crate::config::secret::SecretSource;
pub(crate) use crate::config::secret::{SecretError, check_sendable};
use crate::config::telegram::RawTelegram;
pub use crate::config::telegram::TelegramConfig;
use crate::config::webhooks::RawWebhooks;
pub use crate::config::webhooks::WebhookConfig;
pub use crate::notify::message::EventKind;

/// `[enforce]` as a file says it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct RawEnforce {
    firewall: Field<RawFirewall>,
    cloudflare: Field<Hidden<RawCloudflare>>,
    telegram: Field<RawTelegram>,
    webhooks: Field<Hidden<RawWebhooks>>,
    forwarded_for: Field<RawForwardedFor>,
    #[serde(flatten)]
    unknown: Unknown,
}

proto::section!(RawEnforce);

/// `[enforce]`, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EnforceConfig {
    /// The host's firewall.
    pub firewall: FirewallConfig,
    /// Clients behind a proxy, on their way from Traefik to services.
    pub forwarded_for: ForwardedForConfig,
    /// Cloudflare, where it is configured.
    pub cloudflare: Option<CloudflareConfig>,
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

    /// Reads every secret as who needs it will, and notes what is wrong with it. Shows none. Not for roles that share the
    /// configuration and need none of them.
    pub fn check_secrets(&self, mistakes: &mut Mistakes) {
        mistakes.within("enforce", |mistakes| {
            if let Some(cloudflare) = &self.cloudflare {
                mistakes.within("cloudflare", |mistakes| check_login(cloudflare, mistakes));
            }
            if let Some(telegram) = &self.telegram {
                mistakes.within("telegram", |mistakes| telegram.check_secrets(mistakes));
            }
            mistakes.within("webhooks", |mistakes| {
                for webhook in &self.webhooks {
                    mistakes.within(&webhook.name, |mistakes| webhook.check_secrets(mistakes));
                }
            });
        });
    }
}

impl RawEnforce {
    /// Checks everything; `None` when a mistake was noted.
    pub fn check(self, mistakes: &mut Mistakes) -> Option<EnforceConfig> {
        self.unknown.check(&["firewall", "cloudflare", "telegram", "webhooks", "forwarded_for"], mistakes);
        let raw = match self.firewall {
            Field::Absent => Some(RawFirewall::default()),
            given => given.take("firewall", mistakes),
        };
        let firewall = mistakes.within("firewall", |mistakes| raw?.check(mistakes));
        let raw = match self.forwarded_for {
            Field::Absent => Some(RawForwardedFor::default()),
            given => given.take("forwarded_for", mistakes),
        };
        let forwarded_for = mistakes.within("forwarded_for", |mistakes| raw?.check(mistakes));
        let cloudflare =
            check_section("cloudflare", self.cloudflare, |Hidden(raw), mistakes| raw.check(mistakes), mistakes);
        let telegram = check_section("telegram", self.telegram, RawTelegram::check, mistakes);
        let webhooks =
            check_section("webhooks", self.webhooks, |Hidden(raw), mistakes| webhooks::check(raw, mistakes), mistakes);
        Some(EnforceConfig {
            firewall: firewall?,
            forwarded_for: forwarded_for?,
            cloudflare: cloudflare?,
            telegram: telegram?,
            webhooks: webhooks?.unwrap_or_default(),
        })
    }
}

/// A section that may be left out: `Some(None)` when it is, `None` when a mistake was noted.
fn check_section<R: FromValue, T>(
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
    use serde_json::{Value, json};

    use super::*;
    use crate::testing::checked;

    fn check(value: Value) -> Result<EnforceConfig, Vec<String>> {
        checked(value, |raw: RawEnforce, mistakes| mistakes.within("enforce", |mistakes| raw.check(mistakes)))
    }

    #[test]
    fn nothing_given_means_the_defaults() {
        let defaults = EnforceConfig {
            firewall: FirewallConfig::default(),
            forwarded_for: ForwardedForConfig::default(),
            cloudflare: None,
            telegram: None,
            webhooks: Vec::new(),
        };
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
    fn what_keys_of_forwarded_for_say_of_each_other_is_checked() {
        let given = json!({"enabled": true, "chains": ["OUTPUT", "INPUT"], "ports": ["80", "8000-8010", "tcp/80"],
            "headers": ["X-Real-Ip", "x-real-ip"], "in_interface": "br-+", "out_interface": "eth0", "whole_list": true});
        let twice = check(json!({ "forwarded_for": &given })).unwrap_err();
        assert_eq!(twice, ["enforce.forwarded_for.headers: a header is listed twice"]);
        let mut once = given;
        once["headers"] = json!(["X-Real-Ip"]);
        let expected = [
            "enforce.forwarded_for.in_interface: packets in chain OUTPUT have come in nowhere",
            "enforce.forwarded_for.out_interface: packets in chain INPUT go out nowhere",
            "enforce.forwarded_for.whole_list: needs X-Forwarded-For among headers",
        ];
        assert_eq!(check(json!({"forwarded_for": once.clone()})).unwrap_err(), expected);
        once["chains"] = json!(["FORWARD"]);
        once["headers"] = json!(["x-forwarded-for"]);
        let checked = check(json!({ "forwarded_for": once })).unwrap().forwarded_for;
        assert_eq!(checked.ports, [(80, 80), (8000, 8010)]);
        assert!(checked.enabled && checked.has_list());
    }

    #[test]
    fn chains_are_for_iptables() {
        let firewall = |backend| check(json!({"firewall": {"backend": backend, "chains": ["INPUT"]}}));
        let texts = firewall("nftables").unwrap_err();
        assert!(texts.len() == 1 && texts[0].starts_with("enforce.firewall.chains: is for iptables"), "{texts:?}");
        assert!(firewall("iptables").is_ok() && firewall("auto").is_ok());
        assert!(check(json!({"firewall": {"backend": "nftables", "chains": "auto"}})).is_ok());
    }

    /// A file as it should be, too open, empty or with something else, and one that is not there.
    fn secret_file(dir: &std::path::Path, name: &str, text: &str, mode: u32) -> String {
        use std::os::unix::fs::PermissionsExt as _;
        let path = dir.join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        path.display().to_string()
    }

    #[test]
    fn a_secret_that_cannot_be_used_is_named_by_key_and_file_and_never_shown() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str, mode| secret_file(dir.path(), name, text, mode);
        let (none, empty) = (dir.path().join("none").display().to_string(), file("empty", " \n", 0o600));
        let (open, odd) = (file("open", "s3cret", 0o644), file("odd", "s3cret of two\nlines", 0o600));
        let mistakes = |given: Value| {
            let mut mistakes = Mistakes::new();
            check(given).unwrap().check_secrets(&mut mistakes);
            mistakes.into_sorted().iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        let texts = mistakes(json!({
            "cloudflare": {"api_token_file": odd, "scope": "user"},
            "telegram": {"bot_token_file": empty, "chat_id": 1},
            "webhooks": {
                "a": {"url_file": none, "token_file": odd, "secret_file": open},
                "b": {"url_file": odd, "token": "s3cret\u{7}", "secret": "fine"},
            },
        }));
        let expected = [
            format!("enforce.cloudflare.api_token_file: {odd}: expected printable ASCII without spaces"),
            format!("enforce.telegram.bot_token_file: {empty} is empty"),
            format!("enforce.webhooks.a.secret_file: {open} is open to others (mode 644)"),
            format!("enforce.webhooks.a.token_file: {odd}: expected printable ASCII without spaces"),
            format!("enforce.webhooks.a.url_file: cannot read {none}: No such file or directory"),
            "enforce.webhooks.b.token: expected printable ASCII without spaces".to_owned(),
            format!("enforce.webhooks.b.url_file: {odd}: expected an address that begins with http:// or https://"),
        ];
        let alike = texts.iter().zip(&expected).all(|(text, expected)| text.starts_with(expected));
        assert!(alike && texts.len() == expected.len(), "{texts:#?}");
        assert!(texts.iter().all(|text| !text.contains("s3cret")), "{texts:#?}");
        let odd_bot = mistakes(json!({"telegram": {"bot_token": "s3cret of two", "chat_id": 1}}));
        assert!(odd_bot[0].starts_with("enforce.telegram.bot_token: expected a token") && odd_bot.len() == 1);
        let fine = file("fine", "https://x/s3cret\n", 0o600);
        let (token, webhook) = (file("token", "12:s3cret\n", 0o640), json!({"url_file": fine}));
        assert_eq!(
            mistakes(json!({"telegram": {"bot_token_file": token, "chat_id": 1}, "webhooks": {"a": webhook}})),
            [] as [String; 0]
        );
    }

    #[test]
    fn every_mistake_is_reported_with_its_key() {
        let wrong = json!({
            "cloudflare": {"api_token_file": "x"}, "telegram": {}, "webhooks": [], "firewal": {},
            "forwarded_for": {
                "chains": ["nat/PREROUTING", "POSTROUTING", "PORTCULLIS-FWD", "OUTPUT", "INPUT"], "ports": ["udp/80", "0"],
                "in_interface": "-x", "out_interface": "a name too long", "headers": ["a: b"], "rules_max": 0, "rule_max": 1,
            },
            "firewall": {
                "backend": "nftable", "chains": ["nat/PREROUTING", "OUTPUT", "PREROUTING", "-x", "PORTCULLIS"],
                "ports": ["icmp/1", "0", "9-8"], "bans_max": 0, "ban_prefix_min_ipv4": 33, "resync_interval": "1ms",
                "full_check_interval": "2days", "chain": 1,
            },
        });
        let texts = check(wrong).unwrap_err();
        let expected = [
            "enforce.cloudflare.api_token_file: expected an absolute path",
            "enforce.cloudflare.scope: is required",
            "enforce.firewal: unknown key; did you mean `firewall`?",
            "enforce.firewall.backend: expected \"auto\", \"iptables\", \"nftables\" or \"none\", got \"nftable\"",
            "enforce.firewall.ban_prefix_min_ipv4: must be from 1 to 32",
            "enforce.firewall.bans_max: must be from 1 to 1000000",
            "enforce.firewall.chain: unknown key; did you mean `chains`?",
            "enforce.firewall.chains: \"-x\": expected [TABLE/]CHAIN such as \"raw/PREROUTING\" or \"DOCKER-USER\", with \
             a name of at most 28 bytes",
            "enforce.firewall.chains: \"OUTPUT\": packets of clients do not pass OUTPUT in table filter: write \
             \"filter/INPUT\" or \"filter/FORWARD\"",
            "enforce.firewall.chains: \"PORTCULLIS\": PORTCULLIS is the chain that Portcullis makes itself",
            "enforce.firewall.chains: \"PREROUTING\": packets of clients do not pass PREROUTING in table filter: write \
             \"raw/PREROUTING\", or \"filter/INPUT\" or \"filter/FORWARD\"",
            "enforce.firewall.chains: \"nat/PREROUTING\": the table must be raw, mangle or filter, got \"nat\"",
            "enforce.firewall.full_check_interval: must be at least resync_interval and at most \"1day\"",
            "enforce.firewall.ports: expected ports such as \"443\", \"tcp/443\" or \"udp/8000-8010\", got \"0\"",
            "enforce.firewall.ports: expected ports such as \"443\", \"tcp/443\" or \"udp/8000-8010\", got \"9-8\"",
            "enforce.firewall.ports: expected ports such as \"443\", \"tcp/443\" or \"udp/8000-8010\", got \"icmp/1\"",
            "enforce.firewall.resync_interval: must be from \"1s\" to \"1h\"",
            "enforce.forwarded_for.chains: \"PORTCULLIS-FWD\": is a chain that Portcullis makes itself",
            "enforce.forwarded_for.chains: \"POSTROUTING\": is not in table filter",
            "enforce.forwarded_for.chains: \"nat/PREROUTING\": expected a chain of table filter such as \"DOCKER-USER\" \
             or \"OUTPUT\"",
            "enforce.forwarded_for.headers: expected a header such as \"X-Real-Ip\", got \"a: b\"",
            "enforce.forwarded_for.in_interface: expected an interface such as \"docker0\" or \"br-+\", got \"-x\"",
            "enforce.forwarded_for.out_interface: expected an interface such as \"docker0\" or \"br-+\", got \"a name too \
             long\"",
            "enforce.forwarded_for.ports: expected TCP ports such as \"80\" or \"8000-8010\", got \"0\"",
            "enforce.forwarded_for.ports: expected TCP ports such as \"80\" or \"8000-8010\", got \"udp/80\"",
            "enforce.forwarded_for.rule_max: unknown key; did you mean `rules_max`?",
            "enforce.forwarded_for.rules_max: must be from 1 to 10000",
            "enforce.telegram.bot_token_file: is required (or bot_token)",
            "enforce.telegram.chat_id: is required",
            "enforce.webhooks: expected a table; write a section [enforce.webhooks.NAME]",
        ];
        assert_eq!(texts, expected);
    }
}
