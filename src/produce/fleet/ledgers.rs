//! The ledgers in the group's offsets: reading and committing them.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use super::thread::Thread;
use crate::clock::instant_now;
use crate::kafka::Named;
use crate::kafka::member::{self, NotCommitted};
use crate::lock::lock;
use crate::produce::share::Share;
use crate::produce::share::events::{CommitOutcome, Event, StoredLedger};
use crate::produce::share::ledger::Ledger;

/// How long the thread asks for ledgers before it asks again for the group's decisions. The last questions may take 4.5 s more, and
/// all of it has to be shorter than [`SUSPENDED_MICROS`](super::thread::SUSPENDED_MICROS).
const ASK_FOR: Duration = Duration::from_millis(400);

impl Thread {
    /// Shares that are left out, because there was no time or no answer, are asked for again. The shares are sorted.
    pub(super) fn read_ledgers(&mut self, mut shares: Vec<Share>) -> BTreeMap<Share, StoredLedger> {
        let until = instant_now() + ASK_FOR;
        let (mut found, mut foreign, mut has_asked) = (BTreeMap::new(), None, false);
        // In another order each time, so that a partition without a leader holds up no other share for ever.
        let mut by_topic: Vec<&mut [Share]> = shares.chunk_by_mut(|a, b| a.topic == b.topic).collect();
        fastrand::shuffle(&mut by_topic);
        for shares in by_topic {
            fastrand::shuffle(shares);
            if instant_now() >= until {
                break;
            }
            let committed = match self.committed_in(&shares[0].topic) {
                Ok(committed) => committed,
                Err(why) => {
                    self.failure = Some(why);
                    continue;
                }
            };
            for share in &*shares {
                match committed.get(&share.partition) {
                    Some(Some(committed)) => match Ledger::parse(committed.offset, &committed.metadata) {
                        Ok(ledger) => {
                            self.note_place(&committed.metadata);
                            found.insert(share.clone(), StoredLedger::Ledger(ledger));
                        }
                        Err(why) => foreign = Some(format!("share={share} cannot be taken: {why}")),
                    },
                    // One is asked for in any case, even if the questions before took long.
                    Some(None) if !has_asked || instant_now() < until => {
                        has_asked = true;
                        match self.without_ledger(share) {
                            Ok(missing) => drop(found.insert(share.clone(), missing)),
                            Err(why) => self.failure = Some(format!("share={share} {why}")),
                        }
                    }
                    _ => {}
                }
            }
        }
        match foreign {
            Some(why) => self.foreign_ledger.begin(instant_now(), why),
            None => drop(self.foreign_ledger.end(instant_now())),
        }
        found
    }

    fn note_place(&mut self, metadata: &str) {
        if let Some(place) = Ledger::place_of(metadata).filter(|place| *place != self.place) {
            self.other_place = Some(place.to_owned());
        }
    }

    fn without_ledger(&self, share: &Share) -> Result<StoredLedger, String> {
        let (low, high) = self.member.extent(&share.topic, share.partition)?;
        Ok(StoredLedger::Missing {
            low,
            high,
            partitions: self.partitions.of(&share.topic).unwrap_or(1),
        })
    }

    /// The committed offset of each partition of a topic. Also decides by how many partitions its hosts are divided.
    fn committed_in(&self, topic: &str) -> Result<HashMap<i32, Option<member::Committed>>, String> {
        let existing = self.member.partitions(topic)?;
        let all: Vec<Named> = (0..existing)
            .map(|partition| (topic.to_owned(), partition))
            .collect();
        let committed = self.member.committed(&all)?;
        let ledgers = committed.iter().filter_map(|(_, committed)| committed.as_ref());
        let used = ledgers
            .filter_map(|committed| Ledger::parse(committed.offset, &committed.metadata).ok())
            .map(|ledger| ledger.partitions)
            // A new topic of the same name may have fewer.
            .find(|used| *used <= existing);
        let partitions = used.unwrap_or(existing);
        if partitions < existing && self.partitions.of(topic) != Some(partitions) {
            log::warn!(
                "group={} topic={topic} has {existing} partitions, of which the group uses the first {partitions}: it was started with \
                 that many; to use all, stop all its producers, delete the offsets of the group, and start them",
                self.group
            );
        }
        self.partitions.set(topic, partitions);
        let by_partition = |((_, partition), committed)| (partition, committed);
        Ok(committed.into_iter().map(by_partition).collect())
    }

    pub(super) fn commit(&self, ledgers: &[(Share, Ledger)]) {
        let commits: Vec<_> = ledgers
            .iter()
            .map(|(share, ledger)| {
                let committed = member::Committed {
                    offset: ledger.from,
                    metadata: ledger.metadata(&self.place),
                };
                ((share.topic.to_string(), share.partition), committed)
            })
            .collect();
        let (events, group) = (self.events.clone(), self.group.clone());
        let failure = Arc::clone(&self.commit_failure);
        self.member.begin_commit(commits, move |committed| {
            let outcome = match committed {
                Ok(()) => CommitOutcome::Done,
                Err(NotCommitted::Refused(why)) => {
                    log::info!("group={group} refused a commit of this producer: {why}");
                    CommitOutcome::Refused
                }
                Err(NotCommitted::Failed(why)) => {
                    log::debug!("group={group} a commit failed: {why}");
                    *lock(&failure) = Some(why);
                    CommitOutcome::Failed
                }
            };
            // The receiver is gone at the end of a stop.
            let _ = events.send(Event::Committed(outcome));
        });
    }
}
