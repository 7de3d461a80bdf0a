//! The search for a back end that works: in a task of its own, as programs that hang and locks that others hold take their
//! time. Meanwhile bans and pauses go on with what there is.

use tokio::task::{JoinError, JoinHandle};

use crate::choose::{self, Chosen, Method, Trial, Unchosen};
use crate::error::EnforceError;
use crate::pipeline::{Enforcer, finish};

/// Searches in a row that wait for what does not answer, `resync_interval` apart. After them what works is taken, even if it
/// is not the best: nobody is banned until then.
const UNDECIDED_MAX: u32 = 4;

/// One search at a time.
#[derive(Debug, Default)]
pub(super) struct Search {
    pub(super) job: Option<JoinHandle<Result<Chosen, Unchosen>>>,
    /// What is no change.
    but: Option<Method>,
    /// Searches in a row that could not tell what works.
    undecided: u32,
}

impl Search {
    /// How to try where there is no back end.
    fn trial(&self, dry_run: bool) -> Trial {
        match (dry_run, self.undecided < UNDECIDED_MAX) {
            (true, _) => Trial::DryRun,
            (false, true) => Trial::Patient,
            (false, false) => Trial::Strict,
        }
    }

    /// Counts a search where there is no back end.
    fn count(&mut self, unchosen: &Unchosen) {
        self.undecided += u32::from(unchosen.is_undecided);
        if unchosen.is_undecided && self.undecided == UNDECIDED_MAX {
            tracing::warn!(
                tries = UNDECIDED_MAX,
                reason = unchosen.text,
                "From now on any back end that works is taken"
            );
        }
    }

    /// Forgets what is under way. Programs that it runs are ended.
    pub(super) fn end(&mut self) {
        if let Some(job) = self.job.take() {
            job.abort();
        }
    }
}

impl Enforcer {
    /// Begins to look for a back end, where there is none.
    pub(super) fn begin_search(&mut self) {
        if self.search.job.is_none() && self.reconciler.lacks_back_end() {
            self.spawn_search(self.search.trial(self.inputs.dry_run), None);
        }
    }

    /// Begins to look for another back end; `but` is no change.
    pub(super) fn begin_search_anew(&mut self, but: Option<Method>) {
        if self.search.job.is_none() {
            self.spawn_search(Trial::Strict, but);
        }
    }

    fn spawn_search(&mut self, trial: Trial, but: Option<Method>) {
        let (config, clock) = (self.config.firewall.clone(), self.inputs.clock.clone());
        self.search.but = but;
        self.search.job = Some(tokio::spawn(async move { choose::choose(&config, trial, &clock).await }));
    }

    /// Whether what was found can take over: what works with the former back end has ended.
    pub(super) fn may_change_over(&self) -> bool {
        self.rules_job.is_none() && self.former.job.is_none()
    }

    /// Waits for the search at the start.
    pub(super) async fn await_search(&mut self) -> Result<(), EnforceError> {
        let Ok(done) = tokio::time::timeout(super::START_WAIT, finish(&mut self.search.job)).await else {
            let text = "it is not known yet which way to ban works here; it is being tried";
            self.reconciler.handle_no_choice(text.to_owned());
            return Ok(());
        };
        if self.take_search(done).await? {
            self.begin_observation(true);
            self.await_observation().await?;
            self.reconciler.begin_dry_run().await;
        }
        Ok(())
    }

    /// Takes what was found. Returns whether there is a new back end.
    pub(super) async fn take_search(
        &mut self,
        done: Result<Result<Chosen, Unchosen>, JoinError>,
    ) -> Result<bool, EnforceError> {
        let found = done.map_err(|source| EnforceError::Job { job: "looks for a firewall back end", source })?;
        let is_first = self.reconciler.lacks_back_end();
        match found {
            Ok(chosen) if is_first || Some(chosen.method) != self.search.but => {
                self.search.undecided = 0;
                self.reconciler.handle_choice(chosen).await;
                // A look at the former one is worth nothing.
                self.observe_job = None;
                self.take_new_rules();
                return Ok(true);
            }
            Err(unchosen) if is_first => {
                self.search.count(&unchosen);
                self.reconciler.handle_no_choice(unchosen.text);
            }
            // What is in use stays.
            Ok(_) | Err(_) => {}
        }
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_does_not_answer_is_waited_for_a_bounded_number_of_times() {
        let mut search = Search::default();
        assert_eq!(search.trial(true), Trial::DryRun);
        let undecided = Unchosen { text: "no answer".to_owned(), is_undecided: true };
        for _ in 0..UNDECIDED_MAX {
            assert_eq!(search.trial(false), Trial::Patient);
            search.count(&Unchosen { is_undecided: false, ..undecided.clone() });
            search.count(&undecided);
        }
        assert_eq!(search.trial(false), Trial::Strict);
    }
}
