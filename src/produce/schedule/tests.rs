use std::collections::HashSet;
use std::time::Duration;

use proptest::prelude::*;

use super::host::{FIRST_CHECK_WITHIN, MAX_LATE};
use super::*;

const SECOND: i64 = 1_000_000;
/// An arbitrary time in 2026.
const START: i64 = 1_790_000_000_123_456;
const LIMITS: Limits = Limits {
    max_under_way: 4,
    check_timeout: Duration::from_secs(10),
};

#[test]
fn ticks_of_a_host_lie_on_its_grid_whenever_the_agent_starts() {
    for start in [START, START + 1, START + 86_400 * SECOND + 77] {
        let mut schedule = Schedule::<()>::new(Rounds::Endless, vec![shared("a.example", 5)], LIMITS, start);
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
    let hosts = (0..1_000).map(|i| shared(&format!("h{i}.example"), 300));
    let mut schedule = Schedule::<()>::new(
        Rounds::Endless,
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
        let first = made.first_tick(Rounds::Endless, LIMITS, START);
        let grid = made.first_on_grid_after(START);
        assert!(first > START && first <= START + 10_500_000);
        assert!(first == grid || first + 10 * SECOND < grid);
        // Two microseconds are left before a check that hangs would last until the grid's tick.
        let late = grid - 10_500_000 - 2;
        assert_eq!(made.first_tick(Rounds::Endless, LIMITS, late), late + 1);
        // With less it lasts until then in any case, and the first checks are spread as usual.
        assert!(made.first_tick(Rounds::Endless, LIMITS, late + 1) > late + 2);
    }
}

#[test]
fn once_checks_every_host_now_and_is_over() {
    let hosts = (0..9).map(|i| shared(&format!("h{i}.example"), 3_600)).collect();
    let mut schedule = Schedule::<()>::new(Rounds::Once, hosts, LIMITS, START);
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
    let mut schedule = Schedule::new(Rounds::Endless, vec![shared("a.example", 1)], LIMITS, START);
    let (first, now) = start_one(&mut schedule, START);
    for i in 1..=3 {
        let wait = schedule.next(now + i * SECOND, |_| true);
        assert!(matches!(wait, Next::Wait(Some(_))));
    }
    assert!(drained(&mut schedule).is_empty(), "the check comes first");
    assert_eq!(schedule.finished(&first, "slow"), Some("slow"));
    let ticks = (1..=3).map(|i| (now + i * SECOND, Some(MissedReason::Busy)));
    assert_eq!(drained(&mut schedule), ticks.collect::<Vec<_>>());
}

#[test]
fn a_stall_costs_its_ticks_and_makes_no_burst() {
    let hosts = (0..50).map(|i| shared(&format!("h{i}.example"), 10)).collect();
    let limits = Limits {
        max_under_way: 50,
        ..LIMITS
    };
    let mut schedule = Schedule::<()>::new(Rounds::Endless, hosts, limits, START);
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
    let missed = late
        .iter()
        .filter(|(_, reason)| *reason == Some(MissedReason::Stalled));
    assert_eq!(missed.count(), 50 * 360 - burst);
    assert_eq!(late.len(), 50 * 360);
}

#[test]
fn a_suspended_day_of_five_thousand_hosts_is_held_as_ranges() {
    let hosts = (0..5_000).map(|i| shared(&format!("h{i}.example"), 1)).collect();
    let mut schedule = Schedule::<()>::new(Rounds::Endless, hosts, LIMITS, START);
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
    let hosts = vec![shared("a.example", 1), shared("b.example", 60)];
    let limits = Limits {
        max_under_way: 1,
        ..LIMITS
    };
    let mut schedule = Schedule::new(Rounds::Endless, hosts, limits, START);
    // b.example takes the only thread, and the ticks of a.example wait for it.
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
    assert!(schedule.is_short_of_threads());
    let missed = drained(&mut schedule);
    assert!(missed.len() >= 4, "{missed:?}");
    assert!(
        missed
            .iter()
            .all(|(_, reason)| *reason == Some(MissedReason::NoThread))
    );
    assert_eq!(schedule.finished(&hanging, "hung"), Some("hung"));
    let (tick, _) = start_one(&mut schedule, now);
    assert!(now - tick.scheduled_at_micros <= SECOND);
    assert!(!schedule.is_short_of_threads());
}

#[test]
fn without_room_ticks_are_missed_and_written_when_there_is_room_again() {
    let mut schedule = Schedule::<()>::new(Rounds::Endless, vec![shared("a.example", 1)], LIMITS, START);
    for second in 1..=3_600 {
        let next = schedule.next(START + second * SECOND, |_| false);
        assert!(matches!(next, Next::Wait(_)));
        let mut late = Vec::new();
        schedule.drain(10, |_| false, &mut late);
        assert!(late.is_empty());
    }
    assert_eq!(schedule.left().collect::<Vec<_>>(), [("a.example", 3_600)]);
    let late = drained(&mut schedule);
    assert_eq!(late.len(), 3_600);
    assert!(
        late.iter()
            .all(|(_, reason)| *reason == Some(MissedReason::NoRoom))
    );
}

#[test]
fn a_check_may_begin_as_late_as_the_limit_and_no_later() {
    for (later, is_checked) in [(0, true), (1, false)] {
        let mut schedule = Schedule::<()>::new(Rounds::Endless, vec![shared("a.example", 10)], LIMITS, START);
        let Next::Wait(Some(tick)) = schedule.next(START, |_| true) else {
            panic!("nothing is due yet")
        };
        let now = tick + micros(max_late(Duration::from_secs(10))) + later;
        let next = schedule.next(now, |_| true);
        assert_eq!(matches!(next, Next::Start(_)), is_checked);
    }
}

#[test]
fn when_too_many_results_wait_only_hosts_without_unwritten_records_are_checked() {
    let mut schedule = Schedule::new(Rounds::Endless, vec![shared("a.example", 1)], LIMITS, START);
    schedule.held = MAX_HELD;
    let (tick, now) = start_one(&mut schedule, START);
    schedule.next(now + SECOND, |_| true);
    assert_eq!(schedule.finished(&tick, ()), Some(()));
    assert!(matches!(schedule.next(now + 2 * SECOND, |_| true), Next::Wait(_)));
    let missed = [
        (now + SECOND, Some(MissedReason::Busy)),
        (now + 2 * SECOND, Some(MissedReason::Backlog)),
    ];
    assert_eq!(drained(&mut schedule), missed);
}

#[test]
fn every_reason_for_a_missed_tick_has_a_word_and_a_text_of_its_own() {
    let words: HashSet<_> = MissedReason::ALL.iter().map(|reason| reason.as_word()).collect();
    let texts: HashSet<_> = MissedReason::ALL.iter().map(|reason| reason.as_str()).collect();
    assert_eq!(
        (words.len(), texts.len()),
        (MissedReason::ALL.len(), MissedReason::ALL.len())
    );
    assert!(!words.contains("") && !texts.contains(""));
}

#[test]
fn a_reload_leaves_unchanged_hosts_their_rhythm_and_gives_them_their_new_options() {
    let mut schedule = Schedule::new(Rounds::Endless, vec![shared("a.example", 7)], LIMITS, START);
    let (before, now) = start_one(&mut schedule, START);
    let changed = Target {
        follow: 3,
        ..host("a.example", 7)
    };
    reload(
        &mut schedule,
        vec![changed.into(), shared("b.example", 1)],
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
    let mut schedule = Schedule::new(Rounds::Endless, vec![shared("a.example", 1)], LIMITS, START);
    let (open, now) = start_one(&mut schedule, START);
    reload(&mut schedule, vec![shared("b.example", 3_600)], now + 1);
    reload(&mut schedule, vec![shared("a.example", 1)], now + 2);
    assert!(matches!(schedule.next(now + SECOND, |_| true), Next::Wait(_)));
    assert_eq!(schedule.finished(&open, "old"), Some("old"));
    assert_eq!(
        drained(&mut schedule),
        [(now + SECOND, Some(MissedReason::Busy))],
        "due after it came back"
    );
}

#[test]
fn removed_hosts_take_no_memory_once_their_records_are_written() {
    let mut schedule = Schedule::<()>::new(Rounds::Endless, vec![shared("a.example", 1)], LIMITS, START);
    for i in 0..1_000 {
        reload(
            &mut schedule,
            vec![shared(&format!("h{i}.example"), 1)],
            START + i,
        );
    }
    assert!(schedule.hosts.len() <= 2);
    assert_eq!(schedule.by_address.len(), 1);
    assert!(schedule.due.len() <= 2);
}

/// A share of one host, which was last recorded a minute ago, in a schedule that also has a host without a share.
fn with_a_share() -> (Share, Schedule<()>) {
    let share = Share {
        topic: "t".into(),
        partition: 0,
    };
    let mut schedule = Schedule::new(Rounds::Endless, vec![shared("own.example", 60)], LIMITS, START);
    let recorded = |_: &str| Some(START - 60 * SECOND);
    schedule.add_share(&share, [shared("a.example", 1)], recorded, START);
    (share, schedule)
}

#[test]
fn the_ticks_before_a_takeover_are_missed_and_the_last_one_is_checked() {
    let (share, mut schedule) = with_a_share();
    assert_eq!(schedule.hosts(), 2);
    let Next::Start(tick) = schedule.next(START, |_| true) else {
        panic!("the last tick is not late")
    };
    assert_eq!(tick.share.as_ref(), Some(&share));
    assert!(schedule.has_open(&share));
    let oldest = schedule.open_since()[&share];
    assert!(
        (START - 60 * SECOND..=START - 59 * SECOND).contains(&oldest),
        "{oldest}"
    );
    assert_eq!(
        schedule.finished(&tick, ()),
        None,
        "earlier ones are written first"
    );
    let late = drained(&mut schedule);
    assert_eq!(late.len(), 60);
    assert!(
        late[..59]
            .iter()
            .all(|(_, reason)| *reason == Some(MissedReason::Unattended))
    );
    assert!(!schedule.has_open(&share));
    assert_eq!(schedule.open_since().get(&share), None);
}

#[test]
fn a_share_that_was_finished_has_no_later_ticks() {
    let (share, mut schedule) = with_a_share();
    schedule.finish_share(&share, START);
    assert!(schedule.has_open(&share), "what is due is still checked");
    while let Next::Start(tick) = schedule.next(START, |_| true) {
        schedule.finished(&tick, ());
    }
    drained(&mut schedule);
    assert!(!schedule.has_open(&share));
    assert_eq!(schedule.open_since()[&share], START + 1);
    let (next, _) = start_one(&mut schedule, START);
    assert_eq!(next.target.address, "own.example");
    schedule.remove_share(&share);
    assert_eq!(schedule.open_since().get(&share), None);
    assert_eq!(schedule.hosts(), 1);
}

#[test]
fn the_result_of_a_check_whose_share_was_given_up_frees_its_thread_once() {
    let (share, mut schedule) = with_a_share();
    let (given_up, now) = start_one(&mut schedule, START);
    let (own, _) = start_one(&mut schedule, now);
    assert_eq!(own.target.address, "own.example");
    schedule.remove_share(&share);
    assert_eq!((schedule.under_way(), schedule.hosts()), (2, 1));
    assert_eq!(schedule.finished(&given_up, ()), None);
    assert_eq!(schedule.under_way(), 1);
    schedule.cut_off();
    assert_eq!(schedule.under_way(), 0);
    assert_eq!(schedule.finished(&own, ()), None, "it was cut off");
    assert_eq!(schedule.under_way(), 0);
}

#[test]
fn a_check_from_before_a_share_was_given_up_is_not_the_one_that_was_begun_since() {
    let (share, mut schedule) = with_a_share();
    let (old, _) = start_one(&mut schedule, START);
    schedule.remove_share(&share);
    let recorded = |_: &str| Some(START - 60 * SECOND);
    schedule.add_share(&share, [shared("a.example", 1)], recorded, START);
    let (new, _) = start_one(&mut schedule, START);
    assert_eq!(
        (new.host, new.scheduled_at_micros),
        (old.host, old.scheduled_at_micros)
    );
    assert!(schedule.is_under_way(&new) && !schedule.is_under_way(&old));
}

#[test]
fn results_of_a_share_that_was_given_up_are_no_longer_held() {
    let (share, mut schedule) = with_a_share();
    let (tick, _) = start_one(&mut schedule, START);
    assert_eq!(schedule.finished(&tick, ()), None);
    assert_eq!(schedule.held, 1);
    schedule.remove_share(&share);
    assert_eq!((schedule.held, schedule.hosts()), (0, 1));
    assert_eq!(drained(&mut schedule), []);
}

#[test]
fn a_stop_ends_the_ticks_and_cuts_off_what_hangs() {
    let hosts = vec![shared("a.example", 1), shared("b.example", 1)];
    let limits = Limits {
        max_under_way: 1,
        ..LIMITS
    };
    let mut schedule = Schedule::<()>::new(Rounds::Endless, hosts, limits, START);
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
    let mut reasons: Vec<_> = late
        .iter()
        .map(|entry| match entry {
            BacklogItem::Missed(missed) => (missed.reason, missed.started_at_micros),
            BacklogItem::Result(()) => panic!("nothing finished"),
        })
        .collect();
    reasons.sort_by_key(|(reason, _)| *reason == MissedReason::CutOff);
    assert_eq!(
        reasons,
        [(MissedReason::Stopped, None), (MissedReason::CutOff, Some(began))]
    );
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

    /// Slow checks, stalls, outages, few threads, reloads and a stop: each tick of the grid is written once, in order.
    #[test]
    fn every_tick_of_every_history_is_written_once_and_in_order(seed: u64) {
        Model::new(seed, Faults::All).run(400)?;
    }

    #[test]
    fn without_faults_every_tick_is_checked_on_time(seed: u64) {
        let written = Model::new(seed, Faults::None).run(400)?;
        let mut reasons = written.values().flatten().filter_map(|(_, reason)| *reason);
        prop_assert_eq!(reasons.find(|reason| !matches!(reason, MissedReason::CutOff | MissedReason::Stopped)), None, "the stop at the end may");
    }
}

#[derive(PartialEq)]
enum Faults {
    None,
    All,
}

/// The world around a schedule: slow checks, a loop that stalls, an outage of Kafka, a host file that changes. It records
/// on its own which hosts existed from when to when.
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
    written: HashMap<String, Vec<(i64, Option<MissedReason>)>>,
    threads_were_short: bool,
}

#[derive(Clone, Copy)]
struct Presence {
    interval: i64,
    since: i64,
    is_new: bool,
}

type Written = HashMap<String, Vec<(i64, Option<MissedReason>)>>;

impl Model {
    fn new(seed: u64, faults: Faults) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let now = START + random.i64(0..100_000 * SECOND);
        let limits = Limits {
            max_under_way: match faults {
                Faults::None => 100,
                Faults::All => random.usize(1..8),
            },
            // A longer one may still run at the host's first tick on its grid.
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
            schedule: Schedule::new(Rounds::Endless, Vec::new(), limits, now),
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
            // The check must end before the next tick.
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
        // A result contains only its tick, so the host has to be known before it is taken.
        for _ in 0..visits {
            let front = self.schedule.backlogged.front().copied();
            let address = front
                .and_then(|id| self.schedule.hosts[id].as_ref())
                .map(|host| host.target.address.clone());
            self.schedule.drain(1, |_| room, &mut late);
            for entry in late.drain(..) {
                let (tick, reason) = match entry {
                    BacklogItem::Missed(missed) => (missed.scheduled_at_micros, Some(missed.reason)),
                    BacklogItem::Result(tick) => (tick, None),
                };
                let address = address.clone().unwrap();
                self.write(&address, tick, reason);
            }
        }
    }

    fn write(&mut self, address: &str, tick: i64, reason: Option<MissedReason>) {
        self.written
            .entry(address.to_owned())
            .or_default()
            .push((tick, reason));
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
        reload(&mut self.schedule, targets, self.now);
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
        while self.schedule.has_backlog() {
            self.drain(1_000);
        }
        prop_assert!(self.schedule.is_over());
        prop_assert_eq!(self.schedule.left().count(), 0);
        prop_assert_eq!(self.schedule.held, 0);
        let written = self.written.values().flatten();
        let missed = written.filter_map(|(_, reason)| *reason).fold(
            [0; MissedReason::ALL.len()],
            |mut missed, reason| {
                missed[reason as usize] += 1;
                missed
            },
        );
        let counts = self.schedule.missed();
        prop_assert_eq!(MissedReason::ALL.map(|reason| counts.count(reason)), missed);
        prop_assert_eq!(counts.all(), missed.iter().sum::<u64>());
        Ok(())
    }

    /// Compares the written ticks with those that follow from the history of the host file alone.
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

/// The hosts become these.
fn reload<R>(schedule: &mut Schedule<R>, targets: Vec<Arc<Target>>, now: i64) {
    let is_left = |host: &&Arc<Target>| targets.iter().all(|target| target.address != host.address);
    let hosts = schedule.hosts.iter().flatten().map(|host| &host.target);
    let removed: Vec<Arc<Target>> = hosts.filter(is_left).cloned().collect();
    schedule.change(targets, &removed, |_| None, now);
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

fn drained<R>(schedule: &mut Schedule<R>) -> Vec<(i64, Option<MissedReason>)> {
    let mut late = Vec::new();
    while schedule.has_backlog() {
        schedule.drain(1_000, |_| true, &mut late);
    }
    late.into_iter()
        .map(|entry| match entry {
            BacklogItem::Missed(missed) => (missed.scheduled_at_micros, Some(missed.reason)),
            BacklogItem::Result(_) => (0, None),
        })
        .collect()
}
