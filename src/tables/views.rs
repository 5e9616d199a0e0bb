//! The questions that the views ask.
//!
//! Pure text, as `schema`. Only `_latest` reads rows. All others read the state, so what they cost grows with the hosts and
//! not with the rows, and what they say stays when old rows go.

use crate::consume::fold::rollup::{BIN_DIGITS, BIN_RATIO, BINS, FIRST_BIN_MICROS};
use crate::tables::names::{Object, TableName};

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

/// The hour that `at`, an expression, lies in.
pub fn hour_of(at: &str) -> String {
    HOUR.replace("scheduled_at", at)
}

/// The windows of the views: what their columns are called, and how long they are.
pub const WINDOWS: [(&str, &str); 6] = [
    ("1h", "1 hour"),
    ("24h", "24 hours"),
    ("7d", "168 hours"),
    ("30d", "720 hours"),
    ("90d", "2160 hours"),
    ("365d", "8760 hours"),
];

/// Percentiles of more buckets would take longer than a person waits.
const LATENCY_WINDOWS: usize = 4;

/// The buckets of these windows, each with its window: five-minute ones for the hour, hours for the day. A
/// longer window is made of days, and of the hours of the day in which it begins. A window begins with the bucket that its
/// beginning lies in, and what a clock that is ahead wrote is not in it.
///
/// Widths and beginnings are constants to the planner, one part each: so it knows how few buckets those are.
pub fn buckets(table: &TableName, windows: &[(&str, &str)]) -> String {
    let rollups = table.quoted(Object::Rollups.suffix());
    let part = |name: &str, seconds: i32, within: &str| {
        format!(
            "    SELECT '{name}' AS period, {rollups}.* FROM {rollups}\n    \
             WHERE seconds = {seconds} AND starts_at <= now() AND {within}"
        )
    };
    let bin = |width: &str, ago: &str| {
        format!("date_bin('{width}', now() - interval '{ago}', timestamptz '2000-01-01 00:00:00+00')")
    };
    let mut parts = Vec::new();
    for (name, ago) in windows {
        let hour = format!("starts_at >= {}", bin("1 hour", ago));
        let next_day = format!("{} + interval '24 hours'", bin("24 hours", ago));
        match *name {
            "1h" => parts.push(part(
                name,
                300,
                &format!("starts_at >= {}", bin("5 minutes", ago)),
            )),
            "24h" => parts.push(part(name, 3_600, &hour)),
            _ => {
                parts.push(part(name, 3_600, &format!("{hour} AND starts_at < {next_day}")));
                parts.push(part(name, 86_400, &format!("starts_at >= {next_day}")));
            }
        }
    }
    parts.join("\n    UNION ALL\n")
}

/// The newest row of each host and place. The hosts are found by jumping through the index from one address to the next, so
/// the work grows with the hosts and the partitions, not with the rows. The places are the state's, which also says in which
/// hour to look; of a host that it does not know yet there is one row.
pub fn latest(table: &TableName) -> String {
    let main = table.quoted("");
    let series = table.quoted(Object::Series.suffix());
    let hour_of_place = hour_of("place.last_seen_at");
    format!(
        "WITH RECURSIVE hosts (address) AS (\n    \
             (SELECT address FROM {main} ORDER BY address LIMIT 1)\n    \
             UNION ALL\n    \
             SELECT (SELECT t.address FROM {main} t WHERE t.address > hosts.address ORDER BY t.address LIMIT 1)\n    \
             FROM hosts WHERE hosts.address IS NOT NULL\n\
         )\n\
         SELECT newest.*\n\
         FROM hosts LEFT JOIN LATERAL (\n    \
             SELECT agent, last_seen_at, lead(last_seen_at) OVER (ORDER BY last_seen_at) IS NULL AS is_newest\n    \
             FROM {series} WHERE address = hosts.address AND last_seen_at IS NOT NULL\n\
         ) place ON true\n\
         CROSS JOIN LATERAL (\n    \
             SELECT * FROM {main} WHERE address = hosts.address AND scheduled_at IS NOT NULL\n        \
             AND (place.agent IS NULL OR coalesce({main}.agent, '') = place.agent)\n        \
             AND {HOUR} >= coalesce({hour_of_place}, '-infinity')\n        \
             AND {HOUR} <= CASE WHEN is_newest IS NOT FALSE THEN 'infinity' ELSE {hour_of_place} + interval '1 hour' END\n    \
             ORDER BY {HOUR} DESC, scheduled_at DESC LIMIT 1\n\
         ) newest;\n"
    )
}

/// A row for each host (its agent is null) and one for each place (`''` where the records name none). Of a host the share of time by verdict, too: what its
/// incidents leave of the time since its first check, until two intervals after its last one.
pub fn uptime(table: &TableName) -> String {
    let series = table.quoted(Object::Series.suffix());
    let incidents = table.quoted(Object::Incidents.suffix());
    let (mut columns, mut sums, mut down) = (Vec::new(), Vec::new(), Vec::new());
    for (name, ago) in WINDOWS {
        columns.push(format!(
            "due_{name}, valid_{name}, missed_{name}, \
             valid_{name}::double precision / nullif(due_{name} - missed_{name}, 0) AS uptime_{name}, \
             CASE WHEN agent IS NULL THEN 1 - coalesce(down_{name}, 0) / nullif(extract(epoch FROM \
                 watched_until - greatest(first_check_at, now() - interval '{ago}'))::double precision, 0) END \
                 AS verdict_uptime_{name}"
        ));
        for (count, what) in [
            ("due", "due"),
            ("valid", "coalesce(valid, 0)"),
            ("missed", "coalesce(missed, 0) + coalesce(offline, 0)"),
        ] {
            sums.push(format!(
                "coalesce(sum({what}) FILTER (WHERE period = '{name}'), 0)::bigint AS {count}_{name}"
            ));
        }
        down.push(format!(
            "sum(extract(epoch FROM least(ended_at, watched_until) - greatest(started_at, now() - interval '{ago}'))) \
             FILTER (WHERE least(ended_at, watched_until) > now() - interval '{ago}')::double precision AS down_{name}"
        ));
    }
    format!(
        "WITH bucket AS (
    SELECT series_id, period, sum(due) AS due, sum(valid) AS valid, sum(missed) AS missed, sum(offline) AS offline
    FROM (
{}
    ) buckets
    GROUP BY series_id, period
), host AS (
    SELECT address, min(first_check_at) AS first_check_at,
        least(now(), max(last_check_at) + 2 * make_interval(secs => max(interval_seconds))) AS watched_until
    FROM {series} GROUP BY address
), down AS (
    SELECT address, {}
    FROM host JOIN {incidents} USING (address)
    WHERE ended_at IS NULL OR ended_at > now() - interval '8760 hours'
    GROUP BY address
), counts AS (
    SELECT address, agent, {}
    FROM {series} JOIN bucket USING (series_id)
    GROUP BY GROUPING SETS ((address), (address, agent))
)
SELECT address, agent, {}
FROM counts JOIN host USING (address) LEFT JOIN down USING (address);\n",
        buckets(table, &WINDOWS),
        down.join(",\n        "),
        sums.join(",\n        "),
        columns.join(",\n    "),
    )
}

/// A row for each host and window with a latency. A percentile is the middle of the bin that it lies in.
///
/// Postgres adds the histograms; the digits of a host's sum are looked at once.
pub fn latency(table: &TableName) -> String {
    let series = table.quoted(Object::Series.suffix());
    let digits = BIN_DIGITS * BINS;
    let summed: Vec<String> = WINDOWS[..LATENCY_WINDOWS]
        .iter()
        .map(|window| {
            format!(
                "    SELECT address, '{}' AS period, lpad(sum(histogram)::text, {digits}, '0')::bytea AS digits,
        max(latency_max_us) / 1e6::double precision AS max_seconds
    FROM (
{}
    ) buckets JOIN {series} USING (series_id)
    WHERE histogram IS NOT NULL
    GROUP BY address",
                window.0,
                buckets(table, std::slice::from_ref(window))
            )
        })
        .collect();
    let percentile = |share: &str, name: &str| {
        let bin = format!("min(bin) FILTER (WHERE running >= ceil({share} * latencies))");
        format!(
            "{FIRST_BIN_MICROS} / 1e6::double precision * power({BIN_RATIO}::double precision, {bin} - 0.5) AS {name}"
        )
    };
    format!(
        "SELECT address, period, latencies, least(p50, max_seconds) AS p50_seconds, least(p95, max_seconds) AS p95_seconds,
    least(p99, max_seconds) AS p99_seconds, max_seconds
FROM (
{}
) summed CROSS JOIN LATERAL (
    SELECT max(latencies)::bigint AS latencies,
        {},
        {},
        {}
    FROM (
        SELECT bin, sum(count) OVER (ORDER BY bin) AS running, sum(count) OVER () AS latencies
        FROM (
            SELECT bin, encode(substr(digits, {digits} - {BIN_DIGITS} * bin - {BIN_DIGITS} + 1, {BIN_DIGITS}), 'escape')::bigint AS count
            FROM generate_series(0, {BINS} - 1) bin
        ) entries
        WHERE count > 0
    ) running
) percentiles;\n",
        summed.join("\n    UNION ALL\n"),
        percentile("0.5", "p50"),
        percentile("0.95", "p95"),
        percentile("0.99", "p99"),
    )
}

/// Of each host the certificate that was seen last.
pub fn certificates(table: &TableName) -> String {
    let series = table.quoted(Object::Series.suffix());
    format!(
        "SELECT DISTINCT ON (address) address, cert_expires_at, cert_expires_at - now() AS expires_in,
    floor(extract(epoch FROM cert_expires_at - now()) / 86400)::integer AS days_left, cert_seen_at AS seen_at
FROM {series}
WHERE cert_expires_at IS NOT NULL
ORDER BY address, cert_seen_at DESC;\n"
    )
}
