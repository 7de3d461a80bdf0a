//! `check`: every mistake of a configuration at once, or a summary of what it would run.

use std::collections::BTreeSet;

use detect::engine::rule::{Mode, Rule, Threshold};
use enforce::config::{
    BackendKind, Chains, CloudflareConfig, EventKind, FirewallConfig, ForwardedForConfig, Scope, WebhookConfig,
};
use ingest::config::{ListenConfig, SourceConfig, SourceKind, SyslogConfig, Transport};
use ingest::source::http::{Content, OTLP_PATH, RequestsConfig};
use proto::bus::config::{BusConfig, Login};
use proto::subject::{PREFIX, Subjects};
use proto::time::render_duration;

use super::Exit;
use crate::args::CheckArgs;
use crate::config::{Config, Location};
use crate::output::Output;

pub(super) fn run(args: CheckArgs, out: &mut Output<'_>) -> anyhow::Result<Exit> {
    let config = Location::new(args.config.config, Vec::new()).load()?;
    config.require_secrets()?;
    show(&config, out)?;
    Ok(Exit::Done)
}

fn show(config: &Config, out: &mut Output<'_>) -> anyhow::Result<()> {
    let mut say = |what: &str, text: &str| out.line(&format!("{what:<10} {text}"));
    say("node", &config.node)?;
    say("state", &config.state_dir.display().to_string())?;
    say("bus", &describe_bus(&config.bus))?;
    say("api", &config.api.socket.display().to_string())?;
    if let Some(tcp) = &config.api.tcp {
        let scheme = if tcp.tls.is_some() { "https" } else { "http" };
        say("api", &format!("{scheme}://{}, tokens in {}", tcp.listen, tcp.tokens_file.display()))?;
    }
    if let Some(listen) = config.telemetry.listen {
        say("telemetry", &listen.to_string())?;
    }
    for source in &config.ingest.sources {
        say("source", &describe_source(source, &config.bus))?;
    }
    if config.ingest.sources.is_empty() {
        say("source", "none: `portcullis run` needs LOG arguments")?;
    }
    for rule in &config.detect.engine.rules {
        say("rule", &describe_rule(rule))?;
    }
    if config.detect.engine.rules.is_empty() {
        say("rule", "none: nobody will be banned but by operators")?;
    }
    say(
        "never ban",
        &format!("{} networks, {} names", config.detect.engine.never_ban.len(), config.detect.names.len()),
    )?;
    say("firewall", &describe_firewall(&config.enforce.firewall))?;
    if let Some(cloudflare) = &config.enforce.cloudflare {
        say("cloudflare", &describe_cloudflare(cloudflare, config.detect.engine.ipv6_prefix))?;
    }
    say("forwarded", &describe_forwarded_for(&config.enforce.forwarded_for))?;
    if let Some(telegram) = &config.enforce.telegram {
        say("telegram", &format!("chat {}: {}", telegram.chat_id, words(&telegram.events, EventKind::as_str)))?;
    }
    for webhook in &config.enforce.webhooks {
        say("webhook", &describe_webhook(webhook))?;
    }
    say("leaks", &describe_leaks(config))?;
    for warning in config.warnings() {
        say("warning", &warning.to_string())?;
    }
    Ok(())
}

fn describe_cloudflare(cloudflare: &CloudflareConfig, ipv6_prefix: u8) -> String {
    let place = match &cloudflare.scope {
        Scope::User => "access rules of the user".to_owned(),
        Scope::Zones(zones) => format!("access rules of {} zones", zones.len()),
        Scope::Account(_) => "access rules of an account".to_owned(),
        Scope::List { list, .. } => format!("items of the list {list}"),
    };
    let cost = match cloudflare.scope.entries_of_client(ipv6_prefix) {
        Some(1) => return place,
        Some(count) => format!("takes {count} entries of {}, and as many calls", cloudflare.entries_max),
        None => "cannot be said there".to_owned(),
    };
    format!("{place}; with detect.ipv6_prefix = {ipv6_prefix} a ban of an IPv6 client {cost}: take 48, 64 or a list")
}

fn describe_forwarded_for(forwarded: &ForwardedForConfig) -> String {
    if !forwarded.enabled {
        return "off: clients behind a proxy are not refused between Traefik and services".to_owned();
    }
    let of_list = if forwarded.whole_list && forwarded.has_list() { " at any place" } else { "" };
    let ports = match forwarded.ports.is_empty() {
        true => "all ports".to_owned(),
        false => format!("{} ranges of ports", forwarded.ports.len()),
    };
    format!(
        "by {}{of_list}, in chains {}, {ports}, at most {} rules",
        forwarded.headers.join(", "),
        forwarded.chains.join(", "),
        forwarded.rules_max
    )
}

/// The address of a webhook may be a secret.
fn describe_webhook(webhook: &WebhookConfig) -> String {
    let signed = if webhook.secret.is_some() { ", signed" } else { "" };
    let (name, method) = (&webhook.name, webhook.method.as_str());
    format!("{name}: {method} of {}{signed}: {}", webhook.content_type, words(&webhook.events, EventKind::as_str))
}

fn words<T>(all: &BTreeSet<T>, word: impl Fn(T) -> &'static str) -> String
where
    T: Copy,
{
    all.iter().map(|one| word(*one)).collect::<Vec<_>>().join(", ")
}

/// After which time a request of a banned client is told of, by who could have seen it.
fn describe_leaks(config: &Config) -> String {
    let (grace, enforce) = (config.detect.engine.grace, &config.enforce);
    let is_given = |given: bool| if given { "" } else { " (not configured)" };
    format!(
        "told {} after a firewall has confirmed the ban{}, {} after Cloudflare has{}",
        render_duration(grace.firewall),
        is_given(enforce.firewall.backend != BackendKind::None),
        render_duration(grace.cloudflare),
        is_given(enforce.cloudflare.is_some())
    )
}

fn describe_bus(bus: &BusConfig) -> String {
    match bus {
        BusConfig::Local => "local: all roles in one process (`portcullis run`)".to_owned(),
        BusConfig::Nats(nats) => {
            let login = match &nats.login {
                Login::Anonymous => "nobody".to_owned(),
                Login::Credentials(path) | Login::Nkey(path) | Login::Token(path) => path.display().to_string(),
                Login::Password(user, _) => format!("user {user}"),
            };
            format!("{} as {login}, names begin with {}", nats.urls.join(" "), nats.prefix)
        }
    }
}

fn describe_source(source: &SourceConfig, bus: &BusConfig) -> String {
    let from = match &source.kind {
        SourceKind::File(file) => {
            file.include.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
        }
        SourceKind::Stdin => "standard input".to_owned(),
        SourceKind::Syslog(syslog) => describe_syslog(syslog),
        SourceKind::Nats(nats) => {
            let prefix = if let BusConfig::Nats(bus) = bus { &bus.prefix } else { PREFIX };
            let wanted = nats.wanted(&Subjects::new(prefix), &source.name);
            format!("raw lines on {}, shared by the queue group {}", wanted.subject, wanted.queue)
        }
        SourceKind::Http(requests) | SourceKind::Otlp(requests) => describe_requests(requests),
    };
    format!("{}: {from}", source.name)
}

fn describe_syslog(syslog: &SyslogConfig) -> String {
    let (mode, listen) = match &syslog.transport {
        Transport::Unix { path, .. } => return format!("syslog at {}", path.display()),
        Transport::Udp(listen) => ("UDP", listen),
        Transport::Tcp(listen @ ListenConfig { tls: Some(_), .. }) => ("TLS", listen),
        Transport::Tcp(listen) => ("TCP", listen),
    };
    format!("syslog over {mode} at {} from {}", listen.addr, describe_senders(listen))
}

fn describe_senders(listen: &ListenConfig) -> String {
    let mut whom = match &listen.allowed_senders {
        Some(allowed) => format!("{} networks", allowed.nets().len()),
        None => "anybody".to_owned(),
    };
    if listen.tls.as_ref().is_some_and(|tls| tls.client_ca_file.is_some()) {
        whom.push_str(" with a certificate");
    }
    whom
}

fn describe_requests(requests: &RequestsConfig) -> String {
    let scheme = if requests.listen.tls.is_some() { "https" } else { "http" };
    let (path, beside) = match &requests.content {
        Content::Lines { path } => (path.as_str(), ""),
        Content::Otlp => (OTLP_PATH, " and gRPC there"),
    };
    let senders = match (&requests.listen.allowed_senders, requests.auth.is_given()) {
        (Some(_), true) => "from allowed senders with a secret",
        (Some(_), false) => "from allowed senders",
        (None, true) => "from whoever has a secret",
        (None, false) => "from everybody who reaches it",
    };
    format!("{scheme}://{}{path}{beside} {senders}", requests.listen.addr)
}

fn describe_rule(rule: &Rule) -> String {
    let threshold = match rule.threshold {
        Threshold::Window { max_retry, find_time, distinct } => {
            let different = if distinct.is_some() { " different" } else { "" };
            format!("{max_retry}{different} in {}", render_duration(find_time))
        }
        Threshold::Rate { period, burst } => format!("more than {burst} at once or one in {}", render_duration(period)),
    };
    let shadow = match rule.mode {
        Mode::Enforce => "",
        Mode::Shadow => " (shadow: counted, not banned)",
    };
    format!("{}: {threshold}, first ban {}{shadow}", rule.name, render_duration(rule.ban_time))
}

fn describe_firewall(firewall: &FirewallConfig) -> String {
    let backend = match firewall.backend {
        BackendKind::Auto => "auto",
        BackendKind::Iptables => "iptables",
        BackendKind::Nftables => "nftables",
        BackendKind::None => return "none: bans are decided, and dropped nowhere".to_owned(),
    };
    match &firewall.chains {
        Chains::Auto => format!("{backend}, chains auto"),
        Chains::Listed(chains) => {
            let chains: Vec<String> = chains.iter().map(ToString::to_string).collect();
            format!("{backend}, chains {}", chains.join(", "))
        }
    }
}

#[cfg(test)]
mod tests {
    use proto::time::{Clock, Timestamp};

    use super::*;

    fn summary(toml: &str) -> String {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("portcullis.toml");
        std::fs::write(&file, toml).unwrap();
        let config = Location::new(Some(file), Vec::new()).with_environment([]).load().unwrap();
        let mut text = Vec::new();
        show(&config, &mut Output::new(&mut text, false, Clock::manual(Timestamp::EPOCH))).unwrap();
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn who_is_told_and_what_sees_behind_proxies_stands_in_the_summary_and_no_secret_does() {
        let text = summary("node = 'a'");
        assert!(text.contains("forwarded  off: ") && !text.contains("telegram") && !text.contains("webhook"), "{text}");
        assert!(
            text.contains("leaks      told 2s after a firewall has confirmed the ban, 1m after Cloudflare"),
            "{text}"
        );
        let text = summary(
            "detect.leaks = { grace_firewall = '5s' }
            [enforce.telegram]
            bot_token = '123:s3cret'
            chat_id = '-100123'
            events = ['alarm', 'banned']
            [enforce.webhooks.pager]
            url = 'https://hooks.example.net/s3cret'
            secret = 's3cret'
            events = ['alarm']
            [enforce.forwarded_for]
            enabled = true
            rules_max = 30",
        );
        for line in [
            "forwarded  by X-Forwarded-For, Cf-Connecting-Ip, in chains DOCKER-USER, all ports, at most 30 rules\n",
            "telegram   chat -100123: banned, alarm\n",
            "webhook    pager: POST of application/cloudevents+json, signed: alarm\n",
            "leaks      told 5s after a firewall has confirmed the ban, 1m after Cloudflare has (not configured)\n",
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
        assert!(!text.contains("s3cret"), "{text}");
    }

    #[test]
    fn secrets_of_senders_that_travel_in_the_clear_are_warned_of() {
        let source =
            |more: &str| summary(&format!("[ingest.sources.push]\ntype = 'http'\nauth.tokens_file = '/t'\n{more}"));
        let text = source("listen = '0.0.0.0:8080'");
        assert!(text.contains("warning    ingest.sources.push.tls: is not given, so that tokens"), "{text}");
        for fine in
            ["listen = '127.0.0.1:8080'", "listen = '0.0.0.0:8080'\ntls = { cert_file = '/c', key_file = '/k' }"]
        {
            assert!(!source(fine).contains("warning"), "{fine}");
        }
    }

    #[test]
    fn what_only_a_firewall_heeds_is_warned_of_where_none_is_wanted() {
        let keys = "ports = ['443']\nspare_ports = ['22']\nchains = ['INPUT']\nbackend = ";
        let text = summary(&format!("[enforce.firewall]\n{keys}'none'"));
        for key in ["chains", "ports", "spare_ports"] {
            assert!(text.contains(&format!("warning    enforce.firewall.{key}: changes nothing")), "{key}: {text}");
        }
        assert!(!summary(&format!("[enforce.firewall]\n{keys}'iptables'")).contains("warning"));
        assert!(!summary("enforce.firewall.backend = 'none'").contains("warning"));
    }

    #[test]
    fn what_the_prefix_of_clients_costs_at_cloudflare_is_told() {
        let toml = "[enforce.cloudflare]\napi_token_file = '/t'\nscope = 'user'\n";
        let dir = tempfile::tempdir().unwrap();
        let told = |prefix: &str| {
            let file = dir.path().join("portcullis.toml");
            std::fs::write(&file, format!("detect.ipv6_prefix = {prefix}\n{toml}")).unwrap();
            let config = Location::new(Some(file), Vec::new()).load().unwrap();
            describe_cloudflare(config.enforce.cloudflare.as_ref().unwrap(), config.detect.engine.ipv6_prefix)
        };
        assert_eq!(told("64"), "access rules of the user");
        assert!(told("56").contains("takes 256 entries of 10000"), "{}", told("56"));
        assert!(told("52").contains("cannot be said there"), "{}", told("52"));
    }
}
