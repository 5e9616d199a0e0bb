//! `host-metrics validate`: lists the hosts as they are understood, and forecasts what checking them takes.
//!
//! Pure but for [`run`]; `measure` makes the checks that the forecast needs.

mod measure;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use url::Host;

use crate::check::http::{BROTLI_DECODER_BYTES, MAX_BROTLI_DECODERS, READING_BYTES};
use crate::check::json::JsonRule;
use crate::check::pattern::Pattern;
use crate::check::target::{DEFAULT_FOLLOW, Header, HeaderValue, IpFamily, Method, Target, bare};
use crate::commands::validate::measure::{Cost, Tried};
use crate::config::CheckConfig;
use crate::duration;
use crate::limits::{self, Limits, OTHER_FILES};
use crate::produce::host_file::Hosts;
use crate::terminal::{columns, fit, plain, seconds, wrap};

/// The most columns of an error beside a host.
const MAX_ERROR_WIDTH: usize = 60;

/// A row of the table that `init` creates, with its index entry: in Postgres 15 a row of 21 columns takes 215 to 224 bytes,
/// and its entry in the index on address and time about 80.
const BYTES_PER_ROW: f64 = 300.0;

/// A bucket of the state with its index entry, measured by `make bench-views`.
const BYTES_PER_BUCKET: f64 = 165.0;

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

/// The indent of what does not fit on the line of a terminal and is wrapped: it stands below the values of the forecast.
const INDENT: usize = 13;

/// More checks per second of one server than this may look like an attack.
const MANY_CHECKS_PER_SECOND: f64 = 1.0;

const NEVER: &str = "can never match";

/// What is known beside the hosts.
#[derive(Clone, Debug)]
pub struct Known {
    /// Or why it could not be measured.
    cost: Result<Cost, String>,
    limits: Limits,
    /// In the order of the hosts, with `--try`.
    tried: Option<Vec<Tried>>,
}

/// The report, as it is printed on a terminal of this width, if there is one. With `tries` each host is checked once; `show` gets the
/// progress.
///
/// # Errors
/// This machine cannot make checks.
pub fn run(
    config: &CheckConfig,
    hosts: &Hosts,
    tries: bool,
    width: Option<usize>,
    show: impl Fn(&str) + Sync,
) -> anyhow::Result<String> {
    limits::raise_open_files();
    let known = Known {
        cost: Cost::measure(config).map_err(|error| format!("{error:#}")),
        limits: limits::current(),
        tried: match tries {
            true => Some(measure::try_all(config, &hosts.targets, show)?),
            false => None,
        },
    };
    let report = report(config, hosts, &known);
    let lines = report.lines().map(|line| wrap(line, INDENT, width) + "\n");
    Ok(lines.collect())
}

/// The hosts, the forecast and the warnings. Pure.
fn report(config: &CheckConfig, hosts: &Hosts, known: &Known) -> String {
    let targets = &hosts.targets;
    let mut lines = list(config, hosts, known);
    lines.push(String::new());
    lines.extend(columns(&forecast(config, targets, known)));
    let mut warnings = hosts.warnings.clone();
    warnings.extend(host_warnings(config, targets));
    warnings.extend(crowded(targets, known.tried.as_deref()));
    let names = targets
        .iter()
        .filter(|target| matches!(target.url.host(), Some(Host::Domain(_))));
    let at_most = |count: usize| count.min(config.max_threads);
    warnings.extend(limits::warnings(
        known.limits,
        at_most(targets.len()),
        at_most(names.count()),
    ));
    if !warnings.is_empty() {
        lines.push(String::new());
    }
    lines.extend(warnings.iter().map(|warning| format!("warning: {warning}")));
    lines.join("\n") + "\n"
}

/// A line per host, by group and profile; hosts without a group come last.
fn list(config: &CheckConfig, hosts: &Hosts, known: &Known) -> Vec<String> {
    let profiles = |target: &Target| hosts.profiles.get(&target.address).cloned().unwrap_or_default();
    let heading = |target: &Target| {
        let group = target
            .group
            .as_deref()
            .map(|group| format!("group {}", plain(group)));
        let profiles = Some(profiles(target)).filter(|names| !names.is_empty());
        let parts: Vec<String> = group.into_iter().chain(profiles).collect();
        parts.join(", ")
    };
    let mut order: Vec<usize> = (0..hosts.targets.len()).collect();
    order.sort_by_cached_key(|index| {
        let target = &hosts.targets[*index];
        (target.group.is_none(), target.group.clone(), profiles(target))
    });
    let mut table = vec![
        ["EVERY", "TIMEOUT", "NOW", "HOST", ""]
            .map(str::to_owned)
            .to_vec(),
    ];
    for index in &order {
        let target = &hosts.targets[*index];
        let mut host = plain(&target.address);
        if target.url.as_str().trim_end_matches('/') != target.address.trim_end_matches('/') {
            host += &format!(" -> {}", target.url);
        }
        table.push(vec![
            duration::text(target.interval),
            duration::text(target.timeout(config.timeout)),
            known
                .tried
                .as_ref()
                .map_or_else(String::new, |tried| outcome(&tried[*index])),
            host,
            understood(target).join(", "),
        ]);
    }
    if known.tried.is_none() {
        table.iter_mut().for_each(|row| drop(row.remove(2)));
    }
    let mut rows = columns(&table).into_iter();
    let mut lines: Vec<String> = rows.next().into_iter().collect();
    for same in order.chunk_by(|a, b| heading(&hosts.targets[*a]) == heading(&hosts.targets[*b])) {
        match heading(&hosts.targets[same[0]]) {
            heading if !heading.is_empty() => lines.extend([String::new(), heading]),
            _ if same.len() < order.len() => lines.extend([String::new(), "no group".to_owned()]),
            _ => {}
        }
        lines.extend(rows.by_ref().take(same.len()));
    }
    lines
}

fn outcome(tried: &Tried) -> String {
    let took = seconds(tried.took.as_secs_f64());
    match &tried.error {
        None => format!("{} {took}", tried.outcome.as_str()),
        Some(error) => format!(
            "{} {took}: {}",
            tried.outcome.as_str(),
            fit(&plain(error), MAX_ERROR_WIDTH)
        ),
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
    if let Some(name) = &target.name {
        words.push(format!("name {}", plain(name)));
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

fn forecast(config: &CheckConfig, targets: &[Target], known: &Known) -> Vec<Vec<String>> {
    let is_https = |target: &Target| target.url.scheme() == "https";
    let per_second: f64 = targets.iter().map(rate).sum();
    let per_day = per_second * SECONDS_PER_DAY;
    let cpu = match &known.cost {
        Err(reason) => format!("unknown: {}", plain(reason)),
        Ok(cost) => {
            let [http, https] = [cost.http, cost.https].map(|check| check + OVERHEAD);
            let of = |target: &Target| if is_https(target) { https } else { http };
            let busy: f64 = targets
                .iter()
                .map(|target| rate(target) * of(target).as_secs_f64())
                .sum();
            let [http, https] = [http, https].map(|check| format!("{:.2} ms", check.as_secs_f64() * 1e3));
            format!(
                "{} % of a core, at {http} per check over http and {https} over https (measured here)",
                figure(busy * 100.0)
            )
        }
    };
    let at_once: f64 = targets
        .iter()
        .enumerate()
        .map(|(index, target)| {
            let took = known.tried.as_ref().map_or(ASSUMED, |tried| tried[index].took);
            rate(target) * took.as_secs_f64()
        })
        .sum();
    let expected = (at_once.ceil() as usize).clamp(1, targets.len().clamp(1, config.max_threads));
    let at_worst = targets.len().min(config.max_threads);
    let when = match known.tried {
        Some(_) => "if checks take as long as now".to_owned(),
        None => format!("if a check takes {}", duration::text(ASSUMED)),
    };
    let per_check = match targets.iter().any(is_https) {
        true => BYTES_PER_HTTPS_CHECK,
        false => BYTES_PER_HTTP_CHECK,
    };
    let memory = |checks: usize| {
        bytes(BYTES_OF_PRODUCE + targets.len() as f64 * BYTES_PER_HOST + checks as f64 * per_check)
    };
    let buckets: f64 = targets
        .iter()
        .map(|target| {
            let days = [365.0, 365.0, 2.0];
            let kept = BUCKETS_PER_YEAR.iter().zip(days);
            kept.map(|(most, days)| most.min(rate(target) * SECONDS_PER_DAY * days))
                .sum::<f64>()
        })
        .sum();
    let lines = [
        ("hosts", targets.len().to_string()),
        ("checks/s", figure(per_second)),
        ("cpu", cpu),
        (
            "threads",
            format!("about {expected} {when}, at most {at_worst} if every host hangs"),
        ),
        (
            "files",
            format!(
                "about {}, at most {}",
                expected as u64 + OTHER_FILES,
                at_worst as u64 + OTHER_FILES
            ),
        ),
        (
            "memory",
            format!(
                "about {}, at most {} if every host hangs",
                memory(expected),
                memory(at_worst)
            ),
        ),
    ];
    let stored = [
        ("records/day", format!("{per_day:.0}")),
        (
            "table/month",
            format!(
                "{}, at {BYTES_PER_ROW} bytes per row including the index",
                bytes(per_day * DAYS_PER_MONTH * BYTES_PER_ROW)
            ),
        ),
        (
            "state/year",
            format!("{} for each place that checks", bytes(buckets * BYTES_PER_BUCKET)),
        ),
    ];
    let bodies = bodies(config, targets).map(|bodies| ("bodies", bodies));
    let lines = lines.into_iter().chain(bodies).chain(stored);
    lines.map(|(name, value)| vec![name.to_owned(), value]).collect()
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

fn host_warnings<'a>(config: &'a CheckConfig, targets: &'a [Target]) -> impl Iterator<Item = String> + 'a {
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
    let plain_secrets = targets.iter().filter_map(|target| {
        let is_sent = target.url.scheme() == "http" && target.secrets().next().is_some();
        is_sent.then(|| {
            format!(
                "{}: its secrets are sent over http, where others can read them",
                target.address
            )
        })
    });
    let pointless = targets.iter().filter_map(|target| {
        let regex = target.regex.as_ref()?;
        let (matches, is_good) = match regex.always()? {
            true => ("matches every body", !target.regex_absent),
            false => (NEVER, target.regex_absent),
        };
        let effect = if is_good {
            "so it checks nothing"
        } else {
            "so every check will fail"
        };
        Some(format!(
            "{}: the REGEX {} {matches}, {effect}{}",
            target.address,
            plain(regex.as_str()),
            if matches == NEVER && regex.as_str().contains(['$', '^']) {
                r"; for the characters `$` and `^` write `\$` and `\^`"
            } else {
                ""
            }
        ))
    });
    cut.chain(without_address)
        .chain(pointless)
        .chain(plain_secrets)
        .chain(default_cut)
        .chain(too_many)
}

/// Servers that get many checks together, by the IP that `--try` found or else by the host in the address.
fn crowded(targets: &[Target], tried: Option<&[Tried]>) -> Vec<String> {
    let mut servers: BTreeMap<String, Vec<&Target>> = BTreeMap::new();
    for (index, target) in targets.iter().enumerate() {
        let ip = tried.and_then(|tried| tried[index].ip).map(|ip| ip.to_string());
        let host = || bare(target.url.host_str().unwrap_or_default()).to_owned();
        servers.entry(ip.unwrap_or_else(host)).or_default().push(target);
    }
    servers
        .iter()
        .filter_map(|(server, targets)| {
            let together: f64 = targets.iter().copied().map(rate).sum();
            (targets.len() > 1 && together > MANY_CHECKS_PER_SECOND).then(|| {
                format!(
                    "{} hosts are on {server}, which gets {} checks/s together: a firewall there may block them",
                    targets.len(),
                    figure(together)
                )
            })
        })
        .collect()
}

/// In checks per second.
fn rate(target: &Target) -> f64 {
    target.interval.as_secs_f64().recip()
}

/// With two significant digits.
fn figure(number: f64) -> String {
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
    use crate::produce::host_file;
    use crate::sample::Outcome;

    fn config() -> CheckConfig {
        CheckConfig {
            timeout: Duration::from_secs(10),
            max_threads: 3,
            max_body_bytes: 1 << 20,
            user_agent: "test".into(),
            ca_file: None,
            secrets_dir: None,
            agent_name: "test".into(),
        }
    }

    fn known() -> Known {
        Known {
            cost: Ok(Cost {
                http: Duration::from_micros(60),
                https: Duration::from_micros(350),
            }),
            limits: Limits::default(),
            tried: None,
        }
    }

    fn report_of(hosts: &str) -> String {
        report(
            &config(),
            &host_file::parse("hosts", hosts.as_bytes()).unwrap(),
            &known(),
        )
    }

    #[test]
    fn every_host_is_listed_as_understood_and_the_forecast_adds_them_up() {
        assert_eq!(
            report_of(
                "https://google.com 5\n\
                 example.com 30s\n\
                 http://10.0.0.7:8080/health 1m (status: (ok|warn))\n"
            ),
            "EVERY  TIMEOUT  HOST\n\
             5m     10s      https://google.com\n\
             30s    10s      example.com -> https://example.com/\n\
             1m     10s      http://10.0.0.7:8080/health          body matches (status: (ok|warn))\n\
             \n\
             hosts        3\n\
             checks/s     0.053\n\
             cpu          0.0017 % of a core, at 0.11 ms per check over http and 0.40 ms over https (measured here)\n\
             threads      about 1 if a check takes 300ms, at most 3 if every host hangs\n\
             files        about 65, at most 67\n\
             memory       about 12 MB, at most 12 MB if every host hangs\n\
             bodies       at most 23 MB more memory while bodies are read (up to 1 at once, MAX_BODY_BYTES=1048576), \
             and 2 KB for the compiled regexes (1 distinct)\n\
             records/day  4608\n\
             table/month  41 MB, at 300 bytes per row including the index\n\
             state/year   5 MB for each place that checks\n"
        );
    }

    #[test]
    fn the_forecast_of_memory_counts_threads_decoders_and_each_regex_once() {
        let memory = |hosts: &str| {
            let report = report_of(hosts);
            let line = report.lines().find_map(|line| line.strip_prefix("bodies "));
            line.map(|line| line.trim().to_owned())
        };
        assert_eq!(memory("a.example 1h\n"), None);
        let four = "a.example 1h hello\nb.example 1h hello\nc.example 1h hello\nd.example 1h \\w{3,60}\n";
        assert_eq!(
            memory(four).as_deref(),
            Some(
                "at most 71 MB more memory while bodies are read (up to 3 at once, MAX_BODY_BYTES=1048576), \
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
        let expected = "\
EVERY  TIMEOUT  HOST

group Shops
1h     10s      c.example/#x -> https://c.example/                         POST, header Cookie, sends 3 bytes, \
secrets also over http, through http://p:1, slow above 1s, certificate valid for 9 days, name Shop front, JSON /a is b, \
body does not match c

no group
1h     2s       http://[::1]/                                              HEAD, good status 404,500-599, \
redirects not followed, IPv6 only, certificate not verified, topic other
1h     10s      https://b\u{fc}cher.example/ -> https://xn--bcher-kva.example/  at most 3 redirects, IPv4 only, body matches a  b
";
        assert!(report.starts_with(expected), "{report}");
    }

    #[test]
    fn hosts_stand_by_group_and_profile() {
        let report = report_of(
            "@api slow=1s\n@eu ip=4\na.example 1h\nb.example 1h @api @eu group=G\nc.example 1h @api\nd.example 1h group=G\n\
             e.example 1h @api @eu group=G\n",
        );
        let lines = report.lines().take_while(|line| !line.starts_with("hosts "));
        let lines: Vec<_> = lines
            .filter(|line| !line.is_empty())
            .map(|line| line.trim_start_matches("1h     10s      "))
            .map(|line| line.split(" -> ").next().unwrap_or_default())
            .collect();
        assert_eq!(
            lines,
            [
                "EVERY  TIMEOUT  HOST",
                "group G",
                "d.example",
                "group G, @api @eu",
                "b.example",
                "e.example",
                "no group",
                "a.example",
                "@api",
                "c.example",
            ]
        );
    }

    #[test]
    fn a_trial_shows_outcomes_and_replaces_what_is_assumed() {
        let tried = |outcome, error: Option<&str>, ip: &str| Tried {
            outcome,
            error: error.map(str::to_owned),
            ip: ip.parse().ok(),
            took: Duration::from_secs(3),
        };
        let known = Known {
            tried: Some(vec![
                tried(Outcome::Ok, None, "192.0.2.1"),
                tried(Outcome::BadStatus, Some("status 503\u{1b}[2J"), "192.0.2.1"),
            ]),
            cost: Err("no port".into()),
            ..known()
        };
        let hosts = host_file::parse("hosts", b"http://a.example/ 1s\nhttp://b.example/ 1s\n").unwrap();
        let report = report(&config(), &hosts, &known);
        for line in [
            "EVERY  TIMEOUT  NOW                                HOST",
            "1s     950ms    ok 3.00 s                          http://a.example/",
            "1s     950ms    bad_status 3.00 s: status 503 [2J  http://b.example/",
            "cpu          unknown: no port",
            "threads      about 2 if checks take as long as now, at most 2 if every host hangs",
            "warning: 2 hosts are on 192.0.2.1, which gets 2.00 checks/s together: a firewall there may block them",
        ] {
            assert!(report.lines().any(|shown| shown == line), "{line}:\n{report}");
        }
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
        let report = report_of(
            "http://a.example/ 1h .*\nhttp://b.example/ 1h ! x?\nhttp://c.example/ 1h [a&&b]\nhttp://d.example/ 1h ^$\n\
             http://f.example/ 1h only (\\w+ )?$9.99|x^\nhttp://g.example/ 1h ^x\\$5|(y?$)\\n*\n\
             http://e.example/1 3s\nhttp://e.example/2 1s\nhttp://e.example/3 1h\n",
        );
        let warnings: Vec<_> = report
            .lines()
            .filter(|line| line.starts_with("warning: "))
            .collect();
        assert_eq!(
            warnings[..5],
            [
                "warning: http://a.example/: the REGEX .* matches every body, so it checks nothing",
                "warning: http://b.example/: the REGEX x? matches every body, so every check will fail",
                "warning: http://c.example/: the REGEX [a&&b] can never match, so every check will fail",
                r"warning: http://f.example/: the REGEX only (\w+ )?$9.99|x^ can never match, so every check will fail; for the characters `$` and `^` write `\$` and `\^`",
                "warning: CHECK_TIMEOUT (10s) is reduced to 95 % of the interval for 2 of the hosts; see the column TIMEOUT",
            ]
        );
        let crowded = "warning: 3 hosts are on e.example, which gets 1.33 checks/s together: a firewall there may block them";
        assert_eq!(warnings.last(), Some(&crowded), "{report}");
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
