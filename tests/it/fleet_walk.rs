//! Every interleaving of two producers that share one host, up to a bound.
//!
//! The producers have the real machine, outbox and epochs. The world around them (the coordinator, the log, time) is as small as
//! possible, and each of its steps may come at any moment or never. What a producer does without a request belongs to the step
//! before it; the races between its threads are tested in `fleet`.

use std::collections::{BTreeMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};

use host_metrics::produce::outbox::{LaneId, Outbox};
use host_metrics::produce::share::Share;
use host_metrics::produce::share::events::{Action, CommitOutcome, Event, StoredLedger};
use host_metrics::produce::share::ledger::Ledger;
use host_metrics::produce::share::shares::Shares;
use host_metrics::produce::share::tail::Tail;
use host_metrics::sample::epoch::{Epoch, Epochs};

const PLACE: &str = "eu";
const HOST: &str = "a.example";

/// The bounds of a history.
#[derive(Clone, Copy)]
struct Bounds {
    ticks: i64,
    rebalances: u8,
    spoils: u8,
    restarts: u8,
    /// All entries.
    steps: usize,
}

#[test]
fn no_interleaving_of_two_producers_doubles_a_tick_or_leaves_one_out() {
    let walks = [
        Bounds {
            ticks: 2,
            rebalances: 2,
            spoils: 0,
            restarts: 0,
            steps: 16,
        },
        Bounds {
            ticks: 2,
            rebalances: 1,
            spoils: 1,
            restarts: 0,
            steps: 16,
        },
        Bounds {
            ticks: 2,
            rebalances: 1,
            spoils: 0,
            restarts: 1,
            steps: 16,
        },
    ];
    for bounds in walks {
        let walk = walk(bounds, true);
        assert_eq!(walk.violation, None);
        assert!(walk.states > 5_000, "{} states are too few", walk.states);
    }
}

#[test]
fn without_generations_the_walk_finds_a_violation() {
    let bounds = Bounds {
        ticks: 2,
        rebalances: 3,
        spoils: 0,
        restarts: 0,
        steps: 20,
    };
    assert!(walk(bounds, false).violation.is_some());
}

struct Walk {
    states: usize,
    violation: Option<String>,
}

fn walk(bounds: Bounds, generations_are_checked: bool) -> Walk {
    let mut seen = HashSet::new();
    let mut layer = vec![World::new(bounds, generations_are_checked)];
    for _ in 0..bounds.steps {
        let mut next_layer = Vec::new();
        for world in layer {
            if let Err(violation) = world.check() {
                return Walk {
                    states: seen.len(),
                    violation: Some(violation),
                };
            }
            next_layer.extend(
                world
                    .steps()
                    .into_iter()
                    .filter(|next| seen.insert(next.digest())),
            );
        }
        layer = next_layer;
    }
    Walk {
        states: seen.len(),
        violation: None,
    }
}

#[derive(Clone, Debug)]
enum Record {
    Claim(Epoch),
    Tick(i64, Epoch),
}

#[derive(Clone, Debug)]
struct Producer {
    shares: Shares,
    generation: u8,
    outbox: Outbox<i64>,
    lane: LaneId,
    next_tick: Option<i64>,
    /// Entries that are appended and not acknowledged.
    sent: Vec<(
        host_metrics::produce::outbox::Sequence,
        host_metrics::produce::outbox::Kept<i64>,
        i64,
    )>,
}

#[derive(Clone)]
struct World {
    left: Bounds,
    generations_are_checked: bool,
    time: i64,
    generation: u8,
    owner: usize,
    ledger: Option<(i64, String)>,
    log: Vec<Record>,
    producers: [Producer; 2],
}

/// Later than the time of any retry.
const LATE: i64 = 1_000_000_000_000;

impl Producer {
    fn new() -> Self {
        let mut outbox = Outbox::default();
        let lane = outbox.add_lane();
        Self {
            shares: Shares::default(),
            generation: 0,
            outbox,
            lane,
            next_tick: None,
            sent: Vec::new(),
        }
    }
}

impl World {
    fn new(left: Bounds, generations_are_checked: bool) -> Self {
        let mut world = Self {
            left,
            generations_are_checked,
            time: 1,
            generation: 1,
            owner: 0,
            ledger: None,
            log: Vec::new(),
            producers: [Producer::new(), Producer::new()],
        };
        // The first producer owns the share and has recorded a tick.
        let is_first_alone = |world: &Self| {
            let producer = &world.producers[0];
            producer.next_tick.is_none_or(|tick| tick < world.time)
                || !matches!(producer.shares.clone().next_action(LATE), Action::Wait { .. })
        };
        while is_first_alone(&world) {
            world = world.steps_of(0).pop().unwrap();
        }
        world
    }

    fn digest(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        let Self {
            left,
            time,
            generation,
            owner,
            ledger,
            log,
            producers,
            ..
        } = self;
        (
            left.ticks,
            left.rebalances,
            left.spoils,
            left.restarts,
            time,
            generation,
            owner,
            ledger,
        )
            .hash(&mut hasher);
        format!("{log:?}{producers:?}").hash(&mut hasher);
        hasher.finish()
    }

    /// The rows that the consumer makes from the log.
    fn check(&self) -> Result<(), String> {
        let mut epochs = Epochs::default();
        let mut last = None;
        for record in &self.log {
            match record {
                Record::Claim(epoch) => drop(epochs.admit(PLACE, *epoch)),
                Record::Tick(tick, epoch) if epochs.admit(PLACE, *epoch).is_ok() => {
                    if last.is_some_and(|last: i64| *tick != last + 1) {
                        return Err(format!("{tick} follows {last:?} in {:?}", self.log));
                    }
                    last = Some(*tick);
                }
                Record::Tick(..) => {}
            }
        }
        Ok(())
    }

    fn steps(&self) -> Vec<Self> {
        let mut steps = Vec::new();
        if self.left.ticks > 0 {
            let mut next = self.clone();
            next.left.ticks -= 1;
            next.time += 1;
            steps.push(next);
        }
        if self.left.rebalances > 0 {
            for owner in 0..2 {
                let mut next = self.clone();
                next.left.rebalances -= 1;
                next.generation += 1;
                next.owner = owner;
                steps.push(next);
            }
        }
        for index in 0..2 {
            steps.extend(self.steps_of(index));
        }
        steps
    }

    fn steps_of(&self, index: usize) -> Vec<Self> {
        let mut steps = Vec::new();
        let producer = &self.producers[index];
        if self.owner == index && producer.generation != self.generation {
            steps.push(self.with(index, |world, producer| {
                producer.generation = world.generation;
                world.hear(producer, Event::Assigned(vec![share()]));
            }));
        }
        if self.owner != index && producer.generation != 0 {
            steps.push(self.with(index, |world, producer| {
                producer.generation = 0;
                world.hear(producer, Event::Lost(vec![share()]));
            }));
        }
        if self.left.restarts > 0 && producer.generation != 0 {
            let mut next = self.clone();
            next.left.restarts -= 1;
            next.producers[index] = Producer::new();
            steps.push(next);
        }
        if self.left.spoils > 0 && !producer.sent.is_empty() {
            let mut next = self.with(index, |world, producer| {
                for (sequence, kept, _) in std::mem::take(&mut producer.sent) {
                    producer.outbox.came_back(producer.lane, sequence, kept);
                }
                producer.outbox.doubt(producer.lane);
                world.hear(producer, Event::InDoubt(vec![share()]));
            });
            next.left.spoils -= 1;
            steps.push(next);
        }
        let can_send =
            producer.outbox.is_open(producer.lane) && !producer.outbox.waiting(producer.lane).is_empty();
        if let Some(tick) = producer.next_tick.filter(|tick| *tick < self.time) {
            steps.push(self.with(index, |world, producer| {
                producer.outbox.take(producer.lane, tick, tick);
                producer.next_tick = Some(tick + 1);
                world.send(producer);
            }));
        } else if can_send {
            steps.push(self.with(index, Self::send));
        }
        // Only entries that may be in doubt are acknowledged later than they are appended.
        if !producer.sent.is_empty() {
            steps.push(self.with(index, Self::acknowledge));
        }
        let can_act = !matches!(producer.shares.clone().next_action(LATE), Action::Wait { .. });
        if can_act {
            steps.push(self.with(index, Self::act));
        }
        steps
    }

    fn send(&mut self, producer: &mut Producer) {
        let Some((sequence, kept)) = producer.outbox.next_to_send(producer.lane) else {
            return;
        };
        let epoch = producer.outbox.epoch(producer.lane).unwrap();
        self.log.push(Record::Tick(kept.tick, epoch));
        producer.sent.push((sequence, kept, self.log.len() as i64 - 1));
        if self.left.spoils == 0 {
            self.acknowledge(producer);
        }
    }

    /// Then it reports how far the share is recorded.
    fn acknowledge(&mut self, producer: &mut Producer) {
        let (_, kept, offset) = producer.sent.remove(0);
        producer.outbox.done(producer.lane, kept.tick, Some(offset));
        let open_since = producer.next_tick.unwrap_or(0);
        if let Some(ledger) = producer.outbox.ledger(producer.lane, open_since, self.time) {
            self.hear(
                producer,
                Event::Progress {
                    share: share(),
                    ledger,
                },
            );
        }
    }

    fn with(&self, index: usize, step: impl FnOnce(&mut Self, &mut Producer)) -> Self {
        let mut next = self.clone();
        let mut producer = next.producers[index].clone();
        step(&mut next, &mut producer);
        // Decisions without a request belong to this step.
        while let action @ (Action::Hold(_) | Action::Take(_) | Action::Forget(_) | Action::Abandon(_)) =
            producer.shares.clone().next_action(LATE)
        {
            drop(action);
            next.act(&mut producer);
        }
        next.producers[index] = producer;
        next
    }

    fn hear(&mut self, producer: &mut Producer, event: Event) {
        producer.shares.handle(0, event);
    }

    fn act(&mut self, producer: &mut Producer) {
        let lane = producer.lane;
        let event = match producer.shares.next_action(LATE) {
            Action::ReadLedgers(_) => {
                let found = match &self.ledger {
                    Some((offset, metadata)) => {
                        StoredLedger::Ledger(Ledger::parse(*offset, metadata).unwrap())
                    }
                    None => StoredLedger::Missing {
                        low: 0,
                        high: self.log.len() as i64,
                        partitions: 1,
                    },
                };
                Event::Ledgers(BTreeMap::from([(share(), found)]))
            }
            Action::ReadTail(range) => {
                let mut tail = Tail::new(PLACE, range.epoch_at_from);
                let (from, to) = (range.from as usize, (range.to as usize).min(self.log.len()));
                for record in &self.log[from.min(to)..to] {
                    match record {
                        Record::Claim(epoch) => tail.read_claim(PLACE, *epoch),
                        Record::Tick(tick, epoch) => {
                            tail.read_result(PLACE, Some(*epoch), HOST, *tick, None);
                        }
                    }
                }
                Event::TailRead {
                    share: range.share,
                    epoch: range.epoch,
                    tail: Some(tail),
                }
            }
            Action::Commit(ledgers) => {
                let is_member = producer.generation == self.generation && self.generations_are_checked
                    || producer.generation != 0 && !self.generations_are_checked;
                if is_member {
                    for (_, ledger) in ledgers {
                        self.ledger = Some((ledger.from, ledger.metadata(PLACE)));
                    }
                    Event::Committed(CommitOutcome::Done)
                } else {
                    Event::Committed(CommitOutcome::Refused)
                }
            }
            Action::Claim { share, epoch } => {
                // Entries that were sent before arrive before it.
                for (_, kept, offset) in std::mem::take(&mut producer.sent) {
                    producer.outbox.done(lane, kept.tick, Some(offset));
                }
                producer.outbox.claim(lane, epoch);
                self.log.push(Record::Claim(epoch));
                Event::Claimed {
                    share,
                    epoch,
                    offset: Ok(self.log.len() as i64 - 1),
                }
            }
            Action::Hold(_) => return producer.outbox.doubt(lane),
            Action::Take(takeover) => {
                if !takeover.is_unbroken {
                    let first = takeover
                        .recorded(HOST)
                        .map_or(self.time - 1, |recorded| recorded + 1);
                    producer.next_tick = Some(first);
                }
                drop(producer.outbox.take_share(lane, &takeover, |_| HOST));
                return;
            }
            Action::Forget(_) | Action::Abandon(_) => {
                producer.next_tick = None;
                drop(producer.outbox.forget_share(lane));
                return;
            }
            Action::Release(_) | Action::GiveBack | Action::Leave | Action::Wait { .. } => return,
        };
        self.hear(producer, event);
    }
}

fn share() -> Share {
    Share {
        topic: "t".into(),
        partition: 0,
    }
}
