//! The phases of a check as bars on one scale, each beginning where the one before ended. Pure.

use std::time::Duration;

use crate::sample::Sample;

/// The most and the fewest characters that all phases together take.
const MOST: usize = 40;
const FEWEST: usize = 8;

/// The width of the text before a bar.
const LABEL: usize = 27;

/// The name of the wait for an answer that did not come.
const NO_ANSWER: &str = "no answer";

/// A bar's last character, in eighths.
const EIGHTHS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];

/// A shorter wait without an answer is not shown: it is the time that the check itself took.
const SHORTEST_WAIT: f64 = 0.001;

/// Name, seconds and bar of each phase that was reached, and of the wait for an answer that did not come. The bar has the spaces
/// before it, and every phase is visible.
pub(super) fn bars(
    sample: &Sample<'_>,
    took: Duration,
    columns: Option<usize>,
) -> Vec<(&'static str, f64, String)> {
    let phases = [
        ("name", sample.dns_seconds),
        ("connect", sample.connect_seconds),
        ("tls", sample.tls_seconds),
        ("first byte", sample.ttfb_seconds),
        ("body", sample.body_seconds),
    ];
    let mut reached: Vec<_> = phases
        .into_iter()
        .filter_map(|(name, seconds)| Some((name, seconds?)))
        .collect();
    let waited = took.as_secs_f64() - reached.iter().map(|(_, seconds)| seconds).sum::<f64>();
    if sample.latency.is_none() && waited >= SHORTEST_WAIT {
        reached.push((NO_ANSWER, waited));
    }
    let total: f64 = reached.iter().map(|(_, seconds)| seconds).sum();
    let width = columns.map_or(MOST, |columns| columns.saturating_sub(LABEL).clamp(FEWEST, MOST));
    // In eighths of a character.
    let scale = |seconds: f64| match total > 0.0 {
        true => (seconds / total * width as f64 * 8.0).round() as usize,
        false => 0,
    };
    let mut before = 0.0;
    reached
        .into_iter()
        .map(|(name, seconds)| {
            let start = (scale(before) / 8).min(width - 1);
            before += seconds;
            let length = scale(before).saturating_sub(start * 8).max(1);
            let bar = match name {
                NO_ANSWER => "░".repeat(length.div_ceil(8)),
                _ => "█".repeat(length / 8) + EIGHTHS[length % 8],
            };
            let bar = " ".repeat(start) + &bar;
            (name, seconds, bar)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_bar_begins_where_the_one_before_ended_and_none_is_empty() {
        let sample = Sample {
            dns_seconds: Some(0.0),
            connect_seconds: Some(0.1),
            tls_seconds: Some(0.2),
            ttfb_seconds: Some(0.1),
            ..Sample::default()
        };
        let all = |sample: &Sample<'_>, took| -> Vec<_> {
            let bars = bars(sample, took, None).into_iter();
            bars.map(|(name, _, bar)| (name, bar)).collect()
        };
        let sample = Sample {
            latency: Some(0.4),
            ..sample
        };
        let bars = all(&sample, Duration::from_secs(9));
        assert_eq!(
            bars,
            [
                ("name", "▏".to_owned()),
                ("connect", "█".repeat(10)),
                ("tls", " ".repeat(10) + &"█".repeat(20)),
                ("first byte", " ".repeat(30) + &"█".repeat(10)),
            ]
        );
        for (columns, widest) in [(200, 40), (40, 13), (0, 8)] {
            let bars = super::bars(&sample, Duration::ZERO, Some(columns));
            let width = bars.iter().map(|(.., bar)| bar.chars().count()).max();
            assert_eq!(width, Some(widest), "in {columns} columns");
        }
        let without_answer = Sample {
            connect_seconds: Some(0.1),
            ..Sample::default()
        };
        assert_eq!(
            all(&without_answer, Duration::from_millis(400)),
            [
                ("connect", "█".repeat(10)),
                ("no answer", " ".repeat(10) + &"░".repeat(30)),
            ]
        );
    }

    #[test]
    fn a_check_that_reached_no_phase_has_no_bars() {
        assert!(bars(&Sample::default(), Duration::ZERO, None).is_empty());
    }
}
