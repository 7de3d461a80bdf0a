//! What the sources of requests have in common.

use std::path::PathBuf;

use proto::settings::{ByteSize, Field, FromValue, Mistakes, Unknown};
use serde::Deserialize;
use serde_json::Value;

use super::listen::RawListen;
use super::source::{Lines, RawLines};
use crate::source::http::{AuthFiles, Content, NodeFrom, RequestsConfig};

/// Default of `body_bytes_max`: what Vector's and Fluent Bit's batches have, less than a tenth of it, with room.
const BODY_BYTES_MAX: u64 = 16 << 20;
/// Bounds of `body_bytes_max`: a line must fit, and four bodies into the memory of a source.
const BODY_BYTES_MAX_RANGE: std::ops::RangeInclusive<u64> = (64 << 10)..=(16 << 20);

/// Keys of every source of requests, as written.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct RawRequests {
    auth: Field<RawAuth>,
    /// Longest body, as it travels and without its compression.
    body_bytes_max: Field<ByteSize>,
    /// Which node lines are shown under.
    node_from: Field<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct RawAuth {
    /// One token a line.
    tokens_file: Field<PathBuf>,
    /// One `user:password` a line.
    users_file: Field<PathBuf>,
    #[serde(flatten)]
    unknown: Unknown,
}

impl FromValue for RawAuth {
    fn from_value(value: Value) -> Result<Self, String> {
        // What stands in its place may be a secret.
        if !value.is_object() {
            return Err("expected a table such as { tokens_file = \"/etc/portcullis/tokens\" }".to_owned());
        }
        serde_json::from_value(value).map_err(|error| error.to_string())
    }
}

impl RawRequests {
    const OWN_KEYS: [&str; 3] = ["auth", "body_bytes_max", "node_from"];

    /// The keys with those of all sources, for suggestions.
    pub(super) fn keys(more: &[&'static str]) -> Vec<&'static str> {
        [&Self::OWN_KEYS[..], &RawListen::KEYS[..], &RawLines::KEYS[..], more].concat()
    }

    /// `nodes` are the words of `node_from`, the first of which is the default.
    pub(super) fn check(
        self,
        (lines, listen): (Lines, RawListen),
        (content, nodes): (Content, &[(&str, NodeFrom)]),
        mistakes: &mut Mistakes,
    ) -> Option<RequestsConfig> {
        let auth = self.auth.or("auth", RawAuth::default(), mistakes);
        let auth = mistakes.within("auth", |mistakes| auth.check(mistakes));
        let listen = listen.check(auth.is_given(), mistakes);
        let bytes_max = self.body_bytes_max.or("body_bytes_max", ByteSize(BODY_BYTES_MAX), mistakes).0;
        if !BODY_BYTES_MAX_RANGE.contains(&bytes_max) || bytes_max < lines.line_bytes_max as u64 {
            mistakes.add("body_bytes_max", "must be from 64KiB to 16MiB, and not less than line_bytes_max");
        }
        let given = self.node_from.take("node_from", mistakes);
        let word = given.as_deref().or(nodes.first().map(|(word, _)| *word)).unwrap_or_default();
        let node_from = nodes.iter().find(|(known, _)| *known == word).map(|(_, node_from)| *node_from);
        if node_from.is_none() {
            let words: Vec<String> = nodes.iter().map(|(word, _)| format!("`{word}`")).collect();
            mistakes.add("node_from", format!("expected {}, got {word:?}", words.join(" or ")));
        }
        Some(RequestsConfig {
            listen: listen?,
            auth,
            body_bytes_max: bytes_max as usize,
            node_from: node_from?,
            content,
        })
    }
}

impl RawAuth {
    fn check(self, mistakes: &mut Mistakes) -> AuthFiles {
        self.unknown.check(&["tokens_file", "users_file"], mistakes);
        AuthFiles {
            tokens_file: self.tokens_file.take("tokens_file", mistakes),
            users_file: self.users_file.take("users_file", mistakes),
        }
    }
}
