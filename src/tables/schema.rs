//! The SQL that creates and drops tables and views, and that changes partitions.
//!
//! Pure text, used by `init`, `init --print-sql`, `drop` and `consume`. `migrate` and `days` run it; the queries of the views
//! are in `views`.

use std::fmt::Write as _;
use std::ops::Range;

use crate::sample::Timestamp;
use crate::tables::hosts;
use crate::tables::names::{Object, SEARCH_PATH, TableName, literal, quoted};
use crate::tables::state::{INCIDENTS, ROLLUPS, SERIES};
use crate::tables::views::{self, HOUR};
use crate::tables::windows;

/// The version in the comment of everything that [`create`] creates: 1, and one more for each of [`STEPS`].
pub const SCHEMA_VERSION: u32 = 1 + STEPS.len() as u32;

/// One migration: the SQL that changes an object of the previous version, `None` if it stays as it is. A new object needs no
/// step, because missing objects are created.
pub type Step = fn(Object, &TableName) -> Option<String>;

/// The first leads from version 1 to 2. A released step is never changed; [`create`] creates the result of all steps.
pub const STEPS: &[Step] = &[];

/// How the comment of each object begins that host-metrics created; `drop` drops nothing else.
pub const MARK: &str = "host-metrics schema ";

/// Partitions are created this many days ahead: a consumer that may not create tables can go a week without `init`.
pub const DAYS_AHEAD: i64 = 7;

/// A new table gets partitions for this many past days: what a topic holds with Kafka's default retention.
const DAYS_BEHIND: i64 = 7;

/// A column of the main table and its type, in the table's order.
///
/// This order reads best in `SELECT *`; sorted by alignment a row would be 3 % smaller (215 instead of 222 bytes with an
/// address of 41 bytes).
pub const COLUMNS: [(&str, &str); 23] = [
    // Byte order is quicker to compare than the database's collation, and the index does not depend on the locale.
    ("address", "text COLLATE \"C\" NOT NULL"),
    ("scheduled_at", "timestamptz"),
    ("is_valid", "boolean NOT NULL"),
    ("outcome", "text"),
    ("status_code", "smallint"),
    ("latency", "double precision"),
    ("error", "text"),
    ("started_at", "timestamptz"),
    ("interval_seconds", "double precision"),
    ("regex_matched", "boolean"),
    ("dns_seconds", "real"),
    ("connect_seconds", "real"),
    ("tls_seconds", "real"),
    ("ttfb_seconds", "real"),
    ("body_seconds", "real"),
    ("ip", "inet"),
    ("redirects", "integer"),
    ("body_bytes", "bigint"),
    ("cert_expires_at", "timestamptz"),
    ("agent", "text"),
    ("kafka_topic", "text"),
    ("kafka_partition", "integer"),
    ("kafka_offset", "bigint"),
];

const DAY_MICROS: i64 = 86_400_000_000;

/// A day in UTC, as days since 1970-01-01.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Day(i64);

impl Day {
    pub fn of(at: Timestamp) -> Self {
        Self(at.unix_micros().div_euclid(DAY_MICROS))
    }

    /// The day that begins `days` after 1970-01-01.
    pub fn from_unix(days: i64) -> Self {
        Self(days)
    }

    pub fn plus(self, days: i64) -> Self {
        Self(self.0.saturating_add(days))
    }

    /// The days that a table should have partitions for; a new table also gets past ones.
    pub fn ahead(today: Self, is_new: bool) -> impl Iterator<Item = Self> {
        let first = if is_new { today.0 - DAYS_BEHIND } else { today.0 };
        (first..=today.0 + DAYS_AHEAD).map(Self)
    }

    /// Appended to the table's name: `_p20261114`. With 40 bytes of name that stays below Postgres's 63.
    pub fn suffix(self) -> String {
        format!("_p{}", self.date().replace('-', ""))
    }

    /// The partition's bounds as literals; the upper one is the next day's lower one.
    pub fn bounds(self) -> Range<String> {
        self.begin()..self.plus(1).begin()
    }

    /// Its start in microseconds since 1970.
    pub fn unix_micros(self) -> i64 {
        self.0.saturating_mul(DAY_MICROS)
    }

    /// Its start as a literal.
    pub fn begin(self) -> String {
        format!("'{} 00:00:00+00'", self.date())
    }

    /// As in `2026-11-14`. No record is of a day outside the years 1970 to 9999.
    fn date(self) -> String {
        const LAST_DAY: i64 = 2_932_896;
        let micros = self.0.clamp(0, LAST_DAY) * DAY_MICROS;
        let start = Timestamp::from_unix_micros(micros).expect("a day in the years 1970 to 9999");
        start.to_string()[..10].to_owned()
    }
}

/// Creates one object if it is missing, with a comment that marks it as created by host-metrics.
pub fn create(object: Object, table: &TableName, days: impl Iterator<Item = Day>) -> String {
    let name = table.quoted(object.suffix());
    let view = |query: String| format!("CREATE OR REPLACE VIEW {name} AS\n{query}");
    let mut sql = match object {
        Object::Main => create_main(table, days),
        // Every flush updates its rows: with free space on the page, an update needs no new index entry (HOT).
        Object::Offsets => format!(
            "CREATE TABLE IF NOT EXISTS {name} (\n    group_id text,\n    topic text,\n    \"partition\" integer,\n    \
             next_offset bigint NOT NULL,\n    epochs jsonb NOT NULL DEFAULT '{{}}',\n    first_offset bigint,\n    PRIMARY KEY (group_id, topic, \"partition\")\n\
             ) WITH (fillfactor = 50);\n"
        ),
        Object::Rejected => format!(
            "CREATE TABLE IF NOT EXISTS {name} (\n    group_id text NOT NULL,\n    kafka_topic text NOT NULL,\n    \
             kafka_partition integer NOT NULL,\n    kafka_offset bigint NOT NULL,\n    key bytea,\n    value bytea,\n    \
             reason text NOT NULL,\n    rejected_at timestamptz NOT NULL DEFAULT now()\n);\n"
        ),
        Object::Series => SERIES.create(table, |suffix| index(table, suffix)),
        Object::Rollups => ROLLUPS.create(table, |suffix| index(table, suffix)),
        Object::Incidents => INCIDENTS.create(table, |suffix| index(table, suffix)),
        Object::Windows => windows::create(table),
        Object::Hosts => hosts::create(table, object.suffix()),
        Object::Latest => view(views::latest(table)),
        Object::Uptime => view(windows::uptime(table)),
        Object::Latency => view(windows::latency(table)),
        Object::Certificates => view(views::certificates(table)),
    };
    sql.push_str(&mark(object, table, SCHEMA_VERSION));
    sql
}

/// Sets the comment that marks an object as created by host-metrics in that version.
pub fn mark(object: Object, table: &TableName, version: u32) -> String {
    let (keyword, name, comment) = (object.keyword(), table.quoted(object.suffix()), object.comment());
    format!("COMMENT ON {keyword} {name} IS '{MARK}{version}: {comment}';\n")
}

/// The text of `--print-sql`: one transaction that may be repeated and may run twice at once. It uses schema `public` if
/// DB_TABLE names none, because only a server could tell the right one.
pub fn script(table: &TableName, today: Day) -> String {
    let mut sql = String::new();
    if table.schema.is_none() {
        sql.push_str(
            "-- DB_TABLE names no schema, so this uses public; set DB_TABLE=schema.table for another one.\n",
        );
    }
    let table = with_schema(table);
    let _ = write!(
        sql,
        "BEGIN;\n\
         -- So that names mean Postgres' own functions and operators.\n\
         SET LOCAL search_path = {SEARCH_PATH};\n\
         SELECT pg_advisory_xact_lock({});\n",
        lock_key(&table)
    );
    for object in Object::ALL {
        sql.push('\n');
        sql.push_str(&create(object, &table, Day::ahead(today, true)));
    }
    sql.push_str("\nCOMMIT;\n");
    sql
}

/// With schema `public` if it has none, because only a server could tell the right one.
fn with_schema(table: &TableName) -> TableName {
    TableName {
        schema: Some(table.schema.clone().unwrap_or_else(|| "public".to_owned())),
        ..table.clone()
    }
}

/// Creates a user without a password, unless it exists, and lets it read the tables of the state.
pub fn let_read(table: &TableName, reader: &str) -> String {
    let table = with_schema(table);
    let (user, schema) = (
        quoted(reader),
        quoted(table.schema.as_deref().unwrap_or_default()),
    );
    // CREATE ROLE needs a right even if the user exists, so this is checked first.
    let make = literal(&format!(
        "BEGIN IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname OPERATOR(pg_catalog.=) {}) \
         THEN CREATE ROLE {user} LOGIN; END IF; EXCEPTION WHEN duplicate_object THEN NULL; END",
        literal(reader)
    ));
    let tables = Object::STATE
        .map(|object| table.quoted(object.suffix()))
        .join(", ");
    format!("DO {make};\nGRANT USAGE ON SCHEMA {schema} TO {user};\nGRANT SELECT ON {tables} TO {user};\n")
}

/// Drops one object. Without `CASCADE`, because what depends on it belongs to the user.
pub fn drop(object: Object, table: &TableName) -> String {
    if object == Object::Hosts {
        return hosts::drop(table, object.suffix());
    }
    format!(
        "DROP {} IF EXISTS {};",
        object.keyword(),
        table.quoted(object.suffix())
    )
}

/// The partition for days without one, and for rows without `scheduled_at`.
const DEFAULT_SUFFIX: &str = "_default";

/// The key of the advisory lock under which objects of `table` are created or dropped.
pub fn lock_key(table: &TableName) -> String {
    let text = format!("host-metrics {}", table.quoted(""));
    format!("hashtextextended({}, 0)", literal(&text))
}

/// The name of an index of `table`. It has no schema, because an index is always in the schema of its table.
fn index(table: &TableName, suffix: &str) -> String {
    let name = table.name.clone();
    TableName { schema: None, name }.quoted(suffix)
}

fn create_main(table: &TableName, days: impl Iterator<Item = Day>) -> String {
    let main = table.quoted("");
    let columns: Vec<String> = COLUMNS
        .iter()
        .map(|(name, kind)| format!("    {name} {kind}"))
        .collect();
    let mut sql = format!(
        "CREATE TABLE IF NOT EXISTS {main} (\n{}\n) PARTITION BY RANGE (scheduled_at);\n",
        columns.join(",\n")
    );
    let _ = writeln!(
        sql,
        "CREATE INDEX IF NOT EXISTS {} ON {main} (address, {HOUR});",
        index(table, "_history")
    );
    let _ = writeln!(
        sql,
        "CREATE TABLE IF NOT EXISTS {} PARTITION OF {main} DEFAULT;",
        table.quoted(DEFAULT_SUFFIX)
    );
    for day in days {
        let Range { start, end } = day.bounds();
        let _ = writeln!(
            sql,
            "CREATE TABLE IF NOT EXISTS {} PARTITION OF {main} FOR VALUES FROM ({start}) TO ({end});",
            table.quoted(&day.suffix())
        );
    }
    sql
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_unix_micros(seconds * 1_000_000).expect("a time of the table below")
    }

    fn table(schema: Option<&str>, name: &str) -> TableName {
        TableName {
            schema: schema.map(str::to_owned),
            name: name.to_owned(),
        }
    }

    #[test]
    fn a_day_is_utc_and_knows_its_name_and_bounds() {
        // Seconds by `date -u -d … +%s`.
        for (seconds, suffix, start, end) in [
            (
                0,
                "_p19700101",
                "'1970-01-01 00:00:00+00'",
                "'1970-01-02 00:00:00+00'",
            ),
            (
                951_782_399,
                "_p20000228",
                "'2000-02-28 00:00:00+00'",
                "'2000-02-29 00:00:00+00'",
            ),
            (
                951_782_400,
                "_p20000229",
                "'2000-02-29 00:00:00+00'",
                "'2000-03-01 00:00:00+00'",
            ),
            (
                1_798_761_599,
                "_p20261231",
                "'2026-12-31 00:00:00+00'",
                "'2027-01-01 00:00:00+00'",
            ),
            (
                253_402_214_400 - 1,
                "_p99991230",
                "'9999-12-30 00:00:00+00'",
                "'9999-12-31 00:00:00+00'",
            ),
        ] {
            let day = Day::of(at(seconds));
            assert_eq!(day.suffix(), suffix);
            assert_eq!(day.bounds(), start.to_owned()..end.to_owned());
        }
        assert_eq!(Day(i64::MIN).begin(), Day(0).begin());
        assert_eq!(Day(i64::MAX).suffix(), "_p99991231");
    }

    #[test]
    fn days_follow_each_other_without_gaps_and_a_new_table_gets_the_past_week_too() {
        let today = Day::of(at(1_790_000_000));
        let days: Vec<Day> = Day::ahead(today, true).collect();
        assert_eq!(days.len(), 15);
        assert!(
            days.windows(2)
                .all(|pair| pair[0].bounds().end == pair[1].bounds().start)
        );
        assert_eq!(Day::ahead(today, false).count(), 8);
        assert_eq!(Day::ahead(today, false).next(), Some(today));
    }

    #[test]
    fn all_names_built_from_the_longest_table_name_are_short_enough_for_postgres() {
        let longest = "x".repeat(40);
        let suffixes = Object::ALL.map(Object::suffix);
        for suffix in suffixes.into_iter().chain([
            DEFAULT_SUFFIX,
            "_hosts_version",
            "_hosts_changed",
            "_hosts_pkey",
            "_history",
            "_series_address",
            "_incidents_ended",
            "_rollups_86400_pkey",
            &Day(0).suffix(),
        ]) {
            assert!(longest.len() + suffix.len() <= 63, "{suffix}");
        }
    }

    #[test]
    fn every_name_is_quoted() {
        let sql = script(&table(Some("My\"Schema"), "Host Metrics"), Day(20_000));
        let unquoted = sql
            .replace("\"My\"\"Schema\".\"Host Metrics", "")
            .replace("\"Host Metrics_history", "")
            .replace("\"Host Metrics_series_address", "")
            .replace("\"Host Metrics_incidents_ended", "");
        assert!(
            !unquoted.contains("Host Metrics") || unquoted.matches("Host Metrics").count() == 1,
            "{unquoted}"
        );
        assert!(sql.contains("CREATE TABLE IF NOT EXISTS \"My\"\"Schema\".\"Host Metrics_p20241004\""));
    }
}
