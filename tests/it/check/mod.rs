//! The HTTP check with scripted sites on loopback, by subject.
//!
//! This file has what the subjects share: configurations, checkers, and names that only these tests resolve.

mod bodies;
mod connecting;
mod heads;
mod limits;
mod names;
mod outcomes;
mod phases;
mod proxies;
mod redirects;
mod requests;
mod secrets;
mod tls;

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use flate2::Compression;
use flate2::write::GzEncoder;
use host_metrics::check::fault::NameError;
use host_metrics::check::http::{Checker, Checks};
use host_metrics::check::observation::Observation;
use host_metrics::check::pattern::Pattern;
use host_metrics::check::target::{IpFamily, StatusSet, Target};
use host_metrics::config::CheckConfig;
use host_metrics::sample::Outcome;
use url::Url;

use crate::site::{Authority, Site};

/// More time than any check here needs on a busy machine.
pub const LONG: Duration = Duration::from_secs(20);
/// The timeout of checks that are expected to reach it.
const SHORT: Duration = Duration::from_millis(1_000);

pub fn config() -> CheckConfig {
    CheckConfig {
        timeout: LONG,
        max_threads: 8,
        max_body_bytes: 64 * 1024,
        user_agent: "host-metrics/test".into(),
        ca_file: None,
        secrets_dir: None,
        agent_name: "test".into(),
    }
}

pub fn target(url: &str) -> Target {
    Target::new(url.into(), Url::parse(url).unwrap(), Duration::from_secs(60))
}

fn with_regex(url: &str, regex: &str) -> Target {
    Target {
        regex: Some(Pattern::new(regex).unwrap().into()),
        ..target(url)
    }
}

fn good(codes: std::ops::RangeInclusive<u16>) -> Option<StatusSet> {
    Some(StatusSet(vec![codes]))
}

#[expect(clippy::disallowed_methods, reason = "checks have deadlines")]
pub fn now() -> Instant {
    Instant::now()
}

fn checker() -> Checker {
    Checks::new(&config()).unwrap().checker()
}

fn trusting(authority: &Authority) -> Checker {
    let config = CheckConfig {
        ca_file: Some(authority.file.path().to_owned()),
        ..config()
    };
    Checks::with_lookup(&config, Box::new(names)).unwrap().checker()
}

/// Names that only these tests resolve.
pub fn names(name: &str, _family: Option<IpFamily>) -> Result<Vec<IpAddr>, NameError> {
    match name {
        "site.test" | "other.test" => Ok(vec![Ipv4Addr::LOCALHOST.into()]),
        "both.test" => Ok(vec![Ipv6Addr::LOCALHOST.into(), Ipv4Addr::LOCALHOST.into()]),
        "six.test" => Ok(vec![Ipv6Addr::LOCALHOST.into()]),
        "dead-first.test" => Ok(vec![
            Ipv4Addr::new(127, 0, 0, 2).into(),
            Ipv4Addr::LOCALHOST.into(),
        ]),
        "broken.test" => Err(NameError::Failed("the name servers failed".into())),
        "powerless.test" => Err(NameError::Agent("no memory".into())),
        "silent.test" => loop {
            std::thread::park();
        },
        _ => Err(NameError::NotFound(format!("there is no address for {name}"))),
    }
}

fn checker_with_names() -> Checker {
    Checks::with_lookup(&config(), Box::new(names)).unwrap().checker()
}

fn check(target: &Target) -> Observation {
    checker_with_names().check(target, now() + LONG)
}

/// Checks against a site that answers every request with `response`.
fn check_answer(response: impl Into<Vec<u8>>, regex: &str) -> Observation {
    let site = Site::answering(response);
    check(&with_regex(&site.url("/"), regex))
}

/// Verifies what holds for every observation.
fn assert_consistent(observation: &Observation) {
    assert_eq!(
        observation.outcome == Outcome::Ok,
        observation.error.is_none(),
        "{observation:?}"
    );
    assert_eq!(
        observation.latency.is_some(),
        observation.status_code.is_some(),
        "{observation:?}"
    );
    assert!(
        observation.error.as_ref().is_none_or(|text| !text.is_empty()),
        "{observation:?}"
    );
    if observation.status_code.is_some() {
        assert!(
            observation.redirects.is_some() && observation.ip.is_some(),
            "{observation:?}"
        );
        assert!(
            observation.phases.connect.is_some() && observation.phases.ttfb.is_some(),
            "{observation:?}"
        );
    }
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A response with `total` bytes of headers, in lines of `line` bytes.
fn headers_of(total: usize, line: usize) -> Vec<u8> {
    let mut head = b"HTTP/1.1 200 OK\r\n".to_vec();
    for number in 0..total / line {
        let name = format!("X-Filler-{number}: ");
        head.extend(name.as_bytes());
        head.extend(vec![b'x'; line - name.len() - 2]);
        head.extend(b"\r\n");
    }
    head.extend(b"Content-Length: 5\r\n\r\nhello");
    head
}
