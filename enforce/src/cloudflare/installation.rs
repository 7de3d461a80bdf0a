//! The name that our entries at Cloudflare carry: configured, or made once and kept in `state_dir`.
//!
//! Who loses it leaves entries behind that are nobody's, so the report names those of other installations that it sees.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

use proto::subject::is_name;

/// Name of the file in `state_dir`.
const FILE: &str = "installation";
/// Random bytes of a name.
const NAME_BYTES: usize = 8;

/// There is no name.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InstallationError {
    #[error(
        "there is no place to keep the name of this installation: set enforce.cloudflare.installation, or make state_dir \
         writable"
    )]
    NoPlace,
    #[error("cannot {action} the name of this installation at {}", .path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "no name of this installation is kept, so what is ours is not known: set enforce.cloudflare.installation as \
         `status` showed it"
    )]
    Unknown,
    #[error("{} holds no name of an installation: [a-z0-9-]{{1,63}}", .path.display())]
    NoName { path: PathBuf },
}

/// The name: as configured, as kept in `state_dir`, or a new one, which is kept there.
pub(crate) fn name(configured: Option<&str>, state_dir: Option<&Path>) -> Result<String, InstallationError> {
    if let Some(name) = configured {
        return Ok(name.to_owned());
    }
    let state_dir = state_dir.ok_or(InstallationError::NoPlace)?;
    if let Some(name) = read(state_dir)? {
        return Ok(name);
    }
    let path = state_dir.join(FILE);
    let failed = |action| {
        let path = path.clone();
        move |source| InstallationError::Io { action, path, source }
    };
    let name = make().map_err(failed("make"))?;
    keep(&path, &format!("{name}\n")).map_err(failed("keep"))?;
    Ok(name)
}

/// The name that is kept in `state_dir`, if there is one.
fn read(state_dir: &Path) -> Result<Option<String>, InstallationError> {
    let path = state_dir.join(FILE);
    match fs::read_to_string(&path) {
        Ok(text) if is_name(text.trim()) => Ok(Some(text.trim().to_owned())),
        Ok(_) => Err(InstallationError::NoName { path }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(InstallationError::Io { action: "read", path, source }),
    }
}

fn make() -> io::Result<String> {
    let mut bytes = [0; NAME_BYTES];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    let mut name = String::new();
    for byte in bytes {
        // Writing to a text cannot fail.
        let _ = write!(name, "{byte:02x}");
    }
    Ok(name)
}

/// The names by which entries may be ours: as configured, or all that are kept in these folders.
pub(crate) fn known(configured: Option<&str>, state_dirs: &[PathBuf]) -> Result<Vec<String>, InstallationError> {
    if let Some(name) = configured {
        return Ok(vec![name.to_owned()]);
    }
    state_dirs.iter().filter_map(|dir| read(dir).transpose()).collect()
}

/// Durable before the first entry carries it.
pub(super) fn keep(path: &Path, text: &str) -> io::Result<()> {
    let fresh = path.with_extension("new");
    let mut file = File::create(&fresh)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&fresh, path)?;
    path.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_made_once_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let made = name(None, Some(dir.path())).unwrap();
        assert!(is_name(&made) && made.len() == 2 * NAME_BYTES, "{made}");
        assert_eq!(name(None, Some(dir.path())).unwrap(), made);
        assert_eq!(name(Some("mine"), Some(dir.path())).unwrap(), "mine");
        let elsewhere = tempfile::tempdir().unwrap();
        assert_ne!(name(None, Some(tempfile::tempdir().unwrap().path())).unwrap(), made);
        let dirs = [elsewhere.path().to_owned(), dir.path().to_owned()];
        assert_eq!(known(None, &dirs).unwrap(), [made]);
        assert_eq!(known(Some("mine"), &dirs).unwrap(), ["mine"]);
        assert_eq!(known(None, &dirs[..1]).unwrap(), [] as [String; 0], "none is invented");
        fs::write(dir.path().join(FILE), "Not a name").unwrap();
        assert!(matches!(name(None, Some(dir.path())), Err(InstallationError::NoName { .. })));
        assert!(matches!(name(None, None), Err(InstallationError::NoPlace)));
    }
}
