//! Traefik's JSON access log, by key and in any order, with serde_json.
//!
//! Values are borrowed from the line unless they hold escapes. Unknown keys are skipped without being read. Of the
//! headers only those that somebody asked for are kept. A JSON object without any access field (Traefik's own log) is
//! refused.

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

use proto::time::Timestamp;
use serde::de::{Deserialize, DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::time::parse_rfc3339;
use super::{Entry, HeaderList, Refusal};

/// How Traefik marks a value that the user wants hidden.
const REDACTED: &str = "REDACTED";
/// Least number that is taken for nanoseconds since 1970, in 1973: a present time in seconds, milliseconds or microseconds is
/// less.
const NANOS_MIN: i64 = 100_000_000_000_000_000;
/// Largest status that is taken for one.
const STATUS_MAX: u64 = 999;

/// Parses one line. `wanted` are the lower-case names of request headers to keep.
pub(crate) fn parse<'a>(line: &'a [u8], wanted: &[String], headers: HeaderList<'a>) -> Result<Entry<'a>, Refusal> {
    let mut deserializer = serde_json::Deserializer::from_slice(line);
    let entry = EntrySeed { wanted, headers }.deserialize(&mut deserializer).map_err(|_| Refusal::NotJson)?;
    deserializer.end().map_err(|_| Refusal::NotJson)?;
    if entry.is_access() { Ok(entry) } else { Err(Refusal::NotAccess) }
}

/// Whether Traefik writes `key` in access entries and nobody else would. The names of the rest are of
/// wider use.
pub(crate) fn is_own_key(key: &str) -> bool {
    Key::known(key).is_some_and(|key| !matches!(key, Key::Time | Key::Duration | Key::EntryPointName))
        || key.starts_with("request_")
}

impl Entry<'_> {
    fn is_access(&self) -> bool {
        self.status != 0
            || self.method.is_some()
            || self.path.is_some()
            || self.client_addr.is_some()
            || self.client_host.is_some()
    }
}

enum Key<'a> {
    ClientAddr,
    ClientHost,
    ClientUsername,
    DownstreamStatus,
    OriginStatus,
    RequestMethod,
    RequestPath,
    RequestHost,
    RequestAddr,
    RequestProtocol,
    RouterName,
    ServiceName,
    EntryPointName,
    StartUtc,
    StartLocal,
    Time,
    Duration,
    UserAgent,
    ForwardedFor,
    Header(Cow<'a, str>),
    Other,
}

impl Key<'_> {
    fn known(name: &str) -> Option<Self> {
        Some(match name {
            "ClientAddr" => Self::ClientAddr,
            "ClientHost" => Self::ClientHost,
            "ClientUsername" => Self::ClientUsername,
            "DownstreamStatus" => Self::DownstreamStatus,
            "OriginStatus" => Self::OriginStatus,
            "RequestMethod" => Self::RequestMethod,
            "RequestPath" => Self::RequestPath,
            "RequestHost" => Self::RequestHost,
            "RequestAddr" => Self::RequestAddr,
            "RequestProtocol" => Self::RequestProtocol,
            "RouterName" => Self::RouterName,
            "ServiceName" => Self::ServiceName,
            "entryPointName" => Self::EntryPointName,
            "StartUTC" => Self::StartUtc,
            "StartLocal" => Self::StartLocal,
            "time" => Self::Time,
            "Duration" => Self::Duration,
            _ => return None,
        })
    }
}

struct KeySeed<'w>(&'w [String]);

impl KeySeed<'_> {
    /// The name of the header, if `key` is a request header that somebody looks at.
    fn header<'k>(&self, key: &'k str) -> Option<&'k str> {
        let name = key.strip_prefix("request_")?;
        self.0.iter().any(|wanted| wanted.eq_ignore_ascii_case(name)).then_some(name)
    }

    fn special<'a>(key: &str) -> Key<'a> {
        match key {
            "request_User-Agent" => Key::UserAgent,
            "request_X-Forwarded-For" => Key::ForwardedFor,
            _ => Key::Other,
        }
    }
}

impl<'de> DeserializeSeed<'de> for KeySeed<'_> {
    type Value = Key<'de>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Key<'de>, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<'de> Visitor<'de> for KeySeed<'_> {
    type Value = Key<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_borrowed_str<E>(self, key: &'de str) -> Result<Key<'de>, E> {
        let header = || self.header(key).map(|name| Key::Header(Cow::Borrowed(name)));
        Ok(Key::known(key).or_else(header).unwrap_or_else(|| Self::special(key)))
    }

    fn visit_str<E>(self, key: &str) -> Result<Key<'de>, E> {
        let header = || self.header(key).map(|name| Key::Header(Cow::Owned(name.to_owned())));
        Ok(Key::known(key).or_else(header).unwrap_or_else(|| Self::special(key)))
    }
}

struct EntrySeed<'w, 'a> {
    wanted: &'w [String],
    headers: HeaderList<'a>,
}

impl<'de> DeserializeSeed<'de> for EntrySeed<'_, 'de> {
    type Value = Entry<'de>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Entry<'de>, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for EntrySeed<'_, 'de> {
    type Value = Entry<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an access entry")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entry<'de>, A::Error> {
        let mut entry = Entry { headers: self.headers, ..Entry::default() };
        let mut request_addr = None;
        let (mut start_utc, mut start_local, mut time) = (None, None, None);
        while let Some(key) = map.next_key_seed(KeySeed(self.wanted))? {
            match key {
                Key::ClientAddr => entry.client_addr = text(&mut map)?,
                Key::ClientHost => entry.client_host = text(&mut map)?,
                Key::ClientUsername => entry.username = text(&mut map)?,
                Key::DownstreamStatus => entry.status = map.next_value::<Status>()?.0,
                Key::OriginStatus => entry.origin_status = map.next_value::<Status>()?.0,
                Key::RequestMethod => entry.method = text(&mut map)?,
                Key::RequestPath => entry.path = text(&mut map)?,
                Key::RequestHost => entry.host = text(&mut map)?,
                Key::RequestAddr => request_addr = text(&mut map)?,
                Key::RequestProtocol => entry.protocol = text(&mut map)?,
                Key::RouterName => entry.router = text(&mut map)?,
                Key::ServiceName => entry.service = text(&mut map)?,
                Key::EntryPointName => entry.entry_point = text(&mut map)?,
                Key::StartUtc => start_utc = map.next_value::<TimeValue<'de>>()?.0,
                Key::StartLocal => start_local = map.next_value::<TimeValue<'de>>()?.0,
                Key::Time => time = map.next_value::<TimeValue<'de>>()?.0,
                Key::Duration => entry.duration = Duration::from_nanos(map.next_value::<Nanos>()?.0),
                Key::UserAgent => entry.user_agent = text(&mut map)?,
                Key::ForwardedFor => entry.forwarded_for = text(&mut map)?,
                Key::Header(name) => {
                    if let Some(value) = text(&mut map)? {
                        entry.push_header(name, value);
                    }
                }
                Key::Other => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        entry.host = entry.host.or(request_addr);
        // The first that is a moment: none is guessed from a time without an offset.
        let times = [start_utc, start_local, time];
        entry.time = times.iter().flatten().find_map(Written::moment);
        Ok(entry)
    }
}

impl<'a> Entry<'a> {
    /// Keeps a header, and the two that have a field of their own in it too.
    fn push_header(&mut self, name: Cow<'a, str>, value: Cow<'a, str>) {
        if name.eq_ignore_ascii_case("User-Agent") {
            self.user_agent = Some(value.clone());
        } else if name.eq_ignore_ascii_case("X-Forwarded-For") {
            self.forwarded_for = Some(value.clone());
        }
        self.headers.push((name, value));
    }
}

fn text<'de, A: MapAccess<'de>>(map: &mut A) -> Result<Option<Cow<'de, str>>, A::Error> {
    map.next_value::<TextValue<'de>>().map(|value| value.0)
}

/// A string that says something; `None` for `-`, nothing, `REDACTED` and anything that is no string.
struct TextValue<'a>(Option<Cow<'a, str>>);

fn is_absent(text: &str) -> bool {
    matches!(text, "" | proto::event::ABSENT | REDACTED)
}

/// A status as a number or as text; 0 for anything else.
struct Status(u16);

impl Status {
    fn new(number: u64) -> Self {
        Self(if number <= STATUS_MAX { number as u16 } else { 0 })
    }
}

/// A time, read only when no better one is there.
enum Written<'a> {
    Text(Cow<'a, str>),
    /// Nanoseconds since 1970, as Traefik has them in attributes of OTLP.
    Nanos(i64),
}

impl Written<'_> {
    fn moment(&self) -> Option<Timestamp> {
        match self {
            Self::Text(text) => parse_rfc3339(text),
            Self::Nanos(nanos) => Some(Timestamp::from_nanos(*nanos)),
        }
    }
}

/// A time as text or in nanoseconds; `None` for anything else.
struct TimeValue<'a>(Option<Written<'a>>);

/// A number of nanoseconds; 0 for anything else.
struct Nanos(u64);

/// The parts of a visitor that accept and forget whatever a value must not be.
macro_rules! tolerate {
    ($absent:expr) => {
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("any value")
        }
        fn visit_bool<E>(self, _: bool) -> Result<Self::Value, E> {
            Ok($absent)
        }
        fn visit_i64<E>(self, _: i64) -> Result<Self::Value, E> {
            Ok($absent)
        }
        fn visit_f64<E>(self, _: f64) -> Result<Self::Value, E> {
            Ok($absent)
        }
        fn visit_unit<E>(self) -> Result<Self::Value, E> {
            Ok($absent)
        }
        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
            Ok($absent)
        }
        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
            while seq.next_element::<IgnoredAny>()?.is_some() {}
            Ok($absent)
        }
    };
}

impl<'de> Deserialize<'de> for TextValue<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = TextValue<'de>;

            tolerate!(TextValue(None));

            fn visit_u64<E>(self, _: u64) -> Result<Self::Value, E> {
                Ok(TextValue(None))
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(TextValue((!is_absent(text)).then_some(Cow::Borrowed(text))))
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
                Ok(TextValue((!is_absent(text)).then(|| Cow::Owned(text.to_owned()))))
            }
        }
        deserializer.deserialize_any(Any)
    }
}

impl<'de> Deserialize<'de> for TimeValue<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = TimeValue<'de>;

            tolerate!(TimeValue(None));

            fn visit_u64<E>(self, number: u64) -> Result<Self::Value, E> {
                let nanos = i64::try_from(number).ok().filter(|nanos| *nanos >= NANOS_MIN);
                Ok(TimeValue(nanos.map(Written::Nanos)))
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(TimeValue(Some(Written::Text(Cow::Borrowed(text)))))
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
                Ok(TimeValue(Some(Written::Text(Cow::Owned(text.to_owned())))))
            }
        }
        deserializer.deserialize_any(Any)
    }
}

impl<'de> Deserialize<'de> for Status {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Status;

            tolerate!(Status(0));

            fn visit_u64<E>(self, number: u64) -> Result<Status, E> {
                Ok(Status::new(number))
            }

            fn visit_str<E>(self, text: &str) -> Result<Status, E> {
                Ok(text.parse().map_or(Status(0), Status::new))
            }
        }
        deserializer.deserialize_any(Any)
    }
}

impl<'de> Deserialize<'de> for Nanos {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Nanos;

            tolerate!(Nanos(0));

            fn visit_u64<E>(self, number: u64) -> Result<Nanos, E> {
                Ok(Nanos(number))
            }

            fn visit_str<E>(self, _: &str) -> Result<Nanos, E> {
                Ok(Nanos(0))
            }
        }
        deserializer.deserialize_any(Any)
    }
}
