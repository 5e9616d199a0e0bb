//! `host-metrics validate`: lists the hosts as they are understood, and forecasts what checking them takes.
//!
//! Pure.

use std::collections::HashMap;
use std::sync::Arc;

use url::Host;

use crate::check::http::{BROTLI_DECODER_BYTES, MAX_BROTLI_DECODERS, READING_BYTES};
use crate::check::json::JsonRule;
use crate::check::pattern::Pattern;
use crate::check::target::{DEFAULT_FOLLOW, Header, HeaderValue, IpFamily, Method, Target};
use crate::config::ValidateConfig;
use crate::duration;
use crate::produce::host_file::Hosts;
use crate::terminal::plain;

/// A row of the table that `init` creates, with its index entry: in Postgres 15 a row of 21 columns takes 215 to 224 bytes,
/// and its entry in the index on address and time about 80.
const BYTES_PER_ROW: f64 = 300.0;

const SECONDS_PER_DAY: f64 = 86_400.0;
const DAYS_PER_MONTH: f64 = 30.0;

/// The hosts, the forecast and the warnings, as they are printed.
pub fn report(config: &ValidateConfig, hosts: &Hosts) -> String {
    let targets = &hosts.targets;
    let mut text = String::new();
    list(config, targets, &mut text);
    text.push('\n');
    forecast(config, targets, &mut text);
    let slips = hosts.warnings.iter().cloned();
    let mut warnings = slips.chain(warnings(config, targets)).peekable();
    if warnings.peek().is_some() {
        text.push('\n');
    }
    for warning in warnings {
        text += &format!("warning: {warning}\n");
    }
    text
}

fn list(config: &ValidateConfig, targets: &[Target], text: &mut String) {
    text.push_str("EVERY   TIMEOUT HOST\n");
    for target in targets {
        let interval = duration::text(target.interval);
        let timeout = duration::text(target.timeout(config.timeout));
        *text += &format!("{interval:<7} {timeout:<7} {}", target.address);
        if target.url.as_str().trim_end_matches('/') != target.address.trim_end_matches('/') {
            *text += &format!(" -> {}", target.url);
        }
        for word in understood(target) {
            *text += &format!(", {word}");
        }
        text.push('\n');
    }
}

/// What the line sets beside the address and the times.
fn understood(target: &Target) -> Vec<String> {
    let mut words = Vec::new();
    if target.method != Method::Get {
        words.push(target.method.as_str().to_owned());
    }
    for Header { name, value } in &target.headers {
        words.push(match value {
            HeaderValue::Plain(_) => format!("header {name}"),
            HeaderValue::Secret(_, secret) => format!("header {name} from {secret:?}"),
        });
    }
    if let Some(body) = &target.body {
        words.push(format!("sends {} bytes", body.bytes.len()));
    }
    if let Some(secret) = &target.auth {
        words.push(format!("authorization from {secret:?}"));
    }
    if let Some(secret) = &target.cert {
        words.push(format!("client certificate {secret:?}"));
    }
    if target.plain_auth {
        words.push("secrets also over http".to_owned());
    }
    if let Some(proxy) = &target.proxy {
        words.push(format!("through {proxy}"));
    }
    if let Some(status) = &target.status {
        words.push(format!("good status {status}"));
    }
    match target.follow {
        DEFAULT_FOLLOW => {}
        0 => words.push("redirects not followed".to_owned()),
        follow => words.push(format!("at most {follow} redirects")),
    }
    match target.ip_family {
        Some(IpFamily::V4) => words.push("IPv4 only".to_owned()),
        Some(IpFamily::V6) => words.push("IPv6 only".to_owned()),
        None => {}
    }
    if target.tls_insecure {
        words.push("certificate not verified".to_owned());
    }
    if target.tls_required {
        words.push("redirects to http refused".to_owned());
    }
    if let Some(topic) = &target.topic {
        words.push(format!("topic {topic}"));
    }
    if let Some(slow) = target.slow {
        words.push(format!("slow above {}", duration::text(slow)));
    }
    if let Some(days) = target.cert_days {
        words.push(format!("certificate valid for {days} days"));
    }
    for (option, text) in [("name", &target.name), ("group", &target.group)] {
        if let Some(text) = text {
            words.push(format!("{option} {}", plain(text)));
        }
    }
    for JsonRule { pointer, expected } in &target.json {
        words.push(format!("JSON {} is {}", plain(pointer), plain(expected)));
    }
    if let Some(regex) = &target.regex {
        let verb = if target.regex_absent {
            "does not match"
        } else {
            "matches"
        };
        words.push(format!("body {verb} {}", plain(regex.as_str())));
    }
    words
}

fn forecast(config: &ValidateConfig, targets: &[Target], text: &mut String) {
    let checks_per_second: f64 = targets
        .iter()
        .map(|target| target.interval.as_secs_f64().recip())
        .sum();
    let records_per_day = checks_per_second * SECONDS_PER_DAY;
    let threads = targets.len().min(config.max_threads);
    let month = bytes(records_per_day * DAYS_PER_MONTH * BYTES_PER_ROW);
    let lines = [
        ("hosts", targets.len().to_string()),
        ("checks/s", rate(checks_per_second)),
        ("threads", format!("at most {threads}, if every host hangs")),
        ("records/day", format!("{records_per_day:.0}")),
        (
            "table/month",
            format!("{month}, at {BYTES_PER_ROW} bytes per row including the index"),
        ),
    ];
    let memory = memory(config, targets).map(|memory| ("memory", memory));
    for (name, value) in lines.into_iter().chain(memory) {
        *text += &format!("{name:<12} {value}\n");
    }
}

/// The most memory that hosts with a REGEX or `json=` take in addition to the checks themselves: when all of them are checked at once
/// and each sends a brotli body of the full length.
fn memory(config: &ValidateConfig, targets: &[Target]) -> Option<String> {
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
            "at most {} while bodies are read (up to {} at once, MAX_BODY_BYTES={}), and {} for the compiled regexes ({} distinct)",
            bytes(reading as f64),
            searches.len(),
            config.max_body_bytes,
            bytes(compiled as f64),
            distinct.len()
        )
    })
}

fn warnings<'a>(config: &'a ValidateConfig, targets: &'a [Target]) -> impl Iterator<Item = String> + 'a {
    let cut = targets.iter().filter_map(|target| {
        let asked = target.timeout?;
        let got = target.timeout(config.timeout);
        (got < asked).then(|| {
            format!(
                "{}: timeout={} is reduced to {}, 95 % of the interval of {}, so that a check ends before the next one is due",
                target.address,
                duration::text(asked),
                duration::text(got),
                duration::text(target.interval)
            )
        })
    });
    let without_address = targets.iter().filter_map(|target| {
        let is_impossible = matches!(
            (target.url.host(), target.ip_family),
            (Some(Host::Ipv4(_)), Some(IpFamily::V6)) | (Some(Host::Ipv6(_)), Some(IpFamily::V4))
        );
        is_impossible.then(|| {
            format!(
                "{}: every check will fail, because ip= requires the other address family",
                target.address
            )
        })
    });
    let defaulted = targets
        .iter()
        .filter(|target| target.timeout.is_none() && target.timeout(config.timeout) < config.timeout)
        .count();
    let default_cut = (defaulted > 0).then(|| {
        format!(
            "CHECK_TIMEOUT ({}) is reduced to 95 % of the interval for {defaulted} of the hosts; see the column TIMEOUT",
            duration::text(config.timeout)
        )
    });
    let too_many = (targets.len() > config.max_threads).then(|| {
        format!(
            "there are {} hosts, but MAX_THREADS={}: while that many hosts hang, checks of the others are missed",
            targets.len(),
            config.max_threads
        )
    });
    cut.chain(without_address).chain(default_cut).chain(too_many)
}

/// With two significant digits.
fn rate(per_second: f64) -> String {
    let mut decimals = 2;
    let mut scaled = per_second;
    while scaled < 0.1 && decimals < 10 {
        scaled *= 10.0;
        decimals += 1;
    }
    format!("{per_second:.decimals$}")
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
    use std::time::Duration;

    use super::*;
    use crate::produce::host_file;

    fn report_of(hosts: &str) -> String {
        let config = ValidateConfig {
            timeout: Duration::from_secs(10),
            max_threads: 3,
            max_body_bytes: 1 << 20,
        };
        report(&config, &host_file::parse("hosts", hosts.as_bytes()).unwrap())
    }

    #[test]
    fn every_host_is_listed_as_understood_and_the_forecast_adds_them_up() {
        assert_eq!(
            report_of(
                "https://google.com 5\n\
                 example.com 30s\n\
                 http://10.0.0.7:8080/health 1m (status: (ok|warn))\n"
            ),
            "EVERY   TIMEOUT HOST\n\
             5m      10s     https://google.com\n\
             30s     10s     example.com -> https://example.com/\n\
             1m      10s     http://10.0.0.7:8080/health, body matches (status: (ok|warn))\n\
             \n\
             hosts        3\n\
             checks/s     0.053\n\
             threads      at most 3, if every host hangs\n\
             records/day  4608\n\
             table/month  41 MB, at 300 bytes per row including the index\n\
             memory       at most 23 MB while bodies are read (up to 1 at once, MAX_BODY_BYTES=1048576), \
             and 2 KB for the compiled regexes (1 distinct)\n"
        );
    }

    #[test]
    fn the_forecast_of_memory_counts_threads_decoders_and_each_regex_once() {
        let memory = |hosts: &str| {
            let report = report_of(hosts);
            let line = report.lines().find_map(|line| line.strip_prefix("memory "));
            line.map(|line| line.trim().to_owned())
        };
        assert_eq!(memory("a.example 1h\n"), None);
        let four = "a.example 1h hello\nb.example 1h hello\nc.example 1h hello\nd.example 1h \\w{3,60}\n";
        assert_eq!(
            memory(four).as_deref(),
            Some(
                "at most 71 MB while bodies are read (up to 3 at once, MAX_BODY_BYTES=1048576), \
                 and 1 MB for the compiled regexes (2 distinct)"
            )
        );
    }

    #[test]
    fn every_option_is_listed() {
        let report = report_of(
            "http://[::1]/ 1h method=HEAD status=404,500-599 follow=0 ip=6 tls=insecure topic=other timeout=2s\n\
             https://b\u{fc}cher.example/ 1h follow=3 ip=4 a  b\n\
             c.example/#x 1h method=POST header=\"Cookie: a=b\" body=\"a b\" plain-auth=yes proxy=http://p:1 slow=1s \
             cert-days=9 json=/a:b name=\"Shop front\" group=Shops ! c\n",
        );
        let hosts: Vec<_> = report.lines().skip(1).take(3).collect();
        assert_eq!(
            hosts,
            [
                "1h      2s      http://[::1]/, HEAD, good status 404,500-599, redirects not followed, IPv6 only, \
                 certificate not verified, topic other",
                "1h      10s     https://b\u{fc}cher.example/ -> https://xn--bcher-kva.example/, at most 3 redirects, \
                 IPv4 only, body matches a  b",
                "1h      10s     c.example/#x -> https://c.example/, POST, header Cookie, sends 3 bytes, secrets also over http, \
                 through http://p:1, slow above 1s, certificate valid for 9 days, name Shop front, group Shops, JSON /a is b, \
                 body does not match c",
            ]
        );
    }

    #[test]
    fn control_characters_of_a_regex_do_not_reach_the_terminal() {
        let report = report_of("a.example 1h x\u{1b}]0;y\0z\n");
        assert!(report.contains("body matches x ]0;y z\n"), "{report:?}");
    }

    #[test]
    fn settings_that_have_no_full_effect_cause_warnings() {
        let report = report_of("a.example 10s timeout=30s\nb.example 1s\nc.example 2s\n127.0.0.1 1h ip=6\n");
        let warnings: Vec<_> = report
            .lines()
            .filter(|line| line.starts_with("warning: "))
            .collect();
        assert_eq!(
            warnings,
            [
                "warning: a.example: timeout=30s is reduced to 9500ms, 95 % of the interval of 10s, \
                 so that a check ends before the next one is due",
                "warning: 127.0.0.1: every check will fail, because ip= requires the other address family",
                "warning: CHECK_TIMEOUT (10s) is reduced to 95 % of the interval for 2 of the hosts; see the column TIMEOUT",
                "warning: there are 4 hosts, but MAX_THREADS=3: while that many hosts hang, checks of the others are missed",
            ]
        );
        assert!(!report_of("a.example 10s timeout=9s\n").contains("warning"));
    }

    #[test]
    fn figures_have_two_significant_digits() {
        let rates = [
            (0.05333, "0.053"),
            (0.5, "0.50"),
            (12.345, "12.35"),
            (3.2e-8, "0.000000032"),
        ];
        for (rate_per_second, expected) in rates {
            assert_eq!(rate(rate_per_second), expected);
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
