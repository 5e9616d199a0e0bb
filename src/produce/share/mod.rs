//! Shares: how producers of one group (PRODUCE_GROUP) divide the hosts and take them over from each other.
//!
//! A share is a partition of a results topic. A host belongs to the share that its key hashes to. This folder owns the protocol
//! by which every tick of every host gets exactly one valid record: [`ledger`] is what an owner leaves for the next one, [`tail`]
//! is what the next one finds in the partition, and [`shares`] is the order of the steps. Pure.
//!
//! A producer takes a share in these steps:
//!
//! 1. Read the ledger. Its epoch is n.
//! 2. Commit epoch n + 1 to the ledger. The group's coordinator refuses this if the producer is no longer a member.
//! 3. Append a claim with epoch n + 1 to the partition.
//! 4. Read the partition from the ledger's offset up to the claim.
//! 5. Record the ticks without a valid record as missed, and continue with the next ticks.
//!
//! Why this is sufficient:
//!
//! - No tick has two valid records. The records that an earlier owner appends after the claim are void, because their epoch is
//!   lower. Those before the claim are found in step 4.
//! - No tick is without a record. The records that one owner writes for a host have no gap, and the first one is for the first
//!   tick that has no valid record before the claim.
//! - Two producers that take the same share have different epochs, because the later one reads the epoch that the earlier one
//!   committed. If their claims are appended in the opposite order, the claim with the lower epoch is void, and its owner finds
//!   the higher epoch in step 4.
//! - The ledger is never wrong. Only a member of the group can commit, so a producer whose records are void cannot report ticks
//!   as recorded.
//!
//! One commit cannot be refused: Kafka accepts a commit without a member id while the group has no members, and librdkafka sends
//! one if its session ends during the call. Its ledger is true all the same, unless it covers void records. We could have
//! written void records only if another producer took the share and left the group while this process was suspended, so after
//! a suspension `fleet` takes every share again from its ledger.

pub mod events;
pub mod ledger;
pub mod shares;
pub mod tail;

use std::fmt;
use std::sync::Arc;

/// A partition of a results topic, and the hosts whose keys hash to it.
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

/// The partition of a key, as Kafka's own clients compute it: murmur2 with seed 0x9747b28c, without the sign bit, modulo
/// `partitions`, which is at least 1.
pub fn partition_of(key: &[u8], partitions: i32) -> i32 {
    const MASK: u32 = 0x7fff_ffff;
    let hash = murmur2(key) & MASK;
    // Below 2^31.
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
