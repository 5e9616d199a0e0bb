//! Our own network fails, and no host is blamed (`agent_offline`): real routes, links and name servers, in network namespaces.

use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsFd;
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use host_metrics::config::{ProduceConfig, References};
use host_metrics::produce::counters::Counters;
use host_metrics::produce::{self, Rounds};
use host_metrics::sample::Outcome;
use host_metrics::shutdown::Shutdown;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::network::{Answer, is_alone, serve_names, site_at};
use crate::produce::{Kafka, Record, TOPIC, config};
use crate::site::Site;

const BOUND: Duration = Duration::from_secs(60);
const SECOND: i64 = 1_000_000;

/// Hosts in three networks, and one that is only asked.
const A: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
const B: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const C: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const REFERENCE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 99);

#[test]
fn a_removed_route_is_not_blamed_on_a_host_and_a_later_outage_of_a_host_is_reported() {
    if !is_alone(
        "own_network::a_removed_route_is_not_blamed_on_a_host_and_a_later_outage_of_a_host_is_reported",
    ) {
        return;
    }
    let uplink = Uplink::new(1, &[A, B, C]);
    here("ip route add default via 10.0.1.1");
    let run = Run::start(References::Gateways, &[A, B, C].map(|ip| ip.to_string()));
    run.wait_for(Outcome::Ok, 6);
    here("ip route del default");
    run.wait_for(Outcome::AgentOffline, 6);
    // A real outage begins during ours.
    uplink.there(&format!("ip addr del {C}/32 dev lo"));
    here("ip route add default via 10.0.1.1");
    let mended_at = now_micros();
    run.wait_for(Outcome::ConnectTimeout, 2);
    let records = run.stop();
    let told = assert_only_blames(&records, Some(C), mended_at);
    let first = told.iter().map(|record| record.scheduled_at()).min().unwrap();
    assert!(
        first <= mended_at + 2 * SECOND,
        "{} s late",
        (first - mended_at) / SECOND
    );
    let offline = records
        .iter()
        .find(|record| record.outcome() == "agent_offline")
        .unwrap();
    let error = offline.sample().error.unwrap().into_owned();
    assert!(error.starts_with("connect_unreachable: "), "{error}");
}

#[test]
fn a_dead_uplink_behind_a_gateway_that_answers_blames_no_host() {
    if !is_alone("own_network::a_dead_uplink_behind_a_gateway_that_answers_blames_no_host") {
        return;
    }
    let uplink = Uplink::new(1, &[A, B, C, REFERENCE]);
    here("ip route add default via 10.0.1.1");
    let references = References::Hosts(vec![(REFERENCE.to_string(), 80)]);
    let run = Run::start(references, &[A, B, C].map(|ip| ip.to_string()));
    run.wait_for(Outcome::Ok, 6);
    // The gateway drops what it cannot forward.
    for ip in [REFERENCE, A, B, C] {
        uplink.there(&format!("ip addr del {ip}/32 dev lo"));
    }
    run.wait_for(Outcome::AgentOffline, 6);
    for ip in [A, B, C, REFERENCE] {
        uplink.there(&format!("ip addr add {ip}/32 dev lo"));
    }
    let ok = run.counters.results(Outcome::Ok);
    run.wait_for(Outcome::Ok, ok + 6);
    assert_only_blames(&run.stop(), None, 0);
}

#[test]
fn dead_name_servers_alone_blame_no_host() {
    if !is_alone("own_network::dead_name_servers_alone_blame_no_host") {
        return;
    }
    let _uplink = Uplink::new(1, &[A, B, C]);
    here("ip route add default via 10.0.1.1");
    let are_silent = Arc::new(AtomicBool::new(false));
    let silence = Arc::clone(&are_silent);
    serve_names(move |name, _| match (silence.load(Ordering::Relaxed), name) {
        (true, _) => Answer::Silence,
        (_, "a.test") => Answer::Addresses(vec![A.into()]),
        (_, "b.test") => Answer::Addresses(vec![B.into()]),
        _ => Answer::Code(3),
    });
    let hosts = ["a.test".to_owned(), "b.test".to_owned(), C.to_string()];
    let run = Run::start(References::Gateways, &hosts);
    run.wait_for(Outcome::Ok, 6);
    are_silent.store(true, Ordering::Relaxed);
    run.wait_for(Outcome::AgentOffline, 4);
    are_silent.store(false, Ordering::Relaxed);
    let ok = run.counters.results(Outcome::Ok);
    run.wait_for(Outcome::Ok, ok + 6);
    let records = run.stop();
    assert_only_blames(&records, None, 0);
    let c = records.iter().filter(|record| record.key.contains("192.0.2.1"));
    assert!(
        c.into_iter().all(|record| record.outcome() != "agent_offline"),
        "it has no name"
    );
}

#[test]
fn one_dead_uplink_of_two_blames_no_host_behind_it() {
    if !is_alone("own_network::one_dead_uplink_of_two_blames_no_host_behind_it") {
        return;
    }
    let _first = Uplink::new(1, &[A, B]);
    let second = Uplink::new(2, &[C]);
    here("ip route add default via 10.0.1.1");
    here("ip route add 192.0.2.0/24 via 10.0.2.1");
    let run = Run::start(References::Gateways, &[A, B, C].map(|ip| ip.to_string()));
    run.wait_for(Outcome::Ok, 9);
    second.there("ip addr flush dev gw2");
    run.wait_for(Outcome::AgentOffline, 2);
    let records = run.stop();
    assert_only_blames(&records, None, 0);
    for record in records
        .iter()
        .filter(|record| record.outcome() == "agent_offline")
    {
        assert!(record.key.contains("192.0.2.1"), "{}", record.key);
    }
}

/// No check has failed but those of this host since then. Returns these.
fn assert_only_blames(records: &[Record], host: Option<Ipv4Addr>, since: i64) -> Vec<&Record> {
    let says_nothing = ["ok", "missed", "agent_offline"];
    let failed = records
        .iter()
        .filter(|record| !says_nothing.contains(&record.outcome().as_str()));
    let failed: Vec<&Record> = failed.collect();
    for record in &failed {
        let is_expected = host.is_some_and(|host| record.key.contains(&host.to_string()));
        assert!(
            is_expected && record.scheduled_at() + SECOND >= since,
            "{} {}: {:?}",
            record.key,
            record.outcome(),
            record.sample().error
        );
    }
    failed
}

/// The network behind an uplink: this side has the device `upN` with the address 10.0.N.2, the gateway is 10.0.N.1.
struct Uplink {
    process: Child,
    _sites: Vec<Site>,
}

impl Uplink {
    fn new(number: u8, hosts: &[Ipv4Addr]) -> Self {
        let process = Command::new("unshare")
            .args(["--net", "sleep", "600"])
            .spawn()
            .unwrap();
        let id = process.id();
        wait_for("a network of its own", || {
            let link = |id: &str| std::fs::read_link(format!("/proc/{id}/ns/net")).unwrap();
            link(&id.to_string()) != link("self")
        });
        here(&format!("ip link add up{number} type veth peer name gw{number}"));
        here(&format!("ip link set gw{number} netns {id}"));
        here(&format!("ip addr add 10.0.{number}.2/24 dev up{number}"));
        here(&format!("ip link set up{number} up"));
        let mut uplink = Self {
            process,
            _sites: Vec::new(),
        };
        uplink.there("ip link set lo up");
        uplink.there(&format!("ip addr add 10.0.{number}.1/24 dev gw{number}"));
        uplink.there(&format!("ip link set gw{number} up"));
        for host in hosts {
            uplink.there(&format!("ip addr add {host}/32 dev lo"));
            uplink._sites.push(uplink.site(*host));
        }
        uplink
    }

    /// Runs a command in that network.
    fn there(&self, command: &str) {
        here(&format!(
            "nsenter --net=/proc/{}/ns/net {command}",
            self.process.id()
        ));
    }

    fn site(&self, ip: Ipv4Addr) -> Site {
        let network = std::fs::File::open(format!("/proc/{}/ns/net", self.process.id())).unwrap();
        let bind = move || {
            move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            site_at((IpAddr::from(ip), 80).into())
        };
        std::thread::spawn(bind).join().unwrap()
    }
}

impl Drop for Uplink {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        // They cannot be reached from here, as their end needs.
        std::mem::take(&mut self._sites)
            .into_iter()
            .for_each(std::mem::forget);
    }
}

fn here(command: &str) {
    let mut words = command.split(' ');
    let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
    assert!(output.status.success(), "{command}: {output:?}");
}

/// `produce` with the real check of these hosts, every second.
struct Run {
    kafka: Kafka,
    shutdown: Shutdown,
    counters: Arc<Counters>,
    thread: JoinHandle<anyhow::Result<()>>,
}

impl Run {
    fn start(references: References, hosts: &[String]) -> Self {
        let kafka = Kafka::start();
        let config = ProduceConfig {
            references,
            ..config(&kafka.servers(), TOPIC)
        };
        let lines: String = hosts
            .iter()
            .map(|host| format!("http://{host}/ 1s timeout=500ms\n"))
            .collect();
        let targets = produce::host_file::parse("hosts", lines.as_bytes())
            .unwrap()
            .targets;
        let (shutdown, counters) = (Shutdown::new(), Arc::<Counters>::default());
        let (stop, seen) = (shutdown.clone(), Arc::clone(&counters));
        let thread = std::thread::spawn(move || {
            produce::run_counted(
                &config,
                targets,
                produce::hosts::Sources::default(),
                Rounds::Endless,
                &stop,
                seen,
            )
        });
        Self {
            kafka,
            shutdown,
            counters,
            thread,
        }
    }

    fn wait_for(&self, outcome: Outcome, count: u64) {
        wait_for(outcome.as_str(), || self.counters.results(outcome) >= count);
    }

    fn stop(self) -> Vec<Record> {
        self.shutdown.request();
        self.thread.join().unwrap().unwrap();
        self.kafka.records(TOPIC)
    }
}

fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let deadline = now() + BOUND;
    while !condition() {
        assert!(now() < deadline, "{what}");
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

fn now_micros() -> i64 {
    host_metrics::clock::wall_micros()
}

#[expect(clippy::disallowed_methods, reason = "a test bounds what it waits for")]
fn now() -> Instant {
    Instant::now()
}
