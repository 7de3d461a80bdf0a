//! `type = "nats"`.

use proto::bus::nats::raw::RawSubject;
use proto::section;
use proto::settings::{Field, Mistakes, Unknown};
use proto::subject::Subjects;
use serde::Deserialize;

use super::source::{Lines, RawLimits, RawLines, SourceKind};
use crate::source::limit::LimitConfig;

/// The group that shares a subject unless another is named.
const QUEUE: &str = "ingest";
/// Longest subject and name of a group, in bytes.
const SUBJECT_BYTES_MAX: usize = 255;

/// A subject that shippers publish to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NatsSource {
    /// `None` = the one that the source's name stands for.
    pub subject: Option<String>,
    /// The group that shares it.
    pub queue: String,
    /// How much may come.
    pub limits: LimitConfig,
}

impl NatsSource {
    /// What the source of this name listens to.
    pub fn wanted(&self, subjects: &Subjects, name: &str) -> RawSubject {
        let subject = self.subject.clone().unwrap_or_else(|| subjects.raw(name));
        RawSubject { subject, queue: self.queue.clone() }
    }
}

/// `type = "nats"` as written.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct RawNats {
    #[serde(flatten)]
    lines: RawLines,
    subject: Field<String>,
    queue: Field<String>,
    limits: Field<RawLimits>,
    /// What nobody knows.
    #[serde(flatten)]
    unknown: Unknown,
}

section!(RawNats);

impl RawNats {
    pub(super) fn check(self, mistakes: &mut Mistakes) -> (Lines, SourceKind) {
        self.unknown.check(&[&RawLines::KEYS[..], &["subject", "queue", "limits"]].concat(), mistakes);
        let subject = self.subject.take("subject", mistakes);
        if let Some(wrong) = subject.as_ref().filter(|subject| !is_subject(subject)) {
            mistakes.add("subject", format!("expected words joined by dots, such as \"logs.shop\", got {wrong:?}"));
        }
        let queue = self.queue.or("queue", QUEUE.to_owned(), mistakes);
        if !is_words(&queue) {
            mistakes.add("queue", format!("expected a word without white space, got {queue:?}"));
        }
        let limits = self.limits.or("limits", RawLimits::default(), mistakes);
        let limits = mistakes.within("limits", |mistakes| limits.check_without_senders(mistakes));
        (self.lines.check(mistakes), SourceKind::Nats(NatsSource { subject, queue, limits }))
    }
}

/// Whether NATS would take it: no empty token, `*` and `>` alone in theirs, `>` last.
fn is_subject(text: &str) -> bool {
    let last = text.split('.').count() - 1;
    let is_token = |(at, token): (usize, &str)| match token {
        "*" => true,
        ">" => at == last,
        _ => !token.is_empty() && !token.contains(['*', '>']),
    };
    is_words(text) && text.split('.').enumerate().all(is_token)
}

fn is_words(text: &str) -> bool {
    (1..=SUBJECT_BYTES_MAX).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subject_is_what_nats_takes() {
        for (text, is) in [
            ("a", true),
            ("a.b-c_d.1", true),
            ("a.*.b", true),
            ("a.>", true),
            (">", true),
            ("", false),
            ("a.", false),
            (".a", false),
            ("a..b", false),
            ("a b", false),
            ("a.>.b", false),
            ("a*", false),
            ("ä", false),
        ] {
            assert_eq!(is_subject(text), is, "{text:?}");
        }
    }
}
