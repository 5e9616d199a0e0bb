//! The queries of the views, except for those of `windows`, and the SQL that they share with `status`.
//!
//! Pure text. Only `_latest` reads rows. The others read the state: their cost grows with the hosts and not with the rows, and
//! their results do not change when old rows are dropped.

use crate::tables::names::{Object, TableName};

/// The expression of the index for the history of a host.
///
/// Because the time is rounded, the index is deduplicated: an hour of a host is one key with a list of rows. That takes 10 bytes
/// per row; `(address, scheduled_at)` would take 134. With `(address)` alone, 8 bytes, all rows of a host's day would have to be read
/// to find the newest one.
pub const HOUR: &str = "date_bin('1 hour', scheduled_at, timestamptz '2000-01-01 00:00:00+00')";

/// A tick without a check, because it was missed, or because the agent's machine or network failed. It is no failed check.
pub const NOT_CHECKED: &str = "outcome IN ('missed', 'agent_error', 'agent_offline')";

/// A failed check; contains [`NOT_CHECKED`].
pub const FAILED: &str =
    "NOT is_valid AND (outcome IN ('missed', 'agent_error', 'agent_offline')) IS NOT TRUE";

/// A tick with a check. Valid rows are tested first, because most rows are valid and comparing text is slow.
pub const CHECKED: &str = "(is_valid OR (outcome IN ('missed', 'agent_error', 'agent_offline')) IS NOT TRUE)";

/// The newest row of each host and place. The state knows its time, so one partition has to be searched. If the row was rejected
/// or is not written yet, it is the newest one before. Without state it is the newest row of each host; the hosts are then
/// found by jumping through the index from one address to the next.
///
/// `address || '' = address` is always true. The planner assumes that it holds for one place in 200, so it estimates a cost below
/// `jit_above_cost`. A view cannot switch off the JIT compiler, which would take longer than the query.
pub(super) fn latest(table: &TableName) -> String {
    let main = table.quoted("");
    let series = table.quoted(Object::Series.suffix());
    let hour = HOUR.replace("scheduled_at", "place.last_seen_at");
    let of_place = "address = place.address AND coalesce(t.agent, '') = place.agent";
    format!(
        "SELECT newest.*
FROM (SELECT * FROM {series} WHERE address || '' = address) place CROSS JOIN LATERAL (
    (SELECT * FROM {main} t WHERE {of_place} AND {HOUR} = {hour} AND scheduled_at = place.last_seen_at LIMIT 1)
    UNION ALL
    (SELECT * FROM {main} t WHERE {of_place} AND {HOUR} <= {hour} AND scheduled_at <= place.last_seen_at
    ORDER BY {HOUR} DESC, scheduled_at DESC LIMIT 1)
    LIMIT 1
) newest
UNION ALL
SELECT newest.*
FROM (
    WITH RECURSIVE hosts (address) AS (
        (SELECT address FROM {main} WHERE NOT EXISTS (SELECT FROM {series}) ORDER BY address LIMIT 1)
        UNION ALL
        SELECT (SELECT t.address FROM {main} t WHERE t.address > hosts.address ORDER BY t.address LIMIT 1)
        FROM hosts WHERE hosts.address IS NOT NULL
    )
    SELECT address FROM hosts
) host CROSS JOIN LATERAL (
    SELECT * FROM {main} t WHERE address = host.address AND scheduled_at IS NOT NULL
    ORDER BY {HOUR} DESC, scheduled_at DESC LIMIT 1
) newest;\n"
    )
}

/// The certificate of each host that was seen last.
pub(super) fn certificates(table: &TableName) -> String {
    let series = table.quoted(Object::Series.suffix());
    format!(
        "SELECT DISTINCT ON (address) address, cert_expires_at, cert_expires_at - now() AS expires_in,
    floor(date_part('epoch', cert_expires_at - now()) / 86400)::integer AS days_left, cert_seen_at AS seen_at
FROM {series}
WHERE cert_expires_at IS NOT NULL
ORDER BY address, cert_seen_at DESC;\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::Outcome;

    #[test]
    fn the_texts_name_exactly_the_outcomes_without_a_check() {
        for outcome in Outcome::ALL {
            let is_checked = outcome == Outcome::Ok || outcome.is_failed_check();
            let word = format!("'{}'", outcome.as_str());
            for text in [NOT_CHECKED, FAILED, CHECKED] {
                assert_eq!(text.contains(&word), !is_checked, "{word} in {text}");
            }
        }
    }
}
