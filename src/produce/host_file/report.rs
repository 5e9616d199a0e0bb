//! What can be wrong with a host file, and how it is printed: `FILE:LINE:COLUMN: what`, the line, a caret.

use std::fmt::Display;

use super::quote::{is_blank, printable, quoted, without_credentials};

/// The most errors, and the most warnings, that are printed of one file.
const MAX_SHOWN_FAULTS: usize = 100;

/// How much of a line is printed on either side of the caret.
const MAX_SHOWN_CHARS: usize = 60;

/// Everything that is wrong with a host file, in the order of its lines, as it is printed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct HostFileError(pub String);

/// What is wrong with a line, and where.
pub(super) struct LineFault {
    /// In bytes from the beginning of the line.
    pub at: usize,
    pub what: String,
}

impl LineFault {
    pub(super) fn new(at: usize, what: impl Into<String>) -> Self {
        let what = what.into();
        Self { at, what }
    }

    /// Adds how to write the word where it was meant as the beginning of a REGEX.
    pub(super) fn or_regex(self, word: &str) -> Self {
        Self::new(
            self.at,
            format!(
                "{}; to use it as a REGEX, write {}",
                self.what,
                quoted(&format!("({word})"))
            ),
        )
    }
}

/// Collects errors and warnings in the form in which they are printed.
#[derive(Default)]
pub(super) struct ErrorReport {
    pub faults: usize,
    text: String,
    warnings: Vec<String>,
    more_warnings: usize,
}

impl ErrorReport {
    /// `place` is what is printed before the column: the file and the line number.
    pub(super) fn add(&mut self, place: impl Display, line: &str, fault: &LineFault) {
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
        // Tabs are kept: the terminal then indents the caret as far as the character above it.
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

    /// Adds a warning: the line is valid, but probably not what was meant.
    pub(super) fn warn(&mut self, place: impl Display, line: &str, fault: &LineFault) {
        if self.warnings.len() == MAX_SHOWN_FAULTS {
            self.more_warnings += 1;
            return;
        }
        let column = 1 + line[..fault.at].chars().count();
        self.warnings.push(format!("{place}:{column}: {}", fault.what));
    }

    pub(super) fn take_warnings(&mut self) -> Vec<String> {
        if self.more_warnings > 0 {
            self.warnings
                .push(format!("and {} more lines like these", self.more_warnings));
        }
        std::mem::take(&mut self.warnings)
    }

    pub(super) fn keep<T>(&mut self, place: &str, line: &str, result: Result<T, LineFault>) -> Option<T> {
        result.map_err(|fault| self.add(place, line, &fault)).ok()
    }

    /// Returns the value if there was no error.
    pub(super) fn finish<T>(mut self, value: Option<T>) -> Result<T, HostFileError> {
        if self.faults > MAX_SHOWN_FAULTS {
            self.text += &format!("\nand {} more errors", self.faults - MAX_SHOWN_FAULTS);
        }
        value.filter(|_| self.faults == 0).ok_or(HostFileError(self.text))
    }
}

/// The part of the line around the byte `at` that may be printed. It consists of whole words, because credentials cannot be
/// recognised in half a word.
fn window(line: &str, at: usize) -> (usize, usize) {
    // A character takes at most four bytes.
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
