//! The fold by tables of cases, and against a slow definition over all records of random histories.

use proptest::prelude::*;

use super::host::{Incident, Verdict};
use super::*;
use crate::sample::{self, Sample, Timestamp};
use crate::tables::buckets::WIDTHS;

const HOST: &str = "https://a.example/";

/// Everything that the tables hold.
#[derive(Clone, Debug, Default, PartialEq)]
struct Tables {
    hosts: BTreeMap<String, Host>,
    rollups: BTreeMap<Key, Rollup>,
}

impl Tables {
    /// One flush, as the store makes it: of incidents only each host's newest is read.
    fn flush(&mut self, down_when: DownWhen, records: &[Record]) {
        let mut fold = Fold::default();
        for record in records {
            fold.record(Observed::decode(record).unwrap());
        }
        let rollups = fold.take_rollups();
        let mut touched = BTreeMap::new();
        for (_, address, _) in fold.series() {
            if let Some(host) = self.hosts.get(address) {
                let incidents = host.incidents.last().cloned().into_iter().collect();
                let series = host.series.clone();
                touched.insert(address.to_owned(), Host { series, incidents });
            }
        }
        fold.apply(down_when, &mut touched);
        for (key, rollup) in rollups {
            self.rollups.entry(key).or_default().merge(&rollup);
        }
        for (address, host) in touched {
            let stored = self.hosts.entry(address).or_default();
            stored.series = host.series;
            for incident in host.incidents {
                stored.incidents.retain(|stored| stored.number < incident.number);
                stored.incidents.push(incident);
            }
        }
    }
}

/// As a batch keeps it.
type Record = Vec<u8>;

fn observed(sample: &Sample<'_>, timestamp: Option<Timestamp>) -> Record {
    let mut bytes = Vec::new();
    Observed::of(sample, timestamp).unwrap().encode(&mut bytes);
    bytes
}

/// What a test says of a record; seconds since 1970.
#[derive(Clone, Copy, Debug)]
struct Tick {
    agent: &'static str,
    at: i64,
    outcome: &'static str,
    interval: Option<i64>,
}

fn tick(agent: &'static str, at: i64, outcome: &'static str) -> Tick {
    Tick {
        agent,
        at,
        outcome,
        interval: Some(60),
    }
}

fn seconds(at: i64) -> Option<Timestamp> {
    Timestamp::from_unix_micros(at * 1_000_000)
}

fn record(tick: &Tick) -> Record {
    let sample = Sample {
        address: HOST.into(),
        is_valid: tick.outcome == "ok",
        outcome: Some(tick.outcome.into()),
        error: (tick.outcome != "ok").then(|| format!("because of {}", tick.outcome).into()),
        scheduled_at: seconds(tick.at),
        interval_seconds: tick.interval.map(|interval| interval as f64),
        latency: (tick.outcome == "ok").then_some(0.1),
        agent: Some(tick.agent.into()),
        ..Sample::default()
    };
    observed(&sample, seconds(tick.at))
}

fn folded(down_when: DownWhen, ticks: &[Tick]) -> Host {
    let mut tables = Tables::default();
    let records: Vec<Record> = ticks.iter().map(record).collect();
    tables.flush(down_when, &records);
    tables.hosts.remove(HOST).unwrap_or_default()
}

/// The incidents as (start, end, failed checks), in seconds.
fn spans(host: &Host) -> Vec<(i64, Option<i64>, i64)> {
    let second = |micros: i64| micros / 1_000_000;
    let span = |incident: &Incident| {
        (
            second(incident.started_at),
            incident.ended_at.map(second),
            incident.checks(),
        )
    };
    host.incidents.iter().map(span).collect()
}

#[test]
fn an_incident_lasts_from_the_first_failed_to_the_first_valid_check() {
    let host = folded(
        DownWhen::Majority,
        &[
            tick("a", 0, "ok"),
            tick("a", 60, "dns_error"),
            tick("a", 120, "dns_timeout"),
            tick("a", 180, "missed"),
            tick("a", 240, "agent_offline"),
            tick("a", 300, "dns_timeout"),
            tick("a", 360, "ok"),
            tick("a", 420, "bad_status"),
        ],
    );
    assert_eq!(spans(&host), [(60, Some(360), 3), (420, None, 1)]);
    let first = &host.incidents[0];
    assert_eq!(first.first_outcome, "dns_error");
    assert_eq!(first.last_outcome, "dns_timeout");
    assert_eq!(first.most_frequent_outcome(), "dns_timeout");
    assert_eq!(first.last_error.as_deref(), Some("because of dns_timeout"));
    assert_eq!(first.places, ["a".to_owned()].into());
    assert_eq!(host.verdict(), Some((Verdict::Down, 420_000_000)));
    let checks = host.series["a"].checks.as_ref().unwrap();
    assert_eq!((checks.since, checks.failures_in_a_row), (420_000_000, 1));
    let failed = (checks.last_failed_at, checks.last_failed_outcome.as_deref());
    assert_eq!(failed, (Some(420_000_000), Some("bad_status")));
}

#[test]
fn a_host_has_the_name_of_its_newest_record_and_slow_checks_are_counted() {
    let named = |at, name: Option<&'static str>, outcome: &'static str, slow| {
        let sample = Sample {
            address: HOST.into(),
            is_valid: outcome == "ok",
            outcome: Some(outcome.into()),
            scheduled_at: seconds(at),
            name: name.map(Into::into),
            group: name.map(|name| format!("group of {name}").into()),
            slow,
            ..Sample::default()
        };
        observed(&sample, seconds(at))
    };
    let mut tables = Tables::default();
    tables.flush(
        DownWhen::Majority,
        &[
            named(60, Some("Shop \"front\""), "ok", Some(true)),
            named(120, Some("Shop"), "bad_status", Some(true)),
            named(0, Some("earlier"), "ok", Some(false)),
            named(180, Some("Shop"), "missed", None),
        ],
    );
    let series = &tables.hosts[HOST].series[""];
    let texts = (series.name.as_deref(), series.group.as_deref());
    assert_eq!(texts, (Some("Shop"), Some("group of Shop")));
    assert!(
        tables.rollups.values().all(|rollup| rollup.slow == 2),
        "{tables:?}"
    );
    tables.flush(DownWhen::Majority, &[named(240, None, "ok", None)]);
    assert_eq!(tables.hosts[HOST].series[""].name, None);
}

#[test]
fn places_vote_with_their_last_check() {
    use DownWhen::{All, Any, Majority, Places};
    // Three places at each tick; what each of them sees, and who is down by which rule.
    for (outcomes, down) in [
        (["ok", "ok", "ok"], vec![]),
        (["dns_error", "ok", "ok"], vec![Any]),
        (["dns_error", "dns_error", "ok"], vec![Any, Majority, Places(2)]),
        (
            ["dns_error", "dns_error", "dns_error"],
            vec![Any, Majority, All, Places(2)],
        ),
        (["dns_error", "missed", "ok"], vec![Any, Majority]),
        (["missed", "agent_error", "dns_error"], vec![Any, Majority, All]),
    ] {
        for down_when in [Any, Majority, All, Places(2)] {
            let ticks: Vec<Tick> = ["a", "b", "c"]
                .into_iter()
                .zip(outcomes)
                .flat_map(|(agent, outcome)| [tick(agent, 600, outcome), tick(agent, 660, outcome)])
                .collect();
            // In the order of time, as they are read.
            let mut in_order = ticks.clone();
            in_order.sort_by_key(|tick| tick.at);
            // What the first tick's half-known votes say does not count here: the last valid check ends it.
            let host = folded(down_when, &in_order);
            let is_down = host.verdict().unwrap().0 == Verdict::Down;
            let last_is_valid = outcomes.last() == Some(&"ok");
            // A verdict turns down by a failed check and up by a valid one.
            let expected = down.contains(&down_when);
            if expected || last_is_valid {
                assert_eq!(is_down, expected, "{outcomes:?} {down_when:?}");
            }
        }
    }
}

#[test]
fn a_place_that_is_silent_for_two_intervals_no_longer_votes() {
    let ticks = [
        tick("a", 0, "dns_error"),
        tick("b", 0, "ok"),
        tick("b", 60, "ok"),
        tick("b", 120, "ok"),
        tick("b", 121, "ok"),
    ];
    // A tie is down for as long as both vote.
    assert_eq!(spans(&folded(DownWhen::Majority, &ticks)), [(0, Some(121), 1)]);
    // All places silent: nothing is opened or closed.
    let host = folded(DownWhen::Majority, &ticks[..1]);
    assert_eq!(spans(&host), [(0, None, 1)]);
}

#[test]
fn places_with_different_intervals_vote_for_their_own_time() {
    let slow = |at, outcome| Tick {
        interval: Some(3_600),
        ..tick("slow", at, outcome)
    };
    let mut ticks = vec![slow(0, "dns_error"), tick("quick", 0, "ok")];
    ticks.extend((1..=130).map(|minute| tick("quick", 60 * minute, "ok")));
    // The slow one is down until two hours are over.
    assert_eq!(spans(&folded(DownWhen::Any, &ticks)), [(0, Some(7_260), 1)]);
}

#[test]
fn a_host_that_moves_to_another_place_is_judged_by_the_new_one() {
    let mut ticks = vec![tick("old", 0, "dns_error")];
    ticks.extend((1..=5).map(|minute| tick("new", 60 * minute, "ok")));
    assert_eq!(spans(&folded(DownWhen::Majority, &ticks)), [(0, Some(180), 1)]);
}

#[test]
fn flapping_gives_an_incident_a_time() {
    let ticks: Vec<Tick> = (0..100)
        .map(|n| tick("a", 60 * n, if n % 2 == 0 { "dns_error" } else { "ok" }))
        .collect();
    let host = folded(DownWhen::Majority, &ticks);
    assert_eq!(host.incidents.len(), 50);
    assert!(
        host.incidents
            .iter()
            .zip(1..)
            .all(|(incident, number)| incident.number == number)
    );
    assert!(
        spans(&host)
            .iter()
            .all(|(start, end, checks)| *end == Some(start + 60) && *checks == 1)
    );
}

#[test]
fn an_incident_may_last_over_a_year() {
    let year = 366 * 86_400;
    let ticks = [
        tick("a", 0, "dns_error"),
        tick("a", year, "dns_error"),
        tick("a", year + 60, "ok"),
    ];
    assert_eq!(
        spans(&folded(DownWhen::Majority, &ticks)),
        [(0, Some(year + 60), 2)]
    );
}

#[test]
fn a_late_record_is_counted_and_moves_nothing() {
    let ticks = [
        tick("a", 600, "ok"),
        tick("a", 660, "dns_error"),
        tick("a", 720, "ok"),
    ];
    let mut tables = Tables::default();
    tables.flush(DownWhen::Majority, &ticks.iter().map(record).collect::<Vec<_>>());
    let before = tables.hosts.clone();
    for late in [
        tick("a", 0, "dns_error"),
        tick("a", 670, "ok"),
        tick("a", 720, "dns_error"),
        tick("a", 60, "missed"),
    ] {
        tables.flush(DownWhen::Majority, &[record(&late)]);
    }
    assert_eq!(tables.hosts, before);
    let day = Key::of(series_id(HOST, "a"), 86_400, 0);
    let rollup = &tables.rollups[&day];
    assert_eq!(
        (rollup.due(), rollup.valid, rollup.failed, rollup.missed),
        (7, 3, 3, 1)
    );
}

#[test]
fn a_record_ahead_of_kafkas_clock_is_counted_and_moves_nothing() {
    let mut tables = Tables::default();
    let ahead = Sample {
        address: HOST.into(),
        scheduled_at: seconds(10_000_000),
        agent: Some("a".into()),
        ..Sample::default()
    };
    let ahead = observed(&ahead, seconds(60));
    tables.flush(
        DownWhen::Majority,
        &[record(&tick("a", 0, "ok")), ahead, record(&tick("a", 60, "ok"))],
    );
    let host = &tables.hosts[HOST];
    assert!(host.incidents.is_empty());
    assert_eq!(host.series["a"].last_seen_at, Some(60_000_000));
    let key = Key::of(series_id(HOST, "a"), 300, 10_000_000_000_000);
    assert_eq!(tables.rollups[&key].failed, 1);
}

#[test]
fn the_originals_records_are_a_series_of_their_own() {
    let four_fields = |at, is_valid| {
        let value = format!(
            r#"{{"address": "{HOST}", "latency": 0.12, "status_code": 200, "is_valid": {is_valid}}}"#
        );
        observed(&sample::decode(value.as_bytes()).unwrap(), seconds(at))
    };
    let mut tables = Tables::default();
    let records = [
        four_fields(0, true),
        four_fields(300, false),
        four_fields(600, false),
        four_fields(900, true),
    ];
    tables.flush(DownWhen::Majority, &records);
    let host = &tables.hosts[HOST];
    assert_eq!(spans(host), [(300, Some(900), 2)]);
    assert_eq!(host.incidents[0].first_outcome, "unknown");
    assert_eq!(host.series[""].interval_micros, Some(300_000_000));
    // Another program takes over: the old series is silent soon, whatever it said last.
    tables.flush(DownWhen::Majority, &[four_fields(1_200, false)]);
    let successor: Vec<Record> = (21..=40)
        .map(|minute| record(&tick("a", 60 * minute, "ok")))
        .collect();
    tables.flush(DownWhen::Majority, &successor);
    assert_eq!(spans(&tables.hosts[HOST])[1], (1_200, Some(1_860), 1));
}

#[test]
fn a_record_without_any_time_cannot_be_counted() {
    let sample = Sample {
        address: HOST.into(),
        ..Sample::default()
    };
    assert_eq!(Observed::of(&sample, None), None);
}

#[test]
fn an_incident_names_a_bounded_number_of_places() {
    let mut incidents = Tables::default();
    let places: Vec<String> = (0..1_000).map(|place| format!("made up {place}")).collect();
    let samples = places.iter().zip(0..).map(|(place, at)| Sample {
        address: HOST.into(),
        scheduled_at: seconds(at),
        interval_seconds: Some(60.0),
        agent: Some(place.into()),
        ..Sample::default()
    });
    let records: Vec<Record> = samples.map(|sample| observed(&sample, None)).collect();
    incidents.flush(DownWhen::Majority, &records);
    let incident = &incidents.hosts[HOST].incidents[0];
    assert_eq!((incident.checks(), incident.places.len()), (1_000, 256));
}

#[test]
fn the_newest_certificate_is_kept() {
    let with = |at: i64, expires_at: Option<i64>| {
        let sample = Sample {
            address: HOST.into(),
            is_valid: expires_at.is_some(),
            scheduled_at: seconds(at),
            cert_expires_at: expires_at.and_then(seconds),
            ..Sample::default()
        };
        observed(&sample, seconds(at))
    };
    let mut tables = Tables::default();
    tables.flush(
        DownWhen::Majority,
        &[
            with(0, Some(1_000)),
            with(120, Some(2_000)),
            with(180, None),
            with(60, Some(3_000)),
        ],
    );
    let certificate = tables.hosts[HOST].series[""].certificate.unwrap();
    assert_eq!(
        (certificate.expires_at, certificate.seen_at),
        (2_000_000_000, 120_000_000)
    );
}

/// Incidents of one place by the plain definition: failed checks belong together that no valid one lies between.
fn incidents_by_definition(ticks: &[Tick]) -> Vec<(i64, Option<i64>, i64)> {
    let mut newest = i64::MIN;
    let mut in_order: Vec<Tick> = Vec::new();
    for tick in ticks
        .iter()
        .filter(|tick| !["missed", "agent_error"].contains(&tick.outcome))
    {
        if tick.at > newest {
            newest = tick.at;
            in_order.push(*tick);
        }
    }
    let mut incidents = Vec::new();
    for run in in_order.chunk_by(|a, b| (a.outcome == "ok") == (b.outcome == "ok")) {
        if run[0].outcome != "ok" {
            let end = in_order.iter().find(|tick| tick.at > run[run.len() - 1].at);
            incidents.push((run[0].at, end.map(|tick| tick.at), run.len() as i64));
        }
    }
    incidents
}

/// The verdict after each record by the plain definition: all checks so far are looked at again.
fn verdicts_by_definition(ticks: &[Tick], down_when: DownWhen) -> Vec<bool> {
    let mut counted: Vec<Tick> = Vec::new();
    let mut is_down = false;
    ticks
        .iter()
        .enumerate()
        .map(|(index, tick)| {
            let interval = |agent: &str| {
                let seen = ticks[..=index].iter().filter(|other| other.agent == agent);
                seen.max_by_key(|other| other.at)
                    .and_then(|newest| newest.interval)
            };
            let last = |agent: &str| counted.iter().rev().find(|other| other.agent == agent).copied();
            if !["missed", "agent_error"].contains(&tick.outcome)
                && last(tick.agent).is_none_or(|last| last.at < tick.at)
            {
                counted.push(*tick);
                let at = counted.iter().map(|tick| tick.at).max().unwrap_or_default();
                let last = |agent: &str| counted.iter().rev().find(|other| other.agent == agent);
                let votes: Vec<bool> = ["a", "b", "c"]
                    .into_iter()
                    .filter_map(last)
                    .filter(|last| at - last.at <= 2 * interval(last.agent).unwrap_or_default())
                    .map(|last| last.outcome != "ok")
                    .collect();
                let down = votes.iter().filter(|down| **down).count();
                let says_down = match down_when {
                    DownWhen::Any => down > 0,
                    DownWhen::Majority => 2 * down >= votes.len(),
                    DownWhen::All => down == votes.len(),
                    DownWhen::Places(places) => down >= places as usize,
                };
                match tick.outcome {
                    "ok" => is_down &= says_down,
                    _ => is_down |= says_down,
                }
            }
            is_down
        })
        .collect()
}

fn history() -> impl Strategy<Value = Vec<Tick>> {
    let outcome = prop::sample::select(vec![
        "ok",
        "ok",
        "dns_error",
        "bad_status",
        "missed",
        "agent_error",
    ]);
    let agent = prop::sample::select(vec!["a", "b", "c"]);
    let interval = prop::sample::select(vec![30, 60, 300]);
    let step = (agent, -100..300_i64, outcome, interval);
    prop::collection::vec(step, 1..120).prop_map(|steps| {
        let mut at = 1_000_000;
        let tick = |(agent, step, outcome, interval): (_, i64, _, i64)| {
            at += step / 2;
            Tick {
                agent,
                at,
                outcome,
                interval: Some(interval),
            }
        };
        steps.into_iter().map(tick).collect()
    })
}

fn rules() -> impl Strategy<Value = DownWhen> {
    prop::sample::select(vec![
        DownWhen::Any,
        DownWhen::Majority,
        DownWhen::All,
        DownWhen::Places(2),
    ])
}

proptest! {
    #[test]
    fn where_a_batch_ends_does_not_show(
        ticks in history(), down_when in rules(), cuts in prop::collection::vec(1..20_usize, 1..40),
    ) {
        let records: Vec<Record> = ticks.iter().map(record).collect();
        let mut at_once = Tables::default();
        at_once.flush(down_when, &records);
        let mut in_parts = Tables::default();
        let mut rest = &records[..];
        for cut in cuts.into_iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let (part, behind) = rest.split_at(cut.min(rest.len()));
            in_parts.flush(down_when, part);
            rest = behind;
        }
        prop_assert_eq!(in_parts, at_once);
    }

    #[test]
    fn incidents_of_one_place_are_those_of_the_definition(ticks in history()) {
        let ticks: Vec<Tick> = ticks.into_iter().map(|tick| Tick { agent: "a", ..tick }).collect();
        let host = folded(DownWhen::Majority, &ticks);
        prop_assert_eq!(spans(&host), incidents_by_definition(&ticks));
    }

    #[test]
    fn verdicts_are_those_of_the_definition(ticks in history(), down_when in rules()) {
        let mut tables = Tables::default();
        let mut incidents = 0;
        for (tick, is_down) in ticks.iter().zip(verdicts_by_definition(&ticks, down_when)) {
            tables.flush(down_when, &[record(tick)]);
            let host = &tables.hosts[HOST];
            let verdict = host.verdict().map(|(verdict, _)| verdict);
            prop_assert_eq!(verdict == Some(Verdict::Down), is_down, "after {:?}", tick);
            // What is closed stays as it is, and times go forwards.
            prop_assert!(host.incidents.len() - incidents <= 1);
            incidents = host.incidents.len();
            for (incident, next) in host.incidents.iter().zip(&host.incidents[1.min(incidents)..]) {
                prop_assert!(incident.started_at <= incident.ended_at.unwrap());
                prop_assert!(incident.ended_at.unwrap() <= next.started_at);
            }
        }
    }

    #[test]
    fn every_record_is_in_one_bucket_of_each_width(ticks in history()) {
        let mut tables = Tables::default();
        tables.flush(DownWhen::Majority, &ticks.iter().map(record).collect::<Vec<_>>());
        for width in WIDTHS {
            for agent in ["a", "b", "c"] {
                let id = series_id(HOST, agent);
                let of_width = |key: &&Key| key.seconds == width && key.series_id == id;
                for key in tables.rollups.keys().filter(of_width) {
                    let lies_in = |tick: &&Tick| {
                        let from = key.starts_at / 1_000_000;
                        tick.agent == agent && (from..from + i64::from(width)).contains(&tick.at)
                    };
                    let rollup = &tables.rollups[key];
                    let count = |is: &dyn Fn(&str) -> bool| {
                        ticks.iter().filter(lies_in).filter(|tick| is(tick.outcome)).count() as i32
                    };
                    prop_assert_eq!(rollup.due(), count(&|_| true));
                    prop_assert_eq!(rollup.valid, count(&|outcome| outcome == "ok"));
                    prop_assert_eq!(rollup.missed, count(&|outcome| outcome == "missed"));
                    prop_assert_eq!(rollup.offline, count(&|outcome| outcome == "agent_error"));
                    prop_assert_eq!(rollup.latency_us, 100_000 * i64::from(rollup.valid));
                    prop_assert_eq!(rollup.latency_max_us, 100_000 * i32::from(rollup.valid > 0));
                }
                let due: i32 = tables.rollups.iter().filter(|(key, _)| of_width(key)).map(|(_, r)| r.due()).sum();
                prop_assert_eq!(due, ticks.iter().filter(|tick| tick.agent == agent).count() as i32);
            }
        }
    }
}
