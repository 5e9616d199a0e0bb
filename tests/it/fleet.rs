//! Producers that share their hosts, in a simulated world from a seed: a group coordinator, a log, producers with the real
//! schedule, outbox and shares, a consumer with the real epochs, and faults.
//!
//! Verifies that the table has each tick of each host exactly once, and that every share is owned and every due tick recorded
//! once the faults stop. `FLEET_SEEDS=n` runs that many histories (default [`DEFAULT_SEEDS`]); `FLEET_SEED=seed` repeats one
//! and prints what happens. Each of the mistakes in [`Mutant`] must be found when it is made in the world.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use host_metrics::check::target::Target;
use host_metrics::produce::host_file;
use host_metrics::produce::outbox::{Kept, LaneId, Outbox, Sequence};
use host_metrics::produce::schedule::{BacklogItem, Limits, Next, Rounds, Schedule, Tick, phase_micros};
use host_metrics::produce::share::events::{Action, CommitOutcome, Event, Range, StoredLedger};
use host_metrics::produce::share::ledger::Ledger;
use host_metrics::produce::share::shares::Shares;
use host_metrics::produce::share::tail::{Tail, Takeover};
use host_metrics::produce::share::{Share, partition_of};
use host_metrics::sample::epoch::{Epoch, Epochs};

use crate::simulator::{say, variable};

const DEFAULT_SEEDS: u64 = 2_000;

const FAULTY_STEPS: usize = 1_200;

/// The time after the faults, long enough for every session and every takeover to end.
const QUIET_MICROS: i64 = 60 * SECOND;

const SECOND: i64 = 1_000_000;
const MILLI: i64 = 1_000;

const SESSION: i64 = 6 * SECOND;
const START: i64 = 1_764_335_293 * SECOND;

const PLACE: &str = "eu";

/// A mistake that must be found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mutant {
    /// The coordinator accepts commits from any producer.
    NoGeneration,
    /// The claim is appended before the epoch is committed.
    ClaimFirst,
    /// The partition is read up to its end before the claim.
    DrainFirst,
    /// The consumer forgets the highest epochs when it is restarted.
    ForgetfulJudge,
    /// The ledger does not wait for Kafka's acknowledgements.
    LedgerAhead,
    /// The ledger has one tick too many.
    OffByOne,
}

#[test]
fn every_tick_has_exactly_one_valid_record_whatever_happens() {
    if let Some(seed) = variable("FLEET_SEED") {
        World::new(seed, None, true).run();
        return;
    }
    let seeds = variable("FLEET_SEEDS").unwrap_or(DEFAULT_SEEDS);
    let mut seen = BTreeMap::new();
    for seed in 0..seeds {
        match attempt(seed, None) {
            Ok(world) => {
                for (what, times) in world {
                    *seen.entry(what).or_insert(0) += times;
                }
            }
            Err(reason) => panic!("history {seed} failed: {reason}\nreplay it with FLEET_SEED={seed}"),
        }
    }
    say(format_args!("{seeds} histories: {seen:?}"));
    if seeds >= DEFAULT_SEEDS {
        for what in [
            "broken takeover",
            "clock ahead",
            "commit failed",
            "commit refused",
            "commit to an empty group",
            "consumer restarted",
            "doubled callback",
            "freeze",
            "group deleted",
            "handed over",
            "kafka away",
            "kill",
            "late callback",
            "lost",
            "missed",
            "once",
            "rebalance",
            "spoiled",
            "stop",
            "superseded",
            "unbroken takeover",
            "unbroken takeover after own claims",
            "written after death",
        ] {
            assert!(seen.contains_key(what), "never happened: {what}");
        }
    }
}

#[test]
fn every_planted_mistake_is_caught() {
    for mutant in [
        Mutant::NoGeneration,
        Mutant::ClaimFirst,
        Mutant::DrainFirst,
        Mutant::ForgetfulJudge,
        Mutant::LedgerAhead,
        Mutant::OffByOne,
    ] {
        let caught = (0..DEFAULT_SEEDS).find(|seed| attempt(*seed, Some(mutant)).is_err());
        say(format_args!("{mutant:?} caught by history {caught:?}"));
        assert!(caught.is_some(), "{mutant:?} was not caught");
    }
}

fn attempt(seed: u64, mutant: Option<Mutant>) -> Result<BTreeMap<&'static str, u64>, String> {
    catch_unwind(AssertUnwindSafe(|| World::new(seed, mutant, false).run())).map_err(|panic| {
        let reason = panic.downcast_ref::<String>().cloned();
        reason
            .or_else(|| panic.downcast_ref::<&str>().map(|reason| (*reason).to_owned()))
            .unwrap_or_default()
    })
}

/// A record of the log.
#[derive(Clone, Debug)]
enum Record {
    Claim(Epoch),
    Result {
        address: String,
        tick: i64,
        epoch: Epoch,
        is_missed: bool,
    },
    /// Of a run of `--once`.
    Once {
        address: String,
        tick: i64,
    },
}

/// A record on its way through the outbox.
#[derive(Clone, Debug)]
struct Draft {
    share: Share,
    tick: i64,
    address: String,
    is_missed: bool,
}

/// What a producer has given to its client for Kafka.
#[derive(Clone, Debug)]
enum Sent {
    Claim(Epoch),
    Draft(Sequence, Kept<Draft>, Epoch),
}

#[derive(Clone, Debug)]
struct InPipe {
    sent: Sent,
    /// Appended at this offset; the producer has not heard of it yet.
    offset: Option<i64>,
}

/// A message from the group to a member.
#[derive(Clone, Debug)]
enum Callback {
    Assigned(Vec<Share>),
    Revoked(Vec<Share>),
    Lost,
}

#[derive(Debug, Default)]
struct Coordinator {
    generation: i64,
    /// The members, and the time of each one's last heartbeat.
    members: BTreeMap<u32, i64>,
    owners: BTreeMap<Share, u32>,
    /// The new assignment, which begins when these members have given back their partitions.
    pending: Option<(BTreeMap<Share, u32>, BTreeSet<u32>)>,
    /// Whether a member joined or left meanwhile.
    is_stale: bool,
    offsets: BTreeMap<Share, (i64, String)>,
}

/// Messages from the timer to the publisher, in order.
#[derive(Debug)]
enum Letter {
    Record(Draft),
    Mark(i64, HashMap<Share, i64>),
    Hold(Share),
    Claim(Share, Epoch),
    /// For [`Mutant::ClaimFirst`].
    ClaimedBefore(Share, Epoch),
    Open(Takeover),
    Close(Share, i64),
    Forget(Share),
}

#[derive(Debug)]
enum ToTimer {
    Take(Takeover),
    Release(Share),
    Forget(Share),
}

#[derive(Debug)]
struct Producer {
    name: u32,
    skew: i64,
    frozen_until: i64,
    ran_at: i64,
    stopping: bool,
    // The member.
    shares: Shares,
    /// The generation that its client knows; -1 if it is not a member.
    generation: i64,
    to_member: VecDeque<Event>,
    asked: VecDeque<Action>,
    // The timer.
    schedule: Schedule<Draft>,
    under_way: Vec<(i64, Tick)>,
    to_timer: VecDeque<ToTimer>,
    releasing: Vec<(Share, i64)>,
    mark_at: i64,
    // The publisher.
    outbox: Outbox<Draft>,
    lanes: BTreeMap<Share, LaneId>,
    letters: VecDeque<Letter>,
    pipes: BTreeMap<Share, VecDeque<InPipe>>,
}

#[derive(Debug, Default)]
struct Consumer {
    read: BTreeMap<Share, (usize, Epochs)>,
    flushed: BTreeMap<Share, (usize, Epochs)>,
    /// Rows that were read and not flushed yet.
    rows: Vec<(Share, String, i64, bool)>,
}

/// The kinds of faults in a history.
#[derive(Clone, Copy, Debug)]
struct Faults {
    kill: bool,
    freeze: bool,
    kafka: bool,
    spoil: bool,
    stop: bool,
    callbacks: bool,
    delete: bool,
    consumer: bool,
    slow: bool,
}

struct World {
    trace: bool,
    mutant: Option<Mutant>,
    random: fastrand::Rng,
    now: i64,
    faults: Faults,
    kafka_is_away: bool,
    hosts: Vec<Target>,
    partitions: i32,
    logs: BTreeMap<Share, Vec<Record>>,
    coordinator: Coordinator,
    /// Messages that members have not received yet: when they arrive, the generation, and the message.
    callbacks: BTreeMap<u32, VecDeque<(i64, i64, Callback)>>,
    producers: Vec<Producer>,
    next_name: u32,
    /// Requests that dead producers have sent and that have not arrived yet.
    adrift: Vec<(Share, VecDeque<InPipe>)>,
    consumer: Consumer,
    /// The last row of each host.
    table: HashMap<String, i64>,
    missed: u64,
    /// Hosts whose share lost its ledger, which may have a gap.
    waived: HashSet<String>,
    clocks_were_ahead: bool,
    seen: BTreeMap<&'static str, u64>,
}

impl World {
    fn new(seed: u64, mutant: Option<Mutant>, trace: bool) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let partitions = random.i32(1..4);
        let mut hosts = Vec::new();
        for i in 0..random.usize(2..7) {
            let mut target = host_file::target(&format!("h{i}.example"), &[], None).unwrap();
            target.interval = Duration::from_secs(*random.choice(&[1, 1, 2, 7, 60]).unwrap());
            hosts.push(target);
        }
        let faults = Faults {
            kill: random.bool(),
            freeze: random.bool(),
            kafka: random.u8(0..3) == 0,
            spoil: random.u8(0..3) == 0,
            stop: random.bool(),
            callbacks: random.bool(),
            delete: random.u8(0..6) == 0,
            consumer: random.bool(),
            slow: random.bool(),
        };
        let shares = (0..partitions).map(|partition| Share {
            topic: "t".into(),
            partition,
        });
        let mut world = Self {
            trace,
            mutant,
            now: START,
            faults,
            kafka_is_away: false,
            hosts,
            partitions,
            logs: shares.map(|share| (share, Vec::new())).collect(),
            coordinator: Coordinator::default(),
            callbacks: BTreeMap::new(),
            producers: Vec::new(),
            next_name: 0,
            adrift: Vec::new(),
            consumer: Consumer::default(),
            table: HashMap::new(),
            missed: 0,
            waived: HashSet::new(),
            clocks_were_ahead: false,
            seen: BTreeMap::new(),
            random,
        };
        for _ in 0..world.random.usize(1..4) {
            world.start_producer();
        }
        world
    }

    fn run(mut self) -> BTreeMap<&'static str, u64> {
        for _ in 0..FAULTY_STEPS {
            self.fault();
            self.step();
        }
        self.rest();
        self.seen
    }

    /// Without more faults, every share is owned and every tick recorded within a bound.
    fn rest(&mut self) {
        self.log(format_args!("— no more faults —"));
        self.faults = Faults {
            kill: false,
            freeze: false,
            kafka: false,
            spoil: false,
            stop: false,
            callbacks: false,
            delete: false,
            consumer: false,
            slow: false,
        };
        self.kafka_is_away = false;
        if self.producers.iter().all(|producer| producer.stopping) {
            self.start_producer();
        }
        for producer in &mut self.producers {
            producer.frozen_until = 0;
        }
        let since = self.now;
        let until = since + QUIET_MICROS;
        while self.now < until {
            self.step();
            // All producers run all the time.
            for name in self.names() {
                self.run_producer(name);
            }
            self.deliver();
            self.expire_sessions();
        }
        for _ in 0..10 {
            self.consume();
        }
        let mut owned = 0;
        for producer in &self.producers {
            let (all, ours) = producer.shares.owned_of();
            assert_eq!(all, ours, "a takeover is unfinished: {:#?}", producer.shares);
            owned += all;
        }
        assert_eq!(owned, self.logs.len(), "a share has no owner");
        // A producer whose clock is behind has not seen the latest ticks. After one whose clock was ahead, the next one may wait.
        let behind = self
            .producers
            .iter()
            .map(|producer| producer.skew)
            .min()
            .unwrap_or(0)
            .min(0);
        for host in &self.hosts {
            let interval = micros(host.interval);
            let due = on_grid_before(&host.address, interval, self.now + behind - 5 * SECOND);
            // A host begins when its share is first taken, or at the ledger's time if a clock was ahead.
            let begins = since + 15 * SECOND;
            let last = self.table.get(&host.address).copied();
            let is_behind = self.producers.iter().any(|producer| producer.skew < 0);
            let ahead = (last.is_none() && is_behind) || self.clocks_were_ahead;
            let last = last.unwrap_or(begins);
            assert!(
                last >= due || due < START || (ahead && last == begins),
                "{} is recorded up to {} only, {} s ago",
                host.address,
                last - START,
                (self.now - last) / SECOND
            );
        }
    }

    fn fault(&mut self) {
        let faults = self.faults;
        let count = self.producers.len();
        match self.random.u16(0..600) {
            0..=2 if faults.kill && count > 0 => self.kill(),
            3..=6 if faults.freeze && count > 0 => {
                self.saw("freeze");
                let index = self.random.usize(0..count);
                let until = self.now + self.random.i64(SECOND / 10..15 * SECOND);
                self.producers[index].frozen_until = until;
                let name = self.producers[index].name;
                self.log(format_args!("{name} is frozen"));
            }
            7..=8 if faults.kafka => {
                self.saw("kafka away");
                self.kafka_is_away = true;
            }
            9..=29 => self.kafka_is_away = false,
            30..=32 if faults.spoil && count > 0 => {
                let index = self.random.usize(0..count);
                self.spoil(index);
            }
            33..=35 if faults.stop && count > 0 => {
                self.saw("stop");
                let index = self.random.usize(0..count);
                let producer = &mut self.producers[index];
                if !producer.stopping {
                    producer.stopping = true;
                    let until = self.now + producer.skew + 6 * SECOND;
                    producer.to_member.push_back(Event::Stop { until });
                }
            }
            36..=41 if count < 3 => self.start_producer(),
            42..=43 if faults.callbacks => self.rebalance(),
            44 if faults.delete => self.delete_group(),
            45..=50 if faults.consumer => {
                self.saw("consumer restarted");
                self.consumer.rows.clear();
                self.consumer.read = self.consumer.flushed.clone();
                if self.mutant == Some(Mutant::ForgetfulJudge) {
                    for (_, epochs) in self.consumer.read.values_mut() {
                        *epochs = Epochs::default();
                    }
                }
            }
            51..=52 if !self.kafka_is_away => self.check_once(),
            _ => {}
        }
    }

    fn step(&mut self) {
        match self.random.u8(0..10) {
            0..=2 => self.now += self.random.i64(1..300) * MILLI,
            3..=6 => {
                if let Some(name) = self.names().get(self.random.usize(0..4)) {
                    self.run_producer(*name);
                }
            }
            7 => self.deliver(),
            8 => self.consume(),
            _ => self.expire_sessions(),
        }
    }

    fn names(&self) -> Vec<u32> {
        self.producers.iter().map(|producer| producer.name).collect()
    }

    fn saw(&mut self, what: &'static str) {
        *self.seen.entry(what).or_default() += 1;
    }

    #[expect(clippy::print_stdout, reason = "asked for by FLEET_SEED")]
    fn log(&self, what: fmt::Arguments<'_>) {
        if self.trace {
            println!("{:>10.3} {what}", (self.now - START) as f64 / 1e6);
        }
    }

    // Producers.

    fn start_producer(&mut self) {
        let name = self.next_name;
        self.next_name += 1;
        let skew = match self.random.u8(0..10) {
            0 => self.random.i64(-120..120) * SECOND,
            1..=3 => self.random.i64(-2_000..2_000) * MILLI,
            _ => 0,
        };
        if skew > 0 {
            self.saw("clock ahead");
            self.clocks_were_ahead = true;
        }
        self.log(format_args!("{name} starts, clock {skew}"));
        let limits = Limits {
            max_under_way: 4,
            check_timeout: Duration::from_secs(3),
        };
        self.producers.push(Producer {
            name,
            skew,
            frozen_until: 0,
            ran_at: self.now,
            stopping: false,
            shares: Shares::default(),
            generation: -1,
            to_member: VecDeque::new(),
            asked: VecDeque::new(),
            schedule: Schedule::new(Rounds::Endless, Vec::new(), limits, self.now + skew),
            under_way: Vec::new(),
            to_timer: VecDeque::new(),
            releasing: Vec::new(),
            mark_at: 0,
            outbox: Outbox::default(),
            lanes: BTreeMap::new(),
            letters: VecDeque::new(),
            pipes: BTreeMap::new(),
        });
    }

    fn kill(&mut self) {
        self.saw("kill");
        let index = self.random.usize(0..self.producers.len());
        let producer = self.producers.remove(index);
        self.log(format_args!("{} is killed", producer.name));
        self.adrift.extend(producer.pipes);
    }

    fn with<T>(&mut self, name: u32, work: impl FnOnce(&mut Self, &mut Producer) -> T) -> Option<T> {
        let index = self.producers.iter().position(|producer| producer.name == name)?;
        let mut producer = self.producers.remove(index);
        let result = work(self, &mut producer);
        if producer.stopping && producer.shares.has_left() && producer.letters.is_empty() {
            self.log(format_args!("{name} has stopped"));
            self.adrift.extend(producer.pipes);
        } else {
            self.producers.insert(index, producer);
        }
        Some(result)
    }

    fn run_producer(&mut self, name: u32) {
        self.with(name, |world, producer| {
            if producer.frozen_until > world.now {
                return;
            }
            let now = world.now + producer.skew;
            let asleep = world.now - std::mem::replace(&mut producer.ran_at, world.now);
            if asleep > 5 * SECOND {
                let all = producer.shares.all();
                producer.shares.handle(now, Event::InDoubt(all));
            }
            // Its threads run in any order, each often or rarely.
            for _ in 0..4 {
                match world.random.u8(0..4) {
                    0 => world.be_member(producer),
                    1 => world.be_timer(producer),
                    2 => world.be_publisher(producer),
                    _ => world.hear_of_deliveries(producer),
                }
            }
        });
    }

    fn be_member(&mut self, producer: &mut Producer) {
        let now = self.now + producer.skew;
        if !self.kafka_is_away {
            match self.coordinator.members.get_mut(&producer.name) {
                Some(heard) if producer.generation != -1 => *heard = self.now,
                _ => {
                    let is_lost =
                        |(_, _, callback): &(i64, i64, Callback)| matches!(callback, Callback::Lost);
                    let waits = self
                        .callbacks
                        .entry(producer.name)
                        .or_default()
                        .iter()
                        .any(is_lost);
                    let is_member = producer.generation != -1;
                    if is_member && !waits {
                        // The group has removed it, which it learns now.
                        let at = self.now + self.random_delay();
                        self.callbacks
                            .insert(producer.name, VecDeque::from([(at, -1, Callback::Lost)]));
                    } else if !is_member && !producer.stopping {
                        // It joins with a new member ID.
                        producer.generation = 0;
                        self.callbacks.remove(&producer.name);
                        self.coordinator.owners.retain(|_, owner| *owner != producer.name);
                        // The coordinator no longer waits for the old member to give partitions back.
                        if let Some((_, waiting)) = &mut self.coordinator.pending {
                            waiting.remove(&producer.name);
                        }
                        self.coordinator.members.insert(producer.name, self.now);
                        self.rebalance();
                    }
                }
            }
        } else if self
            .coordinator
            .members
            .get(&producer.name)
            .is_some_and(|heard| self.now - heard > SESSION)
            && producer.generation > 0
        {
            // The time of its own clock.
            self.callbacks
                .insert(producer.name, VecDeque::from([(self.now, -1, Callback::Lost)]));
        }
        let now_here = self.now;
        let next = self.callbacks.get_mut(&producer.name).and_then(|callbacks| {
            callbacks
                .front()
                .is_some_and(|(at, _, _)| *at <= now_here)
                .then(|| callbacks.pop_front())?
        });
        if let Some((_, generation, callback)) = next {
            self.log(format_args!(
                "{} hears {callback:?} of generation {generation}",
                producer.name
            ));
            producer.generation = generation;
            let event = match callback {
                Callback::Assigned(shares) => Event::Assigned(shares),
                Callback::Revoked(shares) => Event::Revoked(shares),
                Callback::Lost => {
                    self.saw("lost");
                    Event::Lost(self.logs.keys().cloned().collect())
                }
            };
            producer.shares.handle(now, event);
        }
        if let Some(event) = producer.to_member.pop_front() {
            producer.shares.handle(now, event);
        }
        // One request to Kafka is in progress at a time, and its answer takes a while.
        if let Some(asked) = producer.asked.pop_front() {
            self.answer(producer, asked, now);
        }
        for _ in 0..100 {
            match producer.shares.next_action(now) {
                Action::Wait { .. } => return,
                Action::Claim { share, epoch } => {
                    if self.mutant != Some(Mutant::ClaimFirst) {
                        producer.letters.push_back(Letter::Claim(share, epoch));
                        continue;
                    }
                    let log = &self.logs[&share];
                    producer
                        .letters
                        .push_back(Letter::ClaimedBefore(share.clone(), epoch));
                    let at = log
                        .iter()
                        .rposition(|record| matches!(record, Record::Claim(claimed) if *claimed == epoch));
                    producer.to_member.push_back(Event::Claimed {
                        share,
                        epoch,
                        offset: at.map(|at| at as i64).ok_or_else(String::new),
                    });
                }
                Action::Hold(share) => producer.letters.push_back(Letter::Hold(share)),
                Action::Take(takeover) => {
                    self.log(format_args!(
                        "{} takes {} with {:?}, unbroken {}",
                        producer.name, takeover.share, takeover.ledger, takeover.is_unbroken
                    ));
                    self.saw(match takeover.is_unbroken {
                        true => "unbroken takeover",
                        false => "broken takeover",
                    });
                    let lane = producer.lanes.get(&takeover.share);
                    let before = lane.and_then(|lane| producer.outbox.epoch(*lane));
                    if takeover.is_unbroken && before < Some(takeover.tail.epoch()) {
                        self.saw("unbroken takeover after own claims");
                    }
                    producer.to_timer.push_back(ToTimer::Take(takeover));
                }
                Action::Release(share) => producer.to_timer.push_back(ToTimer::Release(share)),
                Action::Forget(share) | Action::Abandon(share) => {
                    producer.to_timer.push_back(ToTimer::Forget(share))
                }
                Action::GiveBack => {
                    self.saw("handed over");
                    self.give_back(producer.name);
                }
                Action::Leave => {
                    self.coordinator.members.remove(&producer.name);
                    self.coordinator.owners.retain(|_, owner| *owner != producer.name);
                    producer.generation = -1;
                    self.rebalance();
                }
                Action::Commit(ledgers) => {
                    if self.mutant == Some(Mutant::ClaimFirst) {
                        for (share, ledger) in &ledgers {
                            let log = self.logs.get_mut(share).unwrap();
                            let is_claimed = log.iter().any(
                                |record| matches!(record, Record::Claim(epoch) if *epoch == ledger.epoch),
                            );
                            if !is_claimed {
                                log.push(Record::Claim(ledger.epoch));
                            }
                        }
                    }
                    producer.asked.push_back(Action::Commit(ledgers));
                }
                action => producer.asked.push_back(action),
            }
        }
        panic!("the member spins: {:#?}", producer.shares);
    }

    fn answer(&mut self, producer: &mut Producer, asked: Action, now: i64) {
        let fails = self.kafka_is_away || (self.faults.kafka && self.random.u8(0..20) == 0);
        let event = match asked {
            Action::ReadLedgers(_) if fails => Event::Ledgers(BTreeMap::new()),
            Action::ReadLedgers(shares) => Event::Ledgers(
                shares
                    .into_iter()
                    .map(|share| {
                        let found = match self.coordinator.offsets.get(&share) {
                            Some((offset, metadata)) => {
                                StoredLedger::Ledger(Ledger::parse(*offset, metadata).unwrap())
                            }
                            None => StoredLedger::Missing {
                                low: 0,
                                high: self.logs[&share].len() as i64,
                                partitions: self.partitions,
                            },
                        };
                        (share, found)
                    })
                    .collect(),
            ),
            Action::ReadTail(range) => Event::TailRead {
                tail: (!fails).then(|| self.read_tail(&range)),
                share: range.share,
                epoch: range.epoch,
            },
            Action::Commit(ledgers) => {
                let is_member = self.coordinator.members.contains_key(&producer.name)
                    && self.coordinator.generation == producer.generation;
                // An empty group takes commits of a client that is not a member.
                let is_unasked = producer.generation == -1 && self.coordinator.members.is_empty();
                if is_unasked {
                    self.saw("commit to an empty group");
                }
                let takes_it = is_member || is_unasked || self.mutant == Some(Mutant::NoGeneration);
                let outcome = match (fails, takes_it) {
                    (true, _) => CommitOutcome::Failed,
                    (false, false) => CommitOutcome::Refused,
                    (false, true) => CommitOutcome::Done,
                };
                self.saw(match outcome {
                    CommitOutcome::Done => "committed",
                    CommitOutcome::Refused => "commit refused",
                    CommitOutcome::Failed => "commit failed",
                });
                // The effect of a failed request is unknown.
                if outcome == CommitOutcome::Done
                    || (fails && takes_it && !self.kafka_is_away && self.random.bool())
                {
                    self.log(format_args!("{} commits {ledgers:?}", producer.name));
                    for (share, ledger) in ledgers {
                        let mut ledger = ledger;
                        if self.mutant == Some(Mutant::OffByOne) && ledger.whole_before > 0 {
                            ledger.whole_before += SECOND;
                        }
                        self.coordinator
                            .offsets
                            .insert(share, (ledger.from, ledger.metadata(PLACE)));
                    }
                }
                Event::Committed(outcome)
            }
            other => panic!("{other:?} is no question"),
        };
        producer.shares.handle(now, event);
    }

    fn read_tail(&mut self, range: &Range) -> Tail {
        let mut tail = Tail::new(PLACE, range.epoch_at_from);
        let log = &self.logs[&range.share];
        let mut to = usize::try_from(range.to).unwrap().min(log.len());
        if self.mutant == Some(Mutant::DrainFirst) {
            to = to.saturating_sub(4);
        }
        let from = usize::try_from(range.from).unwrap().min(to);
        for record in &log[from..to] {
            match record {
                Record::Claim(epoch) => tail.read_claim(PLACE, *epoch),
                Record::Result {
                    address, tick, epoch, ..
                } => tail.read_result(
                    PLACE,
                    Some(*epoch),
                    address,
                    *tick,
                    Some(self.interval_of(address)),
                ),
                Record::Once { address, tick } => {
                    tail.read_result(PLACE, None, address, *tick, Some(self.interval_of(address)));
                }
            }
        }
        tail
    }

    fn be_timer(&mut self, producer: &mut Producer) {
        let now = self.now + producer.skew;
        let partitions = self.partitions;
        for order in producer.to_timer.drain(..) {
            match order {
                ToTimer::Take(takeover) => {
                    if !takeover.is_unbroken {
                        producer.schedule.remove_share(&takeover.share);
                        let hosts = self
                            .hosts
                            .iter()
                            .filter(|host| share_of(&host.address, partitions) == takeover.share);
                        producer.schedule.add_share(
                            &takeover.share,
                            hosts.cloned().map(Arc::new),
                            |address| takeover.recorded(address),
                            now,
                        );
                    }
                    producer.letters.push_back(Letter::Open(takeover));
                }
                ToTimer::Release(share) => {
                    producer.schedule.finish_share(&share, now);
                    producer.releasing.push((share, now + 300 * MILLI));
                }
                ToTimer::Forget(share) => {
                    producer.releasing.retain(|(releasing, ..)| *releasing != share);
                    producer.schedule.remove_share(&share);
                    producer.letters.push_back(Letter::Forget(share));
                }
            }
        }
        let slow = self.faults.slow;
        while let Next::Start(tick) = producer.schedule.next(now, |_| true) {
            let takes = match self.random.u8(0..20) {
                0 if slow => self.random.i64(0..4) * SECOND,
                _ => self.random.i64(1..400) * MILLI,
            };
            producer.under_way.push((now + takes, tick));
        }
        let done: Vec<_> = producer
            .under_way
            .extract_if(.., |(end, _)| *end <= now)
            .collect();
        for (_, tick) in done {
            let draft = Draft {
                share: tick.share.clone().unwrap(),
                tick: tick.scheduled_at_micros,
                address: tick.target.address.clone(),
                is_missed: false,
            };
            if let Some(draft) = producer.schedule.finished(&tick, draft) {
                producer.letters.push_back(Letter::Record(draft));
            }
        }
        drain_late(producer);
        for (share, until) in std::mem::take(&mut producer.releasing) {
            if producer.schedule.has_open(&share) && now < until {
                producer.releasing.push((share, until));
                continue;
            }
            let ends_at = producer.schedule.open_since()[&share];
            producer.schedule.remove_share(&share);
            producer.letters.push_back(Letter::Close(share, ends_at));
        }
        if now >= producer.mark_at {
            producer.mark_at = now + SECOND;
            producer
                .letters
                .push_back(Letter::Mark(now + 1, producer.schedule.open_since()));
        }
    }

    fn be_publisher(&mut self, producer: &mut Producer) {
        for letter in std::mem::take(&mut producer.letters) {
            self.take_letter(producer, letter);
        }
        let Producer {
            outbox,
            lanes,
            pipes,
            to_member,
            ..
        } = producer;
        for (share, lane) in lanes {
            while let Some((sequence, kept)) = outbox.next_to_send(*lane) {
                let epoch = outbox.epoch(*lane).unwrap();
                pipes.entry(share.clone()).or_default().push_back(InPipe {
                    sent: Sent::Draft(sequence, kept, epoch),
                    offset: None,
                });
            }
            if let Some(ledger) = outbox.last_ledger(*lane) {
                to_member.push_back(Event::Released {
                    share: share.clone(),
                    ledger,
                });
            }
        }
    }

    fn take_letter(&mut self, producer: &mut Producer, letter: Letter) {
        let Producer {
            outbox,
            lanes,
            pipes,
            to_member,
            ..
        } = producer;
        let mut lane_of = |outbox: &mut Outbox<Draft>, share: &Share| -> LaneId {
            *lanes.entry(share.clone()).or_insert_with(|| outbox.add_lane())
        };
        match letter {
            Letter::Record(draft) => {
                let lane = lane_of(outbox, &draft.share);
                outbox.take(lane, draft.tick, draft);
            }
            Letter::Mark(now, open) => {
                for (share, lane) in lanes.iter() {
                    let open_since = open.get(share).copied().unwrap_or(i64::MAX);
                    if let Some(mut ledger) = outbox.ledger(*lane, open_since, now) {
                        if self.mutant == Some(Mutant::LedgerAhead) {
                            ledger.whole_before = open_since.min(now);
                        }
                        to_member.push_back(Event::Progress {
                            share: share.clone(),
                            ledger,
                        });
                    }
                }
            }
            Letter::Hold(share) => {
                let lane = lane_of(outbox, &share);
                outbox.doubt(lane);
            }
            Letter::Claim(share, epoch) => {
                let lane = lane_of(outbox, &share);
                // The lane may still be open: the timer thread may not have passed on yet that the share was given up.
                outbox.claim(lane, epoch);
                pipes.entry(share).or_default().push_back(InPipe {
                    sent: Sent::Claim(epoch),
                    offset: None,
                });
            }
            Letter::ClaimedBefore(share, epoch) => {
                let lane = lane_of(outbox, &share);
                outbox.claim(lane, epoch);
            }
            Letter::Open(takeover) => {
                let lane = lane_of(outbox, &takeover.share);
                outbox.take_share(lane, &takeover, |draft| &draft.address);
            }
            Letter::Close(share, ends_at) => {
                let lane = lane_of(outbox, &share);
                outbox.end_share(lane, ends_at);
            }
            Letter::Forget(share) => {
                let lane = lane_of(outbox, &share);
                outbox.forget_share(lane);
            }
        }
    }

    /// The producer's client reports what Kafka has acknowledged.
    fn hear_of_deliveries(&mut self, producer: &mut Producer) {
        if self.kafka_is_away {
            return;
        }
        for (share, pipe) in &mut producer.pipes {
            while let Some(InPipe {
                offset: Some(offset), ..
            }) = pipe.front()
            {
                let offset = *offset;
                match pipe.pop_front().unwrap().sent {
                    Sent::Claim(epoch) => producer.to_member.push_back(Event::Claimed {
                        share: share.clone(),
                        epoch,
                        offset: Ok(offset),
                    }),
                    Sent::Draft(_, kept, _) => {
                        producer
                            .outbox
                            .done(producer.lanes[share], kept.tick, Some(offset));
                    }
                }
            }
        }
    }

    /// The broker has forgotten what this producer sent, and returns all of it, stored or not.
    fn spoil(&mut self, index: usize) {
        let mut producer = self.producers.remove(index);
        self.saw("spoiled");
        self.log(format_args!("{} is spoiled", producer.name));
        for (share, pipe) in std::mem::take(&mut producer.pipes) {
            let lane = producer.lanes[&share];
            producer.outbox.doubt(lane);
            for in_pipe in pipe {
                match in_pipe.sent {
                    Sent::Claim(epoch) => producer.to_member.push_back(Event::Claimed {
                        share: share.clone(),
                        epoch,
                        offset: Err(String::new()),
                    }),
                    Sent::Draft(sequence, kept, _) => producer.outbox.came_back(lane, sequence, kept),
                }
            }
        }
        let shares = self.logs.keys().cloned().collect();
        producer.to_member.push_back(Event::InDoubt(shares));
        self.producers.insert(index, producer);
    }

    // Kafka.

    /// Appends some of the records in flight.
    fn deliver(&mut self) {
        if self.kafka_is_away {
            return;
        }
        let keep = self.random.u8(0..4);
        for producer in &mut self.producers {
            for (share, pipe) in &mut producer.pipes {
                for in_pipe in pipe.iter_mut().filter(|in_pipe| in_pipe.offset.is_none()) {
                    if self.random.u8(0..4) < keep {
                        break;
                    }
                    in_pipe.offset = Some(append(&mut self.logs, share, &in_pipe.sent));
                }
            }
        }
        // Records of a dead producer arrive late or never.
        for (share, mut pipe) in std::mem::take(&mut self.adrift) {
            match (pipe.pop_front(), self.random.u8(0..6)) {
                (Some(in_pipe), 0..=3) => {
                    if in_pipe.offset.is_none() {
                        append(&mut self.logs, &share, &in_pipe.sent);
                        *self.seen.entry("written after death").or_default() += 1;
                    }
                    self.adrift.push((share, pipe));
                }
                (Some(in_pipe), 4) => {
                    pipe.push_front(in_pipe);
                    self.adrift.push((share, pipe));
                }
                _ => {}
            }
        }
    }

    fn expire_sessions(&mut self) {
        if self.kafka_is_away {
            return;
        }
        let now = self.now;
        let before = self.coordinator.members.len();
        self.coordinator
            .members
            .retain(|_, heard| now - *heard <= SESSION);
        if self.coordinator.members.len() < before {
            let Coordinator { members, owners, .. } = &mut self.coordinator;
            owners.retain(|_, owner| members.contains_key(owner));
            self.rebalance();
        }
    }

    fn random_delay(&mut self) -> i64 {
        if !self.faults.callbacks {
            return 0;
        }
        self.saw("late callback");
        self.random.i64(0..3_000) * MILLI
    }

    /// A cooperative rebalance: members first give back partitions that others will get, then those are assigned.
    fn rebalance(&mut self) {
        self.coordinator.is_stale = true;
        let Coordinator { pending, members, .. } = &mut self.coordinator;
        if let Some((_, waiting)) = pending {
            waiting.retain(|name| members.contains_key(name));
            if !waiting.is_empty() {
                return;
            }
        }
        self.saw("rebalance");
        self.coordinator.is_stale = false;
        let members: Vec<u32> = self.coordinator.members.keys().copied().collect();
        self.coordinator.generation += 1;
        self.coordinator.pending = None;
        if members.is_empty() {
            self.coordinator.owners.clear();
            return;
        }
        let most = self.logs.len().div_ceil(members.len());
        let mut target = BTreeMap::new();
        let mut count: BTreeMap<u32, usize> = BTreeMap::new();
        for share in self.logs.keys() {
            let stays = self.coordinator.owners.get(share).copied();
            let stays = stays.filter(|owner| count.get(owner).copied().unwrap_or(0) < most);
            if let Some(owner) = stays {
                *count.entry(owner).or_default() += 1;
                target.insert(share.clone(), owner);
            }
        }
        for share in self.logs.keys() {
            if !target.contains_key(share) {
                let least = members
                    .iter()
                    .min_by_key(|name| count.get(*name).copied().unwrap_or(0));
                let owner = *least.unwrap();
                *count.entry(owner).or_default() += 1;
                target.insert(share.clone(), owner);
            }
        }
        let generation = self.coordinator.generation;
        let mut waiting = BTreeSet::new();
        for name in &members {
            let owners = &self.coordinator.owners;
            let is_taken =
                |share: &&Share| owners.get(*share) == Some(name) && target.get(*share) != Some(name);
            let taken: Vec<Share> = self.logs.keys().filter(is_taken).cloned().collect();
            if taken.is_empty() {
                self.call(*name, generation, Callback::Assigned(Vec::new()));
            } else {
                waiting.insert(*name);
                self.call(*name, generation, Callback::Revoked(taken));
            }
        }
        self.coordinator.pending = Some((target, waiting));
        self.deal();
    }

    fn give_back(&mut self, name: u32) {
        if let Some((target, waiting)) = &mut self.coordinator.pending
            && waiting.remove(&name)
        {
            let target = target.clone();
            self.coordinator
                .owners
                .retain(|share, owner| *owner != name || target.get(share) == Some(&name));
            self.deal();
        }
    }

    fn deal(&mut self) {
        let Some((target, _)) = self
            .coordinator
            .pending
            .take_if(|(_, waiting)| waiting.is_empty())
        else {
            return;
        };
        self.coordinator.generation += 1;
        let generation = self.coordinator.generation;
        let members: Vec<u32> = self.coordinator.members.keys().copied().collect();
        for name in members {
            let owners = &self.coordinator.owners;
            let is_new =
                |(share, owner): &(&Share, &u32)| **owner == name && owners.get(*share) != Some(&name);
            let new: Vec<Share> = target
                .iter()
                .filter(is_new)
                .map(|(share, _)| share.clone())
                .collect();
            self.call(name, generation, Callback::Assigned(new));
        }
        self.coordinator.owners = target;
        let Coordinator {
            members,
            owners,
            is_stale,
            ..
        } = &mut self.coordinator;
        owners.retain(|_, owner| members.contains_key(owner));
        if *is_stale {
            self.rebalance();
        }
    }

    fn call(&mut self, name: u32, generation: i64, callback: Callback) {
        let delay = self.random_delay();
        let is_doubled = self.faults.callbacks && self.random.u8(0..10) == 0;
        if is_doubled {
            self.saw("doubled callback");
        }
        let now = self.now;
        let callbacks = self.callbacks.entry(name).or_default();
        if is_doubled {
            callbacks.push_back((now + delay, generation, callback.clone()));
        }
        callbacks.push_back((now + delay, generation, callback));
    }

    /// The group loses its offsets, its members have to join again, and its generations start again.
    fn delete_group(&mut self) {
        self.saw("group deleted");
        self.coordinator = Coordinator::default();
        self.waived
            .extend(self.hosts.iter().map(|host| host.address.clone()));
    }

    /// A run of `--once` with the same AGENT_NAME checks all hosts.
    fn check_once(&mut self) {
        self.saw("once");
        for host in &self.hosts {
            if on_grid_before(&host.address, micros(host.interval), self.now) < self.now {
                let log = self
                    .logs
                    .get_mut(&share_of(&host.address, self.partitions))
                    .unwrap();
                log.push(Record::Once {
                    address: host.address.clone(),
                    tick: self.now,
                });
            }
        }
    }

    fn interval_of(&self, address: &str) -> i64 {
        let host = self.hosts.iter().find(|host| host.address == address).unwrap();
        micros(host.interval)
    }

    // The consumer.

    fn consume(&mut self) {
        let shares: Vec<Share> = self.logs.keys().cloned().collect();
        for share in shares {
            let (at, epochs) = self.consumer.read.entry(share.clone()).or_default();
            for record in &self.logs[&share][*at..] {
                if self.trace {
                    say(format_args!("{share} {record:?}"));
                }
                match record {
                    Record::Claim(epoch) => {
                        let _ = epochs.admit(PLACE, *epoch);
                    }
                    // Its row has a time of its own.
                    Record::Once { .. } => {}
                    Record::Result {
                        address,
                        tick,
                        epoch,
                        is_missed,
                    } => match epochs.admit(PLACE, *epoch) {
                        Ok(()) => {
                            self.consumer
                                .rows
                                .push((share.clone(), address.clone(), *tick, *is_missed))
                        }
                        Err(_) => *self.seen.entry("superseded").or_default() += 1,
                    },
                }
            }
            *at = self.logs[&share].len();
        }
        if self.random.bool() || !self.faults.consumer {
            self.consumer.flushed = self.consumer.read.clone();
            for (_, address, tick, is_missed) in std::mem::take(&mut self.consumer.rows) {
                self.store(&address, tick, is_missed);
            }
        }
    }

    /// Verifies the table.
    fn store(&mut self, address: &str, tick: i64, is_missed: bool) {
        self.log(format_args!("    {address} {} missed {is_missed}", tick - START));
        let interval = self.interval_of(address);
        if let Some(last) = self.table.insert(address.to_owned(), tick) {
            assert!(
                tick > last,
                "{address} has {} again after {}",
                tick - START,
                last - START
            );
            let expected = on_grid_before(address, interval, last) + interval;
            if tick != expected {
                let may_be = self.waived.remove(address);
                assert!(
                    may_be,
                    "{address} has {} after {}: {} is missing",
                    tick - START,
                    last - START,
                    expected - START
                );
            }
        }
        if is_missed {
            self.missed += 1;
            self.saw("missed");
        }
    }
}

fn drain_late(producer: &mut Producer) {
    let mut late = Vec::new();
    while producer.schedule.has_backlog() {
        producer.schedule.drain(1_000, |_| true, &mut late);
    }
    for late in late {
        producer.letters.push_back(Letter::Record(match late {
            BacklogItem::Missed(missed) => Draft {
                share: missed.share.clone().unwrap(),
                tick: missed.scheduled_at_micros,
                address: missed.target.address.clone(),
                is_missed: true,
            },
            BacklogItem::Result(draft) => draft,
        }));
    }
}

fn append(logs: &mut BTreeMap<Share, Vec<Record>>, share: &Share, sent: &Sent) -> i64 {
    let log = logs.get_mut(share).unwrap();
    log.push(match sent {
        Sent::Claim(epoch) => Record::Claim(*epoch),
        Sent::Draft(_, kept, epoch) => Record::Result {
            address: kept.record.address.clone(),
            tick: kept.tick,
            epoch: *epoch,
            is_missed: kept.record.is_missed,
        },
    });
    log.len() as i64 - 1
}

fn share_of(address: &str, partitions: i32) -> Share {
    Share {
        topic: "t".into(),
        partition: partition_of(address.as_bytes(), partitions),
    }
}

fn on_grid_before(address: &str, interval: i64, at: i64) -> i64 {
    let phase = phase_micros(address, interval);
    at - (at - phase).rem_euclid(interval)
}

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap()
}
