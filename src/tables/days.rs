//! The days of the table: partitions made ahead, rows moved into them, and old ones removed (DB_RETENTION).
//!
//! Owns the upkeep that `consume` does by the hour and `init` once. It makes no writer wait for long, and what fails is said
//! and tried again the next time.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::postgres::{Fault, Session};
use crate::tables::ddl::{DDL_LOCK, execute, say};
use crate::tables::destination::Found;
use crate::tables::schema::{self, DAYS_AHEAD, Day};

/// Rows of one day that are moved out of the default partition at once, in about a second during which rows for the
/// default partition wait. More are left there, and said.
const MOVE_ROWS: i64 = 100_000;

/// Partitions dropped in one go: the writer waits meanwhile. The rest goes the next time.
const DROP_PARTITIONS: usize = 50;

/// Rows that are too old and removed from the default partition in one statement, and how many such statements in one
/// go. The rest goes the next time.
const DELETE_ROWS: i64 = 10_000;
const DELETE_TIMES: usize = 20;

/// A statement that reads all of a partition gets this long, less than the session's bound of a step: what takes longer ends
/// with the server's word, and not with a connection that is given up.
const READ_PARTITION: Duration = Duration::from_secs(10);

/// The day in UTC.
#[expect(
    clippy::disallowed_methods,
    reason = "the edge: partitions are made for the days ahead of now"
)]
pub fn today() -> Day {
    const DAY_SECONDS: u64 = 86_400;
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Day::from_unix(i64::try_from(since_epoch.as_secs() / DAY_SECONDS).unwrap_or_default())
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

/// Makes the days ahead and drops what is older than `retention_days`, without making writers wait.
///
/// What does not work out is said and left for the next time: rows of a day without a partition go to the default one.
///
/// # Errors
/// Passing only: the connection is of no further use.
pub async fn keep_days(
    session: &Session,
    found: &Found,
    today: Day,
    retention_days: Option<i64>,
) -> Result<(), Fault> {
    let Some(main) = found.partitioned_main() else {
        if retention_days.is_some() {
            log::warn!(
                "DB_RETENTION has no effect: table {} was not made by host-metrics",
                found.table.quoted("")
            );
        }
        return Ok(());
    };
    let partitions = partitions(session, main).await?;
    let missing: Vec<Day> = Day::ahead(today, false)
        .filter(|&day| !partitions.days.iter().any(|p| p.from <= day && day < p.to))
        .collect();
    let too_old: Vec<&Partition> = match retention_days {
        // A day that is only partly too old stays.
        Some(days) => partitions
            .days
            .iter()
            .filter(|p| p.to <= today.plus(-days))
            .collect(),
        None => Vec::new(),
    };
    if !partitions.may_change {
        if missing.first().is_some_and(|&day| day <= today.plus(1)) {
            log::warn!(
                "no partition of {} for today or tomorrow, and this user may not make one: rows go to the default \
                 partition; run `host-metrics init` at least every {DAYS_AHEAD} days, or let this user own the table",
                found.table.quoted("")
            );
        }
        if !too_old.is_empty() {
            log::warn!(
                "DB_RETENTION: {} partitions of {} are too old, but this user may not drop them",
                too_old.len(),
                found.table.quoted("")
            );
        }
        return Ok(());
    }
    for day in missing {
        let made = make_day(session, found, partitions.default.as_deref(), day).await;
        say(
            session,
            made,
            &format!("partition {} not made", found.table.quoted(&day.suffix())),
        )
        .await?;
    }
    if let (Some(days), Some(default)) = (retention_days, &partitions.default) {
        let deleted = delete_before(session, default, today.plus(-days)).await;
        say(session, deleted, &format!("old rows of {default} not removed")).await?;
    }
    for partition in too_old.into_iter().take(DROP_PARTITIONS) {
        let sql = format!(
            "BEGIN; SET LOCAL lock_timeout = '{}ms'; DROP TABLE {}; COMMIT",
            DDL_LOCK.as_millis(),
            partition.name
        );
        let dropped = execute(session, &sql).await;
        if dropped.is_ok() {
            log::info!("dropped partition {} (DB_RETENTION)", partition.name);
        }
        say(
            session,
            dropped,
            &format!("partition {} not dropped", partition.name),
        )
        .await?;
    }
    Ok(())
}

struct Partitions {
    /// In the order of time.
    days: Vec<Partition>,
    /// The default partition's name, quoted.
    default: Option<String>,
    /// Whether this user owns the table and may make new ones beside it.
    may_change: bool,
}

struct Partition {
    /// Quoted.
    name: String,
    /// Whole days: from the first moment of the one, rounded up, to that of the other, rounded down.
    from: Day,
    to: Day,
}

async fn partitions(session: &Session, oid: u32) -> Result<Partitions, Fault> {
    // The bounds are text in the catalogue, written by pg_get_expr in the session's time zone and read by the cast in
    // the same one. An unbounded side (MINVALUE, MAXVALUE) has no quotes, does not match, and is left alone.
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
    session
        .bounded("reading the partitions", async {
            let mut days = Vec::new();
            for row in session.client.query(DAYS, &[&oid]).await? {
                days.push(Partition {
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

/// Makes one day's partition; what the default partition holds of that day moves.
async fn make_day(session: &Session, found: &Found, default: Option<&str>, day: Day) -> Result<(), Fault> {
    let mut rows = 0;
    if let Some(default) = default {
        let sql = schema::count_day(default, day, MOVE_ROWS + 1);
        rows = session
            .bounded("reading the default partition", async {
                session.client.query_one(&sql, &[]).await?.try_get::<_, i64>(0)
            })
            .await?;
        if rows > MOVE_ROWS {
            return Err(Fault::operator(format!(
                "{default} holds more than {MOVE_ROWS} rows of that day, too many to move while others write; they \
                 stay there"
            )));
        }
    }
    // The parent first, as ATTACH does, so that two of us do not wait for each other; the default partition before its
    // rows are moved, so that none comes in between.
    let mut sql = format!("BEGIN; SET LOCAL lock_timeout = '{}ms';", DDL_LOCK.as_millis());
    sql.push_str(&format!(
        "LOCK TABLE ONLY {} IN SHARE UPDATE EXCLUSIVE MODE;",
        found.table.quoted("")
    ));
    if let Some(default) = default {
        sql.push_str(&format!("LOCK TABLE ONLY {default} IN ACCESS EXCLUSIVE MODE;"));
    }
    sql.push_str(&schema::create_day(&found.table, day));
    if let Some(default) = default {
        sql.push_str(&schema::move_day(&found.table, default, day));
    }
    sql.push_str(&schema::attach_day(&found.table, day));
    sql.push_str("COMMIT");
    execute(session, &sql).await?;
    log::info!(
        "made partition {} moved_rows={rows}",
        found.table.quoted(&day.suffix())
    );
    Ok(())
}

/// Removes what is older than `day` from the default partition, where no whole day can be dropped, in short transactions
/// that lock nothing but those rows.
async fn delete_before(session: &Session, default: &str, day: Day) -> Result<(), Fault> {
    let sql = schema::delete_before(default, day, DELETE_ROWS);
    let mut removed = 0;
    let begin = format!(
        "BEGIN; SET LOCAL statement_timeout = '{}ms'",
        READ_PARTITION.as_millis()
    );
    for _ in 0..DELETE_TIMES {
        execute(session, &begin).await?;
        let rows = session
            .bounded("removing old rows", session.client.execute(&sql, &[]))
            .await?;
        execute(session, "COMMIT").await?;
        removed += rows;
        if rows < DELETE_ROWS as u64 {
            break;
        }
    }
    if removed > 0 {
        log::info!("removed {removed} rows from {default} (DB_RETENTION)");
    }
    Ok(())
}
