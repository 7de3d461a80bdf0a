//! `type = "http"`.

use proto::section;
use proto::settings::{Field, Mistakes, Unknown};
use serde::Deserialize;

use super::listen::RawListen;
use super::requests::RawRequests;
use super::source::{Lines, RawLines, SourceKind};
use crate::source::http::{Content, HEALTH_PATH, NodeFrom};

/// Default of `path`: what shippers post to when told nothing else.
const PATH: &str = "/";
/// Words of `node_from`.
const NODES: [(&str, NodeFrom); 2] = [("self", NodeFrom::Here), ("sender", NodeFrom::Sender)];

/// `type = "http"` as written.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct RawHttp {
    #[serde(flatten)]
    lines: RawLines,
    #[serde(flatten)]
    listen: RawListen,
    #[serde(flatten)]
    requests: RawRequests,
    /// Where lines are posted.
    path: Field<String>,
    /// What nobody knows.
    #[serde(flatten)]
    unknown: Unknown,
}

section!(RawHttp);

impl RawHttp {
    pub(super) fn check(self, mistakes: &mut Mistakes) -> (Lines, Option<SourceKind>) {
        self.unknown.check(&RawRequests::keys(&["path"]), mistakes);
        let lines = self.lines.check(mistakes);
        let path = self.path.or("path", PATH.to_owned(), mistakes);
        let is_plain = path.bytes().all(|byte| byte.is_ascii_graphic() && !b"?#".contains(&byte));
        if !path.starts_with('/') || !is_plain || path == HEALTH_PATH {
            mistakes
                .add("path", format!("must begin with `/`, be plain ASCII without a query, and not be {HEALTH_PATH}"));
        }
        let config = self.requests.check((lines, self.listen), (Content::Lines { path }, &NODES), mistakes);
        (lines, config.map(SourceKind::Http))
    }
}
