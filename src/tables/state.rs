//! The tables of the state in SQL: their creation, and the statements of a flush.
//!
//! Pure text. `consume::fold` computes the rows, and `consume::state` runs the statements.

use std::fmt::Write as _;

use crate::tables::buckets::WIDTHS;
use crate::tables::names::{Object, TableName};

/// A column: its name, its type, and what follows the type in CREATE TABLE.
type Column = (&'static str, &'static str, &'static str);

/// One of the tables of the state.
#[derive(Debug)]
pub struct StateTable {
    pub object: Object,
    columns: &'static [Column],
    /// The primary key.
    key: &'static str,
    /// Another index: the suffix of its name, and its columns.
    index: Option<(&'static str, &'static str)>,
    /// Leaves space on each page for updated rows.
    fillfactor: u8,
}

/// A row for each host and place.
pub const SERIES: StateTable = StateTable {
    object: Object::Series,
    columns: &[
        ("series_id", "bigint", "NOT NULL"),
        ("address", "text", "COLLATE \"C\" NOT NULL"),
        // Empty if the records have no agent.
        ("agent", "text", "COLLATE \"C\" NOT NULL"),
        // The newest record of any kind.
        ("last_seen_at", "timestamptz", ""),
        ("interval_seconds", "double precision", ""),
        // Of the newest record, for people.
        ("name", "text", ""),
        ("\"group\"", "text", ""),
        ("is_valid", "boolean", ""),
        ("since", "timestamptz", ""),
        ("first_check_at", "timestamptz", ""),
        ("last_check_at", "timestamptz", ""),
        ("outcome", "text", ""),
        ("error", "text", ""),
        ("failures_in_a_row", "bigint", ""),
        ("last_failed_at", "timestamptz", ""),
        ("last_failed_outcome", "text", ""),
        ("last_error", "text", ""),
        ("cert_expires_at", "timestamptz", ""),
        ("cert_seen_at", "timestamptz", ""),
        // Of the host: the same in all of its rows.
        ("verdict", "text", ""),
        ("verdict_since", "timestamptz", ""),
    ],
    key: "series_id",
    index: Some(("_series_address", "address, agent")),
    fillfactor: 50,
};

/// A row for each series and bucket. Zero is stored as null, which takes no space.
///
/// `seconds`, the same in a whole partition, is not part of the key, which saves 8 of 36 bytes of index per row.
pub const ROLLUPS: StateTable = StateTable {
    object: Object::Rollups,
    columns: &[
        ("series_id", "bigint", "NOT NULL"),
        ("starts_at", "timestamptz", "NOT NULL"),
        ("latency_us", "bigint", ""),
        // 300, 3600 or 86400.
        ("seconds", "integer", "NOT NULL"),
        ("due", "integer", "NOT NULL"),
        ("valid", "integer", ""),
        ("failed", "integer", ""),
        ("missed", "integer", ""),
        ("offline", "integer", ""),
        ("slow", "integer", ""),
        ("latency_max_us", "integer", ""),
        ("dns_10us", "integer", ""),
        ("connect_10us", "integer", ""),
        ("tls_10us", "integer", ""),
        ("ttfb_10us", "integer", ""),
        ("body_10us", "integer", ""),
        ("outcomes", "jsonb", ""),
        ("histogram", "numeric", ""),
    ],
    key: "starts_at, series_id",
    index: None,
    fillfactor: 100,
};

/// A row for each outage of a host.
pub const INCIDENTS: StateTable = StateTable {
    object: Object::Incidents,
    columns: &[
        ("address", "text", "COLLATE \"C\" NOT NULL"),
        ("number", "bigint", "NOT NULL"),
        ("started_at", "timestamptz", "NOT NULL"),
        ("ended_at", "timestamptz", ""),
        ("checks", "bigint", "NOT NULL"),
        ("first_outcome", "text", "NOT NULL"),
        ("most_frequent_outcome", "text", "NOT NULL"),
        ("last_outcome", "text", "NOT NULL"),
        ("outcomes", "jsonb", "NOT NULL"),
        ("places", "jsonb", "NOT NULL"),
        ("last_error", "text", ""),
    ],
    key: "address, number",
    index: Some(("_incidents_ended", "ended_at")),
    fillfactor: 90,
};

/// Each flush writes the buckets of its records again. With autovacuum's default, a fifth of the table, a year of hours would have
/// 250 MB of old rows.
const VACUUM: &str = "autovacuum_vacuum_scale_factor = 0.02";

impl StateTable {
    /// Creates the table if it is missing. `index_name` makes the name of an index from its suffix.
    pub fn create(&self, table: &TableName, index_name: impl FnOnce(&str) -> String) -> String {
        let name = table.quoted(self.object.suffix());
        let mut sql = format!("CREATE TABLE IF NOT EXISTS {name} (\n");
        for (column, kind, rest) in self.columns {
            let _ = writeln!(sql, "{},", format!("    {column} {kind} {rest}").trim_end());
        }
        if self.object == Object::Incidents {
            sql.push_str("    duration interval GENERATED ALWAYS AS (ended_at - started_at) STORED,\n");
        }
        let key = format!("PRIMARY KEY ({})", self.key);
        if self.object == Object::Rollups {
            // Each partition has statistics of its own, and an index that grows at its end.
            sql.truncate(sql.trim_end().len() - 1);
            sql.push_str("\n) PARTITION BY LIST (seconds);\n");
            for seconds in WIDTHS {
                let part = rollups_of(table, seconds);
                let _ = writeln!(
                    sql,
                    "CREATE TABLE IF NOT EXISTS {part} PARTITION OF {name} ({key}) FOR VALUES IN ({seconds}) WITH ({VACUUM});"
                );
            }
        } else {
            let _ = writeln!(sql, "    {key}\n) WITH (fillfactor = {});", self.fillfactor);
        }
        if let Some((suffix, columns)) = self.index {
            let index = index_name(suffix);
            let _ = writeln!(sql, "CREATE INDEX IF NOT EXISTS {index} ON {name} ({columns});");
        }
        sql
    }

    /// Inserts rows, or replaces those with the same key. The parameters are an array for each column.
    pub fn put(&self, table: &TableName) -> String {
        let name = table.quoted(self.object.suffix());
        let is_key = |column: &str| self.key.split(", ").any(|key| key == column);
        let (mut names, mut arrays, mut values, mut updates) = (vec![], vec![], vec![], vec![]);
        for (number, (column, kind, _)) in (1..).zip(self.columns) {
            names.push(*column);
            arrays.push(format!("${number}::{}[]", sent_as(kind)));
            values.push(format!("s.{column}::{kind}"));
            if !is_key(column) {
                updates.push(format!("{column} = excluded.{column}"));
            }
        }
        let (names, updates) = (names.join(", "), updates.join(", "));
        format!(
            "INSERT INTO {name} ({names}) SELECT {} FROM unnest({}) s ({names}) \
             ON CONFLICT ({}) DO UPDATE SET {updates}",
            values.join(", "),
            arrays.join(", "),
            self.key
        )
    }

    /// The columns as they are read, for a SELECT from `alias`.
    fn read(&self, alias: &str) -> String {
        let column = |(name, kind, _): &Column| match *kind {
            "jsonb" => format!("{alias}.{name}::text AS {name}"),
            _ => format!("{alias}.{name}"),
        };
        self.columns.iter().map(column).collect::<Vec<_>>().join(", ")
    }
}

/// JSON is sent as text.
fn sent_as(kind: &str) -> &str {
    match kind {
        "jsonb" => "text",
        kind => kind,
    }
}

/// The partition of `_rollups` for buckets of that width, quoted.
pub fn rollups_of(table: &TableName, seconds: i32) -> String {
    table.quoted(&format!("{}_{seconds}", Object::Rollups.suffix()))
}

/// Creates missing series; the parameters are numbers, hosts and places, in the order of hosts and places. Two consumers may
/// read records of a new host, because its partition has changed; then the row exists and can be locked.
pub fn add_series(table: &TableName) -> String {
    format!(
        "INSERT INTO {} (series_id, address, agent) SELECT * FROM unnest($1::bigint[], $2::text[], $3::text[]) s \
         ON CONFLICT DO NOTHING",
        table.quoted(Object::Series.suffix())
    )
}

/// Reads and locks all series of these hosts.
pub fn read_series(table: &TableName) -> String {
    format!(
        "SELECT {} FROM {} t WHERE address = ANY ($1::text[]) ORDER BY address, agent FOR UPDATE",
        SERIES.read("t"),
        table.quoted(Object::Series.suffix())
    )
}

/// Reads the newest incident of each of these hosts.
pub fn read_incidents(table: &TableName) -> String {
    format!(
        "SELECT {} FROM unnest($1::text[]) host (address) CROSS JOIN LATERAL ( \
             SELECT * FROM {} WHERE address = host.address ORDER BY number DESC LIMIT 1 \
         ) t",
        INCIDENTS.read("t"),
        table.quoted(Object::Incidents.suffix())
    )
}

/// Reads and deletes the buckets with these widths, starts and series. They are then written again, with all others, by
/// [`copy_rollups`]; an update would write new rows as well.
pub fn take_rollups(table: &TableName) -> String {
    format!(
        "DELETE FROM {} t USING unnest($1::integer[], $2::timestamptz[], $3::bigint[]) k (seconds, starts_at, series_id) \
         WHERE t.seconds = k.seconds AND t.starts_at = k.starts_at AND t.series_id = k.series_id RETURNING {}",
        table.quoted(Object::Rollups.suffix()),
        ROLLUPS.read("t")
    )
}

/// The columns are those of [`ROLLUPS`].
pub fn copy_rollups(table: &TableName) -> String {
    let columns: Vec<&str> = ROLLUPS.columns.iter().map(|(name, ..)| *name).collect();
    format!(
        "COPY {} ({}) FROM STDIN (FORMAT binary)",
        table.quoted(Object::Rollups.suffix()),
        columns.join(", ")
    )
}

/// Deletes incidents and series whose buckets have been deleted, and what belongs to no series. The newest incident of a host has
/// its last number and the time since when it is up, so it stays as long as the host.
pub fn delete_old(table: &TableName, before: &str) -> String {
    let [series, incidents, windows] =
        [Object::Series, Object::Incidents, Object::Windows].map(|object| table.quoted(object.suffix()));
    format!(
        "DELETE FROM {series} WHERE last_seen_at < {before}; \
         DELETE FROM {windows} t WHERE NOT EXISTS (SELECT FROM {series} WHERE address = t.address AND (t.is_host OR agent = t.agent)); \
         DELETE FROM {incidents} t WHERE ended_at < {before} \
             AND EXISTS (SELECT FROM {incidents} later WHERE later.address = t.address AND later.number > t.number); \
         DELETE FROM {incidents} t WHERE NOT EXISTS (SELECT FROM {series} WHERE address = t.address);"
    )
}
