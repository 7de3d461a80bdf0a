//! Secrets in a configuration: given there, or in a file that nobody else may read.

use std::path::PathBuf;

use proto::secret::{Secret, read_file};
use proto::settings::{Field, FromValue, Mistakes};
use serde_json::Value;

use crate::reconcile::chain_of;

/// Longest file of a secret, in bytes.
const FILE_BYTES_MAX: u64 = 16 << 10;

/// A secret as a file says it. Its mistakes do not show it.
#[derive(Clone, Debug)]
pub(super) struct RawSecret(pub(super) Secret);

impl FromValue for RawSecret {
    fn from_value(value: Value) -> Result<Self, String> {
        match value {
            Value::String(text) => Ok(Self(Secret::new(text))),
            // Environment variables arrive as whatever they look like.
            Value::Number(number) => Ok(Self(Secret::new(number.to_string()))),
            _ => Err("expected a string".to_owned()),
        }
    }
}

/// A table that may hold secrets: what stands there in its place is not shown.
#[derive(Clone, Debug)]
pub(super) struct Hidden<T>(pub(super) T);

impl<T: FromValue> FromValue for Hidden<T> {
    const SECTION: Option<&'static str> = T::SECTION;

    fn from_value(value: Value) -> Result<Self, String> {
        T::from_value(value).map(Self).map_err(|_| "expected a table".to_owned())
    }
}

/// Where a secret is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SecretSource {
    /// In the configuration.
    Given(Secret),
    /// In a file, read when it is needed: other roles that read the same configuration need not be able to.
    File(PathBuf),
}

/// A secret cannot be used. Names its key, and its file where it is in one, and does not show it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {text}")]
pub(crate) struct SecretError {
    key: String,
    text: String,
}

impl SecretError {
    /// Notes it where mistakes of its section are noted.
    pub(crate) fn note(self, mistakes: &mut Mistakes) {
        mistakes.add(&self.key, self.text);
    }
}

impl SecretSource {
    /// The secret under `key`, without white space around it.
    ///
    /// # Errors
    /// When its file cannot be read, is open to others or holds nothing.
    pub(crate) fn load(&self, key: &str) -> Result<Secret, SecretError> {
        self.load_as(key, |secret| Ok(secret.clone()))
    }

    /// What is made of the secret under `key`.
    ///
    /// # Errors
    /// When it cannot be loaded, or nothing can be made of it: then `make` says what is expected.
    pub(crate) fn load_as<T>(
        &self,
        key: &str,
        make: impl FnOnce(&Secret) -> Result<T, String>,
    ) -> Result<T, SecretError> {
        let path = match self {
            Self::Given(secret) => return make(secret).map_err(|text| SecretError { key: key.to_owned(), text }),
            Self::File(path) => path,
        };
        let failed = |text| SecretError { key: format!("{key}_file"), text };
        let secret = read_file(path, FILE_BYTES_MAX).map_err(|error| failed(chain_of(&error)))?;
        let secret = Secret::new(secret.expose().trim());
        if secret.expose().is_empty() {
            return Err(failed(format!("{} is empty", path.display())));
        }
        make(&secret).map_err(|text| failed(format!("{}: {text}", path.display())))
    }
}

/// A secret under `key`, or a file under `key` with `_file`; `Some(None)` when neither is given.
pub(super) fn check_secret(
    key: &str,
    (given, file): (Field<RawSecret>, Field<PathBuf>),
    mistakes: &mut Mistakes,
) -> Option<Option<SecretSource>> {
    let is_absent = |absent: bool, taken: bool| absent || taken;
    let file_key = format!("{key}_file");
    let (no_given, no_file) = (matches!(given, Field::Absent), matches!(file, Field::Absent));
    let (given, file) = (given.take(key, mistakes), file.take(&file_key, mistakes));
    if !is_absent(no_given, given.is_some()) || !is_absent(no_file, file.is_some()) {
        return None;
    }
    match (given, file) {
        (Some(_), Some(_)) => {
            mistakes.add(key, format!("give either {key} or {file_key}"));
            None
        }
        (Some(RawSecret(secret)), None) if secret.expose().trim().is_empty() => {
            mistakes.add(key, "is empty");
            None
        }
        (Some(RawSecret(secret)), None) => Some(Some(SecretSource::Given(secret))),
        (None, Some(path)) if !path.is_absolute() => {
            mistakes.add(&file_key, "expected an absolute path");
            None
        }
        (None, Some(path)) => Some(Some(SecretSource::File(path))),
        (None, None) => Some(None),
    }
}

/// Whether it can be sent in a header.
///
/// # Errors
/// What is expected, without showing it.
pub(crate) fn check_sendable(text: &str) -> Result<(), String> {
    let fine = !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic());
    if fine { Ok(()) } else { Err("expected printable ASCII without spaces".to_owned()) }
}

/// Whether a secret may be sent there: by TLS, or to this host. It has no user, query or fragment.
pub(super) fn is_safe_url(url: &str) -> bool {
    let loopback = ["http://127.0.0.1", "http://[::1]", "http://localhost"];
    let mut near = loopback.iter().filter_map(|prefix| url.strip_prefix(prefix));
    let fine = near.any(|rest| rest.is_empty() || rest.starts_with([':', '/']))
        || url.strip_prefix("https://").is_some_and(|rest| !rest.is_empty());
    fine && !url.contains(['@', '?', '#', ' '])
}
