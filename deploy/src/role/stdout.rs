//! Lines in, accesses out: reading alone, which writes one JSON object a line and needs neither bus nor state.

use std::collections::BTreeMap;
use std::io::{self, BufWriter, ErrorKind, Write};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use ingest::pipeline::Inputs;
use prometheus_client::registry::Registry;
use proto::access::AccessLine;
use proto::bus::banned::Banned;
use proto::bus::memory::{Bus, Nodes};
use proto::event::{AccessBatch, Receipt};
use proto::report::Role;
use proto::shutdown::{Shutdown, Supervisor};
use tokio::sync::{mpsc, watch};

use super::reload::Reloader;
use super::{DRAIN_DEADLINE, Process};
use crate::text::render_json;

/// Bytes that are written at a time while there is more to write.
const WRITE_BYTES: usize = 64 << 10;
/// How often it is told which lines are no accesses.
const TELL_INTERVAL: Duration = Duration::from_secs(10);

/// Reads all sources and writes their accesses to `out`, until the input, its reader or the process ends. A reader who has
/// gone is no failure, and one who is slow stops the reading.
///
/// # Errors
/// When a source fails or `out` cannot be written.
pub async fn run(process: Process, out: impl Write + Send + 'static) -> anyhow::Result<()> {
    let Process { config, location, clock, shutdown, reload, .. } = process;
    let node = config.node.clone();
    let bus = Bus::new();
    let (client_ip, client_ip_in) = watch::channel(config.ingest.client_ip.clone());
    let inputs = Inputs {
        node: node.as_str().into(),
        positions: BTreeMap::new(),
        batches: bus.batches,
        // Headers are kept as rules want them, and nothing is withheld.
        interest: watch::Sender::new(Arc::new(config.detect.engine.interest())).subscribe(),
        banned: Banned::new(),
        client_ip: client_ip_in,
        nats: None,
        clock,
        spool: None,
        uplink: ingest::uplink::Status::default(),
        nodes: bus.nodes.clone(),
        metrics: ingest::metrics::Metrics::register(&mut Registry::default()),
        shutdown: shutdown.clone(),
    };
    let mut tasks = Supervisor::new();
    tasks.spawn("ingest", ingest::pipeline::run(config.ingest.clone(), inputs));
    let (batches, ending) = (bus.batches_in, shutdown.clone());
    tasks.spawn("writer", async move { tokio::task::spawn_blocking(move || write_all(batches, out, &ending)).await? });
    tasks.spawn("reloader", Reloader { location, config, requests: None, client_ip }.run(reload, shutdown.clone()));
    let mut told = Told { nodes: bus.nodes, node, strange: BTreeMap::new() };
    let ended = {
        let running = tasks.run(&shutdown, DRAIN_DEADLINE);
        tokio::pin!(running);
        loop {
            tokio::select! {
                ended = &mut running => break ended,
                () = tokio::time::sleep(TELL_INTERVAL) => told.tell_strange(),
            }
        }
    };
    told.summarize();
    ended.context("cannot write accesses")
}

/// Writes until nobody sends batches any more. Small batches come when little is read, and what is written then is handed
/// over at once.
fn write_all(
    mut batches: mpsc::Receiver<AccessBatch>,
    out: impl Write,
    shutdown: &Shutdown,
) -> Result<(), proto::shutdown::TaskError> {
    let mut out = BufWriter::with_capacity(WRITE_BYTES, out);
    let mut write = || -> io::Result<()> {
        // Of senders that wait for an answer.
        let mut receipts = Vec::new();
        while let Some(mut batch) = batches.blocking_recv() {
            receipts.append(&mut batch.receipts);
            write_batch(&batch, &mut out)?;
            if batches.is_empty() {
                out.flush()?;
                receipts.drain(..).for_each(Receipt::deliver);
            }
        }
        out.flush()
    };
    let written = write();
    // Before the sources find that nobody listens any more.
    shutdown.begin();
    // What could not be written is not tried again.
    let _unwritten = out.into_parts();
    match written {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => written.map_err(Into::into),
    }
}

fn write_batch(batch: &AccessBatch, out: &mut impl Write) -> io::Result<()> {
    for event in batch.events() {
        let line = render_json(&AccessLine::new(batch, &event))?;
        out.write_all(line.as_bytes())?;
        out.write_all(b"\n")?;
    }
    Ok(())
}

/// What is said of lines, beside the accesses.
struct Told {
    nodes: Nodes,
    node: String,
    /// By source, how many lines that are no accesses were told.
    strange: BTreeMap<String, u64>,
}

impl Told {
    fn tell_strange(&mut self) {
        for source in self.nodes.get(Role::Ingest, &self.node).into_iter().flat_map(|report| report.sources) {
            let strange = source.unparsed + source.oversized;
            let told = self.strange.entry(source.name.clone()).or_default();
            if strange > *told {
                *told = strange;
                let sample = source.unparsed_sample.unwrap_or_default();
                let (unparsed, oversized) = (source.unparsed, source.oversized);
                tracing::warn!(source = source.name, unparsed, oversized, sample, "Lines that are no accesses");
            }
        }
    }

    fn summarize(&mut self) {
        self.tell_strange();
        for source in self.nodes.get(Role::Ingest, &self.node).into_iter().flat_map(|report| report.sources) {
            let no_client: u64 = source.no_client.values().sum();
            tracing::info!(
                source = source.name,
                lines = source.lines,
                accesses = source.events,
                no_client,
                unparsed = source.unparsed,
                oversized = source.oversized,
                suspect = source.suspect,
                limited = source.limited,
                dropped = source.dropped,
                "Read"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use proto::time::Timestamp;

    use super::*;

    #[test]
    fn a_sender_hears_that_its_lines_are_written() {
        let (sender, batches) = mpsc::channel(1);
        let (tell, told) = channel();
        let mut batch = AccessBatch::new("edge-1".into(), "push".into(), Timestamp::EPOCH);
        batch.receipts.push(Receipt::new(move |is_safe| tell.send(is_safe).unwrap()));
        sender.try_send(batch).unwrap();
        drop(sender);
        write_all(batches, Vec::new(), &Shutdown::new()).unwrap();
        assert_eq!(told.recv(), Ok(true));
    }
}
