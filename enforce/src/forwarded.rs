//! Refuses banned clients that come through a proxy, by the headers with which Traefik names them to the services: the
//! host's firewall never sees their addresses.
//!
//! For plain HTTP between Traefik and the services alone. A request is found when the header stands in one packet, as it
//! does unless somebody takes pains; TLS to a service and a header that is split over two packets pass, as does HTTP/2,
//! which compresses headers. A refused request is answered by a reset, so that Traefik answers 502 at once; the service
//! hears nothing, and its end of the connection stays open until its own keep-alive ends it.
//!
//! A client chooses headers of its own requests only, and none of them can hold the line end that a pattern begins with.
//! The body of a request can, and what is decoded from a URL: a packet with such a line in its body is refused too, the
//! client's own and, where a service sends that on as it is by TCP that passes the same chains, the service's. So `ports`
//! or `out_interface` should name the services that Traefik calls.
//!
//! Who may add to `X-Forwarded-For` on the way is behind a proxy that appends to it, and not in first place any more; such
//! are found by `Cf-Connecting-Ip`, which Cloudflare always sets itself, or with `whole_list`.

mod chains;
mod claims;
mod explain;
mod kept;
pub(crate) mod metrics;
mod plan;
mod sight;
mod spelling;
mod tree;

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use proto::api::BackendHold;
use proto::ban::Lists;
use proto::net::Target;
use proto::report::{BackendReport, Problem};
use tokio::time::{MissedTickBehavior, interval};

use crate::action::Surroundings;
use crate::backend::iptables::Iptables;
use crate::config::{EnforceConfig, ForwardedForConfig};
pub(crate) use crate::forwarded::chains::remove;
use crate::forwarded::chains::{Chains, Outcome, Searches, Turn};
use crate::forwarded::claims::{Choice, Claim, Claims};
pub(crate) use crate::forwarded::kept::FILE;
use crate::guard::{Guard, GuardFacts};
use crate::host;
use crate::last_set;
use crate::plan::{Family, SKEW_STEP_MS};
use crate::reconcile::{chain_of, is_paused, read_host};

/// What `status` calls it.
const NAME: &str = BackendHold::FORWARDED_FOR;
/// Rules are rewritten once in so long at most, and what is over is forgotten as often.
const PACE: Duration = Duration::from_secs(1);
/// Clients that a dry run names one by one.
const NAMED_MAX: usize = 50;

/// Refuses forwarded clients until the shutdown begins; rules stay in force after that, each until its ban ends.
pub(crate) async fn run(config: EnforceConfig, around: Surroundings) {
    let resync = config.firewall.resync_interval;
    let mut forwarded = Forwarded::new(config, around);
    forwarded.start();
    let shutdown = forwarded.around.shutdown.clone();
    let mut revision = forwarded.around.bans.watch();
    let mut inquiries = forwarded.around.board.desk.open(NAME);
    revision.mark_changed();
    let (mut lists_open, mut servers_open, mut pause_open) = (true, true, true);
    let (mut pace, mut tick, mut resync) = (ticks(PACE), ticks(PACE), ticks(resync));
    loop {
        tokio::select! {
            biased;
            () = shutdown.draining() => break,
            _ = pace.tick(), if forwarded.is_due => forwarded.put(false).await,
            changed = forwarded.around.lists.changed(), if lists_open => {
                lists_open = changed.is_ok();
                if forwarded.take_lists() {
                    // A pause lifts everything at once.
                    pace.reset_immediately();
                }
            }
            changed = forwarded.around.host_pause.changed(), if pause_open => {
                pause_open = changed.is_ok();
                forwarded.take_pause();
                forwarded.is_due = true;
                pace.reset_immediately();
            }
            changed = forwarded.around.bus_servers.changed(), if servers_open => {
                servers_open = changed.is_ok();
                forwarded.look_at_host();
            }
            changed = revision.changed() => if changed.is_ok() { forwarded.take_bans() },
            Some(inquiry) = inquiries.recv() => {
                let hold = forwarded.explain(inquiry.address);
                inquiry.answer(hold);
            }
            _ = tick.tick() => forwarded.handle_tick(),
            _ = resync.tick() => {
                forwarded.look_at_host();
                forwarded.put(true).await;
            }
        }
    }
    forwarded.take_bans();
    if forwarded.is_due {
        forwarded.put(false).await;
    }
}

/// Removes what a former run left, now that it is switched off. Only where something was kept of it.
pub(crate) async fn clear(config: EnforceConfig, around: Surroundings) {
    let Some(path) = around.state_dir.filter(|_| !around.dry_run).map(|dir| dir.join(FILE)) else { return };
    if !path.exists() || !host::may_change_firewall() {
        return;
    }
    let mut iptables = Iptables::new(config.firewall, false, around.clock);
    let mut problems = Vec::new();
    for family in Family::ALL {
        if let (_, Some(error)) = remove(&mut iptables, family, false).await {
            let text = format!("{}: rules of a former run stay in force: {}", family.as_str(), chain_of(&error));
            problems.push(Problem::degraded(text));
        }
    }
    if !problems.is_empty() {
        around.board.put(BackendReport { name: NAME.to_owned(), ..BackendReport::default() }, problems);
    } else if let Err(error) = std::fs::remove_file(&path) {
        tracing::warn!(path = %path.display(), %error, "File not removed");
    } else {
        tracing::info!("Removed rules about forwarded clients, which are switched off");
    }
}

struct Forwarded {
    config: ForwardedForConfig,
    around: Surroundings,
    claims: Claims,
    facts: GuardFacts,
    guard: Guard,
    lists: Arc<Lists>,
    paused: bool,
    chains: Chains,
    /// Whether it is known who was refused before us.
    known: bool,
    /// Who is refused differs from what was put last.
    is_due: bool,
    choice: Choice,
    outcome: Outcome,
    /// Revision of the ban set that the rules carry out.
    in_force: u64,
    repairs: u64,
    /// What is on disk, as far as known.
    kept: Option<Vec<(Target, Claim)>>,
    kept_problem: Option<Problem>,
    skew_ms: i64,
}

impl Forwarded {
    fn new(config: EnforceConfig, around: Surroundings) -> Self {
        let EnforceConfig { firewall, forwarded_for, .. } = config;
        let facts = GuardFacts {
            trusted_proxies: around.trusted_proxies.clone(),
            prefix_min_v4: firewall.prefix_min_v4,
            prefix_min_v6: firewall.prefix_min_v6,
            ..GuardFacts::default()
        };
        Self {
            guard: Guard::new(&facts),
            facts,
            claims: Claims::default(),
            lists: Arc::default(),
            paused: false,
            chains: Chains::new(forwarded_for.clone(), firewall, around.dry_run, around.clock.clone()),
            known: around.dry_run,
            is_due: false,
            choice: Choice::default(),
            outcome: Outcome::default(),
            in_force: 0,
            repairs: 0,
            kept: None,
            kept_problem: None,
            skew_ms: 0,
            config: forwarded_for,
            around,
        }
    }

    fn state_dir(&self) -> Option<PathBuf> {
        self.around.state_dir.clone().filter(|_| !self.around.dry_run)
    }

    /// Takes over what was kept. Lists are those of the last ban set.
    fn start(&mut self) {
        let now = self.around.clock.now();
        if let Some(state_dir) = self.state_dir() {
            match kept::load(&state_dir) {
                Ok(Some(kept)) => {
                    self.known = true;
                    self.kept = Some(kept.clone());
                    self.claims.handle_kept(kept, now);
                }
                Ok(None) => {}
                Err(error) => self.kept_problem = Some(Problem::warning(chain_of(&error))),
            }
            // One that cannot be read is told by who keeps it.
            let lists = last_set::load(&state_dir).ok().flatten().unwrap_or_default().lists;
            self.lists = Arc::new(lists);
        }
        self.take_pause();
        self.look_at_host();
    }

    fn take_bans(&mut self) {
        let Some(update) = self.around.bans.since(self.claims.revision()) else { return };
        if !self.claims.is_whole() {
            // From now on the bus knows better than what was kept.
            self.take_lists();
        }
        self.is_due |= self.claims.handle_update(&update, self.around.clock.now());
        self.known |= self.claims.is_whole();
    }

    /// Returns whether a pause began or ended.
    fn take_lists(&mut self) -> bool {
        self.lists = self.around.lists.borrow_and_update().clone();
        self.look_at_host();
        self.take_pause()
    }

    fn take_pause(&mut self) -> bool {
        let of_host = self.around.host_pause.borrow_and_update().is_some();
        let paused = of_host || is_paused(&self.lists, self.around.clock.now());
        let new = std::mem::replace(&mut self.paused, paused) != paused;
        self.is_due |= new;
        new
    }

    fn look_at_host(&mut self) {
        let mut facts = self.facts.clone();
        facts.never_ban.clone_from(&self.lists.never_ban);
        let servers: &Vec<IpAddr> = &self.around.bus_servers.borrow_and_update();
        facts.bus_servers.clone_from(servers);
        // That the host did not say is told by who keeps the firewall.
        read_host(&mut facts, host::own_addresses(), host::gateways());
        if facts != self.facts {
            self.guard = Guard::new(&facts);
            self.facts = facts;
            self.is_due = true;
        }
    }

    fn handle_tick(&mut self) {
        self.is_due |= self.claims.handle_time(self.around.clock.now());
        self.take_pause();
        // That all is lifted has to be said anew in a pause that began in another.
        self.is_due |= self.paused && !self.around.let_go.is_done();
        let skew_ms = self.around.clock.skew_ms().unwrap_or_default();
        if skew_ms.abs_diff(self.skew_ms) >= SKEW_STEP_MS {
            self.skew_ms = skew_ms;
            self.is_due = true;
        }
        self.report();
    }

    /// Puts in force who is to be refused now; where that failed before, only if it is to `retry`.
    async fn put(&mut self, retry: bool) {
        self.is_due = false;
        let choice = self.claims.choose(&self.guard, &self.config);
        let searches = if self.paused { Searches::new() } else { plan::tree(&choice, self.skew_ms) };
        if self.around.dry_run {
            self.say(&choice);
        }
        self.choice = choice;
        let families = host::families();
        if host::may_change_firewall() {
            let is_host_paused = self.paused && self.around.host_pause.borrow().is_some();
            let turn = Turn { known: self.known || self.paused, retry, is_host_paused };
            let outcome = self.chains.put(&searches, turn, &families).await;
            self.take_outcome(outcome);
            if self.outcome.is_in_force() && !self.around.dry_run {
                self.in_force = self.claims.revision();
            }
        } else if !self.around.dry_run {
            let text = "cannot change the firewall: run as root or with CAP_NET_ADMIN";
            self.outcome = Outcome { problems: vec![Problem::degraded(text)], ..Outcome::default() };
        }
        self.around.let_go.note(self.paused);
        self.keep().await;
        self.report();
    }

    fn take_outcome(&mut self, mut outcome: Outcome) {
        let forwards = self.config.chains.iter().any(|chain| chain != "INPUT" && chain != "OUTPUT");
        for &family in outcome.seen.iter().filter(|_| forwards) {
            let bridges = sight::unseen_bridges(family);
            if !bridges.is_empty() {
                let text = format!(
                    "{}: requests to containers on {} are not seen; to see them: {}",
                    family.as_str(),
                    bridges.join(", "),
                    sight::remedy(family)
                );
                outcome.problems.push(Problem::degraded(text));
            }
        }
        let metrics = &self.around.metrics.forwarded;
        metrics.rewrites.inc_by(outcome.rewrites);
        metrics.refused_packets.inc_by(outcome.refused.0.saturating_sub(self.outcome.refused.0));
        outcome.refused.0 = outcome.refused.0.max(self.outcome.refused.0);
        outcome.refused.1 = outcome.refused.1.max(self.outcome.refused.1);
        self.repairs += outcome.repairs;
        self.outcome = outcome;
    }

    /// Names whom a dry run would refuse.
    fn say(&self, choice: &Choice) {
        let known = |target: &Target| self.choice.refused.iter().any(|(other, ..)| other == target);
        let fresh = || choice.refused.iter().filter(|(target, ..)| !known(target));
        for (target, ..) in fresh().take(NAMED_MAX) {
            tracing::info!(%target, "Would refuse a forwarded client");
        }
        let others = fresh().count().saturating_sub(NAMED_MAX);
        if others > 0 {
            tracing::info!(clients = others, "Would refuse more forwarded clients");
        }
    }

    async fn keep(&mut self) {
        let Some(state_dir) = self.state_dir().filter(|_| self.known) else { return };
        let clients: Vec<(Target, Claim)> =
            self.choice.refused.iter().map(|(target, claim, _)| (*target, *claim)).collect();
        if self.kept.as_ref() == Some(&clients) {
            return;
        }
        let written = clients.clone();
        let stored = tokio::task::spawn_blocking(move || kept::store(&state_dir, &written)).await;
        let failure = match stored {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(chain_of(&error)),
            Err(_) => Some("the job that keeps who is refused broke".to_owned()),
        };
        self.kept = failure.is_none().then_some(clients);
        self.kept_problem = failure.map(Problem::degraded);
    }

    fn report(&self) {
        let (choice, metrics) = (&self.choice, &self.around.metrics.forwarded);
        let gauge = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        let in_force = if self.paused { 0 } else { choice.refused.len() };
        metrics.clients.set(gauge(in_force));
        metrics.left_out.set(gauge(choice.left_out));
        metrics.unmatchable.set(gauge(choice.unspellable.0));
        let mut problems = self.outcome.problems.clone();
        problems.extend(self.kept_problem.clone());
        let mut detail = self.outcome.detail.clone();
        if choice.left_out > 0 {
            let text = format!(
                "not everybody is refused because rules_max is {}; the oldest bans are left out",
                self.config.rules_max
            );
            problems.push(Problem::degraded(text));
            detail.push(format!("{} clients left out", choice.left_out));
        }
        if let (count, Some(first)) = choice.unspellable {
            detail.push(format!("{count} networks cannot be told from others in a header, such as {first}"));
        }
        if self.around.dry_run {
            detail.push("dry run: nothing is changed".to_owned());
        }
        let report = BackendReport {
            name: NAME.to_owned(),
            detail,
            members: in_force as u64,
            desired: self.claims.count() as u64,
            guarded: choice.guarded as u64,
            dropped_packets: self.outcome.refused.0,
            dropped_bytes: self.outcome.refused.1,
            revision: self.in_force,
            repairs: self.repairs,
            lets_some_pass: choice.left_out > 0 || choice.guarded > 0 || choice.unspellable.0 > 0,
            ..BackendReport::default()
        };
        self.around.board.put(report, problems);
    }
}

fn ticks(period: Duration) -> tokio::time::Interval {
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}
