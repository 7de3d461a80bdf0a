//! One request to a service outside, and its answer, within limits. Addresses may hold secrets: no error shows one.

use std::time::Duration;

use reqwest::header::RETRY_AFTER;
use reqwest::{RequestBuilder, StatusCode, Url, redirect};
use tokio_rustls::rustls::crypto::ring;

use crate::reconcile::chain_of;

/// Longest answer that is read, in bytes. What is longer is cut.
const ANSWER_BYTES_MAX: usize = 64 << 10;

/// An answer.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    /// How long the server asks us to wait.
    pub(crate) retry_after: Option<Duration>,
    pub(crate) body: Vec<u8>,
}

/// A client for `url`.
///
/// # Errors
/// When the host has no certificate authorities, in words.
pub(crate) fn client(url: &Url, timeout: Duration) -> Result<reqwest::Client, String> {
    // Doing it again changes nothing.
    let _already = ring::default_provider().install_default();
    let builder = reqwest::Client::builder()
        .redirect(redirect::Policy::none())
        .timeout(timeout)
        .user_agent(concat!("portcullis/", env!("CARGO_PKG_VERSION")));
    // Who speaks no TLS needs no authorities.
    let builder = if url.scheme() == "http" { builder.tls_certs_only([]) } else { builder };
    builder.build().map_err(|error| format!("cannot make an HTTP client: {}", chain_of(&error.without_url())))
}

/// Sends a request and reads the answer.
///
/// # Errors
/// When there is none, in words without an address.
pub(crate) async fn ask(request: RequestBuilder) -> Result<Answer, String> {
    let failed = |error: reqwest::Error| chain_of(&error.without_url());
    let mut response = request.send().await.map_err(failed)?;
    let status = response.status();
    let retry_after = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok());
    // In seconds; some write fractions. The form with a date is left to our own waits.
    let retry_after = retry_after.and_then(|text| text.trim().parse::<f64>().ok());
    let retry_after = retry_after.and_then(|secs| Duration::try_from_secs_f64(secs).ok());
    let mut body = Vec::new();
    while body.len() < ANSWER_BYTES_MAX
        && let Some(chunk) = response.chunk().await.map_err(failed)?
    {
        body.extend_from_slice(&chunk);
    }
    Ok(Answer { status, retry_after, body })
}

/// Scheme, host and port of an address, for people; the rest may be secret.
pub(crate) fn shown(url: &Url) -> String {
    let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
    format!("{}://{}{port}/...", url.scheme(), url.host_str().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn no_error_shows_an_address() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let url = Url::parse(&format!("http://user:hunter2@127.0.0.1:{port}/s3cret?key=s3cret")).unwrap();
        let client = client(&url, Duration::from_secs(5)).unwrap();
        let error = ask(client.post(url.clone())).await.unwrap_err();
        assert!(error.contains("refused") && !error.contains("s3cret") && !error.contains("hunter2"), "{error}");
        assert_eq!(shown(&url), format!("http://127.0.0.1:{port}/..."));
    }
}
