//! Raw lines, as any shipper publishes them: at most once, shared by a queue group.
//!
//! They come over a connection of their own, so that a flood of them holds up neither what a host publishes nor the ban
//! set that it follows. Nobody asks again for what finds no room: it is dropped and counted.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_nats::{Statistics, Subscriber};
use bytes::Bytes;
use futures_util::{FutureExt, StreamExt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::interval;

use super::{BusError, Connection};
use crate::bus::config::NatsConfig;
use crate::report::Problem;
use crate::shutdown::Shutdown;
use crate::time::Clock;

/// Bytes of messages that wait for their reader: some 20,000 lines, which is what a shipper sends at once.
const WAITING_BYTES_MAX: usize = 16 << 20;
/// What a message takes beside its payload, about.
const MESSAGE_BYTES: usize = 256;
/// Messages that wait. As many have room in the client, where they are for a moment only.
const MESSAGES_MAX: usize = WAITING_BYTES_MAX / MESSAGE_BYTES;
/// How often it is counted what the client dropped.
const COUNT_INTERVAL: Duration = Duration::from_secs(1);
/// How long what is under way when we leave the group may take.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(1);

/// What to listen to, and with whom to share it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawSubject {
    /// May have wildcards.
    pub subject: String,
    /// The group that shares it: each message goes to one of its members.
    pub queue: String,
}

/// Messages as they come.
#[derive(Debug)]
pub struct RawFeed {
    connection: Connection,
    messages: mpsc::Receiver<(Bytes, OwnedSemaphorePermit)>,
    dropped_lines: Arc<AtomicU64>,
    /// Of the drops, those that were told already.
    told: u64,
}

/// Joins the group as `name`, at once or as soon as there is a connection, and leaves it when the shutdown begins: what
/// comes from then on is for the others.
///
/// # Errors
/// When a file of the configuration cannot be read, or the subject is none.
pub async fn subscribe(
    config: &NatsConfig,
    (name, node): (&str, &str),
    wanted: RawSubject,
    (clock, shutdown): (Clock, Shutdown),
) -> Result<RawFeed, BusError> {
    let connection = Connection::open_with(config, (name, node), clock, MESSAGES_MAX).await?;
    let RawSubject { subject, queue } = wanted;
    let subscribed = connection.client.queue_subscribe(subject.clone(), queue).await;
    let subscriber = subscribed.map_err(|_| BusError::Silent { what: subject })?;
    let dropped_lines = Arc::new(AtomicU64::new(0));
    let (sender, messages) = mpsc::channel(MESSAGES_MAX);
    let room = Arc::new(Semaphore::new(WAITING_BYTES_MAX));
    let outlet = Outlet { sender, room, dropped_lines: dropped_lines.clone() };
    // Nothing else comes over this connection.
    let arrivals = Arrivals { statistics: connection.client.statistics(), taken: 0, came: 0, missed: 0 };
    tokio::spawn(forward((subscriber, arrivals), outlet, shutdown));
    Ok(RawFeed { connection, messages, dropped_lines, told: 0 })
}

impl RawFeed {
    /// The next message, which holds one line or several; `None` once the group is left and all is read.
    pub async fn next(&mut self) -> Option<Bytes> {
        self.messages.recv().await.map(|(payload, _)| payload)
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// Lines that were dropped since the last call, because their reader is too slow. A message that the client itself
    /// dropped counts as one.
    pub fn take_dropped(&mut self) -> u64 {
        let dropped = self.dropped_lines.load(Ordering::Relaxed);
        let new = dropped - self.told;
        self.told = dropped;
        new
    }

    /// Why nothing may come, for reports.
    pub fn problem(&self) -> Option<Problem> {
        self.connection.problem().or_else(|| {
            let complaint = self.connection.link.failure()?;
            Some(Problem::degraded(format!("NATS complains about the reading of raw lines: {complaint}")))
        })
    }
}

/// Where messages wait.
struct Outlet {
    sender: mpsc::Sender<(Bytes, OwnedSemaphorePermit)>,
    room: Arc<Semaphore>,
    dropped_lines: Arc<AtomicU64>,
}

impl Outlet {
    /// Never waits, so that the client's own buffer, which counts messages and not bytes, stays empty.
    fn put(&self, payload: Bytes) {
        let bytes = u32::try_from(payload.len() + MESSAGE_BYTES).unwrap_or(u32::MAX);
        let lines = count_lines(&payload);
        let room = self.room.clone().try_acquire_many_owned(bytes).ok();
        // The channel has a place for each message that has room.
        let sent = room.is_some_and(|room| self.sender.try_send((payload, room)).is_ok());
        if !sent {
            self.note_dropped(lines);
        }
    }

    fn note_dropped(&self, lines: u64) {
        self.dropped_lines.fetch_add(lines, Ordering::Relaxed);
    }
}

/// Lines of a message; the last needs no line end.
fn count_lines(payload: &[u8]) -> u64 {
    payload.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).count().max(1) as u64
}

/// What the client dropped for want of room in its subscription: it says neither how much nor of which message.
struct Arrivals {
    statistics: Arc<Statistics>,
    /// Messages that we got.
    taken: u64,
    /// Messages that had come when this was counted last. By now each of them is taken or dropped.
    came: u64,
    /// Messages that were dropped.
    missed: u64,
}

impl Arrivals {
    /// How many more are known to be dropped. What came since the last call is left for the next, as it may still wait.
    fn count(&mut self) -> u64 {
        let missed = self.came.saturating_sub(self.taken).max(self.missed);
        let new = missed - self.missed;
        self.missed = missed;
        self.came = self.statistics.in_messages.load(Ordering::Relaxed);
        new
    }
}

async fn forward((mut subscriber, mut arrivals): (Subscriber, Arrivals), outlet: Outlet, shutdown: Shutdown) {
    let mut ticks = interval(COUNT_INTERVAL);
    loop {
        // Counted when none waits, or as many were taken as can have waited: what only waits is not lost.
        let settled = tokio::select! {
            biased;
            () = shutdown.draining() => break,
            message = subscriber.next() => {
                let Some(message) = message else { return };
                arrivals.taken += 1;
                outlet.put(message.payload);
                arrivals.taken.is_multiple_of(MESSAGES_MAX as u64)
            }
            _ = ticks.tick() => true,
        };
        if settled {
            outlet.note_dropped(arrivals.count());
        }
    }
    let left = async {
        if subscriber.drain().await.is_ok() {
            while let Some(message) = subscriber.next().await {
                arrivals.taken += 1;
                outlet.put(message.payload);
            }
        }
    };
    // Without a connection nothing more comes.
    let _late = tokio::time::timeout(LEAVE_TIMEOUT, left).await;
    while let Some(Some(message)) = subscriber.next().now_or_never() {
        arrivals.taken += 1;
        outlet.put(message.payload);
    }
    // The second time all that came is settled.
    outlet.note_dropped(arrivals.count() + arrivals.count());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_client_dropped_is_what_came_and_was_not_taken() {
        let mut arrivals = Arrivals { statistics: Arc::default(), taken: 0, came: 0, missed: 0 };
        let mut count = |came: u64, taken| {
            arrivals.statistics.in_messages.store(came, Ordering::Relaxed);
            arrivals.taken = taken;
            arrivals.count()
        };
        assert_eq!(count(10, 0), 0, "all are on their way");
        assert_eq!(count(20, 12), 0);
        assert_eq!(count(20, 15), 5, "five never came");
        assert_eq!(count(30, 15), 0);
        assert_eq!(count(30, 24), 1);
    }

    #[test]
    fn what_waits_is_bounded_in_bytes_and_what_is_dropped_is_counted_in_lines() {
        let (sender, mut messages) = mpsc::channel(MESSAGES_MAX);
        let room = Arc::new(Semaphore::new(WAITING_BYTES_MAX));
        let outlet = Outlet { sender, room, dropped_lines: Arc::default() };
        let large = Bytes::from(vec![b'x'; (1 << 20) - MESSAGE_BYTES]);
        (0..20).for_each(|_| outlet.put(large.clone()));
        outlet.put(Bytes::from_static(b"a\nb\n\nc\n"));
        assert_eq!(messages.len(), 16);
        assert_eq!(outlet.dropped_lines.load(Ordering::Relaxed), 4 + 3);
        drop(messages.try_recv());
        outlet.put(Bytes::from_static(b"a"));
        assert_eq!(messages.len(), 16, "read ones make room");
        while messages.try_recv().is_ok() {}
        let small = WAITING_BYTES_MAX / (MESSAGE_BYTES + 1);
        (0..=small).for_each(|_| outlet.put(Bytes::from_static(b"a")));
        assert_eq!((messages.len(), outlet.dropped_lines.load(Ordering::Relaxed)), (small, 8));
    }
}
