//! The file of variables: `.env` in the working directory, or the one that `--env-file` names.
//!
//! dotenvy parses the syntax; this file decides which lines matter. A `.env` in the working directory may belong to another
//! program, so only the lines with names of our variables count. In a file named by `--env-file` every line counts.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Cursor};
use std::path::Path;

use super::problem::Problem;
use super::variables::known;
use crate::files::read_bounded;

/// The file to read without `--env-file`, if it exists.
const DEFAULT_PATH: &str = ".env";

/// Far above any real file, and harmless in memory.
const MAX_BYTES: u64 = 1 << 20;

#[derive(Default)]
pub(super) struct EnvFile {
    pub values: BTreeMap<&'static str, String>,
    pub problems: Vec<Problem>,
    pub warnings: Vec<String>,
}

/// Reads the named file, or `.env`.
pub(super) fn read(named: Option<&Path>) -> EnvFile {
    let path = named.unwrap_or(Path::new(DEFAULT_PATH));
    // Also from a pipe, as in `--env-file <(...)`.
    let contents = File::open(path).and_then(|file| read_bounded(file, MAX_BYTES));
    match (contents, named) {
        (Ok(contents), _) => parse(&path.display().to_string(), &contents, named.is_some()),
        (Err(error), None) if error.kind() == io::ErrorKind::NotFound => EnvFile::default(),
        (Err(error), None) => EnvFile {
            warnings: vec![format!(
                "cannot read {path:?}: {error}; any variables in it are not used"
            )],
            ..EnvFile::default()
        },
        (Err(error), Some(_)) => EnvFile {
            problems: vec![Problem::Source(format!(
                "cannot read the file of variables {path:?}: {error}"
            ))],
            ..EnvFile::default()
        },
    }
}

/// `is_strict`: a line that cannot be parsed is a problem even if its name is not one of ours.
fn parse(path: &str, contents: &[u8], is_strict: bool) -> EnvFile {
    let contents = contents.strip_prefix(b"\xef\xbb\xbf").unwrap_or(contents);
    let mut file = EnvFile::default();
    let mut assignments = Vec::new();
    for (number, line) in (1..).zip(contents.split(|byte| *byte == b'\n')) {
        let text = String::from_utf8_lossy(line);
        let is_right = std::str::from_utf8(line).is_ok();
        match dotenvy::from_read_iter(text.as_bytes()).next() {
            None => {}
            Some(Ok(_)) if is_right => assignments.push(text),
            // dotenvy's own message quotes the line, which may hold a secret.
            Some(_) => {
                let what = match known(name(&text)) {
                    Some(ours) => format!("{ours}: expected {ours}=VALUE"),
                    None if is_strict => "expected NAME=VALUE".to_owned(),
                    None => continue,
                };
                file.problems.push(Problem::Source(format!(
                    "{path}:{number}: {what} on one line, in UTF-8; put a value with spaces, quotes, `#`, `$` or `\\` in \
                     single quotes"
                )));
            }
        }
    }

    // Parsed again, all lines together, because a value may refer to a variable from an earlier line.
    let assignments = Cursor::new(assignments.join("\n") + "\n");
    for (variable, value) in dotenvy::from_read_iter(assignments).flatten() {
        if let Some(ours) = known(&variable) {
            file.values.insert(ours, value);
        }
    }
    file
}

/// The name that a line sets, or probably should set.
fn name(line: &str) -> &str {
    let line = line.trim_start();
    let line = line.strip_prefix("export ").unwrap_or(line).trim_start();
    let end = line.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    &line[..end.unwrap_or(line.len())]
}
