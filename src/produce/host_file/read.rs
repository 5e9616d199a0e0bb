//! Reads the bytes of a host file, from disk or standard input, up to a limit.

use std::fs::File;
use std::io;
use std::path::Path;

use super::files::Files;
use super::parse::{Hosts, parse_with};
use super::report::HostFileError;
use crate::files::read_bounded;

/// Enough for a million hosts of 60 bytes; a longer file is not a host file.
const MAX_HOST_FILE_BYTES: u64 = 64 << 20;

/// Reads and parses the host file at `path`; `-` is standard input. `secrets` is SECRETS_DIR. The paths of bodies are
/// relative to the folder of the host file.
pub fn read(path: &Path, secrets: Option<&Path>) -> Result<Hosts, HostFileError> {
    parse_contents(path, contents(path), secrets)
}

/// The bytes of the host file at `path`; `-` is standard input.
pub fn contents(path: &Path) -> io::Result<Vec<u8>> {
    if is_stdin(path) {
        return read_bounded(io::stdin().lock(), MAX_HOST_FILE_BYTES);
    }
    read_bounded(File::open(path)?, MAX_HOST_FILE_BYTES)
}

/// Parses what [`contents`] returned.
pub fn parse_contents(
    path: &Path,
    contents: io::Result<Vec<u8>>,
    secrets: Option<&Path>,
) -> Result<Hosts, HostFileError> {
    let name = match is_stdin(path) {
        true => "<stdin>".to_owned(),
        false => path.display().to_string(),
    };
    let contents = contents.map_err(|error| {
        HostFileError(format!(
            "cannot read the host file {name:?}: {error}; -c expects a file, or - for standard input"
        ))
    })?;
    let files = Files::new(secrets, Some(path.parent().unwrap_or(Path::new(""))));
    let mut hosts = parse_with(&name, &contents, &files)?;
    hosts.warnings.extend(files.warnings());
    Ok(hosts)
}

pub fn is_stdin(path: &Path) -> bool {
    path == Path::new("-")
}
