//! The demo's queries, for the live table and the ledger.

use std::time::Duration;

use postgres::{Client, NoTls};

use crate::commands::demo::table::{Host, Newest, Totals};
use crate::config::DatabaseConfig;
use crate::tables::names::TableName;
use crate::tables::views::FAILED;
use crate::terminal::SPARKLINE_CHECKS;

/// The database runs on this machine, so a longer wait means that it hangs.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// The demo's own connection, besides those of the agents.
pub(super) struct Rows {
    client: Client,
    table: TableName,
}

/// The counts of the table, for the ledger.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counted {
    pub rows: i64,
    pub rejected: i64,
}

impl Rows {
    pub(super) fn connect(database: &DatabaseConfig) -> Result<Self, postgres::Error> {
        let mut config = postgres::Config::new();
        if let Some(password) = &database.password {
            config.password(password.reveal());
        }
        let client = config
            .host(&database.host)
            .port(database.port)
            .user(&database.user)
            .dbname(&database.name)
            .application_name("host-metrics demo")
            .connect_timeout(CONNECT_WITHIN)
            .options(&format!("-c statement_timeout={}", ANSWER_WITHIN.as_millis()))
            .connect(NoTls)?;
        Ok(Self {
            client,
            table: database.table.clone(),
        })
    }

    /// Whether `consume` has created its tables. The other queries need them.
    pub(super) fn tables_exist(&mut self) -> Result<bool, postgres::Error> {
        // The object that is created last.
        let last = self.table.quoted("_certificates");
        self.client
            .query_one("SELECT to_regclass($1) IS NOT NULL", &[&last])?
            .try_get(0)
    }

    /// The state of each address, in the order of `addresses`.
    pub(super) fn hosts(&mut self, addresses: &[&str]) -> Result<Vec<Host>, postgres::Error> {
        let sql = format!(
            "SELECT host.address, counts.checks, counts.valid, recent.latencies, recent.is_valid,
                    recent.outcome, recent.error
             FROM unnest($1::text[]) WITH ORDINALITY AS host (address, line)
             CROSS JOIN LATERAL (
                 SELECT count(*) AS checks, count(*) FILTER (WHERE is_valid) AS valid
                 FROM {table} WHERE address = host.address
             ) counts
             CROSS JOIN LATERAL (
                 SELECT coalesce(array_agg(latency ORDER BY scheduled_at), '{{}}') AS latencies,
                        (array_agg(is_valid ORDER BY scheduled_at DESC))[1] AS is_valid,
                        (array_agg(outcome ORDER BY scheduled_at DESC))[1] AS outcome,
                        (array_agg(error ORDER BY scheduled_at DESC))[1] AS error
                 FROM (
                     SELECT * FROM {table} WHERE address = host.address ORDER BY scheduled_at DESC LIMIT {newest}
                 ) newest
             ) recent
             ORDER BY host.line",
            table = self.table.quoted(""),
            newest = SPARKLINE_CHECKS,
        );
        let rows = self.client.query(&sql, &[&addresses])?;
        rows.iter()
            .map(|row| {
                let is_valid: Option<bool> = row.try_get("is_valid")?;
                let outcome: Option<String> = row.try_get("outcome")?;
                let error = row.try_get("error")?;
                let newest = is_valid.map(|is_valid| Newest {
                    is_valid,
                    outcome: outcome.unwrap_or_default(),
                    error,
                });
                Ok(Host {
                    address: row.try_get("address")?,
                    checks: row.try_get("checks")?,
                    valid: row.try_get("valid")?,
                    latencies: row.try_get("latencies")?,
                    newest,
                })
            })
            .collect()
    }

    pub(super) fn totals(&mut self, hosts: usize) -> Result<Totals, postgres::Error> {
        let sql = format!(
            "SELECT count(*) FILTER (WHERE is_valid), count(*) FILTER (WHERE {FAILED}),
                    (SELECT count(*) FROM {})
             FROM {}",
            self.table.quoted(""),
            self.table.quoted("_latest")
        );
        let row = self.client.query_one(&sql, &[])?;
        let count = |index| {
            row.try_get(index)
                .map(|count: i64| usize::try_from(count).unwrap_or_default())
        };
        Ok(Totals {
            hosts,
            up: count(0)?,
            down: count(1)?,
            rows: row.try_get(2)?,
        })
    }

    pub(super) fn counted(&mut self) -> Result<Counted, postgres::Error> {
        let sql = format!(
            "SELECT (SELECT count(*) FROM {}), (SELECT count(*) FROM {})",
            self.table.quoted(""),
            self.table.quoted("_rejected")
        );
        let row = self.client.query_one(&sql, &[])?;
        Ok(Counted {
            rows: row.try_get(0)?,
            rejected: row.try_get(1)?,
        })
    }
}
