//! The `[ingest]` section: raw as it was written, then checked.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use proto::client_ip::{CdnHeader, ClientIpPolicy};
use proto::net::{NamedSet, NetSet, Target};
use proto::section;
use proto::settings::{ByteSize, Field, Mistakes, Unknown};
use proto::subject::is_name;
use serde::Deserialize;

use crate::parse::Format;

/// Default of `line_bytes_max`: Traefik accepts request heads of 1 MiB, honest ones are far below 64 KiB.
const LINE_BYTES_MAX: u64 = 64 << 10;
/// Bounds of `line_bytes_max`: a line must fit into memory a few times, and an access entry needs some room.
const LINE_BYTES_MAX_RANGE: std::ops::RangeInclusive<u64> = 256..=(1 << 20);
/// Default of `poll_interval`: with inotify only a safety net.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// Bounds of `poll_interval`.
const POLL_INTERVAL_RANGE: std::ops::RangeInclusive<Duration> = Duration::from_millis(10)..=Duration::from_secs(60);
/// Default of `silent_after`.
const SILENT_AFTER: Duration = Duration::from_secs(15 * 60);
/// Sources in one configuration.
const SOURCES_MAX: usize = 64;
/// The source of log files given on the command line.
const COMMAND_LINE_SOURCE: &str = "traefik";
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
    /// What nobody knows.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// `[ingest.sources.NAME]` as written.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct RawSource {
    /// `file`.
    #[serde(rename = "type")]
    pub kind: Field<String>,
    /// Absolute paths or patterns of files to follow.
    pub include: Field<Vec<String>>,
    /// Patterns of files not to follow: absolute, or of file names.
    pub exclude: Field<Vec<String>>,
    /// `auto`, `json` or `clf`.
    pub format: Field<String>,
    /// Longest line in bytes; longer ones are skipped and counted.
    pub line_bytes_max: Field<ByteSize>,
    /// How often directories and files are looked at without a notification.
    pub poll_interval: Field<Duration>,
    /// `beginning` or `end`: where files begin that are there at the very first start.
    pub read_from: Field<String>,
    /// Whether the kernel is asked to tell of changes; `false` where it cannot (network file systems).
    pub inotify: Field<bool>,
    /// After how long without a line a source that had some is reported.
    pub silent_after: Field<Duration>,
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

section!(RawIngest, RawSource, RawClientIp);

/// Everything ingest needs to know.
#[derive(Clone, Debug)]
pub struct IngestConfig {
    /// At least one in a configuration that runs the role; names are unique.
    pub sources: Vec<SourceConfig>,
    /// How clients are told from proxies.
    pub client_ip: Arc<ClientIpPolicy>,
}

/// One source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceConfig {
    /// Matches `[a-z0-9-]{1,63}`.
    pub name: String,
    /// Where its lines come from.
    pub kind: SourceKind,
}

/// Kinds of sources.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceKind {
    /// Files that grow and rotate.
    File(FileConfig),
}

/// A source of files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileConfig {
    /// Paths or patterns (`*`, `?`, `[...]` within one component).
    pub include: Vec<PathBuf>,
    /// Patterns of files that are not followed; those without `/` are compared with the file name.
    pub exclude: Vec<String>,
    /// How lines are written.
    pub format: Format,
    /// Longest line in bytes.
    pub line_bytes_max: usize,
    /// How often everything is looked at.
    pub poll_interval: Duration,
    /// Whether files that are there at the very first start begin at their end.
    pub skip_existing: bool,
    /// Whether inotify is used.
    pub inotify: bool,
    /// Silence that is reported.
    pub silent_after: Duration,
}

impl FileConfig {
    /// Defaults for `include`.
    pub fn new(include: Vec<PathBuf>) -> Self {
        Self {
            include,
            exclude: Vec::new(),
            format: Format::Auto,
            line_bytes_max: LINE_BYTES_MAX as usize,
            poll_interval: POLL_INTERVAL,
            skip_existing: false,
            inotify: true,
            silent_after: SILENT_AFTER,
        }
    }
}

impl IngestConfig {
    /// For log files given on the command line: one source, `traefik`, with defaults.
    pub fn for_files(paths: Vec<PathBuf>) -> Self {
        let client_ip = RawClientIp::default().check(&mut Mistakes::new());
        let mut config = Self { sources: Vec::new(), client_ip: Arc::new(client_ip) };
        config.set_files(paths);
        config
    }

    /// Replaces the sources by one, `traefik`, of these files; the rest of the configuration stays.
    pub fn set_files(&mut self, paths: Vec<PathBuf>) {
        let kind = SourceKind::File(FileConfig::new(paths));
        self.sources = vec![SourceConfig { name: COMMAND_LINE_SOURCE.to_owned(), kind }];
    }
}

impl RawIngest {
    /// The checked section; `None` when `mistakes` holds any in the end. Notes every mistake, keys relative to `ingest`.
    /// A configuration without sources passes: files may be given on the command line.
    pub fn check(self, mistakes: &mut Mistakes) -> Option<IngestConfig> {
        self.unknown.check(&["sources", "client_ip"], mistakes);
        let client_ip = self.client_ip.or("client_ip", RawClientIp::default(), mistakes);
        let client_ip = mistakes.within("client_ip", |mistakes| client_ip.check(mistakes));
        let raw = self.sources.or("sources", BTreeMap::new(), mistakes);
        if raw.len() > SOURCES_MAX {
            mistakes.add("sources", format!("{} sources are given, at most {SOURCES_MAX} are allowed", raw.len()));
        }
        let check = |(name, source): (String, RawSource)| {
            mistakes.within(&format!("sources.{name}"), |mistakes| source.check(name, mistakes))
        };
        let sources = raw.into_iter().map(check).collect();
        mistakes.is_empty().then(|| IngestConfig { sources, client_ip: Arc::new(client_ip) })
    }
}

impl RawSource {
    fn check(self, name: String, mistakes: &mut Mistakes) -> SourceConfig {
        if !is_name(&name) {
            mistakes.add("", "the name of a source must match [a-z0-9-]{1,63}");
        }
        self.unknown.check(&SOURCE_KEYS, mistakes);
        match self.kind.required("type", mistakes).as_deref() {
            Some("file") | None => {}
            Some(kind @ ("stdin" | "syslog" | "http" | "otlp" | "nats")) => {
                mistakes.add("type", format!("`{kind}` is not available in this version; expected `file`"));
            }
            Some(other) => mistakes.add("type", format!("expected `file`, got {other:?}")),
        }
        let include = self.include.required("include", mistakes);
        if include.as_ref().is_some_and(Vec::is_empty) {
            mistakes.add("include", "at least one path or pattern is needed");
        }
        let include: Vec<PathBuf> = include.unwrap_or_default().into_iter().map(PathBuf::from).collect();
        include.iter().for_each(|path| check_pattern("include", path, mistakes));
        let exclude = self.exclude.or("exclude", Vec::new(), mistakes);
        for pattern in exclude.iter().filter(|pattern| pattern.contains('/')) {
            check_pattern("exclude", Path::new(pattern), mistakes);
        }
        let format = match self.format.take("format", mistakes).as_deref() {
            None | Some("auto") => Format::Auto,
            Some("json") => Format::Json,
            Some("clf") => Format::Clf,
            Some(other) => {
                mistakes.add("format", format!("expected `auto`, `json` or `clf`, got {other:?}"));
                Format::Auto
            }
        };
        let read_from = self.read_from.take("read_from", mistakes);
        if let Some(other) = read_from.as_deref().filter(|place| !matches!(*place, "beginning" | "end")) {
            mistakes.add("read_from", format!("expected `beginning` or `end`, got {other:?}"));
        }
        let line_bytes_max = self.line_bytes_max.or("line_bytes_max", ByteSize(LINE_BYTES_MAX), mistakes).0;
        if !LINE_BYTES_MAX_RANGE.contains(&line_bytes_max) {
            mistakes.add("line_bytes_max", "must be from 256 bytes to 1MiB");
        }
        let poll_interval = self.poll_interval.or("poll_interval", POLL_INTERVAL, mistakes);
        if !POLL_INTERVAL_RANGE.contains(&poll_interval) {
            mistakes.add("poll_interval", "must be from 10ms to 1m");
        }
        let file = FileConfig {
            exclude,
            format,
            line_bytes_max: line_bytes_max as usize,
            poll_interval,
            skip_existing: read_from.as_deref() == Some("end"),
            inotify: self.inotify.or("inotify", true, mistakes),
            silent_after: self.silent_after.or("silent_after", SILENT_AFTER, mistakes),
            ..FileConfig::new(include)
        };
        SourceConfig { name, kind: SourceKind::File(file) }
    }
}

const SOURCE_KEYS: [&str; 9] =
    ["type", "include", "exclude", "format", "line_bytes_max", "poll_interval", "read_from", "inotify", "silent_after"];

fn check_pattern(key: &str, pattern: &Path, mistakes: &mut Mistakes) {
    let text = pattern.to_string_lossy();
    if !pattern.is_absolute() {
        mistakes.add(key, format!("{text:?} must be an absolute path"));
    }
    if text.contains("**") {
        mistakes.add(key, format!("{text:?}: `**` is not supported; a `*` stands within one directory"));
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
        let SourceKind::File(file) = &config.sources[0].kind;
        assert_eq!(*file, FileConfig::new(vec!["/var/log/a*.log".into()]));
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
                "Bad": {"type": "syslog", "include": []},
                "a": {"type": "file", "include": ["relative", "/a/**/b"], "format": "xml", "read_from": "middle",
                      "line_bytes_max": "1B", "poll_interval": "1ns", "inotify": 3, "pol_interval": "1s"},
                "b": {},
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
                "ingest.sources.Bad.include",
                "ingest.sources.Bad.type",
                "ingest.sources.a.format",
                "ingest.sources.a.include",
                "ingest.sources.a.include",
                "ingest.sources.a.inotify",
                "ingest.sources.a.line_bytes_max",
                "ingest.sources.a.pol_interval",
                "ingest.sources.a.poll_interval",
                "ingest.sources.a.read_from",
                "ingest.sources.b.include",
                "ingest.sources.b.type",
            ],
            "{mistakes:#?}"
        );
        assert!(mistakes[7].contains("not available in this version"), "{}", mistakes[7]);
    }

    #[test]
    fn who_does_not_trust_cloudflare_does_not_believe_its_header() {
        let config = check(serde_json::json!({"client_ip": {"trusted_proxies": ["10.0.0.0/8"]}})).expect("good");
        assert!(config.client_ip.cdn_headers.is_empty());
        assert!(!config.client_ip.is_trusted("104.16.0.1".parse().unwrap()));
    }
}
