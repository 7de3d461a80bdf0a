//! Time as a value. [`Clock`] is the one place where a clock is read; everything else is handed a [`Timestamp`].

use std::borrow::Cow;
use std::fmt;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Nanoseconds since the Unix epoch, UTC, without leap seconds. Years 1970 to 2262.
///
/// Serialized as RFC 3339 with milliseconds (`2026-01-08T14:19:15.980Z`), parsed with any fraction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Timestamp(i64);

impl Timestamp {
    /// 1970-01-01T00:00:00Z.
    pub const EPOCH: Self = Self(0);
    /// The end of representable time: "never".
    pub const MAX: Self = Self(i64::MAX);

    /// From nanoseconds since the epoch.
    pub const fn from_nanos(nanos: i64) -> Self {
        Self(nanos)
    }

    /// From milliseconds since the epoch, saturating.
    pub const fn from_millis(millis: i64) -> Self {
        Self(millis.saturating_mul(1_000_000))
    }

    /// From whole seconds since the epoch, saturating.
    pub const fn from_secs(secs: i64) -> Self {
        Self(secs.saturating_mul(1_000_000_000))
    }

    /// Nanoseconds since the epoch.
    pub const fn as_nanos(self) -> i64 {
        self.0
    }

    /// Whole milliseconds since the epoch, rounded down.
    pub const fn as_millis(self) -> i64 {
        self.0.div_euclid(1_000_000)
    }

    /// This moment plus `duration`, saturating at [`Timestamp::MAX`].
    #[must_use]
    pub fn saturating_add(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(duration_nanos(duration)))
    }

    /// This moment minus `duration`, saturating.
    #[must_use]
    pub fn saturating_sub(self, duration: Duration) -> Self {
        Self(self.0.saturating_sub(duration_nanos(duration)))
    }

    /// How long after `earlier` this moment is; zero when it is not after it.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }

    fn system(self) -> SystemTime {
        UNIX_EPOCH + Duration::from_nanos(u64::try_from(self.0).unwrap_or(0))
    }

    /// Parses RFC 3339 in UTC (suffix `Z`), as [`fmt::Display`] writes it.
    pub fn parse(text: &str) -> Option<Self> {
        let time = humantime::parse_rfc3339(text).ok()?;
        let since = time.duration_since(UNIX_EPOCH).ok()?;
        i64::try_from(since.as_nanos()).ok().map(Self)
    }
}

fn duration_nanos(duration: Duration) -> i64 {
    i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Whole milliseconds, rounded down, so that equal values print equally.
        let millis = Self::from_millis(self.as_millis().max(0));
        write!(f, "{}", humantime::format_rfc3339_millis(millis.system()))
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<'de, str>::deserialize(deserializer)?;
        Self::parse(&text).ok_or_else(|| serde::de::Error::custom("expected an RFC 3339 time in UTC"))
    }
}

impl JsonSchema for Timestamp {
    fn schema_name() -> Cow<'static, str> {
        "Timestamp".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "A moment in UTC: RFC 3339 with milliseconds.",
            "type": "string",
            "format": "date-time",
            "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\\.[0-9]{3}Z$",
            "examples": ["2026-01-08T14:19:15.980Z"],
        })
    }
}

/// Parses a duration as users write it: `10m`, `1h 30m`, `7d`. A bare number is refused, as its unit is a guess.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|_| format!("expected a duration such as \"10m\", got {text:?}"))
}

/// Writes a duration as users read it: `10m`, `1h 30m`; below a second in milliseconds.
pub fn render_duration(duration: Duration) -> String {
    let rounded = if duration.as_secs() > 0 {
        Duration::from_secs(duration.as_secs())
    } else {
        Duration::from_millis(u64::from(duration.subsec_millis()))
    };
    humantime::format_duration(rounded).to_string()
}

/// The only source of "now". Cheap to clone; a manual clock is shared between its clones.
#[derive(Clone, Debug)]
pub struct Clock(Source);

#[derive(Clone, Debug)]
enum Source {
    System,
    /// The machine's clock until another is known, then a clock of our own, which follows that one.
    Steered(Arc<Steered>),
    Manual(Arc<AtomicI64>),
}

/// Time since a moment, by a clock that no one sets, and by how much another is ahead of that.
#[derive(Debug)]
struct Steered {
    start: Timestamp,
    since: Instant,
    /// Nanoseconds; [`UNKNOWN`] until the first measurement.
    offset: AtomicI64,
}

/// No measurement yet.
const UNKNOWN: i64 = i64::MIN;

/// A steered clock leaves smaller differences alone: they are what a measurement over a network is uncertain by.
const STEER_MIN: Duration = Duration::from_millis(20);

impl Clock {
    /// The machine's wall clock.
    pub fn system() -> Self {
        Self(Source::System)
    }

    /// A clock that stands still until [`Clock::set`] moves it.
    pub fn manual(start: Timestamp) -> Self {
        Self(Source::Manual(Arc::new(AtomicI64::new(start.0))))
    }

    /// The machine's wall clock until [`Clock::steer`] tells another: the time of a whole cluster. From then on nobody who
    /// sets the machine's clock moves it.
    pub fn steered() -> Self {
        Self(Source::Steered(Arc::new(Steered::new())))
    }

    /// Takes the time of another clock, which showed `other` when [`Clock::raw`] was `raw`. Other clocks stay as they are.
    pub fn steer(&self, raw: Timestamp, other: Timestamp) {
        if let Source::Steered(steered) = &self.0 {
            let fresh = other.0.saturating_sub(raw.0);
            let known = steered.offset.load(Ordering::Relaxed);
            if known == UNKNOWN || fresh.abs_diff(known) >= STEER_MIN.as_nanos() as u64 {
                steered.offset.store(fresh, Ordering::Relaxed);
            }
        }
    }

    /// By how much the machine's clock is ahead of the one it is steered by, in milliseconds; `None` until that is known.
    pub fn skew_ms(&self) -> Option<i64> {
        match &self.0 {
            Source::Steered(steered) => {
                let is_known = steered.offset.load(Ordering::Relaxed) != UNKNOWN;
                is_known.then(|| system_now().0.saturating_sub(self.now().0) / 1_000_000)
            }
            Source::System | Source::Manual(_) => None,
        }
    }

    /// A moment that is only good for the time between two of them: neither steering nor setting the clock moves it.
    pub fn raw(&self) -> Timestamp {
        match &self.0 {
            Source::Steered(steered) => steered.raw(),
            Source::System => since_first_look(),
            Source::Manual(_) => self.now(),
        }
    }

    /// The present moment.
    pub fn now(&self) -> Timestamp {
        match &self.0 {
            Source::System => system_now(),
            Source::Steered(steered) => match steered.offset.load(Ordering::Relaxed) {
                UNKNOWN => system_now(),
                offset => Timestamp(steered.raw().0.saturating_add(offset)),
            },
            Source::Manual(nanos) => Timestamp(nanos.load(Ordering::Relaxed)),
        }
    }

    /// Moves a manual clock; a system clock stays as it is.
    pub fn set(&self, now: Timestamp) {
        if let Source::Manual(nanos) = &self.0 {
            nanos.store(now.0, Ordering::Relaxed);
        }
    }
}

impl Steered {
    #[expect(clippy::disallowed_methods, reason = "the one place that reads the clock")]
    fn new() -> Self {
        Self { start: system_now(), since: Instant::now(), offset: AtomicI64::new(UNKNOWN) }
    }

    fn raw(&self) -> Timestamp {
        self.start.saturating_add(self.since.elapsed())
    }
}

/// The machine's time when it was first asked for, and what has passed since.
fn since_first_look() -> Timestamp {
    static FIRST: OnceLock<Steered> = OnceLock::new();
    FIRST.get_or_init(Steered::new).raw()
}

#[expect(clippy::disallowed_methods, reason = "the one place that reads the clock")]
fn system_now() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp(duration_nanos(since))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn milliseconds_are_rounded_down_and_round_trip() {
        let time = Timestamp::from_nanos(1_767_881_955_980_999_999);
        assert_eq!(time.to_string(), "2026-01-08T14:19:15.980Z");
        assert_eq!(Timestamp::parse("2026-01-08T14:19:15.980Z"), Some(Timestamp::from_millis(time.as_millis())));
    }

    #[test]
    fn durations_read_and_write_as_users_do() {
        assert_eq!(parse_duration("1h 30m").unwrap(), Duration::from_secs(5400));
        assert_eq!(render_duration(Duration::from_secs(5400)), "1h 30m");
        assert!(parse_duration("10").unwrap_err().contains("10m"));
    }

    #[test]
    fn a_steered_clock_follows_the_other_however_often_it_is_told() {
        let clock = Clock::steered();
        assert_eq!(clock.skew_ms(), None);
        let raw = clock.raw();
        let hour = Duration::from_secs(3600);
        // As often as there are roles in a process: each measures the same.
        for _ in 0..3 {
            clock.steer(raw, raw.saturating_add(hour));
        }
        let ahead = clock.now().since(raw);
        assert!(ahead >= hour && ahead < hour + Duration::from_secs(60), "{ahead:?}");
        let skew = clock.skew_ms().unwrap();
        assert!((-3_600_100..=-3_599_900).contains(&skew), "{skew}");
        let former = clock.now();
        clock.steer(raw, raw.saturating_add(hour + Duration::from_millis(3)));
        assert!(clock.now().since(former) < Duration::from_secs(60), "within the error of a measurement");
        clock.steer(raw, raw.saturating_sub(hour));
        assert!(clock.now() < raw);
    }

    #[test]
    fn arithmetic_saturates() {
        assert_eq!(Timestamp::MAX.saturating_add(Duration::from_secs(1)), Timestamp::MAX);
        assert_eq!(Timestamp::EPOCH.since(Timestamp::from_secs(5)), Duration::ZERO);
    }
}
