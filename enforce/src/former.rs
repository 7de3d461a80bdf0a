//! What a back end that is not in use any more left on the host: removed once, when the new one holds all bans.
//!
//! Without a firewall (`backend = "none"`) only what this installation left is removed, which a file in `state_dir` tells:
//! another one on this host may well enforce.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use proto::report::Problem;
use tokio::task::{JoinError, JoinHandle};

use crate::choose::Method;
use crate::config::FirewallConfig;
use crate::error::EnforceError;
use crate::host;
use crate::reconcile::chain_of;
use crate::teardown::{TeardownReport, clear_former};

/// Its name in `state_dir`. It holds the back end's name, for people.
pub(crate) const FILE: &str = "backend";

/// What became of a removal, or of a look at what there would be to remove.
#[derive(Debug)]
pub(crate) enum Outcome {
    Removed(Result<TeardownReport, EnforceError>),
    Looked(Result<TeardownReport, EnforceError>),
}

/// Whether it is gone.
#[derive(Debug, Default)]
pub(crate) struct Former {
    /// That we have enforced here.
    file: Option<PathBuf>,
    /// Nothing is left.
    pub(crate) is_cleared: bool,
    /// A removal has come to its end, whatever came of it, since this was last reset.
    pub(crate) was_tried: bool,
    pub(crate) job: Option<JoinHandle<Outcome>>,
    /// Resyncs since it was last looked for.
    pub(crate) waited: u32,
    /// What could not be removed. It is tried again at every resync.
    pub(crate) problem: Option<Problem>,
}

impl Former {
    /// Remembers in `state_dir`, if there is one.
    pub(crate) fn new(state_dir: Option<&Path>) -> Self {
        Self { file: state_dir.map(|dir| dir.join(FILE)), ..Self::default() }
    }

    /// We enforce by this from now on; what another left is to be removed.
    pub(crate) fn begin_use(&mut self, method: Method) {
        self.is_cleared = false;
        self.was_tried = false;
        let Some(file) = &self.file else { return };
        if let Err(error) = fs::write(file, format!("{}\n", method.backend())) {
            tracing::warn!(file = %file.display(), error = %error, "Back end not noted: a later \"none\" leaves its bans");
        }
    }

    /// Whether we have enforced here.
    pub(crate) fn was_used(&self) -> bool {
        self.file.as_ref().is_some_and(|file| file.exists())
    }

    /// Begins to remove all but what `kept` needs.
    pub(crate) fn begin(&mut self, kept: Option<Method>, config: &FirewallConfig) {
        if self.job.is_some() || !host::may_change_firewall() {
            return;
        }
        let config = config.clone();
        self.job = Some(tokio::spawn(async move { Outcome::Removed(clear_former(kept, &config, false).await) }));
    }

    /// Begins to look whether there is something to remove, which may not go yet.
    pub(crate) fn begin_look(&mut self, kept: Method, config: &FirewallConfig) {
        if self.job.is_none() && host::may_change_firewall() {
            let config = config.clone();
            self.job =
                Some(tokio::spawn(async move { Outcome::Looked(clear_former(Some(kept), &config, true).await) }));
        }
    }

    /// Takes the outcome; `used` tells whether some back end is in use.
    pub(crate) fn take(&mut self, used: bool, done: Result<Outcome, JoinError>) -> Result<(), EnforceError> {
        let done = done.map_err(|source| EnforceError::Job { job: "clears a former back end", source })?;
        let removed = match done {
            Outcome::Removed(removed) => removed,
            Outcome::Looked(found) => {
                self.take_look(found);
                return Ok(());
            }
        };
        self.was_tried = true;
        self.problem = match removed {
            Ok(removed) => {
                self.is_cleared = true;
                if !used {
                    self.forget();
                }
                if removed != TeardownReport::default() {
                    tracing::info!(
                        rules = removed.rules.join(", "),
                        sets = removed.sets.iter().map(|set| set.name).collect::<Vec<_>>().join(", "),
                        table = removed.table.is_some(),
                        "Removed what a former back end left"
                    );
                }
                None
            }
            // Programs of a back end that is not in use need not work.
            Err(EnforceError::Observe { .. }) => {
                self.is_cleared = true;
                None
            }
            Err(error) => {
                let text = format!("a former back end still bans: {}", chain_of(&error));
                tracing::warn!(reason = text, "Former back end not cleared");
                Some(Problem::warning(text))
            }
        };
        Ok(())
    }

    fn take_look(&mut self, found: Result<TeardownReport, EnforceError>) {
        let text = match found {
            Ok(found) if found == TeardownReport::default() => {
                self.problem = None;
                return;
            }
            // As for removing: programs of a back end that is not in use need not work.
            Err(EnforceError::Observe { .. }) => return,
            Ok(_) => "the one in use does not hold all bans yet".to_owned(),
            Err(error) => chain_of(&error),
        };
        let problem =
            Problem::warning(format!("a former back end still bans, and unbanning does not free there: {text}"));
        if self.problem.as_ref() != Some(&problem) {
            tracing::warn!(reason = problem.text, "Former back end not cleared");
            self.problem = Some(problem);
        }
    }

    fn forget(&self) {
        let Some(file) = &self.file else { return };
        match fs::remove_file(file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(file = %file.display(), error = %error, "Former back end not forgotten");
            }
            _ => {}
        }
    }
}
