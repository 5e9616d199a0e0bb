//! What a pipeline writes. There are two sinks: `rows` and `state`.

use std::borrow::Cow;
use std::time::{Duration, Instant};

use crate::consume::batch::{Batch, Flushed, Record};
use crate::consume::positions::Positions;
use crate::postgres::{Fault, Session};
use crate::sample::epoch::{Claim, Epochs, VoidReason};
use crate::sample::{self, Sample, Timestamp};

/// Decodes a record and checks its epoch; `None` for a claim. All sinks use this, so they accept the same records.
///
/// # Errors
/// The bytes are not a valid record, or a record of a higher epoch came before.
pub fn admit<'a>(value: &'a [u8], epochs: &mut Epochs) -> Result<Option<Sample<'a>>, String> {
    let sample = match sample::decode(value) {
        Ok(sample) => sample,
        Err(rejection) => {
            let claim = Claim::decode(value).ok_or(rejection.0)?;
            // A superseded claim has no effect. A claim is rejected only if there are too many places.
            return match epochs.admit(claim.place(), claim.epoch) {
                Ok(()) | Err(VoidReason::Superseded { .. }) => Ok(None),
                Err(void) => Err(void.to_string()),
            };
        }
    };
    if let Some(epoch) = sample.epoch {
        let place = sample.agent.as_deref().unwrap_or_default();
        epochs.admit(place, epoch).map_err(|void| void.to_string())?;
    }
    Ok(Some(sample))
}

/// The beginning of the transaction that writes `batch`.
pub fn begin(sql: &'static str, batch: &Batch) -> Cow<'static, str> {
    match batch.may_be_lost {
        true => format!("{sql}; SET LOCAL synchronous_commit = off").into(),
        false => sql.into(),
    }
}

/// What a pipeline writes.
#[expect(
    async_fn_in_trait,
    reason = "only the writer's thread waits for these, on a runtime of its own"
)]
pub trait Sink: Send + 'static {
    /// Whether a batch keeps keys and values unchanged, in addition to what [`Sink::encode`] makes of them.
    const KEEPS_RECORDS: bool;

    /// What encoded records have to fit. If it changes, they are read and encoded again.
    type Layout: Clone + PartialEq + Send + std::fmt::Debug;
    /// What is prepared in a session, such as statements.
    type Prepared: Send;

    /// Appends what is written of the record, which is nothing for a claim.
    fn encode(
        layout: &Self::Layout,
        record: &Record<'_>,
        epochs: &mut Epochs,
        into: &mut Vec<u8>,
    ) -> Result<(), String>;

    /// Creates missing tables, if the user may, and prepares the statements.
    async fn prepare(&mut self, session: &Session) -> Result<(Self::Layout, Self::Prepared), Fault>;

    /// Writes the batch and moves the positions in one transaction, or does nothing.
    async fn flush(
        &mut self,
        session: &Session,
        positions: &Positions,
        prepared: &Self::Prepared,
        batch: &Batch,
    ) -> Result<Flushed, Fault>;

    /// When [`Sink::maintain`] is due at the latest.
    fn maintain_in(&self, _now: Instant) -> Duration {
        Duration::MAX
    }

    /// Maintenance, once an hour and after [`Sink::maintain_in`].
    async fn maintain(
        &mut self,
        session: &Session,
        prepared: &Self::Prepared,
        now: Timestamp,
    ) -> Result<(), Fault>;
}
