//! Lines that shippers publish on a subject of NATS, shared by a queue group.
//!
//! A message holds one line, several with line ends between them, or the JSON array that Fluent Bit sends. Pieces of lines
//! are joined within a message only: the next one may be of another sender, or go to another member of the group.
//!
//! At most once: nobody waits for us, so that what comes faster than it is taken is dropped, counted and told.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use proto::bus::config::NatsConfig;
use proto::bus::nats::raw::{RawFeed, subscribe};
use proto::report::Problem;
use proto::subject::Subjects;
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::time::{Interval, interval};

use super::batch::Stopped;
use super::intake::{Inlet, Intake};
use super::limit::Limits;
use crate::config::NatsSource;

/// How often it is told what was dropped and what is wrong.
const TELL_INTERVAL: Duration = Duration::from_secs(1);
/// How long a drop stays a problem.
const DROP_SHOWN: Duration = Duration::from_secs(60);

/// Reads until the shutdown begins, and what has come by then to its end.
pub(crate) async fn run(intake: Intake, config: NatsSource, bus: Arc<NatsConfig>) -> Result<(), Stopped> {
    let (node, source) = (intake.shared.node.clone(), intake.shared.source.clone());
    let (clock, shutdown) = (intake.shared.clock.clone(), intake.shared.shutdown.clone());
    let wanted = config.wanted(&Subjects::new(&bus.prefix), &source);
    let name = format!("portcullis ingest {node}, source {source}");
    tracing::info!(source = %source, subject = wanted.subject, queue = wanted.queue, "Listening on NATS");
    let subscribed = subscribe(&bus, (&name, &node), wanted, (clock.clone(), shutdown.clone())).await;
    let mut feed = match subscribed {
        Ok(feed) => feed,
        Err(error) => {
            intake.set_problems(vec![Problem::degraded(format!("source {source} cannot listen: {error}"))]);
            shutdown.draining().await;
            return Ok(());
        }
    };
    let limits = Limits::new(&config.limits, clock);
    let mut inlet = intake.open_mixed(None);
    let mut teller = Teller { intake: intake.clone(), ticks: interval(TELL_INTERVAL), shown: Duration::ZERO };
    loop {
        let message = tokio::select! {
            message = feed.next() => message,
            _ = teller.ticks.tick() => {
                teller.tell(&mut feed);
                continue;
            }
        };
        let Some(message) = message else { break };
        take(&message, (&mut inlet, &intake), &limits);
        if inlet.is_full() || feed.is_empty() {
            teller.tell_while(inlet.send(None), &mut feed).await?;
        }
    }
    teller.tell(&mut feed);
    inlet.send(None).await
}

/// Takes a message whole, or turns it away whole.
fn take(message: &[u8], (inlet, intake): (&mut Inlet, &Intake), limits: &Limits) {
    let lines = lines_of(message);
    let count = u32::try_from(lines.len()).unwrap_or(u32::MAX);
    let bytes = u32::try_from(message.len()).unwrap_or(u32::MAX);
    if limits.check(None, count, bytes).is_err() {
        intake.note_limited(lines.len() as u64);
        return;
    }
    for line in lines {
        let is_short = line.len() <= intake.line_bytes_max;
        inlet.push(is_short.then_some(&line), line.len() + 1);
    }
    if inlet.is_joining() {
        inlet.abandon();
    }
}

/// The lines of a message, blank ones left out.
fn lines_of(message: &[u8]) -> Vec<Cow<'_, [u8]>> {
    if message.trim_ascii_start().starts_with(b"[")
        && let Ok(records) = serde_json::from_slice::<Vec<&RawValue>>(message)
    {
        return records.into_iter().map(line_of_record).collect();
    }
    let lines = message.split(|byte| *byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    lines.filter(|line| !line.trim_ascii().is_empty()).map(Cow::Borrowed).collect()
}

/// A record of Fluent Bit: its line where it has one, else the record itself, whose fields are then those of the line.
fn line_of_record(record: &RawValue) -> Cow<'_, [u8]> {
    let record = match serde_json::from_str::<(&RawValue, &RawValue)>(record.get()) {
        Ok((_time, record)) => record,
        Err(_) => record,
    };
    match serde_json::from_str::<Tailed<'_>>(record.get()) {
        Ok(Tailed { log: Cow::Borrowed(line) }) => Cow::Borrowed(line.as_bytes()),
        Ok(Tailed { log: Cow::Owned(line) }) => Cow::Owned(line.into_bytes()),
        Err(_) => Cow::Borrowed(record.get().as_bytes()),
    }
}

/// What Fluent Bit makes of a line that it does not parse.
#[derive(Deserialize)]
struct Tailed<'a> {
    #[serde(borrow)]
    log: Cow<'a, str>,
}

/// Tells what was dropped.
struct Teller {
    intake: Intake,
    ticks: Interval,
    /// How much longer the last drop is shown.
    shown: Duration,
}

impl Teller {
    fn tell(&mut self, feed: &mut RawFeed) {
        let dropped = feed.take_dropped();
        self.shown = self.shown.saturating_sub(TELL_INTERVAL);
        if dropped > 0 {
            self.intake.note_dropped(dropped);
            tracing::warn!(source = %self.intake.shared.source, lines = dropped, "Raw lines came faster than they are taken");
            self.shown = DROP_SHOWN;
        }
        let text = "raw lines come faster than they are taken, some were dropped: run ingest on more hosts";
        let dropping = (!self.shown.is_zero()).then(|| Problem::warning(text));
        self.intake.set_problems(feed.problem().into_iter().chain(dropping).collect());
    }

    /// Goes on telling while a batch waits for room.
    async fn tell_while(
        &mut self,
        sending: impl Future<Output = Result<(), Stopped>>,
        feed: &mut RawFeed,
    ) -> Result<(), Stopped> {
        tokio::pin!(sending);
        loop {
            tokio::select! {
                biased;
                sent = &mut sending => return sent,
                _ = self.ticks.tick() => self.tell(feed),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(message: &str) -> Vec<String> {
        lines_of(message.as_bytes()).iter().map(|line| String::from_utf8_lossy(line).into_owned()).collect()
    }

    #[test]
    fn a_message_holds_a_line_or_several() {
        assert_eq!(lines("one"), ["one"]);
        assert_eq!(lines("one\r\n\n two\n"), ["one", " two"]);
        assert_eq!(lines("\n"), [""; 0]);
        assert_eq!(lines("[broken\nnext"), ["[broken", "next"]);
    }

    #[test]
    fn what_fluent_bit_sends_is_its_lines() {
        let message = r#"[[1794581300,{"tag":"portcullis.raw.v1.shop","log":"a \"b\" \\c"}],
            [1794581300.5,{"tag":"x","log":"plain"}],
            [1794581301,{"tag":"x","ClientHost":"192.0.2.1"}],
            {"ClientHost":"192.0.2.2"}, 7]"#;
        let record = r#"{"tag":"x","ClientHost":"192.0.2.1"}"#;
        assert_eq!(lines(message), [r#"a "b" \c"#, "plain", record, r#"{"ClientHost":"192.0.2.2"}"#, "7"]);
        assert_eq!(lines("[]"), [""; 0]);
        // As 5.1.1 wrote it.
        let message = r#"[[1795629619.106073,{"tag":"portcullis.raw.v1.shop","log":"{\"DownstreamStatus\":404,\"request_User-Agent\":\"\u00e9\"}"}]]"#;
        assert_eq!(lines(message), [r#"{"DownstreamStatus":404,"request_User-Agent":"é"}"#]);
    }
}
