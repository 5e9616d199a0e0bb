//! Makes the tables and views that are missing, brings older ones up to this version step by step, and removes ours.
//!
//! An existing table is respected: nothing here alters one that does not carry our comment, or that of a newer version.

use crate::postgres::{Fault, Session};
use crate::tables::ddl::{alone, execute};
use crate::tables::destination::{Found, find, owner};
use crate::tables::names::Object;
use crate::tables::schema::{self, Day, STEPS, Step};

/// The tables are indexed by `date_bin`, which Postgres has since this version, as `server_version_num` has it.
const POSTGRES_NEEDED: i32 = 140_000;

/// Brings what an older version made up to this one, and makes what is missing. Returns what was made.
///
/// # Errors
/// A right is missing, a name is taken, or the database does not answer. Steps that were finished before stay finished.
pub async fn make(session: &Session, today: Day) -> Result<Vec<Object>, Fault> {
    migrate(session, STEPS).await?;
    let found = find(session).await?;
    if missing(&found).is_empty() {
        return Ok(Vec::new());
    }
    if !found.has(Object::Main) {
        check_server(session).await?;
    }
    alone(session, &found.table, async || {
        // Somebody may have been quicker while we waited for the lock.
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

/// What reads or writes the columns of another object is only made where that has them: our own, of this version. What
/// belongs to a newer version's table is that version's to make.
fn missing(found: &Found) -> Vec<Object> {
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

/// Takes each step that our objects have not taken yet, with their rows: the first of `steps` leads from version 1 to 2.
/// Each step is one transaction, so that a failure leaves the version before it, whole. A user who does not own the tables
/// is told who has to do it, and goes on with the older ones.
///
/// # Errors
/// A statement of a step fails, for example because a lock is not to be had in time.
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
                "the tables of {main} were made by an older version of host-metrics, and this user does not own them; \
                 rows are stored all the same: run `host-metrics init` as their owner to bring them to schema {version}"
            );
            return Ok(());
        }
        alone(session, &found.table, async || {
            // Somebody may have been quicker while we waited for the lock.
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
        log::info!("the tables of {main} are brought to schema {version}");
    }
    Ok(())
}

/// What belongs to a table that was there before belongs to its owner, whoever we are: views read with their owner's rights.
async fn give_to_owner(session: &Session, found: &Found, object: Object) -> Result<(), Fault> {
    if !found.is_ours(Object::Main) || found.has(object) {
        return Ok(());
    }
    let owner = owner(session, found, Object::Main).await?;
    let name = found.table.quoted(object.suffix());
    execute(session, &format!("ALTER TABLE {name} OWNER TO {owner}")).await
}

async fn check_server(session: &Session) -> Result<(), Fault> {
    let sql = "SELECT current_setting('server_version_num')::integer, current_setting('server_version')";
    let row = session
        .bounded("asking the server's version", session.client.query_one(sql, &[]))
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

/// Drops, of the objects of DB_TABLE, those that carry our comment. Returns what was dropped and what was left.
///
/// # Errors
/// Something that a user built upon ours depends on it, a right is missing, or the database does not answer.
pub async fn drop_ours(session: &Session) -> Result<(Vec<String>, Vec<String>), Fault> {
    alone(session, &session.table, async || {
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
