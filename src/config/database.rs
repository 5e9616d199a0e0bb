//! How to reach the database and which table of it is ours: the DB_* variables.

use std::path::PathBuf;
use std::time::Duration;

use super::form::{host, host_and_port, host_of_url, is_plain_line, is_quoted, port};
use super::problems::{PemKind, Reader};
use super::{MAX_LINE_BYTES, SECOND, Secret};
use crate::tables::names::{MAX_IDENTIFIER_BYTES, MAX_TABLE_BYTES, TableName};

const DEFAULT_TABLE: &str = "host_metrics";
const DEFAULT_PORT: u16 = 5_432;
const BATCH_SECONDS: std::ops::RangeInclusive<f64> = 0.01..=3_600.0;

#[derive(Clone, Debug)]
pub struct DatabaseConfig {
    /// A name, an IP address (IPv6 without brackets), or the directory of a Unix-domain socket.
    pub host: String,
    pub port: u16,
    pub name: String,
    pub user: String,
    pub password: Option<Secret>,
    pub table: TableName,
    pub ssl_mode: DbSslMode,
    pub ssl_root_cert: Option<PathBuf>,
}

/// libpq's words with libpq's meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DbSslMode {
    Disable,
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

impl DbSslMode {
    pub fn from_word(word: &str) -> Option<Self> {
        Some(match word {
            "disable" => Self::Disable,
            "prefer" => Self::Prefer,
            "require" => Self::Require,
            "verify-ca" => Self::VerifyCa,
            "verify-full" => Self::VerifyFull,
            _ => return None,
        })
    }
}

pub(super) fn database(reader: &mut Reader<'_>) -> DatabaseConfig {
    let host = database_host(reader);
    let port_expected =
        format!("a port number from 1 to 65535; correct it, or leave it unset for {DEFAULT_PORT}");
    let port = match reader.get("DB_PORT") {
        Some(text) if port(text).is_none() => {
            // Kubernetes sets it so for every Service of that name.
            let remedy = text.starts_with("tcp://").then(|| {
                "Kubernetes sets this for a Service named `db`: set `enableServiceLinks: false`, or DB_PORT itself".to_owned()
            });
            reader.wrong("DB_PORT", port_expected, remedy);
            DEFAULT_PORT
        }
        text => text.and_then(port).unwrap_or(DEFAULT_PORT),
    };
    // libpq accepts a whole connection string for the name.
    let is_name = |text: &str| is_plain_line(text, MAX_LINE_BYTES) && !text.contains("://");
    let name = reader.required("DB_NAME", "the name of the database alone", is_name);
    let is_user = |text: &str| is_plain_line(text, MAX_LINE_BYTES) && !text.contains(':');
    let user = match reader.get("DB_USER") {
        Some(text) if text.contains(':') => {
            let remedy = "write the user's name alone, and the password to DB_PASSWORD".to_owned();
            reader.wrong_secret("DB_USER", "the name of the database's user", remedy);
            String::new()
        }
        _ => reader.required("DB_USER", "the name of the database's user", is_user),
    };
    let password = reader.secret("DB_PASSWORD", "DB_PASSWORD_FILE");
    let table = table(reader);
    let expected =
        "disable, prefer, require, verify-ca or verify-full; correct it, or leave it unset for prefer";
    let ssl_mode = reader
        .read("DB_SSLMODE", expected, |text| {
            DbSslMode::from_word(&text.to_ascii_lowercase())
        })
        .unwrap_or(DbSslMode::Prefer);
    // Without TLS it is not used.
    let ssl_root_cert = match ssl_mode {
        DbSslMode::Disable => None,
        _ => reader.pem_file("DB_SSLROOTCERT", PemKind::Certificate),
    };
    DatabaseConfig {
        host,
        port,
        name,
        user,
        password,
        table,
        ssl_mode,
        ssl_root_cert,
    }
}

fn database_host(reader: &mut Reader<'_>) -> String {
    let name = "DB_HOST";
    let value = reader.get(name);
    let is_directory = |text: &&str| text.starts_with('/') && is_plain_line(text, MAX_LINE_BYTES);
    match value.and_then(|text| host(text).or(Some(text).filter(is_directory))) {
        Some(host) => host.to_owned(),
        None => {
            let expected = "one host's name or IP address, or the directory of the database's socket";
            reader.wrong(name, expected, value.and_then(host_remedy));
            String::new()
        }
    }
}

fn host_remedy(text: &str) -> Option<String> {
    let others = "DB_PORT, DB_NAME, DB_USER and DB_PASSWORD";
    if text.contains("://") {
        return Some(match host_of_url(text) {
            Some(host) => format!("it is a URL: write DB_HOST={host}, and its other parts to {others}"),
            None => format!("it is a URL: write its host to DB_HOST, and its other parts to {others}"),
        });
    }
    if text.contains('=') {
        return Some(format!(
            "it is a connection string: write its host to DB_HOST, and its other parts to {others}"
        ));
    }
    if let Some((host, port)) = host_and_port(text) {
        return Some(format!(
            "the port has a variable of its own: write DB_HOST={host} and DB_PORT={port}"
        ));
    }
    if text.contains([',', ';']) {
        return Some(
            "several hosts are not supported: name one, or a name that always leads to the primary"
                .to_owned(),
        );
    }
    if text.contains('@') {
        return Some("write the host alone, and the user and password to DB_USER and DB_PASSWORD".to_owned());
    }
    let (before, _) = text.split_once('/')?;
    host(before).map(|host| format!("write DB_HOST={host}, and the name of the database to DB_NAME"))
}

pub(super) fn table(reader: &mut Reader<'_>) -> TableName {
    let expected = format!(
        "`table` or `schema.table`, with at most {MAX_TABLE_BYTES} bytes for the table and {MAX_IDENTIFIER_BYTES} for \
         the schema; put a name with a dot in double quotes; correct it, or leave it unset for {DEFAULT_TABLE}"
    );
    // Double quotes are SQL's, others are the slip of a file of variables.
    let is_slip = |text: &str| (is_quoted(text) && !text.starts_with('"')) || text.trim() != text;
    reader
        .read("DB_TABLE", expected, |text| {
            TableName::parse(text).filter(|_| !is_slip(text))
        })
        .unwrap_or_else(|| TableName {
            schema: None,
            name: DEFAULT_TABLE.to_owned(),
        })
}

pub(super) fn batch_wait(reader: &mut Reader<'_>) -> Duration {
    let expected = format!(
        "a number of seconds from {} to {}, e.g. 0.5; correct it, or leave it unset for 1",
        BATCH_SECONDS.start(),
        BATCH_SECONDS.end()
    );
    reader
        .read("DB_BATCH_SECONDS", expected, |text| {
            let seconds = text
                .parse()
                .ok()
                .filter(|seconds| BATCH_SECONDS.contains(seconds))?;
            Duration::try_from_secs_f64(seconds).ok()
        })
        .unwrap_or(SECOND)
}
