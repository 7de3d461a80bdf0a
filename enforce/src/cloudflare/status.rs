//! What `status` shows of Cloudflare. Texts of problems are stable: counts stand in the details.

use proto::report::{BackendReport, Problem};
use proto::time::Timestamp;

use super::NAME;
use super::client::LoginError;
use super::former::Former;
use super::installation::InstallationError;
use super::metrics::CloudflareMetrics;
use super::mirror::{Mirror, Summary};
use super::usage::Usage;
use crate::config::{CloudflareConfig, Mode, Scope};
pub(super) use crate::reconcile::chain_of as chain;

/// What it is made of.
#[derive(Debug)]
pub(super) struct Status<'a> {
    pub(super) config: &'a CloudflareConfig,
    /// `None` where none was made yet.
    pub(super) installation: &'a Result<Option<String>, InstallationError>,
    pub(super) login_error: Option<&'a LoginError>,
    pub(super) mirror: Option<&'a Mirror>,
    /// Set where another host does the work, with its name, where that is known.
    pub(super) holder: Option<Option<String>>,
    /// Where it cannot be seen whose work it is.
    pub(super) duty_problem: Option<Problem>,
    pub(super) usage: Option<Usage>,
    pub(super) former: &'a Former,
    pub(super) dry_run: bool,
}

impl Status<'_> {
    /// The report, and what is wrong. Sets the gauges.
    pub(super) fn report(&self, metrics: &CloudflareMetrics, now: Timestamp) -> (BackendReport, Vec<Problem>) {
        let mut report =
            BackendReport { name: NAME.to_owned(), detail: vec![self.scope()], ..BackendReport::default() };
        let summary = self.mirror.map(Mirror::summary).unwrap_or_default();
        let gauge = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        let waiting = summary.additions + summary.removals;
        metrics.entries.set(gauge(summary.entries));
        metrics.queue.set(gauge(waiting));
        metrics.queue_age_seconds.set(summary.oldest.map_or(0, |oldest| gauge(now.since(oldest).as_secs() as usize)));
        metrics.left_out.set(gauge(summary.left_out));
        if let Some(holder) = &self.holder {
            report.standby = true;
            report.detail.push(match holder {
                Some(node) => format!("done by {node}"),
                None => "done by no host yet".to_owned(),
            });
            return (report, self.problems_of_host());
        }
        if let Some(mirror) = self.mirror {
            let desired = mirror.wishes().desired();
            report.desired = desired.count() as u64;
            report.guarded = desired.refused_count() as u64;
        }
        report.members = summary.entries as u64;
        report.revision = if self.dry_run { 0 } else { summary.confirmed };
        report.repairs = summary.repairs;
        // Whoever solves a challenge passes, what a list does is up to rules of others, and not every ban may be there.
        let turns_away = self.config.mode == Mode::Block && !matches!(self.config.scope, Scope::List { .. });
        let absent = summary.left_out + summary.holed + summary.unsayable + summary.taken + summary.refused;
        report.lets_some_pass = !turns_away || absent > 0;
        report.waiting = waiting as u64;
        report.detail.extend(self.details(&summary));
        let mut problems = self.problems_of_host();
        problems.extend(self.problems(&summary));
        problems.extend(self.former.problems());
        (report, problems)
    }

    fn scope(&self) -> String {
        let mode = self.config.mode.as_str();
        match &self.config.scope {
            Scope::User => format!("access rules of the user: {mode}"),
            Scope::Zones(zones) => format!("access rules of {} zones: {mode}", zones.len()),
            Scope::Account(_) => format!("access rules of an account: {mode}"),
            Scope::List { list, .. } => format!("list ${list}"),
        }
    }

    fn details(&self, summary: &Summary) -> Vec<String> {
        let named = |name: &Option<String>| match name {
            Some(name) => format!("installation {name}"),
            None => "no installation yet: its name is made at the first start".to_owned(),
        };
        let mut details: Vec<String> = self.installation.iter().map(named).collect();
        let waiting = format!("{} to add, {} to remove", summary.additions, summary.removals);
        if self.dry_run {
            details.push(format!("dry run: nothing is changed; {waiting}"));
        } else if summary.additions + summary.removals > 0 {
            details.push(format!("waiting: {waiting}"));
        }
        details.extend(self.former.detail());
        let counts = [
            (summary.left_out, "left out, as entries_max is reached"),
            (summary.holed, "left out, as they hold guarded addresses"),
            (summary.unsayable, "bans left out, as Cloudflare has no entries of their size"),
            (summary.taken, "left to entries that are not ours"),
            (summary.refused, "refused by Cloudflare"),
        ];
        details.extend(counts.iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!("{count} {what}")));
        let others = summary.others.iter().map(|(name, count)| format!("{name} ({count})"));
        let others: Vec<String> = others.collect();
        if !others.is_empty() {
            details.push(format!("entries of other installations, left alone: {}", others.join(", ")));
        }
        details
    }

    fn problems_of_host(&self) -> Vec<Problem> {
        let installation = self.installation.as_ref().err().map(|error| Problem::degraded(chain(error)));
        let login = self.login_error.map(|error| Problem::degraded(chain(error)));
        installation.into_iter().chain(login).chain(self.duty_problem.clone()).collect()
    }

    fn problems(&self, summary: &Summary) -> Vec<Problem> {
        let troubles = summary.troubles.iter().map(|(place, text)| Problem::degraded(format!("{place}: {text}")));
        let mut problems: Vec<Problem> = troubles.collect();
        if summary.left_out > 0 {
            let text = "entries_max is reached: bans with the shortest remainder are not at Cloudflare";
            problems.push(Problem::degraded(text));
        }
        let mut warn = |count: usize, text: &str| {
            if count > 0 {
                problems.push(Problem::warning(text));
            }
        };
        warn(summary.taken, "some banned clients have entries that are not ours, which stay as they are");
        warn(summary.refused, "Cloudflare refuses some entries");
        warn(summary.holed, "some bans hold addresses that may not be banned, and are there only in part");
        warn(summary.unsayable, "some bans cannot be said at Cloudflare without banning more");
        match self.usage {
            Some(Usage::Unused) => problems.push(Problem::degraded(
                "no custom rule uses the list, so it bans nobody: make one for every zone, `ip.src in $LIST`, block",
            )),
            Some(Usage::Unseen(why)) => {
                let text = format!("cannot tell whether a custom rule uses the list, because {}", why.as_str());
                problems.push(Problem::warning(text));
            }
            Some(Usage::Used) | None => {}
        }
        problems
    }
}
