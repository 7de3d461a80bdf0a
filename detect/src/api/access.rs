//! Who may ask what over TCP: bearer tokens, and a limit on failing with them.
//!
//! A right token always gets in. Who shares an address with somebody that guesses is not locked out, and there is no
//! guessing a token of 128 bits; what the limit holds down is work, log lines and connections. A failure ends its
//! connection. Peers are IPv4 addresses and IPv6 networks of 64 bits, and the memory for them is bounded.

use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use proto::limit::{Limit, PeerLimit, Quota};
use proto::time::Clock;
use tokio::sync::watch;

use super::Refused;
use super::metrics::{Metrics, Refusal};
use super::tcp::Secrets;
use super::tokens::{Hash, Holder, Scope};

/// Failures that a peer has at once, and how long it takes to get one back.
const FAILURES_BURST: NonZeroU32 = NonZeroU32::new(10).expect("above zero");
const FAILURE_PERIOD: Duration = Duration::from_secs(6);
/// Refusals logged at once, and how often another one, over all peers. Metrics count all.
const LOGGED_BURST: NonZeroU32 = NonZeroU32::new(20).expect("above zero");
const LOGGED_PERIOD: Duration = Duration::from_secs(3);
/// How long a request may take from its head to the head of its answer. Slower than the slowest handler, which waits
/// three times for others.
const REQUEST_MAX: Duration = Duration::from_secs(15);

/// What all connections share: failures by peer, and what is logged of them.
#[derive(Debug)]
pub(super) struct Failures {
    by_peer: PeerLimit,
    logged: Limit,
    unlogged: AtomicU64,
    metrics: Metrics,
}

impl Failures {
    /// None so far.
    pub(super) fn new(clock: Clock, metrics: Metrics) -> Self {
        let quota =
            |period, burst| Quota::with_period(period).unwrap_or(Quota::per_second(NonZeroU32::MIN)).allow_burst(burst);
        Self {
            by_peer: PeerLimit::new(quota(FAILURE_PERIOD, FAILURES_BURST), clock.clone()),
            logged: Limit::new(quota(LOGGED_PERIOD, LOGGED_BURST), clock),
            unlogged: AtomicU64::new(0),
            metrics,
        }
    }

    /// Notes a failure; an error says how long until the peer may fail again.
    fn note(&self, peer: IpAddr) -> Result<(), Duration> {
        self.by_peer.check(peer, NonZeroU32::MIN)
    }

    /// Counts a refusal, and logs it while there are few.
    pub(super) fn refuse(&self, peer: IpAddr, reason: Refusal) {
        self.metrics.refused(reason);
        if self.logged.check(NonZeroU32::MIN).is_err() {
            self.unlogged.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let unlogged = self.unlogged.swap(0, Ordering::Relaxed);
        tracing::warn!(%peer, reason = reason.as_str(), unlogged, "Operator API refused a peer");
    }
}

/// What one connection is checked against.
#[derive(Debug)]
pub(super) struct Guard {
    peer: SocketAddr,
    secrets: watch::Receiver<Secrets>,
    failures: Arc<Failures>,
    /// The token that the connection last came with, and what for.
    last: Mutex<Option<(Hash, Scope)>>,
}

impl Guard {
    /// Of a new connection.
    pub(super) fn new(peer: SocketAddr, secrets: watch::Receiver<Secrets>, failures: Arc<Failures>) -> Self {
        Self { peer, secrets, failures, last: Mutex::new(None) }
    }

    /// Returns when the token that the connection came with is no longer good for what it was used for: an endless
    /// answer must not outlive it.
    pub(super) async fn revoked(&self) {
        let mut secrets = self.secrets.clone();
        // Without a sender there is no reload any more.
        while secrets.changed().await.is_ok() {
            let Some((hash, needed)) = *self.last.lock().unwrap_or_else(PoisonError::into_inner) else { continue };
            let holder = secrets.borrow_and_update().tokens.find(&hash).map(|holder| holder.scope);
            if holder.is_none_or(|scope| scope < needed) {
                return;
            }
        }
        std::future::pending::<()>().await;
    }

    fn admit(&self, headers: &HeaderMap, needed: Scope) -> Result<Holder, Denied> {
        let token = bearer(headers).ok_or(Denied::NoToken)?;
        let hash = Hash::of(token);
        // First of all, so that a reload from now on finds it.
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = hash.map(|hash| (hash, needed));
        let tokens = Arc::clone(&self.secrets.borrow().tokens);
        let holder = hash.and_then(|hash| tokens.find(&hash).cloned()).ok_or(Denied::UnknownToken)?;
        if holder.scope < needed { Err(Denied::Scope(holder, needed)) } else { Ok(holder) }
    }

    /// Notes the denial and says it.
    fn deny(&self, denied: &Denied) -> Response {
        let peer = self.peer.ip();
        let (reason, text) = match denied {
            Denied::NoToken => (Refusal::NoToken, "this needs a token: `Authorization: Bearer TOKEN`"),
            Denied::UnknownToken => (Refusal::UnknownToken, "nobody has this token"),
            Denied::Scope(holder, needed) => {
                self.failures.refuse(peer, Refusal::Scope);
                return out_of_scope(holder, *needed);
            }
        };
        let close = (header::CONNECTION, HeaderValue::from_static("close"));
        if let Err(wait) = self.failures.note(peer) {
            self.failures.refuse(peer, Refusal::TooMany);
            let seconds = wait.as_secs() + 1;
            let text = format!("{text}; too many failures from {peer}, wait {seconds}s");
            let headers = [(header::RETRY_AFTER, HeaderValue::from(seconds)), close];
            return (headers, Refused(StatusCode::TOO_MANY_REQUESTS, text)).into_response();
        }
        self.failures.refuse(peer, reason);
        let challenge = match denied {
            Denied::NoToken => "Bearer realm=\"portcullis\"",
            _ => "Bearer realm=\"portcullis\", error=\"invalid_token\"",
        };
        let headers = [(header::WWW_AUTHENTICATE, HeaderValue::from_static(challenge)), close];
        (headers, Refused(StatusCode::UNAUTHORIZED, text.to_owned())).into_response()
    }
}

/// Why a request is not let through.
enum Denied {
    NoToken,
    UnknownToken,
    Scope(Holder, Scope),
}

fn out_of_scope(holder: &Holder, needed: Scope) -> Response {
    let (name, has, needed) = (&holder.name, holder.scope.as_str(), needed.as_str());
    let challenge = format!("Bearer realm=\"portcullis\", error=\"insufficient_scope\", scope=\"{needed}\"");
    let text = format!("the token {name} has the scope `{has}`, this needs `{needed}`");
    ([(header::WWW_AUTHENTICATE, challenge)], Refused(StatusCode::FORBIDDEN, text)).into_response()
}

/// The token of `Authorization: Bearer TOKEN` (RFC 6750); the scheme's case does not matter.
fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let (scheme, token) = headers.get(header::AUTHORIZATION)?.as_bytes().split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| token.trim_ascii())
}

/// Lets a request through to the API, if its token may do what it asks.
pub(super) async fn check_token(State(guard): State<Arc<Guard>>, request: Request, next: Next) -> Response {
    let needed = Scope::needed(request.method());
    let holder = match guard.admit(request.headers(), needed) {
        Ok(holder) => holder,
        Err(denied) => return guard.deny(&denied),
    };
    if needed == Scope::Write {
        let (peer, path) = (guard.peer, request.uri().path());
        tracing::info!(token = &*holder.name, %peer, path, "Operator order");
    }
    let Ok(answer) = tokio::time::timeout(REQUEST_MAX, next.run(request)).await else {
        guard.failures.refuse(guard.peer.ip(), Refusal::Late);
        let close = [(header::CONNECTION, HeaderValue::from_static("close"))];
        let text = "the request took too long to arrive or to be answered".to_owned();
        return (close, Refused(StatusCode::REQUEST_TIMEOUT, text)).into_response();
    };
    answer
}

#[cfg(test)]
mod tests {
    use proto::time::Timestamp;

    use super::*;

    fn failures(clock: &Clock) -> Failures {
        Failures::new(clock.clone(), Metrics::default())
    }

    #[test]
    fn a_peer_may_fail_again_after_a_while_and_others_meanwhile() {
        let clock = Clock::manual(Timestamp::from_secs(1_767_881_955));
        let failures = failures(&clock);
        let (peer, other) = (IpAddr::from([192, 0, 2, 1]), IpAddr::from([192, 0, 2, 2]));
        for _ in 0..FAILURES_BURST.get() {
            failures.note(peer).unwrap();
        }
        assert_eq!(failures.note(peer).unwrap_err(), FAILURE_PERIOD);
        failures.note(other).unwrap();
        clock.set(clock.now().saturating_add(FAILURE_PERIOD));
        failures.note(peer).unwrap();
        failures.note(peer).unwrap_err();
    }

    #[test]
    fn a_token_is_read_from_its_header_only() {
        let with =
            |value: &'static str| HeaderMap::from_iter([(header::AUTHORIZATION, HeaderValue::from_static(value))]);
        for (value, token) in [
            ("Bearer abc", Some("abc")),
            ("bearer  abc ", Some("abc")),
            ("Basic abc", None),
            ("Bearerabc", None),
            ("Bearer", None),
        ] {
            assert_eq!(bearer(&with(value)), token.map(str::as_bytes), "{value}");
        }
        assert_eq!(bearer(&HeaderMap::new()), None);
    }
}
