//! Where our entries may stand at Cloudflare, kept in `state_dir`. They have no end of their own, so what the configuration
//! names no more is not forgotten before it is empty.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::installation::keep;
use crate::config::Scope;

/// Name of the file in `state_dir`.
const FILE: &str = "cloudflare.json";
/// Of its format.
const VERSION: u32 = 1;

/// Entries of one installation at one place.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Place {
    pub(super) installation: String,
    at: At,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum At {
    User,
    Zone(String),
    Account(String),
    List { account: String, list: String },
}

impl Place {
    /// All places of `scope`.
    pub(super) fn all(installation: &str, scope: &Scope) -> BTreeSet<Self> {
        let at = match scope {
            Scope::User => vec![At::User],
            Scope::Zones(zones) => zones.iter().cloned().map(At::Zone).collect(),
            Scope::Account(account) => vec![At::Account(account.clone())],
            Scope::List { account, list } => vec![At::List { account: account.clone(), list: list.clone() }],
        };
        at.into_iter().map(|at| Self { installation: installation.to_owned(), at }).collect()
    }

    /// What a person can do who knows that it is gone: Cloudflare answers then as if we had no right to see it.
    pub(super) fn advice(&self, state_dir: &Path) -> String {
        let kept = serde_json::to_string(self).unwrap_or_default();
        format!("if it is gone there, stop this host's service and take {kept} out of {}", file(state_dir).display())
    }

    /// This place alone.
    pub(super) fn scope(&self) -> Scope {
        match self.at.clone() {
            At::User => Scope::User,
            At::Zone(zone) => Scope::Zones(vec![zone]),
            At::Account(account) => Scope::Account(account),
            At::List { account, list } => Scope::List { account, list },
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.at {
            At::User => f.write_str("the user")?,
            At::Zone(zone) => write!(f, "zone {zone}")?,
            At::Account(account) => write!(f, "account {account}")?,
            At::List { list, .. } => write!(f, "list {list}")?,
        }
        write!(f, " (installation {})", self.installation)
    }
}

#[derive(Deserialize, Serialize)]
struct Kept {
    version: u32,
    places: BTreeSet<Place>,
}

/// Where it is kept.
pub(super) fn file(state_dir: &Path) -> PathBuf {
    state_dir.join(FILE)
}

/// What is kept; nothing where there is no file.
///
/// # Errors
/// When it cannot be read, or is of another version.
pub(super) fn read(state_dir: &Path) -> io::Result<BTreeSet<Place>> {
    let text = match fs::read(file(state_dir)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
        read => read?,
    };
    let kept: Kept = serde_json::from_slice(&text)?;
    if kept.version != VERSION {
        return Err(io::Error::other(format!("version {} is not {VERSION}", kept.version)));
    }
    Ok(kept.places)
}

/// Keeps them, durably; the file goes with the last.
///
/// # Errors
/// When it cannot be written.
pub(super) fn write(state_dir: &Path, places: &BTreeSet<Place>) -> io::Result<()> {
    if places.is_empty() {
        return match fs::remove_file(file(state_dir)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed,
        };
    }
    let kept = Kept { version: VERSION, places: places.clone() };
    keep(&file(state_dir), &serde_json::to_string(&kept)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_kept_by_the_first_version_is_read_and_another_version_is_not_taken_for_nothing() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read(dir.path()).unwrap(), BTreeSet::new());
        let text = r#"{"version":1,"places":[{"installation":"me","at":"user"},{"installation":"me","at":{"zone":"z"}},
            {"installation":"me","at":{"account":"a"}},{"installation":"me","at":{"list":{"account":"a","list":"l"}}}]}"#;
        fs::write(file(dir.path()), text).unwrap();
        let places = read(dir.path()).unwrap();
        let list = Scope::List { account: "a".to_owned(), list: "l".to_owned() };
        let scopes = [Scope::User, Scope::Zones(vec!["z".to_owned()]), Scope::Account("a".to_owned()), list];
        assert_eq!(places, scopes.iter().flat_map(|scope| Place::all("me", scope)).collect());
        assert!(places.iter().all(|place| scopes.contains(&place.scope())));
        write(dir.path(), &places).unwrap();
        assert_eq!(read(dir.path()).unwrap(), places);
        write(dir.path(), &BTreeSet::new()).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        fs::write(file(dir.path()), r#"{"version":2,"places":[]}"#).unwrap();
        assert!(read(dir.path()).is_err());
    }
}
