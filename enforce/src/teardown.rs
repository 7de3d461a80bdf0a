//! Removes what is ours from this host: rules, chains, sets, our table, and the last set; all of it, and from Cloudflare, or
//! what a former back end left.

use std::fs;
use std::io;
use std::path::Path;

use proto::bus::nats::replica;
use proto::time::Clock;

use crate::backend::ipset::Ipset;
use crate::backend::iptables::Iptables;
use crate::backend::nftables::Nftables;
use crate::choose::Method;
use crate::cloudflare;
use crate::command::CommandError;
use crate::config::{EnforceConfig, FirewallConfig};
use crate::error::EnforceError;
use crate::former;
use crate::forwarded;
use crate::host;
use crate::last_set;
use crate::plan::{Family, SetId, Step};
use crate::standoff;

/// A set that was removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemovedSet {
    /// Its name.
    pub name: &'static str,
    /// Bans in it, or guarded networks. Some bans may have just ended.
    pub members: usize,
}

/// What was removed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TeardownReport {
    /// Jumps and chains removed, for people.
    pub rules: Vec<String>,
    /// Sets of ipset removed.
    pub sets: Vec<RemovedSet>,
    /// Bans in our table of nftables, which was there and is gone.
    pub table: Option<usize>,
    /// Whether a last set was kept and is gone.
    pub last_set: bool,
    /// What was removed from Cloudflare, for the whole cluster; places with nothing of ours are left out.
    pub cloudflare: Vec<CloudflareRemoval>,
}

/// What was ours at one place at Cloudflare.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CloudflareRemoval {
    /// Which, for people.
    pub place: String,
    /// Entries that are gone, or in a dry run would be.
    pub entries: usize,
    /// The list itself is not there any more.
    pub is_gone: bool,
}

/// Removes what is ours, of every back end, in both families and both variants of iptables, and nothing else. Tables and
/// built-in chains of iptables stay, as others may have come to use them. Hold a [`StandOff`](crate::StandOff) meanwhile, or
/// a running enforce puts everything back. A dry run only reports what would be removed.
///
/// Returns with it what could not be looked at or removed, each with the reason; all else is gone then. It may be run again.
pub async fn teardown(
    config: &EnforceConfig,
    state_dir: Option<&Path>,
    dry_run: bool,
) -> (TeardownReport, Vec<EnforceError>) {
    if !host::may_change_firewall() {
        return (TeardownReport::default(), vec![EnforceError::NotPermitted]);
    }
    let (mut report, mut left) = (TeardownReport::default(), Vec::new());
    remove_except(None, &config.firewall, dry_run, (&mut report, &mut left)).await;
    remove_forwarded(&config.firewall, dry_run, &mut report, &mut left).await;
    if let Some(state_dir) = state_dir {
        // What was applied of the bus goes with it: the next start takes whatever set it finds there.
        for dir in standoff::state_dirs(state_dir) {
            for path in [last_set::FILE, replica::FILE_NAME, forwarded::FILE, former::FILE].map(|file| dir.join(file)) {
                match if dry_run { Ok(path.exists()) } else { remove(&path) } {
                    Ok(there) => report.last_set |= there,
                    Err(error) => left.push(error),
                }
            }
        }
    }
    let state_dirs = state_dir.map(standoff::state_dirs).unwrap_or_default();
    let failure = match &config.cloudflare {
        None => cloudflare::left_behind(&state_dirs).map(Into::into),
        Some(config) => {
            let (removals, done) = cloudflare::remove_all(config, &state_dirs, dry_run).await;
            report.cloudflare = removals;
            done.err().map(Into::into)
        }
    };
    if let Some(source) = failure {
        let what = "our entries from Cloudflare".to_owned();
        left.push(EnforceError::Remove { what, source });
    }
    (report, left)
}

/// Removes what back ends other than `kept` left on the host; in a dry run only tells what that would be.
///
/// # Errors
/// The worst of what could not be looked at or removed; what could be removed is gone then.
pub(crate) async fn clear_former(
    kept: Option<Method>,
    config: &FirewallConfig,
    dry_run: bool,
) -> Result<TeardownReport, EnforceError> {
    let (mut report, mut left) = (TeardownReport::default(), Vec::new());
    remove_except(kept, config, dry_run, (&mut report, &mut left)).await;
    // Programs that cannot be asked matter less than what stays in force.
    left.sort_by_key(|error| matches!(error, EnforceError::Observe { .. }));
    left.into_iter().next().map_or(Ok(report), Err)
}

/// Rules go before the sets that they refer to.
async fn remove_except(
    kept: Option<Method>,
    config: &FirewallConfig,
    dry_run: bool,
    (report, left): (&mut TeardownReport, &mut Vec<EnforceError>),
) {
    if !matches!(kept, Some(Method::Ipset | Method::Plain)) {
        remove_rules(config, dry_run, report, left).await;
    }
    if kept != Some(Method::Ipset) {
        remove_sets(dry_run, report, left).await;
    }
    if kept != Some(Method::Nftables) {
        remove_table(config, dry_run, report, left).await;
    }
}

async fn remove_rules(
    config: &FirewallConfig,
    dry_run: bool,
    report: &mut TeardownReport,
    left: &mut Vec<EnforceError>,
) {
    let mut rules = Iptables::new(config.clone(), dry_run, Clock::system());
    for family in Family::ALL {
        let removal = rules.teardown(family).await;
        report.rules.extend(removal.removed);
        left.extend(
            removal.left.into_iter().map(|(what, source)| EnforceError::Remove { what, source: source.into() }),
        );
    }
}

async fn remove_forwarded(
    config: &FirewallConfig,
    dry_run: bool,
    report: &mut TeardownReport,
    left: &mut Vec<EnforceError>,
) {
    let mut rules = Iptables::new(config.clone(), dry_run, Clock::system());
    for family in Family::ALL {
        let (removed, failure) = forwarded::remove(&mut rules, family, dry_run).await;
        report.rules.extend(removed);
        if let Some(source) = failure {
            let what = format!("our {} rules about forwarded clients", family.as_str());
            left.push(EnforceError::Remove { what, source: source.into() });
        }
    }
}

async fn remove_sets(dry_run: bool, report: &mut TeardownReport, left: &mut Vec<EnforceError>) {
    let Some(ipset) = Ipset::find() else { return };
    let sets = match ipset.headers_if_any().await {
        Ok(sets) => sets,
        Err(source) => return left.push(EnforceError::Observe { what: "kernel sets", source }),
    };
    // A set that a rule still holds bans nobody any more.
    let flush = sets.keys().filter(|set| matches!(set, SetId::Bans(_))).map(|set| Step::Flush(*set));
    let mut steps: Vec<Step> = flush.collect();
    let flushed = steps.len();
    steps.extend(sets.keys().map(|set| Step::Destroy(*set)));
    if dry_run {
        steps.clear();
    } else {
        // One that a killed process left.
        ipset.end_probe().await;
    }
    let applied = ipset.apply(&steps).await;
    if let Some((_, error)) = applied.stopped {
        return left.push(EnforceError::Remove { what: "our kernel sets".to_owned(), source: error.into() });
    }
    let refusal = |step: usize| applied.refused.iter().find(|refused| refused.step == step);
    for (index, (set, header)) in sets.iter().enumerate() {
        let Some(refused) = refusal(flushed + index) else {
            report.sets.push(RemovedSet { name: set.name(), members: header.count });
            continue;
        };
        let emptied = steps[..flushed].iter().position(|step| *step == Step::Flush(*set)).map(refusal);
        let note = if matches!(emptied, Some(None)) { ", which is empty now" } else { "" };
        let what = format!("set {}{note}", set.name());
        left.push(EnforceError::Remove { what, source: refused.why.clone().into() });
    }
}

async fn remove_table(
    config: &FirewallConfig,
    dry_run: bool,
    report: &mut TeardownReport,
    left: &mut Vec<EnforceError>,
) {
    let nftables = Nftables::new(config);
    let failed =
        |source: CommandError| EnforceError::Remove { what: "our nftables table".to_owned(), source: source.into() };
    match nftables.is_there().await {
        Ok(true) => {}
        Ok(false) => return,
        // A kernel without nf_tables holds no table of ours.
        Err(error) if error.is_absence() => {
            tracing::debug!(error = %crate::reconcile::chain_of(&error), "No nf_tables to look at");
            return;
        }
        Err(error) => return left.push(failed(error)),
    }
    // That its bans cannot be counted is no reason to leave it.
    let held = nftables.observe(&Clock::system()).await.unwrap_or_default();
    let bans = held.sets.iter().filter(|(set, _)| set.holds_bans()).map(|(_, set)| set.members.len()).sum();
    match if dry_run { Ok(true) } else { nftables.teardown().await } {
        Ok(_) => report.table = Some(bans),
        Err(error) => left.push(failed(error)),
    }
}

fn remove(path: &Path) -> Result<bool, EnforceError> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(EnforceError::Remove { what: path.display().to_string(), source: source.into() }),
    }
}
