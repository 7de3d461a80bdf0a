//! The way to a running Portcullis: its socket on this host, or its address on another with a token.
//!
//! A token comes from a file or a variable, never from the command line, where everybody on the host sees it. It is sent
//! over TLS or loopback only, straight to where the address says: through no proxy, and after no redirect.

use std::error::Error;
use std::fmt;
use std::io::{self, ErrorKind};
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};
use nix::unistd::{Gid, Group};
use proto::api::{TOKEN_BYTES_MAX, TOKEN_BYTES_MIN};
use proto::secret::{self, Secret};
pub(crate) use proto::tls::use_ring;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use reqwest::{Certificate, ClientBuilder, Url, redirect};
use tokio_rustls::rustls::{self, CertificateError};

use crate::args::ClientArgs;
use crate::socket;
use crate::verb::Misuse;

/// The variable that holds an address in place of `--url`.
const URL_VARIABLE: &str = "PORTCULLIS_URL";
/// The variable that holds a token in place of `--token-file`.
const TOKEN_VARIABLE: &str = "PORTCULLIS_TOKEN";
/// Longest token file in bytes: a token and the white space around it.
const TOKEN_FILE_BYTES_MAX: u64 = 4096;
/// The group that may use the system's socket, for the error text where the socket itself cannot be looked at.
const GROUP: &str = "portcullis";

/// How to reach it.
#[derive(Clone, Debug)]
pub enum Way {
    /// By the socket on this host.
    Socket(PathBuf),
    /// By an address.
    Url(Remote),
}

/// An address, and what it takes to be let in.
#[derive(Clone, Debug)]
pub struct Remote {
    /// Without a slash at the end.
    base: String,
    token: Secret,
    ca_file: Option<PathBuf>,
}

impl Way {
    /// What was typed, else what the variables say, else the socket of this host.
    ///
    /// # Errors
    /// [`Misuse`] when the address or the token cannot be right, or there is no token.
    pub fn find(args: &ClientArgs, variable: impl Fn(&str) -> Option<String>) -> anyhow::Result<Self> {
        if let Some(path) = &args.socket {
            return Ok(Self::Socket(path.clone()));
        }
        let variable = |name| variable(name).filter(|text| !text.is_empty());
        let Some(url) = args.url.clone().or_else(|| variable(URL_VARIABLE)) else {
            if args.token_file.is_some() || args.ca_file.is_some() {
                return Err(misuse(format!("--token-file and --ca-file are for --url or {URL_VARIABLE}")));
            }
            return Ok(Self::Socket(socket::find()));
        };
        let base = check_url(&url)?;
        let token = match (&args.token_file, variable(TOKEN_VARIABLE)) {
            (Some(path), _) => check_token(&secret::read_file(path, TOKEN_FILE_BYTES_MAX)?)
                .with_context(|| format!("cannot use {}", path.display()))?,
            (None, Some(token)) => {
                check_token(&Secret::new(token)).with_context(|| format!("cannot use {TOKEN_VARIABLE}"))?
            }
            (None, None) => {
                let text = format!("{base} asks for a token: name its file with --token-file, or set {TOKEN_VARIABLE}");
                return Err(misuse(text));
            }
        };
        Ok(Self::Url(Remote { base, token, ca_file: args.ca_file.clone() }))
    }

    /// The address of a path of the API.
    pub(super) fn address(&self, path: &str) -> String {
        match self {
            Self::Socket(_) => format!("http://portcullis{path}"),
            Self::Url(remote) => format!("{}{path}", remote.base),
        }
    }

    /// An HTTP client that goes this way.
    pub(super) fn http(&self) -> anyhow::Result<reqwest::Client> {
        use_ring();
        let builder = reqwest::Client::builder().no_proxy().redirect(redirect::Policy::none());
        let builder = match self {
            // Without authorities, as nothing here speaks TLS: a host need not have any.
            Self::Socket(path) => builder.unix_socket(path.as_path()).tls_certs_only([]),
            Self::Url(remote) => remote.set_up(builder)?,
        };
        builder.build().context("cannot make an HTTP client")
    }

    /// Turns a failure into what a person can act on.
    pub(super) fn explain_failure(&self, error: reqwest::Error) -> anyhow::Error {
        match self {
            Self::Socket(path) => explain_socket(path, error),
            Self::Url(remote) => remote.explain(error),
        }
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket(path) => write!(f, "{}", path.display()),
            Self::Url(remote) => f.write_str(&remote.base),
        }
    }
}

impl Remote {
    fn set_up(&self, builder: ClientBuilder) -> anyhow::Result<ClientBuilder> {
        let mut value = HeaderValue::try_from(format!("Bearer {}", self.token.expose())).context("bad token")?;
        value.set_sensitive(true);
        let builder = builder.default_headers(HeaderMap::from_iter([(AUTHORIZATION, value)]));
        match &self.ca_file {
            Some(path) => Ok(builder.tls_certs_only(read_authorities(path)?)),
            None if self.base.starts_with("http:") => Ok(builder.tls_certs_only([])),
            None => Ok(builder),
        }
    }

    fn explain(&self, error: reqwest::Error) -> anyhow::Error {
        let url = &self.base;
        match find_cause::<rustls::Error>(&error) {
            Some(rustls::Error::InvalidCertificate(reason)) => {
                return anyhow!("the certificate of {url} is not trusted: {}", explain_certificate(reason));
            }
            Some(rustls::Error::InvalidMessage(_)) => return anyhow!("{url} does not speak TLS"),
            _ => {}
        }
        if error.is_connect() {
            return match find_cause::<io::Error>(&error).map(io::Error::kind) {
                Some(ErrorKind::ConnectionRefused) => anyhow!("nobody listens at {url}"),
                _ => anyhow::Error::new(error.without_url()).context(format!("cannot connect to {url}")),
            };
        }
        let hint = if url.starts_with("http:") { "; if it speaks TLS, its address begins with https://" } else { "" };
        anyhow::Error::new(error.without_url()).context(format!("cannot read the answer from {url}{hint}"))
    }
}

fn misuse(text: String) -> anyhow::Error {
    Misuse(text).into()
}

/// `https://HOST[:PORT]`, or `http://` on loopback; nothing after it.
fn check_url(text: &str) -> anyhow::Result<String> {
    let expected = || misuse(format!("expected an address such as https://detect-1.example:9478, got {text:?}"));
    let url = Url::parse(text).map_err(|_| expected())?;
    let host = url.host_str().ok_or_else(expected)?;
    // Credentials in it would be shown with it.
    let plain = url.username().is_empty() && url.password().is_none();
    if !plain || url.path() != "/" || url.query().is_some() || url.fragment().is_some() {
        return Err(misuse("expected an address of a host and a port only, without a name or a path".to_owned()));
    }
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let is_loopback = bare == "localhost" || bare.parse().is_ok_and(|ip: IpAddr| ip.to_canonical().is_loopback());
    match url.scheme() {
        "https" => {}
        "http" if is_loopback => {}
        "http" => {
            return Err(misuse(format!(
                "http:// is for loopback only, the token must not travel in the clear: use https://{host}"
            )));
        }
        _ => return Err(expected()),
    }
    Ok(url.as_str().trim_end_matches('/').to_owned())
}

fn check_token(text: &Secret) -> anyhow::Result<Secret> {
    let token = text.expose().trim();
    if !(TOKEN_BYTES_MIN..=TOKEN_BYTES_MAX).contains(&token.len()) || !token.bytes().all(|byte| byte.is_ascii_graphic())
    {
        let text = format!("expected a token of {TOKEN_BYTES_MIN} to {TOKEN_BYTES_MAX} characters without spaces");
        return Err(misuse(text));
    }
    Ok(Secret::new(token))
}

fn read_authorities(path: &Path) -> anyhow::Result<Vec<Certificate>> {
    let pem = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let authorities = Certificate::from_pem_bundle(&pem)
        .with_context(|| format!("cannot read certificates from {}", path.display()))?;
    if authorities.is_empty() {
        bail!("{} holds no certificate", path.display());
    }
    Ok(authorities)
}

fn explain_certificate(reason: &CertificateError) -> String {
    match reason {
        CertificateError::UnknownIssuer => {
            "its authority is not known here; name the authority's certificate with --ca-file".to_owned()
        }
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            "it is another host's; use a name or address that it was made for".to_owned()
        }
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => "it has ended".to_owned(),
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "it has not begun; is the clock right?".to_owned()
        }
        CertificateError::Other(cause) => cause.0.to_string(),
        other => other.to_string(),
    }
}

fn explain_socket(path: &Path, error: reqwest::Error) -> anyhow::Error {
    let socket = path.display();
    if !error.is_connect() {
        return anyhow::Error::new(error).context(format!("cannot read the answer from {socket}"));
    }
    match find_cause::<io::Error>(&error).map(io::Error::kind) {
        Some(ErrorKind::NotFound) => anyhow!("portcullis does not run here (no socket at {socket})"),
        Some(ErrorKind::ConnectionRefused) => anyhow!("portcullis does not run here (nobody listens at {socket})"),
        Some(ErrorKind::PermissionDenied) => {
            anyhow!("no permission to use {socket}: only root and the group `{}` may", group_of(path))
        }
        _ => anyhow::Error::new(error).context(format!("cannot connect to {socket}")),
    }
}

/// The group of the socket, or the usual one where even that cannot be seen.
fn group_of(path: &Path) -> String {
    let gid = std::fs::metadata(path).ok().map(|meta| meta.gid());
    let group = gid.and_then(|gid| Group::from_gid(Gid::from_raw(gid)).ok().flatten());
    group.map_or_else(|| GROUP.to_owned(), |group| group.name)
}

/// The error of type `T` that a failure rests on.
fn find_cause<T: Error + 'static>(error: &reqwest::Error) -> Option<&T> {
    let mut cause: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(found) = error.downcast_ref::<T>() {
            return Some(found);
        }
        // An I/O error steps over what it wraps in its own `source`.
        let wrapped = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        cause = wrapped.map(|inner| inner as &(dyn Error + 'static)).or_else(|| error.source());
    }
    None
}

#[cfg(test)]
mod tests {
    use std::fs::{Permissions, set_permissions, write};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const TOKEN: &str = "0123456789abcdef0123456789abcdef";

    fn find(args: &ClientArgs, variables: &[(&str, &str)]) -> anyhow::Result<Way> {
        let variable = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, text)| (*text).to_owned());
        Way::find(args, variable)
    }

    fn url(url: &str) -> ClientArgs {
        ClientArgs { url: Some(url.to_owned()), ..ClientArgs::default() }
    }

    #[test]
    fn what_is_typed_goes_before_what_the_variables_say() {
        let variables = [(URL_VARIABLE, "https://b.example:9478"), (TOKEN_VARIABLE, TOKEN)];
        let socket = ClientArgs { socket: Some("/x/api.sock".into()), ..ClientArgs::default() };
        assert_eq!(find(&socket, &variables).unwrap().to_string(), "/x/api.sock");
        let way = find(&ClientArgs::default(), &variables).unwrap();
        assert_eq!(way.address("/v1/bans"), "https://b.example:9478/v1/bans");
        let way = find(&url("https://a.example/"), &variables).unwrap();
        assert_eq!(way.to_string(), "https://a.example");
        assert!(!format!("{way:?}").contains(TOKEN), "{way:?}");
        // A variable that is set to nothing is not set.
        assert!(matches!(find(&ClientArgs::default(), &[(URL_VARIABLE, "")]).unwrap(), Way::Socket(_)));
    }

    #[test]
    fn an_address_that_gives_the_token_away_is_refused() {
        for (address, good) in [
            ("https://[2001:db8::1]:9478", true),
            ("http://127.0.0.1:9478", true),
            ("http://[::1]:9478", true),
            ("http://localhost:9478", true),
            ("http://10.0.0.6:9478", false),
            ("http://127.0.0.1.example:9478", false),
            ("ftp://127.0.0.1", false),
            ("https://user:word@a.example", false),
            ("https://a.example/v1", false),
            ("https://a.example/?x", false),
            ("a.example:9478", false),
            ("10.0.0.6:9478", false),
        ] {
            let found = find(&url(address), &[(TOKEN_VARIABLE, TOKEN)]);
            assert_eq!(found.is_ok(), good, "{address}: {found:?}");
            if let Err(error) = found {
                assert!(error.is::<Misuse>() && !error.to_string().contains("word"), "{error}");
            }
        }
    }

    #[test]
    fn a_token_comes_from_a_closed_file_or_a_variable_and_is_long() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        let by_file = || ClientArgs { token_file: Some(path.clone()), ..url("https://a.example") };
        write(&path, format!("{TOKEN}\n")).unwrap();
        set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        let error = find(&by_file(), &[]).unwrap_err().to_string();
        assert!(error.contains("is open to others"), "{error}");
        set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        let Way::Url(remote) = find(&by_file(), &[(TOKEN_VARIABLE, "short")]).unwrap() else {
            panic!("not by address")
        };
        assert_eq!(remote.token.expose(), TOKEN, "white space around it is not of it");
        for token in ["hunter2", "0123456789abcdef 0123456789abcdef", ""] {
            let error = find(&url("https://a.example"), &[(TOKEN_VARIABLE, token)]).unwrap_err();
            assert!(error.is::<Misuse>() && !format!("{error:#}").contains("hunter2"), "{error:#}");
        }
        let lonely = ClientArgs { token_file: Some(path.clone()), ..ClientArgs::default() };
        assert!(find(&lonely, &[]).unwrap_err().is::<Misuse>());
    }
}
