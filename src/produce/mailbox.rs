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

/// Holds at most one result for each check under way.
pub(super) struct Mailbox {
    clock: Clock,
    mail: Mutex<Mail>,
    changed: Condvar,
}

#[derive(Default)]
struct Mail {
    results: Vec<CheckResult>,
    orders: Vec<Order>,
    changes: Vec<Changes>,
    is_urgent: bool,
    /// Ticks wait for a thread, and every result frees one.
    results_are_urgent: bool,
    /// When the loop's wait ends by itself.
    wakes_at: i64,
}

pub(super) type Taken = (Vec<CheckResult>, Vec<Order>, Vec<Changes>);

impl Mailbox {
    pub(super) fn new(clock: Clock) -> Self {
        Self {
            clock,
            mail: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    pub(super) fn clock(&self) -> Clock {
        self.clock
    }

    pub(super) fn put_result(&self, result: CheckResult) {
        let mut mail = self.mail();
        mail.results.push(result);
        if self.must_look(&mail) {
            self.changed.notify_one();
        }
    }

    pub(super) fn put_order(&self, order: Order) {
        self.mail().orders.push(order);
        self.wake();
    }

    pub(super) fn put_changes(&self, changes: Changes) {
        self.mail().changes.push(changes);
        self.wake();
    }

    pub(super) fn wake(&self) {
        self.mail().is_urgent = true;
        self.changed.notify_one();
    }

    /// Waits for mail, until `wakes_at` at the latest.
    pub(super) fn wait_until(&self, wakes_at: i64, results_are_urgent: bool) {
        let mut mail = self.mail();
        mail.wakes_at = wakes_at;
        mail.results_are_urgent = results_are_urgent;
        while !self.must_look(&mail) {
            let left = self.clock.until(wakes_at);
            if left.is_zero() {
                return;
            }
            let waited = self.changed.wait_timeout(mail, left.min(LOOK_AT_CLOCK_EVERY));
            mail = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn must_look(&self, mail: &Mail) -> bool {
        let looks_soon = || mail.wakes_at - self.clock.now_micros() <= micros(RESULTS_WAIT);
        let results_wait = mail.results.is_empty() || (!mail.results_are_urgent && looks_soon());
        mail.is_urgent || !results_wait
    }

    pub(super) fn take(&self) -> Taken {
        let mut mail = self.mail();
        mail.is_urgent = false;
        (
            std::mem::take(&mut mail.results),
            std::mem::take(&mut mail.orders),
            std::mem::take(&mut mail.changes),
        )
    }

    fn mail(&self) -> MutexGuard<'_, Mail> {
        lock(&self.mail)
    }
}
