//! The phases of a check as bars on one scale, each beginning where the one before ended. Pure.

use crate::sample::Sample;

/// The width of all phases together, in characters.
const WIDTH: f64 = 40.0;

/// A bar's last character, in eighths.
const EIGHTHS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];

/// Name, seconds and bar of each phase that was reached. The bar has the spaces before it, and every phase is visible.
pub(super) fn bars(sample: &Sample<'_>) -> Vec<(&'static str, f64, String)> {
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
    // In eighths of a character.
    let scale = |seconds: f64| match total > 0.0 {
        true => (seconds / total * WIDTH * 8.0).round() as usize,
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
        let bars: Vec<_> = bars(&sample)
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
    }

    #[test]
    fn a_check_that_reached_no_phase_has_no_bars() {
        assert!(bars(&Sample::default()).is_empty());
    }
}
