//! The configuration of the whole process: raw sections as read, and the checked [`Config`].
//!
//! A [`Config`] comes only out of [`Location::load`], which reports every mistake at once. Each role checks its own
//! section; this module knows the keys that belong to no role. Nothing is opened here but configuration files.

mod api;
mod listeners;
mod load;
#[cfg(test)]
mod tests;

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

use detect::config::{DetectConfig, RawDetect};
use enforce::config::{BackendKind, Chains, EnforceConfig, RawEnforce};
use ingest::config::{IngestConfig, RawIngest, SourceConfig, SourceKind};
use nix::unistd::gethostname;
use proto::bus::config::{BusConfig, NatsConfig, RawBus};
use proto::section;
use proto::settings::{Field, FromValue, Mistake, Mistakes, Unknown};
use proto::subject::{is_name, name_from_host};
use serde::Deserialize;
use serde_json::Value;
use tracing_subscriber::EnvFilter;

pub use self::api::ApiConfig;
use self::api::RawApi;
pub use self::load::{DEFAULT_FILE, Location};

/// Where state is kept unless configured.
pub const STATE_DIR: &str = "/var/lib/portcullis";
/// The log level unless configured.
const LOG_LEVEL: &str = "info";

/// Everything the process needs to know, checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// Name of this host on the bus, in events and in `status`.
    pub node: String,
    /// Directory of bans, offenders, positions. Need not exist yet.
    pub state_dir: PathBuf,
    /// What connects the roles.
    pub bus: BusConfig,
    /// The operator API.
    pub api: ApiConfig,
    /// Logs, health, metrics.
    pub telemetry: TelemetryConfig,
    /// Reading logs.
    pub ingest: IngestConfig,
    /// Deciding bans.
    pub detect: DetectConfig,
    /// Applying them.
    pub enforce: EnforceConfig,
}

impl Config {
    /// The bus of a role that runs by itself.
    pub fn require_nats(&self, role: &str) -> Result<NatsConfig, Invalid> {
        match &self.bus {
            BusConfig::Nats(nats) => Ok(NatsConfig::clone(nats)),
            BusConfig::Local => {
                let text = format!("`portcullis {role}` works over NATS: set kind = \"nats\" and urls, or use `run`");
                Err(Invalid(vec![Mistake { key: "bus.kind".to_owned(), text }]))
            }
        }
    }

    /// What works and may not be meant so.
    pub fn warnings(&self) -> Vec<Mistake> {
        let is_open = |source: &&SourceConfig| match &source.kind {
            SourceKind::Http(requests) | SourceKind::Otlp(requests) => {
                let is_near = requests.listen.addr.ip().to_canonical().is_loopback();
                requests.auth.is_given() && requests.listen.tls.is_none() && !is_near
            }
            _ => false,
        };
        let warning = |source: &SourceConfig| Mistake {
            key: format!("ingest.sources.{}.tls", source.name),
            text: "is not given, so that tokens and passwords of senders travel in the clear: give cert_file and \
                   key_file, or listen on loopback behind a proxy that has TLS"
                .to_owned(),
        };
        self.ingest.sources.iter().filter(is_open).map(warning).chain(self.idle_firewall_keys()).collect()
    }

    /// What is said of a firewall that is not wanted.
    fn idle_firewall_keys(&self) -> impl Iterator<Item = Mistake> {
        let firewall = &self.enforce.firewall;
        let given = [
            ("chains", firewall.chains != Chains::Auto),
            ("ports", !firewall.ports.is_empty()),
            ("spare_ports", !firewall.spare_ports.is_empty()),
        ];
        let is_idle = firewall.backend == BackendKind::None;
        given.into_iter().filter(move |(_, is_given)| is_idle && *is_given).map(|(key, _)| Mistake {
            key: format!("enforce.firewall.{key}"),
            text: "changes nothing, as no packets are dropped with backend = \"none\"".to_owned(),
        })
    }

    /// Refuses to take from a queue group what is then not counted.
    pub fn require_no_nats_source(&self) -> Result<(), Invalid> {
        let text = "would take lines away from those who count them: name the logs, or `-` for standard input";
        let mistakes = nats_sources(&self.ingest, text);
        if mistakes.is_empty() { Ok(()) } else { Err(Invalid(mistakes)) }
    }

    /// Refuses secrets of back ends and notifiers that could not be used when they are needed. Reads their files.
    pub fn require_secrets(&self) -> Result<(), Invalid> {
        let mut mistakes = Mistakes::new();
        self.enforce.check_secrets(&mut mistakes);
        if mistakes.is_empty() { Ok(()) } else { Err(Invalid(mistakes.into_sorted())) }
    }

    /// Refuses a configuration that reads no log: `run` would do nothing.
    pub fn require_sources(&self) -> Result<(), Invalid> {
        if !self.ingest.sources.is_empty() {
            return Ok(());
        }
        let text = "no log to read: configure a source, or name the files: `portcullis run LOG`";
        Err(Invalid(vec![Mistake { key: "ingest.sources".to_owned(), text: text.to_owned() }]))
    }
}

/// How log lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One object a line.
    Json,
}

impl FromValue for LogFormat {
    fn from_value(value: Value) -> Result<Self, String> {
        match value.as_str() {
            Some("text") => Ok(Self::Text),
            Some("json") => Ok(Self::Json),
            _ => Err(format!("expected \"text\" or \"json\", got {value}")),
        }
    }
}

/// Logs, health, metrics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TelemetryConfig {
    /// Where `/live`, `/ready` and `/metrics` are served; `None` = nowhere.
    pub listen: Option<SocketAddr>,
    /// How log lines are written.
    pub log_format: LogFormat,
    /// Which log lines are written, as `tracing_subscriber::EnvFilter` reads it; valid.
    pub log_level: String,
}

/// A configuration with mistakes.
#[derive(Debug)]
pub struct Invalid(Vec<Mistake>);

impl Invalid {
    /// All mistakes, by key. Never empty.
    pub fn mistakes(&self) -> &[Mistake] {
        &self.0
    }
}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, mistake) in self.0.iter().enumerate() {
            write!(f, "{}{mistake}", if i == 0 { "" } else { "; " })?;
        }
        Ok(())
    }
}

impl std::error::Error for Invalid {}

/// Known keys, by section.
const KEYS: &[&str] = &["node", "state_dir", "bus", "api", "telemetry", "ingest", "detect", "enforce"];
const TELEMETRY_KEYS: &[&str] = &["listen", "log_format", "log_level"];

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RawConfig {
    node: Field<String>,
    state_dir: Field<PathBuf>,
    bus: Field<RawBus>,
    api: Field<RawApi>,
    telemetry: Field<RawTelemetry>,
    ingest: Field<RawIngest>,
    detect: Field<RawDetect>,
    enforce: Field<RawEnforce>,
    #[serde(flatten)]
    unknown: Unknown,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RawTelemetry {
    listen: Field<SocketAddr>,
    log_format: Field<LogFormat>,
    log_level: Field<String>,
    #[serde(flatten)]
    unknown: Unknown,
}

section!(RawTelemetry);

/// Checks everything. `logs`, when there are any, take the place of the configured sources.
fn check(raw: Value, logs: &[PathBuf], mistakes: &mut Mistakes) -> Option<Config> {
    let raw: RawConfig = match serde_json::from_value(raw) {
        Ok(raw) => raw,
        Err(error) => {
            mistakes.add("", error.to_string());
            return None;
        }
    };
    raw.unknown.check(KEYS, mistakes);
    let node = check_node(raw.node.take("node", mistakes), mistakes);
    let state_dir = raw.state_dir.or("state_dir", PathBuf::from(STATE_DIR), mistakes);
    let bus = raw.bus.take("bus", mistakes).unwrap_or_default();
    let bus = mistakes.within("bus", |m| bus.check(m));
    let api = raw.api.take("api", mistakes).unwrap_or_default();
    let api = mistakes.within("api", |m| api.check(m));
    let telemetry = raw.telemetry.take("telemetry", mistakes).unwrap_or_default();
    let telemetry = mistakes.within("telemetry", |m| telemetry.check(m));
    let ingest = raw.ingest.take("ingest", mistakes).unwrap_or_default();
    let ingest = mistakes.within("ingest", |m| ingest.check(m));
    let detect = raw.detect.take("detect", mistakes).unwrap_or_default();
    let mut detect = mistakes.within("detect", |m| detect.check(m));
    let enforce = raw.enforce.take("enforce", mistakes).unwrap_or_default();
    let enforce = mistakes.within("enforce", |m| enforce.check(m));
    let mut ingest = ingest?;
    if !logs.is_empty() {
        ingest.set_files(logs.to_vec());
    }
    listeners::check((&api, &telemetry), &ingest, mistakes);
    if let BusConfig::Local = bus {
        let wrong = nats_sources(&ingest, "works over NATS: set bus.kind = \"nats\" and bus.urls");
        wrong.into_iter().for_each(|mistake| mistakes.add(&mistake.key, mistake.text));
    }
    let cloudflare = enforce.as_ref().and_then(|enforce| enforce.cloudflare.as_ref());
    if matches!(bus, BusConfig::Nats(_)) && cloudflare.is_some_and(|cloudflare| cloudflare.installation.is_none()) {
        let text = "is required over NATS: the same on all hosts, so that each knows the entries of the others";
        mistakes.add("enforce.cloudflare.installation", text);
    }
    // One setting for two: whom ingest looks behind, and what enforcement refuses, detection may not ban.
    let enforce = enforce?;
    detect.engine.trusted_proxies = ingest.client_ip.proxies();
    detect.engine.operator_prefix_min = (enforce.firewall.prefix_min_v4, enforce.firewall.prefix_min_v6);
    Some(Config { node, state_dir, bus, api, telemetry, ingest, detect, enforce })
}

/// A mistake for each source that listens on NATS.
fn nats_sources(ingest: &IngestConfig, text: &str) -> Vec<Mistake> {
    let sources = ingest.sources.iter().filter(|source| matches!(source.kind, SourceKind::Nats(_)));
    let mistake =
        |name: &str| Mistake { key: format!("ingest.sources.{name}.type"), text: format!("a `nats` source {text}") };
    sources.map(|source| mistake(&source.name)).collect()
}

fn check_node(given: Option<String>, mistakes: &mut Mistakes) -> String {
    let Some(node) = given else {
        return name_from_host(&gethostname().unwrap_or_default().to_string_lossy());
    };
    if !is_name(&node) {
        mistakes.add("node", format!("expected 1 to 63 of a-z, 0-9 and -, got {node:?}"));
    }
    node
}

impl RawTelemetry {
    fn check(self, mistakes: &mut Mistakes) -> TelemetryConfig {
        self.unknown.check(TELEMETRY_KEYS, mistakes);
        let log_level = self.log_level.or("log_level", LOG_LEVEL.to_owned(), mistakes);
        if let Err(error) = EnvFilter::builder().parse(&log_level) {
            let text =
                format!("expected a level such as \"info\" or \"info,detect=debug\", got {log_level:?} ({error})");
            mistakes.add("log_level", text);
        }
        TelemetryConfig {
            listen: self.listen.take("listen", mistakes),
            log_format: self.log_format.or("log_format", LogFormat::Text, mistakes),
            log_level,
        }
    }
}
