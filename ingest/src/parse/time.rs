//! Times as access logs write them: RFC 3339 (`2026-01-08T14:19:15.980170592Z`) and the bracket of the common log format
//! (`08/Dec/2021:09:16:05 +0000`).
//!
//! Refuses what is no moment between 1970 and 2262 instead of guessing. Reads fixed positions: both writers are Go's
//! `time.Format`, and this runs once a line.

use proto::time::Timestamp;

const NANOS: i64 = 1_000_000_000;
const MONTHS: [&[u8; 3]; 12] =
    [b"Jan", b"Feb", b"Mar", b"Apr", b"May", b"Jun", b"Jul", b"Aug", b"Sep", b"Oct", b"Nov", b"Dec"];

/// Parses RFC 3339 with any fraction (digits after the ninth are dropped) and `Z` or a numeric offset.
pub fn parse_rfc3339(text: &str) -> Option<Timestamp> {
    let bytes = text.as_bytes();
    let (head, mut rest) = bytes.split_at_checked(19)?;
    if head[4] != b'-' || head[7] != b'-' || !matches!(head[10], b'T' | b't' | b' ') {
        return None;
    }
    let date = Date { year: number(&head[..4])?, month: number(&head[5..7])?, day: number(&head[8..10])? };
    let mut nanos = 0;
    if let [b'.', fraction @ ..] = rest {
        let digits = fraction.iter().take_while(|b| b.is_ascii_digit()).count();
        if digits == 0 {
            return None;
        }
        let kept = digits.min(9);
        nanos = number(&fraction[..kept])? * 10_i64.pow(9 - kept as u32);
        rest = &fraction[digits..];
    }
    let offset = match rest {
        [b'Z' | b'z'] => 0,
        [sign, h1, h2, b':', m1, m2] => parse_offset(*sign, [*h1, *h2, *m1, *m2])?,
        _ => return None,
    };
    moment(&date, seconds_of_day(&head[11..])?, offset, nanos)
}

/// Parses what stands between the brackets of the common log format: `02/Jan/2006:15:04:05 -0700`.
pub fn parse_clf(text: &str) -> Option<Timestamp> {
    let bytes: &[u8; 26] = text.as_bytes().try_into().ok()?;
    if bytes[2] != b'/' || bytes[6] != b'/' || bytes[11] != b':' || bytes[20] != b' ' {
        return None;
    }
    let month = MONTHS.iter().position(|name| name[..] == bytes[3..6])? as i64 + 1;
    let date = Date { year: number(&bytes[7..11])?, month, day: number(&bytes[..2])? };
    let offset = parse_offset(bytes[21], [bytes[22], bytes[23], bytes[24], bytes[25]])?;
    moment(&date, seconds_of_day(&bytes[12..20])?, offset, 0)
}

struct Date {
    year: i64,
    month: i64,
    day: i64,
}

impl Date {
    /// Days since 1970-01-01 in the Gregorian calendar. The formula is Howard Hinnant's `days_from_civil`
    /// (<https://howardhinnant.github.io/date_algorithms.html>), for years from 0 on.
    fn days(&self) -> Option<i64> {
        let leap = self.year % 4 == 0 && (self.year % 100 != 0 || self.year % 400 == 0);
        let length = match self.month {
            4 | 6 | 9 | 11 => 30,
            2 => 28 + i64::from(leap),
            1..=12 => 31,
            _ => return None,
        };
        if !(1..=length).contains(&self.day) {
            return None;
        }
        // The year begins in March, so that the leap day is its last.
        let year = if self.month <= 2 { self.year - 1 } else { self.year };
        let (era, of_era) = (year.div_euclid(400), year.rem_euclid(400));
        let day_of_year = (153 * ((self.month + 9) % 12) + 2) / 5 + self.day - 1;
        Some(era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + day_of_year - 719_468)
    }
}

/// `15:04:05` as seconds since midnight. A leap second counts as the first second of the next minute.
fn seconds_of_day(bytes: &[u8]) -> Option<i64> {
    let &[h1, h2, b':', m1, m2, b':', s1, s2] = bytes else { return None };
    let (hours, minutes, seconds) = (number(&[h1, h2])?, number(&[m1, m2])?, number(&[s1, s2])?);
    (hours < 24 && minutes < 60 && seconds <= 60).then_some(hours * 3600 + minutes * 60 + seconds)
}

fn parse_offset(sign: u8, [h1, h2, m1, m2]: [u8; 4]) -> Option<i64> {
    let (hours, minutes) = (number(&[h1, h2])?, number(&[m1, m2])?);
    if hours >= 24 || minutes >= 60 {
        return None;
    }
    match sign {
        b'+' => Some(hours * 3600 + minutes * 60),
        b'-' => Some(-(hours * 3600 + minutes * 60)),
        _ => None,
    }
}

/// At most nine digits.
fn number(digits: &[u8]) -> Option<i64> {
    digits.iter().try_fold(0, |sum, digit| digit.is_ascii_digit().then(|| sum * 10 + i64::from(digit - b'0')))
}

fn moment(date: &Date, seconds_of_day: i64, offset: i64, nanos: i64) -> Option<Timestamp> {
    let seconds = date.days()? * 86_400 + seconds_of_day - offset;
    let total = seconds.checked_mul(NANOS)?.checked_add(nanos)?;
    (total >= 0).then(|| Timestamp::from_nanos(total))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn nanos(text: &str) -> Option<i64> {
        parse_rfc3339(text).map(Timestamp::as_nanos)
    }

    #[test]
    fn rfc3339_with_fraction_and_offset() {
        assert_eq!(nanos("1970-01-01T00:00:00Z"), Some(0));
        assert_eq!(nanos("2021-12-08T14:02:43.587782192Z"), Some(1_638_972_163_587_782_192));
        assert_eq!(nanos("2021-12-08T15:02:43.587782192+01:00"), Some(1_638_972_163_587_782_192));
        assert_eq!(nanos("2021-12-08T10:32:43-03:30"), Some(1_638_972_163_000_000_000));
        assert_eq!(nanos("2021-12-08T14:02:43.5877821929999Z"), Some(1_638_972_163_587_782_192));
        assert_eq!(nanos("2024-02-29T00:00:00Z"), Some(1_709_164_800_000_000_000));
    }

    #[test]
    fn nonsense_is_no_time() {
        for text in [
            "",
            "2021-12-08",
            "2021-12-08T14:02:43",
            "2021-12-08T14:02:43.Z",
            "2021-12-08T24:00:00Z",
            "2021-13-01T00:00:00Z",
            "2021-02-29T00:00:00Z",
            "2021-00-10T00:00:00Z",
            "1969-12-31T23:59:59Z",
            "1970-01-01T00:00:00+00:01",
            "9999-12-31T23:59:59Z",
            "2021-12-08T14:02:43+1:00",
            "2021-12-08T14:02:43é",
            "-",
        ] {
            assert_eq!(parse_rfc3339(text), None, "{text}");
        }
        for text in ["", "08/Dec/2021:09:16:05", "8/Dec/2021:09:16:05 +0000", "08/Dez/2021:09:16:05 +0000"] {
            assert_eq!(parse_clf(text), None, "{text}");
        }
    }

    #[test]
    fn clf_bracket() {
        assert_eq!(parse_clf("08/Dec/2021:14:02:43 +0000").map(Timestamp::as_nanos), Some(1_638_972_163_000_000_000));
        assert_eq!(parse_clf("08/Dec/2021:09:02:43 -0500").map(Timestamp::as_nanos), Some(1_638_972_163_000_000_000));
    }

    proptest! {
        #[test]
        fn every_moment_survives_the_round_trip(millis in 0_i64..9_223_372_036_854) {
            let time = Timestamp::from_millis(millis);
            prop_assert_eq!(parse_rfc3339(&time.to_string()), Some(time));
        }

        #[test]
        fn never_panics(text in ".{0,40}") {
            let _ = (parse_rfc3339(&text), parse_clf(&text));
        }

        #[test]
        fn never_panics_near_a_time(at in 0..30_usize, by in any::<char>()) {
            for sample in ["2021-12-08T15:02:43.587782192+01:00", "08/Dec/2021:14:02:43 +0000"] {
                let text: String = sample.chars().enumerate().map(|(i, c)| if i == at { by } else { c }).collect();
                let _ = (parse_rfc3339(&text), parse_clf(&text));
            }
        }
    }
}
