//! `[enforce.telegram]`: what is told in which chat.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use proto::secret::Secret;
use proto::settings::{Field, Mistakes, Unknown};
use reqwest::Url;
use serde::Deserialize;

use crate::config::notify::{check_events, check_look_up, check_template};
use crate::config::secret::{RawSecret, SecretError, SecretSource, check_secret, is_safe_url};
use crate::notify::message::EventKind;
use crate::notify::template::{PLACEHOLDERS, Template};
use crate::notify::text::{HTML, Texts, defaults};

/// The Bot API.
const API_URL: &str = "https://api.telegram.org";
/// Told unless configured: what needs no answer is left out, as bans end all the time.
const EVENTS: [EventKind; 5] =
    [EventKind::Banned, EventKind::Extended, EventKind::Started, EventKind::Stopped, EventKind::Alarm];

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct RawTelegram {
    bot_token: Field<RawSecret>,
    bot_token_file: Field<PathBuf>,
    chat_id: Field<String>,
    api_url: Field<String>,
    events: Field<Vec<String>>,
    look_up_url: Field<String>,
    templates: Field<BTreeMap<String, String>>,
    #[serde(flatten)]
    unknown: Unknown,
}

proto::section!(RawTelegram);

/// `[enforce.telegram]`, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TelegramConfig {
    /// Of the bot.
    pub token: SecretSource,
    /// A number, negative for groups, or the @name of a channel.
    pub chat_id: String,
    /// Where the Bot API is. Default `https://api.telegram.org`.
    pub api_url: Url,
    /// What is told. Default all but `unbanned`.
    pub events: BTreeSet<EventKind>,
    /// Where an address is looked up.
    pub(crate) look_up: Template,
    /// The texts, as HTML.
    pub(crate) texts: Texts,
}

impl TelegramConfig {
    /// The bot's token.
    ///
    /// # Errors
    /// When it cannot be read, or is none.
    pub(crate) fn load_token(&self) -> Result<Secret, SecretError> {
        let is_token = |c: char| c.is_ascii_alphanumeric() || matches!(c, ':' | '-' | '_');
        self.token.load_as("bot_token", |token| match token.expose().chars().all(is_token) {
            true => Ok(token.clone()),
            false => Err("expected a token as @BotFather gives it: digits, a colon, letters and digits".to_owned()),
        })
    }

    pub(super) fn check_secrets(&self, mistakes: &mut Mistakes) {
        if let Err(error) = self.load_token() {
            error.note(mistakes);
        }
    }
}

impl RawTelegram {
    const KEYS: [&str; 7] = ["bot_token", "bot_token_file", "chat_id", "api_url", "events", "look_up_url", "templates"];

    pub(super) fn check(self, mistakes: &mut Mistakes) -> Option<TelegramConfig> {
        self.unknown.check(&Self::KEYS, mistakes);
        let token = check_secret("bot_token", (self.bot_token, self.bot_token_file), mistakes);
        if matches!(token, Some(None)) {
            mistakes.add("bot_token_file", "is required (or bot_token)");
        }
        let chat_id = check_chat(self.chat_id, mistakes);
        let api_url = check_api_url(self.api_url, mistakes);
        let events = check_events(self.events, &EVENTS, mistakes);
        let look_up = check_look_up(self.look_up_url, mistakes);
        let texts = check_texts(self.templates, mistakes);
        Some(TelegramConfig {
            token: token??,
            chat_id: chat_id?,
            api_url: api_url?,
            events: events?,
            look_up: look_up?,
            texts: texts?,
        })
    }
}

fn check_chat(given: Field<String>, mistakes: &mut Mistakes) -> Option<String> {
    let chat_id = given.required("chat_id", mistakes)?;
    let is_number = chat_id.parse::<i64>().is_ok_and(|number| number != 0);
    let is_name = |name: &str| {
        (5..=32).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
    };
    if !is_number && !chat_id.strip_prefix('@').is_some_and(is_name) {
        let text = "expected a number such as \"-1001234567890\", or the name of a channel such as \"@my_channel\"";
        mistakes.add("chat_id", text);
        return None;
    }
    Some(chat_id)
}

fn check_api_url(given: Field<String>, mistakes: &mut Mistakes) -> Option<Url> {
    let text = given.or("api_url", API_URL.to_owned(), mistakes);
    let url = Url::parse(&text).ok().filter(|url| is_safe_url(&text) && url.host_str().is_some());
    if url.is_none() {
        mistakes.add("api_url", format!("expected an address such as \"{API_URL}\", or \"http://\" to this host"));
    }
    url
}

fn check_texts(given: Field<BTreeMap<String, String>>, mistakes: &mut Mistakes) -> Option<Texts> {
    let given = match given {
        Field::Absent => BTreeMap::new(),
        given => given.take("templates", mistakes)?,
    };
    mistakes.within("templates", |mistakes| {
        let mut texts = defaults();
        let mut fine = true;
        for (word, text) in &given {
            let known = HTML.iter().map(|(word, _)| *word);
            let Some(word) = known.clone().find(|known| known == word) else {
                mistakes.add(word, format!("unknown text; known are {}", known.collect::<Vec<_>>().join(", ")));
                fine = false;
                continue;
            };
            match check_template(word, text, &PLACEHOLDERS, mistakes) {
                Some(template) => drop(texts.insert(word, template)),
                None => fine = false,
            }
        }
        fine.then_some(texts)
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::testing::checked;

    fn check(value: Value) -> Result<TelegramConfig, Vec<String>> {
        checked(value, RawTelegram::check)
    }

    #[test]
    fn a_token_and_a_chat_are_enough() {
        let config = check(json!({"bot_token_file": "/run/secrets/telegram", "chat_id": -1_001_234})).unwrap();
        assert_eq!((config.chat_id.as_str(), config.api_url.as_str()), ("-1001234", "https://api.telegram.org/"));
        assert!(config.events.contains(&EventKind::Alarm) && !config.events.contains(&EventKind::Unbanned));
        assert_eq!(config.texts, defaults());
        let text = json!({"bot_token": "1:a", "chat_id": "@my_channel", "templates": {"banned": "{target}!"}});
        assert_ne!(check(text).unwrap().texts, defaults());
    }

    #[test]
    fn every_mistake_is_told_with_its_key_and_none_shows_a_secret() {
        let wrong = json!({"bot_token": "1:s3cret", "bot_token_file": "relative", "chat_id": "me", "api_url": "x",
            "events": ["ban", "banned"], "look_up_url": "{target}", "chat": 1,
            "templates": {"banned": "{rul}", "bans": "x", "alarm": ""}});
        let texts = check(wrong).unwrap_err();
        let keys: Vec<&str> = texts.iter().map(|text| text.split(':').next().unwrap()).collect();
        let expected = [
            "api_url",
            "bot_token",
            "chat",
            "chat_id",
            "events",
            "look_up_url",
            "templates.alarm",
            "templates.banned",
            "templates.bans",
        ];
        assert_eq!(keys, expected, "{texts:#?}");
        assert!(texts.iter().all(|text| !text.contains("s3cret")), "{texts:#?}");
        assert!(texts[4].contains("banned, extended, unbanned, started, stopped, alarm"), "{texts:#?}");
        assert!(texts[7].contains("unknown placeholder {rul}; known are {alarm} {ban_count}"), "{texts:#?}");
        assert_eq!(
            check(json!({"bot_token": ["s3cret"], "chat_id": 1})).unwrap_err(),
            ["bot_token: expected a string"]
        );
        let relative = check(json!({"bot_token_file": "relative", "chat_id": 1, "events": []})).unwrap_err();
        assert_eq!(relative.len(), 2, "{relative:?}");
    }
}
