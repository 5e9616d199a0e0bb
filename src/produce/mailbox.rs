//! The mailbox of the timer loop: other threads leave results and orders in it, and the loop waits for them here.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::clock::Clock;
use crate::duration::micros;
use crate::lock::lock;
use crate::produce::fleet::Order;
use crate::produce::hosts::list::Changes;
use crate::produce::result::CheckResult;

/// A result does not wake the timer loop if its next turn is this close. With 50 checks a second and more, only ticks wake it.
/// The delay does not matter, because records wait four times as long in `publisher`.
const RESULTS_WAIT: Duration = Duration::from_millis(20);

/// A wait does not count the time for which the machine was suspended, so it may end late after a suspension.
const LOOK_AT_CLOCK_EVERY: Duration = Duration::from_millis(250);

pub(super) enum Mail {
    Result(CheckResult),
    Order(Order),
    Changes(Changes),
}

/// Holds at most one result for each check under way, and the orders and changes since the last turn.
pub(super) struct Mailbox {
    clock: Clock,
    inbox: Mutex<Inbox>,
    changed: Condvar,
}

#[derive(Default)]
struct Inbox {
    mail: Vec<Mail>,
    is_urgent: bool,
    /// Ticks wait for a thread, and every result frees one.
    results_are_urgent: bool,
    /// When the loop's wait ends by itself.
    wakes_at: i64,
}

impl Mailbox {
    pub(super) fn new(clock: Clock) -> Self {
        Self {
            clock,
            inbox: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    pub(super) fn clock(&self) -> Clock {
        self.clock
    }

    pub(super) fn put(&self, mail: Mail) {
        let mut inbox = self.inbox();
        inbox.is_urgent |= !matches!(mail, Mail::Result(_));
        inbox.mail.push(mail);
        if self.must_look(&inbox) {
            self.changed.notify_one();
        }
    }

    pub(super) fn wake(&self) {
        self.inbox().is_urgent = true;
        self.changed.notify_one();
    }

    /// Waits for mail, until `wakes_at` at the latest.
    pub(super) fn wait_until(&self, wakes_at: i64, results_are_urgent: bool) {
        let mut inbox = self.inbox();
        inbox.wakes_at = wakes_at;
        inbox.results_are_urgent = results_are_urgent;
        while !self.must_look(&inbox) {
            let left = self.clock.until(wakes_at);
            if left.is_zero() {
                return;
            }
            let waited = self.changed.wait_timeout(inbox, left.min(LOOK_AT_CLOCK_EVERY));
            inbox = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn must_look(&self, inbox: &Inbox) -> bool {
        let looks_soon = || inbox.wakes_at - self.clock.now_micros() <= micros(RESULTS_WAIT);
        let mail_waits = inbox.mail.is_empty() || (!inbox.results_are_urgent && looks_soon());
        inbox.is_urgent || !mail_waits
    }

    pub(super) fn take(&self) -> Vec<Mail> {
        let mut inbox = self.inbox();
        inbox.is_urgent = false;
        std::mem::take(&mut inbox.mail)
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        lock(&self.inbox)
    }
}
