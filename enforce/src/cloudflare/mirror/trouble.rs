//! What goes wrong at one place, and when it is tried again: twice as long after each failure, with a part of chance, so
//! that hosts and places do not come back together.

use std::time::Duration;

use proto::time::Timestamp;

use super::book::View;
use crate::cloudflare::call::CallError;
use crate::reconcile::chain_of;

/// Failures in a row of which the first ones are nobody's business.
const SAID_FROM: u32 = 3;

/// The state of one place.
#[derive(Debug)]
pub(super) struct Trouble {
    seed: u64,
    failures: u32,
    until: Timestamp,
    text: Option<String>,
    /// Said at once.
    is_lasting: bool,
    /// An operation failed, which only one that does not can mend.
    is_operation: bool,
}

impl Trouble {
    pub(super) fn new(seed: u64) -> Self {
        Self { seed, failures: 0, until: Timestamp::EPOCH, text: None, is_lasting: false, is_operation: false }
    }

    /// Before this nothing is tried.
    pub(super) fn until(&self) -> Timestamp {
        self.until
    }

    /// What is wrong, once it is more than a passing thing.
    pub(super) fn text(&self) -> Option<&str> {
        self.text.as_deref().filter(|_| self.is_lasting || self.failures >= SAID_FROM)
    }

    /// All is well.
    pub(super) fn clear(&mut self) {
        *self = Self::new(self.seed);
    }

    /// All is well, as far as reading tells.
    pub(super) fn clear_unless_operation(&mut self) {
        if !self.is_operation {
            self.clear();
        }
    }

    /// Nothing is wrong, only too early.
    pub(super) fn rest(&mut self, now: Timestamp, pause: Duration) {
        self.until = now.saturating_add(pause);
    }

    /// It failed for a reason that stays until somebody does something.
    pub(super) fn fail(&mut self, text: &str, view: &View<'_>) {
        self.is_lasting = true;
        self.note(text.to_owned(), view);
    }

    /// A change that had begun failed.
    pub(super) fn fail_operation(&mut self, text: &str, view: &View<'_>) {
        self.is_operation = true;
        self.note(text.to_owned(), view);
    }

    /// A call failed.
    pub(super) fn fail_with(&mut self, error: &CallError, view: &View<'_>) {
        self.is_lasting = error.is_about_login() || error.is_gone();
        self.note(chain_of(error), view);
    }

    fn note(&mut self, text: String, view: &View<'_>) {
        self.text = Some(text);
        self.failures = self.failures.saturating_add(1);
        let doubled = view.tempo.backoff_min.saturating_mul(1 << self.failures.saturating_sub(1).min(16));
        let whole = doubled.min(view.tempo.backoff_max);
        self.seed = mix(self.seed ^ view.now.as_nanos().unsigned_abs());
        // From half of it to all of it.
        let share = (self.seed >> 32) as u32;
        let chance = whole.mul_f64(f64::from(share) / f64::from(u32::MAX) / 2.0);
        self.until = view.now.saturating_add(whole / 2 + chance);
    }
}

/// SplitMix64's finalizer.
fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}
