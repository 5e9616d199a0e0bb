//! One scenario of `consume`: its own topic, group and database on the shared servers, numbered records, and the final
//! comparison.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use host_metrics::config::ConsumeConfig;
use host_metrics::consume::source::Source;
use host_metrics::consume::{self, Counters};
use host_metrics::shutdown::Shutdown;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};

use crate::agent::{Agent, Variables, tail};
use crate::database::{Database, server};
use crate::kafka::Kafka;
use crate::scratch::wait_for;

/// The bound for joining a group, finding positions and a few flushes, on a busy machine.
pub const SOON: Duration = Duration::from_secs(30);

pub struct Case {
    /// The name of the topic and of the group.
    pub name: &'static str,
    pub kafka: &'static Kafka,
    pub db: Database,
}

impl Case {
    pub fn new(name: &'static str, partitions: i32) -> Self {
        let kafka = Kafka::shared();
        kafka.create_topic(name, partitions);
        Self {
            name,
            kafka,
            db: Database::new(),
        }
    }

    pub fn variables(&self) -> Variables {
        Variables::new()
            .kafka(&self.kafka.bootstrap_servers(), self.name)
            .with("KAFKA_GROUP_ID", self.name)
            .database(server())
            .with("DB_NAME", &self.db.name)
            .with("DB_BATCH_SECONDS", "0.1")
            // Most scenarios are about the rows alone.
            .with("STATE", "off")
    }

    pub fn consume(&self) -> Agent {
        Agent::start(&["consume"], &self.variables())
    }

    /// Writes numbered records to the topic.
    pub fn write(&self, partition: i32, numbers: Range<i64>) {
        write(self.kafka, self.name, partition, numbers);
    }

    /// Waits until the table has that many rows.
    pub fn wait_for_rows(&mut self, rows: i64, consumers: &[&Agent]) {
        wait_for_count(&mut self.db, "host_metrics", rows, consumers);
    }

    /// Ends all our connections as an administrator does (57P01), and waits until they are gone.
    pub fn end_backends(&mut self) {
        let ours =
            "pg_stat_activity WHERE datname = current_database() AND application_name = 'host-metrics'";
        let pids = self.db.many(&format!("SELECT pid::text FROM {ours}")).join(",");
        assert_ne!(pids, "", "nobody is connected");
        self.db
            .execute(&format!("SELECT pg_terminate_backend(pid) FROM {ours}"));
        let db = &mut self.db;
        wait_for(
            SOON,
            "the backends are gone",
            || (db.count(&format!("{ours} AND pid IN ({pids})")) == 0).then_some(()),
            || pids.clone(),
        );
    }

    /// Verifies that every record of these topics is in the table or in the rejected table exactly once, that nothing else is, and
    /// that the positions are after the last records.
    pub fn assert_exactly_once(&mut self, topics: &[&str]) {
        for topic in topics {
            let records = self.kafka.records(topic);
            let sent: Vec<String> = records
                .iter()
                .map(|record| format!("{}/{}", record.partition, record.offset))
                .collect();
            let stored = self.db.many(&format!(
                "SELECT concat(kafka_partition, '/', kafka_offset) FROM ( \
                 SELECT kafka_partition, kafka_offset FROM host_metrics WHERE kafka_topic = '{topic}' UNION ALL \
                 SELECT kafka_partition, kafka_offset FROM host_metrics_rejected WHERE kafka_topic = '{topic}') s \
                 ORDER BY kafka_partition, kafka_offset"
            ));
            assert_eq!(stored, sent, "{topic}");
            let last = self.db.many(&format!(
                "SELECT concat(\"partition\", '/', next_offset - 1) FROM host_metrics_offsets \
                 WHERE topic = '{topic}' AND next_offset > 0 ORDER BY 1"
            ));
            // Sorted by offset, so that the last one of each partition remains.
            let ends: BTreeMap<i32, i64> = records
                .iter()
                .map(|record| (record.partition, record.offset))
                .collect();
            let mut ends: Vec<String> = ends
                .iter()
                .map(|(partition, offset)| format!("{partition}/{offset}"))
                .collect();
            ends.sort();
            assert_eq!(last, ends, "{topic}: positions");
        }
    }
}

/// `consume` on a thread of this process, for tests that need shorter timeouts of Kafka's client than in production.
pub struct InProcess {
    pub counters: Counters,
    shutdown: Shutdown,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
}

impl InProcess {
    /// `overrides` are properties of librdkafka.
    pub fn start(settings: ConsumeConfig, overrides: &[(&str, &str)]) -> Self {
        let source = Source::join(&settings, overrides).unwrap();
        let (counters, shutdown) = (Counters::default(), Shutdown::new());
        let thread = thread::spawn({
            let (counters, shutdown) = (counters.clone(), shutdown.clone());
            move || consume::run_with(&settings, source, &shutdown, &counters)
        });
        Self {
            counters,
            shutdown,
            thread: Some(thread),
        }
    }

    pub fn stop(mut self) {
        self.shutdown.request();
        self.thread.take().expect("it runs").join().unwrap().unwrap();
    }
}

impl Drop for InProcess {
    fn drop(&mut self) {
        self.shutdown.request();
    }
}

/// Writes numbered records to all partitions in turn, some hundreds per second, until it is ended or dropped.
pub struct Stream {
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<i64>>,
}

impl Stream {
    pub fn start(kafka: &Kafka, topic: &'static str, partitions: i32) -> Self {
        let producer: BaseProducer = kafka.client().set("enable.idempotence", "true").create().unwrap();
        let end = Arc::new(AtomicBool::new(false));
        let is_ended = Arc::clone(&end);
        let thread = thread::spawn(move || {
            let mut number = 0;
            while !is_ended.load(Ordering::Relaxed) {
                let value = value(number);
                let record: BaseRecord<'_, [u8], [u8]> = BaseRecord::to(topic)
                    .partition((number % i64::from(partitions)) as i32)
                    .payload(&value);
                producer.send(record).map_err(|(error, _)| error).unwrap();
                number += 1;
                producer.poll(Duration::from_millis(2));
            }
            producer.flush(Duration::from_secs(60)).unwrap();
            number
        });
        Self {
            end,
            thread: Some(thread),
        }
    }

    /// Ends it. Returns the number of records, all of which Kafka has acknowledged.
    pub fn end(mut self) -> i64 {
        self.end.store(true, Ordering::Relaxed);
        self.thread.take().expect("it runs").join().unwrap()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
    }
}

/// The numbered record in the original's format.
pub fn value(number: i64) -> Vec<u8> {
    format!(r#"{{"address":"http://h/{number}","latency":0.5,"status_code":200,"is_valid":true}}"#)
        .into_bytes()
}

pub fn write(kafka: &Kafka, topic: &str, partition: i32, numbers: Range<i64>) {
    kafka.write(
        topic,
        numbers.map(|number| (partition, None, Some(value(number)))),
    );
}

/// Waits until a table has that many rows, and fails immediately if it has more. A missing table has no rows.
pub fn wait_for_count(db: &mut Database, table: &str, rows: i64, consumers: &[&Agent]) {
    wait_for_count_within(SOON, db, table, rows, consumers);
}

/// Like [`wait_for_count`], with a longer bound.
pub fn wait_for_count_within(
    within: Duration,
    db: &mut Database,
    table: &str,
    rows: i64,
    consumers: &[&Agent],
) {
    let mut last = 0;
    let found = wait_for(
        within,
        &format!("{rows} rows in {table}"),
        || {
            last = match db.exists(table) {
                true => db.count(table),
                false => 0,
            };
            (last >= rows).then_some(last)
        },
        || {
            consumers
                .iter()
                .map(|consumer| tail(&consumer.stderr()))
                .collect()
        },
    );
    assert_eq!(found, rows, "{table}");
}
