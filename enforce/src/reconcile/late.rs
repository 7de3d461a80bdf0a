//! Changes of kernel sets that do not end in time: the role goes on without them.

use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::backend::{Applied, Sets};
use crate::plan::Step;
use crate::reconcile::{Reconciler, chain_of};

/// How long a change is waited for. 100,000 bans take a second; where a program hangs, reports and pauses have to go on.
const WAIT: Duration = Duration::from_secs(5);

type Done = (Vec<Step>, Applied);

/// The one change that is under way after its time.
#[derive(Debug, Default)]
pub(super) struct Late {
    job: Option<JoinHandle<Done>>,
    /// Something is to be changed once a look has shown that the kernel answers.
    pub(super) is_due: bool,
}

impl Late {
    pub(super) fn is_under_way(&self) -> bool {
        self.job.is_some()
    }

    /// Takes the steps. What does not end in time goes on, see [`Reconciler::late`].
    ///
    /// # Errors
    /// Why it is not done, for people.
    pub(super) async fn run(&mut self, sets: Sets, steps: Vec<Step>) -> Result<Done, String> {
        let mut job = tokio::spawn(async move {
            let applied = sets.apply(&steps).await;
            (steps, applied)
        });
        match timeout(WAIT, &mut job).await {
            Ok(done) => done.map_err(|error| format!("a change of kernel sets broke off: {error}")),
            Err(_) => {
                self.job = Some(job);
                Err(format!("a change is not done after {} s, and goes on", WAIT.as_secs()))
            }
        }
    }

    /// Waits no longer for what is under way, and ends the programs that it runs. A message to the kernel that is on its way
    /// may still arrive.
    pub(super) fn end(&mut self) {
        if let Some(job) = self.job.take() {
            job.abort();
        }
        self.is_due = false;
    }
}

impl Reconciler {
    /// Ends with a change that took too long; without one, never. Then everything is to be observed.
    pub(crate) async fn late(&mut self) {
        let Some(job) = &mut self.late.job else { return std::future::pending().await };
        let done = job.await;
        self.late.job = None;
        let text = match done {
            Ok((_, Applied { stopped: Some((_, error)), .. })) => chain_of(&error),
            Ok(_) => "what a change that took long has done is being looked at".to_owned(),
            Err(error) => format!("a change of kernel sets broke off: {error}"),
        };
        // What it did is found by a look.
        self.generation += 1;
        self.fail(text);
    }

    /// Whether a change that took too long may still come into effect.
    pub(crate) fn is_change_under_way(&self) -> bool {
        self.late.is_under_way()
    }

    /// Whether a change waits for a look at the kernel.
    pub(crate) fn is_change_due(&self) -> bool {
        self.late.is_due && !self.late.is_under_way()
    }
}
