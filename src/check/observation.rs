//! What a check observed, and the sample that is made of it.
//!
//! Pure. Observations come from the checks, and from `pool` and `schedule` for ticks that were not checked.

use std::borrow::Cow;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use crate::check::target::Target;
use crate::sample::{Outcome, Sample, Timestamp};
use crate::terminal;

/// Time spent in each phase, summed over redirects. A phase that was not reached or does not exist is `None`, never zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Phases {
    pub dns: Option<Duration>,
    pub connect: Option<Duration>,
    pub tls: Option<Duration>,
    /// From the end of the request to the first byte of the response; interim responses do not count.
    pub ttfb: Option<Duration>,
    pub body: Option<Duration>,
}

/// What one check observed. A failed check is an observation too, not an error.
#[derive(Clone, Debug, PartialEq)]
pub struct Observation {
    pub outcome: Outcome,
    /// The cause in words; `None` only with [`Outcome::Ok`]. [`stamp`] turns it into one line.
    pub error: Option<String>,
    /// From the start of the check to the final response's headers.
    pub latency: Option<Duration>,
    pub status_code: Option<u16>,
    pub regex_matched: Option<bool>,
    pub phases: Phases,
    pub ip: Option<IpAddr>,
    pub redirects: Option<u32>,
    pub body_bytes: Option<u64>,
    pub cert_expires_at: Option<Timestamp>,
    /// When the last name lookup began, which may be before the check.
    pub lookup_began_at: Option<Instant>,
}

impl Observation {
    /// A check that failed, with nothing observed but the cause.
    pub fn failed(outcome: Outcome, error: impl Into<String>) -> Self {
        Self::new(outcome, Some(error.into()))
    }

    /// Nothing is observed yet.
    pub(super) fn new(outcome: Outcome, error: Option<String>) -> Self {
        Self {
            outcome,
            error,
            latency: None,
            status_code: None,
            regex_matched: None,
            phases: Phases::default(),
            ip: None,
            redirects: None,
            body_bytes: None,
            cert_expires_at: None,
            lookup_began_at: None,
        }
    }
}

/// When and where a check was made.
#[derive(Clone, Copy, Debug)]
pub struct Stamp<'a> {
    pub scheduled_at: Timestamp,
    /// `None` if the check did not begin.
    pub started_at: Option<Timestamp>,
    /// `None` in the `check` command.
    pub interval: Option<Duration>,
    pub agent: &'a str,
}

/// The longest `error` of a record: it is one line of a table, and every row of a long outage has one.
pub const MAX_ERROR_CHARS: usize = 200;

/// Turns an observation into a sample.
///
/// Durations become seconds, rounded to microseconds. Numbers that are too large for the record's types are set to the
/// largest one. `error` is null with [`Outcome::Ok`]; otherwise it is one line of at most [`MAX_ERROR_CHARS`], without
/// control characters, and the outcome's word if there is no cause.
pub fn stamp<'a>(target: &'a Target, observation: Observation, stamp: Stamp<'a>) -> Sample<'a> {
    let Observation {
        outcome,
        error,
        latency,
        status_code,
        regex_matched,
        phases,
        ip,
        redirects,
        body_bytes,
        cert_expires_at,
        lookup_began_at: _,
    } = observation;
    let error = match outcome {
        Outcome::Ok => None,
        _ => Some(match one_line(&error.unwrap_or_default()) {
            line if line.is_empty() => Cow::Borrowed(outcome.as_str()),
            line => Cow::Owned(line),
        }),
    };
    Sample {
        address: Cow::Borrowed(&target.address),
        latency: latency.map(seconds),
        status_code: status_code.map(|code| i16::try_from(code).unwrap_or(i16::MAX)),
        is_valid: outcome == Outcome::Ok,
        outcome: Some(Cow::Borrowed(outcome.as_str())),
        error,
        scheduled_at: Some(stamp.scheduled_at),
        started_at: stamp.started_at,
        interval_seconds: stamp.interval.map(seconds),
        regex_matched,
        dns_seconds: phases.dns.map(seconds),
        connect_seconds: phases.connect.map(seconds),
        tls_seconds: phases.tls.map(seconds),
        ttfb_seconds: phases.ttfb.map(seconds),
        body_seconds: phases.body.map(seconds),
        ip,
        redirects: redirects.map(|count| i32::try_from(count).unwrap_or(i32::MAX)),
        body_bytes: body_bytes.map(|bytes| i64::try_from(bytes).unwrap_or(i64::MAX)),
        cert_expires_at,
        slow: target.slow.zip(latency).map(|(limit, latency)| latency > limit),
        name: target.name.as_deref().map(Cow::Borrowed),
        group: target.group.as_deref().map(Cow::Borrowed),
        agent: Some(Cow::Borrowed(stamp.agent)),
        // Known only when the record is sent: `sample::epoch::write_into`.
        epoch: None,
    }
}

/// In seconds, rounded to the nearest microsecond.
fn seconds(duration: Duration) -> f64 {
    let micros = (duration.as_nanos() + 500) / 1_000;
    micros as f64 / 1e6
}

/// The text as one line: white space and hidden characters become single spaces, and a long text ends with an ellipsis. The
/// text can hold bytes that a remote host sent, and it is printed on terminals.
fn one_line(text: &str) -> String {
    let text = terminal::plain(text);
    let words: Vec<_> = text.split_whitespace().collect();
    terminal::cut(&words.join(" "), MAX_ERROR_CHARS)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn target() -> Target {
        Target::new(
            "example.com".to_owned(),
            "https://example.com/".parse().unwrap(),
            Duration::from_secs(30),
        )
    }

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn stamped<'a>(target: &'a Target, observation: Observation) -> Sample<'a> {
        let when = Stamp {
            scheduled_at: at("2026-03-01T10:00:00Z"),
            started_at: Some(at("2026-03-01T10:00:00.000113Z")),
            interval: Some(target.interval),
            agent: "fra-1",
        };
        stamp(target, observation, when)
    }

    fn stamped_error(outcome: Outcome, error: &str) -> Option<String> {
        stamped(&target(), Observation::failed(outcome, error))
            .error
            .map(Cow::into_owned)
    }

    #[test]
    fn everything_observed_is_in_the_sample() {
        let observation = Observation {
            outcome: Outcome::Ok,
            error: None,
            latency: Some(Duration::from_micros(131_482)),
            status_code: Some(200),
            regex_matched: Some(true),
            phases: Phases {
                dns: Some(Duration::from_millis(1)),
                connect: Some(Duration::from_millis(2)),
                tls: Some(Duration::from_millis(3)),
                ttfb: Some(Duration::from_millis(4)),
                body: Some(Duration::from_millis(5)),
            },
            ip: Some("203.0.113.7".parse().unwrap()),
            redirects: Some(1),
            body_bytes: Some(18_231),
            cert_expires_at: Some(at("2026-05-30T23:59:59Z")),
            lookup_began_at: None,
        };
        let expected = Sample {
            address: "example.com".into(),
            latency: Some(0.131_482),
            status_code: Some(200),
            is_valid: true,
            outcome: Some("ok".into()),
            error: None,
            scheduled_at: Some(at("2026-03-01T10:00:00Z")),
            started_at: Some(at("2026-03-01T10:00:00.000113Z")),
            interval_seconds: Some(30.0),
            regex_matched: Some(true),
            dns_seconds: Some(0.001),
            connect_seconds: Some(0.002),
            tls_seconds: Some(0.003),
            ttfb_seconds: Some(0.004),
            body_seconds: Some(0.005),
            ip: Some("203.0.113.7".parse().unwrap()),
            redirects: Some(1),
            body_bytes: Some(18_231),
            cert_expires_at: Some(at("2026-05-30T23:59:59Z")),
            slow: Some(true),
            name: Some("Shop front".into()),
            group: Some("Shops".into()),
            agent: Some("fra-1".into()),
            epoch: None,
        };
        let target = Target {
            slow: Some(Duration::from_micros(131_481)),
            name: Some("Shop front".to_owned()),
            group: Some("Shops".to_owned()),
            ..target()
        };
        assert_eq!(stamped(&target, observation), expected);
    }

    #[test]
    fn a_check_that_did_not_begin_has_only_its_tick_and_its_cause() {
        let target = target();
        let when = Stamp {
            scheduled_at: at("2026-03-01T10:00:00Z"),
            started_at: None,
            interval: None,
            agent: "",
        };
        let observation = Observation::failed(Outcome::Missed, "the check before it was still under way");
        let expected = Sample {
            address: "example.com".into(),
            outcome: Some("missed".into()),
            error: Some("the check before it was still under way".into()),
            scheduled_at: Some(at("2026-03-01T10:00:00Z")),
            agent: Some("".into()),
            ..Sample::default()
        };
        assert_eq!(stamp(&target, observation, when), expected);
    }

    #[test]
    fn a_response_is_slow_if_it_takes_longer_than_the_host_says() {
        let slow = |limit: Option<u64>, latency: Option<u64>| {
            let target = Target {
                slow: limit.map(Duration::from_millis),
                ..target()
            };
            let observation = Observation {
                latency: latency.map(Duration::from_millis),
                ..Observation::failed(Outcome::Ok, "")
            };
            stamped(&target, observation).slow
        };
        assert_eq!(slow(None, Some(900)), None);
        assert_eq!(slow(Some(800), None), None);
        assert_eq!(slow(Some(800), Some(800)), Some(false));
        assert_eq!(slow(Some(800), Some(801)), Some(true));
    }

    #[test]
    fn a_sample_is_valid_if_its_outcome_is_ok_and_has_an_error_otherwise() {
        let words: HashSet<&str> = Outcome::ALL.iter().map(|outcome| outcome.as_str()).collect();
        assert_eq!(words.len(), Outcome::ALL.len());
        let target = target();
        for outcome in Outcome::ALL {
            for error in [None, Some(""), Some(" \r\n\0"), Some("the cause")] {
                let observation = Observation {
                    error: error.map(str::to_owned),
                    ..Observation::failed(outcome, "")
                };
                let sample = stamped(&target, observation);
                let expected = match (outcome, error) {
                    (Outcome::Ok, _) => None,
                    (_, Some("the cause")) => Some("the cause"),
                    _ => Some(outcome.as_str()),
                };
                assert_eq!(sample.error.as_deref(), expected);
                assert_eq!(sample.is_valid, outcome == Outcome::Ok);
                assert_eq!(sample.outcome.as_deref(), Some(outcome.as_str()));
            }
        }
    }

    #[test]
    fn an_error_is_one_line_without_hidden_characters() {
        for (error, expected) in [
            ("as it is", "as it is"),
            ("two\r\n\tlines\n", "two lines"),
            ("  much   room  ", "much room"),
            ("a\0b", "a b"),
            ("\u{1b}[31mred\u{1b}[0m", "[31mred [0m"),
            ("\u{7f}del\u{9b}csi", "del csi"),
            ("\u{202e}moc.elpmaxe", "moc.elpmaxe"),
            ("in\u{200b}visible\u{feff}", "in visible"),
            ("\u{2066}isolated\u{2069}", "isolated"),
            ("line\u{2028}paragraph\u{2029}", "line paragraph"),
            ("naïve “quotes” 🦀", "naïve “quotes” 🦀"),
        ] {
            assert_eq!(
                stamped_error(Outcome::ProtocolError, error).as_deref(),
                Some(expected),
                "{error:?}"
            );
        }
    }

    #[test]
    fn an_error_has_at_most_200_characters_including_the_ellipsis() {
        let long = |error: String| stamped_error(Outcome::TlsError, &error).unwrap();
        assert_eq!(long("é".repeat(200)), "é".repeat(200));
        assert_eq!(long(format!("{}\n", "é".repeat(200))), "é".repeat(200));
        assert_eq!(long("é".repeat(201)), format!("{}…", "é".repeat(199)));
        assert_eq!(
            long(format!("{} b", "a".repeat(199))),
            format!("{}…", "a".repeat(199))
        );
        assert_eq!(
            long(format!("{} b", "a".repeat(198))),
            format!("{} b", "a".repeat(198))
        );
        assert_eq!(long("a b ".repeat(1_000_000)).chars().count(), 200);
    }

    #[test]
    fn durations_are_rounded_to_microseconds() {
        for (duration, expected) in [
            (Duration::ZERO, 0.0),
            (Duration::from_nanos(499), 0.0),
            (Duration::from_nanos(500), 0.000_001),
            (Duration::from_nanos(1_234_567_890), 1.234_568),
            (Duration::from_secs(86_400 * 366), 31_622_400.0),
        ] {
            assert_eq!(seconds(duration), expected, "{duration:?}");
        }
        assert!(seconds(Duration::MAX).is_finite());
    }

    #[test]
    fn numbers_too_large_for_the_record_become_its_largest_ones() {
        let target = target();
        let observation = Observation {
            status_code: Some(u16::MAX),
            redirects: Some(u32::MAX),
            body_bytes: Some(u64::MAX),
            ..Observation::failed(Outcome::BadStatus, "")
        };
        let sample = stamped(&target, observation);
        assert_eq!(sample.status_code, Some(i16::MAX));
        assert_eq!(sample.redirects, Some(i32::MAX));
        assert_eq!(sample.body_bytes, Some(i64::MAX));
    }
}
