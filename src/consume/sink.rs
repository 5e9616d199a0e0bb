//! What a pipeline writes, as the store sees it: `rows` and `state` are the two.

use crate::consume::batch::{Batch, Read, Record};
use crate::consume::positions::{Keys, Positions};
use crate::postgres::{Fault, Session};
use crate::sample::epoch::{Claim, Epochs, Void};
use crate::sample::{self, Sample, Timestamp};

/// The record, or `None` for a claim. Every sink judges with this, so all of them find the same.
///
/// # Errors
/// It is not a record, or it was superseded.
pub fn judge<'a>(value: &'a [u8], epochs: &mut Epochs) -> Result<Option<Sample<'a>>, String> {
    let sample = match sample::decode(value) {
        Ok(sample) => sample,
        Err(rejection) => {
            let claim = Claim::decode(value).ok_or(rejection.0)?;
            // A claim that is void says nothing; one of too many places is rejected.
            return match epochs.judge(claim.place(), claim.epoch) {
                Ok(()) | Err(Void::Superseded { .. }) => Ok(None),
                Err(void) => Err(void.to_string()),
            };
        }
    };
    if let Some(epoch) = sample.epoch {
        let place = sample.agent.as_deref().unwrap_or_default();
        epochs.judge(place, epoch).map_err(|void| void.to_string())?;
    }
    Ok(Some(sample))
}

/// What a pipeline writes.
#[expect(
    async_fn_in_trait,
    reason = "only the writer's thread waits for these, on a runtime of its own"
)]
pub trait Sink: Send + 'static {
    /// Whether it says what happens; the second one of a process has nothing to add.
    const IS_FIRST: bool;

    /// Whether a batch keeps keys and values as they came, beside what [`Sink::encode`] makes of them.
    const KEEPS_RECORDS: bool;

    /// What encoded records have to fit. With another one than before they are encoded anew.
    type Layout: Clone + PartialEq + Send + std::fmt::Debug;
    /// What is prepared on a connection.
    type Prepared: Send;

    /// Appends what the batch holds of the record, or says why there can be nothing.
    fn encode(
        layout: &Self::Layout,
        topic: &str,
        record: &Record<'_>,
        epochs: &mut Epochs,
        into: &mut Vec<u8>,
    ) -> Result<Read, String>;

    /// Makes the tables that are missing where the user may, and prepares the statements.
    async fn prepare(&mut self, session: &Session) -> Result<(Self::Layout, Self::Prepared), Fault>;

    /// Writes the batch and moves the positions in one transaction, or does nothing.
    async fn flush(
        &mut self,
        session: &Session,
        keys: &Keys,
        positions: &Positions,
        prepared: &Self::Prepared,
        batch: &Batch,
    ) -> Result<Written, Fault>;

    /// Upkeep, once an hour.
    async fn maintain(
        &mut self,
        session: &Session,
        prepared: &Self::Prepared,
        now: Timestamp,
    ) -> Result<(), Fault>;
}

/// How a transaction ended that did not fail.
pub enum Written {
    Durable,
    Fenced,
    Poison(Vec<(usize, String)>),
}
