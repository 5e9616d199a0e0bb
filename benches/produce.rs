//! What `host-metrics produce` costs, and how late its checks are, with a site and a Kafka in other processes.
//!
//! `make bench-produce`, `make soak-produce`. There are three processes: the agent, whose CPU time, threads and memory are
//! read from /proc; a fast site (a second process of this benchmark); and this one, which has librdkafka's in-process
//! broker, reads the topic, and verifies that every tick of every host has exactly one record. Lateness is computed from
//! the records. A minimal client in the same run shows the cost of a bare check: in a loop (`raw`), and at the agent's
//! pace, asleep between the checks (`paced`). The ratio compares the agent with `paced`. Linux only, and in a network
//! namespace of its own, because thousands of connections a second would fill the machine's connection tables.
//!
//! Arguments: `seconds=12` per case, and words that a case's name must contain, such as `https 1000`; or `soak` and
//! `seconds=300`. `group` compares a producer with PRODUCE_GROUP and one without. `takeover` counts the ticks that are missed when
//! producers are stopped, restarted and killed, with a real Kafka. `million` lets three producers share a million hosts at five
//! minutes, kills one of them, and takes six minutes. These run only if they are named.

#![expect(clippy::print_stdout, reason = "a benchmark's result is its output")]

#[allow(dead_code, reason = "the end-to-end tests may need more of it")]
#[path = "../tests/e2e/kafka.rs"]
mod kafka;
mod median;
#[allow(dead_code, reason = "the end-to-end tests may need more of it")]
#[path = "../tests/e2e/scratch.rs"]
mod scratch;
mod site;

use std::cell::Cell;
use std::collections::HashMap;
use std::fmt;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::median::median;
use host_metrics::produce::schedule::phase_micros;
use host_metrics::sample::epoch::{Claim, Epochs};
use host_metrics::sample::{self, Timestamp};
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::mocking::MockCluster;
use rdkafka::producer::DefaultProducerContext;
use rdkafka::{Message, Offset, TopicPartitionList};
use site::Raw;

const INTERVAL_MICROS: i64 = 1_000_000;

/// In the cases with hanging hosts, one in twenty hangs.
const HANGING_ONE_IN: usize = 20;

/// The time before the measurement: the agent starts, and every host is checked twice.
const WARM_UP: Duration = Duration::from_secs(3);

/// The longest time for the agent to start or stop, and for the broker to deliver the last record, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// The broker keeps 5 MB per partition; the reader is never that far behind.
const PARTITIONS: i32 = 12;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args()
        .skip(1)
        .filter(|word| word != "--bench")
        .collect();
    if let [role, ca_file] = words.as_slice()
        && role == SITE
    {
        be_the_site(Path::new(ca_file));
        return ExitCode::SUCCESS;
    }
    if !is_alone() {
        eprintln!(
            "this floods a network: run it as `make bench-produce`, which gives it one of its own (only `lo`)"
        );
        return ExitCode::from(2);
    }
    let seconds = words.iter().find_map(|word| word.strip_prefix("seconds="));
    let seconds = seconds.map(|number| number.parse().expect("a whole number of seconds"));
    let is_soak = words.iter().any(|word| word == "soak");
    let wanted: Vec<_> = words.iter().filter(|word| !word.contains('=')).collect();
    let is_named = |name: &str| words.iter().any(|word| word == name);
    let mut stage = Stage::set();
    let is_balanced = match is_soak {
        true => soak(&stage, Duration::from_secs(seconds.unwrap_or(300))),
        false if is_named("group") => group(&stage, Duration::from_secs(seconds.unwrap_or(12))),
        false if is_named("takeover") => takeovers(&mut stage, seconds.unwrap_or(3)),
        false if is_named("million") => million(&stage, Duration::from_secs(seconds.unwrap_or(340))),
        false => bench(&stage, Duration::from_secs(seconds.unwrap_or(12)), |case| {
            wanted
                .iter()
                .all(|word| case.name().split(' ').any(|part| part == *word))
        }),
    };
    match is_balanced {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}

/// Whether this network has nothing but the loopback device.
fn is_alone() -> bool {
    let devices = fs::read_to_string("/proc/net/dev").expect("Linux has it");
    devices
        .lines()
        .filter_map(|line| line.split_once(':'))
        .all(|(name, _)| name.trim() == "lo")
}

#[derive(Clone, Copy)]
struct Case {
    scheme: &'static str,
    hosts: usize,
    some_hang: bool,
}

impl Case {
    fn name(self) -> String {
        let Self { scheme, hosts, .. } = self;
        format!(
            "{scheme} {hosts} {}",
            if self.some_hang { "hang" } else { "well" }
        )
    }
}

fn bench(stage: &Stage, time: Duration, is_wanted: impl Fn(Case) -> bool) -> bool {
    let mut cases = Vec::new();
    for scheme in ["http", "https"] {
        for hosts in [100, 1_000, 2_000, 5_000] {
            for some_hang in [false, true] {
                cases.push(Case {
                    scheme,
                    hosts,
                    some_hang,
                });
            }
        }
    }
    println!(
        "{} processors; hosts at 1 s; µs of processor time a check, the agent with Kafka against a raw client's;\n\
         lateness and missed ticks of the hosts that are well; others: what other programs took of the machine",
        std::thread::available_parallelism().map_or(0, usize::from)
    );
    println!(
        "{:<6}{:>6} {:<5}{:>9}{:>8}{:>7}{:>7}{:>7} |{:>8}{:>8}{:>8} ms |{:>8}{:>8} |{:>8}{:>8} |{:>7}",
        "",
        "hosts",
        "",
        "checks/s",
        "agent",
        "raw",
        "paced",
        "ratio",
        "p50",
        "p99",
        "max",
        "missed",
        "failed",
        "threads",
        "MB",
        "others"
    );
    let mut balanced = true;
    for case in cases.into_iter().filter(|case| is_wanted(*case)) {
        match measure(stage, case, time) {
            Ok(row) => println!("{row}"),
            Err(unbalanced) => {
                println!("{}: {unbalanced}", case.name());
                balanced = false;
            }
        }
    }
    balanced
}

struct Row {
    case: Case,
    checks_per_second: f64,
    agent_micros: f64,
    raw_micros: f64,
    paced_micros: f64,
    late_micros: Vec<i64>,
    missed: f64,
    failed: f64,
    threads: u64,
    peak_bytes: u64,
    others: f64,
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let late = |share: f64| {
            let rank = (self.late_micros.len() as f64 * share).ceil() as usize;
            let micros = self.late_micros.get(rank.saturating_sub(1)).copied();
            micros.unwrap_or_default() as f64 / 1e3
        };
        write!(
            f,
            "{:<6}{:>6} {:<5}{:>9.0}{:>8.1}{:>7.1}{:>7.1}{:>6.2}x |{:>8.3}{:>8.3}{:>8.2}    |{:>7.3}%{:>7.3}% |{:>8}{:>8.1} |{:>6.1}%",
            self.case.scheme,
            self.case.hosts,
            if self.case.some_hang { "5 %" } else { "" },
            self.checks_per_second,
            self.agent_micros,
            self.raw_micros,
            self.paced_micros,
            self.agent_micros / self.paced_micros,
            late(0.5),
            late(0.99),
            late(1.0),
            self.missed * 100.0,
            self.failed * 100.0,
            self.threads,
            self.peak_bytes as f64 / 1e6,
            self.others * 100.0,
        )
    }
}

fn measure(stage: &Stage, case: Case, time: Duration) -> Result<Row, String> {
    let topic = stage.new_topic();
    let mut ledger = Ledger::new(&stage.servers, &topic);
    let is_https = case.scheme == "https";
    let (well, hangs) = match is_https {
        true => (stage.site.https, stage.site.https_hanging),
        false => (stage.site.http, stage.site.http_hanging),
    };
    let hosts: Vec<_> = (0..case.hosts)
        .map(|i| match case.some_hang && i % HANGING_ONE_IN == 0 {
            true => format!("{}://{hangs}/hangs/{i}", case.scheme),
            false => format!("{}://{well}/well/{i}", case.scheme),
        })
        .collect();
    let raw = match is_https {
        true => Raw::https(well, &stage.ca_file),
        false => Raw::http(well),
    };

    let mut raw_micros = raw_turns(&raw);
    let agent = Agent::start(stage, &topic, &hosts);
    ledger.read_for(WARM_UP);
    let (from, before) = (wall_micros(), Usage::now(stage, &[&agent]));
    ledger.read_for(time);
    let (until, after) = (wall_micros(), Usage::now(stage, &[&agent]));
    let (threads, peak_bytes) = (agent.status("Threads:"), agent.status("VmHWM:") * 1_024);
    ledger.read_to_the_end_of(agent)?;
    ledger.balance(&hosts)?;
    raw_micros.append(&mut raw_turns(&raw));
    let paced_micros = raw_paced(&raw, case.hosts);

    let spent = after.since(&before);
    let in_window = |entry: &&Entry| (from..until).contains(&entry.scheduled_at);
    let entries: Vec<_> = ledger.entries.iter().filter(in_window).collect();
    let checks = entries.iter().filter(|entry| entry.late_micros.is_some()).count() as f64;
    let healthy: Vec<_> = entries.iter().filter(|entry| entry.is_well_site).collect();
    let share = |count: usize| count as f64 / healthy.len().max(1) as f64;
    let mut late_micros: Vec<_> = healthy.iter().filter_map(|entry| entry.late_micros).collect();
    late_micros.sort_unstable();
    let missed = healthy.iter().filter(|entry| entry.late_micros.is_none()).count();
    Ok(Row {
        case,
        checks_per_second: checks * 1e6 / (until - from) as f64,
        agent_micros: spent.agent / checks * 1e6,
        raw_micros: median(raw_micros),
        paced_micros,
        late_micros,
        missed: share(missed),
        failed: share(healthy.iter().filter(|entry| !entry.is_ok).count() - missed),
        threads,
        peak_bytes,
        others: spent.others,
    })
}

const RAW_TURNS: usize = 11;
const RAW_EXCHANGES_PER_TURN: u32 = 100;

const PACED_SECONDS: u32 = 2;

/// The same at the pace of the case's ticks. The client sleeps in between, so the costs of waking up and of cold caches,
/// which are the machine's and not the agent's, are included.
fn raw_paced(raw: &Raw, per_second: usize) -> f64 {
    let gap = Duration::from_secs(1) / u32::try_from(per_second).unwrap_or(u32::MAX);
    let exchanges = u32::try_from(per_second).unwrap_or(u32::MAX) * PACED_SECONDS;
    let (began_at, before) = (now(), own_cpu_nanoseconds());
    for number in 0..exchanges {
        sleep_until(began_at + gap * number);
        raw.exchange();
    }
    (own_cpu_nanoseconds() - before) as f64 / f64::from(exchanges) / 1e3
}

/// The CPU time of one request of the minimal client in microseconds, measured several times.
fn raw_turns(raw: &Raw) -> Vec<f64> {
    (0..RAW_TURNS)
        .map(|_| {
            let before = own_cpu_nanoseconds();
            (0..RAW_EXCHANGES_PER_TURN).for_each(|_| raw.exchange());
            (own_cpu_nanoseconds() - before) as f64 / f64::from(RAW_EXCHANGES_PER_TURN) / 1e3
        })
        .collect()
}

// --- Producers that share their hosts ------------------------------------------------------------------------------

const GROUP_HOSTS: usize = 1_000;
const GROUP_TURNS: usize = 3;

/// Longer than the broker's delay of a first rebalance, 3 s, and a takeover.
const JOIN: Duration = Duration::from_secs(8);

/// Longer than a session, 6 s, and a takeover.
const SESSION: Duration = Duration::from_secs(12);

/// The price of PRODUCE_GROUP in one run, and the idle cost of a member.
fn group(stage: &Stage, time: Duration) -> bool {
    let result = compare_with_a_group(stage, time).and_then(|()| idle_member(stage, time));
    if let Err(reason) = &result {
        println!("{reason}");
    }
    result.is_ok()
}

fn well_hosts(stage: &Stage, count: usize) -> Vec<String> {
    let well = stage.site.http;
    (0..count).map(|i| format!("http://{well}/well/{i}")).collect()
}

/// Microseconds of processor time a check, and until the first record of a check.
fn turn(
    stage: &Stage,
    hosts: &[String],
    group: Option<&str>,
    time: Duration,
) -> Result<(f64, f64, u64), String> {
    let topic = stage.new_topic();
    let mut ledger = Ledger::new(&stage.servers, &topic);
    let begun = now();
    let agent = Agent::start_as(stage, &topic, hosts, "1s", group);
    while ledger.entries.iter().all(|entry| entry.late_micros.is_none()) {
        if begun.elapsed() > PATIENCE {
            return Err(format!("no check: {}", agent.log()));
        }
        ledger.read_for(Duration::from_millis(10));
    }
    let first = begun.elapsed().as_secs_f64();
    ledger.read_for(WARM_UP);
    let (count, before) = (ledger.entries.len(), Usage::now(stage, &[&agent]));
    ledger.read_for(time);
    let (checks, after) = (ledger.entries.len() - count, Usage::now(stage, &[&agent]));
    let peak_bytes = agent.status("VmHWM:") * 1_024;
    ledger.read_to_the_end_of(agent)?;
    ledger.balance(hosts)?;
    Ok((
        after.since(&before).agent / checks as f64 * 1e6,
        first,
        peak_bytes,
    ))
}

fn compare_with_a_group(stage: &Stage, time: Duration) -> Result<(), String> {
    let hosts = well_hosts(stage, GROUP_HOSTS);
    let (mut alone, mut shared) = (Vec::new(), Vec::new());
    let (mut first, mut peak) = (0.0, [0, 0]);
    for number in 0..GROUP_TURNS {
        let (micros, _, bytes) = turn(stage, &hosts, None, time)?;
        alone.push(micros);
        peak[0] = bytes;
        let (micros, seconds, bytes) = turn(stage, &hosts, Some(&format!("group-{number}")), time)?;
        shared.push(micros);
        first = seconds;
        peak[1] = bytes;
    }
    let (alone, shared) = (median(alone), median(shared));
    println!(
        "{GROUP_HOSTS} hosts at 1 s: {alone:.1} µs a check and {:.1} MB, with PRODUCE_GROUP {shared:.1} µs and {:.1} MB: {:.3}x\n\
         first record {first:.2} s after the start, of which 3 s are this broker's delay of a first rebalance",
        peak[0] as f64 / 1e6,
        peak[1] as f64 / 1e6,
        shared / alone
    );
    Ok(())
}

fn idle_member(stage: &Stage, time: Duration) -> Result<(), String> {
    let hosts = well_hosts(stage, 12);
    for group in [None, Some("idle")] {
        let topic = stage.new_topic();
        let mut ledger = Ledger::new(&stage.servers, &topic);
        let agent = Agent::start_as(stage, &topic, &hosts, "1s", group);
        ledger.read_for(JOIN);
        let before = Usage::now(stage, &[&agent]);
        ledger.read_for(time);
        let spent = Usage::now(stage, &[&agent]).since(&before).agent / time.as_secs_f64();
        ledger.read_to_the_end_of(agent)?;
        ledger.balance(&hosts)?;
        let name = if group.is_some() { "with" } else { "without" };
        println!(
            "12 hosts at 1 s, {name} PRODUCE_GROUP: {:.2} % of a core",
            spent * 100.0
        );
    }
    Ok(())
}

const FAST_HOSTS: usize = 120;
const SLOW_HOSTS: usize = 40;

/// With a real Kafka: how many ticks of a host three producers miss when one is stopped, replaced or killed.
fn takeovers(stage: &mut Stage, rounds: u64) -> bool {
    let kafka = kafka::Kafka::start();
    stage.servers = kafka.bootstrap_servers();
    let mut hosts = well_hosts(stage, FAST_HOSTS);
    hosts.extend((0..SLOW_HOSTS).map(|i| format!("http://{}{SLOW}{i}", stage.site.http)));
    println!(
        "three members, {FAST_HOSTS} hosts at 1 s and {SLOW_HOSTS} at 10 s, {PARTITIONS} partitions; missed ticks: the most of a \
         host at 1 s, the most of one at 10 s, all"
    );
    let mut result = Ok(());
    for round in 1..=rounds {
        result = result.and_then(|()| takeover(stage, &kafka, &hosts, round));
    }
    if let Err(reason) = &result {
        println!("{reason}");
    }
    result.is_ok()
}

fn takeover(stage: &Stage, kafka: &kafka::Kafka, hosts: &[String], round: u64) -> Result<(), String> {
    let topic = format!("takeover-{round}");
    kafka.create_topic(&topic, PARTITIONS);
    let mut ledger = Ledger::new(&stage.servers, &topic);
    let start = || Agent::start_as(stage, &topic, hosts, "1s", Some(&topic));
    let mut agents = vec![start(), start(), start()];
    ledger.read_for(JOIN + JOIN);

    let mut from = wall_micros();
    ledger.read_to_the_end_of(agents.remove(0))?;
    ledger.read_for(JOIN);
    ledger.say_missed("a planned stop (target 1, 0)", &mut from);
    agents.push(start());
    ledger.read_for(JOIN);
    ledger.say_missed("a start (target 1, 0)", &mut from);
    for _ in 0..agents.len() {
        agents.push(start());
        ledger.read_for(JOIN);
        ledger.read_to_the_end_of(agents.remove(0))?;
        ledger.read_for(JOIN);
        ledger.say_missed("a start and a stop (target 1 each, 0)", &mut from);
    }
    agents
        .remove(0)
        .process
        .kill()
        .map_err(|error| error.to_string())?;
    ledger.read_for(SESSION + JOIN);
    ledger.say_missed("a kill (target 6 to 8, 1)", &mut from);
    for agent in agents {
        ledger.read_to_the_end_of(agent)?;
    }
    ledger.faults_of(Vec::new())
}

/// The time from the first share that a producer takes to the last one.
const TAKING_MICROS: i64 = 500_000;

const MILLION: usize = 1_000_000;
const MILLION_INTERVAL: i64 = 300_000_000;

/// A million hosts at five minutes by three producers, one of which is killed: each tick has one record.
fn million(stage: &Stage, time: Duration) -> bool {
    let hosts = well_hosts(stage, MILLION);
    let topic = stage.new_topic();
    let mut ledger = Ledger::new(&stage.servers, &topic);
    ledger.interval = MILLION_INTERVAL;
    // Otherwise all hosts would be new, and be checked within the first ten seconds.
    let since = wall_micros();
    stage.write_ledgers("million", &topic, since);
    let start = || Agent::start_as(stage, &topic, &hosts, "5m", Some("million"));
    let mut agents = vec![start(), start(), start()];
    let begun = now();
    ledger.read_for(time / 6);
    let mut agent_seconds = 0.0;
    let mut measure = |ledger: &mut Ledger, agents: &[Agent], time: Duration| {
        let all: Vec<&Agent> = agents.iter().collect();
        let (count, before) = (ledger.entries.len(), Usage::now(stage, &all));
        ledger.read_for(time);
        agent_seconds += Usage::now(stage, &all).since(&before).agent;
        ledger.entries.len() - count
    };
    let mut records = measure(&mut ledger, &agents, time / 6);
    let mut killed = agents.remove(0);
    let _ = killed.process.kill();
    ledger.read_for(SESSION + JOIN);
    records += measure(&mut ledger, &agents, time / 6);
    ledger.read_for(time.saturating_sub(begun.elapsed()));
    let peak: u64 = agents
        .iter()
        .map(|agent| agent.status("VmHWM:") * 1_024)
        .max()
        .unwrap_or(0);
    // A fourth one takes over at the end, and records what the others left.
    agents.push(start());
    ledger.read_for(JOIN);
    let mut result = Ok(());
    let mut third_stopped_at = 0;
    for agent in agents {
        third_stopped_at = ledger.stopped_at;
        result = result.and_then(|()| ledger.read_to_the_end_of(agent));
        // The next one takes over.
        ledger.read_for(JOIN);
    }
    ledger.stopped_at = third_stopped_at;
    let result = result.and_then(|()| ledger.close(&hosts, since));
    let missed = ledger
        .entries
        .iter()
        .filter(|entry| entry.late_micros.is_none())
        .count();
    println!(
        "{MILLION} hosts at 5 min by three producers, one killed, {:.0} s: {:.0} records/s, {:.2} cores for all producers, \
         {:.0} MB each at most, {missed} ticks missed of {}",
        begun.elapsed().as_secs_f64(),
        records as f64 / (time / 3).as_secs_f64(),
        agent_seconds / (time / 3).as_secs_f64(),
        peak as f64 / 1e6,
        ledger.entries.len(),
    );
    match result {
        Ok(()) => println!("the ledger is closed: each tick of each host has one record"),
        Err(ref reason) => println!("{reason}"),
    }
    result.is_ok()
}

// --- The soak ------------------------------------------------------------------------------------------------------

const SOAK_HOSTS: usize = 2_000;

/// The time from one disturbance to the next: a reload, a freeze and an outage of Kafka, in turn.
const TROUBLE_EVERY: Duration = Duration::from_secs(15);
const FREEZE: Duration = Duration::from_millis(2_500);
const OUTAGE: Duration = Duration::from_secs(8);

/// Checks many hosts, some of which fail in different ways, through reloads, freezes and outages of Kafka. Every tick must
/// have exactly one record.
fn soak(stage: &Stage, time: Duration) -> bool {
    let topic = stage.new_topic();
    let mut ledger = Ledger::new(&stage.servers, &topic);
    let Site {
        http,
        https,
        http_hanging,
        http_closing,
        ..
    } = stage.site;
    let refusing = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .and_then(|listener| listener.local_addr())
        .expect("loopback");
    let hosts: Vec<_> = (0..SOAK_HOSTS)
        .map(|i| match i % 20 {
            0 => format!("http://{http_hanging}/hangs/{i}"),
            1 => format!("http://{http_closing}/closes/{i}"),
            2 => format!("http://{refusing}/refuses/{i}"),
            3 => format!("https://{https}/well/{i}"),
            _ => format!("http://{http}/well/{i}"),
        })
        .collect();
    let agent = Agent::start(stage, &topic, &hosts);
    let began_at = now();
    let mut troubles = 0;
    while began_at.elapsed() + TROUBLE_EVERY < time {
        ledger.read_for(TROUBLE_EVERY);
        match troubles % 3 {
            0 => agent.signal("HUP"),
            1 => {
                agent.signal("STOP");
                ledger.read_for(FREEZE);
                agent.signal("CONT");
            }
            _ => {
                stage.kafka.broker_down(1).expect("the broker is known");
                ledger.read_for(OUTAGE);
                stage.kafka.broker_up(1).expect("the broker is known");
            }
        }
        troubles += 1;
    }
    ledger.read_for(time.saturating_sub(began_at.elapsed()));
    let peak_bytes = agent.status("VmHWM:") * 1_024;
    let balance = ledger
        .read_to_the_end_of(agent)
        .and_then(|()| ledger.balance(&hosts));
    let mut outcomes: Vec<_> = ledger.outcomes.iter().collect();
    outcomes.sort();
    println!(
        "{SOAK_HOSTS} hosts, {:.0} s, {troubles} troubles (reload, freeze, outage of Kafka), {:.1} MB at most",
        began_at.elapsed().as_secs_f64(),
        peak_bytes as f64 / 1e6
    );
    for (outcome, count) in outcomes {
        println!("{count:>9} {outcome}");
    }
    match balance {
        Ok(()) => {
            println!("{:>9} ticks due, as many records", ledger.entries.len());
            true
        }
        Err(unbalanced) => {
            println!("{unbalanced}");
            false
        }
    }
}

// --- The ledger ----------------------------------------------------------------------------------------------------

/// What was read from the topic.
struct Ledger {
    consumer: BaseConsumer,
    topic: String,
    next_offsets: HashMap<i32, i64>,
    accounts: HashMap<String, Account>,
    entries: Vec<Entry>,
    outcomes: HashMap<String, u64>,
    faults: Vec<String>,
    /// The ticks that were missed, with their hosts.
    missed: Vec<(String, i64)>,
    began_at: i64,
    stopped_at: i64,
    interval: i64,
    /// The epochs of each partition, with PRODUCE_GROUP.
    epochs: HashMap<i32, Epochs>,
}

/// The records of one host.
struct Account {
    first: i64,
    last: i64,
}

struct Entry {
    scheduled_at: i64,
    /// `None` if the tick was missed.
    late_micros: Option<i64>,
    is_ok: bool,
    is_well_site: bool,
}

/// In the path of a host at ten seconds.
const SLOW: &str = "/well/slow/";
const SLOW_INTERVAL: i64 = 10 * INTERVAL_MICROS;

/// How many faults are printed; more would add nothing.
const TOLD_FAULTS: usize = 10;

impl Ledger {
    fn new(servers: &str, topic: &str) -> Self {
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", servers)
            .set("group.id", "ledger")
            .set("enable.auto.commit", "false")
            .set("auto.offset.reset", "error")
            .set("reconnect.backoff.max.ms", "500")
            .set_log_level(RDKafkaLogLevel::Emerg)
            .create()
            .expect("good settings");
        let mut from = TopicPartitionList::new();
        for partition in 0..PARTITIONS {
            from.add_partition_offset(topic, partition, Offset::Beginning)
                .expect("a good offset");
        }
        consumer.assign(&from).expect("known partitions");
        Self {
            consumer,
            topic: topic.to_owned(),
            next_offsets: (0..PARTITIONS).map(|partition| (partition, 0)).collect(),
            accounts: HashMap::new(),
            entries: Vec::new(),
            outcomes: HashMap::new(),
            faults: Vec::new(),
            missed: Vec::new(),
            began_at: wall_micros(),
            stopped_at: i64::MAX,
            interval: INTERVAL_MICROS,
            epochs: HashMap::new(),
        }
    }

    fn read_for(&mut self, time: Duration) {
        let until = now() + time;
        while let left = until.saturating_duration_since(now())
            && !left.is_zero()
        {
            self.read(left.min(Duration::from_millis(100)));
        }
    }

    /// Stops the agent, which must exit with 0, and reads the rest of the topic.
    fn read_to_the_end_of(&mut self, mut agent: Agent) -> Result<(), String> {
        self.stopped_at = wall_micros();
        agent.signal("TERM");
        let until = now() + PATIENCE;
        let status = loop {
            if let Some(status) = agent.process.try_wait().expect("our child") {
                break status;
            }
            if now() > until {
                return Err("the agent does not stop".to_owned());
            }
            self.read(Duration::from_millis(10));
        };
        if !status.success() {
            return Err(format!("the agent ended with {status}:\n{}", agent.log()));
        }
        for partition in 0..PARTITIONS {
            let ends = self.consumer.fetch_watermarks(&self.topic, partition, PATIENCE);
            let (_, end) = ends.map_err(|error| format!("partition {partition}: {error}"))?;
            while self.next_offsets[&partition] < end {
                if now() > until {
                    return Err(format!("partition {partition} is not read to its end, {end}"));
                }
                self.read(Duration::from_millis(10));
            }
        }
        Ok(())
    }

    fn read(&mut self, within: Duration) {
        // An error is an outage, which passes. A lost record would show when the ledger is verified.
        let Some(Ok(message)) = self.consumer.poll(within) else {
            return;
        };
        let expected = self
            .next_offsets
            .insert(message.partition(), message.offset() + 1);
        let mut faults = Vec::new();
        if expected != Some(message.offset()) {
            faults.push(format!(
                "offset {} where {expected:?} was expected",
                message.offset()
            ));
        }
        let value = message.payload().unwrap_or_default();
        let epochs = self.epochs.entry(message.partition()).or_default();
        let place = |sample: &sample::Sample<'_>| sample.agent.clone().unwrap_or_default().into_owned();
        match sample::decode(value) {
            Ok(sample)
                if sample
                    .epoch
                    .is_some_and(|epoch| epochs.admit(&place(&sample), epoch).is_err()) => {}
            Err(_) if Claim::decode(value).is_some() => {
                if let Some(claim) = Claim::decode(value) {
                    let _ = epochs.admit(claim.place(), claim.epoch);
                }
            }
            Ok(sample) => {
                let scheduled_at = sample.scheduled_at.map_or(0, Timestamp::unix_micros);
                let is_slow = sample.address.contains(SLOW);
                let interval = if is_slow { SLOW_INTERVAL } else { self.interval };
                let account = self.accounts.entry(sample.address.to_string());
                let account = account
                    .and_modify(|account| {
                        if scheduled_at != account.last + interval {
                            let since = (scheduled_at - account.last) as f64 / 1e6;
                            faults.push(format!(
                                "{}: a record {since} s after the one before",
                                sample.address
                            ));
                        }
                    })
                    .or_insert(Account {
                        first: scheduled_at,
                        last: scheduled_at,
                    });
                account.last = scheduled_at;
                let outcome = sample.outcome.as_deref().unwrap_or_default();
                match self.outcomes.get_mut(outcome) {
                    Some(count) => *count += 1,
                    None => drop(self.outcomes.insert(outcome.to_owned(), 1)),
                }
                if sample.started_at.is_none() {
                    self.missed.push((sample.address.to_string(), scheduled_at));
                }
                self.entries.push(Entry {
                    scheduled_at,
                    late_micros: sample.started_at.map(|at| at.unix_micros() - scheduled_at),
                    is_ok: sample.is_valid,
                    is_well_site: sample.address.contains("/well/"),
                });
            }
            Err(rejection) => faults.push(rejection.to_string()),
        }
        self.faults.append(&mut faults);
    }

    /// Every tick of every host after `since` has its record: the first one on its grid, and each later one.
    fn close(&self, hosts: &[String], since: i64) -> Result<(), String> {
        let mut faults = Vec::new();
        for host in hosts {
            let phase = phase_micros(host, self.interval);
            let first = since + self.interval - (since - phase).rem_euclid(self.interval);
            match self.accounts.get(host) {
                Some(account) if account.first != first => {
                    faults.push(format!("{host} begins at {}, not {first}", account.first));
                }
                Some(account) if account.last + self.interval <= self.stopped_at => {
                    faults.push(format!("{host} ends at {}", account.last));
                }
                None if first <= self.stopped_at => faults.push(format!("{host}: no record")),
                _ => {}
            }
        }
        self.faults_of(faults)
    }

    /// `more` are faults beside those that were noticed when the records were read.
    fn faults_of(&self, more: Vec<String>) -> Result<(), String> {
        let faults = [self.faults.as_slice(), &more].concat();
        match faults.len() {
            0 => Ok(()),
            count => Err(format!(
                "the ledger does not balance, {count} faults:\n{}",
                faults[..count.min(TOLD_FAULTS)].join("\n")
            )),
        }
    }

    /// Prints what was missed since then, and begins anew.
    fn say_missed(&self, what: &str, from: &mut i64) {
        let mut of_hosts: HashMap<&str, usize> = HashMap::new();
        for (host, _) in self.missed.iter().filter(|(_, tick)| tick >= from) {
            *of_hosts.entry(host).or_default() += 1;
        }
        let most = |is_slow: bool| {
            let of_kind = of_hosts.iter().filter(|(host, _)| host.contains(SLOW) == is_slow);
            of_kind.map(|(_, count)| *count).max().unwrap_or(0)
        };
        println!(
            "{what:<40}{:>4}{:>4}{:>6}",
            most(false),
            most(true),
            of_hosts.values().sum::<usize>()
        );
        *from = wall_micros();
    }

    /// Every tick of every host from the start to the stop has exactly one record, in order.
    fn balance(&self, hosts: &[String]) -> Result<(), String> {
        let mut faults = Vec::new();
        let starts_before = self.began_at + micros(PATIENCE);
        let first = self.accounts.values().map(|account| account.first).min();
        // With PRODUCE_GROUP, the shares are taken one after another.
        let first_until = first.unwrap_or_default() + INTERVAL_MICROS + TAKING_MICROS;
        for host in hosts {
            let fault = match self.accounts.get(host) {
                None => "no record".to_owned(),
                Some(account) if account.first >= first_until.min(starts_before) => {
                    format!("its first ticks are missing before {}", account.first)
                }
                Some(account) if account.last <= self.stopped_at - INTERVAL_MICROS => {
                    format!(
                        "its last ticks are missing, {} s",
                        (self.stopped_at - account.last) as f64 / 1e6
                    )
                }
                Some(_) => continue,
            };
            faults.push(format!("{host}: {fault}"));
        }
        if self.accounts.len() > hosts.len() {
            faults.push(format!("{} hosts of {}", self.accounts.len(), hosts.len()));
        }
        self.faults_of(faults)
    }
}

// --- The stage -----------------------------------------------------------------------------------------------------

struct Stage {
    scratch: tempfile::TempDir,
    ca_file: PathBuf,
    kafka: MockCluster<'static, DefaultProducerContext>,
    /// Of `kafka`, or of a real one.
    servers: String,
    site: Site,
    topics: Cell<usize>,
    agents: Cell<usize>,
}

impl Stage {
    fn set() -> Self {
        let scratch = tempfile::tempdir().expect("a temporary directory");
        let ca_file = scratch.path().join("ca.pem");
        let kafka = MockCluster::new(1).expect("a broker");
        Self {
            site: Site::start(&ca_file),
            servers: kafka.bootstrap_servers(),
            kafka,
            topics: Cell::new(0),
            agents: Cell::new(0),
            ca_file,
            scratch,
        }
    }

    /// A group that has recorded everything until `since`.
    fn write_ledgers(&self, group: &str, topic: &str, since: i64) {
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", &self.servers)
            .set("group.id", group)
            .create()
            .expect("good settings");
        let mut ledgers = TopicPartitionList::new();
        for partition in 0..PARTITIONS {
            let mut ledger = ledgers.add_partition(topic, partition);
            ledger.set_offset(Offset::Offset(0)).expect("a good offset");
            ledger.set_metadata(format!("1 1 {since} 0 {PARTITIONS}"));
        }
        consumer
            .commit(&ledgers, CommitMode::Sync)
            .expect("an empty group");
    }

    fn new_topic(&self) -> String {
        self.topics.set(self.topics.get() + 1);
        let name = format!("bench-{}", self.topics.get());
        self.kafka.create_topic(&name, PARTITIONS, 1).expect("a new name");
        name
    }
}

const SITE: &str = "site";

/// The site is another process, so that its CPU time is not counted as ours. It ends when its standard input closes, which
/// happens whenever this process ends.
struct Site {
    process: Child,
    http: SocketAddr,
    https: SocketAddr,
    http_hanging: SocketAddr,
    https_hanging: SocketAddr,
    http_closing: SocketAddr,
}

impl Site {
    fn start(ca_file: &Path) -> Self {
        let program = std::env::current_exe().expect("Linux knows it");
        let mut process = Command::new(program)
            .arg(SITE)
            .arg(ca_file)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("this program starts again");
        let mut line = String::new();
        BufReader::new(process.stdout.take().expect("piped"))
            .read_line(&mut line)
            .expect("it says where it is");
        let mut addresses = line
            .split_whitespace()
            .map(|address| address.parse().expect("an address"));
        let mut next = || addresses.next().expect("five addresses");
        Self {
            process,
            http: next(),
            https: next(),
            http_hanging: next(),
            https_hanging: next(),
            http_closing: next(),
        }
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        let _ = self.process.wait();
    }
}

/// A connection that is not answered, and since when.
type Held = (Instant, Box<dyn site::Stream>);

fn be_the_site(ca_file: &Path) {
    let tls = site::tls_settings(ca_file);
    let page = site::page();
    let answer = move |mut stream: Box<dyn site::Stream>| site::answer(&mut *stream, &page);
    // They are kept for longer than any check waits for a response.
    let held: Arc<Mutex<Vec<Held>>> = Arc::default();
    let hang = move |mut stream: Box<dyn site::Stream>| {
        if site::has_asked(&mut *stream) {
            let mut held = held.lock().expect("no thread panics with it");
            held.retain(|(since, _)| since.elapsed() < Duration::from_secs(2));
            held.push((now(), stream));
        }
    };
    let addresses = [
        site::serve(None, answer.clone()),
        site::serve(Some(Arc::clone(&tls)), answer),
        site::serve(None, hang.clone()),
        site::serve(Some(tls), hang),
        site::serve(None, |mut stream| {
            site::has_asked(&mut *stream);
        }),
    ];
    println!("{}", addresses.map(|address| address.to_string()).join(" "));
    let _ = std::io::stdin().read(&mut [0]);
}

/// The running program.
struct Agent {
    process: Child,
    log_file: PathBuf,
}

impl Agent {
    fn start(stage: &Stage, topic: &str, hosts: &[String]) -> Self {
        Self::start_as(stage, topic, hosts, "1s", None)
    }

    fn start_as(stage: &Stage, topic: &str, hosts: &[String], interval: &str, group: Option<&str>) -> Self {
        stage.agents.set(stage.agents.get() + 1);
        let number = stage.agents.get();
        let path = |name: &str| stage.scratch.path().join(format!("{number}.{name}"));
        let (host_file, log_file) = (path("hosts"), path("log"));
        let line = |host: &String| match host.contains(SLOW) {
            true => format!("{host} 10s\n"),
            false => format!("{host} {interval}\n"),
        };
        let lines: String = hosts.iter().map(line).collect();
        fs::write(&host_file, lines).expect("room for it");
        let process = Command::new(env!("CARGO_BIN_EXE_host-metrics"))
            .env_clear()
            .envs(group.map(|group| ("PRODUCE_GROUP", group)))
            .env("REFERENCE_HOSTS", "none")
            .current_dir(stage.scratch.path())
            .args(["produce", "-c"])
            .arg(host_file)
            .env("KAFKA_BOOTSTRAP_SERVERS", &stage.servers)
            .env("KAFKA_TOPIC", topic)
            .env("CHECK_CA_FILE", &stage.ca_file)
            .env("AGENT_NAME", "bench")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log_file).expect("room for it"))
            .spawn()
            .expect("the agent starts");
        Self { process, log_file }
    }

    fn signal(&self, name: &str) {
        let pid = self.process.id().to_string();
        let status = Command::new("kill").args(["-s", name, &pid]).status();
        assert!(status.is_ok_and(|status| status.success()), "kill -s {name}");
    }

    /// A number of /proc/PID/status.
    fn status(&self, name: &str) -> u64 {
        let path = format!("/proc/{}/status", self.process.id());
        let status = fs::read_to_string(path).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let number = line.and_then(|line| line.split_whitespace().next());
        number
            .and_then(|number| number.parse().ok())
            .expect("Linux has it")
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log_file).unwrap_or_default()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The CPU time so far.
struct Usage {
    at: Instant,
    /// Nanoseconds by thread. A thread that ends during the measurement was idle before, so its time is not missed.
    agent_threads: HashMap<PathBuf, u64>,
    /// Hundredths of a second, of all processors and of the three processes.
    machine_busy: u64,
    ours: u64,
}

struct CheckTimes {
    /// Seconds.
    agent: f64,
    /// The share of the machine that other programs used.
    others: f64,
}

impl Usage {
    fn now(stage: &Stage, agents: &[&Agent]) -> Self {
        let pids: Vec<u32> = agents.iter().map(|agent| agent.process.id()).collect();
        let threads = pids
            .iter()
            .flat_map(|pid| fs::read_dir(format!("/proc/{pid}/task")).expect("it runs"));
        let agent_threads = threads
            .flatten()
            .filter_map(|thread| Some((thread.path(), site::cpu_nanoseconds(&thread.path()).ok()?)))
            .collect();
        let processes = pids
            .into_iter()
            .chain([stage.site.process.id(), std::process::id()]);
        Self {
            at: now(),
            agent_threads,
            machine_busy: machine_busy(),
            ours: processes.map(process_busy).sum(),
        }
    }

    fn since(&self, before: &Self) -> CheckTimes {
        let agent_nanoseconds: u64 = self
            .agent_threads
            .iter()
            .map(|(thread, spent)| spent - before.agent_threads.get(thread).unwrap_or(&0))
            .sum();
        let processors = std::thread::available_parallelism().map_or(1, usize::from) as f64;
        let capacity = (self.at - before.at).as_secs_f64() * 100.0 * processors;
        let others = (self.machine_busy - before.machine_busy).saturating_sub(self.ours - before.ours) as f64;
        CheckTimes {
            agent: agent_nanoseconds as f64 / 1e9,
            others: others / capacity,
        }
    }
}

/// proc(5): user, nice, system, idle, iowait, irq, softirq, steal.
fn machine_busy() -> u64 {
    let stat = fs::read_to_string("/proc/stat").expect("Linux has it");
    let numbers = stat.lines().next().unwrap_or_default().split_whitespace().skip(1);
    let numbers: Vec<u64> = numbers.take(8).flat_map(str::parse).collect();
    numbers.iter().sum::<u64>() - numbers[3] - numbers[4]
}

/// proc(5): utime and stime are the 14th and 15th field. The second field is a name in parentheses, which may contain spaces.
fn process_busy(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
    let (_, after_name) = stat.rsplit_once(')').expect("a name in parentheses");
    let numbers = after_name.split_whitespace().skip(11).take(2);
    numbers.flat_map(str::parse::<u64>).sum()
}

fn own_cpu_nanoseconds() -> u64 {
    site::cpu_nanoseconds(Path::new("/proc/thread-self")).expect("Linux has it")
}

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

#[expect(clippy::disallowed_methods, reason = "the pace is the subject")]
fn sleep_until(then: Instant) {
    std::thread::sleep(then.saturating_duration_since(now()));
}

#[expect(clippy::disallowed_methods, reason = "a benchmark reads the clock")]
fn now() -> Instant {
    Instant::now()
}

#[expect(clippy::disallowed_methods, reason = "compared with the times in the records")]
fn wall_micros() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    micros(since)
}
