//! Places that the configuration named before: emptied once all stands where it should stand now.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::time::Duration;

use proto::report::Problem;
use proto::time::{Clock, Timestamp};
use tokio::time::sleep;

use super::call::{Answer, Call, CallError};
use super::client::Client;
use super::mirror::{Mark, Mirror, Tempo};
use super::places::{self, Place};
use super::status::chain;
use crate::config::CloudflareConfig;
use crate::guard::{Guard, GuardFacts};

/// How long after a failure it is tried again.
const PAUSE: Duration = Duration::from_secs(300);
/// How often somebody who waits for an answer is told so.
const WAIT_TOLD: Duration = Duration::from_secs(10);

/// Those that may still hold entries of ours.
#[derive(Debug, Default)]
pub(super) struct Former {
    state_dir: PathBuf,
    current: BTreeSet<Place>,
    left: BTreeSet<Place>,
    /// Why the last try failed.
    problems: BTreeMap<Place, Problem>,
    /// The place that failed last: others come before it again.
    failed: Option<Place>,
    due: Timestamp,
}

impl Former {
    /// Keeps in `state_dir` that entries may stand at `current` from now on. What else is kept there is former.
    pub(super) fn begin(state_dir: &Path, current: BTreeSet<Place>) -> Self {
        let kept = places::read(state_dir).unwrap_or_else(|error| {
            let path = places::file(state_dir);
            tracing::warn!(path = %path.display(), %error, "Not known where entries stood at Cloudflare");
            BTreeSet::new()
        });
        let left = kept.difference(&current).cloned().collect();
        let former = Self { state_dir: state_dir.to_owned(), current, left, ..Self::default() };
        former.keep();
        former
    }

    fn keep(&self) {
        let places = self.current.union(&self.left).cloned().collect();
        if let Err(error) = places::write(&self.state_dir, &places) {
            let path = places::file(&self.state_dir);
            tracing::warn!(path = %path.display(), %error, "A later change of the scope may leave entries at Cloudflare");
        }
    }

    /// The place to empty now.
    pub(super) fn due(&self, now: Timestamp) -> Option<&Place> {
        let after = self.failed.as_ref().and_then(|failed| self.left.iter().find(|place| *place > failed));
        after.or(self.left.first()).filter(|_| now >= self.due)
    }

    /// Takes what came of it.
    pub(super) fn take(&mut self, place: &Place, emptied: &Emptied, now: Timestamp) {
        let Some(failure) = &emptied.failure else {
            match emptied.is_gone {
                true => tracing::info!(%place, "A former list is not at Cloudflare any more"),
                false => tracing::info!(%place, removed = emptied.removed, "Emptied a former place at Cloudflare"),
            }
            self.left.remove(place);
            self.problems.remove(place);
            self.keep();
            return;
        };
        let text = format!(
            "bans of a former configuration have no end of their own and cannot be removed: {place}: {failure}; {}",
            place.advice(&self.state_dir)
        );
        tracing::warn!(reason = text, "Former place at Cloudflare not emptied");
        self.problems.insert(place.clone(), Problem::degraded(text));
        if self.left.last() == Some(place) {
            self.due = now.saturating_add(PAUSE);
        }
        self.failed = Some(place.clone());
    }

    /// What is left to do, for people.
    pub(super) fn detail(&self) -> Option<String> {
        let left: Vec<String> = self.left.iter().map(ToString::to_string).collect();
        (!left.is_empty()).then(|| format!("emptied when all stands here: {}", left.join(", ")))
    }

    /// What is wrong.
    pub(super) fn problems(&self) -> impl Iterator<Item = Problem> {
        self.problems.values().cloned()
    }
}

/// How a place is emptied.
#[derive(Clone, Copy, Debug)]
pub(super) struct Way<'a> {
    /// Of all but the place.
    pub(super) config: &'a CloudflareConfig,
    pub(super) tempo: &'a Tempo,
    pub(super) clock: &'a Clock,
    /// Only count.
    pub(super) dry_run: bool,
    /// Somebody waits for it, and is told what for.
    pub(super) is_awaited: bool,
}

/// What came of emptying a place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Emptied {
    /// Entries of ours that are gone, also where others could not be removed; in a dry run those that are there.
    pub(super) removed: usize,
    /// The account has no such list any more, and so nothing of ours in it.
    pub(super) is_gone: bool,
    /// Why something may be left.
    pub(super) failure: Option<String>,
}

/// Removes all that is ours at `place`.
pub(super) async fn clear(client: &Client, place: &Place, way: Way<'_>) -> Emptied {
    let Way { config, tempo, clock, dry_run, .. } = way;
    let client = client.at(place.scope());
    let config = CloudflareConfig { scope: place.scope(), ..config.clone() };
    let guard = Guard::new(&GuardFacts::default());
    let mut mirror = Mirror::new(&config, Mark::new(&place.installation), guard, tempo.clone(), 1);
    if dry_run {
        mirror.set_read_only();
    }
    mirror.handle_pause(true, clock.now());
    loop {
        let summary = mirror.summary();
        let removed = if dry_run { summary.entries } else { summary.removed };
        if mirror.lacks_list() {
            return Emptied { removed, is_gone: true, failure: None };
        }
        let Some(call) = mirror.next(clock.raw()) else {
            let failure = summary.troubles.into_iter().next().map(|(_, text)| text);
            match mirror.pause(clock.raw()).filter(|_| failure.is_none()) {
                None => return Emptied { removed, is_gone: false, failure },
                Some(pause) => sleep(pause).await,
            }
            continue;
        };
        let answer = ask(&client, &call, place, way.is_awaited).await;
        mirror.handle(call, answer, clock.raw());
    }
}

/// Carries out a call; who waits for it is told so.
async fn ask(client: &Client, call: &Call, place: &Place, is_awaited: bool) -> Result<Answer, CallError> {
    let mut asked = pin!(client.carry_out(call));
    loop {
        tokio::select! {
            answer = &mut asked => {
                if let Some(error) = answer.as_ref().err().filter(|_| is_awaited) {
                    tracing::warn!(%place, error = chain(error), "A call of Cloudflare failed");
                }
                return answer;
            }
            () = sleep(WAIT_TOLD), if is_awaited => {
                tracing::warn!(%place, "Waiting for Cloudflare to answer, or to take more calls");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Scope;

    #[test]
    fn each_place_that_cannot_be_emptied_is_said_with_what_ends_it_until_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let zones = ["a", "b"].map(|zone| Place::all("me", &Scope::Zones(vec![zone.to_owned()])).pop_first().unwrap());
        places::write(dir.path(), &zones.iter().cloned().collect()).unwrap();
        let mut former = Former::begin(dir.path(), Place::all("me", &Scope::User));
        let failed = Emptied { failure: Some("refused".to_owned()), ..Emptied::default() };
        for zone in &zones {
            former.take(zone, &failed, Timestamp::from_secs(1));
        }
        let texts: Vec<String> = former.problems().map(|problem| problem.text).collect();
        let file = places::file(dir.path());
        for (zone, text) in ["a", "b"].iter().zip(&texts) {
            let kept = format!(r#"take {{"installation":"me","at":{{"zone":"{zone}"}}}} out of {}"#, file.display());
            assert!(text.contains(&format!("zone {zone} (installation me): refused; if it is gone")), "{text}");
            assert!(text.ends_with(&kept), "{text}");
            // As it stands there.
            assert!(std::fs::read_to_string(&file).unwrap().contains(&format!(r#"{{"zone":"{zone}"}}"#)));
        }
        former.take(&zones[0], &Emptied::default(), Timestamp::from_secs(2));
        assert_eq!((texts.len(), former.problems().count()), (2, 1));
    }
}
