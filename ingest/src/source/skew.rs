//! How far the clock that wrote a source's lines is ahead of this node's. Pure.
//!
//! A line is written when its request ends, and cannot come before. So of the lines of two minutes the one that took the
//! least time on its way tells best: a shorter way than none is a clock that is ahead. A longer one is a clock that is behind
//! or a way that is long, which nothing tells apart. Lines that may have waited before they were looked at, those of a file
//! whose end has not been reached once, are not to be shown here.

use proto::time::Timestamp;

/// Milliseconds of which the fastest line is remembered, twice.
const WINDOW_MS: i64 = 60_000;
/// Lines without which nothing is said: few may all have been slow.
const LINES_MIN: u64 = 8;

/// The fastest lines of the last one or two minutes.
#[derive(Debug, Default)]
pub(crate) struct Skew {
    /// The minute under way, and the one before.
    windows: [Window; 2],
}

#[derive(Clone, Copy, Debug, Default)]
struct Window {
    number: i64,
    fastest: Fastest,
}

/// The fastest of some lines.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Fastest {
    lines: u64,
    delay_ms: i64,
}

impl Fastest {
    /// Another line.
    pub(crate) fn note(&mut self, written_at: Timestamp, now: Timestamp) {
        let delay_ms = now.as_millis() - written_at.as_millis();
        self.merge(Self { lines: 1, delay_ms });
    }

    fn merge(&mut self, other: Self) {
        if other.lines > 0 {
            self.delay_ms = if self.lines == 0 { other.delay_ms } else { self.delay_ms.min(other.delay_ms) };
            self.lines += other.lines;
        }
    }
}

impl Skew {
    /// Takes lines over that came by `now`.
    pub(crate) fn note(&mut self, lines: Fastest, now: Timestamp) {
        let number = now.as_millis().div_euclid(WINDOW_MS);
        if number != self.windows[0].number {
            self.windows = [Window { number, fastest: Fastest::default() }, self.windows[0]];
        }
        self.windows[0].fastest.merge(lines);
    }

    /// Milliseconds that the writer's clock is ahead; negative when it is behind or lines come late. `None` when too little
    /// has come of late.
    pub(crate) fn ahead_ms(&self, now: Timestamp) -> Option<i64> {
        let number = now.as_millis().div_euclid(WINDOW_MS);
        let mut fastest = Fastest::default();
        for window in self.windows.iter().filter(|window| number - window.number <= 1) {
            fastest.merge(window.fastest);
        }
        (fastest.lines >= LINES_MIN).then_some(-fastest.delay_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: i64) -> Timestamp {
        Timestamp::from_millis(1_000_000_000 + ms)
    }

    /// What is said at the end of lines, each with its arrival and its delay.
    fn ahead(lines: impl IntoIterator<Item = (i64, i64)>, end: i64) -> Option<i64> {
        let mut skew = Skew::default();
        for (arrival, delay) in lines {
            let mut fastest = Fastest::default();
            fastest.note(at(arrival - delay), at(arrival));
            skew.note(fastest, at(arrival));
        }
        skew.ahead_ms(at(end))
    }

    #[test]
    fn the_fastest_line_of_late_tells() {
        let slow_but_one = (0..100).map(|i| (i * 100, if i == 50 { 3 } else { 4000 }));
        assert_eq!(ahead(slow_but_one, 10_000), Some(-3));
        assert_eq!(ahead((0..100).map(|i| (i * 100, -7000 + i)), 10_000), Some(7000));
        assert_eq!(ahead((0..100).map(|i| (i * 100, 9000 + i)), 10_000), Some(-9000));
    }

    #[test]
    fn few_lines_and_old_ones_tell_nothing() {
        assert_eq!(ahead((0..7).map(|i| (i, -7000)), 10), None);
        assert_eq!(ahead((0..8).map(|i| (i, -7000)), 10), Some(7000));
        assert_eq!(ahead((0..8).map(|i| (i, -7000)), 180_000), None);
        // A clock that was set right is believed two minutes later.
        let corrected = (0..300).map(|i| (i * 1000, if i < 60 { -7000 } else { 2 }));
        assert_eq!(ahead(corrected, 300_000), Some(-2));
    }
}
