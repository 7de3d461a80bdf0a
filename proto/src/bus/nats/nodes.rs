//! Heartbeats: every role of every host says how it is.

use std::time::Duration;

use async_nats::HeaderMap;

use super::follow::{Entry, Start, fetch};
use super::{BusError, Connection, QUESTION_TIMEOUT, Stored, answer, encode};
use crate::bus::memory::Nodes;
use crate::report::{NodeReport, Problem, Role};
use crate::shutdown::Shutdown;
use crate::subject::{bucket_key, bucket_stream, node_key};

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
    let mut seen_other = None;
    loop {
        let ending = tokio::select! {
            _ = ticks.tick() => false,
            () = shutdown.draining() => true,
        };
        let Some(mut report) = nodes.get(role, &node) else { if ending { return Ok(()) } else { continue } };
        add_bus(&mut report, &connection, &instance);
        decorate(&mut report);
        if let Some(other) = &seen_other {
            let text = format!(
                "another {} calls itself {node} (instance {other}): give each host its own `node`",
                role.as_str()
            );
            report.problems.push(Problem::degraded(text));
        }
        if connection.is_up() {
            // What was there before ours tells of a second process under our name.
            let former = read_one(&connection, role, &node).await.and_then(|(_, report)| report);
            seen_other = former.map(|report| report.instance).filter(|found| !found.is_empty() && *found != instance);
            send(&connection, &report).await;
        }
        if ending {
            return Ok(());
        }
    }
}

fn add_bus(report: &mut NodeReport, connection: &Connection, instance: &str) {
    instance.clone_into(&mut report.instance);
    report.at = connection.clock().now();
    report.skew_ms = connection.clock().skew_ms();
    report.problems.extend(connection.problem());
    if let Some(skew) = report.skew_ms.filter(|skew| skew.unsigned_abs() > SKEW_MAX_MS) {
        let text =
            format!("the host's clock is {skew} ms ahead of the NATS servers': times in its logs are off by that");
        report.problems.push(Problem::warning(text));
    }
}

/// Sends a report, and learns the servers' time from when they stored it.
async fn send(connection: &Connection, report: &NodeReport) {
    let subject = bucket_key(&connection.subjects().nodes_bucket(), &node_key(report.role, &report.node));
    let sent_at = connection.clock().now();
    let sent = connection.ask(&subject, HeaderMap::new(), encode(report)).await;
    let taken = connection.clock().now().since(sent_at);
    let stored = sent.and_then(|message| answer::<Stored>("a heartbeat", &message.payload));
    let Ok(Stored { seq }) = stored else { return };
    // A copy of the bucket that lags behind may answer with an older one.
    if let Some((entry, _)) = read_one(connection, report.role, &report.node).await.filter(|(e, _)| e.sequence == seq) {
        connection.clock().steer(sent_at.saturating_add(taken / 2), entry.time);
    }
}

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
pub async fn watch(
    connection: Connection,
    nodes: Nodes,
    own: (Role, String),
    shutdown: Shutdown,
) -> Result<(), std::convert::Infallible> {
    let mut ticks = tokio::time::interval(HEARTBEAT_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = shutdown.draining() => return Ok(()),
        }
        let Ok(reports) = read_all(&connection).await else { continue };
        let known: Vec<(Role, String)> = reports.iter().map(|report| (report.role, report.node.clone())).collect();
        for report in reports.into_iter().filter(|report| (report.role, &report.node) != (own.0, &own.1)) {
            nodes.put(report);
        }
        nodes.retain(|report| {
            let name = (report.role, report.node.clone());
            name == own || known.contains(&name)
        });
    }
}

async fn read_all(connection: &Connection) -> Result<Vec<NodeReport>, BusError> {
    let bucket = connection.subjects().nodes_bucket();
    let (stream, filter) = (bucket_stream(&bucket), format!("$KV.{bucket}.>"));
    let (mut reports, mut next) = (Vec::new(), 1);
    loop {
        let (entries, pending) = fetch(connection, &stream, &filter, Start::Sequence(next)).await?;
        let Some(last) = entries.last() else { return Ok(reports) };
        next = last.sequence + 1;
        // What another version writes and this one cannot read is left out.
        reports.extend(entries.iter().filter_map(|entry| serde_json::from_slice::<NodeReport>(&entry.payload).ok()));
        if pending == 0 {
            return Ok(reports);
        }
    }
}
