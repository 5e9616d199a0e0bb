//! Names to addresses, every wait bounded by the check's deadline.
//!
//! Owns the threads that sit in getaddrinfo, which has no timeout of its own: a lookup that hangs keeps its thread, not
//! the check. IP literals need no thread. Nothing is cached; checks that ask for the same name at the same time share a
//! lookup.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use dns_lookup::{AddrFamily, AddrInfoHints, LookupError, LookupErrorKind, SockType};
use ureq::http::Uri;
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::NextTimeout;

use super::fault::{Fault, NameError};
use super::progress::{SharedProgress, add, now};
use crate::check::target::IpFamily;

/// Asks for the addresses of a name, blocking, in the order in which they should be tried.
pub type Lookup = dyn Fn(&str, Option<IpFamily>) -> Result<Vec<IpAddr>, NameError> + Send + Sync;

/// A thread without a lookup ends after this time: long enough to serve the next second's ticks.
const IDLE: Duration = Duration::from_secs(10);

/// A lookup under way is not joined any more after this time (getaddrinfo gives up by itself within 30 s with the usual
/// resolv.conf): a module that hangs for ever makes its name fail, not for ever.
const JOINED_FOR: Duration = Duration::from_secs(60);

/// What ureq's array of addresses holds: more of one name are not tried.
const MAX_ADDRESSES: usize = 16;

/// getaddrinfo and the modules that it loads need less than 100 KiB; only what is touched becomes memory.
const STACK_BYTES: usize = 256 * 1024;

/// The lookup threads of a process. Cheap to clone.
#[derive(Clone)]
pub struct Names(Arc<Shared>);

struct Shared {
    lookup: Box<Lookup>,
    max_threads: usize,
    state: Mutex<State>,
    work: Condvar,
}

type Question = (String, Option<IpFamily>);

/// The queue is bounded by the checks that wait: one that gives up takes its question back if nobody else waits.
#[derive(Default)]
struct State {
    under_way: HashMap<Question, Arc<Flight>>,
    queue: VecDeque<(Question, Arc<Flight>)>,
    threads: usize,
    idle: usize,
}

/// One lookup and everybody who waits for it.
struct Flight {
    asked_at: Instant,
    answer: Mutex<Answer>,
    answered: Condvar,
}

#[derive(Default)]
struct Answer {
    result: Option<Result<Vec<IpAddr>, NameError>>,
    waiting: usize,
}

impl Names {
    /// `max_threads`: as many as checks may be under way, so that a dead name server holds up its own names only.
    pub fn new(lookup: Box<Lookup>, max_threads: usize) -> Self {
        Self(Arc::new(Shared {
            lookup,
            max_threads: max_threads.max(1),
            state: Mutex::default(),
            work: Condvar::new(),
        }))
    }

    /// The system's own: hosts file, DNS, whatever it is set up to ask.
    pub fn of_the_system(max_threads: usize) -> Self {
        Self::new(Box::new(getaddrinfo), max_threads)
    }

    /// # Errors
    /// No address, or no answer by the deadline.
    pub fn resolve(
        &self,
        name: &str,
        family: Option<IpFamily>,
        deadline: Instant,
    ) -> Result<Vec<IpAddr>, NameError> {
        let question = (name.to_owned(), family);
        let flight = self.ask(&question)?;
        let mut answer = lock(&flight.answer);
        loop {
            if let Some(result) = &answer.result {
                return result.clone();
            }
            let left = deadline.saturating_duration_since(now());
            if left.is_zero() {
                answer.waiting -= 1;
                let abandoned = answer.waiting == 0;
                drop(answer);
                if abandoned {
                    self.take_back(&question, &flight);
                }
                return Err(NameError::TimedOut);
            }
            answer = flight
                .answered
                .wait_timeout(answer, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Joins the lookup of the same question or queues a new one, with a thread to take it.
    fn ask(&self, question: &Question) -> Result<Arc<Flight>, NameError> {
        let mut state = lock(&self.0.state);
        if let Some(flight) = state.under_way.get(question)
            && now().saturating_duration_since(flight.asked_at) < JOINED_FOR
        {
            lock(&flight.answer).waiting += 1;
            return Ok(Arc::clone(flight));
        }
        let flight = Arc::new(Flight {
            asked_at: now(),
            answer: Mutex::new(Answer {
                result: None,
                waiting: 1,
            }),
            answered: Condvar::new(),
        });
        if state.idle <= state.queue.len() && state.threads < self.0.max_threads {
            match self.start_thread() {
                Ok(()) => state.threads += 1,
                // Another thread will come to it; without any nobody would.
                Err(_) if state.threads > 0 => {}
                Err(error) => {
                    return Err(NameError::Agent(format!(
                        "no thread for the name lookup: {error}"
                    )));
                }
            }
        }
        state.under_way.insert(question.clone(), Arc::clone(&flight));
        state.queue.push_back((question.clone(), Arc::clone(&flight)));
        self.0.work.notify_one();
        Ok(flight)
    }

    fn take_back(&self, question: &Question, flight: &Arc<Flight>) {
        let mut state = lock(&self.0.state);
        // Somebody may have joined since, and a lookup that has begun is left to its thread.
        if lock(&flight.answer).waiting > 0 {
            return;
        }
        if let Some(place) = state
            .queue
            .iter()
            .position(|(_, queued)| Arc::ptr_eq(queued, flight))
        {
            state.queue.remove(place);
            state.forget(question, flight);
        }
    }

    fn start_thread(&self) -> std::io::Result<()> {
        let names = self.clone();
        std::thread::Builder::new()
            .name("lookup".into())
            .stack_size(STACK_BYTES)
            .spawn(move || names.work())?;
        Ok(())
    }

    fn work(&self) {
        let mut state = lock(&self.0.state);
        loop {
            let Some((question, flight)) = state.queue.pop_front() else {
                state.idle += 1;
                let (woken, waited) = self
                    .0
                    .work
                    .wait_timeout(state, IDLE)
                    .unwrap_or_else(PoisonError::into_inner);
                state = woken;
                state.idle -= 1;
                if waited.timed_out() && state.queue.is_empty() {
                    state.threads -= 1;
                    return;
                }
                continue;
            };
            drop(state);
            let result = (self.0.lookup)(&question.0, question.1);
            state = lock(&self.0.state);
            state.forget(&question, &flight);
            lock(&flight.answer).result = Some(result);
            flight.answered.notify_all();
        }
    }
}

impl State {
    fn forget(&mut self, question: &Question, flight: &Arc<Flight>) {
        if self
            .under_way
            .get(question)
            .is_some_and(|known| Arc::ptr_eq(known, flight))
        {
            self.under_way.remove(question);
        }
    }
}

// The states are changed in single steps: a panic elsewhere leaves them whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// ureq's resolver for one checker.
pub(super) struct CheckResolver {
    pub names: Names,
    pub progress: SharedProgress,
}

impl std::fmt::Debug for CheckResolver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CheckResolver")
    }
}

impl Resolver for CheckResolver {
    fn resolve(
        &self,
        uri: &Uri,
        _config: &ureq::config::Config,
        _timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let host = uri.host().unwrap_or_default();
        let https = uri.scheme_str() == Some("https");
        let port = uri.port_u16().unwrap_or(if https { 443 } else { 80 });
        let (family, deadline) = {
            let progress = self.progress.lock();
            (progress.ip_family, progress.deadline)
        };
        let addresses = match bare(host).parse::<IpAddr>() {
            Ok(ip) => vec![ip],
            Err(_) => {
                let asked_at = now();
                let result = self.names.resolve(host, family, deadline);
                add(&mut self.progress.lock().phases.dns, now() - asked_at);
                result.map_err(Fault::Name)?
            }
        };
        let mut resolved = self.empty();
        for ip in addresses
            .into_iter()
            .filter(|ip| is_of(family, *ip))
            .take(MAX_ADDRESSES)
        {
            resolved.push(SocketAddr::new(ip, port));
        }
        if resolved.is_empty() {
            let text = format!("{host} has no address of the family that ip= asks for");
            return Err(Fault::Name(NameError::NotFound(text)).into());
        }
        Ok(resolved)
    }
}

/// `[::1]` as `::1`.
pub(super) fn bare(host: &str) -> &str {
    host.strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'))
        .unwrap_or(host)
}

fn is_of(family: Option<IpFamily>, ip: IpAddr) -> bool {
    match family {
        None => true,
        Some(IpFamily::V4) => ip.is_ipv4(),
        Some(IpFamily::V6) => ip.is_ipv6(),
    }
}

fn getaddrinfo(name: &str, family: Option<IpFamily>) -> Result<Vec<IpAddr>, NameError> {
    let hints = AddrInfoHints {
        socktype: SockType::Stream.into(),
        address: match family {
            None => 0,
            Some(IpFamily::V4) => AddrFamily::Inet.into(),
            Some(IpFamily::V6) => AddrFamily::Inet6.into(),
        },
        ..AddrInfoHints::default()
    };
    let asked_at = now();
    let found = dns_lookup::getaddrinfo(Some(name), None, Some(hints))
        .map_err(|error| name_error(name, &error, now() - asked_at))?;
    let mut addresses = Vec::new();
    for info in found.flatten() {
        let ip = info.sockaddr.ip();
        if !addresses.contains(&ip) {
            addresses.push(ip);
        }
    }
    Ok(addresses)
}

fn name_error(name: &str, error: &LookupError, took: Duration) -> NameError {
    // getaddrinfo without a file handle says "temporary failure" or even "no such name": ask the machine first.
    if let Err(handle) = std::net::UdpSocket::bind(("127.0.0.1", 0))
        && super::fault::is_agents_own(&handle)
    {
        return NameError::Agent(format!("cannot look up {name}: {handle}"));
    }
    sort_name_error(name, error, took)
}

/// Sorts getaddrinfo's codes (RFC 3493, section 6.1; glibc's two more in netdb.h).
fn sort_name_error(name: &str, error: &LookupError, took: Duration) -> NameError {
    /// glibc: the name exists, but has no address of the asked family.
    const EAI_ADDRFAMILY: i32 = -9;
    /// The shortest time that resolv.conf can give a name server. The code is the same for one that is silent and one
    /// that says that it failed, which takes no time, or as long as it waited for others itself.
    const SHORTEST_WAIT: Duration = Duration::from_secs(1);
    match error.kind() {
        LookupErrorKind::NoName | LookupErrorKind::NoData => no_such_name(name),
        _ if cfg!(target_os = "linux") && error.error_num() == EAI_ADDRFAMILY => no_such_name(name),
        LookupErrorKind::Memory => NameError::Agent(format!("cannot look up {name}: no memory")),
        LookupErrorKind::Again if took >= SHORTEST_WAIT => NameError::TimedOut,
        LookupErrorKind::Again => NameError::Failed(format!(
            "cannot look up {name}: the name servers fail, refuse or are not there"
        )),
        LookupErrorKind::Fail => {
            NameError::Failed(format!("cannot look up {name}: the name servers refuse or fail"))
        }
        _ => NameError::Failed(format!("cannot look up {name}: {error}")),
    }
}

fn no_such_name(name: &str) -> NameError {
    NameError::NotFound(format!("there is no address for {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn getaddrinfos_codes_are_sorted_into_no_such_name_a_failure_and_our_own_fault() {
        // glibc's netdb.h; the crate sorts by the platform's own constants.
        let table = [
            (-2, NameError::NotFound("there is no address for a.test".into())),
            (-5, NameError::NotFound("there is no address for a.test".into())),
            (-9, NameError::NotFound("there is no address for a.test".into())),
            (
                -3,
                NameError::Failed(
                    "cannot look up a.test: the name servers fail, refuse or are not there".into(),
                ),
            ),
            (
                -4,
                NameError::Failed("cannot look up a.test: the name servers refuse or fail".into()),
            ),
            (-10, NameError::Agent("cannot look up a.test: no memory".into())),
        ];
        for (code, expected) in table {
            assert_eq!(
                sort_name_error("a.test", &LookupError::new(code), Duration::ZERO),
                expected,
                "{code}"
            );
        }
        let odd = sort_name_error("a.test", &LookupError::new(-105), Duration::ZERO);
        assert!(matches!(odd, NameError::Failed(_)), "{odd:?}");
        let silence = sort_name_error("a.test", &LookupError::new(-3), Duration::from_secs(1));
        assert_eq!(silence, NameError::TimedOut);
    }

    #[test]
    fn the_systems_lookup_knows_localhost_in_each_family() {
        assert!(getaddrinfo("localhost", None).is_ok_and(|found| found.iter().all(IpAddr::is_loopback)));
        assert_eq!(
            getaddrinfo("localhost", Some(IpFamily::V4)),
            Ok(vec![IpAddr::from([127, 0, 0, 1])])
        );
    }
}
