//! Reading the ends of partitions, up to our claims.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use super::thread::{READ_STEP, Reading, Thread};
use crate::clock::instant_now;
use crate::kafka::member::explained;
use crate::kafka::reader::{Part, Reader};
use crate::produce::share::events::{Event, Range};
use crate::produce::share::tail::Tail;

/// Reading up to a claim is given up if no record arrives for this time, and tried again.
const READ_WITHIN: Duration = Duration::from_secs(30);

impl Thread {
    /// Reads for a while. Returns false if there is nothing to read.
    pub(super) fn read(&mut self) -> bool {
        if self.reading.is_none() {
            self.begin_to_read();
        }
        let Some(reading) = &mut self.reading else {
            return false;
        };
        let (tails, until) = (&mut reading.tails, &mut reading.until);
        let read = reading
            .reader
            .go_on(instant_now() + READ_STEP, |partition, value| {
                *until = instant_now() + READ_WITHIN;
                if let Some((_, tail)) = tails.get_mut(&partition) {
                    tail.read_value(value);
                }
            });
        let is_over = match read {
            Ok(true) => true,
            Ok(false) if instant_now() <= reading.until => return true,
            Ok(false) => {
                let seconds = READ_WITHIN.as_secs();
                self.failure = Some(format!(
                    "Kafka sent no more records of the partition for {seconds} s"
                ));
                false
            }
            Err(error) => {
                self.failure = Some(explained(&error));
                false
            }
        };
        if let Some(reading) = self.reading.take() {
            self.end_reading(reading.tails, is_over);
        }
        true
    }

    /// Begins to read all ranges of one topic.
    fn begin_to_read(&mut self) {
        let Some(topic) = self.to_read.first().map(|range| Arc::clone(&range.share.topic)) else {
            return;
        };
        let mut tails = HashMap::new();
        for range in self.to_read.extract_if(.., |range| range.share.topic == topic) {
            let tail = Tail::new(&self.place, range.epoch_at_from);
            tails.insert(range.share.partition, (range, tail));
        }
        let parts: Vec<Part> = tails
            .values()
            .map(|(range, _)| Part {
                partition: range.share.partition,
                from: range.from,
                to: Some(range.to),
                // With an epoch, it is our acknowledged claim.
                to_is_stored: range.epoch > 0,
            })
            .collect();
        let reader = Reader::new(&self.kafka).and_then(|mut reader| {
            reader.begin(&topic, &parts)?;
            Ok(reader)
        });
        match reader {
            Ok(reader) => {
                self.reading = Some(Reading {
                    reader,
                    tails,
                    until: instant_now() + READ_WITHIN,
                });
            }
            Err(error) => {
                log::error!("cannot read {topic}: {error}");
                self.end_reading(tails, false);
            }
        }
    }

    fn end_reading(&mut self, tails: HashMap<i32, (Range, Tail)>, is_over: bool) {
        for (range, tail) in tails.into_values() {
            self.handle(Event::TailRead {
                share: range.share,
                epoch: range.epoch,
                tail: is_over.then_some(tail),
            });
        }
    }
}
