//! Shares: which producer of a group checks which hosts, and what it finds recorded when it begins.
//!
//! A share is a partition of a topic for results; the hosts whose keys hash to it belong to it. This folder owns the
//! protocol by which producers of one group (PRODUCE_GROUP) take shares over from one another, so that every tick of every
//! host has exactly one valid record: [`ledger`] is what the next owner is told, [`tail`] what it finds in the topic, and
//! [`shares`] the order of the steps. Pure: no Kafka, no thread, no clock.
//!
//! A share is taken in this order: read the ledger (epoch n); commit epoch n + 1 to it, which the coordinator of the group
//! refuses if we are no member any more; append a claim of that epoch to the partition; read from the ledger's offset up to
//! the claim; record as missed what nobody checked; go on. Why that suffices:
//!
//! - No tick has two valid records: what an earlier owner writes behind the claim is void, for its epoch is lower, and what
//!   it wrote before the claim is found by reading up to it.
//! - No tick has none: the records of a host that one owner writes have no gap, and the first of them is of the first tick
//!   without a valid record before the claim.
//! - Two that take the share at the same time have different epochs, because the later one reads the number that the earlier
//!   one committed. If the claims come in the other order, the later claim is void, and its owner finds the higher epoch
//!   when it reads up to its claim.
//! - The ledger is never wrong: only a member of the group can commit, so nobody whose records are void already can say that
//!   ticks are recorded.

pub mod ledger;
pub mod shares;
pub mod tail;

use std::fmt;
use std::sync::Arc;

/// A partition of a topic for results, and all hosts whose keys hash to it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Share {
    pub topic: Arc<str>,
    pub partition: i32,
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.topic, self.partition)
    }
}

/// The partition of a key, as Kafka's own clients compute it (murmur2, seed 0x9747b28c, the sign bit masked out).
/// `partitions` is at least 1.
pub fn partition_of(key: &[u8], partitions: i32) -> i32 {
    const MASK: u32 = 0x7fff_ffff;
    let hash = murmur2(key) & MASK;
    // Both lie below 2^31.
    (hash % partitions.max(1).unsigned_abs()) as i32
}

/// MurmurHash2 by Austin Appleby, as in `org.apache.kafka.common.utils.Utils`.
fn murmur2(bytes: &[u8]) -> u32 {
    const SEED: u32 = 0x9747_b28c;
    const M: u32 = 0x5bd1_e995;
    let mut hash = SEED ^ bytes.len() as u32;
    let (words, rest) = bytes.as_chunks::<4>();
    for word in words {
        let mut k = u32::from_le_bytes(*word).wrapping_mul(M);
        k ^= k >> 24;
        hash = hash.wrapping_mul(M) ^ k.wrapping_mul(M);
    }
    if !rest.is_empty() {
        for (at, byte) in rest.iter().enumerate() {
            hash ^= u32::from(*byte) << (8 * at);
        }
        hash = hash.wrapping_mul(M);
    }
    hash ^= hash >> 13;
    hash = hash.wrapping_mul(M);
    hash ^ (hash >> 15)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From Kafka's own UtilsTest.
    #[test]
    fn keys_hash_as_in_kafkas_own_clients() {
        for (key, hash) in [
            ("21", -973_932_308_i32),
            ("foobar", -790_332_482),
            ("a-little-bit-long-string", -985_981_536),
            ("a-little-bit-longer-string", -1_486_304_829),
            ("lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58_897_971),
            ("abc", 479_470_107),
        ] {
            assert_eq!(murmur2(key.as_bytes()) as i32, hash, "{key}");
        }
        assert_eq!(partition_of(b"abc", 12), 479_470_107 % 12);
        assert_eq!(partition_of(b"21", 1), 0);
    }
}
