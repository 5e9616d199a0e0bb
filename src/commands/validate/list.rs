//! The hosts as `validate` understands them: a line each, by group and profile.

use super::Measured;
use super::measure::Tried;
use crate::check::json::JsonRule;
use crate::check::target::{DEFAULT_FOLLOW, Header, HeaderValue, IpFamily, Method, Target};
use crate::config::CheckConfig;
use crate::duration;
use crate::produce::host_file::Hosts;
use crate::terminal::{self, columns, counted, fit, plain, seconds};

/// The most columns of an error beside a host.
const MAX_ERROR_WIDTH: usize = 60;

/// A line per host, by group and profile; hosts without a group come last.
pub(super) fn list(config: &CheckConfig, hosts: &Hosts, measured: &Measured) -> Vec<String> {
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
    let mut table = terminal::table(["EVERY", "TIMEOUT", "NOW", "HOST", ""]);
    for index in &order {
        let target = &hosts.targets[*index];
        let mut host = plain(&target.address);
        if target.url.as_str().trim_end_matches('/') != target.address.trim_end_matches('/') {
            host += &format!(" -> {}", target.url);
        }
        table.push(vec![
            duration::text(target.interval),
            duration::text(target.timeout(config.timeout)),
            measured
                .tried
                .as_ref()
                .map_or_else(String::new, |tried| outcome(&tried[*index])),
            host,
            understood(target).join(", "),
        ]);
    }
    if measured.tried.is_none() {
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
#[expect(clippy::too_many_lines, reason = "a line or two for each option")]
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
        words.push(format!("valid status {status}"));
    }
    match target.follow {
        DEFAULT_FOLLOW => {}
        0 => words.push("redirects not followed".to_owned()),
        follow => words.push(format!("at most {}", counted(follow, "redirect"))),
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
        words.push(format!("certificate valid for at least {days} days"));
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
