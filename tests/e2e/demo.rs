//! The demo as a newcomer runs it.

use std::net::TcpStream;
use std::time::Duration;

use crate::agent::{Agent, Variables};
use crate::scratch::wait_for;

const SOON: Duration = Duration::from_secs(60);

#[test]
fn the_demo_ends_by_itself_and_its_ledger_balances() {
    let mut demo = Agent::start(&["demo", "--for", "12s"], &Variables::default());
    let status = demo.wait(SOON);
    let text = demo.stdout();
    assert_eq!(status.code(), Some(0), "{text}\n{}", demo.stderr());
    assert!(text.contains("It balances"), "{text}");
    assert!(!text.contains('\x1b'), "no terminal, no escapes: {text}");
    assert!(text.contains("psql "), "{text}");
    // What each page of the sample site demonstrates: the host's name, its state, and its last error.
    for (name, state, outcome) in [
        ("Plain", " up ", ""),
        ("Wrong status", " DOWN ", ", bad_status"),
        ("Wrong text", " DOWN ", ", regex_mismatch"),
        ("Hanging", " DOWN ", ", response_timeout"),
        ("Cut off", " DOWN ", ", connection_closed"),
        ("Expired certificate", " DOWN ", ", tls_cert_expired"),
        ("Refused", " DOWN ", ", connect_refused"),
    ] {
        let line = text.lines().rfind(|line| line.starts_with(&format!("{name}  ")));
        assert!(
            line.is_some_and(|line| line.contains(state) && line.contains(outcome)),
            "{name}{state}{outcome}: {text}"
        );
    }
    // The trend has a character for each check.
    let plain = text.lines().rfind(|line| line.starts_with("Plain  ")).unwrap();
    assert!(
        plain.matches(|char| ('▁'..='█').contains(&char)).count() > 3,
        "{text}"
    );
    // The counts are not zero.
    let due = text
        .lines()
        .find(|line| line.contains("ticks were due"))
        .expect("the ledger");
    let due: u64 = due.split_whitespace().next().unwrap().parse().unwrap();
    assert!(due > 40, "{text}");
    assert!(text.contains("Passed: every record"), "{text}");
}

#[test]
fn a_stopped_demo_ends_cleanly_with_its_ledger() {
    let mut demo = Agent::start(&["demo"], &Variables::default());
    port_of_postgres(&demo);
    demo.signal("INT");
    let status = demo.wait(SOON);
    assert_eq!(status.code(), Some(0), "{}\n{}", demo.stdout(), demo.stderr());
    assert!(demo.stdout().contains("It balances"), "{}", demo.stdout());
}

#[test]
fn a_killed_demo_leaves_no_server_and_no_files_behind() {
    let mut demo = Agent::start(&["demo"], &Variables::default());
    let port = port_of_postgres(&demo);
    let host_file = demo.stdout().lines().find_map(|line| {
        line.trim()
            .strip_prefix("hosts ")
            .map(|path| path.trim().to_owned())
    });
    let host_file = std::path::PathBuf::from(host_file.expect("says where the host file is"));
    assert!(host_file.exists());
    demo.kill();
    wait_for(
        SOON,
        "Postgres and its directory are gone",
        || (!host_file.exists() && TcpStream::connect(("127.0.0.1", port)).is_err()).then_some(()),
        String::new,
    );
    assert!(!host_file.parent().unwrap().exists());
}

#[test]
fn the_demo_checks_the_users_own_hosts_too() {
    let directory = crate::scratch::directory("hosts");
    let path = directory.join("mine");
    let site = crate::site::Site::start();
    std::fs::write(&path, site.host_file("3s")).unwrap();
    let mut demo = Agent::start(
        &["demo", "--for", "10s", "-c", path.to_str().unwrap()],
        &Variables::default(),
    );
    let status = demo.wait(SOON);
    let text = demo.stdout();
    assert_eq!(status.code(), Some(0), "{text}\n{}", demo.stderr());
    assert!(text.contains("12 hosts: 6 up, 6 down"), "{text}");
    assert!(text.contains("It balances"), "{text}");
}

/// Waits until the demo prints how to connect to its database.
fn port_of_postgres(demo: &Agent) -> u16 {
    wait_for(
        SOON,
        "the psql command",
        || {
            let text = demo.stdout();
            let (_, after) = text.split_once("psql postgresql://")?;
            let (_, after) = after.split_once("@127.0.0.1:")?;
            after.split_once('/')?.0.parse().ok()
        },
        || demo.stderr(),
    )
}
