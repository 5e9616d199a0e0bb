//! Whatever a server answers, a check ends in time with one consistent observation.
//!
//! The first byte chooses what is asked; the rest is what the server sends before it closes. Redirects are not followed,
//! so no packet leaves this machine.

#![no_main]

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{LazyLock, Mutex};
use std::time::{Duration, Instant};

use host_metrics::check::http::{Checker, Checks};
use host_metrics::sample::Outcome;
use host_metrics::check::target::Target;
use host_metrics::config::CheckConfig;
use host_metrics::produce::host_file;
use libfuzzer_sys::fuzz_target;

const MAX_BODY_BYTES: u64 = 64 << 10;

/// A server that closes what it sends never keeps a check waiting. The bound is long because a busy machine may not run us for a while.
const WITHIN: Duration = Duration::from_secs(30);

static ANSWER: Mutex<Vec<u8>> = Mutex::new(Vec::new());

static SITE: LazyLock<SocketAddr> = LazyLock::new(|| {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let _ = answer(stream);
        }
    });
    address
});

static CHECKER: LazyLock<Mutex<Checker>> = LazyLock::new(|| {
    let config = CheckConfig {
        timeout: WITHIN,
        max_threads: 1,
        max_body_bytes: MAX_BODY_BYTES,
        user_agent: "fuzz".to_owned(),
        ca_file: None,
        secrets_dir: None,
        agent_name: "fuzz".to_owned(),
    };
    Mutex::new(Checks::new(&config).unwrap().checker())
});

static TARGETS: LazyLock<[Target; 3]> = LazyLock::new(|| {
    let target = |options: &[&str], regex| {
        let options: Vec<String> = options.iter().map(|&option| option.to_owned()).collect();
        host_file::target(&format!("http://{}/", *SITE), &options, regex).unwrap()
    };
    [
        target(&["follow=0"], Some("ok")),
        target(&["follow=0"], None),
        target(&["follow=0", "method=HEAD"], None),
    ]
});

/// Reads the request and sends the answer.
fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    let mut request = Vec::new();
    let mut piece = [0; 4096];
    while !request.ends_with(b"\r\n\r\n") {
        match stream.read(&mut piece)? {
            0 => return Ok(()),
            count => request.extend_from_slice(&piece[..count]),
        }
    }
    let answer = ANSWER.lock().unwrap().clone();
    stream.write_all(&answer)?;
    stream.shutdown(Shutdown::Write)?;
    // The check's reset, or its end: until then the answer may still be on its way.
    while stream.read(&mut piece)? > 0 {}
    Ok(())
}

fuzz_target!(|input: &[u8]| {
    let Some((choice, response)) = input.split_first() else {
        return;
    };
    *ANSWER.lock().unwrap() = response.to_vec();
    let target = &TARGETS[usize::from(*choice) % TARGETS.len()];
    let began_at = Instant::now();
    let seen = CHECKER.lock().unwrap().check(target, began_at + WITHIN);
    assert!(began_at.elapsed() < WITHIN, "{seen:?}");
    assert_eq!(seen.outcome == Outcome::Ok, seen.error.is_none(), "{seen:?}");
    assert_ne!(seen.outcome, Outcome::AgentError, "{seen:?}");
    assert!(seen.body_bytes.unwrap_or(0) <= MAX_BODY_BYTES, "{seen:?}");
    if seen.outcome == Outcome::Ok {
        assert!(seen.status_code.is_some() && seen.latency.is_some(), "{seen:?}");
    }
});
