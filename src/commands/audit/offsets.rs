//! Which offsets of a partition are stored: not at all, once, or more than once.
//!
//! Pure. Postgres groups the stored offsets into blocks, so that ten million rows arrive here as a hundred thousand numbers.

use std::ops::Range;

/// The offsets, or the ticks, of one block: as many as fit into the bits of a `bigint` without its sign.
pub(super) const BLOCK: i64 = 60;

const FULL: u64 = (1 << BLOCK) - 1;

/// More missing ranges than this are counted, but not looked up in Kafka, because each costs a fetch.
const MAX_RANGES: usize = 10_000;

/// A group's position in one partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Position {
    /// Where reading began; `None` if that is not recorded.
    pub first: Option<i64>,
    pub next: i64,
}

/// What is stored of [`BLOCK`] successive offsets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Block {
    /// The first offset divided by [`BLOCK`].
    pub number: i64,
    /// A bit for each stored offset.
    pub stored: u64,
    /// Rows and rejected records. More than there are bits if an offset is stored twice.
    pub entries: i64,
}

/// The offsets of one partition, block by block in ascending order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Offsets {
    position: Position,
    /// The next offset that should be stored; `None` before the first block of a partition without a known beginning.
    expected: Option<i64>,
    /// Offsets below the position that are not stored.
    pub missing: Vec<Range<i64>>,
    /// How many those are, including ranges that are not in `missing`.
    pub missing_count: i64,
    /// The blocks with an offset that is stored more than once.
    pub doubled: Vec<i64>,
    /// Entries in excess of one per offset.
    pub doubled_count: i64,
    /// The first stored offset at or after the position.
    pub beyond: Option<i64>,
    pub entries: i64,
}

impl Offsets {
    pub(super) fn new(position: Position) -> Self {
        Self {
            position,
            expected: position.first,
            missing: Vec::new(),
            missing_count: 0,
            doubled: Vec::new(),
            doubled_count: 0,
            beyond: None,
            entries: 0,
        }
    }

    pub(super) fn take(&mut self, block: Block) {
        let Block {
            number,
            stored,
            entries,
        } = block;
        self.entries += entries;
        let excess = entries - i64::from(stored.count_ones());
        if excess > 0 {
            self.doubled.push(number);
            self.doubled_count += excess;
        }
        let start = number.saturating_mul(BLOCK);
        if stored == FULL && self.expected == Some(start) && start + BLOCK <= self.position.next {
            self.expected = Some(start + BLOCK);
            return;
        }
        for offset in (0..BLOCK)
            .filter(|bit| stored >> bit & 1 == 1)
            .map(|bit| start + bit)
        {
            if offset >= self.position.next {
                self.beyond.get_or_insert(offset);
                return;
            }
            // Empty for an offset before the first one, which was stored for an earlier topic of that name.
            self.miss(self.expected.unwrap_or(offset)..offset);
            self.expected = Some(self.expected.unwrap_or(0).max(offset + 1));
        }
    }

    /// No further block follows.
    pub(super) fn finish(&mut self) {
        let next = self.position.next;
        self.miss(self.expected.unwrap_or(next)..next);
    }

    /// Removes these offsets from the missing ones: a rejected record says why they are not stored.
    pub(super) fn explain(&mut self, explained: Range<i64>) {
        let ranges = std::mem::take(&mut self.missing);
        for range in ranges {
            let before = range.start..range.end.min(explained.start);
            let after = range.start.max(explained.end)..range.end;
            let parts: Vec<_> = [before, after]
                .into_iter()
                .filter(|part| !part.is_empty())
                .collect();
            let left: i64 = parts.iter().map(length).sum();
            self.missing_count -= length(&range) - left;
            self.missing.extend(parts);
        }
    }

    fn miss(&mut self, range: Range<i64>) {
        if range.is_empty() {
            return;
        }
        self.missing_count += length(&range);
        if self.missing.len() < MAX_RANGES {
            self.missing.push(range);
        }
    }
}

pub(super) fn length(range: &Range<i64>) -> i64 {
    range.end - range.start
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// As Postgres groups them.
    fn audit(position: Position, stored: &[i64]) -> Offsets {
        let mut blocks = std::collections::BTreeMap::<i64, (u64, i64)>::new();
        for offset in stored {
            let (bits, entries) = blocks.entry(offset / BLOCK).or_default();
            *bits |= 1 << (offset % BLOCK);
            *entries += 1;
        }
        let mut offsets = Offsets::new(position);
        for (number, (stored, entries)) in blocks {
            offsets.take(Block {
                number,
                stored,
                entries,
            });
        }
        offsets.finish();
        offsets
    }

    fn position(first: i64, next: i64) -> Position {
        Position {
            first: Some(first),
            next,
        }
    }

    #[test]
    fn offsets_that_are_missing_doubled_or_beyond_the_position_are_found() {
        let whole: Vec<i64> = (7..200).collect();
        let found = audit(position(7, 200), &whole);
        assert_eq!(
            (found.missing_count, found.doubled_count, found.beyond),
            (0, 0, None)
        );

        let found = audit(position(5, 203), &whole);
        assert_eq!(found.missing, [5..7, 200..203]);

        let holes: Vec<i64> = (7..200)
            .filter(|offset| !(90..150).contains(offset) && *offset != 8)
            .collect();
        assert_eq!(audit(position(7, 200), &holes).missing, [8..9, 90..150]);

        let mut doubled = whole.clone();
        doubled.extend([61, 61, 130]);
        let found = audit(position(7, 200), &doubled);
        assert_eq!((found.doubled, found.doubled_count), (vec![1, 2], 3));

        assert_eq!(audit(position(7, 150), &whole).beyond, Some(150));
        assert_eq!(audit(position(0, 3), &[]).missing, vec![0..3; 1]);
        let unknown = Position { first: None, next: 3 };
        assert_eq!(audit(unknown, &[]).missing, []);
        assert_eq!(
            audit(
                Position {
                    first: None,
                    next: 200
                },
                &whole
            )
            .missing,
            []
        );
    }

    #[test]
    fn a_range_that_a_rejected_record_accounts_for_is_not_missing() {
        let mut found = audit(position(0, 100), &[0, 50, 99]);
        found.explain(10..60);
        assert_eq!(found.missing, [1..10, 60..99]);
        assert_eq!(found.missing_count, 48);
    }

    proptest! {
        #[test]
        fn every_offset_below_the_position_is_stored_or_missing(
            stored in prop::collection::btree_set(0_i64..400, 0..300), first in 0_i64..200, next in 0_i64..400
        ) {
            let first = first.min(stored.first().copied().unwrap_or(first));
            let next = next.max(first);
            let stored: Vec<i64> = stored.into_iter().collect();
            let found = audit(position(first, next), &stored);
            let missing: Vec<i64> = found.missing.iter().cloned().flatten().collect();
            let expected: Vec<i64> = (first..next).filter(|offset| !stored.contains(offset)).collect();
            prop_assert_eq!(missing, expected);
            prop_assert_eq!(found.beyond, stored.iter().copied().find(|offset| *offset >= next));
        }
    }
}
