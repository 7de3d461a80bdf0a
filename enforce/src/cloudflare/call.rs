//! What is asked of Cloudflare and what comes back, as values.

use std::time::Duration;

use proto::net::Target;

use crate::config::Mode;

/// Code of an access rule that is there already.
const DUPLICATE: u32 = 10009;
/// Code of a list's item that is there already, within one request.
const DUPLICATE_ITEM: u32 = 10028;
/// Codes of a login that is not one: request headers, keys and tokens that are unknown, wrong, or may not do this.
const LOGIN: [u32; 7] = [6003, 6111, 9103, 9106, 9107, 9109, 10000];

/// One call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Call {
    /// Number of the place.
    pub(super) place: usize,
    /// ID of its list, once it is known.
    pub(super) list: Option<String>,
    /// What is asked there.
    pub(super) ask: Ask,
    /// Whether it frees somebody, or has to come before what does: for that a part of the pace is kept.
    pub(super) frees: bool,
}

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Ask {
    /// A page of all that is there.
    Look(Cursor),
    /// The ID of the list.
    FindList,
    /// Entries of exactly this target.
    Find(Target),
    /// A new access rule, with its note.
    Create(Target, String),
    /// Another mode for our access rule.
    SetMode(String, Target),
    /// The end of our access rule.
    Delete(String, Target),
    /// New items, with their comments.
    Append(Vec<(Target, String)>),
    /// The end of our items, by ID.
    Remove(Vec<(String, Target)>),
    /// How far an operation is.
    Poll(String),
}

impl Ask {
    /// Whether it changes anything there.
    pub(super) fn is_write(&self) -> bool {
        match self {
            Self::Look(_) | Self::FindList | Self::Find(_) | Self::Poll(_) => false,
            Self::Create(..) | Self::SetMode(..) | Self::Delete(..) | Self::Append(_) | Self::Remove(_) => true,
        }
    }

    /// Whether it frees somebody, or may.
    pub(super) fn frees(&self) -> bool {
        matches!(self, Self::Delete(..) | Self::Remove(_) | Self::Poll(_))
    }
}

/// Where to go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Cursor {
    /// Access rules whose notes hold this: a page, the first is 1.
    Page {
        /// What notes hold.
        notes: String,
        /// Which one.
        page: u32,
    },
    /// Items: after what was named; at first the start.
    After(Option<String>),
}

/// An entry that is there, ours or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) id: String,
    /// `None` where it is no address or network.
    pub(super) target: Option<Target>,
    /// `None` for items, and for modes that we do not set.
    pub(super) mode: Option<Mode>,
    /// Note or comment.
    pub(super) note: String,
    /// It is not of this place: of the account or user that the zone belongs to, and cannot be changed here.
    pub(super) is_elsewhere: bool,
}

/// What came back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// A page, where to go on, and how many there are in all, where that is said.
    Page { entries: Vec<Seen>, next: Option<Cursor>, total: Option<usize> },
    /// Entries of one target.
    Found(Vec<Seen>),
    /// ID of the list, and whether it holds addresses.
    List(Option<(String, bool)>),
    /// ID of the new rule.
    Made(String),
    /// It is so.
    Done,
    /// An operation has begun.
    Begun(String),
    /// How far it is.
    Operation(Progress),
}

/// How far an operation is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// It waits or runs.
    Running,
    /// All of it is done.
    Completed,
    /// Why not, cut, without secrets.
    Failed(String),
}

/// A call failed. Shows no secret.
#[derive(Debug, thiserror::Error)]
pub(super) enum CallError {
    /// No answer, or not to its end.
    #[error("cannot reach Cloudflare")]
    Transport(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// No answer in time.
    #[error("Cloudflare did not answer in time")]
    Timeout,
    /// The answer is not what the documentation says.
    #[error("Cloudflare's answer is not readable")]
    Unreadable(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// It is longer than any that we ask for.
    #[error("Cloudflare's answer is too long")]
    TooLong,
    /// It was not made: it is another host's.
    #[error("another host does this")]
    Deposed,
    /// Too many calls.
    #[error("Cloudflare wants fewer calls")]
    Limited {
        /// How long no call is worth making, where it says so.
        after: Option<Duration>,
    },
    /// Not their day.
    #[error("Cloudflare has trouble of its own (HTTP {status})")]
    Unavailable {
        /// Of HTTP.
        status: u16,
    },
    /// It says no.
    #[error("Cloudflare refuses (HTTP {status}{})", render_refusal(.codes, .message))]
    Refused {
        /// Of HTTP; also 200.
        status: u16,
        /// Of Cloudflare.
        codes: Vec<u32>,
        /// The first reason, cut, without secrets.
        message: String,
    },
}

fn render_refusal(codes: &[u32], message: &str) -> String {
    let codes: String = codes.iter().take(3).map(|code| format!(", code {code}")).collect();
    if message.is_empty() { codes } else { format!("{codes}: {message}") }
}

impl CallError {
    /// Whether it may have been done all the same.
    pub(super) fn is_unclear(&self) -> bool {
        match self {
            Self::Transport(_) | Self::Timeout | Self::Unreadable(_) | Self::TooLong | Self::Unavailable { .. } => true,
            Self::Deposed | Self::Limited { .. } | Self::Refused { .. } => false,
        }
    }

    /// Whether such an entry is there already.
    pub(super) fn is_duplicate(&self) -> bool {
        self.has_code(DUPLICATE) || self.has_code(DUPLICATE_ITEM)
    }

    /// Whether what was named is not there.
    pub(super) fn is_gone(&self) -> bool {
        matches!(self, Self::Refused { status: 404, .. })
    }

    /// Whether it is about what was asked and not about who asked.
    pub(super) fn is_about_entry(&self) -> bool {
        matches!(self, Self::Refused { status: 400 | 409 | 422, .. }) && !self.is_about_login()
    }

    /// Whether we are not who we should be, or may not do this.
    pub(super) fn is_about_login(&self) -> bool {
        matches!(self, Self::Refused { status: 401 | 403, .. }) || LOGIN.iter().any(|code| self.has_code(*code))
    }

    /// The word for it in metrics.
    pub(super) fn outcome(&self) -> &'static str {
        match self {
            Self::Transport(_) | Self::Timeout => "unreachable",
            Self::Unreadable(_) | Self::TooLong => "unreadable",
            Self::Deposed => "deposed",
            Self::Limited { .. } => "limited",
            Self::Unavailable { .. } => "unavailable",
            Self::Refused { .. } => "refused",
        }
    }

    fn has_code(&self, wanted: u32) -> bool {
        matches!(self, Self::Refused { codes, .. } if codes.contains(&wanted))
    }
}
