//! What `[enforce.telegram]` and `[enforce.webhooks.NAME]` have in common: which events, and templates.

use std::collections::BTreeSet;

use proto::settings::{Field, Mistakes};

use crate::notify::message::EventKind;
use crate::notify::template::{Escape, Template, Values};

/// Where addresses are looked up unless configured.
const LOOK_UP_URL: &str = "https://ipinfo.io/{target}";

/// Which events are told.
pub(super) fn check_events(
    given: Field<Vec<String>>,
    default: &[EventKind],
    mistakes: &mut Mistakes,
) -> Option<BTreeSet<EventKind>> {
    if matches!(given, Field::Absent) {
        return Some(default.iter().copied().collect());
    }
    let words = given.take("events", mistakes)?;
    let known = EventKind::ALL.map(EventKind::as_str);
    let mut events = BTreeSet::new();
    let mut fine = true;
    for word in &words {
        match EventKind::ALL.into_iter().find(|kind| kind.as_str() == word) {
            Some(kind) => {
                events.insert(kind);
            }
            None => {
                mistakes.add("events", format!("unknown event {word:?}; known are {}", known.join(", ")));
                fine = false;
            }
        }
    }
    if words.is_empty() {
        mistakes.add("events", format!("name at least one of {}", known.join(", ")));
        fine = false;
    }
    fine.then_some(events)
}

/// Where an address is looked up.
pub(super) fn check_look_up(given: Field<String>, mistakes: &mut Mistakes) -> Option<Template> {
    let text = given.or("look_up_url", LOOK_UP_URL.to_owned(), mistakes);
    let template = check_template("look_up_url", &text, &["target"], mistakes)?;
    let example = template.render(&Values::from([("target", "192.0.2.1".to_owned())]), Escape::Plain);
    if !reqwest::Url::parse(&example).is_ok_and(|url| matches!(url.scheme(), "http" | "https")) {
        mistakes.add("look_up_url", "expected an address such as \"https://ipinfo.io/{target}\"");
        return None;
    }
    Some(template)
}

/// A template whose placeholders are among `known`.
pub(super) fn check_template(
    key: &str,
    text: &str,
    known: &[&'static str],
    mistakes: &mut Mistakes,
) -> Option<Template> {
    Template::parse(text, known).map_err(|why| mistakes.add(key, why)).ok()
}
