//! The sources of the variables: `-e NAME=VALUE`, the environment and the `.env` file, merged into one set.
//!
//! Owns the precedence of the sources.

use std::collections::BTreeMap;
use std::path::Path;

use super::env_file::{self, EnvFile};
use super::problem::Problem;
use super::variables::{NAMES, Variables, known};

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
        let mut variables = Self::merged([values, stronger].into_iter().flatten());
        variables.warnings = warnings;
        variables.problems = problems;
        variables
    }
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
            (None, None) => "-e: expected NAME=VALUE, found a word without a `=`".to_owned(),
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
