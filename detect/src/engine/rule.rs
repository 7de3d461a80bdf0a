//! A rule as the engine runs it: what it matches, when that makes a ban, and how long the ban is.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use proto::event::Event;

use super::escalation::Escalation;
use super::matcher::Matcher;

/// Whether a rule's bans are carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// They are.
    Enforce,
    /// They are only counted and logged. Shadow bans leave no trace: neither history nor a ban.
    Shadow,
}

impl Mode {
    /// The word in configurations and tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Enforce => "enforce",
            Self::Shadow => "shadow",
        }
    }
}

/// Which value of an event must differ for it to count again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Distinct {
    /// The path without the query.
    Path,
    /// The requested host.
    Host,
    /// The user name.
    Username,
    /// The user agent.
    UserAgent,
}

impl Distinct {
    /// By the word in configurations.
    pub fn parse(word: &str) -> Option<Self> {
        match word {
            "path" => Some(Self::Path),
            "host" => Some(Self::Host),
            "username" => Some(Self::Username),
            "user-agent" => Some(Self::UserAgent),
            _ => None,
        }
    }

    /// The words [`Self::parse`] knows, for error texts.
    pub const WORDS: &str = "\"path\", \"host\", \"username\" or \"user-agent\"";

    /// That value of an event.
    pub fn of<'a>(self, event: &Event<'a>) -> &'a str {
        match self {
            Self::Path => event.text.path,
            Self::Host => event.text.host,
            Self::Username => event.text.username,
            Self::UserAgent => event.text.user_agent,
        }
    }
}

/// When matching events make a ban.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Threshold {
    /// `max_retry` events (of different values, if `distinct`) whose span is at most `find_time`.
    Window {
        /// Number of events, at least 1.
        max_retry: u32,
        /// Greatest span from the first to the last of them, inclusive.
        find_time: Duration,
        /// Count different values only.
        distinct: Option<Distinct>,
    },
    /// An event that a leaky bucket cannot hold: it drains one event each `period` and holds `burst`.
    Rate {
        /// Time in which one event drains.
        period: Duration,
        /// Events that fit at once, at least 1.
        burst: NonZeroU32,
    },
}

impl Threshold {
    /// How long an event can still matter for others.
    pub fn horizon(&self) -> Duration {
        match self {
            Self::Window { find_time, .. } => *find_time,
            Self::Rate { period, burst } => period.saturating_mul(burst.get()),
        }
    }

    /// Events that make a ban, at least.
    pub fn needed(&self) -> u32 {
        match self {
            Self::Window { max_retry, .. } => *max_retry,
            Self::Rate { burst, .. } => burst.get().saturating_add(1),
        }
    }
}

/// One rule.
#[derive(Clone, Debug)]
pub struct Rule {
    /// Unique name.
    pub name: Arc<str>,
    /// Which events count.
    pub matcher: Matcher,
    /// When they make a ban.
    pub threshold: Threshold,
    /// Length of a first ban.
    pub ban_time: Duration,
    /// Whether bans are carried out.
    pub mode: Mode,
    /// How later bans grow.
    pub escalation: Escalation,
}

impl Rule {
    /// Whether windows counted under `other` mean the same under this rule.
    pub fn counts_like(&self, other: &Self) -> bool {
        self.matcher.source() == other.matcher.source() && self.threshold == other.threshold && self.mode == other.mode
    }
}
