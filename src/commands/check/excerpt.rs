//! Where a REGEX matched in a body: the line, and the match in its context. Pure.

use std::ops::Range;

use anstyle::{AnsiColor, Style};

use crate::terminal::{fit, plain};

/// How much of the line is shown on each side of the match, in characters.
const CONTEXT: usize = 30;

/// How much of the match is shown.
const MATCH: usize = 60;

/// How much of a body without a match is shown.
const BEGINNING: usize = 160;

const FOUND: Style = AnsiColor::Yellow.on_default().bold();

/// As in `line 12: …<title>Example Domain</title>`, with the match in colour.
pub(super) fn around(body: &str, found: Range<usize>) -> String {
    let (before, after) = (&body[..found.start], &body[found.end..]);
    let number = before.matches('\n').count() + 1;
    let line = before.rsplit('\n').next().unwrap_or_default().trim_start();
    let left = match line.char_indices().rev().nth(CONTEXT - 1) {
        Some((at, _)) if at > 0 => format!("…{}", &line[at..]),
        _ => line.to_owned(),
    };
    let right = fit(after.lines().next().unwrap_or_default().trim_end(), CONTEXT + 1);
    let found = fit(&body[found], MATCH);
    format!(
        "line {number}: {}{FOUND}{}{FOUND:#}{}",
        plain(&left),
        plain(&found),
        plain(&right)
    )
}

/// How the body begins, on one line.
pub(super) fn beginning(body: &str) -> String {
    // Enough of it even if most of its characters are blanks.
    let part: String = body.chars().take(BEGINNING * 8).collect();
    let words: Vec<_> = plain(&part).split_whitespace().map(str::to_owned).collect();
    let beginning = fit(&words.join(" "), BEGINNING);
    match beginning.matches('\u{fffd}').count() {
        // Bytes that no charset explains: a picture, an archive.
        8.. => "not with text".to_owned(),
        _ => beginning,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(body: &str, found: &str) -> String {
        let start = body.find(found).unwrap();
        let text = around(body, start..start + found.len());
        anstream::adapter::strip_str(&text).to_string()
    }

    #[test]
    fn a_match_is_shown_with_its_line_and_what_is_around_it() {
        assert_eq!(shown("a\nb c d\ne", "c"), "line 2: b c d");
        assert_eq!(shown("c", "c"), "line 1: c");
        assert_eq!(shown("\n\n", "\n\n"), "line 1:   ");
        assert_eq!(shown("  in two\nlines", "two\nli"), "line 1: in two lines");
        let long = format!("{}x{}", "ä".repeat(40), "ö".repeat(40));
        let expected = format!("line 1: …{}x{}…", "ä".repeat(30), "ö".repeat(30));
        assert_eq!(shown(&long, "x"), expected);
        assert_eq!(shown("\x1b[31mx\u{202e}", "x"), "line 1:  [31mx ");
        let whole = around("abc", 1..2);
        assert_eq!(whole, format!("line 1: a{FOUND}b{FOUND:#}c"));
    }

    #[test]
    fn a_beginning_is_one_line() {
        assert_eq!(beginning(" <html>\r\n\t<p>\x1b "), "<html> <p>");
        assert_eq!(beginning(&"é".repeat(1_000)).chars().count(), BEGINNING);
        assert_eq!(beginning(&"PNG\u{fffd}".repeat(10)), "not with text");
    }
}
