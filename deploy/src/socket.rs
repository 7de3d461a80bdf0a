//! Where the operator API's socket is unless configured, and where verbs look for it.
//!
//! Root's Portcullis is the system's. One that another user started (a dry run, mostly) keeps its socket in a directory
//! that nobody else can enter: a name in the shared temporary directory is anybody's to take first.

use std::fs::DirBuilder;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use nix::unistd::Uid;

use crate::config::Location;

/// Where the operator API of the system's Portcullis is.
pub const SYSTEM: &str = "/run/portcullis/api.sock";

/// Where the API is unless configured: the system's socket for root, else one that belongs to the user.
pub fn default_path() -> PathBuf {
    if Uid::effective().is_root() { PathBuf::from(SYSTEM) } else { user_path() }
}

fn user_path() -> PathBuf {
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|dir| dir.is_absolute());
    let dir = runtime.map_or_else(
        || std::env::temp_dir().join(format!("portcullis-{}", Uid::effective())),
        |dir| dir.join("portcullis"),
    );
    dir.join("api.sock")
}

/// Where a verb looks for a running Portcullis: what the configuration says, be the rest of it right or wrong; else the
/// user's own, else the system's.
pub fn find() -> PathBuf {
    let configured = Location::default().peek("/api/socket").map(PathBuf::from);
    configured.unwrap_or_else(|| {
        let own = default_path();
        let is_own = own.exists() && own.parent().is_some_and(|dir| is_private(dir).unwrap_or(false));
        if is_own { own } else { PathBuf::from(SYSTEM) }
    })
}

/// Makes the directory of a user's own default socket. Other directories are made with the socket, as usual.
pub fn prepare(socket: &Path) -> anyhow::Result<()> {
    match socket.parent() {
        Some(dir) if !Uid::effective().is_root() && socket == user_path() => make_private(dir),
        _ => Ok(()),
    }
}

fn make_private(dir: &Path) -> anyhow::Result<()> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => {
            return Err(error).with_context(|| format!("cannot make {}", dir.display()));
        }
        _ => {}
    }
    if !is_private(dir).with_context(|| format!("cannot look at {}", dir.display()))? {
        bail!("{} is open to others: remove it, or configure api.socket", dir.display());
    }
    Ok(())
}

/// Whether `dir` is a directory, no link to one, that only this user can enter.
fn is_private(dir: &Path) -> io::Result<bool> {
    let meta = dir.symlink_metadata()?;
    Ok(meta.is_dir() && meta.uid() == Uid::effective().as_raw() && meta.mode() & 0o077 == 0)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn a_directory_that_others_can_enter_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("portcullis");
        make_private(&dir).unwrap();
        make_private(&dir).unwrap();
        assert_eq!(dir.metadata().unwrap().mode() & 0o777, 0o700);
        let link = temp.path().join("link");
        symlink(&dir, &link).unwrap();
        assert!(make_private(&link).unwrap_err().to_string().contains("open to others"));
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o710)).unwrap();
        assert!(make_private(&dir).is_err());
    }
}
