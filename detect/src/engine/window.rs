//! Exact windows: does the newest event complete `max_retry` events whose span is at most `find_time`?
//!
//! Events may come in any order. A window keeps each event that could still complete a ban with one that is yet to come,
//! and no other, so its size is bounded by the rule and by how late events may be.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use proto::time::Timestamp;

/// Paths, hosts and user agents remembered for one window, newest first to stay.
const SAMPLES_MAX: usize = 5;
/// Characters kept of one sampled text.
const SAMPLE_CHARS_MAX: usize = 200;

/// One counted event: what the evidence of a ban is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Event time in nanoseconds since the epoch.
    pub time: Timestamp,
    /// Hash of the distinct value; 0 for rules without `distinct`.
    pub value: u64,
    /// Status sent to the client.
    pub status: u16,
    /// Index of the node in the engine's list.
    pub node: u16,
    /// Whether a proxy delivered it.
    pub via_proxy: bool,
    /// Whether it is new, not read again after a restart.
    pub fresh: bool,
}

/// Hash of a distinct value. The key is fixed, so that a replay repeats itself; the chance that two honest values collide
/// is 2^-64, and a client that looks for collisions only makes itself count less for those very paths.
pub fn value_hash(value: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// The events of one client that count for one rule, oldest first.
#[derive(Clone, Debug)]
pub struct Window {
    marks: Marks,
    samples: Option<Box<Samples>>,
}

/// Most clients never get past one event, which needs no heap.
#[derive(Clone, Debug)]
enum Marks {
    One(Mark),
    Many(Vec<Mark>),
}

/// Texts of the newest events, for people who read the ban.
#[derive(Clone, Debug, Default)]
struct Samples(Vec<Sample>);

#[derive(Clone, Debug)]
struct Sample {
    time: Timestamp,
    path: Box<str>,
    host: Box<str>,
    user_agent: Box<str>,
}

/// What a complete window consists of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Complete {
    /// The consumed marks, oldest first. Never empty.
    pub marks: Vec<Mark>,
    /// Sampled paths, without repetition, oldest first.
    pub paths: Vec<String>,
    /// Sampled hosts.
    pub hosts: Vec<String>,
    /// Sampled user agents.
    pub user_agents: Vec<String>,
    /// Events newer than all of these; those after the end of the ban still count.
    pub rest: Vec<Mark>,
}

impl Complete {
    /// Consumed events by status.
    pub fn statuses(&self) -> BTreeMap<u16, u32> {
        self.marks.iter().fold(BTreeMap::new(), |mut counts, mark| {
            *counts.entry(mark.status).or_default() += 1;
            counts
        })
    }
}

/// The rule's part in a decision.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    /// Number of events (of different values, if `distinct`).
    pub max_retry: u32,
    /// Greatest span in nanoseconds, inclusive.
    pub find_nanos: i64,
    /// Whether only different values count.
    pub distinct: bool,
}

impl Window {
    /// A window with its first event.
    pub fn new(mark: Mark) -> Self {
        Self { marks: Marks::One(mark), samples: None }
    }

    /// A window of events that another has left over, oldest first; `None` when there are none.
    pub fn of_rest(marks: Vec<Mark>) -> Option<Self> {
        (!marks.is_empty()).then_some(Self { marks: Marks::Many(marks), samples: None })
    }

    /// Its events from `end` on; `None` when there are none.
    pub fn since(&self, end: Timestamp) -> Option<Self> {
        let held = self.as_slice();
        Self::of_rest(held[held.partition_point(|mark| mark.time < end)..].to_vec())
    }

    /// Number of events held.
    pub fn len(&self) -> usize {
        self.as_slice().len()
    }

    /// Whether the texts of its events are kept.
    pub fn has_samples(&self) -> bool {
        self.samples.is_some()
    }

    fn as_slice(&self) -> &[Mark] {
        match &self.marks {
            Marks::One(mark) => std::slice::from_ref(mark),
            Marks::Many(marks) => marks,
        }
    }

    /// Adds an event after forgetting those before `oldest`, which nothing yet to come can join.
    pub fn insert(&mut self, mark: Mark, oldest: Timestamp, span: &Span) {
        let marks = match &mut self.marks {
            Marks::Many(marks) => marks,
            Marks::One(first) => {
                let first = *first;
                self.marks = Marks::Many(Vec::with_capacity(4));
                let Marks::Many(marks) = &mut self.marks else { return };
                marks.push(first);
                marks
            }
        };
        let stale = marks.partition_point(|held| held.time < oldest);
        marks.drain(..stale);
        let at = marks.partition_point(|held| held.time <= mark.time);
        marks.insert(at, mark);
        if span.distinct {
            drop_redundant(marks, mark.value, span.find_nanos);
        }
    }

    /// Remembers the texts of an event.
    pub fn sample(&mut self, time: Timestamp, path: &str, host: &str, user_agent: &str) {
        let samples = self.samples.get_or_insert_with(Box::default);
        if samples.0.len() == SAMPLES_MAX {
            samples.0.remove(0);
        }
        let cut = |text: &str| text.chars().take(SAMPLE_CHARS_MAX).collect::<String>().into_boxed_str();
        samples.0.push(Sample { time, path: cut(path), host: cut(host), user_agent: cut(user_agent) });
    }

    /// The newest complete run of events, if the event at `time` with `value` makes one.
    pub fn complete(&self, newest: &Mark, span: &Span) -> Option<Complete> {
        let marks = self.as_slice();
        let needed = span.max_retry as usize;
        let low = marks.partition_point(|held| held.time < before(newest.time, span));
        let high = marks.partition_point(|held| held.time <= after(newest.time, span));
        let near = marks.get(low..high).filter(|near| near.len() >= needed)?;
        let at = near.partition_point(|held| held.time <= newest.time);
        let run = if span.distinct {
            newest_distinct_run(near, at.saturating_sub(1), span)?
        } else {
            newest_run(near, at.saturating_sub(1), span)?
        };
        Some(self.evidence(run))
    }

    /// How many events count at `now`, and the first and last of them.
    pub fn progress(&self, now: Timestamp, span: &Span) -> (u32, Option<(Timestamp, Timestamp)>) {
        let marks = self.as_slice();
        let low = marks.partition_point(|held| held.time < before(now, span));
        let near = &marks[low..];
        let counted = if span.distinct {
            let mut values: Vec<u64> = near.iter().map(|mark| mark.value).collect();
            values.sort_unstable();
            values.dedup();
            values.len()
        } else {
            near.len()
        };
        let ends = near.first().zip(near.last()).map(|(first, last)| (first.time, last.time));
        (u32::try_from(counted).unwrap_or(u32::MAX), ends)
    }

    fn evidence(&self, marks: Vec<Mark>) -> Complete {
        let mut complete = Complete { marks, ..Complete::default() };
        let (Some(first), Some(last)) = (complete.marks.first(), complete.marks.last()) else { return complete };
        let (first, last) = (first.time, last.time);
        let held = self.as_slice();
        complete.rest = held[held.partition_point(|mark| mark.time <= last)..].to_vec();
        let samples = self.samples.iter().flat_map(|samples| &samples.0);
        for sample in samples.filter(|sample| (first..=last).contains(&sample.time)) {
            push_new(&mut complete.paths, &sample.path);
            push_new(&mut complete.hosts, &sample.host);
            push_new(&mut complete.user_agents, &sample.user_agent);
        }
        complete
    }
}

/// `find_time` before and after a moment. Times come from logs, so nothing here may overflow.
fn before(time: Timestamp, span: &Span) -> Timestamp {
    Timestamp::from_nanos(time.as_nanos().saturating_sub(span.find_nanos))
}

fn after(time: Timestamp, span: &Span) -> Timestamp {
    Timestamp::from_nanos(time.as_nanos().saturating_add(span.find_nanos))
}

fn push_new(list: &mut Vec<String>, text: &str) {
    if text != proto::event::ABSENT && !list.iter().any(|known| known == text) {
        list.push(text.to_owned());
    }
}

/// The latest `max_retry` consecutive marks that contain `at` and span at most `find_nanos`.
fn newest_run(near: &[Mark], at: usize, span: &Span) -> Option<Vec<Mark>> {
    let needed = span.max_retry as usize;
    let latest = at.min(near.len().checked_sub(needed)?);
    let earliest = (at + 1).saturating_sub(needed);
    (earliest..=latest)
        .rev()
        .map(|start| &near[start..start + needed])
        .find(|run| spans_at_most(run, span.find_nanos))
        .map(<[Mark]>::to_vec)
}

/// The latest stretch that contains `at`, spans at most `find_nanos` and holds `max_retry` different values; of each
/// value the newest mark.
fn newest_distinct_run(near: &[Mark], at: usize, span: &Span) -> Option<Vec<Mark>> {
    for end in (at..near.len()).rev() {
        let start = near.partition_point(|held| held.time < before(near[end].time, span));
        if start > at {
            continue;
        }
        let mut newest_of_value = BTreeMap::new();
        for mark in &near[start..=end] {
            newest_of_value.insert(mark.value, *mark);
        }
        if newest_of_value.len() >= span.max_retry as usize {
            let mut run: Vec<Mark> = newest_of_value.into_values().collect();
            run.sort_by_key(|mark| (mark.time, mark.value));
            return Some(run);
        }
    }
    None
}

fn spans_at_most(run: &[Mark], nanos: i64) -> bool {
    match (run.first(), run.last()) {
        (Some(first), Some(last)) => last.time.as_nanos().saturating_sub(first.time.as_nanos()) <= nanos,
        _ => false,
    }
}

/// Of three events of one value within `find_nanos`, every window that holds the middle one holds another of them, so
/// the middle one can go. This keeps a client that repeats itself from growing its window.
fn drop_redundant(marks: &mut Vec<Mark>, value: u64, find_nanos: i64) {
    let same: Vec<usize> = (0..marks.len()).filter(|&i| marks[i].value == value).collect();
    let mut kept: Vec<usize> = Vec::with_capacity(same.len());
    let mut redundant = Vec::new();
    for (n, &i) in same.iter().enumerate() {
        let before = kept.last();
        let after = same.get(n + 1);
        if let (Some(&before), Some(&after)) = (before, after)
            && marks[after].time.as_nanos().saturating_sub(marks[before].time.as_nanos()) <= find_nanos
        {
            redundant.push(i);
        } else {
            kept.push(i);
        }
    }
    for i in redundant.into_iter().rev() {
        marks.remove(i);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn mark(seconds: i64, value: u64) -> Mark {
        Mark { time: Timestamp::from_secs(seconds), value, status: 404, node: 0, via_proxy: false, fresh: true }
    }

    fn span(max_retry: u32, seconds: i64, distinct: bool) -> Span {
        Span { max_retry, find_nanos: seconds * 1_000_000_000, distinct }
    }

    /// Feeds events in order; the index of the first that completes a window.
    fn first_complete(events: &[(i64, u64)], span: &Span) -> Option<(usize, Complete)> {
        let mut window: Option<Window> = None;
        for (i, &(time, value)) in events.iter().enumerate() {
            let mark = mark(time, value);
            match &mut window {
                None => window = Some(Window::new(mark)),
                Some(window) => window.insert(mark, Timestamp::EPOCH, span),
            }
            if let Some(complete) = window.as_ref().and_then(|window| window.complete(&mark, span)) {
                return Some((i, complete));
            }
        }
        None
    }

    #[test]
    fn the_span_is_inclusive() {
        let span = span(3, 60, false);
        assert_eq!(first_complete(&[(0, 0), (30, 0), (60, 0)], &span).unwrap().0, 2);
        assert!(first_complete(&[(0, 0), (30, 0), (61, 0)], &span).is_none());
    }

    #[test]
    fn a_single_event_can_be_enough() {
        assert_eq!(first_complete(&[(5, 0)], &span(1, 60, false)).unwrap().1.marks, [mark(5, 0)]);
    }

    #[test]
    fn samples_outside_the_run_are_no_evidence() {
        let span = span(2, 60, false);
        let mut window = Window::new(mark(0, 0));
        window.sample(Timestamp::from_secs(0), "/old", "h", "-");
        for seconds in [100, 130] {
            window.insert(mark(seconds, 0), Timestamp::EPOCH, &span);
            window.sample(Timestamp::from_secs(seconds), &format!("/{seconds}"), "h", "-");
        }
        let complete = window.complete(&mark(130, 0), &span).unwrap();
        assert_eq!(
            (complete.paths, complete.hosts),
            (vec!["/100".to_owned(), "/130".to_owned()], vec!["h".to_owned()])
        );
        assert!(complete.user_agents.is_empty());
    }

    /// Whether any stretch of at most `find` seconds holds `max_retry` events (or values).
    fn model(events: &[(i64, u64)], span: &Span) -> bool {
        events.iter().any(|&(start, _)| {
            let inside =
                events.iter().filter(|&&(time, _)| time >= start && (time - start) * 1_000_000_000 <= span.find_nanos);
            let mut values: Vec<u64> = inside.map(|&(_, value)| value).collect();
            if span.distinct {
                values.sort_unstable();
                values.dedup();
            }
            values.len() >= span.max_retry as usize
        })
    }

    proptest! {
        #[test]
        fn a_window_completes_exactly_when_the_model_says(
            events in prop::collection::vec((0i64..300, 0u64..6), 1..60),
            max_retry in 1u32..8, find in 0i64..90, distinct: bool,
        ) {
            let span = span(max_retry, find, distinct);
            let found = first_complete(&events, &span);
            let expected = (0..events.len()).find(|&i| model(&events[..=i], &span));
            prop_assert_eq!(found.as_ref().map(|(i, _)| *i), expected);
            if let Some((i, complete)) = found {
                let needed = if distinct { complete.marks.len() >= max_retry as usize } else { complete.marks.len() == max_retry as usize };
                prop_assert!(needed);
                prop_assert!(spans_at_most(&complete.marks, span.find_nanos));
                prop_assert!(complete.marks.iter().any(|mark| mark.time == Timestamp::from_secs(events[i].0)));
            }
        }

        #[test]
        fn one_repeated_value_does_not_grow_a_window(times in prop::collection::vec(0i64..100, 1..200)) {
            let span = span(5, 60, true);
            let mut window = Window::new(mark(times[0], 7));
            for &time in &times[1..] {
                window.insert(mark(time, 7), Timestamp::EPOCH, &span);
            }
            prop_assert!(window.len() <= 4);
        }
    }
}
