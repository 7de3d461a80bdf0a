//! Questions that fail for longer than leaders are elected and servers restarted: most often a right is missing.

use std::time::Duration;

use super::{BusError, Connection};
use crate::report::Problem;
use crate::time::Timestamp;

/// How long a question must have failed before it is a problem.
const TROUBLE_AFTER: Duration = Duration::from_secs(10);

/// One question that is asked again and again.
#[derive(Clone, Debug, Default)]
pub(crate) struct Trouble {
    /// Of the first failure in a row.
    since: Option<Timestamp>,
    /// The failure that made it a problem; others in a row do not change what people read.
    told: Option<BusError>,
}

impl Trouble {
    /// Notes what came of it. Without a connection nothing can be said, and that there is none is said elsewhere.
    pub(crate) fn note(&mut self, connection: &Connection, outcome: Result<(), &BusError>) {
        self.note_at(outcome.err().filter(|_| connection.is_up()), connection.clock().raw());
    }

    fn note_at(&mut self, failure: Option<&BusError>, now: Timestamp) {
        let Some(failure) = failure else {
            *self = Self::default();
            return;
        };
        let since = *self.since.get_or_insert(now);
        if self.told.is_none() && now.since(since) >= TROUBLE_AFTER {
            self.told = Some(failure.clone());
        }
    }

    /// The failure, once it has lasted.
    pub(crate) fn lasting(&self) -> Option<&BusError> {
        self.told.as_ref()
    }
}

/// What people read: `what`, because of `error`. A missing right shows as silence alone.
pub(crate) fn problem(what: &str, error: &BusError) -> Problem {
    let rights = "(does this user of NATS have the rights that deploy/nats gives enforcers?)";
    Problem::degraded(if error.is_passing() { format!("{what}: {error} {rights}") } else { format!("{what}: {error}") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_a_problem_once_it_has_lasted_and_until_it_passes() {
        let silent = |what: &str| BusError::Silent { what: what.to_owned() };
        let mut trouble = Trouble::default();
        trouble.note_at(Some(&silent("a")), Timestamp::from_secs(100));
        trouble.note_at(Some(&silent("a")), Timestamp::from_secs(109));
        assert_eq!(trouble.lasting(), None, "an election takes as long");
        trouble.note_at(Some(&silent("b")), Timestamp::from_secs(110));
        trouble.note_at(Some(&silent("c")), Timestamp::from_secs(111));
        assert_eq!(trouble.lasting(), Some(&silent("b")), "what people read stays");
        trouble.note_at(None, Timestamp::from_secs(112));
        trouble.note_at(Some(&silent("a")), Timestamp::from_secs(121));
        assert_eq!(trouble.lasting(), None, "counted anew");
    }
}
