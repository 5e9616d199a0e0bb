//! What can be wrong with a host file or with one of its lines.

use super::quote::quoted;

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
