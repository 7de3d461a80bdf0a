//! Telegram: one `sendMessage` a message, by the Bot API.
//!
//! The token is part of every address, so no address is ever shown. What Telegram asks for is obeyed: waits, and the new
//! name of a group that was made a supergroup.

use std::num::NonZeroU32;
use std::time::Duration;

use proto::limit::{Limit, Quota};
use proto::secret::Secret;
use proto::time::Clock;
use reqwest::{StatusCode, Url};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::config::TelegramConfig;
use crate::notify::http::{self, Answer};
use crate::notify::message::Message;
use crate::notify::queue::Outcome;
use crate::notify::text::{cut_html, html, plain};

/// Longest text, in UTF-16 units.
const TEXT_UNITS_MAX: usize = 4096;
/// How long an answer may take.
const TIMEOUT: Duration = Duration::from_secs(15);
/// Messages to a group in a minute, and as many more at once: Telegram takes 20 a minute of them, and one a second elsewhere.
const GROUP_MESSAGES: NonZeroU32 = NonZeroU32::new(15).unwrap();
const GROUP_BURST: NonZeroU32 = NonZeroU32::new(5).unwrap();
/// Wait where Telegram asks for one and does not say how long.
const WAIT_UNNAMED: Duration = Duration::from_secs(30);
/// Characters of Telegram's own words that are shown.
const WORDS_CHARS_MAX: usize = 200;

/// What Telegram answers.
#[derive(Debug, Default, Deserialize)]
struct Reply {
    ok: bool,
    #[serde(default)]
    error_code: u16,
    #[serde(default)]
    description: String,
    #[serde(default)]
    parameters: Parameters,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Parameters {
    /// Seconds.
    retry_after: Option<u64>,
    migrate_to_chat_id: Option<i64>,
}

/// How often a chat may be written to.
#[derive(Debug)]
struct Pace(Vec<Limit>);

impl Pace {
    fn new(is_group: bool, clock: &Clock) -> Self {
        let second = Quota::per_second(NonZeroU32::MIN);
        let minute = Quota::per_minute(GROUP_MESSAGES).allow_burst(GROUP_BURST);
        let quotas = if is_group { vec![minute, second] } else { vec![second] };
        Self(quotas.into_iter().map(|quota| Limit::new(quota, clock.clone())).collect())
    }

    /// Takes a message of what is allowed, or says how long that takes.
    fn check(&self) -> Result<(), Duration> {
        self.0.iter().try_for_each(|limit| limit.check(NonZeroU32::MIN))
    }
}

/// A bot in one chat.
#[derive(Debug)]
pub(crate) struct Telegram {
    config: TelegramConfig,
    chat_id: String,
    token: Option<Secret>,
    http: Option<reqwest::Client>,
    pace: Pace,
    /// Something that a person should change, though messages get through.
    advice: Option<String>,
}

impl Telegram {
    pub(crate) fn new(config: TelegramConfig, clock: &Clock) -> Self {
        let chat_id = config.chat_id.clone();
        // Groups have negative numbers; a name is a channel's or a supergroup's.
        let pace = Pace::new(chat_id.starts_with(['-', '@']), clock);
        Self { config, chat_id, token: None, http: None, pace, advice: None }
    }

    /// Where messages go, for people.
    pub(crate) fn destination(&self) -> String {
        format!("chat {}", self.chat_id)
    }

    /// What a person should change.
    pub(crate) fn advice(&self) -> Option<&str> {
        self.advice.as_deref()
    }

    /// The text as it would be sent.
    pub(crate) fn render(&self, message: &Message) -> String {
        cut_html(&html(&self.config.texts, message, &message.values(&self.config.look_up)), TEXT_UNITS_MAX)
    }

    /// Sends one message.
    pub(crate) async fn send(&mut self, message: &Message) -> Outcome {
        if let Err(why) = self.make_ready() {
            return Outcome::Broken(why);
        }
        if let Err(wait) = self.pace.check() {
            return Outcome::Paced(wait);
        }
        let html = self.render(message);
        let sent = self.call("sendMessage", &self.body(&html, true)).await;
        match sent {
            Ok(reply) if reply.error_code == 400 && reply.parameters.migrate_to_chat_id.is_none() => {
                self.send_plain(&html, &reply.description).await
            }
            Ok(reply) => self.judge(&reply),
            Err(outcome) => outcome,
        }
    }

    /// Reads what a message needs, unless that was done.
    pub(crate) fn make_ready(&mut self) -> Result<(), String> {
        if self.token.is_none() {
            self.token = Some(self.config.load_token().map_err(|error| error.to_string())?);
        }
        if self.http.is_none() {
            self.http = Some(http::client(&self.config.api_url, TIMEOUT)?);
        }
        Ok(())
    }

    fn body(&self, text: &str, is_html: bool) -> Value {
        let mut body = json!({"chat_id": self.chat(), "text": text, "link_preview_options": {"is_disabled": true}});
        if is_html {
            body["parse_mode"] = "HTML".into();
        }
        body
    }

    fn chat(&self) -> Value {
        self.chat_id.parse::<i64>().map_or_else(|_| self.chat_id.clone().into(), Value::from)
    }

    /// One call. An outcome where there is no answer that can be understood.
    async fn call(&self, method: &str, body: &Value) -> Result<Reply, Outcome> {
        let (Some(token), Some(client)) = (&self.token, &self.http) else { return Err(Outcome::Failed(String::new())) };
        let mut url: Url = self.config.api_url.clone();
        url.set_path(&format!("{}/bot{}/{method}", url.path().trim_end_matches('/'), token.expose()));
        let asked = http::ask(client.post(url).json(body)).await;
        let Answer { status, retry_after, body } =
            asked.map_err(|why| Outcome::Failed(format!("no answer from Telegram: {why}")))?;
        let unclear =
            || Outcome::Failed(format!("Telegram's answer cannot be understood (status {})", status.as_u16()));
        let mut reply: Reply = match serde_json::from_slice(&body) {
            Ok(reply) => reply,
            // From something in between; what it says is not Telegram's.
            Err(_) if status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error() => Reply::default(),
            Err(_) => return Err(unclear()),
        };
        if !reply.ok && reply.error_code == 0 {
            reply.error_code = status.as_u16();
        }
        if reply.ok != status.is_success() {
            return Err(unclear());
        }
        reply.parameters.retry_after = reply.parameters.retry_after.or(retry_after.map(|wait| wait.as_secs() + 1));
        reply.description = self.clean(&reply.description);
        Ok(reply)
    }

    /// Words of others, fit to be shown.
    fn clean(&self, words: &str) -> String {
        let token = self.token.as_ref().map_or("", Secret::expose);
        let words = if token.is_empty() { words.to_owned() } else { words.replace(token, "(token)") };
        words.chars().filter(|c| !c.is_control()).take(WORDS_CHARS_MAX).collect()
    }

    fn judge(&mut self, reply: &Reply) -> Outcome {
        let words = &reply.description;
        if reply.ok {
            return Outcome::Delivered;
        }
        if let Some(chat_id) = reply.parameters.migrate_to_chat_id {
            let advice = format!("the group has become a supergroup: set chat_id to \"{chat_id}\"");
            self.advice = Some(advice.clone());
            self.chat_id = chat_id.to_string();
            return Outcome::Failed(advice);
        }
        match reply.error_code {
            429 => {
                let wait = reply.parameters.retry_after.map_or(WAIT_UNNAMED, Duration::from_secs);
                Outcome::Later(wait, "Telegram asks to wait".to_owned())
            }
            401 | 404 => {
                // The file may hold another by the next time.
                self.token = None;
                let answer = spoken(reply.error_code, words);
                Outcome::Broken(format!("Telegram does not accept the bot token ({answer})"))
            }
            403 => Outcome::Broken(format!("the bot may not write to {} ({})", self.destination(), spoken(403, words))),
            code => Outcome::Failed(format!("Telegram answers {}", spoken(code, words))),
        }
    }

    /// After a 400, of which Telegram says only in words whether it is for the text's or the chat's sake: the text without
    /// markup, then the chat alone.
    async fn send_plain(&mut self, html: &str, why: &str) -> Outcome {
        let sent = self.call("sendMessage", &self.body(&plain(html), false)).await;
        let reply = match sent {
            Ok(reply) => reply,
            Err(outcome) => return outcome,
        };
        if reply.ok {
            self.advice = Some(format!("Telegram refuses the HTML of a template, which is sent as plain text ({why})"));
        }
        if reply.error_code != 400 {
            return self.judge(&reply);
        }
        match self.call("getChat", &json!({"chat_id": self.chat()})).await {
            Ok(chat) if chat.ok => Outcome::Refused(format!("Telegram refuses a text ({})", reply.description)),
            Ok(chat) if chat.error_code == 400 => {
                let words = &chat.description;
                Outcome::Broken(format!(
                    "Telegram does not know {}, or the bot is not in it ({words})",
                    self.destination()
                ))
            }
            Ok(chat) => self.judge(&chat),
            Err(outcome) => outcome,
        }
    }
}

/// A code, and what was said with it, if anything was.
fn spoken(code: u16, words: &str) -> String {
    format!("{code} {words}").trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_without_words_is_its_code_alone() {
        assert_eq!((spoken(500, "").as_str(), spoken(400, "Bad Request").as_str()), ("500", "400 Bad Request"));
    }
}
