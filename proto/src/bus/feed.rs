//! Public events for those who tell people and programs of them: in order, each once.
//!
//! Over NATS a teller goes on where the last one of its name left off, on whichever host that was: how far it has told is
//! written behind every message, so that a successor repeats the one under way at most. On one host events come as they
//! happen, and the teller itself keeps what it has taken and not told yet.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::broadcast::{self, error::RecvError, error::TryRecvError};

use crate::bus::nats::told::{Session, TellError};
use crate::bus::nats::{BusError, Connection};
use crate::envelope::CloudEvent;
use crate::report::Problem;

/// What following brings.
#[derive(Clone, Debug, PartialEq)]
pub enum Fed {
    /// The beginning: what was told of the service last.
    Begun {
        /// Whether it was running; `false` on one host, where each start is one.
        was_running: bool,
    },
    /// The next event.
    Event {
        /// Its number; grows, and with gaps.
        at: u64,
        /// What happened.
        event: Arc<CloudEvent>,
    },
    /// So many events came faster than they were taken, and are lost.
    Missed(u64),
}

/// Which other hosts of a cluster enforce.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Others {
    /// None.
    None,
    /// None any more, but one has stopped in order a moment ago.
    Stopped,
    /// Some.
    Running,
}

/// Where events come from. Clones are the same place.
#[derive(Clone, Debug)]
pub struct EventSource(Source);

#[derive(Clone, Debug)]
enum Source {
    Local { events: broadcast::Sender<Arc<CloudEvent>>, begun: Arc<Mutex<Vec<broadcast::Receiver<Arc<CloudEvent>>>>> },
    Shared(Connection),
}

impl EventSource {
    /// Of this process. The first `readers` miss nothing from now on, however late they begin.
    pub fn local(events: &broadcast::Sender<Arc<CloudEvent>>, readers: usize) -> Self {
        let begun = (0..readers).map(|_| events.subscribe()).collect();
        Self(Source::Local { events: events.clone(), begun: Arc::new(Mutex::new(begun)) })
    }

    /// Of a cluster.
    pub fn shared(connection: &Connection) -> Self {
        Self(Source::Shared(connection.clone()))
    }

    /// Follows as the teller `name` (`[a-z0-9-]`). One that only `watches` begins with what happens next and keeps nothing.
    /// Needs a runtime.
    pub fn follow(&self, name: &str, watches: bool) -> EventFeed {
        EventFeed(match &self.0 {
            Source::Local { events, begun } => {
                let begun = begun.lock().unwrap_or_else(PoisonError::into_inner).pop();
                Feed::Local { events: begun.unwrap_or_else(|| events.subscribe()), taken: None }
            }
            Source::Shared(connection) => Feed::Shared(Box::new(Session::begin(connection, name, watches))),
        })
    }
}

/// Events as they are followed.
#[derive(Debug)]
pub struct EventFeed(Feed);

#[derive(Debug)]
enum Feed {
    Local {
        events: broadcast::Receiver<Arc<CloudEvent>>,
        /// `None` before the beginning was given.
        taken: Option<u64>,
    },
    Shared(Box<Session>),
}

impl EventFeed {
    /// What comes next. Waits as long as it takes, through every failure of the connection; nothing is lost when this is
    /// dropped half-way.
    pub async fn next(&mut self) -> Fed {
        match &mut self.0 {
            Feed::Local { taken: taken @ None, .. } => {
                *taken = Some(0);
                Fed::Begun { was_running: false }
            }
            Feed::Local { events, taken: Some(taken) } => match events.recv().await {
                Ok(event) => number(taken, event),
                Err(RecvError::Lagged(missed)) => Fed::Missed(missed),
                // Detection has ended, so nothing happens any more.
                Err(RecvError::Closed) => std::future::pending().await,
            },
            Feed::Shared(session) => session.next().await,
        }
    }

    /// What can be had without waiting.
    pub fn try_next(&mut self) -> Option<Fed> {
        match &mut self.0 {
            Feed::Local { taken: None, .. } => None,
            Feed::Local { events, taken: Some(taken) } => match events.try_recv() {
                Ok(event) => Some(number(taken, event)),
                Err(TryRecvError::Lagged(missed)) => Some(Fed::Missed(missed)),
                Err(TryRecvError::Empty | TryRecvError::Closed) => None,
            },
            Feed::Shared(session) => session.try_next(),
        }
    }

    /// Whether it is remembered for us how far we have told. If not, we keep what we have taken and not told.
    pub fn remembers(&self) -> bool {
        matches!(self.0, Feed::Shared(_))
    }

    /// Everything up to number `at` is told (0 = nothing more), and whether the service runs. Call it again after an error other than
    /// [`TellError::Deposed`]; a later call makes up for it.
    ///
    /// # Errors
    /// [`TellError::Deposed`] when somebody else tells by now: begin again. Else what the server says.
    pub async fn tell(&mut self, at: u64, is_running: bool) -> Result<(), TellError> {
        match &mut self.0 {
            Feed::Local { .. } => Ok(()),
            Feed::Shared(session) => session.tell(at, is_running).await,
        }
    }

    /// Which other hosts of the cluster enforce.
    ///
    /// # Errors
    /// When the heartbeats cannot be read.
    pub async fn others(&self, node: &str) -> Result<Others, BusError> {
        match &self.0 {
            Feed::Local { .. } => Ok(Others::None),
            Feed::Shared(session) => session.others(node).await,
        }
    }

    /// What is wrong where events cannot be read, or it cannot be noted how far is told, for reports.
    pub fn problem(&self) -> Option<Problem> {
        match &self.0 {
            Feed::Local { .. } => None,
            Feed::Shared(session) => session.problem(),
        }
    }

    /// Forgets what was taken; the next look begins where the last teller left off.
    pub fn begin_again(&mut self) {
        if let Feed::Shared(session) = &mut self.0 {
            session.begin_again();
        }
    }
}

fn number(taken: &mut u64, event: Arc<CloudEvent>) -> Fed {
    *taken += 1;
    Fed::Event { at: *taken, event }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::memory::{Bus, EVENTS_MAX};
    use crate::time::Timestamp;

    fn event(text: &str) -> Arc<CloudEvent> {
        Arc::new(CloudEvent::of_alarm("n", "k", text.to_owned(), Timestamp::EPOCH))
    }

    #[tokio::test]
    async fn events_that_happen_before_a_reader_begins_are_not_missed() {
        let bus = Bus::new();
        let source = EventSource::local(&bus.events, 1);
        bus.events.send(event("first")).unwrap();
        let mut feed = source.follow("telegram", false);
        assert_eq!(feed.next().await, Fed::Begun { was_running: false });
        assert_eq!(feed.next().await, Fed::Event { at: 1, event: event("first") });
        let mut late = source.follow("other", false);
        bus.events.send(event("second")).unwrap();
        assert_eq!(feed.next().await, Fed::Event { at: 2, event: event("second") });
        late.next().await;
        assert_eq!(late.next().await, Fed::Event { at: 1, event: event("second") });
    }

    #[tokio::test]
    async fn what_came_too_fast_is_counted() {
        let bus = Bus::new();
        let mut feed = EventSource::local(&bus.events, 0).follow("telegram", false);
        for _ in 0..EVENTS_MAX + 3 {
            bus.events.send(event("x")).unwrap();
        }
        feed.next().await;
        assert_eq!(feed.next().await, Fed::Missed(3));
        assert!(matches!(feed.try_next(), Some(Fed::Event { at: 1, .. })));
    }
}
