//! Cloudflare's JSON, as far as we read it.
//!
//! Source: <https://developers.cloudflare.com/api/>, IP access rules, lists and rulesets.

use proto::net::Target;
use serde::Deserialize;

use super::call::{Progress, Seen};
use crate::config::Mode;

/// Around every answer. Only `success` says whether it was done.
#[derive(Debug, Deserialize)]
pub(super) struct Envelope {
    pub(super) success: bool,
    #[serde(default)]
    pub(super) errors: Option<Vec<Reason>>,
    #[serde(default)]
    pub(super) result: serde_json::Value,
    #[serde(default)]
    pub(super) result_info: Option<ResultInfo>,
}

/// Why not.
#[derive(Debug, Deserialize)]
pub(super) struct Reason {
    #[serde(default)]
    pub(super) code: u32,
    #[serde(default)]
    pub(super) message: String,
}

/// Where in a listing we are.
#[derive(Debug, Default, Deserialize)]
pub(super) struct ResultInfo {
    #[serde(default)]
    pub(super) total_count: Option<usize>,
    #[serde(default)]
    pub(super) total_pages: Option<u32>,
    #[serde(default)]
    pub(super) cursors: Option<Cursors>,
}

/// What items are listed by.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Cursors {
    #[serde(default)]
    pub(super) after: Option<String>,
}

/// An access rule.
#[derive(Debug, Deserialize)]
pub(super) struct Rule {
    id: String,
    #[serde(default)]
    mode: String,
    #[serde(default)]
    configuration: Configuration,
    #[serde(default)]
    notes: Option<String>,
    #[serde(default)]
    scope: Option<RuleScope>,
}

/// Whose an access rule is.
#[derive(Debug, Deserialize)]
struct RuleScope {
    #[serde(default)]
    id: String,
    #[serde(default, rename = "type")]
    kind: String,
}

#[derive(Debug, Default, Deserialize)]
struct Configuration {
    #[serde(default)]
    target: String,
    #[serde(default)]
    value: String,
}

impl Rule {
    /// As it is seen by the zone or account `whose`; `None` by the user. Zones also list the rules of their account and
    /// user, which only those can change.
    pub(super) fn seen_by(self, whose: Option<&str>) -> Seen {
        let Configuration { target, value } = self.configuration;
        let is_address = matches!(target.as_str(), "ip" | "ip6" | "ip_range");
        let is_elsewhere = self.scope.is_some_and(|scope| match whose {
            Some(whose) => !scope.id.is_empty() && scope.id != whose,
            None => !scope.kind.is_empty() && scope.kind != "user",
        });
        Seen {
            id: self.id,
            target: value.parse().ok().filter(|_| is_address),
            mode: Mode::parse(&self.mode),
            note: self.notes.unwrap_or_default(),
            is_elsewhere,
        }
    }
}

/// What an access rule calls such a target.
pub(super) fn target_kind(target: &Target) -> &'static str {
    match (target.is_host(), target.is_ipv4()) {
        (false, _) => "ip_range",
        (true, true) => "ip",
        (true, false) => "ip6",
    }
}

/// An item of a list.
#[derive(Debug, Deserialize)]
pub(super) struct Item {
    id: String,
    #[serde(default)]
    ip: Option<String>,
    #[serde(default)]
    comment: Option<String>,
}

impl From<Item> for Seen {
    fn from(item: Item) -> Self {
        let target = item.ip.and_then(|text| text.parse().ok());
        Self { id: item.id, target, mode: None, note: item.comment.unwrap_or_default(), is_elsewhere: false }
    }
}

/// A list.
#[derive(Debug, Deserialize)]
pub(super) struct List {
    pub(super) id: String,
    #[serde(default)]
    pub(super) name: String,
    #[serde(default)]
    pub(super) kind: String,
    #[serde(default)]
    pub(super) num_referencing_filters: Option<f64>,
}

/// What only has an ID.
#[derive(Debug, Deserialize)]
pub(super) struct Identified {
    pub(super) id: String,
}

/// A zone.
#[derive(Debug, Deserialize)]
pub(super) struct Zone {
    pub(super) id: String,
    #[serde(default)]
    plan: Option<Plan>,
}

#[derive(Debug, Deserialize)]
struct Plan {
    #[serde(default)]
    legacy_id: Option<String>,
}

impl Zone {
    /// Whether its account may be one of an Enterprise; also where its plan is not told.
    pub(super) fn may_be_enterprise(&self) -> bool {
        let plan = self.plan.as_ref().and_then(|plan| plan.legacy_id.as_deref());
        plan.is_none_or(|plan| !matches!(plan, "free" | "pro" | "business"))
    }
}

/// The beginning of an operation.
#[derive(Debug, Deserialize)]
pub(super) struct Begun {
    pub(super) operation_id: String,
}

/// An operation.
#[derive(Debug, Deserialize)]
pub(super) struct Operation {
    #[serde(default)]
    status: String,
    #[serde(default)]
    error: Option<String>,
}

impl From<Operation> for Progress {
    fn from(operation: Operation) -> Self {
        match operation.status.as_str() {
            "completed" => Self::Completed,
            "failed" => Self::Failed(operation.error.unwrap_or_else(|| "it does not say why".to_owned())),
            _ => Self::Running,
        }
    }
}

/// A ruleset.
#[derive(Debug, Deserialize)]
pub(super) struct Ruleset {
    #[serde(default)]
    pub(super) rules: Option<Vec<CustomRule>>,
}

/// A rule of a ruleset.
#[derive(Debug, Deserialize)]
pub(super) struct CustomRule {
    #[serde(default)]
    pub(super) action: String,
    #[serde(default)]
    pub(super) expression: String,
    #[serde(default)]
    pub(super) enabled: Option<bool>,
}

impl CustomRule {
    /// Whether it does something about clients on the list of that name.
    pub(super) fn uses(&self, list: &str) -> bool {
        let acts = matches!(self.action.as_str(), "block" | "managed_challenge" | "js_challenge" | "challenge");
        let mut names = self.expression.split('$').skip(1);
        let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.');
        let is_named = names.any(|rest| rest.split(|c| !is_name(c)).next() == Some(list));
        acts && is_named && self.enabled != Some(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_uses_a_list_when_it_acts_on_exactly_its_name() {
        let rule = |action: &str, expression: &str, enabled| CustomRule {
            action: action.to_owned(),
            expression: expression.to_owned(),
            enabled,
        };
        assert!(rule("block", "(ip.src in $bad)", None).uses("bad"));
        assert!(rule("managed_challenge", "ip.src in $worse or ip.src in $bad", Some(true)).uses("bad"));
        assert!(!rule("block", "ip.src in $bad", Some(false)).uses("bad"));
        assert!(!rule("skip", "ip.src in $bad", None).uses("bad"));
        assert!(!rule("block", "ip.src in $bad_0 and ip.src in $cf.bad", None).uses("bad"));
    }

    #[test]
    fn an_entry_is_read_however_cloudflare_writes_its_address() {
        let rule = r#"{"id":"1","mode":"whitelist","configuration":{"target":"ip6",
            "value":"2001:0DB8:0000:0000:0000:0000:0000:0001"},"notes":null,"paused":false}"#;
        let seen = serde_json::from_str::<Rule>(rule).unwrap().seen_by(None);
        assert_eq!(seen.target, Some("2001:db8::1".parse().unwrap()));
        assert_eq!((seen.mode, seen.note.as_str()), (None, ""));
        let rule = r#"{"id":"1","mode":"block","configuration":{"target":"country","value":"XX"}}"#;
        assert_eq!(serde_json::from_str::<Rule>(rule).unwrap().seen_by(None).target, None);
    }

    #[test]
    fn a_rule_is_of_the_place_that_its_scope_names() {
        let is_elsewhere = |scope: &str, whose: Option<&str>| {
            let rule = format!(r#"{{"id":"1","configuration":{{}}{scope}}}"#);
            serde_json::from_str::<Rule>(&rule).unwrap().seen_by(whose).is_elsewhere
        };
        let zone = r#","scope":{"type":"zone","id":"z"}"#;
        let account = r#","scope":{"type":"organization","id":"a","email":null}"#;
        let user = r#","scope":{"type":"user","id":"u"}"#;
        for (scope, whose, expected) in [
            (zone, Some("z"), false),
            (account, Some("z"), true),
            (user, Some("z"), true),
            (account, Some("a"), false),
            (zone, Some("a"), true),
            (user, None, false),
            (account, None, true),
            ("", Some("z"), false),
            ("", None, false),
        ] {
            assert_eq!(is_elsewhere(scope, whose), expected, "{scope} seen by {whose:?}");
        }
    }
}
