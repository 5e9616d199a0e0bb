//! The status page under load: what a request costs, what idle browsers cost, and what it takes to render many hosts.
//!
//! `make bench-page`. Every request comes over loopback on connections that stay open. The limit is a loop on one thread that reads a
//! request and writes a response of the same size, measured in the same run. Requests per second are those of one core: by the CPU
//! time of the thread that serves. Linux only.

#![expect(clippy::print_stdout, reason = "a benchmark's result is its output")]

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Instant;

use host_metrics::http::server::Server;
use host_metrics::page::server::{LIMITS, PublishedFiles};
use host_metrics::page::snapshot::{Bucket, Counts, DAY, HOUR, Host, Incident, Place, SECOND, Snapshot};
use host_metrics::page::view::Options;
use host_metrics::page::{Files, render};

use crate::median::median;

mod median;
#[allow(dead_code, reason = "the benchmarks of checks need the rest")]
mod site;

const NOW: i64 = 1_795_882_810 * SECOND;
const CONNECTIONS: usize = 16;
const IDLE: usize = 1_000;
const ROUNDS: usize = 5;
const REQUESTS_PER_ROUND: usize = 8_000;

fn main() {
    host_metrics::limits::raise_open_files();
    let before = resident_bytes();
    let begun = now();
    let snapshot = snapshot(1_000);
    let read = resident_bytes();
    let took = median((0..ROUNDS).map(|_| {
        let begun = now();
        drop(page(&snapshot));
        begun.elapsed().as_secs_f64()
    }));
    let large = page(&snapshot);
    let bytes: usize = large.values().map(|file| file.body.len()).sum();
    println!(
        "render 1,000 hosts: {:.0} ms, {} files of {:.1} MB; memory: {:.1} MB for the snapshot, {:.1} MB more with the files; all in {:.1} s",
        took * 1e3,
        large.len(),
        bytes as f64 / 1e6,
        (read - before) / 1e6,
        (resident_bytes() - read) / 1e6,
        begun.elapsed().as_secs_f64()
    );

    let shelf = PublishedFiles::new(&[]);
    shelf.put(page(&self::snapshot(42)));
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let server =
        Server::start("page", "PAGE_ADDR", address, LIMITS, shelf.clone().service()).expect("a free port");
    let address = server.address();
    let gzip = "Accept-Encoding: gzip\r\n";
    let tag = exchange(
        &mut TcpStream::connect(address).expect("it listens"),
        &request("/", gzip),
    )
    .0;
    let known = format!("{gzip}If-None-Match: {tag}\r\n");
    compare("42 hosts, overview, gzip", address, &request("/", gzip));
    compare("42 hosts, unchanged (304)", address, &request("/", &known));
    compare("42 hosts, overview, plain", address, &request("/", ""));

    let before = resident_bytes();
    let idle: Vec<TcpStream> = (0..IDLE)
        .map(|_| {
            let mut stream = TcpStream::connect(address).expect("it listens");
            exchange(&mut stream, &request("/", &known));
            stream
        })
        .collect();
    println!(
        "{IDLE} idle connections: {:.1} MB",
        (resident_bytes() - before) / 1e6
    );
    compare("42 hosts, gzip, with idle", address, &request("/", gzip));
    drop(idle);
    shelf.put(large);
    compare("1,000 hosts, overview, gzip", address, &request("/", gzip));
}

fn page(snapshot: &Snapshot) -> Files {
    let options = Options {
        title: "Status".to_owned(),
        shows_addresses: false,
    };
    render(snapshot, &options, NOW)
}

fn request(path: &str, headers: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: bench.test\r\n{headers}\r\n")
}

/// The server's requests per second of CPU time, and those of a trivial server that answers with as many bytes.
fn compare(what: &str, address: SocketAddr, request: &str) {
    let size = exchange(&mut TcpStream::connect(address).expect("it listens"), request).1;
    let (limit, trivial) = trivial(size);
    let page = page_thread();
    let (mut served, mut limits, mut elapsed) = (vec![], vec![], vec![]);
    for _ in 0..ROUNDS {
        let begun = now();
        served.push(rate(&page, address, request));
        elapsed.push(REQUESTS_PER_ROUND as f64 / begun.elapsed().as_secs_f64());
        limits.push(rate(&trivial, limit, request));
    }
    let (served, limit) = (median(served), median(limits));
    println!(
        "{what:<28} {size:>7} bytes  {served:>7.0} requests/s of a core, {:.2} of the limit of {limit:.0}; {:.0}/s over all",
        served / limit,
        median(elapsed)
    );
}

/// Requests per second of CPU time of a server's thread.
fn rate(thread: &Path, address: SocketAddr, request: &str) -> f64 {
    let mut connections: Vec<TcpStream> = (0..CONNECTIONS)
        .map(|_| TcpStream::connect(address).expect("it listens"))
        .collect();
    connections
        .iter_mut()
        .for_each(|stream| drop(exchange(stream, request)));
    let before = site::cpu_nanoseconds(thread).expect("it runs");
    for _ in 0..REQUESTS_PER_ROUND / CONNECTIONS {
        for stream in &mut connections {
            stream.write_all(request.as_bytes()).expect("it reads");
        }
        connections.iter_mut().for_each(|stream| drop(read(stream)));
    }
    let cpu = site::cpu_nanoseconds(thread).expect("it runs") - before;
    REQUESTS_PER_ROUND as f64 / (cpu as f64 / 1e9)
}

/// A server that answers [`CONNECTIONS`] connections in turn with responses of this size, and its thread in /proc.
fn trivial(size: usize) -> (SocketAddr, PathBuf) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("loopback");
    let address = listener.local_addr().expect("bound");
    let (thread, is) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let own = fs::read_link("/proc/thread-self").expect("Linux has it");
        thread.send(Path::new("/proc").join(own)).expect("it is awaited");
        let head =
            |length: usize| format!("HTTP/1.1 200 OK\r\nETag: x\r\nContent-Length: {length:07}\r\n\r\n");
        let length = size.saturating_sub(head(0).len());
        let answer = head(length) + &"x".repeat(length);
        loop {
            let accept = || listener.accept().expect("a connection").0;
            let mut connections: Vec<TcpStream> = (0..CONNECTIONS).map(|_| accept()).collect();
            'serve: loop {
                for stream in &mut connections {
                    match stream.read(&mut [0; 1024]) {
                        Ok(1..) => stream.write_all(answer.as_bytes()).expect("it is read"),
                        _ => break 'serve,
                    }
                }
            }
        }
    });
    (address, is.recv().expect("it starts"))
}

fn page_thread() -> PathBuf {
    let tasks = fs::read_dir("/proc/self/task").expect("Linux has it").flatten();
    let is_page = |path: &PathBuf| fs::read_to_string(path.join("comm")).is_ok_and(|name| name == "page\n");
    tasks.map(|task| task.path()).find(is_page).expect("it runs")
}

/// Sends a request and reads the response: its entity tag and its size.
fn exchange(stream: &mut TcpStream, request: &str) -> (String, usize) {
    stream.set_nodelay(true).expect("a socket option");
    stream.write_all(request.as_bytes()).expect("it reads");
    read(stream)
}

fn read(stream: &mut TcpStream) -> (String, usize) {
    let mut all = vec![0; 8 << 10];
    let mut filled = 0;
    loop {
        let count = stream.read(&mut all[filled..]).expect("it answers");
        assert!(count > 0, "it answers completely");
        filled += count;
        let mut headers = [httparse::EMPTY_HEADER; 64];
        let mut response = httparse::Response::new(&mut headers);
        let parsed = response.parse(&all[..filled]).expect("it speaks HTTP");
        let httparse::Status::Complete(head) = parsed else {
            continue;
        };
        let header = |name: &str| {
            let found = response
                .headers
                .iter()
                .find(|header| header.name.eq_ignore_ascii_case(name));
            String::from_utf8_lossy(found.map_or(b"", |header| header.value)).into_owned()
        };
        let body = match response.code {
            Some(304) => 0,
            code => {
                assert_eq!(code, Some(200));
                header("content-length").parse().expect("a length")
            }
        };
        let tag = header("etag");
        if filled < head + body {
            let mut rest = vec![0; head + body - filled];
            stream.read_exact(&mut rest).expect("the rest");
        }
        return (tag, head + body);
    }
}

/// Hosts in ten groups with 90 days, 48 hours, two places and an incident each.
fn snapshot(hosts: i64) -> Snapshot {
    let counts = |failed| Counts {
        valid: 1_440 - failed,
        failed,
        not_made: 1,
        slow: 3,
    };
    let bucket = |starts_at, failed| Bucket {
        starts_at,
        counts: counts(failed),
        p50: Some(0.08),
        p95: Some(0.25),
        phases: [0.005, 0.02, 0.03, 0.025, 0.001],
    };
    let buckets = |width: i64, count: i64, number: i64| -> Vec<Bucket> {
        let last = NOW.div_euclid(width) * width;
        let failed = |ago: i64| i64::from((ago + number) % 17 == 0) * 7;
        (0..count)
            .rev()
            .map(|ago| bucket(last - ago * width, failed(ago)))
            .collect()
    };
    let place = |agent: &str| Place {
        agent: agent.to_owned(),
        is_valid: Some(true),
        since: Some(NOW - 9 * DAY),
        last_check_at: Some(NOW - 20 * SECOND),
        interval_seconds: Some(60.0),
        outcome: Some("ok".to_owned()),
        error: None,
        certificate: Some((NOW + 62 * DAY, NOW - 20 * SECOND)),
    };
    let host = |number: i64| Host {
        address: format!("https://site-{number}.example/"),
        name: Some(format!("Site number {number}")),
        group: Some(format!("Group {}", number % 10)),
        is_down: Some(false),
        since: Some(NOW - 9 * DAY),
        places: vec![place("fra"), place("nyc")],
        hours: buckets(HOUR, 48, number),
        days: buckets(DAY, 90, number),
        windows: [counts(7); 4],
        verdict_uptimes: [Some(0.999); 4],
    };
    let incident = |number: i64| Incident {
        address: format!("https://site-{number}.example/"),
        number: 1,
        started_at: NOW - number % 90 * DAY - HOUR,
        ended_at: Some(NOW - number % 90 * DAY),
        checks: 12,
        outcome: "connect_refused".to_owned(),
        places: vec!["fra".to_owned()],
        last_error: Some("connection refused by 192.0.2.7:443".to_owned()),
    };
    Snapshot {
        taken_at: NOW,
        hosts: (0..hosts).map(host).collect(),
        incidents: (0..hosts).map(incident).collect(),
        has_more_incidents: false,
    }
}

fn resident_bytes() -> f64 {
    let status = fs::read_to_string("/proc/self/status").expect("Linux has it");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kilobytes: f64 = line
        .and_then(|line| line.trim().trim_end_matches(" kB").parse().ok())
        .expect("a number");
    kilobytes * 1024.0
}

#[expect(clippy::disallowed_methods, reason = "a benchmark measures the time")]
fn now() -> Instant {
    Instant::now()
}
