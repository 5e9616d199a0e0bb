//! What `validate` warns of: settings without the effect that was meant.

use std::collections::BTreeMap;
use std::time::Duration;

use url::Host;

use super::forecast::{figure, rate};
use super::measure::Tried;
use crate::check::target::{IpFamily, Target, bare};
use crate::config::CheckConfig;
use crate::duration;
use crate::terminal::plain;

/// More checks per second of one server than this may look like an attack.
const MANY_CHECKS_PER_SECOND: f64 = 1.0;

const NEVER: &str = "can never match";

pub(super) fn warnings(config: &CheckConfig, targets: &[Target], tried: Option<&[Tried]>) -> Vec<String> {
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
            "there are {} hosts, but MAX_THREADS={}: while that many hosts hang, ticks of the others are missed; \
             with PRODUCE_GROUP this matters when one producer is left, because it then checks all hosts",
            targets.len(),
            config.max_threads
        )
    });
    let hosts = || targets.iter();
    hosts()
        .filter_map(|target| cut_timeout(target, config.timeout))
        .chain(hosts().filter_map(impossible_family))
        .chain(hosts().filter_map(pointless_regex))
        .chain(hosts().filter_map(plain_secrets))
        .chain(default_cut)
        .chain(too_many)
        .chain(crowded(targets, tried))
        .collect()
}

fn cut_timeout(target: &Target, default: Duration) -> Option<String> {
    let asked = target.timeout?;
    let got = target.timeout(default);
    (got < asked).then(|| {
        format!(
            "{}: timeout={} is reduced to {}, 95 % of the interval of {}, so that a check ends before the next one is due",
            target.address,
            duration::text(asked),
            duration::text(got),
            duration::text(target.interval)
        )
    })
}

fn impossible_family(target: &Target) -> Option<String> {
    let is_impossible = matches!(
        (target.url.host(), target.ip_family),
        (Some(Host::Ipv4(_)), Some(IpFamily::V6)) | (Some(Host::Ipv6(_)), Some(IpFamily::V4))
    );
    let address = &target.address;
    is_impossible
        .then(|| format!("{address}: every check will fail, because ip= requires the other address family"))
}

fn pointless_regex(target: &Target) -> Option<String> {
    let regex = target.regex.as_ref()?;
    let (matches, is_good) = match regex.always()? {
        true => ("matches every body", !target.regex_absent),
        false => (NEVER, target.regex_absent),
    };
    let effect = match is_good {
        true => "so it checks nothing",
        false => "so every check will fail",
    };
    let advice = match matches == NEVER && regex.as_str().contains(['$', '^']) {
        true => r"; for the characters `$` and `^` write `\$` and `\^`",
        false => "",
    };
    Some(format!(
        "{}: the REGEX {} {matches}, {effect}{advice}",
        target.address,
        plain(regex.as_str()),
    ))
}

fn plain_secrets(target: &Target) -> Option<String> {
    let is_sent = target.url.scheme() == "http" && target.secrets().next().is_some();
    let address = &target.address;
    is_sent.then(|| format!("{address}: its secrets are sent over http, where others can read them"))
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
