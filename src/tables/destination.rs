//! Which of DB_TABLE's objects exist, their columns, and this user's rights on them.
//!
//! Owns the queries of Postgres' catalogue, and changes nothing; `migrate` does.

use std::collections::BTreeSet;

use crate::postgres::{Fault, Session};
use crate::tables::names::{Object, TableName, quoted};
use crate::tables::row::{Column, Layout};
use crate::tables::schema::{MARK, SCHEMA_VERSION};

/// DB_TABLE with its schema, and which of its objects exist.
#[derive(Clone, Debug)]
pub struct ExistingObjects {
    /// Always with its schema, even if DB_TABLE does not name one.
    pub table: TableName,
    objects: Vec<ExistingObject>,
}

#[derive(Clone, Debug)]
struct ExistingObject {
    object: Object,
    oid: u32,
    /// `pg_class.relkind`: r table, p partitioned, v view, f foreign, m materialised.
    kind: char,
    /// The version in host-metrics' comment; `None`: host-metrics did not create it.
    version: Option<u32>,
    is_owned: bool,
    /// Quoted.
    owner: String,
    /// Those of SELECT, INSERT and UPDATE that this user lacks on all of it.
    missing_rights: Vec<String>,
}

impl ExistingObjects {
    pub fn has(&self, object: Object) -> bool {
        self.get(object).is_some()
    }

    /// Whether host-metrics created the object: it has its comment.
    pub fn is_ours(&self, object: Object) -> bool {
        self.get(object).is_some_and(|found| found.version.is_some())
    }

    /// Whether host-metrics created the object, in this version or a newer one, which has at least the same columns.
    pub fn is_current(&self, object: Object) -> bool {
        self.get(object)
            .is_some_and(|found| found.version >= Some(SCHEMA_VERSION))
    }

    /// The oid of the main table, if host-metrics created it partitioned by day.
    pub(super) fn partitioned_main(&self) -> Option<u32> {
        self.get(Object::Main)
            .filter(|main| main.kind == 'p' && main.version.is_some())
            .map(|main| main.oid)
    }

    /// The objects that a version before `version` created; none if the main table is newer, because they belong to it.
    pub(super) fn older_than(&self, version: u32) -> Vec<Object> {
        let version_of = |object| self.get(object).and_then(|found| found.version);
        if version_of(Object::Main) > Some(version) {
            return Vec::new();
        }
        let is_older = |object: &Object| version_of(*object).is_some_and(|found| found < version);
        Object::ALL.into_iter().filter(is_older).collect()
    }

    /// Whether this user owns the object and so may alter it.
    pub(super) fn is_owned(&self, object: Object) -> bool {
        self.get(object).is_some_and(|found| found.is_owned)
    }

    /// The owner of the main table, quoted.
    pub(super) fn owner(&self) -> Option<&str> {
        self.get(Object::Main).map(|main| main.owner.as_str())
    }

    /// Whether the object exists and this user may SELECT from it.
    pub fn may_read(&self, object: Object) -> bool {
        self.get(object)
            .is_some_and(|found| !found.missing_rights.iter().any(|right| right == "SELECT"))
    }

    fn get(&self, object: Object) -> Option<&ExistingObject> {
        self.objects.iter().find(|found| found.object == object)
    }

    /// The version of the main table, if a newer host-metrics created it.
    pub fn newer_version(&self) -> Option<u32> {
        let version = self.get(Object::Main)?.version?;
        (version > SCHEMA_VERSION).then_some(version)
    }
}

/// Looks up which objects of DB_TABLE exist.
pub async fn find(session: &Session) -> Result<ExistingObjects, Fault> {
    const OBJECTS: &str = "SELECT c.relname::text, c.oid, c.relkind::text, \
                pg_catalog.obj_description(c.oid, 'pg_class'), pg_catalog.pg_has_role(c.relowner, 'USAGE'), \
                pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(c.relowner)), \
                ARRAY(SELECT r FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE']) r \
                      WHERE NOT pg_catalog.has_table_privilege(c.oid, r)) \
         FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
         WHERE n.nspname = $1::text AND c.relname = ANY ($2::text[])";
    let table = session.table.clone();
    session
        .bounded("reading the table's definition", async {
            let names = Object::ALL.map(|object| format!("{}{}", table.name, object.suffix()));
            let mut objects = Vec::new();
            for row in session
                .client
                .query(OBJECTS, &[&table.schema, &names.as_slice()])
                .await?
            {
                let name: String = row.try_get(0)?;
                let kind: String = row.try_get(2)?;
                let comment: Option<String> = row.try_get(3)?;
                let object = Object::ALL
                    .into_iter()
                    .zip(&names)
                    .find(|(_, known)| **known == name);
                if let Some((object, _)) = object {
                    objects.push(ExistingObject {
                        object,
                        oid: row.try_get(1)?,
                        kind: kind.chars().next().unwrap_or_default(),
                        version: comment.as_deref().and_then(version_in),
                        is_owned: row.try_get(4)?,
                        owner: row.try_get(5)?,
                        missing_rights: row.try_get(6)?,
                    });
                }
            }
            Ok::<_, Fault>(ExistingObjects { table, objects })
        })
        .await
}

/// How rows are written to the table. Reads columns and rights, and checks that rows can be written.
///
/// # Errors
/// All problems for the operator at once: a column whose type does not fit, a column that must not be null but gets no
/// value, missing rights.
pub async fn layout(session: &Session, found: &ExistingObjects, user: &str) -> Result<Layout, Fault> {
    let main = found.table.quoted("");
    let Some(object) = found.get(Object::Main) else {
        return Err(Fault::operator(format!(
            "table {main} does not exist: run `host-metrics init`, or check DB_TABLE"
        )));
    };
    if let Some(version) = found.newer_version() {
        log::warn!(
            "table {main} was created by a newer version of host-metrics (schema {version}, this one knows \
             {SCHEMA_VERSION}) and is not changed: columns that this version does not know stay empty"
        );
    }
    let mut problems = Vec::new();
    let columns = columns(session, object.oid).await?;
    let layout = layout_of(&columns).map_err(|messages| {
        Fault::operator(format!(
            "table {main} cannot take the records: {}",
            messages.join("; ")
        ))
    })?;
    let written = layout.column_names();
    let is_written = |column: &CatalogueColumn| written.contains(&column.column.name.as_str());
    let unfilled = columns.iter().filter(|c| c.needs_value && !is_written(c));
    problems.extend(unfilled.map(|column| {
        format!(
            "column {} of {main} is NOT NULL without a default, and no field of a record fills it: give it a default, \
             or allow null",
            column.column.name
        )
    }));
    if columns.iter().any(|c| is_written(c) && !c.may_insert) {
        problems.push(grant(found, Object::Main, &["INSERT"], user));
    }
    problems.extend(problems_of_other_tables(found, user));
    if !problems.is_empty() {
        return Err(Fault::operator(problems.join("; ")));
    }
    Ok(layout)
}

fn layout_of(columns: &[CatalogueColumn]) -> Result<Layout, Vec<String>> {
    let filled = columns.iter().filter(|c| !c.is_generated);
    let filled: Vec<Column> = filled.map(|c| c.column.clone()).collect();
    Layout::new(&filled)
}

fn problems_of_other_tables(found: &ExistingObjects, user: &str) -> Vec<String> {
    let mut problems = Vec::new();
    for (object, mut rights) in [
        (Object::Offsets, vec!["SELECT", "INSERT", "UPDATE"]),
        (Object::Rejected, vec!["INSERT"]),
    ] {
        let Some(table) = found.get(object) else {
            problems.push(format!(
                "table {} does not exist: run `host-metrics init`",
                found.table.quoted(object.suffix())
            ));
            continue;
        };
        rights.retain(|right| table.missing_rights.iter().any(|missing| missing == right));
        if !rights.is_empty() {
            problems.push(grant(found, object, &rights, user));
        }
    }
    problems
}

fn grant(found: &ExistingObjects, object: Object, rights: &[&str], user: &str) -> String {
    let table = found.table.quoted(object.suffix());
    let user = quoted(user);
    format!(
        "permission denied: GRANT {} ON {table} TO {user}",
        rights.join(", ")
    )
}

/// The fields of a record that an existing table has no column for; empty if the table cannot take records at all, which
/// [`layout`] reports.
pub async fn not_stored(session: &Session, found: &ExistingObjects) -> Result<Vec<&'static str>, Fault> {
    let Some(object) = found.get(Object::Main) else {
        return Ok(Vec::new());
    };
    let layout = layout_of(&columns(session, object.oid).await?);
    Ok(layout.map_or_else(|_| Vec::new(), |layout| layout.not_stored()))
}

/// The names of the columns of a table, whose name is quoted. Empty if there is no such table.
pub async fn column_names(session: &Session, main: &str) -> Result<BTreeSet<String>, Fault> {
    let sql = "SELECT attname::text FROM pg_catalog.pg_attribute \
               WHERE attrelid = pg_catalog.to_regclass($1) AND attnum > 0 AND NOT attisdropped";
    let rows = session
        .bounded(
            "reading the table's definition",
            session.client.query(sql, &[&main]),
        )
        .await?;
    let names: Result<_, _> = rows.iter().map(|row| row.try_get(0)).collect();
    Ok(names?)
}

struct CatalogueColumn {
    column: Column,
    is_generated: bool,
    /// NOT NULL without a default.
    needs_value: bool,
    may_insert: bool,
}

/// The columns in the order of the table. A domain is replaced by its base type; its NOT NULL and its default count.
async fn columns(session: &Session, oid: u32) -> Result<Vec<CatalogueColumn>, Fault> {
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
    session
        .bounded("reading the table's definition", async {
            let mut columns = Vec::new();
            for row in session.client.query(SQL, &[&oid]).await? {
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

fn version_in(comment: &str) -> Option<u32> {
    let rest = comment.strip_prefix(MARK)?;
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}
