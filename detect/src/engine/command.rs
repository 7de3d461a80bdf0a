//! What operators and the configuration ask of the engine.

use std::net::IpAddr;
use std::time::Duration;

use proto::api::{AllowReply, CoveredBy, UnbanReply};
use proto::ban::{Ban, Evidence, Origin, Pause};
use proto::net::Target;
use proto::subject::OPERATOR;
use proto::time::Timestamp;

use super::{Engine, EngineConfig, Output, Quiet};

/// Characters of a reason that are kept.
const REASON_CHARS_MAX: usize = 1000;
/// Operators' bans and allowances in force together; more are refused.
const ALLOWED_MAX: usize = 10_000;

/// A request to the engine.
#[derive(Clone, Debug)]
pub enum Command {
    /// Ban a target, `length` = `None` for ever.
    Ban {
        /// Whom.
        target: Target,
        /// For how long.
        length: Option<Duration>,
        /// Why, for people.
        reason: String,
    },
    /// Lift the bans of targets.
    Unban(Vec<Target>),
    /// Lift all bans.
    UnbanAll,
    /// Never ban a target, and unban it.
    Allow {
        /// Whom.
        target: Target,
        /// For how long; `None` = for ever.
        length: Option<Duration>,
    },
    /// Lift all bans and ban nobody, `None` = until resumed.
    Pause(Option<Duration>),
    /// End a pause.
    Resume,
    /// A name of the configuration has been resolved.
    Resolved {
        /// The name.
        name: String,
        /// Its addresses.
        addrs: Vec<IpAddr>,
    },
    /// A new configuration.
    Reload {
        /// It.
        config: Box<EngineConfig>,
        /// The names in its `never_ban`.
        names: Vec<String>,
    },
}

/// The answer to a [`Command`].
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    /// The ban as ordered.
    Banned(Box<Ban>),
    /// What was lifted and what was not.
    Unbanned(UnbanReply),
    /// The allowance as stored.
    Allowed(AllowReply),
    /// The pause in force.
    Paused(Option<Pause>),
    /// Done.
    Done,
}

/// Why a command was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The target may not be banned.
    #[error("{target} may not be banned: {why}")]
    NeverBan {
        /// Whom.
        target: Target,
        /// Which list says so.
        why: String,
    },
    /// The target is too wide.
    #[error("{target} is too wide: an operator may name /{min} or narrower")]
    TooWide {
        /// Whom.
        target: Target,
        /// Shortest allowed prefix.
        min: u8,
    },
    /// Too many allowances.
    #[error("{ALLOWED_MAX} targets are allowed already; put lasting ones into detect.never_ban")]
    TooManyAllowed,
}

impl Engine {
    /// Carries out a command at `now`.
    ///
    /// # Errors
    /// When the command asks for what must not be; nothing has changed then.
    pub fn handle_command(&mut self, command: Command, now: Timestamp) -> Result<Reply, Refusal> {
        self.handle_timeout(now);
        match command {
            Command::Ban { target, length, reason } => self.order_ban(target, length, &reason),
            Command::Unban(targets) => Ok(Reply::Unbanned(self.unban(&targets))),
            Command::UnbanAll => Ok(Reply::Unbanned(self.unban_all())),
            Command::Allow { target, length } => self.allow(target, length),
            Command::Pause(length) => Ok(self.pause(length)),
            Command::Resume => {
                if self.paused.is_some() {
                    self.resume(self.now);
                }
                Ok(Reply::Paused(None))
            }
            Command::Resolved { name, addrs } => {
                if self.allows.set_resolved(&name, addrs) {
                    self.leaks.renew();
                    self.lift_guarded("a name in never_ban now resolves to it");
                    self.outputs.push_back(Output::Control);
                }
                Ok(Reply::Done)
            }
            Command::Reload { config, names } => {
                self.reload(*config, &names);
                Ok(Reply::Done)
            }
        }
    }

    fn order_ban(&mut self, target: Target, length: Option<Duration>, reason: &str) -> Result<Reply, Refusal> {
        self.check_width(target)?;
        if self.allows.covers(&target) || self.config.trusted_proxies.covers(&target) {
            let proxy = || "it is a trusted proxy".to_owned();
            let why = self.allows.why(target.addr()).unwrap_or_else(proxy);
            return Err(Refusal::NeverBan { target, why });
        }
        let end = length.map(|length| self.now.saturating_add(length));
        let ban = Ban {
            target,
            rule: OPERATOR.to_owned(),
            origin: Origin::Operator,
            ban_count: 1,
            ban_seconds: length.map(|length| length.as_millis().div_ceil(1000) as u64),
            banned_at: self.now,
            expires_at: end,
            reason: reason.chars().take(REASON_CHARS_MAX).collect(),
            evidence: Evidence::default(),
        };
        let position = self.stream.position();
        self.put_ban(ban.clone());
        // An order may shorten a former one, so what is in force now counts, not what was.
        let until = self.bans.get(&target).map_or(end, proto::ban::BanRecord::expires_at).unwrap_or(Timestamp::MAX);
        self.offenders.update(target, |offender| offender.set_quiet(Quiet { after: position, until }));
        self.stream.advance();
        self.push_offender(target);
        self.bound_offenders();
        self.outputs.push_back(Output::Control);
        Ok(Reply::Banned(Box::new(ban)))
    }

    /// A mistyped prefix must not ban, nor free, half of the Internet.
    fn check_width(&self, target: Target) -> Result<(), Refusal> {
        let (ipv4, ipv6) = self.config.operator_prefix_min;
        let min = if target.is_ipv4() { ipv4 } else { ipv6 };
        if target.prefix() < min { Err(Refusal::TooWide { target, min }) } else { Ok(()) }
    }

    fn unban(&mut self, targets: &[Target]) -> UnbanReply {
        let mut reply = UnbanReply::default();
        for &target in targets {
            let counting = Target::new(target.addr(), target.prefix().min(self.counting_prefix(&target)));
            // An address stands for its counting prefix as well; a network is just itself.
            let freed = if target.is_host() && counting != target { vec![target, counting] } else { vec![target] };
            let lifted: Vec<Target> = freed.iter().filter(|t| self.lift(t, "lifted by an operator")).copied().collect();
            for target in &freed {
                // Whoever was never banned keeps what it has counted: there is nothing to take back.
                if lifted.contains(target) || self.offenders.get(target).is_some() {
                    self.absolve(target);
                }
            }
            let covered: Vec<Target> = self.bans.wider(&target);
            if lifted.is_empty() && covered.is_empty() {
                reply.not_banned.push(target);
            }
            reply.lifted.extend(lifted);
            reply.covered.extend(covered.into_iter().map(|by| CoveredBy { target, by }));
        }
        self.stream.advance();
        self.outputs.push_back(Output::Control);
        reply
    }

    fn unban_all(&mut self) -> UnbanReply {
        let targets: Vec<Target> = self.bans.iter().map(|record| record.target).collect();
        for target in &targets {
            self.lift(target, "lifted by an operator");
            self.absolve(target);
        }
        self.stream.advance();
        self.outputs.push_back(Output::Control);
        UnbanReply { lifted: targets, ..UnbanReply::default() }
    }

    fn allow(&mut self, target: Target, length: Option<Duration>) -> Result<Reply, Refusal> {
        self.check_width(target)?;
        if self.allows.allowed().len() >= ALLOWED_MAX && !self.allows.allowed().contains_key(&target) {
            return Err(Refusal::TooManyAllowed);
        }
        let until = length.map(|length| self.now.saturating_add(length));
        self.allows.allow(target, until);
        self.clients.forget_within(&target);
        let counting = Target::of_client(target.addr(), self.counting_prefix(&target));
        let mut lifted = Vec::new();
        let inside = self.bans.inside(target.net());
        let own = Some(counting).filter(|own| target.is_host() && *own != target);
        for target in inside.into_iter().chain(own) {
            if self.lift(&target, "allowed by an operator") {
                self.absolve(&target);
                lifted.push(target);
            }
        }
        let covered = self.bans.wider(&target).into_iter().map(|by| CoveredBy { target, by }).collect();
        self.stream.advance();
        self.outputs.push_back(Output::Control);
        Ok(Reply::Allowed(AllowReply { target, until, lifted, covered }))
    }

    fn pause(&mut self, length: Option<Duration>) -> Reply {
        let since = self.paused.map_or(self.now, |pause| pause.since);
        let until = length.map(|length| self.now.saturating_add(length));
        self.paused = Some(Pause { since, until });
        self.outputs.push_back(Output::Control);
        Reply::Paused(self.paused)
    }

    fn reload(&mut self, config: EngineConfig, names: &[String]) {
        let former = std::mem::replace(&mut self.config, config);
        let rules = &self.config.rules;
        let number = |old: u16| {
            let old = former.rules.get(usize::from(old))?;
            let new = rules.iter().position(|new| new.name == old.name && new.counts_like(old))?;
            u16::try_from(new).ok()
        };
        self.clients.renumber(number);
        self.stats.rules = rules
            .iter()
            .map(|rule| {
                let old = former.rules.iter().position(|old| old.name == rule.name);
                old.and_then(|old| self.stats.rules.get(old).copied()).unwrap_or_default()
            })
            .collect();
        if former.ipv6_prefix != self.config.ipv6_prefix {
            // Clients are counted by other targets from now on.
            while self.clients.evict_oldest().is_some() {}
        }
        self.set_coverage(Vec::new());
        self.allows.reconfigure(&self.config.never_ban, names);
        self.leaks.renew();
        self.lift_guarded("it may not be banned any more");
        self.bound_clients();
        self.bound_offenders();
        self.outputs.push_back(Output::Control);
    }

    fn counting_prefix(&self, target: &Target) -> u8 {
        if target.is_ipv4() { 32 } else { self.config.ipv6_prefix }
    }
}
