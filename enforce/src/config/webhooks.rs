//! `[enforce.webhooks.NAME]`: what is posted where, and how.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use proto::secret::Secret;
use proto::settings::{Field, Mistakes, Unknown};
use proto::subject::is_name;
use reqwest::header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, HOST, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Method, Url};
use serde::Deserialize;

use crate::config::notify::{check_events, check_look_up, check_template};
use crate::config::secret::{Hidden, RawSecret, SecretError, SecretSource, check_secret, check_sendable};
use crate::notify::message::EventKind;
use crate::notify::template::{Escape, PLACEHOLDERS, Template, Values};
use crate::notify::webhook::{SIGNATURE, parse_url};

/// Webhooks at most: each is a task and a queue.
const WEBHOOKS_MAX: usize = 32;
/// Longest name: with what stands before it, it names a lease.
const NAME_CHARS_MAX: usize = 48;
/// What the CloudEvent itself is.
const CLOUD_EVENT: &str = "application/cloudevents+json";
/// What a body is unless configured.
const JSON: &str = "application/json";
/// How long an answer may take, unless configured.
const TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct RawWebhook {
    url: Field<RawSecret>,
    url_file: Field<PathBuf>,
    events: Field<Vec<String>>,
    method: Field<String>,
    content_type: Field<String>,
    body: Field<String>,
    headers: Field<Hidden<BTreeMap<String, Field<RawSecret>>>>,
    token: Field<RawSecret>,
    token_file: Field<PathBuf>,
    secret: Field<RawSecret>,
    secret_file: Field<PathBuf>,
    timeout: Field<Duration>,
    look_up_url: Field<String>,
    #[serde(flatten)]
    unknown: Unknown,
}

proto::section!(RawWebhook);

/// `[enforce.webhooks.NAME]`, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WebhookConfig {
    /// Its name.
    pub name: String,
    /// Where it is; may hold a secret.
    pub url: SecretSource,
    /// What is told. Default everything.
    pub events: BTreeSet<EventKind>,
    /// POST or PUT.
    pub method: Method,
    /// What the body is.
    pub content_type: String,
    /// More headers; their values do not print.
    pub headers: HeaderMap,
    /// For `Authorization: Bearer`.
    pub token: Option<SecretSource>,
    /// That requests are signed with.
    pub secret: Option<SecretSource>,
    /// How long an answer may take, 1 s to 1 min.
    pub timeout: Duration,
    /// `None` = the CloudEvent itself.
    pub(crate) body: Option<Template>,
    /// How values are written into the body.
    pub(crate) escape: Escape,
    /// Where an address is looked up.
    pub(crate) look_up: Template,
}

impl WebhookConfig {
    /// Where it is.
    ///
    /// # Errors
    /// When it cannot be read, or is none.
    pub(crate) fn load_url(&self) -> Result<Url, SecretError> {
        self.url.load_as("url", |text| parse_url(text.expose()))
    }

    /// The value of `Authorization`, where there is a token.
    ///
    /// # Errors
    /// When it cannot be read or sent.
    pub(crate) fn load_bearer(&self) -> Result<Option<HeaderValue>, SecretError> {
        let make = |token: &Secret| {
            check_sendable(token.expose())?;
            let value = HeaderValue::from_str(&format!("Bearer {}", token.expose()));
            let mut value = value.map_err(|_| "cannot be sent as a header".to_owned())?;
            value.set_sensitive(true);
            Ok(value)
        };
        self.token.as_ref().map(|token| token.load_as("token", make)).transpose()
    }

    /// What requests are signed with.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(crate) fn load_secret(&self) -> Result<Option<Secret>, SecretError> {
        self.secret.as_ref().map(|secret| secret.load("secret")).transpose()
    }

    pub(super) fn check_secrets(&self, mistakes: &mut Mistakes) {
        let errors = [self.load_url().err(), self.load_bearer().err(), self.load_secret().err()];
        errors.into_iter().flatten().for_each(|error| error.note(mistakes));
    }
}

/// `[enforce.webhooks]` as a file says it.
pub(super) type RawWebhooks = BTreeMap<String, Field<Hidden<RawWebhook>>>;

/// All of them, by name.
pub(super) fn check(webhooks: RawWebhooks, mistakes: &mut Mistakes) -> Option<Vec<WebhookConfig>> {
    let mut checked = Vec::new();
    let mut fine = webhooks.len() <= WEBHOOKS_MAX;
    if !fine {
        mistakes.add("", format!("expected at most {WEBHOOKS_MAX}, got {}", webhooks.len()));
    }
    for (name, raw) in webhooks {
        let is_absent = matches!(raw, Field::Absent);
        let Some(Hidden(raw)) = raw.take(&name, mistakes) else {
            fine &= is_absent;
            continue;
        };
        mistakes.within(&name, |mistakes| {
            let is_fine = is_name(&name) && name.len() <= NAME_CHARS_MAX;
            if !is_fine {
                mistakes.add("", format!("a name has 1 to {NAME_CHARS_MAX} of a-z, 0-9 and -"));
            }
            match raw.check(&name, mistakes) {
                Some(webhook) if is_fine => checked.push(webhook),
                _ => fine = false,
            }
        });
    }
    fine.then_some(checked)
}

impl RawWebhook {
    const KEYS: [&str; 13] = [
        "url",
        "url_file",
        "events",
        "method",
        "content_type",
        "body",
        "headers",
        "token",
        "token_file",
        "secret",
        "secret_file",
        "timeout",
        "look_up_url",
    ];

    fn check(self, name: &str, mistakes: &mut Mistakes) -> Option<WebhookConfig> {
        self.unknown.check(&Self::KEYS, mistakes);
        let url = check_url((self.url, self.url_file), mistakes);
        let events = check_events(self.events, &EventKind::ALL, mistakes);
        let method = check_method(self.method, mistakes);
        let body = check_body(self.body, self.content_type, mistakes);
        let token = check_secret("token", (self.token, self.token_file), mistakes);
        let has_token = token.as_ref().is_some_and(Option::is_some);
        let headers = check_headers(self.headers, has_token, mistakes);
        let secret = check_secret("secret", (self.secret, self.secret_file), mistakes);
        let timeout = self.timeout.or("timeout", TIMEOUT, mistakes);
        let is_timely = (Duration::from_secs(1)..=Duration::from_secs(60)).contains(&timeout);
        if !is_timely {
            mistakes.add("timeout", "must be from \"1s\" to \"1m\"");
        }
        let look_up = check_look_up(self.look_up_url, mistakes);
        let (body, content_type, escape) = body?;
        let webhook = WebhookConfig {
            name: name.to_owned(),
            url: url?,
            events: events?,
            method: method?,
            content_type,
            headers: headers?,
            token: token?,
            secret: secret?,
            timeout,
            body,
            escape,
            look_up: look_up?,
        };
        is_timely.then_some(webhook)
    }
}

fn check_url(given: (Field<RawSecret>, Field<PathBuf>), mistakes: &mut Mistakes) -> Option<SecretSource> {
    let url = check_secret("url", given, mistakes)?;
    match url {
        None => {
            mistakes.add("url", "is required (or url_file)");
            None
        }
        Some(SecretSource::Given(url)) => match parse_url(url.expose()) {
            Ok(_) => Some(SecretSource::Given(url)),
            Err(why) => {
                mistakes.add("url", why);
                None
            }
        },
        file => file,
    }
}

fn check_method(given: Field<String>, mistakes: &mut Mistakes) -> Option<Method> {
    match given.or("method", "POST".to_owned(), mistakes).as_str() {
        "POST" => Some(Method::POST),
        "PUT" => Some(Method::PUT),
        other => {
            mistakes.add("method", format!("expected \"POST\" or \"PUT\", got {other:?}"));
            None
        }
    }
}

type Body = (Option<Template>, String, Escape);

fn check_body(body: Field<String>, content_type: Field<String>, mistakes: &mut Mistakes) -> Option<Body> {
    let given = content_type.take("content_type", mistakes);
    if let Some(given) = given.as_deref().filter(|given| HeaderValue::from_str(given).is_err() || !given.contains('/'))
    {
        mistakes.add("content_type", format!("expected one such as {JSON:?}, got {given:?}"));
        return None;
    }
    let Some(text) = body.take("body", mistakes) else {
        if given.is_some() {
            mistakes.add("content_type", "goes with a body; without one, the CloudEvent itself is sent");
            return None;
        }
        return Some((None, CLOUD_EVENT.to_owned(), Escape::Json));
    };
    let content_type = given.unwrap_or(JSON.to_owned());
    let essence = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    let escape = if essence == JSON || essence.ends_with("+json") {
        Escape::Json
    } else if essence == "application/x-www-form-urlencoded" {
        Escape::Url
    } else {
        Escape::Plain
    };
    let template = check_template("body", &text, &PLACEHOLDERS, mistakes)?;
    if escape == Escape::Json {
        // A word is JSON inside of quotes alone, as any value is: outside, not even a number would do where it is empty.
        let values: Values = PLACEHOLDERS.into_iter().map(|name| (name, "x".to_owned())).collect();
        if let Err(error) = serde_json::from_str::<serde_json::Value>(&template.render(&values, escape)) {
            mistakes.add("body", format!("is no JSON: {error} (placeholders stand inside of quotes, numbers too)"));
            return None;
        }
    }
    Some((Some(template), content_type, escape))
}

fn check_headers(
    given: Field<Hidden<BTreeMap<String, Field<RawSecret>>>>,
    has_token: bool,
    mistakes: &mut Mistakes,
) -> Option<HeaderMap> {
    let given = match given {
        Field::Absent => return Some(HeaderMap::new()),
        given => given.take("headers", mistakes)?.0,
    };
    let (mut headers, mut fine) = (HeaderMap::new(), true);
    mistakes.within("headers", |mistakes| {
        for (name, value) in given {
            let is_absent = matches!(value, Field::Absent);
            let Some(RawSecret(value)) = value.take(&name, mistakes) else {
                fine &= is_absent;
                continue;
            };
            let mut refuse = |why: &str| {
                mistakes.add(&name, why);
                fine = false;
            };
            let Ok(header) = HeaderName::from_bytes(name.as_bytes()) else {
                refuse("is no name of a header");
                continue;
            };
            let Ok(mut value) = HeaderValue::from_str(value.expose()) else {
                refuse("is no value of a header: plain ASCII without line ends is");
                continue;
            };
            if header == CONTENT_TYPE {
                refuse("is given by content_type");
            } else if header == HOST || header == CONTENT_LENGTH || header == SIGNATURE {
                refuse("is made by Portcullis itself");
            } else if header == AUTHORIZATION && has_token {
                refuse("is given by token");
            } else {
                value.set_sensitive(true);
                headers.insert(header, value);
            }
        }
    });
    fine.then_some(headers)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::testing;

    fn checked(value: Value) -> Result<Vec<WebhookConfig>, Vec<String>> {
        testing::checked(value, |raw: Field<Hidden<RawWebhooks>>, mistakes| check(raw.take("", mistakes)?.0, mistakes))
    }

    #[test]
    fn an_address_is_enough_and_gets_the_cloud_event() {
        let [webhook] = &checked(json!({"a": {"url": "https://x/s3cret"}})).unwrap()[..] else { panic!("one") };
        assert_eq!((webhook.content_type.as_str(), webhook.timeout), (CLOUD_EVENT, TIMEOUT));
        assert!(webhook.body.is_none() && webhook.events.len() == EventKind::ALL.len());
        assert!(!format!("{webhook:?}").contains("s3cret"));
    }

    #[test]
    fn values_are_escaped_as_the_body_needs_it() {
        for (content_type, escape) in [
            ("application/json; charset=utf-8", Escape::Json),
            ("application/vnd.x+json", Escape::Json),
            ("application/x-www-form-urlencoded", Escape::Url),
            ("text/plain", Escape::Plain),
        ] {
            let hook = json!({"url": "http://x", "content_type": content_type, "body": "[\"{text}\"]"});
            assert_eq!(checked(json!({ "a": hook })).unwrap()[0].escape, escape, "{content_type}");
        }
    }

    #[test]
    fn a_body_that_some_message_would_break_is_refused() {
        let broken = [
            r#"{"content": {text}}"#,
            r#"{"n": {ban_count}}"#,
            r#"{"n": 1{ban_count}}"#,
            r#"{"n": 1 {ban_count}}"#,
            r#"["\{text}"]"#,
            r#"["\u00{ban_count}"]"#,
        ];
        for body in broken {
            let hook = json!({"url": "http://x", "body": body});
            let texts = checked(json!({ "a": hook })).unwrap_err();
            assert!(texts[0].starts_with("a.body: is no JSON: "), "{body}: {texts:?}");
        }
        let fine = json!({"url": "http://x", "body": r#"{"{rule}": ["{text}", "n{ban_count}", "\\{text}"]}"#});
        assert!(checked(json!({ "a": fine })).is_ok());
    }

    #[test]
    fn every_mistake_is_told_with_its_key_and_none_shows_a_secret() {
        let wrong = json!({
            "A": {"url": "https://x"},
            "b": {"url": "hooks.example.net/s3cret", "method": "GET", "timeout": "0s", "events": ["all"], "bdy": "x",
                "token": "s3cret", "secret": "", "headers": {"Content-Type": "s3cret", "Authorization": "s3cret",
                "X Y": "s3cret", "X-A": "s3cret\n", "X-B": ["s3cret"]}},
            "c": {"url": "https://x", "content_type": "text/plain"},
            "d": {"url": "https://x", "body": "{\"text\": {text}, \"x\": }"},
            "e": {"url": "https://x", "url_file": "/x", "body": "{foo}", "headers": {"Host": "x"}},
        });
        let texts = checked(wrong).unwrap_err();
        let keys: Vec<&str> = texts.iter().map(|text| text.split(':').next().unwrap()).collect();
        let expected = [
            "A",
            "b.bdy",
            "b.events",
            "b.headers.Authorization",
            "b.headers.Content-Type",
            "b.headers.X Y",
            "b.headers.X-A",
            "b.headers.X-B",
            "b.method",
            "b.secret",
            "b.timeout",
            "b.url",
            "c.content_type",
            "d.body",
            "e.body",
            "e.headers.Host",
            "e.url",
        ];
        assert_eq!(keys, expected, "{texts:#?}");
        assert!(texts.iter().all(|text| !text.contains("s3cret")), "{texts:#?}");
        let headers = json!({"url": "https://x", "token": "t", "headers": {"Content-Type": "s3cret",
            "Authorization": "s3cret", "X Y": "s3cret", "X-A": "s3cret\n", "X-Portcullis-Signature": "s3cret"}});
        let texts = checked(json!({ "a": headers })).unwrap_err();
        assert_eq!(texts.len(), 5, "{texts:#?}");
        assert!(texts.iter().all(|text| !text.contains("s3cret")), "{texts:#?}");
    }

    #[test]
    fn an_address_in_the_place_of_a_table_is_not_shown() {
        let texts = checked(json!({"slack": "https://hooks.slack.com/s3cret", "none": null})).unwrap_err();
        assert_eq!(texts, ["slack: expected a table; write a section [slack]"]);
    }
}
