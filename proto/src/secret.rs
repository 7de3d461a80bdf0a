//! Secrets: text that no log line and no error may show, and the files that hold it.
//!
//! A file of secrets is refused when others may read or change it, as ssh does with its keys: better a service that does
//! not start than a token that everybody on the host knows.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Permissions that a file of secrets must not give: any to others, and writing to its group.
const OPEN_MODE: u32 = 0o027;

/// Text that cannot be printed by accident.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// From now on hidden.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text itself, for the one place that needs it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// A file of secrets cannot be used. Never shows what it holds.
#[derive(Debug, thiserror::Error)]
pub enum SecretFileError {
    /// It cannot be read.
    #[error("cannot read {}", .path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Others could read or change it.
    #[error("{} is open to others (mode {mode:03o}): make it 600, or 640 with a group of its own", .path.display())]
    Open {
        /// Which.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// It is longer than anything it should hold.
    #[error("{} is longer than {bytes_max} bytes", .path.display())]
    TooLong {
        /// Which.
        path: PathBuf,
        /// The limit.
        bytes_max: u64,
    },
}

/// Reads a file of secrets of at most `bytes_max` bytes of UTF-8.
///
/// # Errors
/// When it cannot be read, is too long, or others may read or change it.
pub fn read_file(path: &Path, bytes_max: u64) -> Result<Secret, SecretFileError> {
    let failed = |source| SecretFileError::Read { path: path.to_owned(), source };
    let file = File::open(path).map_err(failed)?;
    // Of the opened file: what the name means may change meanwhile.
    let metadata = file.metadata().map_err(failed)?;
    if metadata.is_dir() {
        return Err(failed(std::io::ErrorKind::IsADirectory.into()));
    }
    let mode = metadata.mode() & 0o777;
    if mode & OPEN_MODE != 0 {
        return Err(SecretFileError::Open { path: path.to_owned(), mode });
    }
    let mut text = String::new();
    let bytes = file.take(bytes_max + 1).read_to_string(&mut text).map_err(failed)?;
    if bytes as u64 > bytes_max {
        return Err(SecretFileError::TooLong { path: path.to_owned(), bytes_max });
    }
    Ok(Secret(text))
}

#[cfg(test)]
mod tests {
    use std::fs::{Permissions, set_permissions, write};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_secret_does_not_print() {
        let secret = Secret::new("hunter2");
        assert_eq!(format!("{secret:?} {:?}", Some(&secret)), "Secret(..) Some(Secret(..))");
        assert_eq!(secret.expose(), "hunter2");
    }

    #[test]
    fn a_file_that_is_open_to_others_or_too_long_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        assert!(
            matches!(read_file(dir.path(), 10), Err(SecretFileError::Read { .. })),
            "its mode is not what is wrong"
        );
        write(&path, "0123456789").unwrap();
        for (mode, opens) in [
            (0o600, true),
            (0o400, true),
            (0o640, true),
            (0o440, true),
            (0o660, false),
            (0o604, false),
            (0o602, false),
            (0o644, false),
        ] {
            set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            let read = read_file(&path, 10);
            assert_eq!(read.is_ok(), opens, "{mode:o}: {read:?}");
        }
        set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        let error = read_file(&path, 9).unwrap_err().to_string();
        assert!(error.ends_with("secret is longer than 9 bytes") && !error.contains("0123"), "{error}");
        write(&path, b"\xff\xfe").unwrap();
        assert!(matches!(read_file(&path, 9), Err(SecretFileError::Read { .. })));
        assert!(matches!(read_file(&dir.path().join("none"), 9), Err(SecretFileError::Read { .. })));
    }
}
