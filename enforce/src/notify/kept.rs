//! What is not told yet, kept on disk by one host without a cluster: a restart neither loses nor repeats it.
//!
//! The file is versioned JSON of bounded size, replaced as a whole: a crash leaves the old one or the new one.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::notify::queue::Waiting;

/// The version that is written. Every version ever written can be read.
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Stored<W> {
    version: u32,
    waiting: W,
}

/// What waits could not be kept or read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KeptError {
    #[error("cannot {action} what is not told yet at {path}")]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("what is not told yet at {path} is not readable")]
    Json {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("what is not told yet at {path} has version {version}; this program knows {VERSION}")]
    Version { path: PathBuf, version: u32 },
}

/// The file of the notifier `name`.
pub(crate) fn path(state_dir: &Path, name: &str) -> PathBuf {
    state_dir.join(format!("notify-{name}.json"))
}

/// Reads what waits; nothing where there is no file.
pub(crate) fn load(path: &Path) -> Result<Waiting, KeptError> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Waiting::default()),
        Err(source) => return Err(KeptError::Io { action: "read", path: path.to_owned(), source }),
    };
    let unreadable = |source| KeptError::Json { path: path.to_owned(), source };
    let stored: Stored<serde_json::Value> = serde_json::from_slice(&bytes).map_err(unreadable)?;
    if stored.version != VERSION {
        return Err(KeptError::Version { path: path.to_owned(), version: stored.version });
    }
    serde_json::from_value(stored.waiting).map_err(unreadable)
}

/// Replaces the file. Durable when it returns.
pub(crate) fn store(path: &Path, waiting: &Waiting) -> Result<(), KeptError> {
    let fresh = path.with_extension("json.new");
    let stored = Stored { version: VERSION, waiting };
    let bytes = serde_json::to_vec(&stored).map_err(|source| KeptError::Json { path: path.to_owned(), source })?;
    let write = || {
        let folder = path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder)?;
        let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&fresh, path)?;
        File::open(folder)?.sync_all()
    };
    write().map_err(|source| KeptError::Io { action: "write", path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use proto::time::Timestamp;

    use super::*;
    use crate::notify::message::samples::banned;
    use crate::notify::queue::Queue;

    #[test]
    fn what_is_stored_is_loaded() {
        let dir = tempfile::tempdir().unwrap();
        let path = path(&dir.path().join("made-on-demand"), "telegram");
        assert_eq!(load(&path).unwrap(), Waiting::default());
        let mut queue = Queue::new("telegram", Waiting::default());
        for n in 0..9 {
            queue.handle_notice(banned(n, "r"), 0, Timestamp::from_secs(1));
        }
        store(&path, queue.waiting()).unwrap();
        store(&path, queue.waiting()).unwrap();
        assert_eq!(load(&path).unwrap(), *queue.waiting());
    }

    #[test]
    fn version_1_is_readable_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let path = path(dir.path(), "telegram");
        fs::write(&path, include_bytes!("../../testdata/notify-v1.json")).unwrap();
        let queue = Queue::new("telegram", load(&path).unwrap());
        assert_eq!(queue.count(), 9);
    }

    #[test]
    fn a_file_of_the_future_or_of_nobody_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = path(dir.path(), "telegram");
        fs::write(&path, r#"{"version": 2, "waiting": []}"#).unwrap();
        assert!(matches!(load(&path), Err(KeptError::Version { version: 2, .. })));
        fs::write(&path, r#"{"version": 1, "waiting": {"#).unwrap();
        assert!(matches!(load(&path), Err(KeptError::Json { .. })));
    }
}
