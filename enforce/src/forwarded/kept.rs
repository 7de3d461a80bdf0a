//! Who was refused last, kept on disk for a start without a bus. Versioned JSON, replaced as a whole, like the last set.

use std::path::Path;

use proto::net::Target;
use proto::time::Timestamp;
use serde::{Deserialize, Serialize};

use crate::forwarded::claims::Claim;
use crate::last_set::{self, LastSetError};

/// Name of the file in `state_dir`.
pub(crate) const FILE: &str = "forwarded.json";

#[derive(Serialize, Deserialize)]
struct Stored {
    version: u32,
    clients: Vec<StoredClient>,
}

#[derive(Serialize, Deserialize)]
struct StoredClient {
    target: Target,
    /// RFC 3339; `null` = permanent.
    ends: Option<Timestamp>,
    since: Timestamp,
}

/// Reads them; `None` where nothing was kept yet.
pub(crate) fn load(state_dir: &Path) -> Result<Option<Vec<(Target, Claim)>>, LastSetError> {
    let stored: Option<Stored> = last_set::read(&state_dir.join(FILE))?;
    let claim = |client: StoredClient| (client.target, Claim { ends: client.ends, since: client.since });
    Ok(stored.map(|stored| stored.clients.into_iter().map(claim).collect()))
}

/// Replaces the file. Durable when it returns.
pub(crate) fn store(state_dir: &Path, clients: &[(Target, Claim)]) -> Result<(), LastSetError> {
    let client =
        |(target, claim): &(Target, Claim)| StoredClient { target: *target, ends: claim.ends, since: claim.since };
    let stored = Stored { version: last_set::VERSION, clients: clients.iter().map(client).collect() };
    last_set::write(&state_dir.join(FILE), &stored)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn version_1_is_readable_for_ever_and_what_is_stored_is_loaded() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(load(dir.path()).unwrap(), None);
        fs::write(dir.path().join(FILE), include_bytes!("../../testdata/forwarded-v1.json")).unwrap();
        let time = |text| Timestamp::parse(text).unwrap();
        let since = time("2026-01-08T14:09:15.980Z");
        let clients = [
            ("192.0.2.1".parse().unwrap(), Claim { ends: Some(time("2026-01-08T14:19:15.980Z")), since }),
            ("2001:db8::/64".parse().unwrap(), Claim { ends: None, since }),
        ];
        assert_eq!(load(dir.path()).unwrap().unwrap(), clients);
        store(dir.path(), &clients[1..]).unwrap();
        assert_eq!(load(dir.path()).unwrap().unwrap(), clients[1..]);
        fs::write(dir.path().join(FILE), r#"{"version": 2}"#).unwrap();
        assert!(matches!(load(dir.path()), Err(LastSetError::Version { version: 2, .. })));
    }
}
