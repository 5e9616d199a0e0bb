//! What a pipeline writes, as the store sees it: `rows` and `state` are the two.

use crate::consume::batch::{Batch, Record};
use crate::consume::positions::{Keys, Positions};
use crate::postgres::{Bounds, Fault, Link};
use crate::sample::Timestamp;

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
    type Session: Send;

    /// Appends what the batch holds of the record, or says why there can be nothing.
    fn encode(
        layout: &Self::Layout,
        topic: &str,
        record: &Record<'_>,
        into: &mut Vec<u8>,
    ) -> Result<(), String>;

    /// Makes the tables that are missing where the user may, and prepares the statements.
    async fn prepare(&mut self, link: &Link, bounds: &Bounds)
    -> Result<(Self::Layout, Self::Session), Fault>;

    /// Writes the batch and moves the positions in one transaction, or does nothing.
    async fn flush(
        &mut self,
        link: &Link,
        keys: &Keys,
        positions: &Positions,
        session: &Self::Session,
        batch: &Batch,
    ) -> Result<Written, Fault>;

    /// Upkeep, once an hour.
    async fn maintain(
        &mut self,
        link: &Link,
        bounds: &Bounds,
        session: &Self::Session,
        now: Timestamp,
    ) -> Result<(), Fault>;
}

/// How a transaction ended that did not fail.
pub enum Written {
    Durable,
    Fenced,
    Poison(Vec<(usize, String)>),
}
