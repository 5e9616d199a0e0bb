//! The publisher's part of PRODUCE_GROUP: claims, and how far each share is recorded.

use std::collections::HashMap;

use rdkafka::producer::BaseRecord;

use super::client::Sent;
use super::worker::{Route, Worker};
use crate::produce::outbox::LaneId;
use crate::produce::share::Share;
use crate::produce::share::events::Event;
use crate::sample::epoch::{Claim, Epoch};

impl Worker {
    pub(super) fn lane_of_share(&mut self, share: &Share) -> LaneId {
        if let Some(lane) = self.lane_of_share.get(share) {
            return *lane;
        }
        let topic = self.topic_index(&share.topic);
        let lane = self.outbox.add_lane();
        self.routes.push(Route {
            lane,
            topic,
            share: Some(share.clone()),
        });
        self.lane_of_share.insert(share.clone(), lane);
        lane
    }

    pub(super) fn tell_shares(&self, event: Event) {
        if let Some(membership) = &self.membership {
            // The receiver is gone at the end of a stop.
            let _ = membership.events.send(event);
        }
    }

    pub(super) fn mark(&mut self, now: i64, open_since: &HashMap<Share, i64>) {
        for route in &self.routes {
            if let Some(share) = &route.share
                && let open_since = open_since.get(share).copied().unwrap_or(i64::MAX)
                && let Some(ledger) = self.outbox.ledger(route.lane, open_since, now)
            {
                let share = share.clone();
                self.tell_shares(Event::Progress { share, ledger });
            }
        }
    }

    pub(super) fn release_shares(&mut self) {
        for route in &self.routes {
            if let Some(share) = &route.share
                && let Some(ledger) = self.outbox.last_ledger(route.lane)
            {
                let share = share.clone();
                self.tell_shares(Event::Released { share, ledger });
            }
        }
    }

    pub(super) fn claim(&mut self, share: Share, epoch: Epoch) {
        if let Err(why) = self.send_claim(&share, epoch) {
            self.tell_shares(Event::Claimed {
                share,
                epoch,
                offset: Err(why),
            });
        }
    }

    fn send_claim(&mut self, share: &Share, epoch: Epoch) -> Result<(), String> {
        let Some(membership) = &self.membership else {
            return Err("there is no group".to_owned());
        };
        // Topics with compaction take no record without a key, and each claim has to stay.
        let key = format!("{} {epoch}", membership.group);
        let value = Claim::new(&membership.group, &membership.place, epoch).encode();
        let lane = self.lane_of_share(share);
        let topic = self.routes[lane.index()].topic;
        if let Some(why) = &self.spoiled {
            return Err(why.clone());
        }
        if !self.topics[topic].exists {
            let why_not = self.topics[topic].why_not.clone();
            return Err(
                why_not.unwrap_or_else(|| "Kafka has not said yet whether the topic exists".to_owned())
            );
        }
        let sent = Box::new(Sent::Claim {
            share: share.clone(),
            epoch,
        });
        let message = BaseRecord::with_opaque_to(&share.topic, sent)
            .partition(share.partition)
            .key(key.as_str())
            .payload(value.as_slice());
        self.producer
            .send(message)
            .map_err(|(error, _)| error.to_string())?;
        self.outbox.claim(lane, epoch);
        self.claims_in_flight += 1;
        self.note_sent(topic);
        Ok(())
    }

    /// The records of these shares that came back may be stored. Only a new claim shows which ones are.
    pub(super) fn doubt(&mut self, which: impl Fn(&Route) -> bool) {
        let mut shares = Vec::new();
        for route in self.routes.iter().filter(|route| which(route)) {
            if let Some(share) = &route.share {
                self.outbox.doubt(route.lane);
                shares.push(share.clone());
            }
        }
        if !shares.is_empty() {
            self.tell_shares(Event::InDoubt(shares));
        }
    }
}
