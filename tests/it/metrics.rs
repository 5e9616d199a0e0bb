//! METRICS_ADDR: the server with invalid, slow and many clients, and the metrics of both agents while they work.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use host_metrics::commands::demo::postgres::{ThrowAwayPostgres, free_port};
use host_metrics::commands::init;
use host_metrics::config::{self, Variables};
use host_metrics::consume;
use host_metrics::http::health::{self, Health};
use host_metrics::http::metrics::Metrics;
use host_metrics::http::server::Server;
use host_metrics::http::{self, Monitored};
use host_metrics::produce::hosts::Sources;
use host_metrics::produce::{self, Rounds, host_file};
use host_metrics::shutdown::Shutdown;
use rdkafka::mocking::MockCluster;
use rdkafka::types::{RDKafkaApiKey, RDKafkaRespErr};
use regex::Regex;
use serde_json::{Value, json};

/// The bound of every wait in these tests.
const PATIENCE: Duration = Duration::from_secs(60);

/// The state of an agent that the server reports: whether it is alive, and ready.
#[derive(Clone)]
struct Stub(Arc<Mutex<(State, State)>>, &'static str);

type State = Result<(), String>;

impl Stub {
    fn new() -> Self {
        Self(Arc::new(Mutex::new((Ok(()), Ok(())))), "A count.")
    }

    fn with_a_long_page() -> Self {
        Self(Self::new().0, "x".repeat(LONG_PAGE_BYTES).leak())
    }
}

/// More than the buffers of both sockets can hold.
const LONG_PAGE_BYTES: usize = 32 << 20;

impl Monitored for Stub {
    fn metrics(&self) -> Metrics {
        let mut metrics = Metrics::default();
        metrics.counter("a_total", self.1, 1);
        metrics
    }

    fn is_alive(&self) -> Result<(), String> {
        self.0.lock().unwrap().0.clone()
    }

    fn is_ready(&self) -> Result<(), String> {
        self.0.lock().unwrap().1.clone()
    }
}

fn endpoint(stub: &Stub) -> Server {
    http::serve((Ipv4Addr::LOCALHOST, 0).into(), stub.clone()).unwrap()
}

/// The whole response to these bytes.
fn exchange(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

fn get(address: SocketAddr, path: &str) -> (u16, String) {
    let answer = exchange(address, &format!("GET {path} HTTP/1.1\r\nHost: h\r\n\r\n"));
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let length: usize = header(head, "content-length").parse().unwrap();
    assert_eq!(length, body.len());
    (head[9..12].parse().unwrap(), body.to_owned())
}

fn header<'a>(head: &'a str, name: &str) -> &'a str {
    head.lines()
        .filter_map(|line| line.split_once(": "))
        .find(|(found, _)| found.eq_ignore_ascii_case(name))
        .map(|(_, value)| value)
        .unwrap_or_else(|| panic!("no {name} in {head}"))
}

#[test]
fn the_three_paths_answer_and_nothing_else_does() {
    let stub = Stub::new();
    let endpoint = endpoint(&stub);
    let address = endpoint.address();
    assert_eq!(
        get(address, "/metrics?x=y").1,
        "# HELP a_total A count.\n# TYPE a_total counter\na_total 1\n"
    );
    assert_eq!(get(address, "/healthz"), (200, "alive\n".into()));
    assert_eq!(get(address, "/readyz"), (200, "ready\n".into()));
    assert_eq!(get(address, "/").0, 404);
    assert_eq!(get(address, "/metrics/").0, 404);
    let head = exchange(address, "HEAD /metrics HTTP/1.0\r\n\r\n");
    assert!(head.ends_with("\r\n\r\n"), "{head}");
    assert_eq!(header(&head, "content-type"), "text/plain; version=0.0.4");
    for (request, status) in [
        (
            "POST /metrics HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc".to_owned(),
            "405",
        ),
        ("GET\r\n\r\n".to_owned(), "400"),
        ("\u{16}\u{3}\u{1} TLS?\r\n\r\n".to_owned(), "400"),
        (format!("GET /{} HTTP/1.1\r\n", "x".repeat(16_384 - 5)), "431"),
        (format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(100)), "431"),
    ] {
        let answer = exchange(address, &request);
        assert_eq!(answer.get(9..12), Some(status), "{request:.40}: {answer}");
    }
}

#[test]
fn a_hung_agent_is_neither_alive_nor_ready_and_a_waiting_one_is_alive() {
    let stub = Stub::new();
    let endpoint = endpoint(&stub);
    let address = endpoint.address();
    *stub.0.lock().unwrap() = (Ok(()), Err("waiting for Kafka".into()));
    assert_eq!(get(address, "/healthz").0, 200);
    assert_eq!(get(address, "/readyz"), (503, "waiting for Kafka\n".into()));
    assert_eq!(
        health::ask(address),
        Ok(Health::NotReady("waiting for Kafka".into()))
    );
    *stub.0.lock().unwrap() = (Err("it hangs".into()), Ok(()));
    assert_eq!(get(address, "/healthz"), (503, "it hangs\n".into()));
    assert_eq!(get(address, "/readyz"), (503, "it hangs\n".into()));
    *stub.0.lock().unwrap() = (Ok(()), Ok(()));
    assert_eq!(health::ask(address), Ok(Health::Ready));
}

/// The bytes that a client repeats without ending its request, and the number of such clients.
const DAWDLERS: [(&str, &str, usize); 4] = [
    ("half a request", "GET /metrics HTTP/1.1\r\nHost: h\r\n", 20),
    ("nothing", "", 500),
    ("a byte", "G", 700),
    ("half a request line", "GET /met", 1_300),
];

#[test]
fn slow_clients_do_not_delay_others_and_are_closed() {
    for (what, sent, count) in DAWDLERS {
        let endpoint = endpoint(&Stub::new());
        let address = endpoint.address();
        let mut dawdlers: Vec<TcpStream> = (0..count)
            .map(|_| {
                let mut stream = TcpStream::connect(address).unwrap();
                stream.write_all(sent.as_bytes()).unwrap();
                stream
            })
            .collect();
        let connected_at = now();
        for path in ["/healthz", "/readyz", "/metrics"] {
            assert_eq!(get(address, path).0, 200, "{count} clients that send {what}");
        }
        // It was answered although the slow clients were still connected: the newest of them still is.
        let newest = dawdlers.last_mut().unwrap();
        newest.set_nonblocking(true).unwrap();
        let seen = newest.read(&mut [0; 16]).map_err(|error| error.kind());
        // On a busy machine its two seconds may be over.
        let is_open = seen == Err(ErrorKind::WouldBlock);
        assert!(
            is_open || connected_at.elapsed() > Duration::from_millis(1_900),
            "{count} clients that send {what}: {seen:?}"
        );
        newest.set_nonblocking(false).unwrap();
        for stream in &mut dawdlers {
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let closed = match stream.read(&mut [0; 16]) {
                Ok(count) => count == 0,
                Err(error) => error.kind() == ErrorKind::ConnectionReset,
            };
            assert!(closed, "{what}: in the end it is closed");
        }
    }
}

#[test]
fn five_hundred_requests_at_once_are_all_answered() {
    let endpoint = endpoint(&Stub::new());
    let address = endpoint.address();
    let mut streams: Vec<TcpStream> = (0..500).map(|_| TcpStream::connect(address).unwrap()).collect();
    for stream in &mut streams {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
            .write_all(b"GET /metrics HTTP/1.1\r\nHost: h\r\n\r\n")
            .unwrap();
    }
    for mut stream in streams {
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    }
}

#[test]
fn a_request_without_end_is_refused_and_others_are_answered_meanwhile() {
    let endpoint = endpoint(&Stub::new());
    let address = endpoint.address();
    let header = format!("x: {}\r\n", "y".repeat(1_000));
    for (beginning, part) in [("GET / HTTP/1.1\r\n", header.as_str()), ("GET /", "xxxxxxxxxx")] {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(beginning.as_bytes()).unwrap();
        // Sends a megabyte, or until the server closes the connection.
        let all = part.repeat((1 << 20) / part.len());
        let refused = stream.write_all(all.as_bytes());
        assert_eq!(get(address, "/healthz").0, 200);
        let mut answer = Vec::new();
        let ended = stream.read_to_end(&mut answer);
        let answer = String::from_utf8_lossy(&answer);
        let is_reset = refused.is_err() || ended.is_err();
        assert!(is_reset || answer.starts_with("HTTP/1.1 431 "), "{answer}");
    }
}

#[test]
fn a_client_that_reads_nothing_of_its_answer_is_closed() {
    let endpoint = endpoint(&Stub::with_a_long_page());
    let address = endpoint.address();
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: h\r\n\r\n")
        .unwrap();
    assert_eq!(get(address, "/healthz").0, 200);
    wait_for("the server gives up", || stream.write_all(b"x").err());
    let mut answer = Vec::new();
    let ended = stream.read_to_end(&mut answer);
    assert!(
        ended.is_err() || answer.len() < LONG_PAGE_BYTES,
        "{}",
        answer.len()
    );
}

#[test]
fn a_server_that_is_not_an_agent_is_recognised() {
    for answer in [
        "SSH-2.0-x\r\n\r\n",
        "HTTP/1.1 200",
        "HTTP/1.1 404 Not Found\r\n\r\n",
        "",
    ] {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let other = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(answer.as_bytes()).unwrap();
        });
        let error = health::ask(address).unwrap_err();
        assert!(error.contains("no agent"), "{answer:?}: {error}");
        other.join().unwrap();
    }
}

#[test]
fn an_address_in_use_is_an_error_and_a_dropped_endpoint_frees_its_address() {
    let endpoint = endpoint(&Stub::new());
    let address = endpoint.address();
    let error = http::serve(address, Stub::new())
        .err()
        .expect("the address is taken");
    let text = format!("{error:#}");
    assert!(
        text.contains(&format!("METRICS_ADDR: cannot listen on {address}")),
        "{text}"
    );
    assert!(text.contains("in use"), "{text}");
    drop(endpoint);
    wait_for("the port is free", || TcpListener::bind(address).ok());
    assert!(health::ask(address).unwrap_err().contains("no agent answers"));
}

#[test]
fn both_agents_serve_all_their_metrics_and_what_they_wait_for() {
    let pages = Pages::of_both_agents_at_work();
    let produce = &pages.produce;
    let checks = |outcome: &str| {
        value(
            produce,
            &format!(r#"host_metrics_checks_total{{outcome="{outcome}"}}"#),
        )
    };
    assert!(
        checks("ok") >= 2.0 && checks("connect_refused") >= 2.0,
        "{produce}"
    );
    assert_eq!(checks("tls_error"), 0.0);
    assert_eq!(value(produce, "host_metrics_hosts"), 2.0);
    assert_eq!(value(produce, "host_metrics_ready"), 1.0);
    assert_eq!(value(produce, "host_metrics_check_threads_limit"), 1024.0);
    let count = |name: &str| value(produce, &format!("{name}_count"));
    let all = checks("ok") + checks("connect_refused");
    assert_eq!(count("host_metrics_check_duration_seconds"), all);
    assert_eq!(count("host_metrics_check_late_seconds"), all);
    let connects = value(
        produce,
        r#"host_metrics_check_phase_seconds_count{phase="connect"}"#,
    );
    assert_eq!(connects, all, "both got that far");
    let bodies = value(produce, r#"host_metrics_check_phase_seconds_count{phase="body"}"#);
    assert_eq!(bodies, checks("ok"), "only one of them has a regex and an answer");
    let due = value(produce, "host_metrics_ticks_due_total");
    assert!(due >= all, "{due} ticks, {all} checks");
    assert!(value(produce, "host_metrics_records_delivered_total") >= 4.0);

    let consume = &pages.consume;
    assert_eq!(value(consume, "host_metrics_ready"), 1.0);
    assert!(value(consume, "host_metrics_rows_total") >= 4.0);
    assert_eq!(value(consume, "host_metrics_rejected_total"), 0.0);
    assert_eq!(
        value(consume, "host_metrics_batches_total"),
        value(consume, "host_metrics_flush_seconds_count")
    );
    assert_eq!(value(consume, "host_metrics_assigned_partitions"), 2.0);
    let flushed_at = value(consume, "host_metrics_last_flush_timestamp_seconds");
    let started_at = value(consume, "process_start_time_seconds");
    assert!(
        (0.0..600.0).contains(&(flushed_at - started_at)),
        "{flushed_at} {started_at}"
    );
    assert!(
        consume.contains(r#"host_metrics_lag_records{topic="host-metrics",partition="0"}"#),
        "{consume}"
    );

    for page in [produce, consume] {
        assert_no_complaint_of_promtool(page);
    }
}

#[test]
fn the_dashboard_and_the_alerts_use_only_existing_metrics() {
    let pages = Pages::of_both_agents_at_work();
    let (mut names, mut labels) = (
        BTreeSet::new(),
        BTreeSet::from(["job", "instance"].map(str::to_owned)),
    );
    let sample = Regex::new(r"(?m)^([a-z_]+)(?:\{(.*)\})? ").unwrap();
    let label = Regex::new(r#"([a-z_]+)=""#).unwrap();
    for page in [&pages.produce, &pages.consume] {
        for found in sample.captures_iter(page) {
            names.insert(found[1].to_owned());
            let of_sample = found.get(2).map_or("", |labels| labels.as_str());
            labels.extend(label.captures_iter(of_sample).map(|found| found[1].to_owned()));
        }
    }
    let expressions = [dashboard_expressions(), alert_expressions()].concat();
    assert!(expressions.len() > 40, "{}", expressions.len());
    let name = Regex::new(r"\b(?:host_metrics|process)_[a-z_]+\b").unwrap();
    // The labels of `by (a, b)`, of `{a="…"}` and of Grafana's `{{a}}`.
    let grouping = Regex::new(r"\b(?:by|without|on) \(([^)]*)\)").unwrap();
    let selected = Regex::new(r#"[{,] ?([a-z_]+)=~?""#).unwrap();
    let mut asked = BTreeSet::new();
    for expression in &expressions {
        for found in name.find_iter(expression) {
            assert!(
                names.contains(found.as_str()),
                "no agent has {} of {expression}",
                found.as_str()
            );
            asked.insert(found.as_str());
        }
        let groups = grouping
            .captures_iter(expression)
            .map(|found| found[1].to_owned());
        let groups: Vec<String> = groups.collect();
        let groups = groups
            .iter()
            .flat_map(|group| group.split(", ").map(str::to_owned));
        let selections = selected
            .captures_iter(expression)
            .map(|found| found[1].to_owned());
        for label in groups.chain(selections).filter(|label| !label.is_empty()) {
            assert!(
                labels.contains(&label),
                "nothing has the label {label} of {expression}"
            );
        }
    }
    // And the dashboard shows every metric.
    let series = |family: &str| {
        let histogram = ["_bucket", "_sum", "_count"].map(|part| format!("{family}{part}"));
        std::iter::once(family.to_owned())
            .chain(histogram)
            .collect::<Vec<_>>()
    };
    let family = Regex::new(r"(?m)^# TYPE (host_metrics_[a-z_]+) ").unwrap();
    let pages = format!("{}{}", pages.produce, pages.consume);
    let families: BTreeSet<&str> = family
        .captures_iter(&pages)
        .map(|found| found.get(1).unwrap().as_str())
        .collect();
    for family in &families {
        let is_shown = series(family)
            .iter()
            .any(|series| asked.contains(series.as_str()));
        assert!(
            is_shown || *family == "host_metrics_build_info",
            "{family} is nowhere shown"
        );
    }
    let page = include_str!("../../docs/reference/metrics.md");
    let (_, figures) = page.split_once("## The metrics").unwrap();
    let told = Regex::new(r"host_metrics_[a-z_]+").unwrap();
    let told: BTreeSet<&str> = told.find_iter(figures).map(|found| found.as_str()).collect();
    assert_eq!(told, families, "the reference's and the agents'");
}

#[test]
fn the_dashboards_queries_are_valid() {
    let expressions: Vec<String> = dashboard_expressions()
        .iter()
        .map(|expression| {
            let known = expression.replace("$__rate_interval", "5m");
            assert!(
                !known.replace("$job", "").replace("$instance", "").contains('$'),
                "{known}"
            );
            known
        })
        .collect();
    let rules: Vec<Value> = (0..)
        .zip(&expressions)
        .map(|(n, expr)| json!({"record": format!("r{n}"), "expr": expr}))
        .collect();
    let file = tempfile::NamedTempFile::new().unwrap();
    // JSON is a subset of YAML.
    let document = json!({"groups": [{"name": "dashboard", "rules": rules}]});
    std::fs::write(file.path(), document.to_string()).unwrap();
    let output = promtool()
        .args(["check", "rules"])
        .arg(file.path())
        .output()
        .expect("promtool");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );

    let postgres = ThrowAwayPostgres::start().unwrap();
    let port = postgres.port().to_string();
    let variables = Variables::from_pairs([
        ("DB_HOST", postgres.host()),
        ("DB_PORT", &port),
        ("DB_NAME", postgres.database()),
        ("DB_USER", postgres.superuser()),
    ]);
    init::make_tables(&config::status(&variables).unwrap().database).unwrap();
    let mut client = postgres::Config::new()
        .host(postgres.host())
        .port(postgres.port())
        .user(postgres.superuser())
        .dbname(postgres.database())
        .connect(postgres::NoTls)
        .unwrap();
    let mut questions = Vec::new();
    texts(&dashboard(), "rawSql", &mut questions);
    assert!(questions.len() >= 3);
    for sql in questions {
        client
            .query(&sql, &[])
            .unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }
}

#[test]
fn a_wrong_host_file_leaves_the_producer_ready_and_a_metric_tells_it() {
    let kafka = MockCluster::new(1).unwrap();
    kafka.create_topic("host-metrics", 2, 1).unwrap();
    let address = free_address();
    let variables = Variables::from_pairs([
        ("KAFKA_BOOTSTRAP_SERVERS", kafka.bootstrap_servers().as_str()),
        ("METRICS_ADDR", address.to_string().as_str()),
    ]);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&file, "http://127.0.0.1:1/ 1s\n").unwrap();
    let (sources, hosts) = Sources::read_files(&[file.path().to_owned()], None).unwrap();
    let config = config::produce(&variables).unwrap();
    let agent =
        Running::start(move |stop| produce::run(&config, hosts.targets, sources, Rounds::Endless, stop));
    let is_current = || try_value(&get(address, "/metrics").1, "host_metrics_host_list_current");
    wait_for("it is ready", || is_ready(address).then_some(()));
    assert_eq!(is_current(), Some(1.0));
    std::fs::write(&file, "http://127.0.0.1:1/ 1x\n").unwrap();
    wait_for("a metric tells it", || (is_current() == Some(0.0)).then_some(()));
    assert_eq!(get(address, "/readyz"), (200, "ready\n".into()));
    std::fs::write(&file, "http://127.0.0.1:1/ 2s\n").unwrap();
    wait_for("it is corrected", || (is_current() == Some(1.0)).then_some(()));
    agent.stop();
}

#[test]
fn an_outage_of_kafka_makes_the_producer_unready_and_its_end_ready_again() {
    let kafka = MockCluster::new(1).unwrap();
    kafka.create_topic("host-metrics", 2, 1).unwrap();
    let address = free_address();
    let variables = Variables::from_pairs([
        ("KAFKA_BOOTSTRAP_SERVERS", kafka.bootstrap_servers().as_str()),
        ("METRICS_ADDR", address.to_string().as_str()),
    ]);
    let agent = Running::produce(&variables, "http://127.0.0.1:1/ 1s\n".to_owned());
    wait_for("it is ready", || is_ready(address).then_some(()));
    // The database accepts connections and does not answer.
    let unanswered = [RDKafkaRespErr::RD_KAFKA_RESP_ERR__TRANSPORT; 10_000];
    kafka.request_errors(RDKafkaApiKey::Produce, &unanswered);
    let reason = wait_for("it is not ready", || match health::ask(address) {
        Ok(Health::NotReady(reason)) => Some(reason),
        _ => None,
    });
    assert!(reason.contains("waiting for Kafka at 127.0.0.1:"), "{reason}");
    let (_, page) = get(address, "/metrics");
    assert_eq!(value(&page, "host_metrics_ready"), 0.0);
    assert!(value(&page, "host_metrics_buffer_records") > 0.0);
    assert!(value(&page, "host_metrics_buffer_bytes") > 100.0);
    assert_eq!(
        get(address, "/healthz").0,
        200,
        "it waits, and that is no reason to restart it"
    );
    kafka.clear_request_errors(RDKafkaApiKey::Produce);
    wait_for("it is ready again", || is_ready(address).then_some(()));
    agent.stop();
}

#[test]
fn a_consumer_without_its_database_reports_what_it_waits_for() {
    let kafka = MockCluster::new(1).unwrap();
    kafka.create_topic("host-metrics", 1, 1).unwrap();
    let address = free_address();
    let variables = Variables::from_pairs([
        ("KAFKA_BOOTSTRAP_SERVERS", kafka.bootstrap_servers().as_str()),
        ("METRICS_ADDR", address.to_string().as_str()),
        ("DB_HOST", "127.0.0.1"),
        ("DB_PORT", "1"),
        ("DB_NAME", "n"),
        ("DB_USER", "u"),
    ]);
    let agent = Running::consume(&variables);
    let reason = wait_for("it says so", || match health::ask(address) {
        Ok(Health::NotReady(reason)) if reason.contains("Postgres") => Some(reason),
        _ => None,
    });
    assert!(reason.contains("127.0.0.1:1"), "{reason}");
    let (_, page) = get(address, "/metrics");
    assert!(value(&page, "host_metrics_store_failures_total") >= 1.0);
    assert_eq!(value(&page, "host_metrics_last_flush_timestamp_seconds"), 0.0);
    agent.stop();
}

/// The metrics of both agents while they work with an in-process Kafka and a temporary Postgres.
struct Pages {
    produce: String,
    consume: String,
}

impl Pages {
    fn of_both_agents_at_work() -> Self {
        let kafka = MockCluster::new(1).unwrap();
        kafka.create_topic("host-metrics", 2, 1).unwrap();
        let postgres = ThrowAwayPostgres::start().unwrap();
        let servers = kafka.bootstrap_servers();
        let port = postgres.port().to_string();
        let (of_produce, of_consume) = (free_address(), free_address());
        let consume = Running::consume(&Variables::from_pairs([
            ("KAFKA_BOOTSTRAP_SERVERS", servers.as_str()),
            ("METRICS_ADDR", of_consume.to_string().as_str()),
            ("DB_HOST", postgres.host()),
            ("DB_PORT", &port),
            ("DB_NAME", postgres.database()),
            ("DB_USER", postgres.superuser()),
            ("DB_BATCH_SECONDS", "0.1"),
        ]));
        let site = site();
        let produce = Running::produce(
            &Variables::from_pairs([
                ("KAFKA_BOOTSTRAP_SERVERS", servers.as_str()),
                ("METRICS_ADDR", of_produce.to_string().as_str()),
            ]),
            format!("http://{site}/ 1s hello\nhttp://127.0.0.1:1/ 1s\n"),
        );
        wait_for("both are ready", || {
            (is_ready(of_produce) && is_ready(of_consume)).then_some(())
        });
        let consumed = wait_for("rows and lag", || {
            let (_, page) = get(of_consume, "/metrics");
            let is_at_work = try_value(&page, "host_metrics_rows_total")? >= 4.0
                && page.contains("\nhost_metrics_lag_records{topic=\"host-metrics\",partition=\"1\"}");
            is_at_work.then_some(page)
        });
        // A page is not a snapshot: a check may end between two lines.
        let produced = wait_for("a page on which no check is between two lines", || {
            let (_, page) = get(of_produce, "/metrics");
            let checks: f64 = page
                .lines()
                .filter(|line| line.starts_with("host_metrics_checks_total{"))
                .filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok())
                .sum();
            let phases = r#"host_metrics_check_phase_seconds_count{phase="connect"}"#;
            let is_settled = |name| try_value(&page, name) == Some(checks);
            let are_settled = is_settled("host_metrics_check_duration_seconds_count")
                && is_settled("host_metrics_check_late_seconds_count")
                && is_settled(phases);
            are_settled.then_some(page)
        });
        produce.stop();
        consume.stop();
        Self {
            produce: produced,
            consume: consumed,
        }
    }
}

fn dashboard() -> Value {
    serde_json::from_str(include_str!("../../deploy/grafana/host-metrics.json")).unwrap()
}

fn dashboard_expressions() -> Vec<String> {
    let mut expressions = Vec::new();
    texts(&dashboard(), "expr", &mut expressions);
    expressions
}

fn alert_expressions() -> Vec<String> {
    let rules = include_str!("../../deploy/prometheus/rules.yml");
    let key = Regex::new(r"^ +expr: (.*)$").unwrap();
    let mut expressions = Vec::new();
    let mut lines = rules.lines().peekable();
    while let Some(line) = lines.next() {
        let Some(found) = key.captures(line) else { continue };
        let mut expression = found[1].to_owned();
        if expression == ">-" {
            expression.clear();
            while let Some(more) = lines.next_if(|line| line.starts_with("          ")) {
                expression += more.trim();
                expression += " ";
            }
        }
        expressions.push(expression);
    }
    assert_eq!(expressions.len(), rules.matches("- alert: ").count());
    expressions
}

/// The texts of every field with this name, however deep.
fn texts(value: &Value, name: &str, into: &mut Vec<String>) {
    match value {
        Value::Array(values) => values.iter().for_each(|value| texts(value, name, into)),
        Value::Object(fields) => {
            for (field, value) in fields {
                match value.as_str() {
                    Some(text) if field == name => into.push(text.to_owned()),
                    _ => texts(value, name, into),
                }
            }
        }
        _ => {}
    }
}

/// An agent on its own thread.
struct Running {
    shutdown: Shutdown,
    thread: JoinHandle<anyhow::Result<()>>,
}

impl Running {
    fn produce(variables: &Variables, hosts: String) -> Self {
        let config = config::produce(variables).unwrap();
        Self::start(move |shutdown| {
            let targets = host_file::parse("hosts", hosts.as_bytes()).unwrap().targets;
            produce::run(&config, targets, Sources::default(), Rounds::Endless, shutdown)
        })
    }

    fn consume(variables: &Variables) -> Self {
        let config = config::consume(variables).unwrap();
        Self::start(move |shutdown| consume::run(&config, shutdown))
    }

    fn start(run: impl FnOnce(&Shutdown) -> anyhow::Result<()> + Send + 'static) -> Self {
        let shutdown = Shutdown::new();
        let handle = shutdown.clone();
        Self {
            thread: std::thread::spawn(move || run(&handle)),
            shutdown,
        }
    }

    fn stop(self) {
        self.shutdown.request();
        self.thread.join().unwrap().expect("a clean stop");
    }
}

/// Answers every request with `hello`.
fn site() -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut head = Vec::new();
            let mut byte = [0];
            while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).is_ok_and(|count| count == 1) {
                head.push(byte[0]);
            }
            let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello";
            stream.write_all(answer).ok();
        }
    });
    address
}

fn free_address() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, free_port().unwrap()).into()
}

fn is_ready(address: SocketAddr) -> bool {
    health::ask(address) == Ok(Health::Ready)
}

/// The value of the metric with exactly this name and these labels.
fn value(page: &str, metric: &str) -> f64 {
    try_value(page, metric).unwrap_or_else(|| panic!("no {metric} in\n{page}"))
}

fn try_value(page: &str, metric: &str) -> Option<f64> {
    let line = page
        .lines()
        .find_map(|line| line.strip_prefix(metric)?.strip_prefix(' '))?;
    line.parse().ok()
}

/// `promtool check metrics`: the format, and Prometheus's conventions for names and units.
fn assert_no_complaint_of_promtool(page: &str) {
    let mut promtool = promtool()
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool; `scripts/setup test` brings it");
    promtool.stdin.take().unwrap().write_all(page.as_bytes()).unwrap();
    let output = promtool.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success() && said.is_empty(), "{said}\n{page}");
}

/// From the PATH, or the copy of `scripts/setup test`.
fn promtool() -> Command {
    let fetched = concat!(env!("CARGO_MANIFEST_DIR"), "/.cache/promtool");
    match std::path::Path::new(fetched).exists() {
        true => Command::new(fetched),
        false => Command::new("promtool"),
    }
}

/// Tries until there is a result.
#[track_caller]
fn wait_for<T>(what: &str, mut attempt: impl FnMut() -> Option<T>) -> T {
    let deadline = now() + PATIENCE;
    loop {
        if let Some(result) = attempt() {
            return result;
        }
        assert!(now() < deadline, "not within {PATIENCE:?}: {what}");
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "tests of real sockets live in real time"
)]
fn now() -> Instant {
    Instant::now()
}
