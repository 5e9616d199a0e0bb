//! The consumer's state machine in random histories from seeds: several consumers of one group, with models of Kafka and
//! Postgres and many kinds of faults.
//!
//! Verifies that every record is stored or rejected exactly once, that the state is the fold of all rows in their order, and
//! that everything is stored once the faults stop. `SIMULATOR_SEEDS=n` runs that many histories (default
//! [`DEFAULT_SEEDS`]). If a history fails, its seed is printed, and `SIMULATOR_SEED=seed` repeats it and prints what happens.
//! The fuzz target `machine` includes this file. Two bytes of its input choose each step of a history.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use host_metrics::consume::batch::Flushed;
use host_metrics::consume::batch::{Batch, Form, NextOffset, Offset, Partition, Position, Record, Span};
use host_metrics::consume::fold::Fold;
use host_metrics::consume::fold::host::{DownWhen, Host};
use host_metrics::consume::fold::observed::Observed;
use host_metrics::consume::fold::rollup::{Key, Rollup};
use host_metrics::consume::ingest::{Action, Event, Extent, Ingest, Limits, Request};
use host_metrics::sample::{Sample, Timestamp};

const DEFAULT_SEEDS: u64 = 2_000;

/// The number of steps with faults.
const FAULTY_STEPS: usize = 400;

/// After the faults, everything must be stored within this number of steps, which is many times what is needed.
const DRAIN_STEPS: usize = 6_000;

/// More actions of one consumer in a row, without waiting, mean that it spins.
const ACTIONS_IN_A_ROW: usize = 200;

#[test]
fn every_record_is_stored_exactly_once_whatever_happens() {
    if let Some(seed) = variable("SIMULATOR_SEED") {
        History::new(seed, true).run();
        return;
    }
    let seeds = variable("SIMULATOR_SEEDS").unwrap_or(DEFAULT_SEEDS);
    let mut seen = Seen::default();
    for seed in 0..seeds {
        match catch_unwind(AssertUnwindSafe(|| History::new(seed, false).run())) {
            Ok(history) => seen.add(&history),
            Err(panic) => {
                let reason = panic
                    .downcast_ref::<String>()
                    .map(String::as_str)
                    .or_else(|| panic.downcast_ref::<&str>().copied());
                panic!(
                    "history {seed} of {seeds} failed: {}\nreplay it with SIMULATOR_SEED={seed}",
                    reason.unwrap_or("(no reason)")
                );
            }
        }
    }
    say(format_args!("{seeds} histories: {seen:?}"));
    seen.assert_everything_happened(seeds);
}

/// The histories that the fuzzer found to be different from one another.
#[test]
fn every_record_is_stored_exactly_once_in_the_histories_that_the_fuzzer_keeps() {
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus/machine");
    for file in std::fs::read_dir(corpus).unwrap() {
        let path = file.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        if catch_unwind(|| History::run_bytes(&bytes)).is_err() {
            panic!("the history of {} failed", path.display());
        }
    }
}

/// How often each kind of event happened in all histories, so that the test fails if one of them never happens.
#[derive(Debug, Default)]
struct Seen(BTreeMap<&'static str, u64>);

impl Seen {
    fn add(&mut self, history: &Self) {
        for (what, times) in &history.0 {
            *self.0.entry(what).or_default() += times;
        }
    }

    fn assert_everything_happened(&self, seeds: u64) {
        let expected = [
            "added partition",
            "answer lost",
            "applied late",
            "beyond end",
            "before beginning",
            "clean stop",
            "commit",
            "commit lost",
            "crash",
            "crash of Postgres",
            "durable",
            "fenced",
            "flush failed",
            "hang",
            "layout changed",
            "locked",
            "lost commits",
            "no position in the table",
            "open failed",
            "outage",
            "paused",
            "poison",
            "read twice",
            "rebalance",
            "recreated",
            "retention",
            "stuck",
            "synced",
            "undecodable",
            "zombie record",
        ];
        if seeds >= DEFAULT_SEEDS {
            for what in expected {
                assert!(self.0.contains_key(what), "never happened: {what}");
            }
        }
    }
}

#[expect(
    clippy::print_stdout,
    reason = "the test harness shows it where it is asked for, or for a failure"
)]
pub fn say(what: fmt::Arguments<'_>) {
    println!("{what}");
}

#[expect(clippy::disallowed_methods, reason = "the test's own switches")]
pub fn variable(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(
        value
            .parse()
            .unwrap_or_else(|_| panic!("{name}={value} is no number")),
    )
}

/// What happens to a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Good,
    /// The decoder refuses it.
    Undecodable,
    /// The table refuses it.
    Poison,
}

#[derive(Clone, Copy, Debug)]
struct Stored {
    id: u64,
    kind: Kind,
}

/// A partition in Kafka. Its offsets have gaps, like those that compaction and transactions leave.
#[derive(Debug, Default)]
struct Log {
    records: BTreeMap<i64, Stored>,
    low: i64,
    high: i64,
    /// Set if the topic was recreated while a member holds a position of the old one. The new partition must stay shorter than
    /// that position, because a longer one cannot be distinguished from the old one by offsets.
    max_high: Option<i64>,
}

/// A transaction with the positions that it moves and the records that it stores.
#[derive(Clone, Debug)]
struct Transaction {
    spans: BTreeMap<Partition, Span>,
    rows: Vec<u64>,
    rejected: Vec<u64>,
    may_be_lost: bool,
}

#[derive(Debug, Default)]
struct Postgres {
    tables: Tables,
    /// What a crash leaves, if there were commits that did not wait for the disk.
    on_disk: Option<Tables>,
    /// The number of crashes. Each ends all connections.
    crashes: u32,
    /// Transactions whose result their client does not know. They hold their locks, and commit or roll back later.
    in_doubt: Vec<Transaction>,
    away: bool,
    layout: u32,
}

#[derive(Clone, Debug, Default)]
struct Tables {
    positions: BTreeMap<Partition, NextOffset>,
    /// Whether a record is in the table (true) or in the rejected table.
    stored: BTreeMap<u64, bool>,
    /// The state, folded from the rows transaction by transaction.
    state: State,
}

/// The tables of the state.
#[derive(Clone, Debug, Default, PartialEq)]
struct State {
    hosts: BTreeMap<String, Host>,
    rollups: BTreeMap<Key, Rollup>,
}

impl State {
    fn fold(&mut self, values: &[Vec<u8>]) {
        let mut fold = Fold::default();
        for value in values {
            fold.record(Observed::decode(value).expect("the batch holds what `encode` wrote"));
        }
        let rollups = fold.take_rollups();
        fold.apply(DownWhen::Majority, &mut self.hosts);
        for (key, rollup) in rollups {
            self.rollups.entry(key).or_default().merge(&rollup);
        }
    }
}

/// The value of a good record. Each partition has one host, which is checked every second.
fn value(partition: Partition, id: u64) -> Vec<u8> {
    let is_valid = fastrand::Rng::with_seed(id).bool();
    let sample = Sample {
        address: format!("host {}", partition.number).into(),
        is_valid,
        outcome: (!is_valid).then(|| "dns_error".into()),
        scheduled_at: Timestamp::from_unix_micros(id as i64 * 1_000_000),
        interval_seconds: Some(1.0),
        latency: Some(id as f64 / 1e3),
        ..Sample::default()
    };
    let mut value = Vec::new();
    let observed = Observed::of(&sample, None).expect("it has a time");
    observed.encode(&mut value);
    value
}

#[derive(Debug)]
struct Member {
    name: u32,
    ingest: Ingest,
    layout: Option<u32>,
    /// [`Postgres::crashes`] when it connected.
    connection: u32,
    request: Option<(Request, Duration)>,
    /// The offset that Kafka's client reads next.
    fetching: BTreeMap<Partition, i64>,
    /// Changes of the assignment that this member has not seen yet.
    unseen: Vec<(bool, Partition)>,
    wait_until: Option<Duration>,
    stopping: bool,
}

pub struct History {
    seed: u64,
    trace: bool,
    rng: fastrand::Rng,
    faults: bool,
    start: Instant,
    now: Duration,
    limits: Limits,
    logs: BTreeMap<Partition, Log>,
    kinds: BTreeMap<u64, Kind>,
    /// The partition that a record was written to.
    homes: BTreeMap<u64, Partition>,
    committed: BTreeMap<Partition, NextOffset>,
    owners: BTreeMap<Partition, u32>,
    /// Records that need not be stored: expired, of a deleted topic, or before the group's start.
    waived: BTreeSet<u64>,
    recreated: BTreeSet<Partition>,
    /// Partitions whose end was too low in the last answer.
    answered_behind: BTreeSet<Partition>,
    postgres: Postgres,
    members: Vec<Member>,
    next_name: u32,
    next_id: u64,
    seen: Seen,
}

impl History {
    fn new(seed: u64, trace: bool) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        let limits = Limits {
            batch_size: rng.usize(1..=7),
            batch_wait: Duration::from_millis(rng.u64(1..50)),
            is_asynchronous: rng.bool(),
        };
        Self {
            seed,
            trace,
            faults: true,
            start: epoch(),
            now: Duration::ZERO,
            limits,
            logs: BTreeMap::new(),
            kinds: BTreeMap::new(),
            homes: BTreeMap::new(),
            committed: BTreeMap::new(),
            owners: BTreeMap::new(),
            waived: BTreeSet::new(),
            recreated: BTreeSet::new(),
            answered_behind: BTreeSet::new(),
            postgres: Postgres::default(),
            members: Vec::new(),
            next_name: 0,
            next_id: 0,
            seen: Seen::default(),
            rng,
        }
    }

    fn run(mut self) -> Seen {
        for _ in 0..self.rng.usize(1..=4) {
            self.add_partition();
        }
        for _ in 0..self.rng.usize(1..=3) {
            self.join();
        }
        for _ in 0..FAULTY_STEPS {
            self.fault_or_step();
        }
        self.drain();
        self.seen
    }

    /// A history whose steps are chosen by `bytes`, two for each. To change one step leaves the choices of the others.
    pub fn run_bytes(bytes: &[u8]) {
        let mut history = Self::new(0, false);
        history.add_partition();
        history.join();
        for step in bytes.as_chunks().0.iter().take(FAULTY_STEPS) {
            history.rng.seed(u16::from_be_bytes(*step).into());
            history.fault_or_step();
        }
        history.drain();
    }

    // The history.

    fn fault_or_step(&mut self) {
        match self.rng.u32(0..1000) {
            0..=99 => self.produce(),
            100..=104 => self.rebalance(),
            105..=107 => self.crash(),
            108..=109 => self.stop_cleanly(),
            110..=112 if self.members.len() < 4 => self.join(),
            113..=114 if self.logs.len() < 5 => {
                self.saw("added partition");
                self.add_partition();
                self.rebalance();
            }
            115..=117 => self.expire(),
            118..=119 => self.recreate(),
            120..=121 => {
                self.saw("outage");
                self.postgres.away = true;
            }
            122..=141 => self.postgres.away = false,
            142 => {
                self.saw("layout changed");
                self.postgres.layout += 1;
            }
            143..=162 => self.settle_one_in_doubt(),
            163..=165 => self.crash_postgres(),
            166..=167 => self.sync(),
            168..=362 => self.pass_time(),
            _ => self.step_somebody(),
        }
    }

    /// Without more faults, every record must be stored.
    fn drain(&mut self) {
        self.log(format_args!("— no more faults —"));
        self.faults = false;
        self.postgres.away = false;
        if self.members.is_empty() {
            self.join();
        }
        self.rebalance();
        for step in 0..DRAIN_STEPS {
            if step % 16 == 0 && self.is_drained() {
                break;
            }
            self.settle_one_in_doubt();
            for name in self.members.iter().map(|member| member.name).collect::<Vec<_>>() {
                if let Some(index) = self.members.iter().position(|member| member.name == name) {
                    self.step(index);
                }
            }
            if self.members.is_empty() {
                self.join();
            }
            self.pass_time();
        }
        let missing: Vec<_> = self.owed().collect();
        assert!(
            missing.is_empty(),
            "not drained: {missing:?} are missing, with {:#?}",
            self.members
        );
        for (id, in_table) in &self.postgres.tables.stored {
            let good = self.kinds[id] == Kind::Good;
            assert_eq!(good, *in_table, "record {id} is in the wrong table");
        }
        let rows = self
            .postgres
            .tables
            .stored
            .iter()
            .filter(|(_, in_table)| **in_table);
        let values = rows.map(|(id, _)| value(self.homes[id], *id));
        let mut at_once = State::default();
        at_once.fold(&values.collect::<Vec<_>>());
        assert_eq!(self.postgres.tables.state, at_once);
        for (partition, log) in &self.logs {
            let position = self
                .postgres
                .tables
                .positions
                .get(partition)
                .map_or(0, |next| next.0);
            let owed = log
                .records
                .iter()
                .filter(|(_, record)| !self.waived.contains(&record.id));
            let last = owed
                .max_by_key(|(offset, _)| **offset)
                .map_or(0, |(offset, _)| Offset(*offset).next().0);
            assert!(
                position >= last,
                "{partition:?} stands at {position}, its records end at {last}"
            );
        }
    }

    fn is_drained(&self) -> bool {
        self.owed().next().is_none() && self.postgres.in_doubt.is_empty()
    }

    /// Records that are still in Kafka and not stored.
    fn owed(&self) -> impl Iterator<Item = (Partition, i64, u64)> {
        self.logs
            .iter()
            .flat_map(|(partition, log)| {
                log.records
                    .iter()
                    .map(|(offset, record)| (*partition, *offset, record.id))
            })
            .filter(|(_, _, id)| !self.postgres.tables.stored.contains_key(id) && !self.waived.contains(id))
    }

    // Kafka.

    fn add_partition(&mut self) {
        let number = self.logs.len() as i32;
        let partition = Partition::new("t", number);
        let mut log = Log::default();
        if self.rng.bool() {
            // Retention has deleted records before the first consumer came.
            log.low = self.rng.i64(0..20);
            log.high = log.low;
        }
        self.logs.insert(partition, log);
        if self.rng.u8(0..4) == 0 {
            // The group has read a part of it before it used this table.
            self.produce_to(partition);
            let log = &self.logs[&partition];
            self.committed.insert(partition, NextOffset(log.high));
            let before: Vec<u64> = log.records.values().map(|record| record.id).collect();
            self.waived.extend(before);
        }
    }

    fn produce(&mut self) {
        let partition = self.some_partition();
        self.forget_the_old_topic(partition);
        self.produce_to(partition);
    }

    fn produce_to(&mut self, partition: Partition) {
        for _ in 0..self.rng.usize(1..=3) {
            let kind = match self.rng.u8(0..20) {
                0 => Kind::Poison,
                1 => Kind::Undecodable,
                _ => Kind::Good,
            };
            let gap = match self.rng.u8(0..6) {
                0 => self.rng.i64(1..4),
                _ => 0,
            };
            let log = self.logs.get_mut(&partition).unwrap();
            if log.max_high.is_some_and(|max| log.high + gap + 1 > max) {
                return;
            }
            let id = self.next_id;
            self.next_id += 1;
            log.high += gap;
            log.records.insert(log.high, Stored { id, kind });
            log.high += 1;
            self.kinds.insert(id, kind);
            self.homes.insert(id, partition);
            if kind == Kind::Undecodable {
                self.saw("undecodable");
            }
        }
        // A transaction's marker also has an offset.
        let log = self.logs.get_mut(&partition).unwrap();
        if self.rng.u8(0..5) == 0 && log.max_high.is_none() {
            log.high += 1;
        }
    }

    /// Retention deletes the oldest records, read or not.
    fn expire(&mut self) {
        let partition = self.some_partition();
        let log = self.logs.get_mut(&partition).unwrap();
        let up_to = self.rng.i64(log.low..=log.high);
        let kept = log.records.split_off(&up_to);
        let expired = std::mem::replace(&mut log.records, kept);
        log.low = up_to;
        self.waived.extend(expired.values().map(|record| record.id));
        self.saw("retention");
        self.log(format_args!("retention: {partition:?} begins at {up_to}"));
    }

    /// The topic is deleted and created again, and offsets start at 0.
    fn recreate(&mut self) {
        let partition = self.some_partition();
        let Some(position) = self.postgres.tables.positions.get(&partition) else {
            return;
        };
        if self.logs[&partition].max_high.is_some() {
            return;
        }
        let held = self.members.iter().flat_map(|member| held(member, partition));
        let in_doubt = self
            .postgres
            .in_doubt
            .iter()
            .filter_map(|transaction| transaction.spans.get(&partition))
            .flat_map(|span| [span.base.0, span.next.0]);
        let on_disk = self.postgres.on_disk.as_ref();
        let on_disk = on_disk.and_then(|tables| tables.positions.get(&partition));
        let others = held.chain(in_doubt).chain(on_disk.map(|next| next.0));
        let shortest = others.fold(position.0, i64::min);
        if shortest < 2 {
            return;
        }
        let log = self.logs.get_mut(&partition).unwrap();
        self.waived.extend(log.records.values().map(|record| record.id));
        *log = Log {
            max_high: Some(shortest - 1),
            ..Log::default()
        };
        self.recreated.insert(partition);
        self.committed.remove(&partition);
        self.saw("recreated");
        self.log(format_args!(
            "{partition:?} is made anew, at most to {} for now",
            shortest - 1
        ));
    }

    /// Once no member holds a position of the old topic, the new one may grow beyond it.
    fn forget_the_old_topic(&mut self, partition: Partition) {
        let high = self.logs[&partition].high;
        let tables = std::iter::once(&self.postgres.tables).chain(&self.postgres.on_disk);
        let positions = tables.filter_map(|tables| tables.positions.get(&partition).map(|next| next.0));
        let held = self.members.iter().flat_map(|member| held(member, partition));
        let in_doubt = self
            .postgres
            .in_doubt
            .iter()
            .any(|transaction| transaction.spans.contains_key(&partition));
        if !in_doubt && positions.chain(held).all(|position| position <= high) {
            self.logs.get_mut(&partition).unwrap().max_high = None;
        }
    }

    /// The group assigns its partitions again. The members notice it later.
    fn rebalance(&mut self) {
        if self.members.is_empty() {
            return;
        }
        self.saw("rebalance");
        for partition in self.logs.keys().copied().collect::<Vec<_>>() {
            let owner = self.members[self.rng.usize(0..self.members.len())].name;
            let previous = self.owners.insert(partition, owner);
            if previous == Some(owner) && self.rng.bool() {
                continue;
            }
            for member in &mut self.members {
                if Some(member.name) == previous {
                    member.unseen.push((false, partition));
                }
                if member.name == owner {
                    member.unseen.push((true, partition));
                }
            }
        }
    }

    // Members.

    fn join(&mut self) {
        let name = self.next_name;
        self.next_name += 1;
        self.members.push(Member {
            name,
            ingest: Ingest::new(self.limits, self.rng.u64(..)),
            layout: None,
            connection: 0,
            request: None,
            fetching: BTreeMap::new(),
            unseen: Vec::new(),
            wait_until: None,
            stopping: false,
        });
        self.log(format_args!("{name} joins"));
        self.rebalance();
    }

    /// A SIGKILL: what the member held is lost, but its request to Postgres may still be executed.
    fn crash(&mut self) {
        if self.members.is_empty() {
            return;
        }
        let index = self.rng.usize(0..self.members.len());
        let mut member = self.members.remove(index);
        self.log(format_args!("{} crashes", member.name));
        self.saw("crash");
        if let Some((Request::Flush(batch), _)) = member.request.take() {
            self.leave_in_doubt(&batch);
        }
        if self.members.is_empty() || self.rng.bool() {
            self.join();
        }
        self.rebalance();
    }

    fn stop_cleanly(&mut self) {
        if self.members.is_empty() {
            return;
        }
        let index = self.rng.usize(0..self.members.len());
        let deadline = self.instant() + Duration::from_secs(self.rng.u64(0..8));
        let now = self.instant();
        let member = &mut self.members[index];
        member.stopping = true;
        member.wait_until = None;
        member.ingest.handle(now, Event::Stop { deadline });
    }

    fn step_somebody(&mut self) {
        if self.members.is_empty() {
            self.join();
            return;
        }
        let index = self.rng.usize(0..self.members.len());
        self.step(index);
    }

    /// One iteration of a member's loop: a change of the assignment, the store's answer, or the machine's next actions.
    fn step(&mut self, index: usize) {
        let members = self.members.len();
        let now = self.instant();
        let sees = !self.members[index].unseen.is_empty() && (!self.faults || self.rng.u8(0..4) == 0);
        let member = &mut self.members[index];
        if sees {
            let (assigned, partition) = member.unseen.remove(0);
            let name = member.name;
            member.fetching.remove(&partition);
            let event = if assigned {
                Event::Assigned(vec![partition])
            } else {
                Event::Revoked(vec![partition])
            };
            member.ingest.handle(now, event);
            member.wait_until = None;
            self.log(format_args!(
                "{name} sees {partition:?} {}",
                if assigned { "come" } else { "go" }
            ));
        }
        if self.members[index]
            .request
            .as_ref()
            .is_some_and(|(_, done)| *done <= self.now)
        {
            self.answer(index);
        }
        if self.members[index]
            .wait_until
            .is_some_and(|until| until > self.now)
        {
            self.fetch(index);
        }
        if self.members.len() == members {
            self.act(index);
        }
    }

    fn act(&mut self, index: usize) {
        for _ in 0..ACTIONS_IN_A_ROW {
            let now = self.instant();
            let member = &mut self.members[index];
            let action = member.ingest.next_action(now);
            if let Err(broken) = member.ingest.invariants() {
                panic!("{broken}, with {action:?} in {member:#?}");
            }
            if !matches!(action, Action::Poll { .. } | Action::Hold { .. }) && self.trace {
                let name = self.members[index].name;
                self.log(format_args!("{name}: {action:?}"));
            }
            // A crash can come before any step.
            if self.faults && self.rng.u16(0..2_000) == 0 {
                let member = self.members.remove(index);
                self.log(format_args!("{} crashes in the middle", member.name));
                self.saw("crash");
                if let Action::Ask(Request::Flush(batch)) = action {
                    self.leave_in_doubt(&batch);
                }
                self.rebalance();
                return;
            }
            match action {
                Action::Ask(request) => {
                    if let Request::Flush(batch) = &request {
                        self.check_flush(index, batch);
                    }
                    self.request(index, request);
                }
                Action::FindStarts(partitions) => self.find_starts(index, &partitions),
                Action::FindExtents(partitions) => self.find_extents(index, &partitions),
                Action::Read(starts) => self.read(index, starts),
                Action::Pause => {
                    self.members[index].fetching.clear();
                    self.saw("paused");
                }
                Action::Commit(commits) => self.commit(index, &commits),
                Action::Tell(text) if text.contains("beyond the end") => self.saw("beyond end"),
                Action::Tell(text) if text.contains("(retention)") => self.saw("before beginning"),
                Action::Tell(_) => {}
                Action::Poll { until } => {
                    assert!(until > now, "waits for the past");
                    self.members[index].wait_until = Some(until - self.start);
                    return;
                }
                Action::Hold { until } => {
                    assert!(until > now, "waits for the past");
                    self.members[index].wait_until = None;
                    return;
                }
                Action::Stop { unwritten } => {
                    let mut member = self.members.remove(index);
                    assert!(member.stopping, "stops unasked");
                    self.log(format_args!("{} stops with {unwritten} unwritten", member.name));
                    self.saw("clean stop");
                    if let Some((Request::Flush(batch), _)) = member.request.take() {
                        self.leave_in_doubt(&batch);
                    }
                    self.rebalance();
                    return;
                }
            }
        }
        panic!("{:#?} spins", self.members[index]);
    }

    fn fetch(&mut self, index: usize) {
        let now = self.instant();
        let partitions: Vec<Partition> = self.members[index].fetching.keys().copied().collect();
        if partitions.is_empty() {
            return;
        }
        let partition = partitions[self.rng.usize(0..partitions.len())];
        let from = self.members[index].fetching[&partition];
        let log = &self.logs[&partition];
        if from < log.low || from > log.high {
            // Kafka's client stops reading this partition, and reports that without its name.
            self.members[index].fetching.remove(&partition);
            self.members[index].ingest.handle(now, Event::OutOfRange);
            return;
        }
        if self.faults && self.rng.u8(0..60) == 0 {
            self.saw("stuck");
            let member = &mut self.members[index];
            member.ingest.handle(now, Event::Stuck(vec![partition]));
            member.wait_until = None;
        }
        for _ in 0..self.rng.usize(1..=4) {
            if self.faults && self.rng.u8(0..60) == 0 {
                self.saw("read twice");
                let back = self.rng.i64(1..6);
                let fetching = self.members[index].fetching.get_mut(&partition);
                fetching
                    .into_iter()
                    .for_each(|from| *from = (*from - back).max(0));
            }
            // Prefetched records are dropped when reading starts elsewhere.
            let Some(from) = self.members[index].fetching.get(&partition).copied() else {
                return;
            };
            let Some((&offset, &stored)) = self.logs[&partition].records.range(from..).next() else {
                return;
            };
            let member = &mut self.members[index];
            member.fetching.insert(partition, offset + 1);
            let zombie = self.owners.get(&partition) != Some(&member.name);
            let layout = member.layout.expect("reads before the store was opened");
            let bytes = stored.id.to_be_bytes();
            let record = Record {
                partition,
                offset: Offset(offset),
                timestamp: None,
                key: None,
                value: Some(&bytes),
            };
            let taken = member.ingest.record(now, record, |_, row| {
                row.extend_from_slice(&layout.to_be_bytes());
                if stored.kind == Kind::Undecodable {
                    return Err("undecodable".into());
                }
                row.extend_from_slice(&bytes);
                Ok(())
            });
            if zombie && taken {
                self.saw("zombie record");
            }
            // After every record, the loop asks whether to continue polling.
            if self.faults && self.rng.u8(0..8) == 0 {
                continue;
            }
            let is_polling = matches!(self.peek(index), Some(Action::Poll { .. }));
            if !is_polling {
                return;
            }
        }
    }

    /// Whether the machine would continue polling. Its other actions are done immediately.
    fn peek(&mut self, index: usize) -> Option<Action> {
        let members = self.members.len();
        self.act(index);
        if self.members.len() != members {
            return None;
        }
        self.members[index].wait_until.map(|until| Action::Poll {
            until: self.start + until,
        })
    }

    fn check_flush(&self, index: usize, batch: &Batch) {
        let member = &self.members[index];
        let only_waits = self.limits.is_asynchronous && batch.spans.is_empty() && !batch.may_be_lost;
        assert!(only_waits || !batch.is_empty(), "an empty flush");
        assert!(batch.len() <= self.limits.batch_size, "a batch too large");
        let ours: BTreeSet<Partition> = member.ingest.assigned_partitions().collect();
        let mut last: BTreeMap<Partition, Offset> = BTreeMap::new();
        for entry in &batch.entries {
            assert!(ours.contains(&entry.partition), "flushes what is not ours");
            assert!(
                batch.spans.contains_key(&entry.partition),
                "an entry without a span"
            );
            if let Some(previous) = last.insert(entry.partition, entry.offset) {
                assert!(previous < entry.offset, "offsets do not increase");
            }
        }
        for (partition, span) in &batch.spans {
            assert_eq!(
                last.get(partition).map(|offset| offset.next()),
                Some(span.next),
                "a span that does not end behind its last record"
            );
        }
    }

    fn find_starts(&mut self, index: usize, partitions: &[Partition]) {
        self.saw("no position in the table");
        let mut starts = BTreeMap::new();
        for partition in partitions {
            if self.faults && self.rng.u8(0..4) == 0 {
                continue;
            }
            let earliest = NextOffset(self.logs[partition].low);
            let start = self.committed.get(partition).copied().unwrap_or(earliest);
            starts.insert(*partition, start);
        }
        let now = self.instant();
        self.members[index].ingest.handle(now, Event::Starts(starts));
    }

    fn find_extents(&mut self, index: usize, partitions: &[Partition]) {
        let mut extents = BTreeMap::new();
        for partition in partitions {
            if self.faults && self.rng.u8(0..4) == 0 {
                continue;
            }
            let log = &self.logs[partition];
            // A replica that is behind may answer, but not twice in a row, which the machine relies on.
            let is_behind = self.faults && self.rng.u8(0..20) == 0 && self.answered_behind.insert(*partition);
            let behind = match is_behind {
                true => self.rng.i64(0..=log.high - log.low),
                false => 0,
            };
            if !is_behind {
                self.answered_behind.remove(partition);
            }
            let extent = Extent {
                low: NextOffset(log.low),
                high: NextOffset(log.high - behind),
            };
            extents.insert(*partition, extent);
        }
        let now = self.instant();
        let member = &mut self.members[index];
        member.ingest.handle(now, Event::Extents(extents));
    }

    fn read(&mut self, index: usize, starts: Vec<(Partition, NextOffset)>) {
        if self.faults && self.rng.u8(0..10) == 0 {
            let partitions = starts.into_iter().map(|(partition, _)| partition).collect();
            let now = self.instant();
            self.members[index]
                .ingest
                .handle(now, Event::ReadFailed(partitions));
            return;
        }
        for (partition, start) in starts {
            self.members[index].fetching.insert(partition, start.0);
        }
    }

    fn commit(&mut self, index: usize, commits: &[(Partition, NextOffset)]) {
        self.saw("commit");
        let member = &self.members[index];
        let ours: BTreeSet<Partition> = member.ingest.assigned_partitions().collect();
        for (partition, next) in commits {
            assert!(ours.contains(partition), "commits what is not ours");
            let on_disk = self.postgres.on_disk.as_ref().unwrap_or(&self.postgres.tables);
            let durable = on_disk.positions.get(partition);
            assert!(
                self.recreated.contains(partition) || durable.is_some_and(|durable| next <= durable),
                "commits {next:?} of {partition:?}, while {durable:?} is durable"
            );
        }
        if self.faults && self.rng.u8(0..5) == 0 {
            self.saw("commit lost");
            return;
        }
        for (partition, next) in commits {
            if !self.recreated.contains(partition) {
                self.committed.insert(*partition, *next);
            }
        }
    }

    // Postgres.

    fn request(&mut self, index: usize, request: Request) {
        let takes = match self.rng.u8(0..10) {
            0 if self.faults => {
                self.saw("hang");
                Duration::from_millis(self.rng.u64(100..2_000))
            }
            _ => Duration::from_millis(self.rng.u64(0..20)),
        };
        let member = &mut self.members[index];
        assert!(member.request.is_none(), "two requests to the store at once");
        member.request = Some((request, self.now + takes));
    }

    fn answer(&mut self, index: usize) {
        let Some((request, _)) = self.members[index].request.take() else {
            return;
        };
        let now = self.instant();
        let is_broken = self.members[index].connection != self.postgres.crashes;
        let fails = self.postgres.away || (self.faults && self.rng.u8(0..12) == 0);
        let event = match request {
            Request::Open if fails => {
                self.saw("open failed");
                Event::StoreFailed
            }
            Request::Open => {
                self.members[index].connection = self.postgres.crashes;
                let layout = Some(self.postgres.layout);
                let previous = std::mem::replace(&mut self.members[index].layout, layout);
                Event::Opened {
                    same_layout: previous.is_none() || previous == layout,
                }
            }
            Request::Locate { .. } if fails || is_broken => Event::StoreFailed,
            Request::Locate {
                partitions,
                missing_from,
            } => {
                // A plain read sees what is committed, and waits for no lock.
                let mut found = BTreeMap::new();
                for partition in partitions {
                    if let Some(start) = missing_from.get(&partition)
                        && !self.postgres.tables.positions.contains_key(&partition)
                    {
                        self.postgres.tables.positions.insert(partition, *start);
                        self.sync();
                    }
                    if let Some(position) = self.postgres.tables.positions.get(&partition) {
                        found.insert(partition, Position::from(*position));
                    }
                }
                Event::Located(found)
            }
            Request::Flush(batch) if is_broken => Event::Flushed(batch, None),
            Request::Flush(batch) => {
                let layout = self.members[index].layout.map(u32::to_be_bytes);
                for entry in &batch.entries {
                    if let Form::Row(range) = &entry.form {
                        let encoded_for = batch.encoded[range.clone()].first_chunk().copied();
                        assert_eq!(encoded_for, layout, "a row for another layout");
                    }
                }
                let flushed = self.try_flush(&batch, fails);
                let name = self.members[index].name;
                self.log(format_args!("{name}: {flushed:?}"));
                Event::Flushed(batch, flushed)
            }
        };
        let member = &mut self.members[index];
        member.ingest.handle(now, event);
        member.wait_until = None;
    }

    /// `None` if the client does not know the result.
    fn try_flush(&mut self, batch: &Batch, fails: bool) -> Option<Flushed> {
        if fails {
            self.saw("flush failed");
            if self.rng.u8(0..3) != 0 && !self.postgres.away {
                self.leave_in_doubt(batch);
            }
            return None;
        }
        let locked = |transaction: &Transaction| {
            let mut partitions = transaction.spans.keys();
            partitions.any(|partition| batch.spans.contains_key(partition))
        };
        // The transaction with the lock ends first, or the wait ends with a timeout.
        while let Some(holder) = self.postgres.in_doubt.iter().position(locked) {
            self.saw("locked");
            if self.faults && self.rng.bool() {
                return None;
            }
            let transaction = self.postgres.in_doubt.remove(holder);
            if self.rng.bool() {
                self.apply(&transaction);
            }
        }
        let current = |partition: &Partition| self.postgres.tables.positions.get(partition).copied();
        if batch
            .spans
            .iter()
            .any(|(partition, span)| current(partition) != Some(span.base))
        {
            self.saw("fenced");
            return Some(Flushed::Fenced);
        }
        let mut poison = Vec::new();
        for (index, entry) in batch.entries.iter().enumerate() {
            let is_row = matches!(entry.form, Form::Row(_));
            if is_row && self.kinds[&id_of(batch, index)] == Kind::Poison {
                poison.push((index, "refused".to_string()));
            }
        }
        if !poison.is_empty() {
            self.saw("poison");
            let told = self.rng.usize(1..=poison.len());
            poison.truncate(told);
            return Some(Flushed::Refused(poison));
        }
        let transaction = transaction(batch);
        self.apply(&transaction);
        if self.faults && self.rng.u8(0..12) == 0 {
            self.saw("answer lost");
            return None;
        }
        self.saw("durable");
        Some(Flushed::Durable)
    }

    /// The client does not know the result: the transaction continues, has ended, or never began.
    fn leave_in_doubt(&mut self, batch: &Batch) {
        let transaction = transaction(batch);
        let free = |partition: &Partition| {
            let others = self.postgres.in_doubt.iter();
            others
                .map(|other| other.spans.contains_key(partition))
                .all(|locked| !locked)
        };
        let fits = |(partition, span): (&Partition, &Span)| {
            free(partition) && self.postgres.tables.positions.get(partition) == Some(&span.base)
        };
        let clean = transaction.rows.iter().all(|id| self.kinds[id] != Kind::Poison);
        if clean && transaction.spans.iter().all(fits) && self.rng.u8(0..4) != 0 {
            self.postgres.in_doubt.push(transaction);
        }
    }

    /// The server is killed and starts again. All connections end, and with them the transactions that are under way.
    fn crash_postgres(&mut self) {
        self.saw("crash of Postgres");
        self.postgres.crashes += 1;
        self.postgres.in_doubt.clear();
        if let Some(on_disk) = self.postgres.on_disk.take() {
            self.saw("lost commits");
            self.postgres.tables = on_disk;
        }
    }

    /// Everything that is committed is on disk, as after a commit that waited for it, or after a while.
    fn sync(&mut self) {
        if self.postgres.on_disk.take().is_some() {
            self.saw("synced");
        }
    }

    fn settle_one_in_doubt(&mut self) {
        if self.postgres.in_doubt.is_empty() {
            return;
        }
        let index = self.rng.usize(0..self.postgres.in_doubt.len());
        let transaction = self.postgres.in_doubt.remove(index);
        if self.rng.bool() {
            self.saw("applied late");
            self.apply(&transaction);
        }
    }

    fn apply(&mut self, transaction: &Transaction) {
        self.log(format_args!("applied: {transaction:?}"));
        if transaction.may_be_lost && self.postgres.on_disk.is_none() {
            self.postgres.on_disk = Some(self.postgres.tables.clone());
        }
        for (partition, span) in &transaction.spans {
            let previous = self.postgres.tables.positions.insert(*partition, span.next);
            assert_eq!(previous, Some(span.base), "the model's own locks are broken");
        }
        let rows = transaction.rows.iter().map(|id| (*id, true));
        let rejected = transaction.rejected.iter().map(|id| (*id, false));
        for (id, in_table) in rows.chain(rejected) {
            let twice = self.postgres.tables.stored.insert(id, in_table).is_some();
            assert!(!twice, "record {id} is stored twice");
        }
        if !transaction.may_be_lost {
            self.sync();
        }
        let values = transaction.rows.iter().map(|id| value(self.homes[id], *id));
        self.postgres.tables.state.fold(&values.collect::<Vec<_>>());
    }

    // Helpers.

    fn pass_time(&mut self) {
        let next_wait = self
            .members
            .iter()
            .filter_map(|member| member.wait_until)
            .chain(
                self.members
                    .iter()
                    .filter_map(|member| Some(member.request.as_ref()?.1)),
            )
            .filter(|until| *until > self.now)
            .min();
        self.now = match next_wait {
            Some(until) if self.rng.bool() => until,
            _ => self.now + Duration::from_millis(self.rng.u64(1..60)),
        };
    }

    fn instant(&self) -> Instant {
        self.start + self.now
    }

    fn some_partition(&mut self) -> Partition {
        let partitions: Vec<Partition> = self.logs.keys().copied().collect();
        partitions[self.rng.usize(0..partitions.len())]
    }

    fn saw(&mut self, what: &'static str) {
        *self.seen.0.entry(what).or_default() += 1;
    }

    fn log(&self, what: fmt::Arguments<'_>) {
        if self.trace {
            say(format_args!("[{}] {:>8.3?} {what}", self.seed, self.now));
        }
    }
}

/// All positions of a partition that a member may still use.
fn held(member: &Member, partition: Partition) -> Vec<i64> {
    let mut held: Vec<i64> = member.fetching.get(&partition).copied().into_iter().collect();
    for (other, durable, next) in member.ingest.positions() {
        if other == partition {
            held.extend([durable.0, next.0]);
        }
    }
    match &member.request {
        Some((Request::Flush(batch), _)) => {
            let span = batch.spans.get(&partition);
            held.extend(span.into_iter().flat_map(|span| [span.base.0, span.next.0]));
        }
        Some((Request::Locate { partitions, .. }, _)) if partitions.contains(&partition) => held.push(0),
        _ => {}
    }
    held
}

fn transaction(batch: &Batch) -> Transaction {
    let mut transaction = Transaction {
        spans: batch.spans.clone(),
        rows: Vec::new(),
        rejected: Vec::new(),
        may_be_lost: batch.may_be_lost,
    };
    for index in 0..batch.len() {
        let id = id_of(batch, index);
        match &batch.entries[index].form {
            Form::Row(range) => {
                let id_bytes = &batch.encoded[range.clone()][size_of::<u32>()..];
                assert_eq!(id_bytes, id.to_be_bytes(), "another record's row");
                transaction.rows.push(id);
            }
            Form::Rejected(_) => transaction.rejected.push(id),
            Form::Claim => {}
        }
    }
    transaction
}

fn id_of(batch: &Batch, index: usize) -> u64 {
    let value = batch.entries[index]
        .value
        .clone()
        .expect("every record has a value");
    let bytes = batch.record_bytes[value]
        .try_into()
        .expect("a record's value is its id");
    u64::from_be_bytes(bytes)
}

#[expect(
    clippy::disallowed_methods,
    reason = "an instant to count from; none other is ever read"
)]
fn epoch() -> Instant {
    Instant::now()
}
