//! Sums finished days up, so that the views need not count their rows: one pass over the days, and `consume`'s thread that
//! makes one every few minutes.
//!
//! Owns which days are due and the order of the steps, in which a sum stays right whoever writes meanwhile:
//!
//! 1. In one transaction, the day's writers are kept out for a moment, which waits for those that have written already; the
//!    day gets its triggers, and the notes of earlier changes go. From here on whoever changes a row leaves a note.
//! 2. In another one the day is marked as counted, then counted; nobody waits. A note that came in between, or comes
//!    later, says that the sums are void, from the moment at which the change itself can be seen.
//!
//! Both steps begin with the row of the day, so that two passes follow each other.
//!
//! What is summed, and how the views read it, is `views`'.

use std::collections::BTreeMap;
use std::io;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use crate::config::DatabaseConfig;
use crate::postgres::{self, Bounds, Fault, Link, bounded};
use crate::tables::days::{self, Partition};
use crate::tables::ddl::{self, DDL_LOCK};
use crate::tables::destination::{self, Found};
use crate::tables::names::{Object, literal};
use crate::tables::schema::Day;
use crate::tables::views::{self, COUNTED};

/// The first pass of `consume`, so long after its start: while a backlog is read, days that are counted would only change
/// again, and their triggers would slow it down (by half).
pub const FIRST_PASS_AFTER: Duration = Duration::from_secs(600);

/// How often days are looked for. A day that changes all the time costs its two seconds each time.
pub const PASS_EVERY: Duration = Duration::from_secs(120);

/// A day is finished this long after its end; what is on its way then is there, in quiet times.
const FINISHED_AFTER: Duration = Duration::from_secs(120);

/// States of a day that is not counted: not yet, or only when its rows change.
const COUNTING: &str = "counting";
const TOO_LARGE: &str = "too large";

/// How long a pass may take.
#[derive(Clone, Copy, Debug)]
pub struct Within {
    /// After this long no further day is begun.
    pub pass: Duration,
    /// For each statement of one day. A day that takes longer is left to the views until its rows change.
    pub day: Duration,
}

impl Default for Within {
    /// As long as it takes. A day takes two seconds per 1.5 million rows, and nobody waits for it.
    fn default() -> Self {
        Self {
            pass: Duration::MAX,
            day: Duration::from_secs(600),
        }
    }
}

/// The next pass after one that could not do all that was due: what is wrong then is not mended by itself in minutes.
const AFTER_A_FAULT: Duration = Duration::from_secs(3_600);

/// What a pass came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pass {
    /// Days summed up.
    pub counted: usize,
    /// Days that are finished and not summed up: time was over, somebody wrote to them, or this user may not.
    pub left: usize,
    /// Whether something was in the way that does not pass in minutes.
    pub is_hindered: bool,
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
            while stopped.recv_timeout(wait) == Err(RecvTimeoutError::Timeout) {
                wait = match count(&database, finished_before(), Within::default()) {
                    Ok(pass) if pass.is_hindered => AFTER_A_FAULT,
                    Ok(_) => every,
                    // The writer says what is wrong with Postgres.
                    Err(fault) => {
                        log::debug!("finished days not summed up, to be tried again: {fault}");
                        every
                    }
                };
            }
        };
        std::thread::Builder::new().name("sums".into()).spawn(run)?;
        Ok(Self { _stop: stop })
    }
}

/// The day before which all days are finished, now.
pub fn finished_before() -> Day {
    days::day_at(FINISHED_AFTER)
}

/// One pass, on a connection of its own.
///
/// # Errors
/// The database cannot be reached, or the connection broke.
pub fn count(database: &DatabaseConfig, finished_before: Day, within: Within) -> Result<Pass, Fault> {
    let runtime = postgres::runtime().map_err(|error| Fault::passing(error.to_string()))?;
    let bounds = Bounds::default();
    let result = runtime.block_on(async {
        let link = Link::open(database, &bounds).await?;
        let result = async {
            let found = destination::find(&link, &bounds).await?;
            count_finished(&link.client, &bounds, &found, finished_before, within).await
        }
        .await;
        link.close().await;
        result
    });
    runtime.shutdown_background();
    result
}

/// Sums up the days before `finished_before` that are not, the newest first. What does not work out with one is said and
/// left for the next time.
///
/// # Errors
/// Passing only: the connection is of no further use.
pub async fn count_finished(
    client: &Client,
    bounds: &Bounds,
    found: &Found,
    finished_before: Day,
    within: Within,
) -> Result<Pass, Fault> {
    let began = clock();
    let hindered = Pass {
        is_hindered: true,
        ..Pass::default()
    };
    let mut needed = [Object::Main].into_iter().chain(Object::SUMS);
    let is_current = found.newer_version().is_none() && needed.all(|object| found.is_current(object));
    let Some(main) = found.partitioned_main().filter(|_| is_current) else {
        return Ok(hindered);
    };
    let partitions = days::partitions(client, bounds, main).await?;
    // Who may only write rows may not look; the owner counts.
    if !destination::may_read(client, bounds, found, Object::Days).await?
        || !destination::may_read(client, bounds, found, Object::Changes).await?
    {
        return Ok(hindered);
    }
    let states = states(client, bounds, found).await?;
    let mut due: Vec<&Partition> = partitions
        .days
        .iter()
        .filter(|partition| partition.is_whole_days && partition.to <= finished_before)
        .collect();
    // The empty days before the first row: of a new table, for example, whose backlog is still to come.
    let first = due.iter().position(|partition| !partition.is_empty);
    due.drain(..first.unwrap_or(due.len()));
    due.retain(|partition| match states.get(&partition.oid) {
        Some(day) => {
            day.is_changed || !partition.has_triggers || ![COUNTED, TOO_LARGE].contains(&day.state.as_str())
        }
        None => true,
    });
    let mut pass = Pass {
        left: due.len(),
        ..Pass::default()
    };
    if !partitions.may_change {
        if pass.left > 0 {
            log::warn!(
                "{} finished days are not summed up, because this user does not own the tables, so the views count all \
                 their rows: run `host-metrics init` once a day as the owner",
                pass.left
            );
        }
        pass.is_hindered = true;
        return Ok(pass);
    }
    let has_triggers = partitions.days.iter().any(|partition| partition.has_triggers);
    if (has_triggers || !due.is_empty())
        && let Err(fault) = make_function(client, bounds, found).await
    {
        ddl::say(
            client,
            bounds,
            Err(fault),
            "the function of finished days not made",
        )
        .await?;
        return Ok(hindered);
    }
    let is_gone = |oid: &u32| !partitions.days.iter().any(|partition| partition.oid == *oid);
    if states.keys().any(is_gone)
        && let Err(fault) = forget_dropped(client, bounds, found).await
    {
        ddl::say(client, bounds, Err(fault), "sums of dropped days not removed").await?;
        return Ok(hindered);
    }
    for partition in due.into_iter().rev() {
        if clock().saturating_duration_since(began) >= within.pass {
            break;
        }
        let day_began = clock();
        let counted = count_day(client, bounds, found, main, partition, within.day).await;
        let seconds = day_began.elapsed().as_secs_f64();
        match counted {
            Ok(true) => {
                log::info!("summed up {} seconds={seconds:.1}", partition.name);
                pass.counted += 1;
                pass.left -= 1;
            }
            Ok(false) => log::debug!("{} is no day of the table any more", partition.name),
            // Somebody writes to it, sums it up, or cleans it up: nothing to worry about.
            Err(fault) if fault.code == Some(SqlState::LOCK_NOT_AVAILABLE) => {
                log::debug!("{} not summed up, to be tried again: {fault}", partition.name);
                ddl::rollback(client, bounds).await?;
            }
            Err(fault) if fault.code == Some(SqlState::QUERY_CANCELED) => {
                log::warn!(
                    "{} is not summed up, for that takes more than {} s: the views go on counting its rows",
                    partition.name,
                    within.day.as_secs_f64()
                );
                ddl::rollback(client, bounds).await?;
                set_state(client, bounds, found, partition.oid, TOO_LARGE).await?;
            }
            Err(fault) => {
                let what = format!("{} not summed up", partition.name);
                ddl::say(client, bounds, Err(fault), &what).await?;
                pass.is_hindered = true;
            }
        }
    }
    Ok(pass)
}

/// What the tables of the sums say of one day.
struct DayState {
    state: String,
    is_changed: bool,
}

/// By their partition's oid.
async fn states(client: &Client, bounds: &Bounds, found: &Found) -> Result<BTreeMap<u32, DayState>, Fault> {
    let (days, changes) = (
        found.table.quoted(Object::Days.suffix()),
        found.table.quoted(Object::Changes.suffix()),
    );
    let sql = format!(
        "SELECT d.\"partition\"::oid, d.state, EXISTS (SELECT FROM {changes} c WHERE c.\"partition\" = d.\"partition\") \
         FROM {days} d"
    );
    let mut states = BTreeMap::new();
    for row in bounded("reading the summed days", bounds.step, client.query(&sql, &[])).await? {
        let day = DayState {
            state: row.try_get(1)?,
            is_changed: row.try_get(2)?,
        };
        states.insert(row.try_get(0)?, day);
    }
    Ok(states)
}

/// Makes the triggers' function where it is missing or not right any more: while the tables have another name or another
/// owner than it has, late rows are refused.
async fn make_function(client: &Client, bounds: &Bounds, found: &Found) -> Result<(), Fault> {
    let owner = destination::owner(client, bounds, found, Object::Changes).await?;
    let is_right = views::function_is_right(&found.table, &owner);
    let is_right = bounded(
        "reading the catalogue",
        bounds.step,
        client.query_one(&is_right, &[]),
    )
    .await?;
    if is_right.try_get(0)? {
        return Ok(());
    }
    let (lock, create) = (
        ddl::lock(&found.table),
        views::create_function(&found.table, &owner),
    );
    ddl::execute(client, bounds, &format!("BEGIN; {lock}; {create} COMMIT")).await
}

/// Removes the sums of partitions that are gone; no view reads them any more. A day that got a new partition is counted
/// anew.
async fn forget_dropped(client: &Client, bounds: &Bounds, found: &Found) -> Result<(), Fault> {
    let name = |object: Object| found.table.quoted(object.suffix());
    let (days, changes) = (name(Object::Days), name(Object::Changes));
    let (hours, failures) = (name(Object::Hours), name(Object::Failures));
    let sql = format!(
        "WITH gone AS (
             DELETE FROM {days} WHERE NOT EXISTS (
                 SELECT FROM pg_catalog.pg_inherits WHERE inhrelid = \"partition\" AND inhparent = {}::regclass
             ) RETURNING \"partition\", starts_at, ends_at
         ), without_changes AS (
             DELETE FROM {changes} c USING gone WHERE c.\"partition\" = gone.\"partition\"
         ), in_their_place AS (
             UPDATE {days} d SET state = '{COUNTING}' FROM gone
             WHERE d.\"partition\" <> gone.\"partition\" AND d.starts_at < gone.ends_at AND d.ends_at > gone.starts_at
         ), without_hours AS (
             DELETE FROM {hours} USING gone WHERE hour >= starts_at AND hour < gone.ends_at
         )
         DELETE FROM {failures} USING gone WHERE first_at >= starts_at AND first_at < gone.ends_at",
        literal(&name(Object::Main))
    );
    ddl::execute(client, bounds, &sql).await
}

/// `false`: the partition is none of the table's any more.
async fn count_day(
    client: &Client,
    bounds: &Bounds,
    found: &Found,
    main: u32,
    partition: &Partition,
    within: Duration,
) -> Result<bool, Fault> {
    let table = &found.table;
    let quoted = |object: Object| table.quoted(object.suffix());
    let (days, changes) = (quoted(Object::Days), quoted(Object::Changes));
    let (hours, failures) = (quoted(Object::Hours), quoted(Object::Failures));
    let (name, oid) = (&partition.name, partition.oid);
    let (from, to) = (partition.from.begin(), partition.to.begin());

    let triggers = match partition.has_triggers {
        true => String::new(),
        false => views::create_trigger(table, name),
    };
    let begin = format!(
        "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL lock_timeout = '{}ms'; \
         INSERT INTO {days} (\"partition\", starts_at, ends_at, state) \
             VALUES ({oid}::oid::regclass, {from}, {to}, '{COUNTING}') \
             ON CONFLICT (\"partition\") DO UPDATE SET starts_at = {from}, ends_at = {to}, state = '{COUNTING}'; \
         LOCK TABLE ONLY {name} IN SHARE ROW EXCLUSIVE MODE; {triggers} \
         DELETE FROM {changes} WHERE \"partition\" = {oid}::oid::regclass; COMMIT",
        DDL_LOCK.as_millis()
    );
    ddl::execute(client, bounds, &begin).await?;

    let count = format!(
        "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL statement_timeout = '{}ms'; SET LOCAL jit = off; \
         UPDATE {days} SET state = '{COUNTED}' WHERE \"partition\" = {oid}::oid::regclass; \
         DELETE FROM {hours} WHERE hour >= {from} AND hour < {to}; \
         DELETE FROM {failures} WHERE first_at >= {from} AND first_at < {to}; \
         {}; {}",
        within.as_millis(),
        views::sum_hours(table, name),
        views::sum_failures(table, name),
    );
    // Five statements, each of which the server ends by itself.
    let within = 5 * within + bounds.step;
    bounded("counting a day", within, client.batch_execute(&count)).await?;
    // Another partition may have taken its place, and its range; this one cannot leave any more, for it was read.
    let is_there = "SELECT EXISTS (SELECT FROM pg_catalog.pg_inherits WHERE inhrelid = $1 AND inhparent = $2 \
                    AND NOT inhdetachpending)";
    let is_there = bounded(
        "counting a day",
        bounds.step,
        client.query_one(is_there, &[&oid, &main]),
    )
    .await?;
    let is_there = is_there.try_get(0)?;
    ddl::execute(client, bounds, if is_there { "COMMIT" } else { "ROLLBACK" }).await?;
    Ok(is_there)
}

async fn set_state(
    client: &Client,
    bounds: &Bounds,
    found: &Found,
    oid: u32,
    state: &str,
) -> Result<(), Fault> {
    let days = found.table.quoted(Object::Days.suffix());
    let sql = format!("UPDATE {days} SET state = '{state}' WHERE \"partition\" = {oid}::oid::regclass");
    ddl::execute(client, bounds, &sql).await
}

#[expect(clippy::disallowed_methods, reason = "an edge: a bound on the time of a pass")]
fn clock() -> Instant {
    Instant::now()
}
