//! Name lookups: shared, bounded, and without threads.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex, mpsc};
use std::time::Duration;

use host_metrics::check::fault::NameError;
use host_metrics::check::resolver::Names;
use host_metrics::sample::Outcome;

use super::{LONG, SHORT, assert_consistent, checker, checker_with_names, now, target};
use crate::child;
use crate::site::{self, Site};

#[test]
fn simultaneous_lookups_of_a_name_are_one_and_a_later_one_is_new() {
    let asked = Arc::new(AtomicUsize::new(0));
    let (release, released) = mpsc::channel::<()>();
    let released = Mutex::new(released);
    let names = Names::new(
        Box::new({
            let asked = Arc::clone(&asked);
            move |_, _| {
                asked.fetch_add(1, Ordering::SeqCst);
                released.lock().unwrap().recv_timeout(LONG).unwrap();
                Ok(vec![Ipv4Addr::LOCALHOST.into()])
            }
        }),
        4,
    );
    let together = 8;
    let ready = Barrier::new(together + 1);
    std::thread::scope(|scope| {
        let waiting: Vec<_> = (0..together)
            .map(|_| {
                scope.spawn(|| {
                    ready.wait();
                    names.resolve("site.test", None, now() + LONG)
                })
            })
            .collect();
        ready.wait();
        // All of them wait by now or soon. One that comes late starts a new lookup and gets the second release.
        site::slowly(Duration::from_millis(100));
        release.send(()).unwrap();
        release.send(()).unwrap();
        for answer in waiting {
            assert_eq!(answer.join().unwrap(), Ok(vec![Ipv4Addr::LOCALHOST.into()]));
        }
    });
    let shared = asked.load(Ordering::SeqCst);
    assert!(shared <= 2, "{together} checks at once asked {shared} times");
    release.send(()).unwrap();
    names.resolve("site.test", None, now() + LONG).unwrap();
    assert!(asked.load(Ordering::SeqCst) > shared.min(1), "an answer was kept");
}

#[test]
fn hanging_lookups_delay_only_their_own_names_and_free_their_threads() {
    let names = Names::new(
        Box::new(|name, _| {
            while name.starts_with("silent") {
                std::thread::park();
            }
            Ok(vec![Ipv4Addr::LOCALHOST.into()])
        }),
        4,
    );
    for number in 0..3 {
        let silent = format!("silent-{number}.test");
        assert_eq!(
            names.resolve(&silent, None, now() + SHORT / 20),
            Err(NameError::TimedOut)
        );
    }
    // One thread is left, which serves all other names.
    for number in 0..50 {
        let answer = names.resolve(&format!("site-{number}.test"), None, now() + LONG);
        assert_eq!(answer, Ok(vec![Ipv4Addr::LOCALHOST.into()]));
    }
    // A second check of a hanging name joins its lookup instead of taking that thread.
    assert_eq!(
        names.resolve("silent-0.test", None, now() + SHORT / 20),
        Err(NameError::TimedOut)
    );
    assert!(names.resolve("site.test", None, now() + LONG).is_ok());
    // If all threads hang, a name waits no longer than its check.
    assert_eq!(
        names.resolve("silent-4.test", None, now() + SHORT / 20),
        Err(NameError::TimedOut)
    );
    assert_eq!(
        names.resolve("site.test", None, now() + SHORT / 20),
        Err(NameError::TimedOut)
    );
}

#[test]
fn a_check_tells_when_the_lookup_began_that_it_joined() {
    let mut checker = checker_with_names();
    let mut check = || checker.check(&target("http://silent.test/"), now() + SHORT / 20);
    let first = check();
    let joined_at = now();
    let second = check();
    assert_eq!(
        [first.outcome, second.outcome],
        [Outcome::DnsTimeout, Outcome::DnsTimeout]
    );
    assert_eq!(second.lookup_began_at, first.lookup_began_at);
    assert!(second.lookup_began_at.unwrap() < joined_at);
}

#[test]
#[cfg(target_os = "linux")]
fn without_a_thread_for_the_lookup_the_check_is_an_agent_error_and_the_next_one_succeeds() {
    const SELF: &str =
        "check::names::without_a_thread_for_the_lookup_the_check_is_an_agent_error_and_the_next_one_succeeds";
    if !child::is_it(SELF) {
        return child::run(SELF, &mut child::limitable());
    }
    let mut checker = checker();
    let site = Site::answering(site::ok("hello"));
    let target = target(&format!("http://localhost:{}/", site.address.port()));
    let no_threads = child::NoThreads::begin();
    let seen = checker.check(&target, now() + LONG);
    assert_eq!(seen.outcome, Outcome::AgentError, "{seen:?}");
    assert_consistent(&seen);
    assert!(
        seen.error
            .as_ref()
            .is_some_and(|text| text.contains("cannot start a thread for the name lookup")),
        "{seen:?}"
    );
    drop(no_threads);
    assert_eq!(checker.check(&target, now() + LONG).outcome, Outcome::Ok);
}
