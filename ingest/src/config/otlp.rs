//! `type = "otlp"`.

use proto::section;
use proto::settings::{Mistakes, Unknown};
use serde::Deserialize;

use super::listen::RawListen;
use super::requests::RawRequests;
use super::source::{Lines, RawLines, SourceKind};
use crate::source::http::{Content, NodeFrom, OTLP_PATH};

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
    /// Where an `http` source has its path; OTLP's is given.
    path: Option<serde_json::Value>,
    /// What nobody knows.
    #[serde(flatten)]
    unknown: Unknown,
}

section!(RawOtlp);

impl RawOtlp {
    pub(super) fn check(self, mistakes: &mut Mistakes) -> (Lines, Option<SourceKind>) {
        self.unknown.check(&RawRequests::keys(&[]), mistakes);
        if self.path.is_some() {
            let text = format!("means nothing with `otlp`, whose senders post to {OTLP_PATH}: leave it out");
            mistakes.add("path", text);
        }
        let lines = self.lines.check(mistakes);
        let config = self.requests.check((lines, self.listen), (Content::Otlp, &NODES), mistakes);
        (lines, config.map(SourceKind::Otlp))
    }
}
