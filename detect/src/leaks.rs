//! What the engine needs from outside to tell whether bans bite: how back ends are, by their reports, and what the host says
//! that should have kept a client out, before anybody is alarmed.

use std::collections::BTreeMap;
use std::time::Duration;

use proto::api::{BackendHold, HoldState};
use proto::bus::memory::Question;
use proto::report::{BackendReport, NodeReport, Role};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use crate::engine::leak::{BackEnd, Confirmations, HostView, Keeper, Leak};

/// How long an enforcer may take to say what it holds.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);
/// Questions under way; the engine asks for fewer in a minute.
const ASKING_MAX: usize = 64;
/// Answers that an alarm quotes.
const QUOTED_MAX: usize = 3;

/// A leak, and what enforcers said of its client.
pub(crate) type Answered = (Box<Leak>, Vec<BackendHold>);

/// Questions about leaks that are under way.
#[derive(Debug)]
pub(crate) struct Inquiries {
    questions: mpsc::Sender<Question>,
    asking: JoinSet<Answered>,
}

impl Inquiries {
    /// To be asked through `questions`.
    pub(crate) fn new(questions: mpsc::Sender<Question>) -> Self {
        Self { questions, asking: JoinSet::new() }
    }

    /// Asks what holds the client.
    pub(crate) fn ask(&mut self, leak: Box<Leak>) {
        if self.asking.len() >= ASKING_MAX {
            return;
        }
        let questions = self.questions.clone();
        self.asking.spawn(async move {
            let (reply, answer) = oneshot::channel();
            let asked = async {
                questions.send(Question { address: leak.client, reply }).await.ok()?;
                answer.await.ok()
            };
            let holds = tokio::time::timeout(ANSWER_TIMEOUT, asked).await.ok().flatten();
            (leak, holds.unwrap_or_default())
        });
    }

    /// The next answer; never where nothing was asked.
    pub(crate) async fn next(&mut self) -> Answered {
        loop {
            match self.asking.join_next().await {
                Some(Ok(answered)) => return answered,
                // A question that panicked is not answered.
                Some(Err(_)) => {}
                None => std::future::pending().await,
            }
        }
    }
}

/// Whether who should have kept the client of `leak` out lets it pass on purpose, and what all those say who could have
/// seen it. That the keeper does not hold it is noted in `leak`.
pub(crate) fn weigh(leak: &mut Leak, holds: &[BackendHold]) -> (bool, Vec<String>) {
    let node = leak.node.as_str();
    let asked = |seer: Keeper| {
        holds.iter().filter(move |hold| kind(&hold.backend) == seer).filter(move |hold| match seer {
            Keeper::Cloudflare => hold.state != HoldState::Standby,
            _ => hold.node == node,
        })
    };
    let is_spared = asked(leak.keeper).any(|hold| hold.spared);
    let is_silent = |hold: &BackendHold| hold.state == HoldState::Silent || hold.backend == BackendHold::UNKNOWN;
    let denied = asked(leak.keeper).any(|hold| !is_silent(hold) && !hold.is_held());
    let said = |hold: &BackendHold| format!("{} on {}: {}", hold.backend, hold.node, hold.detail);
    let answers = leak.seers.iter().flat_map(|seer| asked(*seer)).take(QUOTED_MAX).map(said).collect();
    leak.denied = denied;
    (is_spared, answers)
}

/// Notes since when what is held is known to be in force.
pub(crate) fn stamp(holds: &mut [BackendHold], known: &Confirmations) {
    for hold in holds.iter_mut().filter(|hold| hold.is_held()) {
        let keeper = kind(&hold.backend);
        let node = if keeper == Keeper::Cloudflare { String::new() } else { hold.node.clone() };
        hold.confirmed_at = known.get(&(node, keeper)).copied();
    }
}

/// Which back end it is that is called so; notifiers aside.
fn kind(backend: &str) -> Keeper {
    match backend {
        BackendHold::CLOUDFLARE => Keeper::Cloudflare,
        BackendHold::FORWARDED_FOR => Keeper::Forwarded,
        _ => Keeper::Firewall,
    }
}

/// How the back ends of all hosts are, by the reports of their roles.
pub(crate) fn views(reports: &[NodeReport]) -> Vec<HostView> {
    let mut views: BTreeMap<&str, HostView> = BTreeMap::new();
    for report in reports.iter().filter(|report| report.role != Role::Detect) {
        let view = views.entry(&report.node).or_default();
        report.node.clone_into(&mut view.node);
        view.ahead = view.ahead.max(ahead(report));
        if report.role != Role::Enforce {
            continue;
        }
        view.enforces = true;
        // The host's own firewall stands first.
        let Some((firewall, others)) = report.backends.split_first() else { continue };
        let lifted = report.paused.is_some();
        view.firewall = back_end(firewall, lifted);
        for other in others {
            match kind(&other.name) {
                Keeper::Cloudflare => view.cloudflare = back_end(other, false),
                Keeper::Forwarded => view.forwarded = back_end(other, lifted),
                _ => {}
            }
        }
    }
    views.into_values().collect()
}

fn back_end(report: &BackendReport, lifted: bool) -> BackEnd {
    match report.name.as_str() {
        // Who does it says how it is.
        _ if report.standby => BackEnd::Absent,
        "none" => BackEnd::Absent,
        "dry-run" => BackEnd::Idle,
        _ if lifted || report.lets_some_pass => BackEnd::Idle,
        _ => BackEnd::InForce(report.confirmed),
    }
}

/// How far the clocks are ahead that a host's lines are written by, at most.
fn ahead(report: &NodeReport) -> Duration {
    let millis = |skew: Option<i64>| Duration::from_millis(u64::try_from(skew.unwrap_or(0)).unwrap_or(0));
    let sources = report.sources.iter().map(|source| millis(source.skew_ms)).max().unwrap_or_default();
    millis(report.skew_ms) + sources
}

#[cfg(test)]
mod tests {
    use proto::head::Mark;
    use proto::time::Timestamp;

    use super::*;

    fn leak(keeper: Keeper) -> Leak {
        Leak {
            client: "192.0.2.1".parse().unwrap(),
            target: "192.0.2.1".parse().unwrap(),
            rule: "r".to_owned(),
            node: "a".to_owned(),
            host: "shop.example.net".to_owned(),
            path: "/".to_owned(),
            peer: None,
            began_at: Timestamp::EPOCH,
            keeper,
            seers: vec![keeper],
            confirmed: true,
            denied: false,
            late: Duration::from_secs(9),
            untold: 0,
        }
    }

    #[test]
    fn a_ban_that_does_not_fit_is_told_as_what_the_firewall_does_not_hold() {
        let mut leak = leak(Keeper::Firewall);
        let hold = |backend: &str, entry: Option<&str>, detail: &str| BackendHold {
            node: "a".to_owned(),
            backend: backend.to_owned(),
            entry: entry.map(|entry| entry.parse().unwrap()),
            detail: detail.to_owned(),
            ..BackendHold::default()
        };
        for held in [hold("iptables", Some("192.0.2.1"), "in set"), hold(BackendHold::UNKNOWN, None, "no answer")] {
            let (_, answers) = weigh(&mut leak, &[held]);
            assert!(
                leak.text(&answers)
                    .contains("after a had confirmed the ban. The firewall of a could have seen it: look")
            );
        }
        let (is_spared, answers) = weigh(&mut leak, &[hold("iptables", None, "bans_max is reached")]);
        let text = leak.text(&answers);
        assert!(
            text.ends_with("the firewall of a does not hold it. Asked now: iptables on a: bans_max is reached."),
            "{text}"
        );
        assert!(!is_spared && !text.contains("confirmed"), "{text}");
    }

    #[test]
    fn all_who_could_have_seen_a_client_are_asked_and_only_the_keeper_may_spare_it() {
        let seers = vec![Keeper::Cloudflare, Keeper::Forwarded];
        let mut leak = Leak { seers, ..leak(Keeper::Cloudflare) };
        let hold = |node: &str, backend: &str, state, spared| BackendHold {
            node: node.to_owned(),
            backend: backend.to_owned(),
            detail: format!("{state:?}"),
            state,
            spared,
            ..BackendHold::default()
        };
        let mut holds = vec![
            hold("a", "iptables", HoldState::Held, false),
            hold("a", "cloudflare", HoldState::Standby, false),
            hold("a", "forwarded-for", HoldState::Paused, true),
            hold("b", "cloudflare", HoldState::Held, false),
            hold("b", "forwarded-for", HoldState::Held, false),
        ];
        let (is_spared, answers) = weigh(&mut leak, &holds);
        assert!(!is_spared && !leak.denied);
        let text = leak.text(&answers);
        assert!(text.contains("Cloudflare and the rules of a for forwarded clients could have seen it"), "{text}");
        assert!(text.ends_with(" Asked now: cloudflare on b: Held; forwarded-for on a: Paused."), "{text}");
        holds[3] = hold("b", "cloudflare", HoldState::LeftOut, false);
        assert!(!weigh(&mut leak, &holds).0 && leak.denied);
        assert!(leak.text(&[]).contains("Cloudflare does not hold it"));
        holds[3] = hold("b", "cloudflare", HoldState::Silent, false);
        assert!(!weigh(&mut leak, &holds).0 && !leak.denied, "who does not answer denies nothing");
    }

    #[test]
    fn what_is_held_is_told_with_since_when_it_is_known_to_be_in_force() {
        let at = Timestamp::from_secs;
        let known: Confirmations = [
            (("a".to_owned(), Keeper::Firewall), at(1)),
            (("b".to_owned(), Keeper::Firewall), at(2)),
            ((String::new(), Keeper::Cloudflare), at(3)),
        ]
        .into();
        let hold = |node: &str, backend: &str, state| BackendHold {
            node: node.to_owned(),
            backend: backend.to_owned(),
            state,
            ..BackendHold::default()
        };
        let mut holds = [
            hold("b", "nftables", HoldState::Held),
            hold("a", "iptables", HoldState::Waiting),
            hold("a", "cloudflare", HoldState::Held),
            hold("a", "forwarded-for", HoldState::Held),
        ];
        stamp(&mut holds, &known);
        assert_eq!(holds.map(|hold| hold.confirmed_at), [Some(at(2)), None, Some(at(3)), None]);
    }

    #[test]
    fn reports_tell_which_back_ends_a_host_has_and_what_they_have_in_force() {
        let mark = Some(Mark { epoch: 1, commit: 7 });
        let backend = |name: &str| BackendReport { name: name.to_owned(), confirmed: mark, ..BackendReport::default() };
        let report = |node: &str, backends: &[&str]| {
            let mut report = NodeReport::new(node, Role::Enforce, Timestamp::EPOCH);
            report.backends = backends.iter().map(|name| backend(name)).collect();
            report
        };
        let mut paused = report("b", &["nftables", "cloudflare"]);
        paused.paused = Some("for a test".to_owned());
        let mut ingest = NodeReport::new("c", Role::Ingest, Timestamp::EPOCH);
        ingest.skew_ms = Some(1500);
        ingest.sources = vec![proto::report::SourceReport { skew_ms: Some(500), ..Default::default() }];
        let reports = [
            report("a", &["iptables", "telegram", BackendHold::FORWARDED_FOR]),
            paused,
            ingest,
            report("d", &["none"]),
        ];
        let views = views(&reports);
        let is = |at: usize| (views[at].firewall, views[at].forwarded, views[at].cloudflare);
        assert_eq!(is(0), (BackEnd::InForce(mark), BackEnd::InForce(mark), BackEnd::Absent));
        assert_eq!(
            is(1),
            (BackEnd::Idle, BackEnd::Absent, BackEnd::InForce(mark)),
            "a host lifts only what is its own"
        );
        assert_eq!((views[2].enforces, views[2].ahead), (false, Duration::from_secs(2)));
        assert_eq!(is(3).0, BackEnd::Absent);
    }
}
