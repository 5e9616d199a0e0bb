//! Profiles: `@NAME option=value …` defines options that hosts use by `@NAME`.

use std::collections::HashMap;

use nom::Offset;

use super::files::Files;
use super::options::Options;
use super::quote::{is_blank, quoted};
use super::report::LineFault;
use super::words::{Line, MAX_WORDS, Word, profile_name, split_options, split_word};

/// How many profiles a message lists.
const MAX_LISTED: usize = 10;

/// The profiles of a file. Their order, and that of the hosts that use them, does not matter.
#[derive(Default)]
pub(super) struct Profiles<'a> {
    by_name: HashMap<&'a str, Profile<'a>>,
    /// What is wrong in the line of each number.
    faults: HashMap<usize, Vec<LineFault>>,
    is_any: bool,
}

struct Profile<'a> {
    number: usize,
    words: Vec<&'a str>,
    options: Options,
}

impl<'a> Profiles<'a> {
    pub(super) fn of(contents: &'a [u8], files: &Files<'_>) -> Self {
        let mut profiles = Self::default();
        for (number, line) in (1..).zip(contents.split(|byte| *byte == b'\n')) {
            // What is not UTF-8 is reported with the other lines.
            if let Ok(line) = std::str::from_utf8(line)
                && line.trim_start_matches(is_blank).starts_with('@')
            {
                profiles.add(number, line.trim_end_matches(|c| is_blank(c) || c == '\r'), files);
            }
        }
        profiles
    }

    fn add(&mut self, number: usize, line: &'a str, files: &Files<'_>) {
        self.is_any = true;
        let mut faults = Vec::new();
        let mut fault = |part: &str, fault: LineFault| {
            faults.push(LineFault::new(line.offset(part) + fault.at, fault.what));
        };
        let (name, rest) = split_word(line.trim_start_matches(is_blank));
        if profile_name(name).is_none() {
            let what = "expected the name of a profile: letters, digits, `.`, `_` and `-` after the `@`";
            fault(name, LineFault::new(0, what));
        }
        if let Some(first) = self.by_name.get(name) {
            let what = format!(
                "line {} defines {} too; remove one of the two",
                first.number,
                quoted(name)
            );
            fault(name, LineFault::new(0, what));
        }
        let (words, rest) = split_options(rest, true);
        let mut options = Options::default();
        for word in words.iter().take(MAX_WORDS) {
            let set = match word {
                Word::Option(option) => options.set(option, files),
                Word::Profile(_) => Err(LineFault::new(
                    0,
                    "a profile cannot use a profile; name both on the host's line",
                )),
            };
            if let Err(wrong) = set {
                fault(word.text(), wrong);
            }
        }
        if !rest.is_empty() {
            let what = "expected option=value; a profile has no FREQUENCY and no REGEX";
            fault(rest, LineFault::new(0, what));
        } else if words.is_empty() {
            fault(name, LineFault::new(0, "the profile has no options"));
        }
        if profile_name(name).is_some() {
            self.by_name.entry(name).or_insert_with(|| Profile {
                number,
                words: words.iter().map(Word::text).collect(),
                options,
            });
        }
        self.faults.insert(number, faults);
    }

    /// Whether the file defines a profile, right or wrong.
    pub(super) fn is_any(&self) -> bool {
        self.is_any
    }

    /// What is wrong in the line of this number.
    pub(super) fn faults(&mut self, number: usize) -> Vec<LineFault> {
        self.faults.remove(&number).unwrap_or_default()
    }

    /// The options of `@NAME`.
    pub(super) fn get(&self, word: &str) -> Result<Options, LineFault> {
        if let Some(profile) = self.by_name.get(word) {
            return Ok(profile.options.clone());
        }
        let mut names: Vec<&str> = self.by_name.keys().copied().collect();
        names.sort_unstable();
        let more = if names.len() > MAX_LISTED { ", …" } else { "" };
        names.truncate(MAX_LISTED);
        let what = format!(
            "there is no profile {}; the profiles are {}{more}; to use it as a REGEX, write `({word})`",
            quoted(word),
            names.join(", ")
        );
        Err(LineFault::new(0, what))
    }
}

/// The part of a line that gives the option: the option itself, the profile that has it, or the address.
pub(super) fn place<'a>(line: &Line<'a>, option: &str, profiles: &Profiles<'_>) -> &'a str {
    let is_option = |text: &str| {
        text.strip_prefix(option)
            .is_some_and(|rest| rest.starts_with('='))
    };
    let given = line.words.iter().find(|word| is_option(word.text()));
    let in_profile = line.words.iter().rev().find(|word| {
        let profile = profiles.by_name.get(word.text());
        profile.is_some_and(|profile| profile.words.iter().any(|text| is_option(text)))
    });
    given.or(in_profile).map_or(line.address, Word::text)
}
