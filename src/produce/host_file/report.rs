//! What is wrong with a host file, as it is printed: `FILE:LINE:COLUMN: what`, the line, a caret.
//!
//! Whatever is shown here goes to a terminal and into logs: control characters and credentials do not.

use std::fmt::Display;
use std::ops::Range;

use nom::Offset;
use url::Url;

use super::{HostFileError, is_blank};

/// What is printed of a file that is wrong all over.
const MAX_SHOWN_FAULTS: usize = 100;

/// What is shown of a line on either side of the caret.
const MAX_SHOWN_CHARS: usize = 60;

/// What is shown of a word within a message.
pub(super) const MAX_QUOTED_CHARS: usize = 60;

/// What is wrong with a line, and where: bytes from its beginning.
pub(super) struct Fault {
    pub at: usize,
    pub what: String,
}

impl Fault {
    pub fn new(at: usize, what: impl Into<String>) -> Self {
        let what = what.into();
        Self { at, what }
    }

    /// The word may have been meant as the beginning of a regex.
    pub fn or_regex(self, word: &str) -> Self {
        Self::new(
            self.at,
            format!("{}; as a REGEX write {}", self.what, quoted(&format!("({word})"))),
        )
    }
}

/// The errors and warnings as they will be printed.
#[derive(Default)]
pub(super) struct Report {
    pub faults: usize,
    text: String,
    warnings: Vec<String>,
    more_warnings: usize,
}

impl Report {
    /// `place` stands before the column.
    pub fn add(&mut self, place: impl Display, line: &str, fault: &Fault) {
        self.faults += 1;
        if self.faults > MAX_SHOWN_FAULTS {
            return;
        }
        let column = 1 + line[..fault.at].chars().count();
        let (start, end) = window(line, fault.at);
        let is_first = line[..start].trim_matches(is_blank).is_empty();
        let (shown, caret) = without_credentials(&line[start..end], fault.at - start, is_first);
        let (before, after) = shown.split_at(caret);
        let from = before
            .char_indices()
            .rev()
            .nth(MAX_SHOWN_CHARS - 1)
            .map_or(0, |(from, _)| from);
        let to = after
            .char_indices()
            .nth(MAX_SHOWN_CHARS)
            .map_or(after.len(), |(to, _)| to);
        let cut = |is_cut| if is_cut { "…" } else { "" };
        let before = format!("{}{}", cut(start + from > 0), &before[from..]);
        let after = format!("{}{}", &after[..to], cut(to < after.len() || end < line.len()));
        // Tabs are kept, so that the caret stands where the terminal puts the character above it.
        let under: String = before
            .chars()
            .map(|c| if c == '\t' { '\t' } else { ' ' })
            .collect();
        let shown = printable(&format!("{before}{after}"));
        let newline = if self.text.is_empty() { "" } else { "\n" };
        self.text += &format!(
            "{newline}{place}:{column}: {}\n    {shown}\n    {under}^",
            fault.what
        );
    }

    /// A line that is understood, but probably not as it was meant.
    pub fn warn(&mut self, place: impl Display, line: &str, fault: &Fault) {
        if self.warnings.len() == MAX_SHOWN_FAULTS {
            self.more_warnings += 1;
            return;
        }
        let column = 1 + line[..fault.at].chars().count();
        self.warnings.push(format!("{place}:{column}: {}", fault.what));
    }

    pub fn take_warnings(&mut self) -> Vec<String> {
        if self.more_warnings > 0 {
            self.warnings
                .push(format!("and {} more lines like these", self.more_warnings));
        }
        std::mem::take(&mut self.warnings)
    }

    pub fn keep<T>(&mut self, place: &str, line: &str, result: Result<T, Fault>) -> Option<T> {
        result.map_err(|fault| self.add(place, line, &fault)).ok()
    }

    /// The value, if nothing was wrong.
    pub fn finish<T>(mut self, value: Option<T>) -> Result<T, HostFileError> {
        if self.faults > MAX_SHOWN_FAULTS {
            self.text += &format!("\nand {} more errors", self.faults - MAX_SHOWN_FAULTS);
        }
        value.filter(|_| self.faults == 0).ok_or(HostFileError(self.text))
    }
}

/// A part of the line with all that is shown around the byte `at`, in whole words: half a word would not look like
/// the credentials that it has.
fn window(line: &str, at: usize) -> (usize, usize) {
    // A character has four bytes at most.
    let reach = 4 * MAX_SHOWN_CHARS;
    let mut start = at.saturating_sub(reach);
    while !line.is_char_boundary(start) {
        start -= 1;
    }
    let mut end = line.len().min(at + reach);
    while !line.is_char_boundary(end) {
        end += 1;
    }
    (
        line[..start].rfind(is_blank).map_or(0, |blank| blank + 1),
        line[end..].find(is_blank).map_or(line.len(), |blank| end + blank),
    )
}

/// The text with `***` for every user and password in it, and where the byte `at` then is. Behind the first word, which
/// is the address, only what has the look of a URL counts: an `@` in a regex is none of ours.
fn without_credentials(text: &str, at: usize, is_first: bool) -> (String, usize) {
    let mut shown = String::with_capacity(text.len());
    let mut moved = None;
    let mut is_first = is_first;
    for piece in text.split_inclusive(is_blank) {
        let word = piece.trim_end_matches(is_blank);
        let hidden = userinfo(word).filter(|_| is_first || word.contains("://"));
        is_first &= word.is_empty();
        let start = text.offset(piece);
        if (start..start + piece.len()).contains(&at) {
            let at = at - start;
            let at = match &hidden {
                Some(hidden) if at >= hidden.end => at - hidden.len() + HIDDEN.len(),
                Some(hidden) => at.min(hidden.start),
                None => at,
            };
            moved = Some(shown.len() + at);
        }
        match hidden {
            Some(hidden) => {
                shown += &piece[..hidden.start];
                shown += HIDDEN;
                shown += &piece[hidden.end..];
            }
            None => shown += piece,
        }
    }
    let end = shown.len();
    (shown, moved.unwrap_or(end))
}

const HIDDEN: &str = "***";

/// Where a word that is an address has a user and perhaps a password.
pub(super) fn userinfo(word: &str) -> Option<Range<usize>> {
    let start = word.find("://").map_or(0, |colon| colon + 3);
    let tail = &word[start..];
    // A backslash, which ends it for browsers, does not: an address has none, and a password may.
    let authority_end = tail.find(['/', '?', '#']).unwrap_or(tail.len());
    if let Some(end) = tail[..authority_end].rfind('@') {
        return Some(start..start + end);
    }
    // A password with a slash in it ends the authority too early, and what is left is no URL.
    let end = tail.rfind('@')?;
    let url = match start {
        0 => Url::parse(&format!("https://{word}")),
        _ => Url::parse(word),
    };
    url.is_err().then_some(start..start + end)
}

/// For messages: cut, printable and without credentials.
pub(super) fn quoted(word: &str) -> String {
    let (word, _) = without_credentials(word, 0, true);
    let word = match word.char_indices().nth(MAX_QUOTED_CHARS) {
        Some((end, _)) => format!("{}…", &word[..end]),
        None => word,
    };
    format!("`{}`", printable(&word))
}

fn printable(text: &str) -> String {
    text.chars()
        .map(|c| {
            if c.is_control() && c != '\t' {
                char::REPLACEMENT_CHARACTER
            } else {
                c
            }
        })
        .collect()
}
