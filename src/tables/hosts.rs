//! The SQL of the table of hosts, which `produce -c postgres:` reads and people write.
//!
//! Pure text. A version in a table of one row tells the producers that the hosts have changed. A trigger moves it before each
//! statement that changes hosts, so writers take turns and the version never goes back. NOTIFY would not do: it is lost while
//! a producer is disconnected. The function has its owner's rights, because who may change hosts needs no right to the version.

use crate::tables::names::{SEARCH_PATH, TableName, literal};

/// Appended to the name of the table of hosts.
pub const VERSION_SUFFIX: &str = "_version";
const FUNCTION_SUFFIX: &str = "_changed";

/// The columns whose change is a change of the hosts. `note` and `error` are not.
const COLUMNS: &str = "address, frequency, options, regex, enabled";

pub(super) fn create(table: &TableName, suffix: &str) -> String {
    let (hosts, version, function) = names(table, suffix);
    let body = format!(
        "BEGIN\n    IF TG_LEVEL = 'ROW' THEN\n        NEW.updated_at := now();\n        NEW.error := NULL;\n        \
         RETURN NEW;\n    END IF;\n    UPDATE {version} SET version = version + 1;\n    RETURN NULL;\nEND"
    );
    format!(
        "CREATE TABLE IF NOT EXISTS {hosts} (\n    address text COLLATE \"C\" PRIMARY KEY,\n    frequency text NOT NULL,\n    \
             options text,\n    regex text,\n    enabled boolean NOT NULL DEFAULT true,\n    note text,\n    error text,\n    \
             updated_at timestamptz NOT NULL DEFAULT now()\n);\n\
         CREATE TABLE IF NOT EXISTS {version} (version bigint NOT NULL);\n\
         INSERT INTO {version} SELECT 0 WHERE NOT EXISTS (SELECT FROM {version});\n\
         GRANT SELECT ON {version} TO PUBLIC;\n\
         CREATE OR REPLACE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER\n    \
             SET search_path = {SEARCH_PATH} AS {};\n\
         CREATE OR REPLACE TRIGGER version BEFORE INSERT OR DELETE OR TRUNCATE OR UPDATE OF {COLUMNS} ON {hosts}\n    \
             FOR EACH STATEMENT EXECUTE FUNCTION {function}();\n\
         CREATE OR REPLACE TRIGGER updated BEFORE UPDATE OF {COLUMNS} ON {hosts}\n    \
             FOR EACH ROW EXECUTE FUNCTION {function}();\n",
        literal(&body)
    )
}

/// Removes the table and what belongs to it.
pub(super) fn drop(table: &TableName, suffix: &str) -> String {
    let (hosts, version, function) = names(table, suffix);
    format!(
        "DROP TABLE IF EXISTS {hosts}; DROP TABLE IF EXISTS {version}; DROP FUNCTION IF EXISTS {function}();"
    )
}

fn names(table: &TableName, suffix: &str) -> (String, String, String) {
    (
        table.quoted(suffix),
        table.quoted(&format!("{suffix}{VERSION_SUFFIX}")),
        table.quoted(&format!("{suffix}{FUNCTION_SUFFIX}")),
    )
}
