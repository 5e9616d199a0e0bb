//! Running statements that change tables: bounded, one maker at a time, and a failure of upkeep said and left for later.

use std::time::Duration;

use tokio_postgres::error::SqlState;

use crate::postgres::{Fault, Kind, Session};
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
    session: &Session,
    table: &TableName,
    work: impl AsyncFnOnce() -> Result<T, Fault>,
) -> Result<T, Fault> {
    let result = async {
        execute(session, "BEGIN").await?;
        execute(session, &lock(table)).await?;
        let done = work().await?;
        execute(session, "COMMIT").await?;
        Ok(done)
    }
    .await;
    if result.is_err() {
        rollback(session).await?;
    }
    result
}

pub(super) async fn execute(session: &Session, sql: &str) -> Result<(), Fault> {
    session
        .bounded("changing the tables", session.client.batch_execute(sql))
        .await
}

pub(super) async fn rollback(session: &Session) -> Result<(), Fault> {
    session
        .bounded("rolling back", session.client.batch_execute("ROLLBACK"))
        .await
}

/// After a piece of upkeep: its failure is said, the connection is made usable again.
pub(super) async fn say(session: &Session, result: Result<(), Fault>, what: &str) -> Result<(), Fault> {
    let Err(fault) = result else { return Ok(()) };
    // Without an SQLSTATE a passing fault is a hang or a broken connection: no answer can be told from another now.
    if fault.kind == Kind::Passing && fault.code.is_none() {
        return Err(fault);
    }
    rollback(session).await?;
    match fault.code {
        // Another consumer made or dropped it at the same moment.
        Some(SqlState::DUPLICATE_TABLE | SqlState::UNDEFINED_TABLE) => log::debug!("{what}: {fault}"),
        _ => log::warn!("{what}, to be tried again: {fault}"),
    }
    Ok(())
}
