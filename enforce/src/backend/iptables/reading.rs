//! Rules of ours beside the ban sets: read and changed as those are, in the same variant of iptables.

use crate::backend::iptables::{Iptables, program_name};
use crate::command::CommandError;
use crate::config::Table;
use crate::plan::Family;
use crate::plan::rules::{Variant, View};

/// One family's rules.
#[derive(Debug)]
pub(crate) struct Reading {
    /// The variant that the host uses.
    pub(crate) variant: Variant,
    /// Why it is that one.
    pub(crate) why: &'static str,
    /// What it holds.
    pub(crate) view: View,
    /// The variant that is not in use, if it is there.
    pub(crate) other: Option<(Variant, View)>,
}

impl Iptables {
    /// Reads the family's rules; `None` where the family's program is not installed. Legacy tables are not woken.
    ///
    /// # Errors
    /// When one of the variants could not be read, so that it may hold the rules.
    pub(crate) async fn read(&mut self, family: Family) -> Result<Option<Reading>, CommandError> {
        self.calls.check_finished()?;
        let (mut views, unreadable) = self.look(family).await;
        if let Some(error) = unreadable {
            return Err(error);
        }
        let Some((variant, why)) = self.choose(family, &views) else { return Ok(None) };
        let view = views.remove(&variant).unwrap_or_default();
        Ok(Some(Reading { variant, why, view, other: views.pop_first() }))
    }

    /// Changes table filter by lines of `iptables-restore`: all of them or none. `what` names them where they fail.
    pub(crate) async fn change_filter(
        &mut self,
        (family, variant): (Family, Variant),
        lines: &[String],
        what: &str,
    ) -> Result<(), CommandError> {
        match self.programs.get(&(family, variant)) {
            Some(&programs) if !lines.is_empty() => self.calls.transact(programs, Table::Filter, lines, what).await,
            _ => Ok(()),
        }
    }

    /// What is in the family's variants, for removal; with the error where one could not be read.
    pub(crate) async fn read_all(&mut self, family: Family) -> (Vec<(Variant, View)>, Option<CommandError>) {
        let (views, unreadable) = self.look(family).await;
        (views.into_iter().collect(), unreadable)
    }
}

/// `iptables` or `ip6tables`, for people.
pub(crate) fn name(family: Family) -> &'static str {
    program_name(family)
}
