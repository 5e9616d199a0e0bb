//! The ledger of a share: what its owner leaves for the next one.
//!
//! It is the group's committed offset of the partition, with a line of metadata: the version, the numbers of [`Ledger`], and the
//! AGENT_NAME of the owner. It is committed after Kafka has acknowledged the
//! records that it covers, so it may lag, but it never leads.

use crate::sample::epoch::Epoch;

/// The version of the metadata.
const VERSION: &str = "1";

/// The number of words in the metadata. The last one is the place, which may contain spaces itself.
const WORDS: usize = 6;

/// How far a share is recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ledger {
    /// The epoch of the latest owner.
    pub epoch: Epoch,
    /// Every tick before this time (Unix time in microseconds) has its record. Zero: not known.
    pub whole_before: i64,
    /// The records of all later ticks have this offset or a higher one.
    pub from: i64,
    /// The highest epoch before that offset. A reader that begins there starts with it.
    pub epoch_at_from: Epoch,
    /// The number of partitions by which hosts are divided. All members use this number, even if partitions were added to the
    /// topic: with different numbers, two members would check the same host.
    pub partitions: i32,
}

/// The metadata of the group's committed offset is not a ledger.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "its committed offset {offset} has the metadata {metadata:?}, which host-metrics did not write: another program uses this \
     group, or somebody reset its offsets; set another PRODUCE_GROUP, or end that program and all producers of this group, delete \
     the offsets of the group, and start the producers"
)]
pub struct NotALedger {
    pub offset: i64,
    pub metadata: String,
}

impl Ledger {
    /// The metadata to commit with the offset. `place` is the owner's AGENT_NAME.
    pub fn metadata(&self, place: &str) -> String {
        let Self {
            epoch,
            whole_before,
            epoch_at_from,
            partitions,
            ..
        } = self;
        format!("{VERSION} {epoch} {whole_before} {epoch_at_from} {partitions} {place}")
    }

    /// The `place` in the metadata of a ledger.
    pub fn place_of(metadata: &str) -> Option<&str> {
        metadata.splitn(WORDS, ' ').nth(WORDS - 1)
    }

    pub fn parse(offset: i64, metadata: &str) -> Result<Self, NotALedger> {
        let numbers = || {
            let mut words = metadata.splitn(WORDS, ' ');
            if words.next() != Some(VERSION) {
                return None;
            }
            let mut number = || words.next()?.parse::<i64>().ok().filter(|number| *number >= 0);
            let ledger = Self {
                epoch: number()?,
                whole_before: number()?,
                from: offset,
                epoch_at_from: number()?,
                partitions: i32::try_from(number()?).ok().filter(|count| *count > 0)?,
            };
            words.next().map(|_| ledger)
        };
        numbers().ok_or_else(|| NotALedger {
            offset,
            metadata: metadata.chars().take(100).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ledger_survives_the_round_trip() {
        let ledger = Ledger {
            epoch: 18,
            whole_before: 1_764_335_293_000_000,
            from: 77,
            epoch_at_from: 17,
            partitions: 12,
        };
        let metadata = ledger.metadata("New York");
        assert_eq!(metadata, "1 18 1764335293000000 17 12 New York");
        assert_eq!(Ledger::parse(77, &metadata), Ok(ledger));
        assert_eq!(Ledger::place_of(&metadata), Some("New York"));
    }

    #[test]
    fn metadata_of_another_program_is_no_ledger() {
        for metadata in [
            "",
            "1",
            "2 18 0 0 4 eu",
            "1 18 0 4 eu",
            "1 18 0 0 4",
            "1 18 0 0 0 eu",
            "1 -1 0 0 4 eu",
            "1 x 0 0 4 eu",
            "1  0 0 4 eu",
        ] {
            let error = Ledger::parse(3, metadata).unwrap_err();
            assert_eq!(error.metadata, metadata);
        }
        assert_eq!(
            Ledger::parse(0, &"x".repeat(5_000)).unwrap_err().metadata.len(),
            100
        );
    }
}
