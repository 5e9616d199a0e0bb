//! The hosts as `validate` understands them: a line each, by group and profile.

use super::Measured;
use super::measure::Tried;
use crate::check::target::{HeaderValue, Target};
use crate::config::CheckConfig;
use crate::duration;
use crate::produce::host_file::Hosts;
use crate::terminal::{self, columns, fit, plain, seconds};

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
            options(target),
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

/// What the line sets beside the address, the times and the group, as the line would have it. Values that may be secret stay
/// hidden.
fn options(target: &Target) -> String {
    let mut shown = target.clone();
    (shown.timeout, shown.group) = (None, None);
    for header in &mut shown.headers {
        match &mut header.value {
            HeaderValue::Plain(value) => *value = "…".to_owned(),
            HeaderValue::Secret(prefix, _) => prefix.clear(),
        }
    }
    if let Some(body) = &mut shown.body {
        body.bytes = "…".as_bytes().into();
    }
    let line = shown.to_string();
    plain(line.splitn(3, ' ').nth(2).unwrap_or_default())
}
