//! The table `_windows`: the totals of each host and place over the last hour, day, week, month, quarter and year.
//!
//! A year of one host has hundreds of buckets, too many to add up whenever somebody reads a view. So `consume` adds them up in
//! the background (`consume::state` says when), and `_uptime`, `_latency` and `status` only read the result. Pure text.

use std::fmt::Write as _;

use crate::tables::buckets::{BIN_DIGITS, BIN_RATIO, FIRST_BIN_MICROS, count_of};
use crate::tables::names::{Object, TableName, literal};

/// The windows: the suffix of their columns, and their length.
pub const WINDOWS: [(&str, &str); 6] = [
    ("1h", "1 hour"),
    ("24h", "24 hours"),
    ("7d", "168 hours"),
    ("30d", "720 hours"),
    ("90d", "2160 hours"),
    ("365d", "8760 hours"),
];

/// The first windows also have percentiles of the latency.
const LATENCY_WINDOWS: usize = 4;

/// The columns of a window, without the window's suffix, and whether `_latency` shows them.
const COLUMNS: [(&str, &str, bool); 10] = [
    ("due", "bigint", false),
    ("valid", "bigint", false),
    // Ticks that were not checked.
    ("missed", "bigint", false),
    ("slow", "bigint", false),
    // The share of the time without an incident, from the host's first check until two intervals after its last one. Only hosts have
    // this and the latency.
    ("verdict_uptime", "double precision", false),
    ("latencies", "bigint", true),
    ("p50_seconds", "double precision", true),
    ("p95_seconds", "double precision", true),
    ("p99_seconds", "double precision", true),
    ("max_seconds", "double precision", true),
];

/// The columns that are updated with the first window.
const OF_THE_HOST: [(&str, &str); 1] = [
    // The mean of each bucket of five minutes, for sparklines.
    ("recent_latencies", "double precision[]"),
];

fn columns(window: usize) -> impl Iterator<Item = (&'static str, &'static str)> {
    let has_latency = window < LATENCY_WINDOWS;
    let columns = COLUMNS
        .into_iter()
        .filter(move |(.., is_latency)| has_latency || !is_latency);
    columns.map(|(column, kind, _)| (column, kind))
}

pub(super) fn create(table: &TableName) -> String {
    let name = table.quoted(Object::Windows.suffix());
    let mut sql = format!(
        "CREATE TABLE IF NOT EXISTS {name} (\n    address text COLLATE \"C\" NOT NULL,\n    is_host boolean NOT NULL,\n    \
         agent text COLLATE \"C\" NOT NULL,\n"
    );
    for (column, kind) in OF_THE_HOST {
        let _ = writeln!(sql, "    {column} {kind},");
    }
    for (number, (window, _)) in WINDOWS.iter().enumerate() {
        for (column, kind) in columns(number) {
            let _ = writeln!(sql, "    {column}_{window} {kind},");
        }
    }
    sql.push_str("    PRIMARY KEY (address, is_host, agent)\n) WITH (fillfactor = 50);\n");
    sql
}

/// The start of a window, rounded down to the start of a bucket.
fn start(window: usize) -> String {
    let width = if window == 0 { "5 minutes" } else { "1 hour" };
    bin(width, WINDOWS[window].1)
}

fn bin(width: &str, ago: &str) -> String {
    format!("date_bin('{width}', now() - interval '{ago}', timestamptz '2000-01-01 00:00:00+00')")
}

/// The buckets of a window: of five minutes for an hour, of an hour for a day, and otherwise of days, except for the day
/// in which the window begins. Records from the future, which a clock that is ahead wrote, do not count.
fn buckets(table: &TableName, window: usize) -> String {
    let rollups = table.quoted(Object::Rollups.suffix());
    let part = |seconds: i32, from: &str| {
        format!(
            "        SELECT * FROM {rollups} WHERE seconds = {seconds} AND starts_at <= now() AND starts_at >= {from}"
        )
    };
    let start = start(window);
    match window {
        0 => part(300, &start),
        1 => part(3_600, &start),
        _ => {
            let next_day = format!("{} + interval '24 hours'", bin("24 hours", WINDOWS[window].1));
            format!(
                "{} AND starts_at < {next_day}\n        UNION ALL\n{}",
                part(3_600, &start),
                part(86_400, &next_day)
            )
        }
    }
}

/// Brings a window (an index of [`WINDOWS`]) of all hosts and places up to date. Rows that stay the same are not written. A lock
/// keeps two consumers from doing it at the same time.
#[expect(clippy::too_many_lines, reason = "one statement of SQL")]
pub fn refresh(table: &TableName, window: usize) -> String {
    let name = |object: Object| table.quoted(object.suffix());
    let (series, incidents, windows) = (
        name(Object::Series),
        name(Object::Incidents),
        name(Object::Windows),
    );
    let suffix = WINDOWS[window].0;
    let (is_first, has_latency) = (window == 0, window < LATENCY_WINDOWS);
    let mut columns: Vec<(String, &str)> = columns(window)
        .map(|(column, _)| (format!("{column}_{suffix}"), column))
        .collect();
    if is_first {
        columns.extend(OF_THE_HOST.map(|(column, _)| (column.to_owned(), column)));
    }
    let list = |column: &dyn Fn(&(String, &str)) -> String| {
        columns.iter().map(column).collect::<Vec<_>>().join(", ")
    };
    let lock = literal(&format!("host-metrics windows {windows}"));
    format!(
        "SELECT pg_advisory_xact_lock(hashtextextended({lock}, 0));
WITH bucket AS (
    SELECT series_id, sum(due) AS due, sum(valid) AS valid, coalesce(sum(missed), 0) + coalesce(sum(offline), 0) AS missed,
        sum(slow) AS slow{histogram}
    FROM (
{buckets}
    ) buckets GROUP BY series_id
), host AS (
    SELECT address, grouping(agent) = 1 AS is_host, coalesce(agent, '') AS agent, min(first_check_at) AS first_check_at,
        max(last_check_at + 2 * make_interval(secs => coalesce(interval_seconds, 0))) AS watched_until,
        coalesce(sum(due), 0)::bigint AS due, coalesce(sum(valid), 0)::bigint AS valid, coalesce(sum(missed), 0)::bigint AS missed,
        coalesce(sum(slow), 0)::bigint AS slow{digits}
    FROM {series} LEFT JOIN bucket USING (series_id)
    GROUP BY GROUPING SETS ((address), (address, agent))
), down AS (
    SELECT address, sum(greatest(0, date_part('epoch', least(ended_at, watched_until, now()) - greatest(started_at, {start})))) AS seconds
    FROM host JOIN {incidents} USING (address)
    WHERE is_host AND (ended_at IS NULL OR ended_at > {start})
    GROUP BY address
){recent}
INSERT INTO {windows} AS w (address, is_host, agent, {names})
SELECT address, is_host, agent, {values}
FROM host LEFT JOIN down USING (address){percentiles}
ON CONFLICT (address, is_host, agent) DO UPDATE SET {updates}
WHERE ({old}) IS DISTINCT FROM ({new});\n",
        histogram = if has_latency {
            ",\n        sum(histogram) AS histogram, max(latency_max_us) AS latency_max_us"
        } else {
            ""
        },
        buckets = buckets(table, window),
        start = start(window),
        digits = if has_latency {
            ",\n        CASE WHEN grouping(agent) = 1 THEN sum(histogram)::text END AS digits,
        CASE WHEN grouping(agent) = 1 THEN max(latency_max_us) / 1e6::double precision END AS max_seconds"
        } else {
            ""
        },
        recent = if is_first { recent(table) } else { String::new() },
        names = list(&|(name, _)| name.clone()),
        values = list(&|(_, column)| match *column {
            "verdict_uptime" => format!(
                "CASE WHEN is_host AND first_check_at IS NOT NULL THEN greatest(0, 1 - coalesce(seconds, 0) / nullif(greatest(0, \
                     date_part('epoch', least(watched_until, now()) - greatest(first_check_at, {}))), 0)) END",
                start(window)
            ),
            "p50_seconds" | "p95_seconds" | "p99_seconds" => format!("least({column}, max_seconds)"),
            "recent_latencies" => "CASE WHEN is_host THEN recent_latencies END".to_owned(),
            column => column.to_owned(),
        }),
        percentiles = match (has_latency, is_first) {
            (true, true) => format!(" LEFT JOIN recent USING (address)\n{}", percentiles()),
            (true, false) => format!("\n{}", percentiles()),
            (false, _) => String::new(),
        },
        updates = list(&|(name, _)| format!("{name} = excluded.{name}")),
        old = list(&|(name, _)| format!("w.{name}")),
        new = list(&|(name, _)| format!("excluded.{name}")),
    )
}

/// The mean latency of each bucket of the last hour.
fn recent(table: &TableName) -> String {
    format!(
        ", recent AS (
    SELECT address, array_agg(latency ORDER BY starts_at) AS recent_latencies
    FROM (
        SELECT address, starts_at, sum(latency_us)::double precision / nullif({}, 0)::double precision / 1e6 AS latency
        FROM (
{}
        ) buckets JOIN {} USING (series_id) GROUP BY address, starts_at
    ) dots GROUP BY address
)",
        count_of("sum(histogram)"),
        buckets(table, 0),
        table.quoted(Object::Series.suffix())
    )
}

/// The percentiles of `digits`, the histogram of a host, from its lowest bin that is not empty to its highest. A percentile is the
/// middle of the bin that it is in.
fn percentiles() -> String {
    let percentile = |share: &str, name: &str| {
        format!(
            "{FIRST_BIN_MICROS} / 1e6::double precision * power({BIN_RATIO}::double precision, \
             min(bin) FILTER (WHERE running >= ceil({share} * total)) - 0.5) AS {name}_seconds"
        )
    };
    format!(
        "CROSS JOIN LATERAL (
    SELECT max(total)::bigint AS latencies,
        {},
        {},
        {}
    FROM (
        SELECT bin, sum(count) OVER (ORDER BY bin) AS running, sum(count) OVER () AS total
        FROM (
            SELECT bin, substr(digits, length(digits) - {BIN_DIGITS} * bin - {BIN_DIGITS} + 1, {BIN_DIGITS})::bigint AS count
            FROM generate_series((length(digits) - length(rtrim(digits, '0'))) / {BIN_DIGITS}, (length(digits) - 1) / {BIN_DIGITS}) bin
        ) bins
    ) running
) percentiles",
        percentile("0.5", "p50"),
        percentile("0.95", "p95"),
        percentile("0.99", "p99"),
    )
}

/// The counts of the hosts in some of the [`WINDOWS`], and their uptime by verdict, for the status page.
pub fn counts(table: &TableName, windows: &[&str]) -> String {
    let name = table.quoted(Object::Windows.suffix());
    let part = |window: &&str| {
        format!(
            "SELECT address, '{window}' AS period, valid_{window} AS valid, due_{window} - missed_{window} - valid_{window} AS failed, \
             missed_{window} AS not_made, slow_{window} AS slow, verdict_uptime_{window} AS verdict_uptime FROM {name} \
             WHERE is_host AND due_{window} IS NOT NULL"
        )
    };
    windows.iter().map(part).collect::<Vec<_>>().join(" UNION ALL ")
}

/// The view `_uptime`: a row for each host (its agent is null) and each place (`''` if the records have no agent).
pub(super) fn uptime(table: &TableName) -> String {
    let columns = WINDOWS.map(|(name, _)| {
        format!(
            "due_{name}, valid_{name}, missed_{name}, \
             valid_{name}::double precision / nullif(due_{name} - missed_{name}, 0) AS uptime_{name}, verdict_uptime_{name}"
        )
    });
    format!(
        "SELECT address, CASE WHEN NOT is_host THEN agent END AS agent, {}\nFROM {};\n",
        columns.join(",\n    "),
        table.quoted(Object::Windows.suffix())
    )
}

/// The view `_latency`: a row for each host and window with a latency.
pub(super) fn latency(table: &TableName) -> String {
    let names: Vec<&str> = COLUMNS
        .iter()
        .filter(|column| column.2)
        .map(|column| column.0)
        .collect();
    let windows = table.quoted(Object::Windows.suffix());
    let part = |(window, _): &(&str, &str)| {
        let columns: Vec<String> = names
            .iter()
            .map(|name| format!("{name}_{window} AS {name}"))
            .collect();
        format!(
            "SELECT address, '{window}' AS period, {} FROM {windows} WHERE latencies_{window} > 0",
            columns.join(", ")
        )
    };
    let parts: Vec<String> = WINDOWS[..LATENCY_WINDOWS].iter().map(part).collect();
    format!("{};\n", parts.join("\nUNION ALL\n"))
}
