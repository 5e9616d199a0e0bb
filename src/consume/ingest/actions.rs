//! The choice of the next action.

use std::collections::BTreeMap;
use std::time::Instant;

use super::{
    Action, COMMIT_AGAIN_AFTER, COMMIT_EVERY, Flight, IDLE, Ingest, KAFKA_RETRY, PAUSE_AFTER, PartitionState,
    Request, SYNC_EVERY, StoreState,
};

impl Ingest {
    /// What to do next. Each action except `Poll` and `Hold` is returned once, and counts as begun.
    pub fn next_action(&mut self, now: Instant) -> Action {
        if let Some(notice) = self.notices.pop_front() {
            return Action::Tell(notice);
        }
        let action = self
            .ask_store(now)
            .or_else(|| self.kafka_action(now))
            .or_else(|| self.stop_action(now))
            .unwrap_or_else(|| self.wait_action(now));
        debug_assert_eq!(self.invariants(), Ok(()), "with {action:?}");
        action
    }

    fn ask_store(&mut self, now: Instant) -> Option<Action> {
        let request = match self.store {
            StoreState::Busy => None,
            StoreState::Closed { open_at } => {
                let needed = self.stopping.is_none() || self.unwritten() > 0;
                let due = open_at.is_none_or(|open_at| open_at <= now);
                (needed && due && !self.has_given_up(now)).then_some(Request::Open)
            }
            StoreState::Open if self.has_given_up(now) => None,
            StoreState::Open => self.locate().or_else(|| self.flush(now)),
        }?;
        self.store = StoreState::Busy;
        Some(Action::Ask(request))
    }

    fn locate(&self) -> Option<Request> {
        let mut partitions = Vec::new();
        let mut missing_from = BTreeMap::new();
        if let Some(flight) = self.flight.as_ref().filter(|flight| flight.in_doubt) {
            partitions.extend(flight.spans.keys().copied());
        }
        if self.stopping.is_none() {
            for (partition, progress) in &self.partitions {
                if let PartitionState::Unlocated { start } = progress {
                    partitions.push(*partition);
                    missing_from.extend(start.map(|start| (*partition, start)));
                }
            }
        }
        (!partitions.is_empty()).then_some(Request::Locate {
            partitions,
            missing_from,
        })
    }

    fn flush(&mut self, now: Instant) -> Option<Request> {
        let is_sync_due = self.is_sync_due(now);
        if self.flight.is_none() && (is_sync_due || self.is_due(now)) {
            let mut batch = std::mem::replace(&mut self.filling, std::mem::take(&mut self.spare));
            self.filling_since = None;
            self.full_since = None;
            batch.may_be_lost = self.limits.is_asynchronous && self.stopping.is_none() && !is_sync_due;
            if batch.may_be_lost {
                self.unsynced_since.get_or_insert(now);
            }
            for (partition, span) in &batch.spans {
                self.set(*partition, |located| located.tail = span.next);
            }
            self.flight = Some(Flight {
                spans: batch.spans.clone(),
                records: batch.len(),
                batch: Some(batch),
                in_doubt: false,
            });
        }
        let batch = self.flight.as_mut()?.batch.take()?;
        Some(Request::Flush(batch))
    }

    fn is_sync_due(&self, now: Instant) -> bool {
        self.unsynced_since.is_some_and(|since| {
            self.stopping.is_some() || now.saturating_duration_since(since) >= SYNC_EVERY
        })
    }

    fn is_due(&self, now: Instant) -> bool {
        let waited = |since| now.saturating_duration_since(since) >= self.limits.batch_wait;
        !self.filling.is_empty()
            && (!self.has_room() || self.stopping.is_some() || self.filling_since.is_some_and(waited))
    }

    fn kafka_action(&mut self, now: Instant) -> Option<Action> {
        if self.stopping.is_some() {
            return None;
        }
        self.find_starts(now)
            .or_else(|| self.find_extents(now))
            .or_else(|| self.read_or_pause(now))
            .or_else(|| self.commit(now))
    }

    fn find_starts(&mut self, now: Instant) -> Option<Action> {
        if self.find_starts_at.is_some_and(|at| now < at) {
            return None;
        }
        let partitions = self.startless();
        if partitions.is_empty() {
            return None;
        }
        self.find_starts_at = Some(now + KAFKA_RETRY);
        Some(Action::FindStarts(partitions))
    }

    fn find_extents(&mut self, now: Instant) -> Option<Action> {
        self.find_extents_at.take_if(|at| *at <= now)?;
        let partitions = self.partitions_where(|located| located.reading);
        (!partitions.is_empty()).then_some(Action::FindExtents(partitions))
    }

    fn read_or_pause(&mut self, now: Instant) -> Option<Action> {
        if self.has_room() {
            if self.read_at.is_some_and(|at| now < at) {
                return None;
            }
            self.read_at = None;
            let mut starting = Vec::new();
            for (partition, progress) in &mut self.partitions {
                if let Some(located) = progress.located_mut().filter(|located| !located.reading) {
                    located.reading = true;
                    starting.push((*partition, located.next));
                }
            }
            return (!starting.is_empty()).then_some(Action::Read(starting));
        }
        let paused_too_soon = self.full_since.is_some_and(|since| now < since + PAUSE_AFTER);
        if paused_too_soon || !self.is_reading() {
            return None;
        }
        for progress in self.partitions.values_mut() {
            if let Some(located) = progress.located_mut() {
                located.reading = false;
            }
        }
        Some(Action::Pause)
    }

    fn commit(&mut self, now: Instant) -> Option<Action> {
        if self.stopping.is_none() && self.commit_at.is_some_and(|at| now < at) {
            return None;
        }
        let commits: Vec<_> = self
            .partitions
            .iter()
            .filter_map(|(partition, progress)| Some((*partition, self.committable(progress.located()?)?)))
            .collect();
        let mut is_news = false;
        for (partition, next) in &commits {
            self.set(*partition, |located| {
                is_news |= located.committed.replace(*next) != Some(*next)
            });
        }
        let is_late = self.commit_at.is_some_and(|at| at + COMMIT_AGAIN_AFTER <= now);
        if commits.is_empty() || (!is_news && !is_late) {
            return None;
        }
        self.commit_at = Some(now + COMMIT_EVERY);
        Some(Action::Commit(commits))
    }

    fn stop_action(&mut self, now: Instant) -> Option<Action> {
        self.stopping?;
        let unwritten = self.unwritten();
        if (unwritten > 0 || self.unsynced_since.is_some()) && !self.has_given_up(now) {
            return None;
        }
        self.commit(now).or(Some(Action::Stop { unwritten }))
    }

    fn wait_action(&self, now: Instant) -> Action {
        // Only the age of a batch and the end of a stop are waited for exactly; everything else may be late by up to IDLE.
        let due_at = self.filling_since.map(|since| since + self.limits.batch_wait);
        let due_at = due_at
            .into_iter()
            .chain(self.stopping.map(|stopping| stopping.deadline));
        let until = due_at.filter(|at| *at > now).fold(now + IDLE, Instant::min);
        if !self.has_room() && self.is_reading() {
            Action::Hold { until }
        } else {
            Action::Poll { until }
        }
    }
}
