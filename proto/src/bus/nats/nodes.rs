//! Heartbeats: every role of every host says how it is.

use std::time::Duration;

use async_nats::HeaderMap;

use super::follow::{Entry, Start, fetch};
use super::{BusError, Connection, QUESTION_TIMEOUT, Stored, answer, encode};
use crate::bus::memory::Nodes;
use crate::report::{NodeReport, Problem, Role};
use crate::shutdown::Shutdown;
use crate::subject::{bucket_key, bucket_stream, node_key};
use crate::time::{Timestamp, render_duration};

/// How long the last heartbeat may take.
const LAST_BEAT_MAX: Duration = Duration::from_secs(2);
/// The duty of a role that has ended in order.
pub const STOPPED: &str = "stopped";
/// How often a role says how it is, and how often `status` learns of it.
pub const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(1);
/// After so long without a word a role is taken for gone: it is not asked any more, and reported.
pub const SILENT_AFTER: Duration = Duration::from_secs(10);

/// Publishes the report of `role` in `nodes`, with what the bus and `decorate` add to it, until the shutdown; then once more.
///
/// # Errors
/// None: a heartbeat that cannot be sent is made up for by the next.
pub async fn beat(
    connection: Connection,
    nodes: Nodes,
    (role, node): (Role, String),
    decorate: impl Fn(&mut NodeReport) + Send,
    shutdown: Shutdown,
) -> Result<(), std::convert::Infallible> {
    let instance = format!("{:x}", connection.clock().now().as_nanos());
    let mut ticks = tokio::time::interval(HEARTBEAT_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let (mut seen_other, mut sent) = (false, None);
    let mut silence = Silence::default();
    loop {
        let ending = tokio::select! {
            _ = ticks.tick() => false,
            () = shutdown.draining() => true,
        };
        let Some((mut report, words)) = nodes.said(role, &node) else { if ending { return Ok(()) } else { continue } };
        report.problems.extend(silence.look(words, connection.clock().raw()));
        add_bus(&mut report, &connection, &instance);
        decorate(&mut report);
        if ending {
            // Nobody need wonder why it says nothing any more.
            report.duty = Some(STOPPED.to_owned());
        }
        if seen_other {
            let text = format!("another {} calls itself {node}: give each host its own `node`", role.as_str());
            report.problems.push(Problem::degraded(text));
        }
        nodes.beat(report.clone());
        if connection.is_up() {
            let beat = async {
                // What another has written over ours tells of a second process under our name.
                let read = read_one(&connection, role, &node).await;
                seen_other = read.is_some_and(|(entry, report)| {
                    report.is_some_and(|report| is_anothers(&report, entry.sequence, &instance, sent))
                });
                sent = send(&connection, &report).await.or(sent);
            };
            if ending {
                // Nobody waits for a last word that cannot be said.
                let _unsaid = tokio::time::timeout(LAST_BEAT_MAX, beat).await;
            } else {
                tokio::select! {
                    () = beat => {}
                    () = shutdown.draining() => {}
                }
            }
        }
        if ending {
            return Ok(());
        }
    }
}

/// Since when a role says nothing, although its process runs.
#[derive(Debug, Default)]
struct Silence {
    words: u64,
    since: Timestamp,
    looks: u32,
}

impl Silence {
    /// The role has said so many words. A process that stood still as a whole is looked at once before its roles go on.
    fn look(&mut self, words: u64, now: Timestamp) -> Option<Problem> {
        if self.words != words {
            *self = Self { words, since: now, looks: 0 };
        }
        self.looks += u32::from(now.since(self.since) >= SILENT_AFTER);
        (self.looks > 1).then(|| Problem::degraded("says nothing any more, although its process runs"))
    }
}

/// Whether a second process under our name has written `report` over what we `sent`. What was there before, or is read from
/// a copy that lags behind, may be of a former process, which a kill or a power cut has ended.
fn is_anothers(report: &NodeReport, sequence: u64, instance: &str, sent: Option<u64>) -> bool {
    !report.instance.is_empty() && report.instance != instance && sent.is_some_and(|sent| sequence > sent)
}

fn add_bus(report: &mut NodeReport, connection: &Connection, instance: &str) {
    instance.clone_into(&mut report.instance);
    report.at = connection.clock().now();
    report.skew_ms = connection.clock().skew_ms();
    report.problems.extend(connection.problem());
    if let Some(skew) = report.skew_ms.filter(|skew| skew.unsigned_abs() > SKEW_MAX_MS) {
        let side = if skew > 0 { "ahead of" } else { "behind" };
        let by = render_duration(Duration::from_millis(skew.unsigned_abs()));
        let text =
            format!("the host's clock is {by} {side} that of the NATS servers: times in its logs are off by that");
        report.problems.push(Problem::warning(text));
    }
}

/// Sends a report, and learns the servers' time from when they stored it. Its sequence, if it is known to be stored.
async fn send(connection: &Connection, report: &NodeReport) -> Option<u64> {
    let subject = bucket_key(&connection.subjects().nodes_bucket(), &node_key(report.role, &report.node));
    let clock = connection.clock();
    let sent_at = clock.raw();
    let sent = connection.ask(&subject, HeaderMap::new(), encode(report)).await;
    let half = clock.raw().since(sent_at) / 2;
    let stored = sent.and_then(|message| answer::<Stored>("a heartbeat", &message.payload));
    let seq = stored.ok()?.seq;
    if half <= MEASURE_MAX {
        // A copy of the bucket that lags behind may answer with an older one.
        let read = read_one(connection, report.role, &report.node).await;
        if let Some((entry, _)) = read.filter(|(entry, _)| entry.sequence == seq) {
            clock.steer(sent_at.saturating_add(half), entry.time);
        }
    }
    Some(seq)
}

/// A measurement that is less certain than this tells nothing.
const MEASURE_MAX: Duration = Duration::from_millis(100);

/// A skew beyond this is worth a word: requests of one second apart then change places.
const SKEW_MAX_MS: u64 = 1000;

async fn read_one(connection: &Connection, role: Role, node: &str) -> Option<(Entry, Option<NodeReport>)> {
    let bucket = connection.subjects().nodes_bucket();
    let subject = bucket_key(&bucket, &node_key(role, node));
    let stream = bucket_stream(&bucket);
    // No heartbeat may hold up the next, nor the end of the process.
    let fetched = tokio::time::timeout(QUESTION_TIMEOUT, fetch(connection, &stream, &subject, Start::Sequence(1)));
    let (mut entries, _) = fetched.await.ok()?.ok()?;
    let entry = entries.pop()?;
    let report = serde_json::from_slice(&entry.payload).ok();
    Some((entry, report))
}

/// Keeps `nodes` up to date with the reports of all hosts, until the shutdown. Only detect may read them all.
///
/// # Errors
/// None: what cannot be read now is read the next time.
pub async fn watch(connection: Connection, nodes: Nodes, shutdown: Shutdown) -> Result<(), std::convert::Infallible> {
    let mut ticks = tokio::time::interval(HEARTBEAT_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = shutdown.draining() => return Ok(()),
        }
        if let Ok(reports) = read_all(&connection).await {
            nodes.hear(reports);
        }
    }
}

/// A host speaks for itself alone, and at the moment that the server says. What another version writes and this one cannot read
/// is left out.
fn read_report(bucket: &str, entry: &Entry) -> Option<NodeReport> {
    let mut report: NodeReport = serde_json::from_slice(&entry.payload).ok()?;
    report.at = entry.time;
    (entry.subject == bucket_key(bucket, &node_key(report.role, &report.node))).then_some(report)
}

async fn read_all(connection: &Connection) -> Result<Vec<NodeReport>, BusError> {
    let bucket = connection.subjects().nodes_bucket();
    let (stream, filter) = (bucket_stream(&bucket), format!("$KV.{bucket}.>"));
    let (mut reports, mut next) = (Vec::new(), 1);
    loop {
        let (entries, pending) = fetch(connection, &stream, &filter, Start::Sequence(next)).await?;
        let Some(last) = entries.last() else { return Ok(reports) };
        next = last.sequence + 1;
        reports.extend(entries.iter().filter_map(|entry| read_report(&bucket, entry)));
        if pending == 0 {
            return Ok(reports);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_reports_for_itself_alone() {
        let report = NodeReport::new("edge-2", Role::Enforce, Timestamp::EPOCH);
        let entry = |key: &str| Entry {
            sequence: 1,
            time: Timestamp::EPOCH,
            subject: format!("$KV.portcullis_nodes.{key}"),
            deleted: false,
            batched: false,
            ends_batch: false,
            payload: encode(&report).into(),
        };
        assert!(read_report("portcullis_nodes", &entry("enforce.edge-2")).is_some());
        for foreign in ["enforce.edge-1", "ingest.edge-2"] {
            assert!(read_report("portcullis_nodes", &entry(foreign)).is_none(), "{foreign}");
        }
    }

    #[test]
    fn a_role_that_hangs_is_told_apart_from_a_process_that_stood_still() {
        let mut silence = Silence::default();
        let mut look = |words, second| silence.look(words, Timestamp::from_secs(second)).map(|problem| problem.text);
        assert_eq!((look(1, 100), look(1, 101), look(2, 102)), (None, None, None));
        assert_eq!(look(2, 200), None, "stood still");
        assert_eq!((look(3, 201), look(3, 210)), (None, None));
        assert_eq!(look(3, 211), None);
        assert_eq!(look(3, 212).unwrap(), "says nothing any more, although its process runs");
        assert_eq!(look(4, 213), None, "it goes on");
    }

    #[test]
    fn a_former_process_is_not_taken_for_a_second_one() {
        let mut report = NodeReport::new("edge-2", Role::Enforce, Timestamp::EPOCH);
        report.instance = "former".to_owned();
        // Before the first word of ours, also where the servers could not store it.
        assert!(!is_anothers(&report, 7, "ours", None));
        // From a copy that lags behind.
        assert!(!is_anothers(&report, 7, "ours", Some(8)));
        assert!(is_anothers(&report, 9, "ours", Some(8)));
        assert!(!is_anothers(&report, 9, "former", Some(8)));
    }
}
