//! The outbox: records that Kafka has not acknowledged yet.
//!
//! Decides which records are sent, in which order, which are sent again, and up to which time everything is acknowledged.
//! Pure: `publisher` sends the records and reports what became of each.
//!
//! Records are kept in lanes. The records of a lane are sent in the order in which they were taken. A record that comes back
//! returns to its place in that order, so a lane is closed until all records that may come back have done so. A lane is a topic
//! without PRODUCE_GROUP, and a share with it.

use std::collections::{BTreeMap, VecDeque};

use crate::produce::share::ledger::Ledger;
use crate::produce::share::tail::Takeover;
use crate::sample::epoch::Epoch;

/// The position of a record in the order in which records were taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sequence(u64);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LaneId(usize);

impl LaneId {
    /// Lanes are numbered from zero, in the order in which they were added.
    pub fn index(self) -> usize {
        self.0
    }
}

/// A record in the outbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept<R> {
    /// Unix time in microseconds.
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
    /// The number of records of each tick that are waiting or in flight.
    ticks: BTreeMap<i64, usize>,
    /// How far the lane's share is recorded, while we own it.
    account: Option<Account>,
    /// The epoch of the last claim that was sent. `None` if a record came back after that.
    claimed: Option<Epoch>,
    /// The share is being given back: ticks from this time on belong to the next owner.
    ends_at: Option<i64>,
}

/// What the owner of a share knows about its partition.
#[derive(Clone, Debug)]
struct Account {
    ledger: Ledger,
    /// The records before `end` have no later tick than this.
    last_tick: i64,
    /// The offset after the last record that Kafka has acknowledged.
    end: i64,
    /// Times (Unix time in microseconds), each with `end` at that time: records of later ticks have this offset or a higher one.
    moments: VecDeque<(i64, i64)>,
}

/// A slow check holds the ledger at its tick, and the moments after it accumulate. Above this number, none is added until the ledger
/// has passed one of them. The ledger is true all the same, but the next owner reads more of the partition.
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
    /// Adds a closed lane.
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

    pub fn take(&mut self, lane: LaneId, tick: i64, record: R) {
        let sequence = Sequence(self.next);
        self.next += 1;
        let lane = &mut self.lanes[lane.0];
        *lane.ticks.entry(tick).or_default() += 1;
        lane.waiting.insert(sequence, Kept { tick, record });
    }

    /// The next record to send, which is in flight from now on. `None`: no record waits, or the lane is closed.
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

    /// A record in flight was not delivered. It waits to be sent again.
    pub fn came_back(&mut self, lane: LaneId, sequence: Sequence, kept: Kept<R>) {
        let lane = &mut self.lanes[lane.0];
        lane.in_flight -= 1;
        self.in_flight -= 1;
        lane.waiting.insert(sequence, kept);
    }

    /// A record in flight was stored at this offset, or (`None`) refused for good.
    pub fn done(&mut self, lane: LaneId, tick: i64, offset: Option<i64>) {
        let lane = &mut self.lanes[lane.0];
        lane.in_flight -= 1;
        self.in_flight -= 1;
        lane.uncount(tick);
        if let (Some(account), Some(offset)) = (&mut lane.account, offset) {
            account.end = account.end.max(offset + 1);
            account.last_tick = account.last_tick.max(tick);
        }
    }

    /// The records of the lane may be sent.
    pub fn open(&mut self, lane: LaneId) {
        self.lanes[lane.0].is_open = true;
    }

    /// The records of the lane are kept.
    fn close(&mut self, lane: LaneId) {
        self.lanes[lane.0].is_open = false;
    }

    /// Removes the selected records from those that wait, and returns them in order.
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

    /// A claim is sent now, after all earlier records of this lane.
    pub fn claim(&mut self, lane: LaneId, epoch: Epoch) {
        self.close(lane);
        self.lanes[lane.0].claimed = Some(epoch);
    }

    /// It is not known which records are stored and count. The lane stays closed until a new claim has shown that, even if an
    /// earlier takeover is reported meanwhile.
    pub fn doubt(&mut self, lane: LaneId) {
        self.close(lane);
        self.lanes[lane.0].claimed = None;
    }

    /// We own the lane's share: opens the lane, unless a later claim is under way. Returns the waiting records that must not be
    /// sent, because the partition has records of their ticks already.
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

    /// Brings the ledger of the lane's share up to date and returns it. The records of all ticks before `open_since` were taken
    /// into this outbox, and none of a tick from `now` on. `None`: we do not own the share.
    pub fn ledger(&mut self, lane: LaneId, open_since: i64, now: i64) -> Option<Ledger> {
        let lane = &mut self.lanes[lane.0];
        let oldest = lane.ticks.first_key_value().map(|(tick, _)| *tick);
        let bounds = [Some(open_since), oldest, lane.ends_at];
        let account = lane.account.as_mut().filter(|_| lane.is_open)?;
        Some(account.bring_forward(bounds.into_iter().flatten().min().unwrap_or(now), now))
    }

    /// The share is being given back: no record of a tick from `ends_at` on will be taken.
    pub fn end_share(&mut self, lane: LaneId, ends_at: i64) {
        self.lanes[lane.0].ends_at.get_or_insert(ends_at);
    }

    /// The last ledger of a share that is being given back, once everything is acknowledged. This closes the lane.
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

    /// We no longer own the share. Returns the records that wait.
    pub fn forget_share(&mut self, lane: LaneId) -> Vec<Kept<R>> {
        self.close(lane);
        self.lanes[lane.0].account = None;
        self.lanes[lane.0].ends_at = None;
        self.discard(lane, |_, _| true)
    }

    /// The epoch of the lane's records. `None`: we do not own its share.
    pub fn epoch(&self, lane: LaneId) -> Option<Epoch> {
        self.lanes[lane.0]
            .account
            .as_ref()
            .map(|account| account.ledger.epoch)
    }

    pub fn is_open(&self, lane: LaneId) -> bool {
        self.lanes[lane.0].is_open
    }

    /// The records that wait, in order.
    pub fn waiting(&self, lane: LaneId) -> &BTreeMap<Sequence, Kept<R>> {
        &self.lanes[lane.0].waiting
    }

    /// The number of records in flight.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Whether no record can be sent now.
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
    /// Every tick before `open_since` has its record acknowledged, and no record of a tick from `now` on was sent.
    fn bring_forward(&mut self, open_since: i64, now: i64) -> Ledger {
        // Records of later ticks may lie before the end: an earlier owner whose clock was ahead has written them, or a share is
        // given back at the tick of a slow check. Then the offset after which all later ticks lie is not known.
        if self.moments.len() < MOST_MOMENTS
            && now > self.last_tick
            && self.moments.back().is_none_or(|(at, _)| *at < now)
        {
            self.moments.push_back((now, self.end));
        }
        self.ledger.whole_before = self.ledger.whole_before.max(open_since.min(now));
        let whole_before = self.ledger.whole_before;
        let is_past = |moment: Option<&(i64, i64)>| moment.is_some_and(|(at, _)| *at <= whole_before);
        while is_past(self.moments.get(1)) {
            self.moments.pop_front();
            self.ledger.epoch_at_from = self.ledger.epoch;
        }
        if let Some((_, from)) = self.moments.front() {
            self.ledger.from = *from;
        }
        self.ledger
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::produce::share::Share;
    use crate::produce::share::tail::Tail;

    #[test]
    fn the_last_ledger_begins_before_every_record_of_a_tick_after_an_open_check() {
        let mut outbox = Outbox::default();
        let lane = outbox.add_lane();
        outbox.claim(lane, 1);
        let takeover = Takeover {
            share: Share {
                topic: "t".into(),
                partition: 0,
            },
            ledger: Ledger {
                epoch: 1,
                whole_before: 10,
                from: 0,
                epoch_at_from: 0,
                partitions: 1,
            },
            claim: 0,
            is_unbroken: false,
            tail: Tail::new("eu", 0),
        };
        outbox.take_share(lane, &takeover, |()| "a");
        // The tick 11 of another host is still open when the share is given back.
        outbox.take(lane, 12, ());
        let (_, kept) = outbox.next_to_send(lane).unwrap();
        outbox.done(lane, kept.tick, Some(5));
        outbox.end_share(lane, 11);
        let ledger = outbox.last_ledger(lane).unwrap();
        assert_eq!(ledger.whole_before, 11);
        assert!(ledger.from <= 5, "the record of tick 12 has offset 5: {ledger:?}");
    }
}
