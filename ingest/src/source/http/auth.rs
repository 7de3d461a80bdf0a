//! Who may send: bearer tokens and users with passwords, from files that are closed to others.
//!
//! What a sender shows is hashed and compared with all hashes in constant time. Secrets are kept as hashes only, and neither
//! they nor what was shown stand in any text.

use std::fmt;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig};
use proto::secret::{self, SecretFileError};
use ring::digest::{SHA256, SHA256_OUTPUT_LEN, digest};
use subtle::{Choice, ConstantTimeEq};

/// Longest file of secrets in bytes.
const FILE_BYTES_MAX: u64 = 256 << 10;
/// Secrets in one file: each request is compared with all of them.
const SECRETS_MAX: usize = 1000;
/// Shortest token in bytes: 128 bits in hexadecimal digits have 32, in base64 22.
const TOKEN_BYTES_MIN: usize = 16;
/// Shortest password in bytes.
const PASSWORD_BYTES_MIN: usize = 8;
/// What Basic's credentials are written in, with or without padding.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &base64::alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Files with secrets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AuthFiles {
    /// One token a line.
    pub tokens_file: Option<PathBuf>,
    /// One `user:password` a line.
    pub users_file: Option<PathBuf>,
}

impl AuthFiles {
    /// Whether senders must show something.
    pub fn is_given(&self) -> bool {
        self.tokens_file.is_some() || self.users_file.is_some()
    }
}

/// A file of secrets cannot be used. Never shows what stands in it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AuthError {
    /// It cannot be read, or others may.
    #[error(transparent)]
    File(#[from] SecretFileError),
    /// Lines that are no secrets.
    #[error("{}: {mistake}", .path.display())]
    Line { path: PathBuf, mistake: String },
}

#[derive(Clone, Copy)]
struct Hash([u8; SHA256_OUTPUT_LEN]);

impl Hash {
    fn of(secret: &[u8]) -> Option<Self> {
        digest(&SHA256, secret).as_ref().try_into().ok().map(Self)
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hash(..)")
    }
}

/// Who may send.
#[derive(Debug, Default)]
pub(crate) struct Logins {
    /// `None` = tokens are not asked for.
    tokens: Option<Vec<Hash>>,
    users: Option<Vec<Hash>>,
}

impl Logins {
    /// Reads the files.
    ///
    /// # Errors
    /// When one cannot be read, is open to others or holds a line that is no secret.
    pub(crate) fn load(files: &AuthFiles) -> Result<Self, AuthError> {
        let read = |path: &Option<PathBuf>, check: fn(&str) -> Result<(), &'static str>| {
            path.as_ref().map(|path| read(path, check)).transpose()
        };
        Ok(Self { tokens: read(&files.tokens_file, check_token)?, users: read(&files.users_file, check_user)? })
    }

    /// Whether a request with this `Authorization` may send.
    pub(crate) fn admit(&self, authorization: Option<&[u8]>) -> bool {
        if self.tokens.is_none() && self.users.is_none() {
            return true;
        }
        let Some((scheme, shown)) = authorization.and_then(|value| value.split_at_checked(6)) else { return false };
        if scheme.eq_ignore_ascii_case(b"bearer") && shown.starts_with(b" ") {
            is_among(self.tokens.as_deref(), shown.trim_ascii())
        } else if scheme.eq_ignore_ascii_case(b"basic ") {
            let shown = BASE64.decode(shown.trim_ascii());
            shown.is_ok_and(|shown| is_among(self.users.as_deref(), &shown))
        } else {
            false
        }
    }

    /// What to show, for `WWW-Authenticate`.
    pub(crate) fn challenges(&self) -> impl Iterator<Item = &'static str> {
        let bearer = self.tokens.is_some().then_some("Bearer realm=\"portcullis\"");
        let basic = self.users.is_some().then_some("Basic realm=\"portcullis\", charset=\"UTF-8\"");
        bearer.into_iter().chain(basic)
    }
}

/// Takes the same time whichever it is, and whether it is any.
fn is_among(hashes: Option<&[Hash]>, shown: &[u8]) -> bool {
    let Some(shown) = Hash::of(shown) else { return false };
    let found = hashes.unwrap_or_default().iter().fold(Choice::from(0), |found, hash| found | hash.0.ct_eq(&shown.0));
    found.into()
}

fn read(path: &Path, check: fn(&str) -> Result<(), &'static str>) -> Result<Vec<Hash>, AuthError> {
    let text = secret::read_file(path, FILE_BYTES_MAX)?;
    let failed = |mistake| AuthError::Line { path: path.to_owned(), mistake };
    let mut hashes = Vec::new();
    for (number, line) in (1..).zip(text.expose().lines()) {
        let line = line.trim_end_matches('\r');
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        check(line).map_err(|mistake| failed(format!("line {number}: {mistake}")))?;
        hashes.extend(Hash::of(line.as_bytes()));
    }
    match hashes.len() {
        0 => Err(failed("holds no secret".to_owned())),
        count if count > SECRETS_MAX => Err(failed(format!("holds more than {SECRETS_MAX} secrets"))),
        _ => Ok(hashes),
    }
}

fn check_token(line: &str) -> Result<(), &'static str> {
    if line.len() < TOKEN_BYTES_MIN {
        return Err("a token has 16 characters at least");
    }
    let is_plain = line.bytes().all(|byte| byte.is_ascii_graphic());
    if is_plain { Ok(()) } else { Err("a token is written without spaces, in ASCII") }
}

fn check_user(line: &str) -> Result<(), &'static str> {
    match line.split_once(':') {
        Some(("", _)) => Err("the name of the user is missing"),
        Some((_, password)) if password.len() < PASSWORD_BYTES_MIN => Err("a password has 8 bytes at least"),
        Some(_) => Ok(()),
        None => Err("expected user:password"),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{Permissions, set_permissions, write};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn load(tokens: Option<&str>, users: Option<&str>) -> Result<Logins, String> {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: Option<&str>| {
            text.map(|text| {
                let path = dir.path().join(name);
                write(&path, text).unwrap();
                set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
                path
            })
        };
        let files = AuthFiles { tokens_file: file("tokens", tokens), users_file: file("users", users) };
        Logins::load(&files).map_err(|error| error.to_string())
    }

    #[test]
    fn tokens_and_users_get_in_and_nobody_else() {
        let logins =
            load(Some("# ours\n0123456789abcdef\n\nfedcba9876543210\r\n"), Some("vector:open sesame:1\n")).unwrap();
        let basic = |text: &str| format!("Basic {}", BASE64.encode(text));
        for (shown, admitted) in [
            ("Bearer 0123456789abcdef".to_owned(), true),
            ("bearer  fedcba9876543210 ".to_owned(), true),
            (basic("vector:open sesame:1"), true),
            (basic("vector:open sesame:1").replace("Basic", "bAsIC").trim_end_matches('=').to_owned(), true),
            ("Bearer 0123456789abcdee".to_owned(), false),
            ("Bearer # ours".to_owned(), false),
            ("Bearer".to_owned(), false),
            ("Bearer0123456789abcdef".to_owned(), false),
            ("Bearer ".to_owned(), false),
            ("Bearer vector:open sesame:1".to_owned(), false),
            (basic("vector:open sesame"), false),
            (basic("0123456789abcdef"), false),
            (basic(""), false),
            ("Basic ***".to_owned(), false),
            ("Digest x".to_owned(), false),
            (String::new(), false),
        ] {
            assert_eq!(logins.admit(Some(shown.as_bytes())), admitted, "{shown}");
        }
        assert!(!logins.admit(None));
        assert_eq!(logins.challenges().count(), 2);
        assert!(!load(None, Some("vector:open sesame:1")).unwrap().admit(Some(b"Bearer 0123456789abcdef")));
        assert!(Logins::default().admit(None), "nothing is asked for");
    }

    #[test]
    fn mistakes_name_the_line_and_never_show_it() {
        for (tokens, users, told) in [
            (Some("ok-ok-ok-ok-ok-ok\nhunter2"), None, "line 2: a token has 16"),
            (Some("hunter2 hunter2 hunter2"), None, "line 1: a token is written without spaces"),
            (Some("# nothing\n"), None, "holds no secret"),
            (None, Some("hunter2"), "line 1: expected user:password"),
            (None, Some("a:hunter2"), "line 1: a password has 8"),
            (None, Some(":hunter2hunter2"), "line 1: the name"),
        ] {
            let error = load(tokens, users).unwrap_err();
            assert!(error.contains(told) && !error.contains("hunter2"), "{error}");
        }
        let many = "0123456789abcdef\n".repeat(SECRETS_MAX + 1);
        assert!(load(Some(&many), None).unwrap_err().contains("more than 1000"));
        let shown = format!("{:?}", load(Some("0123456789abcdef"), None).unwrap());
        assert!(!shown.contains("0123"), "{shown}");
    }
}
