//! How long the views take on ten million rows, beside one plain pass over them: with and without sums of finished days.
//!
//! `make bench-views [ARGS="ROUNDS [HOSTS]"]`. A week of a check a minute, the newest now, in a Postgres that is started here
//! with the settings that it comes with; each host fails one check in a hundred, in outages and alone. The plain pass counts
//! the rows of each host: what no view can do in less without sums. What is printed is the median of the rounds, in seconds
//! until the last row is here, the first round (cold) left out.

#![expect(clippy::print_stdout, reason = "a benchmark's result is its output")]

use host_metrics::commands::demo::postgres::{Settings, ThrowAwayPostgres};
use host_metrics::config::{DatabaseConfig, DbSslMode};
use host_metrics::tables::names::TableName;
use host_metrics::tables::sums::Within;
use host_metrics::tables::{days, schema, sums};
use postgres::{Client, NoTls};

use crate::median::median;
use crate::scratch::now;

mod median;
#[allow(dead_code, reason = "the end-to-end tests may need more of it")]
#[path = "../tests/e2e/scratch.rs"]
mod scratch;

const VIEWS: [&str; 4] = ["latest", "uptime", "incidents", "certificates"];

const MINUTES: u32 = 7 * 24 * 60;

fn main() {
    // cargo itself passes `--bench`.
    let mut numbers = std::env::args().skip(1).filter_map(|word| word.parse().ok());
    let rounds: u32 = numbers.next().unwrap_or(5);
    let hosts: u32 = numbers.next().unwrap_or(1_000);

    let settings = Settings {
        // Debian's default, where the throw-away server takes less.
        configuration: vec![("shared_buffers".into(), "128MB".into())],
        ..Settings::default()
    };
    let server = ThrowAwayPostgres::start_with(&settings).expect("Postgres starts");
    let mut client = connect(&server);
    let table = TableName {
        schema: None,
        name: "host_metrics".into(),
    };
    let today = days::today();
    client
        .batch_execute(&schema::script(&table, today))
        .expect("the tables are made");
    eprintln!("filling in {} rows", MINUTES * hosts);
    client.batch_execute(&fill(hosts)).expect("the rows are written");
    client
        .batch_execute("VACUUM ANALYZE host_metrics")
        .expect("the rows are cleaned up");

    let without = measure(&server, rounds);
    let began = now();
    let database = DatabaseConfig {
        host: server.host().into(),
        port: server.port(),
        name: server.database().into(),
        user: server.superuser().into(),
        password: None,
        table,
        ssl_mode: DbSslMode::Disable,
        ssl_root_cert: None,
    };
    let pass = sums::count(&database, today, Within::default()).expect("the days are summed up");
    let seconds = began.elapsed().as_secs_f64();
    let with = measure(&server, rounds);

    println!(
        "{:<14} {:>12} {:>10} {:>18}",
        "", "without sums", "with sums", "of a plain pass"
    );
    let (plain, _) = with.split_last().expect("the plain pass is the last one");
    for ((name, without), with) in VIEWS.iter().chain(&["plain pass"]).zip(&without).zip(&with) {
        println!("{name:<14} {without:>11.2}s {with:>9.2}s {:>18.2}", with / plain);
    }
    println!("summing up {} days took {seconds:.1} s", pass.counted);
}

/// The seconds of each view and of the plain pass.
fn measure(server: &ThrowAwayPostgres, rounds: u32) -> Vec<f64> {
    let mut questions: Vec<String> = VIEWS
        .iter()
        .map(|view| format!("SELECT * FROM host_metrics_{view}"))
        .collect();
    questions.push(
        "SELECT address, count(*) FROM host_metrics WHERE scheduled_at > now() - interval '168 hours' GROUP BY address"
            .into(),
    );
    let mut seconds = vec![Vec::new(); questions.len()];
    for round in 0..=rounds {
        eprintln!("round {round} of {rounds}");
        for (question, seconds) in questions.iter().zip(&mut seconds) {
            // Each asked by somebody new, as a dashboard does: what is compiled is not kept.
            let mut client = connect(server);
            let began = now();
            client.simple_query(question).expect("a view answers");
            if round > 0 {
                seconds.push(began.elapsed().as_secs_f64());
            }
        }
    }
    seconds.into_iter().map(median).collect()
}

fn fill(hosts: u32) -> String {
    format!(
        "SET synchronous_commit = off; \
         INSERT INTO host_metrics (address, scheduled_at, is_valid, outcome, status_code, latency, error, started_at, \
             interval_seconds, dns_seconds, connect_seconds, tls_seconds, ttfb_seconds, ip, redirects, cert_expires_at, \
             agent, kafka_topic, kafka_partition, kafka_offset) \
         SELECT 'https://host-' || lpad(h::text, 5, '0') || '.example.com/some/path', at, NOT bad, \
             CASE WHEN bad THEN (ARRAY['response_timeout', 'connect_refused', 'dns_timeout'])[1 + (h + n / 30) % 3] \
                 ELSE 'ok' END, \
             CASE WHEN NOT bad THEN 200 END, CASE WHEN NOT bad THEN 0.05 + random() * 0.2 END, \
             CASE WHEN bad THEN 'no answer within 10 s' END, at + interval '100 us', 60, 0.001, 0.01, 0.02, 0.05, \
             '192.0.2.1', 0, now() + interval '60 days', 'agent', 'host-metrics', h % 12, n \
         FROM generate_series(0, {MINUTES} - 1) n CROSS JOIN generate_series(0, {hosts} - 1) h \
         CROSS JOIN LATERAL ( \
             SELECT now() - ({MINUTES} - n) * interval '1 minute' + h * interval '1 minute' / {hosts} AS at, \
                    (n + h * 37) % 2500 < 23 OR hashint4(h * 20000 + n) % 1000 = 0 AS bad \
         ) tick ORDER BY n, h"
    )
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
