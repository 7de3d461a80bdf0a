//! Removes all that is ours from this host: rules, chains, sets, and the last set. And from Cloudflare.

use std::fs;
use std::io;
use std::path::Path;

use proto::bus::nats::replica;
use proto::time::Clock;

use crate::backend::ipset::Ipset;
use crate::backend::iptables::Iptables;
use crate::cloudflare;
use crate::config::EnforceConfig;
use crate::error::EnforceError;
use crate::forwarded;
use crate::host;
use crate::last_set;
use crate::plan::{Family, Step};
use crate::standoff;

/// What was removed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TeardownReport {
    /// Rules and chains removed.
    pub rules: usize,
    /// Names of the sets removed.
    pub sets: Vec<String>,
    /// Whether a last set was kept and is gone.
    pub last_set: bool,
    /// Entries removed from Cloudflare, for the whole cluster.
    pub cloudflare: usize,
}

/// Removes what is ours, in both families and both variants of iptables, and nothing else. Tables and built-in chains
/// stay, as others may have come to use them. Hold a [`StandOff`](crate::StandOff) meanwhile, or a running enforce puts
/// everything back.
/// A dry run only reports what would be removed.
///
/// # Errors
/// When something could not be looked at or removed; what could be removed is gone then. It may be run again.
pub async fn teardown(
    config: &EnforceConfig,
    state_dir: Option<&Path>,
    dry_run: bool,
) -> Result<TeardownReport, EnforceError> {
    if !host::may_change_firewall() {
        return Err(EnforceError::NotPermitted);
    }
    let mut report = TeardownReport::default();
    let mut rules = Iptables::new(config.firewall.clone(), dry_run, Clock::system());
    let mut first_error = None;
    for family in Family::ALL {
        match rules.teardown(family).await {
            Ok(removed) => report.rules += removed.len(),
            Err(source) => {
                let what = format!("our {} rules", family.as_str());
                first_error.get_or_insert(EnforceError::Remove { what, source: source.into() });
            }
        }
        let (removed, failure) = forwarded::remove(&mut rules, family, dry_run).await;
        report.rules += removed;
        if let Some(source) = failure {
            let what = format!("our {} rules about forwarded clients", family.as_str());
            first_error.get_or_insert(EnforceError::Remove { what, source: source.into() });
        }
    }
    if let Some(ipset) = Ipset::find() {
        let sets = ipset.headers().await.map_err(|source| EnforceError::Observe { what: "kernel sets", source })?;
        let doomed = sets.keys().filter(|_| !dry_run);
        let steps: Vec<Step> = doomed.map(|set| Step::Destroy(*set)).collect();
        let applied = ipset.apply(&steps).await;
        if let Some((_, error)) = applied.stopped {
            return Err(EnforceError::Remove { what: "our kernel sets".to_owned(), source: error.into() });
        }
        for (index, set) in sets.keys().enumerate() {
            match applied.refused.iter().find(|refused| refused.step == index) {
                None => report.sets.push(set.name().to_owned()),
                Some(refused) => {
                    let what = format!("set {}", set.name());
                    let source = refused.why.clone().into();
                    first_error.get_or_insert(EnforceError::Remove { what, source });
                }
            }
        }
    }
    if let Some(state_dir) = state_dir {
        // What was applied of the bus goes with it: the next start takes whatever set it finds there.
        for dir in standoff::state_dirs(state_dir) {
            for path in [last_set::FILE, replica::FILE_NAME, forwarded::FILE].map(|file| dir.join(file)) {
                report.last_set |= if dry_run { path.exists() } else { remove(&path)? };
            }
        }
    }
    if let Some(config) = &config.cloudflare {
        match cloudflare::remove_all(config, state_dir, dry_run).await {
            Ok(removed) => report.cloudflare = removed,
            Err(source) => {
                let what = "our entries from Cloudflare".to_owned();
                first_error.get_or_insert(EnforceError::Remove { what, source: source.into() });
            }
        }
    }
    first_error.map_or(Ok(report), Err)
}

fn remove(path: &Path) -> Result<bool, EnforceError> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(EnforceError::Remove { what: path.display().to_string(), source: source.into() }),
    }
}
