//! Changes nothing and says what would be done.

use crate::backend::Applied;
use crate::plan::{SetId, Step};

/// Bans and unbans of one batch that are logged one by one; more are counted.
const LOGGED_MAX: usize = 50;

/// Takes every step and does none.
#[derive(Clone, Debug)]
pub(crate) struct DryRun;

impl DryRun {
    /// Logs what would be done.
    #[expect(clippy::unused_self, reason = "back ends look alike")]
    pub(crate) fn apply(&self, steps: &[Step]) -> Applied {
        let bans = steps
            .iter()
            .filter(|step| matches!(step, Step::Add { set, .. } | Step::Delete { set, .. } if set.holds_bans()));
        for step in bans.clone().take(LOGGED_MAX) {
            match step {
                Step::Add { target, timeout_s, comment, .. } => {
                    tracing::info!(%target, rule = %comment, seconds = timeout_s, "Would ban");
                }
                Step::Delete { target, .. } => tracing::info!(%target, "Would unban"),
                _ => {}
            }
        }
        let others = bans.count().saturating_sub(LOGGED_MAX);
        if others > 0 {
            tracing::info!(bans = others, "Would change more bans");
        }
        for step in steps {
            match step {
                Step::Create { set: SetId::Bans(family), maxelem } => {
                    tracing::info!(family = family.as_str(), maxelem, "Would make a kernel set");
                }
                Step::Flush(SetId::Bans(family)) => tracing::info!(family = family.as_str(), "Would lift every ban"),
                _ => {}
            }
        }
        Applied::default()
    }
}
