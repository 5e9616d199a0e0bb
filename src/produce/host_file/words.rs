//! A line of the host file, split into its words.

use nom::bytes::complete::{take_till, take_while, take_while1};
use nom::character::complete::char;
use nom::combinator::{consumed, map, rest, verify};
use nom::multi::many_m_n;
use nom::sequence::{preceded, separated_pair};
use nom::{IResult, Parser};

/// There are seven options, and each may be given once: a line with more words like `NAME=VALUE` is wrong anyway.
const MAX_OPTIONS: usize = 16;

/// A line split into its parts, each a slice of it. FREQUENCY, the options and the REGEX may be empty.
pub(super) struct Line<'a> {
    pub line: &'a str,
    pub address: &'a str,
    pub frequency: &'a str,
    pub options: Vec<OptionWord<'a>>,
    pub regex: &'a str,
}

/// `status=200`, or any other word like `NAME=VALUE`.
pub(super) struct OptionWord<'a> {
    pub word: &'a str,
    pub name: &'a str,
    pub value: &'a str,
}

pub(super) fn split_line(line: &str) -> IResult<&str, Line<'_>> {
    let parts = (
        preceded(blanks, word),
        preceded(blanks, word),
        many_m_n(0, MAX_OPTIONS, preceded(blanks, option_word)),
        preceded(blanks, rest),
    );
    map(parts, |(address, frequency, options, regex)| Line {
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

pub(super) fn option_word(input: &str) -> IResult<&str, OptionWord<'_>> {
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

pub(super) fn is_blank(c: char) -> bool {
    c == ' ' || c == '\t'
}

pub(super) fn split_word(text: &str) -> (&str, &str) {
    let (first, rest) = text.split_at(text.find(is_blank).unwrap_or(text.len()));
    (first, rest.trim_start_matches(is_blank))
}
