//! The schedule: which tick of which host is due when, and in which order the ticks' records are written.
//!
//! Owns the grid of ticks, the rule that at most one check of a host is under way, the ticks that wait for a thread,
//! the ticks that were missed and why, and the order of a host's records. Pure: no thread and no clock; `now` is an
//! argument, in microseconds of Unix time as the run counts it (see `clock`). The run does what [`Schedule::next`] says,
//! hands results back to [`Schedule::finished`] and takes what has to be written late from [`Schedule::drain`].
//!
//! Every tick that falls due leaves the schedule exactly once: as the result of its check or as a [`MissedTick`].
//! Ticks missed in a row are held as a range, so a day of suspension with thousands of hosts costs a few bytes a host,
//! and they are written as fast as they are taken, behind the checks that are due.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use crate::check::target::Target;
use crate::produce::share::Share;

/// How late a check may begin because the program itself was held up, or because another producer had the host: a tenth of
/// the interval, within these bounds. A tick later than that is missed, which bounds the burst after a stall. The least is
/// half of the shortest interval: a check that begins so late still leaves its host's next tick alone unless the host is slow.
pub const MAX_LATE: RangeInclusive<Duration> = Duration::from_millis(500)..=Duration::from_secs(10);

/// Hosts with a longer interval than this are also checked once right after the start, so that nobody waits for long for
/// a first row; these first checks are spread over this time. (A tick of the grid that comes half a second after it at the
/// latest is soon enough, too.)
pub const FIRST_CHECK_WITHIN: Duration = Duration::from_secs(10);

/// Results that may wait for missed ticks of their host to be written first, over all hosts. Beyond it such hosts are
/// not checked until their earlier records are written.
pub const MAX_HELD: usize = 8_192;

/// A host within its schedule, good until the host has left it and its last record was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HostId(usize);

/// A tick that is to be checked now.
#[derive(Clone, Debug)]
pub struct Tick {
    pub host: HostId,
    pub target: Arc<Target>,
    /// The one that the host belongs to, with PRODUCE_GROUP.
    pub share: Option<Share>,
    pub scheduled_at_micros: i64,
    /// No two checks have the same.
    number: u64,
}

/// A tick that has no result.
#[derive(Clone, Debug)]
pub struct MissedTick {
    pub target: Arc<Target>,
    /// As for [`Tick::share`].
    pub share: Option<Share>,
    pub scheduled_at_micros: i64,
    /// When its check began, if it did.
    pub started_at_micros: Option<i64>,
    pub why: Why,
}

/// Why a tick was missed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Why {
    /// The host's previous check was still under way.
    Busy,
    /// The agent did not run: it was stopped by a debugger, starved of CPU, or the machine was suspended.
    Stalled,
    /// No producer of the group had the host: the one that had it ended or lost it before the tick.
    Unattended,
    /// As many checks as allowed were under way until the host's next tick.
    NoThread,
    /// There was no room for its record, because Kafka had not taken earlier ones.
    NoRoom,
    /// The host left the host file before a thread was free for the check.
    Removed,
    /// The agent was stopped before the check could begin.
    Stopped,
    /// The check was under way when the agent had to end.
    CutOff,
}

impl Why {
    pub const ALL: [Self; 8] = [
        Self::Busy,
        Self::Stalled,
        Self::Unattended,
        Self::NoThread,
        Self::NoRoom,
        Self::Removed,
        Self::Stopped,
        Self::CutOff,
    ];

    /// The word for log lines and figures.
    pub fn as_word(self) -> &'static str {
        match self {
            Self::Busy => "busy",
            Self::Stalled => "stalled",
            Self::Unattended => "unattended",
            Self::NoThread => "no_thread",
            Self::NoRoom => "no_room",
            Self::Removed => "removed",
            Self::Stopped => "stopped",
            Self::CutOff => "cut_off",
        }
    }

    /// The record's `error`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Busy => "not checked: the previous check of this host was still under way",
            Self::Stalled => "not checked: the agent was stalled or suspended at that time",
            Self::Unattended => {
                "not checked: no producer of the group was responsible for the host at that time"
            }
            Self::NoThread => "not checked: MAX_THREADS checks were under way until the host's next tick",
            Self::NoRoom => {
                "not checked: Kafka had not taken earlier records and the agent's buffer for them was full"
            }
            Self::Removed => {
                "not checked: the host left the host file while the check waited for a free thread"
            }
            Self::Stopped => "not checked: the agent was stopped before the check could begin",
            Self::CutOff => "cut off: the check was still under way when the agent had to stop",
        }
    }
}

/// How many ticks were missed, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Missed([u64; Why::ALL.len()]);

impl Missed {
    pub fn count(&self, why: Why) -> u64 {
        self.0[why as usize]
    }

    pub fn all(&self) -> u64 {
        self.0.iter().sum()
    }

    fn add(&mut self, why: Why, ticks: i64) {
        self.0[why as usize] += ticks.unsigned_abs();
    }
}

/// What is to be done now.
#[derive(Clone, Debug)]
pub enum Next {
    /// Begin this check, then ask again.
    Start(Tick),
    /// Nothing is due until then (`None`: ever), unless a check finishes.
    Wait(Option<i64>),
}

/// Something that had to wait for its turn among its host's records.
#[derive(Clone, Debug)]
pub enum Late<R> {
    Missed(MissedTick),
    Result(R),
}

/// Whether ticks come back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rhythm {
    Grid,
    Once,
}

/// The schedule of a set of hosts; `R` is whatever the caller makes of a finished check.
#[derive(Debug)]
pub struct Schedule<R> {
    hosts: Vec<Option<Host<R>>>,
    vacant: Vec<usize>,
    by_address: HashMap<String, usize>,
    /// Shares that are being finished, and the time since which their ticks are not ours any more.
    finishing: HashMap<Share, i64>,
    /// The next tick of every host that has one.
    due: BinaryHeap<Reverse<(i64, usize)>>,
    /// Hosts whose tick fell due, in the order in which they get a thread; those no longer waiting are passed over.
    waiting: VecDeque<usize>,
    /// Hosts that may have something for [`Schedule::drain`].
    late: VecDeque<usize>,
    /// Checks that occupy a thread.
    under_way: usize,
    /// Of these, checks of hosts that were given up: nobody waits for their results.
    abandoned: usize,
    checks_begun: u64,
    held: usize,
    ticks_due: u64,
    missed: Missed,
    rhythm: Rhythm,
    limits: Limits,
}

/// What the schedule has to know of the agent.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Checks under way at once, MAX_THREADS.
    pub max_under_way: usize,
    /// CHECK_TIMEOUT, for hosts without their own.
    pub check_timeout: Duration,
}

#[derive(Debug)]
struct Host<R> {
    target: Arc<Target>,
    share: Option<Share>,
    /// Until its ticks were looked at for the first time since it was taken over from somebody else.
    was_unattended: bool,
    interval_micros: i64,
    phase_micros: i64,
    /// The next tick to fall due; `None`: no more, the host was removed or had its only tick.
    next: Option<i64>,
    state: State,
    /// What is still to be written, in the order of its ticks.
    backlog: VecDeque<Entry<R>>,
    in_waiting: bool,
    in_late: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Idle,
    /// This tick waits for a thread.
    Waiting(i64),
    UnderWay {
        tick: i64,
        started_at: i64,
        /// [`Tick::number`].
        number: u64,
    },
}

impl State {
    /// The tick whose record is still to come, after which no later one may be written.
    fn open_tick(self) -> Option<i64> {
        match self {
            Self::Idle => None,
            Self::Waiting(tick) | Self::UnderWay { tick, .. } => Some(tick),
        }
    }
}

#[derive(Debug)]
enum Entry<R> {
    /// All ticks from `first` to `last`, an interval apart.
    Missed {
        first: i64,
        last: i64,
        target: Arc<Target>,
        started_at: Option<i64>,
        why: Why,
    },
    Result {
        tick: i64,
        result: R,
    },
}

impl<R> Entry<R> {
    fn first(&self) -> i64 {
        match self {
            Self::Missed { first, .. } => *first,
            Self::Result { tick, .. } => *tick,
        }
    }

    fn ticks(&self) -> u64 {
        match self {
            Self::Missed {
                first, last, target, ..
            } => ((last - first) / micros(target.interval).max(1)).unsigned_abs() + 1,
            Self::Result { .. } => 1,
        }
    }
}

impl<R> Schedule<R> {
    /// Every tick of every target from `now` on.
    pub fn endless(targets: Vec<Target>, limits: Limits, now: i64) -> Self {
        Self::new(Rhythm::Grid, targets, limits, now)
    }

    /// One tick of every target, now.
    pub fn once(targets: Vec<Target>, limits: Limits, now: i64) -> Self {
        Self::new(Rhythm::Once, targets, limits, now)
    }

    fn new(rhythm: Rhythm, targets: Vec<Target>, limits: Limits, now: i64) -> Self {
        let mut schedule = Self {
            hosts: Vec::with_capacity(targets.len()),
            vacant: Vec::new(),
            by_address: HashMap::with_capacity(targets.len()),
            finishing: HashMap::new(),
            due: BinaryHeap::with_capacity(targets.len()),
            waiting: VecDeque::new(),
            late: VecDeque::new(),
            under_way: 0,
            abandoned: 0,
            checks_begun: 0,
            held: 0,
            ticks_due: 0,
            missed: Missed::default(),
            rhythm,
            limits,
        };
        schedule.replace(targets.into_iter().map(Arc::new).collect(), |_| None, now);
        schedule
    }

    /// What to do now. `has_room` says whether a further record of a target could be kept until Kafka takes it; a tick
    /// that falls due without room is missed.
    pub fn next(&mut self, now: i64, has_room: impl Fn(&Target) -> bool) -> Next {
        self.fall_due(now, has_room);
        while self.under_way < self.limits.max_under_way
            && let Some(id) = self.waiting.pop_front()
        {
            let Some(host) = &mut self.hosts[id] else {
                continue;
            };
            host.in_waiting = false;
            if let State::Waiting(tick) = host.state {
                let number = self.checks_begun;
                host.state = State::UnderWay {
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

    /// Takes the result of a check begun by [`Schedule::next`]. Gives it back if it may be written at once; otherwise it
    /// waits for its turn in [`Schedule::drain`], or the tick was cut off, or its host given up, before, and the result is
    /// dropped.
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
        host.state = State::Idle;
        self.under_way -= 1;
        let later = host
            .backlog
            .partition_point(|entry| entry.first() < tick.scheduled_at_micros);
        if later == 0 {
            self.note_late(id);
            self.forget_if_gone(id);
            return Some(result);
        }
        host.backlog.insert(
            later,
            Entry::Result {
                tick: tick.scheduled_at_micros,
                result,
            },
        );
        self.held += 1;
        self.note_late(id);
        None
    }

    /// Appends to `into` what waits to be written, each host's in order and the hosts taking turns. Looks at `visits`
    /// hosts at most; `has_room` as in [`Schedule::next`] (results have their room since their check began).
    pub fn drain(&mut self, visits: usize, has_room: impl Fn(&Target) -> bool, into: &mut Vec<Late<R>>) {
        for _ in 0..visits.min(self.late.len()) {
            let Some(id) = self.late.pop_front() else {
                return;
            };
            let Some(host) = &mut self.hosts[id] else {
                continue;
            };
            host.in_late = false;
            if let Some(entry) = host.take_late(&has_room) {
                if matches!(entry, Late::Result(_)) {
                    self.held -= 1;
                }
                into.push(entry);
            }
            self.note_late(id);
            self.forget_if_gone(id);
        }
    }

    /// Whether [`Schedule::drain`] may have something.
    pub fn has_late(&self) -> bool {
        !self.late.is_empty()
    }

    /// From now on these are the hosts. One that stays (same address, same interval) keeps its rhythm and whatever is
    /// under way, and gets its new options with its next check; one whose interval changed goes on on its new grid; one
    /// that is new begins like at the start; one that is gone has no more ticks. `share_of` says to which share each belongs.
    pub fn reload(
        &mut self,
        targets: Vec<Arc<Target>>,
        share_of: impl Fn(&Target) -> Option<Share>,
        now: i64,
    ) {
        self.fall_due(now, |_| true);
        self.replace(targets, share_of, now);
    }

    /// The hosts of this share are ours from now on. `recorded` is each one's latest tick that has a record: those between it
    /// and `now` are missed, but for one that may still be checked late. A host of which nothing is known begins like at the
    /// start.
    pub fn take_in(
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
                None => host.first_tick(self.rhythm, self.limits, now),
            };
            host.next = Some(next);
            self.by_address.insert(host.target.address.clone(), id);
            self.hosts[id] = Some(host);
            self.due.push(Reverse((next, id)));
        }
    }

    /// The hosts of this share have no tick after `now`; those before it are still checked, until [`Schedule::hand_out`].
    pub fn finish_share(&mut self, share: &Share, now: i64) {
        self.fall_due(now, |_| true);
        self.finishing.entry(share.clone()).or_insert(now + 1);
        for host in self.hosts.iter_mut().flatten() {
            if host.share.as_ref() == Some(share) {
                host.next = None;
            }
        }
    }

    /// Whether a tick of the share fell due and was not handed out yet.
    pub fn has_open(&self, share: &Share) -> bool {
        let mut of_share = self
            .hosts
            .iter()
            .flatten()
            .filter(|host| host.share.as_ref() == Some(share));
        of_share.any(|host| host.oldest_open().is_some())
    }

    /// Gives up the hosts of this share at once; ticks without a record are left to the next owner.
    pub fn hand_out(&mut self, share: &Share) {
        self.finishing.remove(share);
        for id in 0..self.hosts.len() {
            let Some(host) = self.hosts[id].take_if(|host| host.share.as_ref() == Some(share)) else {
                continue;
            };
            if matches!(host.state, State::UnderWay { .. }) {
                self.abandoned += 1;
            }
            let is_result = |entry: &&Entry<R>| matches!(entry, Entry::Result { .. });
            self.held -= host.backlog.iter().filter(is_result).count();
            self.by_address.remove(&host.target.address);
            self.vacant.push(id);
        }
    }

    /// The time before which each share's ticks have all been handed out; the present for those that are not named.
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

    /// No tick after `now` is due any more, and none that waits for a thread will get one. Checks under way go on.
    pub fn stop(&mut self, now: i64) {
        self.fall_due(now, |_| true);
        self.due.clear();
        self.waiting.clear();
        for id in 0..self.hosts.len() {
            if let Some(host) = &mut self.hosts[id] {
                host.in_waiting = false;
                host.next = None;
                host.give_up_waiting(&mut self.missed, Why::Stopped);
                self.note_late(id);
            }
        }
    }

    /// The checks under way will not be waited for: their ticks are missed.
    pub fn cut_off(&mut self) {
        for id in 0..self.hosts.len() {
            if let Some(host) = &mut self.hosts[id]
                && let State::UnderWay { tick, started_at, .. } = host.state
            {
                host.state = State::Idle;
                host.miss(&mut self.missed, tick, Some(started_at), Why::CutOff);
                self.under_way -= 1;
                self.note_late(id);
            }
        }
    }

    /// Whether the result of this tick's check is still awaited.
    pub fn is_under_way(&self, tick: &Tick) -> bool {
        let host = self.hosts.get(tick.host.0).and_then(Option::as_ref);
        host.is_some_and(|host| match host.state {
            State::UnderWay { number, .. } => number == tick.number,
            State::Idle | State::Waiting(_) => false,
        })
    }

    /// Checks under way.
    pub fn under_way(&self) -> usize {
        self.under_way
    }

    /// Whether ticks wait until a check under way ends.
    pub fn is_short_of_threads(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Hosts that have or had ticks, as long as something of them is still to be written.
    pub fn hosts(&self) -> usize {
        self.by_address.len()
    }

    /// Ticks that fell due so far.
    pub fn ticks_due(&self) -> u64 {
        self.ticks_due
    }

    /// Ticks missed so far, by [`Why`].
    pub fn missed(&self) -> &Missed {
        &self.missed
    }

    /// No tick is to come, none waits or is under way, and everything was taken.
    pub fn is_over(&self) -> bool {
        self.due.is_empty() && self.waiting.is_empty() && self.under_way == 0 && !self.has_late()
    }

    /// What [`Schedule::drain`] has not handed out yet, per address: what a stop leaves behind. Ticks under way are
    /// not among them.
    pub fn left(&self) -> impl Iterator<Item = (&str, u64)> {
        self.hosts.iter().flatten().filter_map(|host| {
            let ticks = host.backlog.iter().map(Entry::ticks).sum();
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
            let mut latest = tick;
            let not_looked = match std::mem::take(&mut host.was_unattended) {
                true => Why::Unattended,
                false => Why::Stalled,
            };
            if self.rhythm == Rhythm::Once {
                host.next = None;
                self.ticks_due += 1;
            } else {
                let following = host.first_on_grid_after(tick);
                let next = host.first_on_grid_after(now.max(tick));
                self.ticks_due += 1;
                if following < next {
                    // More than one: the agent did not look for a whole interval. All but the latest are lost to that.
                    latest = next - host.interval_micros;
                    let skipped = (latest - following) / host.interval_micros;
                    self.ticks_due += skipped.unsigned_abs() + 1;
                    host.give_up_waiting(&mut self.missed, Why::NoThread);
                    host.miss(&mut self.missed, tick, None, not_looked);
                    if skipped > 0 {
                        host.miss_all(
                            &mut self.missed,
                            following,
                            latest - host.interval_micros,
                            not_looked,
                        );
                    }
                }
                host.next = Some(next);
                self.due.push(Reverse((next, id)));
            }
            host.give_up_waiting(&mut self.missed, Why::NoThread);
            let held_up =
                now - latest > micros(max_late(host.target.interval)) && self.rhythm == Rhythm::Grid;
            let is_full = !has_room(&host.target) || (self.held >= MAX_HELD && !host.backlog.is_empty());
            let why = match host.state {
                _ if held_up => Some(not_looked),
                State::UnderWay { .. } => Some(Why::Busy),
                _ if is_full => Some(Why::NoRoom),
                _ => None,
            };
            match why {
                Some(why) => host.miss(&mut self.missed, latest, None, why),
                None => {
                    host.state = State::Waiting(latest);
                    if !host.in_waiting {
                        host.in_waiting = true;
                        self.waiting.push_back(id);
                    }
                }
            }
            self.note_late(id);
        }
    }

    /// The host's place, or a free one.
    fn id_of(&mut self, address: &str) -> usize {
        let known = self.by_address.get(address).copied();
        known.or_else(|| self.vacant.pop()).unwrap_or_else(|| {
            self.hosts.push(None);
            self.hosts.len() - 1
        })
    }

    fn replace(&mut self, targets: Vec<Arc<Target>>, share_of: impl Fn(&Target) -> Option<Share>, now: i64) {
        let mut gone = std::mem::take(&mut self.by_address);
        for target in targets {
            let address = target.address.clone();
            let id = match gone.remove(&address) {
                Some(id) => id,
                None => self.id_of(&address),
            };
            let share = share_of(&target);
            match &mut self.hosts[id] {
                Some(host) => {
                    host.become_like(target, self.rhythm, self.limits, now);
                    host.share = share;
                }
                vacant => {
                    let mut host = Host::new(target);
                    host.share = share;
                    host.next = Some(host.first_tick(self.rhythm, self.limits, now));
                    *vacant = Some(host);
                }
            }
            self.by_address.insert(address, id);
        }
        for (address, id) in gone {
            if let Some(host) = &mut self.hosts[id] {
                host.next = None;
                host.give_up_waiting(&mut self.missed, Why::Removed);
            }
            // Until its last record is written the host can come back to this place: a host is one sequence of records.
            self.by_address.insert(address, id);
            self.note_late(id);
            self.forget_if_gone(id);
        }
        let next_ticks = self.hosts.iter().enumerate().filter_map(|(id, host)| {
            let tick = host.as_ref()?.next?;
            Some(Reverse((tick, id)))
        });
        self.due = next_ticks.collect();
    }

    /// Remembers that the host may have something to write.
    fn note_late(&mut self, id: usize) {
        if let Some(host) = &mut self.hosts[id]
            && !host.in_late
            && host.may_write()
        {
            host.in_late = true;
            self.late.push_back(id);
        }
    }

    fn forget_if_gone(&mut self, id: usize) {
        if let Some(host) = &self.hosts[id]
            && self.rhythm == Rhythm::Grid
            && host.next.is_none()
            && host.state == State::Idle
            && host.backlog.is_empty()
            && !host.in_late
            && !host.in_waiting
        {
            self.by_address.remove(&host.target.address);
            self.hosts[id] = None;
            self.vacant.push(id);
        }
    }
}

impl<R> Host<R> {
    fn new(target: Arc<Target>) -> Self {
        let interval_micros = micros(target.interval).max(1);
        Self {
            interval_micros,
            phase_micros: phase_micros(&target.address, interval_micros),
            target,
            share: None,
            was_unattended: false,
            next: None,
            state: State::Idle,
            backlog: VecDeque::new(),
            in_waiting: false,
            in_late: false,
        }
    }

    fn become_like(&mut self, target: Arc<Target>, rhythm: Rhythm, limits: Limits, now: i64) {
        let was_gone = self.next.is_none();
        let other_interval = self.target.interval != target.interval;
        self.interval_micros = micros(target.interval).max(1);
        self.phase_micros = phase_micros(&target.address, self.interval_micros);
        self.target = target;
        if was_gone {
            self.next = Some(self.first_tick(rhythm, limits, now));
        } else if other_interval {
            self.next = Some(self.first_on_grid_after(now));
        }
    }

    /// The first tick of a host that is new at `now`: its first on the grid, or one of its own before that if the grid
    /// has none for [`FIRST_CHECK_WITHIN`].
    fn first_tick(&self, rhythm: Rhythm, limits: Limits, now: i64) -> i64 {
        let on_grid = self.first_on_grid_after(now);
        let spread = micros(FIRST_CHECK_WITHIN);
        if rhythm == Rhythm::Once {
            return now;
        }
        let least_late = *MAX_LATE.start();
        if on_grid - now <= spread + micros(least_late) {
            return on_grid;
        }
        // Early enough to be over, even if it hangs, when the grid's tick comes; only hosts with a timeout longer than
        // that gap cannot have both.
        let longest = self.target.timeout(limits.check_timeout) + least_late;
        let quiet = on_grid - now - micros(longest);
        let spread = if quiet > 1 { quiet.min(spread) } else { spread };
        now + 1 + phase_micros(&self.target.address, spread - 1)
    }

    fn first_on_grid_after(&self, now: i64) -> i64 {
        now + self.interval_micros - (now - self.phase_micros).rem_euclid(self.interval_micros)
    }

    fn give_up_waiting(&mut self, tally: &mut Missed, why: Why) {
        if let State::Waiting(tick) = self.state {
            self.state = State::Idle;
            self.miss(tally, tick, None, why);
        }
    }

    fn miss(&mut self, tally: &mut Missed, tick: i64, started_at: Option<i64>, why: Why) {
        tally.add(why, 1);
        self.miss_range(tick, tick, started_at, why);
    }

    fn miss_all(&mut self, tally: &mut Missed, first: i64, last: i64, why: Why) {
        tally.add(why, (last - first) / self.interval_micros + 1);
        self.miss_range(first, last, None, why);
    }

    fn miss_range(&mut self, from: i64, to: i64, started_at: Option<i64>, reason: Why) {
        // The ticks of a range follow each other on one grid, so none that is still to come lies within it.
        let later = self.backlog.partition_point(|entry| entry.first() < from);
        if let Some(Entry::Missed {
            last,
            target,
            started_at: None,
            why,
            ..
        }) = later.checked_sub(1).and_then(|i| self.backlog.get_mut(i))
            && *why == reason
            && started_at.is_none()
            && *last + self.interval_micros == from
            && Arc::ptr_eq(target, &self.target)
        {
            *last = to;
            return;
        }
        let missed = Entry::Missed {
            first: from,
            last: to,
            target: Arc::clone(&self.target),
            started_at,
            why: reason,
        };
        self.backlog.insert(later, missed);
    }

    fn oldest_open(&self) -> Option<i64> {
        let late = self.backlog.front().map(Entry::first);
        late.into_iter().chain(self.state.open_tick()).min()
    }

    fn may_write(&self) -> bool {
        match (self.backlog.front(), self.state.open_tick()) {
            (None, _) => false,
            (Some(_), None) => true,
            (Some(entry), Some(open)) => entry.first() < open,
        }
    }

    fn take_late(&mut self, has_room: impl Fn(&Target) -> bool) -> Option<Late<R>> {
        if !self.may_write() {
            return None;
        }
        if let Entry::Missed {
            first,
            last,
            target,
            started_at,
            why,
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
                why: *why,
            };
            if first == last {
                self.backlog.pop_front();
            } else {
                *first += micros(target.interval);
            }
            return Some(Late::Missed(missed));
        }
        match self.backlog.pop_front()? {
            Entry::Result { result, .. } => Some(Late::Result(result)),
            // The front was looked at above.
            Entry::Missed { .. } => None,
        }
    }
}

/// How late a check of a host with this interval may begin.
fn max_late(interval: Duration) -> Duration {
    (interval / 10).clamp(*MAX_LATE.start(), *MAX_LATE.end())
}

/// Where on its grid a host's ticks lie: at the times whose microseconds since the Unix epoch, modulo the interval's,
/// equal this. The same after every restart and on every machine, and evenly spread over hosts.
///
/// The hash is FNV-1a with 64 bits over the address as written in the host file
/// (<https://datatracker.ietf.org/doc/html/draft-eastlake-fnv>), so that others can compute it, too.
pub fn phase_micros(address: &str, interval_micros: i64) -> i64 {
    const OFFSET_BASIS: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0000_0100_0000_01b3;
    let hash = address.bytes().fold(OFFSET_BASIS, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(PRIME)
    });
    let interval = interval_micros.max(1).unsigned_abs();
    i64::try_from(hash % interval).unwrap_or(0)
}

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX / 4)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: i64 = 1_000_000;
    /// Some time of day in 2026; nothing depends on it.
    const START: i64 = 1_790_000_000_123_456;
    const LIMITS: Limits = Limits {
        max_under_way: 4,
        check_timeout: Duration::from_secs(10),
    };

    #[test]
    fn ticks_of_a_host_lie_on_its_grid_whenever_the_agent_starts() {
        for start in [START, START + 1, START + 86_400 * SECOND + 77] {
            let mut schedule = Schedule::<()>::endless(vec![host("a.example", 5)], LIMITS, start);
            let mut last = start;
            for _ in 0..100 {
                let tick = quick_check(&mut schedule).scheduled_at_micros;
                assert_eq!(tick.rem_euclid(5 * SECOND), phase_micros("a.example", 5 * SECOND));
                assert!(tick > last && tick <= last + 5 * SECOND);
                last = tick;
            }
        }
    }

    #[test]
    fn the_phase_is_the_published_fnv_1a_hash() {
        // Test vectors of draft-eastlake-fnv, 64 bits.
        assert_eq!(
            phase_micros("", i64::MAX),
            (0xcbf2_9ce4_8422_2325_u64 % (1 << 63).min(i64::MAX as u64)) as i64
        );
        assert_eq!(
            phase_micros("foobar", i64::MAX),
            (0x8594_4171_f739_67e8_u64 % i64::MAX as u64) as i64
        );
    }

    #[test]
    fn hosts_with_like_addresses_are_spread_over_their_interval() {
        let mut per_slice = [0_usize; 100];
        for i in 0..10_000 {
            let address = format!("http://10.0.{}.{}:8080/health", i / 250, i % 250);
            let phase = phase_micros(&address, 60 * SECOND);
            per_slice[usize::try_from(phase * 100 / (60 * SECOND)).unwrap()] += 1;
        }
        let (low, high) = (per_slice.iter().min(), per_slice.iter().max());
        assert!(
            low >= Some(&50) && high <= Some(&160),
            "100 a slice on average, but {low:?} to {high:?}"
        );
    }

    #[test]
    fn a_long_interval_does_not_delay_the_first_check() {
        let hosts = (0..1_000).map(|i| host(&format!("h{i}.example"), 300));
        let mut schedule = Schedule::<()>::endless(
            hosts.collect(),
            Limits {
                max_under_way: 1_000,
                ..LIMITS
            },
            START,
        );
        let mut firsts = HashMap::new();
        let mut now = START;
        while now <= START + 10_500_000 {
            match schedule.next(now, |_| true) {
                Next::Start(tick) => {
                    assert_eq!(schedule.finished(&tick, ()), Some(()));
                    *firsts.entry(tick.target.address.clone()).or_insert(0) += 1;
                }
                Next::Wait(until) => now = until.unwrap(),
            }
        }
        assert_eq!(firsts.len(), 1_000);
        assert!(firsts.values().all(|checks| *checks == 1));
    }

    #[test]
    fn a_first_check_that_hangs_is_over_when_the_grid_has_its_tick() {
        for i in 0..1_000 {
            let target = host(&format!("h{i}.example"), 60);
            let made = Host::<()>::new(Arc::new(target));
            let first = made.first_tick(Rhythm::Grid, LIMITS, START);
            let grid = made.first_on_grid_after(START);
            assert!(first > START && first <= START + 10_500_000);
            assert!(first == grid || first + 10 * SECOND < grid);
        }
    }

    #[test]
    fn once_checks_every_host_now_and_is_over() {
        let hosts = (0..9).map(|i| host(&format!("h{i}.example"), 3_600)).collect();
        let mut schedule = Schedule::<()>::once(hosts, LIMITS, START);
        let mut now = START;
        let mut checked = Vec::new();
        while !schedule.is_over() {
            let mut batch = Vec::new();
            while let Next::Start(tick) = schedule.next(now, |_| true) {
                assert_eq!(tick.scheduled_at_micros, START);
                batch.push(tick);
            }
            assert!(batch.len() <= 4);
            now += 3_600 * SECOND;
            for tick in batch {
                assert_eq!(schedule.finished(&tick, ()), Some(()));
                checked.push(tick.target.address.clone());
            }
        }
        let in_order: Vec<_> = (0..9).map(|i| format!("h{i}.example")).collect();
        assert_eq!(checked, in_order);
    }

    #[test]
    fn a_tick_during_its_hosts_check_is_missed_and_written_after_it() {
        let mut schedule = Schedule::endless(vec![host("a.example", 1)], LIMITS, START);
        let (first, now) = start_one(&mut schedule, START);
        for i in 1..=3 {
            let wait = schedule.next(now + i * SECOND, |_| true);
            assert!(matches!(wait, Next::Wait(Some(_))));
        }
        assert!(drained(&mut schedule).is_empty(), "the check comes first");
        assert_eq!(schedule.finished(&first, "slow"), Some("slow"));
        let ticks = (1..=3).map(|i| (now + i * SECOND, Some(Why::Busy)));
        assert_eq!(drained(&mut schedule), ticks.collect::<Vec<_>>());
    }

    #[test]
    fn a_stall_costs_its_ticks_and_makes_no_burst() {
        let hosts = (0..50).map(|i| host(&format!("h{i}.example"), 10)).collect();
        let limits = Limits {
            max_under_way: 50,
            ..LIMITS
        };
        let mut schedule = Schedule::<()>::endless(hosts, limits, START);
        let woken = START + 3_600 * SECOND;
        let mut burst = 0;
        while let Next::Start(tick) = schedule.next(woken, |_| true) {
            assert!(woken - tick.scheduled_at_micros <= micros(max_late(tick.target.interval)));
            assert_eq!(schedule.finished(&tick, ()), None, "its turn comes later");
            burst += 1;
        }
        assert!(burst <= 10, "{burst} of 50 at once, 2.5 expected");
        assert_eq!(schedule.ticks_due(), 50 * 360);
        let late = drained(&mut schedule);
        let missed = late.iter().filter(|(_, why)| *why == Some(Why::Stalled));
        assert_eq!(missed.count(), 50 * 360 - burst);
        assert_eq!(late.len(), 50 * 360);
    }

    #[test]
    fn a_suspended_day_of_five_thousand_hosts_is_held_as_ranges() {
        let hosts = (0..5_000).map(|i| host(&format!("h{i}.example"), 1)).collect();
        let mut schedule = Schedule::<()>::endless(hosts, LIMITS, START);
        let woken = START + 86_400 * SECOND;
        let mut entries = 0;
        schedule.next(woken, |_| true);
        for host in schedule.hosts.iter().flatten() {
            entries += host.backlog.len();
        }
        assert_eq!(schedule.ticks_due(), 432_000_000);
        assert!(entries <= 10_000, "{entries}");
        let mut late = Vec::new();
        schedule.drain(1_000, |_| true, &mut late);
        assert_eq!(late.len(), 1_000);
    }

    #[test]
    fn without_a_free_thread_a_tick_waits_until_the_next_one_and_no_longer() {
        let hosts = vec![host("a.example", 1), host("b.example", 60)];
        let limits = Limits {
            max_under_way: 1,
            ..LIMITS
        };
        let mut schedule = Schedule::endless(hosts, limits, START);
        // The first to come takes the only thread; a.example's ticks then wait one after the other.
        let (hanging, now) = start_one(&mut schedule, START);
        let hanging = if hanging.target.address == "b.example" {
            hanging
        } else {
            schedule.finished(&hanging, "");
            let mut now = now;
            loop {
                let (tick, at) = start_one(&mut schedule, now);
                now = at;
                if tick.target.address == "b.example" {
                    break tick;
                }
                schedule.finished(&tick, "");
            }
        };
        let now = hanging.scheduled_at_micros + 5 * SECOND;
        for i in 0..5 {
            schedule.next(hanging.scheduled_at_micros + (i + 1) * SECOND, |_| true);
        }
        let missed = drained(&mut schedule);
        assert!(missed.len() >= 4, "{missed:?}");
        assert!(missed.iter().all(|(_, why)| *why == Some(Why::NoThread)));
        assert_eq!(schedule.finished(&hanging, "hung"), Some("hung"));
        let (tick, _) = start_one(&mut schedule, now);
        assert!(now - tick.scheduled_at_micros <= SECOND);
    }

    #[test]
    fn without_room_ticks_are_missed_and_written_when_there_is_room_again() {
        let mut schedule = Schedule::<()>::endless(vec![host("a.example", 1)], LIMITS, START);
        for second in 1..=3_600 {
            let next = schedule.next(START + second * SECOND, |_| false);
            assert!(matches!(next, Next::Wait(_)));
            let mut late = Vec::new();
            schedule.drain(10, |_| false, &mut late);
            assert!(late.is_empty());
        }
        let late = drained(&mut schedule);
        assert_eq!(late.len(), 3_600);
        assert!(late.iter().all(|(_, why)| *why == Some(Why::NoRoom)));
    }

    #[test]
    fn a_reload_leaves_unchanged_hosts_their_rhythm_and_gives_them_their_new_options() {
        let mut schedule = Schedule::endless(vec![host("a.example", 7)], LIMITS, START);
        let (before, now) = start_one(&mut schedule, START);
        let changed = Target {
            follow: 3,
            ..host("a.example", 7)
        };
        schedule.reload(
            vec![changed.into(), shared("b.example", 1)],
            |_| None,
            now + SECOND,
        );
        assert_eq!(schedule.finished(&before, "old"), Some("old"));
        let mut now = now + SECOND;
        let after = loop {
            let (tick, at) = start_one(&mut schedule, now);
            now = at;
            schedule.finished(&tick, "");
            if tick.target.address == "a.example" {
                break tick;
            }
        };
        assert_eq!(after.scheduled_at_micros, before.scheduled_at_micros + 7 * SECOND);
        assert_eq!((before.target.follow, after.target.follow), (10, 3));
    }

    #[test]
    fn a_host_removed_and_added_again_during_its_check_is_still_checked_once_at_a_time() {
        let mut schedule = Schedule::endless(vec![host("a.example", 1)], LIMITS, START);
        let (open, now) = start_one(&mut schedule, START);
        schedule.reload(vec![shared("b.example", 3_600)], |_| None, now + 1);
        schedule.reload(vec![shared("a.example", 1)], |_| None, now + 2);
        assert!(matches!(schedule.next(now + SECOND, |_| true), Next::Wait(_)));
        assert_eq!(schedule.finished(&open, "old"), Some("old"));
        assert_eq!(
            drained(&mut schedule),
            [(now + SECOND, Some(Why::Busy))],
            "due after it came back"
        );
    }

    #[test]
    fn removed_hosts_take_no_memory_once_their_records_are_written() {
        let mut schedule = Schedule::<()>::endless(vec![host("a.example", 1)], LIMITS, START);
        for i in 0..1_000 {
            schedule.reload(vec![shared(&format!("h{i}.example"), 1)], |_| None, START + i);
        }
        assert!(schedule.hosts.len() <= 2);
        assert_eq!(schedule.by_address.len(), 1);
    }

    #[test]
    fn a_stop_ends_the_ticks_and_cuts_off_what_hangs() {
        let hosts = vec![host("a.example", 1), host("b.example", 1)];
        let limits = Limits {
            max_under_way: 1,
            ..LIMITS
        };
        let mut schedule = Schedule::<()>::endless(hosts, limits, START);
        let (hanging, began) = start_one(&mut schedule, START);
        let Next::Wait(Some(other)) = schedule.next(began, |_| true) else {
            panic!("one thread only")
        };
        assert!(matches!(schedule.next(other, |_| true), Next::Wait(_)));
        schedule.stop(began + SECOND - 1);
        assert!(matches!(
            schedule.next(began + 9 * SECOND, |_| true),
            Next::Wait(None)
        ));
        schedule.cut_off();
        assert_eq!(schedule.left().map(|(_, ticks)| ticks).sum::<u64>(), 2);
        let mut late = Vec::new();
        schedule.drain(10, |_| true, &mut late);
        let mut whys: Vec<_> = late
            .iter()
            .map(|entry| match entry {
                Late::Missed(missed) => (missed.why, missed.started_at_micros),
                Late::Result(()) => panic!("nothing finished"),
            })
            .collect();
        whys.sort_by_key(|(why, _)| *why == Why::CutOff);
        assert_eq!(whys, [(Why::Stopped, None), (Why::CutOff, Some(began))]);
        assert_eq!(schedule.finished(&hanging, ()), None, "came too late");
        assert!(schedule.is_over() && schedule.ticks_due() == 2);
    }

    proptest! {
        #[test]
        fn the_grid_is_the_hosts_own_and_nothing_lies_between(
            address in "[a-z]{1,20}", interval in 1_i64..31_622_400, now in 0_i64..253_402_300_799_000_000
        ) {
            let host = Host::<()>::new(shared(&address, u64::try_from(interval).unwrap()));
            let next = host.first_on_grid_after(now);
            prop_assert!(next > now && next - now <= interval * SECOND);
            prop_assert_eq!(next.rem_euclid(interval * SECOND), phase_micros(&address, interval * SECOND));
        }

        /// Histories of slow checks, stalls, outages, few threads, reloads and a stop: the ticks written are those of the
        /// grid, each once, in order.
        #[test]
        fn every_tick_of_every_history_is_written_once_and_in_order(seed: u64) {
            Model::new(seed, Faults::All).run(400)?;
        }

        #[test]
        fn without_faults_every_tick_is_checked_on_time(seed: u64) {
            let written = Model::new(seed, Faults::None).run(400)?;
            let mut whys = written.values().flatten().filter_map(|(_, why)| *why);
            prop_assert_eq!(whys.find(|why| !matches!(why, Why::CutOff | Why::Stopped)), None, "the stop at the end may");
        }
    }

    #[derive(PartialEq)]
    enum Faults {
        None,
        All,
    }

    /// The world around a schedule: checks that take their time, a loop that stalls, a Kafka that goes away, a host file
    /// that changes. Keeps its own account of which hosts were there from when to when.
    struct Model {
        random: fastrand::Rng,
        faults: Faults,
        now: i64,
        schedule: Schedule<i64>,
        limits: Limits,
        under_way: Vec<(i64, Tick)>,
        room: bool,
        hosts: HashMap<String, Presence>,
        segments: Vec<(String, Presence, i64)>,
        written: HashMap<String, Vec<(i64, Option<Why>)>>,
        threads_were_short: bool,
    }

    #[derive(Clone, Copy)]
    struct Presence {
        interval: i64,
        since: i64,
        is_new: bool,
    }

    type Written = HashMap<String, Vec<(i64, Option<Why>)>>;

    impl Model {
        fn new(seed: u64, faults: Faults) -> Self {
            let mut random = fastrand::Rng::with_seed(seed);
            let now = START + random.i64(0..100_000 * SECOND);
            let limits = Limits {
                max_under_way: match faults {
                    Faults::None => 100,
                    Faults::All => random.usize(1..8),
                },
                // Longer ones may run into a host's first tick on its grid.
                check_timeout: Duration::from_secs(random.u64(
                    1..=match faults {
                        Faults::None => 10,
                        Faults::All => 20,
                    },
                )),
            };
            let mut model = Self {
                random,
                faults,
                now,
                schedule: Schedule::endless(Vec::new(), limits, now),
                limits,
                under_way: Vec::new(),
                room: true,
                hosts: HashMap::new(),
                segments: Vec::new(),
                written: HashMap::new(),
                threads_were_short: false,
            };
            model.reload();
            model
        }

        fn run(mut self, steps: usize) -> Result<Written, TestCaseError> {
            for _ in 0..steps {
                self.step()?;
            }
            self.stop()?;
            self.balance()?;
            Ok(self.written)
        }

        fn step(&mut self) -> Result<(), TestCaseError> {
            self.finish_checks();
            if self.faults == Faults::All {
                match self.random.u8(0..60) {
                    0 => self.reload(),
                    1 => self.room = !self.room,
                    _ => {}
                }
            }
            let until = self.start_checks()?;
            let visits = self.random.usize(0..6);
            self.drain(visits);
            let finish = self.under_way.iter().map(|(end, _)| *end).min();
            let wake = until.into_iter().chain(finish).min();
            self.now = wake.unwrap_or(self.now + SECOND).max(self.now);
            if self.faults == Faults::All && self.random.u8(0..40) == 0 {
                let scale = 10_i64.pow(self.random.u32(0..8));
                self.now += self.random.i64(0..1_000) * scale;
            }
            Ok(())
        }

        fn start_checks(&mut self) -> Result<Option<i64>, TestCaseError> {
            loop {
                let room = self.room;
                let tick = match self.schedule.next(self.now, |_| room) {
                    Next::Wait(until) => return Ok(until),
                    Next::Start(tick) => tick,
                };
                prop_assert!(tick.scheduled_at_micros <= self.now, "early");
                prop_assert!(
                    !self
                        .under_way
                        .iter()
                        .any(|(_, open)| open.target.address == tick.target.address),
                    "two checks of a host at once"
                );
                // A reload may have given the host another interval since the tick fell due.
                let latest = match self.faults {
                    Faults::None => micros(max_late(tick.target.interval)),
                    Faults::All => micros(*MAX_LATE.end()),
                };
                prop_assert!(
                    self.threads_were_short || self.now - tick.scheduled_at_micros <= latest,
                    "late"
                );
                let takes = self.duration(&tick.target);
                self.under_way.push((self.now + takes, tick));
                let count = self.under_way.len();
                prop_assert_eq!(count, self.schedule.under_way());
                prop_assert!(count <= self.limits.max_under_way);
                self.threads_were_short |= count == self.limits.max_under_way;
            }
        }

        fn duration(&mut self, target: &Target) -> i64 {
            let longest = micros(target.timeout(self.limits.check_timeout));
            if self.faults == Faults::None {
                // Checks of one machine start in the same loop: leave the next tick alone.
                return self.random.i64(1..longest * 9 / 10);
            }
            match self.random.u8(0..10) {
                0 => longest,
                1 => longest + self.random.i64(0..3 * micros(target.interval)),
                _ => self.random.i64(1..SECOND),
            }
        }

        fn finish_checks(&mut self) {
            let now = self.now;
            let mut done: Vec<_> = self.under_way.extract_if(.., |(end, _)| *end <= now).collect();
            self.random.shuffle(&mut done);
            for (_, tick) in done {
                if self.schedule.finished(&tick, tick.scheduled_at_micros).is_some() {
                    self.write(&tick.target.address, tick.scheduled_at_micros, None);
                }
            }
        }

        fn drain(&mut self, visits: usize) {
            let room = self.room;
            let mut late = Vec::new();
            // A result of the model carries its tick only; whose it is follows from the host's order, so ask one by one.
            for _ in 0..visits {
                let front = self.schedule.late.front().copied();
                let address = front
                    .and_then(|id| self.schedule.hosts[id].as_ref())
                    .map(|host| host.target.address.clone());
                self.schedule.drain(1, |_| room, &mut late);
                for entry in late.drain(..) {
                    let (tick, why) = match entry {
                        Late::Missed(missed) => (missed.scheduled_at_micros, Some(missed.why)),
                        Late::Result(tick) => (tick, None),
                    };
                    let address = address.clone().unwrap();
                    self.write(&address, tick, why);
                }
            }
        }

        fn write(&mut self, address: &str, tick: i64, why: Option<Why>) {
            self.written
                .entry(address.to_owned())
                .or_default()
                .push((tick, why));
        }

        fn reload(&mut self) {
            let mut targets = Vec::new();
            let mut hosts = HashMap::new();
            for i in 0..8 {
                if self.random.u8(0..4) == 0 {
                    continue;
                }
                let address = format!("h{i}.example");
                let before = self.hosts.get(&address).copied();
                let interval = match before {
                    Some(before) if self.random.u8(0..3) > 0 => before.interval,
                    _ => SECOND * *self.random.choice(&[1, 2, 7, 10, 11, 60, 300, 3_600]).unwrap(),
                };
                targets.push(shared(&address, u64::try_from(interval / SECOND).unwrap()));
                let presence = match before {
                    Some(before) if before.interval == interval => before,
                    _ => Presence {
                        interval,
                        since: self.now,
                        is_new: before.is_none(),
                    },
                };
                hosts.insert(address, presence);
            }
            for (address, before) in std::mem::take(&mut self.hosts) {
                if hosts.get(&address).is_none_or(|after| after.since == self.now) {
                    self.segments.push((address, before, self.now));
                }
            }
            self.hosts = hosts;
            self.schedule.reload(targets, |_| None, self.now);
        }

        fn stop(&mut self) -> Result<(), TestCaseError> {
            self.schedule.stop(self.now);
            for (address, presence) in std::mem::take(&mut self.hosts) {
                self.segments.push((address, presence, self.now));
            }
            self.now += 3 * SECOND;
            self.finish_checks();
            self.schedule.cut_off();
            self.room = true;
            while self.schedule.has_late() {
                self.drain(1_000);
            }
            prop_assert!(self.schedule.is_over());
            prop_assert_eq!(self.schedule.left().count(), 0);
            prop_assert_eq!(self.schedule.held, 0);
            let written = self.written.values().flatten();
            let missed = written
                .filter_map(|(_, why)| *why)
                .fold([0; Why::ALL.len()], |mut missed, why| {
                    missed[why as usize] += 1;
                    missed
                });
            prop_assert_eq!(self.schedule.missed.0, missed);
            Ok(())
        }

        /// Compares what was written with what the grid asks for, worked out from the host file's history alone.
        fn balance(&self) -> Result<(), TestCaseError> {
            let mut left = self.written.clone();
            let mut count = 0;
            for (address, presence, until) in &self.segments {
                let ticks = left.entry(address.clone()).or_default();
                let mut ticks_of_segment = ticks.drain(..).collect::<VecDeque<_>>();
                let phase = phase_micros(address, presence.interval);
                let mut tick = (presence.since - phase).div_euclid(presence.interval) * presence.interval
                    + phase
                    + presence.interval;
                let spread = micros(FIRST_CHECK_WITHIN);
                if presence.is_new && tick > presence.since + spread + micros(*MAX_LATE.start()) {
                    let latest = presence.since + spread;
                    if let Some((first, _)) = ticks_of_segment
                        .front()
                        .filter(|(first, _)| *first <= latest.min(*until))
                    {
                        prop_assert!(*first > presence.since && *first < tick);
                        ticks_of_segment.pop_front();
                        count += 1;
                    } else {
                        prop_assert!(*until <= latest, "no first check within ten seconds");
                    }
                }
                while tick <= *until {
                    let written = ticks_of_segment.pop_front().map(|(written, _)| written);
                    prop_assert_eq!(written, Some(tick), "{}", address);
                    tick += presence.interval;
                    count += 1;
                }
                ticks.extend(ticks_of_segment);
            }
            prop_assert!(left.values().all(Vec::is_empty), "more than was due: {:?}", left);
            prop_assert_eq!(self.schedule.ticks_due(), count);
            Ok(())
        }
    }

    fn shared(address: &str, interval_seconds: u64) -> Arc<Target> {
        Arc::new(host(address, interval_seconds))
    }

    fn host(address: &str, interval_seconds: u64) -> Target {
        let url = url::Url::parse(&format!("https://{address}/")).unwrap();
        Target::new(address.to_owned(), url, Duration::from_secs(interval_seconds))
    }

    /// Waits for the next check and begins it.
    fn start_one<R>(schedule: &mut Schedule<R>, mut now: i64) -> (Tick, i64) {
        for _ in 0..10 {
            match schedule.next(now, |_| true) {
                Next::Start(tick) => return (tick, now),
                Next::Wait(until) => now = until.unwrap(),
            }
        }
        panic!("no check begins");
    }

    /// The next check, which takes no time.
    fn quick_check(schedule: &mut Schedule<()>) -> Tick {
        let next = schedule.due.peek().unwrap().0.0;
        let (tick, _) = start_one(schedule, next);
        assert_eq!(schedule.finished(&tick, ()), Some(()));
        tick
    }

    fn drained<R>(schedule: &mut Schedule<R>) -> Vec<(i64, Option<Why>)> {
        let mut late = Vec::new();
        while schedule.has_late() {
            schedule.drain(1_000, |_| true, &mut late);
        }
        late.into_iter()
            .map(|entry| match entry {
                Late::Missed(missed) => (missed.scheduled_at_micros, Some(missed.why)),
                Late::Result(_) => (0, None),
            })
            .collect()
    }
}
