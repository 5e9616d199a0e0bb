use super::*;
use crate::commands::status::rows::LastError;

const NOW: i64 = 1_790_000_000_000_000;

fn ago(seconds: i64) -> Timestamp {
    Timestamp::from_unix_micros(NOW - seconds * 1_000_000).unwrap()
}

fn newest(seconds: i64, interval_seconds: f64) -> Newest {
    Newest {
        at: ago(seconds),
        interval_seconds,
    }
}

fn host(address: &str) -> Host {
    let share = |valid, checks| Some(Share { valid, checks });
    Host {
        address: address.into(),
        name: None,
        group: None,
        is_valid: Some(true),
        since: Some(ago(600_000)),
        is_longer: true,
        uptime_1h: share(60, 60),
        uptime_24h: share(1_439, 1_440),
        uptime_7d: share(10_079, 10_080),
        uptime_ever: None,
        missed_7d: Some(0),
        latency_p50_seconds: Some(0.0123),
        latency_p95_seconds: Some(0.9),
        certificate_days_left: Some(62),
        newest: Some(newest(4, 60.0)),
        last_outcome: Some("ok".into()),
        last_error: None,
        latencies: vec![Some(0.01), None, Some(0.9)],
    }
}

fn report(hosts: Vec<Host>) -> Report {
    Report {
        rows: Rows {
            now_micros: NOW,
            newest: hosts
                .iter()
                .filter_map(|host| host.newest)
                .max_by_key(|newest| newest.at),
            hosts,
            missing_columns: Vec::new(),
            counted_because: None,
            state_positions: [(("host-metrics".into(), 0), 10)].into(),
            positions: None,
            rejected: Some(0),
        },
        lag: Ok(vec![Lag {
            topic: "host-metrics".into(),
            partition: 0,
            next_offset: Some(7),
            end_offset: 12,
            records: 5,
        }]),
        group_id: "host-metrics".into(),
        topics: vec!["host-metrics".into()],
    }
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
        let host = Host {
            newest: Some(newest(age, interval)),
            ..host("a")
        };
        assert_eq!(
            report(vec![host]).is_stale(),
            stale,
            "{age} s old, every {interval} s"
        );
    }
    assert!(report(Vec::new()).is_stale());
}

#[test]
fn the_newest_row_decides_for_all_and_each_host_is_stale_by_its_own() {
    let gone = Host {
        newest: Some(newest(100_000, 60.0)),
        ..host("gone")
    };
    let report = report(vec![gone, host("here")]);
    assert!(!report.is_stale());
    let states: Vec<_> = report.rows.hosts.iter().map(|host| report.state(host)).collect();
    assert_eq!(states, [State::Stale, State::Up]);
}

#[test]
fn people_read_a_row_per_host_and_the_pipeline() {
    let down = Host {
        is_valid: Some(false),
        since: Some(ago(7_300)),
        is_longer: false,
        uptime_1h: Some(Share { valid: 0, checks: 60 }),
        latency_p95_seconds: None,
        latency_p50_seconds: None,
        certificate_days_left: None,
        last_error: Some(LastError {
            at: ago(64),
            outcome: Some("bad_status".into()),
            error: Some("503 \x1b[31mService Unavailable".into()),
        }),
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
HOST                STATE  SINCE    24 H     7 D     P95  CERT  LAST CHECK

About 
Blog                up     > 6 d  99.9 %  99.9 %  900 ms  62 d     4 s ago

Shops
api                 up     > 6 d  99.9 %  99.9 %  900 ms  62 d     4 s ago
店頭                up     > 6 d  99.9 %  99.9 %  900 ms  62 d     4 s ago

Other sites
https://a.example/  up     > 6 d  99.9 %  99.9 %  900 ms  62 d     4 s ago
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
        is_valid: None,
        newest: None,
        uptime_ever: Some(Share { valid: 3, checks: 4 }),
        ..host("a")
    };
    let mut report = report(vec![counted]);
    report.rows.missing_columns = vec!["scheduled_at", "outcome"];
    report.rows.rejected = None;
    report.rows.counted_because = Some("STATE=off".into());
    report.lag = Err("Kafka at k:1: refused".into());
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
