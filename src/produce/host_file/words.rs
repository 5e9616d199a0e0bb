//! A line of the host file, split into its words.

use std::borrow::Cow;

use nom::Offset;

use super::quote::is_blank;
use super::report::LineFault;

/// The most options and profiles of a line. Without a limit, a long file that is no host file would take much memory.
pub(super) const MAX_WORDS: usize = 100;

/// A line split into its parts, each a slice of it. FREQUENCY, the words and the REGEX may be empty.
pub(super) struct Line<'a> {
    pub line: &'a str,
    pub address: &'a str,
    pub frequency: &'a str,
    pub words: Vec<Word<'a>>,
    /// Without the `!` before it.
    pub regex: &'a str,
    pub regex_absent: bool,
}

/// A word between FREQUENCY and REGEX.
pub(super) enum Word<'a> {
    Option(OptionWord<'a>),
    /// `@NAME`, with the `@`.
    Profile(&'a str),
}

/// `status=200`, or any other word like `NAME=VALUE` or `NAME="VALUE"`.
pub(super) struct OptionWord<'a> {
    pub word: &'a str,
    pub name: &'a str,
    /// Without quotes.
    pub value: Cow<'a, str>,
    pub is_quoted: bool,
    /// What is wrong with the quotes, relative to the word.
    pub fault: Option<(usize, &'static str)>,
}

/// Splits the line of a host. `has_profiles`: a word like `@NAME` is a profile and not the beginning of the REGEX.
pub(super) fn split_line(line: &str, has_profiles: bool) -> Line<'_> {
    let (address, rest) = split_word(line.trim_start_matches(is_blank));
    let (frequency, rest) = split_word(rest);
    let (words, rest) = split_options(rest, has_profiles);
    let (first, behind) = split_word(rest);
    let regex_absent = first == "!" && !behind.is_empty();
    Line {
        line,
        address,
        frequency,
        words,
        regex: if regex_absent { behind } else { rest },
        regex_absent,
    }
}

/// The address, the frequency, the options (and profiles) and the REGEX of a line, as written.
pub fn columns(line: &str) -> [&str; 4] {
    let line = line.trim_matches(|c| is_blank(c) || c == '\r');
    let parts = split_line(line, true);
    let options_at = line.offset(parts.frequency) + parts.frequency.len();
    let mut regex_at = line.len() - parts.regex.len();
    if parts.regex_absent {
        regex_at = line[..regex_at].rfind('!').unwrap_or(regex_at);
    }
    [
        parts.address,
        parts.frequency,
        line[options_at..regex_at].trim_matches(is_blank),
        &line[regex_at..],
    ]
}

/// The options and profiles at the beginning of the text, and the rest.
pub(super) fn split_options(text: &str, has_profiles: bool) -> (Vec<Word<'_>>, &str) {
    let mut words = Vec::new();
    let mut rest = text;
    while words.len() <= MAX_WORDS {
        let (first, behind) = split_word(rest);
        if let Some((option, behind)) = option_word(rest) {
            words.push(Word::Option(option));
            rest = behind;
        } else if has_profiles && profile_name(first).is_some() {
            words.push(Word::Profile(first));
            rest = behind;
        } else {
            break;
        }
    }
    (words, rest)
}

/// `NAME=VALUE` at the beginning of the text, and the rest after the blanks behind it.
pub(super) fn option_word(text: &str) -> Option<(OptionWord<'_>, &str)> {
    let is_of_name = |c: char| c.is_alphanumeric() || c == '_' || c == '-';
    let name = &text[..text.find(|c| !is_of_name(c))?];
    let value = text[name.len()..].strip_prefix('=')?;
    if !name.starts_with(char::is_alphabetic) {
        return None;
    }
    let value_at = name.len() + 1;
    let (length, value, fault) = match value.strip_prefix('"') {
        Some(quoted) => {
            let (length, value, fault) = unquote(quoted);
            (
                1 + length,
                Cow::Owned(value),
                fault.map(|(at, what)| (value_at + at, what)),
            )
        }
        None => {
            let (value, _) = split_word(value);
            (value.len(), Cow::Borrowed(value), None)
        }
    };
    let (word, rest) = text.split_at(value_at + length);
    let option = OptionWord {
        word,
        name,
        value,
        is_quoted: word[value_at..].starts_with('"'),
        fault,
    };
    Some((option, rest.trim_start_matches(is_blank)))
}

/// Reads the text after a `"` up to the next one, or to the end if there is none. Returns how many bytes it takes, including
/// what follows the quote up to the next blank, and what is wrong, relative to the quote.
fn unquote(text: &str) -> (usize, String, Option<(usize, &'static str)>) {
    let mut value = String::new();
    let mut fault = None;
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => {
                let (behind, _) = split_word(&text[at + 1..]);
                if !behind.is_empty() {
                    fault = fault.or(Some((at + 2, "expected a space after the closing quote")));
                }
                return (at + 1 + behind.len(), value, fault);
            }
            '\\' => match chars.next() {
                Some((_, escaped @ ('"' | '\\'))) => value.push(escaped),
                _ => {
                    let what = "within quotes, write `\\\\` for a backslash and `\\\"` for a quote";
                    fault = fault.or(Some((at + 1, what)));
                }
            },
            c => value.push(c),
        }
    }
    (
        text.len(),
        value,
        Some((0, "the quotes that begin here do not end")),
    )
}

/// The name of a profile or a secret, without its `@`. It can be the name of a file, and no path.
pub(super) fn profile_name(word: &str) -> Option<&str> {
    let is_of_name = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    word.strip_prefix('@').filter(|name| {
        name.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_') && name.chars().all(is_of_name)
    })
}

impl<'a> Word<'a> {
    pub(super) fn text(&self) -> &'a str {
        match self {
            Self::Option(option) => option.word,
            Self::Profile(word) => word,
        }
    }
}

impl OptionWord<'_> {
    /// Whether it may have been meant as the beginning of the REGEX.
    pub(super) fn may_be_regex(&self) -> bool {
        !self.is_quoted && !["header", "body", "auth", "cert", "proxy"].contains(&self.name)
    }

    /// A fault at the value.
    pub(super) fn fault(&self, what: impl Into<String>) -> LineFault {
        LineFault::new(self.name.len() + 1, what)
    }
}

/// The text up to the first blank, and the text after the blanks.
pub(super) fn split_word(text: &str) -> (&str, &str) {
    let (first, rest) = text.split_at(text.find(is_blank).unwrap_or(text.len()));
    (first, rest.trim_start_matches(is_blank))
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_columns_of_a_line_are_its_parts_as_written() {
        for (line, columns) in [
            ("a.example 5", ["a.example", "5", "", ""]),
            (
                " a.example\t30s  timeout=3s   status=200  all  is well ",
                ["a.example", "30s", "timeout=3s   status=200", "all  is well"],
            ),
            (
                "a.example 5 (status=ok) x=y\r",
                ["a.example", "5", "", "(status=ok) x=y"],
            ),
            (
                "a.example 5 @shop name=\"a  b\" ! not this",
                ["a.example", "5", "@shop name=\"a  b\"", "! not this"],
            ),
            ("a.example", ["a.example", "", "", ""]),
        ] {
            assert_eq!(super::columns(line), columns, "{line}");
        }
    }
}
