//! One host of the schedule: its grid, its state and its backlog of records.

use std::collections::VecDeque;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use super::missed::{MissedCounts, MissedReason, MissedTick};
use crate::check::target::Target;
use crate::duration::micros;
use crate::hash::fnv1a;
use crate::produce::share::Share;

/// How late a check may begin after a delay of the program or a takeover: a tenth of the interval, within these bounds. A
/// later tick is missed, which bounds the burst of checks after a stall. The lower bound is half of the shortest interval, so
/// that a late check usually ends before the next tick.
pub(super) const MAX_LATE: RangeInclusive<Duration> = Duration::from_millis(500)..=Duration::from_secs(10);

/// A host with a longer interval than this is also checked once soon after the start, so that its first row does not take
/// an interval to appear. These first checks are spread over this time.
pub(super) const FIRST_CHECK_WITHIN: Duration = Duration::from_secs(10);

/// How often each host is checked, and so when a run ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounds {
    /// `--once`: each host has one tick. The run ends when Kafka has acknowledged every record.
    Once,
    /// Each host has a tick every interval. The run ends when a stop is requested.
    Endless,
}

#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// MAX_THREADS.
    pub max_under_way: usize,
    /// CHECK_TIMEOUT, for hosts without a timeout of their own.
    pub check_timeout: Duration,
}

/// A record that had to wait for earlier records of its host.
#[derive(Clone, Debug)]
pub enum BacklogItem<R> {
    Missed(MissedTick),
    Result(R),
}

#[derive(Debug)]
pub(super) struct Host<R> {
    pub(super) target: Arc<Target>,
    pub(super) share: Option<Share>,
    /// It was taken over, and its ticks since the last recorded one have not been looked at yet.
    pub(super) was_unattended: bool,
    pub(super) interval_micros: i64,
    pub(super) phase_micros: i64,
    /// The next tick to fall due. `None`: the host was removed, or had its only tick.
    pub(super) next: Option<i64>,
    pub(super) state: HostState,
    /// Records that are not written yet, in the order of their ticks.
    pub(super) backlog: VecDeque<BacklogEntry<R>>,
    /// It has an entry in `Schedule::waiting`.
    pub(super) in_waiting: bool,
    /// It has an entry in `Schedule::backlogged`.
    pub(super) in_backlogged: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HostState {
    Idle,
    /// This tick waits for a thread.
    Waiting(i64),
    UnderWay {
        tick: i64,
        started_at: i64,
        /// `Tick::number`.
        number: u64,
    },
}

impl HostState {
    /// The tick whose record is still to come. No record of a later tick may be written before it.
    pub(super) fn open_tick(self) -> Option<i64> {
        match self {
            Self::Idle => None,
            Self::Waiting(tick) | Self::UnderWay { tick, .. } => Some(tick),
        }
    }
}

#[derive(Debug)]
pub(super) enum BacklogEntry<R> {
    /// All ticks from `first` to `last`, one interval apart.
    Missed {
        first: i64,
        last: i64,
        target: Arc<Target>,
        started_at: Option<i64>,
        reason: MissedReason,
    },
    Result {
        tick: i64,
        result: R,
    },
}

impl<R> BacklogEntry<R> {
    pub(super) fn first(&self) -> i64 {
        match self {
            Self::Missed { first, .. } => *first,
            Self::Result { tick, .. } => *tick,
        }
    }

    pub(super) fn ticks(&self) -> u64 {
        match self {
            Self::Missed {
                first, last, target, ..
            } => ((last - first) / micros(target.interval).max(1)).unsigned_abs() + 1,
            Self::Result { .. } => 1,
        }
    }
}

impl<R> Host<R> {
    pub(super) fn new(target: Arc<Target>) -> Self {
        let interval_micros = micros(target.interval).max(1);
        Self {
            interval_micros,
            phase_micros: phase_micros(&target.address, interval_micros),
            target,
            share: None,
            was_unattended: false,
            next: None,
            state: HostState::Idle,
            backlog: VecDeque::new(),
            in_waiting: false,
            in_backlogged: false,
        }
    }

    pub(super) fn become_like(&mut self, target: Arc<Target>, rounds: Rounds, limits: Limits, now: i64) {
        let was_gone = self.next.is_none();
        let other_interval = self.target.interval != target.interval;
        self.interval_micros = micros(target.interval).max(1);
        self.phase_micros = phase_micros(&target.address, self.interval_micros);
        self.target = target;
        if was_gone {
            self.next = Some(self.first_tick(rounds, limits, now));
        } else if other_interval {
            self.next = Some(self.first_on_grid_after(now));
        }
    }

    /// The first tick of a host that is new at `now`: its first tick on the grid, or an additional one before it if that is more
    /// than [`FIRST_CHECK_WITHIN`] away.
    pub(super) fn first_tick(&self, rounds: Rounds, limits: Limits, now: i64) -> i64 {
        let on_grid = self.first_on_grid_after(now);
        let spread = micros(FIRST_CHECK_WITHIN);
        if rounds == Rounds::Once {
            return now;
        }
        let least_late = *MAX_LATE.start();
        if on_grid - now <= spread + micros(least_late) {
            return on_grid;
        }
        // Even a check that hangs should end before the first tick on the grid. That is impossible only if the timeout is
        // longer than the time until then.
        let longest = self.target.timeout(limits.check_timeout) + least_late;
        let quiet = on_grid - now - micros(longest);
        let spread = if quiet > 1 { quiet.min(spread) } else { spread };
        now + 1 + phase_micros(&self.target.address, spread - 1)
    }

    pub(super) fn first_on_grid_after(&self, now: i64) -> i64 {
        now + self.interval_micros - (now - self.phase_micros).rem_euclid(self.interval_micros)
    }

    /// Moves to the first tick after `now`. If several ticks fell due since `tick`, all but the latest are missed for this
    /// reason. Returns the latest one and how many fell due.
    pub(super) fn catch_up(
        &mut self,
        tick: i64,
        now: i64,
        reason: MissedReason,
        counts: &mut MissedCounts,
    ) -> (i64, u64) {
        let following = self.first_on_grid_after(tick);
        let next = self.first_on_grid_after(now.max(tick));
        self.next = Some(next);
        if following == next {
            return (tick, 1);
        }
        let latest = next - self.interval_micros;
        let skipped = (latest - following) / self.interval_micros;
        self.give_up_waiting(counts, MissedReason::NoThread);
        self.miss(counts, (tick, tick), None, reason);
        if skipped > 0 {
            self.miss(counts, (following, latest - self.interval_micros), None, reason);
        }
        (latest, skipped.unsigned_abs() + 2)
    }

    pub(super) fn give_up_waiting(&mut self, counts: &mut MissedCounts, reason: MissedReason) {
        if let HostState::Waiting(tick) = self.state {
            self.state = HostState::Idle;
            self.miss(counts, (tick, tick), None, reason);
        }
    }

    /// The ticks from `from` to `to`, one interval apart, are missed.
    pub(super) fn miss(
        &mut self,
        counts: &mut MissedCounts,
        (from, to): (i64, i64),
        started_at: Option<i64>,
        reason: MissedReason,
    ) {
        counts.add(reason, (to - from) / self.interval_micros + 1);
        // A range has consecutive ticks, so no other entry can lie within it.
        let later = self.backlog.partition_point(|entry| entry.first() < from);
        if let Some(BacklogEntry::Missed {
            last,
            target,
            started_at: None,
            reason: last_reason,
            ..
        }) = later.checked_sub(1).and_then(|i| self.backlog.get_mut(i))
            && *last_reason == reason
            && started_at.is_none()
            && *last + self.interval_micros == from
            && Arc::ptr_eq(target, &self.target)
        {
            *last = to;
            return;
        }
        let missed = BacklogEntry::Missed {
            first: from,
            last: to,
            target: Arc::clone(&self.target),
            started_at,
            reason,
        };
        self.backlog.insert(later, missed);
    }

    pub(super) fn oldest_open(&self) -> Option<i64> {
        let late = self.backlog.front().map(BacklogEntry::first);
        late.into_iter().chain(self.state.open_tick()).min()
    }

    pub(super) fn may_write(&self) -> bool {
        match (self.backlog.front(), self.state.open_tick()) {
            (None, _) => false,
            (Some(_), None) => true,
            (Some(entry), Some(open)) => entry.first() < open,
        }
    }

    pub(super) fn take_from_backlog(&mut self, has_room: impl Fn(&Target) -> bool) -> Option<BacklogItem<R>> {
        if !self.may_write() {
            return None;
        }
        if let BacklogEntry::Missed {
            first,
            last,
            target,
            started_at,
            reason,
        } = self.backlog.front_mut()?
        {
            if !has_room(target) {
                return None;
            }
            let missed = MissedTick {
                target: Arc::clone(target),
                share: self.share.clone(),
                scheduled_at_micros: *first,
                started_at_micros: *started_at,
                reason: *reason,
            };
            if first == last {
                self.backlog.pop_front();
            } else {
                *first += micros(target.interval);
            }
            return Some(BacklogItem::Missed(missed));
        }
        match self.backlog.pop_front()? {
            BacklogEntry::Result { result, .. } => Some(BacklogItem::Result(result)),
            // Returned above.
            BacklogEntry::Missed { .. } => None,
        }
    }
}

/// How late a check may begin if its host has this interval.
pub(super) fn max_late(interval: Duration) -> Duration {
    (interval / 10).clamp(*MAX_LATE.start(), *MAX_LATE.end())
}

/// The position of a host's ticks on its grid: all times whose microseconds since the Unix epoch, modulo the interval, equal
/// this number. It spreads hosts evenly, and is the same after a restart and on every machine.
///
/// It is the FNV-1a hash of the address as written in the host file, modulo the interval.
pub fn phase_micros(address: &str, interval_micros: i64) -> i64 {
    let interval = interval_micros.max(1).unsigned_abs();
    i64::try_from(fnv1a(address.bytes()) % interval).unwrap_or(0)
}

/// Whether `tick` is on the host's grid. The first tick of a host and those of `--once` usually are not.
pub fn is_on_grid(address: &str, interval_micros: i64, tick: i64) -> bool {
    let interval = interval_micros.max(1);
    (tick - phase_micros(address, interval)).rem_euclid(interval) == 0
}
