//! The last ban set and lists, kept on disk, so that a host that starts without a bus is protected at once.
//!
//! The file is versioned JSON, replaced as a whole: a crash leaves the old one or the new one. It is a copy; losing it
//! costs protection until the bus answers, and nothing else.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use proto::ban::Lists;
use proto::net::Target;
use proto::time::Timestamp;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::desired::Entry;

/// Name of the file in `state_dir`.
pub(crate) const FILE: &str = "enforce.json";
/// The version that is written. Every version ever written can be read.
pub(crate) const VERSION: u32 = 1;

/// What is kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct LastSet {
    pub(crate) lists: Lists,
    pub(crate) bans: Vec<(Target, Entry)>,
}

#[derive(Serialize, Deserialize)]
struct Stored {
    version: u32,
    lists: Lists,
    bans: Vec<StoredBan>,
}

#[derive(Serialize, Deserialize)]
struct StoredBan {
    target: Target,
    /// RFC 3339; `null` = permanent.
    ends: Option<Timestamp>,
    rule: String,
}

/// The last set could not be kept or read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LastSetError {
    #[error("cannot {action} the last ban set at {path}")]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the last ban set at {path} is not readable")]
    Json {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("the last ban set at {path} has version {version}; this program knows {VERSION}")]
    Version { path: PathBuf, version: u32 },
}

/// Reads the last set; `None` where there is none yet.
pub(crate) fn load(state_dir: &Path) -> Result<Option<LastSet>, LastSetError> {
    let Some(stored) = read::<Stored>(&state_dir.join(FILE))? else { return Ok(None) };
    let bans = stored.bans.into_iter();
    let bans = bans.map(|ban| (ban.target, Entry { ends: ban.ends, rule: ban.rule.into() })).collect();
    Ok(Some(LastSet { lists: stored.lists, bans }))
}

/// Replaces the file. Durable when it returns.
pub(crate) fn store(state_dir: &Path, set: LastSet) -> Result<(), LastSetError> {
    let bans = set.bans.into_iter();
    let bans = bans.map(|(target, entry)| StoredBan { target, ends: entry.ends, rule: entry.rule.to_string() });
    let stored = Stored { version: VERSION, lists: set.lists, bans: bans.collect() };
    write(&state_dir.join(FILE), &stored)
}

/// Reads a file that says its version first; `None` where there is none yet.
pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, LastSetError> {
    #[derive(Deserialize)]
    struct Versioned {
        version: u32,
    }
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(LastSetError::Io { action: "read", path: path.to_owned(), source }),
    };
    let unreadable = |source| LastSetError::Json { path: path.to_owned(), source };
    let Versioned { version } = serde_json::from_slice(&bytes).map_err(unreadable)?;
    if version != VERSION {
        return Err(LastSetError::Version { path: path.to_owned(), version });
    }
    serde_json::from_slice(&bytes).map(Some).map_err(unreadable)
}

/// Replaces a file by way of another beside it, and makes its folder if there is none.
pub(crate) fn write(path: &Path, stored: &impl Serialize) -> Result<(), LastSetError> {
    let bytes = serde_json::to_vec(stored).map_err(|source| LastSetError::Json { path: path.to_owned(), source })?;
    let fresh = path.with_added_extension("new");
    let folder = path.parent().unwrap_or(Path::new("/"));
    let write = || {
        fs::create_dir_all(folder)?;
        let mut file = File::create(&fresh)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&fresh, path)?;
        File::open(folder)?.sync_all()
    };
    write().map_err(|source| LastSetError::Io { action: "write", path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> LastSet {
        let lists = Lists { never_ban: vec!["198.51.100.0/24".parse().unwrap()], paused: None };
        let ends = Timestamp::parse("2026-01-08T14:19:15.980Z");
        let bans = vec![
            ("192.0.2.1".parse().unwrap(), Entry { ends, rule: "forceful-browsing".into() }),
            ("2001:db8::/64".parse().unwrap(), Entry { ends: None, rule: "operator".into() }),
        ];
        LastSet { lists, bans }
    }

    #[test]
    fn version_1_is_readable_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FILE), include_bytes!("../testdata/enforce-v1.json")).unwrap();
        assert_eq!(load(dir.path()).unwrap(), Some(sample()));
    }

    #[test]
    fn what_is_stored_is_loaded() {
        let dir = tempfile::tempdir().unwrap();
        let state_dir = dir.path().join("made-on-demand");
        assert_eq!(load(&state_dir).unwrap(), None);
        store(&state_dir, sample()).unwrap();
        store(&state_dir, sample()).unwrap();
        assert_eq!(load(&state_dir).unwrap(), Some(sample()));
        let names: Vec<_> = fs::read_dir(&state_dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, [FILE]);
    }

    #[test]
    fn a_file_of_the_future_or_of_nobody_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FILE), r#"{"version": 2, "sets": []}"#).unwrap();
        assert!(matches!(load(dir.path()), Err(LastSetError::Version { version: 2, .. })));
        fs::write(dir.path().join(FILE), r#"{"version": 1, "bans": ["#).unwrap();
        assert!(matches!(load(dir.path()), Err(LastSetError::Json { .. })));
    }
}
