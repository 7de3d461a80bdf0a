//! Webhooks: one request a message, with the CloudEvent itself or a body of the user's own, signed if wanted.

use std::fmt::Write as _;
use std::time::Duration;

use proto::secret::Secret;
use proto::time::{Clock, Timestamp};
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue};
use reqwest::{StatusCode, Url};
use ring::hmac;

use crate::config::{SecretError, WebhookConfig};
use crate::notify::http;
use crate::notify::message::Message;
use crate::notify::queue::Outcome;
use crate::notify::text::{cut_html, defaults, html, plain};

/// The header of the signature: `t=SECONDS,v1=HEX`, of which HEX is the HMAC-SHA256 of `SECONDS.BODY`.
pub(crate) const SIGNATURE: &str = "x-portcullis-signature";
/// Longest `{text}`, in UTF-16 units: Discord takes 2,000 as content, and Slack 3,000 in a block.
const TEXT_UNITS_MAX: usize = 1800;
/// Wait where the server asks for one and does not say how long.
const WAIT_UNNAMED: Duration = Duration::from_secs(30);

/// One webhook.
#[derive(Debug)]
pub(crate) struct Webhook {
    config: WebhookConfig,
    clock: Clock,
    ready: Option<Ready>,
}

/// What is read from files at first use.
#[derive(Debug)]
struct Ready {
    url: Url,
    headers: HeaderMap,
    secret: Option<Secret>,
    http: reqwest::Client,
}

impl Webhook {
    pub(crate) fn new(config: WebhookConfig, clock: Clock) -> Self {
        Self { config, clock, ready: None }
    }

    /// Where messages go, for people: without what may be secret.
    pub(crate) fn destination(&self) -> String {
        let url = self.ready.as_ref().map_or_else(|| self.config.load_url(), |ready| Ok(ready.url.clone()));
        url.map_or_else(|_| "no address yet".to_owned(), |url| http::shown(&url))
    }

    /// The body as it would be sent.
    pub(crate) fn render(&self, message: &Message) -> String {
        let Some(body) = &self.config.body else { return message.cloud_event().to_string() };
        let mut values = message.values(&self.config.look_up);
        let text = plain(&cut_html(&html(&defaults(), message, &values), TEXT_UNITS_MAX));
        values.insert("text", text);
        body.render(&values, self.config.escape)
    }

    /// Sends one message.
    pub(crate) async fn send(&mut self, message: &Message) -> Outcome {
        if let Err(why) = self.make_ready() {
            return Outcome::Broken(why);
        }
        let Some(ready) = &self.ready else { return Outcome::Failed(String::new()) };
        let (url, mut headers) = (ready.url.clone(), ready.headers.clone());
        let (secret, client) = (ready.secret.clone(), ready.http.clone());
        let body = self.render(message);
        if let Some(secret) = secret {
            let signature = sign(&secret, self.clock.now(), body.as_bytes());
            headers.insert(SIGNATURE, HeaderValue::from_str(&signature).unwrap_or(HeaderValue::from_static("")));
        }
        let request = client.request(self.config.method.clone(), url).headers(headers).body(body);
        match http::ask(request).await {
            Ok(answer) => self.judge(answer.status, answer.retry_after),
            Err(why) => Outcome::Failed(format!("no answer from {}: {why}", self.destination())),
        }
    }

    /// Reads what a message needs, unless that was done.
    pub(crate) fn make_ready(&mut self) -> Result<(), String> {
        if self.ready.is_none() {
            self.ready = Some(self.read()?);
        }
        Ok(())
    }

    fn read(&self) -> Result<Ready, String> {
        let config = &self.config;
        let told = |error: SecretError| error.to_string();
        let url = config.load_url().map_err(told)?;
        let mut headers = config.headers.clone();
        let content_type = HeaderValue::from_str(&config.content_type).map_err(|error| error.to_string())?;
        headers.insert(CONTENT_TYPE, content_type);
        if let Some(bearer) = config.load_bearer().map_err(told)? {
            headers.insert(AUTHORIZATION, bearer);
        }
        let secret = config.load_secret().map_err(told)?;
        let http = http::client(&url, config.timeout)?;
        Ok(Ready { url, headers, secret, http })
    }

    fn judge(&mut self, status: StatusCode, retry_after: Option<Duration>) -> Outcome {
        let answers = format!("{} answers {}", self.destination(), status.as_u16());
        if status.is_success() {
            return Outcome::Delivered;
        }
        let may_pass = status.is_server_error() || status == StatusCode::REQUEST_TIMEOUT;
        match (status, retry_after) {
            (StatusCode::TOO_MANY_REQUESTS, wait) => Outcome::Later(wait.unwrap_or(WAIT_UNNAMED), answers),
            (_, Some(wait)) if may_pass => Outcome::Later(wait, answers),
            (_, None) if may_pass => Outcome::Failed(answers),
            _ if status.is_redirection() => Outcome::Refused(format!("{answers}: redirects are not followed")),
            _ => {
                // Files may hold something better by the next time.
                self.ready = None;
                Outcome::Refused(answers)
            }
        }
    }
}

/// The address of a webhook.
///
/// # Errors
/// What is wrong with it, without showing it.
pub(crate) fn parse_url(text: &str) -> Result<Url, String> {
    let url = Url::parse(text.trim()).ok().filter(|url| matches!(url.scheme(), "http" | "https"));
    url.filter(|url| url.host_str().is_some_and(|host| !host.is_empty()))
        .ok_or_else(|| "expected an address that begins with http:// or https://".to_owned())
}

/// The signature of `body`, sent at `now`.
fn sign(secret: &Secret, now: Timestamp, body: &[u8]) -> String {
    let seconds = now.as_millis() / 1000;
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret.expose().as_bytes());
    let mut context = hmac::Context::with_key(&key);
    context.update(format!("{seconds}.").as_bytes());
    context.update(body);
    let mut signature = format!("t={seconds},v1=");
    for byte in context.sign().as_ref() {
        // Writing to a String cannot fail.
        let _written = write!(signature, "{byte:02x}");
    }
    signature
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_is_what_others_compute() {
        // printf '1700000000.{"a":1}' | openssl dgst -sha256 -hmac key
        let signature = sign(&Secret::new("key"), Timestamp::from_secs(1_700_000_000), br#"{"a":1}"#);
        assert_eq!(signature, "t=1700000000,v1=a438e398bfafc57e4396bb7fc2304422f0f768e965d073ca313cb52e22e6ad03");
    }

    #[test]
    fn an_address_that_is_none_is_not_shown() {
        for text in ["", "ftp://x/s3cret", "https://", "s3cret"] {
            let error = parse_url(text).unwrap_err();
            assert!(!error.contains("s3cret"), "{error}");
        }
        assert_eq!(parse_url(" https://x/y\n").unwrap().as_str(), "https://x/y");
    }
}
