//! Creates missing tables and views, migrates older ones step by step, and drops what host-metrics created.
//!
//! Objects without host-metrics' comment, and those of a newer version, are never changed.

use crate::postgres::{Fault, Kind, Session};
use crate::tables::ddl::{exclusively, execute};
use crate::tables::destination::{ExistingObjects, find};
use crate::tables::names::Object;
use crate::tables::schema::{self, Day, STEPS, Step};

/// The first version with `date_bin`, which the index of the main table needs; in the form of `server_version_num`.
const POSTGRES_NEEDED: i32 = 140_000;

/// DB_TABLE's objects after [`make`].
pub struct Made {
    pub found: ExistingObjects,
    /// What was created.
    pub made: Vec<Object>,
    /// Why something could not be created. Many users may write but not create, so that is an error only if something that is
    /// needed is missing.
    pub not_made: Option<Fault>,
}

impl Made {
    /// Adds to an error for the operator why what is missing could not be created.
    pub fn explain(&self, fault: Fault) -> Fault {
        match &self.not_made {
            Some(why) if fault.kind == Kind::Operator => Fault {
                text: format!("{fault} (this user could not create what is missing: {why})"),
                ..fault
            },
            _ => fault,
        }
    }
}

/// Migrates older objects and creates missing ones, if this user may.
///
/// # Errors
/// The database does not answer. Finished steps stay finished.
pub async fn make(session: &Session, today: Day) -> Result<Made, Fault> {
    let (made, not_made) = match make_missing(session, today).await {
        Ok(made) => (made, None),
        Err(fault) if fault.kind == Kind::Operator => (Vec::new(), Some(fault)),
        Err(fault) => return Err(fault),
    };
    let found = find(session).await?;
    Ok(Made {
        found,
        made,
        not_made,
    })
}

async fn make_missing(session: &Session, today: Day) -> Result<Vec<Object>, Fault> {
    migrate(session, STEPS).await?;
    let found = find(session).await?;
    if missing(&found).is_empty() {
        return Ok(Vec::new());
    }
    if !found.has(Object::Main) {
        check_server(session).await?;
    }
    exclusively(session, &found.table, async || {
        // Another process may have created them while this one waited for the lock.
        let found = find(session).await?;
        let missing = missing(&found);
        for &object in &missing {
            let sql = schema::create(object, &found.table, Day::ahead(today, true));
            execute(session, &sql).await?;
            give_to_owner(session, &found, object).await?;
        }
        Ok(missing)
    })
    .await
}

/// What can be created. A view is left out if an object that it reads is another program's or of an older version, because
/// that may lack the columns. Nothing is added to the tables of a newer version.
fn missing(found: &ExistingObjects) -> Vec<Object> {
    let is_fit = |object: &Object| !found.has(*object) || found.is_current(*object);
    let may_make = |object: &Object| match object {
        Object::Latest => is_fit(&Object::Main) && is_fit(&Object::Series),
        object if object.is_view() => Object::STATE.iter().all(is_fit),
        _ => true,
    };
    Object::ALL
        .into_iter()
        .filter(|object| !found.has(*object) && may_make(object))
        .filter(|_| found.newer_version().is_none())
        .collect()
}

/// Applies the steps that the objects still need; the first of `steps` leads from version 1 to 2. Each step is one
/// transaction, so a failure leaves the previous version intact. If this user does not own the tables, the log says who has
/// to migrate them, and the older tables stay in use.
pub async fn migrate(session: &Session, steps: &[Step]) -> Result<(), Fault> {
    for (step, version) in steps.iter().zip(2..) {
        let found = find(session).await?;
        let older = found.older_than(version);
        if older.is_empty() {
            continue;
        }
        let main = found.table.quoted("");
        if !older.iter().all(|&object| found.is_owned(object)) {
            log::warn!(
                "the tables of {main} were created by an older version of host-metrics, and this user does not own them; \
                 rows are still stored; run `host-metrics init` as their owner to migrate them to schema {version}"
            );
            return Ok(());
        }
        exclusively(session, &found.table, async || {
            // Another process may have applied it while this one waited for the lock.
            let found = find(session).await?;
            for object in found.older_than(version) {
                if let Some(sql) = step(object, &found.table) {
                    execute(session, &sql).await?;
                }
                execute(session, &schema::mark(object, &found.table, version)).await?;
            }
            Ok(())
        })
        .await?;
        log::info!("migrated the tables of {main} to schema {version}");
    }
    Ok(())
}

/// What belongs to a table that was there before belongs to its owner, whoever we are: views read with their owner's rights.
async fn give_to_owner(session: &Session, found: &ExistingObjects, object: Object) -> Result<(), Fault> {
    match found.owner() {
        Some(owner) if found.is_ours(Object::Main) && !found.has(object) => {
            let name = found.table.quoted(object.suffix());
            execute(session, &format!("ALTER TABLE {name} OWNER TO {owner}")).await
        }
        _ => Ok(()),
    }
}

async fn check_server(session: &Session) -> Result<(), Fault> {
    let sql = "SELECT current_setting('server_version_num')::integer, current_setting('server_version')";
    let row = session
        .bounded("asking the server's version", session.client.query_one(sql, &[]))
        .await?;
    let (number, version): (i32, &str) = (row.try_get(0)?, row.try_get(1)?);
    if number >= POSTGRES_NEEDED {
        return Ok(());
    }
    Err(Fault::operator(format!(
        "this server is Postgres {version}, but the tables of host-metrics need {} or newer: upgrade it, or create a table of \
         your own (four columns are enough: address, latency, status_code, is_valid)",
        POSTGRES_NEEDED / 10_000
    )))
}

/// Drops the objects of DB_TABLE that carry host-metrics' comment. Returns the names of the dropped and of the other objects.
///
/// # Errors
/// Something that a user built upon ours depends on it, a right is missing, or the database does not answer.
pub async fn drop_ours(session: &Session) -> Result<(Vec<String>, Vec<String>), Fault> {
    exclusively(session, &session.table, async || {
        let (mut dropped, mut left) = (Vec::new(), Vec::new());
        let found = find(session).await?;
        for object in Object::ALL.into_iter().rev().filter(|&object| found.has(object)) {
            let name = found.table.quoted(object.suffix());
            if found.is_ours(object) {
                execute(session, &schema::drop(object, &found.table)).await?;
                dropped.push(name);
            } else {
                left.push(name);
            }
        }
        Ok((dropped, left))
    })
    .await
}
