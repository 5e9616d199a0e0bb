//! Reads FREQUENCY and the options.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use nom::bytes::complete::take;
use nom::character::complete::char;
use nom::combinator::{all_consuming, map, map_opt, opt, verify};
use nom::multi::separated_list1;
use nom::sequence::preceded;
use nom::{IResult, Parser};
use url::Url;

use super::fault::LineFault;
use super::quote::quoted;
use super::words::OptionWord;
use crate::check::pattern::Pattern;
use crate::check::target::{IpFamily, Method, StatusSet, Target};
use crate::config::{TOPIC_NAME_RULE, is_topic_name};
use crate::duration;

pub(super) const INTERVALS: RangeInclusive<Duration> = Duration::from_secs(1)..=DAY.saturating_mul(366);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Browsers follow at most 20.
const MAX_FOLLOW: u32 = 100;

pub(super) fn read_frequency(text: &str) -> Result<Duration, LineFault> {
    let expected = "a whole number of minutes, or one with s, m, h or d, e.g. `5` or `30s`";
    if text.is_empty() {
        return Err(LineFault::new(
            0,
            format!("FREQUENCY is missing: expected {expected}"),
        ));
    }
    let interval = duration::parse_interval(text).ok_or_else(|| {
        LineFault::new(
            0,
            format!("{} is not a valid FREQUENCY: expected {expected}", quoted(text)),
        )
    })?;
    if !INTERVALS.contains(&interval) {
        let what = format!(
            "the FREQUENCY {} is out of range: expected 1s to 366d",
            quoted(text)
        );
        return Err(LineFault::new(0, what));
    }
    Ok(interval)
}

pub(super) const OPTION_NAMES: [&str; 7] = ["timeout", "status", "method", "follow", "topic", "ip", "tls"];

/// For messages: `the options are timeout, status, … and tls`.
pub(super) fn known_options() -> String {
    let [names @ .., last] = OPTION_NAMES;
    format!("the options are {} and {last}", names.join(", "))
}

/// The options that were given so far.
#[derive(Default)]
pub(super) struct Options {
    timeout: Option<Duration>,
    status: Option<StatusSet>,
    method: Option<Method>,
    follow: Option<u32>,
    topic: Option<String>,
    ip_family: Option<IpFamily>,
    tls: Option<Tls>,
}

impl Options {
    pub fn set(&mut self, option: &OptionWord<'_>) -> Result<(), LineFault> {
        match option.name {
            "timeout" => option.once(
                &mut self.timeout,
                read_timeout,
                "a time above 0, e.g. `3s` or `500ms`",
            ),
            "status" => option.once(
                &mut self.status,
                read_status,
                "codes and ranges, e.g. `200-299,301`",
            ),
            "method" => option.once(&mut self.method, read_method, "`GET` or `HEAD`"),
            "follow" => option.once(&mut self.follow, read_follow, "a number from 0 to 100"),
            "topic" => option.once(&mut self.topic, read_topic, TOPIC_NAME_RULE),
            "ip" => option.once(&mut self.ip_family, read_ip_family, "`4` or `6`"),
            "tls" => option.once(&mut self.tls, read_tls, "`insecure` or `required`"),
            name => Err(LineFault::new(
                0,
                format!("{} is not an option; {}", quoted(name), known_options()),
            )),
        }
    }

    pub fn reads_a_body(&self) -> Result<(), LineFault> {
        match self.method {
            Some(Method::Head) => Err(LineFault::new(
                0,
                "method=HEAD has no response body to search for the REGEX; remove one of the two",
            )),
            _ => Ok(()),
        }
    }

    pub fn target(self, address: &str, url: Url, interval: Duration, regex: Option<Arc<Pattern>>) -> Target {
        let plain = Target::new(address.to_owned(), url, interval);
        Target {
            timeout: self.timeout,
            status: self.status,
            method: self.method.unwrap_or(plain.method),
            follow: self.follow.unwrap_or(plain.follow),
            topic: self.topic,
            ip_family: self.ip_family,
            tls_insecure: self.tls == Some(Tls::Insecure),
            tls_required: self.tls == Some(Tls::Required),
            regex,
            ..plain
        }
    }
}

impl OptionWord<'_> {
    fn once<T>(
        &self,
        slot: &mut Option<T>,
        read: impl FnOnce(&str) -> Option<T>,
        expected: &str,
    ) -> Result<(), LineFault> {
        let Some(value) = read(self.value) else {
            let what = format!("{}: expected {expected}", quoted(self.word));
            return Err(LineFault::new(self.name.len() + 1, what));
        };
        match slot.replace(value) {
            None => Ok(()),
            Some(_) => Err(LineFault::new(0, format!("`{}` is given twice", self.name))),
        }
    }
}

fn read_timeout(text: &str) -> Option<Duration> {
    let bounds = Duration::from_millis(1)..=*INTERVALS.end();
    duration::parse(text).filter(|timeout| bounds.contains(timeout))
}

fn read_status(text: &str) -> Option<StatusSet> {
    fn code(input: &str) -> IResult<&str, u16> {
        map_opt(take(3_usize), |digits: &str| {
            let is_number = digits.bytes().all(|byte| byte.is_ascii_digit());
            digits.parse().ok().filter(|code| is_number && *code >= 100)
        })
        .parse(input)
    }
    fn range(input: &str) -> IResult<&str, RangeInclusive<u16>> {
        let range = map((code, opt(preceded(char('-'), code))), |(start, end)| {
            start..=end.unwrap_or(start)
        });
        verify(range, |range: &RangeInclusive<u16>| !range.is_empty()).parse(input)
    }
    let (_, ranges) = all_consuming(separated_list1(char(','), range))
        .parse(text)
        .ok()?;
    Some(StatusSet(ranges))
}

fn read_method(text: &str) -> Option<Method> {
    match text {
        "GET" => Some(Method::Get),
        "HEAD" => Some(Method::Head),
        _ => None,
    }
}

fn read_follow(text: &str) -> Option<u32> {
    let is_number = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse()
        .ok()
        .filter(|follow| is_number && *follow <= MAX_FOLLOW)
}

fn read_topic(text: &str) -> Option<String> {
    is_topic_name(text).then(|| text.to_owned())
}

fn read_ip_family(text: &str) -> Option<IpFamily> {
    match text {
        "4" => Some(IpFamily::V4),
        "6" => Some(IpFamily::V6),
        _ => None,
    }
}

#[derive(PartialEq, Eq)]
enum Tls {
    Insecure,
    Required,
}

fn read_tls(text: &str) -> Option<Tls> {
    match text {
        "insecure" => Some(Tls::Insecure),
        "required" => Some(Tls::Required),
        _ => None,
    }
}
