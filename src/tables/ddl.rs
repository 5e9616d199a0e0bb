//! Running statements that change tables: bounded, one maker at a time, and a failure of upkeep said and left for later.

use std::time::Duration;

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use crate::postgres::{Bounds, Fault, Kind, bounded};
use crate::tables::names::TableName;
use crate::tables::schema;

/// A waiting DDL statement makes every writer behind it wait: this long at most, then it is given up until the next time.
pub(super) const DDL_LOCK: Duration = Duration::from_millis(200);

/// One maker or remover of the objects of `table` at a time.
pub(super) fn lock(table: &TableName) -> String {
    let key = schema::lock_key(table);
    format!("SELECT pg_catalog.pg_advisory_xact_lock({key})")
}

/// Runs `work` in a transaction, as the only maker of the objects of `table`; nothing of it stays if it fails.
pub(super) async fn alone<T>(
    client: &Client,
    bounds: &Bounds,
    table: &TableName,
    work: impl AsyncFnOnce() -> Result<T, Fault>,
) -> Result<T, Fault> {
    let result = async {
        execute(client, bounds, "BEGIN").await?;
        execute(client, bounds, &lock(table)).await?;
        let done = work().await?;
        execute(client, bounds, "COMMIT").await?;
        Ok(done)
    }
    .await;
    if result.is_err() {
        rollback(client, bounds).await?;
    }
    result
}

pub(super) async fn execute(client: &Client, bounds: &Bounds, sql: &str) -> Result<(), Fault> {
    bounded("changing the tables", bounds.step, client.batch_execute(sql)).await
}

pub(super) async fn rollback(client: &Client, bounds: &Bounds) -> Result<(), Fault> {
    bounded("rolling back", bounds.step, client.batch_execute("ROLLBACK")).await
}

/// After a piece of upkeep: its failure is said, the connection is made usable again.
pub(super) async fn say(
    client: &Client,
    bounds: &Bounds,
    result: Result<(), Fault>,
    what: &str,
) -> Result<(), Fault> {
    let Err(fault) = result else { return Ok(()) };
    // Without an SQLSTATE a passing fault is a hang or a broken connection: no answer can be told from another now.
    if fault.kind == Kind::Passing && fault.code.is_none() {
        return Err(fault);
    }
    rollback(client, bounds).await?;
    match fault.code {
        // Another consumer made or dropped it at the same moment.
        Some(SqlState::DUPLICATE_TABLE | SqlState::UNDEFINED_TABLE) => log::debug!("{what}: {fault}"),
        _ => log::warn!("{what}, to be tried again: {fault}"),
    }
    Ok(())
}
