use super::*;
use crate::config::{self, Variables};

const NOW: i64 = 1_790_000_000_000_000;

fn ago(seconds: i64) -> Timestamp {
    Timestamp::from_unix_micros(NOW - seconds * 1_000_000).unwrap()
}

fn host(address: &str) -> Host {
    Host {
        address: address.into(),
        name: None,
        group: None,
        state: State::Up,
        since: Some(ago(600_000)),
        since_is_earlier: true,
        uptime_1h: Some(1.0),
        uptime_24h: Some(1_439.0 / 1_440.0),
        uptime_7d: Some(10_079.0 / 10_080.0),
        uptime_ever: None,
        checks_ever: None,
        missed_7d: Some(0),
        latency_p50_seconds: Some(0.0123),
        latency_p95_seconds: Some(0.9),
        certificate_days_left: Some(62),
        interval_seconds: Some(60.0),
        last_check: Some(ago(4)),
        last_outcome: Some("ok".into()),
        last_error_at: None,
        last_error_outcome: None,
        last_error: None,
        latencies: vec![Some(0.01), None, Some(0.9)],
    }
}

fn rows(hosts: Vec<Host>) -> Rows {
    Rows {
        now: ago(0),
        hosts,
        missing_columns: Vec::new(),
        counted_because: None,
        state_positions: [(("host-metrics".into(), 0), 10)].into(),
        positions: None,
        rejected: Some(0),
    }
}

fn answer(rows: Rows, lag: Result<Vec<Lag>, String>) -> Report {
    let variables = [("DB_HOST", "db"), ("DB_NAME", "db"), ("DB_USER", "db")];
    Report::new(
        rows,
        lag,
        &config::status(&Variables::from_pairs(variables)).unwrap(),
    )
}

fn report(hosts: Vec<Host>) -> Report {
    let lag = Lag {
        topic: "host-metrics".into(),
        partition: 0,
        next_offset: Some(7),
        end_offset: 12,
        records: 5,
    };
    answer(rows(hosts), Ok(vec![lag]))
}

#[test]
fn data_is_stale_after_three_intervals_and_a_minute_and_if_there_is_none() {
    for (age, interval, stale) in [
        (0, 1.0, false),
        (63, 1.0, false),
        (64, 1.0, true),
        (960, 300.0, false),
        (961, 300.0, true),
        (60, 0.0, false),
        (61, 0.0, true),
        // A clock that is ahead.
        (-3_600, 1.0, false),
    ] {
        let state = State::of(Some(true), Some((ago(age), interval)), ago(0));
        assert_eq!(state == State::Stale, stale, "{age} s old, every {interval} s");
        let host = Host {
            last_check: Some(ago(age)),
            interval_seconds: Some(interval),
            ..host("a")
        };
        assert_eq!(report(vec![host]).stale, stale, "{age} s old, every {interval} s");
    }
    assert!(report(Vec::new()).stale);
}

#[test]
fn the_newest_row_decides_for_all() {
    let gone = Host {
        last_check: Some(ago(100_000)),
        ..host("gone")
    };
    assert!(!report(vec![gone, host("here")]).stale);
}

/// Without colours.
fn text(report: &Report, width: Option<usize>) -> String {
    anstream::adapter::strip_str(&super::text(report, width)).to_string()
}

#[test]
fn people_read_a_row_per_host_and_the_pipeline() {
    let down = Host {
        state: State::Down,
        since: Some(ago(7_300)),
        since_is_earlier: false,
        uptime_1h: Some(0.0),
        latency_p95_seconds: None,
        latency_p50_seconds: None,
        certificate_days_left: None,
        last_error_at: Some(ago(64)),
        last_error_outcome: Some("bad_status".into()),
        last_error: Some("503 \x1b[31mService Unavailable".into()),
        latencies: Vec::new(),
        ..host("https://b.example/")
    };
    let report = report(vec![host("https://a.example/longer"), down]);
    let expected = "\
HOST                      STATE  SINCE      1 H    24 H     7 D    P50     P95  CERT  LAST CHECK  LATENCY TREND  LAST ERROR
https://a.example/longer  up     > 6 d  100.0 %  99.9 %  99.9 %  12 ms  900 ms  62 d     4 s ago  ▁×█
https://b.example/        DOWN     2 h    0.0 %  99.9 %  99.9 %      -       -     -     4 s ago                 64 s ago, bad_status: 503  [31mService Unavailable

newest row  4 s old
lag         5 records in 1 partition of host-metrics, group host-metrics
state lag   2 records, group host-metrics-state
rejected    0 records
";
    assert_eq!(text(&report, None), expected);
    for line in text(&report, Some(40)).lines() {
        assert!(line.chars().count() <= 40, "{line}");
    }
    let narrow = "\
HOST                      STATE  SINCE     7 D     P95  LAST ERROR
https://a.example/longer  up     > 6 d  99.9 %  900 ms
https://b.example/        DOWN     2 h  99.9 %       -  64 s ago, bad_status: 5…
";
    assert!(
        text(&report, Some(80)).starts_with(narrow),
        "{}",
        text(&report, Some(80))
    );
    let coloured = super::text(&report, Some(80));
    let red = AnsiColor::Red.on_default();
    assert!(
        coloured.contains(&format!("{red}DOWN{red:#}     2 h")),
        "{coloured}"
    );
}

#[test]
fn hosts_stand_in_their_groups_by_name_and_those_without_a_group_last() {
    let named = |address: &str, name: &str, group: Option<&str>| Host {
        name: Some(name.into()),
        group: group.map(str::to_owned),
        ..host(address)
    };
    let report = report(vec![
        host("https://a.example/"),
        named("https://b.example/", "店頭", Some("Shops")),
        named("https://c.example/", "api", Some("Shops")),
        named("https://d.example/", "Blog", Some("About\u{1b}")),
    ]);
    let expected = "\
HOST                STATE  SINCE    24 H     7 D     P95  CERT  LATENCY TREND

About 
Blog                up     > 6 d  99.9 %  99.9 %  900 ms  62 d  ▁×█

Shops
api                 up     > 6 d  99.9 %  99.9 %  900 ms  62 d  ▁×█
店頭                up     > 6 d  99.9 %  99.9 %  900 ms  62 d  ▁×█

Other sites
https://a.example/  up     > 6 d  99.9 %  99.9 %  900 ms  62 d  ▁×█
";
    let narrow = text(&report, Some(80));
    assert!(narrow.starts_with(expected), "{narrow}");
    let wide = text(&report, None);
    assert!(
        wide.contains("\napi                 https://c.example/  up "),
        "{wide}"
    );
}

#[test]
fn json_escapes_hidden_characters() {
    let address = "https://a.example/\u{202e}\u{9b}x";
    let json = json(&report(vec![host(address)]));
    assert!(json.contains(r"https://a.example/\u202e\u009bx"), "{json}");
    let document: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(document["hosts"][0]["address"], address);
}

#[test]
fn unknown_values_are_reported_as_unknown() {
    let counted = Host {
        state: State::Unknown,
        last_check: None,
        uptime_ever: Some(0.75),
        checks_ever: Some(4),
        ..host("a")
    };
    let rows = Rows {
        missing_columns: vec!["scheduled_at", "outcome"],
        rejected: None,
        counted_because: Some("STATE=off".into()),
        ..rows(vec![counted])
    };
    let report = answer(rows, Err("Kafka at k:1: refused".into()));
    let expected = "\
HOST  CHECKS  UPTIME    P50     P95
a          4  75.0 %  12 ms  900 ms

newest row  -
lag         unknown: Kafka at k:1: refused
state lag   -
rejected    unknown: the table of rejected records does not exist, or this user may not read it
Counted from the rows, because STATE=off.
Not everything is shown, because the table has no column scheduled_at, outcome.
STALE: the age of the rows is unknown, because the table has no column scheduled_at.
";
    assert_eq!(text(&report, None), expected);
    assert!(json(&report).contains(r#""state":"unknown""#));
}
