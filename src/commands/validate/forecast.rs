//! What checking the hosts takes: threads, files, memory, records and bytes.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use super::Measured;
use crate::check::http::{BROTLI_DECODER_BYTES, MAX_BROTLI_DECODERS, READING_BYTES};
use crate::check::pattern::Pattern;
use crate::check::target::Target;
use crate::config::CheckConfig;
use crate::duration;
use crate::limits::OTHER_FILES;
use crate::terminal::plain;

/// A row of the table that `init` creates, with its index entry: in Postgres 15 a row with an address of 41 bytes takes 222 bytes
/// (`tables::schema::COLUMNS`), and its entry in the index on address and hour about 10 (`tables::views::HOUR`).
const BYTES_PER_ROW: f64 = 240.0;

/// A bucket of the state with its index entry: in Postgres 15 an hour of 60 checks takes 143 bytes, its entry in the index 42, and
/// the rest is space that autovacuum has not freed yet.
const BYTES_PER_BUCKET: f64 = 200.0;

/// The buckets that the state keeps of a host that is checked all the time: days and hours of a year, and two days of five minutes.
const BUCKETS_PER_YEAR: [f64; 3] = [365.0, 8_760.0, 576.0];

const SECONDS_PER_DAY: f64 = 86_400.0;
const DAYS_PER_MONTH: f64 = 30.0;

/// What a check costs beside the check itself: waking up for its tick, and its record on the way to Kafka. Measured by
/// `make bench-produce`, as are the figures of memory.
const OVERHEAD: Duration = Duration::from_micros(50);
const BYTES_OF_PRODUCE: f64 = 12e6;
const BYTES_PER_HOST: f64 = 1_500.0;
const BYTES_PER_HTTP_CHECK: f64 = 75e3;
const BYTES_PER_HTTPS_CHECK: f64 = 120e3;

/// How long a check is assumed to take where `--try` does not say it.
const ASSUMED: Duration = Duration::from_millis(300);

pub(super) fn forecast(config: &CheckConfig, targets: &[Target], measured: &Measured) -> Vec<Vec<String>> {
    let per_second: f64 = targets.iter().map(rate).sum();
    let per_day = per_second * SECONDS_PER_DAY;
    let beginning = [
        ("hosts", targets.len().to_string()),
        ("checks/s", figure(per_second)),
        ("cpu", cpu(targets, measured)),
    ];
    let table = bytes(per_day * DAYS_PER_MONTH * BYTES_PER_ROW);
    let buckets: f64 = targets.iter().map(buckets).sum();
    let stored = [
        ("records/day", format!("{per_day:.0}")),
        (
            "table/month",
            format!("{table}, at {BYTES_PER_ROW} bytes per row including the index"),
        ),
        (
            "state/year",
            format!("{} for each place that checks", bytes(buckets * BYTES_PER_BUCKET)),
        ),
    ];
    let lines = beginning.into_iter().chain(at_once(config, targets, measured));
    let bodies = bodies(config, targets).map(|bodies| ("bodies", bodies));
    lines
        .chain(bodies)
        .chain(stored)
        .map(|(name, value)| vec![name.to_owned(), value])
        .collect()
}

fn cpu(targets: &[Target], measured: &Measured) -> String {
    let cost = match &measured.cost {
        Ok(cost) => cost,
        Err(reason) => return format!("unknown: {}", plain(reason)),
    };
    let [http, https] = [cost.http, cost.https].map(|check| (check + OVERHEAD).as_secs_f64());
    let of = |target: &Target| if is_https(target) { https } else { http };
    let busy: f64 = targets.iter().map(|target| rate(target) * of(target)).sum();
    let [http, https] = [http, https].map(|check| format!("{:.2} ms", check * 1e3));
    format!(
        "{} % of a core, at {http} per check over http and {https} over https (measured here)",
        figure(busy * 100.0)
    )
}

/// What the checks that are under way at the same time need.
fn at_once(config: &CheckConfig, targets: &[Target], measured: &Measured) -> [(&'static str, String); 3] {
    let under_way = |(index, target): (usize, &Target)| {
        let took = measured.tried.as_ref().map_or(ASSUMED, |tried| tried[index].took);
        rate(target) * took.as_secs_f64()
    };
    let under_way: f64 = targets.iter().enumerate().map(under_way).sum();
    let expected = (under_way.ceil() as usize).clamp(1, targets.len().clamp(1, config.max_threads));
    let at_worst = targets.len().min(config.max_threads);
    let when = match measured.tried {
        Some(_) => "if checks take as long as now".to_owned(),
        None => format!("if a check takes {}", duration::text(ASSUMED)),
    };
    let per_check = match targets.iter().any(is_https) {
        true => BYTES_PER_HTTPS_CHECK,
        false => BYTES_PER_HTTP_CHECK,
    };
    let [few, most] = [expected, at_worst].map(|checks| {
        bytes(BYTES_OF_PRODUCE + targets.len() as f64 * BYTES_PER_HOST + checks as f64 * per_check)
    });
    let files = |checks: usize| checks as u64 + OTHER_FILES;
    [
        (
            "threads",
            format!("about {expected} {when}, at most {at_worst} if every host hangs"),
        ),
        (
            "files",
            format!("about {}, at most {}", files(expected), files(at_worst)),
        ),
        (
            "memory",
            format!("about {few}, at most {most} if every host hangs"),
        ),
    ]
}

/// How many buckets the state has of a host after a year.
fn buckets(target: &Target) -> f64 {
    let kept_for_days = [365.0, 365.0, 2.0];
    let kept = BUCKETS_PER_YEAR.iter().zip(kept_for_days);
    kept.map(|(most, days)| most.min(rate(target) * SECONDS_PER_DAY * days))
        .sum()
}

/// The most memory that hosts with a REGEX or `json=` take in addition to the checks themselves: when all of them are checked at once
/// and each sends a brotli body of the full length.
fn bodies(config: &CheckConfig, targets: &[Target]) -> Option<String> {
    let regexes = targets.iter().filter_map(|target| target.regex.as_ref());
    let mut searches: Vec<u64> = targets
        .iter()
        .filter(|target| target.reads_body())
        .map(|target| {
            let search = target
                .regex
                .as_ref()
                .map_or(0, |regex| regex.search_bytes() as u64);
            // A document is kept as text, where each byte that is not UTF-8 takes three.
            let document = if target.json.is_empty() {
                0
            } else {
                3 * config.max_body_bytes
            };
            search + document
        })
        .collect();
    searches.sort_unstable_by_key(|bytes| std::cmp::Reverse(*bytes));
    searches.truncate(config.max_threads);
    let body = config.max_body_bytes + READING_BYTES;
    let decoders = MAX_BROTLI_DECODERS.min(searches.len()) as u64;
    let reading = searches.iter().map(|search| search + body).sum::<u64>()
        + decoders * (BROTLI_DECODER_BYTES + config.max_body_bytes);
    let distinct: HashMap<*const Pattern, usize> = regexes
        .map(|regex| (Arc::as_ptr(regex), regex.compiled_bytes()))
        .collect();
    let compiled: usize = distinct.values().sum();
    (!searches.is_empty()).then(|| {
        format!(
            "at most {} more memory while bodies are read (up to {} at once, MAX_BODY_BYTES={}), and {} for the compiled regexes ({} distinct)",
            bytes(reading as f64),
            searches.len(),
            config.max_body_bytes,
            bytes(compiled as f64),
            distinct.len()
        )
    })
}

fn is_https(target: &Target) -> bool {
    target.url.scheme() == "https"
}

/// In checks per second.
pub(super) fn rate(target: &Target) -> f64 {
    target.interval.as_secs_f64().recip()
}

/// With two significant digits.
pub(super) fn figure(number: f64) -> String {
    let mut decimals = 2;
    let mut scaled = number;
    while scaled < 0.1 && decimals < 10 {
        scaled *= 10.0;
        decimals += 1;
    }
    format!("{number:.decimals$}")
}

fn bytes(count: f64) -> String {
    let units = ["bytes", "KB", "MB", "GB", "TB", "PB"];
    let mut scaled = count;
    let mut unit = units[0];
    for next in &units[1..] {
        if scaled < 999.5 {
            break;
        }
        scaled /= 1_000.0;
        unit = next;
    }
    format!("{scaled:.0} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_two_significant_digits() {
        let rates = [
            (0.05333, "0.053"),
            (0.5, "0.50"),
            (12.345, "12.35"),
            (3.2e-8, "0.000000032"),
        ];
        for (number, expected) in rates {
            assert_eq!(figure(number), expected);
        }
        let sizes = [
            (0.4, "0 bytes"),
            (999.0, "999 bytes"),
            (1_000.0, "1 KB"),
            (41_472_000.0, "41 MB"),
            (7.8e13, "78 TB"),
        ];
        for (count, expected) in sizes {
            assert_eq!(bytes(count), expected);
        }
    }
}
