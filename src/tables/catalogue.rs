//! What the database really has: the tables found, the missing ones made, their columns and rights read, the days kept.
//!
//! Owns the questions to the catalogue and the running of the text of `tables`; `store` and `init` share it. An existing
//! table is respected: nothing here alters one that does not carry our comment, or that of a newer version. What an older
//! version of us made gets what it lacks.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use crate::config::TableName;
use crate::postgres::{Bounds, Fault, Kind, bounded};
use crate::tables::row::{Column, Layout};
use crate::tables::schema::{self, DAYS_AHEAD, Day, MARK, Object, SCHEMA_VERSION};
use crate::tables::views::has_triggers;

/// A waiting DDL statement makes every writer behind it wait: this long at most, then it is given up until the next time.
pub(super) const DDL_LOCK: Duration = Duration::from_millis(200);

/// Rows of one day that are moved out of the default partition at once, in about a second during which rows for the
/// default partition wait. More are left there, and said.
const MOVE_ROWS: i64 = 100_000;

/// Partitions dropped in one go: the writer waits meanwhile. The rest goes the next time.
const DROP_PARTITIONS: usize = 50;

/// Rows that are too old and removed from the default partition in one statement, and how many such statements in one
/// go. The rest goes the next time.
const DELETE_ROWS: i64 = 10_000;
const DELETE_TIMES: usize = 20;

/// A statement that reads all of a partition gets this long, less than the [`Bounds`] of a step: what takes longer ends
/// with the server's word, and not with a connection that is given up.
const READ_PARTITION: Duration = Duration::from_secs(10);

/// The tables are indexed by `date_bin`, which Postgres has since this version, as `server_version_num` has it.
const POSTGRES_NEEDED: i32 = 140_000;

/// The day in UTC.
pub fn today() -> Day {
    day_at(Duration::ZERO)
}

/// The day in UTC that long ago.
#[expect(
    clippy::disallowed_methods,
    reason = "the edge: partitions are made for the days ahead of now, and summed up behind it"
)]
pub fn day_at(ago: Duration) -> Day {
    const DAY_SECONDS: u64 = 86_400;
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = since_epoch.saturating_sub(ago).as_secs();
    Day::from_unix(i64::try_from(seconds / DAY_SECONDS).unwrap_or_default())
}

/// DB_TABLE with its schema, and which of its objects exist.
#[derive(Clone, Debug)]
pub struct Found {
    /// With the schema that DB_TABLE means, also where it does not say it.
    pub table: TableName,
    objects: Vec<FoundObject>,
}

#[derive(Clone, Debug)]
struct FoundObject {
    object: Object,
    oid: u32,
    /// `pg_class.relkind`: r table, p partitioned, v view, f foreign, m materialised.
    kind: char,
    /// The version in our comment; `None`: somebody else's.
    version: Option<u32>,
    /// Whether this user owns it, and so may alter it.
    is_owned: bool,
}

impl Found {
    pub fn has(&self, object: Object) -> bool {
        self.get(object).is_some()
    }

    /// Whether the object carries our comment.
    pub fn is_ours(&self, object: Object) -> bool {
        self.get(object).is_some_and(|found| found.version.is_some())
    }

    /// Whether the object is ours, of this version or a newer one: that has all that this one knows.
    pub fn is_current(&self, object: Object) -> bool {
        self.get(object)
            .is_some_and(|found| found.version >= Some(SCHEMA_VERSION))
    }

    /// The oid of the main table, where it is ours and partitioned by day.
    pub(super) fn partitioned_main(&self) -> Option<u32> {
        self.get(Object::Main)
            .filter(|main| main.kind == 'p' && main.version.is_some())
            .map(|main| main.oid)
    }

    fn get(&self, object: Object) -> Option<&FoundObject> {
        self.objects.iter().find(|found| found.object == object)
    }

    /// The version of the table, where it is ours and newer than this program knows.
    pub fn newer_version(&self) -> Option<u32> {
        let version = self.get(Object::Main)?.version?;
        (version > SCHEMA_VERSION).then_some(version)
    }

    /// What [`make`] would make. Views and sums are only made for a table that has all their columns: our own. What belongs
    /// to a newer version's table is that version's to make, and an older one is brought up as a whole.
    fn missing(&self) -> Vec<Object> {
        let is_current_or_new = !self.has(Object::Main) || self.is_current(Object::Main);
        Object::ALL
            .into_iter()
            .filter(|&object| !self.has(object) && (is_current_or_new || !object.needs_our_table()))
            .filter(|_| self.newer_version().is_none())
            .collect()
    }

    /// What an older version of us made.
    fn outdated(&self) -> Vec<&FoundObject> {
        let is_old = |found: &&FoundObject| found.version.is_some_and(|version| version < SCHEMA_VERSION);
        // Not the rest of a table that is newer, or not ours: it fits that one.
        let main_is_old_or_ours = self
            .get(Object::Main)
            .is_some_and(|main| main.version.is_some_and(|version| version <= SCHEMA_VERSION));
        Object::ALL
            .into_iter()
            .filter_map(|object| self.get(object))
            .filter(is_old)
            .filter(|_| main_is_old_or_ours)
            .collect()
    }
}

/// Looks the objects of DB_TABLE up.
pub async fn find(client: &Client, bounds: &Bounds, table: &TableName) -> Result<Found, Fault> {
    bounded("reading the catalogue", bounds.step, async {
        // An unqualified name is looked for along the search path; what belongs to the table goes where the table is.
        let row = client
            .query_one(
                "SELECT coalesce((SELECT n.nspname FROM pg_catalog.pg_class c \
                 JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
                 WHERE c.oid = pg_catalog.to_regclass($1)), $2, pg_catalog.current_schema())::text",
                &[&table.quoted(""), &table.schema],
            )
            .await
            .map_err(Fault::from)
            .map_err(|fault| {
                let schema = table.schema.as_deref().unwrap_or("public");
                fault.with_grant(&format!("GRANT USAGE ON SCHEMA {schema} to it"))
            })?;
        let Some(schema) = row.try_get::<_, Option<String>>(0)? else {
            return Err(Fault::operator(
                "no schema of the search path exists: create one, or name it in DB_TABLE (schema.table)",
            ));
        };
        let table = TableName { schema: Some(schema.clone()), name: table.name.clone() };
        let names = Object::ALL.map(|object| format!("{}{}", table.name, object.suffix()));
        let rows = client
            .query(
                "SELECT c.relname::text, c.oid, c.relkind::text, pg_catalog.obj_description(c.oid, 'pg_class'), \
                        pg_catalog.pg_has_role(c.relowner, 'USAGE') \
                 FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
                 WHERE n.nspname = $1::text AND c.relname = ANY ($2::text[])",
                &[&schema, &names.as_slice()],
            )
            .await?;
        let mut objects = Vec::new();
        for row in rows {
            let name: String = row.try_get(0)?;
            let kind: String = row.try_get(2)?;
            let comment: Option<String> = row.try_get(3)?;
            let object = Object::ALL.into_iter().zip(&names).find(|(_, known)| **known == name);
            if let Some((object, _)) = object {
                objects.push(FoundObject {
                    object,
                    oid: row.try_get(1)?,
                    kind: kind.chars().next().unwrap_or_default(),
                    version: comment.as_deref().and_then(version_in),
                    is_owned: row.try_get(4)?,
                });
            }
        }
        Ok(Found { table, objects })
    })
    .await
}

/// Makes what is missing, if anything is: all of it in one transaction, one maker at a time. Returns what was made.
pub async fn make(
    client: &Client,
    bounds: &Bounds,
    table: &TableName,
    today: Day,
) -> Result<Vec<Object>, Fault> {
    let found = find(client, bounds, table).await?;
    if found.missing().is_empty() {
        return Ok(Vec::new());
    }
    if !found.has(Object::Main) {
        check_server(client, bounds).await?;
    }
    let result = async {
        execute(client, bounds, "BEGIN").await?;
        execute(client, bounds, &lock(&found.table)).await?;
        // Somebody may have been quicker while we waited for the lock.
        let found = find(client, bounds, &found.table).await?;
        let missing = found.missing();
        if missing.iter().any(|object| object.needs_our_table()) {
            check_names(&found)?;
        }
        for &object in &missing {
            let sql = schema::create(object, &found.table, Day::ahead(today, true));
            execute(client, bounds, &sql).await?;
            give_to_owner(client, bounds, &found, object).await?;
        }
        // What was summed up was in a table that is gone.
        let sums = [Object::Changes, Object::Hours, Object::Failures];
        if found.has(Object::Days) && missing.iter().any(|object| sums.contains(object)) {
            let days = found.table.quoted(Object::Days.suffix());
            execute(client, bounds, &format!("DELETE FROM {days}")).await?;
        }
        execute(client, bounds, "COMMIT").await?;
        Ok(missing)
    }
    .await;
    if result.is_err() {
        rollback(client, bounds).await?;
    }
    result
}

/// The views need tables of these names.
fn check_names(found: &Found) -> Result<(), Fault> {
    let is_theirs = |object: &Object| found.has(*object) && !found.is_ours(*object);
    match Object::SUMS.into_iter().find(is_theirs) {
        None => Ok(()),
        Some(object) => Err(Fault::operator(format!(
            "{} exists and was not made by host-metrics, which needs the name for the sums of finished days: rename it, or \
             choose another DB_TABLE",
            found.table.quoted(object.suffix())
        ))),
    }
}

/// The owner of an object, quoted.
pub(super) async fn owner(
    client: &Client,
    bounds: &Bounds,
    found: &Found,
    object: Object,
) -> Result<String, Fault> {
    const SQL: &str = "SELECT pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(relowner)) \
                       FROM pg_catalog.pg_class WHERE oid = $1";
    let oid = found.get(object).map_or(0, |found| found.oid);
    bounded("reading the catalogue", bounds.step, async {
        client.query_one(SQL, &[&oid]).await?.try_get(0)
    })
    .await
}

/// What belongs to a table that was there before belongs to its owner, whoever we are: views read with their owner's rights.
async fn give_to_owner(client: &Client, bounds: &Bounds, found: &Found, object: Object) -> Result<(), Fault> {
    if !found.is_ours(Object::Main) || found.has(object) {
        return Ok(());
    }
    let owner = owner(client, bounds, found, Object::Main).await?;
    let name = found.table.quoted(object.suffix());
    execute(client, bounds, &format!("ALTER TABLE {name} OWNER TO {owner}")).await
}

async fn check_server(client: &Client, bounds: &Bounds) -> Result<(), Fault> {
    let sql = "SELECT current_setting('server_version_num')::integer, current_setting('server_version')";
    let row = bounded(
        "asking the server's version",
        bounds.step,
        client.query_one(sql, &[]),
    )
    .await?;
    match too_old(row.try_get(0)?, row.try_get(1)?) {
        Some(text) => Err(Fault::operator(text)),
        None => Ok(()),
    }
}

fn too_old(version_number: i32, version: &str) -> Option<String> {
    (version_number < POSTGRES_NEEDED).then(|| {
        format!(
            "this server is Postgres {version}, and the tables of host-metrics need {} or newer: upgrade it, or make a \
             table of your own (four columns are enough: address, latency, status_code, is_valid)",
            POSTGRES_NEEDED / 10_000
        )
    })
}

/// Brings what an older version of us made up to this version, with its rows, as far as this user may. What does not work
/// out is said and left for the next time: the older tables take rows just as well.
///
/// # Errors
/// Passing only: the connection is of no further use.
async fn bring_up(client: &Client, bounds: &Bounds, found: &Found) -> Result<(), Fault> {
    let outdated = found.outdated();
    let Some(oldest) = outdated.iter().filter_map(|object| object.version).min() else {
        return Ok(());
    };
    let main = found.table.quoted("");
    if !outdated.iter().all(|object| object.is_owned) {
        log::warn!(
            "{main} was made by an older version of host-metrics (schema {oldest}, this one makes {SCHEMA_VERSION}); rows \
             are stored all the same, but its views stay slow: run `host-metrics init` as its owner"
        );
        return Ok(());
    }
    log::info!("bringing {main} and what belongs to it from schema {oldest} to {SCHEMA_VERSION}");
    let result = async {
        let old_main = outdated.iter().find(|found| found.object == Object::Main);
        if let Some(old) = old_main.filter(|main| main.version < Some(schema::FAILED_INDEX_SINCE)) {
            index_partitions(client, bounds, &found.table, old.oid).await?;
        }
        execute(client, bounds, "BEGIN").await?;
        execute(client, bounds, &lock(&found.table)).await?;
        let wait = format!("SET LOCAL lock_timeout = '{}ms'", DDL_LOCK.as_millis());
        execute(client, bounds, &wait).await?;
        // Somebody may have been quicker while we waited for the lock.
        let found = find(client, bounds, &found.table).await?;
        let outdated: Vec<Object> = found.outdated().iter().map(|found| found.object).collect();
        if !outdated.is_empty() {
            check_names(&found)?;
        }
        for object in Object::ALL {
            if outdated.contains(&object) || (!outdated.is_empty() && !found.has(object)) {
                let sql = schema::create(object, &found.table, std::iter::empty());
                execute(client, bounds, &sql).await?;
                give_to_owner(client, bounds, &found, object).await?;
            }
        }
        execute(client, bounds, "COMMIT").await?;
        log::info!("{main} and what belongs to it brought from schema {oldest} to {SCHEMA_VERSION}");
        Ok(())
    }
    .await;
    let what = format!("{main} not brought from schema {oldest} to {SCHEMA_VERSION}");
    say(client, bounds, result, &what).await
}

/// Indexes the failed checks of each partition by itself: writers of one day at a time wait, for about a second in ten
/// million rows.
async fn index_partitions(
    client: &Client,
    bounds: &Bounds,
    table: &TableName,
    oid: u32,
) -> Result<(), Fault> {
    const SQL: &str = "SELECT n.nspname::text, c.relname::text FROM pg_catalog.pg_inherits i \
        JOIN pg_catalog.pg_class c ON c.oid = i.inhrelid \
        JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE i.inhparent = $1 ORDER BY 2";
    let rows = bounded("reading the partitions", bounds.step, client.query(SQL, &[&oid])).await?;
    for row in rows {
        let partition = TableName {
            schema: Some(row.try_get(0)?),
            name: row.try_get(1)?,
        };
        // Another maker is waited for, and then finds it made; writers are not made to wait behind us.
        let create = schema::create_failed_index(&partition);
        let sql = format!(
            "BEGIN; {}; SET LOCAL lock_timeout = '{}ms'; SET LOCAL statement_timeout = '{}ms'; {create} COMMIT",
            lock(table),
            DDL_LOCK.as_millis(),
            READ_PARTITION.as_millis(),
        );
        execute(client, bounds, &sql)
            .await
            .map_err(|fault| match fault.code {
                Some(SqlState::QUERY_CANCELED) => Fault {
                    text: format!(
                        "{fault}: its rows are too many to keep their writers out; by hand, without that: {}",
                        create.replace("CREATE INDEX", "CREATE INDEX CONCURRENTLY")
                    ),
                    ..fault
                },
                _ => fault,
            })?;
    }
    Ok(())
}

/// The table that `consume` writes to.
pub struct Destination {
    pub layout: Layout,
    /// Whether its days are ours to keep: it carries our comment and is partitioned.
    pub is_ours: bool,
}

/// Reads columns and rights, and checks that a row can be written at all.
///
/// # Errors
/// The operator's: a column of an unfit type, a column that we do not write but that must not be null, a view that takes
/// no rows, a right that is missing: all of them at once.
pub async fn destination(
    client: &Client,
    bounds: &Bounds,
    found: &Found,
    user: &str,
) -> Result<Destination, Fault> {
    let main = found.table.quoted("");
    let Some(object) = found.get(Object::Main) else {
        return Err(Fault::operator(format!(
            "table {main} does not exist: run `host-metrics init`, or check DB_TABLE"
        )));
    };
    if let Some(version) = found.newer_version() {
        log::warn!(
            "table {main} was made by a newer version of host-metrics (schema {version}, this one knows \
             {SCHEMA_VERSION}) and is left as it is: columns that this one does not know stay empty"
        );
    }
    let mut problems = Vec::new();
    if object.kind == 'v' && !has_insert_trigger(client, bounds, object.oid).await? {
        problems.push(format!(
            "view {main} has no INSTEAD OF INSERT trigger: COPY cannot write to it otherwise; create the trigger, or \
             name the table itself in DB_TABLE"
        ));
    }
    let columns = columns(client, bounds, object.oid).await?;
    let ours: Vec<Column> = columns
        .iter()
        .filter(|c| !c.is_generated)
        .map(|c| c.column.clone())
        .collect();
    let layout = Layout::new(&ours).map_err(|messages| {
        Fault::operator(format!(
            "table {main} cannot take the records: {}",
            messages.join("; ")
        ))
    })?;
    let written = layout.column_names();
    for column in &columns {
        let name = &column.column.name;
        let is_written = written.contains(&name.as_str());
        if column.needs_value && !is_written {
            problems.push(format!(
                "column {name} of {main} is NOT NULL without a default, and no field of a record goes into it: give \
                 it a default, or let it be null"
            ));
        }
    }
    let insert = if columns
        .iter()
        .all(|c| c.may_insert || !written.contains(&c.column.name.as_str()))
    {
        Vec::new()
    } else {
        vec!["INSERT"]
    };
    let mut grants = vec![(Object::Main, insert)];
    for (object, rights) in [
        (Object::Offsets, &["SELECT", "INSERT", "UPDATE"][..]),
        (Object::Rejected, &["INSERT"][..]),
    ] {
        match found.get(object) {
            Some(there) => {
                grants.push((object, lacking(client, bounds, there.oid, rights).await?));
            }
            None => problems.push(format!(
                "table {} does not exist: run `host-metrics init`",
                found.table.quoted(object.suffix())
            )),
        }
    }
    for (object, rights) in grants.iter().filter(|(_, rights)| !rights.is_empty()) {
        problems.push(format!(
            "permission denied: GRANT {} ON {} TO \"{}\"",
            rights.join(", "),
            found.table.quoted(object.suffix()),
            user.replace('"', "\"\"")
        ));
    }
    if !problems.is_empty() {
        return Err(Fault::operator(problems.join("; ")));
    }
    Ok(Destination {
        layout,
        is_ours: found.partitioned_main().is_some(),
    })
}

/// The fields of a record that an existing table has no column for; none where the table cannot take records at all,
/// which [`destination`] says.
pub async fn not_stored(client: &Client, bounds: &Bounds, found: &Found) -> Result<Vec<&'static str>, Fault> {
    let Some(object) = found.get(Object::Main) else {
        return Ok(Vec::new());
    };
    let columns = columns(client, bounds, object.oid).await?;
    let ours: Vec<Column> = columns
        .into_iter()
        .filter(|c| !c.is_generated)
        .map(|c| c.column)
        .collect();
    Ok(Layout::new(&ours).map_or_else(|_| Vec::new(), |layout| layout.not_stored()))
}

/// Whether the object is there and this user may SELECT from it.
pub async fn may_read(
    client: &Client,
    bounds: &Bounds,
    found: &Found,
    object: Object,
) -> Result<bool, Fault> {
    match found.get(object) {
        None => Ok(false),
        Some(there) => Ok(lacking(client, bounds, there.oid, &["SELECT"]).await?.is_empty()),
    }
}

/// Brings the tables of an older version up to this one, makes the days ahead and drops what is older than `retention`,
/// without making writers wait.
///
/// What does not work out is said and left for the next time: rows of a day without a partition go to the default one.
///
/// # Errors
/// Passing only: the connection is of no further use.
pub async fn keep_days(
    client: &Client,
    bounds: &Bounds,
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
    bring_up(client, bounds, found).await?;
    let partitions = partitions(client, bounds, main).await?;
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
        let made = make_day(client, bounds, found, partitions.default.as_deref(), day).await;
        say(
            client,
            bounds,
            made,
            &format!("partition {} not made", found.table.quoted(&day.suffix())),
        )
        .await?;
    }
    if let (Some(days), Some(default)) = (retention_days, &partitions.default) {
        let deleted = delete_before(client, bounds, default, today.plus(-days)).await;
        say(
            client,
            bounds,
            deleted,
            &format!("old rows of {default} not removed"),
        )
        .await?;
    }
    for partition in too_old.into_iter().take(DROP_PARTITIONS) {
        let sql = format!(
            "BEGIN; SET LOCAL lock_timeout = '{}ms'; DROP TABLE {}; COMMIT",
            DDL_LOCK.as_millis(),
            partition.name
        );
        let dropped = execute(client, bounds, &sql).await;
        if dropped.is_ok() {
            log::info!("dropped partition {} (DB_RETENTION)", partition.name);
        }
        say(
            client,
            bounds,
            dropped,
            &format!("partition {} not dropped", partition.name),
        )
        .await?;
    }
    Ok(())
}

/// Drops, of the objects of DB_TABLE, those that carry our comment. Returns what was dropped and what was left.
pub async fn drop_ours(
    client: &Client,
    bounds: &Bounds,
    table: &TableName,
) -> Result<(Vec<String>, Vec<String>), Fault> {
    let found = find(client, bounds, table).await?;
    let (mut dropped, mut left) = (Vec::new(), Vec::new());
    let result = async {
        execute(client, bounds, "BEGIN").await?;
        execute(client, bounds, &lock(&found.table)).await?;
        let found = find(client, bounds, &found.table).await?;
        for object in Object::ALL.into_iter().rev().filter(|&object| found.has(object)) {
            let name = found.table.quoted(object.suffix());
            if found.is_ours(object) {
                execute(client, bounds, &schema::drop(object, &found.table)).await?;
                dropped.push(name);
            } else {
                left.push(name);
            }
        }
        execute(client, bounds, "COMMIT").await
    }
    .await;
    if result.is_err() {
        rollback(client, bounds).await?;
    }
    result.map(|()| (dropped, left))
}

struct CatalogueColumn {
    column: Column,
    is_generated: bool,
    /// NOT NULL, and nothing fills it by itself.
    needs_value: bool,
    may_insert: bool,
}

/// The columns in the table's order; of a domain the base type, and NOT NULL from wherever it comes.
async fn columns(client: &Client, bounds: &Bounds, oid: u32) -> Result<Vec<CatalogueColumn>, Fault> {
    const SQL: &str = "WITH RECURSIVE base (attnum, oid, typtype, typbasetype, not_null, has_default) AS ( \
            SELECT a.attnum, t.oid, t.typtype, t.typbasetype, t.typnotnull, t.typdefault IS NOT NULL \
            FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_type t ON t.oid = a.atttypid \
            WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped \
            UNION ALL \
            SELECT b.attnum, t.oid, t.typtype, t.typbasetype, b.not_null OR t.typnotnull, \
                   b.has_default OR t.typdefault IS NOT NULL \
            FROM base b JOIN pg_catalog.pg_type t ON t.oid = b.typbasetype WHERE b.typtype = 'd') \
        SELECT a.attname::text, b.oid, pg_catalog.format_type(b.oid, NULL), a.attgenerated::text <> '', \
               (a.attnotnull OR b.not_null) AND NOT (a.atthasdef OR b.has_default OR a.attidentity::text <> ''), \
               pg_catalog.has_column_privilege(a.attrelid, a.attnum, 'INSERT') \
        FROM pg_catalog.pg_attribute a JOIN base b ON b.attnum = a.attnum AND b.typtype <> 'd' \
        WHERE a.attrelid = $1 ORDER BY a.attnum";
    bounded("reading the catalogue", bounds.step, async {
        let mut columns = Vec::new();
        for row in client.query(SQL, &[&oid]).await? {
            let is_generated = row.try_get(3)?;
            columns.push(CatalogueColumn {
                column: Column {
                    name: row.try_get(0)?,
                    type_oid: row.try_get(1)?,
                    type_name: row.try_get(2)?,
                },
                is_generated,
                needs_value: row.try_get::<_, bool>(4)? && !is_generated,
                may_insert: row.try_get(5)?,
            });
        }
        Ok::<_, tokio_postgres::Error>(columns)
    })
    .await
}

async fn has_insert_trigger(client: &Client, bounds: &Bounds, oid: u32) -> Result<bool, Fault> {
    // pg_trigger.h: TRIGGER_TYPE_INSERT is 4, TRIGGER_TYPE_INSTEAD 64.
    const SQL: &str =
        "SELECT EXISTS (SELECT FROM pg_catalog.pg_trigger WHERE tgrelid = $1 AND tgtype & 68 = 68)";
    bounded("reading the catalogue", bounds.step, async {
        client.query_one(SQL, &[&oid]).await?.try_get(0)
    })
    .await
}

async fn lacking(
    client: &Client,
    bounds: &Bounds,
    oid: u32,
    rights: &[&'static str],
) -> Result<Vec<&'static str>, Fault> {
    let mut lacking = Vec::new();
    for &right in rights {
        let has: bool = bounded("reading the catalogue", bounds.step, async {
            client
                .query_one(
                    "SELECT pg_catalog.has_table_privilege($1::oid, $2::text)",
                    &[&oid, &right],
                )
                .await?
                .try_get(0)
        })
        .await?;
        if !has {
            lacking.push(right);
        }
    }
    Ok(lacking)
}

pub(super) struct Partitions {
    /// In the order of time.
    pub(super) days: Vec<Partition>,
    /// The default partition's name, quoted.
    default: Option<String>,
    /// Whether this user owns the table and may make new ones beside it.
    pub(super) may_change: bool,
}

pub(super) struct Partition {
    pub(super) oid: u32,
    /// Quoted.
    pub(super) name: String,
    /// Whole days: from the first moment of the one, rounded up, to that of the other, rounded down.
    pub(super) from: Day,
    pub(super) to: Day,
    /// Nothing was rounded, and it is a table of rows itself.
    pub(super) is_whole_days: bool,
    /// Not a page on the disk.
    pub(super) is_empty: bool,
    /// It has the triggers of a finished day.
    pub(super) has_triggers: bool,
}

pub(super) async fn partitions(client: &Client, bounds: &Bounds, oid: u32) -> Result<Partitions, Fault> {
    // The bounds are text in the catalogue, written by pg_get_expr in the session's time zone and read by the cast in
    // the same one. An unbounded side (MINVALUE, MAXVALUE) has no quotes, does not match, and is left alone.
    let sql = format!(
        "WITH bounds AS ( \
            SELECT c.oid, pg_catalog.regexp_match(pg_catalog.pg_get_expr(c.relpartbound, c.oid), \
                   '^FOR VALUES FROM [(]''([^'']+)''[)] TO [(]''([^'']+)''[)]$') AS b \
            FROM pg_catalog.pg_inherits i JOIN pg_catalog.pg_class c ON c.oid = i.inhrelid WHERE i.inhparent = $1) \
        SELECT pg_catalog.format('%I.%I', n.nspname, c.relname), \
               ceil(extract(epoch FROM b[1]::timestamptz) / 86400)::bigint, \
               floor(extract(epoch FROM b[2]::timestamptz) / 86400)::bigint, \
               extract(epoch FROM b[1]::timestamptz) % 86400 = 0 AND extract(epoch FROM b[2]::timestamptz) % 86400 = 0 \
                   AND c.relkind = 'r', \
               c.oid, pg_catalog.pg_relation_size(c.oid) = 0, {} \
        FROM bounds JOIN pg_catalog.pg_class c USING (oid) \
        JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
        WHERE b IS NOT NULL AND isfinite(b[1]::timestamptz) AND isfinite(b[2]::timestamptz) ORDER BY 2",
        has_triggers("c.oid")
    );
    const RIGHTS: &str = "SELECT pg_catalog.pg_has_role(c.relowner, 'USAGE') \
               AND pg_catalog.has_schema_privilege(c.relnamespace, 'CREATE'), \
               (SELECT pg_catalog.format('%I.%I', n.nspname, d.relname) \
                FROM pg_catalog.pg_partitioned_table p JOIN pg_catalog.pg_class d ON d.oid = p.partdefid \
                JOIN pg_catalog.pg_namespace n ON n.oid = d.relnamespace WHERE p.partrelid = c.oid) \
        FROM pg_catalog.pg_class c WHERE c.oid = $1";
    bounded("reading the partitions", bounds.step, async {
        let mut days = Vec::new();
        for row in client.query(&sql, &[&oid]).await? {
            days.push(Partition {
                name: row.try_get(0)?,
                from: Day::from_unix(row.try_get(1)?),
                to: Day::from_unix(row.try_get(2)?),
                is_whole_days: row.try_get(3)?,
                oid: row.try_get(4)?,
                // Of one that was dropped at this moment: nothing, which is no reason to count it.
                is_empty: row.try_get::<_, Option<bool>>(5)?.unwrap_or(true),
                has_triggers: row.try_get(6)?,
            });
        }
        let row = client.query_one(RIGHTS, &[&oid]).await?;
        Ok::<_, tokio_postgres::Error>(Partitions {
            days,
            may_change: row.try_get(0)?,
            default: row.try_get(1)?,
        })
    })
    .await
}

/// Makes one day's partition; what the default partition holds of that day moves.
async fn make_day(
    client: &Client,
    bounds: &Bounds,
    found: &Found,
    default: Option<&str>,
    day: Day,
) -> Result<(), Fault> {
    let mut rows = 0;
    if let Some(default) = default {
        let sql = schema::count_day(default, day, MOVE_ROWS + 1);
        rows = bounded("reading the default partition", bounds.step, async {
            client.query_one(&sql, &[]).await?.try_get::<_, i64>(0)
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
    execute(client, bounds, &sql).await?;
    log::info!(
        "made partition {} moved_rows={rows}",
        found.table.quoted(&day.suffix())
    );
    Ok(())
}

/// Removes what is older than `day` from the default partition, where no whole day can be dropped, in short transactions
/// that lock nothing but those rows.
async fn delete_before(client: &Client, bounds: &Bounds, default: &str, day: Day) -> Result<(), Fault> {
    let sql = schema::delete_before(default, day, DELETE_ROWS);
    let mut removed = 0;
    let begin = format!(
        "BEGIN; SET LOCAL statement_timeout = '{}ms'",
        READ_PARTITION.as_millis()
    );
    for _ in 0..DELETE_TIMES {
        execute(client, bounds, &begin).await?;
        let rows = bounded("removing old rows", bounds.step, client.execute(&sql, &[])).await?;
        execute(client, bounds, "COMMIT").await?;
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

/// One maker or remover of the objects of `table` at a time.
pub(super) fn lock(table: &TableName) -> String {
    let key = schema::lock_key(table);
    format!("SELECT pg_catalog.pg_advisory_xact_lock({key})")
}

pub(super) async fn execute(client: &Client, bounds: &Bounds, sql: &str) -> Result<(), Fault> {
    bounded("changing the tables", bounds.step, client.batch_execute(sql)).await
}

pub(super) async fn rollback(client: &Client, bounds: &Bounds) -> Result<(), Fault> {
    bounded("rolling back", bounds.step, client.batch_execute("ROLLBACK")).await
}

fn version_in(comment: &str) -> Option<u32> {
    let rest = comment.strip_prefix(MARK)?;
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_without_date_bin_is_named_with_what_to_do() {
        assert_eq!(too_old(140_000, "14.0"), None);
        assert_eq!(too_old(180_001, "18.1"), None);
        let text = too_old(130_014, "13.14 (Debian 13.14-1)").expect("13 is too old");
        assert!(
            text.contains("Postgres 13.14") && text.contains("14 or newer"),
            "{text}"
        );
    }
}
