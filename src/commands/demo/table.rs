//! The live table as lines of text, one row per host, none wider than the given width. Pure.

use std::time::Duration;

use anstyle::{AnsiColor, Style};

use crate::sample::Outcome;
use crate::terminal::{
    self, NONE, SPARKLINE_CHECKS, columns, counted, fit, fit_end, percent, seconds, sparkline,
};

/// The length of a sparkline on a terminal narrower than WIDE, such as one of 80 columns.
const FEWER_CHECKS: usize = 8;
const WIDE: usize = 110;

/// The width of state, checks, uptime, latency and the spaces between all columns.
const OTHER_WIDTH: usize = 38;
const MIN_ADDRESS_WIDTH: usize = 16;

/// A host's data in the database.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Host {
    pub address: String,
    /// The number of rows. `valid` of them are valid, the same share as in the view `…_uptime`.
    pub checks: i64,
    pub valid: i64,
    /// The latencies of the newest checks in seconds, oldest first. `None`: there was no response.
    pub latencies: Vec<Option<f64>>,
    pub newest: Option<Newest>,
}

/// A host's newest row.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Newest {
    pub is_valid: bool,
    pub outcome: String,
    pub error: Option<String>,
}

/// The totals over all hosts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Totals {
    pub hosts: usize,
    pub up: usize,
    pub down: usize,
    pub rows: i64,
}

/// The totals as one line.
pub(super) fn summary(totals: Totals, elapsed: Duration) -> String {
    let Totals {
        hosts,
        up,
        down,
        rows,
    } = totals;
    let seconds = elapsed.as_secs();
    format!(
        "{:02}:{:02}  {}: {up} up, {down} down; {rows} rows in Postgres",
        seconds / 60,
        seconds % 60,
        counted(hosts, "host")
    )
}

/// The heading and a line per host, each at most `width` columns wide without the escapes for colours.
pub(super) fn lines(hosts: &[Host], width: usize, is_coloured: bool) -> Vec<String> {
    let checks = if width < WIDE {
        FEWER_CHECKS
    } else {
        SPARKLINE_CHECKS
    };
    // The address gets up to three fifths of the rest; the last outcome gets what remains.
    let address_width = (width.saturating_sub(OTHER_WIDTH + checks) * 3 / 5).max(MIN_ADDRESS_WIDTH);
    let heading = [
        "HOST",
        "STATE",
        " CHECKS",
        " UPTIME",
        " LATENCY",
        "NEWEST",
        "LAST OUTCOME",
    ];
    let mut table = terminal::table(heading);
    table.extend(hosts.iter().map(|host| row(host, address_width, checks)));
    let longest = table.iter().map(|row| terminal::width(&row[0])).max();
    let mut lines: Vec<String> = columns(&table).iter().map(|line| fit(line, width)).collect();
    lines[0] = paint(&lines[0], Style::new().bold(), is_coloured);
    for ((line, row), host) in lines[1..].iter_mut().zip(&table[1..]).zip(hosts) {
        // Colours are added after cutting, because an escape has no width and must not be cut.
        let (address, (state, style)) = (&row[0], state(host));
        let at = address.len() + longest.unwrap_or_default() - terminal::width(address) + 2;
        if line.get(at..).is_some_and(|rest| rest.starts_with(state)) {
            line.replace_range(at..at + state.len(), &paint(state, style, is_coloured));
        }
    }
    lines
}

fn state(host: &Host) -> (&'static str, Style) {
    let is_failed = |outcome: &str| Outcome::named(outcome).is_none_or(Outcome::is_failed_check);
    match &host.newest {
        None => ("…", Style::new().dimmed()),
        Some(newest) if newest.is_valid => ("up", AnsiColor::Green.on_default()),
        Some(newest) if is_failed(&newest.outcome) => ("DOWN", AnsiColor::Red.on_default()),
        // The host was not checked, so its state is unknown.
        Some(_) => ("?", Style::new().dimmed()),
    }
}

fn row(host: &Host, address_width: usize, checks: usize) -> Vec<String> {
    let latency = host.latencies.last().copied().flatten();
    let outcome = match &host.newest {
        None => "no check yet".to_owned(),
        Some(Newest {
            outcome, error: None, ..
        }) => outcome.clone(),
        Some(Newest {
            outcome,
            error: Some(error),
            ..
        }) => format!("{outcome}: {error}"),
    };
    let newest = &host.latencies[host.latencies.len().saturating_sub(checks)..];
    vec![
        fit_end(&host.address, address_width),
        state(host).0.to_owned(),
        host.checks.to_string(),
        percent(host.valid, host.checks),
        latency.map_or_else(|| NONE.to_owned(), seconds),
        sparkline(newest),
        outcome,
    ]
}

fn paint(text: &str, style: Style, is_coloured: bool) -> String {
    let style = if is_coloured { style } else { Style::new() };
    format!("{style}{text}{style:#}")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn host(address: &str, newest: Option<Newest>) -> Host {
        Host {
            address: address.into(),
            checks: 4,
            valid: 3,
            latencies: vec![Some(0.0123)],
            newest,
        }
    }

    fn newest(outcome: &str, error: Option<&str>) -> Option<Newest> {
        Some(Newest {
            is_valid: error.is_none(),
            outcome: outcome.into(),
            error: error.map(str::to_owned),
        })
    }

    #[test]
    fn a_row_shows_state_checks_uptime_latency_and_the_last_outcome() {
        let hosts = [
            host("http://a.example/up", newest("ok", None)),
            host(
                "http://a.example/failing",
                newest("bad_status", Some("503 Service Unavailable")),
            ),
            host(
                "http://a.example/late",
                newest("missed", Some("no thread was free")),
            ),
            Host {
                checks: 0,
                valid: 0,
                latencies: Vec::new(),
                ..host("http://a.example/new", None)
            },
        ];
        let text = lines(&hosts, 120, false).join("\n");
        let expected = "\
HOST                      STATE  CHECKS  UPTIME  LATENCY  NEWEST  LAST OUTCOME
http://a.example/up       up          4  75.0 %    12 ms  ▁       ok
http://a.example/failing  DOWN        4  75.0 %    12 ms  ▁       bad_status: 503 Service Unavailable
http://a.example/late     ?           4  75.0 %    12 ms  ▁       missed: no thread was free
http://a.example/new      …           0       -        -          no check yet";
        assert_eq!(text, expected);
    }

    #[test]
    fn eighty_columns_show_the_end_of_an_address_and_the_beginning_of_an_outcome() {
        let hosts = [Host {
            latencies: vec![Some(0.1); SPARKLINE_CHECKS],
            ..host(
                "http://127.0.0.1:43677/wrong-body",
                newest("regex_mismatch", Some("the regex is not in it")),
            )
        }];
        let expected = "\
HOST                  STATE  CHECKS  UPTIME  LATENCY  NEWEST    LAST OUTCOME
….1:43677/wrong-body  DOWN        4  75.0 %   100 ms  ▁▁▁▁▁▁▁▁  regex_mismatch:…";
        let text = lines(&hosts, 80, false).join("\n");
        assert_eq!(text, expected);
    }

    #[test]
    fn the_summary_counts_hosts_in_grammatical_english() {
        let totals = Totals {
            hosts: 1,
            up: 1,
            down: 0,
            rows: 61,
        };
        assert_eq!(
            summary(totals, Duration::from_secs(61)),
            "01:01  1 host: 1 up, 0 down; 61 rows in Postgres"
        );
    }

    #[test]
    fn colours_change_no_character() {
        let hosts = [host("http://a.example/up", newest("ok", None)), host("b", None)];
        let coloured = lines(&hosts, 60, true).join("\n");
        let plain = ["\x1b[1m", "\x1b[2m", "\x1b[31m", "\x1b[32m", "\x1b[0m"]
            .iter()
            .fold(coloured.clone(), |text, escape| text.replace(escape, ""));
        assert_ne!(coloured, plain);
        assert_eq!(plain, lines(&hosts, 60, false).join("\n"));
    }

    proptest! {
        #[test]
        fn no_line_is_wider_than_the_terminal(
            address in "\\PC{1,80}", error in "\\PC{0,200}", width in 0usize..200,
            latencies in proptest::collection::vec(proptest::option::of(0.0f64..1e6), 0..SPARKLINE_CHECKS),
        ) {
            let host = Host { latencies, ..host(&address, newest("tls_error", Some(&error))) };
            for line in lines(&[host], width, false) {
                prop_assert!(crate::terminal::width(&line) <= width, "{line}");
            }
        }
    }
}
