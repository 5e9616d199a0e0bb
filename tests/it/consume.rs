//! The consumer with librdkafka's in-process broker: where reading starts, pauses, rebalances, and the whole agent with a
//! temporary Postgres.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use host_metrics::commands::demo::postgres::ThrowAwayPostgres;
use host_metrics::config::{ConsumeConfig, DatabaseConfig, DbSslMode, KafkaConfig, KafkaSecurity};
use host_metrics::consume::batch::{NextOffset, Partition};
use host_metrics::consume::ingest::{Event, Extent};
use host_metrics::consume::source::Source;
use host_metrics::consume::{self, Counters};
use host_metrics::kafka::reader::{Part, Reader};
use host_metrics::shutdown::{STOP_WITHIN, Shutdown};
use host_metrics::tables::names::TableName;
use rdkafka::ClientConfig;
use rdkafka::mocking::MockCluster;
use rdkafka::producer::{BaseProducer, BaseRecord, DefaultProducerContext, Producer};

/// The broker needs three seconds for the first assignment of a group, and longer for a second member with librdkafka's
/// defaults.
const PACE: &[(&str, &str)] = &[("session.timeout.ms", "6000"), ("heartbeat.interval.ms", "500")];

/// The bound of every wait in these tests.
const PATIENCE: Duration = Duration::from_secs(90);

const TOPIC: &str = "host-metrics";
const P0: Partition = Partition::new(TOPIC, 0);
const P1: Partition = Partition::new(TOPIC, 1);

type Broker = MockCluster<'static, DefaultProducerContext>;

// One test for what one consumer sees, because it takes the broker seconds to form a group.
#[test]
fn reading_starts_exactly_at_the_given_offsets() {
    let broker = broker(2);
    produce(&broker, 0, 0..500);
    produce(&broker, 1, 0..10);
    let source = join(&broker);
    assigned(&source, 2);

    // Only the given partitions are read.
    source.read(&[(P1, NextOffset(3))]).unwrap();
    assert_eq!(offsets(&source, 7), [3, 4, 5, 6, 7, 8, 9]);
    assert_silent(&source);

    // librdkafka has prefetched records after the previous start. None of them may come after the new start.
    for (round, start) in [40, 490, 0, 77, 77, 250, 12].into_iter().enumerate() {
        source.read(&[(P0, NextOffset(start))]).unwrap();
        let expected: Vec<i64> = (start..500).take(7 + round).collect();
        assert_eq!(offsets(&source, expected.len()), expected, "round {round}");
    }

    // During a pause no record comes, and none is lost.
    source.pause().unwrap();
    assert_silent(&source);
    source.read(&[(P0, NextOffset(100))]).unwrap();
    assert_eq!(offsets(&source, 400), (100..500).collect::<Vec<_>>());

    // If Kafka has no record at the offset, that is reported, and nothing else is read.
    source.read(&[(P0, NextOffset(700))]).unwrap();
    wait_for(|| match poll(&source) {
        (Some(offset), _) => panic!("offset {offset} is delivered instead"),
        (None, events) => events
            .iter()
            .any(|event| matches!(event, Event::OutOfRange))
            .then_some(()),
    });
    let expected = Extent {
        low: NextOffset(0),
        high: NextOffset(500),
    };
    let extents = wait_for(|| Some(source.extents(&[P0])).filter(|extents| !extents.is_empty()));
    assert_eq!(extents, BTreeMap::from([(P0, expected)]));
    source.read(&[(P0, NextOffset(498))]).unwrap();
    assert_eq!(offsets(&source, 2), [498, 499]);
}

#[test]
fn a_start_is_the_commit_of_the_group_or_else_the_earliest() {
    let broker = broker(2);
    produce(&broker, 0, 0..10);
    produce(&broker, 1, 0..10);
    let source = join(&broker);
    assigned(&source, 2);
    let starts = wait_for(|| Some(source.starts(&[P0, P1])).filter(|starts| starts.len() == 2));
    assert_eq!(starts, BTreeMap::from([(P0, NextOffset(0)), (P1, NextOffset(0))]));
    source.commit(&[(P1, NextOffset(5))]);
    let committed = |source: &Source, next| {
        let expected = BTreeMap::from([(P0, NextOffset(0)), (P1, NextOffset(next))]);
        wait_for(|| (source.starts(&[P0, P1]) == expected).then_some(()));
    };
    committed(&source, 5);
    // Closing waits for the last commit.
    source.commit(&[(P1, NextOffset(6))]);
    source.close(PATIENCE);
    committed(&join(&broker), 6);
}

#[test]
fn a_part_whose_last_record_to_is_stored_goes_on_at_an_earlier_end() {
    let broker = broker(2);
    produce(&broker, 0, 0..3);
    produce(&broker, 1, 0..3);
    let kafka = config(broker.bootstrap_servers(), None).kafka;
    let mut reader = Reader::new(&kafka).unwrap();
    let part = |partition, to_is_stored| Part {
        partition,
        from: 0,
        to: Some(5),
        to_is_stored,
    };
    reader.begin(TOPIC, &[part(0, true), part(1, false)]).unwrap();
    let mut counts = [0, 0];
    let mut go_on = |within: Duration| {
        let over = reader.go_on(now() + within, |partition, _| counts[partition as usize] += 1);
        (over.unwrap(), counts)
    };
    wait_for(|| {
        let (is_over, counts) = go_on(Duration::from_millis(100));
        assert!(!is_over);
        (counts == [3, 3]).then_some(())
    });
    // Its end was reported by now.
    assert_eq!(go_on(Duration::from_secs(1)), (false, [3, 3]));
    produce(&broker, 0, 3..6);
    produce(&broker, 1, 3..6);
    assert_eq!(go_on(PATIENCE), (true, [5, 3]));
}

#[test]
fn a_topic_that_is_made_later_is_taken_up() {
    let broker = MockCluster::new(1).unwrap();
    let mut source = join(&broker);
    let until = now() + Duration::from_secs(2);
    while now() < until {
        let (offset, events) = poll(&source);
        assert!(offset.is_none() && events.is_empty(), "there is nothing yet");
        source.report_outages(now());
    }
    broker.create_topic(TOPIC, 1, 1).unwrap();
    produce(&broker, 0, 0..3);
    wait_for(|| {
        source.report_outages(now());
        let (_, events) = poll(&source);
        events
            .iter()
            .any(|event| matches!(event, Event::Assigned(partitions) if partitions == &[P0]))
            .then_some(())
    });
    source.read(&[(P0, NextOffset(0))]).unwrap();
    assert_eq!(offsets(&source, 3), [0, 1, 2]);
}

#[test]
fn a_second_consumer_gets_its_share_and_gives_it_back() {
    let broker = broker(4);
    for partition in 0..4 {
        produce(&broker, partition, 0..5);
    }
    let first = join(&broker);
    let mut ours = assigned(&first, 4);
    let starts: Vec<_> = ours.iter().map(|partition| (*partition, NextOffset(0))).collect();
    first.read(&starts).unwrap();
    offsets(&first, 20);

    let second = join(&broker);
    let mut theirs = BTreeSet::new();
    wait_for(|| {
        apply(&mut ours, poll(&first).1);
        apply(&mut theirs, poll(&second).1);
        (ours.len() == 2 && theirs.len() == 2 && ours.is_disjoint(&theirs)).then_some(())
    });
    let starts: Vec<_> = theirs
        .iter()
        .map(|partition| (*partition, NextOffset(2)))
        .collect();
    second.read(&starts).unwrap();
    assert_eq!(offsets(&second, 6).len(), 6);
    // The first consumer continues with the partition that it kept.
    let kept = ours.first().unwrap().number;
    produce(&broker, kept, 5..6);
    assert_eq!(offsets(&first, 1), [5]);

    second.close(PATIENCE);
    wait_for(|| {
        apply(&mut ours, poll(&first).1);
        (ours.len() == 4).then_some(())
    });
}

#[test]
fn a_consumer_without_kafka_is_closed_in_time() {
    let config = config("127.0.0.1:1".into(), None);
    let source = Source::join(&config, &[]).unwrap();
    assert!(source.poll(Duration::from_millis(200)).unwrap().is_none());
    let started = now();
    source.close(Duration::from_secs(2));
    assert!(started.elapsed() < Duration::from_secs(3));
}

#[test]
fn every_record_becomes_a_row_or_a_rejected_record_over_restarts_of_both() {
    let broker = broker(3);
    let postgres = ThrowAwayPostgres::start().unwrap();
    let config = config(broker.bootstrap_servers(), Some(&postgres));

    let mut expected_rows = BTreeSet::new();
    let mut expected_rejected = BTreeSet::new();
    let mut produced = 0;
    let mut produce_more = |count: i64| {
        let producer = producer(&broker);
        for offset in produced..produced + count {
            for partition in 0..3 {
                let (value, good): (Vec<u8>, bool) = match offset % 10 {
                    3 => (b"no JSON".to_vec(), false),
                    7 => (Vec::new(), false),
                    _ => (original(partition, offset), true),
                };
                send(&producer, partition, Some(&value).filter(|_| offset % 20 != 7));
                match good {
                    true => expected_rows.insert((partition, offset)),
                    false => expected_rejected.insert((partition, offset)),
                };
            }
        }
        producer.flush(PATIENCE).unwrap();
        produced += count;
    };

    produce_more(500);
    let agent = Agent::start(&config);
    wait_for(|| (agent.counters.rows.get() > 500).then_some(()));
    // The server crashes during a write.
    postgres.restart_immediately().unwrap();
    produce_more(300);
    wait_for(|| (agent.counters.rows.get() + agent.counters.rejected.get() == 2_400).then_some(()));
    wait_for(|| agent.counters.lags().values().all(|lag| *lag == 0).then_some(()));
    agent.stop();

    // A new process continues where the first one stopped.
    produce_more(100);
    let agent = Agent::start(&config);
    wait_for(|| (agent.counters.rows.get() + agent.counters.rejected.get() == 300).then_some(()));
    postgres.stop().unwrap();
    produce_more(50);
    wait_for(|| (agent.counters.failures.get() > 0).then_some(()));
    // A stop also succeeds without Postgres.
    agent.stop();
    postgres.start_again().unwrap();
    let agent = Agent::start(&config);
    wait_for(|| (agent.counters.rows.get() + agent.counters.rejected.get() == 150).then_some(()));
    agent.stop();

    let mut client = client(&postgres);
    let pairs = |client: &mut postgres::Client, table: &str| -> Vec<(i32, i64)> {
        let query = format!("SELECT kafka_partition, kafka_offset FROM {table}");
        let rows = client.query(&query, &[]).unwrap();
        rows.iter().map(|row| (row.get(0), row.get(1))).collect()
    };
    let rows = pairs(&mut client, "host_metrics");
    let rejected = pairs(&mut client, "host_metrics_rejected");
    assert_eq!(rows.len(), expected_rows.len(), "none twice");
    assert_eq!(rejected.len(), expected_rejected.len(), "none twice");
    assert_eq!(BTreeSet::from_iter(rows), expected_rows);
    assert_eq!(BTreeSet::from_iter(rejected), expected_rejected);

    // The fields are the record's; the missing time is Kafka's timestamp.
    let row = client
        .query_one(
            "SELECT address, latency, status_code, is_valid, scheduled_at > now() - interval '1 hour'
             FROM host_metrics WHERE kafka_partition = 1 AND kafka_offset = 42",
            &[],
        )
        .unwrap();
    assert_eq!(row.get::<_, &str>(0), "https://example.com/1/42");
    assert_eq!(row.get::<_, f64>(1), 0.042);
    assert_eq!(row.get::<_, i16>(2), 200);
    assert!(row.get::<_, bool>(3) && row.get::<_, bool>(4));
    let row = client
        .query_one(
            "SELECT value, reason FROM host_metrics_rejected WHERE kafka_partition = 2 AND kafka_offset = 7",
            &[],
        )
        .unwrap();
    assert_eq!(row.get::<_, Option<&[u8]>>(0), None, "a tombstone has no value");
    assert!(!row.get::<_, &str>(1).is_empty());
}

#[test]
fn an_outage_of_postgres_that_is_longer_than_kafkas_patience_costs_no_partition_and_no_record() {
    const PATIENT_FOR: Duration = Duration::from_secs(6);
    const IMPATIENT: &[(&str, &str)] = &[
        ("session.timeout.ms", "6000"),
        ("heartbeat.interval.ms", "500"),
        ("max.poll.interval.ms", "6000"),
    ];
    let broker = broker(2);
    let postgres = ThrowAwayPostgres::start().unwrap();
    let agent = Agent::start_with(&config(broker.bootstrap_servers(), Some(&postgres)), IMPATIENT);
    produce(&broker, 0, 0..10);
    wait_for(|| (agent.counters.rows.get() == 10).then_some(()));
    postgres.stop().unwrap();
    // Far more records than both batches hold.
    produce(&broker, 0, 10..2_000);
    produce(&broker, 1, 0..1_000);
    let stopped = now();
    wait_for(|| (stopped.elapsed() > PATIENT_FOR * 2).then_some(()));
    assert!(
        agent.counters.failures.get() > 3,
        "Postgres was asked again and again"
    );
    postgres.start_again().unwrap();
    wait_for(|| (agent.counters.rows.get() == 3_000).then_some(()));
    assert_eq!(agent.counters.revoked.get(), 0);
    agent.stop();
    let mut client = client(&postgres);
    let row = client
        .query_one(
            "SELECT count(*), count(DISTINCT (kafka_partition, kafka_offset)) FROM host_metrics",
            &[],
        )
        .unwrap();
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), (3_000, 3_000));
}

/// The `consume` agent on a thread.
struct Agent {
    shutdown: Shutdown,
    counters: Counters,
    thread: std::thread::JoinHandle<anyhow::Result<()>>,
}

impl Agent {
    fn start(config: &ConsumeConfig) -> Self {
        Self::start_with(config, PACE)
    }

    fn start_with(config: &ConsumeConfig, pace: &'static [(&str, &str)]) -> Self {
        let shutdown = Shutdown::new();
        let counters = Counters::default();
        let thread = {
            let (config, shutdown, counters) = (config.clone(), shutdown.clone(), counters.clone());
            std::thread::spawn(move || {
                let source = Source::join(&config, pace)?;
                consume::run_with(&config, source, &shutdown, &counters)
            })
        };
        Self {
            shutdown,
            counters,
            thread,
        }
    }

    /// Stops it cleanly, within the bound.
    fn stop(self) {
        let requested = now();
        self.shutdown.request();
        self.thread.join().unwrap().unwrap();
        assert!(requested.elapsed() < STOP_WITHIN);
    }
}

fn broker(partitions: i32) -> Broker {
    let broker = MockCluster::new(1).unwrap();
    broker.create_topic(TOPIC, partitions, 1).unwrap();
    broker
}

fn config(bootstrap_servers: String, postgres: Option<&ThrowAwayPostgres>) -> ConsumeConfig {
    ConsumeConfig {
        kafka: KafkaConfig {
            bootstrap_servers,
            security: KafkaSecurity {
                tls: None,
                sasl: None,
            },
        },
        topics: vec![TOPIC.to_owned()],
        group_id: "group".to_owned(),
        group_instance_id: None,
        database: DatabaseConfig {
            host: postgres.map_or(String::new(), |server| server.host().to_owned()),
            port: postgres.map_or(1, ThrowAwayPostgres::port),
            name: postgres.map_or(String::new(), |server| server.database().to_owned()),
            user: postgres.map_or(String::new(), |server| server.superuser().to_owned()),
            password: None,
            table: TableName {
                schema: None,
                name: "host_metrics".to_owned(),
            },
            ssl_mode: DbSslMode::Disable,
            ssl_root_cert: None,
        },
        batch_size: 50,
        batch_wait: Duration::from_millis(50),
        is_asynchronous: false,
        retention: None,
        state: None,
        metrics_addr: None,
    }
}

fn join(broker: &Broker) -> Source {
    Source::join(&config(broker.bootstrap_servers(), None), PACE).unwrap()
}

fn producer(broker: &Broker) -> BaseProducer {
    ClientConfig::new()
        .set("bootstrap.servers", broker.bootstrap_servers())
        .create()
        .unwrap()
}

fn send(producer: &BaseProducer, partition: i32, value: Option<&Vec<u8>>) {
    let record = BaseRecord::<(), Vec<u8>>::to(TOPIC).partition(partition);
    let record = match value {
        Some(value) => record.payload(value),
        None => record,
    };
    producer.send(record).map_err(|(error, _)| error).unwrap();
}

fn produce(broker: &Broker, partition: i32, offsets: std::ops::Range<i64>) {
    let producer = producer(broker);
    for offset in offsets {
        send(&producer, partition, Some(&original(partition, offset)));
    }
    producer.flush(PATIENCE).unwrap();
}

/// A record in the original's format.
fn original(partition: i32, offset: i64) -> Vec<u8> {
    format!(
        r#"{{"address": "https://example.com/{partition}/{offset}", "latency": 0.{offset:03}, "status_code": 200, "is_valid": true}}"#
    )
    .into_bytes()
}

/// Polls until that many partitions are assigned.
fn assigned(source: &Source, count: usize) -> BTreeSet<Partition> {
    let mut ours = BTreeSet::new();
    wait_for(|| {
        let (offset, events) = poll(source);
        assert_eq!(offset, None, "nothing is to be read yet");
        apply(&mut ours, events);
        (ours.len() == count).then(|| ours.clone())
    })
}

fn apply(ours: &mut BTreeSet<Partition>, events: Vec<Event>) {
    for event in events {
        match event {
            Event::Assigned(partitions) => ours.extend(partitions),
            Event::Revoked(partitions) => ours.retain(|partition| !partitions.contains(partition)),
            other => panic!("{other:?}"),
        }
    }
}

/// The offsets of the next records, as delivered.
fn offsets(source: &Source, count: usize) -> Vec<i64> {
    let mut offsets = Vec::new();
    wait_for(|| {
        offsets.extend(poll(source).0);
        (offsets.len() == count).then(|| offsets.clone())
    })
}

/// Verifies that no record comes, for longer than a fetch in progress takes.
fn assert_silent(source: &Source) {
    let until = now() + Duration::from_millis(500);
    while now() < until {
        assert_eq!(poll(source).0, None);
    }
}

fn poll(source: &Source) -> (Option<i64>, Vec<Event>) {
    let delivered = source.poll(Duration::from_millis(20)).unwrap();
    let offset = delivered.map(|delivered| delivered.record().offset.0);
    (offset, std::iter::from_fn(|| source.take_event()).collect())
}

fn client(server: &ThrowAwayPostgres) -> postgres::Client {
    postgres::Config::new()
        .host(server.host())
        .port(server.port())
        .user(server.superuser())
        .dbname(server.database())
        .connect(postgres::NoTls)
        .unwrap()
}

/// Tries until there is a result. Each try waits by itself.
#[track_caller]
pub fn wait_for<T>(mut attempt: impl FnMut() -> Option<T>) -> T {
    let deadline = now() + PATIENCE;
    loop {
        if let Some(result) = attempt() {
            return result;
        }
        assert!(now() < deadline, "it did not happen within {PATIENCE:?}");
        std::thread::park_timeout(Duration::from_millis(1));
    }
}

#[expect(clippy::disallowed_methods, reason = "a test's deadline")]
fn now() -> Instant {
    Instant::now()
}
