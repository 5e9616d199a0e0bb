//! Where the variables come from: `-e NAME=VALUE`, the environment, the `.env` file, merged into one set.
//!
//! Owns the names and which source wins; what a value means is the parent's.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use serde::Deserialize;

use super::problems::Problems;

/// The file read where `--env-file` names none, if it is there.
const DEFAULT_ENV_FILE: &str = ".env";

/// Far above any real file, far below what would hurt.
const MAX_ENV_FILE_BYTES: u64 = 1 << 20;

/// Every variable there is. In a `.env` file or the environment others are somebody else's, after `-e` they are slips.
pub const NAMES: [&str; 33] = [
    "KAFKA_BOOTSTRAP_SERVERS",
    "KAFKA_TOPIC",
    "KAFKA_SECURITY_PROTOCOL",
    "KAFKA_SSL_CA_FILE",
    "KAFKA_SSL_CERT_FILE",
    "KAFKA_SSL_KEY_FILE",
    "KAFKA_SASL_MECHANISM",
    "KAFKA_SASL_USERNAME",
    "KAFKA_SASL_USERNAME_FILE",
    "KAFKA_SASL_PASSWORD",
    "KAFKA_SASL_PASSWORD_FILE",
    "KAFKA_GROUP_ID",
    "KAFKA_GROUP_INSTANCE_ID",
    "DB_HOST",
    "DB_PORT",
    "DB_NAME",
    "DB_USER",
    "DB_PASSWORD",
    "DB_PASSWORD_FILE",
    "DB_TABLE",
    "DB_SSLMODE",
    "DB_SSLROOTCERT",
    "DB_BATCH_SIZE",
    "DB_BATCH_SECONDS",
    "DB_RETENTION",
    "CHECK_TIMEOUT",
    "MAX_THREADS",
    "MAX_BODY_BYTES",
    "USER_AGENT",
    "CHECK_CA_FILE",
    "AGENT_NAME",
    "METRICS_ADDR",
    "LOG_LEVEL",
];

/// The winning values as they came. No `Debug`: some are secret.
#[derive(Clone, Default, PartialEq, Deserialize)]
pub(super) struct Raw {
    pub kafka_bootstrap_servers: Option<String>,
    pub kafka_topic: Option<String>,
    pub kafka_security_protocol: Option<String>,
    pub kafka_ssl_ca_file: Option<String>,
    pub kafka_ssl_cert_file: Option<String>,
    pub kafka_ssl_key_file: Option<String>,
    pub kafka_sasl_mechanism: Option<String>,
    pub kafka_sasl_username: Option<String>,
    pub kafka_sasl_username_file: Option<String>,
    pub kafka_sasl_password: Option<String>,
    pub kafka_sasl_password_file: Option<String>,
    pub kafka_group_id: Option<String>,
    pub kafka_group_instance_id: Option<String>,
    pub db_host: Option<String>,
    pub db_port: Option<String>,
    pub db_name: Option<String>,
    pub db_user: Option<String>,
    pub db_password: Option<String>,
    pub db_password_file: Option<String>,
    pub db_table: Option<String>,
    pub db_sslmode: Option<String>,
    pub db_sslrootcert: Option<String>,
    pub db_batch_size: Option<String>,
    pub db_batch_seconds: Option<String>,
    pub db_retention: Option<String>,
    pub check_timeout: Option<String>,
    pub max_threads: Option<String>,
    pub max_body_bytes: Option<String>,
    pub user_agent: Option<String>,
    pub check_ca_file: Option<String>,
    pub agent_name: Option<String>,
    pub metrics_addr: Option<String>,
    pub log_level: Option<String>,
}

/// All variables of a run, and what was wrong with where they came from.
///
/// That is told together with what is wrong with their values, by the function of the parent that makes a command's
/// configuration of them.
#[derive(Clone)]
pub struct Variables {
    pub(super) raw: Raw,
    pub(super) problems: Problems,
}

impl Variables {
    /// Merges, from the weakest to the strongest: `env_file` (or `.env`, if there), the environment, `flags`.
    ///
    /// An empty value wins as any other does: it sets a variable back to its default.
    pub fn gather(flags: &[String], env_file: Option<&Path>) -> Self {
        let mut problems = Problems::default();
        let mut merged = from_env_file(env_file, &mut problems);
        merged.extend(from_environment(&mut problems));
        merged.extend(from_flags(flags, &mut problems));
        Self::merged(merged, problems)
    }

    /// From these pairs alone, whatever the environment says.
    pub fn from_pairs<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        let pairs = pairs
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value.to_owned()));
        Self::merged(pairs.collect(), Problems::default())
    }

    fn merged(mut pairs: BTreeMap<String, String>, mut problems: Problems) -> Self {
        pairs.retain(|_, value| !value.is_empty());
        let raw = envy::from_iter(pairs).unwrap_or_else(|error| {
            problems.push(error.to_string());
            Raw::default()
        });
        Self { raw, problems }
    }
}

fn from_flags(flags: &[String], problems: &mut Problems) -> BTreeMap<String, String> {
    let mut pairs = BTreeMap::new();
    for flag in flags {
        // What stands behind a name that we do not know may be a secret all the same: it is never repeated.
        match flag.split_once('=') {
            Some((name, value)) if NAMES.contains(&name) => {
                pairs.insert(name.to_owned(), value.to_owned());
            }
            Some((name, _)) => problems.push(format!(
                "-e {name:?}: no such variable; `host-metrics --help` lists them"
            )),
            None if NAMES.contains(&flag.as_str()) => {
                problems.push(format!("-e {flag}: expected NAME=VALUE; write -e {flag}=VALUE"))
            }
            None => problems.push("-e: expected NAME=VALUE, got a word without a `=`".into()),
        }
    }
    pairs
}

fn from_environment(problems: &mut Problems) -> BTreeMap<String, String> {
    let mut pairs = BTreeMap::new();
    for name in NAMES {
        let Some(value) = std::env::var_os(name) else {
            continue;
        };
        match value.into_string() {
            Ok(value) => {
                pairs.insert(name.to_owned(), value);
            }
            Err(_) => problems.push(format!(
                "{name}: its value in the environment is not UTF-8; correct it"
            )),
        }
    }
    pairs
}

fn from_env_file(env_file: Option<&Path>, problems: &mut Problems) -> BTreeMap<String, String> {
    let path = env_file.unwrap_or(Path::new(DEFAULT_ENV_FILE));
    let contents = match read_env_file(path) {
        Ok(contents) => contents,
        Err(error) if env_file.is_none() && error.kind() == io::ErrorKind::NotFound => {
            return BTreeMap::new();
        }
        Err(error) => {
            problems.push(format!("cannot read the variables' file {path:?}: {error}"));
            return BTreeMap::new();
        }
    };
    let contents = contents.strip_prefix('\u{feff}').unwrap_or(&contents);
    let mut pairs = BTreeMap::new();
    for pair in dotenvy::from_read_iter(contents.as_bytes()) {
        match pair {
            Ok((name, value)) if NAMES.contains(&name.as_str()) => {
                pairs.insert(name, value);
            }
            Ok(_) => {}
            // dotenvy's own message quotes the line, which may hold a secret.
            Err(dotenvy::Error::LineParse(line, _)) => {
                let number = match contents.find(&line) {
                    Some(start) => 1 + contents[..start].matches('\n').count(),
                    None => 1,
                };
                problems.push(format!(
                    "{}:{number}: expected NAME=VALUE; a value with blanks, quotes or `$` stands in single quotes",
                    path.display()
                ));
            }
            Err(error) => {
                problems.push(format!("cannot read the variables' file {path:?}: {error}"));
                break;
            }
        }
    }
    pairs
}

fn read_env_file(path: &Path) -> io::Result<String> {
    let mut contents = String::new();
    let read = File::open(path)?
        .take(MAX_ENV_FILE_BYTES + 1)
        .read_to_string(&mut contents)?;
    if read as u64 > MAX_ENV_FILE_BYTES {
        return Err(io::Error::other(format!(
            "it is longer than {MAX_ENV_FILE_BYTES} bytes"
        )));
    }
    Ok(contents)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_has_its_place_and_its_alone() {
        for name in NAMES {
            let variables = Variables::from_pairs([(name, "value")]);
            assert!(variables.raw != Raw::default(), "{name} arrives nowhere");
            for other in NAMES {
                let same = Variables::from_pairs([(other, "value")]).raw == variables.raw;
                assert_eq!(same, name == other, "{name} and {other}");
            }
        }
    }

    #[test]
    fn an_empty_value_is_none() {
        assert!(Variables::from_pairs([("DB_TABLE", "")]).raw == Raw::default());
    }
}
