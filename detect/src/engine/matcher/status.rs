//! Sets of status codes.

use super::error::Fault;
use super::syntax::Argument;

/// A set of statuses 0 (absent) to 999. All higher ones, which no condition can name, are in it or not together: they
/// share the bit 1000, and the bits above it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StatusSet([u64; 16]);

impl StatusSet {
    pub(super) const NONE: Self = Self([0; 16]);
    pub(super) const ALL: Self = Self([u64::MAX; 16]);

    /// The union of `404`, `500-599` and `-` (absent).
    pub(super) fn parse<'a>(arguments: &[Argument<'a>]) -> Result<Self, Fault<'a>> {
        let mut set = Self::NONE;
        for argument in arguments {
            let Some((first, last)) = parse_range(&argument.value) else {
                let got = &argument.value;
                let expected = "expected a status (`404`), an ascending range (`500-599`, 100 to 999) or `-`";
                return Err(Fault::new(argument.raw, format!("{expected}, got `{got}`")));
            };
            (first..=last).for_each(|status| set.insert(status));
        }
        Ok(set)
    }

    fn insert(&mut self, status: u16) {
        let (word, bit) = slot(status);
        self.0[word] |= bit;
    }

    pub(super) fn contains(&self, status: u16) -> bool {
        let (word, bit) = slot(status);
        self.0[word] & bit != 0
    }

    pub(super) fn union(self, other: Self) -> Self {
        Self(std::array::from_fn(|word| self.0[word] | other.0[word]))
    }

    pub(super) fn intersection(self, other: Self) -> Self {
        Self(std::array::from_fn(|word| self.0[word] & other.0[word]))
    }

    pub(super) fn complement(self) -> Self {
        Self(self.0.map(|word| !word))
    }
}

fn slot(status: u16) -> (usize, u64) {
    let bit = status.min(1000);
    (usize::from(bit / 64), 1 << (bit % 64))
}

fn parse_range(text: &str) -> Option<(u16, u16)> {
    if text == proto::event::ABSENT {
        return Some((0, 0));
    }
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (parse_status(first)?, parse_status(last)?);
    (first <= last).then_some((first, last))
}

fn parse_status(text: &str) -> Option<u16> {
    let digits = text.len() == 3 && text.bytes().all(|b| b.is_ascii_digit()) && !text.starts_with('0');
    if digits { text.parse().ok() } else { None }
}
