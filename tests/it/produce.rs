//! The whole `produce` agent with librdkafka's in-process broker: every tick has one record, whatever happens.
//!
//! The checks are simulated. Only the last tests use the real check and the real host file.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use host_metrics::check::observation::Observation;
use host_metrics::check::target::Target;
use host_metrics::config::{CheckConfig, GroupConfig, KafkaConfig, KafkaSecurity, ProduceConfig, References};
use host_metrics::produce::counters::Counters;
use host_metrics::produce::hosts::Sources;
use host_metrics::produce::publisher::Bounds;
use host_metrics::produce::schedule::MissedReason;
use host_metrics::produce::{self, Rounds, Setup};
use host_metrics::sample::epoch::Claim;
use host_metrics::sample::{self, Outcome, Sample, Timestamp};
use host_metrics::shutdown::{STOP_WITHIN, Shutdown};
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::mocking::MockCluster;
use rdkafka::producer::DefaultProducerContext;
use rdkafka::types::{RDKafkaApiKey, RDKafkaRespErr};
use rdkafka::{Message, Offset, TopicPartitionList};

pub const TOPIC: &str = "host-metrics";
const PARTITIONS: i32 = 3;

/// The bound of every wait, reached only if a test fails.
const BOUND: Duration = Duration::from_secs(60);

#[test]
fn every_tick_has_one_record_with_its_hosts_key_in_its_hosts_partition_in_order() {
    let kafka = Kafka::start();
    let hosts = hosts(40);
    let run = Running::start(&kafka, hosts, Bounds::default(), |target| {
        match target.address.len() {
            10 => fault(Outcome::ConnectRefused),
            _ => Observation {
                status_code: Some(204),
                ..ok()
            },
        }
    });
    run.wait_for("three records a host", |counters| counters.delivered() >= 120);
    let counters = run.stop().expect("a clean stop");

    let records = kafka.records(TOPIC);
    assert_eq!(records.len() as u64, counters.ticks_due.load(Ordering::Relaxed));
    assert_whole(&counters, &records);
    for record in &records {
        let sample = record.sample();
        assert_eq!(record.key, record.address());
        assert_eq!(
            record.partition,
            murmur2_partition(record.key.as_bytes()),
            "{}",
            record.key
        );
        assert_eq!(sample.interval_seconds, Some(1.0));
        assert_eq!(sample.agent.as_deref(), Some("tester"));
    }
    // On a busy machine a check may begin too late, and its tick is missed.
    let checked: Vec<_> = records
        .iter()
        .filter(|record| record.outcome() != "missed")
        .collect();
    assert!(checked.len() > records.len() / 2);
    for record in checked {
        let sample = record.sample();
        assert_eq!(sample.is_valid, sample.address.len() != 10);
        assert!(sample.started_at >= sample.scheduled_at);
    }
}

#[test]
fn hosts_that_hang_do_not_make_the_others_late() {
    let kafka = Kafka::start();
    let mut hosts: Vec<_> = (0..60).map(|i| host(&format!("hangs{i}.example"), 1)).collect();
    hosts.extend((0..60).map(|i| host(&format!("well{i}.example"), 1)));
    let run = Running::start_with(&kafka, hosts, Bounds::default(), |target, deadline| {
        if target.address.starts_with("hangs") {
            block_until(deadline);
            return fault(Outcome::ResponseTimeout);
        }
        ok()
    });
    run.wait_for("four records of each", |counters| counters.delivered() >= 4 * 120);
    run.stop().expect("a clean stop");
    let records = kafka.records(TOPIC);
    let well: Vec<_> = records
        .iter()
        .filter(|record| record.key.starts_with("well"))
        .collect();
    // On a busy machine a check may begin too late, and its tick is missed.
    let with = |outcome: &str| -> Vec<_> {
        let records = well.iter();
        records.filter(|record| record.outcome() == outcome).collect()
    };
    let (checked, missed) = (with("ok"), with("missed").len());
    assert_eq!(checked.len() + missed, well.len());
    assert!(missed * 10 < well.len(), "{missed} of {} are missed", well.len());
    let mut late: Vec<_> = checked
        .iter()
        .map(|record| record.started_at().unwrap() - record.scheduled_at())
        .collect();
    late.sort_unstable();
    // On an idle machine this is below 0.2 ms, but other tests run at the same time.
    let median = late[late.len() / 2];
    assert!(median < 50_000, "the median is {median} µs late");
}

#[test]
fn a_stop_with_hundreds_of_hanging_checks_is_in_time_and_records_which_were_cut_off() {
    let kafka = Kafka::start();
    let mut hosts: Vec<_> = (0..300).map(|i| host(&format!("hangs{i}.example"), 1)).collect();
    hosts.extend((0..20).map(|i| host(&format!("well{i}.example"), 1)));
    let run = Running::start_with(&kafka, hosts, Bounds::default(), |target, _| {
        if target.address.starts_with("hangs") {
            block_until(now() + BOUND);
        }
        ok()
    });
    run.wait_for("a full house", |counters| counters.results(Outcome::Ok) >= 40);
    let began = now();
    let counters = run.stop().expect("everything is delivered");
    assert!(began.elapsed() < STOP_WITHIN, "{:?}", began.elapsed());

    let records = kafka.records(TOPIC);
    assert_balanced(&counters, &records);
    let cut_off: Vec<_> = records
        .iter()
        .filter(|record| {
            record
                .sample()
                .error
                .is_some_and(|error| error.starts_with("cut off"))
        })
        .collect();
    assert_eq!(cut_off.len(), 300);
    for record in cut_off {
        assert_eq!(record.outcome(), "missed");
        assert!(record.started_at().unwrap() >= record.scheduled_at());
    }
}

#[test]
fn a_broker_that_goes_and_comes_back_loses_and_doubles_nothing() {
    let kafka = Kafka::start();
    let hosts = hosts(50);
    let run = Running::start(&kafka, hosts, Bounds::default(), |_| ok());
    for round in 1..=2 {
        let delivered = run.counters.delivered();
        run.wait_for("records on the way", |counters| {
            counters.delivered() > delivered + 20
        });
        kafka.cluster.broker_down(1).unwrap();
        let ticks = run.ticks_due();
        run.wait_for("ticks in the outage", |_| run.ticks_due() > ticks + 100 * round);
        kafka.cluster.broker_up(1).unwrap();
    }
    let ticks = run.ticks_due();
    run.wait_for("what was kept", |counters| counters.delivered() >= ticks);
    let counters = run.stop().expect("a clean stop");
    let records = kafka.records(TOPIC);
    assert_whole(&counters, &records);
    let with = |outcome: &str| {
        records
            .iter()
            .filter(|record| record.outcome() == outcome)
            .count()
    };
    assert_eq!(with("ok") + with("missed"), records.len());
    assert!(
        with("missed") * 10 < records.len(),
        "{} of {} are missed",
        with("missed"),
        records.len()
    );
}

#[test]
fn a_full_buffer_stops_the_checks_and_every_tick_still_gets_its_record() {
    let kafka = Kafka::start();
    let hosts = hosts(20);
    let bounds = Bounds {
        records: 50,
        bytes: 1 << 20,
    };
    let run = Running::start(&kafka, hosts, bounds, |_| ok());
    run.wait_for("a start", |counters| counters.delivered() > 20);
    kafka.cluster.broker_down(1).unwrap();
    run.wait_for("a full buffer", |counters| {
        counters.missed(MissedReason::NoRoom) > 60
    });
    kafka.cluster.broker_up(1).unwrap();
    let results = run.counters.results(Outcome::Ok);
    run.wait_for("checks again", |counters| {
        counters.results(Outcome::Ok) > results + 40
    });
    let counters = run.stop().expect("a clean stop");
    assert_eq!(counters.lost(), 0);
    let records = kafka.records(TOPIC);
    assert_whole(&counters, &records);
    let missed = records
        .iter()
        .filter(|record| record.outcome() == "missed")
        .count();
    assert!(missed > 60, "{missed}");
}

#[test]
fn without_kafka_a_stop_is_in_time_and_says_whose_records_were_never_acknowledged() {
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = nobody.local_addr().unwrap().port();
    drop(nobody);
    let hosts = vec![host("a.example", 1), host("b.example", 1)];
    let servers = format!("127.0.0.1:{port}");
    let config = config(&servers, TOPIC);
    let run = Running::start_at(config, None, Rounds::Endless, hosts, Bounds::default(), |_, _| {
        ok()
    });
    run.wait_for("some records", |counters| counters.results(Outcome::Ok) >= 4);
    let began = now();
    let (counters, ended) = run.stop_anyhow();
    let error = ended.expect_err("nothing was acknowledged").to_string();
    assert!(began.elapsed() < STOP_WITHIN, "{:?}", began.elapsed());
    let ticks = counters.ticks_due.load(Ordering::Relaxed);
    assert!(
        error.contains(&format!("{ticks} records of 2 hosts: a.example (")),
        "{error}"
    );
    assert!(error.contains("efused"), "the cause is named: {error}");
    assert_eq!((counters.delivered(), counters.lost()), (0, ticks));
}

#[test]
fn records_without_an_answer_from_the_broker_are_named() {
    let kafka = Kafka::start();
    let hosts = vec![host("a.example", 1), host("b.example", 1)];
    let run = Running::start(&kafka, hosts, Bounds::default(), |_| ok());
    run.wait_for("a start", |counters| counters.delivered() >= 2);
    kafka.cluster.broker_down(1).unwrap();
    let results = run.counters.results(Outcome::Ok);
    run.wait_for("kept records", |counters| {
        counters.results(Outcome::Ok) >= results + 4
    });
    let (counters, ended) = run.stop_anyhow();
    let error = ended.expect_err("the broker is down").to_string();
    let left = counters.lost();
    assert!(
        left >= 4 && error.contains(&format!("{left} records of 2 hosts: a.example (")),
        "{error}"
    );
}

#[test]
fn a_topic_that_is_missing_is_waited_for_and_nothing_is_lost() {
    let kafka = Kafka::start();
    let missing = RDKafkaRespErr::RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART;
    let there = RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR;
    kafka.cluster.topic_error(TOPIC, missing).unwrap();
    let mut hosts = hosts(20);
    kafka.cluster.create_topic("other", 1, 1).unwrap();
    hosts.push(Target {
        topic: Some("other".to_owned()),
        ..host("other.example", 1)
    });
    let run = Running::start(&kafka, hosts, Bounds::default(), |_| ok());
    run.wait_for("the other topic's", |counters| counters.delivered() >= 2);
    run.wait_for("kept records", |counters| counters.results(Outcome::Ok) >= 60);
    kafka.cluster.topic_error(TOPIC, there).unwrap();
    let ticks = run.ticks_due();
    run.wait_for("the kept ones", |counters| counters.delivered() >= ticks);
    let counters = run.stop().expect("a clean stop");
    let mut records = kafka.records(TOPIC);
    let others = kafka.records("other");
    assert!(others.iter().all(|record| record.key == "other.example"));
    records.extend(others);
    assert_whole(&counters, &records);
}

#[test]
fn a_wrong_topic_of_one_host_does_not_stop_the_others() {
    let kafka = Kafka::start();
    kafka.cluster.create_topic("slip", 1, 1).unwrap();
    let missing = RDKafkaRespErr::RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART;
    kafka.cluster.topic_error("slip", missing).unwrap();
    let mut hosts = hosts(20);
    hosts.extend((0..20).map(|i| Target {
        topic: Some("slip".to_owned()),
        ..host(&format!("slip{i}.example"), 1)
    }));
    let bounds = Bounds {
        records: 100,
        bytes: 1 << 20,
    };
    let run = Running::start(&kafka, hosts, bounds, |_| ok());
    run.wait_for("a full share", |counters| {
        counters.missed(MissedReason::NoRoom) >= 20
    });
    let delivered = run.counters.delivered();
    run.wait_for("the others", |counters| counters.delivered() >= delivered + 60);
    let there = RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR;
    kafka.cluster.topic_error("slip", there).unwrap();
    let ticks = run.ticks_due();
    run.wait_for("all of them", |counters| counters.delivered() >= ticks);
    let counters = run.stop().expect("a clean stop");
    let mut records = kafka.records(TOPIC);
    let was_missed = |record: &Record| {
        let error = record.sample().error.map(|error| error.into_owned());
        error.as_deref() == Some(MissedReason::NoRoom.as_str())
    };
    assert!(!records.iter().any(was_missed));
    records.extend(kafka.records("slip"));
    assert_whole(&counters, &records);
}

#[test]
fn records_returned_for_a_missing_topic_are_sent_in_order_when_it_exists() {
    let kafka = Kafka::start();
    let hosts = hosts(20);
    let run = Running::start(&kafka, hosts, Bounds::default(), |_| ok());
    run.wait_for("a start", |counters| counters.delivered() >= 20);
    let forbidden = RDKafkaRespErr::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED;
    kafka.cluster.topic_error(TOPIC, forbidden).unwrap();
    kafka.cluster.request_errors(RDKafkaApiKey::Produce, &[forbidden]);
    let ticks = run.ticks_due();
    run.wait_for("ticks that wait", |_| run.ticks_due() > ticks + 60);
    let allowed = RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR;
    kafka.cluster.topic_error(TOPIC, allowed).unwrap();
    let ticks = run.ticks_due();
    run.wait_for("all of them", |counters| counters.delivered() >= ticks);
    let counters = run.stop().expect("a clean stop");
    assert_eq!(counters.lost(), 0);
    let records = kafka.records(TOPIC);
    assert_whole(&counters, &records);
}

#[test]
fn a_producer_that_the_broker_forgot_is_replaced_and_loses_nothing() {
    // The first error is fatal for librdkafka, the second one fails its batch.
    for lost_track in [
        RDKafkaRespErr::RD_KAFKA_RESP_ERR_OUT_OF_ORDER_SEQUENCE_NUMBER,
        RDKafkaRespErr::RD_KAFKA_RESP_ERR_INVALID_PRODUCER_EPOCH,
    ] {
        let kafka = Kafka::start();
        let hosts = hosts(20);
        let run = Running::start(&kafka, hosts, Bounds::default(), |_| ok());
        run.wait_for("a start", |counters| counters.delivered() >= 20);
        kafka
            .cluster
            .request_errors(RDKafkaApiKey::Produce, &[lost_track]);
        let ticks = run.ticks_due();
        run.wait_for("more records", |counters| counters.delivered() > ticks + 40);
        let counters = run.stop().expect("a clean stop");
        assert_eq!(counters.lost(), 0);
        let records = kafka.records(TOPIC);
        assert_whole(&counters, &records);
    }
}

#[test]
fn a_record_that_kafka_refuses_permanently_is_counted_and_delays_no_other() {
    let kafka = Kafka::start();
    let hosts = hosts(5);
    let run = Running::start(&kafka, hosts, Bounds::default(), |_| ok());
    run.wait_for("a start", |counters| counters.delivered() >= 5);
    let refusal = RDKafkaRespErr::RD_KAFKA_RESP_ERR_INVALID_RECORD;
    kafka.cluster.request_errors(RDKafkaApiKey::Produce, &[refusal]);
    run.wait_for("a refusal", |counters| counters.lost() >= 1);
    let delivered = run.counters.delivered();
    run.wait_for("more records", |counters| counters.delivered() >= delivered + 5);
    let counters = run.stop().expect("what was refused is not waited for");
    let ticks = counters.ticks_due.load(Ordering::Relaxed);
    assert_eq!(counters.delivered() + counters.lost(), ticks);
    assert_eq!(kafka.records(TOPIC).len() as u64, counters.delivered());
}

#[test]
fn a_group_of_one_checks_every_host_lets_its_checks_end_and_leaves_an_empty_buffer() {
    let kafka = Kafka::start();
    let hosts = hosts(20);
    let group = GroupConfig {
        name: "eu".to_owned(),
        instance_id: None,
    };
    let config = ProduceConfig {
        group: Some(group),
        ..config(&kafka.servers(), TOPIC)
    };
    let run = Running::start_at(config, None, Rounds::Endless, hosts, Bounds::default(), |_, _| {
        // Longer than a share that others wait for is kept.
        block_until(now() + Duration::from_millis(700));
        ok()
    });
    run.wait_for("records of each", |counters| counters.delivered() >= 60);
    let counters = run.stop().expect("a clean stop");
    let records = kafka.records(TOPIC);
    assert_whole(&counters, &records);
    assert!(records.iter().all(|record| record.sample().epoch.is_some()));
    let deliveries = &counters.deliveries;
    assert_eq!(deliveries.records_on_the_way.load(Ordering::Relaxed), 0);
    assert_eq!(deliveries.bytes_on_the_way.load(Ordering::Relaxed), 0);
}

/// The topic of KAFKA_TOPIC_FAILURES.
const FAILURES: &str = "failures";

fn config_with_failures(kafka: &Kafka) -> ProduceConfig {
    kafka.cluster.create_topic(FAILURES, PARTITIONS, 1).unwrap();
    ProduceConfig {
        failures_topic: Some(FAILURES.to_owned()),
        ..config(&kafka.servers(), TOPIC)
    }
}

/// Half of these hosts fail.
fn half_fails(target: &Target, _: Instant) -> Observation {
    match target.address.as_bytes()[1] % 4 {
        0 => fault(Outcome::ConnectRefused),
        1 => fault(Outcome::AgentError),
        2 => fault(Outcome::AgentOffline),
        _ => ok(),
    }
}

#[test]
fn a_failed_check_is_copied_to_the_topic_for_failures_and_nothing_else_is() {
    let kafka = Kafka::start();
    let hosts = hosts(8);
    let config = config_with_failures(&kafka);
    let run = Running::start_at(
        config,
        None,
        Rounds::Endless,
        hosts,
        Bounds::default(),
        half_fails,
    );
    run.wait_for("records of each", |counters| counters.delivered() >= 40);
    let counters = run.stop().expect("a clean stop");
    let records = kafka.records(TOPIC);
    assert_balanced(&counters, &records);
    let sorted = |records: &[Record], is_wanted: &dyn Fn(&Record) -> bool| {
        let wanted = records.iter().filter(|record| is_wanted(record));
        let mut values: Vec<_> = wanted
            .map(|record| (record.key.clone(), record.value.clone()))
            .collect();
        values.sort();
        values
    };
    let failed = sorted(&records, &|record| record.outcome() == "connect_refused");
    assert!(failed.len() >= 8, "{}", failed.len());
    assert_eq!(sorted(&kafka.records(FAILURES), &|_| true), failed);
    let copied = counters.deliveries.copies_delivered.load(Ordering::Relaxed);
    assert_eq!(copied, failed.len() as u64);
}

#[test]
fn a_missing_topic_for_failures_holds_up_nothing_and_its_copies_are_bounded() {
    let kafka = Kafka::start();
    let config = config_with_failures(&kafka);
    let missing = RDKafkaRespErr::RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART;
    kafka.cluster.topic_error(FAILURES, missing).unwrap();
    let hosts = (0..40).map(|i| host(&format!("h0{i}.example"), 1)).collect();
    let bounds = Bounds {
        records: 100,
        bytes: 1 << 20,
    };
    let run = Running::start_at(config, None, Rounds::Endless, hosts, bounds, half_fails);
    run.wait_for("dropped copies", |counters| {
        counters.deliveries.copies_dropped.load(Ordering::Relaxed) >= 40
    });
    assert_eq!(run.counters.deliveries.readiness.check(), Ok(()));
    let there = RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR;
    kafka.cluster.topic_error(FAILURES, there).unwrap();
    run.wait_for("the copies that were kept", |counters| {
        counters.deliveries.copies_delivered.load(Ordering::Relaxed) >= 25
    });
    kafka.cluster.topic_error(FAILURES, missing).unwrap();
    let counters = run.stop().expect("a clean stop");
    let records = kafka.records(TOPIC);
    assert_balanced(&counters, &records);
    assert_eq!(counters.missed(MissedReason::NoRoom), 0);
}

#[test]
fn once_waits_for_the_copies_of_failed_checks() {
    let kafka = Kafka::start();
    let config = config_with_failures(&kafka);
    let hosts = (0..8).map(|i| host(&format!("h{i}.example"), 60)).collect();
    let run = Running::start_at(config, None, Rounds::Once, hosts, Bounds::default(), half_fails);
    let (_, ended) = run.wait();
    ended.expect("a clean end");
    assert_eq!(kafka.records(TOPIC).len(), 8);
    assert_eq!(kafka.records(FAILURES).len(), 2);
}

#[test]
fn with_fewer_threads_than_hosts_every_tick_has_its_record() {
    let kafka = Kafka::start();
    let hosts = hosts(6);
    let mut config = config(&kafka.servers(), TOPIC);
    config.check.max_threads = 2;
    let run = Running::start_at(
        config,
        None,
        Rounds::Endless,
        hosts,
        Bounds::default(),
        |_, deadline| {
            block_until(deadline - Duration::from_millis(300));
            ok()
        },
    );
    run.wait_for("ticks without a thread", |counters| {
        counters.missed(MissedReason::NoThread) >= 3
    });
    let counters = run.stop().expect("a clean stop");
    let records = kafka.records(TOPIC);
    assert_whole(&counters, &records);
}

#[test]
#[cfg(target_os = "linux")]
fn without_threads_checks_are_agent_errors_and_every_tick_has_its_record() {
    use crate::child;
    const SELF: &str = "produce::without_threads_checks_are_agent_errors_and_every_tick_has_its_record";
    if !child::is_it(SELF) {
        return child::run(SELF, &mut child::limitable());
    }
    let kafka = Kafka::start();
    let hosts = hosts(20);
    let hanging = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let hangs = Arc::clone(&hanging);
    let run = Running::start(&kafka, hosts, Bounds::default(), move |_| {
        let deadline = now() + BOUND;
        while hangs.load(Ordering::Relaxed) && now() < deadline {
            block_until(now() + Duration::from_millis(2));
        }
        ok()
    });
    run.wait_for("a start", |counters| counters.delivered() >= 20);
    let no_threads = child::NoThreads::begin();
    // The existing threads get jobs.
    hanging.store(true, Ordering::Relaxed);
    run.wait_for("checks without a thread", |counters| {
        counters.results(Outcome::AgentError) >= 20
    });
    drop(no_threads);
    hanging.store(false, Ordering::Relaxed);
    let well = run.counters.results(Outcome::Ok);
    run.wait_for("checks again", |counters| {
        counters.results(Outcome::Ok) >= well + 40
    });
    let counters = run.stop().expect("a clean stop");
    let records = kafka.records(TOPIC);
    assert_whole(&counters, &records);
    let mut ours = 0;
    for record in &records {
        match record.outcome().as_str() {
            "agent_error" => {
                ours += 1;
                let error = record.sample().error.unwrap().into_owned();
                assert!(error.starts_with("cannot start a thread: "), "{error}");
                assert_eq!(record.started_at(), None, "it did not begin");
            }
            outcome => assert!(["ok", "missed"].contains(&outcome), "{outcome}"),
        }
    }
    assert_eq!(ours, counters.results(Outcome::AgentError));
}

#[test]
fn once_writes_one_record_per_host_whatever_the_outcome_and_ends() {
    let kafka = Kafka::start();
    let hosts = (0..30).map(|i| host(&format!("h{i}.example"), 86_400)).collect();
    let mut config = config(&kafka.servers(), TOPIC);
    config.check.max_threads = 4;
    let run = Running::start_at(
        config,
        None,
        Rounds::Once,
        hosts,
        Bounds::default(),
        |target, _| {
            assert_ne!(target.address, "h7.example", "a bug in a check");
            fault(Outcome::DnsNotFound)
        },
    );
    let (_, ended) = run.wait();
    ended.expect("it ends by itself, and well");
    let records = kafka.records(TOPIC);
    let addresses: HashSet<_> = records.iter().map(Record::address).collect();
    assert_eq!((records.len(), addresses.len()), (30, 30));
    for record in &records {
        let panicked = record.key == "h7.example";
        assert_eq!(
            record.outcome(),
            if panicked { "agent_error" } else { "dns_not_found" }
        );
    }
}

#[test]
fn a_reload_takes_the_new_hosts_and_a_bad_file_changes_nothing() {
    let kafka = Kafka::start();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("hosts");
    std::fs::write(&file, "a.example 1s\nb.example 1s\n").unwrap();
    let targets = produce::host_file::parse("hosts", &std::fs::read(&file).unwrap())
        .unwrap()
        .targets;
    let run = Running::start_at(
        config(&kafka.servers(), TOPIC),
        Some(&file),
        Rounds::Endless,
        targets,
        Bounds::default(),
        |target, _| {
            fault(if target.follow == 3 {
                Outcome::TlsError
            } else {
                Outcome::DnsError
            })
        },
    );
    run.wait_for("a start", |counters| counters.delivered() >= 4);
    std::fs::write(&file, "a.example 1s follow=\n").unwrap();
    run.shutdown.request_reload();
    let delivered = run.counters.delivered();
    run.wait_for("more of the old", |counters| {
        counters.delivered() >= delivered + 4
    });
    std::fs::write(&file, "a.example 1s follow=3\nc.example 1s\n").unwrap();
    run.shutdown.request_reload();
    run.wait_for("the new option", |counters| {
        counters.results(Outcome::TlsError) >= 3
    });
    let counters = run.stop().expect("a clean stop");
    let records = kafka.records(TOPIC);
    assert_whole(&counters, &records);
    let newest = |key: &str| {
        records
            .iter()
            .filter(|r| r.key == key)
            .map(Record::scheduled_at)
            .max()
    };
    assert!(newest("a.example") > newest("b.example"), "b.example is gone");
    assert!(newest("c.example") > newest("b.example"), "c.example is there");
}

#[test]
#[cfg(unix)]
fn a_host_file_is_read_again_however_it_is_changed() {
    use std::fs;
    use std::os::unix::fs::symlink;
    let kafka = Kafka::start();
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let lines = |hosts: usize| {
        (0..hosts)
            .map(|i| format!("h{i}.example 1d\n"))
            .collect::<String>()
    };
    // As Kubernetes mounts a ConfigMap.
    for (name, hosts) in [("v1", 2), ("v2", 7)] {
        fs::create_dir(path(name)).unwrap();
        fs::write(path(name).join("hosts"), lines(hosts)).unwrap();
    }
    symlink("v1", path("data")).unwrap();
    symlink("data/hosts", path("hosts")).unwrap();
    let file = path("hosts");
    let run = Running::start_at(
        config(&kafka.servers(), TOPIC),
        Some(&file),
        Rounds::Endless,
        vec![host("h0.example", 86_400), host("h1.example", 86_400)],
        Bounds::default(),
        |_, _| ok(),
    );
    let wait_for = |what: &str, hosts: usize, has_error: bool| {
        run.wait_for(what, |counters| {
            counters.hosts.load(Ordering::Relaxed) == hosts
                && counters.host_list_has_error.load(Ordering::Relaxed) == has_error
        });
    };
    wait_for("the start", 2, false);
    fs::write(&file, lines(3)).unwrap();
    wait_for("written in place", 3, false);
    fs::write(path("new"), lines(4)).unwrap();
    fs::rename(path("new"), path("v1").join("hosts")).unwrap();
    wait_for("replaced by rename", 4, false);
    fs::write(&file, "h0.example 1x\n").unwrap();
    wait_for("an error", 4, true);
    fs::write(&file, lines(5)).unwrap();
    wait_for("corrected", 5, false);
    fs::remove_file(path("v1").join("hosts")).unwrap();
    wait_for("deleted", 5, true);
    symlink("v2", path("new")).unwrap();
    fs::rename(path("new"), path("data")).unwrap();
    wait_for("another target of a symbolic link", 7, false);
    // Reading a pipe would block, and so would the next change.
    fs::remove_file(path("v2").join("hosts")).unwrap();
    let made = std::process::Command::new("mkfifo")
        .arg(path("v2").join("hosts"))
        .status();
    assert!(made.unwrap().success());
    wait_for("a pipe", 7, true);
    fs::remove_file(path("v2").join("hosts")).unwrap();
    fs::write(&file, lines(1)).unwrap();
    wait_for("a file again", 1, false);
    run.stop().expect("a clean stop");
}

#[test]
fn the_real_check_of_a_real_server_arrives_as_a_record() {
    let kafka = Kafka::start();
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in server.incoming() {
            let mut stream = stream.unwrap();
            let mut request = [0; 4_096];
            assert!(stream.read(&mut request).unwrap() > 0);
            let answer = "HTTP/1.1 200 OK\r\nContent-Length: 12\r\nConnection: close\r\n\r\nall is well\n";
            stream.write_all(answer.as_bytes()).unwrap();
        }
    });
    let gone = TcpListener::bind("127.0.0.1:0").unwrap();
    let refused = gone.local_addr().unwrap().port();
    drop(gone);
    let lines = format!("http://127.0.0.1:{port}/ 5 (is well)\nhttp://127.0.0.1:{refused}/ 5\n");
    let targets = produce::host_file::parse("hosts", lines.as_bytes())
        .unwrap()
        .targets;
    let config = config(&kafka.servers(), TOPIC);
    produce::run(
        &config,
        targets,
        Sources::default(),
        Rounds::Once,
        &Shutdown::new(),
    )
    .expect("it ends well");
    let records = kafka.records(TOPIC);
    let outcomes: BTreeMap<_, _> = records
        .iter()
        .map(|record| (record.key.clone(), record.outcome()))
        .collect();
    let expected = [
        (format!("http://127.0.0.1:{port}/"), "ok".to_owned()),
        (
            format!("http://127.0.0.1:{refused}/"),
            "connect_refused".to_owned(),
        ),
    ];
    assert_eq!(outcomes, BTreeMap::from(expected));
}

/// An agent on its own thread.
struct Running {
    shutdown: Shutdown,
    counters: Arc<Counters>,
    thread: JoinHandle<anyhow::Result<()>>,
}

impl Running {
    fn start(
        kafka: &Kafka,
        hosts: Vec<Target>,
        bounds: Bounds,
        check: impl Fn(&Target) -> Observation + Clone + Send + Sync + 'static,
    ) -> Self {
        Self::start_with(kafka, hosts, bounds, move |target, _| check(target))
    }

    fn start_with(
        kafka: &Kafka,
        hosts: Vec<Target>,
        bounds: Bounds,
        check: impl Fn(&Target, Instant) -> Observation + Clone + Send + Sync + 'static,
    ) -> Self {
        let config = config(&kafka.servers(), TOPIC);
        Self::start_at(config, None, Rounds::Endless, hosts, bounds, check)
    }

    fn start_at(
        config: ProduceConfig,
        host_file: Option<&Path>,
        rounds: Rounds,
        hosts: Vec<Target>,
        bounds: Bounds,
        check: impl Fn(&Target, Instant) -> Observation + Clone + Send + Sync + 'static,
    ) -> Self {
        let (shutdown, counters) = (Shutdown::new(), Arc::<Counters>::default());
        let host_file = host_file.map(Path::to_owned);
        let (seen, stop) = (Arc::clone(&counters), shutdown.clone());
        let thread = std::thread::spawn(move || {
            let setup = Setup {
                config: &config,
                sources: Sources::of_file(host_file.as_deref()),
                rounds,
                shutdown: &stop,
                counters: seen,
                bounds,
            };
            setup.run(hosts, move || check.clone())
        });
        Self {
            shutdown,
            counters,
            thread,
        }
    }

    fn ticks_due(&self) -> u64 {
        self.counters.ticks_due.load(Ordering::Relaxed)
    }

    fn wait_for(&self, what: &str, condition: impl Fn(&Counters) -> bool) {
        let deadline = now() + BOUND;
        while !condition(&self.counters) {
            assert!(now() < deadline, "{what}: {:?}", self.counters);
            assert!(!self.thread.is_finished(), "{what}: the agent ended");
            block_until(now() + Duration::from_millis(2));
        }
    }

    fn wait(self) -> (Arc<Counters>, anyhow::Result<()>) {
        let deadline = now() + BOUND;
        while !self.thread.is_finished() {
            assert!(now() < deadline, "it does not end: {:?}", self.counters);
            block_until(now() + Duration::from_millis(2));
        }
        (
            self.counters,
            self.thread.join().expect("the agent does not panic"),
        )
    }

    fn stop_anyhow(self) -> (Arc<Counters>, anyhow::Result<()>) {
        self.shutdown.request();
        self.wait()
    }

    fn stop(self) -> anyhow::Result<Arc<Counters>> {
        let (counters, ended) = self.stop_anyhow();
        ended.map(|()| counters)
    }
}

/// librdkafka's in-process broker; its one broker has the number 1.
pub struct Kafka {
    cluster: MockCluster<'static, DefaultProducerContext>,
}

impl Kafka {
    pub fn start() -> Self {
        let cluster = MockCluster::new(1).unwrap();
        cluster.create_topic(TOPIC, PARTITIONS, 1).unwrap();
        Self { cluster }
    }

    pub fn servers(&self) -> String {
        self.cluster.bootstrap_servers()
    }

    /// All records of the topic, each partition in order.
    pub fn records(&self, topic: &str) -> Vec<Record> {
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", self.servers())
            .set("group.id", "reader")
            .set("enable.auto.commit", "false")
            .set("enable.partition.eof", "true")
            .create()
            .unwrap();
        let metadata = consumer.fetch_metadata(Some(topic), BOUND).unwrap();
        let mut open: HashSet<i32> = metadata.topics()[0].partitions().iter().map(|p| p.id()).collect();
        let mut from = TopicPartitionList::new();
        for partition in &open {
            from.add_partition_offset(topic, *partition, Offset::Beginning)
                .unwrap();
        }
        consumer.assign(&from).unwrap();
        let deadline = now() + BOUND;
        let mut records = Vec::new();
        while !open.is_empty() {
            assert!(now() < deadline, "{} records of {topic}, no end", records.len());
            match consumer.poll(Duration::from_millis(100)) {
                None => {}
                Some(Ok(message)) if message.payload().and_then(Claim::decode).is_some() => {}
                Some(Ok(message)) => records.push(Record {
                    partition: message.partition(),
                    key: String::from_utf8(message.key().unwrap().to_vec()).unwrap(),
                    value: message.payload().unwrap().to_vec(),
                }),
                Some(Err(KafkaError::PartitionEOF(partition))) => drop(open.remove(&partition)),
                Some(Err(error)) => panic!("{error}"),
            }
        }
        records
    }
}

pub struct Record {
    partition: i32,
    pub key: String,
    pub value: Vec<u8>,
}

impl Record {
    pub fn sample(&self) -> Sample<'_> {
        sample::decode(&self.value).expect("a record that readers accept")
    }

    fn address(&self) -> String {
        self.sample().address.into_owned()
    }

    pub fn outcome(&self) -> String {
        self.sample().outcome.unwrap().into_owned()
    }

    pub fn scheduled_at(&self) -> i64 {
        self.sample().scheduled_at.unwrap().unix_micros()
    }

    fn started_at(&self) -> Option<i64> {
        self.sample().started_at.map(Timestamp::unix_micros)
    }
}

/// Every due tick is written, and the agent's counters agree with Kafka.
fn assert_balanced(counters: &Counters, records: &[Record]) {
    let ticks = counters.ticks_due.load(Ordering::Relaxed);
    assert_eq!((ticks, counters.delivered()), (records.len() as u64, ticks));
    let missed = records
        .iter()
        .filter(|record| record.outcome() == "missed")
        .count();
    let counted: u64 = MissedReason::ALL
        .map(|reason| counters.missed(reason))
        .iter()
        .sum();
    assert_eq!(counted, missed as u64);
}

/// The same, and the records of each host, in the order of its partition, are a second apart: none is missing, repeated or out of
/// order.
fn assert_whole(counters: &Counters, records: &[Record]) {
    assert_balanced(counters, records);
    let mut last = HashMap::new();
    for record in records {
        let tick = record.scheduled_at();
        if let Some(before) = last.insert(record.key.clone(), tick) {
            assert_eq!(tick - before, 1_000_000, "{} at {before}", record.key);
        }
    }
}

pub fn config(servers: &str, topic: &str) -> ProduceConfig {
    ProduceConfig {
        kafka: KafkaConfig {
            bootstrap_servers: servers.to_owned(),
            security: KafkaSecurity {
                tls: None,
                sasl: None,
            },
        },
        topic: topic.to_owned(),
        failures_topic: None,
        group: None,
        references: References::Off,
        check: CheckConfig {
            timeout: Duration::from_secs(10),
            max_threads: 1_024,
            max_body_bytes: 1 << 20,
            user_agent: "host-metrics/test".to_owned(),
            ca_file: None,
            secrets_dir: None,
            agent_name: "tester".to_owned(),
        },
        metrics_addr: None,
    }
}

/// `h0.example` and so on, checked every second.
fn hosts(count: usize) -> Vec<Target> {
    (0..count).map(|i| host(&format!("h{i}.example"), 1)).collect()
}

fn host(address: &str, interval_seconds: u64) -> Target {
    let url = url::Url::parse(&format!("https://{address}/")).unwrap();
    Target::new(address.to_owned(), url, Duration::from_secs(interval_seconds))
}

fn ok() -> Observation {
    Observation {
        error: None,
        ..Observation::failed(Outcome::Ok, "")
    }
}

fn fault(outcome: Outcome) -> Observation {
    Observation::failed(outcome, "made up")
}

#[expect(
    clippy::disallowed_methods,
    reason = "a test measures and bounds what it waits for"
)]
fn now() -> Instant {
    Instant::now()
}

/// A check of a host that never answers.
fn block_until(deadline: Instant) {
    let (_silent, nothing) = channel::<()>();
    let left = deadline.saturating_duration_since(now());
    assert_eq!(nothing.recv_timeout(left), Err(RecvTimeoutError::Timeout));
}

/// Kafka's default partitioner: murmur2 of the key, without its sign, modulo the number of partitions
/// (org.apache.kafka.common.utils.Utils.murmur2 and BuiltInPartitioner.partitionForKey).
fn murmur2_partition(key: &[u8]) -> i32 {
    const M: u32 = 0x5bd1_e995;
    let mut hash = 0x9747_b28c ^ u32::try_from(key.len()).unwrap();
    let (words, rest) = key.as_chunks::<4>();
    for word in words {
        let mut k = u32::from_le_bytes(*word).wrapping_mul(M);
        k = (k ^ (k >> 24)).wrapping_mul(M);
        hash = hash.wrapping_mul(M) ^ k;
    }
    if !rest.is_empty() {
        let tail = rest
            .iter()
            .rev()
            .fold(0, |tail, byte| (tail << 8) | u32::from(*byte));
        hash = (hash ^ tail).wrapping_mul(M);
    }
    hash = (hash ^ (hash >> 13)).wrapping_mul(M);
    hash ^= hash >> 15;
    i32::try_from(hash & 0x7fff_ffff).unwrap() % PARTITIONS
}
