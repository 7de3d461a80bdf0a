//! The detector's core: events and time in, bans and their ends out.
//!
//! A pure state machine. It reads no clock, does no I/O and depends on no hash order, so `replay`, the live service and
//! the simulation run the same code and the same input gives the same output, to the byte.
//!
//! A caller feeds batches ([`Engine::handle_batch`]) or single events, commands and timeouts, each with the moment of
//! its arrival, and after each call drains [`Engine::poll_output`]. Arrival never decreases: an earlier `now` is taken
//! as the latest one seen.

pub mod allow;
pub mod bans;
pub mod clients;
pub mod command;
mod count;
pub mod escalation;
pub mod explain;
mod follow;
pub mod leak;
pub mod matcher;
pub mod offender;
pub mod output;
pub mod rate;
pub mod rule;
pub mod stream;
pub mod visitors;
pub mod window;

#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use proto::ban::{Ban, BanChange, BanRecord, Lists, Pause};
use proto::envelope::EventType;
use proto::event::{AccessBatch, Event, FileSpan, Interest};
use proto::net::{NetSet, Target};
use proto::time::Timestamp;

pub use output::{Control, Output, Snapshot, Stats};

use allow::Allows;
use bans::Bans;
use clients::Clients;
use count::Counting;
use leak::{Grace, Leaks};
use offender::{Offenders, Quiet};
use rate::Bucket;
use rule::{Mode, Rule};
use stream::{Admission, FileKey, MARK_INTERVAL, Position, Slot, Stream};
use visitors::Visitors;

/// Different nodes named in evidence.
const NODES_MAX: usize = u16::MAX as usize;

/// What the engine is told once, and again at each reload.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// The rules, in the order in which they decide on one event.
    pub rules: Vec<Rule>,
    /// Who may never be banned: built-in sets and configured networks.
    pub never_ban: Vec<IpNet>,
    /// Peers that speak for others; a ban of one would hit its visitors.
    pub trusted_proxies: NetSet,
    /// Bits of an IPv6 address that make a client.
    pub ipv6_prefix: u8,
    /// Events that arrive later than this never ban.
    pub lateness_max: Duration,
    /// Clients with open windows.
    pub tracked_clients_max: usize,
    /// Events held by all windows together.
    pub window_events_max: usize,
    /// Targets with a history.
    pub offenders_max: usize,
    /// Shortest prefix an operator may ban: for IPv4, for IPv6.
    pub operator_prefix_min: (u8, u8),
    /// From the confirmation of a ban to when it must bite.
    pub grace: Grace,
}

impl EngineConfig {
    /// How long after its arrival an event may still be needed.
    pub fn horizon(&self) -> Duration {
        let longest = self.rules.iter().map(|rule| rule.threshold.horizon()).max().unwrap_or_default();
        longest.saturating_add(self.lateness_max)
    }

    /// What the rules look at.
    pub fn interest(&self) -> Interest {
        let mut headers: Vec<String> = self.rules.iter().flat_map(|rule| rule.matcher.interest_headers()).collect();
        headers.sort_unstable();
        headers.dedup();
        Interest { headers, ..Interest::default() }
    }
}

/// Where events come from, while a batch is handled.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    slot: Option<Slot>,
    /// Node that the events are shown under, and node that read them.
    node: u16,
    reader: u16,
}

/// The engine.
#[derive(Debug)]
pub struct Engine {
    config: EngineConfig,
    now: Timestamp,
    stream: Stream,
    clients: Clients,
    offenders: Offenders,
    /// Histories of shadow rules, which leave no trace outside.
    shadow: Offenders,
    bans: Bans,
    leaks: Leaks,
    allows: Allows,
    paused: Option<Pause>,
    counts_from: Timestamp,
    counts_after: Position,
    nodes: Vec<Arc<str>>,
    visitors: Visitors,
    bucket: Bucket,
    stats: Stats,
    outputs: VecDeque<Output>,
    /// By rule: the first version of the predicate under which a node sends all that the rule may match.
    covered_from: Vec<u64>,
    /// Bits of the rules that the batch at hand counts for.
    covered: u64,
    /// The latest present moment; later than `now` while a backlog is worked off.
    present: Timestamp,
}

impl Engine {
    /// An engine without history.
    pub fn new(config: EngineConfig) -> Self {
        Self::restore(config, Snapshot::default(), Timestamp::EPOCH)
    }

    /// Continues from a snapshot, at `now`.
    pub fn restore(config: EngineConfig, mut snapshot: Snapshot, now: Timestamp) -> Self {
        let since = now.saturating_sub(config.horizon());
        let stream = Stream::restore(snapshot.control.position, std::mem::take(&mut snapshot.files), since);
        let mut engine = Self::assemble(config, snapshot, stream, now);
        engine.lift_guarded("never_ban");
        engine.handle_timeout(now);
        engine
    }

    fn assemble(config: EngineConfig, snapshot: Snapshot, stream: Stream, now: Timestamp) -> Self {
        let Snapshot { control, bans, offenders, files: _ } = snapshot;
        let mut engine = Self {
            now,
            stream,
            clients: Clients::default(),
            offenders: Offenders::default(),
            shadow: Offenders::default(),
            bans: Bans::default(),
            leaks: Leaks::default(),
            allows: Allows::new(&config.never_ban, control.allowed, control.resolved, now),
            paused: control.paused,
            counts_from: control.counts_from,
            counts_after: control.counts_after,
            nodes: Vec::new(),
            visitors: Visitors::default(),
            bucket: Bucket::default(),
            stats: Stats { rules: vec![(0, 0); config.rules.len()], ..Stats::default() },
            outputs: VecDeque::new(),
            covered_from: vec![0; config.rules.len()],
            covered: u64::MAX,
            present: now,
            config,
        };
        for (target, offender) in offenders {
            engine.offenders.update(target, |known| *known = offender);
        }
        for ban in bans.into_iter().flat_map(|record| record.bans) {
            engine.bans.put(ban);
        }
        engine
    }

    /// Handles a batch: each of its events, then its coverage.
    pub fn handle_batch(&mut self, batch: &AccessBatch, now: Timestamp) {
        if self.poll_timeout().is_some_and(|due| due <= now) {
            self.handle_timeout(now);
        }
        let source = self.open_batch(batch);
        for event in batch.events() {
            self.handle_event(source, &event, now);
        }
        if let Some(span) = batch.span {
            self.close(source, span);
        }
    }

    /// The source of the events that follow. `generation` is `None` where lines have no offsets.
    pub fn open(&mut self, node: &Arc<str>, source: &Arc<str>, generation: Option<u64>) -> Source {
        let slot = generation
            .map(|generation| self.stream.open(FileKey { node: node.clone(), source: source.clone(), generation }));
        let node = self.node_index(node);
        Source { slot, node, reader: node }
    }

    /// The source of a batch's events, which may be shown under another node than the one that read them.
    pub fn open_batch(&mut self, batch: &AccessBatch) -> Source {
        let opened = self.open(&batch.node, &batch.source, batch.span.map(|span| span.generation));
        Source { node: self.node_index(batch.shown_node()), ..opened }
    }

    fn node_index(&mut self, node: &Arc<str>) -> u16 {
        let index = self.nodes.iter().position(|known| known == node).unwrap_or_else(|| {
            if self.nodes.len() < NODES_MAX {
                self.nodes.push(node.clone());
            }
            self.nodes.len() - 1
        });
        index as u16
    }

    /// All lines of `span` have been handled.
    pub fn close(&mut self, source: Source, span: FileSpan) {
        if let Some(slot) = source.slot {
            let since = self.now.saturating_sub(self.config.horizon());
            self.stream.cover(slot, span, self.now, since);
        }
    }

    /// Handles one event that arrived at `now`.
    pub fn handle_event(&mut self, source: Source, event: &Event<'_>, now: Timestamp) {
        self.now = self.now.max(now);
        let now = self.now;
        let admission = match source.slot {
            Some(slot) => self.stream.admit(slot, event.offset, now),
            None => self.stream.admit_unnumbered(now),
        };
        let (position, decides, not_before, not_after) = match admission {
            Admission::Duplicate => {
                self.stats.duplicates += 1;
                return;
            }
            Admission::Rebuild { position, after, before } => {
                self.stats.rebuilt += 1;
                (position, false, after, before)
            }
            Admission::Decide { position, arrival } => {
                self.stats.events += 1;
                (position, true, arrival, arrival)
            }
        };
        let Ok(client) = event.client else {
            self.stats.no_client += 1;
            return;
        };
        if decides {
            self.watch_visitors(client.addr);
            self.watch_leak(source, event, not_after);
        }
        // Nearly all events match nothing, so this comes first.
        let matching = self.matching_rules(event, source.node);
        if matching == 0 {
            return;
        }
        let logged = event.time.unwrap_or(not_after);
        let time = logged.min(not_after);
        self.stats.future += u64::from(logged > not_after);
        self.note_arrival(source, event, logged, decides);
        if not_before.since(time) > self.config.lateness_max {
            self.stats.late += 1;
            return;
        }
        if self.allows.exempts(client.addr, time) || self.config.trusted_proxies.contains(client.addr) {
            self.stats.exempt += 1;
            return;
        }
        if self.paused.is_some() || time < self.counts_from || position <= self.counts_after {
            self.stats.while_paused += 1;
            return;
        }
        let target = Target::of_client(client.addr, self.config.ipv6_prefix);
        let via_proxy = client.via_proxy;
        let counting = Counting { event, node: source.node, target, time, via_proxy, position, decides };
        self.count(&counting, matching);
    }

    /// Bits of the rules that an event matches. At most 64 rules (checked with the configuration).
    fn matching_rules(&mut self, event: &Event<'_>, node: u16) -> u64 {
        let node = self.nodes.get(usize::from(node)).map_or("", |node| node);
        let mut matching = 0;
        for (i, rule) in self.config.rules.iter().enumerate() {
            if self.covered & (1 << i) != 0
                && rule.matcher.may_match_status(event.status)
                && rule.matcher.matches(event, node)
            {
                matching |= 1 << i;
                self.stats.rules[i].0 += 1;
            }
        }
        matching
    }

    /// Where the outcome hangs on the exact arrival, the offset is noted so that a rebuild knows it too.
    fn note_arrival(&mut self, source: Source, event: &Event<'_>, logged: Timestamp, decides: bool) {
        let Some(slot) = source.slot.filter(|_| decides) else { return };
        let age = self.now.since(logged);
        let near_limit = age.abs_diff(self.config.lateness_max) < MARK_INTERVAL.saturating_mul(2);
        if logged > self.now || near_limit {
            self.stream.pin(slot, event.offset, self.now);
        }
    }

    fn watch_visitors(&mut self, client: IpAddr) {
        let allows = &self.allows;
        let trusted = &self.config.trusted_proxies;
        if self.visitors.note(client, |addr| !allows.contains(addr) || trusted.contains(addr))
            && let Some((addr, share)) = self.visitors.hidden_behind()
        {
            let text = hidden_text(addr, share);
            self.outputs.push_back(Output::Alarm { kind: "visitors-behind-proxy", text });
        }
    }

    /// Ends what has ended at `now`: bans, allowances, a pause; forgets windows and histories that cannot count again.
    pub fn handle_timeout(&mut self, now: Timestamp) {
        self.now = self.now.max(now);
        let now = self.now;
        while let Some((ban, change)) = self.bans.pop_ended(now) {
            let freed = matches!(change, BanChange::Delete(_));
            if freed {
                self.leaks.end(&ban.target);
            }
            self.outputs.push_back(Output::Record(change));
            if freed {
                let ban = Ban { reason: "the ban has ended".to_owned(), ..ban };
                self.outputs.push_back(Output::Told(EventType::Unban, Box::new(ban)));
            }
        }
        // What still comes from a log may be of a time long past, so it is by that time that things are forgotten.
        let (log_now, horizon) = (self.stream.window_time(now), self.config.horizon());
        if self.allows.advance(now, log_now.saturating_sub(horizon)) {
            self.leaks.renew();
            self.outputs.push_back(Output::Control);
        }
        if let Some(until) = self.paused.and_then(|pause| pause.until).filter(|until| *until <= now) {
            self.resume(until);
        }
        self.forget_windows();
        let forget = self.config.rules.iter().map(|rule| rule.escalation.forget_after).max().unwrap_or_default();
        // A late event may complete a ban at a time when the history still counts.
        let keep = forget.saturating_add(self.config.lateness_max).max(horizon);
        while self.offenders.oldest_end().is_some_and(|end| end.saturating_add(keep) < log_now) {
            let Some(target) = self.offenders.evict_oldest() else { break };
            self.outputs.push_back(Output::Offender(target, None));
        }
        while self.shadow.oldest_end().is_some_and(|end| end.saturating_add(keep) < log_now) {
            self.shadow.evict_oldest();
        }
    }

    fn forget_windows(&mut self) {
        let (horizon, now) = (self.config.horizon(), self.stream.window_time(self.now));
        while self.clients.oldest_counted().is_some_and(|counted| counted.saturating_add(horizon) < now) {
            self.clients.evict_oldest();
        }
    }

    /// When [`Self::handle_timeout`] is next needed; `None` = not before something else happens.
    pub fn poll_timeout(&self) -> Option<Timestamp> {
        let horizon = self.config.horizon();
        let clients = self
            .clients
            .oldest_counted()
            .map(|counted| counted.saturating_add(horizon).saturating_add(Duration::from_nanos(1)))
            // A log's windows are of another time than ours.
            .filter(|_| !self.stream.is_log());
        let pause = self.paused.and_then(|pause| pause.until);
        [self.bans.next_end(), self.allows.next_end(), pause, clients].into_iter().flatten().min()
    }

    /// The next thing to do, in order.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    fn resume(&mut self, at: Timestamp) {
        self.paused = None;
        self.leaks.renew();
        // What a pause interrupted counts for nobody, neither now nor when windows are rebuilt.
        self.counts_from = at;
        self.counts_after = self.stream.position();
        self.stream.advance();
        self.clients = Clients::default();
        self.outputs.push_back(Output::Control);
    }

    /// Lifts bans of targets that may not be banned (any more).
    fn lift_guarded(&mut self, why: &str) {
        let proxies = &self.config.trusted_proxies;
        let may_not = |target: &Target| self.allows.covers(target) || proxies.covers(target);
        let guarded: Vec<Target> = self.bans.iter().map(|record| record.target).filter(may_not).collect();
        for target in &guarded {
            self.lift(target, why);
            self.absolve(target);
        }
        if !guarded.is_empty() {
            self.stream.advance();
            self.outputs.push_back(Output::Control);
        }
    }

    /// Lifts all bans of a target; whether there were any.
    fn lift(&mut self, target: &Target, why: &str) -> bool {
        let Some(record) = self.bans.remove(target) else { return false };
        self.leaks.end(target);
        self.outputs.push_back(Output::Record(BanChange::Delete(*target)));
        if let Some(ban) = record.longest() {
            let ban = Ban { reason: why.to_owned(), ..ban.clone() };
            self.outputs.push_back(Output::Told(EventType::Unban, Box::new(ban)));
        }
        true
    }

    /// Forgets all that a target has done up to now: its history starts again, what it did so far counts for nothing.
    fn absolve(&mut self, target: &Target) {
        self.clients.forget(target);
        let (now, position) = (self.now, self.stream.position());
        let rules = &self.config.rules;
        self.offenders.update(*target, |offender| {
            for history in &mut offender.rules {
                history.count = 0;
                history.last_end = now.min(history.last_end);
            }
            for rule in rules.iter().filter(|rule| rule.mode == Mode::Enforce) {
                let history = offender.history_mut(&rule.name);
                history.consumed = position;
                // All of it, what happened this very moment included.
                history.last_end = now.saturating_add(Duration::from_nanos(1));
            }
            offender.set_quiet(Quiet { after: position, until: now });
        });
        self.push_offender(*target);
    }

    /// The host's clock was set back: what comes now arrives at `now`, although later moments have been seen.
    ///
    /// Without this, new bans would seem over before they began, until the clock is again where it was.
    pub fn handle_clock_set_back(&mut self, now: Timestamp) {
        self.now = now;
        self.leaks.forget_moments(now);
        self.stream.clamp(now);
    }

    /// The latest moment seen.
    pub fn now(&self) -> Timestamp {
        self.now
    }

    /// Counts since start.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// The configuration in force.
    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// The bans in force, by target.
    pub fn bans(&self) -> impl Iterator<Item = &BanRecord> {
        self.bans.iter()
    }

    /// Number of banned targets, clients with open windows, and targets with a history.
    pub fn sizes(&self) -> (usize, usize, usize) {
        (self.bans.len(), self.clients.len(), self.offenders.len())
    }

    /// The address that most visitors hide behind, and its share in per cent.
    pub fn hidden_behind(&self) -> Option<(IpAddr, u8)> {
        self.visitors.hidden_behind()
    }

    /// Sets from which version of the predicate on each rule is covered, by rule; a batch filtered by an older one
    /// counts for the other rules only.
    pub fn set_coverage(&mut self, covered_from: Vec<u64>) {
        self.covered_from = covered_from;
        self.covered_from.resize(self.config.rules.len(), 0);
    }

    /// The present moment, which is later than that of the events while a backlog is worked off: a ban that is over by
    /// then is not enforced.
    pub fn set_present(&mut self, present: Timestamp) {
        self.present = self.present.max(present);
    }

    /// What enforcers must know beside bans.
    pub fn lists(&self) -> Lists {
        let proxies = self.config.trusted_proxies.nets();
        let never_ban = NetSet::new(self.allows.nets().into_iter().chain(proxies)).nets();
        Lists { never_ban, paused: self.paused }
    }

    /// Set while all bans are lifted.
    pub fn paused(&self) -> Option<Pause> {
        self.paused
    }

    /// What operators allowed and what has not ended, with its end, for `status`.
    pub fn allowed(&self) -> Vec<(Target, Option<Timestamp>)> {
        let in_force = self.allows.allowed().iter().filter(|(_, until)| until.is_none_or(|until| self.now < until));
        in_force.map(|(target, until)| (*target, *until)).collect()
    }

    /// What a restart could not count again, because limits on files and marks were reached.
    pub fn rebuild_losses(&self) -> u64 {
        self.stream.forgotten() + self.stream.marks_dropped()
    }

    /// What survives a restart beside bans, histories and files.
    pub fn control(&self) -> Control {
        Control {
            paused: self.paused,
            counts_from: self.counts_from,
            counts_after: self.counts_after,
            allowed: self.allows.allowed().clone(),
            resolved: self.allows.resolved().clone(),
            position: self.stream.position(),
        }
    }

    /// Files, for storing and for reading again.
    pub fn stream(&mut self) -> &mut Stream {
        &mut self.stream
    }

    /// All that a restart needs.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            control: self.control(),
            bans: self.bans.iter().cloned().collect(),
            offenders: self.offenders.iter().map(|(target, offender)| (*target, offender.clone())).collect(),
            files: self.stream.all(),
        }
    }
}

/// What `status` and the alarm say of an address that most visitors share.
pub fn hidden_text(addr: IpAddr, share: u8) -> String {
    format!(
        "{share} % of the lines come from {addr}, which may not be banned: the visitors hide behind it. If it is a proxy \
         of yours, add it to ingest.client_ip.trusted_proxies and let Traefik trust its headers; if it is Docker's \
         userland proxy, give Traefik the host's network or switch the userland proxy off"
    )
}
