//! How a run ends: no more ticks, the checks under way, the last records. All of it within [`STOP_WITHIN`].

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::bail;

use super::publisher::END_WITHIN;
use super::timer::{LOOK_FOR_ROOM_EVERY, TimerLoop};
use crate::clock::instant_now;
use crate::duration::micros;
use crate::shutdown::STOP_WITHIN;

/// Checks that have not ended this long after the signal are cut off.
const CHECKS_END_WITHIN: Duration = Duration::from_secs(6);

/// With PRODUCE_GROUP: shares that are not given back this long after the signal are abandoned. Leaving the group takes less than
/// the time from then to [`DELIVER_WITHIN`].
const GIVE_BACK_WITHIN: Duration = Duration::from_millis(6_700);

/// Records that Kafka has not acknowledged this long after the signal are given up. The rest of [`STOP_WITHIN`] is for the
/// end of the process.
const DELIVER_WITHIN: Duration = Duration::from_millis(8_000);
const _: () = assert!(DELIVER_WITHIN.as_millis() + END_WITHIN.as_millis() < STOP_WITHIN.as_millis());

impl TimerLoop<'_> {
    pub(super) fn stop(mut self, requested_at: Instant) -> anyhow::Result<()> {
        let from = self.clock.micros_at(requested_at);
        self.leave_group(from);
        self.schedule
            .stop(self.clock.now_micros().min(from.max(self.looked_at)));
        log::info!(
            "stopping under_way={} on_the_way={}",
            self.schedule.under_way(),
            self.publisher.on_the_way(),
        );
        let checks_end_at = from + micros(CHECKS_END_WITHIN);
        while self.schedule.under_way() > 0 && self.clock.now_micros() < checks_end_at {
            let wakes_at = self.write_backlog().min(checks_end_at);
            self.wait_until(wakes_at);
            self.take_mail();
        }
        self.schedule.cut_off();
        let deliver_until = from + micros(DELIVER_WITHIN);
        while self.schedule.has_backlog() && self.clock.now_micros() < deliver_until {
            let wakes_at = self.write_backlog();
            if self.schedule.has_backlog() {
                self.wait_until(wakes_at);
                // Otherwise mail would end each wait at once. A check that was cut off has its record already.
                self.take_mail();
            }
        }
        let left = self.clock.until(deliver_until);
        self.end(left)
    }

    /// With PRODUCE_GROUP: gives the shares back, and checks their hosts until then.
    fn leave_group(&mut self, from: i64) {
        match &mut self.shared_hosts {
            Some(shared_hosts) => {
                let cut_off_at = from + micros(CHECKS_END_WITHIN);
                shared_hosts.stop(cut_off_at, from + micros(GIVE_BACK_WITHIN));
            }
            None => return,
        }
        let gives_up_at = from + micros(DELIVER_WITHIN);
        while self.is_member() && self.clock.now_micros() < gives_up_at {
            let looks_at = self.clock.now_micros() + micros(LOOK_FOR_ROOM_EVERY);
            let wakes_at = self.turn().min(looks_at);
            self.wait_until(wakes_at);
            self.take_mail();
        }
    }

    fn is_member(&self) -> bool {
        let shared_hosts = self.shared_hosts.as_ref();
        shared_hosts.is_some_and(|shared_hosts| !shared_hosts.has_left())
    }

    pub(super) fn end(mut self, deliver_within: Duration) -> anyhow::Result<()> {
        let deadline = instant_now() + deliver_within;
        let mut left = self.publisher.stop(deadline);
        for (address, ticks) in self.schedule.left() {
            *left.per_address.entry(address.to_owned()).or_insert(0) += ticks;
        }
        let counters = &self.setup.counters;
        counters.set_ticks(self.schedule.ticks_due(), self.schedule.missed());
        counters.left.store(left.records(), Ordering::Relaxed);
        self.summary.log_stopped();
        if !left.per_address.is_empty() {
            bail!("stopped, but Kafka never acknowledged {left}");
        }
        Ok(())
    }
}
