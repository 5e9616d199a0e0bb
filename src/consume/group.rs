//! Whether every partition has an owner in the consumer group.
//!
//! A rebalance of the cooperative protocol takes two rounds: in the first, members are asked to give back what somebody else
//! is to get; once they have and join again, the second gives it out. If a static member dies between the two and comes back
//! within its session, the broker hands it the first round's assignment and starts no second one: what was given back belongs
//! to nobody, every member is content, and nothing is read there until something else happens to the group. So members look.
//!
//! Pure: what the group and the topics look like is `source`'s to ask.

use std::collections::BTreeSet;

/// A partition by its names.
pub type Named = (String, i32);

/// Looks at the group, one after the other.
#[derive(Debug, Default)]
pub struct Watch {
    missed: BTreeSet<Named>,
}

impl Watch {
    /// A further look: all the partitions of our topics, and the assignment of every member, as Kafka keeps it. Returns the
    /// partitions that had no owner in the look before either: a single one may have met a change on its way. `None`: an
    /// assignment cannot be read, or everything is in order.
    pub fn look<'a>(
        &mut self,
        all: &BTreeSet<Named>,
        assignments: impl IntoIterator<Item = &'a [u8]>,
    ) -> Option<BTreeSet<Named>> {
        let before = std::mem::take(&mut self.missed);
        let mut missing = all.clone();
        for assignment in assignments {
            for owned in partitions_in(assignment)? {
                missing.remove(&owned);
            }
        }
        let still: BTreeSet<Named> = before.intersection(&missing).cloned().collect();
        if still.is_empty() {
            self.missed = missing;
            return None;
        }
        Some(still)
    }

    /// The group could not be looked at, or was in the middle of a rebalance: what was seen before does not count.
    pub fn forget(&mut self) {
        self.missed.clear();
    }
}

/// What a member owns (Kafka's clients/src/main/resources/common/message/ConsumerProtocolAssignment.json: a version, then an
/// array of topics, each a string and an array of int32, all big-endian; what follows is not ours). `None`: it is cut short.
fn partitions_in(assignment: &[u8]) -> Option<Vec<Named>> {
    if assignment.is_empty() {
        return Some(Vec::new());
    }
    let mut rest = assignment;
    let _version: [u8; 2] = take(&mut rest)?;
    let mut owned = Vec::new();
    for _ in 0..i32::from_be_bytes(take(&mut rest)?) {
        let length = usize::try_from(i16::from_be_bytes(take(&mut rest)?)).ok()?;
        let (name, after) = rest.split_at_checked(length)?;
        rest = after;
        let name = std::str::from_utf8(name).ok()?;
        for _ in 0..i32::from_be_bytes(take(&mut rest)?) {
            owned.push((name.to_owned(), i32::from_be_bytes(take(&mut rest)?)));
        }
    }
    Some(owned)
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (taken, after) = rest.split_first_chunk()?;
    *rest = after;
    Some(*taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assignment(topics: &[(&str, &[i32])]) -> Vec<u8> {
        let mut bytes = vec![0, 3];
        bytes.extend((topics.len() as i32).to_be_bytes());
        for (name, partitions) in topics {
            bytes.extend((name.len() as i16).to_be_bytes());
            bytes.extend(name.as_bytes());
            bytes.extend((partitions.len() as i32).to_be_bytes());
            partitions
                .iter()
                .for_each(|number| bytes.extend(number.to_be_bytes()));
        }
        // User data: null.
        bytes.extend((-1_i32).to_be_bytes());
        bytes
    }

    fn named(partitions: &[(&str, i32)]) -> BTreeSet<Named> {
        partitions
            .iter()
            .map(|(topic, number)| ((*topic).to_owned(), *number))
            .collect()
    }

    fn look(watch: &mut Watch, all: &[(&str, i32)], members: &[Vec<u8>]) -> Option<BTreeSet<Named>> {
        watch.look(&named(all), members.iter().map(Vec::as_slice))
    }

    #[test]
    fn what_nobody_owns_in_two_looks_in_a_row_is_said() {
        let all = [("a", 0), ("a", 1), ("b", 0)];
        let mut watch = Watch::default();
        let members = [assignment(&[("a", &[1])]), assignment(&[]), Vec::new()];
        assert_eq!(look(&mut watch, &all, &members), None);
        assert_eq!(
            look(&mut watch, &all, &members),
            Some(named(&[("a", 0), ("b", 0)]))
        );
        // And then it begins anew.
        assert_eq!(look(&mut watch, &all, &members), None);
        let healed = [assignment(&[("a", &[1, 0]), ("b", &[0]), ("other", &[7])])];
        assert_eq!(look(&mut watch, &all, &healed), None);
        assert_eq!(look(&mut watch, &all, &members), None);
        watch.forget();
        assert_eq!(look(&mut watch, &all, &members), None);
    }

    #[test]
    fn partitions_on_their_way_from_one_member_to_another_are_not_said() {
        let all = [("a", 0), ("a", 1)];
        let mut watch = Watch::default();
        assert_eq!(look(&mut watch, &all, &[assignment(&[("a", &[1])])]), None);
        assert_eq!(look(&mut watch, &all, &[assignment(&[("a", &[0])])]), None);
    }

    #[test]
    fn an_assignment_that_cannot_be_read_says_nothing() {
        let whole = assignment(&[("topic", &[0, 1])]);
        let all = [("topic", 0), ("topic", 2)];
        for length in 1..whole.len() - 4 {
            let cut = vec![whole[..length].to_vec()];
            let mut watch = Watch::default();
            assert_eq!(look(&mut watch, &all, &cut), None);
            assert_eq!(look(&mut watch, &all, &cut), None, "{length}");
        }
        let mut huge = vec![0, 3];
        huge.extend(i32::MAX.to_be_bytes());
        let mut watch = Watch::default();
        look(&mut watch, &all, std::slice::from_ref(&huge));
        assert_eq!(look(&mut watch, &all, &[huge]), None);
    }
}
