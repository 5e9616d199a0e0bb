//! `host-metrics check ADDRESS [REGEX]`: one check, reported in words or as the exact record.

use std::fmt::Display;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context;

use crate::check::http::Checks;
use crate::check::observation::{Stamp, stamp};
use crate::check::target::Target;
use crate::config::CheckConfig;
use crate::sample::{self, Sample, Timestamp};
use crate::terminal;

/// Checks the target once, with the same code as `produce`.
///
/// # Errors
/// This machine cannot make checks.
pub fn run<'a>(config: &'a CheckConfig, target: &'a Target) -> anyhow::Result<Sample<'a>> {
    let checks = Checks::new(config)?;
    let (started_at, start) = now()?;
    let deadline = start + target.timeout(config.timeout);
    let observation = checks.checker().check(target, deadline);
    let stamp_of_check = Stamp {
        scheduled_at: started_at,
        started_at: Some(started_at),
        interval: None,
        agent: &config.agent_name,
    };
    Ok(stamp(target, observation, stamp_of_check))
}

/// The record's value with hidden characters escaped, and a newline.
pub fn json(sample: &Sample<'_>) -> String {
    let mut value = Vec::new();
    sample::encode(sample, &mut value);
    let mut line = terminal::plain_json(&String::from_utf8_lossy(&value));
    line.push('\n');
    line
}

/// The result as text for people: a line for each value that is known.
pub fn report(sample: &Sample<'_>) -> String {
    let mut lines = Lines::default();
    lines.add("address", Some(&sample.address));
    lines.add("valid", Some(if sample.is_valid { "yes" } else { "no" }));
    lines.add("outcome", sample.outcome.as_ref());
    lines.add("error", sample.error.as_ref());
    lines.add("status", sample.status_code);
    lines.add(
        "regex",
        sample
            .regex_matched
            .map(|matched| if matched { "found" } else { "not found" }),
    );
    lines.add("ip", sample.ip);
    lines.add("redirects", sample.redirects.filter(|followed| *followed > 0));
    lines.add("name", sample.dns_seconds.map(millis));
    lines.add("connect", sample.connect_seconds.map(millis));
    lines.add("tls", sample.tls_seconds.map(millis));
    lines.add("first byte", sample.ttfb_seconds.map(millis));
    lines.add("body", sample.body_seconds.map(millis));
    lines.add("latency", sample.latency.map(millis));
    lines.add(
        "body size",
        sample.body_bytes.map(|bytes| format!("{bytes} bytes")),
    );
    lines.add("certificate", certificate(sample));
    lines.0
}

#[derive(Default)]
struct Lines(String);

impl Lines {
    fn add(&mut self, name: &str, value: Option<impl Display>) {
        if let Some(value) = value {
            self.0 += &format!("{name:<12} {value}\n");
        }
    }
}

fn millis(seconds: f64) -> String {
    format!("{:>9.3} ms", seconds * 1e3)
}

fn certificate(sample: &Sample<'_>) -> Option<String> {
    const MICROS_PER_DAY: i64 = 86_400_000_000;
    let expires_at = sample.cert_expires_at?;
    let left = expires_at.unix_micros() - sample.started_at?.unix_micros();
    Some(match left / MICROS_PER_DAY {
        _ if left < 0 => format!("expired {expires_at}"),
        1 => format!("expires {expires_at}, 1 day left"),
        days => format!("expires {expires_at}, {days} days left"),
    })
}

#[expect(clippy::disallowed_methods, reason = "an edge: the check begins now")]
fn now() -> anyhow::Result<(Timestamp, Instant)> {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let timestamp = i64::try_from(since_epoch.as_micros())
        .ok()
        .and_then(Timestamp::from_unix_micros)
        .context("this machine's clock is after the year 9999")?;
    Ok((timestamp, Instant::now()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Sample<'static> {
        let record = br#"{"address": "example.com", "is_valid": false}"#;
        sample::decode(record).unwrap()
    }

    #[test]
    fn the_report_has_a_line_for_each_value_that_is_known() {
        let known = Sample {
            outcome: Some("bad_status".into()),
            error: Some("status 503".into()),
            status_code: Some(503),
            latency: Some(0.123_456),
            dns_seconds: Some(0.012),
            ip: Some("192.0.2.1".parse().unwrap()),
            redirects: Some(1),
            regex_matched: Some(false),
            body_bytes: Some(512),
            started_at: Some("2026-01-01T00:00:00Z".parse().unwrap()),
            cert_expires_at: Some("2026-01-31T12:00:00Z".parse().unwrap()),
            ..sample()
        };
        assert_eq!(
            report(&known),
            "address      example.com\n\
             valid        no\n\
             outcome      bad_status\n\
             error        status 503\n\
             status       503\n\
             regex        not found\n\
             ip           192.0.2.1\n\
             redirects    1\n\
             name            12.000 ms\n\
             latency        123.456 ms\n\
             body size    512 bytes\n\
             certificate  expires 2026-01-31T12:00:00.000000Z, 30 days left\n"
        );
    }

    #[test]
    fn values_that_are_not_known_have_no_line() {
        assert_eq!(report(&sample()), "address      example.com\nvalid        no\n");
    }

    #[test]
    fn an_expired_certificate_is_reported_as_expired() {
        let expired = Sample {
            started_at: Some("2026-01-02T00:00:00Z".parse().unwrap()),
            cert_expires_at: Some("2026-01-01T23:59:59Z".parse().unwrap()),
            ..sample()
        };
        assert!(report(&expired).ends_with("certificate  expired 2026-01-01T23:59:59.000000Z\n"));
    }
}
