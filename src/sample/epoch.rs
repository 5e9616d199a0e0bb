//! Epochs and claims: which of several producers may write to a partition, and which records count.
//!
//! The producers of a group (PRODUCE_GROUP) write every record with the epoch of their latest claim. Two of them may write to the
//! same partition for a while, because a producer that was replaced may not know it yet. The order of the partition decides
//! between them: a record does not count if a higher epoch comes before it. Everyone who reads the whole partition comes to the
//! same result, so the consumer and the next producer agree. A group is one place, and its records have the place as their
//! `agent`: AGENT_NAME, or the group's name if that is not set.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use super::record::Epoch;

/// The most places in one partition. It is more than anybody has, and bounds the memory if records name ever new places.
pub const MAX_PLACES: usize = 256;

/// The highest epoch so far of each place in one partition.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epochs(BTreeMap<String, Epoch>);

/// Why a record does not count.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VoidReason {
    #[error("superseded by epoch {by} of {place}")]
    Superseded { by: Epoch, place: String },
    #[error("more than {MAX_PLACES} agents with an epoch write to this partition")]
    TooManyPlaces,
}

impl Epochs {
    /// The epochs of a partition of which only this one is known.
    pub fn of(place: &str, epoch: Epoch) -> Self {
        match epoch {
            0 => Self::default(),
            _ => Self(BTreeMap::from([(place.to_owned(), epoch)])),
        }
    }

    /// Takes note of the epoch of the partition's next record or claim.
    pub fn admit(&mut self, place: &str, epoch: Epoch) -> Result<(), VoidReason> {
        if let Some(highest) = self.0.get_mut(place) {
            if epoch < *highest {
                return Err(VoidReason::Superseded {
                    by: *highest,
                    place: place.to_owned(),
                });
            }
            *highest = epoch;
            return Ok(());
        }
        if self.0.len() >= MAX_PLACES {
            return Err(VoidReason::TooManyPlaces);
        }
        self.0.insert(place.to_owned(), epoch);
        Ok(())
    }

    /// The sum of all epochs. It grows whenever one of them does.
    pub fn sum(&self) -> Epoch {
        self.0
            .values()
            .fold(0, |sum: Epoch, epoch| sum.wrapping_add(*epoch))
    }

    /// The highest epoch of a place, or zero.
    pub fn highest(&self, place: &str) -> Epoch {
        self.0.get(place).copied().unwrap_or(0)
    }
}

/// Writes the epoch, which is known only when the record is sent, into a value that [`super::encode`] made. It is the last field.
pub fn write_into(value: &mut Vec<u8>, epoch: Epoch) {
    if let Some(colon) = value.iter().rposition(|byte| *byte == b':') {
        value.truncate(colon + 1);
        value.extend_from_slice(epoch.to_string().as_bytes());
        value.push(b'}');
    }
}

/// What a producer appends to a partition before it writes to it under a new epoch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Claim {
    v: u64,
    /// PRODUCE_GROUP.
    #[serde(rename = "claim")]
    group: String,
    pub epoch: Epoch,
    /// Only if it differs from the group's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    agent: Option<String>,
}

impl Claim {
    pub fn new(group: &str, place: &str, epoch: Epoch) -> Self {
        Self {
            v: super::VERSION,
            group: group.to_owned(),
            epoch,
            agent: (place != group).then(|| place.to_owned()),
        }
    }

    /// The `agent` of the records under this claim.
    pub fn place(&self) -> &str {
        self.agent.as_deref().unwrap_or(&self.group)
    }

    /// The value of its Kafka record.
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("strings and numbers are JSON")
    }

    /// `None`: the value is not a claim.
    pub fn decode(value: &[u8]) -> Option<Self> {
        let claim: Self = serde_json::from_slice(value).ok()?;
        let is_ours = claim.v == super::VERSION && claim.epoch > 0 && !claim.place().is_empty();
        is_ours.then_some(claim)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::{Sample, decode, encode};

    #[test]
    fn a_lower_epoch_of_the_same_place_is_void_and_an_equal_or_higher_one_counts() {
        let mut epochs = Epochs::default();
        for (place, epoch, counts) in [
            ("eu", 2, true),
            ("us", 1, true),
            ("eu", 1, false),
            ("eu", 2, true),
            ("eu", 5, true),
            ("eu", 4, false),
            ("us", 1, true),
        ] {
            assert_eq!(epochs.admit(place, epoch).is_ok(), counts, "{place} {epoch}");
        }
        assert_eq!(
            epochs.admit("eu", 3).unwrap_err().to_string(),
            "superseded by epoch 5 of eu"
        );
        assert_eq!((epochs.highest("eu"), epochs.highest("asia")), (5, 0));
    }

    #[test]
    fn epochs_are_stored_as_an_object_of_places() {
        let mut epochs = Epochs::of("eu", 5);
        epochs.admit("us", 1).unwrap();
        let stored = serde_json::to_string(&epochs).unwrap();
        assert_eq!(stored, r#"{"eu":5,"us":1}"#);
        assert_eq!(serde_json::from_str::<Epochs>(&stored).unwrap(), epochs);
    }

    #[test]
    fn any_number_of_new_places_takes_bounded_memory() {
        let mut epochs = Epochs::default();
        for place in 0..MAX_PLACES {
            assert_eq!(epochs.admit(&place.to_string(), 1), Ok(()));
        }
        assert_eq!(epochs.admit("one more", 1), Err(VoidReason::TooManyPlaces));
        assert_eq!(epochs.admit("7", 2), Ok(()));
    }

    #[test]
    fn a_record_gets_its_epoch_when_it_is_sent_and_another_one_when_it_is_sent_again() {
        let sample = Sample {
            address: "https://a.example/:7".into(),
            agent: Some("eu:1".into()),
            ..Sample::default()
        };
        let mut value = Vec::new();
        encode(&sample, &mut value);
        for epoch in [7, 1_764_335_293, 8] {
            write_into(&mut value, epoch);
            let expected = Sample {
                epoch: Some(epoch),
                ..sample.clone()
            };
            assert_eq!(decode(&value), Ok(expected));
        }
    }

    #[test]
    fn a_claim_is_written_as_specified_and_names_a_place_that_differs_from_its_group() {
        let claim = Claim::new("eu", "eu", 18);
        assert_eq!(claim.encode(), br#"{"v":1,"claim":"eu","epoch":18}"#);
        assert_eq!(Claim::decode(&claim.encode()).unwrap(), claim);
        let claim = Claim::new("eu", "Frankfurt", 18);
        assert_eq!(Claim::decode(&claim.encode()).unwrap().place(), "Frankfurt");
    }

    #[test]
    fn nothing_else_is_a_claim() {
        for value in [
            r#"{"v":2,"claim":"eu","epoch":18}"#,
            r#"{"v":1,"claim":"","epoch":18}"#,
            r#"{"v":1,"claim":"eu","epoch":0}"#,
            r#"{"v":1,"claim":"eu"}"#,
            r#"{"v":1,"claim":"eu","epoch":1,"address":"a","is_valid":true}"#,
            r#"{"address":"a","is_valid":true}"#,
            "",
            "claim",
        ] {
            assert_eq!(Claim::decode(value.as_bytes()), None, "{value}");
        }
    }
}
