//! The `[bus]` section: raw as it was written, then checked.

use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use crate::section;
use crate::settings::{ByteSize, Field, Mistakes, Unknown};
use crate::subject::{PREFIX, PREFIX_BYTES_MAX, is_name};

/// Servers unless configured.
const URLS: &str = "nats://127.0.0.1:4222";
/// Servers that may be named.
const URLS_MAX: usize = 32;
/// Copies of each stream that a NATS cluster can keep.
const REPLICAS: std::ops::RangeInclusive<u8> = 1..=5;
/// Default of `access_max_bytes`: at a thousand matching lines a second some five hours.
const ACCESS_MAX_BYTES: u64 = 1 << 30;
/// Least `access_max_bytes`: some of the largest batches.
const ACCESS_BYTES_MIN: u64 = 1 << 20;
/// Default of `events_keep`.
const EVENTS_KEEP: Duration = Duration::from_secs(30 * 24 * 3600);

/// `[bus]` as written.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct RawBus {
    /// `local` or `nats`.
    pub kind: Field<String>,
    /// Servers.
    pub urls: Field<Vec<String>>,
    /// File with a user's JWT and seed.
    pub credentials_file: Field<PathBuf>,
    /// File with an nkey seed.
    pub nkey_file: Field<PathBuf>,
    /// User name, with `password_file`.
    pub user: Field<String>,
    /// File with the password of `user`.
    pub password_file: Field<PathBuf>,
    /// File with a token.
    pub token_file: Field<PathBuf>,
    /// Certificates.
    pub tls: Field<RawBusTls>,
    /// First part of every name on the bus.
    pub prefix: Field<String>,
    /// Copies of each stream.
    pub replicas: Field<u8>,
    /// Size of the stream of access batches.
    pub access_max_bytes: Field<ByteSize>,
    /// How long public events are kept.
    pub events_keep: Field<Duration>,
    /// What nobody knows.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// `[bus.tls]` as written.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct RawBusTls {
    /// Certificates of authorities, PEM.
    pub ca_file: Field<PathBuf>,
    /// Our certificate, PEM.
    pub cert_file: Field<PathBuf>,
    /// Its key, PEM.
    pub key_file: Field<PathBuf>,
    /// What nobody knows.
    #[serde(flatten)]
    pub unknown: Unknown,
}

section!(RawBus, RawBusTls);

const KEYS: [&str; 12] = [
    "kind",
    "urls",
    "credentials_file",
    "nkey_file",
    "user",
    "password_file",
    "token_file",
    "tls",
    "prefix",
    "replicas",
    "access_max_bytes",
    "events_keep",
];

/// What connects the roles.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BusConfig {
    /// One process.
    Local,
    /// NATS with JetStream.
    Nats(Box<NatsConfig>),
}

/// How to reach NATS, and what is kept there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NatsConfig {
    /// At least one `nats://`, `tls://` or `ws://` address.
    pub urls: Vec<String>,
    /// How we say who we are.
    pub login: Login,
    /// Authorities that are trusted beside the system's.
    pub ca_file: Option<PathBuf>,
    /// Our certificate and its key.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// First part of every name on the bus.
    pub prefix: String,
    /// Copies of each stream; used by detect, which makes them.
    pub replicas: u8,
    /// Size of the stream of access batches, in bytes; used by detect.
    pub access_max_bytes: u64,
    /// How long public events are kept; used by detect.
    pub events_keep: Duration,
}

/// How we say who we are. Secrets stay in their files until they are needed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Login {
    /// Not at all, or by certificate only.
    Anonymous,
    /// A file with a user's JWT and seed.
    Credentials(PathBuf),
    /// A file with an nkey seed.
    Nkey(PathBuf),
    /// A user, and a file with the password.
    Password(String, PathBuf),
    /// A file with a token.
    Token(PathBuf),
}

impl NatsConfig {
    /// Defaults for one server.
    pub fn new(url: &str) -> Self {
        Self {
            urls: vec![url.to_owned()],
            login: Login::Anonymous,
            ca_file: None,
            identity: None,
            prefix: PREFIX.to_owned(),
            replicas: 1,
            access_max_bytes: ACCESS_MAX_BYTES,
            events_keep: EVENTS_KEEP,
        }
    }
}

impl RawBus {
    /// The checked section. Notes every mistake, keys relative to `bus`.
    pub fn check(self, mistakes: &mut Mistakes) -> BusConfig {
        self.unknown.check(&KEYS, mistakes);
        let kind = self.kind.take("kind", mistakes);
        let login = check_login(
            self.credentials_file.take("credentials_file", mistakes),
            self.nkey_file.take("nkey_file", mistakes),
            (self.user.take("user", mistakes), self.password_file.take("password_file", mistakes)),
            self.token_file.take("token_file", mistakes),
            mistakes,
        );
        let tls = self.tls.or("tls", RawBusTls::default(), mistakes);
        let (ca_file, identity) = mistakes.within("tls", |mistakes| tls.check(mistakes));
        let urls = self.urls.or("urls", vec![URLS.to_owned()], mistakes);
        check_urls(&urls, mistakes);
        let prefix = self.prefix.or("prefix", PREFIX.to_owned(), mistakes);
        if !is_name(&prefix) || prefix.len() > PREFIX_BYTES_MAX {
            mistakes.add("prefix", format!("must match [a-z0-9-]{{1,{PREFIX_BYTES_MAX}}}"));
        }
        let replicas = self.replicas.or("replicas", 1, mistakes);
        if !REPLICAS.contains(&replicas) {
            mistakes.add("replicas", format!("expected 1 to 5, best 1 or 3, got {replicas}"));
        }
        let ByteSize(access_max_bytes) =
            self.access_max_bytes.or("access_max_bytes", ByteSize(ACCESS_MAX_BYTES), mistakes);
        if access_max_bytes < ACCESS_BYTES_MIN {
            mistakes.add("access_max_bytes", "expected at least \"1MiB\"");
        }
        let events_keep = self.events_keep.or("events_keep", EVENTS_KEEP, mistakes);
        if events_keep < Duration::from_secs(3600) {
            mistakes.add("events_keep", "expected at least \"1h\"");
        }
        match kind.as_deref() {
            None | Some("local") => BusConfig::Local,
            Some("nats") => BusConfig::Nats(Box::new(NatsConfig {
                urls,
                login,
                ca_file,
                identity,
                prefix,
                replicas,
                access_max_bytes,
                events_keep,
            })),
            Some(other) => {
                mistakes.add("kind", format!("expected \"local\" or \"nats\", got {other:?}"));
                BusConfig::Local
            }
        }
    }
}

impl RawBusTls {
    fn check(self, mistakes: &mut Mistakes) -> (Option<PathBuf>, Option<(PathBuf, PathBuf)>) {
        self.unknown.check(&["ca_file", "cert_file", "key_file"], mistakes);
        let ca_file = self.ca_file.take("ca_file", mistakes);
        let identity = match (self.cert_file.take("cert_file", mistakes), self.key_file.take("key_file", mistakes)) {
            (Some(cert), Some(key)) => Some((cert, key)),
            (None, None) => None,
            (Some(_), None) => {
                mistakes.add("key_file", "is required with cert_file");
                None
            }
            (None, Some(_)) => {
                mistakes.add("cert_file", "is required with key_file");
                None
            }
        };
        (ca_file, identity)
    }
}

fn check_urls(urls: &[String], mistakes: &mut Mistakes) {
    if urls.is_empty() || urls.len() > URLS_MAX {
        mistakes.add("urls", format!("expected 1 to {URLS_MAX} servers, got {}", urls.len()));
    }
    for url in urls {
        if !["nats://", "tls://"].iter().any(|scheme| url.starts_with(scheme) && url.len() > scheme.len()) {
            mistakes.add("urls", format!("expected \"nats://HOST:PORT\" or \"tls://HOST:PORT\", got {url:?}"));
        } else if url.contains('@') {
            mistakes.add("urls", "holds a user or a password: use `user` and `password_file`, or `credentials_file`");
        }
    }
}

fn check_login(
    credentials: Option<PathBuf>,
    nkey: Option<PathBuf>,
    (user, password): (Option<String>, Option<PathBuf>),
    token: Option<PathBuf>,
    mistakes: &mut Mistakes,
) -> Login {
    let files = [
        ("credentials_file", &credentials),
        ("nkey_file", &nkey),
        ("password_file", &password),
        ("token_file", &token),
    ];
    let given: Vec<&str> = files.iter().filter(|(_, file)| file.is_some()).map(|(key, _)| *key).collect();
    if let [first, second, ..] = given[..] {
        mistakes.add(second, format!("cannot stand beside {first}"));
    }
    if user.is_some() != password.is_some() {
        let missing = if user.is_some() { "password_file" } else { "user" };
        mistakes.add(missing, "`user` and `password_file` go together");
    }
    match (credentials, nkey, user.zip(password), token) {
        (Some(file), ..) => Login::Credentials(file),
        (_, Some(file), ..) => Login::Nkey(file),
        (_, _, Some((user, file)), _) => Login::Password(user, file),
        (_, _, _, Some(file)) => Login::Token(file),
        (None, None, None, None) => Login::Anonymous,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn check(value: Value) -> (BusConfig, Vec<String>) {
        let raw: RawBus = serde_json::from_value(value).unwrap();
        let mut mistakes = Mistakes::new();
        let config = raw.check(&mut mistakes);
        (config, mistakes.into_sorted().iter().map(ToString::to_string).collect())
    }

    #[test]
    fn without_a_section_the_bus_is_local() {
        assert_eq!(check(json!({})), (BusConfig::Local, Vec::new()));
        let (config, mistakes) = check(json!({"kind": "nats"}));
        assert_eq!(config, BusConfig::Nats(Box::new(NatsConfig::new(URLS))));
        assert!(mistakes.is_empty());
    }

    #[test]
    fn every_mistake_is_reported_and_no_secret_stands_in_a_url() {
        let wrong = json!({
            "kind": "kafka", "urls": ["http://x", "nats://u:p@x:4222"], "user": "a", "token_file": "/no/such/file",
            "nkey_file": "/no/such/key", "tls": {"cert_file": "/no/such/cert"}, "prefix": "A", "replicas": 9,
            "access_max_bytes": "1KiB", "replica": 1,
        });
        let (_, mistakes) = check(wrong);
        for part in [
            "access_max_bytes: expected",
            "kind: expected",
            "password_file: `user` and",
            "prefix: must",
            "replica: unknown key; did you mean `replicas`?",
            "replicas: expected",
            "tls.key_file: is required",
            "token_file: cannot stand beside nkey_file",
            "urls: expected",
            "urls: holds a user",
        ] {
            assert!(mistakes.iter().any(|mistake| mistake.starts_with(part)), "{part}: {mistakes:?}");
        }
        assert!(!mistakes.iter().any(|mistake| mistake.contains("u:p@")), "{mistakes:?}");
    }
}
