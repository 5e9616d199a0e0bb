//! The SQL of the tables and views of the contract: what `init` makes, what `consume` makes where it may.
//!
//! Pure text: no connection and no clock. One source for `init`, `--print-sql`, `drop` and `consume`; what the database
//! really has, and the running of this text, is `catalogue`'s.

use std::fmt::Write as _;
use std::ops::Range;

use crate::config::TableName;
use crate::sample::Timestamp;

/// Recorded in the comment of everything that [`create`] makes. What an older version made is brought up to it, with its
/// rows; what a newer one made is left alone.
///
/// 1: the first. 2: the index of failed checks, and views that use it.
pub const SCHEMA_VERSION: u32 = 2;

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

/// Everything that belongs to one DB_TABLE, in the order of making; `drop` goes the other way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Object {
    Main,
    Offsets,
    Rejected,
    Latest,
    Uptime,
    Incidents,
    Certificates,
}

impl Object {
    pub const ALL: [Self; 7] = [
        Self::Main,
        Self::Offsets,
        Self::Rejected,
        Self::Latest,
        Self::Uptime,
        Self::Incidents,
        Self::Certificates,
    ];

    /// What is appended to the main table's name.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::Main => "",
            Self::Offsets => "_offsets",
            Self::Rejected => "_rejected",
            Self::Latest => "_latest",
            Self::Uptime => "_uptime",
            Self::Incidents => "_incidents",
            Self::Certificates => "_certificates",
        }
    }

    pub fn is_view(self) -> bool {
        matches!(
            self,
            Self::Latest | Self::Uptime | Self::Incidents | Self::Certificates
        )
    }

    fn keyword(self) -> &'static str {
        if self.is_view() { "VIEW" } else { "TABLE" }
    }

    fn comment(self) -> &'static str {
        match self {
            Self::Main => "one row for every tick of every host",
            Self::Offsets => "the next Kafka offset of every partition, moved in the transaction of the rows",
            Self::Rejected => "every record that could not be stored, as it came, and why",
            Self::Latest => "the newest row of every host",
            Self::Uptime => {
                "per host and window: ticks due, ticks that were valid, ticks that were missed (not checked), and \
                 uptime = valid / due"
            }
            Self::Incidents => {
                "a row per outage: from the first invalid check to the next valid one (ended_at is null while it \
                 lasts); missed ticks neither begin nor end one"
            }
            Self::Certificates => "per host: when the certificate last seen expires",
        }
    }
}

/// A day in UTC, as days since 1970-01-01.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Day(i64);

impl Day {
    pub fn of(at: Timestamp) -> Self {
        const MICROS: i64 = 86_400_000_000;
        Self(at.unix_micros().div_euclid(MICROS))
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
        let literal = |day: Self| {
            let (year, month, day) = day.civil();
            format!("'{year:04}-{month:02}-{day:02} 00:00:00+00'")
        };
        literal(self)..literal(Self(self.0 + 1))
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
    let main = table.quoted("");
    let mut sql = match object {
        Object::Main => create_main(table, days),
        // Every flush updates its rows: with free space on the page the new version stays there, off the index.
        Object::Offsets => format!(
            "CREATE TABLE IF NOT EXISTS {name} (\n    group_id text,\n    topic text,\n    \"partition\" integer,\n    \
             next_offset bigint NOT NULL,\n    PRIMARY KEY (group_id, topic, \"partition\")\n\
             ) WITH (fillfactor = 50);\n"
        ),
        Object::Rejected => format!(
            "CREATE TABLE IF NOT EXISTS {name} (\n    group_id text NOT NULL,\n    kafka_topic text NOT NULL,\n    \
             kafka_partition integer NOT NULL,\n    kafka_offset bigint NOT NULL,\n    key bytea,\n    value bytea,\n    \
             reason text NOT NULL,\n    rejected_at timestamptz NOT NULL DEFAULT now()\n);\n"
        ),
        Object::Latest => {
            format!("CREATE OR REPLACE VIEW {name} AS\n{}", latest_query(&main))
        }
        Object::Uptime => {
            format!("CREATE OR REPLACE VIEW {name} AS\n{}", uptime_query(&main))
        }
        Object::Incidents => {
            format!("CREATE OR REPLACE VIEW {name} AS\n{}", incidents_query(&main))
        }
        Object::Certificates => {
            let latest = table.quoted(Object::Latest.suffix());
            format!(
                "CREATE OR REPLACE VIEW {name} AS\n{}",
                certificates_query(&main, &latest)
            )
        }
    };
    let (keyword, comment) = (object.keyword(), object.comment());
    let _ = writeln!(
        sql,
        "COMMENT ON {keyword} {name} IS '{MARK}{SCHEMA_VERSION}: {comment}';"
    );
    sql
}

/// The whole text for `--print-sql`: one transaction, safe to repeat and to run twice at once.
pub fn script(table: &TableName, today: Day) -> String {
    let mut sql = String::from("BEGIN;\n");
    let _ = writeln!(sql, "SELECT pg_advisory_xact_lock({});", lock_key(table));
    for object in Object::ALL {
        sql.push('\n');
        sql.push_str(&create(object, table, Day::ahead(today, true)));
    }
    sql.push_str("\nCOMMIT;\n");
    sql
}

/// Removes one object. Not `CASCADE`: what a user built upon it is the user's.
pub fn drop(object: Object, table: &TableName) -> String {
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

/// The index of [`FAILED`] checks on one partition (its name unquoted), made ahead of the one on the whole table: that
/// then takes over what is there, instead of keeping every writer out until it has read all rows.
pub fn create_failed_index(partition: &TableName) -> String {
    let name = TableName {
        schema: None,
        name: partition.name.clone(),
    };
    format!(
        "CREATE INDEX IF NOT EXISTS {} ON {} {FAILED_KEY};",
        name.quoted(FAILED_SUFFIX),
        partition.quoted("")
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

/// `text` as an SQL string, whatever `standard_conforming_strings` says.
pub fn literal(text: &str) -> String {
    let quoted = text.replace('\'', "''");
    if quoted.contains('\\') {
        format!(" E'{}'", quoted.replace('\\', "\\\\"))
    } else {
        format!("'{quoted}'")
    }
}

/// What the index rounds `scheduled_at` to; the views ask for the same expression.
///
/// Rounded, the index of one host's history deduplicates: an hour of a host is one key with a list of rows. COPY of
/// 1,000,000 rows of 1,000 hosts into a day (Postgres 15, text, CPU seconds of the backend; bytes of index a row):
///
/// | index | CPU | size |
/// |---|---|---|
/// | none | 2.84 | |
/// | (address) | 4.02 | 8 |
/// | (address, hour) | 4.31 | 10 |
/// | (address) and (scheduled_at) | 4.69 | 31 |
/// | (address, scheduled_at) | 5.14 | 134 |
///
/// `(address)` alone would have to read all rows of a host's day to find its newest one, for every host.
pub const HOUR: &str = "date_bin('1 hour', scheduled_at, timestamptz '2000-01-01 00:00:00+00')";

/// A check that failed, in the words of its index. Missed ticks say nothing about the host.
const FAILED: &str = "NOT is_valid AND outcome IS DISTINCT FROM 'missed'";

const FAILED_KEY: &str = "(address, scheduled_at) WHERE NOT is_valid AND outcome IS DISTINCT FROM 'missed'";

const FAILED_SUFFIX: &str = "_failed";

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
    let index = |suffix: &str| {
        let name = table.name.clone();
        TableName { schema: None, name }.quoted(suffix)
    };
    let _ = writeln!(
        sql,
        "CREATE INDEX IF NOT EXISTS {} ON {main} (address, {HOUR});",
        index("_history")
    );
    let _ = writeln!(
        sql,
        "CREATE INDEX IF NOT EXISTS {} ON {main} {FAILED_KEY};",
        index(FAILED_SUFFIX)
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

/// The distinct addresses by jumping through the index from one to the next, then the newest row of each: the work
/// grows with the hosts and the partitions, not with the rows (10,000,000 rows of 1,000 hosts in a week: 0.12 s).
fn latest_query(main: &str) -> String {
    format!(
        "WITH RECURSIVE hosts (address) AS (\n    \
             (SELECT address FROM {main} ORDER BY address LIMIT 1)\n    \
             UNION ALL\n    \
             SELECT (SELECT t.address FROM {main} t WHERE t.address > hosts.address ORDER BY t.address LIMIT 1)\n    \
             FROM hosts WHERE hosts.address IS NOT NULL\n\
         )\n\
         SELECT newest.*\n\
         FROM hosts CROSS JOIN LATERAL (\n    \
             SELECT * FROM {main} WHERE address = hosts.address AND scheduled_at IS NOT NULL\n    \
             ORDER BY {HOUR} DESC, scheduled_at DESC LIMIT 1\n\
         ) newest;\n"
    )
}

/// One pass, in parallel. What is asked of every row is cheap: moments are reckoned once, in sub-selects, but for those
/// that choose the rows; of `now() - interval` the planner knows how many rows follow it, and that hashing them is cheaper
/// than sorting. Hours, not days: a day of an interval is reckoned in the session's time zone.
///
/// Ten million rows of a week take 3.3 s of CPU time, 1.9 s on two cores (1.7 without JIT); counting them by address alone
/// takes 2.4 of it. A pass for each stretch between the windows takes 3.1, but the planner expects three times the work
/// and compiles for longer (JIT) than that saves.
fn uptime_query(main: &str) -> String {
    let mut counts = Vec::new();
    let mut columns = Vec::new();
    for (name, within) in [
        ("1h", "scheduled_at > (SELECT now() - interval '1 hour')"),
        ("24h", "scheduled_at > (SELECT now() - interval '24 hours')"),
        ("7d", "true"),
    ] {
        counts.push(format!("count(*) FILTER (WHERE {within}) AS due_{name}"));
        counts.push(format!(
            "count(*) FILTER (WHERE is_valid AND {within}) AS valid_{name}"
        ));
        counts.push(format!(
            "count(*) FILTER (WHERE NOT is_valid AND outcome = 'missed' AND {within}) AS missed_{name}"
        ));
        columns.push(format!(
            "due_{name}, valid_{name}, missed_{name}, valid_{name}::double precision / nullif(due_{name}, 0) AS \
             uptime_{name}"
        ));
    }
    format!(
        "SELECT address,\n    {}\nFROM (\n    SELECT address,\n        {}\n    FROM {main}\n    \
         WHERE scheduled_at > now() - interval '168 hours' AND scheduled_at <= now()\n    GROUP BY address\n) counts;\n",
        columns.join(",\n    "),
        counts.join(",\n        ")
    )
}

/// Failed checks belong to one outage if the same valid check is the first after them. Looks only at rows near failed
/// ones: the index of failed checks tells the hours with some, and of an unbroken run of such hours all rows are read.
/// An outage ends at the first valid row after it of those, or, where none is, at the next row after them if that is
/// valid; if it is not, it begins the host's next run of hours, and the outage ends where that one's first does. Of ten
/// million rows, 100,000 of them failed, it reads 300,000: 1.5 s, where sorting them all took 14.
///
/// That the hour of the last failed check is the last hour is always so. It is asked for the planner's sake: it takes an
/// equation for rare and so expects little work, where it would compile the query for seconds (JIT) otherwise.
fn incidents_query(main: &str) -> String {
    let hour_of_last = HOUR.replace("scheduled_at", "max(last_failed)");
    format!(
        "SELECT address, min(scheduled_at) AS started_at, ended_at,
    coalesce(ended_at, now()) - min(scheduled_at) AS duration,
    count(*) AS checks,
    (array_agg(outcome ORDER BY scheduled_at, outcome))[1] AS first_outcome,
    mode() WITHIN GROUP (ORDER BY outcome) AS most_frequent_outcome
FROM (
    SELECT run.address, near.scheduled_at, coalesce(near.outcome, 'unknown') AS outcome,
        min(near.ended_at) OVER (PARTITION BY run.address ORDER BY near.scheduled_at DESC) AS ended_at
    FROM (
        SELECT address, min(hour) AS first_hour, max(hour) AS last_hour, max(last_failed) AS last_failed
        FROM (
            SELECT address, hour, last_failed,
                hour - row_number() OVER (PARTITION BY address ORDER BY hour) * interval '1 hour' AS run
            FROM (
                SELECT address, {HOUR} AS hour,
                    max(scheduled_at) AS last_failed
                FROM {main}
                WHERE {FAILED} AND scheduled_at IS NOT NULL
                GROUP BY address, {HOUR}
            ) failed
        ) hours
        GROUP BY address, run
        HAVING {hour_of_last} = max(hour)
    ) run CROSS JOIN LATERAL (
        SELECT scheduled_at, is_valid, outcome,
            min(scheduled_at) FILTER (WHERE is_valid) OVER (ORDER BY scheduled_at DESC) AS ended_at
        FROM (
            SELECT scheduled_at, is_valid, outcome
            FROM {main}
            WHERE address = run.address
                AND {HOUR} BETWEEN first_hour AND last_hour
                AND scheduled_at >= first_hour AND scheduled_at < last_hour + interval '1 hour'
                AND (is_valid OR {FAILED})
            UNION ALL
            SELECT * FROM (
                SELECT scheduled_at, is_valid, outcome
                FROM {main}
                WHERE address = run.address
                    AND {HOUR} > last_hour
                    AND scheduled_at >= last_hour + interval '1 hour'
                    AND (is_valid OR {FAILED})
                ORDER BY {HOUR}, scheduled_at
                LIMIT 1
            ) next
            WHERE is_valid AND NOT EXISTS (
                SELECT FROM {main}
                WHERE address = run.address
                    AND {HOUR} = last_hour
                    AND scheduled_at >= last_failed AND scheduled_at < last_hour + interval '1 hour' AND is_valid
            )
        ) checks
    ) near
    WHERE NOT near.is_valid
) failed
GROUP BY address, ended_at;
"
    )
}

/// The newest row's certificate; while a host fails before its certificate is seen, the one seen within the day before.
/// Ordered as the index is, for the planner's sake: by `scheduled_at` alone it expects so much work that it compiles the
/// query for seconds (JIT) before it runs for a tenth of one.
fn certificates_query(main: &str, latest: &str) -> String {
    format!(
        "SELECT latest.address, seen.cert_expires_at,\n    \
             seen.cert_expires_at - now() AS expires_in,\n    \
             floor(extract(epoch FROM seen.cert_expires_at - now()) / 86400)::integer AS days_left,\n    \
             seen.scheduled_at AS seen_at\n\
         FROM {latest} latest CROSS JOIN LATERAL (\n    \
             SELECT latest.cert_expires_at, latest.scheduled_at WHERE latest.cert_expires_at IS NOT NULL\n    \
             UNION ALL\n    \
             (SELECT cert_expires_at, scheduled_at FROM {main}\n     \
              WHERE latest.cert_expires_at IS NULL AND NOT latest.is_valid AND address = latest.address\n         \
                  AND cert_expires_at IS NOT NULL\n         \
                  AND scheduled_at >= latest.scheduled_at - interval '1 day'\n             \
                      - make_interval(secs => coalesce(latest.interval_seconds, 0))\n     \
              ORDER BY {HOUR} DESC, scheduled_at DESC LIMIT 1)\n\
         ) seen;\n"
    )
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
            "_history",
            &format!("{}{FAILED_SUFFIX}", Day(0).suffix()),
        ]) {
            assert!(longest.len() + suffix.len() <= 63, "{suffix}");
        }
    }

    #[test]
    fn names_are_quoted_wherever_they_stand() {
        let sql = script(&table(Some("My\"Schema"), "Host Metrics"), Day(20_000));
        let unquoted = sql
            .replace("\"My\"\"Schema\".\"Host Metrics", "")
            .replace("\"Host Metrics_history", "")
            .replace("\"Host Metrics_failed", "");
        assert!(
            !unquoted.contains("Host Metrics") || unquoted.matches("Host Metrics").count() == 1,
            "{unquoted}"
        );
        assert!(sql.contains("CREATE TABLE IF NOT EXISTS \"My\"\"Schema\".\"Host Metrics_p20241004\""));
    }

    #[test]
    fn a_literal_survives_quotes_and_backslashes() {
        assert_eq!(literal("a'b"), "'a''b'");
        assert_eq!(literal("a\\'b"), " E'a\\\\''b'");
    }
}
