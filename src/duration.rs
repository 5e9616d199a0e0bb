//! Durations as people write them: a whole number and a unit, `10s`.
//!
//! The host file, the variables and the command line share this syntax. Pure.

use std::time::Duration;

use nom::branch::alt;
use nom::bytes::complete::tag;
use nom::character::complete::digit1;
use nom::combinator::{all_consuming, map, value};
use nom::{IResult, Parser};

/// The units, for messages.
pub const UNITS: &str = "ms, s, m, h or d";

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
const HOUR: Duration = Duration::from_secs(60 * 60);
const MINUTE: Duration = Duration::from_secs(60);
const SECOND: Duration = Duration::from_secs(1);

/// In microseconds, the unit of all times that are numbers; a duration that is too long becomes the largest number.
pub fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

/// Reads a whole number with one of [`UNITS`]. A number that is too large becomes the longest duration, so that the caller
/// reports it as out of range and not as bad syntax.
pub fn parse(text: &str) -> Option<Duration> {
    let (_, duration) = all_consuming(number_and_unit).parse(text).ok()?;
    Some(duration)
}

/// Writes a duration in milliseconds or the largest unit that needs no fraction: `5m`, `90s`, `950ms`.
pub fn text(duration: Duration) -> String {
    let millis = duration.saturating_add(Duration::from_micros(500)).as_millis();
    for (unit, name) in [(DAY, "d"), (HOUR, "h"), (MINUTE, "m"), (SECOND, "s")] {
        if millis > 0 && millis.is_multiple_of(unit.as_millis()) {
            return format!("{}{name}", millis / unit.as_millis());
        }
    }
    format!("{millis}ms")
}

/// Reads the host file's FREQUENCY: a whole number of minutes, or a whole number with one of `s m h d`.
pub fn parse_interval(text: &str) -> Option<Duration> {
    let minutes = map(digit1, |digits| times(digits, MINUTE));
    let (_, interval) = all_consuming(alt((
        map((digit1, unit), |(digits, unit)| times(digits, unit)),
        minutes,
    )))
    .parse(text)
    .ok()?;
    Some(interval)
}

fn number_and_unit(input: &str) -> IResult<&str, Duration> {
    let millis = value(Duration::from_millis(1), tag("ms"));
    map((digit1, alt((millis, unit))), |(digits, unit)| {
        times(digits, unit)
    })
    .parse(input)
}

fn unit(input: &str) -> IResult<&str, Duration> {
    alt((
        value(SECOND, tag("s")),
        value(MINUTE, tag("m")),
        value(HOUR, tag("h")),
        value(DAY, tag("d")),
    ))
    .parse(input)
}

fn times(digits: &str, unit: Duration) -> Duration {
    digits
        .parse::<u32>()
        .ok()
        .and_then(|number| unit.checked_mul(number))
        .unwrap_or(Duration::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_is_a_whole_number_with_a_unit() {
        let cases = [
            ("0s", Some(Duration::ZERO)),
            ("250ms", Some(Duration::from_millis(250))),
            ("10s", Some(Duration::from_secs(10))),
            ("007m", Some(Duration::from_secs(420))),
            ("2h", Some(Duration::from_secs(7_200))),
            ("90d", Some(Duration::from_secs(90 * 86_400))),
            ("99999999999999999999d", Some(Duration::MAX)),
            ("", None),
            ("10", None),
            ("s", None),
            ("-5s", None),
            ("1.5s", None),
            ("10 s", None),
            ("10s ", None),
            ("10S", None),
            ("1h30m", None),
            ("١s", None),
        ];
        for (text, expected) in cases {
            assert_eq!(parse(text), expected, "{text:?}");
        }
    }

    #[test]
    fn an_interval_without_a_unit_is_in_minutes_and_cannot_be_in_milliseconds() {
        assert_eq!(parse_interval("5"), Some(Duration::from_secs(300)));
        assert_eq!(parse_interval("5s"), Some(Duration::from_secs(5)));
        assert_eq!(parse_interval("4294967296"), Some(Duration::MAX));
        for text in ["5ms", "5x", "-5", "5.0", "", "m"] {
            assert_eq!(parse_interval(text), None, "{text:?}");
        }
    }

    #[test]
    fn the_text_of_a_duration_is_short_and_parses_back() {
        let cases = [
            (0, "0ms"),
            (950, "950ms"),
            (1_000, "1s"),
            (90_000, "90s"),
            (300_000, "5m"),
            (7_200_000, "2h"),
            (366 * 86_400_000, "366d"),
        ];
        for (millis, expected) in cases {
            let duration = Duration::from_millis(millis);
            assert_eq!(text(duration), expected);
            assert_eq!(parse(expected), Some(duration));
        }
    }
}
