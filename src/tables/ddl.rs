//! Runs DDL: with bounds, one process at a time, and with failures of maintenance logged instead of returned.

use std::time::Duration;

use tokio_postgres::error::SqlState;

use crate::postgres::{Fault, Kind, Session};
use crate::tables::names::TableName;
use crate::tables::schema;

/// While DDL waits for a lock, all writers queue behind it; after this long it is given up until the next run.
pub(super) const DDL_LOCK: Duration = Duration::from_millis(200);

/// Takes the lock under which the objects of `table` are created or dropped.
pub(super) fn lock(table: &TableName) -> String {
    let key = schema::lock_key(table);
    format!("SELECT pg_catalog.pg_advisory_xact_lock({key})")
}

/// Runs `work` in a transaction under that lock, and rolls back if it fails.
pub(super) async fn exclusively<T>(
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

/// Logs a failure of maintenance and makes the connection usable again. `what`: what was not done.
pub async fn log_failure(session: &Session, result: Result<(), Fault>, what: &str) -> Result<(), Fault> {
    let Err(fault) = result else { return Ok(()) };
    // A passing fault without an SQLSTATE is a hang or a broken connection: later answers may belong to earlier questions.
    if fault.kind == Kind::Passing && fault.code.is_none() {
        return Err(fault);
    }
    rollback(session).await?;
    match fault.code {
        // Another consumer created or dropped it at the same moment.
        Some(SqlState::DUPLICATE_TABLE | SqlState::UNDEFINED_TABLE) => log::debug!("{what}: {fault}"),
        _ => log::warn!("{what}; will try again: {fault}"),
    }
    Ok(())
}
