//! The SQL of the tables and views of the contract: what `init` makes, what `consume` makes where it may.
//!
//! Pure text: no connection and no clock. One source for `init`, `--print-sql`, `drop` and `consume`; what the database
//! really has, and the running of this text, is `destination`'s. What the views ask is `views`'.

use std::fmt::Write as _;
use std::ops::Range;

use crate::sample::Timestamp;
use crate::tables::hosts;
use crate::tables::names::{Object, SEARCH_PATH, TableName, literal};
use crate::tables::state::{INCIDENTS, ROLLUPS, SERIES};
use crate::tables::views::{self, HOUR};

/// Recorded in the comment of everything that [`create`] makes: 1, and one more for each of [`STEPS`].
pub const SCHEMA_VERSION: u32 = 1 + STEPS.len() as u32;

/// What one version changes of the objects of the version before: the SQL for one object, `None` where it stays as it is.
/// An object that is new needs no step, because what is missing is made.
pub type Step = fn(Object, &TableName) -> Option<String>;

/// The first leads from version 1 to 2. A step is never changed once it is released; [`create`] makes what all of them
/// together lead to.
pub const STEPS: &[Step] = &[];

/// How the comment of everything of ours begins; `drop` removes nothing else.
pub const MARK: &str = "host-metrics schema ";

/// Days made ahead of today: a consumer that may not create tables survives a week without `init`.
pub const DAYS_AHEAD: i64 = 7;

/// Days before today that a new table gets: what a topic with Kafka's default retention of seven days can still hold.
pub const DAYS_BEHIND: i64 = 7;

/// A column of the main table and its type, in the table's order.
///
/// The order is the record's, for whoever reads `SELECT *`. Sorted by alignment a row would be 3 % smaller (215 against
/// 222 bytes with an 41 byte address).
pub const COLUMNS: [(&str, &str); 23] = [
    // Byte order instead of the database's collation: a comparison is a memcmp, and the index serves on any locale.
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

    /// The days that a table should have at `today`: of a new one also those behind it.
    pub fn ahead(today: Self, is_new: bool) -> impl Iterator<Item = Self> {
        let first = if is_new { today.0 - DAYS_BEHIND } else { today.0 };
        (first..=today.0 + DAYS_AHEAD).map(Self)
    }

    /// Appended to the table's name: `_p20261114`. With 40 bytes of name that stays below Postgres's 63.
    pub fn suffix(self) -> String {
        let (year, month, day) = self.civil();
        format!("_p{year:04}{month:02}{day:02}")
    }

    /// The partition's bounds as literals; the upper one is the next day's lower one.
    pub fn bounds(self) -> Range<String> {
        self.begin()..self.plus(1).begin()
    }

    /// Its first moment, in microseconds since the Unix epoch.
    pub fn unix_micros(self) -> i64 {
        self.0.saturating_mul(DAY_MICROS)
    }

    /// Its first moment, as a literal.
    pub fn begin(self) -> String {
        let (year, month, day) = self.civil();
        format!("'{year:04}-{month:02}-{day:02} 00:00:00+00'")
    }

    /// Year, month and day of the Gregorian calendar (Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms",
    /// `civil_from_days`): years begin in March, so that the leap day is a year's last.
    fn civil(self) -> (i64, i64, i64) {
        let days = self.0 + 719_468;
        let era = days.div_euclid(146_097);
        let day_of_era = days.rem_euclid(146_097);
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted_month = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
        let month = if shifted_month < 10 {
            shifted_month + 3
        } else {
            shifted_month - 9
        };
        let year = year_of_era + era * 400 + i64::from(month <= 2);
        (year, month, day)
    }
}

/// Makes one object that is not there yet, and says in its comment that it is ours.
pub fn create(object: Object, table: &TableName, days: impl Iterator<Item = Day>) -> String {
    let name = table.quoted(object.suffix());
    let view = |query: String| format!("CREATE OR REPLACE VIEW {name} AS\n{query}");
    let mut sql = match object {
        Object::Main => create_main(table, days),
        // Every flush updates its rows: with free space on the page the new version stays there, off the index.
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
        Object::Hosts => hosts::create(table, object.suffix()),
        Object::Latest => view(views::latest(table)),
        Object::Uptime => view(views::uptime(table)),
        Object::Latency => view(views::latency(table)),
        Object::Certificates => view(views::certificates(table)),
    };
    sql.push_str(&mark(object, table, SCHEMA_VERSION));
    sql
}

/// Says in an object's comment that it is ours and of which version.
pub fn mark(object: Object, table: &TableName, version: u32) -> String {
    let (keyword, name, comment) = (object.keyword(), table.quoted(object.suffix()), object.comment());
    format!("COMMENT ON {keyword} {name} IS '{MARK}{version}: {comment}';\n")
}

/// The whole text for `--print-sql`: one transaction, safe to repeat and to run twice at once. Without a server nobody knows
/// which schema a table without one is in: it is `public`.
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
         -- Until COMMIT, so that no function or operator of another schema is taken for one of Postgres.\n\
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

/// Without a server nobody knows which schema a table without one is in: it is `public`.
fn with_schema(table: &TableName) -> TableName {
    TableName {
        schema: Some(table.schema.clone().unwrap_or_else(|| "public".to_owned())),
        ..table.clone()
    }
}

/// Makes a user, unless there is one of that name, and lets it read the tables of the state. It has no password yet.
pub fn let_read(table: &TableName, reader: &str) -> String {
    let table = with_schema(table);
    let quoted = |name: &str| format!("\"{}\"", name.replace('"', "\"\""));
    let (user, schema) = (
        quoted(reader),
        quoted(table.schema.as_deref().unwrap_or_default()),
    );
    // Asked for first, because CREATE ROLE needs a right even where the user exists.
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

/// Removes one object. Not `CASCADE`: what a user built upon it is the user's.
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

/// A new day's table, to be filled with what the default partition holds of that day and then attached.
///
/// Made apart and attached, because `CREATE TABLE … PARTITION OF` locks the parent against its writers, while
/// `ATTACH PARTITION` does not (it locks the default partition only).
pub fn create_day(table: &TableName, day: Day) -> String {
    format!(
        "CREATE TABLE {} (LIKE {} INCLUDING DEFAULTS INCLUDING GENERATED INCLUDING STORAGE INCLUDING CONSTRAINTS);",
        table.quoted(&day.suffix()),
        table.quoted("")
    )
}

/// Moves a day's rows out of the default partition (its name quoted) into the table of [`create_day`].
pub fn move_day(table: &TableName, default: &str, day: Day) -> String {
    let Range { start, end } = day.bounds();
    format!(
        "WITH moved AS (DELETE FROM {default} WHERE scheduled_at >= {start} AND scheduled_at < {end} RETURNING *) \
         INSERT INTO {} SELECT * FROM moved;",
        table.quoted(&day.suffix())
    )
}

/// How many rows of a day the default partition (its name quoted) holds, counted up to `limit`.
pub fn count_day(default: &str, day: Day, limit: i64) -> String {
    let Range { start, end } = day.bounds();
    format!(
        "SELECT count(*) FROM (SELECT FROM {default} \
         WHERE scheduled_at >= {start} AND scheduled_at < {end} LIMIT {limit}) rows"
    )
}

/// Makes the table of [`create_day`] a partition.
pub fn attach_day(table: &TableName, day: Day) -> String {
    let Range { start, end } = day.bounds();
    format!(
        "ALTER TABLE {} ATTACH PARTITION {} FOR VALUES FROM ({start}) TO ({end});",
        table.quoted(""),
        table.quoted(&day.suffix())
    )
}

/// Removes at most `limit` rows from before `day` from the default partition (its name quoted). Without a word to rows
/// that somebody else has locked, for example another consumer that does the same.
pub fn delete_before(default: &str, day: Day, limit: i64) -> String {
    let start = day.bounds().start;
    format!(
        "DELETE FROM {default} WHERE ctid = ANY (ARRAY( \
         SELECT ctid FROM {default} WHERE scheduled_at < {start} LIMIT {limit} FOR UPDATE SKIP LOCKED))"
    )
}

/// The partition for every day that has none of its own, and for rows without `scheduled_at`.
pub const DEFAULT_SUFFIX: &str = "_default";

/// The key of the advisory lock under which objects of `table` are made or dropped: one at a time.
pub fn lock_key(table: &TableName) -> String {
    let text = format!("host-metrics {}", table.quoted(""));
    format!("hashtextextended({}, 0)", literal(&text))
}

/// The name of an index of `table`; it goes where the table is.
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
                253_402_300_799,
                "_p99991231",
                "'9999-12-31 00:00:00+00'",
                "'10000-01-01 00:00:00+00'",
            ),
        ] {
            let day = Day::of(at(seconds));
            assert_eq!(day.suffix(), suffix);
            assert_eq!(day.bounds(), start.to_owned()..end.to_owned());
        }
    }

    #[test]
    fn days_follow_each_other_without_gap_and_a_new_table_gets_the_past_week_too() {
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
    fn every_name_made_of_the_longest_table_name_fits_postgres() {
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
