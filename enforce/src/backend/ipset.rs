//! Kernel sets through the program `ipset`: members go through `ipset restore`, one process a batch.
//!
//! `restore` stops at the first line that the kernel refuses, and may forget lines before it that it had not sent yet.
//! Such a batch is taken up again around the refused line: members may be added twice without harm.
//! Most of the time that such a process takes is its start, so one is started ahead and waits for the next batch; when we
//! end, however that is, its input ends and it has done nothing.
//! It asks the kernel about a set at each member, unless it knows the set from a line that makes it; so a large batch begins
//! with lines that make its sets as they are. That halves the batch's time, and changes nothing as long as they are there.
//! Listing needs the whole set's time in the kernel, so it is for [`Ipset::observe`] only.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use proto::time::Clock;

use crate::backend::subsystem::{self, Ask, Subsystem};
use crate::backend::{Applied, Refused};
use crate::command::{self, CommandError, Started};
use crate::plan::{Family, Form, Held, Kernel, KernelSet, SetId, Step};

/// A set that is made to see whether it can be made.
pub(crate) const PROBE: &str = "portcullis-probe";
/// Refused lines of one batch after which the rest of it is left for the next look.
const REFUSED_MAX: usize = 100;
/// Steps of one process at most, so that a batch that has to be taken up again stays cheap.
const BATCH_MAX: usize = 16_384;
/// Steps of a process from which on it saves more than it costs to look how the sets were made.
const INTRODUCED_MIN: usize = 1_000;
/// Members of a new set for each bucket, of 12 places: one that runs full makes the set grow.
const MEMBERS_OF_BUCKET: usize = 2;
/// Buckets of a set for few, as `ipset` makes it unless told.
const BUCKETS_MIN: usize = 1_024;

/// The program. Clones share the process that waits.
#[derive(Clone, Debug)]
pub(crate) struct Ipset {
    program: PathBuf,
    /// `ipset restore`, for the next batch.
    ahead: Arc<Mutex<Option<Started>>>,
    /// How the kernel is asked what it has.
    ask: Ask,
}

/// A set's header, as `ipset list -t` shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) maxelem: u32,
    pub(crate) form: Form,
    /// Members, some of which may have just ended.
    pub(crate) count: usize,
}

enum Batch {
    Done,
    /// The line of this index (from 0) was refused.
    Refused(usize, String),
}

impl Ipset {
    /// Where the program is found.
    pub(crate) fn find() -> Option<Self> {
        command::find("ipset").map(Self::new)
    }

    fn new(program: PathBuf) -> Self {
        Self { program, ahead: Arc::default(), ask: subsystem::ASK_KERNEL }
    }

    /// Whether the kernel makes a set such as ours. It is named [`PROBE`] and left until [`Self::end_probe`].
    pub(crate) async fn probe(&self) -> Result<(), CommandError> {
        let args = ["-exist", "create", PROBE, "hash:net", "family", "inet", "timeout", "0", "comment"];
        command::succeed(&self.program, &args).await.map(drop)
    }

    /// Removes the probe's set.
    pub(crate) async fn end_probe(&self) {
        if let Err(error) = command::succeed(&self.program, &["destroy", PROBE]).await {
            tracing::debug!(error = %error, "Probe not removed");
        }
    }

    /// Carries the steps out, in order.
    pub(crate) async fn apply(&self, steps: &[Step]) -> Applied {
        let mut applied = Applied::default();
        let mut start = 0;
        while start < steps.len() {
            // A swap or removal may not be done twice, so it has a process of its own.
            let repeatable = steps[start..].iter().take(BATCH_MAX).take_while(|step| is_repeatable(step)).count();
            let end = start + repeatable.max(1);
            if let Err(error) = self.apply_batch(steps, start..end, &mut applied.refused).await {
                applied.stopped = Some((start, error));
                break;
            }
            if applied.refused.len() >= REFUSED_MAX && end < steps.len() {
                let said = "too many of its lines were refused".to_owned();
                let error = CommandError::Failed { command: "ipset restore".to_owned(), said };
                applied.stopped = Some((end, error));
                break;
            }
            start = end;
        }
        applied
    }

    async fn apply_batch(
        &self,
        steps: &[Step],
        range: std::ops::Range<usize>,
        refused: &mut Vec<Refused>,
    ) -> Result<(), CommandError> {
        let mut known = self.introduce(&steps[range.clone()]).await?;
        let mut start = range.start;
        let mut again_until = None;
        while start < range.end {
            let end = again_until.unwrap_or(range.end);
            match self.restore(&known, steps, start..end).await? {
                Batch::Done if end == range.end => return Ok(()),
                // What came before the refused line is in now; go on after it.
                Batch::Done => {
                    start = end + 1;
                    again_until = None;
                }
                // Somebody has just changed one of the sets.
                Batch::Refused(line, _) if line < known.len() => known.clear(),
                Batch::Refused(line, why) => {
                    let line = line - known.len();
                    let step = (start + line).min(end - 1);
                    refused.push(Refused { step, why });
                    if refused.len() >= REFUSED_MAX {
                        let rest = (step + 1..range.end).map(|step| Refused { step, why: "not tried".to_owned() });
                        refused.extend(rest);
                        refused.sort_by_key(|refused| refused.step);
                        return Ok(());
                    }
                    if line == 0 {
                        start = step + 1;
                        again_until = None;
                    } else {
                        again_until = Some(step);
                    }
                }
            }
        }
        Ok(())
    }

    /// Steps that make the sets of these as they are.
    async fn introduce(&self, steps: &[Step]) -> Result<Vec<Step>, CommandError> {
        if steps.len() < INTRODUCED_MIN {
            return Ok(Vec::new());
        }
        let (mut sets, mut made) = (BTreeSet::new(), BTreeSet::new());
        for step in steps {
            match step {
                Step::Add { set, .. } | Step::Delete { set, .. } => drop(sets.insert(*set)),
                Step::Create { set, .. } => drop(made.insert(*set)),
                Step::Swap(_) | Step::Destroy(_) | Step::Flush(_) => {}
            }
        }
        sets.retain(|set| !made.contains(set));
        if sets.is_empty() {
            return Ok(Vec::new());
        }
        let headers = match self.headers().await {
            // The batch would hang as well.
            Err(error @ CommandError::Deadline { .. }) => return Err(error),
            headers => headers.unwrap_or_default(),
        };
        let ours = headers.into_iter().filter(|(set, header)| sets.contains(set) && header.form == Form::Ours);
        Ok(ours.map(|(set, header)| Step::Create { set, maxelem: header.maxelem }).collect())
    }

    /// Lines are counted with those of `known`, which come first.
    async fn restore(
        &self,
        known: &[Step],
        steps: &[Step],
        range: std::ops::Range<usize>,
    ) -> Result<Batch, CommandError> {
        let mut input = String::with_capacity(range.len() * 64);
        for step in known {
            render(step, 0, &mut input);
        }
        for at in range {
            let coming = if let Step::Create { set, .. } = &steps[at] { count_coming(&steps[at..], *set) } else { 0 };
            render(&steps[at], coming, &mut input);
        }
        let ahead = self.lock().take().and_then(|mut ahead| ahead.is_alive().then_some(ahead));
        let restore = ahead.map_or_else(|| self.start(), Ok)?;
        let ended = restore.finish(input.as_bytes()).await?;
        self.start_ahead();
        if ended.success {
            return Ok(Batch::Done);
        }
        match parse_refusal(&ended.stderr) {
            Some((line, why)) => Ok(Batch::Refused(line, why)),
            None => Err(CommandError::Failed { command: "ipset restore".to_owned(), said: ended.stderr }),
        }
    }

    fn start(&self) -> Result<Started, CommandError> {
        command::start(&self.program, &["-exist", "restore"], Stdio::piped())
    }

    /// What cannot be started now is started, or refused, when it is needed.
    fn start_ahead(&self) {
        let mut ahead = self.lock();
        if ahead.is_none() {
            *ahead = self.start().ok();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Started>> {
        // It holds a process or none, whatever happened elsewhere.
        self.ahead.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Headers of our sets.
    pub(crate) async fn headers(&self) -> Result<BTreeMap<SetId, Header>, CommandError> {
        let listed = command::succeed(&self.program, &["list", "-t"]).await?;
        Ok(parse_headers(&String::from_utf8_lossy(&listed)))
    }

    /// The like for removal: a kernel without ipset holds no sets of ours.
    pub(crate) async fn headers_if_any(&self) -> Result<BTreeMap<SetId, Header>, CommandError> {
        match self.headers().await {
            Err(_) if subsystem::is_absent(Subsystem::Ipset, self.ask).await => Ok(BTreeMap::new()),
            headers => headers,
        }
    }

    /// Everything in our sets.
    pub(crate) async fn observe(&self, clock: &Clock) -> Result<Kernel, CommandError> {
        let mut kernel = Kernel::default();
        for (set, header) in self.headers().await? {
            let now = clock.now();
            let saved = command::succeed(&self.program, &["save", set.name()]).await?;
            let members = String::from_utf8_lossy(&saved)
                .lines()
                .filter_map(|line| parse_member(line, set))
                .map(|(target, timeout_s, comment)| {
                    let ends = timeout_s.map(|seconds| now.saturating_add(Duration::from_secs(seconds)));
                    (target, Held { ends, comment })
                })
                .collect();
            let Header { maxelem, form, .. } = header;
            kernel.sets.insert(set, KernelSet { maxelem, form, members });
        }
        self.start_ahead();
        Ok(kernel)
    }

    /// Whether the kernel's set holds the address.
    pub(crate) async fn test(&self, set: SetId, address: IpAddr) -> Result<bool, CommandError> {
        let ended = command::run(&self.program, &["test", set.name(), &address.to_string()]).await?;
        Ok(ended.success)
    }
}

fn is_repeatable(step: &Step) -> bool {
    !matches!(step, Step::Swap(_) | Step::Destroy(_))
}

/// How many members the steps put into the set that the first of them creates.
fn count_coming(steps: &[Step], wanted: SetId) -> usize {
    steps.iter().filter(|step| matches!(step, Step::Add { set, .. } if *set == wanted)).count()
}

/// `coming`: members that a new set is about to get. It is made as large as it will be, as growing costs a third of the time.
fn render(step: &Step, coming: usize, out: &mut String) {
    let written = match step {
        Step::Create { set, maxelem } => {
            let family = render_family(set.family());
            let extras = if set.holds_bans() { " timeout 0 comment" } else { "" };
            let buckets = (coming / MEMBERS_OF_BUCKET).next_power_of_two().max(BUCKETS_MIN);
            writeln!(out, "create {} hash:net family {family} hashsize {buckets} maxelem {maxelem}{extras}", set.name())
        }
        Step::Swap(family) => writeln!(out, "swap {} {}", SetId::Fresh(*family).name(), SetId::Bans(*family).name()),
        Step::Destroy(set) => writeln!(out, "destroy {}", set.name()),
        Step::Flush(set) => writeln!(out, "flush {}", set.name()),
        Step::Add { set, target, timeout_s: Some(timeout_s), comment } => {
            writeln!(out, "add {} {target} timeout {timeout_s} comment \"{comment}\"", set.name())
        }
        Step::Add { set, target, timeout_s: None, .. } => writeln!(out, "add {} {target}", set.name()),
        Step::Delete { set, target } => writeln!(out, "del {} {target}", set.name()),
    };
    // Writing to a string cannot fail.
    debug_assert!(written.is_ok());
}

fn render_family(family: Family) -> &'static str {
    match family {
        Family::V4 => "inet",
        Family::V6 => "inet6",
    }
}

/// `ipset v7.17: Error in line 3: Hash is full, cannot add more elements` -> (2, "Hash is full, ...").
fn parse_refusal(stderr: &str) -> Option<(usize, String)> {
    let (_, rest) = stderr.split_once("Error in line ")?;
    let (line, why) = rest.split_once(": ")?;
    let line: usize = line.parse().ok()?;
    Some((line.checked_sub(1)?, why.to_owned()))
}

fn parse_headers(listed: &str) -> BTreeMap<SetId, Header> {
    let mut headers = BTreeMap::new();
    for block in listed.split("\n\n") {
        let value = |key: &str| block.lines().find_map(|line| line.strip_prefix(key)).map(str::trim);
        let Some(set) = SetId::ALL.into_iter().find(|set| value("Name:") == Some(set.name())) else { continue };
        let words: Vec<&str> = value("Header:").unwrap_or_default().split(' ').collect();
        let after = |key: &str| words.iter().skip_while(|word| **word != key).nth(1).copied();
        let has = |key: &str| words.contains(&key);
        let same_kind = value("Type:") == Some("hash:net") && after("family") == Some(render_family(set.family()));
        let form = match has("timeout") == set.holds_bans() && has("comment") == set.holds_bans() {
            true if same_kind => Form::Ours,
            false if same_kind => Form::Extras,
            _ => Form::Foreign,
        };
        let maxelem = after("maxelem").and_then(|number| number.parse().ok()).unwrap_or(0);
        let count = value("Number of entries:").and_then(|number| number.parse().ok()).unwrap_or(0);
        headers.insert(set, Header { maxelem, form, count });
    }
    headers
}

/// `add portcullis-v4 192.0.2.0/24 timeout 99 comment "rule"`
fn parse_member(line: &str, set: SetId) -> Option<(proto::net::Target, Option<u64>, Arc<str>)> {
    let rest = line.strip_prefix("add ")?.strip_prefix(set.name())?.trim_start();
    let (target, mut rest) = rest.split_once(' ').unwrap_or((rest, ""));
    let target = target.parse().ok()?;
    let mut timeout_s = None;
    if let Some(after) = rest.strip_prefix("timeout ") {
        let (seconds, after) = after.split_once(' ').unwrap_or((after, ""));
        // 0 stands for a member without an end.
        timeout_s = seconds.parse().ok().filter(|seconds| *seconds > 0);
        rest = after;
    }
    let comment = rest.strip_prefix("comment \"").and_then(|rest| rest.strip_suffix('"')).unwrap_or_default();
    Some((target, timeout_s, comment.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_read_as_they_are_listed() {
        let set = SetId::Bans(Family::V4);
        let member = |line| parse_member(line, set).map(|(target, end, comment)| (target.to_string(), end, comment));
        let full = member("add portcullis-v4 192.0.2.0/24 timeout 99 comment \"a-b\"").unwrap();
        assert_eq!(full, ("192.0.2.0/24".to_owned(), Some(99), "a-b".into()));
        assert_eq!(member("add portcullis-v4 192.0.2.1 timeout 0").unwrap().1, None);
        assert_eq!(member("add portcullis-v4 192.0.2.1").unwrap(), ("192.0.2.1".to_owned(), None, "".into()));
        assert_eq!(member("create portcullis-v4 hash:net family inet"), None);
        let guard = parse_member("add portcullis-guard-v6 2001:db8::/64", SetId::Guard(Family::V6)).unwrap();
        assert_eq!(guard.0.to_string(), "2001:db8::/64");
    }

    #[test]
    fn headers_tell_ours_from_others_and_right_from_wrong() {
        let listed = "Name: portcullis-v4\nType: hash:net\nRevision: 7\nHeader: family inet hashsize 1024 maxelem 135168 \
            timeout 0 comment bucketsize 12 initval 0x4346bb28\nSize in memory: 456\nReferences: 0\nNumber of entries: 7\n\n\
            Name: portcullis-guard-v6\nType: hash:net\nHeader: family inet hashsize 1024 maxelem 65536\nNumber of entries: 0\n\n\
            Name: other\nType: hash:ip\nHeader: family inet hashsize 1024 maxelem 65536\nNumber of entries: 1\n";
        let headers = parse_headers(listed);
        let good = Header { maxelem: 135_168, form: Form::Ours, count: 7 };
        let bad = Header { maxelem: 65_536, form: Form::Foreign, count: 0 };
        assert_eq!(headers, [(SetId::Guard(Family::V6), bad), (SetId::Bans(Family::V4), good)].into());
        let extras = parse_headers("Name: portcullis-v4\nType: hash:net\nHeader: family inet maxelem 9 timeout 0\n");
        assert_eq!(extras[&SetId::Bans(Family::V4)].form, Form::Extras);
    }

    #[test]
    fn the_refused_line_is_found() {
        let said = "ipset v7.17: Error in line 3: Hash is full, cannot add more elements";
        assert_eq!(parse_refusal(said), Some((2, "Hash is full, cannot add more elements".to_owned())));
        assert_eq!(parse_refusal("ipset v7.17: Kernel error received: Operation not permitted"), None);
    }

    #[test]
    fn what_is_rendered_is_what_is_read() {
        let set = SetId::Bans(Family::V6);
        let target = "2001:db8::/64".parse().unwrap();
        let step = Step::Add { set, target, timeout_s: Some(5), comment: "rule-1".into() };
        let mut line = String::new();
        render(&step, 0, &mut line);
        assert_eq!(parse_member(line.trim(), set), Some((target, Some(5), "rule-1".into())));
    }

    #[test]
    fn a_new_set_has_room_for_what_is_about_to_come() {
        let set = |family| SetId::Fresh(family);
        let create = |family| Step::Create { set: set(family), maxelem: 9 };
        let add = |n: u32| Step::Add {
            set: set(Family::V4),
            target: std::net::Ipv4Addr::from_bits(n).to_string().parse().unwrap(),
            timeout_s: None,
            comment: "".into(),
        };
        let steps: Vec<Step> = [create(Family::V6), create(Family::V4)].into_iter().chain((0..5000).map(add)).collect();
        let coming = |steps: &[Step], family| {
            let mut line = String::new();
            render(&create(family), count_coming(steps, set(family)), &mut line);
            line
        };
        assert!(coming(&steps[1..], Family::V4).contains(" hashsize 4096 "), "half of 5,000, rounded up");
        assert!(coming(&steps, Family::V6).contains(" hashsize 1024 "));
    }

    #[test]
    fn a_process_that_ended_while_it_waited_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("ipset");
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/forgetful-ipset.sh");
        std::os::unix::fs::symlink(script, &program).unwrap();
        let set = SetId::Bans(Family::V4);
        let add = Step::Add { set, target: "192.0.2.1".parse().unwrap(), timeout_s: Some(9), comment: "r".into() };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let applied = runtime.block_on(async {
            let ipset = Ipset::new(program);
            ipset.start_ahead();
            let mut ahead = ipset.lock().take().unwrap();
            ahead.end().await;
            assert!(!ahead.is_alive());
            *ipset.lock() = Some(ahead);
            ipset.apply(&[add]).await
        });
        assert!(applied.stopped.is_none() && applied.refused.is_empty());
        assert!(std::fs::read_to_string(dir.path().join("applied")).unwrap().contains("192.0.2.1"));
    }

    #[tokio::test]
    async fn a_kernel_without_ipset_holds_no_sets_of_ours_and_one_that_fails_may() {
        let mut ipset = Ipset::new(command::find("false").unwrap());
        ipset.ask = |_| Err(nix::errno::Errno::EINVAL.into());
        assert!(ipset.headers().await.is_err(), "in use, that is a failure");
        assert!(ipset.headers_if_any().await.unwrap().is_empty());
        ipset.ask = |_| Ok(());
        assert!(ipset.headers_if_any().await.is_err());
    }

    #[test]
    fn a_large_batch_begins_with_how_its_sets_are_made_and_that_is_left_out_where_it_is_refused() {
        let header = |maxelem| {
            format!("Name: portcullis-v4\nType: hash:net\nHeader: family inet maxelem {maxelem} timeout 0 comment\n")
        };
        let add = |address: String| Step::Add {
            set: SetId::Bans(Family::V4),
            target: address.parse().unwrap(),
            timeout_s: Some(9),
            comment: "r".into(),
        };
        let taken = |range: std::ops::Range<usize>| range.map(|n| format!("198.51.{}.{}", n / 60, n % 60));
        let (first, last) = (taken(0..INTRODUCED_MIN), taken(INTRODUCED_MIN..2 * INTRODUCED_MIN));
        let steps: Vec<Step> = first.chain(["192.0.2.66".to_owned()]).chain(last).map(add).collect();
        for (maxelem, begins_with_it) in [(9, true), (66, false)] {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join("listed"), header(maxelem)).unwrap();
            let applied = apply_with_stand_in(&dir, &steps);
            assert_eq!(applied.refused.iter().map(|refused| refused.step).collect::<Vec<_>>(), [INTRODUCED_MIN]);
            let taken = std::fs::read_to_string(dir.path().join("applied")).unwrap();
            assert_eq!(taken.matches("add ").count(), steps.len() - 1);
            let first = taken.lines().next().unwrap();
            let create =
                format!("create portcullis-v4 hash:net family inet hashsize 1024 maxelem {maxelem} timeout 0 comment");
            assert_eq!(first == create, begins_with_it, "{first}");
        }
    }

    fn apply_with_stand_in(dir: &tempfile::TempDir, steps: &[Step]) -> Applied {
        let program = dir.path().join("ipset");
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/forgetful-ipset.sh");
        std::os::unix::fs::symlink(script, &program).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let applied = runtime.block_on(Ipset::new(program).apply(steps));
        assert!(applied.stopped.is_none());
        applied
    }

    /// Applies additions of 192.0.2.`from`..=`to` through the stand-in; the refused steps and what was taken.
    fn apply_to_stand_in(from: u8, to: u8) -> (Vec<usize>, BTreeSet<String>) {
        let dir = tempfile::tempdir().unwrap();
        let set = SetId::Bans(Family::V4);
        let add = |n| Step::Add {
            set,
            target: [192, 0, 2, n].map(|b| b.to_string()).join(".").parse().unwrap(),
            timeout_s: Some(9),
            comment: "r".into(),
        };
        let steps: Vec<Step> = (from..=to).map(add).chain([Step::Destroy(SetId::Fresh(Family::V4))]).collect();
        let applied = apply_with_stand_in(&dir, &steps);
        let taken = std::fs::read_to_string(dir.path().join("applied")).unwrap();
        assert_eq!(taken.matches("destroy").count(), 1, "what cannot be repeated is done once");
        let taken = taken.lines().filter_map(|line| parse_member(line, set)).map(|(target, ..)| target.to_string());
        (applied.refused.iter().map(|refused| refused.step).collect(), taken.collect())
    }

    #[test]
    fn a_refused_line_does_not_take_its_batch_along() {
        let (refused, taken) = apply_to_stand_in(60, 80);
        assert_eq!(refused, [6, 7, 8, 9]);
        assert_eq!(taken.len(), 17, "{taken:?}");
        let (refused, taken) = apply_to_stand_in(66, 70);
        assert_eq!((refused.len(), taken.len()), (4, 1), "the first line may be refused as well");
        let (refused, taken) = apply_to_stand_in(50, 69);
        assert_eq!((refused.len(), taken.len()), (4, 16), "and the last");
    }
}
