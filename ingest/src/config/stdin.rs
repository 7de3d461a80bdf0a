//! `type = "stdin"`.

use proto::section;
use proto::settings::{Mistakes, Unknown};
use serde::Deserialize;

use super::source::{Lines, RawLines, SourceKind};

/// `type = "stdin"` as written.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct RawStdin {
    #[serde(flatten)]
    lines: RawLines,
    /// What nobody knows.
    #[serde(flatten)]
    unknown: Unknown,
}

section!(RawStdin);

impl RawStdin {
    pub(super) fn check(self, mistakes: &mut Mistakes) -> (Lines, SourceKind) {
        self.unknown.check(&RawLines::KEYS, mistakes);
        (self.lines.check(mistakes), SourceKind::Stdin)
    }
}
