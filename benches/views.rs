//! The cost of the state per record, its size, and the time that the views take.
//!
//! `make bench-views [ARGS="HOSTS TICKS INTERVAL_SECONDS rows"]`. The stores of the pipelines write TICKS checks of each host,
//! the newest one now, in batches of the usual size: the state, and with `rows` also the rows. Postgres has its default settings.
//! Each view is read on a new connection, as a dashboard does; `status` asks a broker in this process for the lag. The result is the
//! median of five, without the first one. Linux only: CPU times are from /proc.

#![expect(clippy::print_stdout, reason = "a benchmark's result is its output")]

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use host_metrics::commands::demo::postgres::{Settings, ThrowAwayPostgres};
use host_metrics::commands::status;
use host_metrics::config::{self, StateConfig, Variables};
use host_metrics::consume::Counters;
use host_metrics::consume::batch::{Batch, Flushed, NextOffset, Offset, Partition, Record};
use host_metrics::consume::rows::RowsSink;
use host_metrics::consume::sink::Sink;
use host_metrics::consume::state::{self, StateSink};
use host_metrics::consume::store::Store;
use host_metrics::sample::epoch::Epochs;
use host_metrics::sample::{Sample, Timestamp, encode};
use host_metrics::tables::windows;
use postgres::{Client, NoTls};
use rdkafka::mocking::MockCluster;

use crate::median::median;
use crate::scratch::now;

mod median;
#[allow(dead_code, reason = "the end-to-end tests may need more of it")]
#[path = "../tests/e2e/scratch.rs"]
mod scratch;

const VIEWS: [&str; 5] = ["uptime", "latency", "latest", "certificates", "incidents"];
const ROUNDS: usize = 5;
const PARTITION: Partition = Partition::new("host-metrics", 0);

fn main() {
    // cargo passes `--bench`.
    let mut numbers = std::env::args().skip(1).filter_map(|word| word.parse().ok());
    let load = Load {
        hosts: numbers.next().unwrap_or(1_000),
        ticks: numbers.next().unwrap_or(1_440),
        interval: numbers.next().unwrap_or(60),
        ends_at: wall_clock(),
    };
    let with_rows = std::env::args().any(|word| word == "rows");

    let server = ThrowAwayPostgres::start_with(&Settings {
        fsync: true,
        // Postgres's default. The demo's cluster uses less.
        configuration: vec![("shared_buffers".into(), "128MB".into())],
        ..Settings::default()
    })
    .expect("Postgres starts");
    let mut client = connect(&server);
    write_state(&load, &server, &mut client);
    if with_rows {
        write_rows(&load, &server);
    }
    for sql in ["VACUUM ANALYZE", "CHECKPOINT"] {
        client.batch_execute(sql).expect("the tables are cleaned up");
    }
    report_sizes(&mut client);
    for view in VIEWS {
        let sql = format!("SELECT * FROM host_metrics_{view}");
        report(view, || {
            connect(&server).simple_query(&sql).expect("a view answers");
        });
    }
    let kafka = MockCluster::new(1).expect("a broker");
    kafka.create_topic("host-metrics", 1, 1).expect("a topic");
    let settings = config::status(&variables(&server, &kafka.bootstrap_servers())).expect("these are right");
    report("status", || {
        status::run(&settings).expect("the state answers");
    });
}

/// The records that are written.
struct Load {
    hosts: i64,
    ticks: i64,
    interval: i64,
    ends_at: i64,
}

impl Load {
    fn records(&self) -> i64 {
        self.hosts * self.ticks
    }

    fn batches(&self, size: usize) -> impl Iterator<Item = (i64, impl Iterator<Item = Sample<'static>>)> {
        (0..self.records()).step_by(size).map(move |base| {
            let end = self.records().min(base + size as i64);
            let samples = (base..end).map(|number| {
                let (tick, host) = (number / self.hosts, number % self.hosts);
                let ago = (self.ticks - tick) * self.interval * 1_000_000
                    - host * self.interval * 1_000_000 / self.hosts;
                sample(host, tick, self.ends_at - ago, self.interval)
            });
            (base, samples)
        })
    }
}

/// Where no Kafka is.
const NOWHERE: &str = "127.0.0.1:1";

fn variables(server: &ThrowAwayPostgres, kafka: &str) -> Variables {
    let port = server.port().to_string();
    Variables::from_pairs([
        ("KAFKA_BOOTSTRAP_SERVERS", kafka),
        ("DB_HOST", server.host()),
        ("DB_PORT", &port),
        ("DB_NAME", server.database()),
        ("DB_USER", server.superuser()),
    ])
}

fn write_state(load: &Load, server: &ThrowAwayPostgres, client: &mut Client) {
    let settings = state::config_of(&config::consume(&variables(server, NOWHERE)).expect("these are right"));
    let sink = StateSink::new(StateConfig::default(), Counters::default());
    let mut store = Store::of(sink, &settings, Default::default()).expect("a store");
    store.open().expect("the tables are made");
    let start = BTreeMap::from([(PARTITION, NextOffset(0))]);
    store.positions(&[PARTITION], &start).expect("a position is made");
    let backend: i32 = client
        .query_one(
            "SELECT pid FROM pg_stat_activity WHERE application_name = 'host-metrics'",
            &[],
        )
        .expect("the store is connected")
        .get(0);
    let backend = backend.to_string();
    let (mut ours, mut theirs, mut seconds) = (0.0, 0.0, 0.0);
    for (base, samples) in load.batches(settings.batch_size) {
        let batch = batch(base, samples, |record, into| {
            StateSink::encode(&(), record, &mut Epochs::default(), into)
        });
        let (cpu, of_backend, since) = (cpu_seconds("self"), cpu_seconds(&backend), now());
        assert_eq!(store.flush(&batch).unwrap(), Flushed::Durable);
        seconds += since.elapsed().as_secs_f64();
        ours += cpu_seconds("self") - cpu;
        theirs += cpu_seconds(&backend) - of_backend;
    }
    let per_record = |seconds: f64| seconds * 1e6 / load.records() as f64;
    println!(
        "{} records of {} hosts: {:.0}/s, CPU µs a record: {:.2} ours, {:.2} Postgres",
        load.records(),
        load.hosts,
        load.records() as f64 / seconds,
        per_record(ours),
        per_record(theirs)
    );
    client.batch_execute("ANALYZE").expect("statistics are gathered");
    for (window, (name, _)) in windows::WINDOWS.iter().enumerate() {
        let sql = windows::refresh(&settings.database.table, window);
        report(&format!("refresh {name}"), || {
            client
                .batch_execute(&format!("BEGIN; SET LOCAL jit = off; {sql} COMMIT"))
                .expect("a window is refreshed");
        });
    }
}

fn write_rows(load: &Load, server: &ThrowAwayPostgres) {
    let settings = config::consume(&variables(server, NOWHERE)).expect("these are right");
    let mut store = Store::new(&settings).expect("a store");
    let layout = store.open().expect("the tables are made");
    let start = BTreeMap::from([(PARTITION, NextOffset(0))]);
    store.positions(&[PARTITION], &start).expect("a position is made");
    for (base, samples) in load.batches(50_000) {
        let batch = batch(base, samples, |record, into| {
            RowsSink::encode(&layout, record, &mut Epochs::default(), into)
        });
        assert_eq!(store.flush(&batch).unwrap(), Flushed::Durable);
    }
}

fn report_sizes(client: &mut Client) {
    let sql = "SELECT c.relname::text, c.reltuples::bigint, pg_table_size(c.oid), pg_indexes_size(c.oid) FROM pg_class c \
               WHERE relname LIKE 'host\\_metrics%' AND relkind = 'r' AND c.reltuples > 0 ORDER BY 1";
    for row in client.query(sql, &[]).expect("the catalogue answers") {
        let (name, rows, heap, index): (String, i64, i64, i64) =
            (row.get(0), row.get(1), row.get(2), row.get(3));
        println!(
            "{name:<28} {rows:>9} rows, {:>4} + {:>3} bytes a row",
            heap / rows,
            index / rows
        );
    }
}

fn report(what: &str, mut ask: impl FnMut()) {
    let mut seconds = Vec::new();
    for _ in 0..=ROUNDS {
        let began = now();
        ask();
        seconds.push(began.elapsed().as_secs_f64());
    }
    println!("{what:<14} {:>7.0} ms", median(seconds.into_iter().skip(1)) * 1e3);
}

/// One check in fifty fails, some in outages and some alone.
fn sample(host: i64, tick: i64, at: i64, interval: i64) -> Sample<'static> {
    let mut random = fastrand::Rng::with_seed((host * 1_000_003 + tick) as u64);
    let mut seconds = |most: f64| Some((random.f64() * most * 1e6).round() / 1e6);
    let is_up = (tick + host * 37) % 2_500 >= 40 && seconds(1.0) > Some(0.005);
    Sample {
        address: format!("https://host-{host:05}.example.com/some/path").into(),
        is_valid: is_up,
        outcome: Some(if is_up { "ok" } else { "response_timeout" }.into()),
        error: (!is_up).then(|| "no answer within 10 s".into()),
        status_code: is_up.then_some(200),
        // Half of the latencies are within a quarter of the median, a few are far above.
        latency: is_up
            .then(|| 0.05 + 0.02 * seconds(1.0).unwrap_or(0.0).powi(8) * 10.0 + seconds(0.03).unwrap_or(0.0)),
        scheduled_at: Timestamp::from_unix_micros(at),
        started_at: Timestamp::from_unix_micros(at + 100),
        interval_seconds: Some(interval as f64),
        dns_seconds: seconds(0.002),
        connect_seconds: seconds(0.02),
        tls_seconds: seconds(0.03),
        ttfb_seconds: seconds(0.05),
        cert_expires_at: Timestamp::from_unix_micros(at + 5_184_000_000_000),
        agent: Some("fra-1".into()),
        ..Sample::default()
    }
}

fn batch(
    base: i64,
    samples: impl Iterator<Item = Sample<'static>>,
    encode_as: impl Fn(&Record<'_>, &mut Vec<u8>) -> Result<(), String>,
) -> Batch {
    let mut batch = Batch::default();
    let mut value = Vec::new();
    for (offset, sample) in (base..).zip(samples) {
        value.clear();
        encode(&sample, &mut value);
        let record = Record {
            partition: PARTITION,
            offset: Offset(offset),
            timestamp: None,
            key: None,
            value: None,
        };
        batch.push(NextOffset(base), record, |into| {
            let record = Record {
                value: Some(&value),
                ..record
            };
            encode_as(&record, into)
        });
    }
    batch
}

/// The user and system time of a process.
fn cpu_seconds(process: &str) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{process}/stat")).expect("the process is there");
    // utime and stime are fields 14 and 15, in hundredths of a second. They are counted from the end of the name, which may
    // contain spaces and parentheses.
    let fields = text.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks = fields.split_whitespace().skip(11).take(2);
    ticks.filter_map(|field| field.parse::<f64>().ok()).sum::<f64>() / 100.0
}

fn connect(server: &ThrowAwayPostgres) -> Client {
    let text = format!(
        "host={} port={} user={} dbname={}",
        server.host(),
        server.port(),
        server.superuser(),
        server.database()
    );
    Client::connect(&text, NoTls).expect("a connection")
}

#[expect(clippy::disallowed_methods, reason = "the newest check is of now")]
fn wall_clock() -> i64 {
    let since_epoch = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or(Duration::ZERO);
    i64::try_from(since_epoch.as_micros()).expect("the clock is set to our days")
}
