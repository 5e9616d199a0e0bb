//! Every record is stored exactly once, although consumers, Postgres and the broker are killed and frozen at random during a stream
//! of records. Seeded; short in `make test`, and SOAK_SECONDS long in `make soak`.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;
use host_metrics::clock::wall_micros;
use host_metrics::commands::demo::postgres::{Settings, ThrowAwayPostgres};
use host_metrics::sample::{Sample, Timestamp, encode};
use host_metrics::shutdown::Shutdown;
use rdkafka::ClientContext;
use rdkafka::message::{DeliveryResult, Message};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer, ProducerContext};

use crate::agent::{Agent, Variables, run};
use crate::database::Database;
use crate::kafka::Kafka;
use crate::scratch::{now, wait_for};
use crate::state::check_definitions;
use crate::table::{connect, count, try_connect};

const TOPIC: &str = "kills";
const PARTITIONS: i32 = 8;
const CONSUMERS: usize = 3;

/// A multiple of the partitions, so that the records of a host are in one partition.
const HOSTS: u64 = 40;

/// Longer than a session (15 s), so that the group gives the partitions of a frozen member to others before it wakes up.
const FROZEN_FOR: Duration = Duration::from_secs(18);

/// How long faults occur without SOAK_SECONDS.
const FAULTS_FOR: Duration = Duration::from_secs(30);

/// A killed member keeps its partitions until its session ends (15 s), and rebalances may follow.
const CATCH_UP_WITHIN: Duration = Duration::from_secs(90);

/// Our records by their place: the number of each, and whether a reader must reject it.
type Acknowledged = BTreeMap<(i32, i64), (u64, bool)>;

#[derive(Clone, Default)]
struct Reports(Arc<Mutex<Acknowledged>>);

impl ClientContext for Reports {
    // The test kills the broker, so librdkafka need not log that.
    fn log(&self, _: rdkafka::config::RDKafkaLogLevel, _: &str, _: &str) {}
    fn error(&self, _: rdkafka::error::KafkaError, _: &str) {}
}

impl ProducerContext for Reports {
    type DeliveryOpaque = Box<(u64, bool)>;

    fn delivery(&self, result: &DeliveryResult<'_>, record: Self::DeliveryOpaque) {
        let message = result.as_ref().expect("idempotent, and no time limit");
        let twice = self
            .0
            .lock()
            .unwrap()
            .insert((message.partition(), message.offset()), *record);
        assert_eq!(twice, None);
    }
}

/// Writes numbered records until it is ended. Every fiftieth is invalid. Returns all of them, after Kafka has acknowledged them.
fn stream(kafka: &Kafka, end: Arc<AtomicBool>) -> thread::JoinHandle<Acknowledged> {
    let reports = Reports::default();
    let producer: BaseProducer<Reports> = kafka
        .client()
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "0")
        .create_with_context(reports.clone())
        .unwrap();
    let began_at = wall_micros();
    thread::spawn(move || {
        for number in 0.. {
            if end.load(Ordering::Relaxed) {
                break;
            }
            let is_bad = number % 50 == 49;
            let tick = number - number / 50;
            let value = match is_bad {
                true => number.to_string().into_bytes(),
                false => value_of(number, tick, began_at),
            };
            let record: BaseRecord<'_, str, [u8], _> =
                BaseRecord::with_opaque_to(TOPIC, Box::new((number, is_bad)))
                    .partition((tick % PARTITIONS as u64) as i32)
                    .payload(&value);
            producer.send(record).map_err(|(error, _)| error).unwrap();
            // About five hundred per second.
            producer.poll(Duration::from_millis(2));
        }
        producer.flush(Duration::from_secs(60)).unwrap();
        std::mem::take(&mut *reports.0.lock().unwrap())
    })
}

/// The record of one of the hosts, each of which is checked every 50 ms and is down now and then. Its number is in `body_bytes`.
fn value_of(number: u64, tick: u64, began_at: i64) -> Vec<u8> {
    let (round, host) = (tick / HOSTS, tick % HOSTS);
    let is_valid = (round / 7 + host) % 5 != 0;
    let at = began_at + 50_000 * round as i64 + host as i64;
    let sample = Sample {
        address: format!("http://h/{host}").into(),
        is_valid,
        outcome: Some(if is_valid { "ok" } else { "bad_status" }.into()),
        error: (!is_valid).then(|| "status 500".into()),
        latency: Some(0.001 * (host + 1) as f64),
        scheduled_at: Timestamp::from_unix_micros(at),
        interval_seconds: Some(0.05),
        body_bytes: Some(number as i64),
        ..Sample::default()
    };
    let mut value = Vec::new();
    encode(&sample, &mut value);
    value
}

fn start_consumer(variables: &Variables, index: usize) -> Agent {
    // The first is a dynamic member, whose death is noticed when its session ends. The others are static and keep their identity.
    let variables = match index {
        0 => variables.clone(),
        _ => variables
            .clone()
            .with("KAFKA_GROUP_INSTANCE_ID", format!("member-{index}")),
    };
    Agent::start(&["consume"], &variables)
}

#[test]
fn every_acknowledged_record_is_stored_exactly_once_although_every_process_is_killed() {
    let seed = number("SOAK_SEED").unwrap_or_else(|| fastrand::u64(..));
    let faults_for = number("SOAK_SECONDS").map_or(FAULTS_FOR, Duration::from_secs);
    eprintln!("SOAK_SEED={seed}");
    let mut rng = Rng::with_seed(seed);

    let mut kafka = Kafka::start();
    kafka.create_topic(TOPIC, PARTITIONS);
    // Commits that do not wait stay in the server's memory for up to 30 s, so that a crash undoes them.
    let commit = if rng.bool() { "off" } else { "on" };
    let settings = Settings {
        configuration: vec![("wal_writer_delay".into(), "10s".into())],
        ..Settings::default()
    };
    let server = ThrowAwayPostgres::start_with(&settings).unwrap();
    let variables = Variables::new()
        .kafka(&kafka.bootstrap_servers(), TOPIC)
        .database(&server)
        .with("LOG_LEVEL", "INFO")
        .with("DB_BATCH_SECONDS", "0.1")
        .with("DB_SYNCHRONOUS_COMMIT", commit);
    let end_of_stream = Arc::new(AtomicBool::new(false));
    let stream = stream(&kafka, Arc::clone(&end_of_stream));
    let mut consumers: Vec<Agent> = (0..CONSUMERS)
        .map(|index| start_consumer(&variables, index))
        .collect();
    wait_for(
        CATCH_UP_WITHIN,
        "the first rows",
        || (crate::table::stored(&mut try_connect(&server).ok()?) > 0).then_some(()),
        || consumers.iter().map(Agent::stderr).collect(),
    );

    let pause = Shutdown::new();
    let until = now() + faults_for;
    let mut faults = Vec::new();
    // Each kind of fault occurs once at the beginning, then at random.
    let mut kinds: Vec<u8> = vec![0, 1, 2, 3];
    rng.shuffle(&mut kinds);
    kinds.push(4);
    let mut frozen: Option<(usize, Instant)> = None;
    while now() < until {
        pause.wait_until(now() + Duration::from_millis(rng.u64(500..3_000)));
        if let Some((index, _)) = frozen.take_if(|(_, wakes_at)| now() >= *wakes_at) {
            faults.push(format!("consumer {index} woke"));
            consumers[index].signal("CONT");
        }
        match kinds.pop().unwrap_or_else(|| rng.u8(..7)) {
            2 => {
                faults.push("Postgres crashed".to_owned());
                server.restart_immediately().unwrap();
            }
            3 => {
                faults.push("broker killed".to_owned());
                kafka.restart();
            }
            4 if frozen.is_none() => {
                let index = rng.usize(..CONSUMERS);
                faults.push(format!("consumer {index} froze"));
                consumers[index].signal("STOP");
                frozen = Some((index, now() + FROZEN_FOR));
            }
            // Mostly consumers. A 1 kills all of them at once.
            kind => {
                for (index, consumer) in consumers.iter_mut().enumerate() {
                    let is_frozen = frozen.is_some_and(|(other, _)| other == index);
                    if !is_frozen && (kind == 1 || rng.usize(..CONSUMERS) == index) {
                        faults.push(format!("consumer {index} killed"));
                        consumer.kill();
                        *consumer = start_consumer(&variables, index);
                    }
                }
            }
        }
    }
    if let Some((index, _)) = frozen {
        consumers[index].signal("CONT");
    }
    end_of_stream.store(true, Ordering::Relaxed);
    let acknowledged = stream.join().unwrap();
    let context = format!(
        "SOAK_SEED={seed}, commit {commit}, {} records, {faults:?}",
        acknowledged.len()
    );
    eprintln!("{context}");

    let mut client = connect(&server);
    wait_for(
        CATCH_UP_WITHIN,
        "everything acknowledged is stored",
        || (crate::table::stored(&mut client) >= acknowledged.len() as i64).then_some(()),
        || {
            format!(
                "{context}\n{}",
                consumers.iter().map(Agent::stderr).collect::<String>()
            )
        },
    );
    let is_folded = "SELECT count(*) FROM (SELECT sum(next_offset) FILTER (WHERE group_id LIKE '%-state') = \
                     sum(next_offset) FILTER (WHERE group_id NOT LIKE '%-state') AS is_same FROM host_metrics_offsets) p WHERE is_same";
    wait_for(
        CATCH_UP_WITHIN,
        "the state has caught up",
        || (count(&mut client, is_folded) == 1).then_some(()),
        || {
            format!(
                "{context}\n{}",
                consumers.iter().map(Agent::stderr).collect::<String>()
            )
        },
    );
    consumers.into_iter().for_each(Agent::stop);
    let mut db = Database {
        name: server.database().to_owned(),
        client,
    };
    check_definitions(&mut db);
    let rows = db
        .client
        .query(
            "SELECT kafka_partition, kafka_offset, body_bytes::text, false FROM host_metrics
             UNION ALL
             SELECT kafka_partition, kafka_offset, convert_from(value, 'UTF8'), true FROM host_metrics_rejected",
            &[],
        )
        .unwrap();
    let mut stored = Acknowledged::new();
    for row in &rows {
        let text: String = row.get(2);
        let number = text.parse().unwrap();
        let twice = stored.insert((row.get(0), row.get(1)), (number, row.get(3)));
        assert_eq!(twice, None, "stored twice: {text}; {context}");
    }
    let lost: Vec<_> = acknowledged
        .iter()
        .filter(|(place, _)| !stored.contains_key(place))
        .take(10)
        .collect();
    assert!(lost.is_empty(), "lost: {lost:?}; {context}");
    assert!(stored == acknowledged, "a row that is not its record; {context}");
    let (status, said) = run(&["audit"], &variables);
    eprintln!("{said}");
    assert_eq!(status, 0, "{said}; {context}");
}

pub fn number(variable: &str) -> Option<u64> {
    let text = std::env::var_os(variable)?;
    let number = text.to_str().and_then(|text| text.parse().ok());
    Some(number.unwrap_or_else(|| panic!("{variable}: a whole number")))
}
