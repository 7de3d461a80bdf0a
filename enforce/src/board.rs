//! What back ends beside the firewall say of themselves, gathered for the node's report, and where they are asked.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use proto::report::{BackendReport, Problem};

use crate::desk::Desk;

/// One place for all of them; clones are the same place.
#[derive(Clone, Debug, Default)]
pub(crate) struct Board {
    entries: Arc<Mutex<Entries>>,
    /// Where they are asked.
    pub(crate) desk: Desk,
}

/// By name of the back end.
type Entries = BTreeMap<String, (BackendReport, Vec<Problem>)>;

impl Board {
    /// What the back end that `report` names says from now on.
    pub(crate) fn put(&self, report: BackendReport, problems: Vec<Problem>) {
        // Entries are replaced whole, so a panic elsewhere cannot leave one half-written.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).insert(report.name.clone(), (report, problems));
    }

    /// Reports by name, and all problems, each after the name of its back end.
    pub(crate) fn all(&self) -> (Vec<BackendReport>, Vec<Problem>) {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut reports, mut problems) = (Vec::new(), Vec::new());
        for (name, (report, theirs)) in entries.iter() {
            reports.push(report.clone());
            let named = |problem: &Problem| Problem { text: format!("{name}: {}", problem.text), ..problem.clone() };
            problems.extend(theirs.iter().map(named));
        }
        (reports, problems)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_back_end_says_one_thing_at_a_time_and_its_problems_name_it() {
        let board = Board::default();
        let report = |name: &str, members| BackendReport { name: name.to_owned(), members, ..BackendReport::default() };
        board.put(report("b", 1), vec![Problem::degraded("old")]);
        let same = board.clone();
        same.put(report("b", 2), vec![Problem::warning("new")]);
        board.put(report("a", 3), Vec::new());
        let (reports, problems) = board.all();
        assert_eq!(reports, [report("a", 3), report("b", 2)]);
        assert_eq!(problems, [Problem::warning("b: new")]);
    }
}
