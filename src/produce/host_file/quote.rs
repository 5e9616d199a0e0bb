//! Parts of a host file as they are shown in messages.
//!
//! Messages go to terminals and into logs: control characters and credentials must not.

use std::ops::Range;

use nom::Offset;
use url::Url;

/// How much of a word is quoted in a message.
pub(super) const MAX_QUOTED_CHARS: usize = 60;

/// Replaces every user and password in the text with `***`. Returns the new text and where the byte `at` is in it.
///
/// `is_first`: the text begins with the address. In later words only URLs are looked at, because an `@` in a REGEX is
/// usually not the end of credentials.
pub(super) fn without_credentials(text: &str, at: usize, is_first: bool) -> (String, usize) {
    let mut shown = String::with_capacity(text.len());
    let mut moved = None;
    let mut is_first = is_first;
    for piece in text.split_inclusive(is_blank) {
        let word = piece.trim_end_matches(is_blank);
        let is_shown = |hidden: &Range<usize>| hidden.is_empty() || !(is_first || word.contains("://"));
        let hidden = literal_secret(word).or_else(|| userinfo(word).filter(|hidden| !is_shown(hidden)));
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

/// The range of the value of `auth=` if it is not the name of a file: it may be the secret itself.
fn literal_secret(word: &str) -> Option<Range<usize>> {
    let value = word
        .strip_prefix("auth=")
        .filter(|value| !value.starts_with('@'))?;
    Some(word.len() - value.len()..word.len())
}

/// The range of a user and a password in an address.
pub(super) fn userinfo(word: &str) -> Option<Range<usize>> {
    let start = word.find("://").map_or(0, |colon| colon + 3);
    let tail = &word[start..];
    // Browsers also end it at a backslash. Here it does not: an address must not have one, but a password can.
    let authority_end = tail.find(['/', '?', '#']).unwrap_or(tail.len());
    if let Some(end) = tail[..authority_end].rfind('@') {
        return Some(start..start + end);
    }
    // A slash in a password ends the authority too early, and the word is then not a valid URL.
    let end = tail.rfind('@')?;
    let url = match start {
        0 => Url::parse(&format!("https://{word}")),
        _ => Url::parse(word),
    };
    url.is_err().then_some(start..start + end)
}

/// A word in a message: shortened, without control characters and credentials.
pub(super) fn quoted(word: &str) -> String {
    let (word, _) = without_credentials(word, 0, true);
    let word = match word.char_indices().nth(MAX_QUOTED_CHARS) {
        Some((end, _)) => format!("{}…", &word[..end]),
        None => word,
    };
    format!("`{}`", printable(&word))
}

pub(super) fn is_blank(c: char) -> bool {
    c == ' ' || c == '\t'
}

pub(super) fn printable(text: &str) -> String {
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
