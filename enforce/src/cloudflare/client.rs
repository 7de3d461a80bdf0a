//! Cloudflare's API: carries out calls, at a pace, and says what came of them.
//!
//! Tries nothing twice: what to do after a failure is up to who plans.

use std::sync::Arc;

use proto::bus::duty::Claim;
use proto::net::Target;
use proto::secret::Secret;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Method, StatusCode, Url, redirect};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::call::{Answer, Ask, Call, CallError, Cursor, Progress, Seen};
use super::metrics::CloudflareMetrics;
use super::pace::Pace;
use super::wire::{self, Envelope, ResultInfo};
use crate::config::{CloudflareConfig, CloudflareLogin, Mode, Scope, SecretError, check_sendable};

/// Entries that one page is asked for.
const PAGE: usize = 500;
/// Longest answer in bytes: a page of items takes a tenth of it.
const ANSWER_BYTES_MAX: usize = 4 << 20;
/// Longest reason that is passed on, in characters.
const REASON_CHARS_MAX: usize = 200;

/// Who we are, ready to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Login {
    headers: HeaderMap,
    secret: Secret,
}

/// There is no login.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoginError {
    #[error(transparent)]
    Secret(#[from] SecretError),
    #[error("the client is not made yet")]
    NotMade,
    #[error("cannot make an HTTP client")]
    Http(#[source] reqwest::Error),
}

impl Login {
    /// Reads it.
    pub(super) fn read(login: &CloudflareLogin) -> Result<Self, LoginError> {
        let (key, source) = match login {
            CloudflareLogin::Token(source) => ("api_token", source),
            CloudflareLogin::Key(_, source) => ("api_key", source),
        };
        let value = |text: &str| {
            let mut value = HeaderValue::try_from(text).map_err(|_| "cannot be sent as a header".to_owned())?;
            value.set_sensitive(true);
            Ok::<_, String>(value)
        };
        let make = |secret: &Secret| {
            check_sendable(secret.expose())?;
            let headers = match login {
                CloudflareLogin::Token(_) => {
                    HeaderMap::from_iter([(AUTHORIZATION, value(&format!("Bearer {}", secret.expose()))?)])
                }
                CloudflareLogin::Key(email, _) => HeaderMap::from_iter([
                    (HeaderName::from_static("x-auth-email"), value(email)?),
                    (HeaderName::from_static("x-auth-key"), value(secret.expose())?),
                ]),
            };
            Ok(Self { headers, secret: secret.clone() })
        };
        Ok(source.load_as(key, make)?)
    }
}

/// A request, before it has an address.
#[derive(Debug)]
struct Request {
    method: Method,
    path: String,
    query: Vec<(&'static str, String)>,
    body: Option<Value>,
}

impl Request {
    fn new(method: Method, path: String) -> Self {
        Self { method, path, query: Vec::new(), body: None }
    }

    fn get(path: String) -> Self {
        Self::new(Method::GET, path)
    }

    fn with(mut self, key: &'static str, value: &dyn ToString) -> Self {
        self.query.push((key, value.to_string()));
        self
    }

    fn sending(self, body: Value) -> Self {
        Self { body: Some(body), ..self }
    }
}

/// One connection to the API.
#[derive(Clone, Debug)]
pub(super) struct Client {
    http: reqwest::Client,
    base: String,
    scope: Scope,
    mode: Mode,
    login: Login,
    pace: Arc<Pace>,
    /// Under which calls may be made.
    claim: Claim,
    metrics: CloudflareMetrics,
}

impl Client {
    /// As `login`, at that pace; a call takes `call_max` at most.
    pub(super) fn new(
        config: &CloudflareConfig,
        login: Login,
        pace: Arc<Pace>,
        call_max: std::time::Duration,
        metrics: CloudflareMetrics,
    ) -> Result<Self, LoginError> {
        proto::tls::use_ring();
        let builder = reqwest::Client::builder().default_headers(login.headers.clone()).timeout(call_max);
        let builder =
            builder.redirect(redirect::Policy::none()).user_agent(concat!("portcullis/", env!("CARGO_PKG_VERSION")));
        // Without TLS it is on this host, where no proxy leads to and no authorities are needed.
        let is_plain = config.api_url.starts_with("http://");
        let builder = if is_plain { builder.no_proxy().tls_certs_only([]) } else { builder };
        let http = builder.build().map_err(LoginError::Http)?;
        let (base, scope) = (config.api_url.clone(), config.scope.clone());
        let claim = Claim::default();
        Ok(Self { http, base, scope, mode: config.mode, login, pace, claim, metrics })
    }

    /// From now on no call begins when this is not held any more.
    pub(super) fn under(self, claim: Claim) -> Self {
        Self { claim, ..self }
    }

    /// The same for other places.
    pub(super) fn at(&self, scope: Scope) -> Self {
        Self { scope, ..self.clone() }
    }

    /// Whether it goes by this login.
    pub(super) fn is_as(&self, login: &Login) -> bool {
        self.login == *login
    }

    /// Carries out a call, once the pace lets it pass.
    ///
    /// # Errors
    /// When it was not done, or may not have been.
    pub(super) async fn carry_out(&self, call: &Call) -> Result<Answer, CallError> {
        self.pace.wait(call.frees).await;
        self.carry_out_now(call).await
    }

    /// Carries out a call that the pace has let pass.
    ///
    /// # Errors
    /// When it was not done, or may not have been.
    pub(super) async fn carry_out_now(&self, call: &Call) -> Result<Answer, CallError> {
        let items = || self.items(call.list.as_deref().unwrap_or_default());
        let rules = || self.rules(call.place);
        let (get, post, delete) = (Request::get, Method::POST, Method::DELETE);
        match &call.ask {
            Ask::Look(Cursor::Page { notes, page }) => {
                let request = get(rules()).with("notes", notes).with("page", page).with("per_page", &PAGE);
                let (found, info) = self.send::<Vec<wire::Rule>>(request).await?;
                let more = info.total_pages.unwrap_or_default() > *page;
                let next = more.then(|| Cursor::Page { notes: notes.clone(), page: page + 1 });
                Ok(Answer::Page { entries: self.seen(call.place, found), next, total: info.total_count })
            }
            Ask::Look(Cursor::After(after)) => {
                let request = get(items()).with("per_page", &PAGE);
                let request = after.iter().fold(request, |request, after| request.with("cursor", after));
                let (found, info) = self.send::<Vec<wire::Item>>(request).await?;
                let after = info.cursors.and_then(|cursors| cursors.after).filter(|after| !after.is_empty());
                let next = after.map(|after| Cursor::After(Some(after)));
                Ok(Answer::Page { entries: found.into_iter().map(Into::into).collect(), next, total: None })
            }
            Ask::FindList => self.find_list().await,
            Ask::Find(target) => self.find(call, target).await,
            Ask::Create(target, note) => {
                let configuration = json!({"target": wire::target_kind(target), "value": target.to_string()});
                let body = json!({"mode": self.mode.as_str(), "configuration": configuration, "notes": note});
                let request = Request::new(post, rules()).sending(body);
                self.send::<wire::Identified>(request).await.map(|(made, _)| Answer::Made(made.id))
            }
            Ask::SetMode(id, _) => {
                let request = Request::new(Method::PATCH, format!("{}/{id}", rules()));
                self.send::<Value>(request.sending(json!({"mode": self.mode.as_str()}))).await?;
                Ok(Answer::Done)
            }
            Ask::Delete(id, _) => {
                let request = Request::new(delete, format!("{}/{id}", rules()));
                self.send::<Value>(request).await?;
                Ok(Answer::Done)
            }
            Ask::Append(new) => {
                let new: Vec<Value> =
                    new.iter().map(|(target, note)| json!({"ip": target.to_string(), "comment": note})).collect();
                self.begin(Request::new(post, items()).sending(new.into())).await
            }
            Ask::Remove(old) => {
                let old: Vec<Value> = old.iter().map(|(id, _)| json!({ "id": id })).collect();
                let request = Request::new(delete, items());
                self.begin(request.sending(json!({ "items": old }))).await
            }
            Ask::Poll(operation) => {
                let path = format!("{}/rules/lists/bulk_operations/{operation}", self.account());
                let (operation, _) = self.send::<wire::Operation>(get(path)).await?;
                Ok(Answer::Operation(match operation.into() {
                    Progress::Failed(why) => Progress::Failed(self.clean(&why)),
                    progress @ (Progress::Running | Progress::Completed) => progress,
                }))
            }
        }
    }

    /// What `path` answers; the pages are the caller's business.
    pub(super) async fn read<T: DeserializeOwned>(
        &self,
        path: String,
        query: &[(&'static str, String)],
    ) -> Result<(T, ResultInfo), CallError> {
        self.pace.wait(false).await;
        self.send(Request { query: query.to_vec(), ..Request::get(path) }).await
    }

    async fn find_list(&self) -> Result<Answer, CallError> {
        let Scope::List { list, .. } = &self.scope else { return Ok(Answer::List(None)) };
        let path = format!("{}/rules/lists", self.account());
        let (lists, _) = self.send::<Vec<wire::List>>(Request::get(path)).await?;
        let found = lists.into_iter().find(|found| found.name == *list);
        Ok(Answer::List(found.map(|found| (found.id, found.kind == "ip"))))
    }

    async fn find(&self, call: &Call, target: &Target) -> Result<Answer, CallError> {
        let found = match &call.list {
            None => {
                let request = Request::get(self.rules(call.place));
                let request = request.with("configuration.value", target).with("page", &1).with("per_page", &PAGE);
                self.seen(call.place, self.send::<Vec<wire::Rule>>(request).await?.0)
            }
            Some(list) => {
                let request = Request::get(self.items(list)).with("search", target).with("per_page", &PAGE);
                self.send::<Vec<wire::Item>>(request).await?.0.into_iter().map(Into::into).collect()
            }
        };
        Ok(Answer::Found(found))
    }

    async fn begin(&self, request: Request) -> Result<Answer, CallError> {
        self.send::<wire::Begun>(request).await.map(|(begun, _)| Answer::Begun(begun.operation_id))
    }

    fn account(&self) -> String {
        match &self.scope {
            Scope::Account(account) | Scope::List { account, .. } => format!("/accounts/{account}"),
            Scope::User | Scope::Zones(_) => "/user".to_owned(),
        }
    }

    fn rules(&self, place: usize) -> String {
        let whose = match &self.scope {
            Scope::Zones(zones) => zones.get(place).map(|zone| format!("/zones/{zone}")).unwrap_or_default(),
            Scope::User | Scope::Account(_) | Scope::List { .. } => self.account(),
        };
        format!("{whose}/firewall/access_rules/rules")
    }

    /// Access rules as that place sees them.
    fn seen(&self, place: usize, rules: Vec<wire::Rule>) -> Vec<Seen> {
        let whose = match &self.scope {
            Scope::Zones(zones) => zones.get(place).map(String::as_str),
            Scope::Account(account) | Scope::List { account, .. } => Some(account.as_str()),
            Scope::User => None,
        };
        rules.into_iter().map(|rule| rule.seen_by(whose)).collect()
    }

    fn items(&self, list: &str) -> String {
        format!("{}/rules/lists/{list}/items", self.account())
    }

    async fn send<T: DeserializeOwned>(&self, request: Request) -> Result<(T, ResultInfo), CallError> {
        if !self.claim.is_held() {
            return Err(CallError::Deposed);
        }
        let sent = self.exchange(request).await;
        self.metrics.count_call(sent.as_ref().map_or_else(CallError::outcome, |_| "done"));
        let (result, info) = sent?;
        let result = serde_json::from_value(result).map_err(|error| self.unreadable(&error))?;
        Ok((result, info))
    }

    async fn exchange(&self, request: Request) -> Result<(Value, ResultInfo), CallError> {
        let address = format!("{}{}", self.base, request.path);
        let url = match request.query.is_empty() {
            true => Url::parse(&address),
            false => Url::parse_with_params(&address, &request.query),
        };
        let url = url.map_err(|error| CallError::Transport(error.into()))?;
        let built = self.http.request(request.method, url);
        let built = request.body.iter().fold(built, |built, body| built.json(body));
        let mut response = built.send().await.map_err(transport)?;
        let status = response.status();
        let after = self.pace.learn(status, response.headers());
        if status == StatusCode::TOO_MANY_REQUESTS {
            return Err(CallError::Limited { after });
        }
        if status.is_server_error() {
            return Err(CallError::Unavailable { status: status.as_u16() });
        }
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(transport)? {
            if body.len() + chunk.len() > ANSWER_BYTES_MAX {
                return Err(CallError::TooLong);
            }
            body.extend_from_slice(&chunk);
        }
        let refused = |codes, message| CallError::Refused { status: status.as_u16(), codes, message };
        match serde_json::from_slice::<Envelope>(&body) {
            Ok(envelope) if envelope.success && status.is_success() => {
                Ok((envelope.result, envelope.result_info.unwrap_or_default()))
            }
            Ok(envelope) => {
                let reasons = envelope.errors.unwrap_or_default();
                let message = reasons.first().map(|reason| self.clean(&reason.message)).unwrap_or_default();
                Err(refused(reasons.iter().map(|reason| reason.code).collect(), message))
            }
            Err(error) if status.is_success() => Err(self.unreadable(&error)),
            Err(_) => Err(refused(Vec::new(), String::new())),
        }
    }

    /// The reason may quote what came.
    fn unreadable(&self, error: &serde_json::Error) -> CallError {
        CallError::Unreadable(self.clean(&error.to_string()).into())
    }

    /// A text of theirs, as it may be shown: short, printable, and without what must not be seen.
    fn clean(&self, text: &str) -> String {
        let hidden = text.replace(self.login.secret.expose(), "[hidden]");
        let printable = hidden.chars().map(|c| if c.is_control() { ' ' } else { c });
        printable.take(REASON_CHARS_MAX).collect()
    }
}

fn transport(error: reqwest::Error) -> CallError {
    // The address is known, and says nothing of the reason.
    let error = error.without_url();
    if error.is_timeout() { CallError::Timeout } else { CallError::Transport(error.into()) }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::TcpListener;
    use std::time::Duration;

    use proto::time::Clock;

    use super::*;
    use crate::cloudflare::mirror::Form;
    use crate::cloudflare::mirror::sim;
    use crate::cloudflare::status::chain;

    #[tokio::test]
    async fn an_odd_answer_is_told_of_in_few_words_and_without_the_secret() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let api_url = format!("http://{}", listener.local_addr().unwrap());
        let odd = format!("s3cret {}", "x".repeat(1 << 20));
        let bodies = [json!({"success": true, "result": odd}), json!({"success": odd}), json!([odd])];
        let told: Vec<String> = bodies.iter().map(Value::to_string).collect();
        let server = std::thread::spawn(move || {
            for body in told {
                let (mut stream, _) = listener.accept().unwrap();
                let _request = stream.read(&mut [0; 4096]).unwrap();
                let head = format!("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", body.len());
                stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
            }
        });
        let config = CloudflareConfig {
            login: CloudflareLogin::Token(crate::config::SecretSource::Given(Secret::new("s3cret"))),
            api_url,
            ..sim::config(Form::Rules, 10)
        };
        let pace = Arc::new(Pace::new(1000, Duration::from_secs(300), Clock::system()));
        let login = Login::read(&config.login).unwrap();
        let client = Client::new(&config, login, pace, Duration::from_secs(30), CloudflareMetrics::default()).unwrap();
        let ask = Ask::Look(Cursor::Page { notes: String::new(), page: 1 });
        for _ in &bodies {
            let call = Call { place: 0, list: None, ask: ask.clone(), frees: false };
            let text = chain(&client.carry_out(&call).await.unwrap_err());
            assert!(text.starts_with("Cloudflare's answer is not readable") && text.len() < 400, "{}", text.len());
            assert!(!text.contains("s3cret"), "{text}");
        }
        server.join().unwrap();
    }
}
