//! Sums finished days up, so that the views need not count their rows: one pass over the days, and `consume`'s thread that
//! makes one every few minutes.
//!
//! Owns which days are due and the order of the steps, in which a sum stays right whoever writes meanwhile:
//!
//! 1. The day's writers are kept out for a moment, which waits for those that have written already. The day gets its trigger
//!    and the state `counting N`, with a number that is this pass's alone.
//! 2. It is counted; nobody waits. Whoever writes a row of it sets the state to `changed` in the same transaction.
//! 3. In the transaction of the sums the state becomes `counted`, if it is still what step 1 left; otherwise there was no
//!    counting, and a later pass begins anew.
//!
//! What is summed, and how the views read it, is `views`'.

use std::collections::BTreeMap;
use std::io;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use crate::config::DatabaseConfig;
use crate::consume::catalogue::{self, DDL_LOCK, Found, Partition};
use crate::consume::tables::{Day, Object, literal};
use crate::consume::views::{self, COUNTED};
use crate::database::{self, Bounds, Fault, Link, bounded};

/// The first pass of `consume`, so long after its start: while a backlog is read, days that are counted would only change
/// again, and their triggers would slow it down (by half).
pub const FIRST_PASS_AFTER: Duration = Duration::from_secs(600);

/// How often days are looked for. A day that changes all the time costs its two seconds each time.
pub const PASS_EVERY: Duration = Duration::from_secs(120);

/// A day is finished this long after its end; what is on its way then is there, in quiet times.
const FINISHED_AFTER: Duration = Duration::from_secs(120);

/// Counting one day takes two seconds per 1.5 million rows, and nobody waits for it. A day that takes longer than this
/// is left to the views.
const COUNT_WITHIN: Duration = Duration::from_secs(600);

/// What a pass came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pass {
    /// Days summed up.
    pub counted: usize,
    /// Days that are finished and not summed up: time was over, somebody wrote to them, or this user may not.
    pub left: usize,
    /// Whether this user may do it at all.
    pub may_count: bool,
}

/// The thread of `consume`; ends after this handle, and after a pass that is under way.
pub struct Sums {
    _stop: SyncSender<()>,
}

impl Sums {
    /// Makes a pass after `first`, and then one each time after `every`.
    ///
    /// # Errors
    /// The operating system has no thread to give.
    pub fn start(database: DatabaseConfig, first: Duration, every: Duration) -> io::Result<Self> {
        let (stop, stopped) = sync_channel::<()>(0);
        let run = move || {
            let mut wait = first;
            let mut has_said = false;
            while stopped.recv_timeout(wait) == Err(RecvTimeoutError::Timeout) {
                wait = every;
                match count(&database, finished_before(), Duration::MAX) {
                    Ok(pass) if !pass.may_count && pass.left > 0 && !has_said => {
                        has_said = true;
                        log::warn!(
                            "{} finished days are not summed up, because this user does not own the tables, so the \
                             views count all their rows: run `host-metrics init` once a day as the owner",
                            pass.left
                        );
                    }
                    Ok(_) => {}
                    // The writer says what is wrong with Postgres.
                    Err(fault) => log::debug!("finished days not summed up, to be tried again: {fault}"),
                }
            }
        };
        std::thread::Builder::new().name("sums".into()).spawn(run)?;
        Ok(Self { _stop: stop })
    }
}

/// The day before which all days are finished, now.
pub fn finished_before() -> Day {
    catalogue::day_at(FINISHED_AFTER)
}

/// One pass, on a connection of its own.
///
/// # Errors
/// The database cannot be reached, or the connection broke.
pub fn count(database: &DatabaseConfig, finished_before: Day, within: Duration) -> Result<Pass, Fault> {
    let runtime = database::runtime().map_err(|error| Fault::passing(error.to_string()))?;
    let bounds = Bounds::default();
    let result = runtime.block_on(async {
        let link = Link::open(database, &bounds).await?;
        let result = async {
            let found = catalogue::find(&link.client, &bounds, &database.table).await?;
            count_finished(&link.client, &bounds, &found, finished_before, within).await
        }
        .await;
        link.close().await;
        result
    });
    runtime.shutdown_background();
    result
}

/// Sums up the days before `finished_before` that are not, the newest first, and begins none after `within`. What does not work out with
/// one is said and left for the next time.
///
/// # Errors
/// Passing only: the connection is of no further use.
pub async fn count_finished(
    client: &Client,
    bounds: &Bounds,
    found: &Found,
    finished_before: Day,
    within: Duration,
) -> Result<Pass, Fault> {
    let began = clock();
    let is_current = [Object::Main, Object::Days, Object::Hours, Object::Failures]
        .into_iter()
        .all(|object| found.is_current(object));
    let Some(main) = found
        .partitioned_main()
        .filter(|_| is_current && found.newer_version().is_none())
    else {
        return Ok(Pass {
            may_count: true,
            ..Pass::default()
        });
    };
    let partitions = catalogue::partitions(client, bounds, main).await?;
    let may_count = partitions.may_change;
    let states = states(client, bounds, found).await?;
    let mut due: Vec<&Partition> = partitions
        .days
        .iter()
        .filter(|partition| partition.is_whole_days && partition.to <= finished_before)
        .collect();
    // The empty days before the first row: of a new table, for example, whose backlog is still to come.
    let first = due.iter().position(|partition| !partition.is_empty);
    due.drain(..first.unwrap_or(due.len()));
    due.retain(|partition| states.get(&partition.oid).is_none_or(|state| state != COUNTED));
    let mut pass = Pass {
        counted: 0,
        left: due.len(),
        may_count,
    };
    if !may_count {
        return Ok(pass);
    }
    let is_gone = |oid: &u32| !partitions.days.iter().any(|partition| partition.oid == *oid);
    if states.keys().any(is_gone)
        && let Err(fault) = forget_dropped(client, bounds, found).await
    {
        catalogue::say(client, bounds, Err(fault), "sums of dropped days not removed").await?;
        return Ok(pass);
    }
    for partition in due.into_iter().rev() {
        if clock().saturating_duration_since(began) >= within {
            break;
        }
        let day_began = clock();
        let counted = count_day(client, bounds, found, partition).await;
        let seconds = day_began.elapsed().as_secs_f64();
        match counted {
            Ok(true) => {
                log::info!("summed up {} seconds={seconds:.1}", partition.name);
                pass.counted += 1;
                pass.left -= 1;
            }
            Ok(false) => log::debug!("{} was written to while it was summed up", partition.name),
            // Somebody writes to it, or cleans it up: nothing to worry about.
            Err(fault) if fault.code == Some(SqlState::LOCK_NOT_AVAILABLE) => {
                log::debug!("{} not summed up, to be tried again: {fault}", partition.name);
                catalogue::rollback(client, bounds).await?;
            }
            Err(fault) => {
                let what = format!("{} not summed up", partition.name);
                catalogue::say(client, bounds, Err(fault), &what).await?;
            }
        }
    }
    Ok(pass)
}

/// The states of all days, by their partition's oid.
async fn states(client: &Client, bounds: &Bounds, found: &Found) -> Result<BTreeMap<u32, String>, Fault> {
    let days = found.table.quoted(Object::Days.suffix());
    let sql = format!("SELECT \"partition\"::oid, state FROM {days}");
    let mut states = BTreeMap::new();
    // Who may only write rows may not look; nor may it count.
    if catalogue::may_read(client, bounds, found, Object::Days).await? {
        for row in bounded("reading the summed days", bounds.step, client.query(&sql, &[])).await? {
            states.insert(row.try_get(0)?, row.try_get(1)?);
        }
    }
    Ok(states)
}

/// Removes the sums of partitions that are gone; no view reads them any more. Before any day is counted: a day can have got
/// a new partition.
async fn forget_dropped(client: &Client, bounds: &Bounds, found: &Found) -> Result<(), Fault> {
    let name = |object: Object| found.table.quoted(object.suffix());
    let (days, hours, failures) = (name(Object::Days), name(Object::Hours), name(Object::Failures));
    let sql = format!(
        "WITH gone AS (
             DELETE FROM {days} WHERE NOT EXISTS (
                 SELECT FROM pg_catalog.pg_inherits WHERE inhrelid = \"partition\" AND inhparent = {}::regclass
             ) RETURNING starts_at, ends_at
         ), without_hours AS (
             DELETE FROM {hours} USING gone WHERE hour >= starts_at AND hour < gone.ends_at
         )
         DELETE FROM {failures} USING gone WHERE first_at >= starts_at AND first_at < gone.ends_at",
        literal(&name(Object::Main))
    );
    catalogue::execute(client, bounds, &sql).await
}

/// Whether the day's sums are right now. `false`: somebody wrote to it meanwhile.
async fn count_day(
    client: &Client,
    bounds: &Bounds,
    found: &Found,
    partition: &Partition,
) -> Result<bool, Fault> {
    let table = &found.table;
    let days = table.quoted(Object::Days.suffix());
    let hours = table.quoted(Object::Hours.suffix());
    let failures = table.quoted(Object::Failures.suffix());
    let name = &partition.name;
    let (from, to) = (partition.from.begin(), partition.to.begin());
    let counting = format!("counting {}", fastrand::u64(..));
    let oid = partition.oid;

    let trigger = if partition.has_trigger {
        String::new()
    } else {
        views::create_trigger(table, name)
    };
    let begin = format!(
        "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL lock_timeout = '{}ms'; \
         LOCK TABLE ONLY {name} IN SHARE ROW EXCLUSIVE MODE; {trigger} \
         INSERT INTO {days} (\"partition\", starts_at, ends_at, state) VALUES ({oid}::oid::regclass, {from}, {to}, '{counting}') \
         ON CONFLICT (\"partition\") DO UPDATE SET starts_at = {from}, ends_at = {to}, state = '{counting}'; COMMIT",
        DDL_LOCK.as_millis()
    );
    catalogue::execute(client, bounds, &begin).await?;

    let count = format!(
        "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL statement_timeout = '{}s'; SET LOCAL jit = off; \
         DELETE FROM {hours} WHERE hour >= {from} AND hour < {to}; \
         DELETE FROM {failures} WHERE first_at >= {from} AND first_at < {to}; \
         {}; {}",
        COUNT_WITHIN.as_secs(),
        views::sum_hours(table, name),
        views::sum_failures(table, name),
    );
    // Four statements, each of which the server ends by itself.
    bounded(
        "counting a day",
        4 * COUNT_WITHIN + bounds.step,
        client.batch_execute(&count),
    )
    .await?;
    let finish = format!(
        "UPDATE {days} SET state = '{COUNTED}' WHERE \"partition\" = $1::oid AND state = '{counting}'"
    );
    let is_right = bounded("counting a day", bounds.step, client.execute(&finish, &[&oid])).await? == 1;
    let end = if is_right { "COMMIT" } else { "ROLLBACK" };
    catalogue::execute(client, bounds, end).await?;
    Ok(is_right)
}

#[expect(clippy::disallowed_methods, reason = "an edge: a bound on the time of a pass")]
fn clock() -> Instant {
    Instant::now()
}
