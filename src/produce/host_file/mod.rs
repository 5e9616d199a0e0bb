//! The host file's grammar: lines in, targets out, or every error with its line, column and caret.
//!
//! Owns syntax (nom) and the checks that need the whole file, such as an address given twice. Pure, but for `read`, which gets
//! the bytes.

mod read;
mod report;
mod slips;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt::Display;
use std::net::Ipv6Addr;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use nom::bytes::complete::{take, take_till, take_while, take_while1};
use nom::character::complete::char;
use nom::combinator::{all_consuming, consumed, map, map_opt, opt, rest, verify};
use nom::multi::{many_m_n, separated_list1};
use nom::sequence::{preceded, separated_pair};
use nom::{IResult, Offset, Parser};
use url::{Host, Url};

use crate::check::pattern::Pattern;
use crate::check::target::{IpFamily, Method, NOT_NAMED, StatusSet, Target, can_be_named};
use crate::config::{TOPIC_NAME_RULE, is_topic_name};
use crate::duration;
use crate::sample::MAX_ADDRESS_BYTES;
pub use read::{is_stdin, read};
use report::{Fault, Report, quoted, userinfo};
use slips::Slip;

const INTERVALS: RangeInclusive<Duration> = Duration::from_secs(1)..=DAY.saturating_mul(366);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// A browser gives up at 20.
const MAX_FOLLOW: u32 = 100;

/// The text of a regex; a longer one is a file of another kind.
const MAX_REGEX_BYTES: usize = 16 << 10;

/// What all regexes of a file may take when compiled.
const MAX_COMPILED_BYTES_OF_A_FILE: usize = 64 << 20;

/// There are seven options; a line with so many words of their shape is wrong long before.
const MAX_OPTIONS: usize = 16;

/// Everything that is wrong with a host file, in the order of its lines, ready to print.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct HostFileError(pub String);

/// The hosts of a file.
#[derive(Clone, Debug, Default)]
pub struct Hosts {
    pub targets: Vec<Target>,
    /// Lines that hardly mean what they say, as `FILE:LINE:COLUMN: what`.
    pub warnings: Vec<String>,
}

/// Parses a whole host file; `name` stands before the line number in messages (`FILE:LINE:COLUMN`).
///
/// # Errors
/// Any line is wrong, or there is no host at all.
pub fn parse(name: &str, contents: &[u8]) -> Result<Hosts, HostFileError> {
    let mut report = Report::default();
    if contents.starts_with(b"\xff\xfe") || contents.starts_with(b"\xfe\xff") {
        let fault = Fault::new(0, "the file is UTF-16; save it as UTF-8");
        report.add(format_args!("{name}:1"), "", &fault);
        return report.finish(None);
    }

    let mut targets = Vec::new();
    let mut regexes = Regexes::default();
    let mut numbers = HashMap::new();
    let contents = contents.strip_prefix(b"\xef\xbb\xbf").unwrap_or(contents);
    for (number, line) in (1..).zip(contents.split(|byte| *byte == b'\n')) {
        let place = format_args!("{name}:{number}");
        let line = match std::str::from_utf8(line) {
            Ok(line) => line.trim_end_matches(|c| is_blank(c) || c == '\r'),
            Err(error) => {
                let fault = Fault::new(error.valid_up_to(), "not UTF-8; save the file as UTF-8");
                report.add(place, &String::from_utf8_lossy(line), &fault);
                continue;
            }
        };
        let content = line.trim_start_matches(is_blank);
        if content.is_empty() || content.starts_with('#') {
            continue;
        }
        let target = match words(line) {
            Ok((_, words)) => {
                let target = words.target(&mut regexes, &mut numbers, number);
                if let Some(Slip::Warned(fault)) = slips::in_regex(&words) {
                    report.warn(place, line, &words.at(words.regex, fault));
                }
                target
            }
            Err(error) => Err(vec![Fault::new(0, error.to_string())]),
        };
        match target {
            Ok(target) => targets.push(target),
            Err(faults) => faults.iter().for_each(|fault| report.add(place, line, fault)),
        }
    }
    if targets.is_empty() && report.faults == 0 {
        let what = "there is no host in the file; write one per line: ADDRESS FREQUENCY [option=value ...] [REGEX], \
                    e.g. https://example.com 5";
        report.add(format_args!("{name}:1"), "", &Fault::new(0, what));
    }
    let warnings = report.take_warnings();
    report.finish(Some(Hosts { targets, warnings }))
}

/// The target of the `check` command, each part an argument of its own: nothing bounds its timeout, and the regex may
/// be any.
///
/// # Errors
/// Any of them is wrong, in the form of a host file's errors with `ADDRESS`, `OPTION` or `REGEX` for the line.
pub fn target(address: &str, options: &[String], regex: Option<&str>) -> Result<Target, HostFileError> {
    let mut report = Report::default();
    let mut settings = Settings::default();
    let url = report.keep("ADDRESS", address, read_address(address));
    for option in options {
        let set = match all_consuming(option_word).parse(option) {
            Ok((_, word)) => settings.set(&word),
            Err(_) => Err(Fault::new(0, format!("expected NAME=VALUE; {KNOWN_OPTIONS}"))),
        };
        report.keep("OPTION", option, set);
    }
    let compiled = regex.and_then(|regex| {
        let compiled = compile(regex).and_then(|compiled| settings.reads_a_body().map(|()| compiled));
        report.keep("REGEX", regex, compiled)
    });
    let target = url.map(|url| settings.target(address, url, *INTERVALS.end(), compiled));
    report.finish(target)
}

/// A line taken apart; every part is a slice of it, the last ones may be empty.
struct Words<'a> {
    line: &'a str,
    address: &'a str,
    frequency: &'a str,
    options: Vec<OptionWord<'a>>,
    regex: &'a str,
}

/// `status=200`, or something of that shape.
struct OptionWord<'a> {
    word: &'a str,
    name: &'a str,
    value: &'a str,
}

fn words(line: &str) -> IResult<&str, Words<'_>> {
    let parts = (
        preceded(blanks, word),
        preceded(blanks, word),
        many_m_n(0, MAX_OPTIONS, preceded(blanks, option_word)),
        preceded(blanks, rest),
    );
    map(parts, |(address, frequency, options, regex)| Words {
        line,
        address,
        frequency,
        options,
        regex,
    })
    .parse(line)
}

fn blanks(input: &str) -> IResult<&str, &str> {
    take_while(is_blank).parse(input)
}

fn word(input: &str) -> IResult<&str, &str> {
    take_till(is_blank).parse(input)
}

fn option_word(input: &str) -> IResult<&str, OptionWord<'_>> {
    let name = verify(
        take_while1(|c: char| c.is_alphanumeric() || c == '_' || c == '-'),
        |name: &str| name.starts_with(char::is_alphabetic),
    );
    map(
        consumed(separated_pair(name, char('='), word)),
        |(word, (name, value))| OptionWord { word, name, value },
    )
    .parse(input)
}

fn is_blank(c: char) -> bool {
    c == ' ' || c == '\t'
}

impl<'a> Words<'a> {
    /// `numbers`: the lines of the addresses so far.
    fn target(
        &self,
        regexes: &mut Regexes<'a>,
        numbers: &mut HashMap<&'a str, usize>,
        number: usize,
    ) -> Result<Target, Vec<Fault>> {
        let mut faults = Vec::new();
        let mut settings = Settings::default();
        let url = self.keep(&mut faults, self.address, read_address(self.address));
        if url.is_some() {
            let new = match numbers.entry(self.address) {
                Entry::Vacant(entry) => Ok(*entry.insert(number)),
                Entry::Occupied(entry) => Err(Fault::new(
                    0,
                    format!(
                        "the same address as in line {}; keep one of the lines",
                        entry.get()
                    ),
                )),
            };
            self.keep(&mut faults, self.address, new);
        }
        let interval = self.keep(&mut faults, self.frequency, read_frequency(self.frequency));
        for option in &self.options {
            let set = settings.set(option).map_err(|fault| fault.or_regex(option.word));
            self.keep(&mut faults, option.word, set);
        }
        let regex = self.keep(&mut faults, self.regex, self.regex(regexes, &settings));
        match (url, interval, regex) {
            (Some(url), Some(interval), Some(regex)) if faults.is_empty() => {
                Ok(settings.target(self.address, url, interval, regex))
            }
            _ => Err(faults),
        }
    }

    fn regex(&self, regexes: &mut Regexes<'a>, settings: &Settings) -> Result<Option<Arc<Pattern>>, Fault> {
        if self.regex.is_empty() {
            return Ok(None);
        }
        if let Some(Slip::Refused(fault)) = slips::in_regex(self) {
            return Err(fault);
        }
        let regex = regexes.compile(self.regex)?;
        settings.reads_a_body()?;
        Ok(Some(regex))
    }

    /// The value, or `None` and one more fault, whose place is counted from the beginning of `part`.
    fn keep<T>(&self, faults: &mut Vec<Fault>, part: &str, result: Result<T, Fault>) -> Option<T> {
        result.map_err(|fault| faults.push(self.at(part, fault))).ok()
    }

    /// The fault with its place counted from the beginning of the line, instead of `part`.
    fn at(&self, part: &str, fault: Fault) -> Fault {
        Fault {
            at: self.line.offset(part) + fault.at,
            ..fault
        }
    }
}

fn read_address(text: &str) -> Result<Url, Fault> {
    if text.len() > MAX_ADDRESS_BYTES {
        let what = format!(
            "the address has {} bytes; {MAX_ADDRESS_BYTES} at most",
            text.len()
        );
        return Err(Fault::new(0, what));
    }
    if let Some(at) = text.find(|c: char| c.is_control() || c.is_whitespace()) {
        let what = match text[at..].starts_with(is_blank) {
            // Only in an argument of `check`: a host file's words end there.
            true => "a blank in the address; write it as %20",
            false => {
                "a control character, or a blank other than a space or a tab; separate words with spaces or tabs"
            }
        };
        return Err(Fault::new(at, what));
    }
    if let Some(userinfo) = userinfo(text) {
        let what = format!(
            "credentials in the address ({}) would stand in every record; remove them",
            quoted(text)
        );
        return Err(Fault::new(userinfo.start, what));
    }
    // Browsers read it as a slash: `http:\\host` would be the host `http`.
    let path_end = text.find(['?', '#']).unwrap_or(text.len());
    if let Some(at) = text[..path_end].find('\\') {
        return Err(Fault::new(at, "a backslash in the address; write `/`"));
    }

    let authority_end = text.find(['/', '?', '#']).unwrap_or(text.len());
    let (before, after) = text.split_at(authority_end);
    let scheme = before.strip_suffix(':').filter(|_| after.starts_with("//"));
    let url = match scheme {
        Some(scheme)
            if ["http", "https"]
                .iter()
                .any(|known| known.eq_ignore_ascii_case(scheme)) =>
        {
            Url::parse(text)
        }
        Some(scheme) => {
            let what = format!(
                "expected http:// or https://, not {}",
                quoted(&format!("{scheme}://"))
            );
            return Err(Fault::new(0, what));
        }
        None if before.parse::<Ipv6Addr>().is_ok() => {
            let what = format!("put an IPv6 address in brackets: `[{before}]`");
            return Err(Fault::new(0, what));
        }
        None => Url::parse(&format!("https://{text}")),
    };
    // Browsers look for the host behind further slashes.
    let has_no_host = match scheme {
        Some(_) => after.starts_with("///"),
        None => before.is_empty(),
    };
    let not_a_url = |why: &dyn Display| {
        let what = format!(
            "{} is not an address: {why}; expected a URL like https://example.com/ or a domain",
            quoted(text)
        );
        Fault::new(0, what)
    };
    if has_no_host {
        return Err(not_a_url(&"it has no host"));
    }
    // `http:/host` would be a host called `http`.
    if scheme.is_none() && before.ends_with(':') {
        return Err(not_a_url(&"there is no port after the `:`"));
    }
    let mut url = url.map_err(|error| not_a_url(&error))?;
    match url.host() {
        None | Some(Host::Domain("")) => return Err(not_a_url(&"it has no host")),
        Some(Host::Domain(domain)) if !is_host_name(domain) => {
            return Err(not_a_url(&format_args!(
                "{} cannot be the name of a host",
                quoted(domain)
            )));
        }
        // `https://https://example.com/` and `https//example.com`.
        Some(Host::Domain(domain)) if ["http", "https"].contains(&domain) => {
            return Err(not_a_url(&format_args!(
                "`{domain}` is a protocol and not a host; write it once, as `{domain}://`"
            )));
        }
        Some(Host::Domain(domain)) if !can_be_named(&url) => {
            return Err(not_a_url(&format_args!("{}: {NOT_NAMED}", quoted(domain))));
        }
        // `5` and `10.1` are addresses to browsers, and slips in a file whose second column is a number.
        Some(Host::Ipv4(ip)) if scheme.is_none() && !text.starts_with(&ip.to_string()) => {
            return Err(not_a_url(&"it is a number"));
        }
        Some(_) => {}
    }
    if url.port() == Some(0) {
        return Err(not_a_url(&"there is no port 0"));
    }
    url.set_fragment(None);
    Ok(url)
}

/// Whether a name server could know it: RFC 1035's lengths, letters and digits, and the underscore that many use.
fn is_host_name(domain: &str) -> bool {
    let domain = domain.strip_suffix('.').unwrap_or(domain);
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
    };
    domain.len() <= 253 && domain.split('.').all(is_label)
}

fn read_frequency(text: &str) -> Result<Duration, Fault> {
    let expected = "a whole number of minutes, or one with s, m, h or d, e.g. `5` or `30s`";
    if text.is_empty() {
        return Err(Fault::new(
            0,
            format!("FREQUENCY is missing: expected {expected}"),
        ));
    }
    let interval = duration::parse_interval(text).ok_or_else(|| {
        Fault::new(
            0,
            format!("{} is not a FREQUENCY: expected {expected}", quoted(text)),
        )
    })?;
    if !INTERVALS.contains(&interval) {
        let what = format!(
            "the FREQUENCY {} is out of bounds: 1s at least, 366d at most",
            quoted(text)
        );
        return Err(Fault::new(0, what));
    }
    Ok(interval)
}

const KNOWN_OPTIONS: &str = "the options are timeout, status, method, follow, topic, ip and tls";
const OPTION_NAMES: [&str; 7] = ["timeout", "status", "method", "follow", "topic", "ip", "tls"];

/// The options given so far.
#[derive(Default)]
struct Settings {
    timeout: Option<Duration>,
    status: Option<StatusSet>,
    method: Option<Method>,
    follow: Option<u32>,
    topic: Option<String>,
    ip_family: Option<IpFamily>,
    tls: Option<Tls>,
}

impl Settings {
    fn set(&mut self, option: &OptionWord<'_>) -> Result<(), Fault> {
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
            name => Err(Fault::new(
                0,
                format!("{} is not an option: {KNOWN_OPTIONS}", quoted(name)),
            )),
        }
    }

    fn reads_a_body(&self) -> Result<(), Fault> {
        match self.method {
            Some(Method::Head) => Err(Fault::new(
                0,
                "the response to HEAD has no body that a REGEX could be found in; remove one of them",
            )),
            _ => Ok(()),
        }
    }

    fn target(self, address: &str, url: Url, interval: Duration, regex: Option<Arc<Pattern>>) -> Target {
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
    ) -> Result<(), Fault> {
        let Some(value) = read(self.value) else {
            let what = format!("{}: expected {expected}", quoted(self.word));
            return Err(Fault::new(self.name.len() + 1, what));
        };
        match slot.replace(value) {
            None => Ok(()),
            Some(_) => Err(Fault::new(0, format!("`{}` is given twice", self.name))),
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

/// Each regex once, however many lines have it, and all of them within a bound.
#[derive(Default)]
struct Regexes<'a> {
    compiled: HashMap<&'a str, Arc<Pattern>>,
    bytes: usize,
}

impl<'a> Regexes<'a> {
    fn compile(&mut self, text: &'a str) -> Result<Arc<Pattern>, Fault> {
        if let Some(pattern) = self.compiled.get(text) {
            return Ok(Arc::clone(pattern));
        }
        // Compiling takes time, too.
        self.room()?;
        let pattern = compile(text)?;
        self.bytes += pattern.compiled_bytes();
        self.room()?;
        self.compiled.insert(text, Arc::clone(&pattern));
        Ok(pattern)
    }

    fn room(&self) -> Result<(), Fault> {
        if self.bytes <= MAX_COMPILED_BYTES_OF_A_FILE {
            return Ok(());
        }
        let what = format!(
            "up to this REGEX the file's take more than {} MiB when compiled; use equal ones, which are kept once, or \
             smaller ones: `(?-u:\\w)` and `[0-9]` are a hundredth of `\\w` and `\\d`, which know all of Unicode",
            MAX_COMPILED_BYTES_OF_A_FILE >> 20
        );
        Err(Fault::new(0, what))
    }
}

fn compile(text: &str) -> Result<Arc<Pattern>, Fault> {
    if text.len() > MAX_REGEX_BYTES {
        let what = format!("the REGEX has {} bytes; {MAX_REGEX_BYTES} at most", text.len());
        return Err(Fault::new(0, what));
    }
    Pattern::new(text).map(Arc::new).map_err(|error| {
        let why = error.why.split_whitespace().collect::<Vec<_>>().join(" ");
        Fault::new(error.at, format!("the REGEX is none: {why}"))
    })
}
