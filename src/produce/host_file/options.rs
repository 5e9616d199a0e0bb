//! Reads FREQUENCY and the options.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use url::Url;

use super::files::Files;
use super::quote::quoted;
use super::report::LineFault;
use super::request;
use super::words::OptionWord;
use crate::check::json::JsonRule;
use crate::check::pattern::Pattern;
use crate::check::secret::{CertificateFiles, SecretFile};
use crate::check::target::{Header, HeaderValue, IpFamily, Method, Proxy, RequestBody, StatusSet, Target};
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

pub const OPTION_NAMES: [&str; 18] = [
    "timeout",
    "status",
    "method",
    "follow",
    "topic",
    "ip",
    "tls",
    "header",
    "body",
    "auth",
    "cert",
    "plain-auth",
    "proxy",
    "slow",
    "cert-days",
    "json",
    "name",
    "group",
];

/// The longest `name=` or `group=`.
const MAX_NAME_CHARS: usize = 100;

const MAX_CERT_DAYS: u32 = 3_650;

/// For messages: `the options are timeout, status, … and group`.
pub(super) fn known_options() -> String {
    let [names @ .., last] = OPTION_NAMES;
    format!("the options are {} and {last}", names.join(", "))
}

fn unknown_option(name: &str) -> LineFault {
    LineFault::new(
        0,
        format!("{} is not an option; {}", quoted(name), known_options()),
    )
}

/// The options that were given so far, on the line of a host or of a profile.
#[derive(Clone, Default)]
pub(super) struct Options {
    timeout: Option<Duration>,
    status: Option<StatusSet>,
    method: Option<Method>,
    follow: Option<u32>,
    topic: Option<String>,
    ip_family: Option<IpFamily>,
    tls: Option<Tls>,
    headers: Vec<Header>,
    body: Option<RequestBody>,
    auth: Option<Arc<SecretFile>>,
    cert: Option<Arc<CertificateFiles>>,
    plain_auth: Option<bool>,
    proxy: Option<Proxy>,
    slow: Option<Duration>,
    cert_days: Option<u32>,
    json: Vec<JsonRule>,
    name: Option<String>,
    group: Option<String>,
}

impl Options {
    pub(super) fn set(&mut self, option: &OptionWord<'_>, files: &Files<'_>) -> Result<(), LineFault> {
        if let Some((at, what)) = option.fault {
            return Err(LineFault::new(at, what));
        }
        match option.name {
            name if !OPTION_NAMES.contains(&name) => Err(unknown_option(name)),
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
            "method" => option.once(
                &mut self.method,
                Method::named,
                "`GET`, `HEAD`, `POST`, `PUT`, `PATCH`, `DELETE` or `OPTIONS`",
            ),
            "follow" => option.once(&mut self.follow, read_follow, "a number from 0 to 100"),
            "topic" => option.once(&mut self.topic, read_topic, TOPIC_NAME_RULE),
            "ip" => option.once(&mut self.ip_family, read_ip_family, "`4` or `6`"),
            "tls" => option.once(&mut self.tls, read_tls, "`insecure` or `required`"),
            "header" => self.add_header(option, files),
            "json" => self.add_json(option),
            "body" => option.put(&mut self.body, request::read_body(option, files)),
            "auth" => option.put(
                &mut self.auth,
                request::read_secret(option, &option.value, |name| files.auth(name)),
            ),
            "cert" => option.put(
                &mut self.cert,
                request::read_secret(option, &option.value, |name| files.certificate(name)),
            ),
            "plain-auth" => option.once(
                &mut self.plain_auth,
                |text| (text == "yes").then_some(true),
                "`yes`",
            ),
            "proxy" => option.once(&mut self.proxy, request::read_proxy, "`http://HOST:PORT`"),
            "slow" => option.once(&mut self.slow, read_timeout, "a time above 0, e.g. `800ms`"),
            "cert-days" => option.once(&mut self.cert_days, read_days, "a number of days from 1 to 3650"),
            "name" => option.once(&mut self.name, read_name, NAME_RULE),
            "group" => option.once(&mut self.group, read_name, NAME_RULE),
            name => Err(unknown_option(name)),
        }
    }

    fn add_header(&mut self, option: &OptionWord<'_>, files: &Files<'_>) -> Result<(), LineFault> {
        let header = request::read_header(option, files)?;
        let is_same = |other: &Header| other.name.eq_ignore_ascii_case(&header.name);
        option.not_twice(self.headers.iter().any(is_same), &header.name)?;
        self.headers.push(header);
        Ok(())
    }

    fn add_json(&mut self, option: &OptionWord<'_>) -> Result<(), LineFault> {
        let rule = JsonRule::parse(&option.value).ok_or_else(|| {
            option.fault(format!(
                "{}: expected /POINTER:VALUE with a pointer of RFC 6901, e.g. `/data/status:ok`",
                quoted(option.word)
            ))
        })?;
        let is_same = self.json.iter().any(|other| other.pointer == rule.pointer);
        option.not_twice(is_same, &rule.pointer)?;
        self.json.push(rule);
        Ok(())
    }

    pub(super) fn reads_a_body(&self) -> Result<(), LineFault> {
        match self.method {
            Some(Method::Head) => Err(LineFault::new(
                0,
                "method=HEAD has no response body to search for the REGEX; remove one of the two",
            )),
            _ => Ok(()),
        }
    }

    /// These options, and where they have none, those of a profile. Of headers and `json=` rules, both are kept, except those
    /// of the same name or pointer. `auth=` counts as the header Authorization.
    pub(super) fn or(mut self, profile: Self) -> Self {
        let has_authorization = self.headers.iter().any(is_authorization);
        let is_new = |header: &Header| {
            let is_same = |own: &Header| own.name.eq_ignore_ascii_case(&header.name);
            let is_given = self.headers.iter().any(is_same);
            !(is_given || self.auth.is_some() && is_authorization(header))
        };
        let mut headers: Vec<Header> = profile.headers.into_iter().filter(is_new).collect();
        headers.append(&mut self.headers);
        let is_new = |rule: &JsonRule| !self.json.iter().any(|own| own.pointer == rule.pointer);
        let mut json: Vec<JsonRule> = profile.json.into_iter().filter(is_new).collect();
        json.append(&mut self.json);
        let auth = self.auth.or(profile.auth.filter(|_| !has_authorization));
        macro_rules! own_or_profile {
            ($($field:ident)+) => {
                Self { headers, json, auth, $($field: self.$field.or(profile.$field)),+ }
            };
        }
        own_or_profile! {
            timeout status method follow topic ip_family tls body cert plain_auth proxy slow cert_days name group
        }
    }

    /// Options that contradict each other or the address: the option to blame, and why.
    pub(super) fn contradictions(&self, url: &Url) -> Vec<(&'static str, &'static str)> {
        let mut found = Vec::new();
        if self.method == Some(Method::Head) && !self.json.is_empty() {
            found.push((
                "json",
                "method=HEAD has no response body for json=; remove one of the two",
            ));
        }
        if self.body.is_some() && matches!(self.method, None | Some(Method::Get | Method::Head)) {
            found.push((
                "body",
                "a request with a body needs method=POST, PUT, PATCH, DELETE or OPTIONS",
            ));
        }
        if self.auth.is_some() && self.headers.iter().any(is_authorization) {
            found.push((
                "auth",
                "auth= and header= both set Authorization; remove one of the two",
            ));
        }
        if url.scheme() == "http" {
            let refused = "a secret is not sent over http, where others can read it; use https or, to allow it, plain-auth=yes";
            let is_secret = |header: &Header| matches!(header.value, HeaderValue::Secret(..));
            let is_plain = self.plain_auth != Some(true);
            if is_plain && self.auth.is_some() {
                found.push(("auth", refused));
            } else if is_plain && self.headers.iter().any(is_secret) {
                found.push(("header", refused));
            }
            if self.cert.is_some() {
                found.push(("cert", "a client certificate needs https"));
            }
        }
        found
    }

    pub(super) fn target(
        self,
        address: &str,
        url: Url,
        interval: Duration,
        regex: Option<Arc<Pattern>>,
    ) -> Target {
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
            headers: self.headers,
            body: self.body,
            auth: self.auth,
            cert: self.cert,
            plain_auth: self.plain_auth.unwrap_or(plain.plain_auth),
            proxy: self.proxy,
            slow: self.slow,
            cert_days: self.cert_days,
            json: self.json,
            name: self.name,
            group: self.group,
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
        let value = read(&self.value)
            .ok_or_else(|| self.fault(format!("{}: expected {expected}", quoted(self.word))));
        self.put(slot, value)
    }

    fn put<T>(&self, slot: &mut Option<T>, value: Result<T, LineFault>) -> Result<(), LineFault> {
        let value = value?;
        match slot.replace(value) {
            None => Ok(()),
            Some(_) => Err(LineFault::new(0, format!("`{}` is given twice", self.name))),
        }
    }

    /// For an option that may be repeated.
    fn not_twice(&self, is_known: bool, what: &str) -> Result<(), LineFault> {
        match is_known {
            true => Err(LineFault::new(
                0,
                format!("`{}` for {} is given twice", self.name, quoted(what)),
            )),
            false => Ok(()),
        }
    }
}

fn is_authorization(header: &Header) -> bool {
    header.name.eq_ignore_ascii_case("Authorization")
}

fn read_timeout(text: &str) -> Option<Duration> {
    let bounds = Duration::from_millis(1)..=*INTERVALS.end();
    duration::parse(text).filter(|timeout| bounds.contains(timeout))
}

fn read_status(text: &str) -> Option<StatusSet> {
    fn code(text: &str) -> Option<u16> {
        let is_code = text.len() == 3 && text.bytes().all(|byte| byte.is_ascii_digit());
        text.parse().ok().filter(|code| is_code && *code >= 100)
    }
    let ranges = text.split(',').map(|range| {
        let (start, end) = range.split_once('-').unwrap_or((range, range));
        Some(code(start)?..=code(end)?).filter(|range| !range.is_empty())
    });
    ranges.collect::<Option<_>>().map(StatusSet)
}

fn read_follow(text: &str) -> Option<u32> {
    read_number(text).filter(|follow| *follow <= MAX_FOLLOW)
}

fn read_days(text: &str) -> Option<u32> {
    read_number(text).filter(|days| (1..=MAX_CERT_DAYS).contains(days))
}

fn read_number(text: &str) -> Option<u32> {
    // `parse` accepts a plus sign too.
    let is_number = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|_| is_number)
}

const NAME_RULE: &str = "1 to 100 characters, in double quotes if there are spaces in it";

fn read_name(text: &str) -> Option<String> {
    let is_name =
        !text.trim().is_empty() && text.chars().count() <= MAX_NAME_CHARS && !text.contains(char::is_control);
    is_name.then(|| text.to_owned())
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

#[derive(Clone, Copy, PartialEq, Eq)]
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
