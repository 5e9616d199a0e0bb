//! Tables for people: columns, sparklines, percentages, durations, and text from other machines. Pure.

use std::fmt::{Display, Write};
use std::sync::LazyLock;

use anstream::adapter::strip_str;
use regex_syntax::hir::{Class, ClassUnicode, HirKind};
use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

/// The number of checks in a sparkline.
pub const SPARKLINE_CHECKS: usize = 20;

const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// For a check without a response, which has no latency.
const NO_RESPONSE: char = '×';

/// A range of latencies below this does not fill the height of the sparkline.
const NOISE_SECONDS: f64 = 0.02;

/// Ends a colour (ECMA-48, SGR).
const NO_COLOUR: &str = "\x1b[0m";

/// For a missing value.
pub const NONE: &str = "-";

/// `1 record`, `5 records`
pub fn counted(count: impl Display, what: &str) -> String {
    let count = count.to_string();
    let plural = if count == "1" { "" } else { "s" };
    format!("{count} {what}{plural}")
}

/// A bar for each check. The scale is the range of the host itself, so changes of a fast host are as visible as those of a
/// slow one.
pub fn sparkline(latencies: &[Option<f64>]) -> String {
    let known = || latencies.iter().flatten().copied();
    let lowest = known().fold(f64::INFINITY, f64::min);
    let highest = known().fold(0.0, f64::max);
    // Noise of a steady host would otherwise look like large changes.
    let range = (highest - lowest).max(lowest / 2.0).max(NOISE_SECONDS);
    latencies
        .iter()
        .map(|latency| match latency {
            None => NO_RESPONSE,
            Some(latency) => {
                let height = (latency - lowest) / range * (BARS.len() - 1) as f64;
                BARS[(height.round() as usize).min(BARS.len() - 1)]
            }
        })
        .collect()
}

/// `text` cut to `width` characters, the last one an ellipsis if something was cut.
pub fn cut(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    let mut short: String = text.chars().take(width.saturating_sub(1)).collect();
    if width > 0 {
        short.push('…');
    }
    short
}

/// The columns that `text` takes on a terminal: two for most characters of East Asia, none for accents and colours.
pub fn width(text: &str) -> usize {
    match text.contains('\x1b') {
        true => strip_str(text).map(UnicodeWidthStr::width).sum(),
        // Faster, for tables with many hosts.
        false => text.width(),
    }
}

/// As [`cut`], but in at most `columns` columns of a terminal. Colours stay.
pub fn fit(text: &str, columns: usize) -> String {
    if width(text) <= columns {
        return text.to_owned();
    }
    let mut left = columns.saturating_sub(1);
    let mut is_colour = false;
    let mut short: String = text
        .chars()
        .take_while(|char| {
            is_colour |= *char == '\x1b';
            let width = if is_colour { 0 } else { char.width().unwrap_or(0) };
            // A colour ends with it.
            is_colour &= *char != 'm';
            let fits = width <= left;
            left = left.saturating_sub(width);
            fits
        })
        .collect();
    if text.contains('\x1b') {
        short.push_str(NO_COLOUR);
    }
    if columns > 0 {
        short.push('…');
    }
    short
}

/// The text with line ends in place of spaces, so that no line takes more than `columns`; all lines but the first begin with
/// `indent` spaces. A longer word stays whole. Colours take no room.
pub fn wrap(text: &str, indent: usize, columns: Option<usize>) -> String {
    let Some(columns) = columns else {
        return text.to_owned();
    };
    let (mut lines, mut used) = (String::new(), 0);
    for word in text.split_inclusive(' ') {
        if used > indent && used + width(word.trim_end()) > columns && word != " " {
            lines.truncate(lines.trim_end().len());
            lines.push('\n');
            lines.push_str(&" ".repeat(indent));
            used = indent;
        }
        lines.push_str(word);
        used += width(word);
    }
    lines
}

/// Characters that terminals and editors interpret or do not show: control characters, marks for the direction of writing,
/// joiners, fillers, the empty braille pattern.
static HIDDEN: LazyLock<ClassUnicode> = LazyLock::new(|| {
    let class = r"[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Default_Ignorable_Code_Point}\x{2800}]";
    match regex_syntax::parse(class).map(|parsed| parsed.into_kind()) {
        Ok(HirKind::Class(Class::Unicode(class))) => class,
        _ => unreachable!("it is a class of characters"),
    }
});

fn is_hidden(char: char) -> bool {
    let ranges = HIDDEN.ranges();
    let at = ranges.partition_point(|range| range.end() < char);
    ranges.get(at).is_some_and(|range| range.start() <= char)
}

/// Hidden, but neither a line end nor a tab.
fn is_hidden_in_lines(char: char) -> bool {
    is_hidden(char) && !matches!(char, '\n' | '\t')
}

/// `text` on one line, with spaces instead of hidden characters. For text from other machines.
pub fn plain(text: &str) -> String {
    text.replace(is_hidden, " ")
}

/// As [`plain`], but keeps line ends and tabs.
pub fn plain_lines(text: &str) -> String {
    text.replace(is_hidden_in_lines, " ")
}

/// The same JSON with hidden characters escaped, as in `\u202e`.
pub fn plain_json(json: &str) -> String {
    let mut plain = String::with_capacity(json.len());
    for char in json.chars() {
        if !is_hidden_in_lines(char) {
            plain.push(char);
            continue;
        }
        for unit in char.encode_utf16(&mut [0; 2]) {
            // Writing to a string cannot fail.
            let _ = write!(plain, "\\u{unit:04x}");
        }
    }
    plain
}

/// A share in percent.
pub fn percent(share: f64) -> String {
    let percent = share * 100.0;
    // Rounding up to 100 would hide a failure.
    let percent = if share < 1.0 { percent.min(99.9) } else { percent };
    format!("{percent:.1} %")
}

/// A duration in milliseconds or seconds.
pub fn seconds(seconds: f64) -> String {
    match seconds * 1000.0 {
        millis if millis < 10.0 => format!("{millis:.1} ms"),
        millis if millis < 1000.0 => format!("{millis:.0} ms"),
        _ => format!("{seconds:.2} s"),
    }
}

/// A rough duration or age in the largest unit of which there are at least two.
pub fn roughly(seconds: i64) -> String {
    match seconds {
        ..120 => format!("{seconds} s"),
        120..7_200 => format!("{} min", seconds / 60),
        7_200..172_800 => format!("{} h", seconds / 3_600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// A table for [`columns`] that has only its heading yet.
pub fn table<const N: usize>(heading: [&str; N]) -> Vec<Vec<String>> {
    vec![heading.map(str::to_owned).to_vec()]
}

/// The rows as lines, with two spaces between columns and no trailing spaces. The first row is the heading; a heading that
/// begins with a space aligns its column to the right.
pub fn columns(rows: &[Vec<String>]) -> Vec<String> {
    let count = rows.iter().map(Vec::len).max().unwrap_or_default();
    let widths: Vec<usize> = (0..count)
        .map(|column| {
            rows.iter()
                .filter_map(|row| row.get(column))
                .map(|cell| width(cell.trim_start()))
                .max()
        })
        .map(Option::unwrap_or_default)
        .collect();
    let is_right = |column: usize| {
        let heading = rows.first().and_then(|row| row.get(column));
        heading.is_some_and(|heading| heading.starts_with(' '))
    };
    let line = |row: &Vec<String>| {
        let mut line = String::new();
        for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
            let cell = cell.trim_start();
            let gap = if column == 0 { "" } else { "  " };
            let room = " ".repeat(width.saturating_sub(self::width(cell)));
            line += &match is_right(column) {
                true => format!("{gap}{room}{cell}"),
                false => format!("{gap}{cell}{room}"),
            };
        }
        line.trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_hidden_character_is_left() {
        let hidden = [
            '\0',
            '\u{1b}',
            '\u{7f}',
            '\u{9b}',
            '\u{ad}',
            '\u{34f}',
            '\u{61c}',
            '\u{115f}',
            '\u{180e}',
            '\u{200b}',
            '\u{200d}',
            '\u{200e}',
            '\u{200f}',
            '\u{2028}',
            '\u{2029}',
            '\u{202a}',
            '\u{202e}',
            '\u{2060}',
            '\u{2066}',
            '\u{2069}',
            '\u{2800}',
            '\u{3164}',
            '\u{fe0f}',
            '\u{feff}',
            '\u{fff9}',
            '\u{e0041}',
            '\u{e0100}',
        ];
        for char in hidden {
            let text = format!("a{char}b");
            assert_eq!(plain(&text), "a b", "{}", text.escape_unicode());
            assert_eq!(plain_lines(&text), "a b", "{}", text.escape_unicode());
            let json = serde_json::to_string(&text).unwrap();
            let escaped = plain_json(&json);
            assert_eq!(plain(&escaped), escaped, "nothing hidden is left");
            assert_eq!(serde_json::from_str::<String>(&escaped).unwrap(), text);
        }
        let shown = "naïve “quotes” 🦀 e\u{301} \u{5d0}\u{5d1} \u{e9} \u{928}\u{93f}";
        assert_eq!(plain(shown), shown);
        assert_eq!(plain("a\tb\nc"), "a b c");
        assert_eq!(plain_lines("a\tb\nc\r\n"), "a\tb\nc \n");
        assert_eq!(plain_json("{\n\t\"a\": 1\n}"), "{\n\t\"a\": 1\n}");
    }

    #[test]
    fn the_sparkline_shows_a_hosts_own_range_and_its_failures() {
        let cases: [(&[Option<f64>], &str); 7] = [
            (&[Some(0.0003), Some(0.0019)], "▁▂"),
            (&[], ""),
            (&[None, None], "××"),
            (&[Some(0.0), Some(0.0)], "▁▁"),
            (&[Some(0.1), Some(0.101)], "▁▁"),
            (&[Some(0.1), None, Some(0.8), Some(0.46)], "▁×█▅"),
            (&[Some(100.0), Some(0.001)], "█▁"),
        ];
        for (latencies, expected) in cases {
            assert_eq!(sparkline(latencies), expected, "{latencies:?}");
        }
    }

    #[test]
    fn an_uptime_of_less_than_all_is_never_shown_as_all() {
        assert_eq!(percent(0.99999), "99.9 %");
        assert_eq!(percent(1.0), "100.0 %");
        assert_eq!(percent(0.0), "0.0 %");
    }

    #[test]
    fn durations_are_in_milliseconds_or_seconds() {
        let shown = [0.0004, 0.0123, 0.9, 1.5, 12.0].map(seconds);
        assert_eq!(shown, ["0.4 ms", "12 ms", "900 ms", "1.50 s", "12.00 s"]);
    }

    #[test]
    fn ages_are_rough_and_never_empty() {
        let shown = [-3, 0, 119, 120, 7_199, 7_200, 172_799, 172_800, 9_000_000].map(roughly);
        assert_eq!(
            shown,
            [
                "-3 s", "0 s", "119 s", "2 min", "119 min", "2 h", "47 h", "2 d", "104 d"
            ]
        );
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let row = |cells: [&str; 3]| cells.map(str::to_owned).to_vec();
        let lines = columns(&[
            row(["HOST", " UP", "LAST"]),
            row(["a", "12 %", ""]),
            row(["äöüäöü", "1 %", "x"]),
        ]);
        assert_eq!(lines, ["HOST      UP  LAST", "a       12 %", "äöüäöü   1 %  x"]);
        assert!(columns(&[]).is_empty());
        let lines = columns(&[row(["HOST", " UP", "LAST"]), row(["日本", "e\u{301}", "x"])]);
        assert_eq!(lines, ["HOST  UP  LAST", "日本   e\u{301}  x"]);
    }

    #[test]
    fn a_long_line_is_wrapped_between_words() {
        let cases = [
            ("error  one two three", 7, "error  one\n       two\n       three"),
            ("one two thr   b", 1, "one two thr\n b"),
            ("日本語 日本語 a", 0, "日本語\n日本語 a"),
            ("muchtoolongaword a", 2, "muchtoolongaword\n  a"),
            ("a  \x1b[31mb b b b\x1b[0m", 0, "a  \x1b[31mb b b b\x1b[0m"),
        ];
        for (text, indent, expected) in cases {
            assert_eq!(wrap(text, indent, Some(11)), expected);
            assert_eq!(wrap(text, indent, None), text);
        }
    }

    #[test]
    fn a_text_is_cut_to_the_columns_of_a_terminal() {
        let cases = [
            ("日本語", 6, "日本語"),
            ("日本語", 5, "日本…"),
            ("日本語", 4, "日…"),
            ("日本語", 1, "…"),
            ("日本語", 0, ""),
            ("e\u{301}te\u{301}", 3, "e\u{301}te\u{301}"),
            ("abc", 2, "a…"),
            ("\x1b[31mabc\x1b[0m d", 5, "\x1b[31mabc\x1b[0m d"),
            ("\x1b[31mabc\x1b[0m d", 4, "\x1b[31mabc\x1b[0m\x1b[0m…"),
            ("\x1b[31mabc\x1b[0m d", 2, "\x1b[31ma\x1b[0m…"),
        ];
        for (text, columns, expected) in cases {
            assert_eq!(fit(text, columns), expected, "{text} in {columns}");
        }
    }
}
