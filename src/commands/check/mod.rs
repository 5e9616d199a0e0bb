//! `host-metrics check ADDRESS [REGEX]`: one check or several, reported in words or as the exact records.

mod advice;
mod excerpt;
mod timeline;

use std::fmt::Display;
use std::io;

use anstyle::{AnsiColor, Style};
use anyhow::Context;

use crate::check::details::{Certificate, Details, Exchange};
use crate::check::http::Checks;
use crate::check::observation::{Stamp, stamp};
use crate::check::target::Target;
use crate::cli;
use crate::clock::{instant_now, timestamp, wall_micros};
use crate::config::CheckConfig;
use crate::sample::{self, Outcome, Sample};
use crate::shutdown::{Shutdown, Wake};
use crate::terminal;

/// The most names of a certificate that are shown.
const NAMES_SHOWN: usize = 10;

const CANNOT_PRINT: &str = "cannot write to standard output";

/// Checks the target with the same code as `produce`, and hands each text to `print`. `columns` is the width of the terminal, if
/// there is one. Returns whether every check was valid. A shutdown, or a closed pipe, ends it between two checks.
pub fn run(
    config: &CheckConfig,
    target: &Target,
    options: &cli::Check,
    columns: Option<usize>,
    shutdown: &Shutdown,
    mut print: impl FnMut(&str) -> io::Result<()>,
) -> anyhow::Result<bool> {
    let checks = Checks::new(config)?;
    let mut results = Results::default();
    let first = instant_now();
    for number in 0..options.repeat {
        // From the start of one check to the start of the next. A check that takes longer than the interval delays the next one.
        let due = first + options.every.saturating_mul(number);
        if number > 0 && matches!(shutdown.wait_until(due), Wake::Stop) {
            break;
        }
        let (started_at, start) = (timestamp(wall_micros()), instant_now());
        let is_report = options.repeat == 1 && !options.json;
        let (mut checker, deadline) = (checks.checker(), start + target.timeout(config.timeout));
        let (observation, details) = match is_report {
            true => checker.check_in_detail(target, deadline),
            false => (checker.check(target, deadline), Details::default()),
        };
        let stamp_of_check = Stamp {
            scheduled_at: started_at,
            started_at: Some(started_at),
            interval: None,
            agent: &config.agent_name,
        };
        let sample = stamp(target, observation, stamp_of_check);
        results.add(&sample);
        let printed = print(&match (options.json, is_report) {
            (true, _) => json(&sample),
            (_, true) => report(&sample, target, &details, columns, options.headers),
            (..) => line(number + 1, &sample),
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
fn report(
    sample: &Sample<'_>,
    target: &Target,
    details: &Details,
    columns: Option<usize>,
    headers: bool,
) -> String {
    let mut lines = Lines {
        text: String::new(),
        columns,
    };
    lines.add("address", Some(terminal::plain(&sample.address)));
    let style = style(sample);
    let valid = if sample.is_valid { "yes" } else { "no" };
    lines.add("valid", Some(format!("{style}{valid}{style:#}")));
    lines.add("outcome", sample.outcome.as_deref().map(terminal::plain));
    lines.add("error", sample.error.as_deref().map(terminal::plain));
    lines.add("status", sample.status_code);
    lines.add("server", details.header("server").map(terminal::plain));
    let protocol = details.protocol.map(str::to_owned);
    let protocols: Vec<String> = protocol.into_iter().chain(details.tls.clone()).collect();
    lines.add("protocol", (!protocols.is_empty()).then(|| protocols.join(", ")));
    lines.add("ip", sample.ip);
    lines.add("redirects", sample.redirects.filter(|followed| *followed > 0));
    if details.exchanges.len() > 1 {
        for Exchange { url, status, took } in &details.exchanges {
            let took = millis(took.as_secs_f64());
            lines.add("", Some(format!("{took}  {status} {}", terminal::plain(url))));
        }
    }
    for (name, seconds, bar) in timeline::bars(sample, details.took, columns) {
        lines.add(name, Some(format!("{}  {bar}", millis(seconds))));
    }
    lines.add("latency", sample.latency.map(millis));
    lines.add(
        "slow",
        sample.slow.map(|is_slow| if is_slow { "yes" } else { "no" }),
    );
    lines.add("body", body(sample, details));
    add_regex(&mut lines, sample, target, details);
    let head = details.head.lines().filter(|line| headers && !line.is_empty());
    for (number, line) in head.enumerate() {
        let label = if number == 0 { "headers" } else { "" };
        lines.add(label, Some(terminal::plain(line)));
    }
    lines.add("certificate", certificate(sample));
    if let Some(certificate) = &details.certificate {
        add_certificate(&mut lines, certificate);
    }
    let outcome = sample.outcome.as_deref().and_then(Outcome::named);
    if let Some(advice) = outcome.and_then(advice::advice) {
        let status = sample.status_code.unwrap_or_default().to_string();
        let url = format!("'{}'", target.url.as_str().replace('\'', "%27"));
        let advice = advice.replace("STATUS", &status).replace("URL", &url);
        lines.text += &format!("\n{}\n", terminal::wrap(&advice, 0, columns));
    }
    lines.text
}

/// Where the regex was found, or else how the body begins.
fn add_regex(lines: &mut Lines, sample: &Sample<'_>, target: &Target, details: &Details) {
    let found = target.regex.as_ref().and_then(|regex| regex.find(&details.body));
    let regex = sample.regex_matched.map(|matched| match (matched, &found) {
        (true, Some(found)) => format!("found in {}", excerpt::around(&details.body, found.clone())),
        (true, None) => "found".to_owned(),
        (false, _) => "not found".to_owned(),
    });
    lines.add("regex", regex);
    let beginning = excerpt::beginning(&details.body);
    let is_shown = found.is_none() && !beginning.is_empty();
    lines.add("begins", is_shown.then_some(beginning));
}

fn add_certificate(lines: &mut Lines, certificate: &Certificate) {
    let all = |names: &[String]| terminal::plain(&names.join(", "));
    let names = &certificate.names[..certificate.names.len().min(NAMES_SHOWN)];
    let more = match certificate.names.len() - names.len() {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    lines.add("subject", Some(terminal::plain(&certificate.subject)));
    lines.add("issuer", Some(terminal::plain(&certificate.issuer)));
    lines.add("names", Some(all(names) + &more));
    let sent = certificate.chain.len();
    lines.add("chain", Some(format!("{sent} sent: {}", all(&certificate.chain))));
}

/// Size and type. The size of a body that the check does not read is what the server says.
fn body(sample: &Sample<'_>, details: &Details) -> Option<String> {
    let read = sample.body_bytes.map(|bytes| bytes.to_string());
    let size = read.or_else(|| details.header("content-length").map(str::to_owned));
    let size = size.map(|size| format!("{size} bytes"));
    let content_type = details.header("content-type").map(str::to_owned);
    let parts: Vec<String> = size.into_iter().chain(content_type).collect();
    (!parts.is_empty()).then(|| terminal::plain(&parts.join(", ")))
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

struct Lines {
    text: String,
    columns: Option<usize>,
}

impl Lines {
    fn add(&mut self, name: &str, value: Option<impl Display>) {
        if let Some(value) = value {
            let line = format!("{name:<12} {value}");
            self.text += &terminal::wrap(&line, 13, self.columns);
            self.text.push('\n');
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
    let expires_at = expires_at.to_string()[..16].replace('T', " ") + " UTC";
    Some(match left / MICROS_PER_DAY {
        _ if left < 0 => format!("expired {expires_at}"),
        1 => format!("expires {expires_at}, 1 day left"),
        days => format!("expires {expires_at}, {days} days left"),
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn target() -> Target {
        Target::new(
            "a".into(),
            "https://example.com/".parse().unwrap(),
            Duration::ZERO,
        )
    }

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
        let exchange = |url: &str, status, millis| Exchange {
            url: url.into(),
            status,
            took: Duration::from_millis(millis),
        };
        let details = Details {
            exchanges: vec![
                exchange("http://example.com/", 301, 10),
                exchange("https://example.com/", 503, 20),
            ],
            protocol: Some("HTTP/1.1"),
            tls: Some("TLS 1.3, TLS_AES_128_GCM_SHA256".into()),
            certificate: Some(Certificate {
                subject: "CN=example.com".into(),
                issuer: "O=Example, CN=CA".into(),
                names: (0..12).map(|number| format!("n{number}")).collect(),
                chain: vec!["example.com".into(), "CA".into()],
            }),
            head: "HTTP/1.1 503 Busy\r\nContent-Type: text/html\r\nserver : nginx\r\n\r\n".into(),
            body: "<html>\nService Unavailable".into(),
            took: Duration::from_millis(124),
        };
        assert_eq!(
            plain(&report(&known, &target(), &details, None, true)),
            "address      example.com\n\
             valid        no\n\
             outcome      bad_status\n\
             error        status 503\n\
             status       503\n\
             server       nginx\n\
             protocol     HTTP/1.1, TLS 1.3, TLS_AES_128_GCM_SHA256\n\
             ip           192.0.2.1\n\
             redirects    1\n\
             \x20               10.000 ms  301 http://example.com/\n\
             \x20               20.000 ms  503 https://example.com/\n\
             name            12.000 ms  ████████████████████████████████████████\n\
             latency        123.456 ms\n\
             slow         yes\n\
             body         512 bytes, text/html\n\
             regex        not found\n\
             begins       <html> Service Unavailable\n\
             headers      HTTP/1.1 503 Busy\n\
             \x20            Content-Type: text/html\n\
             \x20            server : nginx\n\
             certificate  expires 2026-01-31 12:00 UTC, 30 days left\n\
             subject      CN=example.com\n\
             issuer       O=Example, CN=CA\n\
             names        n0, n1, n2, n3, n4, n5, n6, n7, n8, n9 and 2 more\n\
             chain        2 sent: example.com, CA\n\
             \n"
            .to_owned()
                + &advice::advice(Outcome::BadStatus)
                    .unwrap()
                    .replace("STATUS", "503")
                + "\n"
        );
    }

    #[test]
    fn values_that_are_not_known_have_no_line() {
        assert_eq!(
            plain(&report(&sample(), &target(), &Details::default(), None, false)),
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
        assert!(
            report(&expired, &target(), &Details::default(), None, false)
                .ends_with("certificate  expired 2026-01-01 23:59 UTC\n")
        );
    }
}
