//! Parses a whole host file, or the arguments of the `check` command.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use nom::Offset;

use super::address::read_address;
use super::files::Files;
use super::options::{INTERVALS, Options, known_options, read_frequency};
use super::profiles::{Profiles, place as place_of};
use super::quote::{is_blank, quoted};
use super::regexes::{Regexes, compile};
use super::report::{ErrorReport, HostFileError, LineFault};
use super::slips;
use super::words::{Line, MAX_WORDS, OptionWord, Word, option_word, split_line, split_word};
use crate::check::pattern::Pattern;
use crate::check::target::Target;

const NO_HOSTS: &str = "the file has no hosts; write one per line: ADDRESS FREQUENCY [option=value ...] [REGEX], \
                        e.g. https://example.com 5";

const SECRET_TO_ANYBODY: &str = "with tls=insecure, whoever can redirect the connection gets the secret; verify the certificate \
                                 (CHECK_CA_FILE) or send no secret";

/// The hosts of a file.
#[derive(Clone, Debug, Default)]
pub struct Hosts {
    pub targets: Vec<Target>,
    /// The profiles that a host uses, by its address; hosts without one are left out.
    pub profiles: HashMap<String, String>,
    /// Lines that are valid but probably not what was meant, as `FILE:LINE:COLUMN: what`.
    pub warnings: Vec<String>,
}

/// [`parse_with`] for host files that name no other files.
pub fn parse(name: &str, contents: &[u8]) -> Result<Hosts, HostFileError> {
    parse_with(name, contents, &Files::new(None, None))
}

/// The bytes without a byte-order mark, or why they cannot be a host file.
fn utf8_bytes(contents: &[u8]) -> Result<&[u8], LineFault> {
    if contents.starts_with(b"\xff\xfe") || contents.starts_with(b"\xfe\xff") {
        return Err(LineFault::new(0, "the file is UTF-16; save it as UTF-8"));
    }
    Ok(contents.strip_prefix(b"\xef\xbb\xbf").unwrap_or(contents))
}

/// The line without the blanks at its end.
fn text_of_line(bytes: &[u8]) -> Result<&str, LineFault> {
    match std::str::from_utf8(bytes) {
        Ok(text) => Ok(text.trim_end_matches(|c| is_blank(c) || c == '\r')),
        Err(error) => {
            let what = "not UTF-8; save the file as UTF-8";
            Err(LineFault::new(error.valid_up_to(), what))
        }
    }
}

/// Parses a whole host file. `name` is the file's name in messages (`FILE:LINE:COLUMN`).
pub fn parse_with(name: &str, contents: &[u8], files: &Files<'_>) -> Result<Hosts, HostFileError> {
    let mut report = ErrorReport::default();
    let invalid = |fault| report.add(format_args!("{name}:1"), "", &fault);
    let Ok(contents) = utf8_bytes(contents).map_err(invalid) else {
        return report.finish(None);
    };
    let mut targets = Vec::new();
    let mut used = HashMap::new();
    let mut regexes = Regexes::default();
    let mut numbers = HashMap::new();
    let mut profiles = Profiles::of(contents, files);
    for (number, bytes) in (1..).zip(contents.split(|byte| *byte == b'\n')) {
        let place = format_args!("{name}:{number}");
        let invalid = |fault| report.add(place, &String::from_utf8_lossy(bytes), &fault);
        let Ok(text) = text_of_line(bytes).map_err(invalid) else {
            continue;
        };
        let content = text.trim_start_matches(is_blank);
        if content.is_empty() || content.starts_with('#') {
            continue;
        }
        if content.starts_with('@') {
            profiles
                .faults(number)
                .iter()
                .for_each(|fault| report.add(place, text, fault));
            continue;
        }
        let line = split_line(text, profiles.is_any());
        let target = line.target(&mut regexes, &mut numbers, number, &profiles, files);
        for fault in line.warnings() {
            report.warn(place, text, &fault);
        }
        match target {
            Ok(target) => {
                if target.tls_insecure && target.secrets().next().is_some() {
                    let fault = LineFault::new(0, SECRET_TO_ANYBODY);
                    report.warn(place, text, &line.at(place_of(&line, "tls", &profiles), fault));
                }
                if let Some(names) = line.profile_names() {
                    used.insert(target.address.clone(), names);
                }
                targets.push(target);
            }
            Err(faults) => faults.iter().for_each(|fault| report.add(place, text, fault)),
        }
    }
    if targets.is_empty() && report.faults == 0 {
        report.add(format_args!("{name}:1"), "", &LineFault::new(0, NO_HOSTS));
    }
    let warnings = report.take_warnings();
    report.finish(Some(Hosts {
        targets,
        profiles: used,
        warnings,
    }))
}

/// [`target_with`] without secrets and bodies from files.
pub fn target(address: &str, options: &[String], regex: Option<&str>) -> Result<Target, HostFileError> {
    target_with(address, options, regex, &Files::new(None, None))
}

/// The target of the `check` command, from its arguments. There is no interval that bounds the timeout, and the REGEX is
/// not searched for slips, because the shell keeps arguments apart.
///
/// # Errors
/// An argument is wrong. The errors look like a host file's, with `ADDRESS`, `OPTION` or `REGEX` in place of file and line.
pub fn target_with(
    address: &str,
    options: &[String],
    regex: Option<&str>,
    files: &Files<'_>,
) -> Result<Target, HostFileError> {
    let mut report = ErrorReport::default();
    let mut settings = Options::default();
    let url = report.keep("ADDRESS", address, read_address(address));
    for option in options {
        let set = match argument(option) {
            Some(word) => settings.set(&word, files),
            None => Err(LineFault::new(
                0,
                format!("expected NAME=VALUE; {}", known_options()),
            )),
        };
        report.keep("OPTION", option, set);
    }
    if let Some(url) = &url {
        for (name, what) in settings.contradictions(url) {
            let is_named = |option: &&String| option.split('=').next() == Some(name);
            let option = options.iter().find(is_named).map_or("", String::as_str);
            report.keep("OPTION", option, Err::<(), _>(LineFault::new(0, what)));
        }
    }
    let mut regex_absent = false;
    let compiled = regex.and_then(|argument| {
        let (first, behind) = split_word(argument);
        regex_absent = first == "!" && !behind.is_empty();
        let regex = if regex_absent { behind } else { argument };
        let compiled = compile(regex).and_then(|compiled| settings.reads_a_body().map(|()| compiled));
        report.keep("REGEX", regex, compiled)
    });
    let target = url.map(|url| settings.target(address, url, *INTERVALS.end(), compiled));
    report.finish(target.map(|target| Target {
        regex_absent,
        ..target
    }))
}

/// An option of the `check` command. Its value may have spaces without quotes, because the shell has removed them.
fn argument(option: &str) -> Option<OptionWord<'_>> {
    let (word, rest) = option_word(option)?;
    match rest {
        "" if word.is_quoted || word.word == option => Some(word),
        _ if word.is_quoted => None,
        _ => Some(OptionWord {
            word: option,
            value: option[word.name.len() + 1..].into(),
            is_quoted: true,
            ..word
        }),
    }
}

impl<'a> Line<'a> {
    /// `numbers` has the line number of every address so far.
    fn target(
        &self,
        regexes: &mut Regexes<'a>,
        numbers: &mut HashMap<&'a str, usize>,
        number: usize,
        profiles: &Profiles<'_>,
        files: &Files<'_>,
    ) -> Result<Target, Vec<LineFault>> {
        let mut faults = Vec::new();
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
        let settings = self.options(&mut faults, profiles, files);
        if let Some(url) = &url {
            for (name, what) in settings.contradictions(url) {
                let fault = Err::<(), _>(LineFault::new(0, what));
                self.keep(&mut faults, place_of(self, name, profiles), fault);
            }
        }
        let regex = self.keep(&mut faults, self.regex, self.regex(regexes, &settings));
        match (url, interval, regex) {
            (Some(url), Some(interval), Some(regex)) if faults.is_empty() => {
                let target = settings.target(self.address, url, interval, regex);
                Ok(Target {
                    regex_absent: self.regex_absent,
                    ..target
                })
            }
            _ => Err(faults),
        }
    }

    /// The line's own options, and below them those of its profiles.
    fn options(&self, faults: &mut Vec<LineFault>, profiles: &Profiles<'_>, files: &Files<'_>) -> Options {
        let mut settings = Options::default();
        let mut shared = Options::default();
        for (index, word) in self.words.iter().enumerate() {
            match word {
                _ if index == MAX_WORDS => {
                    let fault = LineFault::new(0, format!("the line has more than {MAX_WORDS} options"));
                    self.keep(faults, word.text(), Err::<(), _>(fault));
                }
                Word::Option(option) => {
                    let set = settings
                        .set(option, files)
                        .map_err(|fault| match option.may_be_regex() {
                            true => fault.or_regex(option.word),
                            false => fault,
                        });
                    self.keep(faults, option.word, set);
                }
                Word::Profile(word) => {
                    let is_again = self.words[..index].iter().any(|other| other.text() == *word);
                    let profile = match is_again {
                        true => Err(LineFault::new(0, format!("{} is given twice", quoted(word)))),
                        false => profiles.get(word),
                    };
                    if let Some(profile) = self.keep(faults, word, profile) {
                        shared = profile.or(shared);
                    }
                }
            }
        }
        settings.or(shared)
    }

    fn regex(
        &self,
        regexes: &mut Regexes<'a>,
        settings: &Options,
    ) -> Result<Option<Arc<Pattern>>, LineFault> {
        if self.regex.is_empty() {
            return Ok(None);
        }
        if let Some(fault) = slips::lone_unit(self) {
            return Err(fault);
        }
        let regex = regexes.compile(self.regex)?;
        settings.reads_a_body()?;
        Ok(Some(regex))
    }

    /// What is valid but probably not meant, with places relative to the line.
    fn warnings(&self) -> Vec<LineFault> {
        let mut warnings = Vec::new();
        if let Some(fault) = slips::secret_in_address(self.address) {
            warnings.push(self.at(self.address, fault));
        }
        for word in &self.words {
            if let Word::Option(option) = word
                && let Some(fault) = slips::secret_in_option(option)
            {
                warnings.push(self.at(option.word, fault));
            }
        }
        if let Some(fault) = slips::in_regex(self.regex) {
            warnings.push(self.at(self.regex, fault));
        }
        warnings
    }

    fn profile_names(&self) -> Option<String> {
        let names = self.words.iter().filter(|word| matches!(word, Word::Profile(_)));
        let names: Vec<&str> = names.map(Word::text).collect();
        (!names.is_empty()).then(|| names.join(" "))
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
