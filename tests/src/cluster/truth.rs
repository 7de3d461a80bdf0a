//! What a cluster must have decided, counted by brute force over the union of all its logs, and the comparison with what
//! the operator, third parties and every kernel see of it.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};
use proto::time::{Clock, Timestamp};
use serde_json::Value;

use super::{CONVERGENCE, Cluster};
use crate::brute::{self, Ban, Escalation, Rule};
use crate::portcullis::wait_until;

/// Kernels count whole seconds, and a set is filled a moment after it was planned.
const END_TOLERANCE_MS: i64 = 5_000;

/// The bans of a cluster.
#[derive(Debug)]
pub struct Truth {
    bans: BTreeMap<String, Ban>,
    /// Whose requests were just enough: which of them made the ban does not depend on the order of their arrival.
    certain: BTreeSet<String>,
}

impl Truth {
    /// Of the lines in the logs of all edges. Every client has one offence at most.
    pub fn of(cluster: &Cluster, rule: &Rule) -> Result<Self> {
        let logs: Vec<String> =
            cluster.edges.iter().map(|edge| std::fs::read_to_string(edge.access_log())).collect::<Result<_, _>>()?;
        let lines = brute::merge(&logs);
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        for client in lines.iter().filter(|line| (rule.matches)(line)).filter_map(|line| line.client) {
            *counts.entry(brute::target(client)).or_default() += 1;
        }
        let list = brute::bans(&lines, std::slice::from_ref(rule), Escalation::default());
        let total = list.len();
        let bans: BTreeMap<String, Ban> = list.into_iter().map(|ban| (ban.target.clone(), ban)).collect();
        ensure!(bans.len() == total, "a client has two offences: the model cannot tell when each was seen");
        let certain = bans.keys().filter(|target| counts.get(*target) == Some(&rule.max_retry)).cloned().collect();
        Ok(Self { bans, certain })
    }

    /// Who is banned.
    pub fn targets(&self) -> BTreeSet<String> {
        self.bans.keys().cloned().collect()
    }

    /// Waits until every kernel holds these bans and no other, then compares all else.
    pub fn check(&self, cluster: &Cluster) -> Result<()> {
        let targets = self.targets();
        let same = cluster.wait_kernels("every kernel holds the truth", |banned| *banned == targets);
        same.with_context(|| self.differences(cluster))?;
        // A detect may have read the state later than the hosts.
        eventually("`bans` lists the truth", || self.check_records(cluster))?;
        self.check_ends(cluster)?;
        // A ban is in force before it is announced, and a replica may answer that has not heard of it.
        eventually("every ban is announced", || self.check_events(cluster))
    }

    fn differences(&self, cluster: &Cluster) -> String {
        let targets = self.targets();
        let tell = |banned: &BTreeSet<String>| {
            let missed: Vec<_> = targets.difference(banned).collect();
            let invented: Vec<_> = banned.difference(&targets).collect();
            format!("missed {missed:?}, invented {invented:?}")
        };
        let kernels = cluster.kernels().unwrap_or_default();
        kernels.iter().map(tell).collect::<Vec<_>>().join("\n")
    }

    /// The operator sees each ban once, as a first offence, with the evidence that the lines give.
    fn check_records(&self, cluster: &Cluster) -> Result<()> {
        let records = cluster.bans()?;
        let told: BTreeSet<String> =
            records.iter().filter_map(|ban| Some(ban["target"].as_str()?.to_owned())).collect();
        ensure!(told == self.targets() && records.len() == told.len(), "`bans` lists {records:?}");
        for record in &records {
            let ban = record["target"].as_str().and_then(|target| self.bans.get(target)).context("no such ban")?;
            let counts = (record["ban_count"].as_u64(), record.pointer("/evidence/failures").and_then(Value::as_u64));
            ensure!(counts == (Some(ban.ban_count), Some(ban.failures)), "counted {counts:?}: {record}");
            if self.certain.contains(&ban.target) {
                let moments = [&record["banned_at"], &record["expires_at"]].map(Value::as_str);
                ensure!(moments == [Some(&*ban.banned_at), Some(&*ban.expires_at)], "expected {ban:?}, got {record}");
            }
        }
        Ok(())
    }

    /// Every kernel ends each ban when it must end.
    fn check_ends(&self, cluster: &Cluster) -> Result<()> {
        for edge in &cluster.edges {
            let before = Clock::system().now();
            let banned = edge.banned()?;
            let after = Clock::system().now();
            for target in &self.certain {
                let end = Timestamp::parse(&self.bans[target].expires_at).context("no time")?.as_millis();
                let left = banned.get(target).copied().flatten().context("a ban without an end")?;
                let left = i64::try_from(left)? * 1_000;
                let range = before.as_millis() + left - END_TOLERANCE_MS..=after.as_millis() + left + END_TOLERANCE_MS;
                ensure!(range.contains(&end), "{}: {target} has {left} ms left, and ends at {end}", edge.name());
            }
        }
        Ok(())
    }

    /// Each ban was announced with one id, and nothing was lifted.
    fn check_events(&self, cluster: &Cluster) -> Result<()> {
        let mut ids: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for event in cluster.events()? {
            let text = |key: &str| event[key].as_str().map(str::to_owned).with_context(|| format!("no {key}: {event}"));
            match text("type")?.as_str() {
                "io.portcullis.ban.v1" => {
                    ids.entry(text("subject")?).or_default().insert(text("id")?);
                }
                "io.portcullis.unban.v1" => ensure!(false, "nobody was to be unbanned: {event}"),
                _ => {}
            }
        }
        let announced: BTreeSet<String> = ids.keys().cloned().collect();
        ensure!(announced == self.targets(), "announced {announced:?}, banned {:?}", self.targets());
        let doubled: Vec<_> = ids.iter().filter(|(_, ids)| ids.len() != 1).collect();
        ensure!(doubled.is_empty(), "announced twice: {doubled:?}");
        Ok(())
    }
}

/// Checks again and again until all is well; fails with what was found last.
fn eventually(what: &str, mut check: impl FnMut() -> Result<()>) -> Result<()> {
    let mut found = Ok(());
    let well = wait_until(what, CONVERGENCE, || {
        found = check();
        found.is_ok().then_some(())
    });
    well.or(found)
}
