//! What the rules in force can possibly match: what ingest need not copy or send.

use serde::{Deserialize, Serialize};

/// Bits of a [`StatusSet`]: every status that a log line can have (0 = absent, to 999).
const STATUSES: u16 = 1000;

/// What the rules in force look at, so that ingest copies and sends nothing that nobody reads.
///
/// In the bus it is stored as JSON. Fields are only ever added, and unknown ones are ignored.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Interest {
    /// Which version this is, see [`AccessBatch::filter`](super::AccessBatch::filter); 0 = nothing is filtered.
    pub version: u64,
    /// Names of request headers, lower case, sorted.
    pub headers: Vec<String>,
    /// Statuses that some rule can match; `None` = every line, whatever its status.
    pub statuses: Option<StatusSet>,
}

impl Interest {
    /// Whether a rule could match an event of this status.
    pub fn may_match(&self, status: u16) -> bool {
        self.statuses.as_ref().is_none_or(|statuses| statuses.contains(status))
    }
}

/// A set of statuses; 0 stands for an absent one. What is not a status (1000 and more) is in every set, so that nothing is
/// withheld that nobody understands.
///
/// Serialized as ascending ranges: `[[401, 405], [500, 500]]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<(u16, u16)>", into = "Vec<(u16, u16)>")]
pub struct StatusSet([u64; 16]);

impl StatusSet {
    /// The union of `ranges`, both ends included. A range that ends before it begins is empty.
    pub fn new(ranges: impl IntoIterator<Item = (u16, u16)>) -> Self {
        let mut set = Self::default();
        for status in ranges.into_iter().flat_map(|(first, last)| first..=last.min(STATUSES - 1)) {
            set.0[usize::from(status / 64)] |= 1 << (status % 64);
        }
        set
    }

    /// Whether `status` is in the set.
    pub fn contains(&self, status: u16) -> bool {
        status >= STATUSES || self.0[usize::from(status / 64)] & (1 << (status % 64)) != 0
    }

    /// The fewest ranges that make up the set, ascending, both ends included.
    pub fn ranges(&self) -> Vec<(u16, u16)> {
        let mut ranges: Vec<(u16, u16)> = Vec::new();
        for status in (0..STATUSES).filter(|status| self.contains(*status)) {
            match ranges.last_mut() {
                Some((_, last)) if *last + 1 == status => *last = status,
                _ => ranges.push((status, status)),
            }
        }
        ranges
    }
}

impl From<Vec<(u16, u16)>> for StatusSet {
    fn from(ranges: Vec<(u16, u16)>) -> Self {
        Self::new(ranges)
    }
}

impl From<StatusSet> for Vec<(u16, u16)> {
    fn from(set: StatusSet) -> Self {
        set.ranges()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_contains_what_its_ranges_do() {
        let set = StatusSet::new([(404, 404), (401, 403), (999, 65_535), (7, 3)]);
        let inside: Vec<u16> = (0..STATUSES).filter(|status| set.contains(*status)).collect();
        assert_eq!(inside, [401, 402, 403, 404, 999]);
        assert_eq!(set.ranges(), [(401, 404), (999, 999)]);
        assert!(set.contains(1000) && set.contains(u16::MAX));
    }

    #[test]
    fn without_statuses_every_line_may_match() {
        assert!(Interest::default().may_match(200));
        let none = Interest { statuses: Some(StatusSet::default()), ..Interest::default() };
        assert!(!none.may_match(200) && !none.may_match(0));
    }

    #[test]
    fn what_is_stored_is_read_again_also_with_fields_of_the_future() {
        let statuses = Some(StatusSet::new([(401, 405), (500, 500)]));
        let interest = Interest { version: 7, headers: vec!["referer".to_owned()], statuses };
        let text = r#"{"version":7,"headers":["referer"],"statuses":[[401,405],[500,500]]}"#;
        assert_eq!(serde_json::to_string(&interest).unwrap(), text);
        let newer = text.replace("{\"version\"", "{\"paths\":[\"/x\"],\"version\"");
        assert_eq!(serde_json::from_str::<Interest>(&newer).unwrap(), interest);
        assert_eq!(serde_json::from_str::<Interest>("{}").unwrap(), Interest::default());
    }
}
