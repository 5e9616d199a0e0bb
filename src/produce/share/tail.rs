//! What a new owner finds in a partition between the ledger's offset and its claim.

use std::collections::HashMap;

use crate::produce::schedule::is_on_grid;
use crate::produce::share::Share;
use crate::produce::share::ledger::Ledger;
use crate::sample;
use crate::sample::epoch::{Claim, Epoch, Epochs};

/// The part of a partition that was read so far, summarized.
#[derive(Clone, Debug)]
pub struct Tail {
    place: String,
    epochs: Epochs,
    /// The highest epoch of a valid record that is not a claim.
    written_epoch: Epoch,
    /// The latest tick with a valid record, for each host.
    latest: HashMap<String, i64>,
    last_tick: i64,
}

impl Tail {
    /// `place` is the `agent` of the group's records.
    pub fn new(place: &str, epoch_before: Epoch) -> Self {
        Self {
            place: place.to_owned(),
            epochs: Epochs::of(place, epoch_before),
            written_epoch: 0,
            latest: HashMap::new(),
            last_tick: 0,
        }
    }

    /// Reads the next value. Values that are neither a record nor a claim are skipped.
    pub fn read_value(&mut self, value: &[u8]) {
        if let Ok(sample) = sample::decode(value) {
            if let (Some(place), Some(scheduled_at)) = (&sample.agent, sample.scheduled_at) {
                let interval_micros = sample
                    .interval_seconds
                    .map(|seconds| (seconds * 1e6).round() as i64);
                self.read_result(
                    place,
                    sample.epoch,
                    &sample.address,
                    scheduled_at.unix_micros(),
                    interval_micros,
                );
            }
        } else if let Some(claim) = Claim::decode(value) {
            self.read_claim(claim.place(), claim.epoch);
        }
    }

    pub fn read_claim(&mut self, place: &str, epoch: Epoch) {
        if place == self.place {
            // A void claim changes nothing.
            let _ = self.epochs.admit(place, epoch);
        }
    }

    /// `epoch` is `None` if the record's producer is in no group, and `interval_micros` if the record does not say.
    pub fn read_result(
        &mut self,
        place: &str,
        epoch: Option<Epoch>,
        address: &str,
        scheduled_at_micros: i64,
        interval_micros: Option<i64>,
    ) {
        let counts = place == self.place
            && match epoch {
                Some(epoch) => self.epochs.admit(place, epoch).is_ok(),
                // It is a record of a producer without the group, which has no gap since its first tick, or one of `--once`,
                // which says nothing about the ticks before it. The latter is not on the grid.
                None => {
                    interval_micros.is_none_or(|interval| is_on_grid(address, interval, scheduled_at_micros))
                }
            };
        if !counts {
            return;
        }
        self.written_epoch = self.written_epoch.max(epoch.unwrap_or_default());
        self.last_tick = self.last_tick.max(scheduled_at_micros);
        match self.latest.get_mut(address) {
            Some(latest) => *latest = scheduled_at_micros.max(*latest),
            None => drop(self.latest.insert(address.to_owned(), scheduled_at_micros)),
        }
    }

    /// The group's highest epoch so far.
    pub fn epoch(&self) -> Epoch {
        self.epochs.highest(&self.place)
    }

    /// The highest epoch so far under which a record was written.
    pub fn written_epoch(&self) -> Epoch {
        self.written_epoch
    }
}

/// A share that we own from now on, and what its hosts continue from.
#[derive(Clone, Debug)]
pub struct Takeover {
    pub share: Share,
    /// Committed and claimed.
    pub ledger: Ledger,
    /// The offset of our claim. `tail` ends there.
    pub claim: i64,
    /// No other producer has claimed the share since we last owned it. The records that we kept meanwhile are still valid, and
    /// the hosts continue without a gap.
    pub is_unbroken: bool,
    pub tail: Tail,
}

impl Takeover {
    /// The latest recorded tick of a host. `None`: the host is unknown.
    pub fn recorded(&self, address: &str) -> Option<i64> {
        let of_ledger = (self.ledger.whole_before > 0).then(|| self.ledger.whole_before - 1);
        self.tail.latest.get(address).copied().max(of_ledger)
    }

    /// The latest tick of all valid records before the claim.
    pub fn last_tick(&self) -> i64 {
        self.tail.last_tick
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::produce::schedule::phase_micros;
    use crate::sample::Timestamp;

    #[test]
    fn only_valid_records_of_the_own_place_count() {
        let mut tail = Tail::new("eu", 4);
        for (place, epoch, address, tick) in [
            ("eu", Some(4), "a", 10),
            ("us", Some(9), "a", 90),
            ("eu", Some(3), "a", 30),
            ("eu", Some(5), "b", 20),
            ("eu", Some(4), "a", 40),
            ("eu", None, "c", 15),
        ] {
            tail.read_result(place, epoch, address, tick, None);
        }
        tail.read_claim("us", 12);
        assert_eq!(tail.epoch(), 5);
        let takeover = |whole_before| Takeover {
            share: Share {
                topic: "t".into(),
                partition: 0,
            },
            ledger: Ledger {
                epoch: 6,
                whole_before,
                from: 0,
                epoch_at_from: 4,
                partitions: 1,
            },
            claim: 99,
            is_unbroken: false,
            tail: tail.clone(),
        };
        let recorded = |whole_before| ["a", "b", "c", "d"].map(|host| takeover(whole_before).recorded(host));
        assert_eq!(recorded(0), [Some(10), Some(20), Some(15), None]);
        assert_eq!(recorded(16), [Some(15), Some(20), Some(15), Some(15)]);
        assert_eq!(takeover(0).last_tick(), 20);
    }

    #[test]
    fn a_run_of_once_says_nothing_about_the_ticks_before_it() {
        let on_grid = phase_micros("a", 60_000_000);
        let mut tail = Tail::new("eu", 0);
        let mut latest = |epoch: &str, tick: i64| {
            let scheduled_at = Timestamp::from_unix_micros(tick).unwrap();
            let value = format!(
                r#"{{"address":"a","is_valid":true,"scheduled_at":"{scheduled_at}","interval_seconds":60,"agent":"eu","epoch":{epoch}}}"#
            );
            tail.read_value(value.as_bytes());
            tail.latest.get("a").copied()
        };
        assert_eq!(latest("null", 70_000_000), None);
        // A producer without the group.
        assert_eq!(latest("null", on_grid), Some(on_grid));
        assert_eq!(latest("null", on_grid + 70_000_000), Some(on_grid));
        // The first tick of a host may be between two of the grid.
        assert_eq!(latest("1", on_grid + 90_000_000), Some(on_grid + 90_000_000));
    }

    #[test]
    fn values_are_read_as_the_consumer_reads_them() {
        let mut tail = Tail::new("eu", 0);
        for value in [
            r#"{"v":1,"claim":"eu","epoch":7}"#,
            r#"{"address":"a","is_valid":true,"scheduled_at":"1970-01-01T00:00:01Z","agent":"eu","epoch":7}"#,
            r#"{"address":"a","is_valid":true,"scheduled_at":"1970-01-01T00:00:02Z","agent":"eu","epoch":6}"#,
            r#"{"address":"a","is_valid":true,"scheduled_at":"1970-01-01T00:00:03Z"}"#,
            "no JSON",
        ] {
            tail.read_value(value.as_bytes());
        }
        assert_eq!((tail.epoch(), tail.last_tick), (7, 1_000_000));
    }
}
