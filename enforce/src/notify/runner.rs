//! The task of one notifier: takes events while the duty is ours, hands them to the queue, sends what is due, and notes how
//! far it has told.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use proto::bus::duty::Duty;
use proto::bus::feed::{EventFeed, Fed, Others};
use proto::bus::nats::told::TellError;
use proto::report::{BackendReport, Problem};
use proto::shutdown::Shutdown;
use proto::time::{Clock, Timestamp};
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;

use crate::action::Surroundings;
use crate::board::Board;
use crate::metrics::EnforceMetrics;
use crate::notify::kept;
use crate::notify::message::{EventKind, Life, Message, Notice};
use crate::notify::queue::{Outcome, Queue, Waiting};
use crate::notify::telegram::Telegram;
use crate::notify::webhook::Webhook;
use crate::reconcile::chain_of;

/// How often the report is renewed, and a position that could not be written is written again.
const TICK: Duration = Duration::from_secs(1);
/// Events taken at once, before they are kept or sent.
const TAKEN_MAX: usize = 256;
/// Failures in a row of a message before they are a problem: most pass by themselves.
const FAILURES_SILENT: u32 = 3;
/// How long the last messages of a process may take.
const END_MAX: Duration = Duration::from_secs(3);

/// Where messages go.
#[derive(Debug)]
pub(crate) enum Channel {
    Telegram(Box<Telegram>),
    Webhook(Box<Webhook>),
}

impl Channel {
    async fn send(&mut self, message: &Message) -> Outcome {
        match self {
            Self::Telegram(telegram) => telegram.send(message).await,
            Self::Webhook(webhook) => webhook.send(message).await,
        }
    }

    fn render(&self, message: &Message) -> String {
        match self {
            Self::Telegram(telegram) => telegram.render(message),
            Self::Webhook(webhook) => webhook.render(message),
        }
    }

    /// Reads what a message needs.
    fn make_ready(&mut self) -> Result<(), String> {
        match self {
            Self::Telegram(telegram) => telegram.make_ready(),
            Self::Webhook(webhook) => webhook.make_ready(),
        }
    }

    fn destination(&self) -> String {
        match self {
            Self::Telegram(telegram) => telegram.destination(),
            Self::Webhook(webhook) => webhook.destination(),
        }
    }

    fn advice(&self) -> Option<String> {
        match self {
            Self::Telegram(telegram) => telegram.advice().map(str::to_owned),
            Self::Webhook(_) => None,
        }
    }
}

/// A message on its way, and what carries it.
type Flight = JoinHandle<(Channel, Outcome)>;

/// One notifier.
#[derive(Debug)]
pub(crate) struct Notifier {
    name: String,
    node: Arc<str>,
    wanted: BTreeSet<EventKind>,
    /// Away while a message is on its way.
    channel: Option<Channel>,
    flight: Option<Flight>,
    queue: Queue,
    feed: EventFeed,
    /// `None` where it only says what it would tell.
    duty: Option<Duty>,
    /// Whether it was ours when we last looked; from then on events are taken.
    held: bool,
    /// Where one host keeps what is not told yet.
    kept: Option<PathBuf>,
    /// What it was kept as last.
    stored: Waiting,
    /// People have been told that the service runs, or need not be.
    is_announced: bool,
    /// Events are being taken.
    has_begun: bool,
    destination: String,
    advice: Option<String>,
    /// What no message could be sent for.
    unready: Option<String>,
    /// What is wrong with the message in front, and whether it may pass.
    trouble: Option<(String, bool)>,
    /// What became of the last message that was refused, until one is delivered.
    refusal: Option<String>,
    kept_problem: Option<String>,
    sent: u64,
    refused: u64,
    missed: u64,
    board: Board,
    metrics: EnforceMetrics,
    clock: Clock,
    shutdown: Shutdown,
}

impl Notifier {
    /// Follows events from now on, and takes the duty when it may. Needs a runtime.
    pub(crate) fn new(name: String, wanted: BTreeSet<EventKind>, channel: Channel, around: &Surroundings) -> Self {
        let feed = around.events.follow(&name, around.dry_run);
        let duty = (!around.dry_run).then(|| around.duties.take(&name));
        let keeps = !feed.remembers() && !around.dry_run;
        let kept = around.state_dir.as_deref().filter(|_| keeps).map(|state_dir| kept::path(state_dir, &name));
        let (mut waiting, mut kept_problem) = (Waiting::default(), None);
        match kept.as_deref().map(kept::load) {
            Some(Ok(loaded)) => waiting = loaded,
            Some(Err(error)) => kept_problem = Some(chain_of(&error)),
            None => {}
        }
        Self {
            queue: Queue::new(&name, waiting.clone()),
            node: around.node.clone(),
            wanted,
            destination: channel.destination(),
            channel: Some(channel),
            flight: None,
            feed,
            held: duty.as_ref().is_none_or(Duty::is_held),
            duty,
            kept,
            stored: waiting,
            is_announced: false,
            has_begun: false,
            advice: None,
            unready: None,
            trouble: None,
            refusal: None,
            kept_problem,
            sent: 0,
            refused: 0,
            missed: 0,
            board: around.board.clone(),
            metrics: around.metrics.clone(),
            clock: around.clock.clone(),
            shutdown: around.shutdown.clone(),
            name,
        }
    }

    fn is_held(&self) -> bool {
        self.held && self.duty.as_ref().is_none_or(Duty::is_held)
    }

    /// Tells until the shutdown.
    pub(crate) async fn run(mut self) {
        let shutdown = self.shutdown.clone();
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        self.make_ready();
        if let Some(why) = &self.unready {
            tracing::error!(notifier = self.name, reason = why, "No message can be delivered");
        }
        loop {
            let (is_held, timeout) = (self.is_held(), self.timeout());
            tokio::select! {
                () = shutdown.draining() => break,
                outcome = finish(&mut self.flight) => self.take_outcome(outcome).await,
                fed = self.feed.next(), if is_held => self.take(fed).await,
                () = changed(&mut self.duty) => self.handle_duty(),
                () = tokio::time::sleep(timeout.unwrap_or_default()), if timeout.is_some() => {}
                _ = ticks.tick() => self.handle_tick().await,
            }
            self.send();
        }
        tokio::select! {
            () = self.end() => {}
            () = shutdown.forced() => {}
        }
    }

    /// How long until a message is due; `None` while none can be sent.
    fn timeout(&self) -> Option<Duration> {
        let can_send = self.is_held() && self.has_begun && self.flight.is_none();
        self.queue.poll_timeout().filter(|_| can_send).map(|due| due.since(self.clock.now()))
    }

    async fn take(&mut self, fed: Fed) {
        let mut next = Some(fed);
        let mut taken = 0;
        while let Some(fed) = next {
            self.take_one(fed).await;
            taken += 1;
            next = if taken < TAKEN_MAX { self.feed.try_next() } else { None };
        }
        self.keep().await;
        self.tell().await;
    }

    async fn take_one(&mut self, fed: Fed) {
        let now = self.clock.now();
        match fed {
            Fed::Begun { was_running } => {
                self.has_begun = true;
                // Where the others were killed, nobody could say that the service stopped.
                let others = self.feed.others(&self.node).await.unwrap_or(Others::Running);
                let runs = was_running && others != Others::None;
                self.is_announced = runs || !self.wanted.contains(&EventKind::Started);
                if !self.is_announced && self.duty.is_some() {
                    self.queue.handle_own(Notice::Started(self.life(now)), now);
                }
            }
            Fed::Event { at, event } if self.wanted.contains(&EventKind::of(&event)) => {
                self.queue.handle_notice(Notice::Event(Box::new((*event).clone())), at, now);
            }
            Fed::Event { at, .. } => self.queue.pass_over(at),
            Fed::Missed(missed) => {
                self.missed += missed;
                tracing::error!(notifier = self.name, missed, "Events came too fast and are not told");
            }
        }
    }

    fn life(&self, time: Timestamp) -> Life {
        Life { node: self.node.to_string(), time }
    }

    fn handle_duty(&mut self) {
        let held = self.duty.as_ref().is_none_or(Duty::is_held);
        if std::mem::replace(&mut self.held, held) != held {
            if held {
                tracing::info!(notifier = self.name, "This host tells from now on");
            }
            // What others have told meanwhile is not told again.
            self.forget();
        }
    }

    /// Another tells, or has told.
    fn forget(&mut self) {
        self.queue.clear();
        (self.has_begun, self.trouble) = (false, None);
        self.feed.begin_again();
    }

    /// Sends what is due, if anything is.
    fn send(&mut self) {
        if self.flight.is_some() || !self.is_held() || !self.has_begun {
            return;
        }
        let Some(message) = self.queue.poll_message(self.clock.now()) else { return };
        let Some(mut channel) = self.channel.take() else { return };
        let is_real = self.duty.is_some();
        let name = self.name.clone();
        self.flight = Some(tokio::spawn(async move {
            if !is_real {
                tracing::info!(notifier = name, text = channel.render(&message), "Would tell");
                return (channel, Outcome::Delivered);
            }
            let outcome = channel.send(&message).await;
            (channel, outcome)
        }));
    }

    async fn take_outcome(&mut self, (channel, outcome): (Channel, Outcome)) {
        (self.destination, self.advice) = (channel.destination(), channel.advice());
        self.channel = Some(channel);
        let done = self.queue.handle_outcome(&outcome, self.clock.now());
        let label = match outcome {
            Outcome::Delivered => {
                (self.trouble, self.refusal) = (None, None);
                "delivered"
            }
            Outcome::Refused(why) => {
                tracing::error!(notifier = self.name, reason = why, "A message is refused and is given up");
                self.trouble = None;
                self.refusal = Some(why);
                "refused"
            }
            Outcome::Paced(_) => "paced",
            Outcome::Later(wait, why) => {
                tracing::info!(notifier = self.name, reason = why, wait_s = wait.as_secs(), "A message has to wait");
                self.note_trouble(why, true);
                "later"
            }
            Outcome::Failed(why) => {
                self.note_trouble(why, true);
                "failed"
            }
            Outcome::Broken(why) => {
                self.note_trouble(why, false);
                "failed"
            }
        };
        self.metrics.count_message(&self.name, label);
        if let Some(message) = done {
            self.is_announced = true;
            let counter = if label == "delivered" { &mut self.sent } else { &mut self.refused };
            *counter += message.count();
            self.keep().await;
            self.tell().await;
        }
        self.report();
    }

    fn note_trouble(&mut self, why: String, may_pass: bool) {
        let is_new = self.trouble.as_ref().is_none_or(|(known, _)| *known != why);
        if (may_pass && self.queue.failures() == FAILURES_SILENT) || (!may_pass && is_new) {
            tracing::warn!(notifier = self.name, reason = why, "A message cannot be delivered, it is tried again");
        }
        self.trouble = Some((why, may_pass));
    }

    /// Before there is anything to tell, as a mistake is better found now; also where another host tells, or nobody.
    fn make_ready(&mut self) {
        let Some(channel) = &mut self.channel else { return };
        self.unready = channel.make_ready().err();
        self.destination = channel.destination();
    }

    async fn handle_tick(&mut self) {
        if self.unready.is_some() {
            self.make_ready();
        }
        self.keep().await;
        self.tell().await;
        self.report();
    }

    /// Keeps on disk what is not told, if it has changed.
    async fn keep(&mut self) {
        let Some(path) = self.kept.clone() else { return };
        if self.stored == *self.queue.waiting() {
            return;
        }
        let waiting = self.queue.waiting().clone();
        let job = tokio::task::spawn_blocking(move || {
            let stored = kept::store(&path, &waiting);
            (stored, waiting)
        });
        // A panic there is like a failure: it is tried again.
        let Ok((stored, waiting)) = job.await else { return };
        match stored {
            Ok(()) => (self.stored, self.kept_problem) = (waiting, None),
            Err(error) => {
                let text = chain_of(&error);
                if self.kept_problem.as_ref() != Some(&text) {
                    tracing::error!(notifier = self.name, error = text, "A restart would forget what is not told yet");
                }
                self.kept_problem = Some(text);
            }
        }
    }

    /// Notes for successors how far we have told.
    async fn tell(&mut self) {
        if !self.has_begun || !self.is_held() {
            return;
        }
        match self.feed.tell(self.queue.position(), self.is_announced).await {
            Ok(()) => {}
            Err(TellError::Deposed) => self.forget(),
            Err(TellError::Bus(error)) => tracing::debug!(notifier = self.name, %error, "Position not written yet"),
        }
    }

    /// The last messages, and the news that we stop; the rest is left to a later run, or a successor.
    async fn end(mut self) {
        let finished = tokio::time::timeout(END_MAX, self.tell_the_last()).await;
        if finished.is_err() {
            tracing::warn!(notifier = self.name, waiting = self.queue.count(), "Stopped before everything was told");
        }
        self.keep().await;
        self.report();
        if let Some(duty) = self.duty.take() {
            duty.give_back().await;
        }
    }

    async fn tell_the_last(&mut self) {
        if !self.is_held() || !self.has_begun {
            return;
        }
        while let Some(fed) = self.feed.try_next() {
            self.take_one(fed).await;
        }
        let others = self.feed.others(&self.node).await.unwrap_or(Others::Running);
        let is_last = self.duty.is_some() && others != Others::Running;
        let now = self.clock.now();
        if is_last && self.wanted.contains(&EventKind::Stopped) {
            self.queue.handle_own(Notice::Stopped(self.life(now)), now);
        }
        if is_last {
            self.queue.hurry(now);
        }
        self.keep().await;
        loop {
            self.send();
            if self.flight.is_some() {
                let outcome = finish(&mut self.flight).await;
                self.take_outcome(outcome).await;
                continue;
            }
            match self.timeout() {
                // What would come after our end is for later.
                Some(wait) if wait < END_MAX => tokio::time::sleep(wait).await,
                _ => break,
            }
        }
        self.is_announced &= !is_last;
        self.tell().await;
    }

    fn report(&self) {
        self.metrics.set_messages_waiting(&self.name, self.queue.count());
        let mut detail = Vec::new();
        let destination = &self.destination;
        match &self.duty {
            None => detail.push("dry run: nothing is told".to_owned()),
            Some(duty) if duty.is_held() => {
                let (sent, refused, waiting) = (self.sent, self.refused, self.queue.count());
                detail.push(format!("{destination}: {sent} events told, {waiting} wait, {refused} refused"));
            }
            Some(duty) => {
                let holder = duty.holder().map_or("nobody yet".to_owned(), |holder| format!("told by {holder}"));
                detail.push(holder);
            }
        }
        self.board.put(BackendReport { name: self.name.clone(), detail, ..BackendReport::default() }, self.problems());
    }

    fn problems(&self) -> Vec<Problem> {
        let duty = self.duty.as_ref().and_then(Duty::problem);
        let mut problems: Vec<Problem> = duty.into_iter().chain(self.feed.problem()).collect();
        if let Some(why) = &self.unready {
            problems.push(Problem::degraded(format!("messages are not delivered: {why}")));
        } else if let Some((why, may_pass)) = &self.trouble
            && (!may_pass || self.queue.failures() >= FAILURES_SILENT)
        {
            problems.push(Problem::degraded(format!("messages are not delivered: {why}")));
        }
        problems.extend(self.refusal.iter().map(|why| Problem::degraded(format!("a message was refused: {why}"))));
        problems.extend(self.advice.iter().map(Problem::warning));
        problems.extend(self.kept_problem.iter().map(Problem::warning));
        if self.missed > 0 {
            problems.push(Problem::warning(format!("{} events came too fast and were not told", self.missed)));
        }
        problems
    }
}

/// Waits for what is on its way; for ever where nothing is.
async fn finish(flight: &mut Option<Flight>) -> (Channel, Outcome) {
    let Some(job) = flight else { return std::future::pending().await };
    match job.await {
        Ok(done) => {
            *flight = None;
            done
        }
        // It took the channel with it: the role ends, as with every broken job.
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

async fn changed(duty: &mut Option<Duty>) {
    match duty {
        Some(duty) => duty.changed().await,
        None => std::future::pending().await,
    }
}
