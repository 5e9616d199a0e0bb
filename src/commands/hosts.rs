//! `host-metrics hosts`: changes and shows the table of hosts that `produce -c postgres:` reads.
//!
//! Owns the statements. Each command is one statement or one transaction, so a producer never sees half of it. What is written
//! was read by `host_file` before; plain SQL works as well, because `produce` reads every row again.

use std::path::Path;

use anyhow::bail;
use tokio_postgres::types::ToSql;

use crate::cli::HostsAdd;
use crate::config::{DatabaseConfig, WrongInput};
use crate::postgres::{self, Fault, Session};
use crate::produce::host_file::{self, Files};
use crate::produce::hosts::rows::HostRow;
use crate::tables::names::Object;
use crate::terminal::{self, columns, plain};

/// A host that is to be added.
pub struct NewHost {
    row: HostRow,
    note: Option<String>,
}

impl NewHost {
    pub fn new(args: &HostsAdd, secrets: Option<&Path>) -> Result<Self, WrongInput> {
        let row = HostRow {
            address: args.address.clone(),
            frequency: args.frequency.clone(),
            options: args
                .options
                .iter()
                .map(|option| quoted(option))
                .collect::<Vec<_>>()
                .join(" "),
            regex: args.regex.clone().unwrap_or_default(),
        };
        let line = row.line().map_err(WrongInput)?;
        host_file::parse_with("host", line.as_bytes(), &Files::new(secrets, None))
            .map_err(|error| WrongInput(error.0))?;
        Ok(Self {
            row,
            note: args.note.clone(),
        })
    }
}

/// The option as in a host file, where a value with spaces is in quotes. The shell has removed them.
fn quoted(option: &str) -> String {
    match option.split_once('=') {
        Some((name, value)) if value.contains([' ', '\t']) && !value.starts_with('"') => {
            let value = value.replace('\\', "\\\\").replace('"', "\\\"");
            format!("{name}=\"{value}\"")
        }
        _ => option.to_owned(),
    }
}

/// A host file that is to be imported.
pub struct Import {
    rows: Vec<HostRow>,
    replaces: bool,
}

impl Import {
    pub fn read(path: &Path, secrets: Option<&Path>, replaces: bool) -> Result<Self, WrongInput> {
        let wrong = |error: host_file::HostFileError| WrongInput(error.0);
        let contents = host_file::contents(path);
        let text = contents
            .as_ref()
            .map(|bytes| String::from_utf8_lossy(bytes).into_owned())
            .unwrap_or_default();
        host_file::parse_contents(path, contents, secrets).map_err(wrong)?;
        let lines = text.trim_start_matches('\u{feff}').lines().map(str::trim);
        let is_host = |line: &&str| !line.is_empty() && !line.starts_with('#');
        let rows = lines.filter(is_host).map(|line| {
            let [address, frequency, options, regex] = host_file::columns(line).map(str::to_owned);
            HostRow {
                address,
                frequency,
                options,
                regex,
            }
        });
        Ok(Self {
            rows: rows.collect(),
            replaces,
        })
    }
}

/// Adds the host. `replaces`: changes it if it is there, which is an error otherwise.
pub fn add(config: &DatabaseConfig, host: &NewHost, replaces: bool) -> anyhow::Result<()> {
    let NewHost { row, note } = host;
    let conflict = match replaces {
        true => {
            "DO UPDATE SET frequency = excluded.frequency, options = excluded.options, regex = excluded.regex, \
             note = coalesce(excluded.note, h.note), enabled = true"
        }
        false => "DO NOTHING",
    };
    let added = run(config, async |session, table| {
        let sql = format!(
            "INSERT INTO {table} AS h (address, frequency, options, regex, note) \
             VALUES ($1, $2, nullif($3, ''), nullif($4, ''), $5) ON CONFLICT (address) {conflict}"
        );
        let params: [&(dyn ToSql + Sync); 5] = [&row.address, &row.frequency, &row.options, &row.regex, note];
        session.execute("adding the host", &sql, &params).await
    })?;
    if added == 0 {
        bail!(
            "{} is already in the table; use `hosts add --replace` to change it",
            row.address
        );
    }
    Ok(())
}

/// Removes these hosts, or none of them if one is not in the table.
pub fn remove(config: &DatabaseConfig, addresses: &[String]) -> anyhow::Result<()> {
    change(config, addresses, |table| {
        format!("DELETE FROM {table} WHERE address = ANY ($1) RETURNING address")
    })
}

/// Enables or disables these hosts, or none of them if one is not in the table.
pub fn enable(config: &DatabaseConfig, addresses: &[String], enabled: bool) -> anyhow::Result<()> {
    change(config, addresses, |table| {
        format!("UPDATE {table} SET enabled = {enabled} WHERE address = ANY ($1) RETURNING address")
    })
}

fn change(config: &DatabaseConfig, addresses: &[String], sql: impl Fn(&str) -> String) -> anyhow::Result<()> {
    let missing = run(config, async |session, table| {
        session.batch("BEGIN", "BEGIN").await?;
        let sql = sql(table);
        let rows = session.query("changing the hosts", &sql, &[&addresses]).await?;
        let found: Vec<String> = rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?;
        let missing: Vec<String> = addresses
            .iter()
            .filter(|address| !found.contains(address))
            .cloned()
            .collect();
        let end = if missing.is_empty() { "COMMIT" } else { "ROLLBACK" };
        session.batch(end, end).await?;
        Ok(missing)
    })?;
    match missing.as_slice() {
        [] => Ok(()),
        missing => bail!(
            "nothing was changed, because the table has no {}",
            missing.join(", ")
        ),
    }
}

/// Adds or changes the hosts of a file in one transaction. Returns what was done, for a person.
pub fn import(config: &DatabaseConfig, import: &Import) -> anyhow::Result<String> {
    let Import { rows, replaces } = import;
    let column = |of: fn(&HostRow) -> &String| rows.iter().map(|row| of(row).as_str()).collect::<Vec<_>>();
    let addresses = column(|row| &row.address);
    let (frequencies, options, regexes) = (
        column(|row| &row.frequency),
        column(|row| &row.options),
        column(|row| &row.regex),
    );
    let enabled = if *replaces { "true" } else { "h.enabled" };
    let (added, changed, removed) = run(config, async |session, table| {
        session.batch("BEGIN", "BEGIN").await?;
        let sql = format!(
            "INSERT INTO {table} AS h (address, frequency, options, regex) \
             SELECT address, frequency, nullif(options, ''), nullif(regex, '') \
             FROM unnest($1::text[], $2::text[], $3::text[], $4::text[]) n (address, frequency, options, regex) \
             ON CONFLICT (address) DO UPDATE SET frequency = excluded.frequency, options = excluded.options, \
                 regex = excluded.regex, enabled = {enabled} \
             WHERE (h.frequency, h.options, h.regex, h.enabled) \
                 IS DISTINCT FROM (excluded.frequency, excluded.options, excluded.regex, {enabled}) \
             RETURNING xmax = 0"
        );
        let params: [&(dyn ToSql + Sync); 4] = [&addresses, &frequencies, &options, &regexes];
        let written = session.query("importing the hosts", &sql, &params).await?;
        let mut added = 0;
        for row in &written {
            added += usize::from(row.try_get::<_, bool>(0)?);
        }
        let removed = match replaces {
            false => 0,
            true => {
                let sql = format!("DELETE FROM {table} WHERE address <> ALL ($1)");
                session
                    .execute("removing the other hosts", &sql, &[&addresses])
                    .await?
            }
        };
        session.batch("COMMIT", "COMMIT").await?;
        Ok((added, written.len() - added, removed))
    })?;
    let same = rows.len() - added - changed;
    Ok(format!(
        "{added} added, {changed} changed, {same} as before, {removed} removed\n"
    ))
}

/// A row of the table, as `list` and `export` show it.
struct Listed {
    row: HostRow,
    is_enabled: bool,
    note: String,
    error: String,
}

/// All hosts as a table for a person.
pub fn list(config: &DatabaseConfig) -> anyhow::Result<String> {
    let mut table = terminal::table([
        "ADDRESS",
        "FREQUENCY",
        "OPTIONS",
        "REGEX",
        "ENABLED",
        "NOTE",
        "ERROR",
    ]);
    for listed in listed(config)? {
        let Listed {
            row,
            is_enabled,
            note,
            error,
        } = listed;
        let enabled = if is_enabled { "yes" } else { "no" };
        let texts = [
            &row.address,
            &row.frequency,
            &row.options,
            &row.regex,
            enabled,
            &note,
            &error,
        ];
        table.push(texts.map(plain).to_vec());
    }
    Ok(columns(&table).join("\n") + "\n")
}

/// All hosts as a host file. Disabled ones are comments.
pub fn export(config: &DatabaseConfig) -> anyhow::Result<String> {
    let mut text = String::new();
    for listed in listed(config)? {
        if !listed.note.is_empty() {
            text.push_str(&format!("# {}\n", plain(&listed.note)));
        }
        match listed.row.line() {
            Ok(line) if listed.is_enabled => text.push_str(&format!("{line}\n")),
            Ok(line) => text.push_str(&format!("# disabled: {line}\n")),
            Err(error) => text.push_str(&format!("# {}: {error}\n", plain(&listed.row.address))),
        }
    }
    Ok(text)
}

fn listed(config: &DatabaseConfig) -> anyhow::Result<Vec<Listed>> {
    run(config, async |session, table| {
        let sql = format!(
            "SELECT address::text, frequency::text, options::text, regex::text, note::text, error::text, enabled FROM {table} \
             ORDER BY address"
        );
        let rows = session.query("reading the hosts", &sql, &[]).await?;
        let listed = rows.iter().map(|row| {
            let text = |column: usize| Ok(row.try_get::<_, Option<String>>(column)?.unwrap_or_default());
            Ok(Listed {
                row: HostRow {
                    address: text(0)?,
                    frequency: text(1)?,
                    options: text(2)?,
                    regex: text(3)?,
                },
                note: text(4)?,
                error: text(5)?,
                is_enabled: row.try_get::<_, Option<bool>>(6)?.unwrap_or(true),
            })
        });
        Ok(listed.collect::<Result<Vec<_>, tokio_postgres::Error>>()?)
    })
}

/// Does the work in a session of its own. It is given the quoted name of the table.
fn run<T>(
    config: &DatabaseConfig,
    work: impl AsyncFnOnce(&Session, &str) -> Result<T, Fault>,
) -> anyhow::Result<T> {
    postgres::once(config, async |session| {
        let table = session.table.quoted(Object::Hosts.suffix());
        let grant = format!("GRANT SELECT, INSERT, UPDATE, DELETE ON {table} to this user");
        Ok(work(session, &table)
            .await
            .map_err(|fault| fault.with_grant(&grant))?)
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use proptest::prelude::*;

    use super::*;
    use crate::check::target::Target;
    use crate::cli::{self, Cli, Command};

    fn read(line: &str) -> Target {
        let mut hosts = host_file::parse("hosts", line.as_bytes()).unwrap();
        assert_eq!(hosts.targets.len(), 1, "{line}");
        hosts.targets.remove(0)
    }

    proptest! {
        /// What `export` prints is the host that `add` or `import` was given, whatever has to be quoted.
        #[test]
        fn an_exported_host_is_the_one_that_was_added(
            name in r#"[a-zä"\\][ -~ä]{0,12}"#,
            body in r#"[ -~ä\t]{1,20}"#,
            value in r#"[!-?A-~][ -?A-~]{0,12}"#,
            expected in r#"[ -~]{0,12}"#,
            regex in proptest::option::of(r#"[a-z]{0,2}[ä !#@"]{0,3}[a-z]\.?"#),
        ) {
            let options = [
                format!("name={name}"),
                "method=POST".to_owned(),
                format!("body={body}"),
                format!("header=X-Y: {value}"),
                format!("json=/a:{expected}"),
            ];
            let regex = regex.map(|regex| regex.trim().to_owned());
            // An unquoted value that begins with a quote is one that is quoted already, and may be wrong.
            let Ok(given) = host_file::target("a.example", &options, regex.as_deref()) else {
                return Ok(());
            };
            let mut words = vec!["host-metrics", "hosts", "add"];
            options.iter().for_each(|option| words.extend(["-o", option]));
            words.extend(["--", "a.example", "5"]);
            words.extend(regex.as_deref());
            let Command::Hosts(cli::Hosts::Add(args)) = Cli::parse_from(words).command else {
                unreachable!("it is `hosts add`");
            };
            let Ok(added) = NewHost::new(&args, None) else {
                return Ok(());
            };
            let line = added.row.line().unwrap();
            let exported = read(&line);
            let given = Target { interval: exported.interval, ..given };
            prop_assert_eq!(&exported, &given, "{}", line);

            let [address, frequency, options, regex] = host_file::columns(&line).map(str::to_owned);
            let imported = HostRow { address, frequency, options, regex };
            prop_assert_eq!(&read(&imported.line().unwrap()), &given);
            prop_assert_eq!(&read(&given.to_string()), &given, "{}", given);
        }
    }
}
