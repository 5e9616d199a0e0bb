//! A batch: the records of one transaction, as Kafka's bytes and as the rows or rejected records that they become.
//!
//! Owns the bytes of its records, because a record that Postgres refuses is stored unchanged, and the types for positions. Pure.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use openssl::sha::sha256;

use crate::sample::Timestamp;
use crate::sample::epoch::Epochs;

/// The longest key and value that are read. Our records have less than 10 KiB, but anybody who can write to the topic can
/// compress a gigabyte into a few kilobytes. Longer ones are not copied.
pub const MAX_READ_BYTES: usize = 1 << 20;

/// How many bytes of a longer key or value are kept, so that it can be recognised.
const PREFIX_BYTES: usize = 64 << 10;

/// A partition of one of the configured topics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Partition {
    // The number comes first, because partitions are compared for each record and numbers differ more often.
    pub number: i32,
    pub topic: &'static str,
}

impl Partition {
    pub const fn new(topic: &'static str, number: i32) -> Self {
        Self { number, topic }
    }
}

impl fmt::Display for Partition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.topic, self.number)
    }
}

/// A record's place in its partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Offset(pub i64);

/// The offset of the next record to read, as in the offsets table and in Kafka's commits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NextOffset(pub i64);

impl Offset {
    /// The only place that adds 1 to an offset.
    pub fn next(self) -> NextOffset {
        NextOffset(self.0.saturating_add(1))
    }
}

impl NextOffset {
    /// Whether the record at `offset` is before the next one to read.
    pub fn is_past(self, offset: Offset) -> bool {
        offset.0 < self.0
    }
}

/// A partition's part of a batch. The transaction moves its position from `base` to `next`, or does nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The position before the batch. Offsets have gaps, so the first record's offset may be higher.
    pub base: NextOffset,
    pub next: NextOffset,
}

/// What a transaction did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Flushed {
    /// Rows, rejected records and positions are committed. A crash of the server can lose them only if the batch
    /// [may be lost](Batch::may_be_lost), and then it loses all of them.
    Durable,
    /// Another consumer moved a position. Nothing was written.
    Fenced,
    /// The table refuses these entries (by index) for the given reasons. Nothing was written.
    Refused(Vec<(usize, String)>),
}

/// A record as Kafka delivers it.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a> {
    pub partition: Partition,
    pub offset: Offset,
    /// Kafka's timestamp of the record, if it has a valid one.
    pub timestamp: Option<Timestamp>,
    pub key: Option<&'a [u8]>,
    pub value: Option<&'a [u8]>,
}

impl Record<'_> {
    /// Why its key or value is too long to be read.
    pub fn too_long(&self) -> Option<String> {
        too_long("key", self.key).or_else(|| too_long("value", self.value))
    }
}

/// What becomes of a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Form {
    /// It is written, as this range of [`Batch::encoded`].
    Row(Range<usize>),
    /// It is stored in the rejected table, with this reason.
    Rejected(String),
    /// It is a claim, which is not stored.
    Claim,
}

/// How far a partition is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Position {
    pub next: NextOffset,
    /// The highest epochs before it.
    pub epochs: Epochs,
}

impl From<NextOffset> for Position {
    fn from(next: NextOffset) -> Self {
        Self {
            next,
            epochs: Epochs::default(),
        }
    }
}

/// One record of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub partition: Partition,
    pub offset: Offset,
    pub timestamp: Option<Timestamp>,
    /// Ranges of [`Batch::record_bytes`]; `None` is Kafka's null.
    pub key: Option<Range<usize>>,
    pub value: Option<Range<usize>>,
    pub form: Form,
}

/// Records of one transaction, in the order of reading.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    pub entries: Vec<Entry>,
    pub spans: BTreeMap<Partition, Span>,
    /// The highest epochs after this batch, of the partitions in which it raises one.
    pub epochs: BTreeMap<Partition, Epochs>,
    /// Keys and values as Kafka delivered them.
    pub record_bytes: Vec<u8>,
    /// What the sink encoded: for the rows, COPY's binary format without header and trailer. A partition that was removed leaves a
    /// gap.
    pub encoded: Vec<u8>,
    /// The commit does not wait for the server's disk.
    pub may_be_lost: bool,
}

impl Batch {
    /// The number of records, including rejected ones.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The number of records that become rows.
    pub fn row_count(&self) -> usize {
        let forms = self.entries.iter().map(|entry| &entry.form);
        forms.filter(|form| matches!(form, Form::Row(_))).count()
    }

    /// The memory of its records.
    pub fn bytes(&self) -> usize {
        self.record_bytes.len() + self.encoded.len()
    }

    /// Appends a record. `base` is the partition's position before this batch. `encode` appends what is written, which is nothing
    /// for a claim. Its error is the reason why the record is rejected.
    pub fn push(
        &mut self,
        base: NextOffset,
        record: Record<'_>,
        encode: impl FnOnce(&mut Vec<u8>) -> Result<(), String>,
    ) {
        let span = self
            .spans
            .entry(record.partition)
            .or_insert(Span { base, next: base });
        debug_assert!(
            span.next == base || !span.next.is_past(record.offset),
            "offsets must strictly increase: {record:?} after {span:?}"
        );
        span.next = record.offset.next();

        let row_start = self.encoded.len();
        let encoded = record.too_long().map_or_else(|| encode(&mut self.encoded), Err);
        let form = match encoded {
            Ok(()) if self.encoded.len() == row_start => Form::Claim,
            Ok(()) => Form::Row(row_start..self.encoded.len()),
            Err(reason) => {
                self.encoded.truncate(row_start);
                Form::Rejected(reason)
            }
        };
        let key = record.key.map(|bytes| self.keep(bytes));
        let value = record.value.map(|bytes| self.keep(bytes));
        self.entries.push(Entry {
            partition: record.partition,
            offset: record.offset,
            timestamp: record.timestamp,
            key,
            value,
            form,
        });
    }

    /// Rejects a record whose row the table refused. False if the entry has no row.
    pub fn reject(&mut self, index: usize, reason: String) -> bool {
        match self.entries.get_mut(index) {
            Some(entry) if matches!(entry.form, Form::Row(_)) => {
                entry.form = Form::Rejected(reason);
                true
            }
            _ => false,
        }
    }

    /// Removes a partition's records and span, and returns how many records there were. Their bytes stay until the batch is
    /// cleared.
    pub fn forget(&mut self, partition: Partition) -> usize {
        if self.spans.remove(&partition).is_none() {
            return 0;
        }
        self.epochs.remove(&partition);
        let before = self.entries.len();
        self.entries.retain(|entry| entry.partition != partition);
        let forgotten = before - self.entries.len();
        if self.entries.is_empty() {
            self.clear();
        }
        forgotten
    }

    /// Empties the batch. Keeps its memory for the next one, unless that is much more than this one needed.
    pub fn clear(&mut self) {
        let keep_bytes = |bytes: &mut Vec<u8>| {
            let used = bytes.len();
            bytes.clear();
            bytes.shrink_to(used.saturating_mul(2).max(KEPT_BYTES));
        };
        keep_bytes(&mut self.record_bytes);
        keep_bytes(&mut self.encoded);
        self.entries.clear();
        self.spans.clear();
        self.epochs.clear();
        self.may_be_lost = false;
    }

    fn keep(&mut self, bytes: &[u8]) -> Range<usize> {
        let kept = match bytes.len() {
            0..=MAX_READ_BYTES => bytes,
            _ => bytes.get(..PREFIX_BYTES).unwrap_or(bytes),
        };
        let start = self.record_bytes.len();
        self.record_bytes.extend_from_slice(kept);
        start..self.record_bytes.len()
    }
}

/// Why a key or value is too long to read, with a hash that distinguishes it from others with the same beginning.
fn too_long(what: &str, bytes: Option<&[u8]>) -> Option<String> {
    let bytes = bytes.filter(|bytes| bytes.len() > MAX_READ_BYTES)?;
    let hash: String = sha256(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    Some(format!(
        "{what}: expected at most {MAX_READ_BYTES} bytes, found {}; the first {PREFIX_BYTES} are kept; SHA-256 of all: \
         {hash}",
        bytes.len()
    ))
}

/// The memory that an empty batch may always keep. It holds a few thousand usual records, so small batches do not allocate, and
/// the memory of a burst of huge records is still released.
const KEPT_BYTES: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    const P: Partition = Partition::new("t", 0);
    const Q: Partition = Partition::new("t", 1);

    fn record(partition: Partition, offset: i64) -> Record<'static> {
        Record {
            partition,
            offset: Offset(offset),
            timestamp: None,
            key: Some(b"key"),
            value: Some(b"value"),
        }
    }

    fn push(batch: &mut Batch, partition: Partition, base: i64, offset: i64, row: Result<&[u8], &str>) {
        batch.push(NextOffset(base), record(partition, offset), |into| {
            into.extend_from_slice(row.unwrap_or(b"half a row"));
            row.map(|_| ()).map_err(String::from)
        });
    }

    #[test]
    fn a_span_goes_from_the_position_held_to_behind_the_last_record() {
        let mut batch = Batch::default();
        push(&mut batch, P, 3, 7, Ok(b"a"));
        push(&mut batch, P, 3, 9, Ok(b"b"));
        let expected = Span {
            base: NextOffset(3),
            next: NextOffset(10),
        };
        assert_eq!(batch.spans, BTreeMap::from([(P, expected)]));
    }

    #[test]
    fn a_record_that_cannot_be_encoded_is_rejected_and_leaves_no_bytes_of_a_row() {
        let mut batch = Batch::default();
        push(&mut batch, P, 0, 0, Ok(b"a"));
        push(&mut batch, P, 0, 1, Err("no row"));
        push(&mut batch, P, 0, 2, Ok(b"c"));
        batch.push(NextOffset(0), record(P, 3), |_| Ok(()));
        let forms: Vec<Form> = batch.entries.iter().map(|entry| entry.form.clone()).collect();
        let rejected = Form::Rejected("no row".into());
        assert_eq!(forms, [Form::Row(0..1), rejected, Form::Row(1..2), Form::Claim]);
        assert_eq!(batch.row_count(), 2, "a claim is not a row");
        assert_eq!(batch.encoded, b"ac");
        let value = batch.entries[1].value.clone().unwrap();
        assert_eq!(&batch.record_bytes[value], b"value");
    }

    #[test]
    fn a_record_that_is_too_long_is_rejected_unread_with_its_beginning_its_length_and_its_hash() {
        let long = vec![b'x'; MAX_READ_BYTES + 1];
        let fits = &long[1..];
        // If both are too long, the reason names the key.
        for (key, value, said) in [
            (Some(fits), Some(long.as_slice()), Some("value: ")),
            (None, Some(&long), Some("value: ")),
            (Some(&long), None, Some("key: ")),
            (Some(&long), Some(&long), Some("key: ")),
            (Some(fits), Some(fits), None),
        ] {
            let mut batch = Batch::default();
            let record = Record {
                partition: P,
                offset: Offset(0),
                timestamp: None,
                key,
                value,
            };
            batch.push(NextOffset(0), record, |_| {
                assert_eq!(said, None, "it is not read");
                Ok(())
            });
            let entry = &batch.entries[0];
            for (bytes, kept) in [(key, &entry.key), (value, &entry.value)] {
                let expected = bytes.map(|bytes| match bytes.len() {
                    0..=MAX_READ_BYTES => bytes,
                    _ => &bytes[..PREFIX_BYTES],
                });
                assert!(kept.clone().map(|kept| &batch.record_bytes[kept]) == expected);
            }
            let Some(said) = said else {
                assert_eq!(entry.form, Form::Claim, "nothing was appended");
                continue;
            };
            let Form::Rejected(reason) = &entry.form else {
                panic!("{:?}", entry.form);
            };
            assert!(reason.starts_with(said), "{reason}");
            // `head -c 1048577 /dev/zero | tr '\0' x | sha256sum`
            for words in [
                "found 1048577;",
                "154b8ed3c2383ce429058768595935faf7851b5c38db2b1732594be1d88bc05a",
            ] {
                assert!(reason.contains(words), "{reason}");
            }
        }
    }

    #[test]
    fn forgetting_a_partition_leaves_the_others_rows_where_they_are() {
        let mut batch = Batch::default();
        push(&mut batch, P, 0, 0, Ok(b"p"));
        push(&mut batch, Q, 0, 0, Ok(b"q"));
        push(&mut batch, P, 0, 1, Ok(b"p"));
        assert_eq!(batch.forget(P), 2);
        assert_eq!(batch.forget(P), 0);
        assert_eq!(batch.spans.keys().collect::<Vec<_>>(), [&Q]);
        assert_eq!(batch.entries[0].form, Form::Row(1..2));
        assert_eq!(batch.forget(Q), 1);
        assert_eq!(batch.bytes(), 0);
    }

    #[test]
    fn only_a_row_can_be_rejected_and_only_once() {
        let mut batch = Batch::default();
        push(&mut batch, P, 0, 0, Ok(b"p"));
        assert!(batch.reject(0, "refused".into()));
        assert!(!batch.reject(0, "again".into()));
        assert!(!batch.reject(1, "not there".into()));
        assert_eq!(batch.entries[0].form, Form::Rejected("refused".into()));
    }

    #[test]
    fn the_memory_of_large_batches_is_released_when_batches_are_small_again() {
        let mut batch = Batch::default();
        batch.record_bytes.reserve(64 << 20);
        batch.clear();
        assert!(batch.record_bytes.capacity() < 4 << 20);
    }
}
