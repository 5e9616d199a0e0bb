//! The DB_* variables: how to connect to the database, and which table to use.

use std::path::PathBuf;
use std::time::Duration;

use super::form::{MAX_LINE_BYTES, SECOND, host, host_and_port, host_of_url, is_plain_line, is_quoted, port};
use super::reader::{PemKind, Reader};
use super::secret::Secret;
use crate::tables::names::{MAX_IDENTIFIER_BYTES, MAX_TABLE_BYTES, TableName};
use crate::words::words;

const DEFAULT_TABLE: &str = "host_metrics";
const DEFAULT_PORT: u16 = 5_432;

/// DB_SSLROOTCERT for the CAs that this machine trusts, as in libpq.
pub const SYSTEM_CERTIFICATES: &str = "system";
const BATCH_SECONDS: std::ops::RangeInclusive<f64> = 0.01..=3_600.0;

#[derive(Clone)]
pub struct DatabaseConfig {
    /// A name, an IP address (IPv6 without brackets), or the directory of a Unix-domain socket.
    pub host: String,
    pub port: u16,
    pub name: String,
    pub user: String,
    pub password: Option<Secret>,
    pub table: TableName,
    pub ssl_mode: DbSslMode,
    /// A PEM file, or [`SYSTEM_CERTIFICATES`].
    pub ssl_root_cert: Option<PathBuf>,
}

words! {
    /// The values of libpq's `sslmode`, with libpq's meaning.
    DbSslMode, as_str:
    Disable "disable",
    Prefer "prefer",
    Require "require",
    VerifyCa "verify-ca",
    VerifyFull "verify-full",
}

pub(super) fn database(reader: &mut Reader<'_>) -> DatabaseConfig {
    let host = database_host(reader);
    let port_expected =
        format!("a port number from 1 to 65535; correct it, or leave it unset for {DEFAULT_PORT}");
    let port = match reader.get("DB_PORT") {
        Some(text) if port(text).is_none() => {
            // Kubernetes sets DB_PORT to such a URL if there is a Service named `db`.
            let remedy = text.starts_with("tcp://").then(|| {
                "Kubernetes sets this variable for a Service named `db`: set `enableServiceLinks: false`, or set DB_PORT explicitly".to_owned()
            });
            reader.wrong("DB_PORT", port_expected, remedy);
            DEFAULT_PORT
        }
        text => text.and_then(port).unwrap_or(DEFAULT_PORT),
    };
    // libpq also accepts a connection string here; this program does not.
    let is_name = |text: &str| is_plain_line(text, MAX_LINE_BYTES) && !text.contains("://");
    let name = reader.required("DB_NAME", "the name of the database only", is_name);
    let is_user = |text: &str| is_plain_line(text, MAX_LINE_BYTES) && !text.contains(':');
    let user = match reader.get("DB_USER") {
        Some(text) if text.contains(':') => {
            let remedy = "set DB_USER to the user's name only, and DB_PASSWORD to the password".to_owned();
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
            DbSslMode::named(&text.to_ascii_lowercase())
        })
        .unwrap_or(DbSslMode::Prefer);
    let ssl_root_cert = ssl_root_cert(reader, ssl_mode);
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

fn ssl_root_cert(reader: &mut Reader<'_>, mode: DbSslMode) -> Option<PathBuf> {
    use DbSslMode::{Disable, VerifyCa, VerifyFull};
    let name = "DB_SSLROOTCERT";
    match (reader.get(name), mode) {
        // Not used without TLS.
        (_, Disable) => None,
        (Some(SYSTEM_CERTIFICATES), VerifyFull) => Some(SYSTEM_CERTIFICATES.into()),
        (Some(SYSTEM_CERTIFICATES), _) => {
            let expected = "a PEM file; `system` requires DB_SSLMODE=verify-full, because anyone can get a certificate for some name \
                            from a public CA";
            reader.wrong(name, expected, None);
            None
        }
        (None, VerifyCa | VerifyFull) => {
            let expected = "the PEM file of the database's CA, because DB_SSLMODE verifies its certificate; or, with \
                            DB_SSLMODE=verify-full, `system` for the CAs that this machine trusts";
            reader.wrong(name, expected, None);
            None
        }
        _ => reader.pem_file(name, PemKind::Certificate),
    }
}

fn database_host(reader: &mut Reader<'_>) -> String {
    let name = "DB_HOST";
    let value = reader.get(name);
    let is_directory = |text: &&str| text.starts_with('/') && is_plain_line(text, MAX_LINE_BYTES);
    match value.and_then(|text| host(text).or(Some(text).filter(is_directory))) {
        Some(host) => host.to_owned(),
        None => {
            let expected = "the name or IP address of one host, or the directory of the database's socket";
            reader.wrong(name, expected, value.and_then(host_remedy));
            String::new()
        }
    }
}

fn host_remedy(text: &str) -> Option<String> {
    let others = "DB_PORT, DB_NAME, DB_USER and DB_PASSWORD";
    if text.contains("://") {
        return Some(match host_of_url(text) {
            Some(host) => format!("this is a URL: set DB_HOST={host}, and set {others} from its other parts"),
            None => format!("this is a URL: set DB_HOST to its host, and set {others} from its other parts"),
        });
    }
    let (host, port) = host_and_port(text)?;
    Some(format!(
        "the port has its own variable: set DB_HOST={host} and DB_PORT={port}"
    ))
}

pub(super) fn table(reader: &mut Reader<'_>) -> TableName {
    let expected = format!(
        "`table` or `schema.table`, with at most {MAX_TABLE_BYTES} bytes for the table and {MAX_IDENTIFIER_BYTES} for \
         the schema, and without dots and double quotes in them; correct it, or leave it unset for {DEFAULT_TABLE}"
    );
    let is_slip = |text: &str| is_quoted(text) || text.trim() != text;
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
