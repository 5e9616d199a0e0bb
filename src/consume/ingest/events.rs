//! What each event changes in the machine.

use std::collections::BTreeMap;
use std::time::Instant;

use super::{Event, Extent, Ingest, KAFKA_RETRY, Located, PartitionState, Stopping, StoreState};
use crate::consume::batch::{Batch, Flushed, NextOffset, Partition, Position, Span};
use crate::sample::epoch::Epochs;

impl Ingest {
    /// Takes account of what happened.
    pub fn handle(&mut self, now: Instant, event: Event) {
        match event {
            Event::Assigned(partitions) => self.assigned(partitions),
            Event::Revoked(partitions) => self.revoked(&partitions),
            Event::Starts(starts) => self.starts(&starts),
            Event::OutOfRange => {
                self.find_extents_at.get_or_insert(now);
            }
            Event::Extents(extents) => self.extents(now, &extents),
            Event::Stuck(partitions) => self.stuck(&partitions),
            Event::ReadFailed(partitions) => self.read_failed(now, &partitions),
            Event::Opened { same_layout } => self.opened(same_layout),
            Event::Located(positions) => self.located(now, &positions),
            Event::Flushed(batch, flushed) => self.flushed(now, batch, flushed),
            Event::StoreFailed => self.store_failed(now),
            Event::Stop { deadline } => self.stop(deadline),
        }
    }

    fn assigned(&mut self, partitions: Vec<Partition>) {
        self.revoked(&partitions);
        for partition in partitions {
            self.partitions
                .insert(partition, PartitionState::Unlocated { start: None });
        }
    }

    fn revoked(&mut self, partitions: &[Partition]) {
        for partition in partitions {
            if self.partitions.remove(partition).is_some() {
                self.epochs.remove(partition);
                self.forget(*partition);
            }
        }
    }

    fn starts(&mut self, starts: &BTreeMap<Partition, NextOffset>) {
        for (partition, start) in starts {
            if let Some(progress @ PartitionState::Startless) = self.partitions.get_mut(partition) {
                *progress = PartitionState::Unlocated { start: Some(*start) };
            }
        }
        if self.startless().is_empty() {
            self.find_starts_at = None;
        }
    }

    fn extents(&mut self, now: Instant, extents: &BTreeMap<Partition, Extent>) {
        let read = self.partitions_where(|located| located.reading);
        let suspected = std::mem::take(&mut self.beyond_end);
        let mut ask_again = read.iter().any(|partition| !extents.contains_key(partition));
        for (&partition, &extent) in extents {
            let Some(PartitionState::Located(located)) = self.partitions.get(&partition).copied() else {
                continue;
            };
            let position = located.next;
            if !located.reading || (extent.low <= position && position <= extent.high) {
                continue;
            }
            if position < extent.low {
                self.notices.push_back(format!(
                    "Kafka has deleted the records of {partition} from {} to {} before they were read (retention); reading goes \
                     on at {}",
                    position.0, extent.low.0, extent.low.0,
                ));
                self.set(partition, |located| {
                    located.next = extent.low;
                    located.reading = false;
                });
            } else if suspected.get(&partition) == Some(&position) {
                let forgotten = self.forget(partition);
                let lost = match forgotten {
                    0 => String::new(),
                    _ => format!("; {forgotten} records of the old topic were not written"),
                };
                self.notices.push_back(format!(
                    "position {} of {partition} is beyond the end, {}, so the topic was recreated; reading starts at its \
                     beginning, {}{lost}",
                    position.0, extent.high.0, extent.low.0,
                ));
                self.set(partition, |located| {
                    located.next = extent.low;
                    located.reading = false;
                    located.committed = None;
                    located.on_disk = None;
                    located.restarted = true;
                });
                self.epochs.remove(&partition);
            } else {
                // Starting over stores the whole partition again, so one answer is not enough: it may come from a
                // replica that is behind.
                self.beyond_end.insert(partition, position);
                ask_again = true;
            }
        }
        if ask_again {
            self.find_extents_at = Some(now + KAFKA_RETRY);
        } else {
            // Kafka's client has stopped reading the partition that it did not name, even if the position is within the extent
            // again. So all are read again from their positions; the wait prevents a busy loop.
            self.read_failed(now, &read);
        }
    }

    /// Reads these positions again once everything that was read of the partitions is written, because writing moves them.
    fn stuck(&mut self, partitions: &[Partition]) {
        for partition in partitions {
            let in_flight = self
                .flight
                .as_ref()
                .is_some_and(|flight| flight.spans.contains_key(partition));
            let is_unwritten = in_flight || self.filling.spans.contains_key(partition);
            match self.partitions.get_mut(partition) {
                // The table has no position of a recreated topic yet.
                Some(progress) if !is_unwritten && progress.located().is_some_and(|at| !at.restarted) => {
                    *progress = PartitionState::Unlocated { start: None };
                }
                _ => {}
            }
        }
    }

    fn read_failed(&mut self, now: Instant, partitions: &[Partition]) {
        self.read_at = Some(now + KAFKA_RETRY);
        for partition in partitions {
            self.set(*partition, |located| located.reading = false);
        }
    }

    fn opened(&mut self, same_layout: bool) {
        self.store = StoreState::Open;
        // The server may have crashed, and lost what it had committed.
        if same_layout && !self.limits.is_asynchronous {
            return;
        }
        let forgotten = self.unwritten();
        self.flight = None;
        self.empty_filling();
        for progress in self.partitions.values_mut() {
            if progress.located().is_some() {
                *progress = PartitionState::Unlocated { start: None };
            }
        }
        if forgotten > 0 && !same_layout {
            let text = format!("the table's columns changed; {forgotten} records are read again");
            self.notices.push_back(text);
        }
    }

    fn located(&mut self, now: Instant, positions: &BTreeMap<Partition, Position>) {
        self.store = StoreState::Open;
        if let Some(flight) = self.flight.as_mut().filter(|flight| flight.in_doubt) {
            flight.in_doubt = false;
            for (partition, span) in flight.spans.clone() {
                self.resolve(partition, span, positions.get(&partition));
            }
            self.drop_empty_flight();
        }
        if self.flight.is_none() {
            self.failures = 0;
        }
        if self.limits.is_asynchronous {
            // A position may be one that another consumer has just written.
            self.unsynced_since.get_or_insert(now);
        }
        for (partition, progress) in &mut self.partitions {
            if let PartitionState::Unlocated { start } = progress {
                match positions.get(partition) {
                    Some(position) => {
                        *progress = PartitionState::Located(Located::at(position.next));
                        self.epochs.insert(*partition, position.epochs.clone());
                    }
                    // Either the table has none, or the partition was assigned after the question was sent. The start that
                    // Kafka returns is then not used.
                    None => {
                        if start.is_some() {
                            self.find_starts_at = Some(now + KAFKA_RETRY);
                        }
                        *progress = PartitionState::Startless;
                    }
                }
            }
        }
    }

    /// Finds out from the position in the table what became of a partition's part of the flight.
    fn resolve(&mut self, partition: Partition, span: Span, found: Option<&Position>) {
        let position = found.map(|found| found.next);
        if position == Some(span.base) {
            return;
        }
        if position == Some(span.next) {
            self.forget_flown(partition);
            self.advance(partition, span);
            return;
        }
        let forgotten = self.forget(partition);
        let base = span.base.0;
        let (progress, text) = match position {
            Some(position) => (
                PartitionState::Located(Located::at(position)),
                format!(
                    "another consumer moved the position of {partition} from {base} to {}; {forgotten} records are left to that \
                     consumer",
                    position.0
                ),
            ),
            None => (
                PartitionState::Startless,
                format!(
                    "the position of {partition}, {base}, is no longer in the offsets table; reading starts at the group's \
                     committed offset, or at the first record if there is none"
                ),
            ),
        };
        self.notices.push_back(text);
        self.partitions.insert(partition, progress);
        self.epochs.insert(
            partition,
            found.map_or_else(Epochs::default, |found| found.epochs.clone()),
        );
    }

    fn flushed(&mut self, now: Instant, mut batch: Batch, flushed: Option<Flushed>) {
        let Some(flight) = self.flight.as_mut() else {
            // All of its partitions were revoked meanwhile.
            self.store = StoreState::Open;
            self.recycle(batch);
            return;
        };
        match flushed {
            Some(Flushed::Durable) => {
                let spans = std::mem::take(&mut flight.spans);
                self.flight = None;
                self.store = StoreState::Open;
                self.failures = 0;
                for (partition, span) in spans {
                    self.advance(partition, span);
                }
                if !batch.may_be_lost {
                    self.synced();
                }
                self.recycle(batch);
            }
            Some(Flushed::Refused(refused)) => {
                let mut progress = false;
                for (index, reason) in refused {
                    progress |= batch.reject(index, reason);
                }
                self.take_back(batch);
                if progress {
                    self.store = StoreState::Open;
                } else {
                    self.store_failed(now);
                }
            }
            Some(Flushed::Fenced) => {
                flight.in_doubt = true;
                self.take_back(batch);
                // From the second fence in a row on this waits, which prevents a busy loop if the position turns out to be ours.
                self.failures += 1;
                self.store = match self.failures {
                    0..=1 => StoreState::Open,
                    _ => StoreState::Closed {
                        open_at: Some(now + self.backoff()),
                    },
                };
            }
            None => {
                flight.in_doubt = true;
                self.take_back(batch);
                self.store_failed(now);
            }
        }
    }

    /// A commit waited for the disk, and so for all commits before it.
    fn synced(&mut self) {
        self.unsynced_since = None;
        for progress in self.partitions.values_mut() {
            if let Some(located) = progress.located_mut().filter(|located| !located.restarted) {
                located.on_disk = Some(located.durable);
            }
        }
    }

    fn store_failed(&mut self, now: Instant) {
        // The next connection starts from the positions in the table.
        self.unsynced_since = None;
        self.failures = self.failures.saturating_add(1);
        let open_at = match &mut self.stopping {
            Some(stopping) => {
                stopping.failures += 1;
                None
            }
            None => Some(now + self.backoff()),
        };
        self.store = StoreState::Closed { open_at };
    }

    fn stop(&mut self, deadline: Instant) {
        if self.stopping.is_some() {
            return;
        }
        self.stopping = Some(Stopping {
            deadline,
            failures: 0,
        });
        // The last commit has all partitions, because Kafka may have dropped an earlier one.
        for progress in self.partitions.values_mut() {
            if let Some(located) = progress.located_mut() {
                located.committed = None;
            }
        }
        if let StoreState::Closed { open_at } = &mut self.store {
            *open_at = None;
        }
    }
}
