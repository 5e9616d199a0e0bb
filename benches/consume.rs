//! How fast `consume` drains a backlog, compared with `psql \copy` of the same rows into the same table.
//!
//! `make bench-consume [ARGS="ROUNDS [DB_BATCH_SIZE ...] [slow-disk]"]`. With `slow-disk`, Postgres waits for a millisecond before
//! it flushes its log, as a slower disk would make it do. The benchmark starts a real Kafka and a real Postgres (fsync
//! on), and runs the program as a child process. Every round measures each DB_BATCH_SIZE and both formats of `\copy`, each
//! into a new table made by `init`. A ratio compares two numbers of the same round; the median of the rounds is printed.
//! Rows count when they are durable. Linux only, because CPU times and memory are read from /proc.

#![expect(clippy::print_stdout, reason = "a benchmark's result is its output")]

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use host_metrics::commands::demo::postgres::{Settings, ThrowAwayPostgres};
use host_metrics::sample::{Sample, Timestamp, encode};
use host_metrics::tables::names::TableName;
use host_metrics::tables::schema::{self, Day};
use postgres::{Client, NoTls};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};

use crate::kafka::Kafka;
use crate::median::median;
use crate::scratch::{Process, now, wait_for};

#[allow(dead_code, reason = "the end-to-end tests may need more of it")]
#[path = "../tests/e2e/kafka.rs"]
mod kafka;
mod median;
#[allow(dead_code, reason = "the end-to-end tests may need more of it")]
#[path = "../tests/e2e/scratch.rs"]
mod scratch;

/// DB_BATCH_SIZE, and the number of records, enough for some seconds.
const CASES: [(usize, u32); 5] = [
    (1, 5_000),
    (10, 50_000),
    (100, 500_000),
    (1_000, 500_000),
    (10_000, 5_000_000),
];

/// What is measured with each DB_BATCH_SIZE.
const VARIANTS: [Variant; 3] = [
    Variant::new("", "off", "on"),
    Variant::new(" + state", "on", "on"),
    Variant::new(" async", "off", "off"),
];

/// The state's pipeline alone, after the rows are drained. Its batches do not depend on DB_BATCH_SIZE.
const STATE_ALONE: Variant = Variant {
    is_after_rows: true,
    ..Variant::new("state alone", "on", "on")
};

#[derive(Clone, Copy)]
struct Variant {
    name: &'static str,
    /// STATE
    state: &'static str,
    /// DB_SYNCHRONOUS_COMMIT
    commit: &'static str,
    is_after_rows: bool,
}

impl Variant {
    const fn new(name: &'static str, state: &'static str, commit: &'static str) -> Self {
        Self {
            name,
            state,
            commit,
            is_after_rows: false,
        }
    }
}

/// The case whose rows `\copy` writes too.
const COPIED: (usize, u32) = CASES[CASES.len() - 1];

const PARTITIONS: i32 = 4;
const HOSTS: u32 = 2_000;
const INTERVAL_SECONDS: u32 = 60;

/// A case that takes longer than this fails.
const PATIENCE: Duration = Duration::from_secs(300);

fn main() {
    // cargo passes `--bench`.
    let mut numbers = std::env::args().skip(1).filter_map(|word| word.parse().ok());
    let rounds = numbers.next().unwrap_or(5);
    let only: Vec<usize> = numbers.collect();
    let mut cases = CASES.to_vec();
    cases.retain(|(batch_size, _)| only.is_empty() || only.contains(batch_size));

    let bench = Bench::start(std::env::args().any(|word| word == "slow-disk"));
    for records in BTreeSet::from_iter(cases.iter().chain([&COPIED]).map(|(_, records)| *records)) {
        bench.fill(records);
    }
    // This also warms up the servers.
    let files = bench.files_of(COPIED);

    let mut copies = [Vec::new(), Vec::new()];
    let mut drains = vec![[const { Vec::new() }; VARIANTS.len()]; cases.len()];
    let mut state_alone = Vec::new();
    for round in 1..=rounds {
        eprintln!("round {round} of {rounds}");
        for (copies, file) in copies.iter_mut().zip(&files) {
            copies.push(bench.copy(file));
        }
        for (drains, case) in drains.iter_mut().zip(&cases) {
            for (drains, variant) in drains.iter_mut().zip(VARIANTS) {
                drains.push(bench.drain(*case, variant, |_| ()));
            }
        }
        state_alone.push(bench.drain(COPIED, STATE_ALONE, |_| ()));
    }

    println!(
        "               rows/s  x \\copy text  x \\copy binary  CPU µs/row  Postgres CPU µs/row  peak MB"
    );
    let [text, binary] = &copies;
    report("\\copy text", text, text, binary);
    report("\\copy binary", binary, text, binary);
    for (drains, (batch_size, _)) in drains.iter().zip(&cases) {
        for (drains, variant) in drains.iter().zip(VARIANTS) {
            report(&format!("{batch_size}{}", variant.name), drains, text, binary);
        }
    }
    report(STATE_ALONE.name, &state_alone, text, binary);
}

/// The result of one way to write the rows.
#[derive(Clone, Copy)]
struct Measured {
    rows_per_second: f64,
    backend_micros_per_row: f64,
    /// Of our process, including its start; not measured for psql.
    ours: Option<Ours>,
}

#[derive(Clone, Copy)]
struct Ours {
    micros_per_row: f64,
    peak_mib: f64,
}

fn report(what: &str, measured: &[Measured], text: &[Measured], binary: &[Measured]) {
    let of = |value: &dyn Fn(&Measured) -> f64| median(measured.iter().map(value));
    let ratio = |to: &[Measured]| {
        let ratios = measured.iter().zip(to);
        median(ratios.map(|(measured, to)| measured.rows_per_second / to.rows_per_second))
    };
    let ours = |value: fn(Ours) -> f64| match measured.iter().all(|measured| measured.ours.is_some()) {
        true => format!("{:.2}", median(measured.iter().flat_map(|m| m.ours).map(value))),
        false => "-".to_owned(),
    };
    println!(
        "{what:<12} {:>8.0} {:>14.2} {:>15.2} {:>11} {:>20.2} {:>8}",
        of(&|measured| measured.rows_per_second),
        ratio(text),
        ratio(binary),
        ours(|ours| ours.micros_per_row),
        of(&|measured| measured.backend_micros_per_row),
        ours(|ours| ours.peak_mib),
    );
}

struct Bench {
    kafka: Kafka,
    server: ThrowAwayPostgres,
    started_at: Timestamp,
}

impl Bench {
    fn start(is_disk_slow: bool) -> Self {
        // Postgres's default. The demo's cluster uses less.
        let mut configuration = vec![("shared_buffers".into(), "128MB".into())];
        if is_disk_slow {
            configuration.extend([
                ("commit_delay".into(), "1000".into()),
                ("commit_siblings".into(), "0".into()),
            ]);
        }
        let settings = Settings {
            fsync: true,
            configuration,
            ..Settings::default()
        };
        Self {
            kafka: Kafka::start(),
            server: ThrowAwayPostgres::start_with(&settings).unwrap(),
            started_at: wall_clock(),
        }
    }

    /// Writes that many records to a new topic, as `produce` does.
    fn fill(&self, records: u32) {
        let topic = topic(records);
        self.kafka.create_topic(&topic, PARTITIONS);
        let producer: BaseProducer = self
            .kafka
            .client()
            .set("acks", "all")
            .set("compression.type", "lz4")
            .set("linger.ms", "20")
            .create()
            .unwrap();
        let mut value = Vec::new();
        for number in 0..records {
            let sample = self.sample(number, records);
            value.clear();
            encode(&sample, &mut value);
            let mut record = BaseRecord::to(&topic)
                .partition((number % HOSTS) as i32 % PARTITIONS)
                .key(&*sample.address)
                .payload(&value);
            while let Err((_, again)) = producer.send(record) {
                producer.poll(Duration::from_millis(10));
                record = again;
            }
        }
        producer.flush(Duration::from_secs(60)).unwrap();
        assert_eq!(producer.in_flight_count(), 0);
    }

    /// Samples of all hosts in turn, ending now: eight in ten over TLS, one in twenty down.
    fn sample(&self, number: u32, records: u32) -> Sample<'static> {
        let (host, tick) = (number % HOSTS, number / HOSTS);
        let back_micros =
            i64::from(INTERVAL_SECONDS) * 1_000_000 * i64::from(records / HOSTS - tick.min(records / HOSTS))
                - i64::from(host) * 30_000;
        let at = |micros: i64| Timestamp::from_unix_micros(self.started_at.unix_micros() + micros);
        let mut random = fastrand::Rng::with_seed(number.into());
        let mut seconds = |most: f64| Some((random.f64() * most * 1e6).round() / 1e6);
        let is_tls = host % 5 != 0;
        let is_up = (host + tick) % 20 != 0;
        let scheme = if is_tls { "https" } else { "http" };
        let sample = Sample {
            address: format!("{scheme}://host-{host:05}.example.com/health").into(),
            is_valid: is_up,
            scheduled_at: at(-back_micros),
            started_at: at(113 - back_micros),
            interval_seconds: Some(INTERVAL_SECONDS.into()),
            dns_seconds: seconds(0.01),
            agent: Some("fra-1".into()),
            ..Sample::default()
        };
        if !is_up {
            return Sample {
                outcome: Some("connect_timeout".into()),
                error: Some("no connection within 10 s: 203.0.113.7:443 does not answer".into()),
                ip: Some([203, 0, 113, 7].into()),
                ..sample
            };
        }
        Sample {
            latency: seconds(0.4),
            status_code: Some(200),
            outcome: Some("ok".into()),
            regex_matched: Some(true),
            connect_seconds: seconds(0.05),
            tls_seconds: is_tls.then(|| seconds(0.1)).flatten(),
            ttfb_seconds: seconds(0.2),
            body_seconds: seconds(0.01),
            ip: Some([203, 0, 113, (host % 250) as u8].into()),
            redirects: Some(0),
            body_bytes: Some(i64::from(host) * 37 % 50_000),
            cert_expires_at: is_tls.then(|| at(i64::from(host) * 3_600_000_000)).flatten(),
            ..sample
        }
    }

    /// The rows of a drained topic, in the two formats of `\copy`.
    fn files_of(&self, case: (usize, u32)) -> [PathBuf; 2] {
        let directory = scratch::directory("rows");
        let files = ["text", "binary"].map(|format| directory.join(format));
        self.drain(case, VARIANTS[0], |schema| {
            for file in &files {
                self.psql(&[&format!(
                    "\\copy (SELECT * FROM {schema}.host_metrics ORDER BY tableoid, ctid) TO '{}' ({})",
                    file.display(),
                    format_of(file)
                )]);
            }
        });
        files
    }

    /// Lets the program drain the topic into a new table.
    fn drain(&self, case: (usize, u32), variant: Variant, look: impl FnOnce(&str)) -> Measured {
        let schema = "drained";
        let mut client = self.new_tables(schema);
        let group = format!("bench-{}", fastrand::u64(..));
        if variant.is_after_rows {
            self.run(&mut client, schema, &group, case, VARIANTS[0]);
        }
        let measured = self.run(&mut client, schema, &group, case, variant);
        let stored: i64 = client
            .query_one(&format!("SELECT count(*) FROM {schema}.host_metrics"), &[])
            .unwrap()
            .get(0);
        assert_eq!(stored, i64::from(case.1), "rows of {} records", case.1);
        look(schema);
        measured
    }

    /// Runs the program until the rows are durable, or until the state is, if the rows were before. The CPU time is that of the
    /// whole process.
    fn run(
        &self,
        client: &mut Client,
        schema: &str,
        group: &str,
        (batch_size, records): (usize, u32),
        variant: Variant,
    ) -> Measured {
        let directory = scratch::directory("consume");
        let log = directory.join("log");
        let mut command = Command::new(env!("CARGO_BIN_EXE_host-metrics"));
        command
            .arg("consume")
            .env_clear()
            .env("KAFKA_BOOTSTRAP_SERVERS", self.kafka.bootstrap_servers())
            .env("KAFKA_TOPIC", topic(records))
            .env("KAFKA_GROUP_ID", group)
            .env("DB_HOST", self.server.host())
            .env("DB_PORT", self.server.port().to_string())
            .env("DB_USER", self.server.superuser())
            .env("DB_NAME", self.server.database())
            .env("DB_TABLE", format!("{schema}.host_metrics"))
            .env("DB_BATCH_SIZE", batch_size.to_string())
            .env("STATE", variant.state)
            .env("DB_SYNCHRONOUS_COMMIT", variant.commit)
            .current_dir(directory)
            .stdin(Stdio::null())
            .stderr(File::create(&log).unwrap());
        let mut agent = Process::start(&mut command);

        let pipeline = if variant.is_after_rows { "-state" } else { "" };
        let durable = client
            .prepare(&format!(
                "SELECT coalesce(sum(next_offset), 0)::bigint FROM {schema}.host_metrics_offsets \
                 WHERE group_id = '{group}{pipeline}'"
            ))
            .unwrap();
        let mut wait_until_durable = |least: i64| {
            wait_for(
                PATIENCE,
                &format!("{least} rows are durable"),
                || {
                    let rows: i64 = client.query_one(&durable, &[]).unwrap().get(0);
                    (rows >= least).then(|| (rows, now()))
                },
                || scratch::text(&log),
            )
        };
        let (first_rows, first_at) = wait_until_durable(1);
        let (rows, last_at) = wait_until_durable(records.into());
        let process = format!("/proc/{}", agent.id());
        let ours = Ours {
            micros_per_row: cpu_micros(&read(&format!("{process}/stat"))) / f64::from(records),
            peak_mib: peak_mib(&read(&format!("{process}/status"))),
        };
        let backends = client
            .query(
                "SELECT pid FROM pg_stat_activity WHERE application_name = 'host-metrics'",
                &[],
            )
            .unwrap();
        let backends = backends.iter().map(|row| row.get::<_, i32>(0));
        let backend_micros: f64 = backends
            .map(|backend| cpu_micros(&read(&format!("/proc/{backend}/stat"))))
            .sum();
        let measured = Measured {
            rows_per_second: (rows - first_rows) as f64 / (last_at - first_at).as_secs_f64(),
            backend_micros_per_row: backend_micros / f64::from(records),
            ours: Some(ours),
        };
        agent.signal("TERM");
        let ended = wait_for(PATIENCE, "it stops", || agent.exited(), || scratch::text(&log));
        assert!(ended.success(), "{}", scratch::text(&log));
        measured
    }

    fn copy(&self, file: &Path) -> Measured {
        let schema = "copied";
        let mut client = self.new_tables(schema);
        // The backend reads its own CPU time, because the backend that answers is the one that copied.
        const COSTS: &str = "SELECT pg_read_file('/proc/self/stat')";
        let copy = format!(
            "\\copy {schema}.host_metrics FROM '{}' ({})",
            file.display(),
            format_of(file)
        );
        let output = self.psql(&[COSTS, "\\timing on", &copy, "\\timing off", COSTS]);
        let stats: Vec<f64> = output
            .lines()
            .filter(|line| line.contains(" (postgres) "))
            .map(cpu_micros)
            .collect();
        let milliseconds: f64 = output
            .lines()
            .find_map(|line| line.strip_prefix("Time: ")?.split(' ').next()?.parse().ok())
            .expect("psql says how long it took");
        let rows: i64 = client
            .query_one(&format!("SELECT count(*) FROM {schema}.host_metrics"), &[])
            .unwrap()
            .get(0);
        assert_eq!(rows, i64::from(COPIED.1));
        Measured {
            rows_per_second: rows as f64 / milliseconds * 1e3,
            backend_micros_per_row: (stats[1] - stats[0]) / rows as f64,
            ours: None,
        }
    }

    /// New, empty tables made by `init`. All earlier writes are on disk.
    fn new_tables(&self, schema: &str) -> Client {
        let mut client = postgres::Config::new()
            .host(self.server.host())
            .port(self.server.port())
            .user(self.server.superuser())
            .dbname(self.server.database())
            .connect(NoTls)
            .unwrap();
        let table = TableName::parse(&format!("{schema}.host_metrics")).expect("a good name");
        let make = schema::script(&table, Day::of(self.started_at));
        client
            .batch_execute(&format!(
                "SET client_min_messages = warning;
                 DROP SCHEMA IF EXISTS drained CASCADE;
                 DROP SCHEMA IF EXISTS copied CASCADE;
                 CREATE SCHEMA {schema};
                 {make}"
            ))
            .unwrap();
        client.batch_execute("CHECKPOINT").unwrap();
        client
    }

    fn psql(&self, commands: &[&str]) -> String {
        let mut psql = Command::new(self.server.program("psql"));
        psql.args(["-XAtq", "-v", "ON_ERROR_STOP=1"])
            .args(["-h", self.server.host(), "-p", &self.server.port().to_string()])
            .args(["-U", self.server.superuser(), "-d", self.server.database()])
            .args(commands.iter().flat_map(|command| ["-c", command]));
        let output = psql.output().unwrap();
        assert!(
            output.status.success(),
            "{psql:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    }
}

fn topic(records: u32) -> String {
    format!("records-{records}")
}

/// The files are named after their formats.
fn format_of(file: &Path) -> String {
    format!("FORMAT {}", file.file_name().unwrap_or_default().display())
}

/// The user and system time of all threads, from /proc/PID/stat (proc(5): fields 14 and 15, in ticks).
fn cpu_micros(stat: &str) -> f64 {
    // USER_HZ is 100 on Linux, whatever HZ the kernel uses.
    const MICROS_PER_TICK: f64 = 10_000.0;
    let (_, after_name) = stat.rsplit_once(')').expect("a name in parentheses");
    let mut fields = after_name.split_whitespace();
    let mut field = |skipped| -> f64 { fields.nth(skipped).unwrap().parse().unwrap() };
    (field(11) + field(0)) * MICROS_PER_TICK
}

/// The largest resident size, from /proc/PID/status.
fn peak_mib(status: &str) -> f64 {
    let kib = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib: f64 = kib.unwrap().trim().trim_end_matches(" kB").parse().unwrap();
    kib / 1_024.0
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

#[expect(
    clippy::disallowed_methods,
    reason = "the rows are of today, for which there are partitions"
)]
fn wall_clock() -> Timestamp {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    Timestamp::from_unix_micros(since_epoch.as_micros() as i64).expect("this century")
}
