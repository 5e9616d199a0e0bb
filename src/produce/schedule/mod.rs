//! The schedule: when each host is checked, and in which order its records are written.
//!
//! Owns the rule that a host has at most one check under way, the ticks that wait for a thread, the missed ticks and the
//! order of a host's records. Pure: `now` is an argument, in microseconds of Unix time as `clock` counts it. The timer loop
//! does what [`Schedule::next`] says, returns results with [`Schedule::finished`] and takes the records that had to wait from
//! [`Schedule::drain`].
//!
//! Every tick that falls due leaves the schedule exactly once, as the result of its check or as a [`MissedTick`]. Consecutive
//! missed ticks are kept as one range, so a day of suspension costs a few bytes per host.

mod host;
mod missed;
#[cfg(test)]
mod tests;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::sync::Arc;

use crate::check::target::Target;
use crate::duration::micros;
use crate::produce::share::Share;
use host::{BacklogEntry, Host, HostState, max_late};
pub use host::{BacklogItem, Limits, Rounds, is_on_grid, phase_micros};
pub use missed::{MissedCounts, MissedReason, MissedTick};

/// How many results, over all hosts, may wait until the earlier missed ticks of their host are written. Above this number,
/// hosts with unwritten records are not checked.
pub const MAX_HELD: usize = 8_192;

/// The place of a host in the schedule. Valid until the host has left and its last record was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HostId(usize);

/// A tick whose check has to begin now.
#[derive(Clone, Debug)]
pub struct Tick {
    pub host: HostId,
    pub target: Arc<Target>,
    /// The share of the host, with PRODUCE_GROUP.
    pub share: Option<Share>,
    pub scheduled_at_micros: i64,
    /// Unique for each check.
    number: u64,
}

/// What to do now.
#[derive(Clone, Debug)]
pub enum Next {
    /// Begin this check, then call [`Schedule::next`] again.
    Start(Tick),
    /// Nothing is due until then (`None`: never), unless a check finishes.
    Wait(Option<i64>),
}

/// The schedule of a set of hosts. `R` is what the caller makes of a finished check.
#[derive(Debug)]
pub struct Schedule<R> {
    hosts: Vec<Option<Host<R>>>,
    vacant: Vec<usize>,
    by_address: HashMap<String, usize>,
    /// Shares that are being released, each with the time from which its ticks belong to the next owner.
    finishing: HashMap<Share, i64>,
    /// The next tick of every host that has one. An entry that differs from the host's `next` is out of date.
    due: BinaryHeap<Reverse<(i64, usize)>>,
    /// Hosts whose tick waits for a thread, in order. Some may no longer wait.
    waiting: VecDeque<usize>,
    /// Hosts that may have something for [`Schedule::drain`].
    backlogged: VecDeque<usize>,
    /// Checks that occupy a thread.
    under_way: usize,
    /// Those among them whose result will be dropped, because their host's share was given up.
    abandoned: usize,
    checks_begun: u64,
    /// Results in the backlogs of all hosts.
    held: usize,
    ticks_due: u64,
    missed: MissedCounts,
    rounds: Rounds,
    limits: Limits,
}

impl<R> Schedule<R> {
    /// The ticks of all targets from `now` on.
    pub fn new(rounds: Rounds, targets: Vec<Arc<Target>>, limits: Limits, now: i64) -> Self {
        let mut schedule = Self {
            hosts: Vec::with_capacity(targets.len()),
            vacant: Vec::new(),
            by_address: HashMap::with_capacity(targets.len()),
            finishing: HashMap::new(),
            due: BinaryHeap::with_capacity(targets.len()),
            waiting: VecDeque::new(),
            backlogged: VecDeque::new(),
            under_way: 0,
            abandoned: 0,
            checks_begun: 0,
            held: 0,
            ticks_due: 0,
            missed: MissedCounts::default(),
            rounds,
            limits,
        };
        targets
            .into_iter()
            .for_each(|target| schedule.put(target, None, now));
        schedule
    }

    /// What to do now. `has_room` says whether there is room in the buffer for one more record of a target. A tick that falls
    /// due without room is missed.
    pub fn next(&mut self, now: i64, has_room: impl Fn(&Target) -> bool) -> Next {
        self.fall_due(now, has_room);
        while self.under_way < self.limits.max_under_way
            && let Some(id) = self.waiting.pop_front()
        {
            let Some(host) = &mut self.hosts[id] else {
                continue;
            };
            host.in_waiting = false;
            if let HostState::Waiting(tick) = host.state {
                let number = self.checks_begun;
                host.state = HostState::UnderWay {
                    tick,
                    started_at: now,
                    number,
                };
                self.checks_begun += 1;
                self.under_way += 1;
                return Next::Start(Tick {
                    host: HostId(id),
                    target: Arc::clone(&host.target),
                    share: host.share.clone(),
                    scheduled_at_micros: tick,
                    number,
                });
            }
        }
        Next::Wait(self.due.peek().map(|Reverse((tick, _))| *tick))
    }

    /// Takes the result of a check that [`Schedule::next`] began. Returns it if it can be written at once. Otherwise it waits
    /// for its turn in [`Schedule::drain`], or is dropped because the tick was cut off or its share given up.
    pub fn finished(&mut self, tick: &Tick, result: R) -> Option<R> {
        let HostId(id) = tick.host;
        if !self.is_under_way(tick) {
            if self.abandoned > 0 {
                self.abandoned -= 1;
                self.under_way -= 1;
            }
            return None;
        }
        let host = self.hosts.get_mut(id)?.as_mut()?;
        host.state = HostState::Idle;
        self.under_way -= 1;
        let later = host
            .backlog
            .partition_point(|entry| entry.first() < tick.scheduled_at_micros);
        if later == 0 {
            self.note_backlog(id);
            self.forget_if_gone(id);
            return Some(result);
        }
        host.backlog.insert(
            later,
            BacklogEntry::Result {
                tick: tick.scheduled_at_micros,
                result,
            },
        );
        self.held += 1;
        self.note_backlog(id);
        None
    }

    /// Appends records that can be written now to `into`: one per host at a time, at most `visits` in all. `has_room` has the
    /// same meaning as in [`Schedule::next`]; results do not need it, because they had room when their check began.
    pub fn drain(
        &mut self,
        visits: usize,
        has_room: impl Fn(&Target) -> bool,
        into: &mut Vec<BacklogItem<R>>,
    ) {
        for _ in 0..visits.min(self.backlogged.len()) {
            let Some(id) = self.backlogged.pop_front() else {
                return;
            };
            let Some(host) = &mut self.hosts[id] else {
                continue;
            };
            host.in_backlogged = false;
            if let Some(entry) = host.take_from_backlog(&has_room) {
                if matches!(entry, BacklogItem::Result(_)) {
                    self.held -= 1;
                }
                into.push(entry);
            }
            self.note_backlog(id);
            self.forget_if_gone(id);
        }
    }

    /// Whether [`Schedule::drain`] may have records.
    pub fn has_backlog(&self) -> bool {
        !self.backlogged.is_empty()
    }

    /// Changes hosts. A host with the same address and interval keeps its ticks and its check under way, and its next
    /// check has the new options. A host with another interval continues on its new grid. A new host begins as at the start,
    /// and a removed one has no more ticks. `share_of` returns the share of a host.
    pub fn change<'a>(
        &mut self,
        changed: Vec<Arc<Target>>,
        removed: impl IntoIterator<Item = &'a Arc<Target>>,
        share_of: impl Fn(&Target) -> Option<Share>,
        now: i64,
    ) {
        self.fall_due(now, |_| true);
        for target in changed {
            let share = share_of(&target);
            self.put(target, share, now);
        }
        for target in removed {
            self.remove(&target.address);
        }
        // Entries that are out of date would otherwise stay until their time.
        if self.due.len() > 2 * self.by_address.len() {
            let Self { due, hosts, .. } = self;
            due.retain(|Reverse((tick, id))| hosts[*id].as_ref().and_then(|host| host.next) == Some(*tick));
        }
    }

    /// Adds the hosts of a share that we own from now on. `recorded` returns the latest tick of a host that has a record; the
    /// ticks after it, up to `now`, are missed, except the last one if it may still be checked late. `None`: the host begins
    /// as at the start.
    pub fn add_share(
        &mut self,
        share: &Share,
        targets: impl IntoIterator<Item = Arc<Target>>,
        recorded: impl Fn(&str) -> Option<i64>,
        now: i64,
    ) {
        for target in targets {
            let id = self.id_of(&target.address);
            let recorded = recorded(&target.address);
            let mut host = Host::new(target);
            host.share = Some(share.clone());
            host.was_unattended = recorded.is_some();
            let next = match recorded {
                Some(recorded) => host.first_on_grid_after(recorded),
                None => host.first_tick(self.rounds, self.limits, now),
            };
            host.next = Some(next);
            self.by_address.insert(host.target.address.clone(), id);
            self.hosts[id] = Some(host);
            self.due.push(Reverse((next, id)));
        }
    }

    /// Ends the ticks of this share's hosts at `now`. Ticks that are already due are still checked, until
    /// [`Schedule::remove_share`].
    pub fn finish_share(&mut self, share: &Share, now: i64) {
        self.fall_due(now, |_| true);
        self.finishing.entry(share.clone()).or_insert(now + 1);
        for host in self.hosts.iter_mut().flatten() {
            if host.share.as_ref() == Some(share) {
                host.next = None;
            }
        }
    }

    /// Whether a tick of the share is due and its record was not taken yet.
    pub fn has_open(&self, share: &Share) -> bool {
        let mut of_share = self
            .hosts
            .iter()
            .flatten()
            .filter(|host| host.share.as_ref() == Some(share));
        of_share.any(|host| host.oldest_open().is_some())
    }

    /// Removes the hosts of this share at once. The next owner records the ticks that have no record.
    pub fn remove_share(&mut self, share: &Share) {
        self.finishing.remove(share);
        for id in 0..self.hosts.len() {
            let Some(host) = self.hosts[id].take_if(|host| host.share.as_ref() == Some(share)) else {
                continue;
            };
            if matches!(host.state, HostState::UnderWay { .. }) {
                self.abandoned += 1;
            }
            let is_result = |entry: &&BacklogEntry<R>| matches!(entry, BacklogEntry::Result { .. });
            self.held -= host.backlog.iter().filter(is_result).count();
            self.by_address.remove(&host.target.address);
            self.vacant.push(id);
        }
    }

    /// For each share, the time before which all its records were taken. Shares that are not in the map have no open ticks.
    pub fn open_since(&self) -> HashMap<Share, i64> {
        let mut oldest = self.finishing.clone();
        for host in self.hosts.iter().flatten() {
            let (Some(share), Some(tick)) = (&host.share, host.oldest_open()) else {
                continue;
            };
            match oldest.get_mut(share) {
                Some(oldest) => *oldest = tick.min(*oldest),
                None => drop(oldest.insert(share.clone(), tick)),
            }
        }
        oldest
    }

    /// Ends all ticks at `now`; ticks that wait for a thread are missed. Checks under way go on.
    pub fn stop(&mut self, now: i64) {
        self.fall_due(now, |_| true);
        self.due.clear();
        self.waiting.clear();
        for id in 0..self.hosts.len() {
            if let Some(host) = &mut self.hosts[id] {
                host.in_waiting = false;
                host.next = None;
                host.give_up_waiting(&mut self.missed, MissedReason::Stopped);
                self.note_backlog(id);
            }
        }
    }

    /// Stops waiting for the checks under way: their ticks are missed.
    pub fn cut_off(&mut self) {
        for id in 0..self.hosts.len() {
            if let Some(host) = &mut self.hosts[id]
                && let HostState::UnderWay { tick, started_at, .. } = host.state
            {
                host.state = HostState::Idle;
                host.miss(
                    &mut self.missed,
                    (tick, tick),
                    Some(started_at),
                    MissedReason::CutOff,
                );
                self.under_way -= 1;
                self.note_backlog(id);
            }
        }
    }

    /// Whether the schedule still waits for the result of this tick.
    pub fn is_under_way(&self, tick: &Tick) -> bool {
        let host = self.hosts.get(tick.host.0).and_then(Option::as_ref);
        host.is_some_and(|host| match host.state {
            HostState::UnderWay { number, .. } => number == tick.number,
            HostState::Idle | HostState::Waiting(_) => false,
        })
    }

    /// The number of checks under way.
    pub fn under_way(&self) -> usize {
        self.under_way
    }

    /// Whether ticks wait for a thread.
    pub fn is_short_of_threads(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// The number of hosts, including removed ones whose last records are not written yet.
    pub fn hosts(&self) -> usize {
        self.by_address.len()
    }

    /// The number of ticks that fell due so far.
    pub fn ticks_due(&self) -> u64 {
        self.ticks_due
    }

    /// The number of ticks missed so far, for each reason.
    pub fn missed(&self) -> &MissedCounts {
        &self.missed
    }

    /// Whether no tick is left and all records were taken.
    pub fn is_over(&self) -> bool {
        self.due.is_empty() && self.waiting.is_empty() && self.under_way == 0 && !self.has_backlog()
    }

    /// The addresses with records that were not taken, and how many. Ticks under way do not count.
    pub fn left(&self) -> impl Iterator<Item = (&str, u64)> {
        self.hosts.iter().flatten().filter_map(|host| {
            let ticks = host.backlog.iter().map(BacklogEntry::ticks).sum();
            (ticks > 0).then_some((host.target.address.as_str(), ticks))
        })
    }

    fn fall_due(&mut self, now: i64, has_room: impl Fn(&Target) -> bool) {
        while let Some(&Reverse((tick, id))) = self.due.peek()
            && tick <= now
        {
            self.due.pop();
            let Some(host) = &mut self.hosts[id] else {
                continue;
            };
            if host.next != Some(tick) {
                continue;
            }
            let reason = match std::mem::take(&mut host.was_unattended) {
                true => MissedReason::Unattended,
                false => MissedReason::Stalled,
            };
            let (latest, ticks) = match self.rounds {
                Rounds::Once => {
                    host.next = None;
                    (tick, 1)
                }
                Rounds::Endless => host.catch_up(tick, now, reason, &mut self.missed),
            };
            self.ticks_due += ticks;
            if let Some(next) = host.next {
                self.due.push(Reverse((next, id)));
            }
            host.give_up_waiting(&mut self.missed, MissedReason::NoThread);
            let held_up =
                now - latest > micros(max_late(host.target.interval)) && self.rounds == Rounds::Endless;
            let is_behind = self.held >= MAX_HELD && !host.backlog.is_empty();
            let reason = match host.state {
                _ if held_up => Some(reason),
                HostState::UnderWay { .. } => Some(MissedReason::Busy),
                _ if !has_room(&host.target) => Some(MissedReason::NoRoom),
                _ if is_behind => Some(MissedReason::Backlog),
                _ => None,
            };
            match reason {
                Some(reason) => host.miss(&mut self.missed, (latest, latest), None, reason),
                None => {
                    host.state = HostState::Waiting(latest);
                    if !host.in_waiting {
                        host.in_waiting = true;
                        self.waiting.push_back(id);
                    }
                }
            }
            self.note_backlog(id);
        }
    }

    /// The place of the host, or a free one.
    fn id_of(&mut self, address: &str) -> usize {
        let known = self.by_address.get(address).copied();
        known.or_else(|| self.vacant.pop()).unwrap_or_else(|| {
            self.hosts.push(None);
            self.hosts.len() - 1
        })
    }

    /// Adds a host, or gives it its new options.
    fn put(&mut self, target: Arc<Target>, share: Option<Share>, now: i64) {
        let id = self.id_of(&target.address);
        let before = self.hosts[id].as_ref().and_then(|host| host.next);
        let host = match &mut self.hosts[id] {
            Some(host) => {
                host.become_like(target, self.rounds, self.limits, now);
                host
            }
            vacant => {
                self.by_address.insert(target.address.clone(), id);
                let mut host = Host::new(target);
                host.next = Some(host.first_tick(self.rounds, self.limits, now));
                vacant.insert(host)
            }
        };
        host.share = share;
        if let Some(next) = host.next.filter(|next| Some(*next) != before) {
            self.due.push(Reverse((next, id)));
        }
    }

    /// Ends the ticks of a host.
    fn remove(&mut self, address: &str) {
        let Some(&id) = self.by_address.get(address) else {
            return;
        };
        if let Some(host) = &mut self.hosts[id] {
            host.next = None;
            host.give_up_waiting(&mut self.missed, MissedReason::Removed);
        }
        // Until its last record is written it keeps this place. If it comes back before, its records stay in order.
        self.note_backlog(id);
        self.forget_if_gone(id);
    }

    fn note_backlog(&mut self, id: usize) {
        if let Some(host) = &mut self.hosts[id]
            && !host.in_backlogged
            && host.may_write()
        {
            host.in_backlogged = true;
            self.backlogged.push_back(id);
        }
    }

    fn forget_if_gone(&mut self, id: usize) {
        if let Some(host) = &self.hosts[id]
            && self.rounds == Rounds::Endless
            && host.next.is_none()
            && host.state == HostState::Idle
            && host.backlog.is_empty()
            && !host.in_backlogged
            && !host.in_waiting
        {
            self.by_address.remove(&host.target.address);
            self.hosts[id] = None;
            self.vacant.push(id);
        }
    }
}
