//! Leases: at most one holder at a time, as far as a clock can tell. What must not happen twice needs a fence besides.
//!
//! A holder renews its key, which the server lets end by itself; who waits takes it when it has ended, was given back, or
//! has not been renewed for as long as it lasts, by the waiter's own clock. Each renewal carries the time to live: an
//! update without it would make the lease last for ever, and so would taking over a key that has once ended.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use async_nats::HeaderMap;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, sleep};

use super::trouble::{Trouble, problem};
use super::{BusError, Connection, Stored, WRONG_LAST_SEQUENCE, answer, encode};
use crate::report::Problem;
use crate::subject::{bucket_key, bucket_stream};
use crate::time::{Clock, Timestamp};

/// How long a lease lasts without renewal. Whole seconds, as the server counts no finer.
pub const LEASE_TTL: Duration = Duration::from_secs(3);
/// How often it is renewed, and how often those who wait look.
pub const LEASE_INTERVAL: Duration = Duration::from_millis(250);
/// Looks without a renewal after which a lease is taken: only answered looks count, so that a time in which nobody could
/// renew does not cost the holder its lease.
const STALE_LOOKS: u32 = 10;
/// How long what has no fence is done after the last renewal that was answered was sent: no longer than others wait.
const UNFENCED_MAX: Duration = LEASE_INTERVAL.saturating_mul(STALE_LOOKS - 2);

/// Who holds a lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Node name.
    pub node: String,
    /// Differs with each run.
    pub instance: String,
}

/// One lease, as one process sees it.
#[derive(Debug)]
pub struct Lease {
    connection: Connection,
    bucket: String,
    key: String,
    me: Holder,
    /// Revision of our own key while we hold it.
    held: Option<u64>,
    /// Newest revision seen of another, and how often it was seen unchanged.
    other: (u64, u32),
    holder: Option<Holder>,
    /// How often it was taken: in between it may have been another's.
    takings: u64,
}

impl Lease {
    /// The lease `name` in `bucket`, not held.
    pub fn new(connection: &Connection, bucket: String, name: &str, me: Holder) -> Self {
        let (connection, key) = (connection.clone(), name.to_owned());
        Self { connection, bucket, key, me, held: None, other: (0, 0), holder: None, takings: 0 }
    }

    /// Whether we held it at the last word from the server.
    pub fn is_held(&self) -> bool {
        self.held.is_some()
    }

    /// Who holds it, as far as known.
    pub fn holder(&self) -> Option<&Holder> {
        if self.held.is_some() { Some(&self.me) } else { self.holder.as_ref() }
    }

    /// Renews the lease, or takes it if that may be. Call every [`LEASE_INTERVAL`]. Returns whether we hold it now.
    ///
    /// # Errors
    /// When the server does not answer or refuses; what we held may be held by others by then.
    pub async fn keep(&mut self) -> Result<bool, BusError> {
        if let Some(revision) = self.held {
            let written = self.write(revision).await?;
            if written.is_none() {
                // An answer may have been lost: then the key is still ours.
                self.held = None;
                return self.look().await;
            }
            self.held = written;
            return Ok(true);
        }
        self.look().await
    }

    /// Gives the lease back, so that others take it at once.
    ///
    /// # Errors
    /// When the server does not answer; it then ends by itself.
    pub async fn give_back(&mut self) -> Result<(), BusError> {
        let Some(revision) = self.held.take() else { return Ok(()) };
        let mut headers = HeaderMap::new();
        headers.insert("KV-Operation", "DEL");
        headers.insert("Nats-TTL", format!("{}s", LEASE_TTL.as_secs()));
        headers.insert("Nats-Expected-Last-Subject-Sequence", revision.to_string());
        self.connection.ask(&self.subject(), headers, Vec::new()).await.map(drop)
    }

    fn subject(&self) -> String {
        bucket_key(&self.bucket, &self.key)
    }

    async fn look(&mut self) -> Result<bool, BusError> {
        let stream = bucket_stream(&self.bucket);
        let newest = self.connection.newest(&stream, &self.subject()).await?;
        let revision = newest.as_ref().map_or(0, |message| message.seq);
        // Markers of a lease that was given back or has ended hold nobody.
        let holder: Option<Holder> = newest.and_then(|message| message.json());
        let is_ours = holder.as_ref() == Some(&self.me);
        self.other = if self.other.0 == revision { (revision, self.other.1 + 1) } else { (revision, 0) };
        let is_free = holder.is_none() || is_ours || self.other.1 >= STALE_LOOKS;
        self.holder = holder;
        if !is_free {
            return Ok(false);
        }
        self.held = self.write(revision).await?;
        self.takings += u64::from(!is_ours);
        Ok(self.held.is_some())
    }

    /// Writes our name over `revision`; `None` when it has changed since.
    async fn write(&self, revision: u64) -> Result<Option<u64>, BusError> {
        let mut headers = HeaderMap::new();
        headers.insert("Nats-TTL", format!("{}s", LEASE_TTL.as_secs()));
        headers.insert("Nats-Expected-Last-Subject-Sequence", revision.to_string());
        let message = self.connection.ask(&self.subject(), headers, encode(&self.me)).await?;
        match answer::<Stored>("a lease", &message.payload) {
            Ok(Stored { seq }) => Ok(Some(seq)),
            Err(BusError::Refused { code: WRONG_LAST_SEQUENCE, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Keeps a lease in a task of its own, so that nothing else makes it late.
#[derive(Debug)]
pub struct Keeper {
    wanted: watch::Sender<bool>,
    state: watch::Receiver<LeaseState>,
    lapse: Arc<Lapse>,
    task: JoinHandle<()>,
}

/// When another may hold what we held.
#[derive(Debug)]
struct Lapse {
    clock: Clock,
    /// On the clock that nobody sets.
    at_ns: AtomicI64,
}

impl Lapse {
    fn new(clock: Clock) -> Self {
        Self { at_ns: AtomicI64::new(clock.raw().as_nanos()), clock }
    }

    fn at(&self) -> Timestamp {
        Timestamp::from_nanos(self.at_ns.load(Ordering::Acquire))
    }

    fn put_off(&self, at: Timestamp) {
        self.at_ns.store(at.as_nanos(), Ordering::Release);
    }

    fn is_past(&self) -> bool {
        self.clock.raw() >= self.at()
    }
}

/// Tells at any moment whether a lease without a fence is still ours: also in a process that stood still, before its keeper
/// has come to notice.
#[derive(Clone, Debug)]
pub struct Tenure {
    state: watch::Receiver<LeaseState>,
    lapse: Arc<Lapse>,
}

impl Tenure {
    /// Whether it is ours now.
    pub fn is_held(&self) -> bool {
        self.state.borrow().held && !self.lapse.is_past()
    }
}

/// What is known of a lease.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LeaseState {
    /// Whether it is ours.
    pub held: bool,
    /// How often it became ours: in between it was another's, or may have been.
    pub takings: u64,
    /// Whose it is, as far as known.
    pub holder: Option<Holder>,
    /// Why nothing has been heard of it for long.
    pub failure: Option<BusError>,
}

impl LeaseState {
    /// What is wrong, for reports.
    pub fn problem(&self) -> Option<Problem> {
        self.failure.as_ref().map(|error| problem("it cannot be seen which host does this", error))
    }
}

impl Keeper {
    /// Keeps `lease` from the moment that it is wanted. While no server answers it stays held: what its holder does must
    /// have a fence.
    pub fn spawn(lease: Lease) -> Self {
        Self::start(lease, true)
    }

    /// The same for what has no fence: it is held no more before another can take it, whether or not a server answers.
    pub fn spawn_unfenced(lease: Lease) -> Self {
        Self::start(lease, false)
    }

    fn start(lease: Lease, is_fenced: bool) -> Self {
        let (wanted, wanted_in) = watch::channel(false);
        let (state_out, state) = watch::channel(LeaseState::default());
        let lapse = Arc::new(Lapse::new(lease.connection.clock().clone()));
        let task = tokio::spawn(keep(lease, is_fenced, lapse.clone(), (wanted_in, state_out)));
        Self { wanted, state, lapse, task }
    }

    /// From now on the lease is taken when it may be, or given back.
    pub fn want(&self, wanted: bool) {
        self.wanted.send_if_modified(|known| std::mem::replace(known, wanted) != wanted);
    }

    /// What is known now.
    pub fn state(&self) -> LeaseState {
        self.state.borrow().clone()
    }

    /// Whether a lease without a fence is ours, at any later moment too.
    pub fn tenure(&self) -> Tenure {
        Tenure { state: self.state.clone(), lapse: self.lapse.clone() }
    }

    /// Returns when what is known has changed.
    pub async fn changed(&mut self) {
        if self.state.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Gives the lease back and returns once that is done, or cannot be.
    pub async fn give_back(mut self) {
        self.want(false);
        let given = self.state.wait_for(|state| !state.held);
        // It ends by itself all the same.
        let _late = tokio::time::timeout(LEASE_TTL, given).await;
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn keep(
    mut lease: Lease,
    is_fenced: bool,
    lapse: Arc<Lapse>,
    (mut wanted, state): (watch::Receiver<bool>, watch::Sender<LeaseState>),
) {
    let mut ticks = tokio::time::interval(LEASE_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut trouble = Trouble::default();
    let clock = lease.connection.clock().clone();
    let (mut taken, mut takings) = (0, 0);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            changed = wanted.changed() => if changed.is_err() { return },
        }
        let is_wanted = *wanted.borrow_and_update();
        let held = if is_wanted {
            let asked_at = clock.raw();
            let kept = {
                let (mut keeping, mut lapsed) = (pin!(lease.keep()), pin!(sleep(lapse.at().since(asked_at))));
                loop {
                    tokio::select! {
                        biased;
                        kept = &mut keeping => break kept,
                        () = lapsed.as_mut(), if !is_fenced && state.borrow().held => {
                            state.send_modify(|state| (state.held, state.holder) = (false, None));
                        }
                    }
                }
            };
            trouble.note(&lease.connection, kept.as_ref().map(drop));
            match kept {
                Ok(held) => {
                    // What was lost and taken again in one go is given up for once: others may have done things meanwhile.
                    // So is what was late, as whoever has asked meanwhile takes it for lost until the state changes.
                    let is_anew = std::mem::replace(&mut taken, lease.takings) != lease.takings || lapse.is_past();
                    lapse.put_off(asked_at.saturating_add(UNFENCED_MAX));
                    held && (is_fenced || !is_anew || !state.borrow().held)
                }
                // Nobody answers us. Others may be answered, so what has no fence ends in time.
                Err(_) => lease.is_held() && (is_fenced || !lapse.is_past()),
            }
        } else {
            // If the server does not hear of it, the lease ends by itself.
            let _unheard = lease.give_back().await;
            false
        };
        let holder = lease.holder().filter(|holder| held || **holder != lease.me).cloned();
        takings += u64::from(held && !state.borrow().held);
        let known = LeaseState { held, takings, holder, failure: trouble.lasting().cloned() };
        state.send_if_modified(|former| std::mem::replace(former, known.clone()) != known);
    }
}
