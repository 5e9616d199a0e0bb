//! Parses a whole host file, or the arguments of the `check` command.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use nom::combinator::all_consuming;
use nom::{Offset, Parser};

use super::address::read_address;
use super::fault::{HostFileError, LineFault};
use super::options::{INTERVALS, Options, known_options, read_frequency};
use super::regexes::{Regexes, compile};
use super::report::ErrorReport;
use super::slips::{self, Slip};
use super::words::{Line, is_blank, option_word, split_line};
use crate::check::pattern::Pattern;
use crate::check::target::Target;

/// The hosts of a file.
#[derive(Clone, Debug, Default)]
pub struct Hosts {
    pub targets: Vec<Target>,
    /// Lines that are valid but probably not what was meant, as `FILE:LINE:COLUMN: what`.
    pub warnings: Vec<String>,
}

/// Parses a whole host file. `name` is the file's name in messages (`FILE:LINE:COLUMN`).
///
/// # Errors
/// A line is wrong, or the file has no hosts.
pub fn parse(name: &str, contents: &[u8]) -> Result<Hosts, HostFileError> {
    let mut report = ErrorReport::default();
    if contents.starts_with(b"\xff\xfe") || contents.starts_with(b"\xfe\xff") {
        let fault = LineFault::new(0, "the file is UTF-16; save it as UTF-8");
        report.add(format_args!("{name}:1"), "", &fault);
        return report.finish(None);
    }

    let mut targets = Vec::new();
    let mut regexes = Regexes::default();
    let mut numbers = HashMap::new();
    let contents = contents.strip_prefix(b"\xef\xbb\xbf").unwrap_or(contents);
    for (number, bytes) in (1..).zip(contents.split(|byte| *byte == b'\n')) {
        let place = format_args!("{name}:{number}");
        let text = match std::str::from_utf8(bytes) {
            Ok(text) => text.trim_end_matches(|c| is_blank(c) || c == '\r'),
            Err(error) => {
                let fault = LineFault::new(error.valid_up_to(), "not UTF-8; save the file as UTF-8");
                report.add(place, &String::from_utf8_lossy(bytes), &fault);
                continue;
            }
        };
        let content = text.trim_start_matches(is_blank);
        if content.is_empty() || content.starts_with('#') {
            continue;
        }
        let target = match split_line(text) {
            Ok((_, line)) => {
                let target = line.target(&mut regexes, &mut numbers, number);
                if let Some(Slip::Warned(fault)) = slips::in_regex(&line) {
                    report.warn(place, text, &line.at(line.regex, fault));
                }
                target
            }
            Err(error) => Err(vec![LineFault::new(0, error.to_string())]),
        };
        match target {
            Ok(target) => targets.push(target),
            Err(faults) => faults.iter().for_each(|fault| report.add(place, text, fault)),
        }
    }
    if targets.is_empty() && report.faults == 0 {
        let what = "the file has no hosts; write one per line: ADDRESS FREQUENCY [option=value ...] [REGEX], \
                    e.g. https://example.com 5";
        report.add(format_args!("{name}:1"), "", &LineFault::new(0, what));
    }
    let warnings = report.take_warnings();
    report.finish(Some(Hosts { targets, warnings }))
}

/// The target of the `check` command, from its arguments. There is no interval that bounds the timeout, and the REGEX is
/// not searched for slips, because the shell keeps arguments apart.
///
/// # Errors
/// An argument is wrong. The errors look like a host file's, with `ADDRESS`, `OPTION` or `REGEX` in place of file and line.
pub fn target(address: &str, options: &[String], regex: Option<&str>) -> Result<Target, HostFileError> {
    let mut report = ErrorReport::default();
    let mut settings = Options::default();
    let url = report.keep("ADDRESS", address, read_address(address));
    for option in options {
        let set = match all_consuming(option_word).parse(option) {
            Ok((_, word)) => settings.set(&word),
            Err(_) => Err(LineFault::new(
                0,
                format!("expected NAME=VALUE; {}", known_options()),
            )),
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

impl<'a> Line<'a> {
    /// `numbers` has the line number of every address so far.
    fn target(
        &self,
        regexes: &mut Regexes<'a>,
        numbers: &mut HashMap<&'a str, usize>,
        number: usize,
    ) -> Result<Target, Vec<LineFault>> {
        let mut faults = Vec::new();
        let mut settings = Options::default();
        let url = self.keep(&mut faults, self.address, read_address(self.address));
        if url.is_some() {
            let new = match numbers.entry(self.address) {
                Entry::Vacant(entry) => Ok(*entry.insert(number)),
                Entry::Occupied(entry) => Err(LineFault::new(
                    0,
                    format!(
                        "line {} has the same address; remove one of the two lines",
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

    fn regex(
        &self,
        regexes: &mut Regexes<'a>,
        settings: &Options,
    ) -> Result<Option<Arc<Pattern>>, LineFault> {
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

    /// Returns the value, or adds the fault, whose place is relative to `part`, and returns `None`.
    fn keep<T>(&self, faults: &mut Vec<LineFault>, part: &str, result: Result<T, LineFault>) -> Option<T> {
        result.map_err(|fault| faults.push(self.at(part, fault))).ok()
    }

    /// The fault with its place relative to the line instead of to `part`.
    fn at(&self, part: &str, fault: LineFault) -> LineFault {
        LineFault {
            at: self.line.offset(part) + fault.at,
            ..fault
        }
    }
}
