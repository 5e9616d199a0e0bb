//! Producers that share their hosts are killed and frozen: at random, together with the broker, and at each step by which a share
//! changes its owner. Whoever reads the topic, the consumer and `audit` agree that each tick is there once. Short in `make test`,
//! and SOAK_SECONDS long in `make soak`.

use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use fastrand::Rng;
use host_metrics::commands::demo::postgres::free_port;

use crate::agent::{Agent, Variables, run};
use crate::database::{Database, server};
use crate::faults::{Proxy, signal, with_clock};
use crate::fleet::{Fleet, GROUP, HOSTS, PARTITIONS, SECOND, WITHIN, end, now_micros, wait_until};
use crate::fleet_members::{metrics, wait_until_ready};
use crate::kafka::{Kafka, Listener};
use crate::kills::number;
use crate::scratch::{now, wait_for};

/// Longer than a session (6 s), so that another producer has taken the shares before this one wakes up.
const FROZEN_FOR: i64 = 15 * SECOND;

/// The clocks of the producers, in seconds.
const CLOCKS_AHEAD: [i64; 3] = [0, 2, -2];

/// How long faults occur without SOAK_SECONDS.
const FAULTS_FOR: Duration = Duration::from_secs(20);

fn consume(kafka: &Kafka, topics: &str, db: &Database) -> (Agent, Variables) {
    let variables = Variables::new()
        .kafka(&kafka.bootstrap_servers(), topics)
        .database(server())
        .with("DB_NAME", &db.name)
        .with("STATE", "off")
        .with("LOG_LEVEL", "INFO");
    (Agent::start(&["consume"], &variables), variables)
}

#[derive(Clone, Copy, Debug)]
enum Fault {
    Kill(usize),
    KillAll,
    Freeze(usize),
    /// The first is killed while the second is frozen.
    Both(usize, usize),
    Stop(usize),
    KillBroker,
    FreezeBroker,
}

impl Fault {
    fn any(rng: &mut Rng) -> Self {
        let (one, other) = (rng.usize(..3), rng.usize(1..3));
        match rng.u8(..10) {
            0..=2 => Self::Kill(one),
            3 => Self::KillAll,
            4..=5 => Self::Freeze(one),
            6 => Self::Both(one, (one + other) % 3),
            7 => Self::Stop(one),
            8 => Self::KillBroker,
            _ => Self::FreezeBroker,
        }
    }
}

#[test]
fn each_tick_counts_once_although_producers_and_broker_are_killed_and_frozen_at_random() {
    let seed = number("SOAK_SEED").unwrap_or_else(|| fastrand::u64(..));
    let faults_for = number("SOAK_SECONDS").map_or(FAULTS_FOR, Duration::from_secs);
    let mut rng = Rng::with_seed(seed);
    let mut kafka = Kafka::start();
    let fleet = Fleet::of(&kafka, "fleet_kills", GROUP, PARTITIONS, HOSTS);
    let mut db = Database::new();
    let (consumer, variables) = consume(&kafka, &fleet.topic, &db);
    let metrics = [metrics(), metrics(), metrics()];
    let start = |index: usize| {
        let variables = fleet.variables.and(&metrics[index]);
        fleet.start_with(&with_clock(&variables, CLOCKS_AHEAD[index]))
    };
    let mut members: Vec<Option<Agent>> = (0..3).map(|index| Some(start(index))).collect();
    fleet.wait_for_ticks_since(&kafka, 0, &members.iter().flatten().collect::<Vec<_>>());

    let mut first = vec![
        Fault::Both(0, 1),
        Fault::Kill(1),
        Fault::Kill(2),
        Fault::KillBroker,
    ];
    rng.shuffle(&mut first);
    let mut frozen_until = [None::<i64>; 3];
    let (mut faults, mut kills, mut freezes) = (Vec::new(), [0; 3], [0; 3]);
    let until = now() + faults_for;
    while now() < until {
        wait_until(now_micros() + rng.i64(SECOND / 2..4 * SECOND));
        for (index, member) in members.iter_mut().enumerate() {
            if let Some(agent) = member
                && frozen_until[index].take_if(|at| *at <= now_micros()).is_some()
            {
                agent.signal("CONT");
            }
            if member.is_none() && (rng.bool() || !first.is_empty()) {
                *member = Some(start(index));
            }
        }
        let fault = first.pop().unwrap_or_else(|| Fault::any(&mut rng));
        faults.push(fault);
        let mut kill = |index: usize, members: &mut [Option<Agent>]| {
            if let Some(mut agent) = members[index].take() {
                agent.kill();
                kills[index] += 1;
            }
            frozen_until[index] = None;
        };
        match fault {
            Fault::Kill(one) => kill(one, &mut members),
            Fault::KillAll => (0..3).for_each(|index| kill(index, &mut members)),
            Fault::Freeze(one) | Fault::Both(_, one) => {
                if let Fault::Both(other, _) = fault {
                    kill(other, &mut members);
                }
                if let Some(agent) = &members[one] {
                    agent.signal("STOP");
                    freezes[one] += 1;
                    frozen_until[one] = Some(now_micros() + FROZEN_FOR);
                }
            }
            Fault::Stop(one) => {
                if frozen_until[one].is_none()
                    && let Some(agent) = members[one].take()
                {
                    // Without a member it may end with records that Kafka never acknowledged.
                    wait_for(
                        WITHIN,
                        "it logs",
                        || (!agent.stderr().is_empty()).then_some(()),
                        String::new,
                    );
                    end(agent);
                }
            }
            Fault::KillBroker => kafka.restart(),
            Fault::FreezeBroker => {
                kafka.signal("STOP");
                wait_until(now_micros() + rng.i64(SECOND..10 * SECOND));
                kafka.signal("CONT");
            }
        }
    }
    for (index, member) in members.iter_mut().enumerate() {
        match member {
            Some(agent) => agent.signal("CONT"),
            None => *member = Some(start(index)),
        }
    }
    let members: Vec<Agent> = members.into_iter().flatten().collect();
    fleet.wait_for_ticks_since(
        &kafka,
        now_micros() + 5 * SECOND,
        &members.iter().collect::<Vec<_>>(),
    );
    // A producer that is not a member when it stops may leave records that Kafka never acknowledged.
    for metrics in &metrics {
        wait_until_ready(metrics, &members);
    }
    members.into_iter().for_each(Agent::stop);
    let judged = fleet.judged(&kafka);
    eprintln!("SOAK_SEED={seed} kills {kills:?}, freezes {freezes:?}, {faults:?}");
    let (most, missed) = judged.assert_whole(0);
    eprintln!(
        "{} records, {missed} missed, per host at most {most}, {} superseded, {} claims",
        judged.valid.len(),
        judged.superseded.len(),
        judged.claims
    );
    assert_eq!(judged.ticks.len(), HOSTS);
    judged.assert_stored(&fleet, &mut db, consumer);
    let (status, said) = run(&["audit"], &variables);
    assert_eq!(status, 0, "{said}");
}

const PRODUCE: i16 = 0;
const FETCH: i16 = 1;
const OFFSET_COMMIT: i16 = 8;
const OFFSET_FETCH: i16 = 9;
const JOIN_GROUP: i16 = 11;
const LEAVE_GROUP: i16 = 13;
const SYNC_GROUP: i16 = 14;

/// What the producer does when it is frozen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum While {
    /// It takes the shares of one that was killed.
    Taking,
    Owning,
    /// Another one joins.
    HandingOver,
    Stopping,
}

/// A producer is frozen at the last of these requests to Kafka.
const STEPS: [(&str, While, &[i16]); 12] = [
    ("it joins", While::Taking, &[JOIN_GROUP]),
    ("it waits for its partitions", While::Taking, &[SYNC_GROUP]),
    ("it reads the ledgers", While::Taking, &[OFFSET_FETCH]),
    ("it commits its epoch", While::Taking, &[OFFSET_COMMIT]),
    ("it appends its claim", While::Taking, &[PRODUCE]),
    ("it reads up to its claim", While::Taking, &[FETCH]),
    ("it writes missed ticks", While::Taking, &[FETCH, PRODUCE]),
    ("it writes results", While::Owning, &[PRODUCE]),
    (
        "it commits the last ledger",
        While::HandingOver,
        &[SYNC_GROUP, OFFSET_COMMIT],
    ),
    (
        "it has given back",
        While::HandingOver,
        &[SYNC_GROUP, OFFSET_COMMIT, JOIN_GROUP],
    ),
    ("it commits at a stop", While::Stopping, &[OFFSET_COMMIT]),
    ("it leaves", While::Stopping, &[LEAVE_GROUP]),
];

/// Freezes a producer when it sends a certain request.
#[derive(Default)]
struct Trap {
    state: Mutex<TrapState>,
    changed: Condvar,
}

#[derive(Default)]
struct TrapState {
    victim: Option<u32>,
    /// The rest of the requests to wait for.
    awaited: &'static [i16],
    has_caught: bool,
    /// The request reaches Kafka only after the freeze.
    holds_request: bool,
    is_over: bool,
}

impl Trap {
    fn set(&self, awaited: &'static [i16], holds_request: bool) {
        let mut state = self.state.lock().unwrap();
        state.awaited = awaited;
        state.holds_request = holds_request;
    }

    fn see(&self, request: i16) {
        let mut state = self.state.lock().unwrap();
        if state.awaited.first() != Some(&request) {
            return;
        }
        state.awaited = &state.awaited[1..];
        if state.awaited.is_empty() {
            while state.victim.is_none() {
                state = self.changed.wait(state).unwrap();
            }
            signal(&state.victim.unwrap().to_string(), "STOP");
            state.has_caught = true;
            while state.holds_request && !state.is_over {
                state = self.changed.wait(state).unwrap();
            }
        }
    }

    fn change(&self, change: impl FnOnce(&mut TrapState)) {
        change(&mut self.state.lock().unwrap());
        self.changed.notify_all();
    }
}

#[test]
fn a_producer_that_is_frozen_at_any_step_and_wakes_up_doubles_no_tick_and_leaves_none_out() {
    let until = number("SOAK_SECONDS").map(|seconds| now() + Duration::from_secs(seconds));
    let mut rng = Rng::new();
    let (mut traps, mut proxies, mut listeners) = (Vec::new(), Vec::new(), Vec::new());
    const NAMES: [&str; STEPS.len()] = [
        "L0", "L1", "L2", "L3", "L4", "L5", "L6", "L7", "L8", "L9", "L10", "L11",
    ];
    for name in NAMES {
        let (trap, port) = (Arc::new(Mutex::new(Arc::<Trap>::default())), free_port().unwrap());
        let watch = Arc::clone(&trap);
        let proxy = Proxy::start_watched(
            port,
            Arc::new(move |request| {
                let trap = Arc::clone(&watch.lock().unwrap());
                trap.see(request);
            }),
        );
        listeners.push(Listener {
            name,
            protocol: "PLAINTEXT",
            port,
            advertised_port: proxy.port,
            settings: Vec::new(),
        });
        traps.push(trap);
        proxies.push(proxy);
    }
    let kafka = Kafka::start_with_settings(&listeners, &[], "num.network.threads=1\n");
    let fleets: Vec<Fleet> = (0..STEPS.len())
        .map(|i| Fleet::of(&kafka, &format!("freeze-{i}"), &format!("frozen-{i}"), 2, 6))
        .collect();
    let topics: Vec<&str> = fleets.iter().map(|fleet| fleet.topic.as_str()).collect();
    let db = Database::new();
    let (consumer, variables) = consume(&kafka, &topics.join(","), &db);
    let mut freezes = 0;
    loop {
        thread::scope(|scope| {
            for (i, (what, when, requests)) in STEPS.into_iter().enumerate() {
                let (fleet, kafka, holds_request) = (&fleets[i], &kafka, rng.bool());
                let trap = Arc::<Trap>::default();
                *traps[i].lock().unwrap() = Arc::clone(&trap);
                let servers = format!("127.0.0.1:{}", proxies[i].port);
                scope.spawn(move || {
                    trap.set(if when == While::Taking { requests } else { &[] }, holds_request);
                    freeze(kafka, fleet, &servers, &trap, when, requests);
                    eprintln!("frozen while {what}, request held {holds_request}: whole");
                });
            }
        });
        freezes += STEPS.len();
        if until.is_none_or(|until| now() >= until) {
            break;
        }
    }
    let mut all = 0;
    for fleet in &fleets {
        let judged = fleet.judged(&kafka);
        let (most, missed) = judged.assert_whole(0);
        all += judged.valid.len() + judged.superseded.len() + judged.claims;
        eprintln!(
            "{} {} records, {missed} missed, per host at most {most}, {} superseded, {} claims",
            fleet.topic,
            judged.valid.len(),
            judged.superseded.len(),
            judged.claims
        );
    }
    eprintln!("{freezes} freezes");
    let mut db = db;
    let ends = "SELECT coalesce(sum(next_offset), 0)::text FROM host_metrics_offsets";
    wait_for(
        WITHIN,
        "everything is stored",
        || (db.one(ends) == all.to_string()).then_some(()),
        || consumer.stderr(),
    );
    consumer.stop();
    let (status, said) = run(&["audit"], &variables);
    assert_eq!(status, 0, "{said}");
}

/// A producer comes after one that was killed, and is frozen. Another one takes over. Then the first one wakes up.
fn freeze(kafka: &Kafka, fleet: &Fleet, servers: &str, trap: &Trap, when: While, requests: &'static [i16]) {
    let mut killed = fleet.start();
    fleet.wait_for_ticks_since(kafka, now_micros() + SECOND, &[&killed]);
    killed.kill();
    // Its ledgers may reach the end of the partitions; then its successor has nothing to read.
    fleet.write_void_claims(kafka, 2);
    let through_proxy = fleet.variables.clone().with("KAFKA_BOOTSTRAP_SERVERS", servers);
    let mut victim = fleet.start_with(&through_proxy);
    trap.change(|state| state.victim = Some(victim.id()));
    let mut other = None;
    if when != While::Taking {
        fleet.wait_for_ticks_since(kafka, now_micros(), &[&victim]);
        let holds_request = trap.state.lock().unwrap().holds_request;
        trap.set(requests, holds_request);
    }
    match when {
        While::Taking | While::Owning => {}
        While::HandingOver => other = Some(fleet.start()),
        While::Stopping => victim.signal("TERM"),
    }
    wait_for(
        WITHIN,
        "it is frozen",
        || trap.state.lock().unwrap().has_caught.then_some(()),
        || victim.stderr(),
    );
    let frozen_at = now_micros();
    let other = other.unwrap_or_else(|| fleet.start());
    fleet.wait_for_ticks_since(kafka, frozen_at + 8 * SECOND, &[&victim, &other]);
    wait_until(frozen_at + FROZEN_FOR);
    victim.signal("CONT");
    trap.change(|state| state.is_over = true);
    fleet.wait_for_ticks_since(kafka, now_micros() + 4 * SECOND, &[&victim, &other]);
    // It may end with records that Kafka never acknowledged: the stop may come before it is a member again.
    if when != While::Stopping {
        victim.signal("TERM");
    }
    victim.wait(WITHIN);
    other.stop();
    fleet.judged(kafka).assert_whole(0);
}
