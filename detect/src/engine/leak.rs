//! Do bans bite? A request of a banned client that began later than the grace time after its ban was confirmed, and that is
//! in a log all the same, is a leak.
//!
//! Back ends confirm commits, not bans. So it is noted when each commit was published ([`Engine::publish_leaks`]) and when
//! each back end was known to have it in force ([`Engine::observe_back_ends`]); both are moments at or after the true ones,
//! and what a ban was before a pause or another list does not count for it. Where in doubt, nothing is a leak: a request
//! without a time, one of a clock that is ahead, one that is read again. Without confirmations, as in a replay, there are
//! no leaks.

mod text;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::time::Duration;

use proto::ban::BanRecord;
use proto::event::{ABSENT, Event};
use proto::head::Mark;
use proto::net::{NamedSet, NetSet, Target};
use proto::time::Timestamp;

use super::output::Output;
use super::{Engine, Source};

/// A client is told of once in so long.
const REPEAT_AFTER: Duration = Duration::from_secs(60);
/// Clients told of in that time; the requests of others are counted.
const TOLD_MAX: usize = 10;
/// That no back end can see some clients of a node is told again after so long: it is the same for all of them.
const BLIND_REPEAT_AFTER: Duration = Duration::from_secs(600);
/// Nodes, by back end, that are counted apart, and for which that is remembered.
const NODES_MAX: usize = 1000;
/// A back end that has not confirmed a ban for so long is named.
pub const UNCONFIRMED_AFTER: Duration = Duration::from_secs(30);
/// A client that a host lets pass on purpose is asked after again after so long.
const SPARED_FOR: Duration = Duration::from_secs(600);
/// Clients of whom that is remembered.
const SPARED_MAX: usize = 1000;
/// Moments that are remembered of each back end; older bans are taken to be confirmed at the oldest of them.
const MOMENTS_MAX: usize = 1024;
/// So shortly before its end, a ban may have ended elsewhere.
const END_MARGIN: Duration = Duration::from_secs(1);
/// What Traefik answers where the service's connection was reset.
const REFUSED_STATUS: u16 = 502;
/// Characters of a host or path that are told.
const TEXT_CHARS_MAX: usize = 200;

/// How long after its confirmation a ban may not bite yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grace {
    /// On a host: what Traefik was at work on.
    pub firewall: Duration,
    /// At Cloudflare: until all of its places know. Also where no back end can see the client.
    pub cloudflare: Duration,
}

impl Default for Grace {
    fn default() -> Self {
        Self { firewall: Duration::from_secs(2), cloudflare: Duration::from_secs(60) }
    }
}

/// What one host's back end of a kind does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BackEnd {
    /// It is not there.
    #[default]
    Absent,
    /// It enforces nothing, and says so: a dry run, or a pause.
    Idle,
    /// It has all up to this commit in force; `None` = it does not know.
    InForce(Option<Mark>),
}

/// What the roles of one host say of themselves.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostView {
    /// Name of its node.
    pub node: String,
    /// Whether its enforcer has been heard of. Without, only `ahead` is known.
    pub enforces: bool,
    /// The firewall.
    pub firewall: BackEnd,
    /// Rules for forwarded clients.
    pub forwarded: BackEnd,
    /// Cloudflare; the same wherever it is done.
    pub cloudflare: BackEnd,
    /// How far the clocks that its log lines were written by are ahead at most.
    pub ahead: Duration,
}

/// Who should have kept a client out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Keeper {
    /// The firewall of the node.
    Firewall,
    /// The node's rules for forwarded clients.
    Forwarded,
    /// Cloudflare.
    Cloudflare,
    /// Nobody: no enforcer reports under the node's name.
    NoEnforcer,
    /// Nobody: the node has no firewall back end.
    NoFirewall,
    /// Nobody: the client comes through a proxy, and nothing that sees behind it is configured.
    BehindProxy,
    /// Nobody: the client comes through a proxy, and the node's rules for forwarded clients hold only those whose ban says so.
    NoEvidence,
}

impl Keeper {
    /// A word for metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Firewall => "firewall",
            Self::Forwarded => "forwarded_for",
            Self::Cloudflare => "cloudflare",
            Self::NoEnforcer | Self::NoFirewall | Self::BehindProxy | Self::NoEvidence => "none",
        }
    }

    /// Whether there is none.
    pub fn is_nobody(self) -> bool {
        self.as_str() == "none"
    }
}

/// One request that passed, to be told of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leak {
    /// Whose.
    pub client: IpAddr,
    /// The ban that covers it, and its rule.
    pub target: Target,
    /// See `target`.
    pub rule: String,
    /// Where it was logged.
    pub node: String,
    /// What it asked for.
    pub host: String,
    /// See `host`.
    pub path: String,
    /// Who delivered it, where the line says so.
    pub peer: Option<IpAddr>,
    /// When it began.
    pub began_at: Timestamp,
    /// Who should have kept it out: of those who could have seen it, the first that had confirmed the ban.
    pub keeper: Keeper,
    /// All who could have seen it; without any, why nobody could.
    pub seers: Vec<Keeper>,
    /// Whether the keeper has confirmed the ban.
    pub confirmed: bool,
    /// Whether the keeper, asked, says that it does not hold the client all the same.
    pub denied: bool,
    /// How long before the request that was; without a confirmation, how long the ban was published.
    pub late: Duration,
    /// Leaks that were counted and not told since the last one.
    pub untold: u64,
}

/// When a back end had which commit in force, ascending.
#[derive(Clone, Debug, Default)]
struct History {
    is: BackEnd,
    moments: VecDeque<(Mark, Timestamp)>,
}

impl History {
    fn observe(&mut self, is: BackEnd, now: Timestamp) {
        // What it had in force before it let go is not in force any more.
        if !matches!(is, BackEnd::InForce(_)) {
            self.moments.clear();
        }
        self.is = is;
        let BackEnd::InForce(Some(mark)) = is else { return };
        if self.moments.back().is_none_or(|(known, _)| *known < mark) {
            push(&mut self.moments, (mark, now));
        }
    }

    fn confirmed_at(&self, mark: Mark) -> Option<Timestamp> {
        self.moments.get(self.moments.partition_point(|(known, _)| *known < mark)).map(|(_, at)| *at)
    }
}

fn push<T>(moments: &mut VecDeque<T>, moment: T) {
    moments.push_back(moment);
    if moments.len() > MOMENTS_MAX {
        moments.pop_front();
    }
}

#[derive(Clone, Debug, Default)]
struct Host {
    enforces: bool,
    firewall: History,
    forwarded: History,
    ahead: Duration,
}

/// A client that was told of, or is about to be.
#[derive(Clone, Debug)]
struct Told {
    at: Timestamp,
    client: Target,
    key: (String, &'static str),
    /// Requests that count once it is known that nobody lets it pass on purpose; `None` = that is known.
    held: Option<u64>,
}

/// What is known of back ends and clients.
#[derive(Debug)]
pub(super) struct Leaks {
    /// Grows with each ban that begins, and with each change that may lift one for a while.
    turn: u64,
    /// All bans are at least of this turn.
    base: u64,
    /// By target that was banned in this life: its turn. Others are of the first.
    turns: BTreeMap<Target, u64>,
    /// Ascending: everything up to this turn was published with this commit, at this moment.
    published: VecDeque<(u64, Mark, Timestamp)>,
    hosts: BTreeMap<String, Host>,
    cloudflare: History,
    cloudflare_nets: NetSet,
    /// No request that began before this can be a leak.
    armed_from: Timestamp,
    told: VecDeque<Told>,
    blind_told: BTreeMap<(String, Keeper), Timestamp>,
    spared: VecDeque<(Timestamp, Target)>,
    untold: u64,
    counts: BTreeMap<(String, &'static str), u64>,
}

impl Default for Leaks {
    fn default() -> Self {
        Self {
            turn: 0,
            base: 0,
            turns: BTreeMap::new(),
            published: VecDeque::new(),
            hosts: BTreeMap::new(),
            cloudflare: History::default(),
            cloudflare_nets: NetSet::new(NamedSet::Cloudflare.nets()),
            armed_from: Timestamp::MAX,
            told: VecDeque::new(),
            blind_told: BTreeMap::new(),
            spared: VecDeque::new(),
            untold: 0,
            counts: BTreeMap::new(),
        }
    }
}

/// A request, as far as it matters who should have seen it.
#[derive(Clone, Copy)]
struct Passing<'a> {
    node: &'a str,
    time: Timestamp,
    via_proxy: bool,
    peer: Option<IpAddr>,
    /// What the service answered, as far as the line says: Traefik's own 502 where the connection to it was reset.
    answered: u16,
}

impl<'a> Passing<'a> {
    fn new(node: &'a str, time: Timestamp, via_proxy: bool, event: &Event<'_>) -> Self {
        // Fields of the log can be dropped.
        let answered = if event.origin_status == 0 { event.status } else { event.origin_status };
        Self { node, time, via_proxy, peer: event.peer, answered }
    }
}

/// A request that is a leak.
#[derive(Debug)]
struct Finding {
    keeper: Keeper,
    seers: Vec<Keeper>,
    confirmed: bool,
    late: Duration,
}

/// Since when each back end is known to have a ban in force, by node and kind; Cloudflare's under no node.
pub type Confirmations = BTreeMap<(String, Keeper), Timestamp>;

impl Leaks {
    /// A ban begins.
    pub(super) fn begin(&mut self, target: Target) {
        self.turn += 1;
        self.turns.insert(target, self.turn);
    }

    /// A ban has ended.
    pub(super) fn end(&mut self, target: &Target) {
        self.turns.remove(target);
    }

    /// What was in force may not be for a moment: all bans are to be confirmed anew.
    pub(super) fn renew(&mut self) {
        self.turn += 1;
        self.base = self.turn;
    }

    /// The clock was set back, so moments of before say nothing.
    pub(super) fn forget_moments(&mut self, now: Timestamp) {
        self.hosts.clear();
        self.cloudflare = History::default();
        self.published.iter_mut().for_each(|(.., at)| *at = now.min(*at));
        self.armed_from = Timestamp::MAX;
        (self.told, self.blind_told, self.spared) = Default::default();
    }

    /// With which commit a ban of `target` was published, and when.
    fn publication(&self, target: &Target) -> Option<(Mark, Timestamp)> {
        let turn = self.turns.get(target).copied().unwrap_or(0).max(self.base);
        let published = self.published.get(self.published.partition_point(|(known, ..)| *known < turn));
        published.map(|(_, mark, at)| (*mark, *at))
    }

    fn judge(&self, record: &BanRecord, passing: Passing<'_>, grace: Grace) -> Option<Finding> {
        let (mark, published_at) = self.publication(&record.target)?;
        let host = self.hosts.get(passing.node).filter(|host| host.enforces);
        if host.is_some_and(|host| host.firewall.is == BackEnd::Idle) {
            return None;
        }
        let seers = self.seers(record, passing, host)?;
        let since = |at: Timestamp, grace: Duration| {
            let late = passing.time.since(at);
            (late > grace).then_some(late)
        };
        let find = |keeper: &Keeper| {
            let (history, grace) = match keeper {
                Keeper::Firewall => (host.map(|host| &host.firewall), grace.firewall),
                Keeper::Forwarded => (host.map(|host| &host.forwarded), grace.firewall),
                Keeper::Cloudflare => (Some(&self.cloudflare), grace.cloudflare),
                _ => (None, grace.cloudflare),
            };
            let confirmed_at = history.and_then(|history| history.confirmed_at(mark));
            let late = match (history, confirmed_at) {
                (_, Some(at)) => since(at, grace)?,
                (Some(_), None) => since(published_at, UNCONFIRMED_AFTER + grace)?,
                (None, None) => since(published_at, grace)?,
            };
            Some((*keeper, confirmed_at.is_some(), late))
        };
        // Who has confirmed the ban has more to answer for than who has not.
        let (keeper, confirmed, late) = seers.iter().filter_map(find).min_by_key(|(_, confirmed, _)| !confirmed)?;
        Some(Finding { keeper, seers, confirmed, late })
    }

    /// The back ends at work that could have seen a request, the first one on its way first; where there is none, why
    /// nobody could. `None` where it is let pass on purpose, or has reached nobody.
    fn seers(&self, record: &BanRecord, passing: Passing<'_>, host: Option<&Host>) -> Option<Vec<Keeper>> {
        let in_force = |history: &History| matches!(history.is, BackEnd::InForce(_));
        if !passing.via_proxy {
            return Some(vec![match host {
                None => Keeper::NoEnforcer,
                Some(host) if in_force(&host.firewall) => Keeper::Firewall,
                Some(_) => Keeper::NoFirewall,
            }]);
        }
        // So look requests that the rules for forwarded clients refuse, and they have reached nobody.
        if passing.answered == REFUSED_STATUS && host.is_some_and(|host| host.forwarded.is != BackEnd::Absent) {
            return None;
        }
        let through_cloudflare = passing.peer.is_none_or(|peer| self.cloudflare_nets.contains(peer));
        let has_rules = host.is_some_and(|host| in_force(&host.forwarded));
        let has_evidence = record.is_behind_proxy(passing.time.saturating_add(END_MARGIN));
        let mut seers = Vec::new();
        if through_cloudflare && in_force(&self.cloudflare) {
            seers.push(Keeper::Cloudflare);
        }
        if has_rules && has_evidence {
            seers.push(Keeper::Forwarded);
        }
        if seers.is_empty() {
            seers.push(match host {
                _ if has_rules => Keeper::NoEvidence,
                Some(host) if host.forwarded.is == BackEnd::Idle => return None,
                _ if through_cloudflare && self.cloudflare.is == BackEnd::Idle => return None,
                _ => Keeper::BehindProxy,
            });
        }
        Some(seers)
    }

    fn count(&mut self, key: (String, &'static str), leaks: u64) {
        let known = self.counts.contains_key(&key) || self.counts.len() < NODES_MAX;
        let key = if known { key } else { ("other".to_owned(), key.1) };
        *self.counts.entry(key).or_default() += leaks;
    }

    /// Counts a leak of `client`. Whether it is to be told.
    fn note(&mut self, client: Target, node: &str, keeper: Keeper, now: Timestamp) -> bool {
        let key = (node.to_owned(), keeper.as_str());
        while let Some(told) = self.told.pop_front_if(|told| now.since(told.at) >= REPEAT_AFTER) {
            self.count(told.key, told.held.unwrap_or(0));
        }
        if let Some(told) = self.told.iter_mut().find(|told| told.client == client) {
            match &mut told.held {
                Some(held) => *held += 1,
                None => {
                    self.untold += 1;
                    self.count(key, 1);
                }
            }
            return false;
        }
        let blind = (node.to_owned(), keeper);
        let blind_again = self.blind_told.get(&blind).is_none_or(|at| now.since(*at) >= BLIND_REPEAT_AFTER);
        if self.told.len() >= TOLD_MAX || (keeper.is_nobody() && !blind_again) {
            self.untold += 1;
            self.count(key, 1);
            return false;
        }
        if keeper.is_nobody() {
            self.blind_told.retain(|_, at| now.since(*at) < BLIND_REPEAT_AFTER);
            if self.blind_told.len() < NODES_MAX {
                self.blind_told.insert(blind, now);
            }
        }
        self.told.push_back(Told { at: now, client, key, held: Some(1) });
        true
    }
}

impl Engine {
    /// What has begun up to now has this turn: to be named to [`Self::publish_leaks`] once it is published.
    pub fn leak_turn(&self) -> u64 {
        self.leaks.turn
    }

    /// Everything up to `turn` was published with commit `mark`, at `now` or before.
    pub fn publish_leaks(&mut self, turn: u64, mark: Mark, now: Timestamp) {
        if self.leaks.published.back().is_none_or(|(known, ..)| *known < turn) {
            push(&mut self.leaks.published, (turn, mark, now));
        }
    }

    /// How the back ends of all hosts are at `now`.
    pub fn observe_back_ends(&mut self, views: Vec<HostView>, now: Timestamp) {
        let leaks = &mut self.leaks;
        leaks.hosts.retain(|node, _| views.iter().any(|view| view.node == *node));
        let cloudflare = views.iter().map(|view| view.cloudflare).fold(BackEnd::Absent, newest);
        leaks.cloudflare.observe(cloudflare, now);
        for view in views {
            let host = leaks.hosts.entry(view.node).or_default();
            (host.enforces, host.ahead) = (view.enforces, view.ahead);
            host.firewall.observe(view.firewall, now);
            host.forwarded.observe(view.forwarded, now);
        }
        let is_known = leaks.hosts.values().any(|host| host.enforces) && !leaks.published.is_empty();
        let first = leaks.published.front().map_or(Timestamp::MAX, |(.., at)| *at);
        leaks.armed_from = if is_known { first } else { Timestamp::MAX };
    }

    /// Whether `client`, of whom a [`Leak`] told, is let pass on purpose.
    pub fn judge_leak(&mut self, client: IpAddr, is_spared: bool) {
        let client = Target::of_client(client, self.config.ipv6_prefix);
        let leaks = &mut self.leaks;
        let Some(at) = leaks.told.iter().position(|told| told.client == client) else { return };
        if is_spared {
            leaks.told.remove(at);
            leaks.spared.push_back((self.now.max(self.present).saturating_add(SPARED_FOR), client));
            if leaks.spared.len() > SPARED_MAX {
                leaks.spared.pop_front();
            }
        } else if let Some(held) = leaks.told[at].held.take() {
            let key = leaks.told[at].key.clone();
            leaks.count(key, held);
        }
    }

    /// Since when each back end is known to have the first of the bans that cover `client` in force. Of a ban from before
    /// this life, that is since the back end was first heard of.
    pub fn confirmations(&self, client: IpAddr) -> Confirmations {
        let leaks = &self.leaks;
        let hosts = leaks.hosts.iter().flat_map(|(node, host)| {
            [(node.as_str(), Keeper::Firewall, &host.firewall), (node, Keeper::Forwarded, &host.forwarded)]
        });
        let all: Vec<_> = hosts.chain([("", Keeper::Cloudflare, &leaks.cloudflare)]).collect();
        let mut known = Confirmations::new();
        for (mark, _) in self.bans.covering(client).filter_map(|record| leaks.publication(&record.target)) {
            for (node, keeper, history) in &all {
                let Some(at) = history.confirmed_at(mark) else { continue };
                known.entry(((*node).to_owned(), *keeper)).and_modify(|first| *first = at.min(*first)).or_insert(at);
            }
        }
        known
    }

    /// Leaks since start, by node and by the word of who should have kept them out.
    pub fn leaks(&self) -> &BTreeMap<(String, &'static str), u64> {
        &self.leaks.counts
    }

    /// Looks whether a new event is of a banned client whose ban should bite.
    pub(super) fn watch_leak(&mut self, source: Source, event: &Event<'_>, arrival: Timestamp) {
        let (Ok(client), Some(logged)) = (event.client, event.time) else { return };
        if logged <= self.leaks.armed_from || self.bans.len() == 0 || self.paused.is_some() {
            return;
        }
        // Few are banned, so this comes before all that costs more.
        if self.bans.covering(client.addr).next().is_none() {
            return;
        }
        let name = |index: u16| self.nodes.get(usize::from(index)).map_or("", |node| node);
        let ahead = |index| self.leaks.hosts.get(name(index)).map_or(Duration::ZERO, |host| host.ahead);
        let time = logged.saturating_sub(ahead(source.node).max(ahead(source.reader)));
        // A clock that is further ahead than is known tells nothing.
        if time > arrival {
            return;
        }
        // What a proxy answers itself has reached nobody.
        if client.via_proxy && event.origin_status == 0 && event.text.service == ABSENT {
            return;
        }
        let passing = Passing::new(name(source.node), time, client.via_proxy, event);
        let covering = self.bans.covering(client.addr).filter(|record| record.end() > time.saturating_add(END_MARGIN));
        let found = covering.filter_map(|record| {
            let rule = record.longest().map(|ban| ban.rule.clone()).unwrap_or_default();
            Some((record.target, rule, self.leaks.judge(record, passing, self.config.grace)?))
        });
        // One that somebody should have held says more than one that nobody can.
        let found = found.min_by_key(|(.., finding)| finding.keeper.is_nobody());
        let Some((target, rule, Finding { keeper, seers, confirmed, late })) = found else { return };
        if self.allows.exempts(client.addr, time) || self.config.trusted_proxies.contains(client.addr) {
            return;
        }
        let now = self.now.max(self.present);
        let (counted, node) = (Target::of_client(client.addr, self.config.ipv6_prefix), passing.node.to_owned());
        while self.leaks.spared.pop_front_if(|(until, _)| *until <= now).is_some() {}
        if self.leaks.spared.iter().any(|(_, spared)| *spared == counted) {
            return;
        }
        if self.leaks.note(counted, &node, keeper, now) {
            let cut = |text: &str| text.chars().take(TEXT_CHARS_MAX).collect::<String>();
            let (host, path) = (cut(event.text.host), cut(event.text.path));
            let (untold, denied) = (std::mem::take(&mut self.leaks.untold), false);
            let (client, peer, began_at) = (client.addr, event.peer, time);
            let leak = Leak {
                client,
                target,
                rule,
                node,
                host,
                path,
                peer,
                began_at,
                keeper,
                seers,
                confirmed,
                late,
                untold,
                denied,
            };
            self.outputs.push_back(Output::Leak(Box::new(leak)));
        }
    }
}

/// Of several hosts, of which one does what is done once: the one that has the most in force.
fn newest(one: BackEnd, other: BackEnd) -> BackEnd {
    match (one, other) {
        (BackEnd::InForce(one), BackEnd::InForce(other)) => BackEnd::InForce(one.max(other)),
        (BackEnd::InForce(_), _) => one,
        (_, BackEnd::InForce(_)) => other,
        (BackEnd::Idle, _) => one,
        _ => other,
    }
}
