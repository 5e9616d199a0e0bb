//! The CPU time of a check, compared with a minimal client: a blocking socket with httparse, and rustls over it.
//!
//! `cargo bench --bench check [rounds]`. Prints the CPU time of the checking thread per check, and the ratio of the two,
//! measured alternately in one process. It makes thousands of connections, which would fill the machine's connection
//! tables, so run it with `scripts/alone`. Linux only.

mod median;
mod site;

use std::path::Path;
use std::time::{Duration, Instant};

use crate::median::median;
use host_metrics::check::http::{Checker, Checks};
use host_metrics::check::target::Target;
use host_metrics::config::CheckConfig;
use host_metrics::sample::Outcome;
use site::Raw;

const CHECKS_PER_TURN: u32 = 300;

fn main() {
    let rounds = std::env::args()
        .skip(1)
        .find_map(|word| word.parse().ok())
        .unwrap_or(20);
    let ca_file = tempfile::NamedTempFile::new().expect("a file");
    let page = site::page();
    let answer = move |mut stream: Box<dyn site::Stream>| site::answer(&mut *stream, &page);
    let plain = site::serve(None, answer.clone());
    let tls = site::serve(Some(site::tls_settings(ca_file.path())), answer);

    let config = CheckConfig {
        timeout: Duration::from_secs(10),
        max_threads: 16,
        max_body_bytes: 1 << 20,
        user_agent: "host-metrics/bench".into(),
        ca_file: Some(ca_file.path().to_owned()),
        secrets_dir: None,
        agent_name: "bench".into(),
    };
    let mut checker = Checks::new(&config).expect("the settings are good").checker();
    let http = target(&format!("http://{plain}/"));
    let https = target(&format!("https://{tls}/"));
    let raw_http = Raw::http(plain);
    let raw_https = Raw::https(tls, ca_file.path());

    compare(
        "http",
        rounds,
        || raw_http.exchange(),
        || check(&mut checker, &http),
    );
    compare(
        "https",
        rounds,
        || raw_https.exchange(),
        || check(&mut checker, &https),
    );
}

#[expect(clippy::print_stdout, reason = "its result")]
fn compare(what: &str, rounds: usize, mut raw: impl FnMut(), mut checked: impl FnMut()) {
    let turn = |work: &mut dyn FnMut()| {
        let before = cpu_nanoseconds();
        for _ in 0..CHECKS_PER_TURN {
            work();
        }
        (cpu_nanoseconds() - before) as f64 / f64::from(CHECKS_PER_TURN) / 1e3
    };
    turn(&mut raw);
    turn(&mut checked);
    let (raw, checked): (Vec<_>, Vec<_>) = (0..rounds).map(|_| (turn(&mut raw), turn(&mut checked))).unzip();
    let (raw, checked) = (median(raw), median(checked));
    println!(
        "{what}: raw {raw:.1} µs, check {checked:.1} µs CPU each: {:.2}x",
        checked / raw
    );
}

fn cpu_nanoseconds() -> u64 {
    site::cpu_nanoseconds(Path::new("/proc/thread-self")).expect("Linux has it")
}

fn check(checker: &mut Checker, target: &Target) {
    let seen = checker.check(target, now() + Duration::from_secs(10));
    assert_eq!(seen.outcome, Outcome::Ok, "{seen:?}");
}

fn target(url: &str) -> Target {
    Target::new(url.into(), url.parse().expect("a URL"), Duration::from_secs(60))
}

#[expect(clippy::disallowed_methods, reason = "checks have deadlines")]
fn now() -> Instant {
    Instant::now()
}
