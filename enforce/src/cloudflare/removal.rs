//! The end of what stands at Cloudflare: all of it, at every place where it may stand, or told where it is left.

use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use proto::report::{BackendReport, Problem};
use proto::time::Clock;

use super::NAME;
use super::client::{Client, Login, LoginError};
use super::former::{self, Emptied};
use super::installation::{self, InstallationError};
use super::metrics::CloudflareMetrics;
use super::mirror::Tempo;
use super::pace::Pace;
use super::places::{self, Place};
use crate::action::Surroundings;
use crate::config::CloudflareConfig;
use crate::standoff;
use crate::teardown::CloudflareRemoval;

/// Entries could not be removed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RemovalError {
    #[error(transparent)]
    Installation(#[from] InstallationError),
    #[error(transparent)]
    Login(#[from] LoginError),
    #[error("{}", .failures.join("; "))]
    Refused {
        /// Each with its place.
        failures: Vec<String>,
    },
    #[error("cannot read or write what is left at Cloudflare, kept in {}", .path.display())]
    Kept {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Removes all that is ours, or only counts it: at all places, also of former configurations. Returns what there was, also
/// where something could not be removed.
pub(crate) async fn remove_all(
    cloudflare: &CloudflareConfig,
    state_dirs: &[PathBuf],
    dry_run: bool,
) -> (Vec<CloudflareRemoval>, Result<(), RemovalError>) {
    let prepared = all_places(cloudflare, state_dirs).and_then(|places| Ok((places, Remover::new(cloudflare)?)));
    let (places, remover) = match prepared {
        Ok(prepared) => prepared,
        Err(error) => return (Vec::new(), Err(error)),
    };
    let (mut removals, mut failures) = (Vec::new(), Vec::new());
    for place in places {
        tracing::info!(%place, dry_run, "Removing our entries from Cloudflare");
        let Emptied { removed: entries, is_gone, failure } = remover.empty(&place, dry_run).await;
        failures.extend(failure.map(|failure| format!("{place}: {failure}{}", advice(&place, cloudflare, state_dirs))));
        if entries > 0 || is_gone {
            removals.push(CloudflareRemoval { place: place.to_string(), entries, is_gone });
        }
    }
    let done = match failures.is_empty() {
        true if dry_run => Ok(()),
        true => forget(state_dirs),
        false => Err(RemovalError::Refused { failures }),
    };
    (removals, done)
}

/// Where entries of ours may stand.
fn all_places(cloudflare: &CloudflareConfig, state_dirs: &[PathBuf]) -> Result<BTreeSet<Place>, RemovalError> {
    let mut places = BTreeSet::new();
    for dir in state_dirs {
        let kept = places::read(dir);
        places.extend(kept.map_err(|source| RemovalError::Kept { path: places::file(dir), source })?);
    }
    for name in installation::known(cloudflare.installation.as_deref(), state_dirs)? {
        places.extend(Place::all(&name, &cloudflare.scope));
    }
    if places.is_empty() { Err(InstallationError::Unknown.into()) } else { Ok(places) }
}

/// How to end it with a place that is kept, that the configuration names no more, and that may be gone.
fn advice(place: &Place, cloudflare: &CloudflareConfig, state_dirs: &[PathBuf]) -> String {
    let is_former = !Place::all(&place.installation, &cloudflare.scope).contains(place);
    let keeper = state_dirs.iter().find(|dir| places::read(dir).is_ok_and(|kept| kept.contains(place)));
    keeper.filter(|_| is_former).map_or_else(String::new, |dir| format!("; {}", place.advice(dir)))
}

/// Nothing stands anywhere any more.
fn forget(state_dirs: &[PathBuf]) -> Result<(), RemovalError> {
    // Who is paused there, and not gone, adds them again one day, and must know of them then.
    for dir in state_dirs.iter().filter(|dir| !dir.join(standoff::FILE).exists()) {
        let forgotten = places::write(dir, &BTreeSet::new());
        forgotten.map_err(|source| RemovalError::Kept { path: places::file(dir), source })?;
    }
    Ok(())
}

/// What a removal needs.
#[derive(Debug)]
struct Remover<'a> {
    config: &'a CloudflareConfig,
    client: Client,
    clock: Clock,
    tempo: Tempo,
}

impl<'a> Remover<'a> {
    fn new(config: &'a CloudflareConfig) -> Result<Self, RemovalError> {
        let (clock, tempo) = (Clock::system(), Tempo::default());
        let pace = Arc::new(Pace::new(config.calls_max, tempo.window, clock.clone()));
        let login = Login::read(&config.login)?;
        let client = Client::new(config, login, pace, tempo.call_max, CloudflareMetrics::default())?;
        Ok(Self { config, client, clock, tempo })
    }

    async fn empty(&self, place: &Place, dry_run: bool) -> Emptied {
        let Self { config, client, clock, tempo } = self;
        former::clear(client, place, former::Way { config, tempo, clock, dry_run, is_awaited: true }).await
    }
}

/// What is left at Cloudflare although the configuration does not name it any more, for people.
pub(crate) fn left_behind(state_dirs: &[PathBuf]) -> Option<String> {
    let told = |dir: &PathBuf| {
        let places = places::read(dir).unwrap_or_else(|error| {
            tracing::warn!(path = %places::file(dir).display(), %error, "Not known what is left at Cloudflare");
            BTreeSet::new()
        });
        let names: Vec<String> = places.iter().map(ToString::to_string).collect();
        (!names.is_empty()).then(|| {
            let (names, file) = (names.join(", "), places::file(dir));
            format!(
                "bans at {names} have no end of their own, and `[enforce.cloudflare]` is gone: configure it again and run \
                 `portcullis enforce --teardown`, or, where another host has taken over, remove {}",
                file.display()
            )
        })
    };
    state_dirs.iter().find_map(told)
}

/// Says on the board what is left, where Cloudflare is not configured.
pub(crate) fn report_left_behind(around: &Surroundings) {
    let state_dirs: Vec<PathBuf> = around.state_dir.iter().cloned().collect();
    if let Some(text) = left_behind(&state_dirs) {
        tracing::warn!(reason = text, "Bans are left at Cloudflare");
        let detail = vec!["not configured any more".to_owned()];
        let report = BackendReport { name: NAME.to_owned(), detail, standby: true, ..BackendReport::default() };
        around.board.put(report, vec![Problem::warning(text)]);
    }
}
