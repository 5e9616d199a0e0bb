//! The handle that tells the whole program to stop or to read its host file again.
//!
//! Owns the signal thread and the stop and reload flags. A request wakes every wait made through the handle. Code that waits
//! elsewhere registers a waker, or, where it polls librdkafka anyway, looks at the flag after each poll.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::clock::instant_now;
use crate::lock::lock;
use crate::thread::start_thread;

/// The longest time from the stop signal to the end of the process, including the last flush. Container runtimes kill
/// after ten seconds.
pub const STOP_WITHIN: Duration = Duration::from_secs(9);

/// Why a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// The instant was reached.
    Due,
    /// A stop was requested. Every later wait ends immediately.
    Stop,
    /// A reload was requested. Each request ends one wait.
    Reload,
}

type Waker = Box<dyn Fn() + Send>;

#[derive(Default)]
struct Requests {
    stop_at: Option<Instant>,
    reload: bool,
    wakers: Vec<Waker>,
}

#[derive(Default)]
struct Shared {
    requests: Mutex<Requests>,
    changed: Condvar,
}

/// The handle. All clones share the same requests.
#[derive(Clone, Default)]
pub struct Shutdown(Arc<Shared>);

impl Shutdown {
    pub fn new() -> Self {
        Self::default()
    }

    /// Requests a clean stop, as the first SIGTERM does. A later request has no effect.
    pub fn request(&self) {
        self.change(|requests| {
            requests.stop_at.get_or_insert_with(instant_now);
        });
    }

    /// Requests that the host file be read again, as SIGHUP does.
    pub fn request_reload(&self) {
        self.change(|requests| requests.reload = true);
    }

    /// Whether a stop was requested.
    pub fn requested(&self) -> bool {
        self.requested_at().is_some()
    }

    /// When the stop was requested. The process must end within [`STOP_WITHIN`] of it.
    pub fn requested_at(&self) -> Option<Instant> {
        self.lock().stop_at
    }

    /// Whether a reload was requested since the last call.
    pub fn take_reload(&self) -> bool {
        std::mem::take(&mut self.lock().reload)
    }

    /// Waits for the instant, a stop or a reload, whichever comes first.
    pub fn wait_until(&self, instant: Instant) -> Wake {
        let mut requests = self.lock();
        loop {
            if requests.stop_at.is_some() {
                return Wake::Stop;
            }
            if std::mem::take(&mut requests.reload) {
                return Wake::Reload;
            }
            let left = instant.saturating_duration_since(instant_now());
            if left.is_zero() {
                return Wake::Due;
            }
            requests = self
                .0
                .changed
                .wait_timeout(requests, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Calls `wake` at every request from now on, on the requesting thread, to end a wait elsewhere. `wake` must not block
    /// and must not use this handle. It is called immediately if a stop was already requested.
    pub fn on_request(&self, wake: impl Fn() + Send + 'static) {
        let mut requests = self.lock();
        if requests.stop_at.is_some() {
            wake();
        }
        requests.wakers.push(Box::new(wake));
    }

    /// From now on SIGTERM and SIGINT request a stop, and SIGHUP requests a reload. A second SIGTERM or SIGINT ends the
    /// process immediately, with the status 128 + its number.
    pub fn listen_to_signals(&self) -> io::Result<()> {
        let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP])?;
        let shutdown = self.clone();
        start_thread("signals", move || {
            for signal in signals.forever() {
                match signal {
                    SIGHUP => shutdown.request_reload(),
                    _ if shutdown.requested() => end_at_once(128 + signal),
                    _ => shutdown.request(),
                }
            }
        })?;
        Ok(())
    }

    fn change(&self, change: impl FnOnce(&mut Requests)) {
        let mut requests = self.lock();
        change(&mut requests);
        self.0.changed.notify_all();
        requests.wakers.iter().for_each(|wake| wake());
    }

    // Ignores a poisoned lock, so that the program can be stopped after a panic in a waker.
    fn lock(&self) -> MutexGuard<'_, Requests> {
        lock(&self.0.requests)
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "after the second signal no destructor may delay the end"
)]
fn end_at_once(status: i32) -> ! {
    std::process::exit(status)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;

    use super::*;

    const HOUR: Duration = Duration::from_secs(3_600);
    /// Far longer than a thread needs to wake up, far shorter than an hour.
    const BOUND: Duration = Duration::from_secs(30);

    /// Starts a wait of an hour on another thread, and receives how it ends.
    fn waiting(shutdown: &Shutdown) -> mpsc::Receiver<Wake> {
        let (sender, receiver) = mpsc::channel();
        let shutdown = shutdown.clone();
        std::thread::spawn(move || sender.send(shutdown.wait_until(instant_now() + HOUR)));
        receiver
    }

    #[test]
    fn a_wait_ends_when_it_is_due() {
        let shutdown = Shutdown::new();
        assert_eq!(shutdown.wait_until(instant_now()), Wake::Due);
        let due = instant_now() + Duration::from_millis(5);
        assert_eq!(shutdown.wait_until(due), Wake::Due);
        assert!(instant_now() >= due);
    }

    #[test]
    fn a_request_ends_every_wait_and_all_later_ones() {
        let shutdown = Shutdown::new();
        let waits = [waiting(&shutdown), waiting(&shutdown)];
        assert!(!shutdown.requested());
        shutdown.request();
        for wait in waits {
            assert_eq!(wait.recv_timeout(BOUND), Ok(Wake::Stop));
        }
        assert!(shutdown.requested());
        assert_eq!(shutdown.wait_until(instant_now() + HOUR), Wake::Stop);
        assert_eq!(shutdown.wait_until(instant_now()), Wake::Stop);
    }

    #[test]
    fn the_first_request_is_the_one_that_counts() {
        let shutdown = Shutdown::new();
        shutdown.request();
        let first = shutdown.requested_at();
        assert!(first.is_some());
        shutdown.clone().request();
        assert_eq!(shutdown.requested_at(), first);
    }

    #[test]
    fn a_reload_ends_one_wait_and_a_stop_comes_before_it() {
        let shutdown = Shutdown::new();
        let wait = waiting(&shutdown);
        shutdown.request_reload();
        assert_eq!(wait.recv_timeout(BOUND), Ok(Wake::Reload));
        assert!(!shutdown.take_reload());
        assert_eq!(shutdown.wait_until(instant_now()), Wake::Due);

        shutdown.request_reload();
        assert!(shutdown.take_reload());
        shutdown.request_reload();
        shutdown.request();
        assert_eq!(shutdown.wait_until(instant_now() + HOUR), Wake::Stop);
    }

    #[test]
    fn wakers_are_called_at_every_request_and_immediately_after_a_stop() {
        let shutdown = Shutdown::new();
        let calls = Arc::new(AtomicUsize::new(0));
        let count = |calls: &Arc<AtomicUsize>| {
            let calls = Arc::clone(calls);
            move || {
                calls.fetch_add(1, Ordering::SeqCst);
            }
        };
        shutdown.on_request(count(&calls));
        assert_eq!(calls.load(Ordering::SeqCst), 0);
        shutdown.request_reload();
        shutdown.request();
        assert_eq!(calls.load(Ordering::SeqCst), 2);

        let late = Arc::new(AtomicUsize::new(0));
        shutdown.on_request(count(&late));
        assert_eq!(late.load(Ordering::SeqCst), 1);
    }
}
