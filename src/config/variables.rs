//! The sources of the variables: `-e NAME=VALUE`, the environment and the `.env` file, merged into one set.
//!
//! Owns the names of the variables and the precedence of the sources. The other files of `config` interpret the values.

use std::collections::BTreeMap;
use std::path::Path;

use super::env_file::{self, EnvFile};
use super::problems::Problem;

/// The names of all variables. Other names are ignored in `.env` and in the environment, and are an error after `-e`.
pub const NAMES: [&str; 42] = [
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
    "DB_ROLLUP_RETENTION",
    "STATE",
    "DOWN_WHEN",
    "CHECK_TIMEOUT",
    "MAX_THREADS",
    "MAX_BODY_BYTES",
    "USER_AGENT",
    "CHECK_CA_FILE",
    "SECRETS_DIR",
    "AGENT_NAME",
    "PRODUCE_GROUP",
    "METRICS_ADDR",
    "PAGE_ADDR",
    "PAGE_TITLE",
    "PAGE_SHOW_ADDRESSES",
    "PAGE_AUTH_FILE",
    "LOG_LEVEL",
];

/// All variables of a run, with the problems of their sources.
///
/// Those problems are reported together with the problems of the values. There is no `Debug`, because some values are secret.
#[derive(Clone, Default)]
pub struct Variables {
    /// The values that take precedence, unchanged. None is empty.
    values: BTreeMap<&'static str, String>,
    pub(super) problems: Vec<Problem>,
    warnings: Vec<String>,
}

impl Variables {
    /// Merges the sources: `flags` override the environment, which overrides `env_file` (or `.env`, if it exists).
    ///
    /// An empty value overrides too, and sets a variable back to its default.
    pub fn gather(flags: &[String], env_file: Option<&Path>) -> Self {
        let EnvFile {
            values,
            mut problems,
            warnings,
        } = env_file::read(env_file);
        let mut stronger = from_environment(&mut problems);
        stronger.extend(from_flags(flags, &mut problems));
        // No warning about a value that another source overrides.
        let warnings = warnings
            .into_iter()
            .filter(|(name, _)| name.is_none_or(|name| !stronger.contains_key(name)));
        Self {
            warnings: warnings.map(|(_, warning)| warning).collect(),
            problems,
            ..Self::merged([values, stronger].into_iter().flatten())
        }
    }

    /// From these pairs only, without the environment.
    pub fn from_pairs<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        Self::merged(
            pairs
                .into_iter()
                .filter_map(|(name, value)| Some((known(name)?, value.to_owned()))),
        )
    }

    /// The warnings about the sources, a line each.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    pub(super) fn get(&self, name: &str) -> Option<&str> {
        debug_assert!(known(name).is_some(), "{name} is not in NAMES");
        self.values.get(name).map(String::as_str)
    }

    fn merged(pairs: impl Iterator<Item = (&'static str, String)>) -> Self {
        let mut values: BTreeMap<_, _> = pairs.collect();
        values.retain(|_, value| !value.is_empty());
        Self {
            values,
            ..Self::default()
        }
    }
}

/// The name in [`NAMES`]; `None` if there is no such variable.
pub(super) fn known(name: &str) -> Option<&'static str> {
    NAMES.into_iter().find(|known| *known == name)
}

fn from_flags(flags: &[String], problems: &mut Vec<Problem>) -> BTreeMap<&'static str, String> {
    let mut pairs = BTreeMap::new();
    for flag in flags {
        let (name, value) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (flag.as_str(), None),
        };
        let problem = match (known(name), value) {
            (Some(name), Some(value)) => {
                pairs.insert(name, value.to_owned());
                continue;
            }
            (Some(name), None) => format!("-e {name}: expected NAME=VALUE; write -e {name}=VALUE"),
            // An unknown name may be a misplaced secret, so the message repeats it only if it looks like a name.
            (None, Some(_)) if is_like_a_name(name) => {
                format!("-e {name}: no such variable; `host-metrics --help` lists the names")
            }
            (None, Some(_)) => match known(&name.to_ascii_uppercase()) {
                Some(meant) => format!("-e {name}: no such variable; write -e {meant}=VALUE"),
                None => "-e: the text before the `=` is not the name of a variable; `host-metrics --help` lists the names"
                    .to_owned(),
            },
            (None, None) => "-e: expected NAME=VALUE, got a word without a `=`".to_owned(),
        };
        problems.push(Problem::Source(problem));
    }
    pairs
}

fn is_like_a_name(text: &str) -> bool {
    let is_part = |byte: u8| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_';
    !text.is_empty() && text.bytes().all(is_part)
}

fn from_environment(problems: &mut Vec<Problem>) -> BTreeMap<&'static str, String> {
    let mut pairs = BTreeMap::new();
    for name in NAMES {
        let Some(value) = std::env::var_os(name) else {
            continue;
        };
        match value.into_string() {
            Ok(value) => {
                pairs.insert(name, value);
            }
            Err(_) => problems.push(Problem::Source(format!(
                "{name}: its value in the environment is not UTF-8; correct it"
            ))),
        }
    }
    pairs
}
