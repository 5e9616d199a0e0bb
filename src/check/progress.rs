//! What one check has observed so far, shared by the checker and the resolver, connector and transport that ureq calls.
//!
//! Measures the phases. Only the checker's thread uses it; it has a lock because ureq requires its parts to be `Sync`.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rustls::sign::CertifiedKey;

use crate::check::details::Details;
use crate::check::observation::Phases;
use crate::check::target::{IpFamily, Proxy, Target};
use crate::clock::instant_now;
use crate::lock::lock;
use crate::sample::Timestamp;

/// The phase that a check is in. It decides the outcome of errors that can come in every phase, such as a timeout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Dns,
    Connect,
    Tls,
    /// From the established connection to the end of the response's headers.
    Response,
    Body,
}

/// A request as it is sent. It has no `Debug`, because it may contain secrets.
pub(super) struct Outgoing {
    pub head: Vec<u8>,
    pub body: Option<Arc<[u8]>>,
}

/// It has no `Debug`, because a request may contain secrets.
pub(super) struct Progress {
    /// The settings of the check.
    pub deadline: Instant,
    pub ip_family: Option<IpFamily>,
    pub proxy: Option<Proxy>,

    /// Whether the certificate is not verified in the current request.
    pub tls_insecure: bool,
    pub client_certificate: Option<Arc<CertifiedKey>>,
    /// The current request, until it is sent.
    pub outgoing: Option<Outgoing>,
    /// Whether a failure now is the proxy's: until it has connected to the host or, for http, until a response has come.
    pub at_proxy: bool,
    pub phase: Phase,
    pub phases: Phases,
    /// When the last lookup began. It may be one that an earlier check has begun.
    pub lookup_began_at: Option<Instant>,
    /// The last address that was tried.
    pub peer: Option<SocketAddr>,
    /// The last address that accepted a connection.
    pub ip: Option<IpAddr>,
    /// When the last server's certificate expires, even if it was not accepted.
    pub cert_expires_at: Option<Timestamp>,
    /// Of all certificates that servers showed in this check, the expiry that comes first, and the seconds until then.
    pub soonest_expiry: Option<(Timestamp, i64)>,
    /// `None`: nobody asks for them.
    pub details: Option<Box<Details>>,
    /// Whether the peer has ended the current connection, cleanly or not.
    pub closed_by_peer: bool,
    request_sent_at: Option<Instant>,
    /// When the first byte came: of the response (interim or final) that is being read, and of the last complete one.
    head_began_at: Option<Instant>,
    head_read_began_at: Option<Instant>,
    last_read_at: Option<Instant>,
}

impl Progress {
    fn new(deadline: Instant) -> Self {
        Self {
            deadline,
            ip_family: None,
            proxy: None,
            tls_insecure: false,
            client_certificate: None,
            outgoing: None,
            at_proxy: false,
            phase: Phase::Dns,
            phases: Phases::default(),
            lookup_began_at: None,
            peer: None,
            ip: None,
            cert_expires_at: None,
            soonest_expiry: None,
            details: None,
            closed_by_peer: false,
            request_sent_at: None,
            head_began_at: None,
            head_read_began_at: None,
            last_read_at: None,
        }
    }

    /// Begins a request of the check: the first one, or one for a redirect.
    pub(super) fn begin_request(&mut self, tls_insecure: bool, outgoing: Outgoing) {
        self.tls_insecure = tls_insecure;
        self.outgoing = Some(outgoing);
        self.at_proxy = self.proxy.is_some();
        self.phase = Phase::Dns;
        self.closed_by_peer = false;
        self.request_sent_at = None;
        self.head_began_at = None;
        self.head_read_began_at = None;
        self.last_read_at = None;
        if let Some(details) = &mut self.details {
            details.head.clear();
        }
    }

    pub(super) fn request_sent(&mut self) {
        self.request_sent_at = Some(instant_now());
    }

    pub(super) fn bytes_came(&mut self) {
        if self.phase == Phase::Response {
            let now = instant_now();
            self.last_read_at = Some(now);
            self.head_began_at.get_or_insert(now);
        }
    }

    /// Notes that a whole head was read: an interim one (100, 103) or the final one. `more`: bytes after it have come too.
    pub(super) fn head_read(&mut self, more: bool) {
        if self.phase == Phase::Response {
            self.head_read_began_at = self.head_began_at;
            self.head_began_at = if more { self.last_read_at } else { None };
        }
    }

    /// Notes that the request has its final response, or will get none, and adds its time to the first byte.
    pub(super) fn response_ended(&mut self, complete: bool) {
        self.at_proxy &= !complete;
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

/// Adds to the time of a phase, which is summed over redirects.
pub(super) fn add(total: &mut Option<Duration>, spent: Duration) {
    *total = Some(total.unwrap_or_default() + spent);
}

#[derive(Clone)]
pub(super) struct SharedProgress(Arc<Mutex<Progress>>);

impl SharedProgress {
    pub(super) fn new() -> Self {
        Self(Arc::new(Mutex::new(Progress::new(instant_now()))))
    }

    /// Forgets the previous check.
    pub(super) fn begin_check(&self, deadline: Instant, target: &Target, details: Option<Box<Details>>) {
        *self.lock() = Progress {
            ip_family: target.ip_family,
            proxy: target.proxy.clone(),
            details,
            ..Progress::new(deadline)
        };
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Progress> {
        // A panic cannot leave it half changed.
        lock(&self.0)
    }
}
