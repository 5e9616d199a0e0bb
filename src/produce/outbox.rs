//! The outbox: records that were taken and that Kafka has not acknowledged yet.
//!
//! Owns what is kept, in which order it goes out, what goes out again, and up to which time everything is acknowledged.
//! Pure: a record is whatever the edge makes of it, and the edge says what became of each.
//!
//! Records stand in lanes. The records of a lane go out in the order in which they were taken, and what comes back is sorted
//! in again by that order: so a lane is what has to be closed, and waited for, when some of its records may have to go out
//! again. Without PRODUCE_GROUP that is a topic, with it a share.

use std::collections::{BTreeMap, VecDeque};

use crate::produce::share::ledger::Ledger;
use crate::produce::share::tail::Takeover;
use crate::sample::epoch::Epoch;

/// A record's place in the order in which records were taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sequence(u64);

/// A lane of the outbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LaneId(usize);

impl LaneId {
    /// Lanes are numbered from zero on, in the order in which they were added.
    pub fn index(self) -> usize {
        self.0
    }
}

/// A record, and its tick: Unix time in microseconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept<R> {
    pub tick: i64,
    pub record: R,
}

#[derive(Clone, Debug)]
pub struct Outbox<R> {
    lanes: Vec<Lane<R>>,
    next: u64,
    in_flight: usize,
}

#[derive(Clone, Debug)]
struct Lane<R> {
    is_open: bool,
    waiting: BTreeMap<Sequence, Kept<R>>,
    in_flight: usize,
    /// How many records of each tick are waiting or in flight.
    ticks: BTreeMap<i64, usize>,
    /// With PRODUCE_GROUP: how far the lane's share is recorded.
    account: Option<Account>,
    /// The epoch of the last claim that was sent, unless something that was sent before or behind it has come back since.
    claimed: Option<Epoch>,
    /// The share is given back: its ticks since then are not ours.
    ends_at: Option<i64>,
}

/// What the owner of a share knows of its partition.
#[derive(Clone, Debug)]
struct Account {
    ledger: Ledger,
    /// Its latest tick is no later than this, as far as it was not we who wrote it.
    last_tick: i64,
    /// Behind the last record that Kafka has acknowledged.
    end: i64,
    /// Moments (Unix time in microseconds) with the end as it was then: records of later ticks lie behind it.
    moments: VecDeque<(i64, i64)>,
}

/// A check may take as long as its host's timeout, and keeps the ledger where its tick is: moments are thinned out when there
/// are so many of them.
const MOST_MOMENTS: usize = 64;

impl<R> Default for Outbox<R> {
    fn default() -> Self {
        Self {
            lanes: Vec::new(),
            next: 0,
            in_flight: 0,
        }
    }
}

impl<R> Outbox<R> {
    /// A further lane, closed.
    pub fn add_lane(&mut self) -> LaneId {
        self.lanes.push(Lane {
            is_open: false,
            waiting: BTreeMap::new(),
            in_flight: 0,
            ticks: BTreeMap::new(),
            account: None,
            claimed: None,
            ends_at: None,
        });
        LaneId(self.lanes.len() - 1)
    }

    /// Takes a record.
    pub fn take(&mut self, lane: LaneId, tick: i64, record: R) {
        let sequence = Sequence(self.next);
        self.next += 1;
        let lane = &mut self.lanes[lane.0];
        *lane.ticks.entry(tick).or_default() += 1;
        lane.waiting.insert(sequence, Kept { tick, record });
    }

    /// The next record to send, which is in flight from now on. `None`: there is none, or the lane is closed.
    pub fn next_to_send(&mut self, lane: LaneId) -> Option<(Sequence, Kept<R>)> {
        let lane = &mut self.lanes[lane.0];
        if !lane.is_open {
            return None;
        }
        let next = lane.waiting.pop_first()?;
        lane.in_flight += 1;
        self.in_flight += 1;
        Some(next)
    }

    /// A record in flight comes back, to be sent again.
    pub fn came_back(&mut self, lane: LaneId, sequence: Sequence, kept: Kept<R>) {
        let lane = &mut self.lanes[lane.0];
        lane.in_flight -= 1;
        self.in_flight -= 1;
        lane.waiting.insert(sequence, kept);
    }

    /// A record in flight is done with: at this offset, or refused for good.
    pub fn done(&mut self, lane: LaneId, tick: i64, offset: Option<i64>) {
        let lane = &mut self.lanes[lane.0];
        lane.in_flight -= 1;
        self.in_flight -= 1;
        lane.uncount(tick);
        if let (Some(account), Some(offset)) = (&mut lane.account, offset) {
            account.end = account.end.max(offset + 1);
        }
    }

    /// What waits in the lane goes out from now on.
    pub fn open(&mut self, lane: LaneId) {
        self.lanes[lane.0].is_open = true;
    }

    /// Nothing more goes out, what comes is kept.
    pub fn close(&mut self, lane: LaneId) {
        self.lanes[lane.0].is_open = false;
    }

    /// Takes out what is not to be sent, in the order of sending.
    pub fn discard(
        &mut self,
        lane: LaneId,
        mut which: impl FnMut(Sequence, &Kept<R>) -> bool,
    ) -> Vec<Kept<R>> {
        let lane = &mut self.lanes[lane.0];
        let mut out = Vec::new();
        for (sequence, kept) in std::mem::take(&mut lane.waiting) {
            if which(sequence, &kept) {
                lane.uncount(kept.tick);
                out.push(kept);
            } else {
                lane.waiting.insert(sequence, kept);
            }
        }
        out
    }

    /// A claim is sent now, behind all that was sent in this lane before.
    pub fn claim(&mut self, lane: LaneId, epoch: Epoch) {
        self.close(lane);
        self.lanes[lane.0].claimed = Some(epoch);
    }

    /// Nobody knows whether what came back is in the partition: nothing goes out before a new claim has told.
    pub fn doubt(&mut self, lane: LaneId) {
        self.close(lane);
        self.lanes[lane.0].claimed = None;
    }

    /// The lane's share is ours: opens it, unless a later claim is under way already. What waits is kept where it still has its place behind what the partition holds,
    /// and given back where it is recorded already or somebody else recorded those ticks as missed.
    pub fn take_share(
        &mut self,
        lane: LaneId,
        takeover: &Takeover,
        address: impl Fn(&R) -> &str,
    ) -> Vec<Kept<R>> {
        let is_recorded = |kept: &Kept<R>| {
            let recorded = takeover.recorded(address(&kept.record));
            recorded.is_some_and(|recorded| kept.tick <= recorded)
        };
        let out = self.discard(lane, |_, kept| !takeover.is_unbroken || is_recorded(kept));
        let Ledger {
            whole_before, from, ..
        } = takeover.ledger;
        let lane = &mut self.lanes[lane.0];
        lane.is_open = lane.claimed == Some(takeover.ledger.epoch);
        lane.ends_at = None;
        lane.account = Some(Account {
            ledger: takeover.ledger,
            last_tick: takeover.last_tick(),
            end: takeover.claim + 1,
            moments: VecDeque::from([(whole_before, from)]),
        });
        out
    }

    /// How far the lane's share is recorded, which is remembered. `open_since`: all of its ticks before that have been taken
    /// into this outbox, and no tick from `now` on has been yet. `None`: the share is not ours.
    pub fn ledger(&mut self, lane: LaneId, open_since: i64, now: i64) -> Option<Ledger> {
        let lane = &mut self.lanes[lane.0];
        let oldest = lane.ticks.first_key_value().map(|(tick, _)| *tick);
        let bounds = [Some(open_since), oldest, lane.ends_at];
        let account = lane.account.as_mut().filter(|_| lane.is_open)?;
        Some(account.bring_forward(bounds.into_iter().flatten().min().unwrap_or(now), now))
    }

    /// The share is given back: no record of its ticks since then will come.
    pub fn end_share(&mut self, lane: LaneId, ends_at: i64) {
        self.lanes[lane.0].ends_at.get_or_insert(ends_at);
    }

    /// The last ledger of a share that is given back, once everything is acknowledged; the lane is closed then.
    pub fn last_ledger(&mut self, lane: LaneId) -> Option<Ledger> {
        let Lane {
            waiting,
            in_flight: 0,
            ends_at: Some(ends_at),
            ..
        } = &self.lanes[lane.0]
        else {
            return None;
        };
        let ends_at = waiting.is_empty().then_some(*ends_at)?;
        let ledger = self.ledger(lane, ends_at, ends_at)?;
        self.forget_share(lane);
        Some(ledger)
    }

    /// The share is not ours any more: what waits is given back.
    pub fn forget_share(&mut self, lane: LaneId) -> Vec<Kept<R>> {
        self.close(lane);
        self.lanes[lane.0].account = None;
        self.lanes[lane.0].ends_at = None;
        self.discard(lane, |_, _| true)
    }

    /// The epoch under which the lane's records go out.
    pub fn epoch(&self, lane: LaneId) -> Option<Epoch> {
        self.lanes[lane.0]
            .account
            .as_ref()
            .map(|account| account.ledger.epoch)
    }

    pub fn is_open(&self, lane: LaneId) -> bool {
        self.lanes[lane.0].is_open
    }

    /// What waits in the lane, in the order of sending.
    pub fn waiting(&self, lane: LaneId) -> &BTreeMap<Sequence, Kept<R>> {
        &self.lanes[lane.0].waiting
    }

    /// Records in flight.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Nothing waits that could be sent.
    pub fn is_idle(&self) -> bool {
        self.lanes
            .iter()
            .all(|lane| !lane.is_open || lane.waiting.is_empty())
    }
}

impl<R> Lane<R> {
    fn uncount(&mut self, tick: i64) {
        if let Some(count) = self.ticks.get_mut(&tick) {
            *count -= 1;
            if *count == 0 {
                self.ticks.remove(&tick);
            }
        }
    }
}

impl Account {
    /// Everything before `open_since` is acknowledged. The records of ticks since `now` are still to be sent.
    fn bring_forward(&mut self, open_since: i64, now: i64) -> Ledger {
        // The clock of an earlier owner may be ahead of ours: until we are there, we do not know where its records end.
        if now > self.last_tick && self.moments.back().is_none_or(|(at, _)| *at < now) {
            self.moments.push_back((now, self.end));
        }
        self.ledger.whole_before = self.ledger.whole_before.max(open_since.min(now));
        let whole_before = self.ledger.whole_before;
        let is_past = |moment: Option<&(i64, i64)>| moment.is_some_and(|(at, _)| *at <= whole_before);
        while is_past(self.moments.get(1)) {
            self.moments.pop_front();
            self.ledger.epoch_at_from = self.ledger.epoch;
        }
        if self.moments.len() > MOST_MOMENTS {
            let mut nth = 0;
            self.moments.retain(|_| {
                nth += 1;
                nth % 2 == 1
            });
        }
        if let Some((_, from)) = self.moments.front() {
            self.ledger.from = *from;
        }
        self.ledger
    }
}
