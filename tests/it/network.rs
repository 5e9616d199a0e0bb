//! The real binary in a network namespace of its own, with a name server of the test and hosts without a route.
//!
//! Linux only. If namespaces are not allowed, the tests print that they did not run, and in CI they fail.

use std::fs;
use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::process::Command;
use std::time::Duration;

use host_metrics::check::target::IpFamily;
use host_metrics::sample;

use crate::child;
use crate::site::{self, Deaf, Site};

const BINARY: &str = env!("CARGO_BIN_EXE_host-metrics");

/// Starts a process in a network namespace that has only the loopback device.
const ALONE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/alone");

/// The resolver's configuration, which each test writes in its own mount namespace.
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// A configuration with the test's name server.
const HERE: &str = "nameserver 127.0.0.1\n";

/// The address of the sites, and one where no server listens. Both are equally near to 127.0.0.1, the source address, so
/// getaddrinfo, which puts nearer addresses first, keeps the name server's order.
const ALIVE: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 3);
const DEAD: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);

/// Addresses without a usable route, for two answers that a router can give.
const UNREACHABLE: Ipv4Addr = Ipv4Addr::new(10, 9, 9, 9);
const PROHIBITED: Ipv4Addr = Ipv4Addr::new(10, 9, 9, 8);

const NO_SUCH_NAME: Answer = Answer::Code(3);
const SERVER_FAILURE: Answer = Answer::Code(2);

#[test]
fn every_answer_of_a_name_server_and_its_silence_have_an_outcome() {
    if !is_alone("network::every_answer_of_a_name_server_and_its_silence_have_an_outcome") {
        return;
    }
    serve_names(|name, family| match (name, family) {
        ("four.test", _) => Answer::Addresses(vec![ALIVE.into()]),
        ("six.test", _) => Answer::Addresses(vec![Ipv6Addr::LOCALHOST.into()]),
        ("text-only.test", _) => Answer::Addresses(Vec::new()),
        ("broken.test", _) => SERVER_FAILURE,
        ("not-implemented.test", _) => Answer::Code(4),
        ("refused.test", _) => Answer::Code(5),
        ("silent.test", _) => Answer::Silence,
        ("half-broken.test" | "half-missing.test" | "half-silent.test", IpFamily::V4) => {
            Answer::Addresses(vec![ALIVE.into()])
        }
        ("half-broken.test", IpFamily::V6) => SERVER_FAILURE,
        ("half-silent.test", IpFamily::V6) => Answer::Silence,
        _ => NO_SUCH_NAME,
    });
    let site = site_at((ALIVE, 0).into());
    let port = site.address.port();
    // A resolver that gives up long before the check's deadline.
    let impatient = &format!("{HERE}options timeout:1 attempts:1\n");
    let nobody = "nameserver 127.0.0.9\n";
    let no_way = "nameserver 192.0.2.53\n";
    let (long, short) = ("CHECK_TIMEOUT=60s", "CHECK_TIMEOUT=600ms");
    let table: [(_, _, &[&str], _, _); 19] = [
        (HERE, "four.test", &[], "ok", ""),
        (HERE, "four.test", &["-o", "ip=4"], "ok", ""),
        (
            HERE,
            "four.test",
            &["-o", "ip=6"],
            "dns_not_found",
            "four.test has no address",
        ),
        (
            HERE,
            "six.test",
            &["-o", "ip=4"],
            "dns_not_found",
            "six.test has no address",
        ),
        (
            HERE,
            "text-only.test",
            &[],
            "dns_not_found",
            "text-only.test has no address",
        ),
        (
            HERE,
            "nowhere.test",
            &[],
            "dns_not_found",
            "nowhere.test has no address",
        ),
        (
            HERE,
            "nowhere.test",
            &["-o", "ip=4"],
            "dns_not_found",
            "nowhere.test has no address",
        ),
        (
            HERE,
            "broken.test",
            &[],
            "dns_error",
            "name servers failed, refused or could not be reached",
        ),
        (
            HERE,
            "broken.test",
            &["-o", "ip=6"],
            "dns_error",
            "name servers failed, refused or could not be reached",
        ),
        (
            HERE,
            "not-implemented.test",
            &[],
            "dns_error",
            "name servers failed, refused or could not be reached",
        ),
        (
            HERE,
            "refused.test",
            &[],
            "dns_error",
            "name servers failed, refused or could not be reached",
        ),
        (
            HERE,
            "silent.test",
            &["-e", short],
            "dns_timeout",
            "did not answer in time",
        ),
        (
            impatient,
            "silent.test",
            &[],
            "dns_timeout",
            "did not answer in time",
        ),
        (
            nobody,
            "four.test",
            &[],
            "dns_error",
            "name servers failed, refused or could not be reached",
        ),
        (
            no_way,
            "four.test",
            &[],
            "dns_error",
            "name servers failed, refused or could not be reached",
        ),
        // An answer for one family is enough.
        (HERE, "half-broken.test", &[], "ok", ""),
        (HERE, "half-missing.test", &[], "ok", ""),
        (HERE, "half-silent.test", &["-o", "ip=4"], "ok", ""),
        (
            HERE,
            "half-silent.test",
            &["-o", "ip=6", "-e", short],
            "dns_timeout",
            "did not answer in time",
        ),
    ];
    for (resolv_conf, name, args, outcome, says) in table {
        fs::write(RESOLV_CONF, resolv_conf).unwrap();
        let record = check(&format!("http://{name}:{port}/"), &[&["-e", long], args].concat());
        let seen = sample::decode(&record).unwrap();
        let what = format!("{name} {args:?} {resolv_conf:?}: {seen:?}");
        assert_eq!(seen.outcome.as_deref(), Some(outcome), "{what}");
        assert!(seen.error.unwrap_or_default().contains(says), "{what}");
        assert!(seen.dns_seconds.is_some(), "{what}");
        let found = outcome == "ok";
        assert_eq!(seen.ip, found.then_some(ALIVE.into()), "{what}");
        assert_eq!(seen.connect_seconds.is_some(), found, "{what}");
    }
}

#[test]
fn a_dead_address_among_a_names_addresses_does_not_make_the_site_down() {
    if !is_alone("network::a_dead_address_among_a_names_addresses_does_not_make_the_site_down") {
        return;
    }
    serve_names(|name, _| {
        Answer::Addresses(match name {
            "dead-first.test" => vec![DEAD.into(), ALIVE.into()],
            "dead-last.test" => vec![ALIVE.into(), DEAD.into()],
            // IPv6 comes first, independent of the name server's order.
            "both.test" => vec![ALIVE.into(), Ipv6Addr::LOCALHOST.into()],
            "dead.test" => vec![DEAD.into(), UNREACHABLE.into(), Ipv6Addr::LOCALHOST.into()],
            _ => return NO_SUCH_NAME,
        })
    });
    let site = site_at((ALIVE, 0).into());
    let port = site.address.port();
    let timeout = Duration::from_secs(2);
    let check = |name: &str, args: &[&str]| {
        let record = check(
            &format!("http://{name}:{port}/"),
            &[&["-e", "CHECK_TIMEOUT=2s"], args].concat(),
        );
        let seen = sample::decode(&record).unwrap();
        (
            seen.outcome.unwrap_or_default().into_owned(),
            seen.ip,
            seen.connect_seconds.map(Duration::from_secs_f64),
        )
    };

    // No server listens there.
    for name in ["dead-first.test", "dead-last.test", "both.test"] {
        let (outcome, ip, _) = check(name, &[]);
        assert_eq!((outcome.as_str(), ip), ("ok", Some(ALIVE.into())), "{name}");
    }
    assert_eq!(check("dead.test", &[]).0, "connect_refused");

    // This address does not answer: half of the time is spent on it if it comes first.
    let _deaf = Deaf::at((DEAD, port).into());
    let deaf_too = has_ipv6().then(|| Deaf::at((Ipv6Addr::LOCALHOST, port).into()));
    for (name, is_slow) in [
        ("dead-first.test", true),
        ("dead-last.test", false),
        ("both.test", deaf_too.is_some()),
    ] {
        let (outcome, ip, connect) = check(name, &[]);
        assert_eq!((outcome.as_str(), ip), ("ok", Some(ALIVE.into())), "{name}");
        let half = timeout / 2 - Duration::from_millis(100);
        assert!(
            connect.is_some_and(|spent| (spent >= half) == is_slow),
            "{name}: {connect:?}"
        );
    }
    drop(deaf_too);

    // An IPv6 address that answers is tried first, and with ip=6 it is the only one.
    if has_ipv6() {
        let six = site_at((Ipv6Addr::LOCALHOST, port).into());
        for (name, args, ip) in [
            ("both.test", &[][..], six.address.ip()),
            ("both.test", &["-o", "ip=6"], six.address.ip()),
            ("both.test", &["-o", "ip=4"], ALIVE.into()),
            ("dead.test", &[], six.address.ip()),
        ] {
            let (outcome, seen, _) = check(name, args);
            assert_eq!((outcome.as_str(), seen), ("ok", Some(ip)), "{name} {args:?}");
        }
    }
}

#[test]
fn a_host_without_a_route_is_unreachable() {
    if !is_alone("network::a_host_without_a_route_is_unreachable") {
        return;
    }
    for (address, says) in [
        // This network has no other routes.
        ("192.0.2.1", "Network is unreachable"),
        ("[2001:db8::1]", ""),
        (&UNREACHABLE.to_string(), "No route to host"),
        (&PROHIBITED.to_string(), "Permission denied"),
    ] {
        let record = check(&format!("http://{address}/"), &[]);
        let seen = sample::decode(&record).unwrap();
        assert_eq!(
            seen.outcome.as_deref(),
            Some("connect_unreachable"),
            "{address}: {seen:?}"
        );
        let error = seen.error.as_deref().unwrap_or_default();
        assert!(
            error.starts_with(&format!("{address}:80 is unreachable: ")) && error.contains(says),
            "{seen:?}"
        );
        assert!(seen.connect_seconds.is_some(), "{seen:?}");
        assert_eq!((seen.ip, seen.dns_seconds), (None, None), "{seen:?}");
    }
}

/// The record that `host-metrics check` prints.
fn check(address: &str, args: &[&str]) -> Vec<u8> {
    let output = Command::new(BINARY)
        .args(["check", address, "--json"])
        .args(args)
        .env_clear()
        .output()
        .unwrap();
    assert!(output.stderr.is_empty(), "{output:?}");
    output.stdout.trim_ascii_end().to_vec()
}

/// Whether this is the process in the namespace. If not, runs the test in one, or prints that it cannot run.
pub fn is_alone(test: &str) -> bool {
    if child::is_it(test) {
        return true;
    }
    let probe = Command::new(ALONE)
        .args(["unshare", "--mount", "true"])
        .output()
        .unwrap();
    if probe.status.success() {
        let files = tempfile::tempdir().unwrap();
        fs::write(files.path().join("resolv.conf"), HERE).unwrap();
        fs::write(files.path().join("nsswitch.conf"), "hosts: dns\n").unwrap();
        let shell = child::shell(&format!(
            "mount --bind \"$FILES/resolv.conf\" /etc/resolv.conf
             mount --bind \"$FILES/nsswitch.conf\" /etc/nsswitch.conf
             ip route add unreachable {UNREACHABLE}
             ip route add prohibit {PROHIBITED}"
        ));
        child::run(
            test,
            Command::new(ALONE)
                .args(["unshare", "--mount"])
                .arg(shell.get_program())
                .args(shell.get_args())
                .env("FILES", files.path()),
        );
        return false;
    }
    let reason = String::from_utf8_lossy(&probe.stderr);
    assert!(child::variable("CI").is_none(), "{reason}");
    // Written directly, because the harness shows the output of macros only if the test fails.
    let _ = writeln!(io::stderr(), "\nNOT TESTED: {test}\n{reason}");
    false
}

pub fn site_at(address: SocketAddr) -> Site {
    Site::start_at(address, |mut stream, _| {
        site::read_head(&mut stream);
        let _ = stream.write_all(&site::ok("hello"));
    })
}

fn has_ipv6() -> bool {
    TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_ok()
}

pub enum Answer {
    /// Addresses of both families. Those of the family that is not asked for are left out of the answer.
    Addresses(Vec<IpAddr>),
    /// An RCODE of RFC 1035.
    Code(u8),
    Silence,
}

/// A name server at 127.0.0.1, until the process ends.
pub fn serve_names(answer: impl Fn(&str, IpFamily) -> Answer + Send + 'static) {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 53)).unwrap();
    std::thread::spawn(move || {
        let mut query = [0; 512];
        loop {
            let (length, from) = socket.recv_from(&mut query).unwrap();
            if let Some(response) = respond(&query[..length], &answer) {
                socket.send_to(&response, from).unwrap();
            }
        }
    });
}

/// RFC 1035, section 4.1. The query has a header of 12 bytes, the name, the type and the class. The response repeats it and
/// adds for each address a pointer to the name, the type, the class, the time to live (0), the length and the address.
fn respond(query: &[u8], answer: impl Fn(&str, IpFamily) -> Answer) -> Option<Vec<u8>> {
    let mut labels = Vec::new();
    let mut rest = &query[12..];
    while let [length @ 1..=63, after @ ..] = rest {
        let (label, after) = after.split_at(usize::from(*length));
        labels.push(std::str::from_utf8(label).unwrap());
        rest = after;
    }
    let (family, record_type) = match rest {
        [0, 0, 1, 0, 1, ..] => (IpFamily::V4, 1),
        [0, 0, 28, 0, 1, ..] => (IpFamily::V6, 28),
        _ => panic!("not a question for an address: {query:?}"),
    };
    let question = &query[12..query.len() - rest.len() + 5];
    let (code, addresses) = match answer(&labels.join("."), family) {
        Answer::Addresses(addresses) => (0, addresses),
        Answer::Code(code) => (code, Vec::new()),
        Answer::Silence => return None,
    };
    let addresses: Vec<_> = addresses
        .into_iter()
        .filter_map(|ip| match (ip, family) {
            (IpAddr::V4(ip), IpFamily::V4) => Some(ip.octets().to_vec()),
            (IpAddr::V6(ip), IpFamily::V6) => Some(ip.octets().to_vec()),
            _ => None,
        })
        .collect();
    let mut response = query[..2].to_vec();
    // Flags: a response, recursion desired and available. Then one question and the number of answers.
    response.extend_from_slice(&[0x81, 0x80 | code, 0, 1, 0, addresses.len() as u8, 0, 0, 0, 0]);
    response.extend_from_slice(question);
    for octets in addresses {
        response.extend_from_slice(&[0xc0, 12, 0, record_type, 0, 1, 0, 0, 0, 0, 0, octets.len() as u8]);
        response.extend_from_slice(&octets);
    }
    Some(response)
}
