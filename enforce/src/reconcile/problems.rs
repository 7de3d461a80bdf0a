//! What is not as it should be, for people.

use proto::report::Problem;

use crate::reconcile::{Reconciler, chain_of};

impl Reconciler {
    /// What is not as it should be.
    pub(crate) fn problems(&self) -> Vec<Problem> {
        let mut problems: Vec<Problem> = self.unavailable.iter().cloned().collect();
        for error in &self.blind {
            let text = format!("the guard knows only what the host said before: {}", chain_of(error));
            problems.push(Problem::degraded(text));
        }
        for (id, _) in self.kernel.sets.iter().filter(|(id, set)| set.is_beyond_repair(**id)) {
            let lost =
                if id.holds_bans() { "nobody is banned by it" } else { "a wider ban could catch guarded addresses" };
            let text = format!(
                "set {} is not as we make it and cannot be replaced while rules use it; {lost}; stop, remove it with \
                 --teardown and start again",
                id.name()
            );
            problems.push(Problem::degraded(text));
        }
        if let Some(failure) = &self.failure {
            problems.push(Problem::degraded(format!("kernel sets: {failure}")));
        }
        if let Some((target, why)) = self.refused.first_key_value() {
            let text = format!("the kernel refuses {} bans, such as {target}: {why}", self.refused.len());
            problems.push(Problem::degraded(text));
        }
        let left_out = self.desired.left_out();
        if left_out > 0 {
            let text = format!(
                "{left_out} bans are not in force because bans_max is {}; those that end soonest are left out",
                self.frame.bans_max
            );
            problems.push(Problem::degraded(text));
        }
        for &family in &self.frame.families {
            let overflow = self.frame.guard_overflow(family);
            if overflow > 0 {
                let text = format!(
                    "{overflow} {} networks of never_ban do not fit into the kernel; a wider ban could catch them",
                    family.as_str()
                );
                problems.push(Problem::degraded(text));
            }
        }
        problems
    }
}
