//! The variables of the checks: CHECK_*, MAX_*, USER_AGENT, SECRETS_DIR, AGENT_NAME, REFERENCE_HOSTS.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use super::form::{DAY, MAX_LINE_BYTES, host_and_port, is_line, is_quoted};
use super::kafka::PRODUCE_GROUP;
use super::reader::{PemKind, Reader};

/// The User-Agent header if USER_AGENT is not set.
pub const DEFAULT_USER_AGENT: &str = concat!(
    "host-metrics/",
    env!("CARGO_PKG_VERSION"),
    " (+",
    env!("CARGO_PKG_REPOSITORY"),
    ")"
);

const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);
const DEFAULT_MAX_THREADS: usize = 1_024;
/// Far longer than any useful timeout.
const TIMEOUTS: RangeInclusive<Duration> = Duration::from_millis(1)..=DAY;
/// Linux's default limits of threads are not far above.
const THREADS: RangeInclusive<usize> = 1..=30_000;
/// Every check in progress may hold a body in memory.
const BODY_BYTES: RangeInclusive<u64> = 1..=1 << 30;

/// What every check needs, in each command.
#[derive(Clone, Debug)]
pub struct CheckConfig {
    /// The longest time for one check. A host's `timeout=` overrides it, and neither may exceed 95 % of the interval.
    pub timeout: Duration,
    /// The most checks at the same time.
    pub max_threads: usize,
    pub max_body_bytes: u64,
    /// One line of printable ASCII.
    pub user_agent: String,
    pub ca_file: Option<PathBuf>,
    /// Where the secrets of the host file are.
    pub secrets_dir: Option<PathBuf>,
    pub agent_name: String,
}

/// `is_one`: for a single check, where MAX_THREADS has no meaning.
pub(super) fn checks(reader: &mut Reader<'_>, is_one: bool) -> CheckConfig {
    CheckConfig {
        timeout: reader
            .duration("CHECK_TIMEOUT", TIMEOUTS, "10s")
            .unwrap_or(DEFAULT_TIMEOUT),
        max_threads: match is_one {
            true => 1,
            false => reader.number("MAX_THREADS", THREADS, DEFAULT_MAX_THREADS),
        },
        max_body_bytes: reader.number("MAX_BODY_BYTES", BODY_BYTES, 1 << 20),
        user_agent: user_agent(reader),
        ca_file: reader.pem_file("CHECK_CA_FILE", PemKind::Certificate),
        secrets_dir: secrets_dir(reader),
        agent_name: agent_name(reader),
    }
}

pub(super) const SECRETS_DIR: &str = "SECRETS_DIR";

pub(super) fn secrets_dir(reader: &mut Reader<'_>) -> Option<PathBuf> {
    reader.read(SECRETS_DIR, "an existing directory", |path| {
        Some(PathBuf::from(path)).filter(|path| path.is_dir())
    })
}

/// REFERENCE_HOSTS: what is asked whether our own network is down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum References {
    /// The gateway on the way to the host that failed.
    Gateways,
    /// Names or IP addresses, each with its port.
    Hosts(Vec<(String, u16)>),
    /// Nothing: failed checks are always the host's.
    Off,
}

/// Each is asked on a thread of its own.
const MAX_REFERENCES: usize = 16;

pub(super) fn references(reader: &mut Reader<'_>) -> References {
    let expected = "at most 16 of host:port, separated by commas, or `none`";
    let hosts = |text: &str| {
        if text.eq_ignore_ascii_case("none") {
            return Some(References::Off);
        }
        let host = |text: &str| {
            let (host, port) = host_and_port(text.trim())?;
            let host = host.trim_start_matches('[').trim_end_matches(']');
            Some((host.to_owned(), port))
        };
        let hosts: Option<Vec<_>> = text.split(',').map(host).collect();
        hosts
            .filter(|hosts| hosts.len() <= MAX_REFERENCES)
            .map(References::Hosts)
    };
    reader
        .read("REFERENCE_HOSTS", expected, hosts)
        .unwrap_or(References::Gateways)
}

fn user_agent(reader: &mut Reader<'_>) -> String {
    let expected = "one line of printable ASCII, at most 255 bytes, without spaces or quotes around it";
    let is_right = |text: &str| {
        let is_printable = text.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic());
        is_printable && text.len() <= MAX_LINE_BYTES && text.trim() == text && !is_quoted(text)
    };
    reader
        .read("USER_AGENT", expected, |text| {
            is_right(text).then(|| text.to_owned())
        })
        .unwrap_or_else(|| DEFAULT_USER_AGENT.to_owned())
}

fn agent_name(reader: &mut Reader<'_>) -> String {
    let name = "AGENT_NAME";
    if reader.is_set(name) {
        return reader.line(name, MAX_LINE_BYTES).unwrap_or_default();
    }
    // All producers of a group are one place.
    if let Some(group) = reader.get(PRODUCE_GROUP) {
        return group.to_owned();
    }
    match whoami::hostname() {
        Ok(name) if !name.is_empty() && is_line(&name, MAX_LINE_BYTES) => name,
        _ => {
            let expected = "a name for the place that checks, because this machine has no usable host name";
            reader.wrong(name, expected, None);
            String::new()
        }
    }
}
