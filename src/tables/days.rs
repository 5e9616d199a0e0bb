//! The partitions of the main table, one per day: creates them ahead, moves rows into them, drops old ones (DB_RETENTION).
//!
//! `consume` runs this every hour, `init` once. It never makes a writer wait for long; what fails is logged and tried again
//! the next time.

use std::ops::Range;
use std::time::Duration;

use crate::clock::wall_micros;
use crate::postgres::{Fault, Session};
use crate::tables::ddl::{begin, bounded_in_transaction, delete_where, execute, log_failure};
use crate::tables::destination::ExistingObjects;
use crate::tables::schema::{DAYS_AHEAD, Day};

/// At most this many rows of one day are moved out of the default partition. It takes about a second, during which rows for the
/// default partition wait. More rows than that stay there, and the log says so.
const MOVE_ROWS: i64 = 100_000;

/// Partitions dropped per run, because the writer waits meanwhile.
const DROP_PARTITIONS: usize = 50;

/// The present day in UTC.
pub fn today() -> Day {
    const DAY_MICROS: i64 = 86_400_000_000;
    Day::from_unix(wall_micros() / DAY_MICROS)
}

/// The retention in whole days, rounded up.
pub fn retention_days(retention: Duration) -> i64 {
    const DAY_SECONDS: u64 = 86_400;
    i64::try_from(retention.as_secs().div_ceil(DAY_SECONDS)).unwrap_or(i64::MAX)
}

/// The first day whose rows are kept.
pub fn kept_since(retention: Duration) -> Day {
    today().plus(-retention_days(retention))
}

/// Creates the partitions of the days ahead and drops those older than `retention_days`.
///
/// What fails is logged; rows of a day without a partition go to the default partition.
///
/// # Errors
/// Passing only: the connection is of no further use.
pub async fn keep_days(
    session: &Session,
    found: &ExistingObjects,
    today: Day,
    retention_days: Option<i64>,
) -> Result<(), Fault> {
    let Some(main) = found.partitioned_main() else {
        if retention_days.is_some() {
            log::warn!(
                "DB_RETENTION has no effect, because host-metrics did not create table {}",
                found.table.quoted("")
            );
        }
        return Ok(());
    };
    let partitions = match partitions(session, main).await {
        Ok(partitions) => partitions,
        Err(fault) => return log_failure(session, Err(fault), "no partition created or dropped").await,
    };
    let missing: Vec<Day> = Day::ahead(today, false)
        .filter(|&day| !partitions.days.iter().any(|p| p.from <= day && day < p.to))
        .collect();
    let too_old: Vec<&DayPartition> = match retention_days {
        // A partition goes when all of it is too old.
        Some(days) => partitions
            .days
            .iter()
            .filter(|p| p.to <= today.plus(-days))
            .collect(),
        None => Vec::new(),
    };
    if !partitions.may_change {
        warn_without_rights(found, today, &missing, too_old.len());
        return Ok(());
    }
    for day in missing {
        let made = create_day(session, found, partitions.default.as_deref(), day).await;
        log_failure(
            session,
            made,
            &format!("partition {} not created", found.table.quoted(&day.suffix())),
        )
        .await?;
    }
    if let (Some(days), Some(default)) = (retention_days, &partitions.default) {
        let deleted = delete_before(session, default, today.plus(-days)).await;
        log_failure(session, deleted, &format!("old rows of {default} not deleted")).await?;
    }
    for partition in too_old.into_iter().take(DROP_PARTITIONS) {
        let sql = format!("{}; DROP TABLE {}; COMMIT", begin(), partition.name);
        let dropped = execute(session, &sql).await;
        if dropped.is_ok() {
            log::info!("dropped partition {} (DB_RETENTION)", partition.name);
        }
        log_failure(
            session,
            dropped,
            &format!("partition {} not dropped", partition.name),
        )
        .await?;
    }
    Ok(())
}

/// The log's warnings where this user may neither create nor drop partitions.
fn warn_without_rights(found: &ExistingObjects, today: Day, missing: &[Day], too_old: usize) {
    let table = found.table.quoted("");
    if missing.first().is_some_and(|&day| day <= today.plus(1)) {
        log::warn!(
            "{table} has no partition for today or tomorrow, and this user may not create one: rows go to the default \
             partition; run `host-metrics init` at least every {DAYS_AHEAD} days, or make this user the owner of the table"
        );
    }
    if too_old > 0 {
        log::warn!(
            "DB_RETENTION: {too_old} partitions of {table} are too old, but this user may not drop them"
        );
    }
}

struct Partitions {
    /// In chronological order.
    days: Vec<DayPartition>,
    /// The default partition's name, quoted.
    default: Option<String>,
    /// Whether this user owns the table and may create partitions.
    may_change: bool,
}

/// The partition of a day; a user's own may hold several days.
struct DayPartition {
    /// Quoted.
    name: String,
    /// The first whole day in it, and the day after the last one.
    from: Day,
    to: Day,
}

async fn partitions(session: &Session, oid: u32) -> Result<Partitions, Fault> {
    // The bounds are text in the catalogue, written by pg_get_expr in the session's time zone and read by the cast in
    // the same one. An unbounded side (MINVALUE, MAXVALUE) has no quotes, does not match, and is left exclusively.
    const DAYS: &str = "WITH bounds AS ( \
            SELECT c.oid, pg_catalog.regexp_match(pg_catalog.pg_get_expr(c.relpartbound, c.oid), \
                   '^FOR VALUES FROM [(]''([^'']+)''[)] TO [(]''([^'']+)''[)]$') AS b \
            FROM pg_catalog.pg_inherits i JOIN pg_catalog.pg_class c ON c.oid = i.inhrelid WHERE i.inhparent = $1) \
        SELECT pg_catalog.format('%I.%I', n.nspname, c.relname), \
               ceil(extract(epoch FROM b[1]::timestamptz) / 86400)::bigint, \
               floor(extract(epoch FROM b[2]::timestamptz) / 86400)::bigint \
        FROM bounds JOIN pg_catalog.pg_class c USING (oid) \
        JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
        WHERE b IS NOT NULL AND isfinite(b[1]::timestamptz) AND isfinite(b[2]::timestamptz) ORDER BY 2";
    const RIGHTS: &str = "SELECT pg_catalog.pg_has_role(c.relowner, 'USAGE') \
               AND pg_catalog.has_schema_privilege(c.relnamespace, 'CREATE'), \
               (SELECT pg_catalog.format('%I.%I', n.nspname, d.relname) \
                FROM pg_catalog.pg_partitioned_table p JOIN pg_catalog.pg_class d ON d.oid = p.partdefid \
                JOIN pg_catalog.pg_namespace n ON n.oid = d.relnamespace WHERE p.partrelid = c.oid) \
        FROM pg_catalog.pg_class c WHERE c.oid = $1";
    // The bounds cannot be read while another session has an exclusive lock on a partition, e.g. for VACUUM FULL.
    bounded_in_transaction(session, "reading the partitions", async {
        let mut days = Vec::new();
        for row in session.client.query(DAYS, &[&oid]).await? {
            days.push(DayPartition {
                name: row.try_get(0)?,
                from: Day::from_unix(row.try_get(1)?),
                to: Day::from_unix(row.try_get(2)?),
            });
        }
        let row = session.client.query_one(RIGHTS, &[&oid]).await?;
        Ok::<_, tokio_postgres::Error>(Partitions {
            days,
            may_change: row.try_get(0)?,
            default: row.try_get(1)?,
        })
    })
    .await
}

/// Creates the partition of a day, and moves the rows of that day out of the default partition.
///
/// `CREATE TABLE … PARTITION OF` would block the writers of the parent; `ATTACH PARTITION` locks only the default partition.
async fn create_day(
    session: &Session,
    found: &ExistingObjects,
    default: Option<&str>,
    day: Day,
) -> Result<(), Fault> {
    let (main, partition) = (found.table.quoted(""), found.table.quoted(&day.suffix()));
    let Range { start, end } = day.bounds();
    let of_the_day = format!("scheduled_at >= {start} AND scheduled_at < {end}");
    let mut rows = 0;
    let (mut lock_default, mut move_rows) = (String::new(), String::new());
    if let Some(default) = default {
        let limit = MOVE_ROWS + 1;
        let sql =
            format!("SELECT count(*) FROM (SELECT FROM {default} WHERE {of_the_day} LIMIT {limit}) rows");
        // A default partition that takes longer to search is left alone.
        rows = bounded_in_transaction(session, "reading the default partition", async {
            session.client.query_one(&sql, &[]).await?.try_get::<_, i64>(0)
        })
        .await?;
        if rows > MOVE_ROWS {
            return Err(Fault::operator(format!(
                "{default} holds more than {MOVE_ROWS} rows of that day, too many to move while others write; they \
                 stay there"
            )));
        }
        lock_default = format!("LOCK TABLE ONLY {default} IN ACCESS EXCLUSIVE MODE;");
        move_rows = format!(
            "WITH moved AS (DELETE FROM {default} WHERE {of_the_day} RETURNING *) \
             INSERT INTO {partition} SELECT * FROM moved;"
        );
    }
    // The parent first, as ATTACH does, so that two processes cannot deadlock; the default partition before its rows are
    // moved, so that no row is added in between.
    let sql = format!(
        "{}; LOCK TABLE ONLY {main} IN SHARE UPDATE EXCLUSIVE MODE; {lock_default} \
         CREATE TABLE {partition} (LIKE {main} \
             INCLUDING DEFAULTS INCLUDING GENERATED INCLUDING STORAGE INCLUDING CONSTRAINTS); {move_rows} \
         ALTER TABLE {main} ATTACH PARTITION {partition} FOR VALUES FROM ({start}) TO ({end}); COMMIT",
        begin()
    );
    execute(session, &sql).await?;
    log::info!("created partition {partition} moved_rows={rows}");
    Ok(())
}

/// Deletes rows older than `day` from the default partition.
async fn delete_before(session: &Session, default: &str, day: Day) -> Result<(), Fault> {
    let rows = delete_where(session, default, &format!("scheduled_at < {}", day.begin())).await?;
    if rows > 0 {
        log::info!("deleted {rows} rows from {default} (DB_RETENTION)");
    }
    Ok(())
}
