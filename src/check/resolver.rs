//! Looks up names; a check never waits longer than its deadline.
//!
//! getaddrinfo has no timeout, so it runs on threads of its own: a lookup that hangs blocks its thread, not the check. IP
//! addresses need no thread. Nothing is cached, but checks that ask for the same name at the same time share a lookup.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use dns_lookup::{AddrFamily, AddrInfoHints, LookupError, LookupErrorKind, SockType};
use ureq::http::Uri;
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::NextTimeout;

use super::fault::{CheckFault, NameError};
use super::progress::{SharedProgress, add};
use crate::check::target::{IpFamily, bare};
use crate::clock::instant_now;
use crate::lock::lock;

/// Returns the addresses of a name in the order in which to try them. It blocks.
pub type Lookup = dyn Fn(&str, Option<IpFamily>) -> Result<Vec<IpAddr>, NameError> + Send + Sync;

/// How long a thread waits for the next lookup before it ends: long enough for hosts that are checked every few seconds.
const IDLE: Duration = Duration::from_secs(10);

/// How long checks may join a lookup that is under way. Afterwards a new one is started, so that one getaddrinfo that
/// never returns does not make its name fail for ever. With the usual resolv.conf getaddrinfo gives up within 30 s.
const JOINED_FOR: Duration = Duration::from_secs(60);

/// The most addresses of a name that are tried: ureq's array has no room for more.
const MAX_ADDRESSES: usize = 16;

/// getaddrinfo and the modules that it loads need less than 100 KiB. Pages that are not used take no memory.
const STACK_BYTES: usize = 256 * 1024;

/// The lookup threads of a process. Cheap to clone.
#[derive(Clone)]
pub struct Names(Arc<Shared>);

struct Shared {
    lookup: Box<Lookup>,
    max_threads: usize,
    lookups: Mutex<Lookups>,
    work: Condvar,
}

type Question = (String, Option<IpFamily>);

/// The lookups and the threads. The queue is not longer than the number of waiting checks: the last one to give up removes
/// its question.
#[derive(Default)]
struct Lookups {
    under_way: HashMap<Question, Arc<PendingLookup>>,
    queue: VecDeque<Arc<PendingLookup>>,
    threads: usize,
    idle: usize,
}

/// One lookup, shared by the checks that wait for it.
struct PendingLookup {
    question: Question,
    asked_at: Instant,
    shared: Mutex<SharedResult>,
    answered: Condvar,
}

#[derive(Default)]
struct SharedResult {
    result: Option<Result<Vec<IpAddr>, NameError>>,
    waiting: usize,
}

impl Names {
    /// `max_threads` should be the number of checks that may be under way, so that a dead name server only delays its own
    /// names.
    pub fn new(lookup: Box<Lookup>, max_threads: usize) -> Self {
        Self(Arc::new(Shared {
            lookup,
            max_threads: max_threads.max(1),
            lookups: Mutex::default(),
            work: Condvar::new(),
        }))
    }

    pub fn resolve(
        &self,
        name: &str,
        family: Option<IpFamily>,
        deadline: Instant,
    ) -> Result<Vec<IpAddr>, NameError> {
        self.wait(&self.ask(name, family)?, deadline)
    }

    fn wait(&self, pending: &Arc<PendingLookup>, deadline: Instant) -> Result<Vec<IpAddr>, NameError> {
        let mut shared = lock(&pending.shared);
        loop {
            if let Some(result) = &shared.result {
                return result.clone();
            }
            let left = deadline.saturating_duration_since(instant_now());
            if left.is_zero() {
                shared.waiting -= 1;
                let abandoned = shared.waiting == 0;
                drop(shared);
                if abandoned {
                    self.take_back(pending);
                }
                return Err(NameError::TimedOut);
            }
            shared = pending
                .answered
                .wait_timeout(shared, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Joins a lookup of the same question, or queues a new one and starts a thread for it if none is idle.
    fn ask(&self, name: &str, family: Option<IpFamily>) -> Result<Arc<PendingLookup>, NameError> {
        let question = (name.to_owned(), family);
        let mut lookups = lock(&self.0.lookups);
        if let Some(pending) = lookups.under_way.get(&question)
            && instant_now().saturating_duration_since(pending.asked_at) < JOINED_FOR
        {
            lock(&pending.shared).waiting += 1;
            return Ok(Arc::clone(pending));
        }
        let pending = Arc::new(PendingLookup {
            question: question.clone(),
            asked_at: instant_now(),
            shared: Mutex::new(SharedResult {
                result: None,
                waiting: 1,
            }),
            answered: Condvar::new(),
        });
        if lookups.idle <= lookups.queue.len() && lookups.threads < self.0.max_threads {
            match self.start_thread() {
                Ok(()) => lookups.threads += 1,
                // One of the other threads will take it from the queue.
                Err(_) if lookups.threads > 0 => {}
                Err(error) => {
                    return Err(NameError::Agent(format!(
                        "cannot start a thread for the name lookup: {error}"
                    )));
                }
            }
        }
        lookups.under_way.insert(question, Arc::clone(&pending));
        lookups.queue.push_back(Arc::clone(&pending));
        self.0.work.notify_one();
        Ok(pending)
    }

    fn take_back(&self, pending: &Arc<PendingLookup>) {
        let mut lookups = lock(&self.0.lookups);
        // Another check may have joined in the meantime. A lookup that has begun is left to its thread.
        if lock(&pending.shared).waiting > 0 {
            return;
        }
        if let Some(place) = lookups
            .queue
            .iter()
            .position(|queued| Arc::ptr_eq(queued, pending))
        {
            lookups.queue.remove(place);
            lookups.forget(pending);
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
        let mut lookups = lock(&self.0.lookups);
        loop {
            let Some(pending) = lookups.queue.pop_front() else {
                lookups.idle += 1;
                let (woken, waited) = self
                    .0
                    .work
                    .wait_timeout(lookups, IDLE)
                    .unwrap_or_else(PoisonError::into_inner);
                lookups = woken;
                lookups.idle -= 1;
                if waited.timed_out() && lookups.queue.is_empty() {
                    lookups.threads -= 1;
                    return;
                }
                continue;
            };
            drop(lookups);
            let (name, family) = &pending.question;
            let result = (self.0.lookup)(name, *family);
            lookups = lock(&self.0.lookups);
            lookups.forget(&pending);
            lock(&pending.shared).result = Some(result);
            pending.answered.notify_all();
        }
    }
}

impl Lookups {
    fn forget(&mut self, pending: &Arc<PendingLookup>) {
        let known = self.under_way.get(&pending.question);
        if known.is_some_and(|known| Arc::ptr_eq(known, pending)) {
            self.under_way.remove(&pending.question);
        }
    }
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
        let https = uri.scheme_str() == Some("https");
        let (family, deadline, proxy) = {
            let progress = self.progress.lock();
            (progress.ip_family, progress.deadline, progress.proxy.clone())
        };
        let (host, port) = match &proxy {
            Some(proxy) => (proxy.host.as_str(), proxy.port),
            None => (
                uri.host().unwrap_or_default(),
                uri.port_u16().unwrap_or(if https { 443 } else { 80 }),
            ),
        };
        let addresses = match bare(host).parse::<IpAddr>() {
            Ok(ip) => vec![ip],
            Err(_) => {
                let asked_at = instant_now();
                let pending = self.names.ask(host, family).map_err(CheckFault::Name)?;
                self.progress.lock().lookup_began_at = Some(pending.asked_at);
                let result = self.names.wait(&pending, deadline);
                add(&mut self.progress.lock().phases.dns, instant_now() - asked_at);
                result.map_err(CheckFault::Name)?
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
            let text = format!("{host} has no address of the family that ip= requires");
            return Err(CheckFault::Name(NameError::NotFound(text)).into());
        }
        Ok(resolved)
    }
}

fn is_of(family: Option<IpFamily>, ip: IpAddr) -> bool {
    match family {
        None => true,
        Some(IpFamily::V4) => ip.is_ipv4(),
        Some(IpFamily::V6) => ip.is_ipv6(),
    }
}

pub(super) fn getaddrinfo(name: &str, family: Option<IpFamily>) -> Result<Vec<IpAddr>, NameError> {
    let hints = AddrInfoHints {
        socktype: SockType::Stream.into(),
        address: match family {
            None => 0,
            Some(IpFamily::V4) => AddrFamily::Inet.into(),
            Some(IpFamily::V6) => AddrFamily::Inet6.into(),
        },
        ..AddrInfoHints::default()
    };
    let asked_at = instant_now();
    let found = dns_lookup::getaddrinfo(Some(name), None, Some(hints))
        .map_err(|error| name_error(name, &error, instant_now() - asked_at))?;
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
    // Without a free file handle getaddrinfo reports "temporary failure" or even "no such name", so that is checked first.
    if let Err(handle) = std::net::UdpSocket::bind(("127.0.0.1", 0))
        && super::fault::is_agents_own(&handle)
    {
        return NameError::Agent(format!("cannot look up {name}: {handle}"));
    }
    classify_name_error(name, error, took)
}

/// Classifies getaddrinfo's error codes (RFC 3493, section 6.1, and glibc's netdb.h).
fn classify_name_error(name: &str, error: &LookupError, took: Duration) -> NameError {
    /// In glibc: the name exists, but has no address of the requested family.
    const EAI_ADDRFAMILY: i32 = -9;
    /// The shortest timeout that resolv.conf can set. A name server that does not answer and one that reports a failure give
    /// the same code, but the failure usually comes at once.
    const SHORTEST_WAIT: Duration = Duration::from_secs(1);
    match error.kind() {
        LookupErrorKind::NoName | LookupErrorKind::NoData => no_such_name(name),
        _ if cfg!(target_os = "linux") && error.error_num() == EAI_ADDRFAMILY => no_such_name(name),
        LookupErrorKind::Memory => NameError::Agent(format!("cannot look up {name}: out of memory")),
        LookupErrorKind::Again if took >= SHORTEST_WAIT => NameError::TimedOut,
        LookupErrorKind::Again => NameError::Failed(format!(
            "cannot look up {name}: the name servers failed, refused or could not be reached"
        )),
        LookupErrorKind::Fail => NameError::Failed(format!(
            "cannot look up {name}: the name servers refused or failed"
        )),
        _ => NameError::Failed(format!("cannot look up {name}: {error}")),
    }
}

fn no_such_name(name: &str) -> NameError {
    NameError::NotFound(format!("{name} has no address"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_codes_of_getaddrinfo_are_classified() {
        // The codes are those of glibc's netdb.h.
        let table = [
            (-2, NameError::NotFound("a.test has no address".into())),
            (-5, NameError::NotFound("a.test has no address".into())),
            (-9, NameError::NotFound("a.test has no address".into())),
            (
                -3,
                NameError::Failed(
                    "cannot look up a.test: the name servers failed, refused or could not be reached".into(),
                ),
            ),
            (
                -4,
                NameError::Failed("cannot look up a.test: the name servers refused or failed".into()),
            ),
            (
                -10,
                NameError::Agent("cannot look up a.test: out of memory".into()),
            ),
        ];
        for (code, expected) in table {
            assert_eq!(
                classify_name_error("a.test", &LookupError::new(code), Duration::ZERO),
                expected,
                "{code}"
            );
        }
        let odd = classify_name_error("a.test", &LookupError::new(-105), Duration::ZERO);
        assert!(matches!(odd, NameError::Failed(_)), "{odd:?}");
        let silence = classify_name_error("a.test", &LookupError::new(-3), Duration::from_secs(1));
        assert_eq!(silence, NameError::TimedOut);
    }

    #[test]
    fn the_systems_resolver_knows_localhost_in_both_families() {
        assert!(getaddrinfo("localhost", None).is_ok_and(|found| found.iter().all(IpAddr::is_loopback)));
        assert_eq!(
            getaddrinfo("localhost", Some(IpFamily::V4)),
            Ok(vec![IpAddr::from([127, 0, 0, 1])])
        );
    }
}
