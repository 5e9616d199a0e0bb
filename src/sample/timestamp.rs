//! Points in time as the record writes them.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use serde::{Serialize, Serializer};

/// A point in time in microseconds since the Unix epoch (UTC), which RFC 3339 text and `timestamptz` can both hold exactly.
///
/// It is written as in RFC 3339, with six digits and `Z`. It can be read with any offset and up to nine digits, which are
/// cut to microseconds. A leap second (23:59:60 UTC on the last day of a month) is read as the first second of the next
/// day, because Unix time has no leap seconds; Postgres does the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(i64);

/// Why a text is not a [`Timestamp`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TimestampError {
    #[error("expected a time as in RFC 3339, such as 2026-01-31T12:00:00.123456Z")]
    Shape,
    #[error("expected a time with a zone: Z or an offset such as +02:00")]
    NoZone,
    #[error("expected at most nine digits after the second")]
    TooManyDigits,
    #[error("expected a date and a time of day that exist")]
    NoSuchTime,
    #[error("expected a time in the years 1970 to 9999 (UTC)")]
    OutOfRange,
}

const MICROS_PER_SECOND: i64 = 1_000_000;
const SECONDS_PER_DAY: i64 = 86_400;
/// 1970-01-01 as a Julian day number.
const UNIX_EPOCH_JULIAN_DAY: i32 = 2_440_588;

impl Timestamp {
    const RANGE_MICROS: RangeInclusive<i64> = 0..=253_402_300_799_999_999;

    /// Returns `None` outside the years 1970 to 9999.
    pub fn from_unix_micros(micros: i64) -> Option<Self> {
        Self::RANGE_MICROS.contains(&micros).then_some(Self(micros))
    }

    pub fn unix_micros(self) -> i64 {
        self.0
    }
}

impl Timestamp {
    /// `2026-01-31T12:00:00.123456Z`
    pub(super) fn text(self) -> [u8; 27] {
        let seconds = self.0 / MICROS_PER_SECOND;
        let (year, month, day) = date_of(seconds).to_calendar_date();
        let second_of_day = seconds % SECONDS_PER_DAY;
        let mut text = *b"0000-00-00T00:00:00.000000Z";
        for (place, number) in [
            (0..4, i64::from(year)),
            (5..7, i64::from(u8::from(month))),
            (8..10, i64::from(day)),
            (11..13, second_of_day / 3_600),
            (14..16, second_of_day / 60 % 60),
            (17..19, second_of_day % 60),
            // The last six digits.
            (20..26, self.0),
        ] {
            write_digits(number.unsigned_abs(), &mut text[place]);
        }
        text
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&String::from_utf8_lossy(&self.text()))
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl FromStr for Timestamp {
    type Err = TimestampError;

    fn from_str(text: &str) -> Result<Self, TimestampError> {
        let (head, rest) = text
            .as_bytes()
            .split_at_checked(19)
            .ok_or(TimestampError::Shape)?;
        let has_separators = [(4, b'-'), (7, b'-'), (10, b't'), (13, b':'), (16, b':')]
            .iter()
            .all(|&(at, sign)| head[at].to_ascii_lowercase() == sign);
        if !has_separators {
            return Err(TimestampError::Shape);
        }
        let part = |range| number(&head[range]).ok_or(TimestampError::Shape);
        let (year, month, day) = (part(0..4)?, part(5..7)?, part(8..10)?);
        let (hour, minute, second) = (part(11..13)?, part(14..16)?, part(17..19)?);

        let (micros, zone) = fraction_micros(rest)?;
        let offset_seconds = offset_seconds(zone)?;

        if hour > 23 || minute > 59 || second > 60 {
            return Err(TimestampError::NoSuchTime);
        }
        let date = calendar_date(year, month, day).ok_or(TimestampError::NoSuchTime)?;
        let days = i64::from(date.to_julian_day() - UNIX_EPOCH_JULIAN_DAY);
        let seconds = days * SECONDS_PER_DAY + hour * 3_600 + minute * 60 + second - offset_seconds;
        let timestamp =
            Self::from_unix_micros(seconds * MICROS_PER_SECOND + micros).ok_or(TimestampError::OutOfRange)?;
        if second == 60 && (seconds % SECONDS_PER_DAY != 0 || date_of(seconds).day() != 1) {
            return Err(TimestampError::NoSuchTime);
        }
        Ok(timestamp)
    }
}

/// The UTC date of a [`Timestamp`]'s seconds.
fn date_of(unix_seconds: i64) -> time::Date {
    i32::try_from(unix_seconds / SECONDS_PER_DAY)
        .ok()
        .and_then(|days| time::Date::from_julian_day(UNIX_EPOCH_JULIAN_DAY + days).ok())
        .expect("a timestamp is in the years 1970 to 9999, and so is a date")
}

fn calendar_date(year: i64, month: i64, day: i64) -> Option<time::Date> {
    let month = time::Month::try_from(u8::try_from(month).ok()?).ok()?;
    time::Date::from_calendar_date(i32::try_from(year).ok()?, month, u8::try_from(day).ok()?).ok()
}

/// The microseconds of an optional `.123456789`, and the text after it.
fn fraction_micros(text: &[u8]) -> Result<(i64, &[u8]), TimestampError> {
    let Some(text) = text.strip_prefix(b".") else {
        return Ok((0, text));
    };
    let digits_end = text
        .iter()
        .position(|byte| !byte.is_ascii_digit())
        .unwrap_or(text.len());
    let (digits, rest) = text.split_at(digits_end);
    match digits.len() {
        0 => Err(TimestampError::Shape),
        count @ 1..=9 => {
            let nanos = digits
                .iter()
                .fold(0, |number, digit| number * 10 + i64::from(digit - b'0'))
                * 10_i64.pow(9 - count as u32);
            Ok((nanos / 1_000, rest))
        }
        _ => Err(TimestampError::TooManyDigits),
    }
}

/// The seconds that an RFC 3339 zone is ahead of UTC.
fn offset_seconds(zone: &[u8]) -> Result<i64, TimestampError> {
    match zone {
        [] => Err(TimestampError::NoZone),
        b"Z" | b"z" => Ok(0),
        &[sign @ (b'+' | b'-'), h1, h2, b':', m1, m2] => {
            let hours = number(&[h1, h2]).ok_or(TimestampError::Shape)?;
            let minutes = number(&[m1, m2]).ok_or(TimestampError::Shape)?;
            if hours > 23 || minutes > 59 {
                return Err(TimestampError::NoSuchTime);
            }
            let seconds = hours * 3_600 + minutes * 60;
            Ok(if sign == b'-' { -seconds } else { seconds })
        }
        _ => Err(TimestampError::Shape),
    }
}

/// The number that the text is, if it consists of ASCII digits only.
fn number(digits: &[u8]) -> Option<i64> {
    digits.iter().try_fold(0, |number, byte| {
        byte.is_ascii_digit()
            .then(|| number * 10 + i64::from(byte - b'0'))
    })
}

/// Writes the last digits of the number, as many as fit.
pub(super) fn write_digits(mut number: u64, into: &mut [u8]) {
    for place in into.iter_mut().rev() {
        *place = b'0' + (number % 10) as u8;
        number /= 10;
    }
}
