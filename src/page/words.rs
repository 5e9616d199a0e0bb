//! Numbers, times and outcomes as a visitor reads them.
//!
//! Pure. Times are UTC, and the page says so.

use time::OffsetDateTime;

use crate::page::snapshot::{Counts, SECOND, State};
use crate::terminal;

/// A time as it is written in HTML and JSON: RFC 3339 with whole seconds.
pub fn machine_time(micros: i64) -> String {
    let at = moment(micros);
    let (date, time) = (at.date(), at.time());
    format!(
        "{date}T{:02}:{:02}:{:02}Z",
        time.hour(),
        time.minute(),
        time.second()
    )
}

/// `28 Nov 2026`
pub fn date(micros: i64) -> String {
    let at = moment(micros);
    let month = at.month().to_string();
    format!("{} {} {}", at.day(), &month[..3], at.year())
}

/// `16:20`
pub fn time_of_day(micros: i64) -> String {
    let at = moment(micros);
    format!("{:02}:{:02}", at.hour(), at.minute())
}

/// `28 Nov 2026, 16:20`
pub fn date_and_time(micros: i64) -> String {
    format!("{}, {}", date(micros), time_of_day(micros))
}

/// `2026-11`, which sorts by time.
pub fn month_key(micros: i64) -> String {
    let at = moment(micros);
    format!("{:04}-{:02}", at.year(), u8::from(at.month()))
}

/// `November 2026`
pub fn month(micros: i64) -> String {
    let at = moment(micros);
    format!("{} {}", at.month(), at.year())
}

/// A time outside the years 1970 to 9999, which no record has, becomes 1970.
fn moment(micros: i64) -> OffsetDateTime {
    const LAST: i64 = 253_402_300_799;
    let seconds = Some(micros.div_euclid(SECOND)).filter(|seconds| (0..=LAST).contains(seconds));
    OffsetDateTime::from_unix_timestamp(seconds.unwrap_or(0)).unwrap_or(OffsetDateTime::UNIX_EPOCH)
}

/// `3 d 4 h`, `1 h 12 min`, `45 s`: at most two units.
pub fn duration(micros: i64) -> String {
    let seconds = micros.max(0) / SECOND;
    let two = |big: i64, big_unit: &str, small: i64, small_unit: &str| match small {
        0 => format!("{big} {big_unit}"),
        small => format!("{big} {big_unit} {small} {small_unit}"),
    };
    match seconds {
        ..60 => format!("{seconds} s"),
        60..3_600 => two(seconds / 60, "min", seconds % 60, "s"),
        3_600..86_400 => two(seconds / 3_600, "h", seconds / 60 % 60, "min"),
        _ => two(seconds / 86_400, "d", seconds / 3_600 % 24, "h"),
    }
}

/// `43,180`
pub fn number(number: i64) -> String {
    let digits = number.unsigned_abs().to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    if number < 0 { format!("-{text}") } else { text }
}

/// `1 check`, `43,180 checks`
pub fn counted(count: i64, what: &str) -> String {
    terminal::counted(number(count), what)
}

/// `99.95 %`, cut and not rounded, so that it is 100 only if no check failed. `None` without a check.
pub fn share(counts: Counts) -> Option<String> {
    let (valid, checks) = (i128::from(counts.valid), i128::from(counts.checks()));
    Some(of_hundredths((valid * 10_000).checked_div(checks)?))
}

/// As [`share`], of time: `share` is from 0 to 1.
pub fn share_of_time(share: f64) -> String {
    of_hundredths((share.clamp(0.0, 1.0) * 10_000.0) as i128)
}

fn of_hundredths(hundredths: i128) -> String {
    match hundredths {
        10_000 => "100 %".to_owned(),
        _ => format!("{}.{:02} %", hundredths / 100, hundredths % 100),
    }
}

/// The checks that a share refers to: `of 43,180 checks, 21 not made`.
pub fn of_checks(counts: Counts) -> String {
    let checks = counted(counts.checks(), "check");
    let of = if counts.checks() == 0 {
        "no checks".to_owned()
    } else {
        format!("of {checks}")
    };
    match counts.not_made {
        0 => of,
        not_made => format!("{of}, {} not made", number(not_made)),
    }
}

/// `16 Nov 2026: partly down, 2 of 24 checks failed`
pub fn of_a_day(starts_at: i64, is: State, counts: Counts) -> String {
    let (count, what) = match is {
        State::Slow => (counts.slow, "were slow"),
        _ => (counts.failed, "failed"),
    };
    let checks = counted(counts.checks(), "check");
    format!(
        "{}: {}, {} of {checks} {what}",
        date(starts_at),
        state(is),
        number(count)
    )
}

/// `12 ms`, `1.25 s`
pub fn latency(seconds: f64) -> String {
    crate::terminal::seconds(seconds)
}

pub fn state(state: State) -> &'static str {
    match state {
        State::Up => "up",
        State::Slow => "slow",
        State::Partly => "partly down",
        State::Down => "down",
        State::NotChecked => "not checked",
    }
}

/// The outcomes in words.
const OUTCOMES: [(&str, &str); 26] = [
    ("ok", "Answered as expected"),
    ("bad_status", "Answered with an unexpected status"),
    ("regex_mismatch", "The text of the answer is not as expected"),
    ("json_mismatch", "A value in the answer is not as expected"),
    (
        "body_too_large",
        "The expected text is not at the beginning of a large answer",
    ),
    ("dns_not_found", "The name does not exist"),
    ("dns_error", "The name servers failed"),
    ("dns_timeout", "The name servers did not answer in time"),
    ("connect_refused", "The connection was refused"),
    ("connect_unreachable", "No network route leads to the host"),
    ("connect_timeout", "The connection was not made in time"),
    ("connect_error", "The connection failed"),
    ("tls_cert_expired", "The certificate is not valid at this time"),
    ("tls_cert_expiring", "The certificate expires soon"),
    ("tls_cert_name", "The certificate is for another name"),
    ("tls_cert_untrusted", "The certificate is not trusted"),
    ("tls_error", "No encrypted connection could be made"),
    ("tls_timeout", "No encrypted connection was made in time"),
    ("response_timeout", "No answer came in time"),
    ("body_timeout", "The answer was not complete in time"),
    (
        "connection_closed",
        "The connection was closed before the answer was complete",
    ),
    ("protocol_error", "The answer is not valid HTTP"),
    ("too_many_redirects", "Too many redirects"),
    ("proxy_error", "The proxy failed"),
    ("agent_error", "The checking machine failed"),
    ("agent_offline", "The checking machine was offline"),
];

/// An outcome in words. One that this version does not know is shown as it is.
pub fn outcome(outcome: &str) -> String {
    match OUTCOMES.iter().find(|(known, _)| *known == outcome) {
        Some((_, words)) => (*words).to_owned(),
        None => crate::terminal::plain(&outcome.replace('_', " ")),
    }
}

/// The words with a small first letter, unless they begin with an abbreviation.
pub fn in_a_sentence(words: &str) -> String {
    let mut chars = words.chars();
    match (chars.next(), chars.next()) {
        (Some(first), Some(second)) if second.is_lowercase() || second == ' ' => {
            first.to_lowercase().chain([second]).chain(chars).collect()
        }
        _ => words.to_owned(),
    }
}

/// The name of a place.
pub fn place(agent: &str) -> String {
    match crate::terminal::cut(&crate::terminal::plain(agent), 60) {
        empty if empty.trim().is_empty() => "a place without a name".to_owned(),
        agent => agent,
    }
}

/// A name that is written from right to left, marked so that it does not reverse the order of its neighbours.
fn isolated(name: &str) -> String {
    let is_rtl =
        |char| matches!(char, '\u{590}'..='\u{8ff}' | '\u{fb1d}'..='\u{fdff}' | '\u{fe70}'..='\u{fefc}');
    match name.contains(is_rtl) {
        true => format!("\u{2068}{name}\u{2069}"),
        false => name.to_owned(),
    }
}

/// `A, B and 3 more`
pub fn list(names: &[&str], at_most: usize) -> String {
    let shown = names.len().min(at_most);
    let mut text = names[..shown]
        .iter()
        .map(|name| isolated(name))
        .collect::<Vec<_>>()
        .join(", ");
    match names.len() - shown {
        0 => {}
        more => text = format!("{text} and {more} more"),
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::Outcome;

    #[test]
    fn every_outcome_of_a_check_has_words() {
        for known in Outcome::ALL
            .into_iter()
            .filter(|outcome| *outcome != Outcome::Missed)
        {
            let word = known.as_str();
            assert!(OUTCOMES.iter().any(|(known, _)| *known == word), "{word}");
        }
        assert_eq!(outcome("quantum_flip\u{7}"), "quantum flip ");
        let cased = ["No answer", "A name", "TLS failed", ""].map(in_a_sentence);
        assert_eq!(cased, ["no answer", "a name", "TLS failed", ""]);
    }

    #[test]
    fn a_list_keeps_the_order_of_names_in_any_script() {
        assert_eq!(list(&["a", "b", "c"], 2), "a, b and 1 more");
        assert_eq!(list(&["\u{5d0}", "日本"], 5), "\u{2068}\u{5d0}\u{2069}, 日本");
    }

    #[test]
    fn a_share_is_never_rounded_up() {
        let counts = |valid, failed| Counts {
            valid,
            failed,
            ..Counts::default()
        };
        for (valid, failed, expected) in [
            (0, 0, None),
            (1, 0, Some("100 %")),
            (99_999_999, 1, Some("99.99 %")),
            (43_158, 22, Some("99.94 %")),
            (1, 2, Some("33.33 %")),
            (0, 5, Some("0.00 %")),
        ] {
            assert_eq!(share(counts(valid, failed)).as_deref(), expected);
        }
        let counts = Counts {
            not_made: 21,
            ..counts(43_158, 22)
        };
        assert_eq!(of_checks(counts), "of 43,180 checks, 21 not made");
        assert_eq!(of_checks(Counts::default()), "no checks");
        let times = [1.0, 0.999_999, 0.5, 0.0, -0.1].map(share_of_time);
        assert_eq!(times, ["100 %", "99.99 %", "50.00 %", "0.00 %", "0.00 %"]);
    }

    #[test]
    fn times_are_utc() {
        let at = 1_795_882_810 * SECOND;
        assert_eq!(machine_time(at), "2026-11-28T16:20:10Z");
        assert_eq!(date_and_time(at), "28 Nov 2026, 16:20");
        assert_eq!(
            (month_key(at).as_str(), month(at).as_str()),
            ("2026-11", "November 2026")
        );
        assert_eq!(machine_time(i64::MAX), "1970-01-01T00:00:00Z");
    }

    #[test]
    fn durations_have_two_units_at_most() {
        let shown = [-5, 0, 59, 60, 3_599, 3_600, 4_320, 86_400, 273_600].map(|s| duration(s * SECOND));
        assert_eq!(
            shown,
            [
                "0 s",
                "0 s",
                "59 s",
                "1 min",
                "59 min 59 s",
                "1 h",
                "1 h 12 min",
                "1 d",
                "3 d 4 h"
            ]
        );
    }

    #[test]
    fn numbers_and_lists_are_readable() {
        let shown = [0, 999, 1_000, 43_180, -1_234_567].map(number);
        assert_eq!(shown, ["0", "999", "1,000", "43,180", "-1,234,567"]);
        assert_eq!(counted(1, "check"), "1 check");
        assert_eq!(list(&["a", "b"], 2), "a, b");
        assert_eq!(list(&["a", "b", "c", "d"], 2), "a, b and 2 more");
    }
}
