//! `[enforce.cloudflare]`: bans at Cloudflare, as access rules or as items of a list.

use std::path::PathBuf;
use std::time::Duration;

use proto::settings::{Field, FromValue, Mistakes, Unknown};
use proto::subject::is_name;
use serde::Deserialize;
use serde_json::Value;

use crate::config::secret::{RawSecret, SecretSource, check_secret, check_sendable, is_safe_url};

/// Where the API is, unless configured.
const API_URL: &str = "https://api.cloudflare.com/client/v4";
/// Zones that may be named: each ban costs a call in each.
const ZONES_MAX: usize = 50;
/// Access rules that an account has.
const RULES_MAX: u32 = 50_000;
/// Items that the lists of an account hold together with the largest plan.
const ITEMS_MAX: u32 = 500_000;
/// What Cloudflare takes in five minutes.
const CALLS_MAX: u32 = 1200;
/// Longest name of a list.
const LIST_NAME_MAX: usize = 50;

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct RawCloudflare {
    api_token: Field<RawSecret>,
    api_token_file: Field<PathBuf>,
    email: Field<String>,
    api_key: Field<RawSecret>,
    api_key_file: Field<PathBuf>,
    scope: Field<Scope>,
    mode: Field<String>,
    installation: Field<String>,
    entries_max: Field<u32>,
    calls_max: Field<u32>,
    reconcile_interval: Field<Duration>,
    api_url: Field<String>,
    #[serde(flatten)]
    unknown: Unknown,
}

proto::section!(RawCloudflare);

/// `[enforce.cloudflare]`, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CloudflareConfig {
    /// Who we are there.
    pub login: CloudflareLogin,
    /// Where bans stand.
    pub scope: Scope,
    /// What happens to a banned client; of a list its rule decides.
    pub mode: Mode,
    /// What our entries are known by; `None` = made once and kept in `state_dir`.
    pub installation: Option<String>,
    /// Entries of ours at most, in each zone. Default 10,000: what all lists of an account hold together, but with
    /// Enterprise.
    pub entries_max: u32,
    /// Calls in five minutes at most, 60 to 1,200. Default 1,000: the rest is for people and other programs.
    pub calls_max: u32,
    /// How often everything there is compared, 1 min to 1 day. Default 1 h.
    pub reconcile_interval: Duration,
    /// Where the API is, without a slash at its end.
    pub api_url: String,
}

/// Who we are at Cloudflare.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CloudflareLogin {
    /// A token.
    Token(SecretSource),
    /// The e-mail address of a user, and his Global API Key.
    Key(String, SecretSource),
}

/// Where bans stand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Access rules of the user, for all his zones.
    User,
    /// Access rules of these zones.
    Zones(Vec<String>),
    /// Access rules of an account, for all its zones.
    Account(String),
    /// Items of an account's list, which custom rules use.
    List {
        /// ID of the account.
        account: String,
        /// Name of the list.
        list: String,
    },
}

/// What happens to a banned client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// It is turned away.
    Block,
    /// Cloudflare decides how it has to prove itself.
    ManagedChallenge,
    /// Its browser has to run a script.
    JsChallenge,
    /// A person has to solve a task.
    Challenge,
}

impl Mode {
    const ALL: [Self; 4] = [Self::Block, Self::ManagedChallenge, Self::JsChallenge, Self::Challenge];

    /// As Cloudflare calls it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Block => "block",
            Self::ManagedChallenge => "managed_challenge",
            Self::JsChallenge => "js_challenge",
            Self::Challenge => "challenge",
        }
    }

    /// The mode of that name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|mode| mode.as_str() == name)
    }
}

impl FromValue for Scope {
    fn from_value(value: Value) -> Result<Self, String> {
        let wrong = || {
            let forms = "\"user\", { zones = [\"ID\"] }, { account = \"ID\" } or { account = \"ID\", list = \"name\" }";
            format!("expected {forms}, got {value}")
        };
        let text = |value: &Value| value.as_str().map(str::to_owned).ok_or_else(wrong);
        match &value {
            Value::String(word) if word == "user" => Ok(Self::User),
            Value::Object(table) => match (table.get("zones"), table.get("account"), table.get("list"), table.len()) {
                (Some(Value::Array(zones)), None, None, 1) => {
                    zones.iter().map(text).collect::<Result<_, _>>().map(Self::Zones)
                }
                (None, Some(account), None, 1) => text(account).map(Self::Account),
                (None, Some(account), Some(list), 2) => Ok(Self::List { account: text(account)?, list: text(list)? }),
                _ => Err(wrong()),
            },
            _ => Err(wrong()),
        }
    }
}

impl Scope {
    fn mistakes(&self) -> Vec<String> {
        let ids = match self {
            Self::User => Vec::new(),
            Self::Zones(zones) => zones.iter().collect(),
            Self::Account(account) | Self::List { account, .. } => vec![account],
        };
        let is_id = |id: &str| id.len() == 32 && id.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        let bad = ids.iter().filter(|id| !is_id(id));
        let mut mistakes: Vec<String> = bad
            .map(|id| format!("an ID is 32 digits and letters a to f, as on the overview page; got {id:?}"))
            .collect();
        if let Self::Zones(zones) = self {
            let mut sorted = zones.clone();
            sorted.sort();
            sorted.dedup();
            if zones.is_empty() || zones.len() > ZONES_MAX || sorted.len() < zones.len() {
                mistakes.push(format!("expected 1 to {ZONES_MAX} different zones, got {}", zones.len()));
            }
        }
        if let Self::List { list, .. } = self
            && !((1..=LIST_NAME_MAX).contains(&list.len())
                && list.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'z' | b'_')))
        {
            mistakes.push(format!("a list's name matches [a-z0-9_]{{1,{LIST_NAME_MAX}}}, got {list:?}"));
        }
        mistakes
    }
}

impl RawCloudflare {
    const KEYS: [&str; 12] = [
        "api_token",
        "api_token_file",
        "email",
        "api_key",
        "api_key_file",
        "scope",
        "mode",
        "installation",
        "entries_max",
        "calls_max",
        "reconcile_interval",
        "api_url",
    ];

    pub(super) fn check(self, mistakes: &mut Mistakes) -> Option<CloudflareConfig> {
        self.unknown.check(&Self::KEYS, mistakes);
        let mut own = Mistakes::new();
        let token = check_header_secret("api_token", (self.api_token, self.api_token_file), &mut own);
        let key = check_header_secret("api_key", (self.api_key, self.api_key_file), &mut own);
        let login = check_login(token, self.email.take("email", &mut own), key, &mut own);
        let scope = self.scope.required("scope", &mut own);
        for mistake in scope.iter().flat_map(Scope::mistakes) {
            own.add("scope", mistake);
        }
        let is_list = matches!(scope, Some(Scope::List { .. }));
        let mode = check_mode(self.mode.take("mode", &mut own).as_deref(), is_list, &mut own);
        let installation = self.installation.take("installation", &mut own);
        if installation.as_deref().is_some_and(|name| !is_name(name)) {
            own.add("installation", "must match [a-z0-9-]{1,63}");
        }
        let entries_limit = if is_list { ITEMS_MAX } else { RULES_MAX };
        let entries_max = self.entries_max.or("entries_max", 10_000, &mut own);
        if !(1..=entries_limit).contains(&entries_max) {
            own.add("entries_max", format!("must be from 1 to {entries_limit}"));
        }
        let calls_max = self.calls_max.or("calls_max", 1000, &mut own);
        if !(60..=CALLS_MAX).contains(&calls_max) {
            own.add("calls_max", format!("must be from 60 to {CALLS_MAX}"));
        }
        let hour = Duration::from_secs(3600);
        let reconcile_interval = self.reconcile_interval.or("reconcile_interval", hour, &mut own);
        if !(hour / 60..=24 * hour).contains(&reconcile_interval) {
            own.add("reconcile_interval", "must be from \"1m\" to \"1day\"");
        }
        let api_url = self.api_url.or("api_url", API_URL.to_owned(), &mut own);
        if !is_safe_url(&api_url) {
            own.add("api_url", "expected \"https://HOST/PATH\", or \"http://\" to this host");
        }
        let fine = own.is_empty();
        for mistake in own.into_sorted() {
            mistakes.add(&mistake.key, mistake.text);
        }
        let checked = CloudflareConfig {
            login: login?,
            scope: scope?,
            mode: mode?,
            installation,
            entries_max,
            calls_max,
            reconcile_interval,
            api_url: api_url.trim_end_matches('/').to_owned(),
        };
        fine.then_some(checked)
    }
}

/// A secret that is sent as a header.
fn check_header_secret(
    key: &str,
    secret: (Field<RawSecret>, Field<PathBuf>),
    mistakes: &mut Mistakes,
) -> Option<SecretSource> {
    let source = check_secret(key, secret, mistakes)??;
    let fine = match &source {
        SecretSource::Given(secret) => check_header(key, secret.expose(), mistakes),
        // It is read when it is needed.
        SecretSource::File(_) => true,
    };
    fine.then_some(source)
}

/// Whether it can be sent as a header. Does not show it.
fn check_header(key: &str, text: &str, mistakes: &mut Mistakes) -> bool {
    check_sendable(text).map_err(|expected| mistakes.add(key, expected)).is_ok()
}

fn check_login(
    token: Option<SecretSource>,
    email: Option<String>,
    key: Option<SecretSource>,
    mistakes: &mut Mistakes,
) -> Option<CloudflareLogin> {
    match (token, email, key) {
        (Some(token), None, None) => Some(CloudflareLogin::Token(token)),
        (None, Some(email), Some(key)) => {
            check_header("email", &email, mistakes).then_some(CloudflareLogin::Key(email, key))
        }
        (None, None, None) => {
            if mistakes.is_empty() {
                mistakes.add("api_token_file", "is required, or `email` and `api_key_file`");
            }
            None
        }
        (None, None, Some(_)) => {
            mistakes.add("email", "is required with a Global API Key");
            None
        }
        (None, Some(_), None) => {
            if mistakes.is_empty() {
                mistakes.add("api_key_file", "is required with `email`");
            }
            None
        }
        (Some(_), ..) => {
            mistakes.add("email", "a token stands alone, without `email` and `api_key`");
            None
        }
    }
}

fn check_mode(given: Option<&str>, is_list: bool, mistakes: &mut Mistakes) -> Option<Mode> {
    match given {
        Some(_) if is_list => {
            mistakes.add("mode", "what happens to clients on a list is up to the custom rules that use it");
            None
        }
        None => Some(Mode::Block),
        Some(name) => Mode::parse(name).or_else(|| {
            let known = Mode::ALL.map(|mode| format!("\"{}\"", mode.as_str())).join(", ");
            mistakes.add("mode", format!("expected one of {known}, got {name:?}"));
            None
        }),
    }
}

#[cfg(test)]
mod tests {
    use proto::secret::Secret;
    use serde_json::json;

    use super::*;
    use crate::testing::checked;

    const ID: &str = "0123456789abcdef0123456789abcdef";

    fn check(value: Value) -> Result<CloudflareConfig, Vec<String>> {
        checked(value, RawCloudflare::check)
    }

    #[test]
    fn every_scope_and_login_is_read() {
        let token = CloudflareLogin::Token(SecretSource::File("/t".into()));
        for (scope, expected) in [
            (json!("user"), Scope::User),
            (json!({"zones": [ID]}), Scope::Zones(vec![ID.to_owned()])),
            (json!({ "account": ID }), Scope::Account(ID.to_owned())),
            (json!({"account": ID, "list": "bad_0"}), Scope::List { account: ID.to_owned(), list: "bad_0".to_owned() }),
        ] {
            let config = check(json!({"api_token_file": "/t", "scope": scope})).unwrap();
            assert_eq!((&config.scope, &config.login, config.mode), (&expected, &token, Mode::Block));
        }
        let config = check(json!({"email": "a@example.net", "api_key": "k", "scope": "user", "mode": "js_challenge",
            "api_url": "http://127.0.0.1:8080/"}));
        let config = config.unwrap();
        let key = SecretSource::Given(Secret::new("k"));
        assert_eq!(config.login, CloudflareLogin::Key("a@example.net".to_owned(), key));
        assert_eq!((config.mode, config.api_url.as_str()), (Mode::JsChallenge, "http://127.0.0.1:8080"));
    }

    #[test]
    fn every_mistake_is_reported_and_none_shows_a_secret() {
        let wrong = json!({"api_token": "hush hush", "email": "a b", "api_key": ["hush"],
            "scope": {"account": "x", "list": "No"}, "mode": "block", "installation": "A", "entries_max": 0,
            "calls_max": 1201, "reconcile_interval": "1s", "api_url": "http://example.net", "modes": 1});
        let texts = check(wrong).unwrap_err();
        let expected = [
            "api_key: expected a string",
            "api_token: expected printable ASCII without spaces",
            "api_url: expected \"https://HOST/PATH\", or \"http://\" to this host",
            "calls_max: must be from 60 to 1200",
            "entries_max: must be from 1 to 500000",
            "installation: must match [a-z0-9-]{1,63}",
            "mode: what happens to clients on a list is up to the custom rules that use it",
            "modes: unknown key; did you mean `mode`?",
            "reconcile_interval: must be from \"1m\" to \"1day\"",
            "scope: a list's name matches [a-z0-9_]{1,50}, got \"No\"",
            "scope: an ID is 32 digits and letters a to f, as on the overview page; got \"x\"",
        ];
        let near: Vec<bool> = expected.iter().zip(&texts).map(|(e, t)| t.starts_with(e)).collect();
        assert!(near.len() == texts.len() && near.iter().all(|near| *near), "{texts:#?}");
        assert!(!texts.iter().any(|text| text.contains("hush")), "{texts:?}");
        for (value, text) in [
            (json!({"scope": "user"}), "api_token_file: is required, or `email` and `api_key_file`"),
            (json!({"scope": "user", "api_key_file": "/k"}), "email: is required with a Global API Key"),
            (json!({"scope": "user", "email": "a"}), "api_key_file: is required with `email`"),
            (json!({"scope": "user", "api_token": "t", "email": "a"}), "email: a token stands alone"),
            (json!({"scope": "user", "api_token": "t", "api_token_file": "/t"}), "api_token: give either api_token"),
            (json!({"api_token": "t"}), "scope: is required"),
            (json!({"api_token": "t", "scope": {"zones": []}}), "scope: expected 1 to 50 different zones, got 0"),
            (json!({"api_token": "t", "scope": "all"}), "scope: expected \"user\", { zones"),
            (json!({"api_token": "t", "scope": "user", "mode": "deny"}), "mode: expected one of \"block\""),
        ] {
            let texts = check(value).unwrap_err();
            assert!(texts.iter().any(|found| found.starts_with(text)), "{text}: {texts:?}");
        }
    }
}
