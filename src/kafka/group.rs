//! Whether every partition has an owner in a consumer group.
//!
//! A cooperative rebalance takes two rounds. In the first, members give back the partitions that others will get; in the second
//! these are assigned. If a static member dies between the two and comes back within its session, the broker repeats the first
//! round's assignment and starts no second round. What was given back then has no owner until the group changes again. So every
//! member looks for such partitions.

use std::collections::BTreeSet;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use log::Level;
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::KafkaResult;
use rdkafka::groups::GroupMemberInfo;

use super::topics::{Named, look_up_topic};

/// How long Kafka may take for each question about the group. A thread of its own waits, so nothing is delayed.
const ASK_WITHIN: Duration = Duration::from_secs(3);

/// How often the group is looked at. Two looks in a row have to find the same partitions without an owner.
const LOOK_EVERY: Duration = Duration::from_secs(15);

/// What a look at the group has found.
pub struct Found<'a> {
    pub members: &'a [GroupMemberInfo],
    /// All partitions of our topics.
    pub all: BTreeSet<Named>,
    /// Those that no member had at this look and at the one before it. They need [`adopt`].
    pub orphans: BTreeSet<Named>,
}

/// Looks at the group regularly, until the sender is dropped, and reports what it finds while no rebalance is under way. The answer
/// takes as long as the slowest broker.
pub fn watch_group<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    group: &str,
    until: &Receiver<()>,
    report: impl Fn(Found<'_>),
) {
    let mut watch = Watch::default();
    while until.recv_timeout(LOOK_EVERY) == Err(RecvTimeoutError::Timeout) {
        if let Err(error) = look(consumer, group, &mut watch, &report) {
            watch.forget();
            log::debug!("cannot look at the group: {error}");
        }
    }
}

fn look<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    name: &str,
    watch: &mut Watch,
    report: impl Fn(Found<'_>),
) -> KafkaResult<()> {
    let list = consumer.fetch_group_list(Some(name), ASK_WITHIN)?;
    let group = list.groups().iter().find(|group| group.name() == name);
    // A group without members cannot own anything, and a rebalance is about to assign everything.
    let Some(group) = group.filter(|group| group.state() == "Stable" && !group.members().is_empty()) else {
        watch.forget();
        return Ok(());
    };
    let mut all = BTreeSet::new();
    for topic in topics(consumer)? {
        let partitions = look_up_topic(consumer.client(), &topic, ASK_WITHIN)?.unwrap_or_default();
        all.extend(
            partitions
                .iter()
                .map(|partition| (topic.clone(), partition.number)),
        );
    }
    let members = group.members();
    let assignments = members.iter().filter_map(|member| member.assignment());
    let orphans = watch.look(&all, assignments).unwrap_or_default();
    report(Found {
        members,
        all,
        orphans,
    });
    Ok(())
}

/// Leaves the group and joins it again, which makes the group assign every partition. A new subscription alone does not, and a
/// static member that only joins again gets what it had.
pub fn adopt<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    orphans: &BTreeSet<Named>,
    level: Level,
) -> KafkaResult<()> {
    log::log!(
        level,
        "{} are assigned to no member of the group; joining it again, so that they are assigned",
        names(orphans)
    );
    let topics = topics(consumer)?;
    consumer.unsubscribe();
    consumer.subscribe(&topics.iter().map(String::as_str).collect::<Vec<_>>())
}

/// The names of partitions in texts: `topic/number`.
pub fn names<'a>(partitions: impl IntoIterator<Item = &'a Named>) -> String {
    let names = partitions
        .into_iter()
        .map(|(topic, number)| format!("{topic}/{number}"));
    names.collect::<Vec<_>>().join(" ")
}

fn topics<C: ConsumerContext>(consumer: &BaseConsumer<C>) -> KafkaResult<Vec<String>> {
    let subscription = consumer.subscription()?;
    let topics = subscription.elements();
    Ok(topics.iter().map(|topic| topic.topic().to_owned()).collect())
}

/// Compares each look at the group with the one before.
#[derive(Debug, Default)]
pub struct Watch {
    without_owner: BTreeSet<Named>,
}

impl Watch {
    /// Takes all partitions of our topics and the assignment of each member, in Kafka's encoding. Returns the partitions that have
    /// had no owner in two looks, because a single look may fall into a change. `None` if there are none, or if an assignment
    /// cannot be read.
    pub fn look<'a>(
        &mut self,
        all: &BTreeSet<Named>,
        assignments: impl IntoIterator<Item = &'a [u8]>,
    ) -> Option<BTreeSet<Named>> {
        let before = std::mem::take(&mut self.without_owner);
        let mut missing = all.clone();
        for assignment in assignments {
            let owned = partitions_in(assignment)?;
            missing.retain(|partition| !owned.contains(partition));
        }
        let still: BTreeSet<Named> = before.intersection(&missing).cloned().collect();
        if still.is_empty() {
            self.without_owner = missing;
            return None;
        }
        Some(still)
    }

    /// Forgets the last look. Has to be called when the group could not be looked at, or was rebalancing.
    pub fn forget(&mut self) {
        self.without_owner.clear();
    }
}

/// The partitions in an assignment (Kafka's ConsumerProtocolAssignment.json: a version, then an array of topics, each a string
/// and an array of int32, all big-endian; the rest is not needed). `None` if it is cut off.
pub fn partitions_in(assignment: &[u8]) -> Option<BTreeSet<Named>> {
    let mut owned = BTreeSet::new();
    if assignment.is_empty() {
        return Some(owned);
    }
    let mut rest = assignment;
    let _version: [u8; 2] = take(&mut rest)?;
    for _ in 0..i32::from_be_bytes(take(&mut rest)?) {
        let length = usize::try_from(i16::from_be_bytes(take(&mut rest)?)).ok()?;
        let (name, after) = rest.split_at_checked(length)?;
        rest = after;
        let name = std::str::from_utf8(name).ok()?;
        for _ in 0..i32::from_be_bytes(take(&mut rest)?) {
            owned.insert((name.to_owned(), i32::from_be_bytes(take(&mut rest)?)));
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
    fn partitions_without_an_owner_in_two_looks_in_a_row_are_reported() {
        let all = [("a", 0), ("a", 1), ("b", 0)];
        let mut watch = Watch::default();
        let members = [assignment(&[("a", &[1])]), assignment(&[]), Vec::new()];
        assert_eq!(look(&mut watch, &all, &members), None);
        assert_eq!(
            look(&mut watch, &all, &members),
            Some(named(&[("a", 0), ("b", 0)]))
        );
        // And then it begins again.
        assert_eq!(look(&mut watch, &all, &members), None);
        let healed = [assignment(&[("a", &[1, 0]), ("b", &[0]), ("other", &[7])])];
        assert_eq!(look(&mut watch, &all, &healed), None);
        assert_eq!(look(&mut watch, &all, &members), None);
        watch.forget();
        assert_eq!(look(&mut watch, &all, &members), None);
    }

    #[test]
    fn partitions_that_move_between_members_are_not_reported() {
        let all = [("a", 0), ("a", 1)];
        let mut watch = Watch::default();
        assert_eq!(look(&mut watch, &all, &[assignment(&[("a", &[1])])]), None);
        assert_eq!(look(&mut watch, &all, &[assignment(&[("a", &[0])])]), None);
    }

    #[test]
    fn an_assignment_that_cannot_be_read_proves_nothing() {
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
