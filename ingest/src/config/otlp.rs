//! `type = "otlp"`.

use proto::section;
use proto::settings::{Mistakes, Unknown};
use serde::Deserialize;

use super::listen::RawListen;
use super::requests::RawRequests;
use super::source::{Lines, RawLines, SourceKind};
use crate::source::http::{Content, NodeFrom};

/// Words of `node_from`.
const NODES: [(&str, NodeFrom); 3] = [("self", NodeFrom::Here), ("sender", NodeFrom::Sender), ("host", NodeFrom::Host)];

/// `type = "otlp"` as written.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct RawOtlp {
    #[serde(flatten)]
    lines: RawLines,
    #[serde(flatten)]
    listen: RawListen,
    #[serde(flatten)]
    requests: RawRequests,
    /// What nobody knows.
    #[serde(flatten)]
    unknown: Unknown,
}

section!(RawOtlp);

impl RawOtlp {
    pub(super) fn check(self, mistakes: &mut Mistakes) -> (Lines, Option<SourceKind>) {
        self.unknown.check(&RawRequests::keys(&[]), mistakes);
        let lines = self.lines.check(mistakes);
        let config = self.requests.check((lines, self.listen), (Content::Otlp, &NODES), mistakes);
        (lines, config.map(SourceKind::Otlp))
    }
}
