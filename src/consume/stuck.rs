//! Partitions that Kafka's client cannot read on, although they have more records.
//!
//! librdkafka refuses a batch that it cannot decompress, or that expands beyond `receive.message.max.bytes`, and fetches it
//! again and again without reporting it. Such a partition stays at one offset before its end while no records are queued. The
//! header of the batch at that offset is then read, which distinguishes it from a slow broker. Pure: `source` asks librdkafka
//! and Kafka.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::consume::batch::Partition;
use crate::kafka::BatchHead;
use crate::outage::Outage;

/// How many looks in a row, 5 s apart, must find a partition at the same offset before the header of its batch is read.
const LOOKS: u32 = 3;

/// The partitions that are not at their end.
#[derive(Debug, Default)]
pub(super) struct Stuck(BTreeMap<Partition, Progress>);

#[derive(Debug, Default)]
struct Progress {
    offset: i64,
    looks: u32,
    /// The header of the batch. `None` until it was read; the partition may just be slow.
    batch: Option<BatchHead>,
    outage: Outage,
}

/// What librdkafka reports about a partition that is being read.
#[derive(Clone, Copy, Debug)]
pub(super) struct FetchState {
    /// The offset that is fetched next, and the end of what can be read.
    pub next_offset: i64,
    pub end_offset: i64,
    /// The queued records. While there are any, librdkafka may have a reason not to fetch more.
    pub records_waiting: i64,
}

impl Stuck {
    /// Takes a look. Returns how long the partition could not be read, if that was logged and has ended.
    pub(super) fn look(&mut self, now: Instant, partition: Partition, state: FetchState) -> Option<Duration> {
        let progress = self.0.entry(partition).or_default();
        let is_behind = (0..state.end_offset).contains(&state.next_offset);
        let lasted = match is_behind && progress.offset == state.next_offset {
            true => None,
            false => std::mem::take(progress).outage.end(now),
        };
        progress.offset = state.next_offset;
        if !is_behind {
            self.0.remove(&partition);
        } else if state.records_waiting == 0 {
            progress.looks = progress.looks.saturating_add(1);
        }
        lasted
    }

    /// A partition, and the offset at which the header of a batch should be read. It is returned again only after further
    /// [`LOOKS`] at the same offset.
    pub(super) fn next_question(&mut self) -> Option<(Partition, i64)> {
        let mut all = self.0.iter_mut();
        let is_due = |progress: &Progress| progress.batch.is_none() && progress.looks >= LOOKS;
        let (partition, progress) = all.find(|(_, progress)| is_due(progress))?;
        progress.looks = 0;
        Some((*partition, progress.offset))
    }

    /// Takes the header of the batch at `offset`. `text` describes it in the log.
    pub(super) fn found(
        &mut self,
        now: Instant,
        partition: Partition,
        offset: i64,
        text: impl FnOnce(&BatchHead) -> String,
        batch: BatchHead,
    ) {
        if let Some(progress) = self
            .0
            .get_mut(&partition)
            .filter(|progress| progress.offset == offset)
        {
            progress.outage.begin(now, text(&batch));
            progress.batch = Some(batch);
        }
    }

    /// These partitions are no longer ours.
    pub(super) fn forget(&mut self, partitions: &[Partition]) {
        self.0.retain(|partition, _| !partitions.contains(partition));
    }

    /// The partitions that are known to be stuck.
    pub(super) fn partitions(&self) -> Vec<Partition> {
        let known = self.0.iter().filter(|(_, progress)| progress.batch.is_some());
        known.map(|(partition, _)| *partition).collect()
    }

    /// One text for each partition that is stuck.
    pub(super) fn reasons(&self) -> impl Iterator<Item = &str> {
        self.0.values().filter_map(|progress| progress.outage.reason())
    }

    /// The texts that are due to be logged, and how long each has lasted.
    pub(super) fn due(&mut self, now: Instant) -> Vec<(String, Duration)> {
        let all = self.0.values_mut();
        let due = all.filter_map(|progress| progress.outage.take_report(now));
        due.map(|(reason, lasted)| (reason.to_owned(), lasted)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const P: Partition = Partition::new("t", 0);

    fn at(seconds: u64) -> Instant {
        static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
        #[expect(clippy::disallowed_methods, reason = "an instant to count from")]
        let start = *START.get_or_init(Instant::now);
        start + Duration::from_secs(seconds)
    }

    fn state(next_offset: i64, end_offset: i64, records_waiting: i64) -> FetchState {
        FetchState {
            next_offset,
            end_offset,
            records_waiting,
        }
    }

    fn batch() -> BatchHead {
        BatchHead {
            first_offset: 5,
            last_offset: 8,
            records: 4,
            compression: "zstd",
            bytes: 6_500,
        }
    }

    #[test]
    fn a_partition_that_moves_or_is_read_to_its_end_or_waits_for_us_is_not_asked_for() {
        for looks in [
            [(5, 9, 0), (6, 9, 0), (7, 9, 0), (8, 9, 0)],
            [(9, 9, 0), (9, 9, 0), (9, 9, 0), (9, 9, 0)],
            [(5, 9, 1), (5, 9, 1), (5, 9, 1), (5, 9, 1)],
            // librdkafka's "not known yet".
            [(-1001, 9, 0), (-1001, 9, 0), (-1001, 9, 0), (-1001, 9, 0)],
            [(0, -1001, 0), (0, -1001, 0), (0, -1001, 0), (0, -1001, 0)],
        ] {
            let mut stuck = Stuck::default();
            for (next, end, waiting) in looks {
                stuck.look(at(0), P, state(next, end, waiting));
            }
            assert_eq!(stuck.next_question(), None, "{looks:?}");
        }
    }

    #[test]
    fn the_batch_at_a_stuck_position_is_reported_until_the_position_moves() {
        let mut stuck = Stuck::default();
        for waiting in [0, 0, 3] {
            stuck.look(at(0), P, state(5, 9, waiting));
            assert_eq!(stuck.next_question(), None);
        }
        stuck.look(at(10), P, state(5, 9, 0));
        assert_eq!(stuck.next_question(), Some((P, 5)));
        assert_eq!(stuck.next_question(), None, "once");
        assert_eq!(stuck.reasons().count(), 0, "nothing is known yet");
        stuck.found(at(10), P, 4, ToString::to_string, batch());
        assert_eq!(stuck.reasons().count(), 0, "it was somewhere else");

        stuck.found(at(10), P, 5, ToString::to_string, batch());
        let text = "offsets 5 to 8, 4 records, zstd, 6500 bytes";
        assert_eq!(stuck.reasons().collect::<Vec<_>>(), [text]);
        assert_eq!(stuck.partitions(), [P]);
        assert_eq!(stuck.due(at(14)), [(text.to_owned(), Duration::from_secs(4))]);
        assert_eq!(stuck.look(at(15), P, state(5, 9, 0)), None);
        assert_eq!(
            stuck.look(at(20), P, state(9, 12, 0)),
            Some(Duration::from_secs(10))
        );
        assert_eq!(stuck.partitions(), []);
    }

    #[test]
    fn an_unanswered_question_is_repeated_and_revoked_partitions_are_forgotten() {
        let mut stuck = Stuck::default();
        for _ in 0..2 {
            for _ in 0..LOOKS {
                assert_eq!(stuck.next_question(), None);
                stuck.look(at(0), P, state(5, 9, 0));
            }
            assert_eq!(stuck.next_question(), Some((P, 5)));
        }
        stuck.forget(&[P]);
        stuck.found(at(0), P, 5, ToString::to_string, batch());
        assert_eq!(stuck.partitions(), []);
    }
}
