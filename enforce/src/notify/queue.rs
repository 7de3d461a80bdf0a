//! What waits to be told, in order: few events one by one, many as one digest a minute; what fails is tried again. Pure.
//!
//! At most one message is on its way. While it cannot be delivered, what comes behind it is gathered, so that a queue is of
//! fixed size however long that lasts, and still counts every event.

use std::collections::VecDeque;
use std::time::Duration;

use proto::time::Timestamp;
use serde::{Deserialize, Serialize};

use crate::notify::digest::Digest;
use crate::notify::message::{Message, Notice};

/// Events in [`WINDOW`] that are told one by one.
pub(crate) const SINGLES_MAX: usize = 5;
/// How long events are gathered.
pub(crate) const WINDOW: Duration = Duration::from_secs(60);
/// First wait after a failure, doubled with each.
const RETRY_FIRST: Duration = Duration::from_secs(1);
/// Longest wait after a failure.
const RETRY_MAX: Duration = Duration::from_secs(300);
/// Longest wait that a server may ask for.
const ASKED_MAX: Duration = Duration::from_secs(3600);
/// Waits are longer by up to one part in so many, so that tellers of one server do not come all at once.
const JITTER_SHARE: u32 = 4;

/// What came of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It is there.
    Delivered,
    /// It will never be; why.
    Refused(String),
    /// It was not tried: we write as often as we may.
    Paced(Duration),
    /// It is to be tried again, after so long at least, as its server asks; why it failed.
    Later(Duration, String),
    /// It is to be tried again, and may pass; why it failed.
    Failed(String),
    /// It is to be tried again, but will not pass without a person; why.
    Broken(String),
}

/// A message, and the number of the newest event that it tells.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Held {
    message: Message,
    at: u64,
}

/// Events that are gathered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Gathering {
    /// Told as it is if it stays alone.
    first: Notice,
    digest: Digest,
    at: u64,
    due: Timestamp,
}

impl Gathering {
    fn into_held(self) -> Held {
        let message = if self.digest.total == 1 { Message::One(self.first) } else { Message::Many(self.digest) };
        Held { message, at: self.at }
    }
}

/// What a queue holds, for the disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Waiting {
    messages: VecDeque<Held>,
    gathering: Option<Gathering>,
    /// When events of the last minute were taken to be told one by one.
    singles: VecDeque<Timestamp>,
    /// Until then everything is gathered.
    flood_until: Option<Timestamp>,
}

/// A queue of one notifier.
#[derive(Clone, Debug, Default)]
pub(crate) struct Queue {
    waiting: Waiting,
    /// Makes waits differ between notifiers.
    seed: u64,
    /// Number of the newest event that was taken, and of the newest that is done with.
    taken: u64,
    done: u64,
    failures: u32,
    not_before: Option<Timestamp>,
    is_sending: bool,
    /// What is on its way has been forgotten.
    is_forgotten: bool,
}

impl Queue {
    /// With what was left from a former run.
    pub(crate) fn new(name: &str, waiting: Waiting) -> Self {
        let seed = name
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        let mut queue = Self { waiting, seed, ..Self::default() };
        // Numbers begin anew with each run.
        queue.waiting.messages.iter_mut().for_each(|held| held.at = 0);
        queue.waiting.gathering.iter_mut().for_each(|gathering| gathering.at = 0);
        queue
    }

    /// What is left for a later run.
    pub(crate) fn waiting(&self) -> &Waiting {
        &self.waiting
    }

    /// Forgets everything: somebody else tells it.
    pub(crate) fn clear(&mut self) {
        let is_sending = self.is_sending;
        *self = Self { seed: self.seed, is_sending, is_forgotten: is_sending, ..Self::default() };
    }

    /// Events that wait, those on their way included.
    pub(crate) fn count(&self) -> u64 {
        let gathered = self.waiting.gathering.as_ref().map_or(0, |gathering| gathering.digest.total);
        self.waiting.messages.iter().map(|held| held.message.count()).sum::<u64>() + gathered
    }

    /// An event that is not told: only its number matters.
    pub(crate) fn pass_over(&mut self, at: u64) {
        self.taken = at;
    }

    /// Takes what is no public event, and has no number of its own.
    pub(crate) fn handle_own(&mut self, notice: Notice, now: Timestamp) {
        self.handle_notice(notice, self.taken, now);
    }

    /// Takes an event whose number is `at`.
    pub(crate) fn handle_notice(&mut self, notice: Notice, at: u64, now: Timestamp) {
        self.taken = at;
        let waiting = &mut self.waiting;
        if let Some(gathering) = &mut waiting.gathering {
            gathering.digest.add(&notice);
            gathering.at = at;
            return;
        }
        while waiting.singles.front().is_some_and(|single| now.since(*single) >= WINDOW || *single > now) {
            waiting.singles.pop_front();
        }
        waiting.flood_until = waiting.flood_until.filter(|until| now < *until);
        if waiting.flood_until.is_none() && waiting.singles.len().max(waiting.messages.len()) < SINGLES_MAX {
            waiting.singles.push_back(now);
            waiting.messages.push_back(Held { message: Message::One(notice), at });
            return;
        }
        let due = waiting.flood_until.unwrap_or(now.saturating_add(WINDOW));
        waiting.gathering = Some(Gathering { digest: Digest::of(&notice), first: notice, at, due });
    }

    /// From now on what is gathered is due.
    pub(crate) fn hurry(&mut self, now: Timestamp) {
        self.waiting.gathering.iter_mut().for_each(|gathering| gathering.due = now);
    }

    /// Nothing waits for longer than it may because the clock was set back.
    fn follow_clock(&mut self, now: Timestamp) {
        let waiting = &mut self.waiting;
        let (window, asked) = (now.saturating_add(WINDOW), now.saturating_add(ASKED_MAX));
        waiting.gathering.iter_mut().for_each(|gathering| gathering.due = gathering.due.min(window));
        waiting.flood_until = waiting.flood_until.map(|until| until.min(window));
        self.not_before = self.not_before.map(|start| start.min(asked));
    }

    /// The message to be sent now, which then is on its way until [`Queue::handle_outcome`].
    pub(crate) fn poll_message(&mut self, now: Timestamp) -> Option<Message> {
        self.follow_clock(now);
        if self.is_sending || self.not_before.is_some_and(|start| now < start) {
            return None;
        }
        let waiting = &mut self.waiting;
        if waiting.messages.is_empty() && waiting.gathering.as_ref().is_some_and(|gathering| gathering.due <= now) {
            let gathering = waiting.gathering.take()?;
            if gathering.digest.total > SINGLES_MAX as u64 {
                waiting.flood_until = Some(now.saturating_add(WINDOW));
            }
            waiting.messages.push_back(gathering.into_held());
        }
        let message = waiting.messages.front()?.message.clone();
        self.is_sending = true;
        Some(message)
    }

    /// When [`Queue::poll_message`] is worth a call, unless something happens before; `None` = not at all.
    pub(crate) fn poll_timeout(&self) -> Option<Timestamp> {
        if self.is_sending {
            return None;
        }
        let waiting = &self.waiting;
        let due = if waiting.messages.is_empty() { waiting.gathering.as_ref()?.due } else { Timestamp::EPOCH };
        Some(self.not_before.map_or(due, |start| start.max(due)))
    }

    /// Notes what came of the message on its way. Returns it, if it is done with.
    pub(crate) fn handle_outcome(&mut self, outcome: &Outcome, now: Timestamp) -> Option<Message> {
        self.is_sending = false;
        if std::mem::take(&mut self.is_forgotten) {
            return None;
        }
        match outcome {
            Outcome::Delivered | Outcome::Refused(_) => {
                (self.failures, self.not_before) = (0, None);
                let held = self.waiting.messages.pop_front()?;
                self.done = self.done.max(held.at);
                Some(held.message)
            }
            Outcome::Paced(wait) => {
                self.not_before = Some(now.saturating_add(*wait));
                None
            }
            Outcome::Later(asked, _) => {
                let wait = self.next_wait().max((*asked).min(ASKED_MAX));
                self.not_before = Some(now.saturating_add(wait));
                None
            }
            Outcome::Failed(_) | Outcome::Broken(_) => {
                self.not_before = Some(now.saturating_add(self.next_wait()));
                None
            }
        }
    }

    /// Counts a failure, and says how long to wait after it.
    fn next_wait(&mut self) -> Duration {
        let wait = RETRY_FIRST.saturating_mul(1 << self.failures.min(16)).min(RETRY_MAX);
        self.failures = self.failures.saturating_add(1);
        let spread = self.seed.rotate_left(self.failures * 7 % 64) % 1024;
        wait + wait / JITTER_SHARE * u32::try_from(spread).unwrap_or_default() / 1024
    }

    /// How often in a row the message in front has failed.
    pub(crate) fn failures(&self) -> u32 {
        self.failures
    }

    /// Number of the newest event up to which all are done with; 0 before there is one.
    pub(crate) fn position(&self) -> u64 {
        if self.is_idle() { self.taken } else { self.done }
    }

    /// Whether nothing waits.
    pub(crate) fn is_idle(&self) -> bool {
        self.waiting.messages.is_empty() && self.waiting.gathering.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::notify::message::samples::{alarm, banned};

    fn at(millis: i64) -> Timestamp {
        Timestamp::from_secs(1_767_225_600).saturating_add(Duration::from_millis(millis as u64))
    }

    /// Sends all that is due by `now` with what `send` says, and returns the messages that are done with.
    fn run(queue: &mut Queue, now: Timestamp, mut send: impl FnMut(&Message) -> Outcome) -> Vec<Message> {
        let mut done = Vec::new();
        while queue.poll_timeout().is_some_and(|due| due <= now) {
            let Some(message) = queue.poll_message(now) else { break };
            done.extend(queue.handle_outcome(&send(&message), now));
        }
        done
    }

    /// So many events, one each `every_ms`; the messages with the moments at which they were sent.
    fn flood(events: u32, every_ms: i64) -> Vec<(i64, Message)> {
        let mut queue = Queue::new("telegram", Waiting::default());
        let mut sent = Vec::new();
        let end = i64::from(events) * every_ms + 130_000;
        let mut next = 0;
        for now in (0..end).step_by(every_ms.min(100) as usize) {
            if next < events && now >= i64::from(next) * every_ms {
                queue.handle_notice(banned(next, "r"), u64::from(next) + 1, at(now));
                next += 1;
            }
            sent.extend(run(&mut queue, at(now), |_| Outcome::Delivered).into_iter().map(|message| (now, message)));
        }
        assert!(queue.is_idle());
        assert_eq!(queue.position(), u64::from(events));
        sent
    }

    #[test]
    fn ten_thousand_events_in_five_minutes_are_one_digest_a_minute_and_none_is_lost() {
        let sent = flood(10_000, 30);
        assert_eq!(sent.iter().map(|(_, message)| message.count()).sum::<u64>(), 10_000);
        for (start, _) in &sent {
            let in_a_minute = sent.iter().filter(|(time, _)| (*start..start + 60_000).contains(time)).count();
            assert!(in_a_minute <= SINGLES_MAX + 1, "{in_a_minute} messages in the minute from {start} ms");
        }
        assert!(sent.len() <= SINGLES_MAX + 7, "{}", sent.len());
        assert!(sent[..SINGLES_MAX].iter().all(|(time, message)| *time < 200 && message.count() == 1));
    }

    #[test]
    fn events_now_and_then_are_told_one_by_one_at_once() {
        let sent = flood(50, 20_000);
        assert!(sent.iter().all(|(_, message)| matches!(message, Message::One(_))));
        assert!(sent.iter().enumerate().all(|(index, (time, _))| *time == index as i64 * 20_000));
    }

    #[test]
    fn a_gathered_event_that_stays_alone_is_told_as_it_is() {
        let mut queue = Queue::new("telegram", Waiting::default());
        for n in 0..=SINGLES_MAX as u32 {
            queue.handle_notice(banned(n, "r"), u64::from(n), at(0));
        }
        assert_eq!(run(&mut queue, at(0), |_| Outcome::Delivered).len(), SINGLES_MAX);
        assert_eq!(queue.poll_timeout(), Some(at(60_000)));
        assert_eq!(run(&mut queue, at(60_000), |_| Outcome::Delivered), [Message::One(banned(5, "r"))]);
    }

    #[test]
    fn what_fails_is_tried_again_less_and_less_often_and_keeps_its_place() {
        let mut queue = Queue::new("telegram", Waiting::default());
        queue.handle_notice(banned(1, "r"), 7, at(0));
        let mut waits = Vec::new();
        let mut now = at(0);
        for _ in 0..20 {
            assert_eq!(run(&mut queue, now, |_| Outcome::Failed("down".into())), []);
            let due = queue.poll_timeout().unwrap();
            waits.push(due.since(now));
            now = due;
        }
        assert!(waits[0] >= RETRY_FIRST && waits[0] <= RETRY_FIRST * 5 / 4, "{waits:?}");
        assert!(waits.is_sorted_by_key(|wait| (*wait).min(RETRY_MAX)) && waits[19] <= RETRY_MAX * 5 / 4, "{waits:?}");
        for n in 0..100_000 {
            queue.handle_notice(banned(n % 255, "r"), 8 + u64::from(n), now);
        }
        assert_eq!((queue.count(), queue.position()), (100_001, 0));
        let size = serde_json::to_vec(queue.waiting()).unwrap().len();
        assert!(size < 64 << 10, "{size} bytes for the disk");
        now = now.saturating_add(WINDOW);
        let told = run(&mut queue, now, |_| Outcome::Delivered);
        assert_eq!(told.iter().map(Message::count).sum::<u64>(), 100_001);
        assert_eq!(told[0], Message::One(banned(1, "r")));
        assert_eq!(queue.position(), 100_007);
    }

    #[test]
    fn a_clock_that_is_set_back_holds_up_nothing_for_long() {
        let mut queue = Queue::new("telegram", Waiting::default());
        for n in 0..10 {
            queue.handle_notice(banned(n, "r"), u64::from(n), at(86_400_000));
        }
        run(&mut queue, at(86_400_000), |_| Outcome::Delivered);
        assert_eq!(run(&mut queue, at(0), |_| Outcome::Delivered), []);
        assert_eq!(queue.poll_message(at(0)), None);
        assert_eq!(queue.poll_timeout(), Some(at(60_000)));
    }

    #[test]
    fn a_server_that_asks_to_wait_is_obeyed() {
        let mut queue = Queue::new("telegram", Waiting::default());
        queue.handle_notice(banned(1, "r"), 1, at(0));
        run(&mut queue, at(0), |_| Outcome::Later(Duration::from_secs(17), "busy".into()));
        assert_eq!(queue.poll_timeout(), Some(at(17_000)));
        assert_eq!(queue.poll_message(at(16_999)), None);
        assert_eq!(run(&mut queue, at(17_000), |_| Outcome::Refused("no".into())).len(), 1);
        assert_eq!(queue.position(), 1);
    }

    #[test]
    fn a_server_that_asks_for_no_wait_is_not_asked_again_and_again() {
        let mut queue = Queue::new("telegram", Waiting::default());
        queue.handle_notice(banned(1, "r"), 1, at(0));
        let mut now = at(0);
        for failures in 1..20 {
            run(&mut queue, now, |_| Outcome::Later(Duration::ZERO, "busy".into()));
            assert_eq!(queue.failures(), failures);
            let due = queue.poll_timeout().unwrap();
            assert!(due.since(now) >= RETRY_FIRST.saturating_mul(1 << (failures - 1)).min(RETRY_MAX));
            now = due;
        }
    }

    #[test]
    fn our_own_pace_is_no_failure() {
        let mut queue = Queue::new("telegram", Waiting::default());
        queue.handle_notice(banned(1, "r"), 1, at(0));
        run(&mut queue, at(0), |_| Outcome::Paced(Duration::from_millis(300)));
        assert_eq!((queue.failures(), queue.poll_timeout()), (0, Some(at(300))));
    }

    #[test]
    fn what_became_of_a_message_that_was_forgotten_says_nothing_of_the_next() {
        let mut queue = Queue::new("telegram", Waiting::default());
        queue.handle_notice(banned(1, "r"), 1, at(0));
        assert!(queue.poll_message(at(0)).is_some());
        queue.clear();
        queue.handle_notice(banned(2, "r"), 9, at(0));
        assert_eq!(queue.handle_outcome(&Outcome::Delivered, at(0)), None);
        assert_eq!((queue.count(), queue.position()), (1, 0));
        assert_eq!(run(&mut queue, at(0), |_| Outcome::Delivered), [Message::One(banned(2, "r"))]);
    }

    #[test]
    fn the_position_waits_for_what_is_not_told_and_passes_over_what_need_not_be() {
        let mut queue = Queue::new("telegram", Waiting::default());
        queue.pass_over(3);
        assert_eq!(queue.position(), 3);
        queue.handle_notice(alarm("x"), 4, at(0));
        queue.pass_over(5);
        assert_eq!(queue.position(), 0);
        run(&mut queue, at(0), |_| Outcome::Delivered);
        assert_eq!(queue.position(), 5);
    }

    #[test]
    fn what_waits_survives_a_restart_in_order_and_once() {
        let mut queue = Queue::new("telegram", Waiting::default());
        for n in 0..20 {
            queue.handle_notice(banned(n, "r"), u64::from(n), at(0));
        }
        assert!(queue.poll_message(at(0)).is_some(), "on its way when the process ends");
        let stored = serde_json::to_vec(queue.waiting()).unwrap();
        let mut queue = Queue::new("telegram", serde_json::from_slice(&stored).unwrap());
        queue.handle_notice(banned(20, "r"), 1, at(1000));
        queue.hurry(at(1000));
        let told = run(&mut queue, at(1000), |_| Outcome::Delivered);
        assert_eq!(told.iter().map(Message::count).collect::<Vec<_>>(), [1, 1, 1, 1, 1, 16]);
        assert_eq!(told[0], Message::One(banned(0, "r")));
        assert_eq!(queue.position(), 1);
    }
}
