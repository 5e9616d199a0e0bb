//! The questions that the views ask, and the sums of finished days that let them answer at once.
//!
//! Pure text, as `tables`; what is summed up in which way stands beside the view that reads it, because both have to say
//! the same.
//!
//! Counting ten million rows takes seconds, however it is asked. So a finished day is counted once (`sums`): the ticks of
//! each host and hour, and its unbroken failures. Which days those are says the table of days; the views read the sums of
//! the longest stretch of days up to the newest one, and all other rows as they are. A row that comes late, or goes, leaves
//! a note by a trigger ([`create_trigger`]) in its own transaction, and a day with a note is not counted: so no view ever
//! reads a sum that is not right. The live day has no trigger and costs its writers nothing.

use std::fmt::Write as _;

use crate::tables::names::{Object, TableName, literal};

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

/// A tick whose host was not seen: not checked at all, or this machine or its network failed. It is no failed check.
pub const NOT_CHECKED: &str = "outcome IN ('missed', 'agent_error', 'agent_offline')";

/// A check that failed, in the words of its index; [`NOT_CHECKED`] stands in it.
pub const FAILED: &str =
    "NOT is_valid AND (outcome IN ('missed', 'agent_error', 'agent_offline')) IS NOT TRUE";

/// A tick that was checked. Every valid row was, and its text need not be compared.
pub const CHECKED: &str = "(is_valid OR (outcome IN ('missed', 'agent_error', 'agent_offline')) IS NOT TRUE)";

/// The state of a day, in the table of days, whose sums are right unless there is a note of a change.
pub const COUNTED: &str = "counted";

/// The triggers of a finished day: of its rows, and of all of them at once.
const TRIGGERS: [&str; 2] = ["host_metrics_changed", "host_metrics_truncated"];

/// The hour that `at`, an expression, lies in.
pub fn hour_of(at: &str) -> String {
    HOUR.replace("scheduled_at", at)
}

/// The function of the triggers, for the table's `owner` (quoted). It works with the owner's rights, for whoever may write
/// rows need not write notes. So every name and operator in it is qualified: `table` has to have its schema.
///
/// It leaves one note a transaction, and touches nobody else's: writers never wait for each other here, and one whose
/// snapshot is old leaves its note all the same.
pub fn create_function(table: &TableName, owner: &str) -> String {
    let function = function(table);
    let changes = table.quoted(Object::Changes.suffix());
    let body = format!(
        "BEGIN
    IF NOT EXISTS (
        SELECT FROM {changes} WHERE \"partition\" OPERATOR(pg_catalog.=) TG_RELID
            AND xact OPERATOR(pg_catalog.=) pg_catalog.pg_current_xact_id()
    ) THEN
        INSERT INTO {changes} (\"partition\", xact) VALUES (TG_RELID, pg_catalog.pg_current_xact_id());
    END IF;
    RETURN NULL;
END"
    );
    format!(
        "CREATE OR REPLACE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS {}; \
         REVOKE ALL ON FUNCTION {function}() FROM PUBLIC; ALTER FUNCTION {function}() OWNER TO {owner};",
        literal(&body)
    )
}

/// Whether the function is there as [`create_function`] makes it: of that owner, and for the table's present name.
pub fn function_is_right(table: &TableName, owner: &str) -> String {
    format!(
        "SELECT EXISTS (SELECT FROM pg_catalog.pg_proc WHERE oid = pg_catalog.to_regprocedure({}) \
         AND pg_catalog.strpos(prosrc, {}) > 0 \
         AND pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(proowner)) = {})",
        literal(&format!("{}()", function(table))),
        literal(&table.quoted(Object::Changes.suffix())),
        literal(owner)
    )
}

/// Removes the function, and its triggers from days that were detached.
pub fn drop_function(table: &TableName) -> String {
    format!("DROP FUNCTION IF EXISTS {}() CASCADE;", function(table))
}

fn function(table: &TableName) -> String {
    table.quoted("_note_change")
}

/// Makes every change of a partition's rows (its name quoted) known, on the subscriber of a replication too. AFTER, for a
/// trigger before each row would make COPY insert them one by one.
pub fn create_trigger(table: &TableName, partition: &str) -> String {
    let function = function(table);
    let [rows, all] = TRIGGERS;
    format!(
        "CREATE OR REPLACE TRIGGER {rows} AFTER INSERT OR UPDATE OR DELETE ON {partition} \
             FOR EACH ROW EXECUTE FUNCTION {function}(); \
         CREATE OR REPLACE TRIGGER {all} AFTER TRUNCATE ON {partition} \
             FOR EACH STATEMENT EXECUTE FUNCTION {function}(); \
         ALTER TABLE {partition} ENABLE ALWAYS TRIGGER {rows}, ENABLE ALWAYS TRIGGER {all};"
    )
}

/// Whether the partition with that oid (an expression) has its triggers, switched on: a restored one may not.
pub fn has_triggers(oid: &str) -> String {
    let [rows, all] = TRIGGERS;
    format!(
        "(SELECT count(*) FROM pg_catalog.pg_trigger WHERE tgrelid = {oid} AND tgname IN ('{rows}', '{all}') \
         AND tgenabled = 'A') = 2"
    )
}

/// Sums a partition (its name quoted) up: the ticks of each host and hour.
pub fn sum_hours(table: &TableName, partition: &str) -> String {
    let hours = table.quoted(Object::Hours.suffix());
    format!(
        "INSERT INTO {hours} (address, hour, due, valid, missed, first_check_at, last_valid_at, last_failed_at)
         SELECT address, {HOUR}, {}, {} FROM ONLY {partition} GROUP BY address, {HOUR} ORDER BY 2, 1",
        counts(),
        extremes()
    )
}

/// Sums a partition (its name quoted) up: its unbroken failures.
pub fn sum_failures(table: &TableName, partition: &str) -> String {
    let into = table.quoted(Object::Failures.suffix());
    format!(
        "INSERT INTO {into} (address, outcome, first_at, checks, ended_at, last_at)
         SELECT address, outcome, first_at, checks, ended_at, last_at FROM ({}) failures ORDER BY address, first_at",
        failures(&format!("ONLY {partition}"), "true")
    )
}

/// The ticks that were due, the valid ones, and those that were not checked.
fn counts() -> String {
    format!(
        "count(*), count(*) FILTER (WHERE is_valid), count(*) FILTER (WHERE NOT is_valid AND {NOT_CHECKED})"
    )
}

/// The first check, the last valid and the last failed one.
fn extremes() -> String {
    format!(
        "min(scheduled_at) FILTER (WHERE {CHECKED}), max(scheduled_at) FILTER (WHERE is_valid), \
         max(scheduled_at) FILTER (WHERE {FAILED})"
    )
}

/// One row: the stretch of counted days up to the newest one; `infinity` twice where no day is. A partition that was
/// dropped or detached does not count, nor one with a note of a change, or one that would get none.
fn counted(table: &TableName) -> String {
    let days = table.quoted(Object::Days.suffix());
    let changes = table.quoted(Object::Changes.suffix());
    let has_triggers = has_triggers("inhrelid");
    let main = literal(&table.quoted(""));
    format!(
        "SELECT coalesce(min(starts_at), 'infinity') AS starts_at, coalesce(max(ends_at), 'infinity') AS ends_at
    FROM (
        SELECT starts_at, ends_at, count(*) FILTER (WHERE is_cut) OVER (ORDER BY starts_at DESC) AS cuts
        FROM (
            SELECT starts_at, ends_at, ends_at <> lead(starts_at, 1, ends_at) OVER (ORDER BY starts_at) AS is_cut
            FROM {days} counted JOIN pg_catalog.pg_inherits ON inhrelid = \"partition\"
            WHERE inhparent = {main}::regclass AND NOT inhdetachpending AND state = '{COUNTED}'
                AND NOT EXISTS (SELECT FROM {changes} change WHERE change.\"partition\" = counted.\"partition\")
                AND {has_triggers}
        ) day
    ) stretch
    WHERE cuts = 0"
    )
}

/// All rows of `parts`, at a cost that the planner takes for small.
///
/// It cannot know that most days are counted, takes a question to all partitions for a huge one, and compiles it (JIT, on
/// by default up to Postgres 18) for a second or two before it runs for half of one. An order by a constant makes all rows
/// equal, so the first one brings all of them along; what the first one of several parts costs is what the planner believes
/// that all cost: the cheap part has to come first. The join inside keeps it from planning the parts themselves for one row,
/// the one outside from joining the view as if it were one row.
fn cheaply(parts: &str) -> String {
    format!(
        "SELECT cheap.* FROM (
SELECT parts.* FROM (
{parts}
) parts, (SELECT 1 OFFSET 0) one
ORDER BY 1 + 0 FETCH FIRST 1 ROW WITH TIES
) cheap, generate_series(1, (SELECT 1)) many"
    )
}

/// The distinct addresses by jumping through the index from one to the next, then the newest row of each: the work
/// grows with the hosts and the partitions, not with the rows (10,000,000 rows of 1,000 hosts in a week: 0.12 s).
pub fn latest(table: &TableName) -> String {
    let main = table.quoted("");
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

/// Whole hours of counted days from their sums; the hours in which a window begins, and the other days, from their rows
/// in one pass, in parallel. What is asked of every row is cheap: moments are reckoned once, in sub-selects, but for those that
/// choose the rows. Hours, not days: a day of an interval is reckoned in the session's time zone.
pub fn uptime(table: &TableName) -> String {
    let main = table.quoted("");
    let hours = table.quoted(Object::Hours.suffix());
    let counted = counted(table);
    let windows = [
        (
            "1h",
            Some(("scheduled_at > (SELECT hour_ago FROM times)", "hour > hour_1h")),
        ),
        (
            "24h",
            Some(("scheduled_at > (SELECT day_ago FROM times)", "hour > hour_24h")),
        ),
        ("7d", None),
    ];
    let not_checked = format!("NOT is_valid AND {NOT_CHECKED}");
    let counts = [
        ("due", None),
        ("valid", Some("is_valid")),
        ("missed", Some(not_checked.as_str())),
    ];
    let filter = |one: Option<&str>, other: Option<&str>| {
        let conditions: Vec<&str> = one.into_iter().chain(other).collect();
        match conditions.is_empty() {
            true => String::new(),
            false => format!(" FILTER (WHERE {})", conditions.join(" AND ")),
        }
    };
    let (mut columns, mut sums, mut of_hours, mut of_rows) = (vec![], vec![], vec![], vec![]);
    for (name, within) in windows {
        columns.push(format!(
            "due_{name}, valid_{name}, missed_{name}, \
             valid_{name}::double precision / nullif(due_{name} - missed_{name}, 0) AS uptime_{name}"
        ));
        for (count, which) in counts {
            sums.push(format!("sum({count}_{name})::bigint AS {count}_{name}"));
            let of_hour = filter(None, within.map(|(_, hours)| hours));
            of_hours.push(format!("coalesce(sum({count}){of_hour}, 0) AS {count}_{name}"));
            let of_row = filter(which, within.map(|(rows, _)| rows));
            of_rows.push(format!("count(*){of_row} AS {count}_{name}"));
        }
    }
    let hour_of_window = |ago: &str| hour_of(&format!("(now() - interval '{ago}')"));
    let mut parts = format!(
        "    SELECT address, {},
        min(first_check_at) AS first_check_at, max(last_valid_at) AS last_valid_at, max(last_failed_at) AS last_failed_at
    FROM {hours}, times
    WHERE hour >= starts_at AND hour < ends_at AND hour <> hour_24h AND hour <> hour_1h
    GROUP BY address
    UNION ALL
    SELECT address, {}, {}
    FROM {main}
    WHERE scheduled_at > now() - interval '168 hours' AND scheduled_at <= now()
        AND (scheduled_at >= (SELECT ends_at FROM times) OR scheduled_at < (SELECT starts_at FROM times)",
        of_hours.join(", "),
        of_rows.join(", "),
        extremes(),
    );
    for hour in ["hour_24h", "hour_1h"] {
        let _ = write!(
            parts,
            "\n            OR scheduled_at >= (SELECT {hour} FROM times) \
             AND scheduled_at < (SELECT {hour} + interval '1 hour' FROM times)"
        );
    }
    parts.push_str(")\n    GROUP BY address");
    format!(
        "WITH times AS MATERIALIZED (
    SELECT greatest(starts_at, {} + interval '1 hour') AS starts_at, least(ends_at, {}) AS ends_at,
        now() - interval '24 hours' AS day_ago, {} AS hour_24h, now() - interval '1 hour' AS hour_ago, {} AS hour_1h
    FROM ({counted}) counted
)
SELECT address,\n    {},\n    first_check_at, last_valid_at, last_failed_at
FROM (
SELECT address, {},
    min(first_check_at) AS first_check_at, max(last_valid_at) AS last_valid_at, max(last_failed_at) AS last_failed_at
FROM ({}) parts
GROUP BY address
) counts;\n",
        hour_of_window("168 hours"),
        hour_of("now()"),
        hour_of_window("24 hours"),
        hour_of_window("1 hour"),
        columns.join(",\n    "),
        sums.join(", "),
        cheaply(&parts),
    )
}

/// Failed checks belong to one outage if the same valid check is the first after them. Of counted days they are there
/// already, without a valid one where the day has none after them; of the others they are found now. Then the next check
/// after them tells: a valid one ended the outage, and a failed one belongs to it, with the end that is its own.
pub fn incidents(table: &TableName) -> String {
    let main = table.quoted("");
    let from = table.quoted(Object::Failures.suffix());
    let counted = counted(table);
    let parts = format!(
        "    SELECT address, outcome, first_at, checks, ended_at, last_at
    FROM {from}, counted
    WHERE first_at >= starts_at AND first_at < ends_at
    UNION ALL
    {}",
        failures(
            &main,
            "(scheduled_at >= (SELECT ends_at FROM counted) OR scheduled_at < (SELECT starts_at FROM counted))"
        )
    );
    format!(
        "WITH counted AS MATERIALIZED (\n    {counted}\n)
SELECT address, min(first_at) AS started_at, ended_at,
    coalesce(ended_at, now()) - min(first_at) AS duration,
    sum(checks)::bigint AS checks,
    (array_agg(outcome ORDER BY first_at, outcome))[1] AS first_outcome,
    (array_agg(outcome ORDER BY checks DESC, outcome))[1] AS most_frequent_outcome
FROM (
    SELECT address, ended_at, outcome, min(first_at) AS first_at, sum(checks) AS checks
    FROM (
        SELECT address, outcome, first_at, checks,
            min(coalesce(ended_at, (
                SELECT CASE WHEN is_valid THEN scheduled_at END
                FROM (
                    SELECT scheduled_at, is_valid FROM {main} t
                    WHERE t.address = failure.address AND {HOUR} >= {} AND scheduled_at > failure.last_at AND {CHECKED}
                    ORDER BY {HOUR}, scheduled_at
                    LIMIT 1
                ) next
            ))) OVER (PARTITION BY address ORDER BY first_at DESC) AS ended_at
        FROM ({}) failure
    ) ended
    GROUP BY address, ended_at, outcome
) by_outcome
GROUP BY address, ended_at;\n",
        hour_of("failure.last_at"),
        cheaply(&parts),
    )
}

/// The failed checks of `from` (a table, quoted) that lie `within` (a condition), counted by their host, their outcome and
/// the first valid check after them. Where the hours that are looked at have none after them, `last_at` is the last of all
/// that have none.
///
/// Looks only at rows near failed ones: the index of failed checks tells the hours with some, and of an unbroken run of
/// such hours all rows are read.
///
/// That the hour of the last failed check is the last hour is always so. It is asked for the planner's sake: it takes an
/// equation for rare and so expects little work, where it would compile the query for seconds (JIT) otherwise.
fn failures(from: &str, within: &str) -> String {
    format!(
        "SELECT run.address, near.outcome, min(near.scheduled_at) AS first_at, count(*) AS checks, near.ended_at,
        CASE WHEN near.ended_at IS NULL THEN run.last_at END AS last_at
    FROM (
        SELECT address, min(hour) AS first_hour, max(hour) AS last_hour, max(last_failed) AS last_at
        FROM (
            SELECT address, hour, last_failed,
                hour - row_number() OVER (PARTITION BY address ORDER BY hour) * interval '1 hour' AS run
            FROM (
                SELECT address, {HOUR} AS hour, max(scheduled_at) AS last_failed
                FROM {from}
                WHERE {FAILED} AND {within}
                GROUP BY address, {HOUR}
            ) failed
        ) hours
        GROUP BY address, run
        HAVING {} = max(hour)
    ) run CROSS JOIN LATERAL (
        SELECT scheduled_at, is_valid, coalesce(outcome, 'unknown') AS outcome,
            min(scheduled_at) FILTER (WHERE is_valid) OVER (ORDER BY scheduled_at DESC) AS ended_at
        FROM {from}
        WHERE address = run.address
            AND {HOUR} BETWEEN first_hour AND last_hour
            AND scheduled_at >= first_hour AND scheduled_at < last_hour + interval '1 hour'
            AND {CHECKED}
    ) near
    WHERE NOT near.is_valid
    GROUP BY run.address, run.last_at, near.outcome, near.ended_at",
        hour_of("max(last_failed)"),
    )
}

/// The newest row's certificate; while a host fails before its certificate is seen, the one seen within the day before.
/// Ordered as the index is, for the planner's sake: by `scheduled_at` alone it expects so much work that it compiles the
/// query for seconds (JIT) before it runs for a tenth of one.
pub fn certificates(table: &TableName) -> String {
    let main = table.quoted("");
    let latest = table.quoted(Object::Latest.suffix());
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
