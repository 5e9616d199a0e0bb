//! Threads for checks: as many as there are checks under way.
//!
//! A check begins on the thread that became idle last, or on a new one, so a check never waits for another. Unused threads end
//! after a while, and used ones stay warm. What a check is and where its result goes are arguments.

use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use crate::check::observation::Observation;
use crate::check::target::Target;
use crate::clock::{Clock, instant_now};
use crate::lock::lock;
use crate::produce::schedule::Tick;
use crate::sample::Outcome;

/// A thread that was idle for this long ends. It is longer than most pauses between ticks.
const IDLE: Duration = Duration::from_secs(15);

/// The deepest call found, a TLS handshake in a debug build, needs 192 KiB. The rest is reserved address space, not memory.
const STACK_BYTES: usize = 512 * 1024;

/// A check that ended.
#[derive(Debug)]
pub struct Done {
    pub tick: Tick,
    pub started_at_micros: i64,
    pub observation: Observation,
}

/// Dropping it ends the idle threads at once and the others after their check, without waiting for them.
pub struct Pool(Arc<Shared>);

type Check = Box<dyn FnMut(&Target, Instant) -> Observation>;

struct Shared {
    clock: Clock,
    check_timeout: Duration,
    idle_time: Duration,
    make_check: Box<dyn Fn() -> Check + Send + Sync>,
    report: Box<dyn Fn(Done) + Send + Sync>,
    /// `None`: the pool was dropped.
    idle: Mutex<Option<Vec<IdleThread>>>,
    threads: AtomicUsize,
}

/// Where the next job of an idle thread goes. The thread ends when this is dropped.
struct IdleThread {
    id: ThreadId,
    jobs: SyncSender<Job>,
}

/// A check to begin, and what its thread leaves in the pool when it is idle again.
struct Job {
    tick: Tick,
    jobs: SyncSender<Job>,
}

impl Pool {
    /// `make_check` is called on each thread, for its checks. `check_timeout` applies to hosts without a timeout of their own.
    /// `report` is called on the thread of the check.
    pub fn new<C>(
        clock: Clock,
        check_timeout: Duration,
        make_check: impl Fn() -> C + Send + Sync + 'static,
        report: impl Fn(Done) + Send + Sync + 'static,
    ) -> Self
    where
        C: FnMut(&Target, Instant) -> Observation + 'static,
    {
        Self(Arc::new(Shared {
            clock,
            check_timeout,
            idle_time: IDLE,
            make_check: Box::new(move || Box::new(make_check())),
            report: Box::new(report),
            idle: Mutex::new(Some(Vec::new())),
            threads: AtomicUsize::new(0),
        }))
    }

    /// Begins a check on an idle thread, the one that became idle last, or on a new one.
    ///
    /// # Errors
    /// No thread can be started. The tick is returned.
    pub fn start(&self, tick: Tick) -> Result<(), (Tick, io::Error)> {
        let idle = self.0.idle().as_mut().and_then(Vec::pop);
        let jobs = match idle {
            Some(thread) => thread.jobs,
            None => match self.start_thread() {
                Ok(jobs) => jobs,
                Err(error) => return Err((tick, error)),
            },
        };
        let job = Job {
            tick,
            jobs: jobs.clone(),
        };
        // The thread cannot have ended, because we have its sender.
        let _ = jobs.send(job);
        Ok(())
    }

    fn start_thread(&self) -> io::Result<SyncSender<Job>> {
        let (sender, jobs) = sync_channel(1);
        let shared = Arc::clone(&self.0);
        thread::Builder::new()
            .name("check".into())
            .stack_size(STACK_BYTES)
            .spawn(move || shared.work(&jobs))?;
        self.0.threads.fetch_add(1, Ordering::Relaxed);
        Ok(sender)
    }

    /// The number of threads, busy or idle.
    pub fn threads(&self) -> usize {
        self.0.threads.load(Ordering::Relaxed)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        *self.0.idle() = None;
    }
}

impl Shared {
    fn work(&self, jobs: &Receiver<Job>) {
        let mut check = None;
        while let Some(job) = self.next_job(jobs) {
            let done = self.check(&mut check, job.tick);
            // The thread is idle before the result is reported. Otherwise the next check would start another thread.
            if let Some(idle) = &mut *self.idle() {
                let id = thread::current().id();
                idle.push(IdleThread { id, jobs: job.jobs });
            }
            (self.report)(done);
        }
        self.threads.fetch_sub(1, Ordering::Relaxed);
    }

    /// Waits for the next job. `None`: the thread was idle for too long, or the pool was dropped.
    fn next_job(&self, jobs: &Receiver<Job>) -> Option<Job> {
        let job = jobs.recv_timeout(self.idle_time).or_else(|_| {
            if let Some(idle) = &mut *self.idle() {
                idle.retain(|other| other.id != thread::current().id());
            }
            // If `start` has just removed this thread from the idle ones, it sends a job; otherwise this ends at once.
            jobs.recv()
        });
        job.ok()
    }

    fn check(&self, check: &mut Option<Check>, tick: Tick) -> Done {
        let started_at_micros = self.clock.now_micros();
        let deadline = instant_now() + tick.target.timeout(self.check_timeout);
        let observation = catch_unwind(AssertUnwindSafe(|| {
            let check = check.get_or_insert_with(&self.make_check);
            check(&tick.target, deadline)
        }));
        let observation = observation.unwrap_or_else(|panic| {
            // The panic may have left it in any state.
            *check = None;
            let message = panic_message(&*panic);
            let bug = format!("a bug in host-metrics: the check panicked: {message}");
            Observation::failed(Outcome::AgentError, bug)
        });
        Done {
            tick,
            started_at_micros,
            observation,
        }
    }

    fn idle(&self) -> MutexGuard<'_, Option<Vec<IdleThread>>> {
        lock(&self.idle)
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("without a message")
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::sync::Condvar;
    use std::sync::mpsc::channel;

    use super::*;
    use crate::produce::schedule::{Limits, Next, Rounds, Schedule};

    /// Longer than anything here takes on a busy machine.
    const BOUND: Duration = Duration::from_secs(20);

    #[test]
    fn the_pool_grows_with_its_jobs_and_reuses_the_thread_that_became_idle_last() {
        let gate = Gate::default();
        let (pool, done) = pool(IDLE, &gate);
        for tick in ticks(20) {
            pool.start(tick).unwrap();
        }
        gate.wait_for(20);
        assert_eq!(pool.threads(), 20);
        gate.open();
        let busy: HashSet<_> = (0..20).map(|_| done.recv_timeout(BOUND).unwrap().1).collect();
        assert_eq!(busy.len(), 20);

        let mut last = None;
        for tick in ticks(50) {
            pool.start(tick).unwrap();
            let (_, thread) = done.recv_timeout(BOUND).unwrap();
            assert!(last.is_none_or(|last| last == thread));
            last = Some(thread);
        }
        assert_eq!(pool.threads(), 20);
    }

    #[test]
    fn it_shrinks_when_threads_stay_idle_and_grows_again() {
        let gate = Gate::default();
        gate.open();
        let (pool, done) = pool(Duration::from_millis(5), &gate);
        for _ in 0..2 {
            for tick in ticks(5) {
                pool.start(tick).unwrap();
            }
            for _ in 0..5 {
                done.recv_timeout(BOUND).unwrap();
            }
            wait_until(|| pool.threads() == 0);
        }
    }

    #[test]
    fn a_job_given_to_a_thread_that_is_about_to_end_is_done() {
        let gate = Gate::default();
        gate.open();
        let (pool, done) = pool(Duration::from_micros(50), &gate);
        for tick in ticks(1).into_iter().cycle().take(3_000) {
            pool.start(tick).unwrap();
            done.recv_timeout(BOUND).unwrap();
        }
    }

    #[test]
    fn a_check_that_panics_is_an_agent_error_and_its_thread_goes_on_with_a_new_check() {
        let (report, done) = channel();
        let clock = Clock::start().unwrap();
        let made = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&made);
        let make = move || {
            counted.fetch_add(1, Ordering::Relaxed);
            |target: &Target, _deadline: Instant| match target.address.as_str() {
                "h0.example" => panic!("index {} out of range", 7),
                _ => ok(),
            }
        };
        let pool = Pool::new(clock, BOUND, make, move |done| report.send(done).unwrap());
        for (tick, outcome) in ticks(2).into_iter().zip([Outcome::AgentError, Outcome::Ok]) {
            pool.start(tick).unwrap();
            let done = done.recv_timeout(BOUND).unwrap();
            assert_eq!(done.observation.outcome, outcome);
            let names_it = |error: String| error.contains("index 7 out of range");
            assert_eq!(
                done.observation.error.is_some_and(names_it),
                outcome == Outcome::AgentError
            );
        }
        assert_eq!((pool.threads(), made.load(Ordering::Relaxed)), (1, 2));
    }

    #[test]
    fn the_deadline_is_the_hosts_own_timeout_within_its_interval() {
        let (report, done) = channel();
        let clock = Clock::start().unwrap();
        let make = move || {
            let report = report.clone();
            move |_: &Target, deadline: Instant| {
                report.send(deadline - instant_now()).unwrap();
                ok()
            }
        };
        let pool = Pool::new(clock, Duration::from_secs(10), make, |_| {});
        let mut tick = ticks(1).remove(0);
        pool.start(tick.clone()).unwrap();
        let capped = done.recv_timeout(BOUND).unwrap();
        assert!(capped <= Duration::from_millis(950), "{capped:?}");
        Arc::make_mut(&mut tick.target).timeout = Some(Duration::from_millis(200));
        pool.start(tick).unwrap();
        let own = done.recv_timeout(BOUND).unwrap();
        assert!(own <= Duration::from_millis(200), "{own:?}");
    }

    #[test]
    fn dropping_it_ends_idle_threads_at_once_and_busy_ones_after_their_check() {
        let gate = Gate::default();
        let (pool, done) = pool(IDLE, &gate);
        for tick in ticks(3) {
            pool.start(tick).unwrap();
        }
        gate.wait_for(3);
        let shared = Arc::clone(&pool.0);
        drop(pool);
        assert_eq!(shared.threads.load(Ordering::Relaxed), 3);
        gate.open();
        for _ in 0..3 {
            done.recv_timeout(BOUND).unwrap();
        }
        wait_until(|| shared.threads.load(Ordering::Relaxed) == 0);
    }

    /// Holds checks up until it is opened.
    #[derive(Clone, Default)]
    struct Gate(Arc<(Mutex<(usize, bool)>, Condvar)>);

    impl Gate {
        fn pass(&self) {
            let (state, changed) = &*self.0;
            let mut state = state.lock().unwrap();
            state.0 += 1;
            changed.notify_all();
            drop(changed.wait_while(state, |(_, open)| !*open).unwrap());
        }

        fn wait_for(&self, count: usize) {
            let (state, changed) = &*self.0;
            let fewer = |(waiting, _): &mut (usize, bool)| *waiting < count;
            let waited = changed.wait_timeout_while(state.lock().unwrap(), BOUND, fewer);
            assert!(!waited.unwrap().1.timed_out());
        }

        fn open(&self) {
            let (state, changed) = &*self.0;
            state.lock().unwrap().1 = true;
            changed.notify_all();
        }
    }

    fn pool(idle_time: Duration, gate: &Gate) -> (Pool, Receiver<(Done, ThreadId)>) {
        let (report, done) = channel();
        let gate = gate.clone();
        let make = move || {
            let gate = gate.clone();
            move |_: &Target, _: Instant| {
                gate.pass();
                ok()
            }
        };
        // The receiver may be gone.
        let report = move |done| drop(report.send((done, std::thread::current().id())));
        let mut pool = Pool::new(Clock::start().unwrap(), BOUND, make, report);
        Arc::get_mut(&mut pool.0).unwrap().idle_time = idle_time;
        (pool, done)
    }

    fn ok() -> Observation {
        Observation {
            error: None,
            ..Observation::failed(Outcome::Ok, "")
        }
    }

    fn ticks(count: usize) -> Vec<Tick> {
        let url = url::Url::parse("http://example.com/").unwrap();
        let target = |i| Target::new(format!("h{i}.example"), url.clone(), Duration::from_secs(1));
        let limits = Limits {
            max_under_way: count,
            check_timeout: BOUND,
        };
        let mut schedule = Schedule::<()>::new(
            Rounds::Once,
            (0..count).map(target).map(Arc::new).collect(),
            limits,
            0,
        );
        std::iter::from_fn(|| match schedule.next(0, |_| true) {
            Next::Start(tick) => Some(tick),
            Next::Wait(_) => None,
        })
        .collect()
    }

    fn wait_until(condition: impl Fn() -> bool) {
        let deadline = instant_now() + BOUND;
        while !condition() {
            assert!(instant_now() < deadline, "it did not come true");
            std::thread::yield_now();
        }
    }
}
