//! The `[ingest]` section: raw as it was written, then checked.

mod file;
mod http;
mod listen;
mod nats;
mod otlp;
mod requests;
mod source;
mod stdin;
mod syslog;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use ipnet::IpNet;
use proto::client_ip::{CdnHeader, ClientIpPolicy};
use proto::net::{NamedSet, NetSet, Target};
use proto::section;
use proto::settings::{ByteSize, Field, Mistakes, Unknown};
use serde::Deserialize;

pub use file::FileConfig;
pub use listen::ListenConfig;
pub use nats::NatsSource;
pub use source::{Lines, RawSource, SourceConfig, SourceKind};
pub use syslog::{NodeFrom, SyslogConfig, Transport};

/// Least `spool_bytes_max`: some hundred files.
const SPOOL_BYTES_MIN: u64 = 1 << 20;
/// Sources in one configuration.
const SOURCES_MAX: usize = 64;
/// The source of log files given on the command line.
const COMMAND_LINE_SOURCE: &str = "traefik";
/// What stands for standard input among log files.
pub const STDIN: &str = "-";
/// The source of what it brings.
const STDIN_SOURCE: &str = "stdin";
/// The named set whose header is believed by default.
const CLOUDFLARE: &str = "cloudflare";
/// Cloudflare's header with the visitor's address.
const CLOUDFLARE_HEADER: &str = "Cf-Connecting-Ip";

/// `[ingest]` as written.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct RawIngest {
    /// Sources by name.
    pub sources: Field<BTreeMap<String, RawSource>>,
    /// How clients are told from proxies.
    pub client_ip: Field<RawClientIp>,
    /// Room on disk for lines of senders that cannot wait, while the bus is away.
    pub spool_bytes_max: Field<ByteSize>,
    /// What nobody knows.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// `[ingest.client_ip]` as written.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct RawClientIp {
    /// Named sets and CIDRs.
    pub trusted_proxies: Field<Vec<String>>,
    /// Header by named set or CIDR.
    pub cdn_headers: Field<BTreeMap<String, String>>,
    /// Whether Traefik stands behind a proxy, for formats that do not log the peer.
    pub clf_behind_proxy: Field<bool>,
    /// What nobody knows.
    #[serde(flatten)]
    pub unknown: Unknown,
}

section!(RawIngest, RawClientIp);

/// Everything ingest needs to know.
#[derive(Clone, Debug)]
pub struct IngestConfig {
    /// At least one in a configuration that runs the role; names are unique.
    pub sources: Vec<SourceConfig>,
    /// How clients are told from proxies.
    pub client_ip: Arc<ClientIpPolicy>,
    /// Bytes on disk for lines of senders that cannot wait, while the bus is away; `None` = they are dropped.
    pub spool_bytes_max: Option<u64>,
}

impl IngestConfig {
    /// For log files given on the command line: one source, `traefik`, with defaults.
    pub fn for_files(paths: Vec<PathBuf>) -> Self {
        let client_ip = RawClientIp::default().check(&mut Mistakes::new());
        let mut config = Self { sources: Vec::new(), client_ip: Arc::new(client_ip), spool_bytes_max: None };
        config.set_files(paths);
        config
    }

    /// Replaces the sources by one, `traefik`, of these files, where `-` is standard input as a source of its own; the rest
    /// of the configuration stays.
    pub fn set_files(&mut self, paths: Vec<PathBuf>) {
        let (stdin, files): (Vec<_>, Vec<_>) = paths.into_iter().partition(|path| path.as_os_str() == STDIN);
        let source = |name: &str, kind| SourceConfig { name: name.to_owned(), lines: Lines::default(), kind };
        let files = (!files.is_empty()).then(|| source(COMMAND_LINE_SOURCE, SourceKind::File(FileConfig::new(files))));
        let stdin = (!stdin.is_empty()).then(|| source(STDIN_SOURCE, SourceKind::Stdin));
        self.sources = files.into_iter().chain(stdin).collect();
    }
}

impl RawIngest {
    /// The checked section; `None` when `mistakes` holds any in the end. Notes every mistake, keys relative to `ingest`.
    /// A configuration without sources passes: files may be given on the command line.
    pub fn check(self, mistakes: &mut Mistakes) -> Option<IngestConfig> {
        self.unknown.check(&["sources", "client_ip", "spool_bytes_max"], mistakes);
        let client_ip = self.client_ip.or("client_ip", RawClientIp::default(), mistakes);
        let client_ip = mistakes.within("client_ip", |mistakes| client_ip.check(mistakes));
        let raw = self.sources.or("sources", BTreeMap::new(), mistakes);
        if raw.len() > SOURCES_MAX {
            mistakes.add("sources", format!("{} sources are given, at most {SOURCES_MAX} are allowed", raw.len()));
        }
        let check = |(name, source): (String, RawSource)| {
            mistakes.within(&format!("sources.{name}"), |mistakes| source.check(&name, mistakes))
        };
        let sources: Vec<SourceConfig> = raw.into_iter().filter_map(check).collect();
        let mut stdin = sources.iter().filter(|source| source.kind == SourceKind::Stdin);
        if let (Some(first), Some(second)) = (stdin.next(), stdin.next()) {
            let text = format!("reads standard input, as `{}` does; there is only one", first.name);
            mistakes.add(&format!("sources.{}", second.name), text);
        }
        let spool_bytes_max = self.spool_bytes_max.take("spool_bytes_max", mistakes).map(|size| size.0);
        if spool_bytes_max.is_some_and(|bytes| bytes < SPOOL_BYTES_MIN) {
            mistakes.add("spool_bytes_max", "must be at least 1MiB");
        }
        mistakes.is_empty().then(|| IngestConfig { sources, client_ip: Arc::new(client_ip), spool_bytes_max })
    }
}

impl RawClientIp {
    fn check(self, mistakes: &mut Mistakes) -> ClientIpPolicy {
        self.unknown.check(&["trusted_proxies", "cdn_headers", "clf_behind_proxy"], mistakes);
        let proxies = self.trusted_proxies.take("trusted_proxies", mistakes);
        let proxies = proxies.unwrap_or_else(|| vec![CLOUDFLARE.to_owned()]);
        let nets = proxies.iter().flat_map(|text| parse_nets(text, "trusted_proxies", mistakes));
        let trusted_proxies = NetSet::new(nets.collect::<Vec<_>>());
        let cdn_headers = match self.cdn_headers.take("cdn_headers", mistakes) {
            Some(headers) => headers,
            // Whoever does not trust Cloudflare does not believe its header either.
            None if proxies.iter().any(|name| name == CLOUDFLARE) => {
                BTreeMap::from([(CLOUDFLARE.to_owned(), CLOUDFLARE_HEADER.to_owned())])
            }
            None => BTreeMap::new(),
        };
        let mut checked = Vec::new();
        for (from, header) in cdn_headers {
            let nets = parse_nets(&from, "cdn_headers", mistakes);
            if !nets.iter().all(|net| trusted_proxies.covers(&Target::new(net.addr(), net.prefix_len()))) {
                let text = format!("{from:?} is not in trusted_proxies, so that its header would never be believed");
                mistakes.add("cdn_headers", text);
            }
            if !is_header_name(&header) {
                mistakes.add("cdn_headers", format!("{header:?} is not the name of a header"));
            }
            checked.push(CdnHeader { from: NetSet::new(nets), header });
        }
        let clf_behind_proxy = self.clf_behind_proxy.or("clf_behind_proxy", false, mistakes);
        ClientIpPolicy { trusted_proxies, cdn_headers: checked, clf_behind_proxy }
    }
}

/// The networks that a named set, a CIDR or an address stands for; none when it is a mistake.
fn parse_nets(text: &str, key: &str, mistakes: &mut Mistakes) -> Vec<IpNet> {
    if let Some(set) = NamedSet::parse(text) {
        return set.nets();
    }
    match text.parse::<Target>() {
        Ok(target) if target.prefix() == 0 => {
            mistakes.add(key, format!("{text:?} would let everybody name any client"));
            Vec::new()
        }
        Ok(target) => vec![target.net()],
        Err(_) => {
            mistakes.add(key, format!("expected `cloudflare`, `private`, an address or a CIDR, got {text:?}"));
            Vec::new()
        }
    }
}

fn is_header_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
}

#[cfg(test)]
mod tests {
    use proto::subject::Subjects;

    use super::*;

    fn check(json: serde_json::Value) -> Result<IngestConfig, Vec<String>> {
        let raw: RawIngest = serde_json::from_value(json).expect("raw sections take anything");
        let mut mistakes = Mistakes::new();
        let config = mistakes.within("ingest", |mistakes| raw.check(mistakes));
        config.ok_or_else(|| mistakes.into_sorted().iter().map(ToString::to_string).collect())
    }

    #[test]
    fn defaults() {
        let sources = serde_json::json!({"sources": {"traefik": {"type": "file", "include": ["/var/log/a*.log"]}}});
        let config = check(sources).expect("a good configuration");
        assert_eq!(config.sources[0].kind, SourceKind::File(FileConfig::new(vec!["/var/log/a*.log".into()])));
        assert_eq!(config.sources[0].lines, Lines::default());
        assert!(config.client_ip.is_trusted("104.16.0.1".parse().unwrap()));
        assert_eq!(config.client_ip.cdn_headers[0].header, "Cf-Connecting-Ip");
        assert!(check(serde_json::json!({})).expect("nothing is required").sources.is_empty());
        assert_eq!(IngestConfig::for_files(vec!["a.log".into()]).sources[0].name, "traefik");
    }

    #[test]
    fn every_mistake_is_noted_with_its_key() {
        let mistakes = check(serde_json::json!({
            "sorces": 1,
            "sources": {
                "Bad": {"type": "sislog", "include": []},
                "a": {"type": "file", "include": ["relative", "/a/**/b"], "format": "xml", "read_from": "middle",
                      "line_bytes_max": "1B", "poll_interval": "1ns", "inotify": 3, "pol_interval": "1s"},
                "b": {},
                "c": {"type": "stdin"},
                "d": {"type": "stdin", "include": []},
                "e": {"type": "nats", "subject": "a..b", "queue": "a b", "limits": {"sender_lines": 1, "bytes": "4GiB"}},
            },
            "client_ip": {"trusted_proxies": ["0.0.0.0/0", "nobody"], "cdn_headers": {"cloudflare": "a b"}},
        }))
        .expect_err("all of it is wrong");
        let keys: Vec<&str> = mistakes.iter().map(|text| text.split(": ").next().unwrap_or_default()).collect();
        assert_eq!(
            keys,
            [
                "ingest.client_ip.cdn_headers",
                "ingest.client_ip.cdn_headers",
                "ingest.client_ip.trusted_proxies",
                "ingest.client_ip.trusted_proxies",
                "ingest.sorces",
                "ingest.sources.Bad",
                "ingest.sources.Bad.type",
                "ingest.sources.a.format",
                "ingest.sources.a.include",
                "ingest.sources.a.include",
                "ingest.sources.a.inotify",
                "ingest.sources.a.line_bytes_max",
                "ingest.sources.a.pol_interval",
                "ingest.sources.a.poll_interval",
                "ingest.sources.a.read_from",
                "ingest.sources.b.type",
                "ingest.sources.d",
                "ingest.sources.d.include",
                "ingest.sources.e.limits.bytes",
                "ingest.sources.e.limits.sender_lines",
                "ingest.sources.e.queue",
                "ingest.sources.e.subject",
            ],
            "{mistakes:#?}"
        );
        assert!(mistakes[6].contains("expected `file`, "), "{}", mistakes[6]);
    }

    #[test]
    fn otlp_has_its_own_path_and_what_stands_for_secrets_is_not_shown() {
        let mistakes = check(serde_json::json!({"sources": {
            "a": {"type": "otlp", "listen": "127.0.0.1:4318", "path": "/logs"},
            "b": {"type": "http", "listen": "127.0.0.1:8080", "path": "/logs", "auth": "s3cret"},
        }}))
        .expect_err("both are wrong");
        let expected = [
            "ingest.sources.a.path: means nothing with `otlp`, whose senders post to /v1/logs: leave it out",
            "ingest.sources.b.auth: expected a table such as { tokens_file = \"/etc/portcullis/tokens\" }",
        ];
        assert_eq!(mistakes, expected);
    }

    #[test]
    fn a_nats_source_listens_to_its_own_name_unless_told() {
        let config = check(serde_json::json!({"sources": {"shop": {"type": "nats"}}})).expect("good");
        let SourceKind::Nats(nats) = &config.sources[0].kind else { panic!("another kind") };
        let wanted = nats.wanted(&Subjects::new("edge"), "shop");
        assert_eq!((wanted.subject.as_str(), wanted.queue.as_str()), ("edge.raw.v1.shop", "ingest"));
        let given = serde_json::json!({"type": "nats", "subject": "logs.*.>", "queue": "two", "limits": {"lines": 9}});
        let config = check(serde_json::json!({"sources": {"shop": given}})).expect("good");
        let SourceKind::Nats(nats) = &config.sources[0].kind else { panic!("another kind") };
        let wanted = nats.wanted(&Subjects::new("edge"), "shop");
        assert_eq!((wanted.subject.as_str(), wanted.queue.as_str()), ("logs.*.>", "two"));
        assert_eq!((nats.limits.lines.map(u32::from), nats.limits.sender_lines), (Some(9), None));
    }

    #[test]
    fn a_dash_among_log_files_is_standard_input() {
        let sources = IngestConfig::for_files(vec!["a.log".into(), "-".into()]).sources;
        let kinds: Vec<_> = sources.iter().map(|source| (source.name.as_str(), &source.kind)).collect();
        let file = SourceKind::File(FileConfig::new(vec!["a.log".into()]));
        assert_eq!(kinds, [("traefik", &file), ("stdin", &SourceKind::Stdin)]);
    }

    #[test]
    fn who_does_not_trust_cloudflare_does_not_believe_its_header() {
        let config = check(serde_json::json!({"client_ip": {"trusted_proxies": ["10.0.0.0/8"]}})).expect("good");
        assert!(config.client_ip.cdn_headers.is_empty());
        assert!(!config.client_ip.is_trusted("104.16.0.1".parse().unwrap()));
    }
}
