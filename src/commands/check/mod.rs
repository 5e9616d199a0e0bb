//! `host-metrics check ADDRESS [REGEX]`: one check or several, reported in words or as the exact records.

mod advice;
mod timeline;

use std::fmt::Display;
use std::io;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anstyle::{AnsiColor, Style};
use anyhow::Context;

use crate::check::http::Checks;
use crate::check::observation::{Stamp, stamp};
use crate::check::target::Target;
use crate::config::CheckConfig;
use crate::sample::{self, Outcome, Sample, Timestamp};
use crate::shutdown::{Shutdown, Wake};
use crate::terminal;

const CANNOT_PRINT: &str = "cannot write to standard output";

/// How many checks to make, and how.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub repeat: u32,
    /// From the start of one check to the start of the next.
    pub every: Duration,
    /// Print each record's JSON.
    pub json: bool,
}

/// Checks the target with the same code as `produce`, and hands each text to `print`. True if every check was valid. A
/// shutdown, or a closed pipe, ends it between two checks.
///
/// # Errors
/// This machine cannot make checks, or `print` failed.
pub fn run(
    config: &CheckConfig,
    target: &Target,
    options: Options,
    shutdown: &Shutdown,
    mut print: impl FnMut(&str) -> io::Result<()>,
) -> anyhow::Result<bool> {
    let checks = Checks::new(config)?;
    let mut results = Results::default();
    let (_, first) = now()?;
    for number in 0..options.repeat {
        // A check that takes longer than the interval delays the next one.
        let due = first + options.every.saturating_mul(number);
        if number > 0 && matches!(shutdown.wait_until(due), Wake::Stop) {
            break;
        }
        let (started_at, start) = now()?;
        let observation = checks
            .checker()
            .check(target, start + target.timeout(config.timeout));
        let stamp_of_check = Stamp {
            scheduled_at: started_at,
            started_at: Some(started_at),
            interval: None,
            agent: &config.agent_name,
        };
        let sample = stamp(target, observation, stamp_of_check);
        results.add(&sample);
        let printed = print(&match (options.json, options.repeat) {
            (true, _) => json(&sample),
            (false, 1) => report(&sample),
            (false, _) => line(number + 1, &sample),
        });
        match printed {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(results.failed == 0),
            printed => printed.context(CANNOT_PRINT)?,
        }
    }
    if options.repeat > 1 && !options.json {
        print(&results.summary()).context(CANNOT_PRINT)?;
    }
    Ok(results.failed == 0)
}

/// The record's value with hidden characters escaped, and a newline.
fn json(sample: &Sample<'_>) -> String {
    let mut value = Vec::new();
    sample::encode(sample, &mut value);
    let mut line = terminal::plain_json(&String::from_utf8_lossy(&value));
    line.push('\n');
    line
}

/// The check as text for people: a line for each value that is known, the phases drawn to scale, and advice after a failure.
fn report(sample: &Sample<'_>) -> String {
    let mut lines = Lines::default();
    lines.add("address", Some(terminal::plain(&sample.address)));
    let style = style(sample);
    let valid = if sample.is_valid { "yes" } else { "no" };
    lines.add("valid", Some(format!("{style}{valid}{style:#}")));
    lines.add("outcome", sample.outcome.as_deref().map(terminal::plain));
    lines.add("error", sample.error.as_deref().map(terminal::plain));
    lines.add("status", sample.status_code);
    lines.add(
        "regex",
        sample
            .regex_matched
            .map(|matched| if matched { "found" } else { "not found" }),
    );
    lines.add("ip", sample.ip);
    lines.add("redirects", sample.redirects.filter(|followed| *followed > 0));
    for (name, seconds, bar) in timeline::bars(sample) {
        lines.add(name, Some(format!("{}  {bar}", millis(seconds))));
    }
    lines.add("latency", sample.latency.map(millis));
    lines.add(
        "slow",
        sample.slow.map(|is_slow| if is_slow { "yes" } else { "no" }),
    );
    lines.add(
        "body size",
        sample.body_bytes.map(|bytes| format!("{bytes} bytes")),
    );
    lines.add("certificate", certificate(sample));
    if let Some(advice) = outcome(sample).and_then(advice::advice) {
        lines.0 += &format!("\n{advice}\n");
    }
    lines.0
}

fn outcome(sample: &Sample<'_>) -> Option<Outcome> {
    let word = sample.outcome.as_deref()?;
    Outcome::ALL.into_iter().find(|outcome| outcome.as_str() == word)
}

fn style(sample: &Sample<'_>) -> Style {
    match sample.is_valid {
        true => AnsiColor::Green.on_default(),
        false => AnsiColor::Red.on_default().bold(),
    }
}

/// One of several checks on a line.
fn line(number: u32, sample: &Sample<'_>) -> String {
    let style = style(sample);
    let outcome = sample.outcome.as_deref().map(terminal::plain).unwrap_or_default();
    let mut line = format!(
        "{number:>4}  {}  {style}{outcome}{style:#}",
        sample
            .latency
            .map_or_else(|| format!("{:>12}", terminal::NONE), millis)
    );
    if let Some(error) = &sample.error {
        line += "  ";
        line += &terminal::plain(error);
    }
    line.push('\n');
    line
}

/// What several checks have shown.
#[derive(Debug, Default)]
struct Results {
    checks: usize,
    failed: usize,
    latencies: Vec<f64>,
}

impl Results {
    fn add(&mut self, sample: &Sample<'_>) {
        self.checks += 1;
        self.failed += usize::from(!sample.is_valid);
        self.latencies.extend(sample.latency);
    }

    fn summary(&mut self) -> String {
        let valid = self.checks - self.failed;
        let mut text = format!("\n{valid} of {} checks were valid\n", self.checks);
        self.latencies.sort_unstable_by(f64::total_cmp);
        // The nearest rank: the smallest value that at least this share of the values do not exceed.
        let at = |share: f64| {
            let rank = (share * self.latencies.len() as f64).ceil() as usize;
            self.latencies.get(rank.saturating_sub(1))
        };
        for (name, share) in [("minimum", 0.0), ("median", 0.5), ("p95", 0.95), ("maximum", 1.0)] {
            if let Some(latency) = at(share) {
                text += &format!("{name:<8}  {}\n", millis(*latency));
            }
        }
        text
    }
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

    fn plain(text: &str) -> String {
        anstream::adapter::strip_str(text).to_string()
    }

    #[test]
    fn several_checks_end_with_how_many_were_valid_and_how_long_they_took() {
        let mut results = Results::default();
        for latency in [0.4, 0.1, 0.2, 0.3] {
            results.add(&Sample {
                is_valid: latency < 0.4,
                latency: Some(latency),
                ..sample()
            });
        }
        results.add(&sample());
        assert_eq!(
            results.summary(),
            "\n3 of 5 checks were valid\n\
             minimum     100.000 ms\n\
             median      200.000 ms\n\
             p95         400.000 ms\n\
             maximum     400.000 ms\n"
        );
        assert_eq!(Results::default().summary(), "\n0 of 0 checks were valid\n");
    }

    #[test]
    fn the_report_has_a_line_for_each_value_that_is_known() {
        let known = Sample {
            outcome: Some("bad_status".into()),
            error: Some("status 503".into()),
            status_code: Some(503),
            latency: Some(0.123_456),
            slow: Some(true),
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
            plain(&report(&known)),
            "address      example.com\n\
             valid        no\n\
             outcome      bad_status\n\
             error        status 503\n\
             status       503\n\
             regex        not found\n\
             ip           192.0.2.1\n\
             redirects    1\n\
             name            12.000 ms  ████████████████████████████████████████\n\
             latency        123.456 ms\n\
             slow         yes\n\
             body size    512 bytes\n\
             certificate  expires 2026-01-31T12:00:00.000000Z, 30 days left\n\
             \n"
            .to_owned()
                + advice::advice(Outcome::BadStatus).unwrap()
                + "\n"
        );
    }

    #[test]
    fn values_that_are_not_known_have_no_line() {
        assert_eq!(
            plain(&report(&sample())),
            "address      example.com\nvalid        no\n"
        );
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
