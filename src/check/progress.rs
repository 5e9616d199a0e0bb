//! What one check has seen so far: shared by the checker and by the resolver, connector and transport that ureq calls.
//!
//! Owns the phases' clock. All of it happens on the checker's one thread; the lock is there because ureq wants its parts
//! to be `Sync`, and is never contended.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::check::outcome::Phases;
use crate::check::target::IpFamily;
use crate::sample::Timestamp;

/// Where a check is: names the outcome of a failure that looks the same everywhere, such as a timeout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Dns,
    Connect,
    Tls,
    /// From the connection made to the response's headers read.
    Response,
    Body,
}

#[derive(Debug)]
pub(super) struct Progress {
    /// What the check was asked for.
    pub deadline: Instant,
    pub ip_family: Option<IpFamily>,

    /// Whether the current request's certificate need not be trusted.
    pub tls_insecure: bool,
    pub phase: Phase,
    pub phases: Phases,
    /// The address last tried.
    pub peer: Option<SocketAddr>,
    /// The address last connected to.
    pub ip: Option<IpAddr>,
    /// Of the last leaf seen, whatever verification said of it.
    pub cert_expires_at: Option<Timestamp>,
    /// The current connection's peer has ended it, cleanly or not.
    pub closed_by_peer: bool,
    request_sent_at: Option<Instant>,
    /// First byte of the response (interim or final) that is being read, and of the one last read completely.
    head_began_at: Option<Instant>,
    head_read_began_at: Option<Instant>,
    last_read_at: Option<Instant>,
}

impl Progress {
    fn new(deadline: Instant) -> Self {
        Self {
            deadline,
            ip_family: None,
            tls_insecure: false,
            phase: Phase::Dns,
            phases: Phases::default(),
            peer: None,
            ip: None,
            cert_expires_at: None,
            closed_by_peer: false,
            request_sent_at: None,
            head_began_at: None,
            head_read_began_at: None,
            last_read_at: None,
        }
    }

    /// A request of the check begins: the first one or one for a redirect.
    pub fn begin_request(&mut self, tls_insecure: bool) {
        self.tls_insecure = tls_insecure;
        self.phase = Phase::Dns;
        self.closed_by_peer = false;
        self.request_sent_at = None;
        self.head_began_at = None;
        self.head_read_began_at = None;
        self.last_read_at = None;
    }

    pub fn request_sent(&mut self) {
        self.request_sent_at = Some(now());
    }

    pub fn bytes_came(&mut self) {
        if self.phase == Phase::Response {
            let now = now();
            self.last_read_at = Some(now);
            self.head_began_at.get_or_insert(now);
        }
    }

    /// A whole head was read, an interim one (100, 103) or the final one; `more`: what follows it was read with it.
    pub fn head_read(&mut self, more: bool) {
        if self.phase == Phase::Response {
            self.head_read_began_at = self.head_began_at;
            self.head_began_at = if more { self.last_read_at } else { None };
        }
    }

    /// The request got its final response, or will get none: its time to the first byte is known.
    pub fn response_ended(&mut self, complete: bool) {
        let first_byte_at = if complete {
            self.head_read_began_at
        } else {
            self.head_began_at
        };
        if let (Some(sent), Some(first)) = (self.request_sent_at, first_byte_at) {
            add(&mut self.phases.ttfb, first.saturating_duration_since(sent));
        }
    }
}

/// Sums a phase over redirects.
pub(super) fn add(total: &mut Option<Duration>, spent: Duration) {
    *total = Some(total.unwrap_or_default() + spent);
}

#[derive(Clone, Debug)]
pub(super) struct SharedProgress(Arc<Mutex<Progress>>);

impl SharedProgress {
    pub fn new() -> Self {
        Self(Arc::new(Mutex::new(Progress::new(now()))))
    }

    /// Forgets the last check.
    pub fn begin_check(&self, deadline: Instant, ip_family: Option<IpFamily>) {
        *self.lock() = Progress {
            ip_family,
            ..Progress::new(deadline)
        };
    }

    pub fn lock(&self) -> MutexGuard<'_, Progress> {
        // Nothing here can be left half-changed by a panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "an edge: phases are timed where they happen"
)]
pub(super) fn now() -> Instant {
    Instant::now()
}
