//! The tables of the state as SQL: what makes them, and the statements of one flush.
//!
//! Pure text. What is folded into them is `consume::fold`'s; `consume::state` runs the statements.

use std::fmt::Write as _;

use crate::consume::fold::rollup::WIDTHS;
use crate::tables::names::{Object, TableName};

/// A column: its name, its type, and what stands behind the type where the table is made.
type Column = (&'static str, &'static str, &'static str);

/// One of the tables of the state.
#[derive(Debug)]
pub struct StateTable {
    pub object: Object,
    columns: &'static [Column],
    /// The primary key.
    key: &'static str,
    /// A further index, with the end of its name.
    index: Option<(&'static str, &'static str)>,
    /// Rows that are changed with every flush find room on their page.
    fillfactor: u8,
}

/// A row for each host and place.
pub const SERIES: StateTable = StateTable {
    object: Object::Series,
    columns: &[
        ("series_id", "bigint", "NOT NULL"),
        ("address", "text", "COLLATE \"C\" NOT NULL"),
        // Empty where the records name no agent.
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
        // The host's: the same in all of its rows.
        ("verdict", "text", ""),
        ("verdict_since", "timestamptz", ""),
    ],
    key: "series_id",
    index: Some(("_series_address", "address, agent")),
    fillfactor: 50,
};

/// A row for each series and bucket. Zero is stored as null where zero is the rule: that takes no space.
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
    key: "seconds, starts_at, series_id",
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

impl StateTable {
    /// Makes it where it is missing. `index_name`: the index's name from the end of it.
    pub fn create(&self, table: &TableName, index_name: impl FnOnce(&str) -> String) -> String {
        let name = table.quoted(self.object.suffix());
        let mut sql = format!("CREATE TABLE IF NOT EXISTS {name} (\n");
        for (column, kind, rest) in self.columns {
            let _ = writeln!(sql, "{},", format!("    {column} {kind} {rest}").trim_end());
        }
        if self.object == Object::Incidents {
            sql.push_str("    duration interval GENERATED ALWAYS AS (ended_at - started_at) STORED,\n");
        }
        let _ = write!(sql, "    PRIMARY KEY ({})\n)", self.key);
        if self.object == Object::Rollups {
            // The planner then knows how few buckets of a width there are, and each has its own index, which grows at its end.
            sql.push_str(" PARTITION BY LIST (seconds);\n");
            for seconds in WIDTHS {
                let part = table.quoted(&format!("{}_{seconds}", self.object.suffix()));
                let _ = writeln!(
                    sql,
                    "CREATE TABLE IF NOT EXISTS {part} PARTITION OF {name} FOR VALUES IN ({seconds});"
                );
            }
        } else {
            let _ = writeln!(sql, " WITH (fillfactor = {});", self.fillfactor);
        }
        if let Some((suffix, columns)) = self.index {
            let index = index_name(suffix);
            let _ = writeln!(sql, "CREATE INDEX IF NOT EXISTS {index} ON {name} ({columns});");
        }
        sql
    }

    /// One array for each column, in their order: rows that are there are replaced.
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

    /// The columns of the alias, in their order, as they are read.
    fn read(&self, alias: &str) -> String {
        let column = |(name, kind, _): &Column| match *kind {
            "jsonb" => format!("{alias}.{name}::text AS {name}"),
            _ => format!("{alias}.{name}"),
        };
        self.columns.iter().map(column).collect::<Vec<_>>().join(", ")
    }
}

/// JSON travels as text.
fn sent_as(kind: &str) -> &str {
    match kind {
        "jsonb" => "text",
        kind => kind,
    }
}

/// Numbers, hosts and places of series, in the order of hosts and places: makes those that are missing. A host of which
/// two consumers read records, because its partition changed, is so there to be locked by one of them.
pub fn add_series(table: &TableName) -> String {
    format!(
        "INSERT INTO {} (series_id, address, agent) SELECT * FROM unnest($1::bigint[], $2::text[], $3::text[]) s \
         ON CONFLICT DO NOTHING",
        table.quoted(Object::Series.suffix())
    )
}

/// All series of these hosts, locked.
pub fn read_series(table: &TableName) -> String {
    format!(
        "SELECT {} FROM {} t WHERE address = ANY ($1::text[]) ORDER BY address, agent FOR UPDATE",
        SERIES.read("t"),
        table.quoted(Object::Series.suffix())
    )
}

/// The newest incident of each of these hosts.
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
/// [`copy_rollups`]; to update a row is to write a new one, too.
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

/// Removes at most `limit` buckets of that width that began before `before` (an expression).
pub fn delete_rollups(table: &TableName, seconds: i32, before: &str, limit: i64) -> String {
    let name = table.quoted(Object::Rollups.suffix());
    format!(
        "DELETE FROM {name} WHERE seconds = {seconds} AND ctid = ANY (ARRAY( \
         SELECT ctid FROM {name} WHERE seconds = {seconds} AND starts_at < {before} LIMIT {limit} \
         FOR UPDATE SKIP LOCKED))"
    )
}

/// Removes what is left of hosts and outages whose buckets are gone.
pub fn delete_old(table: &TableName, before: &str) -> String {
    format!(
        "DELETE FROM {} WHERE ended_at < {before}; DELETE FROM {} WHERE last_seen_at < {before};",
        table.quoted(Object::Incidents.suffix()),
        table.quoted(Object::Series.suffix())
    )
}
