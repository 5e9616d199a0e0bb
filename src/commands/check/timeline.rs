//! The phases of a check as bars on one scale, each beginning where the one before ended. Pure.

use crate::sample::Sample;

/// The most and the fewest characters that all phases together take.
const MOST: usize = 40;
const FEWEST: usize = 8;

/// What stands before a bar.
const LABEL: usize = 27;

/// A bar's last character, in eighths.
const EIGHTHS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];

/// Name, seconds and bar of each phase that was reached. The bar has the spaces before it, and every phase is visible.
pub(super) fn bars(sample: &Sample<'_>, columns: Option<usize>) -> Vec<(&'static str, f64, String)> {
    let phases = [
        ("name", sample.dns_seconds),
        ("connect", sample.connect_seconds),
        ("tls", sample.tls_seconds),
        ("first byte", sample.ttfb_seconds),
        ("body", sample.body_seconds),
    ];
    let reached: Vec<_> = phases
        .into_iter()
        .filter_map(|(name, seconds)| Some((name, seconds?)))
        .collect();
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
            let start = scale(before) / 8;
            before += seconds;
            let length = scale(before).saturating_sub(start * 8).max(1);
            let bar = " ".repeat(start) + &"█".repeat(length / 8) + EIGHTHS[length % 8];
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
        let bars: Vec<_> = bars(&sample, None)
            .into_iter()
            .map(|(name, _, bar)| (name, bar))
            .collect();
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
            let bars = super::bars(&sample, Some(columns));
            let width = bars.iter().map(|(.., bar)| bar.chars().count()).max();
            assert_eq!(width, Some(widest), "in {columns} columns");
        }
    }

    #[test]
    fn a_check_that_reached_no_phase_has_no_bars() {
        assert!(bars(&Sample::default(), None).is_empty());
    }
}
