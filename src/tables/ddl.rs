//! Runs DDL and deletes old rows: with bounds, one process at a time, and with failures of maintenance logged instead of returned.

use std::time::Duration;

use tokio_postgres::error::SqlState;

use crate::postgres::{Fault, Kind, Session};
use crate::tables::names::TableName;
use crate::tables::schema;

/// While DDL waits for a lock, all writers queue behind it; after this long it is given up until the next run.
const DDL_LOCK: Duration = Duration::from_millis(200);

/// Old rows deleted by one statement, which has to end in time also on a slow disk or with a user's trigger, and statements of one
/// [`delete_where`], because the writer waits meanwhile.
const DELETE_ROWS: u64 = 10_000;
const DELETE_TIMES: u64 = 20;

/// The most rows that [`delete_where`] deletes. If it did, there may be more.
pub const DELETE_MOST: u64 = DELETE_ROWS * DELETE_TIMES;

/// For a statement that may read a whole table. Less than the session's bound of a step, so that the server ends the statement
/// before this side gives up the connection.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(10);

/// Begins a transaction of maintenance.
pub fn begin() -> String {
    format!(
        "BEGIN; SET LOCAL lock_timeout = '{}ms'; SET LOCAL statement_timeout = '{}ms'",
        DDL_LOCK.as_millis(),
        STATEMENT_TIMEOUT.as_millis()
    )
}

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

/// Runs a query in a transaction of maintenance. `what` is for messages.
pub(super) async fn bounded_in_transaction<T, E>(
    session: &Session,
    what: &str,
    query: impl Future<Output = Result<T, E>>,
) -> Result<T, Fault>
where
    Fault: From<E>,
{
    execute(session, &begin()).await?;
    let done = session.bounded(what, query).await?;
    execute(session, "COMMIT").await?;
    Ok(done)
}

/// Deletes rows of `table` (its name quoted) in short transactions. Skips locked rows, because another consumer may be deleting
/// them. Returns how many were deleted.
pub async fn delete_where(session: &Session, table: &str, condition: &str) -> Result<u64, Fault> {
    let sql = format!(
        "DELETE FROM {table} WHERE ctid = ANY (ARRAY( \
         SELECT ctid FROM {table} WHERE {condition} LIMIT {DELETE_ROWS} FOR UPDATE SKIP LOCKED))"
    );
    let mut deleted = 0;
    for _ in 0..DELETE_TIMES {
        let delete = session.client.execute(&sql, &[]);
        let rows = bounded_in_transaction(session, "deleting old rows", delete).await?;
        deleted += rows;
        if rows < DELETE_ROWS {
            break;
        }
    }
    Ok(deleted)
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
